"""The page of a verl run, written when ``main_ppo`` ends: a callback of hydra, by which verl starts it.

    +hydra.callbacks.report._target_=cppo.adapters.verl_report.RolloutReport

verl's workers, which write the log, do not know when a run ends; the process that was launched does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback  # type: ignore[import-not-found]  # verl's environment has it
from omegaconf import DictConfig, OmegaConf  # type: ignore[import-not-found]


class RolloutReport(Callback):  # type: ignore[misc]
    """Writes ``report.html`` beside the log that ``policy_loss.rollout_log`` names, also of a run that failed."""

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """Write the page. hydra makes a warning of what goes wrong here: it costs no trained model."""
        folder = OmegaConf.select(config, "actor_rollout_ref.actor.policy_loss.rollout_log")
        if folder is None:
            return
        from cppo.inspect.page import write_page
        from cppo.inspect.runs import inspect_runs

        write_page(Path(folder) / "report.html", inspect_runs([Path(folder)]))
