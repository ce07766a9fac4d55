"""Tables on a terminal: with rich where it is installed and someone is looking, else plain columns."""

import sys
from collections.abc import Sequence


def show(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """Print rows under their column names; numbers come as ready-made text."""
    cells = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty() and _show_rich(columns, cells, title):
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    if title:
        print(title)
    for row in (columns, *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _show_rich(columns: Sequence[str], cells: list[list[str]], title: str) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        return False
    table = Table(*columns, title=title or None, title_justify="left")
    for row in cells:
        table.add_row(*row)
    Console().print(table)
    return True
