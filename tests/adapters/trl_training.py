"""A tiny model in TRL's real trainer, and the gradient that the closed form gives for each of its optimizer steps."""

import warnings

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig

import cppo
from cppo.adapters import trl as adapter

LETTERS = "abcdefgh"


def make_tokenizer():
    vocabulary = {letter: index for index, letter in enumerate([*LETTERS, ".", "_"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=".", pad_token="_")


def make_model(seed=0):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=10, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=9, eos_token_id=8,
        initializer_range=0.3,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def reward_letters(completions, **_):
    # Uneven and never constant within a group, so that every response has an advantage.
    return [sum(ord(letter) % 5 for letter in text) + 0.1 * index for index, text in enumerate(completions)]


def make_config(tmp_path, **overrides):
    settings = {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "per_device_train_batch_size": 4,
        "num_generations": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2,
        "max_completion_length": 7, "max_steps": 6, "learning_rate": 2e-2, "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9, "gradient_checkpointing": False, "report_to": [], "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "top_k": 0, "loss_type": "dapo", "seed": 3,
    }  # fmt: skip
    return GRPOConfig(**(settings | overrides))


class Recorder(adapter.TrustRegionTrainer):
    """Keeps every micro-batch's inputs, and each optimizer step's gradient with the weights it was taken at."""

    def __init__(self, *args, **kwargs):
        self.micro_batches, self.steps = [], []
        super().__init__(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        # _prepare_inputs is called inside; the buffered batch of this micro-step is what the loss saw.
        index = (self._step - 1) % self.args.steps_per_generation
        self.micro_batches.append(self._buffered_inputs[index])
        if len(self.micro_batches) == self.args.gradient_accumulation_steps:
            gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            self.steps.append((self.micro_batches, gradient, weights))
            self.micro_batches = []
        return loss


def make_trainer(tmp_path, method, *, kind=Recorder, model=None, arguments=None, **overrides):
    prompts = Dataset.from_dict({"prompt": ["abc", "h", "gfed", "ba", "cc", "dea", "fh", "aaaa"]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(
            make_model() if model is None else model, reward_letters, make_config(tmp_path, **overrides), prompts,
            processing_class=make_tokenizer(), method=method, **(arguments or {}),
        )  # fmt: skip


def whole_log_probs(model, batch, temperature):
    """log pi over the vocabulary at each completion token, from the full logits, by plain log_softmax."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1] / temperature
    width = batch["completion_ids"].shape[1]
    return logits.log_softmax(-1)[:, -width:]


def full_log_probs(model, batch, temperature):
    """log pi of the sampled tokens."""
    return whole_log_probs(model, batch, temperature).gather(2, batch["completion_ids"][..., None])[..., 0]


def normaliser(loss_type, batch, config, mask):
    """Per-token divisors of TRL's documented aggregations, written here from its documentation."""
    accumulation = config.gradient_accumulation_steps
    if loss_type == "dapo":  # mean over the tokens of one optimizer step's share of the rollout
        return batch["num_items_in_batch"] * accumulation / config.steps_per_generation
    if loss_type == "grpo":
        return mask.sum(1, keepdim=True).clamp(min=1) * len(mask) * accumulation
    if loss_type == "dr_grpo":
        return len(mask) * config.max_completion_length * accumulation
    return mask.sum() * accumulation  # bnpo


def closed_form_gradient(trainer, micro_batches, weights, rollout_logp=None, *, make=None, divergence=None):
    """The parameter gradient of -sum k A logp / normaliser from full logits, k from the core on those log-probs.

    ``make`` makes another model than the usual one; ``divergence(batch, log pi over the vocabulary)`` measures D.
    """
    model = (make or make_model)()
    model.load_state_dict(weights)
    config, decisions = trainer.args, []
    for index, batch in enumerate(micro_batches):
        mask = batch["completion_mask"]
        every = whole_log_probs(model, batch, config.temperature)
        logp = every.gather(2, batch["completion_ids"][..., None])[..., 0]
        measured = None if divergence is None else divergence(batch, every.detach())
        rollout = batch["sampling_per_token_logps"] if rollout_logp is None else rollout_logp[index]
        decision = cppo.decide(trainer.method, logp, rollout, batch["advantages"], mask, divergence=measured)
        decisions.append(decision)
        weighted = decision.coefficient * batch["advantages"][:, None] * torch.where(mask > 0, logp, 0.0)
        (-(weighted / normaliser(config.loss_type, batch, config, mask)).sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, decisions


def relative_error(found, expected):
    scale = max(value.abs().max() for value in expected.values())
    distance = max((found[name] - expected[name]).abs().max() for name in expected)
    return distance / scale if scale > 0 else distance  # where everything is rejected, exactly 0 is expected
