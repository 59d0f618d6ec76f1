"""Which knobs leave a trust region that can reject nothing: said of those, and of no others."""

import dataclasses
import math

import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import padded

import cppo
from cppo.adapters.sampled_tokens import method_for
from cppo.methods import needed_inputs, never_rejects
from cppo.methods.limits import _LARGEST
from cppo.ops.divergence import LARGEST_DIVERGENCE

TV = ("binary_tv", "topk_tv", "exact_tv")
DIVERGENCES = tuple(_LARGEST)
METHODS = list(cppo.METHODS.values())
BY_DESIGN = [
    cppo.CISPO(), cppo.SAPO(), cppo.DRPO(), cppo.PNPO(), cppo.PolicyGradient(),
    cppo.MinPRO(clip_low=None, clip_high=None),
]  # fmt: skip


def at_least(of):
    """Draw thresholds that this divergence cannot exceed; the limit itself among them."""
    return st.one_of(st.just(_LARGEST[of]), st.floats(_LARGEST[of], 1e30))


@st.composite
def silent(draw):
    """Draw a method of which never_rejects says that it rejects nothing."""
    kind = draw(st.sampled_from(("cppo", "dppo", "ipo", "trm", "trm_max", "trm_avg", "minpro")))
    of = draw(st.sampled_from(DIVERGENCES if kind.startswith("trm") else DIVERGENCES[:6]))
    limits = at_least(of)
    if kind == "cppo":
        budget = draw(st.sampled_from(("adaptive", "fixed", "none")))
        return cppo.CPPO(
            delta=draw(limits), delta_b=draw(st.floats(0, 2) if budget == "none" else limits), budget=budget,
            divergence=of, w_min=draw(st.floats(0.01, 1.0)), gate=draw(st.sampled_from(("hard", "soft"))),
            position=draw(st.sampled_from(("linear", "uniform", "shuffled"))),
        )  # fmt: skip
    if kind == "dppo":
        return cppo.DPPO(delta=draw(limits), delta_low=draw(st.one_of(st.none(), limits)), divergence=of)
    if kind == "ipo":
        return cppo.IPO(delta=draw(limits), divergence=of)
    if kind == "trm":
        mean = draw(st.sampled_from(("binary_tv", "binary_kl", "k2", "k3")))
        return cppo.TRM(
            max_threshold=draw(limits), avg_threshold=draw(at_least(mean)), divergence=of, avg_divergence=mean
        )
    if kind == "minpro":
        return cppo.MinPRO(clip_low=draw(st.floats(1, 5)), clip_high=None, cap_prefix_at_one=draw(st.booleans()))
    return cppo.make_method(kind, **{f"{kind[4:]}_threshold": draw(limits)}, divergence=of)


@given(silent(), strategies.batches(per_token=True), st.sampled_from((torch.float32, torch.float64)))
def test_what_never_rejects_rejects_nothing_however_extreme_the_log_probs(method, batch, dtype):
    assert never_rejects(method) is not None
    tensors = padded(batch, per_token=True, dtype=dtype, garbage=0.0)
    if needed_inputs(method):  # a total variation is at most 1, a KL may be anything
        measured = tensors.divergence.clamp(max=1.0) if method.divergence in TV else tensors.divergence * 1e30
        tensors = dataclasses.replace(tensors, divergence=measured)
    decision = tensors.decide(method)
    assert not decision.rejected_by.any()
    assert (decision.gate == tensors.response_mask).all()


FAR_UP, FAR_DOWN = (0.0, -2000.0), (-2000.0, 0.0)  # (log pi, log mu): D = 1; binary KL 708.3964


def rejects(method, pairs, advantage, divergence=None):
    logp, rollout_logp = (torch.tensor([column], dtype=torch.float64) for column in zip(*pairs, strict=True))
    more = {} if divergence is None else {"divergence": torch.full_like(logp, divergence)}
    return bool(cppo.decide(method, logp, rollout_logp, torch.tensor([advantage]), **more).rejected_by.any())


STILL = (-1.0, -1.0)
BELOW = math.nextafter(1.0, 0.0)
EXAMPLES = [
    ("delta", cppo.CPPO(delta=BELOW, budget="none"), [FAR_UP], 1.0),
    ("delta, a wide budget", cppo.CPPO(delta=BELOW, delta_b=5.0), [FAR_DOWN], -1.0),
    ("a fixed budget", cppo.CPPO(delta=1.0, delta_b=0.99, budget="fixed"), [FAR_UP] * 99, 1.0),
    ("a fixed budget, wide", cppo.CPPO(delta=5.0, delta_b=0.9, budget="fixed"), [FAR_DOWN] * 99, -1.0),
    # With D = 1 everywhere Eq. 22 would raise the budget to 1.
    ("an adaptive budget", cppo.CPPO(delta=1.0, delta_b=0.9), [FAR_UP] * 9 + [STILL] * 200, 1.0),
    ("an adaptive budget, soft", cppo.CPPO(delta=1.0, delta_b=0.9, gate="soft"), [FAR_UP] * 9 + [STILL] * 200, 1.0),
    ("dppo", cppo.DPPO(delta=BELOW), [FAR_UP], 1.0),
    ("dppo low", cppo.DPPO(delta=1.0, delta_low=BELOW), [FAR_DOWN], -1.0),
    ("dppo high", cppo.DPPO(delta=BELOW, delta_low=1.0), [FAR_UP], 1.0),
    ("dppo kl", cppo.DPPO(delta=708.3, divergence="binary_kl"), [FAR_DOWN], -1.0),
    ("ipo", cppo.IPO(delta=BELOW), [FAR_DOWN], 1.0),
    ("trm max", cppo.TRMMax(max_threshold=708.3), [FAR_DOWN], 1.0),
    ("trm avg", cppo.TRMAvg(avg_threshold=BELOW, divergence="binary_tv"), [FAR_UP] * 3, 0.0),
    ("trm k3", cppo.TRMMax(max_threshold=9e14, divergence="k3"), [(-1e16, 0.0)], 0.0),
    ("trm k2", cppo.TRMMax(max_threshold=9e14, divergence="k2"), [(-1e16, 0.0)], 0.0),
    ("trm, one of two", cppo.TRM(max_threshold=1.0, avg_threshold=BELOW, divergence="binary_tv"), [FAR_UP], 0.0),
    ("minpro", cppo.MinPRO(clip_low=BELOW, clip_high=None), [FAR_DOWN], -1.0),
    ("minpro high", cppo.MinPRO(clip_low=1.0, clip_high=1e300), [FAR_UP], 1.0),
    # Not limited by their knobs: some ratio is beyond any finite bound.
    ("grpo", cppo.GRPO(clip_low=1.0, clip_high=1e300), [FAR_UP], 1.0),
    ("gspo", cppo.GSPO(clip_low=1.0, clip_high=1e300), [FAR_UP], 1.0),
    ("gmpo", cppo.GMPO(log_clip_low=1e9, log_clip_high=700.0), [FAR_UP], 1.0),
    ("ctpo", cppo.CTPO(epsilon=1000.0), [FAR_UP], 1.0),
]


@pytest.mark.parametrize(("name", "method", "pairs", "advantage"), EXAMPLES)
def test_just_below_the_limit_a_token_can_be_rejected(name, method, pairs, advantage):
    assert never_rejects(method) is None
    assert rejects(method, pairs, advantage)


@pytest.mark.parametrize("divergence", ["topk_tv", "topk_kl", "exact_kl"])
def test_just_below_the_limit_of_a_divergence_that_is_passed(divergence):
    limit = _LARGEST[divergence]
    method = cppo.DPPO(delta=math.nextafter(limit, 0.0), divergence=divergence)
    assert never_rejects(method) is None
    assert rejects(method, [FAR_UP], 1.0, divergence=limit)


def test_the_largest_divergences_are_the_cores():
    assert {value for value in _LARGEST.values() if value > 1e3} == {LARGEST_DIVERGENCE}
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([0.0, -1e-300, -1e-12, -1e-7, -1.0, -20.0, -708.4, -1e4], dtype=dtype)
        logp, rollout_logp = torch.meshgrid(ends, ends, indexing="ij")
        assert 708.3 < cppo.ops.divergence.binary_kl(logp, rollout_logp).max() < _LARGEST["binary_kl"]


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_nothing_is_said_of_a_method_with_its_defaults(kind):
    required = {"ESTR": {"tau": 1.0}, "CTPO": {"epsilon": 0.2}}.get(kind.__name__, {})
    assert never_rejects(kind(**required)) is None


@pytest.mark.parametrize("setting", cppo.methods.SETTINGS, ids=lambda setting: setting.label)
def test_nothing_is_said_of_a_published_setting(setting):
    if setting.spec.partition("?")[0] in cppo.METHODS and "estr" not in setting.spec:
        assert never_rejects(cppo.parse_method(setting.spec)) is None


@pytest.mark.parametrize("method", BY_DESIGN)
def test_nothing_is_said_of_what_rejects_nothing_by_design(method):
    assert never_rejects(method) is None
    assert method_for("a stack", method) is method


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dppo?delta=1", r"DPPO\(delta=1.0\): expected delta below 1 \(the largest binary_tv\); no token could"),
        (
            "cppo?delta=2&delta_b=1",
            r"CPPO\(delta=2.0, delta_b=1.0\): expected delta below 1 \(the largest binary_tv\) or delta_b below 1",
        ),
        ("cppo?delta=1&budget=none", r"CPPO\(delta=1.0\): expected delta below 1"),
        (
            "trm?max_threshold=709",
            r"TRM\(max_threshold=709.0\): expected max_threshold below 708.4 \(the largest bin",
        ),
        (
            "minpro?clip_low=1&clip_high=None",
            r"MinPRO\(clip_low=1.0, clip_high=None\): expected clip_low below 1, or",
        ),
    ],
)
def test_an_adapter_refuses_it_in_one_line(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        method_for("a stack", spec)
    assert "\n" not in str(caught.value)
    assert method_for("a stack", "dppo?delta=1&delta_low=0.02")
