"""CPPO (Cumulative Prefix-divergence Policy Optimization, arXiv 2606.10968) and the trust regions it is compared with.

>>> import cppo
>>> method = cppo.CPPO(delta=0.15, delta_b=0.02)
>>> out = cppo.policy_loss(method, logp, rollout_logp, advantages, response_mask)  # doctest: +SKIP
>>> out.loss.backward()  # doctest: +SKIP
"""

from . import theory
from .decision import Decision, Trace
from .methods import (
    CISPO,
    CORRECTIONS,
    CPPO,
    CTPO,
    DPPO,
    DRPO,
    ESTR,
    GMPO,
    GRPO,
    GSPO,
    IPO,
    METHODS,
    MIS,
    PNPO,
    SAPO,
    TIS,
    TRM,
    Correction,
    GeometricMask,
    IcePop,
    Method,
    MinPRO,
    PolicyGradient,
    TRMAvg,
    TRMMax,
    make_method,
    method_name,
    parse_correction,
    parse_method,
)
from .objective import PolicyLoss, decide, policy_loss
from .ops.context_parallel import ContextParallel
from .ops.divergence import binary_kl, binary_tv, exact_kl, exact_tv, topk_kl, topk_tv
from .ops.gates import sigmoid_gate
from .ops.token_statistics import TokenStatistics, TopK, token_statistics, topk_log_probs
from .ops.vocab_parallel import VocabParallel

__version__ = "0.1.0"

__all__ = [
    "CISPO",
    "CORRECTIONS",
    "CPPO",
    "CTPO",
    "DPPO",
    "DRPO",
    "ESTR",
    "GMPO",
    "GRPO",
    "GSPO",
    "IPO",
    "METHODS",
    "MIS",
    "PNPO",
    "SAPO",
    "TIS",
    "TRM",
    "ContextParallel",
    "Correction",
    "Decision",
    "GeometricMask",
    "IcePop",
    "Method",
    "MinPRO",
    "PolicyGradient",
    "PolicyLoss",
    "TRMAvg",
    "TRMMax",
    "TokenStatistics",
    "TopK",
    "Trace",
    "VocabParallel",
    "binary_kl",
    "binary_tv",
    "decide",
    "exact_kl",
    "exact_tv",
    "make_method",
    "method_name",
    "parse_correction",
    "parse_method",
    "policy_loss",
    "sigmoid_gate",
    "theory",
    "token_statistics",
    "topk_kl",
    "topk_log_probs",
    "topk_tv",
]
