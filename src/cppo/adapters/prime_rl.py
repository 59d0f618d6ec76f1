"""The trust regions of this package as the custom loss of prime-rl.

    [trainer.loss]
    type = "custom"
    import_path = "cppo.adapters.prime_rl.trust_region_loss"
    kwargs = { method = "cppo", delta = 0.15 }               # any knob of the method

prime-rl calls the loss once a sequence (a prompt and all its turns), sums what it returns and divides by the tokens of
the optimizer step. It gathers a sequence that context parallelism cut before it calls.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from cppo.methods import Method
from cppo.metrics import decision_metrics
from cppo.objective import decide, token_losses

from .sampled_tokens import method_for


def check(method: Method | str = "cppo", *, kl_tau: float = 0.0, **knobs: Any) -> Method:
    """Return the method that ``[trainer.loss] kwargs`` describe; prime-rl itself reads them in the first step only.

    Args:
        method: a method's name or spec.
        kl_tau: as in :func:`trust_region_loss`.
        **knobs: the method's knobs, where ``method`` is a bare name.

    Raises:
        TypeError, ValueError: in one line, naming the key, its value and what was expected.
    """
    if type(kl_tau) not in (int, float) or not 0 <= kl_tau < math.inf:
        raise ValueError(f"kl_tau={kl_tau!r}: expected a number in [0, inf)")
    return method_for("prime-rl", method, **knobs)


def trust_region_loss(inputs: Any, method: Method | str = "cppo", *, kl_tau: float = 0.0, **knobs: Any) -> Any:
    """Return sum_t loss_weights_t (-k_t A_t + kl_tau log^2(pi/mu)_t) of one sequence, and its metrics.

    Args:
        inputs: prime-rl's ``LossInputs``, tensors ``[seq]``: the response's tokens are those of ``loss_mask``.
        method: a method's name or spec, such as ``cppo?delta=0.15``.
        kl_tau: weight of the squared log-ratio that prime-rl's own losses add at every response token (theirs is
            1e-3); 0: the method alone.
        **knobs: the method's knobs, where ``method`` is a bare name.

    Returns:
        prime-rl's ``LossOutputs``; the metrics are 0-d tensors, which prime-rl averages over sequences.

    Raises:
        TypeError, ValueError: as :func:`check`.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    # Built anew a sequence: 10 microseconds beside the millisecond of the verdict.
    region = check(method, kl_tau=kl_tau, **knobs)
    mask = inputs.loss_mask[None]
    logp, rollout_logp = inputs.trainer_logprobs[None], inputs.inference_logprobs[None]
    decision = decide(region, logp, rollout_logp, inputs.advantages[None], mask)
    losses = token_losses(decision, logp)
    if kl_tau:
        # A product with the mask would not stop a NaN of the prompt or of padding.
        usable = decision.batch.tokens().usable
        log_ratio = torch.where(usable, logp, 0.0) - torch.where(usable, rollout_logp, 0.0)
        losses = losses + kl_tau * log_ratio.square()
    if inputs.loss_weights is not None:
        losses = losses * torch.where(mask, inputs.loss_weights, 0.0)
    metrics = decision_metrics(decision)
    metrics.pop("input/first_nonfinite")  # a place in this sequence; its mean over sequences would mean nothing
    return LossOutputs(loss=losses.sum(), metrics=metrics)
