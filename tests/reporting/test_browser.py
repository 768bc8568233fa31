"""The pages in a real browser: nothing fetched, nothing logged, readable at a phone's and a desk's width, accessible.

Screenshots go to ``$FISTAPRUNER_SCREENSHOTS``, by default ``build/screenshots``. Where ``$FISTAPRUNER_AXE`` names the
file ``axe.min.js`` of the npm package ``axe-core``, its rules are checked too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import samples
from browser import Browser, find_chromium, open_browser

from fistapruner.reporting.comparison import comparison_page
from fistapruner.reporting.page import run_page

pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")

HERE = Path(__file__).parent
SCREENSHOTS = Path(os.environ.get("FISTAPRUNER_SCREENSHOTS", "build/screenshots"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    texts = {
        "report": run_page(samples.report()),
        "recovery": run_page(samples.recovery(tasks=True)),
        "compare": comparison_page(samples.comparison()),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, "utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium, or set FISTAPRUNER_CHROMIUM)")
    with open_browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", ["report", "recovery", "compare"])
def test_page(browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    browser.open(pages[name], width, scheme)
    assert browser.console == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate((HERE / "accessibility.js").read_text()) == []
    axe = os.environ.get("FISTAPRUNER_AXE")
    if axe:
        browser.evaluate(Path(axe).read_text() + ";0")
        violations = browser.evaluate(
            "axe.run().then(r => r.violations.map(v => v.id + ': ' + v.nodes.map(n => n.target).join(' ')))"
        )
        assert violations == []
    browser.screenshot(SCREENSHOTS / f"{name}-{width}-{scheme}.png")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report", "recovery", "compare"])
def test_type_in_figures_is_readable_on_a_phone(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name], 400, "light")
    smallest = browser.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].map(t => parseFloat(getComputedStyle(t).fontSize) * "
        "t.ownerSVGElement.getBoundingClientRect().width / t.ownerSVGElement.viewBox.baseVal.width))"
    )
    assert smallest > 9


@pytest.mark.slow
def test_print_is_light_and_complete(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], 1000, "dark")
    browser.call(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("getComputedStyle(document.body).color") == "rgb(22, 32, 43)"
    browser.call("Emulation.setEmulatedMedia", media="screen")
