"""Every check on entry of token_statistics and topk_log_probs: what it names, what it was given, what it expected."""

import math
import re

import pytest
import torch
from heads import draw

import cppo

HEAD = draw(seed=50, shape=(2, 3), vocabulary=7, width=5, k=4)
ARGUMENTS = {
    "hidden": HEAD.hidden,
    "weight": HEAD.weight,
    "token_ids": HEAD.ids,
    "bias": HEAD.bias,
    **HEAD.rollout(),
    "divergence": "topk_tv",
}


def both_refuse(error, message, **changed):
    """See that both functions refuse the change, as far as they take such an argument."""
    refused(error, message, **changed)
    named = {name: ARGUMENTS[name] for name in ("hidden", "weight", "bias")} | changed
    with pytest.raises(error, match=re.escape(message)):
        cppo.topk_log_probs(**named)


def refused(error, message, **changed):
    with pytest.raises(error, match=re.escape(message)):
        cppo.token_statistics(**ARGUMENTS | changed)


def test_the_arguments_as_they_are_are_welcome():
    assert cppo.token_statistics(**ARGUMENTS).divergence.shape == (2, 3)


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_the_projection_is_of_plain_floating_point_tensors(name):
    both_refuse(TypeError, f"{name}: expected a torch.Tensor, got list", **{name: [[1.0]]})
    for dtype in (torch.int64, torch.complex64, torch.bool):
        message = f"{name}: expected float64, float32, float16 or bfloat16, got {dtype}"
        both_refuse(TypeError, message, **{name: ARGUMENTS[name].to(dtype)})


class Distributed(torch.Tensor):
    """Looks like a DTensor."""

    def full_tensor(self):
        return torch.Tensor(self)


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_a_distributed_tensor_is_refused_with_the_two_ways_out(name):
    message = (
        f"{name}: expected a plain tensor, got a Distributed; pass {name}.full_tensor(), or this rank's slice of the "
        "vocabulary with vocab_parallel="
    )
    both_refuse(TypeError, message, **{name: ARGUMENTS[name].as_subclass(Distributed)})


MISMATCHED = (
    ((2, 3, 4), (7, 5)),
    ((), (7, 5)),
    ((2, 3, 5), (5,)),
    ((2, 3, 5), (1, 7, 5)),
    ((2, 5), (0, 5)),
    ((2, 0), (7, 0)),
)


@pytest.mark.parametrize(("hidden", "weight"), MISMATCHED)
def test_the_projection_has_matching_shapes(hidden, weight):
    message = f"hidden, weight: expected [..., H] and [V, H] (V, H >= 1), got {list(hidden)} and {list(weight)}"
    both_refuse(ValueError, message, hidden=torch.zeros(hidden), weight=torch.zeros(weight))


@pytest.mark.parametrize("shape", [(6,), (7, 1), ()])
def test_a_bias_has_one_number_a_token(shape):
    both_refuse(ValueError, f"bias: expected [V] = [7], got {list(shape)}", bias=torch.zeros(shape))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_the_projection_is_on_one_device(name):
    both_refuse(
        ValueError, f"{name}: expected hidden's device cpu, got meta", **{name: ARGUMENTS[name].to("meta")}
    )  # fmt: skip


NOT_A_NUMBER = ("1", True, [1.0], torch.tensor(1.0), 1j)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("temperature", (0, 0.0, -1.0, math.nan, math.inf, -math.inf), "a finite number > 0"),
        ("logit_softcap", (0, -30.0, math.nan, math.inf), "a finite number > 0"),
        ("logit_scale", (0, math.nan, math.inf), "a finite number other than 0"),
    ],
)
def test_what_shapes_the_logits_is_a_number(name, values, expected):
    for value in values:
        both_refuse(ValueError, f"{name}={value!r}: expected {expected}", **{name: value})
    for value in NOT_A_NUMBER + ((None,) if name != "logit_softcap" else ()):
        both_refuse(TypeError, f"{name}={value!r}: expected a number", **{name: value})


@pytest.mark.parametrize("name", ["chunk_tokens", "memory_budget"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "16"])
def test_chunks_are_cut_by_positive_integers(name, value):
    both_refuse(ValueError, f"{name}={value!r}: expected a positive integer or None", **{name: value})


def test_chunks_are_cut_by_one_of_the_two():
    message = "memory_budget=99: expected None beside chunk_tokens=4; one of them decides"
    both_refuse(ValueError, message, chunk_tokens=4, memory_budget=99)


@pytest.mark.parametrize("k", [0, -1, 2.0, True, None, "3"])
def test_a_positive_number_of_likeliest_tokens_is_asked_for(k):
    with pytest.raises(ValueError, match=re.escape(f"k={k!r}: expected a positive integer")):
        cppo.topk_log_probs(HEAD.hidden, HEAD.weight, k)


@pytest.mark.parametrize("name", ["token_ids", "topk_ids"])
def test_ids_are_integers(name):
    refused(TypeError, f"{name}: expected a torch.Tensor, got list", **{name: ARGUMENTS[name].tolist()})
    for dtype in (torch.float32, torch.bool, torch.complex64):
        refused(TypeError, f"{name}: expected integers, got {dtype}", **{name: ARGUMENTS[name].to(dtype)})


@pytest.mark.parametrize("name", ["rollout_logp", "rollout_topk_logp", "logp"])
def test_log_probs_are_floating_point_tensors(name):
    refused(TypeError, f"{name}: expected a torch.Tensor, got float", **{name: 0.5})
    given = ARGUMENTS["rollout_logp" if name == "logp" else name]
    refused(TypeError, f"{name}: expected floating point, got torch.int64", **{name: given.long()})


@pytest.mark.parametrize("name", ["token_ids", "rollout_logp", "topk_ids", "rollout_topk_logp", "logp"])
def test_whatever_is_a_number_a_token_has_the_shape_and_the_device_of_the_hidden_states(name):
    given = ARGUMENTS["rollout_logp" if name == "logp" else name]
    wanted = [2, 3, 4] if given.dim() == 3 else [2, 3]
    for wrong in (given[:1], given[..., None], given.flatten()):
        width = wrong.shape[-1:] if name == "topk_ids" else wanted[2:]
        message = f"{name}: expected {[2, 3, *width]} (hidden is [2, 3, 5]), got {list(wrong.shape)}"
        refused(ValueError, message, **{name: wrong})
    refused(ValueError, f"{name}: expected hidden's device cpu, got meta", **{name: given.to("meta")})


def test_top_k_ids_and_log_probs_are_equally_many():
    message = "rollout_topk_logp: expected [2, 3, 3] (hidden is [2, 3, 5]), got [2, 3, 4]"
    refused(ValueError, message, topk_ids=HEAD.topk_ids[..., :3])
    refused(ValueError, "topk_ids: expected [2, 3, 0] (hidden is [2, 3, 5]), got []", topk_ids=torch.tensor(3))


@pytest.mark.parametrize("wrong", [-1, -99, -101, 7, 2**40])
@pytest.mark.parametrize("given", [False, True])
def test_sampled_tokens_are_in_the_vocabulary(wrong, given):
    ids = HEAD.ids.clone()
    ids[1, 2] = wrong
    message = f"token_ids: expected ids in [0, V = 7), or -100 for no token, got {wrong}"
    named = {"logp": torch.zeros(2, 3)} if given else {}
    refused(ValueError, message, token_ids=ids, **named)
    refused(ValueError, message, token_ids=ids, divergence="binary_tv", **named)
    with pytest.raises(ValueError, match=re.escape(message)):
        cppo.topk_log_probs(HEAD.hidden, HEAD.weight, 2, token_ids=ids)


@pytest.mark.parametrize("wrong", [7, 2**40])
def test_likeliest_tokens_are_in_the_vocabulary_or_empty_places(wrong):
    ids = HEAD.topk_ids.clone()
    ids[0, 0, 0], ids[1, 2, 3] = -1, wrong
    refused(ValueError, f"topk_ids: expected ids below V = 7, got {wrong}", topk_ids=ids)
    # Not looked at where no divergence is taken over them.
    cppo.token_statistics(**ARGUMENTS | {"topk_ids": ids, "divergence": "binary_tv"})


def test_likeliest_tokens_are_distinct_within_a_position():
    ids = HEAD.topk_ids.clone()
    ids[1, 2] = torch.tensor([3, 0, 3, 1])
    refused(ValueError, "topk_ids: expected distinct ids within a position, got 3 twice", topk_ids=ids)
    ids[1, 2] = torch.tensor([-1, 0, -1, 1])  # empty places are not compared
    assert cppo.token_statistics(**ARGUMENTS | {"topk_ids": ids}).divergence.isfinite().all()


@pytest.mark.parametrize("name", ["topk_ids", "rollout_topk_logp"])
def test_likeliest_tokens_without_a_divergence_are_a_mistake(name):
    nothing = {"divergence": None, "topk_ids": None, "rollout_topk_logp": None}
    message = f"{name}: expected None without divergence=, or divergence='topk_tv' or 'topk_kl'"
    refused(ValueError, message, **nothing | {name: ARGUMENTS[name]})


def test_a_layer_in_the_place_of_its_weight_is_told_so():
    layer = torch.nn.Linear(5, 7)
    both_refuse(TypeError, "weight: expected a torch.Tensor, got Linear; pass its .weight", weight=layer)


def test_the_group_of_a_cut_vocabulary_is_a_process_group():
    with pytest.raises(TypeError, match=r"group=3: expected a torch\.distributed\.ProcessGroup, or None"):
        cppo.VocabParallel(group=3)


def test_k_may_be_any_kind_of_integer():
    numpy = pytest.importorskip("numpy")
    assert cppo.topk_log_probs(HEAD.hidden, HEAD.weight, numpy.int64(3)).ids.shape == (2, 3, 3)


NEEDS = {
    "binary_tv": ("rollout_logp",),
    "binary_kl": ("rollout_logp",),
    "topk_tv": ("rollout_logp", "topk_ids", "rollout_topk_logp"),
    "topk_kl": ("rollout_logp", "topk_ids", "rollout_topk_logp"),
}


@pytest.mark.parametrize("kind", NEEDS)
def test_a_divergence_names_what_it_misses_of_the_rollout_policy(kind):
    for name in NEEDS[kind]:
        message = f"{name}=None: expected the rollout policy's, which divergence={kind!r} compares with"
        refused(ValueError, message, divergence=kind, **{name: None})
    rest = dict.fromkeys(set(NEEDS["topk_tv"]) - set(NEEDS[kind]))
    assert cppo.token_statistics(**ARGUMENTS | {"divergence": kind} | rest).divergence is not None


@pytest.mark.parametrize("kind", ["exact_tv", "exact_kl"])
def test_an_exact_divergence_is_refused_with_the_reason(kind):
    message = (
        f"divergence={kind!r}: expected one of binary_tv, binary_kl, topk_tv, topk_kl, or None; it needs mu's whole "
        "distribution"
    )
    refused(ValueError, message, divergence=kind)


@pytest.mark.parametrize("kind", ["k2", "", True, ["topk_tv"], "TOPK_TV"])
def test_a_divergence_that_is_none_of_the_four_is_refused(kind):
    message = f"divergence={kind!r}: expected one of binary_tv, binary_kl, topk_tv, topk_kl, or None"
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        cppo.token_statistics(**ARGUMENTS | {"divergence": kind})


def test_given_log_probs_stand_alone():
    logp = torch.zeros(2, 3)
    refused(
        ValueError, "entropy=True: expected False beside logp=, from which no entropy follows", logp=logp, entropy=True
    )
    parallel = cppo.VocabParallel()
    refused(ValueError, "vocab_parallel: expected None beside logp=", logp=logp, vocab_parallel=parallel)


# ---------------------------------------------------------------- vocab_parallel


def test_a_cut_vocabulary_without_processes_is_refused():
    for start in (None, 0):
        message = "vocab_parallel: expected an initialised process group (torch.distributed)"
        both_refuse(ValueError, message, vocab_parallel=cppo.VocabParallel(start=start))


@pytest.mark.parametrize("wrong", ["group", True, cppo.VocabParallel])
def test_vocab_parallel_is_a_vocab_parallel(wrong):
    message = f"vocab_parallel: expected a VocabParallel, got {type(wrong).__name__}"
    both_refuse(TypeError, message, vocab_parallel=wrong)


@pytest.mark.parametrize("start", [-1, 1.0, True, "0"])
def test_a_slice_starts_at_an_integer(start):
    with pytest.raises(ValueError, match=re.escape(f"start={start!r}: expected an integer >= 0, or None")):
        cppo.VocabParallel(start=start)
