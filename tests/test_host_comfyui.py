"""Runs the tests of `comfyui/` inside every ComfyUI that COMFYUI_PATH names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui.server import Installation, environment, installations, why_not

_ROOT = Path(__file__).parents[1]

_SERVED = [
    f"test_{name}.py"
    for name in ("infrastructure", "pack", "audition", "tiny_world", "workflows", "never_wait")
]
"""The files whose tests want a server; one serves them all, on which pack's find no run yet."""

_OTHERS = sorted(
    {path.name for path in (_ROOT / "tests" / "comfyui").glob("test_*.py")} - {*_SERVED}
)


@pytest.mark.comfyui
@pytest.mark.parametrize(
    "installation", installations(), ids=lambda installation: installation.version
)
@pytest.mark.parametrize("files", [_SERVED, _OTHERS], ids=["served", "others"])
def test_inside_comfyui(
    installation: Installation, files: list[str], run_folder: Path, tmp_path: Path
) -> None:
    """In a process for each part: to import ComfyUI takes as long as many a file's tests.

    All parts and versions share checkpoints and engines.
    """
    shared = run_folder / "comfyui"
    reason = why_not(installation)
    if reason is not None:
        pytest.skip(reason)
    variables = environment(tmp_path)
    for name in [name for name in variables if name.startswith("PYTEST_")]:
        del variables[name]  # of the run around this one
    variables["COMFYUI_ROOT"] = str(installation.root)
    variables["SWITCHYARD_CACHE_DIR"] = variables["COMFYUI_TEST_CACHE"] = str(shared / "cache")
    variables["COMFYUI_TEST_MODELS"] = os.environ.get("COMFYUI_TEST_MODELS", str(shared / "models"))
    done = subprocess.run(
        [
            installation.python,
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"),
            *(f"tests/comfyui/{file}" for file in files),
            f"--basetemp={tmp_path / 'inside'}",
        ],
        cwd=_ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-12000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) > 0, output[-4000:]


@pytest.mark.gpu
@pytest.mark.comfyui
@pytest.mark.parametrize(
    "installation", installations(), ids=lambda installation: installation.version
)
def test_full_size_workflows_on_a_gpu(installation: Installation, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.comfyui_workflows", "--out", str(out)),
            *("--comfyui", str(installation.root), "--python", str(installation.python)),
            *("--kinds", "full-sd15"),
        ],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-12000:]
