"""The clamped percentile of both layouts against sorted() and interpolation in plain floats."""

import math
import random

import oracle
import pytest
import torch

from cppo.ops.layout import PackedLayout, PaddedLayout
from cppo.ops.selection import percentile_ranks

INFINITE = 1e30  # a high bound that no value reaches: the percentile itself


def padded_percentile(rows, percent, low, high, dtype):
    """Scatter each row into a wider one, with holes, and return the layout's answer."""
    width = max(map(len, rows), default=0) + 3
    values, mask = torch.zeros(len(rows), width, dtype=dtype), torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        columns = [i * width // len(row) for i in range(len(row))] if row else []
        values[b, columns] = torch.tensor(row, dtype=dtype)
        mask[b, columns] = True
    return PaddedLayout(mask).clamped_percentile(values, percent, low, high)


def packed_percentile(rows, percent, low, high, dtype, holes=0):
    lengths = torch.tensor([len(row) + holes for row in rows], dtype=torch.int64)
    values = torch.tensor([v for row in rows for v in [0.0] * holes + list(row)], dtype=dtype)
    mask = torch.tensor([m for row in rows for m in [False] * holes + [True] * len(row)], dtype=torch.bool)
    return PackedLayout(lengths, len(values), mask if holes else None).clamped_percentile(values, percent, low, high)


def answers(rows, percent, low, high, dtype):
    return {
        "padded": padded_percentile(rows, percent, low, high, dtype),
        "packed": packed_percentile(rows, percent, low, high, dtype),
        "packed with holes": packed_percentile(rows, percent, low, high, dtype, holes=2),
    }


def wanted(rows, percent, low, high, dtype):
    rounded = [torch.tensor(row, dtype=dtype).tolist() for row in rows]
    return [min(max(oracle.percentile(r, percent), low), high) if r else low for r in rounded]


def check(rows, percent=90, low=0.0, high=INFINITE, dtype=torch.float64):
    precise = {torch.float64: 1e-15, torch.float32: 2e-7}[dtype]
    for name, answer in answers(rows, percent, low, high, dtype).items():
        assert answer.dtype == dtype
        assert answer.tolist() == pytest.approx(wanted(rows, percent, low, high, dtype), rel=precise, abs=1e-40), name


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@DTYPES
@pytest.mark.parametrize("lengths", [range(41), range(95, 125), (999, 500, 1, 0, 10, 11, 991, 256, 257)], ids=str)
def test_random_values_of_every_length(lengths, dtype):
    dice = random.Random(1)
    rows = [[dice.random() ** 4 for _ in range(length)] for length in lengths]
    check(rows, dtype=dtype)
    check(rows, low=0.4, high=0.8, dtype=dtype)
    check(rows, low=0.02, high=0.04, dtype=dtype)


def test_every_length_from_1_to_999():
    dice = random.Random(6)
    rows = [[dice.random() ** 3 for _ in range(length)] for length in range(1, 1000)]
    check(rows)


@DTYPES
def test_values_of_every_magnitude(dtype):
    # All bits of the radix selection take part: exponents from subnormal to huge, and neighbours in the last bit.
    dice = random.Random(2)
    top = 37 if dtype == torch.float32 else 300
    rows = [[10.0 ** dice.uniform(-top, top) for _ in range(dice.randint(1, 60))] for _ in range(30)]
    step = torch.finfo(dtype).eps
    rows += [[1.0 + step * dice.randint(0, 9) for _ in range(31)] for _ in range(5)]
    rows += [[5e-324 if dtype == torch.float64 else 1.5e-45] * 3, [0.0, 1e-310, 1.0, 1.0]]
    check(rows, high=1e305 if dtype == torch.float64 else 3e38, dtype=dtype)


@DTYPES
def test_ties_and_constants(dtype):
    dice = random.Random(3)
    rows = [[0.25] * n for n in (1, 2, 7, 300)] + [[0.0] * n for n in (1, 5, 64)]
    rows += [[dice.choice((0.0, 0.125, 0.125, 0.5)) for _ in range(n)] for n in range(1, 80)]
    check(rows, dtype=dtype)
    # Bounds that are themselves values, on both sides of the rank.
    check(rows, low=0.125, high=0.25, dtype=dtype)
    check(rows, low=0.125, high=0.125, dtype=dtype)
    check(rows, low=0.0, high=0.0, dtype=dtype)
    check(rows, low=0.5, high=0.5, dtype=dtype)


@pytest.mark.parametrize("percent", [0, 1, 10, 50, 90, 99, 100])
def test_other_percentiles(percent):
    dice = random.Random(4)
    check([[dice.random() for _ in range(n)] for n in (1, 2, 3, 10, 11, 101, 347)], percent=percent)


def test_exact_ranks_are_the_order_statistic_to_the_bit():
    # T = 11 and 101: rank 9 and 90, no interpolation.
    dice = random.Random(5)
    rows = [[dice.random() for _ in range(n)] for n in (11, 101, 1)]
    exact = [sorted(rows[0])[9], sorted(rows[1])[90], rows[2][0]]
    for answer in answers(rows, 90, 0.0, 1.0, torch.float64).values():
        assert answer.tolist() == exact


def test_ranks_are_exact_integers():
    lengths = torch.tensor([0, 1, 2, 11, 12, 1_000_001])
    lower, upper, weight = percentile_ranks(lengths, 90, torch.float64)
    assert lower.tolist() == [0, 0, 0, 9, 9, 900_000]
    assert upper.tolist() == [0, 0, 1, 10, 10, 900_001]
    assert weight.tolist() == [0, 0, 0.9, 0, 0.9, 0]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_float64_percentiles_are_interpolated_in_float64(layout):
    # T = 5: rank 3.6, so 0.6 of the way from 0 to 1.
    answer = answers([[0.0, 0.0, 0.0, 0.0, 1.0]], 90, 0.0, 2.0, torch.float64)[layout]
    assert answer.item() == pytest.approx(0.6, rel=1e-15)


def test_a_row_of_no_values_gets_the_lower_bound():
    for answer in answers([[], [0.5], []], 90, 0.125, 1.0, torch.float64).values():
        assert answer.tolist() == [0.125, 0.5, 0.125]
    nothing = PaddedLayout(torch.zeros(2, 0, dtype=torch.bool)).clamped_percentile(torch.zeros(2, 0), 90, 0.5, 1.0)
    assert nothing.tolist() == [0.5, 0.5]


def test_padding_zeros_are_not_values():
    # 2 values in a row of 64: P90 is theirs, not the zeros'.
    values, mask = torch.zeros(1, 64), torch.zeros(1, 64, dtype=torch.bool)
    values[0, 10], values[0, 50] = 0.5, 1.0
    mask[0, 10] = mask[0, 50] = True
    answer = PaddedLayout(mask).clamped_percentile(values, 90, 0.0, 2.0)
    assert answer.item() == pytest.approx(0.95)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_prefix_minima_start_anew_with_each_response(dtype):
    dice = random.Random(0)
    lengths = [0, 5, 1, 0, 40, 2, 17, 0]
    extremes = (math.inf, -1e30, 1e30, -0.0, 0.0, 1e-45, -1e-45, -1e4)
    rows = [[dice.choice(extremes) if dice.random() < 0.3 else dice.gauss(0, 3) for _ in range(n)] for n in lengths]
    flat = torch.tensor([x for row in rows for x in row], dtype=dtype)
    found = PackedLayout(torch.tensor(lengths), len(flat), None).prior_minimum(flat).tolist()
    numbers = iter(flat.tolist())
    wanted = []
    for n in lengths:
        smallest = math.inf
        for _ in range(n):
            wanted.append(smallest)
            smallest = min(smallest, next(numbers))
    assert found == wanted
