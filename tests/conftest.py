"""Settings for all tests."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from typing import Any

import pytest
import torch

from sofim_fused import native
from tests.support.covering import chosen
from tests.support.runs import (
    ALL_ON_GPU,
    EMULATED,
    GPU_BACKENDS,
    INTERPRETED,
    RUNS,
    Run,
    as_named,
    chance,
    name_of,
    on_gpu,
)

# On tensors this small a second thread only waits, and on a busy machine it waits long.
torch.set_num_threads(1)

if INTERPRETED:
    from triton.runtime import interpreter

    # It prepares the language anew for each call of each function; once per launch is enough, and three times as fast.
    _prepare, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    _prepared: dict[Any, Any] = {}

    def _prepare_once(fn: Any) -> Any:
        if fn not in _prepared:
            _prepared[fn] = _prepare(fn)
        return _prepared[fn]

    def _launch_prepared(self: Any, *args: Any, **kwargs: Any) -> Any:
        _prepared.clear()
        return _launch(self, *args, **kwargs)

    interpreter._patch_lang = _prepare_once
    interpreter.GridExecutor.__call__ = _launch_prepared


# On how many examples properties are tried: few, always the same; with --hypothesis-profile=deep many, always others.
try:
    from hypothesis import HealthCheck, settings

    from tests.support.strategies import CHECKED
except ImportError:  # on a machine that only runs tests of kernels
    CHECKED: Counter[str] = Counter()  # type: ignore[no-redef]
else:
    common: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("ci", max_examples=20, derandomize=True, **common)
    settings.register_profile("deep", max_examples=1_200, derandomize=False, print_blob=True, **common)
    settings.load_profile("ci")

LEFT_OUT = pytest.StashKey[Counter[str]]()  # how many cases, by why and what would run them
NEED_GPU = "cases need a GPU that PyTorch finds; on such a machine: make gpu, or pytest -m gpu"
ONE_IN_EIGHT = "cases on the GPU left out, seven in eight: SOFIM_ALL_GPU_TESTS=1 runs them"
COVERED = "cases left out, any few values of which meet in cases that are here: --all-cases runs them too"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-cases", action="store_true", help="also the cases that the mark covering(strength) leaves out"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = Counter()
    if isinstance(native.cpu(), str):  # then so it is; tests/install/test_install.py has what is said of it
        config.addinivalue_line("filterwarnings", "ignore:SOFIM runs in pure PyTorch:UserWarning")
    config.addinivalue_line(
        "markers",
        "covering(strength, slow): on a CPU a selection of cases, in which any so many values meet that meet in all;"
        " in Triton's interpreter and in the emulator `slow` (2 if it is not given)",
    )


@pytest.hookimpl(trylast=True)  # of the cases that -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what cannot run here, and of what takes long all but a choice; the summary says how much and why."""
    on_gpus = [item for item in items if item.get_closest_marker("gpu")]
    if not torch.cuda.is_available():
        _leave_out(config, items, on_gpus, NEED_GPU)
    elif not ALL_ON_GPU:
        cases = [item for item in on_gpus if "run" in getattr(item, "fixturenames", ())]
        _leave_out(config, items, [item for item in cases if chance(item.name) >> 2 & 7], ONE_IN_EIGHT)
    if not config.getoption("all_cases"):
        tests: defaultdict[Any, list[pytest.Item]] = defaultdict(list)
        for item in items:
            if item.get_closest_marker("covering") and not item.get_closest_marker("gpu"):
                tests[item.function].append(item)  # type: ignore[attr-defined]
        left_out: set[pytest.Item] = set()
        for covering in tests.values():
            marker: Any = covering[0].get_closest_marker("covering")
            fast, slow = (*marker.args, 2)[:2]
            strength = slow if INTERPRETED or EMULATED else fast
            kept = chosen([values_of(item) for item in covering], strength)
            left_out |= {*covering} - {covering[place] for place in kept}
        _leave_out(config, items, left_out, COVERED)


def _leave_out(config: pytest.Config, items: list[pytest.Item], left_out: Collection[pytest.Item], why: str) -> None:
    chosen_out = set(left_out)
    config.hook.pytest_deselected(items=[item for item in items if item in chosen_out])
    config.stash[LEFT_OUT][why] += len(chosen_out)
    items[:] = [item for item in items if item not in chosen_out]


def values_of(item: Any) -> list[str]:
    """What a case is called with, on which backend, and which launches that takes."""
    values = dict(item.callspec.params)
    run = as_named(values.pop("run"), item.name)
    return [*map(str, values.values()), run.backend, str(run.single), str(run.ready)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash[LEFT_OUT])
        session.config.workeroutput["checked"] = dict(CHECKED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """All of pytest-xdist's workers leave out the same, and none of them says so."""
    output = getattr(node, "workeroutput", {})
    node.config.stash[LEFT_OUT] = Counter(output.get("left_out", {}))
    CHECKED.update(output.get("checked", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for why, count in config.stash[LEFT_OUT].items():
        if count:
            terminalreporter.write_line(f"{count:,} {why}")
    if CHECKED:
        terminalreporter.write_line(
            ", ".join(f"{count:,} {what}" for what, count in sorted(CHECKED.items())) + " checked"
        )


@pytest.fixture(params=RUNS, ids=name_of)
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Each backend on each device (:mod:`tests.support.runs`)."""
    name = request.node.name
    run = as_named(request.param, name)
    if run.backend in GPU_BACKENDS:
        if run.device == "cuda":
            on_gpu(run.backend)
        monkeypatch.setattr(GPU_BACKENDS[run.backend], "SINGLE_LAUNCH", run.single)
    return run
