# SPDX-License-Identifier: Apache-2.0
"""Draw dashboards as one HTML page from the real answers to their queries. This is not Grafana.

``make preview``: the fleet test sends the queries of each panel to Prometheus, this module draws
the answers, and a headless Chromium takes the pictures.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from dashboards.reading import panels

CELL, GAP, LINE = 52, 8, 34
"""Pixels: a column of Grafana's grid, the gap between panels, a row of the grid."""
AXIS, LEGEND = 16, 15
"""Pixels: the time axis, and a line of the legend."""
COLOURS = [
    *("#6ed0e0", "#3274d9", "#e0559f", "#ff9830", "#0f9d8f", "#e8e8e8", "#9a7be0", "#b07a4a"),
    *("#7fa8a8", "#c4a484", "#5195ce", "#e0a0a0", "#64b0c8", "#8a9ba8", "#4f8fa8", "#a86a3d"),
    *("#9ec5d6", "#ffa6b0", "#b59ce0", "#f9ba8f", "#7d8fd6", "#70dbed", "#c98a5e", "#dedaf7"),
]
"""The colours of names that the dashboards leave to Grafana. They have no red, yellow or green,
which mean outcomes and limits."""
NAMED = {
    "green": "#73bf69",
    "yellow": "#f2cc0c",
    "red": "#f2495c",
    "dark-red": "#a3142b",
    "blue": "#5794f2",
    "purple": "#b877d9",
    "text": "#d8d9da",
}
OUTCOMES = {
    "succeeded": "green",
    "recovered": "yellow",
    "exhausted": "red",
    "not_recoverable": "dark-red",
    "interrupted": "blue",
    "superseded": "purple",
}
"""The colours of outcomes, as the dashboards set them."""
STYLE = """
body { background: #111217; color: #d8d9da; font: 13px/1.35 system-ui, sans-serif; margin: 16px; }
h1 { font-size: 20px; } p { color: #9fa3a8; max-width: 60rem; }
.board { position: relative; margin-bottom: 40px; }
.panel { position: absolute; background: #181b1f; border: 1px solid #2c3235; border-radius: 3px;
  box-sizing: border-box; padding: 6px 8px; overflow: hidden; }
.row { position: absolute; font-weight: 600; padding: 6px 0; }
.title { font-weight: 500; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.stat { font-size: 30px; white-space: nowrap; text-align: center; padding-top: 18px; }
.none { color: #9fa3a8; text-align: center; padding-top: 30px; }
.legend { color: #9fa3a8; font: 11px/15px system-ui; }
.legend span { white-space: nowrap; display: inline-block; }
.legend i { display: inline-block; width: 10px; height: 3px; margin: 0 4px 3px 8px; }
table { border-collapse: collapse; width: 100%; font-size: 12px; }
td, th { text-align: left; padding: 3px 8px; border-bottom: 1px solid #2c3235; }
text { fill: #9fa3a8; font-size: 10px; }
svg { display: block; }
.stat-panel .title { white-space: normal; font-size: 12px; }
@media (max-width: 800px) {
  body { margin: 10px; }
  .board { width: auto !important; height: auto !important; display: flow-root; }
  .panel, .row { position: static; width: auto !important; height: auto !important; }
  .panel { margin-bottom: 8px; }
  .panel.stat-panel { float: left; width: calc(50% - 8px) !important; margin-right: 8px; }
  .row { clear: both; }
  .title { white-space: normal; }
  .stat { font-size: 24px; padding: 8px 0; }
  .legend { font-size: 12px; line-height: 18px; margin-top: 10px; }
  svg { width: 100%; height: auto; overflow: visible; margin-top: 12px; }
  svg text { font-size: var(--narrow); }
  svg .zero { display: none; }
  svg .time { transform: translateY(calc(var(--narrow) * .6)); }
  .none { padding: 12px 0; }
}
"""


def page(boards, answers):
    """Return the page.

    Args:
        boards: {file name: dashboard}.
        answers: {file name: {panel's id: [(target, [(labels, [(time, value)])])]}}.
    """
    drawn = "".join(_board(board, answers[name]) for name, board in boards.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Dashboards, drawn</title><style>{STYLE}</style>"
        "<h1>Dashboards, drawn from real query results</h1>"
        "<p>A real Prometheus answered the queries of each panel. Its data came from a fleet of "
        "simulated calls. The rules ran ten times faster than shipped, so a chart covers about two "
        "minutes. The times are in UTC. No Grafana took part, so layout and most colours differ "
        "from Grafana's.</p><p>Green, yellow, red and dark red are outcomes: succeeded, recovered, "
        "exhausted and not recoverable. A dashed line is a limit: red for a page, yellow for a "
        "ticket. Each other name has one colour in all panels of a dashboard.</p>"
        f"{drawn}</html>"
    )


def unfolded(board):
    """Return the dashboard with the panels of each folded row below it."""
    made, down = [], 0
    for row in board["panels"]:
        inner = row.get("panels", [])
        drawn = any("expr" in target for panel in inner for target in panel["targets"])
        for panel in ({**row, "panels": []}, *(inner if drawn else ())):
            at = panel["gridPos"]
            made.append({**panel, "gridPos": {**at, "y": at["y"] + down}})
        if drawn:
            bottom = max(each["gridPos"]["y"] + each["gridPos"]["h"] for each in inner)
            down += bottom - row["gridPos"]["y"] - 1
    return {**board, "panels": made}


def repeated(board, names):
    """Return the dashboard as Grafana shows it, with a repeated panel once per name.

    The panels below a repeated panel are moved down.
    """
    made, down = [], 0
    for panel in unfolded(board)["panels"]:
        at = panel["gridPos"]
        if not panel.get("repeat"):
            made.append({**panel, "gridPos": {**at, "y": at["y"] + down}})
            continue
        for number, name in enumerate(names):
            row, column = divmod(number, panel["maxPerRow"])
            one = json.loads(json.dumps(panel).replace(f"${panel['repeat']}", name))
            y = at["y"] + down + row * at["h"]
            where = {**at, "x": column * at["w"], "y": y}
            made.append({**one, "id": 1000 * panel["id"] + number, "gridPos": where})
        down += row * at["h"]
    return {**board, "panels": made}


def height(board):
    """Return the height of the dashboard in pixels, with its titles."""
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    return bottom * LINE + 270


def _board(board, answers):
    width, made, bottom = CELL * 24, [], 0
    colours = {}
    for panel in board["panels"]:
        at = panel["gridPos"]
        place = f"left:{at['x'] * CELL}px;top:{at['y'] * LINE}px;width:{at['w'] * CELL - GAP}px"
        bottom = max(bottom, (at["y"] + at["h"]) * LINE)
        if panel["type"] == "row":
            folded = " (folded)" if panel.get("collapsed") else ""
            made.append(f'<div class="row" style="{place}">{escape(panel["title"])}{folded}</div>')
            continue
        size = (at["w"] * CELL - GAP - 18, at["h"] * LINE - GAP - 12)
        body = draw(panel, answers.get(panel["id"], []), *size, colours)
        title = panel["title"]
        kind = "panel stat-panel" if panel["type"] == "stat" else "panel"
        made.append(
            f'<div class="{kind}" style="{place};height:{at["h"] * LINE - GAP}px" '
            f'title="{escape(panel["description"])}"><div class="title">{escape(title)}</div>'
            f"{body}</div>"
        )
    title = f"<h1>{escape(board['title'])}</h1><p>{escape(board['description'])}</p>"
    return (
        f'{title}<div class="board" style="width:{width}px;height:{bottom}px">{"".join(made)}</div>'
    )


def draw(panel, answers, width, height, colours=None):
    """Return the inside of one panel. ``colours`` keeps the colour of each name between panels."""
    series = [
        (_name(target, labels), points, target)
        for target, found in answers
        for labels, points in found
        if any(not math.isnan(value) for _, value in points)
    ]
    if not series:
        return f'<div class="none">{escape(panel["fieldConfig"]["defaults"]["noValue"])}</div>'
    return _KINDS[panel["type"]](panel, series, width, height, {} if colours is None else colours)


def _svg(width, height, parts):
    """Return a drawing that a narrow screen scales."""
    letters = 12 * width / 360  # a narrow screen shows 360 pixels, and so letters of 12
    return (
        f'<svg style="--narrow:{letters:.0f}px" width="{width}" height="{height:.0f}" '
        f'viewBox="0 0 {width} {height:.0f}">{"".join(parts)}</svg>'
    )


def _axis(times, left, width, y):
    """Yield the times below a chart: its start, its middle and its end."""
    first, last = times[0], times[-1]
    marks = ((0, "start"), (0.5, "middle"), (1, "end"))
    for part, anchor in marks if last > first else marks[:1]:
        at = datetime.fromtimestamp(first + part * (last - first), UTC)
        x = left + part * (width - left)
        where = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"'
        yield f'<text class="time" {where}>{at:%H:%M:%S}</text>'


def _name(target, labels):
    legend = target.get("legendFormat", "")
    if legend in ("", "__auto"):
        return ", ".join(value for _, value in sorted(labels.items(), reverse=True))
    return re.sub(r"\{\{(\w+)\}\}", lambda m: labels.get(m[1], ""), legend) or "(none)"


def _value(number, unit, decimals=None):
    if math.isnan(number):
        return ""
    if unit == "percentunit":
        return f"{number * 100:.{1 if decimals is None else decimals}f} %"
    text = f"{number:.{decimals}f}" if decimals is not None else f"{number:.3g}"
    return {"s": f"{text} s", "cpm": f"{text} /min"}.get(unit, text)


def _stat(panel, series, *_):
    settings = panel["fieldConfig"]["defaults"]
    number = series[0][1][-1][1]
    colour = "text"
    for step in settings["thresholds"]["steps"]:
        if step["value"] is None or number >= step["value"]:
            colour = step["color"]
    text = _value(number, settings["unit"], settings.get("decimals"))
    return f'<div class="stat" style="color:{NAMED.get(colour, colour)}">{text}</div>'


def _table(panel, series, *_):
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{_value(points[-1][1], 'short', 0)}</td></tr>"
        for name, points, _ in sorted(series, key=lambda s: -s[1][-1][1])
    )
    return f"<table>{rows}</table>"


def _looks(panel, name):
    """Return the colour and the dash that the panel sets for that series."""
    colour, dashed = None, False
    for override in panel["fieldConfig"]["overrides"]:
        if override["matcher"]["options"] == name:
            for setting in override["properties"]:
                if setting["id"] == "color":
                    colour = NAMED.get(setting["value"]["fixedColor"])
                dashed |= setting["id"] == "custom.lineStyle"
    return colour, dashed


def _colour(name, colours):
    """Return the colour of a name: that of its outcome, or the next one that is free."""
    if name in OUTCOMES:
        return NAMED[OUTCOMES[name]]
    return colours.setdefault(name, COLOURS[len(colours) % len(COLOURS)])


def _timeseries(panel, series, width, height, colours):
    settings = panel["fieldConfig"]["defaults"]
    stacked = settings["custom"].get("stacking", {}).get("mode") == "normal"
    letters = sum(len(name) + 5 for name, *_ in series)
    left, foot = 52, 26 + AXIS + LEGEND * math.ceil(letters * 6 / width)
    plot = (width - left, height - foot)
    times = sorted({at for _, points, _ in series for at, _ in points})
    span = max(times[-1] - times[0], 1)
    lines, base = [], dict.fromkeys(times, 0.0)
    for name, points, _ in series:
        colour, dashed = _looks(panel, name)
        found = {at: value for at, value in points if not math.isnan(value)}
        lower = dict(base)
        if stacked and not dashed:
            base = {at: base[at] + found.get(at, 0.0) for at in times}
            found = base
        lines.append((name, colour or _colour(name, colours), dashed, dict(found), lower))
    drawn = [0.0, *(v for _, _, _, found, _ in lines for v in found.values())]
    low, high = min(drawn), max(drawn)
    tall = (high - low) or 1

    def xy(at, value):
        x = left + (at - times[0]) / span * plot[0]
        return f"{x:.1f},{plot[1] - (value - low) / tall * (plot[1] - 8):.1f}"

    svg = [
        f'<text class="{"" if part else "zero"}" x="0" y="{plot[1] - part * (plot[1] - 8):.0f}">'
        f"{_value(low + tall * part, settings['unit'])}</text>"
        for part in (0, 0.5, 1)
    ]
    svg += _axis(times, left, width, plot[1] + AXIS - 2)
    for _, colour, dashed, found, lower in reversed(lines):
        path = " ".join(xy(at, value) for at, value in sorted(found.items()))
        if stacked and not dashed:
            under = " ".join(xy(at, lower[at]) for at in sorted(found, reverse=True))
            svg.append(f'<polygon points="{path} {under}" fill="{colour}" opacity=".7"/>')
        dash = ' stroke-dasharray="6 5"' if dashed else ""
        svg.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>'
        )
    legend = " ".join(
        f'<span><i style="background:{c}"></i>{escape(n)}</span>' for n, c, *_ in lines
    )
    return f'{_svg(width, plot[1] + AXIS + 2, svg)}<div class="legend">{legend}</div>'


def _heatmap(_panel, series, width, height, _colours):
    rows = sorted(series, key=lambda s: float(s[0].replace("+Inf", "inf")))
    times = sorted({at for _, points, _ in rows for at, _ in points})
    cells, below = [], dict.fromkeys(times, 0.0)
    for name, points, _ in rows:
        found = dict(points)
        here = {at: max(found.get(at, 0.0) - below[at], 0.0) for at in times}
        below = {at: found.get(at, below[at]) for at in times}
        cells.append((name, here))
    most = max((v for _, here in cells for v in here.values()), default=0) or 1
    wide, high = (width - 46) / len(times), (height - 34) / len(cells)
    svg = []
    for place, (name, here) in enumerate(cells):
        y = height - 34 - (place + 1) * high
        bound = f"{float(name):g}".replace("inf", "+Inf")
        svg.append(f'<text x="0" y="{y + high - 2:.0f}">{bound}</text>')
        svg += [
            f'<rect x="{46 + n * wide:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high - 1:.1f}" '
            f'fill="#ff9830" opacity="{0.1 + 0.9 * here[at] / most:.2f}"/>'
            for n, at in enumerate(times)
            if here[at] > most / 1e6  # less is an error of rounding
        ]
    svg += _axis(times, 46, width, height - 34 + AXIS - 4)
    return _svg(width, height - 34 + AXIS, svg)


_KINDS = {"stat": _stat, "table": _table, "timeseries": _timeseries, "heatmap": _heatmap}


def screenshot(html, picture, width, height):
    """Take a picture of the page with a headless Chromium. Return False if there is none."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        return False
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += ["--hide-scrollbars", f"--user-data-dir={picture.parent / 'chromium'}"]
    subprocess.run(
        [
            chromium,
            *flags,
            f"--window-size={width},{height}",
            f"--screenshot={picture}",
            Path(html).as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    shutil.rmtree(picture.parent / "chromium", ignore_errors=True)
    return picture.is_file()


def shown(board):
    """Return the panels that have queries to Prometheus."""
    return [p for p in panels(board) if any("expr" in t for t in p.get("targets", []))]
