"""What goes into a fit: settings and examples, checked before any work starts, and which examples belong together."""

import hashlib
from collections.abc import Hashable, Sequence

import numpy as np

from steerkit.activations import Activations
from steerkit.errors import AmountError, TextsError
from steerkit.types import DIRECTIONS

Groups = tuple[Sequence[Hashable], Sequence[Hashable]]
"""One label a positive and one a negative example."""


def check_settings(name: str, direction: str, held_out: float, regularisation: float | None) -> None:
    """Refuse a name, direction, share or regularisation that no fit can use."""
    if not isinstance(name, str) or not name.strip():
        raise TextsError(
            f"A concept needs a name, the key for `Controller.using`. Found {name!r}. Pass 'toxicity', for example."
        )
    check_direction(direction)
    if not 0 < held_out <= 0.5:
        raise TextsError(f"`held_out` must be a share between 0 and 0.5. Found {held_out!r}. Try 0.2.")
    if regularisation is not None and not regularisation > 0:
        raise TextsError(
            f"`regularisation` must be positive. Found {regularisation!r}. Leave it out to have it chosen."
        )


def check_direction(direction: str) -> None:
    """Refuse an unknown direction."""
    if direction not in DIRECTIONS:
        raise AmountError(f"`direction` must be one of {', '.join(DIRECTIONS)}. Found {direction!r}. Choose one.")


def check_counts(positive: int, negative: int, held_out: float) -> None:
    """Refuse too few examples to fit and to hold some out."""
    least = max(2, round(1 / held_out)) + 1
    for side, count in (("positive", positive), ("negative", negative)):
        if count < least:
            raise TextsError(
                f"At least {least} {side} texts are required to fit and to hold out {held_out:g} of them. Found {count}. "
                "Add texts; 100 a side is usual.",
                required=least,
                found=count,
            )


def check_groups(groups: Groups | None, positive: int, negative: int) -> None:
    """Refuse groups that are not one label an example."""
    if groups is None:
        return
    if len(groups) != 2 or len(groups[0]) != positive or len(groups[1]) != negative:
        found = tuple(len(side) for side in groups)
        raise TextsError(
            f"`groups` must be a pair: one label for each of {positive} positive and {negative} negative texts. Found "
            f"{found}. Pass (positive_groups, negative_groups)."
        )


def check_alike(positive: Activations, negative: Activations) -> None:
    """Refuse two recordings whose difference is not the concept."""
    kinds = [(side.read, side[side.layers[0]].shape[1]) for side in (positive, negative)]
    if kinds[0] != kinds[1]:
        raise TextsError(
            f"Both recordings must be read alike and of one width. Found {kinds[0]} and {kinds[1]}. Record both alike."
        )


def group_ids(positive: Activations, negative: Activations, groups: Groups | None) -> np.ndarray:
    """Return one number an example; examples of one group or with equal texts share it, also through others."""
    count = len(positive) + len(negative)
    links: list[Sequence[Hashable]] = []
    if groups is not None:
        links.append([*groups[0], *groups[1]])
    if positive.digests and negative.digests:
        links.append([*positive.digests, *negative.digests])
    ids = np.arange(count)
    for keys in links:
        first: dict[Hashable, int] = {}
        for example, key in enumerate(keys):
            other = first.setdefault(key, example)
            ids[ids == ids[example]] = ids[other]
    return ids


def digest(positive: Activations, negative: Activations) -> str:
    """Return one digest of the data, whatever the order of the texts."""
    text = "+".join(sorted(positive.digests)) + "|" + "+".join(sorted(negative.digests))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
