"""One batch for every stack; each must make of it the gradient -k_t A_t by log pi(y_t), before any reduction."""

import dataclasses

import torch

import cppo

# Of every kind of rule one; that the others arrive is the shared mechanism's (cppo.adapters.sampled_tokens).
SPECS = (
    "cppo?delta=0.1&delta_b=0.01", "cppo?delta=0.1&delta_b=0.01&divergence=binary_kl", "cppo?budget=fixed&delta_b=0.02",
    "dppo?delta=0.1", "grpo", "gspo", "policy_gradient",
)  # fmt: skip
LENGTHS = (11, 1, 7, 14, 0, 9)
WIDTH = 14
SEED = 5


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of whole responses, padded on the right; holes inside the mask are a tool's output. float32."""

    logp: torch.Tensor  # [B, T]
    rollout_logp: torch.Tensor  # [B, T]
    advantages: torch.Tensor  # [B]
    mask: torch.Tensor  # [B, T] bool

    @property
    def lengths(self):
        """Return each row's tokens, a tool's among them."""
        return LENGTHS


def make_batch(seed=SEED):
    """Return a batch in which thresholds and budgets are reached by some tokens and not by others."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), WIDTH)
    rollout_logp = -torch.rand(shape, generator=generator) * 2
    logp = (rollout_logp + 0.3 * torch.randn(shape, generator=generator)).clamp(max=-1e-3)
    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    mask[0, 3:5] = mask[3, 6] = mask[5, 0] = False
    # What a stack finds outside the policy's tokens: padding and a tool's output have no log-prob.
    logp, rollout_logp = (torch.where(mask, values, 0.0) for values in (logp, rollout_logp))
    return Batch(logp, rollout_logp, torch.randn(len(LENGTHS), generator=generator), mask)


def core(method, batch, mask=None, **reduction):
    """Return the core's gradient of a method or spec on the batch, ``[B, T]``, and all that ``policy_loss`` returns."""
    method = cppo.methods.parse_method(method) if isinstance(method, str) else method
    leaf, mask = batch.logp.clone().requires_grad_(), batch.mask if mask is None else mask
    out = cppo.policy_loss(method, leaf, batch.rollout_logp, batch.advantages, mask, **reduction)
    out.loss.backward()
    return leaf.grad, out


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
