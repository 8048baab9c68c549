"""Workflows through the /prompt of a real ComfyUI: the engine's fidelity in each, call by call.

    python -m benchmarks.comfyui_workflows --comfyui PATH --out results.json [--kinds full-sd15,…]

What is run, and the rule, is `tests/comfyui/scenarios.py`. On a GPU two servers run side by side:
one in float32 (TF32 off) without this pack, whose trajectories are followed, and one as users have
it. On a CPU one server computes in float32 anyway. Checkpoints have random weights; the files are
written first. Rows are written as they come; the exit code is 1 if one is not passed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from comfyui import checkpoints, scenarios  # noqa: E402
from comfyui.scenarios import SCENARIOS, Comparison, Scenario  # noqa: E402
from comfyui.server import Installation, Server  # noqa: E402

KINDS = {
    "cuda": "full-sd15,full-sdxl,full-sdxl-inpaint",
    "cpu": "tiny-sd15,tiny-sd15-inpaint,tiny-sdxl,tiny-sdxl-inpaint",
}
EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}
"""Keeps cuBLAS and cuDNN from TF32 in the process that has it."""

LOG_LINES = 40


def main() -> None:
    """Start the servers, run every scenario for every kind, write one object."""
    arguments = parsed()
    os.environ["COMFYUI_DEVICE"] = arguments.device  # what large weights are drawn on
    with contextlib.ExitStack() as stack:
        if arguments.scratch is None:
            temporary = tempfile.TemporaryDirectory(prefix="workflows-", ignore_cleanup_errors=True)
            arguments.scratch = Path(stack.enter_context(temporary))
        results = Results(arguments)
        try:
            host, truth = stack.enter_context(servers(arguments, results))
            run_all(arguments, results, host, truth)
        except Exception:
            results.object["failed"] = traceback.format_exc().splitlines()
        results.write()
    rows = results.object["rows"]
    passed = sum(row["passed"] for row in rows)
    print(f"{passed} of {len(rows)} passed", *results.object.get("failed", ()), sep="\n")
    sys.exit(0 if rows and passed == len(rows) and "failed" not in results.object else 1)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=list(KINDS), default="cuda")
    parser.add_argument("--kinds", help="by default all full ones, on a CPU all tiny ones")
    parser.add_argument("--only", help="scenarios whose names contain one of these, with commas")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="ComfyUI's")
    parser.add_argument("--disable-dynamic-vram", action="store_true")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for a workflow")
    parser.add_argument("--scratch", type=Path, help="for files and logs, which then stay there")
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    arguments.comfyui = arguments.comfyui.expanduser().resolve()
    arguments.kinds = (arguments.kinds or KINDS[arguments.device]).split(",")
    return arguments


def chosen(arguments: argparse.Namespace) -> list[tuple[Scenario, str]]:
    """The scenarios asked for, by kinds of checkpoints."""
    only = (arguments.only or "").split(",")
    return [
        (scenario, kind)
        for kind in arguments.kinds
        for scenario in SCENARIOS
        if scenario.fits(kind) and any(part in scenario.name for part in only)
    ]


class Results:
    """The object that is written, again after each row."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """With what is known before the servers are there."""
        from accel.bench import machine

        command = shlex.join(["python", "-m", "benchmarks.comfyui_workflows", *sys.argv[1:]])
        described = machine.meta(
            arguments.commit or machine.commit(), command, device=arguments.device
        )
        installation = Installation(arguments.comfyui, arguments.python)
        self.out: Path = arguments.out
        self.object: dict[str, Any] = {
            "meta": {
                **described,
                "comfyui": installation.version,
                "note": "random weights. rel_err: the worst distance from float32, of the "
                "noise that is predicted for either prompt; rel_err_host: ComfyUI's own worst; "
                "ratio: the "
                f"worst of one. Passed where no ratio is above {scenarios.RATIO:g}, or, "
                f"where the host computes in float32, no rel_err above {scenarios.CLOSE:g}",
            },
            "rows": [],
        }

    def write(self) -> None:
        """Whole, or not at all."""
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps(self.object, indent=1))
        part.replace(self.out)


@contextlib.contextmanager
def servers(arguments: argparse.Namespace, results: Results) -> Iterator[tuple[Server, Server]]:
    """The host's server and that of the truth, which on a CPU is the same."""
    installation = Installation(arguments.comfyui, arguments.python)
    scratch: Path = arguments.scratch
    models = scratch / "models"
    web = scratch / "web"  # in place of the front end, which not every Python has
    web.mkdir(parents=True, exist_ok=True)
    (web / "index.html").touch()
    flags = ["--front-end-root", str(web)]
    exact = [*flags, "--disable-dynamic-vram", "--fp32-unet"]
    flags += ["--disable-dynamic-vram"] if arguments.disable_dynamic_vram else []
    common: dict[str, Any] = {"models": models, "device": arguments.device}
    host = truth = Server(installation, scratch / "host", arguments=flags, **common)
    if arguments.device != "cpu":
        truth = Server(
            *(installation, scratch / "float32"),
            arguments=exact,
            pack=False,
            variables=EXACT,
            **common,
        )
    both = {host.folder.name: host, truth.folder.name: truth}
    results.object["meta"]["flags"] = {name: server.flags for name, server in both.items()}
    started = time.monotonic()
    try:
        failed: list[str] = []

        def start(server: Server) -> None:
            try:
                server.start()
            except Exception as error:
                failed.append(str(error))

        threads = [threading.Thread(target=start, args=(server,)) for server in both.values()]
        for thread in threads:
            thread.start()
        write_files(arguments, models)
        for thread in threads:
            thread.join()
        if failed:
            raise RuntimeError("\n".join(failed))
        results.object["meta"]["start_s"] = time.monotonic() - started
        results.object["meta"]["dynamic_vram"] = "on" if dynamic_vram(host) else "off"
        yield host, truth
    finally:
        for server in both.values():
            server.stop()


def write_files(arguments: argparse.Namespace, models: Path) -> None:
    """The large files, while the servers start. The scenarios write what is missing."""
    for kind in arguments.kinds:
        if not kind.startswith("full-"):
            continue
        large = [f"checkpoints/{kind}-a.safetensors"]
        if "inpaint" not in kind:
            large += [f"checkpoints/{kind}-b.safetensors"]
            large += [f"controlnet/{kind}-{number}.safetensors" for number in (1, 2)]
        checkpoints.ensure(models, *large)
    if arguments.device != "cpu":
        import torch

        torch.cuda.empty_cache()  # the servers need it


def dynamic_vram(host: Server) -> bool:
    """Whether that is at work, which a flag does not decide alone."""
    outputs = host.run({"1": {"class_type": "TestHost", "inputs": {}}}).outputs
    return bool(outputs["1"]["dynamic_vram"][0])


def run_all(arguments: argparse.Namespace, results: Results, host: Server, truth: Server) -> None:
    """Every scenario for every kind, whatever becomes of the others."""
    for scenario, kind in chosen(arguments):
        compare = Comparison(host, truth, kind, arguments.timeout)
        row = {"workflow": scenario.name, "kind": kind, "passed": False}
        results.object["rows"].append(row)
        run_one(results, scenario, compare, row)


def run_one(results: Results, scenario: Scenario, compare: Comparison, row: dict[str, Any]) -> None:
    """A scenario, and what its row says of it, a failure too. A stuck server starts again."""
    started = time.monotonic()
    try:
        scenario(compare)
    except Exception as error:
        row["error"] = traceback.format_exc().splitlines()[-LOG_LINES:] + compare.failed
        both = {server.folder.name: server for server in (compare.host, compare.truth)}
        row["logs"] = {name: server.log.splitlines()[-LOG_LINES:] for name, server in both.items()}
        print(f"{scenario.name}, {compare.kind}: {error}", flush=True)
        for server in both.values():
            if not server.idle():  # dead, or stuck
                server.stop()
                server.start()
    row["passed"] = "error" not in row
    row["seconds"] = time.monotonic() - started
    row.update(summary(compare))
    results.write()
    print(json.dumps({key: row[key] for key in row if key not in ("error", "logs")}), flush=True)


def summary(compare: Comparison) -> dict[str, Any]:
    """Of all accelerated runs of a scenario. `rel_err` and `rel_err_host` are each the worst."""
    errors = compare.errors
    reasons = [reason for run in compare.runs for reason in run["reasons"]]
    found: dict[str, Any] = {
        "mode": ", ".join(sorted({run["mode"] for run in compare.runs})),
        "reasons": [reason for n, reason in enumerate(reasons) if reason not in reasons[:n]],
        "graphs": sum(run["graphs"] for run in compare.runs),
        "captures": sum(run["captures"] for run in compare.runs),
        "predictions": len(errors),
        **compare.notes,
    }
    if errors:
        found["rel_err"] = max(error for error, _, _ in errors)
        found["rel_err_host"] = max(host for _, host, _ in errors)
        ratios = [(error / host, where) for error, host, where in errors if host > 0]
        if ratios:
            found["ratio"], found["worst_call"] = max(ratios)
    return found


if __name__ == "__main__":
    main()
