"""Puts tables of results into documents: the text between two marks is replaced by a section of a results file."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["filled"]

BLOCK = re.compile(r"(<!-- (?P<file>[\w.-]+\.md)(?:, (?P<heading>[^>]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(document: str, results: Path) -> str:
    """The document with each ``<!-- file.md, heading -->`` followed by that section, up to ``<!-- end -->``.

    Raises:
        FileNotFoundError: there is no such file among the results.
        ValueError: it has no such heading, or a mark is none of these.
    """
    for line in re.findall(r"^<!-- .*$", BLOCK.sub("", document), flags=re.MULTILINE):
        raise ValueError(f"the mark {line!r} is not understood")  # its text would stay as it is, unnoticed

    def block(found: re.Match[str]) -> str:
        text = (results / found["file"]).read_text()
        return f"{found[1]}\n{_section(text, found['heading'], found['file'])}\n\n{found[4]}"

    return BLOCK.sub(block, document)


def _section(text: str, heading: str | None, file: str) -> str:
    parts = re.split(r"^#{2,3} (.+)\n", text, flags=re.MULTILINE)
    sections = {None: parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}
    if heading not in sections:
        raise ValueError(f"{file} has no section {heading!r}")
    return sections[heading].split("\n![")[0].strip()
