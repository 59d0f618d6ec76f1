"""recipes/trl: each YAML file is a GRPOConfig that the adapter takes; the scripts run, in miniature, without vLLM."""

import importlib
import json
import pathlib
import sys
import types

import pytest
import torch
import yaml
from scripts import load_script
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig

import cppo
from cppo.adapters.trl import check_config
from cppo.doctor import examine

RECIPES = pathlib.Path(__file__).parents[2] / "recipes"
# The paper's: prompts a rollout, responses a prompt, updates a rollout, longest response, window in rollouts.
TABLE = {
    "qwen3-1.7b": (64, 8, 2, 8192, 1120),
    "qwen3-1.7b-base": (64, 8, 2, 8192, 680),
    "qwen3-8b-base": (128, 8, 4, 8192, 490),
}
METHODS = [
    "cppo?budget=fixed&delta_b=0.015&divergence=topk_tv",
    "cppo?divergence=topk_tv",
    "dppo?delta=0.15&divergence=topk_tv",
    "grpo",
    "cispo?cap=5",
    "minpro",
    "trm_max?divergence=topk_kl",
    "trm_avg?divergence=topk_kl",
]

pytestmark = pytest.mark.train


@pytest.fixture
def scripts(monkeypatch):
    """The recipe's own modules, imported as the scripts import each other."""
    monkeypatch.syspath_prepend(RECIPES / "trl")
    names = ("scoring", "train", "evaluate")
    yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name)


def settings_of(name):
    return yaml.safe_load((RECIPES / "trl" / f"{name}.yaml").read_text())


def test_there_is_a_file_for_each_model_that_fits_one_machine():
    assert {path.stem for path in (RECIPES / "trl").glob("*.yaml")} == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_the_numbers_are_the_papers(name):
    prompts, responses, updates, longest, window = TABLE[name]
    settings, processes = settings_of(name), 8
    an_update = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * processes
    a_rollout = settings["per_device_train_batch_size"] * settings["steps_per_generation"] * processes
    assert settings["num_generations"] == responses
    assert an_update == 32 * responses
    assert a_rollout == prompts * responses == updates * an_update
    assert settings["max_completion_length"] == longest
    assert settings["vllm_max_model_length"] > longest
    assert settings["max_steps"] == window * updates
    assert settings["learning_rate"] == 1e-6
    assert settings["beta"] == 0
    assert (settings["temperature"], settings["top_p"], settings["top_k"]) == (1, 1, 0)
    assert settings["model_init_kwargs"] == {"dtype": "float32"}


@pytest.mark.parametrize("name", TABLE)
def test_a_real_config_passes_the_adapters_check_for_every_method(name, tmp_path):
    config = GRPOConfig(**(settings_of(name) | {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}))
    assert config.steps_per_generation == TABLE[name][2] * config.gradient_accumulation_steps
    for spec in METHODS:
        check_config(config, cppo.parse_method(spec), engine_log_probs=True)


def test_the_readme_names_these_methods():
    text = (RECIPES / "README.md").read_text()
    assert [spec for spec in METHODS if f"`{spec}`" not in text] == []


@pytest.mark.parametrize("name", TABLE)
def test_doctor_accepts_it(name, monkeypatch):
    monkeypatch.setattr("cppo.doctor._SELF_TESTS", {})  # its own tests run them
    *_, launch = examine(RECIPES / "trl" / f"{name}.yaml")
    assert (launch.subject, launch.status) == (f"{name}.yaml", "ok"), launch


# ---------------------------------------------------------------- train.py


@pytest.fixture
def small(tmp_path, scripts):
    """A tiny chat model in a folder and a data set in the form that recipes/data.py writes."""
    letters = sorted(set("Answer: 0123456789user\n"))
    specials = ["_", "<end>", "<start>"]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*specials, *letters])}, unk_token="_"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="_", bos_token="<start>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=0, eos_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    model = tmp_path / "model"
    Qwen3ForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    data = load_script("recipes/data.py")
    for name in data.SETS:
        rows = [{"problem": f"{name} {number}", "answer": number} for number in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [word for name in data.SETS for word in (f"--{name}", str(tmp_path / f"{name}.jsonl"))]
    assert data.main(["--out", str(tmp_path / "data"), *sources]) == 0
    return tmp_path


def arguments(small, method, *more, name="qwen3-1.7b-base"):
    return [
        "--config", str(RECIPES / "trl" / f"{name}.yaml"), "--model", str(small / "model"), "--method", method,
        "--data", str(small / "data"), "--output_dir", str(small / "run"), "--use_vllm", "false", "--bf16", "false",
        "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--gradient_checkpointing", "false",
        "--max_completion_length", "6", "--max_steps", "2", "--num_generations", "2", "--minibatch", "2",
        "--gradient_accumulation_steps", "2", "--steps_per_generation", "4", *more,
    ]  # fmt: skip


@pytest.fixture
def uneven(scripts, monkeypatch):
    """Rewards that differ within a group: a tiny untrained model answers nothing right."""
    asked = []

    def score(ground_truth, response):
        asked.append((ground_truth, response))
        return float(len(asked) % 2)

    monkeypatch.setattr(scripts.train, "score", score)
    return asked


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["cppo?divergence=topk_tv&delta=1e-5", "grpo"])
def test_the_script_trains_the_model(scripts, small, uneven, method):
    trainer = scripts.train.main(arguments(small, method))
    assert trainer.state.global_step == 2
    assert trainer.args.learning_rate == 1e-6
    assert trainer.method == cppo.parse_method(method)
    logged = [entry for entry in trainer.state.log_history if "gate/masked_fraction" in entry]
    assert len(logged) == 2
    assert {truth for truth, _ in uneven} <= {str(number) for number in range(8)}
    assert len(uneven) == 8  # one rollout of 4 prompts x 2 responses for two updates
    before, after = (
        Qwen3ForCausalLM.from_pretrained(folder).state_dict() for folder in (small / "model", small / "run")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)
    if "topk" in method:  # the second update sees the drift of the first
        assert logged[0]["gate/masked_fraction"] == 0
        assert logged[1]["divergence/mean"] > 0


def test_a_minibatch_that_is_not_the_recipes_is_refused_with_what_would_be(scripts, small):
    expected = r"responses an update.*8 \(4 prompts of 2\): expected --gradient_accumulation_steps 4 --steps_per_gen"
    with pytest.raises(ValueError, match=expected + "eration 8"):
        scripts.train.main(arguments(small, "grpo", "--minibatch", "4"))


def test_the_yaml_as_it_stands_asks_for_eight_processes(scripts, tmp_path):
    for name in TABLE:
        scripts.train.check_minibatch(types.SimpleNamespace(world_size=8, **settings_of(name)), 32)
        config = GRPOConfig(**(settings_of(name) | {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}))
        with pytest.raises(ValueError, match="accumulation_steps 128 --steps_per_generation"):
            scripts.train.check_minibatch(config, 32)
        one = {"gradient_accumulation_steps": 128, "steps_per_generation": 128 * TABLE[name][2]}
        alone = settings_of(name) | {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False} | one
        scripts.train.check_minibatch(GRPOConfig(**alone), 32)


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("cpo", [], "cpo"),
        ("cppo?detla=1", [], "detla"),
        ("grpo", ["--data", "nowhere"], "--data nowhere: expected train.parquet in it; recipes/data.py writes it"),
        ("grpo", ["--top_p", "0.9"], r"top_p=0.9\): expected 1.0"),
        ("grpo", ["--steps_per_generation", "2"], "more than one optimizer step a rollout"),
    ],
)
def test_bad_arguments_are_named(scripts, small, method, more, message):
    with pytest.raises(ValueError, match=message):
        scripts.train.main(arguments(small, method, *more))


@pytest.mark.filterwarnings("ignore")
def test_another_runs_checkpoints_are_not_written_over_and_can_be_gone_on_from(scripts, small, uneven):
    often = ["--save_steps", "1"]
    scripts.train.main(arguments(small, "cppo", *often))
    with pytest.raises(ValueError, match=r"--output_dir .*run: has checkpoints; expected a new folder, or --resume"):
        scripts.train.main(arguments(small, "grpo"))
    asked = len(uneven)
    more = ["--resume_from_checkpoint", str(small / "run" / "checkpoint-2"), "--max_steps", "4", *often]
    trainer = scripts.train.main(arguments(small, "cppo", *more))
    assert trainer.state.global_step == 4
    assert len(uneven) == asked + 8  # one rollout more, for updates 3 and 4


# ---------------------------------------------------------------- scoring.py, evaluate.py


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("It is 34.\nAnswer: 34", 1),
        ("Answer: $34$", 1),
        ("**Answer:** 34", 1),
        ("Answer:\n34", 1),
        ("so \\boxed{34}", 1),
        ("Answer: 12, no. Answer: 34", 1),
        ("Answer: 34\n\nOr is it 35?", 1),
        ("Answer: 35", 0),
        ("Answer: 34\nNo.\nAnswer: 35", 0),
        ("cut off at 34", 0),  # Math-Verify would take the last number for the answer
        ("Answer: ", 0),
        ("", 0),
    ],
)
def test_the_reward_is_the_answer_lines(scripts, response, value):
    assert scripts.scoring.score("34", response) == value
    assert scripts.train.reward([[{"role": "assistant", "content": response}]], [{"ground_truth": "34"}]) == [value]


def test_evaluation_averages_over_samples_and_sets(scripts, small, monkeypatch, capsys):
    seen = {}

    class Engine:  # stands in for vLLM, which wants a GPU
        def __init__(self, **settings):
            seen.update(settings)

        def chat(self, messages, how):
            assert how == {
                "n": 4, "temperature": 0.7, "top_p": 0.95, "top_k": -1, "max_tokens": 8192, "seed": 0,
            }  # fmt: skip
            assert all(len(one) == 1 and one[0]["content"].startswith("Solve the following") for one in messages)
            texts = [f"Answer: {number}" for number in (0, 5, 9, 9)]  # problem k's answer is k, of 0 to 7
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(text=t) for t in texts])] * len(messages)

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=Engine, SamplingParams=dict))
    mean = scripts.evaluate.main([str(small / "model"), "--data", str(small / "data"), "--samples", "4"])
    assert mean == pytest.approx(2 / 8 / 4)  # two of 8 problems are solved by one sample of 4
    assert capsys.readouterr().out.splitlines()[-1] == "mean: 6.25%"
    assert seen["max_model_len"] == 8192 + 2048
    with pytest.raises(SystemExit, match=r"nowhere: expected nowhere/aime24\.parquet"):
        scripts.evaluate.main(["model", "--data", "nowhere"])
