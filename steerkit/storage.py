"""One safetensors file with one JSON header: written atomically, checked on reading, executing nothing.

The header lies under the key `steerkit` of the file's metadata: kind, format version, steerkit version, and whatever
the kind adds, such as the base model's fingerprint.
"""

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from steerkit.errors import ArtefactError

FORMAT = 1


@dataclass(frozen=True)
class Stored:
    """What a file holds: its kind, header and tensors."""

    path: Path
    kind: str
    header: dict[str, Any]
    tensors: dict[str, Tensor]

    def broken(self, why: str) -> ArtefactError:
        """Return the error for a file whose parts do not fit each other."""
        return ArtefactError(f"{self.path} must hold a consistent {self.kind}. Found {why}. Make the file again.")

    def tensor(self, name: str, *shape: int, dtype: torch.dtype = torch.float32, finite: bool = True) -> Tensor:
        """Return one tensor as `dtype`; its shape (-1: any but 0), kind and, unless told otherwise, finiteness are checked."""
        found = self.tensors.get(name)
        if found is None:
            raise self.broken(f"no tensor {name!r}")
        fits = len(found.shape) == len(shape) and all(
            have == want or (want == -1 and have > 0) for want, have in zip(shape, found.shape, strict=True)
        )
        if not fits:
            raise self.broken(f"{name!r} of shape {tuple(found.shape)} where {shape} belongs")
        if found.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise self.broken(f"{name!r} of {found.dtype}")
        found = found.to(dtype)
        # One sum tells as much as looking at each value, at a fraction of the time; only a doubtful one takes the look.
        if finite and not bool(found.sum().isfinite()) and not bool(found.isfinite().all()):
            raise self.broken(f"{name!r} with values that are not finite numbers")
        return found

    def layers(self, depth: int | None) -> list[int]:
        """Return the header's layers: increasing, without doubles, below `depth`."""
        layers = self.entry("layers", list)
        whole = all(type(layer) is int and layer >= 0 for layer in layers)
        if not layers or not whole or sorted(set(layers)) != layers or (depth is not None and layers[-1] >= depth):
            raise self.broken(f"layers={layers!r:.60} in a model of {depth} blocks")
        return layers

    def entry(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """Return one entry of the header; its type is checked."""
        value = self.header.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.broken(f"{name} = {value!r:.60} in the header")
        return value


def package_version() -> str:
    """Return the installed version of the distribution."""
    try:
        return version("steerkit-sdk")
    except PackageNotFoundError:
        return "0+unknown"


def write(
    path: str | os.PathLike[str],
    kind: str,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write an artefact: temporary file in the same folder, fsync, rename; a failed write changes nothing.

    Raises:
        ArtefactError: the path is a folder, its folder is missing, or it is read-only.
    """
    target = Path(path)
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    made = {"kind": kind, "format": FORMAT, "steerkit": package_version(), "checksum": checksum(held)}
    full: dict[str, Any] = {**header, **made}
    try:
        blob = save(held, metadata={"steerkit": json.dumps(full, allow_nan=False)})
    except (TypeError, ValueError) as error:
        raise ArtefactError(
            f"A header must be JSON with finite numbers. Found {error}. Nothing was written."
        ) from error
    write_bytes(target, blob)


def write_bytes(target: Path, blob: bytes) -> None:
    """Replace a file by new bytes, or leave it as it was."""
    try:
        _replace(target, blob)
    except OSError as error:
        raise ArtefactError(
            f"{target} could not be written ({error.strerror}). Nothing was changed. Free space or choose another path."
        ) from error


def refuse_folder(folder: Path) -> None:
    """Raise unless a folder can be made here: for whoever has long work to do before writing it.

    Raises:
        ArtefactError: the folder exists and is not empty, or its parent is missing.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtefactError(f"An empty or new folder is required. Found {folder} with something in it. Choose another.")
    if not folder.parent.is_dir():
        raise ArtefactError(f"The folder {folder.parent} must exist. It does not. Create it first.")


def write_folder(folder: Path, fill: Callable[[Path], Any]) -> None:
    """Make a folder in one step: what `fill` writes appears as a whole, or not at all.

    Raises:
        ArtefactError: the folder exists and is not empty, its parent is missing, the disk is full.
    """
    try:
        refuse_folder(folder)
        inside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".steerkit."))
    except OSError as error:
        raise ArtefactError(f"{folder} could not be written ({error.strerror}). Choose another path.") from error
    try:
        fill(inside)
        inside.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        inside.rename(folder)
    except OSError as error:
        raise ArtefactError(
            f"{folder} could not be written ({error.strerror}). Nothing was changed. Free space or choose another path."
        ) from error
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def _replace(target: Path, blob: bytes) -> None:
    if target.is_dir():
        raise ArtefactError(f"A file path is required. Found the folder {target}. Add a file name.")
    if not target.parent.is_dir():
        raise ArtefactError(f"The folder {target.parent} must exist. It does not. Create it first.")
    mode = target.stat().st_mode if target.exists() else None
    if mode is not None and not mode & stat.S_IWUSR:
        raise ArtefactError(f"{target} must be writable. Found a read-only file. Choose another path.")
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".steerkit.")
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, stat.S_IMODE(mode) if mode is not None else 0o666 & ~_umask())
        os.replace(temporary, target)
        temporary = None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return one digest of all values: safetensors checks the layout of a file and not its bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(path: str | os.PathLike[str]) -> Stored:
    """Read an artefact; nothing in the file is executed.

    Raises:
        ArtefactError: the file is missing, damaged, not ours, or from a newer format.
    """
    source = Path(path)
    try:
        if source.is_dir():
            raise ArtefactError(f"A steerkit file is required. Found the folder {source}. Name the file in it.")
        if not source.exists():
            raise ArtefactError(f"A steerkit file is required. {source} does not exist. Check the path.")
    except OSError as error:
        raise ArtefactError(f"A steerkit file is required. {source} cannot be read ({error.strerror}).") from error
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ArtefactError(
            f"{source} must be a safetensors file. Found {_looks_like(source)} ({str(error).splitlines()[0]:.120}). "
            "Make or download it again."
        ) from error
    if "steerkit" not in metadata:
        raise ArtefactError(
            f"{source} must be written by steerkit. Found a safetensors file without its header. Use artefact.save(path)."
        )
    try:
        header = json.loads(metadata["steerkit"])
        kind, made = header["kind"], header["format"]
        if not isinstance(kind, str) or not isinstance(made, int):
            raise TypeError("kind and format")
        whole = made > FORMAT or header.get("checksum") == checksum(tensors)
    except (ValueError, TypeError, KeyError, RecursionError, RuntimeError) as error:
        raise ArtefactError(
            f"{source} must carry a valid steerkit header. Found a damaged one ({type(error).__name__}: {error!s:.80}). "
            "Make or download it again."
        ) from error
    if not whole:
        raise ArtefactError(f"{source} is damaged: its tensors do not match their checksum. Copy or make it again.")
    if made > FORMAT:
        raise ArtefactError(
            f"{source} has format {made}; this steerkit ({package_version()}) reads up to {FORMAT}. Upgrade steerkit-sdk."
        )
    return Stored(source, kind, header, tensors)


def _looks_like(path: Path) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        return f"one that cannot be opened: {error.strerror}"
    if not start:
        return "an empty file"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "a pickle or zip archive, which is never opened"
    return "a truncated, damaged or foreign file"
