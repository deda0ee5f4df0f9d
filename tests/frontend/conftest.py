"""Chromium on the page of a served site: a visit, and what no visit may show."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, FilePayload, JSHandle, Locator, Page, Playwright, expect

from archive.inspect import card
from serve.addresses import Ports
from serve.config import Overrides
from serve.instance.child import Running
from serve.up import Request, up
from tests.frontend import drawn

CHROMIUM = os.environ.get("BEELINE_CHROMIUM", "/usr/bin/chromium")
PATIENCE = 30_000
expect.set_options(timeout=PATIENCE)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]
FAKE_CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
# Chromium's own note of a failed request. It names the status, or the reason why there is none.
_NOTE = re.compile(r"Failed to load resource: (?:the server responded with a status of (\d+)|(net::\w+))")
_DONE = "#grid li:is([data-state=answered], [data-state=failed])"


@dataclass
class Visit:
    """One page with what went wrong on it; `allowed` are the failed requests that a test provokes."""

    page: Page
    site: str
    allowed: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Record errors of the page, its console, and requests to other origins."""
        self.page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        self.page.on("console", lambda message: self._console(message.type, message.text))
        self.page.on("request", lambda request: self._request(request.url))
        # From the start, because a listener that is added with the click is too late now and then.
        self.page.on("filechooser", lambda chooser: None)

    def open(self) -> None:
        """Go to the page and wait until the server is ready and the model is known."""
        self.page.goto(self.site)
        expect(self.page.locator(".top")).to_have_attribute("data-state", "ready")
        expect(self.page.locator("#card tr").first).to_be_visible()

    def pick(self, *files: FilePayload | Path) -> None:
        """Choose files with the page's own input."""
        chosen: Any = list(files)
        self.page.locator("#files").set_input_files(chosen)

    def wait_done(self, count: int) -> None:
        """Wait until so many pictures have an answer or have failed."""
        expect(self.page.locator(_DONE)).to_have_count(count, timeout=4 * PATIENCE)

    def card(self, name: str) -> Locator:
        """Return the card of a file's name."""
        named = self.page.locator(".file", has_text=re.compile(f"^{re.escape(name)}$"))
        return self.page.locator("#grid li").filter(has=named)

    def expect_answer(self, label: str) -> None:
        """Wait for the large view to name this label."""
        expect(self.page.locator("#detail")).to_have_attribute("data-state", "answered")
        expect(self.page.locator("#detail-scores .name").first).to_have_text(label)

    def hear(self, selector: str) -> JSHandle:
        """Return the list of texts that a live region gets from now on."""
        return self.page.locator(selector).evaluate_handle(
            """region => {
              const said = [];
              new MutationObserver(() => region.textContent && said.push(region.textContent)).observe(
                region, { childList: true, characterData: true, subtree: true });
              return said;
            }"""
        )

    def count_urls(self) -> None:
        """Keep the object URLs that are made and not yet revoked in `window.urls`."""
        self.page.evaluate(
            """() => {
              window.urls = new Set();
              const { createObjectURL, revokeObjectURL } = URL;
              URL.createObjectURL = (blob) => { const url = createObjectURL(blob); window.urls.add(url); return url; };
              URL.revokeObjectURL = (url) => { window.urls.delete(url); revokeObjectURL(url); };
            }"""
        )

    def predictions(self) -> str:
        """Return the address that the default model answers on."""
        models = self.page.request.get(f"{self.site}/catalog.json").json()["models"]
        return self.site + str(next(model for model in models if model["default"])["predictions"])

    def _console(self, kind: str, text: str) -> None:
        note = _NOTE.match(text)
        if note:
            self.notes.append(note[1] or note[2])
        elif kind in ("error", "warning"):
            self.problems.append(f"console {kind}: {text}")

    def _request(self, url: str) -> None:
        if not url.startswith((f"{self.site}/", f"blob:{self.site}/", "data:")):
            self.problems.append(f"request to another origin: {url}")


Open = Callable[..., Visit]


def row(page: Page, name: str) -> Locator:
    """Return the cell of the model's table with this name."""
    return page.locator("#card tr").filter(has=page.locator("th", has_text=re.compile(f"^{name}$"))).locator("td")


def payload(name: str, data: bytes, kind: str = "image/png") -> FilePayload:
    """Return a file for the browser's input."""
    return {"name": name, "mimeType": kind, "buffer": data}


def transfer(page: Page, files: Sequence[FilePayload]) -> Any:
    """Return a DataTransfer with these files, as in a drop."""
    values = [[one["name"], one["mimeType"], base64.b64encode(one["buffer"]).decode()] for one in files]
    return page.evaluate_handle(
        """files => {
          const carried = new DataTransfer();
          for (const [name, type, text] of files) {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            carried.items.add(new File([bytes], name, { type }));
          }
          return carried;
        }""",
        values,
    )


Serve = Callable[..., Running]


@pytest.fixture(scope="session")
def serve(colour_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Start real TorchServe behind real nginx, with the colour model or others; the caller stops it."""
    state = str(tmp_path_factory.mktemp("state"))
    store = tmp_path_factory.mktemp("store")
    drawn.put_samples(store)

    def start(name: str, archives: Sequence[Path] = (colour_archive,)) -> Running:
        asked = Request(
            wanted=tuple(map(str, archives)),
            store=store,
            name=name,
            overrides=Overrides(workers=1, batch_size=8, max_batch_delay=20),
            ports=Ports(0),
            card=lambda mar: card(mar).to_dict(),
        )
        return up(asked, print, {**os.environ, "BEELINE_STATE": state})

    return start


@pytest.fixture(scope="session")
def site(serve: Serve) -> Iterator[str]:
    """The address of a served site with the colour model."""
    with serve("site") as running:
        yield running.state.inference


def require_chromium(path: str) -> None:
    """Fail where there is no browser."""
    if not Path(path).exists():
        pytest.fail(f"no browser at {path}; install Debian's chromium, or set BEELINE_CHROMIUM to where one is")


@pytest.fixture(scope="session")
def chromium(player: Playwright) -> Iterator[Browser]:
    """Chromium with a camera that shows a drawn pattern on green."""
    browser = player.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, *FAKE_CAMERA])
    yield browser
    browser.close()


@pytest.fixture
def visit(chromium: Browser, request: pytest.FixtureRequest) -> Iterator[Open]:
    """Open the page in a fresh context; afterwards only what the test provoked may have gone wrong."""
    visits: list[Visit] = []

    def start(
        allowed: Sequence[str] = (),
        ready: bool = True,
        browser: Browser | None = None,
        site: str | None = None,
        **options: Any,
    ) -> Visit:
        permissions = ["clipboard-read", "clipboard-write"] + ([] if browser else ["camera"])
        context = (browser or chromium).new_context(permissions=permissions, **options)
        made = Visit(context.new_page(), site or request.getfixturevalue("site"), set(allowed))
        visits.append(made)
        made.watch()
        if ready:
            made.open()
        return made

    yield start
    for made in visits:
        made.page.context.close()
        assert made.problems == []
        assert set(made.notes) <= made.allowed
