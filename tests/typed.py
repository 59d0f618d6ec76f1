"""A command as a user types it, in this process: a new interpreter spends three seconds on imports."""

import contextlib
import dataclasses
import io
import os
import subprocess
import sys
from unittest import mock


@dataclasses.dataclass
class Done:
    """What ``subprocess.run`` would tell."""

    returncode: int
    stdout: str
    stderr: str


def typed(*words, cwd=None, columns=80):
    """Run ``cppo WORDS``; for commands that neither train nor start processes. An unforeseen error is raised here."""
    from cppo.cli import main

    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd or "."), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["cppo", *map(str, words)]),
        mock.patch.dict(os.environ, {"COLUMNS": str(columns)}),
    ):  # fmt: skip
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return Done(code, out.getvalue(), err.getvalue())


def in_a_process(*words, cwd=None):
    """Run ``cppo WORDS`` in a new interpreter, on one thread."""
    return subprocess.run(
        [sys.executable, "-m", "cppo", *map(str, words)], capture_output=True, text=True, cwd=cwd, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
