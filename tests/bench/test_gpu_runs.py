"""A GPU's acceptance run in several parts: what one takes over from another, parts from elsewhere, two builds."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_compare, gpu_earlier, gpu_outcomes
from bench.gpu import Acceptance
from bench.gpu_earlier import taken_over
from bench.gpu_providers import BASELINE, UnavailableError, Workload, providers, ready
from bench.gpu_report import Record, Row, Section, markdown, verdicts
from bench.gpu_worker import Worker
from tests.bench.test_gpu_bench import MARK, a_record, a_test_folder, acceptance, only, saved, timed

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
CODE = "0123456789ab"


def results(tmp_path: Path, **values: Any) -> Row:
    """What a run has left: rows of one section, one of them not reached."""
    record = a_record(tmp_path / "earlier.json")
    record.data["device"]["more"]["compute capability"] = "9.0"
    for kind, status in (("sgd", "measured"), ("plain", "measured"), ("guarded", "not reached")):
        record.add("timing", timed(kind, status=status), "section", "provider")
    trained = dict.fromkeys(("median", "low", "high", "ratio", "host", "rounds"), 1.0)
    record.add("training", {"model": "resnet-9", "provider": "SGD fused", **trained}, "model", "provider")
    record.add("smoke", {"backend": "triton", "case": "plain", "status": "right", "reason": ""}, "backend", "case")
    record.plan(["smoke", "sanitizer memcheck", "sanitizer racecheck", "tests"])
    for name in record.data["plan"]:
        record.mark(name, "done")
    record.data["sanitizer"] = {"memcheck, cuda": "no errors", "racecheck, cuda": gpu_earlier.UNFINISHED}
    record.data["tests"] = {"summary": "", "counts": {}, "passed": ["a", "b"], "failed": []}
    record.data.update(code=CODE, **values)
    record.save()
    return saved_as(tmp_path / "earlier.json")


def saved_as(path: Path) -> Row:
    result: Row = json.loads(path.read_text())
    return result


def device(**values: Any) -> Row:
    return {"name": "Some GPU", "versions": {"torch": "2.11.0", "triton": "3.6.0"},
            "more": {"compute capability": "9.0"}, **values}  # fmt: skip


# What is taken over


def test_only_what_has_no_result_is_left_to_do(tmp_path: Path) -> None:
    earlier = taken_over(results(tmp_path), device(), CODE)
    (section,) = earlier.providers
    assert earlier.providers[section] == ["SOFIM triton, sgd", "SOFIM triton, plain"]
    assert [(row["kind"], row["run"]) for row in earlier.data["timing"]] == [("sgd", 1), ("plain", 1)]
    assert earlier.passed == {"a", "b"}
    assert earlier.steps == {"training: resnet-9", "smoke", "sanitizer memcheck"}
    assert earlier.data["sanitizer"] == {"memcheck, cuda": "no errors"}  # racecheck came to no end


def test_times_outlive_a_change_of_the_code_and_verdicts_do_not(tmp_path: Path) -> None:
    earlier = taken_over(results(tmp_path), device(), "another")
    assert [row["kind"] for row in earlier.data["timing"]] == ["sgd", "plain"]
    assert earlier.steps == {"training: resnet-9"}
    assert not earlier.passed
    assert not {"smoke", "sanitizer", "failures"} & earlier.data.keys()
    assert "code is not that" in earlier.notes[0]


def test_of_another_device_only_passed_tests_count_and_no_time(tmp_path: Path) -> None:
    data = results(tmp_path)
    earlier = taken_over(data, device(name="Another GPU"), CODE)
    assert (earlier.data, earlier.providers, earlier.steps) == ({}, {}, frozenset())
    assert earlier.passed == {"a", "b"}
    assert "Some GPU" in earlier.notes[0]
    for other in (
        taken_over(data, device(name="Another GPU"), "another"),
        taken_over(data, device(more={"compute capability": "8.0"}), CODE),
        taken_over(data, device(versions={"torch": "2.12.0", "triton": "3.6.0"}), CODE),
    ):
        assert other._replace(notes=()) == gpu_earlier.NOTHING


def test_results_from_before_runs_had_numbers(tmp_path: Path) -> None:
    data = results(tmp_path)
    for key in ("runs", "code"):
        del data[key]
    earlier = taken_over(data, device(), CODE)
    assert [run["date"] for run in earlier.data["runs"]] == ["2026-01-01"]
    assert len(earlier.data["timing"]) == 2
    committed = gpu_earlier.read(ROOT / "bench" / "results" / "gpu_nvidia_h200.json")
    assert taken_over(committed, committed["device"], CODE).providers


def test_the_code_is_all_that_is_tested(tmp_path: Path) -> None:
    for name in ("csrc/a.cu", "sofim_fused/b.py", "tests/c.py", "bench/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    before = gpu_earlier.code_of(tmp_path)
    (tmp_path / "bench/d.py").write_text("2")
    (tmp_path / "sofim_fused/b.so").write_text("2")
    assert gpu_earlier.code_of(tmp_path) == before
    for name in ("csrc/a.cu", "sofim_fused/b.py", "tests/c.py"):
        (tmp_path / name).write_text("2")
        assert gpu_earlier.code_of(tmp_path) != before
        before = gpu_earlier.code_of(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"timing": 1, "device": {"name": ""}}', '{"device": {}}'])
def test_a_file_without_results_is_refused_at_once(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.json"
    if text is not None:
        path.write_text(text)
    assert gpu.main(["--continue", str(path), "--output", str(tmp_path / "out.json")]) == 2
    assert "some.json has no results of bench.gpu" in capsys.readouterr().out
    assert not (tmp_path / "out.json").exists()


# Rows and documents of several runs


def test_rows_say_of_which_run_they_are(tmp_path: Path) -> None:
    earlier = taken_over(results(tmp_path), device(), CODE)
    record = Record(tmp_path / "gpu.json", [], a_record(tmp_path / "x.json").data | {"code": CODE}, earlier.data)
    assert record.run == 2
    record.add("timing", {"run": 2, **timed("sgd")}, "section", "provider", "run")
    record.add("timing", {"run": 2, **timed("guarded")}, "section", "provider", "run")
    record.save()
    data = saved(tmp_path)
    assert [(row["kind"], row["run"]) for row in data["timing"]] == [
        ("sgd", 1),
        ("plain", 1),
        ("sgd", 2),
        ("guarded", 2),
    ]
    assert [run["code"] for run in data["runs"]] == [CODE, CODE]
    text = (tmp_path / "gpu.md").read_text()
    assert text == markdown(data)
    assert "| run | sets |" in text
    assert "- 2: `python3 -m bench.gpu`, 2026-01-01" in text
    assert "| run |" not in (tmp_path / "earlier.md").read_text()  # of one run there is nothing to tell apart


def test_ratios_are_between_rows_of_one_run() -> None:
    clipped = {"provider": "SGD", "ours": False}
    rows = [
        {"run": 1, **timed("clipped sgd", ratio=1.0, **clipped)},
        {"run": 2, **timed("guarded", ratio=1.6)},
        {"run": 2, **timed("clipped sgd", ratio=2.0, **clipped)},
    ]
    (found,) = [row for row in verdicts(rows) if row["target"].startswith("guarded")]
    assert found["value"] == pytest.approx(0.8)
    (found,) = [row for row in verdicts(rows[:2]) if row["target"].startswith("guarded")]
    assert found["value"] == pytest.approx(1.6)  # for want of a better one


@pytest.mark.parametrize("chosen", [[], ["SOFIM reference"]])
def test_a_section_times_what_is_new_beside_the_baseline(chosen: list[str]) -> None:
    answers: list[Row] = []
    worker = Worker(CPU, 2, answers.append, lambda *_: None)
    job: Row = {
        "kind": "timing", "section": Section("lenet-5", cached=True)._asdict(), "backends": ["reference"],
        "seconds": 0.01, "exclude": [], "deadline": 2e9, "copy_gb_per_s": None, "only": chosen,
    }  # fmt: skip
    known = [BASELINE, "SGD foreach", "SGD fused, clip_grad_norm_", "SGD fused, CUDA graph"]
    worker.do({**job, "known": known})
    assert [row["provider"] for row in answers] == [BASELINE, "SOFIM reference"]
    assert [row["status"] for row in answers] == ["measured"] * 2
    answers.clear()
    worker.do({**job, "known": [*known, "SOFIM reference"]})
    assert not answers


def test_with_times_known_the_tests_come_before_others(tmp_path: Path) -> None:
    made = acceptance(tmp_path)
    made.earlier = taken_over(results(tmp_path), device(), CODE)
    names = [step.name for step in made.steps()]
    assert names.index("tests") < names.index("lenet-5, float32, in cache")
    assert "smoke" not in names
    assert "sanitizer memcheck" not in names
    assert "sanitizer racecheck" in names
    first = acceptance(tmp_path, "--tests-first", __file__)
    names = [step.name for step in first.steps()]
    assert names.index("smoke") < names.index("tests that come first") < names.index("copy bandwidth")


# Tests in several runs


def after(made: Acceptance, tmp_path: Path) -> Acceptance:
    """A run that goes on where another one has ended."""
    found = {**made.record.data, "code": CODE}
    earlier = taken_over(found, found["device"], CODE)
    next_one = acceptance(tmp_path, "--tests", str(made.options.tests))
    next_one.__init__(  # type: ignore[misc]
        next_one.options,
        Record(tmp_path / "gpu.json", [], {**a_record(tmp_path / "x.json").data, "code": CODE}, earlier.data),
        next_one.budget,
        next_one.environment,
        earlier,
    )
    return next_one


def test_tests_go_on_where_the_last_run_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = f"import os\n{MARK}def test_a(): pass\n{MARK}def test_b(): os._exit(3)\n{MARK}def test_c(): pass\n"
    folder = a_test_folder(tmp_path, body)
    first = acceptance(tmp_path, "--tests", str(folder))
    assert only(first, monkeypatch, "tests") == 1
    (passed,) = saved(tmp_path)["tests"]["passed"]
    assert passed.endswith("test_some.py::test_a")

    (folder / "test_some.py").write_text(
        f"import pytest\n{MARK}def test_a(): assert False, 'done'\n{MARK}def test_b(): pass\n{MARK}def test_c(): pass\n"
    )
    second = after(first, tmp_path)
    assert only(second, monkeypatch, "tests") == 0
    found = saved(tmp_path)["tests"]
    assert [name.partition("::")[2] for name in found["passed"]] == ["test_a", "test_b", "test_c"]
    assert found["summary"] == "2 passed, 1 deselected; 1 more passed before"

    third = after(second, tmp_path)  # with nothing left to do
    assert only(third, monkeypatch, "tests") == 0
    assert len(saved(tmp_path)["tests"]["passed"]) == 3


def test_some_files_come_first_and_their_failures_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_test_folder(tmp_path, f"{MARK}def test_a(): pass\n{MARK}def test_b(): assert False")
    made = acceptance(tmp_path, "--tests-first", str(folder / "test_some.py"))
    assert only(made, monkeypatch, "tests that come first") == 1
    found = saved(tmp_path)["tests"]
    assert [len(found[key]) for key in ("passed", "failed")] == [1, 1]
    assert set(saved(tmp_path)["slow_tests"]) == {*found["passed"], *found["failed"]}


def test_files_that_come_first_may_have_nothing_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_test_folder(tmp_path, "def test_a(): pass")
    made = acceptance(tmp_path, "--tests-first", str(folder / "test_some.py"))
    assert only(made, monkeypatch, "tests that come first") == 0


def test_a_failure_is_one_whatever_is_said_later(tmp_path: Path) -> None:
    path = tmp_path / "outcomes"
    lines = [["a", "failed", 1.0], ["a", "passed", 2.0], ["b", "passed", 3.0], ["b", "failed", 0.1]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert gpu_outcomes.read(path) == {"a": ("failed", 1.0), "b": ("failed", 0.1)}
    assert gpu_outcomes.read(tmp_path / "none") == {}


@pytest.mark.parametrize(
    "line",
    [
        "[gw3] [ 12%] PASSED tests/test_a.py::test_b[(x, y)-cuda]",
        "tests/test_a.py::test_b[(x, y)-cuda] PASSED [ 12%]",
        "tests/test_a.py::test_b[(x, y)-cuda]",
    ],
)
def test_a_test_is_read_off_a_line(line: str) -> None:
    assert gpu._test_of(line) == "tests/test_a.py::test_b[(x, y)-cuda]"


# Native parts from elsewhere


def prebuilt(folder: Path) -> Path:
    folder.mkdir()
    for name in ("_C.cpython-312.so", "_cpu_avx512.cpython-312.so", "_cuda.cpython-312.so", "_build.json"):
        (folder / name).write_text(name)
    return folder


def test_prebuilt_parts_take_the_place_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "sofim_fused"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_cpu_default.old.so").write_text("another build")
    monkeypatch.setattr(gpu, "PACKAGE", package)
    monkeypatch.setattr(gpu, "run", lambda *_: pytest.fail("nothing is to be compiled"))
    folder = prebuilt(tmp_path / "built")
    made = acceptance(tmp_path, "--prebuilt", str(folder))
    assert only(made, monkeypatch, "install") == 0
    assert {file.name for file in package.iterdir()} == {"__init__.py", *(file.name for file in folder.iterdir())}


@pytest.mark.parametrize("missing", ["_build.json", "_C.cpython-312.so", "_cpu_avx512.cpython-312.so"])
def test_an_incomplete_folder_is_refused_before_anything_is_changed(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prebuilt(tmp_path / "built")
    (folder / missing).unlink()
    with pytest.raises(SystemExit):
        gpu.parsed(["--prebuilt", str(folder)])
    assert missing.partition(".")[0].partition("_avx")[0] in capsys.readouterr().err.partition("error: ")[2]
    with pytest.raises(SystemExit):
        gpu.parsed(["--tests-first", str(folder / missing)])


def test_prebuilt_parts_that_are_not_in_use_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = acceptance(tmp_path, "--prebuilt", str(prebuilt(tmp_path / "built")))
    states = [{"backend": "cuda", "state": "it was built for torch 2.10"}, {"backend": "triton", "state": "ok"}]
    monkeypatch.setattr(made.workers, "do", lambda job, limit: iter(states))
    assert only(made, monkeypatch, "backends") == 1
    assert "not in use: it was built for torch 2.10" in saved(tmp_path)["failures"][0]


# Two builds


def test_builds_are_compared_round_by_round() -> None:
    rows = [
        {"section": "s", "provider": "p", "package": name, "round": turn, "median": m, "device": d, "host": 1.0}
        for turn, name, m, d in (
            (0, "old", 2.0, 4.0), (0, "new", 1.0, None), (1, "old", 8.0, 4.0), (1, "new", 2.0, 1.0),
            (2, "old", 4.0, 4.0), (2, "new", 2.0, 2.0), (3, "old", 9.0, 4.0),
        )
    ]  # fmt: skip
    old, new = gpu_compare.compared(rows, ["old", "new"])
    assert (old["median_ratio"], old["device_ratio"], old["median"]) == (1, 1, 6)
    assert (new["median_ratio"], new["device_ratio"], new["median"]) == (0.5, 0.375, 2)


def test_packages_have_to_be_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        gpu_compare.parsed(["--packages", f"old={ROOT}", f"new={tmp_path}"])
    assert f"new={tmp_path}: there is no sofim_fused" in capsys.readouterr().err


def test_two_packages_are_measured_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin = tmp_path / "twin"
    (twin / "sofim_fused").mkdir(parents=True)
    for file in (ROOT / "sofim_fused").iterdir():
        (twin / "sofim_fused" / file.name).symlink_to(file)
    output = tmp_path / "compared.json"
    arguments = ["--packages", f"old={ROOT}", f"new={twin}", "--device", "cpu", "--scale", "2", "--models", "lenet-5"]
    more = ["--backends", "reference", "--providers", "SOFIM reference", "--rounds", "2", "--seconds", "0.01"]
    assert gpu_compare.main([*arguments, *more, "--output", str(output)]) == 0
    found = saved_as(output)
    providers = {(row["provider"], row["package"], row["round"]) for row in found["rows"]}
    assert providers == {
        (p, name, turn) for p in (BASELINE, "SOFIM reference") for name in ("old", "new") for turn in (0, 1)
    }
    assert [row["rounds"] for row in found["result"]] == [2] * 4
    assert "| lenet-5, float32, in cache | SOFIM reference | new |" in capsys.readouterr().out


# Peers


@pytest.mark.parametrize(("dtype", "moved", "own"), [(torch.float32, 28, 8), (torch.bfloat16, 14, 4)], ids=str)
def test_adamw_is_timed_beside_some_models(dtype: torch.dtype, moved: int, own: int) -> None:
    kinds = [p.kind for p in providers(["reference"], dtype)]
    more = {model: [p.kind for p in providers(["reference"], dtype, model)] for model in ("vit-b", "resnet-9")}
    assert more["vit-b"] == kinds
    assert sorted(more["resnet-9"]) == sorted([*kinds, "adamw"])
    (adamw,) = [p for p in providers(["reference"], dtype, "gpt2-small") if p.kind == "adamw"]
    assert (adamw.bytes_moved(dtype), adamw.own_size(dtype)) == (moved, own)
    made = ready(adamw, Workload([(40, 3)], dtype, CPU, 1))
    (optimizer,) = made.optimizers
    assert type(optimizer) is torch.optim.AdamW
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert sum(state[name].element_size() for name in ("exp_avg", "exp_avg_sq")) == own
    made.call()
    assert int(state["step"]) == 3


def test_other_packages_are_timed_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Peer(torch.optim.SGD):
        def __init__(self, params: Any, master_weight_bits: int | None = 24, **options: Any) -> None:
            if master_weight_bits is not None and params[0].dtype == torch.float32:
                raise ValueError("master_weight_bits has no effect when all parameters are fp32")  # as FlashSGD does
            super().__init__(params, **options)

    work = Workload([(4, 3)], torch.float32, CPU, 1)
    flash, other = [p for p in providers(["reference"], torch.float32, "gpt2-small") if p.peer]
    module: Any = types.ModuleType("flashoptim")
    module.FlashSGD = Peer
    monkeypatch.setitem(sys.modules, "flashoptim", module)
    monkeypatch.setitem(sys.modules, "optimi", None)
    assert type(ready(flash, work).optimizers[0]) is Peer
    assert flash.bytes_moved(torch.float32) is None
    with pytest.raises(UnavailableError, match="optimi cannot be imported"):
        ready(other, work)
