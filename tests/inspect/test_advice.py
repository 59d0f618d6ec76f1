"""Each finding is made by a log that has it, and by none that has not."""

import math
import random
from urllib.parse import parse_qsl

import pytest
from logs import make_row, make_rows, write_log

from cppo.inspect.reading import Log
from cppo.inspect.summary import summarise

pytestmark = pytest.mark.train


def titles(tmp_path, rows, own="cppo", **settings):
    document = summarise(Log.open(write_log(tmp_path, rows)), own, beside=(), **settings)
    return {finding["title"]: finding for finding in document["findings"]}


def healthy(seed=0, steps=20, drift=0.05, **settings):
    """On the policy in the first update, with a little mismatch; some drift after it."""
    dice = random.Random(seed)
    return [
        make_row(dice, step, length=20, drift=0.003 if step == 1 else drift, **settings)
        for step in range(1, steps + 1)
        for _ in range(8)
    ]


def test_a_healthy_run_has_no_problem(tmp_path):
    found = titles(tmp_path, healthy(drift=0.3))
    assert not [f for f in found.values() if f["level"] == "problem"], found


def test_equal_log_probs(tmp_path):
    rows = [row | {"logp": row["rollout_logp"]} for row in make_rows()]
    finding = titles(tmp_path, rows)["The two policies' log-probs are the same"]
    assert finding["level"] == "problem"
    assert finding["numbers"]["equal_log_probs"] == 1.0


def test_a_method_that_rejects_nothing_is_not_blamed_for_it(tmp_path):
    found = titles(tmp_path, healthy(drift=0.3), "policy_gradient")
    assert "The run had no trust region that rejects" in found
    assert "The trust region hardly acts" not in found


def test_a_region_that_hardly_acts_names_a_threshold_that_would(tmp_path):
    rows = healthy(drift=0.02)
    finding = titles(tmp_path, rows)["The trust region hardly acts"]
    delta = float(finding["text"].split("A delta of ")[1].split()[0])
    masked = summarise(Log.open(tmp_path), f"dppo?delta={delta}", beside=())["methods"][0]["masked"]
    assert 0.01 < masked < 0.04


@pytest.mark.parametrize(("own", "level"), [("dppo?delta=0.02", "warning"), ("dppo?delta=0.0001", None)])
def test_a_region_that_rejects_much(tmp_path, own, level):
    rows = make_rows(0, steps=4, drift=1.0)
    found = [f for title, f in titles(tmp_path, rows, own).items() if title.startswith("The trust region rejects")]
    assert len(found) == 1
    assert found[0]["numbers"]["masked"] > 0.25
    assert level is None or found[0]["level"] == level


def test_a_truncated_sampler(tmp_path):
    kept = 0.9
    rows = [row | {"rollout_logp": [min(0.0, p - math.log(kept)) for p in row["logp"]]} for row in healthy()]
    finding = titles(tmp_path, rows)["The sampler was truncated"]
    assert finding["numbers"]["kept_mass"] == pytest.approx(kept, abs=0.03)


def test_a_few_tokens_say_nothing_of_a_truncated_sampler(tmp_path):
    rows = [row | {"rollout_logp": [min(0.0, p + 0.1) for p in row["logp"]]} for row in healthy(steps=2)]
    few = [*rows[:3], *rows[8:]]
    assert "The sampler was truncated" in titles(tmp_path / "all", rows)
    assert "The sampler was truncated" not in titles(tmp_path / "few", few)


def test_engines_that_disagree_at_the_first_update(tmp_path):
    assert "Sampler and trainer disagree from the start" not in titles(tmp_path / "a", healthy())
    dice = random.Random(1)
    rows = [make_row(dice, 1, length=20, drift=0.1) for _ in range(8)] + healthy()[8:]
    assert "Sampler and trainer disagree from the start" in titles(tmp_path / "b", rows)


def test_a_collapse_is_dated(tmp_path):
    dice = random.Random(0)
    rows = []
    for step in range(1, 41):
        good = step <= 25
        for _ in range(8):
            row = make_row(dice, step, length=20 if good else 4, drift=0.05 if good else 1.5)
            rows.append(row | {"reward": float(dice.random() < (0.2 + 0.03 * step if good else 0.02))})
    finding = titles(tmp_path, rows)["The run collapsed"]
    assert finding["level"] == "problem"
    assert 18 <= finding["numbers"]["peak_update"] <= 27
    assert "The run collapsed" not in titles(tmp_path / "healthy", healthy(steps=40))


def test_drift_that_grows_and_drift_at_the_beginning(tmp_path):
    dice = random.Random(0)
    rows = [make_row(dice, step, length=20, drift=0.01 * step) for step in range(1, 21) for _ in range(8)]
    assert "The drift grows" in titles(tmp_path / "a", rows)
    for row in rows:
        row["logp"] = [
            p if t < 5 else m - 1e-4 for t, (p, m) in enumerate(zip(row["logp"], row["rollout_logp"], strict=True))
        ]
    assert "The drift sits at the beginning of the responses" in titles(tmp_path / "b", rows)
    assert not {"The drift grows", "The drift sits at the beginning of the responses"} & set(
        titles(tmp_path / "c", healthy())
    )


def test_a_budget_at_its_floor_and_at_its_ceiling(tmp_path):
    rows = healthy(drift=0.3)
    assert "The adaptive budget stays at its floor" in titles(tmp_path / "a", rows, "cppo?delta_b=0.3")
    assert "The adaptive budget stays at its ceiling" in titles(tmp_path / "b", rows, "cppo?delta_b=0.0001")
    between = titles(tmp_path / "c", rows, "cppo?delta_b=0.1")
    assert not [title for title in between if "budget stays" in title]


def test_groups_without_a_lesson(tmp_path):
    rows = healthy()
    for index, row in enumerate(rows):
        row["advantage"] = 0.0 if index % 2 else row["advantage"]
    found = titles(tmp_path, rows)
    assert "50.0% of the responses have advantage 0" in found


def test_a_response_that_dominates(tmp_path):
    rows = healthy()
    rows[43]["advantage"] = 400.0
    finding = titles(tmp_path, rows)["One response dominates an update"]
    assert finding["numbers"]["update"] == rows[43]["step"]


def test_unequal_signs(tmp_path):
    dice = random.Random(0)
    rows = [make_row(dice, 1 + index // 8, length=20, drift=0.4) for index in range(80)]
    for row in rows:  # only tokens with A > 0 move outward
        row["logp"] = [
            m + abs(p - m) if m + abs(p - m) < 0 else m for p, m in zip(row["logp"], row["rollout_logp"], strict=True)
        ]
    assert "Tokens with a positive advantage are rejected more often" in titles(tmp_path, rows, "dppo?delta=0.1")


def test_tokens_without_log_probs(tmp_path):
    rows = healthy()
    rows[9]["rollout_logp"][2] = float("nan")
    finding = titles(tmp_path, rows)["1 response tokens have no finite log-prob"]
    assert "row 9, column 'rollout_logp'" in finding["text"]


@pytest.mark.parametrize("wanted", [0.01, 0.05, 0.2])
def test_suggested_thresholds_mask_what_was_wanted(tmp_path, wanted):
    rows = healthy(drift=0.4)
    suggestion = summarise(Log.open(write_log(tmp_path, rows)), "cppo", beside=(), wanted=wanted)["suggestion"]
    spec = f"cppo?delta={suggestion['delta']}&delta_b={suggestion['delta_b']}"
    masked = summarise(Log.open(tmp_path), spec, beside=())["methods"][0]["masked"]
    assert masked == pytest.approx(wanted, rel=0.15)
    assert suggestion["masked"] == pytest.approx(masked, rel=0.01)


@pytest.mark.parametrize(
    "settings",
    ["position=shuffled&shuffle_seed=7&w_min=0.2", "gate=soft&ratio_cap=2.5", "budget=fixed&position=uniform"],
)
def test_suggested_thresholds_are_for_the_runs_own_settings(tmp_path, settings):
    rows = healthy(drift=0.4)
    log = Log.open(write_log(tmp_path, rows))
    found = summarise(log, f"cppo?{settings}", beside=(), wanted=0.1)["suggestion"]
    spec = f"cppo?{settings}&delta={found['delta']}&delta_b={found['delta_b']}"
    assert summarise(log, spec, beside=())["methods"][0]["masked"] == pytest.approx(found["masked"], rel=1e-5)
    for name, value in parse_qsl(settings):
        assert str(found["settings"][name]) == value
    assert {"divergence", "w_min", "position", "budget"} <= set(found["settings"])


def test_an_allowance_is_drawn_where_it_follows_from_the_position(tmp_path):
    log = Log.open(write_log(tmp_path, healthy()))

    def positions(spec):
        return summarise(log, spec, beside=())["positions"]

    linear = positions("cppo?delta=0.1&w_min=0.5")
    assert linear["allowance"][0] == pytest.approx(0.1 / (1 - 0.5 * 0.5 / 24), rel=1e-5)
    assert linear["allowance_note"] is None
    for spec in ("dppo?delta=0.1", "cppo?delta=0.1&position=uniform"):
        assert set(positions(spec)["allowance"]) == {0.1}
    shuffled = positions("cppo?delta=0.1&w_min=0.5&position=shuffled")
    assert shuffled["allowance"] is None
    assert "between 0.1 and 0.2 at any position" in shuffled["allowance_note"]
    assert positions("dppo?divergence=binary_kl")["allowance"] is None  # no |pi - mu|


def test_the_grid_is_what_these_thresholds_mask(tmp_path):
    write_log(tmp_path, make_rows(drift=0.5))
    grid = summarise(Log.open(tmp_path), "cppo", beside=())["suggestion"]["grid"]
    for i, j in ((0, 0), (3, 4), (6, 6)):
        spec = f"cppo?delta={grid['delta'][i]}&delta_b={grid['delta_b'][j]}"
        masked = summarise(Log.open(tmp_path), spec, beside=())["methods"][0]["masked"]
        assert grid["masked"][i][j] == pytest.approx(masked, rel=1e-5)
