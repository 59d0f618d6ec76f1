"""verl's training worker on one rank and two: padded, packed, dynamic micro-batches give the closed form's gradient."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from cpu_verl import write_model
from engine_update import LAYOUTS, closed_form
from test_adapter import SOURCE

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine") / "model"
    write_model(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_layout_gives_the_closed_forms_gradient(model, tmp_path, ranks):
    environment = {
        "PYTHONPATH": f"{SOURCE}:{HERE}", "VERL_USE_EXTERNAL_MODULES": "cpu_verl,cppo.adapters.verl",
        "VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
         str(HERE / "engine_update.py"), str(model), str(tmp_path / "answer.pt")],
        env=os.environ | environment, cwd=tmp_path, text=True, check=False, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    found = torch.load(tmp_path / "answer.pt", weights_only=False)
    expected, metrics = closed_form(model)
    assert 0.1 < metrics["gate/masked_fraction"] < 0.9
    assert metrics["gate/budget_share"] > 0
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert list(found) == list(LAYOUTS)
    for layout, (gradients, _) in found.items():
        assert gradients.keys() == expected.keys(), layout
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).abs().max() <= 1e-5 * largest, (layout, name)
