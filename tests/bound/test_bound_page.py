"""The tables of docs/theory.md are what the commands print."""

import io
import pathlib
import re

import pytest
from rich.console import Console

from cppo.bound import tables
from cppo.bound.constants import PAPER, constants
from cppo.bound.verify import verify
from cppo.certificate import __doc__ as certificate_page

pytestmark = pytest.mark.train

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "theory.md").read_text(encoding="utf-8")


def page_rows(heading):
    """Return the rows below a table's heading, as lists of cells."""
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading)) + 2
    rows = []
    while lines[start].startswith("|"):
        rows.append([cell.strip() for cell in lines[start].strip("|").split("|")])
        start += 1
    return rows


def printed(show, found):
    console = Console(record=True, width=220, file=io.StringIO())
    show(found, console)
    text = console.export_text().replace("|Delta|", "abs(Delta)")
    text = text.replace("|rho_t - 1||rho_j - 1|", "abs(rho_t - 1) abs(rho_j - 1)")
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_constants_of_the_page_are_printed():
    rows = page_rows("| setting | T | delta")
    lines = printed(tables.print_constants, [constants(setting, 0.5) for setting in PAPER])
    assert len(rows) == len(PAPER)
    for row in rows:
        assert " ".join(row) in lines, row


def test_the_certificates_keys_are_on_the_page():
    keys = set(re.findall(r"``(bound/\w+)``", certificate_page))
    assert len(keys) == 12
    assert keys == set(re.findall(r"`(bound/[a-z_]+)`", PAGE))


@pytest.mark.slow
def test_the_verdicts_of_the_page_are_printed():
    lines = printed(tables.print_verdicts, verify(4000, 0))
    verdicts, by_tokens = page_rows("| statement | claim"), page_rows("| statement | T = 2")
    assert (len(verdicts), len(by_tokens)) == (16, 12)
    for row in (*verdicts, *by_tokens):
        assert " ".join(row) in lines, row
