"""Workflows through a real server's /prompt: what comes out of the engine is the host's own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import comfyui_workflows as command

from .checkpoints import CONFIGS
from .scenarios import CLOSE, SCENARIOS, Comparison, Ran, Scenario
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
    scenario(Comparison(server, server, kind))


@pytest.mark.skipif(not os.environ.get("COMFYUI_PACKS"), reason="COMFYUI_PACKS names no packs")
def test_beside_other_packs(server, models_folder, tmp_path):
    """Real packs, by their folders, separated as in PATH: the picture is right with them loaded."""

    def build(w):
        model = w.lora(w.model(), "1", 0.7)
        w.sample(model, w.context(1), w.context(2), w.empty(), record="packs")

    def masked(w):
        file = f"{w.kind}-1.safetensors"
        w.server.ensure(f"controlnet/{file}")
        net, image = w.add("ControlNetLoader", control_net_name=file), w.image(5)
        if w.fast:
            net = w.add("SwitchyardAccelerateControlNet", control_net=net, first_run="wait")
        applied = w.add("ACN_AdvancedControlNetApply_v2", positive=w.context(1),
                        negative=w.context(2), control_net=net, image=image, strength=0.8,
                        start_percent=0.0, end_percent=1.0,
                        mask_optional=[image[0], 1])  # fmt: skip
        w.sample(w.model(), applied, [applied[0], 1], w.empty(), record="mask")

    packs = [Path(name).expanduser() for name in os.environ["COMFYUI_PACKS"].split(os.pathsep)]
    with Server(server.installation, tmp_path, models=models_folder, packs=packs) as crowded:
        assert [pack.name for pack in packs if f"IMPORT FAILED): {pack}" in crowded.log] == []
        comparison = Comparison(crowded, crowded, "tiny-sd15")
        comparison(build)
        assert comparison.failed == []
        if "ACN_AdvancedControlNetApply_v2" in crowded.get("/object_info"):
            comparison(masked)
    assert max(error for error, _, _ in comparison.errors) < CLOSE  # on whatever path


def ran(error, calls=2):
    """What a sampler records whose results are off by a part of the noise."""
    x = torch.linspace(-1, 1, 64)
    record = {"latent": x, "input_latent": x}
    for call in range(calls):
        denoised = x - 1 - error * (call + 1) * x.sign()
        # What guidance made of both does not count.
        record |= {f"x_{call}": x, f"denoised_{call}": (1 + 9 * error) * x}
        record |= {f"cond_{call}": denoised, f"uncond_{call}": denoised.clone()}
    return Ran({"record": record}, {}, [])


@pytest.mark.parametrize(
    ("engine", "host", "passes"),
    [
        (1.05e-3, 1e-3, True),
        (1.2e-3, 1e-3, False),
        (1e-6, 1e-9, True),  # ties in rounding
        (float("nan"), 1e-3, False),
        (1e-3, float("nan"), False),
        (0.2, 0.2, False),  # a host that is wrong itself
    ],
)
def test_the_rule_for_half_precision(engine, host, passes):
    comparison = Comparison(object(), object(), "full-sd15")
    failed = comparison._judge(ran(0), ran(host), ran(engine))
    assert (failed == []) == passes
    parts = ("cond", "uncond")
    wheres = [f"record, call {call}, {part}" for call in range(2) for part in parts]
    assert [where for _, _, where in comparison.errors] == wheres


def test_the_rule_wants_the_same_calls_and_inputs():
    comparison = Comparison(object(), object(), "full-sd15")
    assert comparison._judge(ran(0), ran(0), ran(0, calls=3))
    other = ran(0)
    other.records["record"]["input_latent"] = torch.ones(64)
    assert comparison._judge(ran(0), ran(0), other) == ["record: the engine's input_latent differs"]


def test_the_command_writes_a_row_for_each_scenario(server, tmp_path, monkeypatch):
    def broken(compare):
        compare(lambda w: w.sample(w.model(), w.context(1), w.context(2), ["99", 0], record="none"))

    out = tmp_path / "rows.json"
    words = ["command", "--comfyui", str(server.installation.root), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*words, "--device", "cpu", "--kinds", "tiny-sd15"])
    scenarios = [Scenario(broken, ("sd15",), ("tiny",)), SCENARIOS[0]]
    monkeypatch.setattr(command, "SCENARIOS", scenarios)
    arguments = command.parsed()
    command.run_all(arguments, command.Results(arguments), server, server)
    written = json.loads(out.read_text())
    assert written["meta"]["comfyui"] == server.installation.version
    failed, passed = written["rows"]
    assert not failed["passed"] and failed["error"] and failed["logs"][server.folder.name]
    assert passed["passed"] and "error" not in passed
    assert (passed["mode"], passed["reasons"], passed["predictions"]) == ("engine", [], 9)
    assert 0 < passed["rel_err"] < 1e-4 and passed["rel_err_host"] == 0
    assert server.idle()
