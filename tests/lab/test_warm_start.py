"""The warm start: loss on responses and end tokens alone, the same for a seed, leaves no trace but the weights."""

import math

import pytest
import torch

from cppo.lab.model import build_char_tokenizer, build_tiny_model
from cppo.lab.problems import Problem
from cppo.lab.tasks import MathFile, RunningSum
from cppo.lab.warm_start import warm_start

pytestmark = pytest.mark.train
TASK = RunningSum(operands=5)
TOKENIZER = build_char_tokenizer(TASK.alphabet)


class Copying:
    """Prompts and responses of different lengths; the demonstrator repeats the prompt."""

    name, max_completion_tokens, alphabet = "copying", 9, "0123456789="

    def __init__(self, prompts):
        self.prompts = prompts

    def problems(self, split, count, seed):
        assert split == "train"
        return [Problem(prompt, "", {}) for prompt in self.prompts[:count]]

    def score(self, problem, completion, ended):
        return 0.0

    def demonstrate(self, problem, rng):
        return problem.prompt.removesuffix("=")


def run(seed=0, task=TASK, **options):
    model, losses = build_tiny_model(TOKENIZER, width=32), []
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1  # the only use of torch's generator
    last = warm_start(
        model, TOKENIZER, task, seed=seed, on_step=lambda step, loss: losses.append((step, loss)), **options
    )
    return model.state_dict(), losses, last


def test_the_same_seed_gives_the_same_weights_whatever_the_global_generator():
    torch.manual_seed(1)
    weights, losses, last = run(steps=3, batch_size=4)
    before = torch.random.get_rng_state()
    again, same_losses, _ = run(steps=3, batch_size=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    later, _, _ = run(steps=3, batch_size=4)
    assert all(torch.equal(weights[n], again[n]) and torch.equal(weights[n], later[n]) for n in weights)
    assert losses == same_losses
    assert [step for step, _ in losses] == [1, 2, 3]
    assert last == losses[-1][1]
    other, other_losses, _ = run(seed=1, steps=3, batch_size=4)
    assert losses != other_losses
    assert not torch.equal(weights["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("prompts", [["12=", "345=", "6789=", "="], ["123=", "456="]])
def test_the_loss_is_that_of_responses_and_end_tokens_one_sequence_at_a_time(prompts):
    model = build_tiny_model(TOKENIZER, width=32)
    total = tokens = 0
    with torch.no_grad():
        for prompt in prompts:
            ids = TOKENIZER(prompt + prompt.removesuffix("=") + ".")["input_ids"]
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            for position in range(len(prompt), len(ids)):
                total -= logp[position - 1, ids[position]].item()
                tokens += 1
    losses = []
    warm_start(
        model,
        TOKENIZER,
        Copying(prompts),
        steps=1,
        batch_size=len(prompts),
        on_step=lambda _, loss: losses.append(loss),
    )
    assert losses == [pytest.approx(total / tokens, rel=1e-5)]


def test_it_learns_a_short_sum():
    _, losses, last = run(task=RunningSum(operands=3, error=0, slip=0), steps=80, batch_size=16, learning_rate=1e-2)
    assert losses[0][1] > 2.2  # near log 14
    assert last < 0.75 * math.log(10)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode_and_has_no_gradients_left(training):
    model = build_tiny_model(TOKENIZER, width=32).train(training)
    warm_start(model, TOKENIZER, TASK, steps=1, batch_size=2)
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0: expected an integer >= 1"),
        ({"batch_size": 1.5}, r"batch_size=1\.5: expected an integer >= 1"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0: expected a number > 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_a_task_without_a_demonstrator_is_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1=", "answer": "1"}\n')
    with pytest.raises(TypeError, match="it has no demonstrator to imitate"):
        run(task=MathFile(tmp_path / "p.jsonl"))


def test_a_tokenizer_that_lacks_a_character_is_refused():
    tokenizer = build_char_tokenizer("012=")
    with pytest.raises(ValueError, match=r"tokenizer: it has no token for part of '\d{5}=\d{5}'"):
        warm_start(build_tiny_model(tokenizer, width=32), tokenizer, TASK, steps=1)
