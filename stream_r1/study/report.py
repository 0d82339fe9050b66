"""A study's tables and its page, from what its runs left."""

from __future__ import annotations

import base64
import csv
import io
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_r1.demo.report import playable
from stream_r1.disk.whole import write_text
from stream_r1.distill.guard import FIGURES as WATCHED
from stream_r1.evaluation.report import MEASURES
from stream_r1.evaluation.single import FIGURES as SINGLE
from stream_r1.files import FileError, read_json
from stream_r1.pages.report import bar, reach, render, short, signed
from stream_r1.study.differences import Difference, difference
from stream_r1.study.measure import FIGURES, VIDEOS
from stream_r1.study.plan import Run, Study
from stream_r1.study.run import Cost, is_done
from stream_r1.watch.writers import METRICS, read_metrics

Numbers = dict[str, dict[str, dict[int, NDArray[np.float64]]]]
"""figure -> arm -> seed -> [videos]."""
Done = list[tuple[Run, list[dict[str, float]]]]
"""Runs that are done, each with the rows of its metrics."""


@dataclass(frozen=True)
class Arm:
    """One arm's row.

    means: by figure, over seeds and videos. changes: by figure, from the arm that all are compared with.
    step: seconds of a student's step with its critic steps, the median over runs. memory: bytes, the largest
    of its runs.
    """

    name: str
    seeds: int
    means: dict[str, float]
    changes: dict[str, Difference]
    step: float | None
    memory: int


def write_report(study: Study) -> Path:
    """Write results.csv, differences.csv and index.html into the study's folder, from the runs that are done.

    Returns the page. Raises FileError for a run's file that can't be read.
    """
    done = [(run, list(read_metrics(run.folder / METRICS))) for run in study.runs if is_done(run)]
    numbers = _read_numbers(done)
    arms = [_arm(study, name, numbers, done) for name in study.settings.arms]
    arms = [arm for arm in arms if arm.seeds]
    write_text(study.out / "results.csv", _results(numbers))
    write_text(study.out / "differences.csv", _differences(arms))
    page = render("stream_r1.study", "report.html.j2", _context(study, done, numbers, arms))
    write_text(study.out / "index.html", page)
    return study.out / "index.html"


def _read_numbers(done: Done) -> Numbers:
    numbers: Numbers = {}
    for run, _ in done:
        path = run.folder / FIGURES
        for figure, values in read_json(path).items():
            if not isinstance(values, list) or not all(type(v) in (int, float) for v in values):
                raise FileError(f"{path}: {figure}: expected a list of numbers")
            numbers.setdefault(figure, {}).setdefault(run.arm, {})[run.seed] = np.array(values, np.float64)
    return numbers


def _arm(study: Study, name: str, numbers: Numbers, done: Done) -> Arm:
    runs = [(run, rows) for run, rows in done if run.arm == name]
    means, changes = {}, {}
    for figure, by_arm in numbers.items():
        own, base = by_arm.get(name), by_arm.get(study.settings.against)
        if own:
            means[figure] = float(np.mean([np.nanmean(values) for values in own.values()]))
        if own and base and name != study.settings.against:
            found = difference(own, base)
            if found is not None:
                changes[figure] = found
    steps = [seconds for run, rows in runs if (seconds := _step_seconds(run, rows)) is not None]
    return Arm(
        name,
        len(runs),
        means,
        changes,
        median(steps) if steps else None,
        max((Cost.of(run.folder).peak_bytes for run, _ in runs), default=0),
    )


def _step_seconds(run: Run, rows: list[dict[str, float]]) -> float | None:
    """Seconds of a student's step with its critic steps: the median over a run; None without metrics."""
    seconds = [row["seconds/step"] for row in rows if "seconds/step" in row]
    period = run.recipe.critic_updates
    whole = [sum(seconds[i : i + period]) for i in range(0, len(seconds) - period + 1, period)]
    return median(whole) if whole else None


def _results(numbers: Numbers) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("arm", "seed", "figure", "mean", "videos"))
    for figure, by_arm in numbers.items():
        for arm, by_seed in by_arm.items():
            for seed, values in by_seed.items():
                writer.writerow((arm, seed, figure, f"{np.nanmean(values):.6g}", len(values)))
    return text.getvalue()


def _differences(arms: list[Arm]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("arm", "figure", "difference", "low", "high", "seeds"))
    for arm in arms:
        for figure, d in arm.changes.items():
            each = " ".join(f"{x:.4g}" for x in d.seeds)
            writer.writerow((arm.name, figure, f"{d.mean:.6g}", f"{d.low:.6g}", f"{d.high:.6g}", each))
    return text.getvalue()


def _context(study: Study, done: Done, numbers: Numbers, arms: list[Arm]) -> dict[str, Any]:
    base = next((arm for arm in arms if arm.name == study.settings.against), None)
    return {
        "against": study.settings.against,
        "title": f"Study: {len(study.settings.arms)} arms, {len(study.settings.seeds)} seeds",
        "recipe": study.settings.recipe,
        "done": len(done),
        "runs": len(study.runs),
        "videos": study.settings.videos,
        "figures": [_figure(name, base, arms) for name in numbers],
        "costs": [_cost(arm, base) for arm in arms],
        "guards": [row for name in study.settings.arms if (row := _guard(name, done)) is not None],
        "rows": _videos(study, done),
        "arms": {
            name: str(changes or "the recipe as it is") for name, changes in study.settings.arms.items()
        },
    }


def _figure(name: str, base: Arm | None, arms: list[Arm]) -> dict[str, Any]:
    measure = SINGLE.get(name) or MEASURES.get(name)
    meaning = measure.meaning if measure else "an axis of the reward that judges"
    better = measure.better if measure else "higher"
    furthest = reach(arm.changes[name] for arm in arms if name in arm.changes)
    rows = []
    for arm in arms:
        change = arm.changes.get(name)
        row: dict[str, Any] = {"arm": arm.name, "mean": short(arm.means.get(name)), "change": None}
        if change is not None:
            row["change"] = bar(change, furthest, better)
            row["seeds"] = ", ".join(signed(x) for x in change.seeds)
        rows.append(row)
    return {"name": name, "meaning": meaning, "better": better, "rows": rows}


def _cost(arm: Arm, base: Arm | None) -> dict[str, str]:
    step, memory = arm.step, arm.memory
    share = f"{step / base.step:.2f}" if step and base and base.step else "–"
    more = f"{memory / base.memory:.2f}" if memory and base and base.memory else "–"
    return {
        "arm": arm.name,
        "seeds": str(arm.seeds),
        "step": "–" if step is None else f"{step:.2f} s",
        "step_share": share,
        "memory": f"{memory / 2**30:.2f} GiB" if memory else "–",
        "memory_share": more,
    }


def _guard(arm: str, done: Done) -> dict[str, str] | None:
    """What a guard found in the arm's runs, the last check beside the first; None without a guard."""
    shares: dict[str, list[float]] = {}
    alarms, watched = 0, 0
    for run, rows in done:
        settings = run.recipe.guard
        if run.arm != arm or settings is None:
            continue
        checks = [row for row in rows if "guard/fault" in row]
        if len(checks) < 2:
            continue
        watched += 1
        faults = "".join("x" if row["guard/fault"] else "." for row in checks)
        alarms += "x" * settings.patience in faults
        for name in WATCHED:
            first, last = checks[0][f"guard/{name}"], checks[-1][f"guard/{name}"]
            shares.setdefault(name, []).append(last / first if first else float("nan"))
    if not watched:
        return None
    return {"arm": arm, "alarms": f"{alarms} of {watched} runs"} | {
        name: f"{min(values):.2f} to {max(values):.2f}" for name, values in shares.items()
    }


def _videos(study: Study, done: Done) -> list[dict[str, Any]]:
    """For each shown prompt the first seed's video of every arm."""
    first = study.settings.seeds[0]
    rows = []
    for index, prompt in enumerate(study.settings.shown):
        videos = []
        for run, _ in done:
            path = run.folder / VIDEOS / f"{index}.mp4"
            if run.seed == first and path.is_file():
                videos.append({"arm": run.arm, "data": base64.b64encode(playable(path)).decode("ascii")})
        if videos:
            rows.append({"prompt": prompt, "videos": videos})
    return rows
