"""Set-up of a fresh machine, and the self-check that hosts run after installing the pack.

Called without an argument (ComfyUI-Manager and A1111 do so, with the host's own Python) it installs
nothing, never imports torch and prints one line. `demo` and `test` make a `.venv` beside this file,
install what is needed there, and run the demo or all checks in it.

Only the standard library is used, and nothing newer than Python 3.7 before the version is checked,
so that an old Python gets a clear line instead of a syntax error.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
# Written into .venv before anything else: says that the folder is ours and how far it came.
STAMP = VENV / "switchyard.json"
MINIMUM_PYTHON = (3, 10)
# Each level installs the optional dependencies of those before it too.
LEVELS = ("demo", "test")
# What tests of kernels want, in the .venv alone; a CUDA build of torch says which versions.
COMPILERS = {
    "linux": ["triton", "nvidia-cuda-nvrtc"],
    "win32": ["triton-windows", "nvidia-cuda-nvrtc"],
}
# What many installations of torch bring still: kernels must compile with it too.
OLDER_TRITON = {"linux": "triton==3.6.0"}
CHECKS = (
    ("ruff check", ["ruff", "check", "."]),
    ("ruff format", ["ruff", "format", "--check", "."]),
    ("mypy", ["mypy"]),
    ("pytest", ["pytest", "-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder"]),
)
HELP = """usage: install.py [demo | test] [arguments ...]

  (nothing)  print a one-line self-check for the Python it runs with; changes nothing
  demo ...   run the demo; arguments are its own (try: install.py demo --help)
  test ...   run ruff, mypy and pytest; arguments go to pytest

demo and test first make a .venv beside this file with all they need, if it is not there yet."""


class SetupError(Exception):
    """The set-up cannot go on. `str(error)` is one line: what is wrong and what to do."""


def version() -> str:
    """Version of the pack, from pyproject.toml."""
    match = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    if match is None:
        raise SetupError("pyproject.toml has no version: download the pack again")
    return match[1]


def dotted(numbers: tuple[int, ...]) -> str:
    """`(3, 10)` as "3.10"."""
    return ".".join(map(str, numbers))


def required() -> list[str]:
    """What every host needs beside torch: the lines of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def optional(extra: str) -> list[str]:
    """One list of `[project.optional-dependencies]` in pyproject.toml.

    Python 3.10 has no TOML reader; a TOML list of strings reads the same as a Python one.
    """
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    match = re.search(rf"^{extra} = (\[.*?^\])", text, re.M | re.S)
    if match is None:
        raise SetupError(f"pyproject.toml has no extra {extra!r}: download the pack again")
    return list(ast.literal_eval(match[1]))


def self_check() -> str:
    """One line for a host: versions, and what is missing. Installs and imports nothing."""
    head = f"Switchyard {version()}: python {dotted(sys.version_info[:2])}"
    if sys.version_info[:2] < MINIMUM_PYTHON:
        return f"{head} is too old, {dotted(MINIMUM_PYTHON)} or newer is needed"
    missing = []
    for line in required():
        name = re.split(r"[^A-Za-z0-9._-]", line)[0]
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return f"{head}, missing {', '.join(missing)}: run 'pip install -r requirements.txt'"
    return f"{head}, dependencies present, ready"


def venv_python() -> Path:
    """Path of the interpreter in .venv, whether it exists or not."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def older_triton() -> Path:
    """Where the older Triton lies, apart from the one that is imported by default."""
    return VENV / "older-triton"


def say(line: str) -> None:
    """A progress line, in order with what child processes print."""
    print(f"switchyard: {line}", flush=True)


def fingerprint() -> str:
    """Hash of all that is to be installed, for any level."""
    older = OLDER_TRITON.get(sys.platform, "")
    wanted = (required(), *map(optional, LEVELS), COMPILERS.get(sys.platform, []), [older])
    parts = ["\n".join(names) for names in wanted]
    parts.append((ROOT / "constraints.txt").read_text("utf-8"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def interpreter() -> str:
    """What a .venv is bound to: it has to be made anew for another Python or in another folder."""
    return f"{dotted(sys.version_info[:2])} {VENV}"


def read_stamp() -> dict[str, str]:
    """The stamp of .venv: `state` ("installing" or "ready"), `level`, `fingerprint`, `interpreter`.

    Empty when it is missing or damaged.
    """
    try:
        stamp = json.loads(STAMP.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(state: str, level: str) -> None:
    """Say in .venv how far it came."""
    content = {
        "state": state,
        "level": level,
        "fingerprint": fingerprint(),
        "interpreter": interpreter(),
    }
    STAMP.write_text(json.dumps(content) + "\n", "utf-8")


def run_step(command: list[str], what: str) -> None:
    """Run one step of the set-up, showing its output; SetupError with its last error line."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}
    # A host's launcher may export these; they would send the packages to another place.
    for name in ("PIP_PREFIX", "PIP_TARGET", "PIP_USER", "PYTHONHOME"):
        environment.pop(name, None)
    errors = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip():
                errors.append(line.strip())
                print(line, end="", file=sys.stderr, flush=True)
    if process.returncode == 0:
        return
    free = shutil.disk_usage(ROOT).free
    if any("No space left" in line or "Errno 28" in line for line in errors) or free < 2**26:
        raise SetupError(
            f"{what} failed: the disk is full ({free / 2**30:.1f} GiB free at {ROOT}); "
            "make room (up to 8 GiB with CUDA) and run the same command again"
        )
    reasons = [line for line in errors if line.startswith("ERROR:")] or errors
    reason = reasons[-1].replace("ERROR: ", "") if reasons else f"exit code {process.returncode}"
    raise SetupError(f"{what} failed: {reason}; mend that and run the same command again")


def make_venv(level: str) -> None:
    """Make .venv hold everything that `level` needs; returns at once if it already does.

    A folder left half-made is made anew, an outdated one is brought up to date.
    Raises SetupError with one clear line.
    """
    if VENV.exists() and not STAMP.exists() and any(VENV.iterdir()):
        raise SetupError(f"{VENV} was not made by install.py: move it away and run this again")
    stamp = read_stamp()
    if stamp.get("level") in LEVELS:  # never take away what an earlier call installed
        level = max(level, stamp["level"], key=LEVELS.index)
    whole = (
        stamp.get("state") == "ready"
        and stamp.get("interpreter") == interpreter()
        and venv_python().exists()
    )
    if whole and (stamp.get("level"), stamp.get("fingerprint")) == (level, fingerprint()):
        return
    if not whole and VENV.exists():
        say(f"{VENV} is half-made, or made for another Python or folder: making it anew")
        shutil.rmtree(VENV)
    VENV.mkdir(exist_ok=True)
    write_stamp("installing", level)
    if not whole:
        say(f"[1/2] making {VENV}")
        try:
            run_step([sys.executable, "-m", "venv", str(VENV)], "python -m venv")
        except SetupError as error:
            hint = "; on Debian and Ubuntu: apt install python3-venv" if os.name == "posix" else ""
            raise SetupError(f"{error}{hint}") from None
    packages = ["torch", *required()]
    for name in LEVELS[: LEVELS.index(level) + 1]:
        packages += optional(name)
    if level == "test":
        packages += COMPILERS.get(sys.platform, [])
    say(f"[2/2] installing torch and {len(packages) - 1} packages: minutes, gigabytes with CUDA")
    pip = [str(venv_python()), "-m", "pip", "install", "-c", str(ROOT / "constraints.txt")]
    run_step([*pip, *packages], "pip install")
    if level == "test" and sys.platform in OLDER_TRITON:
        apart = ["--no-deps", "--upgrade", "--target", str(older_triton())]
        run_step([*pip[:4], *apart, OLDER_TRITON[sys.platform]], "pip install")
    write_stamp("ready", level)
    say("set-up complete")


def run_demo(arguments: list[str]) -> int:
    """`python -m accel demo` in .venv, from the caller's folder so that its file paths hold."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [str(venv_python()), "-m", "accel", "demo", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def run_checks(pytest_arguments: list[str]) -> int:
    """Every check in .venv, also after one failed; 0 if all passed, else 1."""
    failed = []
    for name, command in CHECKS:
        say(name)
        extra = pytest_arguments if name == "pytest" else []
        step = [str(venv_python()), "-m", *command, *extra]
        if subprocess.run(step, cwd=ROOT, check=False).returncode != 0:
            failed.append(name)
    say(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


def main(arguments: list[str]) -> int:
    """Exit code of one call. Without a command it is always 0: a host must not stop over it."""
    if not arguments:
        try:
            print(self_check())
        except (OSError, SetupError) as error:
            print(f"Switchyard: self-check failed: {error}")
        return 0
    command, *rest = arguments
    if command in ("-h", "--help"):
        print(HELP)
        return 0
    if command not in LEVELS:
        print(f"install.py: unknown argument {command!r}: try --help", file=sys.stderr)
        return 2
    try:
        if sys.version_info[:2] < MINIMUM_PYTHON:
            raise SetupError(
                f"Python {dotted(MINIMUM_PYTHON)} or newer is needed, this is "
                f"{platform.python_version()}: run it with a newer one"
            )
        make_venv(command)
    except (OSError, SetupError) as error:
        print(f"install.py: {error}", file=sys.stderr)
        return 1
    return run_demo(rest) if command == "demo" else run_checks(rest)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("install.py: stopped; the same command goes on from here")
