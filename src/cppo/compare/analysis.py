"""From the lines of the finished runs to what a report shows: scores, paired differences, stability."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cppo.compare.estimates import (
    FEWEST,
    Values,
    holm,
    improvement,
    interquartile_mean,
    interval,
    mean,
    pooled_interquartile_mean,
    seeds_needed,
    sign_flip_p,
)
from cppo.compare.scores import SCORES, Row, collapsed
from cppo.compare.study import SEARCHED, Rows, Study, same_start

FORMAT = 1
# Sizes of a difference for which the number of seeds is stated.
DIFFERENCES = (0.02, 0.05, 0.1)
Arms = dict[str, dict[int, Row]]  # arm -> seed -> line


def analyse(
    study: Study, rows: Rows, chosen: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str]
) -> dict[str, Any]:
    """Return the document of a comparison.

    Args:
        study: the study.
        rows: the finished runs.
        chosen: what a search chose, by setting and arm.
        failed: the errors of the runs that failed, by key.
    """
    runs: dict[str, Arms] = {setting: {} for setting in study.settings}
    without: dict[str, dict[str, dict[str, int]]] = {}
    for cell in study.cells(chosen):
        row = rows.of(cell)
        if row is not None:
            runs[cell.setting].setdefault(cell.arm, {})[cell.seed] = row
        else:
            why = "failed" if cell.key in failed else "missing"
            counts = without.setdefault(cell.setting, {}).setdefault(cell.arm, {"failed": 0, "missing": 0})
            counts[why] += 1
    settings = {name: _setting(study, arms) | {"without": without.get(name, {})} for name, arms in runs.items() if arms}
    used = [row for arms in runs.values() for found in arms.values() for row in found.values()]
    return {
        "format": FORMAT, "title": study.title, "reference": study.reference, "axis": study.axis,
        "at": dict(study.at), "seeds": list(study.seeds),
        "missing": sum(n for arms in without.values() for counts in arms.values() for n in counts.values()),
        "failed": sum(counts["failed"] for arms in without.values() for counts in arms.values()),
        "chosen": {setting: dict(arms) for setting, arms in chosen.items()},
        # In the order of the study, which a browser does not keep where a name is a number.
        "setting_names": list(settings),
        "arm_names": [arm for arm in study.arm_names if any(arm in entry["arms"] for entry in settings.values())],
        "not_begun": [name for name, arms in runs.items() if not arms],
        "settings": settings,
        "overall": _overall(study, [arms for arms in runs.values() if arms]),
        "versions": _versions(used),
        "cpu_hours": round(sum(row["cpu_seconds"] for row in rows) / 3600, 3),
        "runs": len(rows),
    }  # fmt: skip


def reference_of(study: Study, arm: str) -> str:
    """Return what an arm is compared with: searched arms with the searched reference."""
    return study.reference + (SEARCHED if arm.endswith(SEARCHED) else "")


def _versions(rows: Iterable[Row]) -> list[str]:
    """Return the sets of versions that the lines come from, one text each."""
    return sorted({", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows})


def _setting(study: Study, arms: Arms) -> dict[str, Any]:
    found = {arm: _arm(runs) for arm, runs in arms.items()}
    for kind in SCORES:
        _compare(study, kind, arms, found)
    _compare_drift(study, arms, found)
    every = [row for runs in arms.values() for row in runs.values()]
    errors = [row["standard_error"][-1] for row in every if row["standard_error"][-1] is not None]
    return {
        "arms": found,
        "evaluation_standard_error": statistics.fmean(errors) if errors else None,
        "window": max(row["rollout"][-1] for row in every),
        "unmatched": _unmatched(arms),
    }


def _unmatched(arms: Arms) -> list[int]:
    """Return the seeds whose arms began from different starts, made on machines whose arithmetic differs."""
    starts: dict[int, list[Row]] = {}
    for runs in arms.values():
        for seed, row in runs.items():
            starts.setdefault(seed, []).append(row)
    return sorted(seed for seed, rows in starts.items() if not same_start(rows))


def _arm(runs: dict[int, Row]) -> dict[str, Any]:
    rows = [runs[seed] for seed in sorted(runs)]
    scores = {kind: np.array([rule(row) for row in rows]) for kind, rule in SCORES.items()}
    whole = {name: _mean(_mean(row["curves"].get(name, ())) for row in rows) for name in _names(rows)}
    norms = [value for row in rows for value in row["curves"].get("gradient_norm", ()) if value is not None]
    return {
        "method": rows[0]["method"], "learning_rate": rows[0]["learning_rate"],
        "seeds": sorted(runs),
        "start": statistics.fmean(row["accuracy"][0] for row in rows),
        "scores": {kind: _estimates(values) for kind, values in scores.items()},
        "collapsed": sum(map(collapsed, rows)),
        "diverged": sum(bool(row["diverged"]) for row in rows),
        "stability": {
            "gap": whole.get("gap"),
            "first_gap": _mean(row["curves"]["gap"][0] for row in rows if row["curves"].get("gap")),
            "tail": _mean(_mean(row["tail"]) for row in rows),
            "kl": whole.get("kl"),
            "gradient_norm": whole.get("gradient_norm"),
            "largest_gradient_norm": max(norms, default=None),
            "last_entropy": _mean(row["curves"]["entropy"][-1] for row in rows if row["curves"].get("entropy")),
            "masked": whole.get("masked"),
            "masked_positive": whole.get("masked_positive"),
            "masked_negative": whole.get("masked_negative"),
            "budget_share": whole.get("budget_share"),
        },
        "curve": _curve(rows),
        "cpu_seconds": statistics.fmean(row["cpu_seconds"] for row in rows),
    }  # fmt: skip


def _names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["curves"]))


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of those that are numbers."""
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None


def _estimates(values: Values) -> dict[str, Any]:
    return {
        "values": [float(value) for value in values],
        "mean": float(values.mean()),
        "mean_interval": interval(values[None], mean),
        "iqm": float(interquartile_mean(values)),
        "iqm_interval": interval(values[None], pooled_interquartile_mean),
    }


def _compare(study: Study, kind: str, arms: Arms, found: dict[str, dict[str, Any]]) -> None:
    """Add to each arm's score the paired difference reference less arm, over the seeds that both have.

    Arms as given and arms after a search are two families of tests.
    """
    for searched in (False, True):
        family = [arm for arm in arms if arm.endswith(SEARCHED) == searched and arm != reference_of(study, arm)]
        tests = _tests(study, searched=searched)
        entries = {arm: _difference(study, kind, arms, arm, tests) for arm in family}
        for arm, entry in entries.items():
            if entry is not None:
                found[arm]["scores"][kind]["reference_less_arm"] = entry
        _adjust([entry for entry in entries.values() if entry is not None], tests)


def _adjust(differences: list[dict[str, Any]], tests: int) -> None:
    """Add to the differences of one family of tests their p-values adjusted for the size that it is to have."""
    tested = [entry for entry in differences if entry["p"] is not None]
    for entry, adjusted in zip(tested, holm([entry["p"] for entry in tested], tests), strict=True):
        entry["p_holm"] = adjusted


def _tests(study: Study, *, searched: bool) -> int:
    """Return how many arms are compared with the reference when all have run."""
    return sum(arm.endswith(SEARCHED) == searched for arm in study.arm_names) - 1


def _difference(study: Study, kind: str, arms: Arms, arm: str, tests: int) -> dict[str, Any] | None:
    reference = reference_of(study, arm)
    seeds = _shared([arms], reference, arm)
    if not seeds:
        return None
    x, y = _matrix(kind, [arms], reference, seeds), _matrix(kind, [arms], arm, seeds)
    difference = x - y
    probability, probability_bounds = improvement(x, y)
    deviation = float(difference.std(ddof=1)) if len(seeds) > 1 else None
    return {
        "reference": reference, "pairs": len(seeds), "mean": float(difference.mean()),
        "interval": interval(difference, mean), "deviation": deviation,
        "probability": probability, "probability_interval": probability_bounds,
        "p": sign_flip_p(difference[0]), "p_holm": None,
        "only_arm_collapsed": sum(collapsed(arms[arm][s]) and not collapsed(arms[reference][s]) for s in seeds),
        "only_reference_collapsed": sum(collapsed(arms[reference][s]) and not collapsed(arms[arm][s]) for s in seeds),
        "seeds_needed": None
        if deviation is None or len(seeds) < FEWEST
        else {str(d): seeds_needed(deviation, d, tests=tests) for d in DIFFERENCES},
    }  # fmt: skip


def _compare_drift(study: Study, arms: Arms, found: dict[str, dict[str, Any]]) -> None:
    """Add to each arm's stability the paired difference reference less arm of the drift, over the seeds of both.

    Not of runs that diverged: what they drifted from then on is no number.
    """
    drift = {
        arm: {seed: _mean(row["curves"].get("gap", ())) for seed, row in runs.items() if not row["diverged"]}
        for arm, runs in arms.items()
    }
    for arm, own in drift.items():
        theirs = drift.get(reference_of(study, arm), {})
        pairs = [(theirs.get(seed), own[seed]) for seed in sorted(own)]
        difference = np.array([x - y for x, y in pairs if x is not None and y is not None])
        if arm == reference_of(study, arm) or not len(difference):
            continue
        found[arm]["stability"]["gap_reference_less_arm"] = {
            "mean": float(difference.mean()), "interval": interval(difference[None], mean), "pairs": len(difference),
            "reference_lower": int((difference < 0).sum()),
        }  # fmt: skip


def _shared(parts: list[Arms], *names: str) -> list[int]:
    """Return the seeds that all these arms have in all these settings."""
    return sorted(set.intersection(*(set(arms.get(name, {})) for arms in parts for name in names)))


def _matrix(kind: str, parts: list[Arms], name: str, seeds: list[int]) -> Values:
    """Return an arm's scores, [settings, seeds]."""
    return np.array([[SCORES[kind](arms[name][seed]) for seed in seeds] for arms in parts])


def _overall(study: Study, parts: list[Arms]) -> dict[str, Any]:
    """Return the scores over all settings that were begun, of the arms and seeds that have run in all of them."""
    overall: dict[str, Any] = {}
    for arm in dict.fromkeys(name for arms in parts for name in arms):
        reference = reference_of(study, arm)
        seeds = _shared(parts, arm, reference)
        if not seeds:
            continue
        entry: dict[str, Any] = {
            "seeds": len(seeds), "settings": len(parts), "reference": reference,
            "collapsed": sum(collapsed(arms[arm][seed]) for arms in parts for seed in seeds),
        }  # fmt: skip
        for kind in SCORES:
            own = _matrix(kind, parts, arm, seeds)
            entry[kind] = {
                "mean": float(mean(own)), "mean_interval": interval(own, mean),
                "iqm": float(pooled_interquartile_mean(own)), "iqm_interval": interval(own, pooled_interquartile_mean),
            }  # fmt: skip
            if arm != reference:
                theirs = _matrix(kind, parts, reference, seeds)
                probability, bounds = improvement(theirs, own)
                entry[kind]["reference_less_arm"] = {
                    "mean": float(mean(theirs - own)), "interval": interval(theirs - own, mean),
                    "probability": probability, "probability_interval": bounds,
                    "p": sign_flip_p((theirs - own).mean(0)), "p_holm": None,
                }  # fmt: skip
        overall[arm] = entry
    for kind in SCORES:
        for searched in (False, True):
            family = [
                entry[kind]["reference_less_arm"]
                for arm, entry in overall.items()
                if arm.endswith(SEARCHED) == searched and "reference_less_arm" in entry[kind]
            ]
            _adjust(family, _tests(study, searched=searched))
    return overall


def _curve(rows: list[Row]) -> dict[str, Any]:
    """Return the mean of the evaluations and of each curve over the seeds, with the interval of the first."""
    length = min(len(row["accuracy"]) for row in rows)
    accuracy = np.array([row["accuracy"][:length] for row in rows])
    bands = [interval(accuracy[None, :, i], mean) for i in range(length)]
    curves = {name: _means([row["curves"].get(name, []) for row in rows]) for name in _names(rows)}
    return {
        "rollout": rows[0]["rollout"][:length],
        "accuracy": accuracy.mean(axis=0).tolist(),
        "low": [band[0] if band else None for band in bands],
        "high": [band[1] if band else None for band in bands],
        "curves": curves | {"tail": _means([row["tail"] for row in rows])},
    }


def _means(curves: list[list[float | None]]) -> list[float | None]:
    """Return the mean at each rollout over the runs that have a value there."""
    longest = max(map(len, curves), default=0)
    return [_mean(curve[i] for curve in curves if i < len(curve)) for i in range(longest)]
