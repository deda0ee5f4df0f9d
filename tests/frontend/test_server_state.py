"""The server's state on the page, and pictures that wait for it; what is faked here is faked by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, Route, expect

from tests.conftest import BLUE, GREEN, RED
from tests.frontend.conftest import PATIENCE, Open, Serve, payload

pytestmark = pytest.mark.browser
PREDICTIONS = re.compile("/predictions/")
PING = re.compile("/ping$")


def fake_busy(page: Page, times: int) -> Callable[[], int]:
    """Fake a gateway that is full: it turns away so many requests; returns what counts them."""
    asked = 0

    def answer(route: Route) -> None:
        nonlocal asked
        asked += 1
        if asked > times:
            route.continue_()
            return
        body = {"code": 429, "type": "TooManyRequests", "message": "200 requests are in flight; come back in 1 s"}
        route.fulfill(status=429, headers={"Retry-After": "1"}, json=body)

    page.route(PREDICTIONS, answer)
    return lambda: asked


def fake_lost(page: Page) -> None:
    """Fake a network that is gone."""
    for pattern in (PREDICTIONS, PING):
        page.route(pattern, lambda route: route.abort())


def fake_starting(page: Page, reason: str) -> None:
    """Fake a server whose worker is still loading."""
    ping = json.dumps({"status": "Unhealthy", "reason": reason, "models": {}})
    page.route(PING, lambda route: route.fulfill(status=503, headers={"Retry-After": "1"}, body=ping))


def test_ready_is_said_once(visit: Open) -> None:
    seen = visit(ready=False)
    page = seen.page
    page.clock.install()
    seen.open()
    expect(page.get_by_role("status")).to_have_text(re.compile(r"^Ready, \d+ workers?$"))
    page.evaluate(
        """() => {
          window.said = 0;
          new MutationObserver(() => window.said++).observe(
            document.querySelector("#state"), { childList: true, characterData: true, subtree: true });
        }"""
    )
    for _ in range(3):
        with page.expect_response(PING):
            page.clock.run_for(5_000)
    assert page.evaluate("window.said") == 0


def test_busy_counts_down_and_tries_again(visit: Open) -> None:
    seen = visit(allowed=["429"])
    page = seen.page
    asked = fake_busy(page, times=2)
    seen.pick(payload("1.png", RED))
    expect(page.locator("#detail-label")).to_have_text("Busy")
    expect(page.locator("#detail-verdict")).to_have_text(re.compile(r"^next try in \d+ s$"))
    expect(page.get_by_role("status")).to_contain_text("Busy")
    seen.expect_answer("red")
    expect(page.get_by_role("status")).to_contain_text("Ready")
    assert asked() == 3


def test_busy_for_too_long_offers_to_retry(visit: Open) -> None:
    seen = visit(allowed=["429"])
    page = seen.page
    asked = fake_busy(page, times=1000)
    seen.pick(payload("1.png", RED), payload("2.png", GREEN))
    seen.wait_done(2)
    assert asked() == 10
    expect(seen.card("1.png").locator(".text")).to_contain_text("429: 200 requests are in flight")
    page.unroute(PREDICTIONS)
    seen.card("1.png").get_by_role("button", name="Retry").click()
    expect(seen.card("1.png").locator(".label")).to_have_text("red", timeout=PATIENCE)
    expect(seen.card("2.png").locator(".label")).to_have_text("No answer")


def test_down_and_back(visit: Open) -> None:
    seen = visit(allowed=["net::ERR_FAILED"])
    page = seen.page
    fake_lost(page)
    seen.pick(payload("1.png", RED), payload("2.png", GREEN), payload("3.png", BLUE))
    expect(page.get_by_role("status")).to_contain_text("Not reachable", timeout=PATIENCE)
    for name in ("1.png", "2.png", "3.png"):
        expect(seen.card(name).locator(".text")).to_have_text("until the server is ready")
    for pattern in (PREDICTIONS, PING):
        page.unroute(pattern)
    seen.wait_done(3)
    expect(page.get_by_role("status")).to_contain_text("Ready")
    for name, label in (("1.png", "red"), ("2.png", "green"), ("3.png", "blue")):
        expect(seen.card(name).locator(".label")).to_have_text(label)


def test_stopped_and_started_in_the_middle(visit: Open, serve: Serve) -> None:
    """A real server: 40 pictures are under way when it stops, and all are answered after it is back."""
    first = serve("middle")
    port = int(first.state.inference.rpartition(":")[2])
    seen = visit(allowed=["net::ERR_CONNECTION_REFUSED", "net::ERR_EMPTY_RESPONSE", "503", "502"], ready=False)
    seen.site = first.state.inference
    try:
        seen.open()
        seen.pick(*(payload(f"{number}.png", (RED, GREEN, BLUE)[number % 3]) for number in range(40)))
        expect(seen.page.locator("#grid li[data-state=answered]").nth(3)).to_be_attached(timeout=PATIENCE)
        first.stop()
        expect(seen.page.get_by_role("status")).to_contain_text("Not reachable", timeout=PATIENCE)
        first = serve("middle", port)
        seen.wait_done(40)
        expect(seen.page.locator("#grid li[data-state=answered]")).to_have_count(40)
        expect(seen.card("39.png").locator(".label")).to_have_text("red")
    finally:
        first.stop()


def test_starting_says_why_and_pictures_wait(visit: Open) -> None:
    seen = visit(allowed=["503"], ready=False)
    page = seen.page
    fake_starting(page, "starting: 0 of 1 workers of colours are ready")
    page.goto(seen.site)
    expect(page.get_by_role("status")).to_have_text("Not ready: starting: 0 of 1 workers of colours are ready")
    seen.pick(payload("1.png", BLUE))
    expect(page.locator("#detail-verdict")).to_have_text("until the server is ready")
    page.unroute(PING)
    seen.expect_answer("blue")


def test_a_prediction_that_comes_too_early_waits(visit: Open) -> None:
    seen = visit(allowed=["503"])
    page = seen.page
    body = {"code": 503, "type": "NotReady", "message": "0 of 1 workers of colours are ready"}
    page.route(PREDICTIONS, lambda route: route.fulfill(status=503, headers={"Retry-After": "1"}, json=body), times=1)
    seen.pick(payload("1.png", GREEN))
    seen.expect_answer("green")


def test_a_strange_answer_is_an_answer(visit: Open) -> None:
    seen = visit()
    # A fake: no handler of ours answers so.
    seen.page.route(PREDICTIONS, lambda route: route.fulfill(json={"predictions": [None]}))
    seen.pick(payload("1.png", RED))
    expect(seen.page.locator("#detail-verdict")).to_contain_text("in a form that this page does not know")
    expect(seen.page.get_by_role("status")).to_contain_text("Ready")


def test_a_mistake_of_the_page_is_not_the_servers(visit: Open) -> None:
    seen = visit()
    # A fake of a mistake in whatever reads an answer.
    seen.page.evaluate("() => { Headers.prototype.get = () => { throw new TypeError('made for this test'); }; }")
    seen.pick(payload("1.png", RED))
    expect(seen.page.locator("#detail-verdict")).to_contain_text("made for this test")
    expect(seen.page.get_by_role("status")).to_contain_text("Ready")
    assert seen.problems == ["page error: made for this test"]
    seen.problems.clear()


def test_no_ping_while_nobody_looks(visit: Open) -> None:
    seen = visit(ready=False)
    page = seen.page
    page.clock.install()
    seen.open()
    # Playwright's pages are always visible; this one says that it is not.
    look = """state => {
      Object.defineProperty(document, "visibilityState", { value: state, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.evaluate(look, "hidden")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.clock.run_for(60_000)
    assert asked == []
    with page.expect_request(PING):
        page.evaluate(look, "visible")
