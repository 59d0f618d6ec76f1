"""Reading a rollout log: what comes out is what was written; what cannot be used is named by file, row and column."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from logs import make_rows, write_log, write_raw

from cppo.inspect.reading import Log
from cppo.rollout_log import SCHEMA

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
        (changed(6, advantage=NAN), "row 6, column 'advantage': expected a finite number, got nan"),
        (changed(6, advantage=None), "row 6, column 'advantage': expected a number, got null"),
        (changed(0, divergence=[0.1] * 5), "row 1, column 'divergence': expected a list, as in the rows"),
        (
            [row | {"divergence": [0.1] * 3} for row in changed(0)],
            "row 0, column 'divergence': expected a list as long as logp's, 5, got 3",
        ),
        (changed(3, step=0), "row 3, column 'step': expected one run's updates in order, got 0 after a later one"),
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
