"""What a study runs next, what it takes from others instead, and what its log says; no process is started here."""

import io
import math
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest
from rich.console import Console
from rows import CONTENT, line, study

from cppo.compare import runner as module
from cppo.compare.results import ResultFolder
from cppo.compare.runner import Queue, Runner

pytestmark = pytest.mark.train


@pytest.fixture
def nothing_runs(monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("a process was started")

    monkeypatch.setattr(module, "ProcessPoolExecutor", refuse)


def folder_of(path, cells, accuracy):
    path.mkdir()
    folder = ResultFolder(path)
    for cell in cells:
        folder.append(line(cell, [0.2, accuracy]))
    return folder


def run(folder, plan, others):
    Runner(folder, 1, Console(quiet=True), keep=False, quiet=True, reuse=others).run("t", plan.cells())
    return {(row["setting"], row["arm"], row["seed"]): row["accuracy"][-1] for row in folder.rows()}


def test_its_own_lines_come_first_then_the_others_in_their_order(tmp_path, nothing_runs):
    plan = study()
    cells = plan.cells()
    own = folder_of(tmp_path / "own", cells[:5], 0.3)
    one, two = folder_of(tmp_path / "one", cells[3:12], 0.4), folder_of(tmp_path / "two", cells, 0.5)
    found = run(own, plan, [one, two])
    assert [found[c.setting, c.arm, c.seed] for c in cells] == [0.3] * 5 + [0.4] * 7 + [0.5] * (len(cells) - 12)
    assert len(own.results.read_text().splitlines()) == len(cells)
    before = own.results.read_bytes()
    run(own, plan, [one, two])
    assert own.results.read_bytes() == before


def test_a_line_comes_under_this_studys_names(tmp_path, nothing_runs):
    there = study()
    names = {"grpo": "ratio", "cppo": "cppo", "none": "nothing"}
    plan = study(
        settings={f"{name} here": knobs for name, knobs in CONTENT["settings"].items()},
        arms={names[arm]: knobs for arm, knobs in CONTENT["arms"].items()},
    )
    other = folder_of(tmp_path / "other", there.cells(), 0.4)
    found = run(folder_of(tmp_path / "own", [], 0.0), plan, [other])
    assert set(found) == {(c.setting, c.arm, c.seed) for c in plan.cells()}


def test_a_run_that_none_has_is_not_made_up(tmp_path, nothing_runs):
    plan = study()
    other = folder_of(tmp_path / "other", plan.cells()[:-1], 0.4)
    own = folder_of(tmp_path / "own", [], 0.0)
    with pytest.raises(AssertionError, match="a process was started"):
        run(own, plan, [other])
    assert len(list(own.rows())) == len(plan.cells()) - 1


def taken(queue, count):
    """The next tasks, as (seed, setting, arm or "start")."""
    tasks = [queue.pop() for _ in range(count)]
    return [task and (task[0].seed, task[0].setting, "start" if task[1] else task[0].arm) for task in tasks]


def test_a_warm_start_comes_just_before_the_first_run_that_needs_it():
    there = set()
    cells = study().cells()
    queue = Queue(cells, there.__contains__)
    # Both settings share the start of a seed: while seed 0's is made, there is only the next seed's to do.
    assert taken(queue, 2) == [(0, "calm", "start"), (1, "calm", "start")]
    there.add(cells[0].start_key)
    queue.has_started(cells[0])
    assert taken(queue, 3) == [(0, "calm", "cppo"), (0, "calm", "grpo"), (0, "calm", "none")]
    assert taken(queue, 4) == [
        (0, "wild", "cppo"), (0, "wild", "grpo"), (0, "wild", "none"), (2, "calm", "start")
    ]  # fmt: skip
    there.update(cell.start_key for cell in cells)
    assert taken(queue, len(cells)) == [(c.seed, c.setting, c.arm) for c in cells[6:]] + [None] * 6
    assert queue.waiting == []


def test_a_start_that_is_made_sooner_is_used_sooner():
    there = set()
    cells = study().cells()
    queue = Queue(cells, there.__contains__)
    taken(queue, 2)
    second = next(cell for cell in cells if cell.seed == 1)
    there.add(second.start_key)
    assert taken(queue, 2) == [(1, "calm", "cppo"), (1, "calm", "grpo")]
    gone = [(1, "calm", "cppo"), (1, "calm", "grpo")]
    assert queue.waiting == [cell for cell in cells if (cell.seed, cell.setting, cell.arm) not in gone]


def test_nothing_is_to_be_done_while_all_wait_for_a_start_under_way():
    cells = [cell for cell in study().cells() if cell.seed == 0]
    queue = Queue(cells, lambda key: False)
    assert taken(queue, 2) == [(0, "calm", "start"), None]
    queue.has_started(cells[0])  # made, and gone again: it is asked for once more
    assert taken(queue, 2) == [(0, "calm", "start"), None]
    assert queue.lose(cells[0]) == cells
    assert queue.waiting == []


def test_a_pretrained_model_has_no_warm_start():
    plan = study(base={"epochs": 4, "rollouts": 2, "model": "some/folder"})
    queue = Queue(plan.cells(), lambda key: False)
    assert taken(queue, 1) == [(0, "calm", "cppo")]


class HerePool:
    """A pool of processes that does each task at once, here."""

    def __init__(self, *arguments, **named):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def shutdown(self, **named):
        pass

    def submit(self, task, *arguments, **named):
        future = Future()
        try:
            future.set_result(task(*arguments, **named))
        except RuntimeError as error:
            future.set_exception(error)
        return future


def write_start(config, path):
    path.mkdir(parents=True)
    (path / "model.safetensors").touch()


def log_of(monkeypatch, folder, plan, run_cell, **named):
    """What a runner prints that has no terminal, where a run is ``run_cell(cell)``."""
    log = io.StringIO()
    monkeypatch.setattr(module, "ProcessPoolExecutor", HerePool)
    monkeypatch.setattr(module, "run_cell", lambda cell, start, runs, *, keep: run_cell(cell))
    monkeypatch.setattr(module, "make_cell_start", write_start)
    Runner(folder, 1, Console(file=log), keep=False, **named).run("t", plan.cells())
    return [entry for entry in log.getvalue().splitlines() if " / " in entry]


def test_a_log_says_what_ended_and_how_long_the_rest_takes(monkeypatch, tmp_path):
    def run_cell(cell):
        if (cell.arm, cell.seed) == ("grpo", 1):
            raise RuntimeError("made up")
        return line(cell, [0.2, 0.5], wall_seconds=3600.0)

    plan = study(seeds={"first": 0, "count": 2}, settings={"calm": {}})
    assert log_of(monkeypatch, folder_of(tmp_path / "own", [], 0.0), plan, run_cell, quiet=False) == [
        "calm / cppo / seed 0: 0.500  (5 to go, about 5 h 0 min left)",
        "calm / grpo / seed 0: 0.500  (4 to go, about 4 h 0 min left)",
        "calm / none / seed 0: 0.500  (3 to go, about 3 h 0 min left)",
        "calm / cppo / seed 1: 0.500  (2 to go, about 2 h 0 min left)",
        "calm / grpo / seed 1: failed: RuntimeError  (1 to go, about 1 h 0 min left)",
        "calm / none / seed 1: 0.500  (0 to go)",
    ]


def test_a_seed_that_begins_elsewhere_is_named_once_and_also_where_all_is_quiet(monkeypatch, tmp_path):
    plan = study(seeds={"first": 0, "count": 2})
    folder = folder_of(tmp_path / "own", [c for c in plan.cells() if c.arm == "cppo" and c.setting == "calm"], 0.5)

    def run_cell(cell):
        return line(cell, [0.3 if cell.seed == 1 else 0.2, 0.5])

    [warning] = log_of(monkeypatch, folder, plan, run_cell, quiet=True)
    assert warning.startswith("calm / seed 1: its warm start is another one, and begins at 0.300, where the runs that ")
    assert " began at 0.200: " in warning


def test_a_seed_that_is_taken_from_another_start_is_named_too(tmp_path, nothing_runs):
    plan = study(settings={"calm": {}})
    cells = plan.cells()
    own = folder_of(tmp_path / "own", cells[:1], 0.5)
    other = folder_of(tmp_path / "other", [], 0.5)
    for cell in cells:
        other.append(line(cell, [0.2, 0.5], start="a" if cell.seed != 2 or cell.arm == "cppo" else "b"))
    log = io.StringIO()
    Runner(own, 1, Console(file=log), keep=False, quiet=True, reuse=[other]).run("t", cells)
    [warning] = log.getvalue().splitlines()
    assert warning.startswith("calm / seed 2: its warm start is another one, and begins at 0.200, where ")


def test_runs_that_ended_beside_a_process_that_died_are_kept(monkeypatch, tmp_path):
    plan = study(seeds={"first": 0, "count": 1}, settings={"calm": {}})

    class Pool(HerePool):
        def submit(self, task, *arguments, **named):
            future = super().submit(task, *arguments, **named)
            if arguments and getattr(arguments[0], "arm", "") == "grpo":
                future = Future()
                future.set_exception(BrokenProcessPool())
            return future

    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(module, "run_cell", lambda cell, start, runs, *, keep: line(cell, [0.2, 0.5]))
    monkeypatch.setattr(module, "make_cell_start", write_start)
    folder = folder_of(tmp_path / "own", [], 0.0)
    with pytest.raises(ValueError, match="a worker process died"):
        Runner(folder, 4, Console(quiet=True), keep=False, quiet=True).run("t", plan.cells())
    assert {row["arm"] for row in folder.rows()} == {"cppo", "none"}


def test_what_a_killed_process_left_goes(tmp_path):
    folder = folder_of(tmp_path / "own", [], 0.0)
    folder.sweep()  # where nothing is there yet
    for name in ("runs/.one", "starts/.two", "runs/kept", "starts/whole"):
        (tmp_path / "own" / name).mkdir(parents=True)
    folder.sweep()
    assert {path.name for part in (folder.runs, folder.starts) for path in part.iterdir()} == {"kept", "whole"}


@pytest.mark.parametrize(
    "changes",
    [
        {"key": ["a"]}, {"accuracy": []}, {"accuracy": [0.2]}, {"accuracy": [0.2, None]}, {"accuracy": [0.2, math.nan]},
        {"accuracy": [0.2, 0.3], "rollout": [0, 0]}, {"accuracy": "ab"}, {"rollout": [0], "accuracy": [0.2]},
        {"standard_error": [0.1]}, {"config": None}, {"versions": []}, {"curves": []}, {"curves": {"gap": 3}},
        {"curves": {"gap": ["x"]}}, {"tail": None}, {"learning_rate": "1e-4"}, {"cpu_seconds": None}, {"arm": 3},
        {"rollout": [0], "accuracy": [0.2], "standard_error": [0.1]}, {"knobs": []}, {"start": ["a"]},
    ],
)  # fmt: skip
def test_a_line_that_was_edited_to_no_run_is_named(tmp_path, changes):
    [cell, *_] = study().cells()
    folder = folder_of(tmp_path / "own", [cell], 0.5)
    folder.append(line(cell, [0.2, 0.5]) | changes)
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2: expected a JSON object with key, setting"):
        folder.rows()
