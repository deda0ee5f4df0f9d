"""The page in a real Chromium: light, dark, on a phone; nothing is loaded, nothing overflows, axe finds nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Playwright

from tests.bench.test_report import EVERY, report
from tests.frontend.conftest import CHROMIUM, QUIET
from train.evaluate import Judged, Report

pytestmark = pytest.mark.browser


def html(kind: str) -> str:
    if kind != "evaluate":
        return report(EVERY[kind]).html()
    labels = tuple(f"a label of words, number {i}" for i in range(9))
    judged = [Judged(Path(f"{label}.jpg"), label, ((labels[0], 0.9),), 200) for label in labels]
    return Report("data", labels, (*judged, Judged(Path("x"), labels[1], (), 415, "none"))).page("x").html()


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 390)])
def test_every_page_is_quiet_fits_and_can_be_read(
    player: Playwright, tmp_path: Path, theme: Literal["light", "dark"], width: int
) -> None:
    path, ink = tmp_path / "report.html", {"light": "rgb(26, 29, 33)", "dark": "rgb(231, 233, 236)"}[theme]
    said: list[str] = []
    with player.chromium.launch(executable_path=CHROMIUM, args=list(QUIET)) as browser:
        for kind in (*EVERY, "evaluate"):
            path.write_text(html(kind), encoding="utf-8")
            # The page's own policy would keep axe's script out as well.
            tab = browser.new_page(color_scheme=theme, viewport={"width": width, "height": 800}, bypass_csp=True)
            tab.on("console", lambda message: said.append(message.text))
            tab.on("request", lambda request: said.append(request.url))
            tab.goto(path.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, kind
            assert tab.evaluate("getComputedStyle(document.querySelector('.chart .fill-ink')).fill") == ink
            found = Axe().run(tab)
            assert found.violations_count == 0, (kind, found.generate_report())
            tab.close()
    assert set(said) == {path.as_uri()}
