"""Avg@k: the mean success over k samples a held-out problem, with its standard error."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from cppo.lab.problems import Problem, Task


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled response."""

    text: str
    ended: bool  # the policy stopped by itself, with its end token
    tokens: int  # the end token included


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Success on held-out problems.

    ``standard_error`` is that of ``mean`` over the choice of problems: the deviation of the problems' means over the
    square root of their number (samples of one problem are not independent evidence about others).
    """

    mean: float
    standard_error: float | None  # None with one problem
    problems: int
    samples: int
    solved: float  # share of problems with at least one full success
    ended: float  # share of responses that ended by themselves
    length: float  # tokens a response, the end token included


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
    batch_size: int = 256,
    on_batch: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Sample one response a prompt from the untruncated policy; torch's global generator is left as it was.

    ``temperature`` 0 takes the likeliest token instead.
    """
    settings = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    training = model.training
    model.eval()
    completions: list[Completion] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            inputs = tokenizer(batch, return_tensors="pt", padding=True, padding_side="left").to(model.device)
            output = model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=settings
            )
            rows = output[:, inputs["input_ids"].shape[1] :].tolist()
            for row in rows:
                length = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
                ended = row[length - 1] == tokenizer.eos_token_id
                text = str(tokenizer.decode(row[:length], skip_special_tokens=True))
                completions.append(Completion(text, ended, length))
            if on_batch is not None:
                on_batch(len(batch))
    model.train(training)
    return completions


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: list[Problem],
    *,
    samples: int,
    temperature: float,
    max_tokens: int,
    seed: int,
    batch_size: int = 256,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Return Avg@``samples`` of the policy on the problems."""
    prompts = [problem.prompt for problem in problems for _ in range(samples)]
    completions = sample(
        model, tokenizer, prompts, temperature=temperature, max_tokens=max_tokens, seed=seed, batch_size=batch_size,
        on_batch=on_batch,
    )  # fmt: skip
    scores = [
        task.score(problems[index // samples], completion.text, completion.ended)
        for index, completion in enumerate(completions)
    ]
    means = [statistics.fmean(scores[start : start + samples]) for start in range(0, len(scores), samples)]
    return Evaluation(
        mean=statistics.fmean(means),
        standard_error=statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
        problems=len(problems),
        samples=samples,
        solved=sum(max(scores[i : i + samples]) >= 1 for i in range(0, len(scores), samples)) / len(problems),
        ended=statistics.fmean(completion.ended for completion in completions),
        length=statistics.fmean(completion.tokens for completion in completions),
    )
