"""Every check on entry: its message names the argument, what was given and what was expected."""

import dataclasses
import math
import pickle
import re

import pytest
import torch

import cppo

# ---------------------------------------------------------------- methods

POSITIVE = (0, -0.1, math.nan, math.inf, -math.inf)
NOT_NEGATIVE = (-0.1, math.nan, math.inf)
NOT_A_NUMBER = ("0.15", None, True, [0.1], torch.tensor(0.1))

TRMS = (cppo.TRM, cppo.TRMMax, cppo.TRMAvg)
NUMBERS = [
    (cppo.CPPO, "delta", POSITIVE, "(0, inf)"),
    (cppo.CPPO, "delta_b", NOT_NEGATIVE, "[0, inf)"),
    (cppo.CPPO, "w_min", (0, -0.5, 1.0000001, 2, math.nan), "(0, 1]"),
    (cppo.CPPO, "ratio_cap", POSITIVE, "(0, inf)"),
    (cppo.DPPO, "delta", POSITIVE, "(0, inf)"),
    (cppo.DPPO, "delta_low", POSITIVE, "(0, inf)"),
    (cppo.DPPO, "ratio_cap", POSITIVE, "(0, inf)"),
    (cppo.IPO, "delta", POSITIVE, "(0, inf)"),
    (cppo.IPO, "ratio_cap", POSITIVE, "(0, inf)"),
    (cppo.DRPO, "delta", (*POSITIVE, 1e-7), "[1e-06, inf)"),
    *((kind, knob, POSITIVE, "(0, inf)") for kind in TRMS for knob in ("max_threshold", "avg_threshold")),
    (cppo.ESTR, "tau", POSITIVE, "(0, inf)"),
    (cppo.ESTR, "epsilon", POSITIVE, "(0, inf)"),
    (cppo.ESTR, "clip_low", NOT_NEGATIVE, "[0, inf)"),
    (cppo.ESTR, "clip_high", NOT_NEGATIVE, "[0, inf)"),
    (cppo.GRPO, "clip_low", NOT_NEGATIVE, "[0, inf)"),
    (cppo.GRPO, "clip_high", NOT_NEGATIVE, "[0, inf)"),
    (cppo.GRPO, "dual_clip", (1, 0.5, -3, math.nan, math.inf), "(1, inf)"),
    (cppo.CISPO, "cap", POSITIVE, "(0, inf)"),
    (cppo.CISPO, "floor", NOT_NEGATIVE, "[0, inf)"),
    (cppo.MinPRO, "clip_low", NOT_NEGATIVE, "[0, inf)"),
    (cppo.MinPRO, "clip_high", NOT_NEGATIVE, "[0, inf)"),
    (cppo.MinPRO, "ratio_cap", POSITIVE, "(0, inf)"),
    (cppo.GSPO, "clip_low", NOT_NEGATIVE, "[0, inf)"),
    (cppo.GSPO, "clip_high", NOT_NEGATIVE, "[0, inf)"),
    (cppo.SAPO, "tau_pos", POSITIVE, "(0, inf)"),
    (cppo.SAPO, "tau_neg", POSITIVE, "(0, inf)"),
    (cppo.GMPO, "log_clip_low", NOT_NEGATIVE, "[0, inf)"),
    (cppo.GMPO, "log_clip_high", NOT_NEGATIVE, "[0, inf)"),
    (cppo.PNPO, "ratio_cap", POSITIVE, "(0, inf)"),
    (cppo.CTPO, "epsilon", POSITIVE, "(0, inf)"),
    (cppo.CTPO, "ratio_cap", POSITIVE, "(0, inf)"),
    (cppo.PolicyGradient, "ratio_cap", POSITIVE, "(0, inf)"),
    (cppo.TIS, "cap", POSITIVE, "(0, inf)"),
    (cppo.MIS, "high", POSITIVE, "(0, inf)"),
    (cppo.MIS, "low", NOT_NEGATIVE, "[0, inf)"),
    (cppo.IcePop, "high", POSITIVE, "(0, inf)"),
    (cppo.IcePop, "low", NOT_NEGATIVE, "[0, inf)"),
    (cppo.GeometricMask, "low", NOT_NEGATIVE, "[0, inf)"),
    (cppo.GeometricMask, "high", NOT_NEGATIVE, "[0, inf)"),
]
# What has no default, at some value.
REQUIRED = {cppo.ESTR: {"tau": 0.1}, cppo.CTPO: {"epsilon": 0.1}}
# What may be None.
OPTIONAL = ("ratio_cap", "delta_low", "dual_clip", "max_threshold", "avg_threshold")
CASES = [(kind, knob, value, interval) for kind, knob, values, interval in NUMBERS for value in values]


@pytest.mark.parametrize(("kind", "knob", "value", "interval"), CASES)
def test_a_number_outside_its_interval_is_refused(kind, knob, value, interval):
    message = f"{kind.__name__}({knob}={value!r}): expected a number in {interval}"
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**REQUIRED.get(kind, {}) | {knob: value})


@pytest.mark.parametrize(("kind", "knob", "values", "interval"), NUMBERS)
def test_what_is_no_number_is_refused(kind, knob, values, interval):
    for value in NOT_A_NUMBER:
        if value is None and (knob in OPTIONAL or kind is cppo.MinPRO):
            continue
        message = f"{kind.__name__}({knob}={value!r}): expected a number in {interval}"
        with pytest.raises(TypeError, match=re.escape(message)):
            kind(**REQUIRED.get(kind, {}) | {knob: value})


@pytest.mark.parametrize(
    ("kind", "knob", "choices"),
    [
        (cppo.CPPO, "budget", "adaptive, fixed, none"),
        (cppo.CPPO, "position", "linear, uniform, shuffled"),
        (cppo.CPPO, "gate", "hard, soft, or a function of a tensor"),
        (cppo.CPPO, "divergence", "binary_tv, binary_kl, topk_tv, topk_kl, exact_tv, exact_kl"),
        (cppo.DPPO, "divergence", "binary_tv, binary_kl, topk_tv, topk_kl, exact_tv, exact_kl"),
        (cppo.IPO, "divergence", "binary_tv, binary_kl, topk_tv, topk_kl, exact_tv, exact_kl"),
        (cppo.TRM, "divergence", "binary_tv, binary_kl, topk_tv, topk_kl, exact_tv, exact_kl, k2, k3"),
        (cppo.TRM, "avg_divergence", "binary_tv, binary_kl, k2, k3"),
        (cppo.TIS, "scope", "token, sequence"),
        (cppo.MIS, "scope", "token, sequence"),
    ],
)
@pytest.mark.parametrize("value", ["Fixed", "", None, 3])
def test_an_unknown_choice_is_refused_with_the_known_ones(kind, knob, choices, value):
    if value is None and knob == "avg_divergence":
        return
    message = f"{kind.__name__}({knob}={value!r}): expected one of {choices}"
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**{knob: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cppo.IcePop(low=5, high=1), "IcePop(low=5.0, high=1.0): expected low <= high"),
        (lambda: cppo.MIS(low=2.5), "MIS(low=2.5, high=2.0): expected low <= high"),
        (lambda: cppo.GeometricMask(low=2), "GeometricMask(low=2.0, high=1.001): expected low <= high"),
        (lambda: cppo.CISPO(floor=5.1), "CISPO(floor=5.1, cap=5.0): expected floor <= cap"),
    ],
)
def test_a_lower_bound_lies_below_the_upper_one(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("kind", TRMS)
def test_trust_region_masking_needs_a_criterion(kind):
    message = f"{kind.__name__}(max_threshold=None, avg_threshold=None): expected at least one threshold"
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(max_threshold=None, avg_threshold=None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cppo.TRMMax(avg_threshold=0.1), "TRMMax(avg_threshold=0.1): expected None; TRM takes both"),
        (lambda: cppo.TRMAvg(max_threshold=0.1), "TRMAvg(max_threshold=0.1): expected None"),
        (lambda: cppo.TRMMax(max_threshold=None, avg_threshold=0.1), "TRMMax(max_threshold=None): expected a number"),
        (lambda: cppo.TRM(avg_divergence="k3"), "TRM(avg_divergence='k3'): expected None"),
        (lambda: cppo.TRMAvg(avg_divergence="k3"), "TRMAvg(avg_divergence='k3'): expected None"),
    ],
)
def test_a_criterion_alone_is_alone(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("value", [0, 1, "yes", None])
def test_a_flag_is_true_or_false(value):
    message = f"MinPRO(cap_prefix_at_one={value!r}): expected True or False"
    with pytest.raises(TypeError, match=re.escape(message)):
        cppo.MinPRO(cap_prefix_at_one=value)


@pytest.mark.parametrize(
    ("value", "error"), [(1.5, TypeError), (True, TypeError), ("3", TypeError), (-1, ValueError), (2**63, ValueError)]
)
def test_a_shuffle_seed_is_an_integer_that_int64_holds(value, error):
    with pytest.raises(error, match=re.escape(f"CPPO(shuffle_seed={value!r}): expected an integer in [0, 2^63)")):
        cppo.CPPO(shuffle_seed=value)


def test_the_largest_shuffle_seed_works():
    method = cppo.CPPO(position="shuffled", shuffle_seed=2**63 - 1)
    assert cppo.decide(**arguments(method=method)).gate.all()


def test_bounds_that_belong_to_their_interval_are_taken():
    cppo.CPPO(delta=1e-30, delta_b=0, w_min=1, ratio_cap=1e-30)
    cppo.GRPO(clip_low=0, clip_high=0)
    cppo.GRPO(clip_low=5.0, dual_clip=1.0001)
    cppo.DRPO(delta=1e-6)
    cppo.CISPO(cap=0.5, floor=0.5)
    cppo.MIS(low=2.0, high=2.0)
    cppo.GeometricMask(low=0.0, high=0.0)
    cppo.MinPRO(clip_low=None, clip_high=0)


@pytest.mark.parametrize(
    "method", [cppo.METHODS[name](**REQUIRED.get(cppo.METHODS[name], {})) for name in cppo.METHODS]
)
def test_methods_are_frozen_values(method):
    assert type(method).__name__ in cppo.__all__
    knob = dataclasses.fields(method)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(method, knob, 1.0)
    assert method == pickle.loads(pickle.dumps(method))
    assert hash(method) == hash(dataclasses.replace(method))
    assert cppo.METHODS[cppo.method_name(method)] is type(method)
    assert cppo.make_method(cppo.method_name(method), **dataclasses.asdict(method)) == method
    with pytest.raises(TypeError):
        type(method)(0.2)


def test_a_changed_method_is_checked_again():
    with pytest.raises(ValueError, match=re.escape("CPPO(delta=-1): expected a number in (0, inf)")):
        dataclasses.replace(cppo.CPPO(), delta=-1)


def test_defaults_are_the_papers():
    assert dataclasses.asdict(cppo.CPPO()) == {
        "delta": 0.15,
        "delta_b": 0.02,
        "budget": "adaptive",
        "w_min": 0.8,
        "position": "linear",
        "gate": "hard",
        "divergence": "binary_tv",
        "ratio_cap": None,
        "shuffle_seed": 0,
    }
    binary = {"divergence": "binary_tv", "ratio_cap": None}
    assert dataclasses.asdict(cppo.DPPO()) == {"delta": 0.15, "delta_low": None, **binary}
    assert dataclasses.asdict(cppo.IPO()) == {"delta": 0.3, **binary}
    assert dataclasses.asdict(cppo.DRPO()) == {"delta": 12.5}
    trm = {"divergence": "binary_kl", "avg_divergence": None}
    assert dataclasses.asdict(cppo.TRM()) == {"max_threshold": 0.05, "avg_threshold": None, **trm}
    assert dataclasses.asdict(cppo.TRMMax()) == {"max_threshold": 0.05, "avg_threshold": None, **trm}
    assert dataclasses.asdict(cppo.TRMAvg()) == {"max_threshold": None, "avg_threshold": 0.001, **trm}
    clip = {"clip_low": 0.2, "clip_high": 0.28}
    assert dataclasses.asdict(cppo.ESTR(tau=1.0)) == {"tau": 1.0, "epsilon": 0.01, **clip}
    assert dataclasses.asdict(cppo.GRPO()) == {**clip, "dual_clip": None}
    assert dataclasses.asdict(cppo.CISPO()) == {"cap": 5.0, "floor": 0.0}
    assert dataclasses.asdict(cppo.MinPRO()) == {**clip, "ratio_cap": None, "cap_prefix_at_one": False}
    assert dataclasses.asdict(cppo.GSPO()) == {"clip_low": 3e-4, "clip_high": 4e-4}
    assert dataclasses.asdict(cppo.SAPO()) == {"tau_pos": 1.0, "tau_neg": 1.05}
    assert dataclasses.asdict(cppo.GMPO()) == {"log_clip_low": 0.4, "log_clip_high": 0.4}
    assert dataclasses.asdict(cppo.PNPO()) == dataclasses.asdict(cppo.PolicyGradient()) == {"ratio_cap": None}
    assert dataclasses.asdict(cppo.CTPO(epsilon=0.5)) == {"epsilon": 0.5, "ratio_cap": None}
    assert dataclasses.asdict(cppo.TIS()) == {"scope": "token", "cap": 2.0}
    assert dataclasses.asdict(cppo.MIS()) == {"scope": "token", "low": 0.0, "high": 2.0}
    assert dataclasses.asdict(cppo.IcePop()) == {"scope": "token", "low": 0.5, "high": 5.0}
    assert dataclasses.asdict(cppo.GeometricMask()) == {"low": 0.999, "high": 1.001}


def test_make_method_names_the_known_methods_and_knobs():
    names = ", ".join(cppo.METHODS)
    with pytest.raises(ValueError, match=re.escape(f"method='ppo': expected one of {names}")):
        cppo.make_method("ppo")
    for name, knob in (("estr", "tau"), ("ctpo", "epsilon")):
        with pytest.raises(ValueError, match=f"{name} needs a value for '{knob}': no published one is known"):
            cppo.make_method(name)
    with pytest.raises(ValueError, match=re.escape("grpo has no knob 'delta': expected one of clip_low, clip_high")):
        cppo.make_method("grpo", delta=0.1)
    assert cppo.make_method("cppo", delta=0.2) == cppo.CPPO(delta=0.2)
    with pytest.raises(
        ValueError, match=re.escape("correction='grpo': expected one of tis, mis, icepop, geometric_mask")
    ):
        cppo.parse_correction("grpo")
    with pytest.raises(ValueError, match=re.escape("tis has no knob 'low': expected one of scope, cap")):
        cppo.parse_correction("tis?low=1")
    assert cppo.parse_correction("tis?cap=3") == cppo.TIS(cap=3.0)
    with pytest.raises(ValueError, match="method='tis', a correction,: expected one of cppo, dppo"):
        cppo.parse_method("tis")
    # As `cppo methods` prints them, and as people write numbers.
    spec = "cppo?budget=none&ratio_cap=None&delta=.2&delta_b=2e-2"
    assert cppo.parse_method(spec) == cppo.CPPO(budget="none", ratio_cap=None, delta=0.2, delta_b=0.02)


# ---------------------------------------------------------------- decide

B, T = 2, 3


def arguments(**changes):
    given = {
        "method": cppo.CPPO(),
        "logp": torch.full((B, T), -1.0),
        "rollout_logp": torch.full((B, T), -1.0),
        "advantages": torch.ones(B),
    }
    return given | changes


def packed_arguments(**changes):
    given = {"logp": torch.zeros(5), "rollout_logp": torch.zeros(5), "lengths": [2, 3]}
    return arguments(**(given | changes))


META = torch.zeros(B, T, device="meta")

DECIDE = {
    "a method by name": (arguments(method="cppo"), TypeError, "method='cppo': expected one of CPPO, DPPO, IPO, "),
    "a method's class": (arguments(method=cppo.CPPO), TypeError, "expected an instance, such as cppo.CPPO()"),
    "logp as a list": (arguments(logp=[[0.0]]), TypeError, "logp: expected a torch.Tensor, got list"),
    "integer logp": (
        arguments(logp=torch.zeros(B, T, dtype=torch.int64)),
        TypeError,
        "logp: expected a floating dtype, got torch.int64",
    ),
    "complex logp": (
        arguments(logp=torch.zeros(B, T, dtype=torch.complex64)),
        TypeError,
        "logp: expected a floating dtype, got torch.complex64",
    ),
    "no rollout_logp": (
        arguments(rollout_logp=None),
        ValueError,
        "rollout_logp: expected the sampler's log-probs, got None",
    ),
    "integer rollout_logp": (
        arguments(rollout_logp=torch.zeros(B, T, dtype=torch.int32)),
        TypeError,
        "rollout_logp: expected a floating dtype, got torch.int32",
    ),
    "rollout_logp of another shape": (
        arguments(rollout_logp=torch.zeros(B, T + 1)),
        ValueError,
        "rollout_logp: expected logp's shape [2, 3], got [2, 4]",
    ),
    "rollout_logp elsewhere": (
        arguments(rollout_logp=META),
        ValueError,
        "rollout_logp: expected logp's device cpu, got meta",
    ),
    "advantages as a number": (arguments(advantages=1.0), TypeError, "advantages: expected a torch.Tensor, got float"),
    "integer advantages": (
        arguments(advantages=torch.ones(B, dtype=torch.int64)),
        TypeError,
        "advantages: expected a floating dtype, got torch.int64",
    ),
    "advantages of another length": (
        arguments(advantages=torch.ones(T)),
        ValueError,
        "advantages: expected [B] = [2] or token-shaped [2, 3], got [3]",
    ),
    "a row of advantages": (
        arguments(advantages=torch.ones(1, T)),
        ValueError,
        "advantages: expected [B] = [2] or token-shaped [2, 3], got [1, 3]",
    ),
    "one advantage": (arguments(advantages=torch.tensor(1.0)), ValueError, "advantages: expected [B] = [2]"),
    "advantages elsewhere": (
        arguments(advantages=torch.ones(B, device="meta")),
        ValueError,
        "advantages: expected logp's device cpu, got meta",
    ),
    "a mask of another shape": (
        arguments(response_mask=torch.ones(T, B)),
        ValueError,
        "response_mask: expected logp's shape [2, 3], got [3, 2]",
    ),
    "a mask as a list": (
        arguments(response_mask=[[1, 1, 1]] * 2),
        TypeError,
        "response_mask: expected a torch.Tensor, got list",
    ),
    "a complex mask": (
        arguments(response_mask=torch.ones(B, T, dtype=torch.complex64)),
        TypeError,
        "response_mask: expected bool, integer or floating 0/1, got torch.complex64",
    ),
    "an additive mask": (
        arguments(response_mask=torch.tensor([[0.0, -1e9, 0.0]] * B)),
        ValueError,
        "response_mask: expected 1 where the policy wrote the token and 0 elsewhere, got -1e+09",
    ),
    "labels as a mask": (
        arguments(response_mask=torch.tensor([[7, -100, 1]] * B)),
        ValueError,
        "response_mask: expected 1 where the policy wrote the token and 0 elsewhere, got 7",
    ),
    "a mask with NaN": (
        arguments(response_mask=torch.tensor([[1.0, float("nan"), 1.0]] * B)),
        ValueError,
        "response_mask: expected 1 where the policy wrote the token and 0 elsewhere, got nan",
    ),
    "a mask elsewhere": (
        arguments(response_mask=META.bool()),
        ValueError,
        "response_mask: expected logp's device cpu, got meta",
    ),
    "one dimension without lengths": (
        arguments(logp=torch.zeros(5), rollout_logp=torch.zeros(5)),
        ValueError,
        "logp: expected [B, T] (padded), or [N] with lengths= (packed), got [5] without lengths",
    ),
    "three dimensions": (
        arguments(logp=torch.zeros(1, 2, 3), rollout_logp=torch.zeros(1, 2, 3)),
        ValueError,
        "logp: expected [B, T] (padded), or [N] with lengths= (packed), got [1, 2, 3] without lengths",
    ),
    "two dimensions with lengths": (
        arguments(lengths=[3, 3]),
        ValueError,
        "logp: expected [N] (packed) because lengths was given, got [2, 3]",
    ),
    "lengths of another sum": (
        packed_arguments(lengths=[2, 2]),
        ValueError,
        "lengths: expected a sum of N = 5 (logp's length), got 4",
    ),
    "a negative length": (
        packed_arguments(lengths=torch.tensor([6, -1])),
        ValueError,
        "lengths: expected no negative length, got -1",
    ),
    "floating lengths": (
        packed_arguments(lengths=torch.tensor([2.0, 3.0])),
        ValueError,
        "lengths: expected integers [B], got torch.float32 [2]",
    ),
    "lengths as a mask": (
        packed_arguments(lengths=torch.ones(5, dtype=torch.bool)),
        ValueError,
        "lengths: expected integers [B], got torch.bool [5]",
    ),
    "lengths in two dimensions": (
        packed_arguments(lengths=torch.tensor([[2, 3]])),
        ValueError,
        "lengths: expected integers [B], got torch.int64 [1, 2]",
    ),
    "lengths as floats": (
        packed_arguments(lengths=[2.9, 3.9]),
        TypeError,
        "lengths=[2.9, 3.9]: expected integers, one a response",
    ),
    "one number as lengths": (packed_arguments(lengths=5), TypeError, "lengths=5: expected integers, one a response"),
    "lengths as words": (packed_arguments(lengths=["2", "3"]), TypeError, "lengths=['2', '3']: expected integers"),
    "packed advantages of another length": (
        packed_arguments(advantages=torch.ones(3)),
        ValueError,
        "advantages: expected [B] = [2] or token-shaped [5], got [3]",
    ),
    "packed advantages as a column": (
        packed_arguments(advantages=torch.ones(2, 1)),
        ValueError,
        "advantages: expected [B] = [2] or token-shaped [5], got [2, 1]",
    ),
    "a measured divergence beside a binary one": (
        arguments(divergence=torch.zeros(B, T)),
        ValueError,
        "divergence: CPPO(divergence='binary_tv') takes its own from the log-probs, got a tensor; name what",
    ),
    "no divergence where one is needed": (
        arguments(method=cppo.CPPO(divergence="topk_tv")),
        ValueError,
        "divergence: CPPO(divergence='topk_tv') needs the measured token-shaped tensor [2, 3], got None",
    ),
    "no exact divergence": (
        arguments(method=cppo.DPPO(divergence="exact_kl")),
        ValueError,
        "divergence: DPPO(divergence='exact_kl') needs the measured token-shaped tensor [2, 3], got None",
    ),
    "a divergence of another shape": (
        arguments(method=cppo.CPPO(divergence="topk_tv"), divergence=torch.zeros(B, T, 4)),
        ValueError,
        "divergence: expected logp's shape [2, 3], got [2, 3, 4]",
    ),
    "an integer divergence": (
        arguments(method=cppo.CPPO(divergence="topk_tv"), divergence=torch.zeros(B, T, dtype=torch.int64)),
        TypeError,
        "divergence: expected a floating dtype, got torch.int64",
    ),
    "a divergence elsewhere": (
        arguments(method=cppo.CPPO(divergence="topk_tv"), divergence=META),
        ValueError,
        "divergence: expected logp's device cpu, got meta",
    ),
    "a divergence that nobody reads": (
        arguments(method=cppo.GRPO(), divergence=torch.zeros(B, T)),
        ValueError,
        "divergence: GRPO uses none, got a tensor",
    ),
    "no exact divergence for a whole response": (
        arguments(method=cppo.TRM(divergence="exact_kl")),
        ValueError,
        "divergence: TRM(divergence='exact_kl') needs the measured token-shaped tensor [2, 3], got None",
    ),
    "no entropy where one is needed": (
        arguments(method=cppo.ESTR(tau=0.1)),
        ValueError,
        "rollout_entropy: ESTR needs the rollout policy's entropy at each token (nats, [2, 3]), which the sampled "
        "tokens' log-probs do not tell, got None",
    ),
    "an entropy a response": (
        arguments(method=cppo.ESTR(tau=0.1), rollout_entropy=torch.zeros(B)),
        ValueError,
        "rollout_entropy: expected logp's shape [2, 3], got [2]",
    ),
    "an entropy that nobody reads": (
        arguments(rollout_entropy=torch.zeros(B, T)),
        ValueError,
        "rollout_entropy: CPPO uses none, got a tensor",
    ),
    "a correction without the third policy": (
        arguments(correction=cppo.IcePop()),
        ValueError,
        "proximal_logp: IcePop weighs by the trainer's recomputed policy over the sampler's and needs the former's "
        "log-probs, got None; of two policies alone every weight is 1",
    ),
    "a third policy without a correction": (
        arguments(proximal_logp=torch.zeros(B, T)),
        ValueError,
        "proximal_logp: expected correction= with it",
    ),
    "a third policy of another shape": (
        arguments(proximal_logp=torch.zeros(B), correction=cppo.TIS()),
        ValueError,
        "proximal_logp: expected logp's shape [2, 3], got [2]",
    ),
    "a correction by name": (
        arguments(proximal_logp=torch.zeros(B, T), correction="tis"),
        TypeError,
        "correction='tis': expected one of TIS, MIS, IcePop, GeometricMask",
    ),
    "two corrections that weigh": (
        arguments(proximal_logp=torch.zeros(B, T), correction=(cppo.IcePop(), cppo.GeometricMask(), cppo.TIS())),
        ValueError,
        "correction: expected one that weighs, and any number of GeometricMask, got IcePop, TIS; two would",
    ),
    "a method among the corrections": (
        arguments(proximal_logp=torch.zeros(B, T), correction=(cppo.TIS(), cppo.GRPO())),
        TypeError,
        "correction=GRPO(",
    ),
    "a gate that is no gate": (
        arguments(method=cppo.CPPO(gate=torch.square)),
        ValueError,
        "expected g(x) = 1 on [0, 1], got g(0) = 0",
    ),
    "a divergence for the plain policy gradient": (
        arguments(method=cppo.PolicyGradient(), divergence=torch.zeros(B, T)),
        ValueError,
        "divergence: PolicyGradient uses none, got a tensor",
    ),
}


@pytest.mark.parametrize("case", DECIDE)
def test_decide_and_policy_loss_name_what_is_wrong(case):
    given, error, message = DECIDE[case]
    for function in (cppo.decide, cppo.policy_loss):
        with pytest.raises(error, match=re.escape(message)):
            function(**given)


# ---------------------------------------------------------------- gates


def steeper(x):
    return torch.where(x <= 1, 1.0, x.clamp(min=1.0).pow(-2.0))


@pytest.mark.parametrize("gate", [cppo.sigmoid_gate, steeper, lambda x: (x <= 1).to(x.dtype)])
def test_an_admissible_gate_is_taken(gate):
    method = cppo.CPPO(delta=0.1, budget="none", w_min=1.0, gate=gate)
    logp, rollout = torch.tensor([[0.7, 0.8]]).log(), torch.tensor([[0.5, 0.75]]).log()
    wanted = gate(torch.tensor([0.2 / 0.1])).item()
    assert cppo.decide(method, logp, rollout, torch.ones(1)).gate.tolist() == [[pytest.approx(wanted, abs=1e-5), 1.0]]


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (lambda x: 1 / x.clamp(min=0.5), r"g\(x\) = 1 on \[0, 1\], got g\(0\) = 2"),
        (lambda x: torch.where(x < 1, 1.0, 1 / x.clamp(min=1)) * (x != 1), r"g\(x\) = 1 on \[0, 1\], got g\(1\) = 0"),
        (torch.ones_like, r"x g\(x\) <= 1 beyond 1, got g\(1\) = 1"),
        # SAPO's own attenuation leaves 1 with slope 0.
        (lambda x: torch.cosh((x.clamp(1, 300) - 1) / 2) ** -2, r"x g\(x\) <= 1 beyond 1"),
        (lambda x: torch.where(x > 4, 1 / x, torch.where(x > 1, 0.2, 1.0)), r"a non-increasing g, got g\(4\.\d+\)"),
        (lambda x: torch.where(x > 1, 0.5 - x, 1.0), r"g\(x\) >= 0, got"),
        (lambda x: torch.where(x > 2, math.nan, 1 / x.clamp(min=1)), r"a finite value, got g\("),
    ],
)
def test_a_gate_that_is_not_admissible_is_refused_with_the_point(gate, message):
    with pytest.raises(ValueError, match=r"gate=<.*>: expected " + message):
        cppo.decide(**arguments(method=cppo.CPPO(gate=gate)))


@pytest.mark.parametrize(
    "gate",
    [lambda x: 1.0, lambda x: cppo.sigmoid_gate(x.float()), lambda x: cppo.sigmoid_gate(x.double()), lambda x: x[:3]],
)
def test_what_is_no_function_of_a_tensor_is_refused(gate):
    with pytest.raises(TypeError, match=r"gate=<.*>: expected a tensor like x \(torch.float\d+ \[\d+\]\), got "):
        cppo.decide(**arguments(method=cppo.CPPO(gate=gate)))


@pytest.mark.parametrize("gate", [lambda x: 1.0 if x <= 1 else 1 / x, lambda x: math.exp(-x)])
def test_a_function_of_a_number_is_no_gate(gate):
    with pytest.raises(TypeError, match=r"gate=<.*>: expected a function of a tensor; it raised "):
        cppo.decide(**arguments(method=cppo.CPPO(gate=gate)))


def test_a_gate_is_looked_at_every_time():
    @dataclasses.dataclass  # not hashable
    class Gate:
        top: float = 1.0

        def __call__(self, x):
            return self.top * cppo.sigmoid_gate(x)

    gate = Gate()
    method = cppo.CPPO(gate=gate)
    assert cppo.decide(**arguments(method=method)).gate.all()
    gate.top = 5.0
    with pytest.raises(ValueError, match=r"expected g\(x\) = 1 on \[0, 1\], got g\(0\) = 5"):
        cppo.decide(**arguments(method=method))


def test_a_gate_is_asked_beyond_one_alone_and_held_to_its_range():
    # Below 1 it was probed at a hundred points only; what rounds above 1 is 1.
    asked = []

    def gate(x):
        asked.append(x)
        return cppo.sigmoid_gate(x) * (1 + 8 * torch.finfo(x.dtype).eps)

    method = cppo.CPPO(delta=0.25, budget="none", w_min=1.0, divergence="exact_tv", gate=gate)
    divergence = torch.tensor([[0.125, 0.25, 0.25 * (1 + 2**-52)]], dtype=torch.float64)
    logp = torch.zeros_like(divergence)
    decision = cppo.decide(method, logp, logp - 1, torch.ones(1), divergence=divergence)
    assert decision.rejected_by.tolist() == [[0, 0, 1]]
    assert (asked[-1] >= 1).all()
    assert decision.gate.max() == 1


# ---------------------------------------------------------------- reductions

REDUCTION = {
    "an unknown reduction": ({"reduction": "mean"}, "reduction='mean': expected one of token-mean, sequence-mean, fix"),
    "a negative denominator": ({"denominator": -2.0}, "denominator=-2.0: expected a positive finite number"),
    "an infinite denominator": ({"denominator": math.inf}, "denominator=inf: expected a positive finite number"),
    "no number": ({"denominator": math.nan}, "denominator=nan: expected a positive finite number"),
    "a negative denominator tensor": (
        {"denominator": torch.tensor(-1.0)},
        "denominator=tensor(-1.): expected a positive finite number, or 0 for a batch without tokens",
    ),
    "a denominator a response": (
        {"denominator": torch.ones(2)},
        "denominator: expected a number or a 0-d tensor, got shape [2]",
    ),
    "no length": (
        {"reduction": "fixed-length"},
        "fixed_length=None: expected a positive integer with reduction='fixed-length'",
    ),
    "a length too many": (
        {"reduction": "sequence-mean", "fixed_length": 5},
        "fixed_length=5: expected a positive integer with reduction='fixed-length', else None "
        "(reduction='sequence-mean')",
    ),
    "a length of zero": ({"reduction": "fixed-length", "fixed_length": 0}, "fixed_length=0: expected a positive int"),
    "a floating length": (
        {"reduction": "fixed-length", "fixed_length": 8.0},
        "fixed_length=8.0: expected a positive integer",
    ),
    "a length that is a bool": (
        {"reduction": "fixed-length", "fixed_length": True},
        "fixed_length=True: expected a positive integer",
    ),
}


@pytest.mark.parametrize("value", ["9", [9], True])
def test_a_denominator_that_is_no_number_is_refused(value):
    message = f"denominator={value!r}: expected a number or a 0-d tensor"
    with pytest.raises(TypeError, match=re.escape(message)):
        cppo.policy_loss(**arguments(), denominator=value)


@pytest.mark.parametrize("case", REDUCTION)
def test_policy_loss_names_what_is_wrong_with_a_reduction(case):
    knobs, message = REDUCTION[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        cppo.policy_loss(**arguments(), **knobs)


# ---------------------------------------------------------------- what is welcome


def test_masks_of_any_real_dtype_mean_the_same():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    wanted = cppo.decide(**arguments(response_mask=mask.bool())).gate
    assert wanted.tolist() == [[1, 1, 0], [0, 1, 1]]
    for dtype in (torch.int64, torch.uint8, torch.float32, torch.bfloat16):
        assert torch.equal(cppo.decide(**arguments(response_mask=mask.to(dtype))).gate, wanted)


def test_lengths_of_any_integer_kind_mean_the_same():
    for lengths in ([2, 3], (2, 3), torch.tensor([2, 3]), torch.tensor([2, 3], dtype=torch.int32)):
        assert cppo.decide(**packed_arguments(lengths=lengths)).batch.layout.lengths.tolist() == [2, 3]


def test_one_advantage_a_response_wins_where_a_token_shape_looks_the_same():
    # Two tokens, two responses, both tokens in the first: [2] is read as one number a response.
    row = torch.tensor([-0.5, -0.5])
    leaf = row.clone().requires_grad_()
    cppo.policy_loss(cppo.PolicyGradient(), leaf, row, torch.tensor([1.0, 5.0]), lengths=[2, 0]).loss.backward()
    assert leaf.grad.tolist() == [-0.5, -0.5]


def test_lengths_whose_sum_wraps_around_are_refused():
    logp = torch.full((4,), -1.0)
    with pytest.raises(ValueError, match="lengths: expected a sum of N = 4"):
        cppo.decide(cppo.CPPO(), logp, logp, torch.ones(5), lengths=[*[2**62] * 4, 4])
    with pytest.raises(TypeError, match="lengths="):
        cppo.decide(cppo.CPPO(), logp, logp, torch.ones(2), lengths=[2**70, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda one, k, ids: cppo.binary_tv(one[:2], one), r"rollout_logp: expected logp's shape \[2\], got \[3\]"),
        (lambda one, k, ids: cppo.binary_kl(one, [1.0]), "rollout_logp: expected a torch.Tensor, got list"),
        (lambda one, k, ids: cppo.exact_tv(k, k[:1]), r"rollout_logp: expected logp's shape \[3, 4\], got \[1, 4\]"),
        (
            lambda one, k, ids: cppo.topk_tv(one, one, ids[:, 0], k, k[:, :3], ids),
            r"rollout_topk_logp: .* got \[3, 3\]",
        ),
        (lambda one, k, ids: cppo.topk_kl(one, one, ids[:, 0], k, k, k), "topk_ids: expected integers"),
        (lambda one, k, ids: cppo.topk_kl(one, one, ids, k, k, ids), r"token_ids: expected logp's shape \[3\]"),
    ],
)
def test_the_divergences_name_what_does_not_fit(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.full((3,), -1.0), torch.full((3, 4), -2.0), torch.arange(12).view(3, 4))
