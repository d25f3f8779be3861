"""The Triton backend: launches, tables and transfers; its numbers are in the matrix (tests/step/test_matrix.py).

With ``TRITON_INTERPRET=1`` kernels run on the CPU; without it, what needs no kernel is tested, and the rest on a GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM, backends, blockwise, native
from sofim_fused.backends import Decay, StepTensors, triton
from sofim_fused.backends.rounding import SEED, WEYL, mix
from sofim_fused.backends.triton import launch, pack, passes, step, workspace
from tests.support.problems import OPTIONS, give, give_state, mixed_problem, ready_problem, same_bits, snapshot
from tests.support.runs import INTERPRETED, RUNS, once

jit: Any = pytest.importorskip("triton").jit
tl: Any = pytest.importorskip("triton.language")
kernels: Any = pytest.importorskip("sofim_fused.backends.triton.kernels")
CPU = torch.device("cpu")
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1 (make interpreter)")
whole_steps = pytest.mark.skipif(
    not INTERPRETED or isinstance(native.cpu(), str),
    reason="runs with TRITON_INTERPRET=1 (make interpreter), and takes the native part",
)


made = partial(ready_problem, "triton")


BY_PASSES = {"first": 1, "fold": 1, "solve": 1, "second": 1}
KERNELS = ("first", "second", "single", "fold", "solve")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts launches, by kernel."""
    counts: Counter[str] = Counter()
    for name in ("launch_first", "launch_second", "launch_single", "launch_fold", "launch_solve"):
        counting = _counting(getattr(launch, name), counts)
        for user in (launch, passes):
            if hasattr(user, name):
                monkeypatch.setattr(user, name, counting)
    return counts


def _counting(launched: Callable[..., None], counts: Counter[str]) -> Callable[..., None]:
    def counted(kernels: Any, *args: Any, **kwargs: Any) -> None:
        spies = {which: _Counted(which, getattr(kernels, which), counts) for which in KERNELS}
        spied = SimpleNamespace(**{**vars(kernels), **spies})
        launched(spied, *args, **kwargs)

    return counted


class _Counted:
    def __init__(self, name: str, kernel: Any, counts: Counter[str]) -> None:
        self.name, self.kernel, self.counts = name, kernel, counts

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launched(*args: Any, **kwargs: Any) -> None:
            self.counts[self.name] += 1
            self.kernel[grid](*args, **kwargs)

        return launched


@whole_steps
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_is_one_launch_or_two(
    options: dict[str, Any], launches: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, _ = made([3, 5000, 1, 40, 4096] + [7] * 20, **options)
    optimizer.step()
    for single, expected in ((True, {"single": 1}), (False, {"first": 1, "second": 1})):
        monkeypatch.setattr(triton, "SINGLE_LAUNCH", single)
        launches.clear()
        optimizer.step()
        assert launches == expected


@runs_kernels
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_pass_is_one_launch(options: dict[str, Any], launches: Counter[str]) -> None:
    """The first step of a tensor, and steps that span devices, go through the passes one by one."""
    optimizer, _ = made([3, 5000, 1, 40] + [7] * 20, **options)
    optimizer._step_by_passes()
    assert launches == BY_PASSES


@whole_steps
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("fisher", ["model", "group", "parameter"])
def test_one_launch_two_launches_and_the_passes_take_the_same_step(
    fisher: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: what comes between the sweeps is the same algebra in each."""
    results = []
    for form in ("one", "two", "passes"):
        problem = mixed_problem((torch.float32, torch.bfloat16, torch.float64), "l2", layouts=RUNS[0].layouts)
        monkeypatch.setattr(triton, "SINGLE_LAUNCH", form == "one")
        optimizer = SOFIM(problem.groups, fisher=fisher, backend="triton", **options)
        if form == "passes":
            monkeypatch.setattr(optimizer, "_native_step", lambda: lambda *_: None)
        if form != "passes":
            give_state(optimizer)
        gradients = problem.gradients()
        for _ in range(4):
            give(problem.params, next(gradients))
            optimizer.step()
        results.append(snapshot(optimizer) + ([optimizer.grad_norm] if options.get("skip_nonfinite") else []))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@whole_steps
@pytest.mark.parametrize("options", [{}, {"numerator": "nesterov", "max_grad_norm": 1.0}], ids=str)
def test_moments_in_8_bits_take_one_launch_if_rows_are_aligned(
    options: dict[str, Any], launches: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, and if asked for, two, with the same bits."""
    states = []
    for single in (True, False):
        monkeypatch.setattr(triton, "SINGLE_LAUNCH", single)
        generator = torch.Generator().manual_seed(4)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((8, 592), (40, 128), (9,))]
        optimizer = SOFIM(params, lr=0.1, state_dtype=torch.float8_e4m3fn, backend="triton", **options)
        for _ in range(2):
            give(params, [torch.randn(p.shape, generator=generator) for p in params])
            launches.clear()
            optimizer.step()
        assert launches == ({"single": 1} if single else {"first": 1, "second": 1})
        states.append([x.view(torch.uint8) if x.dtype == blockwise.DTYPE else x for x in snapshot(optimizer)])
    assert same_bits(*states)
    monkeypatch.setattr(triton, "SINGLE_LAUNCH", True)
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(33, 130))})
    params.append(optimizer.param_groups[1]["params"][0])
    for _ in range(2):
        give(params, [torch.ones_like(p) for p in params])
        launches.clear()
        optimizer.step()
    assert launches == {"first": 1, "second": 1}


@runs_kernels
@pytest.mark.parametrize("single", [True, False], ids=["one launch", "two launches"])
@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_a_skipped_step_leaves_every_bit(spoiled: float, single: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "SINGLE_LAUNCH", single)
    optimizer, params = made([3, 4097, 9], skip_nonfinite=True)
    optimizer.step()
    before = snapshot(optimizer)
    assert params[1].grad is not None
    params[1].grad[4096] = spoiled
    optimizer.step()
    assert same_bits(before, snapshot(optimizer))
    assert int(optimizer.skipped_steps) == 1
    params[1].grad[4096] = 0.5
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    assert int(optimizer.state[params[0]]["step"]) == 2
    assert not same_bits(before, snapshot(optimizer))


@runs_kernels
def test_what_a_step_saw_stays() -> None:
    optimizer, params = made([5, 6], max_grad_norm=1.0)
    optimizer.step()
    optimizer.step()
    seen = optimizer.grad_norm
    assert seen is not None
    value = seen.item()
    for p in params:
        assert p.grad is not None
        p.grad *= 2
    optimizer.step()
    assert seen.item() == value
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.item() == pytest.approx(2 * value)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of elements of everything that is sent to the device."""
    sizes: list[int] = []
    send = workspace.send

    def noted(values: Tensor, to: Tensor, pinned: Tensor | None = None) -> Tensor:
        sizes.append(values.numel())
        return send(values, to, pinned)

    monkeypatch.setattr(workspace, "send", noted)
    return sizes


@whole_steps
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tables_are_sent_only_when_something_changed(options: dict[str, Any], sent: list[int]) -> None:
    optimizer, params = made([3, 5000], **options)
    optimizer.step()
    optimizer.step()
    sent.clear()
    optimizer.step()
    assert sent == []
    optimizer.param_groups[0]["lr"] *= 0.5
    optimizer.step()
    assert sent == [2 * pack.HYPERS]
    sent.clear()
    params[0].grad = params[0].grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    assert sent == [2 * pack.COLUMNS]
    if "max_grad_norm" in options:
        sent.clear()
        optimizer.param_groups[0]["max_grad_norm"] = 0.25
        optimizer.step()
        assert sent == [2 * pack.HYPERS]


@whole_steps
def test_nothing_is_allocated_once_the_tables_exist() -> None:
    optimizer, _ = made([3, 5000])
    optimizer.step()
    optimizer.step()
    taken: Any = optimizer._step_in_one_call
    used = taken._workspace
    memory = [x.data_ptr() for x in (used.rows, used.hyper, used.work, used.counters, used.tile_of)]
    optimizer.step()
    assert taken._workspace is used
    assert memory == [x.data_ptr() for x in (used.rows, used.hyper, used.work, used.counters, used.tile_of)]
    assert not used.counters[:-1].any()  # ready for the next launch


def _captures(monkeypatch: pytest.MonkeyPatch, capturing: bool) -> None:
    for user in (step, passes):
        monkeypatch.setattr(user, "capturing", lambda: capturing)


@whole_steps
def test_a_graph_has_a_workspace_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager steps after a capture write into other memory than a replay reads."""
    optimizer, params = made([3, 50], capturable=True)
    _captures(monkeypatch, True)
    with pytest.raises(RuntimeError, match="whole steps only"):  # no state yet: by the passes
        optimizer.step()
    _captures(monkeypatch, False)
    optimizer.step()
    optimizer.step()
    taken: Any = optimizer._step_in_one_call
    eager = taken._workspace
    _captures(monkeypatch, True)
    optimizer.step()
    (captured,) = taken._captured
    assert taken._workspace is eager
    for name in ("rows", "hyper", "work", "counters"):
        assert getattr(captured, name).data_ptr() != getattr(eager, name).data_ptr()
    assert captured.tile_of is eager.tile_of
    with pytest.raises(RuntimeError, match="two captures in a row"):
        optimizer.step()
    params[0].grad = None
    with pytest.raises(RuntimeError, match="take one with the same gradients present"):
        optimizer.step()
    _captures(monkeypatch, False)
    optimizer.step()


@whole_steps
def test_workspaces_made_under_modes_can_be_written_to_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's too, and the memory to copy through, which a step after a capture makes anew."""
    optimizer, _ = made([3, 50], capturable=True)
    give_state(optimizer)
    with torch.inference_mode(), torch.device("meta"):
        for capturing in (False, True, False):
            _captures(monkeypatch, capturing)
            optimizer.step()
    taken: Any = optimizer._step_in_one_call
    for used in (taken._workspace, *taken._captured):
        pinned = used._pinned
        assert {x.device.type for x in (*pinned, used._rows, used._hyper)} == {"cpu"}
        written = (used.rows, used.hyper, used.counters, used.work, used._rows, used._hyper, *pinned)
        assert not any(x.is_inference() for x in written)


@runs_kernels
def test_without_the_native_part_steps_run_by_the_passes(
    launches: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come to the same; a capture is refused with the reason, and changes nothing."""
    with_native, _ = made([3, 5000])
    monkeypatch.setattr(native, "cpu", lambda: "the native part was not built: no compiler")
    optimizer, _ = made([3, 5000], capturable=True)
    for _ in range(3):
        with_native.step()
        launches.clear()
        optimizer.step()
        assert launches == BY_PASSES
    assert same_bits(snapshot(with_native), snapshot(optimizer))
    before = snapshot(optimizer)
    _captures(monkeypatch, True)
    with pytest.raises(RuntimeError, match=r"takes the native part .*no compiler.*: build it with pip install"):
        optimizer.step()
    assert same_bits(before, snapshot(optimizer))


@runs_kernels
def test_nothing_stale_is_used() -> None:
    """Data, gradients and state that a user replaces are found again in the next step."""
    optimizer, params = made([6, 5])
    twin, others = made([6, 5])
    twin._native_step = lambda: lambda *_: None  # type: ignore[method-assign]
    for o, ps in ((optimizer, params), (twin, others)):
        for _ in range(2):
            o.step()
        ps[0].data = torch.ones(6)
        o.step()
        o.state[ps[1]]["exp_avg"] = torch.full((5,), 0.25)
        o.step()
        ps[1].grad = torch.full((5,), -1.0)
        o.step()
        o.load_state_dict(o.state_dict())
        o.step()
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b)


# Who gets it


def test_the_interpreter_is_taken_by_name_alone() -> None:
    """Not by ``auto`` and not by ``fused=True``; without the environment variable not at all."""
    p = nn.Parameter(torch.ones(2))
    assert SOFIM([p]).backends == {CPU: "cpu" if not isinstance(native.cpu(), str) else "reference"}
    assert SOFIM([p], fused=True).backends == {CPU: "cpu"} if not isinstance(native.cpu(), str) else True
    if INTERPRETED:
        assert SOFIM([p], backend="triton").backends == {CPU: "triton"}
        assert backends.choose("triton", CPU).emulated
    else:
        with pytest.raises(RuntimeError, match=r"backend='triton' cannot run on cpu .*TRITON_INTERPRET=1"):
            SOFIM([p], backend="triton")


@once  # in processes that have environments of their own
def test_the_environment_chooses_for_a_whole_process() -> None:
    """Kernels are interpreted where the variable was set before Triton was imported, and nowhere else."""
    code = (
        "import os, sys, torch\n"
        "assert 'triton' not in sys.modules\n"
        "for interpret in ('1', '0', None):\n"  # each in a process of its own, which has PyTorch already
        "    if child := os.fork():\n"
        "        assert os.waitpid(child, 0)[1] == 0\n"
        "        continue\n"
        "    os.environ.pop('TRITON_INTERPRET', None)\n"
        "    os.environ.update({} if interpret is None else {'TRITON_INTERPRET': interpret})\n"
        "    from sofim_fused.backends.triton import launch\n"
        "    found = launch.kernels_for(torch.device('cpu'))\n"
        "    from sofim_fused import SOFIM\n"
        "    p = torch.nn.Parameter(torch.ones(2))\n"
        "    seen = 'none' if isinstance(found, str) else 'interpreter' if found[1] else 'GPU'\n"
        "    print(seen, SOFIM([p]).backends, flush=True)\n"
        "    break\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["interpreter", "none", "none"]
    assert all("triton" not in line for line in lines)


@pytest.fixture
def fresh() -> Iterator[None]:
    launch.kernels_for.cache_clear()
    yield
    launch.kernels_for.cache_clear()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("version", "message"),
    [
        (ImportError("no such file\nsecond line"), r"Triton cannot be imported \(no such file\)"),
        ("2.1.0", "Triton 2.1.0 is older than 3.6"),
        ("?", r"Triton \? is older than 3.6"),
    ],
    ids=str,
)
def test_a_triton_that_does_not_fit_is_a_reason(
    version: str | Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def module(name: str) -> Any:
        if isinstance(version, Exception):
            raise version
        return SimpleNamespace(__version__=version)

    monkeypatch.setattr(launch.importlib, "import_module", module)
    reason = triton.passes_for(CPU)
    assert isinstance(reason, str)
    assert re.search(message, reason)


@pytest.mark.usefixtures("fresh")
def test_other_devices_are_refused_with_a_reason() -> None:
    assert "not on meta" in str(triton.passes_for(torch.device("meta")))
    if not torch.cuda.is_available():
        assert triton.passes_for(torch.device("cuda", 0)) == "PyTorch finds no GPU"


@jit
def hashed(row, out, begin, update, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, 256)
    tl.store(out + offsets, kernels._hashed(row, update, tl.load(begin), offsets, kind).to(tl.int64))


@runs_kernels
@pytest.mark.parametrize("begin", [0, 2**32 - 130, 2**32 - 128, 5 * 2**32 - 1, 2**34 + 3])
def test_random_bits_of_tiles_that_begin_anywhere(begin: int) -> None:
    """Tiles of codes with short blocks may go across a multiple of 2**32, where the key of the random bits changes."""
    row = torch.zeros(pack.COLUMNS, dtype=torch.int64)
    row[pack.ORDINAL] = 3
    out = torch.empty(256, dtype=torch.int64)
    hashed[(1,)](row, out, torch.tensor(begin), 7, kind=pack.CODES | pack.RAGGED)
    index = torch.arange(256) + begin
    key = mix(mix(torch.tensor(SEED + 3 * WEYL & 0xFFFFFFFF)) ^ 7)
    expected = mix((mix(key ^ (index >> 32)) + (index & 0xFFFFFFFF) * WEYL) & 0xFFFFFFFF)
    assert torch.equal(out, expected)


@runs_kernels
def test_a_part_without_elements_of_a_moment_in_8_bits() -> None:
    """As a rank has it that holds none of a parameter's rows: beside one that has some."""
    passes_ = passes.passes_for(CPU)
    assert not isinstance(passes_, str)
    shapes = ((0, 300), (2, 300), (0, 256))
    codes = [torch.zeros(shape).to(torch.float8_e4m3fn) for shape in shapes]
    scales = [torch.zeros(blockwise.scale_shape(shape)) for shape in shapes]
    weights, grads = [torch.ones(shape) for shape in shapes], [torch.ones(shape) for shape in shapes]
    steps = [torch.zeros((), dtype=torch.int64) for _ in shapes]
    tensors = StepTensors(CPU, weights, grads, codes, [None] * 3, steps, [0, 1, 2], exp_avg_scales=[*scales])
    sums = passes_.accumulate(tensors, Decay([0.5] * 3, [0.5] * 3, None, False))
    assert sums.mm.tolist() == [0, 150, 0]
    assert torch.equal(blockwise.decode(codes[1], scales[1]), torch.full((2, 300), 0.5))
