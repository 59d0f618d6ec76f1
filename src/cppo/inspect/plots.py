"""Pictures of runs, as matplotlib figures: learning curve, divergence by position, budget, what was masked and why."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cppo.rollout_log import read_rollouts

_COLOURS = ("#0b7a75", "#d1495b", "#3066be", "#8a5a9e", "#7a7a7a")
_BINS = 24
_TAIL = 0.1


@dataclasses.dataclass(frozen=True)
class RunData:
    """What the pictures need of one run."""

    label: str
    metrics: list[dict[str, Any]]
    # By relative position in the response, ``_BINS`` bins: mean |pi - mu|, and the mean of its largest tenth.
    divergence: NDArray[np.float64]
    divergence_tail: NDArray[np.float64]


def load_run(label: str, metrics: list[dict[str, Any]], rollouts: Path) -> RunData:
    """Read a run's rollout log; |pi - mu| of the policy's tokens is sorted into bins by relative position."""
    gaps: list[list[NDArray[np.float64]]] = [[] for _ in range(_BINS)]
    for row in read_rollouts(rollouts, ["logp", "rollout_logp", "response_mask"]):
        mask = np.asarray(row["response_mask"], dtype=bool)
        gap = np.abs(np.exp(np.asarray(row["logp"])[mask]) - np.exp(np.asarray(row["rollout_logp"])[mask]))
        where = ((np.arange(len(gap)) + 0.5) * _BINS / max(len(gap), 1)).astype(int)
        for index in np.unique(where):
            gaps[index].append(gap[where == index])
    mean, tail = np.full(_BINS, np.nan), np.full(_BINS, np.nan)
    for index, parts in enumerate(gaps):
        if parts:
            values = np.sort(np.concatenate(parts))
            mean[index] = values.mean()
            tail[index] = values[-max(1, math.ceil(_TAIL * len(values))) :].mean()
    return RunData(label, metrics, mean, tail)


def _figure(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _series(run: RunData, name: str) -> tuple[list[int], list[float]]:
    rows = [row for row in run.metrics if row.get(name) is not None]
    return [row["step"] for row in rows], [row[name] for row in rows]


def learning_curve(runs: list[RunData]) -> Figure:
    """Held-out accuracy with its standard error, and the rollouts' mean reward."""
    figure, axes = _figure("Held-out accuracy", "optimizer update", "mean success")
    for run, colour in zip(runs, itertools.cycle(_COLOURS), strict=False):
        steps, accuracy = _series(run, "eval/accuracy")
        errors = [row.get("eval/standard_error") or 0.0 for row in run.metrics if row.get("eval/accuracy") is not None]
        axes.errorbar(steps, accuracy, yerr=errors, color=colour, marker="o", markersize=4, capsize=2, label=run.label)
        steps, reward = _series(run, "rollout/reward")
        axes.plot(steps, reward, color=colour, alpha=0.4, linestyle=":", label=f"{run.label}: training reward")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize=8, frameon=False)
    return figure


def divergence_by_position(runs: list[RunData]) -> Figure:
    """Mean and largest tenth of |pi - mu| by relative position in the response."""
    figure, axes = _figure("Drift by position in the response", "position / length", "|pi - mu| of the sampled token")
    centres = (np.arange(_BINS) + 0.5) / _BINS
    for run, colour in zip(runs, itertools.cycle(_COLOURS), strict=False):
        # Short responses leave bins empty.
        x, mean, tail = (values[~np.isnan(run.divergence)] for values in (centres, run.divergence, run.divergence_tail))
        axes.plot(x, mean, color=colour, marker=".", label=f"{run.label}: mean")
        axes.plot(x, tail, color=colour, marker=".", linestyle="--", label=f"{run.label}: largest tenth")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    return figure


def effective_budget(runs: list[RunData]) -> Figure:
    """The mean delta_b in force at each update."""
    figure, axes = _figure("Effective prefix budget", "optimizer update", "delta_b, mean over responses")
    drawn = False
    for run, colour in zip(runs, itertools.cycle(_COLOURS), strict=False):
        steps, budget = _series(run, "account/delta_b")
        if steps:
            axes.plot(steps, budget, color=colour, label=run.label)
            drawn = True
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    if drawn:
        axes.legend(fontsize=8, frameon=False)
    else:
        axes.text(0.5, 0.5, "no method here has a prefix budget", ha="center", va="center", transform=axes.transAxes)
    return figure


def masked_by_cause(runs: list[RunData]) -> Figure:
    """Share of response tokens masked at each update: by the token threshold, and by the prefix budget alone."""
    figure, axes = _figure("Masked tokens by cause", "optimizer update", "share of response tokens")
    for run, colour in zip(runs, itertools.cycle(_COLOURS), strict=False):
        steps, masked = _series(run, "gate/masked_fraction")
        _, share = _series(run, "gate/budget_share")
        if share:
            by_budget = [m * s for m, s in zip(masked, share, strict=True)]
            rest = [m - b for m, b in zip(masked, by_budget, strict=True)]
            axes.stackplot(
                steps, rest, by_budget, colors=[colour, colour], alpha=0.85,
                labels=[f"{run.label}: token threshold", f"{run.label}: prefix budget only"],
            )  # fmt: skip
            axes.collections[-1].set_alpha(0.4)
        elif any(masked):
            axes.plot(steps, masked, color=colour, label=run.label)
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)
    return figure
