"""What the pack's routes may answer, with every state that the panel can show."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

SHIPPED, BUILT, UNUSED = (character * 32 for character in "012")
BUILDING, FAILED = ("ab" * 16, "cd" * 16)

RUN: dict[str, Any] = {
    "id": 7,
    "started": time.time() - 30,
    "model": "dreamshaperXL_v21.safetensors",
    "family": "sdxl",
    "graph_key": SHIPPED,
    "device": "cuda:0",
    "mode": "mixed",
    "steps": 20,
    "engine_calls": 14,
    "host_calls": 6,
    "seconds": 1.42,
    "engine_ms": 42.1,
    "host_ms": 120.0,
    "dims": [{"width": 1024, "height": 1024, "batch": 2}],
    "loras": 2,
    "controlnets": 1,
    "reasons": [
        {"text": "FreeU changes the up blocks", "node": "FreeU_V2"},
        {"text": "the engine needs 6.1 GiB of VRAM and 4.0 are there", "node": None},
    ],
    "graphs": 1,
    "captures": 0,
    "vram_bytes": 6 * 2**30,
    "swaps_ms": 84.0,
    "compiling": False,
    "compared_db": None,
    "error": None,
    "node_id": "5",
    "saved_seconds": 3.1,
    "speedup": 3.1,
}

STATE: dict[str, Any] = {
    "version": "0.1.0",
    "gpu": {
        "name": "NVIDIA GeForce RTX 4090",
        "capability": "8.9",
        "vram_mib": 24564,
        "timed_calls": 1431,
    },
    "host": {"comfyui": "0.33.0", "dynamic_vram": True, "torch": "2.13.0"},
    "engines": [
        {
            "id": SHIPPED,
            "family": "sdxl",
            "title": "Stable Diffusion XL",
            "structure": SHIPPED,
            "bytes": 1_240_000,
            "source": "shipped",
            "sizes": [
                {"width": 1024, "height": 1024, "batch": 2, "controlnet": False},
                {"width": 1216, "height": 832, "batch": 2, "controlnet": True},
            ],
            "last_used": 190,
            "loaded": True,
            "vram_mib": 6012.5,
            "deletable": False,
        },
        {
            "id": BUILT,
            "family": "sd15",
            "title": "Stable Diffusion 1.5, <b>pruned</b>",
            "structure": BUILT,
            "bytes": 840_000,
            "source": "built",
            "sizes": [{"width": 512, "height": 512, "batch": 2, "controlnet": False}],
            "last_used": 3 * 86400 + 60,
            "loaded": False,
            "vram_mib": 0,
            "deletable": True,
        },
        {
            "id": UNUSED,
            "family": "controlnet",
            "title": "ControlNet of SDXL",
            "structure": UNUSED,
            "bytes": 310_000,
            "source": "built",
            "sizes": [],
            "last_used": None,
            "loaded": False,
            "vram_mib": 0,
            "deletable": True,
        },
    ],
    "builds": [
        {
            "id": BUILDING,
            "title": "SDXL inpainting",
            "state": "building",
            "fraction": 0.41,
            "text": "tracing the network",
            "error": None,
        },
        {
            "id": FAILED,
            "title": "SD 1.5 with a changed middle",
            "state": "failed",
            "fraction": 0.2,
            "text": "",
            "error": "a block calls .item()",
        },
    ],
    "totals": {"saved_seconds": 5025.4, "runs": 212, "engine_calls": 4240},
    "last_run": RUN,
}


def _checkpoint(name: str, badge: str, **values: Any) -> dict[str, Any]:
    shared = {"folder": "checkpoints", "family": None, "title": None, "why": None}
    return {"name": name, "badge": badge, **shared, **values}


_SDXL = {"family": "sdxl", "title": "Stable Diffusion XL"}
_SD15 = {"family": "sd15", "title": "Stable Diffusion 1.5"}
CHECKPOINTS: list[dict[str, Any]] = [
    _checkpoint("dreamshaperXL_v21.safetensors", "ready", **_SDXL),
    _checkpoint("juggernautXL_v9.safetensors", "ready", **_SDXL),
    _checkpoint("sd15/realisticVision_v6.safetensors", "ready", **_SD15),
    _checkpoint("sd15/dreamshaper_8.safetensors", "ready", **_SD15),
    _checkpoint("sdxl_inpaint.safetensors", "build", family="sdxl", title="SDXL inpainting"),
    _checkpoint(
        "flux1-dev-Q4.gguf",
        "unsupported",
        folder="diffusion_models",
        why="a GGUF file: its weights are quantised",
    ),
    _checkpoint(
        "half-downloaded.safetensors", "unreadable", why="the file is empty: get the file again"
    ),
    _checkpoint(
        "canny-sdxl.safetensors",
        "ready",
        folder="controlnet",
        family="controlnet",
        title="ControlNet of SDXL",
    ),
]


class Routes:
    """Answers the pack's routes in a page in place of the server.

    state, checkpoints, prediction: what is answered; a test may change them. posts: what was to be
    done. asked: the samplings of which a prediction was asked.
    """

    def __init__(self, page: Any) -> None:
        self.state = copy.deepcopy(STATE)
        for engine in self.state["engines"]:  # told as seconds ago, for a test of any length
            if engine["last_used"] is not None:
                engine["last_used"] = time.time() - engine["last_used"]
        self.checkpoints = copy.deepcopy(CHECKPOINTS)
        self.scanning = False
        self.reads = 0
        self.posts: list[tuple[str, Any]] = []
        self.refusal: str | None = None
        self.prediction: dict[str, Any] = {"seconds": 1.62, "bytes": 5.04 * 2**30}
        self.asked: list[dict[str, Any]] = []
        page.route("**/switchyard/*", self._answer)
        page.route("**/switchyard/*/*", self._answer)

    def _answer(self, route: Any) -> None:
        request = route.request
        if "/extensions/" in request.url:
            route.fallback()
            return
        path = request.url.split("/switchyard/", 1)[1]
        if request.method == "POST":
            body = json.loads(request.post_data)
            if path == "predict":
                self.asked.append(body)
                route.fulfill(json=self.prediction)
                return
            self.posts.append((path, body))
            if self.refusal:
                route.fulfill(status=409, json={"error": self.refusal})
                return
            freed = 0
            if path == "engines/delete":
                engine = next(one for one in self.state["engines"] if one["id"] == body["id"])
                self.state["engines"].remove(engine)
                freed = engine["bytes"]
            route.fulfill(json={"deleted": True, "freed_bytes": freed})
        elif path == "state":
            self.reads += 1
            route.fulfill(json=self.state)
        elif path == "checkpoints":
            route.fulfill(json={"checkpoints": self.checkpoints, "scanning": self.scanning})
        else:
            route.fulfill(status=404, json={"error": f"no {path}"})
