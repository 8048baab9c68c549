"""The ComfyUI host: accelerated MODELs and CONTROL_NETs, and what the panel shows of them."""
