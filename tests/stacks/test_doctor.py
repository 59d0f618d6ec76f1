"""cppo doctor's self-tests of the stacks beside TRL and verl: they pass, and fail where a stack's code is another."""

import contextlib
import importlib.metadata
import sys
import types
from unittest import mock

import pytest
import tinker
from drivers import nemo_rl, prime_rl, rllm, skyrl, slime
from drivers.prime_rl import package, present

import cppo.adapters
from cppo import doctor
from cppo.doctor import self_tests, versions

GRADIENT = {"tinker", "skyrl", "prime-rl", "rllm", "nemo-rl"}


@contextlib.contextmanager
def rllm_stack():
    """rLLM's own code, or the driver's stand-in where rLLM has it."""
    with (
        present({"cppo.adapters.rllm": rllm.adapter}),
        mock.patch.object(cppo.adapters, "rllm", rllm.adapter, create=True),
    ):
        if rllm.CHECKOUT is not None:
            yield
            return
        given = {
            "rllm": rllm.rllm,
            "rllm.trainer": package("rllm.trainer"),
            "rllm.trainer.algorithms": package("rllm.trainer.algorithms"),
            "rllm.trainer.algorithms.config": package("config", AlgorithmConfig=types.SimpleNamespace),
            "rllm.trainer.algorithms.loss": package(
                "loss", native_loss_names=lambda backend: set(), get_loss=rllm.rllm.registry.__getitem__,
                resolve_loss=lambda config, native_losses: rllm.resolve("tinker", config.loss_params),
            ),
            "rllm.trainer.tinker": package("rllm.trainer.tinker"),
            "rllm.trainer.tinker.custom_loss": package("custom_loss", build_custom_loss=rllm._managed),
        }  # fmt: skip
        with present(given):
            yield


@contextlib.contextmanager
def nemo_rl_stack():
    with nemo_rl.nemo_rl():
        if not nemo_rl.REAL:
            rest = {"token_level_loss": True, "use_importance_sampling_correction": False}
            sys.modules["nemo_rl.algorithms.loss.loss_functions"].ClippedPGLossConfig = lambda **settings: (
                types.SimpleNamespace(**rest | settings)
            )
        yield


STACKS = {
    "tinker": contextlib.nullcontext,
    "skyrl": contextlib.nullcontext,  # its driver has loaded it, also on Python 3.11
    "prime-rl": prime_rl.prime_rl,
    "rllm": rllm_stack,
    "nemo-rl": nemo_rl_stack,
    "slime": slime.slime,
}


def twice(function, first=False):
    """Return a function that answers twice as much: all of it, or the first of several answers."""

    def doubled(*arguments, **named):
        out = function(*arguments, **named)
        return (2 * out[0], *out[1:]) if first else 2 * out

    return doubled


def tinker_code(monkeypatch):
    ask = tinker.TrainingClient._compute_custom_loss
    compute = staticmethod(lambda data, loss, forward: ask(data, twice(loss, first=True), forward))
    monkeypatch.setattr(tinker.TrainingClient, "_compute_custom_loss", compute)


def skyrl_code(monkeypatch):
    monkeypatch.setattr(skyrl.ppo_utils, "reduce_loss", twice(skyrl.ppo_utils.reduce_loss))


def prime_rl_code(monkeypatch):
    loss = sys.modules["prime_rl.trainer.rl.loss"]
    monkeypatch.setattr(loss, "compute_loss", twice(loss.compute_loss, first=True))


def rllm_code(monkeypatch):
    adapted = sys.modules["rllm.trainer.tinker.custom_loss"]
    ask = adapted.build_custom_loss

    def build(*arguments):
        data, loss = ask(*arguments)
        return data, twice(loss, first=True)

    monkeypatch.setattr(adapted, "build_custom_loss", build)


def nemo_rl_code(monkeypatch):
    wrapper = sys.modules["nemo_rl.algorithms.loss.wrapper"]
    doubled = twice(wrapper.wrap_loss_fn_with_input_preparation, first=True)
    monkeypatch.setattr(wrapper, "wrap_loss_fn_with_input_preparation", doubled)


CHANGES = {
    "tinker": tinker_code, "skyrl": skyrl_code, "prime-rl": prime_rl_code, "rllm": rllm_code, "nemo-rl": nemo_rl_code,
}  # fmt: skip


@pytest.mark.parametrize("stack", sorted(GRADIENT))
def test_the_stack_gives_the_closed_forms_gradient(stack):
    with STACKS[stack]():
        found = next(self_tests.SELF_TESTS[stack]())
    assert (found.subject, found.status) == (f"{stack}: gradient of one step", "ok"), found
    assert found.message.startswith("equals the closed form to ")
    assert 5 < int(found.message.split(" with ")[1].split("%")[0]) < 95


@pytest.mark.parametrize("stack", sorted(GRADIENT))
def test_a_stack_that_sums_otherwise_fails(stack, monkeypatch):
    with STACKS[stack]():
        CHANGES[stack](monkeypatch)
        found = next(self_tests.SELF_TESTS[stack]())
        monkeypatch.undo()
    assert found.status == "failed"
    assert "differs from the closed form by 1.0e+00" in found.message


def test_slime_has_what_the_adapter_calls(monkeypatch):
    with slime.slime() as (loss, cutting):
        (found,) = self_tests.SELF_TESTS["slime"]()
        assert (found.subject, found.status) == ("slime: calls of the adapter", "ok"), found
        assert "the gradient was not compared" in found.message
        for where, name, change in (
            (loss, "compute_approx_kl", lambda log_probs, base, kl_loss_type: None),
            (loss, "get_rollout_top_p_logprob_kwargs", None),
            (cutting, "slice_log_prob_with_cp", lambda log_prob, total_length: None),
            (loss, "loss_function", lambda args: None),
        ):
            with mock.patch.object(where, name, change):
                (found,) = self_tests.SELF_TESTS["slime"]()
            assert found.status == "failed"
            assert name in found.message


def registration(stack):
    with STACKS[stack]():
        _, found = self_tests.SELF_TESTS[stack]()
    assert found.subject == f"{stack}: registration"
    return found.status, found.message


def test_skyrl_gives_back_what_is_registered(monkeypatch):
    assert registration("skyrl") == ("ok", "a loss that cppo.adapters.skyrl registers is found in PolicyLossRegistry")
    assert "cppo?doctor" not in skyrl.ppo_utils.PolicyLossRegistry.list_available()
    monkeypatch.setattr(skyrl.ppo_utils.PolicyLossRegistry, "get", lambda name: "another")
    status, message = registration("skyrl")
    assert status == "failed"
    assert "gives back 'another'" in message


def test_rllm_finds_the_loss_by_the_entry_point(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    status, message = registration("rllm")
    assert status == "warning"
    assert "no entry point rllm.losses names cppo.adapters.rllm" in message
    point = importlib.metadata.EntryPoint("trust_region", "cppo.adapters.rllm", "rllm.losses")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    assert registration("rllm") == ("ok", "rLLM finds cppo.adapters.rllm by itself, and has trust_region")


def test_what_is_not_there_fails_and_says_what(monkeypatch):
    monkeypatch.setitem(sys.modules, "nemo_rl.algorithms.loss.loss_functions", None)
    (found,) = self_tests.SELF_TESTS["nemo-rl"]()
    assert found.status == "failed"
    assert found.message.startswith("the self-test could not run: ModuleNotFoundError: ")


def test_a_stack_is_asked_where_its_distribution_is_installed(monkeypatch):
    asked = []
    tests = {stack: (lambda stack=stack: asked.append(stack) or iter(())) for stack in self_tests.SELF_TESTS}
    monkeypatch.setattr(doctor, "_SELF_TESTS", tests)
    given = {"slime": "0.1", "tinker": "0.38.0"}
    for module in (doctor, versions):
        monkeypatch.setattr(module, "installed", given.get)
    list(doctor.examine())
    assert asked == ["tinker", "slime"]


# ---------------------------------------------------------------- launches

SKYRL = "python -m skyrl.train.entrypoints.main_base trainer.override_entrypoint=cppo.adapters.skyrl {}"
RLLM = "{{rllm: {{algorithm: {{loss_fn: {}, loss_params: {}, loss_plugins: {}{}}}}}, {}}}"


def judged(tmp_path, monkeypatch, name, text):
    monkeypatch.setattr(doctor, "_SELF_TESTS", {})
    (tmp_path / name).write_text(text)
    return [(finding.status, finding.message) for finding in doctor.examine(tmp_path / name) if finding.subject == name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trainer.algorithm.policy_loss_type='cppo?delta=0.15'", None),
        ("trainer.algorithm.policy_loss_type='cppo?detla=0.15'", "cppo has no knob 'detla'"),
        ("trainer.algorithm.policy_loss_type='ipo?delta=1'", "IPO(delta=1.0): expected delta below 1"),
        ("trainer.algorithm.policy_loss_type=dppo", "already registered"),
        ("trainer.algorithm.policy_loss_type=cppo generator.sampling_params.top_p=0.9", "sampling_params.top_p=0.9"),
        (
            "trainer.algorithm.policy_loss_type=cppo generator.sampling_params.logprobs=null",
            "logprobs=None: expected 1",
        ),
        ("trainer.policy.model.path=x", "'regular'"),
    ],
)
def test_a_skyrl_launch_is_judged(tmp_path, monkeypatch, arguments, message):
    found = judged(tmp_path, monkeypatch, "launch.sh", SKYRL.format(arguments))
    if message is None:
        assert found == [("ok", "a skyrl launch without known traps")]
    else:
        ((status, said),) = found
        assert status == "failed"
        assert message in said
    ours = [name for name in skyrl.ppo_utils.PolicyLossRegistry.list_available() if "?" in name or name == "cppo"]
    assert ours == []


def test_a_skyrl_launch_without_our_entrypoint_is_refused(tmp_path, monkeypatch):
    text = "{trainer: {algorithm: {policy_loss_type: cppo}}, generator: {sampling_params: {top_k: 5}}}"
    (_, first), (_, second) = judged(tmp_path, monkeypatch, "launch.yaml", text)
    assert first.startswith("trainer.override_entrypoint=None: expected cppo.adapters.skyrl")
    assert "generator.sampling_params.top_k=5" in second
    text = text.replace("trainer: {", "trainer: {override_entrypoint: mine, ").replace("top_k: 5", "top_k: -1")
    text = text.replace("policy_loss_type: cppo", "policy_loss_type: mine")
    assert judged(tmp_path, monkeypatch, "launch.yaml", text) == [("ok", "a skyrl launch without known traps")]


PLUGIN = "[cppo.adapters.rllm]"
VERL = "actor_rollout_ref: {rollout: {top_p: 1}}"
RIGHT = ("trust_region", "{method: cppo, delta: 0.15}", PLUGIN, "", VERL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (RIGHT, None),
        (("cppo", *RIGHT[1:]), "rllm.algorithm.loss_fn='cppo': expected 'trust_region'; on verl"),
        (("cppo", *RIGHT[1:4], "rllm/backend: tinker"), None),
        (("dppo_tv", *RIGHT[1:]), "rllm.algorithm.loss_fn='dppo_tv': expected 'trust_region'"),
        (("trust_region", "{delta: 0.15}", *RIGHT[2:]), "algorithm.loss_params.method: missing"),
        (("trust_region", "{method: cppo, detla: 1}", *RIGHT[2:]), "cppo has no knob 'detla'"),
        (("trust_region", "{method: dppo, delta: 1}", *RIGHT[2:]), "DPPO(delta=1.0): expected delta below 1"),
        ((*RIGHT[:2], "null", "", VERL), "rllm.algorithm.loss_plugins=None: expected [cppo.adapters.rllm]"),
        ((*RIGHT[:3], ", kl_beta: 0.1", VERL), "algorithm.kl_beta=0.1: expected 0"),
        ((*RIGHT[:4], VERL.replace("1", "0.9")), "actor_rollout_ref.rollout.top_p=0.9"),
        ((*RIGHT[:4], VERL.replace("top_p: 1", "calculate_log_probs: false")), "calculate_log_probs=False"),
        ((*RIGHT[:4], "rllm/backend: miles"), "rllm/backend='miles': expected verl, tinker or fireworks"),
    ],
)
def test_an_rllm_launch_is_judged(tmp_path, monkeypatch, settings, message):
    given = {"rllm": "0.3.0"}
    monkeypatch.setattr("cppo.doctor.launches.installed", given.get)
    with rllm_stack():
        found = judged(tmp_path, monkeypatch, "launch.yaml", RLLM.format(*settings))
    if message is None:
        assert found == [("ok", "a rllm launch without known traps")]
    else:
        ((status, said),) = found
        assert status == "failed"
        assert message in said


def test_an_rllm_launch_needs_rllm(tmp_path, monkeypatch):
    ((status, message),) = judged(tmp_path, monkeypatch, "launch.yaml", RLLM.format(*RIGHT))
    assert (status, message) == ("failed", "a rllm launch, but rllm is not installed here; run doctor where it is")
