"""One setting of the paper in TRL: a GRPOConfig's YAML file, a model, and a trust region.

    accelerate launch --num_processes 8 recipes/trl/train.py --config recipes/trl/qwen3-1.7b-base.yaml
        --model Qwen/Qwen3-1.7B-Base --method 'cppo?divergence=topk_tv' --data data

Any field of GRPOConfig can follow and wins over the file.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from datasets import load_dataset
from scoring import score
from trl import GRPOConfig, TrlParser

from cppo.adapters.trl import TrustRegionTrainer
from cppo.methods import parse_method


@dataclasses.dataclass
class Recipe:
    """What a GRPOConfig does not hold."""

    model: str = dataclasses.field(metadata={"help": "A folder, or a hub id."})
    method: str = dataclasses.field(metadata={"help": "NAME?knob=value&knob=value; cppo methods lists published ones."})
    data: Path = dataclasses.field(default=Path("data"), metadata={"help": "The folder that recipes/data.py wrote."})
    minibatch: int = dataclasses.field(default=32, metadata={"help": "Prompts an optimizer update."})


def reward(completions: list[list[dict[str, str]]], reward_model: list[dict[str, str]], **_: Any) -> list[float]:
    """Score each completion against its row's ground truth."""
    return [score(row["ground_truth"], said[0]["content"]) for said, row in zip(completions, reward_model, strict=True)]


def check_minibatch(config: GRPOConfig, minibatch: int) -> None:
    """Refuse a batch per update that is not the recipe's on this number of processes.

    Raises:
        ValueError: with the settings that would make it so, where there are any.
    """
    together = config.per_device_train_batch_size * config.world_size
    responses, wanted = together * config.gradient_accumulation_steps, minibatch * config.num_generations
    if responses == wanted:
        return
    if wanted % together:
        advice = f"a per_device_train_batch_size that divides {wanted}, over {config.world_size} processes"
    else:
        steps = wanted // together
        generation = steps * config.steps_per_generation // config.gradient_accumulation_steps
        advice = f"--gradient_accumulation_steps {steps} --steps_per_generation {generation}"
    raise ValueError(
        f"gradient_accumulation_steps={config.gradient_accumulation_steps}: {responses} responses an update, with "
        f"{config.world_size} processes of {config.per_device_train_batch_size}; the recipe's are {wanted} "
        f"({minibatch} prompts of {config.num_generations}): expected {advice}"
    )


def main(arguments: list[str] | None = None) -> TrustRegionTrainer:
    """Train and return the trainer."""
    recipe, config = TrlParser((Recipe, GRPOConfig)).parse_args_and_config(arguments)
    method = parse_method(recipe.method)
    check_minibatch(config, recipe.minibatch)
    file = recipe.data / "train.parquet"
    if not file.is_file():
        raise ValueError(f"--data {recipe.data}: expected train.parquet in it; recipes/data.py writes it")
    if config.resume_from_checkpoint is None and any(Path(config.output_dir).glob("checkpoint-*")):
        raise ValueError(
            f"--output_dir {config.output_dir}: has checkpoints; expected a new folder, or --resume_from_checkpoint "
            "with the path of one"
        )
    prompts = load_dataset("parquet", data_files=str(file), split="train")
    trainer = TrustRegionTrainer(recipe.model, reward, config, prompts, method=method)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"train.py: {error}")
