"""Corrections of the mismatch between the sampling engine and the trainer, which compose with every method.

Three policies: mu as the sampler computed it, q the trainer's recomputation at the weights that sampled (the proximal
policy), pi the policy being optimised. The method judges pi against q; the correction multiplies its coefficient by
W(B_t), B_t = q / mu. Where only two policies are known, q = mu and every correction is 1: a filter on rho itself would
weigh by rho twice.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from .checks import Summary, check_choice, check_order, check_positive, check_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class TIS:
    """Truncated importance sampling.

    Rule: W_t = min(B_t, cap), or min(prod_j B_j, cap) for every token of the response.
    Source: verl's rollout correction and TRL's vLLM correction; both know it under this name.
    Paper and code: the product is formed in log space and counts as no more than exp(20).

    Args:
        scope: "token" or "sequence".
        cap: upper bound of the weight, > 0. verl: 2; usual range 1.5 to 5 (token), 2 to 10 (sequence).
    """

    scope: Literal["token", "sequence"] = "token"
    cap: float = 2.0

    summary: ClassVar = Summary(
        rule="weight min(B, cap)",
        statistic="q / mu",
        scope="token",
        source="verl, TRL",
        needs=("proximal_logp",),
    )

    def __post_init__(self) -> None:
        check_choice(self, "scope", ("token", "sequence"))
        check_positive(self, "cap")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MIS:
    """Masked importance sampling: what lies outside the bounds is dropped, the rest is weighed.

    Rule: W_t = B_t if low <= B_t <= high, else 0; or the same of prod_j B_j for every token of the response.
    Source: TRL's vLLM correction ("token_mask", "sequence_mask").
    Paper and code: rejected tokens stay in the denominator. verl's rollout_rs takes them out of it.

    Args:
        scope: "token" or "sequence".
        low: lower bound of the weight, in [0, high].
        high: upper bound of the weight, > 0. verl: 2; TRL: 3.
    """

    scope: Literal["token", "sequence"] = "token"
    low: float = 0.0
    high: float = 2.0

    summary: ClassVar = Summary(
        rule="weight B where low <= B <= high, else 0",
        statistic="q / mu",
        scope="token",
        source="TRL, verl",
        needs=("proximal_logp",),
    )

    def __post_init__(self) -> None:
        check_choice(self, "scope", ("token", "sequence"))
        check_positive(self, "high")
        check_width(self, "low")
        check_order(self, "low", "high")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IcePop(MIS):
    """Masked importance sampling of tokens at the bounds of Ring-1T.

    Rule: W_t = B_t if low <= B_t <= high, else 0.
    Source: the Ring-1T report.
    Paper and code: rejected tokens stay in the denominator.

    Args:
        scope: "token"; "sequence" is not IcePop but works.
        low: lower bound of the weight, in [0, high]. Ring-1T: 0.5.
        high: upper bound of the weight, > 0. Ring-1T: 5.
    """

    low: float = 0.5
    high: float = 5.0

    summary: ClassVar = dataclasses.replace(MIS.summary, source="Ring-1T report")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeometricMask:
    """A mask on responses, by the geometric mean of their B; it weighs nothing.

    Rule: W = 1 for every token of a response if low <= exp((1 / T) sum_t log B_t) <= high, else 0. Neutral to length.
    Source: verl's rollout_rs "seq_mean_k1".
    Paper and code: verl bounds the inverse, so its LO_HI is low = 1 / HI and high = 1 / LO here. It takes rejected
    responses out of the denominator, here they stay in it.

    Args:
        low: lower bound, >= 0. verl's presets: 0.999.
        high: upper bound, >= ``low``. verl's presets: 1.001.
    """

    low: float = 0.999
    high: float = 1.001

    summary: ClassVar = Summary(
        rule="responses: low <= geometric mean of B <= high",
        statistic="geometric mean of q / mu",
        scope="response",
        source="verl",
        needs=("proximal_logp",),
    )

    def __post_init__(self) -> None:
        check_width(self, "low", "high")
        check_order(self, "low", "high")


Correction = TIS | MIS | GeometricMask

CORRECTIONS: dict[str, type[Correction]] = {
    "tis": TIS,
    "mis": MIS,
    "icepop": IcePop,
    "geometric_mask": GeometricMask,
}
