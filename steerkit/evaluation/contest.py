"""The methods that `compare` holds against each other, and how each is brought to a budget."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from steerkit.concepts.concept import Concept
from steerkit.controller import Controller
from steerkit.errors import AmountError, CalibrationError, SteerkitWarning, TextsError
from steerkit.evaluation import scorers as ready
from steerkit.evaluation.calibration import Search, dial
from steerkit.evaluation.report import Arm, Measure
from steerkit.evaluation.run import measured
from steerkit.evaluation.scorers import Scorer
from steerkit.intervention import Addition, Intervention
from steerkit.model import Decoder
from steerkit.passes import BestOf, Prompted, Sampling, Writer
from steerkit.types import Text

UNSTEERED = "unsteered"
_MISSED = 0.25
"""A budget that is missed by more than this share on the prompts themselves is told."""


@dataclass(frozen=True)
class Cell:
    """One method at one budget."""

    method: str
    budget: float | None
    """None for a whole dose, and for what has none."""
    arm: str
    """Its name in the report."""
    amount: Any
    """What was calibrated: an amount, a share of the instruction, a number of samples."""
    place: float | None = None
    """Where between the least (0) and the most (1) the amount lies."""
    development: float | None = None
    """What it scored on the development prompts."""


Under = Callable[[Any, Writer], dict[str, Measure]]
"""What an amount of a method does to who writes."""


@dataclass
class Contest:
    """What all methods share, and what they reached so far."""

    model: Any
    tokenizer: Any
    decoder: Decoder
    here: Writer
    """Continues the prompts that the figures come from."""
    there: Writer
    """Continues the development prompts."""
    scorers: Mapping[str, Scorer]
    goal: str
    sampling: Sampling
    budgets: tuple[float, ...]
    trials: int
    best_of: int
    up: bool
    """Whether more of the concept is wanted, or less."""
    arms: dict[str, Arm] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    known: dict[tuple[str, float | None], Cell] = field(default_factory=dict)
    """Cells of an earlier run that was stopped."""
    arms_known: dict[str, Arm] = field(default_factory=dict)
    after: Callable[[], None] | None = None
    """Called when an arm is done."""

    @contextmanager
    def progress(self, shown: bool) -> Iterator[None]:
        """Within, finished arms move a bar."""
        with tqdm(desc="comparing", unit="arm", disable=not shown) as self._bar:
            yield

    def run(
        self,
        concept: Concept,
        shuffled: Concept,
        examples: Sequence[Text],
        instructions: Sequence[str],
        vectors: Mapping[str, Intervention],
    ) -> None:
        """Run every method at every budget."""
        if UNSTEERED in self.arms_known:
            self.arms[UNSTEERED] = self.arms_known[UNSTEERED]
        else:
            self._keep_arm(UNSTEERED, self._measured(self.here), None)
        layers = concept.steering_layers
        side: dict[str, Any] = {"at_least": 0.9} if self.up else {"at_most": 0.1}
        closed: dict[str, Intervention] = {}
        for kind in ("probe", "pattern", "mean_difference"):
            method = f"GCAV, {kind.replace('_', ' ')}"
            try:
                closed[method] = concept.along(kind).constrain(**side, layers=layers)
            except AmountError as error:
                self._note(f"{method}: {error}")
                continue
            self.steered(method, closed[method])
        steps = {layer: self._way * concept.norms[layer] for layer in layers}
        constant = concept.along("mean_difference").add(steps, positions="last")
        self.steered("constant addition", constant)
        self.randomly(constant)
        self.steered("shuffled labels", shuffled.along("mean_difference").add(steps, positions="last"))
        if not self.up:
            self.removed(concept)
        for method, vector in vectors.items():
            self.steered(method, vector)
        if "preference vector" in vectors:
            self.together(closed, vectors["preference vector"])
        self.instructed([*instructions, few_shot(examples)])
        self.chosen(concept)

    def steered(self, method: str, intervention: Intervention) -> None:
        """Calibrate one intervention to every budget and run it."""
        search = Search(method, dial(self.model, self.tokenizer, self.there.prompts, intervention), self.trials)
        with self._control([intervention]) as control:

            def under(amount: Any, writer: Writer) -> dict[str, Measure]:
                with control().using(**{intervention.name: amount}):
                    return self._measured(writer)

            self._swept(method, search, under, self.budgets)

    def together(self, closed: Mapping[str, Intervention], vector: Intervention) -> None:
        """Scale both kinds at once, each from what it may spend alone."""
        found = {(cell.method, cell.budget): cell for cell in self.cells}
        for budget in self.budgets:
            alone = found.get(("preference vector", budget))
            edits = [found[method, budget] for method in closed if (method, budget) in found]
            if alone is None or not edits:
                self._note(f"both kinds: a part has no dose at {budget:g} nats a token")
                continue
            best = max(edits, key=lambda cell: self._way * (cell.development or 0.0))
            self._scaled(closed[best.method], vector, (best.place or 0.0, alone.place or 0.0), budget)

    def _scaled(self, edit: Intervention, weights: Intervention, places: tuple[float, float], budget: float) -> None:
        parts = (replace(edit, name="edit"), replace(weights, name="weights"))
        dials = [dial(self.model, self.tokenizer, self.there.prompts, each) for each in parts]

        def both(share: float) -> Any:
            return {each.name: amount(share * place) for each, amount, place in zip(parts, dials, places, strict=True)}

        with self._control(parts) as control:

            def under(amount: Any, writer: Writer) -> dict[str, Measure]:
                with control().using(**amount):
                    return self._measured(writer)

            self._swept("both kinds", Search("both kinds", both, self.trials), under, (budget,))

    def randomly(self, constant: Addition) -> None:
        """Take the constant addition's amounts along directions that mean nothing, others at each budget."""
        doses = {cell.budget: cell.amount for cell in self.cells if cell.method == "constant addition"}
        for index, budget in enumerate(self.budgets):
            if budget not in doses:
                self._note(f"random direction: the constant addition has no dose at {budget:g} nats a token")
                continue
            if self._adopted("random direction", budget):
                continue
            generator = torch.Generator().manual_seed(1000 * self.sampling.seed + index)
            anywhere = {
                layer: F.normalize(torch.randn(len(u), generator=generator), dim=0)
                for layer, u in constant.directions.items()
            }
            with Controller(self.model, [replace(constant, directions=anywhere, amount=doses[budget])]):
                self._keep("random direction", budget, doses[budget], self._measured(self.here))

    def removed(self, concept: Concept) -> None:
        """Take the direction out at all steering layers; there is no dose of that."""
        if not self._adopted("removal", None):
            with Controller(self.model, [concept.along("mean_difference").erase(positions="last")]):
                self._keep("removal", None, None, self._measured(self.here))

    def instructed(self, instructions: Sequence[str]) -> None:
        """Take the instruction that does best on the development prompts, whole and at lower doses."""
        if all(("prompting", budget) in self.known for budget in (*self.budgets, None)):
            for budget in (*self.budgets, None):
                self._adopted("prompting", budget)
            return
        found = {}
        for instruction in instructions:
            try:
                writer = Prompted(self.decoder, self.tokenizer, self.there.prompts, instruction)
                for each in (writer, Prompted(self.decoder, self.tokenizer, self.here.prompts, instruction)):
                    each.refuse_long(self.sampling.max_new_tokens)
            except TextsError as error:
                self._note(f"prompting: left out {instruction!r:.40}: {error}")
                continue
            found[instruction] = self._way * self._measured(writer, panel=False)[self.goal].estimate.value
        best = max(found, key=lambda instruction: found[instruction])
        self._note(f"the instruction that did best on the development prompts: {best!r}")

        def under(share: float, writer: Writer) -> dict[str, Measure]:
            return self._measured(Prompted(self.decoder, self.tokenizer, writer.prompts, best, share))

        self._swept("prompting", Search("prompting", lambda place: place, self.trials), under, self.budgets)
        if not self._adopted("prompting", None):
            self._keep("prompting", None, 1.0, under(1.0, self.here))

    def chosen(self, concept: Concept) -> None:
        """Take the best of n samples by the concept's probe, which is no scorer of these figures."""
        probe = ready.probe(concept, self.model, self.tokenizer)
        length = self._measured(self.there)["length"].estimate.value
        done: dict[int, dict[str, Measure]] = {}
        for budget in self.budgets:
            pays = [n for n in range(2, self.best_of + 2) if math.log(n) - (n - 1) / n <= budget * length]
            if not pays:
                self._note(f"best of n: {budget:g} nats a token do not pay for two samples")
                continue
            count = min(max(pays), self.best_of)
            if max(pays) > self.best_of:
                self._note(f"best of n: {budget:g} nats a token would pay for more than best_of={self.best_of}")
            if self._adopted("best of n", budget):
                continue
            if count not in done:
                writer = BestOf(
                    self.decoder,
                    self.tokenizer,
                    self.here.prompts,
                    count,
                    lambda prompts, texts: [self._way * score for score in probe(prompts, texts)],
                )
                done[count] = self._measured(writer)
                # Each token is the model's own; what choosing costs is known of the whole text.
                spent = tuple(writer.divergence / n for n in done[count]["length"].values)
                done[count] |= {key: replace(done[count][key], values=spent) for key in ("kl", "kl_p90")}
            self._keep("best of n", budget, count, done[count])

    @property
    def _way(self) -> float:
        return 1.0 if self.up else -1.0

    @contextmanager
    def _control(self, interventions: Sequence[Intervention]) -> Iterator[Callable[[], Controller]]:
        """Attach on the first use only: what an earlier run has done already needs no pass."""
        made: list[Controller] = []
        with ExitStack() as stack:

            def control() -> Controller:
                if not made:
                    made.append(stack.enter_context(Controller(self.model, interventions)))
                return made[0]

            yield control

    def _swept(self, method: str, search: Search, under: Under, budgets: Sequence[float]) -> None:
        search.measure = lambda amount: under(amount, self.there)
        for budget in budgets:
            if self._adopted(method, budget):
                continue
            try:
                with self._noting():
                    found = search.within(budget)
            except CalibrationError as error:
                self._note(f"{method}: {error}")
                continue
            score = found.chosen.measures[self.goal].estimate.value
            self._keep(method, budget, found.amount, under(found.amount, self.here), found.chosen.place, score)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        caught: list[warnings.WarningMessage] = []
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
        finally:
            for each in caught:
                if issubclass(each.category, SteerkitWarning):
                    self._note(str(each.message))
                else:
                    warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _measured(self, writer: Writer, panel: bool = True) -> dict[str, Measure]:
        found, self._shown, self._written = measured(writer, self.scorers, self.sampling, panel=panel)
        return found

    def _adopted(self, method: str, budget: float | None) -> bool:
        cell = self.known.get((method, budget))
        if cell is None:
            return False
        self.arms[cell.arm] = self.arms_known[cell.arm]
        self.cells.append(cell)
        self._bar.update()
        return True

    def _keep(
        self,
        method: str,
        budget: float | None,
        amount: Any,
        measures: Mapping[str, Measure],
        place: float | None = None,
        development: float | None = None,
    ) -> None:
        arm = f"{method}, whole" if budget is None else f"{method} at {budget:g}"
        spent = measures["kl"].estimate.value
        if budget is not None and method != "random direction" and abs(spent / budget - 1) > _MISSED:
            self._note(f"{method} was to spend {budget:g} nats a token and spent {spent:.3g} on these prompts")
        self.cells.append(Cell(method, budget, arm, amount, place, development))
        self._keep_arm(arm, measures, amount)

    def _keep_arm(self, arm: str, measures: Mapping[str, Measure], amount: Any) -> None:
        settings = {**asdict(self.sampling), "amount": amount}
        self.arms[arm] = Arm(measures, tuple(self._shown), tuple(self._written), settings)
        self._bar.update()
        if self.after is not None:
            self.after()


def few_shot(examples: Sequence[Text]) -> str:
    """Return three of the texts as examples to follow."""
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in examples[:3]]
    return "Here are texts of the kind that is wanted.\n\n" + "\n\n".join(texts) + "\n\nAnother one of the same kind:"
