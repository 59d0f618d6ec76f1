"""Careless and hostile logs: no wrong statement, no traceback, nothing that steers a terminal."""

import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from logs import make_row, make_rows, write_log, write_raw
from test_advice import titles
from test_command import inspect

from cppo.inspect.reading import Log
from cppo.inspect.runs import _configured_method, inspect_runs, training_curve
from cppo.inspect.statement import TokenTexts
from cppo.inspect.summary import summarise
from cppo.printable import printable
from cppo.rollout_log import SCHEMA, write_rollouts

pytestmark = pytest.mark.train
INF, NAN = float("inf"), float("nan")


def test_equal_log_probs_are_seen_beside_certain_tokens(tmp_path):
    rows = make_rows(length=20)
    for row in rows:
        row["logp"] = row["rollout_logp"] = [-1.0] * 10 + [0.0] * 10
    assert "The two policies' log-probs are the same" in titles(tmp_path, rows)


@pytest.mark.parametrize("rewards", [[1.0] * 13 + [None] * 7, [-10.0 - 0.0025 * step for step in range(20)]])
def test_missing_rewards_and_noise_are_no_collapse(tmp_path, rewards):
    dice = random.Random(0)
    rows = [make_row(dice, step) | {"reward": reward} for step, reward in enumerate(rewards, start=1)]
    assert "The run collapsed" not in titles(tmp_path, rows)


def test_every_token_without_log_probs_counts_as_such_and_as_nothing_else(tmp_path):
    rows = make_rows(steps=1, length=6, holes=False)
    for row in rows:
        row["logp"], row["rollout_logp"] = [INF, -INF, NAN, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, INF, -1.0, -INF]
    (run,) = [summarise(Log.open(write_log(tmp_path, rows)), "cppo", beside=())]
    assert f"{5 * len(rows)} response tokens have no finite log-prob" in {f["title"] for f in run["findings"]}
    assert run["tokens"] == len(rows)
    assert run["methods"][0]["masked"] == 0


NOTHING = {"logp": [], "rollout_logp": [], "token_ids": [], "response_mask": []}


@pytest.mark.parametrize("change", [{"response_mask": [False] * 5}, NOTHING])
def test_a_log_without_tokens_of_the_policy_says_that_alone(tmp_path, change):
    rows = [row | change for row in make_rows(length=5)]
    done = inspect(write_log(tmp_path / "run", rows), "--method", "cppo", "--json")
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)["runs"][0]["findings"]
    assert [finding["title"] for finding in findings] == ["No token of the policy"]


def test_a_giant_response_is_judged_whole_and_shown_in_part(tmp_path):
    row = make_row(random.Random(0), length=30_000)
    run = summarise(Log.open(write_log(tmp_path, [row])), "cppo", beside=())
    (example,) = run["examples"]
    assert example["length"] == 30_000
    assert len(example["logp"]) == len(example["methods"]["cppo"]["rejected_by"]) == 20_000
    assert run["tokens"] == sum(row["response_mask"])


def test_names_steer_no_terminal(tmp_path):
    folder = write_log(tmp_path / "\x1b]0;taken\x07\x1b[31mred\u202e", make_rows())
    for done in (inspect(folder, "--method", "cppo"), inspect(folder)):
        shown = done.stdout + done.stderr
        assert "\\u001b[31mred\\u202e" in shown
        assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    assert printable("a\x1b[31mb\u202ec\n\td é 中") == "a\\u001b[31mb\\u202ec\n\td é 中"


@pytest.mark.parametrize("method", ["garbage", "cppo?foo=1", "", "dppo?delta=" + "[" * 100_000])
def test_a_log_that_names_no_method_names_itself(tmp_path, method):
    (tmp_path / "rollouts").mkdir()
    write_rollouts(tmp_path / "rollouts" / "step-000001.parquet", make_rows(), method=method)
    done = inspect(tmp_path)
    assert "Traceback" not in done.stderr
    assert f"{tmp_path}" in done.stderr
    assert "name it with --method" in done.stderr


def test_files_of_two_methods_have_none(tmp_path):
    write_rollouts(tmp_path / "step-000001.parquet", make_rows(), method="cppo")
    write_rollouts(tmp_path / "step-000009.parquet", [row | {"step": 9} for row in make_rows()], method="dppo")
    assert Log.open(tmp_path).method is None


def test_parquet_beside_an_empty_rollouts_folder_is_read(tmp_path):
    (tmp_path / "rollouts").mkdir()
    write_raw(tmp_path / "a.parquet", make_rows())
    assert Log.open(tmp_path).responses == 32


def test_text_that_is_no_utf_8_and_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_pylist(make_rows(), schema=SCHEMA)
    broken = pa.array([b"\xff\xfe"] * len(table)).view(pa.string())
    path = tmp_path / "bytes.parquet"
    pq.write_table(table.set_column(2, "response", broken), path)
    with pytest.raises(ValueError, match=r"bytes.parquet, row 0, column 'response': expected UTF-8, got the byte 0xff"):
        list(Log.open(path).chunks(texts=True))
    twice = tmp_path / "twice.parquet"
    pq.write_table(table.append_column("logp", table["logp"]), twice)
    with pytest.raises(ValueError, match=r"twice.parquet: expected one column 'logp', found 2"):
        Log.open(twice)


def test_a_token_that_no_tokenizer_knows_has_no_text(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    assert TokenTexts(tmp_path / "tokenizer.json")([1, -1, 0]) == ["b", "", "a"]


DEEP = "method: " + "[" * 100_000
CONFIGS = [
    DEEP,
    "method: {a: &a [*b]}",
    "%YAML " + "1" * 5000 + ".1\n---\nmethod: cppo",
    r'method: "\UFFFFFFFF"',
    "a: b: c",
    "\x00",
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_a_configuration_that_cannot_be_read_is_named_where_the_log_says_no_method(tmp_path, config):
    write_log(tmp_path, make_rows())
    (tmp_path / "config.yaml").write_text(config)
    done = inspect(tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "config.yaml: cannot be read (" in done.stderr
    assert done.stderr.strip().endswith("name the method with --method")


@pytest.mark.parametrize(
    "value", ["2024-99-99", ".inf", "1" * 5000, "[1, 2]", "{<<: [{a: 1}]}", "!!python/name:os.system"]
)
def test_values_that_are_not_asked_for_break_nothing(tmp_path, value):
    write_log(tmp_path, make_rows())
    config = tmp_path / "config.yaml"
    config.write_text(f"other: {value}\nmethod: cppo?delta=0.3\n")
    assert _configured_method(config) == "cppo?delta=0.3"
    config.write_text(f"method: {value}\n")
    assert _configured_method(config) is None
    with pytest.raises(ValueError, match="expected to find the method that the run used, found none"):
        inspect_runs([tmp_path])


def test_a_log_that_says_its_method_needs_no_configuration(tmp_path):
    write_rollouts(tmp_path / "step-000001.parquet", make_rows(), method="dppo")
    (tmp_path / "config.yaml").write_text(DEEP)
    assert inspect_runs([tmp_path])["runs"][0]["method"] == "dppo"


@pytest.mark.parametrize("value", ["1" * 5000, "1" + "0" * 400, "1e999", "Infinity", "NaN", "[" * 100_000, "(" * 1000])
def test_a_method_of_impossible_numbers_is_named(tmp_path, value):
    write_rollouts(tmp_path / "step-000001.parquet", make_rows(), method=f"cppo?delta={value}")
    with pytest.raises(ValueError, match=r"names the method 'cppo\?delta=.*, which is none .*; name it with --method"):
        inspect_runs([tmp_path])


def test_learning_curves_are_of_numbers_alone():
    rows = [
        {"step": 1, "eval/accuracy": 0.5, "rollout/reward": "high"},
        {"step": 2, "eval/accuracy": [1], "rollout/reward": 10**400},
        {"step": 3, "eval/accuracy": NAN, "rollout/reward": INF},
        {"step": 4, "eval/standard_error": 0.1, "rollout/reward": 1},
    ]
    assert training_curve("a", rows) == {
        "label": "a", "steps": [1, 4], "accuracy": [0.5, None], "standard_error": [None, 0.1], "reward": [None, 1.0],
    }  # fmt: skip


def test_a_name_that_is_no_utf_8_is_one_line(tmp_path):
    folder = os.fsencode(write_log(tmp_path / "run", make_rows()))
    broken = os.fsencode(tmp_path / "br") + b"\xff\xfeken"
    os.rename(folder, broken)
    done = inspect(os.fsdecode(broken), "--method", "cppo")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "br\\udcff\\udcfeken" in done.stderr
    assert done.stderr.strip().endswith("expected a name in UTF-8; rename it, or its folder")


def test_a_log_that_is_given_twice_is_refused(tmp_path):
    run = write_log(tmp_path / "run", make_rows())
    (tmp_path / "link").symlink_to(run)
    for again in (run, run / "rollouts", run / "rollouts" / "step-000001.parquet", tmp_path / "link"):
        with pytest.raises(ValueError, match=r"step-000001\.parquet: given twice.*; expected each log once"):
            inspect_runs([run, again], own="cppo")
    os.link(run / "rollouts" / "step-000002.parquet", run / "rollouts" / "step-000003.parquet")
    with pytest.raises(ValueError, match=r"step-000003\.parquet: given twice, also as .*step-000002\.parquet"):
        inspect_runs([run], own="cppo")
    done = inspect(run, run, "--method", "cppo")
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)


def test_extreme_advantages_warn_of_nothing(tmp_path):
    rows = [row | {"advantage": 3e38 * (-1) ** index} for index, row in enumerate(make_rows(drift=3.0))]
    run = summarise(Log.open(write_log(tmp_path, rows)), "cppo")
    assert all(entry["weight_left"] is not None for entry in run["methods"])
