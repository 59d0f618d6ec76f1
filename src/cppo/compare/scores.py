"""What a finished run is scored by, and when it is said to have collapsed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def final(row: Row) -> float:
    """The last evaluation."""
    return float(row["accuracy"][-1])


def best(row: Row) -> float:
    """The best evaluation in the window that all runs share (the paper's rule): biased upward, the same for all."""
    return float(max(row["accuracy"]))


def area(row: Row) -> float:
    """Mean of the evaluations after the start, each weighing the rollouts since the one before.

    High for a run that learns early and keeps what it learned.
    """
    rollout, accuracy = row["rollout"], row["accuracy"]
    parts = [a * (now - before) for a, before, now in zip(accuracy[1:], rollout, rollout[1:], strict=False)]
    return float(sum(parts) / (rollout[-1] - rollout[0]))


SCORES: dict[str, Callable[[Row], float]] = {"final": final, "best": best, "area": area}


def collapsed(row: Row) -> bool:
    """Whether the run ends below half of its best evaluation, or below its start by more than two standard errors."""
    error = row["standard_error"][0] or 0.0
    return final(row) < 0.5 * best(row) or final(row) < row["accuracy"][0] - 2 * error
