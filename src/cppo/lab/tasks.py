"""Tasks by name: what a run trains on and is evaluated on."""

from __future__ import annotations

import dataclasses
from typing import Any

from cppo.lab.long_tail_sum import LongTailSum
from cppo.lab.math_task import MathFile
from cppo.lab.problems import Demonstrable, Problem, Split, Task
from cppo.lab.reasoning_gym_task import ReasoningGym
from cppo.lab.running_sum import RunningSum
from cppo.specs import parse_spec

__all__ = [
    "TASKS", "Demonstrable", "LongTailSum", "MathFile", "Problem", "ReasoningGym", "RunningSum", "Split", "Task",
    "make_task",
]  # fmt: skip

# name -> how it is written
TASKS = {
    "running_sum": "running_sum, running_sum?operands=16&strict=true",
    "long_tail_sum": "long_tail_sum, long_tail_sum?values=2048",
    "reasoning_gym": "reasoning_gym:NAME, reasoning_gym:chain_sum?max_terms=2&few_shot=2",
    "math": "math:PATH.jsonl, math:PATH.jsonl?max_completion_tokens=256",
}

_SUMS: dict[str, type[RunningSum] | type[LongTailSum]] = {"running_sum": RunningSum, "long_tail_sum": LongTailSum}


def make_task(name: str, **options: Any) -> Task:
    """The task of a name; options follow a "?" as in a web address, or are keyword arguments.

    Args:
        name: "running_sum", "long_tail_sum", "reasoning_gym:NAME" or "math:PATH". Values after "?" are
            numbers, true, false, JSON lists or, if none of these, text.
        options: the same options, as Python values; for "reasoning_gym" also those of the data set.

    Raises:
        ValueError: for an unknown task or option, an option given twice, or a value out of its range.
        FileNotFoundError: for a file of problems that does not exist.
    """
    address, given = parse_spec(name)
    kind, _, target = address.partition(":")
    if kind not in TASKS or (kind in _SUMS) != (address == kind) or (kind not in _SUMS and not target):
        raise ValueError(f"name={name!r}: no such task; expected one of {'; '.join(TASKS.values())}")
    if twice := given.keys() & options.keys():
        raise ValueError(f"{name!r}: the option {min(twice)!r} is given twice; expected it once")
    options = given | options
    if kind in _SUMS:
        _check_known(name, options, [field.name for field in dataclasses.fields(_SUMS[kind])])
        return _SUMS[kind](**options)
    if kind == "math":
        _check_known(name, options, ["max_completion_tokens"])
        return MathFile(target, **options)
    own = {key: options.pop(key) for key in ("few_shot", "max_completion_tokens") if key in options}
    return ReasoningGym(target, dataset_options=options, **own)


def _check_known(name: str, options: dict[str, Any], known: list[str]) -> None:
    for option, value in options.items():
        if option not in known:
            raise ValueError(
                f"name={name!r}: {option}={value!r} is no option of it; expected one of {', '.join(known)}"
            )
