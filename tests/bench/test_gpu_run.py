"""The acceptance run on a GPU does what it says, as far as that shows without one."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu import profile, providers, record, report
from bench.gpu.processes import Command, Output, tail
from bench.gpu.providers import BASELINE, Group, Provider, UnavailableError, Workload, launches, plan, ready, sofim
from bench.gpu.record import ROOT, Record, Row
from bench.gpu.rows import Rows
from bench.shapes import GPU_MODELS
from sofim_fused import backends
from sofim_fused.backends import cpu
from tests.support.runs import GPU_BACKENDS

CPU = torch.device("cpu")
DEVICE = {"name": "NVIDIA X", "torch": "2.11.0", "compute capability": "9.0"}
NATIVE = [] if isinstance(cpu.passes_for(CPU), str) else ["cpu"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A record in which a run has begun."""
    record.add(tmp_path / "gpu.jsonl", "run", command="c", date="2026-01-01", device=DEVICE, code="A")
    return tmp_path / "gpu.jsonl"


def row(provider: str, status: str = "measured", title: str = "lenet-5", **values: Any) -> Row:
    times = dict.fromkeys(("median", "low", "high", "device", "host"), 1.2e-3) if status == "measured" else {}
    return {"title": title, "provider": provider, "ours": provider.startswith("SOFIM"), "status": status,
            "reason": "why", **times, "ratio": 0.5, "gb_per_s": 900.0, **values}  # fmt: skip


# Providers


def test_bytes_are_those_of_the_method() -> None:
    """The tables of docs/method.md."""
    every = {p.name: p for group in plan(["cpu", "reference"]) for p in (providers.SGD_FUSED, *group.providers)}
    wide = {name: p.bytes_moved(torch.float32) for name, p in every.items()}
    narrow = {name: p.bytes_moved(torch.bfloat16) for name, p in every.items()}
    expected = {
        BASELINE: (20, 10), f"{BASELINE}, clip_grad_norm_": (32, 16), "SGD foreach": (32, 16), "SGD compiled": (20, 10),
        "AdamW fused": (28, 14), "FlashSGD": (None, None), "SOFIM cpu": (24, 22), "SOFIM cpu, guarded": (28, 24),
        "SOFIM cpu, gradient form": (28, 24), "SOFIM cpu, bfloat16 moment": (18, 16), "SOFIM cpu, no kahan": (24, 18),
        "SOFIM cpu, bfloat16 moment, no kahan": (18, 12), "SOFIM cpu, CUDA graph": (24, 22),
        "SOFIM cpu, factored": (24, 20), "SOFIM cpu, factored, guarded": (24, 20), "SOFIM cpu, row": (24, 20),
        "SOFIM cpu, factored, rank one": (32, 26), "SOFIM cpu, element": (28, 26), "SOFIM reference": (None, None),
    }  # fmt: skip
    assert {name: (wide[name], narrow[name]) for name in expected} == expected


def test_the_plan_begins_with_what_tells_most_and_names_everything_once() -> None:
    groups = plan(["cuda", "triton", "reference"])
    assert [(group.model, group.providers[-1].name) for group in groups[:10]] == [
        (model, f"SOFIM {name}, guarded") for name in ("cuda", "triton") for model in providers.FIVE
    ]
    assert {(group.model, group.providers[0].name) for group in groups[10:16]} == {
        (model, "AdamW fused") for model in (*providers.FIVE, "1000x32x32")
    }
    assert [group.title for group in groups[16:19]] == list(providers.TASKS)
    assert {group.model for group in groups} == {*GPU_MODELS, *providers.TASKS}
    named = [(group.title, p.name) for group in groups for p in group.providers if p.ours]
    assert len(set(named)) == len(named)
    assert {(title, name.replace("cuda", "triton")) for title, name in named if "cuda" in name} == {
        (title, name) for title, name in named if "triton" in name
    }


@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_works_on_every_set_in_turn(dtype: torch.dtype, sets: int) -> None:
    """On its state and on what all share: the weights, and the gradients, of which clipping has its own."""
    groups = [group for group in plan([*NATIVE, "reference"]) if group.title not in providers.TASKS]
    every = {p.name: p for group in groups for p in (providers.SGD_FUSED, *group.providers) if p not in providers.PEERS}
    for provider in every.values():
        work = Workload([(4, 3), (5,)], dtype, CPU, sets)
        if provider.form != "step" or provider.one_launch is not None:
            with pytest.raises(UnavailableError, match=r"needs a GPU|has no launches"):
                ready(provider, work)
            continue
        for _, grads in work.sets:
            for grad in grads:
                grad.mul_(1e3)  # enough to be clipped
        # A step that 16 bits notice.
        call = ready(dataclasses.replace(provider, options={**provider.options, "lr": 10.0}), work)
        kept = [[grad.clone() for grad in grads] for _, grads in work.sets]
        before = [torch.cat([p.detach().flatten() for p in work.parameters(i)]) for i in range(sets)]
        for turn in range(2 * sets):
            call()
            now = [torch.cat([p.detach().flatten() for p in work.parameters(i)]) for i in range(sets)]
            moved = [i for i, pair in enumerate(zip(now, before, strict=True)) if not torch.equal(*pair)]
            assert moved == [turn % sets], provider.name
            before = now
        torch.testing.assert_close([grads for _, grads in work.sets], kept, rtol=0, atol=0)


def test_other_packages_are_timed_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashSGD keeps more bits than float32 has, unless it is told not to, and refuses that."""

    def flash(params: Any, lr: float, momentum: float, master_weight_bits: int | None = 24) -> torch.optim.SGD:
        if master_weight_bits is not None and params[0].dtype == torch.float32:
            raise ValueError("master_weight_bits=24 has no effect")
        return torch.optim.SGD(params, lr, momentum)

    monkeypatch.setitem(sys.modules, "flashoptim", SimpleNamespace(FlashSGD=flash))
    monkeypatch.setitem(sys.modules, "optimi", None)
    for dtype in (torch.float32, torch.bfloat16):
        work = Workload([(4, 3)], dtype, CPU, 1)
        ready(providers.PEERS[0], work)()
        with pytest.raises(UnavailableError, match="optimi cannot be imported"):
            ready(providers.PEERS[1], work)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_the_switch_of_launches_is_turned_only_meanwhile(backend: str) -> None:
    before = GPU_BACKENDS[backend].SINGLE_LAUNCH
    with pytest.raises(KeyError), launches(sofim(backend, one_launch=not before)):  # noqa: PT012
        assert GPU_BACKENDS[backend].SINGLE_LAUNCH is not before
        raise KeyError
    assert GPU_BACKENDS[backend].SINGLE_LAUNCH is before


# Rows


def names(path: Path) -> dict[str, str]:
    return {name: row["status"] for (_, name), row in Record(path).rows.items()}


def test_what_raises_is_left_out_and_the_others_are_timed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    class Breaks(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            nonlocal calls
            calls += 1
            if calls > 5:
                raise RuntimeError("after some steps")

    monkeypatch.setattr(torch.optim, "Breaks", Breaks, raising=False)
    absent = Provider("absent", "a_package_that_is_not_there:SGD", {})
    late, early = Provider("late", "torch.optim:Breaks", {"lr": 1.0}), sofim("cpu", "early", rho=-1.0)
    made = Rows(path, CPU, 0.01)
    found = made.rows(Group("resnet-9", [absent, late, early, sofim("reference")]))
    assert [(row["provider"], row["status"]) for row in found] == [
        (BASELINE, "measured"), ("absent", "unavailable"), ("late", "failed"), ("SOFIM cpu, early", "failed"),
        ("SOFIM reference", "measured"),
    ]  # fmt: skip
    assert found[2]["reason"] == "RuntimeError: after some steps"
    assert found[0]["ratio"] == 1
    assert found[0]["sets"] > 1


def test_training_steps_begin_alike(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Rows(path, CPU, 0.01)
    group = Group(
        next(iter(providers.TASKS)), [sofim("reference"), sofim("reference", "in_backward", in_backward=True)]
    )
    assert [row["status"] for row in made.rows(group)] == ["measured"] * 3
    network = providers.MINIATURE.network()
    assert providers.Autocast(network)(torch.ones(2, 8)).dtype == torch.float32
    monkeypatch.setattr("bench.gpu.rows.check_losses", lambda *_: 1 / 0)
    assert {row["status"] for row in made.rows(group)} == {"failed"}


def test_rows_that_are_known_are_not_timed_again(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = re.compile("lenet-5, float32, in cache: (SOFIM reference|SGD fused, c)")
    made = Rows(path, CPU, 0.01)
    made.run(lambda: 0.0, chosen)
    assert "not reached lenet-5, float32, in cache: SOFIM reference" in capsys.readouterr().out
    record.add(path, "row", **row(f"{BASELINE}, clip_grad_norm_", title="lenet-5, float32, in cache"))
    made.run(lambda: 60.0, chosen)
    monkeypatch.setattr(made, "rows", lambda group: pytest.fail(f"{group} is timed again"))
    made.run(lambda: 60.0, chosen)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["provider"] for line in lines if line["kind"] == "row"] == [
        f"{BASELINE}, clip_grad_norm_", BASELINE, "SOFIM reference"
    ]  # fmt: skip
    assert sum(line["kind"] == "copy" for line in lines) == 1


# The record and the document


def test_a_torn_line_is_passed_over_and_cut_off(path: Path) -> None:
    record.add(path, "test", name="a", outcome="passed", seconds=1.0)
    content = path.read_bytes()
    path.write_bytes(content + b'{"kind":"test","na')
    assert Record(path).passed() == {"a"}
    assert record.whole(path.read_bytes()) == content
    for other in (b"", b"nonsense\n", b'{"kind":"test","name":"a"}\n'):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=r"gpu\.jsonl has no results of bench\.gpu"):
            Record(path)


def test_times_outlive_a_change_of_the_code_and_verdicts_do_not(path: Path) -> None:
    for name, status in (("SOFIM cuda", "measured"), ("SOFIM triton", "failed")):
        record.add(path, "row", **row(name, status))
    record.add(path, "test", name="a", outcome="passed", seconds=1.0)
    record.add(path, "copy", gb_per_s=1000.0)
    assert (len(Record(path).rows), Record(path).passed()) == (2, {"a"})
    record.add(path, "run", command="c", date="2026-01-02", device=DEVICE, code="B")
    assert (names(path), Record(path).passed()) == ({"SOFIM cuda": "measured"}, set())
    assert "| SOFIM cuda | 1.20 [1.20, 1.20] | 0.500 |" in report.markdown(Record(path))
    assert "| 900 | 90% |" in report.markdown(Record(path))


def test_what_bench_may_have_broken_is_tried_again_once_bench_has_changed(path: Path) -> None:
    """Of the same tested code. Times stay, and so does what tests have found."""
    rows = {"SOFIM cuda": "measured", "SOFIM triton": "failed", "SGD compiled": "unavailable"}
    for name, status in rows.items():
        record.add(path, "row", **row(name, status))
    for outcome in ("passed", "failed"):
        record.add(path, "test", name=outcome, outcome=outcome, seconds=1.0)
    record.add(path, "uncollected", name="x.py", reason="ModuleNotFoundError: No module named 'bench.x'")
    assert (names(path), len(report.failures(Record(path)))) == (rows, 3)
    for _ in range(2):  # the second time nothing has changed
        record.add(path, "run", command="c", date="2026-01-02", device=DEVICE, code="A", bench="changed")
        found = Record(path)
        assert (names(path), found.passed()) == ({"SOFIM cuda": "measured"}, {"passed"})
        assert report.failures(found) == ["test failed: failed"]
    record.add(path, "row", **row("SOFIM triton", "failed"))
    record.add(path, "run", command="c", date="2026-01-03", device=DEVICE, code="A", bench="changed")
    assert names(path) == {"SOFIM cuda": "measured", "SOFIM triton": "failed"}


def test_a_run_notes_the_code_of_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, made = [], record.code_of
    monkeypatch.setattr(gpu.Run, "parts", lambda _: [])
    monkeypatch.setattr(record, "code_of", lambda names=record.CODE: made(tmp_path, names))
    for number, file in enumerate(("bench/gpu/x.py", "examples/x.py", "sofim_fused/x.py", "README.md")):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
        gpu.main(["--device", "cpu", "--output", str(tmp_path / f"{number}.jsonl")])
        codes.append([Record(tmp_path / f"{number}.jsonl").runs[0][key] for key in ("code", "bench")])
    tested, timing = zip(*codes, strict=True)
    assert [tested.index(code) for code in tested] == [0, 0, 2, 2]
    assert [timing.index(code) for code in timing] == [0, 1, 1, 1]


def test_the_code_is_all_that_is_tested(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").write_text("1")
    codes = [record.code_of(tmp_path)]
    for name, text in (("csrc/a.cu", "1"), ("csrc/a.cu", "2"), ("csrc/b.cu", "2")):
        (tmp_path / name).write_text(text)
        codes.append(record.code_of(tmp_path))
    (tmp_path / "csrc" / "a.o").write_text("3")
    assert len(set(codes)) == 4
    assert record.code_of(tmp_path) == codes[-1]


def test_the_document_tells_failures_from_remarks(path: Path) -> None:
    for name, outcome in (("a", "passed"), ("b", "failed"), ("c", "failed"), ("c", "passed")):
        record.add(path, "test", name=name, outcome=outcome, seconds=1.0)
    record.add(path, "row", **row("SOFIM cuda", "failed", reason="a | b"))
    record.add(path, "row", **row("SGD compiled", "failed"))
    record.add(path, "uncollected", name="x.py", reason="ModuleNotFoundError: No module named 'hypothesis'")
    record.add(path, "uncollected", name="y.py", reason="ModuleNotFoundError: No module named 'sofim_fused.x'")
    record.add(path, "sanitizer", name="racecheck", outcome="not finished", detail="in its time")
    record.add(path, "sanitizer", name="memcheck", outcome="failed", detail="3 errors")
    record.add(path, "part", name="rows", outcome="not reached: t: SOFIM triton", failed=False)
    found = report.write(path)
    assert [failure.partition(":")[0] for failure in report.failures(found)] == [
        "test failed", "not imported", "memcheck", "lenet-5"
    ]  # fmt: skip
    text = path.with_suffix(".md").read_text()
    assert "tests left out: x.py" in text
    assert "- rows: not reached: t: SOFIM triton" in text
    assert "failed: a \\| b" in text
    assert "tests: 1 failed, 2 passed" in text


@pytest.mark.parametrize("package", ["hypothesis", "triton.backends", "benchmark", "testsuite"])
def test_a_package_that_is_not_installed_is_a_remark(path: Path, package: str) -> None:
    record.add(path, "uncollected", name="x.py", reason=f"ModuleNotFoundError: No module named '{package}'")
    found = Record(path)
    assert (len(report.remarks(found)), len(report.failures(found))) == (1, 0)


@pytest.mark.parametrize(
    "reason",
    [
        *(f"ModuleNotFoundError: No module named '{name}'" for name in ("tests.support.runs", "bench.x", "examples")),
        "No module named sofim_fused.x",
        "ImportError: cannot import name 'x' from 'torch'",
    ],
)
def test_a_module_of_this_project_that_is_not_there_is_a_failure(path: Path, reason: str) -> None:
    record.add(path, "uncollected", name="x.py", reason=reason)
    found = Record(path)
    assert (len(report.remarks(found)), len(report.failures(found))) == (0, 1)


@pytest.mark.parametrize(
    ("parameters", "backend"),
    [
        ("[cuda]", "cuda"),
        ("[cuda-cuda-plain]", "cuda"),
        ("[True-triton-cuda]", "triton"),
        ("[reference-cuda]", "reference"),
        ("[one launch-cuda-{'numerator': 'gradient'}]", "cuda"),
        ("[float32-3]", None),
        ("", None),
    ],
)
def test_the_backend_that_a_test_is_about(parameters: str, backend: str | None) -> None:
    assert report.backend_of(f"tests/backends/test_cuda.py::test_cuda{parameters}") == backend
    assert {"auto", *report.BACKENDS} == set(backends.names())


def test_a_backend_of_which_no_test_has_passed_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where its tests were asked for, in this run or an earlier one of the same code, on a GPU."""
    monkeypatch.setattr(gpu, "device_information", lambda *_: DEVICE)
    monkeypatch.setattr(gpu.Run, "parts", lambda _: [])
    monkeypatch.setattr(record, "code_of", lambda names=record.CODE: "A")
    path = tmp_path / "gpu.jsonl"

    def failing(*arguments: str) -> list[str]:
        code = gpu.main(list(arguments))
        entries = [line.strip() for line in capsys.readouterr().out.splitlines() if "no test of the backend" in line]
        assert code == bool(entries)
        return [entry.partition(":")[0] for entry in entries]

    def test(name: str, outcome: str) -> None:
        record.add(path, "test", name=f"t.py::test_x[{name}]", outcome=outcome, seconds=1.0)

    cuda, triton = (f"no test of the backend {name} has passed" for name in ("cuda", "triton"))
    assert failing("--parts", "build", "rows", "--output", str(tmp_path / "rows.jsonl")) == []
    assert failing("--device", "cpu", "--output", str(tmp_path / "cpu.jsonl")) == []
    assert failing("--parts", "smoke", "--output", str(tmp_path / "smoke.jsonl")) == [f"{cuda} (none was run)"]
    assert failing("--parts", "triton-tests", "--output", str(path)) == [f"{triton} (none was run)"]
    test("reference-cuda", "passed")
    test("cuda-cuda", "skipped")
    assert failing("--continue", str(path)) == [f"{cuda} (1 skipped)", f"{triton} (none was run)"]
    assert cuda in path.with_suffix(".md").read_text()
    test("True-triton-cuda", "passed")
    assert failing("--parts", "rows", "--continue", str(path)) == [f"{cuda} (1 skipped)"]
    test("one launch-cuda-{}", "passed")
    assert failing("--continue", str(path)) == []
    monkeypatch.setattr(record, "code_of", lambda names=record.CODE: "B")
    assert failing("--continue", str(path)) == [f"{cuda} (none was run)", f"{triton} (none was run)"]


# Parts of a run


def run(path: Path, *arguments: str) -> gpu.Run:
    options = gpu.parsed(["--device", "cpu", "--budget", "60", *arguments])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return gpu.Run(options, path, environment)


def test_a_part_that_raises_does_not_stop_the_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = run(path), []

    def first(seconds: float) -> str:
        assert seconds == pytest.approx(55 / 3, abs=1)
        raise RuntimeError("broken")

    def second(seconds: float) -> str:
        assert seconds == pytest.approx(55, abs=1)  # all that is left
        seen.append(Record(path).found["part"]["first"]["outcome"])
        return ""

    monkeypatch.setattr(made, "parts", lambda: [gpu.Part("first", 1, first), gpu.Part("second", 2, second)])
    assert made.run() == 1
    assert seen == ["RuntimeError: broken"]
    assert "first: RuntimeError: broken" in path.with_suffix(".md").read_text()


def test_a_part_whose_tests_are_all_skipped_fails(path: Path, tmp_path: Path) -> None:
    """Whatever passes in other parts; what has passed for the same code in an earlier run counts."""
    (tmp_path / "test_some.py").write_text(
        textwrap.dedent("""
            import os, pytest
            @pytest.mark.parametrize("run", ["reference-cuda", "cuda-cuda", "triton-cuda", "triton-cuda-2"])
            def test(run):
                if run not in os.environ["WORKS"].split(): pytest.skip("the native part was not built")
        """)
    )
    made = run(path, "--tests", str(tmp_path))
    actions = {part.name: part.action for part in made.parts()}

    def outcome(name: str, works: str = "") -> tuple[str, bool]:
        made.failed = False
        made.environment["WORKS"] = works
        return actions[name](60), made.failed

    def has_passed(parameter: str, part: str) -> None:
        (name,) = (test["name"] for test in Record(path).of("test") if f"[{parameter}]" in test["name"])
        record.add(path, "test", name=name, outcome="passed", seconds=1.0, part=part)

    assert outcome("tests", "reference-cuda") == ("", False)
    text, failed = outcome("triton-tests")
    assert text.startswith("no test has passed; pytest ended")
    assert failed
    has_passed("triton-cuda", "triton-tests")
    assert outcome("triton-tests") == ("", False)
    has_passed("triton-cuda-2", "smoke")
    assert outcome("triton-tests") == ("", False)  # nothing is left to run


def test_a_provider_that_hangs_or_dies_is_left_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(path)
    scripts = iter(
        [
            "print('at t: tensors: SOFIM a'); import os; os._exit(7)",
            "print('at t: SOFIM b'); import time; time.sleep(60)",
            "print('not reached t: SOFIM c')",
        ]
    )
    monkeypatch.setattr(gpu, "QUIET", 1.0)
    monkeypatch.setattr(made, "python", lambda *_: Command([sys.executable, "-c", next(scripts)], made.environment))
    assert made.rows(30) == "not reached: t: SOFIM c"
    found = {key: row["reason"] for key, row in Record(path).rows.items()}
    assert list(found) == [("t: tensors", "SOFIM a"), ("t", "SOFIM b")]
    assert "exit status 7" in found["t: tensors", "SOFIM a"]
    assert found["t", "SOFIM b"] == "nothing came for 1 s"
    for script in ("1 / 0", "print('at t: SGD fused'); 1 / 0"):  # at the start, and again and again
        made.failed = False
        monkeypatch.setattr(made, "python", lambda *_, s=script: Command([sys.executable, "-c", s], made.environment))
        assert "ZeroDivisionError" in made.rows(30)
        assert made.failed


@pytest.mark.parametrize(
    ("done", "outcome"),
    [
        (Output(0, "8 passed in 1 s\n==== ERROR SUMMARY: 0 errors\n"), "passed"),
        (Output(1, "8 passed in 1 s\n==== ERROR SUMMARY: 3 errors\n"), "failed"),
        (Output(0, "8 passed in 1 s\n=== RACECHECK SUMMARY: 2 hazards displayed (2 errors)\n"), "failed"),
        (Output(0, "2 failed, 6 passed\n==== ERROR SUMMARY: 0 errors\n"), "failed"),
        (Output(None, "===="), "not finished"),
        (Output(1, "Unable to attach"), "no verdict"),
    ],
)
def test_the_sanitizer_is_understood(done: Output, outcome: str) -> None:
    assert gpu.sanitizer_verdict(done)[0] == outcome


def test_a_sanitizer_on_the_path_watches_tests(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = path.parent / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho "$@" "$PYTORCH_NO_CUDA_MEMORY_CACHING"; echo "8 passed"; echo "ERROR SUMMARY: 0 errors"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    made = run(path)
    assert made.sanitize(20) == ""
    assert Record(path).passed("sanitizer") == {f"compute-sanitizer {check}, cpu" for check in gpu.TOOLS}
    assert "NOT THERE" in run(path).sanitize(20)  # or all was seen before


def test_prebuilt_parts_take_the_place_of_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, folder = path.parent / "package", path.parent / "built"
    for where, what in ((package, "_C.old.so"), (folder, "_C.new.so"), (package, "optimizer.py")):
        where.mkdir(exist_ok=True)
        (where / what).touch()
    with pytest.raises(SystemExit):
        gpu.parsed(["--prebuilt", str(folder)])
    (folder / "_build.json").touch()
    monkeypatch.setattr(gpu, "PACKAGE", package)
    run(path, "--prebuilt", str(folder)).build(10)
    assert {file.name for file in package.iterdir()} == {"_C.new.so", "_build.json", "optimizer.py"}


def test_no_record_is_overwritten_and_none_of_another_device_is_continued(path: Path, tmp_path: Path) -> None:
    options = gpu.parsed(["--device", "cpu", "--continue", str(path)])
    with pytest.raises(ValueError, match=r"gpu\.jsonl is of NVIDIA X, and this is Other: start a new record"):
        gpu.path_of(options, {"name": "Other"})
    assert gpu.path_of(options, DEVICE) == path
    content = path.read_bytes()
    options.output = tmp_path / "new" / "b.jsonl"
    assert gpu.path_of(options, DEVICE).read_bytes() == content
    with pytest.raises(SystemExit):
        gpu.parsed(["--output", str(path)])


def test_where_there_is_no_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "There is no GPU to run on: PyTorch sees no CUDA device" in capsys.readouterr().out


def test_a_command_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    late, lines = tmp_path / "late", list[str]()
    started = time.monotonic()
    done = Command(["sh", "-c", f"echo one; (sleep 2; touch {late}) & sleep 60"], {}).wait(0.5, lines.append)
    assert (done, lines) == (Output(None, "one\n"), ["one"])
    time.sleep(max(0.0, started + 2.5 - time.monotonic()))
    assert not late.exists()
    assert Command(["sh", "-c", "echo two; echo three >&2; exit 3"], {}).wait(20) == Output(3, "two\nthree\n")
    assert tail(f"one\n{ROOT}/bench/gpu.py: two\n") == "bench/gpu.py: two"


def test_a_profile_names_what_each_step_spends_its_time_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert profile.main(["--device", "cpu", "--models", "lenet-5"]) == 0
    steps = capsys.readouterr().out.split("== ")[1:]
    assert [step.partition("\n")[0] for step in steps] == [
        "lenet-5 AdamW fused", "lenet-5 SOFIM cpu", "lenet-5 SOFIM cpu, factored",
        "lenet-5 SOFIM cpu, factored, guarded",
        "lenet-5 SOFIM cpu, factored, rank one", "lenet-5 SOFIM cpu, row", "lenet-5 SOFIM cpu, element",
    ]  # fmt: skip
    for step in steps:
        operators = [line for line in step.splitlines()[1:] if "x1.0" in line]
        assert operators
        assert any(("_fused_adamw_" if "AdamW" in step else "#SOFIM.step") in line for line in operators)
    assert profile.main(["--device", "cpu", "--models", "lenet-6"]) == 2
    assert "no lenet-6; there are lenet-5, " in capsys.readouterr().err


# All of it


def test_a_run_may_be_killed_at_any_time_and_goes_on(tmp_path: Path) -> None:
    """Nothing is done twice, whatever has ended it; and of its processes none stays."""
    (tmp_path / "test_some.py").write_text(
        textwrap.dedent("""
            import os, pathlib, time
            def test_a(): pathlib.Path(__file__).with_name("pid").write_text(str(os.getpid()))
            def test_b(): assert False
            def test_slow(): time.sleep(float(os.environ["SLOW"]))
        """)
    )
    (tmp_path / "test_other.py").write_text("import a_package_that_is_not_there\n")
    path = tmp_path / "gpu.jsonl"
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--parts", "tests", "rows", "--each", "0.05"]
    command += ["--tests", str(tmp_path), "--rows", "lenet-5, float32, in cache: (SOFIM reference|SGD fused, clip)"]

    def begin(*more: str, slow: str = "0") -> subprocess.Popen[str]:
        environment = {**os.environ, "SLOW": slow}
        every = [*command, "--budget", "100", *more]
        return subprocess.Popen(every, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    def until(process: subprocess.Popen[str], found: str) -> None:
        deadline = time.monotonic() + 90
        while not (path.exists() and found in path.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)

    killed = begin("--output", str(path), slow="90")
    until(killed, "test_b")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    tests = Path("/proc", (tmp_path / "pid").read_text())
    for _ in range(200):  # pytest ends with it
        if not tests.exists():
            break
        time.sleep(0.05)
    assert not tests.exists()
    ended = begin("--continue", str(path), "--parts", "rows", "--each", "3")  # time to be ended between rows
    until(ended, '"row"')
    ended.send_signal(signal.SIGTERM)
    ended.communicate()
    assert ended.returncode == 143
    assert "test_b" in path.with_suffix(".md").read_text()
    last = begin("--continue", str(path))
    output, _ = last.communicate(timeout=100)
    assert last.returncode == 1, output
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    told = [(line["kind"], line.get("provider", line.get("name", "").rpartition("::")[2])) for line in lines]
    assert {item: told.count(item) for item in told if item[0] in ("test", "row")} == {
        ("test", "test_a"): 1, ("test", "test_b"): 2, ("test", "test_slow"): 1,
        ("row", BASELINE): 1, ("row", f"{BASELINE}, clip_grad_norm_"): 1, ("row", "SOFIM reference"): 1,
    }  # fmt: skip
    (failure,) = report.failures(Record(path))  # its folder is relative to the one with pytest's settings
    assert failure.startswith("test failed: ")
    assert failure.endswith("test_some.py::test_b")
    assert "a_package_that_is_not_there" in "".join(report.remarks(Record(path)))
    assert str(ROOT) not in path.read_text()
