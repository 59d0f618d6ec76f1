"""Our methods against verl's registered policy losses: gradients with respect to the log-probs, token by token.

Every reference is verl's own code with verl's own configuration objects, differentiated by autograd. What verl calls
the old log-probs is the anchor of ratio and divergence: our ``rollout_logp``, or ``proximal_logp`` under a correction.
Where verl and this package differ, a test of its own shows by how much: those stand in the second half.
"""

import dataclasses
import math

import pytest
import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

import cppo

RESPONSES, WIDTH = 20, 16
SEEDS = range(8)
NEVER = 1e30  # a clip_ratio_c that never acts: verl's dual clip and cap cannot be switched off

# verl's loss_agg_mode, and the same divisor here.
AGGREGATIONS = {
    "token-mean": {"reduction": "token-mean"},
    "token-sum": {"reduction": "token-mean", "denominator": 1.0},
    "seq-mean-token-mean": {"reduction": "sequence-mean"},
    "seq-mean-token-sum": {"reduction": "fixed-length", "fixed_length": 1},
    "seq-mean-token-sum-norm": {"reduction": "fixed-length", "fixed_length": WIDTH},
}


@dataclasses.dataclass(frozen=True)
class Batch:
    logp: torch.Tensor
    anchor_logp: torch.Tensor
    advantages: torch.Tensor  # token-shaped: verl knows no other
    mask: torch.Tensor

    def __post_init__(self):
        assert self.logp.shape == self.anchor_logp.shape == self.advantages.shape == self.mask.shape


def make_batch(seed, dtype=torch.float64, *, advantages="token"):
    """Right-padded rows from no drift to much: one of one token, one empty, holes inside, both signs and zeros."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(2, WIDTH + 1, (RESPONSES,), generator=generator)
    lengths[0], lengths[1], lengths[2] = 1, 0, WIDTH
    mask = torch.arange(WIDTH) < lengths[:, None]
    mask[2, 3:5] = mask[2, 9] = False
    mask[3::4, 1] = False
    assert (mask.sum(1) == 1).any()
    assert not mask[1].any()
    logit = 1.5 * normal(RESPONSES, WIDTH)
    drift = torch.tensor([0.7, 0.7, 2.5, 1e-4, 0.05])[torch.arange(RESPONSES) % 5, None]
    A = normal(RESPONSES, WIDTH if advantages == "token" else 1)
    A[:, -1] = A[:, -1].masked_fill(torch.arange(RESPONSES) % 9 == 7, 0.0)
    A = A.expand(RESPONSES, WIDTH).clone()
    if advantages == "token":
        A[torch.rand(RESPONSES, WIDTH, generator=generator) < 0.15] = 0.0
    logp = torch.nn.functional.logsigmoid(logit + drift * normal(RESPONSES, WIDTH))
    anchor_logp = torch.nn.functional.logsigmoid(logit)
    return Batch(logp.to(dtype), anchor_logp.to(dtype), A.to(dtype), mask)


def tokens(logp, anchor_logp, advantages, dtype=torch.float64):
    """One response, written out."""
    values = [torch.tensor([row], dtype=dtype) for row in (logp, anchor_logp, advantages)]
    return Batch(*values, torch.ones(values[0].shape, dtype=torch.bool))


def at_log_ratios(log_ratios, advantages, dtype=torch.float64):
    """One response of rare tokens with these log-ratios."""
    anchor = [-1.0 - max(d, 0.0) for d in log_ratios]
    logp = [a + d for a, d in zip(anchor, log_ratios, strict=True)]
    return tokens(logp, anchor, advantages, dtype)


def make_config(loss_mode, **knobs):
    return ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=PolicyLossConfig(loss_mode=loss_mode),
        **knobs,
    )  # fmt: skip


def run_verl(loss_mode, batch, aggregation="token-mean", *, weights=None, mask=None, config=None, **knobs):
    """Return (loss, d loss / d log_prob) of verl's registered loss, called as its ppo_loss calls it."""
    log_prob = batch.logp.clone().requires_grad_()
    loss, _ = get_policy_loss_fn(loss_mode)(
        old_log_prob=batch.anchor_logp, log_prob=log_prob, advantages=batch.advantages,
        response_mask=batch.mask if mask is None else mask, loss_agg_mode=aggregation,
        config=config or make_config(loss_mode, **knobs), rollout_is_weights=weights,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), log_prob.grad


def verl_gradient(*args, **knobs):
    return run_verl(*args, **knobs)[1]


def our_gradient(method, batch, **arguments):
    logp = batch.logp.clone().requires_grad_()
    arguments = {"rollout_logp": batch.anchor_logp} | arguments
    out = cppo.policy_loss(method, logp, advantages=batch.advantages, response_mask=batch.mask, **arguments)
    out.loss.backward()
    return logp.grad


def ratio_gradient(batch, aggregation):
    """-rho A / denominator without any trust region, from verl: CISPO with bounds that never act."""
    return verl_gradient("cispo", batch, aggregation, clip_ratio_low=NEVER, clip_ratio_high=NEVER)


def assert_same_gradient(found, expected):
    """In float64 each token to 1e-10 of its own size, and the same zeros; in float32 all to 1e-6 of the largest."""
    assert found.dtype == expected.dtype
    largest = expected.abs().max().item()
    assert largest > 0
    rtol, atol = (1e-10, 1e-14 * largest) if expected.dtype == torch.float64 else (0.0, 1e-6 * largest)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    if expected.dtype == torch.float64:
        assert torch.equal(found == 0, expected == 0)


@dataclasses.dataclass(frozen=True)
class Case:
    loss_mode: str
    knobs: dict
    method: cppo.Method
    # Which shares of the plain -rho A / denominator verl's gradient must show, so that a rule was seen at work.
    shares: dict = dataclasses.field(default_factory=lambda: MASKED)


MASKED = {"rejected": lambda share: share == 0, "kept": lambda share: share != 0}
CAPPED = {
    **MASKED,
    "capped": lambda share: (share > 0) & (share < 0.99),
    "free": lambda share: (share - 1).abs() < 1e-5,
}
BOUNDED = {"capped": lambda share: share < 0.9, "free": lambda share: (share - 1).abs() < 1e-5}
FLOORED = {**BOUNDED, "floored": lambda share: share > 1.1}
FADED = {"faded": lambda share: share < 0.5, "free": lambda share: share > 0.999}

CASES = {
    "vanilla": Case(
        "vanilla",
        {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": NEVER},
        cppo.GRPO(clip_low=0.2, clip_high=0.2),
    ),
    "vanilla, clip-higher": Case(
        "vanilla",
        {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": NEVER},
        cppo.GRPO(),
    ),
    "vanilla, dual clip": Case(
        "vanilla",
        {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0},
        cppo.GRPO(dual_clip=3.0),
    ),
    "dppo_tv": Case(
        "dppo_tv",
        {"clip_ratio_low": 0.15, "clip_ratio_high": 0.15, "clip_ratio_c": NEVER},
        cppo.DPPO(delta=0.15),
    ),
    "dppo_tv, two thresholds and a cap": Case(
        "dppo_tv",
        {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2, "clip_ratio_c": 1.5},
        cppo.DPPO(delta=0.2, delta_low=0.1, ratio_cap=1.5),
        CAPPED,
    ),
    "dppo_kl": Case(
        "dppo_kl",
        {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05, "clip_ratio_c": NEVER},
        cppo.DPPO(delta=0.05, divergence="binary_kl"),
    ),
    "dppo_kl, two thresholds and a cap": Case(
        "dppo_kl",
        {"clip_ratio_low": 0.02, "clip_ratio_high": 0.1, "clip_ratio_c": 1.5},
        cppo.DPPO(delta=0.1, delta_low=0.02, divergence="binary_kl", ratio_cap=1.5),
        CAPPED,
    ),
    "gspo": Case("gspo", {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}, cppo.GSPO()),
    "gspo, wide": Case("gspo", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2}, cppo.GSPO(clip_low=0.1, clip_high=0.2)),
    "sapo": Case("sapo", {}, cppo.SAPO(), FADED),
    "sapo, other temperatures": Case(
        "sapo", {"tau_pos": 1.6, "tau_neg": 0.9}, cppo.SAPO(tau_pos=1.6, tau_neg=0.9), FADED
    ),
    "cispo": Case("cispo", {"clip_ratio_low": 10.0, "clip_ratio_high": 0.2}, cppo.CISPO(cap=1.2), BOUNDED),
    "cispo, both bounds": Case(
        "cispo", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.5}, cppo.CISPO(cap=1.5, floor=0.6), FLOORED
    ),
}  # fmt: skip


def assert_at_work(case, batches, gradients, aggregation):
    """Where A > 0, and where A < 0, every share that the case names was seen."""
    signs, shares = [], []
    for batch, gradient in zip(batches, gradients, strict=True):
        counted = batch.mask & (batch.advantages != 0)
        signs.append(batch.advantages.sign()[counted])
        shares.append((gradient / ratio_gradient(batch, aggregation))[counted])
    signs, shares = torch.cat(signs), torch.cat(shares)
    for name, shows in case.shares.items():
        for sign in (-1, 1):
            assert shows(shares)[signs == sign].sum() >= 5, (name, sign)


# The methods: the same gradient.

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@DTYPES
@pytest.mark.parametrize("advantages", ["token", "response"])
@pytest.mark.parametrize(
    ("name", "aggregation"),
    [
        (name, aggregation)
        for name in CASES
        for aggregation in AGGREGATIONS
        if not name.startswith("sapo") or aggregation == "seq-mean-token-mean"  # verl's sapo knows no other
    ],
)
def test_every_loss_has_verls_gradient_in_every_aggregation(name, aggregation, advantages, dtype):
    case = CASES[name]
    batches = [make_batch(seed, dtype, advantages=advantages) for seed in SEEDS]
    expected = [verl_gradient(case.loss_mode, batch, aggregation, **case.knobs) for batch in batches]
    assert_at_work(case, batches, expected, aggregation)
    for batch, gradient in zip(batches, expected, strict=True):
        assert_same_gradient(our_gradient(case.method, batch, **AGGREGATIONS[aggregation]), gradient)


@DTYPES
def test_gmpo_has_verls_geo_mean_gradient(dtype):
    case = Case("geo_mean", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.3}, cppo.GMPO(log_clip_high=0.3))
    batches = [make_batch(seed, dtype, advantages="response") for seed in SEEDS]
    expected = [verl_gradient(case.loss_mode, batch, **case.knobs) for batch in batches]
    assert_at_work(case, batches, expected, "seq-mean-token-mean")
    for batch, gradient in zip(batches, expected, strict=True):
        # verl's mean counts empty responses: test_geo_mean_averages_over_empty_responses_too
        found = our_gradient(case.method, batch, reduction="sequence-mean", denominator=RESPONSES)
        assert_same_gradient(found, gradient)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("vanilla", cppo.GRPO(clip_low=0.2, clip_high=0.22)),
        ("vanilla", cppo.GRPO(clip_low=0.22, clip_high=0.2)),
        ("vanilla, dual clip", cppo.GRPO(dual_clip=3.5)),
        ("dppo_tv", cppo.DPPO(delta=0.14)),
        ("dppo_tv, two thresholds and a cap", cppo.DPPO(delta=0.2, delta_low=0.1, ratio_cap=1.5 + 1e-8)),
        ("dppo_kl", cppo.DPPO(delta=0.05)),
        ("gspo", cppo.GSPO(clip_low=3e-4, clip_high=5e-3)),
        ("sapo", cppo.SAPO(tau_neg=1.05 + 1e-8)),
        ("cispo", cppo.CISPO(cap=1.2 + 1e-8)),
    ],
)
def test_a_knob_that_differs_a_little_gives_another_gradient(name, other):
    # What the comparisons above could not see, they would not prove.
    case, red = CASES[name], 0
    for seed in SEEDS:
        batch = make_batch(seed, advantages="response")
        expected = verl_gradient(case.loss_mode, batch, "seq-mean-token-mean", **case.knobs)
        assert_same_gradient(our_gradient(case.method, batch, reduction="sequence-mean"), expected)
        try:
            assert_same_gradient(our_gradient(other, batch, reduction="sequence-mean"), expected)
        except AssertionError:
            red += 1
    assert red > 0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("two", [False, True], ids=["one threshold", "two thresholds"])
def test_a_divergence_at_its_threshold_is_kept_and_one_rounding_beyond_is_not(advantage, two):
    batch = tokens([math.log(0.41 if advantage > 0 else 0.3)], [math.log(0.3 if advantage > 0 else 0.41)], [advantage])
    at = (batch.logp.exp() - batch.anchor_logp.exp()).abs().item()
    for threshold, kept in [(at, True), (math.nextafter(at, 0), False)]:
        knobs = {"clip_ratio_low": threshold, "clip_ratio_high": threshold}
        method = cppo.DPPO(delta=threshold, delta_low=threshold if two else None)
        assert (verl_gradient("dppo_tv", batch, **knobs) != 0).item() is kept
        assert (our_gradient(method, batch) != 0).item() is kept


@pytest.mark.parametrize(
    ("name", "aggregation"),
    [
        ("vanilla, dual clip", "token-mean"),
        ("dppo_tv", "seq-mean-token-sum-norm"),
        ("dppo_kl", "seq-mean-token-sum-norm"),
        ("gspo, wide", "seq-mean-token-mean"),
        ("sapo", "seq-mean-token-mean"),
        ("cispo", "token-mean"),
    ],
)
def test_verls_engine_and_our_packed_layout_agree_on_a_part_of_a_global_batch(name, aggregation):
    case, batch, prompt = CASES[name], make_batch(5), 2
    # As verl's engine has it: jagged, masked tokens and the empty response included.
    lengths = (batch.mask * torch.arange(1, WIDTH + 1)).amax(1).clamp(min=1).tolist()

    def jagged(values, before=0, after=0):
        pad = torch.nn.functional.pad
        rows = [pad(row[:length], (before, after)) for row, length in zip(values, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    # The model's output at a position is the log-prob of the next token.
    log_probs = jagged(batch.logp, before=prompt - 1, after=1).requires_grad_()
    ranks, all_tokens, all_responses, horizon = 4, 1234, 99, 50
    data = tensordict_utils.get_tensordict(
        {
            "prompts": torch.nested.as_nested_tensor([torch.zeros(prompt)] * RESPONSES, layout=torch.jagged),
            "responses": jagged(torch.zeros_like(batch.logp)),
            "response_mask": jagged(batch.mask.long()),
            "old_log_probs": jagged(batch.anchor_logp),
            "advantages": jagged(batch.advantages),
        },
        {"dp_size": ranks, "batch_num_tokens": all_tokens, "global_batch_size": all_responses},
    )
    config = make_config(case.loss_mode, loss_agg_mode=aggregation, loss_scale_factor=horizon, **case.knobs)
    loss, _ = ppo_loss(config, {"log_probs": log_probs}, data)
    loss.backward()
    expected = torch.cat([row[prompt - 1 : -1] for row in log_probs.grad.unbind()])

    logp, anchor_logp, A, mask = (
        jagged(x).values() for x in (batch.logp, batch.anchor_logp, batch.advantages, batch.mask)
    )
    logp = logp.detach().clone().requires_grad_()
    reduction = AGGREGATIONS[aggregation]["reduction"]
    out = cppo.policy_loss(
        case.method, logp, anchor_logp, A, mask, lengths=lengths, reduction=reduction,
        denominator=(all_tokens if reduction == "token-mean" else all_responses) / ranks,
        fixed_length=horizon if reduction == "fixed-length" else None,
    )  # fmt: skip
    out.loss.backward()
    assert_same_gradient(logp.grad, expected)


# The mismatch corrections: the same weights, the same decisions.


def make_corrected_batch(seed, *, advantages="token"):
    """Return a batch, its anchor the trainer's recomputation, and the log-probs of an engine that differs from it."""
    batch = make_batch(seed, advantages=advantages)
    generator = torch.Generator().manual_seed(seed + 1000)
    anchor = batch.anchor_logp
    mismatch = torch.tensor([0.5, 3e-4, 0.05, 1.5])[torch.arange(RESPONSES) % 4, None]
    noise = torch.randn(anchor.shape, generator=generator, dtype=torch.float64)
    return batch, torch.nn.functional.logsigmoid(anchor - torch.log(-torch.expm1(anchor)) + mismatch * noise)


def verl_correction(batch, rollout_logp, **knobs):
    """Return (rollout_is_weights, response_mask) as verl's trainer computes them."""
    weights, mask, _ = compute_rollout_correction_and_rejection_mask(
        old_log_prob=batch.anchor_logp, rollout_log_prob=rollout_logp, response_mask=batch.mask, **knobs
    )
    return None if weights is None else weights.batch["rollout_is_weights"], mask


def our_correction(batch, rollout_logp, correction):
    """Return the correction's weights."""
    decision = cppo.decide(
        cppo.PolicyGradient(), batch.logp, rollout_logp, batch.advantages, batch.mask,
        proximal_logp=batch.anchor_logp, correction=correction,
    )  # fmt: skip
    return decision.trace.correction


CORRECTIONS = {
    "token TIS": ({"rollout_is": "token", "rollout_is_threshold": 2.0}, cppo.TIS(cap=2.0)),
    "sequence TIS": ({"rollout_is": "sequence", "rollout_is_threshold": 3.0}, cppo.TIS(scope="sequence", cap=3.0)),
    "IcePop": ({"rollout_is": "token", "rollout_is_threshold": "0.5_5.0"}, cppo.IcePop(low=0.5, high=5.0)),
    "sequence MIS": (
        {"rollout_is": "sequence", "rollout_is_threshold": "0.4_2.0"},
        cppo.MIS(scope="sequence", low=0.4, high=2.0),
    ),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_correction_has_verls_weights(name):
    knobs, correction = CORRECTIONS[name]
    bound = 0.0 if isinstance(correction, cppo.MIS) else correction.cap
    bounded = free = 0
    for seed in SEEDS:
        batch, rollout_logp = make_corrected_batch(seed)
        expected, mask = verl_correction(batch, rollout_logp, **knobs)
        assert torch.equal(mask, batch.mask)
        torch.testing.assert_close(our_correction(batch, rollout_logp, correction), expected, rtol=1e-10, atol=0.0)
        acts = (expected == bound) & batch.mask
        bounded, free = bounded + acts.sum(), free + (batch.mask & ~acts).sum()
    assert bounded > 20
    assert free > 20


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_a_weight_at_either_bound_is_kept_and_one_rounding_beyond_is_dropped(scope):
    # Two responses of one token; the second's weight is always inside: verl cannot take a batch without one.
    batch = Batch(
        *(torch.full((2, 1), value, dtype=torch.float64) for value in (-1.0, -1.0, 1.0)), torch.ones(2, 1) > 0
    )
    rollout_logp = torch.tensor([[-1.5], [-2.0]], dtype=torch.float64)
    B, inside = (batch.anchor_logp - rollout_logp).exp().flatten().tolist()
    for low, high, other, kept in [
        (B, 4.0, inside, True),
        (math.nextafter(B, 2), 4.0, inside, False),
        (0.5, B, 1.0, True),
        (0.5, math.nextafter(B, 0), 1.0, False),
    ]:
        rollout_logp[1] = -1.0 - math.log(other)
        weights, _ = verl_correction(batch, rollout_logp, rollout_is=scope, rollout_is_threshold=f"{low}_{high}")
        found = our_correction(batch, rollout_logp, cppo.MIS(scope=scope, low=low, high=high))
        assert torch.equal(found, weights)
        assert found[0].item() == (B if kept else 0.0)
        assert found[1].item() == pytest.approx(other)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", ["vanilla, dual clip", "dppo_tv", "dppo_kl", "gspo, wide", "sapo", "cispo"])
def test_a_corrected_loss_has_verls_gradient(name, correction):
    case, (knobs, ours) = CASES[name], CORRECTIONS[correction]
    aggregation = "seq-mean-token-mean" if name in ("gspo, wide", "sapo") else "token-mean"
    for seed in SEEDS:
        batch, rollout_logp = make_corrected_batch(seed)
        weights, _ = verl_correction(batch, rollout_logp, **knobs)
        expected = verl_gradient(case.loss_mode, batch, aggregation, weights=weights, **case.knobs)
        found = our_gradient(
            case.method, batch, rollout_logp=rollout_logp, proximal_logp=batch.anchor_logp, correction=ours,
            **AGGREGATIONS[aggregation],
        )  # fmt: skip
        assert_same_gradient(found, expected)


@pytest.mark.parametrize(("low", "high"), [(0.999, 1.001), (0.8, 1.1)])
def test_a_geometric_mask_with_inverted_bounds_drops_verls_responses(low, high):
    accepted = []
    for seed in SEEDS:
        batch, rollout_logp = make_corrected_batch(seed)
        _, mask = verl_correction(batch, rollout_logp, rollout_rs="seq_mean_k1", rollout_rs_threshold=f"{low}_{high}")
        weights = our_correction(batch, rollout_logp, cppo.GeometricMask(low=1 / high, high=1 / low))
        assert torch.equal(weights != 0, mask)
        assert ((weights == 0) | (weights == 1)).all()
        accepted.append(mask.any(1)[batch.mask.any(1)])
    assert 10 < torch.cat(accepted).sum() < len(torch.cat(accepted)) - 10


@pytest.mark.parametrize(
    ("rollout_rs", "thresholds", "method"),
    [
        ("seq_max_k2", "0.3", cppo.TRM(max_threshold=0.3, divergence="k2")),
        ("seq_max_k3", "0.3", cppo.TRM(max_threshold=0.3, divergence="k3")),
        ("seq_mean_k2", "0.05", cppo.TRM(max_threshold=None, avg_threshold=0.05, divergence="k2")),
        ("seq_mean_k3", "0.05", cppo.TRM(max_threshold=None, avg_threshold=0.05, divergence="k3")),
        (
            "seq_max_k2,seq_mean_k3",
            "0.3,0.05",
            cppo.TRM(max_threshold=0.3, avg_threshold=0.05, divergence="k2", avg_divergence="k3"),
        ),
    ],
)
def test_trm_on_sampled_estimators_accepts_verls_responses(rollout_rs, thresholds, method):
    everything = []
    for seed in SEEDS:
        batch, rollout_logp = make_corrected_batch(seed)
        _, mask = verl_correction(batch, rollout_logp, rollout_rs=rollout_rs, rollout_rs_threshold=thresholds)
        decision = cppo.decide(method, batch.anchor_logp, rollout_logp, batch.advantages, batch.mask)
        responses = batch.mask.any(1)
        accepted = decision.trace.accepted
        assert torch.equal(accepted[responses], mask.any(1)[responses])
        assert torch.equal(decision.gate != 0, mask)
        assert accepted[~responses].all()
        everything.append(accepted[responses])
    assert 20 < torch.cat(everything).sum() < len(torch.cat(everything)) - 20


@pytest.mark.parametrize("rollout_rs", ["seq_max_k2", "seq_mean_k2"])
def test_an_estimate_at_its_threshold_is_kept_by_both(rollout_rs):
    batch = tokens([-1.0], [-1.5], [1.0])  # k2 = 0.125 without rounding
    for threshold, kept in [(0.125, True), (math.nextafter(0.125, 0), False)]:
        _, mask = verl_correction(
            batch, torch.tensor([[-1.0]], dtype=torch.float64), rollout_rs=rollout_rs, rollout_rs_threshold=threshold
        )
        bounds = {"max_threshold": None} | {f"{rollout_rs[4:-3].replace('mean', 'avg')}_threshold": threshold}
        decision = cppo.decide(
            cppo.TRM(divergence="k2", **bounds), batch.logp, batch.anchor_logp, batch.advantages, batch.mask
        )
        assert mask.item() is decision.trace.accepted.item() is kept


# Known differences: knobs and their defaults.


def test_verls_vanilla_loss_clips_dual_at_3_unless_told_otherwise():
    batch = make_batch(0)
    expected = verl_gradient("vanilla", batch)
    assert_same_gradient(our_gradient(cppo.GRPO(clip_low=0.2, clip_high=0.2, dual_clip=3.0), batch), expected)
    plain = our_gradient(cppo.GRPO(clip_low=0.2, clip_high=0.2), batch)
    leaks = (batch.advantages < 0) & (batch.logp - batch.anchor_logp > math.log(3)) & batch.mask
    assert leaks.any()
    assert torch.equal((plain != 0) & (expected == 0), leaks)


@pytest.mark.parametrize(("loss_mode", "divergence"), [("dppo_tv", "binary_tv"), ("dppo_kl", "binary_kl")])
def test_verls_dppo_caps_the_weight_at_3_since_its_fallback_of_20_is_never_reached(loss_mode, divergence):
    batch = make_batch(0)
    expected = verl_gradient(loss_mode, batch, clip_ratio_low=0.15, clip_ratio_high=0.15)
    method = cppo.DPPO(delta=0.15, divergence=divergence, ratio_cap=3.0)
    assert_same_gradient(our_gradient(method, batch), expected)
    for cap in (None, 20.0):
        uncapped = our_gradient(dataclasses.replace(method, ratio_cap=cap), batch)
        assert (uncapped - expected).abs().max() > 0.1 * expected.abs().max()


def test_verls_clip_ratio_alone_changes_nothing_since_both_bounds_have_defaults():
    batch = make_batch(0)
    method = cppo.DPPO(delta=0.2, ratio_cap=3.0)
    assert_same_gradient(our_gradient(method, batch), verl_gradient("dppo_tv", batch, clip_ratio=0.05))
    unset = {"clip_ratio_low": None, "clip_ratio_high": None}
    method = cppo.DPPO(delta=0.05, ratio_cap=3.0)
    assert_same_gradient(our_gradient(method, batch), verl_gradient("dppo_tv", batch, clip_ratio=0.05, **unset))


def test_verls_cispo_bounds_are_distances_from_1_and_ours_are_absolute():
    batch = make_batch(0)
    expected = verl_gradient("cispo", batch, clip_ratio_low=0.25, clip_ratio_high=4.0)
    assert_same_gradient(our_gradient(cppo.CISPO(floor=0.75, cap=5.0), batch), expected)
    expected = verl_gradient("cispo", batch, clip_ratio_low=1.0, clip_ratio_high=4.0)
    assert_same_gradient(our_gradient(cppo.CISPO(cap=5.0), batch), expected)
    with pytest.raises(AssertionError):
        assert_same_gradient(our_gradient(cppo.CISPO(cap=4.0), batch), expected)


# Known differences: numbers that are very large, very small or missing.


def test_beyond_20_nats_verls_clamp_has_no_gradient_where_ours_keeps_the_ratio():
    batch = at_log_ratios([19.0, 25.0, -19.0, -25.0], [-1.0, -1.0, 1.0, 1.0])
    expected = verl_gradient("vanilla", batch, clip_ratio_c=NEVER)[0] * 4
    found = our_gradient(cppo.GRPO(), batch)[0] * 4
    torch.testing.assert_close(found[::2], expected[::2], rtol=1e-10, atol=0.0)
    assert expected[1] == expected[3] == 0
    assert found[1].item() == pytest.approx(math.exp(20))  # our exponent is clamped as well, the gradient is not
    assert found[3].item() == pytest.approx(-math.exp(-25))
    # The dual clip hides the upper half.
    assert verl_gradient("vanilla", batch)[0, :2].count_nonzero() == 0
    assert our_gradient(cppo.GRPO(dual_clip=3.0), batch)[0, :2].count_nonzero() == 0


@pytest.mark.parametrize(
    ("loss_mode", "method", "knobs"),
    [
        ("dppo_tv", cppo.DPPO(delta=0.15), {"clip_ratio_c": NEVER}),
        ("dppo_kl", cppo.DPPO(delta=0.05, divergence="binary_kl"), {"clip_ratio_c": NEVER}),
        ("cispo", cppo.CISPO(cap=NEVER), {"clip_ratio_low": 1.0, "clip_ratio_high": NEVER}),
    ],
)
def test_where_verl_detaches_the_weight_it_lies_between_exp_minus_20_and_exp_20(loss_mode, method, knobs):
    batch = at_log_ratios([19.0, 25.0, -19.0, -25.0], [-1.0, -1.0, 1.0, 1.0])
    expected = verl_gradient(loss_mode, batch, **knobs)[0] * 4
    found = our_gradient(method, batch)[0] * 4
    torch.testing.assert_close(found[:3], expected[:3], rtol=1e-10, atol=0.0)
    assert expected[3].item() == pytest.approx(-math.exp(-20))
    assert found[3].item() == pytest.approx(-math.exp(-25))


def test_verls_sapo_gate_is_zero_where_its_sigmoid_rounds_to_1():
    batch = at_log_ratios([0.5, 3.0, -25.0], [1.0, 1.0, 1.0], torch.float32)
    expected = verl_gradient("sapo", batch)[0] * 3
    found = our_gradient(cppo.SAPO(), batch, reduction="sequence-mean")[0] * 3
    assert found[0] == pytest.approx(expected[0].item(), rel=1e-6)
    assert expected[1] == 0
    assert found[1].item() == pytest.approx(-math.exp(3) / math.cosh((math.exp(3) - 1) / 2) ** 2, rel=1e-5)
    assert expected[2] == 0  # the clamp at -20
    assert found[2].item() == pytest.approx(-math.exp(-25) / math.cosh(0.5) ** 2, rel=1e-5)


def test_verls_binary_kl_adds_1e_8_inside_the_logarithm_and_so_keeps_a_token_near_probability_1():
    batch = tokens([math.log1p(-1e-12)], [math.log(0.998)], [1.0])
    m, rest = 0.998, 0.002
    exact = m * math.log(m) + rest * math.log(rest / 1e-12)
    assert exact > 0.04
    assert exact - rest * math.log(1e4) < 0.03
    expected = verl_gradient("dppo_kl", batch, clip_ratio_low=0.03, clip_ratio_high=0.03)
    assert expected.item() == pytest.approx(-1 / m)
    assert our_gradient(cppo.DPPO(delta=0.03, divergence="binary_kl"), batch).item() == 0
    assert our_gradient(cppo.DPPO(delta=0.05, divergence="binary_kl"), batch).item() == pytest.approx(-1 / m)


def test_verls_gspo_has_no_gradient_beyond_log_s_of_10_and_ours_is_clamped_at_20():
    for log_s, expected_weight, weight in [
        (9.0, math.exp(9), math.exp(9)),
        (11.0, 0.0, math.exp(11)),
        (25.0, 0.0, math.exp(20)),
    ]:
        batch = at_log_ratios([log_s - 1, log_s + 1], [-1.0, -1.0])
        knobs = CASES["gspo"].knobs
        expected = verl_gradient("gspo", batch, "seq-mean-token-mean", **knobs)
        found = our_gradient(cppo.GSPO(), batch, reduction="sequence-mean")
        assert expected[0].tolist() == pytest.approx([expected_weight / 2] * 2)
        assert found[0].tolist() == pytest.approx([weight / 2] * 2)


def test_verls_geo_mean_does_not_clamp_and_overflows_where_ours_is_clamped_at_20():
    batch = at_log_ratios([800.0, 800.0], [-1.0, -1.0])
    assert verl_gradient("geo_mean", batch).isinf().all()
    found = our_gradient(cppo.GMPO(), batch, reduction="sequence-mean")
    assert found[0].tolist() == pytest.approx([math.exp(20) / 2] * 2)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_padding_that_is_not_finite_reaches_verls_gradient_and_not_ours(aggregation):
    case, batch = CASES["cispo"], make_batch(0)
    padding = torch.arange(WIDTH) > (batch.mask * torch.arange(WIDTH)).amax(1, keepdim=True)
    poisoned = dataclasses.replace(batch, logp=batch.logp.masked_fill(padding, math.nan))
    loss, gradient = run_verl("cispo", poisoned, aggregation, **case.knobs)
    assert loss.isnan() == (aggregation != "token-mean")
    assert gradient[padding].isnan().all()
    arguments = AGGREGATIONS[aggregation]
    assert torch.equal(our_gradient(case.method, poisoned, **arguments), our_gradient(case.method, batch, **arguments))


@pytest.mark.parametrize(
    ("name", "shown"),
    [("vanilla", 0.0), ("sapo", 0.0), ("dppo_tv", math.nan), ("dppo_kl", math.nan), ("cispo", math.nan)],
)
def test_one_log_prob_that_is_nan_makes_verls_loss_nan_and_costs_here_one_token(name, shown):
    case, batch = CASES[name], make_batch(0)
    whole = our_gradient(case.method, batch, reduction="sequence-mean")
    bad = torch.zeros_like(batch.mask)
    row, column = (whole != 0).nonzero()[3]
    bad[row, column] = True
    poisoned = dataclasses.replace(batch, logp=batch.logp.masked_fill(bad, math.nan))
    loss, gradient = run_verl(case.loss_mode, poisoned, "seq-mean-token-mean", **case.knobs)
    assert loss.isnan()
    # A clamp hides the token from the gradient, a weight that is taken alone does not.
    assert gradient[row, column].item() == pytest.approx(shown, nan_ok=True)
    found = our_gradient(case.method, poisoned, reduction="sequence-mean")
    assert torch.equal(found, whole.masked_fill(bad, 0.0))
    assert_same_gradient(found, gradient.masked_fill(bad, 0.0))


# Known differences: what is divided by what.


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_a_batch_without_tokens_is_nan_in_verl_and_0_here(aggregation):
    batch = make_batch(0)
    batch = dataclasses.replace(batch, mask=torch.zeros_like(batch.mask))
    assert run_verl("vanilla", batch, aggregation)[0].isnan()
    assert our_gradient(cppo.GRPO(), batch, **AGGREGATIONS[aggregation]).count_nonzero() == 0


@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_empty_responses_count_in_verl_once_its_trainer_gives_the_global_batch_size(aggregation):
    batch = make_batch(0)
    config = make_config("vanilla")
    assert config.global_batch_info == {}  # alone, verl leaves them out: the comparisons above
    config.global_batch_info["global_batch_size"] = RESPONSES
    expected = verl_gradient("vanilla", batch, aggregation, config=config)
    method = cppo.GRPO(clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    ours = our_gradient(method, batch, **AGGREGATIONS[aggregation])
    assert_same_gradient(ours * (RESPONSES - 1) / RESPONSES, expected)
    assert_same_gradient(our_gradient(method, batch, denominator=RESPONSES, **AGGREGATIONS[aggregation]), expected)


def test_verls_horizon_is_the_width_of_the_padded_batch_unless_loss_scale_factor_is_set():
    batch = make_batch(0)
    wide = Batch(*(torch.nn.functional.pad(tensor, (0, WIDTH)) for tensor in (
        batch.logp, batch.anchor_logp, batch.advantages, batch.mask,
    )))  # fmt: skip
    aggregation = "seq-mean-token-sum-norm"
    narrow = verl_gradient("dppo_tv", batch, aggregation)
    assert_same_gradient(verl_gradient("dppo_tv", wide, aggregation)[:, :WIDTH] * 2, narrow)
    config = make_config("dppo_tv")
    config.global_batch_info["loss_scale_factor"] = WIDTH
    expected = verl_gradient("dppo_tv", wide, aggregation, config=config)
    method = cppo.DPPO(delta=0.2, ratio_cap=3.0)
    assert_same_gradient(our_gradient(method, wide, **AGGREGATIONS[aggregation]), expected)


def test_verl_adds_1e_8_to_a_responses_length_which_rounds_away_unless_the_mask_is_float64():
    batch = make_batch(0, advantages="response")
    lengths = batch.mask.double().sum(1, keepdim=True)
    plain = verl_gradient("vanilla", batch, "seq-mean-token-mean")
    for dtype in (torch.int64, torch.float32):
        assert torch.equal(verl_gradient("vanilla", batch, "seq-mean-token-mean", mask=batch.mask.to(dtype)), plain)
    shifted = verl_gradient("vanilla", batch, "seq-mean-token-mean", mask=batch.mask.double())
    assert_same_gradient(shifted * (lengths + 1e-8) / lengths.clamp(min=1), plain)
    with pytest.raises(AssertionError):
        assert_same_gradient(shifted, plain)
    knobs = {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}
    found = our_gradient(cppo.GMPO(), batch, reduction="sequence-mean", denominator=RESPONSES)
    assert_same_gradient(found, verl_gradient("geo_mean", batch, **knobs))
    shifted = verl_gradient("geo_mean", batch, mask=batch.mask.double(), **knobs)
    torch.testing.assert_close(shifted, found, rtol=1e-7, atol=0.0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(shifted, found, rtol=1e-9, atol=0.0)


def test_sapo_is_always_averaged_over_sequences_in_verl():
    batch = make_batch(0)
    expected = verl_gradient("sapo", batch, "seq-mean-token-mean")
    for aggregation in AGGREGATIONS:
        assert torch.equal(verl_gradient("sapo", batch, aggregation), expected)
    assert_same_gradient(our_gradient(cppo.SAPO(), batch, reduction="sequence-mean"), expected)


def test_geo_mean_averages_over_empty_responses_too_whatever_the_aggregation_and_the_global_batch():
    batch = make_batch(0, advantages="response")
    knobs = {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}
    expected = verl_gradient("geo_mean", batch, **knobs)
    config = make_config("geo_mean", **knobs)
    config.global_batch_info.update(dp_size=4, batch_num_tokens=1234, global_batch_size=99, loss_scale_factor=50)
    for aggregation in AGGREGATIONS:
        assert torch.equal(verl_gradient("geo_mean", batch, aggregation, config=config), expected)
    ours = our_gradient(cppo.GMPO(), batch, reduction="sequence-mean")
    assert_same_gradient(ours * (RESPONSES - 1) / RESPONSES, expected)


def test_geo_mean_weighs_by_the_mean_advantage_and_skips_tokens_of_advantage_0_where_gmpo_takes_each_token_alone():
    d, A = [0.1, 0.2, -0.1], [2.0, 0.0, -1.0]
    batch = at_log_ratios(d, A)
    expected = verl_gradient("geo_mean", batch, clip_ratio_low=0.4, clip_ratio_high=0.4)[0]
    # The clipped log-ratios are 0.1, 0 (by its advantage of 0) and -0.1: the geometric mean is 1.
    assert expected.tolist() == pytest.approx([-(1 / 3) / 3, 0.0, -(1 / 3) / 3])
    found = our_gradient(cppo.GMPO(), batch, reduction="sequence-mean")[0]
    R = math.exp(sum(d) / 3)
    assert found.tolist() == pytest.approx([-2 * R / 3, 0.0, 1 * R / 3])


# Known differences: the mismatch corrections.


def test_verls_seq_mean_k1_bounds_the_inverse_of_the_geometric_mean():
    batch = tokens([-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0])
    mismatch = math.log(1.8)  # the trainer's probability is 1.8 times the engine's, at both tokens
    rollout_logp = batch.anchor_logp - mismatch
    _, mask = verl_correction(batch, rollout_logp, rollout_rs="seq_mean_k1", rollout_rs_threshold="0.5_1.5")
    assert mask.all()  # 0.5 <= 1 / 1.8 <= 1.5
    assert our_correction(batch, rollout_logp, cppo.GeometricMask(low=0.5, high=1.5)).count_nonzero() == 0
    assert our_correction(batch, rollout_logp, cppo.GeometricMask(low=1 / 1.5, high=1 / 0.5)).all()


def test_rejected_responses_leave_verls_denominator_and_stay_in_ours():
    batch, rollout_logp = make_corrected_batch(0)
    _, mask = verl_correction(batch, rollout_logp, rollout_rs="seq_mean_k1", rollout_rs_threshold="0.8_1.1")
    method = cppo.GRPO(clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    arguments = {
        "rollout_logp": rollout_logp, "proximal_logp": batch.anchor_logp,
        "correction": cppo.GeometricMask(low=1 / 1.1, high=1 / 0.8),
    }  # fmt: skip
    expected = verl_gradient("vanilla", batch, mask=mask)
    assert_same_gradient(our_gradient(method, batch, **arguments) * batch.mask.sum() / mask.sum(), expected)
    assert_same_gradient(our_gradient(method, batch, denominator=mask.sum(), **arguments), expected)
    expected = verl_gradient("vanilla", batch, "seq-mean-token-mean", mask=mask)
    arguments |= {"reduction": "sequence-mean", "denominator": mask.any(1).sum()}
    assert_same_gradient(our_gradient(method, batch, **arguments), expected)


def test_verls_weights_are_at_least_exp_minus_20_and_both_are_at_most_exp_20():
    batch = at_log_ratios([-30.0, 30.0], [1.0, 1.0])
    batch, rollout_logp = dataclasses.replace(batch, anchor_logp=batch.logp), batch.anchor_logp
    expected, _ = verl_correction(batch, rollout_logp, rollout_is="token", rollout_is_threshold=NEVER)
    found = our_correction(batch, rollout_logp, cppo.TIS(cap=NEVER))
    assert expected[0].tolist() == pytest.approx([math.exp(-20), math.exp(20)])
    assert found[0].tolist() == pytest.approx([math.exp(-30), math.exp(20)])


@pytest.mark.parametrize(
    ("rollout_rs", "threshold", "method"),
    [
        ("seq_max_k2", "250", cppo.TRM(max_threshold=250, divergence="k2")),  # 25 ** 2 / 2; in verl 20 ** 2 / 2
        ("seq_mean_k3", "20", cppo.TRM(max_threshold=None, avg_threshold=20, divergence="k3")),  # 24; in verl 19
    ],
)
def test_verls_estimators_do_not_see_beyond_20_nats(rollout_rs, threshold, method):
    batch = at_log_ratios([-25.0], [1.0])
    batch, rollout_logp = dataclasses.replace(batch, anchor_logp=batch.logp), batch.anchor_logp
    _, mask = verl_correction(batch, rollout_logp, rollout_rs=rollout_rs, rollout_rs_threshold=threshold)
    assert mask.all()
    decision = cppo.decide(method, batch.anchor_logp, rollout_logp, batch.advantages, batch.mask)
    assert not decision.trace.accepted.any()


def test_verls_geometric_mask_counts_a_token_as_no_more_than_20_nats():
    batch = at_log_ratios([-30.0, 0.0], [1.0, 1.0])
    batch, rollout_logp = dataclasses.replace(batch, anchor_logp=batch.logp), batch.anchor_logp
    low, high = math.exp(-12), math.exp(12)  # the mean is -15; in verl -10
    _, mask = verl_correction(batch, rollout_logp, rollout_rs="seq_mean_k1", rollout_rs_threshold=f"{low}_{high}")
    assert mask.all()
    assert our_correction(batch, rollout_logp, cppo.GeometricMask(low=low, high=high)).count_nonzero() == 0


def test_verl_fails_on_a_batch_whose_every_weight_is_dropped():
    batch = tokens([-1.0], [-1.0], [1.0])
    rollout_logp = batch.anchor_logp - 1.0
    with pytest.raises(ZeroDivisionError):  # in the effective sample size, a metric
        verl_correction(batch, rollout_logp, rollout_is="token", rollout_is_threshold="0.5_2.0")
    assert our_correction(batch, rollout_logp, cppo.MIS(low=0.5, high=2.0)).item() == 0


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_weights_normalised_to_mean_1_are_verls_alone(scope):
    batch, rollout_logp = make_corrected_batch(0)
    knobs = {"rollout_is": scope, "rollout_is_threshold": 2.0, "rollout_is_batch_normalize": True}
    expected, _ = verl_correction(batch, rollout_logp, **knobs)
    found = our_correction(batch, rollout_logp, cppo.TIS(scope=scope, cap=2.0))
    mean = found[batch.mask].mean() if scope == "token" else found.amax(1)[batch.mask.any(1)].mean()
    torch.testing.assert_close(found / mean, expected, rtol=1e-7, atol=0.0)
    assert (mean - 1).abs() > 0.01


def test_verls_geo_mean_takes_the_geometric_mean_of_the_weights_where_gmpo_takes_each_tokens_own():
    knobs = {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}
    batch, rollout_logp = make_corrected_batch(0, advantages="response")
    plain = verl_gradient("geo_mean", batch, **knobs)
    for scope in ("sequence", "token"):
        weights, _ = verl_correction(batch, rollout_logp, rollout_is=scope, rollout_is_threshold=2.0)
        expected = verl_gradient("geo_mean", batch, weights=weights, **knobs)
        found = our_gradient(
            cppo.GMPO(), batch, rollout_logp=rollout_logp, proximal_logp=batch.anchor_logp,
            correction=cppo.TIS(scope=scope, cap=2.0), reduction="sequence-mean", denominator=RESPONSES,
        )  # fmt: skip
        log_weights = torch.where(batch.mask, weights.log(), 0.0)
        mean = (log_weights.sum(1, keepdim=True) / batch.mask.sum(1, keepdim=True).clamp(min=1)).exp()
        torch.testing.assert_close(plain * mean, expected, rtol=1e-5, atol=0.0)  # verl adds 1e-10 to a weight
        torch.testing.assert_close(plain * weights, found, rtol=1e-10, atol=0.0)
        assert torch.allclose(found, expected, rtol=1e-5, atol=0.0) == (scope == "sequence")
