"""Load any artefact: read the header, hand the file to the kind that wrote it."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from steerkit import storage
from steerkit.activations import Activations
from steerkit.concepts.concept import Concept
from steerkit.errors import ArtefactError
from steerkit.model import Fingerprint
from steerkit.preferences.vector import PreferenceVector

_KINDS: dict[str, Callable[[storage.Stored], Any]] = {
    "activations": Activations.from_stored,
    "concept": Concept.from_stored,
    "preference_vector": PreferenceVector.from_stored,
}


def load(path: str | os.PathLike[str], model: Any = None, *, check_model: bool = True) -> Any:
    """Return the artefact in a file: a `Concept`, a `PreferenceVector` or `Activations`.

    Args:
        path: a file that `artefact.save(path)` wrote. Nothing in it is executed.
        model: the model to use it on; another base model than the one it was made on is refused.
        check_model: False to use it on `model` all the same, if depth and width agree; it counts as made on that model from
            then on.

    Raises:
        ArtefactError: the file is missing, damaged, not ours, or from a newer format.
        BaseModelMismatchError: it was made on another model.
    """
    stored = storage.read(path)
    if stored.kind not in _KINDS:
        raise ArtefactError(
            f"{stored.path} must hold one of {', '.join(sorted(_KINDS))}. Found {stored.kind!r}. Upgrade steerkit-sdk."
        )
    artefact = _KINDS[stored.kind](stored)
    if model is None:
        return artefact
    here = Fingerprint.of(model)
    made_on = artefact.fingerprint
    if made_on is not None and (made_on.depth, made_on.d_model) != (here.depth, here.d_model):
        made_on.check(here, repr(stored.header.get("name", stored.kind)))
    if not check_model:
        return replace(artefact, fingerprint=here)
    if artefact.fingerprint is not None:
        artefact.fingerprint.check(here, repr(stored.header.get("name", stored.kind)))
    return artefact
