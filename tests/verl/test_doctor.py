"""cppo doctor in verl's environment."""

import pytest
from verl.workers.utils import losses

from cppo import doctor

LAUNCH = """
export HYDRA_FULL_ERROR=1
python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo \\
    actor_rollout_ref.rollout.top_p=0.9 \\
    actor_rollout_ref.actor.policy_loss.loss_mode=cppo +actor_rollout_ref.actor.policy_loss.delta=0.15 # ours
"""


def findings(path=None):
    return [(finding.subject, finding.status, finding.message) for finding in doctor.examine(path)]


def test_verl_gives_the_closed_forms_gradient():
    found = {subject: (status, message) for subject, status, message in findings()}
    assert found["verl"][0] == "ok"
    assert found["transformers"][0] == "ok"  # the window beside verl is another
    assert found["trl"][0] == "absent"
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
