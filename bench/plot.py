"""Curves as an SVG, without a plotting library: numbers that never change need no more than lines and text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 760, 430  # pixels
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 40, 50
# Told apart in grey and by people who see few colours (Okabe and Ito); dashes where two lines lie on each other.
COLOURS = ("#000000", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00")
DASHES = ("", "8 3", "2 3", "10 3 2 3", "5 5", "1 4")


@dataclass(frozen=True)
class Line:
    """One curve: its name, and points (x, y) from left to right."""

    name: str
    points: Sequence[tuple[float, float]]


def write_curves(file: Path, title: str, x_name: str, y_name: str, lines: Sequence[Line]) -> None:
    """Draw ``lines`` over common axes."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    axes = _Axes(_ticks(min(xs), max(xs)), _ticks(min(ys), max(ys)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(WIDTH / 2, 22, title, size=15),
        *_grid(axes, x_name, y_name),
    ]
    for place, line in enumerate(lines):
        colour, dash = COLOURS[place % len(COLOURS)], DASHES[place % len(DASHES)]
        style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
        points = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in line.points)
        row = TOP + 20 + 20 * place
        parts.append(f'<polyline points="{points}" {style}/>')
        parts.append(f'<polyline points="{WIDTH - 240},{row} {WIDTH - 200},{row}" {style}/>')
        final = f"{line.name}: {line.points[-1][1]:.4f}"
        parts.append(_text(WIDTH - 192, row + 4, final, anchor="start"))
    file.write_text("\n".join([*parts, "</svg>"]) + "\n")


@dataclass(frozen=True)
class _Axes:
    """From numbers to pixels; an axis ends at its outer ticks."""

    across: Sequence[float]
    up: Sequence[float]

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.across[0]) / (self.across[-1] - self.across[0])

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.up[0]) / (self.up[-1] - self.up[0])


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, five to ten of them, that hold [low, high] between them."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 9)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _grid(axes: _Axes, x_name: str, y_name: str) -> Iterator[str]:
    for value in axes.across:
        yield _text(axes.x(value), HEIGHT - BOTTOM + 18, f"{value:g}")
    for value in axes.up:
        row = axes.y(value)
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{row:.1f}" y2="{row:.1f}" stroke="#dddddd"/>'
        yield _text(LEFT - 8, row + 4, f"{value:g}", anchor="end")
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_name)
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield f'<g transform="rotate(-90 16 {middle})">{_text(16, middle, y_name)}</g>'


def _text(x: float, y: float, words: str, anchor: str = "middle", size: int = 13) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'
