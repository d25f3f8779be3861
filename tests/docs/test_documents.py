"""The documents: links and file names in them lead somewhere, and the README's figure is what the results give."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    path
    for pattern in ("*.md", "docs/**/*.md", "bench/results/**/*.md")
    for path in sorted(ROOT.glob(pattern))
    if (ROOT / "README.md").is_file()  # else these are not the sources
]
FOLDERS = "bench|csrc|docs|examples|findings|sofim_fused|tests"


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a Markdown file."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(name if name not in found else f"{name}-1")
    return found


def dead_links(path: Path) -> list[str]:
    """The relative links of a document that lead nowhere, and the names in it of files that are not there."""
    text = path.read_text(encoding="utf-8")
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = (path.parent / unquote(file)).resolve() if file else path
        if "://" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
            dead.append(link)
    for name in re.findall(rf"`((?:{FOLDERS})/[\w./*-]+)`", text):
        if not any(ROOT.glob(name.rstrip("/"))):
            dead.append(name)
    return dead


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    assert dead_links(path) == []


def test_a_dead_link_is_noticed(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text(
        "# A heading, and `code`\n[1](#a-heading-and-code) [2](a.md#a-heading-and-code) [3](https://example.org/#x)\n"
        "[4](b.md) [5](#another) ![6](b.png) `bench/step.py` `tests/*.py` `bench/gone.py`\n"
    )
    assert dead_links(document) == ["b.md", "#another", "b.png", "bench/gone.py"]


def unknown_tests(path: Path) -> list[str]:
    """The tests that rows of tables name and that are in none of the files to which the row links; and empty cells."""
    unknown = []
    for row in re.findall(r"^\| .*\.py\).* \|$", path.read_text(encoding="utf-8"), re.MULTILINE):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        known = set()
        for file in re.findall(r"\]\(([^)#]+\.py)\)", cells[0]):
            tree = ast.parse((path.parent / file).read_text(encoding="utf-8"))
            known |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        unknown += [name for name in re.findall(r"`(test_\w+)`", row) if name not in known]
        unknown += [f"an empty cell beside {cells[0]}" for cell in cells if not cell]
    return unknown


@pytest.mark.skipif(not DOCUMENTS, reason="these are not the sources")
def test_the_table_of_frameworks_names_tests() -> None:
    document = ROOT / "docs" / "frameworks.md"
    assert unknown_tests(document) == []
    rows = [row for row in document.read_text(encoding="utf-8").splitlines() if ".py)" in row and row.startswith("|")]
    assert len(rows) >= 10
    assert all(re.search(r"`test_\w+`", row) for row in rows)
    versions = (ROOT / "tests" / "clients" / "requirements.txt").read_text(encoding="utf-8")
    versions += (ROOT / "tests" / "clients" / "requirements-alone.txt").read_text(encoding="utf-8")
    versions += (ROOT / "Makefile").read_text(encoding="utf-8")
    for name, version in re.findall(r"^\| ([\w-]+) (\d[\d.]+), ", "\n".join(rows), re.MULTILINE):
        assert f"{name}=={version}" in versions, f"{name} {version} is not what make clients installs"


def test_an_unknown_test_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_known(): ...\n")
    document = tmp_path / "a.md"
    document.write_text("| [a](test_a.py) | `test_known` | `test_gone` | – |\n| [b](test_a.py) | | `test_known` |\n")
    assert unknown_tests(document) == ["test_gone", "an empty cell beside [b](test_a.py)"]


@pytest.mark.skipif(not DOCUMENTS, reason="these are not the sources")
def test_the_figure_is_what_the_results_give() -> None:
    """If it is not: ``python -m bench.figures``."""
    from bench import figures

    assert figures.FIGURE.read_text(encoding="utf-8") == figures.step_time()


@pytest.mark.skipif(not DOCUMENTS, reason="these are not the sources")
def test_the_check_of_the_site(tmp_path: Path) -> None:
    """What ``make docs`` runs on the pages that Sphinx made."""
    problems = runpy.run_path(str(ROOT / "docs" / "site" / "check.py"))["problems"]
    page, other, style = tmp_path / "a.html", tmp_path / "b" / "c.html", tmp_path / "s.css"
    other.parent.mkdir()
    style.write_text("p { background: url(pattern.png) }")
    other.write_text('<a name="y">y</a> <a href="../a.html#x">x</a>')
    page.write_text(
        '<link rel="stylesheet" href="s.css"> <h1 id="x">x</h1> <a href="#x">x</a> <a href="b/c.html#y">y</a> '
        '<a href="https://example.org">not loaded</a> <img src="data:image/png;base64,AA">'
    )
    assert list(problems(tmp_path)) == []
    style.write_text("@import 'https://example.org/font.css'; p { background: url(//example.org/a.png) }")
    page.write_text(
        '<script src="https://example.org/a.js"></script> <style>@import url("http://example.org/b.css")</style> '
        '<img src="a.png" srcset="https://example.org/a.png 2x, a.png 1x"> <a href="b/c.html#z">z</a> '
        '<a href="#w">w</a>'
    )
    assert list(problems(tmp_path)) == [
        "a.html loads http://example.org/b.css",
        "a.html loads https://example.org/a.js",
        "a.html loads https://example.org/a.png",
        "a.html has a link to b/c.html#z: there is no such heading",
        "a.html has a link to #w: there is no such heading",
        "a.html has a link to a.png: there is no such file",
        "a.html has a link to a.png: there is no such file",
        f"{Path('b', 'c.html')} has a link to ../a.html#x: there is no such heading",
        "s.css loads https://example.org/font.css",
        "s.css loads //example.org/a.png",
    ]
    (empty := tmp_path / "empty").mkdir()
    assert list(problems(empty)) == [f"{empty}: no pages"]
