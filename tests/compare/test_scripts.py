"""The scripts of studies/ that count across lines: by hand on made-up ones."""

import json

import numpy as np
import pytest
from rows import CONTENT, line, study
from scripts import load_script

from cppo.compare.results import ResultFolder

pytestmark = pytest.mark.train


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "study.yaml").write_text(json.dumps(CONTENT))
    return ResultFolder(tmp_path)


def test_a_seed_is_scored_where_the_others_do_best():
    scores = np.array([[0.9, 0.5, 0.5, 0.5], [0.1, 0.6, 0.6, 0.6]])
    values, chosen = load_script("studies/own_rate.py").at_its_best(scores)
    # Without seed 0 the second setting is better, without one of the others the first: 1.9 against 1.3.
    assert chosen == [1, 0, 0, 0]
    assert values.tolist() == [0.1, 0.5, 0.5, 0.5]


def test_own_rate_prints_differences_of_what_was_chosen(folder, capsys):
    # A line of the same names that the study does not mean any more.
    [other, *_] = study(arms={"cppo": "cppo?delta=0.3"}).cells()
    folder.append(line(other, [0.2, 0.0]))
    for cell in study().cells():
        folder.append(line(cell, [0.2, 0.7 if (cell.arm == "cppo") == (cell.setting == "calm") else 0.4]))
    load_script("studies/own_rate.py").main(str(folder.path), "cppo", "calm", "wild")
    printed = capsys.readouterr().out
    assert "| cppo | 0.700 | - | calm: 6 | calm | 0.700 | - |" in printed
    assert "| grpo | 0.700 | +0.000 [+0.000, +0.000] | wild: 6 | wild | 0.700 | +0.000 [+0.000, +0.000] |" in printed


def test_own_rate_says_too_little_of_settings_that_are_level_and_the_other_column_does_not(folder, capsys):
    for cell in study().cells():
        good = (cell.seed % 2 == 0) == (cell.setting == "calm")  # each seed does better in a setting of its own
        folder.append(line(cell, [0.2, 0.9 if good else 0.5 + 0.1 * (cell.setting == "wild")]))
    load_script("studies/own_rate.py").main(str(folder.path), "cppo", "calm", "wild")
    assert "| none | 0.550 | +0.000 [+0.000, +0.000] | wild: 3, calm: 3 | wild | 0.750 | " in capsys.readouterr().out


def test_own_rate_refuses_a_study_that_lacks_a_run(folder):
    for cell in study().cells()[:-1]:
        folder.append(line(cell, [0.2, 0.7]))
    with pytest.raises(SystemExit, match=r"not there: \[\('none', 'wild', 5\)\]"):
        load_script("studies/own_rate.py").main(str(folder.path), "cppo", "calm", "wild")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("other", "calm", "wild"), "other: expected one of cppo, grpo, none"),
        (("cppo", "calm", "odd"), "odd: expected one of calm, wild"),
    ],
)
def test_own_rate_refuses_what_is_not_there(folder, arguments, message):
    for cell in study().cells():
        folder.append(line(cell, [0.2, 0.7]))
    with pytest.raises(SystemExit, match=message):
        load_script("studies/own_rate.py").main(str(folder.path), *arguments)


def test_repeats_pairs_lines_of_one_run_with_other_numbers(tmp_path, capsys, monkeypatch):
    module = load_script("studies/repeats.py")
    monkeypatch.setattr(module, "STUDIES", tmp_path)
    cells = [cell for cell in study(seeds={"first": 0, "count": 6}).cells() if cell.setting == "calm"]
    for name, shift in (("one", 0.0), ("two", 0.1), ("three", 0.1)):  # the last repeats the second to the last digit
        (tmp_path / name).mkdir()
        for cell in cells:
            ResultFolder(tmp_path / name).append(
                line(cell, [0.2, 0.5 + 0.05 * cell.seed + shift * (cell.arm == "cppo")])
            )
    module.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == ["| cppo | running_sum, tiny, 4 epochs, noise 0.0 | 0.0001 | 6 | 0.000, +1.00 | 0.000, +1.00 |"]
