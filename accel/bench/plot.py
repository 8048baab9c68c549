"""A picture of where the time goes: bars by operator beside their floor, and the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidFile, SwitchyardError
from .results import Document, case_key, title
from .run import ENGINE, step_ms
from .variants import BASELINES

INCHES, DPI = 16.0, 100  # 1600 pixels wide
ROW_INCHES = 6.4


@dataclass(frozen=True)
class Style:
    """How operators of a kind are drawn."""

    title: str
    colour: str
    marker: str
    ops: tuple[str, ...] = ()


# Okabe and Ito's colours, which colour-blind people tell apart; markers say the same once more.
STYLES = (
    Style("convolution", "#0072B2", "o", ("conv2d",)),
    Style("linear", "#E69F00", "s", ("linear",)),
    Style("attention", "#009E73", "^", ("attention",)),
    Style("GroupNorm", "#CC79A7", "D", ("group_norm", "concat_group_norm")),
    Style("LayerNorm", "#56B4E9", "v", ("layer_norm", "add_layer_norm")),
    Style(
        "pointwise",
        "#D55E00",
        "P",
        ("pointwise", "add", "mul", "silu", "gelu", "cast", "residual_add"),
    ),
    Style("other", "#8A8A8A", "X"),
)
BASELINE_COLOUR = "#C9CCD1"
INK, QUIET = "#222222", "#6B6B6B"
LABELS = 4
"""Points of a roofline that get their name: those with the largest gap."""


def require_matplotlib() -> Any:
    """Its figure class. Raises `SwitchyardError` where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SwitchyardError("a picture needs matplotlib: pip install matplotlib") from None
    return Figure


def plot(document: Document, path: Path) -> None:
    """Draw every table of operators of a document, one below the other, into a PNG.

    Raises `InvalidFile` for a document without such a table, `SwitchyardError` without matplotlib.
    """
    figure_class = require_matplotlib()
    tables = document.get("ops") or []
    if not tables:
        raise InvalidFile("there is no table of operators to draw: measure with --ops or --plot")
    figure = figure_class(figsize=(INCHES, ROW_INCHES * len(tables)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(tables), 2, squeeze=False, width_ratios=(1.15, 1))
    for (left, right), table in zip(axes, tables, strict=True):
        _bars(left, table, [row for row in document["rows"] if case_key(row) == case_key(table)])
        _roofline(right, table, _ceilings(document, table))
    _legend(figure, tables)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, hspace=0.05)
    meta = document["meta"]
    figure.suptitle(
        f"{meta.get('gpu')}, commit {meta.get('commit')}, {meta.get('date')}",
        fontsize=12,
        color=QUIET,
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=DPI, format="png")


def _ceilings(document: Document, table: Mapping[str, Any]) -> Mapping[str, float]:
    """Those of the run that the table is from."""
    runs = document["meta"].get("runs") or []
    number = table.get("run", 0)
    found: Mapping[str, float] = (
        runs[number]["ceilings"] if number < len(runs) else document["ceilings"]
    )
    return found


def _style(op: str) -> Style:
    return next((style for style in STYLES if op in style.ops), STYLES[-1])


def _bars(axes: Any, table: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Stacked milliseconds by operator: the floor, the engine's kernels; then whole forwards."""
    stacks = [
        ("floor", _stack(table, "floor_us")),
        ("engine's kernels,\neach by itself", _stack(table, "us")),
    ]
    totals = [
        (row["variant"], value)
        for name in (ENGINE, *reversed(BASELINES))
        for row in rows
        if row["variant"] == name and (value := step_ms(row)) is not None
    ]
    longest = max([sum(stack.values()) for _, stack in stacks] + [ms for _, ms in totals])
    names, place = [], 0.0
    for name, stack in stacks:
        start = 0.0
        for style, ms in stack.items():
            axes.barh(place, ms, left=start, height=0.62, color=style.colour, edgecolor="white")
            text = _ms(ms)
            if ms > 0.014 * len(text) * longest:
                axes.text(start + ms / 2, place, text, **_inside(style.colour))
            start += ms
        _total(axes, start, place, longest)
        names.append((place, name))
        place += 1
    place += 0.35
    for name, ms in totals:
        colour = INK if name == ENGINE else BASELINE_COLOUR
        axes.barh(place, ms, height=0.62, color=colour)
        _total(axes, ms, place, longest)
        names.append((place, "engine, a step" if name == ENGINE else name))
        place += 1
    axes.set_yticks([at for at, _ in names], [name for _, name in names], fontsize=12)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.14)
    axes.set_xlabel("milliseconds a forward", fontsize=12)
    axes.set_title(_case_title(table), loc="left", fontsize=15, color=INK)
    _plain(axes, "x")


def _stack(table: Mapping[str, Any], what: str) -> dict[Style, float]:
    """Milliseconds by style, in the styles' order."""
    sums: dict[Style, float] = {}
    for style in STYLES:
        ms = sum(g[what] for g in table["operators"] if _style(g["op"]) is style) / 1e3
        if ms:
            sums[style] = ms
    return sums


def _roofline(axes: Any, table: Mapping[str, Any], ceilings: Mapping[str, float]) -> None:
    """Arithmetic intensity against the rate reached; each point a distinct call."""
    peak, bandwidth = ceilings["matmul_tflops"], ceilings["copy_tbps"]
    points = [
        (call, call["flops"] / call["bytes"], call["flops"] / call["us"] / 1e6)
        for call in table["calls"]
        if call["flops"] and call["us"]
    ]
    axes.set_xscale("log")
    axes.set_yscale("log")
    ridge = peak / bandwidth
    lowest = min([x for _, x, _ in points] + [ridge / 10]) / 1.6
    highest = max([x for _, x, _ in points] + [ridge * 10]) * 1.6
    axes.plot(
        [lowest, ridge, highest], [lowest * bandwidth, peak, peak], color=QUIET, linewidth=1.5
    )
    axes.text(
        highest / 1.1, peak * 1.07, f"{_number(peak)} TFLOP/s, matrix product", **_note("right")
    )
    axes.text(
        ridge / 8, ridge / 8 * bandwidth * 1.3, f"{_number(bandwidth)} TB/s, copy", **_note("right")
    )
    for style in STYLES:
        own = [point for point in points if _style(point[0]["op"]) is style]
        if own:
            axes.scatter(
                [x for _, x, _ in own],
                [y for _, _, y in own],
                s=[30 + 900 * (call["share"] or 0.0) for call, _, _ in own],
                color=style.colour,
                marker=style.marker,
                alpha=0.75,
                edgecolor="white",
                linewidth=0.6,
            )
    gaps = sorted(points, key=lambda point: -point[0]["gap_us"])
    for number, (_, x, y) in enumerate(gaps[:LABELS], start=1):
        axes.annotate(
            str(number),
            (x, y),
            xytext=(10, -26),
            textcoords="offset points",
            fontsize=11,
            fontweight="bold",
            color=INK,
            arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.8, "shrinkB": 0},
        )
    lines = [
        f"{number}  {_style(call['op']).title} {call['shape']}: {call['gap_us'] / 1e3:.2f} ms"
        for number, (call, _, _) in enumerate(gaps[:LABELS], start=1)
    ]
    axes.text(
        0.985,
        0.03,
        "\n".join(["largest gaps of these to their floor, ms a forward", *lines]),
        transform=axes.transAxes,
        fontsize=10.5,
        ha="right",
        va="bottom",
        multialignment="left",
        color=INK,
        linespacing=1.4,
    )
    axes.set_xlim(lowest, highest)
    # Room at the bottom for the list of gaps.
    top = peak * 1.8
    low = min([y for _, _, y in points] + [lowest * bandwidth]) / 1.5
    axes.set_ylim(low * (low / top) ** 0.35, top)
    axes.set_xlabel("arithmetic intensity, FLOP per byte", fontsize=12)
    axes.set_ylabel("TFLOP/s reached", fontsize=12)
    axes.set_title("Roofline (area: share of the time)", loc="left", fontsize=15, color=INK)
    _plain(axes, "both")


def _case_title(table: Mapping[str, Any]) -> str:
    return f"{title(table)}, batch {table['batch']}, {table['precision']}"


def _legend(figure: Any, tables: Sequence[Mapping[str, Any]]) -> None:
    """One for bars and points: colours and markers mean the same in both."""
    from matplotlib.lines import Line2D

    used = {_style(group["op"]) for table in tables for group in table["operators"]}
    handles = [
        Line2D([], [], color=s.colour, marker=s.marker, linestyle="", markersize=9, label=s.title)
        for s in STYLES
        if s in used
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=12, frameon=False
    )


def _total(axes: Any, ms: float, place: float, longest: float) -> None:
    axes.text(ms + 0.01 * longest, place, f"{_ms(ms)} ms", va="center", fontsize=12, color=INK)


def _inside(colour: str) -> dict[str, Any]:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 150
    return {
        "ha": "center",
        "va": "center",
        "fontsize": 11,
        "color": INK if light else "white",
    }


def _note(side: str) -> dict[str, Any]:
    return {"ha": side, "fontsize": 11, "color": QUIET}


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.3g}"


def _plain(axes: Any, grid: str) -> None:
    """No frame, a light grid behind the data."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid, color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11, colors=INK)
