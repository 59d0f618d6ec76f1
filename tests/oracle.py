"""The core's oracle: METHOD.md and BASELINES.md in plain Python, one response at a time. Imports no torch, no cppo.

Formulas stand as printed, however slow or unstable: running sums are recomputed from the start with ``math.fsum``,
divergences are sums over an explicit partition, KL is taken in 60 decimal digits.
"""

from __future__ import annotations

import dataclasses
import decimal
import math
from collections.abc import Sequence
from fractions import Fraction

LOG_TINY = math.log(2.2250738585072014e-308)
MAX_LOG_RATIO = 20.0
NEARLY_ONE = -1e-12  # log p where p rounds to 1 (BASELINES 5.6, float64)
KEPT, TOKEN_THRESHOLD, PREFIX_BUDGET, OTHER_RULE = 0, 1, 2, 3

_CONTEXT = decimal.Context(prec=60)

# ---------------------------------------------------------------- divergences


def binary_tv(logp: float, rollout_logp: float) -> float:
    """|pi(y) - mu(y)|; a log-prob above 0 counts as 0."""
    return abs(math.exp(min(logp, 0.0)) - math.exp(min(rollout_logp, 0.0)))


def binary_kl(logp: float, rollout_logp: float) -> float:
    """m log(m / p) + (1 - m) log((1 - m) / (1 - p)) in 60 digits, with the stated floors on both log-probs."""
    log_p, log_m = (decimal.Decimal(min(max(x, LOG_TINY), 0.0)) for x in (logp, rollout_logp))
    with decimal.localcontext(_CONTEXT):
        p, m = log_p.exp(), log_m.exp()
        rest_p = 1 - min(log_p, decimal.Decimal(NEARLY_ONE)).exp()
        rest_m = 1 - m
        total = m * (log_m - log_p)
        if rest_m > 0:
            total += rest_m * (rest_m / rest_p).ln()
        assert p >= 0
        return max(float(total), 0.0)


def binary_cells(vocabulary: int, sampled: int) -> list[list[int]]:
    """The partition {y}, everything else."""
    return [[sampled], [a for a in range(vocabulary) if a != sampled]]


def topk_cells(mu: Sequence[float], sampled: int, k: int) -> list[list[int]]:
    """Singletons for mu's k likeliest and the sampled token, and one cell for the rest."""
    likeliest = sorted(range(len(mu)), key=lambda a: -mu[a])[:k]
    support = likeliest + ([] if sampled in likeliest else [sampled])
    return [[a] for a in support] + [[a for a in range(len(mu)) if a not in support]]


def exact_cells(vocabulary: int) -> list[list[int]]:
    """Every token its own cell."""
    return [[a] for a in range(vocabulary)]


def tv_on(cells: list[list[int]], mu: Sequence[float], pi: Sequence[float]) -> float:
    """Half the sum over cells of |pi(cell) - mu(cell)|."""
    return math.fsum(abs(math.fsum(pi[a] for a in cell) - math.fsum(mu[a] for a in cell)) for cell in cells) / 2


def kl_on(cells: list[list[int]], mu: Sequence[float], pi: Sequence[float]) -> float:
    """Sum over cells of mu(cell) log(mu(cell) / pi(cell)), in 60 digits; cells without mu-mass add nothing."""
    with decimal.localcontext(_CONTEXT):
        total = decimal.Decimal(0)
        for cell in cells:
            m = sum((decimal.Decimal(mu[a]) for a in cell), decimal.Decimal(0))
            p = sum((decimal.Decimal(pi[a]) for a in cell), decimal.Decimal(0))
            if m > 0:
                total += m * (m / p).ln()
        return float(total)


# ---------------------------------------------------------------- weights, budget, account


def position_weights(length: int, w_min: float) -> list[float]:
    """w_t = 1 - (1 - w_min) (t - 1) / (T - 1), t = 1..T; T = 1: w_1 = 1."""
    if length == 1:
        return [1.0]
    return [1.0 - (1.0 - w_min) * (t - 1) / (length - 1) for t in range(1, length + 1)]


def percentile(values: Sequence[float], percent: int) -> float:
    """Linear interpolation between the two order statistics around rank percent (n - 1) / 100, counted from 0."""
    ordered = sorted(values)
    rank = Fraction(percent * (len(ordered) - 1), 100)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + float(rank - low) * (ordered[high] - ordered[low])


def adaptive_budget(divergence: Sequence[float], b_min: float) -> float:
    """delta_b = clamp(P90(D_1..D_T), b_min, 2 b_min)."""
    return min(max(percentile(divergence, 90), b_min), 2 * b_min) if divergence else b_min


def prior_sums(values: Sequence[float]) -> list[float]:
    """The sum of all values before each, from scratch every time."""
    return [math.fsum(values[:t]) for t in range(len(values))]


def prior_accounts(weights: Sequence[float], spent: Sequence[float], delta_b: float) -> list[float]:
    """U_{t-1} for each t: deposit delta_b w_t, spend Z_t, from U_0 = 0."""
    balance, balances = 0.0, []
    for w, z in zip(weights, spent, strict=True):
        balances.append(balance)
        balance += delta_b * w - z
    return balances


# ---------------------------------------------------------------- the verdict on one response


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the formulas say of one response. ``margin`` is how far each token's decision stands from a tie."""

    gate: list[float]
    coefficient: list[float]
    rejected_by: list[int]
    margin: list[float]
    position_weight: list[float] | None = None
    divergence: list[float] | None = None
    weighted_divergence: list[float] | None = None
    prior_account: list[float] | None = None
    threshold: list[float] | None = None
    delta_b: float | None = None


def _usable(*numbers: float | None) -> bool:
    return all(math.isfinite(x) for x in numbers if x is not None)


def _outward(advantage: float, log_ratio: float) -> bool:
    """A (rho - 1) > 0, read off the signs."""
    return (advantage > 0 and log_ratio > 0) or (advantage < 0 and log_ratio < 0)


def _ratio(log_ratio: float, cap: float | None) -> float:
    rho = math.exp(min(log_ratio, MAX_LOG_RATIO))
    return rho if cap is None else min(rho, cap)


def judge(
    name: str,
    knobs: dict,
    logp: Sequence[float],
    rollout_logp: Sequence[float],
    advantages: Sequence[float],
    divergence: Sequence[float] | None = None,
    position_weight: Sequence[float] | None = None,
) -> Verdict:
    """Judge one response under the method ``name`` with its ``knobs``.

    ``divergence`` is a measured D_t (overrides the binary ones); ``position_weight`` a given permutation.
    """
    given = divergence if divergence is not None else [None] * len(logp)
    usable = [_usable(p, m, p - m, a, d) for p, m, a, d in zip(logp, rollout_logp, advantages, given, strict=True)]
    log_ratio = [p - m if ok else 0.0 for p, m, ok in zip(logp, rollout_logp, usable, strict=True)]
    outward = [ok and _outward(a, d) for a, d, ok in zip(advantages, log_ratio, usable, strict=True)]
    fields: dict = {}
    if name in ("cppo", "dppo"):
        if divergence is None:
            measure = {"binary_tv": binary_tv, "binary_kl": binary_kl}[knobs["divergence"]]
            measured = [measure(p, m) if ok else 0.0 for p, m, ok in zip(logp, rollout_logp, usable, strict=True)]
        else:
            measured = [max(d, 0.0) if ok else 0.0 for d, ok in zip(divergence, usable, strict=True)]
        fields["divergence"] = measured
        rule = _cppo if name == "cppo" else _dppo
        rejected, attenuated, margin = rule(knobs, measured, position_weight, fields)
    elif name == "grpo":
        rejected, margin = _grpo(knobs, log_ratio, advantages)
        attenuated = [0.0] * len(logp)
    else:
        assert name == "policy_gradient"
        rejected, attenuated, margin = [KEPT] * len(logp), [0.0] * len(logp), [math.inf] * len(logp)
    if name in ("cppo", "dppo"):
        rejected = [code if out else KEPT for code, out in zip(rejected, outward, strict=True)]
        margin = [distance if out else math.inf for distance, out in zip(margin, outward, strict=True)]
    rejected = [code if ok else OTHER_RULE for code, ok in zip(rejected, usable, strict=True)]
    gate = [
        0.0 if not ok else 1.0 if code == KEPT else soft
        for code, soft, ok in zip(rejected, attenuated, usable, strict=True)
    ]
    cap = knobs.get("ratio_cap")
    return Verdict(
        gate=gate,
        coefficient=[g * _ratio(d, cap) for g, d in zip(gate, log_ratio, strict=True)],
        rejected_by=rejected,
        margin=margin,
        **fields,
    )


def _cppo(
    knobs: dict, measured: list[float], position_weight: Sequence[float] | None, fields: dict
) -> tuple[list[int], list[float], list[float]]:
    delta, length = knobs["delta"], len(measured)
    if position_weight is not None:
        w = list(position_weight)
    elif knobs["position"] == "uniform":
        w = [1.0] * length
    else:
        w = position_weights(length, knobs["w_min"])
    z = [w_t * d for w_t, d in zip(w, measured, strict=True)]
    fields |= {"position_weight": w, "weighted_divergence": z}
    soft = knobs["gate"] == "soft"
    if knobs["budget"] == "none":
        fields["threshold"] = [delta] * length
        rejected = [TOKEN_THRESHOLD if z_t > delta else KEPT for z_t in z]
        attenuated = [delta / z_t if soft and z_t > delta else 0.0 for z_t in z]
        return rejected, attenuated, [abs(z_t - delta) for z_t in z]
    delta_b = adaptive_budget(measured, knobs["delta_b"]) if knobs["budget"] == "adaptive" else knobs["delta_b"]
    # The account, and the paper's S and W apart from it: two computations of one threshold.
    prior_u, prior_w, prior_s = prior_accounts(w, z, delta_b), prior_sums(w), prior_sums(z)
    threshold = [min(delta, delta + delta_b * w_before - s) for w_before, s in zip(prior_w, prior_s, strict=True)]
    for u, c, s in zip(prior_u, threshold, prior_s, strict=True):
        assert math.isclose(min(delta, delta + u), c, rel_tol=1e-12, abs_tol=1e-12 * (1.0 + s)), (u, c, s)
    fields |= {"prior_account": prior_u, "threshold": threshold, "delta_b": delta_b}
    rejected, attenuated, margin = [], [], []
    for z_t, c, w_before, s_before in zip(z, threshold, prior_w, prior_s, strict=True):
        s_t, allowance = s_before + z_t, delta + delta_b * w_before
        code = KEPT if z_t <= c else TOKEN_THRESHOLD if z_t > delta else PREFIX_BUDGET
        x = max(z_t / delta, s_t / allowance)
        rejected.append(code)
        attenuated.append(min(1.0, 1.0 / x) if soft and x > 0 else 0.0)
        # The cause hangs on Z against delta as well.
        margin.append(min(abs(z_t - c), abs(z_t - delta)))
    return rejected, attenuated, margin


def _dppo(
    knobs: dict, measured: list[float], position_weight: Sequence[float] | None, fields: dict
) -> tuple[list[int], list[float], list[float]]:
    assert position_weight is None
    delta = knobs["delta"]
    fields["threshold"] = [delta] * len(measured)
    rejected = [TOKEN_THRESHOLD if d > delta else KEPT for d in measured]
    return rejected, [0.0] * len(measured), [abs(d - delta) for d in measured]


def _grpo(knobs: dict, log_ratio: list[float], advantages: Sequence[float]) -> tuple[list[int], list[float]]:
    rejected, margin = [], []
    for d, a in zip(log_ratio, advantages, strict=True):
        rho = math.exp(min(d, 700.0))
        too_high = a > 0 and rho > 1 + knobs["clip_high"]
        too_low = a < 0 and rho < 1 - knobs["clip_low"]
        rejected.append(OTHER_RULE if too_high or too_low else KEPT)
        margin.append(min(abs(rho - 1 - knobs["clip_high"]), abs(rho - 1 + knobs["clip_low"])))
    return rejected, margin


# ---------------------------------------------------------------- the gradient


def gradients(
    coefficients: Sequence[Sequence[float]],
    advantages: Sequence[Sequence[float]],
    reduction: str,
    denominator: float | None = None,
    fixed_length: int | None = None,
) -> list[list[float]]:
    """d loss / d logp_t = -k_t A_t / denominator of each token of each response.

    token-mean: the number of tokens; sequence-mean: non-empty responses times the response's own length;
    fixed-length: non-empty responses times ``fixed_length``. ``denominator`` replaces the batch's count.
    """
    tokens = sum(len(k) for k in coefficients)
    sequences = sum(1 for k in coefficients if len(k))
    result = []
    for k, a in zip(coefficients, advantages, strict=True):
        if reduction == "token-mean":
            divisor = denominator if denominator is not None else max(tokens, 1)
        else:
            own = len(k) if reduction == "sequence-mean" else fixed_length
            divisor = (denominator if denominator is not None else max(sequences, 1)) * own
        # A token that is not usable has k = 0, whatever its advantage.
        result.append([-k_t * a_t / divisor if k_t else 0.0 for k_t, a_t in zip(k, a, strict=True)])
    return result
