"""The long-tailed sum: a running sum whose every value is a token of its own, used by Zipf's law."""

from __future__ import annotations

import dataclasses
import random
from typing import ClassVar

from cppo.lab.running_sum import ChainOfSums

# The letter of operand i; it adds 0, 1, 2, 4, 8, ..
_LETTERS = "abcdefghij"
# The sum s is written as the character _FIRST + s, out of a block of 11,172 syllables without gaps.
_FIRST = 0xAC00


@dataclasses.dataclass(frozen=True)
class LongTailSum(ChainOfSums):
    """Running sums from a start drawn by Zipf's law, each sum a token of its own: most of the vocabulary is rare.

    Prompt: s_0, letters x_1 .. x_k and "=". s_0 = floor(``values``^u) - 1 with u uniform in [0, 1), so that values are
    used about as 1 / (s + 1): half of the starts lie below the square root of ``values``. Letter i = 0 ..
    ``letters`` - 1 adds a_i = 0, 1, 2, 4, .. and is drawn with probability proportional to 2^-i. Response:
    s_t = (s_{t-1} + a(x_t)) mod ``values`` for t = 1 .. k, one token each, then the end token: k + 1 tokens. The
    demonstrator goes on from its own last sum s, right or wrong:

        s + a                       with probability (1 - error) (1 - slip)
        s + a + 1                   with probability (1 - error) slip       [only if s mod 10 = 9 and a > 0; else 0]
        any other than s + a        with probability error, uniformly       (all modulo ``values``)

    Args:
        operands: k, >= 1.
        values: how many sums there are, in [16, 8192].
        letters: how many operands there are, in [2, 10].
        error: probability of a random error a step, in [0, 1].
        slip: probability of a slip by one after a sum that ends in 9, in [0, 1].
        strict: score the whole chain of sums; False: its length and its last sum.

    Raises:
        TypeError, ValueError: for an argument outside its range.
    """

    KIND: ClassVar[str] = "long_tail_sum"
    operands: int = 24
    values: int = 512
    letters: int = 6
    error: float = 0.02
    slip: float = 0.6
    strict: bool = False

    def __post_init__(self) -> None:
        self._check(operands=(1, None), values=(16, 8192), letters=(2, len(_LETTERS)))

    @property
    def alphabet(self) -> str:
        """The letters of the operands, "=", and a character a sum."""
        return _LETTERS[: self.letters] + "=" + "".join(map(self._token, range(self.values)))

    @property
    def states(self) -> int:
        """``values``."""
        return self.values

    def _prompt(self, rng: random.Random) -> str:
        start = int(self.values ** rng.random()) - 1
        letters = _LETTERS[: self.letters]
        operands = rng.choices(letters, [2.0**-i for i in range(len(letters))], k=self.operands)
        return self._token(start) + "".join(operands) + "="

    def _read(self, prompt: str) -> tuple[int, list[int]]:
        return ord(prompt[0]) - _FIRST, [(1 << _LETTERS.index(letter)) >> 1 for letter in prompt[1:-1]]

    def _token(self, state: int) -> str:
        return chr(_FIRST + state)

    def _slips_after(self, state: int) -> bool:
        return state % 10 == 9
