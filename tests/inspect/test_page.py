"""The report page as a file: whole in itself, safe with any text, and it holds the document."""

import base64
import hashlib
import html.parser
import json
import math
import re

import pytest
from logs import make_rows, write_log
from page_documents import HOSTILE, make_curve, make_document, make_hostile_document, make_run

from cppo.inspect.page import write_page
from cppo.inspect.runs import inspect_runs, training_curve

pytestmark = pytest.mark.train


class Reader(html.parser.HTMLParser):
    """Collects a page's elements, and the texts of its scripts and styles."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.title, self._inside = [], [], "", None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append([dict(attrs), ""])

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1][1] += data
        if self._inside == "title":
            self.title += data


def page_of(tmp_path, document, training=None):
    write_page(tmp_path / "page.html", document, training)
    return (tmp_path / "page.html").read_bytes().decode("utf-8")


def own_parts(text):
    """Return the page without plotly."""
    plotly = max(Reader(text).scripts, key=lambda script: len(script[1]) if not script[0] else 0)[1]
    return text.replace(plotly, "")


def data_of(text):
    return json.loads(next(body for attributes, body in Reader(text).scripts if attributes.get("id") == "data"))


def cleaned(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: cleaned(item) for key, item in value.items()}
    return [cleaned(item) for item in value] if isinstance(value, list) else value


def test_the_page_asks_for_nothing_outside_itself(tmp_path):
    own = own_parts(page_of(tmp_path, make_document()))
    assert not re.search(r"https?:|//cdn|@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\(", own)
    for _, attributes in Reader(own).elements:
        assert not {"src", "srcset", "action", "style"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#").startswith("#")


def test_the_policy_lets_exactly_the_pages_scripts_run(tmp_path):
    page = Reader(page_of(tmp_path, make_document()))
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert parts["default-src"] == "'none'"
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'"
        for attributes, body in page.scripts
        if attributes.get("type") != "application/json"
    ]
    assert parts["script-src"].split() == hashes
    assert len(hashes) == 2
    assert "unsafe-eval" not in policy


def test_the_page_holds_the_document_and_the_learning_curves(tmp_path):
    document = make_document(make_run("first"), make_run("second"))
    assert data_of(page_of(tmp_path, document, [make_curve()])) == cleaned(document | {"training": [make_curve()]})
    assert data_of(page_of(tmp_path, document))["training"] == []


def test_hostile_text_is_data_and_nothing_else(tmp_path):
    document = make_hostile_document()
    text = page_of(tmp_path, document)
    page = Reader(text)
    assert len(page.scripts) == 3
    assert not [tag for tag, _ in page.elements if tag in ("img", "b")]
    assert data_of(text) == cleaned(document | {"training": []})
    assert HOSTILE.split("\u2028")[0] in page.title
    assert not re.search("[\u2028\u2029\u202e\x07]", own_parts(text))


def test_names_of_the_templates_places_are_only_text(tmp_path):
    document = make_document(make_run("@@script@@ @@data@@"))
    page = Reader(page_of(tmp_path, document))
    assert "@@script@@ @@data@@" in page.title
    assert len(page.scripts) == 3


def test_the_page_is_small_beside_plotly(tmp_path):
    document = make_document(make_run(examples=[]))
    assert len(own_parts(page_of(tmp_path, document))) < 80_000


def test_our_scripts_write_no_markup_and_make_no_code(tmp_path):
    script = Reader(page_of(tmp_path, make_document())).scripts[-1][1]
    assert "textContent" in script
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser", script
    )


def test_a_learning_curve_has_one_place_an_update(tmp_path):
    rows = [
        {"step": 0, "eval/accuracy": 0.25, "eval/standard_error": 0.02},
        {"step": 1, "rollout/reward": 0.5},
        {"step": 2, "gate/mean": 1.0},
        {"step": 3, "rollout/reward": 0.75, "eval/accuracy": 0.5, "eval/standard_error": None},
    ]
    assert training_curve("a", rows) == {
        "label": "a", "steps": [0, 1, 3], "accuracy": [0.25, None, 0.5], "standard_error": [0.02, None, None],
        "reward": [None, 0.5, 0.75],
    }  # fmt: skip
    assert training_curve("a", rows[2:3]) is None
    assert training_curve("a", []) is None


def test_runs_of_one_name_are_told_apart_and_each_is_judged_by_its_own_method(tmp_path):
    folders = [write_log(tmp_path / place / "run", make_rows(seed)) for seed, place in enumerate("ab")]
    for folder, method in zip(folders, ("dppo", "cppo?delta=0.1"), strict=True):
        (folder / "config.yaml").write_text(f"method: {method}\n")
    document = inspect_runs(folders, beside=("grpo",), responses=2)
    assert [run["name"] for run in document["runs"]] == ["run", "run (2)"]
    assert [run["method"] for run in document["runs"]] == ["dppo", "cppo?delta=0.1"]
    assert [entry["spec"] for entry in document["runs"][0]["methods"]] == ["dppo", "grpo"]
    assert data_of(page_of(tmp_path, document))["runs"] == cleaned(document["runs"])


def test_a_log_that_names_no_method_is_not_judged_by_a_guess(tmp_path):
    folder = write_log(tmp_path / "run", make_rows())
    with pytest.raises(ValueError, match=r"run: expected .*method.* found none"):
        inspect_runs([folder])
    assert inspect_runs([folder], own="dppo", beside=(), responses=1)["runs"][0]["method"] == "dppo"
