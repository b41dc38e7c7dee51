"""What `--help` prints: text in lines that a terminal need not break, and names of values as people write them."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator

WIDTH = 80
_ROOM = r"( (?=[ │|]))?"  # inside a table
HERE = "@about@"  # stands in the parser's page where the text about the command goes


class _Kept(io.TextIOWrapper):
    """Text that is kept, with the frames that a stream's encoding can show."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="replace", newline="")

    def text(self) -> str:
        """Return all that was written."""
        self.seek(0)
        return self.read()


@contextlib.contextmanager
def help_pages(about: str) -> Iterator[None]:
    """Let a parser, told to say HERE about its command, print this text there, in WIDTH columns at most."""
    out = sys.stdout
    kept = _Kept(out.encoding or "utf-8")
    try:
        with contextlib.redirect_stdout(kept):
            yield
    finally:
        width = min(WIDTH, shutil.get_terminal_size().columns)
        page = _renamed(re.sub(rf"{HERE}\n+", lambda _: f"{fitted(about, width)}\n\n", kept.text()))
        usage, _, rest = page.partition("\n\n")
        out.write(f"{_usage(usage, width)}\n\n{rest}" if page else "")


def fitted(text: str, width: int = WIDTH) -> str:
    """Return text in lines of a width: paragraphs filled, lines of a list or an example broken where they may be.

    A remark that stands three spaces or more behind an example goes below it. An example itself is not broken.

    >>> print(fitted("Say what it is.\\n\\n  synchromesh train demo          minutes on a CPU", 32))
    Say what it is.
    <BLANKLINE>
      synchromesh train demo
          minutes on a CPU
    """
    return "\n\n".join(_paragraph(part, width) for part in re.split(r"\n{2,}", text.strip("\n")))


def _paragraph(text: str, width: int) -> str:
    if not text.startswith(" "):
        return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(_line(line, width) for line in text.splitlines())


def _line(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    remark = re.fullmatch(r"( *\S.*?) {3,}(\S.*)", line)
    if remark:
        return "\n".join([_line(remark[1], width), *textwrap.wrap(remark[2], width - 6, initial_indent=" " * 6)])
    return line if not line.lstrip().startswith("-") else _filled(line, width)


def _filled(line: str, width: int) -> str:
    """Return a line of choices, broken behind commas and spaces."""
    lines = [""]
    for part in re.split(r"(?<=[ ,])(?=\S)", line):
        if len(lines[-1] + part.rstrip()) > width:
            lines.append(" " * 6)
        lines[-1] += part
    return "\n".join(one.rstrip() for one in lines)


def _usage(line: str, width: int) -> str:
    """Return the line of how a command is called, broken between options."""
    parts = re.split(r" (?=\[)", line)
    lines = [parts[0]]
    for part in parts[1:]:
        if len(f"{lines[-1]} {part}") > width:
            lines.append(" " * len("usage:"))
        lines[-1] += f" {part}"
    return "\n".join(lines)


def _renamed(page: str) -> str:
    """Return a page with `PATH|None` for `{None}|PATH`, and `[PATH ...]` for `[[PATH [PATH ...]]]`."""
    page = re.sub(rf"\{{None\}}\|(\{{[^}}]*\}}|[A-Z]+){_ROOM}", lambda m: _padded(m[0], f"{m[1]}|None", m[2]), page)
    several = rf"(\[?)\[(\S+) \[\2 \.\.\.\]\](?(1)\]){_ROOM}"
    page = re.sub(several, lambda m: _padded(m[0], f"[{m[2]} ...]", m[3]), page)
    return page.replace("(default: )", "(optional) ")


def _padded(old: str, new: str, room: str | None) -> str:
    """Return the new text, as long as the old one inside a table."""
    return new.ljust(len(old)) if room else new
