"""The passes in pure PyTorch: they run wherever PyTorch runs and define what every other backend has to compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sofim_fused.backends.protocol import Coefficients, Decay, GradientStep, Sums, Tiles, sum_dtype
from sofim_fused.backends.rounding import random_bits, round_stochastic

TILE = 16_384  # elements summed at once; below the size at which torch splits one sum among threads
CHUNK = 256 * TILE  # elements for which temporaries are made at once: 32 MiB in float64
_WIDE = {  # the dtype of the arithmetic by that of the parameter
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}

_Factors = Sequence[Tensor] | None  # one 0-dimensional factor per tensor; None where the term is absent


class ReferencePasses:
    """See :class:`sofim_fused.backends.protocol.Passes`.

    Tensors go through ``torch._foreach`` together: all that are updated where they lie; of those that need temporaries,
    as many as fit into ``CHUNK`` elements, so that memory stays bounded.
    """

    name = "reference"

    def accumulate(self, tiles: Tiles, decay: Decay, gradient_step: GradientStep | None = None) -> Sums:
        sums = _Table(len(tiles))
        for batch in _batches(tiles):
            grads = batch.wide(tiles.grads)
            weights = None if decay.weight is None else batch.wide(tiles.params)
            moments = batch.wide(tiles.exp_avgs)
            _blend(moments, grads, weights, decay, batch)
            stored = _store_moments(tiles, batch, moments, early=True)
            sums.add_squares("mm", batch, stored)
            if decay.cross:
                sums.add("mg", batch, stored, grads)
                if weights is not None:
                    sums.add("mw", batch, stored, weights)
            if gradient_step is not None:
                factors = _unbound(gradient_step.gradient)
                _update(tiles, batch, _unbound(gradient_step.weight), [(factors, grads)])
        return sums.vectors()

    def apply(self, tiles: Tiles, coefficients: Coefficients) -> None:
        weight, moment, gradient = _update_factors(coefficients)
        for batch in _batches(tiles):
            terms = [(moment, batch.wide(tiles.exp_avgs))]
            if gradient is not None:
                terms.append((gradient, batch.wide(tiles.grads)))
            _update(tiles, batch, weight, terms)

    def dots(self, tiles: Tiles, decay: Decay) -> Sums:
        sums = _Table(len(tiles))
        batch = _Batch(range(len(tiles)), None)  # one for all: sums widen for themselves
        sums.add_squares("mm", batch, tiles.exp_avgs)
        sums.add("mg", batch, tiles.exp_avgs, tiles.grads)
        sums.add_squares("gg", batch, tiles.grads)
        if decay.weight is not None:
            sums.add("mw", batch, tiles.exp_avgs, tiles.params)
            sums.add("gw", batch, tiles.grads, tiles.params)
            sums.add_squares("ww", batch, tiles.params)
        return sums.vectors()

    def commit(self, tiles: Tiles, decay: Decay, coefficients: Coefficients) -> None:
        weight, moment, gradient = _update_factors(coefficients)
        gain, skip = coefficients.gain, coefficients.skip
        for batch in _batches(tiles, temporaries=gain is not None or skip is not None):
            grads = batch.wide(tiles.grads)
            if gain is not None:
                grads = list(torch._foreach_mul(grads, [gain] * len(grads)))
            weights = None if decay.weight is None else batch.wide(tiles.params)
            moments = batch.wide(tiles.exp_avgs, copy=skip is not None)
            _blend(moments, grads, weights, decay, batch)
            _update(tiles, batch, weight, [(moment, moments), (gradient, grads)], skip)
            _store_moments(tiles, batch, moments, early=False, skip=skip)


class _Batch(NamedTuple):
    """Indices of tensors that are worked on together, and the dtype to widen them to (``None``: none needed)."""

    indices: Sequence[int]
    dtype: torch.dtype | None

    def wide(self, tensors: Sequence[Tensor], copy: bool = False) -> list[Tensor]:
        """The batch's tensors in the dtype of the arithmetic; themselves where they have it, unless ``copy``."""
        if self.dtype is None and not copy:
            return [tensors[i] for i in self.indices]
        return [tensors[i].to(self.dtype or tensors[i].dtype, copy=copy) for i in self.indices]


def _batches(tiles: Tiles, temporaries: bool = False) -> Iterator[_Batch]:
    """Tensors to work on together: any number that are updated where they lie, others up to ``CHUNK`` elements.

    ``temporaries``: none is updated where it lies.
    """
    begun: dict[torch.dtype | None, tuple[list[int], int]] = {}
    for i, (w, g, m) in enumerate(zip(tiles.params, tiles.grads, tiles.exp_avgs, strict=True)):
        wide = _WIDE[w.dtype]
        dtype = None if not temporaries and w.dtype == g.dtype == m.dtype == wide else wide
        indices, size = begun.get(dtype, ([], 0))
        if dtype is not None and indices and size + w.numel() > CHUNK:
            yield _Batch(indices, dtype)
            indices, size = [], 0
        indices.append(i)
        begun[dtype] = (indices, size + w.numel())
    for dtype, (indices, _) in begun.items():
        yield _Batch(indices, dtype)


class _Table:
    """Collects sums tensor by tensor, in any order, and stacks them into vectors."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._columns: dict[str, dict[int, Tensor]] = {}

    def add(self, name: str, batch: _Batch, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
        column = self._columns.setdefault(name, {})
        for i, a, b in zip(batch.indices, left, right, strict=True):
            column[i] = dot(a, b)

    def add_squares(self, name: str, batch: _Batch, tensors: Sequence[Tensor]) -> None:
        column = self._columns.setdefault(name, {})
        small = [at for at, x in enumerate(tensors) if x.numel() <= TILE]
        if small:
            norms = torch._foreach_norm([tensors[at] for at in small], 2, sum_dtype(tensors[0].device))
            for at, norm in zip(small, torch.stack(norms).square().unbind(), strict=True):
                column[batch.indices[at]] = norm
        for i, x in zip(batch.indices, tensors, strict=True):
            if x.numel() > TILE:
                column[i] = dot(x, x)

    def vectors(self) -> Sums:
        return Sums(
            **{name: torch.stack([column[i] for i in range(self._size)]) for name, column in self._columns.items()}
        )


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a·b over all elements, 0-dimensional: float64 products, added in an order that threads do not change.

    ``a`` and ``b`` have one shape; memory for the products of ``CHUNK`` elements is taken at a time.
    """
    if a.numel() <= TILE:
        return _products(a, b).sum()
    chunks = zip(a.reshape(-1).split(CHUNK), b.reshape(-1).split(CHUNK), strict=True)
    return _ordered_sum(torch.stack([_ordered_sum(_products(x, y, a is b)) for x, y in chunks]))


def _products(a: Tensor, b: Tensor, square: bool = False) -> Tensor:
    dtype = sum_dtype(a.device)
    x = a.to(dtype)
    return x.square() if square or a is b else x * b.to(dtype)


def _ordered_sum(x: Tensor) -> Tensor:
    if x.numel() <= TILE:
        return x.sum()
    whole = x.numel() // TILE * TILE
    rows = x[:whole].view(-1, TILE).sum(1)
    return _ordered_sum(torch.cat((rows, x[whole:].sum().view(1))))


def _blend(
    moments: list[Tensor], grads: list[Tensor], weights: list[Tensor] | None, decay: Decay, batch: _Batch
) -> None:
    """``m' = decay.moment·m + decay.gradient·g + decay.weight·w``, in place."""
    torch._foreach_mul_(moments, [decay.moment[i] for i in batch.indices])
    _add(moments, grads, [decay.gradient[i] for i in batch.indices])
    if weights is not None and decay.weight is not None:
        _add(moments, weights, [decay.weight[i] for i in batch.indices])


def _add(targets: list[Tensor], terms: list[Tensor], factors: list[float]) -> None:
    if len(set(factors)) == 1:
        torch._foreach_add_(targets, terms, alpha=factors[0])
        return
    for target, term, factor in zip(targets, terms, factors, strict=True):
        target.add_(term, alpha=factor)


def _store_moments(
    tiles: Tiles, batch: _Batch, moments: list[Tensor], *, early: bool, skip: Tensor | None = None
) -> list[Tensor]:
    """Write the moments to their places unless ``skip``; return what was written, as wide as it came.

    ``early``: the step counts have not advanced yet.
    """
    stored = []
    for i, moment in zip(batch.indices, moments, strict=True):
        m, rounded = tiles.exp_avgs[i], moment
        if m is not moment:
            if m.dtype == torch.bfloat16:
                step = tiles.steps[i] + 1 if early else tiles.steps[i]
                rounded = round_stochastic(moment, random_bits(m, step, tiles.ordinals[i]))
            _write(m, rounded, skip)
        stored.append(moment if rounded is moment else rounded.to(moment.dtype))
    return stored


def _update(
    tiles: Tiles,
    batch: _Batch,
    weight: _Factors,
    terms: Sequence[tuple[_Factors, list[Tensor]]],
    skip: Tensor | None = None,
) -> None:
    """``w' = weight·w + Σ factor·term``, unless ``skip``.

    Where a compensation is kept, the weight is the pair w + kahan: w takes what fits into its 16 bits, kahan the rest.
    """
    values = batch.wide(tiles.params, copy=skip is not None)
    for i, value in zip(batch.indices, values, strict=True):
        kahan = tiles.kahans[i]
        if kahan is not None:
            value.add_(kahan)
    if weight is not None:
        torch._foreach_mul_(values, [weight[i] for i in batch.indices])
    for factors, tensors in terms:
        if factors is not None:
            torch._foreach_addcmul_(values, tensors, [factors[i] for i in batch.indices])
    for i, value in zip(batch.indices, values, strict=True):
        param, kahan = tiles.params[i], tiles.kahans[i]
        if param is value:
            continue
        rounded = value.to(param.dtype)
        if kahan is not None:
            _write(kahan, value - rounded, skip)
        _write(param, rounded, skip)


def _write(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    # A product with zero would let a NaN through; where() does not.
    if skip is None:
        target.copy_(value)
    else:
        torch.where(skip, target, value.to(target.dtype), out=target)


def _update_factors(coefficients: Coefficients) -> tuple[_Factors, _Factors, _Factors]:
    return _unbound(coefficients.weight), _unbound(coefficients.moment), _unbound(coefficients.gradient)


def _unbound(vector: Tensor | None) -> _Factors:
    return None if vector is None else vector.unbind()
