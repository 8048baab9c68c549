"""The benchmark: the engine against PyTorch in time, memory and fidelity, one process a variant.

`networks` makes real architectures with random weights, `variants` and `engines` the ways to run
them, `measure` one row; `run` measures all rows of a command, each in a process of its own.
"""
