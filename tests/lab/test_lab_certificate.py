"""The certificate in a run's log: what the batches give, at no cost to the run itself."""

import dataclasses
import json
import math

import pytest
import torch
import yaml

import cppo
from cppo.certificate import certificate
from cppo.lab.config import RunConfig, load_config
from cppo.lab.folder import read_metrics
from cppo.lab.run import Run, start_run
from cppo.rollout_log import read_rollouts

pytestmark = pytest.mark.train

TINY = RunConfig(
    task="running_sum?operands=4&slip=0.3", method="cppo?delta=0.02&delta_b=0.002", rollouts=2, epochs=2,
    prompts=4, generations=4, minibatch=8, eval_problems=8, eval_every=2, checkpoint_every=2, warm_start_steps=40,
    learning_rate=3e-3, certificate=True,
)  # fmt: skip


class Silence:
    def phase(self, name, total=None):
        pass

    def advance(self, row=None):
        pass


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "certified"
    Run(TINY, start_run(TINY, path), Silence()).train()
    return path


def updates(path):
    return [row for row in read_metrics(path / "metrics.jsonl") if row["step"] > 0]


def split(row):
    bound = {name: value for name, value in row.items() if name.startswith("bound/")}
    return bound, {name: value for name, value in row.items() if name not in bound}


def again(config, path):
    Run(config, start_run(config, path), Silence()).train()
    return updates(path)


def test_the_run_is_the_same_with_and_without(certified, tmp_path):
    without = again(dataclasses.replace(TINY, certificate=False), tmp_path / "without")
    with_it = updates(certified)
    assert len(with_it) == len(without) == 8
    assert all(not split(row)[0] for row in without)
    assert [split(row)[1] for row in with_it] == without
    assert all(len(split(row)[0]) == 12 for row in with_it)


def test_the_values_follow_from_the_rollout_log(certified):
    """Of each update's kept responses, from the logged log-probs; rewards less those of the group's others."""
    by_step = {}
    for row in read_rollouts(certified / "rollouts"):
        by_step.setdefault(row["step"], []).append(row)
    checked = 0
    rewards = {}  # of each prompt, its group's, from the whole first epoch of a rollout
    for step, rows in by_step.items():
        rollout = (step - 1) // TINY.updates
        if (step - 1) % TINY.updates < TINY.updates // 2:
            for row in rows:
                rewards.setdefault((rollout, row["prompt"]), []).append(row["reward"])
    assert all(len(group) == TINY.generations for group in rewards.values())
    for row in updates(certified):
        rollout = (row["step"] - 1) // TINY.updates
        kept = [r for r in by_step[row["step"]] if r["advantage"] != 0]
        if not kept:
            assert row["bound/horizon"] == 0
            continue
        centred = []
        for r in kept:
            group = rewards[rollout, r["prompt"]]
            centred.append(r["reward"] - (sum(group) - r["reward"]) / (len(group) - 1))
        flat = {name: torch.tensor([x for r in kept for x in r[name]]) for name in ("logp", "rollout_logp")}
        decision = cppo.decide(
            cppo.CPPO(delta=0.02, delta_b=0.002), flat["logp"], flat["rollout_logp"], torch.ones(len(kept)),
            lengths=[len(r["logp"]) for r in kept],
        )  # fmt: skip
        wanted = certificate(decision, xi=0.5, reward=torch.tensor(centred, dtype=torch.float64))
        bound = split(row)[0]
        assert bound.keys() == wanted.keys()
        for name, value in wanted.items():
            assert bound[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-7), name
        checked += bound["bound/residual_product"] > 0
    assert checked >= 3


def test_micro_batches_of_an_update_are_taken_together(certified, tmp_path):
    halves = again(dataclasses.replace(TINY, gradient_accumulation=2), tmp_path / "halves")
    for row, whole in zip(halves[:2], updates(certified)[:2], strict=True):
        for name, value in split(whole)[0].items():
            assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert max(row["bound/residual_product"] for row in halves) > 0


def test_any_method_has_a_certificate(tmp_path):
    rows = again(dataclasses.replace(TINY, method="grpo", rollouts=1), tmp_path / "grpo")
    assert all("bound/within_fraction" not in row and len(split(row)[0]) == 11 for row in rows)
    assert rows[-1]["bound/residual_pathwise"] > 0
    assert all(math.isfinite(value) for row in rows for value in split(row)[0].values())


def test_the_setting_is_kept_and_checked(certified, tmp_path):
    assert load_config(certified / "config.yaml").certificate is True
    assert RunConfig().certificate is False
    with pytest.raises(ValueError, match=r"^certificate=1: expected true or false$"):
        RunConfig(certificate=1)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"certificate": "yes please"}))
    with pytest.raises(ValueError, match="certificate='yes please': expected true or false"):
        load_config(file)
    assert "bound" not in json.dumps(json.loads((certified / "summary.json").read_text())["result"])
