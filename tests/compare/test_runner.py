"""Real, tiny runs: matched, resumed, kept apart from failures, and equal to what ``cppo train`` gives."""

import json
import math
import shutil
import subprocess
import sys
import time

import pytest
from rich.console import Console

from cppo.compare.experiment import chosen_of, report, run_study
from cppo.compare.results import ResultFolder
from cppo.compare.runner import Runner
from cppo.compare.study import make_study
from cppo.compare.worker import measures, tails
from cppo.lab.folder import read_metrics
from cppo.lab.run import Run, start_run
from cppo.rollout_log import write_rollouts

pytestmark = [pytest.mark.train, pytest.mark.processes, pytest.mark.slow]
TINY = {
    "title": "tiny",
    "seeds": {"first": 0, "count": 2},
    "base": {
        "task": "running_sum?operands=4&slip=0.3", "rollouts": 2, "epochs": 2, "prompts": 4, "generations": 4,
        "minibatch": 8, "eval_problems": 32, "eval_every": 1, "warm_start_steps": 40, "learning_rate": 3e-3,
    },
    "arms": {"cppo": "cppo?delta=0.02&delta_b=0.002", "grpo": "grpo"},
    "reference": "cppo",
}  # fmt: skip


class Silence:
    def phase(self, name, total=None):
        pass

    def advance(self, row=None):
        pass


def runner(folder, jobs=2, keep=False, reuse=()):
    return Runner(folder, jobs, Console(quiet=True), keep=keep, quiet=True, reuse=reuse)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = ResultFolder(tmp_path_factory.mktemp("compare"))
    folder.study.write_text(json.dumps(TINY))
    plan = make_study(TINY)
    run_study(plan, folder, runner(folder))
    return folder


def by_key(folder):
    return {row["key"]: row for row in folder.rows()}


def without_times(row):
    return {key: value for key, value in row.items() if key not in ("cpu_seconds", "wall_seconds")}


def test_a_line_is_what_a_run_by_itself_gives(finished, tmp_path):
    plan = make_study(TINY)
    rows = by_key(finished)
    assert set(rows) == {cell.key for cell in plan.cells()}
    cell = next(cell for cell in plan.cells() if cell.arm == "grpo" and cell.seed == 1)
    run = Run(cell.config, start_run(cell.config, tmp_path / "run"), Silence())  # with a warm start of its own
    run.train()
    row = rows[cell.key]
    again = measures(read_metrics(tmp_path / "run" / "metrics.jsonl"), cell.config.updates)
    assert {key: row[key] for key in again} == again
    assert row["rollout"] == [0, 1, 2]
    assert len(row["curves"]["gap"]) == len(row["tail"]) == 2
    measured = list(zip(row["tail"], row["curves"]["gap"], strict=True))
    assert all((tail is None) == (gap is None) for tail, gap in measured)  # of the same tokens
    assert any(gap for _, gap in measured)
    assert all(tail >= gap for tail, gap in measured if gap is not None)


def test_arms_of_a_seed_start_from_the_same_accuracy(finished):
    starts = {}
    for row in finished.rows():
        starts.setdefault(row["seed"], set()).add(row["accuracy"][0])
    assert all(len(values) == 1 for values in starts.values())
    assert len(list(finished.starts.iterdir())) == 2
    assert not any(finished.runs.iterdir())  # nothing is kept unasked


def test_what_is_there_is_not_run_again_and_what_is_added_runs_alone(finished, tmp_path):
    before = finished.results.read_bytes()
    run_study(make_study(TINY), finished, runner(finished))
    assert finished.results.read_bytes() == before
    later = TINY | {"arms": TINY["arms"] | {"none": "policy_gradient"}}
    folder = ResultFolder(tmp_path)
    folder.study.write_text(json.dumps(later))
    folder.results.write_bytes(before)
    run_study(make_study(later), folder, runner(folder))
    assert folder.results.read_bytes().startswith(before)
    added = [row for key, row in by_key(folder).items() if key not in by_key(finished)]
    assert [row["arm"] for row in added] == ["none", "none"]


def test_runs_and_starts_of_another_study_are_taken_under_this_ones_names(finished, tmp_path):
    other = TINY | {
        "seeds": {"first": 1, "count": 2},
        "settings": {"as there": {}, "longer": {"rollouts": 3}},
        "arms": {"ratio": "grpo"}, "reference": "ratio",
    }  # fmt: skip
    folder = ResultFolder(tmp_path)
    folder.study.write_text(json.dumps(other))
    run_study(make_study(other), folder, runner(folder, reuse=[finished]))
    there = {(row["arm"], row["seed"]): row for row in finished.rows()}
    here = {(row["setting"], row["seed"]): row for row in folder.rows()}
    assert set(here) == {("as there", 1), ("as there", 2), ("longer", 1), ("longer", 2)}
    assert here["as there", 1] == there["grpo", 1] | {"setting": "as there", "arm": "ratio"}
    # The start of seed 1 was taken, so its time of writing is the older one; that of seed 2 was made.
    ages = {path.name: (path / "model.safetensors").stat().st_mtime for path in folder.starts.iterdir()}
    older = {path.name: (path / "model.safetensors").stat().st_mtime for path in finished.starts.iterdir()}
    assert len(ages) == 2
    assert [age for name, age in ages.items() if name in older] == [older[name] for name in ages if name in older]
    assert len(set(ages) & set(older)) == 1
    assert here["longer", 1]["accuracy"][0] == here["as there", 1]["accuracy"][0]


@pytest.mark.parametrize("cut", [-200, -1])  # in the middle of the last line, and just before its end
def test_lines_that_were_cut_off_are_run_again_with_the_same_numbers(finished, tmp_path, cut):
    folder = ResultFolder(tmp_path)
    text = finished.results.read_text()
    folder.results.write_text(text[:cut])
    run_study(make_study(TINY), folder, runner(folder, jobs=1))
    one, two = by_key(folder), by_key(finished)
    assert {key: without_times(row) for key, row in one.items()} == {k: without_times(row) for k, row in two.items()}


def test_a_failing_run_is_noted_and_costs_the_others_nothing(finished, tmp_path):
    folder = ResultFolder(tmp_path)
    folder.results.write_bytes(finished.results.read_bytes())
    shutil.copytree(finished.starts, folder.starts)
    plan = make_study(TINY | {"arms": TINY["arms"] | {"none": "policy_gradient"}})
    broken = next(cell for cell in plan.cells() if cell.seed == 1)
    (folder.starts / broken.start_key / "model.safetensors").write_bytes(b"cut")
    run = runner(folder)
    run_study(plan, folder, run)
    assert len(run.failed) == 1
    assert run.failed[0].startswith("default / none / seed 1: ValueError: ")
    assert ["Traceback" in error for error in folder.failed().values()] == [True]
    document, _ = report(plan, folder, None, "final")
    assert (document["missing"], document["failed"]) == (1, 1)
    assert document["settings"]["default"]["without"] == {"none": {"failed": 1, "missing": 0}}
    assert not any(folder.runs.iterdir())  # what the failed run left is gone


def test_a_policy_that_diverges_is_scored_and_not_left_out(finished, tmp_path):
    folder = ResultFolder(tmp_path)
    folder.results.write_bytes(finished.results.read_bytes())
    shutil.copytree(finished.starts, folder.starts)
    plan = make_study(TINY | {"arms": TINY["arms"] | {"wild": {"method": "policy_gradient", "learning_rate": 1e30}}})
    run = runner(folder)
    run_study(plan, folder, run)
    assert run.failed == []
    wild = [row for row in folder.rows() if row["arm"] == "wild"]
    assert [row["diverged"] for row in wild] == [True, True]
    assert all(row["rollout"] == [0, 1, 2] and row["accuracy"][1:] == [0.0, 0.0] for row in wild)
    document, _ = report(plan, folder, None, "final")
    arm = document["settings"]["default"]["arms"]["wild"]
    assert (arm["collapsed"], arm["diverged"]) == (2, 2)


def test_a_warm_start_that_fails_costs_its_own_runs_and_no_others(finished, tmp_path):
    folder = ResultFolder(tmp_path)
    plan = make_study(TINY)
    key = next(cell.start_key for cell in plan.cells() if cell.seed == 1)
    shutil.copytree(finished.starts, folder.starts)
    shutil.rmtree(folder.starts / key)
    (folder.starts / key).write_text("no folder")
    run = runner(folder)
    run_study(plan, folder, run)
    assert [text.partition(": ")[0] for text in run.failed] == ["default / cppo / seed 1", "default / grpo / seed 1"]
    assert {row["seed"] for row in folder.rows()} == {0}
    assert len(folder.failed()) == 2


def test_workers_end_with_the_process_that_started_them(tmp_path):
    (tmp_path / "study.yaml").write_text(
        json.dumps(TINY | {"base": TINY["base"] | {"rollouts": 500, "eval_every": 500}})
    )
    code = "from cppo.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, "compare", str(tmp_path), "--jobs", "1"])
    while not list(tmp_path.glob("runs/.*/run/metrics.jsonl")):
        time.sleep(0.1)
        assert process.poll() is None
    [metrics] = tmp_path.glob("runs/.*/run/metrics.jsonl")
    process.kill()
    process.wait()
    time.sleep(3)
    size = metrics.stat().st_size if metrics.exists() else 0
    time.sleep(3)
    assert (metrics.stat().st_size if metrics.exists() else 0) == size


def test_the_time_that_is_left_is_of_the_runs_that_are_left(finished):
    run = runner(finished, jobs=4)
    cells = make_study(TINY).cells()
    run._seconds = {"default": [3600.0, 7200.0, 3600.0 * 100]}
    assert run._left(cells) == "about 2 h 0 min left"  # four runs of two hours side by side
    assert run._left(cells[:1]) == "about 2 h 0 min left"  # one is not faster for having four processes
    run._seconds = {"default": [36.0 * 3600]}
    assert run._left(cells[:2]) == "about 36 h 0 min left"
    run._seconds = {}
    assert run._left(cells) == ""


def update(step, tokens, gap, masked, budget, **more):
    return {
        "step": step, "input/tokens": tokens, "divergence/probability_gap": gap, "gate/masked_fraction": masked,
        "gate/budget_share": budget, **more,
    }  # fmt: skip


METRICS = [
    {"step": 0, "eval/accuracy": 0.2, "eval/standard_error": 0.02},
    update(1, 100.0, 0.3, 0.1, 0.5),
    update(2, 300.0, 0.1, 0.0, 0.0),
    update(3, 0.0, 0.0, 0.0, 0.0),
    update(4, 0.0, 0.0, 0.0, 0.0, **{"eval/accuracy": 0.4, "eval/standard_error": 0.02}),
]


def test_updates_without_tokens_weigh_nothing():
    found = measures(METRICS, 2)
    assert found["rollout"] == [0, 2]
    assert found["accuracy"] == [0.2, 0.4]
    assert found["curves"]["gap"] == [0.15, None]  # (100 * 0.3 + 300 * 0.1) / 400
    assert found["curves"]["masked"] == [0.025, None]
    assert found["curves"]["budget_share"] == [0.5, None]  # of the ten tokens that were masked


def test_the_tail_is_the_top_tenth_of_the_tokens_in_the_loss(tmp_path):
    rows = []
    for index in range(4):
        logp = [math.log(0.5 + 0.01 * (10 * index + t)) for t in range(10)] if index else [0.0] * 10
        rows.append({
            "step": 1, "prompt": "p", "response": "r", "reward": 1.0, "advantage": float(index > 0),
            "token_ids": [1] * 10, "logp": logp, "rollout_logp": [math.log(0.5)] * 10, "response_mask": [True] * 10,
        })  # fmt: skip
    write_rollouts(tmp_path / "step-000001.parquet", rows)
    gaps = sorted((0.01 * k for k in range(10, 40)), reverse=True)
    assert tails(tmp_path, with_advantage=True) == [pytest.approx(sum(gaps[:3]) / 3, rel=1e-3)]
    assert tails(tmp_path, with_advantage=False) == [pytest.approx(0.5, rel=1e-3)]


def test_kept_runs_can_be_inspected(tmp_path):
    from cppo.inspect.runs import inspect_runs

    name = "a" * 240  # longer than a file system lets a folder's name be
    arms = {"arms": {name: TINY["arms"]["cppo"]}, "reference": name}
    plan = make_study(TINY | arms | {"seeds": {"first": 0, "count": 1}})
    folder = ResultFolder(tmp_path)
    run_study(plan, folder, runner(folder, keep=True))
    [cell] = plan.cells()
    [kept] = folder.runs.iterdir()
    assert kept.name == f"default-{'a' * 112}-{cell.key}"
    [found] = inspect_runs([kept])["runs"]
    assert found["tokens"] > 0


def test_a_second_process_is_kept_out(finished):
    with finished.locked(), pytest.raises(ValueError, match="another `cppo compare` is running it"):
        run_study(make_study(TINY), finished, runner(finished))


def test_a_search_runs_in_two_steps(tmp_path):
    content = TINY | {
        "seeds": {"first": 0, "count": 1},
        "search": {
            "seeds": {"first": 9, "count": 1}, "factors": [1, 0.5],
            "knobs": {"cppo": ["cppo?delta=0.05&delta_b=0.005"], "grpo": ["grpo?clip_low=0.1&clip_high=0.1"]},
        },
    }  # fmt: skip
    folder, plan = ResultFolder(tmp_path), make_study(content)
    folder.chosen.write_text("{}")  # of a study that was edited since
    assert chosen_of(plan, folder) == {}
    assert not folder.chosen.exists()
    run_study(plan, folder, runner(folder))
    chosen = chosen_of(plan, folder)
    assert json.loads(folder.chosen.read_text()) == chosen
    rows = folder.rows()
    assert sum(row["seed"] == 9 for row in rows) == 2 * 3
    assert all(rows.of(cell) for cell in plan.cells(chosen))
    document, _ = report(plan, folder, None, "final")
    assert set(document["settings"]["default"]["arms"]) == {"cppo", "grpo", "cppo (searched)", "grpo (searched)"}
    for path in (folder.summary, folder.tables, folder.report):
        assert path.stat().st_size > 1000
