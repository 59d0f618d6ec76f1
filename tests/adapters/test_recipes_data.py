"""recipes/data.py on small made-up files of the published forms."""

import json
import pathlib
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from scripts import load_script

SCRIPT = pathlib.Path(__file__).parents[2] / "recipes" / "data.py"
data = load_script("recipes/data.py")

pytestmark = pytest.mark.train

# Written out: DAPO-Math-17k's own words.
ASKED = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
PROBLEMS = ["What is $1+1$?", "Let $S=\\{1,\n2\\}$. Find $|S|$.", "求 $x$ 的值。", "Simplify {problem}."]


def dapo_rows(problems=PROBLEMS, repeats=3, first=0):
    return [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": ASKED.format(text), "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(first + number), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"id-{number}"},
        }
        for _ in range(repeats)
        for number, text in enumerate(problems)
    ]


def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def sources(tmp_path):
    """DAPO's form, problem/answer with text, with integers in another case, and verl's form in a folder."""
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "hub" / "README.md").write_text("a data card")
    parquet(folder / "aime.parquet", dapo_rows([f"Of 2026: {n}" for n in range(30)], repeats=32))
    return {
        "train": [parquet(tmp_path / "dapo.parquet", dapo_rows())],
        "aime24": [lines(tmp_path / "a.jsonl", [{"problem": f"Of 2024: {n}", "answer": f"{n:03}"} for n in range(30)])],
        "aime25": [
            lines(tmp_path / f"{half}.jsonl", [{"ID": n, "Question": f"{half} {n}\n", "Answer": n} for n in range(15)])
            for half in ("I", "II")
        ],
        "aime26": [str(tmp_path / "hub")],
    }


def command(out, sources, *more):
    return ["--out", str(out), *(word for name in sources for word in (f"--{name}", *sources[name])), *more]


def table(path):
    return pyarrow.parquet.read_table(path).to_pylist()


def test_each_problem_once_in_dapos_words_with_its_own_answer(tmp_path, sources, capsys):
    assert data.main(command(tmp_path / "out", sources)) == 0
    rows = table(tmp_path / "out" / "train.parquet")
    assert rows == [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": ASKED.format(text)}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(number)},
            "extra_info": {"index": f"id-{number}"},
        }
        for number, text in enumerate(PROBLEMS)
    ]
    for year in ("24", "25", "26"):
        rows = table(tmp_path / "out" / f"aime{year}.parquet")
        assert {row["data_source"] for row in rows} == {f"aime{year}"}
        assert len({row["extra_info"]["index"] for row in rows}) == len(rows) == 30
    of24 = table(tmp_path / "out" / "aime24.parquet")
    assert of24[7]["prompt"][0]["content"] == ASKED.format("Of 2024: 7")
    assert of24[7]["reward_model"]["ground_truth"] == "7"  # not 007, which no response says
    assert table(tmp_path / "out" / "aime25.parquet")[15]["prompt"][0]["content"] == ASKED.format("II 0")
    assert table(tmp_path / "out" / "aime26.parquet")[29]["prompt"][0]["content"] == ASKED.format("Of 2026: 29")
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines() == [
        f"train: 12 rows, 4 problems -> {tmp_path / 'out' / 'train.parquet'}",
        f"aime24: 30 rows, 30 problems -> {tmp_path / 'out' / 'aime24.parquet'}",
        f"aime25: 30 rows, 30 problems -> {tmp_path / 'out' / 'aime25.parquet'}",
        f"aime26: 960 rows, 30 problems -> {tmp_path / 'out' / 'aime26.parquet'}",
    ]
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "out" / "*.parquet"), split="train")
    assert loaded.column_names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]  # one form for all


@pytest.mark.parametrize("text", PROBLEMS)
def test_a_problem_is_found_in_its_prompt_whatever_the_white_space(text):
    asked = ASKED.format(text)
    assert data.problem_of(asked) == text
    assert data.problem_of(asked.replace("\n\n", "\n") + "\n") == text
    assert data.problem_of(asked.replace("$Answer ", "$ANSWER ").rstrip(".")) == text
    assert data.problem_of(text) == text
    assert data.TEMPLATE.replace("{problem}", text) == asked


def test_problems_with_two_answers_are_left_out_and_counted(tmp_path, sources, capsys):
    twice = [*dapo_rows(), *dapo_rows(PROBLEMS[:1], repeats=1, first=99)]
    sources["train"] = [parquet(tmp_path / "twice.parquet", twice)]
    assert data.main(command(tmp_path / "out", sources)) == 0
    assert [row["reward_model"]["ground_truth"] for row in table(tmp_path / "out" / "train.parquet")] == ["1", "2", "3"]
    assert "13 rows, 4 problems, 1 left out (two answers)" in capsys.readouterr().out


def test_half_an_exam_and_problems_that_are_trained_on_are_told(tmp_path, sources, capsys):
    sources["aime25"] = sources["aime25"][:1]
    sources["train"] = [*sources["train"], sources["aime24"][0]]
    assert data.main(command(tmp_path / "out", sources)) == 0
    assert capsys.readouterr().err.splitlines() == [
        "aime24: 30 of its problems stand in the training set, word for word",
        "aime25: 15 problems; a year's AIME I and II have 30",
    ]


def refusal(capsys, arguments):
    assert data.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("data.py: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "train",
            [{"text": "a", "label": 1}],
            "row 1: the columns text, label: expected prompt and reward_model, or prob",
        ),
        ("train", [{"prompt": "a", "reward_model": {"ground_truth": "1"}}], "prompt='a': expected one message"),
        (
            "train",
            [{"prompt": [{"role": "user", "content": "a"}], "reward_model": {}}],
            "the answer None: expected text",
        ),
        ("train", [{"prompt": [{"role": "user", "content": ""}], "reward_model": {"ground_truth": "1"}}], "problem ''"),
        (
            "aime24",
            [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": " "}],
            "row 2: the answer ' ': expected",
        ),
        ("aime24", [{"problem": " ", "answer": "1"}], "row 1: the problem ' ': expected text that is not empty"),
        ("aime25", [{"problem": "a", "answer": "$\\sqrt 2$"}], "expected an integer from 0 to 999, as AIME has"),
        ("aime25", [{"problem": "a", "answer": 1.5}], "the answer 1.5: expected text or an integer"),
        ("aime26", [{"problem": "a", "answer": True}], "the answer True: expected text or an integer"),
        ("aime26", [{"problem": "a", "answer": 1}, {"problem": "a", "answer": 2}], "every problem has two answers"),
    ],
)
def test_rows_of_another_form_are_refused_by_row(tmp_path, sources, capsys, name, rows, message):
    sources[name] = [lines(tmp_path / "bad.jsonl", rows)]
    said = refusal(capsys, command(tmp_path / "out", sources))
    assert f"--{name}" in said
    assert message in said
    assert list((tmp_path / "out").glob("*")) == []


def test_sources_that_are_none_are_refused(tmp_path, sources, capsys):
    def told(*given):
        return refusal(capsys, command(tmp_path / "out", sources | {"aime24": list(given)}))

    assert "there is no such file or folder" in told("nowhere.parquet")
    assert "OWNER/NAME" in told("nowhere")
    (tmp_path / "empty.jsonl").write_text("")
    assert "has no rows; expected problems" in told(str(tmp_path / "empty.jsonl"))
    none = pyarrow.table(
        {"problem": pyarrow.array([], pyarrow.string()), "answer": pyarrow.array([], pyarrow.string())}
    )
    pyarrow.parquet.write_table(none, tmp_path / "none.parquet")
    assert "has no rows" in told(str(tmp_path / "none.parquet"))
    (tmp_path / "text.csv").write_text("problem,answer\na,1\n")
    assert "got .csv" in told(str(tmp_path / "text.csv"))
    (tmp_path / "folder").mkdir()
    assert "got none" in told(str(tmp_path / "folder"))
    (tmp_path / "junk.parquet").write_text("no parquet")
    assert str(tmp_path / "junk.parquet") in told(str(tmp_path / "junk.parquet"))
    (tmp_path / "junk.jsonl").write_text("{no json\n")
    assert str(tmp_path / "junk.jsonl") in told(str(tmp_path / "junk.jsonl"))


def test_several_splits_of_a_hub_set_are_refused(tmp_path, sources, capsys, monkeypatch):
    asked = []

    def hub(path, configuration=None, **_):
        asked.append((path, configuration))
        return {"train": [], "test": []}

    monkeypatch.setattr(datasets, "load_dataset", hub)
    sources["train"] = ["owner/set:part"]
    said = refusal(capsys, command(tmp_path / "out", sources))
    assert said == "data.py: --train owner/set:part: has the splits train, test; expected one\n"
    assert asked == [("owner/set", "part")]


def test_existing_files_are_written_over_only_when_asked(tmp_path, sources, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "aime25.parquet").write_text("mine")
    said = refusal(capsys, command(out, sources))
    assert f"--out {out}: {out / 'aime25.parquet'} exists; expected a new folder, or --force" in said
    assert [path.name for path in out.iterdir()] == ["aime25.parquet"]
    assert (out / "aime25.parquet").read_text() == "mine"
    (tmp_path / "same").hardlink_to(out / "aime25.parquet")
    assert data.main(command(out, sources, "--force")) == 0
    assert len(table(out / "aime25.parquet")) == 30
    assert (tmp_path / "same").read_text() == "mine"  # put in its place, not written into


def test_a_failure_while_writing_leaves_what_was_there(tmp_path, sources, capsys, monkeypatch):
    out = tmp_path / "out"
    assert data.main(command(out, sources)) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    whole, calls = pyarrow.parquet.write_table, []

    def full(rows, path):
        calls.append(path)
        if len(calls) == 3:
            raise OSError("no space left on device")
        whole(rows, path)

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    sources["aime24"] = sources["aime26"]  # else what is written would be what was there
    sources["train"] = sources["aime26"]
    assert "no space left" in refusal(capsys, command(out, sources, "--force"))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.processes
def test_as_a_command(tmp_path, sources):
    done = subprocess.run(
        [sys.executable, SCRIPT, *command(tmp_path / "out", sources)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    done = subprocess.run(
        [sys.executable, SCRIPT, *command(tmp_path / "out", sources)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
