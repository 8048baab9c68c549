"""One training run against the clock: a CUDA graph of the whole step, averaged weights, saves."""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

_WARM_UP = 0.03  # of the run, until the learning rate is reached
_LOWEST_RATE = 0.01  # of the learning rate, at the end
_AVERAGED = 0.05  # of the steps so far: the window of the moving average of the weights
_SAVE_SECONDS = 15.0
_SYNC_STEPS = 20  # between two looks at the GPU


@dataclass(frozen=True)
class Budget:
    """When a run ends: after so many minutes or steps, whichever is first. steps None: no limit."""

    minutes: float
    steps: int | None = None

    def done(self, seconds: float, steps: int) -> float:
        """How much of the run is over, 0 to 1."""
        share = seconds / (60 * self.minutes)
        return min(1.0, max(share, steps / self.steps if self.steps else 0.0))


@dataclass(frozen=True)
class Task:
    """What is trained: one loss for each kind of batch, drawn with probability by its weight."""

    name: str
    parameters: Mapping[str, nn.Parameter]
    losses: Sequence[tuple[float, Callable[[], Tensor]]]
    rate: float
    about: Mapping[str, Any]


def fit(
    task: Task,
    budget: Budget,
    folder: Path,
    device: torch.device,
    seed: int,
    graphs: bool = True,
) -> None:
    """AdamW until the budget is spent; the averaged weights end up in the parameters.

    While it runs and at its end, `folder` gets NAME.safetensors (averaged weights, float32) and
    NAME.json (the loss over time): whoever stops it keeps what was learned so far.
    """
    run = _Run(task, budget, folder, device, seed)
    run.train(graphs and device.type == "cuda")
    run.finish()


class _Run:
    def __init__(
        self, task: Task, budget: Budget, folder: Path, device: torch.device, seed: int
    ) -> None:
        self.task, self.budget, self.folder, self.device = task, budget, folder, device
        self.parameters = [p.requires_grad_() for p in task.parameters.values()]
        self.average = [p.detach().clone() for p in self.parameters]
        # What changes from step to step stands in tensors: a CUDA graph reads them anew.
        self.rate = torch.zeros((), device=device)
        self.weight = torch.ones((), device=device)  # of the newest weights in the average
        self.sum = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.rate,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.order = random.Random(seed)
        self.seed = seed
        self.steps = 0
        self.rows: list[tuple[int, float, float, float]] = []
        self.started = time.perf_counter()

    def train(self, graphs: bool) -> None:
        sync = _SYNC_STEPS if self.device.type == "cuda" else 1
        losses = [loss for _, loss in self.task.losses]
        steps = [self._captured(loss) if graphs else self._eager(loss) for loss in losses]
        weights = [weight for weight, _ in self.task.losses]
        self.sum.zero_()
        # The clock starts when the graphs are there: their cost does not depend on the budget.
        self.started = saved = said = time.perf_counter()
        seen = 0
        while (done := self.budget.done(self._seconds(), self.steps)) < 1 or self.steps == 0:
            rate = self.task.rate * min(1.0, (done + 1e-3) / _WARM_UP) * _cosine(done)
            self.rate.fill_(rate)
            self.weight.fill_(max(1e-3, 1 / (1 + _AVERAGED * self.steps)))
            self.order.choices(steps, weights)[0]()
            self.steps += 1
            if self.steps % sync:
                continue
            loss = self.sum.item() / (self.steps - seen)  # waits for the GPU
            self.sum.zero_()
            seen = self.steps
            self.rows.append((self.steps, self._seconds(), loss, rate))
            if not math.isfinite(loss):
                raise RuntimeError(f"{self.task.name}: the loss is {loss} at step {self.steps}")
            now = time.perf_counter()
            if now - said > 5:
                said = now
                print(
                    f"{self.task.name}: step {self.steps}, {100 * done:.0f} %, loss {loss:.4f}",
                    flush=True,
                )
            if now - saved > _SAVE_SECONDS:
                saved = now
                self.save()

    def finish(self) -> None:
        """Leave the average in the parameters, and everything on disk."""
        with torch.no_grad():
            for parameter, mean in zip(self.parameters, self.average, strict=True):
                parameter.copy_(mean)
                parameter.requires_grad_(False)
                parameter.grad = None
        self.save()
        last = self.rows[-1][2] if self.rows else math.nan
        print(
            f"{self.task.name}: {self.steps} steps in {self._seconds():.0f} s, loss {last:.4f}",
            flush=True,
        )

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        names = self.task.parameters
        tensors = {name: mean for name, mean in zip(names, self.average, strict=True)}
        save(tensors, self.folder / f"{self.task.name}.safetensors")
        curve = {
            "phase": self.task.name,
            "steps": self.steps,
            "seconds": round(self._seconds(), 1),
            "seed": self.seed,
            "device": _device_name(self.device),
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in self.parameters),
            **self.task.about,
            "columns": ["step", "seconds", "loss", "rate"],
            "rows": [[s, round(t, 2), round(x, 6), round(r, 8)] for s, t, x, r in self.rows],
        }
        path = self.folder / f"{self.task.name}.json"
        _replace(path, lambda part: part.write_text(json.dumps(curve) + "\n", "utf-8"))

    def _seconds(self) -> float:
        return time.perf_counter() - self.started

    def _eager(self, loss: Callable[[], Tensor]) -> Callable[[], object]:
        """A training step on one kind of batch."""
        return lambda: self._step(loss)

    def _captured(self, loss: Callable[[], Tensor]) -> Callable[[], object]:
        """The same as the replay of a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the rate is 0: nothing is learned here
            for _ in range(3):
                self._step(loss)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step(loss)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            print(f"{self.task.name}: no CUDA graph, much slower: {reason}", flush=True)
            return self._eager(loss)
        return graph.replay

    def _step(self, loss: Callable[[], Tensor]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            change = torch._foreach_sub([p.detach() for p in self.parameters], self.average)
            torch._foreach_mul_(change, self.weight)
            torch._foreach_add_(self.average, change)
            self.sum.add_(value.detach())


def save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file, whole or not at all."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _replace(path, lambda part: save_file(plain, part, {"format": "pt", **(metadata or {})}))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def _cosine(done: float) -> float:
    return _LOWEST_RATE + (1 - _LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
