"""One server and one browser for all tests of the front end; a page for each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfyui.server import Server, installations, why_not

from . import browser as chrome
from .browser import Desk


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker for this folder: a server and a browser are enough."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.xdist_group("web"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium."""
    missing = chrome.why_not()
    if missing:
        pytest.skip(missing)
    with chrome.launched() as browser:
        yield browser


@pytest.fixture(scope="session", params=installations(), ids=lambda one: one.version)
def server(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Server]:
    """ComfyUI with the pack and the smallest checkpoints."""
    missing = why_not(request.param)
    if missing:
        pytest.skip(missing)
    folder: Path = tmp_path_factory.mktemp("comfyui")
    # An older ComfyUI belongs with its own front end, whichever the Python has installed.
    front_end = os.environ.get("COMFYUI_FRONT_END")
    arguments = ["--front-end-root", front_end] if front_end else []
    server = Server(request.param, folder, arguments=arguments)
    server.ensure("checkpoints/tiny-sd15-a.safetensors", "checkpoints/tiny-sd15-b.safetensors")
    with server:
        yield server


@pytest.fixture
def desk(browser: Any, server: Server) -> Iterator[Desk]:
    """A fresh page. Whatever it printed as an error fails the test."""
    desk = Desk(browser, server.url, 1440, 900)
    yield desk.open()
    desk.close()
    assert desk.errors == []
