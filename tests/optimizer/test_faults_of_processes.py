"""Faults around a process: kills, damaged files, broken caches, forks and threads, and what is left in memory.

Each leaves an optimizer as it was, or is reported by name, and what comes next is right. ``--hypothesis-profile=deep``
tries many more of each kind.
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from examples import train as example
from sofim_fused import SOFIM, native
from sofim_fused.backends.triton import launch
from tests.examples.support import assert_equal, checkpoint, history
from tests.in_backward.support import backward
from tests.support.faults_training import MOMENTS
from tests.support.problems import GUARDED, OPTIONS, same_bits, snapshot
from tests.support.strategies import CHECKED

ROOT = Path(__file__).resolve().parents[2]
DEEP = settings.get_current_profile_name() == "deep"
BACKENDS = ["cpu", "reference"]


# A process that is killed


class Trainer:
    """:mod:`tests.support.faults_training`, asked for runs of three epochs."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.log = folder / "log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.faults_training", str(self.log)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, out: Path, after: float | None = None, at: tuple[str, int] | None = None) -> tuple[int, float]:
        """Go on from where a folder's checkpoint is: how it ended, and how many seconds that took."""
        argv = ["--batch-size", "32", "--epochs", "3", "--device", "cpu", "--out", str(out)]
        argv += ["--resume"] * (out / "checkpoint.pt").exists()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"argv": argv, "after": after, "at": at}) + "\n")
        self.process.stdin.flush()
        code, seconds = json.loads(self._line())
        assert code in (0, -9), self.log.read_text()
        return code, seconds

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    if not hasattr(os, "fork"):
        pytest.skip("processes cannot be forked here")
    made = Trainer(tmp_path_factory.mktemp("trainer"))
    yield made
    made.close()


class Undisturbed:
    """A run that nothing disturbed."""

    def __init__(self, trainer: Trainer, out: Path) -> None:
        code, self.seconds = trainer.run(out)
        assert code == 0
        self.checkpoint, self.history = checkpoint(out), without_times(out)

    def equals(self, out: Path) -> None:
        assert_equal(checkpoint(out), self.checkpoint)
        assert without_times(out) == self.history


def without_times(out: Path) -> Any:
    content = history(out)
    for run in content["runs"].values():
        for row in run["history"]:
            del row["seconds"], row["step_ms"]
    return content


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(trainer, tmp_path_factory.mktemp("undisturbed"))


def test_a_killed_run_goes_on_to_the_same_bits(trainer: Trainer, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """At random moments, and again when it has gone on."""
    generator = random.Random(None if DEEP else 5)
    wanted = 100 if DEEP else 4
    kills, seen, rounds = 0, set(), 0
    while kills < wanted:
        rounds += 1
        assert rounds < 10 * wanted
        out = tmp_path / str(rounds)
        for _ in range(4):
            code, _ = trainer.run(out, after=generator.uniform(0, undisturbed.seconds))
            if code == 0:
                break
            kills += 1
            path = out / "checkpoint.pt"
            runs = checkpoint(out)["runs"] if path.exists() else {}
            seen.add(tuple(run["epochs_done"] for run in runs.values()))
        assert trainer.run(out)[0] == 0
        undisturbed.equals(out)
        shutil.rmtree(out)
    CHECKED["kills of a run"] += kills
    assert len(seen) > 5 or not DEEP


@pytest.mark.parametrize("turn", [1, 2, 4] if DEEP else [2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_while_it_writes(
    moment: str, turn: int, trainer: Trainer, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Until the new checkpoint is whole, the old one is there."""
    assert trainer.run(tmp_path, at=(moment, turn))[0] == -9
    path = tmp_path / "checkpoint.pt"
    done = turn if moment == "renamed" else turn - 1
    assert path.exists() == (done > 0)
    if done:
        assert sum(run["epochs_done"] for run in checkpoint(tmp_path)["runs"].values()) == done
    assert trainer.run(tmp_path)[0] == 0
    undisturbed.equals(tmp_path)
    CHECKED["kills of a run"] += 1


# A damaged checkpoint


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the example writes it, of a network of eight weights."""
    path = tmp_path_factory.mktemp("small") / "checkpoint.pt"
    model = nn.Linear(3, 2)
    run = example.Run("sofim", model, SOFIM(model.parameters()))
    model(torch.ones(3)).sum().backward()
    run.optimizer.step()
    example.write_checkpoint(path, SETTINGS, [run])
    return path


SETTINGS, _, _ = example.parse(["--epochs", "3", "--device", "cpu"])


def read(path: Path) -> dict[str, Any] | None:
    """A checkpoint, or ``None`` if it is refused in one line."""
    try:
        return example.read_checkpoint(path, SETTINGS)
    except example.UserError as caught:
        error = str(caught)
    assert error.startswith(f"--resume: {path} is no readable checkpoint (")
    assert "\n" not in error
    return None


def test_a_checkpoint_that_was_cut_off_is_refused(small_checkpoint: Path, tmp_path: Path) -> None:
    """At any length."""
    content = small_checkpoint.read_bytes()
    assert read(small_checkpoint) is not None
    path = tmp_path / "checkpoint.pt"
    lengths = range(len(content))
    for length in lengths:
        path.write_bytes(content[:length])
        assert read(path) is None, length
    CHECKED["checkpoints cut off"] += len(lengths)


def test_a_checkpoint_with_altered_bytes_is_refused(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By some bits in the archive's directory torch.load takes a tensor for a folder, and leaves its values open."""
    content = small_checkpoint.read_bytes()
    path = tmp_path / "checkpoint.pt"
    generator = random.Random(None if DEEP else 6)

    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        assert (read(path) is None) == (damaged != content)
        CHECKED["checkpoints with altered bytes"] += 1

    for place in range(0, len(content), 1 if DEEP else 3):
        for bit in range(8) if DEEP else [generator.randrange(8)]:
            check(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
    for _ in range(5000 if DEEP else 200):
        start = generator.randrange(len(content))
        length = min(generator.randint(2, 200), len(content) - start)
        check(content[:start] + generator.randbytes(length) + content[start + length :])
    # From the command line: an altered weight, of which torch.load says nothing.
    weight = torch.load(small_checkpoint)["runs"]["sofim"]["model"]["weight"]
    place = content.index(weight.numpy().tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert not torch.equal(torch.load(path)["runs"]["sofim"]["model"]["weight"], weight)
    assert example.main(["--epochs", "3", "--device", "cpu", "--out", str(tmp_path), "--resume"]) == 2
    reason = "its digest is wrong: it was cut off or altered"
    assert capsys.readouterr().err == f"error: --resume: {path} is no readable checkpoint ({reason})\n"


# Damaged libraries, and caches that cannot be used


LIBRARIES = """
import json, os, signal, sys
import torch._dynamo, triton  # what takes longest
folder, cases = sys.argv[1], json.loads(sys.argv[2])
for name, environment in cases:
    child = os.fork()
    if child == 0:
        status = 1
        signal.alarm(60)
        try:
            os.environ.update(environment)
            sys.path.insert(0, os.path.join(folder, name))
            # What is missing there would be found where the package is installed in place.
            sys.meta_path[:] = [x for x in sys.meta_path if not getattr(x, "__module__", "").startswith("__editable__")]
            from sofim_fused import SOFIM, info
            said = list(info.lines())
            p = torch.nn.Parameter(torch.ones(3))
            p.grad = torch.ones(3)
            optimizer = SOFIM([p])
            optimizer.step()
            try:
                SOFIM([p], backend="cpu")
                refusal = None
            except RuntimeError as error:
                refusal = str(error)
            with open(os.path.join(folder, name + ".json"), "w") as file:
                json.dump([said, list(optimizer.backends.values()), p.tolist(), refusal], file)
            status = 0
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def cut(part: float) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])


# What is done to a file, and what is then said of it.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "No module named 'sofim_fused.{name}'"),
    "empty": (cut(0), "{file}: file too short"),
    "garbage": (lambda file: file.write_bytes(b"garbage" * 1000), "{file}: invalid ELF header"),
    **{f"cut at {part}": (cut(part), "{file} is cut off") for part in (0.002, 0.5, 0.9)},
}


@pytest.mark.skipif(isinstance(native.cpu(), str), reason="the native part is not there")
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other words for it")
def test_a_damaged_library_is_a_reason_to_do_without_it(tmp_path: Path) -> None:
    """The reference takes over, and a backend asked for by name says why not."""
    pytest.importorskip("triton")
    here = Path(native.__file__).parent
    used = [f"_cpu_{native.instruction_set()}", "_C"]
    cases: list[tuple[str, dict[str, str]]] = [("whole", {})]
    expected: dict[str, str] = {}
    for module in used:
        for damage, (spoil, text) in DAMAGES.items():
            name = f"{module} {damage}"
            shutil.copytree(here, tmp_path / name / "sofim_fused", ignore=shutil.ignore_patterns("__pycache__"))
            (file,) = (tmp_path / name / "sofim_fused").glob(f"{module}.*.so")
            spoil(file)
            cases.append((name, {}))
            expected[name] = text.format(name=module, file=file.name)
    shutil.copytree(here, tmp_path / "whole" / "sofim_fused", ignore=shutil.ignore_patterns("__pycache__"))
    # A backend for GPUs has no part in this, whatever its caches are.
    nowhere = tmp_path / "file"
    nowhere.touch()
    shutil.copytree(tmp_path / "whole", tmp_path / "no caches")
    places = ("TRITON_CACHE_DIR", "TRITON_HOME", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "HOME")
    cases.append(("no caches", dict.fromkeys(places, str(nowhere))))
    done = subprocess.run(
        [sys.executable, "-c", LIBRARIES, str(tmp_path), json.dumps(cases)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["0"] * len(cases), done.stderr
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name, _ in cases}
    for name in ("whole", "no caches"):
        said, backends, weights, refusal = found.pop(name)
        assert backends == ["cpu"]
        assert refusal is None
        assert f"instruction set  {native.instruction_set()} in use" in "\n".join(said)
    for name, (said, backends, values, refusal) in found.items():
        reason = f"{expected[name]}): reinstall sofim_fused"
        assert backends == ["reference"], name
        assert values == pytest.approx(weights)
        assert reason in refusal, name
        assert any(line.startswith("instruction set  not in use") for line in said)
        assert any(line.startswith("    cpu ") and reason in line for line in said), name
        assert "  * reference  ok" in said


def test_a_library_is_only_refused_if_it_is_cut_off(tmp_path: Path) -> None:
    """Whatever linkers and strippers make of one: all that PyTorch has here are whole."""
    libraries = [*Path(torch.__file__).parent.glob("lib/*.so*"), *Path(native.__file__).parent.glob("*.so")]
    for file in libraries:
        assert not native._cut_off(file), file
    file = tmp_path / "lib.so"
    for content in (b"", b"\x7fELF", b"#!/bin/sh\n", b"\xcf\xfa\xed\xfe" + bytes(100)):
        file.write_bytes(content)
        assert not native._cut_off(file)
    file.write_bytes(b"\x7fELF\x02\x01" + bytes(10))
    assert native._cut_off(file)


class Broken:
    """In a kernel's place: what Triton raises where its cache is no folder, or has other things in it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, _: tuple[int]) -> Any:
        return self

    def __call__(self, *_: Any, **__: Any) -> None:
        raise self.error


def test_triton_s_cache_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = pytest.importorskip("triton.runtime.cache")
    knobs = pytest.importorskip("triton.knobs")
    errors: list[Exception] = [json.JSONDecodeError("Expecting value", "", 0)]  # what describes a kernel was cut off
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        (tmp_path / "file").touch()
        monkeypatch.setattr(knobs.cache, "dir", str(folder))
        with pytest.raises(OSError, match="file") as caught:
            cache.get_cache_manager("00").put(b"", "kernel")
        errors.append(caught.value)
    for error in errors:
        text = f"Triton could not compile or load a kernel ({str(error)[:10]}"
        with pytest.raises(RuntimeError, match=re.escape(text) + r".*TRITON_CACHE_DIR has to be a folder") as caught:
            launch.run(Broken(error), 1, torch.zeros(1))
        assert caught.value.__cause__ is error
    with pytest.raises(RuntimeError, match=r"^out of registers$"):  # other errors speak for themselves
        launch.run(Broken(RuntimeError("out of registers")), 1, torch.zeros(1))


def test_a_cache_that_keeps_triton_from_the_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles a file of C to ask for the GPU. Another backend takes over."""

    class Driver:
        @property
        def active(self) -> Any:
            raise PermissionError(13, "Permission denied", "/cache/00")

    jit = type("JITFunction", (), {})
    modules = {
        "triton": SimpleNamespace(__version__="3.6.0", runtime=SimpleNamespace(JITFunction=jit, driver=Driver())),
        "sofim_fused.backends.triton.kernels": SimpleNamespace(first=jit()),
    }
    monkeypatch.setattr(launch.importlib, "import_module", modules.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    reason = launch.kernels_for.__wrapped__(torch.device("cuda", 0))
    assert reason == "Triton cannot use the GPU ([Errno 13] Permission denied: '/cache/00')"


# Processes and threads


WORKERS = """
import sys, torch
from torch.utils.data import DataLoader, Dataset
from sofim_fused import SOFIM

class Batches(Dataset):
    def __init__(self, backend):
        self.backend = backend
    def __len__(self):
        return 8
    def __getitem__(self, i):
        # A worker may do whatever the main process does.
        p = torch.nn.Parameter(torch.full((200_000,), float(i)))
        optimizer = SOFIM([p], backend=self.backend)
        for _ in range(2):
            p.grad = torch.linspace(0, 1, p.numel())
            optimizer.step()
        return p.detach()

def train(backend, workers):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(200_000))
    optimizer = SOFIM([w], lr=0.1, backend=backend)
    w.grad = torch.ones_like(w)
    optimizer.step()  # the threads are there before the first fork
    more = dict(multiprocessing_context="fork", prefetch_factor=1) if workers else {}
    for epoch in range(2):
        for batch in DataLoader(Batches(backend), batch_size=2, num_workers=workers, **more):
            optimizer.zero_grad()
            (w * batch).sum().backward()
            optimizer.step()
    return w.detach()

torch.set_num_threads(2)
for backend in sys.argv[1:]:
    print(torch.get_num_threads(), torch.equal(train(backend, 0), train(backend, 2)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")
def test_workers_that_are_forked_between_steps() -> None:
    """After OpenMP has started threads, which a fork does not have; no deadlock, and the same bits."""
    done = subprocess.run(
        [sys.executable, "-c", WORKERS, *BACKENDS], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split() == ["2", "True"] * len(BACKENDS), done.stderr


def trained(seed: int, backend: str, sizes: Sequence[int], before: Callable[[int], object] = int) -> list[Tensor]:
    """An optimizer's first steps over every kind of step in turn; ``before`` each of them something else happens."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for options in OPTIONS:
        params = [nn.Parameter(torch.rand(n, generator=generator)) for n in sizes]
        params += [nn.Parameter(torch.rand(n, generator=generator).bfloat16()) for n in sizes]
        optimizer = SOFIM(params, lr=0.1, backend=backend, **options)
        for step in range(3):
            before(step)
            for p in params:
                p.grad = torch.rand(p.shape, generator=generator).to(p.dtype)
            optimizer.step()
        result += snapshot(optimizer)
    return result


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads a pass takes."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_threads_takes_the_same_steps(backend: str, threads: Callable[[int], None]) -> None:
    sizes = (3, 40_000, 150_001)
    threads(1)
    expected = trained(0, backend, sizes)
    for numbers in ((2, 3, 1), (4, 1, 2)):
        assert same_bits(expected, trained(0, backend, sizes, lambda step, n=numbers: threads(n[step])))


@pytest.mark.parametrize(
    ("backend", "size"),
    [
        ("cpu", 50),
        ("cpu", (1 << 21) + 5),
        ("reference", 50),
        ("reference", 100_000),
    ],  # the C++ lets go of Python's lock
)
def test_optimizers_in_threads_of_their_own(backend: str, size: int, threads: Callable[[int], None]) -> None:
    """Each steps as if it were alone."""
    rounds = 5 if DEEP else 1
    threads(2)
    alone = [trained(seed, backend, (size,)) for seed in range(2)]
    for _ in range(rounds):
        together: dict[int, list[Tensor]] = {}
        begin = threading.Barrier(2)

        def work(seed: int, together: dict[int, Any] = together, begin: threading.Barrier = begin) -> None:
            begin.wait()
            together[seed] = trained(seed, backend, (size,))

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert all(same_bits(alone[seed], together[seed]) for seed in range(2))


# What is left of optimizers that are gone


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def made_stepped_and_dropped(params: list[nn.Parameter], backend: str, options: dict[str, Any]) -> None:
    optimizer = SOFIM(params, lr=0.1, backend=backend, **options)
    if "in_backward" not in options:
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # they hold each other
    for _ in range(2):
        backward(params, [torch.ones_like(p) for p in params])
        optimizer.step()
        optimizer.zero_grad()
    optimizer.state_dict()


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Garbage collection passes over what was there before the test: all of pytest, which takes seconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is counted as Linux does")
@pytest.mark.parametrize(
    "options",
    [{}, GUARDED, {"in_backward": True}, {"in_backward": True, "release_grads": True, "numerator": "gradient"}],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_optimizers_leave_nothing(backend: str, options: dict[str, Any]) -> None:
    count = 1000 if DEEP else 60
    params = [nn.Parameter(torch.ones(n)) for n in (4096, 64)]

    def run(times: int) -> tuple[int, int]:
        for i in range(times):
            made_stepped_and_dropped(params, backend, options)
            if i % 50 == 49:
                gc.collect()
        gc.collect()
        return resident(), len(gc.get_objects())

    memory, objects = run(25)
    grown = []
    for _ in range(5):  # allocators take some time to settle; what leaks grows each time
        more_memory, more_objects = run(count)
        CHECKED["optimizers made and dropped"] += count
        assert not any(p._post_accumulate_grad_hooks for p in params)
        assert abs(more_objects - objects) < 50
        grown.append(more_memory - memory)
        if grown[-1] < 2048 * count:  # a moment has 16 KiB
            break
        memory = more_memory
    else:
        pytest.fail(f"{count} optimizers leave bytes behind, each time: {grown}")
