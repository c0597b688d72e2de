"""A table on the terminal: through rich on a terminal that has it, aligned plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print `rows` of strings under `columns` to stdout; pipes and files get plain text that `grep` and `cut` read."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(title=title, title_justify="left")
            for column in columns:
                table.add_column(column, overflow="fold")
            for row in rows:
                table.add_row(*row)
            Console(markup=False).print(table)
            return
    print(format_plain(title, columns, rows))


def format_plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the table as aligned text, two spaces between columns, no trailing blanks."""
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *rows]
    body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([title, *body])
