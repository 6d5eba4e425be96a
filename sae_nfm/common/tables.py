"""Tables as text, for the terminal."""

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """A header, a ruler, rows: the first column to the left, the others to the right, two spaces between.

    Args:
        lines: the header, then the rows, a text for each column.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]).rstrip()
        for first, *rest in lines
    ]
    return [texts[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *texts[1:]]


def listed(values: dict[str, float], width: int) -> list[str]:
    """Indented lines of a name and a number; whole numbers have no decimals."""
    return [f"    {name:<{width}}  {_number(value):>14}" for name, value in values.items()]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
