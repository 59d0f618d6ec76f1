"""The rules of :mod:`cppo.methods.corrections`: weights W(B), B = q / mu, on top of a method's verdict."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from cppo import methods as m
from cppo.inputs import Batch, Tokens
from cppo.ops.layout import Layout
from cppo.ops.ratios import importance_ratio, mean_log_ratio

from .verdict import OTHER_RULE, Verdict


def _log_weight(correction: m.Correction, log_mismatch: Tensor, layout: Layout) -> Tensor:
    """Return log B_t, log prod B, or the mean of log B: what the correction looks at."""
    if isinstance(correction, m.GeometricMask):
        return layout.spread(mean_log_ratio(log_mismatch, layout))
    if correction.scope == "sequence":
        return layout.spread(layout.total(log_mismatch))
    return log_mismatch


def _weigh(correction: m.Correction, log_mismatch: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """Return (weights, which tokens stay), broadcasting against the tokens; None: all stay."""
    weight = importance_ratio(_log_weight(correction, log_mismatch, layout))
    if isinstance(correction, m.TIS):
        return weight.clamp_(max=correction.cap), None
    stays = (weight >= correction.low) & (weight <= correction.high)
    return torch.ones_like(weight) if isinstance(correction, m.GeometricMask) else weight, stays


def correct(verdict: Verdict, batch: Batch, tokens: Tokens) -> Verdict:
    """Return the verdict with every correction's weight in its ratio, and without the tokens that one of them drops."""
    if tokens.log_mismatch is None:
        return verdict
    keep, attenuation, rule_keep = verdict.keep, verdict.attenuation, verdict.keep
    total = torch.ones_like(tokens.log_mismatch)
    for correction in batch.corrections:
        weight, stays = _weigh(correction, tokens.log_mismatch, batch.layout)
        total = total * weight.to(batch.dtype)
        if stays is not None:
            keep = keep & stays
            total = total * stays
            attenuation = None if attenuation is None else attenuation * stays
    return dataclasses.replace(
        verdict,
        keep=keep,
        ratio=verdict.ratio * total,
        attenuation=attenuation,
        # The method's own cause stands where it rejects as well.
        cause=lambda: torch.where(rule_keep, OTHER_RULE, verdict.cause()),
        trace=verdict.trace | {"correction": total},
    )
