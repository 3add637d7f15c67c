"""pytest in a step of `make gpu`: its share of the tests, and a line in the record as each ends."""

import signal
from pathlib import Path

import pytest
from gpu import lines_of, note, passed

from gentron_fast.processes import signal_at_parents_end


def pytest_addoption(parser):
    group = parser.getgroup("make gpu")
    group.addoption("--record", type=Path, help="where a line for every test goes")
    group.addoption("--step", help="the step that the tests are of")
    group.addoption("--share", default="0/1", help="every N-th test from the I-th on: I/N")
    group.addoption("--rest", action="store_true", help="leave out what passed before")


def pytest_configure(config):
    signal_at_parents_end(signal.SIGKILL)
    config.pluginmanager.register(_Noted(config))


class _Noted:
    def __init__(self, config):
        self.record, self.step = config.getoption("record"), config.getoption("step")
        self.share, self.shares = map(int, config.getoption("share").split("/"))
        self.rest = config.getoption("rest")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        kept = items[self.share :: self.shares]
        if self.rest:
            done = passed(lines_of(self.record), self.step)
            kept = [item for item in kept if item.nodeid not in done]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_collectreport(self, report):
        if not report.passed:
            self.write(report, report.outcome)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.write(report, report.outcome)

    def write(self, report, outcome: str):
        seconds = round(getattr(report, "duration", 0.0), 2)
        line = {"step": self.step, "test": report.nodeid, "outcome": outcome, "seconds": seconds}
        note(self.record, **line, **({} if report.passed else {"error": reason(report)}))


def reason(report) -> str:
    """Why a test failed or was skipped, in one line."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    words = crash.message if crash else str(report.longrepr)
    lines = [line.removeprefix("E ").strip() for line in words.splitlines() if line.strip()]
    return ((lines or ["no message"])[0 if crash else -1])[:300]
