"""The camera: its pictures, its errors, and that it never stays on."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, Playwright, expect

from tests.conftest import GREEN
from tests.frontend.conftest import CHROMIUM, QUIET, Open, payload

pytestmark = pytest.mark.browser


def fake_permission(page: Page) -> None:
    """Fake a browser that asks for permission: the page gets each stream only when the test calls its grant."""
    page.evaluate(
        """() => {
          const devices = navigator.mediaDevices;
          const lend = devices.getUserMedia.bind(devices);
          Object.assign(window, { streams: [], grants: [] });
          devices.getUserMedia = async (wanted) => {
            const at = window.streams.push(await lend(wanted)) - 1;
            await new Promise((grant) => (window.grants[at] = grant));
            return window.streams[at];
          };
        }"""
    )


def opened(page: Page) -> Page:
    """Open the camera."""
    page.get_by_role("button", name="Use the camera").click()
    expect(page.locator("#shutter")).to_be_enabled()
    return page


def test_camera_and_its_end(visit: Open) -> None:
    seen = visit()
    page = opened(seen.page)
    track = page.evaluate_handle("document.querySelector('#viewfinder').srcObject.getTracks()[0]")
    assert track.evaluate("track => track.readyState") == "live"
    page.get_by_role("button", name="Take the picture").click()
    # The fake device draws a pattern on green.
    seen.expect_answer("green")
    expect(page.locator("#detail-name")).to_have_text("camera-1.jpg")
    expect(page.locator("#camera")).to_be_hidden()
    assert track.evaluate("track => track.readyState") == "ended"


def test_no_camera_is_said(visit: Open, player: Playwright) -> None:
    browser = player.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
    try:
        page = visit(browser=browser).page
        page.get_by_role("button", name="Use the camera").click()
        expect(page.locator("#camera").get_by_role("alert")).to_contain_text("choose a file")
        with page.expect_file_chooser():
            page.get_by_role("button", name="Choose a file instead").click()
        expect(page.locator("#camera")).to_be_hidden()
        page.context.close()
    finally:
        browser.close()


def test_camera_of_a_phone(visit: Open) -> None:
    seen = visit(has_touch=True, is_mobile=True, viewport={"width": 360, "height": 740})
    with seen.page.expect_file_chooser() as chooser:
        seen.page.get_by_role("button", name="Use the camera").tap()
    assert chooser.value.element.get_attribute("capture") == "environment"
    chooser.value.set_files([payload("photo.png", GREEN)])
    seen.expect_answer("green")


@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["in order", "the first last"])
def test_closed_and_opened_again_while_permission_is_asked_for(visit: Open, order: list[int]) -> None:
    page = visit().page
    fake_permission(page)
    states = "window.streams.map((stream) => stream.getTracks()[0].readyState)"
    for count in (1, 2):
        page.get_by_role("button", name="Use the camera").click()
        page.wait_for_function(f"() => window.grants.length === {count}")
        if count == 1:
            page.keyboard.press("Escape")
            expect(page.locator("#camera")).to_be_hidden()
    page.evaluate("order => order.forEach((at) => window.grants[at]())", order)
    expect(page.locator("#shutter")).to_be_enabled()
    assert page.evaluate(states) == ["ended", "live"]
    page.get_by_role("button", name="Close").click()
    # The event of a dialog's end comes a moment after it.
    page.wait_for_function("() => window.streams.every((stream) => stream.getTracks()[0].readyState === 'ended')")


def test_an_unplugged_camera_and_one_without_a_picture_are_said(visit: Open) -> None:
    page = opened(visit().page)
    alert = page.locator("#camera").get_by_role("alert")
    # A fake of the event alone: Chromium's drawn camera cannot be unplugged.
    page.evaluate("document.querySelector('#viewfinder').srcObject.getTracks()[0].dispatchEvent(new Event('ended'))")
    expect(alert).to_contain_text("The camera was disconnected")
    expect(page.locator("#shutter")).to_be_hidden()
    expect(page.locator("#camera-file")).to_be_focused()
    page.get_by_role("button", name="Close").click()
    opened(page)
    # A fake of a canvas that the browser has no memory for.
    page.evaluate("() => { HTMLCanvasElement.prototype.toBlob = (done) => done(null); }")
    page.get_by_role("button", name="Take the picture").click()
    expect(alert).to_contain_text("gave no picture")
    expect(page.locator("#grid li")).to_have_count(0)
