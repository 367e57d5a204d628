"""`calibrate`: how much of an intervention reaches a target, or stays within a budget.

The search draws the same random numbers at every amount, so neighbouring amounts differ by what they do and little else.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch

from steerkit.activations import checked_texts, record
from steerkit.concepts.concept import Concept
from steerkit.conditions import Scaled
from steerkit.controller import Controller
from steerkit.errors import AmountError, CalibrationError, SteerkitWarning
from steerkit.evaluation import scorers as ready
from steerkit.evaluation.report import Estimate, Measure, markdown
from steerkit.evaluation.run import checked_sampling, measured, named
from steerkit.evaluation.scorers import Scorer
from steerkit.hooks import unsteered
from steerkit.intervention import Addition, Constraint, Erasure, Intervention
from steerkit.model import evaluating, find_decoder
from steerkit.passes import Writer
from steerkit.types import Amount, Text

_NEAR = 0.05
"""How near to a target, as a share of the way there, ends the search; of a budget this much may be left unspent twice."""
_REACH = 0.5
"""Largest addition that is tried by default, as a share of the residual norm: beyond it text breaks."""


@dataclass(frozen=True)
class Dose:
    """One amount that was tried, and what it did."""

    amount: Any
    """Ready for `Controller.using`."""
    place: float
    """Where between the least (0) and the most (1) it lies."""
    measures: Mapping[str, Measure] = field(repr=False)
    score: Estimate | None
    kl: Estimate
    """Nats a token, from the unsteered model."""
    kl_p90: Estimate
    dose: Estimate | None
    """Relative change of the residual stream after the last edited block: of one addition, magnitude over residual norm; None
    for an instruction."""


@dataclass(frozen=True)
class Calibration:
    """What a search found; `using(**{name: found.amount})` sets it.

    Example:
        found = calibrate(model, tokenizer, prompts, sentiment.add(1.0), budget=0.1)
        with Controller(model, [sentiment.add(found.amount)]):
            model.generate(**inputs)
    """

    chosen: Dose
    curve: tuple[Dose, ...] = field(repr=False)
    """Everything that was tried, from the least to the most."""
    monotone: bool
    """Whether more never did less, beyond the noise of these prompts."""
    goal: str

    @property
    def amount(self) -> Any:
        """The amount that was found."""
        return self.chosen.amount

    def table(self) -> str:
        """Return the dose-response curve as a Markdown table; a star marks what was chosen."""
        scored = self.chosen.score is not None
        head = ["amount", *(["score"] if scored else []), "KL a token", "90th percentile", "displacement", ""]
        rows = [
            [
                _shown(dose.amount),
                *([str(dose.score)] if scored else []),
                *map(str, (dose.kl, dose.kl_p90, dose.dose or "")),
                "*" if dose is self.chosen else "",
            ]
            for dose in self.curve
        ]
        return markdown(head, rows)


def calibrate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    intervention: Intervention,
    *,
    scorer: Scorer | Concept | None = None,
    target: float | None = None,
    budget: float | None = None,
    between: tuple[float, float] | None = None,
    trials: int = 10,
    max_new_tokens: int = 24,
    samples: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
) -> Calibration:
    """Find the smallest amount that reaches a target, or the largest within a budget of KL.

    Interpolation kept inside a bracket (bisection where that does not shrink it), on amounts of one sign: magnitudes, or
    logits of a bound. Calibrate on prompts that the evidence does not come from.

    Args:
        model: the model, as the caller's `with` leaves it; the budget counts all that is attached.
        tokenizer: its tokenizer.
        prompts: strings or conversations.
        intervention: an addition, a constraint or a preference vector. Its own amount gives the sign, and by layer the
            proportions, which are kept.
        scorer: a function `(prompts, completions) -> scores`, or a concept, whose probe then reads the text; with a
            budget it decides nothing and is told in the curve.
        target: the mean score to reach.
        budget: the largest mean KL a token from the unsteered model, in nats.
        between: least and largest amount to try, of one sign (by layer: of the largest); by default up to half the residual
            norm, a magnitude of 2 for a preference vector, and bounds from .01 to 1 - 1e-6 (or .99 to 1e-6).
        trials: most amounts to try.
        max_new_tokens: tokens a continuation.
        samples: continuations of each prompt.
        temperature: of the sampling.
        seed: of the sampling.
        batch_size: rows that run together.

    Raises:
        AmountError: neither or both of target and budget, an erasure, amounts for each sample, a range that is none.
        CalibrationError: the target is out of reach, or the least amount breaks the budget; `.curve` holds what was tried.
        ScorerError: a scorer that fails.
        TextsError: no prompts.

    Warns:
        SteerkitWarning: more did less somewhere, or the largest amount leaves the budget unspent.
    """
    prompts = checked_texts(prompts, "prompts")
    sampling = checked_sampling(max_new_tokens, samples, temperature, seed, batch_size)
    _check_goal(scorer, target, budget, trials)
    if isinstance(scorer, Concept):
        scorer = ready.probe(scorer, model, tokenizer)
    by_name = {} if scorer is None else named({"score": scorer})
    decoder = find_decoder(model)
    writer = Writer(decoder, tokenizer, prompts)
    writer.refuse_long(max_new_tokens)
    amounts = dial(model, tokenizer, prompts, intervention, between)
    search = Search(intervention.name, amounts, trials)
    with evaluating(decoder.model):
        plain = None if budget is not None else measured(writer, by_name, sampling, panel=False)[0]["score"]
        with Controller(model, [intervention]) as control:

            def measure(amount: Amount) -> dict[str, Measure]:
                with control.using(**{intervention.name: amount}):
                    return measured(writer, by_name, sampling)[0]

            search.measure = measure
            if plain is None:
                assert budget is not None
                return search.within(float(budget))
            assert target is not None
            return search.towards(float(target), plain)


def _check_goal(scorer: Any, target: float | None, budget: float | None, trials: int) -> None:
    if (target is None) == (budget is None) or (target is not None and scorer is None):
        raise AmountError(
            "One goal is required: a `target` with its `scorer`, or a `budget`. Found "
            f"target={target}, budget={budget}, scorer={'none' if scorer is None else 'one'}."
        )
    goal = target if budget is None else budget
    if not isinstance(goal, Real) or not math.isfinite(goal) or (budget is not None and budget <= 0):
        raise AmountError(f"A budget must be a positive number and a target a finite one. Found {goal!r}.")
    if not isinstance(trials, int) or trials < 3:
        raise AmountError(f"A search needs 3 trials or more. Found {trials!r}.")


_LADDER = (0.25, 0.5, 1.0)
"""Places that are tried until one is enough."""

Dial = Callable[[float], Any]


def dial(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    intervention: Intervention,
    between: tuple[float, float] | None = None,
) -> Dial:
    """Return what maps 0 (least) to 1 (most) to an amount.

    Raises:
        AmountError: an erasure, amounts for each sample, a range that is none.
    """
    if isinstance(intervention, Erasure) or not isinstance(intervention, Intervention):
        raise AmountError(
            f"An amount can be calibrated of an addition, a constraint or a preference vector. Found "
            f"{type(intervention).__name__}. An erasure is on or off."
        )
    if isinstance(intervention.amount, Scaled):
        raise AmountError(
            f"One number for all samples is calibrated. Found {intervention.amount.reading!r} as the amount of {intervention.name!r}. "
            "Pass a number; a condition may stay."
        )
    own = intervention.read(intervention.amount)
    if own.samples is not None:
        raise AmountError(
            f"One amount for all samples is calibrated. Found {own.samples} for {intervention.name!r}. Pass a number."
        )
    intervention.check(find_decoder(model))
    by_layer = bool((own.values != own.values[0, 0]).any())
    if between is not None:
        between = _checked_range(between, intervention.sense if isinstance(intervention, Constraint) else None)
    if isinstance(intervention, Constraint):
        if by_layer:
            raise AmountError(
                f"One bound for all layers is calibrated. Found one by layer for {intervention.name!r}. Pass a number."
            )
        far = (0.01, 1 - 1e-6) if intervention.sense > 0 else (0.99, 1e-6)
        low, high = (float(intervention.read(p).values[0, 0]) for p in between or far)
        return lambda t: float(torch.sigmoid(torch.tensor(low + t * (high - low), dtype=torch.float64)))
    given = bool(own.values.any())
    largest = float(own.values[0, own.values[0].abs().argmax()]) if given else 1.0
    shape = own.values[0] / largest if given else torch.ones_like(own.values[0])
    if between is None:
        most = 2.0
        if isinstance(intervention, Addition):
            with unsteered(find_decoder(model).model):
                states = record(model, tokenizer, prompts[:64], layers=intervention.layers)
            norms = [float(states[layer].norm(dim=-1).mean()) for layer in intervention.layers]
            most = _REACH * min(n / abs(float(p)) for n, p in zip(norms, shape, strict=True) if p)
        between = (0.0, math.copysign(most, largest))
    elif given and sum(between) * largest < 0:
        raise AmountError(
            f"`between` must have the sign of the intervention's own amount (by layer: of the largest). Found {between} for "
            f"{largest:g}. Turn one of them."
        )
    low, high = between

    def amount(t: float) -> Amount:
        size = low + t * (high - low)
        if not by_layer:
            return size
        return {layer: size * float(part) for layer, part in zip(intervention.layers, shape, strict=True)}

    return amount


def _checked_range(between: Any, sense: int | None) -> tuple[float, float]:
    fine = isinstance(between, tuple | list) and len(between) == 2
    fine = fine and all(isinstance(end, Real) and not isinstance(end, bool) and math.isfinite(end) for end in between)
    fine = fine and between[0] * between[1] >= 0
    if fine and sense is not None:
        fine = all(0 < end < 1 for end in between) and sense * (between[1] - between[0]) > 0
    elif fine:
        fine = abs(between[0]) < abs(between[1])
    if not fine:
        what = "numbers of one sign" if sense is None else "probabilities inside (0, 1)"
        raise AmountError(f"`between` must be two different {what}, the one that does less first. Found {between!r}.")
    return float(between[0]), float(between[1])


class Search:
    """Amounts tried so far, by their place on the dial; one search serves several goals."""

    measure: Callable[[Any], Mapping[str, Measure]]
    """What an amount does; set before the first goal."""

    def __init__(self, name: str, amount: Dial, trials: int) -> None:
        self.tried: dict[float, Dose] = {}
        self._name = name
        self._amount = amount
        self._trials = trials
        """Most amounts to try for one goal."""

    def within(self, budget: float) -> Calibration:
        """Return the largest amount within a budget."""
        goal = f"KL of at most {budget:g} nats a token"

        def excess(dose: Dose) -> float:
            # The root of KL grows about linearly with the length of an edit.
            return math.sqrt(max(dose.kl.value, 0.0)) - math.sqrt(budget)

        def less(first: Dose, second: Dose) -> bool:
            return _fell(second.measures["kl"].against(first.measures["kl"]))

        enough = self._solve(excess, -math.sqrt(budget), lambda dose: 1 - 2 * _NEAR <= dose.kl.value / budget <= 1)
        fitting = [place for place, dose in self.tried.items() if dose.kl.value <= budget]
        if not fitting:
            least = self.tried[min(self.tried)]
            raise CalibrationError(
                f"A budget of {budget:g} nats a token is required. Found that {self._name!r} at {_shown(least.amount)}, the least of "
                f"{len(self.tried)} amounts tried, spends {least.kl.value:.3g}. Allow more, or start lower with "
                "between=(least, most).",
                curve=self._curve(),
            )
        if not enough:
            most = self.tried[max(self.tried)]
            warnings.warn(
                f"The largest amount of {self._name!r}, {_shown(most.amount)}, spends {most.kl.value:.3g} of {budget:g} nats a token. "
                "More may do more: pass between=(least, most).",
                SteerkitWarning,
                stacklevel=3,
            )
        return self._found(self.tried[max(fitting)], goal, less)

    def towards(self, target: float, plain: Measure) -> Calibration:
        """Return the least amount found that reaches a target from where the unsteered text scores."""
        start = plain.estimate.value
        way = 1.0 if target >= start else -1.0
        reach = abs(target - start)
        if reach == 0:
            raise CalibrationError(
                f"The target must lie off the unsteered score. Found that it is {start:.3g} already. No amount is needed.",
                reached=start,
                curve=(),
            )

        def excess(dose: Dose) -> float:
            assert dose.score is not None
            return way * (dose.score.value - target)

        def less(first: Dose, second: Dose) -> bool:
            return _fell(second.measures["score"].against(first.measures["score"]), way)

        if not self._solve(excess, -reach, lambda dose: 0 <= excess(dose) <= _NEAR * reach, less):
            best = max(self.tried.values(), key=excess)
            assert best.score is not None
            fell = " More did less on the way: see the curve." if self._falls(less) else ""
            raise CalibrationError(
                f"A score of {target:g} is required. Found that {self._name!r} reaches {best.score} at {_shown(best.amount)}, "
                f"from {plain.estimate} unsteered, at a KL of {best.kl.value:.3g} nats a token.{fell} Ask for less, or for more "
                "amounts with between=(least, most).",
                reached=best.score.value,
                curve=self._curve(),
            )
        reaching = [place for place, dose in self.tried.items() if excess(dose) >= 0]
        return self._found(self.tried[min(reaching)], f"a score of {target:g}", less)

    def _solve(
        self,
        excess: Callable[[Dose], float],
        nothing: float,
        done: Callable[[Dose], bool],
        less: Callable[[Dose, Dose], bool] | None = None,
    ) -> bool:
        """Try amounts until one is done with, or trials are; return whether any is enough. `nothing` is the excess of none."""
        for trial in range(self._trials):
            found = {place: excess(dose) for place, dose in sorted(self.tried.items())}
            enough = [place for place, over in found.items() if over >= 0]
            if any(map(done, self.tried.values())):
                return True
            if not enough:
                further = [place for place in _LADDER if place > max(found, default=0.0)]
                further = further or self._beside_the_best(found, less)
                if not further:
                    return False
                self._try(further[0])
                continue
            high = enough[0]
            low, below = max(((p, over) for p, over in found.items() if p < high), default=(0.0, nothing))
            share = min(max(below / (below - found[high]), 0.1), 0.9)
            # Interpolation may creep along from one side.
            self._try(low + (high - low) * (0.5 if trial % 4 == 3 else share))
        return any(excess(dose) >= 0 for dose in self.tried.values())

    def _beside_the_best(self, found: Mapping[float, float], less: Callable[[Dose, Dose], bool] | None) -> list[float]:
        """Return a place in the wider gap beside the best one, if the most does less than it: the peak may lie between."""
        best, most = max(found, key=lambda place: found[place]), max(found)
        if less is None or best == most or not less(self.tried[best], self.tried[most]):
            return []
        left = max((place for place in found if place < best), default=0.0)
        right = min(place for place in found if place > best)
        return [(left + best) / 2 if best - left >= right - best else (best + right) / 2]

    def _try(self, place: float) -> None:
        amount = self._amount(place)
        found = self.measure(amount)
        score = found["score"].estimate if "score" in found else None
        kl, kl_p90 = (found[name].estimate for name in ("kl", "kl_p90"))
        moved = found["displacement"].estimate if "displacement" in found else None
        self.tried[place] = Dose(amount, place, found, score, kl, kl_p90, moved)

    def _curve(self) -> tuple[Dose, ...]:
        return tuple(dose for _, dose in sorted(self.tried.items()))

    def _found(self, chosen: Dose, goal: str, less: Callable[[Dose, Dose], bool]) -> Calibration:
        falls = self._falls(less)
        if falls:
            first, second = falls[0]
            warnings.warn(
                f"More of {self._name!r} should do more. Found that {_shown(second.amount)} does less than {_shown(first.amount)}. Look "
                "at the curve before you trust the amount.",
                SteerkitWarning,
                stacklevel=4,
            )
        return Calibration(chosen, self._curve(), not falls, goal)

    def _falls(self, less: Callable[[Dose, Dose], bool]) -> list[tuple[Dose, Dose]]:
        """Return pairs of which more did less."""
        return [(first, second) for first, second in itertools.combinations(self._curve(), 2) if less(first, second)]


def _fell(change: Estimate, way: float = 1.0) -> bool:
    """Tell whether a measure moved against `way` beyond its interval; of one prompt, which has none, at all."""
    return (change.high if way > 0 else -change.low) < 0 if math.isfinite(change.high) else way * change.value < 0


def _shown(amount: Any) -> str:
    if isinstance(amount, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(size)}" for key, size in amount.items()) + "}"
    return f"{float(amount):.4g}"
