"""Problem generators: the same for a seed, never shared between splits, scored as they say; names become tasks."""

import dataclasses
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cppo.lab.problems import Demonstrable
from cppo.lab.tasks import TASKS, MathFile, ReasoningGym, RunningSum, make_task

pytestmark = pytest.mark.train
ONE_DIGIT_SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


@pytest.fixture(scope="module")
def chain_sum():
    return ReasoningGym("chain_sum", dataset_options=ONE_DIGIT_SUMS)


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# --- the running sum


def test_a_running_sum_by_hand():
    task = RunningSum(operands=6)
    [problem] = task.problems("train", 1, 3)
    operands = [int(c) for c in problem.prompt[:-1]]
    assert problem.prompt[-1] == "="
    assert len(operands) == 6
    assert problem.entry == {"operands": operands}
    assert problem.answer == "".join(str(sum(operands[: t + 1]) % 10) for t in range(6))


def test_each_sum_is_judged_by_the_one_before_it():
    task = RunningSum(operands=5)
    # 0+1=1 right; 1+2 is 3, not 5; 5+3=8 right, from the wrong 5; x is no sum, and taken for 8+3=1; 1+1=2.
    assert task.follows("12331=", "158x2") == [True, False, True, False, True]
    assert task.follows("12331=", "13") == [True, True]
    assert task.follows("1=", "111") == [True]
    start, *sums = (chr(0xAC00 + state) for state in (511, 512, 514, 515))
    assert make_task("long_tail_sum?operands=3&values=1024").follows(f"{start}bca=", "".join(sums)) == [
        True,
        True,
        False,
    ]


def test_operands_cover_their_range_evenly():
    digits = "".join(p.prompt[:-1] for p in RunningSum(operands=24).problems("train", 500, 0))
    for digit in "0123":
        assert abs(digits.count(digit) / len(digits) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(digits))
    assert set(digits) == set("0123")


@given(st.integers(), st.integers(), st.integers(1, 30))
def test_problems_repeat_for_a_seed_and_splits_share_none(seed, other_seed, operands):
    task = RunningSum(operands=operands, max_operand=9)
    train = task.problems("train", 20, seed)
    assert train == task.problems("train", 20, seed)
    assert not {p.prompt for p in train} & {p.prompt for p in task.problems("test", 20, other_seed)}


def test_seeds_give_different_problems_and_a_longer_list_starts_with_the_shorter():
    task = RunningSum()
    assert task.problems("test", 5, 0) != task.problems("test", 5, 1)
    assert task.problems("test", 9, 0)[:5] == task.problems("test", 5, 0)
    assert task.problems("test", 0, 0) == []


def test_a_split_that_cannot_exist_is_refused():
    task = RunningSum(operands=2, max_operand=1)  # four prompts, whose hashes all say "train"
    assert len({p.prompt for p in task.problems("train", 50, 0)}) == 4
    with pytest.raises(ValueError, match=r"found no test problem in 10000 draws"):
        task.problems("test", 1, 0)


@pytest.mark.parametrize(("split", "count", "message"), [("dev", 1, "split='dev'"), ("train", -1, "count=-1")])
def test_bad_requests_are_named(split, count, message):
    with pytest.raises(ValueError, match=message):
        RunningSum().problems(split, count, 0)


def steps_of(task, count):
    """(state before, operand, state after) of each demonstrated step."""
    rng = random.Random(0)
    for problem in task.problems("train", count, 0):
        state = 0
        for operand, shown in zip(problem.entry["operands"], task.demonstrate(problem, rng), strict=True):
            yield state, operand, int(shown)
            state = int(shown)


def assert_rate(hits, trials, rate):
    assert abs(hits / trials - rate) < 4.5 * math.sqrt(rate * (1 - rate) / trials), (hits / trials, rate)


def test_the_demonstrator_errs_and_slips_at_its_rates():
    task = RunningSum(error=0.06, slip=0.4, slip_state=7)
    slippery, calm = [], []
    for state, operand, shown in steps_of(task, 2000):
        (slippery if state == 7 and operand > 0 else calm).append((shown - state - operand) % 10)
    assert len(slippery) > 2000
    assert_rate(sum(e != 0 for e in calm), len(calm), 0.06)
    for wrong in range(1, 10):  # uniformly, and never the right one
        assert_rate(calm.count(wrong), len(calm), 0.06 / 9)
    assert_rate(slippery.count(1), len(slippery), 0.94 * 0.4 + 0.06 / 9)
    assert_rate(slippery.count(0), len(slippery), 0.94 * 0.6)


def test_an_error_is_never_the_right_sum():
    wrong = [(shown - state - operand) % 10 for state, operand, shown in steps_of(RunningSum(error=1), 100)]
    assert set(wrong) == set(range(1, 10))


def test_a_zero_operand_never_slips_and_a_positive_one_always_does_with_slip_one():
    task = RunningSum(error=0, slip=1)
    for state, operand, shown in steps_of(task, 200):
        assert shown == (state + operand + (state == 9 and operand > 0)) % 10


def test_a_faultless_demonstrator_is_always_right_and_scored_so():
    task = RunningSum(error=0, slip=0, modulus=7, max_operand=9, slip_state=0, strict=True)
    for problem in task.problems("test", 20, 0):
        assert task.score(problem, task.demonstrate(problem, random.Random(1)), True) == 1.0


def test_the_default_demonstrator_is_right_about_a_quarter_of_the_time():
    # The probability that the last sum is right, by a Markov chain over the demonstrator's state.
    task, rng, hits, expected = RunningSum(), random.Random(0), 0, 0.0
    problems = task.problems("test", 1000, 0)
    for problem in problems:
        hits += task.score(problem, task.demonstrate(problem, rng), True)
        chain = [1.0] + [0.0] * 9
        for operand in problem.entry["operands"]:
            after = [0.0] * 10
            for state, p in enumerate(chain):
                right, slip = (state + operand) % 10, 0.6 if state == 9 and operand > 0 else 0.0
                for other in set(range(10)) - {right}:
                    after[other] += p * 0.02 / 9
                after[right] += p * 0.98 * (1 - slip)
                after[(right + 1) % 10] += p * 0.98 * slip
            chain = after
        expected += chain[int(problem.answer[-1])]
    assert 0.2 < expected / 1000 < 0.28
    assert_rate(hits, 1000, expected / 1000)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"operands": 0}, ValueError),
        ({"operands": 2.0}, TypeError),
        ({"operands": True}, TypeError),
        ({"modulus": 1}, ValueError),
        ({"modulus": 11}, ValueError),
        ({"max_operand": 0}, ValueError),
        ({"max_operand": 10}, ValueError),
        ({"error": 1.1}, ValueError),
        ({"error": math.nan}, ValueError),
        ({"slip": -0.1}, ValueError),
        ({"slip": "a"}, TypeError),
        ({"slip_state": 10}, ValueError),
        ({"strict": 1}, TypeError),
    ],
)
def test_bad_options_are_named(option, error):
    [(name, value)] = option.items()
    with pytest.raises(error, match=rf"RunningSum\({name}={value!r}\): expected"):
        RunningSum(**option)


def test_the_alphabet_has_every_character_of_prompts_and_responses():
    for task in (
        RunningSum(),
        RunningSum(modulus=3, max_operand=5, slip_state=1),
        RunningSum(modulus=10, max_operand=1),
    ):
        rng = random.Random(0)
        shown = "".join(p.prompt + task.demonstrate(p, rng) for p in task.problems("train", 300, 0))
        assert set(shown) == set(task.alphabet)
        assert task.max_completion_tokens == task.operands + 1
        assert isinstance(task, Demonstrable)


# --- reasoning-gym


def test_reasoning_gym_prompts_are_few_shot_and_deterministic(chain_sum):
    problems = chain_sum.problems("train", 12, 5)
    assert problems == ReasoningGym("chain_sum", dataset_options=ONE_DIGIT_SUMS).problems("train", 12, 5)
    assert problems != chain_sum.problems("train", 12, 6)
    for problem in problems:
        assert problem.prompt.count("Question: ") == 5
        assert problem.prompt.count("\nAnswer: ") == 4
        assert problem.prompt.endswith(f"Question: {problem.entry['question']}\nAnswer:")
        assert json.loads(json.dumps(problem.entry))["answer"] == problem.answer


def test_reasoning_gym_splits_and_examples_share_no_question(chain_sum):
    questions = {
        split: {p.entry["question"] for seed in range(3) for p in chain_sum.problems(split, 300, seed)}
        for split in ("train", "test")
    }
    [preamble] = {
        p.prompt.removesuffix(f"Question: {p.entry['question']}\nAnswer:") for p in chain_sum.problems("test", 9, 0)
    }
    assert not questions["train"] & questions["test"]
    assert not any(f"Question: {question}\n" in preamble for question in questions["train"] | questions["test"])
    # 200 one-digit sums and differences: both splits have seen most of theirs, with repeats.
    assert 100 < len(questions["train"]) < 180
    assert 20 < len(questions["test"]) < 80


def test_reasoning_gym_scores_the_first_line(chain_sum):
    problem = chain_sum.problems("test", 1, 0)[0]
    right = problem.answer
    assert chain_sum.score(problem, f" {right}\n\nQuestion: next", False) == 1.0
    assert chain_sum.score(problem, f" {right}", True) == 1.0
    assert chain_sum.score(problem, f"\n{right}", True) < 1.0
    assert chain_sum.score(problem, str(int(right) + 1), True) < 0.1
    for hostile in ("", "9" * 100_000, "\0\ud800", "nan", "1e999999999"):
        assert 0.0 <= chain_sum.score(problem, hostile, False) < 1.0


def test_reasoning_gym_without_examples_and_without_enough_of_them():
    task = ReasoningGym("chain_sum", few_shot=0)
    assert task.problems("train", 1, 0)[0].prompt.startswith("Question: ")
    single = {"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1}
    with pytest.raises(ValueError, match=r"few_shot=11: chain_sum .* has only 10 different questions"):
        ReasoningGym("chain_sum", few_shot=11, dataset_options=single)
    with pytest.raises(ValueError, match=r"found no (train|test) question"):
        ReasoningGym("chain_sum", few_shot=10, dataset_options=single).problems("train", 1, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_name": "chian_sum"}, r"dataset_name='chian_sum': .* did you mean .*chain_sum"),
        ({"dataset_name": "???"}, r"dataset_name='\?\?\?': .* expected one of .*zebra_puzzles"),
        ({"dataset_name": "chain_sum", "dataset_options": {"terms": 2}}, "terms=2: .* expected one of min_terms"),
        ({"dataset_name": "chain_sum", "dataset_options": {"seed": 2}}, "seed=2: chain_sum has no such option"),
        ({"dataset_name": "chain_sum", "dataset_options": {"min_terms": 9}}, "refuses them: .*max_terms must be"),
        ({"dataset_name": "sudoku"}, "expected a data set whose answers are one line"),
        ({"dataset_name": "chain_sum", "few_shot": -1}, r"few_shot=-1\): expected an integer >= 0"),
        (
            {"dataset_name": "chain_sum", "max_completion_tokens": 0},
            r"max_completion_tokens=0\): expected an integer >= 1",
        ),
    ],
)
def test_reasoning_gym_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReasoningGym(**arguments)


# --- problems from a file


def test_a_math_file_is_read_split_and_scored(tmp_path):
    rows = [{"problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(40)]
    task = MathFile(
        write_lines(tmp_path / "p.jsonl", *rows, "", {"question": "Half?", "solution": r"so \boxed{\frac12}"})
    )
    train, test = (task.problems(split, 200, 0) for split in ("train", "test"))
    assert len({p.prompt for p in train} | {p.prompt for p in test}) == 41
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert task.problems("train", 200, 0) == train != task.problems("train", 200, 1)
    size = len({p.prompt for p in train})
    assert len({p.prompt for p in train[:size]}) == size  # each once before any again
    half = next(p for p in train + test if "Half" in p.prompt)
    assert half.prompt == "Question: Half?\nAnswer:"
    assert task.score(half, "it is $0.5$", True) == 1.0
    assert task.score(half, "it is $0.6$", True) == 0.0


def test_lines_may_carry_their_split_and_prompts_stay_as_they_are(tmp_path):
    rows = [{"prompt": f"{n}+1=", "answer": n + 1, "split": "test" if n < 2 else "train"} for n in range(6)]
    task = MathFile(write_lines(tmp_path / "p.jsonl", *rows))
    assert {p.prompt for p in task.problems("test", 2, 0)} == {"0+1=", "1+1="}
    assert {p.answer for p in task.problems("train", 4, 0)} == {"3", "4", "5", "6"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"p\.jsonl, line 2: not JSON"),
        ("[1]", r"line 2: b'\[1\]' is not an object"),
        ('{"problem": "x"}', r'line 2: has the keys \[\'problem\'\]; expected "answer" or "solution"'),
        ('{"answer": "x"}', r'line 2: .*expected "prompt" or "problem" or "question"'),
        ('{"problem": "x", "answer": " "}', "line 2: answer=' '; expected text that is not empty"),
        ('{"problem": ["x"], "answer": "1"}', r"line 2: problem=\['x'\]"),
        ('{"problem": "x", "answer": "1", "split": "dev"}', "line 2: split='dev'"),
        ('{"problem": "a", "answer": "1", "split": "train"}', "line 2: the problem of line 1 again, there in 'test'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "p.jsonl", {"problem": "a", "answer": "1", "split": "test"}, line)
    with pytest.raises(ValueError, match=message):
        MathFile(path)


def test_missing_and_empty_files_and_splits_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path='.*nope\.jsonl': there is no such file"):
        MathFile(tmp_path / "nope.jsonl")
    with pytest.raises(ValueError, match=r"e\.jsonl: the file is empty"):
        MathFile(write_lines(tmp_path / "e.jsonl", ""))
    task = MathFile(write_lines(tmp_path / "p.jsonl", {"problem": "a", "answer": "1", "split": "test"}))
    with pytest.raises(ValueError, match=r"p\.jsonl: no problem is in the split 'train'"):
        task.problems("train", 1, 0)
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "\xe9", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 1: not JSON"):
        MathFile(tmp_path / "latin.jsonl")


# --- names


def test_names_with_options_become_tasks():
    assert make_task("running_sum") == RunningSum()
    assert make_task("running_sum?operands=16&strict=true&slip=0.5") == RunningSum(operands=16, strict=True, slip=0.5)
    assert make_task("running_sum?strict=True", operands=3) == RunningSum(operands=3, strict=True)
    task = make_task("reasoning_gym:chain_sum?max_terms=3&allow_negation=true&few_shot=1", max_completion_tokens=9)
    assert task.dataset_options == {"max_terms": 3, "allow_negation": True}
    assert (task.few_shot, task.max_completion_tokens, task.alphabet) == (1, 9, None)


def test_a_task_is_made_again_from_its_name(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "a", "answer": "1", "split": "test"})
    running = RunningSum(operands=5, slip=0.25, strict=True)
    assert make_task(running.name) == running
    assert RunningSum().name == "running_sum"
    for task in (
        ReasoningGym("chain_sum", 2, {"max_terms": 2}, 7),
        ReasoningGym("chain_sum"),
        MathFile(path),
        MathFile(path, max_completion_tokens=8),
    ):
        again = make_task(task.name)
        assert again.name == task.name
        assert again.max_completion_tokens == task.max_completion_tokens
        assert again.problems("test", 1, 0) == task.problems("test", 1, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sums", r"name='sums': no such task; expected one of running_sum.*reasoning_gym:NAME.*math:PATH"),
        ("", "name='': no such task"),
        ("math", "name='math': no such task"),
        ("reasoning_gym:", "no such task"),
        ("running_sum:x", "no such task"),
        ("running_sum?operand=3", "operand=3 is no option of it; expected one of operands, modulus"),
        ("running_sum?operands", "cannot read the options 'operands'; expected NAME=VALUE&NAME=VALUE"),
        ("running_sum?operands=2&operands=3", "option 'operands' is given twice"),
        ("running_sum?operands=0", r"operands=0\): expected an integer >= 1"),
        ("math:x.jsonl?tokens=3", "tokens=3 is no option of it; expected one of max_completion_tokens"),
    ],
)
def test_bad_names_are_explained(name, message):
    with pytest.raises(ValueError, match=message):
        make_task(name)


def test_problems_are_frozen():
    [problem] = RunningSum().problems("train", 1, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.prompt = "x"
    assert set(TASKS) == {"running_sum", "long_tail_sum", "reasoning_gym", "math"}
