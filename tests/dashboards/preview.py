# SPDX-License-Identifier: Apache-2.0
"""Draws dashboards as one HTML page, from what their queries really gave. This is not Grafana.

``make preview``: the fleet test asks Prometheus what each panel asks, this draws the answers, and a
headless Chromium takes the pictures.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

from dashboards.reading import panels

CELL, GAP, LINE = 52, 8, 34
"""Pixels: a column of Grafana's grid, the gap between panels, a row of the grid."""
COLOURS = ["#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#705da0"]
NAMED = {
    "green": "#73bf69",
    "yellow": "#f2cc0c",
    "red": "#f2495c",
    "dark-red": "#a3142b",
    "blue": "#5794f2",
    "purple": "#b877d9",
    "text": "#d8d9da",
}
STYLE = """
body { background: #111217; color: #d8d9da; font: 13px/1.35 system-ui, sans-serif; margin: 16px; }
h1 { font-size: 20px; } p { color: #9fa3a8; max-width: 60rem; }
.board { position: relative; width: 1248px; margin-bottom: 40px; }
.panel { position: absolute; background: #181b1f; border: 1px solid #2c3235; border-radius: 3px;
  box-sizing: border-box; padding: 6px 8px; overflow: hidden; }
.row { position: absolute; font-weight: 600; padding: 6px 0; }
.title { font-weight: 500; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.stat { font-size: 30px; white-space: nowrap; text-align: center; padding-top: 28px; }
.none { color: #9fa3a8; text-align: center; padding-top: 30px; }
.legend { color: #9fa3a8; font: 11px/15px system-ui; max-height: 30px; overflow: hidden; }
.legend span { white-space: nowrap; display: inline-block; }
.legend i { display: inline-block; width: 10px; height: 3px; margin: 0 4px 3px 8px; }
table { border-collapse: collapse; width: 100%; font-size: 12px; }
td, th { text-align: left; padding: 3px 8px; border-bottom: 1px solid #2c3235; }
text { fill: #9fa3a8; font-size: 10px; }
"""


def page(boards, answers):
    """The whole page.

    Args:
        boards: {file name: dashboard}.
        answers: {file name: {panel's id: [(target, [(labels, [(time, value)])])]}}.
    """
    drawn = "".join(_board(board, answers[name]) for name, board in boards.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Dashboards, drawn</title>'
        f"<style>{STYLE}</style><h1>Dashboards, drawn from real query results</h1>"
        "<p>Each panel's own queries, answered by a real Prometheus that a fleet of simulated "
        "calls fed; the rules ran ten times faster than shipped, so the time shown is some "
        "two minutes. This is a drawing of the answers: no Grafana took part, so colours, axes and "
        f"layout are near to Grafana's and not the same.</p>{drawn}</html>"
    )


def repeated(board, names):
    """The dashboard as Grafana shows it: a panel that is repeated is there once per name, and what
    is below it is further down.
    """
    made, down = [], 0
    for panel in board["panels"]:
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
    """Pixels that the dashboard needs, its titles included."""
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    return bottom * LINE + 230


def _board(board, answers):
    width, made, bottom = CELL * 24, [], 0
    for panel in board["panels"]:
        at = panel["gridPos"]
        place = f"left:{at['x'] * CELL}px;top:{at['y'] * LINE}px;width:{at['w'] * CELL - GAP}px"
        bottom = max(bottom, (at["y"] + at["h"]) * LINE)
        if panel["type"] == "row":
            folded = " (folded)" if panel.get("collapsed") else ""
            made.append(f'<div class="row" style="{place}">{escape(panel["title"])}{folded}</div>')
            continue
        size = (at["w"] * CELL - GAP - 18, at["h"] * LINE - GAP - 12)
        body = draw(panel, answers.get(panel["id"], []), *size)
        title = panel["title"]
        made.append(
            f'<div class="panel" style="{place};height:{at["h"] * LINE - GAP}px" '
            f'title="{escape(panel["description"])}"><div class="title">{escape(title)}</div>'
            f"{body}</div>"
        )
    title = f"<h1>{escape(board['title'])}</h1><p>{escape(board['description'])}</p>"
    return (
        f'{title}<div class="board" style="width:{width}px;height:{bottom}px">{"".join(made)}</div>'
    )


def draw(panel, answers, width, height):
    """One panel's inside."""
    series = [
        (_name(target, labels), points, target)
        for target, found in answers
        for labels, points in found
        if any(not math.isnan(value) for _, value in points)
    ]
    if not series:
        return f'<div class="none">{escape(panel["fieldConfig"]["defaults"]["noValue"])}</div>'
    return _KINDS[panel["type"]](panel, series, width, height)


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
    """Colour and dash that the panel sets for that series."""
    colour, dashed = None, False
    for override in panel["fieldConfig"]["overrides"]:
        if override["matcher"]["options"] == name:
            for setting in override["properties"]:
                if setting["id"] == "color":
                    colour = NAMED.get(setting["value"]["fixedColor"])
                dashed |= setting["id"] == "custom.lineStyle"
    return colour, dashed


def _timeseries(panel, series, width, height):
    settings = panel["fieldConfig"]["defaults"]
    stacked = settings["custom"].get("stacking", {}).get("mode") == "normal"
    left, foot = 52, 62
    plot = (width - left, height - foot)
    times = sorted({at for _, points, _ in series for at, _ in points})
    span = max(times[-1] - times[0], 1)
    lines, base = [], dict.fromkeys(times, 0.0)
    for place, (name, points, _) in enumerate(series):
        colour, dashed = _looks(panel, name)
        found = {at: value for at, value in points if not math.isnan(value)}
        lower = dict(base)
        if stacked and not dashed:
            base = {at: base[at] + found.get(at, 0.0) for at in times}
            found = base
        lines.append((name, colour or COLOURS[place % len(COLOURS)], dashed, dict(found), lower))
    top = max((v for _, _, _, found, _ in lines for v in found.values()), default=0) or 1

    def xy(at, value):
        x, y = left + (at - times[0]) / span * plot[0], plot[1] - value / top * (plot[1] - 8)
        return f"{x:.1f},{y:.1f}"

    svg = [
        f'<text x="0" y="{plot[1] - part * (plot[1] - 8):.0f}">'
        f"{_value(top * part, settings['unit'])}</text>"
        for part in (0, 0.5, 1)
    ]
    for _, colour, dashed, found, lower in reversed(lines):
        path = " ".join(xy(at, value) for at, value in sorted(found.items()))
        if stacked and not dashed:
            under = " ".join(xy(at, lower[at]) for at in sorted(found, reverse=True))
            svg.append(f'<polygon points="{path} {under}" fill="{colour}" opacity=".7"/>')
        dash = ' stroke-dasharray="6 5"' if dashed else ""
        svg.append(f'<polyline points="{path}" fill="none" stroke="{colour}"{dash}/>')
    legend = " ".join(
        f'<span><i style="background:{c}"></i>{escape(n)}</span>' for n, c, *_ in lines
    )
    return (
        f'<svg width="{width}" height="{height - foot + 6}">{"".join(svg)}</svg>'
        f'<div class="legend">{legend}</div>'
    )


def _heatmap(_panel, series, width, height):
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
        svg.append(f'<text x="0" y="{y + high - 2:.0f}">{escape(name)}</text>')
        svg += [
            f'<rect x="{46 + n * wide:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high - 1:.1f}" '
            f'fill="#ff9830" opacity="{0.1 + 0.9 * here[at] / most:.2f}"/>'
            for n, at in enumerate(times)
            if here[at] > 0
        ]
    return f'<svg width="{width}" height="{height - 30}">{"".join(svg)}</svg>'


_KINDS = {"stat": _stat, "table": _table, "timeseries": _timeseries, "heatmap": _heatmap}


def screenshot(html, picture, width, height):
    """A picture of the page by a headless Chromium; False where there is none."""
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
    """The panels that have queries to Prometheus."""
    return [p for p in panels(board) if any("expr" in t for t in p.get("targets", []))]
