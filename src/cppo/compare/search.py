"""An arm's settings by a small search of equal budget, on seeds that are not reported."""

from __future__ import annotations

import statistics
from typing import Any

from cppo.compare.scores import area
from cppo.compare.study import Cell, Rows, Search, Study


def unfinished(study: Study, search: Search, rows: Rows) -> int:
    """Return how many runs the search still lacks."""
    first = sum(rows.of(cell) is None for cell in first_cells(study, search))
    return first or sum(rows.of(cell) is None for cell in second_cells(study, search, rows))


def first_cells(study: Study, search: Search) -> list[Cell]:
    """Return the runs of the first step: every arm's own method at every learning rate."""
    return [
        cell
        for setting in study.settings
        for arm in search.knobs
        for factor in search.factors
        for cell in _cells(study, search, setting, arm, None, factor)
    ]


def second_cells(study: Study, search: Search, rows: Rows) -> list[Cell]:
    """Return the runs of the second step: the other knobs at the best learning rate of the first."""
    return [
        cell
        for setting in study.settings
        for arm, methods in search.knobs.items()
        for method in methods
        for cell in _cells(study, search, setting, arm, method, _best_factor(study, search, rows, setting, arm))
    ]


def choose(study: Study, search: Search, rows: Rows) -> dict[str, dict[str, dict[str, Any]]]:
    """Return setting -> arm -> the best candidate, ``method`` and ``factor``, and every candidate's mean score.

    Every run of the search must be there.
    """
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    for setting in study.settings:
        for arm, methods in search.knobs.items():
            factor = _best_factor(study, search, rows, setting, arm)
            candidates: list[tuple[str | None, float]] = [(None, factor) for factor in search.factors]
            candidates += [(method, factor) for method in methods]
            own = str(study.arms[arm]["method"])
            tried: list[dict[str, Any]] = [
                {
                    "method": method or own,
                    "factor": factor,
                    "score": round(_mean_score(study, search, rows, setting, arm, method, factor), 4),
                }
                for method, factor in candidates
            ]
            best = max(tried, key=lambda candidate: candidate["score"])  # the first of equals: as published
            chosen.setdefault(setting, {})[arm] = {
                "method": best["method"], "factor": best["factor"], "tried": tried,
            }  # fmt: skip
    return chosen


def _best_factor(study: Study, search: Search, rows: Rows, setting: str, arm: str) -> float:
    return max(search.factors, key=lambda factor: _mean_score(study, search, rows, setting, arm, None, factor))


def _mean_score(
    study: Study, search: Search, rows: Rows, setting: str, arm: str, method: str | None, factor: float
) -> float:
    found = [rows.of(cell) for cell in _cells(study, search, setting, arm, method, factor)]
    return statistics.fmean(area(row) for row in found if row is not None)


def _cells(study: Study, search: Search, setting: str, arm: str, method: str | None, factor: float) -> list[Cell]:
    return [Cell(setting, arm, study.config(setting, arm, seed, method=method, factor=factor)) for seed in search.seeds]
