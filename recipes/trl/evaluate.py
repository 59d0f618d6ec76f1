"""Avg@16 of a checkpoint on AIME 2024, 2025 and 2026, sampled by vLLM at temperature 0.7 and top-p 0.95.

python recipes/trl/evaluate.py runs/qwen3-1.7b-base-cppo/checkpoint-100 --data data
"""
# ruff: noqa: T201  a script prints

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets import load_dataset
from scoring import score

SETS = ("aime24", "aime25", "aime26")


def main(arguments: Sequence[str] | None = None) -> float:
    """Print each set's Avg@n and their unweighted mean; return the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint's folder, or a hub id")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder that recipes/data.py wrote")
    parser.add_argument("--samples", type=int, default=16, help="a problem")
    parser.add_argument("--max_tokens", type=int, default=8192, help="of a response")
    parser.add_argument("--tensor_parallel_size", type=int, default=1, help="vLLM's")
    given = parser.parse_args(arguments)
    files = {name: given.data / f"{name}.parquet" for name in SETS}
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        sys.exit(f"evaluate.py: --data {given.data}: expected {', '.join(missing)}; recipes/data.py writes them")

    from vllm import LLM, SamplingParams

    engine = LLM(
        model=given.model, max_model_len=given.max_tokens + 2048, tensor_parallel_size=given.tensor_parallel_size
    )
    how = SamplingParams(n=given.samples, temperature=0.7, top_p=0.95, top_k=-1, max_tokens=given.max_tokens, seed=0)
    means = []
    for name, file in files.items():
        rows = load_dataset("parquet", data_files=str(file), split="train")
        answers = [row["ground_truth"] for row in rows["reward_model"]]
        outputs = engine.chat(list(rows["prompt"]), how)
        means.append(
            statistics.fmean(
                score(answer, sample.text)
                for answer, output in zip(answers, outputs, strict=True)
                for sample in output.outputs
            )
        )
        print(f"{name} Avg@{given.samples}: {means[-1]:.2%} ({len(answers)} problems)")
    print(f"mean: {statistics.fmean(means):.2%}")
    return statistics.fmean(means)


if __name__ == "__main__":
    main()
