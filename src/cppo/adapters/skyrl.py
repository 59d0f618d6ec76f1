"""The trust regions of this package as policy losses of SkyRL, through its registry.

    trainer.override_entrypoint=cppo.adapters.skyrl                # arguments of skyrl.train.entrypoints.main_base
    trainer.algorithm.policy_loss_type='cppo?delta=0.15'

The loss is registered under the spec itself, so the knobs travel with its name. An entrypoint of one's own (another
generator, fully asynchronous training) calls :func:`register` before ``validate_cfg``. SkyRL pickles what is registered
and sends it to its workers, which import this module: the package must be installed there too.

SkyRL scales the advantages beforehand, by its ``loss_reduction``, and sums the loss: -k_t A_t a token, whose gradient
by logp_t is -k_t A_t, through SkyRL's own ``reduce_loss``.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from torch import Tensor

from cppo.methods import Method
from cppo.metrics import decision_metrics, to_floats
from cppo.objective import decide, token_losses

from .sampled_tokens import method_for


@dataclasses.dataclass(frozen=True)
class TrustRegionLoss:
    """A policy loss of SkyRL: -k_t A_t a token, summed; rejected tokens stay in SkyRL's denominators."""

    method: Method

    def __call__(
        self,
        log_probs: Tensor,
        trainer_logp: Tensor | None,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of one micro-batch and its metrics.

        Args:
            log_probs: ``[B, T]`` log pi(y_t), aligned right.
            trainer_logp: not used: the ratio is taken to the sampler.
            advantages: ``[B, T]``, already divided by SkyRL's denominator.
            config: SkyRL's ``AlgorithmConfig``.
            loss_mask: ``[B, T]``, 1 where the policy wrote the token.
            rollout_logprobs: ``[B, T]`` log mu(y_t).

        Raises:
            ValueError: without ``rollout_logprobs``, or with a correction that weighs tokens besides.
        """
        from skyrl.backends.skyrl_train.utils.ppo_utils import reduce_loss

        _check_algorithm(config)
        if rollout_logprobs is None:
            raise ValueError(f"rollout_logprobs: expected the sampler's log-probs, got None; set {_LOGPROBS}=1")
        decision = decide(self.method, log_probs, rollout_logprobs, advantages, loss_mask)
        metrics = decision_metrics(decision)
        metrics.pop("input/first_nonfinite")
        # SkyRL reduces over micro-batches by the name's ending.
        metrics = {name.replace("/max", "_max"): value for name, value in metrics.items()}
        return reduce_loss(token_losses(decision, log_probs), loss_mask), to_floats(metrics)


def register(method: Method | str, config: Any = None, *, name: str | None = None, **knobs: Any) -> TrustRegionLoss:
    """Register a method as a policy loss, and return it; call it in the driver, before ``validate_cfg``.

    Args:
        method: a spec such as ``cppo?delta=0.15``, a method, or a name with its knobs beside it.
        config: SkyRL's ``SkyRLTrainConfig``, to have it checked now instead of in the first step.
        name: what ``trainer.algorithm.policy_loss_type`` calls it; None: ``method``, if that is a string.
        **knobs: the method's knobs, where ``method`` is a bare name.

    Raises:
        TypeError, ValueError: for an unknown method or knob, a name that is taken (SkyRL's own keep theirs: its workers
            would never ask for ours), or a configuration under which the loss would not act on the sampler's policy.
    """
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry

    loss = TrustRegionLoss(method_for("SkyRL", method, **knobs))
    name = method if name is None and isinstance(method, str) else name
    if not isinstance(name, str):
        raise TypeError(f"name: expected what policy_loss_type calls {method!r}, got {name!r}")
    if config is not None:
        _check_config(config, name)
    PolicyLossRegistry.register(name, loss)
    return loss


def main() -> None:
    """Train like SkyRL's ``main_base``, with the method that ``trainer.algorithm.policy_loss_type`` spells out."""
    from skyrl.train.config import SkyRLTrainConfig
    from skyrl.train.entrypoints import main_base

    # The argument that led here is no field of the configuration.
    given = [argument for argument in sys.argv[1:] if not argument.startswith("trainer.override_entrypoint=")]
    config = SkyRLTrainConfig.from_cli_overrides(given)
    register(config.trainer.algorithm.policy_loss_type, config)
    main_base.validate_cfg(config)
    main_base.initialize_ray(config)
    main_base.ray.get(main_base.skyrl_entrypoint.remote(config))


_LOGPROBS = "generator.sampling_params.logprobs"


def _check_algorithm(algorithm: Any) -> None:
    from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import off_policy_correction_enabled

    if getattr(algorithm, "use_tis", False) or off_policy_correction_enabled(algorithm.off_policy_correction):
        raise ValueError(
            "trainer.algorithm.off_policy_correction: expected none, because the ratio is taken to the sampler already"
        )


def _check_config(config: Any, name: str) -> None:
    algorithm, sampling = config.trainer.algorithm, config.generator.sampling_params
    _check_algorithm(algorithm)
    if algorithm.policy_loss_type != name:
        raise ValueError(f"trainer.algorithm.policy_loss_type={algorithm.policy_loss_type!r}: expected {name!r}")
    if sampling.logprobs is None:
        raise ValueError(f"{_LOGPROBS}=None: expected 1; they are the sampler's")
    for key, right in (("top_p", (1,)), ("top_k", (-1, 0)), ("min_p", (0,))):
        value = getattr(sampling, key)
        if value not in right:
            raise ValueError(
                f"generator.sampling_params.{key}={value!r}: expected {right[0]}; the sampler would not be the policy "
                "whose ratio is taken"
            )
