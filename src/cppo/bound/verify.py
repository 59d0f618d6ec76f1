"""Run every statement on thousands of small problems, and say what held and how tightly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cppo.bound.cases import Case, draw_cases
from cppo.bound.statements import STATEMENTS, Comparison, Statement

# (letters, tokens): all shapes get as many problems. The largest has 81 responses.
SHAPES = ((2, 1), (2, 2), (3, 2), (5, 2), (2, 3), (3, 3), (2, 4), (3, 4), (2, 5), (2, 6))
TOLERANCE = 1e-12  # of float64, relative to the size of what is compared; fractions have none
_BATCH = 50  # problems at once
_ONE_IN = 20  # problems are checked in fractions too
_MEASURABLE = 1e-9  # of its size: a smaller quantity says nothing of tightness


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found about one statement."""

    statement: str
    text: str
    instances: int  # problems in float64
    comparisons: int
    violations: int
    exact_instances: int  # problems in fractions, the saturating one included
    exact_violations: int
    excess: float  # the largest left - right of an inequality, or |left - right| of an identity, over its size
    tightness: dict[str, float] | None  # bound / quantity over the problems: min, quartile_1, median, quartile_3
    tightness_by_tokens: dict[int, float]  # median by T
    attained: float | None  # bound / quantity where it is attained; None: an identity


@dataclasses.dataclass
class _Tally:
    instances: int = 0
    comparisons: int = 0
    violations: int = 0
    excess: float = 0.0
    ratios: dict[int, list[NDArray[np.float64]]] = dataclasses.field(default_factory=dict)

    def add(self, statement: Statement, case: Case) -> None:
        if not statement.applies(case):
            return
        self.instances += len(case.problems)
        for comparison in statement.check(case):
            excess, ratio = _judge(comparison)
            self.comparisons += excess.size
            self.violations += int((excess > (0 if case.problems.exact else TOLERANCE)).sum())
            self.excess = max(self.excess, float(excess.max(initial=0)))
            self.ratios.setdefault(case.problems.T, []).append(ratio)


def _judge(comparison: Comparison) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return by how much each comparison fails, over its size, and right / left of those that measure tightness."""
    left, right = np.broadcast_arrays(comparison.left, comparison.right)
    scale = np.asarray(comparison.scale)
    scale = np.broadcast_to(scale.reshape(scale.shape + (1,) * (left.ndim - scale.ndim)), left.shape)
    gap = np.abs(left - right) if comparison.identity else left - right
    excess = gap / np.where(scale > 0, scale, 1)
    # A bound that is no number bounds nothing, and an infinite one says nothing.
    finite = np.isfinite(right.astype(np.float64)) & np.isfinite(left.astype(np.float64))
    excess = np.where(finite, excess, math.inf)
    if not comparison.measured:
        return excess, np.empty(0)
    counted = left > _MEASURABLE * scale
    return excess, (right[counted] / left[counted]).astype(np.float64)


def _verdict(statement: Statement, rounded: _Tally, exact: _Tally) -> Verdict:
    attained = None
    if statement.attained is not None:
        example = _Tally()
        example.add(statement, statement.attained())
        attained = float(np.concatenate([r for parts in example.ratios.values() for r in parts]).min())
    by_tokens = {T: np.concatenate(parts) for T, parts in sorted(rounded.ratios.items())}
    ratios = np.concatenate([*by_tokens.values(), np.empty(0)])
    names = ("min", "quartile_1", "median", "quartile_3")
    quantiles = np.quantile(ratios, (0, 0.25, 0.5, 0.75)).tolist() if ratios.size else None
    return Verdict(
        statement=statement.name,
        text=statement.text,
        instances=rounded.instances,
        comparisons=rounded.comparisons,
        violations=rounded.violations,
        exact_instances=exact.instances,
        exact_violations=exact.violations,
        excess=max(rounded.excess, exact.excess),
        tightness=None if quantiles is None else dict(zip(names, quantiles, strict=True)),
        tightness_by_tokens={T: float(np.median(r)) for T, r in by_tokens.items() if r.size},
        attained=attained,
    )


def _cases(instances: int, seed: int) -> Iterator[tuple[Case, Case | None]]:
    rng = np.random.default_rng(seed)
    for number, (V, T) in enumerate(SHAPES):
        left = instances // len(SHAPES) + (number < instances % len(SHAPES))
        while left:
            count = min(left, _BATCH)
            left -= count
            yield draw_cases(rng, count, V, T, exact=-(-count // _ONE_IN))


def verify(instances: int, seed: int, *, progress: Callable[[int], None] = lambda done: None) -> Sequence[Verdict]:
    """Check every statement on ``instances`` random problems, three of each fifty in fractions too.

    Args:
        instances: problems, at least one a shape.
        seed: of the problems.
        progress: called with the number of problems done since the last call.

    Returns:
        A verdict a statement, in the order of the paper.

    Raises:
        ValueError: if ``instances`` or ``seed`` is out of range.
    """
    if instances < len(SHAPES):
        raise ValueError(f"instances={instances}: expected at least {len(SHAPES)}, one of each shape")
    if seed < 0:
        raise ValueError(f"seed={seed}: expected an integer >= 0")
    tallies = [(statement, _Tally(), _Tally()) for statement in STATEMENTS]
    for rounded, exact in _cases(instances, seed):
        for statement, mine, in_fractions in tallies:
            mine.add(statement, rounded)
            if exact is not None:
                in_fractions.add(statement, exact)
        progress(len(rounded.problems))
    for statement, _, in_fractions in tallies:
        if statement.attained is not None:
            in_fractions.add(statement, statement.attained())
    return [_verdict(*tally) for tally in tallies]
