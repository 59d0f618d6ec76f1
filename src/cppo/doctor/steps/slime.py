"""slime: its loss needs an initialised Megatron, so that only what the adapter calls is looked at."""

from __future__ import annotations

import inspect
from typing import Any

# function -> how cppo.adapters.slime calls it: (number of positional arguments, names of the others)
_LOSS: dict[str, tuple[int, tuple[str, ...]]] = {
    "get_log_probs_and_entropy": (
        1, ("args", "unconcat_tokens", "with_entropy", "total_lengths", "response_lengths"),
    ),
    "get_rollout_top_p_logprob_kwargs": (2, ()),
    "load_function": (1, ()),
    "compute_approx_kl": (2, ("kl_loss_type", "importance_ratio")),
}  # fmt: skip
_CUTTING: dict[str, tuple[int, tuple[str, ...]]] = {
    "get_logits_and_tokens_offset_with_cp": (2, ()),
    "slice_log_prob_with_cp": (3, ()),
}


def check() -> str:
    """Return what was checked.

    Raises:
        ValueError: if slime has not what the adapter calls, or does not call what the adapter offers.
    """
    from slime.backends.megatron_utils import cp_utils, loss

    for module, calls in ((loss, _LOSS), (cp_utils, _CUTTING)):
        for name, call in calls.items():
            _check_call(module, name, *call)
    source = inspect.getsource(loss.loss_function)
    for expected in ("custom_loss", "custom_loss_function_path"):
        if expected not in source:
            raise ValueError(f"slime's loss_function does not read {expected}: expected --loss-type custom_loss's hook")
    return (
        "the functions that cppo.adapters.slime calls are there and take its arguments; the gradient was not compared, "
        "because slime's loss needs an initialised Megatron"
    )


def _check_call(module: Any, name: str, positional: int, named: tuple[str, ...]) -> None:
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{module.__name__}.{name}: expected a function, which cppo.adapters.slime calls")
    try:
        inspect.signature(function).bind(*[None] * positional, **dict.fromkeys(named))
    except TypeError as error:
        raise ValueError(f"{module.__name__}.{name}: {error}; cppo.adapters.slime calls it so") from None
