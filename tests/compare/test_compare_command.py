"""``cppo compare`` as it is typed: what it makes, what it prints, what it refuses."""

import json

import pytest
import yaml
from rows import CONTENT, line, study
from typed import in_a_process, typed

from cppo.compare.study import load_study

pytestmark = [pytest.mark.train, pytest.mark.processes]
BASE = [
    "task=running_sum?operands=4&slip=0.3", "rollouts=2", "epochs=2", "prompts=4", "generations=4", "minibatch=8",
    "eval_problems=32", "eval_every=1", "warm_start_steps=40", "learning_rate=3.0e-3",
]  # fmt: skip


def compare(*arguments, cwd):
    return typed("compare", *arguments, cwd=cwd)


@pytest.fixture
def finished(tmp_path):
    """A folder all of whose runs are there."""
    folder = tmp_path / "made-up"
    folder.mkdir()
    (folder / "study.yaml").write_text(yaml.safe_dump(CONTENT))
    rows = [line(cell, [0.2, 0.5 + 0.1 * (cell.arm == "cppo")]) for cell in study().cells()]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_methods_on_the_command_line_become_a_study_that_runs(tmp_path):
    options = [part for item in BASE for part in ("--set", item)]
    words = ["--method", "cppo?delta=0.02&delta_b=0.002", "--method", "grpo", "--seeds", 2, *options]
    done = in_a_process("compare", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "comparisons" / "cppo-grpo"
    assert len((folder / "results.jsonl").read_text().splitlines()) == 4
    assert "default: final accuracy" in done.stdout
    assert "report.html" in done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    again = compare(*words, cwd=tmp_path)
    assert again.returncode == 0
    assert len((folder / "results.jsonl").read_text().splitlines()) == 4
    other = compare("--method", "cppo", "--method", "grpo", cwd=tmp_path)  # would take the same name
    assert other.returncode != 0
    assert "comparisons/cppo-grpo: holds another study" in other.stderr


def test_a_finished_folder_is_reported_and_nothing_runs(finished):
    done = compare(finished, "--json", cwd=finished.parent)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["settings"]["wild"]["arms"]["cppo"]["scores"]["final"]["mean"] == pytest.approx(0.6)
    assert json.loads((finished / "summary.json").read_text()) == document
    assert "| cppo | 6 |" in (finished / "tables.md").read_text()
    assert (finished / "report.html").stat().st_size > 1_000_000  # plotly is inside
    assert not (finished / "starts").exists()


def test_another_arm_can_be_the_reference(finished):
    done = compare(finished, "--report-only", "--reference", "none", "--json", cwd=finished.parent)
    found = json.loads(done.stdout)["settings"]["calm"]["arms"]
    assert found["cppo"]["scores"]["final"]["reference_less_arm"]["mean"] == pytest.approx(-0.1)
    assert "reference_less_arm" not in found["none"]["scores"]["final"]


def test_looking_at_it_otherwise_changes_no_file(finished):
    def files():
        return {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}

    compare(finished, "--report-only", cwd=finished.parent)
    before = files()
    shown = compare(finished, "--report-only", "--reference", "none", "--score", "area", cwd=finished.parent)
    assert "area accuracy" in shown.stdout
    assert files() == before


def test_the_built_in_study_is_whole(pytestconfig):
    plan = load_study(pytestconfig.rootpath / "src" / "cppo" / "compare" / "quick.yaml")
    assert plan.reference == "cppo"
    assert len(plan.cells()) == 4 * 2 * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of STUDY, --quick and --method, got none"),
        (["--quick", "--method", "grpo"], "expected one of STUDY, --quick and --method, got --quick and --method"),
        (["none.yaml"], "none.yaml: expected a study (YAML), or a folder with study.yaml"),
        (["--set", "epochs=2", "--quick"], "--set: expected --method"),
        (["made-up", "--seeds", "9"], "--seeds: expected --method"),
        (["--method", "cppo", "--set", "epochs"], "--set 'epochs': expected NAME=VALUE"),
        (["--method", "cppo", "--set", "epoch=2"], "base: unknown 'epoch'"),
        (["--method", "cppo", "--set", "epochs=["], "--set 'epochs=[': expected a value as in YAML"),
        (["--method", "cppo", "--method", "cppo"], "--method: expected methods that differ"),
        (["--method", "clip"], "clip"),
        (["made-up", "--score", "last"], "--score 'last': expected one of final, best, area"),
        (["made-up", "--into", "there"], "--into there: expected none with the folder made-up"),
        (["made-up", "--report-only", "--reference", "ppo"], "reference='ppo': expected one of the arms"),
        (["--quick", "--into", "made-up"], "made-up: holds another study"),
        (["--quick", "--into", "."], "is not empty and holds no study.yaml"),
        (["--quick", "--reuse", "nowhere"], "--reuse nowhere: expected the folder of a comparison, with study.yaml"),
        (["made-up", "--report-only", "--reuse", "made-up"], "--reuse: expected a command that runs"),
        (["--quick", "--report-only", "--into", "new"], "--report-only: expected the folder of a comparison"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_clear_line(finished, arguments, message):
    done = compare(*arguments, cwd=finished.parent)
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (finished.parent / "comparisons").exists()


def test_a_line_that_is_no_run_is_named(finished):
    with (finished / "results.jsonl").open("a") as file:
        file.write("[1]\n")
    done = compare(finished, "--report-only", cwd=finished.parent)
    assert done.returncode != 0
    assert "results.jsonl, line 37: expected a JSON object with key, setting" in done.stderr
