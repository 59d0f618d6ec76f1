"""Long responses in float32, extreme log-ratios, and inputs that are not finite."""

import dataclasses
import itertools
import math

import pytest
import torch
from examples import CORRECTIONS, CPPOS, OTHERS, drifting_batch, label
from layouts import INF, NAN, every_layout, measured, packed, padded, takes_divergence, takes_entropy

import cppo

SOME_METHODS = [*CPPOS[::5], *OTHERS]
EVERY_METHOD = pytest.mark.parametrize("method", SOME_METHODS, ids=label)

# ---------------------------------------------------------------- long responses

LONG = 131_072
BUDGETS = [
    cppo.CPPO(budget="fixed", delta_b=0.0205),
    cppo.CPPO(budget="fixed", delta_b=0.0205, position="uniform", gate="soft"),
    cppo.CPPO(budget="adaptive", delta_b=0.0102),  # at its top, 2 b_min
    cppo.CPPO(budget="adaptive", delta_b=0.0233),  # the percentile itself
    cppo.CPPO(budget="adaptive", delta_b=0.0102, gate="soft"),
]


def long_response():
    """Return float32 (logp, rollout_logp): rare large drifts in waves, spending as much as the budgets deposit."""
    generator = torch.Generator().manual_seed(0)
    rollout = -torch.empty(LONG).exponential_(1.0, generator=generator)
    scale = torch.where(torch.rand(LONG, generator=generator) < 0.08, 0.6, 0.02)
    wave = 1 + 0.5 * torch.sin(torch.arange(LONG) / 500)
    drift = scale * wave * torch.randn(LONG, generator=generator)
    return (rollout + drift).clamp(max=0.0), rollout


@pytest.mark.parametrize("method", BUDGETS, ids=label)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_float32_decides_a_long_response_as_float64_does(method, layout):
    logp, rollout = long_response()
    ones = torch.ones(1)

    def judge(dtype):
        if layout == "padded":
            return cppo.decide(method, logp[None].to(dtype), rollout[None].to(dtype), ones.to(dtype))
        return cppo.decide(method, logp.to(dtype), rollout.to(dtype), ones.to(dtype), lengths=[LONG])

    narrow, wide = judge(torch.float32), judge(torch.float64)
    trace = wide.trace
    assert narrow.trace.prior_account.dtype == torch.float64
    # The percentile is one of the response's own float32 divergences: its rounding is deposited LONG times.
    budget_error = (narrow.trace.delta_b.double() - trace.delta_b.double()).abs().item()
    assert budget_error <= 5e-8
    slack = 1e-4 + budget_error * torch.arange(LONG, dtype=torch.float64)
    assert ((narrow.trace.prior_account - trace.prior_account).abs().view(-1) <= slack).all()
    band = (trace.weighted_divergence - trace.threshold).abs() <= slack.view(trace.threshold.shape)
    assert ((narrow.rejected_by == wide.rejected_by) | band).all()
    # The comparison means something: next to no token in the band, every verdict seen often.
    assert band.sum() < LONG / 1000
    assert all((wide.rejected_by == code).sum() > 300 for code in (0, 1, 2))
    torch.testing.assert_close(narrow.gate[~band].double(), wide.gate[~band], rtol=1e-3, atol=1e-4)


def test_the_account_keeps_digits_that_float32_sums_lose():
    # A large first debt, then deposits that cancel the spending but for 2**-14 a token: in float32 beside 2**13 those
    # small steps would vanish.
    tokens = 4096
    divergence = torch.full((1, tokens), 0.25 - 2**-14)
    divergence[0, 0] = 8192.0
    method = cppo.CPPO(delta=0.5, delta_b=0.25, budget="fixed", w_min=1.0, divergence="exact_kl")
    shape = (1, tokens)
    decision = cppo.decide(method, torch.zeros(shape), torch.full(shape, -1.0), torch.ones(1), divergence=divergence)
    wanted = 0.25 - 8192.0 + 2**-14 * torch.arange(tokens - 1, dtype=torch.float64)
    assert torch.equal(decision.trace.prior_account[0, 1:], wanted)


def shapes_of(*rows):
    """Return float32 rows once padded and once packed, with the arguments that say so."""
    return (
        (tuple(row[None] for row in rows), {}),
        (rows, {"lengths": [len(rows[0])]}),
    )


def test_means_of_a_long_response_keep_digits_that_float32_sums_lose():
    # 4096, then 131,071 times 2**-13: beside 4096 a float32 would not feel one of them.
    drift = torch.full((LONG,), 2.0**-13)
    drift[0] = 4096.0
    mean = (4096.0 + (LONG - 1) * 2.0**-13) / LONG
    for (logp, rollout, given), layout in shapes_of(torch.zeros(LONG), -drift, drift):
        arguments = (logp, rollout, torch.ones(1))
        ratio = cppo.decide(cppo.GSPO(), *arguments, **layout).trace.ratio
        assert ratio.flatten()[0].item() == pytest.approx(math.exp(mean), rel=1e-6)
        bounds = cppo.GMPO(log_clip_low=1e4, log_clip_high=1e4)
        assert cppo.decide(bounds, *arguments, **layout).trace.ratio.flatten()[0].item() == ratio.flatten()[0].item()
        averaged = cppo.TRMAvg(divergence="exact_kl")
        trace = cppo.decide(averaged, *arguments, divergence=given, **layout).trace
        assert trace.mean_divergence.tolist() == [mean]
        mask = cppo.GeometricMask(low=math.exp(mean - 1e-6), high=math.exp(mean + 1e-6))
        named = {"proximal_logp": logp, "correction": mask}
        assert cppo.decide(cppo.PolicyGradient(), *arguments, **named, **layout).trace.correction.all()


def test_products_of_a_long_prefix_keep_digits_that_float32_sums_lose():
    # 16, then 131,071 times 2**-21.
    drift = torch.full((LONG,), 2.0**-21)
    drift[0] = 16.0
    total = 16.0 + (LONG - 1) * 2.0**-21
    for (logp, rollout), layout in shapes_of(torch.zeros(LONG), -drift):
        arguments = (logp, rollout, torch.ones(1))
        last = cppo.decide(cppo.CTPO(epsilon=99.0), *arguments, **layout).trace.ratio.flatten()[-1].item()
        assert last == pytest.approx(math.exp(total), rel=1e-6)
        last = cppo.decide(cppo.PNPO(), *arguments, **layout).trace.ratio.flatten()[-1].item()
        assert last == pytest.approx(math.exp(total / LONG), rel=1e-7)
        named = {"proximal_logp": logp, "correction": cppo.TIS(scope="sequence", cap=1e9)}
        weight = cppo.decide(cppo.PolicyGradient(), *arguments, **named, **layout).trace.correction.flatten()[0].item()
        assert weight == pytest.approx(math.exp(total), rel=1e-6)


@pytest.mark.parametrize("d", [0.001, 0.0017, 0.003, 0.0005])
def test_a_mean_is_compared_with_its_bound_in_float64(d):
    # Three tokens of float32, whose mean no float32 holds; the bound lies between the mean and its float32.
    rollout = torch.tensor([[-d, 0.0, 0.0]])
    mean = -rollout[0, 0].item() / 3
    rounded = torch.tensor(mean, dtype=torch.float32).item()
    bound = (mean + rounded) / 2
    method = cppo.GSPO(clip_low=0.0, clip_high=math.expm1(bound))
    decision = cppo.decide(method, torch.zeros(1, 3), rollout, torch.ones(1))
    assert decision.gate.tolist() == [[float(mean <= bound)] * 3]


def test_a_product_is_compared_with_its_bound_in_float64():
    # As above, for the sum of three; a width that rounds the lucky way must not hide it, hence many.
    answers = set()
    for index in range(100):
        drift = torch.tensor([0.1, 0.0123, 0.003 + 0.0001 * index])
        total = math.fsum(drift.tolist())
        bound = (total + torch.tensor(total, dtype=torch.float32).item()) / 2
        method = cppo.CTPO(epsilon=bound / math.sqrt(3))
        for (logp, rollout), layout in shapes_of(torch.zeros(3), -drift):
            decision = cppo.decide(method, logp, rollout, torch.ones(1), **layout)
            if abs(total - bound) > 1e-12:  # else a float32 holds the sum
                assert decision.gate.flatten()[2].item() == float(total <= bound), index
                answers.add(total <= bound)
    assert answers == {True, False}


def test_weights_of_a_long_response_run_from_one_to_w_min():
    logp, rollout = long_response()
    weight = cppo.decide(cppo.CPPO(), logp[None], rollout[None], torch.ones(1)).trace.position_weight[0]
    assert weight[0] == 1
    assert weight[-1].item() == pytest.approx(0.8, abs=1e-7)
    assert (weight.diff() <= 0).all()


@pytest.mark.parametrize("method", [cppo.CPPO(budget="none"), cppo.DPPO()], ids=label)
def test_a_constant_threshold_is_reported_in_float64(method):
    threshold = (
        padded([measured([0.1, 0.2])]).decide(dataclasses.replace(method, divergence="exact_tv")).trace.threshold
    )
    assert threshold.tolist() == [[0.15, 0.15]]


def test_a_fixed_budget_is_reported_as_configured():
    out, _ = padded([measured([0.1, 0.2])]).loss(cppo.CPPO(budget="fixed", delta_b=0.015, divergence="exact_tv"))
    assert out.decision.trace.delta_b.tolist() == [0.015]
    assert out.metrics["account/delta_b"].item() == 0.015


def test_inference_tensors_and_autocast_are_welcome():
    with torch.inference_mode():
        rollout, advantages, mask = torch.full((2, 3), -1.5), torch.ones(2), torch.ones(1, 3).bool().expand(2, 3)
    for method in SOME_METHODS:
        if takes_divergence(method):
            continue
        named = {"rollout_entropy": torch.ones(2, 3)} if takes_entropy(method) else {}
        leaf = torch.full((2, 3), -1.0, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = cppo.policy_loss(method, leaf, rollout, advantages, mask, **named)
        out.loss.backward()
        assert out.loss.dtype == torch.float32
        wanted = cppo.decide(method, leaf, rollout.clone(), torch.ones(2), **named).coefficient
        torch.testing.assert_close(leaf.grad, -wanted / 6, rtol=1e-6, atol=0.0)
        assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("what", ["delta_b", "gradient"])
def test_the_default_dtype_changes_nothing(what):
    # Loaders set it to bfloat16 while they build a model.
    batch = padded([measured([0.0, 1.0])], dtype=torch.float32)

    def numbers():
        out, gradient = batch.loss(cppo.CPPO(delta=2.0, delta_b=0.5, divergence="exact_tv"), denominator=1234.5)
        return (out.decision.trace.delta_b if what == "delta_b" else gradient).tolist()

    wanted = numbers()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert numbers() == wanted
    finally:
        torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------- extreme but finite

EXTREMES = (0.0, -1e-45, -1e-7, -1e-3, -1.0, -87.0, -104.0, -746.0, -1e4)


def extreme_batch(dtype):
    pairs = list(itertools.product(EXTREMES, EXTREMES))
    logp = torch.tensor([[p for p, _ in pairs], [p for p, _ in pairs[::-1]]] * 2, dtype=dtype)
    rollout = torch.tensor([[m for _, m in pairs], [m for _, m in pairs[::-1]]] * 2, dtype=dtype)
    return logp, rollout, torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=dtype)


@EVERY_METHOD
@pytest.mark.parametrize("correction", [None, *CORRECTIONS[:4:3], CORRECTIONS[-1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_finite_inputs_give_finite_outputs(method, dtype, correction):
    logp, rollout, advantages = extreme_batch(dtype)
    assert (logp - rollout).abs().max() >= 9000
    leaf = logp.requires_grad_()
    ramp = torch.linspace(0, 50, logp.numel(), dtype=dtype).reshape(logp.shape)
    named = {"divergence": ramp} if takes_divergence(method) else {}
    named |= {"rollout_entropy": ramp} if takes_entropy(method) else {}
    named |= {"proximal_logp": rollout.flip(1), "correction": correction} if correction else {}
    out = cppo.policy_loss(method, leaf, rollout, advantages, **named)
    out.loss.backward()
    decision, trace = out.decision, out.decision.trace
    parts = {"loss": out.loss, "gradient": leaf.grad, "gate": decision.gate, "coefficient": decision.coefficient}
    parts |= {f"trace {k}": v for k, v in vars(trace).items() if v is not None} | out.metrics
    for name, values in parts.items():
        assert values.isfinite().all(), name
    assert (decision.gate >= 0).all()
    assert (decision.gate <= 1).all()
    assert (decision.coefficient >= 0).all() or isinstance(method, cppo.DRPO)
    assert out.metrics["input/nonfinite"].item() == 0


def test_estimators_from_the_sampled_token_have_an_end():
    logp, rollout = torch.tensor([[0.0, -1e30, 0.0]]), torch.tensor([[-1e30, 0.0, -30.0]])
    for divergence, wanted in (("k2", [1e15, 1e15, 450.0]), ("k3", [math.exp(20) - 21, 1e15, math.exp(20) - 21])):
        trace = cppo.decide(cppo.TRM(divergence=divergence), logp, rollout, torch.ones(1)).trace
        assert trace.divergence.tolist() == [pytest.approx(wanted, rel=1e-6)], divergence
        assert trace.max_divergence.isfinite().all()
    named = {"rollout_entropy": torch.ones(1, 3)}
    statistic = cppo.decide(cppo.ESTR(tau=1.0), logp, rollout, torch.ones(1), **named).trace.statistic
    assert statistic.tolist() == [pytest.approx([1e15, 1e15, 900 / 1.01])]


def test_the_ratio_is_evaluated_at_no_more_than_exp_20():
    logp = torch.tensor([[0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    rollout = torch.tensor([[-1e4, -20.5, -20.0, -19.5]], dtype=torch.float64)
    bare = cppo.decide(cppo.PolicyGradient(), logp, rollout, torch.ones(1))
    top = math.exp(20.0)
    assert bare.coefficient.tolist() == [pytest.approx([top, top, top, math.exp(19.5)])]
    capped = cppo.decide(cppo.PolicyGradient(ratio_cap=1e3), logp, rollout, torch.ones(1))
    assert capped.coefficient.tolist() == [[1e3] * 4]
    # From below there is no bound: exp(-1e4) is 0.
    below = cppo.decide(cppo.PolicyGradient(), rollout, logp, torch.ones(1)).coefficient[0]
    assert below.tolist() == pytest.approx([0.0, math.exp(-20.5), math.exp(-20), math.exp(-19.5)], rel=1e-12)


def test_decisions_come_from_the_log_ratio_that_is_not_clamped():
    # Beyond the clamp a wider clip bound still tells ratios apart.
    logp, rollout = torch.zeros(1, 2).double(), torch.tensor([[-25.0, -21.0]]).double()
    decision = cppo.decide(cppo.GRPO(clip_high=math.exp(23.0)), logp, rollout, torch.ones(1))
    assert decision.rejected_by.tolist() == [[3, 0]]


# ---------------------------------------------------------------- not finite

BROKEN = (NAN, INF, -INF)


def broken(batch, field, place, value):
    """Return the batch with one place of one tensor replaced."""
    values = getattr(batch, field).clone()
    values.view(-1)[place] = value
    return dataclasses.replace(batch, **{field: values})


FIELDS_OF_METHODS = [
    pytest.param(method, field, id=f"{field}-{label(method)}")
    for method in (*CPPOS[::6], CPPOS[2], *OTHERS)
    for field in ("logp", "rollout_logp", "advantages", "divergence", "rollout_entropy")
    if (field != "divergence" or takes_divergence(method)) and (field != "rollout_entropy" or takes_entropy(method))
]


@pytest.mark.parametrize(("method", "field"), FIELDS_OF_METHODS)
@pytest.mark.parametrize("value", BROKEN, ids=str)
def test_a_token_that_is_not_finite_is_rejected_counted_and_stays_alone(method, field, value):
    responses = drifting_batch(seed=40, lengths=(4, 6, 0, 5))
    for laid in (
        padded(responses, side="left", extra=1, garbage=NAN, per_token=True),
        packed(responses, per_token=True),
    ):
        place = laid.places[1][2]
        bad = broken(laid, field, place, value)
        (clean, clean_gradient), (out, gradient) = laid.loss(method), bad.loss(method)
        decision = out.decision
        assert decision.rejected_by.view(-1)[place] == 3
        assert decision.gate.view(-1)[place] == 0
        assert decision.coefficient.view(-1)[place] == 0
        assert gradient.view(-1)[place] == 0
        assert gradient.isfinite().all()
        assert out.loss.isfinite()
        assert out.metrics["input/nonfinite"].item() == 1
        assert out.metrics["input/first_nonfinite"].item() == place
        assert all(v.isfinite() for v in out.metrics.values())
        assert all(v.isfinite().all() for v in vars(decision.trace).values() if v is not None)
        for index in (0, 3):
            assert bad.per_response(decision.gate)[index] == laid.per_response(clean.decision.gate)[index]
            assert bad.per_response(gradient)[index] == laid.per_response(clean_gradient)[index]


@pytest.mark.parametrize("budget", ["fixed", "none"])
def test_a_token_that_is_not_finite_spends_nothing_and_keeps_its_position(budget):
    method = cppo.CPPO(delta=0.25, delta_b=0.125, budget=budget, w_min=0.5, divergence="exact_tv")
    whole = [measured([0.125, 0.0, 0.25])]
    for laid in (padded(whole), packed(whole)):
        wanted, trace = laid.decide(method), broken(laid, "divergence", 1, NAN).decide(method).trace
        assert trace.position_weight.view(-1).tolist() == [1.0, 0.75, 0.5]
        assert trace.divergence.view(-1).tolist() == [0.125, 0.0, 0.25]
        for name in ("weighted_divergence", "threshold"):
            assert torch.equal(getattr(trace, name), getattr(wanted.trace, name))
        if budget == "fixed":
            # Its deposit stands.
            assert trace.prior_account.view(-1).tolist() == [0.0, 0.0, 0.09375]


def test_a_response_whose_advantage_is_not_finite_is_rejected_whole():
    responses = drifting_batch(seed=41, lengths=(3, 4, 5))
    for laid in (padded(responses, extra=1, garbage=0.0), packed(responses)):
        bad = broken(laid, "advantages", 1, NAN)
        for method in (cppo.CPPO(), cppo.CPPO(gate="soft"), cppo.GRPO(), cppo.PolicyGradient()):
            out, gradient = bad.loss(method)
            assert bad.per_response(out.decision.rejected_by)[1] == [3] * 4
            assert bad.per_response(gradient)[1] == [0] * 4
            assert out.metrics["input/nonfinite"].item() == 4
            assert out.metrics["input/first_nonfinite"].item() == laid.places[1][0]
            wanted = laid.decide(method)
            for index in (0, 2):
                assert bad.per_response(out.decision.gate)[index] == laid.per_response(wanted.gate)[index]


def test_a_log_ratio_that_overflows_counts_as_not_finite():
    big = torch.finfo(torch.float32).max
    logp, rollout = torch.tensor([[big, -0.5]]), torch.tensor([[-big, -0.6]])
    out = cppo.policy_loss(cppo.PolicyGradient(), logp, rollout, torch.ones(1))
    assert out.decision.rejected_by.tolist() == [[3, 0]]
    assert out.loss.isfinite()


def test_the_first_of_several_broken_tokens_is_named_and_all_are_counted():
    logp = torch.full((2, 4), -0.5)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    logp[0, 0] = logp[1, 3] = NAN  # padding
    rollout = logp.clone()
    logp[0, 2], rollout[1, 0], logp[1, 2] = INF, NAN, -INF
    metrics = cppo.policy_loss(cppo.CPPO(), logp, rollout, torch.ones(2), mask).metrics
    assert metrics["input/nonfinite"].item() == 3
    assert metrics["input/first_nonfinite"].item() == 2
    clean = cppo.policy_loss(cppo.CPPO(), rollout[:1], rollout[:1], torch.ones(1), mask[:1]).metrics
    assert clean["input/first_nonfinite"].item() == -1


def test_broken_tokens_count_as_tokens_but_as_nothing_that_a_rule_rejected():
    method = cppo.DPPO(delta=0.25, divergence="exact_tv")
    batch = broken(padded([measured([0.5, 0.125, 0.125, 0.125])]), "logp", 1, NAN)
    metrics = batch.loss(method)[0].metrics
    assert metrics["gate/masked_fraction"].item() == 1 / 4
    assert metrics["gate/mean"].item() == 2 / 4
    assert metrics["input/tokens"].item() == 4
    assert metrics["divergence/mean"].item() == 0.75 / 4
    assert metrics["ratio/mean"].item() == pytest.approx(3 * math.e / 4)


@EVERY_METHOD
@pytest.mark.parametrize("garbage", [*BROKEN, 1e30, -1e30, 0.3], ids=str)
def test_what_padding_holds_changes_no_bit(method, garbage):
    responses = drifting_batch(seed=42, lengths=(3, 0, 6, 1))
    layouts = every_layout(responses, garbage=garbage, per_token=True)
    clean = every_layout(responses, garbage=0.0, per_token=True)
    for name in ("padded left", "padded holes", "packed with holes"):
        (out, gradient), (wanted, wanted_gradient) = layouts[name].loss(method), clean[name].loss(method)
        assert torch.equal(out.loss, wanted.loss)
        assert torch.equal(gradient, wanted_gradient)
        assert torch.equal(out.decision.gate, wanted.decision.gate)
        assert torch.equal(out.decision.rejected_by, wanted.decision.rejected_by)
        for key, value in wanted.metrics.items():
            assert out.metrics[key].item() == value.item(), key
        for key, value in vars(wanted.decision.trace).items():
            assert value is None or torch.equal(getattr(out.decision.trace, key), value), key


def test_a_negative_given_divergence_counts_as_zero():
    # An exact KL can come out a rounding below 0.
    decision = padded([measured([-1e-9, 0.1])]).decide(cppo.DPPO(divergence="exact_kl"))
    assert decision.trace.divergence.tolist() == [[0.0, 0.1]]
