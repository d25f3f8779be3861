"""The Triton kernels: sweeps over packed tensors, and the algebra from sums to coefficients.

A sweep has one program per tile. A tile is ``TILE`` consecutive elements of one tensor: ``tile_of`` has the index of
the tensor, and that tensor's row in ``rows`` (:mod:`sofim_fused.backends.triton.pack`) has its addresses and says how
it is stored (its kind). A kernel is compiled for the kinds that a model has. Full tiles are read and written without
masks.

Of a moment in 8 bits (:mod:`sofim_fused.blockwise`) a tile is as many whole blocks, a matrix with a block in each row,
so that the largest element of a block is a maximum along the other dimension. If rows of the tensor are no multiples
of a block, masks leave out what their last blocks lack.

A pass with sums writes one float64 per tile and sum into a slot of its own. The program that finishes a tensor's last
tile adds up that tensor's slots in a fixed order; the one that finishes the last tensor computes the step's
coefficients (``FINISH``). Which program that is makes no difference to the result, and the host waits for nothing.
``fold`` and ``solve`` do the same algebra for steps that run pass by pass.

:mod:`sofim_fused.backends.solve` and :mod:`sofim_fused.backends.interface` derive and explain the formulas.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sofim_fused import blockwise
from sofim_fused.backends import rounding
from sofim_fused.backends.triton import pack

TILE = 4096  # elements; a power of two, so that the elements of a tile share the upper half of their index
NUM_WARPS = 8
SLOTS = 1024  # how many slots of a tensor, one per tile, are added up at once
SOLVE_BLOCK = 256  # tensors whose sums are processed at once: one per thread; more would spill registers
_SLOTS = tl.constexpr(SLOTS)
_SOLVE_BLOCK = tl.constexpr(SOLVE_BLOCK)

# Passes, and what follows the sums. Kernels can read only globals that are constexpr; the host reads the plain numbers.
ACCUMULATE, APPLY, DOTS, COMMIT = range(4)
SUMS_ONLY, PLAIN, GUARDED = range(3)
_ACCUMULATE = tl.constexpr(ACCUMULATE)
_APPLY = tl.constexpr(APPLY)
_DOTS = tl.constexpr(DOTS)
_SUMS_ONLY = tl.constexpr(SUMS_ONLY)
_PLAIN = tl.constexpr(PLAIN)
_GUARDED = tl.constexpr(GUARDED)

# What F⁻¹ is applied to, in the order of sofim_fused.checks.NUMERATORS. All but the moment have P and a term in the
# gradient.
MOMENT, GRADIENT, NESTEROV = range(3)
_MOMENT = tl.constexpr(MOMENT)
_NESTEROV = tl.constexpr(NESTEROV)

# Rows of the sums, in the order of all backends.
SUMS = 6
_SUMS = tl.constexpr(SUMS)
_MM = tl.constexpr(0)
_MG = tl.constexpr(1)
_MW = tl.constexpr(2)
_GG = tl.constexpr(3)
_GW = tl.constexpr(4)
_WW = tl.constexpr(5)

# Rows of the coefficients, one value per tensor; after them come EXTRAS single values.
COEFFICIENTS = 3
EXTRAS = 2
_COEFFICIENTS = tl.constexpr(COEFFICIENTS)
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
_LOST = tl.constexpr(pack.LOST)
_SCALES = tl.constexpr(pack.SCALES)
_STEP = tl.constexpr(pack.STEP)
_NUMEL = tl.constexpr(pack.NUMEL)
_ROW_SIZE = tl.constexpr(pack.ROW_SIZE)
_ORDINAL = tl.constexpr(pack.ORDINAL)
_KIND = tl.constexpr(pack.KIND)
_BLOCK = tl.constexpr(blockwise.BLOCK)
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

# Columns of the first row of hyperparameters, whose values are for all groups: the limit of the gradients' norm, the
# factor that the gradients were multiplied by (AMP), whether a gradient is known not to be finite (AMP), and whether to
# skip the step if their norm is not finite.
LIMIT, GRAD_SCALE, FOUND_INF, SKIP_NONFINITE = range(4)
_LIMIT = tl.constexpr(LIMIT)
_GRAD_SCALE = tl.constexpr(GRAD_SCALE)
_FOUND_INF = tl.constexpr(FOUND_INF)
_SKIP_NONFINITE = tl.constexpr(SKIP_NONFINITE)

# What a Fisher block is: the whole model, or one per parameter group or parameter.
MODEL, GROUP, PARAMETER = range(3)
_BY_GROUP = tl.constexpr(GROUP)
_BY_PARAMETER = tl.constexpr(PARAMETER)

_SEED = tl.constexpr(rounding.SEED)
_WEYL = tl.constexpr(rounding.WEYL)
_CANCELLED = tl.constexpr(2.0**-46)  # (2 ulp of float32 arithmetic)², as in sofim_fused/backends/solve.py
_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
_FROM_CODE = tl.constexpr(2.0**120)  # a code's exponent and fraction, in the place of a float32's, times this
_LEAST_NORMAL = tl.constexpr(2.0**-6)  # of codes
_LEAST_NORMAL_BITS = tl.constexpr(0x3C800000)
_LIFTED_BELOW = tl.constexpr(0x21800000)  # 2**-60
# Triton's interpreter truncates where it should round to bfloat16, and computes wrongly with subnormal numbers.
_EMULATED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_HALVES, _BYTES = tl.constexpr(4), tl.constexpr(5)  # beside the dtypes of pack.TYPES: int16 and int8 in Python
_UPPER = tl.constexpr(0xFFFF0000)
_UPPER_24 = tl.constexpr(0xFFFFFF00)
_SIGN_BIT = tl.constexpr(0x80000000)
_QUIET_NAN = tl.constexpr(0x7FC00000)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)


# A tensor's kind, bit by bit: how it is stored.


@triton.jit
def _typed(address, TYPE: tl.constexpr, UNALIGNED: tl.constexpr):
    """An address as a pointer to a storage type. A hint of alignment on the integer would be lost in the cast."""
    if TYPE == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif TYPE == 1:
        pointer = address.to(tl.pointer_type(tl.float64))
    elif TYPE == 2:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif TYPE == _HALVES:
        pointer = address.to(tl.pointer_type(tl.uint16))
    elif TYPE == _BYTES:
        pointer = address.to(tl.pointer_type(tl.uint8))
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
    if (KIND >> 7) & 1:
        pointer = _typed(tl.load(row + _LOST), _HALVES if (KIND >> 4) & 1 else _BYTES, (KIND >> 5) & 1)
    else:
        pointer = _typed(tl.load(row + _LOST), KIND & 3, (KIND >> 5) & 1)
    return pointer + at


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
    elif (KIND >> 8) & 1:
        pointer = _typed(tl.load(row + _M), _BYTES, (KIND >> 5) & 1)
    elif KIND & 3 == 1:
        pointer = _typed(tl.load(row + _M), 1, (KIND >> 5) & 1)
    else:
        pointer = _typed(tl.load(row + _M), 0, (KIND >> 5) & 1)
    return pointer + at


@triton.jit
def _wide(x, KIND: tl.constexpr):
    """Convert to the type of the arithmetic: float64 for float64 parameters, else float32."""
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


# Loads and stores: of a full tile without masks, 128 bits at a time. bench/kernels.py finds them by their names.


@triton.jit
def _load_full(pointer, offsets):
    return tl.load(pointer + offsets)


@triton.jit
def _load_tail(pointer, offsets, left):
    return tl.load(pointer + offsets, mask=offsets < left, other=0.0)


@triton.jit
def _store_full(pointer, x, offsets):
    tl.store(pointer + offsets, x)


@triton.jit
def _store_tail(pointer, x, offsets, left):
    tl.store(pointer + offsets, x, mask=offsets < left)


@triton.jit
def _load(pointer, offsets, left, KIND: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        x = _load_full(pointer, offsets)
    else:
        x = _load_tail(pointer, offsets, left)
    return _wide(x, KIND)


@triton.jit
def _split(begin, offsets, size):
    """Quotients and remainders of ``begin + offsets`` by ``size``, int32; ``begin`` is below ``size``.

    Of a size above 2**30 the remainders are wrong: then there are no columns to look up.
    """
    first = tl.minimum(begin, 1 << 30).to(tl.int32)
    room = tl.minimum(size - begin, 1 << 30).to(tl.int32)
    step = tl.minimum(size, 1 << 30).to(tl.int32)
    past = tl.maximum(offsets - room, 0)
    turns = (past.to(tl.uint32) // step.to(tl.uint32)).to(tl.int32)
    beyond = offsets >= room
    return tl.where(beyond, turns + 1, 0), tl.where(beyond, past - turns * step, first + offsets)


# Moments in 8 bits. csrc/step/codes.h has the same formulas.


@triton.jit
def _of_blocks(row, at, left, KIND: tl.constexpr, SIZE: tl.constexpr):
    """A tile of codes as passes take tiles: its first element, places from there on, and where these have no element.

    ``at`` and ``left`` count elements as if each row had whole blocks. The places are a matrix with a block in each
    row; where blocks may be shorter, each has an end of its own.
    """
    blocks = tl.arange(0, SIZE // _BLOCK)
    begins = blocks * _BLOCK
    if (KIND >> 9) & 1:
        size = tl.load(row + _ROW_SIZE)
        per_row = (size + _BLOCK - 1) // _BLOCK
        line = at // _BLOCK // per_row
        column = at // _BLOCK - line * per_row
        turns, place = _split(column, blocks, per_row)  # a division for each block
        sizes = tl.minimum(size - place.to(tl.int64) * _BLOCK, _BLOCK).to(tl.int32)
        sizes = tl.where(begins < left, sizes, 0)
        begins = (turns * size + (place - column) * _BLOCK).to(tl.int32)
        at = line * size + column * _BLOCK
        if not (KIND >> 5) & 1:
            at, begins, sizes = tl.multiple_of(at, 16), tl.multiple_of(begins, 16), tl.multiple_of(sizes, 16)
        left = (begins + sizes)[:, None]
    return at, begins[:, None] + tl.arange(0, _BLOCK)[None, :], left


@triton.jit
def _scales(row, at, offsets, left, KIND: tl.constexpr):
    """Pointers to the scales of a tile's blocks, a column of them, and which of the blocks there are."""
    blocks = tl.arange(0, offsets.shape[0])[:, None]
    if (KIND >> 9) & 1:
        size = tl.load(row + _ROW_SIZE)
        line = at // size
        first = line * ((size + _BLOCK - 1) // _BLOCK) + (at - line * size) // _BLOCK
        there = first + blocks < tl.load(row + _NUMEL) // _BLOCK
    else:
        first = at // _BLOCK
        there = blocks * _BLOCK < left
    return tl.load(row + _SCALES).to(tl.pointer_type(tl.float32)) + first + blocks, there


@triton.jit
def _power_of_two(exponent):
    """2 to an integer power from -149 to 127."""
    tiny = tl.full(exponent.shape, 1, tl.int32) << tl.minimum(tl.maximum(exponent + 149, 0), 22)
    normal = (tl.maximum(exponent, -126) + 127) << 23
    return tl.where(exponent < -126, tiny, normal).to(tl.float32, bitcast=True)


@triton.jit
def _decoded(codes, scale):
    """The numbers of codes, uint8."""
    magnitude = (codes & 0x7F).to(tl.uint32)
    sign = (codes & 0x80).to(tl.uint32) << 24
    # All of this is exact. The one NaN has all bits of its exponent and its fraction.
    shown = tl.where(magnitude == 0x7F, _QUIET_NAN, magnitude << 20)
    return ((sign | shown).to(tl.float32, bitcast=True) * _FROM_CODE) * scale


@triton.jit
def _encoded(m, random, there):
    """The codes of blocks of moments and their scales. ``random``: 16 bits for each; ``there``: not masked."""
    bits = m.to(tl.uint32, bitcast=True)
    magnitude = (bits & _MAGNITUDE).to(tl.int32)
    largest = tl.max(tl.where(there, magnitude, 0), 1, keep_dims=True)
    finite = largest < _INFINITY_BITS
    lifted = tl.where(largest < _LIFTED_BELOW, 64, 0)
    lift = _power_of_two(lifted)
    # The exponent of the largest; 1 more if its fraction is above that of 448 = 1.75·2^8.
    raised = (largest.to(tl.float32, bitcast=True) * lift).to(tl.int32, bitcast=True)
    exponent = ((tl.where(finite, raised, 0) + 0x1FFFFF) >> 23) - 127 - lifted
    exponent = tl.minimum(tl.maximum(exponent - 8, -140), 119)
    scale = tl.where(largest == 0, 0.0, _power_of_two(exponent))
    scale = tl.where(finite, scale.to(tl.int32, bitcast=True), _QUIET_NAN).to(tl.float32, bitcast=True)
    x = (m * lift) * _power_of_two(-exponent - lifted)
    shown = x.to(tl.uint32, bitcast=True) & _MAGNITUDE
    small = (shown.to(tl.float32, bitcast=True) + _LEAST_NORMAL).to(tl.uint32, bitcast=True) - (8 << 20)
    shown = tl.where(shown < _LEAST_NORMAL_BITS, small, shown)
    code = tl.minimum(((shown + (random << 4)) >> 20) - 960, 0x7E) | ((bits >> 24) & 0x80)
    return tl.where(finite, code, 0).to(tl.uint8), scale


@triton.jit
def _moment(row, at, offsets, left, KIND: tl.constexpr, FULL: tl.constexpr):
    """The first moment in the type of the arithmetic."""
    if (KIND >> 8) & 1:
        pointer = _moments(row, at, KIND)
        if FULL:
            codes = _load_full(pointer, offsets)
        else:
            codes = _load_tail(pointer, offsets, left)
        scales, there = _scales(row, at, offsets, left, KIND)
        m = _decoded(codes, tl.load(scales, mask=there, other=0.0))
    else:
        m = _load(_moments(row, at, KIND), offsets, left, KIND, FULL)
    return m


@triton.jit
def _weight(row, at, offsets, left, KIND: tl.constexpr, FULL: tl.constexpr):
    """The weights in the type of the arithmetic: whole if they are kept in two parts (``backends/master_bits.py``)."""
    if (KIND >> 7) & 1:
        shown_at, rest_at = _weights(row, at, KIND), _lost(row, at, KIND)
        if FULL:
            shown = _load_full(shown_at, offsets)
            rest = _load_full(rest_at, offsets)
        else:
            shown = _load_tail(shown_at, offsets, left)
            rest = _load_tail(rest_at, offsets, left)
        upper = shown.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        lower = rest.to(tl.uint32)
        if not (KIND >> 4) & 1:
            lower = lower << 8
        whole = upper + (lower ^ 0x8000) - 0x8000  # sign extended
        # A rest that would make a NaN of a number is not its own.
        w = tl.where((whole & _MAGNITUDE) > _INFINITY_BITS, upper, whole).to(tl.float32, bitcast=True)
    else:
        w = _load(_weights(row, at, KIND), offsets, left, KIND, FULL)
    return w


@triton.jit
def _store_parts(w, row, ahead, at, offsets, left, KIND: tl.constexpr, FULL: tl.constexpr):
    """Store float32 weights in two parts. ``ahead``: 1 where the step count is still the last step's."""
    shown_at, rest_at = _weights(row, at, KIND), _lost(row, at, KIND)
    bits = w.to(tl.uint32, bitcast=True)
    bits = tl.where((bits & _MAGNITUDE) > _INFINITY_BITS, (bits & _SIGN_BIT) | _QUIET_NAN, bits)
    if not (KIND >> 4) & 1:
        update = tl.load(tl.load(row + _STEP).to(tl.pointer_type(tl.int64))) + ahead
        raised = (bits + (_hashed(row, update, at, offsets, KIND) & 0xFF)) & _UPPER_24
        bits = tl.where((raised & _MAGNITUDE) < _INFINITY_BITS, raised, bits & _UPPER_24)
    shown = ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    _store(shown_at, shown, offsets, left, FULL)
    if (KIND >> 4) & 1:
        _store(rest_at, (bits & 0xFFFF).to(tl.uint16), offsets, left, FULL)
    else:
        _store(rest_at, ((bits >> 8) & 0xFF).to(tl.uint8), offsets, left, FULL)


@triton.jit
def _store(pointer, x, offsets, left, FULL: tl.constexpr):
    if FULL:
        _store_full(pointer, x, offsets)
    else:
        _store_tail(pointer, x, offsets, left)


@triton.jit
def _mixed(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _hashed(row, update, at, offsets, KIND: tl.constexpr):
    """32 random bits for each element; ``sofim_fused/backends/rounding.py`` defines them."""
    ordinal = tl.load(row + _ORDINAL).to(tl.uint32)
    key = _mixed(_mixed(ordinal * _WEYL + _SEED) ^ update.to(tl.uint32))
    stretch = _mixed(key ^ (at >> 32).to(tl.uint32))
    place = at.to(tl.uint32) + offsets.to(tl.uint32)
    if (KIND >> 9) & 1:  # such a tile begins anywhere, and may go across a multiple of 2**32
        stretch = tl.where(place < at.to(tl.uint32), _mixed(key ^ ((at >> 32) + 1).to(tl.uint32)), stretch)
    return _mixed(place * _WEYL + stretch)


@triton.jit
def _rounded(value, row, update, at, offsets, KIND: tl.constexpr):
    """The bits of float32 values, rounded stochastically to those of a bfloat16 (the lower half zero).

    Infinities and NaN stay as they are.
    """
    bits = value.to(tl.uint32, bitcast=True)
    raised = bits + (_hashed(row, update, at, offsets, KIND) >> 16)
    return tl.where((bits & _MAGNITUDE) < _INFINITY_BITS, raised, bits) & _UPPER


@triton.jit
def _factor(address, KIND: tl.constexpr):
    return _wide(tl.load(address), KIND)


@triton.jit
def _new_moment(m, v, weight, group, KIND: tl.constexpr, L2: tl.constexpr):
    """The first moment before it is stored; ``weight`` is used only with L2 decay."""
    moment = tl.fma(v, _factor(group + _DECAY_G, KIND), m * _factor(group + _DECAY_M, KIND))
    if L2:
        # A zero factor adds no term: zero times an infinite weight would be NaN.
        by_weight = _factor(group + _DECAY_W, KIND)
        moment = tl.where(by_weight != 0, tl.fma(weight, by_weight, moment), moment)
    return moment


@triton.jit
def _store_moment(moment, row, ahead, at, offsets, left, KIND: tl.constexpr, FULL: tl.constexpr):
    """Store the first moment and return it as stored. ``ahead``: 1 where the step count is still the last step's."""
    pointer = _moments(row, at, KIND)
    if (KIND >> 8) & 1:
        update = tl.load(tl.load(row + _STEP).to(tl.pointer_type(tl.int64))) + ahead
        codes, scale = _encoded(moment, _hashed(row, update, at, offsets, KIND) >> 16, offsets < left)
        _store(pointer, codes, offsets, left, FULL)
        scales, there = _scales(row, at, offsets, left, KIND)
        tl.store(scales, scale, mask=there)
        stored = _decoded(codes, scale)
    elif (KIND >> 3) & 1:
        update = tl.load(tl.load(row + _STEP).to(tl.pointer_type(tl.int64))) + ahead
        bits = _rounded(moment, row, update, at, offsets, KIND)
        _store(pointer, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), offsets, left, FULL)
        stored = bits.to(tl.float32, bitcast=True)
    else:
        _store(pointer, moment, offsets, left, FULL)
        stored = moment
    return stored


@triton.jit
def _update(
    w, v, m, row, coefs, tensors, at, offsets, left,
    KIND: tl.constexpr, FULL: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Update the weights and their lost bits. ``V`` and ``M``: the gradient ``v`` and the moment ``m`` are used."""
    if (KIND >> 4) & 1 and not (KIND >> 7) & 1:
        if KIND & 3 == 2:
            half_eps: tl.constexpr = 0.00390625
        else:
            half_eps: tl.constexpr = 0.00048828125
        lost = _lost(row, at, KIND)
        rest = _load(lost, offsets, left, KIND, FULL)
        # More than half an ulp cannot be what w lost: w was replaced from outside.
        w += tl.where(tl.abs(rest) <= tl.abs(w) * half_eps, rest, 0.0)
    w *= _factor(coefs + _BY_WEIGHT * tensors, KIND)
    if V:
        w = tl.fma(v, _factor(coefs + _BY_GRADIENT * tensors, KIND), w)
    if M:
        w = tl.fma(m, _factor(coefs + _BY_MOMENT * tensors, KIND), w)
    if (KIND >> 7) & 1:
        _store_parts(w, row, 0 if M else 1, at, offsets, left, KIND, FULL)
    else:
        if KIND & 3 == 2:
            rounded = _bfloat16(w)
        elif KIND & 3 == 3:
            rounded = w.to(tl.float16)
        else:
            rounded = w
        _store(_weights(row, at, KIND), rounded, offsets, left, FULL)
    if (KIND >> 4) & 1 and not (KIND >> 7) & 1:
        kept = _wide(rounded, KIND)
        rest = tl.where(tl.abs(kept) <= _FLOAT32_MAX, w - kept, 0.0)
        if KIND & 3 == 2:
            _store(lost, _bfloat16(rest), offsets, left, FULL)
        else:
            _store(lost, rest.to(tl.float16), offsets, left, FULL)


@triton.jit
def _sum(slot, a, b):
    """Store the dot product of a tile in its slot; masked elements are zero."""
    _sum_up(slot, a.to(tl.float64) * b.to(tl.float64))


@triton.jit
def _sum_up(slot, x):
    """Store the sum of a tile in its slot."""
    if len(x.shape) == 2:
        total = tl.sum(x)
    else:
        total = tl.sum(x, 0)
    tl.store(slot, total)


# The passes over one tile.


@triton.jit
def _accumulate(
    row, group, coefs, tensors, slot, tiles, at, offsets, left,
    KIND: tl.constexpr, FULL: tl.constexpr, L2: tl.constexpr, CROSS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    m = _moment(row, at, offsets, left, KIND, FULL)
    g = _load(_gradients(row, at, KIND), offsets, left, KIND, FULL)
    if L2 or GRADIENT:
        w = _weight(row, at, offsets, left, KIND, FULL)
    else:
        w = m
    m = _store_moment(_new_moment(m, g, w, group, KIND, L2), row, 1, at, offsets, left, KIND, FULL)
    if not FULL:
        m = tl.where(offsets < left, m, 0.0)  # stochastic rounding does not keep the zeros of masked elements
    _sum(slot + _MM * tiles, m, m)
    if CROSS:
        _sum(slot + _MG * tiles, m, g)
        if L2:
            _sum(slot + _MW * tiles, m, w)
    if GRADIENT:
        _update(w, g, m, row, coefs, tensors, at, offsets, left, KIND, FULL, True, False)


@triton.jit
def _apply(
    row, coefs, tensors, at, offsets, left, KIND: tl.constexpr, FULL: tl.constexpr, GRADIENT: tl.constexpr
):  # fmt: skip
    m = _moment(row, at, offsets, left, KIND, FULL)
    if GRADIENT:
        g = _load(_gradients(row, at, KIND), offsets, left, KIND, FULL)
    else:
        g = m
    w = _weight(row, at, offsets, left, KIND, FULL)
    _update(w, g, m, row, coefs, tensors, at, offsets, left, KIND, FULL, GRADIENT, True)


@triton.jit
def _dots(row, slot, tiles, at, offsets, left, KIND: tl.constexpr, FULL: tl.constexpr, L2: tl.constexpr):
    m = _moment(row, at, offsets, left, KIND, FULL)
    g = _load(_gradients(row, at, KIND), offsets, left, KIND, FULL)
    _sum(slot + _MM * tiles, m, m)
    _sum(slot + _MG * tiles, m, g)
    _sum(slot + _GG * tiles, g, g)
    if L2:
        w = _weight(row, at, offsets, left, KIND, FULL)
        _sum(slot + _MW * tiles, m, w)
        _sum(slot + _GW * tiles, g, w)
        _sum(slot + _WW * tiles, w, w)


@triton.jit
def _commit(
    row, group, coefs, tensors, extras, at, offsets, left,
    KIND: tl.constexpr, FULL: tl.constexpr, L2: tl.constexpr, GRADIENT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    m = _moment(row, at, offsets, left, KIND, FULL)
    v = _load(_gradients(row, at, KIND), offsets, left, KIND, FULL)
    if SCALED:
        v *= _factor(extras + _GAIN, KIND)
    w = _weight(row, at, offsets, left, KIND, FULL)
    m = _new_moment(m, v, w, group, KIND, L2)
    _store_moment(m, row, 0, at, offsets, left, KIND, FULL)
    _update(w, v, m, row, coefs, tensors, at, offsets, left, KIND, FULL, GRADIENT, True)


@triton.jit
def _run(
    row, group, coefs, tensors, extras, slot, tiles, at, left,
    PASS: tl.constexpr, KIND: tl.constexpr, FULL: tl.constexpr, L2: tl.constexpr, CROSS: tl.constexpr,
    GRADIENT: tl.constexpr, SCALED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, SIZE)
    if (KIND >> 8) & 1:
        at, offsets, left = _of_blocks(row, at, left, KIND, SIZE)
    if PASS == _ACCUMULATE:
        _accumulate(row, group, coefs, tensors, slot, tiles, at, offsets, left, KIND, FULL, L2, CROSS, GRADIENT)
    elif PASS == _APPLY:
        _apply(row, coefs, tensors, at, offsets, left, KIND, FULL, GRADIENT)
    elif PASS == _DOTS:
        _dots(row, slot, tiles, at, offsets, left, KIND, FULL, L2)
    else:
        _commit(row, group, coefs, tensors, extras, at, offsets, left, KIND, FULL, L2, GRADIENT, SCALED)


@triton.jit
def _run_any(
    row, group, coefs, tensors, extras, slot, tiles, at, left,
    PASS: tl.constexpr, KIND: tl.constexpr, L2: tl.constexpr, CROSS: tl.constexpr, GRADIENT: tl.constexpr,
    SCALED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One pass over a tile of a given kind, full or not."""
    if (KIND >> 9) & 1:  # no such tile is full
        _run(
            row, group, coefs, tensors, extras, slot, tiles, at, left,
            PASS, KIND, False, L2, CROSS, GRADIENT, SCALED, SIZE,
        )  # fmt: skip
    elif left >= SIZE:
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
    """One pass over a tile of any kind. Returns the index of its tensor."""
    tensor = tl.load(tile_of + tile).to(tl.int64)
    row = rows + tensor * _COLUMNS
    group = hyper + (tl.load(row + _GROUP) + 1) * _HYPERS
    at = (tile - tl.load(row + _FIRST)) * SIZE
    left = tl.load(row + _NUMEL) - at
    extras = coefs + _COEFFICIENTS * tensors
    if N_KINDS == 1:
        _run_any(
            row, group, coefs + tensor, tensors, extras, slots + tile, tiles, at, left,
            PASS, KINDS, L2, CROSS, GRADIENT, SCALED, SIZE,
        )  # fmt: skip
    else:
        kind = tl.load(row + _KIND)
        for i in tl.static_range(N_KINDS):
            if kind == (KINDS >> (16 * i)) & 0xFFFF:
                _run_any(
                    row, group, coefs + tensor, tensors, extras, slots + tile, tiles, at, left,
                    PASS, (KINDS >> (16 * i)) & 0xFFFF, L2, CROSS, GRADIENT, SCALED, SIZE,
                )  # fmt: skip
    return tensor


# Sums to coefficients.


@triton.jit
def _is_last(counter, total):
    """Count this program. True for the last one of ``total``, which can then read what all others wrote before."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == total - 1
    if last:
        tl.store(counter, 0)  # for the next launch
    tl.debug_barrier()
    return last


@triton.jit
def _load_cg(address, mask):
    """Load what other programs may have written in this launch, without the L1 cache (``.cg``), which is not shared."""
    return tl.load(address, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _add_up(slots, sums, row, tensor, tensors, tiles, SUM: tl.constexpr, SIZE: tl.constexpr):
    """One sum of a tensor, from the slots of its tiles."""
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

    There, because u = β^t is rounded, 1 - u has few correct digits. ln u has the same error, so that (1 - u)/ln u is
    accurate (Kahan; see Higham, Accuracy and Stability of Numerical Algorithms, 1.14.1).
    """
    x = update.to(tl.float64) * tl.log(momentum)
    u = tl.exp(x)
    near = tl.where(u == 1.0, -x, (1.0 - u) * x / tl.log(tl.where((u < 1.0) & (u > 0.0), u, 0.5)))
    return 1.0 / tl.where(u < 0.5, 1.0 - u, near)


@triton.jit
def _look_ahead(momentum, correction):
    """What the new moment and the gradient are multiplied by in the look-ahead of Nesterov's method."""
    later = (1.0 - momentum) + momentum / correction  # 1 - β^(t+1)
    return momentum / later, (1.0 - momentum) / later


@triton.jit
def _finite(x):
    """Clamp to float32: a larger coefficient would become infinite, and its product with a zero moment NaN."""
    return tl.where(x > _FLOAT32_MAX, _FLOAT32_MAX, tl.where(x < -_FLOAT32_MAX, -_FLOAT32_MAX, x))


@triton.jit
def _decayed(l2, x):
    """l2·x; without L2 decay 0, even if x is infinite."""
    return tl.where(l2 == 0.0, 0.0, l2 * x)


@triton.jit
def _located(rows, hyper, at, mask, HYPERS: tl.constexpr):
    """Pointers to the hyperparameters and the step counts of tensors; and their bias correction in this step."""
    row = rows + at * _COLUMNS
    group = hyper + tl.load(row + _GROUP, mask=mask, other=0) * HYPERS
    steps = tl.load(row + _STEP, mask=mask, other=0).to(tl.pointer_type(tl.int64))
    update = tl.load(steps, mask=mask, other=0) + 1
    return group, steps, _correction(tl.load(group + _MOMENTUM, mask=mask, other=0.0), update)


@triton.jit
def _parts(
    rows, hyper, mm_row, mg_row, mw_row, gg_row, gw_row, ww_row, at, mask,
    FINISH: tl.constexpr, L2: tl.constexpr, NUMERATOR: tl.constexpr, HYPERS: tl.constexpr,
):  # fmt: skip
    """What tensors add to their Fisher block. Masked tensors have zero sums and add nothing.

    Nine values: three each for S, for what S would be if nothing cancelled in β m + (1-β) v, and for P. They are the
    coefficients of 1, κ and κ², where κ is the clip factor, which is not known yet. A plain step has no κ, and only the
    first coefficients of S and P.
    """
    group, _, correction = _located(rows, hyper, at, mask, HYPERS)
    beta = tl.load(group + _MOMENTUM, mask=mask, other=0.0)
    rate = correction / tl.load(group + _RHO, mask=mask, other=1.0)
    square = rate * correction
    sign = tl.load(group + _SIGN, mask=mask, other=0.0)
    mm = _load_cg(mm_row + at, mask)
    zero = tl.zeros_like(mm)
    s0, s1, s2, most0, most1, most2, p0, p1, p2 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    if L2:
        l2 = tl.load(group + _L2, mask=mask, other=0.0)
    if FINISH == _PLAIN:
        s0 = square * mm
        if NUMERATOR != _MOMENT:
            mv = sign * _load_cg(mg_row + at, mask)
            if L2:
                mv += _decayed(l2, _load_cg(mw_row + at, mask))
            if NUMERATOR == _NESTEROV:
                by_moment, by_gradient = _look_ahead(beta, correction)
                mv = by_moment * mm + by_gradient * mv
            p0 = rate * mv
    else:
        one_minus_beta = 1.0 - beta
        mv1 = sign * _load_cg(mg_row + at, mask)
        vv2 = _load_cg(gg_row + at, mask)
        mv0 = zero
        vv0 = zero
        vv1 = zero
        if L2:
            mv0 = _decayed(l2, _load_cg(mw_row + at, mask))
            vv0 = _decayed(l2 * l2, _load_cg(ww_row + at, mask))
            vv1 = 2.0 * sign * _decayed(l2, _load_cg(gw_row + at, mask))
        mm0 = beta * beta * mm + 2.0 * beta * one_minus_beta * mv0 + one_minus_beta * one_minus_beta * vv0
        mm1 = 2.0 * beta * one_minus_beta * mv1 + one_minus_beta * one_minus_beta * vv1
        mm2 = one_minus_beta * one_minus_beta * vv2
        s0 = square * mm0
        s1 = square * mm1
        s2 = square * mm2
        still = beta * tl.sqrt(mm) + one_minus_beta * tl.sqrt(vv0)
        moving = one_minus_beta * tl.sqrt(vv2)
        most0 = square * still * still
        most1 = square * 2.0 * still * moving
        most2 = square * moving * moving
        if NUMERATOR != _MOMENT:
            p0 = beta * mv0 + one_minus_beta * vv0
            p1 = beta * mv1 + one_minus_beta * vv1
            p2 = one_minus_beta * vv2
            if NUMERATOR == _NESTEROV:
                by_moment, by_gradient = _look_ahead(beta, correction)
                p0 = by_moment * mm0 + by_gradient * p0
                p1 = by_moment * mm1 + by_gradient * p1
                p2 = by_moment * mm2 + by_gradient * p2
            p0 *= rate
            p1 *= rate
            p2 *= rate
    return s0, s1, s2, most0, most1, most2, p0, p1, p2


@triton.jit
def _fold(
    rows, hyper, mm, mg, mw, gg, gw, ww, class_of, which, begin, end,
    FINISH: tl.constexpr, L2: tl.constexpr, NUMERATOR: tl.constexpr, CLASSES: tl.constexpr, HYPERS: tl.constexpr,
):  # fmt: skip
    """The total of ``_parts`` over the tensors from ``begin`` to ``end``, with ``CLASSES`` those of class ``which``."""
    lanes = tl.arange(0, _SOLVE_BLOCK)
    zero = tl.zeros([_SOLVE_BLOCK], tl.float64)
    s0, s1, s2, most0, most1, most2, p0, p1, p2 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    for start in range(begin, end, _SOLVE_BLOCK):
        at = (start + lanes).to(tl.int64)
        mask = at < end
        if CLASSES:
            mask = mask & (tl.load(class_of + at, mask=mask, other=-1) == which)
        a0, a1, a2, b0, b1, b2, c0, c1, c2 = _parts(
            rows, hyper, mm, mg, mw, gg, gw, ww, at, mask, FINISH, L2, NUMERATOR, HYPERS
        )
        s0 += a0
        if NUMERATOR != _MOMENT:
            p0 += c0
        if FINISH == _GUARDED:
            s1 += a1
            s2 += a2
            most0 += b0
            most1 += b1
            most2 += b2
            if NUMERATOR != _MOMENT:
                p1 += c1
                p2 += c2
    return (
        tl.sum(s0, 0), tl.sum(s1, 0), tl.sum(s2, 0), tl.sum(most0, 0), tl.sum(most1, 0), tl.sum(most2, 0),
        tl.sum(p0, 0), tl.sum(p1, 0), tl.sum(p2, 0),
    )  # fmt: skip


@triton.jit
def _polynomial(constant, linear, square, gain):
    # If the norm overflows, the clip factor is zero and the other coefficients are infinite.
    return tl.where(gain == 0.0, constant, constant + gain * (linear + gain * square))


@triton.jit
def _at_gain(s0, s1, s2, most0, most1, most2, p0, p1, p2, gain, FINISH: tl.constexpr, NUMERATOR: tl.constexpr):
    """S and P of Fisher blocks from ``_parts``, with the clip factor ``gain``."""
    s = s0
    p = p0
    if FINISH == _GUARDED:
        s = _polynomial(s0, s1, s2, gain)
        floor = _CANCELLED * _polynomial(most0, most1, most2, gain)
        s = tl.where(s < floor, floor, s)
        if NUMERATOR != _MOMENT:
            p = _polynomial(p0, p1, p2, gain)
    return s, p


@triton.jit
def _solve(
    rows, hyper, coefs, tensors, at, mask, s, p, skip,
    L2: tl.constexpr, NUMERATOR: tl.constexpr, HYPERS: tl.constexpr,
):  # fmt: skip
    """The Sherman-Morrison step of tensors, from S and P of their block; counts one more update unless ``skip``."""
    group, steps, correction = _located(rows, hyper, at, mask, HYPERS)
    lr = tl.load(group + _LR, mask=mask, other=0.0)
    rho = tl.load(group + _RHO, mask=mask, other=1.0)
    shrink = correction / (rho * (1.0 + s))
    by_weight = 1.0 - lr * tl.load(group + _WEIGHT_DECAY, mask=mask, other=0.0)
    if NUMERATOR != _MOMENT:
        rate = lr / rho
        if NUMERATOR == _NESTEROV:
            ahead, share = _look_ahead(tl.load(group + _MOMENTUM, mask=mask, other=0.0), correction)
            rate *= share
            by_moment = lr * (shrink * p - ahead / rho)
        else:
            by_moment = lr * shrink * p
        if L2:
            by_weight -= _decayed(tl.load(group + _L2, mask=mask, other=0.0), rate)
        by_gradient = _finite(-rate * tl.load(group + _SIGN, mask=mask, other=0.0))
        tl.store(coefs + _BY_GRADIENT * tensors + at, by_gradient, mask=mask)
    else:
        by_moment = -lr * shrink
    tl.store(coefs + _BY_WEIGHT * tensors + at, by_weight, mask=mask)
    tl.store(coefs + _BY_MOMENT * tensors + at, _finite(by_moment), mask=mask)
    tl.store(steps, tl.load(steps, mask=mask, other=0) + (1.0 - skip).to(tl.int64), mask=mask)


@triton.jit
def _guard(square, limit, grad_scale, found_inf, skip_nonfinite, CLIP: tl.constexpr, SKIP: tl.constexpr):
    """The norm of the unscaled gradients, the factor to multiply gradients by, and 1.0 to skip the step, else 0.0.

    ``square`` is the square of the norm of the scaled gradients.
    """
    norm = tl.sqrt(square)
    gain = tl.full([], 1.0, tl.float64)
    if CLIP:
        unscale = 1.0 / grad_scale
        norm *= unscale
        gain = tl.where(norm > limit, limit / norm, gain) * unscale
    skip = tl.full([], 0.0, tl.float64)
    if SKIP:
        fine = (skip_nonfinite == 0.0) | (tl.abs(norm) < float("inf"))
        skip = tl.where(fine & (found_inf == 0.0), skip, 1.0)
    return norm, gain, skip


@triton.jit
def _finish(
    rows, bounds, hyper, sums, coefs, outcome, tensors, blocks,
    FINISH: tl.constexpr, L2: tl.constexpr, NUMERATOR: tl.constexpr, PER_TENSOR: tl.constexpr, CLIP: tl.constexpr,
    SKIP: tl.constexpr,
):  # fmt: skip
    """The coefficients of every tensor, from the sums of all."""
    mm = sums + _MM * tensors
    mg = sums + _MG * tensors
    mw = sums + _MW * tensors
    gg = sums + _GG * tensors
    gw = sums + _GW * tensors
    ww = sums + _WW * tensors
    lanes = tl.arange(0, _SOLVE_BLOCK)
    gain = tl.full([], 1.0, tl.float64)
    skip = tl.full([], 0.0, tl.float64)
    if FINISH == _GUARDED:
        total = tl.zeros([_SOLVE_BLOCK], tl.float64)
        for start in range(0, tensors, _SOLVE_BLOCK):
            total += _load_cg(gg + start + lanes, start + lanes < tensors)
        norm, gain, skip = _guard(
            tl.sum(total, 0), tl.load(hyper + _LIMIT), tl.load(hyper + _GRAD_SCALE), tl.load(hyper + _FOUND_INF),
            tl.load(hyper + _SKIP_NONFINITE), CLIP, SKIP,
        )  # fmt: skip
        extras = coefs + _COEFFICIENTS * tensors
        tl.store(extras + _GAIN, gain)
        tl.store(extras + _SKIP, skip)
        tl.store(outcome, norm)
        tl.store((outcome + 1).to(tl.pointer_type(tl.int64)), skip.to(tl.int64))
    groups = hyper + _HYPERS  # after the row for all groups
    if PER_TENSOR:
        for start in range(0, tensors, _SOLVE_BLOCK):
            at = (start + lanes).to(tl.int64)
            mask = at < tensors
            s0, s1, s2, most0, most1, most2, p0, p1, p2 = _parts(
                rows, groups, mm, mg, mw, gg, gw, ww, at, mask, FINISH, L2, NUMERATOR, _HYPERS
            )
            s, p = _at_gain(s0, s1, s2, most0, most1, most2, p0, p1, p2, gain, FINISH, NUMERATOR)
            _solve(rows, groups, coefs, tensors, at, mask, s, p, skip, L2, NUMERATOR, _HYPERS)
    else:
        for block in range(blocks):
            begin = tl.load(bounds + block)
            end = tl.load(bounds + block + 1)
            s0, s1, s2, most0, most1, most2, p0, p1, p2 = _fold(
                rows, groups, mm, mg, mw, gg, gw, ww, rows, 0, begin, end, FINISH, L2, NUMERATOR, False, _HYPERS
            )
            s, p = _at_gain(s0, s1, s2, most0, most1, most2, p0, p1, p2, gain, FINISH, NUMERATOR)
            for start in range(begin, end, _SOLVE_BLOCK):
                at = (start + lanes).to(tl.int64)
                _solve(rows, groups, coefs, tensors, at, at < end, s, p, skip, L2, NUMERATOR, _HYPERS)


@triton.jit
def _first_sweep(
    tile, rows, tile_of, bounds, hyper, work, counters, outcome, tensors, tiles, blocks,
    PASS: tl.constexpr, FINISH: tl.constexpr, KINDS: tl.constexpr, N_KINDS: tl.constexpr, L2: tl.constexpr,
    NUMERATOR: tl.constexpr, STEP: tl.constexpr, PER_TENSOR: tl.constexpr, CLIP: tl.constexpr, SKIP: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """One tile of a pass with sums, and what follows the last tile. True for the program that did the latter."""
    sums = work
    coefs = sums + _SUMS * tensors
    slots = coefs + _COEFFICIENTS * tensors + _EXTRAS
    tensor = _tile(
        tile, rows, tile_of, hyper, coefs, slots, tensors, tiles,
        PASS, KINDS, N_KINDS, L2, NUMERATOR != _MOMENT, STEP, False, SIZE,
    )  # fmt: skip
    row = rows + tensor * _COLUMNS
    done = False
    if _is_last(counters + tensor, tl.maximum((tl.load(row + _NUMEL) + SIZE - 1) // SIZE, 1)):
        _add_up(slots, sums, row, tensor, tensors, tiles, _MM, SIZE)
        if NUMERATOR != _MOMENT or PASS == _DOTS:
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
                    FINISH, L2, NUMERATOR, PER_TENSOR, CLIP, SKIP,
                )  # fmt: skip
    return done


@triton.jit
def _second_sweep(
    tile, rows, tile_of, hyper, work, tensors, tiles,
    PASS: tl.constexpr, KINDS: tl.constexpr, N_KINDS: tl.constexpr, L2: tl.constexpr, GRADIENT: tl.constexpr,
    CLIP: tl.constexpr, SKIP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One tile of a pass that updates, unless the step is skipped."""
    coefs = work + _SUMS * tensors
    slots = coefs + _COEFFICIENTS * tensors + _EXTRAS
    go = True
    if SKIP:
        go = tl.load(coefs + _COEFFICIENTS * tensors + _SKIP) == 0.0
    if go:
        _tile(
            tile, rows, tile_of, hyper, coefs, slots, tensors, tiles,
            PASS, KINDS, N_KINDS, L2, False, GRADIENT, CLIP, SIZE,
        )  # fmt: skip


# The kernels that sweep. Arrays, in the order of the arguments:
#   rows     int64 [tensors, COLUMNS]      hyper    float64 [1 + groups, HYPERS]; the first row is for all groups
#   tile_of  int32 [tiles]                 work     float64: sums [SUMS, tensors], coefficients [COEFFICIENTS, tensors],
#   bounds   int32 [blocks + 1]                     the EXTRAS, then a slot for each sum and tile
#   counters int32 [tensors + 2], zero     outcome  float64 [2]: the norm, and the bits of an int64: 1 if skipped


@triton.jit(do_not_specialize=["tensors", "tiles", "blocks"])
def first(
    rows, tile_of, bounds, hyper, work, counters, outcome, tensors, tiles, blocks,
    PASS: tl.constexpr, FINISH: tl.constexpr, KINDS: tl.constexpr, N_KINDS: tl.constexpr, L2: tl.constexpr,
    NUMERATOR: tl.constexpr, STEP: tl.constexpr, PER_TENSOR: tl.constexpr, CLIP: tl.constexpr, SKIP: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """``accumulate`` or ``dots``: one program per tile."""
    _first_sweep(
        tl.program_id(0), rows, tile_of, bounds, hyper, work, counters, outcome, tensors, tiles, blocks,
        PASS, FINISH, KINDS, N_KINDS, L2, NUMERATOR, STEP, PER_TENSOR, CLIP, SKIP, SIZE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tensors", "tiles"])
def second(
    rows, tile_of, hyper, work, tensors, tiles,
    PASS: tl.constexpr, KINDS: tl.constexpr, N_KINDS: tl.constexpr, L2: tl.constexpr, GRADIENT: tl.constexpr,
    CLIP: tl.constexpr, SKIP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """``apply`` or ``commit``: one program per tile, the last tile first, because it is still in the cache."""
    _second_sweep(
        tiles - 1 - tl.program_id(0), rows, tile_of, hyper, work, tensors, tiles,
        PASS, KINDS, N_KINDS, L2, GRADIENT, CLIP, SKIP, SIZE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tensors", "tiles", "blocks"])
def single(
    rows, tile_of, bounds, hyper, work, counters, outcome, tensors, tiles, blocks,
    FIRST: tl.constexpr, SECOND: tl.constexpr, FINISH: tl.constexpr, KINDS: tl.constexpr, N_KINDS: tl.constexpr,
    L2: tl.constexpr, NUMERATOR: tl.constexpr, GRADIENT: tl.constexpr, PER_TENSOR: tl.constexpr, CLIP: tl.constexpr,
    SKIP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A whole step: both sweeps, and between them a barrier that every program has to reach.

    All programs have to run at the same time; otherwise those that wait would occupy the place of those that they wait
    for. A program works on the same tiles in both sweeps, in the second one in reverse order.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    turns = counters + tensors + 1
    before = tl.load(turns, volatile=True)
    # The value changes only after all programs have worked, and this one has not begun: all of them read the old one.
    tl.debug_barrier()
    for tile in range(program, tiles, programs):
        done = _first_sweep(
            tile, rows, tile_of, bounds, hyper, work, counters, outcome, tensors, tiles, blocks,
            FIRST, FINISH, KINDS, N_KINDS, L2, NUMERATOR, False, PER_TENSOR, CLIP, SKIP, SIZE,
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


# The kernels between the sweeps, for steps that run pass by pass. Arrays:
#   rows     int64 [tensors, COLUMNS], of which STEP and GROUP are used    hyper    float64 [groups, 6], up to SIGN
#   mm ... ww  float64 [tensors], those that are needed                    bounds   int32 [blocks + 1]
#   totals   float64 [classes, k, blocks], in solve [k, blocks]: S and, unless NUMERATOR is MOMENT, P; if guarded
#            their polynomials in the clip factor: S, S if nothing cancelled, and P


@triton.jit
def _store_total(
    out, block, mask, blocks, s0, s1, s2, most0, most1, most2, p0, p1, p2, FINISH: tl.constexpr, NUMERATOR: tl.constexpr
):
    """Write the values of Fisher blocks, one below the other in the rows of ``out``."""
    tl.store(out + block, s0, mask=mask)
    if FINISH == _PLAIN:
        if NUMERATOR != _MOMENT:
            tl.store(out + blocks + block, p0, mask=mask)
    else:
        tl.store(out + blocks + block, s1, mask=mask)
        tl.store(out + 2 * blocks + block, s2, mask=mask)
        tl.store(out + 3 * blocks + block, most0, mask=mask)
        tl.store(out + 4 * blocks + block, most1, mask=mask)
        tl.store(out + 5 * blocks + block, most2, mask=mask)
        if NUMERATOR != _MOMENT:
            tl.store(out + 6 * blocks + block, p0, mask=mask)
            tl.store(out + 7 * blocks + block, p1, mask=mask)
            tl.store(out + 8 * blocks + block, p2, mask=mask)


@triton.jit
def _load_total(totals, block, mask, blocks, FINISH: tl.constexpr, NUMERATOR: tl.constexpr):
    """Read what ``_store_total`` wrote; zeros for values that were not written."""
    s0 = tl.load(totals + block, mask=mask, other=0.0)
    zero = tl.zeros_like(s0)
    s1, s2, most0, most1, most2, p0, p1, p2 = zero, zero, zero, zero, zero, zero, zero, zero
    if FINISH == _PLAIN:
        if NUMERATOR != _MOMENT:
            p0 = tl.load(totals + blocks + block, mask=mask, other=0.0)
    else:
        s1 = tl.load(totals + blocks + block, mask=mask, other=0.0)
        s2 = tl.load(totals + 2 * blocks + block, mask=mask, other=0.0)
        most0 = tl.load(totals + 3 * blocks + block, mask=mask, other=0.0)
        most1 = tl.load(totals + 4 * blocks + block, mask=mask, other=0.0)
        most2 = tl.load(totals + 5 * blocks + block, mask=mask, other=0.0)
        if NUMERATOR != _MOMENT:
            p0 = tl.load(totals + 6 * blocks + block, mask=mask, other=0.0)
            p1 = tl.load(totals + 7 * blocks + block, mask=mask, other=0.0)
            p2 = tl.load(totals + 8 * blocks + block, mask=mask, other=0.0)
    return s0, s1, s2, most0, most1, most2, p0, p1, p2


@triton.jit(do_not_specialize=["tensors", "blocks"])
def fold(
    rows, bounds, hyper, mm, mg, mw, gg, gw, ww, class_of, totals, squares, tensors, blocks,
    FINISH: tl.constexpr, L2: tl.constexpr, NUMERATOR: tl.constexpr, PER_TENSOR: tl.constexpr, CLASSES: tl.constexpr,
    HYPERS: tl.constexpr,
):  # fmt: skip
    """From sums to totals per Fisher block: one program per class of tensors.

    ``class_of``, int64 ``[tensors]``, is read with ``CLASSES``. ``squares``, float64 ``[classes]``, gets the sums of
    gg, or zeros without a guard.
    """
    which = tl.program_id(0)
    lanes = tl.arange(0, _SOLVE_BLOCK)
    k: tl.constexpr = (1 if NUMERATOR == _MOMENT else 2) if FINISH == _PLAIN else (6 if NUMERATOR == _MOMENT else 9)
    out = totals + which.to(tl.int64) * k * blocks
    square = tl.zeros([_SOLVE_BLOCK], tl.float64)
    if FINISH == _GUARDED:
        for start in range(0, tensors, _SOLVE_BLOCK):
            at = (start + lanes).to(tl.int64)
            mask = at < tensors
            if CLASSES:
                mask = mask & (tl.load(class_of + at, mask=mask, other=-1) == which)
            square += _load_cg(gg + at, mask)
    tl.store(squares + which, tl.sum(square, 0))
    if PER_TENSOR:
        for start in range(0, tensors, _SOLVE_BLOCK):
            at = (start + lanes).to(tl.int64)
            inside = at < tensors
            mask = inside
            if CLASSES:
                mask = mask & (tl.load(class_of + at, mask=mask, other=-1) == which)
            s0, s1, s2, most0, most1, most2, p0, p1, p2 = _parts(
                rows, hyper, mm, mg, mw, gg, gw, ww, at, mask, FINISH, L2, NUMERATOR, HYPERS
            )
            _store_total(out, at, inside, blocks, s0, s1, s2, most0, most1, most2, p0, p1, p2, FINISH, NUMERATOR)
    else:
        for block in range(blocks):
            s0, s1, s2, most0, most1, most2, p0, p1, p2 = _fold(
                rows, hyper, mm, mg, mw, gg, gw, ww, class_of, which, tl.load(bounds + block),
                tl.load(bounds + block + 1), FINISH, L2, NUMERATOR, CLASSES, HYPERS,
            )  # fmt: skip
            _store_total(out, block, True, blocks, s0, s1, s2, most0, most1, most2, p0, p1, p2, FINISH, NUMERATOR)


@triton.jit(do_not_specialize=["tensors", "blocks"])
def solve(
    rows, hyper, totals, square, grad_scale, found_inf, coefs, outcome, skipped, limit: tl.float64, tensors, blocks,
    FINISH: tl.constexpr, NUMERATOR: tl.constexpr, FISHER: tl.constexpr, CLIP: tl.constexpr, SCALED: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr, FOUND: tl.constexpr, HYPERS: tl.constexpr,
):  # fmt: skip
    """From totals to coefficients, float64 ``[COEFFICIENTS, tensors]``: one program per ``SOLVE_BLOCK`` tensors.

    Counts one more update of each tensor, unless the step is skipped. If guarded, ``square`` is the sum of gg,
    ``outcome`` (float64 ``[2]``) gets the norm and the clip factor, and ``skipped`` (bool ``[1]``, as int8) whether to
    skip. ``grad_scale`` and ``found_inf``, of one element, float32 or float64, are read with ``SCALED`` and ``FOUND``.
    """
    lanes = tl.arange(0, _SOLVE_BLOCK)
    at = (tl.program_id(0) * _SOLVE_BLOCK + lanes).to(tl.int64)
    mask = at < tensors
    gain = tl.full([], 1.0, tl.float64)
    skip = tl.full([], 0.0, tl.float64)
    if FINISH == _GUARDED:
        scale = tl.full([], 1.0, tl.float64)
        found = tl.full([], 0.0, tl.float64)
        if SCALED:
            scale = tl.load(grad_scale).to(tl.float64)
        if FOUND:
            found = tl.load(found_inf).to(tl.float64)
        norm, gain, skip = _guard(
            tl.load(square), tl.full([], 0.0, tl.float64) + limit, scale, found,
            tl.full([], 1.0 if SKIP_NONFINITE else 0.0, tl.float64), CLIP or SCALED, SKIP_NONFINITE or FOUND,
        )  # fmt: skip
        if tl.program_id(0) == 0:
            tl.store(outcome, norm)
            tl.store(outcome + 1, gain)
            tl.store(skipped, skip.to(tl.int8))
    block = tl.zeros_like(at)
    if FISHER == _BY_GROUP:
        block = tl.load(rows + at * _COLUMNS + _GROUP, mask=mask, other=0)
    elif FISHER == _BY_PARAMETER:
        block = at
    s0, s1, s2, most0, most1, most2, p0, p1, p2 = _load_total(totals, block, mask, blocks, FINISH, NUMERATOR)
    s, p = _at_gain(s0, s1, s2, most0, most1, most2, p0, p1, p2, gain, FINISH, NUMERATOR)
    _solve(rows, hyper, coefs, tensors, at, mask, s, p, skip, True, NUMERATOR, HYPERS)
