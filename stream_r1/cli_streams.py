"""``stream-r1 sample`` and ``stream-r1 serve``: arguments and help."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

_MOST_PROMPTS = 256

ModelsFolder = Annotated[
    str,
    typer.Option(
        "--models",
        "--model",
        help="Folder with student/ and vae/, or a diffusers folder or hub repository.",
    ),
]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Another student: a .pt or .safetensors file, or a folder of them.")
]
Network = Annotated[
    str | None,
    typer.Option(help="Of several in the checkpoint: generator_ema (default, if there) or generator."),
]
Adapter = Annotated[Path | None, typer.Option(help="LoRA adapter's folder, merged into it.")]
Preset = Annotated[
    str | None, typer.Option(help="How it streams: stream-r1, reward-forcing or self-forcing.")
]
Decoder = Annotated[
    str | None, typer.Option(help="taehv:PATH decodes with the tiny taew2_1.pth instead of the VAE.")
]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16 or float16; auto: bfloat16 on a GPU, else float32.")
]
VaeDtype = Annotated[
    str,
    typer.Option(
        help="The same, of VAE or decoder; auto: float32, small assets bfloat16 where the CPU has it."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto: a GPU if there is one.")]
VaeDevice = Annotated[str | None, typer.Option(help="Of the VAE, if another.")]
TextDevice = Annotated[str | None, typer.Option(help="Of the text encoder, if another.")]
Offload = Annotated[
    bool, typer.Option("--offload", help="Idle models wait in the CPU's memory: only one is on the GPU.")
]
CudaGraph = Annotated[
    bool, typer.Option("--cuda-graph", help="Replay the student's passes as CUDA graphs (on a GPU).")
]
TextCache = Annotated[
    Path | None,
    typer.Option(help="Folder that keeps prompt embeddings (default: ~/.cache/stream-r1/prompts)."),
]
Size = Annotated[str | None, typer.Option(help="Height x width in pixels, as 480x832.")]


def sample(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One or more prompts; they make one batch.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt, as an option; repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="The mp4; several prompts are numbered.")] = Path(
        "out/sample.mp4"
    ),
    models: ModelsFolder = "assets/tiny",
    checkpoint: Checkpoint = None,
    network: Network = None,
    adapter: Adapter = None,
    preset: Preset = None,
    decoder: Decoder = None,
    dtype: Dtype = "auto",
    vae_dtype: VaeDtype = "auto",
    device: Device = "auto",
    vae_device: VaeDevice = None,
    text_device: TextDevice = None,
    offload: Offload = False,
    cuda_graph: CudaGraph = False,
    text_cache: TextCache = None,
    size: Size = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=1e6, help="Length; Ctrl-C ends it earlier.")] = 5.0,
    forever: Annotated[bool, typer.Option("--forever", help="Until Ctrl-C.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same video, bit for bit.")] = 0,
    start: Annotated[Path | None, typer.Option(help="Video or picture to go on from.")] = None,
    scale: Annotated[int, typer.Option(min=1, help="Enlarge the pictures by a whole factor.")] = 1,
    sheet: Annotated[bool, typer.Option("--sheet", help="Write a contact sheet (PNG) too.")] = False,
) -> None:
    """Stream a student into mp4 files, written as frames arrive."""
    from stream_r1.commands.sample import ModelChoice, Output, run

    prompts = [*(prompts or ()), *(prompt or ())]
    if not prompts:
        raise typer.BadParameter(
            'expected at least one, as in: stream-r1 sample "a rabbit"', param_hint="prompts"
        )
    if len(prompts) > _MOST_PROMPTS:
        raise typer.BadParameter(
            f"expected at most {_MOST_PROMPTS}, which make one batch, got {len(prompts)}",
            param_hint="prompts",
        )
    if not math.isfinite(seconds):
        raise typer.BadParameter(f"expected a finite number, got {seconds}", param_hint="--seconds")
    named = ModelChoice(
        folder=models,
        checkpoint=checkpoint,
        network=network,
        adapter=adapter,
        preset=preset,
        decoder=decoder,
        dtype=dtype,
        vae_dtype=vae_dtype,
        device=device,
        vae_device=vae_device,
        text_device=text_device,
        offload=offload,
        text_cache=text_cache,
        cuda_graph=cuda_graph,
    )
    length = None if forever else seconds
    output = Output(path=out, scale=scale, sheet=sheet)
    run(prompts, output, named, size=size, seconds=length, seed=seed, start=start)


def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs the link's token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8600,
    prompt: Annotated[str | None, typer.Option(help="What a stream shows at first.")] = None,
    token: Annotated[
        str | None, typer.Option(help="Token of the link (default: drawn where needed).")
    ] = None,
    origin: Annotated[
        list[str] | None, typer.Option(help="Another origin whose pages may connect; repeatable.")
    ] = None,
    streams: Annotated[
        int | None, typer.Option(min=1, help="Streams at once (default: as measured at the start).")
    ] = None,
    viewers: Annotated[int, typer.Option(min=1, help="Viewers at once, of all streams.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with its own models.")] = 1,
    models: ModelsFolder = "assets/tiny",
    checkpoint: Checkpoint = None,
    network: Network = None,
    adapter: Adapter = None,
    preset: Preset = None,
    decoder: Decoder = None,
    dtype: Dtype = "auto",
    vae_dtype: VaeDtype = "auto",
    device: Device = "auto",
    vae_device: VaeDevice = None,
    text_device: TextDevice = None,
    offload: Offload = False,
    cuda_graph: CudaGraph = False,
    text_cache: TextCache = None,
    size: Size = None,
) -> None:
    """Serve a page that streams while you type, until Ctrl-C."""
    from stream_r1.commands.sample import ModelChoice
    from stream_r1.commands.serve import run
    from stream_r1.serve.settings import PROMPT, Settings

    named = ModelChoice(
        folder=models,
        checkpoint=checkpoint,
        network=network,
        adapter=adapter,
        preset=preset,
        decoder=decoder,
        dtype=dtype,
        vae_dtype=vae_dtype,
        device=device,
        vae_device=vae_device,
        text_device=text_device,
        offload=offload,
        cuda_graph=cuda_graph,
        text_cache=text_cache,
    )
    settings = Settings(
        models=named,
        size=size,
        prompt=prompt or PROMPT,
        token=token,
        origins=tuple(origin or ()),
        streams=streams,
        viewers=viewers,
    )
    run(settings, host, port, workers)
