"""What a size will take, said ahead: against what was measured, and against what is then bound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from accel.cli import main
from accel.cli.predict import _plan
from accel.runtime.predict import Prediction, predict_at
from accel.tuning.forecast import Forecast
from accel.tuning.profile import Profile, profiled

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def of(family: str, width: int, height: int, gpu: str = "NVIDIA H200") -> Prediction:
    hardware = profiled()[gpu]
    return predict_at(_plan(family), width, height, 2, Forecast(hardware, Profile(hardware, None)))


@pytest.mark.parametrize(("model", "width"), [("sd15", 512), ("sd15", 768), ("sdxl", 1024)])
def test_times_and_memory_are_those_that_were_measured(model: str, width: int) -> None:
    """The kernels one by one, at full clock: a whole step takes a little longer."""
    rows = [
        row
        for row in json.loads((RESULTS / "h200" / "bench.json").read_text())["rows"]
        if (row["variant"], row["model"], row["width"], row["height"], row["controlnets"])
        == ("engine", model, width, width, 0)
    ]
    found = of(model, width, width)
    assert found.step_ms is not None and found.measured > 300 and not found.unknown
    assert 0.87 < found.step_ms / min(row["ms"] for row in rows) < 1.03
    for row in rows:
        assert found.weights_bytes >> 20 == row["weights_mib"]
        assert found.activation_bytes >> 20 == pytest.approx(row["activation_mib"], abs=8)


def test_a_size_that_nobody_measured_lies_between_its_neighbours() -> None:
    between = of("sd15", 712, 712)
    assert between.step_ms is not None and between.predicted > 250
    low, high = (of("sd15", side, side).step_ms for side in (512, 768))
    assert low is not None and high is not None and low < between.step_ms < 1.02 * high


def test_what_nobody_measured_is_slower_on_a_smaller_chip() -> None:
    times = [of("sd15", 512, 512, f"NVIDIA GeForce RTX {n}").step_ms for n in (3060, 3090, 4090)]
    assert all(ms is not None for ms in times)
    assert times == sorted(times, reverse=True)
    assert times[0] > 2 * times[1]  # type: ignore[operator]


# The command.


def test_the_command_prints_a_row_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--size", "512x512", "--size", "768x768"]
    arguments = ["predict", "sd15", *sizes, "--steps", "10", "--gpu", "NVIDIA H200"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpu"], found["batch"], found["steps"]) == ("NVIDIA H200", 2, 10)
    first: dict[str, Any] = found["rows"][0]
    assert first["seconds"] == pytest.approx((first["prompt_ms"] + 10 * first["step_ms"]) / 1e3)
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "768x768" in said and "GiB" in said and "342 measured" in said
    assert main([*arguments[:4], "--controlnet", *arguments[-4:], "--json"]) == 0
    (controlled,) = json.loads(capsys.readouterr().out)["rows"]
    assert controlled["step_ms"] > first["step_ms"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("sd99 --gpu NVIDIA+H200", "'sd99' is no family with a plan: use "),
        ("sd15 --gpu nothing", "there is no profile of 'nothing': use NVIDIA A10, "),
        ("no.safetensors --gpu NVIDIA+H200", "no.safetensors"),
    ],
)
def test_bad_input_is_one_line_and_2(
    arguments: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *(part.replace("+", " ") for part in arguments.split())]) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_has_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "sd15"]) == 2
    said = capsys.readouterr().err
    assert "name a GPU with --gpu" in said and said.count("\n") == 1
