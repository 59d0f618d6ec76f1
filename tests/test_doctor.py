"""cppo doctor: an intact stack passes, a drifted one does not, and a launch's traps are named."""

import json
import pathlib
import subprocess
import sys
import tomllib

import pytest

import cppo
from cppo import doctor
from cppo.adapters.trl import TrustRegionTrainer

pytestmark = pytest.mark.train


def findings(path=None):
    return {(finding.subject, finding.status): finding.message for finding in doctor.examine(path)}


def test_the_installed_stack_is_in_its_window_and_gives_the_closed_forms_gradient():
    found = findings()
    assert ("torch", "ok") in found
    assert ("trl", "ok") in found
    message = found["trl: gradient of one step", "ok"]
    assert message.startswith("equals the closed form to ")
    masked = int(message.split(" with ")[1].split("%")[0])
    assert 5 < masked < 95


def test_the_windows_are_those_that_the_package_asks_for():
    project = tomllib.loads((pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    for package, window in doctor.WINDOWS.items():
        assert window is None or f"{package}{window}" in asked


def test_a_version_outside_its_window_fails(monkeypatch):
    monkeypatch.setitem(doctor.WINDOWS, "trl", ">=1.10,<1.12")
    monkeypatch.setattr(doctor, "_SELF_TESTS", {})
    assert findings()["trl", "failed"].endswith(": expected >=1.10,<1.12, with which this package was tested")


def test_a_stack_that_does_something_else_with_the_answer_fails(monkeypatch):
    ask = TrustRegionTrainer.get_off_policy_mask
    monkeypatch.setattr(TrustRegionTrainer, "get_off_policy_mask", lambda self, **given: 0.99 * ask(self, **given))
    message = findings()["trl: gradient of one step", "failed"]
    assert "differs from the closed form by 1.0e-02 of its largest entry" in message


def test_a_region_that_does_not_act_fails(monkeypatch):
    monkeypatch.setattr(doctor, "_METHOD", cppo.CPPO(delta=1.0, budget="none"))
    assert "masked 0% of the tokens" in findings()["trl: gradient of one step", "failed"]


def test_a_self_test_that_cannot_run_says_why(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("drifted\nand more")

    monkeypatch.setattr(TrustRegionTrainer, "_compute_loss", broken)
    message = findings()["trl: gradient of one step", "failed"]
    assert message == "the self-test could not run: RuntimeError: drifted"


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("steps_per_generation: 16\ngradient_accumulation_steps: 2\ntop_k: 0\n", "ok", "without known traps"),
        ("top_k: 0\n", "failed", "a trust region can never act"),
        ("loss_type: cispo\n", "failed", "loss_type='cispo'"),
        ("detla: 1\n", "failed", "unknown settings detla"),
        ("actor_rollout_ref: {}\n", "failed", "a verl launch, but verl is not installed here"),
    ],
)
def test_a_launch_is_judged(tmp_path, monkeypatch, text, status, message):
    monkeypatch.setattr(doctor, "_SELF_TESTS", {})
    (tmp_path / "launch.yaml").write_text(text)
    assert message in findings(tmp_path / "launch.yaml")["launch.yaml", status]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("launch.yaml", "[1, 2]", "expected settings .*got list"),
        ("launch.yaml", "a: [", "cannot be read as YAML"),
        ("launch.sh", "echo hello", "expected a verl launch command"),
    ],
)
def test_what_is_no_launch_is_refused_before_anything_runs(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        next(doctor.examine(tmp_path / name))


def test_the_command_prints_a_line_a_finding_and_fails_if_one_does(tmp_path):
    (tmp_path / "launch.yaml").write_text("loss_type: cispo\n")
    command = [
        sys.executable,
        "-c",
        "from cppo.cli import main; main()",
        "doctor",
        "--config",
        tmp_path / "launch.yaml",
    ]
    done = subprocess.run([*map(str, command), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert {"subject", "status", "message"} == set(json.loads(done.stdout)[0])
    assert done.stderr == ""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines()][-2:] == ["ok", "failed"]
