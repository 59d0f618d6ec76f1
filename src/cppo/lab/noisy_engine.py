"""A sampling engine that differs from the trainer: Gaussian noise on its logits, and its own log-probs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


class NoisyEngine:
    """A TRL ``rollout_func``: samples with the trainer's own model, as an engine of other numerics would.

    At every token, sampled from mu = softmax((z + noise e) / temperature) with z the model's logits and e standard
    normal, independent for every token and every entry of the vocabulary. The log-probs that it reports are those of
    mu, so they are right for what was sampled; the trainer's differ from them before its first update.

    Args:
        noise: standard deviation in logits, > 0.
        temperature: of sampling, > 0.
        max_tokens: the longest response, end token included.
    """

    def __init__(self, noise: float, temperature: float, max_tokens: int) -> None:
        self._noise, self._temperature, self._max_tokens = noise, temperature, max_tokens

    @torch.no_grad()
    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """Return one response a prompt, and the log-probs of its tokens under the noisy policy."""
        tokenizer = trainer.processing_class
        model = trainer.accelerator.unwrap_model(trainer.model)
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        record = _Record(self._noise, self._temperature)
        training = model.training
        model.eval()
        try:
            output = model.generate(
                **inputs,
                generation_config=GenerationConfig(
                    max_new_tokens=self._max_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                ),
                logits_processor=LogitsProcessorList([record]),
            )  # fmt: skip
        finally:
            model.train(training)
        width = inputs["input_ids"].shape[1]
        tokens = output[:, width:]
        logp = torch.stack(record.sampled(tokens[:, -1]), dim=1)
        lengths = [_length(row, tokenizer.eos_token_id) for row in tokens.tolist()]
        starts = (inputs["attention_mask"] == 0).sum(dim=1).tolist()
        return {
            "prompt_ids": [row[start:width].tolist() for row, start in zip(output, starts, strict=True)],
            "completion_ids": [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)],
            "logprobs": [row[:n].tolist() for row, n in zip(logp, lengths, strict=True)],
        }


class _Record(LogitsProcessor):
    """Adds the noise; remembers the log-prob of each sampled token, which the next call sees, and one distribution."""

    def __init__(self, noise: float, temperature: float) -> None:
        self._noise, self._temperature = noise, temperature
        self._last: Tensor | None = None
        self._sampled: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._last is not None:
            self.sampled(input_ids[:, -1])
        noisy = (scores + self._noise * torch.randn_like(scores)) / self._temperature
        self._last = noisy.log_softmax(dim=-1)
        return self._last

    def sampled(self, tokens: Tensor) -> list[Tensor]:
        """Take in what was sampled last; return the log-probs of all tokens so far, a tensor [B] each."""
        assert self._last is not None
        self._sampled.append(self._last.gather(1, tokens[:, None])[:, 0])
        return self._sampled


def _length(row: list[int], end: int) -> int:
    return row.index(end) + 1 if end in row else len(row)
