"""The process behind ``verifiers``: reads a JSON request a line, writes a score a line.

A script that imports nothing of this package, so that it starts without torch. A request that takes more than two
seconds, exhausts the memory limit or makes a library fail scores 0; what even the timer cannot interrupt is the
parent's to kill.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

LIMIT_SECONDS = 2.0
MEMORY_BYTES = 4 << 30


class OutOfTimeError(BaseException):
    """Not an Exception, so that libraries that catch those let it pass."""


def _out_of_time(signum: int, frame: FrameType | None) -> None:
    raise OutOfTimeError


def math_score(answer: str, completion: str) -> float:
    """1 if the two are equal as mathematics, else 0. Math-Verify's own timeouts are off: they need whole seconds."""
    import math_verify

    parse = functools.partial(math_verify.parse, parsing_timeout=None)
    plain = "$" not in answer and "\\boxed" not in answer
    gold = parse(f"${answer}$" if plain else answer)
    if not gold:
        return 0.0
    return float(math_verify.verify(gold, parse(completion), timeout_seconds=None))


@functools.lru_cache(maxsize=16)
def _dataset(name: str, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(options))


def scorer(request: dict[str, Any]) -> Callable[[], float]:
    """What computes the score that a request asks for; the data set is loaded here, before the time runs."""
    if request["kind"] == "math":
        return lambda: math_score(request["answer"], request["completion"])
    dataset = _dataset(request["dataset"], json.dumps(request["options"]))
    return lambda: float(dataset.score_answer(request["answer"], request["entry"]))


def guarded_score(line: str) -> float:
    """The score, or 0 where computing it fails or takes too long."""
    timed = hasattr(signal, "setitimer")
    try:
        compute = scorer(json.loads(line))
        try:
            if timed:  # again and again: a bare except in a library must not lift the limit
                signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS, 0.1)
            return compute()
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_REAL, 0)
    except (Exception, OutOfTimeError):  # noqa: BLE001 - whatever a text does to a library, it is not a right answer
        return 0.0


def _import_libraries() -> None:
    # Before the first request, so that no request pays for it. The parent has checked that the one it needs is there.
    for name in ("math_verify", "reasoning_gym"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def main() -> None:
    """Answer requests until the parent closes the pipe."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")
    sys.stdout = sys.stderr  # libraries that print must not write into the replies
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, _out_of_time)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    _import_libraries()
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        print(guarded_score(line), file=replies, flush=True)


if __name__ == "__main__":
    main()
