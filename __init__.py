"""Root of the pack as ComfyUI loads it: a custom node folder is imported under its own path.

It registers nothing: this version has no nodes, so it claims no entry point either, and ComfyUI
says so in its log. Importing it costs nothing and pulls in neither torch nor the host.
"""
