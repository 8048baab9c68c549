"""An audition: one prompt and seed painted by every checkpoint of a folder, on one contact sheet.

While one checkpoint paints, the next is read ahead, its prompt encoded and the picture before
decoded, so that the device waits for nothing but the swap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import Engine, Session
from ..errors import InvalidFile, StructureMismatch, SwitchyardError
from ..hardware import describe
from ..models import UNetConfig
from ..sheet import Cell, contact_sheet, times
from ..structure import canonical_names, structure_of
from ..tensorfile import TensorFile
from . import material, prompts, world
from .latents import Decoder
from .material import SUPPORTED, Size
from .modules import empty_module
from .run import Report, best_device, require_packages
from .sampling import Conditioning, sample


@dataclass(frozen=True)
class Options:
    """What the command line says. `size` is (width, height) in pixels; `device` None: the best.

    images: how many each checkpoint paints, of seeds that follow one another.
    """

    folder: Path
    out: Path = Path("audition.png")
    prompt: str | None = None
    size: tuple[int, int] | None = None
    steps: int = 20
    seed: int = 0
    images: int = 1
    device: str | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that can paint. `structure`: equal ones are the same network.

    family: None for the demo's tiny world.
    """

    path: Path
    config: UNetConfig
    structure: str
    family: str | None


@dataclass(frozen=True)
class Row:
    """One picture. Times in ms: bringing the checkpoint in, the steps, and from the end of the
    picture before to the first step, in which the device did nothing for a picture."""

    checkpoint: str
    seed: int
    structure: str
    swap_ms: float
    steps_ms: float
    idle_ms: float


@dataclass(frozen=True)
class Result:
    """The rows in the order of painting, what was left out and why, and the sheet.

    idle: part of the wall time from the first step to the last in which no step was under way;
    building an engine counts.
    """

    heading: str
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]
    sheet: Path
    idle: float
    report: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "heading": self.heading,
            "rows": [asdict(row) for row in self.rows],
            "remarks": list(self.remarks),
            "sheet": str(self.sheet),
            "idle": self.idle,
            "engine": self.report,
        }


@dataclass(frozen=True)
class _Ready:
    """What a checkpoint needs beside its network."""

    conditioning: Conditioning
    guidance: float
    size: Size
    decode: Callable[[Tensor], Tensor]
    remarks: tuple[str, ...]


def run_audition(options: Options, report: Report = lambda fraction, text: None) -> Result:
    """Paint with every checkpoint of the folder and save the sheet.

    A checkpoint that cannot be used is left out, and the remarks say why. report: called with the
    fraction done, 0 to 1, and what is being done. Raises SwitchyardError in one line where not one
    checkpoint can be used, and for a device or a package that is not there.
    """
    require_packages()
    device, precision = best_device(options.device)
    candidates, remarks = find(options.folder)
    with torch.no_grad():
        stage = _Stage(options, device, precision, report)
        painted = stage.audition(candidates)
    remarks += stage.remarks
    if not painted:
        raise InvalidFile(remarks[0] if remarks else f"{options.folder} holds no checkpoint")
    rows = [row for row, _ in painted]
    heading = (
        f"{options.prompt or 'the default prompt'}; {options.steps} steps, "
        f"{describe(device).name}, {precision}"
    )
    cells = [
        Cell(row.checkpoint, times(row.steps_ms, row.swap_ms), picture) for row, picture in painted
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(heading, cells, options.images).save(options.out)
    busy = sum(row.steps_ms for row in rows)
    waited = sum(row.idle_ms for row in rows[1:])
    return Result(
        heading=heading,
        rows=tuple(rows),
        remarks=tuple(dict.fromkeys(remarks)),
        sheet=options.out,
        idle=waited / (busy + waited),
        report=stage.report_of_engine(),
    )


def find(folder: Path) -> tuple[list[Candidate], list[str]]:
    """The folder's checkpoints, those of one structure together, and why others are left out.

    Headers alone are read. Raises InvalidFile for a folder without a file to look at.
    """
    if not folder.is_dir():
        raise InvalidFile(f"{folder} is no folder: give one with .safetensors checkpoints")
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise InvalidFile(f"{folder} holds no .safetensors file")
    candidates, remarks = [], []
    for path in paths:
        try:
            candidates.append(_candidate(path))
        except SwitchyardError as error:
            remarks.append(f"left out: {error}")
    if not candidates:
        raise InvalidFile(f"{folder} holds no checkpoint that can paint; {remarks[0]}")
    order = list(dict.fromkeys(candidate.structure for candidate in candidates))
    return sorted(candidates, key=lambda one: order.index(one.structure)), remarks


def _candidate(path: Path) -> Candidate:
    structure = structure_of(path)
    if structure.family in SUPPORTED and structure.config is not None:
        return Candidate(path, structure.config, str(structure.graph_key), structure.family)
    try:
        canonical_names(TensorFile(path).tensors, world.UNET)
    except StructureMismatch:
        kinds = f"the family {structure.family}" if structure.family else "no published family"
        raise InvalidFile(
            f"{path} is of {kinds}, which is not painted with here: give SD1.5 or SDXL checkpoints"
        ) from None
    return Candidate(path, world.UNET, "the tiny world", None)


class _Stage:
    """The engine that stands ready, and the threads beside it."""

    def __init__(
        self, options: Options, device: torch.device, precision: str, report: Report
    ) -> None:
        self._options, self._device, self._report = options, device, report
        self.session = Session(device, precision, progress=lambda part, text: self._say(text))
        self.remarks: list[str] = []
        self._engine: Engine | None = None
        self._structure = ""
        self._last_report: dict[str, Any] = {}
        self._done, self._total = 0, 1

    def audition(self, candidates: Sequence[Candidate]) -> list[tuple[Row, Tensor]]:
        """Every candidate's pictures, in order."""
        self._total = len(candidates) * self._options.images * self._options.steps
        found: list[tuple[Candidate, Row, Future[Tensor]]] = []
        last = time.perf_counter()
        with (
            ThreadPoolExecutor(1, "switchyard-encode") as before,
            ThreadPoolExecutor(1, "switchyard-decode") as behind,
        ):
            coming = before.submit(self._prepare, candidates[0])
            for number, candidate in enumerate(candidates):
                ready = coming
                swap_ms: float | None = None
                try:
                    stuff = ready.result()
                    swap_ms = self._seat(candidate)
                except Exception as error:  # of a file, whatever is in it: the others paint
                    self._leave_out(candidate, error)
                for following in candidates[number + 1 : number + 2]:
                    coming = before.submit(self._prepare, following)
                    self._read_ahead(following)
                if swap_ms is not None:
                    self.remarks += stuff.remarks
                    for index in range(self._options.images):
                        self._say(candidate.path.name)
                        seed = self._options.seed + index
                        started = time.perf_counter()
                        try:
                            latent = self._paint(stuff, seed)
                        except SwitchyardError as error:
                            self._leave_out(candidate, error)
                            break
                        ended = time.perf_counter()
                        row = Row(
                            candidate.path.stem,
                            seed,
                            candidate.structure,
                            0.0 if index else swap_ms,
                            (ended - started) * 1e3,
                            (started - last) * 1e3,
                        )
                        last = ended
                        found.append((candidate, row, behind.submit(stuff.decode, latent)))
                self._done = (number + 1) * self._options.images * self._options.steps
            return list(self._decoded(found))

    def _decoded(
        self, found: Sequence[tuple[Candidate, Row, Future[Tensor]]]
    ) -> Iterator[tuple[Row, Tensor]]:
        for candidate, row, picture in found:
            try:
                yield row, picture.result()
            except Exception as error:
                self._leave_out(candidate, error)

    def _leave_out(self, candidate: Candidate, error: Exception) -> None:
        said = " ".join(str(error).split())
        if not isinstance(error, SwitchyardError):
            said = f"{type(error).__name__}: {said}"
        where = "" if str(candidate.path) in said else f"{candidate.path}: "
        self.remarks.append(f"left out: {where}{said}")

    def report_of_engine(self) -> dict[str, Any]:
        """Of the engine that stands ready, or of the last that did."""
        return self._last_report if self._engine is None else self._engine.report()

    def _seat(self, candidate: Candidate) -> float:
        """Bring the candidate's weights into its engine; the ms that they took."""
        if self._engine is None or self._structure != candidate.structure:
            self._last_report = self.report_of_engine()
            self._engine = None  # its memory goes first
            module = empty_module(candidate.config, self.session.dtype)
            self._engine = self.session.engine(module)
            self._structure = candidate.structure
        return self._engine.load_weights(candidate.path).seconds * 1e3

    def _read_ahead(self, following: Candidate) -> None:
        if self._engine is None or following.structure != self._structure:
            return
        try:
            self._engine.prefetch(following.path)
        except SwitchyardError:  # its turn comes, and with it the remark
            return

    def _prepare(self, candidate: Candidate) -> _Ready:
        """Encode the prompt by the candidate's own encoders, and get ready to decode."""
        options = self._options
        size = None if options.size is None else (options.size[1] // 8, options.size[0] // 8)
        file = TensorFile(candidate.path)
        if candidate.family is None:
            chosen = size or material.WORLD_SIZE
            text = options.prompt or world.PROMPT
            conditioning, about = material.world_conditioning(file, text, chosen, options.seed)
            decoder = Decoder(file, False, self._device, world.VAE)
            return _Ready(conditioning, world.GUIDANCE, chosen, decoder, (about, decoder.about))
        chosen = size or material.trained_size(candidate.family)
        conditioning, about = prompts.conditioning(
            file,
            candidate.config,
            options.prompt or material.PROMPT,
            chosen,
            options.tokenizer,
            options.seed,
        )
        decoder = Decoder(file, candidate.config.pooled_dim is not None, self._device)
        return _Ready(conditioning, material.GUIDANCE, chosen, decoder, (about, decoder.about))

    def _paint(self, stuff: _Ready, seed: int) -> Tensor:
        """The final latent; the seed alone decides its noise, whatever paints."""
        assert self._engine is not None
        random = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, 4, *stuff.size, generator=random)
        return sample(
            self._engine,
            None,
            noise,
            stuff.conditioning.to(self._device, self.session.dtype),
            None,
            self._options.steps,
            stuff.guidance,
            self._step,
        ).cpu()  # waits for the GPU

    def _step(self) -> None:
        self._done += 1
        self._report(min(1.0, self._done / self._total), self._text)

    def _say(self, text: str) -> None:
        self._text = text
        self._report(min(1.0, self._done / self._total), text)
