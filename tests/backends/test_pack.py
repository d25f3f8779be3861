"""Tensors packed in Python, for steps that run pass by pass; ``test_packed_step.py`` has those of whole steps."""

from __future__ import annotations

import torch

from sofim_fused.backends.triton import pack
from sofim_fused.step import gather
from tests.support.packed import TILE, check_addresses, expected_kind, made
from tests.support.problems import give, mixed_problem, same_bits, snapshot


def test_laid_out() -> None:
    """What the eager passes hand over: real views, on any of the layouts."""
    problem = mixed_problem((torch.bfloat16, torch.float32, torch.complex64), "none")
    optimizer = made(problem.groups)
    grads = next(problem.gradients())
    give(problem.params, [torch.ones_like(p) if g is None else g for p, g in zip(problem.params, grads, strict=True)])
    (device, entries), *others = gather.by_device(gather.with_gradients(optimizer.param_groups))
    assert not others
    lists = gather.lay_out(device, entries, optimizer.param_groups, optimizer.state)
    laid = pack.lay_out(
        lists.params, lists.grads, lists.exp_avgs, lists.lost_bits, lists.steps, [7 * i for i in lists.ordinals], TILE
    )
    rows = laid.rows.tolist()
    first = 0
    for i, (row, w, g, m, lost, step) in enumerate(
        zip(rows, lists.params, lists.grads, lists.exp_avgs, lists.lost_bits, lists.steps, strict=True)
    ):
        check_addresses(row[:4], [w, g, m, lost], m)
        kind = expected_kind(w, g, m, lost, row)
        assert row[4:] == [step.data_ptr(), w.numel(), 7 * i, kind, i, first]
        first += max(1, -(-w.numel() // TILE))
    assert (laid.tiles, laid.kinds) == (first, sorted({row[7] for row in rows}))
    assert laid.copies
    before = snapshot(optimizer)
    versions = [x._version for x in (*lists.params, *lists.exp_avgs, *lists.steps)]
    laid.finish(True, True, True)
    assert same_bits(before, snapshot(optimizer))
    raised = [x._version for x in (*lists.params, *lists.exp_avgs, *lists.steps)]
    assert all(now > was for now, was in zip(raised, versions, strict=True))


def test_nothing_laid_out() -> None:
    laid = pack.lay_out([], [], [], [], [], [], TILE)
    assert (laid.rows.shape, laid.kinds, laid.tiles) == ((0, 10), [], 0)
    laid.finish(True, True, True)
