"""The trust regions of this package as slime's custom loss, with slime's own log-probs, entropy, KL and reduction.

    --loss-type custom_loss --custom-loss-function-path cppo.adapters.slime.policy_loss
    --custom-config-path cppo.yaml                           # in it: cppo_method: cppo?delta=0.15
    --custom-megatron-init-path cppo.adapters.slime.check    # refuses a wrong launch at start-up
    --use-rollout-logprobs                                   # else slime recomputes log-probs that nobody reads

Under context parallelism each rank holds two pieces of each response (zigzag), of whatever length remains of them after
the prompt: the decision is the uncut response's, and numbers a response are exchanged, no tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cppo.decision import Decision
from cppo.methods import Method
from cppo.objective import decide, token_losses
from cppo.ops.context_parallel import ContextParallel

from .sampled_tokens import method_for

_PATH = f"{__name__}.policy_loss"


def check(args: Any) -> None:
    """Refuse a launch under which the loss would not run, or not act on the sampler's policy.

    Args:
        args: slime's arguments, ``--custom-config-path``'s among them.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected; for the method as ``method_for``.
    """
    build_method(args)
    for name, default, right, expected, why in _LAUNCH:
        value = getattr(args, name, default)
        if not right(value):
            raise ValueError(f"{name}={value!r}: expected {expected}; {why}")


def build_method(args: Any) -> Method:
    """Return the method that ``cppo_method``, a key of ``--custom-config-path``'s file, spells out.

    Raises:
        TypeError, ValueError: if it is not there, or is no method that runs on the sampled tokens' log-probs.
    """
    spec = getattr(args, "cppo_method", None)
    if not isinstance(spec, str):
        raise ValueError(
            f"cppo_method={spec!r}: expected a spec such as cppo?delta=0.15 in --custom-config-path's file"
        )
    return _parsed(spec)


@functools.lru_cache(maxsize=8)
def _parsed(spec: str) -> Method:
    return method_for("slime", spec)


def policy_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return -k_t A_t a token in slime's reduction, with slime's entropy and KL terms, and what is logged.

    Args:
        args: slime's arguments.
        batch: a micro-batch of lists, one entry a response; token tensors are this rank's part, ``loss_masks`` whole.
        logits: ``[1, T, V]``, of this rank.
        sum_of_sample_mean: slime's reduction of the responses' tokens.

    Raises:
        ValueError: without ``rollout_log_probs``, or as :func:`build_method`.
    """
    from slime.backends.megatron_utils import loss as stock

    method = build_method(args)
    if not batch.get("rollout_log_probs"):
        raise ValueError(
            "rollout_log_probs: expected the sampler's log-probs, got none; the rollout function must fill "
            "Sample.rollout_log_probs"
        )
    lengths = {"total_lengths": batch["total_lengths"], "response_lengths": batch["response_lengths"]}
    _, found = stock.get_log_probs_and_entropy(
        logits, args=args, unconcat_tokens=batch["unconcat_tokens"], with_entropy=True, **lengths,
        **stock.get_rollout_top_p_logprob_kwargs(args, batch),
    )  # fmt: skip
    logp, rollout_logp, advantages = (
        torch.cat(part) for part in (found["log_probs"], batch["rollout_log_probs"], batch["advantages"])
    )
    pieces = _Pieces(batch)
    rows = pieces.rows(logp)
    decision = decide(
        method, rows, pieces.rows(rollout_logp), pieces.rows(advantages), pieces.rows(pieces.mask),
        context_parallel=pieces.context,
    )  # fmt: skip
    reduce_policy_loss = sum_of_sample_mean
    if getattr(args, "custom_pg_loss_reducer_function_path", None) is not None:
        reducer = stock.load_function(args.custom_pg_loss_reducer_function_path)
        reduce_policy_loss = reducer(*lengths.values(), batch["loss_masks"], args.calculate_per_token_loss)
    pg_loss = reduce_policy_loss(pieces.flat(token_losses(decision, rows)))
    entropy = sum_of_sample_mean(torch.cat(found["entropy"]))
    loss = pg_loss - args.entropy_coef * entropy
    log = {"pg_loss": pg_loss, "entropy_loss": entropy} | {
        name: sum_of_sample_mean(pieces.flat(values)) for name, values in _per_token(decision).items()
    }
    if args.use_kl_loss:
        ratio = torch.exp(logp - rollout_logp) if args.use_unbiased_kl else None
        kl = stock.compute_approx_kl(
            logp, torch.cat(batch["ref_log_probs"]), kl_loss_type=args.kl_loss_type, importance_ratio=ratio
        )
        log["kl_loss"] = sum_of_sample_mean(kl)
        loss = loss + args.kl_loss_coef * log["kl_loss"]
    return loss, {name: value.detach().clone() for name, value in ({"loss": loss} | log).items()}


class _Pieces:
    """What this rank holds of each response, as rows: the response, or its two pieces of the zigzag.

    Rows and not a packed tensor, because there a number a token could be taken for a number a piece.
    """

    def __init__(self, batch: dict[str, Any]) -> None:
        from megatron.core import mpu
        from slime.backends.megatron_utils import cp_utils

        ranks, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
        responses = list(zip(batch["total_lengths"], batch["response_lengths"], strict=True))
        self.context: ContextParallel | None = None
        self.lengths = [response_length for _, response_length in responses]
        if ranks > 1:
            offsets = [cp_utils.get_logits_and_tokens_offset_with_cp(*response)[2] for response in responses]
            self.lengths = [stop - start for pieces in offsets for start, stop in pieces]
            self.context = ContextParallel(mpu.get_context_parallel_group(), chunks=(rank, 2 * ranks - 1 - rank))
        # slime keeps the masks whole where it cuts everything else.
        masks = zip(batch["loss_masks"], responses, strict=True)
        self.mask = torch.cat([cp_utils.slice_log_prob_with_cp(mask, *response) for mask, response in masks])

    def rows(self, values: Tensor) -> Tensor:
        """Return ``[rows, longest]`` of this rank's tokens, one after the other; the mask pads with 0."""
        return torch.nn.utils.rnn.pad_sequence(values.split(self.lengths), batch_first=True)

    def flat(self, values: Tensor) -> Tensor:
        """Return the tokens of rows, one after the other."""
        return torch.cat([row[:length] for row, length in zip(values, self.lengths, strict=True)])


def _per_token(decision: Decision) -> dict[str, Tensor]:
    """Return what is logged, a number a token and 0 outside the mask, so that slime can reduce it over all ranks."""
    batch, tokens = decision.batch, decision.batch.tokens()
    found = {
        "gate/mean": decision.gate,
        "gate/masked_fraction": (decision.rejected_by > 0).to(batch.dtype),
        "train_rollout_logprob_abs_diff": tokens.log_ratio.abs(),
    }
    if decision.trace.divergence is not None:
        found["divergence/mean"] = decision.trace.divergence
    return found


_ONCE = "the ratio is taken to the sampler already"
# argument, slime's default, what is right, in words, why
_LAUNCH: list[tuple[str, Any, Callable[[Any], bool], str, str]] = [
    ("loss_type", "policy_loss", lambda value: value == "custom_loss", "custom_loss", "else slime's own loss runs"),
    ("custom_loss_function_path", None, lambda value: value == _PATH, _PATH, "else another loss runs"),
    ("use_tis", False, lambda value: not value, "False", _ONCE),
    ("get_mismatch_metrics", False, lambda value: not value, "False", _ONCE),
    ("use_opsm", False, lambda value: not value, "False", "this loss does not apply that mask"),
    (
        "rollout_top_k",
        -1,
        lambda value: value in (-1, 0),
        "-1",
        "the sampler would not be the policy whose ratio is taken (top-p is: slime replays it)",
    ),
]
