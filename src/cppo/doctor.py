"""Is the installed stack giving the gradient we mean? Versions, a self-test of each stack, the traps of a launch."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shlex
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor

from cppo.methods import CPPO
from cppo.objective import decide, policy_loss

# What this package was tested with; below and above nobody has looked.
WINDOWS = {
    "torch": ">=2.6",
    "transformers": ">=5.2,<6",
    "trl": ">=1.10,<1.17",
    "verl": ">=0.9.1,<0.10",
    "vllm": None,
}
# verl asks for an older transformers than TRL does.
_WITH_VERL = {"transformers": "<5.11"}
# Thresholds so narrow that a little drift reaches them, so that the self-test sees the region act.
_METHOD = CPPO(delta=0.02, delta_b=0.002)
_TOLERANCE = 1e-4  # of the largest entry; float32

Status = Literal["ok", "absent", "warning", "failed"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``message`` says what was found and, unless all is well, what to do."""

    subject: str
    status: Status
    message: str


def examine(config: Path | None = None) -> Iterator[Finding]:
    """Look at the installed versions, run each installed stack's self-test, and read a launch, if one is given.

    Args:
        config: a YAML file (verl's composed configuration, or the fields of TRL's ``GRPOConfig``), or a file that
            holds a verl launch command.

    Yields:
        A :class:`Finding` at a time.

    Raises:
        ValueError: if ``config`` cannot be read, or is neither.
    """
    launch = None if config is None else _read(config)
    yield from _versions()
    for stack, test in _SELF_TESTS.items():
        if _version(stack) is not None:
            yield _self_test(stack, test)
    if config is not None and launch is not None:
        yield from _judge_launch(config.name, launch)


# ---------------------------------------------------------------- versions


def _version(package: str) -> str | None:
    try:  # not whether it can be imported: a folder of that name can be too
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    has_verl = _version("verl") is not None
    for package, window in WINDOWS.items():
        version = _version(package)
        if version is None:
            yield Finding(package, "absent", "not installed")
            continue
        wanted = _WITH_VERL.get(package, window) if has_verl else window
        if wanted is None:
            yield Finding(package, "warning", f"{version}: never run by this package's tests")
        elif SpecifierSet(wanted).contains(version, prereleases=True):
            yield Finding(package, "ok", f"{version}, tested window {wanted}")
        else:
            yield Finding(package, "failed", f"{version}: expected {wanted}, with which this package was tested")


# ---------------------------------------------------------------- self-tests


def _self_test(stack: str, test: Callable[[], tuple[Tensor, Tensor, float]]) -> Finding:
    """Compare the gradient of one step through the stack's real code with the closed form."""
    subject = f"{stack}: gradient of one step"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, expected, masked = test()
    except Exception as error:  # noqa: BLE001  whatever a drifted framework raises is the finding
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        return Finding(subject, "failed", f"the self-test could not run: {type(error).__name__}: {reason}")
    distance = ((found - expected).abs().max() / expected.abs().max()).item()
    if not distance < _TOLERANCE:
        return Finding(
            subject, "failed",
            f"differs from the closed form by {distance:.1e} of its largest entry (expected < {_TOLERANCE:.0e}): "
            f"this {stack} does something else with the loss; use a version in the tested window",
        )  # fmt: skip
    if not 0 < masked < 1:
        return Finding(
            subject, "failed", f"the trust region masked {masked:.0%} of the tokens; expected some and not all"
        )
    return Finding(subject, "ok", f"equals the closed form to {distance:.0e}, with {masked:.0%} of the tokens masked")


def _trl_step() -> tuple[Tensor, Tensor, float]:
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
            model, reward, config, Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer, method=_METHOD
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
    decision = decide(_METHOD, logp, batch["sampling_per_token_logps"], batch["advantages"], mask)
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


def _verl_step() -> tuple[Tensor, Tensor, float]:
    from verl.utils import tensordict_utils
    from verl.workers.config import ActorConfig
    from verl.workers.utils.losses import ppo_loss

    from cppo.adapters.verl import TrustRegionLoss

    generator = torch.Generator().manual_seed(0)
    lengths, prompt = [9, 1, 6, 12], 2
    rollout = torch.nn.functional.logsigmoid(torch.randn(4, 12, generator=generator))
    logp = (rollout + 0.1 * torch.randn(4, 12, generator=generator)).clamp(max=0)
    advantages = torch.randn(4, 1, generator=generator).expand(4, 12)
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    mask[3, 4:6] = False  # a tool's output

    def jagged(values: Tensor, before: int = 0, after: int = 0) -> Tensor:
        rows = [torch.nn.functional.pad(r[:n], (before, after)) for r, n in zip(values, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    # The model's output at a position is the log-prob of the next token.
    outputs = jagged(logp, before=prompt - 1, after=1).requires_grad_()
    data = tensordict_utils.get_tensordict(
        {
            "prompts": torch.nested.as_nested_tensor([torch.zeros(prompt)] * 4, layout=torch.jagged),
            "responses": jagged(torch.zeros(4, 12)),
            "response_mask": jagged(mask.long()),
            "old_log_probs": jagged(rollout),
            "advantages": jagged(advantages),
        },
        {"dp_size": 1, "batch_num_tokens": int(mask.sum()), "global_batch_size": 4},
    )
    region = TrustRegionLoss(delta=_METHOD.delta, delta_b=_METHOD.delta_b)
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=region)
    ppo_loss(config, {"log_probs": outputs}, data)[0].backward()
    found = torch.cat([row[prompt - 1 : -1] for row in outputs.grad.unbind()])  # type: ignore[union-attr]
    leaf = logp.clone().requires_grad_()
    out = policy_loss(_METHOD, leaf, rollout, advantages, mask)
    out.loss.backward()
    expected = torch.cat([row[:n] for row, n in zip(leaf.grad, lengths, strict=True)])  # type: ignore[arg-type]
    return found, expected, out.metrics["gate/masked_fraction"].item()


_SELF_TESTS = {"trl": _trl_step, "verl": _verl_step}


# ---------------------------------------------------------------- launches


def _read(path: Path) -> dict[str, Any]:
    """Return a launch's settings as nested dicts."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: cannot be read: {error}") from None
    if path.suffix in (".yaml", ".yml"):
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--config {path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise ValueError(f"--config {path}: expected settings (name: value), got {type(content).__name__}")
        return content
    settings: dict[str, Any] = {}
    for word in shlex.split(text.replace("\\\n", " "), comments=True):
        key, sign, value = word.lstrip("+").partition("=")
        if not sign or "." not in key:
            continue
        *groups, name = key.split(".")
        place = settings
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = yaml.safe_load(value) if value else ""
    if "actor_rollout_ref" not in settings:
        raise ValueError(
            f"--config {path}: expected a verl launch command (actor_rollout_ref....=...), or a .yaml file"
        )
    return settings


def _judge_launch(name: str, launch: Mapping[str, Any]) -> Iterator[Finding]:
    stack, problems = ("verl", _verl_problems) if "actor_rollout_ref" in launch else ("trl", _trl_problems)
    if _version(stack) is None:
        yield Finding(name, "failed", f"a {stack} launch, but {stack} is not installed here; run doctor where it is")
        return
    found = problems(launch)
    yield from (Finding(name, "failed", problem) for problem in found)
    if not found:
        yield Finding(name, "ok", f"a {stack} launch without known traps")


def _verl_problems(launch: Mapping[str, Any]) -> list[str]:
    from cppo.adapters.verl import launch_problems

    return launch_problems(launch)


def _trl_problems(launch: Mapping[str, Any]) -> list[str]:
    from trl.trainer.grpo_config import GRPOConfig

    from cppo.adapters.trl import check_config

    known = {field.name for field in dataclasses.fields(GRPOConfig)}
    unknown = sorted(set(launch) - known)
    if unknown:
        return [
            f"unknown settings {', '.join(unknown)}: expected the fields of trl.GRPOConfig, or verl's configuration"
        ]
    try:
        settings: dict[str, Any] = {"output_dir": "doctor", "use_cpu": True, "bf16": False} | dict(launch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TRL's and transformers' notices about each other
            config = GRPOConfig(**settings)
        check_config(config, CPPO(), engine_log_probs=bool(config.use_vllm))
    except (TypeError, ValueError) as error:
        return [str(error)]
    return []
