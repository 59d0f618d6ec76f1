"""NeMo-RL's loss wrappers around the adapter: its own files if CPPO_NEMO_RL names a checkout, else a stand-in for them.

The stand-in is written from NeMo-RL's documented interface: what a loss function is given, padded or packed, and what
is asked of it.
"""

import contextlib
import enum
import functools
import importlib
import os
import pathlib
import sys
import types
from unittest import mock

import torch

REAL = os.environ.get("CPPO_NEMO_RL")


def prompt_length(row):
    return (2, 7, 3, 4, 2, 5)[row % 6]


# ---------------------------------------------------------------- the stand-in

LossType = enum.Enum("LossType", {"TOKEN_LEVEL": "token_level", "SEQUENCE_LEVEL": "sequence_level"})
LossInputType = enum.Enum("LossInputType", {"LOGPROB": "logprob"})
MetricNormalizer = enum.Enum("MetricNormalizer", {"TOKENS": "tokens", "SEQUENCES": "sequences", "NONE": "none"})


def masked_mean(values, mask, dim=None, global_normalization_factor=None):
    count = mask.sum(dim=dim) if global_normalization_factor is None else global_normalization_factor
    return (values * mask).sum(dim=dim) / (count + 1e-8)


class ClippedPGLossFn:
    """The stock loss: a clipped term that advantages of 0 silence, and a KL term (k2) that stays."""

    input_type = LossInputType.LOGPROB

    def __init__(self, cfg, use_fused_linear_logprobs=False):
        self.__dict__.update({name: value for name, value in vars(cfg).items() if name != "token_level_loss"})
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.loss_type = LossType.TOKEN_LEVEL if cfg.token_level_loss else LossType.SEQUENCE_LEVEL
        self.metric_normalizations = {"loss": MetricNormalizer.SEQUENCES, "gen_kl_error": MetricNormalizer.TOKENS}

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        token_mask, sample_mask = data["token_mask"][:, 1:], data["sample_mask"]
        mask = token_mask * sample_mask.unsqueeze(-1)
        previous, sampler = data["prev_logprobs"][:, 1:], data["generation_logprobs"][:, 1:]
        advantages = data["advantages"][:, 1:]
        ratio = (next_token_logprobs - previous).exp()
        term = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - 0.2, 1 + 0.2))
        if self.use_importance_sampling_correction:
            term = term * (previous - sampler).exp()
        if self.reference_policy_kl_penalty:
            gap = next_token_logprobs - data["reference_policy_logprobs"][:, 1:]
            term = term + self.reference_policy_kl_penalty * gap**2 / 2
        if self.loss_type is LossType.TOKEN_LEVEL:
            loss = masked_mean(term, mask, global_normalization_factor=global_valid_toks)
        else:
            means = masked_mean(term, token_mask, dim=-1)
            loss = masked_mean(means, sample_mask, global_normalization_factor=global_valid_seqs)
        error = masked_mean(previous - sampler, mask, global_normalization_factor=global_valid_toks)
        return loss, {"loss": loss.item(), "gen_kl_error": error.item(), "num_valid_samples": sample_mask.sum().item()}


def prepare_loss_input(logits, data, loss_fn, **_):
    assert loss_fn.input_type is LossInputType.LOGPROB
    every = logits[:, :-1].log_softmax(-1)
    targets = data["input_ids"][:, 1:]
    return {"next_token_logprobs": every[:, : targets.shape[1]].gather(2, targets[..., None])[..., 0]}, data


def wrap_loss_fn_with_input_preparation(
    next_token_logits, data, global_valid_seqs, global_valid_toks, loss_fn, prepare_fn
):
    given, data = prepare_fn(next_token_logits, data, loss_fn)
    return loss_fn(data=data, global_valid_seqs=global_valid_seqs, global_valid_toks=global_valid_toks, **given)


class SequencePackingLossWrapper:
    def __init__(self, loss_fn, prepare_fn, cu_seqlens_q, cu_seqlens_q_padded):
        self.loss_fn, self.prepare_fn = loss_fn, prepare_fn
        self.lengths = cu_seqlens_q.diff().tolist()
        self.edges = cu_seqlens_q_padded.tolist()

    def __call__(self, next_token_logits, data, global_valid_seqs, global_valid_toks):
        total, metrics = 0, {}
        for row, length in enumerate(self.lengths):
            part = next_token_logits[:, self.edges[row] : self.edges[row + 1]]
            one = {n: v[row : row + 1, :length] if v.dim() > 1 else v[row : row + 1] for n, v in data.items()}
            loss, found = wrap_loss_fn_with_input_preparation(
                part, one, global_valid_seqs, global_valid_toks, self.loss_fn, self.prepare_fn
            )
            total = total + loss
            metrics = {name: metrics.get(name, 0) + value for name, value in found.items()}
        return total, metrics


_STAND_IN = {
    "nemo_rl.algorithms.loss.interfaces": (LossType, LossInputType, MetricNormalizer),
    "nemo_rl.algorithms.loss.loss_functions": (ClippedPGLossFn,),
    "nemo_rl.algorithms.loss.wrapper": (SequencePackingLossWrapper, wrap_loss_fn_with_input_preparation),
    "nemo_rl.algorithms.loss.utils": (prepare_loss_input,),
    "nemo_rl.algorithms.utils": (masked_mean,),
    "nemo_rl.distributed.batched_data_dict": (type("BatchedDataDict", (dict,), {}),),
}

# ---------------------------------------------------------------- either


class _Anything(types.ModuleType):
    """A module of NeMo-RL that the loss does not reach: every name in it is an empty class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


_UNREACHED = (
    "data.multimodal_utils", "data.packing", "data.chat_templates", "models.policy", "models.dtensor.parallelize",
    "algorithms.x_token.loss_utils", "utils.fastokens", "utils.logger",
)  # fmt: skip
_PACKAGES = ("", ".algorithms", ".algorithms.loss", ".algorithms.x_token", ".data", ".distributed", ".models",
             ".models.dtensor", ".utils")  # fmt: skip


@contextlib.contextmanager
def nemo_rl():
    """Put NeMo-RL's losses in sys.modules; yield what the driver uses of them."""
    for name in _PACKAGES:
        package = types.ModuleType(f"nemo_rl{name}")
        # The packages without what they load.
        package.__path__ = [str(pathlib.Path(REAL, "nemo_rl", *name.split(".")))] if REAL else []
        sys.modules[package.__name__] = package
    if REAL:
        sys.modules.update({f"nemo_rl.{name}": _Anything(f"nemo_rl.{name}") for name in _UNREACHED})
    else:
        for name, content in _STAND_IN.items():
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__dict__.update({thing.__name__: thing for thing in content})
    try:
        found = types.SimpleNamespace()
        for name in _STAND_IN:
            found.__dict__.update(vars(importlib.import_module(name)))
        with mock.patch.object(torch.Tensor, "cuda", lambda self: self):  # NeMo-RL moves the tokens there
            yield found
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "nemo_rl"]:
            del sys.modules[name]


def stock_loss(module, **settings):
    """Return the loss that ``setup()`` builds."""
    settings = {"reference_policy_kl_penalty": 0.0, "reference_policy_kl_type": "k2"} | settings
    if REAL:
        return module.ClippedPGLossFn(module.ClippedPGLossConfig(**settings))
    rest = {"token_level_loss": True, "use_importance_sampling_correction": False}
    return module.ClippedPGLossFn(types.SimpleNamespace(**rest | settings))


def run(build, batch, packed=True, prompts=prompt_length, valid=None, rows=None, **settings):
    """Return (loss, metrics, gradient by every response token's log-prob ``[B, T]``).

    ``build(stock)`` makes the loss function out of NeMo-RL's.
    """
    leaf = batch.logp.clone().requires_grad_()
    rows = list(range(len(batch.lengths))) if rows is None else rows
    totals = [prompts(row) + batch.lengths[row] for row in rows]
    width = max(totals) + 2
    # What is measured a token; a tool's tokens and the prompt's have log-probs too.
    data = {"input_ids": torch.ones(len(rows), width, dtype=torch.long)}
    columns = {
        "generation_logprobs": batch.rollout_logp, "prev_logprobs": batch.rollout_logp + 0.05,
        "reference_policy_logprobs": batch.rollout_logp - 0.1, "token_mask": batch.mask.float(),
    }  # fmt: skip
    advantages = batch.advantages if batch.advantages.dim() > 1 else batch.advantages[:, None].expand(leaf.shape)
    for name, values in (columns | {"advantages": advantages}).items():
        data[name] = torch.zeros(len(rows), width)
        for at, row in enumerate(rows):
            data[name][at, prompts(row) : totals[at]] = values[row, : batch.lengths[row]]
    data["sample_mask"] = torch.tensor([float(getattr(batch, "kept", [True] * 99)[row]) for row in rows])
    logits = []
    for at, row in enumerate(rows):
        logp = torch.where(batch.mask[row], leaf[row], -0.5)[: batch.lengths[row]].double()
        known = torch.stack([torch.log(-torch.expm1(logp)), logp], 1).float()
        logits.append(torch.cat([torch.zeros(prompts(row) - 1, 2), known, torch.zeros(width - totals[at] + 1, 2)]))
    mask = data["token_mask"] * data["sample_mask"][:, None]
    tokens, sequences = mask.sum(), data["sample_mask"].sum()
    sequences, tokens = valid or (sequences, tokens)
    with nemo_rl() as module:
        loss_fn = build(functools.partial(stock_loss, module)(**settings))
        data = module.BatchedDataDict(data)
        if packed:
            padded = [-(-total // 4) * 4 for total in totals]  # aligned, as Megatron packs
            edges = [torch.tensor([0, *sizes]).cumsum(0) for sizes in (totals, padded)]
            wrapper = module.SequencePackingLossWrapper(loss_fn, module.prepare_loss_input, *edges)
            together = torch.cat([torch.cat([r[:t], torch.zeros(p - t, 2)])
                                  for r, t, p in zip(logits, totals, padded, strict=True)])  # fmt: skip
            loss, metrics = wrapper(together[None], data, sequences, tokens)
        else:
            loss, metrics = module.wrap_loss_fn_with_input_preparation(
                torch.stack(logits), data, sequences, tokens, loss_fn, module.prepare_loss_input
            )
        loss.backward()
    return loss.item(), metrics, leaf.grad


def gradient(spec, batch):
    """Return the gradient of NeMo-RL's loss by each log-prob, times its denominator, ``[B, T]``."""
    from cppo.adapters.nemo_rl import TrustRegionLoss

    return run(lambda stock: TrustRegionLoss(spec, stock), batch)[2] * batch.mask.sum()
