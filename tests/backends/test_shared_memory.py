"""Tensors of a step that share memory: taken one after the other by every backend, or refused by name."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM, native
from sofim_fused.backends import addresses
from tests.support.problems import give_state
from tests.support.runs import EMULATED, INTERPRETED, Run, once

# With so many elements two threads meet in the same ones; what stands in for a GPU takes tensors in turn.
ELEMENTS = 3_000 if INTERPRETED else 20_000 if EMULATED else 50_000
# The gradients' norm is about √ρ: a step then changes each weight by much more than its last bit.
MOMENTUM, RHO = 0.9, 0.4 * ELEMENTS
LR, LIMIT = 0.8 * RHO, 0.8 * RHO**0.5
WIDE, NARROW = torch.float32, torch.bfloat16


@contextlib.contextmanager
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Shared:
    """Tensors that share memory.

    Attributes:
        params: the parameters.
        grads: functions that give the gradients of a step, which may lie in memory of what there is.
        state: makes a step's state share memory, once there is some.
    """

    params: list[nn.Parameter]
    state: Callable[[list[dict[str, Tensor]]], None] = lambda states: None
    grads: dict[int, Callable[[list[dict[str, Tensor]]], Tensor]] = field(default_factory=dict)


Values = Callable[..., Tensor]  # of a shape: numbers between 1 and 2, the same in each dtype


def parameters(*tensors: Tensor) -> list[nn.Parameter]:
    """On the very memory of these."""
    made = []
    for x in tensors:
        made.append(nn.Parameter(torch.empty_like(x)))
        made[-1].data = x
    return made


def tied(values: Values) -> Shared:
    x = values(ELEMENTS)
    return Shared(parameters(x, x))


def tied_with_others_between(values: Values) -> Shared:
    x = values(ELEMENTS)
    return Shared(parameters(values(5), x, values(7), x, x, values(9)))


def views_a_few_elements_apart(values: Values) -> Shared:
    x = values(ELEMENTS + 3)
    return Shared(parameters(x[:-3], x[3:]))


def views_between_each_other(values: Values) -> Shared:
    x = values(2 * ELEMENTS)
    return Shared(parameters(x[::2], x[1::2]))


def a_matrix_and_its_transpose(values: Values) -> Shared:
    side = int(ELEMENTS**0.5)
    x = values(side, side)
    return Shared(parameters(x, x.t(), x[::2]))


def one_moment(values: Values) -> Shared:
    def share(states: list[dict[str, Tensor]]) -> None:
        states[1]["exp_avg"] = states[0]["exp_avg"]

    return Shared(parameters(values(ELEMENTS), values(ELEMENTS)), share)


def moments_that_overlap(values: Values) -> Shared:
    def share(states: list[dict[str, Tensor]]) -> None:
        both = states[0]["exp_avg"].new_zeros(ELEMENTS + 1)
        states[0]["exp_avg"], states[1]["exp_avg"] = both[1:], both[:-1]

    return Shared(parameters(values(ELEMENTS), values(ELEMENTS)), share)


def one_compensation(values: Values) -> Shared:
    def share(states: list[dict[str, Tensor]]) -> None:
        for name in states[0].keys() & {"kahan", "master_bits"}:
            states[1][name] = states[0][name]

    x = values(ELEMENTS)
    return Shared(parameters(x, x), share)


def a_parameter_in_anothers_moment(values: Values) -> Shared:
    shared = Shared(parameters(values(ELEMENTS), values(ELEMENTS)))

    def share(states: list[dict[str, Tensor]]) -> None:
        states[0]["exp_avg"] = shared.params[1].data

    shared.state = share
    return shared


def a_gradient_in_another_parameter(values: Values) -> Shared:
    shared = Shared(parameters(values(ELEMENTS), values(ELEMENTS), values(ELEMENTS)))
    shared.grads = {0: lambda states: shared.params[1].data, 2: lambda states: shared.params[1].data}
    return shared


def a_gradient_next_to_its_own_place(values: Values) -> Shared:
    x = values(ELEMENTS + 1)
    return Shared(parameters(x[1:], values(4)), grads={0: lambda states: x[:-1]})


def a_gradient_in_a_moment(values: Values) -> Shared:
    own: Callable[..., Tensor] = lambda states: states[0]["exp_avg"]  # noqa: E731

    def fill(states: list[dict[str, Tensor]]) -> None:
        states[0]["exp_avg"].copy_(values(ELEMENTS))

    return Shared(parameters(values(ELEMENTS), values(ELEMENTS)), fill, {0: own, 1: own})


def a_gradient_that_is_its_tied_parameter(values: Values) -> Shared:
    x = values(ELEMENTS)
    return Shared(parameters(x, x), grads={0: lambda states: x, 1: lambda states: x})


WEIGHTS = [
    tied,
    tied_with_others_between,
    views_a_few_elements_apart,
    views_between_each_other,
    a_matrix_and_its_transpose,
]
STATES = [one_moment, moments_that_overlap, one_compensation]
GRADIENTS = [
    a_gradient_in_another_parameter,
    a_gradient_next_to_its_own_place,
    a_gradient_that_is_its_tied_parameter,
]
OF_ONE_DTYPE = [a_parameter_in_anothers_moment, a_gradient_in_a_moment]  # as the moment's
CASES = [
    *((make, dtype) for make in [*WEIGHTS, *STATES, *GRADIENTS] for dtype in (WIDE, NARROW)),
    *((make, WIDE) for make in OF_ONE_DTYPE),
]
NAMED = [pytest.param(make, dtype, id=f"{make.__name__}-{str(dtype)[6:]}") for make, dtype in CASES]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1 / LR, "max_grad_norm": LIMIT},
    {"weight_decay": 0.1, "decoupled_weight_decay": False},
    {"numerator": "gradient", "weight_decay": 0.1 / LR},
    {"numerator": "gradient", "weight_decay": 0.1, "decoupled_weight_decay": False, "max_grad_norm": LIMIT},
    {"numerator": "nesterov", "weight_decay": 0.1, "decoupled_weight_decay": False},
]


def values_of(dtype: torch.dtype, device: str) -> Values:
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        # On a grid that bfloat16 holds: the same numbers in each dtype.
        return (1 + torch.randint(0, 64, shape, generator=generator) / 64).to(device, dtype)

    return values


def gradients(shared: Shared, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(-4, 5, p.shape, generator=generator) / 4).to(p.device, p.dtype) for p in shared.params]


def expected(options: dict[str, Any], make: Callable[[Values], Shared], steps: int) -> Shared:
    """The definition in float64: each pass takes the tensors in turn; gradients are those from before the step."""
    shared = make(values_of(torch.float64, "cpu"))
    states = [{"exp_avg": torch.zeros_like(p.data)} for p in shared.params]
    shared.state(states)
    decay, limit = options.get("weight_decay", 0.0), options.get("max_grad_norm")
    l2, decoupled = (decay, 0.0) if options.get("decoupled_weight_decay") is False else (0.0, decay)

    def right(m: Tensor, w: Tensor, g: Tensor) -> Tensor:
        ahead = (MOMENTUM * m + (1 - MOMENTUM) * (g + l2 * w)) / (1 - MOMENTUM ** (step + 1))
        return {"moment": c * m, "gradient": g + l2 * w, "nesterov": ahead}[options.get("numerator", "moment")]

    def sums(m: Tensor, w: Tensor, g: Tensor) -> tuple[float, float]:
        return float(c * c * (m * m).sum() / RHO), float(c * (m * right(m, w, g)).sum() / RHO)

    def update(w: Tensor, m: Tensor, g: Tensor, s: float, cross: float) -> None:
        w.copy_((1 - LR * decoupled) * w - LR / RHO * (right(m, w, g) - c * m * cross / (1 + s)))

    for step in range(1, steps + 1):
        given = gradients(shared, step)
        grads = [
            (shared.grads[i](states) if i in shared.grads else given[i]).clone() for i in range(len(shared.params))
        ]
        c = 1 / (1 - MOMENTUM**step)
        members = [(p.data, known["exp_avg"], g) for p, known, g in zip(shared.params, states, grads, strict=True)]
        s = cross = 0.0

        if limit is None:
            for w, m, g in members:
                m.mul_(MOMENTUM).add_((1 - MOMENTUM) * (g + l2 * w))
                norm, product = sums(m, w, g)
                s, cross = s + norm, cross + product
            for w, m, g in members:
                update(w, m, g, s, cross)
            continue
        norm = float(sum((g * g).sum() for g in grads)) ** 0.5
        members = [(w, m, g * min(1.0, limit / norm)) for w, m, g in members]
        for w, m, g in members:
            norm, product = sums(MOMENTUM * m + (1 - MOMENTUM) * (g + l2 * w), w, g)
            s, cross = s + norm, cross + product
        for w, m, g in members:
            m.mul_(MOMENTUM).add_((1 - MOMENTUM) * (g + l2 * w))
            update(w, m, g, s, cross)
    return shared


def taken(run: Run, shared: Shared, steps: int, **options: Any) -> list[Tensor]:
    optimizer = SOFIM(shared.params, lr=LR, momentum=MOMENTUM, rho=RHO, backend=run.backend, **options)
    give_state(optimizer)
    states = [optimizer.state[p] for p in shared.params]
    shared.state(states)
    for step in range(1, steps + 1):
        for i, (p, g) in enumerate(zip(shared.params, gradients(shared, step), strict=True)):
            p.grad = shared.grads[i](states) if i in shared.grads else g
        with two_threads():
            optimizer.step()
    return [p.detach().cpu().double() for p in shared.params]


@pytest.mark.covering(2)
@pytest.mark.parametrize(
    "options", OPTIONS, ids=["plain", "clipped", "l2", "gradient", "gradient-l2-clipped", "nesterov-l2"]
)
@pytest.mark.parametrize(("make", "dtype"), NAMED)
def test_tensors_that_share_memory_are_taken_in_turn(
    make: Callable[[Values], Shared], dtype: torch.dtype, options: dict[str, Any], run: Run
) -> None:
    steps = 2
    wanted = expected(options, make, steps)
    found = taken(run, make(values_of(dtype, run.device)), steps, **options)
    start = make(values_of(torch.float64, "cpu"))
    # bfloat16 weights are within two of their last bits; float32's errors are those of the sums' terms.
    tolerance = 2.0**-6 if dtype == NARROW else 1e-5
    for mine, theirs, before in zip(found, wanted.params, start.params, strict=True):
        scale = theirs.detach().abs().max().clamp(min=before.detach().abs().max())
        torch.testing.assert_close(mine / scale, theirs.detach() / scale, rtol=0, atol=tolerance)


@once
def test_a_turn_that_is_left_out_would_be_seen() -> None:
    """Were one of two tied updates lost in a part of the elements, the test above would not pass."""
    start, one = tied(values_of(torch.float64, "cpu")), expected({}, tied, 1)
    moved = (one.params[0] - start.params[0]).abs() / one.params[0].abs().max()
    for tolerance in (1e-5, 2.0**-6):
        assert (moved / 2 > 2 * tolerance).float().mean() > 0.25


@once
@pytest.mark.parametrize("make", [tied, views_a_few_elements_apart, one_moment], ids=lambda make: make.__name__)
def test_a_million_elements_on_two_threads_come_to_the_same_each_time(make: Callable[[Values], Shared]) -> None:
    """A race between threads shows in many elements, but not in each run."""
    results = []
    for backend in ["reference", *["cpu"] * 4]:
        values = values_of(WIDE, "cpu")
        shared = make(lambda *shape: values(*(20 * size if size >= ELEMENTS else size for size in shape)))  # noqa: B023
        optimizer = SOFIM(shared.params, lr=20 * LR, rho=20 * RHO, backend=backend)
        give_state(optimizer)
        shared.state([optimizer.state[p] for p in shared.params])
        for p, g in zip(shared.params, gradients(shared, 1), strict=True):
            p.grad = g
        with two_threads():
            optimizer.step()
            optimizer.step()
        results.append([p.detach() for p in shared.params])
    for found in results[2:]:
        assert all(map(torch.equal, found, results[1]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_tied_weights_move_as_under_sgd(run: Run) -> None:
    """Without momentum, and with ρ far above the gradients' squared norm, the step is SGD's."""
    ours, theirs = (tied(values_of(WIDE, run.device)).params for _ in range(2))
    optimizer = SOFIM(ours, lr=0.5e20, momentum=0.0, rho=1e20, backend=run.backend)
    sgd = torch.optim.SGD(theirs, lr=0.5, foreach=False)
    give_state(optimizer)
    for step in range(2):
        for params in (ours, theirs):
            for p, g in zip(params, gradients(Shared(params), step), strict=True):
                p.grad = g
        optimizer.step()
        sgd.step()
    assert ours[0].data_ptr() == ours[1].data_ptr()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("numerator", ["moment", "gradient"])
def test_in_the_backward_pass_tied_weights_are_taken_in_turn(numerator: Any, run: Run) -> None:
    results = []
    for in_backward in (False, True):
        params = tied_with_others_between(values_of(WIDE, run.device)).params
        optimizer = SOFIM(
            params, lr=LR, momentum=MOMENTUM, rho=RHO, numerator=numerator, in_backward=in_backward, backend=run.backend
        )
        give_state(optimizer)
        for step in range(2):
            grads = gradients(Shared(params), step)
            sum((p * g).sum() for p, g in zip(params, grads, strict=True)).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("numerator", "decay", "one_moment"), [("moment", 0.0, True), ("gradient", 0.0, True), ("gradient", 0.1, False)]
)
def test_in_the_backward_pass_what_depends_on_the_order_is_refused(
    numerator: Any, decay: float, one_moment: bool, run: Run
) -> None:
    """The order is that in which gradients arrive, not that of parameters: a plain step's result cannot be had."""
    params = [nn.Parameter(torch.ones(8, device=run.device)) for _ in range(3)]
    options: dict[str, Any] = {"numerator": numerator, "weight_decay": decay, "backend": run.backend}
    optimizer = SOFIM(params, in_backward=True, **options)
    give_state(optimizer)
    if one_moment:
        optimizer.state[params[2]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"]
    else:
        params[2].data = params[0].data
    saved = copy.deepcopy(optimizer.state_dict())
    sum((p * (i + 1)).sum() for i, p in enumerate(params)).backward()  # type: ignore[union-attr]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"parameters 0 and 2 share memory .* with in_backward=True"):
            optimizer.step()
    optimizer.load_state_dict(saved)  # which gives each parameter a moment of its own
    optimizer.zero_grad()
    if one_moment:
        sum((p * (i + 1)).sum() for i, p in enumerate(params)).backward()  # type: ignore[union-attr]
        optimizer.step()


# What is left to Python, and what is not


def _native_step() -> Callable[[SOFIM], bool]:
    module = native.cpu()
    if isinstance(module, str):
        pytest.skip(module)
    step = module.Step()
    return lambda optimizer: step(optimizer.param_groups, optimizer.state) is not None


def _packed_step() -> Callable[[SOFIM], bool]:
    module = native.cpu()
    if isinstance(module, str):
        pytest.skip(module)
    packed = module.PackedStep(1_024)

    def gathers(optimizer: SOFIM) -> bool:
        changed = packed.gather(optimizer.param_groups, optimizer.state)
        packed.finish(False, False, False)
        return changed is not None

    return gathers


WHOLE = {"step": _native_step, "packed": _packed_step}


def optimizer_of(shared: Shared) -> SOFIM:
    optimizer = SOFIM(shared.params, backend="reference")
    give_state(optimizer)
    states = [optimizer.state[p] for p in shared.params]
    shared.state(states)
    for i, (p, g) in enumerate(zip(shared.params, gradients(shared, 1), strict=True)):
        p.grad = shared.grads[i](states) if i in shared.grads else g
    return optimizer


@once
@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize(("make", "dtype"), NAMED)
def test_a_whole_step_leaves_shared_memory_to_python(
    make: Callable[[Values], Shared], dtype: torch.dtype, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ELEMENTS", 30)
    optimizer = optimizer_of(make(values_of(dtype, "cpu")))
    takes = WHOLE[whole]()
    before = [x.clone() for p in optimizer.state for x in (p.detach(), *optimizer.state[p].values())]
    assert not takes(optimizer)
    assert not takes(optimizer)  # the second time it is known
    after = [x for p in optimizer.state for x in (p.detach(), *optimizer.state[p].values())]
    assert all(map(torch.equal, before, after))


@once
@pytest.mark.parametrize("whole", WHOLE)
def test_a_whole_step_takes_what_only_lies_in_one_buffer(whole: str) -> None:
    """Parameters, moments, gradients next to each other, and gradients in each other's memory."""
    w, m, g = (torch.ones(40) for _ in range(3))
    params = parameters(w[:10], w[10:20], w[20:], torch.ones(10))
    optimizer = SOFIM(params, backend="reference")
    give_state(optimizer)
    for i, p in enumerate(params[:2]):
        optimizer.state[p]["exp_avg"] = m[10 * i : 10 * i + 10]
    grads = [g[:10], g[5:15], g[20:], params[3].data]  # the last one in its own parameter's memory
    takes = WHOLE[whole]()
    for _ in range(2):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        assert takes(optimizer)
        for p in params:
            p.grad = torch.ones_like(p)
        assert takes(optimizer)


@once
@pytest.mark.parametrize("whole", WHOLE)
def test_sharing_that_comes_and_goes_is_seen(whole: str) -> None:
    p, q = (nn.Parameter(torch.ones(10)) for _ in range(2))
    optimizer = optimizer_of(Shared([p, q]))
    takes = WHOLE[whole]()
    state = optimizer.state[p]
    moment = state["exp_avg"]
    for _ in range(2):
        assert takes(optimizer)
        q.data = p.data
        assert not takes(optimizer)
        q.data = torch.ones(10)
        assert takes(optimizer)
        state["exp_avg"] = optimizer.state[q]["exp_avg"]
        assert not takes(optimizer)
        state["exp_avg"] = moment
        assert takes(optimizer)
        q.grad = moment  # the very tensor
        assert not takes(optimizer)
        q.grad = torch.from_numpy(moment.numpy())  # a storage of its own over the same memory
        assert not takes(optimizer)
        q.grad = moment.view(2, 5).t().contiguous().view(10)
        assert takes(optimizer)


@once
@pytest.mark.parametrize("whole", WHOLE)
def test_a_wider_gradient_at_the_same_address_is_seen(whole: str) -> None:
    """In float32 it reaches twice as far, and into a parameter that lies behind."""
    memory_of_both = torch.zeros(20, dtype=torch.bfloat16)
    p, q = nn.Parameter(memory_of_both[10:]), nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    optimizer = optimizer_of(Shared([p, q]))
    takes = WHOLE[whole]()
    q.grad_dtype = None
    for _ in range(2):
        q.grad = memory_of_both[:10]
        assert takes(optimizer)
        q.grad = memory_of_both.view(torch.float32)
        assert not takes(optimizer)


@once
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_columns_of_one_matrix_are_a_parameter_and_its_state(backend: str) -> None:
    """Ranges overlap, elements do not: nothing is refused, and the step is that of tensors apart."""
    results = []
    for columns in (torch.ones(50, 3), None):
        p = nn.Parameter(torch.ones(50))
        optimizer = SOFIM([p], backend=backend)
        p.grad = torch.arange(50.0)
        give_state(optimizer)
        if columns is not None:
            p.data, optimizer.state[p]["exp_avg"] = columns[:, 0], columns[:, 2].zero_()
        optimizer.step()
        optimizer.step()
        results.append((p.detach().clone(), optimizer.state[p]["exp_avg"].clone()))
        if columns is not None:
            assert torch.equal(columns[:, 1], torch.ones(50))
    torch.testing.assert_close(*results)


@once
def test_what_is_plainly_apart() -> None:
    x = torch.zeros(12, 8)
    assert addresses.apart(x[:, 0], x[:, 1])
    assert addresses.apart(x[:, :4], x[:, 4:])
    assert addresses.apart(x[:, 4:], x[:, :4])
    assert addresses.apart(x[::2], x[1::2])
    assert not addresses.apart(x[:, :5], x[:, 4:])
    assert not addresses.apart(x, x)
    assert not addresses.apart(x[0, 0], x[0, 0])
    assert not addresses.apart(x[:, 0], x[:, 0])


@once
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_refusal_leaves_no_state_behind(backend: str) -> None:
    """A parameter that has its first gradient would get state before memory is looked at."""
    known, new = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = SOFIM([new, known], backend=backend)
    known.grad = torch.ones(4)
    optimizer.step()
    optimizer.state[known]["exp_avg"] = known.data
    new.grad = torch.ones(4)
    with pytest.raises(ValueError, match="exp_avg shares memory with the parameter"):
        optimizer.step()
    assert list(optimizer.state) == [known]
    optimizer.state[known]["exp_avg"] = torch.zeros(4)
    optimizer.step()
    assert int(optimizer.state[new]["step"]) == 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["row_var", "col_var"])
def test_a_running_mean_of_squares_has_memory_of_its_own(name: str, backend: str) -> None:
    params = [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    optimizer = SOFIM(params, diagonal="factored", backend=backend)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    optimizer.state[params[1]][name] = optimizer.state[params[0]][name]
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=rf"{name} shares memory with {name} of parameter 0"):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))


@pytest.mark.parametrize("diagonal", ["factored", "element"])
def test_tied_weights_under_a_diagonal_that_adapts_are_taken_in_turn(diagonal: Any, run: Run) -> None:
    """As if each parameter had taken its step after the other: without the term of rank one, nothing links them."""
    values, grads = torch.randn(3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    values, grads = values.to(run.device), grads.to(run.device)
    together = [nn.Parameter(values.clone()), nn.Parameter(values.clone())]
    together[1].data = together[0].data
    alone = nn.Parameter(values.clone())
    options: dict[str, Any] = {"diagonal": diagonal, "lr": 0.1, "backend": run.backend}
    optimizer, apart = SOFIM(together, **options), [SOFIM([alone], **options) for _ in range(2)]
    for scale in (1.0, 0.5, 2.0):
        for param, grad in zip(together, grads, strict=True):
            param.grad = grad * scale
        optimizer.step()
        for one, grad in zip(apart, grads, strict=True):
            alone.grad = grad * scale
            one.step()
    torch.testing.assert_close(together[0], alone, rtol=1e-12, atol=0)
