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
LARGEST_DIVERGENCE = 1e15
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
    weight: list[float]  # what multiplies the gate: the ratio or what stands in its place, corrections included
    rejected_by: list[int]
    margin: list[float]
    slack: list[float]  # what float64 sums may lose of a quantity that is compared
    position_weight: list[float] | None = None
    divergence: list[float] | None = None
    weighted_divergence: list[float] | None = None
    prior_account: list[float] | None = None
    threshold: list[float] | None = None
    delta_b: float | None = None
    statistic: list[float] | None = None
    prefix_ratio: list[float] | None = None
    ratio: list[float] | None = None
    correction: list[float] | None = None
    max_divergence: float | None = None
    mean_divergence: float | None = None
    accepted: bool | None = None

    @property
    def coefficient(self) -> list[float]:
        """k_t."""
        return [g * w for g, w in zip(self.gate, self.weight, strict=True)]


@dataclasses.dataclass
class Response:
    """One response as a rule sees it; ``log_ratio`` is 0 where a token cannot be measured."""

    logp: Sequence[float]
    anchor_logp: Sequence[float]
    advantages: Sequence[float]
    measurable: list[bool]
    log_ratio: list[float]
    divergence: Sequence[float] | None
    entropy: Sequence[float] | None
    position_weight: Sequence[float] | None
    fields: dict = dataclasses.field(default_factory=dict)

    @property
    def outward(self) -> list[bool]:
        """A (rho - 1) > 0, read off the signs."""
        pairs = zip(self.advantages, self.log_ratio, strict=True)
        return [(a > 0 and d > 0) or (a < 0 and d < 0) for a, d in pairs]


@dataclasses.dataclass
class Answer:
    """What a rule says: per token a code, the weight in rho's place, and the distance from a tie."""

    rejected: list[int]
    weight: list[float]
    margin: list[float]
    attenuated: list[float] | None = None  # the gate of rejected tokens; None: 0
    slack: list[float] | None = None
    gate: list[float] | None = None  # where every token has one


def _finite(*numbers: float | None) -> bool:
    return all(math.isfinite(x) for x in numbers if x is not None)


def _ratio(log_ratio: float, cap: float | None = None) -> float:
    rho = math.exp(min(log_ratio, MAX_LOG_RATIO))
    return rho if cap is None else min(rho, cap)


def judge(
    name: str,
    knobs: dict,
    logp: Sequence[float],
    rollout_logp: Sequence[float],
    advantages: Sequence[float],
    *,
    divergence: Sequence[float] | None = None,
    rollout_entropy: Sequence[float] | None = None,
    proximal_logp: Sequence[float] | None = None,
    corrections: Sequence[tuple[str, dict]] = (),
    position_weight: Sequence[float] | None = None,
) -> Verdict:
    """Judge one response under the method ``name`` with its ``knobs``.

    ``divergence`` is a measured D_t (overrides the others); ``position_weight`` a given permutation. With
    ``corrections`` the method judges pi against ``proximal_logp``.
    """
    count = len(logp)
    anchor = proximal_logp if corrections else rollout_logp
    columns = [
        logp, anchor, rollout_logp,
        *(c if c is not None else [None] * count for c in (divergence, rollout_entropy)),
    ]  # fmt: skip
    measurable = [
        _finite(p, q, m, d, h, p - q, q - m) if corrections else _finite(p, q, d, h, p - q)
        for p, q, m, d, h in zip(*columns, strict=True)
    ]
    # What is not finite is no advantage, but a policy has drifted all the same.
    usable = [ok and _finite(a) for ok, a in zip(measurable, advantages, strict=True)]
    advantages = [a if _finite(a) else 0.0 for a in advantages]
    log_ratio = [p - q if ok else 0.0 for p, q, ok in zip(logp, anchor, measurable, strict=True)]
    response = Response(logp, anchor, advantages, measurable, log_ratio, divergence, rollout_entropy, position_weight)
    answer = RULES[name](knobs, response)
    rejected, weight, margin = answer.rejected, answer.weight, answer.margin
    gate = answer.gate or [
        1.0 if code == KEPT else soft for code, soft in zip(rejected, answer.attenuated or [0.0] * count, strict=True)
    ]
    if corrections:
        log_mismatch = [q - m if ok else 0.0 for q, m, ok in zip(anchor, rollout_logp, measurable, strict=True)]
        total = [1.0] * count
        for kind, settings in corrections:
            factors, distances = _correct(kind, settings, log_mismatch)
            total = [t * f for t, f in zip(total, factors, strict=True)]
            margin = [min(x, y) for x, y in zip(margin, distances, strict=True)]
            gate = [0.0 if f == 0.0 else g for g, f in zip(gate, factors, strict=True)]
            rejected = [c if c or f else OTHER_RULE for c, f in zip(rejected, factors, strict=True)]
        response.fields["correction"] = total
        weight = [w * t for w, t in zip(weight, total, strict=True)]
    return Verdict(
        gate=[g if ok else 0.0 for g, ok in zip(gate, usable, strict=True)],
        weight=weight,
        rejected_by=[code if ok else OTHER_RULE for code, ok in zip(rejected, usable, strict=True)],
        margin=margin,
        slack=answer.slack or [0.0] * count,
        **response.fields,
    )


# ---------------------------------------------------------------- corrections of the engine mismatch


def _correct(kind: str, settings: dict, log_mismatch: list[float]) -> tuple[list[float], list[float]]:
    """Return W_t of each token and how far it stands from a bound that drops it; BASELINES section 11."""
    count, total = len(log_mismatch), math.fsum(log_mismatch)
    if kind == "geometric_mask":
        mean = _ratio(total / max(count, 1))
        inside = settings["low"] <= mean <= settings["high"]
        gap = min(abs(mean - settings["low"]), abs(mean - settings["high"]))
        return [float(inside)] * count, [gap] * count
    weights = [_ratio(total)] * count if settings["scope"] == "sequence" else [_ratio(b) for b in log_mismatch]
    if kind == "tis":
        return [min(w, settings["cap"]) for w in weights], [math.inf] * count
    assert kind in ("mis", "icepop")
    low, high = settings["low"], settings["high"]
    return (
        [w if low <= w <= high else 0.0 for w in weights],
        [min(abs(w - low), abs(w - high)) / max(1.0, w) for w in weights],
    )


# ---------------------------------------------------------------- regions on a divergence


def k2(logp: float, rollout_logp: float) -> float:
    """(log rho)^2 / 2."""
    return min((logp - rollout_logp) ** 2 / 2, LARGEST_DIVERGENCE)


def k3(logp: float, rollout_logp: float) -> float:
    """rho - 1 - log rho, in 60 digits."""
    with decimal.localcontext(_CONTEXT):
        d = min(decimal.Decimal(logp) - decimal.Decimal(rollout_logp), decimal.Decimal(MAX_LOG_RATIO))
        return min(max(float(d.exp() - 1 - d), 0.0), LARGEST_DIVERGENCE)


def _measured(response: Response, kind: str, given: Sequence[float] | None) -> list[float]:
    if given is not None:
        return [
            min(max(d, 0.0), LARGEST_DIVERGENCE) if ok else 0.0
            for d, ok in zip(given, response.measurable, strict=True)
        ]
    measure = {"binary_tv": binary_tv, "binary_kl": binary_kl, "k2": k2, "k3": k3}[kind]
    rows = zip(response.logp, response.anchor_logp, response.measurable, strict=True)
    return [measure(p, m) if ok else 0.0 for p, m, ok in rows]


def _only_outward(answer: Answer, response: Response) -> Answer:
    """Keep every token that moves back, or does not move: its decision hangs on no threshold."""
    pairs = list(zip(answer.rejected, answer.margin, response.outward, strict=True))
    answer.rejected = [code if out else KEPT for code, _, out in pairs]
    answer.margin = [gap if out else math.inf for _, gap, out in pairs]
    return answer


def _cppo(knobs: dict, response: Response) -> Answer:
    delta, length, fields = knobs["delta"], len(response.logp), response.fields
    measured = _measured(response, knobs["divergence"], response.divergence)
    if response.position_weight is not None:
        w = list(response.position_weight)
    elif knobs["position"] == "uniform":
        w = [1.0] * length
    else:
        w = position_weights(length, knobs["w_min"])
    z = [w_t * d for w_t, d in zip(w, measured, strict=True)]
    fields |= {"divergence": measured, "position_weight": w, "weighted_divergence": z}
    weight = [_ratio(d, knobs["ratio_cap"]) for d in response.log_ratio]

    def g(x: float) -> float:
        if knobs["gate"] == "hard" or x <= 1:
            return 0.0
        return 1 / x if knobs["gate"] == "soft" else 2 / (1 + math.exp(min(2 * (x - 1), 700.0)))

    if knobs["budget"] == "none":
        fields["threshold"] = [delta] * length
        rejected = [TOKEN_THRESHOLD if z_t > delta else KEPT for z_t in z]
        answer = Answer(rejected, weight, [abs(z_t - delta) for z_t in z], [g(z_t / delta) for z_t in z])
        return _only_outward(answer, response)
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
        rejected.append(KEPT if z_t <= c else TOKEN_THRESHOLD if z_t > delta else PREFIX_BUDGET)
        attenuated.append(g(max(z_t / delta, s_t / allowance)))
        # The cause hangs on Z against delta as well.
        margin.append(min(abs(z_t - c), abs(z_t - delta)))
    answer = Answer(rejected, weight, margin, attenuated, [1e-12 * (1 + s) for s in prior_s])
    return _only_outward(answer, response)


def _thresholds(knobs: dict, response: Response, limits: list[float]) -> Answer:
    measured = _measured(response, knobs["divergence"], response.divergence)
    response.fields |= {"divergence": measured, "threshold": limits}
    rejected = [TOKEN_THRESHOLD if d > limit else KEPT for d, limit in zip(measured, limits, strict=True)]
    weight = [_ratio(d, knobs["ratio_cap"]) for d in response.log_ratio]
    return Answer(rejected, weight, [abs(d - limit) for d, limit in zip(measured, limits, strict=True)])


def _dppo(knobs: dict, response: Response) -> Answer:
    low = knobs["delta"] if knobs["delta_low"] is None else knobs["delta_low"]
    limits = [low if a < 0 else knobs["delta"] for a in response.advantages]
    return _only_outward(_thresholds(knobs, response, limits), response)


def _ipo(knobs: dict, response: Response) -> Answer:
    return _thresholds(knobs, response, [knobs["delta"]] * len(response.logp))


def _drpo(knobs: dict, response: Response) -> Answer:
    # d/d rho of -A rho + |A| mu (rho - 1)^2 / (2 delta), times rho, over -A.
    response.fields["divergence"] = _measured(response, "binary_tv", None)
    weight = []
    for p, m, a, d in zip(response.logp, response.anchor_logp, response.advantages, response.log_ratio, strict=True):
        pull = 0.0 if a == 0 or d == 0 else math.copysign(1.0, a) * (math.exp(min(p, 0)) - math.exp(min(m, 0)))
        weight.append(_ratio(d) * (1 - pull / knobs["delta"]))
    return Answer([KEPT] * len(weight), weight, [math.inf] * len(weight))


def _trm(knobs: dict, response: Response) -> Answer:
    count = len(response.logp)
    measured = _measured(response, knobs["divergence"], response.divergence)
    response.fields["divergence"] = measured
    accepted, gap, total = True, math.inf, 0.0
    if knobs["max_threshold"] is not None:
        largest = max(measured, default=0.0)
        response.fields["max_divergence"] = largest
        accepted = accepted and largest <= knobs["max_threshold"]
        gap = min(gap, abs(largest - knobs["max_threshold"]))
    if knobs["avg_threshold"] is not None:
        other = knobs["avg_divergence"]
        averaged = measured if other is None else _measured(response, other, None)
        total = math.fsum(averaged)
        mean = total / max(count, 1)
        response.fields["mean_divergence"] = mean
        accepted = accepted and mean <= knobs["avg_threshold"]
        gap = min(gap, abs(mean - knobs["avg_threshold"]))
    response.fields["accepted"] = accepted
    return Answer(
        [KEPT if accepted else OTHER_RULE] * count,
        [_ratio(d) for d in response.log_ratio],
        [gap] * count,
        slack=[1e-13 * (1 + total)] * count,
    )


def _estr(knobs: dict, response: Response) -> Answer:
    pairs = zip(response.log_ratio, response.entropy, response.measurable, strict=True)
    s = [min(d * d / (max(h, 0.0) + knobs["epsilon"]), LARGEST_DIVERGENCE) if ok else 0.0 for d, h, ok in pairs]
    response.fields |= {"statistic": s, "threshold": [knobs["tau"]] * len(s)}
    clipped, gaps = _clip(response.log_ratio, response.advantages, knobs["clip_low"], knobs["clip_high"])
    return Answer(
        [OTHER_RULE if s_t > knobs["tau"] or c else KEPT for s_t, c in zip(s, clipped, strict=True)],
        [_ratio(d) for d in response.log_ratio],
        [min(abs(s_t - knobs["tau"]) / max(1.0, s_t), gap) for s_t, gap in zip(s, gaps, strict=True)],
    )


# ---------------------------------------------------------------- regions on a ratio


def _clip(
    log_ratio: Sequence[float], advantages: Sequence[float], low: float | None, high: float | None
) -> tuple[list[bool], list[float]]:
    """Return where min(r A, clip(r, 1 - low, 1 + high) A) has no gradient, and how far each r is from a bound."""
    clipped, gaps = [], []
    for d, a in zip(log_ratio, advantages, strict=True):
        r = math.exp(min(d, 700.0))
        top = math.inf if high is None else 1 + high
        bottom = -math.inf if low is None else 1 - low
        clipped.append((a > 0 and r > top) or (a < 0 and r < bottom))
        gaps.append(min(abs(r - top), abs(r - bottom)))
    return clipped, gaps


def _clipped_answer(clipped: list[bool], weight: list[float], gaps: list[float]) -> Answer:
    return Answer([OTHER_RULE if c else KEPT for c in clipped], weight, gaps)


def _grpo(knobs: dict, response: Response) -> Answer:
    clipped, gaps = _clip(response.log_ratio, response.advantages, knobs["clip_low"], knobs["clip_high"])
    if knobs["dual_clip"] is not None:
        ratios = [math.exp(min(d, 700.0)) for d in response.log_ratio]
        clipped = [
            c or (a < 0 and r > knobs["dual_clip"])
            for c, a, r in zip(clipped, response.advantages, ratios, strict=True)
        ]
        gaps = [min(gap, abs(r - knobs["dual_clip"])) for gap, r in zip(gaps, ratios, strict=True)]
    return _clipped_answer(clipped, [_ratio(d) for d in response.log_ratio], gaps)


def _unmasked(weight: list[float]) -> Answer:
    return Answer([KEPT] * len(weight), weight, [math.inf] * len(weight))


def _cispo(knobs: dict, response: Response) -> Answer:
    return _unmasked([max(_ratio(d, knobs["cap"]), knobs["floor"]) for d in response.log_ratio])


def _minpro(knobs: dict, response: Response) -> Answer:
    log_b, log_r = [], []
    for t, d in enumerate(response.log_ratio):
        earlier = [response.log_ratio[j] for j in range(t) if response.measurable[j]]
        smallest = min(earlier) if earlier else 0.0
        log_b.append(min(smallest, 0.0) if knobs["cap_prefix_at_one"] else smallest)
        log_r.append(log_b[-1] + d)
    clipped, gaps = _clip(log_r, response.advantages, knobs["clip_low"], knobs["clip_high"])
    weight = [_ratio(r, knobs["ratio_cap"]) for r in log_r]
    response.fields |= {"prefix_ratio": [_ratio(b) for b in log_b], "ratio": weight}
    return _clipped_answer(clipped, weight, gaps)


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / max(len(numbers), 1)


def _gspo(knobs: dict, response: Response) -> Answer:
    mean, count = _mean(response.log_ratio), len(response.logp)
    clipped, gaps = _clip([mean] * count, response.advantages, knobs["clip_low"], knobs["clip_high"])
    weight = [_ratio(mean)] * count
    response.fields["ratio"] = weight
    return _clipped_answer(clipped, weight, gaps)


def _sapo(knobs: dict, response: Response) -> Answer:
    # d/d rho of (4 / tau) sigmoid(tau (rho - 1)) = sech^2(tau (rho - 1) / 2)
    gates = []
    for d, a in zip(response.log_ratio, response.advantages, strict=True):
        x = (knobs["tau_pos"] if a > 0 else knobs["tau_neg"]) * (math.exp(min(d, MAX_LOG_RATIO)) - 1)
        gates.append(1 / math.cosh(min(abs(x) / 2, 350.0)) ** 2)
    answer = _unmasked([_ratio(d) for d in response.log_ratio])
    answer.gate = gates
    return answer


def _gmpo(knobs: dict, response: Response) -> Answer:
    low, high = -knobs["log_clip_low"], knobs["log_clip_high"]
    clipped_ratios, clipped, gaps = [], [], []
    for d, a in zip(response.log_ratio, response.advantages, strict=True):
        bounded = min(max(d, low), high)
        c = min(d, bounded) if a > 0 else max(d, bounded) if a < 0 else d
        clipped_ratios.append(c)
        clipped.append(c != d)
        gaps.append(min(abs(d - low), abs(d - high)))
    weight = [_ratio(_mean(clipped_ratios))] * len(clipped)
    response.fields["ratio"] = weight
    return _clipped_answer(clipped, weight, gaps)


def _prefix_sums(numbers: Sequence[float]) -> list[float]:
    return [math.fsum(numbers[: t + 1]) for t in range(len(numbers))]


def _pnpo(knobs: dict, response: Response) -> Answer:
    sums = _prefix_sums(response.log_ratio)
    weight = [_ratio(s / (t + 1), knobs["ratio_cap"]) for t, s in enumerate(sums)]
    response.fields["ratio"] = weight
    return _unmasked(weight)


def _ctpo(knobs: dict, response: Response) -> Answer:
    sums = _prefix_sums(response.log_ratio)
    widths = [knobs["epsilon"] * math.sqrt(t + 1) for t in range(len(sums))]
    rows = list(zip(sums, widths, response.advantages, strict=True))
    clipped = [(a > 0 and s > width) or (a < 0 and s < -width) for s, width, a in rows]
    weight = [_ratio(s, knobs["ratio_cap"]) for s in sums]
    response.fields |= {"ratio": weight, "threshold": widths}
    answer = _clipped_answer(clipped, weight, [min(abs(s - width), abs(s + width)) for s, width, _ in rows])
    answer.slack = [1e-14 * math.fsum(map(abs, response.log_ratio[: t + 1])) for t in range(len(sums))]
    return answer


def _policy_gradient(knobs: dict, response: Response) -> Answer:
    return _unmasked([_ratio(d, knobs["ratio_cap"]) for d in response.log_ratio])


RULES = {
    "cppo": _cppo,
    "dppo": _dppo,
    "ipo": _ipo,
    "drpo": _drpo,
    "trm_max": _trm,
    "trm_avg": _trm,
    "trm": _trm,
    "estr": _estr,
    "grpo": _grpo,
    "cispo": _cispo,
    "minpro": _minpro,
    "gspo": _gspo,
    "sapo": _sapo,
    "gmpo": _gmpo,
    "pnpo": _pnpo,
    "ctpo": _ctpo,
    "policy_gradient": _policy_gradient,
}


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
