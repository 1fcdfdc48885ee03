"""The report of a quantised model in words, and as a drawing: SQNR over the blocks, one line per kind of layer. What may be
written over by another.

Test: tests/unit/test_quantize_run.py
"""

import json
import os
import statistics
from xml.sax.saxutils import escape

from ..errors import CheckpointError
from ..families import recognise
from ..files import read_text

TOOL = "ComfyUI-SVDQ"       # who made a report
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bb5566", "#004488", "#ddaa33", "#000000",
           "#997700", "#6699cc", "#994455", "#44aa99", "#882255")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 1200, 640, 60, 60, 50, 250
HEAD = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="13">')


def require_ours(path):
    """Raise CheckpointError unless `path` is free for a report: nothing is there, or another report, JSON or drawing."""
    if not os.path.lexists(path):
        return
    try:
        text = read_text(path)
        about = None if text.startswith(HEAD) else json.loads(text)
        ours = about is None or isinstance(about, dict) and about.get("tool") == TOOL
    except (CheckpointError, ValueError, RecursionError):
        ours = False
    if not ours:
        raise CheckpointError(f"{path}: exists already and is no report of this program, which would be written there. Move it "
                              "away, or choose another name")


def as_text(report):
    """A few lines: what was made, the median of every kind of layer, the worst ten."""
    calibration = report["calibration"]
    known = (calibration if isinstance(calibration, str)
             else f"{calibration['calls']} calls, {calibration['tokens']:,} tokens")
    lines = [f"{report['source']}: {report['precision']}, rank {report['rank']}; calibration: {known}",
             "median signal to noise, dB:"]
    for kind, points in by_kind(report).items():
        lines.append(f"  {kind:<34}{statistics.median(sqnr for _, sqnr in points):5.1f}")
    lines.append("lowest:")
    for layer in sorted(report["layers"], key=lambda layer: layer["sqnr"])[:10]:
        lines.append(f"  {layer['module']:<44}{layer['sqnr']:5.1f}")
    return "\n".join(lines)


def svg(report):
    """The drawing as the text of an SVG file."""
    series = by_kind(report)
    points = [point for line in series.values() for point in line]
    blocks = max(block for block, _ in points)
    low, high = (5 * int(bound // 5) for bound in (min(sqnr for _, sqnr in points), max(sqnr for _, sqnr in points) + 5))
    plot_width, plot_height = WIDTH - LEFT - LEGEND, HEIGHT - TOP - BOTTOM

    def x(block):
        return LEFT + plot_width * (block + 0.5) / (blocks + 1)

    def y(sqnr):
        return TOP + plot_height * (high - sqnr) / max(high - low, 1)

    title = f"{report['source']}: {report['precision']}, rank {report['rank']}"
    parts = [HEAD,
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
             f'<text x="{LEFT}" y="30" font-size="18">{escape(title)}</text>',
             f'<text x="{LEFT}" y="{HEIGHT - 12}">block ({order_of(report)})</text>',
             f'<text x="12" y="{TOP - 12}">SQNR, dB</text>']
    for sqnr in range(low, high + 1, 5):
        parts.append(f'<path d="M{LEFT} {y(sqnr):.1f}h{plot_width}" stroke="#ddd"/>'
                     f'<text x="{LEFT - 8}" y="{y(sqnr) + 4:.1f}" text-anchor="end">{sqnr}</text>')
    for block in range(0, blocks + 1, max(1, (blocks + 1) // 12)):
        parts.append(f'<text x="{x(block):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{block}</text>')
    for i, (kind, line) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x(block):.1f},{y(sqnr):.1f}" for block, sqnr in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x(block):.1f}" cy="{y(sqnr):.1f}" r="2.5" fill="{colour}"/>' for block, sqnr in line]
        parts.append(f'<text x="{WIDTH - LEGEND + 16}" y="{TOP + 18 * i + 10}" fill="{colour}">{escape(kind)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def by_kind(report):
    """{kind of layer: [(block, dB)]}; blocks are numbered through all stacks."""
    words, layers = _stacks(report), [(layer["module"].split(".", 2), layer["sqnr"]) for layer in report["layers"]]
    first, begin = {}, 0
    for stack in words:
        first[stack] = begin
        begin += 1 + max((int(block) for (other, block, _), _ in layers if other == stack), default=-1)
    series = {}
    for (stack, block, kind), sqnr in layers:
        series.setdefault(f"{words[stack]} {kind}", []).append((first[stack] + int(block), sqnr))
    return series


def order_of(report):
    """"double blocks first": how the blocks of by_kind are numbered."""
    return f"{next(iter(_stacks(report).values()))} blocks first"


def _stacks(report):
    """The STACKS of the family that was quantised."""
    return recognise(f"{layer['module']}.qweight" for layer in report["layers"]).STACKS
