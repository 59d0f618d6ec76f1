"""The comparison's page in a real Chromium: its numbers, its choices, and names that are markup."""

import pytest
from rows import SEARCH, lines, study

from cppo.compare.analysis import analyse
from cppo.compare.page import write_report
from cppo.compare.study import Rows

pytestmark = pytest.mark.train


@pytest.fixture
def show(browser, tmp_path):
    complaints, contexts = [], []

    def opened(document, **settings):
        path = tmp_path / f"report-{len(contexts)}.html"
        write_report(path, document)
        contexts.append(browser.new_context(viewport={"width": 1200, "height": 900}, **settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: complaints.append(r.url) if r.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def accuracy(cell):
    lead = cell.arm == "cppo"
    return [0.25, 0.5 + 0.1 * lead + 0.02 * cell.seed, 0.6 + 0.2 * lead + 0.012 * cell.seed]


def cells_of(page, title):
    """The rows of the table under a heading, as lists of text."""
    heading = page.get_by_role("heading", name=title, exact=True)
    table = heading.locator("xpath=following-sibling::div[1]").locator("table")
    return [row.locator("th, td").all_inner_texts() for row in table.locator("tbody tr").all()]


def test_the_page_shows_the_documents_numbers_and_follows_the_choice_of_score(show):
    plan = study()
    page = show(analyse(plan, Rows(lines(plan.cells(), accuracy)), {}, {}))
    assert page.locator("h1").inner_text() == "made up"
    assert page.locator("#about").inner_text().startswith("36 runs, 0.36 CPU hours. Reference: cppo.")
    rows = cells_of(page, "calm: final accuracy on held-out problems")
    assert [row[0] for row in rows] == ["cppo", "grpo", "none"]
    assert rows[0][3].startswith("0.830 [")
    assert rows[1][7].startswith("+0.200 [")
    page.select_option("#kind", "best")
    assert cells_of(page, "calm: best accuracy on held-out problems")[0][3].startswith("0.830 [")
    page.select_option("#kind", "area")
    # (0.6 + 0.02 s + 0.8 + 0.012 s) / 2 over the seeds 0 to 5
    assert cells_of(page, "calm: area accuracy on held-out problems")[0][3].startswith("0.740 [")
    # A picture of differences a setting, and eight a setting below.
    assert page.locator(".plot").count() == 2 + 2 * 8
    assert page.locator("#axis").is_hidden()


def test_arms_after_a_search_can_be_looked_at_alone(show):
    plan = study(search=SEARCH)
    choice = {
        "cppo": {"method": "cppo?delta_b=0.03", "factor": 0.5, "tried": []},
        "grpo": {"method": "grpo", "factor": 1, "tried": []},
    }
    chosen = dict.fromkeys(plan.settings, choice)
    page = show(analyse(plan, Rows(lines(plan.cells(chosen), lambda cell: [0.2, 0.5])), chosen, {}))
    legend = page.locator("#curves .legend").first
    assert legend.locator("li").all_inner_texts() == ["cppo", "grpo", "none", "cppo (searched)", "grpo (searched)"]
    title = page.locator("#differences h4").first
    assert title.inner_text() == "calm: cppo or cppo (searched) less each arm"
    page.get_by_role("button", name="after the search").click()
    assert title.inner_text() == "calm: cppo (searched) less each arm"
    assert legend.locator("li").all_inner_texts() == ["cppo (searched)", "grpo (searched)"]
    page.get_by_role("button", name="as given").click()
    assert legend.locator("li").all_inner_texts() == ["cppo", "grpo", "none"]
    page.get_by_label("grpo", exact=True).uncheck()
    assert legend.locator("li").all_inner_texts() == ["cppo", "none"]
    page.get_by_role("button", name="all", exact=True).click()
    assert legend.locator("li").count() == 5


def drawn_lines(page):
    """Of the first learning curves: colour and dash of each line, and how many bands there are."""
    plot = page.locator("#curves .plot").first
    return plot.evaluate(
        "plot => ({lines: Object.fromEntries(plot.data.filter(t => t.fill !== 'toself')"
        ".map(t => [t.name, t.line.color + ' ' + t.line.dash])),"
        " bands: plot.data.filter(t => t.fill === 'toself').length})"
    )


def test_a_method_keeps_its_colour_from_study_to_study(show):
    shown = []
    for arms in (
        {"cppo": "cppo", "kl": "cppo?divergence=binary_kl", "dppo": "dppo", "none": "policy_gradient"},
        {"none": "policy_gradient", "ours": "cppo?ratio_cap=1", "max": "trm_max", "avg": "trm_avg", "dppo": "dppo"},
    ):
        plan = study(arms=arms, reference=next(iter(arms)))
        shown.append(drawn_lines(show(analyse(plan, Rows(lines(plan.cells(), lambda c: [0.2, 0.5])), {}, {})))["lines"])
    one, two = shown
    assert one["cppo"] == two["ours"]
    assert one["kl"] == one["cppo"].replace("solid", "dash")
    assert two["avg"] == two["max"].replace("solid", "dash")
    assert (one["dppo"], one["none"]) == (two["dppo"], two["none"])
    assert len({*one.values(), *two.values()}) == 6


def test_many_arms_of_one_method_have_a_colour_each_and_no_bands(show):
    arms = {f"b {n}": f"cppo?delta_b=0.0{n}" for n in range(1, 10)}
    plan = study(arms=arms, reference="b 1")
    found = lines(plan.cells(), lambda c: [0.2, 0.5 + 0.01 * c.seed])
    page = show(analyse(plan, Rows(found), {}, {}))
    drawn = drawn_lines(page)
    assert len(set(drawn["lines"].values())) == 9
    assert drawn["bands"] == 0
    for name in ("b 7", "b 8", "b 9"):
        assert drawn_lines(page)["bands"] == 0
        page.get_by_label(name, exact=True).uncheck()
    assert drawn_lines(page)["bands"] == 6


def test_differences_stand_on_one_axis(show):
    plan = study()
    page = show(analyse(plan, Rows(lines(plan.cells(), lambda c: [0.2, (0.9 if c.arm == "cppo" else 0.5)])), {}, {}))
    ranges = page.locator("#differences .plot").evaluate_all("plots => plots.map(p => p._fullLayout.xaxis.range)")
    assert ranges[0] == ranges[1]
    assert page.locator("#differences h4").first.inner_text() == "calm: cppo less each arm"


def test_settings_on_an_axis_are_drawn_along_it(show):
    settings = {"few": {"at": 2, "learning_rate": 1e-4}, "many": {"at": 8, "learning_rate": 1e-3}}
    plan = study(axis="updates a rollout", settings=settings)
    found = lines(plan.cells(), lambda cell: [x + 0.05 * (cell.setting == "many") for x in accuracy(cell)])
    document = analyse(plan, Rows(found), {}, {})
    page = show(document)
    assert page.locator("#axis-title").inner_text() == "Along updates a rollout"
    drawn = page.locator("#axis .plot").evaluate_all(
        "plots => plots.map(plot => ({type: plot._fullLayout.xaxis.type, ticks: plot._fullLayout.xaxis.tickvals,"
        " bands: plot._fullData.filter(t => t.fill === 'toself').map(t => [t.x, t.y]),"
        " lines: plot._fullData.filter(t => t.fill !== 'toself').map(t => t.x)}))"
    )
    assert [(one["type"], one["ticks"], len(one["bands"])) for one in drawn] == [
        ("log", [2, 8], 3), ("log", [2, 8], 0), ("log", [2, 8], 0),
    ]  # fmt: skip
    assert [one["lines"] for one in drawn] == [[[2, 8]] * 3] * 3
    few, many = (document["settings"][name]["arms"]["cppo"]["scores"]["final"]["mean_interval"] for name in settings)
    assert drawn[0]["bands"][0] == [[2, 8, 8, 2], pytest.approx([few[1], many[1], many[0], few[0]])]


def test_places_whose_labels_would_touch_stand_evenly(show):
    settings = {str(at): {"at": at, "sampler_noise": at} for at in (1, 0.05, 0, 0.2)}
    plan = study(axis="noise", settings=settings)
    page = show(analyse(plan, Rows(lines(plan.cells(), accuracy)), {}, {}))
    axis = page.locator("#axis .plot").first.evaluate(
        "p => [p._fullLayout.xaxis.tickvals, p._fullLayout.xaxis.ticktext]"
    )
    assert axis == [[0, 1, 2, 3], ["0", "0.05", "0.2", "1"]]
    drawn = page.locator("#axis .plot").first.evaluate("p => p._fullData.filter(t => t.fill !== 'toself')[0].x")
    assert drawn == [0, 1, 2, 3]


def test_an_axis_from_nothing_is_linear(show):
    settings = {"none": {"at": 0}, "much": {"at": 8, "learning_rate": 1e-3}}
    plan = study(axis="noise", settings=settings)
    page = show(analyse(plan, Rows(lines(plan.cells(), accuracy)), {}, {}))
    assert page.locator("#axis .plot").first.evaluate("plot => plot._fullLayout.xaxis.type") == "linear"


def rows_of(page, picture):
    return page.locator(picture).first.evaluate(
        "p => ({labels: p._fullLayout.yaxis.ticktext, rows: p._fullData.filter(t => t.marker.symbol === 'diamond' "
        "|| t.error_x.visible).map(t => t.y[0])})"
    )


def test_arms_keep_their_order_and_their_rows_whatever_they_are_called(show):
    long = "cppo?" + "delta_b=0.001&" * 5
    arms = {"10": "cppo", "2": "dppo", "constructor": "grpo", long + "a": "cispo", long + "b": "minpro"}
    plan = study(arms=arms, reference="10")
    gone = ("calm", "constructor")
    found = lines([cell for cell in plan.cells() if (cell.setting, cell.arm) != gone], lambda cell: [0.2, 0.5])
    page = show(analyse(plan, Rows(found), {}, {}))
    shown = rows_of(page, "#differences .plot")
    assert shown["rows"] == [0, 1, 2]
    assert shown["labels"][0] == "2"
    assert shown["labels"][1] == shown["labels"][2]  # both are cut
    seeds = rows_of(page, "#curves figure:has(h4:text-is('Every seed')) .plot")
    assert (seeds["rows"], seeds["labels"][:2]) == ([0, 1, 2, 3], ["10", "2"])
    assert page.locator("#curves .legend").first.locator("li").all_inner_texts()[:2] == ["10", "2"]


def test_names_that_are_markup_are_text(show):
    name = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
    settings = {"calm": {"at": 1}, "wild": {"at": 2, "epochs": 3}}
    axis = "<a href='https://example.org'>noise</a>"
    plan = study(title=name, arms={name: "cppo", "grpo": "grpo"}, reference=name, settings=settings, axis=axis)
    page = show(analyse(plan, Rows(lines(plan.cells(), lambda cell: [0.2, 0.5])), {}, {}))
    assert page.locator("h1").inner_text() == name
    assert page.title() == name
    assert cells_of(page, "calm: final accuracy on held-out problems")[0][0] == name
    assert page.locator("img").count() == 0
    assert page.locator("a").count() == page.locator("svg a").count() == 0
    assert axis in page.locator("#axis .plot").first.text_content()


@pytest.mark.parametrize("settings", [{"color_scheme": "dark"}, {"is_mobile": True, "has_touch": True}])
def test_the_page_opens_in_the_dark_and_on_a_phone(show, settings):
    plan = study()
    page = show(analyse(plan, Rows(lines(plan.cells(), accuracy)), {}, {}), **settings)
    assert page.locator("#curves svg.main-svg").count() > 0
