"""Stream a prompt, change it while it runs, and write what was seen: python examples/stream.py OUT.mp4"""

import itertools
import sys

from stream_r1 import StreamR1Pipeline
from stream_r1.sampling.video import VideoWriter


def main(out: str) -> None:
    pipeline = StreamR1Pipeline.from_pretrained("assets/tiny")  # or a folder of Wan 2.1, with a checkpoint
    stream = pipeline.stream("a red ball bounces in a meadow at noon", seed=0)  # endless
    with VideoWriter(out, fps=pipeline.fps) as writer:
        for chunk in itertools.islice(stream, 6):
            writer.write(chunk.frames[0])  # [T, 3, H, W] in [0, 1]
            if chunk.index == 2:
                stream.switch("a blue star floats up by the sea at night")
    print(f"{out}: {stream.timings.fps:.0f} frames a second, first after {stream.timings.first_frame:.2f} s")


if __name__ == "__main__":
    main(sys.argv[1])
