"""The rules of :mod:`cppo.methods.ratio_regions`."""

from __future__ import annotations

import torch
from torch import Tensor

from cppo import methods as m
from cppo.inputs import Batch, Tokens
from cppo.ops import gates, ratios
from cppo.ops.ratios import importance_ratio

from .verdict import Verdict


def _everything(tokens: Tokens) -> Tensor:
    return torch.ones_like(tokens.bits, dtype=torch.bool)


def judge_grpo(method: m.GRPO, batch: Batch, tokens: Tokens) -> Verdict:
    """PPO's clip, and a dual clip where A < 0."""
    low, high = gates.log_bounds(method.clip_low, method.clip_high)
    keep = ~gates.clips(batch.advantages, tokens.log_ratio, low, high)
    if method.dual_clip is not None:
        keep &= ~gates.dual_clips(batch.advantages, tokens.log_ratio, method.dual_clip)
    return Verdict(keep, importance_ratio(tokens.log_ratio))


def judge_cispo(method: m.CISPO, batch: Batch, tokens: Tokens) -> Verdict:
    """Everything is kept, with a bounded weight."""
    return Verdict(_everything(tokens), importance_ratio(tokens.log_ratio, method.cap).clamp_(min=method.floor))


def judge_minpro(method: m.MinPRO, batch: Batch, tokens: Tokens) -> Verdict:
    """PPO's clip on b_t rho_t."""
    smallest = ratios.prior_minimum(tokens.log_ratio, tokens.measurable != 0, batch.layout)
    if method.cap_prefix_at_one:
        smallest = smallest.clamp_(max=0.0)
    log_ratio = smallest + tokens.log_ratio
    low, high = gates.log_bounds(method.clip_low, method.clip_high)
    keep = ~gates.clips(batch.advantages, log_ratio, low, high)
    ratio = importance_ratio(log_ratio, method.ratio_cap)
    return Verdict(keep, ratio, trace={"prefix_ratio": importance_ratio(smallest), "ratio": ratio})


def judge_gspo(method: m.GSPO, batch: Batch, tokens: Tokens) -> Verdict:
    """PPO's clip on the geometric mean of the response's ratios."""
    layout = batch.layout
    mean = ratios.mean_log_ratio(tokens.log_ratio, layout)
    low, high = gates.log_bounds(method.clip_low, method.clip_high)
    clipped = gates.clips(batch.advantages, layout.spread(mean), low, high)
    ratio = ratios.response_ratio(mean, layout, batch.dtype)
    return Verdict(~clipped.expand(layout.shape), ratio, trace={"ratio": ratio})


def judge_sapo(method: m.SAPO, batch: Batch, tokens: Tokens) -> Verdict:
    """Everything is kept, behind a gate that fades with the ratio."""
    # Not where() of two numbers: that gives the default dtype.
    temperature = torch.full_like(batch.advantages, method.tau_neg).masked_fill_(batch.advantages > 0, method.tau_pos)
    attenuation = gates.saturating_gate(tokens.log_ratio, temperature)
    return Verdict(_everything(tokens), importance_ratio(tokens.log_ratio), attenuation)


def judge_gmpo(method: m.GMPO, batch: Batch, tokens: Tokens) -> Verdict:
    """Each token's clip on its outward side; the geometric mean of the clipped ratios weighs the others."""
    layout, log_ratio = batch.layout, tokens.log_ratio
    low, high = -method.log_clip_low, method.log_clip_high
    clipped = gates.clips(batch.advantages, log_ratio, low, high)
    mean = ratios.mean_log_ratio(torch.where(clipped, log_ratio.clamp(low, high), log_ratio), layout)
    ratio = ratios.response_ratio(mean, layout, batch.dtype)
    return Verdict(~clipped, ratio, trace={"ratio": ratio})


def judge_pnpo(method: m.PNPO, batch: Batch, tokens: Tokens) -> Verdict:
    """Everything is kept, weighed by the geometric mean of the prefix's ratios."""
    prefix = ratios.prefix_log_ratio(tokens.log_ratio, batch.layout)
    length = batch.layout.position(prefix.dtype).add_(1.0).clamp_(min=1.0)
    ratio = importance_ratio(prefix.div_(length), method.ratio_cap).to(batch.dtype)
    return Verdict(_everything(tokens), ratio, trace={"ratio": ratio})


def judge_ctpo(method: m.CTPO, batch: Batch, tokens: Tokens) -> Verdict:
    """PPO's clip on the product of the prefix's ratios, its bounds widening with the root of the prefix's length."""
    prefix = ratios.prefix_log_ratio(tokens.log_ratio, batch.layout)
    width = batch.layout.position(prefix.dtype).add_(1.0).clamp_(min=1.0).sqrt_().mul_(method.epsilon)
    keep = ~gates.clips(batch.advantages, prefix, -width, width)
    ratio = importance_ratio(prefix, method.ratio_cap).to(batch.dtype)
    return Verdict(keep, ratio, trace={"ratio": ratio, "threshold": width})


def judge_policy_gradient(method: m.PolicyGradient, batch: Batch, tokens: Tokens) -> Verdict:
    """Everything is kept."""
    return Verdict(_everything(tokens), importance_ratio(tokens.log_ratio, method.ratio_cap))
