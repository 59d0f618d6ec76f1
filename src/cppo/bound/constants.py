"""What Theorem 1's constant is worth at a setting, beside a uniform threshold's, with the slack that Eq. 8 adds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cppo import theory
from cppo.inspect.reading import Chunk, Log
from cppo.inspect.replay import decide_chunk, replayable
from cppo.methods import CPPO, DPPO, Method

_LONGEST = 1 << 40  # tokens: where the search for the longest response ends, and what is taken for a length


@dataclasses.dataclass(frozen=True)
class Setting:
    """Knobs of one trust region and the length of a response; ``delta_b`` None: a threshold alone."""

    label: str
    T: int
    delta: float
    delta_b: float | None
    w_min: float = 1.0


@dataclasses.dataclass(frozen=True)
class Constants:
    """The constants at one setting, and what they can show.

    J(pi) - J(mu) >= L' - total. The rule that limits the drift limits L' too: |L'| <= 2 xi sum_t u_t, and sum_t u_t is
    at most (delta + delta_b W_{T-1}) / w_min under Eq. 8, T min(1, delta / w_min) under any threshold. So the
    lower bound can be above 0 only where total is below that ``promise``, and says anything at all, more than -2 xi,
    only where it is below 2 xi + promise.
    """

    label: str
    T: int
    delta: float
    delta_b: float | None
    w_min: float
    xi: float
    penalty: float | None  # Theorem 1: 2 xi T (T - 1) lbar delta_b, lbar = delta / w_min
    slack: float | None  # Prop. 8: what Eq. 8's overdraft adds
    total: float | None  # what holds for the rule as implemented: their sum, or what D_t <= delta / w_min gives if less
    uniform: float  # 2 xi T (T - 1) delta^2: D_t <= delta alone
    ratio: float | None  # penalty / uniform: Cor. 7
    total_ratio: float | None  # total / uniform
    promise: float  # the largest L' within the rule
    vacuous: bool  # total (uniform, where there is none) >= 2 xi + promise
    longest: int | None  # the longest response for which a gain can be shown, total < promise; None: 2^40 or more
    uniform_longest: int | None  # the same of the uniform threshold


# The settings of the paper's experiments (METHOD: lengths of 8k and 16k), an adaptive budget at either end.
PAPER = (
    Setting("1.7B, fixed budget", 8192, 0.15, 0.015, 0.8),
    Setting("1.7B and 8B base, b_min", 8192, 0.15, 0.02, 0.8),
    Setting("1.7B and 8B base, 2 b_min", 8192, 0.15, 0.04, 0.8),
    Setting("30B-A3B base, b_min", 16384, 0.2, 0.02, 0.8),
    Setting("30B-A3B base, 2 b_min", 16384, 0.2, 0.04, 0.8),
)


def overdraft(*, delta: float, delta_b: float, w_min: float, T: int) -> float:
    """Return eta = max(0, delta - delta_b min_{m<T} w_m), what Eq. 8 lets a prefix overdraw under Eq. 9's weights."""
    smallest = (1 + w_min * (T - 2)) / (T - 1) if T > 1 else 1.0
    return max(0.0, delta - delta_b * smallest)


def _uniform(limit: float, T: int, xi: float) -> tuple[float, float]:
    """Return the constant of D_t <= limit, and the largest L' within it."""
    return theory.uniform_threshold_penalty(xi=xi, T=T, delta=limit), 2 * xi * T * min(1.0, limit)


def _penalties(setting: Setting, T: int, xi: float) -> tuple[float, float]:
    """Return Theorem 1's penalty and Prop. 8's slack at a length."""
    assert setting.delta_b is not None
    knobs = {"delta": setting.delta, "w_min": setting.w_min}
    lbar = theory.largest_limit_of_rule(**knobs)
    eta = overdraft(**knobs, delta_b=setting.delta_b, T=T)
    return (
        theory.improvement_penalty(xi=xi, T=T, lbar=lbar, delta_b=setting.delta_b),
        theory.slack_penalty(xi=xi, T=T, lbar=lbar, eta=eta),
    )


def _of_rule(setting: Setting, T: int, xi: float) -> tuple[float, float]:
    """Return the constant of a setting's rule, and the largest L' within it."""
    if setting.delta_b is None:
        return _uniform(setting.delta, T, xi)
    limited, promise = _uniform(setting.delta / setting.w_min, T, xi)
    prior_weights = T * (1 + setting.w_min) / 2 - setting.w_min if T > 1 else 0.0  # W_{T-1}
    spent = (setting.delta + setting.delta_b * prior_weights) / setting.w_min
    return min(sum(_penalties(setting, T, xi)), limited), min(promise, 2 * xi * spent)


def _longest(of: Callable[[int], tuple[float, float]]) -> int | None:
    """Return the largest T whose constant is below what can be promised; None where no end was found.

    Constants are convex in T and promises concave, both from T = 1 on, where the constant is 0: there is one end.
    """

    def shows(T: int) -> bool:
        constant, promise = of(T)
        return constant < promise

    low, high = 1, 2
    while shows(high):
        low, high = high, 2 * high
        if low >= _LONGEST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if shows(middle) else (low, middle)
    return low


def constants(setting: Setting, xi: float) -> Constants:
    """Return the constants at a setting for rewards of half range ``xi``.

    Raises:
        ValueError: naming the knob that is out of range, or all of them where a constant is beyond what a float holds.
    """
    uniform = theory.uniform_threshold_penalty(xi=xi, T=min(setting.T, _LONGEST), delta=setting.delta)
    if setting.T > _LONGEST:
        raise ValueError(f"T={setting.T}: expected a length of at most {_LONGEST:,} tokens")
    penalty = slack = ratio = None
    if setting.delta_b is not None:
        penalty, slack = _penalties(setting, setting.T, xi)
        ratio = theory.rule_ratio(delta=setting.delta, delta_b=setting.delta_b, w_min=setting.w_min)
    of_rule, promise = _of_rule(setting, setting.T, xi)
    if not all(map(math.isfinite, (uniform, penalty or 0, slack or 0, ratio or 0, of_rule, promise))):
        knobs = ", ".join(f"{name}={getattr(setting, name)!r}" for name in ("T", "delta", "delta_b", "w_min"))
        raise ValueError(f"{knobs}, xi={xi!r}: expected knobs whose constants a float can hold")
    return Constants(
        **dataclasses.asdict(setting),
        xi=xi,
        penalty=penalty,
        slack=slack,
        total=None if penalty is None else of_rule,
        uniform=uniform,
        ratio=ratio,
        total_ratio=of_rule / uniform if penalty is not None and uniform else None,
        promise=promise,
        vacuous=of_rule >= 2 * xi + promise,
        longest=_longest(lambda T: _of_rule(setting, T, 0.5)),
        uniform_longest=_longest(lambda T: _uniform(setting.delta, T, 0.5)),
    )


@dataclasses.dataclass(frozen=True)
class RunConstants:
    """A run's constants, and how far its tokens were from Theorem 1's premises."""

    run: str
    method: str
    responses: int
    shortest: int
    median: int
    longest: int
    delta_b: dict[str, float] | None  # min, mean, max over responses
    tokens_within: float | None  # share of tokens that can be measured with Z_t <= c_t, whichever way they move
    responses_within: float | None  # share of responses all of whose tokens are
    rows: tuple[Constants, ...]
    notes: tuple[str, ...]


def run_constants(
    path: Path, spec: str, method: Method, xi: float | None, *, progress: Callable[[int], None] = lambda read: None
) -> RunConstants:
    """Return the constants at a run's own settings, its observed lengths and its observed budgets.

    Args:
        path: a run's folder, or what else ``Log.open`` opens.
        spec: the method as text.
        method: the method.
        xi: half the reward's range; None: half the range of the rewards in the log.
        progress: called with the number of responses read since the last call.

    Raises:
        ValueError: if the method puts no limit on a TV, or the log cannot be read.
    """
    divergence = getattr(method, "divergence", "")
    if not isinstance(method, CPPO | DPPO) or not divergence.endswith("_tv"):
        raise ValueError(f"{path}: expected a run of cppo or dppo with a TV, got {spec!r}; the theorem limits no other")
    log = Log.open(path)
    columns = _observe(log, method, progress)
    lengths, rewards = columns["length"], columns["reward"]
    if not lengths.size:
        raise ValueError(f"{path}: expected responses with tokens of the policy, found none")
    seen = ""
    if xi is None:
        known = rewards[np.isfinite(rewards)]
        xi = float(known.max() - known.min()) / 2 if known.size else 0.0
        if not xi:
            raise ValueError(f"{path}: expected rewards that differ; give half their range with --xi")
        seen = (
            f"xi is half the range of the rewards seen, {known.min():g} to {known.max():g}: give --xi if others can be"
        )
    settings, notes = _own_settings(method, columns)
    notes = (seen, *notes) if seen else notes
    delta, delta_b, w_min = settings
    median, longest = int(np.median(lengths)), int(lengths.max())
    tokens, within = columns["tokens"], columns["within"]
    return RunConstants(
        run=log.name,
        method=spec,
        responses=len(lengths),
        shortest=int(lengths.min()),
        median=median,
        longest=longest,
        delta_b=_spread(columns["delta_b"]) if delta_b is not None else None,
        tokens_within=float(within.sum() / max(tokens.sum(), 1)) if isinstance(method, CPPO) else None,
        responses_within=float((within == tokens).mean()) if isinstance(method, CPPO) else None,
        rows=tuple(
            constants(Setting(f"{name} response", T, delta, delta_b, w_min), xi)
            for name, T in (("median", median), ("longest", longest))
        ),
        notes=notes,
    )


def _own_settings(
    method: CPPO | DPPO, columns: dict[str, NDArray[Any]]
) -> tuple[tuple[float, float | None, float], tuple[str, ...]]:
    """Return (delta, delta_b, w_min) as the constants take them, and what is to be said of them."""
    notes = []
    if method.divergence != "exact_tv":
        notes.append(f"{method.divergence} is at most the exact TV: the rule limits less than the theorem asks for")
    if isinstance(method, DPPO):
        delta = max(method.delta, method.delta_low or 0.0)
        return (delta, None, 1.0), (*notes, "no prefix budget: the uniform threshold's constant alone")
    w_min = 1.0 if method.position == "uniform" else method.w_min
    if method.budget == "none":
        notes.append("no prefix budget: the uniform threshold's constant alone, at delta / w_min")
        return (method.delta / w_min, None, 1.0), tuple(notes)
    if method.position == "shuffled":
        notes.append("shuffled weights are not monotone: Theorem 1 does not apply, only D_t <= delta / w_min")
        return (method.delta / w_min, None, 1.0), tuple(notes)
    return (method.delta, float(columns["delta_b"].mean()), w_min), tuple(notes)


def _observe(log: Log, method: Method, progress: Callable[[int], None]) -> dict[str, NDArray[Any]]:
    """Return, of each response that has tokens, its length, reward and budget, and how many tokens were within."""
    parts: list[dict[str, NDArray[Any]]] = []
    for chunk in log.chunks():
        reason = replayable(method, chunk.divergence is not None)
        if reason is not None:
            raise ValueError(f"{chunk.file}: the run's method {reason}")
        parts.append(_observe_chunk(chunk, method))
        progress(len(chunk.lengths))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _observe_chunk(chunk: Chunk, method: Method) -> dict[str, NDArray[Any]]:
    decision = decide_chunk(method, chunk)
    trace = decision.trace
    response = np.repeat(np.arange(len(chunk.lengths)), chunk.lengths)

    def count(tokens: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(response[tokens], minlength=len(chunk.lengths))

    lengths = count(chunk.response_mask)
    measured = decision.batch.tokens().measurable.numpy() != 0
    tokens = within = count(measured)
    if trace.weighted_divergence is not None and trace.threshold is not None:
        threshold = trace.threshold.numpy()
        within = count(measured & (trace.weighted_divergence.numpy().astype(threshold.dtype) <= threshold))
    delta_b = np.full(len(lengths), np.nan) if trace.delta_b is None else trace.delta_b.numpy().astype(np.float64)
    columns = {"length": lengths, "tokens": tokens, "within": within, "reward": chunk.reward, "delta_b": delta_b}
    return {name: values[lengths > 0] for name, values in columns.items()}


def _spread(values: NDArray[Any]) -> dict[str, float]:
    return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}
