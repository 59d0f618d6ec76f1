"""Make the pictures of docs/experiments.md from the studies' pages, with chromium and Playwright (the test extra).

``python studies/pictures.py [STUDY ..]``: docs/images/compare-STUDY.png from docs/studies/STUDY/report.html, which
``cppo compare docs/studies/STUDY --report-only`` makes.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

DOCS = Path(__file__).resolve().parent.parent / "docs"
# study -> the score, and of which setting ("" for the pictures of several) which pictures, two a row.
PICTURES = {
    "drift": ("final", [
        ("short drift", "Held-out accuracy"), ("short drift", "Every seed"),
        ("tail drift", "Held-out accuracy"), ("tail drift", "Every seed"),
        ("long drift", "Held-out accuracy"), ("long drift", "Every seed"),
    ]),
    "clip": ("final", [("tail drift", "Held-out accuracy"), ("tail drift", "Every seed")]),
    "learning_rate": ("final", [("", "Accuracy"), ("", "Drift")]),
    "holds": ("final", [
        ("short 1e-3", "Held-out accuracy"), ("short 1e-3", "Every seed"),
        ("long drift", "Held-out accuracy"), ("long drift", "Every seed"),
        ("noise 1", "Held-out accuracy"), ("noise 1", "Every seed"),
    ]),
    "staleness": ("area", [("", "Accuracy"), ("", "Drift")]),
    "passes": ("final", [("", "Accuracy"), ("", "Drift")]),
    "mismatch": ("final", [("", "Accuracy"), ("", "Masked")]),
    "mild": ("final", [
        ("short mild", "Held-out accuracy"), ("short mild", "Every seed"),
        ("tail mild", "Held-out accuracy"), ("tail mild", "Every seed"),
        ("long mild", "Held-out accuracy"), ("long mild", "Every seed"),
    ]),
    "search": ("final", [
        ("short drift", "Held-out accuracy"), ("short drift", "Every seed"),
        ("tail drift", "Held-out accuracy"), ("tail drift", "Every seed"),
        ("long drift", "Held-out accuracy"), ("long drift", "Every seed"),
    ]),
    "scale": ("final", [
        ("short, 1M", "Held-out accuracy"), ("short, 1M", "Every seed"),
        ("short, 1M, half the rate", "Held-out accuracy"), ("short, 1M, half the rate", "Every seed"),
        ("short, 1M, a quarter", "Held-out accuracy"), ("short, 1M, a quarter", "Every seed"),
        ("short, 5M", "Held-out accuracy"), ("short, 5M", "Every seed"),
        ("tail, 1M", "Held-out accuracy"), ("tail, 1M", "Every seed"),
    ]),
    "parts": ("final", [("short, 1M", "Every seed"), ("", "short, 1M: cppo less each arm")]),
    "ablations": ("area", [
        ("", "short drift: cppo less each arm"), ("", "tail drift: cppo less each arm"),
    ]),
}  # fmt: skip
GATHER = """wanted => {
  const box = document.createElement("div");
  box.className = "pictures";
  box.style.padding = "4px 8px";
  document.querySelector("main").prepend(box);
  for (const [setting, title] of wanted) {
    const found = [...document.querySelectorAll("figure")].filter((figure) => {
      const above = figure.parentElement.previousElementSibling;
      const group = above && above.matches("h3") && above.closest("#curves") ? above.textContent : "";
      return figure.querySelector("h4").textContent === title && group === setting;
    });
    if (found.length !== 1) throw new Error(`${setting} / ${title}: ${found.length} pictures`);
    if (setting) found[0].querySelector("h4").prepend(`${setting}: `);
    box.append(found[0]);
  }
  box.id = "gathered";
}"""


def main(studies: list[str]) -> None:
    """Make the pictures of these studies, or of all whose page is there."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for study in studies or PICTURES:
            report = DOCS / "studies" / study / "report.html"
            if not report.is_file():
                print(f"{report}: not there; `cppo compare {report.parent} --report-only` makes it")
                continue
            score, wanted = PICTURES[study]
            page = browser.new_page(viewport={"width": 1100, "height": 900})
            page.goto(report.as_uri())
            page.select_option("#kind", score)
            page.wait_for_timeout(1500)
            page.evaluate(GATHER, wanted)
            page.evaluate("renderAll()")  # a picture that stood alone was twice as wide
            page.wait_for_timeout(500)
            target = DOCS / "images" / f"compare-{study}.png"
            page.locator("#gathered").screenshot(path=target)
            print(target)
        browser.close()


if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - set(PICTURES):
        sys.exit(f"{', '.join(sorted(unknown))}: expected some of {', '.join(PICTURES)}")
    main(sys.argv[1:])
