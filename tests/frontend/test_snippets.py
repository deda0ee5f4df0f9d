"""The code that the page shows, run unchanged in a folder with the file."""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import sys
from pathlib import Path

import playwright
import pytest
from playwright.sync_api import Page, expect

from tests.conftest import GREEN, RED
from tests.frontend.conftest import Open, payload

pytestmark = pytest.mark.browser
NODE = shutil.which("node") or str(Path(playwright.__file__).parent / "driver" / "node")
TABS = {"curl": ["bash", "snippet.sh"], "Python": [sys.executable, "snippet.py"], "JavaScript": [NODE, "classify.mjs"]}


def run_all(page: Page, folder: Path) -> list[dict[str, float]]:
    """Run what each tab shows and return what each printed."""
    answers = []
    for tab, command in TABS.items():
        page.get_by_role("tab", name=tab).click()
        expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        page.get_by_role("button", name="Copy", exact=True).click()
        code = page.locator("#snippet").inner_text()
        page.wait_for_function("async code => (await navigator.clipboard.readText()) === code", arg=code)
        (folder / command[-1]).write_text(code, encoding="utf-8")
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr == ""
        answers.append(json.loads(ended.stdout))
    return answers


@pytest.mark.parametrize("name", ["it's a [very] {green} one, ü.png", '-"quoted" $(name).png'])
def test_three_languages_one_answer(visit: Open, tmp_path: Path, name: str) -> None:
    seen = visit()
    seen.pick(payload(name, GREEN))
    seen.expect_answer("green")
    (tmp_path / name).write_bytes(GREEN)
    curl, python, javascript = run_all(seen.page, tmp_path)
    assert curl == python == javascript
    assert next(iter(curl)) == "green"
    shown = seen.page.locator("#detail-scores .name").all_inner_texts()
    assert list(curl) == shown


def test_the_code_follows_the_current_picture(visit: Open) -> None:
    seen = visit()
    sample = seen.page.locator("#sample-list img").first
    # Before any picture has come, the code asks for the first sample.
    name = str(sample.get_attribute("src")).rsplit("/", 1)[-1]
    expect(seen.page.locator("#snippet")).to_contain_text(name)
    seen.pick(payload("1.png", RED), payload("2.png", GREEN))
    seen.wait_done(2)
    expect(seen.page.locator("#snippet")).to_contain_text("1.png")
    seen.card("2.png").locator(".card").click()
    expect(seen.page.locator("#snippet")).to_contain_text(f"{seen.predictions()} \\\n  -T 2.png")


def test_a_second_copy_is_said_again_and_as_long_as_the_first(visit: Open) -> None:
    seen = visit(ready=False)
    page, button = seen.page, seen.page.locator("#copy")
    page.clock.install()
    seen.open()
    said = seen.hear("#announcer")
    page.clock.pause_at(datetime.datetime.now() + datetime.timedelta(hours=1))
    for pause in (1_500, 1_500):
        button.click()
        expect(button).to_have_text("Copied")
        page.clock.run_for(pause)
    # The first click's two seconds are over, the second's are not.
    assert button.inner_text() == "Copied"
    page.clock.run_for(600)
    assert button.inner_text() == "Copy"
    assert said.json_value() == ["Copied", "Copied"]


def test_without_a_clipboard_the_code_is_selected(visit: Open) -> None:
    page = visit().page
    # A fake of what a page without https, or without permission, gets.
    denied = "navigator.clipboard.writeText = () => Promise.reject(new DOMException('no', 'NotAllowedError'))"
    page.evaluate(f"() => {{ {denied}; }}")
    page.locator("#copy").click()
    expect(page.locator("#announcer")).to_have_text("Selected: press Ctrl+C")
    assert page.evaluate("getSelection().toString()") == page.locator("#snippet").inner_text()
