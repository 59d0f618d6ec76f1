"""What a rollout log holds that it should not: counted, and the first of each kind named by file, row and column."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cppo.inspect.columns import first
from cppo.inspect.reading import Chunk
from cppo.methods import Method, needed_inputs
from cppo.metrics import ROUNDING


@dataclasses.dataclass
class Oddity:
    """How often something occurs, where first, and its largest value."""

    count: int = 0
    first: str = ""
    largest: float = 0.0

    def add(self, count: int, place: str, largest: float = 0.0) -> None:
        """Count some, the first of them at ``place``."""
        self.first = self.first or place
        self.count, self.largest = self.count + count, max(self.largest, largest)


class Oddities:
    """Adds up one log, chunk by chunk.

    Args:
        methods: those that judge the log; a measured divergence is looked at where one of them uses it.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        self.no_log_prob, self.log_prob_above_0 = Oddity(), Oddity()
        self.no_divergence, self.divergence_above_1 = Oddity(), Oddity()
        self.in_two_files = Oddity()
        used = {str(getattr(m, "divergence", "")) for m in methods if "divergence" in needed_inputs(m)}
        self.measured_by = sorted(used)
        self._step = -1
        self._seen: dict[bytes, Path] = {}  # the current update's responses, each in the first file that has it

    def add(self, chunk: Chunk) -> None:
        """Count a chunk; it must have its texts."""
        columns = {"logp": chunk.logp, "rollout_logp": chunk.rollout_logp}
        self._count(self.no_log_prob, chunk, {name: ~np.isfinite(values) for name, values in columns.items()})
        above = {name: (values > ROUNDING) & np.isfinite(values) for name, values in columns.items()}
        self._count(self.log_prob_above_0, chunk, above, columns)
        if self.measured_by and chunk.divergence is not None:
            measured = chunk.divergence
            self._count(self.no_divergence, chunk, {"divergence": ~np.isfinite(measured) | (measured < -ROUNDING)})
            if any(name.endswith("_tv") for name in self.measured_by):
                high = (measured > 1 + ROUNDING) & np.isfinite(measured)
                self._count(self.divergence_above_1, chunk, {"divergence": high}, {"divergence": measured})
        self._find_repeated(chunk)

    def _count(
        self,
        oddity: Oddity,
        chunk: Chunk,
        flags: dict[str, NDArray[np.bool_]],
        values: dict[str, NDArray[Any]] | None = None,
    ) -> None:
        """Count the response tokens of which a column is flagged, and the largest of those values."""
        mine = {name: flag & chunk.response_mask for name, flag in flags.items()}
        either = np.logical_or.reduce(list(mine.values()))
        if not either.any():
            return
        token = first(either)
        column = next(name for name, flag in mine.items() if flag[token])
        row = int(np.searchsorted(chunk.offsets, token, side="right")) - 1
        largest = 0.0 if values is None else max(float(values[n][f].max()) for n, f in mine.items() if f.any())
        oddity.add(int(np.count_nonzero(either)), f"{chunk.place(row)}, column {column!r}", largest)

    def _find_repeated(self, chunk: Chunk) -> None:
        """Count responses that stand in two files: the same update, prompt, tokens and sampler's log-probs."""
        assert chunk.prompt is not None
        offsets = chunk.offsets.tolist()
        for row, step in enumerate(chunk.step.tolist()):
            if step != self._step:  # updates come in order
                self._step, self._seen = step, {}
            tokens = slice(offsets[row], offsets[row + 1])
            if tokens.start == tokens.stop:
                continue
            content = hashlib.blake2b(repr(chunk.prompt[row]).encode(), digest_size=16)
            content.update(chunk.token_ids[tokens].tobytes())
            content.update(chunk.rollout_logp[tokens].tobytes())
            if self._seen.setdefault(content.digest(), chunk.file[row]) != chunk.file[row]:
                self.in_two_files.add(1, chunk.place(row))
