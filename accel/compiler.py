"""The compiler on one screen: a network's structure to its plan.

    host model --capture--> ATen graph --passes--> graph of fused operators --lower--> plan

A plan depends on the structure alone, not on weights, image size or GPU. It is looked for with the
pack, then in the disk cache, and only then made.
"""

from __future__ import annotations

import json
import logging
import time
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from .cache import DiskCache
from .capture import Progress, ResidualMarker, capture
from .errors import InvalidPlan, UnsupportedModel
from .models.twin import unet_twin
from .passes import PASSES, run_passes
from .plan.lower import lower
from .plan.schema import PLAN_VERSION, Plan
from .structure import Structure

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "plan" / "shipped"
"""Plans of the published families, one JSON file each, made by
`python -m benchmarks.make_shipped_plans`."""

Made = tuple[Plan, str]
"""A plan and where it came from: "shipped", "cache" or "built"."""


def compile_network(
    structure: Structure,
    network: nn.Module | type[nn.Module],
    progress: Progress | None = None,
) -> Plan:
    """Make the plan of a UNet or ControlNet: seconds for a tiny one, up to a minute for SDXL.

    network: the live module, of which a twin without weights is traced, or the diffusers class.
    Raises `UnsupportedModel` when it cannot be captured.
    """
    if structure.config is None:
        raise UnsupportedModel("only UNets and ControlNets of Stable Diffusion can be compiled yet")
    started = time.perf_counter()
    _tell(progress, 0.0, "copying the structure")
    twin = unet_twin(structure.config, network, ResidualMarker)
    graph = capture(twin, progress)
    done = iter(range(1, len(PASSES) + 1))
    run_passes(graph, lambda name: _tell(progress, 0.95 + 0.04 * next(done) / len(PASSES), name))
    plan = lower(graph, identity(structure))
    _tell(progress, 1.0, "done")
    logger.info(
        "compiled %s in %.1f s: %d steps",
        structure.family or structure.graph_key,
        time.perf_counter() - started,
        len(plan.steps),
    )
    return plan


def identity(structure: Structure) -> dict[str, Any]:
    """What a plan records of the structure it was made for."""
    assert structure.config is not None
    return {
        "kind": structure.kind,
        "family": structure.family,
        "graph_key": structure.graph_key,
        "shape_key": structure.shape_key,
        "config": structure.config.to_json(),
    }


def plan_for(
    structure: Structure,
    network: nn.Module | type[nn.Module],
    cache: DiskCache,
    progress: Progress | None = None,
) -> Made:
    """The plan of `structure`: shipped, cached, or built now and cached.

    However many threads and processes ask at once, one builds and the others fetch.
    """
    plan = shipped_plan(structure)
    if plan is not None:
        return plan, "shipped"
    assert structure.graph_key is not None
    built: list[Plan] = []

    def build() -> dict[str, Any]:
        built.append(compile_network(structure, network, progress))
        return built[0].to_json()

    data, fetched = cache.get_or_build(structure.graph_key, "plan", build)
    if not fetched:
        return built[0], "built"
    try:
        return Plan.from_json(data), "cache"
    except InvalidPlan as error:
        logger.warning("a cached plan is rebuilt: %s", error)
        cache.remove(structure.graph_key)
        data, _ = cache.get_or_build(structure.graph_key, "plan", build)
        return Plan.from_json(data), "built"


def shipped_plan(structure: Structure) -> Plan | None:
    """The plan that comes with the pack for this very structure, if there is one."""
    if structure.family is None or structure.graph_key is None:
        return None
    plan = _shipped(structure.family)
    if plan is None or plan.structure.get("graph_key") != structure.graph_key:
        return None
    return plan


@cache
def _shipped(family: str) -> Plan | None:
    path = SHIPPED / f"{family}.json"
    try:
        return Plan.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, InvalidPlan) as error:
        logger.warning("the shipped plan %s is ignored: %s", path.name, error)
        return None


def open_cache(root: Path | None, limit_bytes: int | None) -> DiskCache:
    """The disk cache of plans, apart for each version of the plan format."""
    return DiskCache(root, limit_bytes, f"plan{PLAN_VERSION}")


def _tell(progress: Progress | None, fraction: float, what: str) -> None:
    if progress is not None:
        progress(fraction, what)
