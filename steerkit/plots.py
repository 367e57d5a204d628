"""Figures of what steering did; the only door to matplotlib. Each returns a figure and shows or saves nothing."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from steerkit.concepts.concept import Concept
from steerkit.errors import MissingDependencyError, ReportError
from steerkit.evaluation.comparison import Comparison
from steerkit.evaluation.report import Estimate
from steerkit.experiments.table import Table
from steerkit.gapo.front import Front

_INK, _PALE = "#22313f", "#d9dee3"
_COLOURS = ("#1b6ca8", "#c8553d", "#588157", "#7b2d8b")
_MARKS = "osD^vPX"


def require() -> Any:
    """Return matplotlib's figure: for whoever has long work to do before drawing.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "Figures need matplotlib. It is not installed. Run: pip install 'steerkit-sdk[plots]'."
        ) from error
    return Figure


def _figure(width: float, height: float, **kwargs: Any) -> Any:
    """Return a figure that belongs to no window, and its axes."""
    Figure = require()
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**kwargs)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_PALE)
    axes.tick_params(colors=_INK, labelsize=9)


def accuracy_by_layer(concepts: Sequence[Concept]) -> Any:
    """Plot each concept's held-out accuracy by layer with its 95 % interval; dots mark the steering layers."""
    figure, axes = _figure(8.4, 3.2)
    for concept, colour in zip(concepts, cycle(_COLOURS)):
        layers = list(concept.layers)
        figures = [concept.figures[layer] for layer in layers]
        low, high = ([one.accuracy_interval[side] for one in figures] for side in (0, 1))
        axes.fill_between(layers, low, high, color=colour, alpha=0.13, linewidth=0)
        axes.plot(layers, [one.accuracy for one in figures], color=colour, linewidth=1.8, label=concept.name)
        chosen = concept.steering_layers
        axes.plot(chosen, [concept.accuracy[layer] for layer in chosen], "o", color=colour, markersize=4.5)
    axes.axhline(0.5, color=_INK, linewidth=0.8, linestyle=":")
    axes.annotate("chance", (layers[-1], 0.5), textcoords="offset points", xytext=(0, 4), ha="right", fontsize=8)
    axes.set(xlabel="layer (decoder block)", ylabel="held-out accuracy", ylim=(0.3, 1.02), xlim=(layers[0], layers[-1]))
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    _tidy(axes)
    return figure


def magnitudes_by_token(
    rows: Sequence[Mapping[int, Tensor]],
    tokens: Sequence[Sequence[str]],
    norms: Mapping[int, float],
    titles: Sequence[str],
) -> Any:
    """Plot what each row received, tokens × layers, as a share of the residual norm; white is untouched.

    Args:
        rows: for each row `{layer: "pos"}`, signed magnitudes.
        tokens: the token at each position that is shown.
        norms: mean norm of the residual stream by layer.
        titles: one a row.
    """
    columns = 2
    lines = (len(rows) + columns - 1) // columns
    figure, grid = _figure(12.5, 0.6 + 2.15 * lines, nrows=lines, ncols=columns, squeeze=False)
    layers = sorted(rows[0])
    shares = [torch.stack([row[layer] / norms[layer] for layer in layers]) for row in rows]
    top = max(float(share.abs().max()) for share in shares) or 1.0
    image = None
    for index, axes in enumerate(grid.flat):
        if index >= len(rows):
            axes.set_axis_off()
            continue
        image = axes.imshow(shares[index].numpy(), aspect="auto", origin="lower", cmap="RdBu", vmin=-top, vmax=top)
        axes.set_title(titles[index], fontsize=8.5, color=_INK, loc="left")
        axes.set_xticks(range(len(tokens[index])), tokens[index], rotation=60, ha="right", fontsize=6.5)
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=6.5)
        if index % columns == 0:
            axes.set_ylabel("layer", fontsize=8)
        _tidy(axes)
    bar = figure.colorbar(image, ax=grid, shrink=0.5, aspect=30, pad=0.01)
    bar.set_label("magnitude / residual norm", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def readings(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], labels: Sequence[str]) -> Any:
    """Plot what each concept's probe reads of every row's text before and after steering."""
    figure, grid = _figure(8.4, 0.8 + 0.3 * len(labels), ncols=len(before), squeeze=False, sharey=True)
    for axes, (name, old), colour in zip(grid.flat, before.items(), cycle(_COLOURS)):
        new = after[name]
        for place, (start, end) in enumerate(zip(old, new, strict=True)):
            axes.annotate(
                "", (end, place), (start, place), arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.4}
            )
        axes.plot(old, range(len(old)), "o", color=_PALE, markeredgecolor=_INK, markersize=6, label="unsteered")
        axes.plot(new, range(len(new)), "o", color=colour, markersize=6, label="steered")
        axes.set(xlim=(-0.03, 1.03), xlabel=f"P({name}) of the text", ylim=(len(old) - 0.4, -0.6))
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.legend(frameon=False, fontsize=8, loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.12))
        _tidy(axes)
    return figure


def dose_response(
    magnitudes: Sequence[float], lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], unit: str
) -> Any:
    """Plot an effect against the magnitude, one line a vector, with its standard errors."""
    figure, axes = _figure(8.4, 3.2)
    for (name, (means, errors)), colour in zip(lines.items(), cycle(_COLOURS)):
        axes.errorbar(magnitudes, means, errors, color=colour, marker="o", markersize=4, capsize=3, label=name)
    axes.axhline(0, color=_PALE, linewidth=1, zorder=0)
    axes.set_xticks(list(magnitudes))
    axes.set_xlabel("magnitude", color=_INK)
    axes.set_ylabel(unit, color=_INK)
    axes.legend(frameon=False)
    _tidy(axes)
    return figure


def front(found: Front, first: int = 0, second: int = 1) -> Any:
    """Plot two objectives of a front; filled points are not dominated, and a line joins them."""
    figure, axes = _figure(5.6, 4.2)
    points = sorted(zip(found.values, found.names, found.dominated(), strict=True))
    kept = [(value[first], value[second]) for value, _, beaten in points if not beaten]
    axes.plot(*zip(*sorted(kept), strict=True), color=_COLOURS[0], linewidth=1.2, zorder=1)
    for value, name, beaten in points:
        x, y = value[first], value[second]
        axes.plot(x, y, "o", color=_COLOURS[0], markerfacecolor="white" if beaten else _COLOURS[0], markersize=6)
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, 4), fontsize=8, color=_INK)
    axes.set(xlabel=found.objectives[first], ylabel=found.objectives[second])
    _tidy(axes)
    return figure


def comparison(found: Comparison) -> Any:
    """Plot the effect of each method against the KL that it spent, both with 95 % intervals; a method's points are joined."""
    figure, axes = _figure(8.4, 4.6)
    effects, spent = found.effects(), found.spent()
    for place, (method, by_budget) in enumerate(effects.items()):
        points = sorted((spent[method][budget], effect) for budget, effect in by_budget.items())
        x, y = ([point[side].value for point in points] for side in (0, 1))
        errors = [
            [
                [max(p[side].value - p[side].low, 0) for p in points],
                [max(p[side].high - p[side].value, 0) for p in points],
            ]
            for side in (0, 1)
        ]
        control = method in ("random direction", "shuffled labels")
        style = {
            "color": "#8b95a0" if control else _COLOURS[place % len(_COLOURS)],
            "marker": _MARKS[place % len(_MARKS)],
        }
        axes.errorbar(x, y, errors[1], errors[0], label=method, markersize=5, linewidth=1.1, capsize=2, **style)
    axes.axhline(0, color=_PALE, linewidth=1, zorder=0)
    axes.set(xlabel="KL from the unsteered model, nats a token", ylabel=f"{found.goal}, against unsteered")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _tidy(axes)
    return figure


def layers(table: Table, *columns: str, axis: str = "layer") -> Any:
    """Plot an experiment's figures by layer, one line for each of its other axes, with 95 % intervals; controls are grey.

    Args:
        table: what an experiment returned; rows without a number on the axis are left out.
        columns: which figures, of one unit; by default all that are numbers.
        axis: what lies along the page.

    Raises:
        ReportError: no such column, or no numbers along the axis.
    """
    chosen = _chosen(table, columns)
    others = [name for name in table.axes if name != axis]
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for row, place in enumerate(table[axis]):
        words = [str(table[name][row]) for name in others]
        for column in chosen:
            label = ", ".join(words + [column] * (len(chosen) > 1 or not words))
            if isinstance(place, int | float) and _finite(table[column][row]):
                lines.setdefault(label, []).append((float(place), _interval(table[column][row])))
    if not lines:
        raise ReportError(f"A line needs numbers along {axis!r}. Found none. Use plots.bars.")
    figure, axes = _figure(8.4, 3.4)
    colours, dashes = iter(_COLOURS * len(lines)), iter(["--", ":", "-."] * len(lines))
    for label, points in lines.items():
        control = _control(label)
        colour, style = ("#8b95a0", next(dashes)) if control else (next(colours), "-")
        x, y = [place for place, _ in points], [found.value for _, found in points]
        axes.fill_between(
            x, [p.low for _, p in points], [p.high for _, p in points], color=colour, alpha=0.13, linewidth=0
        )
        axes.plot(x, y, color=colour, linestyle=style, marker="o", markersize=3, label=label)
    axes.set(xlabel=axis, ylabel=", ".join(chosen) if len(chosen) < 3 else "")
    axes.set_title(table.title, fontsize=9, color=_INK, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _tidy(axes)
    return figure


def matrix(table: Table, column: str, *, down: str, across: str, labels: Sequence[str] | None = None) -> Any:
    """Plot one figure of an experiment as a heat map, one axis down and one across; `labels` stand for the places across.

    A probability is centred at a half, what has both signs at 0.
    """
    rows, places = (list(dict.fromkeys(table[axis])) for axis in (down, across))
    values = torch.full((len(rows), len(places)), float("nan"))
    for y, x, cell in zip(table[down], table[across], table[column], strict=True):
        if _finite(cell):
            values[rows.index(y), places.index(x)] = _interval(cell).value
    figure, axes = _figure(2.5 + 0.32 * len(places), 1.6 + 0.2 * len(rows))
    known = values[values.isfinite()]
    centre = 0.5 if "probability" in column else 0.0
    reach = 0.5 if centre else float(known.abs().max()) or 1.0
    low = centre - reach if centre or bool((known < 0).any()) else 0.0
    colours = "RdBu" if low < 0 or centre else "Blues"
    image = axes.imshow(values.numpy(), aspect="auto", origin="lower", cmap=colours, vmin=low, vmax=centre + reach)
    axes.set_xticks(range(len(places)), list(labels or map(str, places)), rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(rows)), [str(row) for row in rows], fontsize=7)
    axes.set(xlabel=across, ylabel=down)
    axes.set_title(table.title, fontsize=9, color=_INK, loc="left")
    figure.colorbar(image, ax=axes, shrink=0.8).set_label(column, fontsize=8)
    _tidy(axes)
    return figure


def bars(table: Table, *columns: str, label: str | None = None) -> Any:
    """Plot an experiment's rows one under the other, a bar a figure with its 95 % interval; controls are grey.

    Args:
        table: what an experiment returned.
        columns: which figures, of one unit; by default all that are numbers.
        label: the column that names the rows; by default their axes.
    """
    chosen = _chosen(table, columns)
    names = [
        repr(table[label][row]) if label else ", ".join(str(table[axis][row]) for axis in table.axes)
        for row in range(len(table.rows))
    ]
    figure, axes = _figure(7.2, 0.9 + 0.16 * len(names) * (len(chosen) + 0.6))
    height = 0.8 / len(chosen)
    colours = iter(_COLOURS * len(chosen))
    for index, column in enumerate(chosen):
        colour = "#c3cad1" if _control(column) else next(colours)
        found = [(row + index * height, _interval(cell)) for row, cell in enumerate(table[column]) if _finite(cell)]
        places, points = [place for place, _ in found], [point for _, point in found]
        errors = [[max(p.value - p.low, 0) for p in points], [max(p.high - p.value, 0) for p in points]]
        axes.barh(places, [p.value for p in points], height, color=colour, label=column, xerr=errors, ecolor=_INK)
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(table.title, fontsize=9, color=_INK, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _tidy(axes)
    return figure


def _chosen(table: Table, columns: tuple[str, ...]) -> tuple[str, ...]:
    return columns or tuple(name for name in table.columns if any(_finite(cell) for cell in table[name]))


def _control(label: str) -> bool:
    """Tell whether a figure is an experiment's control, by the words that stand for one."""
    return not {"random", "shuffled", "nothing", "even", "chance"}.isdisjoint(re.findall(r"\w+", label))


def _finite(cell: Any) -> bool:
    return isinstance(cell, int | float | Estimate) and math.isfinite(_interval(cell).value)


def _interval(cell: Any) -> Estimate:
    """Return a figure with its interval; a number, and one text's figure, has none."""
    if isinstance(cell, Estimate):
        return cell if math.isfinite(cell.low) else Estimate(cell.value, cell.value, cell.value)
    return Estimate(float(cell), float(cell), float(cell))
