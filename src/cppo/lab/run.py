"""One training run, from a start to a better model, in a folder; resumable after any kind of end."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from trl.trainer.grpo_config import GRPOConfig

from cppo.lab.config import RunConfig, dump_config, tiny_shape
from cppo.lab.evaluation import Evaluation, evaluate
from cppo.lab.folder import RunFolder, read_json, read_metrics, write_whole
from cppo.lab.ledger import CpuLedger
from cppo.lab.model import build_char_tokenizer, build_tiny_model, check_pretrained, load_pretrained
from cppo.lab.noisy_engine import NoisyEngine
from cppo.lab.problems import SPLITS, Task, check_demonstrated
from cppo.lab.tasks import make_task
from cppo.lab.trainer import LabTrainer, TaskReward
from cppo.lab.warm_start import warm_start
from cppo.methods import parse_method

# What of TRL's log goes into metrics.jsonl, and under which name.
_TRL_METRICS = {
    "reward": "rollout/reward",
    "completions/mean_length": "rollout/length",
    "frac_reward_zero_std": "rollout/zero_variance_groups",
    "entropy": "policy/entropy",
    "grad_norm": "optimizer/gradient_norm",
}
# Of the tiny model at width 64; wider models take less.
_WARM_START_RATE = 5e-3
_OWN_GROUPS = ("gate/", "divergence/", "account/", "ratio/", "input/", "bound/")


class Observer(Protocol):
    """What a display hears of a run."""

    def phase(self, name: str, total: int | None = None) -> None:
        """A phase begins, of ``total`` steps if known."""

    def advance(self, row: dict[str, Any] | None = None) -> None:
        """One step is done; an optimizer update brings its metrics."""


class _Callback(TrainerCallback):
    """Evaluates after some rollouts, writes a line an update, marks checkpoints that are whole."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pending: dict[str, float] = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        run, updates = self._run, self._run.config.updates
        if state.global_step % updates == 0:
            run.flush_rows()
            rollout = state.global_step // updates
            if rollout % run.config.eval_every == 0 or rollout == run.config.rollouts:
                result = run.evaluate(kwargs["model"])
                self._pending = {"eval/accuracy": result.mean, "eval/length": result.length}
                if result.standard_error is not None:
                    self._pending["eval/standard_error"] = result.standard_error

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: object
    ) -> None:
        if not logs or "loss" not in logs:  # the summary that closes training
            return
        with self._run.ledger.phase("own"):
            row: dict[str, Any] = {"step": state.global_step}
            row |= {name: logs[key] for key, name in _TRL_METRICS.items() if logs.get(key) is not None}
            row |= {key: value for key, value in logs.items() if key.startswith(_OWN_GROUPS)}
            row |= self._pending
            self._pending = {}
            self._run.folder.append_metrics(row)
            self._run.observer.advance(row)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        write_whole(
            self._run.folder.checkpoints / f"checkpoint-{state.global_step}" / "cpu_seconds.json",
            json.dumps(self._run.ledger.seconds),
        )
        self._run.folder.mark_whole(state.global_step)


class Run:
    """One run of one method."""

    def __init__(self, config: RunConfig, folder: RunFolder, observer: Observer, start: Path | None = None) -> None:
        """Prepare a run.

        Args:
            config: its settings.
            folder: its folder.
            observer: hears of its progress.
            start: a folder with the warm-started model of a run with the same settings; None: make it.
        """
        self.config, self.folder, self.observer = config, folder, observer
        self.start = start or folder.checkpoints / "start"
        self.ledger = CpuLedger()
        self.task: Task = make_task(config.task)
        self._rows: list[dict[str, Any]] = []
        torch.set_num_threads(config.threads)

    def train(self) -> dict[str, Any]:
        """Train from the start or the last whole checkpoint to the end; return and write the summary."""
        config = self.config
        _, checkpoint = self.folder.rewind()
        model, tokenizer = self._load_start()
        self._tokenizer = tokenizer
        self._held_out = self.task.problems("test", config.eval_problems, config.seed)
        if checkpoint is None:
            first = self.evaluate(model)
            self.folder.append_metrics(
                {"step": 0, "eval/accuracy": first.mean, "eval/standard_error": first.standard_error}
            )
        else:
            self.ledger.seconds |= read_json(checkpoint / "cpu_seconds.json")
            if not read_metrics(self.folder.metrics):
                raise ValueError(f"{self.folder.metrics}: expected the metrics up to {checkpoint.name}, found none")
        problems = self.task.problems("train", config.prompts * config.rollouts, config.seed)
        reward = TaskReward(self.task, problems, int(tokenizer.eos_token_id), self.ledger)
        self.observer.phase("training", config.rollouts * config.updates)
        for row in read_metrics(self.folder.metrics):
            self.observer.advance(row)
        set_seed(config.seed)
        with warnings.catch_warnings():
            # Frameworks' notices about each other's coming versions; ours are raised as errors in the tests.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")  # the noisy engine is one
            trainer = LabTrainer(
                model,
                args=self._trl_config(),
                train_dataset=_dataset([problem.prompt for problem in problems]),
                processing_class=tokenizer,
                callbacks=[_Callback(self)],
                method=parse_method(config.method),
                divergence_top_k=config.divergence_top_k,
                peft_config=_lora(config.lora_rank),
                rollout_func=self._engine(),
                reward=reward,
                ledger=self.ledger,
                skip_zero_variance=config.skip_zero_variance,
                certificate=config.certificate,
                on_rows=self._rows.extend,
            )
            _only_our_display(trainer)
            if checkpoint:
                _check_checkpoint(checkpoint)
            with self.ledger.phase("updates"):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trained: Any = trainer.model
        if config.lora_rank:
            trained = trained.merge_and_unload()  # a model that loads by itself, wherever its base came from
        trained.save_pretrained(self.folder.checkpoints / "final")
        tokenizer.save_pretrained(self.folder.checkpoints / "final")
        return self._summarise()

    def evaluate(self, model: Any) -> Evaluation:
        """Return the held-out accuracy; the same problems and the same sampling seed every time."""
        config = self.config
        with self.ledger.phase("evaluation"):
            return evaluate(
                model, self._tokenizer, self.task, self._held_out, samples=config.eval_samples,
                temperature=config.temperature, max_tokens=self.max_completion_tokens, seed=config.seed,
            )  # fmt: skip

    @property
    def max_completion_tokens(self) -> int:
        """The longest response, end token included."""
        return self.config.max_completion_tokens or self.task.max_completion_tokens

    def _engine(self) -> NoisyEngine | None:
        config = self.config
        if config.sampler_noise == 0:
            return None
        return NoisyEngine(config.sampler_noise, config.temperature, self.max_completion_tokens)

    def flush_rows(self) -> None:
        """Write the rollout batch that has just been used up."""
        with self.ledger.phase("own"):
            if self._rows:
                self.folder.write_rollout(self._rows)
                self._rows.clear()

    def _load_start(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        config = self.config
        if not config.tiny:
            return load_pretrained(config.model, gguf_file=config.gguf_file)
        if not (self.start / "model.safetensors").is_file():
            with self.ledger.phase("warm start"):
                make_start(config, self.start, self.observer)
        return load_pretrained(str(self.start))

    def _trl_config(self) -> GRPOConfig:
        config = self.config
        return GRPOConfig(
            output_dir=str(self.folder.checkpoints),
            seed=config.seed,
            max_steps=config.rollouts * config.updates,
            per_device_train_batch_size=config.minibatch // config.gradient_accumulation,
            gradient_accumulation_steps=config.gradient_accumulation,
            steps_per_generation=config.responses // config.minibatch * config.gradient_accumulation,
            num_iterations=config.epochs,
            num_generations=config.generations,
            max_completion_length=self.max_completion_tokens,
            temperature=config.temperature,
            top_k=0,
            loss_type="dapo",
            learning_rate=config.learning_rate,
            lr_scheduler_type="linear" if config.schedule == "linear" else "constant_with_warmup",
            warmup_steps=config.warmup,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            shuffle_dataset=False,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="steps",
            save_steps=config.checkpoint_every * config.updates,
            save_total_limit=2,
            report_to=list(config.report_to),
            run_name=self.folder.path.name,
            disable_tqdm=True,
        )

    def _summarise(self) -> dict[str, Any]:
        """Everything under ``result`` is the same for the same settings on the same machine; ``cost`` is not."""
        config, rows = self.config, read_metrics(self.folder.metrics)
        evaluations = [[row["step"], row["eval/accuracy"]] for row in rows if "eval/accuracy" in row]
        updates = [row for row in rows if row["step"] > 0]

        def mean(name: str) -> float | None:
            values = [row[name] for row in updates if name in row]
            return sum(values) / len(values) if values else None

        seconds = self.ledger.seconds
        trained = sum(seconds.get(name, 0.0) for name in ("generation", "scoring", "updates", "own"))
        summary = {
            "run": self.folder.path.name,
            "method": config.method,
            "task": config.task,
            "result": {
                "start_accuracy": evaluations[0][1],
                "final_accuracy": evaluations[-1][1],
                "best_accuracy": max(accuracy for _, accuracy in evaluations),
                "standard_error": next(row["eval/standard_error"] for row in reversed(rows) if "eval/accuracy" in row),
                "evaluations": evaluations,
                "updates": len(updates),
                "masked_fraction": mean("gate/masked_fraction"),
                "budget_share": mean("gate/budget_share"),
                "probability_gap": mean("divergence/probability_gap"),
                "final_reward": next(
                    (row["rollout/reward"] for row in reversed(rows) if "rollout/reward" in row), None
                ),
            },
            "cost": {
                "cpu_seconds": {name: round(value, 3) for name, value in sorted(seconds.items())},
                "cpu_seconds_a_rollout": round(trained / config.rollouts, 3),
                "own_share": round(seconds.get("own", 0.0) / trained, 4) if trained else None,
            },
        }
        write_whole(self.folder.summary, json.dumps(summary, indent=2) + "\n")
        return summary


def make_start(config: RunConfig, path: Path, observer: Observer) -> None:
    """Build the tiny model of these settings, let it imitate the task's demonstrator, and write it to a new folder."""
    task = make_task(config.task)
    tokenizer = build_char_tokenizer(check_demonstrated(task))
    model = build_tiny_model(tokenizer, seed=config.seed, **tiny_shape(config.model))
    observer.phase("warm start", config.warm_start_steps)
    if config.warm_start_steps:
        warm_start(
            model, tokenizer, task, steps=config.warm_start_steps, seed=config.seed,
            learning_rate=_WARM_START_RATE * min(1.0, 64 / model.config.hidden_size),
            on_step=lambda *_: observer.advance(),
        )  # fmt: skip
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.chmod(0o755)
    shutil.rmtree(path, ignore_errors=True)  # what another process did not finish
    os.replace(temporary, path)


def start_run(config: RunConfig, path: Path) -> RunFolder:
    """Make the folder of a new run, after everything that can be checked was checked."""
    task = make_task(config.task)
    for split in SPLITS:
        task.problems(split, 1, config.seed)  # a task without problems of one kind says so
    _check_trackers(config.report_to)
    if config.tiny:
        check_demonstrated(task)
    else:
        check_pretrained(config.model, config.gguf_file)
    return RunFolder.create(path, dump_config(config, versions()))


def _check_trackers(names: tuple[str, ...]) -> None:
    for name in names:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()  # one that is not installed says so when it is made
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(f"report_to={name!r}: expected a tracker that is known and installed; {error}") from error


def beside_config(config: RunConfig, method: str) -> RunConfig:
    """Return the settings of the run beside: the same but for the method."""
    return dataclasses.replace(config, method=method, beside=())


def _check_checkpoint(path: Path) -> None:
    """Raise ValueError, naming the file, unless the tensors of a checkpoint can be read."""
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except Exception as error:  # noqa: BLE001  the format's own error class is private
            raise ValueError(f"{file}: cannot be read ({error}); remove {path} to resume from an earlier one") from None
    try:
        torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  errors of many kinds, one for each way to be broken
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{path / 'optimizer.pt'}: cannot be read ({reason}); remove {path} to resume from an earlier one"
        ) from None


def _dataset(prompts: list[str]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": prompts, "problem": list(range(len(prompts)))})


def _lora(rank: int) -> Any:
    if rank == 0:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


def _only_our_display(trainer: LabTrainer) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def versions() -> dict[str, str]:
    """Return the versions that a run's numbers hang on, and the processor, whose kind decides how sums are rounded."""
    names = ("cppo", "torch", "trl", "transformers", "datasets", "reasoning-gym", "math-verify")
    return {name: importlib.metadata.version(name) for name in names} | {"processor": _processor()}


def _processor() -> str:
    """Return the processor's name, family, model and stepping where Linux tells, and what instructions torch uses."""
    told: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            told.setdefault(name.strip(), value.strip())
    known = [told[name] for name in ("model name", "cpu family", "model", "stepping") if told.get(name)]
    return " ".join([*(known or [platform.machine()]), torch.backends.cpu.get_cpu_capability()])
