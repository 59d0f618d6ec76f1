"""The documentation's Python runs, and every formula that it prints is evaluated against the code."""

import pathlib
import re

import pytest
import torch
import torch.distributed as dist

import cppo

DOCS = pathlib.Path(__file__).parent.parent / "docs"


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), flags=re.DOTALL)


def run(name):
    namespace = {"__name__": name}
    for block in python_blocks(name):
        exec(compile(block, name, "exec"), namespace)
    return namespace


def test_every_formula_of_the_method_page_is_what_the_code_computes():
    run("method.md")


def test_every_equation_and_statement_of_the_paper_that_the_code_uses_is_on_the_page():
    text = (DOCS / "method.md").read_text(encoding="utf-8")
    for mark in ("(8)", "(9)", "(10)", "(11)", "(19, 20)", "(22)", "Eq. 18", "B.9", "Theorem 1", "Prop. 5", "Prop. 8",
                 "Lemma 2", "Lemma 3", "Prop. 4", "Cor. 6, 7"):  # fmt: skip
        assert mark in text, mark
    for method in cppo.METHODS.values():
        assert f"cppo.{method.__name__}(" in text, method
    for correction in cppo.CORRECTIONS.values():
        assert f"cppo.{correction.__name__}(" in text, correction


def test_every_block_of_the_method_page_compares():
    assert all("assert" in block for block in python_blocks("method.md") if "theory = cppo.theory" not in block)


def test_names_in_the_symbol_table_exist():
    text = (DOCS / "method.md").read_text(encoding="utf-8")
    for file in re.findall(r"`((?!tests/)\w+/?\w*\.py)`", text):
        assert (pathlib.Path(cppo.__file__).parent / file).is_file(), file
    for quantity in re.findall(r"`trace\.(\w+)`", text):
        assert quantity in cppo.Trace.__dataclass_fields__, quantity
    functions = 0
    for line in text.splitlines():
        files = re.findall(r"`((?:ops|rules)/\w+\.py)`", line)
        sources = [(pathlib.Path(cppo.__file__).parent / file).read_text(encoding="utf-8") for file in files]
        for name in re.findall(r"`([a-z_]+)`", line) if sources else []:
            if name not in ("logp", "rollout_logp", "response_mask"):
                assert any(f"def {name}(" in source for source in sources), (name, files)
                functions += 1
    assert functions >= 7


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_blocks_of_the_page_on_top_k_run(one_process):
    torch.manual_seed(0)
    namespace = run("topk.md")
    assert namespace["now"].divergence.max() > 0.01


def test_the_blocks_of_the_page_on_ranks_run(one_process):
    torch.manual_seed(0)
    namespace = run("distributed.md")
    # Summed by hand: the parts' gradients are the whole batch's.
    batches = namespace["micro_batches"]
    whole = torch.zeros(16, requires_grad=True)
    together = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    cppo.policy_loss(cppo.CPPO(), together["rollout_logp"] + whole, **together).loss.backward()
    torch.testing.assert_close(namespace["parameters"].grad, whole.grad)
    alone = namespace["logp"].detach().requires_grad_()
    cppo.policy_loss(cppo.CPPO(), alone, **batches[0]).loss.backward()
    torch.testing.assert_close(namespace["logp"].grad, alone.grad)
