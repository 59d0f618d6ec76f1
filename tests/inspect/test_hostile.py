"""Careless and hostile logs: no wrong statement, no traceback, nothing that steers a terminal."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from logs import make_row, make_rows, write_log, write_raw
from test_advice import titles
from test_command import inspect

from cppo.inspect.reading import Log
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
