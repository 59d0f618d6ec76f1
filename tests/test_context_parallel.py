"""Responses cut over ranks get the decision of the uncut response; parts of a batch add up to the whole's gradient."""

import dataclasses
import math
import re

import pytest
import ranks
import torch
from examples import CORRECTIONS, CPPOS, OTHERS, drifting_batch, label
from layouts import Response, measured, packed, padded
from ranks import Case, judge_locally, run_processes, run_threads, whole

import cppo
import cppo.decision
import cppo.metrics

# The account of a cut response adds its pieces' sums; the uncut one its tokens. Their last bits may differ.
RELATIVE = 1e-12
LENGTHS = (9, 0, 1, 17, 2, 33, 3)

METHODS = [*CPPOS[::4], *OTHERS]
CASES = (
    [
        Case(
            method,
            tuple(drifting_batch(seed=index, lengths=LENGTHS)),
            layout=("padded", "packed")[index % 2],
            zigzag=index % 3 == 2,
            reduction=("token-mean", "sequence-mean", "fixed-length")[index % 3],
            seed=index,
        )
        for index, method in enumerate(METHODS)
    ]
    + [
        Case(
            cppo.GRPO(),
            tuple(drifting_batch(seed=60 + index, lengths=LENGTHS)),
            layout=("padded", "packed")[index % 2],
            zigzag=index % 3 == 0,
            seed=index,
            correction=correction,
        )
        for index, correction in enumerate(CORRECTIONS)
    ]
    + [
        Case(
            method,
            tuple(drifting_batch(seed=80 + index, lengths=LENGTHS)),
            layout=("padded", "packed")[index % 2],
            zigzag=index % 2 == 0,
            seed=index,
            dtype=torch.float32,
            per_token=False,
        )
        for index, method in enumerate((cppo.CPPO(), cppo.CPPO(position="shuffled"), *OTHERS[::3]))
    ]
)


def uncut(case):
    """Return the uncut decision, in the form of :func:`ranks.whole`."""
    batch = padded(case.responses, per_token=case.per_token, dtype=case.dtype)
    decision = batch.decide(case.method, case.correction)
    out, gradient = batch.loss(case.method, case.correction, **case.reduction_arguments())
    answer = {
        "gate": batch.per_response(decision.gate),
        "coefficient": batch.per_response(decision.coefficient),
        "rejected_by": batch.per_response(decision.rejected_by),
        "gradient": batch.per_response(gradient),
        "loss": out.loss.item(),
        "metrics": out.metrics,
    }
    for field in dataclasses.fields(decision.trace):
        value = getattr(decision.trace, field.name)
        if value is not None:
            answer[field.name] = batch.per_response(value) if value.shape == batch.logp.shape else value.tolist()
    return answer


def close(found, wanted, slack=0.0, relative=RELATIVE):
    return math.isclose(found, wanted, rel_tol=relative, abs_tol=1e-15 + slack)


def assert_same(case, world, answers):
    wanted, found = uncut(case), whole(case, world, answers)
    assert all(found["outside"])
    narrow = case.dtype == torch.float32
    relative, units = (1e-6, 1e-7) if narrow else (RELATIVE, 1e-13)
    assert close(sum(found["loss"]), wanted["loss"], slack=1e-5 if narrow else 1e-12)
    for name in wanted.keys() - {"loss", "metrics"}:
        for b, (theirs, mine) in enumerate(zip(wanted[name], found[name], strict=True)):
            if isinstance(theirs, list):
                assert len(theirs) == len(mine)
                size = max((abs(x) for x in theirs), default=0.0)
                pairs = zip(mine, theirs, strict=True)
                assert all(close(x, y, units * size, relative) for x, y in pairs), (name, b)
            else:  # of a response: equal on all its rows, everywhere
                assert all(close(x, theirs, relative=relative) for x in mine), (name, b, mine, theirs)
    total = found["tally"][0]
    for part in found["tally"][1:]:
        total = total + part
    metrics = total.metrics()
    assert metrics.keys() == wanted["metrics"].keys()
    for key in metrics.keys() - {"input/first_nonfinite"}:
        assert metrics[key].item() == pytest.approx(
            wanted["metrics"][key].item(), rel=1e-5 if narrow else 1e-9, abs=1e-15
        ), key


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{label(c.method)} {c.correction or ''} {c.dtype}")
def test_a_cut_response_gets_the_decision_of_the_uncut_one(monkeypatch, case, world):
    def job(rank, context):
        return judge_locally(case, rank, world, context(case.chunks(world)[rank]))

    answers, _ = run_threads(world, job, monkeypatch)
    assert_same(case, world, answers)


def test_every_case_on_two_ranks(monkeypatch):
    # In one test, so that a mutant of the exchange is found in the first round.
    def job(rank, context):
        return [judge_locally(case, rank, 2, context(case.chunks(2)[rank])) for case in CASES]

    answers, _ = run_threads(2, job, monkeypatch)
    for index, case in enumerate(CASES):
        assert_same(case, 2, [answer[index] for answer in answers])


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("seed", range(6))
def test_ties_on_exact_numbers_fall_the_same_way_wherever_the_cut_is(monkeypatch, world, seed):
    # delta 1/4, weight 1, no deposits: the sums are exact in binary, so even a tie must not notice the cut.
    method = cppo.CPPO(delta=0.25, delta_b=0.0, budget="fixed", w_min=1.0, divergence="exact_tv")
    responses = (measured([0.125, 0.125, 0.0, 0.125]), measured([0.25, 0.0, 0.125, 0.0]), measured([0.0625] * 5))
    case = Case(method, responses, layout=("padded", "packed")[seed % 2], seed=seed)
    answers, _ = run_threads(
        world, lambda rank, context: judge_locally(case, rank, world, context((rank,))), monkeypatch
    )
    assert whole(case, world, answers)["rejected_by"] == [[0, 0, 0, 2], [0, 0, 2, 2], [0, 0, 0, 0, 2]]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_adaptive_budgets_at_floor_between_and_at_ceiling_come_from_the_whole_response(monkeypatch, layout):
    responses = (measured([0.0, 1.0]), measured([0.25] * 7), measured([4.0] * 9), measured([]), measured([0.75]))
    case = Case(cppo.CPPO(delta_b=0.5, divergence="exact_tv"), responses, layout=layout, seed=3)
    answers, _ = run_threads(2, lambda rank, context: judge_locally(case, rank, 2, context((rank,))), monkeypatch)
    assert answers[0]["delta_b"] == answers[1]["delta_b"] == [0.9, 0.5, 1.0, 0.5, 0.75]


def test_numbers_a_response_are_exchanged_and_no_tokens(monkeypatch):
    # The same three responses with a hundred times the tokens: not one number more.
    sizes = []
    for length in (10, 1000):
        responses = tuple(drifting_batch(seed=1, lengths=(length,) * 3))
        case = Case(cppo.CPPO(), responses)

        def job(rank, context, case=case):
            batch = case.local_batch(rank, 2)
            positional, _ = batch.arguments(case.method)
            return cppo.decide(case.method, *positional, context_parallel=context((rank,)))

        sizes.append(run_threads(2, job, monkeypatch)[1])
    assert sizes[0] == sizes[1]
    fixed = cppo.CPPO(budget="fixed")
    case = Case(fixed, responses)
    _, exchanged = run_threads(2, lambda rank, context, case=case: job(rank, context, case), monkeypatch)
    # Agreement on the shape (2 and 1), the chunks (1), the lengths (3), and one account a response (3).
    assert exchanged == [2, 1, 1, 3, 3]


def test_looking_at_a_cut_decision_later_exchanges_nothing(monkeypatch):
    # One rank looks at trace and metrics, the other does not: nobody may wait.
    case = CASES[0]
    decisions, exchanged = run_threads(
        2,
        lambda rank, context: cppo.decide(
            case.method, *case.local_batch(rank, 2).arguments(case.method)[0], context_parallel=context((rank,))
        ),
        monkeypatch,
    )
    before = list(exchanged)
    assert decisions[0].rejected_by.any()
    assert decisions[0].trace.prior_account is not None
    assert cppo.metrics.tally(decisions[1]).metrics()
    assert exchanged == before


# ---------------------------------------------------------------- with torch.distributed itself


def _judge_all(rank, world):
    answers = []
    for case in CASES:
        chunks = case.chunks(world)[rank] if case.zigzag else None  # None: the rank-th piece
        answers.append(judge_locally(case, rank, world, cppo.ContextParallel(chunks=chunks)))
    return answers


DATA_PARALLEL = [
    (method, reduction)
    for method in (*CPPOS[::9], *OTHERS)
    for reduction in ("token-mean", "sequence-mean", "fixed-length")
]
MICRO_BATCHES = 2


def _responses_of(rank, world, part):
    """Return one micro-batch of one rank's share of the batch, and which responses these are."""
    everything = drifting_batch(seed=40, lengths=LENGTHS)
    share = list(range(rank, len(everything), world))
    where = share[part::MICRO_BATCHES]
    return where, [everything[i] for i in where]


def _gradients_with_shared_denominators(rank, world):
    """As docs/distributed.md has it: count, sum the counts over ranks and micro-batches, divide by that everywhere."""
    import torch.distributed as dist

    answers = []
    for method, reduction in DATA_PARALLEL:
        fixed = {"fixed_length": 8} if reduction == "fixed-length" else {}
        parts = [_responses_of(rank, world, part) for part in range(MICRO_BATCHES)]
        if reduction == "token-mean":
            count = sum(len(r) for _, responses in parts for r in responses)
        else:
            count = sum(1 for _, responses in parts for r in responses if len(r))
        denominator = torch.tensor(float(count))
        dist.all_reduce(denominator)
        gradients = {}
        for index, (where, responses) in enumerate(parts):
            batch = (padded, packed)[index](responses)
            _, gradient = batch.loss(method, reduction=reduction, denominator=denominator, **fixed)
            gradients |= dict(zip(where, batch.per_response(gradient), strict=True))
        answers.append(gradients)
    return answers


def _disagree(rank, world):
    messages = []
    for rows, chunks in ((2 + rank, None), (2, (0,)), (4, (rank, 7 + rank))):
        logp = torch.zeros(rows, 3)
        try:
            cppo.decide(cppo.CPPO(), logp, logp, torch.ones(rows), context_parallel=cppo.ContextParallel(chunks=chunks))
        except ValueError as error:
            messages.append(str(error))
    return messages


QUESTIONS = {
    "everything": lambda rank, world: {
        "cut": _judge_all(rank, world),
        "data parallel": _gradients_with_shared_denominators(rank, world),
        "disagreement": _disagree(rank, world),
    }
}


@pytest.fixture(scope="module", params=[2, 4])
def processes(request, tmp_path_factory):
    return request.param, run_processes(request.param, tmp_path_factory.mktemp("gloo"), "everything")


@pytest.mark.processes
def test_gloo_processes_decide_like_the_uncut_response(processes):
    world, answers = processes
    for index, case in enumerate(CASES):
        assert_same(case, world, [answer["cut"][index] for answer in answers])


@pytest.mark.processes
def test_gradients_of_data_parallel_micro_batches_sum_to_the_whole(processes):
    _, answers = processes
    everything = drifting_batch(seed=40, lengths=LENGTHS)
    for index, (method, reduction) in enumerate(DATA_PARALLEL):
        fixed = {"fixed_length": 8} if reduction == "fixed-length" else {}
        batch = padded(everything)
        _, gradient = batch.loss(method, reduction=reduction, **fixed)
        found = {}
        for answer in answers:
            found |= answer["data parallel"][index]
        for b, wanted in enumerate(batch.per_response(gradient)):
            # The shared count travels as float32, which holds it exactly.
            assert found[b] == pytest.approx(wanted, rel=1e-12, abs=1e-18), (label(method), reduction, b)


@pytest.mark.processes
def test_ranks_that_disagree_are_told_so(processes):
    world, answers = processes
    rows, chunks, gap = answers[0]["disagreement"]
    assert all(answer["disagreement"] == answers[0]["disagreement"] for answer in answers)
    assert rows.startswith("context_parallel: expected as many rows and chunks on every rank, got 2 rows of 1 chunks")
    assert chunks == (f"context_parallel: expected the chunks 0 to {world - 1}, each on one rank, got {[0] * world}")
    assert f"expected the chunks 0 to {2 * world - 1}" in gap


@pytest.mark.parametrize(
    ("rows", "chunks", "message"),
    [
        ((2, 4), ((0,), (1,)), "as many rows and chunks on every rank, got 2 rows of 1 chunks, 4 rows of 1 chunks"),
        ((2, 2), ((0,), (1, 2)), "got 2 rows of 1 chunks, 2 rows of 2 chunks"),
        ((2, 2), ((0,), (0,)), r"the chunks 0 to 1, each on one rank, got \[0, 0\]"),
        ((3, 3), ((0, 3), (1, 2)), None),
        ((4, 3), ((0, 3), (1, 2)), "got 4 rows of 2 chunks, 3 rows of 2 chunks"),
        ((2, 2), ((0, 3), (1, 4)), r"the chunks 0 to 3, each on one rank, got \[0, 1, 3, 4\]"),
    ],
)
def test_threads_that_disagree_are_told_so(monkeypatch, rows, chunks, message):
    def job(rank, context):
        logp = torch.zeros(rows[rank], 3)
        cppo.decide(cppo.CPPO(), logp, logp, torch.ones(rows[rank]), context_parallel=context(chunks[rank]))

    wanted = "context_parallel: expected .*" + message if message else "logp: expected a multiple of 2 rows"
    with pytest.raises(ValueError, match=wanted):
        run_threads(2, job, monkeypatch)


@pytest.mark.parametrize("method", METHODS, ids=label)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_cut_batch_without_responses_or_tokens_has_loss_zero(monkeypatch, method, layout):
    for responses in ((), (Response(*[()] * 6),) * 3):
        case = Case(method, responses, layout=layout, zigzag=True)
        answers, _ = run_threads(
            2, lambda rank, context, case=case: judge_locally(case, rank, 2, context((rank, 3 - rank))), monkeypatch
        )
        assert [answer["loss"] for answer in answers] == [0.0, 0.0]


# ---------------------------------------------------------------- what cannot be


def test_a_context_without_processes_is_refused():
    logp = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=re.escape("context_parallel: expected an initialised process group")):
        cppo.decide(cppo.CPPO(), logp, logp, torch.ones(2), context_parallel=cppo.ContextParallel())


@pytest.mark.parametrize(
    ("context", "error", "message"),
    [
        ("group", TypeError, "context_parallel: expected a ContextParallel, got str"),
        (cppo.ContextParallel(chunks=(0,)), ValueError, "context_parallel: expected an initialised process group"),
    ],
)
def test_a_context_that_cannot_work_is_refused(context, error, message):
    logp = torch.zeros(3, 4)
    with pytest.raises(error, match=re.escape(message)):
        cppo.decide(cppo.CPPO(), logp, logp, torch.ones(3), context_parallel=context)


@pytest.mark.parametrize("chunks", [(), [-1], (True,), (0, 1.0), 0, "01"])
def test_chunks_are_integers(chunks):
    with pytest.raises(ValueError, match=re.escape(f"ContextParallel(chunks={chunks!r}): expected integers >= 0")):
        cppo.ContextParallel(chunks=chunks)


def test_the_cuts_of_the_cases_leave_empty_pieces_and_whole_responses_on_one_rank():
    lengths = [[len(p) for p in pieces] for case in CASES for pieces in case.pieces(3)]
    assert any(0 in row and sum(row) > 0 for row in lengths)
    assert any(len(row) - row.count(0) == 1 for row in lengths)
    assert isinstance(ranks.take(Response((0.0,), (0.0,), (1.0,)), slice(0, 0)), Response)
