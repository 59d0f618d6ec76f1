"""A trust region's verdict on every token, and the quantities behind it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .inputs import Batch, Tokens
from .methods import Method
from .ops.layout import accumulation_dtype
from .ops.masking import as_dtype, zero_outside_
from .rules import OTHER_RULE, Verdict, judge

# Tokens judged at once on a CPU. Smaller blocks save memory and lose time to calls (benchmarks/mask.py).
_BLOCK_TOKENS = 262144

_PER_RESPONSE = ("delta_b", "max_divergence", "mean_divergence", "accepted")


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """The quantities behind a decision, token-shaped (``[B, T]`` or ``[N]``) or ``[B]``; None where a method has none.

    Values outside the response are 0. ``prior_account`` and ``threshold`` of CPPO are float64.
    """

    position_weight: Tensor | None = None  # w_t
    divergence: Tensor | None = None  # D_t
    weighted_divergence: Tensor | None = None  # Z_t = w_t D_t
    prior_account: Tensor | None = None  # U_{t-1}
    threshold: Tensor | None = None  # c_t, or the method's own
    delta_b: Tensor | None = None  # [B]: the budget of each response
    statistic: Tensor | None = None  # what is compared with the threshold where it is no divergence: ESTR's S_t
    prefix_ratio: Tensor | None = None  # MinPRO's b_t
    ratio: Tensor | None = None  # what stands in rho_t's place: MinPRO, GSPO, GMPO, PNPO, CTPO
    correction: Tensor | None = None  # W_t of the engine mismatch
    max_divergence: Tensor | None = None  # [B]: TRM's two criteria, float64 for the mean
    mean_divergence: Tensor | None = None  # [B]
    accepted: Tensor | None = None  # [B] bool: TRM keeps the response


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """A trust region's verdict on every token. No tensor here carries gradient.

    ``decide`` computes ``gate`` and ``coefficient`` at once; ``rejected_by``, ``trace``, and everything of the decision
    inside a :class:`PolicyLoss`, are computed from the inputs on first use, so that a training step that does not look
    does not pay. The inputs must not be changed in place before.
    """

    method: Method
    batch: Batch = dataclasses.field(repr=False)
    # Of responses that are cut over ranks: asked for once, by all ranks at the same moment.
    _settled: tuple[Tokens, Verdict] | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def of(cls, method: Method, batch: Batch) -> Decision:
        """Return the method's decision on a batch; what needs other ranks is computed now, the rest on first use."""
        return cls(method, batch, _judge(method, batch) if batch.layout.sharded else None)

    def parts(self) -> Iterator[tuple[Batch, slice, Tensor, Tensor]]:
        """Yield (batch, where it stands, gate, what the gate multiplies) of parts of the batch, whole responses each.

        On a CPU in blocks, so that the intermediates take little memory, near the cache; elsewhere in one.
        """
        batch = self.batch
        if batch.logp.device.type != "cpu":
            yield batch, slice(None), *_gate_and_ratio(batch, *(self._settled or _judge(self.method, batch)))
            return
        for responses, tokens in batch.layout.blocks(_BLOCK_TOKENS):
            block = batch.select(responses, tokens)
            yield block, tokens, *_gate_and_ratio(block, *(self._settled or _judge(self.method, block)))

    @functools.cached_property
    def _judged(self) -> tuple[Tensor, Tensor]:
        batch = self.batch
        with torch.no_grad():
            gate = torch.empty(batch.layout.shape, dtype=batch.dtype, device=batch.logp.device)
            coefficient = torch.empty_like(gate)
            for _, where, part, ratio in self.parts():
                gate[where] = part
                torch.mul(part, ratio, out=coefficient[where])
        return gate, coefficient

    @property
    def gate(self) -> Tensor:
        """M_t in [0, 1]; 0 outside the response."""
        # Of a decision that has been reviewed it is there already.
        return self._review[0] if "_review" in self.__dict__ else self._judged[0]

    @property
    def coefficient(self) -> Tensor:
        """k_t: the gradient of the loss w.r.t. logp_t is -k_t A_t / denominator. 0 outside the response.

        Never negative, but for DRPO, which pulls a token that is too far out back.
        """
        return self._judged[1]

    @functools.cached_property
    def _review(self) -> tuple[Tensor, Tensor, Trace]:
        layout = self.batch.layout

        def to_tensor(value: Tensor | float) -> Tensor:
            if isinstance(value, Tensor):
                return value
            # full, not tensor: a copy from the host would wait for the device.
            device = layout.mask.device
            return torch.full((), value, dtype=accumulation_dtype(device), device=device)

        with torch.no_grad():
            tokens, verdict = self._settled or _judge(self.method, self.batch)
            usable = tokens.usable
            rejected = (usable & ~verdict.keep) * verdict.cause() + (layout.mask & ~usable) * OTHER_RULE
            values = {name: to_tensor(value) for name, value in verdict.trace.items()}
            trace = {
                name: value.expand(layout.lengths.shape)
                if name in _PER_RESPONSE
                else torch.where(layout.mask, value, 0)
                for name, value in values.items()
            }
            gate, _ = _gate_and_ratio(self.batch, tokens, verdict)
            return gate, rejected.to(torch.int8), Trace(**trace)

    @property
    def rejected_by(self) -> Tensor:
        """Which rule rejected: int8, token-shaped.

        0 kept or no response token; 1 token threshold; 2 prefix budget only; 3 any other rule (a clip, a response that
        was dropped, a correction, or an input that is not finite). A soft gate's attenuated tokens carry the rule that
        they broke; where nothing is rejected by rule (SAPO, DRPO, CISPO), 0.
        """
        return self._review[1]

    @property
    def trace(self) -> Trace:
        """The quantities behind the decision."""
        return self._review[2]


def _judge(method: Method, batch: Batch) -> tuple[Tokens, Verdict]:
    tokens = batch.tokens()
    return tokens, judge(method, batch, tokens)


def _gate_and_ratio(batch: Batch, tokens: Tokens, verdict: Verdict) -> tuple[Tensor, Tensor]:
    gate = as_dtype(verdict.keep, batch.dtype) if verdict.attenuation is None else verdict.attenuation
    return zero_outside_(gate, tokens.bits), verdict.ratio
