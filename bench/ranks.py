"""Processes that form a process group (gloo, CPU) and run the functions that they are given."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

ANSWER_IN = 120.0  # seconds; then something hangs


class Ranks:
    """``world`` processes, each a rank.

    Args:
        world: how many.
        timeout: of the process group's operations, in seconds.
    """

    def __init__(self, world: int, timeout: float = 60.0) -> None:
        self.world = world
        context = get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        pipes = [context.Pipe() for _ in range(world)]
        self.connections = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(theirs, rank, world, str(store), timeout), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``work(rank, *args)``, a function of a module, returns on each rank.

        Raises:
            AssertionError: it raised on a rank, or did not answer; with all their tracebacks.
        """
        outcomes = self.outcomes(work, *args)
        failed = [f"rank {rank}: {text}" for rank, (good, text) in enumerate(outcomes) if not good]
        assert not failed, "\n".join(failed)
        return [result for _, result in outcomes]

    def outcomes(self, work: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """The same, without raising: whether it returned, and what, or the traceback."""
        for connection in self.connections:
            connection.send((work, args))
        return [self.outcome(rank) for rank in range(self.world)]

    def outcome(self, rank: int) -> tuple[bool, Any]:
        """What one rank answers."""
        try:
            if not self.connections[rank].poll(ANSWER_IN):
                return False, f"no answer in {ANSWER_IN} s"
            answer: tuple[bool, Any] = self.connections[rank].recv()
        except (EOFError, ConnectionResetError):
            return False, "the process ended"
        return answer

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def all_reduced(work: Callable[[], Any]) -> list[int]:
    """The bytes of each all-reduce of float64, which sums are and gradients are not."""
    sent: list[int] = []
    original = torch.distributed.all_reduce

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype == torch.float64:
            sent.append(tensor.nbytes)
        return original(tensor, *args, **kwargs)

    torch.distributed.all_reduce = all_reduce
    try:
        work()
    finally:
        torch.distributed.all_reduce = original
    return sent


def _serve(connection: Connection, rank: int, world: int, store: str, timeout: float) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    while True:
        try:
            work, args = connection.recv()
        except EOFError:
            return
        try:
            answer = True, work(rank, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send(answer)
