"""What a study says, what it refuses, and when two cells are the same run."""

import copy
import dataclasses
import json
import re

import pytest
from rows import CONTENT, SEARCH, line, study

from cppo.compare.results import ResultFolder
from cppo.compare.scores import area
from cppo.compare.search import choose, first_cells, second_cells, unfinished
from cppo.compare.study import SEARCHED, Cell, Rows, load_study, make_study, same_start
from cppo.lab.config import RunConfig

pytestmark = pytest.mark.train


def test_cells_are_every_arm_in_every_setting_seed_by_seed():
    cells = study().cells()
    assert [(c.seed, c.setting, c.arm) for c in cells[:4]] == [
        (0, "calm", "cppo"), (0, "calm", "grpo"), (0, "calm", "none"), (0, "wild", "cppo")
    ]  # fmt: skip
    assert len(cells) == len({cell.key for cell in cells}) == 6 * 2 * 3
    by_name = {(c.setting, c.arm): c.config for c in cells if c.seed == 0}
    assert by_name["wild", "grpo"].learning_rate == 1e-3
    assert by_name["wild", "none"].learning_rate == 2e-4
    assert {(c.setting, c.config.epochs) for c in cells} == {("calm", 4), ("wild", 3)}
    assert {c.config.method for c in cells} == {"cppo", "grpo", "policy_gradient"}


def test_a_cell_is_known_by_what_decides_its_numbers():
    config = RunConfig(seed=3)
    key = Cell("a", "b", config).key
    assert Cell("other", "names", config).key == key
    for same in ({"threads": 2}, {"checkpoint_every": 1}, {"report_to": ("tensorboard",)}, {"beside": ("grpo",)}):
        assert Cell("a", "b", dataclasses.replace(config, **same)).key == key
    keys = {key}
    for other in (
        {"seed": 4}, {"method": "grpo"}, {"learning_rate": 1e-4}, {"eval_every": 1}, {"sampler_noise": 0.1},
        {"model": "tiny?width=32"}, {"task": "long_tail_sum"}, {"skip_zero_variance": False}, {"rollouts": 13},
    ):  # fmt: skip
        keys.add(Cell("a", "b", dataclasses.replace(config, **other)).key)
    assert len(keys) == 10


def test_arms_share_a_start_and_seeds_do_not():
    cells = study().cells()
    starts = {}
    for cell in cells:
        starts.setdefault(cell.seed, set()).add(cell.start_key)
    assert all(len(keys) == 1 for keys in starts.values())
    assert len(set.union(*starts.values())) == 6
    config = RunConfig()
    key = Cell("a", "b", config).start_key
    for other in ({"task": "long_tail_sum"}, {"model": "tiny?width=32"}, {"warm_start_steps": 9}, {"seed": 1}):
        assert Cell("a", "b", dataclasses.replace(config, **other)).start_key != key
    assert Cell("a", "b", dataclasses.replace(config, method="grpo", epochs=3)).start_key == key


def scored(cells, values):
    return [line(cell, [0.0, values(cell.config)]) for cell in cells]


def test_a_search_takes_the_best_rate_first_and_then_the_best_knob():
    plan = study(search=SEARCH)
    first = first_cells(plan, plan.search)
    assert len(first) == 2 * 2 * 2 * 2  # settings, arms, factors, seeds
    assert {cell.seed for cell in first} == {100, 101}

    def values(config):
        slow = config.learning_rate in (0.5e-4, 0.5e-3)
        better = config.method in ("cppo?delta_b=0.03",)
        return 0.3 + 0.2 * slow + 0.1 * better + 0.01 * (config.seed == 101)

    rows = scored(first, values)
    assert unfinished(plan, plan.search, Rows(rows[1:])) == 1
    second = second_cells(plan, plan.search, Rows(rows))
    assert unfinished(plan, plan.search, Rows(rows)) == len(second) == 8
    assert {(c.config.method, c.config.learning_rate) for c in second if c.setting == "calm"} == {
        ("cppo?delta_b=0.03", 0.5e-4), ("grpo?clip_low=0.1&clip_high=0.1", 0.5e-4)
    }  # fmt: skip
    rows = Rows(rows + scored(second, values))
    assert unfinished(plan, plan.search, rows) == 0
    chosen = choose(plan, plan.search, rows)
    assert chosen["wild"]["cppo"]["method"] == "cppo?delta_b=0.03"
    assert chosen["wild"]["cppo"]["factor"] == 0.5
    assert chosen["wild"]["grpo"]["method"] == "grpo"  # its knob is not better: as published
    assert [t["score"] for t in chosen["wild"]["cppo"]["tried"]] == pytest.approx([0.305, 0.505, 0.605])
    assert len(chosen["calm"]["grpo"]["tried"]) == 3
    searched = [c for c in plan.cells(chosen) if c.arm.endswith(SEARCHED)]
    assert {c.arm for c in searched} == {"cppo (searched)", "grpo (searched)"}
    assert {c.seed for c in searched} == set(range(6))
    assert {c.config.learning_rate for c in searched if c.setting == "wild"} == {0.5e-3}


def test_the_area_leaves_the_start_out_and_weighs_by_rollouts():
    assert area({"rollout": [0, 2, 4], "accuracy": [0.9, 0.2, 0.4]}) == pytest.approx(0.3)
    assert area({"rollout": [0, 4, 8, 9], "accuracy": [0.0, 0.4, 0.4, 0.9]}) == pytest.approx(4.1 / 9)


def test_a_line_that_was_run_with_other_defaults_is_not_taken():
    [cell, *_] = study().cells()
    row = line(cell, [0.1, 0.2])
    assert Rows([row]).of(cell) == row
    assert Rows([json.loads(json.dumps(row))]).of(cell) == row
    assert Rows([row | {"config": row["config"] | {"minibatch": 16}}]).of(cell) is None
    # A setting that the laboratory has learned since, or has lost, says nothing.
    assert Rows([row | {"config": {k: v for k, v in row["config"].items() if k != "certificate"}}]).of(cell)
    assert Rows([row | {"config": row["config"] | {"gone": 1}}]).of(cell)
    # Nor of a method whose default was another then.
    assert Rows([row | {"knobs": cell.knobs}]).of(cell)
    assert Rows([row | {"knobs": cell.knobs | {"gone": 1}}]).of(cell)
    assert cell.knobs["delta"] == 0.15
    assert Rows([row | {"knobs": cell.knobs | {"delta": 0.3}}]).of(cell) is None


def test_lines_are_of_one_start_if_its_hash_and_its_accuracy_are_the_same():
    one = {"accuracy": [0.25, 0.5], "start": "a"}
    assert same_start([])
    assert same_start([one, one | {"accuracy": [0.25, 0.9]}])
    assert not same_start([one, one | {"start": "b"}])
    assert not same_start([one, one | {"accuracy": [0.26, 0.5]}])
    older = {"accuracy": [0.25, 0.5]}  # without a hash
    assert same_start([older, one, older | {"start": None}])
    assert not same_start([older, {"accuracy": [0.26, 0.5]}])


def test_numbers_are_the_same_however_they_are_written():
    whole, point = (Cell("a", "b", RunConfig(sampler_noise=noise)) for noise in (1, 1.0))
    assert whole.key == point.key


def changed(path, value):
    content = copy.deepcopy(CONTENT) | {"search": copy.deepcopy(SEARCH)}
    *parents, last = path
    place = content
    for parent in parents:
        place = place[parent]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("reference",), "ppo", "reference='ppo': expected one of the arms, cppo, grpo, none"),
        (("arms",), {}, "expected at least one arm"),
        (("arms", "grpo"), {}, "arms: grpo: expected a method"),
        (("arms", "grpo"), "clip", "setting 'calm', arm 'grpo': .*clip"),
        (("arms", "grpo"), {"method": "grpo", "seed": 3}, "arms: grpo: unknown 'seed'"),
        (("arms", "x (searched)"), "grpo", "expected a name without"),
        (("settings", "calm"), {"rollout": 3}, "settings: calm: unknown 'rollout'"),
        (("settings", "calm"), {"rollouts": 0}, "setting 'calm', arm 'cppo': rollouts=0: expected an integer >= 1"),
        (("settings", "calm"), 3, "settings: calm: expected names with values, got 3"),
        (("seeds",), {"first": -1}, r"seeds: first=-1: expected an integer in \[0, 4294967295\]"),
        (("seeds",), {"count": 0}, r"seeds: count=0: expected an integer in \[1, 100000\]"),
        (("seeds",), [1, 2], r"seeds: expected names with values, got \[1, 2\]"),
        (("axis",), "updates", "axis='updates': expected a text, and `at: NUMBER` in every setting"),
        (("settings", "calm", "at"), "far", "settings: calm: at='far': expected a number"),
        (("settings", "calm", "at"), 10**400, "settings: calm: at=1000+: expected a number$"),
        (("settings", "calm", "at"), float("nan"), "settings: calm: at=nan: expected a number$"),
        (("settings", "calm", "learning_rate"), 10**400, "setting 'calm', arm 'cppo': .*too large"),
        (("seeds",), {"count": 50_000}, "expected at most 100,000 runs, got 500,"),
        (("search", "seeds"), {"first": 100, "count": 90_000}, "expected at most 100,000 runs, got 1,080,060"),
        (("search", "seeds"), {"first": 2**32 - 1, "count": 2}, "setting 'calm', arm 'cppo': seed=4294967296"),
        (("arms", "grpo"), {"method": "grpo", "rollouts": 3}, "arms: grpo: unknown 'rollouts'"),
        (("arms", "\x1b[31m"), "grpo", "expected printable text in one line"),
        (("settings", "a\nb"), {}, "expected printable text in one line"),
        (("arms", "\ud800"), "grpo", "expected printable text in one line"),
        (("title",), "a\nb", "title: expected printable text in one line"),
        (("search", "knobs"), {"grpo": ["grpo?clip_low=0.1"]}, "expected the reference 'cppo' among the arms"),
        (("search", "knobs", "grpo"), ["grpo"], "expected methods that differ from each other and the arm's own"),
        (("search", "knobs", "cppo"), ["cppo?delta=0.150"], "cppo: expected methods that differ from each other and"),
        (("search", "factors"), [1, 0.5, 1.0], r"search: factors=\[1.0, 0.5, 1.0\]: expected numbers that differ"),
        (("search", "factors"), [10**400], "search: factors=1000+: expected a number > 0"),
        (("surprise",), 1, "the study: unknown 'surprise'"),
        (("search", "seeds"), {"first": 3, "count": 5}, "search: seeds: 3 is reported too"),
        (("search", "factors"), [], r"search: factors=\[\]: expected a list of numbers"),
        (("search", "factors"), [0], "search: factors=0: expected a number > 0"),
        (("search", "knobs", "none"), [], "expected as many candidates for every arm"),
        (("search", "knobs", "ppo"), ["grpo"], "search: knobs: 'ppo' is no arm"),
        (("search", "knobs", "grpo"), "grpo", "search: knobs: grpo: expected a list of methods"),
        (("search", "knobs", "grpo"), ["grpo?clip=1"], "search: knobs: grpo: grpo has no knob 'clip'"),
    ],
)  # fmt: skip
def test_a_wrong_study_is_told_so(path, value, message):
    with pytest.raises(ValueError, match=message):
        make_study(changed(path, value))


def test_what_stands_in_an_axis_title_is_text():
    settings = {"few": {"at": 2, "learning_rate": 1e-4}, "many": {"at": -8, "learning_rate": 1e-3}}
    assert study(axis="noise", settings=settings).at == {"few": 2.0, "many": -8.0}
    for axis in ("", "a\nb", "\x1b[31m"):
        with pytest.raises(ValueError, match="axis: expected printable text in one line"):
            study(axis=axis, settings=settings)


def test_a_file_that_is_no_study_is_named(tmp_path):
    wrong = {"list.yaml": "- 1", "broken.yaml": "a: [", "deep.yaml": "[" * 3000, "date.yaml": "a: 2024-99-99"}
    for name, text in wrong.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            load_study(tmp_path / name)
    with pytest.raises(ValueError, match=r"none\.yaml"):
        load_study(tmp_path / "none.yaml")


def test_every_study_of_the_repository_is_whole(pytestconfig):
    files = sorted((pytestconfig.rootpath / "studies").glob("*.yaml"))
    files += sorted((pytestconfig.rootpath / "src" / "cppo" / "compare").glob("*.yaml"))
    assert len(files) > 1
    for file in files:
        assert load_study(file).cells()


def test_the_seeds_that_are_pooled_were_all_run(pytestconfig):
    plan = load_study(pytestconfig.rootpath / "studies" / "pooled.yaml")
    there = [ResultFolder(pytestconfig.rootpath / "docs" / "studies" / name).rows() for name in ("scale", "parts")]
    assert all(sum(rows.of(cell) is not None for rows in there) == 1 for cell in plan.cells())


def test_the_committed_lines_belong_to_their_studies(pytestconfig):
    folders = [path.parent for path in (pytestconfig.rootpath / "docs" / "studies").glob("*/results.jsonl")]
    assert folders
    for path in folders:
        folder = ResultFolder(path)
        assert folder.study.read_text() == (pytestconfig.rootpath / "studies" / f"{path.name}.yaml").read_text()
        plan, rows = load_study(folder.study), folder.rows()
        found = [cell for cell in plan.cells() if rows.of(cell) is not None]
        if plan.search is None:
            assert len(found) == len(rows), path  # a line that no cell takes was run with other settings
        page = (pytestconfig.rootpath / "docs" / "experiments.md").read_text()
        assert re.search(rf"\| `{path.name}` \|.*\| {len(plan.cells())} \| {len(found)} \|", page)
