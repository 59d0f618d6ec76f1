"""tinker's own custom-loss path without its server: what the SDK sends for the forward pass, and for the backward."""

import tinker
import torch
from tinker import Datum, ForwardBackwardOutput, ModelInput, TensorData, TrainingClient

from cppo.adapters.tinker import loss_function

PROMPT = 3  # of which the first is no target
KEYS = ("logprobs", "advantages", "mask")
VERSION = tinker.__version__


def column(values, prompt=0.0):
    """Return one datum's column: the prompt's targets, then the response."""
    return torch.nn.functional.pad(values.float(), (PROMPT - 1, 0), value=prompt)


def as_tinker_cookbook_has_it(batch, junk=0.0):
    """Return one datum a response: inputs shifted against targets, the three columns beside."""
    data = []
    advantages = batch.advantages.expand(batch.logp.T.shape).T if batch.advantages.dim() == 1 else batch.advantages
    for row, n in enumerate(batch.lengths):
        tokens = torch.arange(PROMPT + n)
        inputs = {
            "target_tokens": tokens[1:],
            "logprobs": column(batch.rollout_logp[row, :n], junk),
            "advantages": column(advantages[row, :n], junk),
            "mask": column(batch.mask[row, :n]),
        }
        inputs = {key: TensorData.from_torch(values) for key, values in inputs.items()}
        data.append(Datum(model_input=ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs))
    return data


def stripped(data):
    """Return data as SDKs before 0.38 want them, and the three columns as lists."""
    bare = [
        Datum(model_input=datum.model_input, loss_fn_inputs={"target_tokens": datum.loss_fn_inputs["target_tokens"]})
        for datum in data
    ]
    return bare, {key: [datum.loss_fn_inputs[key] for datum in data] for key in KEYS}


def run(batch, loss_fn, data=None, junk=-1.0):
    """Return (loss, metrics, gradient [B, T]) as the SDK computes them for the server's backward pass."""
    data = as_tinker_cookbook_has_it(batch) if data is None else data
    sent = TrainingClient._get_custom_loss_forward_data(None, data, "cross_entropy")
    assert all(set(datum.loss_fn_inputs) == {"target_tokens", "weights"} for datum in sent)
    outputs = [
        {"logprobs": TensorData.from_torch(column(row[:n], junk))}
        for row, n in zip(batch.logp, batch.lengths, strict=True)
    ]
    forward = ForwardBackwardOutput(loss_fn_output_type="logprobs", loss_fn_outputs=outputs, metrics={})
    result = TrainingClient._compute_custom_loss(data, loss_fn, forward)
    # The server's cross-entropy is -sum(weights * logprobs).
    gradient = torch.zeros_like(batch.logp)
    for row, (datum, n) in enumerate(zip(result.data, batch.lengths, strict=True)):
        part = -datum.loss_fn_inputs["weights"].to_torch()
        assert not part[: PROMPT - 1].any()
        gradient[row, :n] = part[PROMPT - 1 :]
    return result.loss_sum, result.metrics, gradient


def gradient(spec, batch):
    """Return the gradient of the loss by each log-prob, ``[B, T]``; tinker's losses are sums."""
    return run(batch, loss_function(spec))[2]
