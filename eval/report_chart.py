"""Curves of a run: as SVG that takes the page's colours, and as a PNG file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from vlm.eval.report_html import Html
from vlm.figures import drawn

__all__ = ["POINTS", "Chart", "Curve", "thinned"]

POINTS = 240
"""Of a curve, at most."""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 520, 250, 58, 26, 20


@dataclass(frozen=True)
class Curve:
    """name: in the legend. points: (step, value), steps rising; values that are not finite are left out."""

    name: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Chart:
    """title: with the unit. curves: those that have points are drawn. marks: (step, name) where a stage begins. log: the values on a logarithmic scale, where all are above zero."""

    title: str
    curves: Sequence[Curve]
    marks: Sequence[tuple[int, str]] = ()
    log: bool = False

    def svg(self) -> Html:
        """For the page: title, drawing, legend with the last value of each curve. Nothing where there is nothing to draw."""
        lines = [(curve, thinned(_finite(curve.points))) for curve in self.curves]
        lines = [(curve, points) for curve, points in lines if points]
        if not lines:
            return Html("")
        steps, values = [step for _, points in lines for step, _ in points], [value for _, points in lines for _, value in points]
        across = _Scale(min(steps), max(steps), LEFT, WIDTH - 8)
        up = _Scale(min(values), max(values), HEIGHT - BOTTOM, TOP, log=self.log and min(values) > 0, zero=not self.log)
        shapes = [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>' for tick in up.ticks()]
        shapes += [f'<text x="{LEFT - 7}" y="{up(tick) + 4:.1f}" text-anchor="end">{_short(tick)}</text>' for tick in up.ticks()]
        shapes += [f'<text x="{across(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{_short(tick)}</text>' for tick in across.ticks() if tick == int(tick)]
        for step, name in self.marks:
            at = across(step)
            shapes += [f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>', f'<text x="{at:.1f}" y="{TOP - 7}">{escape(name)}</text>']
        legend = []
        for index, (curve, points) in enumerate(lines):
            colour = f"var(--s{index % 6})"
            path = " ".join(f"{across(step):.1f},{up(value):.1f}" for step, value in points)
            shape = f'<circle cx="{across(points[0][0]):.1f}" cy="{up(points[0][1]):.1f}" r="2.5" style="fill:{colour}"/>' if len(points) == 1 else ""
            shapes.append(shape or f'<polyline class="line" style="stroke:{colour}" points="{path}"/>')
            legend.append(f'<span style="--c:{colour}">{escape(curve.name)} <b>{_short(_finite(curve.points)[-1][1])}</b></span>')
        inner = "".join(shapes)
        drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}">{inner}</svg>'
        return Html(f'<figure><h3>{escape(self.title)}</h3>{drawing}<div class="legend">{"".join(legend)}</div></figure>')

    def png(self) -> bytes:
        """The same as a picture file, every step of it."""
        return drawn(self._draw, (8.0, 4.0), layout=None)

    def _draw(self, canvas: Any) -> None:
        axes = canvas.add_axes((0.1, 0.13, 0.88, 0.84))
        for curve in self.curves:
            if points := _finite(curve.points):
                axes.plot(*zip(*points, strict=True), linewidth=0.8, label=curve.name, marker="." if len(points) == 1 else None)
        values = [value for curve in self.curves for _, value in _finite(curve.points)]
        axes.set(xlabel="step", ylabel=self.title, yscale="log" if self.log and values and min(values) > 0 else "linear")
        axes.yaxis.set_major_formatter("{x:.4g}")  # the formatters of logarithmic axes set numbers as formulas, which takes longer than all else
        axes.yaxis.set_minor_formatter("{x:.4g}" if values and max(values) < 10 * min(values) else "")
        for step, _ in self.marks:
            axes.axvline(step, linewidth=0.8, linestyle=":", color="grey")
        if values:
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3)


def thinned(points: Sequence[tuple[int, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of as many neighbours, so that a spike is lowered but never lost."""
    size = -(-len(points) // most) if points else 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(step for step, _ in group) / len(group), sum(value for _, value in group) / len(group)) for group in groups]


def _finite(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, value) for step, value in points if math.isfinite(value)]


class _Scale:
    """Values to places on the drawing. zero: the scale reaches down to 0 where that costs less than half of it."""

    def __init__(self, low: float, high: float, start: float, stop: float, *, log: bool = False, zero: bool = False):
        if zero and 0 < low < high / 2:
            low = 0.0
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        self.low, self.high, self.start, self.stop, self.log = low, high, start, stop, log

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(number) for number in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (self.stop - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers, about five."""
        if self.log and self.high / self.low > 4:
            steps = (1,) if self.high / self.low > 1e4 else (1, 2, 5)
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            return [mark for power in powers for step in steps if self.low <= (mark := step * 10.0**power) <= self.high]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        size = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
        return [round(count * size, 12) for count in range(math.ceil(self.low / size), math.floor(self.high / size) + 1)]


def _short(value: float) -> str:
    """A number in few letters: 0.0004, 0.6931, 12,000, 1.2e+07."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
