"""cppo doctor in verl's environment."""

import pytest
from verl.workers.utils import losses

from cppo import doctor
from cppo.adapters import verl as adapter
from cppo.doctor import self_tests

LAUNCH = """
export HYDRA_FULL_ERROR=1
python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo \\
    actor_rollout_ref.rollout.top_p=0.9 \\
    actor_rollout_ref.actor.policy_loss.loss_mode=cppo +actor_rollout_ref.actor.policy_loss.delta=0.15 # ours
"""


RIGHT = LAUNCH.replace("top_p=0.9", "top_p=1").replace("adv_estimator=grpo", "rollout_correction.bypass_mode=True")
LOADED = ("ok", "verl loads cppo.adapters.verl by itself, and has its losses")


def findings(path=None):
    return [(finding.subject, finding.status, finding.message) for finding in doctor.examine(path)]


def test_verl_gives_the_closed_forms_gradient():
    found = {subject: (status, message) for subject, status, message in findings()}
    assert found["verl"][0] == "ok"
    assert found["transformers"][0] == "ok"  # the window beside verl is another
    status, message = found["verl: gradient of one step"]
    assert status == "ok"
    assert message.startswith("equals the closed form to ")


def test_a_verl_that_sums_otherwise_fails(monkeypatch):
    ask = losses.get_policy_loss_fn
    monkeypatch.setattr(
        losses,
        "get_policy_loss_fn",
        lambda name: lambda **given: tuple(x if i else 2 * x for i, x in enumerate(ask(name)(**given))),
    )
    status, message = next((s, m) for subject, s, m in findings() if subject.startswith("verl: "))
    assert status == "failed"
    assert "differs from the closed form by 1.0e+00" in message


def registration():
    _, found = self_tests.SELF_TESTS["verl"]()
    assert found.subject == "verl: registration"
    return found.status, found.message


def test_the_entry_point_and_the_registry_name_us_or_doctor_says_so(tmp_path, monkeypatch):
    status, message = registration()
    assert (status, message) == LOADED or (status == "warning" and "no entry point verl.plugins names" in message)
    metadata = tmp_path / "cppo_here-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: cppo-here\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[verl.plugins]\ncppo = cppo.adapters.verl\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert registration() == LOADED
    monkeypatch.setitem(adapter.POLICY_LOSS_REGISTRY, "cppo", losses.ppo_loss)
    status, message = registration()
    assert status == "failed"
    assert "verl's loss cppo is that of verl.workers.utils.losses, expected cppo.adapters.verl's" in message


def test_a_command_of_an_experimental_trainer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_SELF_TESTS", {})
    (tmp_path / "launch.sh").write_text(RIGHT)
    assert findings(tmp_path / "launch.sh")[-1] == ("launch.sh", "ok", "a verl launch without known traps")
    for other in ("-m verl.experimental.fully_async_policy.fully_async_main", "verl/experimental/one_step_off/main.py"):
        (tmp_path / "launch.sh").write_text(RIGHT.replace("-m verl.trainer.main_ppo", other))
        *_, (_, status, message) = findings(tmp_path / "launch.sh")
        assert status == "failed"
        assert message.startswith("verl.experimental: expected verl.trainer.main_ppo")


def test_thresholds_that_nothing_reaches_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_SELF_TESTS", {})
    text = RIGHT.replace("loss_mode=cppo", "loss_mode=dppo").replace("delta=0.15", "delta=1")
    (tmp_path / "launch.sh").write_text(text)
    *_, (_, status, message) = findings(tmp_path / "launch.sh")
    assert status == "failed"
    assert message == (
        "actor_rollout_ref.actor: DPPO(delta=1.0): expected delta below 1 (the largest binary_tv); no token could ever "
        "be rejected"
    )


@pytest.mark.parametrize("name", ["launch.sh", "launch.yaml"])
def test_the_traps_of_a_launch_are_all_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(doctor, "_SELF_TESTS", {})
    text = LAUNCH if name.endswith(".sh") else (
        "actor_rollout_ref: {rollout: {top_p: 0.9}, actor: {policy_loss: {loss_mode: cppo}}}\n"
    )  # fmt: skip
    (tmp_path / name).write_text(text)
    named = [
        message for subject, status, message in findings(tmp_path / name) if subject == name and status == "failed"
    ]
    assert [message.partition("=")[0] for message in named] == [
        "algorithm.rollout_correction.bypass_mode", "actor_rollout_ref.rollout.top_p",
    ]  # fmt: skip
    (tmp_path / name).write_text(text.replace("0.9", "1").replace(
        "algorithm.adv_estimator=grpo", "algorithm.rollout_correction.bypass_mode=True"
    ) + ("" if name.endswith(".sh") else "algorithm: {rollout_correction: {bypass_mode: true}}\n"))  # fmt: skip
    assert findings(tmp_path / name)[-1] == (name, "ok", "a verl launch without known traps")
