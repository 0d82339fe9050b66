"""What a launch did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Report:
    """Counts of a launch.

    Attributes:
        instructions: instructions, counted once for each warp that runs them.
        barriers: times that a block passed a barrier.
        global_load_bytes, global_store_bytes: bytes that lanes asked for, asynchronous copies included, as
            if there were no cache.
        shared_load_bytes, shared_store_bytes: the same for shared memory.
        atomics: lanes that updated global memory.
        bank_conflicts: extra passes over the banks of shared memory, if the launch counted them.
        shared_bytes: shared memory of a block, static and dynamic.
        seconds: time that the launch took here; it says nothing about a GPU.
    """

    instructions: int = 0
    barriers: int = 0
    global_load_bytes: int = 0
    global_store_bytes: int = 0
    shared_load_bytes: int = 0
    shared_store_bytes: int = 0
    atomics: int = 0
    bank_conflicts: int = 0
    shared_bytes: int = 0
    seconds: float = 0.0
