"""The ways in which a picture comes in, each until its answer."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.conftest import BLUE, GREEN, RED
from tests.frontend.conftest import Open, payload, transfer

pytestmark = pytest.mark.browser
SPANS = re.compile(
    r"^# ms: (queue # ms, )?decode # ms, forward # ms, encode # ms, network # ms$".replace("#", r"[\d.]+")
)


def drop_from_disk(page: Page, *paths: Path) -> None:
    """Drop what lies on the disk, as a file manager does."""
    debugger = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        debugger.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 200, "data": data})


def test_pick(visit: Open) -> None:
    seen = visit()
    with seen.page.expect_file_chooser() as chooser:
        seen.page.get_by_role("button", name="Choose pictures").click()
    chooser.value.set_files([payload("blue.png", BLUE)])
    seen.expect_answer("blue")
    page = seen.page
    expect(page.locator("#detail-label")).to_have_text("blue")
    expect(page.locator("#detail-verdict")).to_have_text(page.locator("#detail-scores .score").first.inner_text())
    expect(page.get_by_role("meter")).to_have_count(3)
    expect(page.locator("#detail-bar")).to_have_attribute("aria-label", SPANS)
    expect(page.locator("#announcer")).to_contain_text("blue.png: blue")


def test_drop_anywhere_and_a_drag_that_leaves_again(visit: Open) -> None:
    seen = visit()
    page, veil = seen.page, seen.page.locator("#drop")
    carried = {"dataTransfer": transfer(page, [payload("green.png", GREEN), payload("red.png", RED)])}
    for place in ("footer", "#card tr:first-child"):
        page.dispatch_event(place, "dragenter", carried)
    expect(veil).to_be_visible()
    # The element under the pointer may be replaced meanwhile, and then it sends no event when the pointer leaves it.
    page.evaluate("document.querySelector('#card tr').remove()")
    page.dispatch_event("html", "dragleave", carried)
    expect(veil).to_be_hidden()
    page.dispatch_event("footer", "dragenter", carried)
    expect(veil).to_be_visible()
    page.dispatch_event("footer", "drop", carried)
    expect(veil).to_be_hidden()
    seen.wait_done(2)
    for label in ("green", "red"):
        expect(seen.card(f"{label}.png").locator(".label")).to_have_text(label)


def test_a_dropped_folder_is_an_error_of_its_own(visit: Open, tmp_path: Path) -> None:
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "1.png").write_bytes(RED)
    (tmp_path / "2.png").write_bytes(GREEN)
    # Chromium's own error for the preview of a folder.
    seen = visit(allowed=["net::ERR_FILE_NOT_FOUND"])
    drop_from_disk(seen.page, tmp_path / "album", tmp_path / "2.png")
    seen.wait_done(2)
    expect(seen.card("2.png").locator(".label")).to_have_text("green")
    expect(seen.card("album").locator(".text")).to_have_text(
        "album could not be read from this device; choose it again, and files, not folders"
    )


def test_paste(visit: Open) -> None:
    seen = visit()
    seen.page.evaluate(
        """async text => {
          const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
          const blob = new Blob([bytes], { type: "image/png" });
          await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }""",
        base64.b64encode(RED).decode(),
    )
    seen.page.keyboard.press("Control+V")
    seen.expect_answer("red")
    expect(seen.page.locator("#detail-name")).to_have_text("pasted-1.png")
    with seen.page.expect_download() as download:
        seen.page.get_by_role("link", name="Save the picture").click()
    assert download.value.suggested_filename == "pasted-1.png"


def test_a_drop_or_a_paste_without_a_picture_is_said_each_time(visit: Open) -> None:
    seen = visit()
    page, alert = seen.page, seen.page.get_by_role("alert")
    page.dispatch_event("body", "drop", {"dataTransfer": transfer(page, [])})
    expect(alert).to_have_text("What was dropped holds no file; save the picture first and drop the file.")
    page.evaluate("navigator.clipboard.writeText('hello')")
    said = seen.hear("#notice")
    for times in (1, 2):
        page.keyboard.press("Control+V")
        page.wait_for_function(f"said => said.length === {times}", arg=said)
    expect(alert).to_contain_text("The clipboard holds no picture")


def test_each_of_two_equal_samples_is_answered_and_can_be_saved(visit: Open) -> None:
    seen = visit()
    page = seen.page
    label = str(page.locator("#sample-list img").first.get_attribute("alt")).removeprefix("Sample: ")
    for count in (1, 2):
        page.locator("#sample-list button").first.click()
        seen.wait_done(count)
    seen.expect_answer(label)
    page.locator("#grid .card").first.press("Delete")
    expect(page.locator("#grid li")).to_have_count(1)
    with page.expect_download() as download:
        page.get_by_role("link", name="Save the picture").click()
    assert download.value.failure() is None


def test_a_name_that_is_html_stays_a_name(visit: Open) -> None:
    seen = visit()
    name = "<img src=x onerror=alert(1)>.png"
    seen.pick(payload(name, RED), payload(name, GREEN))
    seen.wait_done(2)
    expect(seen.page.locator("#detail-name")).to_have_text(name)
    expect(seen.page.locator("#grid .file")).to_have_text([name, name])
    expect(seen.page.locator("[onerror]")).to_have_count(0)


def test_delete_remove_and_clear(visit: Open) -> None:
    seen = visit()
    page = seen.page
    seen.count_urls()
    seen.pick(payload("1.png", RED), payload("2.png", GREEN), payload("3.png", BLUE), payload("4.png", BLUE))
    seen.wait_done(4)
    assert page.evaluate("window.urls.size") >= 4
    seen.card("4.png").locator(".card").press("Delete")
    expect(seen.card("3.png").locator(".card")).to_be_focused()
    expect(page.locator("#detail-name")).to_have_text("1.png")
    expect(page.locator("#done")).to_have_text("3 of 3")
    page.get_by_role("button", name="Remove").click()
    expect(page.locator("#grid li")).to_have_count(2)
    seen.expect_answer("green")
    # The grid disappears with the last picture but one, and the focus must not.
    seen.card("3.png").locator(".card").press("Delete")
    expect(page.locator("#remove")).to_be_focused()
    expect(page.locator("#detail-name")).to_have_text("2.png")
    page.get_by_role("button", name="Clear all").click()
    expect(page.locator("#results")).to_be_hidden()
    expect(page.locator("#pick")).to_be_focused()
    assert page.evaluate("window.urls.size") == 0
