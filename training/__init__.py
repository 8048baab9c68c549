"""The training of the tiny world: checkpoints, a LoRA and a ControlNet small enough to ship."""
