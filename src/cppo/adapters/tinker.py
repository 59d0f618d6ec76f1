"""The trust regions of this package as custom losses of tinker.

    loss_fn = cppo.adapters.tinker.loss_function("cppo", delta=0.15)
    future = training_client.forward_backward_custom(data, loss_fn)

A datum is one response behind its prompt, as tinker-cookbook assembles it: position t holds the log-prob of
``target_tokens[t]``; ``loss_fn_inputs`` has ``logprobs`` (the sampler's), ``advantages`` and ``mask`` (1 at the tokens
that the policy wrote) of the same length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cppo.methods import Method
from cppo.metrics import decision_metrics, to_floats
from cppo.objective import decide, token_losses

from .sampled_tokens import method_for

CustomLoss = Callable[[Sequence[Any], Sequence[Tensor]], tuple[Tensor, dict[str, float]]]


def loss_function(
    method: Method | str = "cppo",
    *,
    rollout_logp: Sequence[Any] | None = None,
    advantages: Sequence[Any] | None = None,
    mask: Sequence[Any] | None = None,
    denominator: float = 1.0,
    **knobs: Any,
) -> CustomLoss:
    """Return a loss for ``TrainingClient.forward_backward_custom``: sum over tokens of -k_t A_t, over ``denominator``.

    Args:
        method: a method, its name, or a spec such as ``cppo?delta=0.15``.
        rollout_logp: one 1-D tensor, list or ``TensorData`` a datum: the sampler's log-probs; None: each datum's own
            ``loss_fn_inputs["logprobs"]``. An SDK older than 0.38 refuses such keys in a datum: give all three here.
        advantages: likewise; None: ``loss_fn_inputs["advantages"]``.
        mask: likewise; None: ``loss_fn_inputs["mask"]``.
        denominator: what to divide the sum by, > 0; 1: nothing, as tinker's own losses do. For a token mean, the
            response tokens of the optimizer step, in however many calls.
        **knobs: the method's knobs, where ``method`` is a bare name.

    Returns:
        ``fn(data, logprobs) -> (loss, metrics)``.

    Raises:
        TypeError, ValueError: for a method or knob, at once; for data without what the loss needs, when it is called.
    """
    region = method_for("tinker", method, **knobs)
    if type(denominator) not in (int, float) or not 0 < denominator < math.inf:
        raise ValueError(f"denominator={denominator!r}: expected a number in (0, inf)")

    def custom_loss(data: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        columns = (
            _column("logprobs", "rollout_logp", rollout_logp, data, logprobs),
            _column("advantages", "advantages", advantages, data, logprobs),
            _column("mask", "mask", mask, data, logprobs),
        )
        logp = torch.cat(list(logprobs))
        # Without the empty ones there are as many responses as tokens only if each has one token: else advantages
        # could be taken for one number a response.
        decision = decide(region, logp, *columns, lengths=[len(part) for part in logprobs if len(part)])
        metrics = decision_metrics(decision)
        metrics.pop("input/first_nonfinite")  # a place in this call's concatenation, which nobody has
        return token_losses(decision, logp).sum() / denominator, to_floats(metrics)

    return custom_loss


def _column(
    key: str, argument: str, given: Sequence[Any] | None, data: Sequence[Any], logprobs: Sequence[Tensor]
) -> Tensor:
    """Return one input of all datums, concatenated like their log-probs."""
    if given is not None and len(given) != len(logprobs):
        raise ValueError(f"{argument}: expected one entry a datum, {len(logprobs)}, got {len(given)}")
    parts = []
    for index, (datum, logp) in enumerate(zip(data, logprobs, strict=True)):
        if given is not None:
            name, value = f"{argument}[{index}]", given[index]
        else:
            name, value = f"data[{index}].loss_fn_inputs[{key!r}]", datum.loss_fn_inputs.get(key)
            if value is None:
                raise ValueError(f"{name}: missing; put it there, or give loss_function all datums' as {argument}=")
        part = value.to_torch() if hasattr(value, "to_torch") else torch.as_tensor(value)
        if logp.dim() != 1 or part.shape != logp.shape:
            raise ValueError(f"{name}: expected 1-D, like target_tokens {list(logp.shape)}, got {list(part.shape)}")
        parts.append(part.to(logp))
    return torch.cat(parts)
