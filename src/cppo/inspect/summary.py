"""What ``cppo inspect`` says about a log, as one document of plain numbers: --json prints it, the page shows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cppo.inspect.advice import Evidence, as_dict, findings
from cppo.inspect.examples import SHOWN_TOKENS, RejectedTokens, Shown
from cppo.inspect.measures import Measures, divide
from cppo.inspect.oddities import Oddities
from cppo.inspect.reading import Chunk, Log
from cppo.inspect.replay import BINS, PROBABILITIES, Judged, Replay, replayable
from cppo.inspect.statement import TokenTexts, number, numbers, statement
from cppo.inspect.thresholds import Sample, suggest
from cppo.methods import CPPO, Method, method_name, parse_method
from cppo.printable import printable

FORMAT = 1
# Judged beside the run's own method unless others are asked for: every method at its default knobs.
BESIDE = (
    "cppo", "dppo", "ipo", "trm", "trm_max", "trm_avg", "grpo", "minpro", "gspo", "sapo", "cispo", "policy_gradient",
)  # fmt: skip


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
    steps, measured = log.survey()
    progress(log.responses)
    specs, left_out = [own], {}
    for spec in beside:
        reason = replayable(parse_method(spec), measured)
        if reason is not None:
            left_out[spec] = reason
        elif parse_method(spec) not in [parse_method(known) for known in specs]:
            specs.append(spec)
    reason = replayable(parse_method(own), measured)
    if reason is not None:
        raise ValueError(f"method={own!r}: {reason}; expected a method that can judge it, such as cppo")
    replayed, measures = Replay(specs, steps), Measures(steps)
    shown, sample, rejected = Shown(responses), Sample(log.tokens), RejectedTokens()
    oddities = Oddities([item.method for item in replayed.judged])

    def add(chunk: Chunk) -> None:  # whose arrays go when it returns
        coefficient, codes = replayed.add(chunk)
        oddities.add(chunk)
        measures.add(chunk, coefficient * np.abs(np.repeat(chunk.advantage, chunk.lengths)))
        shown.add(chunk, codes)
        rejected.add(chunk, codes)
        sample.add(chunk)
        progress(len(chunk.lengths))

    for chunk in log.chunks(texts=True):
        add(chunk)
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
        "divergence": "measured" if measured else "from the sampled tokens",
        "series": {name: numbers(values) for name, values in series.items()},
        "positions": {
            "mean": numbers(measures.by_bin.mean()),
            "tail": numbers(measures.by_bin.tail()),
            "tokens": measures.by_bin.counts.sum(1).tolist(),
            "allowance": _allowance(judged[0].method),
            "allowance_note": _allowance_note(judged[0].method),
        },
        "probabilities": {
            "edges": list(PROBABILITIES),
            "tokens_positive": judged[0].by_probability[:, 2].sum(1).tolist(),
            "tokens_negative": judged[0].by_probability[:, 0].sum(1).tolist(),
        },
        "methods": [_method_entry(item, judged[0]) for item in judged],
        "left_out": left_out,
        "rejected_tokens": rejected.most(texts),
        "suggestion": suggestion,
        "findings": [
            as_dict(found)
            for found in findings(Evidence(series, measures, oddities, judged[0], suggestion["token_delta"], wanted))
        ],
        "examples": [statement(one, methods, texts, SHOWN_TOKENS) | {"why": why} for why, one in shown.chosen()],
    }


def _allowance(method: Method) -> list[float | None] | None:
    """Return delta / w_t in the middle of each bin, for a threshold on D where D is a total variation.

    None where w_t does not follow from the position (shuffled weights).
    """
    delta = getattr(method, "delta", None)
    weights = getattr(method, "position", "uniform")
    if delta is None or weights == "shuffled" or not str(getattr(method, "divergence", "")).endswith("_tv"):
        return None
    w_min = method.w_min if isinstance(method, CPPO) and weights == "linear" else 1.0
    middle = (np.arange(BINS) + 0.5) / BINS
    return numbers(delta / (1 - (1 - w_min) * middle))


def _allowance_note(method: Method) -> str | None:
    """Return what takes the allowance's place in the picture where the weights are shuffled."""
    if not isinstance(method, CPPO) or method.position != "shuffled":
        return None
    return (
        f"The own method's weights are shuffled within each response: what it allows lies between {method.delta:.3g} "
        f"and {method.delta / method.w_min:.3g} at any position."
    )


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
        "delta_b_by_step": numbers(divide(item.delta_b[:, 0], item.delta_b[:, 1]))
        if item.delta_b[:, 1].any()
        else None,
        "masked_by_position": numbers(_share(by_bin)),
        "budget_by_position": numbers(by_bin[:, 2] / np.maximum(1, by_bin.sum(1))),
        "masked_positive_by_probability": numbers(
            divide(item.by_probability[:, 2, 1], item.by_probability[:, 2].sum(1))
        ),
        "masked_negative_by_probability": numbers(
            divide(item.by_probability[:, 0, 1], item.by_probability[:, 0].sum(1))
        ),
    }


def _share(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(counts[:, 1:].sum(1) / np.maximum(1, counts.sum(1)))
