"""Scores: right answers in many forms get 1, everything else 0, and no text raises or hangs."""

import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cppo.lab import verifiers
from cppo.lab.verifiers import first_line, math_score, reasoning_gym_score, running_sum_score

pytestmark = pytest.mark.train
TOWER = "9^9^9^9"


@pytest.mark.parametrize(
    ("completion", "ended", "loose", "strict"),
    [
        ("136", True, 1, 1),
        ("136.", True, 1, 1),  # the end token, not skipped
        ("136", False, 0, 0),  # cut off
        ("996", True, 1, 0),
        ("135", True, 0, 0),
        ("36", True, 0, 0),
        ("1366", True, 0, 0),
        ("136..", True, 0, 0),
        ("13.", True, 0, 0),
        ("", True, 0, 0),
    ],
)
def test_running_sum_score(completion, ended, loose, strict):
    assert running_sum_score("136", completion, ended) == loose
    assert running_sum_score("136", completion, ended, strict=True) == strict


@given(st.text("0123456789.", min_size=1, max_size=8), st.text("0123456789.", max_size=9), st.booleans())
def test_strict_is_never_more_generous(sums, completion, ended):
    assert running_sum_score(sums, completion, ended, strict=True) <= running_sum_score(sums, completion, ended)


@pytest.mark.parametrize(
    ("completion", "line"), [(" 5\nQuestion", "5"), ("5", "5"), ("\n5", ""), ("", ""), ("a" * 9999, "a" * 1024)]
)
def test_first_line(completion, line):
    assert first_line(completion) == line


@pytest.mark.parametrize(
    ("answer", "completion"),
    [
        ("5", "5"),
        ("5", "The answer is 5."),
        (r"\frac{1}{2}", "so we get $0.5$"),
        ("1/2", r"\boxed{\frac{1}{2}}"),
        ("$x=3$", "3"),
        (r"2\sqrt{3}", r"$\sqrt{12}$"),
        ("1,000", "1000"),
        (r"long way, hence \boxed{7}", r"\boxed{7}"),
        ("(1, 2)", r"\boxed{(1,2)}"),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}"),
        ("5", "x " * 50_000 + r"so \boxed{5}"),  # the end of a long text counts
    ],
)
def test_right_answers_in_other_forms(answer, completion):
    assert math_score(answer, completion) == 1.0


@pytest.mark.parametrize(
    ("answer", "completion"),
    [("5", "6"), ("5", ""), ("5", "no idea"), ("1/2", "$0.51$"), ("", ""), ("", "5"), ("5", r"\boxed{")],
)
def test_wrong_answers(answer, completion):
    assert math_score(answer, completion) == 0.0


@pytest.mark.parametrize(
    "completion",
    ["(" * 20_000, "$" * 100_000, r"\frac{" * 5_000, "1" * 100_000, "\0\ud800", "nan", "$1/0$", "1e999999999"],
)
def test_hostile_texts_score_zero(completion):
    assert math_score("5", completion) == 0.0


@settings(max_examples=40)
@given(st.text(max_size=80) | st.text("0123456789+-*/=$\\{}()xe frac sqrt boxed", max_size=60))
def test_no_text_raises(completion):
    assert math_score("7919", completion) in (0.0, 1.0)


def test_a_power_tower_ends_in_any_thread_and_the_next_score_is_right():
    assert math_score("5", "$5.0$") == 1.0
    child, scores = verifiers._PROCESS._child, []
    worker = threading.Thread(target=lambda: scores.extend([math_score("5", TOWER), math_score("5", "$5.0$")]))
    worker.start()
    worker.join(60)
    assert scores == [0.0, 1.0]
    assert verifiers._PROCESS._child is child  # it gave up by itself: nothing had to be killed


def test_a_late_child_is_killed_and_replaced(monkeypatch):
    assert math_score("5", "$5.0$") == 1.0
    child = verifiers._PROCESS._child
    monkeypatch.setattr(verifiers, "SCORE_SECONDS", 0.2)
    assert math_score("5", TOWER) == 0.0
    assert child.poll() is not None
    monkeypatch.undo()
    assert math_score("5", "$5.0$") == 1.0


def test_threads_get_their_own_scores():
    scores = {}

    def score(n):
        scores[n] = math_score(str(n), f"it is ${n % 4}$")

    threads = [threading.Thread(target=score, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == {n: float(n < 4) for n in range(8)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_scores_with_a_child_of_its_own():
    assert math_score("5", "$5.0$") == 1.0
    child = os.fork()
    if child == 0:
        os._exit(0 if math_score("6", "$6.0$") == 1.0 and math_score("6", "$5.0$") == 0.0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert math_score("5", "$5.0$") == 1.0


def test_reasoning_gym_scores_are_those_of_the_data_set():
    entry = {"question": "", "answer": "9 + 9", "metadata": {"numbers": [9, 9], "target": 18}}
    assert reasoning_gym_score("countdown", {}, entry, "9 + 9") == 1.0
    assert reasoning_gym_score("countdown", {}, entry, "9 * 9") < 1.0
    assert reasoning_gym_score("chain_sum", {}, {"answer": "3"}, "3") == 1.0


def test_a_missing_library_is_named(monkeypatch):
    verifiers.require.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"math-verify is not installed: .*cppo\[train\]"):
        math_score("5", "5")
