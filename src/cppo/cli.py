"""The command line: ``cppo train``, ``eval``, ``compare``, ``inspect``, ``bound``, ``methods``, ``doctor``."""

from __future__ import annotations

import dataclasses
import inspect as python_inspect
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cppo.bound.command import app as bound_app
from cppo.compare.command import EXAMPLES, compare
from cppo.lab.config import RunConfig, load_config
from cppo.methods import CORRECTIONS, METHODS, SETTINGS, Setting, parse_method, takes_topk
from cppo.printable import printable
from cppo.specs import parse_spec, with_option

# Below this width the table of methods would break words.
_WIDE = 132

app = typer.Typer(
    help="CPPO and the trust regions it is compared with, on models from a laptop's up.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.add_typer(bound_app, name="bound")

# Settings of a run that have no option.
ONLY_IN_A_FILE = ("schedule", "skip_zero_variance", "temperature", "warm_start_steps", "warmup")


def _default(name: str) -> str:
    """Return a setting's default as YAML has it."""
    value = getattr(RunConfig, name)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _help(name: str, text: str) -> str:
    """Return an option's help with the setting's default: the option's own is None, as a file may say another."""
    return f"{text[:-1]}; default: {_default(name)}."


@app.command(
    epilog="Examples:  cppo train  |  cppo train --beside policy_gradient  |  "
    "cppo train --method 'cppo?delta=0.2&budget=adaptive' --rollouts 24  |  cppo train --divergence topk_tv  |  "
    "cppo train --resume runs/cppo-1"
)
def train(
    method: Annotated[
        str | None,
        typer.Option(help=_help("method", "Trust region: name, or name?knob=value&knob=value.")),
    ] = None,
    divergence: Annotated[
        str | None,
        typer.Option(
            help="Of --method, if it has one: binary_tv, binary_kl, topk_tv or topk_kl. Methods beside keep their own."
        ),
    ] = None,
    divergence_top_k: Annotated[
        int | None, typer.Option(help=_help("divergence_top_k", "K of a top-K divergence."))
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(help="Also run this method from the same start on the same problems. Repeatable."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help=_help("task", "running_sum, long_tail_sum, reasoning_gym:NAME?option=value, or math:FILE.jsonl."),
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help=_help("model", "tiny, tiny?layers=4&width=144&heads=6, a folder, or a hub id.")),
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="The GGUF file inside the --model folder.")] = None,
    rollouts: Annotated[int | None, typer.Option(help=_help("rollouts", "Rollout batches."))] = None,
    prompts: Annotated[int | None, typer.Option(help=_help("prompts", "Problems a rollout."))] = None,
    generations: Annotated[int | None, typer.Option(help=_help("generations", "Responses a problem."))] = None,
    minibatch: Annotated[int | None, typer.Option(help=_help("minibatch", "Responses an optimizer update."))] = None,
    gradient_accumulation: Annotated[
        int | None, typer.Option(help=_help("gradient_accumulation", "Micro-batches an update."))
    ] = None,
    epochs: Annotated[int | None, typer.Option(help=_help("epochs", "Passes over each rollout batch."))] = None,
    learning_rate: Annotated[float | None, typer.Option(help=_help("learning_rate", "AdamW's."))] = None,
    max_completion_tokens: Annotated[int | None, typer.Option(help="Longest response; default: the task's.")] = None,
    sampler_noise: Annotated[
        float | None,
        typer.Option(
            help=_help("sampler_noise", "Standard deviation of noise on the sampler's logits: an engine's mismatch."),
        ),
    ] = None,
    certificate: Annotated[
        bool | None, typer.Option("--certificate", help="Log an estimate of the policy-improvement bound an update.")
    ] = None,
    eval_problems: Annotated[
        int | None, typer.Option(help=_help("eval_problems", "Held-out problems an evaluation."))
    ] = None,
    eval_samples: Annotated[
        int | None, typer.Option(help=_help("eval_samples", "Samples a held-out problem (Avg@k)."))
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help=_help("eval_every", "Rollouts between evaluations."))] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help=_help("checkpoint_every", "Rollouts between checkpoints."))
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help=_help("lora_rank", "0: all weights; else LoRA of that rank."))
    ] = None,
    seed: Annotated[int | None, typer.Option(help=_help("seed", "Of everything random."))] = None,
    threads: Annotated[int | None, typer.Option(help=_help("threads", "Of torch."))] = None,
    report_to: Annotated[
        list[str] | None, typer.Option(help="A tracker that TRL supports (tensorboard, wandb, ...). Repeatable.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file of settings; options here win over it. It alone takes "
            + ", ".join(f"{name} ({_default(name)})" for name in ONLY_IN_A_FILE)
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The run's folder under --root; default: METHOD-NUMBER.")] = None,
    root: Annotated[Path, typer.Option(help="Where run folders stand.")] = Path("runs"),
    resume: Annotated[Path | None, typer.Option(help="Continue this run folder from its last checkpoint.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summaries as JSON and nothing else.")] = False,
) -> None:
    """Train a model with reinforcement learning on verifiable rewards, under a trust region."""
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in locals().items()
        if key not in ("divergence", "config", "name", "root", "resume", "as_json") and value not in (None, [])
    }
    if resume is not None and (options or divergence or config or name):
        others = {"divergence": divergence, "config": config, "name": name}
        given = [*options, *(key for key, value in others.items() if value)]
        raise ValueError(f"--resume {resume}: expected no other settings (the run has its own), got {', '.join(given)}")
    # The settings are checked before the frameworks take their seconds to load.
    settings = load_config(config) if config else RunConfig()
    if divergence is not None:
        if method is not None and "divergence" in parse_spec(method)[1]:
            raise ValueError(f"--divergence {divergence}: expected none beside --method {method!r}, which names one")
        options["method"] = with_option(method or settings.method, "divergence", divergence)
    settings = dataclasses.replace(settings, **options)
    if divergence_top_k is not None and not any(
        takes_topk(parse_method(m)) for m in (settings.method, *settings.beside)
    ):
        raise ValueError(
            f"--divergence-top-k {divergence_top_k}: expected a method whose divergence is topk_tv or topk_kl"
        )
    _quieten_frameworks()
    from cppo.lab.experiment import begin, carry_on

    console = _console(stderr=as_json)
    if resume is not None:
        summaries, report = carry_on(resume, console, quiet=as_json)
    else:
        summaries, report = begin(settings, root, name, console, quiet=as_json)
    if as_json:
        print(json.dumps(summaries, indent=2))
    else:
        from cppo.lab.display import final_table

        console.print(final_table(summaries))
        console.print(f"Pictures: {report}", markup=False)


@app.command(
    "eval",
    epilog="Examples:  cppo eval runs/cppo-1 -k 16  |  cppo eval ./my-model --task 'reasoning_gym:chain_sum' -k 4",
)
def evaluate_command(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, or a hub id.")],
    task: Annotated[str | None, typer.Option(help="As for train; default: the run's own.")] = None,
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 256,
    samples: Annotated[int, typer.Option("--samples", "-k", min=1, help="Samples a problem.")] = 16,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, max=100.0, help="Of sampling; 0: the likeliest token; default: the run's, or 1."),
    ] = None,
    max_completion_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest response; default: the run's, or the task's.")
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="The GGUF file inside a model folder.")] = None,
    seed: Annotated[int, typer.Option(help="Of problems and sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses sampled at once.")] = 256,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Avg@k: the mean success over k samples a held-out problem, with its standard error."""
    _quieten_frameworks()
    from cppo.lab.experiment import evaluate_model

    result = evaluate_model(
        model, task=task, problems=problems, samples=samples, temperature=temperature, seed=seed, gguf_file=gguf_file,
        max_tokens=max_completion_tokens, batch_size=batch_size, threads=threads, console=_console(stderr=True),
    )  # fmt: skip
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        error = "" if result.standard_error is None else f" ± {result.standard_error:.4f} (standard error)"
        print(f"Avg@{result.samples} {result.mean:.4f}{error} on {result.problems} problems")
        print(
            f"solved at least once {result.solved:.1%}, ended by itself {result.ended:.1%}, {result.length:.1f} tokens"
        )


@app.command(
    epilog="Examples:  cppo inspect runs/first  |  cppo inspect runs/first runs/second --html both.html  |  "
    "cppo inspect rollouts/ --method 'dppo?delta=0.2' --json"
)
def inspect(
    logs: Annotated[list[Path], typer.Argument(help="Runs' folders, folders of parquet files, or parquet files.")],
    method: Annotated[
        str | None,
        typer.Option(
            help="The method that the runs used, NAME?knob=value; default: what the log or its run's config.yaml names."
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            help="Judge the same tokens by this method, in the place of twelve at their default knobs. Repeatable."
        ),
    ] = None,
    masked: Annotated[
        float, typer.Option(help="Suggest thresholds that mask this share of the tokens.", min=1e-4, max=0.9)
    ] = 0.02,
    responses: Annotated[int, typer.Option(help="How many responses are shown whole.", min=1, max=1000)] = 40,
    html: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over an existing page.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """See what a trust region did to a run, what others would have done, and which thresholds fit."""
    import torch
    from rich.progress import Progress

    from cppo.inspect.page import write_page
    from cppo.inspect.reading import Log
    from cppo.inspect.runs import inspect_runs, training_curve
    from cppo.inspect.summary import BESIDE
    from cppo.inspect.terminal import print_document
    from cppo.lab.folder import read_metrics

    if html is not None and html.exists() and not force:
        raise ValueError(f"--html {html}: exists; expected a new file, or --force")
    if html is not None and not html.absolute().parent.is_dir():
        raise ValueError(f"--html {html}: expected a file in an existing folder")
    for spec in [*([] if method is None else [method]), *(beside or [])]:
        parse_method(spec)
    torch.set_num_threads(1)  # many small calls: threads would wait for each other
    with Progress(console=_console(stderr=True), transient=True, disable=as_json) as progress:
        bar = progress.add_task("reading", total=2 * sum(Log.open(path).responses for path in logs))
        document = inspect_runs(
            logs, own=method, beside=tuple(beside or BESIDE), wanted=masked, responses=responses,
            progress=lambda read: progress.advance(bar, read),
        )  # fmt: skip
    if html is not None:
        curves = [
            training_curve(run["name"], read_metrics(path / "metrics.jsonl"))
            for run, path in zip(document["runs"], logs, strict=True)
        ]
        write_page(html, document, [curve for curve in curves if curve is not None])
    if as_json:
        print(json.dumps(document, ensure_ascii=True, allow_nan=False))
    else:
        print_document(document, _console(stderr=False))
        if html is not None:
            print(f"{printable(str(html))}: the page")


app.command(epilog=EXAMPLES)(compare)


@app.command(epilog="Examples:  cppo methods  |  cppo methods trm_max  |  cppo methods --json")
def methods(
    name: Annotated[str | None, typer.Argument(help="One method or correction, in full.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the trust regions: rule, statistic, scope, knobs with defaults, sources, and the published settings."""
    kinds: dict[str, Any] = METHODS | CORRECTIONS
    chosen = kinds if name is None else {_known(name, kinds): kinds[_known(name, kinds)]}
    settings = {key: [s for s in SETTINGS if s.spec.partition("?")[0] == key] for key in chosen}
    if as_json:
        print(json.dumps({key: _as_json(kind, settings[key]) for key, kind in chosen.items()}, indent=2))
        return
    console = _console(stderr=False)
    if name is None:
        _print_family(console, "method", METHODS)
        _print_family(console, "correction", CORRECTIONS)
        print("Published settings (--method takes the specs of methods)\n")
        _print_settings(SETTINGS)
        return
    for key, kind in chosen.items():
        print(f"{key}\n\n{python_inspect.getdoc(kind)}")
        if kind.summary.reduction is not None:
            print(f'\nPublished with reduction="{kind.summary.reduction}".')
        if settings[key]:
            print("\nPublished settings\n")
            _print_settings(settings[key])


@app.command(
    epilog="Examples:  cppo doctor  |  cppo doctor --config my_verl.yaml  |  cppo doctor --config rl.toml  |  "
    "cppo doctor --config launch.sh --json"
)
def doctor(
    config: Annotated[
        Path | None,
        typer.Option(help="A launch: a stack's .yaml or .toml, GRPOConfig fields (.yaml), or a file with a command."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the installed stacks: versions, one step's gradient against the closed form, a launch's known traps."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from cppo.doctor import examine

    findings = []
    for finding in examine(config):
        findings.append(finding)
        if not as_json:
            print(f"{finding.status:8}{finding.subject:32}{finding.message}", flush=True)
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    if any(finding.status == "failed" for finding in findings):
        sys.exit(1)


def _known(name: str, kinds: Mapping[str, Any]) -> str:
    """Return the key of a method or correction named by it, by its class in any case, or by a spec."""
    bare = name.partition("?")[0].lower()
    names = {kind.__name__.lower(): key for key, kind in kinds.items()} | {key: key for key in kinds}
    if bare not in names:
        raise ValueError(f"method {name!r}: expected one of {', '.join(kinds)}")
    return names[bare]


def _defaults(kind: type) -> dict[str, Any]:
    """Return each knob's default; the text "required" where no published value is known."""
    missing = dataclasses.MISSING
    return {f.name: "required" if f.default is missing else f.default for f in dataclasses.fields(kind)}


def _as_json(kind: Any, settings: Sequence[Setting]) -> dict[str, Any]:
    return {
        "doc": python_inspect.getdoc(kind),
        **dataclasses.asdict(kind.summary),
        "knobs": _defaults(kind),
        "settings": [dataclasses.asdict(setting) for setting in settings],
    }


def _print_family(console: Console, heading: str, kinds: Mapping[str, Any]) -> None:
    """Print a table, or, where the window is narrow, a block a method."""
    rows = [
        {
            heading: key,
            "rule": kind.summary.rule,
            "statistic": kind.summary.statistic,
            "scope": kind.summary.scope,
            "knobs (default)": ", ".join(f"{knob}={value}" for knob, value in _defaults(kind).items()),
            "reduction": kind.summary.reduction,
            "source": kind.summary.source,
        }
        for key, kind in kinds.items()
    ]
    rows = [{name: cell for name, cell in row.items() if cell is not None} for row in rows]
    if console.width < _WIDE:
        for row in rows:
            print("\n".join(f"{'' if name == heading else '    '}{name}: {cell}" for name, cell in row.items()))
            print()
        return
    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row.values()))  # Text: brackets are no markup
    console.print(table)
    console.print()


def _print_settings(settings: Sequence[Setting]) -> None:
    """Print each spec on a line of its own, to be copied, and what it is below."""
    for setting in settings:
        print(f"{setting.spec}\n    {setting.label}: {setting.source}")


def _quieten_frameworks() -> None:
    """Keep progress bars and notices of the frameworks off a display that has its own."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import transformers

    transformers.logging.disable_progress_bar()


def _console(*, stderr: bool) -> Console:
    """Return a console; lines that go to a file or a pipe are not wrapped at eighty columns."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=140)


def main() -> None:
    """Run the command line; what a user can mend is one line on stderr and exit code 2."""
    try:
        app()
    except (ValueError, TypeError, ImportError, OSError) as error:
        if os.environ.get("CPPO_TRACEBACK"):
            raise
        print(f"cppo: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
