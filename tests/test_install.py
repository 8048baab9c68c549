from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import install

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


TEST = ["pip", "pip"] if sys.platform in install.OLDER_TRITON else ["pip"]
"""Steps of the set-up for tests: a second one where kernels are tried with an older Triton."""


class Machine:
    """A copy of the files install.py reads, and a record of the steps it takes instead of them."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.venv = root / ".venv"
        self.stamp = self.venv / "switchyard.json"
        self.constraints = root / "constraints.txt"
        self.steps: list[list[str]] = []
        self.fail_at = ""
        for name in ("pyproject.toml", "requirements.txt", "constraints.txt"):
            shutil.copy(ROOT / name, root / name)
        monkeypatch.setattr(install, "ROOT", root)
        monkeypatch.setattr(install, "VENV", self.venv)
        monkeypatch.setattr(install, "STAMP", self.stamp)
        monkeypatch.setattr(install, "run_step", self.run_step)

    def run_step(self, command: list[str], what: str) -> None:
        self.steps.append(command)
        if what == self.fail_at:
            raise install.SetupError(f"{what} failed")
        if what == "python -m venv":
            install.venv_python().parent.mkdir(parents=True)
            install.venv_python().touch()

    def make(self, level: str) -> list[str]:
        """The steps that `make_venv` takes: "venv", "pip"."""
        self.steps.clear()
        install.make_venv(level)
        return ["venv" if "venv" in step else "pip" for step in self.steps]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "install.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_hosts_and_packagers_install_the_same_without_torch() -> None:
    assert install.required() == PROJECT["dependencies"]
    for wanted in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        assert not [name for name in wanted if re.match(r"(torch|triton)\b", name)]
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.M)


def test_pyproject_is_read_as_toml_readers_do() -> None:
    assert install.version() == PROJECT["version"]
    assert {*install.LEVELS, "bench", "cudnn", "web"} == set(PROJECT["optional-dependencies"])
    for extra, packages in PROJECT["optional-dependencies"].items():
        assert install.optional(extra) == packages


def test_only_the_standard_library_is_imported() -> None:
    tree = ast.parse((ROOT / "install.py").read_text("utf-8"))
    names = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert names and {str(name).split(".")[0] for name in names} <= sys.stdlib_module_names


def test_self_check_is_one_line_and_exit_0() -> None:
    done = call()
    assert done.returncode == 0 and done.stderr == ""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert done.stdout == (
        f"Switchyard {PROJECT['version']}: python {python}, dependencies present, ready\n"
    )


def test_self_check_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in ("xxhash", "filelock"):
            raise install.importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(install.importlib.metadata, "version", version)
    assert "missing filelock, xxhash: run 'pip install -r" in install.self_check()


def test_self_check_never_stops_a_host(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    (install.ROOT / "pyproject.toml").unlink()
    assert install.main([]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert machine.steps == []


def test_unknown_argument() -> None:
    done = call("tset")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "install.py: unknown argument 'tset': try --help\n"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(flag: str) -> None:
    done = call(flag)
    assert done.returncode == 0 and "demo" in done.stdout and "test" in done.stdout


def test_python_that_is_too_old(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 18))
    assert install.main(["demo"]) == 1
    error = capsys.readouterr().err
    assert "Python 3.10 or newer is needed" in error and error.count("\n") == 1
    assert install.main([]) == 0
    assert "too old" in capsys.readouterr().out
    assert machine.steps == []


def test_a_fresh_machine_gets_everything_once(machine: Machine) -> None:
    assert machine.make("demo") == ["venv", "pip"]
    pip = machine.steps[1]
    assert pip[pip.index("-c") + 1] == str(machine.constraints)
    assert {"torch", *PROJECT["dependencies"]} < set(pip)
    assert not {"pytest", "ruff", "mypy", "triton"} & set(pip)
    assert machine.make("demo") == []


def test_test_adds_to_demo_and_demo_takes_nothing_away(machine: Machine) -> None:
    machine.make("demo")
    assert machine.make("test") == TEST
    assert {*install.optional("demo"), *install.optional("test")} < set(machine.steps[0])
    assert set(install.COMPILERS.get(sys.platform, [])) <= set(machine.steps[0])
    assert machine.make("demo") == []
    machine.constraints.write_text("torch==2.14.0\n")
    assert machine.make("demo") == TEST
    assert "mypy" in machine.steps[0]


def test_an_older_triton_lies_apart(machine: Machine) -> None:
    machine.make("test")
    older = install.OLDER_TRITON.get(sys.platform)
    if older is None:
        assert not any("--target" in step for step in machine.steps)
        return
    step = machine.steps[-1]
    assert older in step and "--no-deps" in step
    assert step[step.index("--target") + 1] == str(install.older_triton())
    assert install.older_triton().parent == machine.venv


def test_a_half_made_venv_is_made_anew(machine: Machine) -> None:
    machine.fail_at = "pip install"
    with pytest.raises(install.SetupError):
        machine.make("demo")
    machine.fail_at = ""
    (machine.venv / "left-over").touch()
    assert machine.make("demo") == ["venv", "pip"]
    assert not (machine.venv / "left-over").exists()


def test_an_update_that_stopped_is_made_anew(machine: Machine) -> None:
    machine.make("demo")
    machine.fail_at = "pip install"
    with pytest.raises(install.SetupError):
        machine.make("test")
    machine.fail_at = ""
    assert machine.make("test") == ["venv", *TEST]


@pytest.mark.parametrize("harm", ["damage the stamp", "remove python", "another python"])
def test_a_venv_that_cannot_work_is_made_anew(
    machine: Machine, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.make("demo")
    if harm == "damage the stamp":
        machine.stamp.write_text("{")
    elif harm == "remove python":
        install.venv_python().unlink()
    else:
        monkeypatch.setattr(install.sys, "version_info", (3, 99, 0))
    assert machine.make("demo") == ["venv", "pip"]


def test_a_venv_of_the_user_is_left_alone(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.venv.mkdir()
    (machine.venv / "pyvenv.cfg").write_text("mine")
    assert install.main(["test"]) == 1
    error = capsys.readouterr().err
    assert "was not made by install.py" in error and error.count("\n") == 1
    assert machine.steps == [] and (machine.venv / "pyvenv.cfg").read_text() == "mine"


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("ERROR: No matching distribution found for torch==2.13.0\nnote", "No matching"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "the disk is full"),
        ("something", "something"),
        ("", "exit code 3"),
    ],
)
def test_a_step_that_fails_is_one_clear_line(
    printed: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code = f"import sys; print({printed!r}, file=sys.stderr); sys.exit(3)"
    with pytest.raises(install.SetupError) as caught:
        install.run_step([sys.executable, "-c", code], "pip install")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("pip install failed: ")
    assert printed in capfd.readouterr().err  # what pip said is shown too


def test_a_host_s_settings_do_not_send_packages_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIP_TARGET", "elsewhere")
    install.run_step(
        [sys.executable, "-c", "import os; assert 'PIP_TARGET' not in os.environ"], "looking"
    )


def test_a_full_disk_is_one_clear_line(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    assert install.main(["demo"]) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1


def record_runs(monkeypatch: pytest.MonkeyPatch, failing: str = "") -> list[Any]:
    """Replace the commands of the last stage by a record; the one that has `failing` fails."""
    runs: list[Any] = []

    def run(command: list[str], **named: Any) -> SimpleNamespace:
        runs.append(SimpleNamespace(command=command, **named))
        return SimpleNamespace(returncode=int(bool(failing) and failing in command))

    monkeypatch.setattr(install.subprocess, "run", run)
    return runs


def test_demo_runs_in_the_callers_folder_with_its_arguments(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = record_runs(monkeypatch)
    assert install.main(["demo", "--checkpoint", "a.safetensors", "--help"]) == 0
    (run,) = runs
    python = str(install.venv_python())
    assert run.command[:4] == [python, "-m", "accel", "demo"]
    assert run.command[4:] == ["--checkpoint", "a.safetensors", "--help"]
    assert not hasattr(run, "cwd")
    assert run.env["PYTHONPATH"].split(os.pathsep)[0] == str(install.ROOT)


def test_every_check_runs_even_after_one_failed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = record_runs(monkeypatch, failing="mypy")
    assert install.main(["test", "-k", "cache"]) == 1
    assert [run.command[2] for run in runs] == ["ruff", "ruff", "mypy", "pytest"]
    assert runs[-1].command[-2:] == ["-k", "cache"] and runs[0].command[-1] == "."
    assert capsys.readouterr().out.endswith("switchyard: failed: mypy\n")
    record_runs(monkeypatch)
    assert install.main(["test"]) == 0


def test_the_root_can_be_imported_as_comfyui_does() -> None:
    """ComfyUI imports the folder under its path; nothing heavy may come with that."""
    code = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location(
    sys.argv[1], sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]]
)
module = importlib.util.module_from_spec(spec)
sys.modules[sys.argv[1]] = module
spec.loader.exec_module(module)
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], check=False)
    assert done.returncode == 0
