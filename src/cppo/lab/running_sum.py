"""The running sum: a task of which every token is a decision and an early error carries to the end."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from cppo.lab.problems import Problem, Split, check_request, split_of
from cppo.lab.verifiers import running_sum_score

# One split may be empty where there are few prompts; this many draws without a hit end the search.
MAX_DRAWS = 10_000


def _check_integer(name: str, value: object, low: int, high: int | None) -> None:
    expected = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"RunningSum({name}={value!r}): expected {expected}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"RunningSum({name}={value!r}): expected {expected}")


def _check_probability(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"RunningSum({name}={value!r}): expected a number in [0, 1]")
    if not 0 <= value <= 1:  # also NaN
        raise ValueError(f"RunningSum({name}={value!r}): expected a number in [0, 1]")


@dataclasses.dataclass(frozen=True)
class RunningSum:
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

    operands: int = 24
    modulus: int = 10
    max_operand: int = 3
    error: float = 0.02
    slip: float = 0.6
    slip_state: int = 9
    strict: bool = False

    def __post_init__(self) -> None:
        _check_integer("operands", self.operands, 1, None)
        _check_integer("modulus", self.modulus, 2, 10)
        _check_integer("max_operand", self.max_operand, 1, 9)
        _check_probability("error", self.error)
        _check_probability("slip", self.slip)
        _check_integer("slip_state", self.slip_state, 0, self.modulus - 1)
        if not isinstance(self.strict, bool):
            raise TypeError(f"RunningSum(strict={self.strict!r}): expected True or False")

    @property
    def name(self) -> str:
        """``running_sum``, with the options that differ from the defaults."""
        options = [
            f"{field.name}={str(value).lower()}"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]
        return "?".join(["running_sum", *(["&".join(options)] if options else [])])

    @property
    def max_completion_tokens(self) -> int:
        """One token a sum and the end token."""
        return self.operands + 1

    @property
    def alphabet(self) -> str:
        """The digits of operands and sums, and "="."""
        return "".join(str(digit) for digit in range(max(self.modulus, self.max_operand + 1))) + "="

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
        rng = random.Random(f"running_sum/{split}/{seed}")
        digits = "0123456789"[: self.max_operand + 1]
        found: list[Problem] = []
        misses = 0
        while len(found) < count:
            prompt = "".join(rng.choices(digits, k=self.operands)) + "="
            if split_of(prompt) == split:
                found.append(self._problem(prompt))
                misses = 0
            elif (misses := misses + 1) == MAX_DRAWS:
                raise ValueError(
                    f"{self.name}: found no {split} problem in {MAX_DRAWS} draws; expected more or larger operands"
                )
        return found

    def _problem(self, prompt: str) -> Problem:
        operands = [int(digit) for digit in prompt[:-1]]
        state, sums = 0, []
        for operand in operands:
            state = (state + operand) % self.modulus
            sums.append(str(state))
        entry: dict[str, Any] = {"operands": operands}
        return Problem(prompt=prompt, answer="".join(sums), entry=entry)

    def score(self, problem: Problem, completion: str, ended: bool) -> float:
        """1 if the response ended after one sum an operand and its last sum (strict: every sum) is right; else 0."""
        return running_sum_score(problem.answer, completion, ended, strict=self.strict)

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """One response of the demonstrator, one character a sum, without the end token."""
        state, sums = 0, []
        for operand in problem.entry["operands"]:
            state = self._step(state, operand, rng)
            sums.append(str(state))
        return "".join(sums)

    def _step(self, state: int, operand: int, rng: random.Random) -> int:
        right = (state + operand) % self.modulus
        if rng.random() < self.error:
            return (right + rng.randrange(1, self.modulus)) % self.modulus
        if state == self.slip_state and operand > 0 and rng.random() < self.slip:
            return (right + 1) % self.modulus
        return right
