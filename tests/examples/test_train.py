"""`examples.train`, run in-process on the digits."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.optim import SGD, Optimizer

from examples import data, train
from examples.models import LeNet5
from sofim_fused import SOFIM, AdaSOFIM
from tests.examples.support import assert_equal, checkpoint, history

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--batch-size", "256")  # six steps an epoch


def run(out: Path, *options: str) -> int:
    return train.main([*QUICK, "--out", str(out), *options])


@pytest.fixture(scope="module")
def three_epochs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("uninterrupted")
    assert run(out, "--epochs", "3") == 0
    return checkpoint(out)


# What a run leaves behind


def test_run_writes_plot_history_and_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # a log has no width that the table should be squeezed to
    out = tmp_path / "deep" / "folder"
    assert train.main(["--epochs", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr()

    assert (out / "history.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = matplotlib.image.imread(out / "history.png")
    assert image.shape[0] > 400
    assert image.shape[1] > 1000
    assert image.std() > 0.05

    content = history(out)
    assert content["settings"]["data"] == "digits"
    assert content["settings"]["epochs"] == 3
    assert content["settings"]["batch_size"] == train.DEFAULTS["digits"].batch_size
    assert list(content["runs"]) == ["sofim", "sgd", "adasofim", "adamw"]
    for name, kept in content["runs"].items():
        assert kept["diverged_in"] is None
        assert kept["state_bytes"] >= 4 * 61_706
        assert [row["epoch"] for row in kept["history"]] == [1, 2, 3]
        losses = [row["train_loss"] for row in kept["history"]]
        assert losses == sorted(losses, reverse=True)
        assert kept["history"][-1]["test_accuracy"] > 0.85
        for row in kept["history"]:
            cells = (
                f"{row['epoch']}",
                f"{row['train_loss']:.4f}",
                f"{row['test_loss']:.4f}",
                f"{100 * row['test_accuracy']:.2f}",
                f"{row['seconds']:.2f}",
                f"{row['step_ms']:.3f}",
            )
            rows = [line.split() for line in printed.out.splitlines()]
            assert any(line[:7] == [train.LABELS[name], *cells] for line in rows)
            assert 0 < row["step_ms"] < 1000 * row["seconds"]

    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.pt",
        "history.json",
        "history.png",
    ]
    assert f"written: {out / 'history.png'}\n" in printed.out
    assert printed.err == ""


def test_log_is_plain_and_states_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--epochs", "12", "--optimizer", "sgd", "--seed", "5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("LeNet-5 on digits: 1,437 training images, 360 test images")
    words = [line.split() for line in lines]
    defaults = train.DEFAULTS["digits"]
    for stated in (
        ["data", "digits"],
        ["optimizers", "sgd"],
        ["epochs", "12"],
        ["batch", "size", "256"],
        ["seed", "5"],
        ["lr", str(defaults.lr)],
        ["momentum", str(defaults.momentum)],
        ["rho", str(defaults.rho)],
        ["sgd", "lr", str(defaults.sgd_lr)],
        ["ada", "lr", str(defaults.ada_lr)],
        ["adamw", "lr", str(defaults.adamw_lr)],
        ["threads", "1"],
        ["sgd", "momentum", "0.9"],
    ):
        assert stated in words
    assert not any("\x1b" in line or "\r" in line for line in lines)
    assert not any("72/72" in line for line in lines)  # the progress bar
    assert sum("epoch" in line and "loss" in line and "test" in line for line in lines) == 10
    assert max(map(len, (line for line in lines if str(tmp_path) not in line))) <= 110


def test_terminal_gets_a_progress_bar_instead_of_lines(tmp_path: Path) -> None:
    options = [*QUICK, "--optimizer", "sgd", "--out", str(tmp_path)]
    assert train.main([*options, "--epochs", "1"]) == 0
    settings, out, _ = train.parse([*options, "--epochs", "2"])
    screen = io.StringIO()
    train.train(settings, out, True, Console(file=screen, force_terminal=True, width=80))
    assert "12/12" in screen.getvalue()  # batches, those of the epoch done before among them
    assert "epoch   2:" not in screen.getvalue()


def test_losses_are_means_over_all_images(tmp_path: Path) -> None:
    assert run(tmp_path, "--epochs", "1", "--optimizer", "sgd", "--sgd-lr", "0") == 0
    row = history(tmp_path)["runs"]["sgd"]["history"][0]
    images = data.load("digits")
    model = LeNet5(1, 10)
    model.load_state_dict(checkpoint(tmp_path)["runs"]["sgd"]["model"])
    with torch.no_grad():
        logits = model(images.test_images)
        wanted = nn.functional.cross_entropy(logits, images.test_labels).item()
        train_logits = model(images.train_images)
        train_wanted = nn.functional.cross_entropy(train_logits, images.train_labels).item()
    assert row["train_loss"] == pytest.approx(train_wanted, rel=1e-6)
    assert row["test_loss"] == pytest.approx(wanted, rel=1e-6)
    assert row["test_accuracy"] * 360 == pytest.approx((logits.argmax(1) == images.test_labels).sum().item())


def test_evaluation_takes_every_batch_and_no_dropout() -> None:
    images = data.load("digits")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.9), LeNet5(1, 10))
    loss, accuracy = train.evaluate(model, images.train_images, images.train_labels)  # 2 batches
    with torch.no_grad():
        logits = model[1](images.train_images)
    wanted = nn.functional.cross_entropy(logits, images.train_labels).item()
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert accuracy * 1437 == pytest.approx((logits.argmax(1) == images.train_labels).sum().item())


def test_one_optimizer_alone_gives_what_it_gives_beside_others(tmp_path: Path, three_epochs: dict[str, Any]) -> None:
    for name in train.LABELS:
        assert run(tmp_path / name, "--epochs", "3", "--optimizer", name) == 0
        alone = checkpoint(tmp_path / name)
        assert list(alone["runs"]) == [name]
        assert list(history(tmp_path / name)["runs"]) == [name]
        assert_equal(alone["runs"][name], three_epochs["runs"][name])


def test_optimizers_are_what_the_settings_say(tmp_path: Path) -> None:
    options = ["--lr", "0.25", "--momentum", "0.8", "--rho", "2", "--sgd-lr", "0.125", "--ada-lr", "0.5"]
    options += ["--adamw-lr", "0.75"]
    settings, out, resume = train.parse([*options, "--out", str(tmp_path)])
    assert (out, resume) == (tmp_path, False)
    params = [nn.Parameter(torch.zeros(2))]
    sofim = train.new_optimizer("sofim", params, settings)
    assert isinstance(sofim, SOFIM)
    wanted = {"lr": 0.25, "momentum": 0.8, "rho": 2.0}
    assert {key: sofim.param_groups[0][key] for key in wanted} == wanted
    sgd = train.new_optimizer("sgd", params, settings)
    assert isinstance(sgd, SGD)
    wanted = {"lr": 0.125, "momentum": 0.9, "dampening": 0, "weight_decay": 0}
    assert {key: sgd.param_groups[0][key] for key in wanted} == wanted
    ada = train.new_optimizer("adasofim", params, settings)
    assert isinstance(ada, AdaSOFIM)
    assert (ada.param_groups[0]["lr"], ada.param_groups[0]["diagonal"]) == (0.5, "factored")
    adamw = train.new_optimizer("adamw", params, settings)
    assert type(adamw) is torch.optim.AdamW
    assert adamw.param_groups[0]["lr"] == 0.75


@pytest.mark.parametrize("name", train.DEFAULTS)
def test_defaults_by_data_set(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings, out, _ = train.parse(["--data", name])
    defaults = train.DEFAULTS[name]
    assert out == Path("runs") / name
    assert {field: getattr(settings, field) for field in defaults._fields} == defaults._asdict()
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert caught.value.code == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name, *map(str, defaults)] in lines


# Same start, same batches


def test_all_optimizers_start_alike_and_see_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def always_sgd(_: str, params: Iterable[nn.Parameter], __: train.Settings) -> Optimizer:
        return SGD(params, lr=0.02, momentum=0.9)

    monkeypatch.setattr(train, "new_optimizer", always_sgd)
    assert run(tmp_path, "--epochs", "2") == 0
    runs = checkpoint(tmp_path)["runs"]
    assert_equal(runs["sofim"], runs["sgd"])
    assert_equal(runs["adasofim"], runs["sgd"])
    assert_equal(runs["adamw"], runs["sgd"])


def test_batch_order_is_a_function_of_seed_and_epoch() -> None:
    orders = [train.batch_order(seed, epoch, 50) for seed in (0, 1) for epoch in (1, 2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(50))
    assert len({tuple(order.tolist()) for order in orders}) == 4
    torch.manual_seed(3)
    assert torch.equal(train.batch_order(1, 2, 50), orders[3])


def test_initial_weights_are_a_function_of_the_seed() -> None:
    images = data.load("digits")
    vectors: list[torch.Tensor] = []
    for seed in ("0", "1"):
        settings, _, _ = train.parse(["--seed", seed])
        for name in ("sofim", "adasofim"):
            torch.manual_seed(len(vectors))
            model = train.new_run(name, settings, images, torch.device("cpu")).model
            vectors.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(vectors[0], vectors[1])
    assert torch.equal(vectors[2], vectors[3])
    assert not torch.equal(vectors[0], vectors[2])


def test_seed_determines_everything(tmp_path: Path, three_epochs: dict[str, Any]) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert run(tmp_path / "same", "--epochs", "3") == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(checkpoint(tmp_path / "same"), three_epochs)
    assert run(tmp_path / "other", "--epochs", "1", "--seed", "1") == 0
    other = checkpoint(tmp_path / "other")["runs"]["sgd"]["history"][0]
    assert other["train_loss"] != three_epochs["runs"]["sgd"]["history"][0]["train_loss"]


def test_lenet5_has_the_paper_s_size() -> None:
    assert sum(param.numel() for param in LeNet5(1, 10).parameters()) == 61_706
    assert LeNet5(3, 100)(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


# Resuming


def test_resumed_run_equals_uninterrupted_run(
    tmp_path: Path, three_epochs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--epochs", "1") == 0
    assert run(tmp_path, "--epochs", "3", "--resume") == 0
    assert_equal(checkpoint(tmp_path), three_epochs)
    rows = history(tmp_path)["runs"]["sofim"]["history"]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    before = (tmp_path / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert run(tmp_path, "--epochs", "3", "--resume") == 0
    assert "SGD-momentum" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("victim", "step", "done"),
    [("sofim", 1, [0, 0, 0, 0]), ("sofim", 15, [2, 0, 0, 0]), ("sgd", 1, [3, 0, 0, 0]), ("adasofim", 12, [3, 3, 1, 0])],
)
def test_interrupted_epoch_is_all_that_is_lost(
    tmp_path: Path,
    three_epochs: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    victim: str,
    step: int,
    done: list[int],
) -> None:
    new_optimizer = train.new_optimizer

    def interrupted(name: str, params: Iterable[nn.Parameter], settings: train.Settings) -> Optimizer:
        optimizer = new_optimizer(name, params, settings)
        steps = 0

        def count(*_: object) -> None:
            nonlocal steps
            steps += 1
            if steps == step:
                raise KeyboardInterrupt

        if name == victim:
            optimizer.register_step_post_hook(count)
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "new_optimizer", interrupted)
        assert run(tmp_path, "--epochs", "3") == 130
    error = capsys.readouterr().err
    assert error == "interrupted: --resume goes on after the last whole epoch\n"
    if not any(done):
        assert not (tmp_path / "checkpoint.pt").exists()
        return
    runs = checkpoint(tmp_path)["runs"]
    assert [runs[name]["epochs_done"] for name in train.LABELS] == done
    assert run(tmp_path, "--epochs", "3", "--resume") == 0
    assert_equal(checkpoint(tmp_path), three_epochs)


def test_killed_process_is_resumed(tmp_path: Path) -> None:
    options = ["--optimizer", "sgd", *QUICK]
    killed = tmp_path / "killed"
    # As a file, and from another folder than the repository's root.
    command = [sys.executable, str(ROOT / "examples" / "train.py"), *options]
    command += ["--epochs", "100000", "--out", str(killed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        limit = time.monotonic() + 60
        while not (killed / "checkpoint.pt").exists():
            assert process.poll() is None, process.communicate()[0].decode()
            assert time.monotonic() < limit
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = checkpoint(killed)["runs"]["sgd"]["epochs_done"]
    assert done >= 1
    epochs = ["--epochs", str(done + 1)]
    assert train.main([*options, *epochs, "--out", str(killed), "--resume"]) == 0
    assert train.main([*options, *epochs, "--out", str(tmp_path / "whole")]) == 0
    assert_equal(checkpoint(killed), checkpoint(tmp_path / "whole"))


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with train.replacing(path) as file:
        file.write(b"old")
        assert not path.exists()

    def fail() -> None:
        with train.replacing(path) as file:
            file.write(b"new")
            file.flush()
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--seed", "1"], "seed was 0 and is 1 now"),
        (["--lr", "0.125"], "; lr was {lr} and is 0.125 now"),
        (["--momentum", "0.5"], "momentum was 0.9 and is 0.5 now"),
        (["--rho", "7"], "rho was {rho} and is 7.0 now"),
        (["--sgd-lr", "0.5"], "sgd_lr was {sgd_lr} and is 0.5 now"),
        (["--ada-lr", "0.5"], "ada_lr was {ada_lr} and is 0.5 now"),
        (["--adamw-lr", "0.5"], "adamw_lr was {adamw_lr} and is 0.5 now"),
        (["--threads", "2"], "threads was 1 and is 2 now"),
        (["--batch-size", "128"], "batch_size was 256 and is 128 now"),
        (["--optimizer", "sgd"], "optimizers was ['sofim', 'sgd', 'adasofim', 'adamw'] and is ['sgd'] now"),
        (["--data", "svhn"], "data was 'digits' and is 'svhn' now"),
        (["--root", "images"], "root was None and is 'images' now"),
        (["--device", "cuda"], "device was 'cpu' and is 'cuda' now"),
        (["--epochs", "1"], "is 2 epochs old already, not 1"),
    ],
)
def test_resuming_with_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], problem: str
) -> None:
    # Only the settings are looked at before the error, so that a bare checkpoint will do.
    settings, _, _ = train.parse([*QUICK, "--epochs", "2", "--device", "cpu"])
    content = {"settings": vars(settings), "runs": {"sofim": {"epochs_done": 2}}}
    train.write_sealed(tmp_path / "checkpoint.pt", content)
    arguments = ["--epochs", "2", "--device", "cpu", *options, "--resume"]
    expected = problem.lstrip("; ").format(**vars(settings))
    assert run(tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --resume: {tmp_path / 'checkpoint.pt'} ")
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 half an archive", None])
def test_resuming_from_a_damaged_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    path = tmp_path / "checkpoint.pt"
    if content is None:
        train.write_sealed(path, {"something": "else"})
    else:
        path.write_bytes(content)
    assert run(tmp_path, "--resume") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --resume: {path} is no readable checkpoint (")
    assert error.count("\n") == 1


# Divergence


@pytest.mark.parametrize("batch_size", ["256", "2000"], ids=["while training", "while testing"])
def test_divergence_is_reported(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: str,
) -> None:
    # With one batch an epoch the loss is still finite when the weights no longer are.
    options = ["--epochs", "2", "--sgd-lr", "1e38", "--batch-size", batch_size]
    assert run(tmp_path, *options) == 0
    output = capsys.readouterr().out
    assert ["SGD-momentum", "1", "-", "-", "-", "-", "-", "diverged"] in [line.split() for line in output.splitlines()]
    runs = history(tmp_path)["runs"]
    assert (runs["sgd"]["history"], runs["sgd"]["diverged_in"]) == ([], 1)
    assert len(runs["sofim"]["history"]) == 2
    assert runs["sofim"]["diverged_in"] is None
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
    # It stays so, and no time is spent on it again.
    monkeypatch.setattr(train, "run_epoch", None)
    assert run(tmp_path, *options, "--resume") == 0
    assert history(tmp_path)["runs"]["sgd"] == runs["sgd"]


def test_divergence_ends_the_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Optimizer] = []
    new_optimizer = train.new_optimizer

    def counted(name: str, params: Iterable[nn.Parameter], settings: train.Settings) -> Optimizer:
        optimizer = new_optimizer(name, params, settings)
        optimizer.register_step_post_hook(lambda *_: steps.append(optimizer))
        return optimizer

    monkeypatch.setattr(train, "new_optimizer", counted)
    assert run(tmp_path, "--epochs", "5", "--optimizer", "sgd", "--sgd-lr", "1e38") == 0
    assert len(steps) == 1


# Errors


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--data", "mnist"], "argument --data: invalid choice: 'mnist'"),
        (["--data", "cifar10", "--root", "{tmp}/no"], "cifar10: no folder {tmp}/no"),
        (["--data", "svhn", "--root", "{tmp}"], "svhn: no file named train_32x32.mat in {tmp}"),
        (["--root", "{tmp}"], "digits is part of scikit-learn and takes no root"),
        (["--resume", "--out", "{tmp}/new"], "--resume: no checkpoint {tmp}/new/checkpoint.pt"),
        (["--out", "{tmp}/file"], "--out {tmp}/file: File exists"),
        (["--out", "{tmp}/file/sub"], "--out {tmp}/file/sub: Not a directory"),
        (["--device", "abacus"], "--device abacus: expected cpu, cuda or cuda:N"),
        (["--device", "meta"], "--device meta: expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99: PyTorch sees "),
        (["--optimizer", "adam"], "argument --optimizer: invalid choice: 'adam'"),
        (["--epochs", "0"], "argument --epochs: '0' is no whole number from 1 on"),
        (["--batch-size", "2.5"], "argument --batch-size: '2.5' is no whole number from 1 on"),
        (["--seed", "-1"], "argument --seed: '-1' is no whole number from 0 on"),
        (["--lr", "nan"], "argument --lr: 'nan' is no finite number from 0 on"),
        (["--lr", "inf"], "argument --lr: 'inf' is no finite number from 0 on"),
        (["--sgd-lr", "-0.1"], "argument --sgd-lr: '-0.1' is no finite number from 0 on"),
        (["--threads", "-1"], "argument --threads: '-1' is no whole number from 0 on"),
        (["--ada-lr", "x"], "argument --ada-lr: 'x' is no finite number from 0 on"),
        (["--momentum", "1"], "argument --momentum: '1' is no finite number from 0 on and below 1"),
        (["--rho", "0"], "argument --rho: '0' is not above 0"),
        (["--rho", "much"], "argument --rho: 'much' is no finite number from 0 on"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
    ],
)
def test_errors_of_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], problem: str
) -> None:
    (tmp_path / "file").touch()
    arguments = [option.format(tmp=tmp_path) for option in options]
    assert train.main(["--out", str(tmp_path / "out"), "--epochs", "1", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: " + problem.format(tmp=tmp_path))
    assert printed.err.count("\n") == 1
    assert printed.out == ""


# Times


def test_step_time_is_that_of_the_step_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowNetwork(LeNet5):
        def __init__(self, channels: int, classes: int) -> None:
            super().__init__(channels, classes)
            self.register_forward_pre_hook(lambda *_: time.sleep(0.1 if self.training else 0))

    class SlowStep(SGD):
        def step(self, closure: Any = None) -> Any:
            time.sleep(0.05)
            return super().step(closure)

    def slow_step(_: str, params: Iterable[nn.Parameter], __: train.Settings) -> Optimizer:
        return SlowStep(params, lr=0.01)

    monkeypatch.setattr(train, "LeNet5", SlowNetwork)
    monkeypatch.setattr(train, "new_optimizer", slow_step)
    assert run(tmp_path, "--epochs", "1", "--optimizer", "sgd") == 0
    row = history(tmp_path)["runs"]["sgd"]["history"][0]
    assert 50 <= row["step_ms"] < 100
    assert row["seconds"] >= 6 * 0.15


# Table


def rows(accuracies: Sequence[float]) -> list[train.Row]:
    return [
        train.Row(
            epoch=epoch,
            train_loss=1.0,
            test_loss=1.0,
            test_accuracy=accuracy,
            seconds=1.0,
            step_ms=1.0,
        )
        for epoch, accuracy in enumerate(accuracies, 1)
    ]


def test_short_history_is_shown_whole() -> None:
    few = rows([0.1] * 10)
    assert train.shown(few) == few
    assert train.shown([]) == []


def test_long_history_is_shown_in_part() -> None:
    many = rows([0.5] * 32 + [0.9] + [0.5] * 6 + [0.9])
    assert [row["epoch"] for row in train.shown(many)] == [1, 8, 16, 24, 32, 33, 40]
    remarks = [train.remark(row, many) for row in train.shown(many)]
    assert remarks == ["", "", "", "", "", "best", "last"]
    assert train.remark(many[0], many[:1]) == "best, last"


def test_the_plot_shows_every_epoch_and_what_steps_take() -> None:
    settings, _, _ = train.parse([])
    runs = []
    for name, accuracies in (("sgd", (0.1, 0.9, 0.8)), ("adamw", (0.5, 0.7, 0.95))):
        model = LeNet5(1, 10)
        optimizer = train.new_optimizer(name, model.parameters(), settings)
        model(torch.zeros(1, 1, 32, 32)).sum().backward()
        optimizer.step()
        runs.append(train.Run(name, model, optimizer, rows(accuracies)))
    losses, accuracy, times, memory = train.plot(settings, runs).axes
    for axes, bounds in ((losses, (1, 1)), (accuracy, (10, 95)), (times, (1, 1))):
        assert axes.get_ylim()[0] <= bounds[0]
        assert axes.get_ylim()[1] >= bounds[1]
        assert all(list(line.get_xdata()) == [1, 2, 3] for line in axes.lines)
    assert [bar.get_width() for bar in memory.patches] == [run.state_bytes / 1e6 for run in runs]
    assert runs[1].state_bytes > 1.9 * runs[0].state_bytes


def test_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits take one; 0 leaves the number as it is."""
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for options in ([], ["--threads", "3"], ["--threads", "0"]):
        assert run(tmp_path, "--epochs", "1", "--optimizer", "sgd", *options) == 0
    assert asked == [1, 3]


def test_tensorboard_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make clients` runs it with TensorBoard."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(tmp_path, "--epochs", "1", "--tensorboard") == 2
    assert capsys.readouterr().err == "error: --tensorboard: the package is missing: pip install tensorboard\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("epochs", "lines"), [(1, 1), (7, 7), (10, 10), (11, 10), (300, 10)])
def test_log_has_ten_lines_at_most(epochs: int, lines: int) -> None:
    milestones = [epoch for epoch in range(1, epochs + 1) if train.is_milestone(epoch, epochs)]
    assert len(milestones) == lines
    assert milestones[-1] == epochs
