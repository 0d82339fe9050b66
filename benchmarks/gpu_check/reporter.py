"""A pytest plugin: tells, as a line a moment, which test begins and how each one ended."""

from __future__ import annotations

import json
import os

import pytest

_FILE = os.environ.get("GPU_CHECK_REPORT", "")


def _tell(**facts: object) -> None:
    with open(_FILE, "a", encoding="utf-8") as file:  # closed at once: a crash must not take it along
        file.write(json.dumps(facts) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    # by the name that pytest reports, the one that it takes: files may lie outside of its root folder
    _tell(tests={item.nodeid: f"{item.path}::{item.nodeid.partition('::')[2]}" for item in session.items})


def pytest_runtest_logstart(nodeid: str) -> None:
    _tell(begins=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        why = str(report.longrepr)[-400:] if report.outcome == "failed" else ""
        _tell(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), why=why)
