"""What a backend is: four passes over the tensors of one device, two functions between them, and their arguments.

A step is two passes. Between them, ``fold`` and ``solve`` turn the sums of the first into the coefficients of the
second. A pass knows only tensors and coefficients. How these follow from the learning rate, damping, clipping and the
sign of ``maximize`` is described in :mod:`sofim_fused.backends.solve`.

A step with a diagonal that adapts has passes of its own, :class:`AdaptivePasses`.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from sofim_fused.checks import NUMERATORS as NUMERATORS
from sofim_fused.checks import reads_gradient


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums and of the scalar algebra: float64; float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class Variance(NamedTuple):
    """Running means of g² over blocks of one tensor's elements, from which its diagonal D = diag(s) is computed.

    They are float64 for a float64 tensor, else float32. Which of them a tensor has says how its elements are grouped:

    ========  ==================  =========================================
    diagonal  has                 block
    ========  ==================  =========================================
    tensor    ``variance``, 0-d   all elements
    row       ``row_var``         the elements with one index of dimension 0
    factored  both                a row, and a column: all other indices
    element   ``variance``        each element
    ========  ==================  =========================================

    Those of elements may be stored as the codes of :func:`sofim_fused.blockwise.encode_squares`.

    Attributes:
        row_var: ``[rows]``.
        col_var: of w's shape without dimension 0.
        variance: 0-dimensional, or of w's shape.
        shape: rows and columns of the whole parameter; (1, elements) where there is no ``row_var``.
        scale: of a ``variance`` that is codes, its scales; ``None`` for others.
    """

    row_var: Tensor | None
    col_var: Tensor | None
    variance: Tensor | None
    shape: tuple[int, int]
    scale: Tensor | None = None

    @property
    def by_element(self) -> bool:
        """Whether each element has its own running mean; one 0-dimensional number counts as a block."""
        return self.variance is not None and self.variance.dim() > 0


@dataclass(eq=False)
class StepTensors:
    """The tensors of one device that take part in a step, n of them, index by index.

    Attributes:
        device: the device of all of them.
        params: w, float32, float64, bfloat16 or float16. Complex parameters appear as their real views.
        grads: g, of w's shape; of w's dtype, or float32 for a 16-bit w.
        exp_avgs: m, of w's shape; float64 for float64 parameters, else float32, bfloat16, or the codes of
            :mod:`sofim_fused.blockwise`.
        lost_bits: what the 16 bits of w could not hold, of w's shape; ``None`` where none is kept. Of w's dtype: a rest
            that updates add to w (Kahan's compensation); above half an ulp of w it cannot be such a rest (w was
            replaced from outside) and counts as zero. int16, of a bfloat16 w: the lower half of a float32 weight
            (:mod:`sofim_fused.backends.master_bits`), which is the weight wherever a pass reads or writes it.
        steps: 0-dimensional int64, the updates that each tensor has received.
        ordinals: each tensor's place among all parameters of the optimizer; keys the stochastic rounding of moments.
        variances: in a step with a diagonal that adapts, of each tensor; otherwise empty.
        exp_avg_scales: of each m that is stored as codes, its scales; ``None`` for others.
    """

    device: torch.device
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    lost_bits: list[Tensor | None]
    steps: list[Tensor]
    ordinals: list[int]
    variances: list[Variance] = field(default_factory=list)
    exp_avg_scales: list[Tensor | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.exp_avg_scales:
            self.exp_avg_scales = [None] * len(self.exp_avgs)

    @property
    def has_codes(self) -> bool:
        """Whether any moment is stored as codes, which only passes that are ``blockwise`` take."""
        return any(scale is not None for scale in self.exp_avg_scales)

    @property
    def has_coded_variances(self) -> bool:
        """Whether any second moment is, which only passes that are ``blockwise_variance`` take."""
        return any(variance.scale is not None for variance in self.variances)

    def __len__(self) -> int:
        return len(self.params)


class Decay(NamedTuple):
    """How a gradient enters the first moment, one value per tensor: ``m' = moment·m + gradient·g + weight·w``.

    ``weight`` is ``None`` unless some tensor has L2 weight decay; passes read w only then. With ``cross``,
    ``accumulate`` also sums the products with g (and w), which a step that :attr:`Settings.reads_gradient` needs.
    """

    moment: Sequence[float]
    gradient: Sequence[float]
    weight: Sequence[float] | None
    cross: bool


class Sums(NamedTuple):
    """Dot products per tensor, each a float64 vector of n on the pass's device, or ``None`` where not asked for.

    Where several of them are stored together, they are in this order (in C++: ``enum Sum`` of
    ``csrc/step/tensor_row.h``).
    """

    mm: Tensor
    mg: Tensor | None = None
    mw: Tensor | None = None
    gg: Tensor | None = None
    gw: Tensor | None = None
    ww: Tensor | None = None


class GradientStep(NamedTuple):
    """The part of an update that does not depend on sums: ``w' = weight·w + gradient·g``; float64 vectors of n."""

    weight: Tensor | None
    gradient: Tensor


class Coefficients(NamedTuple):
    """The update, ``w' = weight·w + gradient·v + moment·m'`` with ``v = gain·g``; w includes its lost bits.

    ``weight`` (``None``: 1), ``gradient`` (``None``: 0, and g is not read) and ``moment`` are float64 vectors of n on
    the pass's device. ``gain`` (0-dimensional float64, ``None``: 1) and ``skip`` (0-dimensional bool, ``None``: false)
    are used only by ``commit``, which changes nothing if ``skip`` is true.
    """

    moment: Tensor
    weight: Tensor | None = None
    gradient: Tensor | None = None
    gain: Tensor | None = None
    skip: Tensor | None = None


FISHER = ("model", "group", "parameter")
"""The values of the option ``fisher``, by their number in :attr:`Settings.fisher`."""


def fisher_blocks(fisher: int, groups: int, tensors: int) -> int:
    """The number B of Fisher blocks of a step; ``fisher`` is an index of :data:`FISHER`."""
    return (1, groups, tensors)[fisher]


class Settings(NamedTuple):
    """What ``fold`` and ``solve`` need besides sums. Tensors are in the order of their parameter groups.

    Attributes:
        hyper: float64 ``[groups, 6]`` on the pass's device: lr, momentum, rho, weight_decay (decoupled), l2, and the
            sign of the gradient (-1 for ``maximize``). With a diagonal that adapts ``[groups, 8]``: then beta2 and eps
            follow, and a rho of ``None`` is infinite. A row of a group without tensors is undefined.
        sizes: how many tensors each group has, n in all.
        fisher: what one Fisher block is, as an index of :data:`FISHER`. There are B blocks: 1, one per group, or n.
        numerator: what F⁻¹ is applied to, as an index of :data:`sofim_fused.checks.NUMERATORS`.
        group_of: int64 ``[n]`` on the pass's device, each tensor's group.
        scales_weight: whether some tensor has weight decay, so that its update scales w.
        rank_one: with a diagonal that adapts, whether any rho is finite, so that F has its term of rank one.
    """

    hyper: Tensor
    sizes: list[int]
    fisher: int
    numerator: int
    group_of: Tensor
    scales_weight: bool
    rank_one: bool = True

    @property
    def reads_gradient(self) -> bool:
        """Whether the update has a term in the gradient, so that the second pass reads it."""
        return reads_gradient(NUMERATORS[self.numerator])

    def coefficients(self, rows: Tensor) -> Coefficients:
        """Those that the update has, of all that a kernel computes: ``[3, n]``, for the weight, gradient and moment."""
        weight, gradient, moment = rows.unbind()
        return Coefficients(
            moment=moment,
            weight=weight if self.scales_weight else None,
            gradient=gradient if self.reads_gradient else None,
        )


class GuardSettings(NamedTuple):
    """The settings of a guarded step.

    Attributes:
        max_norm: the norm to which the true gradients are clipped; ``None``: they are not clipped.
        grad_scale: how many times too large the gradients are, a number or a tensor of one element on any device.
        found_inf: the step is skipped if it is not 0; a number or a tensor, as for ``grad_scale``.
        skip_nonfinite: the step is skipped if the norm is not finite.
    """

    max_norm: float | None
    grad_scale: Tensor | float | None
    found_inf: Tensor | float | None
    skip_nonfinite: bool

    @property
    def has_gain(self) -> bool:
        """Whether gradients are multiplied by a gain: clipped or unscaled."""
        return self.max_norm is not None or self.grad_scale is not None

    @property
    def may_skip(self) -> bool:
        """Whether the step may be skipped."""
        return self.skip_nonfinite or self.found_inf is not None


class Squares(NamedTuple):
    """Sums of g² over blocks of elements, float64 on the pass's device, of gradients as they are.

    Attributes:
        total: ``[n]``, over each tensor.
        rows: over each row of the tensors that have ``row_var``, one tensor after the other; a vector.
        cols: over each column of the tensors that have ``col_var``, in the order of its elements; a vector.
        col_var: ``[n]``, if other ranks hold other columns: the sum of ``col_var`` over all of them, before this step.
    """

    total: Tensor
    rows: Tensor
    cols: Tensor
    col_var: Tensor | None = None


class Scales(NamedTuple):
    """The diagonal of a step: of each tensor D⁻¹ as a factor per row times a factor per column.

    An element of a tensor without ``col_var`` has the column factor 1; all elements of a tensor with a 0-dimensional
    ``variance`` share one row factor. Where each element has its own variance v, the sweep that updates v computes
    1/s with s = √v·root + eps.

    Attributes:
        rows: the row factors of the tensors that have any, one tensor after the other; a float64 vector.
        cols: the column factors of the tensors that have ``col_var``; a float64 vector.
        trace: ``[n]`` float64, Σs over the elements of each tensor; 0 where each element has its own variance.
        beta2: ``[n]`` float64.
        eps: ``[n]`` float64.
        root: ``[n]`` float64, 1/√(1 - β₂^t): the root of the bias correction.
        gain: what gradients are multiplied by, 0-dimensional float64; ``None``: 1.
        skip: whether the step is skipped, 0-dimensional bool; ``None``: it is not.
    """

    rows: Tensor
    cols: Tensor
    trace: Tensor
    beta2: Tensor
    eps: Tensor
    root: Tensor
    gain: Tensor | None = None
    skip: Tensor | None = None


class ScaledSums(NamedTuple):
    """Sums per tensor after a sweep with D known, float64 vectors of n: Σm²/s, Σmv/s with v = gain·g, and Σs."""

    mm: Tensor
    mg: Tensor
    trace: Tensor


NativeResult = (
    tuple[Tensor, bool | Tensor | None]
    | tuple[Tensor | None, bool | Tensor | None, Tensor | None]
    | Literal[True]
    | None
)
NativeStep = Callable[
    [list[dict[str, Any]], MutableMapping[Tensor, Any], Any, Any, "Tensor | None"],
    NativeResult,
]
"""A whole step in one call. The arguments are an optimizer's ``param_groups`` and ``state``; ``grad_scale`` and
``found_inf`` as for :func:`sofim_fused.step.schedule.guarded`, or ``None``; and the counter of skipped steps, or
``None`` as long as there is none.

The result is ``True`` after a plain step. After a guarded one, it is the norm of the gradients and whether the step was
skipped (on the device: 0-dimensional int64, 1 if so). A backend may raise the counter itself; the second value is then
``None``. If there is a third value that is not ``None``, it is the signal of each Fisher block, of a step with a
diagonal that adapts; without a guard the first two are then ``None``. A result of ``None`` alone means that nothing was
changed, because this function cannot take the step: either the passes can, or a check will raise an error."""


class NativeSharded(Protocol):
    """A step of which other ranks hold a part, natively: two halves (:mod:`sofim_fused.step.sharded`)."""

    def begin_sharded(
        self,
        param_groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, Any],
        guarded: bool,
        class_of: list[int],
        classes: int,
    ) -> tuple[Tensor, Tensor] | None:
        """The first half, up to this rank's sums; ``None``, with nothing changed: the passes have to take the step.

        ``class_of``: the class of each parameter. The sums are those of ``Passes.fold``: blocks ``[classes, k, B]``,
        and of a guarded step the squares, ``[classes]``. After it :meth:`finish_sharded` or :meth:`cancel_sharded` has
        to follow.
        """

    def finish_sharded(
        self, blocks: Tensor, square: Tensor | None, grad_scale: Tensor | float | None, found_inf: Tensor | float | None
    ) -> NativeResult:
        """The second half, from the totals over ranks: blocks ``[k, B]``, and of a guarded step the sum of squares."""

    def cancel_sharded(self) -> None:
        """If a step was begun, forget it."""


class NativeInBackward(Protocol):
    """A plain step in parts, natively: gradients one by one, then the rest (:mod:`sofim_fused.in_backward`).

    A method that returns ``False`` has changed nothing, and the passes have to do its part.
    """

    def watch(self, groups: list[list[Tensor]]) -> None:
        """Set the parameters of the following steps, by group, without keeping them alive."""

    def freeze_settings(self, param_groups: list[dict[str, Any]], release: bool) -> bool:
        """Copy the settings for the gradients of this step, and forget those of the last step.

        ``release``: each gradient is freed once it was taken. Also ``False`` if the parameters are not those watched.
        """

    def serve_hooks(self, state: MutableMapping[Tensor, Any], progress: bytearray) -> None:
        """Let hooks take gradients without Python, from now to :meth:`leave_hooks` or :meth:`forget`.

        A gradient that was taken is a 2 in ``progress``, which has a byte for each parameter, 0 at first.
        """

    def leave_hooks(self) -> None:
        """From now on every hook calls Python."""

    def take(self, param: Tensor, state: MutableMapping[Tensor, Any], group: int, ordinal: int, again: bool) -> bool:
        """Add a parameter's gradient to its moment, and update w by the gradient's term if the step has one.

        ``again``: it is not this parameter's first gradient in this step. They add up.
        """

    def allow_parts(self) -> None:
        """From now on, also take gradients whose memory is a part of a larger block."""

    def mark(self, param: Tensor, ordinal: int) -> None:
        """Record the current ``param.grad`` as the gradient that was taken, as :meth:`take` does."""

    def fits(self, param: Tensor, ordinal: int) -> bool:
        """Whether a parameter's gradient is the recorded one, with the same values as far as can be checked."""

    def sums_of(self, ordinal: int) -> tuple[float, float, float] | None:
        """The sums (mm, mg, mw) of a parameter whose gradient was taken in this step; the last two only if needed."""

    def finish(
        self,
        param_groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, Any],
        current: list[dict[str, Any]],
    ) -> bool:
        """Take the rest of the step, for all gradients that were taken, with the settings of ``param_groups``.

        Also ``False`` if another parameter has a gradient, if a gradient has changed since it was taken, or if the
        parameters of ``current``, the optimizer's own groups, are not those watched.
        """

    def forget(self) -> None:
        """Discard the records of this step, as if no gradient had been taken."""


@runtime_checkable
class AdaptivePasses(Protocol):
    """The passes of a step with a diagonal that adapts; a part of :class:`Passes`.

    ``tensors.variances`` says which diagonal each tensor has. A step is: ``squares``, ``adapt``; then, if F has no
    term of rank one, ``solve_scaled``, ``commit_scaled``; otherwise ``accumulate_scaled``, ``fold_scaled``,
    ``solve_scaled``, ``apply_scaled``. Sums and version counters are as for :class:`Passes`. Formulas are in
    :mod:`sofim_fused.backends.adaptive`.
    """

    def squares(self, tensors: StepTensors) -> Squares:
        """Read g and write nothing."""

    def adapt(
        self,
        tensors: StepTensors,
        settings: Settings,
        squares: Squares,
        guard: GuardSettings | None,
        square: Tensor | None,
    ) -> tuple[Scales, Tensor | None]:
        """Update ``row_var``, ``col_var`` and 0-dimensional ``variance``, unless the step is skipped; compute D⁻¹.

        Args:
            tensors: of the step; ``steps`` are not advanced yet.
            settings: of the same tensors.
            squares: from :meth:`squares`, summed over the ranks that hold other parts of a row, column or tensor. Only
                ``TorchAdaptive`` has to take :attr:`Squares.col_var`. Without ``guard`` nothing else is needed of it
                than the sums of tensors that do not have a variance for each element.
            guard: ``None``: gradients are neither clipped nor scaled, and the step is not skipped.
            square: with ``guard``, the sum of all ``squares.total``, over devices and ranks.

        Returns:
            The scales; with ``guard`` also the true gradients' norm before clipping, 0-dimensional float64.
        """

    def accumulate_scaled(self, tensors: StepTensors, decay: Decay, scales: Scales) -> ScaledSums:
        """Update m, and the variances of elements, unless ``scales.skip``; return the sums, of m and s as stored.

        Runs before ``steps`` advance: a stochastic rounding is keyed by ``steps + 1``.
        """

    def fold_scaled(
        self,
        steps: Sequence[Tensor],
        settings: Settings,
        sums: ScaledSums,
        class_of: Tensor | None = None,
        classes: int = 1,
    ) -> Tensor:
        """Add up each tensor's part per Fisher block: float64 ``[classes, 4, B]`` of T, Q, P and m̂ᵀD⁻¹m̂."""

    def solve_scaled(
        self, steps: Sequence[Tensor], settings: Settings, blocks: Tensor | None, skip: Tensor | None
    ) -> tuple[Coefficients, Tensor | None]:
        """The coefficients of the last sweep; ``steps`` advance by one, unless ``skip``.

        Args:
            steps: of the tensors.
            settings: of the same tensors.
            blocks: ``[4, B]`` from :meth:`fold_scaled`, summed over classes, devices and ranks; ``None``: F has no term
                of rank one.
            skip: as :attr:`Scales.skip`.

        Returns:
            The coefficients, without ``gain`` and ``skip``; and, with ``blocks``, the signal q of each Fisher block.
        """

    def apply_scaled(self, tensors: StepTensors, coefficients: Coefficients, scales: Scales) -> None:
        """Update w in place: ``w' = weight·w + (gradient·v + moment·m)/s`` with ``v = gain·g``, unless skipped."""

    def commit_scaled(self, tensors: StepTensors, decay: Decay, coefficients: Coefficients, scales: Scales) -> None:
        """Update m, the variances of elements, and w as in :meth:`apply_scaled`, from these before their rounding.

        Runs after ``steps`` advance: a stochastic rounding is keyed by ``steps``.
        """


@runtime_checkable
class Passes(AdaptivePasses, Protocol):
    """The whole interface of a backend. Every pass is one sweep over all tensors of ``tensors``.

    Arithmetic is float32, or float64 for float64 parameters. Sums consist of float64 products, added in float64 in an
    order that is the same in every run and for any number of threads. Each pass raises the version counter of every
    tensor that it writes, so that autograd notices.

    Attributes:
        name: its name, for ``backend=``.
        emulated: it exists only for tests, because it is far too slow; it is used only if requested by name.
        blockwise: it takes moments that are stored as codes of 8 bits (:mod:`sofim_fused.blockwise`).
        blockwise_variance: so it does second moments, the variances of elements.
    """

    name: str
    emulated: bool
    blockwise: bool
    blockwise_variance: bool

    def accumulate(self, tensors: StepTensors, decay: Decay, gradient_step: GradientStep | None = None) -> Sums:
        """Update m in place and return its sums: ``mm``, with ``decay.cross`` also ``mg``, and with L2 decay ``mw``.

        The sums are those of m as stored. With ``gradient_step``, the same sweep then also updates w by it.
        Runs before ``steps`` advance: a stochastic rounding is keyed by ``steps + 1``.
        """

    def apply(self, tensors: StepTensors, coefficients: Coefficients) -> None:
        """Update w in place from m (and g, where a gradient coefficient is given)."""

    def dots(self, tensors: StepTensors, decay: Decay) -> Sums:
        """Write nothing; return ``mm``, ``mg``, ``gg``, and with ``decay.weight`` also ``mw``, ``gw`` and ``ww``."""

    def commit(self, tensors: StepTensors, decay: Decay, coefficients: Coefficients) -> None:
        """Update m by ``gain·g`` instead of g, then w from the new m before its rounding, both in place.

        Runs after ``steps`` advance: a stochastic rounding is keyed by ``steps``.
        """

    def fold(
        self,
        steps: Sequence[Tensor],
        settings: Settings,
        sums: Sums,
        guarded: bool,
        class_of: Tensor | None = None,
        classes: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Compute each tensor's part of the curvature from its sums, and add these up per Fisher block.

        Args:
            steps: of the tensors, as in :class:`StepTensors`; not advanced yet.
            settings: of the same tensors.
            sums: from ``accumulate``, or from ``dots`` if ``guarded``.
            guarded: which kind of step it is.
            class_of: int64 ``[n]`` on the device, from 0 to ``classes`` - 1: tensors of different classes are added up
                separately, because other ranks add their sums to each. ``None``: one class.
            classes: how many there are.

        Returns:
            Two float64 tensors on the device. ``[classes, k, B]``: for a plain step k is 1 (S) or, with
            ``settings.reads_gradient``, 2 (S and P); for a guarded one 6 or 9, the coefficients of 1, κ and κ² of S, of
            its rounding error's scale, and of P. ``[classes]``: the sums of ``gg``; in a plain step anything. Without
            tensors all are 0.
        """

    def solve(
        self,
        steps: Sequence[Tensor],
        settings: Settings,
        blocks: Tensor,
        guard: GuardSettings | None,
        square: Tensor | None,
    ) -> tuple[Coefficients, Tensor | None, Tensor | None]:
        """The coefficients of the second pass, from totals; ``steps`` advance by one, unless the step is skipped.

        Args:
            steps: of the tensors.
            settings: of the same tensors.
            blocks: ``[k, B]`` as ``fold`` returns it, summed over classes, devices and ranks.
            guard: ``None``: a plain step.
            square: of a guarded step, the sum of all ``gg``, 0-dimensional on the device.

        Returns:
            The coefficients; of a guarded step also the true gradients' norm before clipping (0-dimensional float64)
            and, if ``guard`` asks for it, whether the step is skipped (0-dimensional bool).
        """

    def native_step(self) -> NativeStep:
        """A new function that takes whole steps on this backend's device, if it can; it may keep memory for them."""

    def native_sharded(self) -> NativeSharded | None:
        """An object that takes steps of which other ranks hold a part, or ``None`` if only the passes do."""

    def native_in_backward(self) -> NativeInBackward | None:
        """A new object that takes steps in parts, or ``None`` if this backend has only the passes for that."""
