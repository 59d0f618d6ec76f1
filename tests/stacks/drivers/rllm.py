"""rLLM's way from a configuration to a loss on two backends: its own code where CPPO_RLLM names a checkout.

rLLM's loss registry is in no release. Without a checkout a stand-in makes the call that rLLM documents: a loss found by
name, called with a ``LossContext`` (verl: a micro-batch; tinker: one datum), reduced by the context's ``aggregate``.
verl's ``agg_loss`` and tinker's SDK are the real ones either way.
"""

import dataclasses
import importlib
import os
import sys
import types
from typing import Any

import torch
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig, PolicyLossConfig

from drivers import tinker as tinker_driver
from drivers.prime_rl import present

CHECKOUT = os.environ.get("CPPO_RLLM")
PROMPT = 2
# What rLLM puts beside loss_params.
DEFAULTS = {"eps_clip": 0.2, "eps_clip_high": None, "kl_beta": 0.0}


@dataclasses.dataclass
class LossContext:
    logp_curr: torch.Tensor
    logp_old: torch.Tensor
    advantages: torch.Tensor
    action_mask: torch.Tensor
    obs_mask: torch.Tensor
    aggregate: Any
    logp_ref: torch.Tensor | None = None
    logp_rollout: torch.Tensor | None = None
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    backend: str = ""


def stand_in(context=LossContext):
    """Return a module ``rllm`` with a registry of its own."""
    module = types.ModuleType("rllm")
    module.LossContext, module.registry = context, {}

    def register_loss(name):
        return lambda loss: module.registry.setdefault(name, loss)

    module.register_loss = register_loss
    return module


def load(rllm):
    """Return the adapter, imported beside that ``rllm``, and only there."""
    name = "cppo.adapters.rllm"
    loaded = sys.modules.pop(name, None)
    try:
        with present({"rllm": rllm}):
            return importlib.import_module(name)
    finally:
        sys.modules.pop(name, None)
        if loaded is not None:
            sys.modules[name] = loaded


if CHECKOUT is None:
    rllm = stand_in()
    adapter = load(rllm)
else:
    sys.path.insert(0, CHECKOUT)
    import rllm
    from rllm.trainer.algorithms.config import AlgorithmConfig
    from rllm.trainer.algorithms.loss import native_loss_names, resolve_loss
    from rllm.trainer.tinker.custom_loss import build_custom_loss
    from rllm.trainer.verl.verl_backend import CustomPPOLoss

    adapter = importlib.import_module("cppo.adapters.rllm")


def resolve(backend, params, *, name="trust_region", aggregation="token-mean", **others):
    """Return the loss that an ``algorithm`` section selects on a backend, with its parameters; None: the backend's."""
    if CHECKOUT is None:
        merged = DEFAULTS | {key: value for key, value in others.items() if key in DEFAULTS} | params
        return types.SimpleNamespace(name=name, fn=rllm.registry[name], params=merged, agg_mode=aggregation)
    config = AlgorithmConfig(
        loss_fn=name, loss_params=params, loss_plugins=["cppo.adapters.rllm"], loss_agg_mode=aggregation, **others
    )
    return resolve_loss(config, native_losses=native_loss_names(backend))


def _managed(resolved, data):
    """Return what ``forward_backward_custom`` is given: data, and a loss over all of them."""
    if CHECKOUT is not None:
        return build_custom_loss(resolved, data)
    bare, columns = tinker_driver.stripped(data)
    columns = {key: [values.to_torch() for values in rows] for key, rows in columns.items()}

    a_sequence = resolved.agg_mode == "seq-mean-token-mean"

    def aggregate(losses, mask):
        assert losses.shape == mask.shape
        return (losses * mask).sum() / (mask.sum().clamp(min=1) if a_sequence else 1)

    def loss(_, logprobs):
        total, count, sums = 0.0, torch.zeros(()), {}
        for logp, rollout_logp, advantages, mask in zip(logprobs, *columns.values(), strict=True):
            context = LossContext(
                logp, rollout_logp, advantages, mask, 1 - mask, aggregate,
                logp_rollout=rollout_logp, params=resolved.params, backend="managed",
            )  # fmt: skip
            part, metrics = resolved.fn(context)
            total, count = total + part, count + (mask.any() if a_sequence else mask.sum())
            sums = {key: sums.get(key, 0.0) + float(value) for key, value in metrics.items()}
        return total / count.clamp(min=1), {key: value / len(logprobs) for key, value in sums.items()}

    return bare, loss


def run_tinker(batch, params, **others):
    """Return (loss, metrics, gradient [B, T]) on rLLM's tinker backend; fireworks takes the same way."""
    data, loss = _managed(resolve("tinker", params, **others), tinker_driver.as_tinker_cookbook_has_it(batch))
    return tinker_driver.run(batch, loss, data)


def run_verl(batch, params, *, old_logp=None, captured=True, dp_size=1, tokens=None, junk=0.0, **others):
    """Return (loss, metrics, gradient [B, T]) of one micro-batch on rLLM's verl backend, of ``tokens`` in the step."""
    resolved = resolve("verl", params, **others)
    aggregation = others.get("aggregation", "token-mean")
    lengths = torch.tensor(batch.lengths)
    inside = torch.arange(batch.logp.shape[1]) < lengths[:, None]
    advantages = batch.advantages[:, None].expand(batch.logp.shape)
    tensors = {
        "response_mask": batch.mask.long(),
        # The trainer's own, recomputed before the update: no drift to be seen.
        "old_log_probs": batch.logp if old_logp is None else old_logp,
        "advantages": torch.where(batch.mask, advantages, junk),
    }
    if captured:
        tensors["rollout_log_probs"] = torch.where(batch.mask, batch.rollout_logp, junk)
    counts = {
        "dp_size": dp_size, "batch_num_tokens": tokens or int(batch.mask.sum()), "global_batch_size": len(lengths)
    }  # fmt: skip
    leaf = batch.logp.clone().requires_grad_()
    if CHECKOUT is None:
        context = LossContext(
            leaf, tensors["old_log_probs"], tensors["advantages"], batch.mask.float(), (inside & ~batch.mask).float(),
            lambda losses, mask: agg_loss(loss_mat=losses, loss_mask=mask, loss_agg_mode=aggregation, **counts),
            logp_rollout=tensors.get("rollout_log_probs"), params=resolved.params | {"clip_ratio_c": 3.0},
            backend="verl",
        )  # fmt: skip
        loss, metrics = resolved.fn(context)
    else:
        config = ActorConfig(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=aggregation,
            policy_loss=PolicyLossConfig(loss_mode=resolved.name),
        )  # fmt: skip
        attention = torch.nn.functional.pad(inside.long(), (PROMPT, 0), value=1)
        tensors |= {
            "prompts": torch.ones(len(lengths), PROMPT, dtype=torch.long), "responses": inside.long(),
            "attention_mask": attention,
        }  # fmt: skip
        # The model's output at a position is the log-prob of the next token.
        pad = torch.nn.functional.pad
        outputs = torch.cat([pad(row[:n], (PROMPT - 1, 1)) for row, n in zip(leaf, lengths, strict=True)])
        backend_loss = CustomPPOLoss(config, loss_params=resolved.params, pad_token_id=0)
        data = tensordict_utils.get_tensordict(tensors, counts)
        loss, metrics = backend_loss({"log_probs": outputs}, data)
        metrics = {
            key.removeprefix("actor/"): metric.aggregate() for key, metric in metrics.items() if key != "actor/pg_loss"
        }
    loss.backward()
    return loss.detach(), metrics, leaf.grad


def gradient(spec, batch, backend="tinker"):
    """Return the gradient of rLLM's loss by each log-prob, times its denominator, ``[B, T]``."""
    run = {"tinker": run_tinker, "verl": run_verl}[backend]
    return run(batch, {"method": spec})[2] * batch.mask.sum()
