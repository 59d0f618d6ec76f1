"""The six divergences: printed vectors, the order binary <= top-K <= exact, and probabilities at the edge."""

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cppo

FLOAT64 = torch.float64


def log(values):
    return torch.tensor(values, dtype=FLOAT64).log()


def topk_arguments(mu, pi, sampled, ids):
    """Return the arguments of topk_tv and topk_kl for one state."""
    p, m, ids = log(pi), log(mu), torch.tensor(ids, dtype=torch.int64)
    y = torch.tensor(sampled)
    return p[y], m[y], y, p[ids], m[ids], ids


# ---------------------------------------------------------------- printed vectors

MU = (0.50, 0.25, 0.12, 0.08, 0.05)
OUTSIDE = (0.45, 0.10, 0.20, 0.10, 0.15)  # sampled token 4, not among the top 2
INSIDE = (0.40, 0.30, 0.06, 0.14, 0.10)  # sampled token 1


@pytest.mark.parametrize(
    ("pi", "sampled", "tv", "kl"),
    [(OUTSIDE, 4, 0.200000000000, 0.145729304742), (INSIDE, 1, 0.100000000000, 0.020410997260)],
)
def test_topk_vectors_of_baselines_13_3(pi, sampled, tv, kl):
    arguments = topk_arguments(MU, pi, sampled, [0, 1])
    assert cppo.topk_tv(*arguments).item() == pytest.approx(tv, abs=5e-13)
    assert cppo.topk_kl(*arguments).item() == pytest.approx(kl, abs=5e-13)
    # The order of the top-K ids is no matter.
    turned = topk_arguments(MU, pi, sampled, [1, 0])
    assert cppo.topk_tv(*turned).item() == pytest.approx(tv, abs=5e-13)


@pytest.mark.parametrize(
    ("pi", "sampled", "tv", "kl"),
    [(OUTSIDE, 4, 0.100000000000, 0.050733738921), (INSIDE, 1, 0.05, 0.006164264417)],
)
def test_binary_vectors_of_baselines_13_3(pi, sampled, tv, kl):
    p, m = log(pi)[sampled], log(MU)[sampled]
    assert cppo.binary_tv(p, m).item() == pytest.approx(tv, abs=5e-13)
    assert cppo.binary_kl(p, m).item() == pytest.approx(kl, abs=5e-13)


@pytest.mark.parametrize(
    ("pi", "tv", "kl"), [(OUTSIDE, 0.200000000000, 0.147671767407), (INSIDE, 0.16, 0.069742426063)]
)
def test_exact_vectors_of_baselines_13_3(pi, tv, kl):
    assert cppo.exact_tv(log(pi), log(MU)).item() == pytest.approx(tv, abs=5e-13)
    assert cppo.exact_kl(log(pi), log(MU)).item() == pytest.approx(kl, abs=5e-13)


def test_safe_binary_kl_vectors_of_baselines_13_5():
    rollout = torch.tensor([-1e-12, -1e-9, -0.5, -9.2, 0.0], dtype=FLOAT64)
    logp = torch.tensor([-1e-3, -1e-3, -0.4, -4.6, -1e-3], dtype=FLOAT64)
    wanted = [0.000999999978, 0.000999985184, 0.008944106510, 0.009535860246, 0.001]
    assert cppo.binary_kl(logp, rollout).tolist() == pytest.approx(wanted, abs=5e-13)


FIXTURE_M = ((0.50, 0.0001, 0.99, 0.30, 0.60), (0.20, 0.80, 0.05, 0.90, 0.5))
FIXTURE_P = ((0.66, 0.0100, 0.80, 0.27, 0.55), (0.12, 0.62, 0.08, 0.95, 0.5))
FIXTURE_TV = ((0.16, 0.0099, 0.19, 0.03, 0.05), (0.08, 0.18, 0.03, 0.05, 0))
FIXTURE_KL = (
    (0.054015372, 0.009488819, 0.181004961, 0.002233215, 0.005093612),
    (0.025916981, 0.075543022, 0.006983717, 0.020654219, 0),
)


def test_binary_rows_of_fixture_f():
    tv, kl = cppo.binary_tv(log(FIXTURE_P), log(FIXTURE_M)), cppo.binary_kl(log(FIXTURE_P), log(FIXTURE_M))
    for row in range(2):
        assert tv[row].tolist() == pytest.approx(FIXTURE_TV[row], abs=1e-15)
        assert kl[row].tolist() == pytest.approx(FIXTURE_KL[row], abs=5e-10)


# ---------------------------------------------------------------- against the partition itself


@st.composite
def two_policies(draw):
    """Draw (mu, pi, sampled token, K); probabilities down to 1e-5 of the largest.

    (Not lower: 1 - p of a double p near 1 is off by 1e-16, which log(1 - p) turns into 1e-16 / (1 - p).)
    """
    size = draw(st.integers(2, 12))
    weight = st.one_of(st.floats(0.01, 1.0), st.floats(-5.0, 0.0).map(lambda e: 10**e))
    mu, pi = (draw(st.lists(weight, min_size=size, max_size=size)) for _ in range(2))
    mu, pi = ([w / math.fsum(ws) for w in ws] for ws in (mu, pi))
    return mu, pi, draw(st.integers(0, size - 1)), draw(st.integers(1, size))


@settings(max_examples=300)
@given(two_policies())
def test_a_coarser_partition_gives_no_more_and_each_is_its_formula(case):
    mu, pi, sampled, k = case
    likeliest = sorted(range(len(mu)), key=lambda a: -mu[a])[:k]
    arguments = topk_arguments(mu, pi, sampled, likeliest)
    p, m = log(pi), log(mu)
    for order, on_cells, functions in (
        ("tv", oracle.tv_on, (cppo.binary_tv, cppo.topk_tv, cppo.exact_tv)),
        ("kl", oracle.kl_on, (cppo.binary_kl, cppo.topk_kl, cppo.exact_kl)),
    ):
        binary, topk, exact = functions
        values = [binary(p[sampled], m[sampled]).item(), topk(*arguments).item(), exact(p, m).item()]
        cells = [
            oracle.binary_cells(len(mu), sampled),
            oracle.topk_cells(mu, sampled, k),
            oracle.exact_cells(len(mu)),
        ]
        assert values[0] <= values[1] + 1e-10, order
        assert values[1] <= values[2] + 1e-10, order
        wanted = [on_cells(part, mu, pi) for part in cells]
        assert values == pytest.approx(wanted, rel=1e-9, abs=1e-10), order


def test_the_sampled_token_is_a_cell_of_its_own_once():
    # In the top K it must not be counted twice: then binary would exceed top-K or mass would be missing.
    mu, pi = (0.6, 0.3, 0.1), (0.2, 0.7, 0.1)
    outside = topk_arguments(mu, pi, 1, [0])
    assert cppo.topk_tv(*outside).item() == pytest.approx(0.4)
    inside = topk_arguments(mu, pi, 1, [0, 1])
    assert cppo.topk_tv(*inside).item() == pytest.approx(0.4)
    assert cppo.topk_kl(*inside).item() == pytest.approx(0.6 * math.log(3) + 0.3 * math.log(3 / 7))
    assert cppo.topk_kl(*outside).item() == pytest.approx(0.6 * math.log(3) + 0.3 * math.log(3 / 7))


def test_the_rest_of_the_vocabulary_is_one_bucket():
    # Top 1 of mu is token 0 with equal mass in both; all drift is between the sampled token and the rest.
    mu, pi = (0.5, 0.1, 0.2, 0.2), (0.5, 0.4, 0.05, 0.05)
    arguments = topk_arguments(mu, pi, 1, [0])
    assert cppo.topk_tv(*arguments).item() == pytest.approx(0.3)
    assert cppo.topk_kl(*arguments).item() == pytest.approx(0.1 * math.log(0.25) + 0.4 * math.log(4))


def test_kl_is_taken_from_mu_to_pi():
    p, m = math.log(0.1), math.log(0.5)
    forward = 0.5 * math.log(5) + 0.5 * math.log(0.5 / 0.9)
    backward = 0.1 * math.log(0.2) + 0.9 * math.log(0.9 / 0.5)
    assert abs(forward - backward) > 0.1
    pi, mu = torch.tensor([p, math.log(0.9)]).double(), torch.tensor([m, math.log(0.5)]).double()
    assert cppo.binary_kl(pi[0], mu[0]).item() == pytest.approx(forward)
    assert cppo.exact_kl(pi, mu).item() == pytest.approx(forward)
    y, ids = torch.tensor(0), torch.tensor([0])
    assert cppo.topk_kl(pi[0], mu[0], y, pi[:1], mu[:1], ids).item() == pytest.approx(forward)


# ---------------------------------------------------------------- edges

EDGES = (0.0, 1e-3, -1e-300, -1e-45, -1e-12, -1e-7, -0.5, -20.0, -100.0, -708.0, -745.0, -1e4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_binary_divergences_are_finite_and_not_negative_for_any_finite_pair(dtype):
    logp, rollout = torch.cartesian_prod(torch.tensor(EDGES, dtype=dtype), torch.tensor(EDGES, dtype=dtype)).T
    for measure, top in ((cppo.binary_tv, 1.0), (cppo.binary_kl, 720.0)):
        values = measure(logp, rollout)
        assert values.isfinite().all()
        assert (values >= 0).all()
        assert (values <= top).all()
        same = measure(rollout, rollout)
        assert (same == 0).all()


def test_binary_divergences_follow_the_oracle_at_the_edges():
    for p in EDGES:
        for m in EDGES:
            logp, rollout = torch.tensor([p], dtype=FLOAT64), torch.tensor([m], dtype=FLOAT64)
            assert cppo.binary_tv(logp, rollout).item() == pytest.approx(oracle.binary_tv(p, m), abs=1e-15)
            assert cppo.binary_kl(logp, rollout).item() == pytest.approx(oracle.binary_kl(p, m), rel=1e-9, abs=1e-13)


def test_a_token_that_mu_never_samples_counts_as_the_smallest_normal_probability():
    never = torch.tensor([-math.inf], dtype=FLOAT64)
    half = torch.tensor([math.log(0.5)], dtype=FLOAT64)
    assert cppo.binary_tv(half, never).item() == 0.5
    assert cppo.binary_kl(half, never).item() == pytest.approx(math.log(2))
    # And a probability of zero under pi: mu times 708 nats, not infinity.
    assert cppo.binary_kl(never, half).item() == pytest.approx(
        0.5 * (math.log(0.5) - oracle.LOG_TINY) + 0.5 * math.log(0.5)
    )
    mu, pi = torch.tensor([[0.0, -math.inf]]).double(), torch.tensor([[-math.inf, 0.0]]).double()
    assert cppo.exact_tv(pi, mu).tolist() == [1.0]
    assert cppo.exact_kl(pi, mu).item() == pytest.approx(-oracle.LOG_TINY)
    y, ids = torch.tensor([1]), torch.tensor([[0]])
    arguments = (pi[:, 1], mu[:, 1], y, pi[:, :1], mu[:, :1], ids)
    assert cppo.topk_tv(*arguments).tolist() == [1.0]
    assert cppo.topk_kl(*arguments).item() == pytest.approx(-oracle.LOG_TINY)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("excess", [0.0, 1e-7, 1e-6, 1e-3])
def test_mass_sums_above_one_give_finite_values_of_the_right_size(dtype, excess):
    # Rounded probabilities can sum to more than 1; the bucket's mass is then 0, not negative.
    mu = torch.tensor([[0.5, 0.3, 0.2]], dtype=dtype) * (1 + excess)
    pi = torch.tensor([[0.5, 0.3, 0.2]], dtype=dtype)
    for p, m in ((pi, mu), (mu, pi)):
        arguments = (p[:, 2].log(), m[:, 2].log(), torch.tensor([2]), p.log(), m.log(), torch.arange(3)[None])
        tv, kl = cppo.topk_tv(*arguments).item(), cppo.topk_kl(*arguments).item()
        assert 0 <= tv <= excess / 2 + 1e-6
        assert 0 <= kl <= 2 * excess + 1e-6


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from((0.0, -1e-45, -1e-9, -0.7, -50.0, -709.0, -1e4, -math.inf)), min_size=4, max_size=4),
    st.lists(st.sampled_from((0.0, -1e-45, -1e-9, -0.7, -50.0, -709.0, -1e4, -math.inf)), min_size=4, max_size=4),
    st.integers(0, 3),
    st.sampled_from((torch.float64, torch.float32)),
)
def test_any_log_probs_at_all_give_finite_values_that_are_not_negative(logp, rollout, sampled, dtype):
    p, m = torch.tensor(logp, dtype=dtype), torch.tensor(rollout, dtype=dtype)
    y, ids = torch.tensor(sampled), torch.tensor([0, 1])
    arguments = (p[y], m[y], y, p[ids], m[ids], ids)
    values = [
        cppo.binary_tv(p[y], m[y]),
        cppo.binary_kl(p[y], m[y]),
        cppo.topk_tv(*arguments),
        cppo.topk_kl(*arguments),
        cppo.exact_tv(p, m),
        cppo.exact_kl(p, m),
    ]
    assert all(v.isfinite() and v >= 0 for v in values), values


def test_float32_binary_kl_tells_probabilities_next_to_one_apart():
    for m, p in ((0.999, 0.9999), (0.9999, 0.999), (0.5, 0.99999)):
        lm, lp = (torch.tensor([math.log(x)]) for x in (m, p))
        assert cppo.binary_kl(lp, lm).item() == pytest.approx(oracle.binary_kl(lp.item(), lm.item()), rel=2e-3)


def test_a_bucket_that_pi_nearly_empties_counts_in_full():
    mu, pi = (0.6, 0.3, 0.1), (0.7, 0.3 - 1e-6, 1e-6)
    wanted = 0.6 * math.log(6 / 7) + 0.3 * math.log(0.3 / pi[1]) + 0.1 * math.log(1e5)
    assert cppo.topk_kl(*topk_arguments(mu, pi, 1, [0])).item() == pytest.approx(wanted, rel=1e-9)
    # Emptied altogether, it counts as 1e-12.
    arguments = topk_arguments(mu, (0.7, 0.3, 0.0), 1, [0])
    assert cppo.topk_kl(*arguments).item() == pytest.approx(0.6 * math.log(6 / 7) + 0.1 * math.log(1e11), rel=1e-4)


def test_nan_stays_nan():
    nan, half = torch.tensor([math.nan]), torch.tensor([-0.7])
    for measure in (cppo.binary_tv, cppo.binary_kl):
        assert measure(nan, half).isnan().all()
        assert measure(half, nan).isnan().all()


def test_divergences_compute_in_float32_at_least_and_carry_no_gradient():
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (FLOAT64, FLOAT64)):
        p = torch.full((2, 3), -1.25, dtype=dtype, requires_grad=True)
        m = torch.full((2, 3), -1.0, dtype=dtype, requires_grad=True)
        ids = torch.tensor([[0, 1, 2]] * 2)
        y = torch.tensor([0, 7])
        values = [
            cppo.binary_tv(p, m),
            cppo.binary_kl(p, m),
            cppo.topk_tv(p[:, 0], m[:, 0], y, p, m, ids),
            cppo.topk_kl(p[:, 0], m[:, 0], y, p, m, ids),
            cppo.exact_tv(p, m),
            cppo.exact_kl(p, m),
        ]
        assert [v.shape for v in values] == [(2, 3), (2, 3), (2,), (2,), (2,), (2,)]
        for v in values:
            assert v.dtype == wide
            assert not v.requires_grad


def test_divergences_write_to_no_input():
    p, m = torch.tensor([[0.5, -0.5, -2.0]], dtype=FLOAT64), torch.tensor([[-0.1, -800.0, 0.1]], dtype=FLOAT64)
    before = p.clone(), m.clone()
    ids, y = torch.tensor([[0, 1, 2]]), torch.tensor([1])
    for measure in (cppo.binary_tv, cppo.binary_kl, cppo.exact_tv, cppo.exact_kl):
        measure(p, m)
    for measure in (cppo.topk_tv, cppo.topk_kl):
        measure(p[:, 1], m[:, 1], y, p, m, ids)
    assert torch.equal(p, before[0])
    assert torch.equal(m, before[1])
