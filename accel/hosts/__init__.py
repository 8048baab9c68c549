"""What ties engines to the programs that hold the models: diffusers, ComfyUI, A1111."""
