"""What-if: the tokens of a rollout log judged by any number of methods, in one pass over the log."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cppo.decision import Decision
from cppo.inspect.reading import Chunk
from cppo.methods import Method, needed_inputs, parse_method
from cppo.objective import decide

BINS = 24  # of relative position in the response
# Where the bins of the sampler's probability mu begin and end.
PROBABILITIES = (0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 1.0)


def decide_chunk(method: Method, chunk: Chunk) -> Decision:
    """Return a method's decision on a chunk, as a run with these log-probs made it."""
    return decide(
        method,
        torch.from_numpy(chunk.logp),
        torch.from_numpy(chunk.rollout_logp),
        torch.from_numpy(chunk.advantage),
        torch.from_numpy(chunk.response_mask),
        lengths=torch.from_numpy(chunk.lengths),
        divergence=torch.from_numpy(chunk.divergence) if "divergence" in needed_inputs(method) else None,
    )


def replayable(method: Method, log_has_divergence: bool) -> str | None:
    """Return why a method cannot judge a log, or None if it can."""
    needed = set(needed_inputs(method))
    if "rollout_entropy" in needed:
        return "needs the rollout policy's entropy, which a rollout log has not"
    if "divergence" in needed and not log_has_divergence:
        return "needs a measured divergence, and this log has none"
    return None


def token_bins(chunk: Chunk) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return, of each response token, its response and its bin of relative position; -1 outside the response."""
    response = np.repeat(np.arange(len(chunk.lengths)), chunk.lengths)
    counted = np.cumsum(chunk.response_mask)
    starts = np.concatenate([[0], counted])[chunk.offsets]
    written = np.diff(starts)  # T of each response
    position = counted - 1 - starts[:-1][response]
    bins = np.where(chunk.response_mask, position * BINS // np.maximum(written, 1)[response], -1)
    return response, bins


@dataclasses.dataclass
class Judged:
    """What one method did, or would have done, to a log. Counts are of response tokens."""

    spec: str
    method: Method
    # Axis 0: step (in the log's order); axis 1: bin; axis 2: kept, token threshold, prefix budget, any other rule.
    counts: NDArray[np.int64]
    # Axis 0: bin of mu; axis 1: sign of the advantage (-, 0, +); axis 2: kept, rejected.
    by_probability: NDArray[np.int64]
    weight: NDArray[np.float64]  # sums of k |A| by step: what is left of the gradient's weight
    unmasked_weight: NDArray[np.float64]  # sums of rho |A|: that without a trust region, the same of every method
    delta_b: NDArray[np.float64]  # sums over responses by step, and how many; zeros for a method without
    differs: int = 0  # tokens that the run's own method judges otherwise

    @property
    def tokens(self) -> int:
        """Response tokens judged."""
        return int(self.counts.sum())

    @property
    def rejected(self) -> NDArray[np.int64]:
        """By cause: token threshold, prefix budget, any other rule."""
        return self.counts.sum((0, 1))[1:]  # type: ignore[no-any-return]

    @property
    def signs(self) -> NDArray[np.int64]:
        """By sign of the advantage (-, 0, +): tokens, and rejected ones."""
        counts = self.by_probability.sum(0)
        return np.stack([counts.sum(1), counts[:, 1]], 1)

    @property
    def masked(self) -> float:
        """Share of response tokens rejected."""
        return float(self.rejected.sum() / max(1, self.tokens))


class Replay:
    """Judges the chunks of one log by several methods; the first is the run's own.

    Args:
        specs: methods as ``name?knob=value``.
        steps: the log's updates, in order.
    """

    def __init__(self, specs: Sequence[str], steps: Sequence[int]) -> None:
        self._place = {step: index for index, step in enumerate(steps)}
        shape = (len(steps), BINS, 4)
        self._unmasked_weight = np.zeros(len(steps))
        self.judged = [
            Judged(
                spec, parse_method(spec), np.zeros(shape, np.int64),
                np.zeros((len(PROBABILITIES) - 1, 3, 2), np.int64),
                np.zeros(len(steps)), self._unmasked_weight, np.zeros((len(steps), 2)),
            )
            for spec in specs
        ]  # fmt: skip

    def add(self, chunk: Chunk) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
        """Judge a chunk by every method; return the own method's ``|coefficient|`` and ``rejected_by``."""
        response, bins = token_bins(chunk)
        # A token without log-probs is rejected by every method and says nothing of any.
        mask = (bins >= 0) & np.isfinite(chunk.logp) & np.isfinite(chunk.rollout_logp)
        place = np.array([self._place[step] for step in chunk.step.tolist()], dtype=np.int64)
        token_place = place[response][mask]
        cell = (token_place * BINS + bins[mask]) * 4
        advantage = np.repeat(chunk.advantage, chunk.lengths)[mask]
        likelihood = np.searchsorted(np.log(PROBABILITIES[1:-1]), chunk.rollout_logp[mask], side="right")
        likelihood_sign = (likelihood * 3 + np.sign(advantage).astype(np.int64) + 1) * 2
        kept = torch.from_numpy(mask)
        log_ratio = np.clip(chunk.logp[mask].astype(np.float64) - chunk.rollout_logp[mask], -20, 20)
        plain = np.exp(log_ratio) * np.abs(advantage)
        self._unmasked_weight += np.bincount(token_place, plain, minlength=len(self._place))
        own: tuple[NDArray[np.float64], NDArray[np.int8]] | None = None
        for judged in self.judged:
            decision = decide_chunk(judged.method, chunk)
            codes = _numpy(decision.rejected_by, kept)
            judged.counts += np.bincount(cell + codes, minlength=judged.counts.size).reshape(judged.counts.shape)
            pairs = np.bincount(likelihood_sign + (codes > 0), minlength=judged.by_probability.size)
            judged.by_probability += pairs.reshape(judged.by_probability.shape)
            left = np.abs(_numpy(decision.coefficient, kept)) * np.abs(advantage)
            judged.weight += np.bincount(token_place, left, minlength=len(self._place))
            if decision.trace.delta_b is not None:
                used = np.bincount(response[mask], minlength=len(chunk.lengths)) > 0
                budget = decision.trace.delta_b.numpy()[used]
                judged.delta_b[:, 0] += np.bincount(place[used], budget, minlength=len(self._place))
                judged.delta_b[:, 1] += np.bincount(place[used], minlength=len(self._place))
            if own is None:
                own = np.abs(decision.coefficient.numpy().astype(np.float64)), decision.rejected_by.numpy()
            else:
                judged.differs += int(np.count_nonzero((codes > 0) != (own[1][mask] > 0)))
        assert own is not None
        return own


def _numpy(values: Tensor, kept: Tensor) -> NDArray[Any]:
    return values[kept].numpy()
