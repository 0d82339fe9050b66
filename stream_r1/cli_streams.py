"""``stream-r1 sample`` and ``stream-r1 serve``: arguments and help."""

import functools
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from stream_r1.commands.sample import ModelChoice

# No `from __future__ import annotations`: `_with_models` needs the annotations, not their text.

_MOST_PROMPTS = 256

Size = Annotated[str | None, typer.Option(help="Height x width in pixels, as 480x832.")]


def _model_options(
    folder: Annotated[
        str,
        typer.Option(
            "--models",
            "--model",
            help="Folder with student/ and vae/, or a diffusers folder or hub repository.",
        ),
    ] = "assets/tiny",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Another student: a .pt or .safetensors file, or a folder of them.")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(help="Which network of the checkpoint: generator_ema (default, if there) or generator."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="LoRA adapter's folder, merged into the student.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Streaming settings: stream-r1, reward-forcing or self-forcing.")
    ] = None,
    decoder: Annotated[
        str | None, typer.Option(help="taehv:PATH decodes with the tiny taew2_1.pth instead of the VAE.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; auto: bfloat16 on a GPU, else float32.")
    ] = "auto",
    vae_dtype: Annotated[
        str,
        typer.Option(
            help="Dtype of VAE or decoder; auto: float32, on GPUs bfloat16, as small assets on CPUs with it."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto: a GPU if there is one.")] = "auto",
    vae_device: Annotated[str | None, typer.Option(help="Device of the VAE, if another.")] = None,
    text_device: Annotated[str | None, typer.Option(help="Device of the text encoder, if another.")] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep idle models in CPU memory; one at a time is on the GPU.")
    ] = False,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Replay the student's passes as CUDA graphs (on a GPU).")
    ] = False,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="fp8: the student multiplies in FP8 (GPUs of compute capability 8.9 or later); "
            "fp8-emulated: the same numbers anywhere, slower."
        ),
    ] = None,
    cache_dtype: Annotated[
        str, typer.Option(help="fp8: keys and values in 8 bits, half the memory; auto: as --dtype.")
    ] = "auto",
    text_cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps prompt embeddings (default: ~/.cache/stream-r1/prompts)."),
    ] = None,
) -> None:
    """The options of every command that streams, which are the fields of `ModelChoice`."""


def _with_models(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of `_model_options` too, called with their `ModelChoice` as `chosen`."""
    shared = inspect.signature(_model_options).parameters
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "chosen"]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        from stream_r1.commands.sample import ModelChoice

        chosen = ModelChoice(**{name: given.pop(name) for name in shared})
        command(chosen=chosen, **given)

    run.__signature__ = inspect.Signature([*own, *shared.values()])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*own, *shared.values())}
    return run


@_with_models
def sample(
    chosen: "ModelChoice",
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One or more prompts; they make one batch.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt, as an option; repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="The mp4 file; with several prompts, numbered files.")] = Path(
        "out/sample.mp4"
    ),
    size: Size = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=1e6, help="Length; Ctrl-C ends it earlier.")] = 5.0,
    forever: Annotated[bool, typer.Option("--forever", help="Stream until Ctrl-C.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same video, bit for bit.")] = 0,
    start: Annotated[Path | None, typer.Option(help="Video or picture to continue from.")] = None,
    scale: Annotated[int, typer.Option(min=1, help="Enlarge the pictures by a whole factor.")] = 1,
    sheet: Annotated[bool, typer.Option("--sheet", help="Write a contact sheet (PNG) too.")] = False,
    sequence_parallel: Annotated[
        int, typer.Option(min=1, max=1024, help="Processes, by torchrun, that share the student's passes.")
    ] = 1,
) -> None:
    """Stream a student into mp4 files, written as frames arrive.

    One stream on several GPUs: torchrun --nproc-per-node N -m stream_r1 sample PROMPT --sequence-parallel N.
    """
    from stream_r1.commands.sample import Output, run

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
    length = None if forever else seconds
    output = Output(path=out, scale=scale, sheet=sheet)
    run(
        prompts,
        output,
        chosen,
        size=size,
        seconds=length,
        seed=seed,
        start=start,
        processes=sequence_parallel,
    )


@_with_models
def serve(
    chosen: "ModelChoice",
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs the link's token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8600,
    prompt: Annotated[str | None, typer.Option(help="What a stream shows at first.")] = None,
    token: Annotated[
        str | None, typer.Option(help="Token of the link (default: random where needed).")
    ] = None,
    origin: Annotated[
        list[str] | None, typer.Option(help="Another origin whose pages may connect; repeatable.")
    ] = None,
    streams: Annotated[
        int | None, typer.Option(min=1, help="Streams at once (default: as measured at the start).")
    ] = None,
    viewers: Annotated[int, typer.Option(min=1, help="Viewers at once, of all streams.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with its own models.")] = 1,
    size: Size = None,
) -> None:
    """Serve a page that streams while you type, until Ctrl-C."""
    from stream_r1.commands.serve import run
    from stream_r1.serve.settings import PROMPT, Settings

    settings = Settings(
        models=chosen,
        size=size,
        prompt=prompt or PROMPT,
        token=token,
        origins=tuple(origin or ()),
        streams=streams,
        viewers=viewers,
    )
    run(settings, host, port, workers)
