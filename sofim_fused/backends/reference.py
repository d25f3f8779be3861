"""The passes in pure PyTorch: they run wherever PyTorch runs and define what every other backend has to compute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sofim_fused import blockwise
from sofim_fused.backends.adaptive import TorchAdaptive, split, split_rows
from sofim_fused.backends.interface import (
    Coefficients,
    Decay,
    GradientStep,
    NativeInBackward,
    NativeSharded,
    NativeStep,
    ScaledSums,
    Scales,
    Squares,
    StepTensors,
    Sums,
    sum_dtype,
)
from sofim_fused.backends.master_bits import joined
from sofim_fused.backends.master_bits import split as split_weight
from sofim_fused.backends.rounding import other_random_bits, random_bits, random_bytes, round_stochastic
from sofim_fused.backends.solve import TILE, TorchSolve, ordered_sum
from sofim_fused.checks import RESTS

CHUNK = 256 * TILE  # elements for which temporaries are made at once: 32 MiB in float64
_WIDE = {  # the dtype of the arithmetic, by the parameter's
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}

_Factors = Sequence[Tensor] | None  # one 0-dimensional factor per tensor; None: the term is absent


class TorchAdaptivePasses(TorchAdaptive):
    """See :class:`sofim_fused.backends.interface.AdaptivePasses`: all of it in pure PyTorch, tensor by tensor."""

    def squares(self, tensors: StepTensors) -> Squares:
        none = torch.zeros(0, dtype=sum_dtype(tensors.device), device=tensors.device)
        totals, rows, cols = [none], [none], [none]
        for g, variance in zip(tensors.grads, tensors.variances, strict=True):
            if variance.row_var is None:
                totals.append(dot(g, g).view(1))
                continue
            by_row, by_col = _sums_of_squares(g, variance.col_var is not None)
            totals.append(ordered_sum(by_row).view(1))
            rows.append(by_row)
            cols.append(by_col)
        return Squares(torch.cat(totals), torch.cat(rows), torch.cat(cols))

    def accumulate_scaled(self, tensors: StepTensors, decay: Decay, scales: Scales) -> ScaledSums:
        diagonal = _Diagonal(tensors, scales)
        sums: list[list[Tensor]] = []
        for batch in _one_by_one(tensors):
            (i,) = batch.indices
            (g,), (m,) = _gained(batch.wide(tensors.grads), scales), batch.moments(tensors, copy=True)
            _blend([m], [g], None, decay, batch)
            (m,) = _store_moments(tensors, batch, [m], early=True, skip=scales.skip)
            inverse, trace = diagonal.enter(i, g, early=True)
            sums.append([dot(m, m * inverse), dot(g, m * inverse), trace])
        none = torch.zeros(3, 0, dtype=sum_dtype(tensors.device), device=tensors.device)
        return ScaledSums(*(torch.stack([torch.stack(each) for each in sums], 1) if sums else none))

    def apply_scaled(self, tensors: StepTensors, coefficients: Coefficients, scales: Scales) -> None:
        diagonal = _Diagonal(tensors, scales)
        update = _Update(coefficients.weight, coefficients.gradient, coefficients.moment, scales.skip)
        for batch in _one_by_one(tensors):
            (i,) = batch.indices
            grads = None if coefficients.gradient is None else _gained(batch.wide(tensors.grads), scales)
            update.run(tensors, batch, grads, batch.moments(tensors), diagonal.inverse(i))

    def commit_scaled(self, tensors: StepTensors, decay: Decay, coefficients: Coefficients, scales: Scales) -> None:
        diagonal = _Diagonal(tensors, scales)
        update = _Update(coefficients.weight, coefficients.gradient, coefficients.moment, scales.skip)
        for batch in _one_by_one(tensors):
            (i,) = batch.indices
            grads, moments = _gained(batch.wide(tensors.grads), scales), batch.moments(tensors, copy=True)
            _blend(moments, grads, None, decay, batch)
            inverse, _ = diagonal.enter(i, grads[0], early=False)
            update.run(tensors, batch, grads, moments, inverse)
            _store_moments(tensors, batch, moments, early=False, skip=scales.skip)


class ReferencePasses(TorchSolve, TorchAdaptivePasses):
    """See :class:`sofim_fused.backends.interface.Passes`.

    ``torch._foreach`` works on many tensors together: on all that are updated in place; and of those that need
    temporaries, on as many as have ``CHUNK`` elements together, or on a larger one alone.
    """

    name = "reference"
    emulated = False
    blockwise = True
    blockwise_variance = True

    def accumulate(self, tensors: StepTensors, decay: Decay, gradient_step: GradientStep | None = None) -> Sums:
        sums = _SumCollector(len(tensors))
        known = None if gradient_step is None else _Update(weight=gradient_step.weight, gradient=gradient_step.gradient)
        for batch in _batches(tensors, temporaries=known is not None and not known.in_place):
            grads = batch.wide(tensors.grads)
            weights = None if decay.weight is None else _weights(tensors, batch)
            moments = batch.moments(tensors)
            _blend(moments, grads, weights, decay, batch)
            stored = _store_moments(tensors, batch, moments, early=True)
            sums.add_squares("mm", batch, stored)
            if decay.cross:
                sums.add("mg", batch, stored, grads)
                if weights is not None:
                    sums.add("mw", batch, stored, weights)
            if known is not None:
                known.run(tensors, batch, grads, None, early=True)
        return sums.vectors()

    def apply(self, tensors: StepTensors, coefficients: Coefficients) -> None:
        update = _Update(coefficients.weight, coefficients.gradient, coefficients.moment)
        for batch in _batches(tensors, temporaries=not update.in_place):
            grads = None if coefficients.gradient is None else batch.wide(tensors.grads)
            update.run(tensors, batch, grads, batch.moments(tensors))

    def dots(self, tensors: StepTensors, decay: Decay) -> Sums:
        n = len(tensors)
        sums = _SumCollector(n)
        batch = _Batch(range(n), None)  # one batch for all tensors: sums widen what they need
        for part in _by_storage(tensors):
            grads, moments = part.wide(tensors.grads), part.moments(tensors)
            sums.add_squares("mm", part, moments)
            sums.add("mg", part, moments, grads)
        sums.add_squares("gg", batch, tensors.grads)
        if decay.weight is not None:
            # Whole weights and decoded moments are temporaries: of one tensor at a time.
            apart = [_is_master(tensors, i) or tensors.exp_avg_scales[i] is not None for i in range(n)]
            alone, others = ([i for i in range(n) if apart[i] is chosen] for chosen in (True, False))
            for each in [_Batch(others, None), *(_Batch([i], None) for i in alone)]:
                weights = _weights(tensors, each)
                sums.add("mw", each, each.moments(tensors), weights)
                sums.add("gw", each, each.wide(tensors.grads), weights)
                sums.add_squares("ww", each, weights)
        return sums.vectors()

    def commit(self, tensors: StepTensors, decay: Decay, coefficients: Coefficients) -> None:
        gain, skip = coefficients.gain, coefficients.skip
        update = _Update(coefficients.weight, coefficients.gradient, coefficients.moment, skip)
        for batch in _batches(tensors, temporaries=gain is not None or not update.in_place):
            grads = batch.wide(tensors.grads)
            if gain is not None:
                grads = list(torch._foreach_mul(grads, [gain] * len(grads)))
            weights = None if decay.weight is None else _weights(tensors, batch)
            moments = batch.moments(tensors, copy=skip is not None)
            _blend(moments, grads, weights, decay, batch)
            update.run(tensors, batch, grads, moments)
            _store_moments(tensors, batch, moments, early=False, skip=skip)

    def native_step(self) -> NativeStep:
        return lambda groups, state, grad_scale, found_inf, counter: None

    def native_sharded(self) -> NativeSharded | None:
        return None

    def native_in_backward(self) -> NativeInBackward | None:
        return None


class _Batch(NamedTuple):
    """Indices of tensors that are processed together, and the dtype to widen them to (``None``: not needed)."""

    indices: Sequence[int]
    dtype: torch.dtype | None

    def wide(self, tensors: Sequence[Tensor], copy: bool = False) -> list[Tensor]:
        """The batch's tensors in the dtype of the arithmetic; those that have it are not copied, unless ``copy``."""
        if self.dtype is None and not copy:
            return [tensors[i] for i in self.indices]
        return [tensors[i].to(self.dtype or tensors[i].dtype, copy=copy) for i in self.indices]

    def moments(self, tensors: StepTensors, copy: bool = False) -> list[Tensor]:
        """The batch's moments, likewise; those that are stored as codes are decoded."""
        found = []
        for i in self.indices:
            m, scale = tensors.exp_avgs[i], tensors.exp_avg_scales[i]
            if scale is not None:
                m = blockwise.decode(m, scale)
            elif self.dtype is not None or copy:
                m = m.to(self.dtype or m.dtype, copy=copy)
            found.append(m)
        return found


def _is_master(tensors: StepTensors, i: int) -> bool:
    rest = tensors.lost_bits[i]
    return rest is not None and rest.dtype in RESTS.values()


def _random_bytes(tensors: StepTensors, i: int, early: bool) -> Tensor:
    """What a weight of 24 bits is rounded by, numbered like its moment's bits (:func:`_store_moments`)."""
    m, step = tensors.exp_avgs[i], tensors.steps[i]
    like = m if tensors.exp_avg_scales[i] is None else m.contiguous()
    return random_bytes(like, step + 1 if early else step, tensors.ordinals[i])


def _weights(tensors: StepTensors, batch: _Batch, copy: bool = False) -> list[Tensor]:
    """The batch's weights in the dtype of the arithmetic, whole where more of their bits are kept.

    The bits that Kahan's compensation keeps are no part of them.
    """
    weights = []
    for i in batch.indices:
        w, rest = tensors.params[i], tensors.lost_bits[i]
        if rest is not None and _is_master(tensors, i):
            weights.append(joined(w, rest))
        else:
            weights.append(w if batch.dtype is None and not copy else w.to(batch.dtype or w.dtype, copy=copy))
    return weights


def _batches(tensors: StepTensors, temporaries: bool = False) -> Iterator[_Batch]:
    """Tensors to process together: any number of those that are updated in place, up to ``CHUNK`` elements of others.

    ``temporaries``: none is updated in place.
    """
    begun: dict[torch.dtype | None, tuple[list[int], int]] = {}
    for i, (w, g, m) in enumerate(zip(tensors.params, tensors.grads, tensors.exp_avgs, strict=True)):
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


def _by_storage(tensors: StepTensors) -> Iterator[_Batch]:
    """All tensors, to be read as they are; those with codes one by one, so that one is decoded at a time."""
    plain = [i for i, scale in enumerate(tensors.exp_avg_scales) if scale is None]
    if plain:
        yield _Batch(plain, None)
    for i, scale in enumerate(tensors.exp_avg_scales):
        if scale is not None:
            yield _Batch([i], None)


def _one_by_one(tensors: StepTensors) -> Iterator[_Batch]:
    """Each tensor alone, to be widened to the dtype of its arithmetic."""
    for i, w in enumerate(tensors.params):
        yield _Batch([i], _WIDE[w.dtype])


def _gained(grads: list[Tensor], scales: Scales) -> list[Tensor]:
    return grads if scales.gain is None else list(torch._foreach_mul(grads, [scales.gain] * len(grads)))


class _Diagonal:
    """1/s of each tensor in a step, in the dtype of the arithmetic, in a shape that broadcasts to that of w."""

    def __init__(self, tensors: StepTensors, scales: Scales) -> None:
        self._tensors = tensors
        self._scales = scales
        self._rows = split_rows(scales, tensors.variances)
        self._cols = split(scales.cols, [variance.col_var for variance in tensors.variances])
        self._trace, self._beta2, self._eps, self._scale = (
            x.unbind() for x in (scales.trace, scales.beta2, scales.eps, scales.root)
        )

    def enter(self, i: int, g: Tensor, *, early: bool) -> tuple[Tensor, Tensor]:
        """Update the running mean of g² of each element of tensor i, if it has one; return 1/s and Σs.

        ``early``: the step counts have not advanced yet; then s is that of the mean as stored, otherwise that before
        its rounding.
        """
        variance = self._tensors.variances[i]
        if variance.by_element:
            assert variance.variance is not None
            beta2 = self._beta2[i]
            old, entering = beta2.to(g.dtype), (1 - beta2).to(g.dtype)  # of β₂ as float32, 1 - β₂ may be zero
            v, scale = variance.variance, variance.scale
            mean = v if scale is None else blockwise.decode_squares(v, scale)
            # Saturated: from infinity it could never decay.
            new = (mean * old).addcmul_(g, g * entering).clamp_(max=torch.finfo(g.dtype).max)
            if scale is None:
                _write([v], [new], self._scales.skip)
                s = self._root(i, v.sqrt())
            else:
                step = self._tensors.steps[i] + 1 if early else self._tensors.steps[i]
                bits = other_random_bits(v.contiguous(), step, self._tensors.ordinals[i])
                codes, scales = blockwise.encode_squares(new, bits)
                _write([v.view(torch.uint8), scale], [codes.view(torch.uint8), scales], self._scales.skip)
                s = self._root(i, blockwise.decode(v, scale) if early else new.sqrt_())
            return s.reciprocal(), ordered_sum(s.to(sum_dtype(g.device)).reshape(-1))
        return self.inverse(i), self._trace[i]

    def _root(self, i: int, root: Tensor) -> Tensor:
        """S from the root of the mean, in its place."""
        return root.mul_(self._scale[i].to(root.dtype)).add_(self._eps[i].to(root.dtype))

    def inverse(self, i: int) -> Tensor:
        variance, dtype = self._tensors.variances[i], _WIDE[self._tensors.params[i].dtype]
        if variance.by_element:
            assert variance.variance is not None
            if variance.scale is not None:
                return self._root(i, blockwise.decode(variance.variance, variance.scale)).reciprocal_()
            return self._root(i, variance.variance.sqrt()).reciprocal_()
        rows = self._rows[i].to(dtype)
        if variance.row_var is None:
            return rows.view(())
        rows = rows.view(-1, *[1] * (self._tensors.params[i].dim() - 1))
        return rows if variance.col_var is None else rows * self._cols[i].to(dtype).view(variance.col_var.shape)


class _SumCollector:
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
    """The sum of a·b over all elements, 0-dimensional: float64 products, added in the same order for any thread count.

    ``a`` and ``b`` have the same shape. Products are made of ``CHUNK`` elements at a time, to limit memory.
    """
    if a.numel() <= TILE:
        return _products(a, b).sum()
    chunks = zip(a.reshape(-1).split(CHUNK), b.reshape(-1).split(CHUNK), strict=True)
    return ordered_sum(torch.stack([ordered_sum(_products(x, y, a is b)) for x, y in chunks]))


def _sums_of_squares(g: Tensor, columns: bool) -> tuple[Tensor, Tensor]:
    """Sums of g² over each row, and over each column if ``columns``: float64 vectors, the same for any thread count."""
    dtype, count, size = sum_dtype(g.device), g.shape[0], math.prod(g.shape[1:])
    cols = torch.zeros(size if columns else 0, dtype=dtype, device=g.device)
    rows = []
    for part in g.split(max(1, CHUNK // max(size, 1))):
        square = part.reshape(len(part), size).to(dtype).square()
        # Sums with several results are never divided among threads; one alone would be.
        rows.append(square.sum(1) if len(part) != 1 else ordered_sum(square.view(-1)).view(1))
        if columns:
            cols += square.sum(0) if size != 1 else ordered_sum(square.view(-1))
    return torch.cat(rows) if rows else cols.new_zeros(count), cols


def _products(a: Tensor, b: Tensor, square: bool = False) -> Tensor:
    dtype = sum_dtype(a.device)
    x = a.to(dtype)
    return x.square() if square or a is b else x * b.to(dtype)


def _blend(
    moments: list[Tensor], grads: list[Tensor], weights: list[Tensor] | None, decay: Decay, batch: _Batch
) -> None:
    """``m' = decay.moment·m + decay.gradient·g + decay.weight·w``, in place."""
    torch._foreach_mul_(moments, [decay.moment[i] for i in batch.indices])
    _add(moments, grads, [decay.gradient[i] for i in batch.indices])
    if weights is not None and decay.weight is not None:
        _add(moments, weights, [decay.weight[i] for i in batch.indices])


def _add(targets: list[Tensor], terms: list[Tensor], factors: list[float]) -> None:
    if factors[0] and len(set(factors)) == 1:
        torch._foreach_add_(targets, terms, alpha=factors[0])
        return
    for target, term, factor in zip(targets, terms, factors, strict=True):
        if factor:  # zero times an infinite term would be NaN
            target.add_(term, alpha=factor)


def _store_moments(
    tensors: StepTensors, batch: _Batch, moments: list[Tensor], *, early: bool, skip: Tensor | None = None
) -> list[Tensor]:
    """Store the moments, unless ``skip``; return the stored values in the dtype of the arithmetic.

    ``early``: the step counts have not advanced yet.
    """
    targets, rounded = [], []
    for i, moment in zip(batch.indices, moments, strict=True):
        m = tensors.exp_avgs[i]
        if m is moment:
            continue
        scale = tensors.exp_avg_scales[i]
        if scale is not None:
            step = tensors.steps[i] + 1 if early else tensors.steps[i]
            # Numbered as in a contiguous tensor, like the blocks: the state of a tensor in another order is the same.
            codes, scales = blockwise.encode(moment, random_bits(m.contiguous(), step, tensors.ordinals[i]))
            # As integers: not every device compares or selects numbers of 8 bits.
            targets += [m.view(torch.uint8), scale]
            rounded += [codes.view(torch.uint8), scales]
            continue
        targets.append(m)
        if m.dtype == torch.bfloat16:
            step = tensors.steps[i] + 1 if early else tensors.steps[i]
            rounded.append(round_stochastic(moment, random_bits(m, step, tensors.ordinals[i])))
        else:
            rounded.append(moment)
    if not targets:
        return moments
    _write(targets, rounded, skip)
    return batch.moments(tensors)


class _Update:
    """``w' = weight·w + gradient·g + moment·m``, unless ``skip``; a term without a coefficient is left out.

    If lost bits are kept, the weight is a float32 of which w is a part (:mod:`.master_bits`), or the sum w + lost
    (Kahan): w has what fits into its 16 bits, lost has the rest. A rest above half an ulp of w cannot be its own (w was
    replaced from outside) and is dropped.
    """

    def __init__(
        self,
        weight: Tensor | None,
        gradient: Tensor | None,
        moment: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        self._weight, self._gradient, self._moment = map(_unbound, (weight, gradient, moment))
        self._skip = skip
        # A gradient may share the parameter's memory, and has to be read before that is written.
        self.in_place = skip is None and (weight is None or gradient is None)

    def run(
        self,
        tensors: StepTensors,
        batch: _Batch,
        grads: list[Tensor] | None,
        moments: list[Tensor] | None,
        inverse: Tensor | None = None,
        *,
        early: bool = False,
    ) -> None:
        """Update the weights of a batch.

        ``inverse``: of a single tensor, which its two terms are multiplied by. ``early``: the step counts have not
        advanced yet.
        """
        values = _weights(tensors, batch, copy=not self.in_place)
        for i, value in zip(batch.indices, values, strict=True):
            lost = tensors.lost_bits[i]
            if lost is not None and not _is_master(tensors, i):
                half_ulp = value.abs().mul_(torch.finfo(lost.dtype).eps / 2)
                value.add_(torch.where(lost.abs() <= half_ulp, lost, 0.0))
        if self._weight is not None:
            torch._foreach_mul_(values, [self._weight[i] for i in batch.indices])
        for factors, addends in ((self._gradient, grads), (self._moment, moments)):
            if factors is not None and addends is not None:
                if inverse is not None:
                    addends = [addends[0] * inverse]
                torch._foreach_addcmul_(values, addends, [factors[i] for i in batch.indices])
        targets: list[Tensor] = []
        written: list[Tensor] = []
        for i, value in zip(batch.indices, values, strict=True):
            param, lost = tensors.params[i], tensors.lost_bits[i]
            if param is value:
                continue
            if lost is not None and _is_master(tensors, i):
                targets += [param, lost]
                written += split_weight(value, _random_bytes(tensors, i, early) if lost.dtype == RESTS[24] else None)
                continue
            rounded = value.to(param.dtype)
            targets.append(param)
            written.append(rounded)
            if lost is not None:
                targets.append(lost)
                written.append(torch.where(torch.isfinite(rounded), value - rounded, 0.0).to(lost.dtype))
        _write(targets, written, self._skip)


def _write(targets: list[Tensor], values: list[Tensor], skip: Tensor | None) -> None:
    if skip is None:
        if targets:
            torch._foreach_copy_(targets, values)
        return
    for target, value in zip(targets, values, strict=True):
        # A product with zero would let a NaN through; where() does not.
        torch.where(skip, target, value, out=target)


def _unbound(vector: Tensor | None) -> _Factors:
    return None if vector is None else vector.unbind()
