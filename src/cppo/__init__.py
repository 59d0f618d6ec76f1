"""CPPO (Cumulative Prefix-divergence Policy Optimization, arXiv 2606.10968) and the trust regions it is compared with.

>>> import cppo
>>> method = cppo.CPPO(delta=0.15, delta_b=0.02)
>>> out = cppo.policy_loss(method, logp, rollout_logp, advantages, response_mask)  # doctest: +SKIP
>>> out.loss.backward()  # doctest: +SKIP
"""

from .methods import CPPO, DPPO, GRPO, METHODS, Method, PolicyGradient, make_method, method_name, parse_method
from .objective import Decision, PolicyLoss, Trace, decide, policy_loss
from .ops.divergence import binary_kl, binary_tv, exact_kl, exact_tv, topk_kl, topk_tv

__version__ = "0.1.0"

__all__ = [
    "CPPO",
    "DPPO",
    "GRPO",
    "METHODS",
    "Decision",
    "Method",
    "PolicyGradient",
    "PolicyLoss",
    "Trace",
    "binary_kl",
    "binary_tv",
    "decide",
    "exact_kl",
    "exact_tv",
    "make_method",
    "method_name",
    "parse_method",
    "policy_loss",
    "topk_kl",
    "topk_tv",
]
