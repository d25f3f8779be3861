"""The native CPU passes: what the oracle's matrix does not ask of them."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM, backends, native
from sofim_fused.backends import Coefficients, Decay, GradientStep, StepTensors
from sofim_fused.backends.master_bits import joined
from sofim_fused.backends.reference import ReferencePasses
from sofim_fused.backends.rounding import random_bits, round_stochastic
from tests.backends.support import LEFT_TO_PYTHON, Subclass, Watching, set_grad
from tests.support.problems import give, give_state, mixed_problem, same_bits, snapshot

CPU = torch.device("cpu")
NONE = torch.empty(0)  # in the place of lost bits
TILE = 32_768  # kTile in csrc/gather/tiling.h
ROOT = Path(__file__).resolve().parents[2]
MODULE = native.cpu()
pytestmark = pytest.mark.skipif(isinstance(MODULE, str), reason=f"{MODULE}")

# Storage types: of weights, gradients and moments, and of the bits that weights lost.
Types = tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None]
TYPES = [
    (torch.float64, torch.float64, torch.float64, None),
    (torch.float32, torch.float32, torch.float32, None),
    (torch.float32, torch.float32, torch.bfloat16, None),
    *(
        (w, g, m, lost)
        for w in (torch.bfloat16, torch.float16)
        for g in (w, torch.float32)
        for m in (torch.float32, torch.bfloat16)
        for lost in (None, w, *([torch.int16, torch.int8] if w == torch.bfloat16 else []))
    ),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"numerator": "gradient", "fisher": "group"},
    {"max_grad_norm": 0.5, "skip_nonfinite": True},
    {"max_grad_norm": 0.5, "numerator": "gradient", "fisher": "parameter"},
]


class Memory:
    """Tensors cut out of wider storage whose other elements must not change."""

    def __init__(self, generator: torch.Generator, offset: int) -> None:
        self._generator = generator
        self._offset = offset
        self._storages: list[tuple[Tensor, Tensor, int]] = []

    def integers(self, size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Multiples of ``scale``, few enough that sums and products of them are exact in every dtype's arithmetic."""
        values = torch.randint(-4, 5, (size + self._offset + 64,), generator=self._generator).to(torch.float64) * scale
        storage = values.to(dtype)
        self._storages.append((storage, storage.clone(), size))
        return storage[self._offset :][:size]

    def intact(self) -> bool:
        """Whether all elements outside of the tensors are what they were."""
        begin = self._offset
        return all(
            torch.equal(now[:begin], was[:begin]) and torch.equal(now[begin + size :], was[begin + size :])
            for now, was, size in self._storages
        )


def made_tensors(types: Types, memory: Memory, sizes: list[int]) -> StepTensors:
    w, g, m, lost = types
    scale = (
        {torch.int16: 2**12, torch.int8: 2**4}[lost] if lost in (torch.int16, torch.int8) else torch.finfo(w).eps / 16
    )
    return StepTensors(
        CPU,
        params=[memory.integers(n, w) for n in sizes],
        grads=[memory.integers(n, g) for n in sizes],
        exp_avgs=[memory.integers(n, m) for n in sizes],
        lost_bits=[None if lost is None else memory.integers(n, lost, scale) for n in sizes],
        steps=[torch.tensor(i + 1) for i in range(len(sizes))],
        ordinals=[7 * i for i in range(len(sizes))],
    )


def vector(n: int, *values: float) -> Tensor:
    return torch.tensor(list(itertools.islice(itertools.cycle(values), n)), dtype=torch.float64)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("types", TYPES, ids=lambda types: "-".join(str(x).removeprefix("torch.") for x in types))
@pytest.mark.parametrize("call", ["accumulate", "accumulate cross", "accumulate step", "apply", "dots", "commit"])
def test_sizes_and_alignment(call: str, types: Types, offset: int) -> None:
    """Every size around the vectors' and the tiles', on values for which rounding has no say: the reference's bits."""
    sizes = [*range(71), 2047, 2048, 2049, 2048 + 37, TILE - 1, TILE, TILE + 1, 2 * TILE + 2049]
    n = len(sizes)
    decay = Decay([0.5] * n, [0.25, -0.25] * (n // 2) + [0.25] * (n % 2), [0.0, 0.125, 0.0] * n, cross=True)
    decay = decay._replace(weight=decay.weight[:n] if decay.weight else None)
    moment, weight, gradient = vector(n, -0.5, 0.25, 0.0), vector(n, 0.75, 1.0), vector(n, 0.5, -0.25)
    results = []
    for name in ("reference", "cpu"):
        passes = backends.choose(name, CPU)
        memory = Memory(torch.Generator().manual_seed(3), offset)
        tensors = made_tensors(types, memory, sizes)
        sums = None
        if call == "accumulate":
            sums = passes.accumulate(tensors, Decay(decay.moment, decay.gradient, None, cross=False))
        elif call == "accumulate cross":
            sums = passes.accumulate(tensors, decay)
        elif call == "accumulate step":
            sums = passes.accumulate(tensors, decay, GradientStep(weight, gradient))
        elif call == "apply":
            passes.apply(tensors, Coefficients(moment, weight, gradient))
            passes.apply(tensors, Coefficients(moment))
        elif call == "dots":
            sums = passes.dots(tensors, decay)
        else:
            passes.commit(tensors, decay, Coefficients(moment, weight, gradient, torch.tensor(0.5).double()))
        assert memory.intact()
        written = tensors.params + tensors.exp_avgs + tensors.grads + [k for k in tensors.lost_bits if k is not None]
        results.append(([x + 0.0 for x in written], [x for x in sums or () if x is not None]))  # + 0.0: no -0.0
    (written, sums), (native_written, native_sums) = results
    assert same_bits(written, native_written)
    for a, b in zip(sums, native_sums, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def operator_samples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for types in (TYPES[1], TYPES[-1]):
        tensors = made_tensors(types, Memory(torch.Generator().manual_seed(5), 0), [5, 33, 0])
        lists = (tensors.params, tensors.grads, tensors.exp_avgs)
        lost_bits = [torch.empty(0, dtype=types[0]) if k is None else k for k in tensors.lost_bits]
        counts = (tensors.steps, tensors.ordinals)
        factors, decays = [0.5, 0.25, 1.0], [0.0, 0.5, 0.0]
        v = vector(3, 0.5, -1.0)
        yield "accumulate", (*lists, [], lost_bits, *counts, factors, factors, None, False)
        yield "accumulate", (*lists, [], lost_bits, *counts, factors, factors, decays, True)
        yield "accumulate_step", (*lists, [], lost_bits, *counts, factors, factors, decays, True, v, v)
        yield "accumulate_step", (*lists, [], lost_bits, *counts, factors, factors, None, True, None, v)
        yield "apply", (*lists, [], lost_bits, *counts, v, None, None)
        yield "apply", (*lists, [], lost_bits, *counts, v, v, v)
        yield "dots", (*lists, [], lost_bits, False)
        yield "dots", (*lists, [], lost_bits, True)
        yield "commit", (*lists, [], lost_bits, *counts, factors, factors, None, v, None, None, None, None)
        yield (
            "commit",
            (*lists, [], lost_bits, *counts, factors, factors, decays, v, v, v, v[0].clone(), torch.tensor(False)),
        )
    steps, hyper, sums = [torch.tensor(i) for i in range(3)], vector(12, 0.5).view(2, 6), vector(3, 2.0)
    settings = (steps, hyper, [1, 2])
    yield "fold", (sums, None, None, None, None, None, *settings, 0, False, False, None, 1)
    yield "fold", (*[sums] * 6, *settings, 1, True, True, torch.tensor([0, 1, 0]), 2)
    yield "solve", (sums[:1, None], None, *settings, 0, False, False, None, None, None, False)
    yield "solve", (vector(18, 2.0).view(9, 2), sums[0], *settings, 1, True, True, 0.5, sums[1], sums[2], True)


def test_the_operators_are_what_their_schemas_say() -> None:
    """Mutation, aliasing, fake implementations and tracing, as PyTorch's own check has them."""
    backends.choose("cpu", CPU)  # registers the fake implementations
    tested = set()
    for name, arguments in operator_samples():
        operator = getattr(torch.ops.sofim_fused, name).default
        torch.library.opcheck(operator, arguments)
        tested.add(name)
    assert tested == {"accumulate", "accumulate_step", "apply", "dots", "commit", "fold", "solve"}


def test_the_operators_compile() -> None:
    """In one graph, without a break, to the same bits."""

    def step(w: list[Tensor], g: list[Tensor], m: list[Tensor], t: list[Tensor], lost: list[Tensor]) -> Tensor:
        ops = torch.ops.sofim_fused
        sums = ops.accumulate(w, g, m, [], lost, t, [0, 1], [0.9, 0.9], [0.1, 0.1], None, False)
        ops.apply(
            w, g, m, [], lost, t, [0, 1], -0.1 / (1.0 + sums[0].sum()) * torch.ones(2, dtype=torch.float64), None, None
        )
        return sums

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        generator = torch.Generator().manual_seed(1)
        w, g, m = ([torch.randn(n, generator=generator) for n in (5, 40)] for _ in range(3))
        none = [torch.empty(0), torch.empty(0)]
        results.append([*(function(w, g, m, [torch.tensor(0), torch.tensor(0)], none) for _ in range(2)), *w, *m])
    assert same_bits(*results)


def test_a_compiled_step() -> None:
    """With breaks in the graph, in torch's own part of the step, and to the same bits."""
    results = []
    for compiled in (False, True):
        params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 40)]
        optimizer = SOFIM(params, lr=0.1, backend="cpu")
        optimizer._step_in_one_call = lambda *_: None
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for count in range(3):
            give(params, [torch.sin(torch.arange(p.numel()) + float(count)) for p in params])
            step()
        results.append(snapshot(optimizer))
    assert same_bits(*results)


REFUSED: dict[str, Callable[[Any], Any]] = {
    "the lists differ in length; params has 2": lambda x: x.update(grads=x["grads"][:1]),
    "tensor 0: parameter: not float32": lambda x: x["params"].__setitem__(0, torch.ones(4, dtype=torch.int32)),
    "tensor 1: gradient: of another dtype": lambda x: x["grads"].__setitem__(1, torch.ones(9).double()),
    "tensor 0: gradient: of another shape": lambda x: x["grads"].__setitem__(0, torch.ones(3)),
    "tensor 0: exp_avg: of another shape": lambda x: x["exp_avgs"].__setitem__(0, torch.ones(2, 2)),
    "tensor 0: exp_avg: not float32 or bfloat16": lambda x: x["exp_avgs"].__setitem__(0, torch.ones(4).half()),
}


@pytest.mark.parametrize("text", REFUSED)
def test_the_operators_refuse_what_they_cannot_read(text: str) -> None:
    lists: dict[str, Any] = {name: [torch.ones(4), torch.ones(9)] for name in ("params", "grads", "exp_avgs")}
    REFUSED[text](lists)
    with pytest.raises(RuntimeError, match=text):
        torch.ops.sofim_fused.dots(lists["params"], lists["grads"], lists["exp_avgs"], [], [NONE] * 2, False)


def test_the_operators_refuse_factors_that_do_not_fit() -> None:
    lists, ops = [[torch.ones(4), torch.ones(9)] for _ in range(3)], torch.ops.sofim_fused
    counts = ([torch.tensor(0)] * 2, [0, 1])
    with pytest.raises(RuntimeError, match=r"decay: one value per tensor, 2 are needed"):
        ops.accumulate(*lists, [], [NONE] * 2, *counts, [1.0], [1.0], None, False)
    with pytest.raises(RuntimeError, match=r"tensor 0: step: not a 0-dimensional int64 tensor"):
        ops.accumulate(*lists, [], [NONE] * 2, [torch.tensor(0.0)] * 2, [0, 1], [1.0] * 2, [1.0] * 2, None, False)
    for moment in (torch.ones(2), torch.ones(3, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match=r"moment: a float64 vector of 2 on the CPU is needed"):
            ops.apply(*lists, [], [NONE] * 2, *counts, moment, None, None)
    assert all(torch.equal(x, torch.ones_like(x)) for some in lists for x in some)


# The whole step in one call


def in_one_call(optimizer: SOFIM) -> list[Any]:
    """What the native step answers from now on, call by call."""
    answers: list[Any] = []
    take = optimizer._native_step()

    def noted(*args: Any) -> Any:
        answers.append(take(*args))
        return answers[-1]

    optimizer._step_in_one_call = noted
    return answers


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("decay", ["none", "decoupled", "l2"])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,), (torch.float64,), (torch.bfloat16, torch.float32, torch.float16, torch.complex64)],
    ids=str,
)
def test_one_call_takes_the_step_that_the_passes_take(
    dtypes: tuple[torch.dtype, ...], decay: str, options: dict[str, Any]
) -> None:
    """From a parameter's second step on, to the same bits: sums are added up and solved in the same order."""
    results, answers = [], []
    for whole in (True, False):
        problem = mixed_problem(dtypes, decay)
        optimizer = SOFIM(problem.groups, backend="cpu", **options)
        if whole:
            answers = in_one_call(optimizer)
        else:
            optimizer._step_in_one_call = lambda *_: None
        for _, grads in zip(range(8), problem.gradients(), strict=False):
            give(problem.params, grads)
            optimizer.step()
        results.append(snapshot(optimizer))
        if options.get("max_grad_norm"):
            assert optimizer.grad_norm is not None
            results[-1].append(optimizer.grad_norm)
    assert [answer is None for answer in answers] == [True] * 4 + [False] * 4
    assert same_bits(*results)


def two_parameters(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[SOFIM, list[nn.Parameter]]:
    """An optimizer that has taken a step, with gradients for the next."""
    params = [nn.Parameter(torch.linspace(-1, 1, n).to(dtype)) for n in (5, 40)]
    optimizer = SOFIM([{"params": [p]} for p in params], backend="cpu", **options)
    give(params, [torch.full_like(p, 0.5) for p in params])
    optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("name", LEFT_TO_PYTHON)
def test_what_one_call_does_not_expect_it_leaves_alone(name: str) -> None:
    """Python then takes the step or refuses it. The first parameter is in order and must not have been updated."""
    optimizer, params = two_parameters()
    LEFT_TO_PYTHON[name](optimizer)
    before, versions = snapshot_of(params, optimizer), [p._version for p in params]
    assert native_step()(optimizer.param_groups, optimizer.state) is None
    assert same_bits(before, snapshot_of(params, optimizer))
    assert versions == [p._version for p in params]


def native_step() -> Callable[..., Any]:
    assert not isinstance(MODULE, str)
    return MODULE.Step()


def snapshot_of(params: list[nn.Parameter], optimizer: SOFIM) -> list[Tensor]:
    kept = [x for p in params for x in optimizer.state.get(p, {}).values() if isinstance(x, Tensor)]
    return [x.detach().clone() for x in [*params, *kept] if x.device == CPU]


def test_a_subclass_without_dispatch_of_its_own_is_as_good_as_a_tensor() -> None:
    optimizer, _ = two_parameters()
    set_grad(lambda g: g.as_subclass(Subclass))(optimizer)
    assert native_step()(optimizer.param_groups, optimizer.state) is True


def test_modes_that_watch_operators_see_them() -> None:
    optimizer, _ = two_parameters()
    with Watching():
        assert native_step()(optimizer.param_groups, optimizer.state) is None
    assert native_step()(optimizer.param_groups, optimizer.state) is True


def test_missing_lost_bits_are_python_s_to_make() -> None:
    optimizer, params = two_parameters(torch.bfloat16)
    assert native_step()(optimizer.param_groups, optimizer.state) is True
    del optimizer.state[params[1]]["master_bits"]
    assert native_step()(optimizer.param_groups, optimizer.state) is None
    optimizer.step()
    assert "master_bits" in optimizer.state[params[1]]


def test_inference_tensors() -> None:
    """In inference mode they can be updated, outside of it not."""
    with torch.inference_mode():
        params = [nn.Parameter(torch.ones(20), requires_grad=False)]
        optimizer = SOFIM(params, backend="cpu")
        give(params, [torch.ones(20)])
        for _ in range(2):
            optimizer.step()
        assert native_step()(optimizer.param_groups, optimizer.state) is True
        before = params[0].clone()
    assert native_step()(optimizer.param_groups, optimizer.state) is None
    with torch.inference_mode():
        assert same_bits([before], [params[0]])


@pytest.mark.parametrize(
    "change",
    [
        lambda optimizer: [optimizer.state.__setitem__(p, optimizer.state.pop(p)) for p in list(optimizer.state)[::-1]],
        lambda optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
        lambda optimizer: [known.update(exp_avg=known["exp_avg"].clone()) for known in optimizer.state.values()],
        lambda optimizer: optimizer.param_groups.reverse(),
        lambda optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]}),
        lambda optimizer: [setattr(p, "data", p.data.clone()) for p in list(optimizer.state)],
    ],
    ids=["state in another order", "state loaded", "moments replaced", "groups reversed", "a new group", "new memory"],
)
def test_nothing_stale_is_used(change: Callable[[SOFIM], object]) -> None:
    """Tensors, state and groups replaced between two steps: what counts is what is there."""
    results = []
    for backend in ("cpu", "reference"):
        params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 40, 7)]
        optimizer = SOFIM([{"params": [p]} for p in params], backend=backend)
        for step in range(6):
            if step == 3:
                change(optimizer)
            give(params, [torch.sin(torch.arange(p.numel()) + float(step)) for p in params])
            optimizer.step()
        results.append([x for p in params for x in (p.detach(), optimizer.state[p]["exp_avg"])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_thousand_tiny_tensors() -> None:
    results = []
    for backend in ("cpu", "reference"):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(1 + i % 7, generator=generator)) for i in range(1000)]
        optimizer = SOFIM(params, backend=backend, lr=0.1)
        for _ in range(4):
            give(params, [torch.randn(p.shape, generator=generator) for p in params])
            optimizer.step()
        results.append([p.detach() for p in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


def test_gradients_may_go_while_a_large_step_runs() -> None:
    """Over so many elements Python's lock is released: another thread may replace every gradient meanwhile."""
    params = [nn.Parameter(torch.zeros((1 << 20) + 3)) for _ in range(3)]
    optimizer = SOFIM(params, backend="cpu", lr=0.1)
    grads = [torch.full_like(p, 1e-3) for p in params]
    give(params, grads)
    optimizer.step()
    answers = in_one_call(optimizer)
    done = threading.Event()

    def replace() -> None:
        while not done.is_set():
            give(params, [g.clone() for g in grads])

    other = threading.Thread(target=replace)
    other.start()
    try:
        for _ in range(20):
            optimizer.step()
    finally:
        done.set()
        other.join()
    assert answers == [True] * 20
    assert len({p.detach().unique().item() for p in params}) == 1


def test_two_threads_may_step_at_once() -> None:
    """Whoever comes second goes through the operators: both steps are taken, in whatever order."""
    p = nn.Parameter(torch.zeros((1 << 22) + 1))
    optimizer = SOFIM([p], backend="cpu", momentum=0.0, weight_decay=0.0, lr=0.1)
    p.grad = torch.full_like(p, 1e-3)
    for _ in range(2):
        optimizer.step()
    threads = [threading.Thread(target=lambda: [optimizer.step() for _ in range(10)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bool(torch.isfinite(p).all())
    assert bool((p.detach() < 0).all())


# Determinism


def trained_states() -> dict[str, list[Tensor]]:
    """Every pass over every combination of dtypes, on values of all kinds."""
    states = {}
    for options, decay in itertools.product(OPTIONS, ("none", "l2")):
        for dtypes in ((torch.float32,), (torch.float64,), (torch.bfloat16, torch.float16), (torch.complex64,)):
            for state_dtype in (None, torch.bfloat16):
                if torch.float32 not in dtypes and torch.bfloat16 not in dtypes and state_dtype:
                    continue
                problem = mixed_problem(dtypes, decay)
                generator = torch.Generator().manual_seed(9)  # rand: randn differs between instruction sets
                extra = [nn.Parameter(torch.rand(n, generator=generator).to(dtypes[0])) for n in (1000, TILE + 2100)]
                problem.groups[0]["params"] += extra
                problem.group_of[:0] = [0, 0]
                optimizer = SOFIM(problem.groups, backend="cpu", state_dtype=state_dtype, **options)
                for _, grads in zip(range(5), problem.gradients(), strict=False):
                    give(problem.params, grads)
                    optimizer.step()
                states[f"{options} {decay} {dtypes} {state_dtype}"] = snapshot(optimizer)
    for diagonal, rho in itertools.product(("row", "factored", "element"), (None, 0.5)):
        for dtypes in ((torch.float32,), (torch.float64,), (torch.bfloat16, torch.float16)):
            problem = mixed_problem(dtypes)
            generator = torch.Generator().manual_seed(9)
            large = [nn.Parameter(torch.rand(80, n, generator=generator).to(dtypes[0])) for n in (65, 3100)]
            problem.groups[0]["params"] += large
            problem.group_of[:0] = [0, 0]
            for group in problem.groups:
                group["rho"] = rho
            options = {"diagonal": diagonal, "numerator": "nesterov", "max_grad_norm": 0.5 if rho else None}
            optimizer = SOFIM(problem.groups, backend="cpu", **options)
            give_state(optimizer)  # so that no step goes through PyTorch, which has other bits for each instruction set
            for _, grads in zip(range(3), problem.gradients(), strict=False):
                give(problem.params, grads)
                optimizer.step()
            states[f"{options} {dtypes}"] = snapshot(optimizer)
    return states


SCRIPT = """
import sys, torch
from sofim_fused import native
from tests.backends.test_native import trained_states
torch.save((native.instruction_set(), trained_states()), sys.argv[1])
"""


def with_whole_weights(state: list[Tensor]) -> list[Tensor]:
    """A snapshot with float32 weights in the place of their lower halves, which are close only if the weights are."""
    found, shown = [], torch.empty(0)
    for i, x in enumerate(state):
        if x.dtype == torch.bfloat16 and (i == 0 or state[i - 1].dtype != torch.bfloat16):
            shown = x  # a weight; a bfloat16 moment comes right after it
        found.append(joined(shown, x) if x.dtype == torch.int16 else x)
    return found


def test_instruction_sets(tmp_path: Path) -> None:
    """AVX-512 and AVX2 give the same bits. The default, which has no fused multiply-add, rounds in more places."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in native._RUNS:
        pytest.skip(f"this CPU runs {capability} alone")
    results: dict[str, dict[str, list[Tensor]]] = {}
    # PyTorch does what it is told, also on a CPU that has no such instructions.
    for name in set(native._RUNS[capability]).intersection(native.build()["instruction_sets"]):
        path = tmp_path / f"{name}.pt"
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": name, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", SCRIPT, str(path)], check=True, cwd=ROOT, env=environment)
        used, state = torch.load(path)
        assert used == name
        results[name] = state
    assert len(results) >= 2
    best = results["avx2"]
    for key, state in results.get("avx512", {}).items():
        assert same_bits(state, best[key]), key
    for key, state in results.get("default", {}).items():
        for a, b in zip(with_whole_weights(state), with_whole_weights(best[key]), strict=True):
            coarse = a.dtype in (torch.bfloat16, torch.float16) or "bfloat16" in key
            exact = {"rtol": 1e-12, "atol": 1e-13} if a.dtype == torch.float64 else {"rtol": 1e-5, "atol": 5e-6}
            torch.testing.assert_close(a, b, **({"rtol": 1e-2, "atol": 1e-3} if coarse else exact), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}], ids=["plain", "guarded"])
def test_random_bits_are_the_reference_s(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Keyed by update, ordinal and place, over several tiles; without momentum the moment is the gradient, rounded."""
    generator = torch.Generator().manual_seed(2)
    params = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (5, 3 * TILE + 37)]
    optimizer = SOFIM(params, backend="cpu", momentum=0.0, state_dtype=torch.bfloat16, lr=0.0, **options)
    for update in range(1, 4):
        grads = [torch.randn(p.shape, generator=generator) for p in params]  # 32-bit ones, of 16-bit parameters too
        give(params, grads)
        optimizer.step()
        for ordinal, (p, g) in enumerate(zip(params, grads, strict=True)):
            expected = round_stochastic(g, random_bits(g, torch.tensor(update), ordinal))
            assert torch.equal(optimizer.state[p]["exp_avg"], expected)


@pytest.mark.parametrize("value", [1.0 + 1e-3, -0.7123, 3.0e-5])
def test_rounding_has_no_bias_over_a_million_draws(value: float) -> None:
    draws = 2**20
    p = nn.Parameter(torch.zeros(draws))
    optimizer = SOFIM([p], backend="cpu", momentum=0.0, state_dtype=torch.bfloat16, lr=0.0)
    p.grad = torch.full((draws,), value)
    for _ in range(2):
        optimizer.step()
        moment = optimizer.state[p]["exp_avg"].double()
        below, above = moment.min().item(), moment.max().item()
        share = (float(p.grad[0]) - below) / (above - below)
        assert 0 < share < 1
        deviation = (moment.mean().item() - float(p.grad[0])) / (above - below)
        assert abs(deviation) < 5 * (share * (1 - share) / draws) ** 0.5 + 2.0**-17


def test_nonfinite_values_stay_where_they_are() -> None:
    """A NaN or an infinity in one element reaches the others through the sum alone: as in the reference."""
    results = []
    for backend in ("cpu", "reference"):
        params = [nn.Parameter(torch.ones(37, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
        optimizer = SOFIM(params, backend=backend, state_dtype=torch.bfloat16, fisher="parameter")
        for bad in (float("inf"), float("nan"), -float("inf")):
            give(params, [torch.full_like(p, 0.1).index_fill_(0, torch.tensor([3, 36]), bad) for p in params])
            optimizer.step()
        results.append([x for p in params for x in (p.detach(), optimizer.state[p]["exp_avg"])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6, equal_nan=True)


# Backends


def test_the_reference_takes_over_without_the_native_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._REGISTRY, "cpu", lambda device: "the native part was not built: no compiler")
    monkeypatch.setattr(backends, "_WARNED", set())
    p = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="SOFIM runs in pure PyTorch on cpu"):
        optimizer = SOFIM([p])
    assert optimizer.backends == {CPU: "reference"}
    p.grad = torch.ones(2)
    optimizer.step()
    assert isinstance(backends.choose("auto", CPU), ReferencePasses)
    with pytest.raises(RuntimeError, match=r"fused=True cannot run on cpu \(cpu: the native part was not built"):
        SOFIM([p], fused=True)
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run on cpu"):
        SOFIM([p], backend="cpu")


def test_fused_asks_for_it() -> None:
    p = nn.Parameter(torch.ones(2))
    assert SOFIM([p], fused=True).backends == {CPU: "cpu"}
    with pytest.raises(
        RuntimeError, match=r"fused=True cannot run on meta \(cpu: it runs on the CPU, not on meta; cuda: .*; triton: "
    ):
        SOFIM([nn.Parameter(torch.ones(2, device="meta"))], fused=True)


# A tensor whose elements an int32 cannot count


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """16-bit weights, gradients and moment, 12 GiB; the oracle goes over them in chunks, twice."""
    size, chunk = 2**31 + 2 * TILE + 37, 1 << 24
    bounds = [(a, min(a + chunk, size)) for a in range(0, size, chunk)]
    p = nn.Parameter(torch.empty(size, dtype=torch.bfloat16), requires_grad=False)
    p.grad = torch.empty(size, dtype=torch.bfloat16)

    def start(i: int) -> Tensor:
        a, b = bounds[i]
        return torch.randn(b - a, generator=torch.Generator().manual_seed(i)).bfloat16()

    for i, (a, b) in enumerate(bounds):
        p[a:b] = start(i)
        p.grad[a:b] = torch.randn(b - a, generator=torch.Generator().manual_seed(-1 - i)) * 1e-3
    # The first step, by the operators, makes the moment and moves nothing; the second is taken in one call.
    optimizer = SOFIM([p], backend="cpu", state_dtype=torch.bfloat16, kahan=False, lr=0.0, momentum=0.5, rho=1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 1e5
        answers = in_one_call(optimizer)
        optimizer.step()
    finally:
        torch.set_num_threads(threads)
    assert answers == [True]
    moment = optimizer.state[p]["exp_avg"]
    square = bias = 0.0
    for a, b in bounds:
        m, g = moment[a:b].double(), p.grad[a:b].double()
        square += (m * m).sum().item()
        error = m - 0.75 * g
        assert bool((error.abs() <= 1.5 * 2.0**-7 * g.abs()).all()), a  # the first rounding is halved in the second
        bias += error.sum().item()
    assert abs(bias) < 6 * (size * (2.0**-7 * 1e-3) ** 2) ** 0.5
    scale = 1e5 / 0.75 / (1 + square / 0.75**2)
    moved = 0.0
    for i, (a, b) in enumerate(bounds):
        exact = start(i).double() - scale * moment[a:b].double()
        assert bool(((p[a:b].double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all()), a
        moved = max(moved, float((p[a:b] - start(i)).abs().max()))
    assert moved > 0.1
