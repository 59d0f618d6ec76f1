"""``name?key=value&key=value``: how methods and tasks with options are written on a command line and in a config."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qsl, quote


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of ``name?key=value&...``.

    Values are numbers, true, false, None, JSON lists or, if none of these, text.

    Raises:
        ValueError: if the part after "?" is not ``key=value&...``, or names a key twice.
    """
    if not isinstance(text, str):
        raise TypeError(f"{text!r}: expected text such as NAME?OPTION=VALUE")
    name, _, query = text.partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise ValueError(f"{text!r}: cannot read the options {query!r}; expected NAME=VALUE&NAME=VALUE") from None
    options: dict[str, Any] = {}
    for key, value in pairs:
        if key in options:
            raise ValueError(f"{text!r}: the option {key!r} is given twice; expected it once")
        options[key] = _parse_value(value)
    return name, options


def with_option(text: str, key: str, value: str) -> str:
    """Return the spec with that option set, in the place of another value of it."""
    name, _, query = text.partition("?")
    parts = [part for part in query.split("&") if part and part.partition("=")[0] != key]
    return f"{name}?{'&'.join([*parts, f'{key}={quote(value)}'])}"


def _parse_value(text: str) -> object:
    words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    if text == "None":  # as `cppo methods` prints it; "none" is a word of its own
        return None
    for read in (json.loads, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text
