"""What each method says of a batch's tokens: one function a method, in rooms named like those of cppo.methods."""

from __future__ import annotations

from collections.abc import Callable

from cppo import methods as m
from cppo.inputs import Batch, Tokens

from . import corrections, divergence_regions, ratio_regions
from .verdict import OTHER_RULE, PREFIX_BUDGET, TOKEN_THRESHOLD, Verdict

_RULES: dict[type, Callable[..., Verdict]] = {
    m.CPPO: divergence_regions.judge_cppo,
    m.DPPO: divergence_regions.judge_dppo,
    m.IPO: divergence_regions.judge_ipo,
    m.DRPO: divergence_regions.judge_drpo,
    m.TRMMax: divergence_regions.judge_trm,
    m.TRMAvg: divergence_regions.judge_trm,
    m.TRM: divergence_regions.judge_trm,
    m.ESTR: divergence_regions.judge_estr,
    m.GRPO: ratio_regions.judge_grpo,
    m.CISPO: ratio_regions.judge_cispo,
    m.MinPRO: ratio_regions.judge_minpro,
    m.GSPO: ratio_regions.judge_gspo,
    m.SAPO: ratio_regions.judge_sapo,
    m.GMPO: ratio_regions.judge_gmpo,
    m.PNPO: ratio_regions.judge_pnpo,
    m.CTPO: ratio_regions.judge_ctpo,
    m.PolicyGradient: ratio_regions.judge_policy_gradient,
}


def judge(method: m.Method, batch: Batch, tokens: Tokens) -> Verdict:
    """Return the method's verdict on the usable tokens, corrections of the engine mismatch included."""
    return corrections.correct(_RULES[type(method)](method, batch, tokens), batch, tokens)


__all__ = ["OTHER_RULE", "PREFIX_BUDGET", "TOKEN_THRESHOLD", "Verdict", "judge"]
