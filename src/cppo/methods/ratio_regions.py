"""Trust regions on the importance ratio: of a token, of its prefix, of its response."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from .checks import Summary, check_flag, check_number, check_order, check_positive, check_width, given


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO:
    """The PPO clip as GRPO and DAPO use it, with separate bounds ("clip-higher").

    Rule: M_t = 0 if (A_t > 0 and rho_t > 1 + clip_high) or (A_t < 0 and rho_t < 1 - clip_low) or (A_t < 0 and
    rho_t > dual_clip), else 1; k_t = M_t rho_t. The same gradient as
    -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A).
    Source: PPO (arXiv 1707.06347), GRPO (arXiv 2402.03300), DAPO (arXiv 2503.14476), dual clip (arXiv 1912.09729).
    Paper and code: the ratio is taken to the rollout policy, as in the studies of trust regions; verl's vanilla loss
    takes it to the trainer's recomputation unless its bypass mode is on. Without the dual clip A < 0 with rho >> 1 is
    never clipped: a known hole, kept. GRPO's paper averages over the tokens of each response (``"sequence-mean"``),
    DAPO over all tokens (``"token-mean"``).

    Args:
        clip_low: lower bound's distance from 1, >= 0; 1 or more disables it. PPO, DAPO: 0.2.
        clip_high: upper bound's distance from 1, >= 0. PPO: 0.2; DAPO: 0.28; DPPO's scaling study and GSPO: 0.27.
        dual_clip: the largest ratio that A < 0 may have, > 1; None: any. verl: 3, many of its recipes 10.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None

    summary: ClassVar = Summary(
        rule="outward tokens: 1 - clip_low <= rho_t <= 1 + clip_high",
        statistic="ratio",
        scope="token",
        reduction="token-mean",
        source="arXiv 2402.03300, 2503.14476",
    )

    def __post_init__(self) -> None:
        check_width(self, "clip_low", "clip_high")
        if self.dual_clip is not None:
            check_number(self, "dual_clip", 1, math.inf, low_open=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CISPO:
    """Clipped importance-sampling weights: no token is masked, its weight is bounded.

    Rule: k_t = min(max(rho_t, floor), cap). The loss is -k_t A_t log pi(y_t), k_t without gradient.
    Source: MiniMax-M1 (arXiv 2506.13585), Eqs. 4-5.
    Paper and code: the paper has no lower bound and does not publish its upper one. ``cap`` is absolute here, as TRL's
    epsilon_high is with its "cispo"; verl's cap is 1 + clip_ratio_high (1.2 in its example). Not offered: the paper's
    general form, which multiplies PPO's mask in.

    Args:
        cap: upper bound of the weight, > 0. TRL (for ScaleRL) and DPPO's scaling study: 5; its stability study: 3.
        floor: lower bound of the weight, in [0, cap]. Paper: none, which is 0.
    """

    cap: float = 5.0
    floor: float = 0.0

    summary: ClassVar = Summary(
        rule="weight min(max(rho_t, floor), cap)",
        statistic="ratio",
        scope="token",
        reduction="token-mean",
        source="arXiv 2506.13585",
    )

    def __post_init__(self) -> None:
        check_positive(self, "cap")
        check_width(self, "floor")
        check_order(self, "floor", "cap")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinPRO:
    """The ratio, weighed by the smallest ratio of its prefix: a token after an unlikely one counts less.

    Rule: b_1 = 1, b_t = min_{j<t} rho_j over the response's earlier tokens; r_t = b_t rho_t; M_t = 0 if (A_t > 0 and
    r_t > 1 + clip_high) or (A_t < 0 and r_t < 1 - clip_low), else 1; k_t = M_t min(r_t, ratio_cap). b_t carries no
    gradient.
    Source: arXiv 2601.22718, its definition of b_t known here from secondary text.
    Paper and code: the paper's clip could not be read. Clipping r_t like PPO, with GRPO's bounds, is what a third-party
    kernel does and is our choice; with both bounds None nothing is clipped.

    Args:
        clip_low: as in ``cppo.GRPO``, on r_t; None: no bound. Not verified.
        clip_high: as in ``cppo.GRPO``, on r_t; None: no bound. Not verified.
        ratio_cap: cap on r_t in the coefficient, > 0; None for none.
        cap_prefix_at_one: take min(b_t, 1), so that a prefix of large ratios amplifies nothing.
    """

    clip_low: float | None = 0.2
    clip_high: float | None = 0.28
    ratio_cap: float | None = None
    cap_prefix_at_one: bool = False

    summary: ClassVar = Summary(
        rule="outward tokens: 1 - clip_low <= b_t rho_t <= 1 + clip_high",
        statistic="ratio times the prefix's smallest",
        scope="prefix",
        reduction="token-mean",
        source="arXiv 2601.22718 (secondary)",
    )

    def __post_init__(self) -> None:
        check_width(self, *given(self, "clip_low", "clip_high"))
        check_positive(self, *given(self, "ratio_cap"))
        check_flag(self, "cap_prefix_at_one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSPO:
    """PPO's clip on the response's ratio, the geometric mean of its tokens' ratios.

    Rule: s = exp((1 / T) sum_t log rho_t); M_t = 0 if (A_t > 0 and s > 1 + clip_high) or (A_t < 0 and
    s < 1 - clip_low), else 1; k_t = M_t s. With ``reduction="sequence-mean"`` this is the gradient of the paper's loss.
    Source: arXiv 2507.18071, its token variant where advantages differ within a response.
    Paper and code: verl clamps log s at 10 from above, here at 20. A clipped share two orders of magnitude above GRPO's
    is normal.

    Args:
        clip_low: lower bound's distance from 1, >= 0; 1 or more disables it. Paper: 3e-4.
        clip_high: upper bound's distance from 1, >= 0. Paper: 4e-4.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    summary: ClassVar = Summary(
        rule="outward responses: 1 - clip_low <= s <= 1 + clip_high",
        statistic="geometric mean of the ratios",
        scope="response",
        reduction="sequence-mean",
        source="arXiv 2507.18071",
    )

    def __post_init__(self) -> None:
        check_width(self, "clip_low", "clip_high")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SAPO:
    """A gate that fades with the ratio instead of a clip.

    Rule: x_t = tau (rho_t - 1), tau = tau_pos if A_t > 0 else tau_neg; M_t = 4 sigmoid(x_t) sigmoid(-x_t) =
    sech^2(x_t / 2); k_t = M_t rho_t. Nothing is rejected. The loss is -(4 / tau) sigmoid(x_t) A_t.
    Source: arXiv 2511.20347.
    Paper and code: read in TRL and verl, which agree.

    Args:
        tau_pos: how fast the gate fades where A > 0, > 0. TRL, verl: 1.0.
        tau_neg: the same elsewhere, > 0. TRL, verl: 1.05.
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    summary: ClassVar = Summary(
        rule="gate sech^2(tau (rho_t - 1) / 2)",
        statistic="ratio",
        scope="token",
        reduction="sequence-mean",
        source="arXiv 2511.20347",
    )

    def __post_init__(self) -> None:
        check_positive(self, "tau_pos", "tau_neg")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GMPO:
    """The response's ratio again, of ratios that are clipped one by one, on the side that moves away.

    Rule: c_t = min(log rho_t, log_clip_high) if A_t > 0, max(log rho_t, -log_clip_low) if A_t < 0;
    R = exp((1 / T) sum_t c_t); M_t = 0 where the clip acts, else 1; k_t = M_t R. With ``reduction="sequence-mean"``
    this is the gradient of the paper's loss -A R.
    Source: arXiv 2507.20673.
    Paper and code: read in TRL and verl. One advantage a response is meant; where advantages differ within one, each
    token is clipped by its own sign and weighed by its own value (verl takes their mean, and averages over empty
    responses too).

    Args:
        log_clip_low: lower bound on log rho, as its distance from 0, >= 0. TRL, verl: 0.4; smaller for MoE.
        log_clip_high: upper bound on log rho, >= 0. TRL, verl: 0.4; smaller for MoE.
    """

    log_clip_low: float = 0.4
    log_clip_high: float = 0.4

    summary: ClassVar = Summary(
        rule="outward tokens: -log_clip_low <= log rho_t <= log_clip_high; weight R",
        statistic="geometric mean of the clipped ratios",
        scope="response",
        reduction="sequence-mean",
        source="arXiv 2507.20673",
    )

    def __post_init__(self) -> None:
        check_width(self, "log_clip_low", "log_clip_high")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PNPO:
    """The geometric mean of the prefix's ratios in the ratio's place.

    Rule: r_t = exp((1 / t) sum_{j<=t} log rho_j); k_t = min(r_t, ratio_cap). The last token's r is GSPO's s.
    Source: arXiv 2608.01418, known here from secondary text only: provisional.
    Paper and code: no code was seen, and the paper's clip or rejection bounds were not found: none act here.

    Args:
        ratio_cap: cap on r_t in the coefficient, > 0; None for none.
    """

    ratio_cap: float | None = None

    summary: ClassVar = Summary(
        rule="weight: geometric mean of rho_1..rho_t",
        statistic="geometric mean of the prefix's ratios",
        scope="prefix",
        reduction="token-mean",
        source="arXiv 2608.01418 (secondary)",
    )

    def __post_init__(self) -> None:
        check_positive(self, *given(self, "ratio_cap"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CTPO:
    """The product of the prefix's ratios in the ratio's place, with a clip that widens like the root of its length.

    Rule: log r_t = sum_{j<=t} log rho_j; M_t = 0 if (A_t > 0 and log r_t > epsilon sqrt(t)) or (A_t < 0 and
    log r_t < -epsilon sqrt(t)), else 1; k_t = M_t min(r_t, ratio_cap).
    Source: arXiv 2605.07331, known here from secondary text only: provisional.
    Paper and code: no code was seen. The value of epsilon was not found, so it has no default. That the gradient flows
    through the token's own ratio alone is our choice.

    Args:
        epsilon: the clip's width on log r_1, > 0. No published value known.
        ratio_cap: cap on r_t in the coefficient, > 0; None for none.
    """

    epsilon: float
    ratio_cap: float | None = None

    summary: ClassVar = Summary(
        rule="outward tokens: |log(rho_1 .. rho_t)| <= epsilon sqrt(t)",
        statistic="product of the prefix's ratios",
        scope="prefix",
        reduction="token-mean",
        source="arXiv 2605.07331 (secondary)",
    )

    def __post_init__(self) -> None:
        check_positive(self, "epsilon", *given(self, "ratio_cap"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """No trust region.

    Rule: k_t = min(rho_t, ratio_cap).
    Source: REINFORCE with importance sampling.

    Args:
        ratio_cap: cap on rho, > 0; None for none.
    """

    ratio_cap: float | None = None

    summary: ClassVar = Summary(
        rule="none",
        statistic="none",
        scope="token",
        reduction="token-mean",
        source="REINFORCE",
    )

    def __post_init__(self) -> None:
        check_positive(self, *given(self, "ratio_cap"))
