"""Numbers as Markdown tables, and curves as an SVG without a drawing library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Curve", "plot", "table"]

Curve = Sequence[tuple[float, float]]
"""Points from left to right."""

_COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#9a6700")
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 640, 340, 56, 40, 24, 64


def table(title: str, columns: Iterable[str], lines: Mapping[str, Sequence[float]]) -> str:
    columns = list(columns)
    written = [f"| {title} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    written += [f"| {name} | {' | '.join(f'{value:.1f}' for value in values)} |" for name, values in lines.items()]
    return "\n".join(written)


def plot(title: str, x: str, y: str, curves: Mapping[str, Curve], ticks: Sequence[float], *, least: float = 0) -> str:
    """The ticks stand at equal distances: they are budgets, each twice the last. `y`: percent, from `least` on."""
    inner = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def across(value: float) -> float:
        place = next(i for i, tick in enumerate(ticks) if tick >= value)
        return _LEFT + inner[0] * place / (len(ticks) - 1)

    def up(value: float) -> float:
        return _TOP + inner[1] * (100 - value) / (100 - least)

    middle = _TOP + inner[1] / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="#fff"/><g font-size="12">',
        f'<text x="{_LEFT}" y="20" font-size="14">{title}</text>',
        f'<text x="{_LEFT + inner[0] / 2}" y="{_HEIGHT - 28}" text-anchor="middle">{x}</text>',
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{y}</text>',
    ]
    for value in range(int(least), 101, 10):
        parts.append(f'<path d="M{_LEFT} {up(value):.1f}h{inner[0]}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{value}</text>')
    below = _TOP + inner[1] + 16
    parts += [f'<text x="{across(tick):.1f}" y="{below}" text-anchor="middle">{tick:g}</text>' for tick in ticks]
    for number, (name, points) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{across(a):.1f}" cy="{up(b):.1f}" r="3" fill="{colour}"/>' for a, b in points]
        left = _LEFT + number * inner[0] / len(curves)
        parts.append(f'<text x="{left:.1f}" y="{_HEIGHT - 8}" fill="{colour}">— {name}</text>')
    return "\n".join([*parts, "</g></svg>\n"])
