"""The rollout log of a verl run, written by the training workers while they train.

verl hands a policy loss its log-probs and advantages, not the tokens. So, when a log is asked for, the worker's own
``ppo_loss`` is wrapped by a function that remembers the micro-batch while the loss is computed, and passes everything
on as it is. Rows are kept until the optimizer steps, and then written.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# torch deletes the name torch.optim.optimizer, so that this is the one way in.
from torch.optim.optimizer import register_optimizer_step_post_hook

from cppo.decision import Decision
from cppo.methods import method_spec
from cppo.rollout_log import RolloutWriter


class RolloutLog:
    """One worker process's rollout log.

    Args:
        folder: where ``step-NNNNNN-DIGEST.parquet`` are written; every worker must reach the same one. Workers that
            hold the same responses (tensor and sequence parallel ranks) write the same file.
    """

    def __init__(self, folder: Path) -> None:
        self._writer = RolloutWriter(folder, "policy_loss.rollout_log")
        self._updates = 0
        self._micro_batch: Any = None
        register_optimizer_step_post_hook(self._after_step)

    def listening(self, ppo_loss: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``ppo_loss`` so wrapped that the log knows its micro-batch."""

        @functools.wraps(ppo_loss)
        def remembering(config: Any, model_output: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
            self._micro_batch = data
            try:
                return ppo_loss(config, model_output, data, *args, **kwargs)
            finally:
                self._micro_batch = None

        return remembering

    def add(self, decision: Decision, tokenizer: Any) -> None:
        """Keep a row a response of the micro-batch that is being judged."""
        data, batch = self._micro_batch, decision.batch
        if data is None:
            raise ValueError("policy_loss.rollout_log: the loss was called outside verl's training worker")
        columns = (batch.logp, batch.rollout_logp, batch.layout.mask, batch.advantages.expand(batch.layout.shape))
        logp, rollout_logp, mask, advantages = (column.cpu() for column in columns)
        prompts, responses = ([ids.tolist() for ids in _rows(data[name])] for name in ("prompts", "responses"))
        self._writer.method = method_spec(decision.method)
        self._writer.keep_tokenizer(tokenizer)
        rewards = [row.sum().item() for row in _rows(data["rm_scores"])] if "rm_scores" in data else [None] * len(logp)
        self._writer.add(
            [
                {
                    "prompt": None if tokenizer is None else tokenizer.decode(prompts[index]),
                    "response": None if tokenizer is None else tokenizer.decode(ids),
                    "reward": rewards[index],
                    "advantage": advantages[index][mask[index]].mean().item(),
                    "token_ids": ids,
                    "logp": logp[index, : len(ids)].tolist(),
                    "rollout_logp": rollout_logp[index, : len(ids)].tolist(),
                    "response_mask": mask[index, : len(ids)].tolist(),
                }
                for index, ids in enumerate(responses)
                if mask[index].any()  # verl pads its batches with empty responses
            ]
        )

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rows = self._writer.rows()
        if rows:  # else it was a critic's
            self._updates += 1
            digest = hashlib.sha256(b"".join(_bytes(row) for row in rows)).hexdigest()[:12]
            self._writer.write(_steps_of(optimizer) or self._updates, f"-{digest}")


def _rows(values: Tensor) -> list[Tensor]:
    return [row.cpu() for row in values.unbind()]


def _bytes(row: dict[str, Any]) -> bytes:
    return struct.pack(f"{len(row['token_ids'])}i", *row["token_ids"]) + repr(row["rollout_logp"]).encode()


def _steps_of(optimizer: torch.optim.Optimizer) -> int:
    """Return how many steps an optimizer has made, those before a checkpoint among them; 0 if it does not count."""
    steps = (state.get("step") for state in optimizer.state.values())
    return max((int(step) for step in steps if step is not None), default=0)


_logs: dict[str, RolloutLog] = {}


def log_in(folder: str) -> RolloutLog:
    """Return this process's log in that folder, made at the first call.

    Raises:
        ValueError: for a relative path.
    """
    if not Path(folder).is_absolute():
        raise ValueError(
            f"policy_loss.rollout_log={folder!r}: expected an absolute path; workers run in directories of their own"
        )
    if folder not in _logs:
        from verl.workers import engine_workers

        log = RolloutLog(Path(folder))
        # Looked up there when the worker is built, after this configuration was read.
        engine_workers.ppo_loss = log.listening(engine_workers.ppo_loss)
        _logs[folder] = log
    return _logs[folder]
