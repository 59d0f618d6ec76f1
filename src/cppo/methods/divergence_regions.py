"""Trust regions on a divergence between the two policies: CPPO, DPPO, IPO, DRPO, TRM, ESTR."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from .checks import (
    DIVERGENCES,
    ESTIMATORS,
    SAMPLED_DIVERGENCES,
    Divergence,
    Summary,
    check_choice,
    check_number,
    check_positive,
    check_width,
    given,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CPPO:
    """Cumulative Prefix-divergence Policy Optimization: a position-weighted threshold and a prefix budget.

    Rule, for the t-th of a response's T tokens, with w_t = 1 - (1 - w_min) (t - 1) / (T - 1), Z_t = w_t D_t and the
    account U_t = sum_{j<=t} (delta_b w_j - Z_j):

        c_t = min(delta, delta + U_{t-1});  I_t: Z_t <= c_t
        M_t = 1 if A_t (rho_t - 1) <= 0 or I_t, else 0 (hard gate) or g(x_t) (soft gate)
        x_t = max(Z_t / delta, S_t / (delta + delta_b W_{t-1})), g(x) = min(1, 1 / x)
        k_t = M_t min(rho_t, ratio_cap)

    Source: arXiv 2606.10968, Eqs. 8-11, 19-20, 22.
    Paper and code: T is the response's own number of tokens; the authors' pull request uses the padded width of the
    batch. The authors' code caps rho at 20; here the default is no cap, as in Eq. 11.

    Args:
        delta: the most that one token may spend, > 0. Paper: 0.15 dense models, 0.20 a 30B-A3B MoE; 0.1 for KL.
        delta_b: the budget a unit of weight, >= 0; with ``budget="adaptive"`` it is b_min of Eq. 22. Paper: 0.020
            adaptive on base models, 0.015 fixed on post-trained ones; 0.002 for KL.
        budget: "adaptive": clamp(P90(D), delta_b, 2 delta_b) a response; "fixed"; "none": only Z_t <= delta.
        w_min: the last token's weight, in (0, 1]. Paper: 0.8.
        position: "linear" (Eq. 9); "uniform": w = 1; "shuffled": the linear weights permuted within each response.
        gate: "hard" (Eq. 10), "soft" (Eqs. 19-20), or a function g of a tensor that is non-increasing, 1 on [0, 1], and
            x g(x) <= 1 beyond, which is checked; ``cppo.sigmoid_gate`` is one.
        divergence: which D; the binary ones come from the log-probs, the others are passed to ``decide``. Paper: top-K
            TV, K = 20.
        ratio_cap: cap on rho in the coefficient, > 0; None for none. In the laboratory 1 held in every regime that was
            tried; None did not at high learning rates (docs/experiments.md); 20, the authors', was as None with a KL.
        shuffle_seed: which permutation ``position="shuffled"`` takes, in [0, 2^63).
    """

    delta: float = 0.15
    delta_b: float = 0.02
    budget: Literal["adaptive", "fixed", "none"] = "adaptive"
    w_min: float = 0.8
    position: Literal["linear", "uniform", "shuffled"] = "linear"
    gate: Literal["hard", "soft"] | Callable[[Any], Any] = "hard"
    divergence: Divergence = "binary_tv"
    ratio_cap: float | None = None
    shuffle_seed: int = 0

    summary: ClassVar = Summary(
        rule="outward tokens: w_t D_t <= min(delta, delta + U_{t-1})",
        statistic="divergence, summed over the prefix",
        scope="prefix",
        reduction="token-mean",
        source="arXiv 2606.10968",
    )

    def __post_init__(self) -> None:
        check_positive(self, "delta", *given(self, "ratio_cap"))
        check_width(self, "delta_b")
        check_choice(self, "budget", ("adaptive", "fixed", "none"))
        check_number(self, "w_min", 0, 1, low_open=True)
        check_choice(self, "position", ("linear", "uniform", "shuffled"))
        if not callable(self.gate) and self.gate not in ("hard", "soft"):
            raise ValueError(f"CPPO(gate={self.gate!r}): expected one of hard, soft, or a function of a tensor")
        check_choice(self, "divergence", DIVERGENCES)
        if isinstance(self.shuffle_seed, bool) or not isinstance(self.shuffle_seed, int):
            raise TypeError(f"CPPO(shuffle_seed={self.shuffle_seed!r}): expected an integer in [0, 2^63)")
        if not 0 <= self.shuffle_seed < 2**63:
            raise ValueError(f"CPPO(shuffle_seed={self.shuffle_seed!r}): expected an integer in [0, 2^63)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPPO:
    """Divergence PPO: one divergence threshold for every token that moves away.

    Rule: M_t = 0 if A_t (rho_t - 1) > 0 and D_t > (delta if A_t > 0 else delta_low), else 1;
    k_t = M_t min(rho_t, ratio_cap).
    Source: arXiv 2602.04879.
    Paper and code: the code allows the two thresholds, the paper uses one. Upstream verl's dppo_tv and dppo_kl take
    the trainer's recomputed log-probs for mu, the paper the sampler's, as here. The authors' servers keep exactly K
    entries of a top-K, the paper (and this package) the K likeliest and the sampled token. Their KL adds 1e-8 inside
    its logarithms. verl's cap is clip_ratio_c, 3 unless it is set.

    Args:
        delta: threshold on D, > 0. Paper: 0.15 (stability study) or 0.2 (scaling study) for TV; 0.05 for KL.
        delta_low: threshold where A < 0, > 0; None: ``delta``.
        divergence: as in :class:`CPPO`. Paper: binary, and top-K with K = 20.
        ratio_cap: cap on rho in the coefficient, > 0; None for none. Paper: none (stability study) or 5 (scaling
            study); verl: 3 unless set, its recipe 10000. Below 5 it down-weights rare tokens (paper 5.4).
    """

    delta: float = 0.15
    delta_low: float | None = None
    divergence: Divergence = "binary_tv"
    ratio_cap: float | None = None

    summary: ClassVar = Summary(
        rule="outward tokens: D_t <= delta",
        statistic="divergence",
        scope="token",
        reduction="fixed-length",
        source="arXiv 2602.04879",
    )

    def __post_init__(self) -> None:
        check_positive(self, "delta", *given(self, "delta_low", "ratio_cap"))
        check_choice(self, "divergence", DIVERGENCES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IPO:
    """DPPO without the direction test: a token beyond the threshold is dropped whichever way it moves.

    Rule: M_t = 1 if D_t <= delta, else 0, whatever the sign of A_t; k_t = M_t min(rho_t, ratio_cap).
    Source: prime-rl's built-in loss since August 2026 (its pull requests 2798, 3418 and 3586), known here from their
    text.
    Paper and code: there is no paper. Not offered: prime-rl's optional penalty on the squared log-ratio (off by
    default), which is a second loss, not a trust region.

    Args:
        delta: threshold on D, > 0. prime-rl: 0.3 since September 2026, 0.1 before.
        divergence: as in :class:`CPPO`. prime-rl: binary TV.
        ratio_cap: cap on rho in the coefficient, > 0; None for none.
    """

    delta: float = 0.3
    divergence: Divergence = "binary_tv"
    ratio_cap: float | None = None

    summary: ClassVar = Summary(
        rule="D_t <= delta",
        statistic="divergence",
        scope="token",
        reduction="token-mean",
        source="prime-rl",
    )

    def __post_init__(self) -> None:
        check_positive(self, "delta", *given(self, "ratio_cap"))
        check_choice(self, "divergence", DIVERGENCES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DRPO:
    """A quadratic penalty instead of a mask: the farther out, the less a token counts; beyond delta it is pulled back.

    Rule: w_t = 1 - sign(A_t (rho_t - 1)) |pi_t - mu_t| / delta; k_t = rho_t w_t, which is 0 at |pi - mu| = delta
    outward, negative beyond (the token is pulled back), and above rho_t inward. The gate is 1: nothing is masked.
    Source: arXiv 2606.09821; loss per token -A rho + |A| mu (rho - 1)^2 / (2 delta).
    Paper and code: formula and default are read off the authors' code (UniRL). At its delta of 12.5 |pi - mu| never
    reaches delta, so w stays in [0.92, 1.08]; a delta of DPPO's size (0.15) makes it a trust region. Published with
    advantages that are centred and not divided by their deviation.

    Args:
        delta: distance |pi - mu| at which the coefficient vanishes, >= 1e-6. UniRL: 12.5.
    """

    delta: float = 12.5

    summary: ClassVar = Summary(
        rule="weight 1 - sign(A (rho_t - 1)) D_t / delta",
        statistic="binary TV",
        scope="token",
        reduction="fixed-length",
        source="arXiv 2606.09821",
    )

    def __post_init__(self) -> None:
        # Far below any probability that a float32 resolves; smaller ones would overflow.
        check_number(self, "delta", 1e-6, math.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TRM:
    """Trust Region Masking: a response is kept or dropped whole.

    Rule: M = 1 for every token of a response if max_t D_t <= max_threshold and (1 / T) sum_t D_t <= avg_threshold, else
    0; the sign of A does not enter; k_t = M rho_t. Dropped responses stay in every denominator.
    Source: arXiv 2512.23075; D is KL(mu || pi), exact over the vocabulary. ``cppo.TRMMax`` and ``cppo.TRMAvg`` are the
    criteria alone, with their published thresholds.
    Paper and code: verl's rollout_rs offers sampled-token estimators only, judges once instead of at every update, and
    takes dropped responses out of the denominator. The thresholds belong to the exact KL: with k2 or k3 the same
    numbers drop other responses. A token whose D cannot be measured (a missing log-prob) is dropped alone.

    Args:
        max_threshold: on the largest D, > 0; None: no such criterion. Paper: 0.05 alone, 0.1 in the pair.
        avg_threshold: on the mean D, > 0; None: no such criterion. Paper: 0.001 alone, 0.002 in the pair.
        divergence: which D: one of :class:`CPPO`'s, or the sampled token's estimators "k2" = d^2 / 2 (paper: for the
            maximum) and "k3" = rho - 1 - d (paper: for the mean), d = log rho. Here "binary_kl": never above the exact
            KL, so laxer at an equal threshold, and known from the log-probs.
        avg_divergence: which D the mean takes, of those known from the log-probs; None: ``divergence``.
    """

    max_threshold: float | None = 0.05
    avg_threshold: float | None = None
    divergence: Divergence | Literal["k2", "k3"] = "binary_kl"
    avg_divergence: Literal["binary_tv", "binary_kl", "k2", "k3"] | None = None

    summary: ClassVar = Summary(
        rule="responses: max_t D_t <= max_threshold, mean_t D_t <= avg_threshold",
        statistic="divergence's maximum and mean",
        scope="response",
        reduction="fixed-length",
        source="arXiv 2512.23075",
    )

    def __post_init__(self) -> None:
        check_positive(self, *given(self, "max_threshold", "avg_threshold"))
        if self.max_threshold is None and self.avg_threshold is None:
            name = type(self).__name__
            raise ValueError(f"{name}(max_threshold=None, avg_threshold=None): expected at least one threshold")
        check_choice(self, "divergence", (*DIVERGENCES, *ESTIMATORS))
        if self.avg_divergence is not None:
            check_choice(self, "avg_divergence", SAMPLED_DIVERGENCES)
            if self.max_threshold is None or self.avg_threshold is None:
                name = type(self).__name__
                raise ValueError(
                    f"{name}(avg_divergence={self.avg_divergence!r}): expected None; it parts the mean's divergence "
                    "from the maximum's where both have a threshold"
                )

    def _check_only(self, criterion: str, other: str) -> None:
        for name, expected in ((criterion, "a number"), (other, "None; TRM takes both")):
            value = getattr(self, name)
            if (value is None) == (name == criterion):
                raise ValueError(f"{type(self).__name__}({name}={value!r}): expected {expected}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TRMMax(TRM):
    """Trust Region Masking by the maximum alone, at its published threshold.

    Rule: M = 1 for every token of a response if max_t D_t <= max_threshold, else 0; k_t = M rho_t.
    Source: arXiv 2512.23075. Otherwise as ``cppo.TRM``.

    Args:
        max_threshold: on the largest D, > 0. Paper: 0.05.
        avg_threshold: as in ``cppo.TRM``.
        divergence: as in ``cppo.TRM``. Paper: exact KL, else "k2".
        avg_divergence: as in ``cppo.TRM``.
    """

    summary: ClassVar = dataclasses.replace(
        TRM.summary, rule="responses: max_t D_t <= max_threshold", statistic="divergence's maximum"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_only("max_threshold", "avg_threshold")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TRMAvg(TRM):
    """Trust Region Masking by the mean alone, at its published threshold.

    Rule: M = 1 for every token of a response if (1 / T) sum_t D_t <= avg_threshold, else 0; k_t = M rho_t.
    Source: arXiv 2512.23075. Otherwise as ``cppo.TRM``.

    Args:
        max_threshold: as in ``cppo.TRM``.
        avg_threshold: on the mean D, > 0. Paper: 0.001.
        divergence: as in ``cppo.TRM``. Paper: exact KL, else "k3".
        avg_divergence: as in ``cppo.TRM``.
    """

    max_threshold: float | None = None
    avg_threshold: float | None = 0.001

    summary: ClassVar = dataclasses.replace(
        TRM.summary, rule="responses: mean_t D_t <= avg_threshold", statistic="divergence's mean"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_only("avg_threshold", "max_threshold")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ESTR:
    """A trust region that widens with the rollout policy's entropy: a large ratio is no surprise where mu is uncertain.

    Rule: S_t = d_t^2 / (H_t + epsilon), d_t = log rho_t, H_t the rollout policy's entropy in nats; M_t = 1 if
    S_t <= tau and PPO's clip (``clip_low``, ``clip_high``) does not act, else 0; k_t = M_t rho_t. The sign of A enters
    the clip alone. H is not known from the log-probs: pass ``rollout_entropy=`` to ``decide``.
    Source: arXiv 2607.22186, known here from secondary text only: provisional.
    Paper and code: no code was seen. The value of tau could not be found, so it has no default.

    Args:
        tau: threshold on S, > 0. No published value known.
        epsilon: added to the entropy, > 0. Paper: 0.01.
        clip_low: as in ``cppo.GRPO``.
        clip_high: as in ``cppo.GRPO``.
    """

    tau: float
    epsilon: float = 0.01
    clip_low: float = 0.2
    clip_high: float = 0.28

    summary: ClassVar = Summary(
        rule="(log rho_t)^2 / (H_t + epsilon) <= tau, and PPO's clip",
        statistic="log-ratio over entropy",
        scope="token",
        reduction="token-mean",
        source="arXiv 2607.22186 (secondary)",
        needs=("rollout_entropy",),
    )

    def __post_init__(self) -> None:
        check_positive(self, "tau", "epsilon")
        check_width(self, "clip_low", "clip_high")
