"""An engine's likeliest tokens: kept from vLLM beside the sampled ones, and brought from lists into tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class EngineTopK:
    """Makes TRL's vLLM client return K log-probs a token, keeps them, and hands on the sampled token's alone.

    TRL takes the first of a token's log-probs for the sampled token's. With K of them, sorted by rank, the first is the
    likeliest token's, so asking vLLM for K without this would falsify every ratio.
    """

    def __init__(self, generation: Any, k: int) -> None:
        self._generate = generation.generate
        self._rows: list[tuple[Any, Any]] = []
        generation.logprobs = k
        generation.generate = self._kept_and_sampled

    def clear(self) -> None:
        """Forget what was kept."""
        self._rows.clear()

    def rows(self) -> list[tuple[Any, Any]]:
        """Return the ids and log-probs of each completion since the last ``clear``."""
        return list(self._rows)

    def _kept_and_sampled(self, *arguments: Any, **named: Any) -> tuple[Any, Any, Any, Any]:
        prompts, completions, logprobs, ids = self._generate(*arguments, **named)
        if logprobs is None or ids is None:
            raise ValueError(
                "vLLM: expected log-probs with their token ids, got none; a top-K divergence cannot be measured (a "
                "server of another version than TRL's client?)"
            )
        self._rows.extend(zip(ids, logprobs, strict=True))
        sampled = [
            [[_of(token, *place)] for token, place in zip(tokens, zip(own_ids, own, strict=True), strict=True)]
            for tokens, own_ids, own in zip(completions, ids, logprobs, strict=True)
        ]
        return prompts, completions, sampled, [[[token] for token in tokens] for tokens in completions]


def _of(token: int, ids: Sequence[int], logprobs: Sequence[float | None]) -> float | None:
    """Return the log-prob of one of the tokens of a place."""
    for one, logprob in zip(ids, logprobs, strict=True):
        if one == token:
            return logprob
    raise ValueError(f"vLLM: expected the sampled token {token} among those with a log-prob, got {list(ids)}")


def collect(rows: list[tuple[Any, Any]], mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Bring each completion's ids and log-probs (a list a token, or ``[T, K]``) into two ``[B, T, k]`` tensors.

    Of more than ``k`` the likeliest are kept; -1 and -inf stand at empty places, and for tokens whose log-prob the
    engine could not give.

    Args:
        rows: ids and log-probs of each completion.
        mask: ``[B, T]`` completion mask; a row of zeros is a completion that was dropped.
        k: places a token.

    Raises:
        ValueError: naming the completion whose lists do not fit.
    """
    if len(rows) != len(mask):
        raise ValueError(f"topk_ids: expected a list for each of {len(mask)} completions, got {len(rows)}")
    ids = torch.full((*mask.shape, k), -1, dtype=torch.int64)
    logp = torch.full((*mask.shape, k), -math.inf)
    lengths = (mask > 0).sum(1).tolist()
    for number, (some_ids, some_logp) in enumerate(rows):
        tokens = len(some_ids)
        if tokens != len(some_logp) or (tokens != lengths[number] and lengths[number]) or tokens > mask.shape[1]:
            raise ValueError(
                f"topk_ids: expected a list for each of the {lengths[number]} tokens of completion {number}, and as "
                f"many in topk_logprobs, got {tokens} and {len(some_logp)}"
            )
        if tokens == 0:
            continue
        found_ids, found = _as_tensors(number, some_ids, some_logp)
        missing = ~found.isfinite() | (found_ids < 0)
        found = found.masked_fill(missing, -math.inf)
        found, order = found.topk(min(k, found.shape[1]), dim=1)
        found_ids = found_ids.masked_fill(missing, -1).gather(1, order)
        ids[number, :tokens, : found.shape[1]] = found_ids
        logp[number, :tokens, : found.shape[1]] = found
    return ids, logp


def _as_tensors(number: int, ids: Any, logp: Any) -> tuple[Tensor, Tensor]:
    """Return ``[T, K]`` of a completion's lists; shorter ones are filled up, None becomes NaN."""
    try:
        tensors = torch.as_tensor(ids, dtype=torch.int64), torch.as_tensor(logp, dtype=torch.float32)
    except (TypeError, ValueError):  # lists of different lengths, or a None among them
        width = max((len(place) for place in ids), default=0)
        filled = [[*place, *[-1] * (width - len(place))] for place in ids]
        values = [[math.nan if x is None else x for x in place] for place in logp]
        values = [[*place, *[math.nan] * (width - len(place))] for place in values]
        tensors = torch.tensor(filled, dtype=torch.int64), torch.tensor(values, dtype=torch.float32)
    if tensors[0].shape != tensors[1].shape or tensors[0].dim() != 2:
        raise ValueError(
            f"topk_ids, topk_logprobs: expected [T, K] each of completion {number}, got {list(tensors[0].shape)} and "
            f"{list(tensors[1].shape)}"
        )
    return tensors
