"""The output projection of a language model, hidden states to logits, a chunk of tokens at a time."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterator

import torch
from torch import Tensor

# What the logits of one chunk may take where the caller names no budget: enough tokens that the matrix products run at
# full speed with a vocabulary of 50,000 (CPU) or 150,000 (elsewhere), and little beside the weights' own gradient.
_CPU_BUDGET = 64 << 20
_ACCELERATOR_BUDGET = 1 << 30
_FEWEST_TOKENS = 16  # below that a chunk's products cost more than they save memory
# Rows of the weight that are converted to another dtype at a time.
_CONVERTED_ROWS = 4096
# torch >= 2.8 can return a product of narrow factors as it was accumulated.
_ACCUMULATES_WIDER = hasattr(torch.ops.aten.addmm, "dtype_out")


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """logits = cap(scale (hidden weight^T + bias)) / temperature, with cap(x) = softcap tanh(x / softcap), if any.

    Products are accumulated in ``dtype`` and what comes out is of it. The factors are multiplied as ``operand``: on a
    CPU, which has no product of narrow factors that is not rounded to their dtype, the same; elsewhere as they come, or
    under autocast in its dtype.
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    temperature: float
    scale: float
    softcap: float | None
    dtype: torch.dtype  # float32, or float64 if hidden or weight is
    operand: torch.dtype

    @property
    def vocabulary(self) -> int:
        """V, or this rank's part of it."""
        return self.weight.shape[0]

    @property
    def slope(self) -> float:
        """The derivative of the logits by hidden weight^T + bias, where no cap bends it."""
        return self.scale / self.temperature

    @property
    def bends(self) -> bool:
        """Whether there is a cap."""
        return self.softcap is not None

    def logits(self, hidden: Tensor, out: Tensor, bend: Tensor | None = None) -> Tensor:
        """Write the logits of ``hidden`` ``[n, H]``, of ``operand``'s dtype, to ``out`` ``[n, V]``; return it.

        ``bend`` ``[n, V]``: receives the derivative of the cap at each logit; given only where there is a cap.
        """
        for rows, part in self._parts():
            product(hidden, part.t(), out[:, rows])
        return self._finish(out, self.bias, bend)

    def selected(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return the logits of ``hidden`` ``[n, H]`` at ``ids`` ``[n, C]``; those out of range count as the nearest."""
        ids = ids.clamp(0, self.vocabulary - 1)
        # The factors of ``logits``, so that both give one policy; only the product is of few.
        rows = self.weight[ids].to(self.operand).to(self.dtype)
        logits = rows.new_empty(*ids.shape, 1)
        # Given where to write, autocast leaves the factors as they are.
        torch.bmm(rows, hidden.to(self.operand).to(self.dtype)[:, :, None], out=logits)
        return self._finish(logits[:, :, 0], None if self.bias is None else self.bias[ids], None)

    def _finish(self, raw: Tensor, bias: Tensor | None, bend: Tensor | None) -> Tensor:
        """Turn hidden weight^T into logits, in place."""
        if bias is not None:
            raw.add_(bias.to(raw.dtype))
        if self.softcap is None:
            return raw if self.slope == 1 else raw.mul_(self.slope)
        raw.mul_(self.scale / self.softcap).tanh_()
        if bend is not None:
            torch.mul(raw, raw, out=bend).neg_().add_(1)
        return raw.mul_(self.softcap / self.temperature)

    def back(self, gradient: Tensor, out: Tensor) -> Tensor:
        """Write gradient weight ``[n, H]`` to ``out``; return it. ``gradient`` ``[n, V]`` is of ``operand``'s dtype."""
        for rows, part in self._parts():
            product(gradient[:, rows], part, out, add=rows.start != 0)
        return out

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the weight as a factor, in pieces if it must be converted, so that never all of it stands there."""
        if self.weight.dtype == self.operand:
            yield slice(0, self.vocabulary), self.weight
            return
        for start in range(0, self.vocabulary, _CONVERTED_ROWS):
            rows = slice(start, min(start + _CONVERTED_ROWS, self.vocabulary))
            yield rows, self.weight[rows].to(self.operand)


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Write a b to ``out``, or add it; accumulated in ``out``'s dtype whatever the factors' is."""
    beta = 1 if add else 0
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.device.type in ("cuda", "meta") and _ACCUMULATES_WIDER:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:  # a device that rounds the sum to the factors' dtype: they are widened first
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def chunks(tokens: int, bytes_a_token: int, device: torch.device, given: int | None, budget: int | None) -> list[slice]:
    """Cut ``tokens`` into pieces of almost equal size, as large as the budget allows, or of ``given`` tokens."""
    if given is None:
        if budget is None:
            budget = _CPU_BUDGET if device.type == "cpu" else _ACCELERATOR_BUDGET
        given = max(budget // bytes_a_token, _FEWEST_TOKENS)
        given = math.ceil(tokens / math.ceil(tokens / given)) if tokens else 1
    return [slice(start, min(start + given, tokens)) for start in range(0, tokens, given)]


def check_projection(
    hidden: object,
    weight: object,
    bias: object,
    temperature: object,
    logit_scale: object,
    logit_softcap: object,
) -> Projection:
    """Return the projection, if these arguments make one; else raise, naming argument, value and expectation."""
    hidden, weight = _check_matrix("hidden", hidden), _check_matrix("weight", weight)
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or not weight.numel():
        raise ValueError(
            f"hidden, weight: expected [..., H] and [V, H] (V, H >= 1), got {list(hidden.shape)} and "
            f"{list(weight.shape)}"
        )
    if bias is not None:
        bias = _check_matrix("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected [V] = [{weight.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: expected hidden's device {hidden.device}, got {tensor.device}")
    factors = torch.promote_types(hidden.dtype, weight.dtype)
    dtype = torch.promote_types(factors, torch.float32)
    return Projection(
        dtype=dtype,
        operand=_operand(hidden.device.type, factors, dtype),
        weight=weight,
        bias=bias,
        temperature=_check_number("temperature", temperature, positive=True),
        scale=_check_number("logit_scale", logit_scale, positive=False),
        softcap=None if logit_softcap is None else _check_number("logit_softcap", logit_softcap, positive=True),
    )


def _operand(device: str, factors: torch.dtype, accumulator: torch.dtype) -> torch.dtype:
    # Autocast leaves float64 as it is.
    if device == "cpu" or factors == torch.float64:
        return accumulator
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return factors


def _check_matrix(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        hint = f"; pass its .{name}" if isinstance(value, torch.nn.Module) and hasattr(value, name) else ""
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}{hint}")
    if hasattr(value, "full_tensor"):
        raise TypeError(
            f"{name}: expected a plain tensor, got a {type(value).__name__}; pass {name}.full_tensor(), or this rank's "
            "slice of the vocabulary with vocab_parallel="
        )
    if value.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{name}: expected float64, float32, float16 or bfloat16, got {value.dtype}")
    return value


def _check_number(name: str, value: object, *, positive: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r}: expected a number")
    number = float(value)
    if not math.isfinite(number) or number == 0 or (positive and number < 0):
        raise ValueError(f"{name}={value!r}: expected a finite number {'> 0' if positive else 'other than 0'}")
    return number


def check_chunking(chunk_tokens: object, memory_budget: object) -> None:
    """Check how the caller wants tokens to be cut."""
    for name, value in (("chunk_tokens", chunk_tokens), ("memory_budget", memory_budget)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r}: expected a positive integer or None")
    if chunk_tokens is not None and memory_budget is not None:
        raise ValueError(
            f"memory_budget={memory_budget!r}: expected None beside chunk_tokens={chunk_tokens!r}; one of them decides"
        )
