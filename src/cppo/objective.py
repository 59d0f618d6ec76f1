"""``decide`` and ``policy_loss``: a trust region's verdict on every token, and the loss that follows from it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import methods as m
from .inputs import Batch, Tokens, check_batch, check_reduction
from .metrics import PREFIX_BUDGET, decision_metrics
from .ops import account, gates
from .ops.divergence import BINARY
from .ops.layout import accumulation_dtype
from .ops.masking import as_dtype, zero_outside_
from .ops.ratios import importance_ratio
from .ops.reduction import Reduction, linear_loss, loss_denominator, loss_scale

# Decision.rejected_by
TOKEN_THRESHOLD, OTHER_RULE = 1, 3  # and PREFIX_BUDGET, 2

# A given divergence counts as no more than this, so that no sum of them overflows into a neighbour's.
_LARGEST_DIVERGENCE = 1e15

# Tokens judged at once on a CPU. Smaller blocks save memory and lose time to calls (benchmarks/mask.py).
_BLOCK_TOKENS = 262144


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """The account behind a decision, token-shaped (``[B, T]`` or ``[N]``); None where the method has no such quantity.

    Values outside the response are 0. ``prior_account`` and ``threshold`` are float64.
    """

    position_weight: Tensor | None = None  # w_t
    divergence: Tensor | None = None  # D_t
    weighted_divergence: Tensor | None = None  # Z_t = w_t D_t
    prior_account: Tensor | None = None  # U_{t-1}
    threshold: Tensor | None = None  # c_t
    delta_b: Tensor | None = None  # [B]: the budget of each response


@dataclasses.dataclass(frozen=True, eq=False)
class _Verdict:
    """What a rule says of the usable tokens; elsewhere anything."""

    keep: Tensor  # bool: within the trust region, or moving toward mu
    attenuation: Tensor | None = None  # a soft gate's M_t, 1 where kept; None: hard
    # Which rule rejects, where one does; called only when somebody looks.
    cause: Callable[[], Tensor | int] = lambda: OTHER_RULE
    trace: dict[str, Tensor | float] = dataclasses.field(default_factory=dict)  # Trace's fields; a number if constant


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """A trust region's verdict on every token. No tensor here carries gradient.

    ``decide`` computes ``gate`` and ``coefficient`` at once; ``rejected_by``, ``trace``, and everything of the decision
    inside a :class:`PolicyLoss`, are computed from the inputs on first use, so that a training step that does not look
    does not pay. The inputs must not be changed in place before.
    """

    method: m.Method
    batch: Batch = dataclasses.field(repr=False)

    @functools.cached_property
    def _judged(self) -> tuple[Tensor, Tensor]:
        batch = self.batch
        with torch.no_grad():
            gate = torch.empty(batch.layout.shape, dtype=batch.dtype, device=batch.logp.device)
            coefficient = torch.empty_like(gate)
            for block, tokens in _blocks(batch):
                gate[tokens], coefficient[tokens] = _judge(self.method, block)
        return gate, coefficient

    @property
    def gate(self) -> Tensor:
        """M_t in [0, 1]; 0 outside the response."""
        return self._judged[0]

    @property
    def coefficient(self) -> Tensor:
        """k_t >= 0: the gradient of the loss w.r.t. logp_t is -k_t A_t / denominator. 0 outside the response."""
        return self._judged[1]

    @functools.cached_property
    def _review(self) -> tuple[Tensor, Trace]:
        mask, lengths = self.batch.layout.mask, self.batch.layout.lengths

        def to_tensor(value: Tensor | float) -> Tensor:
            if isinstance(value, Tensor):
                return value
            # full, not tensor: a copy from the host would wait for the device.
            return torch.full((), value, dtype=accumulation_dtype(mask.device), device=mask.device)

        with torch.no_grad():
            tokens = self.batch.tokens()
            usable = tokens.usable
            verdict = _RULES[type(self.method)](self.method, self.batch, tokens)
            rejected = (usable & ~verdict.keep) * verdict.cause() + (mask & ~usable) * OTHER_RULE
            trace = {name: to_tensor(value) for name, value in verdict.trace.items()}
            budget = {"delta_b": trace.pop("delta_b").expand(lengths.shape)} if "delta_b" in trace else {}
            return rejected.to(torch.int8), Trace(**{k: torch.where(mask, v, 0) for k, v in trace.items()}, **budget)

    @property
    def rejected_by(self) -> Tensor:
        """Which rule rejected: int8, token-shaped.

        0 kept or no response token; 1 token threshold; 2 prefix budget only; 3 any other rule (a clip, or an input
        that is not finite). A soft gate's attenuated tokens carry the rule they broke.
        """
        return self._review[0]

    @property
    def trace(self) -> Trace:
        """The account behind the decision."""
        return self._review[1]


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyLoss:
    """The loss (0-d, differentiable in ``logp``), the decision behind it and what a run logs about it.

    ``loss`` is the surrogate's value, -sum k_t A_t / denominator; its gradient is what matters.
    """

    loss: Tensor
    decision: Decision

    @functools.cached_property
    def metrics(self) -> dict[str, Tensor]:
        """0-d tensors, no host synchronisation; computed on first use. See :mod:`cppo.metrics`."""
        return decision_metrics(self.decision)


def _measure(method: m.CPPO | m.DPPO, batch: Batch, tokens: Tokens) -> Tensor:
    """Return D_t; 0 where it cannot be measured: such a token spends nothing, and is rejected anyway."""
    if batch.divergence is None:
        measured = BINARY[method.divergence](batch.logp, batch.rollout_logp)
    else:
        measured = batch.divergence.clamp(min=0.0, max=_LARGEST_DIVERGENCE)
    return zero_outside_(measured, tokens.bits)


def _position_weight(method: m.CPPO, batch: Batch) -> Tensor:
    layout, dtype = batch.layout, batch.dtype
    if method.position == "uniform":
        return as_dtype(layout.mask, dtype)
    if method.position == "linear":
        return account.linear_position_weight(layout, method.w_min, dtype)
    # The response's own numbers choose its permutation: the same response, the same weights, in any batch.
    bits = batch.rollout_logp.to(torch.float32).view(torch.int32).to(torch.int64)
    salt = layout.total(bits.masked_fill(~layout.mask, 0)) + method.shuffle_seed
    return account.shuffled_position_weight(layout, method.w_min, dtype, salt)


def _judge_cppo(method: m.CPPO, batch: Batch, tokens: Tokens) -> _Verdict:
    layout, delta = batch.layout, method.delta
    measured = _measure(method, batch, tokens)
    weight = _position_weight(method, batch)
    spent = weight * measured
    trace: dict[str, Tensor | float] = {
        "position_weight": weight,
        "divergence": measured,
        "weighted_divergence": spent,
        "threshold": delta,
    }
    limit: Tensor | float = delta
    if method.budget != "none":
        adaptive = method.budget == "adaptive"
        delta_b = account.adaptive_budget(measured, layout, method.delta_b) if adaptive else method.delta_b
        prior = account.prior_account(weight, spent, delta_b, layout)
        limit = account.threshold(prior, delta)
        trace |= {"delta_b": delta_b, "prior_account": prior, "threshold": limit}
    keep = account.within(spent, limit).logical_or_(gates.moves_toward(batch.advantages, tokens.log_ratio))
    attenuation = None
    if method.gate == "soft":
        excess = spent / delta
        if method.budget != "none":
            excess = account.excess(weight, spent, prior, delta, delta_b, layout).to(batch.dtype)
        attenuation = torch.where(keep, 1.0, gates.soft_gate(excess))
    return _Verdict(keep, attenuation, lambda: torch.where(spent <= delta, PREFIX_BUDGET, TOKEN_THRESHOLD), trace)


def _judge_dppo(method: m.DPPO, batch: Batch, tokens: Tokens) -> _Verdict:
    measured = _measure(method, batch, tokens)
    keep = (measured <= method.delta).logical_or_(gates.moves_toward(batch.advantages, tokens.log_ratio))
    return _Verdict(keep, cause=lambda: TOKEN_THRESHOLD, trace={"divergence": measured, "threshold": method.delta})


def _judge_grpo(method: m.GRPO, batch: Batch, tokens: Tokens) -> _Verdict:
    return _Verdict(~gates.clips(batch.advantages, tokens.log_ratio, method.clip_low, method.clip_high))


def _judge_policy_gradient(method: m.PolicyGradient, batch: Batch, tokens: Tokens) -> _Verdict:
    return _Verdict(torch.ones_like(tokens.bits, dtype=torch.bool))


_RULES: dict[type, Callable[..., _Verdict]] = {
    m.CPPO: _judge_cppo,
    m.DPPO: _judge_dppo,
    m.GRPO: _judge_grpo,
    m.PolicyGradient: _judge_policy_gradient,
}


def decide(
    method: m.Method,
    logp: Tensor,
    rollout_logp: Tensor,
    advantages: Tensor,
    response_mask: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    divergence: Tensor | None = None,
) -> Decision:
    """Judge every token of a batch of responses.

    Padded layout: token tensors are ``[B, T]``; ``response_mask`` says which tokens the policy wrote (padding may be
    left, right or inside; tool spans count as padding). Packed layout: token tensors are ``[N]`` and ``lengths`` says
    how many belong to each response. Positions come from the mask, never from columns: the same response gets the
    same decision in any batch, width, padding side and layout. Source: METHOD section 2.

    Args:
        method: a method from :mod:`cppo.methods`.
        logp: log pi(y_t) under the current policy, floating, at the sampling temperature. Detached here.
        rollout_logp: log mu(y_t) as the sampler computed it, same shape.
        advantages: ``[B]``, or token-shaped.
        response_mask: token-shaped; bool, or numbers of which all but 0 count as True; None: every token.
        lengths: packed layout only: ``[B]`` integers that sum to N. Checked on the host for a list or a CPU tensor;
            on an accelerator a wrong sum is not seen (looking would stall it).
        divergence: token-shaped D_t in [0, 1e15], for a method with a top-K or exact divergence; overrides the binary
            ones. Values outside count as the nearer end.

    Returns:
        A :class:`Decision`; its tensors are float32, or float64 if a log-prob tensor is.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Numerics: log-ratios and divergences in float32 or wider, the account in float64. A response token whose
    log-probs, advantage or given divergence is NaN or infinite is rejected (``rejected_by`` 3), spends nothing, and is
    counted in the metrics; padding may hold anything. Nothing here makes the host wait for the device. Between layouts
    only an exact tie between inexact numbers may differ: the sums round in another order, by 1e-16 of their size.
    """
    with torch.no_grad():
        batch = check_batch(method, logp, rollout_logp, advantages, response_mask, lengths, divergence)
        decision = Decision(method, batch)
        _ = decision.gate
        return decision


def _blocks(batch: Batch) -> Iterator[tuple[Batch, slice]]:
    """Yield parts of a batch, whole responses each, and where they stand.

    On a CPU in blocks, so that the intermediates take little memory, near the cache; elsewhere in one.
    """
    if batch.logp.device.type != "cpu":
        yield batch, slice(None)
        return
    for responses, tokens in batch.layout.blocks(_BLOCK_TOKENS):
        yield batch.select(responses, tokens), tokens


def _judge(method: m.Method, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return (gate, coefficient) of a batch, or of one block of it."""
    tokens = batch.tokens()
    verdict = _RULES[type(method)](method, batch, tokens)
    gate = as_dtype(verdict.keep, batch.dtype) if verdict.attenuation is None else verdict.attenuation
    gate = zero_outside_(gate, tokens.bits)
    ratio = importance_ratio(tokens.log_ratio, getattr(method, "ratio_cap", None))
    return gate, ratio.mul_(gate)


def policy_loss(
    method: m.Method,
    logp: Tensor,
    rollout_logp: Tensor,
    advantages: Tensor,
    response_mask: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    divergence: Tensor | None = None,
    reduction: Reduction = "token-mean",
    denominator: float | Tensor | None = None,
    fixed_length: int | None = None,
) -> PolicyLoss:
    """Return the loss whose gradient with respect to logp_t is -k_t A_t / denominator (Eq. 11).

    Args:
        method: a method from :mod:`cppo.methods`.
        logp: as in :func:`decide`; the only argument through which gradient flows.
        rollout_logp: as in :func:`decide`.
        advantages: as in :func:`decide`.
        response_mask: as in :func:`decide`.
        lengths: as in :func:`decide`.
        divergence: as in :func:`decide`.
        reduction: "token-mean": divide by the batch's response tokens (DAPO); "sequence-mean": mean over non-empty
            responses of their token means (GRPO); "fixed-length": token sums over ``fixed_length``, mean over
            non-empty responses (Dr. GRPO). Rejected tokens stay in every denominator, padding never is.
        denominator: replaces the token count (token-mean) or the response count (the others): the whole optimizer
            batch's, where this call sees a part of it (gradient accumulation, data parallel).
        fixed_length: the constant of "fixed-length", a positive integer.

    Returns:
        A :class:`PolicyLoss` with ``loss``, ``decision`` and ``metrics``.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Numerics: as :func:`decide`. The gradient is computed in closed form and returned in ``logp``'s dtype.
    """
    check_reduction(reduction, denominator, fixed_length)
    with torch.no_grad():
        batch = check_batch(method, logp, rollout_logp, advantages, response_mask, lengths, divergence)
        total = loss_denominator(batch.layout, reduction, denominator, batch.dtype)
        weights = torch.empty(batch.layout.shape, dtype=batch.dtype, device=logp.device)
        for block, tokens in _blocks(batch):
            _, coefficient = _judge(method, block)
            scale = loss_scale(block.advantages, block.layout, reduction, total, fixed_length)
            torch.mul(coefficient, scale, out=weights[tokens])
    return PolicyLoss(linear_loss(logp, weights), Decision(method, batch))
