"""What is known of GPUs: the figures that the performance model divides work by.

The driver says how many multiprocessors there are, the size of the L2 cache and the shared memory
of a block. Clocks, bandwidths and the rate of the tensor cores it does not say, or not for the
whole range of drivers: those come from a table of NVIDIA's data sheets, and for a chip that is not
in the table from the table's chip of the same compute capability, scaled by its multiprocessors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..hardware import Hardware

RESERVED_BYTES = 1024
"""Of shared memory for each block, by CUDA itself."""


@dataclass(frozen=True)
class Chip:
    """One GPU.

    tensor_tflops: dense products of fp16 or bf16, accumulated in fp32 (a GeForce's rate is half of
    what it does with fp16 accumulators, and half of what is advertised with sparsity).
    clock_mhz: the boost clock. launch_us: what a launch in a CUDA graph takes beyond its work.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock_mhz: float
    tensor_tflops: float
    l2_bytes: int
    dram_gbps: float
    shared_bytes: int  # of one multiprocessor, as its blocks may have it
    launch_us: float = 2.0

    @property
    def cycle_us(self) -> float:
        """Microseconds of one clock."""
        return 1.0 / self.clock_mhz

    @property
    def multiply_adds(self) -> float:
        """Of the tensor cores of one multiprocessor, per clock."""
        return self.tensor_tflops * 1e6 / (2 * self.multiprocessors * self.clock_mhz)

    @property
    def dram_us_per_byte(self) -> float:
        """Microseconds that a byte from or to DRAM takes."""
        return 1e-3 / self.dram_gbps


def _chip(
    name: str,
    capability: tuple[int, int],
    multiprocessors: int,
    clock_mhz: float,
    tensor_tflops: float,
    l2_mib: float,
    dram_gbps: float,
    shared_kib: int,
) -> Chip:
    return Chip(
        *(name, capability, multiprocessors, clock_mhz, tensor_tflops),
        *(int(l2_mib * 2**20), dram_gbps, shared_kib << 10),
    )


# The clock is the boost clock of the data sheet; MiB of L2, GB/s of DRAM, KiB of shared memory. Of
# equal capability, the first speaks for those that are not listed.
KNOWN = (
    _chip("Tesla T4", (7, 5), 40, 1590, 65, 4, 320, 64),
    _chip("NVIDIA A100", (8, 0), 108, 1410, 312, 40, 1555, 164),
    _chip("NVIDIA A100 80GB", (8, 0), 108, 1410, 312, 40, 1935, 164),
    _chip("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1410, 312, 40, 2039, 164),
    _chip("NVIDIA GeForce RTX 3090", (8, 6), 82, 1695, 71, 6, 936, 100),
    _chip("NVIDIA GeForce RTX 3060", (8, 6), 28, 1777, 25.6, 3, 360, 100),
    _chip("NVIDIA A10", (8, 6), 72, 1695, 125, 6, 600, 100),
    _chip("NVIDIA GeForce RTX 4090", (8, 9), 128, 2520, 165, 72, 1008, 100),
    _chip("NVIDIA GeForce RTX 4070", (8, 9), 46, 2475, 58.3, 36, 504, 100),
    _chip("NVIDIA L4", (8, 9), 58, 2040, 121, 48, 300, 100),
    _chip("NVIDIA L40S", (8, 9), 142, 2520, 362, 96, 864, 100),
    _chip("NVIDIA L20", (8, 9), 92, 2520, 119.5, 96, 864, 100),
    _chip("NVIDIA H100 80GB HBM3", (9, 0), 132, 1830, 989, 50, 3350, 228),
    _chip("NVIDIA H100 PCIe", (9, 0), 114, 1755, 756, 50, 2039, 228),
    _chip("NVIDIA H200", (9, 0), 132, 1830, 989, 50, 4800, 228),
    _chip("NVIDIA B200", (10, 0), 148, 1965, 2250, 126, 8000, 228),
    _chip("NVIDIA GeForce RTX 5090", (12, 0), 170, 2407, 209.5, 96, 1792, 100),
)


def named(name: str) -> Chip | None:
    """The one in the table that a driver's name for a GPU begins with, the longest of several."""
    # Whole words: an L40 is no L4.
    found = [chip for chip in KNOWN if f"{name} ".startswith(f"{chip.name} ")]
    return max(found, key=lambda chip: len(chip.name), default=None)


def chip_of(hardware: Hardware) -> Chip | None:
    """The figures of a GPU; None for a CPU.

    The name in the table that the driver's begins with, the longest of several, else the first of
    the nearest capability that is not newer.
    """
    if hardware.kind != "cuda" or hardware.capability is None:
        return None
    listed = named(hardware.name)
    if listed is not None:
        found = listed
    else:
        older = [chip for chip in KNOWN if chip.capability <= hardware.capability]
        nearest = max((chip.capability for chip in older), default=KNOWN[0].capability)
        found = next(chip for chip in KNOWN if chip.capability == nearest)
    share = hardware.multiprocessors / found.multiprocessors
    return replace(
        found,
        name=hardware.name,
        capability=hardware.capability,
        multiprocessors=hardware.multiprocessors,
        tensor_tflops=found.tensor_tflops * share,
        dram_gbps=found.dram_gbps if listed else found.dram_gbps * share,
        l2_bytes=hardware.l2_bytes or found.l2_bytes,
        shared_bytes=max(found.shared_bytes, hardware.shared_bytes or 0),
    )
