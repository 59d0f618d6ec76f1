"""tinker: what the SDK computes on this machine between the server's forward pass and its backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cppo.doctor.batch import PROMPT, Batch
from cppo.methods import Method


def gradient(method: Method, batch: Batch) -> Tensor:
    """Return the gradient of the loss by each log-prob, ``[B, T]``; tinker's losses are sums."""
    from cppo.adapters.tinker import loss_function

    return custom_loss(batch, data_of(batch), loss_function(method))


def custom_loss(batch: Batch, data: list[Any], loss: Any) -> Tensor:
    """Return the gradient ``[B, T]`` that the SDK sends for that loss."""
    from tinker import ForwardBackwardOutput, TensorData, TrainingClient

    outputs = [{"logprobs": TensorData.from_torch(row)} for row in columns(batch.logp, batch)]
    forward = ForwardBackwardOutput(loss_fn_output_type="logprobs", loss_fn_outputs=outputs, metrics={})
    sent = TrainingClient._compute_custom_loss(data, loss, forward).data
    found = torch.zeros_like(batch.logp)
    for row, (datum, n) in enumerate(zip(sent, batch.lengths, strict=True)):
        # The server's cross-entropy is -sum(weights * logprobs).
        found[row, :n] = -datum.loss_fn_inputs["weights"].to_torch()[PROMPT - 1 :]
    return found


def data_of(batch: Batch) -> list[Any]:
    """Return a datum a response, as tinker-cookbook assembles it."""
    from tinker import Datum, ModelInput, TensorData

    data = []
    inputs = (batch.rollout_logp, batch.advantages, batch.mask)
    for n, *row in zip(batch.lengths, *(columns(values, batch) for values in inputs), strict=True):
        tokens = torch.arange(PROMPT + n)
        named = {"target_tokens": tokens[1:]} | dict(zip(("logprobs", "advantages", "mask"), row, strict=True))
        fields = {key: TensorData.from_torch(values) for key, values in named.items()}
        data.append(Datum(model_input=ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=fields))
    return data


def columns(values: Tensor, batch: Batch) -> list[Tensor]:
    """Return what stands at a datum's targets, a datum at a time: those of the prompt, then the response."""
    pad = torch.nn.functional.pad
    return [pad(row[:n].float(), (PROMPT - 1, 0)) for row, n in zip(values, batch.lengths, strict=True)]
