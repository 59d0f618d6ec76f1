"""What enters the core: checked once, on shapes and dtypes only, so that nothing makes the host wait for the device."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .methods import CORRECTIONS, METHODS, SAMPLED_DIVERGENCES, Correction, GeometricMask, Method, needed_inputs
from .ops.context_parallel import ContextParallel
from .ops.gates import check_gate
from .ops.layout import Layout, PackedLayout, PaddedLayout
from .ops.masking import bit_mask, finite_bits, zero_outside_
from .ops.reduction import REDUCTIONS


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Checked, detached inputs in one floating dtype."""

    logp: Tensor  # token-shaped
    rollout_logp: Tensor  # token-shaped: mu, as the sampler computed it
    anchor_logp: Tensor  # token-shaped: what ratio and divergence are taken to: mu, or the proximal policy if corrected
    advantages: Tensor  # broadcasts against token-shaped; finite, 0 where they were not
    advantages_bits: Tensor  # like advantages: all bits one where it was finite
    divergence: Tensor | None  # token-shaped
    rollout_entropy: Tensor | None  # token-shaped
    corrections: tuple[Correction, ...]
    layout: Layout
    dtype: torch.dtype

    def tokens(self) -> Tokens:
        """Return the tokens that can be judged, and their log-ratios."""
        log_ratio = self.logp - self.anchor_logp
        log_mismatch = self.anchor_logp - self.rollout_logp if self.corrections else None
        others = [tensor for tensor in (self.divergence, self.rollout_entropy, log_mismatch) if tensor is not None]
        measurable = bit_mask(self.layout.mask, self.dtype)
        # On a CPU one sum tells whether there is anything to look for; elsewhere asking would stall the device.
        total = zero_outside_(log_ratio, measurable).sum()
        if total.device.type == "cpu" and not others and math.isfinite(total) and self.advantages_bits.all():
            return Tokens(measurable, measurable, log_ratio)
        measurable.bitwise_and_(finite_bits(log_ratio))
        for tensor in others:
            measurable.bitwise_and_(finite_bits(tensor))
        if log_mismatch is not None:
            zero_outside_(log_mismatch, measurable)
        # A policy drifts whether or not the advantage is a number: that enters the gate alone.
        bits = measurable & self.advantages_bits
        return Tokens(bits, measurable, zero_outside_(log_ratio, measurable), log_mismatch)

    def select(self, responses: slice, tokens: slice) -> Batch:
        """Return one block of the batch (see ``Layout.blocks``), as views."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[tokens]

        return Batch(
            logp=self.logp[tokens],
            rollout_logp=self.rollout_logp[tokens],
            anchor_logp=self.anchor_logp[tokens],
            advantages=self.advantages[tokens],
            advantages_bits=self.advantages_bits[tokens],
            divergence=part(self.divergence),
            rollout_entropy=part(self.rollout_entropy),
            corrections=self.corrections,
            layout=self.layout.select(responses, tokens),
            dtype=self.dtype,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """What can be judged of a batch: response tokens of which every number given is finite."""

    bits: Tensor  # token-shaped: all bits one at such a token, else zero (see ops.masking)
    measurable: Tensor  # the same, whatever the advantage: such tokens have a divergence and a ratio
    log_ratio: Tensor  # log rho_t = logp - anchor_logp; 0 at the others
    log_mismatch: Tensor | None = None  # log B_t = anchor_logp - rollout_logp, if corrected; 0 at the others

    @property
    def usable(self) -> Tensor:
        """``bits`` as bool."""
        return self.bits != 0


_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    return value


def _check_floating(name: str, value: object) -> Tensor:
    tensor = _check_tensor(name, value)
    if tensor.dtype not in _FLOATING:
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got {'a nested one' if tensor.is_nested else tensor.layout}")
    return tensor


def _check_like(name: str, tensor: Tensor, logp: Tensor) -> None:
    if tensor.shape != logp.shape:
        raise ValueError(f"{name}: expected logp's shape {list(logp.shape)}, got {list(tensor.shape)}")
    if tensor.device != logp.device:
        raise ValueError(f"{name}: expected logp's device {logp.device}, got {tensor.device}")


def _check_mask(mask: object, logp: Tensor) -> Tensor:
    tensor = _check_tensor("response_mask", mask)
    _check_like("response_mask", tensor, logp)
    if tensor.is_complex():
        raise TypeError(f"response_mask: expected bool, integer or floating 0/1, got {tensor.dtype}")
    if tensor.dtype == torch.bool:
        return tensor
    mask = tensor != 0
    if tensor.device.type == "cpu" and not torch.equal(tensor, mask.to(tensor.dtype)):  # elsewhere looking would stall
        wrong = tensor[tensor != mask.to(tensor.dtype)].reshape(-1)[0].item()
        raise ValueError(
            f"response_mask: expected 1 where the policy wrote the token and 0 elsewhere, got {wrong:g} (an additive "
            "mask, labels, weights?)"
        )
    return mask


def _check_lengths(lengths: Tensor | Sequence[int], logp: Tensor) -> Tensor:
    if isinstance(lengths, Tensor):
        tensor = lengths
    else:
        try:
            tensor = torch.tensor([operator.index(length) for length in lengths], dtype=torch.int64)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise TypeError(f"lengths={lengths!r}: expected integers, one a response") from None
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"lengths: expected integers [B], got {tensor.dtype} {list(tensor.shape)}")
    if tensor.device.type == "cpu":  # on an accelerator, looking would stall it
        if tensor.numel() and int(tensor.min()) < 0:
            raise ValueError(f"lengths: expected no negative length, got {int(tensor.min())}")
        total = sum(tensor.tolist())  # in Python: an int64 sum can wrap around to N
        if total != logp.shape[0]:
            raise ValueError(f"lengths: expected a sum of N = {logp.shape[0]} (logp's length), got {total}")
    return tensor.to(device=logp.device, dtype=torch.int64, non_blocking=True)


def _build_layout(
    logp: Tensor,
    mask: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
    context_parallel: ContextParallel | None,
) -> Layout:
    layout = _build_local_layout(logp, mask, lengths)
    if context_parallel is None:
        return layout
    given: object = context_parallel
    if not isinstance(given, ContextParallel):
        raise TypeError(f"context_parallel: expected a ContextParallel, got {type(given).__name__}")
    return context_parallel.shard(layout)


def _build_local_layout(
    logp: Tensor, mask: Tensor | None, lengths: Tensor | Sequence[int] | None
) -> PaddedLayout | PackedLayout:
    if lengths is None:
        if logp.dim() != 2:
            raise ValueError(
                f"logp: expected [B, T] (padded), or [N] with lengths= (packed), got {list(logp.shape)} without lengths"
            )
        everything = torch.ones(logp.shape, dtype=torch.bool, device=logp.device) if mask is None else mask
        return PaddedLayout(everything)
    if logp.dim() != 1:
        raise ValueError(f"logp: expected [N] (packed) because lengths was given, got {list(logp.shape)}")
    return PackedLayout(_check_lengths(lengths, logp), logp.shape[0], mask)


def _broadcast_advantages(advantages: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    responses = layout.lengths.shape[0]
    # [B] is one number a response, also where B happens to equal N.
    if advantages.shape == (responses,):
        return layout.spread(advantages.to(dtype))
    if advantages.shape == layout.shape or (len(layout.shape) == 2 and advantages.shape == (responses, 1)):
        return advantages.to(dtype)
    if len(layout.shape) == 1 and advantages.shape == (*layout.shape, 1):
        return advantages[:, 0].to(dtype)
    raise ValueError(
        f"advantages: expected [B] = [{responses}] or token-shaped {list(layout.shape)}, got {list(advantages.shape)}"
    )


def _check_divergence(method: Method, divergence: object, logp: Tensor) -> Tensor | None:
    kind = getattr(method, "divergence", None)
    if divergence is None:
        if "divergence" in needed_inputs(method):
            raise ValueError(
                f"divergence: {type(method).__name__}(divergence={kind!r}) needs the measured token-shaped tensor "
                f"{list(logp.shape)}, got None"
            )
        return None
    tensor = _check_floating("divergence", divergence).detach()
    if kind is None:
        raise ValueError(f"divergence: {type(method).__name__} uses none, got a tensor")
    if kind in SAMPLED_DIVERGENCES:
        raise ValueError(
            f"divergence: {type(method).__name__}(divergence={kind!r}) takes its own from the log-probs, got a tensor; "
            "name what was measured, such as divergence='topk_tv'"
        )
    _check_like("divergence", tensor, logp)
    return tensor


def _check_entropy(method: Method, rollout_entropy: object, logp: Tensor) -> Tensor | None:
    needed = "rollout_entropy" in needed_inputs(method)
    if rollout_entropy is None:
        if needed:
            raise ValueError(
                f"rollout_entropy: {type(method).__name__} needs the rollout policy's entropy at each token (nats, "
                f"{list(logp.shape)}), which the sampled tokens' log-probs do not tell, got None"
            )
        return None
    tensor = _check_floating("rollout_entropy", rollout_entropy).detach()
    if not needed:
        raise ValueError(f"rollout_entropy: {type(method).__name__} uses none, got a tensor")
    _check_like("rollout_entropy", tensor, logp)
    return tensor


def _check_corrections(
    correction: Correction | Sequence[Correction] | None, proximal_logp: object, logp: Tensor
) -> tuple[tuple[Correction, ...], Tensor | None]:
    corrections = () if correction is None else correction if isinstance(correction, list | tuple) else (correction,)
    for one in corrections:
        if type(one) not in CORRECTIONS.values():
            raise TypeError(
                f"correction={one!r}: expected one of {', '.join(c.__name__ for c in CORRECTIONS.values())}"
            )
    weighing = [type(one).__name__ for one in corrections if not isinstance(one, GeometricMask)]
    if len(weighing) > 1:
        raise ValueError(
            f"correction: expected one that weighs, and any number of GeometricMask, got {', '.join(weighing)}; two "
            "would weigh by q / mu twice"
        )
    if proximal_logp is None:
        if corrections:
            raise ValueError(
                f"proximal_logp: {type(corrections[0]).__name__} weighs by the trainer's recomputed policy over the "
                "sampler's and needs the former's log-probs, got None; of two policies alone every weight is 1"
            )
        return (), None
    tensor = _check_floating("proximal_logp", proximal_logp).detach()
    if not corrections:
        raise ValueError(
            "proximal_logp: expected correction= with it (a method alone takes its ratio to rollout_logp), got a tensor"
        )
    _check_like("proximal_logp", tensor, logp)
    return tuple(corrections), tensor


def check_batch(
    method: Method,
    logp: Tensor,
    rollout_logp: Tensor,
    advantages: Tensor,
    response_mask: Tensor | None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    divergence: Tensor | None = None,
    rollout_entropy: Tensor | None = None,
    proximal_logp: Tensor | None = None,
    correction: Correction | Sequence[Correction] | None = None,
    context_parallel: ContextParallel | None = None,
) -> Batch:
    """Check the arguments of ``decide`` and bring them into one form; errors name argument, value, expectation."""
    given: object = method
    if isinstance(given, type) and given in METHODS.values():
        raise TypeError(f"method={method!r}: expected an instance, such as cppo.{given.__name__}()")
    if type(method) not in METHODS.values():
        raise TypeError(f"method={method!r}: expected one of {', '.join(c.__name__ for c in METHODS.values())}")
    gate = getattr(method, "gate", None)
    if callable(gate):
        with torch.no_grad():
            check_gate(gate)
    logp = _check_floating("logp", logp).detach()
    if rollout_logp is None:
        raise ValueError("rollout_logp: expected the sampler's log-probs, got None; the ratio and D need both policies")
    rollout_logp = _check_floating("rollout_logp", rollout_logp).detach()
    _check_like("rollout_logp", rollout_logp, logp)
    advantages = _check_floating("advantages", advantages).detach()
    if advantages.device != logp.device:
        raise ValueError(f"advantages: expected logp's device {logp.device}, got {advantages.device}")
    divergence = _check_divergence(method, divergence, logp)
    rollout_entropy = _check_entropy(method, rollout_entropy, logp)
    corrections, proximal_logp = _check_corrections(correction, proximal_logp, logp)
    dtype = torch.float32
    for tensor in (logp, rollout_logp, *(() if proximal_logp is None else (proximal_logp,))):
        dtype = torch.promote_types(dtype, tensor.dtype)
    mask = None if response_mask is None else _check_mask(response_mask, logp)
    layout = _build_layout(logp, mask, lengths, context_parallel)
    advantages = _broadcast_advantages(advantages, layout, dtype)
    rollout_logp = rollout_logp.to(dtype)
    return Batch(
        logp=logp.to(dtype),
        rollout_logp=rollout_logp,
        anchor_logp=rollout_logp if proximal_logp is None else proximal_logp.to(dtype),
        advantages=advantages.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0),
        advantages_bits=finite_bits(advantages),
        divergence=None if divergence is None else divergence.to(dtype),
        rollout_entropy=None if rollout_entropy is None else rollout_entropy.to(dtype),
        corrections=corrections,
        layout=layout,
        dtype=dtype,
    )


def _check_denominator(given: object, value: float) -> None:
    # 0 is what a whole optimizer batch without tokens counts; every part of it has loss 0.
    if not 0 <= value < math.inf:
        raise ValueError(f"denominator={given!r}: expected a positive finite number, or 0 for a batch without tokens")


def check_reduction(reduction: str, denominator: float | Tensor | None, fixed_length: int | None) -> None:
    """Check the reduction's arguments of ``policy_loss``."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: expected one of {', '.join(REDUCTIONS)}")
    if isinstance(denominator, Tensor):
        if denominator.dim() != 0:
            raise ValueError(f"denominator: expected a number or a 0-d tensor, got shape {list(denominator.shape)}")
        if denominator.device.type == "cpu":
            _check_denominator(denominator, denominator.item())
    elif denominator is not None:
        given: object = denominator
        if isinstance(given, bool) or not isinstance(given, numbers.Real):
            raise TypeError(f"denominator={denominator!r}: expected a number or a 0-d tensor")
        _check_denominator(denominator, float(given))
    if (reduction == "fixed-length") != (fixed_length is not None):
        raise ValueError(
            f"fixed_length={fixed_length!r}: expected a positive integer with reduction='fixed-length', else None "
            f"(reduction={reduction!r})"
        )
    if fixed_length is not None and (
        isinstance(fixed_length, bool) or not isinstance(fixed_length, int) or fixed_length < 1
    ):
        raise ValueError(f"fixed_length={fixed_length!r}: expected a positive integer")
