"""Who may import whom. The rules are data; a new part of the package needs one line in LAYERS."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Importable by every part; they import only each other.
LEAVES = {"background", "cache", "errors", "hardware", "processes", "settings", "tensorfile"}

# Part of accel/ (a file or a folder) or folder of hosts' files -> the parts it may import.
LAYERS: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES},
    "models": set(),
    "lora": set(),
    "structure": {"models"},
    "ops": set(),
    "kernels": {"ops"},
    "plan": {"ops"},
    "tuning": {"kernels", "ops"},
    "passes": {"ops", "plan"},
    "runtime": {"kernels", "ops", "plan", "tuning"},
    "capture": {"models", "ops", "plan"},
    "compiler": {"capture", "lora", "models", "passes", "plan", "runtime", "structure", "tuning"},
    "sheet": set(),
    "sources": {"models", "runtime", "structure"},
    "session": {
        *("capture", "compiler", "lora", "models", "plan", "runtime", "sources", "structure"),
        "tuning",
    },
    "accel": {"compiler", "session", "structure"},  # accel/__init__.py: the public surface
    "hosts": {
        *("accel", "compiler", "lora", "models", "plan", "runtime", "sheet", "sources"),
        "structure",
    },
    "demo": {"accel", "lora", "models", "sheet", "structure"},
    "bench": {"accel", "kernels", "models", "tuning"},
    "cli": {
        *("accel", "bench", "compiler", "demo", "lora", "models", "plan", "runtime", "structure"),
        "tuning",
    },
    "__main__": {"cli"},
    "nodes": {"accel", "hosts"},
    "scripts": {"accel", "hosts"},
    "entry": {"nodes"},  # the root __init__.py that ComfyUI loads
}

# What comes with every install: requirements.txt, torch and what torch itself requires.
EVERYWHERE = {"filelock", "numpy", "psutil", "rich", "safetensors", "sympy", "torch", "tqdm"}
EVERYWHERE |= {"xxhash"}

# Parts whose third-party imports are fewer still.
ONLY = {"lora": {"numpy", "torch"}, "models": {"numpy", "torch"}}

# Third-party packages -> the modules, with all inside them, that alone may import them.
RESTRICTED: dict[tuple[str, ...], set[str]] = {
    ("triton",): {"accel.kernels"},
    ("cudnn",): {"accel.kernels.cudnn"},
    (
        *("comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "server"),
        *("ldm_patched", "modules"),
    ): {"__init__", "accel.hosts", "nodes", "scripts"},
    ("PIL",): {"accel.demo", "accel.sheet"},
    ("accelerate", "diffusers", "peft", "transformers"): {
        "accel.bench",
        "accel.cli",
        "accel.demo",
        "accel.hosts.comfyui.build_process",
        "accel.hosts.diffusers",
    },
    ("aiohttp",): {"accel.hosts.comfyui.routes"},
    ("matplotlib",): {"accel.bench.plot"},
}


# Line, whether it is relative, and the dotted name, from the repository's root if so.
Import = tuple[int, bool, tuple[str, ...]]


def imports(module: tuple[str, ...], is_package: bool, source: str) -> Iterator[Import]:
    """Every import in a file, wherever it stands: in functions, under conditions, by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, False, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base: tuple[str, ...] = ()
            if node.level:
                package = module if is_package else module[:-1]
                base = package[: len(package) - node.level + 1]
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                yield node.lineno, bool(node.level), (*base, alias.name)
        elif isinstance(node, ast.Call) and node.args:
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else None
            name = function.id if isinstance(function, ast.Name) else name
            what = node.args[0]
            if (
                name in ("import_module", "__import__")
                and isinstance(what, ast.Constant)
                and isinstance(what.value, str)
            ):
                yield node.lineno, False, tuple(what.value.split("."))


def part_of(name: tuple[str, ...]) -> str:
    """The key of LAYERS that a dotted name inside the repository belongs to."""
    if name[0] != "accel":
        return "entry" if name[0] == "__init__" else name[0]
    return name[1] if len(name) > 1 and name[1] in LAYERS else "accel"


def violations(path: str, source: str) -> list[str]:
    """What one file (its path from the repository's root) imports against the rules."""
    parts = Path(path).with_suffix("").parts
    is_package = parts[-1] == "__init__" and len(parts) > 1
    module = parts[:-1] if is_package else parts
    if parts == ("__init__",):  # the root is a package itself, with an empty dotted name here
        module, is_package, part = (), True, "entry"
    elif len(module) > 1 and module[0] == "accel" and module[1] not in LAYERS:
        return [f"{path}: {module[1]!r} has no place in LAYERS"]
    else:
        part = part_of(module)
    dotted = ".".join(module) or "__init__"

    found = []
    for line, relative, name in imports(module, is_package, source):
        where, what = f"{path}:{line}", ".".join(name)
        if relative or name[0] == "accel":
            # ComfyUI loads the pack under the name of its folder: there is no `accel` to import.
            if not relative and part != "scripts":
                found.append(f"{where}: {what}: import it relatively")
            target = part_of(name)
            if target not in {part} | LAYERS[part] | LEAVES:
                found.append(f"{where}: {part} may not import {target} ({what})")
            continue
        package = name[0]
        if package in sys.stdlib_module_names:
            continue
        places = next((who for names, who in RESTRICTED.items() if package in names), None)
        if places is not None:
            if not any(f"{dotted}.".startswith(f"{place}.") for place in places):
                found.append(f"{where}: only {', '.join(sorted(places))} may import {package}")
        elif package not in ONLY.get(part, EVERYWHERE):
            found.append(f"{where}: {part} may not depend on {package}")
    return found


def source_files() -> list[Path]:
    """Every file that the rules are about."""
    folders = [ROOT / name for name in ("accel", "nodes", "scripts")]
    return [ROOT / "__init__.py", *(path for folder in folders for path in folder.rglob("*.py"))]


def test_every_file_keeps_the_rules() -> None:
    files = source_files()
    assert len(files) > 5
    found = []
    for path in sorted(files):
        name = path.relative_to(ROOT).as_posix()
        found += violations(name, path.read_text("utf-8"))
    assert not found, "\n".join(["", *found])


def test_the_layers_have_no_cycle() -> None:
    order = list(TopologicalSorter(LAYERS).static_order())
    assert set(order) == set(LAYERS)
    assert not [leaf for leaf in LEAVES if LAYERS[leaf]]


def test_what_is_allowed_everywhere_is_what_gets_installed() -> None:
    required = set((ROOT / "requirements.txt").read_text("utf-8").split())
    assert required | {"sympy", "torch"} == EVERYWHERE


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        # upwards and sideways
        ("accel/ops/linear.py", "from ..kernels import gemm", "ops may not import kernels"),
        ("accel/ops/__init__.py", "from ..plan.schema import Step", "ops may not import plan"),
        ("accel/kernels/gemm.py", "from .. import plan", "kernels may not import plan"),
        ("accel/plan/schema.py", "from ..passes import PASSES", "plan may not import passes"),
        ("accel/passes/a.py", "from ..runtime.arena import A", "passes may not import runtime"),
        ("accel/runtime/a.py", "from ..passes import PASSES", "runtime may not import passes"),
        ("accel/runtime/graphs/a.py", "from ... import passes", "runtime may not import passes"),
        ("accel/capture.py", "from .passes import ir", "capture may not import passes"),
        ("accel/models/unet.py", "from ..structure import s", "models may not import structure"),
        ("accel/lora/kohya.py", "from ..models import unet", "lora may not import models"),
        ("accel/structure.py", "from .lora import kohya", "structure may not import lora"),
        ("accel/compiler.py", "from .hosts import comfyui", "compiler may not import hosts"),
        ("accel/compiler.py", "from . import Session", "compiler may not import accel"),
        ("accel/hosts/comfyui.py", "from ...nodes import load", "hosts may not import nodes"),
        ("nodes/load.py", "from ..accel.runtime import a", "nodes may not import runtime"),
        ("__init__.py", "from .accel import Session", "entry may not import accel"),
        # leaves
        ("accel/cache.py", "from .models import unet", "cache may not import models"),
        ("accel/errors.py", "from . import structure", "errors may not import structure"),
        # hidden ones
        (
            "accel/ops/a.py",
            "def f():\n    from ..kernels import gemm",
            "ops may not import kernels",
        ),
        ("accel/ops/a.py", "if TYPE_CHECKING:\n    from .. import plan", "ops may not import plan"),
        ("accel/ops/a.py", "try:\n    import triton\nexcept ImportError: pass", "import triton"),
        ("accel/ops/a.py", "import importlib\nimportlib.import_module('comfy.ops')", "comfy"),
        ("accel/ops/a.py", "__import__('triton')", "import triton"),
        ("accel/ops/a.py", "import math, comfy.ops as o", "import comfy"),
        # third parties
        ("accel/runtime/a.py", "import triton.language as tl", "only accel.kernels"),
        ("accel/compiler.py", "from comfy.ops import x", "only __init__, accel.hosts, nodes"),
        ("accel/__main__.py", "import modules", "import modules"),
        ("accel/hosts/comfyui.py", "import diffusers", "accel.hosts.diffusers may import"),
        ("accel/hosts/diffusers_like.py", "import diffusers", "accel.hosts.diffusers may import"),
        ("accel/models/unet.py", "from diffusers import UNet2DConditionModel", "import diffusers"),
        ("accel/models/unet.py", "import rich", "models may not depend on rich"),
        ("accel/lora/kohya.py", "import safetensors", "lora may not depend on safetensors"),
        ("accel/compiler.py", "import requests", "compiler may not depend on requests"),
        # the name that exists in no host
        ("accel/passes/a.py", "from accel.plan import schema", "import it relatively"),
        ("accel/hosts/comfyui.py", "import accel", "import it relatively"),
        ("nodes/load.py", "from accel.hosts import comfyui", "import it relatively"),
        # a part nobody placed
        ("accel/helpers.py", "", "'helpers' has no place in LAYERS"),
        ("accel/misc/a.py", "", "'misc' has no place in LAYERS"),
    ],
)
def test_a_planted_violation_is_found(path: str, source: str, complaint: str) -> None:
    found = violations(path, source)
    assert found and complaint in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("accel/ops/linear.py", "import math\nimport torch\nfrom ..errors import InvalidPlan"),
        ("accel/ops/__init__.py", "from .linear import linear\nfrom . import linear"),
        ("accel/passes/layout.py", "from ..plan.recipe import Cat\nfrom .. import ops\n"),
        ("accel/runtime/arena.py", "from ..kernels import registry\nfrom ..plan import schema"),
        ("accel/capture.py", "from .models import unet\nfrom . import errors"),
        ("accel/cache.py", "import xxhash\nfrom .settings import settings"),
        ("accel/kernels/gemm.py", "import triton\nimport triton.language as tl"),
        ("accel/__init__.py", "from .compiler import Session\nfrom .structure import Structure"),
        ("accel/hosts/diffusers.py", "import diffusers\nfrom .. import Session"),
        ("accel/hosts/comfyui/wrap.py", "import comfy.ops\nfrom ...compiler import Session"),
        ("accel/demo.py", "from PIL import Image\nimport diffusers\nfrom . import Session"),
        ("nodes/load.py", "from ..accel.hosts import comfyui\nfrom comfy_api.latest import io"),
        ("scripts/switchyard.py", "from modules import scripts\nfrom accel.hosts import a1111"),
        ("__init__.py", "from comfy_api.latest import io\nfrom .nodes import NODES"),
    ],
)
def test_what_the_design_allows_is_not_complained_about(path: str, source: str) -> None:
    assert violations(path, source) == []
