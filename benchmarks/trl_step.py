"""A CPPO update against a GRPO update in TRL: the same model, the same rollout batches, one process.

    python benchmarks/trl_step.py

Two trainers, TRL's own ``GRPOTrainer`` (dapo loss, clip 0.2 / 0.28) and the adapter with CPPO, take turns at
micro-steps on one batch. CPU time of the process, one thread; medians of the pairwise ratios with their spread.
Both print their gradient's agreement first: with thresholds so wide that neither clips, the two gradients are the same.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import cppo
from cppo.adapters.trl import CPPOTrainer
from cppo.lab.model import build_char_tokenizer, build_tiny_model


def make_trainer(kind, width, layers, length, **method):
    tokenizer = build_char_tokenizer("0123456789=abcdefghijklmnopqrstuvwxyz")
    model = build_tiny_model(tokenizer, width=width, layers=layers, heads=width // 16)
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, per_device_train_batch_size=8, num_generations=4,
        steps_per_generation=4, max_completion_length=length, max_steps=10_000, top_k=0, epsilon=0.2, epsilon_high=0.28,
        gradient_checkpointing=False, report_to=[], logging_steps=1_000_000, save_strategy="no", disable_tqdm=True,
        learning_rate=1e-5, seed=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(
            model, lambda completions, **_: [float(sum(map(ord, text)) % 97) for text in completions], config,
            Dataset.from_dict({"prompt": ["12=", "345=", "6789=", "abc="] * 8}), processing_class=tokenizer, **method,
        )  # fmt: skip


def micro_step(trainer, batch):
    start = time.process_time()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    elapsed = time.process_time() - start
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    trainer.model.zero_grad()
    return elapsed, gradient


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    for width, layers, length in ((64, 2, 64), (256, 4, 256)):
        theirs = make_trainer(GRPOTrainer, width, layers, length)
        ours = make_trainer(CPPOTrainer, width, layers, length, method=cppo.CPPO())
        for trainer in (theirs, ours):
            trainer.model.train()
            trainer.current_gradient_accumulation_steps = 1
        rows = [{"prompt": prompt} for prompt in ("12=", "345=", "6789=", "abc=") for _ in range(8)]
        batch = ours._generate_and_score_completions(rows)
        part = {key: value[:8] if value.ndim else value for key, value in batch.items()}
        # A little drift, the same for both, well inside every threshold.
        rollout = part["sampling_per_token_logps"] + 0.01 * torch.randn_like(part["sampling_per_token_logps"])
        ours_batch = part | {"sampling_per_token_logps": rollout}
        theirs_batch = {k: v for k, v in part.items() if k != "sampling_per_token_logps"} | {
            "old_per_token_logps": rollout
        }
        for trainer in (theirs, ours):
            trainer.method = cppo.CPPO(delta=100.0, budget="none")
        expected, found = micro_step(theirs, theirs_batch)[1], micro_step(ours, ours_batch)[1]
        error = ((expected - found).norm() / expected.norm()).item()
        if not error < 1e-4:
            print(f"WRONG: without clipping the gradients differ by {error:.1e}; no ratio")
            continue
        ours.method = cppo.CPPO()
        ours._tallies.clear()
        timed = [(micro_step(ours, ours_batch)[0], micro_step(theirs, theirs_batch)[0]) for _ in range(pairs + 2)][2:]
        ratios = sorted(a / b for a, b in timed)
        quarter = len(ratios) // 4
        parameters = sum(p.numel() for p in ours.model.parameters())
        mine, reference = (1e3 * statistics.median(side) for side in zip(*timed, strict=True))
        print(
            f"{parameters / 1e6:5.2f}M parameters, 8 x {length} tokens: CPPO {mine:7.2f} ms, "
            f"GRPO {reference:7.2f} ms, ratio {statistics.median(ratios):.3f} "
            f"(middle half {ratios[quarter]:.3f} to {ratios[-quarter - 1]:.3f}); gradients agree to {error:.0e}"
        )


if __name__ == "__main__":
    main()
