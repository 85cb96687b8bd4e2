"""Tables in Markdown files that a program writes, each between two comments, and no one by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column left-aligned and the others right-aligned."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace(text: str, name: str, block: str) -> str:
    """The text with that block between `<!-- NAME: ... -->` and `<!-- /NAME -->`.

    Raises:
        ValueError: the two comments are not there once, in this order.
    """
    comments = re.compile(rf"(<!-- {name}:[^>]* -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if len(comments.findall(text)) != 1:
        raise ValueError(
            f"want '<!-- {name}: ... -->' and '<!-- /{name} -->' on lines of their own, once, to "
            "write between them: put them where the block belongs"
        )
    return comments.sub(lambda found: f"{found[1]}{block}\n{found[2]}", text)


def replaced(path: Path, blocks: dict[str, str]) -> str:
    """A file's text with blocks by name.

    Raises:
        ValueError: as `replace`, or the file is not there.
    """
    try:
        text = path.read_text() if path.exists() else ""  # which lacks them, too
        for name, block in blocks.items():
            text = replace(text, name, block)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return text


def write(path: Path, text: str) -> bool:
    """Make it the file's text; whether that changed it."""
    if text == path.read_text():
        return False
    path.write_text(text)
    return True


def rewrite(path: Path, blocks: dict[str, str]) -> bool:
    """Write blocks by name into a file; whether that changed it. ValueError as `replaced`."""
    return write(path, replaced(path, blocks))
