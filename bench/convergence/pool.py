"""Executes runs in parallel, each in a process with one thread, and each only once.

joblib is not used for this. If a job fails, or on Ctrl-C, ``joblib.Parallel`` ends the other jobs at once, and minutes
of work are lost; here their results are stored. Workers of joblib continue after their parent was killed; these end
with it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.convergence.store import Store

__all__ = ["run_missing"]

T = TypeVar("T")


def _begin() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for its next job for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_missing(
    jobs: Mapping[str, T], work: Callable[[T], Any], store: Store, workers: int, title: str, console: Console
) -> None:
    """Do the jobs whose keys the store does not have, and add what they return as soon as they are done.

    Args:
        jobs: by key, in the order in which they are begun.
        work: can be pickled; its results are of the types that JSON has.
        store: where results go.
        workers: processes; the one there is where only one is wanted.
        title: of the progress bar.
        console: where it is shown.

    Raises:
        Exception: what ``work`` raised. What other processes had finished by then is in the store.
    """
    missing = {key: job for key, job in jobs.items() if key not in store}
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task(title, total=len(jobs), completed=len(jobs) - len(missing))
        if not missing:
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # here too, where the machine is described
        try:
            if workers == 1:
                for key, job in missing.items():
                    store.add(key, work(job))
                    bars.advance(bar)
            else:
                _side_by_side(missing, work, store, workers, lambda: bars.advance(bar))
        finally:
            torch.set_num_threads(threads)
            store.close()


def _side_by_side(
    missing: Mapping[str, T], work: Callable[[T], Any], store: Store, workers: int, advance: Callable[[], object]
) -> None:
    pool = ProcessPoolExecutor(min(workers, len(missing)), get_context("spawn"), initializer=_begin)
    futures: dict[Future[Any], str] = {}
    try:
        futures.update((pool.submit(work, job), key) for key, job in missing.items())
        for future in as_completed(futures):
            store.add(futures[future], future.result())
            advance()
    finally:
        # After a failure or an interruption what is under way is still of use.
        pool.shutdown(cancel_futures=True)
        for future, key in futures.items():
            if key not in store and future.done() and not future.cancelled() and future.exception() is None:
                store.add(key, future.result())
