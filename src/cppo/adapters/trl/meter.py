"""The top-K divergence of TRL's micro-batches, without logits: from the hidden states that TRL computes anyway.

The rollout policy's K likeliest tokens come from the engine where it gives log-probs (vLLM, a rollout function), else
from the pass with which TRL scores the responses under the weights that sampled them. The current policy's log-probs of
these tokens follow from the hidden states of the loss's own forward pass and the sampled token's log-prob, which TRL
has: K + 1 rows of the output weight a token, no further product with the vocabulary. Where TRL rounds its logits
(bfloat16 models, autocast), its log-probs have errors that this would carry to every other token, many times the
divergence: there log pi is computed anew, from logits that nobody rounds, with one product more a micro-batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cppo.ops.token_statistics import token_statistics, topk_log_probs

from .engine_topk import EngineTopK, collect
from .head import OutputHead

# Columns of TRL's batches, row-aligned with the others. The sampled token's own log-prob stands there where the rollout
# policy's likeliest tokens come from the trainer, so that all of mu comes from one computation.
IDS, LOGP, SAMPLED = "rollout_topk_ids", "rollout_topk_logp", "rollout_sampled_logp"


class DivergenceMeter:
    """Listens to the backbone of a trainer's model; measures D of the micro-batch whose loss is being computed.

    Args:
        head: the model's output head.
        divergence: "topk_tv" or "topk_kl".
        k: how many of the rollout policy's likeliest tokens.
        engine: where vLLM's top-K is kept; None without vLLM.
        rollout_func: whether a rollout function brings the top-K.
    """

    def __init__(
        self, head: OutputHead, divergence: str, k: int, *, engine: EngineTopK | None, rollout_func: bool
    ) -> None:
        self._head, self._divergence, self._k = head, divergence, k
        self._engine, self._rollout_func = engine, rollout_func
        self._receive: Callable[[Tensor], None] | None = None
        self._scored: list[Any] | None = None  # not None: the next scoring pass is the rollout policy's
        self._batch: dict[str, Any] = {}
        self._hidden: Tensor | None = None
        me = weakref.ref(self)  # the model outlives its trainer; the hook stays, as a compiled model would not miss it

        def listen(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            meter = me()
            if meter is not None and meter._receive is not None:
                meter._receive(output[0])

        head.backbone.register_forward_hook(listen)

    @contextmanager
    def rollout(self, rows: list[dict[str, Any]]) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Around the making of a rollout batch; yields what adds the top-K to TRL's output."""
        from_trainer = self._engine is None and not self._rollout_func
        self._scored = [] if from_trainer else None
        if self._engine is not None:
            self._engine.clear()

        def attach(output: dict[str, Any]) -> None:
            mask = output["completion_mask"]
            if self._rollout_func:
                ids, logp = collect(_from_rows(rows, self._divergence), mask, self._k)
            elif self._engine is not None:
                ids, logp = collect(self._engine.rows(), mask, self._k)
            else:
                assert self._scored is not None
                ids = torch.cat([part.ids for part in self._scored])
                logp = torch.cat([part.logp for part in self._scored])
                output[SAMPLED] = torch.cat([part.token_logp for part in self._scored]).to(mask.device)
            output[IDS], output[LOGP] = ids.to(mask.device, torch.int32), logp.to(mask.device)

        try:
            yield attach
        finally:
            self._scored = None
            if self._engine is not None:
                self._engine.clear()

    @contextmanager
    def scoring(self, ids: Tensor, tokens: int) -> Iterator[None]:
        """Around a pass that scores the last ``tokens`` of ``ids``: the first of a rollout is the rollout policy's.

        A later one may be the reference policy's, which with PEFT runs through the same backbone.
        """
        scored = self._scored
        if scored is None or scored:
            yield
            return

        def keep(hidden: Tensor) -> None:
            # Reduced at once: hidden states of a whole rollout would be kept otherwise.
            done = sum(len(part.ids) for part in scored)
            arguments = self._head.arguments(_before(hidden, tokens))
            sampled = ids[done : done + len(hidden), -tokens:].to(arguments["hidden"].device)
            with self._head.precision(hidden):
                scored.append(topk_log_probs(k=self._k, token_ids=sampled, **arguments))

        self._receive = keep
        try:
            yield
        finally:
            self._receive = None

    @contextmanager
    def micro_batch(self, batch: dict[str, Any]) -> Iterator[None]:
        """Around the computation of a micro-batch's loss."""

        def keep(hidden: Tensor) -> None:
            self._hidden = hidden.detach()

        self._batch, self._receive = batch, keep
        try:
            yield
        finally:
            self._batch, self._hidden, self._receive = {}, None, None

    def measure(self, logp: Tensor, rollout_logp: Tensor) -> Tensor:
        """Return D ``[B, T]`` of the micro-batch, given the sampled tokens' log-probs under both policies."""
        ids, hidden = self._batch["completion_ids"], self._hidden
        if hidden is None:
            raise RuntimeError(
                f"divergence={self._divergence!r}: TRL's loss did not run the model's backbone; expected one forward "
                "pass a micro-batch"
            )
        arguments = self._head.arguments(_before(hidden, ids.shape[1]))
        device = arguments["hidden"].device
        mask = self._batch["completion_mask"].to(device) > 0
        given = None if self._head.rounds(hidden) else logp.detach().to(device)
        with torch.no_grad(), self._head.precision(hidden):
            found = token_statistics(
                token_ids=ids.to(device).masked_fill(~mask, -100),
                rollout_logp=self._batch.get(SAMPLED, rollout_logp).to(device),
                topk_ids=self._batch[IDS].to(device),
                rollout_topk_logp=self._batch[LOGP].to(device),
                divergence=self._divergence,
                logp=given,
                **arguments,
            ).divergence
        assert found is not None  # one was asked for
        return found.to(logp.device)


def _before(hidden: Tensor, tokens: int) -> Tensor:
    """Return the hidden states that predict the last ``tokens`` tokens."""
    return hidden[:, -tokens - 1 : -1]


def _from_rows(rows: list[dict[str, Any]], divergence: str) -> list[tuple[Any, Any]]:
    """Return what a rollout function gave beside the sampled tokens; TRL merges it into the rows of the batch."""
    for number, row in enumerate(rows):
        for name in ("topk_ids", "topk_logprobs"):
            if name not in row:
                raise ValueError(
                    f"rollout_func: expected {name!r} in what it returns, a list a completion of a list a token, "
                    f"because divergence={divergence!r} compares with the engine's likeliest tokens; completion "
                    f"{number} has none"
                )
            if isinstance(row[name], Tensor) and row[name].dim() == 3:  # not a list: TRL gives it whole to every row
                raise ValueError(
                    f"rollout_func: expected {name!r} to be a list of one [T, K] a completion, got one tensor "
                    f"{list(row[name].shape)}"
                )
    return [(row["topk_ids"], row["topk_logprobs"]) for row in rows]
