"""``studies/blame.py``: the push on right and on wrong sums, by hand."""

import math

import pytest
from scripts import load_script

from cppo.lab.config import RunConfig, dump_config
from cppo.rollout_log import write_rollouts

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def blame():
    return load_script("studies/blame.py")


def response(text, advantage, logp, rollout_logp):
    # 3 + 1 = 4, + 0 = 4, + 0 = 4; the end token is the fifth.
    return {
        "step": 1, "prompt": "3100=", "response": text, "reward": float(advantage > 0), "advantage": advantage,
        "token_ids": [1, 2, 3, 4, 5], "logp": [math.log(p) for p in logp],
        "rollout_logp": [math.log(p) for p in rollout_logp], "response_mask": [True] * 5,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "rollouts").mkdir(parents=True)
    # Pushed down: the third sum is wrong, the fourth follows from it. Its ratio of 0.5 is what GRPO rejects.
    failed = response("3455", -2.0, [0.9, 0.8, 0.1, 0.5, 0.9], [0.9, 0.8, 0.2, 0.5, 0.9])
    solved = response("3444", 1.0, [0.5, 0.5, 0.5, 0.5, 0.75], [0.5, 0.5, 0.5, 0.5, 0.5])
    write_rollouts(folder / "rollouts" / "step-000001.parquet", [failed, solved])
    return folder


@pytest.mark.parametrize(("method", "kept"), [("policy_gradient", 1), ("grpo", 0)])
def test_the_push_on_right_and_on_wrong_sums(blame, run, method, kept):
    (run / "config.yaml").write_text(dump_config(RunConfig(task="running_sum?operands=4", method=method), {}))
    name, sums, quadrants = blame.measure(run)
    assert name == method
    # k |A| (1 - pi): of the right sums 2 (0.1 + 0.2 + 0.5), of the wrong one 0.5 x 2 x 0.9.
    assert sums[0] == pytest.approx([3, 0, 1.6])
    assert sums[1] == pytest.approx([1, 1 - kept, 0.9 * kept])
    assert quadrants[-1, 1] == pytest.approx([0, 0])
    assert quadrants[-1, 0] == pytest.approx([1.6 + 0.2 + 0.9 * kept, 0])  # the end token counts here
    assert quadrants[1, 0] == pytest.approx([2, 0])
    # The ratio of 1.5, above GRPO's 1.28: its whole push, and the part beyond k = 1.
    assert quadrants[1, 1] == pytest.approx([1.5 * 0.25 * kept, 0.5 * 0.25 * kept])


def test_both_tables_are_printed(blame, run, capsys):
    (run / "config.yaml").write_text(dump_config(RunConfig(task="running_sum?operands=4", method="grpo"), {}))
    blame.main([run])
    printed = capsys.readouterr().out
    assert "100.0%" in printed
    assert "beyond k = 1" in printed


def test_what_is_no_run_on_a_sum_task_is_one_line(blame, run):
    with pytest.raises(SystemExit, match="nowhere: expected the folder of a run"):
        blame.measure(run / "nowhere")
    (run / "config.yaml").write_text(dump_config(RunConfig(task="reasoning_gym:chain_sum", model="./other"), {}))
    with pytest.raises(SystemExit, match="expected a run on a sum task"):
        blame.measure(run)
