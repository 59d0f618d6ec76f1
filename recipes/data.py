"""DAPO-Math-17k and AIME 2024, 2025, 2026 as the parquet files that both recipes read.

    python recipes/data.py --out data  # from the hub
    python recipes/data.py --out data --train D.parquet --aime24 A.jsonl --aime25 I.jsonl II.jsonl --aime26 D/

    python recipes/data.py --out data --train DAPO.parquet --aime24 A.jsonl --aime25 I.jsonl II.jsonl --aime26 F/
either DAPO's form (prompt: messages, reward_model.ground_truth) or problem (or question) and answer. Every problem is
kept once and asked in DAPO's words, so that validation is asked as training is.
"""
# ruff: noqa: T201  a script prints

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SETS = ("train", "aime24", "aime25", "aime26")
SOURCES = {
    "train": ["BytedTsinghua-SIA/DAPO-Math-17k"],
    "aime24": ["HuggingFaceH4/aime_2024"],
    "aime25": ["MathArena/aime_2025"],
    "aime26": ["MathArena/aime_2026"],
}
# verl chooses the reward by it: math_dapo, and all that starts with aime, are scored by its math_dapo.
DATA_SOURCES = {"train": "math_dapo"} | {name: name for name in SETS[1:]}
# The words of DAPO-Math-17k.
TEMPLATE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\nRemember to put your answer "
    'on its own line after "Answer:".'
)
_TEMPLATE = re.compile(
    r"\s*Solve the following math problem step by step\..{0,150}?answer to the problem\."
    r'(?P<problem>.*)Remember to put your answer on its own line after "Answer:"\.?\s*',
    re.DOTALL,
)
_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
_PROBLEMS_OF_A_YEAR = 30  # AIME I and II


def problem_of(prompt: str) -> str:
    """Return the problem in a prompt of DAPO's, or the whole text where its words are not around it."""
    found = _TEMPLATE.fullmatch(prompt)
    return (found["problem"] if found else prompt).strip()


def read(source: str, where: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a file, a folder or a hub data set.

    Raises:
        ValueError: if there is no such thing, or it does not say which of several splits is meant.
    """
    import datasets

    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".parquet", ".jsonl"))
    else:
        files = [path] if path.is_file() else []
    kinds = {_FORMATS.get(file.suffix, file.suffix) for file in files}
    if len(kinds) > 1 or kinds - set(_FORMATS.values()) or (path.is_dir() and not files):
        raise ValueError(f"{where}: expected .parquet files or .jsonl files, got {', '.join(sorted(kinds)) or 'none'}")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it says besides is said below, in one line
    try:
        full = [file for file in files if _has_rows(file)]
        if full:
            splits = datasets.load_dataset(kinds.pop(), data_files=[str(file) for file in full], streaming=True)
        elif files:
            return
        elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) and path.suffix not in _FORMATS:
            name, _, configuration = source.partition(":")
            splits = datasets.load_dataset(name, configuration or None, streaming=True)
        else:
            raise ValueError("there is no such file or folder, and it is no hub id (OWNER/NAME, or OWNER/NAME:CONFIG)")
        if len(splits) > 1:
            raise ValueError(f"has the splits {', '.join(splits)}; expected one")
        yield from next(iter(splits.values()))
    except (ValueError, TypeError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None


def _has_rows(file: Path) -> bool:
    """Say whether there is anything in a file; datasets fails on one that is empty."""
    import pyarrow.parquet

    if file.suffix == ".parquet":
        return bool(pyarrow.parquet.read_metadata(file).num_rows)
    return file.stat().st_size > 0


def parse(row: Mapping[str, Any], where: str) -> tuple[str, str, object]:
    """Return problem, answer and, where the row has one, index.

    Raises:
        ValueError: naming the columns, or the value, and what was expected.
    """
    columns = {name.lower(): value for name, value in row.items()}
    question = columns.get("problem", columns.get("question"))
    if "prompt" in columns and isinstance(columns.get("reward_model"), Mapping):
        messages, answer = columns["prompt"], columns["reward_model"].get("ground_truth")
        if not isinstance(messages, Sequence) or isinstance(messages, str) or len(messages) != 1:
            raise ValueError(f"{where}: prompt={str(messages)[:60]!r}: expected one message (role, content)")
        question = problem_of(str(messages[0].get("content") or ""))
    elif question is not None and "answer" in columns:
        answer = columns["answer"]
    else:
        raise ValueError(
            f"{where}: the columns {', '.join(row)}: expected prompt and reward_model, or problem (or question) and "
            "answer"
        )
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: the problem {question!r}: expected text that is not empty")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, bool) or not isinstance(answer, int | str) or not str(answer).strip():
        raise ValueError(f"{where}: the answer {answer!r}: expected text or an integer")
    extra = columns.get("extra_info")
    return question.strip(), str(answer).strip(), extra.get("index") if isinstance(extra, Mapping) else None


def collect(name: str, sources: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """Return a set's rows, each problem once, and a line that counts them.

    Raises:
        ValueError: for a source that cannot be read or has no rows, a row of another form, an answer that no AIME has.
    """
    from tqdm import tqdm

    answers: dict[str, tuple[str, object]] = {}
    contradicted: set[str] = set()
    count = 0
    for source in sources:
        where = f"--{name} {source}"
        before = count
        for row in tqdm(read(source, where), desc=name, unit=" rows", disable=None, leave=False):
            count += 1
            at = f"{where}, row {count - before}"
            problem, answer, index = parse(row, at)
            if name != "train":
                answer = _aime_answer(answer, at)
            if answers.setdefault(problem, (answer, index))[0] != answer:
                contradicted.add(problem)
        if count == before:
            raise ValueError(f"{where}: has no rows; expected problems")
    rows = [
        {
            "data_source": DATA_SOURCES[name],
            "prompt": [{"role": "user", "content": TEMPLATE.replace("{problem}", problem)}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"index": f"{name}-{number}" if index is None else str(index)},
        }
        for number, (problem, (answer, index)) in enumerate(answers.items())
        if problem not in contradicted
    ]
    if not rows:
        raise ValueError(f"--{name}: every problem has two answers; expected one")
    line = f"{name}: {count:,} rows, {len(answers):,} problems"
    return rows, line + (f", {len(contradicted):,} left out (two answers)" if contradicted else "")


def _aime_answer(answer: str, where: str) -> str:
    # 073 in some sets; verl compares text with what the response says.
    if not re.fullmatch(r"\d{1,3}", answer):
        raise ValueError(f"{where}: the answer {answer!r}: expected an integer from 0 to 999, as AIME has")
    return str(int(answer))


def prepare(out: Path, sources: Mapping[str, Sequence[str]], *, force: bool = False) -> None:
    """Write ``train.parquet``, ``aime24.parquet``, ``aime25.parquet`` and ``aime26.parquet``: all of them, or none.

    Args:
        out: the folder; made where there is none.
        sources: of each set, one or more.
        force: write over files of these names.

    Raises:
        ValueError: for a file that exists, and as :func:`collect`.
    """
    import pyarrow
    import pyarrow.parquet

    places = {name: out / f"{name}.parquet" for name in SETS}
    there = [str(place) for place in places.values() if place.exists()]
    if there and not force:
        raise ValueError(f"--out {out}: {', '.join(there)} exists; expected a new folder, or --force to write over it")
    out.mkdir(parents=True, exist_ok=True)
    sets = {name: collect(name, sources[name]) for name in SETS}
    asked = {row["prompt"][0]["content"] for row in sets["train"][0]}
    with tempfile.TemporaryDirectory(prefix=".", dir=out) as beside:
        written = {name: Path(beside) / place.name for name, place in places.items()}
        for name, (rows, _) in sets.items():
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), written[name])
        for name, path in written.items():
            path.replace(places[name])
    for name, (rows, line) in sets.items():
        print(f"{line} -> {places[name]}")
        if name == "train":
            continue
        if len(rows) != _PROBLEMS_OF_A_YEAR:
            print(f"{name}: {len(rows)} problems; a year's AIME I and II have {_PROBLEMS_OF_A_YEAR}", file=sys.stderr)
        seen = sum(row["prompt"][0]["content"] in asked for row in rows)
        if seen:
            print(f"{name}: {seen} of its problems stand in the training set, word for word", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; what a user can mend is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the four parquet files")
    parser.add_argument("--force", action="store_true", help="write over existing ones")
    for name in SETS:
        parser.add_argument(
            f"--{name}", nargs="+", default=SOURCES[name], metavar="SOURCE", help=f"default: {SOURCES[name][0]}"
        )
    given = parser.parse_args(arguments)
    try:
        prepare(given.out, {name: getattr(given, name) for name in SETS}, force=given.force)
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
