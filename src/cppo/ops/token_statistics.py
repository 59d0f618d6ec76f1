"""Hidden states in; log-probs, divergences and entropies out; never all logits at once. Usable alone."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import divergence as divergences
from .chunked_softmax import IGNORED, ChunkedSoftmax, Pass, Plan, pick, whole_softmax
from .projection import Projection, check_chunking, check_projection, chunks
from .vocab_parallel import VocabParallel, first_id

_BINARY: dict[str, Callable[..., Tensor]] = {"binary_tv": divergences.binary_tv, "binary_kl": divergences.binary_kl}
_TOPK: dict[str, Callable[..., Tensor]] = {"topk_tv": divergences.topk_tv, "topk_kl": divergences.topk_kl}


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStatistics:
    """What :func:`token_statistics` returns, each of ``token_ids``' shape."""

    logp: Tensor  # differentiable in hidden, weight and bias
    divergence: Tensor | None  # D_t, no gradient; None if not asked for
    entropy: Tensor | None  # nats, differentiable like logp; None if not asked for


@dataclasses.dataclass(frozen=True, eq=False)
class TopK:
    """A policy's likeliest tokens, ``[..., K]``, the likeliest first, and their log-probs."""

    ids: Tensor
    logp: Tensor
    token_logp: Tensor | None = None  # [...]: the log-probs of the tokens asked for besides


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    rollout_logp: Tensor | None = None,
    topk_ids: Tensor | None = None,
    rollout_topk_logp: Tensor | None = None,
    divergence: str | None = None,
    entropy: bool = False,
    logp: Tensor | None = None,
    chunk_tokens: int | None = None,
    memory_budget: int | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> TokenStatistics:
    """Return log pi of given tokens, their divergence from the rollout policy, and pi's entropy, from hidden states.

    z = cap(scale (h W^T + b)) / temperature, log pi(y) = z_y - logsumexp(z), entropy = -sum_a pi(a) log pi(a), with
    cap(x) = softcap tanh(x / softcap) where there is one: the order in which the models that have these apply them.
    D_t compares mu and pi on the partition of :func:`cppo.topk_tv`: mu's K likeliest tokens, the sampled one, and one
    bucket for the rest (arXiv 2606.10968 and 2602.04879, K = 20).

    Args:
        hidden: ``[..., H]``, the last hidden states; float64, float32, float16 or bfloat16. The one that predicts a
            token stands at the token's place: shift before.
        weight: ``[V, H]``, the output projection; of the same dtype, or another of these.
        token_ids: ``[...]``, integers in [0, V), or -100 where there is no token: there all results are 0 and no
            gradient flows, whatever the other arguments hold (but ``logp``, which is returned as it came).
        bias: ``[V]``.
        temperature: of the sampling, > 0.
        logit_scale: such as Cohere's ``logit_scale``, or one over Granite's ``logits_scaling``.
        logit_softcap: such as Gemma's ``final_logit_softcapping``, > 0.
        rollout_logp: ``[...]``, log mu of the sampled token, for a divergence.
        topk_ids: ``[..., K]``, mu's likeliest tokens, distinct within a position; a negative id is an empty place. The
            sampled token may be among them or not.
        rollout_topk_logp: ``[..., K]``, log mu of these; not read at empty places.
        divergence: "topk_tv" or "topk_kl" (need the three above), "binary_tv" or "binary_kl" (need the first), or None.
        entropy: whether the entropy is wanted.
        logp: ``[...]``, log pi(y), if another kernel has computed it already from logits that it did not round below
            float32 (from bfloat16 logits its error would shift every other token's). Then nothing is multiplied with
            the whole vocabulary: log pi(a) = z_a - z_y + log pi(y) takes K + 1 rows of the weight a token. It is
            returned as it came, and no gradient flows into hidden, weight and bias.
        chunk_tokens: tokens a chunk; None: as many as ``memory_budget`` allows.
        memory_budget: bytes that the logits of a chunk may take; None: 64 MiB on a CPU, 1 GiB elsewhere. Sixteen
            tokens at least are taken at a time.
        vocab_parallel: how the vocabulary is cut over ranks, if it is: ``weight`` and ``bias`` are this rank's rows.

    Returns:
        A :class:`TokenStatistics` in float32, or float64 if hidden or weight is. logp <= 0; divergence in [0, 1] for
        TV, >= 0 nats for KL, NaN where a number of the rollout policy's is (``decide`` rejects such a token); entropy
        >= 0 nats.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected. Ids out of range are seen on a CPU
            with the whole vocabulary; elsewhere, where looking would stall the device, log pi of such a token is -inf.

    Numerics: products are accumulated in float32 or float64, and logits are never rounded to anything narrower (on a
    device that cannot, factors are widened first). Exponentials are taken relative to the row's largest logit.
    Gradients have the inputs' dtypes; the weight's is accumulated over chunks in float32 or float64. There is no second
    derivative, and torch.func's transforms are refused. Nothing makes the host wait for the device.
    """
    head = check_projection(hidden, weight, bias, temperature, logit_scale, logit_softcap)
    check_chunking(chunk_tokens, memory_budget)
    shape = hidden.shape[:-1]
    _check_ids("token_ids", token_ids, shape, hidden)
    _check_rollout(divergence, hidden, rollout_logp, topk_ids, rollout_topk_logp)
    if logp is not None:
        _check_given(logp, hidden, entropy, vocab_parallel)
    start = first_id(vocab_parallel, head.vocabulary)
    ids = token_ids.reshape(-1).to(torch.int64)
    wanted = ids[:, None]
    if divergence in _TOPK and topk_ids is not None:
        wanted = torch.cat([wanted, topk_ids.reshape(len(ids), topk_ids.shape[-1]).to(torch.int64)], 1)
    if vocab_parallel is None and _may_look(wanted):
        _check_range(wanted, head.vocabulary)
    flat = hidden.reshape(-1, hidden.shape[-1])
    entropies = None
    if logp is None:
        plan = Plan(head, chunk_tokens, memory_budget, entropy, torch.is_grad_enabled(), start, vocab_parallel)
        own, entropies, every = ChunkedSoftmax.apply(flat, weight, bias, wanted, plan)  # type: ignore[no-untyped-call]
        logp = own.view(shape)
    else:
        every = _from_given(head, flat, wanted, logp.detach().reshape(-1), chunk_tokens, memory_budget)
    found = None
    if divergence is not None:
        found = _compare(divergence, every, wanted, rollout_logp, rollout_topk_logp).view(shape)
    return TokenStatistics(logp, found, None if entropies is None else entropies.view(shape))


@torch.no_grad()
def topk_log_probs(
    hidden: Tensor,
    weight: Tensor,
    k: int = 20,
    *,
    token_ids: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_tokens: int | None = None,
    memory_budget: int | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> TopK:
    """Return a policy's K likeliest tokens at each position and their log-probs, from hidden states, in chunks.

    What must be kept of the rollout policy for a top-K divergence (K = 20 in arXiv 2606.10968).

    Args:
        hidden: ``[..., H]``, as in :func:`token_statistics`, like all arguments that are not described here.
        weight: as there.
        k: how many, >= 1. Where the vocabulary is smaller, all of it; cut over ranks, then empty places with id -1.
        token_ids: ``[...]``, tokens whose log-probs are wanted besides, in the same pass: the sampled ones. As there.
        bias: as there.
        temperature: as there.
        logit_scale: as there.
        logit_softcap: as there.
        chunk_tokens: as there.
        memory_budget: as there.
        vocab_parallel: as there.

    Returns:
        A :class:`TopK`: int64 ids and log-probs, ``[..., K]``, by falling log-prob, and ``token_logp`` of
        ``token_ids``, if given; no gradient. Every rank's is that of the whole vocabulary.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.

    Numerics: as :func:`token_statistics`.
    """
    head = check_projection(hidden, weight, bias, temperature, logit_scale, logit_softcap)
    check_chunking(chunk_tokens, memory_budget)
    if token_ids is not None:
        _check_ids("token_ids", token_ids, hidden.shape[:-1], hidden)
    k = _check_count("k", k)
    start = first_id(vocab_parallel, head.vocabulary)
    flat = hidden.reshape(-1, hidden.shape[-1])
    wanted = None if token_ids is None else token_ids.reshape(-1, 1).to(torch.int64)
    if wanted is not None and vocab_parallel is None and _may_look(wanted):
        _check_range(wanted, head.vocabulary)
    work = Pass(Plan(head, chunk_tokens, memory_budget), flat)
    peak, total = work.rows(), work.rows()
    # As many on every rank, however small its slice.
    width = min(k, head.vocabulary) if vocab_parallel is None else k
    logits = work.rows(width).fill_(-torch.inf)
    ids = torch.full(logits.shape, -1, dtype=torch.int64, device=flat.device)
    chosen = None if wanted is None else work.rows(1)
    for chunk in work.chunks:
        z = work.logits(flat[chunk].to(head.operand))
        if wanted is not None and chosen is not None:
            chosen[chunk] = pick(z, wanted[chunk] - start)
        found = z.topk(min(k, head.vocabulary), dim=1)
        here = slice(0, found.indices.shape[1])
        logits[chunk, here], ids[chunk, here] = found.values, found.indices + start
        work.exponentials(z, peak[chunk], total[chunk], None)
    peak, total, _ = whole_softmax(peak, total, None, vocab_parallel)
    if vocab_parallel is not None:
        everywhere = torch.cat(list(vocab_parallel.gather(logits)), 1)
        logits, order = everywhere.topk(k, dim=1)
        ids = torch.cat(list(vocab_parallel.gather(ids)), 1).gather(1, order)
        if chosen is not None:
            vocab_parallel.maximum_(chosen)
    logp = (logits - peak[:, None]).sub_(total.log()[:, None])
    own = None
    if wanted is not None and chosen is not None:
        own = (chosen - peak[:, None]).sub_(total.log()[:, None]).masked_fill_(wanted == IGNORED, 0.0)
    shape = (*hidden.shape[:-1], logits.shape[1])
    return TopK(ids.view(shape), logp.view(shape), None if own is None else own.view(shape[:-1]))


@torch.no_grad()
def _from_given(
    head: Projection,
    hidden: Tensor,
    wanted: Tensor,
    logp: Tensor,
    chunk_tokens: int | None,
    memory_budget: int | None,
) -> Tensor:
    """Return log pi of the wanted ids from that of the first of them."""
    every = logp.to(head.dtype)[:, None].expand(wanted.shape).clone()
    if wanted.shape[1] == 1:
        return every
    # A gathered row of the weight, and the same in the accumulator's dtype.
    numbers = wanted.shape[1] * hidden.shape[1]
    size = numbers * (head.weight.dtype.itemsize + head.dtype.itemsize)
    for chunk in chunks(len(hidden), size, hidden.device, chunk_tokens, memory_budget):
        z = head.selected(hidden[chunk], wanted[chunk])
        every[chunk] += z - z[:, :1]
    return every.masked_fill_((wanted < 0) | (wanted >= head.vocabulary), -torch.inf)


@torch.no_grad()
def _compare(divergence: str, every: Tensor, wanted: Tensor, rollout_logp: Any, rollout_topk_logp: Any) -> Tensor:
    ids, rollout = wanted[:, 0], rollout_logp.detach().reshape(-1)
    if divergence in _BINARY:
        found = _BINARY[divergence](every[:, 0], rollout)
    else:
        places = wanted[:, 1:]
        topk = rollout_topk_logp.detach().reshape(places.shape).masked_fill(places < 0, -torch.inf)
        found = _TOPK[divergence](every[:, 0], rollout, ids, every[:, 1:], topk, places)
    return found.masked_fill(ids == IGNORED, 0.0)


# ---------------------------------------------------------------- checks


def _check_ids(name: str, ids: object, shape: tuple[int, ...], hidden: Tensor) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {ids.dtype}")
    _check_like(name, ids, shape, hidden)


def _check_like(name: str, tensor: object, shape: tuple[int, ...], hidden: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected {list(shape)} (hidden is {list(hidden.shape)}), got {list(tensor.shape)}")
    if tensor.device != hidden.device:
        raise ValueError(f"{name}: expected hidden's device {hidden.device}, got {tensor.device}")


def _check_log_probs(name: str, tensor: object, shape: tuple[int, ...], hidden: Tensor) -> None:
    _check_like(name, tensor, shape, hidden)
    if isinstance(tensor, Tensor) and not tensor.is_floating_point():
        raise TypeError(f"{name}: expected floating point, got {tensor.dtype}")


def _check_count(name: str, value: object) -> int:
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]  # numpy's too
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name}={value!r}: expected a positive integer")
    return count


def _may_look(ids: Tensor) -> bool:
    """Return whether ids can be looked at: on an accelerator that would stall it, and a compiler has none."""
    return ids.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_range(wanted: Tensor, vocabulary: int) -> None:
    sampled, others = wanted[:, 0], wanted[:, 1:]
    wrong = sampled[((sampled < 0) & (sampled != IGNORED)) | (sampled >= vocabulary)]
    if wrong.numel():
        raise ValueError(
            f"token_ids: expected ids in [0, V = {vocabulary}), or {IGNORED} for no token, got {int(wrong[0])}"
        )
    wrong = others[others >= vocabulary]
    if wrong.numel():
        raise ValueError(f"topk_ids: expected ids below V = {vocabulary}, got {int(wrong[0])}")
    ordered = others.sort(1).values
    twice = ordered[:, 1:][(ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)]
    if twice.numel():
        raise ValueError(f"topk_ids: expected distinct ids within a position, got {int(twice[0])} twice")


def _check_rollout(
    divergence: object, hidden: Tensor, rollout_logp: object, topk_ids: object, rollout_topk_logp: object
) -> None:
    if divergence is None:
        for name, value in (("topk_ids", topk_ids), ("rollout_topk_logp", rollout_topk_logp)):
            if value is not None:
                raise ValueError(f"{name}: expected None without divergence=, or divergence='topk_tv' or 'topk_kl'")
        return
    if divergence not in (*_BINARY, *_TOPK):
        hint = "; it needs mu's whole distribution" if str(divergence).startswith("exact") else ""
        raise ValueError(f"divergence={divergence!r}: expected one of {', '.join((*_BINARY, *_TOPK))}, or None{hint}")
    needed = {"rollout_logp": rollout_logp}
    if divergence in _TOPK:
        needed |= {"topk_ids": topk_ids, "rollout_topk_logp": rollout_topk_logp}
    for name, value in needed.items():
        if value is None:
            raise ValueError(
                f"{name}=None: expected the rollout policy's, which divergence={divergence!r} compares with"
            )
    shape = hidden.shape[:-1]
    _check_log_probs("rollout_logp", rollout_logp, shape, hidden)
    if divergence in _TOPK:
        width = topk_ids.shape[-1] if isinstance(topk_ids, Tensor) and topk_ids.dim() else 0
        _check_ids("topk_ids", topk_ids, (*shape, width), hidden)
        _check_log_probs("rollout_topk_logp", rollout_topk_logp, (*shape, width), hidden)


def _check_given(logp: object, hidden: Tensor, entropy: bool, vocab_parallel: VocabParallel | None) -> None:
    _check_log_probs("logp", logp, hidden.shape[:-1], hidden)
    if entropy:
        raise ValueError("entropy=True: expected False beside logp=, from which no entropy follows")
    if vocab_parallel is not None:
        raise ValueError("vocab_parallel: expected None beside logp=")
