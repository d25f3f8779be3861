"""Train LeNet-5 with SOFIM, SGD-momentum, AdaSOFIM and AdamW from the same initial weights, and compare them.

Run it from the repository root:

    python -m examples.train --data digits
    python examples/train.py --data fashion-mnist --epochs 10

All optimizers start from the same weights and see the same batches in the same order. The run
writes checkpoint.pt (after every epoch), history.json and history.png (losses, accuracies, times of
steps, memory), and prints a table; with --tensorboard also files for TensorBoard.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, TypedDict

if not __package__:  # run as a file: Python put this folder, not the repository root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer

from examples import data as image_data
from examples.data import ImageData
from examples.models import LeNet5
from sofim_fused import SOFIM, AdaSOFIM
from sofim_fused.integrations.metrics import metrics

SGD_MOMENTUM = 0.9
LABELS = {"sofim": "SOFIM", "sgd": "SGD-momentum", "adasofim": "AdaSOFIM", "adamw": "AdamW"}
EVALUATION_BATCH = 1000
DIGEST = 64  # characters
LOG_WIDTH = 110
"""Columns where stdout is no terminal: wide enough that no row of the table is wrapped."""


class Defaults(NamedTuple):
    """What a data set is trained with unless the command line says otherwise."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    rho: float
    sgd_lr: float
    ada_lr: float
    adamw_lr: float
    threads: int


# digits: the best of 12 configurations each on validation images, ten seeds each
# (bench/demo_defaults.py). fashion-mnist: from a coarse search by training loss. The others take
# these values over, untuned. AdaSOFIM has its own default there. AdamW's rate is the one that the
# comparison of optimizers chose for these two (docs/convergence.md). Threads: 0 leaves their number to
# PyTorch; on images as few as the digits a second thread mostly waits.
DEFAULTS = {
    "digits": Defaults(25, 32, 0.2, 0.9, 1.0, 0.015, 0.003, 0.004, 1),
    "fashion-mnist": Defaults(6, 100, 0.5, 0.9, 1.0, 0.03, 0.004, 0.004, 0),
    "cifar10": Defaults(20, 100, 0.5, 0.9, 1.0, 0.03, 0.004, 0.004, 0),
    "cifar100": Defaults(20, 100, 0.5, 0.9, 1.0, 0.03, 0.004, 0.004, 0),
    "svhn": Defaults(10, 100, 0.5, 0.9, 1.0, 0.03, 0.004, 0.004, 0),
}


class UserError(Exception):
    """Something that the user can put right; shown as one line."""


@dataclass(frozen=True)
class Settings:
    """Everything that a run's numbers depend on."""

    data: str
    root: str | None
    device: str
    optimizers: list[str]
    epochs: int
    batch_size: int
    seed: int
    lr: float
    momentum: float
    rho: float
    sgd_lr: float
    ada_lr: float
    adamw_lr: float
    threads: int
    tensorboard: bool = False


class Row(TypedDict):
    """One epoch of one optimizer. Losses are mean cross-entropies in nats, accuracy is a fraction.

    The training loss is the mean over the epoch's batches, each taken before its update. `seconds`
    is the training pass alone; `step_ms` the mean time of `optimizer.step()` alone.
    """

    epoch: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    seconds: float
    step_ms: float


@dataclass
class Run:
    """One optimizer's training: its network, its state, and the rows of the epochs done."""

    name: str
    model: nn.Module
    optimizer: Optimizer
    history: list[Row] = field(default_factory=list)
    diverged_in: int | None = None

    @property
    def state_bytes(self) -> int:
        """What the optimizer keeps from one step to the next."""
        kept = (value for entry in self.optimizer.state.values() for value in entry.values())
        return sum(value.nbytes for value in kept if isinstance(value, Tensor))

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, in types that `torch.load(weights_only=True)` reads."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epochs_done": len(self.history),
            "history": self.history,
            "diverged_in": self.diverged_in,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = list(state["history"])
        self.diverged_in = state["diverged_in"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's); return the exit code.

    0: done, 2: the user must put something right (one line on stderr says what), 130: interrupted.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    try:
        settings, out, resume = parse(argv)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        train(settings, out, resume, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: --resume goes on after the last whole epoch", file=sys.stderr)
        return 130
    return 0


def train(settings: Settings, out: Path, resume: bool, console: Console) -> None:
    """Load the data, train with each optimizer, and report.

    Raises:
        UserError: the data, the device, the output folder or the checkpoint cannot be used.
    """
    checkpoint = out / "checkpoint.pt"
    saved = read_checkpoint(checkpoint, settings) if resume else None
    device = usable_device(settings.device)
    data = load_data(settings)
    make_folder(out)
    introduce(settings, data, console)
    data = data.to(device)
    runs = [new_run(name, settings, data, device) for name in settings.optimizers]
    tell = {run.name: writer(run, out) for run in runs} if settings.tensorboard else {}
    if saved is not None:
        for run in runs:
            run.restore(saved["runs"][run.name])

    def save() -> None:
        write_checkpoint(checkpoint, settings, runs)

    # The fastest convolutions on CUDA add up in an order that changes from run to run.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for run in runs:
            fit(run, data, settings, save, console, tell.get(run.name))
    report(settings, runs, out, console)


# Command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def parse(argv: Sequence[str] | None) -> tuple[Settings, Path, bool]:
    """The settings, the output folder, and whether to resume."""
    options = _parser().parse_args(argv)
    for name, value in DEFAULTS[options.data]._asdict().items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    settings = Settings(
        data=options.data,
        root=None if options.root is None else str(options.root),
        device=options.device,
        optimizers=list(LABELS) if options.optimizer == "all" else [options.optimizer],
        epochs=options.epochs,
        batch_size=options.batch_size,
        seed=options.seed,
        lr=options.lr,
        momentum=options.momentum,
        rho=options.rho,
        sgd_lr=options.sgd_lr,
        ada_lr=options.ada_lr,
        adamw_lr=options.adamw_lr,
        threads=options.threads,
        tensorboard=options.tensorboard,
    )
    return settings, options.out or Path("runs") / options.data, options.resume


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m examples.train",
        description="Train LeNet-5 with SOFIM, SGD-momentum, AdaSOFIM and AdamW from the same initial weights"
        " and on the same batches.",
        epilog=f"defaults by data set (digits comes with scikit-learn):\n\n{_defaults_table()}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    by_data = "(default: see below)"
    add("--data", choices=image_data.NAMES, default="digits", help="data set (default: digits)")
    roots = "/usr/share/datasets/fashion-mnist; data/<data> for cifar10, cifar100 and svhn"
    add("--root", type=Path, metavar="DIR", help=f"folder of the data's files (default: {roots})")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"device to train on (default: cuda if available; here {device})")
    add("--optimizer", choices=[*LABELS, "all"], default="all", help="optimizers to train with (default: all)")
    add("--epochs", type=_whole(1), metavar="N", help=f"epochs {by_data}")
    add("--batch-size", type=_whole(1), metavar="N", help=f"images per step {by_data}")
    seeded = "determines initial weights and batch order (default: 0)"
    add("--seed", type=_whole(0), default=0, metavar="N", help=seeded)
    add("--lr", type=_real(0), metavar="X", help=f"SOFIM's learning rate {by_data}")
    add("--momentum", type=_real(0, below=1), metavar="X", help=f"SOFIM's momentum {by_data}")
    add("--rho", type=_positive, metavar="X", help=f"SOFIM's regularization {by_data}")
    sgd = f"learning rate of SGD with momentum {SGD_MOMENTUM} {by_data}"
    add("--sgd-lr", type=_real(0), metavar="X", help=sgd)
    add("--ada-lr", type=_real(0), metavar="X", help=f"learning rate of AdaSOFIM {by_data}")
    add("--adamw-lr", type=_real(0), metavar="X", help=f"learning rate of AdamW {by_data}")
    add("--threads", type=_whole(0), metavar="N", help=f"threads on a CPU; 0: as many as PyTorch likes {by_data}")
    add("--tensorboard", action="store_true", help="also write losses, times and SOFIM's numbers for TensorBoard")
    files = "checkpoint.pt, history.json and history.png, which are overwritten"
    add("--out", type=Path, metavar="DIR", help=f"folder for {files} (default: runs/<data>)")
    resume = "continue from the checkpoint in --out; only --epochs may differ from its settings"
    add("--resume", action="store_true", help=resume)
    return parser


def _defaults_table() -> str:
    columns = ["--" + name.replace("_", "-") for name in Defaults._fields]
    lines = [f"  {'--data':14}" + "".join(f"{column:>13}" for column in columns)]
    for name, defaults in DEFAULTS.items():
        lines.append(f"  {name:14}" + "".join(f"{value:>13}" for value in defaults))
    return "\n".join(lines)


def _whole(low: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} on")
        return value

    return convert


def _real(low: float, below: float = math.inf) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value < below:
            limit = "" if math.isinf(below) else f" and below {below}"
            raise argparse.ArgumentTypeError(f"{text!r} is no finite number from {low} on{limit}")
        return value

    return convert


def _positive(text: str) -> float:
    value = _real(0)(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


# Preparation


def usable_device(name: str) -> torch.device:
    """The device called `name`.

    Raises:
        UserError: it is neither a CPU nor a CUDA device, or there is none.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def load_data(settings: Settings) -> ImageData:
    """The data set on the CPU.

    Raises:
        UserError: its files are missing or malformed.
    """
    try:
        return image_data.load(settings.data, settings.root)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error


def make_folder(out: Path) -> None:
    """Create the output folder, before any time is spent on training.

    Raises:
        UserError: it cannot be created or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: no permission to write")


def introduce(settings: Settings, data: ImageData, console: Console) -> None:
    """Print the data set's size and every setting."""
    images, test_images = len(data.train_images), len(data.test_images)
    console.print(
        f"LeNet-5 on {data.name}: {images:,} training images, {test_images:,} test images,"
        f" {data.channels} channel(s), {data.classes} classes",
        highlight=False,
    )
    grid = Table.grid(padding=(0, 2))
    for name, value in asdict(settings).items():
        if value is None:  # only the folder of a data set that lies in its usual place
            continue
        text = ", ".join(value) if isinstance(value, list) else str(value)
        grid.add_row("  " + name.replace("_", " "), text)
    grid.add_row("  sgd momentum", str(SGD_MOMENTUM))
    console.print(grid)


def new_run(name: str, settings: Settings, data: ImageData, device: torch.device) -> Run:
    """An untrained network, the same for every optimizer, with the optimizer called `name`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = LeNet5(data.channels, data.classes)  # on the CPU: the same weights on every device
    model.to(device)
    return Run(name, model, new_optimizer(name, model.parameters(), settings))


def new_optimizer(name: str, params: Iterable[nn.Parameter], settings: Settings) -> Optimizer:
    """The optimizer called `name`, as the settings have it."""
    if name == "sgd":
        return SGD(params, lr=settings.sgd_lr, momentum=SGD_MOMENTUM)
    if name == "adamw":
        return AdamW(params, lr=settings.adamw_lr)
    # An infinite limit clips nothing; the norm of the gradients is then known.
    measure: dict[str, Any] = {"max_grad_norm": math.inf} if settings.tensorboard else {}
    if name == "adasofim":
        return AdaSOFIM(params, lr=settings.ada_lr, **measure)
    return SOFIM(params, lr=settings.lr, momentum=settings.momentum, rho=settings.rho, **measure)


def writer(run: Run, out: Path) -> Callable[[Row], None]:
    """Writes a row to TensorBoard's files in `out`/tensorboard, with what SOFIM knows of its last step.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard: the package is missing: pip install tensorboard") from error
    file = SummaryWriter(str(out / "tensorboard" / run.name))

    def write(row: Row) -> None:
        numbers: dict[str, Any] = {name: value for name, value in row.items() if name != "epoch"}
        if isinstance(run.optimizer, SOFIM):
            numbers |= {f"sofim/{name}": value for name, value in metrics(run.optimizer).items()}
        for name, value in numbers.items():
            file.add_scalar(name, value, row["epoch"])
        file.flush()

    return write


# Training


def fit(
    run: Run,
    data: ImageData,
    settings: Settings,
    save: Callable[[], None],
    console: Console,
    tell: Callable[[Row], None] | None = None,
) -> None:
    """Train `run` up to the last epoch or until it diverges; call `save` after every epoch, and `tell` with its row."""
    batches = math.ceil(len(data.train_labels) / settings.batch_size)
    with progress(console) as bars:
        bar = bars.add_task(
            LABELS[run.name],
            total=settings.epochs * batches,
            completed=len(run.history) * batches,
            note="",
        )
        for epoch in range(len(run.history) + 1, settings.epochs + 1):
            if run.diverged_in is not None:
                break
            row = run_epoch(run, data, settings, epoch, lambda: bars.advance(bar))
            if row is None:
                run.diverged_in = epoch
            else:
                run.history.append(row)
                if tell is not None:
                    tell(row)
            save()
            note = describe(row)
            bars.update(bar, note=note)
            if not console.is_terminal and (row is None or is_milestone(epoch, settings.epochs)):
                console.print(f"{LABELS[run.name]:12}  epoch {epoch:3}: {note}", highlight=False)


def run_epoch(run: Run, data: ImageData, settings: Settings, epoch: int, advance: Callable[[], None]) -> Row | None:
    """Train for one epoch and evaluate; `None` where a loss was not finite."""
    order = batch_order(settings.seed, epoch, len(data.train_labels))
    batches = torch.split(order.to(data.train_labels.device), settings.batch_size)
    started = time.perf_counter()
    trained = train_pass(run, data, batches, advance)
    seconds = time.perf_counter() - started
    if trained is None:
        return None
    train_loss, step_seconds = trained
    test_loss, test_accuracy = evaluate(run.model, data.test_images, data.test_labels)
    if not math.isfinite(test_loss):  # the last update of the epoch shows only here
        return None
    return Row(
        epoch=epoch,
        train_loss=train_loss,
        test_loss=test_loss,
        test_accuracy=test_accuracy,
        seconds=seconds,
        step_ms=1000 * step_seconds / len(batches),
    )


def batch_order(seed: int, epoch: int, images: int) -> Tensor:
    """A permutation of the training images, int64 (images,): a function of seed and epoch only."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(images))


def train_pass(
    run: Run, data: ImageData, batches: Sequence[Tensor], advance: Callable[[], None]
) -> tuple[float, float] | None:
    """One update a batch; mean loss and seconds in `optimizer.step()`, `None` if it diverges."""
    device = data.train_labels.device
    run.model.train()
    total = stepping = 0.0
    for batch in batches:
        loss = functional.cross_entropy(run.model(data.train_images[batch]), data.train_labels[batch])
        value = loss.item()
        if not math.isfinite(value):
            return None
        run.optimizer.zero_grad()
        loss.backward()
        synchronize(device)
        started = time.perf_counter()
        run.optimizer.step()
        synchronize(device)
        stepping += time.perf_counter() - started
        total += value * len(batch)
        advance()
    return total / sum(map(len, batches)), stepping


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy in nats, and the fraction of images that are classified correctly."""
    model.eval()
    loss = correct = 0.0
    parts = (torch.split(whole, EVALUATION_BATCH) for whole in (images, labels))
    for some, theirs in zip(*parts, strict=True):
        logits = model(some)
        loss += functional.cross_entropy(logits, theirs, reduction="sum").item()
        correct += (logits.argmax(1) == theirs).sum().item()
    return loss / len(labels), correct / len(labels)


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next counts all of its work and no other."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def progress(console: Console) -> Progress:
    """Progress bars on a terminal, nothing elsewhere."""
    return Progress(
        TextColumn("{task.description:12}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )


def is_milestone(epoch: int, epochs: int) -> bool:
    """Whether a log gets a line for this epoch: ten in all, however many epochs there are."""
    return epoch == epochs or epoch * 10 // epochs > (epoch - 1) * 10 // epochs


def describe(row: Row | None) -> str:
    """A few words on an epoch just done."""
    if row is None:
        return "diverged"
    return f"loss {row['train_loss']:.4f}, test {100 * row['test_accuracy']:.2f} %"


# Checkpoint


def write_checkpoint(path: Path, settings: Settings, runs: Sequence[Run]) -> None:
    """Replace the checkpoint by one of the present state."""
    write_sealed(path, {"settings": asdict(settings), "runs": {run.name: run.state() for run in runs}})


def read_checkpoint(path: Path, settings: Settings) -> dict[str, Any]:
    """The content of a checkpoint that `settings` may go on from.

    Raises:
        UserError: there is none, it cannot be read, or it belongs to other settings.
    """
    if not path.is_file():
        raise UserError(f"--resume: no checkpoint {path}")
    try:
        archive = io.BytesIO(sealed(path))
        content: dict[str, Any] = torch.load(archive, map_location="cpu", weights_only=True)
        saved: dict[str, Any] = content["settings"]
        done = max(run["epochs_done"] for run in content["runs"].values())
    # A damaged archive fails in as many ways as it has layers.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--resume: {path} is no readable checkpoint ({reason})") from error
    now = asdict(settings)
    differences = [
        f"{name} was {saved.get(name)!r} and is {now[name]!r} now"
        for name in now
        if name not in ("epochs", "tensorboard") and saved.get(name) != now[name]
    ]
    if differences:
        raise UserError(f"--resume: {path} has other settings: {'; '.join(differences)}")
    if done > settings.epochs:
        raise UserError(f"--resume: {path} is {done} epochs old already, not {settings.epochs}")
    return content


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Replace a file by what `torch.load` reads, with the SHA-256 of everything else at its end.

    The archive has checksums of its own, at which `torch.load` does not look. The digest is the archive's comment.
    """
    archive = io.BytesIO()
    torch.save(content, archive)
    body = archive.getvalue()[:-2] + struct.pack("<H", DIGEST)  # the length of the comment, which was 0
    with replacing(path) as file:
        file.write(body + hashlib.sha256(body).hexdigest().encode())


def sealed(path: Path) -> bytes:
    """What `write_sealed` wrote.

    Raises:
        ValueError: it is something else by now.
    """
    content = path.read_bytes()
    if hashlib.sha256(content[:-DIGEST]).hexdigest().encode() != content[-DIGEST:]:
        raise ValueError("its digest is wrong: it was cut off or altered")
    return content


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes `path`'s place when it is complete, and not before."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# Report


def report(settings: Settings, runs: Sequence[Run], out: Path, console: Console) -> None:
    """Write the history as JSON and as a PNG, and print the table."""
    content = {
        "settings": asdict(settings),
        "torch": torch.__version__,
        "runs": {
            run.name: {"history": run.history, "diverged_in": run.diverged_in, "state_bytes": run.state_bytes}
            for run in runs
        },
    }
    with replacing(out / "history.json") as file:
        file.write(json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")
    with replacing(out / "history.png") as file:
        plot(settings, runs).savefig(file, format="png", dpi=120)
    console.print(table(runs))
    for name in ("history.png", "history.json", "checkpoint.pt"):
        console.print(f"written: {out / name}", highlight=False, soft_wrap=True)


def table(runs: Sequence[Run]) -> Table:
    """Each optimizer's epochs; where there are many, some of them with the best and the last."""
    result = Table(box=SIMPLE_HEAD)
    result.add_column("\nOptimizer", no_wrap=True)
    headings = "\nEpoch", "Training\nloss", "Test\nloss", "Test\nacc. %", "Epoch\ns", "Step\nms"
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("\nNote", no_wrap=True)
    for run in runs:
        for row in shown(run.history):
            result.add_row(
                LABELS[run.name],
                str(row["epoch"]),
                f"{row['train_loss']:.4f}",
                f"{row['test_loss']:.4f}",
                f"{100 * row['test_accuracy']:.2f}",
                f"{row['seconds']:.2f}",
                f"{row['step_ms']:.3f}",
                remark(row, run.history),
            )
        if run.diverged_in is not None:
            result.add_row(LABELS[run.name], str(run.diverged_in), *["-"] * 5, "diverged")
        result.add_section()
    return result


def shown(history: Sequence[Row]) -> list[Row]:
    """All rows up to ten; of more, five evenly spaced ones besides the first and the best."""
    if len(history) <= 10:
        return list(history)
    chosen = {1, best(history)["epoch"], *(len(history) * part // 5 for part in range(1, 6))}
    return [row for row in history if row["epoch"] in chosen]


def best(history: Sequence[Row]) -> Row:
    """The first row with the highest test accuracy."""
    return max(history, key=lambda row: row["test_accuracy"])


def remark(row: Row, history: Sequence[Row]) -> str:
    """Whether `row` is the best, the last, or both."""
    marks = ["best"] if row is best(history) else []
    return ", ".join(marks + (["last"] if row is history[-1] else []))


def plot(settings: Settings, runs: Sequence[Run]) -> Figure:
    """Losses and test accuracy against the epoch, and what the optimizers take: time of a step, memory."""
    figure = Figure(figsize=(16, 4.6), layout="constrained")
    losses, accuracy, times, memory = figure.subplots(1, 4, width_ratios=[3, 3, 2, 2])
    colours = dict(zip(LABELS, ("C0", "C1", "C2", "C3"), strict=True))
    for run in runs:
        colour = colours[run.name]
        label = LABELS[run.name] + (" (diverged)" if run.diverged_in is not None else "")
        epochs = [row["epoch"] for row in run.history]
        train_losses = [row["train_loss"] for row in run.history]
        test_losses = [row["test_loss"] for row in run.history]
        accuracies = [100 * row["test_accuracy"] for row in run.history]
        losses.plot(epochs, train_losses, color=colour, marker=".", label=f"{label}, training")
        losses.plot(epochs, test_losses, color=colour, ls="--", marker=".", label=f"{label}, test")
        accuracy.plot(epochs, accuracies, color=colour, marker=".", label=label)
        steps = [row["step_ms"] for row in run.history]
        times.plot(epochs, steps, color=colour, marker=".", label=label)
    losses.set(xlabel="epoch", ylabel="mean cross-entropy (nats)", title="Loss", yscale="log")
    accuracy.set(xlabel="epoch", ylabel="test accuracy (%)", title="Test accuracy")
    times.set(xlabel="epoch", ylabel="ms", title="Time of an optimizer step")
    times.set_ylim(bottom=0)
    bars = memory.barh(
        [LABELS[run.name] for run in runs],
        [run.state_bytes / 1e6 for run in runs],
        color=[colours[run.name] for run in runs],
    )
    memory.bar_label(bars, fmt="%.2f", padding=-30, color="white")
    memory.invert_yaxis()
    memory.set(xlabel="MB", title="State that the optimizer keeps")
    for axes in (losses, accuracy, times):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    losses.legend(loc="lower left", fontsize="small")  # away from the curves
    accuracy.legend(loc="lower right", fontsize="small")
    figure.suptitle(headline(settings))
    return figure


def headline(settings: Settings) -> str:
    """The plot's title: data set and settings."""
    parts = {
        "sofim": f"SOFIM lr {settings.lr:g}, momentum {settings.momentum:g}, rho {settings.rho:g}",
        "sgd": f"SGD lr {settings.sgd_lr:g}, momentum {SGD_MOMENTUM:g}",
        "adasofim": f"AdaSOFIM lr {settings.ada_lr:g}",
        "adamw": f"AdamW lr {settings.adamw_lr:g}",
    }
    return f"LeNet-5 on {settings.data}, batch {settings.batch_size}, seed {settings.seed}\n" + "; ".join(
        parts[name] for name in settings.optimizers
    )


if __name__ == "__main__":
    sys.exit(main())
