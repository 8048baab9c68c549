"""ComfyUI's front end in Chromium, as a user sees it.

`why_not()` says what is missing. `Desk` is one page with a server behind it: it moves the mouse
and types where that is what a test is about, and asks the application's own objects otherwise.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "comfyui"
# Read at once: the tests' own environment has none of these variables.
WRITE_PICTURES = os.environ.get("SWITCHYARD_SCREENSHOTS", "") not in ("", "0")

OLDER = bool(os.environ.get("COMFYUI_FRONT_END"))

# What the front end itself prints on an empty installation.
_CORE_NOISE = (
    "graph accessed before initialization",
    "Content Security Policy",
    "Failed to load resource",
    "is deprecated",
    "Failed to parse user settings",
)


def chromium() -> str | None:
    """The browser: CHROMIUM_PATH, or the first of the usual names."""
    named = os.environ.get("CHROMIUM_PATH")
    if named:
        return named
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


def why_not() -> str | None:
    """Why no browser can be driven here, or None."""
    if importlib.util.find_spec("playwright") is None:
        return "needs the package playwright"
    if chromium() is None:
        return "needs Chromium (CHROMIUM_PATH)"
    return None


@contextmanager
def launched() -> Iterator[Any]:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


class Desk:
    """A page of the front end.

    errors: what it printed as errors, less what an untouched front end prints too; and answers of
        the server that failed under the pack's own paths.
    """

    def __init__(self, browser: Any, url: str, width: int = 1280, height: int = 900) -> None:
        self.url = url
        self.errors: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self._note(f"{error}\n{error.stack}"))
        self.page.on("response", self._on_response)
        self.page.set_default_timeout(20_000)

    def _on_console(self, message: Any) -> None:
        if message.type == "error":
            self._note(f"{message.text}\n{message.location.get('url', '')}")

    def _note(self, text: str) -> None:
        """An error, if it is not an untouched front end's own. Older ones have more of these."""
        ours = "switchyard" in text.lower()
        if ours or not (OLDER or any(noise in text for noise in _CORE_NOISE)):
            self.errors.append(text)

    def _on_response(self, response: Any) -> None:
        if response.status >= 400 and "switchyard" in response.url.lower():
            self.errors.append(f"{response.status} {response.url}")

    def open(self) -> Desk:
        """Load the front end and wait until extensions are set up."""
        self.page.goto(self.url)
        self.page.wait_for_function(
            "() => window.app?.extensionManager?.sidebarTab?.sidebarTabs"
            "?.some((tab) => tab.id === 'switchyard') && Boolean(window.app.canvas?.graph)"
        )
        # The front end opens a workflow of its own last of all.
        self.page.wait_for_function("() => window.app.extensionManager.workflow?.activeWorkflow")
        self.page.wait_for_timeout(1500)
        self.close_dialogs()
        return self

    def close(self) -> None:
        """Close the page."""
        self.page.close()

    def run(self, script: str, argument: Any = None) -> Any:
        """Evaluate a JavaScript function."""
        return self.page.evaluate(script, argument)

    def wait(self, script: str, argument: Any = None, timeout: float = 20) -> Any:
        """Wait for a JavaScript function to return something true."""
        return self.page.wait_for_function(script, arg=argument, timeout=timeout * 1000)

    def until(self, what: Callable[[], Any], timeout: float = 20) -> Any:
        """Wait until a call returns something true; returns that."""
        end = time.monotonic() + timeout
        while True:
            value = what()
            if value:
                return value
            if time.monotonic() > end:
                raise TimeoutError(f"nothing after {timeout:g} s")
            self.page.wait_for_timeout(100)

    def close_dialogs(self) -> None:
        """Templates, news and the like that an installation opens at its first start."""
        for _ in range(3):
            if not self.page.locator('[role="dialog"]:visible').count():
                return
            self.page.keyboard.press("Escape")
            self.page.wait_for_timeout(400)

    def set(self, setting: str, value: Any) -> None:
        """Change a setting."""
        self.run(
            "async ([id, value]) => { await app.extensionManager.setting.set(id, value); }",
            [setting, value],
        )
        self.page.wait_for_timeout(300)

    def load(self, workflow: dict[str, Any]) -> None:
        """Open a workflow in UI format."""
        self.run("async (workflow) => { await app.loadGraphData(workflow); }", workflow)
        self.page.wait_for_timeout(500)

    def graph(self) -> dict[str, Any]:
        """The workflow in UI format."""
        data = self.run("() => JSON.stringify((app.rootGraph ?? app.graph).serialize())")
        result: dict[str, Any] = json.loads(data)
        return result

    def api(self) -> dict[str, Any]:
        """The workflow in API format, as it would be queued."""
        data = self.run("async () => JSON.stringify((await app.graphToPrompt()).output)")
        result: dict[str, Any] = json.loads(data)
        return result

    def node(self, kind: str) -> Any:
        """The id of the first node of a type."""
        return self.run("(type) => app.graph.nodes.find((n) => n.type === type)?.id", kind)

    def open_panel(self) -> Any:
        """Open the sidebar panel; returns its locator."""
        panel = self.page.locator(".sy-panel")
        if not panel.count():
            self.page.locator(".switchyard-tab-button").click()
        panel.wait_for()
        return panel

    def point(self, node: Any, slot: int, output: bool) -> tuple[float, float]:
        """Where on the page a node's slot is."""
        x, y = self.run(
            """([id, slot, output]) => {
                const node = app.graph.getNodeById(id);
                const place = node.getConnectionPos(!output, slot);
                const { offset, scale } = app.canvas.ds;
                const box = app.canvas.canvas.getBoundingClientRect();
                return [
                    (place[0] + offset[0]) * scale + box.left,
                    (place[1] + offset[1]) * scale + box.top,
                ];
            }""",
            [node, slot, output],
        )
        return x, y

    def connect(self, source: Any, output: int, target: Any, slot: int) -> None:
        """Draw a link with the mouse."""
        mouse = self.page.mouse
        mouse.move(*self.point(source, output, True))
        self.page.wait_for_timeout(200)
        mouse.down()
        x, y = self.point(target, slot, False)
        mouse.move(x - 20, y, steps=8)
        mouse.move(x, y, steps=4)
        self.page.wait_for_timeout(200)
        mouse.up()
        self.page.wait_for_timeout(300)

    def picture(self, name: str, **options: Any) -> None:
        """A screenshot for the docs; only where SWITCHYARD_SCREENSHOTS is set."""
        if not WRITE_PICTURES:
            return
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.wait_for_timeout(400)
        path = PICTURES / f"{name}.jpg"
        for quality in range(85, 30, -10):
            self.page.screenshot(path=path, type="jpeg", quality=quality, **options)
            if path.stat().st_size < 150 * 1024:
                return
