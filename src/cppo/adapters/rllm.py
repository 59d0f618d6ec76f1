"""The trust regions of this package as a loss of rLLM, the same on its verl, tinker and fireworks backends.

    algorithm:
      loss_fn: trust_region
      loss_params: {method: cppo, delta: 0.15}       # any knob of the method
      loss_plugins: [cppo.adapters.rllm]             # so that a failed import stops the run

rLLM finds this module by itself where this package is installed (entry point ``rllm.losses``); without
``loss_plugins`` it goes on with a warning, and its backend's default loss, if the module cannot be loaded. The loss is
-k_t A_t a token, reduced by rLLM's ``aggregate``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cppo.methods import Method
from cppo.metrics import decision_metrics, to_floats
from cppo.objective import decide, token_losses

from .sampled_tokens import method_for

try:
    import rllm

    # An older context has one name, mu, for the sampler's log-probs and for those that verl recomputes.
    if "logp_rollout" not in rllm.LossContext.__dataclass_fields__:
        raise ImportError("rllm.LossContext has no logp_rollout: expected an rLLM that tells it from logp_old")
    register_loss = rllm.register_loss
except Exception as error:
    logging.getLogger(__name__).error("cppo.adapters.rllm: cannot be loaded, no loss was registered: %r", error)
    raise

# What rLLM puts among a loss's parameters for its own losses, and verl's backend besides.
_OF_RLLM = ("eps_clip", "eps_clip_high", "clip_ratio_c")


def build_method(params: Mapping[str, Any]) -> Method:
    """Return the method that ``algorithm.loss_params`` describe, beside rLLM's own parameters, which are passed over.

    Args:
        params: ``method`` (a name or a spec such as ``cppo?delta=0.15``) and, for a bare name, its knobs.

    Raises:
        TypeError, ValueError: in one line, naming the key, its value and what was expected.
    """
    knobs = {name: value for name, value in params.items() if name not in _OF_RLLM}
    method = knobs.pop("method", None)
    if method is None:  # no default: where roles have losses of their own, rLLM's verl backend loses loss_params
        raise ValueError("algorithm.loss_params.method: missing; expected a method, such as cppo")
    if knobs.pop("kl_beta", 0):
        raise ValueError(
            f"algorithm.kl_beta={params['kl_beta']!r}: expected 0; rLLM leaves the KL term to a loss, and this has none"
        )
    return method_for("rLLM", method, **knobs)


def trust_region(ctx: Any) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of one context (a micro-batch ``[B, T]``, or a datum ``[T]``), and its metrics.

    Args:
        ctx: rLLM's ``LossContext``; the response's tokens are those of ``action_mask``.

    Raises:
        TypeError, ValueError: as :func:`build_method`; if the sampler's log-probs are missing.
    """
    method = build_method(ctx.params)
    if ctx.logp_rollout is None:
        raise ValueError(
            "ctx.logp_rollout: expected the sampler's log-probs, got None; set "
            "actor_rollout_ref.rollout.calculate_log_probs=True"
        )
    # A datum is a batch of one response.
    token_tensors = (ctx.logp_curr, ctx.logp_rollout, ctx.advantages, ctx.action_mask)
    logp, rollout_logp, advantages, mask = map(torch.atleast_2d, token_tensors)
    decision = decide(method, logp, rollout_logp, advantages, mask)
    losses = token_losses(decision, logp).view_as(ctx.logp_curr)
    metrics = decision_metrics(decision)
    metrics.pop("input/first_nonfinite")  # a place in this call; rLLM's mean over calls would mean nothing
    return ctx.aggregate(losses, ctx.action_mask), to_floats(metrics)


# rLLM prefers a backend's own loss of that name, and this package registers cppo with verl, where loss_params do not
# reach it: hence a name that no backend has. Under the other, the loss runs where rLLM itself runs it.
for _name in ("trust_region", "cppo"):
    register_loss(_name)(trust_region)
