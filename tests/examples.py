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
    cppo.DPPO(),
    cppo.DPPO(delta=0.05, divergence="binary_kl", ratio_cap=5.0),
    cppo.DPPO(delta=0.2, divergence="topk_tv"),
    cppo.GRPO(),
    cppo.GRPO(clip_low=0.1, clip_high=0.1),
    cppo.GRPO(clip_low=1.0, clip_high=0.5),
    cppo.PolicyGradient(),
    cppo.PolicyGradient(ratio_cap=3.0),
]


def drifting_batch(seed=0, lengths=(5, 0, 1, 17, 2, 40, 3, 10, 0)):
    """Return responses whose drifts differ in size, so that each budget is at its floor, between, and at its top."""
    dice = random.Random(seed)
    responses = []
    for length in lengths:
        scale = dice.choice((0.02, 0.1, 0.3, 1.0))
        rollout = [math.log(dice.uniform(0.02, 1.0)) for _ in range(length)]
        logp = [min(m + dice.gauss(0, scale), 0.0) for m in rollout]
        advantage = dice.choice((-1.5, -0.5, 0.7, 1.0))
        divergence = [abs(dice.gauss(0, scale)) for _ in range(length)]
        responses.append(Response(tuple(logp), tuple(rollout), (advantage,) * length, tuple(divergence)))
    return responses


def label(method):
    return "-".join([cppo.method_name(method), *(str(v) for v in dataclasses.asdict(method).values())])
