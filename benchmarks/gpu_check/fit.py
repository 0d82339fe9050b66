"""The prediction's assumptions, as a measured GPU has them: shares of its datasheet's rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.gpu_check.records import Record, of_kind
from stream_r1.estimate.devices import DEVICES, Device
from stream_r1.estimate.roofline import ASSUMED, Assumptions, seconds, tile_share
from stream_r1.estimate.work import Work

SDPA = ("sdpa", "sdpa flash", "sdpa cuDNN")


def known_device(records: list[Record]) -> Device | None:
    """The datasheet of the GPU that was measured; None: there is none of it here."""
    names = [record["name"] for record in of_kind(records, "device")]
    return next((device for name in names for device in DEVICES.values() if device.name in name), None)


def fitted(records: list[Record], device: Device, decoder: Sequence[Work] = ()) -> Assumptions:
    """What was measured in place of what is assumed; what was not measured stays assumed.

    Args:
        records: of one GPU.
        device: its datasheet.
        decoder: the counted work of a chunk's decoding by Wan's autoencoder, from which, and its measured
            time, the share of convolutions follows.
    """
    shares: dict[str, float] = {}
    for record in of_kind(records, "copy"):
        shares["memory"] = record["bytes"] / record["seconds"] / device.bandwidth
    for kind, peak in (("matmul", device.matmul16), ("matmul8", device.matmul8)):
        real = [r for r in of_kind(records, kind) if len(set(r["shape"])) > 1]
        if real and peak is not None:
            rates = []
            for r in real:
                rows, _, columns = r["shape"]
                filled = tile_share(rows, columns, device.processors)
                rates.append(math.log(r["flops"] / r["seconds"] / peak / filled))
            shares[kind] = math.exp(sum(rates) / len(rates))
    for record in of_kind(records, "launch"):
        shares["kernel"] = record["seconds"]
    assumed = replace(ASSUMED, **shares)
    sampling = [
        r
        for r in of_kind(records, "timing")
        if r["op"] == "cached_chunk_attention" and "backward" not in r["case"]
    ]
    for field, backends in (("library_attention", SDPA), ("own_attention", ("cuda",))):
        rates = [r["flops"] / r["seconds"] for r in sampling if r["backend"] in backends and r["seconds"]]
        if rates:
            share = max(rates) / device.matmul16
            assumed = replace(assumed, **{field: getattr(assumed, field) | {device.capability: share}})
    decoding = [r["decode"] for r in of_kind(records, "sampler") if r["decoder"] == "wan" and r["fps"]]
    convolutions = [work for work in decoder if work.engine == "convolution"]
    if decoding and convolutions:
        rest = seconds(
            [work for work in decoder if work.engine != "convolution"], device, assumed, graph=True
        )
        flops = sum(work.flops * work.calls for work in convolutions)
        if min(decoding) > rest:
            share = flops / (device.matmul16 * (min(decoding) - rest))
            assumed = replace(assumed, convolution=share)
    return assumed
