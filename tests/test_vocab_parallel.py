"""A vocabulary cut over ranks gives what the whole one gives: values, gradients, divergences, likeliest tokens."""

import dataclasses
import itertools
import math

import pytest
import torch
from heads import DIVERGENCES, draw
from ranks import run_processes, run_threads

import cppo

SHAPING = {"temperature": 0.7, "logit_scale": 1.5, "logit_softcap": 4.0}


def all_banned(head, rows):
    """Return the head with some rows of the vocabulary banned; the sampled tokens are others."""
    bias = head.bias.clone()
    bias[rows] = -math.inf
    ids = torch.where((head.ids >= rows.start) & (head.ids < rows.stop), rows.stop, head.ids)
    return dataclasses.replace(head, bias=bias, ids=ids)


def case(sizes, given_starts=True, head=None, **drawn):
    return sizes, given_starts, head or draw(vocabulary=sum(sizes), ignored=0.2, **drawn)


# How many rows each rank holds, whether it says where they start, and the head.
TWO = (
    case((18, 18), given_starts=False, seed=60),
    case((18, 18), seed=61, shape=(2, 3, 4), **SHAPING),
    case((30, 7), seed=62, bias=False),
    case((1, 36), seed=63),
    case((36, 1), seed=64, logit_scale=-1.0),
    case((18, 18), given_starts=False, head=all_banned(draw(seed=65, vocabulary=36), slice(0, 18))),
    case((2, 3), seed=66, k=9),  # K > V: empty places
    case((5, 6), seed=67, spread=300.0),  # logits hundreds apart: one slice's share is 0
    case((4, 4), given_starts=False, seed=68, shape=(0,)),
    case((4, 4), given_starts=False, seed=69, k=0),
)
THREE = (
    case((12, 12, 12), given_starts=False, seed=70, **SHAPING),
    case((1, 20, 16), seed=71),
    case((20, 1, 1), seed=72, shape=(1,)),
    case((9, 10, 11), head=all_banned(draw(seed=73, vocabulary=30), slice(9, 19))),
)
CASES = {2: TWO, 3: THREE}
NEEDED = [(True, True, True), (True, False, False), (False, True, False)]
KEPT = (1, 3, 40)  # likeliest tokens: 40 are more than any slice has, and than some vocabularies


def everything(head, rows, **named):
    """Return what token_statistics and topk_log_probs say with some rows of the weight, and its gradients."""
    weight, bias = head.weight[rows], None if head.bias is None else head.bias[rows]
    answer = {}
    for needed, entropy in itertools.product(NEEDED, (True, False)):
        leaves = dataclasses.replace(head, weight=weight, bias=bias).leaves(needed)
        found = head.ask("topk_tv", projection=leaves, entropy=entropy, **named)
        gradients = head.backward(found.logp, found.entropy, leaves)
        key = (needed, entropy)
        answer[(*key, "logp")], answer[(*key, "entropy")] = found.logp.detach(), found.entropy
        answer |= {(*key, "grad", i): x for i, x in enumerate(gradients)}
    for kind in DIVERGENCES:
        answer[kind] = head.ask(kind, projection=(head.hidden, weight, bias), **named).divergence
    for k in KEPT:
        kept = cppo.topk_log_probs(head.hidden, weight, k, token_ids=head.ids, bias=bias, **head.shaping, **named)
        answer[("ids", k)], answer[("kept", k)], answer[("own", k)] = kept.ids, kept.logp, kept.token_logp
    return {k: x.detach() if isinstance(x, torch.Tensor) else x for k, x in answer.items()}


def judge(sizes, given_starts, head, rank, group=None):
    """Return one rank's answers."""
    start = sum(sizes[:rank])
    parallel = cppo.VocabParallel(group=group, start=start if given_starts else None)
    return everything(head, slice(start, start + sizes[rank]), chunk_tokens=5, vocab_parallel=parallel)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def assert_same(sizes, head, answers):
    wanted = everything(head, slice(0, sum(sizes)))
    for rank, found in enumerate(answers):
        assert found.keys() == wanted.keys()
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for key, value in found.items():
            if value is None:
                assert wanted[key] is None
            elif key[0] in ("ids", "kept"):
                assert_same_likeliest(key[0], value, wanted[key], wanted["kept", key[1]].isfinite())
            else:
                close(value, wanted[key][rows] if key[-2:] in (("grad", 1), ("grad", 2)) else wanted[key])


def assert_same_likeliest(what, found, wanted, possible):
    width = wanted.shape[-1]
    close(found[..., :width][possible], wanted[possible])
    # Where the whole vocabulary has fewer tokens, the places left over are empty. Banned tokens all tie.
    assert (found[..., width:] == (-1 if what == "ids" else -math.inf)).all()
    assert what == "ids" or (found[..., :width][~possible] == -math.inf).all()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_hold_slices_answer_as_one_that_holds_the_vocabulary(monkeypatch, world):
    for sizes, given_starts, head in CASES[world]:
        answers, _ = run_threads(
            world,
            lambda rank, _, sizes=sizes, given=given_starts, head=head: judge(sizes, given, head, rank),
            monkeypatch,
        )
        assert_same(sizes, head, answers)


def test_one_rank_holds_everything(monkeypatch):
    head = draw(seed=74)
    answers, _ = run_threads(1, lambda rank, _: judge((37,), False, head, rank), monkeypatch)
    assert_same((37,), head, answers)


def test_the_cases_have_slices_without_a_wanted_token_and_slices_without_probability():
    def support(head):
        return torch.cat([head.topk_ids, head.ids[..., None]], -1)

    _, _, head = TWO[3]
    assert ((support(head) == 0).sum(-1) == 0).any()
    _, _, head = TWO[7]
    logits = head.hidden @ head.weight.T + head.bias
    assert ((logits[:, :5].amax(1) - logits[:, 5:].amax(1)).abs() > 250).any()
    assert all((head.bias == -math.inf).sum() >= 10 for _, _, head in (TWO[5], THREE[3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_ranks_are_summed_before_they_are_rounded(monkeypatch, dtype):
    head = draw(seed=75, vocabulary=36, dtype=dtype)

    def gradients(rows, leaves=None, **named):
        leaves = dataclasses.replace(head, weight=head.weight[rows], bias=head.bias[rows]).leaves()
        found = head.ask(None, projection=leaves, entropy=True, **named)
        return [found.logp.detach(), found.entropy.detach(), *head.backward(found.logp, found.entropy, leaves)]

    whole = gradients(slice(0, 36))
    parts, _ = run_threads(
        2,
        lambda rank, _: gradients(slice(18 * rank, 18 * rank + 18), vocab_parallel=cppo.VocabParallel()),
        monkeypatch,
    )
    unit = 1e-6 if dtype == torch.float32 else 2**-8
    for rank, (logp, entropy, hidden, weight, bias) in enumerate(parts):
        torch.testing.assert_close(logp, whole[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(entropy, whole[1], rtol=1e-6, atol=1e-6)
        for one, other in (
            (hidden, whole[2]),
            (weight, whole[3][18 * rank :][:18]),
            (bias, whole[4][18 * rank :][:18]),
        ):
            assert one.dtype == dtype
            torch.testing.assert_close(one, other, rtol=unit, atol=1e-5 if dtype == torch.float32 else 1e-4)


def test_an_id_that_no_rank_holds_has_no_probability(monkeypatch):
    head = draw(seed=76, vocabulary=12)
    ids = head.ids.clone()
    ids[:2] = torch.tensor([12, 999])
    head = dataclasses.replace(head, ids=ids, mu=torch.cat([head.mu, torch.full((13, 1000), -3.0)], 1))

    def job(rank, _):
        parallel = cppo.VocabParallel()
        found = head.ask(
            "binary_tv", projection=(head.hidden, head.weight[6 * rank :][:6], None), vocab_parallel=parallel
        )
        return found.logp

    for logp in run_threads(2, job, monkeypatch)[0]:
        assert (logp[:2] == -math.inf).all()
        assert logp[2:].isfinite().all()


def test_a_few_numbers_a_token_are_exchanged_and_no_logits(monkeypatch):
    tokens, k = 50, 4
    head = draw(seed=77, shape=(tokens,), vocabulary=400, k=k)

    def job(rank, _):
        leaves = dataclasses.replace(head, weight=head.weight[200 * rank :][:200], bias=None).leaves()
        found = head.ask("topk_kl", projection=leaves, entropy=True, vocab_parallel=cppo.VocabParallel())
        head.backward(found.logp, found.entropy, leaves)
        cppo.topk_log_probs(*leaves[:2], 20, vocab_parallel=cppo.VocabParallel())

    _, exchanged = run_threads(2, job, monkeypatch)
    forward, backward = [tokens, 2 * tokens, tokens * (k + 1)], [5 * tokens]
    assert exchanged == [*forward, *backward, tokens, tokens, 20 * tokens, 20 * tokens]


# ---------------------------------------------------------------- with torch.distributed itself


def _judge_all(rank, world):
    import torch.distributed as dist

    group = dist.new_group(list(range(world)))
    return [judge(*one, rank, (None, group)[index % 2]) for index, one in enumerate(CASES[world])]


QUESTIONS = {"everything": _judge_all}


@pytest.mark.processes
@pytest.mark.parametrize("world", [2, 3])
def test_gloo_processes_answer_as_one_process_that_holds_the_vocabulary(world, tmp_path):
    answers = run_processes(world, tmp_path, "everything", "test_vocab_parallel")
    for index, (sizes, _, head) in enumerate(CASES[world]):
        assert_same(sizes, head, [answer[index] for answer in answers])
