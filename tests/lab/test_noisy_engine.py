"""The engine with other numerics: what it samples, and that the log-probs it reports are those it sampled from."""

import dataclasses
import math

import pytest
import torch

from cppo.lab.config import RunConfig, load_config
from cppo.lab.folder import read_metrics
from cppo.lab.model import build_char_tokenizer, build_tiny_model
from cppo.lab.noisy_engine import NoisyEngine
from cppo.lab.run import Run, start_run
from cppo.rollout_log import read_rollouts

pytestmark = pytest.mark.train
TOKENIZER = build_char_tokenizer("0123456789=")


class Trainer:
    def __init__(self):
        self.processing_class = TOKENIZER
        self.model = build_tiny_model(TOKENIZER, layers=1, width=16, heads=2).train()
        self.accelerator = self

    def unwrap_model(self, model):
        return model


def exact(trainer, prompt, completion, temperature=1.0):
    ids = torch.tensor([prompt + completion])
    logits = trainer.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


def sample(noise, prompts, temperature=1.0, max_tokens=6, seed=0):
    trainer = Trainer()
    torch.manual_seed(seed)
    return trainer, NoisyEngine(noise, temperature, max_tokens)(prompts, trainer)


def test_prompts_and_completions_come_back_without_padding():
    trainer, out = sample(0.3, ["1=", "123456="])
    assert out["prompt_ids"] == [TOKENIZER("1=")["input_ids"], TOKENIZER("123456=")["input_ids"]]
    for ids, logp in zip(out["completion_ids"], out["logprobs"], strict=True):
        assert 1 <= len(ids) == len(logp) <= 6
        assert TOKENIZER.eos_token_id not in ids[:-1]
        assert len(ids) == 6 or ids[-1] == TOKENIZER.eos_token_id
    assert trainer.model.training  # as it was


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_with_hardly_any_noise_the_log_probs_are_the_models(temperature):
    trainer, out = sample(1e-6, ["12=", "3=", "4567="], temperature)
    trainer.model.eval()
    with torch.no_grad():
        for prompt, ids, logp in zip(out["prompt_ids"], out["completion_ids"], out["logprobs"], strict=True):
            assert logp == pytest.approx(exact(trainer, prompt, ids, temperature), abs=2e-5)


def test_the_noise_has_the_size_that_was_asked_for():
    # One step from one prompt, many times. With V logits z_v + s e_v the reported log-prob differs from the model's by
    # s e_a - log sum_v p_v exp(s e_v); for small s its standard deviation is s sqrt(1 - 2 p_a + sum p^2), a is sampled.
    trainer, out = sample(0.05, ["7="] * 6000, max_tokens=1)
    trainer.model.eval()
    with torch.no_grad():
        p = trainer.model(input_ids=torch.tensor([out["prompt_ids"][0]])).logits[0, -1].double().softmax(-1)
    errors = [logp[0] - math.log(p[ids[0]]) for ids, logp in zip(out["completion_ids"], out["logprobs"], strict=True)]
    variance = 0.05**2 * float((p * (1 - 2 * p + (p**2).sum())).sum())
    assert torch.tensor(errors).std().item() == pytest.approx(math.sqrt(variance), rel=0.05)


def test_tokens_are_sampled_from_the_policy_that_is_reported():
    # The mean of exp(logp) / mu summed over a partition is 1: here E[1{a} / mu(a)] = 1 for every token a.
    _, out = sample(1.0, ["7="] * 8000, max_tokens=1)
    weights = torch.zeros(len(TOKENIZER))
    for ids, logp in zip(out["completion_ids"], out["logprobs"], strict=True):
        weights[ids[0]] += math.exp(-logp[0]) / 8000
    common = weights[:10]
    assert common.tolist() == pytest.approx([1.0] * 10, abs=0.25)


@pytest.mark.slow
def test_a_run_with_noise_has_a_mismatch_before_its_first_update(tmp_path):
    config = RunConfig(
        task="running_sum?operands=4&slip=0.3", rollouts=2, epochs=1, prompts=4, generations=4, minibatch=16,
        eval_problems=16, eval_every=2, warm_start_steps=60, sampler_noise=0.3, method="cppo?delta=0.02&delta_b=0.002",
    )  # fmt: skip
    folder = start_run(config, tmp_path / "noisy")

    class Silence:
        def phase(self, name, total=None):
            pass

        def advance(self, row=None):
            pass

    Run(config, folder, Silence()).train()
    first = next(row for row in read_metrics(folder.metrics) if row["step"] == 1)
    assert first["divergence/probability_gap"] > 0.005
    assert first["gate/masked_fraction"] > 0  # one update a rollout, and the trust region acts
    rows = list(read_rollouts(folder.rollouts))
    assert any(abs(a - b) > 0.01 for a, b in zip(rows[0]["logp"], rows[0]["rollout_logp"], strict=True))
    assert load_config(folder.config) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler_noise": -0.1}, "sampler_noise=-0.1: expected a number >= 0"),
        ({"sampler_noise": float("nan")}, "sampler_noise=nan"),
        ({"sampler_noise": "0.1"}, "sampler_noise='0.1'"),
        ({"sampler_noise": 0.1, "method": "dppo?divergence=topk_tv"}, "expected 0 with a top-K divergence"),
        ({"minibatch": 256, "epochs": 1}, "expected more than one update a rollout"),
        ({"model": "tiny?depth=3"}, "'depth' is no option of it; expected layers, width or heads"),
        ({"model": "tiny?layers=0"}, "layers=0: expected an integer >= 1"),
        ({"model": "tiny?width=60&heads=4"}, "expected a width that is a multiple of twice the heads"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**options)


def test_one_update_a_rollout_is_allowed_where_the_sampler_differs():
    assert RunConfig(minibatch=256, epochs=1, sampler_noise=0.1).updates == 1
    assert dataclasses.replace(RunConfig(), model="tiny?layers=1&width=32&heads=2").tiny
