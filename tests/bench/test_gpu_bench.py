"""The acceptance run on a GPU does what it says, as far as that shows without one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gpu, gpu_report, gpu_smoke, gpu_training
from bench.backward import check_losses
from bench.gpu import Acceptance, Budget, Step, sanitizer_verdict
from bench.gpu_processes import Hang, Output, Workers, run, tail
from bench.gpu_providers import (
    BASELINE,
    Launches,
    Provider,
    UnavailableError,
    Workload,
    compiled_providers,
    providers,
    ready,
    rotation,
    time_limit,
)
from bench.gpu_report import Record, Row, Section, markdown, not_reached, slug, verdicts
from bench.gpu_smoke import CASES, MANY_SHAPES, SMALL_SHAPES, Case, judge, take
from bench.gpu_worker import chunks
from bench.shapes import GPU_MODELS, MODELS, elements, miniature
from bench.timing import HostEvent, Stopwatch, compare_on_device
from sofim_fused import SOFIM
from sofim_fused.backends.cpu import passes_for as cpu_passes

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
US = 1000  # ns


# Shapes


@pytest.mark.parametrize(("model", "tensors", "size"), [("vit-b", 152, 86_567_656), ("lm-1b", 244, 1_114_290_176)])
def test_models_have_their_known_sizes(model: str, tensors: int, size: int) -> None:
    shapes = GPU_MODELS[model]()
    assert (len(shapes), elements(shapes)) == (tensors, size)
    assert model not in MODELS  # they would take the CPU's benchmarks minutes


def test_miniatures_are_small_and_varied() -> None:
    small = miniature(GPU_MODELS["gpt2-small"](), 4, 5)
    assert len(small) <= 5
    assert len(set(small)) > 1
    assert max(max(shape) for shape in small) == 4
    assert miniature([(7, 2), (3,)], 4, 5) == [(4, 2), (3,)]


# Timing


class Queue:
    """A device that works through a queue: calls take the host some time, and the device some time later."""

    def __init__(self) -> None:
        self.now = 0
        self.busy_until = 0

    def clock(self) -> int:
        return self.now

    def put(self, nanoseconds: int) -> None:
        self.busy_until = max(self.busy_until, self.now) + nanoseconds

    def call(self, host: int, device: int, waits: bool = False) -> Callable[[], None]:
        def taken() -> None:
            if waits:
                self.now = max(self.now, self.busy_until)
            self.now += host
            self.put(device)

        return taken

    def event(self) -> QueueEvent:
        return QueueEvent(self)

    def stopwatch(self, hold: bool = True) -> Stopwatch:
        return Stopwatch(self.event, (lambda s: self.put(round(s * 1e9))) if hold else None, self.clock)


class QueueEvent:
    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.time = 0

    def record(self) -> None:
        self.time = max(self.queue.now, self.queue.busy_until)

    def synchronize(self) -> None:
        self.queue.now = max(self.queue.now, self.time)

    def query(self) -> bool:
        return self.queue.now >= self.time

    def elapsed_time(self, end: QueueEvent) -> float:
        return (end.time - self.time) / 1e6


@pytest.mark.parametrize(("host", "device"), [(30 * US, 4 * US), (5 * US, 50 * US)])
def test_steps_take_what_the_slower_side_takes(host: int, device: int) -> None:
    queue = Queue()
    watch = queue.stopwatch()
    call = queue.call(host, device)
    assert watch.steps(call, 20) == pytest.approx(20 * max(host, device), rel=0.05)
    assert watch.device(call, 8, host) == pytest.approx(device)
    assert watch.host(call) == host


def test_samples_begin_with_a_device_at_work_and_host_times_with_an_idle_one() -> None:
    queue = Queue()
    watch = queue.stopwatch()
    assert watch.steps(queue.call(5 * US, 50 * US), 1) == pytest.approx(50 * US)  # not 55
    queue.put(100 * US)
    assert watch.host(queue.call(5 * US, 50 * US, waits=True)) == 5 * US


def test_the_device_alone_is_timed_however_slow_the_host() -> None:
    queue = Queue()
    call = queue.call(3000 * US, 4 * US)
    assert queue.stopwatch().device(call, 8, host=1 * US) == pytest.approx(4 * US)


def test_calls_that_wait_for_the_device_have_no_time_of_their_own() -> None:
    queue = Queue()
    assert queue.stopwatch().device(queue.call(5 * US, 50 * US, waits=True), 8, 5 * US) is None
    assert queue.stopwatch(hold=False).device(queue.call(5 * US, 50 * US), 8, 5 * US) is None


def test_providers_are_compared_by_device_events() -> None:
    queue = Queue()
    around: list[str] = []

    @contextlib.contextmanager
    def during(name: str) -> Iterator[None]:
        around.append(name)
        yield

    calls = {"a": queue.call(30 * US, 10 * US), "b": queue.call(5 * US, 60 * US), "c": queue.call(20 * US, 20 * US)}
    taken = compare_on_device(
        calls, "a", 0.2, queue.stopwatch(), during=during, min_sample=1_000_000, clock=queue.clock
    )
    assert [taken[name].step.median for name in "abc"] == pytest.approx([30e-6, 60e-6, 20e-6], rel=0.03)
    assert [taken[name].step.ratio for name in "abc"] == pytest.approx([1, 2, 2 / 3], rel=0.05)
    assert [taken[name].device for name in "abc"] == pytest.approx([10e-6, 60e-6, 20e-6], rel=0.03)
    assert [taken[name].host for name in "abc"] == pytest.approx([30e-6, 5e-6, 20e-6])
    assert [taken[name].step.calls for name in "abc"] == [64, 32, 64]  # as many as take 1 ms
    assert taken["a"].step.rounds > 5
    assert len({around.count(name) for name in "abc"}) == 1


def test_events_of_a_device_without_queue_are_times() -> None:
    now = 5
    start, end = HostEvent(lambda: now), HostEvent(lambda: now)
    start.record()
    now += 3_000_000
    end.record()
    assert start.elapsed_time(end) == pytest.approx(3.0)


# Providers


@pytest.mark.parametrize(
    ("set_bytes", "cache", "budget", "sets"),
    [(100, 1000, 10**6, 40), (300, 1000, 10**6, 14), (5000, 1000, 10**6, 1), (100, 1000, 500, 5), (100, 1000, 50, 1)],
)
def test_sets_exceed_the_cache_four_times_as_far_as_memory_goes(
    set_bytes: int, cache: int, budget: int, sets: int
) -> None:
    assert rotation(set_bytes, cache, budget) == sets


def by_kind(dtype: torch.dtype = torch.float32) -> dict[str, Provider]:
    return {provider.kind: provider for provider in providers(["cpu", "reference"], dtype)}


def test_bytes_are_those_of_the_method() -> None:
    """The tables of docs/method.md and bench/step.py."""
    moved = {kind: provider.bytes_moved(torch.float32) for kind, provider in by_kind().items()}
    expected = {
        "sgd": 20, "plain": 24, "guarded": 28, "gradient form": 28, "bfloat16 moment": 18, "apply alone": 12,
        "one launch": 24, "two launches": 24, "CUDA graph": 24, "clipped sgd": 32, "sgd foreach": 32, "sgd graph": 20,
        "reference": None,
    }  # fmt: skip
    assert moved == expected
    narrow = {kind: provider.bytes_moved(torch.bfloat16) for kind, provider in by_kind(torch.bfloat16).items()}
    expected = {
        "sgd": 10, "plain": 22, "guarded": 24, "gradient form": 24, "bfloat16 moment": 16, "no kahan": 18,
        "bfloat16 moment, no kahan": 12, "clipped sgd": 16, "sgd foreach": 16, "reference": None,
    }  # fmt: skip
    assert narrow == expected
    assert [provider.bytes_moved(torch.float32) for provider in compiled_providers()] == [20, 20]


def test_the_baseline_comes_first_and_every_native_backend_is_there() -> None:
    """Each kind of both backends side by side, so that neither is left out for want of time."""
    for dtype in (torch.float32, torch.bfloat16):
        found = providers(["cuda", "triton", "reference"], dtype)
        assert found[0].name == BASELINE
        native = [(provider.kind, provider.backend) for provider in found if provider.backend in ("cuda", "triton")]
        kinds = [kind for kind, backend in native if backend == "cuda"]
        assert {"plain", "guarded"} <= set(kinds)
        assert native == [(kind, backend) for kind in kinds for backend in ("cuda", "triton")]
        assert len({provider.name for provider in found}) == len(found)
        assert [provider.name for provider in found if provider.backend == "reference"] == ["SOFIM reference"]


def weights(work: Workload) -> list[Tensor]:
    """Copies of the weights of each set."""
    return [torch.cat([p.detach().reshape(-1) for p in work.parameters(i)]) for i in range(len(work))]


@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_works_on_every_set_in_turn(dtype: torch.dtype, sets: int) -> None:
    native = [] if isinstance(cpu_passes(CPU), str) else ["cpu"]
    for provider in providers([*native, "reference"], dtype):
        work = Workload([(4, 3), (5,)], dtype, CPU, sets)
        if provider.form == "graph":
            with pytest.raises(UnavailableError, match="needs a GPU"):
                ready(provider, work)
            continue
        if provider.one_launch is not None:
            with pytest.raises(UnavailableError, match="no SINGLE_LAUNCH"):
                ready(provider, work)
            continue
        # A step that 16 bits notice.
        options = {**provider.options, "lr": 1000 * provider.options["lr"]}
        made = ready(dataclasses.replace(provider, options=options), work)
        before = weights(work)
        for turn in range(2 * sets):
            made.call()
            now = weights(work)
            moved = [i for i, pair in enumerate(zip(now, before, strict=True)) if not torch.equal(*pair)]
            assert moved == [turn % sets], provider.name
            before = now


def test_providers_share_weights_and_gradients_but_not_what_clipping_writes() -> None:
    work = Workload([(4, 3)], torch.float32, CPU, 1)
    (first,), (second,), (own,) = work.parameters(0), work.parameters(0), work.parameters(0, own_gradients=True)
    assert first.data_ptr() == second.data_ptr() == own.data_ptr()
    assert first.grad is not None
    assert first.grad is second.grad
    assert own.grad is not None
    before = first.grad.clone()
    ready(by_kind()["clipped sgd"], work).call()
    assert torch.equal(first.grad, before)
    assert own.grad.data_ptr() != first.grad.data_ptr()


def test_a_compiled_step_is_not_rotated() -> None:
    work = Workload([(4, 3)], torch.float32, CPU, 1)
    with pytest.raises(UnavailableError, match="needs a GPU"):
        ready(compiled_providers()[1], work)


def test_the_switch_of_launches_is_turned_only_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("sofim_fused.backends.some")
    module.SINGLE_LAUNCH = None
    monkeypatch.setitem(sys.modules, "sofim_fused.backends.some", module)
    with pytest.raises(KeyError), Launches("some", True)():  # noqa: PT012
        assert module.SINGLE_LAUNCH is True
        raise KeyError
    assert module.SINGLE_LAUNCH is None
    with pytest.raises(UnavailableError):
        Launches("nowhere", True)


def test_what_does_not_fit_together_is_timed_apart_each_with_the_baseline() -> None:
    wanted = providers(["cpu"], torch.float32)[:5]
    groups = chunks(wanted, [10, 10, 20, 10, 10], 40)
    assert [[p.kind for p in group] for group in groups] == [
        ["sgd", "plain", "clipped sgd"],
        ["sgd", "guarded", "bfloat16 moment"],
    ]
    assert [len(group) for group in chunks(wanted, [10] * 5, 5)] == [2, 2, 2, 2]  # never none at all


def test_what_takes_too_long_is_ended() -> None:
    with pytest.raises(TimeoutError, match=r"waiting was not done within 0\.05 s"), time_limit(0.05, "waiting"):
        time.sleep(5)
    time.sleep(0.06)  # and nothing comes later


# Correctness


def exact(case: Case) -> gpu_smoke.Outcome:
    return take(case, "reference", CPU, SMALL_SHAPES, exact=True)


@pytest.mark.parametrize("case", [c for c in CASES if c.one_launch is None and "capturable" not in c.options], ids=str)
def test_right_steps_pass_and_wrong_ones_do_not(case: Case) -> None:
    true = exact(case)
    outcome = take(case, "reference", CPU, SMALL_SHAPES)
    assert judge(case, outcome, outcome, true).wrong == ""
    assert outcome.skipped == (case.spoiled is not None)
    largest = max(float(change.abs().max()) for change in true.changes)

    def altered(value: float) -> gpu_smoke.Outcome:
        changes = [change.clone() for change in outcome.changes]
        changes[-1].view(-1)[-1] += value  # one element, the last of the last tensor
        return outcome._replace(changes=changes)

    for wrong in (
        altered(0.3 * largest),
        altered(float("nan")),
        outcome._replace(counts=[count + 1 for count in outcome.counts]),
        outcome._replace(skipped=outcome.skipped + 1),
        outcome._replace(norm=2.0 if outcome.norm is None else 1.1 * outcome.norm),
        outcome._replace(changes=[torch.zeros_like(change) for change in outcome.changes]),
    ):
        assert judge(case, wrong, outcome, true).wrong
        assert not judge(case, outcome, outcome, true).wrong


def test_moments_rounded_unlike_the_reference_are_noticed() -> None:
    case = next(case for case in CASES if case.name == "bfloat16 moment")
    outcome = take(case, "reference", CPU, SMALL_SHAPES)
    other = outcome._replace(changes=[change * (1 + 2**-8) for change in outcome.changes])
    assert "rounded as the reference's" in judge(case, other, outcome, exact(case)).wrong


def test_options_of_another_version_are_no_failure() -> None:
    class Refusing(SOFIM):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError("capturable=True is not available in this version: no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_smoke, "SOFIM", Refusing)
        with pytest.raises(UnavailableError, match="not available"):
            take(Case("capturable", {"capturable": True}), "reference", CPU, SMALL_SHAPES)


def test_one_case_has_more_tensors_than_a_launch_carries() -> None:
    (case,) = [case for case in CASES if case.many]
    assert 64 * len(MANY_SHAPES) > 32_764  # bytes of a row, and of all arguments
    true = take(case, "reference", CPU, MANY_SHAPES, exact=True)
    outcome = take(case, "reference", CPU, MANY_SHAPES)
    assert judge(case, outcome, outcome, true).wrong == ""
    last = outcome._replace(changes=[*outcome.changes[:-1], torch.zeros_like(outcome.changes[-1])])
    assert judge(case, last, outcome, true).wrong


def test_the_steps_for_the_sanitizer_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--sanitizer-target", "--device", "cpu", "--backend", "reference"]) == 0
    assert capsys.readouterr().out.splitlines() == ["reference: steps taken", gpu.TARGET_DONE]


# The report


def timed(kind: str, model: str = "gpt2-small", size: int = 124_439_808, **values: Any) -> Row:
    section = Section(model, cached=values.pop("cached", model in gpu_report.IN_CACHE))
    return {
        **section.columns(),
        "tensors": 148,
        "elements": size,
        "sets": 1,
        "provider": f"SOFIM triton, {kind}",
        "kind": kind,
        "backend": "triton",
        "ours": True,
        "status": "measured",
        "reason": "",
        "median": 1.2e-3,
        "low": 1.1e-3,
        "high": 1.3e-3,
        "ratio": 1.0,
        "rounds": 20,
        "calls": 8,
        "device": 1.2e-3,
        "device_ratio": 1.0,
        "host": 2e-5,
        "host_low": 1e-5,
        "host_high": 3e-5,
        "bytes_per_parameter": 24,
        "gb_per_s": 2489.0,
        "share": 0.95,
        **values,
    }


def judged(rows: Sequence[Row], judge_them: bool = True) -> dict[tuple[str, str], str]:
    return {(row["target"], row["model"]): row["verdict"] for row in verdicts(rows, judge_them)}


LARGE_PLAIN = "plain step, at least 100 M parameters"
SMALL_PLAIN = "plain step, at most 10 M parameters"
SHARE = "share of the copy bandwidth, at least 100 M parameters"
GUARDED = "guarded step, to SGD fused with clip_grad_norm_"


@pytest.mark.parametrize(("ratio", "verdict"), [(1.2, "met"), (1.21, "missed")])
def test_a_ratio_has_to_stay_below_its_target(ratio: float, verdict: str) -> None:
    assert judged([timed("plain", ratio=ratio)])[LARGE_PLAIN, "gpt2-small"] == verdict


@pytest.mark.parametrize(("share", "verdict"), [(0.9, "met"), (0.89, "missed")])
def test_a_share_has_to_reach_its_target(share: float, verdict: str) -> None:
    assert judged([timed("plain", share=share)])[SHARE, "gpt2-small"] == verdict


def test_targets_are_for_models_of_their_size() -> None:
    found = judged([timed("plain", "lenet-5", 61_706, ratio=1.1), timed("plain", "resnet-50", 25_557_032, ratio=9.0)])
    assert found[SMALL_PLAIN, "lenet-5"] == "missed"
    assert found[LARGE_PLAIN, ""] == "not measured"
    assert not [model for _, model in found if model == "resnet-50"]
    rows = [timed("one launch", "lenet-5", 61_706, ratio=0.6), timed("one launch", "1000x1K", 1_024_000)]
    found = judged(rows)
    assert found["LeNet-5 in one launch, triton", "lenet-5"] == "met"
    assert ("LeNet-5 in one launch, triton", "1000x1K") not in found
    assert found["LeNet-5 in one launch, cuda", "lenet-5"] == "not measured"
    found = judged([*rows, timed("one launch", "lenet-5", 61_706, ratio=0.61, backend="cuda")])
    assert found["LeNet-5 in one launch, triton", "lenet-5"] == "met"
    assert found["LeNet-5 in one launch, cuda", "lenet-5"] == "missed"


@pytest.mark.parametrize(("guarded", "verdict"), [(1.44, "met"), (1.45, "missed")])
def test_guarded_steps_are_compared_with_clipping(guarded: float, verdict: str) -> None:
    rows = [timed("guarded", ratio=guarded), timed("clipped sgd", ratio=1.6, provider="SGD", ours=False)]
    assert judged(rows)[GUARDED, "gpt2-small"] == verdict
    assert judged(rows[:1])[GUARDED, ""] == "not measured"


def test_rows_without_a_figure_or_from_the_cache_are_not_judged() -> None:
    assert judged([timed("plain", cached=True)])[LARGE_PLAIN, ""] == "not measured"
    failed = {key: value for key, value in timed("plain").items() if key not in ("ratio", "share")}
    assert judged([{**failed, "status": "failed"}])[LARGE_PLAIN, ""] == "not measured"
    assert set(judged([timed("plain")], judge_them=False).values()) == {"not measured"}
    assert len(judged([])) == len(gpu_report.TARGETS)


def a_record(path: Path, device: str = "cuda", copies: Sequence[Path] = ()) -> Record:
    about = {
        "type": device,
        "name": "Some GPU",
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "l2_bytes": 50 << 20,
        "more": {"driver": "580.1"},
    }
    head = {"command": "python3 -m bench.gpu", "date": "2026-01-01", "device": about, "budget": 540.0}
    return Record(path, copies, head)


def test_the_document_shows_what_was_found(tmp_path: Path) -> None:
    record = a_record(tmp_path / "gpu.json")
    record.plan(["install", "tests", "vit-b, float32, from memory"])
    record.mark("install", gpu_report.DONE)
    record.data["backends"] = {"triton": "ok"}
    record.data["copy_gb_per_s"] = 2620.0
    record.data["sanitizer"]["memcheck"] = "no errors"
    record.add("timing", timed("plain", ratio=1.15), "section", "provider")
    record.add("timing", timed("guarded", status="failed", reason="a | b", ratio=None), "section", "provider")
    smoke = {"backend": "triton", "case": "plain", "status": "right", "reason": "", "error": 0.1}
    record.add("smoke", {**smoke, "error_to_reference": 0.0}, "backend", "case")
    record.fail("tests: 1 failed")
    document = record.data
    text = (tmp_path / "gpu.md").read_text()
    assert json.loads((tmp_path / "gpu.json").read_text()) == document
    assert "Some GPU; torch 2.11.0, triton 3.6.0; driver 580.1" in " ".join(text.split())
    figures = "1.20 [1.10, 1.30] | 1.150 | 1.20 | 1.000 | 20.0 | 24 | 2489 | 95% |"
    assert f"| gpt2-small | SOFIM triton, plain | {figures}" in text
    assert "failed: a \\| b" in text
    assert "| plain step, at least 100 M parameters | ≤ 1.2 | gpt2-small | SOFIM triton, plain | 1.150 | met |" in text
    assert "- tests: 1 failed" in text
    assert "Not reached within the time:\n\n- tests\n- vit-b, float32, from memory" in text
    assert "| triton | plain | right | 0.1 | 0 |" in text
    assert "compute-sanitizer memcheck: no errors." in text
    (heading,) = [line for line in text.splitlines() if line.startswith("| model | provider |")]
    timed_rows = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("| gpt2-small |")]
    assert [row.count("|") for row in timed_rows] == [heading.count("|")] * 2


def test_what_was_not_reached_is_listed_by_name() -> None:
    pending = {"status": "not reached"}
    data = {
        "plan": {"install": "done", "tests": "not reached", "smoke": "failed"},
        "timing": [{**pending, "section": "s", "provider": "p"}, {"status": "measured", "section": "s"}],
        "smoke": [{**pending, "backend": "triton", "case": "plain"}, {"status": "right"}],
    }
    assert not_reached(data) == ["tests", "s: p", "smoke: triton: plain"]


def test_a_row_takes_the_place_of_its_like(tmp_path: Path) -> None:
    record = a_record(tmp_path / "gpu.json")
    for status in ("failed", "measured"):
        record.add("timing", timed("plain", status=status), "section", "provider")
    record.add("timing", timed("guarded"), "section", "provider")
    assert [row["status"] for row in record.data["timing"]] == ["measured", "measured"]


def test_results_go_to_every_folder_at_once(tmp_path: Path) -> None:
    record = a_record(tmp_path / "a" / "gpu.json", copies=[tmp_path / "b"])
    record.save()
    files = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.*")}
    assert files == {"a/gpu.json", "a/gpu.md", "b/gpu.json", "b/gpu.md"}


def test_who_reads_during_a_write_reads_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    gpu_report.write(path, "old")
    with path.open() as file:
        gpu_report.write(path, "new")
        assert file.read() == "old"
    assert path.read_text() == "new"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.json"
    gpu_report.write(path, "old")

    def full(self: Path, text: str, encoding: str) -> None:
        with self.open("w") as file:
            file.write(text[:1])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        gpu_report.write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "part"), [("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3"), ("???", "unknown"), ("A/B", "a_b")]
)
def test_a_device_names_a_file(name: str, part: str) -> None:
    assert slug(name) == part


# The run


class Ticking:
    """A clock that goes on only when it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_is_shared_by_weight_and_what_is_left_over_goes_on() -> None:
    clock = Ticking()
    budget = Budget(105, clock)
    assert budget.left() == 100  # five to finish
    assert budget.slice([2, 5, 3]) == pytest.approx(20)
    clock.now += 5  # 15 less than it had
    assert budget.slice([5, 3]) == pytest.approx(95 * 5 / 8)
    clock.now += 80
    assert budget.slice([3]) == pytest.approx(15)
    clock.now += 80
    assert budget.left() == budget.slice([1]) == 0
    assert budget.elapsed() == 165


def acceptance(
    tmp_path: Path, *arguments: str, device: str = "cuda", clock: Ticking | None = None, path: str = ""
) -> Acceptance:
    options = gpu.parsed(["--device", device, *arguments])
    environment = {**os.environ, "PATH": path or os.environ["PATH"]}
    budget = Budget(options.budget, clock or time.monotonic)
    return Acceptance(options, a_record(tmp_path / "gpu.json", device), budget, environment)


def saved(tmp_path: Path) -> Row:
    result: Row = json.loads((tmp_path / "gpu.json").read_text())
    return result


def test_a_step_that_raises_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = acceptance(tmp_path)

    def first(_: float) -> None:
        made.record.add("timing", timed("plain"), "section", "provider")
        raise RuntimeError("broken")

    seen: list[Row] = []
    monkeypatch.setattr(
        made, "steps", lambda: [Step("first", 1, first), Step("second", 1, lambda _: seen.append(saved(tmp_path)))]
    )
    assert made.run() == 1
    (after_first,) = seen  # on disk before the second step
    for data in (after_first, saved(tmp_path)):
        assert [row["kind"] for row in data["timing"]] == ["plain"]
        assert data["failures"] == ["first: RuntimeError: broken"]
    assert saved(tmp_path)["plan"] == {"first": "failed", "second": "done"}
    assert "RuntimeError: broken" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"gpu.json", "gpu.md"}


def test_what_the_time_does_not_reach_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Ticking()
    made = acceptance(tmp_path, "--budget", "60", clock=clock)

    def slow(_: float) -> None:
        clock.now += 56

    steps = [Step("slow", 1, slow), Step("left out", 1, lambda _: pytest.fail("there was no time for it"))]
    monkeypatch.setattr(made, "steps", lambda: steps)
    assert made.run() == 0
    assert saved(tmp_path)["not_reached"] == ["left out"]
    assert "- left out" in (tmp_path / "gpu.md").read_text()
    assert "Not reached:\n  left out" in capsys.readouterr().out


def test_steps_come_in_the_order_of_what_they_tell(tmp_path: Path) -> None:
    names = [step.name for step in acceptance(tmp_path).steps()]
    assert len(set(names)) == len(names)
    ordered = [
        "install", "info", "backends", "smoke", "copy bandwidth", "lenet-5, float32, in cache",
        "resnet-50, float32, from memory", "gpt2-small, float32, from memory", "tests",
        *(f"sanitizer {tool}" for tool in gpu.TOOLS), *(f"training: {name}" for name in gpu.TRAINED),
    ]  # fmt: skip
    assert names[: len(ordered)] == ordered
    for model in GPU_MODELS:
        where = "in cache" if model in gpu_report.IN_CACHE else "from memory"
        assert {f"{model}, {dtype}, {where}" for dtype in ("float32", "bfloat16")} <= set(names)
    assert "install" not in [step.name for step in acceptance(tmp_path, "--no-install").steps()]
    some = [step.name for step in acceptance(tmp_path, "--models", "vit-b").steps()]
    assert {name.partition(",")[0] for name in some if "," in name and ":" not in name} == {"vit-b"}
    parts = [step.name for step in acceptance(tmp_path, "--no-install", "--parts", "smoke", "sanitizers").steps()]
    assert parts == ["info", "backends", "smoke", *(f"sanitizer {tool}" for tool in gpu.TOOLS)]


def answering(made: Acceptance, monkeypatch: pytest.MonkeyPatch, *runs: Sequence[Row | Hang]) -> list[Row]:
    """Have the worker answer so, job by job; gives the jobs."""
    jobs: list[Row] = []

    def do(job: Row, limit: float) -> Iterator[Row | Hang]:
        jobs.append(json.loads(json.dumps(job)))
        yield from runs[len(jobs) - 1]

    monkeypatch.setattr(made.workers, "do", do)
    return jobs


def only(made: Acceptance, monkeypatch: pytest.MonkeyPatch, name: str) -> int:
    """Run one step alone."""
    (step,) = [step for step in made.steps() if step.name == name]
    monkeypatch.setattr(made, "steps", lambda: [step])
    return made.run()


def smoked(status: str, case: str = "plain", reason: str = "") -> Row:
    return {"backend": "triton", "case": case, "status": status, "reason": reason}


@pytest.mark.parametrize(
    ("status", "code"), [("right", 0), ("unavailable", 0), ("not reached", 0), ("wrong", 1), ("failed", 1)]
)
def test_only_wrong_results_change_the_exit_code(
    status: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = acceptance(tmp_path)
    made.backends = ["triton"]
    answering(made, monkeypatch, [smoked(status, reason="why")])
    assert only(made, monkeypatch, "smoke") == code
    assert saved(tmp_path)["failures"] == (["smoke: triton: plain: why"] if code else [])


def test_a_case_that_hangs_is_left_out_and_the_others_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = acceptance(tmp_path)
    made.backends = ["triton"]
    hang = Hang("triton: guarded", "nothing came for 60 s")
    jobs = answering(made, monkeypatch, [smoked("right"), hang], [smoked("right", "gradient form")])
    assert only(made, monkeypatch, "smoke") == 1
    assert [job["exclude"] for job in jobs] == [[], ["triton: plain", "triton: guarded"]]
    found = {row["case"]: row["status"] for row in saved(tmp_path)["smoke"]}
    assert found == {"plain": "right", "guarded": "failed", "gradient form": "right"}


def test_without_a_native_backend_a_gpu_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = [{"backend": "triton", "state": "it is not installed"}, {"backend": "reference", "state": "ok"}]
    for device, code in (("cuda", 1), ("cpu", 0)):
        made = acceptance(tmp_path, device=device)
        answering(made, monkeypatch, states)
        assert only(made, monkeypatch, "backends") == code
        data = saved(tmp_path)
        assert data["backends"] == {"triton": "it is not installed", "reference": "ok"}
        assert made.backends == ["reference"]
        assert ("the backend triton is not in this run: it is not installed" in data["notes"]) == (device == "cuda")


LENET = "lenet-5, float32, in cache"


def test_a_provider_that_hangs_or_raises_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [timed("plain", "lenet-5", 61_706), timed("CUDA graph", "lenet-5", 61_706, status="failed", reason="boom")]
    for doing, failures in (
        ("SOFIM triton, one launch", 2),  # the hang and what raised
        ("SGD foreach", 1),  # PyTorch's own are noted
    ):
        made = acceptance(tmp_path)
        jobs = answering(made, monkeypatch, [rows[1], Hang(f"{LENET}: {doing}", "nothing came")], rows)
        assert only(made, monkeypatch, LENET) == 1
        assert jobs[1]["exclude"] == [f"{LENET}: SOFIM triton, CUDA graph", f"{LENET}: {doing}"]
        data = saved(tmp_path)
        found = {row["provider"]: row["status"] for row in data["timing"]}
        assert found == {"SOFIM triton, CUDA graph": "failed", doing: "failed", "SOFIM triton, plain": "measured"}
        assert len(data["failures"]) == failures
        assert len(data["notes"]) == 2 - failures
        assert json.loads(json.dumps(jobs[0]["section"])) == Section("lenet-5", cached=True)._asdict()


def test_a_worker_that_dies_of_a_known_failure_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = acceptance(tmp_path)
    failed = timed("guarded", "lenet-5", 61_706, status="failed", reason="illegal memory access")
    hang = Hang(f"{LENET}: SOFIM triton, guarded", "its process ended with exit status 75")
    answering(made, monkeypatch, [failed, hang], [timed("plain", "lenet-5", 61_706)])
    assert only(made, monkeypatch, LENET) == 1
    assert saved(tmp_path)["failures"] == [f"{LENET}: SOFIM triton, guarded: illegal memory access"]
    assert len(saved(tmp_path)["timing"]) == 2


def test_a_section_that_the_time_cuts_off_is_not_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = acceptance(tmp_path)
    answering(made, monkeypatch, [Hang(f"{LENET}: SOFIM triton", "its time was over", late=True)])
    assert only(made, monkeypatch, LENET) == 0
    assert saved(tmp_path)["not_reached"] == [LENET]


@pytest.mark.parametrize("hang", [Hang("starting", "it ended"), Hang("copy bandwidth", "nothing came")])
def test_a_worker_that_cannot_be_had_is_a_failure(hang: Hang, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = acceptance(tmp_path)
    answering(made, monkeypatch, [hang])
    assert only(made, monkeypatch, "copy bandwidth") == 1
    assert saved(tmp_path)["plan"] == {"copy bandwidth": "failed"}


def test_an_error_of_the_worker_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = acceptance(tmp_path)
    answering(made, monkeypatch, [{"error": "KeyError: 'x'"}])
    assert only(made, monkeypatch, LENET) == 1
    assert saved(tmp_path)["failures"] == [f"{LENET}: KeyError: 'x'"]


# Tests of the tests


def a_test_folder(tmp_path: Path, body: str) -> Path:
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "pytest.ini").write_text(
        "[pytest]\nmarkers = gpu: on a GPU\naddopts = -ra --strict-markers -m 'not slow'\n"
    )
    (folder / "test_some.py").write_text(f"import pytest\n\n{textwrap.dedent(body)}")
    (folder / "test_other.py").write_text("import a_package_that_is_not_there\n\ndef test_other(): pass\n")
    return folder


MARK = "@pytest.mark.gpu\n"


@pytest.mark.parametrize(
    ("body", "counts", "code", "on_cpu"),
    [
        (f"{MARK}def test_a(): pass\ndef test_b(): assert False", {"passed": 1, "deselected": 1}, 0, 0),
        (f"{MARK}def test_a(): pass\n{MARK}def test_b(): assert False", {"passed": 1, "failed": 1}, 1, 1),
        (f"{MARK}def test_a(): pytest.skip('no')", {"skipped": 1}, 1, 0),
        ("def test_a(): pass  # mark.gpu", {"deselected": 1}, 1, 0),
        ("def test_a(): pass", {}, 1, 0),
        (f"import a_package_that_is_not_there\n{MARK}def test_a(): pass", {"error": 1}, 1, 1),
    ],
    ids=["passing", "failing", "skipped", "none selected", "none marked", "not importable"],
)
def test_marked_tests_have_to_pass(
    body: str, counts: dict[str, int], code: int, on_cpu: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_test_folder(tmp_path, body)
    made = acceptance(tmp_path, "--tests", str(folder))
    assert only(made, monkeypatch, "tests") == code
    assert saved(tmp_path)["tests"]["counts"] == counts
    made.gpu = False
    made.record.data["failures"] = []
    assert made.run() == on_cpu  # where tests for a GPU have nothing to run on


def test_marks_may_come_from_a_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_test_folder(tmp_path, "def test_a(run): pass\ndef test_b(): assert False")
    (folder / "conftest.py").write_text(
        "import pytest\n\n@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])\n"
        "def run(request): return request.param\n"
    )
    (folder / "test_more.py").write_text("def test_c(): pass\n")
    made = acceptance(tmp_path, "--tests", str(folder))
    assert only(made, monkeypatch, "tests") == 0
    data = saved(tmp_path)
    assert data["tests"]["counts"] == {"passed": 1, "deselected": 2}
    assert data["notes"] == ["tests that cannot be imported here, and do not name the mark: test_other.py"]


def test_trainings_begin_alike_and_go_on_alike() -> None:
    assert tuple(gpu_training.TASKS) == gpu.TRAINED
    plain = gpu_training.MINIATURE
    for task in (plain, plain._replace(network=lambda: gpu_training.Autocast(plain.network()))):
        made = gpu_training.trainings(task, CPU, ["reference"])
        assert list(made) == [BASELINE, "SOFIM reference", "SOFIM reference, in_backward"]
        losses = [{name: float(training.step()) for name, training in made.items()} for _ in range(3)]
        check_losses(losses[0])
        assert losses[2]["SOFIM reference"] == pytest.approx(losses[2]["SOFIM reference, in_backward"], rel=1e-6)
        assert losses[2]["SOFIM reference"] < losses[0]["SOFIM reference"]


def test_tests_run_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "-n" not in gpu.plugins(2, 60)  # two cores: a second process would only be in the way
    assert gpu.plugins(16, 60)[:4] == ["-n", "10", "--dist", "worksteal"]
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    body = f"{MARK}def test_a(): pass\n{MARK}def test_b(): assert False\n{MARK}def test_c(): import os; os._exit(3)"
    made = acceptance(tmp_path, "--tests", str(a_test_folder(tmp_path, body)))
    assert only(made, monkeypatch, "tests") == 1
    assert saved(tmp_path)["tests"]["counts"] == {"passed": 1, "failed": 2}


def test_tests_that_do_not_end_are_a_failure(tmp_path: Path) -> None:
    body = f"import time\n{MARK}def test_a(): pass\n{MARK}def test_b(): time.sleep(60)"
    made = acceptance(tmp_path, "--tests", str(a_test_folder(tmp_path, body)))
    made.tests(9.0)
    assert made.record.failed
    assert made.record.data["tests"]["counts"] == {"passed": 1}
    assert "test_b" in made.record.data["tests"]["summary"]


# The sanitizer

CLEAN = f"========= COMPUTE-SANITIZER\n{gpu.TARGET_DONE}\n========= ERROR SUMMARY: 0 errors\n"
FOUND = f"{gpu.TARGET_DONE}\n========= ERROR SUMMARY: 3 errors\n"


@pytest.mark.parametrize(
    ("done", "verdict", "wrong"),
    [
        (Output(0, CLEAN), "no errors", False),
        (Output(1, FOUND), "3 errors", True),
        (Output(None, FOUND), "3 errors", True),
        (Output(None, "===="), "not finished in its time", False),
        (Output(0, CLEAN.replace(gpu.TARGET_DONE, "")), "the steps that it watched did not come to their end", True),
        (Output(1, "Unable to attach"), "no verdict: Unable to attach", False),
        (Output(0, f"{gpu.TARGET_DONE}\n=== RACECHECK SUMMARY: 0 hazards displayed (0 errors)"), "no errors", False),
        (Output(0, f"{gpu.TARGET_DONE}\n=== RACECHECK SUMMARY: 2 hazards displayed (2 errors)"), "2 errors", True),
    ],
)
def test_the_sanitizer_is_understood(done: Output, verdict: str, wrong: bool) -> None:
    assert sanitizer_verdict(done) == (verdict, wrong)


@pytest.mark.parametrize(("summary", "code"), [("0 errors", 0), ("2 errors", 1)])
def test_a_sanitizer_on_the_path_watches_the_steps(
    summary: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(
        "#!/bin/sh\n"
        f'echo "$@" > {tmp_path}/arguments; echo "caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING"\n'
        'while [ "$1" != "--report-api-errors" ]; do shift; done; shift 2\n'
        f'"$@"; echo "========= ERROR SUMMARY: {summary}"\n'
    )
    tool.chmod(0o755)
    made = acceptance(tmp_path, device="cpu", path=f"{tool.parent}:{os.environ['PATH']}")
    made.backends = ["reference"]
    made.options.budget = 300
    monkeypatch.setattr(made.budget, "slice", lambda _: 60.0)
    assert only(made, monkeypatch, "sanitizer memcheck") == code
    assert saved(tmp_path)["sanitizer"] == {"memcheck, reference": "no errors" if code == 0 else "2 errors"}
    assert (tmp_path / "arguments").read_text().startswith("--tool memcheck --report-api-errors no")


def test_where_cores_are_many_the_steps_are_watched_while_the_tests_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = acceptance(tmp_path)
    made.backends = ["cuda", "triton", "reference"]
    monkeypatch.setattr(gpu, "find_sanitizer", lambda _: "sanitizer")
    begun: list[tuple[str, str]] = []

    def watch(sanitizer: str, tool: str, backend: str, seconds: float) -> Output:
        begun.append((tool, backend))
        return Output(0, FOUND if (tool, backend) == ("racecheck", "triton") else CLEAN)

    monkeypatch.setattr(made, "_watch", watch)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    made.watch_meanwhile(30)
    assert not begun
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    made.watch_meanwhile(30)
    for tool in gpu.TOOLS:
        made.sanitize(tool, 30)
    assert sorted(begun) == sorted((tool, backend) for tool in gpu.TOOLS for backend in ("cuda", "triton"))
    assert made.record.data["failures"] == ["compute-sanitizer racecheck: triton: 3 errors"]
    made.sanitize("memcheck", 30)  # what was begun is over: it runs anew
    assert len(begun) == 8


def test_each_native_backend_is_watched_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = acceptance(tmp_path)
    made.backends = ["cuda", "triton", "reference"]
    watched: list[str] = []

    def answer(command: Sequence[str], *_: object) -> Output:
        watched.append(f"{command[2]} {command[-1]}")
        return Output(None, "====") if command[-1] == "triton" else Output(0, CLEAN)

    monkeypatch.setattr(gpu, "find_sanitizer", lambda path: "compute-sanitizer")
    monkeypatch.setattr(gpu, "run", answer)
    for tool in ("memcheck", "racecheck", "synccheck"):
        made.sanitize(tool, 20)
    assert watched == [f"{t} {name}" for t in ("memcheck", "racecheck", "synccheck") for name in ("cuda", "triton")]
    found = made.record.data["sanitizer"]
    assert (found["racecheck, cuda"], found["racecheck, triton"]) == ("no errors", "not finished in its time")
    assert not made.record.failed


def test_a_missing_sanitizer_is_said_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "find_sanitizer", lambda path: None)
    made = acceptance(tmp_path)
    assert only(made, monkeypatch, "sanitizer memcheck") == 0
    assert saved(tmp_path)["sanitizer"] == {"memcheck": "not there"}
    assert "NOT THERE" in capsys.readouterr().out


# Installing


SWITCHES = (gpu.CPU_SWITCH, gpu.CUDA_SWITCH)


def installing(
    made: Acceptance, monkeypatch: pytest.MonkeyPatch, answer: Callable[[str, str], Output]
) -> list[tuple[str, str]]:
    """Run the step with commands that answer so; gives the commands, each with what it builds for CPU and CUDA."""
    calls: list[tuple[str, str]] = []

    def fake(command: Sequence[str], seconds: float, environment: dict[str, str], line: Any = None) -> Output:
        calls.append((" ".join(command[1:]), " ".join(environment[name] for name in SWITCHES)))
        assert environment[gpu.ARCHITECTURES] == "9.0"
        assert environment[gpu.INSTRUCTION_SETS] == "avx512"
        return answer(*calls[-1])

    for name in (*SWITCHES, gpu.ARCHITECTURES, gpu.INSTRUCTION_SETS):
        monkeypatch.delenv(name, raising=False)
        made.environment.pop(name, None)
    made.record.data["device"]["more"]["compute capability"] = "9.0"
    made.record.data["device"]["cpu"] = "avx512"
    monkeypatch.setattr(gpu, "run", fake)
    monkeypatch.setattr(gpu, "_has_ninja", lambda: True)
    made.install(100)
    return calls


PIP = "-m pip install --no-deps --no-build-isolation -e ."


def test_installing_takes_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = acceptance(tmp_path)
    assert installing(made, monkeypatch, lambda *_: Output(0, "")) == [(PIP, "auto auto")]
    assert not made.record.data["notes"]
    built = "SOFIM_BUILD_CPU=auto, SOFIM_BUILD_CUDA=auto, SOFIM_INSTRUCTION_SETS=avx512, TORCH_CUDA_ARCH_LIST=9.0"
    assert made.record.data["install"] == f"pip, {built}"


def test_without_a_gpu_nothing_is_built_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = acceptance(tmp_path, device="cpu")
    assert installing(made, monkeypatch, lambda *_: Output(0, "")) == [(PIP, "auto 0")]


def test_pip_may_have_to_be_told_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = acceptance(tmp_path)

    def answer(command: str, native: str) -> Output:
        return Output(0, "") if "--break" in command else Output(1, "error: externally-managed-environment")

    calls = [(PIP, "auto auto"), (f"{PIP} --break-system-packages", "auto auto")]
    assert installing(made, monkeypatch, answer) == calls


@pytest.mark.parametrize(("works", "calls"), [("auto 0", 2), ("0 0", 3)])
def test_a_build_that_takes_too_long_is_left_out(
    works: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = acceptance(tmp_path)
    made_calls = installing(made, monkeypatch, lambda _, native: Output(0 if native == works else None, ""))
    assert made_calls == [(PIP, native) for native in ("auto auto", "auto 0", "0 0")[:calls]]
    notes = made.record.data["notes"]
    assert len(notes) == calls - 1
    assert re.search("SOFIM_BUILD_CUDA=auto, .* did not work: it took too long", notes[0])


def test_without_pip_the_package_is_used_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = acceptance(tmp_path)
    calls = installing(
        made, monkeypatch, lambda command, _: Output(1 if "pip" in command else 0, "No module named pip")
    )
    assert calls[-1] == ("setup.py build_ext --inplace", "auto auto")
    assert "PYTHONPATH" in made.record.data["notes"][-1]
    assert not made.record.failed


def test_where_there_is_no_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "device_information", lambda *_: "PyTorch sees no CUDA device")
    assert gpu.main(["--output", str(tmp_path / "gpu.json")]) == 2
    assert "PyTorch sees no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# Processes


def test_a_command_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    started = time.monotonic()
    lines: list[str] = []
    late = tmp_path / "late"
    done = run(["sh", "-c", f"echo one; (sleep 2; touch {late}) & sleep 60"], 0.5, dict(os.environ), lines.append)
    assert done == Output(None, "one\n")
    assert lines == ["one"]
    assert time.monotonic() - started < 20
    time.sleep(max(0.0, started + 3 - time.monotonic()))
    assert not late.exists()


def test_a_command_gives_its_output_and_its_exit_code() -> None:
    assert run(["sh", "-c", "echo two; echo three >&2; exit 3"], 20, dict(os.environ)) == Output(3, "two\nthree\n")
    assert run(["sh", "-c", "printf x"], 20, dict(os.environ)) == Output(0, "x")
    assert run(["a-program-that-is-not-there"], 20, dict(os.environ)).code == 127


def test_paths_of_the_machine_are_not_shown() -> None:
    assert tail(f"one\n{ROOT}/bench/gpu.py: two\n", 1) == "bench/gpu.py: two"


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    (tmp_path / "some_worker.py").write_text(
        textwrap.dedent("""
            import json, os, sys, time
            options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
            answers, doing = int(options["--answers"]), int(options["--doing"])
            def say(row): os.write(answers, (json.dumps(row) + "\\n").encode())
            for line in sys.stdin:
                job = json.loads(line)
                say({"pid": os.getpid()})
                os.pwrite(doing, json.dumps(["thing", job["patience"]]).ljust(400).encode(), 0)
                print("at work", flush=True)
                if job["kind"] == "die":
                    os._exit(7)
                if job["kind"] == "hang":
                    time.sleep(60)
                say({"done": True})
        """)
    )
    made = Workers("cpu", 4, {**os.environ, "PYTHONPATH": str(tmp_path)}, module="some_worker")
    yield made
    made.close()


def test_a_worker_serves_many_jobs_and_is_replaced_when_it_dies_or_hangs(workers: Workers) -> None:
    pids = []
    for kind, patience, limit, ending in (
        ("work", 20.0, 20.0, []),
        ("work", 20.0, 20.0, []),
        ("die", 20.0, 20.0, [Hang("thing", "its process ended with exit status 7")]),
        ("hang", 0.5, 20.0, [Hang("thing", "nothing came for 0.5 s")]),
        ("hang", 20.0, 1.0, [Hang("thing", "its time was over", late=True)]),
        ("work", 20.0, 20.0, []),
    ):
        first, *rest = workers.do({"kind": kind, "patience": patience}, limit)
        assert isinstance(first, dict)
        assert rest == ending, kind
        assert "at work" in workers.log()
        pids.append(first["pid"])
    assert pids[0] == pids[1] == pids[2]
    assert len(set(pids)) == 4


# All of it


def test_the_whole_run_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "out"
    section = "resnet-50, float32, from memory"
    tests = tmp_path / "tests"
    tests.mkdir()
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--no-install", "--budget", "75"]
    more = ["--models", "resnet-50", "--scale", "2", "--output", str(tmp_path / "gpu.json"), "--tests", str(tests)]
    done = subprocess.run(
        [*command, *more], cwd=ROOT, env={**os.environ, "OUT": str(out)}, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = saved(tmp_path)
    assert json.loads((out / "gpu.json").read_text()) == data
    assert (out / "gpu.md").read_text() == (tmp_path / "gpu.md").read_text() == markdown(data)
    assert data["exit_code"] == 0
    assert set(data["plan"].values()) <= {"done", "not reached"}
    assert data["plan"]["smoke"] == data["plan"][section] == "done"
    assert data["backends"]["reference"] == "ok"
    assert list(data["backends"]) == ["cpu", "cuda", "triton", "reference"]
    assert "cuda: " in data["backends"]["cuda"] or data["backends"]["cuda"] == "ok"
    rows = {row["provider"]: row for row in data["timing"] if row["section"] == section}
    native = [name for name, state in data["backends"].items() if state == "ok" and name != "reference"]
    for name in (BASELINE, "SOFIM reference", *(f"SOFIM {backend}" for backend in native)):
        assert rows[name]["status"] in ("measured", "not reached")
    assert rows[BASELINE]["status"] == "measured"
    assert rows[BASELINE]["ratio"] == 1
    assert rows[BASELINE]["sets"] > 1
    if "SGD fused, CUDA graph" in rows:
        assert rows["SGD fused, CUDA graph"]["reason"] in ("needs a GPU", "")
    assert {row["status"] for row in data["smoke"]} <= {"right", "unavailable", "not reached"}
    assert [row for row in data["smoke"] if row["status"] == "right"]
    assert {row["verdict"] for row in data["targets"]} == {"not measured"}
    assert f"{section} (has" in done.stdout
    assert not re.search(re.escape(str(ROOT)) + r"|" + re.escape(str(tmp_path)), json.dumps(data))
