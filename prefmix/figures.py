"""Numbers and names as the model card and its curves show them. Names come from data: they are shown on one line, in
Markdown as code."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

NOT_MEASURED = "not measured"


def reasons(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{code(reason)} {count:,}" for reason, count in ordered) or "none"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def figure(value: Any, decimals: int | None = None) -> str:
    """A number in four digits, or in so many decimals; all digits of a whole one."""
    if value is None:
        return NOT_MEASURED
    if decimals is not None:
        return f"{value:.{decimals}f}"
    if isinstance(value, int) or abs(value) == math.inf or value != value:
        return f"{value:,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def share(value: float | None) -> str:
    """`95.3 %`; what would be rounded to none or all, without being it, keeps its distance."""
    if value is None:
        return NOT_MEASURED
    if 0 < value < 0.0005:
        return "< 0.1 %"
    return "> 99.9 %" if 0.9995 <= value < 1 else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def one_line(value: Any) -> str:
    """Text without line ends, control, direction and surrogate characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())


def code(value: Any) -> str:
    """Markdown that shows a text as it is, on one line."""
    text = one_line(value)
    if not text:
        return "` `"
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([re.sub(r"\\*\|", r"\\|", cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
