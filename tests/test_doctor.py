"""cppo doctor: an intact stack passes, a drifted one does not, and a launch's traps are named."""

import json
import pathlib
import re
import tomllib

import pytest
from trl import GRPOConfig
from typed import typed

import cppo
from cppo import doctor
from cppo.adapters.trl import TrustRegionTrainer, check_config
from cppo.doctor import reading, self_tests, versions

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
    names = {re.match(r"[\w-]+", line)[0] for line in asked}
    assert {"torch", "transformers", "trl", "verl"} <= names
    for package, window in versions.WINDOWS.items():
        assert window is None or package not in names or f"{package}{window}" in asked


def test_a_version_outside_its_window_fails(monkeypatch):
    monkeypatch.setitem(versions.WINDOWS, "trl", ">=1.10,<1.12")
    monkeypatch.setattr(doctor, "_SELF_TESTS", {})
    assert findings()["trl", "failed"].endswith(": expected >=1.10,<1.12, with which this package was tested")


def test_a_stack_that_does_something_else_with_the_answer_fails(monkeypatch):
    ask = TrustRegionTrainer.get_off_policy_mask
    monkeypatch.setattr(TrustRegionTrainer, "get_off_policy_mask", lambda self, **given: 0.99 * ask(self, **given))
    message = findings()["trl: gradient of one step", "failed"]
    assert "differs from the closed form by 1.0e-02 of its largest entry" in message


def test_a_region_that_does_not_act_fails(monkeypatch):
    monkeypatch.setattr(self_tests, "METHOD", cppo.CPPO(delta=0.99, budget="none"))
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


TOP_P = "orchestrator.train.sampling.extra_body.top_p=0.9: expected 1; the sampler would not be"
GROUP = "[orchestrator.train.sampling]"
PRIME = """
[trainer.loss]
type = "custom"
import_path = "cppo.adapters.prime_rl.trust_region_loss"
kwargs = { method = "cppo", delta = 0.15 }

[[orchestrator.train.source]]
name = "swe"

[orchestrator.train.sampling]
temperature = 1.0
extra_body = { top_p = 1 }
"""
SLIME = """
set -ex
GRPO_ARGS=(
   --loss-type custom_loss
   --custom-loss-function-path cppo.adapters.slime.policy_loss
   --custom-config-path cppo.yaml   # 'the method'
   --use-rollout-logprobs
   # --use-tis
   --rollout-top-k -1)
ray job submit -- python3 train.py ${GRPO_ARGS[@]}
"""
NEMO = "{grpo: {seed: 1}, policy: {generation: {top_p: 1.0, top_k: null}}, loss_fn: {use_cispo: false}}"
RIGHT = {"rl.toml": ("prime-rl", PRIME), "run.sh": ("slime", SLIME), "grpo.yaml": ("nemo-rl", NEMO)}
WRONG = [
    ("rl.toml", 'type = "custom"', 'type = "ipo"', "trainer.loss.type='ipo': expected 'custom'; else"),
    ("rl.toml", "trust_region_loss", "loss", "trainer.loss.import_path='cppo.adapters.prime_rl.loss': expected 'cppo."),
    ("rl.toml", "delta = 0.15", "detla = 0.15", "trainer.loss.kwargs: cppo has no knob 'detla'"),
    ("rl.toml", '"cppo", delta = 0.15', '"ipo", delta = 1', "IPO(delta=1.0): expected delta below 1"),
    ("rl.toml", "top_p = 1 ", "top_p = 0.9 ", TOP_P),
    ("rl.toml", GROUP, f"sampling = {{ extra_body = {{ min_p = 0.1 }} }}\n{GROUP}",
     "orchestrator.train.source[0].sampling.extra_body.min_p=0.1: expected 0"),
    ("run.sh", "-type custom_loss", "-type policy_loss", "loss_type='policy_loss': expected custom_loss"),
    ("run.sh", "slime.policy_loss", "slime.loss", "custom_loss_function_path='cppo.adapters.slime.loss': expected"),
    ("run.sh", "# --use-tis", "--use-tis", "use_tis=True: expected False"),
    ("run.sh", "top-k -1", "top-k 20", "rollout_top_k=20: expected -1"),
    ("run.sh", "top-k -1", "top-k=20", "rollout_top_k=20: expected -1"),
    ("run.sh", "--use-rollout-logprobs", "", "use_rollout_logprobs=False: expected True"),
    ("run.sh", "--custom-config-path cppo.yaml", "", "cppo_method=None: expected a spec such as"),
    ("run.sh", "cppo.yaml", "nowhere.yaml", "custom_config_path='nowhere.yaml': cannot be read"),
    ("grpo.yaml", "use_cispo: false", "use_cispo: true", "loss_fn.use_cispo=True: expected False"),
    ("grpo.yaml", "top_p: 1.0", "top_p: 0.9", "policy.generation.top_p=0.9: expected 1"),
]  # fmt: skip


def launch(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    (tmp_path / "cppo.yaml").write_text("cppo_method: cppo?delta=0.15\n")
    return [message for (subject, _), message in findings(tmp_path / name).items() if subject == name]


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_launch_of_another_stack_passes(tmp_path, monkeypatch, name):
    monkeypatch.setattr(doctor, "_SELF_TESTS", {})
    stack, text = RIGHT[name]
    (found,) = launch(tmp_path, name, text)
    assert found.startswith(f"a {stack} launch without known traps")
    assert ("it does not show" in found) == (stack == "nemo-rl")


@pytest.mark.parametrize(("name", "right", "wrong", "message"), WRONG)
def test_the_traps_of_another_stacks_launch_are_named(tmp_path, monkeypatch, name, right, wrong, message):
    monkeypatch.setattr(doctor, "_SELF_TESTS", {})
    assert RIGHT[name][1].count(right) == 1
    (found,) = launch(tmp_path, name, RIGHT[name][1].replace(right, wrong))
    assert message in found
    assert "\n" not in found


def test_a_prime_rl_file_of_the_trainer_or_of_the_orchestrator_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_SELF_TESTS", {})
    trainer = PRIME.partition("[[")[0].replace("trainer.loss", "loss")
    assert launch(tmp_path, "trainer.toml", trainer) == ["a prime-rl launch without known traps"]
    orchestrator = PRIME[PRIME.index("[[") :].replace("orchestrator.", "")
    assert launch(tmp_path, "orchestrator.toml", orchestrator) == ["a prime-rl launch without known traps"]
    assert (
        "train.sampling.extra_body.top_p=0.5"
        in launch(tmp_path, "orchestrator.toml", orchestrator.replace("top_p = 1", "top_p = 0.5"))[0]
    )


def test_the_trl_adapter_refuses_thresholds_that_nothing_reaches(tmp_path):
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, top_k=0, steps_per_generation=4)
    check_config(config, cppo.DPPO(delta=1.0, delta_low=0.5), engine_log_probs=True)
    with pytest.raises(ValueError, match=r"DPPO\(delta=1.0\): expected delta below 1"):
        check_config(config, cppo.DPPO(delta=1.0), engine_log_probs=True)


def test_slimes_own_file_is_a_method(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_SELF_TESTS", {})
    assert launch(tmp_path, "slime.yaml", "cppo_method: cppo\n") == ["a slime launch without known traps"]
    assert "DPPO(delta=1.5)" in launch(tmp_path, "slime.yaml", "cppo_method: dppo?delta=1.5\n")[0]


@pytest.mark.parametrize(
    ("name", "text", "stack"),
    [
        ("a.sh", "python -m verl.trainer.main_ppo actor_rollout_ref.actor.ppo_epochs=2", "verl"),
        ("a.sh", "python -m x rllm/backend=tinker rllm.algorithm.loss_fn=trust_region", "rllm"),
        ("a.sh", "x rllm.algorithm.loss_fn=trust_region actor_rollout_ref.rollout.top_p=1", "rllm"),
        ("a.sh", "x trainer.algorithm.policy_loss_type='cppo?delta=0.1'", "skyrl"),
        ("a.sh", "x --custom-loss-function-path=y", "slime"),
        ("a.yaml", "algorithm: {loss_fn: cppo}", "rllm"),
        ("a.yaml", "{trainer: {algorithm: {}}, generator: {sampling_params: {}}}", "skyrl"),
        ("a.yml", "{actor_rollout_ref: {}, algorithm: {rollout_correction: {}}, trainer: {}}", "verl"),
        ("a.yaml", "output_dir: x", "trl"),
        ("a.toml", "[train.sampling]\ntemperature = 1", "prime-rl"),
    ],
)
def test_a_launch_is_known_by_its_settings(tmp_path, name, text, stack):
    (tmp_path / name).write_text(text)
    assert reading.read(tmp_path / name).stack == stack


def test_a_command_is_read_as_settings(tmp_path):
    (tmp_path / "a.sh").write_text(
        "python -m verl.experimental.fully_async_policy.main rllm.a=1 +rllm.b.c=[1,x] rllm.b=null --flag --n=3 "
        "rllm.b.d='cppo?delta=1'"
        " rllm.e=${oc.env:X}"
    )
    assert reading.read(tmp_path / "a.sh").settings == {
        "async_training": {}, "rllm": {"a": 1, "b": {"d": "cppo?delta=1"}, "e": "${oc.env:X}"}, "flag": True, "n": 3,
    }  # fmt: skip


def test_a_version_that_is_no_release_is_told_with_its_commit(monkeypatch):
    given = {"prime-rl": "0.8.0"}
    monkeypatch.setattr(versions, "installed", given.get)
    found = {finding.subject: (finding.status, finding.message) for finding in versions.examine()}
    assert found["prime-rl"] == ("ok", "0.8.0: tested at commit 559b44772 (2026-08-21), not at a release")
    assert found["slime"] == ("absent", "not installed")


def test_verl_beside_a_trl_that_its_workers_cannot_import_fails(monkeypatch):
    given = {"verl": "0.9.1", "trl": "1.16.0", "transformers": "5.10.4"}
    monkeypatch.setattr(versions, "installed", given.get)
    (found,) = [
        finding for finding in versions.examine() if finding.subject == "verl beside trl"
    ]  # the installed TRL's
    assert found.status == "failed"
    assert "AutoModelForCausalLMWithValueHead" in found.message
    monkeypatch.setattr("trl.AutoModelForCausalLMWithValueHead", object, raising=False)
    assert "verl beside trl" not in {finding.subject for finding in versions.examine()}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("launch.yaml", "[1, 2]", "expected settings .*got list"),
        ("launch.yaml", "a: [", "cannot be read as YAML"),
        ("launch.sh", "echo hello", "expected a .yaml file .verl's, SkyRL's.* or a launch command of verl"),
        ("launch.sh", "echo 'hello", "cannot be read as a command: No closing quotation"),
        ("launch.toml", "a = ", "cannot be read as TOML"),
        ("launch.toml", "a = 1", "expected a .yaml file .verl's, SkyRL's"),
    ],
)
def test_what_is_no_launch_is_refused_before_anything_runs(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        next(doctor.examine(tmp_path / name))


def test_the_command_prints_a_line_a_finding_and_fails_if_one_does(tmp_path):
    (tmp_path / "launch.yaml").write_text("loss_type: cispo\n")
    command = ["doctor", "--config", tmp_path / "launch.yaml"]
    done = typed(*command, "--json")
    assert done.returncode == 1
    assert {"subject", "status", "message"} == set(json.loads(done.stdout)[0])
    assert done.stderr == ""
    done = typed(*command)
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines()][-2:] == ["ok", "failed"]
