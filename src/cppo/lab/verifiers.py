"""Scores of responses. What a response's text can make slow (computer algebra) runs in a process that can be killed."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
from typing import Any

# A response is a few thousand tokens at most; its answer stands at its end. What lies before is not read.
MAX_COMPLETION_CHARACTERS = 8_192
MAX_ANSWER_CHARACTERS = 1_024
# Seconds: for the process to import its libraries; for one score (the process gives up by itself after 2, see there).
START_SECONDS = 120.0
SCORE_SECONDS = 10.0


def running_sum_score(sums: str, completion: str, ended: bool, *, strict: bool = False) -> float:
    """1 if the response ended right after one sum an operand and the last one (strict: every one) is right; else 0.

    Args:
        sums: the right running sums, one character each, at least one.
        completion: the response; one "." at its end is taken for the end token and ignored.
        ended: the policy stopped by itself.
        strict: compare the whole chain.
    """
    response = completion.removesuffix(".")
    if not ended or len(response) != len(sums):
        return 0.0
    return float(response == sums if strict else response[-1] == sums[-1])


def first_line(completion: str) -> str:
    """The text up to the first newline, stripped, at most 1,024 characters of it."""
    return completion.split("\n", 1)[0].strip()[:MAX_ANSWER_CHARACTERS]


def math_score(answer: str, completion: str) -> float:
    """1 if the completion's final answer equals ``answer`` as mathematics (Math-Verify), else 0.

    Runs in a separate process, so it works in every thread and a completion such as "9^9^9^9" costs at most seconds.
    Only the last 8,192 characters of the completion are read. An answer that does not parse is compared as text.

    Args:
        answer: the right answer: LaTeX, with or without dollars, a number, or a solution that boxes its answer.
        completion: the response, any text.

    Raises:
        ModuleNotFoundError: without math-verify.
        RuntimeError: if the separate process does not start. Never because of the completion.
    """
    require("math_verify", "math-verify")
    tail = completion[-MAX_COMPLETION_CHARACTERS:]
    if not answer.strip() or tail.strip() == answer.strip():
        return float(bool(answer.strip()))
    return _PROCESS.score({"kind": "math", "answer": answer, "completion": tail})


def reasoning_gym_score(dataset: str, options: dict[str, Any], entry: dict[str, Any], answer: str) -> float:
    """The score in [0, 1] that the data set itself gives to an answer; an answer on which its scorer fails gets 0.

    Runs in the same process as :func:`math_score`: some scorers evaluate the answer as an expression.

    Args:
        dataset: name in reasoning-gym.
        options: the data set's options.
        entry: the data set's own entry of the problem, JSON-able.
        answer: what the response gives as its answer; at most 1,024 characters are read.

    Raises:
        ModuleNotFoundError, RuntimeError: as :func:`math_score`.
    """
    require("reasoning_gym", "reasoning-gym")
    request = {"dataset": dataset, "options": options, "entry": entry, "answer": answer[:MAX_ANSWER_CHARACTERS]}
    return _PROCESS.score({"kind": "reasoning_gym", **request})


@functools.cache
def require(module: str, package: str) -> None:
    """Raise ModuleNotFoundError, with the way to install it, where a module is missing."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"{package} is not installed: expected the train extra, pip install 'cppo[train]'")


class _ScoringProcess:
    """One child process that scores, a request at a time; started when first needed, killed when it is late."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start afresh, without the child: in a fork it is the parent's, and so are the replies."""
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()

    def score(self, request: dict[str, Any]) -> float:
        """The child's reply in [0, 1]; 0 where there is none in time."""
        with self._lock:
            child = self._child
            if child is None or child.poll() is not None:
                child = self._start()
            try:
                assert child.stdin is not None
                child.stdin.write(json.dumps(request) + "\n")
                child.stdin.flush()
                reply = self._replies.get(timeout=SCORE_SECONDS)
            except (OSError, queue.Empty):
                reply = ""
            except BaseException:  # Ctrl-C: its reply must not be read as the next request's
                self.stop()
                raise
            if not reply:  # too late, or it died of this request: the next one gets a new process
                self.stop()
                return 0.0
            return min(1.0, max(0.0, float(reply)))

    def _start(self) -> subprocess.Popen[str]:
        script = pathlib.Path(__file__).with_name("verifier_worker.py")
        # -P: the folder of the script is not a place to import from.
        command = [sys.executable, "-P", str(script)]
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
        )
        self._child, self._replies = child, queue.SimpleQueue()
        threading.Thread(target=_pump, args=(child, self._replies), daemon=True).start()
        try:
            reply = self._replies.get(timeout=START_SECONDS)
        except queue.Empty:
            reply = ""
        if reply != "ready\n":
            self.stop()
            raise RuntimeError(f"the scoring process {command} did not start: it said {reply!r}, expected 'ready'")
        return child

    def stop(self) -> None:
        """End the child, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            if child.stdin is not None:
                child.stdin.close()


def _pump(child: subprocess.Popen[str], replies: queue.SimpleQueue[str]) -> None:
    """Move lines into the queue, at the end an empty one: pipes have no portable timeout, queues do."""
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            replies.put(line)
    replies.put("")


_PROCESS = _ScoringProcess()
atexit.register(_PROCESS.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_PROCESS.forget)
