"""``cppo inspect`` as a user meets it: a summary, JSON, a page, and one line for what cannot be."""

import io
import json

import pytest
from logs import make_rows, write_log
from rich.console import Console
from typed import typed

from cppo.inspect.runs import inspect_runs
from cppo.inspect.terminal import print_document
from cppo.printable import printable
from cppo.rollout_log import write_rollouts

pytestmark = pytest.mark.train


def inspect(*words):
    return typed("inspect", *words, columns=120)


@pytest.fixture
def run(tmp_path):
    return write_log(tmp_path / "first", make_rows(drift=0.5))


def test_the_summary_names_methods_findings_and_thresholds(run):
    done = inspect(run, "--method", "cppo?delta=0.1")
    assert done.returncode == 0, done.stderr
    assert "first  (cppo?delta=0.1)" in done.stdout
    for words in ("32 responses", "updates 1 to 4", "policy_gradient", "To mask 2.0% of these tokens", "warning: "):
        assert words in done.stdout


def test_the_terminal_shows_texts_once_escaped_and_what_the_thresholds_reach(run):
    console = Console(width=200, file=io.StringIO())
    document = inspect_runs([run], own="cppo", beside=())
    entry = {"id": 1, "count": 3, "rejected": 2}
    texts = [printable(text) for text in ("it's", "a\\b", "\x1b[2J", "\n\t")]
    document["runs"][0]["rejected_tokens"] = [entry | {"text": text} for text in texts]
    print_document(document, console)
    shown = console.file.getvalue()
    assert r"'it's' 2 of 3, 'a\b' 2 of 3, '\u001b[2J' 2 of 3, '\n\t' 2 of 3" in shown
    reached = document["runs"][0]["suggestion"]["masked"]
    assert f"), which masks {reached:.1%}. The paper's delta" in shown


def test_the_terminal_says_which_tokens_were_rejected_by_their_probability(run):
    console = Console(width=200, file=io.StringIO())
    document = inspect_runs([run], own="cppo?delta=0.1", beside=())
    print_document(document, console)
    found, own = document["runs"][0]["probabilities"], document["runs"][0]["methods"][0]
    assert sum(found["tokens_positive"] + found["tokens_negative"]) <= document["runs"][0]["tokens"]
    rows = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines() if "0.1 - 0.5" in line]
    assert rows == [[
        "0.1", "-", "0.5", f"{own['masked_positive_by_probability'][3]:.1%}", f"{found['tokens_positive'][3]:,}",
        f"{own['masked_negative_by_probability'][3]:.1%}", f"{found['tokens_negative'][3]:,}",
    ]]  # fmt: skip


def test_json_is_the_document(run):
    done = inspect(run, "--method", "dppo", "--beside", "cppo", "--beside", "grpo", "--masked", "0.1", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == inspect_runs([run], own="dppo", beside=("cppo", "grpo"), wanted=0.1)
    assert [entry["spec"] for entry in document["runs"][0]["methods"]] == ["dppo", "cppo", "grpo"]


def test_a_log_says_which_method_judged_it(tmp_path):
    (tmp_path / "rollouts").mkdir()
    write_rollouts(tmp_path / "rollouts" / "step-000001.parquet", make_rows(), method="cppo?delta=0.3&w_min=0.5")
    done = inspect(tmp_path, "--json")
    assert json.loads(done.stdout)["runs"][0]["method"] == "cppo?delta=0.3&w_min=0.5"


def test_several_runs_and_a_page(run, tmp_path):
    other = write_log(tmp_path / "other" / "first", make_rows(7))
    page = tmp_path / "both.html"
    done = inspect(run, other, "--method", "cppo", "--html", page)
    assert done.returncode == 0, done.stderr
    assert f"{page}: the page" in done.stdout
    content = page.read_text(encoding="utf-8")
    again = inspect(run, "--method", "cppo", "--html", page)
    assert again.returncode != 0
    assert f"--html {page}: exists; expected a new file, or --force" in again.stderr
    assert page.read_text(encoding="utf-8") == content
    assert inspect(run, "--method", "cppo", "--html", page, "--force").returncode == 0
    assert page.read_text(encoding="utf-8") != content


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: expected a run's folder, a folder of parquet files or a parquet file"),
        (["RUN"], "expected to find the method that the run used, found none; name it with --method"),
        (["RUN", "--method", "cpo"], "method='cpo': expected one of cppo"),
        (["RUN", "--method", "cppo?divergence=topk_tv"], "needs a measured divergence, and this log has none"),
        (["RUN", "--method", "cppo", "--beside", "dppo?detla=1"], "dppo has no knob 'detla'"),
        (["RUN", "--method", "cppo", "--html", "no/where/page.html"], "expected a file in an existing folder"),
    ],
)
def test_what_cannot_be_is_one_line(run, words, message):
    done = inspect(*(run if word == "RUN" else word for word in words))
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
