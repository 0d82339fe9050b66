"""Writes docs/gpu.md: python -m benchmarks.prediction [FILE]"""

import sys
from pathlib import Path

from benchmarks.prediction import kernels, page, streaming, variants
from stream_r1.commands.outputs import check_files
from stream_r1.estimate.devices import DEVICES
from stream_r1.estimate.work import fake_tensors


def predict() -> page.Predictions:
    with fake_tensors():
        decoder = streaming.diffusers_decoder(21, 90, 160)
    return page.Predictions(
        ours={name: streaming.ours(device) for name, device in DEVICES.items()},
        variants=variants.variants(DEVICES["H100"]),
        shared={n: streaming.ours(DEVICES["H100"], n) for n in page.SHARED},
        fp8={
            name: (streaming.in_fp8(device), streaming.in_fp8(device, cache=True))
            for name, device in DEVICES.items()
            if device.matmul8 is not None
        },
        published=streaming.published(),
        decoder=decoder,
        attention={name: streaming.attention_backend(device) for name, device in DEVICES.items()},
        ops=kernels.ops(),
        sizes=kernels.sizes(),
    )


if __name__ == "__main__":
    file = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2] / "docs" / "gpu.md")
    check_files("FILE", [file], {})
    file.write_text(page.markdown(predict()), encoding="utf-8")
    print(file)
