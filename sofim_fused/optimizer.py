"""The optimizer: arguments, state, and one step from gradients to updated parameters."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    StateDict,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from sofim_fused import backends, checks, checks_state_dict, from_adamw, from_sgd, from_torch
from sofim_fused.backends import NativeStep
from sofim_fused.in_backward import InBackward, check_unwatched
from sofim_fused.sharding import checkpoint_calls, is_flattened
from sofim_fused.step import gather, schedule
from sofim_fused.step.plan import Plan
from sofim_fused.step.sharded import ShardedStep

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_P = ParamSpec("_P")
_R = TypeVar("_R")
_SOFIM = TypeVar("_SOFIM", bound="SOFIM")
# Attributes that copies and pickles preserve, besides groups and state.
_KEPT = ("_capturable", "_amp_fused", "_in_backward", "_release_grads", "_by_diagonal")


def _no_native_step(*_: Any) -> None:
    """Replaces :data:`NativeStep` where the backend takes no step over several ranks: the passes take all of them."""


class SOFIM(Optimizer):
    r"""SOFIM: a Newton-like step with a regularized Fisher information matrix of rank one plus a diagonal.

    .. math::
       \begin{array}{ll}
            m_t = \beta\, m_{t-1} + (1 - \beta)\, g_t  & \text{first moment}                                \\
            \hat m_t = m_t / (1 - \beta^t)             & \text{bias correction}                             \\
            F_t = \hat m_t \hat m_t^\top + \rho I      & \text{regularized Fisher information matrix}       \\
            w_t = w_{t-1} - \eta\, F_t^{-1} v_t        & v_t = \hat m_t \text{, } g_t \text{ or the look-ahead}
       \end{array}

    The Sherman-Morrison formula gives the inverse: :math:`F^{-1} \hat m = \hat m / (\rho + \|\hat m\|^2)`. So a step
    needs one sum of squares over all parameters, and scales the update by it. With :math:`v_t = \hat m_t` every step is
    bounded, :math:`\|\eta F^{-1} \hat m\| \le \eta / (2 \sqrt\rho)`, whatever the gradient. Source: arXiv 2403.02833,
    Algorithm 1.

    With another ``diagonal`` the identity becomes a diagonal matrix D that adapts to the size of the gradients, as in
    Adam: :math:`F = \hat m \hat m^\top / \mathrm{tr}\, D + \rho D`, and the step is
    :math:`\eta \rho F^{-1} v`, or :math:`\eta D^{-1} v` with ``rho=None``. :class:`AdaSOFIM` has defaults for it, and
    ``docs/adaptive.md`` the formulas.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define parameter groups. Real or complex, of 16, 32
            or 64 bits, dense. A group may have its own ``lr``, ``momentum``, ``rho``, ``diagonal``, ``beta2``, ``eps``,
            ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``state_dtype``, ``kahan`` and
            ``master_weight_bits``.
        lr: η, the learning rate: a float or a one-element tensor. ``None``: 0.5, and 4e-3 for groups whose diagonal
            adapts.
        momentum: β in [0, 1), the decay of the first moment: SGD's ``momentum`` with ``dampening=momentum``.
        rho: ρ ≥ 1e-30, the regularization (damping) of the Fisher matrix: a float or a one-element tensor, in units of
            a squared gradient norm. If the groups of one Fisher block have different values, the block's
            :math:`\rho I` is a diagonal matrix of these. With a diagonal that adapts, ρ has no dimension, and ``None``
            leaves the term of rank one out; all groups of a Fisher block have a number, or none has. ``"auto"``: 1, and
            ``None`` for groups whose diagonal adapts.
        diagonal: D: the ``"identity"`` (the paper), or roots of running means of g² over each ``"tensor"``, each
            ``"row"`` (dimension 0), rows and columns (``"factored"``: the product of a number per row and one per
            column; a tensor of one dimension per element), or each ``"element"``. The diagonals of all groups adapt, or
            none does. L2 decay is then refused.
        beta2: β₂ in [0, 1), the decay of these means.
        eps: added to their roots, at least 1e-18 and less than 1e18.
        numerator: v: ``"moment"`` is the paper's bias-corrected first moment; ``"gradient"`` is the gradient itself
            (the natural-gradient form, whose conditioning is :math:`1 + \|\hat m\|^2/\rho`); ``"nesterov"`` is the
            look-ahead :math:`(\beta\, m_t + (1 - \beta)\, g_t) / (1 - \beta^{t+1})`, as in SGD's ``nesterov=True``.
            The bound on a step holds for ``"moment"`` alone.
        fisher: the parameters that share a Fisher matrix: the whole ``"model"`` (the paper), each ``"group"``, or each
            ``"parameter"``.
        weight_decay: λ ≥ 0.
        decoupled_weight_decay: ``True``: w is also multiplied by 1 - ηλ (as in AdamW); ``False``: λw is added to the
            gradient (L2, as in SGD), after clipping.
        maximize: maximize the objective instead of minimizing it.
        state_dtype: dtype of the first moment: ``None`` (float64 for 64-bit parameters, else float32),
            ``torch.float32``, ``torch.bfloat16`` or ``torch.float8_e4m3fn``, or the name of one of them
            (``"bfloat16"``). The last two are stochastically rounded, reproducibly. In 8 bits, each 128 elements of a
            row (dimension 0) share a scale; with ``diagonal="element"`` the roots of the second moments are stored in
            the same way. Tensors of fewer than two dimensions, of rows shorter than 128 elements, or of fewer than
            4,096 elements keep float32; and on a GPU steps run in Triton (with second moments in 8 bits in pure
            PyTorch), or without it in pure PyTorch.
        kahan: keep the bits of an update that a 16-bit parameter cannot hold in a second 16-bit tensor, and add them
            later. ``None``: yes for 16-bit parameters that have no ``master_weight_bits``.
        master_weight_bits: ``32``: the weights of bfloat16 parameters are the upper halves of float32 weights, and the
            lower halves are kept in an int16 tensor; training is that of float32 weights, bit for bit, in the bytes
            that ``kahan`` would take. ``24``: only 8 more bits are kept, in an int8 tensor, and each update is rounded
            to these 24 stochastically, without bias and reproducibly. ``None``: no such bits. ``"auto"``: 32, unless
            ``kahan`` is set. Parameters of other dtypes ignore it.
        max_grad_norm: clip the gradients, as one vector over all groups, to this norm inside the step.
            :attr:`grad_norm` is then the norm before clipping.
        skip_nonfinite: a step changes nothing if any gradient has a NaN or an infinity; :attr:`skipped_steps` counts
            these steps. (The test is on the sum of squares, so a float64 gradient above 1e154 counts as infinite.)
        foreach: ``True`` and ``False`` both select the pure-PyTorch backend, because the native ones are neither.
        fused: ``True`` selects a native backend, and is an error if there is none; ``False`` selects the pure-PyTorch
            one.
        capturable: a step may be captured in a CUDA graph, after one like it was taken. A replay reads gradients from
            the same memory, ``lr`` and ``rho`` from their tensors if these are on the device, and uses all numbers as
            they were when the graph was captured. Step counts are on the device in any case.
        amp_fused: under a ``torch.amp.GradScaler`` the step itself unscales the gradients, in passes that read them
            anyway. If they contain an infinity or a NaN, the step changes nothing, and :attr:`skipped_steps` counts it.
            Nothing waits for the device. float16 gradients are accepted too. ``False``: GradScaler unscales the
            gradients in memory before the step, and waits for the device to decide whether to call it.
        in_backward: hooks on the parameters add gradients to their moments in the backward pass, while the gradients
            are in the cache; :meth:`step` has little left to do. The result is that of a plain step. Settings are read
            at the first gradient of a step; in the moment form ``lr``, ``rho`` and decoupled decay only in
            :meth:`step`. Moments, and in the other forms parameters, change before :meth:`step` is called, and a
            backward pass cannot be undone: :meth:`step` raises an error if gradients or groups were changed in between
            (on a GPU, only if version counters show it) or state was deleted. For several backward passes per step use
            :meth:`accumulate_grads`. Does not work with ``max_grad_norm``, ``skip_nonfinite``, GradScaler,
            DistributedDataParallel, FullyShardedDataParallel (``fully_shard`` works) or ZeroRedundancyOptimizer, nor
            with 16-bit parameters that do not have 32 ``master_weight_bits``, except in the moment form and with a
            diagonal that adapts.
        release_grads: free each gradient once it has entered its moment (``in_backward=True``), so that memory for all
            of them at once is never needed. Clipping then finds no gradients and has no effect, without an error.
        differentiable: ``True`` is refused, because the update is made in place.
        shard_group: the ranks that hold other parameters of the same model, as with pipeline stages or DeepSpeed's
            ZeRO. Sums are taken over all of them, and a rank may have no parameter at all. ``None``: this rank has all
            parameters, or SOFIM recognizes how they are sharded: as ``DTensor``, by FullyShardedDataParallel, or by a
            ZeroRedundancyOptimizer around this optimizer (at the first step).
        backend: ``"auto"``, ``"cpu"`` (C++), ``"cuda"`` (CUDA C++), ``"triton"`` or ``"reference"`` (PyTorch). It is
            never saved with the state; :attr:`backends` shows which is used.

    Raises:
        TypeError, ValueError: an argument, a parameter, a gradient or a state dict is refused; the message says which
            and what to do, and nothing was changed. So is ``rho=None`` with ``diagonal="identity"``, which leaves
            nothing.
        RuntimeError: the requested backend cannot run on a parameter's device, or a step is captured in a graph
            without ``capturable``, or before any step like it was taken.

    Example:
        >>> optimizer = SOFIM(model.parameters(), lr=0.5, momentum=0.9, rho=1.0)
        >>> optimizer.zero_grad()
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()

    The state of a parameter, created at its first gradient: ``exp_avg`` (of its shape), ``step`` (0-dimensional int64),
    ``exp_avg_scale`` (float32, rows times blocks of a row) if ``exp_avg`` is in 8 bits (and ``variance_scale``, if each
    of its elements has a variance: this is then in 8 bits as well), of 16-bit parameters
    ``master_bits`` (of its shape, int16; int8 for 24 bits) or ``kahan`` (of its shape and dtype), if either is kept,
    and for a diagonal that adapts running means of g² (float32, or float64 for 64-bit parameters): ``row_var`` (one per
    row), with ``"factored"`` also ``col_var`` (of the shape of a row), or ``variance`` (0-dimensional for a tensor, of
    the parameter's shape for elements). A parameter without a gradient is not part of that step's Fisher matrix, and
    its state does not change. Nothing in a step waits for the device, unless the parameters are on devices of different
    kinds.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        momentum: float = 0.9,
        rho: float | Tensor | Literal["auto"] | None = "auto",
        *,
        diagonal: Literal["identity", "tensor", "row", "factored", "element"] = "identity",
        beta2: float = 0.99,
        eps: float = 1e-8,
        numerator: Literal["moment", "gradient", "nesterov"] = "moment",
        fisher: Literal["model", "group", "parameter"] = "model",
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        state_dtype: torch.dtype | Literal["float32", "bfloat16", "float8_e4m3fn"] | None = None,
        kahan: bool | None = None,
        master_weight_bits: Literal[24, 32, "auto"] | None = "auto",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        capturable: bool = False,
        in_backward: bool = False,
        release_grads: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        amp_fused: bool = True,
        differentiable: bool = False,
        backend: str = "auto",
        shard_group: ProcessGroup | None = None,
    ) -> None:
        # Of groups that do not set them, where the user did not choose: these follow each group's diagonal.
        self._by_diagonal = (*(["lr"] if lr is None else []), *(["rho"] if _is_auto(rho) else []))
        defaults = {
            **_by_diagonal(diagonal, self._by_diagonal),
            **({} if lr is None else {"lr": lr}),
            "momentum": momentum,
            **({} if _is_auto(rho) else {"rho": rho}),
            "diagonal": diagonal,
            "beta2": beta2,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "state_dtype": checks.dtype_named(state_dtype),
            "kahan": kahan,
            "master_weight_bits": master_weight_bits,
            "numerator": numerator,
            "fisher": fisher,
            "max_grad_norm": max_grad_norm,
            "skip_nonfinite": skip_nonfinite,
        }
        checks.group(defaults)
        self._backend = backends.requested(backend, foreach, fused)
        self._capturable = checks.flag("capturable", capturable)
        self._amp_fused = amp_fused is None or checks.flag("amp_fused", amp_fused)
        checks.not_differentiable(differentiable)
        self._in_backward = checks.flag("in_backward", in_backward)
        self._release_grads = checks.flag("release_grads", release_grads)
        if self._release_grads and not self._in_backward:
            raise ValueError("release_grads=True without in_backward=True: gradients are needed until step(); set both")
        if self._in_backward:
            checks.in_backward([defaults])
        checks.shard_group(shard_group, self._in_backward)
        self._shard_group = shard_group
        self._plan = Plan(self._backend, shard_group)
        self._backward: InBackward | None = None
        self._step_in_one_call: NativeStep | None = None
        self._may_not_capture = False
        # What guarded steps recorded, by name. Not attributes: torch 2.10's compiler cannot trace a step that sets any.
        self._recorded: dict[str, Tensor] = {}
        # No parameters count as one empty group: some groups may be empty, but not all of them.
        super().__init__(checks.groups(params) or [{"params": []}], defaults)
        if shard_group is None:  # else a rank may have none
            checks.some_parameter(self.param_groups)
        if self._in_backward:
            self._backward = self._new_in_backward()

    @classmethod
    def from_sgd(
        cls: type[_SOFIM],
        optimizer: torch.optim.SGD,
        *,
        rho: float | Tensor = 1.0,
        steps: int | None = None,
        **options: Any,
    ) -> _SOFIM:
        """Continue a running ``torch.optim.SGD``, with copies of its groups, hyperparameters and momentum buffers.

        Learning rates become η = ρ·lr·(1-dampening)/(1-momentum), so that a step equals SGD's if the squared norm of
        the moment is far below ρ; moments are the buffers times (1-momentum)/(1-dampening). The SGD optimizer does not
        change. The two share only the parameters, and values that the user added to groups. ``docs/from_sgd.md`` has
        the details.

        Args:
            optimizer: the SGD optimizer. With ``nesterov=True`` the new one has ``numerator="nesterov"``, unless
                ``options`` has another.
            rho: as in the constructor; a group of the SGD optimizer that has its own ``rho`` keeps it.
            steps: how many updates SGD took, from which bias correction continues; ``None``: so many that the
                correction is 1.
            options: the constructor's other arguments. SGD's ``foreach`` and ``fused`` are ignored.

        Returns:
            A new optimizer. Parameters with a momentum buffer have state; others get it with their first gradient.

        Raises:
            TypeError, ValueError: the SGD optimizer or an argument is refused, or an argument comes from the SGD
                optimizer (``lr``, ``momentum``, ``weight_decay``, ``maximize``); the message says which and what to
                do. A diagonal that adapts is refused, because SGD has no running means of g².
        """
        taken = from_sgd.taken(optimizer, steps, options)
        ours = cls(taken.groups, rho=rho, **taken.defaults, **taken.options)
        from_sgd.convert(taken, ours.param_groups, ours.defaults, ours.state)
        return ours

    @classmethod
    def from_adamw(
        cls: type[_SOFIM],
        optimizer: torch.optim.Adam,
        *,
        diagonal: Literal["tensor", "row", "factored", "element"] = "factored",
        numerator: Literal["moment", "gradient", "nesterov"] = "nesterov",
        rho: float | Tensor | None = None,
        **options: Any,
    ) -> _SOFIM:
        """Continue a running ``torch.optim.AdamW`` with a diagonal that adapts.

        Groups, learning rates, betas, eps, decoupled weight decay, moments and step counts are copied as they are;
        second moments become the running means of g² that the diagonal needs. With ``diagonal="element"`` and
        ``numerator="moment"`` the following steps are AdamW's, up to rounding. The AdamW optimizer does not change. The
        two share only the parameters, and values that the user added to groups. ``docs/from_adamw.md`` has the details.

        Args:
            optimizer: the AdamW optimizer, or a ``torch.optim.Adam`` without L2 decay; without ``amsgrad``.
            diagonal: as in the constructor; a group of the AdamW optimizer that has its own ``diagonal`` keeps it.
            numerator: as in the constructor.
            rho: as in the constructor; a group of the AdamW optimizer that has its own ``rho`` keeps it.
            options: the constructor's other arguments. AdamW's ``foreach`` and ``fused`` are ignored.

        Returns:
            A new optimizer. Parameters of which AdamW has state have state; others get it with their first gradient.

        Raises:
            TypeError, ValueError: the AdamW optimizer or an argument is refused, or an argument comes from the AdamW
                optimizer (``lr``, ``momentum``, ``beta2``, ``eps``, ``weight_decay``, ``maximize``); the message says
                which and what to do.
        """
        taken = from_adamw.taken(optimizer, diagonal, options)
        more = {"capturable": taken.capturable, **options}
        ours = cls(taken.groups, diagonal=diagonal, numerator=numerator, rho=rho, **taken.defaults, **more)
        from_adamw.convert(taken, ours.param_groups, ours.defaults, ours.state)
        return ours

    # One step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The result of the closure.

        Raises:
            ValueError: a gradient or a hyperparameter is refused; nothing was changed.
            RuntimeError: with ``in_backward=True``, gradients, groups or state were changed after ``backward()``. If
                it was a gradient, a second call takes the step with the gradients of the backward pass.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._backward is not None:
            checks.unscaled(self)
            if not self.state and self._made_state_for("_init_optim_state"):
                return loss
            (self._backward.finish_untraced if torch.compiler.is_compiling() else self._backward.finish)()
            return loss
        outcome = None
        if not torch.compiler.is_compiling():
            outcome = self._in_one_call()
            if outcome is None and self._plan.refresh_placement(self.param_groups):
                self._step_in_one_call = None
                outcome = self._in_one_call()
        if outcome is None:
            self._step_by_passes()
        elif outcome is not True:
            self._record(*outcome)
        return loss

    @staticmethod
    def profile_hook_step(func: Callable[_P, _R]) -> Callable[_P, _R]:
        """Wrap ``step`` as :class:`Optimizer` does, but skip the wrapper if no hook and no profiler needs it.

        For a few small tensors the wrapper would take longer than the step itself.
        """
        observed = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            self: Any = args[0]
            waited_for = (
                self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
                or torch.compiler.is_compiling()
                or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
            )
            return (observed if waited_for else func)(*args, **kwargs)

        return step

    def _in_one_call(self) -> backends.NativeResult:
        """Take the step with :data:`NativeStep`, and return its result."""
        native_step = self._native_step()
        if self._may_not_capture and backends.capturing():
            raise RuntimeError("a step is captured in a CUDA graph: make the optimizer with capturable=True")
        return native_step(
            self.param_groups,
            self.state,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            self._recorded.get("skipped_steps"),
        )

    def _native_step(self) -> NativeStep:
        """The step in one call, for the first parameter's device. Models on several devices need the passes instead."""
        if self._step_in_one_call is None:
            plan, device = self._plan, self._plan.first_device(self.param_groups)
            plan.refresh_placement(self.param_groups)
            codes = self._codes_by_device().get(device, (False, False))
            passes, rank_sums = plan.passes_for(device, *codes), plan.rank_sums(self)
            if rank_sums is None:
                self._step_in_one_call = passes.native_step()
            else:
                native = passes.native_sharded()
                self._step_in_one_call = _no_native_step if native is None else ShardedStep(native, rank_sums)
            self._may_not_capture = device.type == "cuda" and not self._capturable
        return self._step_in_one_call

    @torch.no_grad()
    def _step_by_passes(self) -> None:
        if not self.state and self._made_state_for("_init_optim_state"):
            return
        grad_scale, found_inf = self._scaling()
        whole = self.param_groups[0]
        limit, skip = whole["max_grad_norm"], whole["skip_nonfinite"]
        guarded = limit is not None or skip or grad_scale is not None or found_inf is not None
        shares = self._plan.shares(self, guarded)
        if not shares:
            return
        if shares[0].hyper.adaptive:
            # Every parameter has state now: a first step can be taken in one call, too.
            outcome = None if torch.compiler.is_compiling() else self._in_one_call()
            if outcome is not None:
                if outcome is not True:
                    self._record(*outcome)
                return
            guard = backends.GuardSettings(limit, grad_scale, found_inf, skip) if guarded else None
            if skip or found_inf is not None:
                _ = self.skipped_steps
            seen, signal = schedule.adaptive(shares, self.param_groups, guard)
            norm, skipped = (None, None) if seen is None else seen
            self._record(norm, skipped, signal)
            return
        if not guarded:
            schedule.plain(shares, self.param_groups)
            return
        if skip or found_inf is not None:
            _ = self.skipped_steps  # create it now: after the step there may be no memory for it
        self._record(*schedule.guarded(shares, self.param_groups, limit, skip, grad_scale, found_inf))

    @torch.no_grad()
    def _made_state_for(self, caller: str) -> bool:
        """If ``caller`` is among our callers, create all state, as first gradients would, and nothing else."""
        if torch.compiler.is_compiling() or not checkpoint_calls(caller):
            return False
        params = [(index, param) for index, group in enumerate(self.param_groups) for param in group["params"]]
        entries = [
            gather.Entry(index, ordinal, param, param)
            for ordinal, (index, param) in enumerate(params)
            if param.requires_grad
        ]
        for entry in entries:
            gather.check_state(entry, self.param_groups[entry.group], self.state)
        for entry in entries:
            gather.ensure_state(entry, self.param_groups[entry.group], self.state)
        return True

    def _scaling(self) -> tuple[Tensor | float | None, Tensor | float | None]:
        """The scale and the flag of a ``torch.amp.GradScaler`` for this step, as for :func:`schedule.guarded`."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        checks.scaling("grad_scale", grad_scale)
        checks.scaling("found_inf", found_inf)
        # A flag on the CPU can be read: if it is not set, a plain step will do, unless it is set on another rank.
        readable = not isinstance(found_inf, Tensor) or found_inf.device.type == "cpu"
        known = readable and self._plan.rank_sums(self) is None
        return grad_scale, None if known and not found_inf else found_inf

    def _record(self, norm: Tensor | None, skip: Tensor | bool | None, signal: Tensor | None = None) -> None:
        """Store the results of a step: of a guarded one (:class:`sofim_fused.step.schedule.Guard`), and the signal."""
        if norm is not None:
            self._recorded["grad_norm"] = norm
        if signal is not None:
            self._recorded["signal"] = signal
        if isinstance(skip, Tensor):
            counter = self.skipped_steps
            counter += skip.to(counter.device)
        elif skip:
            self.skipped_steps.add_(1)

    # Properties

    @property
    def backends(self) -> dict[torch.device, str]:
        """The name of the backend that is used for each device on which a parameter lies."""
        devices = {param.device for group in self.param_groups for param in group["params"]}
        codes = self._codes_by_device()
        return {
            device: self._plan.passes_for(device, *codes.get(device, (False, False))).name
            for device in sorted(devices, key=str)
        }

    def _codes_by_device(self) -> dict[torch.device, tuple[bool, bool]]:
        """Whether any first moment on a device, and any second one, is in 8 bits: the backend has to take these."""
        found: dict[torch.device, tuple[bool, bool]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                first, second = gather.codes_of(param, group)
                if first:  # else it may be anything, which is refused later
                    found[param.device] = True, second or found.get(param.device, (True, False))[1]
        return found

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells a ``torch.amp.GradScaler`` whether :meth:`step` itself unscales the gradients.

        Not under FSDP1: its ``ShardedGradScaler`` tells all ranks about an infinity on one of them only if it unscales
        the gradients itself; otherwise the ranks would have different scales.
        """
        if self._in_backward:
            return True  # so that step() can raise an error that says why this cannot work
        sums = self._plan.rank_sums(self)
        return self._amp_fused and not (sums is not None and sums.flattened)

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients of the last step before clipping, a 0-dimensional float64 tensor on the device.

        ``None`` before the first step with ``max_grad_norm`` or ``skip_nonfinite`` or on scaled gradients (the norm is
        that of the unscaled ones). Reading its value waits for the device.
        """
        return self._recorded.get("grad_norm")

    @property
    def signal(self) -> Tensor | None:
        r"""The signal of the last step, :math:`q = \hat m^\top D^{-1} \hat m / T`, of each Fisher block, on the device.

        A float64 vector. It is at least 0: near (1-β)/(1+β) if successive gradients have nothing in common, near 1 if
        they all point in one direction, and above 1 for a burst after small gradients. ``None`` before the first step,
        without a diagonal that adapts, and with ``rho=None`` (the sums are then not taken). A skipped step has no
        signal, and what is then here means nothing. Reading its values waits for the device. Not part of
        :meth:`state_dict`.
        """
        return self._recorded.get("signal")

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps were skipped since construction, a 0-dimensional int64 tensor on the device.

        It counts steps that ``skip_nonfinite`` skipped, and steps in whose gradients a ``torch.amp.GradScaler`` found
        an infinity or a NaN (with ``amp_fused=False`` GradScaler does not call these steps, and they are not counted).
        It is the counter itself, which later steps increase; clone it to keep a value. Not part of
        :meth:`state_dict`.
        """
        if "skipped_steps" not in self._recorded:
            device = self._plan.first_device(self.param_groups)
            with torch.inference_mode(False):  # otherwise no later step could write to it
                self._recorded["skipped_steps"] = torch.zeros((), dtype=torch.int64, device=device)
        return self._recorded["skipped_steps"]

    # Gradients in the backward pass

    def accumulate_grads(self) -> contextlib.AbstractContextManager[None]:
        """A context for all backward passes of a step except the last one: their gradients add up.

        It has an effect only with ``in_backward=True``; otherwise gradients add up in any case.

        Raises:
            ValueError: with ``release_grads=True``, except in the moment form: the others need all gradients together.

        Example:
            >>> with optimizer.accumulate_grads():
            ...     for micro_batch in batches[:-1]:
            ...         loss_of(micro_batch).backward()
            >>> loss_of(batches[-1]).backward()
            >>> optimizer.step()
        """
        return contextlib.nullcontext() if self._backward is None else self._backward.accumulating()

    def remove_hooks(self) -> None:
        """Remove the hooks of ``in_backward=True`` from the parameters: from now on :meth:`step` uses all gradients."""
        if self._backward is not None:
            self._backward.remove()

    def _new_in_backward(self) -> InBackward:
        return InBackward(self, self._plan, self._release_grads, self._capturable)

    # Groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group. Options that it does not set have the values of the constructor's arguments.

        Raises:
            TypeError, ValueError: the group, a value in it or one of its parameters is refused.
            RuntimeError: the requested backend cannot run on a parameter's device.
        """
        index = len(self.param_groups)
        given = checks.group_dict(param_group, index)
        if (
            self._by_diagonal
            and "diagonal" in given
            and _adapts(given["diagonal"]) != _adapts(self.defaults["diagonal"])
        ):
            param_group = {**_by_diagonal(given["diagonal"], self._by_diagonal), **param_group}
        group = {**self.defaults, **param_group}
        group["state_dtype"] = checks.dtype_named(group["state_dtype"])
        checks.group(group, index)
        checks.agreement([*self.param_groups[:1], group], index)
        shared = checks.shared_with_sam(param_group, index)
        if shared:
            warnings.warn(shared, stacklevel=2)
        params = checks.parameters(group["params"], index, {}, group["state_dtype"])
        for place, entry in enumerate(params):
            param = entry[1] if isinstance(entry, tuple) else entry
            self._plan.passes_for(param.device, *gather.codes_of(param, group))
            if self._in_backward and param.requires_grad:
                where = f"parameter {place} of group {index}"
                checks.in_backward_parameter(param, where, group)
                check_unwatched(param, where, self._backward)
        if self._backward is not None:
            self._backward.check_not_under_way("add_param_group()")
        try:
            super().add_param_group({**param_group, "params": params, "state_dtype": group["state_dtype"]})
        except ValueError:  # nearly always a parameter in two groups; checking this in each call would be slow
            taken = {param: at for at, other in enumerate(self.param_groups) for param in other["params"]}
            checks.parameters(params, index, taken, group["state_dtype"])
            raise
        self._plan.forget_ranks()
        self._step_in_one_call = None
        if self._backward is not None:
            self._backward.watch(since=index)

    def state_dict(self) -> StateDict:
        """Return the groups and the state by number of parameter, as every optimizer does.

        Groups contain plain values, which all file formats and :mod:`torch.distributed.checkpoint` accept:
        ``state_dtype`` by its name, and numbers of other types (such as NumPy's) as Python numbers. ``master_bits`` in
        int16 are float16 there, the same bits, because ranks cannot send each other int16; those in int8 as well if
        FullyShardedDataParallel shards the parameters, because it flattens no integers.

        Raises:
            RuntimeError: with ``in_backward=True``, between a backward pass and the step.
        """
        if self._backward is not None:
            self._backward.check_not_under_way("state_dict()")
        if not self.state:
            self._made_state_for("_get_optim_state_dict")
        made = super().state_dict()
        if isinstance(made, dict) and isinstance(made.get("param_groups"), list):  # a user's hook may return anything
            made = {**made, "param_groups": [_plain(group) for group in made["param_groups"]]}
        if isinstance(made, dict) and isinstance(made.get("state"), dict):
            flat = any(is_flattened(param) for group in self.param_groups for param in group["params"])
            made["state"] = {key: gather.for_state_dict(known, flat) for key, known in made["state"].items()}
        return made

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load state and hyperparameters from :meth:`state_dict`, as copies.

        Moments have the dtype of the loaded group's ``state_dtype``, not that of the parameter. A parameter whose saved
        state has none of SOFIM's entries starts without state; other entries are kept unchanged. Options that an older
        version did not save get the constructor's default (``master_weight_bits``: ``None``, so that Kahan's
        compensation goes on), and unknown ones are kept. Learning rates and momenta may be
        out of range, as schedulers may leave them: the next step checks them.

        Raises:
            TypeError, ValueError: it is damaged, or of another model or optimizer; nothing was changed.
        """

        def examine(_: Optimizer, given: StateDict) -> StateDict:
            saved = checks_state_dict.check(given, self.param_groups, _DEFAULTS, gather.variance_shapes)
            if self._in_backward:
                checks.in_backward(saved["param_groups"])
                for index, group in enumerate(self.param_groups):
                    for place, param in enumerate(group["params"]):
                        where = f"state_dict: parameter {place} of group {index}"
                        if param.requires_grad:
                            checks.in_backward_parameter(param, where, saved["param_groups"][index])
            self._restored = gather.restored_states(saved, self.param_groups)
            # torch copies the rest: groups, and entries that belong to no parameter.
            keys = {key for group in saved["param_groups"] for key in group["params"]}
            rest = {key: value for key, value in saved["state"].items() if key not in keys}
            return {**saved, "state": rest}

        if not isinstance(state_dict, Mapping):  # the hook would come too late: torch copies the dict before
            checks_state_dict.check(state_dict, self.param_groups, _DEFAULTS, gather.variance_shapes)
        # Registered last, so that it sees the dict as the user's own hooks return it.
        handle = self.register_load_state_dict_pre_hook(examine)
        try:
            super().load_state_dict(dict(state_dict))  # not every mapping has the copy() that torch calls
        finally:
            handle.remove()
            self.__dict__.pop("_restored", None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_backend", "auto")
        self.__dict__.setdefault("_capturable", False)
        self.__dict__.setdefault("_amp_fused", True)
        self.__dict__.setdefault("_in_backward", False)
        self.__dict__.setdefault("_release_grads", False)
        self.__dict__.setdefault("_by_diagonal", ())
        self.__dict__.setdefault("_recorded", {})
        self.__dict__.setdefault("_shard_group", None)
        for group in (*self.param_groups, self.defaults):  # from an older version, or set without load_state_dict()
            for name in checks_state_dict.ADDED_LATER:
                group.setdefault(name, _DEFAULTS[name])
            group["state_dtype"] = checks.dtype_named(group["state_dtype"])
        plan: Plan | None = self.__dict__.get("_plan")
        if plan is not None:
            plan.forget()
        else:
            self._plan = Plan(self._backend, self._shard_group)
        self._step_in_one_call = None
        if "_restored" in self.__dict__:
            self.state.update({param: state for param, state in self._restored.items() if state})
            self.defaults.update({name: self.param_groups[0][name] for name in checks.WHOLE})
        backward: InBackward | None = self.__dict__.get("_backward")
        if backward is not None:
            backward.reset()
        else:  # copies of parameters do not have their hooks
            self._backward = self._new_in_backward() if self._in_backward else None

    def __getstate__(self) -> dict[str, Any]:
        # Without the backend: the copy may be unpickled on another machine.
        if self._backward is not None:
            self._backward.check_not_under_way("a copy")
        kept = {name: getattr(self, name) for name in _KEPT}
        return {**super().__getstate__(), **kept, "_recorded": dict(self._recorded)}

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._shard_group is not None:
            raise TypeError(
                "an optimizer with a shard_group cannot be pickled, as the group is this process's: save state_dict()"
            )
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> SOFIM:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        own = {"_backend": self._backend, "_shard_group": self._shard_group}  # which pickles do not contain
        twin.__setstate__({**copy.deepcopy(self.__getstate__(), memo), **own})
        for ours, theirs in zip(self.param_groups, twin.param_groups, strict=True):
            for param, copied in zip(ours["params"], theirs["params"], strict=True):
                if is_flattened(param):  # a copy loses the mark; without it, nothing shows that it is a shard
                    copied._fsdp_flattened = True
        return twin


def _is_auto(rho: Any) -> bool:
    return isinstance(rho, str) and rho == "auto"


def _adapts(diagonal: Any) -> bool:
    """Whether it is a diagonal that adapts; anything may be passed, as it is checked only later."""
    return isinstance(diagonal, str) and diagonal in checks.DIAGONALS and diagonal != "identity"


def _by_diagonal(diagonal: Any, names: Sequence[str]) -> dict[str, Any]:
    """The defaults of ``lr`` and ``rho``, those of ``names``."""
    values = {"lr": 4e-3, "rho": None} if _adapts(diagonal) else {"lr": 0.5, "rho": 1.0}
    return {name: values[name] for name in names}


# The defaults for options that a group, saved by an older version, lacks.
_DEFAULTS = {
    name: inspect.signature(SOFIM.__init__).parameters[name].default for name in checks.PER_GROUP + checks.WHOLE
} | {**_by_diagonal("identity", ("lr", "rho")), "master_weight_bits": None}  # they kept Kahan's bits


def _plain(group: Any) -> Any:
    """A group of a state dict whose options, and the entries of schedulers, are values of Python's own types."""
    if not isinstance(group, dict):
        return group
    known = (*checks.PER_GROUP, *checks.WHOLE, *from_torch.RATES, "base_momentum", "max_momentum")
    return {name: _plain_value(value) if name in known else value for name, value in group.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, str):
        return str.__str__(value)
    kind: type = type(value)
    if isinstance(value, Real) and kind not in (bool, int, float):
        return int(value) if isinstance(value, Integral) else float(value)
    return value
