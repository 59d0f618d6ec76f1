"""Which thresholds of CPPO would mask a wanted share of a log's tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from cppo.inspect.reading import Chunk, join, take
from cppo.inspect.replay import decide_chunk
from cppo.inspect.statement import number, numbers
from cppo.methods import CPPO, Method

_SAMPLE_TOKENS = 40_000
_DELTAS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
_BUDGETS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05)
_PAPER = {"delta": 0.15, "delta_b": 0.02, "w_min": 0.8}


class Sample:
    """Every k-th response of a log of ``tokens`` tokens, about 40,000 tokens in all."""

    def __init__(self, tokens: int) -> None:
        self._chunks: list[Chunk] = []
        self._every, self._seen = max(1, round(tokens / _SAMPLE_TOKENS)), 0

    def add(self, chunk: Chunk) -> None:
        """Take a chunk's part."""
        rows = [row for row in range(len(chunk.lengths)) if (self._seen + row) % self._every == 0]
        self._seen += len(chunk.lengths)
        if rows:
            self._chunks.append(take(chunk, rows))

    def chunk(self) -> Chunk:
        """Return the sample."""
        return join(self._chunks)


def suggest(sample: Chunk, method: Method, wanted: float) -> dict[str, Any]:
    """Return thresholds of CPPO under which a wanted share of these tokens would be masked, and a grid around them.

    Half of the share is left to the token rule, half to the prefix budget.

    Args:
        sample: responses.
        method: the run's own; its divergence is kept, and its w_min, position and budget, if it is CPPO.
        wanted: the masked share, in (0, 1).
    """
    base: dict[str, Any] = {"divergence": getattr(method, "divergence", "binary_tv")}
    if base["divergence"] not in ("binary_tv", "binary_kl", "topk_tv", "topk_kl"):
        base["divergence"] = "binary_tv"
    if isinstance(method, CPPO):
        base |= {
            "w_min": method.w_min,
            "position": method.position,
            "budget": method.budget if method.budget != "none" else "adaptive",
        }
    decision = decide_chunk(CPPO(**base, delta=1e15), sample)
    usable = decision.batch.tokens().usable.numpy()
    outward = usable & (decision.batch.advantages * decision.batch.tokens().log_ratio > 0).numpy()
    assert decision.trace.weighted_divergence is not None
    values = np.sort(decision.trace.weighted_divergence.numpy()[outward])[::-1]
    tokens = int(sample.response_mask.sum())

    def delta_for(share: float) -> float | None:
        rank = int(share * tokens)
        return float(values[rank]) if rank < len(values) and values[rank] > 0 else None

    def masked(delta: float, delta_b: float) -> float:
        codes = decide_chunk(CPPO(**base, delta=delta, delta_b=delta_b), sample).rejected_by.numpy()
        return float((codes[sample.response_mask] > 0).sum() / max(1, tokens))

    delta, delta_b = delta_for(wanted / 2), None
    if delta is not None:
        low, high = 0.0, delta
        for _ in range(12):  # the masked share falls as the budget grows
            middle = (low + high) / 2
            low, high = (middle, high) if masked(delta, middle) > wanted else (low, middle)
        delta_b = high
    grid = [[masked(d, b) for b in _BUDGETS] for d in _DELTAS] if tokens else []
    return {
        "wanted": wanted,
        "settings": base,
        "token_delta": None if (alone := delta_for(wanted)) is None else number(alone),
        "delta": None if delta is None else number(delta),
        "delta_b": None if delta_b is None else number(delta_b),
        "masked": None if delta is None or delta_b is None else number(masked(delta, delta_b)),
        "paper": _PAPER | {"masked": number(masked(_PAPER["delta"], _PAPER["delta_b"])) if tokens else None},
        "grid": {"delta": list(_DELTAS), "delta_b": list(_BUDGETS), "masked": [numbers(np.array(r)) for r in grid]},
        "tokens": tokens,
    }
