"""In-backward accumulation: each gradient enters its moment during the backward pass that computes it.

A gradient is then still in the cache, and only scalar algebra and ``apply`` remain for the step. Sums over all
parameters are collected from each ``accumulate``. If F⁻¹ is applied to something that the gradient g is a part of,
v = a m + b g, Sherman-Morrison splits the step into a term in the gradient, which is added to w at once, and one in the
moment, whose factor is known at the end (a = 0 and b = 1 for ``numerator="gradient"``):

    w - η F⁻¹v = [w - (η/ρ) b g] + (η/ρ) (m̂ P/(1 + S) - a m)

With a diagonal that adapts and without the term of rank one, the step of a tensor depends on no other tensor: its hook
takes all of it, and nothing remains for the end.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable imports the compiler: seconds
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sofim_fused import backends, checks, native
from sofim_fused.backends import GradientStep, NativeInBackward, Settings, Sums
from sofim_fused.dtensor import bump_versions, is_sharded, local, placed_as
from sofim_fused.sharding import is_flattened
from sofim_fused.step import gather, schedule
from sofim_fused.step.hyperparameters import Hyperparameters, decay_of, entering
from sofim_fused.step.plan import Plan, is_adaptive

BATCH = 1 << 20
"""Elements that are collected for one pass, where each pass costs a launch."""

INDICES = 64
"""How many index tensors are kept on a device, each for a choice of parameters."""

_FIXED = ("momentum", "numerator", "diagonal")
"""Settings that the moment form, too, reads at the first gradient of a step."""

_NOTHING, _PART, _WHOLE = range(3)  # how much of a parameter's gradient was taken in this step


class InBackward:
    """Takes an optimizer's gradients one by one, in the backward pass, and then the rest of the step.

    To take a gradient is to add it to its moment; if the step has a term in the gradient, w is also updated by it.

    Args:
        optimizer: whose parameters get hooks; not kept alive.
        plan: the optimizer's.
        release: free each gradient as soon as it was taken.
        capturable: as the optimizer's.
    """

    def __init__(self, optimizer: Optimizer, plan: Plan, release: bool, capturable: bool) -> None:
        self._of = weakref.ref(optimizer)
        self._plan = plan
        self._capturable = capturable
        self.release = release
        self._depth = 0  # of nested accumulate_grads()
        self._met = False  # whether any gradient was seen so far
        self._searched = False  # whether DistributedDataParallel was searched for: a gradient looked like a bucket's
        self._removed = False  # whether the hooks were removed
        self._hooks: dict[int, _Watch] = {}  # by id of the parameter; an entry is removed with its parameter
        weakref.finalize(self, _remove, self._hooks).atexit = False
        # What _find_parameters() found last, by ordinal. No reference to parameters is kept: it would keep them alive,
        # and torch.utils.swap_tensors() refuses even tensors that have weak references.
        self._stale = True
        self._ids: list[int] = []
        self._watched = 0  # how many have hooks
        self._group_of: list[int] = []
        self._position: list[tuple[torch.device, int]] = []  # the device, and the index among its parameters
        self._sizes: dict[torch.device, list[int]] = {}  # parameters of a device, by group
        self._everything: dict[torch.device, Hyperparameters] = {}
        self._native: NativeInBackward | None = None
        self._native_on: torch.device | None = None
        self._indices: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        # For the current step only:
        self._progress = bytearray()
        self._marks: dict[int, _Mark] = {}  # of gradients that were not taken natively
        self._frozen: list[dict[str, Any]] | None = None
        self._take: Callable[[Tensor, Any, int, int, bool], bool] | None = None  # natively
        self._state: MutableMapping[Tensor, Any] = {}
        self._waiting: dict[torch.device, _Batch] = {}
        self._sums: dict[int, tuple[Sums, int]] = {}  # by ordinal: the sums of its batch, and its index in the batch
        self._settings_on: dict[torch.device, Settings] = {}  # those of _frozen, for all parameters
        self._steps: dict[torch.device, GradientStep] = {}  # the gradient form's, likewise
        self._streams: dict[torch.device, list[Any]] = {}  # the streams on which passes ran
        check_not_replicated(param for group in optimizer.param_groups for param in group["params"])
        self.watch()
        self._find_parameters()

    @property
    def _optimizer(self) -> Optimizer:
        optimizer = self._of()
        assert optimizer is not None
        return optimizer

    # Hooks

    def watch(self, since: int = 0) -> None:
        """Put hooks on the parameters of all groups, or of those from ``since`` on, that have none of this optimizer's.

        Raises:
            ValueError: another optimizer takes a parameter's gradients; nothing was changed.
        """
        self._forget()
        self._stale = True
        self._met = False
        if self._removed:
            return
        unwatched = []
        for index, group in enumerate(self._optimizer.param_groups[since:], start=since):
            for place, param in enumerate(group["params"]):
                if (
                    param.requires_grad and id(param) not in self._hooks
                ):  # step() takes the gradients of frozen ones, if there are any
                    where = f"parameter {place} of group {index}"
                    checks.in_backward_parameter(param, where, group)
                    check_unwatched(param, where, self)
                    unwatched.append(param)
        for param in unwatched:
            self._hooks[id(param)] = _Watch(self, param)

    def _find_parameters(self) -> None:
        """Find out which parameters are in the groups, which users may edit, and put hooks on these and no others.

        Raises:
            ValueError: a parameter is in the groups twice, or another optimizer takes its gradients.
        """
        groups = self._optimizer.param_groups
        found: dict[int, str] = {}
        for index, group in enumerate(groups):
            for place, param in enumerate(group["params"]):
                where = f"parameter {place} of group {index}"
                if id(param) in found:
                    raise ValueError(f"{where} is also {found[id(param)]}: list each parameter once")
                found[id(param)] = where
        self.watch()
        for key in [key for key in self._hooks if key not in found]:
            self._hooks.pop(key).remove()
        self._ids = list(found)
        self._watched = len(self._hooks)
        self._searched = False
        self._group_of = [index for index, group in enumerate(groups) for _ in group["params"]]
        self._progress = bytearray(len(self._ids))
        self._find_devices()
        self._plan.refresh_placement(groups)
        alone = len(self._sizes) == 1 and self._plan.rank_sums(self._optimizer) is None
        device = next(iter(self._sizes)) if alone else None
        if device != self._native_on:
            self._native = None if device is None else self._plan.passes_for(device).native_in_backward()
            self._native_on = device
        if self._native is not None:
            self._native.watch([list(group["params"]) for group in groups])
        for ordinal, key in enumerate(self._ids):
            if key in self._hooks:
                self._hooks[key].place(ordinal, self._native)
        self._stale = False

    def _find_devices(self) -> None:
        """Find out on which devices the parameters are."""
        self._position = []
        self._sizes = {}
        groups = self._optimizer.param_groups
        for index, group in enumerate(groups):
            for param in group["params"]:
                sizes = self._sizes.setdefault(param.device, [0] * len(groups))
                self._position.append((param.device, sum(sizes)))
                sizes[index] += 1
        self._everything.clear()
        self._settings_on.clear()
        self._steps.clear()

    def _hooks_are_gone(self) -> bool:
        """Whether any hook was removed, alone or with its parameter; another parameter may have that address by now."""
        return self._stale or len(self._hooks) != self._watched

    def _are_others(self) -> bool:
        """Whether the parameters in the groups, or their order, differ from what :meth:`_find_parameters` found."""
        if self._hooks_are_gone():
            return True
        groups = self._optimizer.param_groups
        return (
            self._ids != [id(param) for group in groups for param in group["params"]]
            # Parameters may have moved between groups without a change of their order.
            or self._group_of != [index for index, group in enumerate(groups) for _ in group["params"]]
        )

    def remove(self) -> None:
        """Remove the hooks; from now on ``step()`` takes all gradients."""
        _remove(self._hooks)
        self._watched = 0
        self._removed = True

    # What a user does between backward passes

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """See :meth:`sofim_fused.SOFIM.accumulate_grads`."""
        if self.release and is_adaptive(self._optimizer.param_groups):
            raise ValueError(
                "accumulate_grads() with release_grads=True and a diagonal that adapts is impossible: it needs the "
                "square of the whole gradient, parts of which were released. Leave out one of them"
            )
        numerator = self._optimizer.param_groups[0]["numerator"]
        if self.release and checks.reads_gradient(numerator):
            raise ValueError(
                f"accumulate_grads() with release_grads=True and numerator={numerator!r} is impossible: the step takes "
                "the moment's product with the whole gradient, parts of which were released. Leave out one of them"
            )
        self._depth += 1
        if self._native is not None:
            self._native.leave_hooks()
        try:
            yield
        finally:
            self._depth -= 1

    def check_not_under_way(self, what: str) -> None:
        """Raise if gradients were taken since the last step.

        Raises:
            RuntimeError: ``what`` would see moments of one step and step counts of another.
        """
        if self._any_consumed():
            raise RuntimeError(
                f"{what} between backward() and step(): with in_backward=True moments have changed already, and step "
                "counts have not: call step() before"
            )

    def _any_consumed(self) -> bool:
        return self._progress.count(_NOTHING) < len(self._progress)

    def reset(self) -> None:
        """Forget what was taken since the last step: moments were replaced."""
        self._forget()

    # One gradient

    def on_gradient(self, place: _Place, param: Tensor) -> None:
        """Take the gradient that a parameter has now: its last one in this step, except in ``accumulate_grads()``."""
        if self._frozen is None:
            if self._depth and not self.release:
                return  # gradients add up in param.grad until the last backward pass
            self._freeze_settings()
        ordinal = place.ordinal
        if ordinal is None:  # it is no longer in any group
            return
        progress = self._progress[ordinal]
        if progress == _WHOLE:
            self._mark(ordinal, param)  # so that step() can still take the first gradient after this error
            raise RuntimeError(
                f"a second gradient of parameter {ordinal} before step(): with in_backward=True the first one is in "
                "its moment already. Call step() after each backward(), or run all but the last one of a step under "
                "`with optimizer.accumulate_grads():`. (A parameter that two parts of a model share gets two under "
                "re-entrant checkpointing: pass use_reentrant=False.)"
            )
        if self._depth and not self.release:
            return
        again = progress == _PART
        if not (self._take is not None and self._take(param, self._state, self._group_of[ordinal], ordinal, again)):
            self._take_with_checks(param, ordinal, again)
        self._progress[ordinal] = _PART if self._depth else _WHOLE
        if self.release:
            param.grad = None

    on_gradient_untraced = untraced(on_gradient)

    def _freeze_settings(self) -> None:
        """Copy the settings for all gradients of this step, as they are at its first gradient."""
        optimizer = self._optimizer
        groups = optimizer.param_groups
        native = not self._hooks_are_gone() and self._freeze_natively()
        if not native and self._are_others():
            self._find_parameters()
            native = self._freeze_natively()
        if not self._met and not self._removed:  # the module may have been wrapped after the optimizer was made
            check_not_replicated(param for group in groups for param in group["params"])
            self._met = True
        self._state = optimizer.state
        if native:
            assert self._native is not None
            self._take = self._native.take
            if not self._depth and isinstance(self._state, dict):  # a user may have put any mapping there
                self._native.serve_hooks(self._state, self._progress)
        else:
            for index, group in enumerate(groups):
                checks.group(group, index)
            checks.agreement(groups)
            checks.in_backward(groups)
            if is_adaptive(groups) and self._plan.rank_sums(optimizer) is not None:
                raise checks.adaptive_in_backward_over_ranks(groups[0]["diagonal"])
        self._frozen = [
            {**group, "params": list(group["params"]), "lr": _value(group["lr"]), "rho": _value(group["rho"])}
            for group in groups
        ]

    def _freeze_natively(self) -> bool:
        """Copy the settings in the native part."""
        return self._native is not None and self._native.freeze_settings(self._optimizer.param_groups, self.release)

    def _take_with_checks(self, param: Tensor, ordinal: int, again: bool) -> None:
        """Take a gradient that the native part cannot take, such as a parameter's first one, or raise an error."""
        group = self._group_of[ordinal]
        try:
            if param.is_cuda and not self._capturable and backends.capturing():
                raise RuntimeError(
                    "a backward pass is captured in a CUDA graph: make the optimizer with capturable=True"
                )
            entry = self._entry(param, group, ordinal)
            if not (self._take is not None and self._take(param, self._state, group, ordinal, again)):
                self._take_later(entry, again)
        except BaseException:
            if not self._any_consumed():  # settings may still change before the first gradient is taken
                self._forget()
            raise

    @torch.no_grad()
    def _entry(self, param: Tensor, group: int, ordinal: int) -> gather.Entry:
        """Check a gradient and its parameter, and make sure that there is state."""
        optimizer = self._optimizer
        settings = optimizer.param_groups[group]
        assert param.grad is not None
        checks.gradient(param, param.grad, group, ordinal - self._group_of.index(group))
        checks.in_backward_parameter(param, f"parameter {ordinal}", settings)
        if not self._searched and _is_part(local(param.grad)):  # such as DistributedDataParallel's buckets
            check_not_replicated(param for group in optimizer.param_groups for param in group["params"])
            self._searched = True
            if self._native is not None:
                self._native.allow_parts()
        (grad,) = placed_as([param], [param.grad])
        entry = gather.Entry(group, ordinal, param, grad)
        gather.check_state(entry, settings, optimizer.state)
        self._plan.passes_for(param.device, *gather.codes_of(param, settings))
        gather.ensure_state(entry, settings, optimizer.state)
        return entry

    # Gradients that wait for one pass over several of them

    def _take_later(self, entry: gather.Entry, again: bool) -> None:
        device = entry.param.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        waiting = self._waiting.get(device)
        if waiting is not None and (waiting.stream != stream or entry.ordinal in waiting.entries):
            self._take_waiting(device)
            waiting = None
        if waiting is None:
            waiting = self._waiting[device] = _Batch(stream)
            # No gradient waits longer than the backward pass: after it, users may change gradients. Outside of a
            # backward pass the caller is step(), which then takes the gradients that wait.
            with contextlib.suppress(RuntimeError):
                torch.autograd.Variable._execution_engine.queue_callback(self._take_all_waiting)
        self._marks[entry.ordinal] = _Mark(None if self.release else entry.param.grad)
        waiting.entries[entry.ordinal] = (entry, again)
        waiting.elements += entry.grad.numel()
        if waiting.elements >= BATCH:
            try:
                self._take_waiting(device)
            except BaseException:
                del waiting.entries[entry.ordinal]  # it was not taken, and step() will find it in param.grad
                if not waiting.entries:
                    self._waiting.pop(device, None)
                raise

    def _hand_back(self) -> None:
        """Leave gradients that still wait to the step: a backward pass failed, and users may change them after that."""
        if self.release:  # then no other reference to these gradients is left
            return
        for batch in self._waiting.values():
            for ordinal in batch.entries:
                self._progress[ordinal] = _NOTHING
                self._marks.pop(ordinal, None)
        self._waiting.clear()
        if not self._any_consumed():
            self._forget()

    def _take_all_waiting(self) -> None:
        for device in list(self._waiting):
            self._take_waiting(device)

    @torch.no_grad()
    def _take_waiting(self, device: torch.device) -> None:
        batch = self._waiting[device]
        taken = [batch.entries[ordinal] for ordinal in sorted(batch.entries)]
        entries = [entry for entry, _ in taken]
        assert self._frozen is not None
        settings = [entering(group) for group in self._frozen]
        cross = checks.reads_gradient(self._frozen[0]["numerator"])
        decay = decay_of([settings[entry.group] for entry in entries], cross)
        weight = decay.weight
        if weight is None and any(l2 for _, _, l2 in settings):
            weight = [0.0] * len(entries)  # so that all batches have the same kinds of sums
        if any(again for _, again in taken):
            decay = decay._replace(
                moment=[1.0 if again else beta for (_, again), beta in zip(taken, decay.moment, strict=True)]
            )
            if weight is not None:
                weight = [0.0 if again else w for (_, again), w in zip(taken, weight, strict=True)]
        optimizer = self._optimizer
        if batch.stream is not None:
            streams = self._streams.setdefault(device, [])
            if batch.stream not in streams:
                streams.append(batch.stream)
            if streams[0] != batch.stream:  # on the first stream, what all passes of a step share was written
                batch.stream.wait_stream(streams[0])
            for entry in entries if self.release else ():
                if is_sharded(entry.param):  # its gradient's memory may have been allocated on another stream
                    local(entry.grad).record_stream(batch.stream)
        with contextlib.nullcontext() if batch.stream is None else torch.cuda.stream(batch.stream):
            tensors = gather.lay_out(device, entries, optimizer.param_groups, optimizer.state)
            passes = self._plan.passes_for(device, tensors.has_codes, tensors.has_coded_variances)
            tensors, passes, _ = backends.apart(tensors, passes)
            ordinals = [entry.ordinal for entry in entries]
            if is_adaptive(self._frozen):
                settings_of_all = self._hyperparameters(device, ordinals).settings
                places = [self._position[ordinal][1] for ordinal in ordinals]
                sizes = [0] * len(settings_of_all.sizes)
                for entry in entries:
                    sizes[entry.group] += 1
                group_of = self._chosen(settings_of_all.group_of, places)
                chosen = settings_of_all._replace(sizes=sizes, group_of=group_of)
                del self._waiting[device]  # after a failure up to here, another try is possible
                schedule.adaptive_alone(tensors, passes, chosen, decay)
                bump_versions(entry.param for entry in entries)
                return
            known = self._gradient_step(device, ordinals, tensors.steps) if cross else None
            del self._waiting[device]  # after a failure up to here, another try is possible
            sums = passes.accumulate(tensors, decay._replace(weight=weight), known)
        for place, entry in enumerate(entries):
            self._sums[entry.ordinal] = (sums, place)

    def _gradient_step(self, device: torch.device, ordinals: Sequence[int], steps: Sequence[Tensor]) -> GradientStep:
        """The gradient's part of the step, for these parameters and their step counts."""
        hyper = self._hyperparameters(device, ordinals)
        settings = self._settings_on.get(device)
        if settings is None:
            assert self._frozen is not None
            hyper.refresh(self._frozen)
            settings = self._settings_on[device] = hyper.settings
        places = [self._position[ordinal][1] for ordinal in ordinals]
        if checks.NUMERATORS[settings.numerator] == "nesterov":  # its factors depend on the step counts
            mine = settings._replace(group_of=self._chosen(settings.group_of, places))
            return backends.gradient_step(mine, steps)
        known = self._steps.get(device)
        if known is None:
            known = self._steps[device] = backends.gradient_step(settings, [])
        weight = None if known.weight is None else self._chosen(known.weight, places)
        return GradientStep(weight, self._chosen(known.gradient, places))

    def _hyperparameters(self, device: torch.device, ordinals: Sequence[int]) -> Hyperparameters:
        """Those of all parameters on a device, among them these."""
        if any(self._position[ordinal][0] != device for ordinal in ordinals):  # the model was moved
            self._find_devices()
        assert self._frozen is not None
        options = self._frozen[0]["numerator"], self._frozen[0]["fisher"], is_adaptive(self._frozen)
        hyper = self._everything.get(device)
        if hyper is None or not hyper.serves(self._sizes[device], *options):
            hyper = self._everything[device] = Hyperparameters(device, self._sizes[device], *options)
            self._settings_on.pop(device, None)
            self._steps.pop(device, None)
        if hyper.adaptive:
            hyper.refresh(self._frozen)
        return hyper

    def _chosen(self, x: Tensor, places: Sequence[int]) -> Tensor:
        """Chosen elements of ``x``, without a transfer if they are consecutive or were chosen before."""
        if list(places) == list(range(places[0], places[0] + len(places))):
            return x.narrow(-1, places[0], len(places))
        key = (x.device, tuple(places))
        index = self._indices.get(key)
        if index is None:
            if len(self._indices) >= INDICES:  # layers that are skipped at random need a new one in nearly every step
                self._indices.clear()
            index = self._indices[key] = torch.tensor(places, device=x.device)
        return x.index_select(-1, index)

    # The rest of the step

    def finish(self) -> None:
        """Take the rest of the step, and gradients that no hook has taken.

        Raises:
            RuntimeError: inside :meth:`accumulating`, more gradients are expected; or gradients, groups or state were
                changed, after gradients were taken, in a way that would have led to a different step.
            ValueError: a gradient or a hyperparameter is refused.
        """
        if self._depth:
            raise RuntimeError("step() inside accumulate_grads(): leave the block before the last backward pass")
        checks.in_backward(self._optimizer.param_groups)  # options may have been set since
        if self._waiting:
            self._hand_back()
        # The last part of a gradient may have been set without a backward pass, so that no hook ran.
        if self._waiting or _PART in self._progress or not self._finish_natively():
            self._check_that_nothing_was_done()
            self._take_all_waiting()
            self._take_the_rest()
            if not self._finish_natively():
                self._finish_by_passes()
        self._forget()

    finish_untraced = untraced(finish)

    def _check_that_nothing_was_done(self) -> None:
        """Check that gradients, groups and state are unchanged since gradients were taken."""
        taken = self._any_consumed()
        if self._are_others():
            if taken:
                raise RuntimeError(
                    "param_groups were edited between backward() and step(): with in_backward=True the backward pass "
                    "has already used the gradients, for the groups as they were. Restore the groups and call step() "
                    "before editing them, or return to a saved state with load_state_dict()"
                )
            self._forget()  # what was taken belonged to other groups
            self._find_parameters()
        if not taken:
            return
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        whole = [(ordinal, params[ordinal]) for ordinal, progress in enumerate(self._progress) if progress == _WHOLE]
        changed = next((ordinal for ordinal, param in whole if not self._fits(ordinal, param)), None)
        if changed is not None:
            check_not_replicated(params)
            what = self._what_was_done(changed, params[changed])
            for ordinal, param in whole:  # so that a second call takes the step
                self._mark(ordinal, param)
            raise _after_the_fact(params[changed], self._where(changed), what)
        for ordinal, progress in enumerate(self._progress):
            if progress and not {"exp_avg", "step"} <= self._optimizer.state.get(params[ordinal], {}).keys():
                where = self._where(ordinal)
                self._forget()
                raise RuntimeError(
                    f"the state of {where} was deleted between backward() and step(): with in_backward=True its moment "
                    "already included this step's gradient. The step is not taken, and the next backward pass begins a "
                    "new one; delete state before backward() or after step()"
                )

    def _where(self, ordinal: int) -> str:
        index = self._group_of[ordinal]
        return f"parameter {ordinal - self._group_of.index(index)} of group {index}"

    def _fits(self, ordinal: int, param: Tensor) -> bool:
        """Whether a gradient that was taken is unchanged since, as far as can be checked."""
        mark = self._marks.get(ordinal)
        if mark is not None:
            return mark.fits(param.grad)
        assert self._native is not None
        return self._native.fits(param, ordinal)

    def _mark(self, ordinal: int, param: Tensor) -> None:
        """Record what is now in ``param.grad`` as the gradient that was taken."""
        if ordinal in self._marks:
            self._marks[ordinal] = _Mark(param.grad)
        else:
            assert self._native is not None
            self._native.mark(param, ordinal)

    def _what_was_done(self, ordinal: int, param: Tensor) -> str:
        if self.release:
            return "set again"
        return "removed" if param.grad is None else "replaced or changed"

    def _take_the_rest(self) -> None:
        params = (param for group in self._optimizer.param_groups for param in group["params"])
        try:
            for ordinal, param in enumerate(params):
                if param.grad is not None and self._progress[ordinal] != _WHOLE:
                    self.on_gradient(_Place(ordinal), param)
        finally:
            self._take_all_waiting()

    def _finish_natively(self) -> bool:
        if self._take is None or self._sums or self._hooks_are_gone():
            return False
        optimizer = self._optimizer
        groups = optimizer.param_groups
        assert self._native is not None
        assert self._frozen is not None
        return len(groups) == len(self._frozen) and self._native.finish(self._settings(), optimizer.state, groups)

    def _settings(self) -> list[dict[str, Any]]:
        """The groups for the rest of the step; the moment form reads lr, rho and decoupled decay only now.

        The kind of the step, and what has entered the moments, are those of its first gradient in any case.
        """
        assert self._frozen is not None
        groups = self._optimizer.param_groups
        if checks.reads_gradient(self._frozen[0]["numerator"]) or is_adaptive(self._frozen):
            return self._frozen
        for now, then in zip(groups, self._frozen, strict=True):
            if any(now[name] != then[name] for name in _FIXED):
                fixed = [{name: group[name] for name in _FIXED} for group in self._frozen]
                return [{**now, **then} for now, then in zip(groups, fixed, strict=True)]
        return groups

    @torch.no_grad()
    def _finish_by_passes(self) -> None:
        optimizer = self._optimizer
        self._plan.refresh_placement(optimizer.param_groups)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        # No pass reads gradients any more, and they may have been freed: the parameters stand in for them.
        present = [
            gather.Entry(self._group_of[ordinal], ordinal, param, param)
            for ordinal, param in enumerate(params)
            if self._progress[ordinal]
        ]
        if not present and self._plan.rank_sums(optimizer) is None:
            return
        if self._frozen is None:  # other ranks have gradients
            self._freeze_settings()
        groups = self._settings()
        for index, group in enumerate(groups):
            checks.group(group, index)
        checks.agreement(groups)
        for device, streams in self._streams.items():
            for stream in streams:  # a pass may have been launched there after the backward pass joined its streams
                torch.cuda.current_stream(device).wait_stream(stream)
        if self._frozen is not None and is_adaptive(self._frozen):
            return  # the hooks have taken all of the step
        for entry in present:  # the parameter may have been converted since its gradient was taken
            if gather.has_fitting_state(entry, groups[entry.group], optimizer.state):
                continue
            try:
                gather.check_state(entry, groups[entry.group], optimizer.state)
            except ValueError as error:
                raise ValueError(
                    f"{error}. With in_backward=True this has to wait while a step is under way: undo it, call step(), "
                    "and do it after that"
                ) from None
            gather.ensure_state(entry, groups[entry.group], optimizer.state)
        self._plan.compare_ranks(optimizer, guarded=False, groups=groups)
        shares = self._plan.shares_of(optimizer, present, groups)
        decays = self._frozen is not None and any(group["weight_decay"] for group in self._frozen)
        reads_w = decays and checks.reads_gradient(groups[0]["numerator"])
        for share in shares:
            pair = share.pairs.get("state") or (share.pairs.get("w") if reads_w else None)
            if pair is not None:
                raise checks.shared_in_backward(*(share.tensors.ordinals[i] for i in pair))
        sums = [self._sums_of(share.tensors.device, share.tensors.ordinals) for share in shares]
        schedule.after_backward(shares, groups, sums)
        bump_versions(entry.param for entry in present)

    def _sums_of(self, device: torch.device, ordinals: Sequence[int]) -> Sums:
        """The sums of the passes, in the order of parameters."""
        if not ordinals:
            return backends.no_sums(device)
        starts, parts, places = {}, [], []
        size = 0
        for ordinal in ordinals:
            native_sums = None if self._native is None else self._native.sums_of(ordinal)
            if native_sums is not None:  # the native part took this gradient, but cannot take the rest of the step
                values = torch.tensor(native_sums, dtype=torch.float64, device=device).unsqueeze(1)
                parts.append(Sums(mm=values[0], mg=values[1], mw=values[2]))
                places.append(size)
                size += 1
                continue
            sums, place = self._sums[ordinal]
            if id(sums) not in starts:
                starts[id(sums)] = size
                parts.append(sums)
                size += sums.mm.numel()
            places.append(starts[id(sums)] + place)
        columns = {
            name: [getattr(part, name) for part in parts]
            for name in ("mm", "mg", "mw")
            if all(getattr(part, name) is not None for part in parts)
        }
        return Sums(**{name: self._chosen(torch.cat(column), places) for name, column in columns.items()})

    def _forget(self) -> None:
        self._frozen = None
        self._take = None
        self._waiting.clear()
        self._sums.clear()
        self._settings_on.clear()
        self._steps.clear()
        self._streams.clear()
        self._marks.clear()
        self._progress[:] = bytes(len(self._progress))
        if self._native is not None:
            self._native.forget()


class _Batch:
    """Gradients that wait for a pass, and the stream that computed them (``None``: not on a GPU)."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.entries: dict[int, tuple[gather.Entry, bool]] = {}
        self.elements = 0


class _Mark:
    """A record of a gradient when it was taken, to notice at the end of the step whether it was changed since.

    Most writes to a tensor raise its version counter. All-reduces, ``.data`` and NumPy do not: on a CPU these are
    noticed by comparing a few elements. (For gradients that are taken natively, csrc/cpu/gradient_record.h does this.)
    """

    def __init__(self, grad: Tensor | None) -> None:
        self._recorded = [(weakref.ref(x), _version(x), _place(x), _bits(x)) for x in _parts(grad)]

    def fits(self, grad: Tensor | None) -> bool:
        """Whether this is the same gradient, with the same values as far as can be checked."""
        parts = _parts(grad)
        return len(parts) == len(self._recorded) and all(
            x is recorded() and _version(x) == version and _place(x) == place and torch.equal(_bits(x), bits)
            for x, (recorded, version, place, bits) in zip(parts, self._recorded, strict=True)
        )


def _parts(grad: Tensor | None) -> list[Tensor]:
    if grad is None:
        return []
    return [grad, grad._local_tensor] if is_sharded(grad) else [grad]  # type: ignore[attr-defined]


def _version(x: Tensor) -> int | None:
    # Parts of one larger block of memory, such as FSDP2's gradients, share a counter, which also counts writes to other
    # parts.
    return None if x.is_inference() or (type(x) is Tensor and _is_part(x)) else x._version


def _place(x: Tensor) -> int | None:
    return x.data_ptr() if type(x) is Tensor else None


@torch.no_grad()
def _bits(x: Tensor) -> Tensor:
    """The bits of a few elements, from the first to the last; empty if reading them would have to wait."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.layout != torch.strided or not x.numel():
        return torch.empty(0, device="cpu")
    if not x.untyped_storage().nbytes():  # it was freed
        return torch.empty(0, device="cpu")
    x = x.detach().resolve_conj().resolve_neg()
    for count in (8, 64):  # many changes, such as scaling, keep zeros: if all are zero, compare more elements
        if x.is_contiguous():
            places = [(x.numel() - 1) * i // (count - 1) for i in range(count)]
            chosen = x.view(-1)[places]
        else:
            chosen = x[tuple([(size - 1) * i // (count - 1) for i in range(count)] for size in x.shape)]
        bits = chosen.view(torch.uint8)
        if bits.any():
            break
    return bits


def _is_part(x: Tensor) -> bool:
    """Whether a tensor's memory is a part of a larger block."""
    return x.layout == torch.strided and x.untyped_storage().nbytes() > x.numel() * x.element_size()


def _after_the_fact(param: Tensor, where: str, what: str) -> RuntimeError:
    return RuntimeError(
        f"the gradient of {where} (shape {tuple(param.shape)}) was {what} between backward() and step(): with "
        "in_backward=True its moment already included it, and the change would have no effect. To clip, leave out "
        "in_backward and pass max_grad_norm= to SOFIM, and switch off the clipping of a Trainer "
        "(Hugging Face's: max_grad_norm=0 and sofim_fused.integrations.transformers.attach(); Lightning's: "
        "gradient_clip_val=None); to average, unscale or edit gradients, or to call zero_grad() before step(), leave "
        "out in_backward. Nothing else was changed: call step() again to use the gradients of the backward pass, or "
        "load_state_dict() to return to a saved state"
    )


class _Place:
    """A parameter's ordinal in the groups; ``None``: it is in none of them."""

    def __init__(self, ordinal: int | None) -> None:
        self.ordinal = ordinal


class _Hook(_Place):
    """A parameter's hook: passes each gradient on, as long as the optimizer exists."""

    def __init__(self, backward: InBackward) -> None:
        super().__init__(None)
        self.backward = weakref.ref(backward)

    def __call__(self, param: Tensor) -> None:
        backward = self.backward()
        if backward is not None:
            # If a compiled function runs the backward pass, each hook would be compiled too.
            (backward.on_gradient_untraced if torch.compiler.is_compiling() else backward.on_gradient)(self, param)


class _Watch:
    """A hook on a parameter. Only the parameter keeps it alive; when it is freed, so is the optimizer's entry."""

    def __init__(self, backward: InBackward, param: Tensor) -> None:
        hook: Any = _Hook(backward)
        module = native.cpu() if param.device.type == "cpu" else ""
        if not isinstance(module, str):
            hook = module.Hook(hook)  # takes gradients itself, and calls hook where it cannot
        self._hook = weakref.ref(hook, functools.partial(_gone, backward._hooks, id(param)))
        self._handle: RemovableHandle = param.register_post_accumulate_grad_hook(hook)

    def place(self, ordinal: int | None, step: NativeInBackward | None = None) -> None:
        """Set the parameter's ordinal in the groups, and what takes its gradient natively, if anything does."""
        hook = self._hook()
        if hook is None:
            return
        if isinstance(hook, _Hook):
            hook.ordinal = ordinal
            return
        hook.python.ordinal = ordinal
        hook.place(None if ordinal is None else step, ordinal or 0)

    def remove(self) -> None:
        self.place(None)
        self._handle.remove()


def _gone(hooks: dict[int, _Watch], key: int, _: object) -> None:
    hooks.pop(key, None)


def check_unwatched(param: Tensor, where: str, mine: InBackward | None) -> None:
    """Check that no optimizer except that of ``mine`` takes a parameter's gradients in the backward pass.

    Raises:
        ValueError: one does; both would change the parameter.
    """
    if _watched(param, mine):
        gc.collect()  # a scheduler keeps its optimizer in a cycle
        if _watched(param, mine):
            raise ValueError(
                f"{where}: another optimizer with in_backward=True takes its gradients: call remove_hooks() of that one"
            )


def _watched(param: Tensor, mine: InBackward | None) -> bool:
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    mine_or_gone = (None, mine)
    known = (getattr(hook, "python", hook) for hook in hooks.values())
    return any(isinstance(hook, _Hook) and hook.backward() not in mine_or_gone for hook in known)


def check_not_replicated(params: Iterable[Tensor]) -> None:
    """Check that hooks see the same gradients as the step: that no module of this process averages them later.

    Raises:
        ValueError: a parameter is in a DistributedDataParallel or FullyShardedDataParallel module, or in a
            ZeroRedundancyOptimizer; hooks see gradients before they are averaged over the ranks, and replicas would
            become different.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.nn.parallel import DistributedDataParallel

    params = list(params)
    if any(is_flattened(param) for param in params):
        raise ValueError(
            "in_backward=True under FullyShardedDataParallel is impossible: gradients would enter their moments before "
            "they are averaged over the ranks and sharded. Leave out in_backward, or shard the model with fully_shard()"
            ", whose hooks see averaged gradients"
        )
    mine = {id(param) for param in params}
    zero: Any = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    for thing in gc.get_objects():
        if issubclass(type(thing), DistributedDataParallel) and any(id(param) in mine for param in thing.parameters()):
            raise ValueError(
                "in_backward=True under DistributedDataParallel is impossible: gradients would enter their moments "
                "before they are averaged over the replicas, which would then differ. Leave out in_backward"
            )
        if zero is not None and issubclass(type(thing), zero.ZeroRedundancyOptimizer):
            groups = vars(thing).get("param_groups", ())
            if any(id(param) in mine for group in groups for param in group["params"]):
                raise ValueError(
                    "in_backward=True under ZeroRedundancyOptimizer is impossible: a gradient is averaged over the "
                    "ranks only after its hook has run. Leave out in_backward, or shard the model with fully_shard(), "
                    "whose hooks see averaged gradients"
                )


def _remove(hooks: dict[int, _Watch]) -> None:
    for watch in list(hooks.values()):
        watch.remove()
    hooks.clear()


def _value(number: float | Tensor) -> float | Tensor:
    """A hyperparameter as it is now."""
    if not isinstance(number, Tensor):
        return number
    return float(number.detach()) if number.device.type == "cpu" else number.detach().clone()
