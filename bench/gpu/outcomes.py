"""A plugin of pytest for bench.gpu: notes how each test went, and leaves out those that have passed before.

    SOFIM_GPU_RECORD=FILE python -m pytest -p bench.gpu.outcomes

Works with pytest-xdist, whose workers select the tests and whose first process hears how they went.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.gpu import record


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has passed."""
    passed = record.Record(Path(os.environ[record.VARIABLE])).passed()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]


class Writer:
    """Writes an outcome as soon as it is known."""

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported may need a package that is not here."""
        if report.failed:
            reason = report.longreprtext.strip().splitlines()[-1].removeprefix("E").strip()[:300]
            record.add(Path(os.environ[record.VARIABLE]), "uncollected", name=report.nodeid, reason=reason)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a test that passes there are three reports, of set-up, call and tear-down."""
        around = report.when != "call" and report.outcome == "failed"
        if report.when == "call" or around or (report.when == "setup" and report.outcome == "skipped"):
            how = {"name": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
            how["part"] = os.environ.get(record.PART, "")
            record.add(Path(os.environ[record.VARIABLE]), "test", **how)


def pytest_configure(config: pytest.Config) -> None:
    """Write in one process alone."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(), "sofim-outcomes")
