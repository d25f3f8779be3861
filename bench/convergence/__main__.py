"""The command line: one command per figure, and one for all of them in miniature."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console

from bench import documents, language_model, report
from bench.convergence import adaptive, compare, convex, cost, plays, regime, sensitivity
from bench.convergence.contenders import CONTENDERS, LINEUPS
from bench.convergence.store import Store
from bench.convergence.tasks import TASKS, Size
from examples.train import UserError, usable_device

RESULTS = report.RESULTS / "convergence"
DOCUMENTS = [Path(__file__).parents[2] / "docs" / name for name in ("convergence.md", "tuning.md")]
SENSITIVE = "fashion-mnist-lenet5"
SENSITIVE_SIZE = Size(4, 4_000)
COMMAND = "python -m bench.convergence"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0: done, 2: the user must put something right, 130: interrupted."""
    options = _parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        if options.quick:
            quick(options, console)
        elif options.command is None:
            raise UserError("name a figure (compare, convex, regime, sensitivity, cost), report, or --quick")
        else:
            usable_device(options.device)
            options.out.mkdir(parents=True, exist_ok=True)
            COMMANDS[options.command](options, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:  # of readers of data and of results; their messages are for users
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Convergence of SOFIM and other optimizers. Each result is appended to a file of JSON lines, so"
        " an interrupted command continues where it stopped. Tables and figures are written beside it.",
    )
    parser.add_argument("--quick", action="store_true", help="everything in miniature, in a temporary folder")
    _common(parser)
    commands = parser.add_subparsers(dest="command", title="commands")
    one = commands.add_parser("compare", help="tune all optimizers on a task with equal effort, then compare them")
    one.add_argument("--task", choices=list(TASKS), required=True)
    one.add_argument(
        "--lineup",
        choices=list(LINEUPS),
        default="adaptive",
        help="adaptive: diagonals that adapt beside AdamW and others of its kind (default); confirmation: AdaSOFIM's"
        " form and AdamW from twenty more seeds; published: SOFIM as published beside what its paper compares it with",
    )
    one.add_argument("--contenders", metavar="NAME,...", help="run only these of the line-up now (default: all)")
    one.add_argument("--seeds", type=int, metavar="N", help="runs of each after tuning (default: 5, or the line-up's)")
    two = commands.add_parser("convex", help="distance to the minimiser of a convex loss")
    three = commands.add_parser("sensitivity", help="losses over learning rates, ρ, momentum and batch sizes")
    four = commands.add_parser("cost", help="time of training steps on the CPU; needs an idle machine")
    four.add_argument("--seconds", type=float, default=60.0, help="time for each task (default: 60)")
    four.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    six = commands.add_parser("regime", help="when SOFIM differs from SGD with momentum, on the tasks compared so far")
    five = commands.add_parser("report", help="write tables and figures again, from the results so far")
    for command in (one, two, three, four, five, six):
        _common(command, suppress=True)
    return parser


def _common(parser: argparse.ArgumentParser, suppress: bool = False) -> None:
    """Options of all commands; after a command they keep what was said before it."""

    def add(name: str, default: Any, **settings: Any) -> None:
        parser.add_argument(name, default=argparse.SUPPRESS if suppress else default, **settings)

    add("--device", "cpu", help="cpu or cuda (default: cpu)")
    add("--full", False, action="store_true", help="all data and more epochs: for GPUs")
    add("--root", None, type=Path, metavar="DIR", help="folder of the task's files (default: their usual places)")
    add("--jobs", None, type=int, metavar="N", help="processes (default: one per core, on a GPU one)")
    add("--out", RESULTS, type=Path, metavar="DIR", help="folder of the results (default: bench/results/convergence)")


def _workers(options: argparse.Namespace) -> int:
    jobs: int | None = options.jobs
    return jobs or (1 if options.device != "cpu" else os.cpu_count() or 1)


def _stem_of(plan: compare.Plan, options: argparse.Namespace, lineup: str = "") -> str:
    name = lineup or plan.lineup.name
    return _stem(("" if name == "published" else f"{name}-") + plan.task.name, options)


def _stem(name: str, options: argparse.Namespace) -> str:
    return name + ("-full" if options.full else "") + ("" if options.device == "cpu" else "-" + options.device)


def _write(out: Path, name: str, text: str, drawing: Figure | None) -> None:
    picture = f"\n\n![{name}]({name}.png)" if drawing is not None else ""
    (out / f"{name}.md").write_text(text + picture + "\n")
    if drawing is not None:
        drawing.savefig(out / f"{name}.png", dpi=80, metadata={"Software": None})


def _machine(store: Store) -> str:
    """Where results were made: on one machine as a rule."""
    described = {
        f"{m.get('gpu') or m['cpu']}, {m['cores']} cores, torch {m['torch']}, Python {m['python']}"
        for m in store.machines
    }
    return "; ".join(sorted(described))


# The figures


def _compare(options: argparse.Namespace, console: Console) -> None:
    only = options.contenders.split(",") if options.contenders else []
    known = LINEUPS[options.lineup].contenders
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"--contenders: no {', '.join(unknown)} in this line-up; there are {', '.join(known)}")
    if options.seeds is not None and options.seeds < 1:
        raise UserError(f"--seeds {options.seeds}: expected 1 at least")
    (plan,) = compare.plans([options.task], options.full, options.seeds, options.device, options.lineup, only)
    store = _results(plan, options)
    compare.run(plan, store, _workers(options), options.root, console)
    result = compare.comparison(plan._replace(only=()), store)
    _write_comparison(result, store, options)
    console.print(compare.ends(result), compare.speeds(result), sep="\n\n", highlight=False, markup=False)


def _write_comparison(result: compare.Comparison, store: Store, options: argparse.Namespace) -> None:
    command = f"{COMMAND} compare --task {result.plan.task.name} --lineup {result.plan.lineup.name}{_flags(options)}"
    text = compare.markdown(result, _machine(store), command)
    _write(options.out, _stem_of(result.plan, options), text, compare.figure(result))


def _flags(options: argparse.Namespace) -> str:
    return (" --full" if options.full else "") + ("" if options.device == "cpu" else f" --device {options.device}")


def _convex(options: argparse.Namespace, console: Console) -> None:
    _run_convex(options, console, convex.Plan())


def _run_convex(options: argparse.Namespace, console: Console, plan: convex.Plan) -> convex.Result:
    store = Store(options.out / "convex.jsonl")
    found = convex.run(plan, store, _workers(options), console)
    _write_convex(plan, found, store, options)
    return found


def _write_convex(plan: convex.Plan, found: convex.Result, store: Store, options: argparse.Namespace) -> None:
    text = convex.markdown(plan, found, _machine(store), f"{COMMAND} convex")
    _write(options.out, "convex", text, convex.figure(plan, found))


def _regime(options: argparse.Namespace, console: Console, plans: Sequence[compare.Plan] | None = None) -> None:
    tasks = _compared(options) if plans is None else plans
    store = Store(options.out / f"{_stem('regime', options)}.jsonl")
    stores = [_results(plan, options) for plan in tasks]
    _write_regime(regime.run(tasks, stores, store, _workers(options), options.root, console), store, options)


def _results(plan: compare.Plan, options: argparse.Namespace) -> Store:
    return Store(options.out / f"{_stem_of(plan, options, plan.lineup.shares)}.jsonl")


def _compared(options: argparse.Namespace) -> list[compare.Plan]:
    """Tasks on which SOFIM as published has all results.

    Raises:
        UserError: there are none.
    """
    found = [
        plan
        for plan in compare.plans(list(TASKS), options.full, None, options.device)
        if any(e.contender.name == "sofim" for e in compare.comparison(plan, _results(plan, options)).entries)
    ]
    if not found:
        raise UserError(f"no task was compared yet: {COMMAND} compare --lineup published --task ...")
    return found


def _write_regime(found: list[regime.Course], store: Store, options: argparse.Namespace) -> None:
    text = regime.markdown(found, _machine(store), f"{COMMAND} regime{_flags(options)}")
    _write(options.out, _stem("regime", options), text, regime.figure(found))


def _sensitivity(options: argparse.Namespace, console: Console, plan: sensitivity.Plan | None = None) -> None:
    plan = plan or _sensitivity_plan(options)
    store = Store(options.out / f"{_stem('sensitivity', options)}.jsonl")
    _write_sensitivity(plan, sensitivity.run(plan, store, _workers(options), options.root, console), store, options)


def _sensitivity_plan(options: argparse.Namespace) -> sensitivity.Plan:
    return sensitivity.Plan(SENSITIVE, SENSITIVE_SIZE, options.device)


def _write_sensitivity(
    plan: sensitivity.Plan, found: dict[str, sensitivity.Grid], store: Store, options: argparse.Namespace
) -> None:
    text = sensitivity.markdown(plan, found, _machine(store), f"{COMMAND} sensitivity{_flags(options)}")
    _write(options.out, _stem("sensitivity", options), text, sensitivity.figure(plan, found))


def _cost(options: argparse.Namespace, console: Console, tasks: Sequence[str] = cost.TIMED) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        found = {}
        for name in tasks:
            with console.status(f"cost: {name}"):
                found[name] = cost.measure(name, options.seconds, options.root)
        where = report.machine(options.threads)
    finally:
        torch.set_num_threads(threads)
    record = {"machine": where, "seconds": options.seconds, "tables": found}
    (options.out / "cost.json").write_text(json.dumps(record, indent=1) + "\n")
    _write_cost(options)


def _write_cost(options: argparse.Namespace) -> None:
    record = json.loads((options.out / "cost.json").read_text())
    m = record["machine"]
    machine = f"{m['cpu']}, {m['cores']} cores, {m['threads']} thread(s), torch {m['torch']}"
    _write(options.out, "cost", cost.markdown(record["tables"], machine, f"{COMMAND} cost"), None)


def _report(options: argparse.Namespace, console: Console) -> None:
    _write_adaptive(_report_comparisons("adaptive", options, console), options)
    _report_comparisons("confirmation", options, console)
    done = _report_comparisons("published", options, console)
    if done:
        _write(options.out, _stem("summary", options), compare.summary(done), None)
        plans = [result.plan for result in done]
        ratios = Store(options.out / f"{_stem('regime', options)}.jsonl")
        stores = [_results(plan, options) for plan in plans]
        _redraw(
            "regime",
            ratios,
            lambda: _write_regime(regime.courses(plans, stores, ratios), ratios, options),
            console,
        )
    store = Store(options.out / "convex.jsonl")
    _redraw(
        "convex",
        store,
        lambda: _write_convex(convex.Plan(), convex.result(convex.Plan(), store), store, options),
        console,
    )
    grids = Store(options.out / f"{_stem('sensitivity', options)}.jsonl")
    settings = _sensitivity_plan(options)
    _redraw(
        "sensitivity",
        grids,
        lambda: _write_sensitivity(settings, sensitivity.losses(settings, grids), grids, options),
        console,
    )
    if (options.out / "cost.json").exists():
        _write_cost(options)
        console.print("cost: written")
    for path in sorted(options.out.glob(f"{language_model.PREFIX}*.jsonl")):
        language_model.write(path)
        console.print(f"{path.stem}: written")
    if options.out == RESULTS:
        for document in DOCUMENTS:
            document.write_text(documents.filled(document.read_text(), RESULTS))
            console.print(f"{document.name}: tables written")


def _report_comparisons(lineup: str, options: argparse.Namespace, console: Console) -> list[compare.Comparison]:
    """Write those of a line-up, and return those whose baseline is there."""
    found = []
    for plan in compare.plans(list(TASKS), options.full, None, options.device, lineup):
        store = _results(plan, options)
        result = compare.comparison(plan, store)
        if result.entries:
            _write_comparison(result, store, options)
            console.print(f"{_stem_of(plan, options)}: written")
        elif len(store) and not plan.lineup.shares:
            console.print(f"{_stem_of(plan, options)}: no optimizer is complete, nothing written")
        if result.baseline is not None:
            found.append(result)
    return found


def _write_adaptive(done: Sequence[compare.Comparison], options: argparse.Namespace) -> None:
    """What the tasks say together of the optimizers that adapt."""
    if not done:
        return
    found = []
    for result in done:
        store = _results(result.plan, options)
        found.append({e.contender.name: adaptive.ranges(result.plan, e.contender, store) for e in result.entries})
    _write(options.out, _stem("adaptive-summary", options), adaptive.summary(done), None)
    drawing = adaptive.rates_figure(done, found)
    _write(options.out, _stem("adaptive-rates", options), adaptive.rates_markdown(done, found), drawing)
    drawing = adaptive.memory_figure(done)
    _write(options.out, _stem("adaptive-memory", options), adaptive.memory_markdown(done), drawing)


def _redraw(name: str, store: Store, write: Callable[[], None], console: Console) -> None:
    if not len(store):
        return
    try:
        write()
    except KeyError:
        console.print(f"{name}: results are missing, nothing written; its command goes on where it stopped")
    else:
        console.print(f"{name}: written")


COMMANDS: dict[str, Callable[[argparse.Namespace, Console], None]] = {
    "compare": _compare,
    "convex": _convex,
    "regime": _regime,
    "sensitivity": _sensitivity,
    "cost": _cost,
    "report": _report,
}


# In miniature


def _write_text(folder: Path) -> None:
    """A text in the place of the plays, which would have to be fetched."""
    folder.mkdir()
    for part in plays.Plays._fields:
        lines = 400 if part == "train" else 40
        sentences = (f"{number} times {number} is {number * number}.\n" for number in range(lines))
        (folder / f"{part}.txt").write_text(part + ":\n" + "".join(sentences))


def quick(options: argparse.Namespace, console: Console) -> None:
    """All figures at sizes that say nothing of optimizers, but take the same way through the code.

    Raises:
        UserError: an optimizer did not do what it is for, or results were computed twice.
    """
    with tempfile.TemporaryDirectory() as folder:
        options.out, options.full, options.device, options.seconds, options.threads = Path(folder), False, "cpu", 0.0, 1
        plans = [
            compare.Plan(TASKS["digits-lenet5"], Size(2, 160), 2, "cpu", configurations=2),
            compare.Plan(TASKS["tabular-mlp"], Size(2, 160), 2, "cpu", configurations=2),
            # The transformers take as long as all else together: there is nothing to choose from for them.
            compare.Plan(TASKS["text-transformer"], Size(2, 32), 1, "cpu", configurations=1),
        ]
        adapts = LINEUPS["adaptive"]
        text = options.out / "text"
        _write_text(text)
        adaptive_plans = [
            compare.Plan(TASKS["tabular-mlp"], Size(2, 160), 2, "cpu", configurations=2, lineup=adapts),
            compare.Plan(TASKS["plays-transformer"], Size(2, 32), 1, "cpu", configurations=1, lineup=adapts),
        ]
        done = []
        for plan in (*plans, *adaptive_plans):
            name, root = _stem_of(plan, options), text if plan.task.fresh else None
            store = _results(plan, options)
            result = compare.run(plan, store, _workers(options), root, console)
            count = len(store)
            for entry in result.entries:
                first, last = (entry.outcomes[0].points[i].train_loss for i in (0, -1))
                # L-BFGS takes differences of gradients of different batches: there it may well climb.
                if entry.contender.gradients != "closure" and not last < first:
                    raise UserError(f"{entry.contender.label} on {name}: training loss went from {first} to {last}")
            compare.run(plan, store, 1, root, console)
            if len(store) != count:
                raise UserError(f"{name}: results were there and were computed again")
            if result.missing:
                raise UserError(f"{name}: {', '.join(one.name for one in result.missing)} should be complete")
            _write_comparison(result, store, options)
            done.append(result)
        _write_adaptive(done[len(plans) :], options)
        _regime(options, console, plans)
        for found in _run_convex(options, console, convex.Plan(steps=10, epochs=1, seeds=1))["full"]:
            if not found.runs[0][-1] < found.runs[0][0]:
                raise UserError(f"{found.contender.label} on a convex loss: not closer to the minimiser than at first")
        plan_ = sensitivity.Plan(
            "digits-lenet5", Size(1, 64), "cpu", (0.1, 1.0), (0.1, 1.0), (0.01, 0.1), (0.0, 0.9), (32, 64)
        )
        _sensitivity(options, console, plan_)
        _cost(options, console, ["tabular-mlp"])
        written = sorted(path.name for path in options.out.iterdir() if path.is_file())
        console.print(f"{len(CONTENDERS)} optimizers; written: {', '.join(written)}")


if __name__ == "__main__":
    sys.exit(main())
