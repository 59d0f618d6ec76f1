"""What a task is: problems with verifiable answers, a score in [0, 1], and for some a demonstrator to imitate."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from typing import Any, Literal, Protocol, runtime_checkable

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    Args:
        prompt: the text that the policy continues.
        answer: the right response, or the part of it that is verified.
        entry: what else the verifier needs; survives ``json.dumps``.
    """

    prompt: str
    answer: str
    entry: dict[str, Any]


class Task(Protocol):
    """A source of problems and the verifier of their responses."""

    @property
    def name(self) -> str:
        """The name that ``make_task`` turns into an equal task."""
        ...

    @property
    def max_completion_tokens(self) -> int:
        """Tokens that a response may take, the end token included."""
        ...

    @property
    def alphabet(self) -> str | None:
        """The characters that a character tokenizer needs; None where the task needs a real tokenizer."""
        ...

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """``count`` problems, the same ones for the same arguments; the two splits never share a prompt."""
        ...

    def score(self, problem: Problem, completion: str, ended: bool) -> float:
        """Reward in [0, 1]; ``ended`` says that the policy stopped by itself, with its end token."""
        ...


@runtime_checkable
class Demonstrable(Protocol):
    """A task that shows how it is done."""

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """One response of the demonstrator, without the end token."""
        ...


def check_demonstrated(task: Task) -> str:
    """Return the alphabet of a task that the tiny model can be warm-started on.

    Raises:
        ValueError: for a task without an alphabet or a demonstrator.
    """
    if task.alphabet is None or not isinstance(task, Demonstrable):
        raise ValueError(
            f"model='tiny': expected a task with a demonstrator to warm-start on; {task.name!r} has none (give --model "
            "a pretrained model)"
        )
    return task.alphabet


def split_of(text: str) -> Split:
    """The split that a prompt belongs to, by a hash: the same in every process, one in four is a test problem."""
    return (
        "test"
        if hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()[0] % 4 == 0
        else "train"
    )


def check_request(split: str, count: int) -> None:
    """Raise ValueError unless ``split`` is one of :data:`SPLITS` and ``count`` is >= 0."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected 'train' or 'test'")
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"count={count!r}: expected an integer >= 0")
