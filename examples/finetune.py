"""Train a small language model on Shakespeare's plays with Hugging Face's Trainer: AdaSOFIM beside AdamW.

Run it from the repository root, where `transformers` and `accelerate` are installed (`make clients` makes such an
environment in build/clients):

    build/clients/bin/python -m examples.finetune
    build/clients/bin/python -m examples.finetune --steps 2000 --layers 8 --width 512 --context 256   # on a GPU

Each optimizer runs in a process of its own, so that its peak memory is its own, from the same initial weights and on
the same batches. The run writes finetune.json and finetune.png, prints a table, and leaves
TensorBoard's files in --out. The model reads bytes, so it needs no tokenizer; nothing is downloaded but the plays,
once, by pip.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: Python put this folder, not the repository root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset

from bench.convergence import plays

LABELS = {"adasofim": "AdaSOFIM", "adamw": "AdamW"}
WINDOWS = 128  # of the validation text, evenly spaced
POINTS = 10  # of the curve of validation losses


@dataclass(frozen=True)
class Settings:
    """What a run depends on."""

    root: str
    out: str
    steps: int
    batch: int
    context: int
    layers: int
    width: int
    lr: float
    clip: float
    seed: int


class Windows(Dataset[dict[str, Tensor]]):
    """Pieces of a text, each `context` bytes long: int64 tensors, which are also what is to be predicted.

    Args:
        text: bytes, uint8 of one dimension.
        starts: where each piece begins.
        context: its length.
    """

    def __init__(self, text: Tensor, starts: Tensor, context: int) -> None:
        self._text, self._starts, self._context = text, starts.tolist(), context

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        piece = self._text[self._starts[index] : self._starts[index] + self._context].long()
        return {"input_ids": piece, "labels": piece}


def train(name: str, settings: Settings) -> dict[str, Any]:
    """Train with one optimizer, in this process.

    Returns:
        `curve`: (step, mean validation loss in nats per byte) pairs; `tokens_per_second` of the training alone;
        `peak_mb`: of the device on a GPU, else of the process; `state_mb`: what the optimizer keeps; `parameters`.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

    from sofim_fused import AdaSOFIM
    from sofim_fused.integrations.transformers import attach, optimizer_cls_and_kwargs

    # Without it, transformers 5.23 writes to ./runs wherever evaluate() is called before train().
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(settings.out) / name)
    on_gpu = torch.cuda.is_available()
    text = plays.load(Path(settings.root))
    generator = torch.Generator().manual_seed(settings.seed)
    starts = torch.randint(len(text.train) - settings.context, (settings.steps * settings.batch,), generator=generator)
    held_out = torch.linspace(0, len(text.validation) - settings.context - 1, WINDOWS).long()
    set_seed(settings.seed)
    size = {"n_layer": settings.layers, "n_embd": settings.width, "n_head": max(1, settings.width // 32)}
    config = GPT2Config(vocab_size=256, n_positions=settings.context, bos_token_id=0, eos_token_id=0, **size)
    model = GPT2LMHeadModel(config)
    ours = name == "adasofim"
    args = TrainingArguments(
        output_dir=str(Path(settings.out) / name),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=settings.steps // 10,
        weight_decay=0.1,
        adam_beta2=0.99,
        max_grad_norm=0.0 if ours else settings.clip,  # AdaSOFIM clips inside its step
        eval_strategy="steps",
        eval_steps=max(1, settings.steps // POINTS),
        logging_steps=max(1, settings.steps // 50),
        save_strategy="no",
        report_to=["tensorboard"],
        bf16=on_gpu,
        use_cpu=not on_gpu,
        disable_tqdm=True,
        seed=settings.seed,
    )
    clock = _clock(TrainerCallback)
    trainer = Trainer(
        model,
        args,
        train_dataset=Windows(text.train, starts, settings.context),
        eval_dataset=Windows(text.validation, held_out, settings.context),
        callbacks=[clock],
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, AdaSOFIM, max_grad_norm=settings.clip)
        if ours
        else (torch.optim.AdamW, {"lr": settings.lr, "betas": (0.9, 0.99), "fused": True}),
    )
    if ours:
        attach(trainer)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    state = trainer.optimizer.optimizer.state.values()
    tensors = [value for entry in state for value in entry.values() if isinstance(value, Tensor)]
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated() if on_gpu else usage
    points = [(line["step"], line["eval_loss"]) for line in trainer.state.log_history if "eval_loss" in line]
    return {
        "name": name,
        "curve": [(0, first), *(point for point in points if point[0])],
        "tokens_per_second": settings.steps * settings.batch * settings.context / clock.seconds,
        "peak_mb": peak / 1e6,
        "state_mb": sum(tensor.nbytes for tensor in tensors) / 1e6,
        "parameters": sum(param.numel() for param in model.parameters()),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
    }


def _clock(base: Any) -> Any:
    """A callback that adds up the seconds of training steps, without those of evaluations."""

    class Clock(base):  # type: ignore[misc]
        seconds = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self._start

    return Clock()


def plot(results: Sequence[dict[str, Any]], settings: Settings) -> Figure:
    """Validation loss by step, tokens per second, and memory."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    losses, speed, memory = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    labels = [LABELS[result["name"]] for result in results]
    colours = [f"C{index}" for index in range(len(results))]
    for result, label, colour in zip(results, labels, colours, strict=True):
        steps, values = zip(*result["curve"], strict=True)
        losses.plot(steps, values, color=colour, marker=".", label=f"{label}: {values[-1]:.3f} at the end")
    losses.set(xlabel="step", ylabel="nats per byte", title="Validation loss")
    losses.grid(alpha=0.3)
    losses.legend(fontsize="small")
    for axes, key, title in ((speed, "tokens_per_second", "Tokens per second"), (memory, "state_mb", "State, MB")):
        bars = axes.bar(labels, [result[key] for result in results], color=colours)
        axes.bar_label(bars, fmt="{:,.1f}" if key == "state_mb" else "{:,.0f}")
        axes.set(title=title)
    figure.suptitle(
        f"GPT-2 of {results[0]['parameters'] / 1e6:.1f} M parameters on Shakespeare's plays, {settings.steps} steps, "
        f"lr {settings.lr:g}, {results[0]['device']}"
    )
    return figure


def table(results: Sequence[dict[str, Any]]) -> Table:
    """One line for each optimizer."""
    made = Table(box=SIMPLE_HEAD)
    for heading in ("Optimizer", "Validation loss", "Bits per byte", "Tokens/s", "State, MB", "Peak memory, MB"):
        made.add_column(heading, justify="left" if heading == "Optimizer" else "right")
    for result in results:
        loss = result["curve"][-1][1]
        numbers = [result[key] for key in ("tokens_per_second", "state_mb", "peak_mb")]
        cells = [f"{loss:.4f}", f"{loss / math.log(2):.3f}", f"{numbers[0]:,.0f}", *(f"{x:,.1f}" for x in numbers[1:])]
        made.add_row(LABELS[result["name"]], *cells)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.finetune", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--root", default=str(plays.ROOT), help="folder of the plays, or of train.txt, validation.txt and test.txt")
    add("--out", default=str(Path("runs") / "finetune"), help="folder for the results (default: runs/finetune)")
    add("--optimizers", nargs="+", choices=list(LABELS), default=list(LABELS), help="which (default: all)")
    add("--steps", type=int, default=300)
    add("--batch", type=int, default=16, help="sequences per step (default: 16)")
    add("--context", type=int, default=128, help="bytes per sequence (default: 128)")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=128, help="a multiple of 32 (default: 128)")
    add("--lr", type=float, default=4e-3, help="of both, after warm-up and before the cosine (default: 0.004)")
    add("--clip", type=float, default=1.0, help="norm to which gradients are clipped (default: 1)")
    add("--seed", type=int, default=0)
    options = vars(parser.parse_args(argv))
    names = options.pop("optimizers")
    settings = Settings(**options)
    if min(settings.steps, settings.batch, settings.context, settings.layers) < 1 or settings.width % 32:
        parser.error("--steps, --batch, --context and --layers are at least 1, and --width is a multiple of 32")
    try:
        import transformers
    except ImportError:
        print("error: transformers is not installed: pip install transformers accelerate tensorboard", file=sys.stderr)
        return 2
    transformers.logging.set_verbosity_error()
    root = Path(settings.root)
    if not (root / plays.ARCHIVE).is_file() and not (root / "train.txt").is_file():
        plays.download(root)
    console = Console()
    results = []
    for name in names:
        console.print(f"{LABELS[name]}: {settings.steps} steps")
        # A process of its own: the peak of a process never falls.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            results.append(pool.submit(train, name, settings).result())
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    content = {"settings": asdict(settings), "torch": torch.__version__, "runs": results}
    (out / "finetune.json").write_text(json.dumps(content, indent=2) + "\n")
    plot(results, settings).savefig(out / "finetune.png", dpi=120)
    console.print(table(results))
    console.print(f"written: {out / 'finetune.png'}, {out / 'finetune.json'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
