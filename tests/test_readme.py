"""The README's code blocks run as written, and its commands are the ones that exist."""

import pathlib
import re
import shlex

import pytest
from typed import in_a_process, typed

pytestmark = pytest.mark.train

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    return [
        words for block in blocks("bash") for line in block.splitlines() if (words := shlex.split(line, comments=True))
    ]


def test_the_readme_is_short():
    assert len(README.splitlines()) < 200


def test_the_python_blocks_run_and_the_trl_trainer_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert "tensor(" in capsys.readouterr().out
    assert namespace["logp"].grad is not None

    from datasets import Dataset

    from cppo.lab.model import build_char_tokenizer, build_tiny_model

    tokenizer = build_char_tokenizer("0123456789=")
    namespace["config"].max_completion_length = 8
    namespace["config"].max_steps = 9
    model = build_tiny_model(tokenizer)
    before = model.lm_head.weight.clone()
    prompts = Dataset.from_dict({"prompt": [f"{index}=" for index in range(8)]})
    namespace["train"](model, lambda completions, **_: [float(len(set(c))) for c in completions], prompts, tokenizer)
    assert (model.lm_head.weight != before).any()


@pytest.mark.slow
def test_the_cppo_commands_run_in_order(tmp_path):
    ran = 0
    for words in commands():
        if words[0] == "cppo":
            run = typed if words[1] in ("methods", "inspect", "bound") else in_a_process
            done = run(*words[1:], cwd=tmp_path)
            assert done.returncode == 0, (words, done.stderr)
            ran += 1
    assert ran >= 4


def test_every_make_command_is_a_target_and_every_link_leads_somewhere():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    makes = [words[1] for words in commands() if words[0] == "make"]
    assert makes == ["demo", "test"]
    for target in makes:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / link).exists(), (document.name, link)


def test_the_method_table_names_every_method_and_knob():
    import dataclasses

    import cppo

    for kind in cppo.METHODS.values():
        row = next(line for line in README.splitlines() if line.startswith("| `") and f"`{kind.__name__}`" in line)
        if "as `TRM`" in row:
            continue
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in row or field.name == "shuffle_seed", (kind, field.name)
