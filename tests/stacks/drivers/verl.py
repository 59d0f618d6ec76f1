"""verl's own ppo_loss on jagged rows, with the adapter's loss in its registry."""

import dataclasses

import torch
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss

import cppo
from cppo.adapters.verl import TrustRegionLoss

PROMPT = 2


def jagged(values, lengths, before=0, after=0):
    rows = [torch.nn.functional.pad(row[:n], (before, after)) for row, n in zip(values, lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def gradient(spec, batch):
    """Return the gradient of verl's token mean by each log-prob, times the number of tokens, ``[B, T]``."""
    lengths = [max(n, 1) for n in batch.lengths]  # verl keeps one masked token of an empty response
    method = cppo.parse_method(spec)
    knobs = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    data = tensordict_utils.get_tensordict(
        {
            "prompts": torch.nested.as_nested_tensor([torch.zeros(PROMPT)] * len(lengths), layout=torch.jagged),
            "responses": jagged(torch.zeros_like(batch.logp), lengths),
            "response_mask": jagged(batch.mask.long(), lengths),
            "old_log_probs": jagged(batch.rollout_logp, lengths),
            "advantages": jagged(batch.advantages[:, None].expand(batch.logp.shape), lengths),
        },
        {"dp_size": 1, "batch_num_tokens": int(batch.mask.sum()), "global_batch_size": len(lengths)},
    )
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        policy_loss=TrustRegionLoss(loss_mode=cppo.methods.method_name(method), **knobs),
    )  # fmt: skip
    # The model's output at a position is the log-prob of the next token.
    leaf = jagged(batch.logp, lengths, before=PROMPT - 1, after=1).requires_grad_()
    ppo_loss(config, {"log_probs": leaf}, data)[0].backward()
    found = torch.zeros_like(batch.logp)
    for row, part in enumerate(leaf.grad.unbind()):
        found[row, : lengths[row]] = part[PROMPT - 1 : -1]
    return found * batch.mask.sum()
