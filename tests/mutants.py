"""The run that shows that the tests kill each mutant of tests/mutant_list.py. By hand:

    python tests/mutants.py                     every mutant, with the test that kills it
    python tests/mutants.py threshold account   those whose name contains a word

The run collects the tests once and forks once a mutant. The fork grafts the mutated functions into the loaded package
(their code objects are exchanged, so that every reference sees the mutant) and runs tests until one fails: first those
that reach its lines, and of these those that killed others of its file.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib
import inspect
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import coverage
import pytest
from mutant_list import MUTANTS, Mutant

TESTS = pathlib.Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "src" / "cppo"
# The deterministic tests of these files: no hypothesis, nothing that is expected to fail.
KILLERS = (
    "test_ties.py",
    "test_vectors.py",
    "test_metrics.py",
    "test_certificate.py",
    "test_divergence.py",
    "test_selection.py",
    "test_gradients.py",
    "test_against_oracle.py",
    "test_properties.py",
    "test_numerics.py",
    "test_context_parallel.py",
    "test_bad_input.py",
    "test_theory.py",
    "test_token_statistics.py",
    "test_token_statistics_gradients.py",
    "test_token_statistics_numerics.py",
    "test_token_statistics_memory.py",
    "test_token_statistics_input.py",
    "test_vocab_parallel.py",
    "bound/test_bound_constants.py",
    "compare/test_estimates.py",
    "compare/test_study.py",
    "compare/test_analysis.py",
    "compare/test_reuse.py",
    "inspect/test_replay.py",
)
SECONDS_A_MUTANT = 300
PASSED, FAILED, DOES_NOT_RUN = "passed", "failed", "does not run"


def occurrences(mutant: Mutant) -> int:
    """Return how often the mutant's text stands in its file."""
    return (PACKAGE / mutant.file).read_text().count(mutant.before)


# ---------------------------------------------------------------- grafting


def _function(value: object) -> types.FunctionType | None:
    """Return the plain function inside a method, a property or a decorator."""
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, functools.cached_property):
        value = value.func
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    value = inspect.unwrap(value) if callable(value) and not isinstance(value, type) else value
    return value if isinstance(value, types.FunctionType) else None


def _graft_into(here: object, there: object, module: str) -> int:
    """Exchange the code of ``here``'s functions by that of ``there``'s; return how many changed."""
    changed = 0
    for name, value in list(vars(there).items()):
        mine = vars(here).get(name)
        function, own = _function(value), _function(mine)
        if isinstance(value, type) and value.__module__ == module:
            changed += _graft_into(mine, value, module)
        elif function is not None and function.__module__ == module:
            changed += own.__code__ != function.__code__
            own.__code__ = function.__code__
        elif isinstance(value, int | float) and not name.startswith("__") and value != mine:
            setattr(here, name, value)
            changed += 1
    return changed


def graft(mutant: Mutant) -> None:
    """Turn the loaded package into the mutant."""
    if occurrences(mutant) != 1:
        raise ValueError(f"{mutant.name}: its text occurs {occurrences(mutant)} times in {mutant.file}")
    file = PACKAGE / mutant.file
    name = ".".join(("cppo", *pathlib.PurePath(mutant.file).with_suffix("").parts))
    module, mutated = importlib.import_module(name), types.ModuleType(name)
    mutated.__package__, mutated.__file__ = module.__package__, str(file)
    exec(compile(file.read_text().replace(mutant.before, mutant.after), str(file), "exec"), vars(mutated))
    if not _graft_into(module, mutated, name):
        raise ValueError(f"{mutant.name}: changes no function and no number of {name}")


# ---------------------------------------------------------------- running


class MutantRun:
    """A pytest plugin that runs the collected tests once against the package and once against each mutant of it."""

    def __init__(self, mutants: list[Mutant], report, jobs: int) -> None:
        self.mutants = mutants
        self.report = report  # called with (mutant, result) after each; the mutant is None for the package as it is
        self.jobs = jobs
        self._answer = lambda answer: None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item, call) -> None:
        # Not from the report: its traceback takes longer to print than most tests take to run.
        if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
            self._answer({"status": FAILED, "test": item.nodeid})

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session) -> bool:
        if session.testsfailed or not session.items:
            raise session.Interrupted("the tests cannot be collected")
        items = [item for item in session.items if not item.get_closest_marker("xfail")]
        with tempfile.TemporaryDirectory(prefix="cppo-mutants-") as scratch:
            self._scratch = pathlib.Path(scratch)
            parts = [result for _, result in self._in_forks((None, items[k :: self.jobs]) for k in range(self.jobs))]
            durations: dict[str, float] = {}
            reach: dict[str, set[str]] = collections.defaultdict(set)  # the tests that reach each mutant's lines
            for part in parts:
                durations |= part.pop("durations", {})
                for name, tests in part.pop("reach", {}).items():
                    reach[name].update(tests)
            self.report(None, max(parts, key=lambda part: (part["status"] != PASSED, part["seconds"])))
            killers: dict[str, dict[str, int]] = {}  # of each file's mutants, which tests and cases killed how many
            for mutant, result in self._in_forks(self._most_promising_first(items, durations, reach, killers)):
                if result["status"] == FAILED:
                    kills = killers.setdefault(mutant.file, {})
                    for killer in (result["test"], result["test"].partition("[")[0]):
                        kills[killer] = kills.get(killer, 0) + 1
                self.report(mutant, result)
        return True

    def _most_promising_first(self, items, durations, reach, killers) -> Iterator[tuple[Mutant, list]]:
        """Yield each mutant with its tests, ordered by what has killed others of its file when it is asked for."""
        items = _cheapest_of_each_first(items, durations)
        cases = collections.Counter(map(_test_of, items))
        for mutant in self.mutants:
            kills = killers.get(mutant.file, {})
            promising = {
                item: (kills.get(item.nodeid, 0) + kills.get(_test_of(item), 0) / cases[_test_of(item)])
                / (0.01 + durations.get(item.nodeid, 0.0))
                for item in items
            }
            # Those that do not reach it come last, and not never: a number is read without a line of its own. The sort
            # keeps the order of those that killed none.
            late = {item: item.nodeid not in reach[mutant.name] for item in items}
            yield mutant, sorted(items, key=lambda item, p=promising, late=late: (late[item], -p[item]))

    def _in_forks(self, work: Iterable[tuple[Mutant | None, list]]) -> Iterator[tuple[Mutant | None, dict]]:
        """Yield (mutant, result) as they end, ``jobs`` at once; ``work`` gives the next once a place is free."""
        work, running = iter(work), {}
        while True:
            while len(running) < self.jobs and (job := next(work, None)) is not None:
                start = time.monotonic()
                answer = self._scratch / f"{start}.json"
                child = os.fork()
                if child == 0:
                    self._judge(*job, answer)
                running[child] = (job[0], answer, start)
            if not running:
                return
            child, _ = os.wait()
            mutant, answer, start = running.pop(child)
            result = {"status": DOES_NOT_RUN, "test": "no answer"}
            if answer.exists():
                result = json.loads(answer.read_text())
            yield mutant, result | {"seconds": round(time.monotonic() - start, 2)}

    def _judge(self, mutant: Mutant | None, items: list, answer: pathlib.Path) -> None:
        """Write the verdict on one mutant and end this process, a fork."""

        def leave(verdict: dict) -> None:
            answer.write_text(json.dumps(verdict))
            os._exit(0)

        try:
            signal.alarm(SECONDS_A_MUTANT if mutant else 10 * SECONDS_A_MUTANT)  # the package runs all tests
            self._answer = leave
            if mutant is not None:
                graft(mutant)
                self._run(items, lambda item: None)
                leave({"status": PASSED, "test": ""})
            tracer = coverage.Coverage(data_file=None, include=[str(PACKAGE / "*")], config_file=False)
            tracer.start()
            durations = self._run(items, lambda item: tracer.switch_context(item.nodeid))
            tracer.stop()
            leave({"status": PASSED, "test": "", "durations": durations, "reach": self._reach(tracer.get_data())})
        except BaseException as error:  # noqa: BLE001  a fork must not run on into its parent's work
            leave({"status": DOES_NOT_RUN, "test": repr(error)})

    def _reach(self, data: coverage.CoverageData) -> dict[str, list[str]]:
        """Return of each mutant the tests that ran a line of its text."""
        tests_of = functools.cache(lambda file: data.contexts_by_lineno(str(PACKAGE / file)))
        reach = {}
        for mutant in self.mutants:
            above, _, _ = (PACKAGE / mutant.file).read_text().partition(mutant.before)
            first = above.count("\n") + 1
            lines = range(first, first + mutant.before.count("\n") + 1)
            reach[mutant.name] = sorted({test for n in lines for test in tests_of(mutant.file).get(n, []) if test})
        return reach

    @staticmethod
    def _run(items: list, before: Callable[[Any], None]) -> dict[str, float]:
        """Run the tests, each after ``before`` of it; return how long each took."""
        durations = {}
        for item, following in zip(items, [*items[1:], None], strict=True):
            before(item)
            start = time.perf_counter()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            durations[item.nodeid] = time.perf_counter() - start
        return durations


def _test_of(item) -> str:
    """Return a test's name without its case."""
    return item.nodeid.partition("[")[0]


def _cheapest_of_each_first(items: list, durations: dict[str, float]) -> list:
    """Return the items so that one case of every test comes before the second of any, quick tests first."""
    seen: dict[str, int] = {}
    key = {}
    for item in items:
        name = _test_of(item)
        seen[name] = seen.get(name, -1) + 1
        key[item] = (seen[name], durations.get(item.nodeid, 0.0))
    return sorted(items, key=key.__getitem__)


def run(mutants: list[Mutant], report, jobs: int) -> None:
    """Judge the package, then each mutant, ``jobs`` at once; ``report(mutant or None, result)`` hears of each."""
    import torch

    torch.set_num_threads(1)
    # Its first call loads half a thousand modules: once here, not once a fork.
    torch.testing.assert_close(torch.ones(1), torch.ones(1))
    # Without a terminal reporter, whose options the configuration would ask for.
    quiet = ["-s", "-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent)]
    pytest.main(
        [*quiet, "-m", "not hypothesis and not processes", *(str(TESTS / name) for name in KILLERS)],
        plugins=[MutantRun(mutants, report, jobs)],
    )


def main() -> int:
    """Run the mutants that were asked for and print one line each, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutants whose name contains one of these")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.words or any(word in m.name for word in options.words)]
    results: dict[str, dict] = {}

    def report(mutant: Mutant | None, result: dict) -> None:
        name = "(unmutated)" if mutant is None else mutant.name
        results[name] = result
        if not options.json:
            print(f"{result['seconds']:6.2f}  {result['status']:12}  {name:45}  {result['test']}", flush=True)

    run(chosen, report, options.jobs)
    if options.json:
        print(json.dumps(results))
    wrong = [name for name, r in results.items() if r["status"] != (PASSED if name == "(unmutated)" else FAILED)]
    return 1 if wrong or len(results) != 1 + len(chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
