"""What the adapters share for stacks that keep the sampled token's log-prob alone."""

from __future__ import annotations

from typing import Any

from cppo.methods import METHODS, Method, make_method, needed_inputs, never_rejects, parse_method


def method_for(stack: str, method: Method | str, **knobs: Any) -> Method:
    """Return the method that a stack's configuration names, if the sampled tokens' log-probs are all it needs.

    Args:
        stack: the framework's name, for the error.
        method: a method, its name with its knobs beside it, or a spec such as ``cppo?delta=0.15&delta_b=0.02``.
        **knobs: the method's knobs, where ``method`` is a bare name; None: the method's default.

    Raises:
        TypeError, ValueError: for an unknown method or knob, a knob out of range, a method that needs what the stack
            does not hand over, or thresholds that no token can reach.
    """
    given = {name: value for name, value in knobs.items() if value is not None}
    if isinstance(method, str):
        bare = "?" not in method
        if given and not bare:
            raise ValueError(f"method={method!r}: expected its knobs in one place, got {', '.join(given)} besides")
        method = make_method(method, **given) if bare else parse_method(method)
    elif not isinstance(method, tuple(METHODS.values())):
        raise TypeError(f"method: expected a name, a spec or a method of cppo.METHODS, got {type(method).__name__}")
    elif given:
        raise ValueError(f"method={method!r}: expected its knobs in it, got {', '.join(given)} besides")
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
