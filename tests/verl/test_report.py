"""The page of a verl run: written by hydra's callback when the launched process ends, whatever the end."""

import os
import pathlib
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_module
from test_adapter import SOURCE

from cppo.rollout_log import write_rollouts

TARGET = "cppo.adapters.verl_report.RolloutReport"
RECIPES = pathlib.Path(__file__).parents[2] / "recipes" / "verl"
# In main_ppo's place: a hydra application that trains nothing.
APPLICATION = """
import hydra

@hydra.main(config_path=None, version_base=None)
def main(config):
    print("trained", 1 / config.denominator)

main()
"""


def launch(folder, *overrides):
    (folder / "application.py").write_text(APPLICATION)
    return subprocess.run(
        [sys.executable, "application.py", f"+hydra.callbacks.report._target_={TARGET}", *overrides],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(SOURCE)}, text=True, check=False, capture_output=True,
    )  # fmt: skip


@pytest.fixture
def log(tmp_path):
    lists = {"token_ids": [1, 2], "logp": [-1.0, -2.0], "rollout_logp": [-1.1, -2.0], "response_mask": [True, True]}
    row = {"prompt": "a", "response": "b c", "reward": 1.0, "advantage": 1.0, **lists}
    (tmp_path / "rollouts").mkdir()
    write_rollouts(tmp_path / "rollouts" / "step-000001-ab.parquet", [row | {"step": 1}], method="cppo")
    return tmp_path / "rollouts"


@pytest.mark.parametrize("denominator", [1, 0])
def test_the_page_is_written_after_a_good_end_and_after_a_bad_one(tmp_path, log, denominator):
    key = "+actor_rollout_ref.actor.policy_loss.rollout_log"
    done = launch(tmp_path, f"{key}={log}", f"+denominator={denominator}")
    assert (done.returncode == 0) == (denominator == 1), done.stderr
    assert ("trained 1.0" in done.stdout) == (denominator == 1)
    assert '"file":"step-000001-ab.parquet"' in (log / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path):
    done = launch(tmp_path, "+actor_rollout_ref.actor.policy_loss.rollout_log=nowhere", "+denominator=1")
    assert done.returncode == 0
    assert "Callback RolloutReport.on_job_end raised ValueError: nowhere: expected a run's folder" in done.stderr
    assert "Callback" not in launch(tmp_path, "+denominator=1").stderr  # no log was asked for


def test_the_recipes_have_it():
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer", overrides=[f"hydra.searchpath=[file://{RECIPES}]", "+setting=qwen3-1.7b", "+method=cppo"],
            return_hydra_config=True,
        )  # fmt: skip
    assert config.hydra.callbacks.report._target_ == TARGET
