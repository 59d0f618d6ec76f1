"""Mathematics from a file: one problem a line, answers compared by Math-Verify."""

from __future__ import annotations

import json
import os
import pathlib
import random
from typing import Any
from urllib.parse import urlencode

from cppo.lab.problems import SPLITS, Problem, Split, check_request, split_of
from cppo.lab.verifiers import math_score

# The first one that a line has counts. A "prompt" is used as it is, the others become "Question: ...\nAnswer:".
PROBLEM_KEYS = ("prompt", "problem", "question")
ANSWER_KEYS = ("answer", "solution")


class MathFile:
    r"""Problems of a JSON Lines file.

    A line is an object with "prompt" (used as it is), "problem" or "question" (becomes "Question: ...\nAnswer:"), and
    "answer" or "solution" (which boxes its answer). "split": "train" or "test" decides the split; where a line has
    none, a hash of the prompt does.

    Args:
        path: the file, UTF-8.
        max_completion_tokens: tokens that a response may take, >= 1.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for an empty file, or a line that is no such object; names the file and the line.
    """

    def __init__(self, path: str | os.PathLike[str], max_completion_tokens: int = 512) -> None:
        limit = max_completion_tokens
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError(f"MathFile(max_completion_tokens={limit!r}): expected an integer >= 1")
        self.path = pathlib.Path(path)
        self._max_completion_tokens = limit
        self._problems = _read(self.path)

    @property
    def name(self) -> str:
        """``math:PATH``, with the limit of tokens where it is not the default."""
        options = {"max_completion_tokens": self.max_completion_tokens}
        return f"math:{self.path}" + (f"?{urlencode(options)}" if self.max_completion_tokens != 512 else "")

    @property
    def max_completion_tokens(self) -> int:
        """Tokens that a response may take."""
        return self._max_completion_tokens

    @property
    def alphabet(self) -> None:
        """None: problems are text, for a real tokenizer."""
        return None

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """``count`` problems of the split, shuffled; every problem once before any comes again.

        Args:
            split: "train" or "test".
            count: how many, >= 0.
            seed: the same seed gives the same problems.

        Raises:
            ValueError: for an unknown split, or one that has no problem.
        """
        check_request(split, count)
        pool = self._problems[split]
        if not pool:
            raise ValueError(f'{self.path}: no problem is in the split {split!r}; expected lines with that "split"')
        rng = random.Random(f"math/{split}/{seed}")
        found: list[Problem] = []
        while len(found) < count:
            found.extend(rng.sample(pool, len(pool)))
        return found[:count]

    def score(self, problem: Problem, completion: str, ended: bool) -> float:
        """1 if the completion's final answer is right, else 0; ``ended`` does not matter."""
        return math_score(problem.answer, completion)


def _read(path: pathlib.Path) -> dict[Split, list[Problem]]:
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such file; expected a JSON Lines file of problems")
    problems: dict[Split, list[Problem]] = {"train": [], "test": []}
    seen: dict[str, tuple[Split, int]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        problem, split = _parse(line, where, number)
        first_split, first_number = seen.setdefault(problem.prompt, (split, number))
        if first_split != split:
            raise ValueError(
                f"{where}: the problem of line {first_number} again, there in {first_split!r}, here in {split!r}; "
                "expected splits that share no problem"
            )
        problems[split].append(problem)
    if not seen:
        raise ValueError(f"{path}: the file is empty; expected one JSON object a line")
    return problems


def _parse(line: bytes, where: str, number: int) -> tuple[Problem, Split]:
    try:
        row = json.loads(line)
    except ValueError as error:  # also bytes that are not UTF-8
        raise ValueError(f"{where}: not JSON ({error}); expected one object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {line[:60]!r} is not an object; expected one object a line")
    key, text = _field(row, PROBLEM_KEYS, where)
    _, answer = _field(row, ANSWER_KEYS, where)
    prompt = text if key == "prompt" else f"Question: {text}\nAnswer:"
    split = row.get("split", split_of(prompt))
    if split not in SPLITS:
        raise ValueError(f"{where}: split={split!r}; expected 'train' or 'test'")
    return Problem(prompt=prompt, answer=answer, entry={"line": number}), split


def _field(row: dict[str, Any], keys: tuple[str, ...], where: str) -> tuple[str, str]:
    for key in keys:
        if key in row:
            value = row[key]
            if isinstance(value, int | float) and not isinstance(value, bool):
                value = str(value)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{where}: {key}={value!r}; expected text that is not empty")
            return key, value
    wanted = " or ".join(json.dumps(key) for key in keys)
    raise ValueError(f"{where}: has the keys {sorted(row)}; expected {wanted}")
