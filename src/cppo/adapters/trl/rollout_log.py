"""The rollout log of a TRL run: a row a response an update, from the micro-batches that the loss sees."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from cppo.decision import Decision
from cppo.methods import Method, method_spec
from cppo.rollout_log import RolloutWriter


def rollout_rows(batch: dict[str, Any], decision: Decision, tokenizer: Any) -> list[dict[str, Any]]:
    """Return the rows of one micro-batch, without the number of the update.

    Args:
        batch: what TRL's ``_compute_loss`` is given; ``reward`` [B] is read where it is there.
        decision: the method's, on that micro-batch.
        tokenizer: TRL's processing class.
    """
    prompts = _decode(tokenizer, batch["prompt_ids"], batch["prompt_mask"])
    responses = _decode(tokenizer, batch["completion_ids"], batch["completion_mask"])
    columns = {
        "token_ids": batch["completion_ids"],
        "logp": decision.batch.logp,
        "rollout_logp": decision.batch.rollout_logp,
        "response_mask": decision.batch.layout.mask,
    }
    if decision.batch.divergence is not None:
        columns["divergence"] = decision.batch.divergence
    lists = {name: values.tolist() for name, values in columns.items()}
    rewards, advantages = batch["reward"].tolist(), batch["advantages"].tolist()
    return [
        {"prompt": prompts[row], "response": responses[row], "reward": rewards[row], "advantage": advantages[row]}
        | {name: values[row][:length] for name, values in lists.items()}
        for row, length in enumerate(batch["completion_mask"].sum(1).tolist())
    ]


def _decode(tokenizer: Any, ids: Tensor, mask: Tensor) -> list[str]:
    kept = [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
    texts: list[str] = tokenizer.batch_decode(kept, skip_special_tokens=False)
    return texts


class RolloutLog(TrainerCallback):
    """Keeps the rows of an update and writes them when the optimizer has stepped.

    Args:
        folder: where the files are written.
        part: what tells this process's files from the others'; empty if it is alone.
        method: the trust region.
        wait_for_all: returns when every process has come to it.
    """

    def __init__(self, folder: str | Path, part: str, method: Method, wait_for_all: Callable[[], None]) -> None:
        self._folder, self._part, self._wait_for_all = Path(folder), part, wait_for_all
        self._writer = RolloutWriter(self._folder, "rollout_log")
        self._writer.method = method_spec(method)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keep the rows of a micro-batch."""
        self._writer.add(rows)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the tokenizer beside the log."""
        if state.is_world_process_zero:
            self._writer.keep_tokenizer(kwargs.get("processing_class"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what was kept as the update that has just been made."""
        self._writer.write(state.global_step, self._part)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the page of the run beside its log."""
        self._wait_for_all()
        if not state.is_world_process_zero or not any(self._folder.glob("*.parquet")):
            return
        from cppo.inspect.page import write_page
        from cppo.inspect.runs import inspect_runs

        try:
            write_page(self._folder / "report.html", inspect_runs([self._folder], own=self._writer.method))
        except (OSError, ValueError) as error:  # a page that cannot be written costs no trained model
            warnings.warn(f"no report of {self._folder}: {error}", stacklevel=2)
