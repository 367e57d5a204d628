"""Preference pairs: read from whatever holds them, checked before any work starts, split so that no prompt is on both sides."""

import hashlib
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from steerkit.errors import PairsError
from steerkit.types import Text

Pair: TypeAlias = dict[str, Any]
"""`prompt`, `chosen` and `rejected`: strings, or lists of messages."""

Pairs: TypeAlias = Iterable[Mapping[str, Any]] | str | os.PathLike[str]
"""A list of dicts, a `datasets.Dataset`, or a `.jsonl` or `.parquet` file with the three columns."""

COLUMNS = ("prompt", "chosen", "rejected")


def read_pairs(pairs: Pairs) -> list[Pair]:
    """Return checked pairs, each with its three columns and nothing else.

    A prompt that is a list of messages takes answers that are lists of messages, or strings, which become one assistant
    message.

    Raises:
        PairsError: no pairs, a missing or empty column, an answer that is chosen and rejected, a file of another kind.
    """
    rows = _rows_of_file(Path(pairs)) if isinstance(pairs, str | os.PathLike) else pairs
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise PairsError(
            f"`pairs` must be a list of dicts with {', '.join(COLUMNS)}, a datasets.Dataset, or the path of a .jsonl or "
            f".parquet file. Found {type(pairs).__name__}. Convert it."
        )
    checked = [_checked(row, index) for index, row in enumerate(rows)]
    for index, pair in enumerate(checked):
        if isinstance(pair["prompt"], str) != isinstance(checked[0]["prompt"], str):
            raise PairsError(
                f"Pairs must be all plain text or all conversations. Pair {index} is not like the first. Convert it.",
                index=index,
            )
    if not checked:
        raise PairsError("`pairs` must hold at least one pair. Found none. Pass some.")
    return checked


def _rows_of_file(file: Path) -> list[Any]:
    if not file.is_file():
        raise PairsError(f"A file of pairs must exist. Found none at {str(file)!r}. Check the path.")
    if file.suffix == ".parquet":
        import pyarrow
        from pyarrow.parquet import read_table

        try:
            return read_table(file).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise PairsError(f"{file} must be a Parquet file. It cannot be read: {error!s:.80}.") from error
    if file.suffix != ".jsonl":
        raise PairsError(f"Pairs come from .jsonl or .parquet files. Found {file.name!r}. Convert it.")
    try:
        lines = [line for line in file.read_text("utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise PairsError(f"{file} must be UTF-8 text. Found other bytes ({error.reason}). Convert it.") from error
    rows = []
    for index, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise PairsError(
                f"Each line of {file} must be a JSON object. Found {line!r:.60} for pair {index}. Mend it.", index=index
            ) from error
    return rows


def _checked(row: Any, index: int) -> Pair:
    if not isinstance(row, Mapping):
        raise PairsError(
            f"Each pair must be a dict with {', '.join(COLUMNS)}. Found {type(row).__name__} at {index}. Convert it.",
            index=index,
        )
    missing = [column for column in COLUMNS if row.get(column) is None]
    if missing:
        raise PairsError(
            f"Each pair must have {', '.join(COLUMNS)}. Pair {index} has no {missing[0]!r}; its columns are "
            f"{sorted(map(str, row))}. Rename or fill them.",
            index=index,
        )
    chat = not isinstance(row["prompt"], str)
    pair: Pair = {}
    for column in COLUMNS:
        text = row[column]
        if chat and isinstance(text, str):
            text = [{"role": "assistant", "content": text}]
        if not _is_text(text, chat):
            wanted = "a list of messages with role and content" if chat else "a string"
            raise PairsError(
                f"{column!r} must be {wanted}, like the prompt, and not empty. Found {text!r:.60} in pair {index}. Mend it.",
                index=index,
            )
        pair[column] = text if not chat else [{"role": m["role"], "content": m["content"]} for m in text]
    if pair["chosen"] == pair["rejected"]:
        raise PairsError(
            f"The chosen answer must differ from the rejected one. Found {pair['chosen']!r:.60} for both in pair {index}. "
            "Leave it out.",
            index=index,
        )
    return pair


def _is_text(text: Any, chat: bool) -> bool:
    if not chat:
        return isinstance(text, str) and bool(text.strip())
    return (
        isinstance(text, Sequence)
        and not isinstance(text, str)
        and len(text) > 0
        and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in text
        )
        and bool(text[-1]["content"].strip())
    )


def swapped(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the same pairs with both answers exchanged: prompts, order and number stay."""
    return [{"prompt": p["prompt"], "chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs]


def split(pairs: Sequence[Pair], held_out: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return pairs to train on and pairs to measure on; those of one prompt stay on one side.

    Raises:
        PairsError: a share that leaves nothing to train on.
    """
    prompts = sorted({_key(pair["prompt"]) for pair in pairs})
    random.Random(seed).shuffle(prompts)
    count = round(held_out * len(prompts)) if 0 <= held_out < 1 else len(prompts)
    if count >= len(prompts):
        raise PairsError(
            f"`held_out` must be a share that leaves prompts to train on. Found {held_out} of {len(prompts)}. Try 0.1."
        )
    apart = set(prompts[:count])
    train = [pair for pair in pairs if _key(pair["prompt"]) not in apart]
    return train, [pair for pair in pairs if _key(pair["prompt"]) in apart]


def digest(pairs: Sequence[Pair]) -> str:
    """Return what tells one list of pairs from another, their order included."""
    return hashlib.sha256(json.dumps(list(pairs), sort_keys=True).encode()).hexdigest()[:16]


def length_only_accuracy(train: Sequence[tuple[int, int]], held_out: Sequence[tuple[int, int]]) -> float:
    """Return how often length alone tells chosen from rejected on held-out pairs, longer or shorter as learned in training.

    Lengths are (chosen, rejected); equal ones count half.
    """
    longer = sum((a > b) - (a < b) for a, b in train) >= 0
    right = [0.5 if a == b else float((a > b) == longer) for a, b in held_out]
    return sum(right) / len(right)


def _key(text: Text) -> str:
    return json.dumps(text, sort_keys=True)
