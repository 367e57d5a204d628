"""Load any artefact: read the header, hand the file to the kind that wrote it."""

import os
from collections.abc import Callable
from typing import Any

from steerkit import hub, storage
from steerkit.activations import Activations
from steerkit.concepts.concept import Concept
from steerkit.errors import ArtefactError
from steerkit.preferences.vector import PreferenceVector

_KINDS: dict[str, Callable[[storage.Stored], Any]] = {
    "activations": Activations.from_stored,
    "concept": Concept.from_stored,
    "preference_vector": PreferenceVector.from_stored,
}


def load(path: str | os.PathLike[str], model: Any = None, *, check_model: bool = True) -> Any:
    """Return the artefact in a file: a `Concept`, a `PreferenceVector` or `Activations`.

    Args:
        path: a file that `artefact.save(path)` wrote, a folder that `artefact.save_pretrained(folder)` did, or `"user/name"`
            on the hub. Nothing in it is executed.
        model: the model to use it on; another base model than the one it was made on is refused.
        check_model: False to use it on `model` all the same, if depth and width agree; it counts as made on that model from
            then on.

    Raises:
        ArtefactError: the file is missing, out of reach, damaged, not ours, or from a newer format.
        BaseModelMismatchError: it was made on another model.
    """
    stored = storage.read(hub.locate(path))
    if stored.kind not in _KINDS:
        raise ArtefactError(
            f"{stored.path} must hold one of {', '.join(sorted(_KINDS))}. Found {stored.kind!r}. Upgrade steerkit-sdk."
        )
    return hub.checked(_KINDS[stored.kind](stored), stored, model, check_model=check_model)
