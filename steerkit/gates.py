"""What prompts decide of a Controller's amounts: read once by the plain model, kept until other prompts come."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from steerkit.activations import read_prompts
from steerkit.conditions import Reading
from steerkit.errors import ConditionError, SamplesError
from steerkit.hooks import Part, Prompts
from steerkit.intervention import Amounts, Intervention
from steerkit.model import Decoder, Fingerprint


class Gates:
    """The conditions of one Controller's interventions, and what they came to for the last prompts."""

    def __init__(self, model: Any, decoder: Decoder, interventions: Sequence[Intervention], check_model: bool) -> None:
        self._model = model
        self._decoder = decoder
        self._interventions = interventions
        self._check_model = check_model
        self.decided: dict[str, Amounts] = {}
        """What the last prompts left of the amounts of what waited for them."""
        for each in interventions:
            for reading in each.readings:
                self.check(reading)

    def check(self, reading: Reading) -> None:
        """Raise unless a reading fits this model."""
        if reading.fingerprint is not None and self._check_model:
            reading.fingerprint.check(Fingerprint.of(self._model), repr(reading.name))
        reading.check(self._decoder)

    def depending(self, amounts: Mapping[str, Amounts]) -> list[Intervention]:
        """Return the interventions that wait for prompts."""
        return [e for e in self._interventions if e.condition is not None or amounts[e.name].scaled is not None]

    def current(self, amounts: Mapping[str, Amounts]) -> dict[str, Amounts]:
        """Return the amounts as prompts left them; off where none were read yet."""
        return {**amounts, **self.waiting(amounts), **self.decided}

    def waiting(self, amounts: Mapping[str, Amounts]) -> dict[str, Amounts]:
        """Return amounts that edit nothing for what waits for prompts."""
        return {each.name: each.nothing for each in self.depending(amounts)}

    def decide(self, prompts: Prompts, part: Part | None, amounts: Mapping[str, Amounts]) -> dict[str, Amounts]:
        """Read prompts with the plain model, and return what they leave of the amounts of what waits for them."""
        decided = {}
        depending = self.depending(amounts)
        scaled = (amounts[each.name].scaled for each in depending)
        asked = {
            *(reading for each in depending if each.condition is not None for reading in each.condition.readings),
            *(follows.reading for follows in scaled if follows is not None),
        }
        states = read_prompts(self._decoder, prompts, {(reading.layer, reading.read) for reading in asked})
        read = {reading: reading.probability(states[reading.layer, reading.read]) for reading in asked}
        for reading, found in read.items():
            if not bool(found.isfinite().all()):
                raise ConditionError(
                    f"A condition must read a probability. Found NaN of {reading.name!r} at layer {reading.layer} for prompt "
                    f"{int((~found.isfinite()).int().argmax())}. Load the model in float32 or bfloat16."
                )
        for each in depending:
            given = amounts[each.name]
            if part is not None and given.samples is not None:
                given = Amounts(given.values[part.samples], len(part.samples))
            values = each.decided(given, read).values
            if part is not None:
                whole = torch.full((part.total, values.shape[1]), each.off, dtype=values.dtype)
                values = whole.index_copy(0, part.samples, values)
            decided[each.name] = Amounts(values, len(values))
        return decided

    def refuse_undecided(self, samples: int, amounts: Mapping[str, Amounts]) -> None:
        """Raise if a pass continues prompts that were not read, or as many as were not."""
        for each in self.depending(amounts):
            if each.name not in self.decided:
                raise ConditionError(
                    f"A condition must see the prompts. Found a pass for {each.name!r} that continues a cache from before it "
                    "was attached, or from before its amounts were changed. Start at the first token, or use generate."
                )
            found = len(self.decided[each.name].values)
            if found != samples:
                raise SamplesError(
                    f"{each.name!r} was decided for {found} prompts but the batch has {samples}. Start at the first token, "
                    "or use generate.",
                    expected=found,
                    found=samples,
                )
