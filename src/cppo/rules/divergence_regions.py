"""The rules of :mod:`cppo.methods.divergence_regions`."""

from __future__ import annotations

import torch
from torch import Tensor

from cppo import methods as m
from cppo.inputs import Batch, Tokens
from cppo.ops import account, gates
from cppo.ops.divergence import LARGEST_DIVERGENCE, SAMPLED, binary_tv
from cppo.ops.masking import as_dtype, zero_outside_
from cppo.ops.ratios import importance_ratio

from .verdict import PREFIX_BUDGET, TOKEN_THRESHOLD, Verdict


def _measure(method: m.CPPO | m.DPPO | m.IPO | m.TRM, batch: Batch, tokens: Tokens) -> Tensor:
    """Return D_t; 0 where it cannot be measured: such a token spends nothing, and is rejected anyway."""
    if batch.divergence is None:
        measured = SAMPLED[method.divergence](batch.logp, batch.anchor_logp)
    else:
        measured = batch.divergence.clamp(min=0.0, max=LARGEST_DIVERGENCE)
    return zero_outside_(measured, tokens.measurable)


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


def judge_cppo(method: m.CPPO, batch: Batch, tokens: Tokens) -> Verdict:
    """Z_t <= c_t, or moving toward mu."""
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
    if method.gate != "hard":
        excess = spent / delta
        if method.budget != "none":
            excess = account.excess(weight, spent, prior, delta, delta_b, layout).to(batch.dtype)
        gate = method.gate if callable(method.gate) else gates.soft_gate
        # Of a user's function only the values beyond 1 are asked for, and its rounding stays within [0, 1].
        attenuation = torch.where(keep, 1.0, gate(excess.clamp(min=1.0)).clamp(0.0, 1.0))

    def cause() -> Tensor:
        # In the threshold's dtype, as it was compared: a tie in float32 may be none in float64.
        compared = spent.to(limit.dtype) if isinstance(limit, Tensor) else spent
        return torch.where(compared <= delta, PREFIX_BUDGET, TOKEN_THRESHOLD)

    return Verdict(keep, importance_ratio(tokens.log_ratio, method.ratio_cap), attenuation, cause, trace)


def judge_dppo(method: m.DPPO, batch: Batch, tokens: Tokens) -> Verdict:
    """D_t <= delta (delta_low where A < 0), or moving toward mu."""
    measured = _measure(method, batch, tokens)
    limit: Tensor | float = method.delta
    if method.delta_low is not None:
        # Not where() of two numbers: that gives the default dtype.
        limit = torch.full_like(batch.advantages, method.delta)
        limit = limit.masked_fill_(batch.advantages < 0, method.delta_low)
    keep = (measured <= limit).logical_or_(gates.moves_toward(batch.advantages, tokens.log_ratio))
    return Verdict(
        keep,
        importance_ratio(tokens.log_ratio, method.ratio_cap),
        cause=lambda: TOKEN_THRESHOLD,
        trace={"divergence": measured, "threshold": limit},
    )


def judge_ipo(method: m.IPO, batch: Batch, tokens: Tokens) -> Verdict:
    """D_t <= delta, whichever way the token moves."""
    measured = _measure(method, batch, tokens)
    return Verdict(
        measured <= method.delta,
        importance_ratio(tokens.log_ratio, method.ratio_cap),
        cause=lambda: TOKEN_THRESHOLD,
        trace={"divergence": measured, "threshold": method.delta},
    )


def judge_drpo(method: m.DRPO, batch: Batch, tokens: Tokens) -> Verdict:
    """Everything is kept, with the weight 1 - sign(A (rho - 1)) |pi - mu| / delta."""
    measured = zero_outside_(binary_tv(batch.logp, batch.anchor_logp), tokens.measurable)
    outward = torch.sign(batch.advantages) * torch.sign(tokens.log_ratio)
    weight = 1.0 - outward * measured / method.delta
    return Verdict(
        torch.ones_like(measured, dtype=torch.bool),
        importance_ratio(tokens.log_ratio).mul_(weight),
        trace={"divergence": measured},
    )


def judge_trm(method: m.TRM, batch: Batch, tokens: Tokens) -> Verdict:
    """The response's largest and mean divergence, each within its threshold."""
    layout = batch.layout
    measured = _measure(method, batch, tokens)
    trace: dict[str, Tensor | float] = {"divergence": measured}
    accepted = torch.ones_like(layout.lengths, dtype=torch.bool)
    if method.max_threshold is not None:
        trace["max_divergence"] = largest = layout.maximum(measured)
        accepted &= largest <= method.max_threshold
    if method.avg_threshold is not None:
        averaged = measured
        if method.avg_divergence is not None:
            averaged = zero_outside_(SAMPLED[method.avg_divergence](batch.logp, batch.anchor_logp), tokens.measurable)
        trace["mean_divergence"] = mean = layout.total(averaged) / layout.lengths.clamp(min=1)
        accepted &= mean <= method.avg_threshold
    trace["accepted"] = accepted
    keep = layout.spread(accepted).expand(layout.shape).contiguous()
    return Verdict(keep, importance_ratio(tokens.log_ratio), trace=trace)


def judge_estr(method: m.ESTR, batch: Batch, tokens: Tokens) -> Verdict:
    """(log rho)^2 / (H + epsilon) <= tau, and PPO's clip does not act."""
    if batch.rollout_entropy is None:
        raise AssertionError("check_batch refuses ESTR without rollout_entropy")
    uncertainty = batch.rollout_entropy.clamp(min=0.0) + method.epsilon
    statistic = (tokens.log_ratio.square() / uncertainty).clamp_(max=LARGEST_DIVERGENCE)
    zero_outside_(statistic, tokens.measurable)
    clipped = gates.clips(batch.advantages, tokens.log_ratio, *gates.log_bounds(method.clip_low, method.clip_high))
    keep = (statistic <= method.tau) & ~clipped
    return Verdict(
        keep,
        importance_ratio(tokens.log_ratio),
        trace={"statistic": statistic, "threshold": method.tau},
    )
