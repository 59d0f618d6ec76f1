"""Reading a rollout log: what comes out is what was written; what cannot be used is named by file, row and column."""

import dataclasses
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from logs import make_row, make_rows, write_log, write_raw

from cppo.inspect.reading import Log
from cppo.rollout_log import SCHEMA, RolloutWriter, read_rollouts

pytestmark = pytest.mark.train


@pytest.mark.parametrize("tokens", [1, 50, 10**6])
@pytest.mark.parametrize("divergence", [False, True])
def test_what_comes_out_is_what_was_written(tmp_path, tokens, divergence):
    rows = make_rows(divergence=divergence)
    log = Log.open(write_log(tmp_path / "run", rows))
    assert (log.name, len(log.files), log.responses) == ("run", 2, len(rows))
    chunks = list(log.chunks(texts=True, tokens=tokens))
    assert (len(chunks) > 2) == (tokens < 10**6)
    found = 0
    for chunk in chunks:
        for index in range(len(chunk.lengths)):
            row, where = rows[found], slice(chunk.offsets[index], chunk.offsets[index + 1])
            for name in ("logp", "rollout_logp", "token_ids", "response_mask"):
                np.testing.assert_array_equal(
                    getattr(chunk, name)[where], np.asarray(row[name], getattr(chunk, name).dtype)
                )
            if divergence:
                np.testing.assert_allclose(chunk.divergence[where], row["divergence"], rtol=1e-6)
            assert (chunk.step[index], chunk.reward[index], chunk.advantage[index]) == (
                row["step"], row["reward"], row["advantage"],
            )  # fmt: skip
            assert (chunk.prompt[index], chunk.response[index]) == (row["prompt"], row["response"])
            found += 1
        assert (chunk.divergence is None) == (not divergence)
    assert found == len(rows)


def test_a_run_a_folder_and_a_file_are_logs(tmp_path):
    run = write_log(tmp_path / "run", make_rows())
    whole, folder = Log.open(run), Log.open(run / "rollouts")
    assert whole.files == folder.files
    assert Log.open(whole.files[0]).responses == 16


def test_other_widths_and_missing_optional_columns_are_read(tmp_path):
    rows = make_rows()
    wide = pa.schema(
        [
            pa.field(f.name, pa.large_list(pa.float64()) if f.name.endswith("logp") else f.type)
            for f in SCHEMA
            if f.name != "divergence"
        ]
    )
    path = write_raw(tmp_path / "wide.parquet", [row | {"reward": None, "prompt": None} for row in rows], wide)
    (chunk,) = Log.open(path).chunks(texts=True)
    assert np.isnan(chunk.reward).all()
    assert set(chunk.prompt) == {None}
    np.testing.assert_allclose(chunk.logp, np.concatenate([row["logp"] for row in rows]), rtol=1e-6)


def retyped(**kinds):
    return pa.schema([pa.field(f.name, kinds.get(f.name, f.type)) for f in SCHEMA])


FIXED = pa.list_(pa.float32(), 5)
CODED = pa.dictionary(pa.int8(), pa.string())


@pytest.mark.parametrize(
    "schema",
    [
        retyped(logp=FIXED, rollout_logp=FIXED, response_mask=pa.list_(pa.bool_(), 5), divergence=FIXED),
        retyped(token_ids=pa.large_list(pa.int64()), logp=pa.large_list(pa.float64()), divergence=pa.null()),
        retyped(prompt=CODED, response=pa.large_string(), divergence=pa.null(), step=pa.uint8()),
        retyped(token_ids=pa.list_(pa.uint32()), step=pa.uint64()),
    ],
)
def test_every_encoding_is_read_alike(tmp_path, schema):
    rows = make_rows(steps=2, length=5, divergence=pa.types.is_fixed_size_list(schema.field("divergence").type))
    (plain,) = Log.open(write_raw(tmp_path / "plain.parquet", rows)).chunks(texts=True)
    other = write_raw(tmp_path / "other.parquet", rows, schema)
    assert pq.ParquetFile(other).schema_arrow.equals(schema)
    (chunk,) = Log.open(other).chunks(texts=True)
    for field in dataclasses.fields(chunk):
        if field.name != "file":
            np.testing.assert_array_equal(getattr(chunk, field.name), getattr(plain, field.name))


def test_columns_of_nothing_but_nulls_and_coded_numbers_are_read(tmp_path):
    rows = [row | {"reward": None, "prompt": None, "response": None} for row in make_rows(length=5)]
    table = pa.Table.from_pylist(rows, schema=retyped(**dict.fromkeys(("reward", "prompt", "response"), pa.null())))
    table = table.set_column(0, "step", table["step"].dictionary_encode())
    pq.write_table(table, tmp_path / "log.parquet")
    (chunk,) = Log.open(tmp_path / "log.parquet").chunks(texts=True)
    assert np.isnan(chunk.reward).all()
    assert set(chunk.prompt) == set(chunk.response) == {None}
    assert chunk.step.tolist() == [row["step"] for row in rows]


@pytest.mark.parametrize(
    ("column", "kind", "value", "message"),
    [
        ("step", pa.uint64(), 2**63, "int64 holds, got 9223372036854775808"),
        ("token_ids", pa.list_(pa.int64()), [7, 2**31], "int32 holds, got 2147483648"),
        ("token_ids", pa.list_(pa.int64()), [7, -(2**40)], "int32 holds, got -1099511627776"),
        ("token_ids", pa.list_(pa.uint64()), [7, 2**64 - 1], "int32 holds, got 18446744073709551615"),
    ],
)  # fmt: skip
def test_whole_numbers_out_of_range_are_named(tmp_path, column, kind, value, message):
    rows = make_rows(steps=1, length=2)
    rows[3][column] = value
    log = Log.open(write_raw(tmp_path / "log.parquet", rows, retyped(**{column: kind})))
    with pytest.raises(ValueError, match=r"log\.parquet, row 3, ") as error:
        list(log.chunks())
    assert f"column {column!r}: expected a number that {message}" in str(error.value)


def test_log_probs_beyond_float32_are_infinite_without_a_warning(tmp_path):
    rows = make_rows(steps=1, length=3)
    rows[0]["logp"] = [-1e308, -1.0, 1e308]
    path = write_raw(tmp_path / "log.parquet", rows, retyped(logp=pa.list_(pa.float64())))
    (chunk,) = Log.open(path).chunks()
    assert chunk.logp[:3].tolist() == [-np.inf, -1.0, np.inf]


def test_files_are_read_in_the_order_of_their_numbers(tmp_path):
    for step in (8, 9, 10, 11):
        write_raw(tmp_path / f"{step}.parquet", [make_row(random.Random(step), step)])
    assert [file.stem for file in Log.open(tmp_path).files] == ["8", "9", "10", "11"]
    assert [row["step"] for row in read_rollouts(tmp_path)] == [8, 9, 10, 11]
    (chunk,) = Log.open(tmp_path).chunks()
    assert chunk.step.tolist() == [8, 9, 10, 11]


def test_a_resumed_run_goes_on_after_a_millionth_update(tmp_path):
    write_raw(tmp_path / "step-999999.parquet", make_rows(steps=1))
    writer = RolloutWriter(tmp_path, "rollout_log")
    writer.add(make_rows(steps=1))
    writer.write(1_000_000)
    assert (tmp_path / "step-1000000.parquet").is_file()
    late = RolloutWriter(tmp_path, "rollout_log")
    late.add(make_rows(steps=1))
    with pytest.raises(ValueError, match=r"expected a folder without update 1000000, found step-1000000\.parquet"):
        late.write(1_000_000)


def test_small_files_are_read_together_and_a_row_keeps_its_place(tmp_path):
    rows = make_rows(steps=30, responses=2, length=4, holes=False)
    write_log(tmp_path, rows, files=30)
    chunks = list(Log.open(tmp_path).chunks(texts=True, tokens=80))
    assert [len(chunk.lengths) for chunk in chunks] == [20, 20, 20]
    assert chunks[1].place(3).endswith("step-000012.parquet, row 1")
    assert [int(step) for chunk in chunks for step in chunk.step] == [row["step"] for row in rows]
    broken = make_rows(steps=1, length=4)
    broken[5]["logp"] = [-1.0] * 3
    write_raw(tmp_path / "rollouts" / "step-000031.parquet", [row | {"step": 31} for row in broken])
    with pytest.raises(
        ValueError, match=r"step-000031\.parquet, row 5, column 'rollout_logp': expected a list as long"
    ):
        list(Log.open(tmp_path).chunks())


def test_a_divergence_that_some_files_lack_is_none(tmp_path):
    write_raw(tmp_path / "1.parquet", make_rows(steps=1, divergence=True))
    write_raw(tmp_path / "2.parquet", [row | {"step": 2} for row in make_rows(steps=1)])
    log = Log.open(tmp_path)
    assert log.survey() == ([1, 2], False)
    assert [chunk.divergence for chunk in log.chunks()] == [None]


def changed(index, **values):
    rows = make_rows(steps=1, length=5)
    rows[index] |= values
    return rows


NAN = float("nan")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(3, logp=[-1.0] * 4), "row 3, column 'rollout_logp': expected a list as long as logp's, 4, got 5"),
        (changed(2, response_mask=[True] * 6), "row 2, column 'response_mask': expected a list as long as logp's, 5"),
        (changed(5, token_ids=[1]), "row 5, column 'token_ids': expected a list as long as logp's, 5, got 1"),
        (changed(1, logp=None), "row 1, column 'logp': expected a list, got null"),
        (changed(4, rollout_logp=[-1.0, None] + [-1.0] * 3), "row 4, column 'rollout_logp': expected numbers, got"),
        (changed(6, advantage=NAN), "row 6, column 'advantage': expected a finite number that float32 holds, got"),
        (changed(6, advantage=None), "row 6, column 'advantage': expected a number, got null"),
        (changed(0, divergence=[0.1] * 5), "row 1, column 'divergence': expected a list, as in the rows"),
        (
            [row | {"divergence": [0.1] * 3} for row in changed(0)],
            "row 0, column 'divergence': expected a list as long as logp's, 5, got 3",
        ),
        (changed(6, advantage=1e308), "row 6, column 'advantage': expected a finite number that float32 holds, got 1e"),
        (changed(2, reward=-1e308), "row 2, column 'reward': expected a finite number that float32 holds, got -1e+308"),
        (changed(5, step=-1), "row 5, column 'step': expected the number of an update, 0 or more, got -1"),
        (
            changed(3, step=0),
            "row 3, column 'step': expected one run's updates in order, files in that of their names, got 0 after",
        ),
        (
            [row | {"divergence": [0.1] * 4 + [None]} for row in changed(0)],
            "row 0, column 'divergence': expected numbers, got a null",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_used_is_named_by_file_row_and_column(tmp_path, rows, message):
    path = write_raw(tmp_path / "log.parquet", rows)
    with pytest.raises(ValueError, match=r"log\.parquet, ") as error:
        list(Log.open(path).chunks())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_updates_of_two_runs_do_not_mix(tmp_path):
    run = write_log(tmp_path / "run", make_rows(steps=4), files=1)
    write_raw(run / "rollouts" / "step-000009.parquet", make_rows(steps=2))
    with pytest.raises(ValueError, match=r"step-000009.parquet, row 0, column 'step': .* got 1 after a later one"):
        list(Log.open(run).chunks())


def test_files_that_are_no_rollout_log_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere: expected a run's folder"):
        Log.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected \*\.parquet in it or in its rollouts/, found none"):
        Log.open(tmp_path / "empty")
    text = tmp_path / "text.parquet"
    text.write_text("no parquet")
    with pytest.raises(ValueError, match=r"text.parquet: cannot be read as parquet: "):
        Log.open(text)
    cut = write_raw(tmp_path / "cut.parquet", make_rows())
    cut.write_bytes(cut.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"cut.parquet: cannot be read as parquet: ") as error:
        Log.open(cut)
    assert "\n" not in str(error.value)
    none = write_raw(tmp_path / "none.parquet", [])
    with pytest.raises(ValueError, match=r"none\.parquet: expected responses, found none"):
        Log.open(none)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other.parquet: expected the column 'step' \(docs/rollout-log.md\)"):
        Log.open(tmp_path / "other.parquet")
    newer = SCHEMA.with_metadata({"cppo.rollout_log": "7"})
    with pytest.raises(ValueError, match="expected a rollout log of version 1, got '7'"):
        Log.open(write_raw(tmp_path / "newer.parquet", make_rows(), newer))
    texts = pa.schema([pa.field(f.name, pa.string() if f.name == "logp" else f.type) for f in SCHEMA])
    rows = [row | {"logp": "text"} for row in make_rows()]
    with pytest.raises(ValueError, match=r"types.parquet, column 'logp': expected list<.*float.*>, got string"):
        Log.open(write_raw(tmp_path / "types.parquet", rows, texts))


def test_a_file_damaged_inside_is_named(tmp_path):
    path = write_raw(tmp_path / "damaged.parquet", make_rows(responses=200))
    content = bytearray(path.read_bytes())
    content[4:-3000] = bytes(len(content) - 3004)  # all pages; the footer stays
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"damaged\.parquet: cannot be read"):
        list(Log.open(path).chunks())
