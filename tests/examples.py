"""Fixed examples: every method, and a ragged batch whose responses drift by different amounts."""

from __future__ import annotations

import dataclasses
import math
import random

from layouts import Response

import cppo

BUDGETS = ("adaptive", "fixed", "none")
CPPOS = [
    cppo.CPPO(budget=budget, position=position, gate=gate, divergence=divergence, ratio_cap=cap, delta_b=delta_b)
    for budget in BUDGETS
    for position in ("linear", "uniform", "shuffled")
    for gate in ("hard", "soft")
    for divergence, cap, delta_b in (("binary_tv", None, 0.02), ("binary_kl", 1.1, 0.002), ("exact_tv", 3.0, 0.05))
]
OTHERS = [
    cppo.CPPO(budget="fixed", gate=cppo.sigmoid_gate),
    cppo.DPPO(),
    cppo.DPPO(delta=0.05, divergence="binary_kl", ratio_cap=5.0),
    cppo.DPPO(delta=0.2, delta_low=0.05, divergence="topk_tv"),
    cppo.IPO(delta=0.1),
    cppo.IPO(delta=0.05, divergence="binary_kl", ratio_cap=2.0),
    cppo.DRPO(),
    cppo.DRPO(delta=0.15),
    cppo.TRMMax(),
    cppo.TRMAvg(avg_threshold=0.01),
    cppo.TRM(max_threshold=0.3, avg_threshold=0.03, divergence="k2", avg_divergence="k3"),
    cppo.TRM(max_threshold=0.5, avg_threshold=0.08, divergence="exact_kl"),
    cppo.ESTR(tau=0.05),
    cppo.GRPO(),
    cppo.GRPO(clip_low=0.1, clip_high=0.1),
    cppo.GRPO(clip_low=1.0, clip_high=0.5),
    cppo.GRPO(dual_clip=1.1),
    cppo.CISPO(),
    cppo.CISPO(cap=1.2, floor=0.9),
    cppo.MinPRO(),
    cppo.MinPRO(clip_low=None, clip_high=None, ratio_cap=1.5, cap_prefix_at_one=True),
    cppo.MinPRO(clip_low=0.5, clip_high=None),
    cppo.GSPO(),
    cppo.GSPO(clip_low=0.05, clip_high=0.1),
    cppo.SAPO(),
    cppo.SAPO(tau_pos=3.0, tau_neg=0.5),
    cppo.GMPO(),
    cppo.GMPO(log_clip_low=0.05, log_clip_high=0.1),
    cppo.PNPO(),
    cppo.PNPO(ratio_cap=1.05),
    cppo.CTPO(epsilon=0.1),
    cppo.CTPO(epsilon=0.3, ratio_cap=2.0),
    cppo.PolicyGradient(),
    cppo.PolicyGradient(ratio_cap=3.0),
]

CORRECTIONS = [
    cppo.TIS(),
    cppo.TIS(scope="sequence", cap=1.2),
    cppo.MIS(high=1.1),
    cppo.MIS(scope="sequence", low=0.9, high=1.5),
    cppo.IcePop(low=0.9, high=1.05),
    cppo.GeometricMask(low=0.98, high=1.02),
    (cppo.TIS(cap=1.05), cppo.GeometricMask(low=0.95, high=1.05)),
]


def drifting_batch(seed=0, lengths=(5, 0, 1, 17, 2, 40, 3, 10, 0)):
    """Return responses whose drifts differ in size, so that each budget is at its floor, between, and at its top."""
    dice, more = random.Random(seed), random.Random(seed + 1000)
    responses = []
    for length in lengths:
        scale = dice.choice((0.02, 0.1, 0.3, 1.0))
        rollout = [math.log(dice.uniform(0.02, 1.0)) for _ in range(length)]
        logp = [min(m + dice.gauss(0, scale), 0.0) for m in rollout]
        advantage = dice.choice((-1.5, -0.5, 0.7, 1.0))
        divergence = [abs(dice.gauss(0, scale)) for _ in range(length)]
        entropy = [more.uniform(0.0, 2.0) for _ in range(length)]
        # The trainer's recomputation of the rollout policy: near it, in some responses less near.
        mismatch = more.choice((0.01, 0.05, 0.3))
        proximal = [min(m + more.gauss(0, mismatch), 0.0) for m in rollout]
        responses.append(
            Response(
                tuple(logp), tuple(rollout), (advantage,) * length, tuple(divergence), tuple(entropy), tuple(proximal)
            )
        )
    return responses


def broken_batch(seed=0):
    """Return responses with advantages a token, in which one number in ten is NaN or infinite."""
    dice = random.Random(seed)

    def break_some(values):
        return tuple(dice.choice((math.nan, math.inf, -math.inf)) if dice.random() < 0.1 else v for v in values)

    return [Response(*map(break_some, dataclasses.astuple(r))) for r in drifting_batch(seed)]


def label(method):
    values = (getattr(v, "__name__", str(v)) for v in dataclasses.asdict(method).values())
    return "-".join([cppo.method_name(method), *values])
