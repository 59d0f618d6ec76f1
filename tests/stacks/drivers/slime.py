"""slime's loss function around the adapter: its own files if CPPO_SLIME names a checkout, else a stand-in for them.

The stand-in is written from slime's documented interface: what a custom loss may call, and what calls it. Megatron's
parallel state is made up here in either case. With ranks the tokens are cut as slime cuts them: rank r of W holds the
r-th and the (2 W - 1 - r)-th of 2 W equal chunks of prompt and response.
"""

import contextlib
import importlib
import os
import pathlib
import sys
import types

import torch
from one_batch import make_batch
from torch.utils.checkpoint import checkpoint

REAL = os.environ.get("CPPO_SLIME")
REAL = REAL and str(pathlib.Path(REAL).resolve())
PATH = "cppo.adapters.slime.policy_loss"


def prompt_length(row):
    # Short and long, so that the cuts fall in prompts, in responses, and where one of them ends.
    return (1, 7, 3, 16, 2, 5)[row % 6]


# ---------------------------------------------------------------- the stand-in


class StandIn:
    """The functions of slime that the adapter and the driver use, for one rank of some."""

    def __init__(self, world, rank):
        self.world, self.rank = world, rank

    def pieces(self, total, response):
        """Return which logits of the whole sequence this rank holds that predict a response token: [(start, stop)]."""
        chunk = -(-total // (2 * self.world))
        first, last = total - response - 1, total - 1
        found = []
        for index in (self.rank, 2 * self.world - 1 - self.rank):
            start, stop = max(index * chunk, first), min((index + 1) * chunk, last)
            found.append((start, stop) if start < stop else (0, 0))
        return chunk, found

    def get_logits_and_tokens_offset_with_cp(self, total_length, response_length):
        chunk, logits = self.pieces(total_length, response_length)
        chunks = [(index * chunk, (index + 1) * chunk) for index in (self.rank, 2 * self.world - 1 - self.rank)]
        tokens = [(start + 1, stop + 1) if start < stop else (0, 0) for start, stop in logits]
        return chunk, tuple(chunks), tuple(logits), tuple(tokens)

    def slice_log_prob_with_cp(self, log_prob, total_length, response_length):
        assert len(log_prob) == response_length
        if self.world == 1:
            return log_prob
        first = total_length - response_length - 1
        _, pieces = self.pieces(total_length, response_length)
        return torch.cat([log_prob[a - first : b - first] if a < b else log_prob[:0] for a, b in pieces])

    def slice_with_cp(self, tokens, pad_value):
        if self.world == 1:
            return tokens
        chunk = -(-len(tokens) // (2 * self.world))
        padding = tokens.new_full((2 * self.world * chunk - len(tokens), *tokens.shape[1:]), pad_value)
        chunks = torch.cat([tokens, padding]).split(chunk)
        return torch.cat([chunks[self.rank], chunks[2 * self.world - 1 - self.rank]])

    def get_log_probs_and_entropy(
        self, logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy=False
    ):
        every = logits[0].log_softmax(-1)
        found, start = {"log_probs": [], "entropy": []}, 0
        for tokens, total, response in zip(unconcat_tokens, total_lengths, response_lengths, strict=True):
            if self.world == 1:
                where = torch.arange(total - response - 1, total - 1)
                at = start + where
                start += total
            else:
                chunk, pieces = self.pieces(total, response)
                where = torch.cat([torch.arange(a, b) for a, b in pieces])
                base = (self.rank * chunk, (2 * self.world - 1 - self.rank) * chunk - chunk)
                at = torch.cat([torch.arange(a, b) - base[i] + start for i, (a, b) in enumerate(pieces)])
                start += 2 * chunk
            found["log_probs"].append(every[at].gather(1, tokens[where + 1][:, None])[:, 0])
            found["entropy"].append(-(every[at].exp() * every[at]).sum(-1))
        return torch.empty(0), found

    def get_rollout_top_p_logprob_kwargs(self, args, batch):
        return {}

    def compute_approx_kl(self, log_probs, log_probs_base, kl_loss_type, importance_ratio=None):
        assert kl_loss_type == "k2"
        kl = (log_probs - log_probs_base) ** 2 / 2
        return kl if importance_ratio is None else importance_ratio * kl

    def load_function(self, path):
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)

    def get_sum_of_sample_mean(self, total_lengths, response_lengths, loss_masks, sample_denoms, per_token=False):
        parts = zip(loss_masks, total_lengths, response_lengths, strict=True)
        masks = [self.slice_log_prob_with_cp(*part) for part in parts]
        scales = [1.0 if per_token else 1 / max(float(count), 1) for count in sample_denoms]

        def reduce(values):
            rows = values.split([len(mask) for mask in masks])
            return sum((row * mask).sum() * scale for row, mask, scale in zip(rows, masks, scales, strict=True))

        return reduce

    def loss_function(self, args, batch, num_microbatches, step_global_batch_size, logits):
        assert args.loss_type == "custom_loss"
        reduce = self.get_sum_of_sample_mean(
            batch["total_lengths"], batch["response_lengths"], batch["loss_masks"], batch["rollout_mask_sums"],
            args.calculate_per_token_loss,
        )  # fmt: skip
        function = self.load_function(args.custom_loss_function_path)
        if args.recompute_loss_function:
            loss, log = checkpoint(function, args, batch, logits, reduce, use_reentrant=False)
        else:
            loss, log = function(args, batch, logits, reduce)
        scale = self.world if args.calculate_per_token_loss else self.world * num_microbatches / step_global_batch_size
        counts = sum(mask.sum().clamp(min=1) for mask in batch["loss_masks"])
        values = torch.tensor([counts if args.calculate_per_token_loss else 0, *log.values()])
        return loss * scale, counts, {"keys": list(log), "values": values}

    def modules(self):
        names = [name for name in dir(self) if not name.startswith("_")]
        everything = {name: getattr(self, name) for name in names}
        return {
            "slime.backends.megatron_utils.loss": module("slime.backends.megatron_utils.loss", **everything),
            "slime.backends.megatron_utils.cp_utils": module("slime.backends.megatron_utils.cp_utils", **everything),
        }


def module(name, path=None, **content):
    made = types.ModuleType(name)
    made.__dict__.update(content)
    if path is not None:
        made.__path__ = [str(path)]
    return made


@contextlib.contextmanager
def slime(world=1, rank=0, group=None, alone=None):
    """Put slime and Megatron's parallel state in sys.modules; yield slime's loss and its cutting."""
    mpu = module(
        "megatron.core.mpu",
        get_context_parallel_rank=lambda: rank,
        get_context_parallel_world_size=lambda: world,
        get_context_parallel_group=lambda: group,
        get_tensor_model_parallel_rank=lambda: 0,
        get_tensor_model_parallel_world_size=lambda: 1,
        get_tensor_model_parallel_group=lambda: alone,
        get_data_parallel_world_size=lambda with_context_parallel=False: world if with_context_parallel else 1,
    )
    given = {
        "megatron": module("megatron", path="", core=None),
        "megatron.core": module("megatron.core", path="", mpu=mpu),
        "megatron.core.mpu": mpu,
    }
    names = ["slime", "slime.utils", "slime.backends", "slime.backends.megatron_utils"]
    for name in names:  # the packages without what they load
        folder = pathlib.Path(REAL or "", *name.split("."))
        given[name] = module(name, path=folder if REAL else "")
    if REAL:
        given["slime.utils.http_utils"] = module("slime.utils.http_utils", is_port_available=None)
    else:
        given |= StandIn(world, rank).modules()
        for name in ("loss", "cp_utils"):
            full = f"slime.backends.megatron_utils.{name}"
            setattr(given["slime.backends.megatron_utils"], name, given[full])
    sys.modules.update(given)
    try:
        # slime compiles its KL terms.
        with torch.compiler.set_stance("force_eager") if REAL else contextlib.nullcontext():
            yield (
                importlib.import_module("slime.backends.megatron_utils.loss"),
                importlib.import_module("slime.backends.megatron_utils.cp_utils"),
            )
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("slime", "megatron")]:
            del sys.modules[name]


# ---------------------------------------------------------------- the driver


def arguments(spec, **others):
    return types.SimpleNamespace(
        **{
            "loss_type": "custom_loss", "custom_loss_function_path": PATH, "cppo_method": spec,
            "calculate_per_token_loss": True, "recompute_loss_function": False, "entropy_coef": 0.0,
            "use_kl_loss": False, "use_unbiased_kl": False, "kl_loss_type": "k2", "kl_loss_coef": 0.0,
            "rollout_temperature": 1.0, "rollout_top_p": 1.0, "rollout_top_k": -1, "allgather_cp": False,
            "log_probs_chunk_size": -1,
        }
        | others
    )  # fmt: skip


def run(args, batch, world=1, rank=0, groups=(None, None), rows=None, step_batch=6, **replaced):
    """Return (scaled loss, log, gradient by every response token's log-prob ``[B, T]``) of one rank."""
    leaf = batch.logp.clone().requires_grad_()
    rows = list(range(len(batch.lengths))) if rows is None else rows
    with slime(world, rank, *groups) as (loss_module, cp):
        data = {
            "unconcat_tokens": [], "total_lengths": [], "response_lengths": [], "loss_masks": [],
            "rollout_log_probs": [], "advantages": [], "ref_log_probs": [], "rollout_mask_sums": [],
        }  # fmt: skip
        logits = []
        for row in rows:
            prompt, response = prompt_length(row), batch.lengths[row]
            total = prompt + response
            # The response's tokens are ones; over two tokens log p and log(1 - p) are the logits that give p.
            logp = torch.where(batch.mask[row], leaf[row], -0.5)[:response].double()  # a tool's tokens have one too
            known = torch.stack([torch.log(-torch.expm1(logp)), logp], 1).float()
            sequence = torch.cat([torch.zeros(prompt - 1, 2), known, torch.zeros(1, 2)])
            logits.append(sequence if args.allgather_cp else cp.slice_with_cp(sequence, 0))
            data["unconcat_tokens"].append(torch.cat([torch.zeros(prompt), torch.ones(response)]).long())
            data["total_lengths"].append(total)
            data["response_lengths"].append(response)
            data["loss_masks"].append(batch.mask[row, :response].int())
            data["rollout_mask_sums"].append(batch.mask[row].sum())
            advantages = batch.advantages[row]
            full = {
                "rollout_log_probs": batch.rollout_logp[row, :response],
                "advantages": advantages[:response] if advantages.dim() else advantages.expand(response),
                "ref_log_probs": batch.rollout_logp[row, :response] - 0.1,
            }
            for name, values in full.items():
                data[name].append(cp.slice_log_prob_with_cp(values, total, response))
        together = torch.cat(logits)
        if args.allgather_cp:
            padding = -len(together) % (world * 4)
            together = torch.cat([together, torch.zeros(padding, 2)]).chunk(world)[rank]
        else:
            together = torch.cat([together, torch.zeros(-len(together) % 8, 2)])
        found = loss_module.loss_function(args, data | replaced, 1, step_batch, together[None])
        loss, log = found[0], dict(zip(found[2]["keys"], found[2]["values"].tolist()[1:], strict=True))
        loss.backward()  # inside: what is checkpointed is computed again
    return loss.item(), log, leaf.grad


def gradient(spec, batch):
    """Return the gradient of slime's loss by each log-prob, times its denominator, ``[B, T]``."""
    return run(arguments(spec), batch)[2]


# ---------------------------------------------------------------- ranks


def cases():
    """Return what the ranks of a group are asked: arguments, the batch, its rows."""
    out = []
    for seed, spec in enumerate(
        ("cppo?delta=0.1&delta_b=0.01", "cppo?delta=0.1&budget=fixed&delta_b=0.01", "gspo", "minpro", "trm")
    ):
        out.append((arguments(spec), seed, None))
        out.append((arguments(spec, calculate_per_token_loss=False, recompute_loss_function=True), seed, None))
        out.append((arguments(spec, entropy_coef=0.1, use_kl_loss=True, kl_loss_coef=0.2), seed, [3, 1]))
    out.append((arguments("policy_gradient"), 0, [1]))  # one token: the other ranks have none
    if REAL:
        out += [(arguments(spec, allgather_cp=True), 1, None) for spec in ("cppo?delta=0.1&delta_b=0.01", "trm")]
    return out


def _cut(rank, world):
    alone = [torch.distributed.new_group([other]) for other in range(world)]
    groups = (torch.distributed.group.WORLD, alone[rank])
    return [run(args, make_batch(seed), world, rank, groups, rows) for args, seed, rows in cases()]


QUESTIONS = {"cut": _cut}
