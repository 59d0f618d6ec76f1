"""Runs what is missing of a study, some processes side by side, each on one thread; every finished run is kept."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import shutil
import statistics
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cppo.compare.results import ResultFolder
from cppo.compare.study import Cell, same_start
from cppo.compare.worker import is_start, make_cell_start, prepare, run_cell

# What keeps a process of numerical libraries to one core.
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Queue:
    """Cells in their order. Of those whose warm start is not there the first asks for it, and the others wait.

    Args:
        cells: what is to be run.
        has_start: whether the warm start of this key is there.
    """

    def __init__(self, cells: Iterable[Cell], has_start: Callable[[str], bool]) -> None:
        self.waiting = list(cells)
        self._has_start = has_start
        self._asked: set[str] = set()

    def pop(self) -> tuple[Cell, bool] | None:
        """Return a cell, and whether it is its warm start that is to be made; None while all wait for theirs."""
        for place, cell in enumerate(self.waiting):
            if not cell.config.tiny or self._has_start(cell.start_key):
                return self.waiting.pop(place), False
            if cell.start_key not in self._asked:
                self._asked.add(cell.start_key)
                return cell, True
        return None

    def has_started(self, cell: Cell) -> None:
        """Note that the warm start that this cell asked for was made."""
        self._asked.discard(cell.start_key)

    def lose(self, cell: Cell) -> list[Cell]:
        """Take out, and return, the cells that wait for the same warm start as this one."""
        lost = [one for one in self.waiting if one.start_key == cell.start_key]
        self.waiting = [one for one in self.waiting if one.start_key != cell.start_key]
        return lost


class Runner:
    """Runs cells into a folder.

    Args:
        folder: where the lines go.
        jobs: processes, >= 1.
        keep: keep each run's own folder under ``runs/``.
        console: of the progress bar.
        quiet: no bar.
        reuse: folders of other studies; runs and warm starts that this one means too are taken from them.
    """

    def __init__(
        self,
        folder: ResultFolder,
        jobs: int,
        console: Console,
        *,
        keep: bool,
        quiet: bool,
        reuse: Sequence[ResultFolder] = (),
    ) -> None:
        self._folder, self._jobs, self._keep = folder, jobs, keep
        self._console, self._quiet, self._reuse = console, quiet, reuse
        self._seconds: dict[str, list[float]] = {}
        self._began: dict[tuple[str, int], dict[str, Any]] = {}
        self.failed: list[str] = []

    def run(self, title: str, cells: Iterable[Cell]) -> None:
        """Run the cells that have no line yet.

        Raises:
            ValueError: if a worker process died.
        """
        cells = list(cells)
        rows = self._folder.rows()
        self._began = {(cell.setting, cell.seed): row for cell in cells if (row := rows.of(cell)) is not None}
        self._take_lines(cells)
        rows = self._folder.rows()
        self._seconds = {}
        for row in rows:
            self._seconds.setdefault(row["setting"], []).append(row["wall_seconds"])
        missing = list({cell.key: cell for cell in cells if rows.of(cell) is None}.values())
        if not missing:
            return
        with (
            _one_thread(),
            ProcessPoolExecutor(
                min(self._jobs, len(missing)), multiprocessing.get_context("spawn"), initializer=prepare
            ) as pool,
            self._progress() as progress,
        ):
            try:
                self._work(progress, title, missing, pool)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                raise

    def _take_lines(self, cells: list[Cell]) -> None:
        own, others = self._folder.rows(), [folder.rows() for folder in self._reuse]
        for cell in {cell.key: cell for cell in cells if own.of(cell) is None}.values():
            row = next((row for rows in others if (row := rows.of(cell)) is not None), None)
            if row is not None:
                self._folder.append(row | {"setting": cell.setting, "arm": cell.arm})
                self._check_start(cell, row)

    def _take_start(self, key: str) -> bool:
        for other in self._reuse:
            if is_start(other.starts / key):
                part = self._folder.starts / f".{key}"
                shutil.copytree(other.starts / key, part, dirs_exist_ok=True)
                shutil.rmtree(self._start(key), ignore_errors=True)  # what another process did not finish
                part.rename(self._start(key))
                return True
        return False

    def _start(self, key: str) -> Path:
        return self._folder.starts / key

    def _work(self, progress: Progress, title: str, cells: list[Cell], pool: ProcessPoolExecutor) -> None:
        bar = progress.add_task(title, total=len(cells), left="")
        queue = Queue(cells, lambda key: is_start(self._start(key)) or self._take_start(key))
        pending: dict[Future[Any], tuple[Cell, bool]] = {}  # the bool: its warm start, not the run

        def unfinished() -> list[Cell]:
            return [*queue.waiting, *(cell for cell, starting in pending.values() if not starting)]

        while queue.waiting or pending:
            while len(pending) < self._jobs and (task := queue.pop()):
                pending[self._submit(pool, *task)] = task
            died = False
            for future in concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED).done:
                cell, starting = pending.pop(future)
                ended = [] if starting else [cell]
                try:
                    row = future.result()
                except BrokenProcessPool:
                    died = True  # said when the others that have ended are kept
                    continue
                except Exception as error:  # noqa: BLE001  one run's failure must not cost the others
                    ended = queue.lose(cell) if starting else ended
                    for one in ended:
                        self._failed(one, error, unfinished())
                else:
                    if starting:
                        queue.has_started(cell)
                    else:
                        self._folder.append(row)
                        self._seconds.setdefault(cell.setting, []).append(row["wall_seconds"])
                        self._check_start(cell, row)
                        self._say(cell, f"{row['accuracy'][-1]:.3f}", unfinished())
                progress.update(bar, advance=len(ended), left=self._left(unfinished()))
            if died:
                raise ValueError(
                    f"{title}: a worker process died, out of memory perhaps; what was finished is kept: run the "
                    "same command again, with fewer --jobs"
                )
        progress.remove_task(bar)

    def _submit(self, pool: ProcessPoolExecutor, cell: Cell, starting: bool) -> Future[Any]:
        path = self._start(cell.start_key) if cell.config.tiny else None
        if starting:
            assert path is not None
            return pool.submit(make_cell_start, cell.config, path)
        return pool.submit(run_cell, cell, path, self._folder.runs, keep=self._keep)

    def _failed(self, cell: Cell, error: Exception, left: Sequence[Cell]) -> None:
        name = f"{cell.setting} / {cell.arm} / seed {cell.seed}"
        self.failed.append(f"{name}: {type(error).__name__}: {error}")
        self._folder.fail({"key": cell.key, "cell": name, "error": "".join(traceback.format_exception(error))})
        self._say(cell, f"failed: {type(error).__name__}", left)

    def _check_start(self, cell: Cell, row: dict[str, Any]) -> None:
        """Say at once that a seed's runs are no pairs, and not hours later in the tables; once a seed."""
        place = (cell.setting, cell.seed)
        before = self._began.setdefault(place, row)
        if not same_start([before, row]):
            self._began[place] = row
            self._console.print(
                f"{cell.setting} / seed {cell.seed}: its warm start is another one, and begins at "
                f"{row['accuracy'][0]:.3f}, where the runs that are there began at {before['accuracy'][0]:.3f}: the "
                "arithmetic of two machines or versions differs, and the arms of this seed are not paired. Expected a "
                "study's runs to come from one kind of machine",
                style="yellow", markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip

    def _say(self, cell: Cell, outcome: str, left: Sequence[Cell]) -> None:
        """Print a line where there is no bar, as in a log."""
        if not self._quiet and not self._console.is_terminal:
            time = f", {estimate}" if (estimate := self._left(left)) else ""
            line = f"{cell.setting} / {cell.arm} / seed {cell.seed}: {outcome}  ({len(left)} to go{time})"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _left(self, cells: Sequence[Cell]) -> str:
        """Return the time that the remaining runs will take, from those that have ended."""
        everything = [second for seconds in self._seconds.values() for second in seconds]
        if not everything or not cells:
            return ""
        each = [statistics.median(self._seconds.get(cell.setting) or everything) for cell in cells]
        # No sooner than the longest run, however many processes there are.
        minutes = max(1, round(max(*each, sum(each) / self._jobs) / 60))
        return f"about {minutes // 60} h {minutes % 60} min left" if minutes >= 60 else f"about {minutes} min left"

    def _progress(self) -> Progress:
        return Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console, transient=True, disable=self._quiet or not self._console.is_terminal,
        )  # fmt: skip


@contextmanager
def _one_thread() -> Iterator[None]:
    """The environment that the worker processes start in."""
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
