"""A plugin of pytest for bench.gpu: notes how each test went, and leaves out those of which that is known.

    python -m pytest -p bench.gpu_outcomes

From the environment: ``SOFIM_OUTCOMES``, a file that gets a line of JSON, ``[id, outcome, seconds]``, as soon as a test
is over; ``SOFIM_KNOWN``, a file with the ids of tests that are not to run, one a line. Works with pytest-xdist as well,
whose workers select the tests and whose first process hears how they went.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

KNOWN, OUTCOMES = "SOFIM_KNOWN", "SOFIM_OUTCOMES"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is known."""
    if path := os.environ.get(KNOWN):
        known = set(Path(path).read_text(encoding="utf-8").splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
        items[:] = [item for item in items if item.nodeid not in known]


class Writer:
    """Writes outcomes as they come, each in one go: who ends the run may do so at any time.

    Args:
        path: of the file, which is appended to.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a test that passes there are three reports, of set-up, call and tear-down."""
        failed_around = report.when != "call" and report.outcome == "failed"
        if report.when == "call" or failed_around or (report.when == "setup" and report.outcome == "skipped"):
            line = json.dumps([report.nodeid, report.outcome, round(report.duration, 3)]) + "\n"
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line)


def pytest_configure(config: pytest.Config) -> None:
    """Write in one process alone."""
    if (path := os.environ.get(OUTCOMES)) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(path), "sofim-outcomes")


def read(path: Path) -> dict[str, tuple[str, float]]:
    """The outcome and the seconds of each test by id; a failure stays one, whatever a later report of the test says."""
    found: dict[str, tuple[str, float]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            name, outcome, seconds = json.loads(line)
            if found.get(name, ("", 0.0))[0] != "failed":
                found[name] = (outcome, seconds)
    return found
