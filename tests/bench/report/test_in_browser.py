"""The page in a real Chromium: light, dark, on a phone; nothing is loaded, nothing overflows, axe finds nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, sync_playwright

from bench.report import page
from tests.bench.report.test_web import EVERY
from tests.frontend.conftest import CHROMIUM, QUIET

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize(("theme", "width"), [("light", 1100), ("dark", 400)])
def test_a_page_is_quiet_fits_and_can_be_read(
    chromium: Browser, tmp_path: Path, kind: str, theme: Literal["light", "dark"], width: int
) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(EVERY[kind]()), encoding="utf-8")
    # The page's own policy would keep axe's script out as well.
    context = chromium.new_context(color_scheme=theme, viewport={"width": width, "height": 800}, bypass_csp=True)
    tab = context.new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("request", lambda request: said.append(request.url))
    tab.goto(path.as_uri())
    assert said == [path.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert (
        tab.evaluate("getComputedStyle(document.body).backgroundColor")
        == {
            "light": "rgb(255, 255, 255)",
            "dark": "rgb(21, 23, 26)",
        }[theme]
    )
    found = Axe().run(tab)
    assert found.violations_count == 0, found.generate_report()
    context.close()
