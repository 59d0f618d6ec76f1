"""Which responses of a log are shown whole, and which tokens its own method rejected most."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cppo.inspect.reading import Chunk, take
from cppo.inspect.statement import TokenTexts
from cppo.printable import printable

SHOWN_TOKENS = 20_000  # of all responses that are shown
_REJECTED_TOKENS = 20  # listed


class RejectedTokens:
    """How often each token was written, and rejected by the run's own method."""

    def __init__(self) -> None:
        self._counts: dict[int, list[int]] = {}

    def add(self, chunk: Chunk, codes: NDArray[np.int8]) -> None:
        """Count a chunk; ``codes`` are the own method's ``rejected_by``."""
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


class Shown:
    """The responses that are worth a look: the most rejected, those that drifted most, and some at even distances."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._heaps: dict[str, list[tuple[float, int, Chunk]]] = {"most rejected": [], "largest drift": []}
        self._even: list[tuple[int, Chunk]] = []
        self._seen, self._stride = 0, 1

    def add(self, chunk: Chunk, codes: NDArray[np.int8]) -> None:
        """Look at a chunk; ``codes`` are the own method's ``rejected_by``."""
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
            if (self._seen + row) % self._stride == 0:
                self._even.append((self._seen + row, take(chunk, [row])))
            # Of too many, every second: at even distances in the end.
            if len(self._even) >= 2 * max(1, self._count // 2):
                self._even, self._stride = self._even[::2], 2 * self._stride
        self._seen += len(chunk.lengths)

    def chosen(self) -> list[tuple[str, Chunk]]:
        """Return (why, response), each response once."""
        found: dict[int, tuple[str, Chunk]] = {}
        for why, heap in self._heaps.items():
            for _, index, one in sorted(heap, key=lambda entry: entry[:2], reverse=True):
                found.setdefault(-index, (why, one))
        for index, one in self._even[: max(1, self._count // 2)]:
            found.setdefault(index, ("at even distances", one))
        chosen, room = list(found.values()), SHOWN_TOKENS
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
