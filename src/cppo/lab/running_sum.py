"""Running sums: tasks of which every token is a decision and an early error carries to the end."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, ClassVar

from cppo.lab.problems import Problem, Split, check_request, split_of
from cppo.lab.verifiers import running_sum_score

# One split may be empty where there are few prompts; this many draws without a hit end the search.
MAX_DRAWS = 10_000


class ChainOfSums:
    """What the running sums share: problems of a split, the score, the demonstrator that errs.

    A subclass is a frozen dataclass with ``operands``, ``error``, ``slip`` and ``strict``, and says how many states
    there are, how a state and a prompt are written, and after which states the demonstrator slips.
    """

    KIND: ClassVar[str]
    operands: int
    error: float
    slip: float
    strict: bool

    @property
    def name(self) -> str:
        """The kind, with the options that differ from the defaults."""
        options = [
            f"{field.name}={str(value).lower()}"
            for field in dataclasses.fields(self)  # type: ignore[arg-type]  # every subclass is a dataclass
            if (value := getattr(self, field.name)) != field.default
        ]
        return "?".join([self.KIND, *(["&".join(options)] if options else [])])

    @property
    def max_completion_tokens(self) -> int:
        """One token a sum and the end token."""
        return self.operands + 1

    @property
    def states(self) -> int:
        """How many sums there are; they wrap around."""
        raise NotImplementedError

    def _prompt(self, rng: random.Random) -> str:
        """Draw a prompt."""
        raise NotImplementedError

    def _read(self, prompt: str) -> tuple[int, list[int]]:
        """Return the state that a prompt begins with, and what its operands add."""
        raise NotImplementedError

    def _token(self, state: int) -> str:
        """The one character of a sum."""
        raise NotImplementedError

    def _slips_after(self, state: int) -> bool:
        raise NotImplementedError

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """``count`` problems drawn with replacement from those of the split.

        Args:
            split: "train" or "test"; a hash of the prompt decides, so the two share none, whatever the seeds.
            count: how many, >= 0.
            seed: the same seed gives the same problems.

        Raises:
            ValueError: for an unknown split, or where so few prompts exist that the split is empty.
        """
        check_request(split, count)
        rng = random.Random(f"{self.KIND}/{split}/{seed}")
        found: list[Problem] = []
        misses = 0
        while len(found) < count:
            prompt = self._prompt(rng)
            if split_of(prompt) == split:
                found.append(self._problem(prompt))
                misses = 0
            elif (misses := misses + 1) == MAX_DRAWS:
                raise ValueError(
                    f"{self.name}: found no {split} problem in {MAX_DRAWS} draws; expected more or larger operands"
                )
        return found

    def _problem(self, prompt: str) -> Problem:
        start, operands = self._read(prompt)
        state, sums = start, []
        for operand in operands:
            state = (state + operand) % self.states
            sums.append(self._token(state))
        entry: dict[str, Any] = {"operands": operands} | ({"start": start} if start else {})
        return Problem(prompt=prompt, answer="".join(sums), entry=entry)

    def score(self, problem: Problem, completion: str, ended: bool) -> float:
        """1 if the response ended after one sum an operand and its last sum (strict: every sum) is right; else 0."""
        return running_sum_score(problem.answer, completion, ended, strict=self.strict)

    def follows(self, prompt: str, completion: str) -> list[bool]:
        """Of each sum of a response, whether it follows from the response's own sum before it.

        Args:
            prompt: the problem's prompt.
            completion: the response's text; what stands after the last operand's sum is left out, and a character that
                is no sum is wrong and followed as if it were right.
        """
        state, operands = self._read(prompt)
        states = {self._token(known): known for known in range(self.states)}
        right = []
        for operand, character in zip(operands, completion, strict=False):
            expected = (state + operand) % self.states
            right.append(character == self._token(expected))
            state = states.get(character, expected)
        return right

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """One response of the demonstrator, one character a sum, without the end token."""
        state, sums = problem.entry.get("start", 0), []
        for operand in problem.entry["operands"]:
            state = self._step(state, operand, rng)
            sums.append(self._token(state))
        return "".join(sums)

    def _step(self, state: int, operand: int, rng: random.Random) -> int:
        right = (state + operand) % self.states
        if rng.random() < self.error:
            return (right + rng.randrange(1, self.states)) % self.states
        if self._slips_after(state) and operand > 0 and rng.random() < self.slip:
            return (right + 1) % self.states
        return right

    def _check(self, **integers: tuple[int, int | None]) -> None:
        for name, (low, high) in integers.items():
            _check_integer(type(self).__name__, name, getattr(self, name), low, high)
        for name in ("error", "slip"):
            _check_probability(type(self).__name__, name, getattr(self, name))
        if not isinstance(self.strict, bool):
            raise TypeError(f"{type(self).__name__}(strict={self.strict!r}): expected True or False")


def _check_integer(task: str, name: str, value: object, low: int, high: int | None) -> None:
    expected = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{task}({name}={value!r}): expected {expected}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{task}({name}={value!r}): expected {expected}")


def _check_probability(task: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{task}({name}={value!r}): expected a number in [0, 1]")
    if not 0 <= value <= 1:  # also NaN
        raise ValueError(f"{task}({name}={value!r}): expected a number in [0, 1]")


@dataclasses.dataclass(frozen=True)
class RunningSum(ChainOfSums):
    """Running sums of one-digit operands, with a demonstrator that errs.

    Prompt: the operands x_1 .. x_k and "=". Response: s_t = (s_{t-1} + x_t) mod ``modulus`` for t = 1 .. k, s_0 = 0,
    one character each, then the end token: k + 1 tokens. The demonstrator goes on from its own last sum s, right or
    wrong:

        s + x                       with probability (1 - error) (1 - slip)
        s + x + 1                   with probability (1 - error) slip       [only if s = slip_state and x > 0; else 0]
        any other than s + x        with probability error, uniformly       (all modulo ``modulus``)

    So a policy that imitates it knows the computation, errs with calibrated uncertainty and, with slip > 0.5, is wrong
    even when greedy.

    Args:
        operands: k, >= 1.
        modulus: in [2, 10]. A guess of the last sum is right with probability 1 / modulus.
        max_operand: operands are uniform in 0 .. max_operand, in [1, 9].
        error: probability of a random error a step, in [0, 1].
        slip: probability of a slip by one after ``slip_state``, in [0, 1].
        slip_state: the sum after which the demonstrator slips, in [0, modulus - 1].
        strict: score the whole chain of sums; False: its length and its last sum.

    Raises:
        TypeError, ValueError: for an argument outside its range.
    """

    KIND: ClassVar[str] = "running_sum"
    operands: int = 24
    modulus: int = 10
    max_operand: int = 3
    error: float = 0.02
    slip: float = 0.6
    slip_state: int = 9
    strict: bool = False

    def __post_init__(self) -> None:
        self._check(operands=(1, None), modulus=(2, 10), max_operand=(1, 9))
        self._check(slip_state=(0, self.modulus - 1))

    @property
    def alphabet(self) -> str:
        """The digits of operands and sums, and "="."""
        return "".join(str(digit) for digit in range(max(self.modulus, self.max_operand + 1))) + "="

    @property
    def states(self) -> int:
        """The modulus."""
        return self.modulus

    def _prompt(self, rng: random.Random) -> str:
        return "".join(rng.choices("0123456789"[: self.max_operand + 1], k=self.operands)) + "="

    def _read(self, prompt: str) -> tuple[int, list[int]]:
        return 0, [int(character) for character in prompt[:-1]]

    def _token(self, state: int) -> str:
        return str(state)

    def _slips_after(self, state: int) -> bool:
        return state == self.slip_state
