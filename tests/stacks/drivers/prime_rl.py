"""prime-rl's loss on one packed micro-batch: its own loss.py where CPPO_PRIME_RL names a checkout, else a stand-in.

prime-rl is not on PyPI and its loss.py needs jaxtyping and beartype beside torch. The stand-in makes the call that
prime-rl documents: ``LossInputs`` of one sequence in, ``LossOutputs`` out, summed and divided by ``rl_scale``.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import sys
import types
from typing import Any

import torch

CHECKOUT = os.environ.get("CPPO_PRIME_RL")
IMPORT_PATH = "cppo.adapters.prime_rl.trust_region_loss"
PROMPT, PADDING = 2, 3


@dataclasses.dataclass
class CustomLossConfig:
    import_path: str
    kwargs: dict[str, Any]


@dataclasses.dataclass
class DefaultLossConfig:
    dppo_mask_low: float = 0.2
    dppo_mask_high: float = 0.2
    adv_tau: float = 1.0
    kl_tau: float = 0.0


@dataclasses.dataclass
class IPOLossConfig:
    ipo_threshold: float = 0.1
    adv_tau: float = 1.0
    kl_tau: float = 0.0


def import_object(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def stand_in():
    module = types.ModuleType("prime_rl.trainer.rl.loss")

    @dataclasses.dataclass
    class LossInputs:
        trainer_logprobs: torch.Tensor
        inference_logprobs: torch.Tensor
        ref_logprobs: torch.Tensor | None
        advantages: torch.Tensor
        loss_mask: torch.Tensor
        loss_weights: torch.Tensor | None = None

    @dataclasses.dataclass
    class LossOutputs:
        loss: torch.Tensor
        metrics: dict[str, torch.Tensor]

    def setup_rl_loss_fn(config):
        return functools.partial(import_object(config.import_path), **config.kwargs)

    def compute_loss(
        *, trainer_logprobs, inference_logprobs, advantages, loss_mask, rl_weights, rl_loss_fn, rl_scale, **_
    ):
        weights = [None] * len(loss_mask) if rl_weights is None else rl_weights
        total, metrics = trainer_logprobs[0].sum() * 0.0, {}
        columns = zip(trainer_logprobs, inference_logprobs, advantages, loss_mask, weights, strict=True)
        for logp, rollout_logp, advantage, mask, weight in columns:
            member = mask if weight is None else mask & (weight != 0)
            if weight is not None and not member.any():
                continue
            out = rl_loss_fn(LossInputs(logp, rollout_logp, None, advantage, member, weight))
            total = total + out.loss
            for name, value in out.metrics.items():
                metrics.setdefault(name, []).append(value)
        return total / rl_scale, {name: torch.stack(values) for name, values in metrics.items()}

    vars(module).update(
        LossInputs=LossInputs, LossOutputs=LossOutputs, setup_rl_loss_fn=setup_rl_loss_fn, compute_loss=compute_loss
    )
    return module


@contextlib.contextmanager
def present(named):
    """Put modules where ``import`` finds them, and take them away again."""
    before = {name: sys.modules.get(name) for name in named}
    sys.modules.update(named)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def package(name, **content):
    module = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(content)
    return module


@functools.cache
def _modules():
    configs = (CustomLossConfig, DefaultLossConfig, IPOLossConfig)
    names = {kind.__name__: kind for kind in configs} | {"LossConfig": CustomLossConfig | DefaultLossConfig}
    found = {
        "prime_rl": package("prime_rl"),
        "prime_rl.configs": package("prime_rl.configs"),
        "prime_rl.configs.trainer": package("prime_rl.configs.trainer", **names),
        "prime_rl.utils": package("prime_rl.utils"),
        "prime_rl.utils.utils": package("prime_rl.utils.utils", import_object=import_object),
        "prime_rl.trainer": package("prime_rl.trainer"),
        "prime_rl.trainer.rl": package("prime_rl.trainer.rl"),
    }
    name = "prime_rl.trainer.rl.loss"
    if CHECKOUT is None:
        return found | {name: stand_in()}
    spec = importlib.util.spec_from_file_location(
        name, pathlib.Path(CHECKOUT) / "src" / "prime_rl" / "trainer" / "rl" / "loss.py"
    )
    module = importlib.util.module_from_spec(spec)
    with present(found | {name: module}):
        spec.loader.exec_module(module)
    return found | {name: module}


@contextlib.contextmanager
def prime_rl():
    """Yield prime-rl's loss module, importable as such."""
    with present(_modules()):
        yield _modules()["prime_rl.trainer.rl.loss"]


def pack(values, lengths, fill):
    """Return ``[N]``: each row's tokens behind its prompt, padding behind the last."""
    pad = torch.nn.functional.pad
    rows = [pad(row[:n], (PROMPT, 0), value=fill) for row, n in zip(values, lengths, strict=True)]
    return pad(torch.cat(rows), (0, PADDING), value=fill)


def unpack(packed, batch):
    """Return the responses' part of ``[N]`` as ``[B, T]``; refuse anything but 0 elsewhere."""
    out = torch.zeros_like(batch.logp)
    for row, (part, n) in enumerate(zip(packed.split(sequence_lengths(batch)), batch.lengths, strict=True)):
        out[row, :n] = part[PROMPT : PROMPT + n]
        assert not part[:PROMPT].any()
        assert not part[PROMPT + n :].any()
    return out


def sequence_lengths(batch):
    lengths = [PROMPT + n for n in batch.lengths]
    lengths[-1] += PADDING
    return lengths


def run(batch, config, *, rl_weights=None, rl_scale=1, junk=0.0):
    """Return (loss, metrics, its gradient [B, T]) of prime-rl's compute_loss on the packed batch."""
    lengths = sequence_lengths(batch)
    leaf = pack(batch.logp, batch.lengths, -1.0).requires_grad_()
    # Advantages are a number a response, or token-shaped.
    advantages = batch.advantages.expand(batch.logp.T.shape).T if batch.advantages.dim() == 1 else batch.advantages
    with prime_rl() as stack:
        loss, metrics = stack.compute_loss(
            trainer_logprobs=leaf.split(lengths),
            inference_logprobs=pack(batch.rollout_logp, batch.lengths, junk).split(lengths),
            ref_logprobs=None,
            advantages=pack(advantages, batch.lengths, junk).split(lengths),
            loss_mask=pack(batch.mask, batch.lengths, False).split(lengths),
            rl_weights=None if rl_weights is None else pack(rl_weights, batch.lengths, 0.0).split(lengths),
            ce_weights=None, ref_kl_weights=None, ce_scale=1, ref_kl_scale=1,
            rl_loss_fn=stack.setup_rl_loss_fn(config), rl_scale=rl_scale,
        )  # fmt: skip
    loss.backward()
    return loss.detach(), metrics, unpack(leaf.grad, batch)


def ours(**kwargs):
    return CustomLossConfig(IMPORT_PATH, kwargs)


def gradient(spec, batch):
    """Return the gradient of prime-rl's loss by each log-prob, times its denominator, ``[B, T]``."""
    count = int(batch.mask.sum())
    return run(batch, ours(method=spec), rl_scale=count)[2] * count
