"""The commands of ``python -m sofim_fused``: each does what the module of its name does, and prints JSON if asked."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from sofim_fused import __main__ as command
from sofim_fused import bench, info, memory, native
from sofim_fused.backends import cpu

GONE = "the file is gone"


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    command.main(arguments)
    return capsys.readouterr().out


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "info").splitlines() == list(info.lines())
    known = json.loads(told(capsys, "info", "--json"))
    assert known["native"] == native.build()
    assert known["torch"] == torch.__version__
    first = known["devices"][0]
    assert first["device"] == "cpu"
    assert first["backends"]["reference"] == "ok"
    assert first["default"] == ("cpu" if first["backends"]["cpu"] == "ok" else "reference")


def test_info_without_the_native_part(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(native, "_find", lambda: GONE)
    monkeypatch.setattr(cpu, "_loaded", lambda: GONE)
    known = json.loads(told(capsys, "info", "--json"))
    assert (known["instruction_set"], known["not_in_use"]) == (None, GONE)
    assert known["devices"][0]["default"] == "reference"
    assert known["devices"][0]["remedy"] == native.remedy()
    assert f"To build them: {native.remedy()}" in told(capsys, "info")


def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(capsys, "memory", "8x4", "--json")
    memory.main(["8x4", "--json"])
    assert shown == capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        command.main(["memory", "8x"])
    assert ended.value.code == 2
    assert "python -m sofim_fused memory: error: '8x' in MODEL is no shape" in capsys.readouterr().err


def test_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "SAMPLE", 1e-4)
    monkeypatch.setitem(bench.MODELS, "lenet-5", lambda: [(8, 4), (3,)])
    arguments = ["bench", "--models", "lenet-5", "--seconds", "0", "--device", "cpu"]
    shown = json.loads(told(capsys, *arguments, "--json"))
    assert [row["optimizer"] for row in shown["rows"]] == list(bench.CONTENDERS)
    for row in shown["rows"]:
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        assert row["rounds"] == bench.MIN_ROUNDS
        assert (row["ratio"] is None) == (row["optimizer"] in ("SGD", "AdamW"))
    lines = told(capsys, *arguments).splitlines()
    assert "lenet-5: 35 float32 parameters in 2 tensors" in lines
    assert len([line for line in lines if line.endswith(" x SGD")]) == 2
    assert len([line for line in lines if line.endswith(" x AdamW")]) == 1
    assert lines[-1] != ""


def test_what_is_timed_is_the_step_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fused step of PyTorch's own, on parameters that all of them share."""
    made = []
    monkeypatch.setattr(bench, "SAMPLE", 0.0)
    for name, contender in bench.CONTENDERS.items():

        class Counting(contender.kind):  # type: ignore[name-defined, misc]
            def step(self, closure: Any = None) -> Any:
                made[[x for x, _ in made].index(self)][1].append(1)
                return super().step(closure)

        def new(params: Any, kind: Any = Counting, **arguments: Any) -> Any:
            made.append((kind(params, **arguments), []))
            return made[-1][0]

        monkeypatch.setitem(bench.CONTENDERS, name, contender._replace(kind=new))
    bench.rows("a", [(5, 4)], torch.device("cpu"), 0)
    assert [len(calls) >= 3 + bench.MIN_ROUNDS for _, calls in made] == [True] * len(bench.CONTENDERS)
    assert len({id(optimizer.param_groups[0]["params"][0]) for optimizer, _ in made}) == 1
    assert [optimizer.param_groups[0].get("fused") for optimizer, _ in made] == [True, None, None, True, None]


def rows(*ratios: float, high: float = 1.0) -> list[dict[str, Any]]:
    return [{"optimizer": "SOFIM", "ratio": ratio, "low": 1.0, "high": high} for ratio in ratios]


@pytest.mark.parametrize(
    ("timed", "text"),
    [
        (rows(0.5), "SOFIM is faster than SGD here: 0.50 times its step."),
        (rows(0.5, 0.9), "SOFIM is faster than SGD here: 0.50 to 0.90 times its step."),
        (rows(0.96, 1.04), "SOFIM is about as fast as SGD here: 0.96 to 1.04 times its step."),
        (rows(0.5, 1.04), "SOFIM is faster than or as fast as SGD here: 0.50 to 1.04 times its step."),
        (rows(0.96, 1.2), "SOFIM is as fast as or slower than SGD here: 0.96 to 1.20 times its step."),
        (rows(1.2, 3.0), "SOFIM is slower than SGD here: 1.20 to 3.00 times its step."),
        (rows(0.5, 3.0), "SOFIM is faster or slower, depending on the model, than SGD here: 0.50 to 3.00 times its s"),
        (rows(0.5, high=1.7), "Times of one optimizer varied by a factor of 1.7: other programs were running."),
    ],
)  # fmt: skip
def test_verdicts(timed: list[dict[str, Any]], text: str) -> None:
    said = bench.verdict(timed, torch.device("cpu"))
    assert any(line.startswith(text) for line in said), said
    assert any("varied" in line for line in said) == (timed[0]["high"] > bench.BUSY)


def test_the_verdict_without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_loaded", lambda: GONE)
    monkeypatch.setattr("sofim_fused.backends._WARNED", {"cpu"})
    said = bench.verdict(rows(9.0), torch.device("cpu"))
    assert said[0] == "SOFIM's backend on cpu is reference."
    assert said[-1] == f"It runs in pure PyTorch, many times slower than its native kernels: {native.remedy()}"


@pytest.mark.parametrize("device", ["meta", "nonsense"])
def test_a_device_that_is_not_there(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["bench", "--device", device])
    assert f"--device {device}: there is none here" in capsys.readouterr().err


def test_the_package_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "sofim_fused", "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in command.COMMANDS)
