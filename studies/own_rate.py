"""Each arm of a study at the setting that suits it best, as if its learning rate had been tuned.

``python studies/own_rate.py FOLDER REFERENCE SETTING ..``: a seed is scored in the setting in which the arm's other
seeds do best, so no run helps to choose its own setting. Score by score: the mean over the seeds, the reference less
the arm with its 95 % bootstrap interval, and which settings were chosen for how many seeds. The interval draws seeds
with their choice made; how the choice would vary is not in it.

Where two settings are level this is too low: without a seed that is good in one of them the others choose the other.
So beside it stands the same with the one setting that is best in the mean of all seeds, which is a little too high.
"""

from __future__ import annotations

import collections
import sys
from pathlib import Path

import numpy as np

from cppo.compare.estimates import Values, interval, mean
from cppo.compare.results import ResultFolder
from cppo.compare.scores import SCORES
from cppo.compare.study import load_study


def at_its_best(scores: Values) -> tuple[Values, list[int]]:
    """Return, of scores [settings, seeds], each seed's in the setting that is best for the others; and which it is."""
    others = scores.sum(1, keepdims=True) - scores
    chosen = others.argmax(0)
    return scores[chosen, np.arange(scores.shape[1])], chosen.tolist()


def main(folder: str, reference: str, *settings: str) -> None:
    """Print a table a score."""
    results = ResultFolder(Path(folder))
    study, lines = load_study(results.study), results.rows()
    rows = {(c.arm, c.setting, c.seed): row for c in study.cells() if (row := lines.of(c)) is not None}
    arms, seeds = list(study.arms), study.seeds
    for setting in settings:
        if setting not in study.settings:
            sys.exit(f"{setting}: expected one of {', '.join(study.settings)}")
    if missing := [(a, s, n) for a in arms for s in settings for n in seeds if (a, s, n) not in rows]:
        sys.exit(f"{folder}: expected every arm and seed in each of {', '.join(settings)}; not there: {missing}")
    if reference not in arms:
        sys.exit(f"{reference}: expected one of {', '.join(arms)}")
    for kind in ("final", "area"):
        one_left_out, by_all, chosen, best = {}, {}, {}, {}
        for arm in arms:
            score = np.array([[SCORES[kind](rows[arm, s, n]) for n in seeds] for s in settings])
            one_left_out[arm], chosen[arm] = at_its_best(score)
            best[arm] = int(score.mean(1).argmax())
            by_all[arm] = score[best[arm]]
        print(
            f"\n| {kind} | mean | {reference} less arm | chosen, for how many seeds "
            f"| chosen by all seeds | mean | {reference} less arm |\n|---|---|---|---|---|---|---|"
        )
        for arm in arms:
            picked = ", ".join(f"{settings[i]}: {n}" for i, n in collections.Counter(chosen[arm]).most_common())
            print(
                f"| {arm} | {_against(one_left_out, reference, arm)} | {picked} "
                f"| {settings[best[arm]]} | {_against(by_all, reference, arm)} |"
            )


def _against(found: dict[str, Values], reference: str, arm: str) -> str:
    """Return two columns: an arm's mean, and the reference less the arm."""
    difference = found[reference] - found[arm]
    low, high = interval(difference[None], mean) or (np.nan, np.nan)
    versus = "-" if arm == reference else f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"{found[arm].mean():.3f} | {versus}"


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit("expected FOLDER REFERENCE SETTING SETTING ..")
    main(*sys.argv[1:])
