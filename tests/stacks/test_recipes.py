"""recipes/verl: every setting with every method, composed with verl's ppo_trainer.yaml and judged by its own checks."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from scripts import load_script
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.reward_score import default_compute_score
from verl.workers.config import ActorConfig, FSDPActorConfig, PolicyLossConfig, RolloutConfig

import cppo
from cppo import doctor
from cppo.adapters import verl as adapter

RECIPES = pathlib.Path(__file__).parents[2] / "recipes"
RUN = RECIPES / "verl" / "run.sh"

# The paper: hub id, prompts, responses a prompt, updates a rollout, longest response, window; CPPO's delta and budget.
TABLE = {
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", 64, 8, 2, 8192, 1120, 0.15, {"budget": "fixed", "delta_b": 0.015}),
    "qwen3-1.7b-base": ("Qwen/Qwen3-1.7B-Base", 64, 8, 2, 8192, 680, 0.15, {"budget": "adaptive", "delta_b": 0.02}),
    "qwen3-8b-base": ("Qwen/Qwen3-8B-Base", 128, 8, 4, 8192, 490, 0.15, {"budget": "adaptive", "delta_b": 0.02}),
    "qwen3-30b-a3b-base": (
        "Qwen/Qwen3-30B-A3B-Base", 256, 16, 8, 16384, 560, 0.2, {"budget": "adaptive", "delta_b": 0.02},
    ),
}  # fmt: skip
METHODS = {
    "cppo": lambda delta, budget: cppo.CPPO(delta=delta, w_min=0.8, **budget),
    "dppo": lambda delta, budget: cppo.DPPO(delta=delta),
    "grpo": lambda delta, budget: cppo.GRPO(clip_low=0.2, clip_high=0.28),
    "cispo": lambda delta, budget: cppo.PolicyGradient(ratio_cap=5),
    "minpro": lambda delta, budget: cppo.MinPRO(clip_low=0.2, clip_high=0.28),
    "trm_max": lambda delta, budget: cppo.make_method("trm_max", max_threshold=0.05, divergence="binary_kl"),
    "trm_avg": lambda delta, budget: cppo.make_method("trm_avg", avg_threshold=0.001, divergence="binary_kl"),
}
PAIRS = [(setting, method) for setting in TABLE for method in METHODS]


@functools.cache
def composed(setting, method, *overrides):
    """What run.sh has verl's main_ppo compose."""
    search = f"hydra.searchpath=[file://{RECIPES / 'verl'}]"
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[search, f"+setting={setting}", f"+method={method}", *overrides])


def test_the_table_is_whole():
    assert {path.stem for path in (RECIPES / "verl" / "setting").iterdir()} == set(TABLE)
    assert {path.stem for path in (RECIPES / "verl" / "method").iterdir()} == set(METHODS)


@pytest.mark.parametrize("setting", TABLE)
def test_the_readme_has_the_numbers(setting):
    _, prompts, responses, updates, longest, window, delta, budget = TABLE[setting]
    row = next(line for line in (RECIPES / "README.md").read_text().splitlines() if line.startswith(f"| `{setting}`"))
    cells = [cell.strip() for cell in row.split("|")][2:7]
    assert cells[:4] == [f"{prompts} x {responses}", str(updates), str(longest), str(window)]
    assert cells[4].startswith(f"{delta:.2f}, {budget['budget']}")
    assert cells[4].endswith(f" {budget['delta_b']}")


@pytest.mark.parametrize(("setting", "method"), PAIRS)
def test_verl_takes_it_and_the_method_is_the_one_meant(setting, method, capsys):
    config = composed(setting, method)
    validate_config(config, need_reference_policy(config), need_critic(config))  # as main_ppo does
    assert not need_reference_policy(config)
    assert not need_critic(config)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(actor, FSDPActorConfig)
    assert isinstance(actor.policy_loss, adapter.TrustRegionLoss)
    assert isinstance(omega_conf_to_dataclass(config.actor_rollout_ref.rollout), RolloutConfig)
    *_, delta, budget = TABLE[setting]
    assert adapter.build_method(actor.policy_loss) == METHODS[method](delta, budget)
    adapter.check_launch(config)
    assert config.trainer.experiment_name == f"{setting}-{method}"  # another's checkpoints are not resumed
    assert config.trainer.default_local_dir.endswith(f"/{setting}-{method}")


@pytest.mark.parametrize("setting", TABLE)
def test_the_numbers_are_the_papers(setting):
    hub, prompts, responses, updates, longest, window, *_ = TABLE[setting]
    config = composed(setting, "cppo")
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert config.actor_rollout_ref.model.path == hub
    assert config.data.train_batch_size == prompts
    assert rollout.n == responses
    assert actor.ppo_mini_batch_size == 32
    assert actor.ppo_epochs == 1
    assert prompts // actor.ppo_mini_batch_size == updates
    assert config.data.max_response_length == rollout.response_length == longest
    assert config.trainer.total_training_steps == window
    assert window % config.trainer.test_freq == 0
    assert (actor.optim.optimizer, actor.optim.lr, actor.optim.lr_scheduler_type) == ("AdamW", 1e-6, "constant")
    assert actor.fsdp_config.model_dtype == "fp32"
    assert (actor.loss_agg_mode, actor.use_kl_loss, actor.entropy_coeff) == ("token-mean", False, 0)
    assert config.algorithm.adv_estimator == "grpo"
    assert config.algorithm.norm_adv_by_std_in_grpo
    assert not config.algorithm.filter_groups.enable
    assert not config.algorithm.use_kl_in_reward
    assert config.algorithm.rollout_correction.bypass_mode
    assert (rollout.temperature, rollout.top_p, rollout.top_k, rollout.calculate_log_probs) == (1, 1, -1, True)
    val = rollout.val_kwargs
    assert (val.n, val.temperature, val.top_p, val.top_k, val.do_sample) == (16, 0.7, 0.95, -1, True)
    assert (
        actor.ppo_max_token_len_per_gpu >= config.data.max_prompt_length + longest
    )  # else verl cannot place a response
    assert responses * prompts % (config.trainer.nnodes * config.trainer.n_gpus_per_node) == 0


@pytest.mark.parametrize(("setting", "method"), PAIRS)
def test_doctor_accepts_the_printed_configuration(setting, method, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_SELF_TESTS", {})  # tests/verl runs them
    launch = tmp_path / "launch.yaml"
    launch.write_text(OmegaConf.to_yaml(composed(setting, method), resolve=True))
    *_, judged = doctor.examine(launch)
    assert (judged.subject, judged.status) == ("launch.yaml", "ok"), judged


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("actor_rollout_ref.rollout.top_p=0.95", "top_p=0.95: expected 1"),
        ("data.train_batch_size=32", "ppo_mini_batch_size=32: expected less"),
        ("actor_rollout_ref.actor.policy_loss.delta=-1", "delta=-1"),
        ("recipe.delta=-1", "delta=-1"),
    ],
)
def test_what_is_overridden_is_judged_too(override, message):
    with pytest.raises(ValueError, match=message):
        adapter.check_launch(composed("qwen3-1.7b", "cppo", override))


# ---------------------------------------------------------------- run.sh


def run(*words, path):
    """Run the launcher with the only ``python`` being one that starts nothing but verl's printing."""
    (path / "python").write_text(f'#!/bin/sh\ncase "$*" in *"--cfg job"*) exec {sys.executable} "$@";; esac\nexit 9\n')
    (path / "python").chmod(0o755)
    environment = {"PATH": f"{path}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(pathlib.Path(cppo.__file__).parent.parent)
    return subprocess.run([RUN, *words], capture_output=True, text=True, check=False, cwd=path, env=environment)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "run.sh: expected SETTING METHOD [overrides]; settings: qwen3-1.7b"),
        (["qwen3-1.7b"], "run.sh: expected SETTING METHOD"),
        (["qwen3-4b", "cppo"], "run.sh: SETTING=qwen3-4b: expected one of qwen3-1.7b"),
        (
            ["qwen3-1.7b", "cpo"],
            "run.sh: METHOD=cpo: expected one of cispo, cppo, dppo, grpo, minpro, trm_avg, trm_max",
        ),
        (["qwen3-1.7b", "../method/cppo"], "run.sh: METHOD=../method/cppo: expected one of"),
        (["qwen3-1.7b", ""], "run.sh: METHOD=: expected one of"),
    ],
)
def test_names_that_are_none_give_one_line(words, message, tmp_path):
    done = run(*words, path=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_the_launcher_gives_verl_what_is_tested_here(tmp_path):
    override = "actor_rollout_ref.actor.policy_loss.delta=0.05"
    done = run("qwen3-8b-base", "cppo", override, "--cfg", "job", "--resolve", path=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = composed("qwen3-8b-base", "cppo", override)
    assert yaml.safe_load(done.stdout) == yaml.safe_load(OmegaConf.to_yaml(expected, resolve=True))
    assert yaml.safe_load(done.stdout)["actor_rollout_ref"]["actor"]["policy_loss"]["delta"] == 0.05


# Two updates a step, on a CPU: sizes, and what wants a GPU, are replaced; data, reward, method and metrics are not.
SMALL = """
trainer.device=cpu trainer.n_gpus_per_node=2 trainer.logger=[console] trainer.total_training_steps=2
trainer.save_freq=-1 trainer.test_freq=2 trainer.val_before_train=False ray_kwargs.ray_init.num_cpus=16
+ray_kwargs.ray_init.num_gpus=2 +ray_kwargs.ray_init.include_dashboard=False
+ray_kwargs.ray_init.object_store_memory=500000000 data.train_batch_size=4 data.max_prompt_length=512
data.max_response_length=24 data.dataloader_num_workers=0 actor_rollout_ref.model.use_remove_padding=False
actor_rollout_ref.model.enable_gradient_checkpointing=False
+actor_rollout_ref.model.override_config.attn_implementation=sdpa ACTOR.use_torch_compile=False
ACTOR.fsdp_config.use_torch_compile=False ACTOR.ppo_mini_batch_size=2 ACTOR.use_dynamic_bsz=False
ACTOR.ppo_micro_batch_size_per_gpu=2
+ACTOR.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32} ROLLOUT.name=cpu ROLLOUT.n=4
ROLLOUT.val_kwargs.n=2 ROLLOUT.agent.num_workers=1 ROLLOUT.free_cache_engine=False
ROLLOUT.log_prob_micro_batch_size_per_gpu=2 reward.num_workers=1
"""


@pytest.mark.slow
def test_two_steps_of_main_ppo_from_the_launcher_and_the_prepared_data(tmp_path, prepared):
    bench = pathlib.Path(__file__).parents[1] / "verl"  # its CPU platform and rollout server
    environment = os.environ | {
        "PATH": f"{pathlib.Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1",
        "VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda",
        "VERL_USE_EXTERNAL_MODULES": "cpu_verl,cppo.adapters.verl",
        "PYTHONPATH": f"{pathlib.Path(cppo.__file__).parent.parent}:{bench}",
    }  # fmt: skip
    code = "import pathlib, cpu_verl; cpu_verl.write_model(pathlib.Path('model'))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)
    small = SMALL.replace("ACTOR", "actor_rollout_ref.actor").replace("ROLLOUT", "actor_rollout_ref.rollout").split()
    done = subprocess.run(
        [RUN, "qwen3-1.7b", "cppo", f"recipe.data={prepared}", "actor_rollout_ref.model.path=model", *small],
        cwd=tmp_path, env=environment, text=True, check=False, timeout=540, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    first, second = re.findall(r"step:\d+ - .*", done.stdout)
    for line in (first, second):
        assert "actor/account/delta_b:0.0149" in line or "actor/account/delta_b:0.015" in line
        assert "critic/score/min:-1.0" in line  # an untrained model is wrong by math_dapo's count
        assert "actor/input/nonfinite:0.0" in line
    for name in ("aime24", "aime25", "aime26"):
        assert f"val-core/{name}/acc/mean@2:" in second


# ---------------------------------------------------------------- CISPO, and verl's own


def test_the_cispo_here_has_the_gradient_of_verls_own():
    generator = torch.Generator().manual_seed(0)
    logp = -2 * torch.rand(16, 40, generator=generator, dtype=torch.float64)
    rollout_logp = (logp + 1.5 * torch.randn(16, 40, generator=generator, dtype=torch.float64)).clamp(max=0)
    advantages = torch.randn(16, 1, generator=generator, dtype=torch.float64).expand(16, 40)
    mask = torch.arange(40) < torch.randint(1, 41, (16, 1), generator=generator)

    def gradient(name, config):
        leaf = logp.clone().requires_grad_()
        loss, _ = get_policy_loss_fn(name)(
            old_log_prob=rollout_logp, log_prob=leaf, advantages=advantages, response_mask=mask,
            loss_agg_mode="token-mean", config=config, rollout_is_weights=None,
        )  # fmt: skip
        loss.backward()
        return leaf.grad

    ours = omega_conf_to_dataclass(composed("qwen3-1.7b", "cispo").actor_rollout_ref.actor)
    theirs = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=10, clip_ratio_high=4,
        policy_loss=PolicyLossConfig(loss_mode="cispo"),
    )  # fmt: skip
    found = gradient("policy_gradient", ours)
    assert ((logp - rollout_logp)[mask].exp() > 5).any()
    torch.testing.assert_close(found, gradient("cispo", theirs), rtol=1e-12, atol=0)
    assert not torch.allclose(found, gradient("policy_gradient", ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        policy_loss=adapter.TrustRegionLoss(loss_mode="policy_gradient", ratio_cap=1.2),
    )))  # fmt: skip


# ---------------------------------------------------------------- the data in verl


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What recipes/data.py writes, of small sets in their published forms."""
    data = load_script("recipes/data.py")
    folder = tmp_path_factory.mktemp("recipes")
    words = ["--out", str(folder / "data")]
    for name in data.SETS:
        rows = [{"problem": f"{name}: $x = {number}$. Find $x$.", "answer": f"{number:03}"} for number in range(30)]
        if name == "train":
            rows = [
                {
                    "data_source": "math_dapo",
                    "prompt": [{"role": "user", "content": data.TEMPLATE.replace("{problem}", row["problem"])}],
                    "ability": "MATH",
                    "reward_model": {"style": "rule-lighteval/MATH_v2", "ground_truth": str(int(row["answer"]))},
                    "extra_info": {"index": str(number)},
                }
                for number, row in enumerate(rows)
            ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows * 3)))
        words += [f"--{name}", str(folder / f"{name}.jsonl")]
    assert data.main(words) == 0
    return folder / "data"


def test_verl_reads_the_rows_and_scores_them_by_its_own_math_dapo(prepared):
    core = Tokenizer(models.WordLevel({"_": 0, "<end>": 1}, unk_token="_"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="_")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    config = composed("qwen3-1.7b", "cppo", f"recipe.data={prepared}")
    files = [config.data.train_files, *config.data.val_files]
    assert [pathlib.Path(file).stem for file in files] == ["train", "aime24", "aime25", "aime26"]
    for file, source in zip(files, ["math_dapo", "aime24", "aime25", "aime26"], strict=True):
        rows = RLHFDataset(file, tokenizer, config.data)
        assert len(rows) == 30
        row = rows[7]
        assert row[config.data.reward_fn_key] == source
        assert row["raw_prompt"][0]["content"].startswith("Solve the following math problem step by step. ")
        truth = row["reward_model"]["ground_truth"]
        assert truth == "7"

        def score(response, source=source, truth=truth, extra=row["extra_info"]):
            return default_compute_score(source, response, truth, extra)

        for right in ("So $x=7$.\nAnswer: 7", "Answer: $7$", "so \\boxed{7}"):
            assert score(right)["score"] == 1.0
            assert score(right)["acc"]  # Avg@16 is verl's val-core/aime24/acc/mean@16
        for wrong in ("Answer: 8", "7", "", "Answer: 7\nAnswer: 8"):
            assert score(wrong)["score"] == -1.0
            assert not score(wrong)["acc"]
