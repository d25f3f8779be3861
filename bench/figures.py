"""Draws the README's figure from the committed results: ``python -m bench.figures``.

Writes docs/figures/step_time.svg from bench/results/step_cpu.json and bench/results/gpu_nvidia_h200.json. The SVG is
written as text, so that the same results always give the same file (tests/docs/test_documents.py compares them).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["FIGURE", "step_time"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
FIGURE = ROOT / "docs" / "figures" / "step_time.svg"

MODELS = {
    "lenet-5": "LeNet-5, 62 K",
    "1000x1K": "1,000 tensors of 1,024",
    "resnet-9": "ResNet-9, 6.6 M",
    "resnet-50": "ResNet-50, 26 M",
    "gpt2-small": "GPT-2 small, 124 M",
    "lm-1b": "language model, 1.1 G",
}
PLAIN, CLIPPED = "#2f6db5", "#e08a2e"
LABELS, PANEL, ROW, BAR, TOP = 160, 430, 44, 14, 84  # pixels
LENGTH_OF_1, NUMBERS = 180, 250  # pixels: a bar as long as SGD's, and where the column of numbers ends


class Bars(NamedTuple):
    """Ratios of SOFIM's step to SGD's, for one model.

    Attributes:
        model: its name in the results.
        plain: to SGD's step.
        clipped: with gradient clipping, to ``clip_grad_norm_`` and SGD's step.
    """

    model: str
    plain: float
    clipped: float


def on_cpu(results: dict[str, Any]) -> Iterator[Bars]:
    """The rows of bench/results/step_cpu.json."""

    def ratios(table: str) -> dict[str, float]:
        return {row["model"]: row["ratio"] for row in results["tables"][table] if row["provider"] == "SOFIM"}

    plain, clipped = ratios("plain"), ratios("guarded")
    yield from (Bars(model, plain[model], clipped[model]) for model in MODELS if model in plain)


def on_gpu(results: dict[str, Any]) -> Iterator[Bars]:
    """The rows of bench/results/gpu_nvidia_h200.json: float32, backend ``cuda``; the first run that has a model."""
    ratios: dict[tuple[str, str], float] = {}
    for row in results["timing"]:
        if row["dtype"] == "float32" and row["backend"] in (None, "cuda") and row["status"] == "measured":
            ratios.setdefault((row["model"], row["kind"]), row["ratio"])
    for model in MODELS:
        yield Bars(model, ratios[model, "plain"], ratios[model, "guarded"] / ratios[model, "clipped sgd"])


def panel(left: int, title: str, rows: list[Bars]) -> Iterator[str]:
    """One device: a title, two bars for each model, and a line where SGD is."""
    start = left + LABELS
    x, bottom = start + LENGTH_OF_1, TOP + ROW * len(rows) - 8
    yield f'<text x="{left}" y="{TOP - 22}" class="title">{title}</text>'
    yield f'<text x="{x}" y="{bottom + 16}" text-anchor="middle" class="number">SGD = 1</text>'
    for index, row in enumerate(rows):
        y = TOP + ROW * index
        yield f'<text x="{start - 8}" y="{y + BAR + 4}" text-anchor="end">{MODELS[row.model]}</text>'
        for place, (ratio, color) in enumerate([(row.plain, PLAIN), (row.clipped, CLIPPED)]):
            length, top = ratio * LENGTH_OF_1, y + place * (BAR + 1)
            yield f'<rect x="{start}" y="{top}" width="{length:.1f}" height="{BAR}" fill="{color}"/>'
            yield f'<text x="{start + NUMBERS}" y="{top + BAR - 3}" text-anchor="end" class="number">{ratio:.2f}</text>'
    yield f'<line x1="{x}" y1="{TOP - 8}" x2="{x}" y2="{bottom}" class="sgd"/>'


def step_time(results: Path = RESULTS) -> str:
    """The figure, as SVG.

    Args:
        results: the folder with the two files.

    Raises:
        KeyError: a measurement is missing.
    """
    cpu = json.loads((results / "step_cpu.json").read_text(encoding="utf-8"))
    gpu = json.loads((results / "gpu_nvidia_h200.json").read_text(encoding="utf-8"))
    cpu_rows, gpu_rows = list(on_cpu(cpu)), list(on_gpu(gpu))
    width, height = 2 * PANEL + 20, TOP + ROW * max(len(cpu_rows), len(gpu_rows)) + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        "<title>Time of an optimizer step of SOFIM relative to PyTorch's fused SGD</title>",
        "<style>text { font: 13px sans-serif; fill: #222 } .title { font-weight: bold } "
        ".number { font-size: 11px } "
        ".sgd { stroke: #222; stroke-dasharray: 4 3 }</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for x, color, text in (
        (12, PLAIN, "step, relative to SGD(momentum=0.9, fused=True)"),
        (PANEL + 10, CLIPPED, "step with clipping, relative to clip_grad_norm_ and SGD"),
    ):
        lines.append(f'<rect x="{x}" y="14" width="{BAR}" height="{BAR}" fill="{color}"/>')
        lines.append(f'<text x="{x + BAR + 6}" y="26">{text}</text>')
    lines += panel(12, f"CPU, {cpu['machine']['cores']} cores ({cpu['machine']['cpu'].split('(')[0]} Xeon)", cpu_rows)
    lines += panel(PANEL + 10, f"GPU ({gpu['device']['name']}), backend cuda", gpu_rows)
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__.partition(":")[0]).parse_args()
    FIGURE.parent.mkdir(exist_ok=True)
    FIGURE.write_text(step_time(), encoding="utf-8")
    print(f"Written: {FIGURE.relative_to(ROOT)}")
