"""The reward of the recipes: the answer on the response's last "Answer:" line, compared as mathematics."""

from __future__ import annotations

from cppo.lab.verifiers import math_score


def score(ground_truth: str, response: str) -> float:
    """1 if the response's answer is right, else 0; a response without "Answer:" or a box has none.

    Math-Verify alone would take the last number of a response that was cut off for its answer.
    """
    _, sign, answer = response.rpartition("Answer:")
    answer = answer.strip().partition("\n")[0] if sign else response if "\\boxed" in response else ""
    return math_score(ground_truth, answer) if answer else 0.0
