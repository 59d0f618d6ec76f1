"""Is the installed stack giving the gradient we mean? Versions, a self-test of each stack, the traps of a launch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .finding import Finding
from .launches import judge
from .reading import read
from .self_tests import SELF_TESTS as _SELF_TESTS
from .versions import examine as examine_versions
from .versions import installed

__all__ = ["Finding", "examine"]


def examine(config: Path | None = None) -> Iterator[Finding]:
    """Look at the installed versions, run each installed stack's self-test, and read a launch, if one is given.

    Args:
        config: a launch of a stack: a .yaml or .toml file, or one that holds a launch command
            (:data:`cppo.doctor.reading.KNOWN` lists them).

    Yields:
        A :class:`Finding` at a time.

    Raises:
        ValueError: if ``config`` cannot be read, or is none of them.
    """
    launch = None if config is None else read(config)
    yield from examine_versions()
    for stack, test in _SELF_TESTS.items():
        if installed(stack) is not None:
            yield from test()
    if config is not None and launch is not None:
        yield from judge(config, launch)
