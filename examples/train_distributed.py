"""Train LeNet-5 with SOFIM on several ranks: sharded parameters, replicas, or sharded optimizer state.

Run it from the repository root; without torchrun it is one process with the same result:

    torchrun --nproc-per-node 2 -m examples.train_distributed --mode fsdp
    python -m examples.train_distributed

It writes a checkpoint after every epoch, and `--resume` continues from it: with `fsdp` and `ddp` on any number of
ranks, also from one of these modes to the other.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from examples import data as image_data
from examples.data import ImageData
from examples.models import LeNet5
from examples.train import DEFAULTS, UserError, batch_order, evaluate, make_folder, replacing
from sofim_fused import SOFIM

MODES = ("fsdp", "ddp", "zero")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0: done, 2: the user must put something right."""
    options = _parser().parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = _device()
    if "RANK" not in os.environ:  # checkpoints warn of that
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
    else:  # torchrun's
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(options, rank, world, device)
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.train_distributed", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--mode", choices=MODES, default="fsdp", help="how parameters are distributed over ranks (default: fsdp)")
    add("--replicas", type=int, default=1, help="fsdp: copies of the model, each sharded (HSDP; default: 1)")
    add("--data", choices=image_data.NAMES, default="digits", help="data set (default: digits)")
    add("--root", type=Path, help="folder of the data's files")
    add("--epochs", type=int, default=5, help="epochs (default: 5)")
    add("--batch-size", type=int, default=32, help="images per step, of all ranks together (default: 32)")
    add("--clip", type=float, help="max_grad_norm of SOFIM (default: no clipping)")
    add("--out", type=Path, default=Path("runs/distributed"), help="folder of checkpoints (default: runs/distributed)")
    add("--resume", action="store_true", help="continue from the last checkpoint in --out")
    return parser


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def train(options: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
    """Train, save, and print a line for each epoch.

    Raises:
        UserError: the data, a size or the checkpoint cannot be used.
    """
    if options.batch_size % world:
        raise UserError(f"--batch-size {options.batch_size}: {world} ranks cannot share it equally")
    if options.replicas < 1 or world % options.replicas:
        raise UserError(f"--replicas {options.replicas}: {world} ranks cannot hold as many copies")
    try:
        data = image_data.load(options.data, options.root)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    make_folder(options.out)
    data = data.to(device)
    run = new_run(options, data, world, device)
    done = read_checkpoint(run, options.out) if options.resume else 0
    if rank == 0:
        print(f"LeNet-5 on {data.name}, {run.describe(world)}", flush=True)
    for epoch in range(done + 1, options.epochs + 1):
        started = time.perf_counter()
        loss = run_epoch(run, data, options.batch_size, epoch, rank, world)
        seconds = time.perf_counter() - started
        test_loss, accuracy = evaluate(run.model, data.test_images, data.test_labels)
        write_checkpoint(run, options.out, epoch, rank)
        if rank == 0:
            scores = f"loss {loss:.6f}, test loss {test_loss:.6f}, test accuracy {100 * accuracy:.2f} %"
            print(f"epoch {epoch}: {scores}, {seconds:.2f} s", flush=True)


@dataclass
class Run:
    """A model and its optimizer, and how they are spread over ranks (`None`: not at all)."""

    mode: str | None
    model: nn.Module
    optimizer: Optimizer

    def describe(self, world: int) -> str:
        """In words, with what this rank keeps of the optimizer's state."""
        if self.mode is None:
            return "one process"
        total = sum(p.numel() for p in self.model.parameters())
        here = self.optimizer.optim if isinstance(self.optimizer, ZeroRedundancyOptimizer) else self.optimizer
        held = sum(_held(p) for group in here.param_groups for p in group["params"])
        return f"{world} ranks, {self.mode}: rank 0 keeps {held:,} of {total:,} moments"


def _held(param: Tensor) -> int:
    return param.to_local().numel() if hasattr(param, "to_local") else param.numel()


def new_run(options: argparse.Namespace, data: ImageData, world: int, device: torch.device) -> Run:
    """The same initial weights on all ranks, then spread."""
    torch.manual_seed(0)
    model: nn.Module = LeNet5(data.channels, data.classes).to(device)
    defaults = DEFAULTS[options.data]
    settings = {"lr": defaults.lr, "momentum": defaults.momentum, "rho": defaults.rho, "max_grad_norm": options.clip}
    if not distributed.is_initialized():
        return Run(None, model, SOFIM(model.parameters(), **settings))
    if options.mode == "fsdp":
        names = ("replicate", "shard")
        mesh = init_device_mesh(device.type, (options.replicas, world // options.replicas), mesh_dim_names=names)
        mesh = mesh["shard"] if options.replicas == 1 else mesh
        for layer in model.children():
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return Run("fsdp", model, SOFIM(model.parameters(), **settings))
    model = DistributedDataParallel(model)
    if options.mode == "ddp":
        return Run("ddp", model, SOFIM(model.parameters(), **settings))
    # Each rank has an optimizer for some of the parameters; shard_group says that sums are over all of them.
    # As an argument of the wrapper the group would stand in its state dict, and could not be saved.
    ours: Any = partial(SOFIM, shard_group=distributed.group.WORLD)
    return Run("zero", model, ZeroRedundancyOptimizer(model.parameters(), ours, **settings))


def run_epoch(run: Run, data: ImageData, batch_size: int, epoch: int, rank: int, world: int) -> float:
    """One update per batch, of which each rank takes its share; the mean loss over all ranks."""
    run.model.train()
    order = batch_order(0, epoch, len(data.train_labels)).to(data.train_labels.device)
    batches = order[: len(order) // batch_size * batch_size].view(-1, batch_size)  # the same for all ranks
    total = torch.zeros((), dtype=torch.float64, device=order.device)
    for batch in batches:
        mine = batch.chunk(world)[rank]
        run.optimizer.zero_grad()
        loss = functional.cross_entropy(run.model(data.train_images[mine]), data.train_labels[mine])
        loss.backward()
        run.optimizer.step()
        total += loss.detach()
    if distributed.is_initialized():
        distributed.all_reduce(total)
    mean = total.item() / (len(batches) * world)
    if not math.isfinite(mean):
        raise UserError(f"the loss of epoch {epoch} is {mean}")
    return mean


# Checkpoints


def write_checkpoint(run: Run, out: Path, epoch: int, rank: int) -> None:
    """Write a checkpoint, and then say that it is the last one."""
    if isinstance(run.optimizer, ZeroRedundancyOptimizer):
        run.optimizer.consolidate_state_dict(to=0)
        if rank == 0:
            whole = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
            with replacing(out / f"{epoch}.pt") as file:
                torch.save(whole, file)
    else:
        save(_state(run), checkpoint_id=out / str(epoch), no_dist=run.mode is None)
    if rank == 0:
        with replacing(out / "last") as file:
            file.write(f"{epoch} {'whole' if run.mode == 'zero' else 'sharded'}".encode())
    if distributed.is_initialized():
        distributed.barrier()


def read_checkpoint(run: Run, out: Path) -> int:
    """Put the last checkpoint into model and optimizer; return its epoch.

    Raises:
        UserError: there is none of this kind.
    """
    kind = "whole" if run.mode == "zero" else "sharded"
    try:
        epoch, found = (out / "last").read_text().split()
    except OSError as error:
        raise UserError(f"--resume: no checkpoint in {out}") from error
    if kind != found:
        raise UserError(f"--resume: the checkpoint in {out} is {found}; --mode zero writes whole ones, others sharded")
    if isinstance(run.optimizer, ZeroRedundancyOptimizer):
        whole = torch.load(out / f"{epoch}.pt", weights_only=True)
        run.model.load_state_dict(whole["model"])
        run.optimizer.load_state_dict(whole["optimizer"])
    else:
        state = _state(run)
        load(state, checkpoint_id=out / epoch, no_dist=run.mode is None)
        set_state_dict(run.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(epoch)


def _state(run: Run) -> dict[str, Any]:
    model, optimizer = get_state_dict(run.model, run.optimizer)
    return {"model": model, "optimizer": optimizer}


if __name__ == "__main__":
    sys.exit(main())
