"""The trust regions of this package as policy losses of verl, through its own registry.

    actor_rollout_ref.actor.policy_loss._target_=cppo.adapters.verl.TrustRegionLoss
    actor_rollout_ref.actor.policy_loss.loss_mode=cppo
    +actor_rollout_ref.actor.policy_loss.delta=0.15          # any knob of the method
    algorithm.rollout_correction.bypass_mode=True            # the ratio is taken to the sampler

Importing this module registers every method that verl does not have; verl imports it by itself where this package is
installed (entry point ``verl.plugins``), where a configuration names :class:`TrustRegionLoss`, and where
``VERL_USE_EXTERNAL_MODULES`` or ``external_lib`` name it. What verl calls the old log-probs is the sampler's in bypass
mode. The loss is -k_t A_t a token, whose gradient by logp_t is -k_t A_t, summed by verl's own ``agg_loss``.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from cppo.decision import Decision
from cppo.methods import METHODS, Method, make_method
from cppo.metrics import decision_metrics, to_floats
from cppo.objective import decide, token_losses

from .sampled_tokens import method_for
from .verl_rollout_log import log_in

try:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, register_policy_loss
    from verl.workers.config import PolicyLossConfig
except Exception as error:
    # verl tells of a plugin that cannot be loaded at debug level only; the run would end in "Unsupported loss mode".
    logging.getLogger(__name__).error("cppo.adapters.verl: cannot be loaded, no loss was registered: %r", error)
    raise

TESTED = "0.9"
_ENOUGH_TOKENS = 16  # so many equal log-probs are no chance
_DEFAULT = "default"  # of a field: the method's own. None is a value: "no bound" of a clip, "no criterion" of TRM
# Knobs of any method that verl can run, as fields of one configuration.
_KNOBS = sorted(
    {field.name for kind in METHODS.values() if not kind.summary.needs for field in dataclasses.fields(kind)}
)


def _check(self: Any) -> None:
    build_method(self)
    if self.rollout_log:
        log_in(self.rollout_log)


# One class for all methods, so that a launch command names one; a knob that its method does not have is refused.
TrustRegionLoss: Any = dataclasses.make_dataclass(
    "TrustRegionLoss",
    [
        ("loss_mode", str, dataclasses.field(default="cppo")),
        *((name, Any, _DEFAULT) for name in _KNOBS),
        ("same_numerics", bool, False),
        ("rollout_log", str | None, None),
    ],
    bases=(PolicyLossConfig,),
    namespace={
        "__post_init__": _check,
        "__doc__": """verl's ``PolicyLossConfig`` with the knobs of this package's methods; ``loss_mode`` names one.

        A knob that is not given has the method's default; null is a value, where the method takes None.
        ``same_numerics``: the sampler computes as the trainer does, bit for bit, so that equal log-probs are no sign of
        log-probs that the trainer recomputed. ``rollout_log``: a folder for the rollout log (docs/rollout-log.md), one
        that all workers reach.
        """,
        "__module__": __name__,
    },
)


def build_method(config: Any) -> Method:
    """Return the method that a policy-loss configuration describes.

    Args:
        config: a :class:`TrustRegionLoss`, or verl's own ``PolicyLossConfig``: the method with its default knobs.

    Raises:
        ValueError: for an unknown method, a knob that the method does not have or that is out of range, or a method
            that needs what verl does not keep.
    """
    name = config.loss_mode
    if name not in registered():  # one of verl's own would run with its own knobs, and these be ignored
        raise ValueError(f"policy_loss.loss_mode={name!r}: expected one of {', '.join(registered())}")
    knobs = {knob: getattr(config, knob, _DEFAULT) for knob in _KNOBS}
    return method_for("verl", name, **{knob: value for knob, value in knobs.items() if value != _DEFAULT})


def registered() -> list[str]:
    """Return the names under which this package's methods are registered."""
    return [name for name, loss in POLICY_LOSS_REGISTRY.items() if getattr(loss, "__module__", "") == __name__]


def _make_loss(name: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    def policy_loss(
        *,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of one micro-batch, whose rows are whole responses, and its metrics."""
        if rollout_is_weights is not None:
            raise ValueError(
                "rollout_is_weights: expected None, because the ratio is taken to the sampler already; set "
                "algorithm.rollout_correction.bypass_mode=True"
            )
        settings = getattr(config, "policy_loss", None)
        method = make_method(name) if settings is None else build_method(settings)
        decision = decide(method, log_prob, others["old_log_prob"], advantages, response_mask)
        loss = agg_loss(
            loss_mat=token_losses(decision, log_prob), loss_mask=response_mask, loss_agg_mode=loss_agg_mode,
            **(getattr(config, "global_batch_info", None) or {}),
        )  # fmt: skip
        metrics = _metrics(decision)
        if metrics.pop("actor/input/recomputed") and not getattr(settings, "same_numerics", False):
            raise ValueError(
                "old_log_prob: expected the sampler's log-probs, got the trainer's own (all equal log_prob): the trust "
                "region would never act; set algorithm.rollout_correction.bypass_mode=True, or, if the sampler "
                "computes as the trainer does, +actor_rollout_ref.actor.policy_loss.same_numerics=True"
            )
        folder = getattr(settings, "rollout_log", None)
        if folder:
            log_in(folder).add(decision, getattr(getattr(config, "model_config", None), "tokenizer", None))
        return loss, metrics

    policy_loss.__name__ = policy_loss.__qualname__ = f"policy_loss_{name}"
    return policy_loss


def _metrics(decision: Decision) -> dict[str, float]:
    found = decision_metrics(decision)
    found.pop("input/first_nonfinite")
    found["input/recomputed"] = _recomputed(decision)
    return to_floats(found, "actor/")


def _recomputed(decision: Decision) -> Tensor:
    """Return, 0-d, whether the anchor is the current policy's log-probs again: those of enough tokens, all equal."""
    batch = decision.batch
    # Where a token is certain, any two computations agree that its log-prob is 0.
    informative = batch.layout.mask & (batch.rollout_logp < -1e-3)
    differs = informative & (batch.rollout_logp != batch.logp)
    return (informative.sum() >= _ENOUGH_TOKENS) & ~differs.any()


def check_launch(config: Mapping[str, Any]) -> None:
    """Refuse a configuration of ``verl.trainer.main_ppo`` whose method would not act on the sampler's policy.

    Args:
        config: the composed configuration (an OmegaConf ``DictConfig``, or a dict of the same form); a key that is not
            there has verl's default.

    Raises:
        ValueError: naming the key, its value and what was expected.
    """
    for problem in launch_problems(config):
        raise ValueError(problem)


def launch_problems(config: Mapping[str, Any]) -> list[str]:
    """Return what :func:`check_launch` would refuse, all of it."""
    problems = []
    for key, default, right, expected, why in _LAUNCH:
        value = _at(config, key, default)
        if not right(value):
            problems.append(f"{key}={value!r}: expected {expected}; {why}")
    actor = "actor_rollout_ref.actor"
    settings = {"loss_mode": "vanilla"} | dict(_at(config, f"{actor}.policy_loss", {}))
    try:  # the method, its knobs and their ranges
        settings = TrustRegionLoss(
            **{name: value for name, value in settings.items() if name not in ("_target_", "rollout_log")}
        )
    except (TypeError, ValueError) as error:
        problems.append(f"{actor}: {error}")
    else:
        problems += _unread_clips(config, actor, settings)
    rollout = "actor_rollout_ref.rollout"
    mode = _at(config, f"{rollout}.logprobs_mode", "processed_logprobs")
    temperature = _at(config, f"{rollout}.temperature", 1.0)
    if mode != "processed_logprobs" and temperature != 1:
        problems.append(
            f"{rollout}.logprobs_mode={mode!r}: expected 'processed_logprobs' with temperature={temperature}; the "
            "log-probs would not be those of the policy that samples"
        )
    if any(_at(config, group, None) is not None for group in ("async_training", "rollout")):
        problems.append(
            "verl.experimental: expected verl.trainer.main_ppo (trainer.v1.trainer_mode for asynchronous runs); in "
            "bypass mode the experimental trainers write over loss_mode"
        )
    mini = _at(config, f"{actor}.ppo_mini_batch_size", 256)
    batch = _at(config, "data.train_batch_size", 1024)
    if batch == mini and _at(config, f"{actor}.ppo_epochs", 1) == 1:
        problems.append(
            f"{actor}.ppo_mini_batch_size={mini}: expected less than data.train_batch_size={batch}, or ppo_epochs "
            "above 1; with one update a rollout only the engines' mismatch moves the ratio, and a trust region never "
            "acts on drift"
        )
    return problems


def _unread_clips(config: Any, actor: str, settings: Any) -> list[str]:
    """Return which of verl's own clips are set, and differ from those of the method, which alone are read."""
    method, problems = build_method(settings), []
    for key, default, knob in (("clip_ratio_low", 0.2, "clip_low"), ("clip_ratio_high", 0.2, "clip_high")):
        value = _at(config, f"{actor}.{key}", default)
        own = getattr(method, knob, value)
        if value not in (default, own):
            problems.append(
                f"{actor}.{key}={value!r}: expected {own!r}, or verl's default; it is not read, the method's own "
                f"policy_loss.{knob} is"
            )
    return problems


_IGNORED = "in bypass mode verl leaves it out without a word; a mismatch is in the ratio already"
_TRUNCATED = "the sampler would not be the policy whose ratio is taken"
# key, verl's default, what is right, in words, why
_LAUNCH: list[tuple[str, Any, Callable[[Any], bool], str, str]] = [
    (
        "algorithm.rollout_correction.bypass_mode",
        False,
        bool,
        "True",
        "else the ratio and the divergence are taken to the trainer's recomputed policy",
    ),
    ("algorithm.rollout_correction.rollout_is", None, lambda value: value is None, "null", _IGNORED),
    ("algorithm.rollout_correction.rollout_rs", None, lambda value: value is None, "null", _IGNORED),
    ("actor_rollout_ref.rollout.calculate_log_probs", True, bool, "True", "they are the sampler's"),
    ("actor_rollout_ref.rollout.top_p", 1, lambda value: value == 1, "1", _TRUNCATED),
    ("actor_rollout_ref.rollout.top_k", -1, lambda value: value in (-1, 0), "-1", _TRUNCATED),
    ("trainer.use_v1", True, bool, "True", "in bypass mode the older trainer writes over loss_mode"),
]


def _at(config: Any, key: str, default: Any) -> Any:
    for part in key.split("."):
        try:
            config = config[part]
        except (KeyError, TypeError, AttributeError):
            return default
    return config


def _register() -> None:
    version = importlib.metadata.version("verl")
    if version.rpartition(".")[0] != TESTED:
        warnings.warn(f"verl {version}: this adapter was tested against {TESTED}.1", stacklevel=2)
    for name, kind in METHODS.items():
        # verl's own losses keep their names; a method that needs the rollout's entropy gets none here.
        if name not in POLICY_LOSS_REGISTRY and not kind.summary.needs:
            register_policy_loss(name)(_make_loss(name))


_register()
