"""What the comparisons with verl share: crafted batches, verl's own losses and corrections, and ours beside them.

Every reference is verl's own code with verl's own configuration objects, differentiated by autograd. What verl calls
the old log-probs is the anchor of ratio and divergence: our ``rollout_logp``, or ``proximal_logp`` under a correction.
"""

import dataclasses

import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig, PolicyLossConfig

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


def make_corrected_batch(seed, *, advantages="token"):
    """Return a batch, its anchor the trainer's recomputation, and the log-probs of an engine that differs from it."""
    batch = make_batch(seed, advantages=advantages)
    generator = torch.Generator().manual_seed(seed + 1000)
    anchor = batch.anchor_logp
    mismatch = torch.tensor([0.5, 3e-4, 0.05, 1.5])[torch.arange(RESPONSES) % 4, None]
    noise = torch.randn(anchor.shape, generator=generator, dtype=torch.float64)
    return batch, torch.nn.functional.logsigmoid(anchor - torch.log(-torch.expm1(anchor)) + mismatch * noise)


def mismatched(log_ratios, advantages):
    """Return one response on the policy, and an engine's log-probs: the policy is these log-ratios away from them."""
    batch = at_log_ratios(log_ratios, advantages)
    return dataclasses.replace(batch, anchor_logp=batch.logp), batch.anchor_logp


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


def assert_same_gradient(found, expected):
    """In float64 each token to 1e-10 of its own size, and the same zeros; in float32 all to 1e-6 of the largest."""
    assert found.dtype == expected.dtype
    largest = expected.abs().max().item()
    assert largest > 0
    rtol, atol = (1e-10, 1e-14 * largest) if expected.dtype == torch.float64 else (0.0, 1e-6 * largest)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    if expected.dtype == torch.float64:
        assert torch.equal(found == 0, expected == 0)


def as_the_engine_has_it(batch, *, prompt=2, **counts):
    """Return (log_probs of the model's outputs, data, each row's length): jagged, the empty response of one token."""
    lengths = (batch.mask * torch.arange(1, WIDTH + 1)).amax(1).clamp(min=1).tolist()

    def jagged(values, before=0, after=0):
        pad = torch.nn.functional.pad
        rows = [pad(row[:length], (before, after)) for row, length in zip(values, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    data = tensordict_utils.get_tensordict(
        {
            "prompts": torch.nested.as_nested_tensor([torch.zeros(prompt)] * RESPONSES, layout=torch.jagged),
            "responses": jagged(torch.zeros_like(batch.logp)),
            "response_mask": jagged(batch.mask.long()),
            "old_log_probs": jagged(batch.anchor_logp),
            "advantages": jagged(batch.advantages),
        },
        counts,
    )
    # The model's output at a position is the log-prob of the next token.
    return jagged(batch.logp, before=prompt - 1, after=1).requires_grad_(), data, lengths


def of_the_responses(gradient, *, prompt=2):
    """Return the gradient of each response's log-probs, of that of the model's outputs."""
    return [row[prompt - 1 : -1] for row in gradient.unbind()]


def verl_correction(batch, rollout_logp, **knobs):
    """Return (rollout_is_weights, response_mask) as verl's trainer computes them."""
    weights, mask, _ = compute_rollout_correction_and_rejection_mask(
        old_log_prob=batch.anchor_logp, rollout_log_prob=rollout_logp, response_mask=batch.mask, **knobs
    )
    return None if weights is None else weights.batch["rollout_is_weights"], mask


def verl_rejection_mask(batch, rollout_logp, rollout_rs, threshold):
    return verl_correction(batch, rollout_logp, rollout_rs=rollout_rs, rollout_rs_threshold=threshold)[1]


def our_correction(batch, rollout_logp, correction):
    """Return the correction's weights."""
    decision = cppo.decide(
        cppo.PolicyGradient(), batch.logp, rollout_logp, batch.advantages, batch.mask,
        proximal_logp=batch.anchor_logp, correction=correction,
    )  # fmt: skip
    return decision.trace.correction


def our_corrected_gradient(method, batch, rollout_logp, correction, **arguments):
    return our_gradient(
        method, batch, rollout_logp=rollout_logp, proximal_logp=batch.anchor_logp, correction=correction, **arguments
    )


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
