"""The long-tailed sum: its arithmetic by hand, its demonstrator's rates, and that its tokens are rare as it says."""

import collections
import math
import random

import pytest

from cppo.lab.model import build_char_tokenizer
from cppo.lab.problems import Demonstrable
from cppo.lab.tasks import LongTailSum, make_task

pytestmark = pytest.mark.train
AMOUNTS = {"a": 0, "b": 1, "c": 2, "d": 4, "e": 8, "f": 16, "g": 32, "h": 64, "i": 128, "j": 256}


def state_of(token):
    return ord(token) - 0xAC00


def test_a_long_tailed_sum_by_hand():
    task = LongTailSum(operands=9, values=64, letters=7)
    for problem in task.problems("train", 20, 3):
        start, letters, sign = problem.prompt[0], problem.prompt[1:-1], problem.prompt[-1]
        state = state_of(start)
        assert sign == "="
        for letter, token in zip(letters, problem.answer, strict=True):
            state = (state + AMOUNTS[letter]) % 64
            assert state_of(token) == state
        assert problem.entry["operands"] == [AMOUNTS[letter] for letter in letters]
        assert problem.entry.get("start", 0) == state_of(start)
        assert task.score(problem, problem.answer, True) == 1.0
        assert task.score(problem, problem.answer, False) == 0.0
        assert task.score(problem, problem.answer[:-1] + chr(0xAC00 + (state + 1) % 64), True) == 0.0


def test_every_letter_has_its_amount():
    task = LongTailSum(operands=40, values=8192, letters=10)
    seen = {}
    for problem in task.problems("train", 400, 0):
        seen |= dict(zip(problem.prompt[1:-1], problem.entry["operands"], strict=True))
    assert seen == AMOUNTS


def test_letters_halve_in_frequency():
    text = "".join(p.prompt[1:-1] for p in LongTailSum(letters=4).problems("train", 1000, 0))
    for index, letter in enumerate("abcd"):
        rate = 2.0**-index / sum(2.0**-i for i in range(4))
        assert abs(text.count(letter) / len(text) - rate) < 4 * math.sqrt(rate * (1 - rate) / len(text))


def test_starts_follow_zipf():
    starts = [state_of(p.prompt[0]) for p in LongTailSum(values=1024).problems("train", 4000, 0)]
    assert min(starts) == 0
    assert max(starts) > 900
    for below in (1, 2, 32, 512, 1023):  # P(s_0 < m) = log(m + 1) / log(values)
        rate = math.log(below + 1) / math.log(1024)
        hits = sum(start < below for start in starts)
        assert abs(hits / 4000 - rate) <= 4 * math.sqrt(rate * (1 - rate) / 4000) + 1e-9, below


def test_every_value_is_used_and_most_of_the_vocabulary_is_rare():
    problems = LongTailSum(values=1024).problems("train", 4000, 0)
    counts = collections.Counter(token for p in problems for token in p.answer)
    ordered = [count for _, count in counts.most_common()]
    assert len(ordered) == 1024
    assert 0.6 < sum(ordered[:102]) / sum(ordered) < 0.7  # a tenth of them: two thirds of the tokens
    assert 0.07 < sum(ordered[512:]) / sum(ordered) < 0.11  # the rarer half: a tenth


def test_the_demonstrator_errs_and_slips_at_its_rates():
    task, rng = LongTailSum(error=0.06, slip=0.4), random.Random(0)
    slippery, calm = [], []
    for problem in task.problems("train", 2000, 0):
        state = state_of(problem.prompt[0])
        for operand, token in zip(problem.entry["operands"], task.demonstrate(problem, rng), strict=True):
            after = state_of(token)
            (slippery if state % 10 == 9 and operand > 0 else calm).append((after - state - operand) % 512)
            state = after
    for found, wrong, rate in ((calm, None, 0.06), (slippery, 1, 0.94 * 0.4 + 0.06 / 511), (slippery, 0, 0.94 * 0.6)):
        hits = sum(e != 0 for e in found) if wrong is None else found.count(wrong)
        assert len(found) > 1000
        assert abs(hits / len(found) - rate) < 4.5 * math.sqrt(rate * (1 - rate) / len(found))
    assert len({e for e in calm if e}) > 400  # anywhere


def test_splits_share_no_prompt_and_a_seed_repeats():
    task = LongTailSum()
    train = task.problems("train", 200, 1)
    assert train == task.problems("train", 200, 1)
    assert not {p.prompt for p in train} & {p.prompt for p in task.problems("test", 200, 2)}


def test_names_become_tasks_and_tasks_names():
    task = make_task("long_tail_sum?values=2048&slip=0.9&strict=true")
    assert task == LongTailSum(values=2048, slip=0.9, strict=True)
    assert make_task(task.name) == task
    assert make_task("long_tail_sum").name == "long_tail_sum"
    assert isinstance(task, Demonstrable)
    assert task.max_completion_tokens == 25


def test_the_tokenizer_knows_every_value_as_one_token():
    task = LongTailSum(values=300)
    tokenizer = build_char_tokenizer(task.alphabet)
    [problem] = task.problems("test", 1, 0)
    ids = tokenizer(problem.prompt + problem.answer)["input_ids"]
    assert len(ids) == 50
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids[26:]) == problem.answer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": 15}, r"LongTailSum\(values=15\): expected an integer in \[16, 8192\]"),
        ({"letters": 11}, r"LongTailSum\(letters=11\): expected an integer in \[2, 10\]"),
        ({"operands": 0}, r"LongTailSum\(operands=0\): expected an integer >= 1"),
        ({"slip": 1.5}, r"LongTailSum\(slip=1.5\): expected a number in \[0, 1\]"),
        ({"error": float("nan")}, r"LongTailSum\(error=nan\): expected a number in \[0, 1\]"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LongTailSum(**options)


def test_an_unknown_option_is_named():
    with pytest.raises(ValueError, match="modulus=10 is no option of it"):
        make_task("long_tail_sum?modulus=10")
    with pytest.raises(ValueError, match="no such task"):
        make_task("long_tail_sum:8")
