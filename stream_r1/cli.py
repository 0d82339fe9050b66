"""The command ``stream-r1``: arguments and help.

What a command does is in ``stream_r1.commands``, imported when it runs.

Errors are one clear line on stderr and exit code 2; ``--debug`` shows the traceback. Signals exit with 128
and their number: Ctrl-C with 130, SIGTERM with 143, a lost terminal (SIGHUP) with 129.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from stream_r1.cli_streams import sample, serve
from stream_r1.ends import reporting_errors

_Misused: Any = typer.BadParameter.__base__  # of the arguments, whatever is wrong with them

app = typer.Typer(
    name="stream-r1",
    help="Distil a video diffusion model into one that streams, guided by a reward, and stream it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TakeOver = Annotated[
    bool,
    typer.Option("--take-over", help="Use the folder even if a process on another machine seems to hold it."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, dotted: student.lr=1e-5"),
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Distil a video diffusion model into one that streams, guided by a reward, and stream it."""


@app.command()
def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("out/demo"),
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe of the distillation (default: recipes/tiny/stream-r1.yaml).")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Settings of the demo itself, as --set chunks=4.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the report again from what is there.")
    ] = False,
    take_over: TakeOver = False,
) -> None:
    """Distil the tiny student, stream it before and after, and write a report. Minutes on two cores."""
    from stream_r1.commands.demo import run

    run(
        out,
        recipe,
        overrides or [],
        settings or [],
        fresh=fresh,
        report_only=report_only,
        take_over=take_over,
    )


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, as recipes/tiny/stream-r1.yaml.")],
    overrides: Overrides = None,
    check: Annotated[bool, typer.Option("--check", help="Check and show the settings, run nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")] = False,
    take_over: TakeOver = False,
) -> None:
    """Train a student from a recipe; resume where an earlier run stopped.

    On several GPUs: torchrun --nproc-per-node N -m stream_r1 train RECIPE.
    """
    from stream_r1.commands.train import run

    run(recipe, overrides or [], check=check, fresh=fresh, take_over=take_over)


@app.command()
def estimate(
    recipe: Annotated[Path, typer.Argument(help="A recipe, as recipes/wan2.1-1.3b/stream-r1.yaml.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, max=2**20, help="How many, on machines of 8.")] = 8,
    device: Annotated[str, typer.Option(help="a100, h100, h200, rtx4090 or b200.")] = "h100",
    as_json: Annotated[bool, typer.Option("--json", help="Bytes and seconds as JSON.")] = False,
) -> None:
    """Predict the memory and time that a recipe needs, and what to change where it does not fit."""
    from stream_r1.commands.estimate import run

    run(recipe, overrides or [], gpus=gpus, device=device, as_json=as_json)


app.command()(sample)
app.command()(serve)


@app.command()
def replay(
    files: Annotated[list[Path], typer.Argument(help="Files of the golden format (.safetensors).")],
    tolerance: Annotated[float, typer.Option(min=0.0, help="Worst relative error allowed.")] = 1e-5,
) -> None:
    """Run recorded calls of another implementation through the student.

    Exit 1 past the tolerance, 2 where a file was refused; the others are replayed all the same.
    """
    from stream_r1.commands.replay import run

    raise typer.Exit(run(files, tolerance=tolerance))


data_app = typer.Typer(help="The drawn world and its figures; trajectories of teachers.")
app.add_typer(data_app, name="data")
Prompts = Annotated[str, typer.Option(help="Prompts of the drawn world, one a line; or drawn: all of them.")]


@data_app.command("sheet")
def data_sheet(
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("out/drawings.png"),
    prompts: Prompts = "recipes/tiny/prompts.txt",
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that the prompts leave open.")] = 0,
) -> None:
    """Write a picture with frames of a drawing of every prompt."""
    from stream_r1.commands.data import sheet

    sheet(out, prompts, seed)


@data_app.command("reference", hidden=True)
def data_reference(
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path(
        "assets/tiny/reference/statistics.safetensors"
    ),
    prompts: Prompts = "recipes/tiny/prompts.txt",
) -> None:
    """Write the statistics of drawings that KID compares with."""
    from stream_r1.commands.data import reference

    reference(out, prompts)


@data_app.command("baselines", hidden=True)
def data_baselines(
    recipe: Annotated[Path, typer.Argument(help="The recipe whose teacher and autoencoder to use.")] = (
        Path("recipes/tiny/stream-r1.yaml")
    ),
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path(
        "assets/tiny/reference/baselines.json"
    ),
) -> None:
    """Measure the teacher's samples and drawings, for the demo's table."""
    from stream_r1.commands.data import baselines

    baselines(out, recipe)


@data_app.command("ode-pairs")
def data_ode_pairs(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe of an initialization, as wan2.1-1.3b/ode-init.yaml.")
    ],
    overrides: Overrides = None,
    take_over: TakeOver = False,
) -> None:
    """Write the teacher's trajectories for a student's initialization; resumes where it stopped."""
    from stream_r1.commands.data import ode_pairs

    ode_pairs(recipe, overrides or [], take_over=take_over)


@app.command()
def study(
    study: Annotated[Path, typer.Argument(help="A YAML file, as recipes/studies/tiny.yaml.")],
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(min=1, max=1024, help="Runs at a time, each on its cores or GPU.")] = 1,
    trainer: Annotated[
        str | None,
        typer.Option(help='What trains, for a launcher: "torchrun --nproc-per-node 8 -m stream_r1".'),
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write tables and page from the runs that are done.")
    ] = False,
) -> None:
    """Compare ways of weighting: train every arm with every seed, compare them in pairs, write a page.

    Resumes where it was stopped.
    """
    from stream_r1.commands.study import run

    run(study, overrides or [], jobs=jobs, trainer=trainer, report_only=report_only)


@app.command("eval")
def evaluate(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, as recipes/evals/tiny.yaml.")],
    overrides: Overrides = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write tables and page from the pieces that are done.")
    ] = False,
) -> None:
    """Compare models by videos of the same prompts and noise: measures, drift, latency, VBench, judges.

    Resumes where it was stopped.
    """
    from stream_r1.commands.eval import run

    run(recipe, overrides or [], report_only=report_only)


votes_app = typer.Typer(
    help="People's preference: blind comparisons of models, side by side.", no_args_is_help=True
)
app.add_typer(votes_app, name="votes")

Comparison = Annotated[Path, typer.Argument(help="A YAML file: models and their videos, prompts, questions.")]


@votes_app.command("serve")
def votes_serve(
    comparison: Comparison,
    overrides: Overrides = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs the link's token.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8500,
) -> None:
    """Serve the page on which raters vote, until Ctrl-C; votes are on the disk as they come."""
    from stream_r1.commands.votes import serve

    serve(comparison, overrides or [], host, port)


@votes_app.command("report")
def votes_report(comparison: Comparison, overrides: Overrides = None) -> None:
    """Show win rates with intervals and the raters' agreement, and write them as a page and a table."""
    from stream_r1.commands.votes import report

    report(comparison, overrides or [])


@app.command()
def info(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Model folders, .safetensors files or recipes.")
    ] = None,
) -> None:
    """Say what this machine can run, or what is in a model folder, a weight file or a recipe."""
    from stream_r1.commands.info import run

    run(paths or [])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; never returns (``SystemExit``)."""
    run_app(app, "stream-r1", argv)


def run_app(
    command: typer.Typer | Callable[..., None], name: str | None = None, argv: Sequence[str] | None = None
) -> None:
    """Run an app of several commands, or a function as one, ending as ``stream-r1`` does; never returns."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not isinstance(command, typer.Typer):
        function, command = command, typer.Typer(add_completion=False)
        command.command()(function)
    elif not args:
        args = ["--help"]
    debug = "--debug" in args or bool(os.environ.get("STREAM_R1_DEBUG"))
    args = [arg for arg in args if arg != "--debug"]  # welcome anywhere on the line
    for library in ("DIFFUSERS", "TRANSFORMERS"):  # their remarks on loading are not about what the user did
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    # torch's, of a float32 norm of bfloat16 values under autocast, which is what is meant
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    for stream in (sys.stdout, sys.stderr):  # paths may hold what no encoding has
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with reporting_errors(None if debug else _one_line):
        sys.exit(command(args, prog_name=name, standalone_mode=False))


def _one_line(error: Exception) -> str:
    from stream_r1.messages import one_line

    text = str(error).strip() or type(error).__name__
    if isinstance(error, _Misused):
        return one_line(f"{error.format_message()}{_got(error)} ({_command(error)} --help says more)")
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{os.fsdecode(error.filename)}: {error.strerror.lower()}"
    expected = isinstance(error, ValueError | TypeError | OSError) or type(error).__module__.startswith(
        "stream_r1"
    )
    if expected:
        return one_line(text)
    text = one_line(text.partition("\n")[0])  # torch has its C++ stack below the line that says what is wrong
    if isinstance(error, MemoryError) or "not enough memory" in text or "out of memory" in text:
        return f"there is not enough memory for it: {text}"
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _got(error: BaseException) -> str:
    """What came, where the command line's own message does not say so."""
    from stream_r1.messages import shown

    cause: Any = error.__cause__ or error.__context__
    problems = cause.errors() if hasattr(cause, "errors") else []
    return f", got {shown(problems[0]['input'])}" if problems else ""


def _command(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return "stream-r1" if context is None else context.command_path
