"""The trust regions, one frozen dataclass a method. No torch here: a configuration can be read anywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import quote

from cppo.specs import parse_spec

from .checks import DIVERGENCES, ESTIMATORS, SAMPLED_DIVERGENCES, TOPK_DIVERGENCES, Divergence, Summary
from .corrections import CORRECTIONS, MIS, TIS, Correction, GeometricMask, IcePop
from .divergence_regions import CPPO, DPPO, DRPO, ESTR, IPO, TRM, TRMAvg, TRMMax
from .limits import never_rejects
from .ratio_regions import CISPO, CTPO, GMPO, GRPO, GSPO, PNPO, SAPO, MinPRO, PolicyGradient
from .settings import SETTINGS, Setting

Method = (
    CPPO | DPPO | IPO | DRPO | TRM | ESTR | GRPO | CISPO | MinPRO | GSPO | SAPO | GMPO | PNPO | CTPO | PolicyGradient
)

Kind = TypeVar("Kind")

METHODS: dict[str, type[Method]] = {
    "cppo": CPPO,
    "dppo": DPPO,
    "ipo": IPO,
    "drpo": DRPO,
    "trm_max": TRMMax,
    "trm_avg": TRMAvg,
    "trm": TRM,
    "estr": ESTR,
    "grpo": GRPO,
    "cispo": CISPO,
    "minpro": MinPRO,
    "gspo": GSPO,
    "sapo": SAPO,
    "gmpo": GMPO,
    "pnpo": PNPO,
    "ctpo": CTPO,
    "policy_gradient": PolicyGradient,
}


def make_method(name: str, **knobs: Any) -> Method:
    """Return the method of that name with those knobs; one clear error for an unknown name or knob."""
    return _make("method", METHODS, name, knobs)


def _make(role: str, kinds: Mapping[str, type[Kind]], name: str, knobs: Mapping[str, Any]) -> Kind:
    if name not in kinds:
        hint = ", a correction," if role == "method" and name in CORRECTIONS else ""
        raise ValueError(f"{role}={name!r}{hint}: expected one of {', '.join(kinds)}")
    fields = dataclasses.fields(kinds[name])  # type: ignore[arg-type]  # all are dataclasses
    known = [field.name for field in fields]
    for knob in knobs:
        if knob not in known:
            raise ValueError(f"{name} has no knob {knob!r}: expected one of {', '.join(known)}")
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in knobs:
            raise ValueError(f"{name} needs a value for {field.name!r}: no published one is known")
    return kinds[name](**knobs)


def parse_method(spec: str) -> Method:
    """Return the method written as ``name?knob=value&knob=value``, such as ``cppo?budget=fixed&delta_b=0.015``."""
    return _make("method", METHODS, *parse_spec(spec))


def as_method(method: object) -> Method:
    """Return a method as it is, and the one that a spec writes (see :func:`parse_method`).

    Raises:
        TypeError: for anything else.
        ValueError: for a spec of an unknown method or knob.
    """
    if isinstance(method, str):
        return parse_method(method)
    if isinstance(method, Method):
        return method
    raise TypeError(f"method={method!r}: expected a method such as cppo.CPPO(), or a spec such as 'cppo?delta=0.15'")


def parse_correction(spec: str) -> Correction:
    """Return the correction written as ``name?knob=value&knob=value``, such as ``icepop?high=4``."""
    return _make("correction", CORRECTIONS, *parse_spec(spec))


def takes_topk(method: Method) -> bool:
    """Return True for a method whose divergence is measured on the rollout policy's likeliest tokens."""
    return getattr(method, "divergence", "binary_tv") in TOPK_DIVERGENCES


def needed_inputs(method: Method, *, topk: bool = False) -> tuple[str, ...]:
    """Return which arguments of ``decide`` the method needs besides the sampled tokens' log-probs and advantages.

    Args:
        method: the method.
        topk: whether a top-K divergence can be measured, so that it need not be asked for.
    """
    measured = getattr(method, "divergence", "binary_tv") not in SAMPLED_DIVERGENCES
    missing = measured and not (topk and takes_topk(method))
    return (*(("divergence",) if missing else ()), *method.summary.needs)


def method_spec(method: Method) -> str | None:
    """Return the method as ``name?knob=value&knob=value`` (knobs at their defaults left out), which parses back to it.

    None for a method with a knob that text cannot hold, such as a gate of one's own.
    """
    knobs = {
        field.name: value
        for field in dataclasses.fields(method)
        if (value := getattr(method, field.name)) != field.default
    }
    options = "&".join(f"{name}={quote(str(value))}" for name, value in knobs.items())
    spec = f"{method_name(method)}?{options}" if options else method_name(method)
    try:
        return spec if parse_method(spec) == method else None
    except (TypeError, ValueError):
        return None


def method_name(method: Method) -> str:
    """Return the name under which the method's class stands in :data:`METHODS`."""
    return next(name for name, kind in METHODS.items() if kind is type(method))


__all__ = [
    "CISPO",
    "CORRECTIONS",
    "CPPO",
    "CTPO",
    "DIVERGENCES",
    "DPPO",
    "DRPO",
    "ESTIMATORS",
    "ESTR",
    "GMPO",
    "GRPO",
    "GSPO",
    "IPO",
    "METHODS",
    "MIS",
    "PNPO",
    "SAMPLED_DIVERGENCES",
    "SAPO",
    "SETTINGS",
    "TIS",
    "TOPK_DIVERGENCES",
    "TRM",
    "Correction",
    "Divergence",
    "GeometricMask",
    "IcePop",
    "Method",
    "MinPRO",
    "PolicyGradient",
    "Setting",
    "Summary",
    "TRMAvg",
    "TRMMax",
    "as_method",
    "make_method",
    "method_name",
    "method_spec",
    "needed_inputs",
    "never_rejects",
    "parse_correction",
    "parse_method",
    "takes_topk",
]
