"""What the methods say of themselves: every knob documented, every published setting a method, one rule a class."""

import ast
import dataclasses
import inspect
import pathlib
import re

import pytest

import cppo
from cppo.methods import SETTINGS
from cppo.specs import parse_spec, with_option

KINDS = [*cppo.METHODS.values(), *cppo.CORRECTIONS.values()]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@EVERY_KIND
def test_a_docstring_has_rule_source_differences_and_every_knob(kind):
    text = inspect.getdoc(kind)
    for heading in ("Rule", "Source:", "Args:"):
        assert heading in text, heading
    # What differs between paper and public code; the single criteria of TRM refer to TRM.
    assert "Paper and code:" in text or "as ``cppo.TRM``" in text or kind is cppo.PolicyGradient
    arguments = text.partition("Args:")[2]
    assert re.findall(r"^ {4}(\w+):", arguments, flags=re.MULTILINE) == [f.name for f in dataclasses.fields(kind)]


@EVERY_KIND
def test_a_summary_is_complete(kind):
    summary = kind.summary
    assert all(getattr(summary, name) for name in ("rule", "statistic", "scope", "source"))
    assert summary.scope in ("token", "prefix", "response")
    if kind in cppo.METHODS.values():
        assert summary.reduction in ("token-mean", "sequence-mean", "fixed-length")
    else:
        assert summary.reduction is None
    # What a method needs is an argument of decide.
    assert set(summary.needs) <= inspect.signature(cppo.decide).parameters.keys()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.label)
def test_a_published_setting_is_a_method_or_a_correction(setting):
    name, knobs = parse_spec(setting.spec)
    if name in cppo.CORRECTIONS:
        made = cppo.parse_correction(setting.spec)
    elif name == "estr":
        made = cppo.make_method(name, **knobs, tau=1.0)
    else:
        made = cppo.parse_method(setting.spec)
    assert all(getattr(made, knob) == value for knob, value in knobs.items())
    assert knobs


def test_every_method_and_correction_has_a_published_setting_unless_none_is_known():
    named = {parse_spec(setting.spec)[0] for setting in SETTINGS}
    assert {*cppo.METHODS, *cppo.CORRECTIONS} - named == {"pnpo", "ctpo", "policy_gradient"}


# The rows of the hyper-parameter table of BASELINES section 1, and the settings that are their lines.
ROWS = {
    "PPO/GRPO 0.2": "grpo?clip_low=0.2&clip_high=0.2",
    "DAPO clip-higher 0.2, 0.28": "grpo?clip_low=0.2&clip_high=0.28",
    "DAPO clip-higher 0.2, 0.27": "grpo?clip_low=0.2&clip_high=0.27",
    "dual clip 3": "grpo?dual_clip=3",
    "CISPO 5": "cispo?cap=5",
    "CISPO 3": "cispo?cap=3",
    "CISPO 1.2": "cispo?cap=1.2",
    "MinPRO": "minpro?clip_low=0.2&clip_high=0.28",
    "DPPO TV 0.15": "dppo?delta=0.15",
    "DPPO TV 0.2, cap 5": "dppo?delta=0.2&ratio_cap=5",
    "DPPO KL 0.05": "dppo?delta=0.05&divergence=binary_kl",
    "DPPO Top-K TV": "dppo?delta=0.2&divergence=topk_tv",
    "DPPO Top-K KL": "dppo?delta=0.05&divergence=topk_kl",
    "TRM-Max 0.05": "trm_max?max_threshold=0.05&divergence=exact_kl",
    "TRM-Avg 0.001": "trm_avg?avg_threshold=0.001&divergence=exact_kl",
    "TRM pair 0.1, 0.002": "trm?max_threshold=0.1&avg_threshold=0.002&divergence=exact_kl",
    "GSPO": "gspo?clip_low=3e-4&clip_high=4e-4",
    "SAPO": "sapo?tau_pos=1.0&tau_neg=1.05",
    "DRPO 12.5": "drpo?delta=12.5",
    "GMPO 0.4": "gmpo?log_clip_low=0.4&log_clip_high=0.4",
    "IcePop 0.5, 5": "icepop?low=0.5&high=5",
    "Token-TIS 2": "tis?scope=token&cap=2",
    "Seq-TIS 2": "tis?scope=sequence&cap=2",
    "ESTR 0.01": "estr?epsilon=0.01",
}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_hyper_parameter_table_is_a_published_setting(row):
    assert ROWS[row] in {setting.spec for setting in SETTINGS}


def test_every_method_has_one_rule_and_every_rule_a_method():
    rules = pathlib.Path(cppo.__file__).parent / "rules"
    judges = {
        node.name
        for file in rules.glob("*_regions.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("judge_")
    }
    names = {name if not name.startswith("trm") else "trm" for name in cppo.METHODS}
    assert judges == {f"judge_{name}" for name in names}


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("cppo", "cppo?divergence=topk_tv"),
        ("cppo?delta=0.2", "cppo?delta=0.2&divergence=topk_tv"),
        ("cppo?divergence=binary_kl&delta=0.2", "cppo?delta=0.2&divergence=topk_tv"),
    ],
)
def test_an_option_is_set_once_in_a_spec(spec, wanted):
    assert with_option(spec, "divergence", "topk_tv") == wanted
    assert cppo.parse_method(wanted).divergence == "topk_tv"
