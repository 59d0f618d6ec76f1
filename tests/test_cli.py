"""The command line: help, machine output, and one clear line with exit code 2 for what a user can mend."""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys

import pytest
from typed import in_a_process, typed

import cppo
from cppo import cli
from cppo.lab.config import RunConfig
from cppo.methods import SETTINGS

pytestmark = pytest.mark.train


def test_without_the_train_extra_the_command_says_what_is_missing():
    code = "import sys; sys.modules['typer'] = None; from cppo.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "cppo: the command line needs typer: pip install 'cppo[train]' (beside verl: 'cppo[verl]')\n"


@pytest.mark.parametrize("name", [[], ["train"], ["eval"], ["compare"], ["bound", "verify"], ["methods"], ["doctor"]])
def test_help_has_examples(name):
    done = typed(*name, "--help")
    assert done.returncode == 0
    if name:
        assert "Examples" in done.stdout


def test_methods_lists_every_method_and_prints_one_in_full():
    listed = json.loads(typed("methods", "--json").stdout)
    assert list(listed) == [*cppo.METHODS, *cppo.CORRECTIONS]
    assert listed["cppo"]["knobs"]["delta"] == 0.15
    assert listed["estr"]["knobs"]["tau"] == "required"
    assert listed["trm_max"]["scope"] == "response"
    assert [setting["spec"] for setting in listed["icepop"]["settings"]] == ["icepop?low=0.5&high=5"]
    table = typed("methods").stdout
    assert all(re.search(rf"^{name} ", table, flags=re.MULTILINE) for name in listed)
    for setting in SETTINGS:
        assert f"\n{setting.spec}\n    {setting.label}: {setting.source}\n" in table
    assert "Eqs. 8-11" in typed("methods", "cppo").stdout
    one = typed("methods", "trm_avg").stdout
    assert "(1 / T) sum_t D_t <= avg_threshold" in one
    assert "trm_avg?avg_threshold=0.001&divergence=exact_kl" in one
    assert 'Published with reduction="fixed-length".' in one
    # By the class's name, or from a spec.
    assert typed("methods", "IcePop").stdout == typed("methods", "icepop?high=4").stdout
    assert "Ring-1T" in typed("methods", "icepop").stdout


def test_a_narrow_window_gets_blocks_and_no_broken_words():
    command = f"{sys.executable} -c 'from cppo.cli import main; main()'"
    done = subprocess.run(
        ["script", "-qec", f"stty cols 80; {command} methods", "/dev/null"],
        capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"},
    )  # fmt: skip
    text = done.stdout.replace("\r", "")
    assert len(text.splitlines()) < 300
    for name in (*cppo.METHODS, *cppo.CORRECTIONS):
        assert re.search(rf"^(method|correction): {name}$", text, flags=re.MULTILINE), name
    assert all(f"\n{setting.spec}\n" in text for setting in SETTINGS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods", "ppo"], "'ppo': expected one of cppo, dppo"),
        (["train", "--method", "ppo"], "method='ppo': expected one of"),
        (["train", "--method", "cppo?delta=-1"], "delta=-1"),
        (["train", "--method", "estr"], "estr needs a value for 'tau'"),
        (["train", "--method", "estr?tau=1"], "method='estr?tau=1': expected one that needs no rollout_entropy"),
        (["train", "--beside", "trm?divergence=exact_kl"], "expected one that needs no divergence"),
        (["train", "--divergence", "exact_tv"], "divergence=exact_tv': expected one that needs no divergence"),
        (["train", "--divergence", "topk_tv", "--method", "grpo"], "grpo has no knob 'divergence'"),
        (["train", "--divergence", "topk_tv", "--method", "cppo?divergence=binary_kl"], "which names one"),
        (["train", "--divergence-top-k", "0"], "divergence_top_k=0: expected an integer >= 1"),
        (["train", "--divergence-top-k", "4"], "--divergence-top-k 4: expected a method whose divergence is topk_tv"),
        (["train", "--resume", "nowhere", "--divergence", "topk_tv"], "got divergence"),
        (["train", "--task", "running_sums"], "running_sums"),
        (["train", "--model", "./nowhere", "--task", "reasoning_gym:chain_sum"], "nowhere"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--resume", "nowhere"], "nowhere"),
        (["train", "--resume", "nowhere", "--seed", "3"], "expected no other settings"),
        (["train", "--name", "a/b"], "'a/b'"),
        (["train", "--root", "/proc/nowhere"], "/proc/nowhere"),
        (["train", "--report-to", "no_such_tracker"], "report_to='no_such_tracker': expected a tracker"),
        (["train", "--report-to", "wandb"], "report_to='wandb': expected a tracker that is known and installed"),
        (["eval", "./nowhere", "--task", "running_sum"], "nowhere"),
        (["eval", "./nowhere"], "--task"),
        (["doctor", "--config", "nowhere.yaml"], "--config nowhere.yaml: cannot be read"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_nothing_is_left_behind(tmp_path, arguments, message):
    done = typed(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_process_of_its_own_prints_that_line_and_nothing_of_the_frameworks(tmp_path):
    done = in_a_process("train", "--report-to", "wandb", cwd=tmp_path)  # refused after TRL was loaded
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("cppo: report_to='wandb': expected a tracker")


def test_a_divergence_can_be_run_beside_the_same_method_with_another(tmp_path):
    method = "cppo?budget=fixed&delta_b=0.015"
    done = in_a_process(
        "train", "--method", method, "--divergence", "topk_tv", "--beside", method,
        "--task", "running_sum?operands=4", "--rollouts", "1",
        "--prompts", "4", "--generations", "2", "--minibatch", "4", "--eval-problems", "4", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [summary["method"] for summary in json.loads(done.stdout)] == [f"{method}&divergence=topk_tv", method]


def test_every_setting_of_a_run_has_an_option_or_stands_beside_config_with_its_default():
    options = set(inspect.signature(cli.train).parameters)
    names = {field.name for field in dataclasses.fields(RunConfig)}
    assert names - options == set(cli.ONLY_IN_A_FILE)
    shown = " ".join(typed("train", "--help").stdout.split())
    for text in (
        "Rollout batches; default: 12.",
        "AdamW's; default: 0.001.",
        "skip_zero_variance (true)",
        "warmup (0)",
    ):
        assert text in shown
