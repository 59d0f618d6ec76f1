"""One cell in a process of its own: a run of the laboratory, and the line that remains of it."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import re
import shutil
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from cppo.compare.study import Cell
from cppo.lab.allocator import keep_freed_memory
from cppo.lab.config import RunConfig

# Name in a line's curves -> name in metrics.jsonl, and what each of a rollout's updates weighs: "tokens" those in its
# loss, "masked" those that the rule rejects, None all the same.
CURVES = {
    "reward": ("rollout/reward", None),
    "length": ("rollout/length", None),
    "entropy": ("policy/entropy", None),
    "gradient_norm": ("optimizer/gradient_norm", "tokens"),
    "gap": ("divergence/probability_gap", "tokens"),
    "kl": ("ratio/kl_k3", "tokens"),
    "masked": ("gate/masked_fraction", "tokens"),
    "masked_positive": ("gate/masked_fraction_positive", "tokens"),
    "masked_negative": ("gate/masked_fraction_negative", "tokens"),
    "budget_share": ("gate/budget_share", "masked"),
    "delta_b": ("account/delta_b", "tokens"),
}
# What torch says of a policy whose logits are no numbers any more.
_DIVERGED = "probability tensor contains either"
_WEIGHTS = "model.safetensors"
_LONGEST_NAME = 120


class _Silence:
    def phase(self, name: str, total: int | None = None) -> None:
        """Say nothing."""

    def advance(self, row: dict[str, Any] | None = None) -> None:
        """Say nothing."""


def prepare() -> None:
    """Set up a worker process: no notices or bars of frameworks, and no life after the process that started it."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end_with_it() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=end_with_it, daemon=True).start()
    keep_freed_memory()
    from datasets import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
    warnings.simplefilter("ignore")


def is_start(path: Path) -> bool:
    """Whether a warm start was written there to its end."""
    return (path / _WEIGHTS).is_file()


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
        folder: where the run's folder stands while it runs.
        keep: leave it there, named after the cell, for ``cppo inspect``.
    """
    from cppo.lab.run import Run, start_run, versions

    began = None if start is None else hashlib.sha256((start / _WEIGHTS).read_bytes()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=f".{cell.key}-", dir=folder))
    try:
        since, cpu = time.monotonic(), time.process_time()
        run = Run(cell.config, start_run(cell.config, own / "run"), _Silence(), start)
        diverged = False
        try:
            run.train()
        except RuntimeError as error:
            if _DIVERGED not in str(error):
                raise
            diverged = True
        row = {
            "key": cell.key, "setting": cell.setting, "arm": cell.arm, "seed": cell.seed,
            "method": cell.config.method, "learning_rate": cell.config.learning_rate,
            **_outcome(cell.config, own / "run", diverged=diverged),
            "cpu_seconds": round(time.process_time() - cpu, 2), "wall_seconds": round(time.monotonic() - since, 2),
            "config": cell.content, "knobs": cell.knobs, "start": began, "versions": versions(),
        }  # fmt: skip
        if keep:
            name = re.sub(r"[^\w.-]+", "-", f"{cell.setting}-{cell.arm}-seed{cell.seed}")
            name = name.encode()[:_LONGEST_NAME].decode(errors="ignore")  # a file system takes some 250 bytes
            shutil.rmtree(folder / f"{name}-{cell.key}", ignore_errors=True)
            (own / "run").rename(folder / f"{name}-{cell.key}")
        return row
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _outcome(config: RunConfig, path: Path, *, diverged: bool) -> dict[str, Any]:
    """Return the measures of a run's folder; a policy that diverged answers nothing right from then on."""
    from cppo.lab.folder import read_metrics

    found = measures(read_metrics(path / "metrics.jsonl"), config.updates)
    if diverged:
        due = [*range(0, config.rollouts, config.eval_every), config.rollouts]
        missing = [rollout for rollout in due if rollout not in found["rollout"]]
        found["rollout"] += missing
        for name in ("accuracy", "standard_error"):
            found[name] += [0.0] * len(missing)
    return found | {
        "diverged": diverged,
        "tail": tails(path / "rollouts", with_advantage=config.skip_zero_variance),
    }


def measures(metrics: list[dict[str, Any]], updates: int) -> dict[str, Any]:
    """Return what a line keeps of ``metrics.jsonl``: the evaluations, and a value a rollout of each curve.

    A value is None where nothing was weighed: no token was in the loss, or for ``budget_share`` none was masked.
    """
    evaluations = [row for row in metrics if "eval/accuracy" in row]
    trained = [row for row in metrics if row["step"] > 0]
    rollouts = [trained[first : first + updates] for first in range(0, len(trained), updates)]
    curves = {}
    for name, (metric, weigh) in CURVES.items():
        if any(metric in row for row in trained):
            curves[name] = _round([_weighted(rows, metric, weigh) for rows in rollouts])
    return {
        "rollout": [row["step"] // updates for row in evaluations],
        "accuracy": _round([row["eval/accuracy"] for row in evaluations]),
        "standard_error": _round([row.get("eval/standard_error") for row in evaluations]),
        "curves": curves,
    }


def _weighted(rows: list[dict[str, Any]], metric: str, weigh: str | None) -> float | None:
    total = weight = 0.0
    for row in rows:
        if row.get(metric) is None:
            continue
        part = 1.0 if weigh is None else row["input/tokens"]
        if weigh == "masked":
            part *= row["gate/masked_fraction"]
        total, weight = total + part * row[metric], weight + part
    return total / weight if weight else None


def tails(rollouts: Path, *, with_advantage: bool) -> list[float | None]:
    """Return, a rollout, the mean of the top tenth of |pi - mu| over the tokens of all its updates.

    Args:
        rollouts: the run's rollout log.
        with_advantage: only of responses whose advantage is not 0, as those in the loss are.
    """
    import numpy as np
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    found: list[float | None] = []
    for file in sorted(rollouts.glob("*.parquet")):
        table = pq.read_table(file, columns=["logp", "rollout_logp", "advantage"])
        if with_advantage:
            table = table.filter(pc.not_equal(table["advantage"], 0))
        logp, rollout_logp = (
            table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in ("logp", "rollout_logp")
        )
        gap = np.abs(np.exp(logp) - np.exp(rollout_logp))
        count = max(1, len(gap) // 10)
        found.append(float(np.partition(gap, len(gap) - count)[-count:].mean()) if len(gap) else None)
    return _round(found)


def _round(values: list[float | None]) -> list[float | None]:
    """Round to four digits; what is no number, as a policy that diverges can log, becomes None."""
    return [None if value is None or not math.isfinite(value) else float(f"{value:.4g}") for value in values]
