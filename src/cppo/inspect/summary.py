"""What ``cppo inspect`` says about a log, as one document of plain numbers: --json prints it, the page shows it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cppo.inspect.advice import Evidence, as_dict, findings
from cppo.inspect.measures import Measures
from cppo.inspect.reading import Chunk, Log, join, take
from cppo.inspect.replay import BINS, Judged, Replay, decide_chunk, replayable
from cppo.inspect.statement import TokenTexts, number, numbers, statement
from cppo.methods import CPPO, Method, method_name, parse_method
from cppo.printable import printable

FORMAT = 1
# Judged beside the run's own method unless others are asked for: every method at its default knobs.
BESIDE = (
    "cppo", "dppo", "ipo", "trm", "trm_max", "trm_avg", "grpo", "minpro", "gspo", "sapo", "cispo", "policy_gradient",
)  # fmt: skip
_SAMPLE_TOKENS = 40_000  # of which thresholds are suggested
_REJECTED_TOKENS = 20  # listed
_SHOWN_TOKENS = 20_000  # of all responses that are shown whole
_DELTAS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
_BUDGETS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05)
_PAPER = {"delta": 0.15, "delta_b": 0.02, "w_min": 0.8}


def summarise(
    log: Log,
    own: str,
    *,
    beside: Sequence[str] = BESIDE,
    wanted: float = 0.02,
    responses: int = 40,
    texts: TokenTexts | None = None,
    progress: Callable[[int], None] = lambda judged: None,
) -> dict[str, Any]:
    """Judge a log and return the document about it.

    Args:
        log: the log.
        own: the method that the run used, as a spec.
        beside: others to judge the same tokens by.
        wanted: the masked share for which thresholds are suggested, in (0, 1).
        responses: how many responses are shown whole.
        texts: cuts responses into tokens, where a tokenizer is at hand.
        progress: called with the number of responses read since the last call; each is read twice.
    """
    steps, divergence, written = _survey(log, progress)
    specs, left_out = [own], {}
    for spec in beside:
        reason = replayable(parse_method(spec), divergence)
        if reason is not None:
            left_out[spec] = reason
        elif parse_method(spec) not in [parse_method(known) for known in specs]:
            specs.append(spec)
    reason = replayable(parse_method(own), divergence)
    if reason is not None:
        raise ValueError(f"method={own!r}: {reason}; expected a method that can judge it, such as cppo")
    replayed, measures = Replay(specs, steps), Measures(steps)
    shown, sample, rejected = _Shown(responses), _Sample(written), _RejectedTokens()
    for chunk in log.chunks(texts=True):
        decision = replayed.add(chunk)
        coefficient = np.abs(decision.coefficient.numpy().astype(np.float64))
        measures.add(chunk, coefficient * np.abs(np.repeat(chunk.advantage, chunk.lengths)))
        codes = decision.rejected_by.numpy()
        shown.add(chunk, codes)
        rejected.add(chunk, codes)
        sample.add(chunk)
        progress(len(chunk.lengths))
    judged = replayed.judged
    suggestion = suggest(sample.chunk(), judged[0].method, wanted)
    series = measures.series()
    methods = {item.spec: item.method for item in judged}
    return {
        "name": printable(log.name),
        "method": own,
        "files": len(log.files),
        "responses": int(measures.sums["responses"].sum()),
        "tokens": judged[0].tokens,
        "steps": steps,
        "divergence": "measured" if divergence else "from the sampled tokens",
        "series": {name: numbers(values) for name, values in series.items()},
        "positions": {
            "mean": numbers(measures.by_bin.mean()),
            "tail": numbers(measures.by_bin.tail()),
            "tokens": measures.by_bin.counts.sum(1).tolist(),
            "allowance": _allowance(judged[0].method),
        },
        "methods": [_method_entry(item, judged[0]) for item in judged],
        "left_out": left_out,
        "rejected_tokens": rejected.most(texts),
        "suggestion": suggestion,
        "findings": [
            as_dict(f) for f in findings(Evidence(series, measures, judged[0], suggestion["token_delta"], wanted))
        ],
        "examples": [statement(one, methods, texts, _SHOWN_TOKENS) | {"why": why} for why, one in shown.chosen()],
    }


def _survey(log: Log, progress: Callable[[int], None]) -> tuple[list[int], bool, int]:
    """Return the log's updates, whether every response has a measured divergence, and how many tokens there are."""
    steps: set[int] = set()
    divergence, tokens = True, 0
    for chunk in log.chunks():
        steps.update(chunk.step.tolist())
        divergence = divergence and chunk.divergence is not None
        tokens += len(chunk.logp)
        progress(len(chunk.lengths))
    return sorted(steps), divergence, tokens


def _allowance(method: Method) -> list[float | None] | None:
    """Return delta / w_t in the middle of each bin, for a method with a threshold on D."""
    delta = getattr(method, "delta", None)
    if delta is None:
        return None
    w_min = method.w_min if isinstance(method, CPPO) and method.position == "linear" else 1.0
    middle = (np.arange(BINS) + 0.5) / BINS
    return numbers(delta / (1 - (1 - w_min) * middle))


def _method_entry(item: Judged, own: Judged) -> dict[str, Any]:
    tokens = max(1, item.tokens)
    by_step, by_bin = item.counts.sum(1), item.counts.sum(0)
    threshold, budget, other = (item.rejected / tokens).tolist()
    (down, down_rejected), _, (up, up_rejected) = item.signs.tolist()
    return {
        "spec": item.spec,
        "name": method_name(item.method),
        "masked": number(item.masked),
        "by_token_threshold": number(threshold),
        "by_prefix_budget": number(budget),
        "by_other_rule": number(other),
        "masked_positive": number(up_rejected / up) if up else None,
        "masked_negative": number(down_rejected / down) if down else None,
        "weight_left": number(item.weight.sum() / max(item.unmasked_weight.sum(), 1e-300)),
        "differs": number(item.differs / tokens) if item is not own else 0.0,
        "masked_by_step": numbers(_share(by_step)),
        "budget_by_step": numbers(by_step[:, 2] / np.maximum(1, by_step.sum(1))),
        "delta_b_by_step": numbers(_mean_budget(item.delta_b)) if item.delta_b[:, 1].any() else None,
        "masked_by_position": numbers(_share(by_bin)),
        "budget_by_position": numbers(by_bin[:, 2] / np.maximum(1, by_bin.sum(1))),
    }


def _share(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(counts[:, 1:].sum(1) / np.maximum(1, counts.sum(1)))


def _mean_budget(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    out = np.full(len(sums), np.nan)
    np.divide(sums[:, 0], sums[:, 1], out=out, where=sums[:, 1] > 0)
    return out


class _Sample:
    """Every k-th response of a log, about ``_SAMPLE_TOKENS`` tokens in all."""

    def __init__(self, tokens: int) -> None:
        self._chunks: list[Chunk] = []
        self._every, self._seen = max(1, round(tokens / _SAMPLE_TOKENS)), 0

    def add(self, chunk: Chunk) -> None:
        rows = [row for row in range(len(chunk.lengths)) if (self._seen + row) % self._every == 0]
        self._seen += len(chunk.lengths)
        if rows:
            self._chunks.append(take(chunk, rows))

    def chunk(self) -> Chunk:
        """Return the sample."""
        return join(self._chunks)


class _RejectedTokens:
    """How often each token was written, and rejected by the run's own method."""

    def __init__(self) -> None:
        self._counts: dict[int, list[int]] = {}

    def add(self, chunk: Chunk, codes: NDArray[np.int8]) -> None:
        ids, place = np.unique(chunk.token_ids[chunk.response_mask], return_inverse=True)
        rejected = np.bincount(place, codes[chunk.response_mask] > 0, minlength=len(ids))
        columns = (ids, np.bincount(place, minlength=len(ids)), rejected)
        for token, count, gone in zip(*(column.tolist() for column in columns), strict=True):
            entry = self._counts.setdefault(token, [0, 0])
            entry[0] += count
            entry[1] += int(gone)

    def most(self, texts: TokenTexts | None) -> list[dict[str, Any]]:
        """Return the tokens rejected most often, and their texts where they can be had."""
        order = sorted(self._counts.items(), key=lambda item: (-item[1][1], item[0]))
        return [
            {
                "id": token, "text": None if texts is None else printable("".join(texts([token]))),
                "count": count, "rejected": gone,
            }
            for token, (count, gone) in order[:_REJECTED_TOKENS]
            if gone
        ]  # fmt: skip


class _Shown:
    """The responses that are worth a look: the most rejected, those that drifted most, and some at even distances."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._heaps: dict[str, list[tuple[float, int, Chunk]]] = {"most rejected": [], "largest drift": []}
        self._even: list[tuple[int, Chunk]] = []
        self._seen = 0

    def add(self, chunk: Chunk, codes: NDArray[np.int8]) -> None:
        response = np.repeat(np.arange(len(chunk.lengths)), chunk.lengths)
        rejected = np.bincount(response, (codes > 0) & chunk.response_mask, minlength=len(chunk.lengths))
        gap = np.abs(np.exp(np.minimum(chunk.logp, 0)) - np.exp(np.minimum(chunk.rollout_logp, 0)))
        drift = np.bincount(response, np.nan_to_num(gap) * chunk.response_mask, minlength=len(chunk.lengths))
        for why, scores in (("most rejected", rejected), ("largest drift", drift)):
            heap, room = self._heaps[why], max(1, self._count // 4)
            for row in np.argsort(-scores)[:room].tolist():
                entry = (float(scores[row]), -(self._seen + row))
                if entry[0] > 0 and (len(heap) < room or entry > heap[0][:2]):
                    heapq.heappush(heap, (*entry, take(chunk, [row])))
                    if len(heap) > room:
                        heapq.heappop(heap)
        for row in range(len(chunk.lengths)):
            # Keep every second of those kept once there are too many: at even distances in the end.
            self._even.append((self._seen + row, take(chunk, [row]))) if self._due(self._seen + row) else None
        self._seen += len(chunk.lengths)

    _stride = 1

    def _due(self, index: int) -> bool:
        if len(self._even) >= 2 * max(1, self._count // 2):
            self._even, self._stride = self._even[::2], 2 * self._stride
        return index % self._stride == 0

    def chosen(self) -> list[tuple[str, Chunk]]:
        """Return (why, response), each response once."""
        found: dict[int, tuple[str, Chunk]] = {}
        for why, heap in self._heaps.items():
            for _, index, one in sorted(heap, key=lambda entry: entry[:2], reverse=True):
                found.setdefault(-index, (why, one))
        for index, one in self._even[: max(1, self._count // 2)]:
            found.setdefault(index, ("at even distances", one))
        chosen, room = list(found.values()), _SHOWN_TOKENS
        # Of each kind in turn, so that long responses of one do not push out the others.
        chosen = [one for _, one in sorted(_numbered(chosen), key=lambda entry: entry[0])]
        return [one for place, one in enumerate(chosen) if (room := room - len(one[1].token_ids)) >= 0 or place == 0]


def _numbered(chosen: list[tuple[str, Chunk]]) -> list[tuple[int, tuple[str, Chunk]]]:
    """Return each response with its place among those chosen for the same reason."""
    seen: dict[str, int] = {}
    numbered = []
    for one in chosen:
        seen[one[0]] = seen.get(one[0], -1) + 1
        numbered.append((seen[one[0]], one))
    return numbered


def suggest(sample: Chunk, method: Method, wanted: float) -> dict[str, Any]:
    """Return thresholds of CPPO under which a wanted share of these tokens would be masked, and a grid around them.

    Half of the share is left to the token rule, half to the prefix budget.

    Args:
        sample: responses.
        method: the run's own; its divergence and w_min are kept, if it is CPPO.
        wanted: the masked share, in (0, 1).
    """
    base: dict[str, Any] = {"divergence": getattr(method, "divergence", "binary_tv")}
    if base["divergence"] not in ("binary_tv", "binary_kl", "topk_tv", "topk_kl"):
        base["divergence"] = "binary_tv"
    if isinstance(method, CPPO):
        base |= {
            "w_min": method.w_min,
            "position": method.position,
            "budget": method.budget if method.budget != "none" else "adaptive",
        }
    decision = decide_chunk(CPPO(**base, delta=1e15), sample)
    usable = decision.batch.tokens().usable.numpy()
    outward = usable & (decision.batch.advantages * decision.batch.tokens().log_ratio > 0).numpy()
    assert decision.trace.weighted_divergence is not None
    values = np.sort(decision.trace.weighted_divergence.numpy()[outward])[::-1]
    tokens = int(sample.response_mask.sum())

    def delta_for(share: float) -> float | None:
        rank = int(share * tokens)
        return float(values[rank]) if rank < len(values) and values[rank] > 0 else None

    def masked(delta: float, delta_b: float) -> float:
        codes = decide_chunk(CPPO(**base, delta=delta, delta_b=delta_b), sample).rejected_by.numpy()
        return float((codes[sample.response_mask] > 0).sum() / max(1, tokens))

    delta, delta_b = delta_for(wanted / 2), None
    if delta is not None:
        low, high = 0.0, delta
        for _ in range(12):  # the masked share falls as the budget grows
            middle = (low + high) / 2
            low, high = (middle, high) if masked(delta, middle) > wanted else (low, middle)
        delta_b = high
    grid = [[masked(d, b) for b in _BUDGETS] for d in _DELTAS] if tokens else []
    return {
        "wanted": wanted,
        "settings": base,
        "token_delta": number(delta_for(wanted)) if delta_for(wanted) is not None else None,
        "delta": None if delta is None else number(delta),
        "delta_b": None if delta_b is None else number(delta_b),
        "masked": None if delta is None or delta_b is None else number(masked(delta, delta_b)),
        "paper": _PAPER | {"masked": number(masked(_PAPER["delta"], _PAPER["delta_b"])) if tokens else None},
        "grid": {"delta": list(_DELTAS), "delta_b": list(_BUDGETS), "masked": [numbers(np.array(r)) for r in grid]},
        "tokens": tokens,
    }


def own_method(path: Path, log: Log) -> str | None:
    """Return the method that judged a log: what a ``cppo train`` run's folder says, else what the log itself does."""
    import yaml

    file = path / "config.yaml"
    if not file.is_file():
        return log.method
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return log.method
    method = config.get("method") if isinstance(config, dict) else None
    return method if isinstance(method, str) else log.method
