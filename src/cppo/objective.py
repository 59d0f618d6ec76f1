"""``decide`` and ``policy_loss``: a trust region's verdict on every token, and the loss that follows from it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .decision import Decision
from .inputs import check_batch, check_reduction
from .methods import Correction, Method
from .metrics import decision_metrics
from .ops.context_parallel import ContextParallel
from .ops.reduction import Reduction, linear_loss, loss_denominator, loss_scale


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyLoss:
    """The loss (0-d, differentiable in ``logp``), the decision behind it and what a run logs about it.

    ``loss`` is the surrogate's value, -sum k_t A_t / denominator; its gradient is what matters.
    """

    loss: Tensor
    decision: Decision

    @functools.cached_property
    def metrics(self) -> dict[str, Tensor]:
        """0-d tensors, no host synchronisation; computed on first use. See :mod:`cppo.metrics`."""
        return decision_metrics(self.decision)


def decide(
    method: Method,
    logp: Tensor,
    rollout_logp: Tensor,
    advantages: Tensor,
    response_mask: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    divergence: Tensor | None = None,
    rollout_entropy: Tensor | None = None,
    proximal_logp: Tensor | None = None,
    correction: Correction | Sequence[Correction] | None = None,
    context_parallel: ContextParallel | None = None,
) -> Decision:
    """Judge every token of a batch of responses.

    Padded layout: token tensors are ``[B, T]``; ``response_mask`` says which tokens the policy wrote (padding may be
    left, right or inside; tool spans count as padding). Packed layout: token tensors are ``[N]`` and ``lengths`` says
    how many belong to each response. Positions come from the mask, never from columns: the same response gets the
    same decision in any batch, width, padding side and layout.

    Args:
        method: a method from :data:`cppo.METHODS`.
        logp: log pi(y_t) under the current policy, floating, at the sampling temperature. Detached here.
        rollout_logp: log mu(y_t) as the sampler computed it, same shape.
        advantages: ``[B]``, one a row or packed segment, or token-shaped. Packed, ``[N, 1]`` is one a token whatever N
            is; ``[N]`` is too, unless N = B.
        response_mask: token-shaped; bool, or 0 and 1 (looked at on a CPU; elsewhere all but 0 counts as True, looking
            would stall the device); None: every token.
        lengths: packed layout only: ``[B]`` integers that sum to N. Checked on the host for a list or a CPU tensor;
            on an accelerator a wrong sum is not seen (looking would stall it).
        divergence: token-shaped D_t in [0, 1e15], for a method with a top-K or exact divergence, and no other. Finite
            values outside count as the nearer end.
        rollout_entropy: token-shaped, nats, >= 0: the rollout policy's entropy at each token, for a method that needs
            it (ESTR).
        proximal_logp: token-shaped log q(y_t): the trainer's own log-probs at the weights that sampled. With it the
            method's ratio and divergence are taken to q, and ``correction`` weighs by q / mu.
        correction: one of :data:`cppo.CORRECTIONS`, or one that weighs and masks (``GeometricMask``) besides: the
            mismatch between the sampling engine and the trainer. Needs ``proximal_logp``.
        context_parallel: how the responses are cut over ranks, if they are: each rank passes its own tokens and gets
            the uncut response's decision on them. Numbers a response are exchanged, no tokens. All ranks must call.

    Returns:
        A :class:`Decision`; its tensors are float32, or float64 if a log-prob tensor is.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Numerics: log-ratios and divergences in float32 or wider; the account, and sums and means over a response, in
    float64. A response token of which any number given (log-prob, advantage, divergence, entropy) is NaN or infinite is
    rejected alone (``rejected_by`` 3) and counted in the metrics. It keeps its place. If its advantage is what is
    broken, its divergence and ratio count as ever; otherwise it spends nothing, and enters means and products with a
    ratio of 1. Padding may hold anything. Nothing here makes the host wait for the device. Between layouts only an
    exact tie between inexact numbers may differ: the sums round in another order, by 1e-16 of their size.
    """
    with torch.no_grad():
        batch = check_batch(
            method, logp, rollout_logp, advantages, response_mask,
            lengths=lengths, divergence=divergence, rollout_entropy=rollout_entropy,
            proximal_logp=proximal_logp, correction=correction, context_parallel=context_parallel,
        )  # fmt: skip
        decision = Decision.of(method, batch)
        _ = decision.gate
        return decision


def token_losses(decision: Decision, logp: Tensor) -> Tensor:
    """Return -k_t A_t (1 + log pi(y_t) - [log pi(y_t)]) a token, for a framework that sums and divides by itself.

    [.] is taken without gradient: the value is -k_t A_t, and so is the gradient with respect to logp_t (Eq. 11).

    Args:
        decision: what :func:`decide` answered for this ``logp``.
        logp: as in :func:`decide`, with its graph; the only argument through which gradient flows.

    Returns:
        Token-shaped, in the wider of the decision's dtype and ``logp``'s; exactly 0, value and gradient, outside the
        response and at a rejected token, whatever stands there.
    """
    kept = decision.coefficient != 0
    # A rejected token's advantage or log-prob may be NaN: it must meet neither a product nor a gradient.
    weight = torch.where(kept, decision.coefficient * decision.batch.advantages, 0.0)
    logp = torch.where(kept, logp, 0.0)
    return -weight * (1 + logp - logp.detach())


def policy_loss(
    method: Method,
    logp: Tensor,
    rollout_logp: Tensor,
    advantages: Tensor,
    response_mask: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    divergence: Tensor | None = None,
    rollout_entropy: Tensor | None = None,
    proximal_logp: Tensor | None = None,
    correction: Correction | Sequence[Correction] | None = None,
    context_parallel: ContextParallel | None = None,
    reduction: Reduction = "token-mean",
    denominator: float | Tensor | None = None,
    fixed_length: int | None = None,
) -> PolicyLoss:
    """Return the loss whose gradient with respect to logp_t is -k_t A_t / denominator (Eq. 11).

    Args:
        method: a method from :data:`cppo.METHODS`.
        logp: as in :func:`decide`; the only argument through which gradient flows.
        rollout_logp: as in :func:`decide`.
        advantages: as in :func:`decide`.
        response_mask: as in :func:`decide`.
        lengths: as in :func:`decide`.
        divergence: as in :func:`decide`.
        rollout_entropy: as in :func:`decide`.
        proximal_logp: as in :func:`decide`.
        correction: as in :func:`decide`.
        context_parallel: as in :func:`decide`; the ranks' losses, and gradients, sum to the uncut batch's.
        reduction: "token-mean": divide by the batch's response tokens (DAPO); "sequence-mean": mean over non-empty
            responses of their token means (GRPO); "fixed-length": token sums over ``fixed_length``, mean over
            non-empty responses (Dr. GRPO). Rejected tokens stay in every denominator, padding never is. Which one a
            method was published with stands in its ``summary.reduction``.
        denominator: replaces the token count (token-mean) or the response count (the others): the whole optimizer
            batch's, where this call sees a part of it (gradient accumulation, data parallel).
        fixed_length: the constant of "fixed-length", a positive integer.

    Returns:
        A :class:`PolicyLoss` with ``loss``, ``decision`` and ``metrics``.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Numerics: as :func:`decide`. The gradient is computed in closed form and returned in ``logp``'s dtype.
    """
    check_reduction(reduction, denominator, fixed_length)
    with torch.no_grad():
        batch = check_batch(
            method, logp, rollout_logp, advantages, response_mask,
            lengths=lengths, divergence=divergence, rollout_entropy=rollout_entropy,
            proximal_logp=proximal_logp, correction=correction, context_parallel=context_parallel,
        )  # fmt: skip
        total = loss_denominator(batch.layout, reduction, denominator, batch.dtype)
        weights = torch.empty(batch.layout.shape, dtype=batch.dtype, device=logp.device)
        decision = Decision.of(method, batch)
        for block, where, gate, ratio in decision.parts():
            part = torch.mul(gate, ratio, out=weights[where])
            part.mul_(loss_scale(block.advantages, block.layout, reduction, total, fixed_length))
    return PolicyLoss(linear_loss(logp, weights), decision)
