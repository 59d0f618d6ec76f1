"""TRL: a tiny model is sampled from, drifts, and takes the step of a ``CPPOTrainer``."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor

from cppo.methods import CPPO
from cppo.objective import decide


def step(method: CPPO) -> tuple[Tensor, Tensor, float]:
    """Return (the model's gradient, the same in closed form, the share of tokens that was masked)."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig

    from cppo.adapters.trl import CPPOTrainer
    from cppo.lab.model import build_char_tokenizer, build_tiny_model

    tokenizer = build_char_tokenizer("0123456789=")
    model = build_tiny_model(tokenizer, layers=1, width=16, heads=2)
    prompts = ["1=", "23=", "456=", "7="]

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(index % 3) + 0.1 * len(text) for index, text in enumerate(completions)]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, per_device_train_batch_size=8, num_generations=4,
            steps_per_generation=2, max_completion_length=8, top_k=0, gradient_checkpointing=False, report_to=[],
            disable_tqdm=True, save_strategy="no", seed=0,
        )  # fmt: skip
        trainer = CPPOTrainer(
            model, reward, config, Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer, method=method
        )
        model.train()
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer._generate_and_score_completions([{"prompt": p} for p in prompts for _ in range(4)])
        _drift(model)
        trainer._compute_loss(model, batch).backward()
    found = _take_gradient(model)
    # The same from all logits, by plain log_softmax and autograd.
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
    responses, mask = batch["completion_ids"], batch["completion_mask"]
    every = logits.log_softmax(-1)[:, -responses.shape[1] :]
    logp = every.gather(2, responses[..., None])[..., 0]
    decision = decide(method, logp, batch["sampling_per_token_logps"], batch["advantages"], mask)
    weights = decision.coefficient * batch["advantages"][:, None]
    # TRL's "dapo": the mean over one optimizer step's share of the rollout's tokens.
    share = batch["num_items_in_batch"] / config.steps_per_generation
    (-(weights * torch.where(mask > 0, logp, 0.0)).sum() / share).backward()
    return found, _take_gradient(model), ((decision.rejected_by > 0).sum() / mask.sum()).item()


def _drift(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def _take_gradient(model: torch.nn.Module) -> Tensor:
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return gradient
