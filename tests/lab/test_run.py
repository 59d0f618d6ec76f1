"""Training runs: the same seed gives the same numbers, whatever ended the run in between; nothing is overwritten."""

import dataclasses
import json
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

import cppo
from cppo.lab.config import RunConfig, load_config
from cppo.lab.experiment import begin, carry_on, evaluate_model
from cppo.lab.folder import RunFolder, read_metrics
from cppo.lab.run import Run, start_run
from cppo.rollout_log import read_rollouts

pytestmark = pytest.mark.train

# Two updates a rollout, a checkpoint a rollout.
TINY = RunConfig(
    task="running_sum?operands=4&slip=0.3", method="cppo?delta=0.02&delta_b=0.002", rollouts=4, epochs=1,
    prompts=4, generations=4, minibatch=8, eval_problems=32, eval_every=1, checkpoint_every=1, warm_start_steps=40,
    learning_rate=3e-3,
)  # fmt: skip


class Silence:
    def phase(self, name, total=None):
        pass

    def advance(self, row=None):
        pass


class Interrupter(Silence):
    """Ends the run at one update, as a crash would."""

    def __init__(self, step):
        self.step = step

    def advance(self, row=None):
        if row is not None and row["step"] == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "unbroken"
    Run(TINY, start_run(TINY, path), Silence()).train()
    return path


def results(path):
    return json.loads((path / "summary.json").read_text())["result"]


def test_the_same_seed_gives_the_same_summary_twice(unbroken, tmp_path):
    Run(TINY, start_run(TINY, tmp_path / "again"), Silence()).train()
    assert results(tmp_path / "again") == results(unbroken)
    assert read_metrics(tmp_path / "again" / "metrics.jsonl") == read_metrics(unbroken / "metrics.jsonl")


def test_another_seed_gives_another_run(unbroken, tmp_path):
    other = dataclasses.replace(TINY, seed=1)
    Run(other, start_run(other, tmp_path / "other"), Silence()).train()
    assert read_metrics(tmp_path / "other" / "metrics.jsonl") != read_metrics(unbroken / "metrics.jsonl")


@pytest.mark.parametrize("step", [1, 2, 3, 5, 8])
def test_a_run_that_crashed_resumes_to_the_numbers_of_an_unbroken_one(unbroken, tmp_path, step):
    path = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        Run(TINY, start_run(TINY, path), Interrupter(step)).train()
    Run(load_config(path / "config.yaml"), RunFolder.open(path), Silence()).train()
    assert results(path) == results(unbroken)
    assert read_metrics(path / "metrics.jsonl") == read_metrics(unbroken / "metrics.jsonl")
    assert list(read_rollouts(path / "rollouts")) == list(read_rollouts(unbroken / "rollouts"))


def test_a_checkpoint_that_was_cut_off_is_not_resumed_from(unbroken, tmp_path):
    path = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        Run(TINY, start_run(TINY, path), Interrupter(5)).train()
    (path / "checkpoints" / "checkpoint-4" / "whole").unlink()
    (path / "checkpoints" / "checkpoint-4" / "optimizer.pt").write_bytes(b"cut")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "gate/me')
    Run(TINY, RunFolder.open(path), Silence()).train()
    assert results(path) == results(unbroken)


def command(*arguments):
    return [sys.executable, "-c", "from cppo.cli import main; main()", *map(str, arguments)]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["checkpoints/start", "metrics.jsonl", "checkpoints/checkpoint-4"])
def test_kill_9_at_any_moment_loses_nothing(unbroken, tmp_path, moment):
    settings = tmp_path / "settings.yaml"
    content = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(TINY).items()}
    settings.write_text(yaml.safe_dump(content))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = tmp_path / "killed"
    process = subprocess.Popen(
        command("train", "--config", settings, "--root", tmp_path, "--name", "killed"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    while not (run / moment).exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(
        command("train", "--resume", run), capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert results(run) == results(unbroken)
    assert (run / "report.html").is_file()


def test_a_run_folder_holds_what_it_promises(unbroken):
    rows = read_metrics(unbroken / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(9))
    assert sum(row["gate/masked_fraction"] for row in rows[1:]) > 0  # else these tests would show little
    assert {"gate/masked_fraction", "gate/budget_share", "divergence/mean", "account/delta_b"} <= set(rows[4])
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 2, 4, 6, 8]
    assert load_config(unbroken / "config.yaml") == TINY
    versions = yaml.safe_load((unbroken / "config.yaml").read_text())["versions"]
    assert versions["torch"] == torch.__version__
    linux = pathlib.Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", linux.read_text()) if linux.exists() else None
    assert versions["processor"].startswith(name[1] if name else platform.machine())
    assert versions["processor"].endswith(f" {torch.backends.cpu.get_cpu_capability()}")
    responses = list(read_rollouts(unbroken / "rollouts"))
    assert len(responses) == TINY.rollouts * TINY.responses
    for row in responses:
        lengths = {len(row[name]) for name in ("token_ids", "logp", "rollout_logp", "response_mask")}
        assert len(lengths) == 1
        assert row["prompt"].endswith("=")
        assert row["reward"] in (0.0, 1.0)
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary["cost"]["cpu_seconds"].keys() >= {"generation", "scoring", "updates", "evaluation", "own"}


def masked_again(path, method):
    """Return, for each update with something to learn from, the masked fraction by replay and the logged one."""
    logged = {row["step"]: row for row in read_metrics(path / "metrics.jsonl")}
    by_step = {}
    for row in read_rollouts(path / "rollouts"):
        # Zero-variance groups were left out of the batch; they are the rows with advantage zero.
        if row["advantage"] != 0:
            by_step.setdefault(row["step"], []).append(row)
    for step, used in by_step.items():

        def packed(name, used=used):
            return torch.tensor([value for row in used for value in row[name]])

        decision = cppo.decide(
            method, packed("logp"), packed("rollout_logp"), torch.tensor([row["advantage"] for row in used]),
            lengths=[len(row["logp"]) for row in used],
            divergence=None if used[0]["divergence"] is None else packed("divergence"),
        )  # fmt: skip
        yield (decision.rejected_by > 0).float().mean().item(), logged[step]["gate/masked_fraction"]


def test_the_logged_log_probs_give_the_logged_masked_fraction(unbroken):
    """The rollout log is enough to judge every token again: replay equals what the run did."""
    pairs = list(masked_again(unbroken, cppo.parse_method(TINY.method)))
    assert any(logged > 0 for _, logged in pairs)
    for replayed, logged in pairs:
        assert replayed == pytest.approx(logged, abs=1e-6)


@pytest.mark.parametrize("divergence", ["topk_tv", "topk_kl"])
def test_a_measured_divergence_is_logged_bounds_the_binary_one_and_gives_the_logged_decisions(tmp_path, divergence):
    config = dataclasses.replace(TINY, method=f"{TINY.method}&divergence={divergence}", divergence_top_k=4, rollouts=2)
    path = tmp_path / "measured"
    Run(config, start_run(config, path), Silence()).train()
    binary = {"topk_tv": cppo.binary_tv, "topk_kl": cppo.binary_kl}[divergence]
    larger = 0
    for row in read_rollouts(path / "rollouts"):
        assert len(row["divergence"]) == len(row["logp"])
        measured = torch.tensor(row["divergence"])
        below = binary(torch.tensor(row["logp"]), torch.tensor(row["rollout_logp"]))
        assert (measured >= below - 2e-6).all()
        larger += int((measured > below + 1e-3).sum())
    assert larger > 0  # else the binary one was logged
    pairs = list(masked_again(path, cppo.parse_method(config.method)))
    assert any(masked > 0 for _, masked in pairs)
    for replayed, logged in pairs:
        assert replayed == pytest.approx(logged, abs=1e-6)


def test_a_run_with_a_measured_divergence_resumes_to_the_numbers_of_an_unbroken_one(tmp_path):
    config = dataclasses.replace(TINY, method=f"{TINY.method}&divergence=topk_tv", rollouts=2)
    Run(config, start_run(config, tmp_path / "whole"), Silence()).train()
    with pytest.raises(KeyboardInterrupt):
        Run(config, start_run(config, tmp_path / "broken"), Interrupter(3)).train()
    Run(load_config(tmp_path / "broken" / "config.yaml"), RunFolder.open(tmp_path / "broken"), Silence()).train()
    assert results(tmp_path / "broken") == results(tmp_path / "whole")


def test_responses_of_equal_groups_are_left_out_of_the_loss(tmp_path):
    # A verifier that gives everyone the same leaves nothing to learn from: the weights stay.
    config = dataclasses.replace(TINY, rollouts=1, warm_start_steps=0, task="running_sum?operands=12&strict=true")
    path = tmp_path / "flat"
    Run(config, start_run(config, path), Silence()).train()
    rows = read_metrics(path / "metrics.jsonl")
    assert rows[1]["rollout/zero_variance_groups"] == 1.0
    assert rows[1]["input/tokens"] == 0
    from safetensors.torch import load_file

    before = load_file(path / "checkpoints" / "start" / "model.safetensors")
    after = load_file(path / "checkpoints" / "final" / "model.safetensors")
    assert all((before[name] == after[name]).all() for name in before)


def page_data(path):
    """Return the document that a report page holds."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())[1])


def test_beside_runs_from_the_same_start_and_stands_in_the_report(tmp_path):
    from rich.console import Console

    config = dataclasses.replace(TINY, beside=("policy_gradient",), rollouts=1)
    console = Console(quiet=True)
    summaries, report = begin(config, tmp_path, None, console)
    assert [summary["method"] for summary in summaries] == [config.method, "policy_gradient"]
    assert summaries[0]["result"]["start_accuracy"] == summaries[1]["result"]["start_accuracy"]
    assert report == tmp_path / "cppo-1" / "report.html"
    document = page_data(report)
    assert [run["method"] for run in document["runs"]] == [config.method, "policy_gradient"]
    assert [curve["label"] for curve in document["training"]] == ["cppo-1", "cppo-1.1-policy_gradient"]
    starts = [curve["accuracy"][0] for curve in document["training"]]
    assert starts == [summary["result"]["start_accuracy"] for summary in summaries]
    beside = page_data(tmp_path / "cppo-1.1-policy_gradient" / "report.html")
    assert beside["runs"] == document["runs"][1:]
    assert beside["training"] == document["training"][1:]
    again, _ = carry_on(tmp_path / "cppo-1", console)  # a finished run is read, not run again
    assert again == summaries


def test_eval_of_a_finished_run_is_reproducible(unbroken):
    from rich.console import Console

    arguments = {
        "task": None, "problems": 8, "samples": 3, "temperature": 1.0, "max_tokens": None, "gguf_file": None,
        "seed": 5, "batch_size": 7, "threads": 1, "console": Console(quiet=True),
    }  # fmt: skip
    first = evaluate_model(str(unbroken), **arguments)
    assert first == evaluate_model(str(unbroken), **arguments)
    assert (first.problems, first.samples) == (8, 3)
    assert 0 <= first.mean <= first.solved <= 1


def test_a_lora_run_resumes_and_its_final_model_loads_by_itself(tmp_path):
    from rich.console import Console

    config = dataclasses.replace(TINY, lora_rank=2, rollouts=2)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Run(config, start_run(config, whole), Silence()).train()
    with pytest.raises(KeyboardInterrupt):
        Run(config, start_run(config, broken), Interrupter(3)).train()
    Run(config, RunFolder.open(broken), Silence()).train()
    assert results(broken) == results(whole)
    last = results(whole)["evaluations"][-1][1]
    again = evaluate_model(
        str(whole), task=None, problems=config.eval_problems, samples=1, temperature=1.0, max_tokens=None,
        gguf_file=None, seed=config.seed, batch_size=256, threads=1, console=Console(quiet=True),
    )  # fmt: skip
    assert again.mean == pytest.approx(last, abs=1 / config.eval_problems)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rollouts: 0", "rollouts=0: expected an integer >= 1"),
        ("rolouts: 3", "unknown setting 'rolouts'"),
        ("- 1", "expected settings"),
        ("a: [", "cannot be read as YAML"),
        ("epochs: 2\nseed: 1\nepochs: 4", "'epochs' stands there twice"),
        ("method: ppo", "method='ppo'"),
        ("method: cppo?delt=1", "no knob 'delt'"),
        ("minibatch: 7", "minibatch=7: expected a divisor"),
        ("minibatch: 256\nepochs: 1", "can never act"),
        ("learning_rate: -1", "learning_rate=-1"),
        ("learning_rate: 1e-4", "1.0e-4 as a number"),
        ("method: 3", "method=3: expected text"),
        ("task: null", "task=None: expected text"),
        ("beside: grpo", "beside='grpo': expected a list"),
        ("beside: [grpo, grpo]", "differ from each other and from method='cppo"),
        ("report_to: 5", "report_to=5: expected a list"),
        ('skip_zero_variance: "no"', "skip_zero_variance='no'"),
        ("gguf_file: x.gguf", "expected model to be the folder"),
        ("seed: 99999999999", "expected an integer below"),
    ],
)
def test_a_wrong_configuration_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_of_another_run_is_never_taken_for_the_run_beside(tmp_path):
    from rich.console import Console

    config = dataclasses.replace(TINY, beside=("policy_gradient",), rollouts=1)
    (tmp_path / "mine.1-policy_gradient").mkdir()
    with pytest.raises(ValueError, match="exists"):
        begin(config, tmp_path, "mine", Console(quiet=True))
    assert not (tmp_path / "mine").exists()
    start_run(config, tmp_path / "other")
    start_run(dataclasses.replace(TINY, method="policy_gradient", seed=7), tmp_path / "other.1-policy_gradient")
    with pytest.raises(ValueError, match="settings"):
        carry_on(tmp_path / "other", Console(quiet=True))


def test_a_new_root_is_made(tmp_path):
    folder = start_run(TINY, tmp_path / "new" / "runs" / "first")
    assert folder.config.is_file()
    assert [path.name for path in (tmp_path / "new" / "runs").iterdir()] == ["first"]


def test_starting_and_resuming_touch_nothing_that_is_not_the_run_s(unbroken, tmp_path):
    start_run(TINY, tmp_path / "foo.tmp")
    folder = start_run(TINY, tmp_path / "foo")
    assert (tmp_path / "foo.tmp" / "config.yaml").is_file()
    mine = [
        folder.checkpoints / "checkpoint-best" / "keep",
        folder.rollouts / "my.parquet",
        folder.rollouts / "d" / "x",
    ]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    folder.rewind()
    assert all(path.read_text() == "mine" for path in mine)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("metrics.jsonl", "metrics.jsonl, line 1"),
        ("checkpoints/checkpoint-4/optimizer.pt", "optimizer.pt: cannot be read"),
        ("checkpoints/checkpoint-4/model.safetensors", "model.safetensors: cannot be read"),
        ("checkpoints/checkpoint-4/cpu_seconds.json", "cpu_seconds.json: expected JSON"),
    ],
)
def test_a_damaged_run_names_the_damaged_file(tmp_path, part, message):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        Run(TINY, start_run(TINY, path), Interrupter(5)).train()
    (path / part).write_text("garbage\n")
    with pytest.raises(ValueError, match=message):
        Run(TINY, RunFolder.open(path), Silence()).train()


def test_an_existing_run_is_never_overwritten(unbroken):
    before = {path: path.read_bytes() for path in unbroken.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="exists"):
        start_run(TINY, unbroken)
    assert {path: path.read_bytes() for path in unbroken.rglob("*") if path.is_file()} == before


def test_the_tiny_model_needs_a_task_with_a_demonstrator(tmp_path):
    config = dataclasses.replace(TINY, task="reasoning_gym:chain_sum")
    with pytest.raises(ValueError, match="demonstrator"):
        start_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line", [b'{"step": Infinity}', b"[" * 100_000, b'{"step": "x"}', b"[]", b'{"step": 1, "a": "\xff"}']
)
def test_metrics_that_are_no_metrics_are_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl.*: expected (a JSON object with a step|UTF-8)"):
        read_metrics(tmp_path / "metrics.jsonl")
