"""Control vectors as GGUF files, the way repeng and llama.cpp exchange them; the only door to the gguf package.

A file holds one float32 tensor `direction.<layer>`, `"d_model"`, for each layer that it edits: `h' = h + c * direction`
after that block, at every position, c the coefficient (repeng) or the scale (llama.cpp). All three count blocks alike,
from 0. llama.cpp refuses a whole file in which layer 0 is named, passes over layers that the model does not have, and
reads no metadata. `controlvector.model_hint` is the model's type for repeng, the architecture's GGUF name for
llama.cpp and the model's name here, so it is shown and never checked. What steerkit knows of the base model goes into
keys of its own, which the others skip: a vector that steerkit wrote is refused on another base model.

Layers: repeng's `ControlModel` and `ControlVector.export_gguf`; llama.cpp's `common_control_vector_load` and
`llama_adapter_cvec`.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from steerkit import storage
from steerkit.concepts.concept import Concept
from steerkit.errors import AmountError, ArtefactError, LayerError, MissingDependencyError
from steerkit.intervention import Addition, Amounts
from steerkit.model import Fingerprint, find_decoder, resolve_layers
from steerkit.types import Amount, Layers, Positions

try:
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
except ImportError as error:
    raise MissingDependencyError(
        "Control vectors need the package gguf. It is not installed. Run: pip install 'steerkit-sdk[gguf]'."
    ) from error

_HINT, _COUNT = "controlvector.model_hint", "controlvector.layer_count"
_BASE, _VALUES = "steerkit.base_model", "steerkit.base_model.values"
_UNKNOWN = "unknown"
_READS = 20_000
"""A control vector takes about a thousand reads; a model's vocabulary, or counts that lie, take millions."""


@dataclass(frozen=True, eq=False)
class ControlVector:
    """What is added after each of some layers: directions with their lengths, as repeng and llama.cpp keep them.

    Example:
        happy = read("happy.gguf", model=model)
        with Controller(model, [happy.add(1.5)]):
            model.generate(**inputs)

    Raises:
        ArtefactError: no direction, or directions that are not finite float32 of one width by layer.
    """

    name: str
    directions: Mapping[int, Tensor] = field(repr=False)
    """`"d_model"` float32 by layer, of any length."""
    model_hint: str = _UNKNOWN
    """What the file says of its model; free text."""
    fingerprint: Fingerprint | None = field(repr=False, default=None)
    """The base model, where steerkit knows it: of what `of` made, and of files that steerkit wrote."""

    def __post_init__(self) -> None:
        fault = _fault(self.directions)
        if fault:
            raise ArtefactError(
                f"A control vector must hold finite float32 directions of one width by layer. Found {fault}."
            )

    @classmethod
    def of(cls, concept: Concept, magnitude: float | Mapping[int, float]) -> "ControlVector":
        """Return what `concept.add(magnitude)` adds: at coefficient 1 the two are the same.

        Args:
            concept: its unit directions are those of `concept.mover`.
            magnitude: a number, for the best layer; or `{layer: number}`.

        Raises:
            AmountError: a magnitude for each sample, which a file cannot hold.
            LayerError: a layer that was not probed.
        """
        addition = concept.add(magnitude)
        # One that follows a reading is known by no number, and refused as such.
        amounts = Amounts.read(cast(Amount, addition.amount), addition.layers, "magnitude")
        if amounts.samples is not None:
            raise AmountError(
                f"A control vector has one magnitude a layer. Found one for each of {amounts.samples} samples. Pass a "
                "number or {layer: number}."
            )
        steps = amounts.values[0].float()
        directions = {layer: steps[i] * addition.directions[layer] for i, layer in enumerate(addition.layers)}
        base = concept.fingerprint
        return cls(concept.name, directions, _UNKNOWN if base is None else base.name, base)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it edits."""
        return tuple(self.directions)

    @property
    def norms(self) -> dict[int, float]:
        """Length of each direction, in units of the residual stream."""
        return {layer: float(direction.double().norm()) for layer, direction in self.directions.items()}

    def add(
        self,
        magnitude: Amount = 1.0,
        *,
        layers: Layers | None = None,
        positions: Positions = "all",
        name: str | None = None,
    ) -> Addition:
        """Return `h' = h + m v` as an intervention, v the direction as it is in the file.

        An `Addition` moves along unit directions, so its amounts are `m |v|`: that is also what `Controller.using` takes.
        For another m there, pass `using(happy=happy.add(m).amount)`.

        Args:
            magnitude: m, repeng's coefficient: a number, one a sample, `(samples, layers)`, or `{layer: either of the
                first two}`.
            layers: where; by default every layer of the vector, or those that `magnitude` names.
            positions: which tokens; all by default, as in repeng and llama.cpp.
            name: the key within a Controller; the vector's name by default.

        Raises:
            AmountError: a magnitude that is no finite number or of the wrong shape.
            LayerError: a layer for which there is no direction.
        """
        if isinstance(magnitude, Mapping):
            magnitude = {self._own(layer)[0]: value for layer, value in magnitude.items()}
            layers = tuple(magnitude) if layers is None else layers
        chosen = self.layers if layers is None else self._own(layers)
        given, norms = Amounts.read(magnitude, chosen, "magnitude"), self.norms
        dose = given.values * torch.tensor([norms[layer] for layer in chosen], dtype=torch.float64)
        amount: Amount = dict(zip(chosen, dose[0].tolist(), strict=True)) if given.samples is None else dose
        # A direction of zeros stays one, with an amount of 0.
        units = {layer: (self.directions[layer].double() / (norms[layer] or 1.0)).float() for layer in chosen}
        return Addition(name or self.name, chosen, positions, amount, self.fingerprint, units)

    def _own(self, layers: Layers) -> tuple[int, ...]:
        depth = max(self.layers) + 1 if self.fingerprint is None else self.fingerprint.depth
        resolved = resolve_layers(layers, depth)
        missing = [layer for layer in resolved if layer not in self.directions]
        if missing:
            raise LayerError(
                f"Layer {missing[0]} has no direction: {self.name!r} has them at {self.layers}. Choose among them.",
                layer=missing[0],
            )
        return resolved


def read(path: str | os.PathLike[str], model: Any = None, *, check_model: bool = True) -> ControlVector:
    """Return the control vector in a GGUF file of repeng, llama.cpp or steerkit. Nothing in it is executed.

    Args:
        path: the file.
        model: the model to use it on. Width and depth must fit; so must the base model, if steerkit wrote the file.
        check_model: False to use it on another base model of that width and depth; it counts as made on it from then on.

    Raises:
        ArtefactError: the file is missing, damaged, no control vector, or holds anything but one finite float32 direction
            for each of its layers.
        BaseModelMismatchError: another width than the model's, or another base model.
        LayerError: a layer that the model does not have.
        UnsupportedModelError: a model that cannot be steered.
    """
    source = Path(path)
    try:
        with np.errstate(over="raise"):  # sums of offsets wrap around otherwise
            reader = _Reader(source)
        vector = _vector(reader, source.stem)
    except Exception as error:  # the package trusts a file, so one that lies may raise anything
        found = getattr(error, "strerror", None) or f"{error!s:.120}"
        raise ArtefactError(
            f"{source} must be a GGUF control vector. It cannot be read ({found}). Make or download it again."
        ) from error
    if model is None:
        return vector
    vector.add(1.0).check(find_decoder(model))
    here = Fingerprint.of(model)
    if not check_model:
        return replace(vector, fingerprint=here)
    if vector.fingerprint is not None:
        vector.fingerprint.check(here, repr(vector.name))
    return vector


def write(path: str | os.PathLike[str], vector: ControlVector) -> None:
    """Write a control vector as a GGUF file that repeng, llama.cpp and `read` take; atomically.

    Raises:
        LayerError: a direction for layer 0.
        ArtefactError: the path is a folder, its folder is missing, it is read-only, or a name is no text.
    """
    if 0 in vector.directions:
        raise LayerError(
            f"A GGUF control vector starts at layer 1: llama.cpp refuses a file that names layer 0. Found {vector.layers}. "
            "Leave layer 0 out.",
            layer=0,
        )
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "vector.gguf"
            _fill(GGUFWriter(file, "controlvector"), vector)
            blob = file.read_bytes()
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} could not be written ({error!s:.120}). Nothing was changed.") from error
    storage.write_bytes(Path(path), blob)


def _fill(writer: GGUFWriter, vector: ControlVector) -> None:
    try:
        writer.add_string("general.name", vector.name)
        writer.add_string(_HINT, vector.model_hint or _UNKNOWN)  # repeng refuses a file without one
        writer.add_uint32(_COUNT, len(vector.directions))
        if vector.fingerprint is not None:
            writer.add_string(_BASE, json.dumps(vector.fingerprint.header()))
            writer.add_array(_VALUES, vector.fingerprint.values.tolist())
        for layer in sorted(vector.directions):
            writer.add_tensor(f"direction.{layer}", vector.directions[layer].detach().cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


class _Reader(GGUFReader):
    """One that stops at the end of the file: the package itself goes on and finds empty values for as long as told."""

    _left = _READS

    def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ValueError("more metadata than a control vector has")
        if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("the file ends too early")
        return super()._get(offset, dtype, count, *rest, **named)


def _vector(reader: GGUFReader, stem: str) -> ControlVector:
    kind = _text(reader, "general.architecture")
    if kind != "controlvector":
        raise ValueError(f"general.architecture is {kind!r:.40}")
    directions: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        word, _, number = tensor.name.partition(".")
        if word != "direction" or not (number.isascii() and number.isdigit()) or int(number) in directions:
            raise ValueError(f"a tensor {tensor.name!r:.40} where one direction.<layer> for each layer belongs")
        if tensor.tensor_type != GGMLQuantizationType.F32 or len(tensor.shape) != 1:
            raise ValueError(f"{tensor.name} of {tensor.tensor_type.name} and shape {tensor.shape.tolist()!s:.40}")
        directions[int(number)] = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
    fault = _fault(directions)
    if fault:
        raise ValueError(fault)
    base, ordered = _base(reader), {layer: directions[layer] for layer in sorted(directions)}
    if base is not None and (base.d_model != len(directions[min(directions)]) or max(directions) >= base.depth):
        raise ValueError(f"directions that do not fit the base model {base.header()!s:.80}")
    name, hint = _text(reader, "general.name"), _text(reader, _HINT)
    return ControlVector(name or stem, ordered, hint or _UNKNOWN, base)


def _text(reader: GGUFReader, key: str) -> str | None:
    found = reader.get_field(key)
    if found is None:
        return None
    if found.types != [GGUFValueType.STRING]:
        raise ValueError(f"{key} is no text")
    return bytes(found.parts[-1]).decode("utf-8")


def _base(reader: GGUFReader) -> Fingerprint | None:
    header, values = _text(reader, _BASE), reader.get_field(_VALUES)
    if header is None or values is None:
        return None
    if values.types != [GGUFValueType.ARRAY, GGUFValueType.FLOAT32]:
        raise ValueError(f"{_VALUES} are no numbers")
    return Fingerprint.from_parts(json.loads(header), torch.tensor([float(values.parts[i][0]) for i in values.data]))


def _fault(directions: Mapping[int, Tensor]) -> str:
    """Return what is wrong with directions, or nothing."""
    if not directions:
        return "no direction"
    width = max(len(direction) if direction.ndim else 0 for direction in directions.values())
    for layer, direction in directions.items():
        if type(layer) is not int or layer < 0:
            return f"a layer {layer!r:.20}"
        if direction.dtype != torch.float32 or direction.ndim != 1 or len(direction) != width or not width:
            return f"{direction.dtype} of shape {tuple(direction.shape)} at layer {layer}, beside a width of {width}"
        if not bool(direction.isfinite().all()):
            return f"NaN or infinity at layer {layer}"
    return ""
