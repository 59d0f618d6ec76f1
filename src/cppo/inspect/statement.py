"""One response as a bank statement: what each token may spend, spends, and leaves; with its text, token by token."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cppo.inspect.reading import Chunk
from cppo.inspect.replay import decide_chunk
from cppo.methods import Method
from cppo.printable import printable

_TRACE = ("position_weight", "divergence", "weighted_divergence", "prior_account", "threshold")


def statement(one: Chunk, methods: dict[str, Method], texts: TokenTexts | None, limit: int) -> dict[str, Any]:
    """Return one response's account under each method, as plain lists of one length.

    Args:
        one: a chunk of one response, with its texts.
        methods: by spec.
        texts: cuts ids into texts, where a tokenizer is at hand.
        limit: how many tokens are written down; the response is judged whole.
    """
    tokens = None if texts is None else texts(one.token_ids[:limit].tolist())
    judged = {}
    for spec, method in methods.items():
        decision = decide_chunk(method, one)
        trace = {name: getattr(decision.trace, name) for name in _TRACE}
        entry: dict[str, Any] = {
            name: numbers(value.numpy()[:limit]) for name, value in trace.items() if value is not None
        }
        if decision.trace.delta_b is not None:
            entry["delta_b"] = numbers(decision.trace.delta_b.numpy())[0]
        entry["rejected_by"] = decision.rejected_by[:limit].tolist()
        entry["coefficient"] = numbers(decision.coefficient.numpy()[:limit])
        judged[spec] = entry
    assert one.prompt is not None
    assert one.response is not None
    return {
        "file": printable(one.file[0].name),
        "row": int(one.row[0]),
        "step": int(one.step[0]),
        "reward": number(one.reward[0]),
        "advantage": number(one.advantage[0]),
        "prompt": None if one.prompt[0] is None else printable(one.prompt[0]),
        "response": None if one.response[0] is None else printable(one.response[0]),
        "tokens": None if tokens is None else [printable(token) for token in tokens],
        "token_ids": one.token_ids[:limit].tolist(),
        "logp": numbers(one.logp[:limit]),
        "rollout_logp": numbers(one.rollout_logp[:limit]),
        "response_mask": one.response_mask[:limit].tolist(),
        "length": len(one.token_ids),
        "methods": judged,
    }


def number(value: Any) -> float | None:
    """Return a number for JSON: six digits, None for what is not finite."""
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None


def numbers(values: NDArray[Any]) -> list[float | None]:
    """Return numbers for JSON."""
    return [number(value) for value in np.asarray(values).reshape(-1).tolist()]


class TokenTexts:
    """Cuts a response's text into its tokens' texts, by a ``tokenizer.json`` that lies by the log."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        try:
            json.loads(file.read_bytes())
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001  the library raises a bare Exception
            raise ValueError(f"{file}: cannot be read as a tokenizer: {str(error).splitlines()[0]}") from None

    @staticmethod
    def find(path: Path) -> Path | None:
        """Return the ``tokenizer.json`` of a run's folder, if there is one."""
        for pattern in ("tokenizer.json", "*/tokenizer.json", "*/*/tokenizer.json"):
            found = sorted(path.glob(pattern)) if path.is_dir() else []
            if found:
                return found[0]
        return None

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token; a token that is a part of a character has it with the last of its parts."""
        texts, begun = [], 0
        for end in range(1, len(ids) + 1):
            known = [token for token in ids[begun:end] if token >= 0]  # the library knows no others
            text = self._tokenizer.decode(known, skip_special_tokens=False)
            whole = not text.endswith("\ufffd") or end - begun >= 4 or end == len(ids)
            texts.append(text if whole else "")
            if whole:
                begun = end
        return texts
