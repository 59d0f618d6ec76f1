"""The bounds behind the method, as functions of plain numbers (statements of arXiv 2606.10968; docs/method.md).

A response has T tokens. mu is the rollout policy, pi the current one, D_t the exact TV between them at s_t,
u_t = E_mu[D_t], l_t a limit with D_t <= l_t on every path, lbar >= max_t l_t, |R| <= xi. Then (Lemma 2, for pi << mu)

    J(pi) - J(mu) = L'(pi) - Delta,  L' = E_mu[R sum_t (rho_t - 1)],  Delta = E_mu[R sum_t (rho_t - 1)(1 - rho_{t+1:T})]

and everything here bounds |Delta|. A binary or top-K TV is smaller than the exact one: it gives an estimate, no bound.
A constant added to R changes neither L' nor Delta, so xi can be half the reward's range: 1/2 for rewards in {0, 1}.

Ranges: xi, lbar, eta and delta_b in [0, inf), delta in (0, inf), w_min in (0, 1], T an integer in [1, inf). Sequences
have T >= 1 entries, t = 1 first, with u_t and l_t in [0, 1], w_t in (0, inf), c_t in [0, inf). TypeError for what is no
number or no sequence, ValueError for what lies outside or differs in length; both name the argument.

Numerics: Python floats, whatever the width of the numbers given; sums and products of terms >= 0, so nothing cancels
and the relative error is at most a few T 2^-53, while no intermediate leaves the range of a float: beyond it the answer
is inf, or nan where 0 times that is asked for. ``fractions.Fraction`` in gives the exact Fraction out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from .checks import checked_integer, checked_number


def suffix_tv_product(limit: Sequence[float]) -> list[float]:
    """Return beta_t = 1 - prod_{j>t} (1 - l_j) for t = 1..T, a bound on the TV of the suffix y_{t+1:T}; Lemma 3.

    Between its laws under mu and under pi, given any prefix y_{1:t}. The last entry, an empty suffix, is 0; l_1 is not
    used. Accumulated from the end as beta_{t-1} = l_t + (1 - l_t) beta_t, which keeps the digits of small limits.
    """
    return _from_the_end(limit, lambda beta, l_t: l_t + (1 - l_t) * beta)


def suffix_tv_union(limit: Sequence[float]) -> list[float]:
    """Return sum_{j>t} l_j for t = 1..T, the union bound of ``suffix_tv_product``; can exceed 1; Lemma 3."""
    return _from_the_end(limit, lambda total, l_t: total + l_t)


def residual_bound(mean_divergence: Sequence[float], limit: Sequence[float], *, xi: float) -> float:
    """Return 4 xi sum_{t<T} u_t sum_{j>t} l_j >= |Delta|; Prop. 4. ``mean_divergence`` is u, ``limit`` l."""
    return _residual(mean_divergence, suffix_tv_union(limit), xi)


def residual_bound_product(mean_divergence: Sequence[float], limit: Sequence[float], *, xi: float) -> float:
    """Return 4 xi sum_{t<T} u_t (1 - prod_{j>t} (1 - l_j)) >= |Delta|; Eq. B.9. Never above ``residual_bound``."""
    return _residual(mean_divergence, suffix_tv_product(limit), xi)


def residual_bound_pathwise(ratio: Sequence[float], *, xi: float) -> float:
    """Return xi sum_{t<j} |rho_t - 1| |rho_j - 1| of one response; its mean over mu is >= |Delta|. Not in the paper.

    For rho_{t+1:T} - 1 = sum_{j>t} (rho_j - 1) rho_{j+1:T}, and E_mu[rho_{j+1:T}] <= 1 given y_{1:j}. The mean is never
    above ``residual_bound`` with the smallest valid limits: E_mu[|rho_j - 1|] = 2 D_j given y_{1:j-1}. It needs sampled
    tokens alone, no limit and no divergence: the mean over a batch estimates a bound without bias, and with a variance
    that grows with the ratios. ``ratio`` is rho_1..rho_T, each in [0, inf).
    """
    (xi,) = _checked(xi=xi)
    gap = [abs(rho - 1) for rho in _checked_each("ratio", ratio, 0, math.inf)]
    # |rho_1 - 1| + .. + |rho_{t-1} - 1| before each token; a zero of the entries' own type.
    before = itertools.accumulate(gap[:-1], initial=0 * gap[0])
    return xi * sum(g * b for g, b in zip(gap, before, strict=True))


def residual_coefficient(*, xi: float, T: int, lbar: float) -> list[float]:
    """Return lambda_t = 4 xi lbar (T - t) for t = 1..T; Prop. 4 with one limit for all tokens. The last is 0."""
    T = checked_integer("T", T, 1)
    xi, lbar = _checked(xi=xi, lbar=lbar)
    return [4 * xi * lbar * (T - t) for t in range(1, T + 1)]


def residual_bound_uniform(mean_divergence: Sequence[float], *, xi: float, lbar: float) -> float:
    """Return sum_{t<T} lambda_t u_t >= |Delta|; Prop. 4 with lbar for every l_t, so never below the others."""
    mean = _checked_each("mean_divergence", mean_divergence, 0, 1)
    coefficient = residual_coefficient(xi=xi, T=len(mean), lbar=lbar)
    return sum(c * u for c, u in zip(coefficient, mean, strict=True))


def largest_limit(threshold: Sequence[float], position_weight: Sequence[float]) -> float:
    """Return lbar = max_t c_t / w_t, the limit that w_t D_t <= c_t puts on D; Theorem 1.

    Args:
        threshold: c_t, the largest over all paths. Eq. 8 can make c_t negative; no D_t >= 0 meets that, so Theorem 1
            then says nothing and a ValueError is raised.
        position_weight: w_t.
    """
    limits = _checked_each("threshold", threshold, 0, math.inf)
    weights = _checked_each("position_weight", position_weight, 0, math.inf, low_open=True)
    _check_length("position_weight", position_weight, "threshold", threshold)
    return max(c / w for c, w in zip(limits, weights, strict=True))


def largest_limit_of_rule(*, delta: float, w_min: float) -> float:
    """Return lbar = delta / w_min, which ``largest_limit`` never exceeds under Eqs. 8 and 9; Theorem 1."""
    delta, w_min = _checked(delta=delta, w_min=w_min)
    return delta / w_min


def improvement_penalty(*, xi: float, T: int, lbar: float, delta_b: float) -> float:
    """Return 2 xi T (T - 1) lbar delta_b, for J(pi) - J(mu) >= L'(pi) - penalty; Theorem 1.

    Premises: w_t D_t <= c_t for all t; w_1 D_1 + .. + w_m D_m <= delta_b W_m for all m < T; ``meets_monotonicity(w)``.
    The penalty is sum_t lambda_t u_t at u_t = delta_b, the worst that the premises allow.
    """
    T = checked_integer("T", T, 1)
    xi, lbar, delta_b = _checked(xi=xi, lbar=lbar, delta_b=delta_b)
    return 2 * xi * T * (T - 1) * lbar * delta_b


def linear_position_weight(*, T: int, w_min: float) -> list[float]:
    """Return w_t = 1 - (1 - w_min) (t - 1) / (T - 1) for t = 1..T, Eq. 9; 1 for T = 1.

    Computed as (T - t + w_min (t - 1)) / (T - 1), which is the same number and stays positive for any w_min.
    """
    T = checked_integer("T", T, 1)
    (w_min,) = _checked(w_min=w_min)
    steps = max(T - 1, 1)
    return [(steps - i + w_min * i) / steps for i in range(T)]


def meets_monotonicity(position_weight: Sequence[float]) -> bool:
    """Return whether lambda_t / w_t, hence g_t = (T - t) / w_t, is non-increasing in t; Theorem 1 and Prop. 5.

    Compared as (T - t) w_{t+1} >= (T - t - 1) w_t: rounding the comparison never makes a True False; a violation that
    one rounding hides can pass. The entries count as given: Eq. 9's own rounding can break it for w_min < T 2^-52.
    """
    weights = _checked_each("position_weight", position_weight, 0, math.inf, low_open=True)
    left = range(len(weights) - 1, 0, -1)  # T - t for t = 1..T-1
    return all(n * after >= (n - 1) * w for n, (w, after) in zip(left, itertools.pairwise(weights), strict=True))


def linear_monotonicity_gap(*, T: int, w_min: float) -> list[float]:
    """Return g_t - g_{t+1} = w_min / (w_t w_{t+1}) > 0, t = 1..T-1, for Eq. 9's weights, g_t = (T - t) / w_t; Prop. 5.

    Exact as it stands: with s = (1 - w_min) / (T - 1) the numerator (T - t) w_{t+1} - (T - t - 1) w_t = w_t - s (T - t)
    is w_T = w_min. In terms of lambda_t = 4 xi lbar (T - t) the gap of lambda_t / w_t is 4 xi lbar times as large.
    """
    return [w_min / (w * after) for w, after in itertools.pairwise(linear_position_weight(T=T, w_min=w_min))]


def uniform_threshold_penalty(*, xi: float, T: int, delta: float) -> float:
    """Return 2 xi T (T - 1) delta^2, the bound on |Delta| that D_t <= delta alone gives; Cor. 6/7."""
    T = checked_integer("T", T, 1)
    xi, delta = _checked(xi=xi, delta=delta)
    return 2 * xi * T * (T - 1) * delta * delta


def uniform_limit_ratio(*, delta: float, delta_b: float) -> float:
    """Return delta_b / delta: Theorem 1's penalty at lbar = delta over the uniform threshold's; Cor. 6/7."""
    delta, delta_b = _checked(delta=delta, delta_b=delta_b)
    return delta_b / delta


def rule_ratio(*, delta: float, delta_b: float, w_min: float) -> float:
    """Return delta_b / (delta w_min): the penalty at lbar = delta / w_min over the uniform threshold's; Cor. 6/7.

    Below 1, the tighter bound, when delta_b < delta w_min. This is Theorem 1's constant alone. Eq. 8 lets a prefix
    overdraw by up to delta; with that slack (``slack_penalty``, w_1 = 1) the ratio grows by 2 / (T w_min).
    """
    delta, delta_b, w_min = _checked(delta=delta, delta_b=delta_b, w_min=w_min)
    return delta_b / delta / w_min  # the product of two small knobs can be 0


def slack_penalty(*, xi: float, T: int, lbar: float, eta: float, w_1: float = 1) -> float:
    """Return eta 4 xi lbar (T - 1) / w_1, what a slack in the prefix premise adds to the penalty; Prop. 8.

    Args:
        xi: the bound on the reward.
        T: the response's length.
        lbar: the largest limit.
        eta: w_1 D_1 + .. + w_m D_m <= delta_b W_m + eta for all m < T. Eq. 8 gives delta - delta_b w_m at m, so
            eta = max(0, delta - delta_b min_m w_m) <= delta.
        w_1: the first weight, in (0, inf); 1 in Eq. 9.
    """
    T = checked_integer("T", T, 1)
    xi, lbar, eta, w_1 = _checked(xi=xi, lbar=lbar, eta=eta, w_1=w_1)
    return eta * 4 * xi * lbar * (T - 1) / w_1


def trm_avg_factor(*, T: int) -> float:
    """Return 2 - 2 / T: so much larger can the penalty be if of the prefix premises only m = T - 1 is kept; Eq. 18.

    At w = 1, attained by u = ((T - 1) delta_b, 0, .., 0). T in [2, inf); both penalties are 0 for T = 1. A mean over
    all T tokens, as TRM-Avg itself takes it, lets u_1 reach T delta_b: the factor is then 2.
    """
    return 2 - 2 / checked_integer("T", T, 2)


def _from_the_end(limit: Sequence[float], step: Callable[[float, float], float]) -> list[float]:
    limits = _checked_each("limit", limit, 0, 1)
    # A zero of the entries' own type, so that fractions stay fractions.
    return list(itertools.accumulate(reversed(limits[1:]), step, initial=0 * limits[-1]))[::-1]


def _residual(mean_divergence: Sequence[float], suffix: Sequence[float], xi: float) -> float:
    (xi,) = _checked(xi=xi)
    mean = _checked_each("mean_divergence", mean_divergence, 0, 1)
    _check_length("mean_divergence", mean, "limit", suffix)
    return 4 * xi * sum(u * tv for u, tv in zip(mean, suffix, strict=True))


def _checked(**given: float) -> list[float]:
    """Return the numbers given, in their order."""
    return [
        checked_number(name, value, 0, 1 if name == "w_min" else math.inf, low_open=name in ("delta", "w_min", "w_1"))
        for name, value in given.items()
    ]


def _checked_each(name: str, values: object, low: float, high: float, *, low_open: bool = False) -> list[float]:
    if not isinstance(values, Sequence):
        raise TypeError(f"{name}={values!r}: expected a sequence of numbers")
    if not values:
        raise ValueError(f"{name}={values!r}: expected at least one number")
    return [checked_number(f"{name}[{t}]", value, low, high, low_open=low_open) for t, value in enumerate(values)]


def _check_length(name: str, values: Sequence[float], other: str, others: Sequence[float]) -> None:
    if len(values) != len(others):
        raise ValueError(f"{name}: expected as many numbers as in {other}, {len(others)}, got {len(values)}")
