"""GPUs as their datasheets describe them. Rates are peaks, which nothing reaches; roofline.py has shares.

Sources: NVIDIA's datasheets and architecture papers of A100 (SXM, 80 GB), H100 (SXM5), H200 (SXM), GeForce
RTX 4090 and B200 (HGX), and the table of technical specifications by compute capability in the CUDA
programming guide. Matmul rates are dense: for Hopper and Blackwell the datasheets print twice as much, with
sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One GPU.

    Rates are per second; memory, caches and registers are in bytes unless their name says otherwise.
    """

    name: str
    capability: tuple[int, int]
    processors: int  # streaming multiprocessors
    memory: float
    bandwidth: float  # of the memory
    matmul16: float  # flops, bfloat16 or float16 inputs on tensor cores with sums in float32
    matmul8: float | None  # the same of FP8 inputs; None: it has none
    float32: float  # flops outside tensor cores
    link: float  # to the other GPUs of a machine, in and out together
    registers: int = 65536  # of 4 bytes, a processor
    threads: int = 2048  # resident on a processor
    blocks: int = 32  # resident on a processor
    shared: int = 0  # shared memory of a processor
    reserved: int = 1024  # of it, for every resident block

    @property
    def architecture(self) -> str:
        """The architecture that this package compiles for it, as nvcc names it."""
        return {(8, 0): "sm_80", (8, 9): "sm_80", (9, 0): "sm_90a", (10, 0): "sm_100a"}[self.capability]


TERA, GIGA, KIBI = 1e12, 1e9, 1024

DEVICES = {
    device.name: device
    for device in (
        Device(
            "A100",
            (8, 0),
            processors=108,
            memory=80 * GIGA,
            bandwidth=2.039 * TERA,
            matmul16=312 * TERA,
            matmul8=None,
            float32=19.5 * TERA,
            link=600 * GIGA,
            shared=164 * KIBI,
        ),
        Device(
            "H100",
            (9, 0),
            processors=132,
            memory=80 * GIGA,
            bandwidth=3.35 * TERA,
            matmul16=989.5 * TERA,
            matmul8=1979 * TERA,
            float32=66.9 * TERA,
            link=900 * GIGA,
            shared=228 * KIBI,
        ),
        Device(
            "H200",
            (9, 0),
            processors=132,
            memory=141 * GIGA,
            bandwidth=4.8 * TERA,
            matmul16=989.5 * TERA,
            matmul8=1979 * TERA,
            float32=66.9 * TERA,
            link=900 * GIGA,
            shared=228 * KIBI,
        ),
        Device(
            "RTX 4090",
            (8, 9),
            processors=128,
            memory=24 * GIGA,
            bandwidth=1.008 * TERA,
            matmul16=165.2 * TERA,
            matmul8=330.3 * TERA,
            float32=82.6 * TERA,
            link=64 * GIGA,  # PCIe 4.0 x16
            threads=1536,
            blocks=24,
            shared=100 * KIBI,
        ),
        Device(
            "B200",
            (10, 0),
            processors=148,
            memory=180 * GIGA,
            bandwidth=7.7 * TERA,
            matmul16=2250 * TERA,
            matmul8=4500 * TERA,
            float32=75 * TERA,
            link=1800 * GIGA,
            shared=228 * KIBI,
        ),
    )
}


def find(name: str) -> Device:
    """A device by its name or a part that no other's has, case and spaces ignored ("rtx4090", "4090").

    Raises:
        ValueError: an unknown one, or a part of several; the message lists the known ones.
    """
    wanted, known = _plain(name), {_plain(each): device for each, device in DEVICES.items()}
    matching = [device for each, device in known.items() if wanted in each]
    if wanted in known or len(matching) == 1:
        return known.get(wanted, matching[0])
    raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {name!r}")


def _plain(name: str) -> str:
    return "".join(name.split()).lower()
