"""What a rollout log says about drift, before any method judges it: by update, and by position in the response."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cppo.inspect.reading import Chunk
from cppo.inspect.replay import BINS, token_bins

_TAIL = 0.1  # the paper plots the mean of the largest tenth
# Gaps |pi - mu| are counted on a scale that is fine near 0: edges (i / _EDGES)^3.
_EDGES = 600


@dataclasses.dataclass
class Gaps:
    """A histogram of |pi - mu| a row, from which means and the mean of the largest tenth follow in fixed memory."""

    counts: NDArray[np.int64]
    sums: NDArray[np.float64]

    @staticmethod
    def empty(rows: int) -> Gaps:
        """Return a histogram of nothing."""
        return Gaps(np.zeros((rows, _EDGES), np.int64), np.zeros((rows, _EDGES)))

    def add(self, row: NDArray[np.int64], gap: NDArray[np.float64]) -> None:
        """Count gaps in [0, 1], each in its row."""
        cell = row * _EDGES + np.minimum((np.cbrt(gap) * _EDGES).astype(np.int64), _EDGES - 1)
        self.counts += np.bincount(cell, minlength=self.counts.size).reshape(self.counts.shape)
        self.sums += np.bincount(cell, gap, minlength=self.sums.size).reshape(self.sums.shape)

    def mean(self) -> NDArray[np.float64]:
        """Return each row's mean; NaN where it is empty."""
        return divide(self.sums.sum(1), self.counts.sum(1))

    def tail(self) -> NDArray[np.float64]:
        """Return the mean of each row's largest tenth, exact but for the cell in which the tenth begins."""
        wanted = np.ceil(_TAIL * self.counts.sum(1))
        from_top = np.cumsum(self.counts[:, ::-1], 1)
        before = from_top - self.counts[:, ::-1]
        taken = np.clip(wanted[:, None] - before, 0, self.counts[:, ::-1])
        means = divide(self.sums[:, ::-1], self.counts[:, ::-1], empty=0.0)
        return divide((taken * means).sum(1), wanted)


# Sums over the response tokens of an update.
_TOKEN_SUMS = (
    "tokens",
    "distance",
    "surprise",
    "log_ratio",
    "k3",
    "ratio",
    "ratio_squared",
    "equal",
    "uncertain",
    "below",
)
# Sums over its responses.
_RESPONSE_SUMS = ("responses", "reward", "rewarded", "written", "no_advantage", "perplexity_gap")


class Measures:
    """Adds up one log, chunk by chunk.

    Args:
        steps: the log's updates, in order.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = list(steps)
        self._place = {step: index for index, step in enumerate(steps)}
        self.by_step, self.by_bin = Gaps.empty(len(steps)), Gaps.empty(BINS)
        self.sums = {name: np.zeros(len(steps)) for name in (*_TOKEN_SUMS, *_RESPONSE_SUMS)}
        self.largest_weight = np.zeros(len(steps))
        self.total_weight = np.zeros(len(steps))

    def add(self, chunk: Chunk, weight: NDArray[np.float64]) -> None:
        """Count a chunk.

        Args:
            chunk: the responses.
            weight: ``[N]`` the own method's k |A|, 0 outside the response.
        """
        response, bins = token_bins(chunk)
        place = np.array([self._place[step] for step in chunk.step.tolist()], dtype=np.int64)
        logp, rollout_logp = (np.minimum(x.astype(np.float64), 0.0) for x in (chunk.logp, chunk.rollout_logp))
        mask = (bins >= 0) & np.isfinite(chunk.logp) & np.isfinite(chunk.rollout_logp)
        at, response_at = place[response][mask], response[mask]
        p, m = logp[mask], rollout_logp[mask]
        gap, log_ratio = np.abs(np.exp(p) - np.exp(m)), np.clip(p - m, -20, 20)
        ratio = np.exp(log_ratio)
        self.by_step.add(at, gap)
        self.by_bin.add(bins[mask], gap)
        values: dict[str, Any] = {
            "tokens": None, "distance": np.abs(log_ratio), "surprise": -m, "log_ratio": log_ratio,
            "k3": ratio - 1 - log_ratio, "ratio": ratio, "ratio_squared": ratio * ratio,
            "equal": (p == m) & (m < -1e-3), "uncertain": m < -1e-3, "below": (p < m - 1e-6),
        }  # fmt: skip
        for name, value in values.items():
            self.sums[name] += np.bincount(at, value, minlength=len(self.steps))
        self._add_responses(chunk, place, response_at, log_ratio, weight, response)

    def _add_responses(
        self,
        chunk: Chunk,
        place: NDArray[np.int64],
        response_at: NDArray[np.int64],
        log_ratio: NDArray[np.float64],
        weight: NDArray[np.float64],
        response: NDArray[np.int64],
    ) -> None:
        rows, steps = len(chunk.lengths), len(self.steps)
        written = np.bincount(response_at, minlength=rows)
        used = written > 0
        gap = np.abs(divide(np.bincount(response_at, log_ratio, minlength=rows), written, empty=0.0))
        rewarded = np.isfinite(chunk.reward)
        for name, value in {
            "responses": used, "reward": np.where(rewarded, chunk.reward, 0.0), "rewarded": rewarded,
            "written": written, "no_advantage": used & (chunk.advantage == 0), "perplexity_gap": gap,
        }.items():  # fmt: skip
            self.sums[name] += np.bincount(place, value, minlength=steps)
        each = np.bincount(response, weight, minlength=rows)
        self.total_weight += np.bincount(place, each, minlength=steps)
        np.maximum.at(self.largest_weight, place, each)

    def series(self) -> dict[str, NDArray[np.float64]]:
        """Return one value an update of each measure; NaN where there is none (BASELINES section 14)."""
        s = self.sums
        tokens, responses = s["tokens"], s["responses"]
        return {
            "reward": divide(s["reward"], s["rewarded"]),
            "length": divide(s["written"], responses),
            "no_advantage": divide(s["no_advantage"], responses),
            "probability_gap": self.by_step.mean(),
            "probability_gap_tail": self.by_step.tail(),
            "relative_log_prob_error": divide(s["distance"], s["surprise"]),
            "log_perplexity_gap": divide(s["perplexity_gap"], responses),
            "mean_log_ratio": divide(s["log_ratio"], tokens),
            "kl_k3": divide(s["k3"], tokens),
            "chi_squared": divide(s["ratio_squared"], tokens) - 1,
            "effective_sample_size": divide(s["ratio"] ** 2, tokens * s["ratio_squared"]),
            "equal_log_probs": divide(s["equal"], s["uncertain"]),
            "below_sampler": divide(s["below"], tokens),
            "largest_response": divide(self.largest_weight, self.total_weight),
        }


def divide(top: NDArray[Any], bottom: NDArray[Any], *, empty: float = float("nan")) -> NDArray[np.float64]:
    """Return top / bottom, and ``empty`` where there is nothing to divide by."""
    out = np.full(np.shape(top), empty)
    np.divide(top, bottom, out=out, where=np.asarray(bottom) > 0)
    return out
