"""What an experiment found: rows of figures, each under the names of what it is a figure of."""

import html
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from steerkit import storage
from steerkit.errors import ReportError
from steerkit.evaluation.report import Estimate, Measure, data_frame, markdown

Cell: TypeAlias = str | int | float | Estimate | None
"""A figure with its 95 % interval, a number, a word, or nothing."""


@dataclass(frozen=True)
class Table:
    """What one experiment found; `table["kl"]` is a column, `print(table)` shows it."""

    title: str
    note: str
    """What a figure is, in which unit, and what the control is."""
    axes: tuple[str, ...]
    """What the first cells of a row name: a layer, a part, the concept or its control."""
    columns: tuple[str, ...]
    """What the other cells are figures of."""
    rows: tuple[tuple[Cell, ...], ...] = field(repr=False)

    def __getitem__(self, column: str) -> tuple[Cell, ...]:
        return tuple(row[self._place(column)] for row in self.rows)

    def __str__(self) -> str:
        cells = [[_shown(cell) for cell in row] for row in self.rows]
        return f"{self.title}\n\n{markdown((*self.axes, *self.columns), cells)}\n\n{self.note}"

    def only(self, **axes: Cell) -> "Table":
        """Return the rows whose axes have these values: `table.only(site="mlp")`.

        Raises:
            ReportError: no such axis, or no such row.
        """
        places = {self._place(axis): value for axis, value in axes.items()}
        rows = tuple(row for row in self.rows if all(row[place] == value for place, value in places.items()))
        if not rows:
            raise ReportError(f"Some row must have {axes}. Found none among {len(self.rows)}. Look at print(table).")
        return replace(self, rows=rows)

    def to_pandas(self) -> Any:
        """Return a data frame; an estimate becomes three columns, its value and the ends of its interval (low, high).

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        lines = []
        for row in self.rows:
            line: dict[str, Any] = {}
            for name, cell in zip((*self.axes, *self.columns), row, strict=True):
                line[name] = cell.value if isinstance(cell, Estimate) else cell
                if isinstance(cell, Estimate):
                    line[f"{name} low"], line[f"{name} high"] = cell.low, cell.high
            lines.append(line)
        return data_frame(lines)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return, and with `path` write, the table; an estimate is an object of value, low and high.

        Raises:
            ArtefactError: the file cannot be written.
        """
        text = json.dumps(
            {
                "steerkit": "table",
                "title": self.title,
                "note": self.note,
                "axes": self.axes,
                "columns": self.columns,
                "rows": [[_plain(cell) for cell in row] for row in self.rows],
            },
            indent=1,
        )
        if path is not None:
            storage.write_bytes(Path(path), text.encode())
        return text

    def _place(self, name: str) -> int:
        names = (*self.axes, *self.columns)
        if name not in names:
            raise ReportError(f"There is no column {name!r}. Found {', '.join(names)}. Choose one of them.")
        return names.index(name)


@dataclass(frozen=True)
class TokenTable(Table):
    """What a probe reads at each token and layer of one text; `html()` colours the text by it."""

    tokens: tuple[str, ...]
    layer: int
    """The layer that `html` shows unless told otherwise: the concept's best of those in the table."""

    def html(self, layer: int | None = None) -> str:
        """Return the text with each token coloured by the probability, blue above a half and red below: a fragment of a page.

        After steering a second line stands under the first. Numbers are in each token's tooltip; all text is escaped.

        Raises:
            ReportError: a layer that is not in the table.
        """
        here = self.only(layer=self.layer if layer is None else layer)
        lines = []
        for prefix in ("", "steered "):
            if f"{prefix}probability" in self.columns:
                figures = zip(self.tokens, here[f"{prefix}probability"], here[f"{prefix}logit"], strict=True)
                spans = "".join(_span(token, _float(p), _float(logit)) for token, p, logit in figures)
                lines.append(f'<p style="line-height:1.9;white-space:pre-wrap">{spans}</p>')
        return "".join(lines)


def estimate(values: Sequence[float] | Any, weights: Sequence[float] | Any = ()) -> Estimate:
    """Return the mean over texts, `sum w v / sum w`, with its 95 % interval by the bootstrap over texts."""
    return Measure(
        tuple(float(v) for v in values), tuple(range(len(values))), tuple(float(w) for w in weights)
    ).estimate


def _span(token: str, probability: float, logit: float) -> str:
    colour = "27,108,168" if probability >= 0.5 else "200,85,61"
    style = f"background:rgba({colour},{abs(2 * probability - 1):.2f})"
    return f'<span style="{style}" title="{probability:.3f} (logit {logit:.2f})">{html.escape(token)}</span>'


def _float(cell: Cell) -> float:
    assert isinstance(cell, int | float)
    return float(cell)


def _shown(cell: Cell) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def _plain(cell: Cell) -> Any:
    """Return a cell as JSON knows it, which has no NaN."""
    if isinstance(cell, Estimate):
        return {key: _plain(value) for key, value in cell._asdict().items()}
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell
