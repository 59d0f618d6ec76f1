"""The real TRL adapter with what a laboratory adds: skipped zero-variance groups, a rollout log, a CPU ledger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cppo.adapters.trl import TrustRegionTrainer
from cppo.adapters.trl.rollout_log import rollout_rows
from cppo.certificate import BoundTally, bound_tally
from cppo.decision import Decision
from cppo.lab.ledger import CpuLedger
from cppo.lab.problems import Problem, Task
from cppo.metrics import to_floats

# Half the range of a task's rewards, which are in [0, 1].
_XI = 0.5


class TaskReward:
    """A task's verifier as a TRL reward function; remembers the rewards of the last rollout batch."""

    __name__ = "task"

    def __init__(self, task: Task, problems: list[Problem], end_token_id: int, ledger: CpuLedger) -> None:
        self._task, self._problems, self._end = task, problems, end_token_id
        self._ledger = ledger
        self.last: list[float] = []

    def __call__(
        self,
        completions: list[str],
        completion_ids: list[list[int]],
        problem: list[int],
        **_: Any,
    ) -> list[float]:
        """Score each completion against the problem of that index."""
        with self._ledger.phase("scoring"):
            self.last = [
                self._task.score(self._problems[index], text, bool(ids) and ids[-1] == self._end)
                for text, ids, index in zip(completions, completion_ids, problem, strict=True)
            ]
        return self.last


class LabTrainer(TrustRegionTrainer):
    """One training run's trainer.

    Args:
        reward: the reward function, also given to TRL as ``reward_funcs``.
        ledger: charged by phase: generation, scoring (the rollout policy's log-probs and the verifier), own.
        skip_zero_variance: leave responses of groups with equal rewards out of the loss and of its denominator (the
            paper's "mask_std_0"). The number and the size of the minibatches stay.
        on_rows: receives the rollout log's rows of each micro-batch.
        certificate: log ``bound/*`` of each update (:mod:`cppo.certificate`), of the responses that are in the loss.
    """

    def __init__(
        self,
        *args: Any,
        reward: TaskReward,
        ledger: CpuLedger,
        skip_zero_variance: bool,
        on_rows: Callable[[list[dict[str, Any]]], None],
        certificate: bool = False,
        **kwargs: Any,
    ) -> None:
        self._reward, self._ledger, self._on_rows = reward, ledger, on_rows
        self._skip_zero_variance = skip_zero_variance
        self._certificate = certificate
        self._bounds: BoundTally | None = None  # of the update's micro-batches so far
        super().__init__(*args, reward_funcs=reward, **kwargs)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._ledger.phase("generation"):
            return super()._generate(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        with self._ledger.phase("scoring"):
            output = super()._generate_and_score_completions(inputs)
            rewards = torch.tensor(self._reward.last, dtype=torch.float64)
            output["reward"] = rewards
            groups = rewards.view(len(rewards) // int(self.num_generations or 1), -1)
            if self._certificate:
                # Less the mean of the group's other responses, which does not depend on this one.
                others = (groups.sum(dim=1, keepdim=True) - groups) / (groups.shape[1] - 1)
                output["centred_reward"] = (groups - others).flatten()
            if self._skip_zero_variance:
                varies = (groups != groups[:, :1]).any(dim=1).repeat_interleave(groups.shape[1])
                kept = output["completion_mask"] * varies[:, None]
                # TRL's mask of tokens that carry no loss, but that the model still attends to.
                output["tool_mask"] = kept
                output["num_items_in_batch"] = kept.sum().clamp(min=1)
            return output

    def on_decision(self, decision: Decision) -> None:
        """Log the micro-batch's responses besides the metrics."""
        with self._ledger.phase("own"):
            super().on_decision(decision)
            if self._certificate:
                part = bound_tally(decision, reward=self._micro_batch["centred_reward"])
                self._bounds = part if self._bounds is None else self._bounds + part
            rows = rollout_rows(self._micro_batch, decision, self.processing_class)
            # A skipped response was written by the policy all the same.
            self._on_rows(
                [
                    row | {"step": self.state.global_step + 1, "response_mask": [True] * len(row["token_ids"])}
                    for row in rows
                ]
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the certificate of the micro-batches since the last log to TRL's."""
        if self._bounds is not None:
            with self._ledger.phase("own"):
                found, self._bounds = to_floats(self._bounds.metrics(xi=_XI)), None
            for name, value in found.items():
                self._metrics["train"][name].append(value)
        super().log(logs, start_time)
