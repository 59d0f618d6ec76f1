"""A document's numbers, counted again from the lines by hand."""

import io
import json
import statistics
from itertools import product

import numpy as np
import pytest
from rich.console import Console
from rows import CONTENT, SEARCH, line, lines, study

from cppo.compare.analysis import analyse
from cppo.compare.estimates import interval, mean
from cppo.compare.page import write_report
from cppo.compare.scores import collapsed
from cppo.compare.study import Rows
from cppo.compare.tables import all_tables, as_markdown, for_terminal, headlines, stability

pytestmark = pytest.mark.train
FINAL = {
    ("calm", "cppo"): [0.9, 0.8, 0.85, 0.95, 0.88, 0.82], ("calm", "grpo"): [0.8, 0.9, 0.7, 0.9, 0.75, 0.85],
    ("calm", "none"): [0.5, 0.6, 0.4, 0.1, 0.35, 0.2], ("wild", "cppo"): [0.7, 0.6, 0.65, 0.75, 0.68, 0.62],
    ("wild", "grpo"): [0.1, 0.65, 0.6, 0.7, 0.66, 0.64], ("wild", "none"): [0.1] * 6,
}  # fmt: skip


def accuracy(cell):
    return [0.25, 0.6, FINAL[cell.setting, cell.arm][cell.seed]]


@pytest.fixture(scope="module")
def document():
    plan = study()
    return analyse(plan, Rows(lines(plan.cells(), accuracy)), {}, {})


def test_scores_are_those_of_the_lines(document):
    for (setting, arm), values in FINAL.items():
        entry = document["settings"][setting]["arms"][arm]
        scores = entry["scores"]
        assert scores["final"]["values"] == values
        assert scores["final"]["mean"] == pytest.approx(statistics.fmean(values))
        assert scores["final"]["iqm"] == pytest.approx(statistics.fmean(sorted(values)[1:5]))
        assert scores["best"]["values"] == [max(0.6, value) for value in values]
        assert scores["area"]["values"] == pytest.approx([(0.6 + value) / 2 for value in values])
        assert entry["collapsed"] == sum(value < 0.5 * max(0.6, value) for value in values)
        assert entry["start"] == 0.25
        assert entry["stability"]["gap"] == pytest.approx(0.15)
        assert entry["stability"]["first_gap"] == pytest.approx(0.1)
        assert entry["stability"]["tail"] == pytest.approx(0.4)
        assert entry["stability"]["budget_share"] is None
    assert document["settings"]["wild"]["arms"]["none"]["collapsed"] == 6
    assert document["settings"]["wild"]["arms"]["grpo"]["collapsed"] == 1
    assert document["missing"] == 0
    assert document["runs"] == 36
    assert document["cpu_hours"] == pytest.approx(0.36)


def test_differences_are_paired_by_seed(document):
    against = document["settings"]["wild"]["arms"]["grpo"]["scores"]["final"]["reference_less_arm"]
    differences = [a - b for a, b in zip(FINAL["wild", "cppo"], FINAL["wild", "grpo"], strict=True)]
    assert against["mean"] == pytest.approx(statistics.fmean(differences))
    assert against["deviation"] == pytest.approx(statistics.stdev(differences))
    assert against["interval"] == pytest.approx(interval(np.array([differences]), mean))
    assert against["pairs"] == 6
    assert against["reference"] == "cppo"
    wins = sum((a > b) + 0.5 * (a == b) for a in FINAL["wild", "cppo"] for b in FINAL["wild", "grpo"])
    assert against["probability"] == pytest.approx(wins / 36)
    # Six seeds: the smallest p is 1/32; two arms are compared.
    assert document["settings"]["wild"]["arms"]["none"]["scores"]["final"]["reference_less_arm"]["p"] == 1 / 32
    assert document["settings"]["wild"]["arms"]["none"]["scores"]["final"]["reference_less_arm"]["p_holm"] == 1 / 16
    assert "reference_less_arm" not in document["settings"]["wild"]["arms"]["cppo"]["scores"]["final"]


def test_settings_weigh_the_same_overall(document):
    entry = document["overall"]["cppo"]["final"]
    assert entry["mean"] == pytest.approx((5.2 / 6 + 4 / 6) / 2)
    against = document["overall"]["grpo"]["final"]["reference_less_arm"]
    assert against["mean"] == pytest.approx((0.3 / 6 + 0.65 / 6) / 2)
    assert against["interval"][0] < against["mean"] < against["interval"][1]
    # Of each seed, the mean of both settings; by their best, where neither setting alone has the same p as both.
    differences = [0.1, -0.075, 0.1, 0.05, 0.075, -0.025]
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in product([1, -1], repeat=6)]
    p = sum(found >= 0.225 - 1e-9 for found in sums) / 64
    assert document["overall"]["grpo"]["best"]["reference_less_arm"]["p"] == pytest.approx(p)
    assert document["overall"]["none"]["final"]["reference_less_arm"]["p"] == 1 / 32
    assert document["overall"]["none"]["final"]["reference_less_arm"]["p_holm"] == 1 / 16
    assert document["overall"]["none"]["collapsed"] == 8
    assert document["overall"]["none"]["seeds"] == 6


def test_what_is_missing_is_left_out_and_said():
    plan = study()
    gone = [("wild", "cppo", 1), ("wild", "grpo", 3)]
    cells = {(cell.setting, cell.arm, cell.seed): cell for cell in plan.cells()}
    rows = lines([cell for name, cell in cells.items() if name not in gone], accuracy)
    document = analyse(plan, Rows(rows), {}, {cells["wild", "grpo", 3].key: "Traceback"})
    assert (document["missing"], document["failed"]) == (2, 1)
    assert document["settings"]["wild"]["without"] == {
        "cppo": {"failed": 0, "missing": 1}, "grpo": {"failed": 1, "missing": 0}
    }  # fmt: skip
    note = next(t.note for t in all_tables(document) if t.title.startswith("wild: final"))
    assert "cppo: 1 not run yet." in note
    assert "grpo: 1 failed." in note
    # Over all settings only the seeds count that are everywhere.
    assert document["overall"]["grpo"]["seeds"] == 4
    against = document["settings"]["wild"]["arms"]["grpo"]["scores"]["final"]["reference_less_arm"]
    assert against["pairs"] == 4  # seeds 0, 2, 4 and 5
    assert against["mean"] == pytest.approx(((0.7 - 0.1) + (0.65 - 0.6) + (0.68 - 0.66) + (0.62 - 0.64)) / 4)
    assert against["interval"] is against["seeds_needed"] is None
    assert document["settings"]["wild"]["arms"]["cppo"]["seeds"] == [0, 2, 3, 4, 5]


def test_one_seed_gives_numbers_without_intervals(tmp_path):
    plan = study(seeds={"first": 0, "count": 1})
    document = analyse(plan, Rows(lines(plan.cells(), accuracy)), {}, {})
    score = document["settings"]["calm"]["arms"]["grpo"]["scores"]["final"]
    assert score["mean_interval"] is None
    assert score["reference_less_arm"]["p"] is None
    assert score["reference_less_arm"]["interval"] is None
    assert "| grpo | 1 | 0.250 | 0.800 |" in as_markdown(all_tables(document))
    write_report(tmp_path / "report.html", document)
    assert "made up" in (tmp_path / "report.html").read_text()


def test_an_arm_that_was_searched_is_compared_with_the_searched_reference():
    plan = study(search=SEARCH)
    chosen = {
        setting: {"cppo": {"method": "cppo?delta_b=0.03", "factor": 0.5, "tried": []},
                  "grpo": {"method": "grpo", "factor": 1, "tried": []}}
        for setting in ("calm", "wild")
    }  # fmt: skip
    rows = [line(cell, [0.2, 0.95 if cell.arm == "cppo (searched)" else 0.5]) for cell in plan.cells(chosen)]
    found = analyse(plan, Rows(rows), chosen, {})["settings"]["calm"]["arms"]
    # The search left grpo as it was: the same runs, read twice.
    assert found["grpo (searched)"]["scores"]["final"]["values"] == found["grpo"]["scores"]["final"]["values"]
    against = found["grpo (searched)"]["scores"]["final"]["reference_less_arm"]
    assert (against["reference"], against["mean"]) == ("cppo (searched)", pytest.approx(0.45))
    assert found["grpo"]["scores"]["final"]["reference_less_arm"]["reference"] == "cppo"
    assert "reference_less_arm" not in found["cppo (searched)"]["scores"]["final"]
    assert found["cppo (searched)"]["learning_rate"] == 0.5e-4


def run(*accuracy, error=0.02):
    return {"accuracy": list(accuracy), "standard_error": [error] * len(accuracy)}


def test_a_run_that_ends_below_half_of_its_best_or_below_its_start_collapsed():
    assert not collapsed(run(0.2, 0.8, 0.4))
    assert collapsed(run(0.2, 0.8, 0.39))
    assert collapsed(run(0.19, 0.18, 0.1))  # it never learned, and lost what it had
    assert not collapsed(run(0.19, 0.18, 0.16))  # within two standard errors of where it began
    assert collapsed(run(0.0, 0.5, 0.1, error=None))


def test_curves_with_gaps_are_averaged_over_what_is_there():
    plan = study(seeds={"first": 0, "count": 2})
    rows = lines(plan.cells(), accuracy)
    for row in rows:
        row["curves"] = row["curves"] | {
            "budget_share": [0.4, None] if row["seed"] else [None, None],
            "gap": [0.1, None],
        }
        row["tail"] = [0.2, None]
    arm = analyse(plan, Rows(rows), {}, {})["settings"]["calm"]["arms"]["cppo"]
    assert arm["stability"]["budget_share"] == pytest.approx(0.4)
    assert arm["stability"]["gap"] == pytest.approx(0.1)
    assert arm["stability"]["tail"] == pytest.approx(0.2)
    assert arm["curve"]["curves"]["gap"] == [pytest.approx(0.1), None]
    assert arm["curve"]["curves"]["budget_share"] == [pytest.approx(0.4), None]


def test_drift_is_compared_by_seed_too():
    plan = study(seeds={"first": 0, "count": 8})
    rows = lines(plan.cells(), lambda cell: [0.25, 0.6, 0.5])
    drift = {
        "cppo": [0.1, 0.2, 0.3, 0.4, 0.1, 0.1, None, 0.3], "grpo": [0.2, 0.1, 0.5, 0.7, 0.3, 0.5, 0.9, 0.1],
        "none": [None] * 8,
    }  # fmt: skip
    for row in rows:
        row["diverged"] = row["arm"] == "grpo" and row["seed"] == 7  # it drifted less only because it ended
        row["curves"] = row["curves"] | {"gap": [drift[row["arm"]][row["seed"]], None]}
    setting = analyse(plan, Rows(rows), {}, {})["settings"]["calm"]
    found = setting["arms"]["grpo"]["stability"]["gap_reference_less_arm"]
    assert found["mean"] == pytest.approx((-0.1 + 0.1 - 0.2 - 0.3 - 0.2 - 0.4) / 6)
    assert (found["reference_lower"], found["pairs"]) == (5, 6)
    assert found["interval"][0] < found["mean"] < found["interval"][1]
    assert "gap_reference_less_arm" not in setting["arms"]["cppo"]["stability"]
    assert "gap_reference_less_arm" not in setting["arms"]["none"]["stability"]
    shown = stability("calm", setting)
    cells = [row[shown.headings.index("reference less arm: drift")] for row in shown.rows]
    assert cells[0] == cells[2] == "-"
    assert cells[1].startswith("-0.18 [")
    assert cells[1].endswith("], 5 of 6")
    assert "Runs that diverged, to a policy that is no numbers: grpo: 1." in shown.note


def test_lines_of_several_versions_are_said():
    plan = study()
    rows = lines(plan.cells(), accuracy)
    rows[0] = rows[0] | {"versions": {"cppo": "0.2.0"}}
    assert analyse(plan, Rows(rows), {}, {})["versions"] == ["cppo 0.1.0", "cppo 0.2.0"]


def test_seeds_whose_arms_began_apart_are_said(document):
    plan = study()
    rows = lines(plan.cells(), accuracy)
    for row in rows:
        if (row["setting"], row["arm"]) == ("wild", "none") and row["seed"] in (1, 3):
            row["accuracy"][0] = 0.24
    found = analyse(plan, Rows(rows), {}, {})
    assert {name: setting["unmatched"] for name, setting in found["settings"].items()} == {"calm": [], "wild": [1, 3]}
    said = "Not every arm began from the same warm start in seeds 1, 3"
    assert [said in table.note for table in headlines(found, "final")] == [False, True]
    assert [said in table.note for table in all_tables(found, "final")] == [False, False, True, False, False, False]
    assert said not in as_markdown(all_tables(document))


def test_a_setting_that_was_not_begun_leaves_the_others_and_is_named():
    plan = study(settings={**CONTENT["settings"], "later": {"rollouts": 5}})
    rows = lines([cell for cell in plan.cells() if cell.setting != "later"], accuracy)
    found = analyse(plan, Rows(rows), {}, {})
    assert found["not_begun"] == ["later"]
    assert found["overall"]["grpo"]["settings"] == 2
    table = next(table for table in all_tables(found) if table.title.startswith("All settings"))
    assert len(table.rows) == 3
    assert "Not begun, and not in it: later." in table.note


def test_a_p_is_adjusted_for_the_arms_that_have_not_run_too(document):
    plan = study(arms={**CONTENT["arms"], "more": "dppo", "most": "cispo"})
    rows = lines([cell for cell in plan.cells() if cell.arm in ("cppo", "none")], accuracy)
    found = analyse(plan, Rows(rows), {}, {})
    against = found["settings"]["wild"]["arms"]["none"]["scores"]["final"]["reference_less_arm"]
    assert (against["p"], against["p_holm"]) == (1 / 32, 4 / 32)
    assert found["overall"]["none"]["final"]["reference_less_arm"]["p_holm"] == 4 / 32
    fewer = document["settings"]["wild"]["arms"]["none"]["scores"]["final"]["reference_less_arm"]
    assert against["seeds_needed"]["0.02"] > fewer["seeds_needed"]["0.02"]


def test_small_p_values_are_no_zeros():
    plan = study(seeds={"first": 0, "count": 13}, settings={"calm": {}})
    rows = lines(plan.cells(), lambda cell: [0.2, 0.9 if cell.arm == "cppo" else 0.5 - 0.01 * cell.seed])
    [table] = headlines(analyse(plan, Rows(rows), {}, {}), "final")
    assert table.rows[1][table.headings.index("p")] == "<0.001"


def test_tables_show_the_documents_numbers(document):
    tables = {table.title: table for table in all_tables(document, "final")}
    table = tables["wild: final accuracy on held-out problems"]
    row = dict(zip(table.headings, next(row for row in table.rows if row[0] == "grpo"), strict=True))
    assert row["mean"].startswith("0.558 [")
    assert row["reference less arm"].startswith("+0.108 [")
    assert row["every seed, sorted"] == "0.10 0.60 0.64 0.65 0.66 0.70"
    assert tables["wild: stability"].rows[2][1] == "6 of 6"
    assert all(len(row) == len(table.headings) for table in tables.values() for row in table.rows)
    narrow = headlines(document, "final")
    assert [table.title for table in narrow] == ["calm: final accuracy", "wild: final accuracy"]
    assert all(len(row) == len(table.headings) for table in narrow for row in table.rows)


def test_names_that_are_markup_stand_in_every_table():
    names = {"a|b [/x]": "cppo", "*c* [red]": {"method": "grpo"}, "<img src=x>": "dppo"}
    plan = study(arms=names, reference="a|b [/x]")
    document = analyse(plan, Rows(lines(plan.cells(), lambda cell: [0.2, 0.5])), {}, {})
    tables = all_tables(document)
    rows = [row for row in as_markdown(tables).splitlines() if row.startswith(("| a\\|b [/x]", "| *c* [red]"))]
    widths = {len(table.headings) + 1 for table in tables}
    assert len(rows) >= 10
    assert "<img" not in as_markdown(tables)
    assert {row.replace("\\|", "").count("|") for row in rows} <= widths
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(for_terminal(headlines(document, "final")))
    text = console.export_text()
    assert "a|b [/x]" in text
    assert "*c* [red]" in text


def test_the_document_survives_json(document):
    text = json.dumps(document, allow_nan=False)
    assert json.dumps(json.loads(text)) == text
