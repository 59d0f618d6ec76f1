"""A training run's settings: everything that is needed to run it again."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import yaml

from cppo.methods import needed_inputs, parse_method, takes_topk
from cppo.specs import parse_spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of one run. The defaults are the demo: a tiny model, the running sum, CPPO, sixteen updates a rollout.

    Args:
        task: as ``make_task`` takes it, such as ``running_sum`` or ``reasoning_gym:chain_sum?min_terms=2``.
        model: "tiny" (built in process and warm-started on the task's demonstrator), also with its layers, width and
            heads, such as ``tiny?layers=4&width=144&heads=6``; a folder; or a hub id.
        gguf_file: the file inside ``model`` if that is a folder with a GGUF checkpoint.
        method: as ``parse_method`` takes it.
        divergence_top_k: K of a method whose divergence is top-K.
        beside: further methods to run from the same start with the same problems, for comparison.
        seed: of the model, the warm start, the problems and the sampling.
        rollouts: rollout batches.
        prompts: problems a rollout.
        generations: responses a problem (the group whose rewards are normalised).
        minibatch: responses an optimizer update.
        gradient_accumulation: micro-batches an update; must divide ``minibatch``.
        epochs: passes over each rollout batch.
        learning_rate: AdamW's highest.
        schedule: "constant" or "linear": from ``learning_rate`` to 0 at the last update.
        warmup: updates over which the learning rate rises to ``learning_rate``.
        temperature: of sampling, in the rollouts and the evaluation.
        sampler_noise: standard deviation of Gaussian noise on the sampler's logits, as if the sampling engine's
            numerics differed from the trainer's; 0: the trainer's own policy samples.
        max_completion_tokens: None: the task's.
        skip_zero_variance: leave responses of groups with equal rewards out of the loss and of its denominator.
        certificate: log what each update's batch says of the policy-improvement bound, ``bound/*`` (docs/theory.md).
        eval_problems: held-out problems an evaluation.
        eval_samples: samples a held-out problem.
        eval_every: rollouts between evaluations; the start and the end are always evaluated.
        checkpoint_every: rollouts between checkpoints.
        warm_start_steps: imitation steps of the tiny model.
        lora_rank: 0: train all weights; else LoRA adapters of that rank on the attention projections.
        report_to: trackers that TRL supports, such as "tensorboard" or "wandb".
        threads: of torch.
    """

    task: str = "running_sum"
    model: str = "tiny"
    gguf_file: str | None = None
    method: str = "cppo?ratio_cap=1"
    divergence_top_k: int = 20
    beside: tuple[str, ...] = ()
    seed: int = 0
    rollouts: int = 12
    prompts: int = 32
    generations: int = 8
    minibatch: int = 32
    gradient_accumulation: int = 1
    epochs: int = 2
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup: int = 0
    temperature: float = 1.0
    sampler_noise: float = 0.0
    max_completion_tokens: int | None = None
    skip_zero_variance: bool = True
    certificate: bool = False
    eval_problems: int = 512
    eval_samples: int = 1
    eval_every: int = 2
    checkpoint_every: int = 4
    warm_start_steps: int = 250
    lora_rank: int = 0
    report_to: tuple[str, ...] = ()
    threads: int = 1

    def __post_init__(self) -> None:
        self._check_texts()
        methods = (self.method, *self.beside)
        for method in methods:
            needed = needed_inputs(parse_method(method), topk=True)
            if needed:
                raise ValueError(
                    f"method={method!r}: expected one that needs no {' and no '.join(needed)}; the laboratory trains "
                    "through TRL, which gives what binary_tv, binary_kl, topk_tv and topk_kl take, no more"
                )
        if len(set(methods)) != len(methods):
            raise ValueError(
                f"beside={list(self.beside)}: expected methods that differ from each other and from "
                f"method={self.method!r}"
            )
        if isinstance(self.seed, int) and self.seed >= 2**32:
            raise ValueError(f"seed={self.seed}: expected an integer below 2^32")
        for name in ("rollouts", "prompts", "minibatch", "gradient_accumulation", "epochs", "eval_problems",
                     "eval_samples", "eval_every", "checkpoint_every", "threads", "divergence_top_k"):  # fmt: skip
            _check_integer(name, getattr(self, name), 1)
        _check_integer("generations", self.generations, 2)
        for name in ("seed", "warm_start_steps", "lora_rank", "warmup"):
            _check_integer(name, getattr(self, name), 0)
        if self.max_completion_tokens is not None:
            _check_integer("max_completion_tokens", self.max_completion_tokens, 1)
        for name in ("learning_rate", "temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                hint = "; YAML reads 1e-4 as text, 1.0e-4 as a number" if isinstance(value, str) else ""
                raise ValueError(f"{name}={value!r}: expected a number > 0{hint}")
        self._check_noise()
        self._check_schedule()
        if self.tiny:
            tiny_shape(self.model)

    def _check_schedule(self) -> None:
        if self.schedule not in ("constant", "linear"):
            raise ValueError(f"schedule={self.schedule!r}: expected 'constant' or 'linear'")
        if self.responses % self.minibatch:
            raise ValueError(
                f"minibatch={self.minibatch}: expected a divisor of prompts x generations = {self.responses}"
            )
        if self.minibatch % self.gradient_accumulation:
            raise ValueError(
                f"gradient_accumulation={self.gradient_accumulation}: expected a divisor of minibatch {self.minibatch}"
            )
        if self.updates == 1 and self.sampler_noise == 0:
            raise ValueError(
                f"minibatch={self.minibatch}, epochs={self.epochs}: expected more than one update a rollout; with one, "
                "the policy is the rollout policy and a trust region can never act"
            )

    def _check_noise(self) -> None:
        noise = self.sampler_noise
        if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise < math.inf:
            raise ValueError(f"sampler_noise={noise!r}: expected a number >= 0")
        if noise and any(takes_topk(parse_method(method)) for method in (self.method, *self.beside)):
            raise ValueError(
                f"sampler_noise={noise!r}: expected 0 with a top-K divergence; the noisy engine returns none"
            )

    def _check_texts(self) -> None:
        for name in ("task", "model", "method"):
            _check_text(name, getattr(self, name))
        for name in ("beside", "report_to"):
            value = getattr(self, name)
            if not isinstance(value, tuple):
                raise ValueError(f"{name}={value!r}: expected a list of texts")
            for item in value:
                _check_text(name, item)
        if self.gguf_file is not None:
            _check_text("gguf_file", self.gguf_file)
            if self.tiny:
                raise ValueError(f"gguf_file={self.gguf_file!r}: expected model to be the folder that holds it")
        for name in ("skip_zero_variance", "certificate"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected true or false")

    @property
    def tiny(self) -> bool:
        """Whether the model is built in process."""
        return self.model.partition("?")[0] == "tiny"

    @property
    def responses(self) -> int:
        """Responses a rollout."""
        return self.prompts * self.generations

    @property
    def updates(self) -> int:
        """Optimizer updates a rollout."""
        return self.responses // self.minibatch * self.epochs


def tiny_shape(model: str) -> dict[str, int]:
    """Return the ``layers``, ``width`` and ``heads`` that a ``tiny`` model's name gives, as keyword arguments."""
    _, options = parse_spec(model)
    for key, value in options.items():
        if key not in ("layers", "width", "heads"):
            raise ValueError(f"model={model!r}: {key!r} is no option of it; expected layers, width or heads")
        _check_integer(f"model={model!r}: {key}", value, 1)
    if options.get("width", 64) % (2 * options.get("heads", 4)):
        raise ValueError(f"model={model!r}: expected a width that is a multiple of twice the heads")
    return options


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}={value!r}: expected text")


def _check_integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}={value!r}: expected an integer >= {low}")


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds; a name that stands twice, of which YAML would keep the last, is refused.

    Raises:
        ValueError: naming the file and what is wrong.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None


def load_config(path: Path) -> RunConfig:
    """Read a YAML file of settings.

    Raises:
        ValueError: naming the file, and the setting that is unknown or wrong.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected settings (name: value), got {type(content).__name__}")
    content = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    content.pop("versions", None)
    known = {field.name for field in dataclasses.fields(RunConfig)}
    for key in content:
        if key not in known:
            raise ValueError(f"{path}: unknown setting {key!r}; expected some of {', '.join(sorted(known))}")
    try:
        return RunConfig(**content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def dump_config(config: RunConfig, versions: dict[str, str]) -> str:
    """Return the settings, and the versions they ran with, as YAML that :func:`load_config` reads."""
    content = {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }
    return yaml.safe_dump(content | {"versions": versions}, sort_keys=False)
