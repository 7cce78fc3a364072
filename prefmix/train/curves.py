"""The curves of a stage (curves.svg), made from metrics.jsonl and eos.json: panels of 450 x 200, two in a row, in an SVG
without scripts, fonts or anything from outside."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from prefmix.figures import NOT_MEASURED, counted, figure, one_line

_WIDTH, _PANEL, _TOP, _FOOT = 900, 200, 48, 14
_LEFT, _PLOT_WIDTH, _PLOT_HEIGHT, _HEADING = 62, 360, 130, 26
_MOST_DOTS = 60

_STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #59636e; }
.back { fill: #ffffff; } .name { fill: #1f2328; font-weight: 600; font-size: 13px; }
.grid { stroke: #e4e8ed; } .axis { stroke: #9aa3ad; }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
.line.train { stroke: #1f6feb; } .dot.train, .key.train { fill: #1f6feb; }
.line.held { stroke: #bc4c00; } .dot.held, .key.held { fill: #bc4c00; }
@media (prefers-color-scheme: dark) {
text { fill: #9aa4af; } .back { fill: #0d1117; } .name { fill: #e6edf3; }
.grid { stroke: #262c34; } .axis { stroke: #5b6570; }
.line.train { stroke: #6cb0ff; } .dot.train, .key.train { fill: #6cb0ff; }
.line.held { stroke: #ffa15c; } .dot.held, .key.held { fill: #ffa15c; }
}
"""

Point = tuple[float, float | None]


@dataclass(frozen=True)
class _Series:
    """Values over steps. `look` is `train` for what is known of every step, `held` for what evaluations measured; a value
    that is no finite number is None and breaks the line."""

    name: str
    look: str
    points: Sequence[Point]

    @property
    def values(self) -> list[float]:
        return [value for _, value in self.points if value is not None]


@dataclass(frozen=True)
class _Panel:
    """Series that share an axis, which shows the values in `holds` whatever was measured."""

    name: str
    series: Sequence[_Series]
    holds: tuple[float, ...] = ()


def curves(metrics: Sequence[Mapping[str, Any]], eos: Mapping[str, Any]) -> str:
    """The course of a stage as one SVG, 900 pixels wide: loss, reward margin and accuracy (dpo), P(EOS), stop rate,
    learning rate. `metrics` are the lines of metrics.jsonl; values that are not finite are gaps."""
    panels = list(_panels(metrics, eos))
    last = max([point[0] for panel in panels for each in panel.series for point in each.points], default=0.0)
    last = max(1.0, last)
    height = _TOP + _PANEL * math.ceil(len(panels) / 2) + _FOOT
    stage = _xml(eos.get("stage") or "")
    count = sum(1 for line in metrics if "loss" in line)
    averaged = math.ceil(count / _PLOT_WIDTH)
    note = f"; a point of a line is the mean of {averaged} steps" if averaged > 1 else ""
    told = " ".join(_told(panel) for panel in panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'role="img" aria-labelledby="title desc">',
        f'<title id="title">Curves of the stage {stage}</title>',
        f'<desc id="desc">Small charts over {counted(count, "optimiser step")}{note}. {told}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="back" width="{_WIDTH}" height="{height}"/>',
        f'<text class="name" x="16" y="26">Stage {stage}</text>',
        f'<text x="{_WIDTH - 16}" y="26" text-anchor="end">{counted(count, "step")}; figures are the last values{note}</text>',
        *(_drawn(panel, number, last) for number, panel in enumerate(panels)),
        *(
            f'<text x="{left + _LEFT + _PLOT_WIDTH / 2:.0f}" y="{height - 14}" text-anchor="middle">optimiser step</text>'
            for left in (0, _WIDTH // 2)
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _panels(metrics: Sequence[Mapping[str, Any]], eos: Mapping[str, Any]) -> Iterator[_Panel]:
    def both(key: str) -> list[_Series]:
        return [
            _Series("train", "train", _column(metrics, key)),
            _Series("held out", "held", _column(metrics, f"eval_{key}")),
        ]

    measured = [{"step": 0, **(eos.get("before") or {})}, *(eos.get("history") or [])]
    yield _Panel("Loss", both("loss"))
    if any("rewards/margins" in line for line in metrics):
        yield _Panel("Reward margin", both("rewards/margins"), (0.0,))
        yield _Panel("Reward accuracy", both("rewards/accuracies"), (0.0, 1.0))
    yield _Panel("P(EOS) at the end of answers", [_Series("held out", "held", _column(measured, "p_eos"))], (0.0, 1.0))
    yield _Panel("Stop rate of generations", [_Series("held out", "held", _column(measured, "stop_rate"))], (0.0, 1.0))
    yield _Panel("Learning rate", [_Series("train", "train", _column(metrics, "learning_rate"))], (0.0,))


def _column(lines: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    points = []
    for line in lines:
        step = _number(line.get("step"))
        if key in line and step is not None and step >= 0:
            points.append((step, _number(line[key])))
    return points


def _number(value: Any) -> float | None:
    """A number that can be drawn: finite, and of a size that sums and differences stay finite with."""
    if not isinstance(value, (int, float)) or not abs(value) <= 1e100:
        return None
    return float(value) if abs(value) >= 1e-100 else 0.0


def _told(panel: _Panel) -> str:
    """A panel in a sentence, for those who do not see it."""
    found = [
        f"{each.name} from {figure(each.values[0])} to {figure(each.values[-1])}"
        for each in panel.series
        if each.values
    ]
    return f"{panel.name}: {', '.join(found) or NOT_MEASURED}."


def _drawn(panel: _Panel, number: int, last: float) -> str:
    left, top = _LEFT + (number % 2) * _WIDTH // 2, _TOP + (number // 2) * _PANEL
    upper, right = top + _HEADING, left + _PLOT_WIDTH
    lower = upper + _PLOT_HEIGHT
    parts = ["<g>", f'<text class="name" x="{left}" y="{top + 12}">{panel.name}</text>']
    shown = [(each, _runs(each.points, _PLOT_WIDTH)) for each in panel.series if each.values]
    if not shown:
        middle = f'x="{left + _PLOT_WIDTH // 2}" y="{upper + _PLOT_HEIGHT // 2}"'
        return "".join([*parts, f'<text {middle} text-anchor="middle">{NOT_MEASURED}</text></g>'])
    ys = [y for _, runs in shown for run in runs for _, y in run] + list(panel.holds)
    ticks, step = _ticks(min(ys), max(ys))
    low, span = ticks[0], ticks[-1] - ticks[0]

    def place(x: float, y: float) -> tuple[str, str]:
        across, up = left + _PLOT_WIDTH * x / last, lower - _PLOT_HEIGHT * (y - low) / span
        return f"{across:.1f}", f"{up:.1f}"

    for tick in ticks:
        _, y = place(0, tick)
        parts.append(f'<path class="grid" d="M{left} {y}H{right}"/>')
        parts.append(
            f'<text x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{_label(tick, step, ticks)}</text>'
        )
    parts.append(f'<path class="axis" d="M{left} {lower}H{right}"/>')
    for tick in _whole_ticks(last):
        x, _ = place(tick, low)
        parts.append(f'<path class="axis" d="M{x} {lower}v4"/>')
        parts.append(f'<text x="{x}" y="{lower + 18}" text-anchor="middle">{_label(tick, 1, [last])}</text>')
    for each, runs in shown:
        parts += _marks(each, [[place(*point) for point in run] for run in runs])
    keys = [f'<tspan class="key {each.look}">{each.name} {figure(each.values[-1])}</tspan>' for each, _ in shown]
    parts.append(f'<text x="{right}" y="{top + 12}" text-anchor="end">{" &#160; ".join(keys)}</text></g>')
    return "".join(parts)


def _marks(series: _Series, runs: Sequence[Sequence[tuple[str, str]]]) -> list[str]:
    """Lines through the points, and dots on measurements that are few and on points without a neighbour."""
    few = series.look == "held" and sum(map(len, runs)) <= _MOST_DOTS
    lines = ["M" + "L".join(f"{x} {y}" for x, y in run) for run in runs if len(run) > 1]
    dots = [point for run in runs if few or len(run) == 1 for point in run]
    return [
        *([f'<path class="line {series.look}" d="{"".join(lines)}"/>'] if lines else []),
        *(f'<circle class="dot {series.look}" cx="{x}" cy="{y}" r="{3 if few else 2}"/>' for x, y in dots),
    ]


def _runs(points: Sequence[Point], most: int) -> list[list[tuple[float, float]]]:
    """At most `most` points, each the mean of as many neighbours as that takes, in runs that end at gaps."""
    size = max(1, math.ceil(len(points) / most))
    runs: list[list[tuple[float, float]]] = [[]]
    for start in range(0, len(points), size):
        found = [(step, value) for step, value in points[start : start + size] if value is not None]
        if found:
            runs[-1].append((sum(x for x, _ in found) / len(found), sum(y for _, y in found) / len(found)))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _ticks(low: float, high: float) -> tuple[list[float], float]:
    """A few round numbers around a range, and their distance."""
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        room = abs(low) / 10 or 1.0
        low, high = low - room, high + room
    step = _round_step((high - low) / 4)
    return [number * step for number in range(math.floor(low / step), math.ceil(high / step) + 1)], step


def _whole_ticks(last: float) -> list[float]:
    step = max(1.0, _round_step(last / 5))
    return [number * step for number in range(math.floor(last / step) + 1)]


def _round_step(wanted: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below a number."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(digit * power for digit in (1, 2, 5, 10, 20) if digit * power >= wanted * (1 - 1e-9))


def _label(tick: float, step: float, ticks: Sequence[float]) -> str:
    """A tick with the digits that tell it from its neighbours."""
    most = max(map(abs, ticks))
    if tick == 0 or 1e-3 <= most < 1e5:
        decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if tick else 0
        return f"{tick:,.{decimals}f}"
    digits = max(0, math.floor(math.log10(abs(tick)) + 1e-9) - math.floor(math.log10(step) + 1e-9))
    mantissa, _, exponent = f"{tick:.{min(digits, 16)}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _xml(text: Any) -> str:
    return escape(one_line(text))
