"""What only a GPU can show: steps that do not wait, graphs, streams, many blocks at once; on each backend for it.

Their numbers are in the matrix (tests/step/test_matrix.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sofim_fused import SOFIM
from tests.support.problems import GUARDED, OPTIONS, ready_problem, same_bits, snapshot
from tests.support.runs import GPU_BACKENDS, on_gpu

pytestmark = pytest.mark.gpu


@pytest.fixture(params=GPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on a GPU."""
    return on_gpu(request.param)


@pytest.fixture(params=[True, False], ids=["one launch", "two launches"])
def launches(request: pytest.FixtureRequest, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole steps in one launch, and in two."""
    monkeypatch.setattr(GPU_BACKENDS[backend], "SINGLE_LAUNCH", request.param)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_does_not_wait_for_the_gpu(backend: str, options: dict[str, Any]) -> None:
    optimizer, params = ready_problem(backend, [3, 5000, 1_000_003], "cuda", **options)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.param_groups[0]["lr"] *= 0.5
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_captured_step_replays(backend: str, options: dict[str, Any]) -> None:
    """100 replays with new gradients and learning rates, and eager steps of another problem between them."""
    results = []
    for captured in (True, False):
        lr = torch.full((), 0.1, device="cuda")
        optimizer, params = ready_problem(backend, [3, 5000, 70_001], "cuda", capturable=captured, **options)
        optimizer.param_groups[0]["lr"] = lr
        static = [p.grad for p in params]
        for _ in range(3):
            optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        generator = torch.Generator().manual_seed(5)
        for count in range(100):
            for grad in static:
                assert grad is not None
                grad.copy_(torch.randn(grad.shape, generator=generator))
            lr.mul_(0.99)
            graph.replay() if captured else optimizer.step()
            if captured and count == 50:
                params[0].grad = torch.zeros_like(params[0])  # an eager step with other addresses, then back
                kept = [p.detach().clone() for p in params], snapshot(optimizer)
                optimizer.step()
                params[0].grad = static[0]
                for p, value in zip(params, kept[0], strict=True):
                    p.data.copy_(value)
                rest = iter(kept[1])
                for p in params:
                    next(rest)
                    for name in sorted(optimizer.state[p]):
                        optimizer.state[p][name].copy_(next(rest))
        results.append(snapshot(optimizer))
    assert same_bits(*results)


IN_BACKWARD: list[dict[str, Any]] = [
    {"in_backward": True},
    {"in_backward": True, "numerator": "nesterov", "release_grads": True},
]


def trained(backend: str, steps: int, captured: bool = False, stream: Any = None, **options: Any) -> list[torch.Tensor]:
    """Parameters and state after some steps over new data, each one eager or a replay of one graph."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(40, 700), nn.Tanh(), nn.Linear(700, 1500), nn.Tanh(), nn.Linear(1500, 3)).cuda()
    optimizer = SOFIM(model.parameters(), lr=0.1, backend=backend, capturable=captured, **options)
    inputs, targets = torch.empty(16, 40, device="cuda"), torch.empty(16, 3, device="cuda")

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.stream(stream):
            loss = (model(inputs) - targets).square().mean()
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
        loss.backward()
        optimizer.step()

    generator = torch.Generator().manual_seed(6)
    graph = torch.cuda.CUDAGraph()
    for count in range(steps):
        for x in (inputs, targets):
            x.copy_(torch.randn(x.shape, generator=generator))
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        if captured and count == 3:
            with torch.cuda.graph(graph):
                train()
        graph.replay() if captured and count >= 3 else train()
    torch.cuda.synchronize()
    return snapshot(optimizer)


@pytest.mark.parametrize("options", [*OPTIONS, *IN_BACKWARD], ids=str)
def test_a_captured_training_step_replays(backend: str, options: dict[str, Any]) -> None:
    """Forward, backward and step, 100 times."""
    if backend == "triton" and "in_backward" in options:
        with pytest.raises(RuntimeError, match="whole steps only: leave"):
            trained(backend, 4, captured=True, **options)
        return
    eager = trained(backend, 103, **options)
    for a, b in zip(eager, trained(backend, 103, captured=True, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", IN_BACKWARD, ids=str)
def test_gradients_in_the_backward_pass(backend: str, options: dict[str, Any]) -> None:
    """The plain step's result, also where the forward pass, and so the backward pass, ran on a stream of its own."""
    plain = trained(backend, 20, **{k: v for k, v in options.items() if k == "numerator"})
    for stream in (None, torch.cuda.Stream()):
        for a, b in zip(plain, trained(backend, 20, stream=stream, **options), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", IN_BACKWARD, ids=str)
def test_a_step_after_its_backward_pass_does_not_wait(backend: str, options: dict[str, Any]) -> None:
    optimizer, params = ready_problem(backend, [3, 5000, 1_000_003], "cuda", **options)

    def train() -> None:
        loss = torch.zeros((), device="cuda")
        for p in params:
            p.grad = None
            loss = loss + p.square().sum()
        loss.backward()
        optimizer.step()

    for _ in range(3):
        train()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_released_gradients_make_room(backend: str) -> None:
    """The peak of a backward pass is lower by all gradients but the largest, and what waits for a pass."""
    peaks = []
    for release in (False, True):
        layers = [nn.Linear(2048, 2048, bias=False, device="cuda") for _ in range(12)]
        model = nn.Sequential(*layers)
        optimizer = SOFIM(model.parameters(), lr=0.1, backend=backend, in_backward=release, release_grads=release)
        for count in range(3):
            if count == 2:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            model(torch.ones(8, 2048, device="cuda")).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model, optimizer, layers
    size = 4 * 2048**2
    assert peaks[1] <= peaks[0] - 11 * size + size // 2  # the least that an allocation takes, and sums


def test_capture_without_capturable_is_refused(backend: str) -> None:
    optimizer, _ = ready_problem(backend, [3], "cuda")
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_bits_do_not_depend_on_the_run(backend: str) -> None:
    """Tiles end in another order each time."""
    results = []
    for _ in range(5):
        optimizer, _ = ready_problem(backend, [3, 5_000_000, 1_000_003] + [999] * 300, "cuda", **GUARDED)
        for _ in range(3):
            optimizer.step()
        results.append(snapshot(optimizer))
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("options", [{}, GUARDED], ids=str)
def test_more_tensors_than_a_launch_carries(backend: str, options: dict[str, Any]) -> None:
    """The arguments of a launch of the CUDA backend have room for about 500."""
    sizes = [1 + i % 37 for i in range(1100)]
    results = []
    for name in (backend, "reference"):
        optimizer, _ = ready_problem(name, sizes, "cuda", **options)
        for _ in range(3):
            optimizer.step()
        results.append(snapshot(optimizer))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_steps_follow_the_current_stream(backend: str) -> None:
    results = []
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            optimizer, _ = ready_problem(backend, [3, 500_000], "cuda")
            for _ in range(5):
                optimizer.step()
        stream.synchronize()
        results.append(snapshot(optimizer))
    assert same_bits(*results)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    n = 2**31 + 70_001
    if torch.cuda.mem_get_info()[0] < 7 * n:
        pytest.skip("needs 15 GiB of a GPU's memory")
    p = nn.Parameter(torch.zeros(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.zeros_like(p)
    p.grad[-3:] = 2.0
    optimizer = SOFIM([p], lr=1.0, momentum=0.0, state_dtype=torch.bfloat16, kahan=False, backend=backend)
    for _ in range(2):
        optimizer.step()
    assert p[:-3].abs().max().item() == 0.0
    assert torch.all(p[-3:] == p[-1])
    assert p[-1].item() == pytest.approx(-2 * 2.0 / (1 + 12.0), rel=1e-2)
