"""The rollout log that a TRL run writes: every response of every update, judged again as it was judged."""

import pytest
import torch
from datasets import Dataset
from trl_training import make_trainer, reward_letters

import cppo
from cppo.adapters import trl as adapter
from cppo.inspect.reading import Log
from cppo.inspect.runs import inspect_runs
from cppo.rollout_log import read_rollouts

pytestmark = pytest.mark.train
METHOD = cppo.CPPO(delta=0.02, delta_b=0.002)


def run(tmp_path, method=METHOD, arguments=None, **overrides):
    trainer = make_trainer(
        tmp_path / "output", method, kind=adapter.TrustRegionTrainer, max_steps=5,
        arguments={"rollout_log": tmp_path / "rollouts"} | (arguments or {}), **overrides,
    )  # fmt: skip
    trainer.train()
    return trainer, list(read_rollouts(tmp_path / "rollouts"))


@pytest.mark.parametrize("divergence", ["binary_tv", "topk_tv"])
def test_replay_equals_what_the_run_did(tmp_path, divergence):
    method = cppo.CPPO(delta=0.02, delta_b=0.002, divergence=divergence)
    arguments = {"divergence_top_k": 3} if divergence == "topk_tv" else None
    trainer, rows = run(tmp_path, method, arguments)
    # 2 micro-batches of 4 an update.
    assert [row["step"] for row in rows] == [step for step in range(1, 6) for _ in range(8)]
    assert sorted(file.name for file in (tmp_path / "rollouts").iterdir()) == [
        "report.html", *(f"step-{step:06d}.parquet" for step in range(1, 6)), "tokenizer.json",
    ]  # fmt: skip
    (document,) = inspect_runs([tmp_path / "rollouts"], beside=())["runs"]
    for example in document["examples"]:
        assert "".join(example["tokens"]) == example["response"].replace(" ", "")
    assert Log.open(tmp_path / "rollouts").method == cppo.methods.method_spec(method)
    logged = [entry["gate/masked_fraction"] for entry in trainer.state.log_history if "gate/masked_fraction" in entry]
    assert len(logged) == 5
    assert max(logged) > 0
    for step, fraction in enumerate(logged, start=1):
        rejected = tokens = 0
        for row in (row for row in rows if row["step"] == step):
            columns = [torch.tensor([row[name]]) for name in ("logp", "rollout_logp")]
            measured = None if row["divergence"] is None else torch.tensor([row["divergence"]])
            decision = cppo.decide(
                method, *columns, torch.tensor([row["advantage"]]), torch.tensor([row["response_mask"]]),
                divergence=measured,
            )  # fmt: skip
            rejected += (decision.rejected_by > 0).sum().item()
            tokens += sum(row["response_mask"])
        assert rejected / tokens == pytest.approx(fraction, abs=1e-6)


def test_a_row_is_one_response_with_its_own_reward(tmp_path):
    trainer, rows = run(tmp_path)
    tokenizer = trainer.processing_class
    assert len({row["reward"] for row in rows}) > 8
    for row in rows:
        assert row["response"] == tokenizer.decode(row["token_ids"])
        assert len(row["token_ids"]) == len(row["logp"]) == len(row["rollout_logp"]) == len(row["response_mask"])
        # The reward function adds a tenth of the response's index among the 16 of a rollout.
        tenths = 10 * (
            row["reward"] - reward_letters([tokenizer.decode(row["token_ids"], skip_special_tokens=True)])[0]
        )
        assert tenths == pytest.approx(round(tenths), abs=1e-3)
        assert 0 <= round(tenths) < 16


def test_an_evaluation_leaves_no_rows(tmp_path):
    evaluation = {"eval_dataset": Dataset.from_dict({"prompt": ["ab", "cd"]})}
    trainer, rows = run(
        tmp_path, arguments=evaluation, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4
    )
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    assert len(rows) == 40


def test_another_runs_log_is_not_written_over(tmp_path):
    run(tmp_path)
    with pytest.raises(
        ValueError, match=r"rollout_log='.*rollouts': expected a folder without update 1, found step-00"
    ):
        run(tmp_path)
    assert len(list(read_rollouts(tmp_path / "rollouts"))) == 40
