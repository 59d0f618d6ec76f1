"""A launch's file as settings, and whose launch it is."""

from __future__ import annotations

import dataclasses
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

KNOWN = (
    "a .yaml file (verl's, SkyRL's, rLLM's or NeMo-RL's configuration, slime's --custom-config-path file, or the "
    "fields of trl.GRPOConfig), a .toml file of prime-rl, or a launch command of verl, SkyRL, rLLM "
    "(actor_rollout_ref....=..., trainer.algorithm....=..., rllm....=...) or slime (--loss-type ...)"
)
_SLIME = ("custom_loss_function_path", "custom_config_path", "cppo_method")


@dataclasses.dataclass(frozen=True)
class Launch:
    """Settings as nested dicts, and the stack that they belong to."""

    stack: str
    settings: dict[str, Any]


def read(path: Path) -> Launch:
    """Return a launch.

    Raises:
        ValueError: if the file cannot be read, or belongs to no stack that is known.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: cannot be read: {error}") from None
    parse = {".yaml": parse_yaml, ".yml": parse_yaml, ".toml": _parse_toml}.get(path.suffix, _parse_command)
    try:
        settings = parse(text)
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None
    stack = next((stack for stack, belongs in _STACKS.items() if belongs(settings)), None)
    if stack is None and path.suffix in (".yaml", ".yml"):
        stack = "trl"  # its settings have no groups to be known by
    elif stack is None and "loss_type" in settings:  # which TRL has too, but in no command
        stack = "slime"
    if stack is None:
        raise ValueError(f"--config {path}: expected {KNOWN}")
    return Launch(stack, settings)


def at(settings: Any, key: str, default: Any = None) -> Any:
    """Return the setting under a dotted key."""
    for part in key.split("."):
        if not isinstance(settings, Mapping) or part not in settings:
            return default
        settings = settings[part]
    return settings


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of settings without groups of their own."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# In this order: rLLM's configuration on verl has verl's groups too, and slime's flags have none.
_STACKS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "slime": lambda settings: any(name in settings for name in _SLIME),
    "rllm": lambda settings: (
        "rllm" in settings
        or any(at(settings, f"algorithm.{key}") is not None for key in ("loss_fn", "loss_params", "loss_plugins"))
    ),
    "verl": lambda settings: "actor_rollout_ref" in settings,
    "nemo-rl": lambda settings: "grpo" in settings and "policy" in settings,
    "skyrl": lambda settings: (
        at(settings, "generator.sampling_params") is not None
        or any(at(settings, f"trainer.{key}") is not None for key in ("algorithm", "override_entrypoint"))
    ),
    "prime-rl": lambda settings: (
        any(key in settings for key in ("orchestrator", "loss"))
        or at(settings, "trainer.loss") is not None
        or at(settings, "train.sampling") is not None
    ),
}


def parse_yaml(text: str) -> dict[str, Any]:
    """Return a YAML file's settings.

    Raises:
        ValueError: if it is no YAML, or has no settings.
    """
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected settings (name: value), got {type(content).__name__}")
    return content


def _parse_toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"cannot be read as TOML: {error}") from None


def _parse_command(text: str) -> dict[str, Any]:
    """Return the settings of a command, or of a script that holds one: a.b=c, --a-b c, --a-b=c."""
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise ValueError(f"cannot be read as a command: {error}") from None
    settings: dict[str, Any] = {}
    flag: str | None = None
    for raw in words:
        word = raw if "(" in raw else raw.rstrip(")")  # the end of a shell's array
        if word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            flag = name.replace("-", "_")
            settings[flag] = _value(value) if sign else True
            flag = None if sign else flag
            continue
        if flag is not None:
            settings[flag] = _value(word)
            flag = None
            continue
        key, sign, value = word.lstrip("+").partition("=")
        if sign and ("." in key or "/" in key):
            _put(settings, key, _value(value))
        elif ".".join(word.split("/")).startswith("verl.experimental"):
            # Known to verl's adapter by a group that these trainers' configurations have.
            settings.setdefault("async_training", {})
    return settings


def _put(settings: dict[str, Any], key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for group in groups:
        if not isinstance(settings.get(group), dict):
            settings[group] = {}
        settings = settings[group]
    settings[name] = value


def _value(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError:  # a shell's or hydra's way of writing, which says nothing about a value's type
        return text
