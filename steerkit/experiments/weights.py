"""Preference vectors seen from inside: what they do to what concepts read, where their weight lies, which parts act."""

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from steerkit.activations import checked_texts, record, tokenise
from steerkit.concepts.concept import Concept
from steerkit.controller import Controller
from steerkit.errors import PolicyError, SteerkitWarning, TextsError
from steerkit.experiments.running import (
    check_concept,
    divergences,
    log_probabilities,
    random_deltas,
    refuse_few,
    unedited,
)
from steerkit.experiments.table import Cell, Table, estimate
from steerkit.maths.lowrank import Delta, LowRank, decomposition, inner, transposed
from steerkit.preferences.vector import PreferenceVector
from steerkit.types import Text


def inside(
    model: Any,
    tokenizer: Any,
    vector: PreferenceVector,
    concepts: Sequence[Concept],
    texts: Sequence[Text],
    *,
    magnitude: float = 1.0,
    seed: int = 0,
) -> Table:
    """Measure what a preference vector does to what concepts read: the shift at each layer, in standard deviations.

    `shift = mean_i (s'_i - s_i) / sd(s)`, s the probe's logit on text i unsteered, s' under the vector, sd over the texts. The
    control is a random vector with changes of the same parameters, shapes, ranks and norms. A probe was fitted on the model as it
    was: under changed weights it may read something else, and `concept.score` tells whether it still separates.

    Args:
        model: the base model; not changed.
        tokenizer: its tokenizer.
        vector: the preference vector.
        concepts: whose probes read, at the token that they were fitted at.
        texts: intervals resample them.
        magnitude: of the vector.
        seed: of the random vector.

    Raises:
        AttachError: a Controller is attached.
        TextsError: fewer than two texts, no concepts, two of one name, or texts of which a probe reads one value.
        BaseModelMismatchError: a vector or a concept of another model.
    """
    texts = checked_texts(texts, "texts")
    refuse_few(texts, 2)
    names = [concept.name for concept in concepts]
    if not names or len(set(names)) < len(names):
        raise TextsError(f"Concepts are required, each with its own name. Found {names}.")
    decoder = unedited(model)
    for concept in concepts:
        check_concept(model, decoder, concept)
    added = {
        "vector": Controller(model, [vector.add(magnitude)]),
        "random": Controller(model, [replace(vector, deltas=random_deltas(vector.deltas, seed)).add(magnitude)]),
    }
    rows: list[tuple[Cell, ...]] = []
    for read in dict.fromkeys(concept.made.get("read", "last") for concept in concepts):
        here = [concept for concept in concepts if concept.made.get("read", "last") == read]
        layers = sorted({layer for concept in here for layer in concept.layers})
        plain = record(model, tokenizer, texts, layers=layers, read=read)
        moved = {}
        for name, control in added.items():
            with control:
                moved[name] = record(model, tokenizer, texts, layers=layers, read=read)
        for concept in here:
            for layer in concept.layers:
                before = concept[layer].logit(plain[layer])
                spread = before.std()
                if not float(spread) > 0:
                    raise TextsError(
                        f"{concept.name!r} must read different things of the texts. Found one at layer {layer}."
                    )
                for name, there in moved.items():
                    rows.append(
                        (concept.name, layer, name, estimate((concept[layer].logit(there[layer]) - before) / spread))
                    )
    return Table(
        f"What {vector.name!r} at {magnitude:g} does to what concepts read",
        f"Mean shift of the probe's logit over {len(texts)} texts, in its standard deviations over them unsteered; brackets are "
        "95 % intervals over texts. Control: a random vector of the same norms.",
        ("concept", "layer", "vector"),
        ("shift",),
        tuple(rows),
    )


def parts(vector: PreferenceVector) -> Table:
    """Return which layers and modules carry a vector's norm, and how many directions it has there.

    `share` is the part's of the squared norm; the control, `even`, what it would be if every entry had changed alike.
    `effective rank` is `exp(H(s / sum s))` of the singular values, H the entropy in nats (Roy and Vetterli 2007): 1 for one
    direction, `rank` for equally strong ones; nothing for what is no matrix.

    Raises:
        PolicyError: a vector that is zero.
    """
    whole = vector.norm() ** 2
    if whole == 0:
        raise PolicyError("A vector that changes something is required. Found a zero one. Check the magnitudes.")
    entries = sum(delta.shape.numel() for delta in vector.deltas.values())
    rows: list[tuple[Cell, ...]] = []
    for name, delta in vector.deltas.items():
        square = inner(delta, delta)
        layer, module = _place(name)
        rank = (delta.rank if isinstance(delta, LowRank) else min(delta.shape)) if len(delta.shape) == 2 else None
        figures = (math.sqrt(square), square / whole, delta.shape.numel() / entries)
        rows.append((layer, module, *figures, effective_rank(delta), rank))
    return Table(
        f"Where {vector.name!r} lies",
        "Norm, share of the squared norm, and singular directions of each changed parameter. Control: the share if every entry "
        "had changed alike.",
        ("layer", "module"),
        ("norm", "share", "even", "effective rank", "rank"),
        tuple(sorted(rows, key=lambda row: (row[0] is None, row[0] or 0))),
    )


def effective_rank(delta: Delta) -> float | None:
    """Return the exponential of the entropy of the singular values; None for what is no matrix or zero."""
    if len(delta.shape) != 2:
        return None
    values = decomposition(delta)[1]
    shares = values[values > 0] / values.sum()
    return float((-(shares * shares.log()).sum()).exp()) if len(shares) else None


def ablate(
    model: Any,
    tokenizer: Any,
    vector: PreferenceVector,
    texts: Sequence[Text],
    *,
    by: Literal["layer", "module"] = "layer",
    concept: Concept | None = None,
    magnitude: float = 1.0,
    seed: int = 0,
) -> Table:
    """Measure what each part of a vector does by itself, and what is left without it.

    The effect is `KL(q || p)` of the next token after each text, in nats: p unsteered, q under one part only (`only`) or under all
    others (`without`). With a concept, also the mean shift of its probe's logit at its best layer. The first row is
    the whole vector. Effects need not add up. The control, `random only`, is a random change of the same parameters, shapes,
    ranks and norms.

    Args:
        model: the base model; not changed.
        tokenizer: its tokenizer.
        vector: the preference vector.
        texts: intervals resample them.
        by: parts are decoder blocks, with what lies outside of them as one part, or kinds of module.
        concept: whose reading is measured as well.
        magnitude: of the vector.
        seed: of the random changes.

    Raises:
        AttachError: a Controller is attached.
        TextsError: no texts.
        PolicyError: a vector with one part, or `by` of another kind.
        BaseModelMismatchError: a vector or a concept of another model.
    """
    texts = checked_texts(texts, "texts")
    if by not in ("layer", "module"):
        raise PolicyError(f"`by` must be 'layer' or 'module'. Found {by!r}. Choose one.")
    decoder = unedited(model)
    if concept is not None:
        check_concept(model, decoder, concept)
    found: dict[Cell, list[str]] = {}
    for name in vector.deltas:
        found.setdefault(_place(name)[0 if by == "layer" else 1], []).append(name)
    if len(found) < 2:
        raise PolicyError(
            f"A vector with two parts or more is required. Found one by {by!r}. Use by='module' or 'layer'."
        )
    Controller(model, [vector.add(magnitude)])
    tokens = tokenise(tokenizer, texts)
    plain = log_probabilities(decoder, tokens)

    def readings() -> Tensor | None:
        if concept is None:
            return None
        states = record(model, tokenizer, texts, layers=concept.best_layer, read=concept.made.get("read", "last"))
        return concept[concept.best_layer].logit(states[concept.best_layer])

    before = readings()

    def effects(part: PreferenceVector) -> list[Cell]:
        with Controller(model, [part.add(magnitude)]):
            divergence: list[Cell] = [estimate(divergences(log_probabilities(decoder, tokens), plain))]
            there = readings()
        return divergence if before is None or there is None else [*divergence, estimate(there - before)]

    measures = ["kl"] if concept is None else ["kl", concept.name]
    rows: list[tuple[Cell, ...]] = [("all", *effects(vector), *[None] * len(measures), *effects(_random(vector, seed)))]
    for label, names in sorted(found.items(), key=lambda item: (item[0] is None, item[0])):
        only, rest = _kept(vector, names), _kept(vector, [name for name in vector.deltas if name not in names])
        shown = "outside" if label is None else label
        rows.append((shown, *effects(only), *effects(rest), *effects(_random(only, seed))))
    return Table(
        f"What the parts of {vector.name!r} at {magnitude:g} do",
        f"KL from the unsteered model, nats, of the token after each of {len(texts)} texts; brackets are 95 % intervals over "
        "texts. Control: random changes of the same norms.",
        (by,),
        tuple(f"{kind}{measure}" for kind in ("only: ", "without: ", "random only: ") for measure in measures),
        tuple(rows),
    )


def alignment(delta: Any, vector: PreferenceVector, *, base: Any = None) -> Table:
    """Return the cosine between what a fine-tuning changed and a stored vector, layer by layer and as a whole.

    A cosine means something for whole weights, or for low-rank adapters that started from one initial A: others have cosines near 0
    however alike they act (see `PreferenceVector.cosine`). `inputs` tells: the cosine between `A1^T A1` and `A2^T A2`, the
    mean over the shared matrices. It is near 1 for one initial A, less once a vector was compressed, and about `r / (d + r)` for
    unrelated ones of rank r and d inputs, `inputs by chance`. Parameters
    that only one of them changes count in its length. The control: 95 % of random changes lie within
    `chance = 1.96 / sqrt(entries)` of 0, entries those that both change, times the shares of both lengths that lie there. Task vectors, arXiv:2212.04089.

    Args:
        delta: a preference vector, or a policy: a trained model, a PEFT model, a folder of either.
        vector: what to compare with.
        base: the base model, for a policy.

    Raises:
        PolicyError: a policy without `base`, or two changes that share no parameter.
        BaseModelMismatchError: changes of different models.

    Warns:
        SteerkitWarning: low-rank changes that did not start from one A, or one low-rank and one whole.
    """
    if not isinstance(delta, PreferenceVector):
        if base is None:
            raise PolicyError(
                "A policy is compared by what it changed: `base`, its base model, is required. Found none."
            )
        delta = PreferenceVector.difference(delta, base, name="policy")
    vector.cosine(delta)  # raises for other bases and zero vectors
    groups: dict[Cell, list[str]] = {}
    for name in (*vector.deltas, *(name for name in delta.deltas if name not in vector.deltas)):
        layer = _place(name)[0]
        groups.setdefault("outside" if layer is None else layer, []).append(name)
    rows: list[tuple[Cell, ...]] = []
    for label, names in {"all": [name for group in groups.values() for name in group], **groups}.items():
        shared = [name for name in names if name in vector.deltas and name in delta.deltas]
        if not shared:
            continue
        product = sum(inner(delta.deltas[name], vector.deltas[name]) for name in shared)
        both, own = (
            math.prod(
                math.sqrt(sum(inner(v.deltas[n], v.deltas[n]) for n in of if n in v.deltas)) for v in (delta, vector)
            )
            for of in (shared, names)
        )
        entries = sum(vector.deltas[name].shape.numel() for name in shared)
        rows.append(
            (
                label,
                product / own if own else None,
                1.96 / math.sqrt(entries) * both / own if own else None,
                *_same_inputs(shared, delta, vector),
            )
        )
    if not rows:
        raise PolicyError("Changes are compared where both change something. Found no parameter that both change.")
    kinds = [{isinstance(each, LowRank) for each in v.deltas.values() if len(each.shape) == 2} for v in (delta, vector)]
    inputs, unrelated = rows[0][-2:]
    # Half the way from unrelated to one and the same, in orders of magnitude.
    near = not isinstance(inputs, float) or not isinstance(unrelated, float) or inputs >= math.sqrt(unrelated)
    suspect = kinds[0] != kinds[1] or not near
    if suspect:
        warnings.warn(
            f"The cosine of {delta.name!r} and {vector.name!r} says nothing about what they do: they are low-rank changes that did "
            "not start from one initial A, or one of them is whole. Compare their effects, or train both from one A.",
            SteerkitWarning,
            stacklevel=2,
        )
    return Table(
        f"How {delta.name!r} lies to {vector.name!r}",
        "Cosine; parameters that only one of them changes count in its length. Control: 95 % of random changes lie within ±chance. `inputs` near 1: one "
        "initial A; empty: whole weights.",
        ("layer",),
        ("cosine", "chance", "inputs", "inputs by chance"),
        tuple(rows),
    )


def _same_inputs(
    names: Sequence[str], one: PreferenceVector, other: PreferenceVector
) -> tuple[float | None, float | None]:
    """Return `<A1^T A1, A2^T A2>` over the product of their norms, the mean over low-rank changes, and the same by chance."""
    found, chance = [], []
    for name in names:
        first, second = (
            transposed(each.deltas[name]) if name in each.transposed else each.deltas[name] for each in (one, other)
        )
        if isinstance(first, LowRank) and isinstance(second, LowRank):
            a, b = first.right.double(), second.right.double()
            sizes = float((a @ a.T).norm()) * float((b @ b.T).norm())
            found.append(float((a @ b.T).square().sum()) / sizes)
            rank = math.sqrt(first.rank * second.rank)
            chance.append(rank / (a.shape[1] + rank))
    return (sum(found) / len(found), sum(chance) / len(chance)) if found else (None, None)


def _place(name: str) -> tuple[int | None, str]:
    """Return a parameter's decoder block, None outside of them, and the module within it."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    path = name if found is None else name[found.end() :]
    module = path.removesuffix(".weight")
    return (None if found is None else int(found.group(1))), module


def _kept(vector: PreferenceVector, names: Iterable[str]) -> PreferenceVector:
    kept = {name: vector.deltas[name] for name in names}
    return replace(vector, deltas=kept, transposed=vector.transposed & set(kept))


def _random(vector: PreferenceVector, seed: int) -> PreferenceVector:
    return replace(vector, deltas=random_deltas(vector.deltas, seed))
