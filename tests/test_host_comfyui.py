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


_FILES = sorted(path.name for path in (_ROOT / "tests" / "comfyui").glob("test_*.py"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and engines that all files and versions share, whichever worker runs them."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return folder / "comfyui"


@pytest.mark.comfyui
@pytest.mark.parametrize(
    "installation", installations(), ids=lambda installation: installation.version
)
@pytest.mark.parametrize("file", _FILES)
def test_inside_comfyui(
    installation: Installation, file: str, shared: Path, tmp_path: Path
) -> None:
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
            *(
                "-m",
                "pytest",
                f"tests/comfyui/{file}",
                "-q",
                "-p",
                "no:cacheprovider",
                "--tb=short",
            ),
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
