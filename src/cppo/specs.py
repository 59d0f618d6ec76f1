"""``name?key=value&key=value``: how methods and tasks with options are written on a command line and in a config."""

from __future__ import annotations

from urllib.parse import parse_qsl

Option = bool | int | float | str


def parse_spec(text: str) -> tuple[str, dict[str, Option]]:
    """Return the name and the options of ``name?key=value&...``; values become bool, int or float where they can.

    Raises:
        ValueError: if the part after "?" is not ``key=value&...``, or names a key twice.
    """
    name, _, query = text.partition("?")
    if not query:
        return name, {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise ValueError(f"{text!r}: expected name?key=value&key=value ({error})") from None
    options = {key: _parse_value(value) for key, value in pairs}
    if len(options) != len(pairs):
        raise ValueError(f"{text!r}: expected each key once")
    return name, options


def _parse_value(text: str) -> Option:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
