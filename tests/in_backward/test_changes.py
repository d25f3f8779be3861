"""With ``in_backward=True`` what is done to gradients between ``backward()`` and ``step()`` comes too late."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.in_backward.support import NUMERATORS, Pair, alike, backward, in_backward_of, made, on_cpu, plain
from tests.support.problems import give, give_state, same_bits, snapshot
from tests.support.runs import INTERPRETED, Run

Grads = list[Tensor | None]


def each(change: Callable[[Tensor], object]) -> Callable[[list[Tensor]], None]:
    """A change of all gradients, one by one."""

    def change_all(params: list[Tensor]) -> None:
        for p in params:
            if p.grad is not None:
                change(p)

    return change_all


def grads_of(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def replace(p: Tensor, grad: Tensor | None) -> None:
    p.grad = grad


def replace_data(p: Tensor) -> None:
    assert p.grad is not None
    p.grad.data = p.grad.data * 0.5


def unscale(params: list[Tensor]) -> None:
    """As a GradScaler does it, which raises no version counter."""
    device = params[0].device
    scale = torch.tensor(0.5, device=device)
    torch._amp_foreach_non_finite_check_and_unscale_(grads_of(params), torch.zeros(1, device=device), scale)


def of_the_last(change: Callable[[Tensor], object]) -> Callable[[list[Tensor]], None]:
    def change_one(params: list[Tensor]) -> None:
        change(next(p for p in reversed(params) if p.grad is not None))

    return change_one


CHANGES: dict[str, Callable[[list[Tensor]], object]] = {
    "clip_grad_norm_": lambda params: nn.utils.clip_grad_norm_(params, 1e-6),
    "clip_grad_norm_, clipping nothing": lambda params: nn.utils.clip_grad_norm_(params, 1e9),
    "clip_grad_norm_, foreach=False": lambda params: nn.utils.clip_grad_norm_(params, 1e-6, foreach=False),
    "clip_grad_value_": lambda params: nn.utils.clip_grad_value_(params, 1e-6),
    "div_": each(lambda p: p.grad.div_(4)),  # type: ignore[union-attr]
    "div_ of one": of_the_last(lambda p: p.grad.div_(4)),  # type: ignore[union-attr]
    "a view": of_the_last(lambda p: p.grad.view(-1)[1:].mul_(2)),  # type: ignore[union-attr]
    "_foreach_mul_": lambda params: torch._foreach_mul_(grads_of(params), 0.5),
    "a copy in its place": each(lambda p: replace(p, p.grad.clone())),  # type: ignore[union-attr]
    "a copy in the place of one": of_the_last(lambda p: replace(p, p.grad.clone())),  # type: ignore[union-attr]
    "removed": each(lambda p: replace(p, None)),
    "one removed": of_the_last(lambda p: replace(p, None)),
    "zeroed": each(lambda p: p.grad.zero_()),  # type: ignore[union-attr]
    ".data": each(lambda p: p.grad.data.mul_(0.5)),  # type: ignore[union-attr]
    "another .data": each(replace_data),
    "NumPy": each(lambda p: p.grad.numpy().__imul__(0.5)),  # type: ignore[union-attr]
    "unscaled": unscale,
    "its memory given back": each(lambda p: p.grad.untyped_storage().resize_(0)),  # type: ignore[union-attr]
}
ELEMENTS_ALONE_TELL = (".data", "NumPy", "unscaled")  # no version counter and no address does
SIZES = ("matrix", "scalar", "vector", "transposed", "channels-last", "sliced", "offset")
REFUSED = (
    r"the gradient of parameter \d of group \d \(shape .*\) was {} between backward\(\) and step\(\): with in_back"
)


@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_gradients_after_the_backward_pass_is_refused(change: str, numerator: str, run: Run) -> None:
    """Nothing else is changed then, and a second step() takes the gradients as they came."""
    pair = Pair(
        run, numerator=numerator, layouts=("scalar", "sliced", "vector", "offset") if INTERPRETED else SIZES, decay="l2"
    )
    what = "removed" if "removed" in change else "replaced or changed"
    if run.device == "cuda" and change in ELEMENTS_ALONE_TELL:
        pytest.skip("on a GPU elements are not looked at, as docs/method.md says")
    for grads in pair.gradients(4):
        pair.backward(grads)
        CHANGES[change](pair.params)
        before = snapshot(pair.optimizer)
        with pytest.raises(RuntimeError, match=REFUSED.format(what)):
            pair.optimizer.step()
        assert same_bits(before, snapshot(pair.optimizer))
        pair.step()
    assert pair.alike()


@pytest.mark.parametrize("numerator", NUMERATORS)
def test_changed_again_after_a_refusal(numerator: str, run: Run) -> None:
    pair = Pair(run, numerator=numerator)
    (grads,) = pair.gradients(1)
    pair.backward(grads)
    for _ in range(2):
        nn.utils.clip_grad_norm_(pair.params, 0.1)
        with pytest.raises(RuntimeError, match=r"pass max_grad_norm= .* switch off the clipping of a Trainer"):
            pair.optimizer.step()
    pair.step()
    assert pair.alike()


@pytest.mark.parametrize("numerator", NUMERATORS)
def test_gradients_that_waited_when_a_backward_pass_failed(numerator: str, run: Run) -> None:
    """They were not taken: the step takes what users have made of them."""

    def fail(_: Tensor) -> None:
        raise KeyError("on purpose")

    params = [[nn.Parameter(torch.full((n,), 2.0, device=run.device)) for n in (3, 4, 5)] for _ in range(2)]
    optimizers = [make(ours, run, numerator=numerator) for make, ours in zip((made, plain), params, strict=True)]
    wait = in_backward_of(optimizers[0])._native is None
    for ours, optimizer in zip(params, optimizers, strict=True):
        handle = ours[0].register_hook(fail)
        with pytest.raises(KeyError, match="on purpose"):
            backward(ours, [torch.ones_like(p) for p in ours])
        handle.remove()
        assert [p.grad is None for p in ours] == [True, False, False]
        if wait:
            nn.utils.clip_grad_norm_(ours, 0.1)
        optimizer.step()
    assert alike(*optimizers, None if run.backend in ("cpu", "reference") else 1e-6)


@on_cpu
def test_the_message_names_the_parameter(run: Run) -> None:
    params = [nn.Parameter(torch.ones(n)) for n in (2, 3, 4, 5)]
    optimizer = made([{"params": params[:1]}, {"params": params[1:]}], run)
    backward(params, [torch.ones_like(p) for p in params])
    params[2].grad = None
    with pytest.raises(RuntimeError, match=r"the gradient of parameter 1 of group 1 \(shape \(4,\)\) was removed"):
        optimizer.step()


@on_cpu
@pytest.mark.parametrize("shape", [(50,), (7, 9), (64,)])
@pytest.mark.parametrize("place", [0, 20, -1])
def test_a_gradient_that_is_nearly_all_zero(place: int, shape: tuple[int, ...], run: Run) -> None:
    """As an embedding's. Where no version counter tells, up to 64 elements are looked at for one that is not zero."""
    p = nn.Parameter(torch.ones(shape))
    optimizer = made([p], run)
    grad = torch.zeros(shape)
    grad.view(-1)[place] = 1.0
    backward([p], [grad])
    assert p.grad is not None
    p.grad.data.mul_(0.5)
    with pytest.raises(RuntimeError, match=REFUSED.format("replaced or changed")):
        optimizer.step()


@on_cpu
def test_a_step_pre_hook_comes_too_late(run: Run) -> None:
    pair = Pair(run)

    def clip(*_: object) -> None:
        nn.utils.clip_grad_norm_(pair.params, 0.1)

    handle = pair.optimizer.register_step_pre_hook(clip)
    (grads,) = pair.gradients(1)
    pair.backward(grads)
    with pytest.raises(RuntimeError, match=REFUSED.format("replaced or changed")):
        pair.optimizer.step()
    handle.remove()
    pair.step()
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("first", [True, False])
def test_hooks_that_change_gradients(first: bool, run: Run) -> None:
    """One that runs before the optimizer's is no matter; one that runs after it comes too late."""
    params, twins = ([nn.Parameter(torch.linspace(0, 1, n)) for n in (3, 5)] for _ in range(2))

    def halve(p: Tensor) -> None:
        assert p.grad is not None
        p.grad.mul_(0.5)

    if first:
        for p in params:
            p.register_post_accumulate_grad_hook(halve)
    optimizer, other = made(params, run), plain(twins, run)
    if not first:
        for p in params:
            p.register_post_accumulate_grad_hook(halve)
    backward(params, [torch.full_like(p, 2.0) for p in params])
    if first:
        optimizer.step()
        give(twins, [torch.ones_like(p) for p in twins])
        other.step()
        assert alike(optimizer, other)
    else:
        with pytest.raises(RuntimeError, match=REFUSED.format("replaced or changed")):
            optimizer.step()


@on_cpu
def test_gradients_may_be_looked_at(run: Run) -> None:
    pair = Pair(run)
    for grads in pair.gradients(3):
        pair.backward(grads)
        assert float(nn.utils.get_total_norm(grads_of(pair.params))) > 0
        assert all(p.grad is None or bool(p.grad.detach().isfinite().all()) for p in pair.params)
        pair.step()
    assert pair.alike()


@on_cpu
def test_between_micro_batches_gradients_are_the_users(run: Run) -> None:
    """They were not taken yet."""
    pair = Pair(run)
    first, second, *_ = pair.gradients(5)
    pair.zero_grad()
    with pair.optimizer.accumulate_grads():
        backward(pair.params, first)
    backward(pair.plain_params, first)
    for params in (pair.params, pair.plain_params):
        nn.utils.clip_grad_norm_(params, 0.1)
        backward(params, second)
    pair.step()
    assert pair.alike()


@on_cpu
def test_a_gradient_of_an_inference_mode(run: Run) -> None:
    """It has no version counter."""
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer, other = made([p], run), plain([q], run)
    with torch.inference_mode():
        grad = torch.full((3,), 0.5)
    p.grad = q.grad = grad
    optimizer.step()
    other.step()
    assert alike(optimizer, other)


@pytest.mark.parametrize("numerator", NUMERATORS)
def test_gradients_in_one_memory(numerator: str, run: Run) -> None:
    """They share a version counter, and each raises it when a backward pass adds to it."""
    sizes = [5, 3, 70, 1]
    params, twins = ([nn.Parameter(torch.linspace(-1, 1, n, device=run.device)) for n in sizes] for _ in range(2))
    optimizer, other = made(params, run, numerator=numerator), plain(twins, run, numerator=numerator)
    for some in (params, twins):
        memory = torch.zeros(sum(sizes), device=run.device)
        for p, part in zip(some, memory.split(sizes), strict=True):
            p.grad = part
    for step in range(3):
        for some, one in ((params, optimizer), (twins, other)):
            one.zero_grad(set_to_none=False)
            backward(some, [torch.full_like(p, 0.1 * (step + 1)) for p in some])
            if one is optimizer and run.device == "cpu" and step == 1:
                grads_of(params)[2].mul_(0.5)
                with pytest.raises(RuntimeError, match=REFUSED.format("replaced or changed")):
                    one.step()
            one.step()
        assert grads_of(params)[0]._version == grads_of(params)[3]._version > 4
    assert alike(optimizer, other, None if run.backend in ("cpu", "reference") else 1e-6)


# Released gradients


@pytest.mark.parametrize("numerator", NUMERATORS)
def test_a_new_gradient_where_one_was_released(numerator: str, run: Run) -> None:
    """It is not taken, and not overlooked."""
    pair = Pair(run, numerator=numerator, release=True)
    for grads in pair.gradients(3):
        pair.backward(grads)
        p = next(p for p, g in zip(pair.params, grads, strict=True) if g is not None)
        p.grad = torch.ones_like(p)
        before = snapshot(pair.optimizer)
        with pytest.raises(RuntimeError, match=REFUSED.format("set again")):
            pair.optimizer.step()
        assert same_bits(before, snapshot(pair.optimizer))
        p.grad = None
        with pytest.raises(RuntimeError, match=REFUSED.format("set again")):
            pair.optimizer.step()  # what was there at the refusal is gone
        pair.step()
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_no_gradient_is_kept(release: bool, run: Run) -> None:
    p = nn.Parameter(torch.ones(1000))
    optimizer = made([p], run, release_grads=release)
    backward([p], [torch.ones(1000)])
    if not release:
        assert p.grad is not None
        storage = StorageWeakRef(p.grad.untyped_storage())
        p.grad = None
        assert storage.expired()
        with pytest.raises(RuntimeError, match=REFUSED.format("removed")):
            optimizer.step()
    optimizer.step()
    assert int(optimizer.state[p]["step"]) == 1


# Going on


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_back_to_before_the_backward_pass(numerator: str, run: Run) -> None:
    """With a state dict and weights of then."""
    pair = Pair(run, numerator=numerator)
    batches = list(pair.gradients(6))
    for grads in batches[:4]:
        pair.backward(grads)
        pair.step()
    saved, weights = pair.optimizer.state_dict(), [p.detach().clone() for p in pair.params]
    saved = {**saved, "state": {key: {k: x.clone() for k, x in v.items()} for key, v in saved["state"].items()}}
    pair.backward(batches[4])
    nn.utils.clip_grad_norm_(pair.params, 0.1)
    with pytest.raises(RuntimeError, match=r"load_state_dict\(\) to return to a saved state"):
        pair.optimizer.step()
    with torch.no_grad():
        for p, weight in zip(pair.params, weights, strict=True):
            p.copy_(weight)
    pair.optimizer.load_state_dict(saved)
    pair.backward(batches[5])
    pair.step()
    assert pair.alike()


@pytest.mark.parametrize("numerator", NUMERATORS)
def test_state_that_is_deleted_between_backward_and_step(numerator: str, run: Run) -> None:
    """The step is not taken, and the next one is the first."""
    pair = Pair(run, numerator=numerator)
    batches = list(pair.gradients(4))
    for grads in batches[:2]:
        pair.backward(grads)
        pair.step()
    pair.backward(batches[2])
    for optimizer, _ in pair.both:
        optimizer.state.clear()
    weights = [p.detach().clone() for p in pair.params]
    with pytest.raises(RuntimeError, match=r"the state of parameter 0 of group 0 was deleted between backward\(\)"):
        pair.optimizer.step()
    assert same_bits(weights, [p.detach() for p in pair.params])
    assert not pair.optimizer.state
    for p, q in zip(pair.params, pair.plain_params, strict=True):  # the gradient form has moved w by then
        with torch.no_grad():
            p.copy_(q)
    if run.backend == "cpu":
        give_state(pair.plain)
    for grads in batches[-1:]:
        pair.backward(grads)
        pair.step()
    assert pair.alike()
