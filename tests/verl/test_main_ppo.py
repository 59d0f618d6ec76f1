"""verl's own main_ppo for two steps on a CPU: Ray, two FSDP2 workers, rollout servers, bypass mode, and CPPO."""

import os
import pathlib
import re
import subprocess
import sys

import pandas
import pytest
import torch
from cpu_verl import write_model
from engine_update import FLOAT32
from test_adapter import SOURCE, write_installed

import cppo
from cppo.rollout_log import read_rollouts

HERE = pathlib.Path(__file__).parent
PROMPTS = ("say a word", "count to three", "name a bird", "greet me")
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    return sum(letter.isalpha() for letter in solution_str) / max(1, len(solution_str))
"""
ACTOR = "actor_rollout_ref.actor"
# Thresholds so narrow that the drift of one update of a tiny model reaches them.
METHOD = cppo.CPPO(delta=0.001, delta_b=0.0001)
OURS = (
    "algorithm.rollout_correction.bypass_mode=True",
    f"{ACTOR}.policy_loss._target_=cppo.adapters.verl.TrustRegionLoss",
    f"{ACTOR}.policy_loss.loss_mode=cppo",
    f"+{ACTOR}.policy_loss.delta={METHOD.delta}",
    f"+{ACTOR}.policy_loss.delta_b={METHOD.delta_b}",
)
REPORT = "+hydra.callbacks.report._target_=cppo.adapters.verl_report.RolloutReport"


def launch(folder, *overrides):
    """Run main_ppo to its end in that folder; return what it printed."""
    write_model(folder / "model")
    rows = [
        {
            "data_source": "toy", "prompt": [{"role": "user", "content": prompt}], "ability": "toy",
            "reward_model": {"style": "rule", "ground_truth": ""}, "extra_info": {"index": index},
        }
        for index, prompt in enumerate(PROMPTS * 2)
    ]  # fmt: skip
    pandas.DataFrame(rows).to_parquet(folder / "train.parquet")
    (folder / "reward.py").write_text(REWARD)
    write_installed(folder)  # so that verl finds the package as it does where it is installed
    rollout = "actor_rollout_ref.rollout"
    command = [
        sys.executable, "-m", "verl.trainer.main_ppo", "trainer.device=cpu", "trainer.n_gpus_per_node=2",
        "trainer.nnodes=1", "trainer.logger=[console]", "trainer.total_training_steps=2", "trainer.save_freq=-1",
        "trainer.test_freq=-1", "trainer.val_before_train=False", f"trainer.default_local_dir={folder / 'ckpt'}",
        "+ray_kwargs.ray_init.num_gpus=2", "ray_kwargs.ray_init.num_cpus=16",
        "+ray_kwargs.ray_init.include_dashboard=False", "+ray_kwargs.ray_init.object_store_memory=500000000",
        f"data.train_files={folder / 'train.parquet'}", f"data.val_files={folder / 'train.parquet'}",
        "data.train_batch_size=4", "data.max_prompt_length=64", "data.max_response_length=24",
        "data.dataloader_num_workers=0", "data.filter_overlong_prompts=False", "algorithm.adv_estimator=grpo",
        f"actor_rollout_ref.model.path={folder / 'model'}", "actor_rollout_ref.model.use_remove_padding=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False", f"{ACTOR}.strategy=fsdp2",
        f"{ACTOR}.use_torch_compile=False", f"{ACTOR}.fsdp_config.use_torch_compile=False",
        f"+{ACTOR}.fsdp_config.mixed_precision={FLOAT32}", f"{ACTOR}.fsdp_config.model_dtype=fp32",
        f"{ACTOR}.optim.lr=1e-2",
        f"{ACTOR}.ppo_mini_batch_size=2", f"{ACTOR}.ppo_micro_batch_size_per_gpu=2",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=2", f"{rollout}.name=cpu",
        f"{rollout}.tensor_model_parallel_size=1", f"{rollout}.n=4", f"{rollout}.agent.num_workers=1",
        f"{rollout}.free_cache_engine=False", f"reward.custom_reward_function.path={folder / 'reward.py'}",
        "reward.custom_reward_function.name=compute_score", "reward.num_workers=1", *overrides,
    ]  # fmt: skip
    environment = {
        "PYTHONPATH": f"{folder}:{SOURCE}:{HERE}", "VERL_USE_EXTERNAL_MODULES": "cpu_verl", "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda", "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "1",
    }  # fmt: skip
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, text=True, check=False, timeout=540,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    (folder / "output.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def metrics_of(output):
    """Return one dict a step, of what verl's console logger printed."""
    steps = []
    for line in re.findall(r"step:\d+ - .*", output):
        pairs = [part.partition(":") for part in line.split(" - ")]
        steps.append({name: float(value) for name, _, value in pairs if re.fullmatch(r"-?[\d.e+-]+", value)})
    return steps


def masked_fraction(rows):
    """Return what CPPO masks in each micro-batch of two responses, of what the rollout log holds."""
    fractions = []
    for pair in zip(rows[::2], rows[1::2], strict=True):
        columns = [torch.cat([torch.tensor(row[name]) for row in pair]) for name in ("logp", "rollout_logp")]
        lengths = [len(row["token_ids"]) for row in pair]
        mask = torch.cat([torch.tensor(row["response_mask"]) for row in pair])
        advantages = torch.tensor([row["advantage"] for row in pair])
        decision = cppo.decide(METHOD, *columns, advantages, mask, lengths=lengths)
        fractions.append(((decision.rejected_by > 0).sum() / mask.sum()).item())
    return fractions


@pytest.mark.slow
def test_two_steps_of_main_ppo_under_cppo(tmp_path):
    folder = tmp_path / "rollouts"
    steps = metrics_of(launch(tmp_path, *OURS, f"+{ACTOR}.policy_loss.rollout_log={folder}", REPORT))
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert 0 < step["actor/gate/masked_fraction"] < 1
        assert 0 < step["actor/gate/budget_share"] < 1
        assert step["actor/input/nonfinite"] == 0
        assert step["actor/grad_norm"] > 0
    # Two updates a step, two workers an update, four responses each; read back, they are judged as they were.
    files = sorted(folder.glob("*.parquet"))
    assert [file.name[:11] for file in files] == [f"step-{n:06d}" for n in (1, 1, 2, 2, 3, 3, 4, 4)]
    assert (folder / "tokenizer.json").is_file()
    rows = list(read_rollouts(folder))
    assert [row["step"] for row in rows] == [n for n in (1, 2, 3, 4) for _ in range(8)]
    for row in rows:
        assert row["prompt"].endswith("<|im_start|>assistant\n")
        assert any(prompt in row["prompt"] for prompt in PROMPTS)
        assert 0 <= row["reward"] <= 1
        assert len(row["token_ids"]) == len(row["logp"]) == len(row["rollout_logp"]) == sum(row["response_mask"])
    assert '"file":"step-000001-' in (folder / "report.html").read_text()  # written when main_ppo ended
    for index, step in enumerate(steps):
        fractions = masked_fraction(rows[16 * index : 16 * (index + 1)])
        assert step["actor/gate/masked_fraction"] == pytest.approx(sum(fractions) / 8, rel=1e-5)
