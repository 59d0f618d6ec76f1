"""Which thresholds of CPPO would mask a wanted share of a log's tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cppo.inspect.reading import Chunk, join, take
from cppo.inspect.replay import decide_chunk
from cppo.inspect.statement import number, numbers
from cppo.methods import CPPO, DIVERGENCES, Method

_SAMPLE_TOKENS = 40_000
_DELTAS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
_BUDGETS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05)
_NAMED = ("divergence", "w_min", "position", "budget")  # settings; of the others those that are no defaults
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


def _settings_of(method: Method) -> CPPO:
    """Return CPPO as the run would use it, thresholds aside."""
    if isinstance(method, CPPO):
        return dataclasses.replace(method, budget="adaptive" if method.budget == "none" else method.budget)
    divergence: Any = getattr(method, "divergence", "binary_tv")
    return CPPO(divergence=divergence if divergence in DIVERGENCES else "binary_tv")


def _outward_spending(method: CPPO, sample: Chunk) -> NDArray[Any]:
    """Return w D of the tokens that move away from the sampler, the largest first."""
    decision = decide_chunk(dataclasses.replace(method, delta=1e15), sample)
    tokens = decision.batch.tokens()
    outward = tokens.usable & (decision.batch.advantages * tokens.log_ratio > 0)
    assert decision.trace.weighted_divergence is not None
    return np.sort(decision.trace.weighted_divergence[outward].numpy())[::-1]


def suggest(sample: Chunk, method: Method, wanted: float) -> dict[str, Any]:
    """Return thresholds of CPPO under which a wanted share of these tokens would be masked, and a grid around them.

    Half of the share is left to the token rule, half to the prefix budget.

    Args:
        sample: responses.
        method: the run's own; all its settings are kept if it is CPPO (a budget of "none" becomes adaptive), else its
            divergence.
        wanted: the masked share, in (0, 1).
    """
    base = _settings_of(method)
    values = _outward_spending(base, sample)
    tokens = int(sample.response_mask.sum())

    def delta_for(share: float) -> float | None:
        rank = int(share * tokens)
        return number(values[rank]) if rank < len(values) and values[rank] > 0 else None

    def masked(delta: float, delta_b: float) -> float:
        codes = decide_chunk(dataclasses.replace(base, delta=delta, delta_b=delta_b), sample).rejected_by.numpy()
        return float((codes[sample.response_mask] > 0).sum() / max(1, tokens))

    delta, delta_b = delta_for(wanted / 2), None
    if delta is not None:
        low, high = 0.0, delta
        for _ in range(12):  # the masked share falls as the budget grows
            middle = (low + high) / 2
            low, high = (middle, high) if masked(delta, middle) > wanted else (low, middle)
        delta_b = number(high)  # what is said masks what is said: a digit may turn a token
    grid = [[masked(d, b) for b in _BUDGETS] for d in _DELTAS] if tokens else []
    return {
        "wanted": wanted,
        "settings": {
            name: value
            for name, value in dataclasses.asdict(base).items()
            if name in _NAMED or (name not in ("delta", "delta_b") and value != getattr(CPPO, name))
        },
        "token_delta": delta_for(wanted),
        "delta": delta,
        "delta_b": delta_b,
        "masked": None if delta is None or delta_b is None else number(masked(delta, delta_b)),
        "paper": _PAPER | {"masked": number(masked(_PAPER["delta"], _PAPER["delta_b"])) if tokens else None},
        "grid": {"delta": list(_DELTAS), "delta_b": list(_BUDGETS), "masked": [numbers(np.array(r)) for r in grid]},
        "tokens": tokens,
    }
