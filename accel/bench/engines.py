"""The engine as a variant: its forward, and what it alone has to show.

What an engine's report does not tell is looked up here in its network: the executables of its
shapes, their captured graphs, and the seconds that the selector measured.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import Engine, Session
from ..kernels import Call
from ..tuning import Choice
from .networks import LORA_STRENGTH, Case, Inputs, Networks, forward, random_lora
from .timing import launches

Entry = tuple[str, str, Call, Choice]
"""Network ("unet", "controlnet"), part ("prompt", "step"), call and choice."""


@dataclass
class TuningClock:
    """Seconds for which the selector timed candidates, and for how many calls."""

    seconds: float = 0.0
    calls: int = 0


@contextmanager
def tuning_clock(session: Session) -> Iterator[TuningClock]:
    """Counts what is measured while the block runs."""
    clock, selector = TuningClock(), session._selector
    measure = selector._measure

    def timed(calls: Any) -> None:
        started = time.perf_counter()
        try:
            measure(calls)
        finally:
            clock.seconds += time.perf_counter() - started
            clock.calls += len(calls)

    vars(selector)["_measure"] = timed
    try:
        yield clock
    finally:
        vars(selector)["_measure"] = measure


class EngineVariant:
    """Engines of a case's networks, called one after the other as a pipeline does.

    The modules should be on the CPU, where they stay. A LoRA is merged by the engine itself.
    """

    def __init__(
        self,
        case: Case,
        networks: Networks,
        device: torch.device,
        cache_dir: Path | None = None,
        session: Session | None = None,
    ) -> None:
        self.case = case
        self.session = session or Session(device, case.precision, cache_dir)
        started = time.perf_counter()
        self.unet = self.session.engine(networks.unet)
        self.controlnets = [self.session.engine(network) for network in networks.controlnets]
        self.ready_seconds = time.perf_counter() - started
        if case.loras:
            self.unet.set_loras([(random_lora(case.config), LORA_STRENGTH)])

    def __call__(self, inputs: Inputs, key: object | None = None) -> Tensor:
        """One forward. With a key, the prompt's part is skipped while the key stays the same."""
        controlnets = [
            _as_module(engine, key if key is None else (key, index))
            for index, engine in enumerate(self.controlnets)
        ]

        def unet(**arguments: Any) -> tuple[Tensor]:
            return (self.unet.call((), arguments, key),)

        return forward(unet, controlnets, inputs)

    def without_control(self, inputs: Inputs) -> Tensor:
        """The UNet alone."""
        result: Tensor = self.unet.call((), inputs.arguments)
        return result

    def executables(self) -> list[tuple[str, int, Any]]:
        """What is bound so far: the network's name, how often a forward runs it, and it itself."""
        found = [("unet", 1, one) for one in executables(self.unet)]
        if self.controlnets:  # they share one network, since they are of one structure
            count = len(self.controlnets)
            found += [("controlnet", count, one) for one in executables(self.controlnets[0])]
        return found

    def facts(self) -> dict[str, Any]:
        """What the reports say, of a session that has run one size so far."""
        report = self.unet.report()
        engines = [self.unet, *self.controlnets[:1]]
        names: Counter[str] = Counter()
        for _, times, executable in self.executables():
            for name, count in executable.kernels().items():
                names[name] += times * count
        return {
            "engine_ready_s": self.ready_seconds,
            "plan_source": report["source"],
            "captures": report["captures"],
            "bind_s": sum(one.seconds for _, _, one in self.executables()),
            "weights_mib": sum(e.report()["weights_bytes"] for e in engines) >> 20,
            "activation_mib": sum(e.report()["activation_bytes"] for e in engines) >> 20,
            "calls": sum(names.values()),
            "kernels_by_name": dict(names.most_common()),
        }


def _as_module(engine: Engine, key: object | None) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        return engine.call((), arguments, key)

    return call


def executables(engine: Engine) -> list[Any]:
    """The executables of every shape that an engine's network has bound, the oldest first."""
    return list(engine._network._executables.values())


def entries(bound: list[tuple[str, int, Any]]) -> list[Entry]:
    """Every kernel call of one forward without a key, in order."""
    return [
        (network, part, call, choice)
        for network, times, executable in bound
        for _ in range(times)
        for part, call, choice in executable.calls()
    ]


def graph_launches(executable: Any, device: torch.device) -> dict[str, int] | None:
    """Kernels in the captured graphs, by part."""
    if executable._graphs is None:
        return None
    found = {}
    for part, graph in zip(("prompt", "step"), executable._graphs, strict=True):
        counted = launches(graph.replay, device)
        if counted is None:
            return None
        found[part] = sum(counted.values())
    return found
