"""The report page in a real Chromium, headless: what a reader sees, by mouse, by keyboard, on a phone, in print."""

import json
import re
import time

import pytest
from logs import make_rows, write_log
from page_documents import HOSTILE, SPECS, make_curve, make_document, make_example, make_hostile_document, make_run

from cppo.inspect.page import write_page
from cppo.inspect.runs import inspect_runs

pytestmark = pytest.mark.train

DESK = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 375, "height": 800}}


class Shelf:
    """Opens documents as pages, and notes every error, warning and request."""

    def __init__(self, browser, folder):
        self.browser, self.folder, self.contexts, self.complaints = browser, folder, [], []

    def __call__(self, document, training=None, **settings):
        path = self.folder / f"page-{len(self.contexts)}.html"
        write_page(path, document, training)
        self.contexts.append(self.browser.new_context(**(settings or DESK)))
        page = self.contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda r: self.complaints.append(r.url) if r.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    def close(self):
        for context in self.contexts:
            context.close()
        assert self.complaints == []


@pytest.fixture
def show(browser, tmp_path):
    shelf = Shelf(browser, tmp_path)
    yield shelf
    shelf.close()


@pytest.fixture(scope="module")
def desk(browser, tmp_path_factory):
    """One page for the tests that set all that they look at: loading takes a second or two."""
    shelf = Shelf(browser, tmp_path_factory.mktemp("desk"))
    yield shelf(make_document(), [make_curve()])
    shelf.close()


def until(true, seconds=10):
    """Wait; the page's policy does not let Playwright's own waiting evaluate texts."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def width(page, element):
    return page.locator(element).first.evaluate("e => e.getBoundingClientRect().width")


def cells(page, table):
    """Return the texts of a table's rows."""
    return page.locator(f"{table} tbody tr").evaluate_all("rows => rows.map(r => [...r.cells].map(c => c.textContent))")


def value(text):
    """Return the number that a cell shows; it has at most four digits, not 0.30000000000000004."""
    if text == "–":
        return None
    assert re.fullmatch(r"-?[\d,]+(\.\d+)?(e-?\d+)?%?", text), text
    assert len(re.sub(r"^-?0?\.?0*|e.*|\D", "", text)) <= 6, text
    return float(text.rstrip("%").replace(",", "")) * (0.01 if text.endswith("%") else 1)


def close(shown, true):
    # Shares have three digits, other numbers four.
    return shown is None if true is None else shown == pytest.approx(true, rel=6e-3, abs=6e-7)


def read_what_if(page):
    return {
        row[0].removesuffix("the run's own"): [value(text) for text in row[1:]] for row in cells(page, "#what-if-table")
    }


def expected_what_if(run):
    keys = (
        "masked", "by_token_threshold", "by_prefix_budget", "by_other_rule", "masked_positive", "masked_negative",
        "weight_left", "differs",
    )  # fmt: skip
    return {entry["spec"]: [entry[key] for key in keys] for entry in run["methods"]}


def states(page):
    return page.locator(".tokens .token").evaluate_all(
        "tokens => tokens.map(t => [...t.classList].find(c => c !== 'token'))"
    )


# ---------------------------------------------------------------- what it says


def test_numbers_on_screen_are_the_documents(desk):
    page, run = desk, make_run()
    shown = read_what_if(page)
    for spec, numbers in expected_what_if(run).items():
        assert all(close(a, b) for a, b in zip(shown[spec], numbers, strict=True)), (spec, shown[spec], numbers)
    assert cells(page, "#runs") == [["first", SPECS[0], "12", "64", "153,100", "measured"]]
    assert [row[1:] for row in cells(page, "#thresholds-table")] == [
        ["0.1089", "–", "–"], ["0.04837", "–", "2.00%"], ["0.15", "0.02", "3.02%"],
    ]  # fmt: skip
    assert [[value(text) for text in row[1:]] for row in cells(page, "#grids")] == [
        pytest.approx([0.2, 0.1, 0.0667], rel=6e-3), pytest.approx([0.1, 0.05, 0.0333], rel=6e-3),
    ]  # fmt: skip
    assert page.locator(".near").inner_text() == "3.33%"
    assert cells(page, "#learning-table") == [["first", "0.2754", "0.9082 ± 0.01277", "0.9082"]]
    assert "drpo: needs the rollout policy's entropy" in page.locator("#left-out").inner_text()


def test_findings_stand_first_and_say_their_numbers(desk):
    page = desk
    assert page.locator("main > section").first.get_attribute("id") == "findings"
    first = page.locator(".finding").first
    assert first.locator(".level").inner_text() == "Problem"
    assert first.locator("dl").inner_text().split("\n") == ["peak reward", "0.3", "last reward", "1.39e-7"]


def test_a_real_log_shows_what_summarise_found(show, tmp_path):
    rows = make_rows(3, steps=6, responses=16, divergence=True)
    document = inspect_runs([write_log(tmp_path / "run", rows)], own="cppo?delta=0.05&delta_b=0.01", responses=6)
    page = show(document)
    run = document["runs"][0]
    shown = read_what_if(page)
    for spec, numbers in expected_what_if(run).items():
        assert all(close(a, b) for a, b in zip(shown[spec], numbers, strict=True)), (spec, shown[spec], numbers)
    names = ["kept", "by-threshold", "by-budget", "by-other"]
    for place, example in enumerate(run["examples"]):
        page.select_option("#examples", str(place))
        for spec in (run["method"], "dppo", "grpo"):
            page.select_option("#response-method", spec)
            codes = zip(example["methods"][spec]["rejected_by"], example["response_mask"], strict=True)
            assert states(page) == [names[code] if own else "outside" for code, own in codes]


def test_runs_side_by_side_have_one_colour_each(show):
    page = show(make_document(make_run("first"), make_run("second")), [make_curve("second")])
    swatches = page.locator("#runs .swatch").evaluate_all("all => all.map(s => getComputedStyle(s).backgroundColor)")
    assert len(set(swatches)) == 2
    lines = page.locator("#by-update figure").nth(2).locator(".scatterlayer .js-line")
    assert lines.evaluate_all("all => all.map(l => getComputedStyle(l).stroke)") == swatches
    assert cells(page, "#learning-table")[0][0] == "second"
    learned = page.locator("#learning-pictures figure").first.locator(".js-line")
    assert learned.evaluate("l => getComputedStyle(l).stroke") == swatches[1]
    assert len(cells(page, "#what-if-table")) == 6


def test_the_tokens_rejected_most_are_the_documents(show):
    page = show(make_document(make_run()))
    assert cells(page, "#rejected-tokens") == [
        [" answer", "7", "12", "40", "30.0%"],
        ["id 9", "9", "4", "5", "80.0%"],
    ]  # fmt: skip


def test_a_response_that_is_shown_in_part_says_so(show):
    example = make_example()
    whole = len(example["token_ids"])
    page = show(make_document(make_run(examples=[example | {"length": 30_000}, example | {"length": whole}])))
    assert f"the first {whole} of 30,000 tokens" in page.locator("#shown").inner_text()
    page.select_option("#examples", "1")
    assert "the first" not in page.locator("#shown").inner_text()


# ---------------------------------------------------------------- what it does


def test_the_table_sorts_by_click_and_by_key_and_dashes_stay_last(desk):
    page, run = desk, make_run()

    def order():
        return [row[0].removesuffix("the run's own") for row in cells(page, "#what-if-table")]

    by_masked = sorted(run["methods"], key=lambda entry: entry["masked"])
    page.get_by_role("button", name="Masked", exact=True).click()
    assert order() == [entry["spec"] for entry in reversed(by_masked)]
    page.keyboard.press("Enter")
    assert order() == [entry["spec"] for entry in by_masked]
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    for expected in ([SPECS[1], SPECS[2], SPECS[0]], [SPECS[2], SPECS[1], SPECS[0]]):
        page.get_by_role("button", name="Of positive A", exact=True).click()
        assert order() == expected
    page.get_by_role("button", name="Method", exact=True).press("Space")
    assert order() == sorted(SPECS)


def test_switching_the_method_redraws_the_pictures(desk):
    page = desk
    masked = page.locator("#by-update figure").first
    own = masked.locator(".legend").inner_text()
    assert masked.locator(".js-line").count() == 2
    page.select_option("#method", "dppo")
    assert masked.locator(".legend").inner_text() == "dppo: masked"
    assert own != "dppo: masked"
    assert "no prefix budget" in page.locator("#by-update figure").nth(1).inner_text()
    positive = page.locator("#by-probability figure").first
    assert positive.locator(".legend").inner_text() == "dppo"
    assert "0, 12, 345, 6,789, 10,111, 50,000 tokens." in positive.inner_text()
    page.select_option("#method", "every method")
    assert masked.locator(".js-line").count() == 3
    assert positive.locator(".js-line").count() == 3
    page.select_option("#series", "chi_squared")
    assert page.locator("#other-series h4").inner_text() == "Chi-squared divergence"


def test_a_response_is_picked_its_method_switched_and_its_account_told(desk):
    page, example = desk, make_example(step=5)
    page.select_option("#examples", "1")
    page.select_option("#response-method", SPECS[0])
    assert "update\n5" in page.locator(".facts").inner_text()
    assert states(page) == ["kept", "by-threshold", "by-budget", "outside", "kept", "by-threshold"]
    kinds = page.locator(".tokens .token").evaluate_all("all => all.map(t => getComputedStyle(t).borderBottomStyle)")
    assert kinds[1:3] == ["solid", "dashed"]  # told apart without colour
    text = page.locator(".tokens").evaluate("view => view.textContent")
    assert text == "The answer⏎\nis· 4"
    rows = cells(page, ".statement")
    head = page.locator(".statement th[scope=col]").all_inner_texts()
    own = example["methods"][SPECS[0]]
    for title, key in (
        ("Spends, Z", "weighted_divergence"),
        ("May spend, c", "threshold"),
        ("Balance before, U", "prior_account"),
    ):
        column = [value(row[head.index(title)]) for row in rows]
        assert all(close(a, b) for a, b, m in zip(column, own[key], example["response_mask"], strict=True) if m)
        assert column[3] is None  # tool output has no account
    after = [value(row[head.index("Balance after")]) for row in rows]
    before = [value(row[head.index("Balance before, U")]) for row in rows]
    assert after[0] == before[1]
    assert after[1] == before[2]
    assert rows[1][-1] == "rejected: token threshold"
    assert page.locator("#shown .plot .barlayer .point").count() > 0
    page.select_option("#response-method", "grpo")
    assert states(page)[1:3] == ["by-other", "kept"]
    assert "Spends, Z" not in page.locator(".statement th[scope=col]").all_inner_texts()
    assert "2 of 5 masked" in page.locator("#examples option").first.inner_text()


def test_responses_are_filtered_by_text_and_update(desk):
    page = desk
    found = page.locator("#examples option")
    page.fill("#filter-text", "7*6")
    assert found.count() == 1
    assert "update 5" in found.first.inner_text()
    assert page.locator(".long").first.inner_text() == "7*6="
    page.fill("#filter-text", "")
    page.fill("#filter-step", "1")
    assert found.count() == 1
    page.fill("#filter-step", "9")
    assert page.locator("#found").inner_text() == "0 of 2"
    page.fill("#filter-step", "")
    assert found.count() == 2


def test_pointing_at_a_token_and_tapping_it_show_its_numbers(show):
    page = show(make_document(), **PHONE, has_touch=True)
    page.locator(".tokens .token").nth(1).tap()
    card = page.locator(".card").inner_text()
    assert "rejected: token threshold" in card
    assert "0.32" in card
    page.locator(".tokens .token").nth(2).hover()
    assert "rejected: prefix budget" in page.locator(".card").inner_text()


def test_keyboard_alone_reaches_the_tokens_and_moves_among_them(show):
    page = show(make_document())
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "document.activeElement.className + ' ' + getComputedStyle(document.activeElement).outlineWidth"
        )
        assert not focused.endswith(" 0px"), focused  # focus is always to be seen
        if focused.startswith("token "):
            break
    else:
        pytest.fail("Tab never reached the tokens")
    page.keyboard.press("ArrowRight")
    assert "rejected: token threshold" in page.locator(".card").inner_text()
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("token 2: answer"[:9])
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent") == " 4"
    page.keyboard.press("ArrowUp")  # the line break stands before "is"
    assert page.evaluate("document.activeElement.textContent") in ("The", " answer", "⏎\n")
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.textContent") == "The"
    assert page.locator("[role=option][tabindex='0']").count() == 1
    page.focus("#examples")
    page.keyboard.press("ArrowDown")
    assert "update\n5" in page.locator(".facts").inner_text()


# ---------------------------------------------------------------- hostile and outsized text


def test_nothing_of_a_hostile_document_runs(show):
    page = show(make_hostile_document())
    for choice in page.locator("#method option").evaluate_all("all => all.map(o => o.value)"):
        page.select_option("#method", choice)
    page.select_option("#method", index=0)
    page.locator("#by-update .nsewdrag").first.hover()
    # plotly shows the name as it is, instead of reading it as markup.
    until(lambda: "<b>beside</b>: masked" in page.locator("#by-update .hoverlayer").first.text_content())
    page.locator("#shown .nsewdrag").first.hover()
    assert page.locator("main img, main script, main b, svg a").count() == 0
    assert page.evaluate("window.ran") is None
    assert HOSTILE.split("<b>")[0] in page.locator(".tokens").inner_text()
    isolated = page.locator(".tokens .token, bdi").evaluate_all("all => all.map(e => getComputedStyle(e).unicodeBidi)")
    assert set(isolated) == {"isolate"}
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_the_policy_stops_a_script_that_got_in(show):
    page = show(make_document())
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s);"
        " const i = document.createElement('img'); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i); }"
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.ran") is None
    assert len([text for text in show.complaints if "Content Security Policy" in text]) == 2
    show.complaints.clear()


def test_a_token_of_a_megabyte_is_cut_on_screen_and_the_page_stays_usable(show):
    tokens = ["The", "x" * 1_000_000, "end"]
    page = show(make_document(make_run(examples=[make_example(tokens=tokens), make_example(step=5)])), **PHONE)
    assert page.locator(".tokens .token").nth(1).inner_text() == "x" * 200 + "... 999,800 more characters"
    assert page.evaluate("document.querySelector('main').textContent.length") < 50_000
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.select_option("#examples", "1")
    assert "update\n5" in page.locator(".facts").inner_text()


def test_a_long_response_is_shown_in_parts(show):
    page = show(make_document(make_run(examples=[make_example(tokens=[f" {n}" for n in range(2500)])])))
    assert page.locator(".tokens .token").count() == 1000
    page.get_by_role("button", name="Later tokens").click()
    page.get_by_role("button", name="Later tokens").click()
    assert page.locator(".tokens .token").count() == 500
    assert page.locator(".turner").inner_text().split(" tokens")[1].strip().startswith("2,001 to 2,500 of 2,500")
    assert page.locator(".card dd").first.inner_text() == "2,001"
    assert page.get_by_role("button", name="Later tokens").is_disabled()


def test_without_a_tokenizer_the_tokens_are_their_ids(show):
    example = make_example() | {"tokens": None, "prompt": None}
    page = show(make_document(make_run(examples=[example])))
    assert page.locator(".tokens").inner_text() == "100 101 102 103 104 105"
    assert "The answer" in page.locator("#shown").inner_text()


def test_a_log_without_anything_to_show_says_so(show):
    run = make_run(examples=[]) | {"findings": [], "left_out": {}}
    run["suggestion"]["grid"]["masked"] = []
    run["positions"]["allowance"] = None
    page = show(make_document(run))
    assert "Learning" not in page.locator("nav").inner_text()
    assert "Nothing stands out" in page.locator("#findings").inner_text()
    assert "no responses to show" in page.locator("#response").inner_text()
    assert "No tokens to try" in page.locator("#grids").inner_text()


def test_weights_that_are_shuffled_are_said_and_not_drawn(show):
    run = make_run()
    drawn = show(make_document(run)).locator("#by-position figure").first
    assert "allowed" in drawn.locator(".legend").inner_text()
    assert not drawn.locator(".note").is_visible()
    run["positions"] |= {"allowance": None, "allowance_note": "Shuffled: between 0.1 and 0.2."}
    said = show(make_document(run, make_run("second"))).locator("#by-position figure").first
    assert said.locator(".legend").inner_text().count("allowed") == 1
    assert said.locator(".note").inner_text() == "first: Shuffled: between 0.1 and 0.2."


# ---------------------------------------------------------------- where it is read


def lightness(page, element="body", part="backgroundColor"):
    colour = page.evaluate(f"getComputedStyle(document.querySelector('{element}')).{part}")
    return sum(int(number) for number in re.findall(r"\d+", colour)[:3]) / 765


def test_dark_and_light_follow_the_reader_pictures_too(show):
    page = show(make_document(), color_scheme="dark", **DESK)
    tick = "#by-update .xtick text"
    assert lightness(page) < 0.2
    assert lightness(page, tick, "fill") > 0.8
    page.emulate_media(color_scheme="light")
    until(lambda: lightness(page, tick, "fill") < 0.2)
    assert lightness(page) > 0.95


def test_a_phone_scrolls_tables_inside_themselves_and_nothing_else(show):
    page = show(make_document(make_run("first"), make_run("n" * 90)), [make_curve()], **PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    cut = page.evaluate(
        "[...document.querySelectorAll('main *, header *')].filter(e => e.getBoundingClientRect().right > 376"
        " && !e.closest('.scroll') && !e.closest('svg')).map(e => e.outerHTML.slice(0, 80))"
    )
    assert cut == []
    widths = page.locator(".plot .main-svg").evaluate_all("all => all.map(s => s.getBoundingClientRect().right)")
    assert widths
    assert max(widths) <= 376
    wide = page.locator("#what-if-table")
    assert wide.evaluate("e => e.scrollWidth > e.clientWidth")


def test_print_shows_everything_light_and_without_controls(show, tmp_path):
    example = make_example(tokens=[f" {n}" for n in range(300)])
    page = show(make_document(make_run(examples=[example])), color_scheme="dark", **DESK)
    page.emulate_media(media="print")
    assert lightness(page) > 0.95
    assert page.locator("select:visible, input:visible, nav:visible").count() == 0
    for part in (".tokens", ".statement", ".long"):
        assert page.locator(part).first.evaluate("e => e.scrollHeight <= e.clientHeight + 1"), part
    until(lambda: width(page, "#other-series .main-svg") <= 700)
    assert lightness(page, "#by-update .xtick text", "fill") < 0.3
    pages = page.pdf(path=tmp_path / "page.pdf", format="A4")
    assert pages.startswith(b"%PDF")
    page.emulate_media(media="screen")
    until(lambda: width(page, "#other-series .main-svg") > 700)


def test_motion_only_for_those_who_want_it(show):
    page = show(make_document(), reduced_motion="reduce", **DESK)
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    assert json.loads(page.locator("#data").text_content())["format"] == 1
