"""One cell in a process of its own: a run of the laboratory, and the line that remains of it."""

from __future__ import annotations

import shutil
import time
import warnings
from pathlib import Path
from typing import Any

from cppo.compare.study import Cell
from cppo.lab.config import RunConfig

# Name in a line's curves -> name in metrics.jsonl; each value is the mean over a rollout's updates.
CURVES = {
    "reward": "rollout/reward",
    "length": "rollout/length",
    "entropy": "policy/entropy",
    "gradient_norm": "optimizer/gradient_norm",
    "gap": "divergence/probability_gap",
    "kl": "ratio/kl_k3",
    "masked": "gate/masked_fraction",
    "masked_positive": "gate/masked_fraction_positive",
    "masked_negative": "gate/masked_fraction_negative",
    "budget_share": "gate/budget_share",
    "delta_b": "account/delta_b",
}


class _Silence:
    def phase(self, name: str, total: int | None = None) -> None:
        """Say nothing."""

    def advance(self, row: dict[str, Any] | None = None) -> None:
        """Say nothing."""


def prepare() -> None:
    """Set up a worker process; the frameworks' notices and bars have no place in a table."""
    from datasets import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
    warnings.simplefilter("ignore")


def make_cell_start(config: RunConfig, path: Path) -> None:
    """Make the warm start that the cells of a setting and seed share."""
    import torch

    from cppo.lab.run import make_start

    torch.set_num_threads(config.threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    make_start(config, path, _Silence())


def run_cell(cell: Cell, start: Path | None, folder: Path, *, keep: bool) -> dict[str, Any]:
    """Run a cell and return its line.

    Args:
        cell: the cell.
        start: the folder of its warm start; None for a pretrained model.
        folder: where the run's folder may stand while it runs.
        keep: leave the run's folder there, for ``cppo inspect``.
    """
    from cppo.lab.folder import read_metrics
    from cppo.lab.run import Run, start_run

    path = folder / f"{cell.key}"
    shutil.rmtree(path, ignore_errors=True)  # of a process that was killed
    since = time.monotonic()
    run = Run(cell.config, start_run(cell.config, path), _Silence(), start)
    summary = run.train()
    row = {
        "key": cell.key, "setting": cell.setting, "arm": cell.arm, "seed": cell.seed, "method": cell.config.method,
        "learning_rate": cell.config.learning_rate,
        **measures(read_metrics(run.folder.metrics), cell.config.updates),
        "tail": _round(_tails(run.folder.rollouts)),
        "cpu_seconds": round(sum(summary["cost"]["cpu_seconds"].values()), 2),
        "wall_seconds": round(time.monotonic() - since, 2),
    }  # fmt: skip
    if not keep:
        shutil.rmtree(path)
    return row


def measures(metrics: list[dict[str, Any]], updates: int) -> dict[str, Any]:
    """Return what a line keeps of ``metrics.jsonl``: the evaluations, and a value a rollout of each curve."""
    evaluations = [row for row in metrics if "eval/accuracy" in row]
    trained = [row for row in metrics if row["step"] > 0]
    curves = {}
    for name, metric in CURVES.items():
        values = []
        for first in range(0, len(trained), updates):
            found = [row[metric] for row in trained[first : first + updates] if row.get(metric) is not None]
            if found:
                values.append(sum(found) / len(found))
        if values:
            curves[name] = _round(values)
    return {
        "rollout": [row["step"] // updates for row in evaluations],
        "accuracy": _round([row["eval/accuracy"] for row in evaluations]),
        "standard_error": _round([row["eval/standard_error"] for row in evaluations]),
        "curves": curves,
    }


def _tails(rollouts: Path) -> list[float]:
    """Return, a rollout, the mean of the top tenth of |pi - mu| over the tokens of all its updates."""
    import numpy as np
    import pyarrow.parquet as pq

    tails = []
    for file in sorted(rollouts.glob("*.parquet")):
        table = pq.read_table(file, columns=["logp", "rollout_logp"])
        logp, rollout_logp = (
            table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in table.column_names
        )
        gap = np.abs(np.exp(logp) - np.exp(rollout_logp))
        count = max(1, len(gap) // 10)
        tails.append(float(np.partition(gap, len(gap) - count)[-count:].mean()))
    return tails


def _round(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
