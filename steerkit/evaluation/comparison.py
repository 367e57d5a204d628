"""`compare`: ways to steer at equal damage, with the baselines and controls that make a claim believable.

Every method is first calibrated on development prompts to each budget of KL a token, then runs on the prompts that the
figures come from. Prompting, best-of-n, a random direction and shuffled labels are always among them.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from steerkit import storage
from steerkit.activations import Activations, checked_texts, record
from steerkit.concepts.concept import Concept
from steerkit.controller import Controller
from steerkit.errors import AmountError, ArtefactError, TextsError
from steerkit.evaluation.calibration import dial
from steerkit.evaluation.contest import UNSTEERED, Cell, Contest
from steerkit.evaluation.report import Estimate, Report, digest, markdown
from steerkit.evaluation.run import Scorers, checked_sampling, named
from steerkit.hooks import steered
from steerkit.intervention import Intervention
from steerkit.maths.lowrank import parts
from steerkit.model import Fingerprint, evaluating, find_decoder
from steerkit.passes import Prompted, Writer
from steerkit.types import Text

BUDGETS = (0.03, 0.1, 0.3)
"""Nats a token; .1 is 2.4 nats in 24 tokens."""


@dataclass(frozen=True)
class Comparison:
    """Methods by budget. Made by `compare`; frozen."""

    report: Report
    """Every arm with its whole panel."""
    cells: tuple[Cell, ...] = field(repr=False)
    goal: str
    """The scorer that counts."""
    notes: tuple[str, ...] = field(repr=False, default=())
    """What could not be run, doses that were not monotone, budgets that were missed."""

    def effects(self, measure: str | None = None) -> dict[str, dict[float | None, Estimate]]:
        """Return by method and budget the difference from the unsteered text, paired by prompt; None for whole doses."""
        return self._by_cell(lambda arm: self.report.difference(measure or self.goal, arm, UNSTEERED))

    def spent(self) -> dict[str, dict[float | None, Estimate]]:
        """Return by method and budget the KL a token that was really spent on these prompts."""
        return self._by_cell(lambda arm: self.report[arm]["kl"])

    def contrast(self, first: str, second: str, budget: float | None, measure: str | None = None) -> Estimate:
        """Return by how much one method's scores exceed another's at a budget, paired by prompt; towards "negative" less is further.

        Raises:
            AmountError: a method that has no arm at this budget.
        """
        return self.report.difference(measure or self.goal, self._arm(first, budget), self._arm(second, budget))

    def _by_cell(self, value: Callable[[str], Estimate]) -> dict[str, dict[float | None, Estimate]]:
        found: dict[str, dict[float | None, Estimate]] = {}
        for cell in self.cells:
            found.setdefault(cell.method, {})[cell.budget] = value(cell.arm)
        return found

    def _arm(self, method: str, budget: float | None) -> str:
        for cell in self.cells:
            if (cell.method, cell.budget) == (method, budget):
                return cell.arm
        raise AmountError(
            f"{method!r} has no arm at a budget of {budget}. Found {sorted({c.method for c in self.cells})}."
        )

    def table(self) -> str:
        """Return a Markdown table: the effect of each method at each budget, and beside it the KL that was spent."""
        head, *rows = self._lines()
        return markdown(head, rows)

    def _lines(self) -> list[list[str]]:
        budgets = sorted({cell.budget for cell in self.cells if cell.budget is not None})
        effects, spent = self.effects(), self.spent()
        head = [f"{self.goal}, against unsteered", *(f"{b:g} nats a token" for b in budgets), "whole"]
        rows = [
            [method, *(f"{found[b]} at {spent[method][b].value:.3g}" if b in found else "" for b in (*budgets, None))]
            for method, found in effects.items()
        ]
        return [head, *rows]

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return, and with `path` write, everything that was measured, without texts.

        Raises:
            ArtefactError: the file cannot be written.
        """
        found = {"goal": self.goal, "notes": self.notes, "cells": [asdict(cell) for cell in self.cells]}
        text = json.dumps({**found, "report": json.loads(self.report.to_json())}, indent=1)
        if path is not None:
            storage.write_bytes(Path(path), text.encode())
        return text

    @classmethod
    def from_json(cls, text: str) -> "Comparison":
        """Return the comparison that `to_json` wrote.

        Raises:
            ArtefactError: text that is no comparison.
        """
        try:
            found = json.loads(text)
            cells = tuple(Cell(**{**cell, "amount": _by_layer(cell["amount"])}) for cell in found["cells"])
            report = Report.from_json(json.dumps(found["report"]))
            if any(cell.arm not in report.arms for cell in cells):
                raise KeyError("arm")
            return cls(report, cells, str(found["goal"]), tuple(map(str, found["notes"])))
        except ArtefactError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtefactError(f"A comparison's JSON is required. Found something else ({error!r:.80}).") from error

    def save_html(self, path: str | os.PathLike[str], *, figure: bytes | None = None) -> None:
        """Write one page: the table, the figure (a PNG, such as `plots.comparison` draws), the notes, every panel.

        Raises:
            ArtefactError: the file cannot be written.
        """
        self.report.save_html(path, base=UNSTEERED, above=self._lines(), figure=figure, notes=self.notes)


def _by_layer(amount: Any) -> Any:
    """Return an amount as it was before JSON made its layers into text."""
    if not isinstance(amount, dict):
        return amount
    return {int(key) if key.isdigit() else key: _by_layer(value) for key, value in amount.items()}


def compare(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    *,
    name: str,
    positive: Sequence[Text],
    negative: Sequence[Text],
    scorers: Scorers,
    development: Sequence[Text],
    instructions: Sequence[str],
    towards: Literal["positive", "negative"] = "positive",
    goal: str | None = None,
    vector: Intervention | None = None,
    one_sided: Intervention | None = None,
    budgets: Sequence[float] = BUDGETS,
    best_of: int = 32,
    trials: int = 8,
    max_new_tokens: int = 24,
    samples: int = 4,
    seed: int = 0,
    batch_size: int = 64,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Comparison:
    """Run ways to steer towards a concept at equal KL from the unsteered model.

    Methods: the closed form (GCAV) along the probe, the pattern and the difference of means; a constant addition along the
    difference of means at the same layers and positions; the removal of that direction (towards "negative" only); the
    preference vectors that are given, alone and together with the best closed form; the instruction that does best on
    the development prompts, a few-shot one among them, its dose an interpolation of logits; the best of n samples by the
    concept's probe, n the most that the budget pays for (KL of a text <= log n - (n-1)/n). Controls: the constant addition's
    amounts along random directions (the same dose, whatever KL that is), and a constant addition along the difference of means of
    shuffled labels, half of each class on either side, at the same KL.

    Selection is not equal, and in favour of the baselines: prompting is the best of its instructions and both kinds the best
    of three by the goal itself on the development prompts, while the closed form takes its default layers.

    Args:
        model: the model, with no Controller attached.
        tokenizer: its tokenizer.
        prompts: what the figures come from; none may be among the development prompts.
        name: of the concept.
        positive: texts that show it, for the probe and the few-shot prompt.
        negative: texts that do not.
        scorers: as in `evaluate`; fit them on other texts than the concept.
        development: prompts on which doses and the instruction are chosen.
        instructions: four with the few-shot one are five; the best is "this model's prompt ceiling".
        towards: more of the concept, or less. Scores are expected to rise with more.
        goal: the scorer that counts; the first by default.
        vector: a preference vector's `add(1.0)` that gives more of the concept; towards "negative" it is turned.
        one_sided: the same made of one policy only.
        budgets: nats a token.
        best_of: largest n of best-of-n.
        trials: most amounts to try for a budget.
        max_new_tokens: tokens a continuation.
        samples: continuations of each prompt.
        seed: of the split, the sampling and the random directions.
        batch_size: rows that run together.
        folder: keeps finished arms in comparison.json there, and the same call after a stop goes on with them; the doses of a method
            that was stopped between two budgets are searched anew. Scorers are told apart by their names.
        progress: show a progress bar.

    Raises:
        TextsError: no prompts or instructions, prompts that are in both lists, texts longer than the model takes.
        AmountError: budgets that are not positive, a Controller that is attached, other settings that are none.
        ScorerError: a scorer that fails.
        ArtefactError: a folder with a comparison of other texts or settings.
    """
    prompts, development = checked_texts(prompts, "prompts"), checked_texts(development, "development")
    positive, negative = checked_texts(positive, "positive"), checked_texts(negative, "negative")
    known = {_plain(text) for text in prompts}
    shared = [text for text in development if _plain(text) in known]
    if shared:
        raise TextsError(
            f"Development prompts must be others than the prompts. Found {shared[0]!r:.60} in both lists. Split them."
        )
    asked = [] if isinstance(instructions, str) else list(instructions)
    if not asked or not all(isinstance(each, str) and each for each in asked):
        raise TextsError("Prompting is never left out: `instructions` must be a list of texts. Found none. Write four.")
    nats = _checked_budgets(budgets)
    for word, number, least in (("best_of", best_of, 2), ("trials", trials, 3), ("seed", seed, 0)):
        if not isinstance(number, int) or number < least:
            raise AmountError(f"`{word}` must be a whole number of at least {least}. Found {number!r}.")
    if towards not in ("positive", "negative"):
        raise AmountError(f"`towards` must be 'positive' or 'negative'. Found {towards!r}.")
    by_name = named(scorers)
    if not by_name or (goal is not None and goal not in by_name):
        raise AmountError(f"`goal` must be one of the scorers. Found {goal!r} and {list(by_name)}. Pass one.")
    sampling = checked_sampling(max_new_tokens, samples, 1.0, seed, batch_size)
    decoder = find_decoder(model)
    if steered(decoder.model):
        raise AmountError(
            "Methods are compared on the plain model. Found a Controller attached. Leave its `with` first."
        )
    up = towards == "positive"
    given = {"preference vector": vector, "one-sided vector": one_sided}
    vectors = {
        method: _turned(model, tokenizer, development, each, up) for method, each in given.items() if each is not None
    }
    contest = Contest(
        model=model,
        tokenizer=tokenizer,
        decoder=decoder,
        here=Writer(decoder, tokenizer, prompts),
        there=Writer(decoder, tokenizer, development),
        scorers=by_name,
        goal=goal or next(iter(by_name)),
        sampling=sampling,
        budgets=nats,
        trials=trials,
        best_of=best_of,
        up=up,
    )
    for writer in (contest.here, contest.there):
        writer.refuse_long(max_new_tokens)
        for instruction in asked:
            Prompted(decoder, tokenizer, writer.prompts, instruction).refuse_long(max_new_tokens)
    key = [
        *(digest(texts) for texts in (prompts, development, positive, negative, asked)),
        json.dumps([Fingerprint.of(model).header(), towards, contest.goal, sorted(by_name), trials, best_of]),
        json.dumps({**asdict(sampling), "vectors": {m: [repr(each), _weights(each)] for m, each in vectors.items()}}),
    ]
    keep = None
    if folder is not None:
        keep, kept = _kept(Path(folder), digest(key))
        if kept is not None:
            contest.known = {(cell.method, cell.budget): cell for cell in kept.cells}
            contest.arms_known = dict(kept.report.arms)
            contest.notes = list(kept.notes)
    with evaluating(decoder.model), contest.progress(progress):
        concept, shuffled = _concepts(model, tokenizer, name, positive, negative, seed)

        def comparison() -> Comparison:
            return Comparison(Report(contest.arms), tuple(contest.cells), contest.goal, tuple(contest.notes))

        def unfinished() -> Comparison:
            """Arms of an earlier run that this one has not come to stay in the file."""
            done = {(cell.method, cell.budget) for cell in contest.cells}
            cells = [*contest.cells, *(cell for key, cell in contest.known.items() if key not in done)]
            arms = {**contest.arms_known, **contest.arms}
            return replace(comparison(), report=Report(arms), cells=tuple(cells))

        contest.after = None if keep is None else lambda: keep(unfinished())
        contest.run(concept, shuffled, positive if up else negative, asked, vectors)
        return comparison()


def _weights(vector: Intervention) -> str:
    """Return a digest of what a vector adds: its repr is that of every vector of its name and layers."""
    found = {**getattr(vector, "deltas", {}), **getattr(vector, "directions", {})}
    return storage.checksum(
        {f"{key} {i}": part.detach().cpu() for key, d in found.items() for i, part in enumerate(parts(d))}
    )


def _checked_budgets(budgets: Any) -> tuple[float, ...]:
    try:
        nats = () if isinstance(budgets, str) else tuple(float(budget) for budget in budgets)
    except (TypeError, ValueError):
        nats = ()
    if not nats or any(not math.isfinite(b) or b <= 0 for b in nats) or len({f"{b:g}" for b in nats}) < len(nats):
        raise AmountError(
            f"Budgets must be different positive numbers of nats a token. Found {budgets!r}. Try (0.03, 0.1, 0.3)."
        )
    return nats


def _plain(text: Text) -> str:
    return (text if isinstance(text, str) else str(text[-1]["content"])).strip()


def _turned(model: Any, tokenizer: Any, development: Sequence[Text], vector: Intervention, up: bool) -> Intervention:
    """Return a vector's intervention with the sign of what is asked for, once it is known to fit."""
    dial(model, tokenizer, development, vector)
    Controller(model, [vector])
    if up:
        return vector
    values = vector.read(vector.amount).values[0]
    if not bool(values.any()):
        values = torch.ones_like(values)
    same = bool((values == values[0]).all())
    return replace(
        vector,
        amount=-float(values[0]) if same else {k: -float(v) for k, v in zip(vector.layers, values, strict=True)},
    )


def _kept(folder: Path, key: str) -> tuple[Callable[[Comparison], None], Comparison | None]:
    """Return what keeps a comparison in a folder, and the one that is there."""
    file, sign = folder / "comparison.json", folder / "comparison.key"
    if folder.exists() and not folder.is_dir():
        raise ArtefactError(f"A folder is required. Found the file {folder}. Choose another.")
    if not folder.parent.is_dir():
        raise ArtefactError(f"The folder {folder.parent} must exist. It does not. Create it first.")
    found = None
    if file.exists():
        if not sign.exists() or sign.read_text("utf-8") != key:
            raise ArtefactError(
                f"{folder} must hold this comparison or none. Found one of other texts, settings or another model. Choose another."
            )
        found = Comparison.from_json(file.read_text("utf-8"))
    elif folder.exists():
        storage.refuse_folder(folder)

    def keep(comparison: Comparison) -> None:
        folder.mkdir(exist_ok=True)
        storage.write_bytes(sign, key.encode())
        comparison.to_json(file)

    return keep, found


def _concepts(
    model: Any, tokenizer: Any, name: str, positive: Sequence[Text], negative: Sequence[Text], seed: int
) -> tuple[Concept, Concept]:
    """Return the concept, and the same with the difference of means of shuffled labels: half of each class a side."""
    both = record(model, tokenizer, [*positive, *negative])
    rows, count = range(len(both)), len(positive)

    def part(rows: Sequence[int]) -> Activations:
        states = {layer: both[layer][list(rows)] for layer in both.layers}
        return Activations(states, both.read, both.fingerprint, tuple(both.digests[row] for row in rows))

    concept = Concept.from_activations(name, part(rows[:count]), part(rows[count:]), seed=seed)
    dice = np.random.default_rng(seed)
    classes = [dice.permutation(list(each)) for each in (rows[:count], rows[count:])]
    sides = [np.concatenate([each[half::2] for each in classes]).tolist() for half in (0, 1)]
    mean = {layer: [both[layer][side].mean(dim=0) for side in sides] for layer in both.layers}
    turned = {layer: F.normalize(first - second, dim=0) for layer, (first, second) in mean.items()}
    return concept, replace(concept, directions={**concept.directions, "mean_difference": turned})
