"""Changes written into the weights themselves while a Controller is attached, and taken out again bit for bit.

Adding and then subtracting does not give a rounded weight back, so the originals are kept: all of them are saved before
the first is written, and a checksum of each is compared once it is restored.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from steerkit.errors import AttachError
from steerkit.intervention import Amounts, WeightAddition
from steerkit.maths.lowrank import Delta, add_to
from steerkit.model import ORIGINALS, base_parameters, refuse_unwritable


class Fold:
    """The weights of one model that one Controller changes in place."""

    def __init__(self, model: Any, changes: Mapping[str, Sequence[tuple[WeightAddition, Delta]]]) -> None:
        self._model = model
        self.changes = changes
        """By parameter: what changes it, and by how much for a magnitude of 1."""
        self._saved: dict[str, Tensor] = {}
        self._sums: dict[str, int] = {}
        self._live()

    def __bool__(self) -> bool:
        return bool(self.changes)

    def _live(self) -> dict[str, Tensor]:
        """Return the parameters as they are now: loading, moving or casting puts others in their place."""
        there = dict(base_parameters(self._model)) if self.changes else {}
        for name in self.changes:
            refuse_unwritable(name, there.get(name))
        return {name: there[name].detach() for name in self.changes}

    def save(self) -> None:
        """Keep every original."""
        self._model.__dict__.setdefault(ORIGINALS, []).append(self._saved)
        with torch.no_grad():
            for name, parameter in self._live().items():
                self._sums[name] = checksum(parameter)
                self._saved[name] = parameter.clone()

    def write(self, amounts: Mapping[str, Amounts]) -> None:
        """Write the weights for these magnitudes, by the name of what changes them.

        Raises:
            AttachError: another Controller has written over them since.
        """
        self.refuse_covered()
        with torch.no_grad():
            for name, parameter in self._live().items():
                changes = [
                    (float(each.column(amounts[each.name].values, each.layer_of[name])[0]), delta)
                    for each, delta in self.changes[name]
                ]
                add_to(self._saved[name].to(parameter), changes, parameter)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Within, the weights are the originals; then what was written is there again, bit for bit."""
        live = self._live()
        written = {name: parameter.clone() for name, parameter in live.items()}
        try:
            for name, parameter in live.items():
                parameter.copy_(self._saved[name])
            yield
        finally:
            for name, parameter in live.items():
                parameter.copy_(written[name])

    def restore(self) -> None:
        """Put the originals back and prove it."""
        changed = []
        live = self._live()
        with torch.no_grad():
            for name, original in self._saved.items():
                same = (live[name].dtype, live[name].device) == (original.dtype, original.device)
                live[name].copy_(original)
                if checksum(live[name]) != (self._sums[name] if same else checksum(original.to(live[name]))):
                    changed.append(name)
        attached = self._model.__dict__[ORIGINALS]
        attached[:] = [saved for saved in attached if saved is not self._saved]
        if not attached:
            self._model.__dict__.pop(ORIGINALS)
        self._saved = {}
        if changed:
            raise AttachError(
                f"Restored weights must equal the originals. Found that {changed[0]!r} does not: something else wrote into "
                "it, or memory is damaged. Load the model again."
            )

    def refuse_covered(self) -> None:
        """Raise if a Controller that was attached later still has its changes in these weights."""
        attached = self._model.__dict__.get(ORIGINALS, [])
        place = next((index for index, saved in enumerate(attached) if saved is self._saved), len(attached))
        if any(set(self.changes) & set(later) for later in attached[place + 1 :]):
            raise AttachError(
                "Weights that an inner Controller has written may not be changed beneath it. Found an outer one that "
                "wants to. Detach the inner Controller first."
            )


def checksum(tensor: Tensor) -> int:
    """Return the sum of a tensor's bits as integers: the same for the same values, at the speed of memory."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    flat = tensor.detach().contiguous().view(-1)
    if flat.numel() * flat.dtype.itemsize % 8 == 0 and flat.data_ptr() % 8 == 0:
        bits = torch.int64
    return int(flat.view(bits).sum(dtype=torch.int64))
