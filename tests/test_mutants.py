"""Each mutant of tests/mutant_list.py is killed by the deterministic tests, and the package as it is passes them."""

import json
import os
import subprocess
import sys

import mutants
import pytest
from mutant_list import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_text_of_a_mutant_occurs_exactly_once(mutant):
    assert mutants.occurrences(mutant) == 1, f"re-anchor {mutant.name!r} in {mutant.file}: {mutant.before!r}"
    assert mutant.after != mutant.before


def test_mutants_are_many_and_named_apart_and_reach_every_file_of_the_core():
    assert len(MUTANTS) >= 40
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
    assert len({(m.file, m.before, m.after) for m in MUTANTS}) == len(MUTANTS)
    with_functions = {
        str(f.relative_to(mutants.PACKAGE)) for f in mutants.PACKAGE.glob("ops/*.py") if "def " in f.read_text()
    }
    with_functions |= {
        str(f.relative_to(mutants.PACKAGE)) for f in mutants.PACKAGE.glob("rules/*.py") if "def " in f.read_text()
    } - {"rules/__init__.py"}
    others = {"objective.py", "decision.py", "inputs.py", "metrics.py", "certificate.py"}
    assert with_functions | others <= {m.file for m in MUTANTS}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks once a mutant")
def test_the_package_passes_and_every_mutant_is_killed():
    # Two at once: this takes longer than all other tests of the core.
    command = [sys.executable, mutants.__file__, "--json", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    results = json.loads(done.stdout)
    assert results.pop("(unmutated)")["status"] == mutants.PASSED
    assert {name: result for name, result in results.items() if result["status"] != mutants.FAILED} == {}
    assert results.keys() == {m.name for m in MUTANTS}
    assert done.returncode == 0
