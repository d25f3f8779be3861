"""`examples.finetune`, on a text of its own, and what `examples.train` writes for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples import finetune, train


def test_both_optimizers_learn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "validation", "test"):
        (tmp_path / f"{part}.txt").write_text("To be, or not to be: that is the question.\n" * 50)
    size = ["--steps", "20", "--batch", "4", "--context", "16", "--layers", "1", "--width", "32", "--lr", "0.02"]
    assert finetune.main(["--root", str(tmp_path), "--out", str(tmp_path / "out"), *size]) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "finetune.json").read_text())
    ours, adamw = content["runs"]
    assert (ours["name"], adamw["name"]) == ("adasofim", "adamw")
    for run in (ours, adamw):
        steps, losses = zip(*run["curve"], strict=True)
        assert steps == tuple(range(0, 21, 2))
        assert losses[-1] < 0.8 * losses[0]
        assert run["tokens_per_second"] > 0
        assert f"{losses[-1]:.4f}" in printed
    assert ours["curve"][0] == adamw["curve"][0]  # the same weights
    assert ours["state_mb"] < 0.65 * adamw["state_mb"]
    assert (tmp_path / "out" / "finetune.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))


def test_tensorboard(tmp_path: Path) -> None:
    """The numbers of history.json, and SOFIM's own; the training is the same as without."""
    common = ["--epochs", "2", "--batch-size", "256", "--optimizer", "sofim"]
    assert train.main([*common, "--out", str(tmp_path / "plain")]) == 0
    assert train.main([*common, "--out", str(tmp_path / "shown"), "--tensorboard"]) == 0
    plain, shown = (
        json.loads((tmp_path / out / "history.json").read_text())["runs"]["sofim"] for out in ("plain", "shown")
    )
    (file,) = (tmp_path / "shown" / "tensorboard" / "sofim").iterdir()
    events = EventAccumulator(str(file))
    events.Reload()
    for name in ("train_loss", "test_loss", "test_accuracy"):
        losses = [row[name] for row in plain["history"]]
        assert [row[name] for row in shown["history"]] == losses
        assert [event.value for event in events.Scalars(name)] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("sofim/grad_norm")] == [1, 2]
    assert {"step_ms", "seconds", "sofim/lr", "sofim/rho", "sofim/skipped_steps"} <= set(events.Tags()["scalars"])
