"""Shared by the tests of packed steps: optimizers with state, and what the rows of their tensors have to contain."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from sofim_fused import SOFIM, blockwise, native
from sofim_fused.backends.triton import pack
from sofim_fused.checks import lost_bits
from tests.support.problems import give, give_state

TILE = 4


def new(tile: int = TILE) -> Any:
    """A new ``PackedStep`` of the native part."""
    return native.cpu().PackedStep(tile)  # type: ignore[union-attr]


def made(params: list[Any], **options: Any) -> SOFIM:
    """An optimizer with state for every parameter, its groups being ``params``."""
    optimizer = SOFIM(params, backend="reference", **options)
    give_state(optimizer)
    return optimizer


def three(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[SOFIM, list[nn.Parameter]]:
    """An optimizer with three parameters, a square one and two vectors, in two groups, with gradients and state."""
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((4, 4), (40,), (7,))]
    give(params, [torch.randn(p.shape, generator=generator).to(dtype) for p in params])
    return made([{"params": params[:2]}, {"params": params[2:], "lr": 0.25}], **options), params


def gathered(t: Any, optimizer: SOFIM) -> int | None:
    changed: int | None = t.gather(optimizer.param_groups, optimizer.state)
    return changed


def laid_like(x: Tensor, m: Tensor) -> Tensor:
    """A copy of x with m's memory order, or contiguous if there are gaps in m."""
    dense = torch.empty_like(m)  # preserves strides only without gaps
    order = m.stride() if dense.stride() == m.stride() else m.contiguous().stride()
    return torch.empty_strided(x.shape, order, dtype=x.dtype).copy_(x.detach())


def bytes_at(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size) if size else b""


def same_strides(x: Tensor, y: Tensor) -> bool:
    return all(a == b for size, a, b in zip(x.shape, x.stride(), y.stride(), strict=True) if size != 1)


def check_addresses(row: list[int], tensors: list[Tensor | None], m: Tensor) -> None:
    """Check that at the addresses are the tensors' values in m's order, and the tensors themselves if they have it."""
    for address, x in zip(row, tensors, strict=True):
        if x is None or x.numel() == 0:
            assert address == 0
            continue
        expected = laid_like(x, m)
        size = x.numel() * x.element_size()
        assert bytes_at(address, size) == bytes_at(expected.data_ptr(), size)
        as_it_is = same_strides(x, expected) and not x.is_conj() and not x.is_neg()
        assert (address == x.data_ptr()) == as_it_is


def expected_kind(w: Tensor, g: Tensor, m: Tensor, lost: Tensor | None, row: list[int]) -> int:
    names = {torch.complex64: "float32", torch.complex128: "float64"}
    name = names.get(w.dtype, str(w.dtype).removeprefix("torch."))
    kind = ["float32", "float64", "bfloat16", "float16"].index(name)
    if w.element_size() == 2 and g.element_size() == 4:
        kind += 4
    if m.element_size() == 2:
        kind += 8
    columns = row_size(w, m)
    if columns:
        kind += 256 + 512 * (columns % 128 > 0)
    if lost is not None:
        kind += 16 + 128 * (lost.dtype == torch.int16)
    if (w.numel() and any(address % 16 for address in row[:4])) or columns % 16:
        kind += 32
    return kind


def row_size(w: Tensor, m: Tensor) -> int:
    """The elements of a row, if the moment is in 8 bits; else 0."""
    return w[0].numel() if m.dtype == blockwise.DTYPE else 0


def padded(w: Tensor, m: Tensor) -> int:
    """The elements; if the moment is in 8 bits, as if each row had whole blocks."""
    columns = row_size(w, m)
    return -(-columns // 128) * 128 * len(w) if columns else w.numel() * (1 + w.is_complex())


def check_everything(t: Any, optimizer: SOFIM, tile: int = TILE) -> None:
    """Check everything that ``gather`` has stored about an optimizer whose tensors were just gathered."""
    expected_rows = []
    first = 0
    rows = t.rows.tolist()
    present, ordinal = [], 0
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p.grad is not None:
                known = optimizer.state[p]
                name = lost_bits(p, group)
                lost = None if name is None else known[name]
                row = rows[len(expected_rows)]
                m = known["exp_avg"]
                check_addresses(row[:4], [p, p.grad, m, lost], m)
                scales = known["exp_avg_scale"].data_ptr() if m.dtype == blockwise.DTYPE else 0
                numel, columns = padded(p, m), row_size(p, m)
                kind = expected_kind(p, p.grad, m, lost, row)
                step = known["step"].data_ptr()
                expected_rows.append([*row[:4], scales, step, numel, columns, ordinal, kind, index, first])
                first += (numel + tile - 1) // tile if numel else 1
                present.append(group)
            ordinal += 1
    assert rows == expected_rows
    assert (t.rows.dtype, t.rows.shape, t.rows.device.type) == (torch.int64, (len(present), pack.COLUMNS), "cpu")
    assert t.rows.is_contiguous()
    assert (t.size, t.tiles) == (len(present), first)
    assert t.kinds == sorted({row[pack.KIND] for row in rows})
    assert t.device == (present[0]["params"][0].device if present else None)
    hyper = []
    for group in optimizer.param_groups:
        lr, beta, decay = (
            torch.as_tensor(group["lr"], dtype=torch.float64).item(),
            group["momentum"],
            group["weight_decay"],
        )
        decoupled, l2 = (decay, 0.0) if group["decoupled_weight_decay"] else (0.0, decay)
        sign = -1.0 if group["maximize"] else 1.0
        hyper.append([lr, beta, float(group["rho"]), decoupled, l2, sign, beta, (1 - beta) * sign, (1 - beta) * l2])
    assert t.hyper.dtype == torch.float64
    assert t.hyper.tolist() == hyper
    whole = optimizer.param_groups[0]
    assert (t.numerator, t.fisher) == (whole["numerator"], whole["fisher"])
    assert t.max_grad_norm == whole["max_grad_norm"]
    assert t.skip_nonfinite is whole["skip_nonfinite"]
    assert t.l2 is any(g["weight_decay"] and not g["decoupled_weight_decay"] for g in present)
    assert t.decoupled is any(g["weight_decay"] and g["decoupled_weight_decay"] for g in present)
    assert t.scalars == []
