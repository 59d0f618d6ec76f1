"""From the lines of the finished runs to what a report shows: scores, paired differences, stability."""

from __future__ import annotations

import statistics as python_statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from cppo.compare.search import score as area
from cppo.compare.statistics import (
    Values,
    holm,
    interquartile_mean,
    interval,
    mean_of_means,
    pooled_interquartile_mean,
    probability_interval,
    seeds_needed,
    sign_flip_p,
)
from cppo.compare.study import SEARCHED, Study

FORMAT = 1
Row = dict[str, Any]
# Sizes of a difference for which the number of seeds is stated.
DIFFERENCES = (0.02, 0.05, 0.1)


def final(row: Row) -> float:
    """The last evaluation."""
    return float(row["accuracy"][-1])


def best(row: Row) -> float:
    """The best evaluation in the window that all runs share (the paper's rule): biased upward, the same for all."""
    return float(max(row["accuracy"]))


def collapsed(row: Row) -> bool:
    """Whether the run ends below half of its own best evaluation."""
    return final(row) < 0.5 * best(row)


SCORES = {"final": final, "best": best, "area": area}


def analyse(study: Study, rows: Mapping[str, Row], chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the document of a comparison.

    Args:
        study: the study.
        rows: the finished runs by key.
        chosen: what a search chose, by setting and arm.
    """
    runs: dict[str, dict[str, dict[int, Row]]] = {setting: {} for setting in study.settings}
    missing = 0
    for cell in study.cells(chosen):
        if cell.key in rows:
            runs[cell.setting].setdefault(cell.arm, {})[cell.seed] = rows[cell.key]
        else:
            missing += 1
    settings = {name: _setting(study, name, arms) for name, arms in runs.items() if arms}
    return {
        "format": FORMAT, "title": study.title, "reference": study.reference, "axis": study.axis,
        "at": dict(study.at), "seeds": list(study.seeds), "missing": missing,
        "chosen": {setting: dict(arms) for setting, arms in chosen.items()},
        "settings": settings,
        "overall": _overall(study, runs),
        "cpu_hours": round(sum(row["cpu_seconds"] for row in rows.values()) / 3600, 3),
        "runs": len(rows),
    }  # fmt: skip


def reference_of(study: Study, arm: str, arms: Mapping[str, Any]) -> str:
    """Return what an arm is compared with: searched arms with the searched reference."""
    searched = study.reference + SEARCHED
    return searched if arm.endswith(SEARCHED) and searched in arms else study.reference


def _setting(study: Study, name: str, arms: dict[str, dict[int, Row]]) -> dict[str, Any]:
    found = {arm: _arm(runs) for arm, runs in arms.items()}
    for kind in SCORES:
        _compare(study, kind, arms, found)
    every = [row for runs in arms.values() for row in runs.values()]
    return {
        "arms": found,
        "evaluation_standard_error": python_statistics.fmean(row["standard_error"][-1] for row in every),
        "window": max(row["rollout"][-1] for row in every),
    }


def _arm(runs: dict[int, Row]) -> dict[str, Any]:
    rows = [runs[seed] for seed in sorted(runs)]
    scores = {kind: np.array([rule(row) for row in rows]) for kind, rule in SCORES.items()}
    last = [{name: values[-1] for name, values in row["curves"].items()} for row in rows]
    whole = [{name: python_statistics.fmean(values) for name, values in row["curves"].items()} for row in rows]

    def mean(parts: list[dict[str, float]], name: str) -> float | None:
        values = [part[name] for part in parts if name in part]
        return python_statistics.fmean(values) if values else None

    return {
        "method": rows[0]["method"], "learning_rate": rows[0]["learning_rate"],
        "seeds": sorted(runs),
        "start": python_statistics.fmean(row["accuracy"][0] for row in rows),
        "scores": {kind: _estimates(values) for kind, values in scores.items()},
        "collapsed": sum(map(collapsed, rows)),
        "stability": {
            "gap": mean(whole, "gap"),
            "first_gap": python_statistics.fmean(row["curves"]["gap"][0] for row in rows),
            "tail": python_statistics.fmean(python_statistics.fmean(row["tail"]) for row in rows),
            "kl": mean(whole, "kl"),
            "gradient_norm": mean(whole, "gradient_norm"),
            "largest_gradient_norm": max(max(row["curves"]["gradient_norm"]) for row in rows),
            "last_entropy": mean(last, "entropy"),
            "masked": mean(whole, "masked"),
            "masked_positive": mean(whole, "masked_positive"),
            "masked_negative": mean(whole, "masked_negative"),
            "budget_share": mean(whole, "budget_share"),
        },
        "curve": _curve(rows),
        "cpu_seconds": python_statistics.fmean(row["cpu_seconds"] for row in rows),
    }  # fmt: skip


def _estimates(values: Values) -> dict[str, Any]:
    return {
        "values": [float(value) for value in values],
        "mean": float(values.mean()),
        "mean_interval": interval([values], mean_of_means),
        "iqm": float(interquartile_mean(values)),
        "iqm_interval": interval([values], pooled_interquartile_mean),
    }


def _compare(study: Study, kind: str, arms: dict[str, dict[int, Row]], found: dict[str, dict[str, Any]]) -> None:
    """Add to each arm's score the paired difference reference less arm, over the seeds that both have."""
    tested: list[tuple[str, float]] = []
    for arm in arms:
        reference = reference_of(study, arm, arms)
        x, y = _paired(kind, arms, reference, arm)
        if arm == reference or not len(x):
            continue
        difference = x - y
        probability, probability_bounds = probability_interval([(x, y)])
        p = sign_flip_p(difference)
        deviation = float(difference.std(ddof=1)) if len(difference) > 1 else None
        found[arm]["scores"][kind]["reference_less_arm"] = {
            "reference": reference, "pairs": len(x), "mean": float(difference.mean()),
            "interval": interval([difference], mean_of_means), "deviation": deviation,
            "probability": probability, "probability_interval": probability_bounds, "p": p,
            "seeds_needed": None if deviation is None else {str(d): seeds_needed(deviation, d) for d in DIFFERENCES},
        }  # fmt: skip
        if p is not None:
            tested.append((arm, p))
    for (arm, _), adjusted in zip(tested, holm([p for _, p in tested]), strict=True):
        found[arm]["scores"][kind]["reference_less_arm"]["p_holm"] = adjusted


def _paired(kind: str, arms: Mapping[str, dict[int, Row]], reference: str, arm: str) -> tuple[Values, Values]:
    shared = sorted(arms.get(reference, {}).keys() & arms.get(arm, {}).keys())
    rule = SCORES[kind]
    return (
        np.array([rule(arms[reference][seed]) for seed in shared]),
        np.array([rule(arms[arm][seed]) for seed in shared]),
    )


def _overall(study: Study, runs: Mapping[str, dict[str, dict[int, Row]]]) -> dict[str, Any]:
    """Return every arm's scores over all settings that it and its reference have run in, each weighing the same."""
    names = {arm: None for arms in runs.values() for arm in arms}
    overall = {}
    for arm in names:
        entry: dict[str, Any] = {}
        for kind, rule in SCORES.items():
            own = [np.array([rule(row) for row in arms[arm].values()]) for arms in runs.values() if arms.get(arm)]
            pairs = []
            for arms in runs.values():
                x, y = _paired(kind, arms, reference_of(study, arm, arms), arm)
                if len(x):
                    pairs.append((x, y))
            entry[kind] = {
                "settings": len(own),
                "mean": float(mean_of_means(*own)), "mean_interval": interval(own, mean_of_means),
                "iqm": float(pooled_interquartile_mean(*own)),
                "iqm_interval": interval(own, pooled_interquartile_mean),
            }  # fmt: skip
            if pairs and arm not in (study.reference, study.reference + SEARCHED):
                differences = [x - y for x, y in pairs]
                probability, bounds = probability_interval(pairs)
                entry[kind]["reference_less_arm"] = {
                    "settings": len(pairs), "mean": float(mean_of_means(*differences)),
                    "interval": interval(differences, mean_of_means),
                    "probability": probability, "probability_interval": bounds,
                }  # fmt: skip
        entry["collapsed"] = sum(collapsed(row) for arms in runs.values() for row in arms.get(arm, {}).values())
        entry["runs"] = sum(len(arms.get(arm, {})) for arms in runs.values())
        overall[arm] = entry
    return overall


def _curve(rows: list[Row]) -> dict[str, Any]:
    """Return the mean of the evaluations and of some curves over the seeds, with the interval of the first."""
    length = min(len(row["accuracy"]) for row in rows)
    accuracy = np.array([row["accuracy"][:length] for row in rows])
    bands = [interval([accuracy[:, i]], mean_of_means) for i in range(length)]
    curves = {}
    for name in rows[0]["curves"]:
        if all(name in row["curves"] for row in rows):
            shortest = min(len(row["curves"][name]) for row in rows)
            curves[name] = np.array([row["curves"][name][:shortest] for row in rows]).mean(axis=0).tolist()
    shortest = min(len(row["tail"]) for row in rows)
    curves["tail"] = np.array([row["tail"][:shortest] for row in rows]).mean(axis=0).tolist()
    return {
        "rollout": rows[0]["rollout"][:length],
        "accuracy": accuracy.mean(axis=0).tolist(),
        "low": [band[0] if band else None for band in bands],
        "high": [band[1] if band else None for band in bands],
        "curves": curves,
    }
