"""Tensors packed in Python, for steps that run pass by pass; ``test_packed_step.py`` has those of whole steps."""

from __future__ import annotations

import torch
from torch import nn

from sofim_fused import SOFIM
from sofim_fused.backends.triton import pack
from sofim_fused.step import gather
from tests.support.packed import TILE, bytes_at, check_addresses, expected_kind, made, padded, row_size
from tests.support.problems import give, mixed_problem, same_bits, snapshot


def test_laid_out() -> None:
    """What the eager passes hand over: real views, on any of the layouts."""
    problem = mixed_problem((torch.bfloat16, torch.float32, torch.complex64), "none")
    optimizer = made(problem.groups)
    grads = next(problem.gradients())
    give(problem.params, [torch.ones_like(p) if g is None else g for p, g in zip(problem.params, grads, strict=True)])
    _check_laid_out(optimizer)


def test_moments_in_8_bits_laid_out() -> None:
    """Whole rows, rows of 16 elements times a number, and others; in another order, and with scales in another."""
    params = [torch.randn(shape) for shape in ((40, 128), (9, 64, 3, 3), (33, 130), (40,))]
    params.append(torch.randn(5, 16, 8, 9).to(memory_format=torch.channels_last))
    optimizer = made([nn.Parameter(p) for p in params], state_dtype="float8_e4m3fn")
    params = optimizer.param_groups[0]["params"]
    give(params, [torch.randn_like(p) for p in params])
    scales = optimizer.state[params[1]]
    scales["exp_avg_scale"] = scales["exp_avg_scale"].t().clone().t()
    _check_laid_out(optimizer)


def _check_laid_out(optimizer: SOFIM) -> None:
    (device, entries), *others = gather.by_device(gather.with_gradients(optimizer.param_groups))
    assert not others
    lists = gather.lay_out(device, entries, optimizer.param_groups, optimizer.state)
    laid = pack.lay_out(
        lists.params,
        lists.grads,
        lists.exp_avgs,
        lists.lost_bits,
        lists.steps,
        [7 * i for i in lists.ordinals],
        TILE,
        lists.exp_avg_scales,
    )
    rows = laid.rows.tolist()
    first = 0
    for i, (row, w, g, m, lost, scales, step) in enumerate(
        zip(
            rows,
            lists.params,
            lists.grads,
            lists.exp_avgs,
            lists.lost_bits,
            lists.exp_avg_scales,
            lists.steps,
            strict=True,
        )
    ):
        check_addresses(row[:4], [w, g, m, lost], m)
        if scales is None:
            assert row[pack.SCALES] == 0
        else:
            assert bytes_at(row[pack.SCALES], 4 * scales.numel()) == scales.contiguous().numpy().tobytes()
            assert (row[pack.SCALES] == scales.data_ptr()) == scales.is_contiguous()
        kind = expected_kind(w, g, m, lost, row)
        numel = padded(w, m)
        assert row[5:] == [step.data_ptr(), numel, row_size(w, m), 7 * i, kind, i, first]
        first += max(1, -(-numel // TILE))
    assert (laid.tiles, laid.kinds) == (first, sorted({row[pack.KIND] for row in rows}))
    assert laid.copies
    before = snapshot(optimizer)
    scales = [x for x in lists.exp_avg_scales if x is not None]
    versions = [x._version for x in (*lists.params, *lists.exp_avgs, *scales, *lists.steps)]
    laid.finish(True, True, True)
    assert same_bits(before, snapshot(optimizer))
    raised = [x._version for x in (*lists.params, *lists.exp_avgs, *scales, *lists.steps)]
    assert all(now > was for now, was in zip(raised, versions, strict=True))


def test_nothing_laid_out() -> None:
    laid = pack.lay_out([], [], [], [], [], [], TILE)
    assert (laid.rows.shape, laid.kinds, laid.tiles) == ((0, pack.COLUMNS), [], 0)
    laid.finish(True, True, True)
