"""Figures of what steering did; the only door to matplotlib. Each returns a figure and shows or saves nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steerkit.concepts.concept import Concept
from steerkit.errors import MissingDependencyError
from steerkit.evaluation.comparison import Comparison
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
    for concept, colour in zip(concepts, _COLOURS, strict=False):
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
    for axes, (name, old), colour in zip(grid.flat, before.items(), _COLOURS, strict=False):
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
    for (name, (means, errors)), colour in zip(lines.items(), _COLOURS, strict=False):
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
