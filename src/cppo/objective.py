"""``decide`` and ``policy_loss``: a trust region's verdict on every token, and the loss that follows from it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import methods as m
from .inputs import Batch, check_batch, check_reduction
from .metrics import decision_metrics
from .ops import account, gates
from .ops.divergence import BINARY
from .ops.layout import Layout
from .ops.ratios import importance_ratio
from .ops.reduction import Reduction, linear_loss, loss_weights

# Decision.rejected_by
KEPT, TOKEN_THRESHOLD, PREFIX_BUDGET, OTHER_RULE = 0, 1, 2, 3


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
class _Verdict:
    gate: Tensor  # M_t on the mask; anything elsewhere
    rejected: Tensor | None = None  # int8 code where the rule rejects; None: never rejects
    trace: dict[str, Tensor | float] = dataclasses.field(default_factory=dict)  # Trace's fields, a number if constant


@dataclasses.dataclass(frozen=True)
class Decision:
    """A trust region's verdict on every token. No tensor here carries gradient.

    Attributes:
        gate: M_t in [0, 1]; 0 outside the response.
        coefficient: k_t >= 0: the gradient of the loss w.r.t. logp_t is -k_t A_t / denominator; 0 outside the response.
        rejected_by: int8. 0 kept or no response token; 1 token threshold; 2 prefix budget only; 3 any other rule
            (a clip, or an input that is not finite). A soft gate's attenuated tokens carry the rule they broke.
    """

    gate: Tensor
    coefficient: Tensor
    rejected_by: Tensor
    batch: Batch = dataclasses.field(repr=False)
    method: m.Method

    @functools.cached_property
    def trace(self) -> Trace:
        """The intermediates, recomputed on first use: a training step that does not look does not pay."""
        layout = self.batch.layout
        with torch.no_grad():
            verdict = _RULES[type(self.method)](self.method, self.batch, self.batch.log_ratio())
            values: dict[str, Tensor] = {}
            for name, value in verdict.trace.items():
                shape = layout.lengths.shape if name == "delta_b" else layout.shape
                tensor = torch.as_tensor(value, dtype=None, device=layout.mask.device).expand(shape)
                values[name] = tensor if name == "delta_b" else torch.where(layout.mask, tensor, 0)
            return Trace(**values)


@dataclasses.dataclass(frozen=True)
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


def _measure(method: m.CPPO | m.DPPO, batch: Batch) -> Tensor:
    """Return D_t, finite: a token whose divergence cannot be measured spends nothing (and is rejected anyway)."""
    if batch.divergence is not None:
        measured = batch.divergence.clamp(min=0.0)
    else:
        measured = BINARY[method.divergence](batch.logp, batch.rollout_logp)
    return measured.masked_fill_(~(batch.layout.mask & measured.isfinite()), 0.0)


def _position_weight(method: m.CPPO, batch: Batch) -> Tensor:
    layout, dtype = batch.layout, batch.dtype
    if method.position == "uniform":
        return torch.ones(layout.shape, dtype=dtype, device=batch.logp.device)
    if method.position == "linear":
        return account.linear_position_weight(layout, method.w_min, dtype)
    bits = batch.rollout_logp.to(torch.float32).view(torch.int32).to(torch.int64)
    salt = layout.total(bits.masked_fill(~layout.mask, 0)) + method.shuffle_seed
    return account.shuffled_position_weight(layout, method.w_min, dtype, salt)


def _budget(method: m.CPPO, measured: Tensor, layout: Layout) -> Tensor | float:
    if method.budget == "adaptive":
        return account.adaptive_budget(measured, layout, method.delta_b)
    return method.delta_b


def _judge_cppo(method: m.CPPO, batch: Batch, log_ratio: Tensor) -> _Verdict:
    layout = batch.layout
    measured = _measure(method, batch)
    weight = _position_weight(method, batch)
    spent = weight * measured
    trace: dict[str, Tensor | float] = {
        "position_weight": weight,
        "divergence": measured,
        "weighted_divergence": spent,
        "threshold": method.delta,
    }
    within = single = spent <= method.delta
    if method.budget != "none":
        trace["delta_b"] = delta_b = _budget(method, measured, layout)
        trace["prior_account"] = prior = account.prior_account(weight, spent, delta_b, layout)
        trace["threshold"] = limit = account.threshold(prior, method.delta)
        within = spent <= limit
    keep = within | gates.moves_toward(batch.advantages, log_ratio)
    gate = keep.to(batch.dtype)
    if method.gate == "soft":
        excess = spent / method.delta
        if method.budget != "none":
            excess = account.excess(weight, spent, prior, method.delta, delta_b, layout).to(batch.dtype)
        gate = torch.where(keep, gate, gates.soft_gate(excess))
    # 1 where the token alone spends too much, 2 where only the prefix's drift forbids it.
    rejected = torch.where(single, PREFIX_BUDGET, TOKEN_THRESHOLD).to(torch.int8).masked_fill_(keep, KEPT)
    return _Verdict(gate, rejected, trace)


def _judge_dppo(method: m.DPPO, batch: Batch, log_ratio: Tensor) -> _Verdict:
    measured = _measure(method, batch)
    keep = (measured <= method.delta) | gates.moves_toward(batch.advantages, log_ratio)
    rejected = (~keep).to(torch.int8) * TOKEN_THRESHOLD
    return _Verdict(keep.to(batch.dtype), rejected, {"divergence": measured, "threshold": method.delta})


def _judge_grpo(method: m.GRPO, batch: Batch, log_ratio: Tensor) -> _Verdict:
    reject = gates.clips(batch.advantages, log_ratio, method.clip_low, method.clip_high)
    return _Verdict((~reject).to(batch.dtype), reject.to(torch.int8) * OTHER_RULE)


def _judge_policy_gradient(method: m.PolicyGradient, batch: Batch, log_ratio: Tensor) -> _Verdict:  # noqa: ARG001
    return _Verdict(torch.ones_like(log_ratio))


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
        response_mask: token-shaped, bool or 0/1; None: every token.
        lengths: packed layout only: ``[B]`` integers that sum to N. Checked on the host for a list or a CPU tensor;
            on an accelerator a wrong sum is not seen (looking would stall it).
        divergence: token-shaped D_t >= 0, for a method with a top-K or exact divergence; overrides the binary ones.

    Returns:
        A :class:`Decision`; its tensors are float32, or float64 if an input is.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Numerics: log-ratios and divergences in float32 or wider, the account in float64. A response token whose log-probs,
    advantage or given divergence is NaN or infinite is rejected (``rejected_by`` 3), spends nothing, and is counted in the
    metrics; padding may hold anything. Nothing here makes the host wait for the device.
    """
    with torch.no_grad():
        batch = check_batch(method, logp, rollout_logp, advantages, response_mask, lengths, divergence)
        return _decide(method, batch)


def _decide(method: m.Method, batch: Batch) -> Decision:
    log_ratio = batch.log_ratio()
    verdict = _RULES[type(method)](method, batch, log_ratio)
    # Not finite, or not a response token: no gradient, whatever the rule made of the numbers found there.
    unusable = ~batch.usable(log_ratio)
    gate = verdict.gate.masked_fill_(unusable, 0.0)
    rejected = verdict.rejected
    rejected = torch.zeros_like(gate, dtype=torch.int8) if rejected is None else rejected.masked_fill_(unusable, KEPT)
    coefficient = importance_ratio(log_ratio, getattr(method, "ratio_cap", None)).mul_(gate).masked_fill_(unusable, 0.0)
    rejected.masked_fill_(unusable.logical_and_(batch.layout.mask), OTHER_RULE)
    return Decision(gate, coefficient, rejected, batch, method)


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
    decision = decide(method, logp, rollout_logp, advantages, response_mask, lengths=lengths, divergence=divergence)
    batch = decision.batch
    with torch.no_grad():
        weights = loss_weights(
            decision.coefficient, batch.advantages, batch.layout, reduction, denominator, fixed_length
        )
    return PolicyLoss(linear_loss(logp, weights), decision)
