"""When an intervention acts: gates that the prompt decides, amounts that follow what a probe reads, schedules over steps.

A gate is decided once, from the prompt as the plain model reads it, before anything is edited, and holds for all that is
generated from it (CAST, arXiv:2409.05907, reads the prompt too). So it means the same with and without a cache, in
chunks, under beams, at any layer before or after the one that is read, and for changes of weights. What it comes to is an
amount for each sample, which is why a compiled model need not know of it.

A schedule counts the tokens that were generated before. Step 0 is the prompt, which yields the first new token; step t is
the t-th new token, which yields the next.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from steerkit.errors import BaseModelMismatchError, ConditionError, LayerError
from steerkit.model import Decoder, Fingerprint
from steerkit.types import Read


class Condition(ABC):
    """What holds of a prompt or does not; combined with `&`, `|` and `~`."""

    @property
    @abstractmethod
    def readings(self) -> tuple["Reading", ...]:
        """The readings that decide it."""

    @abstractmethod
    def holds(self, read: Mapping["Reading", Tensor]) -> Tensor:
        """Return `"sample"`, whether it holds, from what each reading read."""

    def __and__(self, other: "Condition") -> "Condition":
        return Combination(torch.logical_and, "&", (checked(self), checked(other)))

    def __or__(self, other: "Condition") -> "Condition":
        return Combination(torch.logical_or, "|", (checked(self), checked(other)))

    def __invert__(self) -> "Condition":
        return Combination(torch.logical_not, "~", (checked(self),))

    def __bool__(self) -> NoReturn:
        raise ConditionError(
            f"A condition is decided by each prompt, so it has no truth of its own. Found {self!r} where Python asks for "
            "one. Combine conditions with &, | and ~ instead of and, or and not."
        )


@final
@dataclass(frozen=True, eq=False)
class Combination(Condition):
    """Conditions put together."""

    function: Callable[..., Tensor]
    sign: str
    parts: tuple[Condition, ...]

    def __repr__(self) -> str:
        shown = [f"({part!r})" if isinstance(part, Combination) else repr(part) for part in self.parts]
        return f"~{shown[0]}" if len(shown) == 1 else f" {self.sign} ".join(shown)

    @property
    def readings(self) -> tuple["Reading", ...]:
        return tuple(dict.fromkeys(reading for part in self.parts for reading in part.readings))

    def holds(self, read: Mapping["Reading", Tensor]) -> Tensor:
        return self.function(*(part.holds(read) for part in self.parts))


@final
@dataclass(frozen=True, eq=False)
class Reading(Condition):
    """What a probe reads from a prompt, `P = sigmoid(w . h + b)` after one block; with a bound, a condition.

    Made by `Concept.reads`. h is the plain model's state at the token where the concept's texts were read: the prompt's
    last, or the mean over it.
    """

    name: str
    layer: int
    weight: Tensor = field(repr=False)
    """`"d_model"`"""
    bias: float = field(repr=False)
    at_least: float | None = None
    at_most: float | None = None
    read: Read = "last"
    fingerprint: Fingerprint | None = field(repr=False, default=None)

    def __post_init__(self) -> None:
        for word, bound, always in (("at_least", self.at_least, 0.0), ("at_most", self.at_most, 1.0)):
            if bound is None:
                continue
            if not isinstance(bound, Real) or isinstance(bound, bool) or not 0 <= bound <= 1:
                raise ConditionError(
                    f"`{word}` of a condition must be a probability, one for all samples. Found {bound!r:.60}. Use 0.5."
                )
            if bound == always:
                raise ConditionError(
                    f"A condition must be able to fail. Found {word}={bound:g}, which every prompt meets. Use a bound inside "
                    "(0, 1), or leave the condition out."
                )
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ConditionError(
                f"A condition must be able to hold. Found at_least={self.at_least:g} above at_most={self.at_most:g}. "
                "For what lies outside a band use ~concept.reads(at_least=..., at_most=...)."
            )

    def __repr__(self) -> str:
        low = "" if self.at_least is None else f"{self.at_least:g} <= "
        high = "" if self.at_most is None else f" <= {self.at_most:g}"
        return f"{low}P({self.name}, layer {self.layer}){high}"

    @property
    def readings(self) -> tuple["Reading", ...]:
        return (self,)

    def probability(self, hidden_states: Tensor) -> Tensor:
        """Return P, `"sample"` float64, for `"sample d_model"`."""
        return (hidden_states.double() @ self.weight.double() + self.bias).sigmoid()

    def holds(self, read: Mapping["Reading", Tensor]) -> Tensor:
        found = torch.ones_like(read[self], dtype=torch.bool)
        if self.at_least is not None:
            found &= read[self] >= self.at_least
        if self.at_most is not None:
            found &= read[self] <= self.at_most
        return found

    def scaled(self, low: float, high: float) -> "Scaled":
        """Return the amount `low + (high - low) P`: an amount for each sample, from what is read of its prompt.

            harmless.add(harmful_request.reads(layer=12).scaled(0, 1))

        Raises:
            ConditionError: an end that is no finite number, or two that are alike.
        """
        return Scaled(self, low, high)

    def check(self, decoder: Decoder) -> None:
        """Raise unless this model has the layer, and states as wide as the probe."""
        if self.layer >= decoder.depth:
            raise LayerError(
                f"Layer {self.layer}, where a condition reads {self.name!r}, does not exist: the model has {decoder.depth} "
                f"decoder blocks (0..{decoder.depth - 1}). Fit it on this model, or read another layer.",
                layer=self.layer,
                depth=decoder.depth,
            )
        if len(self.weight) != decoder.d_model:
            raise BaseModelMismatchError(
                f"{self.name!r} reads a residual stream of width {len(self.weight)}, this model's has {decoder.d_model}. "
                "Fit it on this model."
            )


@final
@dataclass(frozen=True, eq=False)
class Scaled:
    """An amount that follows a reading, `low + (high - low) P`; made by `Reading.scaled`."""

    reading: Reading
    low: float
    high: float

    def __post_init__(self) -> None:
        for end in (self.low, self.high):
            if not isinstance(end, Real) or isinstance(end, bool) or not math.isfinite(end):
                raise ConditionError(f"`scaled` takes two finite numbers. Found {end!r:.60}. Use scaled(0, 1).")
        if self.low == self.high:
            raise ConditionError(
                f"An amount that follows a reading must change with it. Found {self.low:g} at both ends. Pass the number "
                "itself as the amount."
            )

    def of(self, read: Mapping[Reading, Tensor]) -> Tensor:
        """Return the amounts, `"sample"`."""
        return self.low + (self.high - self.low) * read[self.reading]


@final
@dataclass(frozen=True)
class Schedule:
    """How much of an intervention is left at each step; made by `stop_after`, `linear` and `exponential`."""

    name: str
    factor: Callable[[Tensor], Tensor] = field(repr=False, compare=False)
    """From steps, `"pos"`, to the share of the amount that is left, float32."""
    whole: bool
    """Whether it is all or nothing at every step, so that a bound can follow it."""

    def __repr__(self) -> str:
        return self.name


def stop_after(tokens: int) -> Schedule:
    """Return a schedule under which the first `tokens` new tokens are steered and no later one.

    Raises:
        ConditionError: no whole number above 0.
    """
    _check(tokens, "stop_after", whole=True)
    return Schedule(f"stop_after({tokens})", lambda steps: (steps < tokens).float(), whole=True)


def linear(start: float, end: float, *, over: int) -> Schedule:
    """Return `start + (end - start) min(step / over, 1)` as the share of a magnitude that is left at a step.

    Raises:
        ConditionError: a share that is no finite number, two that are alike, or `over` no whole number above 0.
    """
    _check(over, "over", whole=True)
    for share in (start, end):
        if not isinstance(share, Real) or isinstance(share, bool) or not math.isfinite(share):
            raise ConditionError(
                f"`linear` goes from one finite share to another. Found {share!r:.60}. Use 1.0 to 0.0."
            )
    if start == end:
        raise ConditionError(f"A schedule must change with the step. Found {start:g} throughout. Scale the magnitude.")
    name = f"linear({start:g}, {end:g}, over={over})"
    return _finite(
        Schedule(name, lambda steps: start + (end - start) * (steps.float() / over).clamp(max=1.0), whole=False)
    )


def exponential(*, half_life: float) -> Schedule:
    """Return `2 ** (-step / half_life)` as the share of a magnitude that is left at a step.

    Raises:
        ConditionError: `half_life` no finite number above 0.
    """
    _check(half_life, "half_life", whole=False)
    name = f"exponential(half_life={half_life:g})"
    return _finite(Schedule(name, lambda steps: torch.exp2(-steps / half_life), whole=False))


def _finite(schedule: Schedule) -> Schedule:
    if not bool(schedule.factor(torch.tensor([0.0, 1.0])).isfinite().all()):
        raise ConditionError(f"A schedule must leave finite shares in float32. Found {schedule}. Use moderate numbers.")
    return schedule


def _check(number: Any, name: str, *, whole: bool) -> None:
    kind = int if whole else Real
    if not isinstance(number, kind) or isinstance(number, bool) or not math.isfinite(number) or number <= 0:
        wanted = "a whole number of tokens above 0" if whole else "a number of tokens above 0"
        raise ConditionError(f"`{name}` must be {wanted}. Found {number!r:.60}. Use 20.")


def checked(condition: Any) -> Condition:
    """Return a condition that can decide.

    Raises:
        ConditionError: something else, or a reading without a bound.
    """
    if not isinstance(condition, Condition):
        raise ConditionError(
            f"A condition is required. Found {type(condition).__name__}. Use concept.reads(at_least=0.5)."
        )
    if isinstance(condition, Reading) and condition.at_least is None and condition.at_most is None:
        raise ConditionError(
            f"A condition needs a bound. Found {condition!r}, a reading without one. Use reads(at_least=0.5), or an amount "
            "that follows it: add(reading.scaled(0, 1))."
        )
    return condition
