"""Fifty pictures with three broken ones: each its own answer, and which of them shared a batch."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from playwright.sync_api import Page, expect

from tests.conftest import BLUE, GREEN, LABELS, RED, picture
from tests.frontend.conftest import Open, payload

pytestmark = pytest.mark.browser
BROKEN = {
    "hello.txt": (b"hello, this is no picture", "415"),
    "cut.jpg": (picture((20, 200, 60), (400, 300), "JPEG")[:1500], "422"),
    "empty.png": (b"", "400"),
}
BATCH = re.compile(r"^batch (\d+): (\d+) pictures?$")
IN_FLIGHT = 6


def fifty() -> list[tuple[str, bytes, str | None]]:
    """Return names, bytes and labels; no two files are the same, and the broken ones lie among the others."""
    colours = ((210, 20, 30), (30, 190, 40), (20, 30, 200))
    files: list[tuple[str, bytes, str | None]] = [
        (f"{i:02}.png", picture(colours[i % 3], (40 + i, 50)), LABELS[i % 3]) for i in range(47)
    ]
    for place, (name, (data, _)) in zip((3, 20, 41), BROKEN.items(), strict=True):
        files.insert(place, (name, data, None))
    return files


def test_fifty_pictures_with_three_broken_ones(visit: Open) -> None:
    seen = visit(allowed=[status for _, status in BROKEN.values()])
    page = seen.page
    served_by = re.compile(r"TorchServe behind nginx [\d.]+$")
    expect(page.locator("#card tr", has_text="served by")).to_contain_text(served_by)
    seen.pick(*(payload(name, data) for name, data, _ in fifty()))
    seen.wait_done(50)
    for name, _, label in fifty():
        if label:
            expect(seen.card(name).locator(".label")).to_have_text(label)
    expect(page.locator("#done")).to_have_text("50 of 50")
    expect(page.locator("#failed")).to_have_text("3")
    assert float(page.locator("#rate").inner_text()) > 0
    expect(page.locator("#announcer")).to_have_text("50 of 50 pictures done, 3 failed")
    check_batches(page)
    address = seen.predictions()
    for name, (data, status) in BROKEN.items():
        answer = page.request.post(address, data=data, headers={"Content-Type": "application/octet-stream"})
        assert str(answer.status) == status
        expect(seen.card(name).locator(".label")).to_have_text("No answer")
        expect(seen.card(name).locator(".text")).to_have_text(f"{status}: {answer.json()['message']}")
        # The server has refused the file itself, so a retry would change nothing.
        expect(seen.card(name).get_by_role("button", name="Retry")).to_be_hidden()
        seen.card(name).locator(".card").click()
        expect(page.locator("#detail-verdict")).to_have_text(f"{status}: {answer.json()['message']}")


def check_batches(page: Page) -> None:
    """Every card has its batch, some share one, and none has more pictures than its size; the summary counts them."""
    sizes: dict[str, int] = {}
    ours: Counter[str] = Counter()
    for text in page.locator("#grid .batch").all_inner_texts():
        found = BATCH.match(text)
        assert found, text
        assert sizes.setdefault(found[1], int(found[2])) == int(found[2])
        ours[found[1]] += 1
    assert sum(ours.values()) == 50
    assert max(ours.values()) > 1, "no two pictures shared a batch"
    assert all(ours[number] <= min(size, IN_FLIGHT) for number, size in sizes.items())
    expect(page.locator("#batches")).to_have_text(str(len(sizes)))
    expect(page.locator("#honest")).to_contain_text(f"at most {IN_FLIGHT} pictures from this page")


def test_mates_of_a_batch_light_up(visit: Open) -> None:
    seen = visit()
    page = seen.page
    seen.pick(*(payload(f"{i}.png", picture((200, i, 20))) for i in range(12)))
    seen.wait_done(12)
    cards = page.locator("#grid li")
    for point in ("focus", "hover"):
        for i in range(12):
            number = cards.nth(i).get_attribute("data-batch")
            mates = page.locator(f'#grid li[data-batch="{number}"]')
            getattr(cards.nth(i).locator(".card"), point)()
            expect(page.locator("#grid li.mate")).to_have_count(mates.count())
            expect(mates.first).to_have_class(re.compile("mate"))


def test_not_sure(visit: Open) -> None:
    seen = visit()
    # Two equally strong colours: neither reaches the threshold on the page.
    seen.pick(payload("either.png", picture((150, 150, 10))))
    seen.wait_done(1)
    expect(seen.page.locator("#detail-label")).to_have_text(re.compile("^perhaps (red|green)$"))
    expect(seen.page.locator("#detail-verdict")).to_contain_text("not sure")
    expect(seen.page.locator("#threshold")).to_contain_text("Under 60 %")


def test_later_pictures_join_and_the_same_file_may_come_twice(visit: Open) -> None:
    seen = visit()
    for count, names in ((1, "1"), (3, "23"), (4, "3")):
        seen.pick(*(payload(f"{name}.png", (RED, GREEN, BLUE)[int(name) - 1]) for name in names))
        seen.wait_done(count)
        # The large view has the first of the newest.
        expect(seen.page.locator("#detail-name")).to_have_text(f"{names[0]}.png")
    expect(seen.page.locator("#done")).to_have_text("4 of 4")
