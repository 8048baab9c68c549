"""Tests that need ComfyUI: some run inside its Python, some talk to a real server of it."""
