"""A CPPO update against a GRPO update in TRL, and a top-K divergence against the binary one: one process.

    python benchmarks/trl_step.py

Two trainers take turns at micro-steps on one batch: TRL's own ``GRPOTrainer`` (dapo loss, clip 0.2 / 0.28) and the
adapter with CPPO; then the adapter with top-20 TV and with binary TV. CPU time of the process, one thread; medians of
the pairwise ratios with their spread. Each pair's agreement comes first: with thresholds so wide that nothing is
clipped, all gradients are the same; where they are not, no ratio is printed. Peak memory is what a step takes beside
what stood before it, gradients included; it is read in a process of its own whose allocator gives freed memory back.

For a top-K divergence the rollout's scoring pass also finds the rollout policy's likeliest tokens: it is timed against
the same pass without.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
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

LETTERS = "0123456789=abcdefghijklmnopqrstuvwxyz"
IDEOGRAPHS = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))  # a large vocabulary: the head then costs what it does
PROMPTS = ("12=", "345=", "6789=", "abc=")


def make_trainer(kind, width, layers, length, alphabet, **method):
    tokenizer = build_char_tokenizer(alphabet)
    model = build_tiny_model(tokenizer, width=width, layers=layers, heads=width // 16)
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, per_device_train_batch_size=8, num_generations=4,
        steps_per_generation=4, max_completion_length=length, max_steps=10_000, top_k=0, epsilon=0.2, epsilon_high=0.28,
        gradient_checkpointing=False, report_to=[], logging_steps=1_000_000, save_strategy="no", disable_tqdm=True,
        learning_rate=1e-5, seed=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = kind(
            model, lambda completions, **_: [float(sum(map(ord, text)) % 97) for text in completions], config,
            Dataset.from_dict({"prompt": list(PROMPTS) * 8}), processing_class=tokenizer, **method,
        )  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def resident_mib(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(kind))


def micro_step(trainer, batch):
    """Return the CPU seconds and the gradient of one micro-batch."""
    start = time.process_time()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    elapsed = time.process_time() - start
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    trainer.model.zero_grad()
    return elapsed, gradient


def peak_mib(trainer, batch):
    micro_step(trainer, batch)
    gc.collect()
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = resident_mib("VmRSS")
    trainer._compute_loss(trainer.model, batch).backward()
    peak = resident_mib("VmHWM") - before
    trainer.model.zero_grad()
    return peak


def unclipped_gradient(trainer, batch):
    method = getattr(trainer, "method", None)
    if method is not None:
        trainer.method = cppo.CPPO(delta=100.0, budget="none", divergence=method.divergence)
        trainer._tallies.clear()
    gradient = micro_step(trainer, batch)[1]
    if method is not None:
        trainer.method = method
        trainer._tallies.clear()
    return gradient


def compare(label, ours, ours_batch, theirs, theirs_batch, pairs, part):
    expected, found = unclipped_gradient(theirs, theirs_batch), unclipped_gradient(ours, ours_batch)
    error = ((expected - found).norm() / expected.norm()).item()
    if not error < 1e-4:
        print(f"  {label}: WRONG: without clipping the gradients differ by {error:.1e}; no ratio")
        return
    if part == "peak":
        high, low = peak_mib(ours, ours_batch), peak_mib(theirs, theirs_batch)
        print(f"  {label}: peak {high:.1f} MiB against {low:.1f}", flush=True)
        return
    timed = [(micro_step(ours, ours_batch)[0], micro_step(theirs, theirs_batch)[0]) for _ in range(pairs + 2)][2:]
    ratios = sorted(a / b for a, b in timed)
    quarter = len(ratios) // 4
    mine, reference = (1e3 * statistics.median(side) for side in zip(*timed, strict=True))
    print(
        f"  {label}: {mine:7.2f} ms against {reference:7.2f}, ratio {statistics.median(ratios):.3f} "
        f"(middle half {ratios[quarter]:.3f} to {ratios[-quarter - 1]:.3f}); gradients agree to {error:.0e}",
        flush=True,
    )


def scoring_seconds(trainer, batch, *, with_topk):
    """Return the CPU time of the pass that scores a rollout under the weights that sampled it."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        start = time.process_time()
        if with_topk:
            with trainer._meter.rollout([]):
                trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, batch["completion_ids"].shape[1])
        else:
            trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, batch["completion_ids"].shape[1])
        return time.process_time() - start


def measure(part, pairs):
    torch.set_num_threads(1)
    for width, layers, length, alphabet in ((64, 2, 64, LETTERS), (256, 4, 256, LETTERS), (256, 4, 128, IDEOGRAPHS)):
        shape = (width, layers, length, alphabet)
        theirs = make_trainer(GRPOTrainer, *shape)
        binary = make_trainer(CPPOTrainer, *shape, method=cppo.CPPO())
        topk = make_trainer(CPPOTrainer, *shape, method=cppo.CPPO(divergence="topk_tv"))
        rows = [{"prompt": prompt} for prompt in PROMPTS for _ in range(8)]
        batch = topk._generate_and_score_completions(rows)
        some = {key: value[:8] if value.ndim else value for key, value in batch.items()}
        # A little drift, the same for all, well inside every threshold.
        rollout = some["sampling_per_token_logps"] + 0.01 * torch.randn_like(some["sampling_per_token_logps"])
        ours_batch = some | {"sampling_per_token_logps": rollout}
        theirs_batch = {k: v for k, v in some.items() if k != "sampling_per_token_logps"}
        theirs_batch |= {"old_per_token_logps": rollout}
        parameters = sum(p.numel() for p in binary.model.parameters()) / 1e6
        print(f"{parameters:.2f}M parameters, vocabulary {len(alphabet) + 3}, 8 responses of up to {length} tokens")
        repeats = pairs if len(alphabet) < 1000 else max(pairs // 3, 5)
        compare("CPPO, binary TV, against GRPO", binary, ours_batch, theirs, theirs_batch, repeats, part)
        compare("CPPO, top-20 TV, against binary TV", topk, ours_batch, binary, ours_batch, repeats, part)
        if part == "time":
            timed = [[scoring_seconds(topk, batch, with_topk=flag) for flag in (True, False)] for _ in range(6)][1:]
            ratio = statistics.median(a / b for a, b in timed)
            print(f"  scoring a rollout with its top 20 against without: {ratio:.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--part", choices=["time", "peak"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        measure(options.part, options.pairs)
        return
    for part, environment in (
        ("time", {}),
        ("peak", {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}),
    ):
        command = [sys.executable, __file__, "--pairs", str(options.pairs), "--part", part]
        subprocess.run(command, env=os.environ | environment, check=True)


if __name__ == "__main__":
    main()
