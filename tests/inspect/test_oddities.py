"""What a log holds that it should not is counted and named, and taken for nothing else."""

import math
import shutil

import pytest
from logs import make_rows, write_log, write_raw
from test_advice import healthy, titles

from cppo.inspect.reading import Log
from cppo.inspect.summary import summarise

pytestmark = pytest.mark.train
INF, NAN = math.inf, math.nan


def found(tmp_path, rows, own="cppo", **settings):
    return {finding["title"]: finding for finding in titles(tmp_path, rows, own, **settings).values()}


def test_log_probs_above_0_are_counted_and_the_largest_is_named(tmp_path):
    rows = healthy()
    rows[9]["logp"][2], rows[9]["rollout_logp"][3], rows[11]["logp"][4] = 1.5, 0.25, 1e-7  # the last is rounding
    rows[9]["response_mask"][2:4] = True, True
    rows[12]["logp"][0], rows[12]["response_mask"][0] = 9.0, False  # a tool's
    finding = found(tmp_path, rows)["2 response tokens have a log-prob above 0"]
    assert finding["numbers"] == {"tokens": 2, "largest": 1.5}
    assert "row 9, column 'logp'; the largest is 1.5" in finding["text"]
    assert not [title for title in found(tmp_path / "healthy", healthy()) if "above 0" in title]


def measured(**changes):
    rows = make_rows(steps=2, length=6, holes=False, divergence=True)
    for row in rows:
        row["divergence"] = [min(1.0, value) for value in row["divergence"]]
    for place, value in changes.items():
        rows[int(place[1:])]["divergence"][0] = value
    return rows


def test_a_measured_divergence_that_is_none_is_counted_where_it_is_used(tmp_path):
    rows = measured(r1=NAN, r2=INF, r3=-0.5, r9=-1e-8)
    finding = found(tmp_path, rows, "cppo?divergence=topk_tv")["3 measured divergences are none"]
    assert "row 1, column 'divergence'" in finding["text"]
    run = summarise(Log.open(tmp_path), "cppo?divergence=topk_tv", beside=())
    assert all(math.isfinite(value) for value in run["methods"][0]["delta_b_by_step"])
    assert not [title for title in found(tmp_path, rows, "cppo") if "divergence" in title]  # binary: from the log-probs
    clean = found(tmp_path / "clean", measured(), "cppo?divergence=topk_tv")
    assert not [title for title in clean if "divergences" in title]


def test_a_total_variation_above_1_is_none_and_a_kl_may_be(tmp_path):
    rows = measured(r3=1.25, r12=7.5)
    finding = found(tmp_path, rows, "dppo?divergence=exact_tv")["2 measured divergences are above 1"]
    assert finding["numbers"] == {"tokens": 2, "largest": 7.5}
    assert not [title for title in found(tmp_path, rows, "dppo?divergence=exact_kl") if "above 1" in title]


def test_a_file_that_was_copied_is_told_of(tmp_path):
    log = write_log(tmp_path, make_rows(steps=1), files=1) / "rollouts"
    shutil.copy(log / "step-000001.parquet", log / "step-000001-copy.parquet")
    finding = {f["title"]: f for f in summarise(Log.open(tmp_path), "cppo", beside=())["findings"]}
    assert "8 responses stand in the log again" in finding
    assert finding["8 responses stand in the log again"]["level"] == "warning"


def test_one_response_in_several_updates_or_twice_in_a_group_is_none_of_these(tmp_path):
    rows = make_rows(steps=1)
    write_log(tmp_path, [*rows, *rows, *(row | {"step": 2} for row in rows)], files=1)
    write_raw(tmp_path / "rollouts" / "step-000003.parquet", [row | {"step": 3} for row in rows])
    findings = summarise(Log.open(tmp_path), "cppo", beside=())["findings"]
    assert not [finding for finding in findings if "again" in finding["title"]]
