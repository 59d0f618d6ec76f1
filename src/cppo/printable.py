"""Text of others, made harmless: model text, names of files, metadata."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return text in which nothing steers a terminal or turns the line around: such characters as their escapes."""
    return "".join(letter if letter in "\n\t" or letter.isprintable() else _escape(letter) for letter in text)


def _escape(letter: str) -> str:
    # What str.isprintable refuses: control characters, directions, unassigned and private ones, lone surrogates; and
    # spaces other than the plain one, which are harmless.
    harmless = letter.isspace() and letter not in "\x1c\x1d\x1e\x1f\x0b\x0c\r\x85\u2028\u2029"
    return letter if harmless else f"\\u{ord(letter):04x}"
