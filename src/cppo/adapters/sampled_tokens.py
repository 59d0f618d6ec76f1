"""What the adapters share for stacks that keep the sampled token's log-prob alone."""

from __future__ import annotations

from typing import Any

from cppo.methods import Method, as_method, make_method, needed_inputs, never_rejects


def method_for(stack: str, method: Method | str, **knobs: Any) -> Method:
    """Return the method that a stack's configuration names, if the sampled tokens' log-probs are all it needs.

    Args:
        stack: the framework's name, for the error.
        method: a method, its name with its knobs beside it, or a spec such as ``cppo?delta=0.15&delta_b=0.02``.
        **knobs: the method's knobs, where ``method`` is a bare name; those that are not given have its defaults.

    Raises:
        TypeError, ValueError: for an unknown method or knob, a knob out of range, a method that needs what the stack
            does not hand over, or thresholds that no token can reach.
    """
    if isinstance(method, str) and "?" not in method:
        method = make_method(method, **knobs)
    elif knobs:
        raise ValueError(f"method={method!r}: expected its knobs in one place, got {', '.join(knobs)} besides")
    else:
        method = as_method(method)
    needed = needed_inputs(method)
    if needed:
        raise ValueError(
            f"method: expected one that needs no {' and no '.join(needed)}, got {method!r}; {stack} keeps the sampled "
            "token's log-prob alone (divergence=binary_tv and binary_kl need no more)"
        )
    silent = never_rejects(method)
    if silent:
        raise ValueError(silent)
    return method
