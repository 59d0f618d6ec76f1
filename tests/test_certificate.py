"""The certificate of a batch: against plain Python, in every layout, in parts, and against enumerated expectations."""

import itertools
import math
import types

import pytest
import torch
from examples import broken_batch, drifting_batch
from layouts import INF, NAN, Response, every_layout, packed, padded

import cppo
from cppo import theory
from cppo.certificate import bound_tally, certificate

XI = 0.75
METHODS = [
    cppo.CPPO(budget="fixed"),
    cppo.CPPO(budget="adaptive", divergence="exact_tv", delta_b=0.05),
    cppo.CPPO(budget="none", position="uniform"),
    cppo.CPPO(divergence="binary_kl"),
    cppo.DPPO(),
    cppo.DPPO(divergence="topk_tv"),
    cppo.GRPO(),
    cppo.PolicyGradient(),
]


def rewards_of(responses):
    return [math.sin(3 * i) for i in range(len(responses))]


def finite(*values):
    return all(map(math.isfinite, values))


def expected(responses, method, rewards=None, judged=None):
    """Every value in plain floats; ``judged`` holds (Z_t, c_t) of each response where the method has them."""
    kept = [(r, R) for r, R in zip(responses, rewards or [0.0] * len(responses), strict=True) if len(r)]
    n, T = max(1, len(kept)), max((len(r) for r, _ in kept), default=0)
    own = getattr(method, "divergence", "binary_tv") in ("topk_tv", "exact_tv")
    sums, limit = [0.0] * max(T, 2), [0.0] * max(T, 2)
    pathwise = surrogate = improvement = 0.0
    for r, R in kept:
        # A token that pi cannot write has the ratio 0; what is no log-prob has the ratio 1.
        known = [math.isfinite(m) and p < INF for p, m in zip(r.logp, r.rollout_logp, strict=True)]
        log_ratio = [max(p - m, -1e4) if k else 0.0 for p, m, k in zip(r.logp, r.rollout_logp, known, strict=True)]
        rho = [math.exp(min(x, 20.0)) for x in log_ratio]
        for t in range(len(r)):
            D = abs(math.exp(r.logp[t]) - math.exp(r.rollout_logp[t])) if known[t] else 0.0
            if own:
                D = r.divergence[t] if known[t] and finite(r.divergence[t]) else 0.0
            D = min(max(D, 0.0), 1.0)
            sums[t] += D
            limit[t] = max(limit[t], D)
        pathwise += theory.residual_bound_pathwise(rho, xi=XI)
        surrogate += R * sum(x - 1 for x in rho)
        improvement += R * (math.exp(min(sum(log_ratio), 20.0)) - 1)
    u, lbar = [s / n for s in sums], max(limit[1:])
    product = theory.residual_bound_product(u, limit, xi=XI)
    values = {
        "bound/horizon": T,
        "bound/drift": sum(u),
        "bound/largest_limit": lbar,
        "bound/residual_product": product,
        "bound/residual_union": theory.residual_bound(u, limit, xi=XI),
        "bound/residual_uniform": theory.residual_bound_uniform(u[: max(T, 1)], xi=XI, lbar=lbar),
        "bound/residual_pathwise": pathwise / n,
    }
    if judged is not None:
        pairs = [pair for response in judged for pair in response]
        values["bound/within_fraction"] = sum(spent <= limit for spent, limit in pairs) / max(1, len(pairs))
    if rewards is not None:
        values["bound/surrogate"] = surrogate / n
        values["bound/residual_sampled"] = (surrogate - improvement) / n
        values["bound/improvement_product"] = surrogate / n - product
        values["bound/improvement_pathwise"] = (surrogate - pathwise) / n
    return values


def judged_by(batch, method, responses):
    """(Z_t, c_t) as the decision's trace has them, of the tokens that it could measure, where Z is of a TV."""
    trace = batch.decide(method).trace
    if trace.weighted_divergence is None or not method.divergence.endswith("_tv"):
        return None
    columns = (batch.per_response(v) for v in (trace.weighted_divergence, trace.threshold))
    exact = method.divergence == "exact_tv"
    return [
        [
            pair
            for pair, p, m, D in zip(zip(Z, c, strict=True), r.logp, r.rollout_logp, r.divergence, strict=True)
            if finite(p, m) and (not exact or math.isfinite(D))
        ]
        for Z, c, r in zip(*columns, responses, strict=True)
    ]


def found(batch, method, rewards=None):
    reward = None if rewards is None else torch.tensor(rewards, dtype=torch.float64)
    values = certificate(batch.decide(method), xi=XI, reward=reward)
    assert all(value.dim() == 0 and value.dtype == torch.float64 for value in values.values())
    return {name: value.item() for name, value in values.items()}


def same(values, wanted, rel=1e-11):
    assert values.keys() == wanted.keys()
    for name, value in wanted.items():
        assert values[name] == pytest.approx(value, rel=rel, abs=1e-13), name


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("make", [drifting_batch, broken_batch], ids=["whole", "broken"])
def test_every_value_is_the_formula_in_every_layout(method, make):
    responses = make(seed=60)
    for rewards in (None, rewards_of(responses)):
        for name, batch in every_layout(responses).items():
            wanted = expected(responses, method, rewards, judged_by(batch, method, responses))
            values = found(batch, method, rewards)
            same(values, wanted)
            assert values["bound/horizon"] == 40, name
            assert ("bound/within_fraction" in values) == (
                isinstance(method, cppo.CPPO) and method.divergence != "binary_kl"
            )


def test_one_response_by_hand():
    ln = math.log
    batch = padded([Response((ln(0.6), ln(0.1), ln(0.5)), (ln(0.4), ln(0.2), ln(0.4)), (1.0,) * 3)])
    values = found(batch, cppo.CPPO(delta=0.15, delta_b=0.02, budget="fixed", w_min=0.5), [0.5])
    # D = 0.2, 0.1, 0.1; rho = 1.5, 0.5, 1.25
    same(
        values,
        {
            "bound/horizon": 3,
            "bound/drift": 0.4,
            "bound/largest_limit": 0.1,
            "bound/residual_product": 4 * XI * (0.2 * 0.19 + 0.1 * 0.1),
            "bound/residual_union": 4 * XI * (0.2 * 0.2 + 0.1 * 0.1),
            "bound/residual_uniform": 4 * XI * 0.1 * (2 * 0.2 + 1 * 0.1),
            "bound/residual_pathwise": XI * (0.5 * 0.5 + 0.5 * 0.25 + 0.5 * 0.25),
            "bound/within_fraction": 0.0,  # Z = 0.2, 0.075, 0.05; c = 0.15, -0.03, -0.09
            "bound/surrogate": 0.5 * 0.25,
            "bound/residual_sampled": 0.5 * (0.25 - (0.9375 - 1)),
            "bound/improvement_product": 0.125 - 4 * XI * 0.048,
            "bound/improvement_pathwise": 0.125 - XI * 0.5,
        },
    )
    loose = found(batch, cppo.CPPO(delta=0.15, delta_b=0.2, budget="fixed", w_min=0.5))
    assert loose["bound/within_fraction"] == pytest.approx(2 / 3)  # c = 0.15, 0.15, 0.15
    # A tie is within: Z = c exactly.
    exact = padded([Response((-1.0, -1.0), (-1.0, -1.0), (1.0,) * 2, (0.25, 0.0))])
    assert found(exact, cppo.CPPO(delta=0.25, divergence="exact_tv"))["bound/within_fraction"] == 1.0


@pytest.mark.parametrize("method", METHODS[::3], ids=repr)
def test_parts_of_a_batch_add_up(method):
    responses = drifting_batch(seed=61)
    rewards = rewards_of(responses)
    whole = found(padded(responses), method, rewards)

    def part(chosen, layout, **options):
        reward = torch.tensor(rewards[chosen], dtype=torch.float64)
        return bound_tally(layout(responses[chosen], **options).decide(method), reward=reward)

    parts = [
        part(slice(0, 1), padded), part(slice(1, 2), packed), part(slice(2, 6), packed, extra=1),
        part(slice(6, None), padded, side="left", extra=2),
    ]  # fmt: skip
    for order in (parts, parts[::-1]):
        total = order[0] + order[1] + order[2] + order[3]
        same({name: value.item() for name, value in total.metrics(xi=XI).items()}, whole)


def test_parts_that_count_different_things_do_not_add_up():
    batch = padded(drifting_batch(seed=62))
    plain, rewarded = batch.decide(cppo.CPPO()), torch.zeros(9)
    with pytest.raises(ValueError, match="all with rewards or none"):
        bound_tally(plain) + bound_tally(plain, reward=rewarded)
    for other in (cppo.GRPO(), cppo.CPPO(divergence="binary_kl"), cppo.CPPO(delta=0.2)):
        with pytest.raises(ValueError, match="of one method"):
            bound_tally(plain) + bound_tally(batch.decide(other))


@pytest.mark.parametrize("empty", [[], [Response(*[()] * 6)] * 2, [Response((-1.0,), (-2.0,), (1.0,))]])
def test_nothing_to_bound_gives_zeros_and_one_token_no_residual(empty):
    for extra in (0, 2):
        for batch in (padded(empty, extra=extra, garbage=NAN), packed(empty)):
            values = found(batch, cppo.CPPO(), [1.0] * len(empty))
            one = bool(empty) and len(empty[0]) == 1
            assert values.pop("bound/horizon") == one
            assert values.pop("bound/drift") == pytest.approx(one * (math.exp(-1) - math.exp(-2)), rel=1e-6)
            assert values.pop("bound/within_fraction") in (0.0, 1.0)
            rest = one * (math.e - 1)
            for name, value in values.items():
                promised = name in ("bound/surrogate", "bound/improvement_product", "bound/improvement_pathwise")
                assert value == pytest.approx(rest if promised else 0.0, abs=1e-12), name


def test_a_part_without_responses_changes_nothing_nor_does_its_reward():
    responses = [Response(*[()] * 6), *drifting_batch(seed=63, lengths=(4, 6))]
    batch = padded(responses, garbage=INF, extra=1)
    assert found(batch, cppo.CPPO(), [NAN, 0.5, -1.0]) == found(
        padded(responses[1:], extra=1), cppo.CPPO(), [0.5, -1.0]
    )


def test_limits_of_one_and_ratios_beyond_any_float():
    # The exact TV is 1 at both later tokens, twice as much as allowed at another; the log-ratio is 900.
    wild = Response((0.0, -1.0, -1.0), (-900.0, -1.0, -1.0), (1.0,) * 3, (0.5, 1.0, 2.0))
    values = found(padded([wild]), cppo.DPPO(divergence="exact_tv"), [1.0])
    assert values["bound/largest_limit"] == 1.0
    assert values["bound/residual_product"] == pytest.approx(4 * XI * 1.5)
    assert values["bound/residual_union"] == pytest.approx(4 * XI * (0.5 * 2 + 1.0 * 1))
    assert values["bound/surrogate"] == pytest.approx(math.exp(20) - 1)
    assert all(map(math.isfinite, values.values()))


def test_a_token_that_the_policy_cannot_write_is_the_largest_drift_not_none():
    half = math.log(0.5)
    gone = Response((-INF,) * 3, (half,) * 3, (1.0,) * 3, (0.6, 0.7, NAN))
    rest = drifting_batch(seed=66, lengths=(4, 6))
    for batch in (padded([gone, *rest]), packed([gone, *rest])):
        whole = found(batch, cppo.CPPO(), [1.0, 0.0, 0.0])
        assert all(map(math.isfinite, whole.values()))
    alone = found(padded([gone]), cppo.CPPO(), [1.0])
    assert alone["bound/residual_pathwise"] == XI * 3 == theory.residual_bound_pathwise([0, 0, 0], xi=XI)
    assert alone["bound/drift"] == pytest.approx(1.5)
    assert (alone["bound/surrogate"], alone["bound/residual_sampled"]) == (-3.0, -2.0)
    assert alone["bound/within_fraction"] == 0.0  # nothing that the rule could measure
    assert found(padded([gone]), cppo.DPPO(divergence="exact_tv"))["bound/drift"] == pytest.approx(1.3)
    # As far as a float goes: the same.
    close = Response((-700.0,) * 3, (half,) * 3, (1.0,) * 3)
    for name, value in found(padded([close]), cppo.CPPO(), [1.0]).items():
        assert alone[name] == pytest.approx(value), name


def test_what_is_no_log_prob_is_neither_within_nor_outside():
    broken = Response((-1.0, NAN, -1.0), (-1.0, -1.0, -INF), (1.0,) * 3)
    values = found(padded([broken]), cppo.CPPO(), [1.0])
    assert values.pop("bound/within_fraction") == 1.0  # one of one
    assert values.pop("bound/horizon") == 3
    assert set(values.values()) == {0.0}


def test_small_drifts_keep_their_digits():
    tiny = 3 * 2.0**-53  # -1 + tiny is a float64; exp(tiny) is not: exp(tiny) - 1 is a third too large
    values = found(padded([Response((-1.0 + tiny,) * 3, (-1.0,) * 3, (1.0,) * 3)]), cppo.CPPO(), [1.0])
    assert values["bound/residual_pathwise"] == pytest.approx(XI * 3 * tiny**2, rel=1e-6, abs=0)
    assert values["bound/surrogate"] == pytest.approx(3 * tiny, rel=1e-6, abs=0)


def test_the_sampler_is_meant_where_the_mismatch_is_corrected():
    responses = drifting_batch(seed=64)
    batch = padded(responses)
    corrected = batch.decide(cppo.CPPO(), cppo.TIS())
    values = certificate(corrected, xi=XI)
    wanted = expected(responses, cppo.GRPO())
    for name in ("drift", "residual_product", "residual_pathwise"):
        assert values[f"bound/{name}"].item() == pytest.approx(wanted[f"bound/{name}"], rel=1e-11)
    assert "bound/within_fraction" not in values  # Z_t is taken to the proximal policy


def test_bad_rewards_and_cut_responses_are_refused():
    decision = padded(drifting_batch(seed=65)).decide(cppo.CPPO())
    with pytest.raises(ValueError, match=r"^reward: expected one a response, \[9\], got \[3\]$"):
        certificate(decision, xi=XI, reward=torch.zeros(3))
    with pytest.raises(TypeError, match=r"^reward: expected a torch.Tensor, got list$"):
        certificate(decision, xi=XI, reward=[1.0] * 9)
    with pytest.raises(TypeError, match=r"^reward: expected real numbers, got torch.complex64$"):
        certificate(decision, xi=XI, reward=torch.zeros(9, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"^reward: expected logp's device cpu, got meta$"):
        certificate(decision, xi=XI, reward=torch.zeros(9, device="meta"))
    for xi in (-1, NAN, INF):
        with pytest.raises(ValueError, match=rf"^xi={xi!r}: expected a number in \[0, inf\)$"):
            certificate(decision, xi=xi)
    for xi in ("1", True, None):
        with pytest.raises(TypeError, match=rf"^xi={xi!r}: expected a number in \[0, inf\)$"):
            certificate(decision, xi=xi)
    cut = types.SimpleNamespace(batch=types.SimpleNamespace(layout=types.SimpleNamespace(sharded=True)), trace=None)
    with pytest.raises(
        ValueError, match=r"^decision: expected whole responses, got responses that are cut over ranks$"
    ):
        certificate(cut, xi=XI)


@pytest.mark.parametrize("method", [cppo.CPPO(), cppo.GRPO(), cppo.DPPO(divergence="exact_tv")], ids=repr)
def test_the_host_never_waits(method):
    def meta(*size, **options):
        return torch.ones(*size, device="meta", **options)

    for shape, layout in (((3, 5), {}), ((15,), {"lengths": torch.ones(3, dtype=torch.int64, device="meta")})):
        measured = meta(*shape) if method == cppo.DPPO(divergence="exact_tv") else None
        decision = cppo.decide(
            method, meta(*shape), meta(*shape), meta(3), meta(*shape, dtype=torch.bool), divergence=measured, **layout
        )
        tally = bound_tally(decision, reward=meta(3))
        values = (tally + tally).metrics(xi=XI)
        assert all(value.dim() == 0 and value.device.type == "meta" for value in values.values())


# ---------------------------------------------------------------- expectations, enumerated


def enumerated(seed, V=3, T=3):
    """A batch that holds each response of a uniform mu once, so that its means are expectations; and R, exact D, xi."""
    generator = torch.Generator().manual_seed(seed)
    laws = {}
    for t in range(T):
        for prefix in itertools.product(range(V), repeat=t):
            law = torch.rand(V, generator=generator, dtype=torch.float64) ** 2 + 0.05
            laws[prefix] = (law / law.sum()).tolist()
    responses, rewards = [], []
    for y in itertools.product(range(V), repeat=T):
        pi = [laws[y[:t]][y[t]] for t in range(T)]
        exact = [sum(abs(p - 1 / V) for p in laws[y[:t]]) / 2 for t in range(T)]
        responses.append(
            Response(tuple(map(math.log, pi)), (math.log(1 / V),) * T, (1.0,) * T, tuple(exact), None, None)
        )
        rewards.append(XI * (2 * torch.rand((), generator=generator).item() - 1))
    return responses, rewards, V**T


@pytest.mark.parametrize("seed", range(8))
def test_over_all_responses_the_estimates_are_the_theorys_quantities(seed):
    responses, rewards, count = enumerated(seed)
    values = found(padded(responses), cppo.DPPO(divergence="exact_tv"), rewards)
    chance = [math.exp(sum(r.logp)) for r in responses]
    improvement = sum(R * (p - 1 / count) for R, p in zip(rewards, chance, strict=True))
    assert values["bound/surrogate"] - values["bound/residual_sampled"] == pytest.approx(improvement, abs=1e-13)
    assert abs(values["bound/residual_sampled"]) <= values["bound/residual_pathwise"] <= values["bound/residual_union"]
    assert abs(values["bound/residual_sampled"]) <= values["bound/residual_product"] <= values["bound/residual_union"]
    assert values["bound/improvement_product"] <= improvement
    assert values["bound/improvement_pathwise"] <= improvement
    # The mean of |rho - 1| is twice the mean of the exact TV; a binary TV is below it.
    gaps = [abs(math.exp(p - m) - 1) for r in responses for p, m in zip(r.logp, r.rollout_logp, strict=True)]
    assert values["bound/drift"] == pytest.approx(sum(gaps) / 2 / count, rel=1e-12)
    binary = found(padded(responses), cppo.GRPO(), rewards)
    assert binary["bound/drift"] < values["bound/drift"]
    assert binary["bound/residual_pathwise"] == values["bound/residual_pathwise"]
    # A reward less a constant: the same expectations.
    shifted = found(padded(responses), cppo.DPPO(divergence="exact_tv"), [R - 0.3 for R in rewards])
    for name in ("surrogate", "residual_sampled", "improvement_product"):
        assert shifted[f"bound/{name}"] == pytest.approx(values[f"bound/{name}"], abs=1e-12)
