"""Configuration of the documentation site, for Sphinx (``make docs``).

The pages are the Markdown files of the repository, where they are, so that every relative link works on GitHub and on
the site. Nothing is loaded from the network, neither when the site is built nor when it is read.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from latex2mathml.converter import convert

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

project = "sofim_fused"
html_title = project
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/site/*.md", "bench/results/*.md", "bench/results/convergence/*.md"]
exclude_patterns = [".*", "build", "csrc", "dist", "tests"]
suppress_warnings = ["myst.header"]  # the tables of results have headings of the third level, for other documents
html_theme = "furo"
html_copy_source = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
myst_heading_anchors = 3  # the anchors that GitHub gives headings, as in docs/method.md#the-update
autodoc_typehints = "none"  # the signature and the text give the types
autodoc_member_order = "bysource"

# README.md itself has no list of pages, because GitHub would show the directives as they are.
CONTENTS = """
```{toctree}
:hidden:
:caption: Guide

Overview <self>
docs/installation
docs/usage
docs/tuning
docs/from_sgd
docs/from_adamw
docs/adaptive
docs/in_backward
docs/memory
docs/distributed
docs/frameworks
```

```{toctree}
:hidden:
:caption: Reference

docs/site/api
docs/method
docs/benchmarks
docs/convergence
docs/questions
docs/site/results
docs/reliability
```

```{toctree}
:hidden:
:caption: Development

CONTRIBUTING
CHANGELOG
```
"""


def complete(_app: Sphinx, name: str, source: list[str]) -> None:
    """Add what a page needs on the site and not on GitHub: the list of pages, and titles for tables of results."""
    if name == root_doc:
        source[0] += CONTENTS
    elif name.startswith("bench/results/") and not re.search("^# ", source[0], re.MULTILINE):
        source[0] = f"# {Path(name).name}\n\n{source[0]}"


def mathml(text: str, display: str) -> str:
    """A formula as MathML, which browsers show without a script.

    Raises:
        ValueError: it has a command or an environment that the converter does not know.
    """
    result = convert(text, display=display)
    if unknown := re.search(r"<m[io]>(\\\w+|&)</m[io]>", result):
        raise ValueError(f"latex2mathml does not know {unknown[1]!r} in this place: {text}")
    return str(result)


def formula(self: HTML5Translator, node: nodes.math) -> None:
    """Write a formula that is part of a line."""
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def formula_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula that is a paragraph."""
    self.body.append(mathml(node.astext(), "block"))
    raise nodes.SkipNode


def add_index(app: Sphinx, error: Exception | None) -> None:
    """Make README.md the first page of the site."""
    if error is None and app.builder.format == "html":
        shutil.copy(app.outdir / f"{root_doc}.html", app.outdir / "index.html")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", complete)
    app.connect("build-finished", add_index)
    app.add_html_math_renderer("mathml", (formula, None), (formula_block, None))
