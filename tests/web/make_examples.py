"""Writes example_workflows/: the workflows, as the front end saves them, and their thumbnails.

    PYTHONPATH=.:tests python -m web.make_examples        (with COMFYUI_PATH as for the tests)

The nodes are laid out by hand here and made by the real front end, so that the files are what a
user's own "Save" would give.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfyui.server import Server, installations

from .browser import ROOT, Desk, launched

FOLDER = ROOT / "example_workflows"
WIDTH, HEIGHT = 640, 400
LARGEST = 60 * 1024

SD15 = "v1-5-pruned-emaonly-fp16.safetensors"
SDXL = "sd_xl_base_1.0.safetensors"
MODELS = {
    "checkpoints": [SD15, SDXL, "checkpoint_a.safetensors", "checkpoint_b.safetensors"],
    "loras": ["sdxl_lora.safetensors"],
    "controlnet": ["controlnet-canny-sdxl-1.0.safetensors"],
}

PROMPT = "a signal box beside a railway junction at dusk, warm windows, wet rails, detailed"
NEGATIVE = "blurry, low quality, text, watermark"


@dataclass
class Example:
    """Nodes by name: type, place, size, values by widget; links between "name.output" and input."""

    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    links: list[tuple[str, str, str, str]] = field(default_factory=list)

    def add(
        self,
        name: str,
        kind: str,
        pos: tuple[int, int],
        size: tuple[int, int] | None = None,
        title: str | None = None,
        **inputs: Any,
    ) -> None:
        """A node. An input "name:output" is a link, anything else a widget's value."""
        values = {}
        for key, value in inputs.items():
            if isinstance(value, str) and value.partition(":")[0] in self.nodes:
                source, _, output = value.partition(":")
                self.links.append((source, output, name, key))
            else:
                values[key] = value
        self.nodes[name] = {
            "type": kind,
            "pos": pos,
            "size": size,
            "title": title,
            "values": values,
        }

    def note(self, text: str, pos: tuple[int, int], size: tuple[int, int]) -> None:
        """What the workflow is about."""
        self.nodes["note"] = {
            "type": "MarkdownNote",
            "pos": pos,
            "size": size,
            "title": "Switchyard",
            "values": {"": text},
        }

    def prompts(self, clip: str, x: int, y: int) -> None:
        """Both prompts, one below the other."""
        size = (380, 120)
        self.add("positive", "CLIPTextEncode", (x, y), size, clip=clip, text=PROMPT)
        self.add("negative", "CLIPTextEncode", (x, y + 180), size, clip=clip, text=NEGATIVE)


def sampler(example: Example, name: str, pos: tuple[int, int], **inputs: Any) -> None:
    """A KSampler with what all examples share."""
    shared = {
        "seed": 20,
        "steps": 20,
        "cfg": 7.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    example.add(name, "KSampler", pos, (280, 262), **{**shared, **inputs})


def sd15() -> Example:
    """One node between a loader and a sampler."""
    e = Example()
    e.note(
        "**Accelerate Model** stands between the loader and the sampler. That is all.\n\n"
        "The first run of a new network structure samples on ComfyUI's own path while the engine "
        "is built in the background; later runs use the engine. LoRAs, other checkpoints of the "
        "same structure and other sizes need no new engine.",
        (0, 330),
        (320, 230),
    )
    e.add("loader", "CheckpointLoaderSimple", (0, 0), (320, 98), ckpt_name=SD15)
    e.add("fast", "SwitchyardAccelerate", (370, 0), (320, 82), model="loader:MODEL")
    e.prompts("loader:CLIP", 370, 160)
    e.add("latent", "EmptyLatentImage", (0, 170), (320, 106), width=512, height=512, batch_size=1)
    sampler(
        e,
        "sampler",
        (800, 0),
        model="fast:MODEL",
        positive="positive:CONDITIONING",
        negative="negative:CONDITIONING",
        latent_image="latent:LATENT",
    )
    e.add("decode", "VAEDecode", (800, 340), (280, 46), samples="sampler:LATENT", vae="loader:VAE")
    save = {"images": "decode:IMAGE", "filename_prefix": "switchyard_sd15"}
    e.add("save", "SaveImage", (1130, 0), (340, 390), **save)
    return e


def sdxl() -> Example:
    """The pack's own loader, and the report after the sampler."""
    e = Example()
    e.note(
        "**Load Checkpoint (Accelerated)** is a loader and Accelerate Model in one: the weights "
        "go straight from the file to the engine.\n\n**Engine Report** shows what the sampling "
        "ran on, what did not and why, and how long it took.",
        (0, 350),
        (320, 210),
    )
    e.add("loader", "SwitchyardLoadCheckpoint", (0, 0), (320, 122), ckpt_name=SDXL)
    e.add("latent", "EmptyLatentImage", (0, 190), (320, 106), width=1024, height=1024)
    e.prompts("loader:CLIP", 380, 0)
    sampler(
        e,
        "sampler",
        (820, 0),
        model="loader:MODEL",
        positive="positive:CONDITIONING",
        negative="negative:CONDITIONING",
        latent_image="latent:LATENT",
    )
    e.add("report", "SwitchyardReport", (820, 340), (280, 200), anything="sampler:LATENT")
    e.add("decode", "VAEDecode", (1160, 0), (340, 46), samples="report:anything", vae="loader:VAE")
    save = {"images": "decode:IMAGE", "filename_prefix": "switchyard_sdxl"}
    e.add("save", "SaveImage", (1160, 110), (340, 430), **save)
    return e


def sdxl_lora_controlnet() -> Example:
    """LoRA before, ControlNet beside: both as ever."""
    e = Example()
    e.note(
        "LoRA nodes work before and after **Accelerate Model**; their weights go into the engine "
        "in place, and leave it without a trace.\n\n**Accelerate ControlNet** runs the ControlNet "
        "on an engine of its own. Its residuals are added inside the main engine: switching it "
        "off and on costs nothing.",
        (0, 560),
        (320, 250),
    )
    e.add("loader", "CheckpointLoaderSimple", (0, 0), (320, 98), ckpt_name=SDXL)
    lora = {"lora_name": MODELS["loras"][0], "strength_model": 0.8, "strength_clip": 0.8}
    e.add(
        "lora", "LoraLoader", (370, 0), (320, 126), model="loader:MODEL", clip="loader:CLIP", **lora
    )
    e.add("fast", "SwitchyardAccelerate", (740, 0), (320, 82), model="lora:MODEL")
    e.prompts("lora:CLIP", 370, 190)
    net = {"control_net_name": MODELS["controlnet"][0]}
    e.add("net", "ControlNetLoader", (0, 160), (320, 58), **net)
    e.add("fastnet", "SwitchyardAccelerateControlNet", (0, 280), (320, 58), control_net="net:0")
    e.add("picture", "LoadImage", (370, 560), (300, 314), image="example.png")
    edges = {"image": "picture:IMAGE", "low_threshold": 0.3, "high_threshold": 0.7}
    e.add("canny", "Canny", (740, 560), (320, 82), **edges)
    e.add(
        "apply",
        "ControlNetApplyAdvanced",
        (800, 190),
        (260, 186),
        positive="positive:CONDITIONING",
        negative="negative:CONDITIONING",
        control_net="fastnet:0",
        image="canny:IMAGE",
        strength=0.7,
        start_percent=0.0,
        end_percent=0.8,
    )
    e.add("latent", "EmptyLatentImage", (0, 400), (320, 106), width=1024, height=1024)
    sampler(
        e,
        "sampler",
        (1120, 0),
        model="fast:MODEL",
        positive="apply:positive",
        negative="apply:negative",
        latent_image="latent:LATENT",
    )
    e.add("decode", "VAEDecode", (1120, 340), (280, 46), samples="sampler:LATENT", vae="loader:VAE")
    save = {"images": "decode:IMAGE", "filename_prefix": "switchyard_lora_controlnet"}
    e.add("save", "SaveImage", (1120, 450), (280, 420), **save)
    return e


def hires_fix() -> Example:
    """Two sizes in one run."""
    e = Example()
    e.note(
        "Two samplings at two sizes share **one engine and one copy of the weights**. A size that "
        "is new costs a fraction of a second, once.",
        (0, 330),
        (320, 170),
    )
    e.add("loader", "CheckpointLoaderSimple", (0, 0), (320, 98), ckpt_name=SD15)
    e.add("fast", "SwitchyardAccelerate", (370, 0), (320, 82), model="loader:MODEL")
    e.prompts("loader:CLIP", 370, 160)
    e.add("latent", "EmptyLatentImage", (0, 170), (320, 106), width=512, height=768, batch_size=1)
    shared = {
        "model": "fast:MODEL",
        "positive": "positive:CONDITIONING",
        "negative": "negative:CONDITIONING",
    }
    sampler(e, "first", (800, 0), latent_image="latent:LATENT", **shared)
    upscale = {"samples": "first:LATENT", "upscale_method": "bislerp", "scale_by": 1.5}
    e.add("upscale", "LatentUpscaleBy", (800, 340), (280, 82), **upscale)
    detail = {"latent_image": "upscale:LATENT", "steps": 14, "denoise": 0.55}
    sampler(e, "second", (1130, 0), **detail, **shared)
    e.add("decode", "VAEDecode", (1130, 340), (280, 46), samples="second:LATENT", vae="loader:VAE")
    save = {"images": "decode:IMAGE", "filename_prefix": "switchyard_hires"}
    e.add("save", "SaveImage", (1460, 0), (340, 480), **save)
    return e


def checkpoint_comparison() -> Example:
    """The same seed on two checkpoints."""
    e = Example()
    e.note(
        "Both checkpoints have the same structure, so they share **one engine**: between the two "
        "samplings only weights move. Add as many as you like.",
        (0, 430),
        (320, 170),
    )
    e.add("latent", "EmptyLatentImage", (0, 270), (320, 106), width=1024, height=1024)
    for row, letter in enumerate("ab"):
        y = row * 440
        loader = f"loader_{letter}"
        name = f"checkpoint_{letter}.safetensors"
        place = (0, 0) if row == 0 else (0, 650)
        e.add(loader, "SwitchyardLoadCheckpoint", place, (320, 122), ckpt_name=name)
        for index, (sign, text) in enumerate((("positive", PROMPT), ("negative", NEGATIVE))):
            e.add(
                f"{sign}_{letter}",
                "CLIPTextEncode",
                (380, y + 180 * index),
                (380, 120),
                clip=f"{loader}:CLIP",
                text=text,
            )
        sampler(
            e,
            f"sampler_{letter}",
            (820, y),
            model=f"{loader}:MODEL",
            positive=f"positive_{letter}:CONDITIONING",
            negative=f"negative_{letter}:CONDITIONING",
            latent_image="latent:LATENT",
        )
        samples = {"samples": f"sampler_{letter}:LATENT", "vae": f"{loader}:VAE"}
        e.add(f"decode_{letter}", "VAEDecode", (1160, y), (320, 46), **samples)
        save = {"images": f"decode_{letter}:IMAGE", "filename_prefix": f"switchyard_{letter}"}
        e.add(f"save_{letter}", "SaveImage", (1160, y + 100), (320, 270), **save)
    return e


EXAMPLES = {maker.__name__: maker for maker in (sd15, sdxl, sdxl_lora_controlnet, hires_fix)} | {
    "checkpoint_comparison": checkpoint_comparison
}

# Makes the nodes, and returns what the front end would save.
_BUILD = """async ({ nodes, links }) => {
    await app.loadGraphData({
        last_node_id: 0, last_link_id: 0, nodes: [], links: [], groups: [], config: {},
        extra: {}, version: 0.4,
    });
    const made = {};
    for (const [name, { type, pos, size, title, values }] of Object.entries(nodes)) {
        const node = LiteGraph.createNode(type);
        if (!node) throw new Error(`no node ${type}`);
        app.graph.add(node);
        node.pos = pos;
        if (title) node.title = title;
        for (const [key, value] of Object.entries(values)) {
            const widget = node.widgets.find((w) => !key || w.name === key);
            if (!widget) throw new Error(`${type} has no ${key}`);
            widget.value = value;
            const next = node.widgets[node.widgets.indexOf(widget) + 1];
            if (widget.name === "seed") next.value = "fixed";
        }
        if (size) node.setSize(size);
        made[name] = node;
    }
    for (const [source, output, target, input] of links) {
        const from = made[source];
        const to = made[target];
        const slot = Math.max(0, from.outputs.findIndex((o) => o.name === output));
        const place = to.inputs.findIndex((i) => i.name === input);
        if (place < 0 || !from.connect(slot, to, place)) {
            throw new Error(`no link ${source}.${output} to ${target}.${input}`);
        }
    }
    app.canvas.setDirty(true, true);
    return JSON.stringify(app.graph.serialize());
}"""

# Shows the whole workflow in a window of the thumbnail's size, and nothing else.
_FRAME = """() => {
    const area = app.canvas;
    const box = app.graph.nodes.reduce(
        (b, n) => [
            Math.min(b[0], n.pos[0]), Math.min(b[1], n.pos[1] - 34),
            Math.max(b[2], n.pos[0] + n.size[0]), Math.max(b[3], n.pos[1] + n.size[1]),
        ],
        [Infinity, Infinity, -Infinity, -Infinity],
    );
    const [width, height] = [innerWidth, innerHeight];
    const scale = Math.min(width / (box[2] - box[0] + 60), height / (box[3] - box[1] + 60));
    const canvas = area.canvas.getBoundingClientRect();
    area.ds.scale = scale;
    area.ds.offset[0] = width / 2 / scale - (box[0] + box[2]) / 2 - canvas.left / scale;
    area.ds.offset[1] = height / 2 / scale - (box[1] + box[3]) / 2 - canvas.top / scale;
    area.setDirty(true, true);
}"""


def write(desk: Desk, name: str, example: Example) -> None:
    """One workflow and its picture."""
    text = desk.run(_BUILD, {"nodes": example.nodes, "links": example.links})
    data = json.loads(text)
    # How the front end looked at it is nobody's business, and would change with every run.
    data["extra"] = {}
    data["id"] = _stable_id(name)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", "utf-8")
    desk.load(data)
    desk.page.wait_for_timeout(500)
    desk.run(_FRAME)
    desk.page.wait_for_timeout(800)
    for quality in range(88, 30, -8):
        picture = FOLDER / f"{name}.jpg"
        desk.page.screenshot(path=picture, type="jpeg", quality=quality)
        if picture.stat().st_size < LARGEST:
            break


def _stable_id(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"switchyard/example_workflows/{name}"))


# Everything but the canvas and the widgets that lie on it.
_CHROME = """
    body * { visibility: hidden !important; }
    #graph-canvas, .dom-widget, .dom-widget * { visibility: visible !important; }
"""


def main() -> None:
    """Write them all."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(installations()[0], Path(folder))
        for kind, names in MODELS.items():
            (server.models / kind).mkdir(parents=True)
            for name in names:
                (server.models / kind / name).touch()
        (Path(folder) / "input" / "example.png").write_bytes(_one_pixel())
        with server, launched() as browser:
            desk = Desk(browser, server.url, WIDTH * 2, HEIGHT * 2).open()
            desk.set("Comfy.Graph.CanvasInfo", False)
            desk.page.add_style_tag(content=_CHROME)
            for name, maker in EXAMPLES.items():
                write(desk, name, maker())
            desk.close()


def _one_pixel() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "#777").save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
