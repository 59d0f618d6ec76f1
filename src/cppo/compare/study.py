"""What is compared: settings, arms, seeds, and a search of equal budget; every cell is one run of the laboratory."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cppo.lab.config import RunConfig, read_yaml
from cppo.methods import parse_method

SEARCHED = " (searched)"
# What does not change a run's numbers, and what is the study's own to set.
_NO_MATTER = ("beside", "report_to", "threads", "checkpoint_every")
_NOT_SETTINGS = ("method", "seed", *_NO_MATTER)
# What an arm may set: the rest is the same for all arms, or they would not be matched.
_OF_AN_ARM = ("learning_rate", "schedule", "warmup", "divergence_top_k", "skip_zero_variance")
_DEFAULTS = dataclasses.asdict(RunConfig())
# What a key leaves out: the defaults when the first lines were written. One that changed later stands here as it was,
# or the lines of finished runs would not be found again.
_KEY_DEFAULTS = _DEFAULTS | {"method": "cppo?budget=fixed&delta_b=0.015", "learning_rate": 7e-4}
ROW_FORMAT = 2
MOST_RUNS = 100_000


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: an arm in a setting with a seed.

    ``key`` is a hash of what decides the run's numbers, so that a cell is found again whatever the study calls it.
    """

    setting: str
    arm: str
    config: RunConfig

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.seed

    @property
    def content(self) -> dict[str, Any]:
        """The settings that decide the run's numbers."""
        fields = dataclasses.asdict(self.config)
        return {
            name: float(value) if isinstance(_DEFAULTS[name], float) else value
            for name, value in fields.items()
            if name not in _NO_MATTER
        }

    @property
    def knobs(self) -> dict[str, Any]:
        """Every knob of the method, those at their defaults too."""
        return dataclasses.asdict(parse_method(self.config.method))

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits.

        Of the settings that differ from ``_KEY_DEFAULTS``: one that is new to the laboratory leaves the keys as they
        were.
        Should it say too little, a line's own settings show that it is another run (``Rows``).
        """
        return _hash({k: v for k, v in self.content.items() if v != _KEY_DEFAULTS[k]} | {"format": ROW_FORMAT})

    @property
    def start_key(self) -> str:
        """The same for the warm start, which all arms of a setting and seed share."""
        names = ("task", "model", "gguf_file", "warm_start_steps", "seed")
        return _hash({name: getattr(self.config, name) for name in names})


class Rows:
    """Finished runs, found by their cell."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self._rows = {row["key"]: row for row in rows}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows.values())

    def of(self, cell: Cell) -> dict[str, Any] | None:
        """Return the cell's line; None if there is none, or if it was run with settings that are no longer the same."""
        row = self._rows.get(cell.key)
        if row is None:
            return None
        content, knobs = cell.content, cell.knobs
        same = all(content.get(name, value) == value for name, value in row["config"].items())
        # A line of before knobs were kept has none.
        same = same and all(knobs.get(name, value) == value for name, value in row.get("knobs", {}).items())
        return row if same else None


def same_start(rows: Iterable[dict[str, Any]]) -> bool:
    """Whether these lines of one setting and seed come from the same warm start.

    The first evaluation is of the warm start, on the same problems; two that differ may score the same, so that newer
    lines hold a hash of it too.
    """
    rows = list(rows)
    hashes = {row["start"] for row in rows if row.get("start") is not None}
    return len({row["accuracy"][0] for row in rows}) <= 1 and len(hashes) <= 1


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Search:
    """Where an arm's own settings come from: a few candidates, the same number for every arm, on seeds of their own.

    First the arm's method as the study gives it, at every learning rate (``factors`` times the arm's); then its
    other ``knobs`` at the best of these. The best mean of all evaluations after the start wins.
    """

    seeds: tuple[int, ...]
    factors: tuple[float, ...]
    knobs: Mapping[str, tuple[str, ...]]  # arm -> methods


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison.

    Args:
        title: of the report.
        seeds: of the reported runs, the same in every arm.
        settings: name -> fields of ``RunConfig``, over those of ``base``.
        arms: name -> fields of ``RunConfig``, ``method`` among them, over those of the setting.
        reference: the arm that the others are compared with.
        search: None: every arm as it is given.
        axis: what ``at`` counts, if the settings are points on an axis.
        at: setting -> its place on the axis.
    """

    title: str
    seeds: tuple[int, ...]
    settings: Mapping[str, Mapping[str, Any]]
    arms: Mapping[str, Mapping[str, Any]]
    reference: str
    search: Search | None = None
    axis: str | None = None
    at: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        runs = len(self.seeds) * len(self.settings) * len(self.arms)
        if self.search is not None:
            tried = sum(len(self.search.factors) + len(knobs) for knobs in self.search.knobs.values())
            runs += len(self.settings) * (tried * len(self.search.seeds) + len(self.search.knobs) * len(self.seeds))
        if runs > MOST_RUNS:
            raise ValueError(f"seeds, settings, arms: expected at most {MOST_RUNS:,} runs, got {runs:,}")
        self.cells()  # every run's settings are checked before the first starts
        if self.reference not in self.arms:
            raise ValueError(f"reference={self.reference!r}: expected one of the arms, {', '.join(self.arms)}")
        if self.search is not None:
            self._check_search(self.search)

    @property
    def arm_names(self) -> list[str]:
        """The arms as given, then those that a search adds, in their order."""
        searched = self.search.knobs if self.search is not None else ()
        return [*self.arms, *(arm + SEARCHED for arm in self.arms if arm in searched)]

    def _check_search(self, search: Search) -> None:
        if shared := set(search.seeds) & set(self.seeds):
            raise ValueError(f"search: seeds: {min(shared)} is reported too; expected seeds that are not reported")
        counts = {arm: len(knobs) for arm, knobs in search.knobs.items()}
        for arm, knobs in search.knobs.items():
            if arm not in self.arms:
                raise ValueError(f"search: knobs: {arm!r} is no arm; expected some of {', '.join(self.arms)}")
            try:
                candidates = [parse_method(method) for method in (str(self.arms[arm]["method"]), *knobs)]
            except (TypeError, ValueError) as error:
                raise ValueError(f"search: knobs: {arm}: {error}") from None
            if any(one == other for one, other in itertools.combinations(candidates, 2)):
                raise ValueError(
                    f"search: knobs: {arm}: expected methods that differ from each other and the arm's own"
                )
        if self.reference not in search.knobs:
            raise ValueError(
                f"search: knobs: expected the reference {self.reference!r} among the arms that are searched"
            )
        if len(set(counts.values())) > 1:
            raise ValueError(f"search: knobs: expected as many candidates for every arm, got {counts}")
        if len(set(search.factors)) < len(search.factors):
            raise ValueError(f"search: factors={list(search.factors)}: expected numbers that differ")
        for setting in self.settings:
            for arm in search.knobs:
                for method, factor in self.candidates(arm):
                    self.config(setting, arm, search.seeds[-1], method=method, factor=factor)

    def candidates(self, arm: str) -> Iterator[tuple[str, float]]:
        """Yield every method and learning-rate factor that the search may choose for an arm."""
        assert self.search is not None
        for method in (str(self.arms[arm]["method"]), *self.search.knobs[arm]):
            for factor in self.search.factors:
                yield method, factor

    def config(self, setting: str, arm: str, seed: int, *, method: str | None = None, factor: float = 1.0) -> RunConfig:
        """Return the settings of one run; ``method`` and ``factor`` (of the learning rate) are a search's."""
        fields = dict(self.settings[setting]) | dict(self.arms[arm]) | {"seed": seed}
        if method is not None:
            fields["method"] = method
        try:
            config = RunConfig(**fields)
            config = dataclasses.replace(config, learning_rate=config.learning_rate * factor)
            return dataclasses.replace(config, checkpoint_every=config.rollouts)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"setting {setting!r}, arm {arm!r}: {error}") from None

    def cells(self, chosen: Mapping[str, Mapping[str, Any]] | None = None) -> list[Cell]:
        """Return the reported runs, one seed of every arm before the next seed of any.

        Args:
            chosen: setting -> arm -> ``{"method", "factor"}``, what a search chose; those runs come besides.
        """
        cells = []
        for seed in self.seeds:
            for setting in self.settings:
                for arm in self.arms:
                    cells.append(Cell(setting, arm, self.config(setting, arm, seed)))
                for arm, choice in (chosen or {}).get(setting, {}).items():
                    config = self.config(setting, arm, seed, method=choice["method"], factor=choice["factor"])
                    cells.append(Cell(setting, arm + SEARCHED, config))
        return cells


def load_study(path: Path) -> Study:
    """Read a study from YAML; docs/compare.md describes the form.

    Raises:
        ValueError: naming the file and what in it is wrong.
    """
    content = read_yaml(path)
    try:
        return make_study(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def make_study(content: Any) -> Study:
    """Return the study that a mapping describes, with the names of ``load_study``'s YAML."""
    content = _mapping("the study", content)
    known = ("title", "seeds", "base", "settings", "arms", "reference", "search", "axis")
    _check_known("the study", content, known)
    base = _run_fields("base", _mapping("base", content.get("base", {})))
    settings, at = {}, {}
    for name, fields in _mapping("settings", content.get("settings", {"default": {}})).items():
        own = dict(_mapping(f"settings: {name}", fields))
        place = own.pop("at", None)
        if place is not None:
            at[name] = _number(f"settings: {name}: at", place, positive=False)
        settings[name] = _run_fields(f"settings: {name}", {**base, **own})
    arms = {}
    for name, fields in _mapping("arms", content.get("arms")).items():
        own = {"method": fields} if isinstance(fields, str) else dict(_mapping(f"arms: {name}", fields))
        if "method" not in own:
            raise ValueError(f"arms: {name}: expected a method")
        _check_known(f"arms: {name}", own, ("method", *_OF_AN_ARM))
        arms[name] = own
        if name.endswith(SEARCHED):
            raise ValueError(f"arms: {name!r}: expected a name without {SEARCHED!r}")
    if not arms or not settings:
        raise ValueError("the study: expected at least one arm and one setting")
    title = str(content.get("title", "Comparison"))
    _check_printable("title", title)
    axis = content.get("axis")
    if axis is not None and (not isinstance(axis, str) or set(at) != set(settings)):
        raise ValueError(f"axis={axis!r}: expected a text, and `at: NUMBER` in every setting")
    if axis is not None:
        _check_printable("axis", axis)
    return Study(
        title=title,
        seeds=_seeds("seeds", content.get("seeds", {"first": 0, "count": 10})),
        settings=settings, arms=arms, reference=str(content.get("reference", next(iter(arms)))),
        search=_search(content["search"]) if content.get("search") is not None else None, axis=axis, at=at,
    )  # fmt: skip


def _search(content: Any) -> Search:
    content = _mapping("search", content)
    _check_known("search", content, ("seeds", "factors", "knobs"))
    factors = content.get("factors", [1.0])
    if not isinstance(factors, list) or not factors:
        raise ValueError(f"search: factors={factors!r}: expected a list of numbers")
    knobs = {}
    for arm, methods in _mapping("search: knobs", content.get("knobs")).items():
        if not isinstance(methods, list) or not all(isinstance(method, str) for method in methods):
            raise ValueError(f"search: knobs: {arm}: expected a list of methods, got {methods!r}")
        knobs[arm] = tuple(methods)
    return Search(
        seeds=_seeds("search: seeds", content.get("seeds")),
        factors=tuple(_number("search: factors", factor) for factor in factors),
        knobs=knobs,
    )


def _seeds(name: str, content: Any) -> tuple[int, ...]:
    content = _mapping(name, content)
    _check_known(name, content, ("first", "count"))
    first, count = content.get("first", 0), content.get("count", 10)
    for key, value, low, high in (("first", first, 0, 2**32 - 1), ("count", count, 1, MOST_RUNS)):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name}: {key}={value!r}: expected an integer in [{low}, {high}]")
    return tuple(range(first, first + count))


def _run_fields(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    fields = [field.name for field in dataclasses.fields(RunConfig) if field.name not in _NOT_SETTINGS]
    _check_known(name, content, fields)
    return dict(content)


def _mapping(name: str, content: Any) -> Mapping[str, Any]:
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{name}: expected names with values, got {content!r}")
    for key in content:
        _check_printable(f"{name}: {key!r}", key)
    return content


def _check_printable(name: str, text: str) -> None:
    """Raise ValueError for what would not stand in a table: control characters, line ends, broken characters."""
    if not text or not text.isprintable():
        raise ValueError(f"{name}: expected printable text in one line")


def _check_known(name: str, content: Mapping[str, Any], known: tuple[str, ...] | list[str]) -> None:
    for key in content:
        if key not in known:
            raise ValueError(f"{name}: unknown {key!r}; expected some of {', '.join(known)}")


def _number(name: str, value: Any, *, positive: bool = True) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared before it is a float: YAML's integers can be too large for one.
    if not number or not abs(value) <= sys.float_info.max or (positive and value <= 0):
        raise ValueError(f"{name}={value!r}: expected a number" + " > 0" * positive)
    return float(value)
