"""The report of a quantised model in words, and as a drawing: SQNR over the blocks, one line per kind of layer.

Test: tests/unit/test_quantize_run.py
"""

import statistics
from xml.sax.saxutils import escape

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bb5566", "#004488", "#ddaa33", "#000000",
           "#997700", "#6699cc", "#994455", "#44aa99", "#882255")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 1200, 640, 60, 60, 50, 250


def as_text(report):
    """A few lines: what was made, the median of every kind of layer, the worst ten."""
    calibration = report["calibration"]
    known = (calibration if isinstance(calibration, str)
             else f"{calibration['calls']} calls, {calibration['tokens']:,} tokens")
    lines = [f"{report['source']} -> {report['precision']}, rank {report['rank']}; calibration: {known}",
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
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
             'font-size="13">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
             f'<text x="{LEFT}" y="30" font-size="18">{escape(title)}</text>',
             f'<text x="{LEFT}" y="{HEIGHT - 12}">block (double blocks first)</text>',
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
    """{kind of layer: [(block, dB)]}; single blocks come after the double ones."""
    double = 1 + max(int(layer["module"].split(".")[1]) for layer in report["layers"]
                     if layer["module"].startswith("transformer_blocks."))
    series = {}
    for layer in report["layers"]:
        stack, block, kind = layer["module"].split(".", 2)
        single = stack == "single_transformer_blocks"
        line = series.setdefault(f"{'single' if single else 'double'} {kind}", [])
        line.append((int(block) + double * single, layer["sqnr"]))
    return series
