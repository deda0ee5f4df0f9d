"""The server's state on the page, and pictures that wait for it."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.conftest import BLUE, GREEN, RED
from tests.frontend.conftest import Open, payload

pytestmark = pytest.mark.browser
PREDICTIONS = re.compile("/predictions/")
PING = re.compile("/ping$")


def fake_busy(page: Page, times: int, pause: int = 1) -> Callable[[], int]:
    """Fake a full gateway that refuses so many requests, each for so many seconds; return a counter of requests."""
    seen: list[Route] = []
    body = {"code": 429, "type": "TooManyRequests", "message": f"200 requests are in flight; come back in {pause} s"}

    def answer(route: Route) -> None:
        seen.append(route)
        if len(seen) > times:
            route.continue_()
        else:
            route.fulfill(status=429, headers={"Retry-After": str(pause)}, json=body)

    page.route(PREDICTIONS, answer)
    return lambda: len(seen)


def fake_answer(page: Page, times: int | None = None, **answer: Any) -> None:
    """Fake the answer to predictions, or to so many of them."""
    page.route(PREDICTIONS, lambda route: route.fulfill(**answer), times=times)


def test_ready_is_said_once(visit: Open) -> None:
    seen = visit(ready=False)
    page = seen.page
    page.clock.install()
    seen.open()
    expect(page.get_by_role("status")).to_have_text(re.compile(r"^Ready, \d+ workers?$"))
    said = seen.hear("#state")
    for _ in range(3):
        with page.expect_response(PING):
            page.clock.run_for(5_000)
    assert said.json_value() == []


def test_busy_counts_down_and_tries_again(visit: Open) -> None:
    seen = visit(allowed=["429"], ready=False)
    page = seen.page
    page.clock.install()
    seen.open()
    asked = fake_busy(page, times=2, pause=10)
    page.clock.pause_at(datetime.datetime.now() + datetime.timedelta(hours=1))
    seen.pick(payload("1.png", RED))
    for times in (1, 2):
        # Ten seconds, and up to one more so that not all clients come back at once.
        expect(page.locator("#detail-verdict")).to_have_text("next try in 11 s")
        expect(page.locator("#detail-label")).to_have_text("Busy")
        expect(page.get_by_role("status")).to_contain_text("Busy")
        assert asked() == times
        page.clock.run_for(5_000)
        expect(page.locator("#detail-verdict")).to_have_text("next try in 6 s")
        page.clock.run_for(6_200)
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
    expect(seen.card("1.png").locator(".label")).to_have_text("red")
    expect(seen.card("2.png").locator(".label")).to_have_text("No answer")


def test_down_and_back(visit: Open) -> None:
    seen = visit(allowed=["net::ERR_FAILED"])
    page = seen.page
    # A fake of a network that is gone.
    for pattern in (PREDICTIONS, PING):
        page.route(pattern, lambda route: route.abort())
    seen.pick(payload("1.png", RED), payload("2.png", GREEN), payload("3.png", BLUE))
    expect(page.get_by_role("status")).to_contain_text("Not reachable")
    for name in ("1.png", "2.png", "3.png"):
        expect(seen.card(name).locator(".text")).to_have_text("until the server is ready")
    for pattern in (PREDICTIONS, PING):
        page.unroute(pattern)
    seen.wait_done(3)
    expect(page.get_by_role("status")).to_contain_text("Ready")
    for name, label in (("1.png", "red"), ("2.png", "green"), ("3.png", "blue")):
        expect(seen.card(name).locator(".label")).to_have_text(label)


def test_a_starting_server_says_why_and_pictures_wait(visit: Open) -> None:
    seen = visit(allowed=["503"], ready=False)
    page, retry = seen.page, {"Retry-After": "1"}
    # Fakes of a server whose worker still loads.
    reason = "starting: 0 of 1 workers of colours are ready"
    ping = {"status": "Unhealthy", "reason": reason, "models": {}}
    page.route(PING, lambda route: route.fulfill(status=503, headers=retry, json=ping))
    page.goto(seen.site)
    expect(page.get_by_role("status")).to_have_text(f"Not ready: {reason}")
    seen.pick(payload("1.png", BLUE))
    expect(page.locator("#detail-verdict")).to_have_text("until the server is ready")
    page.unroute(PING)
    seen.expect_answer("blue")
    # A prediction that comes too early waits too.
    body = {"code": 503, "type": "NotReady", "message": reason}
    fake_answer(page, 1, status=503, headers=retry, json=body)
    seen.pick(payload("2.png", GREEN))
    seen.expect_answer("green")


STRANGE = [
    (200, '{"predictions": [null]}', "in a form that this page does not know"),
    (200, '{"red": 1e999}', "in a form that this page does not know"),
    (200, "<html><b>hello</b></html>", "in a form that this page does not know: <html><b>hello"),
    (200, "", "the server's answer is empty"),
    (502, "<html>Bad Gateway</html>", "502: the server answered 502 without a sentence"),
    (500, "", "500: the server answered 500 without a sentence"),
]


def test_a_strange_answer_is_an_answer(visit: Open) -> None:
    seen = visit(allowed=["500", "502"])
    for number, (status, body, sentence) in enumerate(STRANGE):
        # A fake: our handler never answers so.
        fake_answer(seen.page, 1, status=status, body=body)
        seen.pick(payload(f"{number}.png", RED))
        expect(seen.page.locator("#detail-name")).to_have_text(f"{number}.png")
        expect(seen.page.locator("#detail-verdict")).to_contain_text(sentence)
        expect(seen.page.get_by_role("status")).to_contain_text("Ready")
        expect(seen.page.locator("#retry")).to_be_visible()


def test_labels_that_are_numbers_come_best_first(visit: Open) -> None:
    seen = visit()
    # A fake of another project's archive, which has no names for its classes.
    fake_answer(seen.page, body='{"7": 0.9, "3": 0.06, "12": 0.04}')
    seen.pick(payload("1.png", RED))
    seen.expect_answer("7")
    expect(seen.page.locator("#detail-scores .name")).to_have_text(["7", "3", "12"])


def test_the_page_asks_again_for_a_catalog_that_is_none(visit: Open) -> None:
    seen = visit(ready=False)
    # A fake of what a proxy may answer while the gateway behind it is replaced.
    bodies = ["{}", "<html>", ""]
    seen.page.route("**/catalog.json", lambda route: route.fulfill(body=bodies.pop()), times=3)
    seen.open()
    assert bodies == []
    seen.pick(payload("1.png", RED))
    seen.expect_answer("red")


def test_a_mistake_of_the_page_is_not_the_servers(visit: Open) -> None:
    seen = visit()
    # A fake of a mistake in the code that reads an answer.
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
    # A fake, because Playwright's pages are always visible.
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
