"""An audition in ComfyUI: one prompt and seed painted by every checkpoint that a pattern names.

Everything that makes a picture is the host's own: its loaders, text encoders, sampler and VAE. The
checkpoints of one structure follow one another, so that they share an engine, and the file of the
next is read ahead while one paints. What cannot be used is left out and named. The user's interrupt
ends it with the pictures that are there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from time import perf_counter
from typing import Any

import comfy.model_management as management
import comfy.sample
import comfy.utils
import folder_paths
import numpy
import torch
from torch import Tensor

from ...errors import InvalidFile, InvalidInput, SwitchyardError
from ...sheet import Cell, contact_sheet, times
from ...structure import structure_of
from .ahead import bring_nearer
from .catalog import Reader
from .journal import journal, status_line
from .loaders import load_checkpoint
from .run import Options

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"

_interrupts = 0
"""Auditions that were interrupted: asked for again, such a one is not taken for finished."""


@dataclass(frozen=True)
class Request:
    """What all paint. latent: the host's LATENT, whose samples' batch is painted by each."""

    positive: str
    negative: str
    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    latent: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """The pictures [B, H, W, 3] of one checkpoint, in 0..1, and the milliseconds of its parts.

    status: what they were painted on.
    """

    name: str
    pictures: Tensor
    swap_ms: float
    steps_ms: float
    status: str


@dataclass(frozen=True)
class Result:
    """Pictures in the order of painting, a sheet [1, H, W, 3] of them, and what is to be said."""

    pictures: Tensor
    sheet: Tensor
    text: str


def blank(width: int, height: int) -> dict[str, Any]:
    """An empty LATENT for one picture of a size in pixels."""
    return {"samples": torch.zeros(1, 4, height // 8, width // 8)}


def names_of(pattern: str) -> list[str]:
    """The checkpoints that a pattern names, by name.

    pattern: names, folders, or either with `*` and `?`, between commas or on lines. Raises
    `InvalidInput` where it names none.
    """
    wanted = [part.strip().lower() for part in pattern.replace(",", "\n").splitlines()]
    wanted = [part.replace("\\", "/").rstrip("/") for part in wanted if part]

    def named(name: str) -> bool:
        plain = name.replace("\\", "/").lower()
        return any(
            plain == part or plain.startswith(f"{part}/") or fnmatchcase(plain, part)
            for part in wanted
        )

    found = sorted(name for name in folder_paths.get_filename_list(FOLDER) if named(name))
    if not found:
        raise InvalidInput(f"no checkpoint is named by {pattern!r}: give a folder, or sdxl/*")
    return found


def state_of(pattern: str | None) -> str:
    """What an audition depends on beside its inputs: the files, and that none was interrupted.

    pattern: None where another node gives it, and it is not known yet: any file counts.
    """
    stamps = []
    with suppress(InvalidInput):
        for name in names_of("*" if pattern is None else pattern):
            path = folder_paths.get_full_path(FOLDER, name)
            if path is None:  # a link to nothing
                continue
            with suppress(OSError):
                status = os.stat(path)
                stamps.append((name, status.st_size, status.st_mtime_ns))
    return f"{_interrupts} {stamps}"


def audition(pattern: str, request: Request, options: Options) -> Result:
    """Paint with every checkpoint that `pattern` names.

    Raises `InvalidInput` where it names none, and `InvalidFile` where not one can be used.
    """
    names, remarks = _together(names_of(pattern))
    stage = _Stage(request, options, len(names))
    rows: list[Row] = []
    try:
        for number, name in enumerate(names):
            try:
                row = stage.paint(name, names[number + 1 : number + 2])
                if rows and row.pictures.shape != rows[0].pictures.shape:
                    raise InvalidInput("its pictures have another size")
                rows.append(row)
            except management.InterruptProcessingException:
                raise
            except Exception as error:  # of a file, whatever is in it: the others paint
                logger.debug("%s is left out", name, exc_info=True)
                remarks.append(_left_out(name, error))
    except management.InterruptProcessingException:
        if not rows:
            raise
        global _interrupts
        _interrupts += 1
        remarks.append(f"stopped after {len(rows)} of {len(names)} checkpoints")
    finally:
        stage.close()
    if not rows:
        raise InvalidFile(remarks[0])
    _tell(options.node_id, len(rows), remarks)
    lines = [f"{row.name}: {times(row.steps_ms, row.swap_ms)} · {row.status}" for row in rows]
    return Result(
        torch.cat([row.pictures for row in rows]),
        _sheet(rows, request),
        "\n".join([*lines, *remarks]),
    )


def _together(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names, those of one structure together, and what is said of files that are unusable."""
    structures: dict[str, str] = {}
    remarks = []
    for name in names:
        path = folder_paths.get_full_path(FOLDER, name)
        if path is None:
            gone = InvalidFile("the file is gone, or a link to nothing")
            remarks.append(_left_out(name, gone))
            continue
        structures[name] = ""
        if not path.endswith(".safetensors"):
            continue
        try:
            structure = structure_of(path)
            structures[name] = structure.graph_key or structure.shape_key
        except InvalidFile as error:
            del structures[name]
            remarks.append(_left_out(name, error))
        except SwitchyardError:  # the host may know what to do with it
            continue
    order = list(dict.fromkeys(structures.values()))
    return sorted(structures, key=lambda name: order.index(structures[name])), remarks


class _Stage:
    """Paints with one checkpoint after the other; nothing of the one before is held."""

    def __init__(self, request: Request, options: Options, number: int) -> None:
        self._request, self._options = request, options
        self._bar = comfy.utils.ProgressBar(max(1, number * request.steps))
        self._done = 0
        self._reader = Reader(bring_nearer)

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.stop()

    def paint(self, name: str, following: Iterable[str]) -> Row:
        """The pictures of a checkpoint; what comes next is read meanwhile."""
        request = self._request
        management.throw_exception_if_processing_interrupted()
        try:
            path = folder_paths.get_full_path_or_raise(FOLDER, name)
            model, clip, vae = load_checkpoint(path, replace(self._options, title=name))
            _require_whole(clip, vae)
            positive, negative = (
                _encoded(clip, text) for text in (request.positive, request.negative)
            )
            paths = [folder_paths.get_full_path(FOLDER, other) for other in following]
            self._reader.begin(lambda: [path for path in paths if path is not None])
            last = journal().runs[-1] if journal().runs else None
            started = perf_counter()
            samples = self._sample(model, positive, negative)
            steps_ms = (perf_counter() - started) * 1e3
            run = journal().runs[-1] if journal().runs else None
            swap_ms, status = 0.0, "host's path"
            if run is not None and run is not last:
                swap_ms, status = run.swaps_ms, status_line(run)
            pictures = vae.decode(samples).float().cpu().clamp(0, 1)
            return Row(
                name,
                pictures.reshape(-1, *pictures.shape[-3:]),
                swap_ms,
                steps_ms - swap_ms,
                status,
            )
        finally:
            self._done += request.steps
            self._bar.update_absolute(self._done)

    def _sample(self, model: Any, positive: Any, negative: Any) -> Tensor:
        """What KSampler makes of the request."""
        request, before = self._request, self._done

        def step(number: int, denoised: Tensor, latent: Tensor, total: int) -> None:
            self._bar.update_absolute(before + request.steps * (number + 1) // max(1, total))

        latent = comfy.sample.fix_empty_latent_channels(model, request.latent["samples"])
        noise = comfy.sample.prepare_noise(latent, request.seed, request.latent.get("batch_index"))
        samples: Tensor = comfy.sample.sample(
            *(model, noise, request.steps, request.cfg, request.sampler, request.scheduler),
            *(positive, negative, latent),
            noise_mask=request.latent.get("noise_mask"),
            callback=step,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=request.seed,
        )
        return samples


def _tell(node_id: str | None, painted: int, remarks: Sequence[str]) -> None:
    """The node's line: how many have painted, and what else is to be said."""
    line = " · ".join([f"{painted} checkpoints painted", *remarks])
    journal().status(node_id, "host" if remarks else "engine", line)


def _require_whole(clip: Any, vae: Any) -> None:
    """Raise InvalidFile for a checkpoint that lacks what makes a picture beside its UNet."""
    if clip is None:
        raise InvalidFile("it holds no text encoder")
    if getattr(vae, "first_stage_model", None) is None:
        raise InvalidFile("it holds no VAE")


def _encoded(clip: Any, text: str) -> Any:
    """CONDITIONING, by a checkpoint's own text encoders."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def _left_out(name: str, error: Exception) -> str:
    said = " ".join(str(error).split())
    if not isinstance(error, SwitchyardError):
        said = f"{type(error).__name__}: {said}"
    return f"left out: {name}: {said}"


def _sheet(rows: Sequence[Row], request: Request) -> Tensor:
    """All pictures on one, [1, H, W, 3] in 0..1."""
    cells = [
        Cell(row.name.rpartition(".")[0], times(row.steps_ms, row.swap_ms), picture.movedim(-1, 0))
        for row in rows
        for picture in row.pictures
    ]
    heading = f"{request.positive}; {request.steps} steps, seed {request.seed}"
    image = contact_sheet(" ".join(heading.split()), cells, len(rows[0].pictures))
    return torch.from_numpy(numpy.asarray(image).astype(numpy.float32) / 255)[None]
