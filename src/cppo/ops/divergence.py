"""Divergences D(mu, pi) between the rollout policy mu and the current policy pi at one state (docs/method.md).

All compare the two policies on a partition of the vocabulary; a coarser partition gives a smaller or equal value, so
binary <= top-K <= exact, for TV and for KL(mu || pi).

Shapes: ``[...]`` for per-token log-probs, ``[..., K]`` for top-K log-probs, ``[..., V]`` for the vocabulary. Units:
nats for KL, probability for TV (0 to 1). Numerics: computed in float32, or float64 if an input is float64; a log-prob
above 0 (rounding) counts as 0; one below log(2.2e-308) = -708.4, the smallest normal double, counts as that, so a
probability of zero gives a finite value. NaN stays NaN. A shape or type that does not fit raises ValueError or
TypeError, naming the argument. Results carry no gradient: a trust region is a gate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ratios import MAX_LOG_RATIO

# A divergence counts as no more than this, so that no sum of them overflows into a neighbour's.
LARGEST_DIVERGENCE = 1e15

_LOG_TINY = math.log(2.2250738585072014e-308)
_LN2 = math.log(2.0)


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float32, or the widest dtype among the inputs if that is wider."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _check_shape(name: str, tensor: object, expected: tuple[int, ...], like: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.shape != expected:
        raise ValueError(f"{name}: expected {like} {list(expected)}, got {list(tensor.shape)}")


def _check_pair(logp: Tensor, rollout_logp: Tensor) -> None:
    _check_shape("logp", logp, getattr(logp, "shape", ()), "a shape")
    _check_shape("rollout_logp", rollout_logp, logp.shape, "logp's shape")


def _check_topk(
    logp: Tensor,
    rollout_logp: Tensor,
    token_ids: Tensor,
    topk_logp: Tensor,
    rollout_topk_logp: Tensor,
    topk_ids: Tensor,
) -> None:
    _check_pair(logp, rollout_logp)
    _check_shape("token_ids", token_ids, logp.shape, "logp's shape")
    width = topk_logp.shape[-1] if isinstance(topk_logp, Tensor) and topk_logp.dim() else 0
    for name, tensor in (("topk_logp", topk_logp), ("rollout_topk_logp", rollout_topk_logp), ("topk_ids", topk_ids)):
        _check_shape(name, tensor, (*logp.shape, width), "[..., K] =")
    for name, tensor in (("token_ids", token_ids), ("topk_ids", topk_ids)):
        if tensor.is_floating_point():
            raise TypeError(f"{name}: expected integers, got {tensor.dtype}")


def _log_probs(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = _compute_dtype(*tensors)
    return tuple(tensor.to(dtype).clamp(min=_LOG_TINY, max=0.0) for tensor in tensors)


def _log1mexp(logp: Tensor) -> Tensor:
    """Return log(1 - exp(logp)) for logp <= 0, each branch where it is accurate."""
    return torch.where(logp > -_LN2, torch.log(-torch.expm1(logp)), torch.log1p(-torch.exp(logp)))


def _relative_entropy_term(log_m: Tensor, log_p: Tensor) -> Tensor:
    """Return m log(m / p), the term of KL(m || p); 0 where m = 0."""
    term = log_m.exp() * (log_m - log_p)
    return torch.where(log_m == -math.inf, torch.zeros_like(term), term)


@torch.no_grad()
def binary_tv(logp: Tensor, rollout_logp: Tensor) -> Tensor:
    """Total variation on the partition {sampled token, everything else}.

    D = |pi(y) - mu(y)|. Source: CPPO (arXiv 2606.10968) and DPPO (arXiv 2602.04879) "binary TV".

    Args:
        logp: log pi(y) of the sampled token, any shape, <= 0.
        rollout_logp: log mu(y), same shape.

    Returns:
        D in [0, 1], same shape, no gradient.
    """
    _check_pair(logp, rollout_logp)
    dtype = _compute_dtype(logp, rollout_logp)
    # No clamp below: exp maps every tiny probability to its place. Clamped above after exp, in place: one pass less.
    p = logp.detach().to(dtype).exp().clamp_(max=1.0)
    m = rollout_logp.detach().to(dtype).exp().clamp_(max=1.0)
    return p.sub_(m).abs_()


@torch.no_grad()
def binary_kl(logp: Tensor, rollout_logp: Tensor) -> Tensor:
    """KL(mu || pi) on the partition {sampled token, everything else}.

    D = m log(m / p) + (1 - m) log((1 - m) / (1 - p)), m = mu(y), p = pi(y). Source: CPPO, DPPO "binary KL".

    Args:
        logp: log pi(y) of the sampled token, any shape, <= 0.
        rollout_logp: log mu(y), same shape.

    Returns:
        D >= 0 in nats, same shape, no gradient. p = 1 with m < 1, infinite by the formula, gives a large finite value.
    """
    _check_pair(logp, rollout_logp)
    lp, lm = _log_probs(logp, rollout_logp)
    # Where p rounds to 1, the largest value below 0 that the dtype resolves stands for log p.
    nearly_one = -1e-12 if lp.dtype == torch.float64 else -1e-7
    rest_m = _log1mexp(lm)
    rest_p = _log1mexp(lp.clamp(max=nearly_one))
    return (_relative_entropy_term(lm, lp) + _relative_entropy_term(rest_m, rest_p)).clamp_(min=0.0)


def _outside(token_ids: Tensor, topk_ids: Tensor) -> Tensor:
    """Return True where the sampled token is not among the top K, so that it needs a cell of its own."""
    return (topk_ids != token_ids[..., None]).all(dim=-1)


@torch.no_grad()
def topk_tv(
    logp: Tensor,
    rollout_logp: Tensor,
    token_ids: Tensor,
    topk_logp: Tensor,
    rollout_topk_logp: Tensor,
    topk_ids: Tensor,
) -> Tensor:
    """Total variation on singletons for mu's K likeliest tokens and the sampled one, and one bucket for the rest.

    D = (sum_S |p_a - m_a| + |p_o - m_o|) / 2, S = topK(mu) + {y} (y once). Source: CPPO (K = 20), DPPO eq. top-K.

    Args:
        logp: log pi(y), ``[...]``.
        rollout_logp: log mu(y), ``[...]``.
        token_ids: y, ``[...]``, integer.
        topk_logp: log pi at mu's top-K tokens, ``[..., K]``.
        rollout_topk_logp: log mu at the same tokens, ``[..., K]``.
        topk_ids: those tokens, ``[..., K]``, distinct within a position.

    Returns:
        D in [0, 1], ``[...]``, no gradient.
    """
    _check_topk(logp, rollout_logp, token_ids, topk_logp, rollout_topk_logp, topk_ids)
    p, m, p_k, m_k = (x.exp() for x in _log_probs(logp, rollout_logp, topk_logp, rollout_topk_logp))
    own = _outside(token_ids, topk_ids)
    p, m = p * own, m * own
    rest_p = (1 - p_k.sum(-1) - p).clamp_(min=0.0)
    rest_m = (1 - m_k.sum(-1) - m).clamp_(min=0.0)
    # What is no distribution (an id twice, rounding) may sum to more than one.
    return (((p_k - m_k).abs().sum(-1) + (p - m).abs() + (rest_p - rest_m).abs()) / 2).clamp_(max=1.0)


@torch.no_grad()
def topk_kl(
    logp: Tensor,
    rollout_logp: Tensor,
    token_ids: Tensor,
    topk_logp: Tensor,
    rollout_topk_logp: Tensor,
    topk_ids: Tensor,
) -> Tensor:
    """KL(mu || pi) on the partition of :func:`topk_tv`.

    D = sum_S m_a log(m_a / p_a) + m_o log(m_o / p_o). Source: CPPO, DPPO eq. top-K. Arguments as :func:`topk_tv`.

    Returns:
        D >= 0 in nats, ``[...]``, no gradient. The bucket's p_o is floored at 1e-12; an empty m_o adds nothing.
    """
    _check_topk(logp, rollout_logp, token_ids, topk_logp, rollout_topk_logp, topk_ids)
    lp, lm, lp_k, lm_k = _log_probs(logp, rollout_logp, topk_logp, rollout_topk_logp)
    own = _outside(token_ids, topk_ids)
    rest_p = (1 - lp_k.exp().sum(-1) - lp.exp() * own).clamp_(min=1e-12)
    rest_m = (1 - lm_k.exp().sum(-1) - lm.exp() * own).clamp_(min=0.0)
    sampled = torch.where(own, _relative_entropy_term(lm, lp), torch.zeros_like(lm))
    support = _relative_entropy_term(lm_k, lp_k).sum(-1) + sampled
    return (support + _relative_entropy_term(rest_m.log(), rest_p.log())).clamp_(min=0.0)


@torch.no_grad()
def exact_tv(logp: Tensor, rollout_logp: Tensor) -> Tensor:
    """Total variation over the whole vocabulary: D = sum_a |pi(a) - mu(a)| / 2.

    Args:
        logp: log pi over the vocabulary, ``[..., V]``, normalised.
        rollout_logp: log mu over the vocabulary, ``[..., V]``.

    Returns:
        D in [0, 1], ``[...]``, no gradient.
    """
    _check_pair(logp, rollout_logp)
    lp, lm = _log_probs(logp, rollout_logp)
    return lp.exp_().sub_(lm.exp_()).abs_().sum(-1) / 2


@torch.no_grad()
def exact_kl(logp: Tensor, rollout_logp: Tensor) -> Tensor:
    """KL(mu || pi) over the whole vocabulary: D = sum_a mu(a) log(mu(a) / pi(a)).

    Args:
        logp: log pi over the vocabulary, ``[..., V]``, normalised.
        rollout_logp: log mu over the vocabulary, ``[..., V]``.

    Returns:
        D >= 0 in nats, ``[...]``, no gradient.
    """
    _check_pair(logp, rollout_logp)
    lp, lm = _log_probs(logp, rollout_logp)
    return _relative_entropy_term(lm, lp).sum(-1).clamp_(min=0.0)


@torch.no_grad()
def sampled_k2(logp: Tensor, rollout_logp: Tensor) -> Tensor:
    """The estimator k2 = d^2 / 2 of KL(mu || pi) from the sampled token, d = log pi(y) - log mu(y).

    Biased, and symmetric in the ratio and its inverse. Source: TRM (arXiv 2512.23075), its estimator for the maximum.

    Args:
        logp: log pi(y) of the sampled token, any shape, <= 0.
        rollout_logp: log mu(y), same shape.

    Returns:
        k2 >= 0 in nats, at most 1e15, same shape, no gradient.
    """
    log_ratio = _log_ratio(logp, rollout_logp)
    return log_ratio.square().div_(2).clamp_(max=LARGEST_DIVERGENCE)


@torch.no_grad()
def sampled_k3(logp: Tensor, rollout_logp: Tensor) -> Tensor:
    """The estimator k3 = rho - 1 - log rho of KL(mu || pi) from the sampled token.

    Unbiased under mu, and non-negative. Source: TRM (arXiv 2512.23075), its estimator for the mean. Arguments as
    :func:`sampled_k2`.

    Returns:
        k3 >= 0 in nats, at most 1e15, same shape, no gradient; the log-ratio counts as no more than 20.
    """
    log_ratio = _log_ratio(logp, rollout_logp).clamp_(max=MAX_LOG_RATIO)
    return log_ratio.expm1().sub_(log_ratio).clamp_(min=0.0, max=LARGEST_DIVERGENCE)


def _log_ratio(logp: Tensor, rollout_logp: Tensor) -> Tensor:
    _check_pair(logp, rollout_logp)
    dtype = _compute_dtype(logp, rollout_logp)
    return logp.detach().to(dtype) - rollout_logp.detach().to(dtype)


# Those that the sampled token's two log-probs determine.
SAMPLED = {"binary_tv": binary_tv, "binary_kl": binary_kl, "k2": sampled_k2, "k3": sampled_k3}
