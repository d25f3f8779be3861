"""The convergence benchmark: its contenders, its training, its bookkeeping, its tables and its command line."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

from bench import documents
from bench.convergence import __main__ as command
from bench.convergence import compare, regime, sensitivity
from bench.convergence import store as store_module
from bench.convergence.contenders import (
    CONFIGURATIONS,
    CONTENDERS,
    LINEUPS,
    PERIOD,
    gradients_by,
    layers,
    memory,
    scaled,
)
from bench.convergence.pool import run_missing
from bench.convergence.store import Store
from bench.convergence.tasks import CONTEXT, LETTERS, TASKS, Data, Size, Split, Targets, docstrings
from bench.convergence.training import Job, Outcome, Point, hessian_cost, loss_of, prepare, train
from bench.networks import CharacterTransformer
from examples.train import batch_order
from tests.examples.support import write_cifar10, write_cifar100, write_svhn

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "bench" / "results" / "convergence"
QUIET = Console(quiet=True)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


# Contenders


def test_all_are_tuned_with_as_many_configurations() -> None:
    for contender in CONTENDERS.values():
        distinct = {json.dumps(settings, sort_keys=True) for settings in contender.grid}
        assert len(distinct) == CONFIGURATIONS, contender.name
        assert all(settings.keys() == contender.grid[0].keys() for settings in contender.grid)


@pytest.mark.parametrize("name", CONTENDERS)
def test_each_contender_trains(name: str) -> None:
    contender = CONTENDERS[name]
    outcome = train(Job("tabular-mlp", name, contender.grid[5], 0, "test", 4, None, 16))
    assert not outcome.diverged
    assert outcome.points[-1].train_loss < outcome.points[0].train_loss
    assert outcome.steps == 4 * math.ceil(298 / 16)
    assert outcome.parameters == 30 * 32 + 32 + 32 * 32 + 32 + 32 * 2 + 2


def test_settings_arrive() -> None:
    """Each configuration makes another optimizer: none of its settings is lost on the way."""
    for contender in CONTENDERS.values():
        model = nn.Linear(2, 2)
        made = [contender.build(model, settings) for settings in contender.grid]
        hyperparameters = [
            {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
            | {"lr": optimizer.param_groups[0]["lr"]}
            for optimizer in made
        ]
        assert len({repr(sorted(h.items())) for h in hyperparameters}) == CONFIGURATIONS, contender.name


def test_sofim_has_a_group_per_layer() -> None:
    model = TASKS["digits-lenet5"].model(TASKS["digits-lenet5"].data(None, None))
    groups = layers(model)
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [
        [(6, 1, 5, 5), (6,)],
        [(16, 6, 5, 5), (16,)],
        [(120, 400), (120,)],
        [(84, 120), (84,)],
        [(10, 84), (10,)],
    ]
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(p.numel() for p in model.parameters())
    kinds = {name: CONTENDERS[name].build(model, CONTENDERS[name].grid[0]) for name in CONTENDERS if "sofim" in name}
    assert {
        name: tuple(o.defaults[key] for key in ("diagonal", "numerator", "fisher")) for name, o in kinds.items()
    } == {
        "sofim": ("identity", "moment", "model"),
        "sofim-group": ("identity", "moment", "group"),
        "sofim-parameter": ("identity", "moment", "parameter"),
        "sofim-gradient": ("identity", "gradient", "model"),
        "sofim-gradient-group": ("identity", "gradient", "group"),
        "sofim-gradient-parameter": ("identity", "gradient", "parameter"),
        "sofim-tensor": ("tensor", "nesterov", "model"),
        "sofim-row": ("row", "nesterov", "model"),
        "sofim-row-moment": ("row", "moment", "model"),
        "sofim-factored": ("factored", "nesterov", "model"),
        "sofim-factored-moment": ("factored", "moment", "model"),
        "sofim-element": ("element", "nesterov", "model"),
        "sofim-element-moment": ("element", "moment", "model"),
        "sofim-factored-rho": ("factored", "nesterov", "model"),
    }
    assert {name for name, o in kinds.items() if o.defaults["rho"] is None} == {
        name for name in kinds if name.startswith(("sofim-tensor", "sofim-row", "sofim-factored", "sofim-element"))
    } - {"sofim-factored-rho"}


def test_those_of_adams_kind_have_the_same_rates() -> None:
    """Adafactor's are relative to the size of the weights; with ρ there are two more values of it, and fewer rates."""
    adam = {name: c for name, c in CONTENDERS.items() if c.rates == "adam"}
    same = {name for name, c in adam.items() if c.grid == CONTENDERS["adamw-beta2"].grid}
    assert set(adam) - same == {"adamw", "sofim-factored-rho", "adafactor"}
    assert {settings["beta2"] for settings in CONTENDERS["nadam"].grid} == {0.99, 0.999}
    rates = [sorted({settings["lr"] for settings in CONTENDERS[name].grid}) for name in ("adamw", "adamw-beta2")]
    assert rates[0] == rates[1]
    assert CONTENDERS["sgd"].grid == CONTENDERS["sgd-nesterov"].grid
    for name in same:
        defaults = CONTENDERS[name].build(nn.Linear(2, 2), {"lr": 1e-3, "beta2": 0.99}).param_groups[0]
        assert defaults["weight_decay"] == 0.01
        assert defaults.get("decoupled_weight_decay", True)


def test_line_ups() -> None:
    """Contenders that exist, each with rates that the tasks can scale, and seeds that no other line-up has."""
    seeds: list[int] = []
    for name, lineup in LINEUPS.items():
        assert lineup.name == name
        assert lineup.baseline in lineup.contenders
        assert set(lineup.contenders) <= set(CONTENDERS)
        assert len(set(lineup.contenders)) == len(lineup.contenders)
        (plan,) = compare.plans(["tabular-mlp"], False, None, "cpu", name)
        seeds += plan.comparing
        if lineup.shares:
            assert set(lineup.contenders) <= set(LINEUPS[lineup.shares].contenders)
    assert len(set(seeds)) == len(seeds)
    of = {name: compare.plans(["tabular-mlp"], False, None, "cpu", name)[0].comparing for name in LINEUPS}
    assert of == {"adaptive": range(10, 15), "confirmation": range(30, 50), "published": range(5)}
    assert compare.plans(["tabular-mlp"], False, 2, "cpu", "confirmation")[0].comparing == range(30, 32)
    known = {contender.rates for contender in CONTENDERS.values()}
    assert "" not in known
    assert {key for task in TASKS.values() for key in task.factors} <= known
    twice = scaled(CONTENDERS["nadam"], {"adam": 2}).grid
    assert [settings["lr"] for settings in twice] == [2 * settings["lr"] for settings in CONTENDERS["nadam"].grid]


def test_edges_of_a_grid() -> None:
    sofim, sgd = CONTENDERS["sofim"], CONTENDERS["sgd"]
    assert sofim.edges({"lr/rho": 0.1, "rho": 1.0}) == ["lr/rho"]
    assert sofim.edges({"lr/rho": 0.25, "rho": 10.0}) == ["rho"]
    assert sofim.edges({"lr/rho": 0.6, "rho": 1.0}) == []
    assert sgd.edges({"lr": 0.16, "momentum": 0.95}) == ["lr"]  # of two momenta each would be at an edge


def test_memory_counts_each_tensor_once() -> None:
    model = nn.Linear(100, 10, bias=False)
    floats_of = {
        "sgd": 1000,
        "adamw": 2001,
        "sofim": 1002,
        "sofim-factored": 1112,
        "sofim-factored-rho": 1112,
        "sofim-tensor": 1003,
        "sofim-row": 1012,
        "sofim-element": 2002,
        "sgd-nesterov": 1000,
        "adamw-beta2": 2001,
        "nadam": 2002,
        "adafactor": 111,
        "adahessian": 3000,
        "nystrom": 10_000,
    }
    for name, floats in floats_of.items():
        contender = CONTENDERS[name]
        optimizer = contender.build(model, contender.grid[0])
        assert memory(optimizer) == 0
        for _ in range(2):
            optimizer.zero_grad()
            gradients_by(contender, optimizer, model(torch.randn(4, 100)).square().sum(), list(model.parameters()))
            optimizer.step()
        # Counts of steps are one number each. Of a linear layer's Hessian ten columns span what they can.
        assert memory(optimizer) == 4 * floats if name != "nystrom" else 0 < memory(optimizer) <= 4 * floats


# Training


def outcome_of(losses: list[float], accuracies: list[float] | None = None, diverged: bool = False) -> Outcome:
    accuracies = accuracies or [0.5] * len(losses)
    points = [Point(loss + 1, loss, a, 10.0 * i, float(i)) for i, (loss, a) in enumerate(zip(losses, accuracies), 1)]  # noqa: B905
    return Outcome(points, diverged, 0, 1, 1, 1, 0, 0.0)


def job(name: str = "sofim", **changes: Any) -> Job:
    made = Job("digits-lenet5", name, CONTENDERS[name].grid[0], 3, "validation", 2, 96, 32)
    return replace(made, **changes)


@pytest.mark.parametrize("name", ["sofim", "lbfgs", "adahessian", "nystrom"])
def test_the_same_job_has_the_same_losses(name: str) -> None:
    first, second = (train(job(name)) for _ in range(2))
    assert [point[:4] for point in first.points] == [point[:4] for point in second.points]
    other = train(job(name, seed=4))
    assert [point[:4] for point in first.points] != [point[:4] for point in other.points]


def test_optimizers_start_alike_and_see_the_same_batches() -> None:
    """At a learning rate of zero all have the same losses."""
    zero = {"sofim": {"lr/rho": 0.0, "rho": 1.0}, "sgd": {"lr": 0.0, "momentum": 0.9}}
    first, second = (train(job(name, settings=settings)) for name, settings in zero.items())
    assert [point[:3] for point in first.points] == [point[:3] for point in second.points]


def test_a_job_is_known_by_all_of_it() -> None:
    made = job()
    others = [
        replace(made, task="tabular-mlp"),
        replace(made, contender="sgd"),
        replace(made, settings={**made.settings, "rho": 7.0}),
        replace(made, seed=0),
        replace(made, held_out="test"),
        replace(made, epochs=1),
        replace(made, examples=None),
        replace(made, batch_size=16),
        replace(made, device="cuda"),
    ]
    assert len({made.key, *(other.key for other in others)}) == 10
    assert replace(made, settings=dict(reversed(made.settings.items()))).key == made.key


def test_training_loss_is_the_mean_over_examples() -> None:
    """Also where the last batch is smaller."""
    outcome = train(job("sgd", settings={"lr": 0.0, "momentum": 0.9}, examples=80, epochs=1))
    data = TASKS["digits-lenet5"].data(None, 80)
    torch.manual_seed(3)
    model = TASKS["digits-lenet5"].model(data)
    assert outcome.points[0].train_loss == pytest.approx(loss_of(model, data.train).item(), rel=1e-5)
    assert outcome.points[0].loss == pytest.approx(loss_of(model, data.validation).item(), rel=1e-5)
    assert outcome.steps == outcome.gradients == 3


def test_held_out_examples_are_three_sets() -> None:
    for name in ("digits-lenet5", "tabular-mlp"):
        data = TASKS[name].data(None, None)
        rows = [{tuple(x.flatten().tolist()) for x in part.inputs} for part in data[:3]]
        assert not rows[0] & rows[1] | rows[0] & rows[2] | rows[1] & rows[2]
    lost = train(job(held_out="test")).points[-1]
    assert lost.loss != train(job(held_out="validation")).points[-1].loss


def test_divergence_ends_a_run() -> None:
    outcome = train(job("sgd", settings={"lr": 1e6, "momentum": 0.9}, epochs=5))
    assert outcome.diverged
    assert len(outcome.points) < 5
    json.dumps(outcome._asdict(), allow_nan=False)


def test_cost_counts_hessian_vector_products() -> None:
    steps = 12
    outcomes = {
        name: train(job(name, examples=steps * 8, batch_size=8, epochs=2))
        for name in ("sgd", "adahessian", "nystrom", "lbfgs")
    }
    assert outcomes["sgd"].cost == 2 * steps
    assert outcomes["adahessian"].hessian_products == 2 * steps
    price = outcomes["adahessian"].hessian_cost
    assert outcomes["adahessian"].cost == pytest.approx(2 * steps * (1 + price))
    assert outcomes["nystrom"].hessian_products == 10 * math.ceil(2 * steps / PERIOD)
    assert outcomes["adahessian"].points[0].cost == pytest.approx(steps * (1 + price), rel=1e-5)
    searching = CONTENDERS["lbfgs"].grid[-1]
    assert searching["line_search"] == "strong_wolfe"
    outcome = train(job("lbfgs", settings=searching, examples=96, epochs=1))
    assert outcome.gradients > outcome.steps


def test_the_price_of_a_hessian_vector_product() -> None:
    """One linear layer: a forward pass and a gradient for its weight are two products of matrices; H v is two more.

    (Its input needs no gradient. H v: the logits' change along v, then the weight's gradient for that of the logits'.)
    """
    model = nn.Linear(7, 5, bias=False)
    assert hessian_cost(model, Split(torch.randn(11, 7), torch.randint(0, 5, (11,)))) == 1.0


def test_the_loss_of_the_transformer_is_causal() -> None:
    torch.manual_seed(0)
    model = CharacterTransformer(20, context=9)
    tokens = torch.randint(0, 20, (2, 9))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 20
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(-1).any()


def test_text_is_read_in_one_order(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text('"""Second."""\ndef f():\n    "third, with ü"\n')
    (tmp_path / "a.py").write_text('class A:\n    """First.\n\n    More of it.\n    """\n')
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text('"""Left out."""')
    assert docstrings(tmp_path) == ["First.\n\nMore of it.", "Second.", "third, with ü"]
    (tmp_path / "long.py").write_text(f'"""{"abc " * 1000}"""')
    data = TASKS["text-transformer"].load(tmp_path)
    assert data.train.inputs.shape[1] == CONTEXT
    assert torch.equal(data.train.inputs[:, 1:], data.train.targets[:, :-1])
    assert int(data.train.inputs.max()) < data.classes == 97


@pytest.mark.parametrize(
    ("name", "write", "channels", "classes"),
    [("cifar10", write_cifar10, 3, 10), ("cifar100", write_cifar100, 3, 100), ("svhn", write_svhn, 3, 10)],
)
def test_data_sets_that_are_not_here_take_the_same_way(
    name: str, write: Any, channels: int, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.convergence import tasks

    write(tmp_path)
    # So few images cannot be split by class.
    monkeypatch.setattr(
        tasks,
        "_held_out",
        lambda inputs, targets, _: (Split(inputs[:-1], targets[:-1]), Split(inputs[-1:], targets[-1:])),
    )
    for network, batch in (("lenet5", 2), ("resnet9", 3)):
        tasks._loaded.cache_clear()
        run = Job(f"{name}-{network}", "sofim", CONTENDERS["sofim"].grid[0], 0, "test", 1, None, batch)
        outcome = train(run, tmp_path)
        data = TASKS[run.task].data(tmp_path, None)
        assert (data.train.inputs.shape[1:], data.classes) == ((channels, 32, 32), classes)
        assert len(outcome.points) == 1
    tasks._loaded.cache_clear()


def write_texts(folder: Path) -> None:
    """Texts of one's own, in the place of the plays."""
    folder.mkdir(exist_ok=True)
    for part, letter in (("train", "x"), ("validation", "y"), ("test", "z")):
        words = " ".join(f"{letter}{number * 7919 % 1000}" for number in range(3000))
        (folder / f"{part}.txt").write_text(words)


def test_plays_are_read_as_windows_of_letters(tmp_path: Path) -> None:
    write_texts(tmp_path)
    for name, width in (("plays-transformer", 96), ("plays-transformer-30m", 256)):
        data = TASKS[name].load(tmp_path)
        for part, letter in zip(data[:3], "xyz", strict=True):
            assert part.inputs.shape[1] == width
            assert torch.equal(part.inputs[:, 1:], part.targets[:, :-1])
            seen = {LETTERS[code] for code in part.inputs.flatten().tolist()}
            assert seen == set(f"{letter} 0123456789")
    (tmp_path / "test.txt").write_bytes(b"short \xff")
    with pytest.raises(ValueError, match="a part of the text has 7 bytes: expected 97 at least"):
        TASKS["plays-transformer"].load(tmp_path)
    (tmp_path / "test.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"test\.txt is empty"):
        TASKS["plays-transformer"].load(tmp_path)
    (tmp_path / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match="fetch"):
        TASKS["plays-transformer"].load(tmp_path)


def test_plays_are_as_large_as_they_are_called() -> None:
    empty = Split(torch.empty(0), torch.empty(0))
    data = Data(empty, empty, empty, 97)
    for name, millions in (("plays-transformer", 0.36), ("plays-transformer-30m", 32.2)):
        with torch.device("meta"):
            model = TASKS[name].model(data)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e6 * millions, rel=0.02)


def test_fresh_examples_are_seen_once_before_any_is_seen_again(tmp_path: Path) -> None:
    write_texts(tmp_path)
    run = Job("plays-transformer", "sgd", {"lr": 0.1, "momentum": 0.9}, 3, "validation", 2, 50, 16)
    training, data = prepare(run, tmp_path)
    count = len(data.train.targets)
    assert 100 < count < 200
    whole = count // 50
    epochs = [training.order(epoch, count).tolist() for epoch in range(1, 2 * whole + 1)]
    assert {len(order) for order in epochs} == {50}
    for turn in (epochs[:whole], epochs[whole:]):
        assert len({index for order in turn for index in order}) == 50 * whole
    assert epochs[0] != epochs[whole]
    assert epochs[0] != prepare(replace(run, seed=4), tmp_path)[0].order(1, count).tolist()
    outcome = training.outcome(data)
    assert outcome.steps == 2 * math.ceil(50 / 16)
    assert outcome.points[1].loss < outcome.points[0].loss
    with pytest.raises(ValueError, match="examples of"):
        prepare(replace(run, examples=count + 1), tmp_path)


def test_more_examples_than_there_are() -> None:
    with pytest.raises(ValueError, match="tabular-mlp: 1000 training examples of 298 asked for"):
        train(Job("tabular-mlp", "sgd", CONTENDERS["sgd"].grid[0], 0, "test", 1, 1000, 16))


# Results that stay


def test_a_store_keeps_what_was_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results" / "a.jsonl"
    store = Store(path)
    assert len(store) == 0
    store.add("one", {"x": [1, 2.5]})
    store.add("two", None)
    store.close()
    again = Store(path)
    assert list(again) == ["one", "two"]
    assert again["one"] == {"x": [1, 2.5]}
    assert "three" not in again
    with pytest.raises(ValueError, match="there is a result for one already"):
        again.add("one", 3)
    again.add("three", 3)
    again.close()
    assert [machine["torch"] for machine in Store(path).machines] == [torch.__version__]
    monkeypatch.setattr(store_module, "_machine", lambda: {"cpu": "another"})
    again.add("four", 4)
    again.close()
    last = Store(path)
    assert list(last) == ["one", "two", "three", "four"]
    assert [machine["cpu"] == "another" for machine in last.machines] == [False, True]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_store_tells_how_many_threads_there_were(threads: int, tmp_path: Path) -> None:
    """Runs of a pool have one each, whatever PyTorch has here; others have what it has."""
    store, pooled = Store(tmp_path / "a.jsonl"), Store(tmp_path / "b.jsonl")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        store.add("one", 1)
        run_missing({"one": "1"}, int, pooled, 1, "title", QUIET)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
        store.close()
    assert [machine["threads"] for machine in (*store.machines, *pooled.machines)] == [threads, 1]


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    store = Store(path)
    store.add("one", 1)
    store.close()
    whole = path.read_bytes()
    for cut in range(1, 20):
        path.write_bytes(whole + b'{"key":"two","result":2}\n'[:cut])
        torn = Store(path)
        assert list(torn) == ["one"]
        torn.add("two", 3)
        torn.close()
        assert {key: Store(path)[key] for key in Store(path)} == {"one": 1, "two": 3}


def test_a_broken_line_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for line in ("nonsense", "[1]", '{"key": "a"}', "null"):
        path.write_text('{"key":"a","result":1}\n' + line + "\n")
        with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not a record of results"):
            Store(path)


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is run twice, and the results are those of a run that was left alone."""
    arguments = ["compare", "--task", "tabular-mlp", "--seeds", "1", "--lineup", "published"]
    arguments += ["--contenders", "sofim,sgd"]
    known = 5  # results of 26 when the command is killed
    script = (
        "import os, signal, sys\nfrom bench.convergence import __main__ as command, store, tasks\n"
        "from dataclasses import replace\n"
        "add = store.Store.add\n"
        "def add_and_die(self, *result):\n"
        "    add(self, *result)\n"
        f"    if len(self) == {known}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ == '__main__':\n"
        "    store.Store.add = add_and_die\n"
        "    task = tasks.TASKS['tabular-mlp']\n"
        "    tasks.TASKS['tabular-mlp'] = replace(task, small=tasks.Size(5, 100), tuning_seeds=1)\n"
        "    sys.exit(command.main(sys.argv[1:]))\n"
    )
    program = tmp_path / "program.py"
    program.write_text(script)

    killed = subprocess.Popen(
        [sys.executable, str(program), *arguments, "--jobs", "2", "--out", str(tmp_path / "a")],
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    path = tmp_path / "a" / "tabular-mlp.jsonl"
    deadline = time.monotonic() + 120
    assert killed.wait(120) == -signal.SIGKILL
    while True:  # its workers leave by themselves
        assert time.monotonic() < deadline
        try:
            os.killpg(killed.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    written = path.read_bytes()
    assert len(Store(path)) == known
    assert [machine["threads"] for machine in Store(path).machines] == [1]  # of each process

    # The same here, without the time that processes take to start.
    monkeypatch.setitem(TASKS, "tabular-mlp", replace(TASKS["tabular-mlp"], small=Size(5, 100), tuning_seeds=1))
    for out in ("a", "b"):
        assert command.main([*arguments, "--jobs", "1", "--out", str(tmp_path / out)]) == 0
    resumed, whole = Store(path), Store(tmp_path / "b" / "tabular-mlp.jsonl")
    assert path.read_bytes().startswith(written[: written.rindex(b"\n") + 1])
    assert len(whole) == 2 * CONFIGURATIONS + 2
    assert set(resumed) == set(whole)
    for key in whole:
        assert [p[:4] for p in resumed[key]["points"]] == [p[:4] for p in whole[key]["points"]]
    document = (tmp_path / "b" / "tabular-mlp.md").read_text()
    assert "| SGD-momentum |" in document
    assert "Not in the tables, because their runs are not complete: SOFIM, per layer; SOFIM, per tensor;" in document
    assert (tmp_path / "b" / "tabular-mlp.png").read_bytes().startswith(b"\x89PNG")


def test_a_confirmation_takes_the_choice_that_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs other seeds with the same settings, and its results lie in the same file."""
    task = replace(TASKS["tabular-mlp"], small=Size(1, 64), tuning_seeds=1)
    monkeypatch.setitem(TASKS, "tabular-mlp", task)
    arguments = ["compare", "--task", "tabular-mlp", "--jobs", "1", "--out", str(tmp_path)]
    chosen = ["--contenders", "adamw-beta2,sofim-factored"]
    assert command.main([*arguments, *chosen, "--seeds", "1"]) == 0
    store = Store(tmp_path / "adaptive-tabular-mlp.jsonl")
    assert len(store) == 2 * CONFIGURATIONS + 2
    assert command.main([*arguments, "--lineup", "confirmation", "--seeds", "2"]) == 0
    added = set(Store(store.path)) - set(store)
    jobs = [json.loads(key) for key in added]
    assert sorted(job["seed"] for job in jobs) == [30, 30, 31, 31]
    known = {json.dumps(job["settings"]) for job in map(json.loads, store) if job["held_out"] == "test"}
    assert {json.dumps(job["settings"]) for job in jobs} == known
    assert {path.name for path in tmp_path.glob("*.md")} == {
        "adaptive-tabular-mlp.md",
        "confirmation-tabular-mlp.md",
    }
    assert "then 2 other seeds" in (tmp_path / "confirmation-tabular-mlp.md").read_text()


def test_a_failure_is_reported_and_what_was_done_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="invalid literal"):
        run_missing({"a": "1", "b": "x", "c": "3"}, int, store, 1, "title", QUIET)
    assert store["a"] == 1
    assert "b" not in store


# Choosing and comparing


def fill(store: Store, plan: compare.Plan, loss: Any) -> None:
    for contender in plan.contenders:
        for number, settings in enumerate(contender.grid):
            for run in plan.tuning(contender, settings):
                store.add(run.key, loss(contender.name, number, run.seed)._asdict())


def plan_of(**changes: Any) -> compare.Plan:
    task = replace(TASKS["digits-lenet5"], targets=Targets(1.5, 0.5, 0.9), tuning_seeds=2)
    return compare.Plan(task, Size(3, 96), 3, "cpu")._replace(**changes)


def test_the_lowest_validation_loss_is_chosen(tmp_path: Path) -> None:
    """In the mean over seeds, of any epoch; not of runs that diverged."""
    plan, store = plan_of(), Store(tmp_path / "a.jsonl")

    def loss(name: str, number: int, seed: int) -> Outcome:
        if number == 2:
            return outcome_of([0.1], diverged=seed == 1001)
        if number == 4:
            return outcome_of([0.5, 0.2 if seed == 1000 else 0.6, 0.9])
        if number == 7:
            return outcome_of([0.3, 0.8])
        return outcome_of([0.45, 0.44])

    fill(store, plan, loss)
    for contender in plan.contenders:
        settings, value = compare.choice(plan, contender, store)
        assert settings == contender.grid[7]
        assert value == 0.3


def test_what_is_not_complete_is_left_out_and_named(tmp_path: Path) -> None:
    plan, store = plan_of(lineup=LINEUPS["adaptive"], only=("adamw-beta2", "nadam", "sgd")), Store(tmp_path / "a.jsonl")
    assert [c.name for c in plan.contenders] == ["adamw-beta2", "sgd", "nadam"]
    fill(store, plan, lambda *_: outcome_of([0.5]))
    adamw, sgd, nadam = plan.contenders
    for contender, seeds in ((adamw, (10, 11, 12)), (sgd, (10, 11)), (nadam, (0, 1, 2))):
        for seed in seeds:
            store.add(plan.job(contender, contender.grid[0], seed).key, outcome_of([0.4])._asdict())
    result = compare.comparison(plan, store)
    assert [entry.contender for entry in result.entries] == [adamw]
    assert result.baseline is result.entries[0]
    assert list(result.missing) == [sgd, nadam]
    text = compare.markdown(result, "a machine", "a command")
    assert "Not in the tables, because their runs are not complete: SGD-momentum; NAdam." in text
    # Nothing there is about time, because other programs used the machine.
    assert "minus AdamW's" in text
    assert "seconds per epoch" not in text
    assert " 1.0 / 10 |" in text
    assert compare.comparison(plan._replace(seeds=4), store).baseline is None


def test_seeds_of_tuning_and_of_comparing_are_others() -> None:
    plan = plan_of(seeds=500)
    contender = CONTENDERS["sofim"]
    tuning = {run.seed for run in plan.tuning(contender, contender.grid[0])}
    assert not tuning & set(plan.comparing)
    assert {run.held_out for run in plan.tuning(contender, contender.grid[0])} == {"validation"}
    assert plan.job(contender, contender.grid[0], 0).held_out == "test"


def test_when_a_target_is_reached() -> None:
    outcome = outcome_of([0.9, 0.5, 0.2, 0.6])
    assert compare.reached(outcome, lambda point: point.loss <= 0.5) == (2, 20.0, 2.0)
    assert compare.reached(outcome, lambda point: point.loss <= 0.1) is None


def test_tables_of_a_comparison() -> None:
    plan = plan_of()
    contender = CONTENDERS["sofim"]
    ours = [
        outcome_of([0.6, 0.4], [0.8, 0.95]),
        outcome_of([0.6, 0.3], [0.9, 0.85]),
        outcome_of([0.6, 0.5], [0.8, 0.7]),
    ]
    theirs = [outcome_of([0.5]), outcome_of([0.5]), outcome_of([0.5])]
    broken = [outcome_of([0.5]), outcome_of([], diverged=True), outcome_of([0.5])]
    result = compare.Comparison(
        plan,
        [
            compare.Entry(contender, {"lr/rho": 0.1, "rho": 1.0}, 0.25, ours),
            compare.Entry(CONTENDERS["sgd"], {"lr": 0.02, "momentum": 0.95}, 0.5, theirs),
            compare.Entry(CONTENDERS["adamw"], {"lr": 1e-3, "weight_decay": 0.0}, math.inf, broken),
        ],
    )
    lines = compare.ends(result).splitlines()
    # 2.5 % quantile of t with 2 degrees of freedom: 4.303; differences -0.1, -0.2, 0: -0.1 ± 4.303 · 0.1 / √3
    assert lines[2] == (
        "| SOFIM | lr/rho 0.1\\*, rho 1 | 0.250 | 1.400 ± 0.100 | 0.400 ± 0.100 | -0.100 [-0.348, +0.148] |"
        " 85.00 ± 13.23 | 83.33 ± 12.58 |".replace("85.00 ± 13.23", "88.33 ± 7.64")
    )
    assert lines[3].startswith("| SGD-momentum | lr 0.02, momentum 0.95 | 0.500 | 1.500 ± 0.000 | 0.500 ± 0.000 |  |")
    assert "| none finite | diverged: 1 of 3 |" in lines[4]
    speeds = compare.speeds(result).splitlines()
    assert "| training loss ≤ 1.5 | test loss ≤ 0.5 | test accuracy ≥ 90 % |" in speeds[0]
    assert speeds[2].endswith("| 2.0 / 20 / 2.0 | 2.0 / 20 / 2.0 | 1.5 / 15 / 1.5 (2 of 3) |")
    assert speeds[3].endswith("| 1.0 / 10 / 1.0 | 1.0 / 10 / 1.0 | – |")


def test_the_summary_is_beside_sgd() -> None:
    sgd = [outcome_of([0.5, 0.4]), outcome_of([0.5, 0.6])]
    published = LINEUPS["published"].contenders
    others = {
        "sofim": [outcome_of([0.3, 0.4]), outcome_of([0.3, 0.2])],  # -0.1, -0.3
        "adamw": [outcome_of([0.501]), outcome_of([0.601])],  # 0.101, 0.101
        "lbfgs": [outcome_of([], diverged=True), outcome_of([0.5])],
    }
    entries = [
        compare.Entry(contender, contender.grid[0], 0.0, others.get(name, sgd))
        for name, contender in CONTENDERS.items()
        if name in published
    ]
    lines = compare.summary([compare.Comparison(plan_of(seeds=2), entries)]).splitlines()
    losses = [line for line in lines if line.startswith("| ")][1 : len(published)]
    assert losses[0] == "| SOFIM | -0.200 [-1.471, +1.071] |"
    assert losses[1] == "| SOFIM, per layer | +0.000 [+0.000, +0.000] |"
    assert losses[6].startswith("| AdamW | **+0.101 [+0.10")
    assert losses[7] == "| L-BFGS | diverged |"
    costs = [line for line in lines if line.startswith("| ")][len(published) + 1 :]
    # Training losses are one higher; targets 1.5, 0.5 and 90 %: after the first epoch, or not at all.
    assert costs[0] == "| SOFIM | 1.00 / 1.00 / – |"
    assert costs[6] == "| AdamW | – / – / – |"


def test_the_ratio_that_is_followed() -> None:
    """After the first step the corrected moment is the gradient; afterwards the mean of gradients, weighted."""
    run = job(settings={"lr/rho": 0.0, "rho": 0.25}, examples=64, epochs=1)
    ratios = regime.follow(run, None)
    training, data = prepare(run)
    gradients = []
    for indices in batch_order(run.seed, 1, 64).split(32):
        training.optimizer.zero_grad()
        loss_of(training.model, data.train.at(indices)).backward()
        gradients.append(flat([p.grad for p in training.params]).double())
    moment = (0.9 * gradients[0] + gradients[1]) / 1.9
    assert ratios == pytest.approx([float(g.square().sum()) / 0.25 for g in (gradients[0], moment)], rel=1e-3)


# The command line


def test_sensitivity_covers_what_it_says() -> None:
    plan = sensitivity.Plan("digits-lenet5", Size(1, 64), "cpu", rates=(0.1, 1.0), sgd_rates=(0.1,), momenta=(0.0,))
    jobs = plan.jobs()
    assert {name: (len(rows), len(rows[0])) for name, rows in jobs.items()} == {
        "sofim-rho": (8, 2),
        "sgd-momentum": (1, 1),
        "sofim-momentum": (1, 2),
        "sofim-batch": (4, 2),
        "sgd-batch": (4, 1),
    }
    one = jobs["sofim-rho"][1][0]
    assert one.settings == {"lr/rho": 3.33333, "rho": 0.03, "momentum": 0.9}
    assert [row[0].batch_size for row in jobs["sgd-batch"]] == [32, 128, 512, 2048]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a figure"),
        (["convex", "--device", "tpu"], "--device tpu"),
        (["compare", "--task", "cifar10-lenet5", "--root", "/nowhere"], "no folder /nowhere"),
        (["compare", "--task", "tabular-mlp", "--contenders", "sgd,adam"], "--contenders: no adam in this line-up"),
        (["compare", "--task", "tabular-mlp", "--seeds", "0"], "--seeds 0: expected 1 at least"),
    ],
)
def test_what_a_user_must_put_right(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*arguments, "--out", str(tmp_path)] if arguments else []) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_documents_come_from_the_results_that_are_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables beside the results, and those in docs, are what the results give."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # pictures are not compared
    for path in RESULTS.glob("*.json*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert command.main(["report", "--out", str(tmp_path)]) == 0
    written = {path.name for path in tmp_path.glob("*.md")}
    assert written == {path.name for path in RESULTS.glob("*.md")}
    assert written
    for name in written:
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text(), name
    for name in ("convergence.md", "tuning.md"):
        document = (REPOSITORY / "docs" / name).read_text()
        assert documents.BLOCK.search(document)
        assert documents.filled(document, tmp_path) == document, f"{name}: python -m bench.convergence report"


def test_marks_in_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("Intro.\n\n### One\n\n| 1 |\n\n### Two\n\n| 2 |\n\n![a](a.png)\n")
    document = "x\n<!-- a.md, Two -->\nold\nolder\n<!-- end -->\ny\n<!-- a.md -->\n<!-- end -->\n"
    filled = "x\n<!-- a.md, Two -->\n\n| 2 |\n\n<!-- end -->\ny\n<!-- a.md -->\n\nIntro.\n\n<!-- end -->\n"
    assert documents.filled(document, tmp_path) == filled
    assert documents.filled(filled, tmp_path) == filled
    (tmp_path / "b-0.4m.md").write_text("Outro.\n")
    assert "Outro." in documents.filled("<!-- b-0.4m.md -->\n<!-- end -->\n", tmp_path)
    for mark in ("<!-- a.md, Two->\n<!-- end -->\n", "<!-- a b.md -->\n<!-- end -->\n", "<!-- end -->\n"):
        with pytest.raises(ValueError, match="is not understood"):
            documents.filled(mark, tmp_path)
    with pytest.raises(ValueError, match=r"a\.md has no section 'Three'"):
        documents.filled("<!-- a.md, Three -->\n<!-- end -->", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"b\.md"):
        documents.filled("<!-- b.md -->\n<!-- end -->", tmp_path)
