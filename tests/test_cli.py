"""The command line: what every command prints, in words and as JSON, and how it refuses."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sparse import ldm_shapes, sparse_file

from accel import cli
from accel.cli import doctor, main, output
from accel.compiler import SHIPPED, open_cache
from accel.errors import SwitchyardError
from accel.models import FAMILIES, parameters
from accel.plan.schema import Plan
from accel.structure import structure_hash

ROOT = Path(__file__).parents[1]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """One file of each kind, full-size networks among them."""
    by_name = {family.name: family.config for family in FAMILIES}
    control = {name: p.shape for name, p in parameters(by_name["sdxl-controlnet"]).items()}
    checkpoint = ldm_shapes("sdxl", "model.diffusion_model.") | {
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
        "model_ema.decay": (),
    }
    lora: dict[str, tuple[int, ...]] = {"lora_te1_text_model_encoder.lora_down.weight": (4, 768)}
    for name, parameter in parameters(by_name["sdxl"]).items():
        if "attn" in name and name.endswith(".weight"):
            layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            lora[f"{layer}.lora_down.weight"] = (8, parameter.shape[1])
            lora[f"{layer}.lora_up.weight"] = (parameter.shape[0], 8)
            lora[f"{layer}.alpha"] = ()
    part = {"lora_unet_x.lora_down.weight": (4, 8), "lora_unet_x.lora_up.weight": (8, 4)}
    contents = {
        "sdxl": checkpoint,
        "controlnet": control,
        "vae": {"encoder.conv_in.weight": (128, 3, 3, 3), "decoder.conv_in.weight": (512, 4, 3, 3)},
        "text": {"text_model.final_layer_norm.weight": (768,)},
        "strange": {"head.weight": (3, 3)},
        "lora": lora,
        "other-lora": part,
    }
    return {
        name: sparse_file(tmp_path / f"{name}.safetensors", shapes)
        for name, shapes in contents.items()
    }


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    """What a command prints as JSON."""
    assert main([str(argument) for argument in arguments]) == code
    return json.loads(capsys.readouterr().out)


# All commands.


def test_help_is_instant_and_imports_no_torch() -> None:
    code = "import sys, accel.cli as c; c.parser().format_help(); print('torch' in sys.modules)"
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
    assert time.perf_counter() - started < 10, "a loaded machine included"


@pytest.mark.parametrize(
    "command",
    ["", "demo", "audition", "inspect", "predict", "build", "tune", "cache", "doctor"],
)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command.split(), "--help"])
    assert exit_.value.code == 0
    assert "usage: python -m accel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("", "required: COMMAND"),
        ("paint", "invalid choice: 'paint'"),
        ("inspect", "required: FILE"),
        ("demo --size 100x100", "'100x100' is no size: give WIDTHxHEIGHT in multiples of 8"),
        ("demo --size huge", "is no size"),
        ("demo --steps 0", "no number of steps"),
        ("cache prune --limit-gib -1", "invalid size in GiB value: '-1'"),
        ("cache prune --all --limit-gib 1", "not allowed with"),
    ],
)
def test_a_wrong_argument_is_one_line_and_2(
    arguments: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    assert complaint in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (SwitchyardError("the file is odd: get another"), 2, "accel: the file is odd: get another"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "accel: /x/y: Permission denied"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_what_stops_a_command_is_one_line(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(options: Any) -> int:
        raise error

    monkeypatch.setattr(cli.doctor, "run", fail)
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == f"{said}\n"


def test_the_log_level_is_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHYARD_LOG", "error")
    main(["cache", "list"])
    assert logging.getLogger("accel").level == logging.ERROR
    monkeypatch.delenv("SWITCHYARD_LOG")
    main(["cache", "list"])
    assert logging.getLogger("accel").level == logging.WARNING


def test_a_reader_that_leaves_early_is_no_error(files: dict[str, Path]) -> None:
    many = [str(files["vae"])] * 2000
    command = [sys.executable, "-m", "accel", "inspect", "--json", *many]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


# inspect


def test_inspect_tells_what_each_file_holds(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        Path(row["file"]).stem: row
        for row in run_json(capsys, "inspect", "--json", *files.values())
    }
    sdxl = rows["sdxl"]
    assert sdxl["kind"] == "unet" and sdxl["family"] == "sdxl" and sdxl["title"] == "SDXL"
    assert sdxl["holds"] == "UNet + VAE + text encoder"
    assert sdxl["graph_key"] == structure_hash(files["sdxl"])
    assert sdxl["dtype"] == "float16" and sdxl["bytes"] > 5e9
    assert rows["controlnet"]["family"] == "sdxl-controlnet"
    assert rows["controlnet"]["holds"] == "ControlNet"
    assert rows["vae"]["holds"] == "VAE" and rows["text"]["holds"] == "text encoder"
    assert rows["strange"]["holds"] == "no network that Switchyard knows"
    assert rows["lora"]["holds"] == "LoRA (kohya), fits: SDXL, 560 layers"
    assert rows["lora"]["fits"] == ["sdxl", "sdxl-inpaint"]
    assert rows["other-lora"]["holds"] == "LoRA (kohya), fits no known family, 1 layers"
    assert not any(row["error"] for row in rows.values())


def test_inspect_is_a_table_that_a_pipe_gets_whole(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(files["sdxl"]), str(files["lora"])]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "safetensors" in line]
    assert len(lines) == 2, "nothing is wrapped"
    assert structure_hash(files["sdxl"])[:12] in lines[0] and "GiB" in lines[0]


def test_inspect_reads_no_data_and_prints_damaged_files_as_rows(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.safetensors"
    short.write_bytes(files["vae"].read_bytes()[:-5])
    pickle = tmp_path / "old.ckpt"
    pickle.write_bytes(b"")
    rows = run_json(
        capsys,
        "inspect",
        "--json",
        short,
        files["sdxl"],
        tmp_path / "none.safetensors",
        pickle,
        code=2,
    )
    assert [bool(row["error"]) for row in rows] == [True, False, True, True]
    assert "truncated" in rows[0]["error"] and "does not exist" in rows[2]["error"]
    assert main(["inspect", str(short)]) == 2
    out, err = capsys.readouterr()
    assert "error: is truncated" in out and err == ""


def test_the_engine_is_shipped_cached_or_to_build(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from accel import compiler

    def state() -> str:
        (row,) = run_json(capsys, "inspect", "--json", files["controlnet"])
        return str(row["engine"])

    monkeypatch.setattr(compiler, "shipped_plan", lambda structure: None)
    assert state() == "to build"
    open_cache(None, None).put(structure_hash(files["controlnet"]), "plan", {})
    assert state() == "cached"
    monkeypatch.setattr(compiler, "shipped_plan", lambda structure: object())
    assert state() == "shipped"


def test_a_network_of_no_family_is_shown_by_its_shapes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from accel.demo import world

    path = world.CHECKPOINTS[0]
    (row,) = run_json(capsys, "inspect", "--json", path)
    assert row["graph_key"] is None and row["engine"] == "needs its module"
    assert main(["inspect", str(path)]) == 0
    assert f"shapes {row['shape_key'][:12]}" in capsys.readouterr().out


# build and cache


def test_build_says_where_the_plan_is_and_force_makes_it_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the smallest of the published networks: a capture of ten seconds."""
    pytest.importorskip("diffusers")
    from accel import compiler

    config = next(family.config for family in FAMILIES if family.name == "sd15-controlnet")
    shapes = {name: parameter.shape for name, parameter in parameters(config).items()}
    path = sparse_file(tmp_path / "cn.safetensors", shapes)
    monkeypatch.setattr(compiler, "shipped_plan", lambda structure: None)
    # A file and its family are one structure, built once.
    (row,) = run_json(capsys, "build", "--json", path, "--family", "sd15-controlnet")
    assert row["source"] == "built" and row["graph_key"] == structure_hash(path)
    plan = open_cache(None, None).get(row["graph_key"], "plan")
    assert plan is not None and Plan.from_json(plan).structure["family"] == "sd15-controlnet"
    (row,) = run_json(capsys, "build", "--json", path)
    assert row["source"] == "cache" and Path(row["where"]).is_file()

    compiled = []

    def compile_network(structure: Any, network: Any, report: Any) -> Plan:
        compiled.append(structure.family)
        return Plan.from_json(plan)

    monkeypatch.setattr(compiler, "compile_network", compile_network)
    (row,) = run_json(capsys, "build", "--json", path, "--force")
    assert row["source"] == "built" and compiled == ["sd15-controlnet"]

    (entry,) = run_json(capsys, "cache", "list", "--json")["entries"]
    assert entry["family"] == "sd15-controlnet" and entry["bytes"] > 1000
    assert main(["cache", "list"]) == 0
    assert row["graph_key"][:12] in capsys.readouterr().out
    assert main(["cache", "prune", "--limit-gib", "1"]) == 0
    assert "0 removed" in capsys.readouterr().out
    pruned = run_json(capsys, "cache", "prune", "--all", "--json")
    assert pruned["entries_left"] == 0 and pruned["freed_bytes"] == entry["bytes"]
    assert main(["cache", "list"]) == 0
    assert capsys.readouterr().out.startswith("0 entries")


def test_build_finds_what_is_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = run_json(capsys, "build", "sd15", "--json")
    assert row["source"] == "shipped" and Path(row["where"]) == SHIPPED / "sd15.json"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "nothing to build"),
        (["sd16"], "'sd16' is no family: use one of sd15, "),
        (["--family", "x.safetensors"], "is no family"),
        (["none.safetensors"], "does not exist"),
    ],
)
def test_build_refuses_in_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", *arguments]) == 2
    errors = capsys.readouterr().err
    assert complaint in errors and errors.count("\n") == 1


def test_build_refuses_a_file_without_a_published_network(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(files["vae"])]) == 2
    assert "holds no network of a published family" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_said_after_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from accel import compiler

    pytest.importorskip("diffusers")
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SWITCHYARD_CACHE_DIR", str(blocked / "cache"))
    plan = Plan.from_json(json.loads((SHIPPED / "sd15.json").read_text("utf-8")))
    monkeypatch.setattr(compiler, "compile_network", lambda *arguments: plan)
    assert main(["build", "sd15", "--force"]) == 2
    out, err = capsys.readouterr()
    assert "not kept" in out and "cannot be written" in err


# doctor


def test_doctor_reports_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert checks["PyTorch"]["good"] and checks["PyTorch"]["found"] == torch.__version__
    assert checks["cache"]["good"] and checks["packages"]["good"]
    assert checks["GPU"]["good"] == torch.cuda.is_available()
    assert not checks["GPU"]["needed"], "a CPU will do"
    assert "families ready" in checks["shipped plans"]["found"]


def test_doctor_fails_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SWITCHYARD_CACHE_DIR", str(blocked / "cache"))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "✗ cache: " in out and "set SWITCHYARD_CACHE_DIR" in out and "to mend: " in out


def test_doctor_finds_damaged_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accel import compiler

    good = json.loads((SHIPPED / "sd15.json").read_text("utf-8"))
    contents = {
        "sd15": json.dumps(good),
        "sd21": json.dumps(good),
        "sdxl": "{",
        "ssd1b": json.dumps({**good, "version": 0}),
    }
    for name, text in contents.items():
        (tmp_path / f"{name}.json").write_text(text)
    monkeypatch.setattr(compiler, "SHIPPED", tmp_path)
    (check,) = doctor._shipped_plans()
    assert not check.good and check.found.startswith("1 of 11 families ready; without sd15-inpaint")
    for name, reason in (
        ("sd21", "another structure"),
        ("sdxl", "Expecting"),
        ("ssd1b", "version"),
    ):
        assert f"{name}.json: " in check.found and reason in check.found


def test_a_check_that_breaks_is_a_finding() -> None:
    def _strange_part() -> Any:
        raise RuntimeError("two\nlines")
        yield

    (check,) = doctor._safely(_strange_part)
    assert not check.good and check.name == "strange part" and "two lines" in check.found


def test_doctor_finds_comfyui_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.33.0"\n')
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    check = list(doctor._hosts())[-1]
    assert check.good and check.found == f"0.33.0 in {tmp_path}"


# What is shown.


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536 * 2**20, "1.5 GiB"),
        (2**20 - 1, "1024 KiB"),
        (5 * 2**50, "5120 TiB"),
    ],
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert output.size(count) == text


def test_a_terminal_without_the_signs_gets_words(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    assert str(output.mark(True)) == "ok" and str(output.mark(False)) == "FAILED"
    output.print_table(("name",), [("a [bold] → name",)])
    stream.flush()
    assert b"a [bold] ? name" in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_no_bar_is_drawn_into_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("work") as report:
        report(0.5, "half")
    assert capsys.readouterr().err == ""


def test_inspect_takes_the_dtype_of_the_denoiser(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    from accel.demo import world

    tensors = load_file(world.CHECKPOINTS[0])
    tensors["first_stage_model.big"] = torch.zeros(2000, 2000)
    path = tmp_path / "checkpoint.safetensors"
    save_file(tensors, path)
    (row,) = run_json(capsys, "inspect", "--json", path)
    assert row["dtype"] == "float16"
