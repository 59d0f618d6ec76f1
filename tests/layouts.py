"""Responses as plain lists, and the tensors of every layout that can hold them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

import cppo

SIDES = ("right", "left", "holes")
NAN, INF = math.nan, math.inf


@dataclasses.dataclass(frozen=True)
class Response:
    """One response's tokens."""

    logp: tuple[float, ...]
    rollout_logp: tuple[float, ...]
    advantages: tuple[float, ...]
    divergence: tuple[float, ...] | None = None
    rollout_entropy: tuple[float, ...] | None = None
    proximal_logp: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.logp)


def response(pi, mu, advantage=1.0, divergence=None) -> Response:
    """Build a response from probabilities and one advantage."""
    return Response(
        tuple(map(math.log, pi)),
        tuple(map(math.log, mu)),
        (float(advantage),) * len(pi),
        None if divergence is None else tuple(map(float, divergence)),
    )


def measured(divergence: Sequence[float], advantage: float = 1.0) -> Response:
    """Build a response whose divergence is given and whose every token has log-ratio +1."""
    n = len(divergence)
    return Response((-1.0,) * n, (-2.0,) * n, (advantage,) * n, tuple(map(float, divergence)))


@dataclasses.dataclass(frozen=True)
class Batch:
    """Tensors of one layout, and where each response's tokens stand in them."""

    logp: Tensor
    rollout_logp: Tensor
    advantages: Tensor
    response_mask: Tensor | None
    lengths: list[int] | None
    divergence: Tensor | None
    rollout_entropy: Tensor | None
    proximal_logp: Tensor | None
    places: list[list[int]]  # flat indices, one list a response

    def arguments(self, method, correction=None) -> tuple[tuple, dict]:
        """Return what ``decide`` takes after the method: of the optional tensors those that it needs."""
        positional = (self.logp, self.rollout_logp, self.advantages, self.response_mask)
        named = {"lengths": self.lengths}
        if takes_divergence(method):
            named["divergence"] = self.divergence
        if takes_entropy(method):
            named["rollout_entropy"] = self.rollout_entropy
        if correction:
            named |= {"proximal_logp": self.proximal_logp, "correction": correction}
        return positional, named

    def decide(self, method, correction=None):
        positional, named = self.arguments(method, correction)
        return cppo.decide(method, *positional, **named)

    def loss(self, method, correction=None, **reduction):
        """Return (PolicyLoss, gradient of the loss with respect to logp)."""
        leaf = self.logp.clone().requires_grad_()
        positional, named = self.arguments(method, correction)
        out = cppo.policy_loss(method, leaf, *positional[1:], **named, **reduction)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        return out, gradient

    def per_response(self, values: Tensor) -> list[list]:
        """Return a token tensor as one list a response."""
        flat = values.reshape(-1).tolist()
        return [[flat[i] for i in where] for where in self.places]

    def outside(self, values: Tensor) -> Tensor:
        """Return what a token tensor holds outside the responses."""
        free = torch.ones(values.numel(), dtype=torch.bool)
        free[[i for where in self.places for i in where]] = False
        return values.reshape(-1)[free]


def takes_divergence(method) -> bool:
    return getattr(method, "divergence", "binary_tv").split("_")[0] in ("topk", "exact")


def takes_entropy(method) -> bool:
    return isinstance(method, cppo.ESTR)


def columns(length: int, width: int, side: str) -> list[int]:
    """Return the columns that a response of ``length`` takes in a row of ``width``."""
    if side == "right":
        return list(range(length))
    if side == "left":
        return list(range(width - length, width))
    # Interior holes: the spare columns spread between the tokens, deterministically.
    return [i * width // length for i in range(length)] if length else []


def padded(
    responses: Sequence[Response], *, side="right", extra=0, garbage=0.0, dtype=torch.float64, per_token=False
) -> Batch:
    """Lay responses out in ``[B, T]`` with ``extra`` spare columns, ``garbage`` in every place that is no token."""
    width = max((len(r) for r in responses), default=0) + extra
    places = [[b * width + c for c in columns(len(r), width, side)] for b, r in enumerate(responses)]
    fill = _filler(responses, places, len(responses) * width, garbage, dtype)
    shape = (len(responses), width)
    mask = torch.zeros(len(responses) * width, dtype=torch.bool)
    mask[[i for where in places for i in where]] = True
    return Batch(
        fill("logp").reshape(shape),
        fill("rollout_logp").reshape(shape),
        fill("advantages").reshape(shape) if per_token else _per_response_advantages(responses, dtype),
        mask.reshape(shape),
        None,
        *(fill(name).reshape(shape) if _has(responses, name) else None for name in OPTIONAL),
        places,
    )


def packed(responses: Sequence[Response], *, extra=0, garbage=0.0, dtype=torch.float64, per_token=False) -> Batch:
    """Lay responses out end to end in ``[N]``; ``extra`` > 0 leaves so many holes in each segment, and gives a mask."""
    places, lengths, start = [], [], 0
    for r in responses:
        width = len(r) + extra
        places.append([start + c for c in columns(len(r), width, "holes")])
        lengths.append(width)
        start += width
    fill = _filler(responses, places, start, garbage, dtype)
    mask = None
    if extra:
        mask = torch.zeros(start, dtype=torch.bool)
        mask[[i for where in places for i in where]] = True
    return Batch(
        fill("logp"),
        fill("rollout_logp"),
        fill("advantages") if per_token else _per_response_advantages(responses, dtype),
        mask,
        lengths,
        *(fill(name) if _has(responses, name) else None for name in OPTIONAL),
        places,
    )


OPTIONAL = ("divergence", "rollout_entropy", "proximal_logp")


def _has(responses: Sequence[Response], name: str) -> bool:
    return all(getattr(r, name) is not None for r in responses)


def _per_response_advantages(responses: Sequence[Response], dtype: torch.dtype) -> Tensor:
    # An empty response's advantage reaches no token.
    return torch.tensor([r.advantages[0] if len(r) else 1.0 for r in responses], dtype=dtype)


def _filler(responses, places, size, garbage, dtype):
    def fill(name: str) -> Tensor:
        values = torch.full((size,), garbage, dtype=dtype)
        for r, where in zip(responses, places, strict=True):
            values[where] = torch.tensor(getattr(r, name), dtype=dtype)
        return values

    return fill


def every_layout(responses: Sequence[Response], *, garbage=NAN, dtype=torch.float64, per_token=False) -> dict:
    """Return the same responses in each layout, by name."""
    same = {"garbage": garbage, "dtype": dtype, "per_token": per_token}
    layouts = {f"padded {side}": padded(responses, side=side, extra=3, **same) for side in SIDES}
    layouts["padded tight"] = padded(responses, **same)
    layouts["packed"] = packed(responses, **same)
    layouts["packed with holes"] = packed(responses, extra=2, **same)
    return layouts


# The worked example of METHOD section 10 and fixture F of BASELINES 13.1 (without its padding token).
WORKED = (
    response((0.66, 0.01, 0.80, 0.27, 0.55), (0.50, 0.0001, 0.99, 0.30, 0.60), 1.0),
    response((0.12, 0.62, 0.08, 0.95), (0.20, 0.80, 0.05, 0.90), -0.5),
)
