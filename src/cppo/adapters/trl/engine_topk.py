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
        self._k = k
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
        # As tensors at once: the lists take ten times the memory.
        for own_ids, own in zip(ids, logprobs, strict=True):
            self._rows.append(likeliest(f"vLLM, completion {len(self._rows)}", own_ids, own, self._k))
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
        ValueError: naming the completion, and the token, whose numbers do not fit.
    """
    if len(rows) != len(mask):
        raise ValueError(f"topk_ids: expected a list for each of {len(mask)} completions, got {len(rows)}")
    ids = torch.full((*mask.shape, k), -1, dtype=torch.int32)
    logp = torch.full((*mask.shape, k), -math.inf)
    lengths = (mask > 0).sum(1).tolist()
    for number, (some_ids, some_logp) in enumerate(rows):
        tokens = len(some_ids)
        if tokens != len(some_logp) or (tokens != lengths[number] and lengths[number]) or tokens > mask.shape[1]:
            raise ValueError(
                f"topk_ids: expected a list for each of the {lengths[number]} tokens of completion {number}, and as "
                f"many in topk_logprobs, got {tokens} and {len(some_logp)}"
            )
        if tokens:
            found_ids, found = likeliest(f"completion {number}", some_ids, some_logp, k)
            ids[number, :tokens, : found.shape[1]] = found_ids
            logp[number, :tokens, : found.shape[1]] = found
    return ids, logp


def likeliest(where: str, ids: Any, logprobs: Any, k: int) -> tuple[Tensor, Tensor]:
    """Return ids and log-probs ``[T, <= k]`` of a completion's ``k`` likeliest tokens a place, the likeliest first."""
    if isinstance(ids, list) and isinstance(logprobs, list):
        for token, (some, others) in enumerate(zip(ids, logprobs, strict=True)):
            if len(some) != len(others):
                raise ValueError(
                    f"topk_ids, topk_logprobs: expected as many of each, got {len(some)} and {len(others)} at token "
                    f"{token} of {where}"
                )
    found_ids, found = _as_tensor(ids, -1, torch.int32), _as_tensor(logprobs, math.nan, torch.float32)
    if found_ids.shape != found.shape:
        raise ValueError(
            f"topk_ids, topk_logprobs: expected [T, K] each of {where}, got {list(found_ids.shape)} and "
            f"{list(found.shape)}"
        )
    missing = ~found.isfinite() | (found_ids < 0)
    found = found.masked_fill(missing, -math.inf)
    found_ids = found_ids.masked_fill(missing, -1)
    _check(where, found_ids, found)
    found, order = found.topk(min(k, found.shape[1]), dim=1)
    return found_ids.gather(1, order), found


def _check(where: str, ids: Tensor, logp: Tensor) -> None:
    """Refuse what is no part of a distribution, naming the token."""
    above = (logp > 1e-3).any(1).nonzero()
    if len(above):
        token = int(above[0])
        raise ValueError(
            f"topk_logprobs: expected log-probs <= 0, got {logp[token].max():.3g} at token {token} of {where}; "
            "probabilities?"
        )
    ordered = ids.sort(1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1).nonzero()
    if len(twice):
        token = int(twice[0])
        raise ValueError(
            f"topk_ids: expected distinct ids, got one twice at token {token} of {where}: {ids[token].tolist()}"
        )
    mass = logp.exp().sum(1)
    if (mass > 1.01).any():
        token = int(mass.argmax())
        raise ValueError(
            f"topk_logprobs: expected probabilities that sum to at most 1, got {mass[token]:.3g} at token {token} of "
            f"{where}"
        )


def _as_tensor(places: Any, filler: float, dtype: torch.dtype) -> Tensor:
    """Return ``[T, K]`` of a list a token; shorter ones, and a None, are filled."""
    if isinstance(places, Tensor) or hasattr(places, "__array__"):
        return torch.as_tensor(places, dtype=dtype)
    lengths = torch.tensor([len(place) for place in places])
    flat = [filler if value is None else value for place in places for value in place]
    whole = torch.full((len(places), int(lengths.max())), filler, dtype=dtype)
    whole[torch.arange(whole.shape[1]) < lengths[:, None]] = torch.tensor(flat, dtype=dtype)
    return whole
