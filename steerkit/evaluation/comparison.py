"""`compare`: ways to steer at equal damage, with the baselines and controls that make a claim believable.

Every method is first calibrated on development prompts to each budget of KL a token, then runs on the prompts that the
figures come from. Prompting, best-of-n, a random direction and shuffled labels are always among them.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from steerkit.activations import Activations, checked_texts, record
from steerkit.concepts.concept import Concept
from steerkit.controller import Controller
from steerkit.errors import AmountError, CalibrationError, SteerkitWarning, TextsError
from steerkit.evaluation import scorers as ready
from steerkit.evaluation.calibration import Search, dial
from steerkit.evaluation.passes import BestOf, Prompted, Sampling, Writer
from steerkit.evaluation.report import Arm, Estimate, Measure, Report, markdown
from steerkit.evaluation.run import Scorers, checked_sampling, measured, named
from steerkit.hooks import steered
from steerkit.intervention import Addition, Intervention
from steerkit.model import Decoder, evaluating, find_decoder
from steerkit.types import Text

BUDGETS = (0.03, 0.1, 0.3)
"""Nats a token; .1 is 2.4 nats in 24 tokens."""

UNSTEERED = "unsteered"


@dataclass(frozen=True)
class Cell:
    """One method at one budget."""

    method: str
    budget: float | None
    """None for a method that has no dose."""
    arm: str
    """Its name in the report."""
    amount: Any
    """What was calibrated: an amount, a share of the instruction, a number of samples."""


@dataclass(frozen=True)
class Comparison:
    """Methods by budget. Made by `compare`; frozen."""

    report: Report
    """Every arm with its whole panel."""
    cells: tuple[Cell, ...] = field(repr=False)
    goal: str
    """The scorer that counts."""
    notes: tuple[str, ...] = field(repr=False, default=())
    """What could not be run, and doses that were not monotone."""

    def effects(self, measure: str | None = None) -> dict[str, dict[float | None, Estimate]]:
        """Return by method and budget the difference from the unsteered text, paired by prompt."""
        found: dict[str, dict[float | None, Estimate]] = {}
        for cell in self.cells:
            found.setdefault(cell.method, {})[cell.budget] = self.report.difference(
                measure or self.goal, cell.arm, UNSTEERED
            )
        return found

    def spent(self) -> dict[str, dict[float | None, Estimate]]:
        """Return by method and budget the KL a token that was really spent on these prompts."""
        found: dict[str, dict[float | None, Estimate]] = {}
        for cell in self.cells:
            found.setdefault(cell.method, {})[cell.budget] = self.report[cell.arm]["kl"]
        return found

    def contrast(self, first: str, second: str, budget: float | None, measure: str | None = None) -> Estimate:
        """Return how much further one method goes than another at a budget, paired by prompt.

        Raises:
            AmountError: a method that has no arm at this budget.
        """
        return self.report.difference(measure or self.goal, self._arm(first, budget), self._arm(second, budget))

    def _arm(self, method: str, budget: float | None) -> str:
        for cell in self.cells:
            if (cell.method, cell.budget) == (method, budget):
                return cell.arm
        raise AmountError(
            f"{method!r} has no arm at a budget of {budget}. Found {sorted({c.method for c in self.cells})}."
        )

    def table(self) -> str:
        """Return a Markdown table: the effect of each method at each budget, and beneath it the KL spent."""
        budgets = list(dict.fromkeys(cell.budget for cell in self.cells if cell.budget is not None))
        effects, spent = self.effects(), self.spent()
        head = [f"{self.goal}, against unsteered", *(f"{b:g} nats a token" for b in budgets), "no dose"]
        rows = [
            [method, *(f"{found[b]} at {spent[method][b].value:.3g}" if b in found else "" for b in (*budgets, None))]
            for method, found in effects.items()
        ]
        return markdown(head, rows)


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
    best_of: int = 16,
    trials: int = 8,
    max_new_tokens: int = 24,
    samples: int = 4,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Comparison:
    """Run ways to steer towards a concept at equal KL from the unsteered model.

    Methods: the closed form (GCAV) along the probe, the pattern and the difference of means; a constant addition along the
    difference of means at the same layers and positions; removal of the direction (towards "negative" only); the preference
    vectors that are given, alone and with the best closed form; the instruction that does best on the development prompts,
    a few-shot one among them, its dose an interpolation of logits; the best of n samples by the concept's probe, n the most
    that a text's share of the budget pays for (KL <= log n - (n-1)/n); the constant addition's amounts along a random direction; a
    constant addition along the difference of means of shuffled labels.

    Args:
        model: the model, with no Controller attached.
        tokenizer: its tokenizer.
        prompts: what the figures come from; none may be among the development prompts.
        name: of the concept.
        positive: texts that show it, for the probe and the few-shot prompt.
        negative: texts that do not.
        scorers: as in `evaluate`; fit them on other texts than the concept.
        development: prompts on which doses and the instruction are chosen.
        instructions: five is a fair number; "this model's prompt ceiling" is the best of them.
        towards: more of the concept, or less. Scores are expected to rise with more.
        goal: the scorer that counts; the first by default.
        vector: a preference vector's `add(1.0)`, for example.
        one_sided: the same made of one policy only.
        budgets: nats a token.
        best_of: largest n of best-of-n.
        trials: most amounts to try for a budget.
        max_new_tokens: tokens a continuation.
        samples: continuations of each prompt.
        seed: of the split, the sampling and the random direction.
        batch_size: rows that run together.
        progress: show a progress bar.

    Raises:
        TextsError: no prompts or instructions, or prompts that are in both lists.
        AmountError: budgets that are not positive, a Controller that is attached, other settings that are none.
        ScorerError: a scorer that fails.
    """
    prompts, development = checked_texts(prompts, "prompts"), checked_texts(development, "development")
    shared = [text for text in prompts if text in development]
    if shared:
        raise TextsError(
            f"Development prompts must be others than the prompts. Found {shared[0]!r:.60} in both lists. Split them."
        )
    if isinstance(instructions, str) or not instructions or not all(isinstance(i, str) and i for i in instructions):
        raise TextsError("Prompting is never left out: `instructions` must be a list of texts. Found none. Write five.")
    if not budgets or any(not math.isfinite(b) or b <= 0 for b in budgets):
        raise AmountError(f"Budgets must be positive numbers of nats a token. Found {tuple(budgets)}.")
    if best_of < 2 or trials < 3 or towards not in ("positive", "negative"):
        raise AmountError(
            f"best_of must be 2 or more, trials 3 or more, towards 'positive' or 'negative'. Found {best_of}, {trials}, {towards!r}."
        )
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
    with evaluating(decoder.model):
        concept, shuffled = _concepts(model, tokenizer, name, positive, negative, seed)
        contest = _Contest(
            model, tokenizer, decoder, prompts, development, by_name, goal or next(iter(by_name)), sampling,
            tuple(budgets), trials, up, progress,
        )  # fmt: skip
        contest.run(concept, shuffled, positive if up else negative, instructions, vector, one_sided, best_of)
    return contest.comparison()


def _concepts(
    model: Any, tokenizer: Any, name: str, positive: Sequence[Text], negative: Sequence[Text], seed: int
) -> tuple[Concept, Concept]:
    """Return the concept, and one fitted on the same texts with their labels shuffled."""
    positive, negative = checked_texts(positive, "positive"), checked_texts(negative, "negative")
    both = record(model, tokenizer, [*positive, *negative])
    order = np.random.default_rng(seed).permutation(len(both)).tolist()

    def part(rows: Sequence[int]) -> Activations:
        states = {layer: both[layer][list(rows)] for layer in both.layers}
        return Activations(states, both.read, both.fingerprint, tuple(both.digests[row] for row in rows))

    count, rows = len(positive), range(len(both))
    concept = Concept.from_activations(name, part(rows[:count]), part(rows[count:]), seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SteerkitWarning)  # it is at chance, and has to be
        shuffled = Concept.from_activations(name, part(order[:count]), part(order[count:]), seed=seed)
    return concept, shuffled


class _Contest:
    """What all methods share, and what they reached so far."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        decoder: Decoder,
        prompts: Sequence[Text],
        development: Sequence[Text],
        scorers: Mapping[str, Any],
        goal: str,
        sampling: Sampling,
        budgets: tuple[float, ...],
        trials: int,
        up: bool,
        progress: bool,
    ) -> None:
        self.model, self.tokenizer, self.decoder = model, tokenizer, decoder
        self.prompts, self.development = prompts, development
        self.scorers, self.goal, self.sampling = scorers, goal, sampling
        self.budgets, self.trials, self.up = budgets, trials, up
        self.here = Writer(decoder, tokenizer, prompts)
        self.there = Writer(decoder, tokenizer, development)
        self.arms: dict[str, Arm] = {}
        self.cells: list[Cell] = []
        self.notes: list[str] = []
        self.places: dict[tuple[str, float], float] = {}
        """Where each dial was left."""
        self.scores: dict[tuple[str, float], float] = {}
        """What each method scored on the development prompts."""
        self.bar = tqdm(desc="comparing", unit="arm", disable=not progress)

    def comparison(self) -> Comparison:
        return Comparison(Report(self.arms), tuple(self.cells), self.goal, tuple(self.notes))

    def run(
        self,
        concept: Concept,
        shuffled: Concept,
        examples: Sequence[Text],
        instructions: Sequence[str],
        vector: Intervention | None,
        one_sided: Intervention | None,
        best_of: int,
    ) -> None:
        """Run every method at every budget."""
        self._keep(None, None, None, UNSTEERED, self._measured(self.here))
        layers = concept.steering_layers
        side: dict[str, Any] = {"at_least": 0.9} if self.up else {"at_most": 0.1}
        closed = {
            f"GCAV, {kind.replace('_', ' ')}": concept.along(kind).constrain(**side, layers=layers)
            for kind in ("probe", "pattern", "mean_difference")
        }
        for method, bound in closed.items():
            self.steered(method, bound)
        steps = {layer: (1.0 if self.up else -1.0) * concept.norms[layer] for layer in layers}
        constant = concept.along("mean_difference").add(steps, positions="last")
        self.steered("constant addition", constant)
        self.randomly(constant)
        self.steered("shuffled labels", shuffled.along("mean_difference").add(steps, positions="last"))
        if not self.up:
            erased = concept.along("mean_difference").erase(positions="last")
            with Controller(self.model, [erased]):
                self._keep("removal", None, None, "removal", self._measured(self.here))
        for method, one in (("preference vector", vector), ("one-sided vector", one_sided)):
            if one is not None:
                self.steered(method, one)
        if vector is not None:
            self.together(closed, vector)
        self.instructed([*instructions, _few_shot(examples)])
        self.chosen(concept, best_of)
        self.bar.close()

    def steered(self, method: str, intervention: Intervention) -> None:
        """Calibrate one intervention to every budget and run it."""
        search = Search(method, dial(self.model, self.tokenizer, self.development, intervention), self.trials)
        with Controller(self.model, [intervention]) as control:

            def under(amount: Any, writer: Writer) -> dict[str, Measure]:
                with control.using(**{intervention.name: amount}):
                    return self._measured(writer)

            self._swept(method, search, under)
            control.using(**{intervention.name: intervention.amount})

    def together(self, closed: Mapping[str, Intervention], vector: Intervention) -> None:
        """Scale both kinds at once, each from what it may spend alone."""
        for budget in self.budgets:
            ready_made = [m for m in closed if (m, budget) in self.places]
            if not ready_made or ("preference vector", budget) not in self.places:
                self.notes.append(f"both kinds: a part has no dose at {budget:g} nats a token")
                continue
            way = 1.0 if self.up else -1.0
            scores = {way * self.scores[m, budget]: m for m in ready_made}
            best = scores[max(scores)]
            places = self.places[best, budget], self.places["preference vector", budget]
            self._scaled(replace(closed[best], name="edit"), replace(vector, name="weights"), places, budget)

    def _scaled(self, edit: Intervention, weights: Intervention, places: tuple[float, float], budget: float) -> None:
        parts = (edit, weights)
        dials = [dial(self.model, self.tokenizer, self.development, each) for each in parts]

        def both(share: float) -> Any:
            return {each.name: amount(share * place) for each, amount, place in zip(parts, dials, places, strict=True)}

        with Controller(self.model, parts) as control:

            def under(amount: Any, writer: Writer) -> dict[str, Measure]:
                with control.using(**amount):
                    return self._measured(writer)

            self._swept("both kinds", Search("both kinds", both, self.trials), under, (budget,))

    def randomly(self, constant: Addition) -> None:
        """Take the constant addition's amounts along directions that mean nothing."""
        generator = torch.Generator().manual_seed(self.sampling.seed)
        anywhere = {
            layer: torch.nn.functional.normalize(torch.randn(len(u), generator=generator), dim=0)
            for layer, u in constant.directions.items()
        }
        for cell in [c for c in self.cells if c.method == "constant addition"]:
            random = replace(constant, directions=anywhere, amount=cell.amount)
            with Controller(self.model, [random]):
                self._keep("random direction", cell.budget, cell.amount, None, self._measured(self.here))

    def instructed(self, instructions: Sequence[str]) -> None:
        """Take the instruction that does best on the development prompts, at full and at lower doses."""
        found = {}
        for instruction in instructions:
            writer = Prompted(self.decoder, self.tokenizer, self.development, instruction)
            found[instruction] = self._measured(writer, panel=False)[self.goal].estimate.value
        best = max(found, key=lambda i: found[i] if self.up else -found[i])
        self.notes.append(f"the instruction that did best on the development prompts: {best!r}")

        def under(share: float, writer: Writer) -> dict[str, Measure]:
            prompts = self.prompts if writer is self.here else self.development
            return self._measured(Prompted(self.decoder, self.tokenizer, prompts, best, share))

        self._swept("prompting", Search("prompting", lambda t: t, self.trials), under)
        self._keep("prompting", None, 1.0, None, under(1.0, self.here))

    def chosen(self, concept: Concept, most: int) -> None:
        """Take the best of n samples by the concept's probe, which is no scorer of these figures."""
        probe = ready.probe(concept, self.model, self.tokenizer)
        way = 1.0 if self.up else -1.0
        length = self.arms[UNSTEERED]["length"].value
        for budget in self.budgets:
            count = max((n for n in range(1, most + 1) if math.log(n) - (n - 1) / n <= budget * length), default=1)
            if count == 1:
                self.notes.append(f"best of n: {budget:g} nats a token do not pay for two samples")
                continue
            if count == most:
                self.notes.append(f"best of n: {budget:g} nats a token would pay for more than best_of={most}")
            writer = BestOf(
                self.decoder, self.tokenizer, self.prompts, count, lambda p, c: [way * score for score in probe(p, c)]
            )
            measures = self._measured(writer)
            # Each token is the model's own; what choosing costs is known of the whole text.
            spent = [writer.divergence / n for n in measures["length"].values]
            for key in ("kl", "kl_p90"):
                measures[key] = replace(measures[key], values=tuple(spent))
            self._keep("best of n", budget, count, None, measures)

    def _swept(
        self,
        method: str,
        search: Search,
        under: Callable[[Any, Writer], dict[str, Measure]],
        budgets: Sequence[float] | None = None,
    ) -> None:
        search.measure = lambda amount: under(amount, self.there)
        for budget in budgets or self.budgets:
            try:
                with self._noting():
                    found = search.within(budget)
            except CalibrationError as error:
                self.notes.append(f"{method}: {error}")
                continue
            self.places[method, budget] = found.chosen.place
            self.scores[method, budget] = found.chosen.measures[self.goal].estimate.value
            self._keep(method, budget, found.amount, None, under(found.amount, self.here))

    @contextmanager
    def _noting(self) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for each in caught:
            if issubclass(each.category, SteerkitWarning):
                self.notes.append(str(each.message))
            else:
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)

    def _measured(self, writer: Writer, panel: bool = True) -> dict[str, Measure]:
        found, self._shown, self._written = measured(writer, self.scorers, self.sampling, panel=panel)
        return found

    def _keep(
        self, method: str | None, budget: float | None, amount: Any, arm: str | None, measures: Mapping[str, Measure]
    ) -> None:
        arm = arm or (f"{method} at {budget:g}" if budget is not None else f"{method}, whole")
        settings = {**asdict(self.sampling), "amount": amount}
        self.arms[arm] = Arm(measures, tuple(self._shown), tuple(self._written), settings)
        if method is not None:
            self.cells.append(Cell(method, budget, arm, amount))
        self.bar.update()


def _few_shot(examples: Sequence[Text]) -> str:
    """Return three of the texts as examples to follow."""
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in examples[:3]]
    return "Here are texts of the kind that is wanted.\n\n" + "\n\n".join(texts) + "\n\nAnother one of the same kind:"
