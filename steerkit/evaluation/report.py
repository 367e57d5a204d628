"""What was measured, with intervals: rows kept, so that every figure and every comparison can be computed anew.

Rows of one prompt are not independent, so intervals resample prompts (clusters), never rows; arms of one report are of the
same prompts, so that they are compared prompt by prompt.
"""

import base64
import hashlib
import html
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from steerkit import storage
from steerkit.errors import ArtefactError, MissingDependencyError, ReportError
from steerkit.types import Text

_ROUNDS = 2000

_Kind = Literal["effect", "damage"]
_Shown = Literal["mean", "exp", "p90"]


class Estimate(NamedTuple):
    """A figure and its 95 % interval; the interval is NaN where one prompt alone was measured."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Measure:
    """One figure of every row.

    The mean over rows is weighted, `sum w v / sum w`: a mean over tokens where the weights are numbers of tokens.
    """

    values: tuple[float, ...] = field(repr=False)
    clusters: tuple[int, ...] = field(repr=False)
    """Which prompt, question or text each row belongs to."""
    weights: tuple[float, ...] = field(default=(), repr=False)
    kind: _Kind = "effect"
    shown: _Shown = "mean"
    """`exp`: the mean is of logarithms, and shown as a ratio (perplexity). `p90`: the 90th percentile over rows."""
    source: str = field(default="", repr=False)
    """Digest of what the clusters stand for: measures of other texts cannot be compared."""

    def __post_init__(self) -> None:
        counts = {len(self.values), len(self.clusters), len(self.weights) or len(self.values)}
        numbers = all(_number(value) for value in (*self.values, *self.weights))
        whole = all(isinstance(each, int) and not isinstance(each, bool) for each in self.clusters)
        if len(counts) != 1 or not self.values or not numbers or not whole or any(w <= 0 for w in self.weights):
            raise ReportError(
                "A measure needs a finite value, a cluster's number and a positive weight for every row. Found "
                f"{len(self.values)} values, {len(self.clusters)} clusters, {len(self.weights)} weights."
            )
        if self.kind not in get_args(_Kind) or self.shown not in get_args(_Shown):
            raise ReportError(f"A measure's kind and form are known words. Found {self.kind!r} and {self.shown!r}.")

    def __len__(self) -> int:
        return len(self.values)

    @property
    def estimate(self) -> Estimate:
        """The figure and its interval by the bootstrap over clusters."""
        return self._interval(self._means(None), self._means(_picks(len(self._names))))

    def against(self, other: "Measure") -> Estimate:
        """Return the difference from another arm, paired by cluster; of perplexities the ratio.

        Raises:
            ReportError: measures of other prompts.
        """
        if self._names != other._names or (self.shown, self.source) != (other.shown, other.source):
            raise ReportError(
                f"Measures are compared prompt by prompt. Found {len(self._names)} and {len(other._names)} prompts, which are "
                "not the same. Evaluate both on one list of prompts."
            )
        picks = _picks(len(self._names))
        return self._interval(self._means(None) - other._means(None), self._means(picks) - other._means(picks))

    def _interval(self, value: Any, draws: Any) -> Estimate:
        change = _ratio if self.shown == "exp" else float
        if len(self._names) == 1:
            return Estimate(change(value[0]), math.nan, math.nan)
        low, high = np.quantile(draws, [0.025, 0.975])
        return Estimate(change(value[0]), change(low), change(high))

    @property
    def _names(self) -> list[int]:
        return sorted(set(self.clusters))

    def _means(self, picks: Any) -> Any:
        """Return the figure for each row of `picks`, `"round cluster"`; for the clusters as they are without."""
        values, weights = np.array(self.values), np.array(self.weights or (1.0,) * len(self))
        _, place = np.unique(self.clusters, return_inverse=True)
        count = int(place.max()) + 1
        picks = np.arange(count)[None] if picks is None else picks
        if self.shown == "p90":
            width = int(np.bincount(place).max())
            rows = np.full((count, width), np.nan)
            seen = np.zeros(count, dtype=int)
            for at, value in zip(place, values, strict=True):
                rows[at, seen[at]] = value
                seen[at] += 1
            quantile = np.nanquantile if np.isnan(rows).any() else np.quantile
            return quantile(rows[picks].reshape(len(picks), -1), 0.9, axis=1)
        sums = np.bincount(place, weights * values, count)[picks].sum(axis=1)
        totals = np.bincount(place, weights, count)[picks].sum(axis=1)
        return sums / totals


def _number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _ratio(logarithm: float) -> float:
    return math.exp(logarithm) if logarithm < 700 else math.inf


def digest(texts: Sequence[Text]) -> str:
    """Return what tells one list of texts from another."""
    plain = [text if isinstance(text, str) else [dict(message) for message in text] for text in texts]
    return hashlib.sha256(json.dumps(plain, default=str).encode()).hexdigest()[:16]


def _picks(clusters: int) -> Any:
    """Return which clusters each round of the bootstrap draws: the same for measures of as many, so arms are paired."""
    return np.random.default_rng(0).integers(clusters, size=(_ROUNDS, clusters))


@dataclass(frozen=True)
class Arm:
    """One way to run the model: what it wrote after each prompt, and its measures."""

    measures: Mapping[str, Measure]
    prompts: tuple[str, ...] = field(default=(), repr=False)
    """By row: a prompt with several samples stands several times."""
    completions: tuple[str, ...] = field(default=(), repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, measure: str) -> Estimate:
        if measure not in self.measures:
            raise ReportError(f"There is no measure {measure!r}. Found {', '.join(self.measures)}. Choose one of them.")
        return self.measures[measure].estimate


@dataclass(frozen=True)
class Report:
    """Arms of one evaluation by name, `report["steered"]["sentiment"]` an estimate. Made by `evaluate`; frozen.

    Example:
        plain = evaluate(model, tokenizer, prompts, scorers=scorers)
        with Controller(model, [sentiment.constrain(at_least=0.9)]):
            steered = evaluate(model, tokenizer, prompts, scorers=scorers, name="steered")
        report = Report.join(plain, steered)
        print(report.table(base="unsteered"))
    """

    arms: Mapping[str, Arm]

    @classmethod
    def join(cls, *reports: "Report") -> "Report":
        """Return one report of all arms.

        Raises:
            ReportError: no report, or two arms of one name.
        """
        arms: dict[str, Arm] = {}
        for report in reports:
            for name, arm in report.arms.items():
                if name in arms:
                    raise ReportError(
                        f"Arms of one report need names of their own. Found {name!r} twice. Pass name= to evaluate."
                    )
                arms[name] = arm
        if not arms:
            raise ReportError("A report needs an arm. Found none. Pass what evaluate returned.")
        return cls(arms)

    def __getitem__(self, arm: str) -> Arm:
        if arm not in self.arms:
            raise ReportError(f"There is no arm {arm!r}. Found {', '.join(self.arms)}. Choose one of them.")
        return self.arms[arm]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arms)

    def __len__(self) -> int:
        return len(self.arms)

    def __repr__(self) -> str:
        return f"Report(arms={list(self.arms)}, measures={self.measures})"

    @property
    def measures(self) -> list[str]:
        """Names of all measures, in order."""
        return list(dict.fromkeys(name for arm in self.arms.values() for name in arm.measures))

    def difference(self, measure: str, arm: str, base: str) -> Estimate:
        """Return what an arm changes against another, paired by prompt; of perplexities the ratio.

        Raises:
            ReportError: no such arm or measure, or arms of other prompts.
        """
        found = []
        for name in (arm, base):
            self[name][measure]
            found.append(self[name].measures[measure])
        return found[0].against(found[1])

    def figures(self, base: str | None = None) -> dict[str, dict[str, Estimate]]:
        """Return every estimate by arm and measure; with `base`, differences from that arm."""
        if base is not None:
            self[base]
        return {
            name: {
                measure: arm[measure] if base is None else self.difference(measure, name, base)
                for measure in arm.measures
                if base is None or measure in self[base].measures
            }
            for name, arm in self.arms.items()
            if name != base
        }

    def table(self, base: str | None = None) -> str:
        """Return a Markdown table: arms by measures, each with its 95 % interval; with `base`, paired differences too."""
        parts = [_markdown(self.figures(), self.measures)]
        if base is not None:
            parts += [f"against {base}, paired by prompt (perplexity: the ratio)"]
            parts += [_markdown(self.figures(base), self.measures)]
        return "\n\n".join(parts)

    def to_json(self, path: str | os.PathLike[str] | None = None, *, texts: bool = False) -> str:
        """Return, and with `path` write, everything that was measured by row; texts only on request.

        Raises:
            ArtefactError: the file cannot be written.
        """
        arms = {name: asdict(arm) for name, arm in self.arms.items()}
        for arm in arms.values():
            if not texts:
                arm["prompts"] = arm["completions"] = ()
        text = json.dumps({"steerkit": "report", "arms": arms}, indent=1)
        if path is not None:
            storage.write_bytes(Path(path), text.encode())
        return text

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Return the report that `to_json` wrote.

        Raises:
            ArtefactError: text that is no report.
        """
        try:
            found = json.loads(text)
            if found["steerkit"] != "report":
                raise KeyError("steerkit")
            arms = {str(name): _arm(arm) for name, arm in found["arms"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ArtefactError(f"A report's JSON is required. Found something else ({error!r:.80}).") from error
        if not arms:
            raise ArtefactError("A report's JSON holds arms. Found none.")
        return cls(arms)

    def to_pandas(self) -> Any:
        """Return a data frame with one line for every row and measure: arm, measure, prompt, value, weight.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        return data_frame(
            {"arm": name, "measure": key, "kind": m.kind, "prompt": cluster, "value": value, "weight": weight}
            for name, arm in self.arms.items()
            for key, m in arm.measures.items()
            for value, cluster, weight in zip(m.values, m.clusters, m.weights or (1.0,) * len(m), strict=True)
        )

    def save_html(
        self,
        path: str | os.PathLike[str],
        *,
        base: str | None = None,
        texts: bool = False,
        above: Sequence[Sequence[str]] = (),
        figure: bytes | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Write a page that needs no other file; texts only on request, for several data sets are offensive.

        `above` is a table that comes first, lines of cells with the head as the first, `figure` a PNG, `notes` a list
        beneath them.

        Raises:
            ArtefactError: the file cannot be written.
            ReportError: no such base.
        """
        parts = [_table(above)] if above else []
        if figure is not None:
            parts.append(f'<img alt="" src="data:image/png;base64,{base64.b64encode(figure).decode()}">')
        parts += [f"<ul>{''.join(f'<li>{html.escape(note)}</li>' for note in notes)}</ul>"] if notes else []
        parts.append(_html(self.figures(), self.measures))
        if base is not None:
            parts += [f"<h2>Against {html.escape(base)}, paired by prompt (perplexity: the ratio)</h2>"]
            parts += [_html(self.figures(base), self.measures)]
        if texts:
            for name, arm in self.arms.items():
                rows = "".join(
                    f"<tr><td>{html.escape(prompt)}</td><td>{html.escape(text)}</td></tr>"
                    for prompt, text in zip(arm.prompts, arm.completions, strict=True)
                )
                parts.append(f"<details><summary>{html.escape(name)}</summary><table>{rows}</table></details>")
        storage.write_bytes(Path(path), _PAGE.format("\n".join(parts)).encode())


_PAGE = """<!doctype html><meta charset="utf-8"><title>Report</title>
<style>body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; color: #22313f }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td, th {{ padding: .3rem .7rem; text-align: left;
border-bottom: 1px solid #d9dee3; vertical-align: top; font-variant-numeric: tabular-nums }}</style>
<h1>Report</h1>
<p>Brackets are 95 % intervals over prompts.</p>
{}
"""


def _arm(stored: Mapping[str, Any]) -> Arm:
    """Return an arm from a file's entry."""
    parts = ("values", "clusters", "weights")
    measures = {
        key: Measure(**{**m, **{part: tuple(m[part]) for part in parts}}) for key, m in stored["measures"].items()
    }
    prompts, completions = (tuple(stored[key]) for key in ("prompts", "completions"))
    if not measures or len(prompts) != len(completions) or not all(isinstance(t, str) for t in prompts + completions):
        raise ValueError("an arm without measures, or texts that are none")
    return Arm(measures, prompts, completions, dict(stored["settings"]))


def _lines(figures: Mapping[str, Mapping[str, Estimate]], measures: Sequence[str]) -> list[list[str]]:
    shown = [m for m in measures if any(m in arm for arm in figures.values())]
    return [["arm", *shown]] + [
        [name, *(str(arm[measure]) if measure in arm else "" for measure in shown)] for name, arm in figures.items()
    ]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = (head, ["---"] * len(head), *rows)
    cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def data_frame(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Return rows as a pandas data frame.

    Raises:
        MissingDependencyError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingDependencyError(
            "A data frame needs pandas. It is not installed. Run: pip install pandas."
        ) from error
    return pd.DataFrame(list(rows))


def _markdown(figures: Mapping[str, Mapping[str, Estimate]], measures: Sequence[str]) -> str:
    head, *rows = _lines(figures, measures)
    return markdown(head, rows)


def _html(figures: Mapping[str, Mapping[str, Estimate]], measures: Sequence[str]) -> str:
    return _table(_lines(figures, measures))


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *rows = lines
    cells = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    cells += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in cells) + "</table>"
