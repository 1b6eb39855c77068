"""Reading the tables that scripts print."""

import itertools


def read_table(text: str, number: int = -1) -> list[dict[str, str]]:
    """The rows of one of the Markdown tables in the text, by column title."""
    groups = itertools.groupby(text.splitlines(), lambda line: line.startswith("|"))
    tables = [list(lines) for is_table, lines in groups if is_table]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in tables[number])
    return [dict(zip(header, row, strict=True)) for row in rows]
