"""The server's state on the page, and pictures that wait for it; what is faked here is faked by name."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, Route, expect

from tests.conftest import BLUE, GREEN, RED
from tests.frontend.conftest import Open, Serve, payload

pytestmark = pytest.mark.browser
PREDICTIONS = re.compile("/predictions/")
PING = re.compile("/ping$")


def fake_busy(page: Page, times: int, pause: int = 1) -> Callable[[], int]:
    """Fake a gateway that is full: it turns away so many requests, for so many seconds; returns what counts them."""
    asked = 0

    def answer(route: Route) -> None:
        nonlocal asked
        asked += 1
        if asked > times:
            route.continue_()
            return
        body = {
            "code": 429,
            "type": "TooManyRequests",
            "message": f"200 requests are in flight; come back in {pause} s",
        }
        route.fulfill(status=429, headers={"Retry-After": str(pause)}, json=body)

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
    seen = visit(allowed=["429"], ready=False)
    page = seen.page
    page.clock.install()
    seen.open()
    asked = fake_busy(page, times=2, pause=10)
    page.clock.pause_at(datetime.datetime.now() + datetime.timedelta(hours=1))
    seen.pick(payload("1.png", RED))
    for times in (1, 2):
        # Ten seconds, and up to one more so that not all come back at once.
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
    fake_lost(page)
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


def test_stopped_and_started_in_the_middle(visit: Open, serve: Serve) -> None:
    """A real server: most of 40 pictures wait when it stops, and all are answered after it is back."""
    # Six at a time, each batch waits a second for more that never come: they last 7 s, however fast the machine is.
    first = serve("middle", delay=1000)
    port = int(first.state.inference.rpartition(":")[2])
    # A browser's own words for a server that ends: which of them it says depends on the moment.
    words = ("REFUSED", "RESET", "CLOSED")
    allowed = ["net::ERR_EMPTY_RESPONSE", *(f"net::ERR_CONNECTION_{word}" for word in words), "500", "502", "503"]
    seen = visit(allowed=allowed, ready=False, site=first.state.inference)
    try:
        seen.open()
        seen.pick(*(payload(f"{number}.png", (RED, GREEN, BLUE)[number % 3]) for number in range(40)))
        expect(seen.page.locator("#grid li[data-state=answered]").nth(3)).to_be_attached()
        first.stop()
        expect(seen.page.get_by_role("status")).to_contain_text("Not reachable")
        held = seen.page.locator("#grid li[data-state=held]").count()
        assert held > 0
        assert held + seen.page.locator("#grid li[data-state=answered]").count() == 40
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


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (200, '{"predictions": [null]}', "in a form that this page does not know"),
        (200, '{"red": 1e999}', "in a form that this page does not know"),
        (200, "<html><b>hello</b></html>", "in a form that this page does not know: <html><b>hello"),
        (200, "", "the server's answer is empty"),
        (502, "<html>Bad Gateway</html>", "502: the server answered 502 without a sentence"),
        (500, "", "500: the server answered 500 without a sentence"),
    ],
)
def test_a_strange_answer_is_an_answer(visit: Open, status: int, body: str, sentence: str) -> None:
    seen = visit(allowed=["500", "502"])
    # A fake: no handler of ours answers so.
    seen.page.route(PREDICTIONS, lambda route: route.fulfill(status=status, body=body))
    seen.pick(payload("1.png", RED))
    expect(seen.page.locator("#detail-verdict")).to_contain_text(sentence)
    expect(seen.page.get_by_role("status")).to_contain_text("Ready")
    expect(seen.page.get_by_role("button", name="Retry")).to_be_visible()


def test_labels_that_are_numbers_come_best_first(visit: Open) -> None:
    seen = visit()
    # A fake of an archive made by other means, which has no names for its classes.
    seen.page.route(PREDICTIONS, lambda route: route.fulfill(body='{"7": 0.9, "3": 0.06, "12": 0.04}'))
    seen.pick(payload("1.png", RED))
    seen.expect_answer("7")
    expect(seen.page.locator("#detail-scores .name")).to_have_text(["7", "3", "12"])


@pytest.mark.parametrize("body", ["{}", "<html>", ""])
def test_a_catalog_that_is_none_is_asked_for_again(visit: Open, body: str) -> None:
    seen = visit(ready=False)
    # A fake of what a proxy may answer while the gateway behind it is exchanged.
    seen.page.route("**/catalog.json", lambda route: route.fulfill(body=body), times=2)
    seen.open()
    seen.pick(payload("1.png", RED))
    seen.expect_answer("red")


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
