"""Merge preference vectors into a checkpoint on disk, tensor by tensor: the model is never built.

Files are rewritten in the layout that they have, a block of rows at a time: read through a memory map, summed in float32,
rounded once. Memory does not grow with the model.
"""

import json
import math
import mmap
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from steerkit import storage
from steerkit.errors import BaseModelMismatchError, PolicyError
from steerkit.maths.lowrank import Delta, add_to, parts, rows_of
from steerkit.model import Fingerprint
from steerkit.preferences.sources import INDEX, Source, checkpoint_folder, shards
from steerkit.preferences.vector import PreferenceVector

RECIPE = "steerkit_merge.json"
TEMPLATES = "additional_chat_templates"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".pkl",
    ".pickle",
    ".joblib",
    ".npy",
    ".npz",
)
_BLOCK = 1 << 20
"""Entries that are read, summed and written together."""


def merge_checkpoint(
    base: str | os.PathLike[str],
    vectors: Sequence[tuple[PreferenceVector, float]],
    output: str | os.PathLike[str],
    *,
    check_model: bool = True,
) -> None:
    """Write `theta_base + sum m phi` as a checkpoint folder of its own, with the base's config and tokenizer.

    Preference Vector, arXiv:2504.20106, equation 5. The folder appears as a whole or not at all; the base is not changed.
    `steerkit_merge.json` beside the weights tells what was merged.

    Args:
        base: a folder with `model.safetensors`, whole or sharded.
        vectors: each vector with its magnitude; 0 gives the base's bits.
        output: a folder that does not exist or is empty.
        check_model: refuse vectors that were made on another base model.

    Raises:
        PolicyError: no safetensors weights, or quantised ones.
        BaseModelMismatchError: another base model, or a changed parameter that the checkpoint does not hold so.
        ArtefactError: the folder is not empty, its parent is missing, the disk is full.
    """
    source, folder = Path(base), Path(output)
    if not source.is_dir():
        raise PolicyError(f"A checkpoint folder is required. Found {str(source)!r}, which is none. Check the path.")
    for vector, magnitude in vectors:
        if not math.isfinite(magnitude):
            raise PolicyError(f"A magnitude must be a finite number. Found {magnitude} for {vector.name!r}.")
        for name, delta in vector.deltas.items():
            if not all(bool(part.sum().isfinite()) for part in parts(delta)):
                raise PolicyError(f"A vector must be finite. Found NaN or infinity in {name!r} of {vector.name!r}.")
    held, files = checkpoint_folder(source), shards(source)
    for vector, _ in vectors:
        known = _as_named_by(vector, held)
        if check_model and vector.fingerprint is not None and known is not None:
            vector.fingerprint.check(known, repr(vector.name))
    changes = _changes(vectors, files, held.shapes)
    recipe = {
        "base": source.name,
        "vectors": [{"name": v.name, "magnitude": m, "made": dict(v.made)} for v, m in vectors],
        "steerkit": storage.package_version(),
    }

    def fill(inside: Path) -> None:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix not in _WEIGHTS and not file.name.startswith("."):
                shutil.copyfile(file, inside / file.name)
        if (source / TEMPLATES).is_dir():
            shutil.copytree(source / TEMPLATES, inside / TEMPLATES)
        if (source / INDEX).exists():
            shutil.copyfile(source / INDEX, inside / INDEX)
        (inside / RECIPE).write_text(json.dumps(recipe, indent=1), "utf-8")
        for file in sorted(set(files.values())):
            _rewrite(file, inside / file.name, changes)

    storage.write_folder(folder, fill)


def _as_named_by(vector: PreferenceVector, held: Source) -> Fingerprint | None:
    """Return the checkpoint's fingerprint; if its names leave out that of the body, with the names of the model."""
    known, get = held.fingerprint, held.get
    bodies = {name.partition(".")[0] for name in vector.deltas if name not in held.shapes}
    if known is None or get is None or len(bodies) != 1:
        return known
    [body] = bodies
    names = {name if name.startswith(("lm_head.", f"{body}.")) else f"{body}.{name}": name for name in held.shapes}
    shapes = {full: held.shapes[name] for full, name in names.items()}
    return Fingerprint.of_weights(shapes, lambda full: get(names[full]), known.name, known.depth, known.d_model)


def _changes(
    vectors: Sequence[tuple[PreferenceVector, float]], files: Mapping[str, Path], shapes: Mapping[str, torch.Size]
) -> dict[str, list[tuple[float, Delta]]]:
    """Return by tensor of the checkpoint what is added to it."""
    changes: dict[str, list[tuple[float, Delta]]] = {}
    for vector, magnitude in vectors:
        for name, delta in vector.deltas.items():
            key = _key(name, files)
            if key is None or shapes.get(key) != delta.shape:
                found = f"one of shape {tuple(shapes[key])}" if key is not None and key in shapes else "none of its own"
                raise BaseModelMismatchError(
                    f"The checkpoint must hold every changed parameter. {vector.name!r} changes {name!r} of shape "
                    f"{tuple(delta.shape)}; it holds {found}. Merge in memory: vector.merge_into(model)."
                )
            changes.setdefault(key, []).append((magnitude, delta))
    # A tied head that was saved all the same must stay equal to the embedding.
    heads = [key for key in files if key.endswith("lm_head.weight") and key not in shapes]
    for key in changes.copy():
        if key.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")):
            changes.update(dict.fromkeys(heads, changes[key]))
    return changes


def _key(name: str, files: Mapping[str, Path]) -> str | None:
    """Return a parameter's name in the file, which may leave out the name of the body."""
    short = name.partition(".")[2]
    return name if name in files else short if short in files else None


def _rewrite(file: Path, target: Path, changes: Mapping[str, list[tuple[float, Delta]]]) -> None:
    with file.open("rb") as read, target.open("wb") as write:
        length = int.from_bytes(read.read(8), "little")
        raw = read.read(length)
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        write.write(length.to_bytes(8, "little") + raw)
        order = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
        with mmap.mmap(read.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            start = 8 + length
            for name, entry in order:
                first, last = (start + offset for offset in entry["data_offsets"])
                if changes.get(name):
                    _write_sum(write, whole, first, entry, changes[name])
                else:
                    _copy(write, whole, first, last)
        write.flush()
        os.fsync(write.fileno())


def _copy(write: BinaryIO, whole: mmap.mmap, first: int, last: int) -> None:
    with memoryview(whole) as view:
        for at in range(first, last, _BLOCK):
            write.write(view[at : min(at + _BLOCK, last)])


def _write_sum(
    write: BinaryIO, whole: mmap.mmap, first: int, entry: Mapping[str, Any], changes: Sequence[tuple[float, Delta]]
) -> None:
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    row = int(torch.Size(shape[1:]).numel())
    step = max(1, _BLOCK // max(1, row))
    for begin in range(0, shape[0], step):
        rows = slice(begin, min(begin + step, shape[0]))
        count = (rows.stop - rows.start) * row
        weight = _read(whole, first + begin * row * dtype.itemsize, count, dtype).view(-1, *shape[1:])
        out = torch.empty_like(weight)
        add_to(weight, [(magnitude, rows_of(delta, rows)) for magnitude, delta in changes], out)
        write.write(out.contiguous().view(-1).view(torch.uint8).numpy().data)


def _read(whole: mmap.mmap, first: int, count: int, dtype: torch.dtype) -> Tensor:
    with memoryview(whole) as view:
        held = bytearray(view[first : first + count * dtype.itemsize])
    return torch.frombuffer(held, dtype=dtype)
