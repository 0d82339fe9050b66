"""Prints, after the tables, how much faster ours is than each rival in every group."""

from collections import defaultdict

import pytest


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    fastest: dict[str, dict[str, float]] = defaultdict(dict)
    for bench in session.benchmarks if session is not None else ():
        implementation = (bench.params or {}).get("implementation")
        if implementation is not None and bench.stats.rounds:
            case = bench.group or ", ".join(str(v) for k, v in bench.params.items() if k != "implementation")
            fastest[case][implementation] = bench.stats.min
    if not fastest:
        return
    terminalreporter.section("ours against its rivals (time of the rival / time of ours, fastest rounds)")
    for case, times in fastest.items():
        ours = times.pop("ours", None)
        if ours is None or not times:
            continue
        ratios = ", ".join(f"{rival} {time / ours:.2f}x" for rival, time in times.items())
        terminalreporter.write_line(f"{case:<70} {ours * 1e3:9.3f} ms   {ratios}")
