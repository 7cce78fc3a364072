"""What pages are made of: bars, histograms, tables without lines, numbers in words."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

_EIGHTHS = " ▏▎▍▌▋▊▉"
_RISING = " ▁▂▃▄▅▆▇█"
_HISTOGRAM_CELLS = 40


class Bar:
    """A bar of `value` out of `most`, at most `width` cells wide; whatever is above zero shows as something."""

    def __init__(self, value: float, most: float, style: str = "cyan", width: int = 36, thin: bool = False) -> None:
        self.share = value / most if most > 0 else 0.0
        self.style, self.width, self.thin = style, width, thin

    def text(self, width: int) -> str:
        """The bar in `width` cells."""
        eighths = max(round(self.share * width * 8), 1 if self.share > 0 else 0)
        if self.thin:
            return "━" * (eighths // 8) + ("╸" if eighths % 8 >= 3 or 0 < eighths < 8 else "")
        return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Segment(self.text(min(self.width, options.max_width)), Style.parse(self.style))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(8, options.max_width), min(self.width, options.max_width))


class Histogram:
    """Counts as columns two lines high; whatever is above zero shows as something."""

    def __init__(self, counts: Sequence[int], style: str = "cyan") -> None:
        self.counts, self.style = counts, style
        self.cells = _cells(len(counts))

    def lines(self) -> tuple[str, str]:
        """The upper and the lower line."""
        most = max(self.counts, default=0)
        levels = [max(round(16 * count / most), 1) if count else 0 for count in self.counts]
        upper = "".join(_RISING[max(level - 8, 0)] * self.cells for level in levels)
        return upper, "".join(_RISING[min(level, 8)] * self.cells for level in levels)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines():
            yield Segment(line, Style.parse(self.style))
            yield Segment.line()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(len(self.counts) * self.cells, len(self.counts) * self.cells)


class Trimmed:
    """A page without the spaces that tables leave at the ends of lines."""

    def __init__(self, page: RenderableType) -> None:
        self.page = page

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in console.render_lines(self.page, options, pad=False):
            while line and not line[-1].text.strip():
                line.pop()
            if line:
                last = line.pop()
                line.append(Segment(last.text.rstrip(), last.style))
            yield from line
            yield Segment.line()


def axis(edges: Sequence[int]) -> str:
    """Round numbers under the cells that they fall into, each with a tick before it."""
    line = ""
    ticks = [digit * 10**power for power in range(10) for digit in (1, 2, 5)]
    for tick in ticks:
        cell = (bisect_right(edges, tick) - 1) * _cells(len(edges) - 1)
        if edges[0] <= tick < edges[-1] and cell >= len(line) + (1 if line else 0):
            line = line.ljust(cell) + f"╵{tick:,}"
    return line


def _cells(bins: int) -> int:
    """The width of a column of a histogram."""
    return max(_HISTOGRAM_CELLS // max(bins, 1), 1)


def grid(*columns: str, header: bool = False) -> Table:
    """A table without lines.

    A column's name starts with `>` to align it right, with `*` to let it wrap, with `~` to let its cells (bars, or made
    with `clipped`) be cut before any other column is.
    """
    table = Table(box=None, show_header=header, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        wraps = name.startswith(("*", "~"))
        justify, overflow = ("right" if name.startswith(">") else "left"), ("fold" if wraps else "ellipsis")
        table.add_column(name.lstrip(">*~"), justify=justify, no_wrap=not wraps, overflow=overflow)
    return table


def clipped(text: str, style: str = "") -> Text:
    """A text of one line that is cut to the width that its column has."""
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def percent(part: float, whole: float) -> str:
    """`12.3%`; `<0.1%` and `>99.9%` for what would be rounded away; nothing of nothing is nothing."""
    if not whole:
        return ""
    share = 100 * part / whole
    if 0 < share < 0.05:
        return "<0.1%"
    return ">99.9%" if 99.95 <= share < 100 else f"{share:.1f}%"


def size(count: int) -> str:
    """`1.2 MB`: bytes in decimal units."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" or value >= 99.5 else f"{value:.1f} {units[0]}"


def when(created: str) -> str:
    """`2026-11-23 09:05 UTC` of an ISO time in UTC."""
    return f"{created[:10]} {created[11:16]} UTC"
