"""Faults of gradients, of memory, and of what is called from outside: NaN, no memory, exceptions.

Each leaves an optimizer as it was, or is reported by name, and what comes next is right. ``--hypothesis-profile=deep``
tries many more of each kind.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from sofim_fused import SOFIM, checks, in_backward
from tests.in_backward.support import backward
from tests.support.problems import GUARDED, OPTIONS, Problem, give, give_state, mixed_problem, same_bits, snapshot
from tests.support.strategies import CHECKED

DEEP = settings.get_current_profile_name() == "deep"
BACKENDS = ["cpu", "reference"]
NUMERATORS = ["moment", "gradient"]
BAD = [float("nan"), float("inf"), float("-inf")]


# A NaN or an infinity at any place of any gradient


# Where passes go from one path to another: vectors, sums, tiles (C++ and PyTorch).
EDGES = sorted({edge + off for edge in (0, 16, 2048, 16_384, 32_768) for off in (-2, -1, 0, 1)} & set(range(40_000)))
SMALL = (1, 15, 17, 40)  # sizes of which every place is tried
LARGE = 32_768 + 19

KINDS: list[tuple[torch.dtype, torch.dtype | None]] = [
    (torch.float32, None),
    (torch.float64, None),
    (torch.bfloat16, None),
    (torch.float16, torch.bfloat16),
    (torch.complex64, None),
    (torch.complex128, None),
]


class Guarded:
    """An optimizer with state, gradients for its next step, and a way to look at all that a step may change."""

    def __init__(self, backend: str, sizes: Sequence[int], dtype: torch.dtype, **options: Any) -> None:
        generator = torch.Generator().manual_seed(4)

        def values(n: int) -> Tensor:
            return torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)

        self.params = [nn.Parameter(values(n)) for n in sizes]
        half = len(sizes) // 2 + 1
        groups = [
            {"params": self.params[:half]},
            {"params": self.params[half:], "weight_decay": 0.1, "decoupled_weight_decay": False},
        ]
        self.optimizer = SOFIM(groups, lr=0.1, backend=backend, **options)
        for _ in range(2):
            for p in self.params:
                p.grad = values(p.numel())
            self.optimizer.step()
        state = self.optimizer.state
        self.tensors = [
            x.view(torch.uint8) if x.dim() else x
            for p in self.params
            for x in (p.detach(), *(state[p][name] for name in sorted(state[p])))
        ]
        self.before = [x.clone() for x in self.tensors]

    def unchanged(self) -> bool:
        return all(map(torch.equal, self.before, self.tensors))

    def places(self, every: Sequence[int]) -> Iterator[tuple[Tensor, int]]:
        """Real elements of gradients: of the small ones all, of others those at edges and ``every``."""
        for p in self.params:
            assert p.grad is not None
            flat = (torch.view_as_real(p.grad) if p.is_complex() else p.grad).view(-1)
            n = flat.numel()
            chosen = range(n) if n <= 2 * max(SMALL) else {*EDGES, n - 1, n - 2, *every} & set(range(n))
            yield from ((flat, place) for place in sorted(chosen))

    def try_all(self, every: Sequence[int], step: Callable[[], object], in_turn: bool) -> int:
        """Spoil one element after the other, and see that ``step`` changes nothing; how many there were.

        ``in_turn``: each by one of NaN, inf and -inf, else by all three.
        """
        count = 0
        for at, (flat, place) in enumerate(self.places(every)):
            good = flat[place].clone()
            for bad in BAD[at % 3 :][:1] if in_turn else BAD:
                flat[place] = bad
                step()
                count += 1
                assert self.unchanged(), (flat.numel(), place, bad)
            flat[place] = good
        CHECKED["NaN or infinities in gradients"] += count
        return count


def spread(places: int) -> range:
    """As many places of a large tensor, spread evenly, and others for each run of the deep profile."""
    stride = max(1, 2 * LARGE // places)
    return range(random.randrange(stride) if DEEP else 7, 2 * LARGE, stride)


@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize(("dtype", "state_dtype"), KINDS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_element_anywhere_changes_nothing(
    backend: str, dtype: torch.dtype, state_dtype: torch.dtype | None, numerator: str
) -> None:
    for sizes, every in ((SMALL, ()), ((3, LARGE), spread(1000 if DEEP else 5))):
        guarded = Guarded(
            backend, sizes, dtype, numerator=numerator, state_dtype=state_dtype, skip_nonfinite=True, max_grad_norm=1.0
        )
        optimizer = guarded.optimizer
        count = guarded.try_all(every, optimizer.step, in_turn=backend == "reference" and not (DEEP and sizes is SMALL))
        assert int(optimizer.skipped_steps) == count > 20
        optimizer.step()
        assert not guarded.unchanged()
        assert int(optimizer.skipped_steps) == count


@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_element_that_a_grad_scaler_finds_changes_nothing(
    backend: str, dtype: torch.dtype, numerator: str
) -> None:
    """It looks for itself, and the step is told what it has found: ``amp_fused``."""
    for sizes, every in ((SMALL, ()), ((3, LARGE), spread(200 if DEEP else 5))):
        guarded = Guarded(backend, sizes, dtype, numerator=numerator)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**9)
        scaler.scale(torch.ones(()))

        def step(guarded: Guarded = guarded, scaler: torch.amp.GradScaler = scaler) -> None:
            scaler.step(guarded.optimizer)
            scaler.update(1.0)

        count = guarded.try_all(every, step, in_turn=not DEEP)
        assert int(guarded.optimizer.skipped_steps) == count > 20
        step()
        assert not guarded.unchanged()


# No memory for state


class Memory:
    """What makes new tensors by name (``zeros``, ``zeros_like``, ``new_zeros``), of which one call in a row fails."""

    def __init__(self, patch: pytest.MonkeyPatch, error: type[Exception]) -> None:
        self.calls = 0
        self.fails_at: int | None = None
        for name in ("zeros", "zeros_like"):
            patch.setattr(torch, name, self._counted(getattr(torch, name), error))
        patch.setattr(Tensor, "new_zeros", self._counted(Tensor.new_zeros, error))

    def _counted(self, make: Callable[..., Tensor], error: type[Exception]) -> Callable[..., Tensor]:
        def counted(*args: Any, **kwargs: Any) -> Tensor:
            self.calls += 1
            if self.calls == self.fails_at:
                raise error("out of memory")
            return make(*args, **kwargs)

        return counted

    def start(self, fails_at: int | None = None) -> None:
        self.calls, self.fails_at = 0, fails_at


ERRORS = [torch.OutOfMemoryError, RuntimeError, MemoryError]  # of devices, of the CPU's memory, and Python's own


@pytest.fixture(params=ERRORS if DEEP else ERRORS[:1], ids=lambda error: error.__name__)
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(monkeypatch, request.param)


def whole(optimizer: SOFIM) -> bool:
    """Whether each parameter has no state at all, or one to start with: nothing is half made."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            known = optimizer.state.get(p)
            lost = checks.lost_bits(p, group)
            names = {"exp_avg", "step"} | ({lost} if lost else set())
            if known and (set(known) != names or any(bool(x.count_nonzero()) for x in known.values())):
                return False
    return True


DTYPES = (torch.float32, torch.bfloat16, torch.complex64, torch.float64)
PROBLEM: dict[str, Any] = {"dtype": DTYPES, "decay": "l2", "layouts": ["matrix", "scalar", "sliced", "offset"]}


def all_gradients(problem: Problem) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(21)
    return [torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator)) for p in problem.params]


def go_on(optimizer: SOFIM, problem: Problem, steps: int = 3) -> list[Tensor]:
    """Steps in which parameters come and go, from the same gradients each time."""
    problem.generator.manual_seed(3)
    for _, grads in zip(range(steps), problem.gradients(), strict=False):
        give(problem.params, grads)
        optimizer.step()
    return snapshot(optimizer)


@pytest.mark.parametrize("options", [*OPTIONS[:2], {"max_grad_norm": 0.5}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_memory_in_a_first_step(backend: str, options: dict[str, Any], memory: Memory) -> None:
    """Wherever it lacks, the step can be taken when there is some."""
    expected, calls = [], 0
    # A first step is taken by passes, natively if there is state: to the last digit but one.
    for ready in (True, False):
        problem = mixed_problem(**PROBLEM)
        optimizer = SOFIM(problem.groups, backend=backend, **options)
        if ready:
            give_state(optimizer)
        give(problem.params, all_gradients(problem))
        memory.start()
        optimizer.step()
        calls = memory.calls
        expected.append(go_on(optimizer, problem))
    assert calls > 2 * len(PROBLEM["layouts"])
    for k in range(1, calls + 1):
        problem = mixed_problem(**PROBLEM)
        optimizer = SOFIM(problem.groups, backend=backend, **options)
        before = [p.detach().clone() for p in problem.params]
        give(problem.params, all_gradients(problem))
        memory.start(fails_at=k)
        with pytest.raises((RuntimeError, MemoryError), match="out of memory"):
            optimizer.step()
        assert same_bits(before, [p.detach() for p in problem.params])
        assert whole(optimizer)
        there = len(optimizer.state) == len(problem.params)
        memory.start()
        optimizer.step()
        assert same_bits(go_on(optimizer, problem), expected[0 if there and backend == "cpu" else 1]), k
        CHECKED["allocations that failed"] += 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_memory_for_parameters_that_are_added(backend: str, memory: Memory) -> None:
    """Those that were there have moved on, and stay as they are."""
    calls, expected, k = 10**9, None, 0
    while k <= calls:
        first, second = mixed_problem(**PROBLEM), mixed_problem(**PROBLEM, seed=1)
        optimizer = SOFIM(first.groups, backend=backend)
        memory.start()
        give(first.params, all_gradients(first))
        optimizer.step()
        optimizer.add_param_group({"params": second.params, "lr": 0.02})
        give(second.params, all_gradients(second))
        before = snapshot(optimizer)
        memory.start(fails_at=k or None)
        if k:
            with pytest.raises((RuntimeError, MemoryError), match="out of memory"):
                optimizer.step()
            made = [p for p in second.params if p in optimizer.state]
            for p in made:
                assert int(optimizer.state.pop(p)["step"]) == 0
            assert same_bits(before, snapshot(optimizer))
            memory.start()
        optimizer.step()
        calls = calls if k else memory.calls
        after = go_on(optimizer, first)
        expected = after if expected is None else expected
        assert same_bits(expected, after), k
        k += 1
    assert calls > 2 * len(second.params)
    CHECKED["allocations that failed"] += calls


def test_no_memory_to_count_skipped_steps(memory: Memory) -> None:
    """The counter is made when it is first asked for; a step asks for it."""
    for k in range(1, 100):
        (p,) = (nn.Parameter(torch.ones(3)),)
        optimizer = SOFIM([p], skip_nonfinite=True, backend="reference")
        give_state(optimizer)
        p.grad = torch.ones(3)
        before = snapshot(optimizer)
        memory.start(fails_at=k)
        try:
            optimizer.step()
        except (RuntimeError, MemoryError):
            assert same_bits(before, snapshot(optimizer)), k
        else:
            break
    assert k > 3


# Exceptions from outside


def fail(*_: Any) -> Any:
    raise KeyError("lost")


def failing_closure(optimizer: SOFIM, problem: Problem) -> Any:
    return lambda: optimizer.step(fail)


def failing_pre_hook(optimizer: SOFIM, problem: Problem) -> Any:
    optimizer.register_step_pre_hook(fail)
    return optimizer.step


def closure_that_fails_in_its_backward_pass(optimizer: SOFIM, problem: Problem) -> Any:
    handle = problem.params[1].register_hook(fail)

    def closure() -> float:
        try:
            backward(problem.params, all_gradients(problem))
        finally:
            handle.remove()
        return 0.0

    return lambda: optimizer.step(closure)


@pytest.mark.parametrize(
    "attempt", [failing_closure, failing_pre_hook, closure_that_fails_in_its_backward_pass], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("options", [{}, {"numerator": "gradient"}, GUARDED], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exception_before_a_step_leaves_it_to_be_taken(
    backend: str, steps: int, options: dict[str, Any], attempt: Callable[..., Any]
) -> None:
    ours, theirs = (mixed_problem(**PROBLEM) for _ in range(2))
    optimizer, twin = (SOFIM(problem.groups, backend=backend, **options) for problem in (ours, theirs))
    for _ in range(steps):
        for problem, mine in ((ours, optimizer), (theirs, twin)):
            give(problem.params, all_gradients(problem))
            mine.step()
    give(ours.params, all_gradients(ours))
    before = snapshot(optimizer)
    with pytest.raises(KeyError, match="lost"):
        attempt(optimizer, ours)()
    assert same_bits(before, snapshot(optimizer))
    assert len(optimizer.state) == (len(ours.params) if steps else 0)
    optimizer._optimizer_step_pre_hooks.clear()
    for problem, mine in ((ours, optimizer), (theirs, twin)):
        give(problem.params, all_gradients(problem))
        mine.step()
    assert same_bits(go_on(optimizer, ours), go_on(twin, theirs))


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exception_after_a_step_leaves_it_taken(backend: str, in_backward: bool) -> None:
    ours, theirs = (mixed_problem(**PROBLEM) for _ in range(2))
    optimizer = SOFIM(ours.groups, backend=backend, in_backward=in_backward)
    twin = SOFIM(theirs.groups, backend=backend, in_backward=in_backward)
    handle = optimizer.register_step_post_hook(fail)
    for problem in (ours, theirs):
        backward(problem.params, all_gradients(problem))
    with pytest.raises(KeyError, match="lost"):
        optimizer.step()
    handle.remove()
    twin.step()
    assert same_bits(snapshot(optimizer), snapshot(twin))
    for problem, mine in ((ours, optimizer), (theirs, twin)):
        mine.zero_grad()
        backward(problem.params, all_gradients(problem))
        mine.step()
    assert same_bits(snapshot(optimizer), snapshot(twin))


@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_pass_that_fails_with_gradients_in_moments(backend: str, numerator: str) -> None:
    """It cannot be undone: a second one is refused, and so is a checkpoint; one from before starts anew."""
    layouts = ["matrix", "vector", "scalar", "offset"]
    ours, theirs = (mixed_problem(torch.float32, "decoupled", layouts=layouts) for _ in range(2))
    optimizer, twin = (
        SOFIM(problem.groups, backend=backend, numerator=numerator, in_backward=True) for problem in (ours, theirs)
    )
    for problem, mine in ((ours, optimizer), (theirs, twin)):
        backward(problem.params, all_gradients(problem))
        mine.step()
        mine.zero_grad()
    saved = optimizer.state_dict()
    saved = {**saved, "state": {k: {n: x.clone() for n, x in v.items()} for k, v in saved["state"].items()}}
    weights = [p.detach().clone() for p in ours.params]
    handle = ours.params[0].register_hook(fail)
    with pytest.raises(KeyError, match="lost"):
        backward(ours.params, all_gradients(ours))
    handle.remove()
    assert any(p.grad is not None for p in ours.params)
    with pytest.raises(RuntimeError, match=r"a second gradient of parameter \d before step\(\)"):
        backward(ours.params, all_gradients(ours))
    with pytest.raises(RuntimeError, match=r"state_dict\(\) between backward\(\) and step\(\)"):
        optimizer.state_dict()
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        torch._foreach_copy_([p.detach() for p in ours.params], weights)
    for problem, mine in ((ours, optimizer), (theirs, twin)):
        mine.zero_grad()
        backward(problem.params, all_gradients(problem))
        mine.step()
    assert same_bits(snapshot(optimizer), snapshot(twin))


@pytest.mark.parametrize("batch", [1, 10, 1 << 20])
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_memory_in_the_backward_pass(
    backend: str, numerator: str, batch: int, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has come until then can be stepped with, once: nothing is lost, and nothing enters twice."""
    monkeypatch.setattr(in_backward, "BATCH", batch)
    layouts = ["matrix", "vector", "scalar", "offset"]

    def twin_of(present: Sequence[bool]) -> list[Tensor]:
        problem = mixed_problem(torch.float32, "l2", layouts=layouts)
        twin = SOFIM(problem.groups, backend=backend, numerator=numerator)
        give_state(twin)
        for p in (p for p, there in zip(problem.params, present, strict=True) if not there):
            del twin.state[p]
        grads = all_gradients(problem)
        give(problem.params, [g if there else None for g, there in zip(grads, present, strict=True)])
        twin.step()
        give_state(twin)
        give(problem.params, grads)
        twin.step()
        return snapshot(twin)

    for k in range(1, 200):
        problem = mixed_problem(torch.float32, "l2", layouts=layouts)
        optimizer = SOFIM(problem.groups, backend=backend, numerator=numerator, in_backward=True)
        memory.start(fails_at=k)
        error = ""
        try:
            backward(problem.params, all_gradients(problem))
        except (RuntimeError, MemoryError) as caught:
            error = str(caught)
        try:
            optimizer.step()
        except (RuntimeError, MemoryError) as caught:
            error = str(caught)
            optimizer.step()
        if memory.calls < k:
            break
        assert error == "out of memory"
        present = [p.grad is not None for p in problem.params]
        optimizer.zero_grad()
        backward(problem.params, all_gradients(problem))
        optimizer.step()
        assert same_bits(snapshot(optimizer), twin_of(present)), k
        CHECKED["allocations that failed"] += 1
    assert k > 8
