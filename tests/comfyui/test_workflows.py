"""Workflows through a real server's /prompt: what comes out of the engine is the host's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .checkpoints import CONFIGS
from .scenarios import SCENARIOS, Comparison
from .server import Server

# The wide ones of SDXL take a minute each, and 4 GiB.
KINDS = [
    kind
    for kind in CONFIGS
    if kind.startswith(("tiny-", "wide-" if os.environ.get("COMFYUI_TEST_WIDE") else "wide-sd15"))
]
CASES = [
    pytest.param(scenario, kind, id=f"{scenario.name}-{kind}")
    for scenario in SCENARIOS
    for kind in KINDS
    if scenario.fits(kind)
]


@pytest.mark.parametrize(("scenario", "kind"), CASES)
def test_the_engine_computes_what_the_host_does(server, scenario, kind):
    scenario.run(Comparison(server, server, kind))


@pytest.mark.skipif(not os.environ.get("COMFYUI_PACKS"), reason="COMFYUI_PACKS names no packs")
def test_beside_other_packs(server, models_folder, tmp_path):
    """Real packs, by their folders, separated as in PATH: the picture is right with them loaded."""

    def build(w):
        model = w.lora(w.model(), "1", 0.7)
        w.sample(model, w.context(1), w.context(2), w.empty(), record="packs")

    packs = [Path(name).expanduser() for name in os.environ["COMFYUI_PACKS"].split(os.pathsep)]
    with Server(server.installation, tmp_path, models=models_folder, packs=packs) as crowded:
        assert [pack.name for pack in packs if f"IMPORT FAILED): {pack}" in crowded.log] == []
        Comparison(crowded, crowded, "tiny-sd15")(build)
