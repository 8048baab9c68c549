"""KSampler in a real ComfyUI on a GPU: seconds from queue to image, time a step, memory, fidelity.

    python -m benchmarks.comfyui --comfyui PATH --out results.json [--variants plain,engine,…]

Each variant is ComfyUI's own server, started in a process of its own by ComfyUI's own main module,
without a front end and without custom nodes. Workflows go through its `/prompt` route: checkpoint
loader, two prompts, KSampler, VAE, picture on disk. Checkpoints are complete files of the real
structures with random fp16 weights, written first, so the first run reads them from the page cache.

Fidelity: the float32 run's trajectory is kept, and every variant's guided noise prediction is taken
at each of its points, so that errors of one step don't carry over to the next. Relative L2
distances from float32 (TF32 off), plain ComfyUI's beside the engine's.

A tour (`--tour`) is ten workflows in a row with changing checkpoints, LoRAs, sizes and batches:
captures, memory after it, and the first guided prediction of each against float32's.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import itertools
import json
import math
import os
import pstats
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

# Nothing here may import torch at the top: ComfyUI chooses torch's allocator before it does.

ROOT = Path(__file__).resolve().parents[1]
ROWS = [("sd15", 512, 512), ("sdxl", 1024, 1024)]
VARIANTS: dict[str, tuple[str, ...]] = {
    "float32": ("--disable-dynamic-vram", "--fp32-unet"),
    "plain-legacy": ("--disable-dynamic-vram",),
    "plain": (),
    "engine-legacy": ("--disable-dynamic-vram",),
    "engine": (),
}
"""Name -> ComfyUI's arguments. Without any, dynamic VRAM is on where ComfyUI has it."""
LORAS = ("first", "second", "third")
TOUR: list[tuple[str, tuple[tuple[str, float], ...], int, int, int]] = [
    ("sd15", (), 512, 512, 1),
    ("sd15-b", (), 512, 512, 1),
    ("sd15", (("first", 0.8),), 512, 512, 1),
    ("sd15-b", (("first", 0.8), ("second", -0.5)), 768, 512, 1),
    ("sd15", (("second", 1.0),), 768, 512, 1),
    ("sd15", (), 512, 512, 4),
    ("sd15-b", (("first", 0.4),), 512, 512, 1),
    ("sd15", (("first", 0.8), ("second", 0.3), ("third", 0.6)), 640, 640, 1),
    ("sd15-b", (), 768, 512, 1),
    ("sd15", (), 512, 512, 1),
]
"""Checkpoint, LoRAs with strengths, width, height, batch. The last is the first again."""
CHILD_SECONDS = 400
PROMPTS = ("a lighthouse above the sea at dawn, oil on canvas", "blurry, cropped")
SAMPLER, SCHEDULER, CFG = "euler", "normal", 7.0


def main() -> None:
    """Write the checkpoints, run the variants of every row one after another, write one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", help="model:WxH")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=4, help="timed runs, the first included")
    parser.add_argument("--extra-nodes", action="store_true", help="load ComfyUI's extra nodes too")
    parser.add_argument("--no-fidelity", action="store_true")
    parser.add_argument(
        "--profile", action="store_true", help="the GPU's own time a step, and the host's work too"
    )
    parser.add_argument("--tour", action="store_true", help="of SD1.5, instead of the rows")
    parser.add_argument("--cpu", action="store_true", help="only to try this program")
    parser.add_argument("--logs", type=Path, help="a folder for the servers' output")
    parser.add_argument("--scratch", type=Path, help="where checkpoints go and stay")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--child", help="prepare, or model:WxH:variant")
    arguments = parser.parse_args()
    if arguments.child == "prepare":
        arguments.out.write_text(json.dumps(prepare(arguments)))
        return
    if arguments.child:
        model, size, variant = arguments.child.split(":")
        if size == "tour":
            row = tour(arguments, model, variant)
        else:
            width, height = map(int, size.split("x"))
            row = measure(arguments, model, width, height, variant)
        arguments.out.write_text(json.dumps(row))
        sys.stdout.flush()
        os._exit(0)  # the server's threads are not worth waiting for
    if arguments.scratch is not None:
        arguments.scratch.mkdir(parents=True, exist_ok=True)
        run_all(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="comfyui-") as scratch:
        arguments.scratch = Path(scratch)
        run_all(arguments)


def run_all(arguments: argparse.Namespace) -> None:
    """Every variant of every row, each in its own process."""
    prepared = run_child(arguments, "prepare")
    if "failed" in prepared:
        raise SystemExit("\n".join(prepared["failed"]))
    results: dict[str, Any] = {**prepared, "rows": []}
    rows = [(model, f"{width}x{height}") for model, width, height in chosen(arguments)]
    for model, size in [("sd15", "tour")] if arguments.tour else rows:
        for variant in arguments.variants.split(","):
            row = run_child(arguments, f"{model}:{size}:{variant}")
            results["rows"].append({"model": model, "variant": variant, **row})
            print(summary(results["rows"][-1]), flush=True)
            arguments.out.write_text(json.dumps(results, indent=1))


def chosen(arguments: argparse.Namespace) -> list[tuple[str, int, int]]:
    """The rows asked for: those of `ROWS`, or any sizes of their models."""
    if arguments.tour:
        return [("sd15", 512, 512), ("sd15-b", 512, 512)]
    if arguments.only is None:
        return ROWS
    rows = []
    for only in arguments.only:
        model, size = only.split(":")
        width, height = map(int, size.split("x"))
        rows.append((model, width, height))
    return rows


def run_child(arguments: argparse.Namespace, child: str) -> dict[str, Any]:
    """One child's result; where it fails, the last lines that it wrote."""
    out = arguments.scratch / "child.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.comfyui", "--child", child]
    command += ["--comfyui", str(arguments.comfyui.resolve()), "--out", str(out)]
    command += ["--scratch", str(arguments.scratch), "--steps", str(arguments.steps)]
    command += ["--runs", str(arguments.runs), "--commit", arguments.commit]
    for only in arguments.only or ():
        command += ["--only", only]
    for flag in ("extra_nodes", "no_fidelity", "cpu", "profile", "tour"):
        if getattr(arguments, flag):
            command.append("--" + flag.replace("_", "-"))
    logs = arguments.logs or arguments.scratch
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / (child.replace(":", "-") + ".log")
    failed = ""
    seconds = CHILD_SECONDS * (8 if arguments.cpu else 1)
    with log.open("w") as stream:
        try:
            process = subprocess.run(
                command, stdout=stream, stderr=subprocess.STDOUT, timeout=seconds, cwd=ROOT
            )
            failed = f"ended with {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            failed = f"not done after {seconds} s"
    if not failed and out.exists():
        return dict(json.loads(out.read_text()))
    return {"failed": [failed, *log.read_text(errors="replace").splitlines()[-15:]]}


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """What is worth a line on the console."""
    left_out = ("runs", "rel_err_by_step", "report", "flags")
    short = {key: value for key, value in row.items() if key not in left_out}
    for run in row.get("runs", ())[:1]:
        short["first"] = run
    return short


# --- before the servers -----------------------------------------------------------------------


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Checkpoints in the scratch folder; what the machine is and does at best."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.checkpoints import text_shapes, vae_shapes, weight

    device = "cpu" if arguments.cpu else "cuda"
    folder = arguments.scratch / "base" / "models" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for model in sorted({row[0] for row in chosen(arguments)}):
        path = folder / f"{model}.safetensors"
        if not path.exists():
            family = model.removesuffix("-b")
            shapes = {**unet_shapes(family), **text_shapes(family), **dict(vae_shapes())}
            salt = "" if model == family else model
            save_file(
                {name: weight(name, shape, device, salt) for name, shape in shapes.items()},
                path.with_suffix(".part"),
            )
            path.with_suffix(".part").rename(path)
    if arguments.tour:
        loras = arguments.scratch / "base" / "models" / "loras"
        loras.mkdir(parents=True, exist_ok=True)
        for name in LORAS:
            save_file(lora("sd15", name, device), loras / f"{name}.safetensors")
    result: dict[str, Any] = {
        "meta": {
            "commit": arguments.commit,
            "date": time.strftime("%Y-%m-%d"),
            "command": "python -m benchmarks.comfyui",
            "torch": torch.__version__,
            "note": f"random full-size weights, fp16; {SAMPLER}, {arguments.steps} steps, cfg "
            f"{CFG:g}, one picture (cond and uncond in one batch of 2); complete ComfyUI server, "
            "prompts through /prompt, no previews, no front end; the checkpoint is in the page "
            "cache. sample_s: KSampler from call to latent, GPU synchronised; ms: sample_s a step, "
            "median of the later runs; step_ms: median time between two steps, CUDA events",
        },
        "ceilings": {},
    }
    if not arguments.cpu:
        from benchmarks.engine import ceilings, meta

        result["meta"] = {**meta(arguments.commit), **result["meta"]}
        result["ceilings"] = ceilings()
    return result


def unet_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the UNet in a single-file checkpoint."""
    from accel.models import FAMILIES, parameters

    config = next(family.config for family in FAMILIES if family.name == model)
    prefix = "model.diffusion_model."
    return {prefix + p.ldm_name: p.shape for p in parameters(config).values()}


def lora(model: str, name: str, device: str) -> dict[str, Any]:
    """Rank 16 over every linear layer of the transformers, in the format that is most common."""
    import torch

    from accel.models import FAMILIES, parameters

    config = next(family.config for family in FAMILIES if family.name == model)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    state = {}
    for key, parameter in parameters(config).items():
        if len(parameter.shape) != 2 or "transformer_blocks" not in key:
            continue
        target = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        rows, columns = parameter.shape
        for part, shape in (("up", (rows, 16)), ("down", (16, columns))):
            noise = torch.randn(shape, generator=generator, device=device) / shape[1] ** 0.5
            state[f"{target}.lora_{part}.weight"] = (0.5 * noise).half().cpu()
        state[f"{target}.alpha"] = torch.tensor(8.0)
    return state


# --- in a server's process --------------------------------------------------------------------


def import_main(comfyui: Path) -> ModuleType:
    """ComfyUI's main module, imported as its own start does it: allocator first."""
    sys.path[:0] = [str(comfyui), str(ROOT / "tests")]
    from comfyui.launch import define_torchvision_ops, tolerate_missing_packages

    if "--cpu" in sys.argv:  # else torch must not come before ComfyUI's choice of an allocator
        define_torchvision_ops()
    tolerate_missing_packages()
    import comfy.options

    comfy.options.enable_args_parsing()
    import cuda_malloc  # sets the allocator, before anything imports torch
    import main

    main.cuda_malloc = cuda_malloc  # which it imports itself only where it is the program
    return main


class Server:
    """ComfyUI's server in this process, and clocks around what it does."""

    def __init__(self, arguments: argparse.Namespace, flags: tuple[str, ...]) -> None:
        """Start it; returns once it answers."""
        base = arguments.scratch / "base"
        web = arguments.scratch / "web"
        for folder in (base / "custom_nodes", base / "input", base / "output", base / "user", web):
            folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        sys.argv = ["main.py", "--port", str(self.port), "--base-directory", str(base)]
        sys.argv += ["--front-end-root", str(web), "--database-url", "sqlite:///:memory:"]
        sys.argv += ["--disable-all-custom-nodes", "--disable-api-nodes", *flags]
        self.flags = sys.argv[1:]
        started = time.perf_counter()
        self.main = import_main(arguments.comfyui)
        nodes = self.main.nodes
        if not arguments.extra_nodes:

            async def no_extra_nodes() -> list[str]:
                return []

            nodes.init_builtin_extra_nodes = no_extra_nodes
        loop, self.server, start = self.main.start_comfyui()
        add_nodes(nodes.NODE_CLASS_MAPPINGS)
        self._done = threading.Event()
        self._finished_at = 0.0
        self.keep_first = False
        self.first: Any = None
        self.profile: cProfile.Profile | None = None
        self.clocks = Clocks(cuda=not arguments.cpu)
        self._watch()

        def serve() -> None:
            asyncio.set_event_loop(loop)
            loop.run_until_complete(start())

        threading.Thread(target=serve, daemon=True).start()
        deadline = time.monotonic() + 60
        while True:
            try:
                self.system = self.get("/system_stats")["system"]
                break
            except (urllib.error.URLError, ConnectionError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self.start_s = time.perf_counter() - started

    def _watch(self) -> None:
        """Clocks around the sampler, its steps, and the end of a prompt."""
        nodes, queue = self.main.nodes, self.server.prompt_queue
        task_done, sample = queue.task_done, nodes.common_ksampler
        prepare_callback = nodes.latent_preview.prepare_callback

        def done(*args: Any, **kwargs: Any) -> Any:
            self._finished_at = time.perf_counter()
            result = task_done(*args, **kwargs)
            self._done.set()
            return result

        def timed_sample(*args: Any, **kwargs: Any) -> Any:
            self.clocks.begin()
            if self.profile is not None:  # its own cost is most of the time
                result = self.profile.runcall(sample, *args, **kwargs)
            else:
                result = sample(*args, **kwargs)
            self.clocks.end()
            return result

        def timed_callback(*args: Any, **kwargs: Any) -> Any:
            callback = prepare_callback(*args, **kwargs)

            def step(index: int, x0: Any, x: Any, total: int) -> Any:
                self.clocks.step()
                if index == 0 and self.keep_first:
                    self.first = (x.float().cpu(), x0.float().cpu())
                return callback(index, x0, x, total)

            return step

        queue.task_done = done
        nodes.common_ksampler = timed_sample
        nodes.latent_preview.prepare_callback = timed_callback

    def get(self, route: str, data: dict[str, Any] | None = None) -> Any:
        """A route's JSON; with `data`, it is posted."""
        body = None if data is None else json.dumps(data).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{route}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode(errors="replace")) from error
        return json.loads(text) if text else None

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Queue one workflow and wait for its end; its times."""
        self._done.clear()
        started = time.perf_counter()
        number = self.get("/prompt", {"prompt": prompt})["prompt_id"]
        self._done.wait()  # the parent has a clock
        seconds = self._finished_at - started
        history = self.get(f"/history/{number}")[number]
        if history["status"]["status_str"] != "success":
            raise RuntimeError(json.dumps(history["status"]["messages"][-1])[:4000])
        return {"queue_to_image_s": seconds, **self.clocks.read()}

    def free(self) -> int:
        """Unload every model; the memory in use once that has settled, MiB."""
        before = vram_mib()
        self.get("/free", {"unload_models": True, "free_memory": True})
        deadline, last, since = time.monotonic() + 25, before, time.monotonic()
        while time.monotonic() < deadline:
            time.sleep(0.1)
            now = vram_mib()
            if now != last:
                last, since = now, time.monotonic()
            settled = time.monotonic() - since
            if settled > 2 and (now < before or settled > 8):
                break
        return last


class Clocks:
    """Host clocks around a sampling, CUDA events at its steps."""

    def __init__(self, cuda: bool) -> None:
        """`cuda`: synchronise, and use events."""
        self.cuda = cuda
        self.started = self.ended = 0.0
        self.cpu = 0.0
        self.marks: list[Any] = []

    def _now(self) -> float:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(self) -> None:
        """The sampler is called."""
        self.marks = []
        self.started, self.cpu = self._now(), time.thread_time()

    def end(self) -> None:
        """The latent is there."""
        self.ended, self.cpu = self._now(), time.thread_time() - self.cpu

    def step(self) -> None:
        """A step's prediction is on its way."""
        if not self.cuda:
            self.marks.append(time.perf_counter())
            return
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((event, time.perf_counter()))

    def read(self) -> dict[str, Any]:
        """Times of the last sampling."""
        seconds = self.ended - self.started
        result: dict[str, Any] = {"sample_s": seconds, "ms": seconds * 1e3 / len(self.marks)}
        result["cpu_s"] = self.cpu  # of the sampler's thread, which other programs do not lengthen
        pairs = list(itertools.pairwise(self.marks))
        if not pairs:
            return result
        if self.cuda:
            gaps = [a[0].elapsed_time(b[0]) for a, b in pairs]
            # How far the host runs ahead: where it waits for the GPU, this is the GPU's time too.
            result["host_step_ms"] = statistics.median((b[1] - a[1]) * 1e3 for a, b in pairs)
            first = self.marks[0][1]
        else:
            gaps = [(b - a) * 1e3 for a, b in pairs]
            first = self.marks[0]
        result |= {"step_ms": statistics.median(gaps), "step_ms_min": min(gaps)}
        result |= {"step_ms_max": max(gaps), "to_first_step_s": first - self.started}
        return result


def add_nodes(mappings: dict[str, Any]) -> None:
    """Nodes of this benchmark: a model on the engine, one with a patch, random conditioning."""

    class Accelerated:
        INPUT_TYPES: Any = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
        RETURN_TYPES = ("MODEL",)
        FUNCTION = "run"
        CATEGORY = "benchmark"

        def run(self, model: Any) -> tuple[Any]:
            return (accelerated(model),)

    class RandomConditioning:
        INPUT_TYPES: Any = classmethod(
            lambda cls: {"required": {"model": ("MODEL",), "seed": ("INT", {})}}
        )
        RETURN_TYPES = ("CONDITIONING",)
        FUNCTION = "run"
        CATEGORY = "benchmark"

        def run(self, model: Any, seed: int) -> tuple[Any]:
            import torch

            generator = torch.Generator().manual_seed(seed)
            width = model.model.model_config.unet_config["context_dim"]
            extra = {}
            if model.model.model_config.unet_config.get("adm_in_channels"):
                extra["pooled_output"] = torch.randn(1, 1280, generator=generator)
            return ([[torch.randn(1, 77, width, generator=generator), extra]],)

    class Patched:
        INPUT_TYPES: Any = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
        RETURN_TYPES = ("MODEL",)
        FUNCTION = "run"
        CATEGORY = "benchmark"

        def run(self, model: Any) -> tuple[Any]:
            patched = model.clone()
            patched.set_model_output_block_patch(lambda h, skip, options: (h * 1.01, skip))
            return (patched,)

    mappings["BenchmarkAccelerated"] = Accelerated
    mappings["BenchmarkPatched"] = Patched
    mappings["BenchmarkConditioning"] = RandomConditioning


def accelerated(model: Any) -> Any:
    """The model on the engine, as the pack's node makes it."""
    from accel.hosts.comfyui.patcher import accelerate
    from accel.hosts.comfyui.run import Options

    return accelerate(model, Options(wait=True))


def report() -> dict[str, Any] | None:
    """What the pack's journal says of the last sampling."""
    from accel.hosts.comfyui.journal import journal

    runs = list(journal().runs)
    return max(runs, key=lambda run: run.id).to_json() if runs else None


def workflow(
    model: str,
    width: int,
    height: int,
    steps: int,
    seed: int,
    engine: bool,
    *,
    bare: bool = False,
    batch: int = 1,
    loras: tuple[tuple[str, float], ...] = (),
    patched: bool = False,
) -> dict[str, Any]:
    """Text to image in API format; a bare one has random conditioning and makes no picture."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name=f"{model}.safetensors"),
        "4": node("EmptyLatentImage", width=width, height=height, batch_size=batch),
    }
    source = ["1", 0]
    if engine:
        graph["8"] = node("BenchmarkAccelerated", model=source)
        source = ["8", 0]
    if patched:
        graph["9"] = node("BenchmarkPatched", model=source)
        source = ["9", 0]
    for index, (name, strength) in enumerate(loras):
        file = f"{name}.safetensors"
        number = f"lora{index}"
        graph[number] = node(
            "LoraLoaderModelOnly", model=source, lora_name=file, strength_model=strength
        )
        source = [number, 0]
    graph |= {
        "5": node(
            "KSampler",
            model=source,
            seed=seed,
            steps=steps,
            cfg=CFG,
            sampler_name=SAMPLER,
            scheduler=SCHEDULER,
            positive=["2", 0],
            negative=["3", 0],
            latent_image=["4", 0],
            denoise=1.0,
        ),
    }
    for number, text in zip(("2", "3"), PROMPTS, strict=True):
        if bare:
            graph[number] = node("BenchmarkConditioning", model=["1", 0], seed=int(number))
        else:
            graph[number] = node("CLIPTextEncode", clip=["1", 1], text=text)
    if bare:
        graph["7"] = node("SaveLatent", samples=["5", 0], filename_prefix="latent")
    else:
        graph["6"] = node("VAEDecode", samples=["5", 0], vae=["1", 2])
        graph["7"] = node("SaveImage", images=["6", 0], filename_prefix="picture")
    return graph


def measure(
    arguments: argparse.Namespace, model: str, width: int, height: int, variant: str
) -> dict[str, Any]:
    """Timed runs of one variant, then its predictions along the float32 trajectory, then memory."""
    server, row = start(arguments, model, variant)
    import psutil

    engine = variant.startswith("engine")
    row |= {"width": width, "height": height, "batch": 2, "runs": []}
    if variant != "float32":  # that one is only to compare with
        for seed in range(arguments.runs):
            graph = workflow(model, width, height, arguments.steps, seed, engine)
            row["runs"].append(server.run(graph))
            if engine:
                row["report"] = report()
                compiled()  # after the first run, which does not wait for that
        later = row["runs"][1:] or row["runs"]
        for key in ("queue_to_image_s", "sample_s", "ms", "step_ms", "host_step_ms"):
            if key in later[0]:
                row[key] = statistics.median(run[key] for run in later)
        row["it_s"] = 1e3 / row["ms"]
        row["vram_mib"] = vram_mib()
        row["patched"] = host_path(server, arguments, model, width, height, engine)
    row["rss_mib"] = psutil.Process().memory_info().rss >> 20
    if not arguments.no_fidelity:
        try:
            with Peak() as peak:
                row |= fidelity(server, arguments, model, width, height, variant)
            row["vram_mib_peak"] = peak.mib
            if engine:  # an error of the host's path would say nothing
                row["fidelity_mode"] = (report() or {}).get("mode")
        except Exception:  # the times stand whatever comes of this
            row["fidelity_failed"] = traceback.format_exc().splitlines()[-8:]
    if arguments.profile:
        row |= profiled(server, model, width, height, engine)
    row["vram_mib_after_free"] = server.free()
    return row


def host_path(
    server: Server, arguments: argparse.Namespace, model: str, width: int, height: int, engine: bool
) -> dict[str, Any]:
    """Runs that no engine takes, since the network is patched: what being asked to costs them.

    Through the accelerated MODEL and without it by turns in one server, whose CPU sets the pace.
    Both have the same mean place in the order, so that a pace that drifts does not tell between
    them; runs after one of the other kind, which may load, do not count. Ratios are of means.
    """
    times: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    mode, before = None, None
    turns = ((False, 3), (True, 5), (False, 5), (True, 5), (False, 3)) if engine else ((False, 4),)
    order = [accelerated for accelerated, runs in turns for _ in range(runs)]
    for seed, accelerated in enumerate(order):
        graph = workflow(model, width, height, arguments.steps, seed, accelerated, patched=True)
        run = server.run(graph)
        if accelerated is before:
            times[accelerated].append(run)
        if accelerated:
            mode = (report() or {}).get("mode")
        before = accelerated
    found: dict[str, Any] = {}
    for clock in ("sample", "cpu", "to_first_step", "step"):
        key = "step_ms" if clock == "step" else f"{clock}_s"
        plain, ours = ([run.get(key, math.nan) for run in times[kind]] for kind in (False, True))
        found[f"plain_{key}"] = plain
        if engine:
            found |= {f"accelerated_{key}": ours, "mode": mode}
            ratio = "ratio" if clock == "sample" else f"{clock}_ratio"
            found[ratio] = statistics.fmean(ours) / statistics.fmean(plain)
    if engine and arguments.profile:
        found["work"] = host_work(server, arguments, model, width, height)
    return found


def host_work(
    server: Server, arguments: argparse.Namespace, model: str, width: int, height: int
) -> dict[str, Any]:
    """What Python does in the host's path, a step of a run, through the accelerated MODEL or not.

    `calls`: of functions; `functions`: [name, calls plain, accelerated, more own ms] where most is
    added. Counts say what clocks of a busy machine cannot. The profiler itself slows both.
    """
    stats: dict[bool, Any] = {}
    for accelerated in (False, True):
        for seed in (50, 51):  # the first may load
            server.profile = cProfile.Profile() if seed == 51 else None
            try:
                server.run(
                    workflow(
                        *(model, width, height, arguments.steps, seed, accelerated), patched=True
                    )
                )
                if server.profile is not None:
                    stats[accelerated] = pstats.Stats(server.profile)
            finally:
                server.profile = None
    plain, ours = (stats[kind].stats for kind in (False, True))
    none, steps, rows = (0, 0, 0.0), arguments.steps, []
    for place in {**plain, **ours}:
        file, line, name = place
        (_, before, spent), (_, after, takes) = (s.get(place, none)[:3] for s in (plain, ours))
        counts = [before / steps, after / steps, 1e3 * (takes - spent) / steps]
        rows.append([f"{Path(file).name}:{line} {name}", *counts])
    rows.sort(key=lambda row: -row[-1])
    return {
        "calls_plain": stats[False].total_calls / steps,
        "calls_accelerated": stats[True].total_calls / steps,
        "functions": rows[:40],
    }


def start(arguments: argparse.Namespace, model: str, variant: str) -> tuple[Server, dict[str, Any]]:
    """The server of a variant, and what a row says of it."""
    flags = VARIANTS[variant]
    if arguments.cpu:
        flags = (*(flag for flag in flags if "dynamic" not in flag), "--cpu")
    server = Server(arguments, flags)
    if variant == "float32":
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return server, {
        "model": model,
        "variant": variant,
        "comfyui": server.system["comfyui_version"],
        "dynamic_vram": "on" if dynamic_vram() else "off",
        "flags": list(flags),
        "steps": arguments.steps,
        "start_s": server.start_s,
        "vram_mib_at_start": vram_mib(),
    }


def profiled(server: Server, model: str, width: int, height: int, engine: bool) -> dict[str, Any]:
    """What the GPU is busy with in a step: the sum of its kernels' times and copies."""
    from torch.profiler import ProfilerActivity, profile

    steps = 6
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            server.run(workflow(model, width, height, steps, 2, engine, bare=True))
        events = profiler.key_averages()
        busy = sum(event.self_device_time_total for event in events)
    except Exception as error:  # as above
        return {"profile_failed": str(error)}
    return {
        "gpu_busy_ms": busy / 1e3 / steps,
        "gpu_kernels": sum(event.count for event in events) / steps,
    }


def tour(arguments: argparse.Namespace, model: str, variant: str) -> dict[str, Any]:
    """Ten workflows in one server, twice: captures, memory after each, first predictions.

    The first time is the warm-up, in which kernels are compiled; what is told is of the second.
    """
    server, row = start(arguments, model, variant)
    import torch  # not before ComfyUI, which chooses its allocator

    engine = variant.startswith("engine")
    server.keep_first = True
    go_round(server, arguments, engine, 100)
    if engine:
        compiled()
        go_round(server, arguments, engine, 200)  # with the kernels that were compiled meanwhile
    row["vram_mib_after_warm_up_and_free"] = server.free()
    with Peak() as peak:
        runs, first = go_round(server, arguments, engine, 0)
    row |= {"runs": runs, "vram_mib_peak": peak.mib}
    row["vram_mib_after_free"] = server.free()
    row["last_equals_first"] = torch.equal(first[0][1], first[-1][1])
    kept = arguments.scratch / "tour-float32.pt"
    if variant == "float32":
        torch.save(first, kept)
    elif kept.exists():
        for run, (_, found), (x, truth) in zip(runs, first, torch.load(kept), strict=True):
            # (x - denoised) / sigma is the prediction; sigma cancels.
            run["rel_err"] = float((found - truth).double().norm() / (x - truth).double().norm())
    return row


def go_round(
    server: Server, arguments: argparse.Namespace, engine: bool, seeds: int
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The tour's workflows, with seeds from `seeds` on: each run, and its first prediction."""
    small = 8 if arguments.cpu else 1
    runs, first = [], []
    last = len(TOUR) - 1
    for index, (checkpoint, loras, width, height, batch) in enumerate(TOUR):
        width, height = width // small, height // small
        # The last has the first's seed, and one step more: ComfyUI would not run it again.
        steps, seed = arguments.steps + (index == last), seeds + index % last
        graph = workflow(checkpoint, width, height, steps, seed, engine, batch=batch, loras=loras)
        server.first = None
        run = {"checkpoint": checkpoint, "loras": len(loras), "width": width, "height": height}
        run |= {"batch": 2 * batch, **server.run(graph)}
        if engine:
            said = report() or {}
            run |= {key: said.get(key) for key in ("mode", "reasons", "graphs", "captures")}
            run["swaps_ms"] = said.get("swaps_ms")
        run["vram_mib"] = vram_mib()
        runs.append(run)
        first.append(server.first)
    return runs, first


def compiled() -> None:
    """Wait until no kernel is compiled in the background any more."""
    from accel.tuning import settled

    deadline = time.monotonic() + CHILD_SECONDS / 2
    while not settled() and time.monotonic() < deadline:
        time.sleep(0.2)


def fidelity(
    server: Server,
    arguments: argparse.Namespace,
    model: str,
    width: int,
    height: int,
    variant: str,
) -> dict[str, Any]:
    """Guided predictions at every point of the float32 trajectory, against float32's own."""
    import torch
    from comfy.k_diffusion import sampling

    name = f"sample_{SAMPLER}"
    original = getattr(sampling, name)
    kept = arguments.scratch / f"{model}-{width}x{height}-float32.pt"
    states: list[Any] | None = None if variant == "float32" else torch.load(kept)["states"]
    seen: list[Any] = []
    predictions: list[Any] = []

    def replay(net: Any, x: Any, sigmas: Any, extra_args: Any = None, **_: Any) -> Any:
        for index, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            if states is not None:
                x = states[index].to(x)
            seen.append(x.float().cpu())
            denoised = net(x, sigma * x.new_ones(x.shape[0]), **(extra_args or {}))
            predictions.append(((x - denoised) / sigma).float().cpu())
            server.clocks.step()
            x = x + (x - denoised) / sigma * (following - sigma)
        return x

    setattr(sampling, name, replay)
    try:
        engine = variant.startswith("engine")
        server.run(workflow(model, width, height, arguments.steps, 1, engine, bare=True))
    finally:
        setattr(sampling, name, original)
    if states is None:
        torch.save({"states": seen, "predictions": predictions}, kept)
        size = [float(p.std()) for p in predictions]
        return {"prediction_std": [min(size), max(size)]}
    truth = torch.load(kept)["predictions"]
    by_step = [
        float((a - b).double().norm() / b.double().norm())
        for a, b in zip(predictions, truth, strict=True)
    ]
    return {"rel_err": max(by_step), "rel_err_by_step": by_step}


class Peak:
    """The most memory in use on the card while this is open, as the driver has it."""

    def __enter__(self) -> Peak:
        """Start looking, a few times a second."""
        self.mib = vram_mib()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            self.mib = max(self.mib, vram_mib())

    def __exit__(self, *exception: object) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()


def dynamic_vram() -> bool:
    """Whether ComfyUI's dynamic VRAM is at work in this process."""
    module = sys.modules.get("comfy.memory_management")  # older versions have none
    return bool(getattr(module, "aimdo_enabled", False))


def vram_mib() -> int:
    """Memory in use on the card, MiB; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return (total - free) >> 20


if __name__ == "__main__":
    main()
