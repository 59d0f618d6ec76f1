"""``cppo bound``: help, tables, machine output, exit codes, and one clear line for what a user can mend."""

import dataclasses
import json

import pytest
from test_bound_constants import make_log
from typed import typed
from typer.testing import CliRunner

from cppo import theory
from cppo.bound.command import app
from cppo.bound.constants import PAPER, constants
from cppo.bound.statements import STATEMENTS
from cppo.bound.verify import verify
from cppo.lab.config import RunConfig, dump_config

pytestmark = pytest.mark.train

JSON = json.loads


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize("name", ["verify", "constants"])
def test_help_has_examples(name):
    done = typed("bound", name, "--help")
    assert done.returncode == 0
    assert f"Examples:  cppo bound {name}" in " ".join(done.stdout.split()).replace("Examples: ", "Examples:  ")
    assert "verify" in typed("bound").stdout + typed("bound").stderr


def test_verify_prints_every_statement_and_exits_with_0():
    done = run("verify", "--instances", 20)
    assert done.exit_code == 0, done.output
    for statement in STATEMENTS:
        assert f"\n{statement.name} " in done.output
        assert statement.text in done.output
    assert "Median of bound / quantity by the number of tokens" in done.output
    assert "T = 6" in done.output
    [line] = [line for line in done.output.splitlines() if line.startswith("Lemma 2")]
    assert line.split()[-9:] == ["20", "0", "10", "0", "-", "-", "-", "-", "-"]


def test_verify_as_json_is_the_verdicts():
    done = run("verify", "--instances", 20, "--seed", 4, "--json")
    assert JSON(done.stdout) == JSON(json.dumps([dataclasses.asdict(v) for v in verify(20, 4)]))


def test_verify_exits_with_1_if_a_statement_fails(monkeypatch):
    right = theory.residual_bound
    monkeypatch.setattr(theory, "residual_bound", lambda *a, **k: right(*a, **k) * 9 / 10)
    for extra in ([], ["--json"]):
        done = run("verify", "--instances", 20, *extra)
        assert done.exit_code == 1
    failed = [v["statement"] for v in JSON(done.stdout) if v["violations"] + v["exact_violations"]]
    assert "Prop. 4" in failed
    assert "Lemma 2" not in failed


def test_constants_prints_the_papers_settings_and_says_that_they_are_vacuous():
    done = run("constants")
    assert done.exit_code == 0
    for setting in PAPER:
        [line] = [line for line in done.output.splitlines() if line.startswith(setting.label)]
        assert line.endswith("vacuous")
        assert f"{setting.T:,}" in line
        assert f"{constants(setting, 0.5).ratio:.3g}" in line
    assert "xi = 0.5" in done.output
    assert JSON(run("constants", "--json").stdout) == [dataclasses.asdict(constants(s, 0.5)) for s in PAPER]


def test_constants_of_given_knobs():
    [row] = JSON(run("constants", "--length", 10, "--json").stdout)
    assert (row["T"], row["delta"], row["delta_b"], row["w_min"], row["xi"]) == (10, 0.15, 0.02, 0.8, 0.5)
    assert not row["vacuous"]  # 0.675 against 2 xi and more
    arguments = ("--length", 10, "--delta", 0.3, "--delta-b", 0.1, "--w-min", 0.5, "--xi", 2)
    [row] = JSON(run("constants", *arguments, "--json").stdout)
    assert (row["T"], row["delta"], row["delta_b"], row["w_min"], row["xi"]) == (10, 0.3, 0.1, 0.5, 2.0)
    assert row["penalty"] == pytest.approx(2 * 2 * 10 * 9 * 0.6 * 0.1)
    assert "vacuous" not in run("constants", "--length", 10).output.splitlines()[1]


def test_constants_of_a_run(tmp_path):
    folder = tmp_path / "mine"
    make_log(folder)
    (folder / "config.yaml").write_text(dump_config(RunConfig(method="cppo?delta_b=0.03"), {}))
    done = run("constants", "--run", folder)
    assert done.exit_code == 0, done.output
    for text in ("mine  (cppo?delta_b=0.03)", "delta_b over responses: min 0.03", "Z_t <= c_t at", "note: binary_tv",
                 "median response", "longest response"):  # fmt: skip
        assert text in done.output, text
    document = JSON(run("constants", "--run", folder, "--xi", 3, "--json").stdout)
    assert document["rows"][1]["T"] == document["longest"]
    assert document["rows"][0]["xi"] == 3.0
    (folder / "config.yaml").write_text(dump_config(RunConfig(method="dppo"), {}))
    output = " ".join(run("constants", "--run", folder).output.split())
    assert "Z_t <= c_t" not in output
    assert "J(pi) - J(mu) >= L' - uniform under D_t <= delta" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "--instances", "3"], "instances=3: expected at least 10, one of each shape"),
        (["verify", "--seed", "-1"], "seed=-1: expected an integer >= 0"),
        (["constants", "--delta", "0.1"], "--delta: expected --length too, the constants grow with it"),
        (["constants", "--length", "0"], "T=0: expected an integer in [1, inf)"),
        (["constants", "--length", "5", "--delta", "-1"], "delta=-1.0: expected a number in (0, inf)"),
        (["constants", "--length", "5", "--delta-b", "nan"], "delta_b=nan: expected a number in [0, inf)"),
        (["constants", "--length", "5", "--w-min", "2"], "w_min=2.0: expected a number in (0, 1]"),
        (["constants", "--length", "9" * 400], "expected a length of at most 1,099,511,627,776 tokens"),
        (["constants", "--length", "5", "--delta", "1e200"], "expected knobs whose constants a float can hold"),
        (["constants", "--xi", "0"], "--xi 0.0: expected a number > 0"),
        (["constants", "--xi", "nan"], "--xi nan: expected a number > 0"),
        (["constants", "--run", "nowhere"], "nowhere/config.yaml: cannot be read as YAML"),
        (["constants", "--run", "nowhere", "--delta", "1"], "--run nowhere: expected no other settings"),
    ],
)
def test_what_a_user_can_mend_is_one_line(tmp_path, arguments, message):
    done = typed("bound", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert [line for line in lines if line] == [lines[-1]]
    assert lines[-1].startswith("cppo: ")
    assert message in lines[-1]
