"""The page for everybody: by keyboard alone, on a phone, in the dark, and as axe judges it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.conftest import GREEN, RED
from tests.frontend.conftest import Open, Visit, payload

pytestmark = pytest.mark.browser
PHONE = {"width": 360, "height": 740}
DESK = {"width": 1280, "height": 900}


def axe(page: Page) -> list[str]:
    """Return the violations that axe finds; its source passes the page's policy through the debugger."""
    found = importlib.util.find_spec("axe_playwright_python")
    assert found is not None
    assert found.origin is not None
    page.evaluate((Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8"))
    answer: dict[str, Any] = page.evaluate("axe.run()")
    return [f"{one['id']}: {node['html']}" for one in answer["violations"] for node in one["nodes"]]


def scrolls_sideways(page: Page) -> bool:
    """Whether anything is wider than the window."""
    return bool(page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


def fill(seen: Visit) -> None:
    """Bring in two more pictures, one with a long name, and a broken one."""
    before = seen.page.locator("#grid li").count()
    seen.pick(payload("red.png", RED), payload(f"{'long' * 30}.png", GREEN), payload("hello.txt", b"hello"))
    seen.wait_done(before + 3)
    seen.card("hello.txt").locator(".card").click()


@pytest.mark.parametrize(("scheme", "size"), [("light", DESK), ("dark", PHONE)])
def test_axe_finds_nothing(visit: Open, scheme: str, size: dict[str, int]) -> None:
    seen = visit(allowed=["415"], color_scheme=scheme, viewport=size)
    background, ink = (colour(seen.page, name) for name in ("backgroundColor", "color"))
    assert background > 600 > 200 > ink if scheme == "light" else background < 200 < 600 < ink
    assert axe(seen.page) == []
    fill(seen)
    assert axe(seen.page) == []
    assert not scrolls_sideways(seen.page)
    seen.page.get_by_role("button", name="Use the camera").click()
    expect(seen.page.locator("#shutter")).to_be_enabled()
    assert axe(seen.page) == []
    assert not scrolls_sideways(seen.page)


def colour(page: Page, name: str) -> int:
    """Return the sum of red, green and blue of a style of the page."""
    of = "name => getComputedStyle(document.documentElement)[name].match(/\\d+/g).slice(0, 3).map(Number)"
    return sum(page.evaluate(of, name))


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_nothing_moves_where_motion_is_reduced(visit: Open, motion: str) -> None:
    moves = motion == "no-preference"
    seen = visit(allowed=["503"], ready=False, reduced_motion=motion)
    page = seen.page
    # A fake of a server that starts; meanwhile the line in the header moves.
    page.route("**/ping", lambda route: route.fulfill(status=503, json={"status": "Unhealthy", "reason": "starting"}))
    page.goto(seen.site)
    expect(page.locator(".top")).to_have_attribute("data-state", "starting")
    running = page.evaluate("document.getAnimations().filter((one) => one.playState === 'running').length")
    assert (running > 0) == moves
    page.evaluate(
        """() => {
          window.scrolled = [];
          Element.prototype.scrollIntoView = (options) => window.scrolled.push(options.behavior);
        }"""
    )
    seen.pick(payload("red.png", RED))
    expect(page.locator("#results")).to_be_visible()
    assert page.evaluate("window.scrolled") == ["smooth" if moves else "auto"]


def test_forced_colours(visit: Open) -> None:
    seen = visit(forced_colors="active")
    seen.pick(payload("red.png", RED), payload("green.png", GREEN))
    seen.wait_done(2)
    # The colours of the time bar have a meaning, so they stay.
    colours = "[...document.querySelectorAll('#detail-bar span')].map((one) => getComputedStyle(one).backgroundColor)"
    shown = seen.page.evaluate(colours)
    assert len(set(shown)) == len(shown)
    assert axe(seen.page) == []


def tab_to(page: Page, selector: str, key: str = "Tab") -> None:
    """Press Tab until the focus is there, and check that the focus is visible."""
    for _ in range(60):
        page.keyboard.press(key)
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", selector
            return
    raise AssertionError(f"the Tab key never came to {selector}")


def test_keyboard_alone(visit: Open) -> None:
    seen = visit(allowed=["415"])
    page, keys = seen.page, seen.page.keyboard
    keys.press("Tab")
    expect(page.get_by_role("link", name="Skip to the pictures")).to_be_focused()
    keys.press("Enter")
    expect(page.locator("#intake")).to_be_focused()
    tab_to(page, "#pick")
    with page.expect_file_chooser() as chooser:
        keys.press("Enter")
    chooser.value.set_files([payload("red.png", RED), payload("green.png", GREEN), payload("hello.txt", b"hello")])
    seen.wait_done(3)
    tab_to(page, "#shoot")
    keys.press("Enter")
    expect(page.locator("#shutter")).to_be_enabled()
    keys.press("Escape")
    expect(page.locator("#camera")).to_be_hidden()
    expect(page.locator("#shoot")).to_be_focused()
    tab_to(page, ".sample")
    keys.press("Enter")
    seen.wait_done(4)
    tab_to(page, "#grid .card")
    tab_to(page, "#grid .card")
    keys.press("Enter")
    expect(page.locator("#detail-name")).to_have_text("green.png")
    expect(page.locator("#grid [aria-current]")).to_be_focused()
    keys.press("Delete")
    expect(page.locator("#grid li")).to_have_count(3)
    expect(seen.card("hello.txt").locator(".card")).to_be_focused()
    tab_to(page, "#tab-curl")
    keys.press("ArrowRight")
    expect(page.locator("#tab-python")).to_be_focused()
    expect(page.locator("#snippet")).to_contain_text("import requests")
    keys.press("End")
    expect(page.locator("#snippet")).to_contain_text("node:fs/promises")
    tab_to(page, "#copy")
    keys.press("Enter")
    expect(page.locator("#announcer")).to_have_text("Copied")
    tab_to(page, "#clear", "Shift+Tab")
    keys.press("Enter")
    expect(page.locator("#pick")).to_be_focused()


def test_regions_buttons_and_figures_have_names(visit: Open) -> None:
    seen = visit(allowed=["415"])
    fill(seen)
    page = seen.page
    for role in ("banner", "main", "contentinfo"):
        expect(page.get_by_role(role)).to_have_count(1)
    expect(page.get_by_role("heading", level=1)).to_have_count(1)
    expect(page.get_by_role("region", name="Answers")).to_be_visible()
    expect(page.get_by_role("button", name=re.compile(r"red [\d.]+ % .*batch \d+: \d+ .*red\.png"))).to_be_visible()
    expect(page.locator("#grid").get_by_role("img", name=re.compile("forward .* ms"))).to_have_count(3)
    expect(page.locator("#grid").get_by_role("meter", name="red")).to_have_count(1)
    # A screen reader passes over the figures inside a button.
    expect(page.locator("button :is(meter, [role=img])")).to_have_count(0)


def test_the_whole_card_is_clickable(visit: Open) -> None:
    # Without motion, because a click would miss while the page scrolls to the answers.
    seen = visit(reduced_motion="reduce")
    seen.pick(payload("1.png", RED), payload("2.png", GREEN))
    seen.wait_done(2)
    for number, part in enumerate((".frame", "meter", ".batch", ".bar", ".file")):
        name = f"{2 - number % 2}.png"
        # Forced, because any element there must select the picture.
        seen.card(name).locator(part).first.click(force=True)
        expect(seen.page.locator("#detail-name")).to_have_text(name)


def test_a_long_label_wraps_inside_the_details(visit: Open) -> None:
    seen = visit(viewport=DESK)
    seen.pick(payload("red.png", RED), payload("green.png", GREEN))
    seen.wait_done(2)
    seen.page.locator("#detail-label").evaluate("one => one.textContent = 'perhaps 115.Lowland_Hound_of_the_Glens'")
    assert seen.page.locator("#detail").evaluate("one => one.scrollWidth <= one.clientWidth")
