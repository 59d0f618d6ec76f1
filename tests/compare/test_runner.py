"""Real, tiny runs: matched, resumed, kept apart from failures, and equal to what ``cppo train`` gives."""

import dataclasses
import json

import pytest
from rich.console import Console

from cppo.compare.experiment import report, run_study
from cppo.compare.results import ResultFolder, read_lines
from cppo.compare.runner import Runner
from cppo.compare.study import make_study
from cppo.compare.worker import measures
from cppo.lab.folder import read_metrics
from cppo.lab.run import Run, start_run

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


def runner(folder, jobs=2, keep=False):
    return Runner(folder, jobs, Console(quiet=True), keep=keep, quiet=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = ResultFolder(tmp_path_factory.mktemp("compare"))
    folder.study.write_text(json.dumps(TINY))
    plan = make_study(TINY)
    run_study(plan, folder, runner(folder))
    return folder


def without_times(row):
    return {key: value for key, value in row.items() if key not in ("cpu_seconds", "wall_seconds")}


def test_a_line_is_what_a_run_by_itself_gives(finished, tmp_path):
    plan = make_study(TINY)
    rows = finished.rows()
    assert set(rows) == {cell.key for cell in plan.cells()}
    cell = next(cell for cell in plan.cells() if cell.arm == "grpo" and cell.seed == 1)
    run = Run(cell.config, start_run(cell.config, tmp_path / "run"), Silence())  # with a warm start of its own
    run.train()
    row = rows[cell.key]
    again = measures(read_metrics(tmp_path / "run" / "metrics.jsonl"), cell.config.updates)
    assert {key: row[key] for key in again} == again
    assert row["rollout"] == [0, 1, 2]
    assert len(row["curves"]["gap"]) == len(row["tail"]) == 2
    assert all(tail >= gap for tail, gap in zip(row["tail"], row["curves"]["gap"], strict=True))


def test_arms_of_a_seed_start_from_the_same_accuracy(finished):
    starts = {}
    for row in finished.rows().values():
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
    added = [row for key, row in folder.rows().items() if key not in finished.rows()]
    assert [row["arm"] for row in added] == ["none", "none"]


def test_lines_that_were_cut_off_are_run_again_with_the_same_numbers(finished, tmp_path):
    folder = ResultFolder(tmp_path)
    text = finished.results.read_text()
    folder.results.write_text(text[: len(text) - 200])  # in the middle of the last line
    run_study(make_study(TINY), folder, runner(folder, jobs=1))
    one, two = folder.rows(), finished.rows()
    assert {key: without_times(row) for key, row in one.items()} == {k: without_times(row) for k, row in two.items()}


def test_a_failing_run_is_noted_and_costs_the_others_nothing(finished, tmp_path):
    folder = ResultFolder(tmp_path)
    folder.results.write_bytes(finished.results.read_bytes())
    plan = make_study(TINY | {"arms": {"cppo": TINY["arms"]["cppo"], "bad": "policy_gradient"}})
    folder.runs.mkdir()
    for cell in plan.cells():
        if cell.arm == "bad":
            (folder.runs / cell.key).write_text("not a folder, and not ours to remove")
    run = runner(folder)
    run_study(plan, folder, run)
    assert len(run.failed) == 2
    assert run.failed[0].startswith("default / bad / seed ")
    assert "Traceback" in read_lines(folder.failures, ("key", "error"))[0]["error"]
    document, _ = report(plan, folder, "final")
    assert document["missing"] == 2


def test_kept_runs_can_be_inspected(tmp_path):
    from cppo.inspect.runs import inspect_runs

    plan = make_study(TINY | {"seeds": {"first": 0, "count": 1}, "arms": {"cppo": TINY["arms"]["cppo"]}})
    folder = ResultFolder(tmp_path)
    run_study(plan, folder, runner(folder, keep=True))
    [cell] = plan.cells()
    [found] = inspect_runs([folder.runs / cell.key])["runs"]
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
    chosen = run_study(plan, folder, runner(folder))
    assert json.loads(folder.chosen.read_text()) == chosen
    rows = folder.rows()
    assert sum(row["seed"] == 9 for row in rows.values()) == 2 * 3
    assert all(cell.key in rows for cell in plan.cells(chosen))
    document, _ = report(plan, folder, "final")
    assert set(document["settings"]["default"]["arms"]) == {"cppo", "grpo", "cppo (searched)", "grpo (searched)"}
    for path in (folder.summary, folder.tables, folder.report):
        assert path.stat().st_size > 1000


def test_seeds_are_all_that_differs_between_the_cells_of_an_arm():
    cells = [cell for cell in make_study(TINY).cells() if cell.arm == "cppo"]
    assert [dataclasses.replace(cell.config, seed=0) for cell in cells] == [cells[0].config] * 2
