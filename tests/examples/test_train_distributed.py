"""`examples.train_distributed`: the same losses however many ranks there are, and checkpoints between them."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from bench.ranks import Ranks
from examples import train_distributed
from tests.support.runs import EMULATED, INTERPRETED

pytestmark = [
    pytest.mark.skipif(EMULATED or INTERPRETED, reason="processes of their own have no stand-ins"),
    pytest.mark.skipif(not distributed.is_available(), reason="PyTorch was built without torch.distributed"),
]

ROOT = Path(__file__).parents[2]
QUICK = ("--batch-size", "128")


def on_two_ranks(*options: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "examples.train_distributed", *QUICK, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout


def losses(text: str) -> dict[int, float]:
    """By epoch."""
    lines = [line for line in text.splitlines() if line.startswith("epoch")]
    return {int(line.split()[1].rstrip(":")): float(line.split()[3].rstrip(",")) for line in lines}


def test_shards_and_one_process_go_on_from_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_distributed.main([*QUICK, "--epochs", "3", "--out", str(tmp_path / "alone")]) == 0
    expected = losses(capsys.readouterr().out)
    assert list(expected) == [1, 2, 3]
    out = ("--out", str(tmp_path / "ranks"))
    text = on_two_ranks("--epochs", "2", *out)
    assert "2 ranks, fsdp: rank 0 keeps 30,853 of 61,706 moments" in text
    assert losses(text) == pytest.approx({epoch: expected[epoch] for epoch in (1, 2)}, rel=1e-4)
    assert train_distributed.main([*QUICK, "--epochs", "3", *out, "--resume"]) == 0
    assert losses(capsys.readouterr().out) == pytest.approx({3: expected[3]}, rel=1e-4)


def trained(rank: int, *options: str) -> str:
    """What training prints on a rank, one of two."""
    parsed = train_distributed._parser().parse_args([*QUICK, *options])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train_distributed.train(parsed, rank, 2, torch.device("cpu"))
    return out.getvalue()


def test_sharded_state_goes_on(tmp_path: Path) -> None:
    """ZeRO: the optimizer's state is gathered, saved, and spread again."""
    zero = ("--mode", "zero", "--out", str(tmp_path / "parts"))
    with Ranks(2) as ranks:
        whole = ranks.run(trained, "--mode", "zero", "--epochs", "2", "--out", str(tmp_path / "whole"))[0]
        ranks.run(trained, *zero, "--epochs", "1")
        text = ranks.run(trained, *zero, "--epochs", "2", "--resume")[0]
    assert losses(text) == {2: losses(whole)[2]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "33"], "--batch-size 33: 2 ranks cannot share it equally"),
        (["--replicas", "3"], "--replicas 3: 2 ranks cannot hold as many copies"),
        (["--root", "/nowhere", "--data", "cifar10"], "/nowhere"),
    ],
)
def test_what_a_user_must_put_right(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # without a RANK no process group is made
    assert train_distributed.main([*options, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_resuming_from_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_distributed.main(["--out", str(tmp_path), "--resume"]) == 2
    assert "no checkpoint in" in capsys.readouterr().err
    (tmp_path / "last").write_text("3 whole")
    assert train_distributed.main(["--out", str(tmp_path), "--resume"]) == 2
    assert "is whole; --mode zero writes whole ones" in capsys.readouterr().err
