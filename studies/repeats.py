"""How much of a run is chance: runs of the same settings and seed, from processors that round differently.

``python studies/repeats.py``: the lines of docs/studies that mean the same run and have other numbers, because the
warm start was made on another kind of processor. For each method and setting of which there are five pairs or more:
the deviation of the difference of the two, and their correlation, for the last evaluation and the area.
"""

from __future__ import annotations

import collections
import json
from pathlib import Path

import numpy as np

from cppo.compare.results import ResultFolder
from cppo.compare.scores import SCORES

STUDIES = Path(__file__).resolve().parent.parent / "docs" / "studies"
FEWEST = 5


def main() -> None:
    """Print the table."""
    same = collections.defaultdict(dict)
    for folder in sorted(STUDIES.iterdir()):
        for row in ResultFolder(folder).rows():
            same[json.dumps(row["config"], sort_keys=True)].setdefault(tuple(row["accuracy"]), row)
    pairs = collections.defaultdict(list)
    for runs in same.values():
        if len(runs) > 1:
            one, two, *_ = runs.values()
            config = one["config"]
            names = ("task", "model", "learning_rate", "epochs", "sampler_noise")
            what = one["method"], *(config[name] for name in names)
            pairs[what].append((one, two))
    print("| method | task | learning rate | pairs | last: deviation, correlation | area |\n|---|---|---|---|---|---|")
    for (method, task, model, rate, epochs, noise), found in sorted(pairs.items()):
        if len(found) < FEWEST:
            continue
        cells = []
        for kind in ("final", "area"):
            x, y = np.array([[SCORES[kind](row) for row in pair] for pair in found]).T
            cells.append(f"{(x - y).std(ddof=1):.3f}, {np.corrcoef(x, y)[0, 1]:+.2f}")
        setting = f"{task}, {model}, {epochs} epochs, noise {noise}"
        print(f"| {method} | {setting} | {rate:g} | {len(found)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
