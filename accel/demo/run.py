"""The demo's story: the same changes one after the other, by plain PyTorch and by one engine."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import Engine, Session
from ..errors import DeviceUnavailable, SwitchyardError
from ..hardware import describe
from ..sheet import Column, sheet
from . import material
from .material import Material, Size
from .modules import empty_module, load_weights, merge_lora
from .sampling import sample

Report = Callable[[float, str], None]

LORA_STRENGTH = 1.0
CAPTURE_STEPS = 60  # a capture takes about as long as this many steps: for the progress bar only


@dataclass(frozen=True)
class Options:
    """What the command line says. `size` is (width, height) in pixels; `device` None: the best."""

    out: Path = Path("switchyard-demo")
    checkpoints: tuple[Path, ...] = ()
    lora: Path | None = None
    controlnet: Path | None = None
    prompt: str | None = None
    size: tuple[int, int] | None = None
    steps: int = 20
    seed: int = 0
    device: str | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Change:
    """One picture: what it is made with. `title` says what changed since the one before."""

    title: str
    checkpoint: Path
    size: Size
    lora: Path | None = None
    controlnet: Path | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table. Seconds are wall time; `error` is the relative L2 of the latents.

    captures: torch.export runs since the start, of all networks. psnr: of the finished picture, dB,
    None where not a pixel differs. same_as: number of an earlier picture with the same
    ingredients whose latent is equal bit for bit.
    """

    number: int
    title: str
    size: str
    engine: str
    captures: int
    change_seconds: float
    plain_seconds: float
    engine_seconds: float
    error: float
    psnr: float | None
    same_as: int | None


@dataclass(frozen=True)
class Result:
    """The table, what stands above and below it, and the engine's own report."""

    heading: tuple[str, ...]
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]
    picture: Path
    report: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "heading": list(self.heading),
            "rows": [asdict(row) for row in self.rows],
            "remarks": list(self.remarks),
            "picture": str(self.picture),
            "engine": self.report,
        }


@dataclass(frozen=True)
class _Painted:
    latent: Tensor
    picture: Tensor
    seconds: float


class _Ticker:
    """Counts steps of all kinds into one fraction."""

    def __init__(self, report: Report, total: int) -> None:
        self.report, self.total, self.done, self.text = report, total, 0, ""

    def begin(self, text: str) -> None:
        self.text = text
        self.report(self.done / self.total, text)

    def step(self, count: int = 1) -> None:
        self.done += count
        self.report(min(1.0, self.done / self.total), self.text)


def run_demo(options: Options, report: Report = lambda fraction, text: None) -> Result:
    """Paint every picture twice, compare, and save the sheet.

    report: called with the fraction done, 0 to 1, and what is being done.
    Raises SwitchyardError in one line for files that cannot be used, a device or a package that is
    not there.
    """
    require_packages()
    device, precision = best_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    stuff = _material(options, device)
    changes = _changes(stuff)
    networks = 1 if stuff.controlnet is None else 2
    ticker = _Ticker(report, 2 * options.steps * len(changes) + CAPTURE_STEPS * networks)
    with torch.no_grad(), _threads(None if options.checkpoints else 1):
        plain = _Plain(stuff, device, torch.float32 if precision == "fp32" else torch.float16)
        painted = [plain.paint(change, options, ticker) for change in changes]
        engine = _Engined(stuff, plain, device, precision, ticker)
        rows, results = _paint_by_engine(engine, changes, painted, options)
        picture = options.out / "side-by-side.png"
        _save_sheet(rows, painted, results, picture)
    return Result(
        heading=_heading(stuff, engine, options),
        rows=tuple(rows),
        remarks=_remarks(stuff, engine, rows, picture),
        picture=picture,
        report=engine.report(),
    )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads on the CPU while the block runs; None leaves them as they are.

    On layers as small as the tiny world's several only wait for each other, for minutes on a busy
    machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def require_packages() -> None:
    """Raise SwitchyardError where a package is missing that painting needs."""
    missing = [
        package
        for module, package in (("diffusers", "diffusers"), ("PIL", "pillow"))
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise SwitchyardError(
            f"painting needs {' and '.join(missing)}: pip install {' '.join(missing)}, "
            "or run python3 install.py demo"
        )


def best_device(wanted: str | None) -> tuple[torch.device, str]:
    """The device and the precision that suits it."""
    found = "cpu"
    for name in ("cuda", "cpu") if wanted is None else (wanted,):
        try:
            found = describe(name).kind
            break
        except DeviceUnavailable:
            if wanted is not None:
                raise
    return torch.device(found), "fp32" if found == "cpu" else "fp16"


def _material(options: Options, device: torch.device) -> Material:
    width, height = options.size or (0, 0)
    size = (height // 8, width // 8) if options.size else None
    if not options.checkpoints:
        return material.tiny_world(options.prompt, size, options.seed, device)
    return material.own_files(
        options.checkpoints,
        options.lora,
        options.controlnet,
        options.prompt,
        size,
        options.tokenizer,
        options.seed,
        device,
    )


def _changes(stuff: Material) -> list[Change]:
    first, *others = stuff.checkpoints
    start = Change(f"checkpoint {first.stem}", first, stuff.size)
    changes = [start]
    for path in others:
        changes.append(replace(start, title=f"checkpoint {path.stem}", checkpoint=path))
    if stuff.lora is not None:
        changes.append(replace(start, title=f"{first.stem} + LoRA", lora=stuff.lora))
    if stuff.controlnet is not None:
        title = f"{first.stem} + ControlNet"
        changes.append(replace(start, title=title, controlnet=stuff.controlnet))
    changes.append(replace(start, title="another size", size=stuff.other_size))
    if len(changes) > 2:
        changes.append(replace(start, title=f"back to {first.stem}"))
    return changes


class _Plain:
    """Diffusers' own modules, with weights loaded and LoRAs merged the usual way."""

    def __init__(self, stuff: Material, device: torch.device, dtype: torch.dtype) -> None:
        self.stuff, self.device, self.dtype = stuff, device, dtype
        self.unet = empty_module(stuff.config, dtype)
        self.controlnet: nn.Module | None = None
        if stuff.controlnet is not None and stuff.control_config is not None:
            self.controlnet = empty_module(stuff.control_config, dtype)
            load_weights(self.controlnet, stuff.controlnet, stuff.control_config)
            self.controlnet.to(device)
        self.conditioning = stuff.conditioning.to(device, dtype)
        self._warm = False

    def seat(self, change: Change) -> None:
        """Load a checkpoint and merge its LoRA."""
        self.unet.to(self.device)
        load_weights(self.unet, change.checkpoint, self.stuff.config)
        if change.lora is not None:
            merge_lora(self.unet, change.lora, self.stuff.config, LORA_STRENGTH)

    def paint(self, change: Change, options: Options, ticker: _Ticker) -> _Painted:
        ticker.begin(f"plain PyTorch: {change.title}")
        self.seat(change)
        controlnet = self.controlnet if change.controlnet is not None else None
        if not self._warm:  # the libraries' start is no part of anyone's picture
            _paint(self.unet, controlnet, self, change, replace(options, steps=1), lambda: None)
            self._warm = True
        return _paint(self.unet, controlnet, self, change, options, ticker.step)


class _Engined:
    """One engine for every checkpoint, LoRA and size, and one for the ControlNet."""

    def __init__(
        self, stuff: Material, plain: _Plain, device: torch.device, precision: str, ticker: _Ticker
    ) -> None:
        self._plain, self._ticker = plain, ticker
        self.session = Session(device, precision, progress=self._capturing)
        self._lora: Path | None = None
        self._controlnet: Engine | None = None
        first = stuff.checkpoints[0]
        # The module is the first checkpoint's again, as a host would have it.
        plain.seat(Change("", first, stuff.size))
        self._checkpoint = first
        self._started = time.perf_counter()
        self.unet, self._said = self._make(plain.unet)

    def change(self, change: Change) -> tuple[str, float]:
        """Bring in what the picture needs; says whether an engine was made, and the seconds."""
        started, said = time.perf_counter(), "same engine"
        if self._started:  # the first picture: making the engine is what it took
            started, said = self._started, self._said
            self._started = 0.0
        if change.checkpoint != self._checkpoint:
            self.unet.load_weights(change.checkpoint)
            self._checkpoint = change.checkpoint
        if change.lora != self._lora:
            self.unet.set_loras([(change.lora, LORA_STRENGTH)] if change.lora else [])
            self._lora = change.lora
        if change.controlnet is not None and self._controlnet is None:
            assert self._plain.controlnet is not None
            self._controlnet, made = self._make(self._plain.controlnet)
            said += f"; ControlNet's own: {made}"
        return said, time.perf_counter() - started

    def paint(self, change: Change, options: Options) -> _Painted:
        self._ticker.begin(f"engine: {change.title}")
        controlnet = self._controlnet if change.controlnet is not None else None
        return _paint(self.unet, controlnet, self._plain, change, options, self._ticker.step)

    def report(self) -> dict[str, Any]:
        return self.unet.report()

    def _make(self, module: nn.Module) -> tuple[Engine, str]:
        engine = self.session.engine(module)
        self._ticker.step(CAPTURE_STEPS)
        source = engine.report()["source"]
        words = {"built": "built (1 capture)", "cache": "from the cache"}
        return engine, words.get(source, source)

    def _capturing(self, fraction: float, text: str) -> None:
        ticker = self._ticker
        done = ticker.done + fraction * CAPTURE_STEPS
        ticker.report(done / ticker.total, f"building the engine, once: {text}")


def _paint(
    unet: Any,
    controlnet: Any,
    plain: _Plain,
    change: Change,
    options: Options,
    step_done: Callable[[], None],
) -> _Painted:
    """One picture by whichever networks are given. The seed alone decides its noise."""
    random = torch.Generator().manual_seed(options.seed)
    noise = torch.randn(1, 4, *change.size, generator=random)
    hint = None if controlnet is None else plain.stuff.hint(change.size)
    started = time.perf_counter()
    latent = sample(
        unet,
        controlnet,
        noise,
        plain.conditioning,
        hint,
        options.steps,
        plain.stuff.guidance,
        step_done,
    ).cpu()  # waits for the GPU
    seconds = time.perf_counter() - started
    return _Painted(latent, plain.stuff.decode(latent), seconds)


def _paint_by_engine(
    engine: _Engined, changes: list[Change], painted: list[_Painted], options: Options
) -> tuple[list[Row], list[_Painted]]:
    rows: list[Row] = []
    results: list[_Painted] = []
    for number, (change, reference) in enumerate(zip(changes, painted, strict=True), 1):
        said, seconds = engine.change(change)
        result = engine.paint(change, options)
        height, width = change.size
        alike = replace(change, title="")
        earlier = [
            index for index in range(number - 1) if replace(changes[index], title="") == alike
        ]
        same = [index + 1 for index in earlier if torch.equal(results[index].latent, result.latent)]
        rows.append(
            Row(
                number=number,
                title=change.title,
                size=f"{8 * width}x{8 * height}",
                engine=said,
                captures=engine.session.captures,
                change_seconds=seconds,
                plain_seconds=reference.seconds,
                engine_seconds=result.seconds,
                error=_error(result.latent, reference.latent),
                psnr=_psnr(result.picture, reference.picture),
                same_as=same[0] if same else None,
            )
        )
        results.append(result)
    return rows, results


def _error(value: Tensor, reference: Tensor) -> float:
    difference = (value.double() - reference.double()).norm()
    return float(difference / reference.double().norm())


def _psnr(picture: Tensor, reference: Tensor) -> float | None:
    """Peak signal-to-noise ratio of pictures in 0..1, dB."""
    noise = float((picture.double() - reference.double()).square().mean())
    return None if noise == 0 else -10 * math.log10(noise)


def _save_sheet(
    rows: list[Row], painted: list[_Painted], results: list[_Painted], path: Path
) -> None:
    columns = [
        Column(
            f"{row.number}  {row.title}",
            "the same to the last pixel" if row.psnr is None else f"PSNR {row.psnr:.0f} dB",
            reference.picture,
            result.picture,
        )
        for row, reference, result in zip(rows, painted, results, strict=True)
    ]
    sheet(columns).save(path)


def _heading(stuff: Material, engine: _Engined, options: Options) -> tuple[str, ...]:
    report = engine.report()
    hardware = describe(engine.session.device)
    return (
        f"{stuff.title}; {options.steps} steps of DDIM with guidance, seed {options.seed}",
        f"{hardware.name}, {engine.session.precision}, PyTorch {hardware.torch}",
        f"structure {report['structure']['graph_key']}",
    )


def _remarks(stuff: Material, engine: _Engined, rows: list[Row], picture: Path) -> tuple[str, ...]:
    captures = engine.session.captures
    networks = 1 if stuff.controlnet is None else 2
    lines = [
        f"{len(rows)} pictures, {networks} {'engine' if networks == 1 else 'engines'} "
        f"({'UNet' if networks == 1 else 'UNet and ControlNet'}), {captures} captured in this run",
        "change s: until the engine is ready for the picture; plain s, engine s: its steps, the "
        "engine's with what a new size costs it",
        "error: relative L2 between the final latents of engine and plain PyTorch"
        + ("; = N: bit for bit the engine's picture N" if any(r.same_as for r in rows) else ""),
    ]
    if engine.session.device.type == "cpu":
        lines.append("on a CPU the engine runs its reference operators: right, not fast")
    return (*lines, *stuff.remarks, f"side by side: {picture}")
