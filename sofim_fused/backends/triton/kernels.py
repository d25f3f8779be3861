"""The passes as Triton kernels over a table of tensors; :mod:`sofim_fused.backends.triton` launches them.

One program works on one tile, ``TILE`` elements of one tensor: ``tile_of`` says of which, that tensor's row in ``rows``
(:mod:`sofim_fused.backends.triton.pack`) where it lies and of which kind it is. A kernel is compiled for the kinds that
a model has; a tile that is full is read and written without masks.

A pass that sums leaves one float64 per tile and sum in a slot. The program that ends a tensor's last tile adds up that
tensor's slots, in their order; the one that ends the last tensor goes on to the step's coefficients (``FINISH``). Which
program that is makes no difference to a bit of the result, and the host has nothing to wait for.

What the formulas mean, and why they look as they do, is said in :mod:`sofim_fused.step.solve` and
:mod:`sofim_fused.backends.interface`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sofim_fused.backends import rounding
from sofim_fused.backends.triton import pack

TILE = 4096  # elements; a power of two, so that the elements of a tile share the upper half of their index
NUM_WARPS = 8
SLOTS = 1024  # of a tensor, added up at once
LANES = 256  # tensors that are worked on at once: one per thread, or the registers of a sweep would not do
_SLOTS = tl.constexpr(SLOTS)
_LANES = tl.constexpr(LANES)

# Passes, and what follows the sums of a tensor. Triton reads globals that are wrapped; the host takes the numbers.
ACCUMULATE, APPLY, DOTS, COMMIT = range(4)
SUMS_ONLY, PLAIN, GUARDED = range(3)
_ACCUMULATE = tl.constexpr(ACCUMULATE)
_APPLY = tl.constexpr(APPLY)
_DOTS = tl.constexpr(DOTS)
_SUMS_ONLY = tl.constexpr(SUMS_ONLY)
_PLAIN = tl.constexpr(PLAIN)
_GUARDED = tl.constexpr(GUARDED)

# Rows of the sums.
SUMS = 6
_SUMS = tl.constexpr(SUMS)
_MM = tl.constexpr(0)
_MG = tl.constexpr(1)
_GG = tl.constexpr(2)
_MW = tl.constexpr(3)
_GW = tl.constexpr(4)
_WW = tl.constexpr(5)

# Rows of the coefficients, one value per tensor; behind them, single values.
UPDATES = 3
EXTRAS = 2
_UPDATES = tl.constexpr(UPDATES)
_EXTRAS = tl.constexpr(EXTRAS)
_BY_WEIGHT = tl.constexpr(0)
_BY_GRADIENT = tl.constexpr(1)
_BY_MOMENT = tl.constexpr(2)
_GAIN = tl.constexpr(0)
_SKIP = tl.constexpr(1)

# Columns of a tensor's row, and of a group's hyperparameters.
_COLUMNS = tl.constexpr(pack.COLUMNS)
_W = tl.constexpr(pack.W)
_G = tl.constexpr(pack.G)
_M = tl.constexpr(pack.M)
_KAHAN = tl.constexpr(pack.KAHAN)
_STEP = tl.constexpr(pack.STEP)
_NUMEL = tl.constexpr(pack.NUMEL)
_ORDINAL = tl.constexpr(pack.ORDINAL)
_KIND = tl.constexpr(pack.KIND)
_GROUP = tl.constexpr(pack.GROUP)
_FIRST = tl.constexpr(pack.FIRST)
_HYPERS = tl.constexpr(pack.HYPERS)
_LR = tl.constexpr(pack.LR)
_MOMENTUM = tl.constexpr(pack.MOMENTUM)
_RHO = tl.constexpr(pack.RHO)
_WEIGHT_DECAY = tl.constexpr(pack.WEIGHT_DECAY)
_L2 = tl.constexpr(pack.L2)
_SIGN = tl.constexpr(pack.SIGN)
_DECAY_M = tl.constexpr(pack.DECAY_M)
_DECAY_G = tl.constexpr(pack.DECAY_G)
_DECAY_W = tl.constexpr(pack.DECAY_W)

# Columns of the first row of hyperparameters, which holds for all groups: the limit of the gradients' norm, what the
# gradients were multiplied by, whether one of them was found not to be finite, and whether that is to be looked for.
LIMIT, GRAD_SCALE, FOUND_INF, SKIP_NONFINITE = range(4)
_LIMIT = tl.constexpr(LIMIT)
_GRAD_SCALE = tl.constexpr(GRAD_SCALE)
_FOUND_INF = tl.constexpr(FOUND_INF)
_SKIP_NONFINITE = tl.constexpr(SKIP_NONFINITE)

_SEED = tl.constexpr(rounding.SEED)
_WEYL = tl.constexpr(rounding.WEYL)
_CANCELLED = tl.constexpr(2.0**-46)  # (2 ulp of float32 arithmetic)², as in sofim_fused/step/solve.py
_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
# The interpreter cuts off what it should round, and stumbles over subnormal numbers.
_EMULATED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_UPPER = tl.constexpr(0xFFFF0000)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)


# A kind, bit by bit: what a tensor's storage types are.


@triton.jit
def _typed(address, TYPE: tl.constexpr, UNALIGNED: tl.constexpr):
    """An address as a pointer to a storage type; a hint on the integer would be lost in the cast."""
    if TYPE == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif TYPE == 1:
        pointer = address.to(tl.pointer_type(tl.float64))
    elif TYPE == 2:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
    if not UNALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _weights(row, at, KIND: tl.constexpr):
    return _typed(tl.load(row + _W), KIND & 3, (KIND >> 5) & 1) + at


@triton.jit
def _lost(row, at, KIND: tl.constexpr):
    return _typed(tl.load(row + _KAHAN), KIND & 3, (KIND >> 5) & 1) + at


@triton.jit
def _gradients(row, at, KIND: tl.constexpr):
    if (KIND >> 2) & 1:
        pointer = _typed(tl.load(row + _G), 0, (KIND >> 5) & 1)
    else:
        pointer = _typed(tl.load(row + _G), KIND & 3, (KIND >> 5) & 1)
    return pointer + at


@triton.jit
def _moments(row, at, KIND: tl.constexpr):
    if (KIND >> 3) & 1:
        pointer = _typed(tl.load(row + _M), 2, (KIND >> 5) & 1)
    elif KIND & 3 == 1:
        pointer = _typed(tl.load(row + _M), 1, (KIND >> 5) & 1)
    else:
        pointer = _typed(tl.load(row + _M), 0, (KIND >> 5) & 1)
    return pointer + at


@triton.jit
def _wide(x, KIND: tl.constexpr):
    """In the type of the arithmetic: float64 for float64 parameters, else float32."""
    if KIND & 3 == 1:
        y = x.to(tl.float64)
    elif _EMULATED and x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def _bfloat16(x):
    """A float32 rounded to nearest, ties to even."""
    if _EMULATED:
        bits = x.to(tl.uint32, bitcast=True)
        raised = bits + ((bits >> 16) & 1) + 0x7FFF
        quiet = bits | 0x00400000  # a NaN
        bits = tl.where((bits & _MAGNITUDE) > _INFINITY_BITS, quiet, raised)
        y = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(tl.bfloat16)
    return y


# Elements in memory: a full tile without masks, in accesses of 128 bits. bench/kernels.py finds them by their names.


@triton.jit
def _load_full(pointer, lanes):
    return tl.load(pointer + lanes)


@triton.jit
def _load_tail(pointer, lanes, left):
    return tl.load(pointer + lanes, mask=lanes < left, other=0.0)


@triton.jit
def _store_full(pointer, x, lanes):
    tl.store(pointer + lanes, x)


@triton.jit
def _store_tail(pointer, x, lanes, left):
    tl.store(pointer + lanes, x, mask=lanes < left)


@triton.jit
def _load(pointer, lanes, left, KIND: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        x = _load_full(pointer, lanes)
    else:
        x = _load_tail(pointer, lanes, left)
    return _wide(x, KIND)


@triton.jit
def _store(pointer, x, lanes, left, FULL: tl.constexpr):
    if FULL:
        _store_full(pointer, x, lanes)
    else:
        _store_tail(pointer, x, lanes, left)


@triton.jit
def _mixed(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _rounded(value, row, update, at, lanes):
    """The bits of float32 values, rounded to those of a bfloat16 (the lower half zero) with random bits.

    ``sofim_fused/backends/rounding.py`` defines them. Infinities and NaN stay what they are: nothing is cut off.
    """
    ordinal = tl.load(row + _ORDINAL).to(tl.uint32)
    key = _mixed(_mixed(ordinal * _WEYL + _SEED) ^ update.to(tl.uint32))
    stretch = _mixed(key ^ (at >> 32).to(tl.uint32))
    place = (at.to(tl.uint32) + lanes.to(tl.uint32)) * _WEYL
    bits = value.to(tl.uint32, bitcast=True)
    raised = bits + (_mixed(place + stretch) >> 16)
    return tl.where((bits & _MAGNITUDE) < _INFINITY_BITS, raised, bits) & _UPPER


@triton.jit
def _factor(address, KIND: tl.constexpr):
    return _wide(tl.load(address), KIND)


@triton.jit
def _new_moment(m, v, weight, group, KIND: tl.constexpr, L2: tl.constexpr):
    """The first moment before it is stored; ``weight`` is read with L2 decay alone."""
    moment = tl.fma(v, _factor(group + _DECAY_G, KIND), m * _factor(group + _DECAY_M, KIND))
    if L2:
        # A zero factor adds no term: zero times an infinite weight would be NaN.
        by_weight = _factor(group + _DECAY_W, KIND)
        moment = tl.where(by_weight != 0, tl.fma(weight, by_weight, moment), moment)
    return moment


@triton.jit
def _store_moment(pointer, moment, row, ahead, at, lanes, left, KIND: tl.constexpr, FULL: tl.constexpr):
    """Store the first moment and return it as stored; ``ahead``: how many updates the step count is behind."""
    if (KIND >> 3) & 1:
        update = tl.load(tl.load(row + _STEP).to(tl.pointer_type(tl.int64))) + ahead
        bits = _rounded(moment, row, update, at, lanes)
        _store(pointer, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), lanes, left, FULL)
        stored = bits.to(tl.float32, bitcast=True)
    else:
        _store(pointer, moment, lanes, left, FULL)
        stored = moment
    return stored


@triton.jit
def _update(
    w, v, m, row, coefs, tensors, at, lanes, left,
    KIND: tl.constexpr, FULL: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Take a step with the weights, and with the bits that they lost; ``v`` and ``m`` enter as ``V`` and ``M`` say."""
    if (KIND >> 4) & 1:
        if KIND & 3 == 2:
            half_eps: tl.constexpr = 0.00390625
        else:
            half_eps: tl.constexpr = 0.00048828125
        lost = _lost(row, at, KIND)
        kahan = _load(lost, lanes, left, KIND, FULL)
        # Above half an ulp it is none of w's bits: w was replaced from outside.
        w += tl.where(tl.abs(kahan) <= tl.abs(w) * half_eps, kahan, 0.0)
    w *= _factor(coefs + _BY_WEIGHT * tensors, KIND)
    if V:
        w = tl.fma(v, _factor(coefs + _BY_GRADIENT * tensors, KIND), w)
    if M:
        w = tl.fma(m, _factor(coefs + _BY_MOMENT * tensors, KIND), w)
    if KIND & 3 == 2:
        rounded = _bfloat16(w)
    elif KIND & 3 == 3:
        rounded = w.to(tl.float16)
    else:
        rounded = w
    _store(_weights(row, at, KIND), rounded, lanes, left, FULL)
    if (KIND >> 4) & 1:
        kept = _wide(rounded, KIND)
        rest = tl.where(tl.abs(kept) <= _FLOAT32_MAX, w - kept, 0.0)
        if KIND & 3 == 2:
            _store(lost, _bfloat16(rest), lanes, left, FULL)
        else:
            _store(lost, rest.to(tl.float16), lanes, left, FULL)


@triton.jit
def _sum(slot, a, b):
    """Put the dot product of a tile into its slot; masked elements are zero."""
    tl.store(slot, tl.sum(a.to(tl.float64) * b.to(tl.float64), 0))


# The passes over one tile.


@triton.jit
def _accumulate(
    row, group, coefs, tensors, slot, tiles, at, lanes, left,
    KIND: tl.constexpr, FULL: tl.constexpr, L2: tl.constexpr, CROSS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    m_pointer = _moments(row, at, KIND)
    m = _load(m_pointer, lanes, left, KIND, FULL)
    g = _load(_gradients(row, at, KIND), lanes, left, KIND, FULL)
    if L2 or GRADIENT:
        w = _load(_weights(row, at, KIND), lanes, left, KIND, FULL)
    else:
        w = m
    m = _store_moment(m_pointer, _new_moment(m, g, w, group, KIND, L2), row, 1, at, lanes, left, KIND, FULL)
    if not FULL:
        m = tl.where(lanes < left, m, 0.0)  # rounding makes something of nothing
    _sum(slot + _MM * tiles, m, m)
    if CROSS:
        _sum(slot + _MG * tiles, m, g)
        if L2:
            _sum(slot + _MW * tiles, m, w)
    if GRADIENT:
        _update(w, g, m, row, coefs, tensors, at, lanes, left, KIND, FULL, True, False)


@triton.jit
def _apply(
    row, coefs, tensors, at, lanes, left, KIND: tl.constexpr, FULL: tl.constexpr, GRADIENT: tl.constexpr
):  # fmt: skip
    m = _load(_moments(row, at, KIND), lanes, left, KIND, FULL)
    if GRADIENT:
        g = _load(_gradients(row, at, KIND), lanes, left, KIND, FULL)
    else:
        g = m
    w = _load(_weights(row, at, KIND), lanes, left, KIND, FULL)
    _update(w, g, m, row, coefs, tensors, at, lanes, left, KIND, FULL, GRADIENT, True)


@triton.jit
def _dots(row, slot, tiles, at, lanes, left, KIND: tl.constexpr, FULL: tl.constexpr, L2: tl.constexpr):
    m = _load(_moments(row, at, KIND), lanes, left, KIND, FULL)
    g = _load(_gradients(row, at, KIND), lanes, left, KIND, FULL)
    _sum(slot + _MM * tiles, m, m)
    _sum(slot + _MG * tiles, m, g)
    _sum(slot + _GG * tiles, g, g)
    if L2:
        w = _load(_weights(row, at, KIND), lanes, left, KIND, FULL)
        _sum(slot + _MW * tiles, m, w)
        _sum(slot + _GW * tiles, g, w)
        _sum(slot + _WW * tiles, w, w)


@triton.jit
def _commit(
    row, group, coefs, tensors, extras, at, lanes, left,
    KIND: tl.constexpr, FULL: tl.constexpr, L2: tl.constexpr, GRADIENT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    m_pointer = _moments(row, at, KIND)
    m = _load(m_pointer, lanes, left, KIND, FULL)
    v = _load(_gradients(row, at, KIND), lanes, left, KIND, FULL)
    if SCALED:
        v *= _factor(extras + _GAIN, KIND)
    w = _load(_weights(row, at, KIND), lanes, left, KIND, FULL)
    m = _new_moment(m, v, w, group, KIND, L2)
    _store_moment(m_pointer, m, row, 0, at, lanes, left, KIND, FULL)
    _update(w, v, m, row, coefs, tensors, at, lanes, left, KIND, FULL, GRADIENT, True)


@triton.jit
def _run(
    row, group, coefs, tensors, extras, slot, tiles, at, left,
    PASS: tl.constexpr, KIND: tl.constexpr, FULL: tl.constexpr, L2: tl.constexpr, CROSS: tl.constexpr,
    GRADIENT: tl.constexpr, SCALED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, SIZE)
    if PASS == _ACCUMULATE:
        _accumulate(row, group, coefs, tensors, slot, tiles, at, lanes, left, KIND, FULL, L2, CROSS, GRADIENT)
    elif PASS == _APPLY:
        _apply(row, coefs, tensors, at, lanes, left, KIND, FULL, GRADIENT)
    elif PASS == _DOTS:
        _dots(row, slot, tiles, at, lanes, left, KIND, FULL, L2)
    else:
        _commit(row, group, coefs, tensors, extras, at, lanes, left, KIND, FULL, L2, GRADIENT, SCALED)


@triton.jit
def _run_any(
    row, group, coefs, tensors, extras, slot, tiles, at, left,
    PASS: tl.constexpr, KIND: tl.constexpr, L2: tl.constexpr, CROSS: tl.constexpr, GRADIENT: tl.constexpr,
    SCALED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A tile of one kind, full or not."""
    if left >= SIZE:
        _run(
            row, group, coefs, tensors, extras, slot, tiles, at, left,
            PASS, KIND, True, L2, CROSS, GRADIENT, SCALED, SIZE,
        )  # fmt: skip
    else:
        _run(
            row, group, coefs, tensors, extras, slot, tiles, at, left,
            PASS, KIND, False, L2, CROSS, GRADIENT, SCALED, SIZE,
        )  # fmt: skip


@triton.jit
def _tile(
    tile, rows, tile_of, hyper, coefs, slots, tensors, tiles,
    PASS: tl.constexpr, KINDS: tl.constexpr, N_KINDS: tl.constexpr, L2: tl.constexpr, CROSS: tl.constexpr,
    GRADIENT: tl.constexpr, SCALED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One pass over one tile of any kind; returns the tensor that it belongs to."""
    tensor = tl.load(tile_of + tile).to(tl.int64)
    row = rows + tensor * _COLUMNS
    group = hyper + (tl.load(row + _GROUP) + 1) * _HYPERS
    at = (tile - tl.load(row + _FIRST)) * SIZE
    left = tl.load(row + _NUMEL) - at
    extras = coefs + _UPDATES * tensors
    if N_KINDS == 1:
        _run_any(
            row, group, coefs + tensor, tensors, extras, slots + tile, tiles, at, left,
            PASS, KINDS, L2, CROSS, GRADIENT, SCALED, SIZE,
        )  # fmt: skip
    else:
        kind = tl.load(row + _KIND)
        for i in tl.static_range(N_KINDS):
            if kind == (KINDS >> (8 * i)) & 255:
                _run_any(
                    row, group, coefs + tensor, tensors, extras, slots + tile, tiles, at, left,
                    PASS, (KINDS >> (8 * i)) & 255, L2, CROSS, GRADIENT, SCALED, SIZE,
                )  # fmt: skip
    return tensor


# Sums to coefficients.


@triton.jit
def _is_last(counter, total):
    """Whether all but this program have come here; what they wrote before can then be read."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == total - 1
    if last:
        tl.store(counter, 0)  # for the next launch
    tl.debug_barrier()
    return last


@triton.jit
def _load_cg(address, mask):
    """Read what other programs wrote in this launch: not from a cache that they do not share."""
    return tl.load(address, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _add_up(slots, sums, row, tensor, tensors, tiles, SUM: tl.constexpr, SIZE: tl.constexpr):
    """One sum of a tensor from its tiles."""
    first = tl.load(row + _FIRST)
    count = tl.maximum((tl.load(row + _NUMEL) + SIZE - 1) // SIZE, 1)
    lanes = tl.arange(0, _SLOTS)
    total = tl.zeros([_SLOTS], tl.float64)
    for start in range(0, count, _SLOTS):
        total += _load_cg(slots + SUM * tiles + first + start + lanes, start + lanes < count)
    tl.store(sums + SUM * tensors + tensor, tl.sum(total, 0))


@triton.jit
def _correction(momentum, update):
    """1/(1 - β^t), accurate where β^t is close to 1.

    u - 1 has lost digits there, and ln u the same ones (Kahan; see Higham, Accuracy and Stability of Numerical
    Algorithms, 1.14.1).
    """
    x = update.to(tl.float64) * tl.log(momentum)
    u = tl.exp(x)
    near = tl.where(u == 1.0, -x, (1.0 - u) * x / tl.log(tl.where((u < 1.0) & (u > 0.0), u, 0.5)))
    return 1.0 / tl.where(u < 0.5, 1.0 - u, near)


@triton.jit
def _finite(x):
    """As a float32, a larger coefficient would be infinite, and its product with a zero moment NaN."""
    return tl.where(x > _FLOAT32_MAX, _FLOAT32_MAX, tl.where(x < -_FLOAT32_MAX, -_FLOAT32_MAX, x))


@triton.jit
def _decayed(l2, sums):
    """0 where there is no L2 decay, whatever the sum: weights may be infinite there."""
    return tl.where(l2 == 0.0, 0.0, l2 * sums)


@triton.jit
def _parts(
    rows, hyper, sums, tensors, at, mask, gain,
    FINISH: tl.constexpr, L2: tl.constexpr, CROSS: tl.constexpr,
):  # fmt: skip
    """What tensors add to their Fisher block: to S, to what S would be if nothing cancelled, and to P.

    Also the tensors' bias correction, and the address of their hyperparameters.
    """
    row = rows + at * _COLUMNS
    group = hyper + (tl.load(row + _GROUP, mask=mask, other=0) + 1) * _HYPERS
    steps = tl.load(row + _STEP, mask=mask, other=0).to(tl.pointer_type(tl.int64))
    update = tl.load(steps, mask=mask, other=0) + 1
    momentum = tl.load(group + _MOMENTUM, mask=mask, other=0.0)
    correction = _correction(momentum, update)
    rate = correction / tl.load(group + _RHO, mask=mask, other=1.0)
    sign = tl.load(group + _SIGN, mask=mask, other=0.0)
    mm = _load_cg(sums + _MM * tensors + at, mask)
    scale = tl.zeros_like(mm)
    cross = tl.zeros_like(mm)
    if L2:
        l2 = tl.load(group + _L2, mask=mask, other=0.0)
    if FINISH == _PLAIN:
        square = rate * correction * mm
        if CROSS:
            mv = sign * _load_cg(sums + _MG * tensors + at, mask)
            if L2:
                mv += _decayed(l2, _load_cg(sums + _MW * tensors + at, mask))
            cross = rate * mv
    else:
        taken = 1.0 - momentum
        # A norm that overflows makes the clip factor zero and some sums infinite.
        mv = tl.where(gain == 0.0, 0.0, gain * sign * _load_cg(sums + _MG * tensors + at, mask))
        gg = tl.where(gain == 0.0, 0.0, gain * gain * _load_cg(sums + _GG * tensors + at, mask))
        vv = gg
        still = momentum * tl.sqrt(mm)
        if L2:
            ww = _decayed(l2 * l2, _load_cg(sums + _WW * tensors + at, mask))
            gw = _decayed(l2, _load_cg(sums + _GW * tensors + at, mask))
            mv += _decayed(l2, _load_cg(sums + _MW * tensors + at, mask))
            vv += ww + tl.where(gain == 0.0, 0.0, 2.0 * gain * sign * gw)
            still += taken * tl.sqrt(ww)
        most = still + taken * tl.sqrt(gg)
        square = rate * correction * (momentum * momentum * mm + 2.0 * momentum * taken * mv + taken * taken * vv)
        scale = rate * correction * most * most
        if CROSS:
            cross = rate * (momentum * mv + taken * vv)
    return tl.where(mask, square, 0.0), tl.where(mask, scale, 0.0), tl.where(mask, cross, 0.0), correction, group


@triton.jit
def _set_update(
    rows, group, coefs, tensors, at, mask, correction, norm, scale, cross, skip,
    FINISH: tl.constexpr, L2: tl.constexpr, CROSS: tl.constexpr,
):  # fmt: skip
    """The Sherman-Morrison step of tensors, from S and P of their block; and one more update is counted."""
    if FINISH == _GUARDED:
        norm = tl.where(norm < _CANCELLED * scale, _CANCELLED * scale, norm)
    lr = tl.load(group + _LR, mask=mask, other=0.0)
    rho = tl.load(group + _RHO, mask=mask, other=1.0)
    shrink = correction / (rho * (1.0 + norm))
    by_weight = 1.0 - lr * tl.load(group + _WEIGHT_DECAY, mask=mask, other=0.0)
    if CROSS:
        if L2:
            by_weight -= lr / rho * tl.load(group + _L2, mask=mask, other=0.0)
        by_gradient = _finite(-(lr / rho) * tl.load(group + _SIGN, mask=mask, other=0.0))
        tl.store(coefs + _BY_GRADIENT * tensors + at, by_gradient, mask=mask)
        by_moment = lr * shrink * cross
    else:
        by_moment = -lr * shrink
    tl.store(coefs + _BY_WEIGHT * tensors + at, by_weight, mask=mask)
    tl.store(coefs + _BY_MOMENT * tensors + at, _finite(by_moment), mask=mask)
    steps = tl.load(rows + at * _COLUMNS + _STEP, mask=mask, other=0).to(tl.pointer_type(tl.int64))
    tl.store(steps, tl.load(steps, mask=mask, other=0) + (1.0 - skip).to(tl.int64), mask=mask)


@triton.jit
def _guard(
    hyper, sums, coefs, outcome, tensors, CLIP: tl.constexpr, SKIP: tl.constexpr
):  # fmt: skip
    """The gradients' norm without their scale, what they are to be multiplied by, and whether to skip the step."""
    lanes = tl.arange(0, _LANES)
    total = tl.zeros([_LANES], tl.float64)
    for start in range(0, tensors, _LANES):
        total += _load_cg(sums + _GG * tensors + start + lanes, start + lanes < tensors)
    norm = tl.sqrt(tl.sum(total, 0))
    gain = tl.full([], 1.0, tl.float64)
    if CLIP:
        unscale = 1.0 / tl.load(hyper + _GRAD_SCALE)
        limit = tl.load(hyper + _LIMIT)
        norm *= unscale
        gain = tl.where(norm > limit, limit / norm, gain) * unscale
    skip = tl.full([], 0.0, tl.float64)
    if SKIP:
        fine = (tl.load(hyper + _SKIP_NONFINITE) == 0.0) | (tl.abs(norm) < float("inf"))
        skip = tl.where(fine & (tl.load(hyper + _FOUND_INF) == 0.0), skip, 1.0)
    extras = coefs + _UPDATES * tensors
    tl.store(extras + _GAIN, gain)
    tl.store(extras + _SKIP, skip)
    tl.store(outcome, norm)
    tl.store((outcome + 1).to(tl.pointer_type(tl.int64)), skip.to(tl.int64))
    return gain, skip


@triton.jit
def _finish(
    rows, bounds, hyper, sums, coefs, outcome, tensors, blocks,
    FINISH: tl.constexpr, L2: tl.constexpr, CROSS: tl.constexpr, PER_TENSOR: tl.constexpr, CLIP: tl.constexpr,
    SKIP: tl.constexpr,
):  # fmt: skip
    """Coefficients of every tensor from the sums of all."""
    gain = tl.full([], 1.0, tl.float64)
    skip = tl.full([], 0.0, tl.float64)
    if FINISH == _GUARDED:
        gain, skip = _guard(hyper, sums, coefs, outcome, tensors, CLIP, SKIP)
    lanes = tl.arange(0, _LANES)
    if PER_TENSOR:
        for start in range(0, tensors, _LANES):
            at = (start + lanes).to(tl.int64)
            mask = at < tensors
            square, scale, cross, correction, group = _parts(
                rows, hyper, sums, tensors, at, mask, gain, FINISH, L2, CROSS
            )
            _set_update(
                rows, group, coefs, tensors, at, mask, correction, square, scale, cross, skip, FINISH, L2, CROSS
            )
    else:
        for block in range(blocks):
            first = tl.load(bounds + block)
            end = tl.load(bounds + block + 1)
            norms = tl.zeros([_LANES], tl.float64)
            scales = tl.zeros([_LANES], tl.float64)
            crosses = tl.zeros([_LANES], tl.float64)
            for start in range(first, end, _LANES):
                at = (start + lanes).to(tl.int64)
                square, scale, cross, _, _ = _parts(rows, hyper, sums, tensors, at, at < end, gain, FINISH, L2, CROSS)
                norms += square
                scales += scale
                crosses += cross
            norm = tl.sum(norms, 0)
            whole = tl.sum(scales, 0)
            product = tl.sum(crosses, 0)
            for start in range(first, end, _LANES):
                at = (start + lanes).to(tl.int64)
                mask = at < end
                _, _, _, correction, group = _parts(rows, hyper, sums, tensors, at, mask, gain, FINISH, L2, CROSS)
                _set_update(
                    rows, group, coefs, tensors, at, mask, correction, norm, whole, product, skip, FINISH, L2, CROSS
                )


@triton.jit
def _first_sweep(
    tile, rows, tile_of, bounds, hyper, work, counters, outcome, tensors, tiles, blocks,
    PASS: tl.constexpr, FINISH: tl.constexpr, KINDS: tl.constexpr, N_KINDS: tl.constexpr, L2: tl.constexpr,
    CROSS: tl.constexpr, STEP: tl.constexpr, PER_TENSOR: tl.constexpr, CLIP: tl.constexpr, SKIP: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """A tile of a pass that sums, and what is to be done once the last tile is; true for the program that did that."""
    sums = work
    coefs = sums + _SUMS * tensors
    slots = coefs + _UPDATES * tensors + _EXTRAS
    tensor = _tile(
        tile, rows, tile_of, hyper, coefs, slots, tensors, tiles,
        PASS, KINDS, N_KINDS, L2, CROSS, STEP, False, SIZE,
    )  # fmt: skip
    row = rows + tensor * _COLUMNS
    done = False
    if _is_last(counters + tensor, tl.maximum((tl.load(row + _NUMEL) + SIZE - 1) // SIZE, 1)):
        _add_up(slots, sums, row, tensor, tensors, tiles, _MM, SIZE)
        if CROSS or PASS == _DOTS:
            _add_up(slots, sums, row, tensor, tensors, tiles, _MG, SIZE)
            if L2:
                _add_up(slots, sums, row, tensor, tensors, tiles, _MW, SIZE)
        if PASS == _DOTS:
            _add_up(slots, sums, row, tensor, tensors, tiles, _GG, SIZE)
            if L2:
                _add_up(slots, sums, row, tensor, tensors, tiles, _GW, SIZE)
                _add_up(slots, sums, row, tensor, tensors, tiles, _WW, SIZE)
        if FINISH != _SUMS_ONLY:
            done = _is_last(counters + tensors, tensors)
            if done:
                _finish(
                    rows, bounds, hyper, sums, coefs, outcome, tensors, blocks,
                    FINISH, L2, CROSS, PER_TENSOR, CLIP, SKIP,
                )  # fmt: skip
    return done


@triton.jit
def _second_sweep(
    tile, rows, tile_of, hyper, work, tensors, tiles,
    PASS: tl.constexpr, KINDS: tl.constexpr, N_KINDS: tl.constexpr, L2: tl.constexpr, GRADIENT: tl.constexpr,
    CLIP: tl.constexpr, SKIP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A tile of a pass that updates, unless the step is skipped."""
    coefs = work + _SUMS * tensors
    slots = coefs + _UPDATES * tensors + _EXTRAS
    go = True
    if SKIP:
        go = tl.load(coefs + _UPDATES * tensors + _SKIP) == 0.0
    if go:
        _tile(
            tile, rows, tile_of, hyper, coefs, slots, tensors, tiles,
            PASS, KINDS, N_KINDS, L2, False, GRADIENT, CLIP, SIZE,
        )  # fmt: skip


# The kernels. Tables, in the order of the arguments:
#   rows     int64 [tensors, COLUMNS]      hyper    float64 [1 + groups, HYPERS], first what is for all
#   tile_of  int32 [tiles]                 work     float64: sums [SUMS, tensors], coefficients [UPDATES, tensors], the
#   bounds   int32 [blocks + 1]                     EXTRAS, then a slot for each sum and tile
#   counters int32 [tensors + 2], zero     outcome  float64 [2]: the norm, and the bits of an int64: steps skipped


@triton.jit(do_not_specialize=["tensors", "tiles", "blocks"])
def first(
    rows, tile_of, bounds, hyper, work, counters, outcome, tensors, tiles, blocks,
    PASS: tl.constexpr, FINISH: tl.constexpr, KINDS: tl.constexpr, N_KINDS: tl.constexpr, L2: tl.constexpr,
    CROSS: tl.constexpr, STEP: tl.constexpr, PER_TENSOR: tl.constexpr, CLIP: tl.constexpr, SKIP: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """``accumulate`` or ``dots``: one program per tile."""
    _first_sweep(
        tl.program_id(0), rows, tile_of, bounds, hyper, work, counters, outcome, tensors, tiles, blocks,
        PASS, FINISH, KINDS, N_KINDS, L2, CROSS, STEP, PER_TENSOR, CLIP, SKIP, SIZE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tensors", "tiles"])
def second(
    rows, tile_of, hyper, work, tensors, tiles,
    PASS: tl.constexpr, KINDS: tl.constexpr, N_KINDS: tl.constexpr, L2: tl.constexpr, GRADIENT: tl.constexpr,
    CLIP: tl.constexpr, SKIP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """``apply`` or ``commit``: one program per tile, the last tile first, which the sweep before left in the cache."""
    _second_sweep(
        tiles - 1 - tl.program_id(0), rows, tile_of, hyper, work, tensors, tiles,
        PASS, KINDS, N_KINDS, L2, GRADIENT, CLIP, SKIP, SIZE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tensors", "tiles", "blocks"])
def single(
    rows, tile_of, bounds, hyper, work, counters, outcome, tensors, tiles, blocks,
    FIRST: tl.constexpr, SECOND: tl.constexpr, FINISH: tl.constexpr, KINDS: tl.constexpr, N_KINDS: tl.constexpr,
    L2: tl.constexpr, CROSS: tl.constexpr, GRADIENT: tl.constexpr, PER_TENSOR: tl.constexpr, CLIP: tl.constexpr,
    SKIP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A whole step: both sweeps, and between them a barrier that every program has to reach.

    All programs have to run at once, or those that wait would keep out those that are waited for. A program takes the
    same tiles in both sweeps, in the second one backwards.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    turns = counters + tensors + 1
    before = tl.load(turns, volatile=True)
    # Nobody may read it after the turn has come; that takes all programs, and this one is not there yet.
    tl.debug_barrier()
    for tile in range(program, tiles, programs):
        done = _first_sweep(
            tile, rows, tile_of, bounds, hyper, work, counters, outcome, tensors, tiles, blocks,
            FIRST, FINISH, KINDS, N_KINDS, L2, CROSS, False, PER_TENSOR, CLIP, SKIP, SIZE,
        )  # fmt: skip
        if done:
            tl.debug_barrier()
            tl.atomic_add(turns, 1, sem="release", scope="gpu")
    now = tl.load(turns, volatile=True)
    while now == before:
        now = tl.load(turns, volatile=True)
    tl.atomic_add(turns, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    mine = (tiles - program + programs - 1) // programs
    for i in range(mine):
        _second_sweep(
            program + (mine - 1 - i) * programs, rows, tile_of, hyper, work, tensors, tiles,
            SECOND, KINDS, N_KINDS, L2, GRADIENT, CLIP, SKIP, SIZE,
        )  # fmt: skip
