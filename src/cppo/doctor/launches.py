"""The traps of a launch: each stack's, as far as its settings show them, by the adapter's own checks."""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cppo.methods import CPPO

from .finding import Finding
from .reading import KNOWN, Launch, at, flat, parse_yaml
from .steps.prime_rl import IMPORT_PATH
from .versions import installed

Settings = Mapping[str, Any]
_TRUNCATED = "the sampler would not be the policy whose ratio is taken"
# What truncates a sampler -> the values that do not.
_WHOLE: dict[str, tuple[Any, ...]] = {"top_p": (None, 1), "top_k": (None, -1, 0), "min_p": (None, 0)}

# What a stack's settings do not show.
_UNSEEN = {"nemo-rl": "; whether its driver wraps the loss in cppo.adapters.nemo_rl.TrustRegionLoss, it does not show"}


def judge(path: Path, launch: Launch) -> Iterator[Finding]:
    """Yield what is wrong with a launch, or that nothing is."""
    stack, name = launch.stack, path.name
    needs_it, problems = _JUDGES[stack]
    if needs_it and installed(stack) is None:
        yield Finding(name, "failed", f"a {stack} launch, but {stack} is not installed here; run doctor where it is")
        return
    if stack == "slime":
        given = dict(launch.settings)
        custom = given.get("custom_config_path")
        if custom is not None:
            try:
                given |= parse_yaml(_beside(path, str(custom)).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                yield Finding(name, "failed", f"custom_config_path={custom!r}: cannot be read: {error}")
                return
        launch = Launch(stack, given)
    try:
        found = list(problems(launch.settings))
    except ImportError as error:
        found = [f"a {stack} launch, which cannot be judged here: {type(error).__name__}: {error}"]
    yield from (Finding(name, "failed", problem) for problem in found)
    if not found:
        yield Finding(name, "ok", f"a {stack} launch without known traps{_UNSEEN.get(stack, '')}")


def _beside(path: Path, other: str) -> Path:
    """Return a file that a launch names: as named, or else beside the launch."""
    return Path(other) if Path(other).is_file() else path.parent / other


def _truncation(settings: Settings, place: str) -> Iterator[str]:
    for name, whole in _WHOLE.items():
        value = at(settings, f"{place}.{name}")
        if value not in whole:
            yield f"{place}.{name}={value!r}: expected {whole[1]}; {_TRUNCATED}"


def _refusal(check: Callable[[], Any], prefix: str = "") -> Iterator[str]:
    """Yield what the adapter says, if it refuses."""
    try:
        check()
    except (TypeError, ValueError) as error:
        yield f"{prefix}{' '.join(str(error).split())}"


def _verl(launch: Settings) -> Iterator[str]:
    from cppo.adapters.verl import launch_problems

    yield from launch_problems(launch)


def _trl(launch: Settings) -> Iterator[str]:
    from trl.trainer.grpo_config import GRPOConfig

    from cppo.adapters.trl import check_config

    known = {field.name for field in dataclasses.fields(GRPOConfig)}
    unknown = sorted(map(str, set(launch) - known))
    if unknown:
        yield f"unknown settings {', '.join(unknown)}: expected {KNOWN}"
        return
    settings: dict[str, Any] = {"output_dir": "doctor", "use_cpu": True, "bf16": False} | dict(launch)

    def check() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TRL's and transformers' notices about each other
            config = GRPOConfig(**settings)
        check_config(config, CPPO(), engine_log_probs=bool(config.use_vllm))

    yield from _refusal(check)


def _prime_rl(launch: Settings) -> Iterator[str]:
    from cppo.adapters.prime_rl import check

    place = "loss" if "loss" in launch else "trainer.loss"
    if at(launch, place) is not None or "trainer" in launch or "train" not in launch:  # else the orchestrator's file
        for key, expected in (("type", "custom"), ("import_path", IMPORT_PATH)):
            value = at(launch, f"{place}.{key}")
            if value != expected:
                yield f"{place}.{key}={value!r}: expected {expected!r}; else another loss runs"
        kwargs = at(launch, f"{place}.kwargs", {})
        yield from _refusal(lambda: check(**kwargs), f"{place}.kwargs: ")
    train = "train" if "train" in launch else "orchestrator.train"
    yield from _truncations(launch, f"{train}.sampling")
    sources = at(launch, f"{train}.source", [])
    for index, source in enumerate(sources if isinstance(sources, list) else []):
        yield from (f"{train}.source[{index}].{problem}" for problem in _truncations(source, "sampling"))


def _truncations(settings: Settings, place: str) -> Iterator[str]:
    for group in (place, f"{place}.extra_body"):
        yield from _truncation(settings, group)


def _rllm(launch: Settings) -> Iterator[str]:
    from cppo.adapters.rllm import build_method

    root = "rllm." if "rllm" in launch else ""
    algorithm: Settings = at(launch, f"{root}algorithm", {})
    backend = at(launch, "rllm/backend", "verl" if "actor_rollout_ref" in launch else None)
    name = algorithm.get("loss_fn")
    if backend == "miles":
        yield "rllm/backend='miles': expected verl, tinker or fireworks; miles has no registered losses"
    if name == "cppo" and backend in ("verl", None):
        yield (
            f"{root}algorithm.loss_fn='cppo': expected 'trust_region'; on verl cppo is the loss that this package "
            "registers there, which loss_params do not reach"
        )
    elif name not in ("trust_region", "cppo"):
        yield f"{root}algorithm.loss_fn={name!r}: expected 'trust_region'; else another loss runs"
    params = dict(algorithm.get("loss_params") or {})
    beta = {"kl_beta": algorithm["kl_beta"]} if algorithm.get("kl_beta") else {}
    yield from _refusal(lambda: build_method(beta | params))
    if "cppo.adapters.rllm" not in list(algorithm.get("loss_plugins") or []):
        yield (
            f"{root}algorithm.loss_plugins={algorithm.get('loss_plugins')!r}: expected [cppo.adapters.rllm]; without "
            "it rLLM goes on with its backend's default loss where the adapter cannot be loaded"
        )
    logprobs = "actor_rollout_ref.rollout.calculate_log_probs"
    if at(launch, logprobs, True) is not True:
        yield f"{logprobs}={at(launch, logprobs)!r}: expected True; they are the sampler's"
    yield from _truncation(launch, f"{root}rollout.train")
    yield from _truncation(launch, "actor_rollout_ref.rollout")


def _slime(launch: Settings) -> Iterator[str]:
    from cppo.adapters.slime import build_method, check

    # slime's file alone: the method, and nothing of the command.
    whole = any(name in launch for name in ("loss_type", "custom_loss_function_path", "custom_config_path"))
    arguments = types.SimpleNamespace(**launch)
    yield from _refusal(lambda: (check if whole else build_method)(arguments))
    if whole and not launch.get("use_rollout_logprobs"):
        yield "use_rollout_logprobs=False: expected True; else slime recomputes log-probs that nobody reads"


def _skyrl(launch: Settings) -> Iterator[str]:
    entry, expected = at(launch, "trainer.override_entrypoint"), "cppo.adapters.skyrl"
    if entry is None:
        yield (
            f"trainer.override_entrypoint=None: expected {expected}; else SkyRL does not know the loss (an entrypoint "
            "of your own that calls cppo.adapters.skyrl.register can be named there too)"
        )
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
    from skyrl.train.config import SkyRLTrainConfig

    from cppo.adapters.skyrl import register

    given = {key: value for key, value in flat(launch) if key.startswith(("trainer.", "generator."))}
    given.pop("trainer.override_entrypoint", None)

    def check() -> None:
        config = SkyRLTrainConfig.from_cli_overrides(given)
        name = config.trainer.algorithm.policy_loss_type
        PolicyLossRegistry.repopulate_registry()  # SkyRL's own keep their names
        taken = name in PolicyLossRegistry.list_available()
        try:
            # An entrypoint of one's own gives a name what meaning it likes.
            register(name if entry in (None, expected) else CPPO(), config, name=name)
        finally:
            if not taken and name in PolicyLossRegistry.list_available():
                PolicyLossRegistry.unregister(name)

    yield from _refusal(check)


def _nemo_rl(launch: Settings) -> Iterator[str]:
    from cppo.adapters.nemo_rl import _UNUSED

    for name, expected in _UNUSED.items():
        value = at(launch, f"loss_fn.{name}", expected)
        if value != expected:
            yield f"loss_fn.{name}={value!r}: expected {expected!r}; cppo.adapters.nemo_rl does not apply it"
    yield from _truncation(launch, "policy.generation")


# stack -> (whether it must be installed for that, what yields the problems)
_JUDGES: dict[str, tuple[bool, Callable[[Settings], Iterator[str]]]] = {
    "verl": (True, _verl),
    "trl": (True, _trl),
    "skyrl": (True, _skyrl),
    "rllm": (True, _rllm),
    "prime-rl": (False, _prime_rl),
    "slime": (False, _slime),
    "nemo-rl": (False, _nemo_rl),
}
