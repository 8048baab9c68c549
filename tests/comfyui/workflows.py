"""Workflows in API format, put together in Python."""

from __future__ import annotations

from typing import Any

from .checkpoints import CONFIGS

Link = list[Any]
Workflow = dict[str, dict[str, Any]]


class Graph:
    """Collects nodes: `graph.add("KSampler", model=…)` gives the link to its first output."""

    def __init__(self) -> None:
        self.workflow: Workflow = {}

    def add(self, class_type: str, output: int = 0, **inputs: Any) -> Link:
        """A node; its id is the first of the link, which leads to the given output."""
        node_id = str(len(self.workflow) + 1)
        self.workflow[node_id] = {"class_type": class_type, "inputs": inputs}
        return [node_id, output]

    def prompt(self, kind: str, seed: int, tokens: int = 77) -> Link:
        """A seeded conditioning that fits the checkpoints of a kind."""
        config = CONFIGS[kind]
        return self.add(
            "TestConditioning",
            seed=seed,
            tokens=tokens,
            width=config.context_dim,
            pooled=(config.pooled_dim or 6 * 256) - 6 * 256,
        )

    def checkpoint(self, kind: str, letter: str = "a") -> Link:
        """The MODEL of a checkpoint file; outputs 1 and 2 of the same node are CLIP and VAE."""
        return self.add("CheckpointLoaderSimple", ckpt_name=f"{kind}-{letter}.safetensors")

    def latent(self, width: int = 128, height: int = 128, batch: int = 1) -> Link:
        """An empty latent for an image of this size."""
        return self.add("EmptyLatentImage", width=width, height=height, batch_size=batch)

    def sample(
        self,
        model: Link,
        positive: Link,
        negative: Link,
        latent: Link,
        record: str,
        seed: int = 1,
        steps: int = 3,
        cfg: float = 4.0,
        sampler_name: str = "euler",
        scheduler: str = "normal",
        denoise: float = 1.0,
    ) -> Link:
        """TestSampler; what it computes is saved under `record`."""
        return self.add(
            "TestSampler",
            model=model,
            positive=positive,
            negative=negative,
            latent_image=latent,
            record=record,
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler_name,
            scheduler=scheduler,
            denoise=denoise,
        )
