"""Run by the Python of VBench's environment: VIDEOS FULL_INFO OUT DIMENSION DEVICE.

It must run on the Python and libraries of that environment, which has none of this project.
"""

import os
import subprocess
import sys


def main(videos, full_info, out, dimension, device):  # type: ignore[no-untyped-def]
    """Score one dimension. The results get their name when they are whole."""
    import torch
    from vbench import VBench  # the tool's: this file's folder is not searched

    if dimension == "temporal_flickering":
        videos = static_ones(videos, out)
    name = "unfinished_" + dimension
    VBench(torch.device(device), full_info, out).evaluate(
        videos_path=videos, name=name, dimension_list=[dimension]
    )
    ending = "_eval_results.json"
    os.replace(os.path.join(out, name + ending), os.path.join(out, dimension + ending))


def static_ones(videos, out):  # type: ignore[no-untyped-def]
    """A folder with the videos that VBench's own filter calls static: flickering is told from those alone."""
    result = os.path.join(out, "static")
    code = "from vbench.cli.vbench import main; main()"
    arguments = ["static_filter", "--videos_path", videos, "--result_path", result]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    kept = os.path.join(result, "filtered_videos")
    if not os.listdir(kept):
        sys.exit(
            "temporal_flickering: none of its videos is static: VBench asks for 25 of each of its prompts"
        )
    return kept


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]
    main(*sys.argv[1:])
