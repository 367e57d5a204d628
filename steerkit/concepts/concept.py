"""A concept: one probe a layer, what each is worth on held-out texts, and the interventions that they give."""

import dataclasses
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from steerkit import storage
from steerkit.activations import Activations, checked_texts, record, stored_fingerprint
from steerkit.concepts.examples import (
    Groups,
    check_alike,
    check_counts,
    check_direction,
    check_groups,
    check_settings,
    digest,
    group_ids,
)
from steerkit.concepts.probe import Figures, Probe, at_chance, fit_probes, split
from steerkit.conditions import Reading, Scaled
from steerkit.errors import AmountError, LayerError, SteerkitWarning, TextsError
from steerkit.hub import HubArtefact
from steerkit.intervention import Addition, Constraint, Erasure
from steerkit.model import Fingerprint, find_decoder, resolve_layers
from steerkit.types import DIRECTIONS, Amount, Direction, Layers, Positions, Read, Text


@dataclass(frozen=True, eq=False)
class Concept(HubArtefact):
    """A concept of one model, `concept[layer]` its probe at each layer. Made by `Concept.fit`; frozen.

    Example:
        toxicity = Concept.fit("toxicity", model, tokenizer, positive=toxic_texts, negative=clean_texts)
        with Controller(model, [toxicity.constrain(at_most=0.01)]):
            model.generate(**inputs)
    """

    name: str
    probes: Mapping[int, Probe] = field(repr=False)
    figures: Mapping[int, Figures] = field(repr=False)
    """What each probe does on the held-out texts."""
    directions: Mapping[str, Mapping[int, Tensor]] = field(repr=False)
    """Unit directions by kind and layer: the probe, the pattern, the difference of means."""
    direction: Direction
    """The kind that its interventions move along; `along` gives the same concept with another."""
    norms: Mapping[int, float] = field(repr=False)
    """Mean norm of the hidden states it was fitted on: the unit in which to compare doses."""
    depth: int
    fingerprint: Fingerprint | None = field(repr=False, default=None)
    made: Mapping[str, Any] = field(repr=False, default_factory=dict)
    """How it was made: numbers of texts, digest of the data, seed, settings."""

    @classmethod
    def fit(
        cls,
        name: str,
        model: Any,
        tokenizer: Any,
        *,
        positive: Sequence[Text],
        negative: Sequence[Text],
        layers: Layers | None = None,
        direction: Direction = "pattern",
        held_out: float = 0.2,
        seed: int = 0,
        groups: Groups | None = None,
        read: Read = "last",
        regularisation: float | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> "Concept":
        """Record both sets of texts and fit one calibrated logistic probe a layer (GCAV, equation 1).

        Args:
            name: the key for `Controller.using`.
            model: the model to steer.
            tokenizer: its tokenizer; not changed.
            positive: texts that show the concept; strings or conversations, as in `record`.
            negative: texts that do not. The two need not be paired nor as many.
            layers: blocks to probe; all by default.
            direction: what interventions move along: `"pattern"` (Sigma w, Sigma the covariance of the states), `"probe"` (w, the
                paper's) or `"mean_difference"`. The probe measures in any case. At one KL a token the pattern moved the text
                further than the probe on both concepts on which it was measured (docs/evidence.md), hence the default.
            held_out: share of the texts of each class that the fit never sees, at most a half; the nearest of 1/2, 1/3, 1/4
                and so on is taken.
            seed: of the split.
            groups: one label a positive and one a negative text; texts of one group stay on one side of the split.
                Equal texts always do.
            read: `"last"` token or `"mean"` over tokens.
            regularisation: inverse L2 strength C on standardised features; chosen by cross-validation by default.
            batch_size: texts run together.
            progress: show a progress bar; by default for more than 200 texts on a terminal.

        Raises:
            TextsError: no texts, one class only, too few texts, entries that are no text.
            LayerError: a layer that does not exist.
            UnsupportedModelError: a model that cannot be read.

        Warns:
            SteerkitWarning: no probe is better than chance on the held-out texts.
        """
        positive, negative = checked_texts(positive, "positive"), checked_texts(negative, "negative")
        check_settings(name, direction, held_out, regularisation)
        check_counts(len(positive), len(negative), held_out)
        check_groups(groups, len(positive), len(negative))
        resolve_layers(layers, find_decoder(model).depth)
        if progress is None:
            progress = len(positive) + len(negative) > 200 and sys.stderr.isatty()
        both = record(
            model, tokenizer, [*positive, *negative], layers=layers, read=read, batch_size=batch_size, progress=progress
        )
        count = len(positive)
        return cls.from_activations(
            name,
            _part(both, slice(0, count)),
            _part(both, slice(count, None)),
            direction=direction,
            held_out=held_out,
            seed=seed,
            groups=groups,
            regularisation=regularisation,
        )

    @classmethod
    def from_activations(
        cls,
        name: str,
        positive: Activations,
        negative: Activations,
        *,
        direction: Direction = "pattern",
        held_out: float = 0.2,
        seed: int = 0,
        groups: Groups | None = None,
        regularisation: float | None = None,
    ) -> "Concept":
        """Fit from recordings: many concepts on one, or states recorded elsewhere. Arguments as in `fit`."""
        check_settings(name, direction, held_out, regularisation)
        check_counts(len(positive), len(negative), held_out)
        check_groups(groups, len(positive), len(negative))
        if positive.layers != negative.layers:
            raise LayerError(
                f"Both recordings must hold the same layers. Found {positive.layers} and {negative.layers}. Record both alike."
            )
        check_alike(positive, negative)
        if positive.fingerprint is not None and negative.fingerprint is not None:
            positive.fingerprint.check(negative.fingerprint, "the positive recording")
        layers = positive.layers
        states = [torch.cat([positive[layer], negative[layer]]) for layer in layers]
        for layer, state in zip(layers, states, strict=True):
            if not bool(state.isfinite().all()):
                raise TextsError(
                    f"Hidden states must be finite. Found NaN or infinity at layer {layer}. Load the model in float32 or bfloat16."
                )
        labels = np.array([1] * len(positive) + [0] * len(negative), dtype=np.int64)
        parts = split(labels, group_ids(positive, negative, groups), held_out, seed)
        fitted = fit_probes(states, labels, parts, regularisation=regularisation, seed=seed)
        at = dict(zip(layers, fitted, strict=True))
        base = positive.fingerprint or negative.fingerprint
        concept = cls(
            name=name,
            probes={layer: one.probe for layer, one in at.items()},
            figures={layer: one.figures for layer, one in at.items()},
            directions={kind: {layer: one.directions[kind] for layer, one in at.items()} for kind in DIRECTIONS},
            direction=direction,
            norms={layer: one.norm for layer, one in at.items()},
            depth=base.depth if base is not None else max(layers) + 1,
            fingerprint=base,
            made={
                "positive": len(positive),
                "negative": len(negative),
                "held_out": int(parts.held_out.sum()),
                "read": positive.read,
                "seed": int(seed),
                "regularisation": None if regularisation is None else float(regularisation),
                "digest": digest(positive, negative),
            },
        )
        concept._warn_at_chance()
        return concept

    def _warn_at_chance(self) -> None:
        best = self.figures[self.best_layer]
        if at_chance(best, tried=len(self.layers)):
            warnings.warn(
                f"No probe of {self.name!r} is better than chance on {self.made['held_out']} held-out texts: the best, at "
                f"layer {self.best_layer} of {len(self.layers)}, has accuracy {best.accuracy:.2f} "
                f"[{best.accuracy_interval[0]:.2f}, {best.accuracy_interval[1]:.2f}]. Steering along it moves something "
                "else. Use more or clearer texts.",
                SteerkitWarning,
                stacklevel=3,
            )

    def __getitem__(self, layer: int) -> Probe:
        return self.probes[self._own_layers(layer)[0]]

    def __repr__(self) -> str:
        best = self.figures[self.best_layer]
        model = "" if self.fingerprint is None else f", model={self.fingerprint.name!r}"
        return (
            f"Concept({self.name!r}, {len(self.layers)} layers {self.layers[0]}..{self.layers[-1]}, "
            f"direction={self.direction!r}, best layer {self.best_layer} with accuracy {best.accuracy:.2f} on "
            f"{self.made.get('held_out', '?')} held-out texts, steering_layers={self.steering_layers}{model})"
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """All probed layers, in order."""
        return tuple(self.probes)

    @property
    def accuracy(self) -> dict[int, float]:
        """Held-out accuracy by layer (the mean of both classes' accuracies)."""
        return {layer: figures.accuracy for layer, figures in self.figures.items()}

    @property
    def auc(self) -> dict[int, float]:
        """Held-out area under the ROC curve by layer."""
        return {layer: figures.auc for layer, figures in self.figures.items()}

    @property
    def calibration_error(self) -> dict[int, float]:
        """Expected calibration error by layer, each held-out text at a temperature that it did not help to fit."""
        return {layer: figures.calibration_error for layer, figures in self.figures.items()}

    @property
    def mover(self) -> dict[int, Tensor]:
        """The unit direction that interventions move along, by layer."""
        return dict(self.directions[self.direction])

    @property
    def best_layer(self) -> int:
        """The layer with the best held-out accuracy; among equals the one with the least held-out log loss."""
        return max(self.layers, key=lambda layer: (self.figures[layer].accuracy, -self.figures[layer].log_loss))

    @property
    def steering_layers(self) -> tuple[int, ...]:
        """The layers within one standard error of the best held-out accuracy; never empty."""
        best = self.figures[self.best_layer]
        least = best.accuracy - best.standard_error
        return tuple(layer for layer in self.layers if self.figures[layer].accuracy >= least)

    def along(self, direction: Direction) -> "Concept":
        """Return the same concept with interventions that move along another direction."""
        check_direction(direction)
        return replace(self, direction=direction)

    def score(self, positive: Activations, negative: Activations) -> dict[int, float]:
        """Return each probe's accuracy on other recordings (the mean of both classes' accuracies).

        A probe is fitted on one model as it stands. Under a preference vector, or any other change, it may read something
        else: record held-out texts inside the Controller and compare with `accuracy`.

            with Controller(model, [helpful.add(1.0)]):
                states = [record(model, tokenizer, texts) for texts in (positive, negative)]
            toxicity.score(*states)

        Raises:
            LayerError: no recorded layer has a probe.
            TextsError: recordings that were read at other tokens.
            BaseModelMismatchError: recordings of another base model.
        """
        shared = [layer for layer in self.layers if layer in positive.layers and layer in negative.layers]
        if not shared:
            raise LayerError(
                f"Recordings must hold a probed layer, one of {self.layers}. Found {positive.layers}. Record it."
            )
        for states in (positive, negative):
            if states.read != self.made.get("read", states.read):
                raise TextsError(
                    f"Recordings must be read as the probe's were, {self.made['read']!r}. Found {states.read!r}. Record anew."
                )
            if self.fingerprint is not None and states.fingerprint is not None:
                self.fingerprint.check(states.fingerprint, repr(self.name))
        found = {}
        for layer in shared:
            probe = self.probes[layer]
            right = [(probe.logit(positive[layer]) > 0), (probe.logit(negative[layer]) < 0)]
            found[layer] = float(sum(each.double().mean() for each in right)) / 2
        return found

    def reads(
        self, *, at_least: float | None = None, at_most: float | None = None, layer: int | None = None
    ) -> Reading:
        """Return what the probe reads from a prompt, before anything is edited: a condition for `Intervention.when`.

            steps = harmless.add(1.0).when(harmful_request.reads(at_least=0.5) & ~fiction.reads(at_least=0.5))
            harmless.add(harmful_request.reads().scaled(0, 1))  # an amount that follows the reading

        `P = sigmoid(w . h + b)`, h the plain model's state at the prompt's last token, or its mean if the concept was fitted
        with `read="mean"`.

        Args:
            at_least: holds for prompts with at least this probability.
            at_most: holds for prompts with at most this one; with both, for those between.
            layer: where; by default `best_layer`.

        Raises:
            ConditionError: a bound that is no probability, that every prompt meets, or two that none does.
            LayerError: a layer that was not probed.
        """
        [layer, *more] = self._own_layers(self.best_layer if layer is None else layer)
        if more:
            raise LayerError(f"A condition reads one layer. Found {[layer, *more]}. Combine two with &.", layer=layer)
        probe = self.probes[layer]
        read = cast(Read, self.made.get("read", "last"))
        return Reading(self.name, layer, probe.weight, probe.bias, at_least, at_most, read, self.fingerprint)

    def add(
        self,
        magnitude: Amount | Scaled,
        *,
        layers: Layers | None = None,
        positions: Positions = "all",
        name: str | None = None,
    ) -> Addition:
        """Return `h' = h + m u`, u the unit direction of `mover`.

        Args:
            magnitude: m, in units of the residual stream (`norms` tells how long the stream is): a number, one a
                sample, `(samples, layers)`, `{layer: either of the first two}`, or `reading.scaled(low, high)`.
            layers: where; by default the single best layer, or the layers that `magnitude` names.
            positions: which tokens; all by default.
            name: the key within a Controller; the concept's name by default.

        Raises:
            AmountError: a magnitude that is no finite number or of the wrong shape.
            LayerError: a layer that was not probed.
        """
        chosen = self._chosen(layers, magnitude, (self.best_layer,))
        amount = self._keyed(magnitude)
        return Addition(name or self.name, chosen, positions, amount, self.fingerprint, self._movers(chosen))

    def erase(self, *, layers: Layers | None = None, positions: Positions = "all", name: str | None = None) -> Erasure:
        """Return `h' = h - (u . h) u`: nothing is left along the direction of `mover`.

        In many models the first token is an attention sink, with a state a hundred times as long as others' and a large part
        of it along any direction that is not random. Erasing there may break what the model knows: on SmolLM2 it took an
        answer from .91 of its effect to none. `positions="last"` leaves the prompt alone but for its last token.

        Args:
            layers: where; by default `steering_layers`.
            positions: which tokens; all by default.
            name: the key within a Controller; the concept's name by default.

        Raises:
            LayerError: a layer that was not probed.
        """
        chosen = self._chosen(layers, None, self.steering_layers)
        return Erasure(name or self.name, chosen, positions, 1.0, self.fingerprint, self._movers(chosen))

    def constrain(
        self,
        *,
        at_most: Amount | Scaled | None = None,
        at_least: Amount | Scaled | None = None,
        layers: Layers | None = None,
        positions: Positions = "last",
        max_magnitude: float | None = None,
        name: str | None = None,
    ) -> Constraint:
        """Return the smallest edit along `mover` after which the probe meets a bound (GCAV, equations 6 and 7).

        `eps = (logit(p) - b - w . h) / (w . u)`, `h' = h + eps u` where the bound is violated; every other row is
        untouched, bit for bit. The magnitude is computed anew for each row, position and layer.

        Args:
            at_most: remove: the largest probability allowed; a number, one a sample, `(samples, layers)`, or by layer.
            at_least: amplify: the smallest. Exactly one of the two; `at_most=1` and `at_least=0` are off.
            layers: where; by default `steering_layers`. A later layer's probe sees what an earlier one changed.
            positions: which tokens; by default the last prompt position and every later one.
            max_magnitude: cap, as a fraction of the norm of the hidden state; capped rows are out of the promise.
            name: the key within a Controller; the concept's name by default.

        Raises:
            AmountError: both or neither bound, a bound that is no probability or would take an infinite edit.
            LayerError: a layer that was not probed.
        """
        if (at_most is None) == (at_least is None):
            found = "neither" if at_most is None else "both"
            raise AmountError(
                f"Exactly one of `at_most` and `at_least` is required. Found {found}. For a band, use two constraints "
                "and give one of them a `name`."
            )
        bound = cast(Amount | Scaled, at_least if at_most is None else at_most)
        chosen = self._chosen(layers, bound, self.steering_layers)
        movers = self._movers(chosen)
        for layer in chosen:
            gain = float(self.probes[layer].weight @ movers[layer])
            if not gain > 0:
                raise AmountError(
                    f"The probe of {self.name!r} must rise along {self.direction!r}. Found w . u = {gain:.3g} at layer "
                    f"{layer}. Leave the layer out, or use direction='probe'."
                )
        return Constraint(
            name or self.name,
            chosen,
            positions,
            self._keyed(bound),
            self.fingerprint,
            sense=-1 if at_least is None else 1,
            weights={layer: self.probes[layer].weight for layer in chosen},
            biases={layer: self.probes[layer].bias for layer in chosen},
            directions=movers,
            max_magnitude=max_magnitude,
        )

    def _movers(self, layers: Sequence[int]) -> dict[int, Tensor]:
        return {layer: self.directions[self.direction][layer] for layer in layers}

    def _chosen(self, layers: Layers | None, amount: Any, default: tuple[int, ...]) -> tuple[int, ...]:
        if layers is not None:
            return self._own_layers(layers)
        return self._own_layers(tuple(amount)) if isinstance(amount, Mapping) else default

    def _keyed(self, amount: Amount | Scaled) -> Amount | Scaled:
        """Return an amount with its layers, if it names any, as the model counts them."""
        if not isinstance(amount, Mapping):
            return amount
        return {self._own_layers(layer)[0]: value for layer, value in amount.items()}

    def _own_layers(self, layers: Layers) -> tuple[int, ...]:
        resolved = resolve_layers(layers, self.depth)
        missing = [layer for layer in resolved if layer not in self.probes]
        if missing:
            raise LayerError(
                f"Layer {missing[0]} has no probe: {self.name!r} was fitted at layers {self.layers}. Choose among them, "
                "or fit it there.",
                layer=missing[0],
            )
        return resolved

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically."""
        tensors = {
            "weight": torch.stack([probe.weight for probe in self.probes.values()]),
            "bias": torch.tensor([probe.bias for probe in self.probes.values()], dtype=torch.float64),
            "norm": torch.tensor([self.norms[layer] for layer in self.layers], dtype=torch.float64),
        }
        for kind, directions in self.directions.items():
            tensors[f"direction.{kind}"] = torch.stack([directions[layer] for layer in self.layers])
        header: dict[str, Any] = {
            "name": self.name,
            "layers": list(self.layers),
            "direction": self.direction,
            "depth": self.depth,
            "figures": [dataclasses.asdict(self.figures[layer]) for layer in self.layers],
            "made": dict(self.made),
        }
        if self.fingerprint is not None:
            header["base_model"] = self.fingerprint.header()
            tensors["base_model.values"] = self.fingerprint.values
        storage.write(path, "concept", header, tensors)

    @classmethod
    def from_stored(cls, stored: storage.Stored) -> "Concept":
        """Rebuild from a file that `storage.read` has checked."""
        depth = stored.entry("depth", int)
        layers = stored.layers(depth)
        direction = stored.entry("direction", str)
        fingerprint = stored_fingerprint(stored)
        count = len(layers)
        weight = stored.tensor("weight", count, -1)
        width = weight.shape[1]
        own = fingerprint is None or (fingerprint.depth, fingerprint.d_model) == (depth, width)
        if direction not in DIRECTIONS or not own:
            raise stored.broken(f"direction={direction!r}, depth={depth} and width={width} on {fingerprint}")
        bias = stored.tensor("bias", count, dtype=torch.float64)
        norms = stored.tensor("norm", count, dtype=torch.float64)
        figures = stored.entry("figures", list)
        if len(figures) != count:
            raise stored.broken(f"{len(figures)} figures for {count} layers")
        try:
            rebuilt = [_figures(entry) for entry in figures]
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise stored.broken(f"figures that are not numbers ({error})") from error
        stacks = {kind: stored.tensor(f"direction.{kind}", count, width) for kind in DIRECTIONS}
        at = list(enumerate(layers))
        made = stored.entry("made", dict)
        if made.get("read", "last") not in ("last", "mean"):
            raise stored.broken(f"read={made['read']!r:.40}")
        return cls(
            name=stored.entry("name", str),
            probes={layer: Probe(weight[i], float(bias[i])) for i, layer in at},
            figures={layer: rebuilt[i] for i, layer in at},
            directions={kind: {layer: stack[i] for i, layer in at} for kind, stack in stacks.items()},
            direction=cast(Direction, direction),
            norms={layer: float(norms[i]) for i, layer in at},
            depth=depth,
            fingerprint=fingerprint,
            made=made,
        )


def _figures(entry: Any) -> Figures:
    """Return figures from a file's header; every one must be a finite number, and an interval a pair."""
    values: dict[str, Any] = {}
    for name in Figures.__dataclass_fields__:
        pair = name.endswith("interval")
        low, high = (float(v) for v in entry[name]) if pair else (float(entry[name]),) * 2
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{name} = {entry[name]!r:.40}")
        if name.startswith(("accuracy", "auc")) and not 0 <= low <= high <= 1:
            raise ValueError(f"{name} = {entry[name]!r:.40}")
        values[name] = (low, high) if pair else low
    return Figures(**values)


def _part(both: Activations, rows: slice) -> Activations:
    states = {layer: both[layer][rows] for layer in both.layers}
    return Activations(states, both.read, both.fingerprint, both.digests[rows])
