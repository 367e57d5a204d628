"""`steerkit vector`: train, mix, merge, export and inspect."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from steerkit.cli.shared import (
    JsonOption,
    ModelOption,
    app,
    command,
    err,
    figure,
    loaded_model,
    out,
    path_of,
    request,
    vector_at,
)
from steerkit.errors import ArtefactError, TextsError

if TYPE_CHECKING:
    from steerkit.preferences.vector import PreferenceVector

vector_app = typer.Typer(help="Train, mix, merge, export and inspect preference vectors.", no_args_is_help=True)
app.add_typer(vector_app, name="vector")


@vector_app.command("train")
@command
def vector_train(
    name: Annotated[str, typer.Argument(help="What to call the preference.")],
    pairs: Annotated[Path, typer.Argument(help=".jsonl or .parquet with `prompt`, `chosen` and `rejected`.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File; by default NAME.safetensors.")] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Folder for both runs; the same command after a stop goes on from there.")
    ] = None,
    model: ModelOption = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps of each twin; by default two epochs.")] = -1,
    learning_rate: Annotated[float | None, typer.Option(help="By default 2e-4, and 1e-6 for full weights.")] = None,
    beta: Annotated[float, typer.Option(help="Of DPO.")] = 0.1,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs a step.")] = 4,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and answer.")] = 512,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 16,
    full: Annotated[bool, typer.Option(help="Train all weights, not LoRA.")] = False,
    chat: Annotated[
        bool | None, typer.Option(help="Put plain prompts through the chat template; by default if there is one.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the adapters, the split and the order.")] = 42,
    as_json: JsonOption = False,
) -> None:
    """Train twins on pairs and on swapped pairs, and save their difference.

    Example: `steerkit vector train helpful pairs.jsonl --steps 40`
    """
    from steerkit.preferences.pairs import read_pairs
    from steerkit.preferences.policy import PolicyConfig
    from steerkit.preferences.vector import PreferenceVector

    target = output or Path(f"{name}.safetensors")
    if target.is_dir() or not target.parent.is_dir():
        raise ArtefactError(f"A file in an existing folder is required. Found {target}. Pass --output FILE.")
    rows: list[Any] = read_pairs(pairs)
    loaded, tokenizer = loaded_model(model)
    if chat or (chat is None and tokenizer.chat_template is not None):
        rows = [
            {**row, "prompt": [{"role": "user", "content": row["prompt"]}]} if isinstance(row["prompt"], str) else row
            for row in rows
        ]
    config = PolicyConfig(
        max_steps=steps,
        learning_rate=learning_rate,
        beta=beta,
        per_device_train_batch_size=batch_size,
        max_length=max_length,
        lora_r=rank,
        lora_alpha=2 * rank,
        use_peft=not full,
        seed=seed,
        bf16=False,
        save_steps=20,
        save_total_limit=1,
    )
    vector = PreferenceVector.fit(name, loaded, tokenizer, rows, config=config, output_dir=runs)
    if config.process_index > 0:
        return
    vector.save(target)
    _show_vectors([vector], as_json)
    if not as_json:
        out.print(f"wrote {target}", markup=False, soft_wrap=True)


@vector_app.command("mix")
@command
def vector_mix(
    terms: Annotated[list[str], typer.Argument(help="NAME=M, as many as you like; M may be negative.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the mixture.")],
    name: Annotated[str, typer.Option(help="What to call it.")] = "mixed",
    energy: Annotated[float | None, typer.Option(help="Compress, keeping this share of the squared norm.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Compress to this rank.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Mix vectors into one file.

    Example: `steerkit vector mix helpful=0.7 harmless=0.3 -o mixed.safetensors`
    """
    mixed = sum(vector_at(path) * magnitude for path, magnitude in _terms("mix", terms)).named(name)  # type: ignore[union-attr]
    if energy is not None or rank is not None:
        mixed = mixed.compress(rank=rank, energy=energy)
    mixed.save(output)
    _show_vectors([mixed], as_json)
    if not as_json:
        out.print(f"wrote {output}", markup=False, soft_wrap=True)


@vector_app.command("merge")
@command
def vector_merge(
    base: Annotated[Path, typer.Argument(help="A checkpoint folder with safetensors weights.")],
    add: Annotated[list[str], typer.Option(help="NAME=M: a vector and its magnitude. Repeatable.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the merged checkpoint; new or empty.")],
    check_model: Annotated[bool, typer.Option(help="Refuse vectors that were made on another base model.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Merge vectors into a checkpoint on disk, tensor by tensor, in little memory.

    Example: `steerkit vector merge models/base --add helpful=0.7 --add harmless.safetensors=0.3 -o models/steered`
    """
    from steerkit.preferences.checkpoints import merge_checkpoint

    vectors = [(vector_at(path), magnitude) for path, magnitude in _terms("add", add)]
    with err.status("merging"):
        merge_checkpoint(base, vectors, output, check_model=check_model)
    if as_json:
        print(json.dumps({"output": str(output), "vectors": [{"name": v.name, "magnitude": m} for v, m in vectors]}))
    else:
        out.print(f"wrote {output}", markup=False, soft_wrap=True)


@vector_app.command("export")
@command
def vector_export(
    vector: Annotated[str, typer.Argument(help="A vector's file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter; new or empty.")],
    magnitude: Annotated[float, typer.Option(help="Fixed in the adapter.")] = 1.0,
    rank: Annotated[int | None, typer.Option(min=1, help="Largest rank; a server's limit, for example.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a PEFT LoRA folder that transformers, PEFT and vLLM load.

    Example: `steerkit vector export helpful -o adapters/helpful --magnitude 0.7 --rank 16`
    """
    error = vector_at(path_of(vector)).to_adapter(output, magnitude, rank=rank)
    if as_json:
        print(json.dumps({"output": str(output), "relative_error": error}))
    else:
        out.print(f"wrote {output}; relative error {error:.3g}", markup=False, soft_wrap=True)


@vector_app.command("inspect")
@command
def vector_inspect(
    vectors: Annotated[list[str], typer.Argument(help="One or several vectors' files.")], as_json: JsonOption = False
) -> None:
    """Show what vectors' files hold; of several, also how they lie to each other.

    Example: `steerkit vector inspect helpful harmless`
    """
    _show_vectors([vector_at(path_of(name)) for name in vectors], as_json)


def _terms(option: str, texts: Sequence[str]) -> list[tuple[Path, float]]:
    """Read NAME=M for several vectors, one magnitude each."""
    requests = [request(option, text) for text in texts]
    for _, name, amount in requests:
        if isinstance(amount, list):
            raise TextsError(f"A vector takes one magnitude here. Found {len(amount)} for {name!r}. Write {name}=0.7.")
    return [(path_of(name), amount) for _, name, amount in requests]


def _show_vectors(vectors: "Sequence[PreferenceVector]", as_json: bool) -> None:
    from steerkit.preferences.vector import cosines, interference

    between = cosines(vectors).tolist() if len(vectors) > 1 else []
    together = len(vectors) > 1 and set.intersection(
        *({n for n, d in v.deltas.items() if len(d.shape) == 2} for v in vectors)
    )
    score = interference(vectors) if together else None
    if as_json:
        found: dict[str, Any] = {
            "vectors": [
                {
                    "name": each.name,
                    "model": None if each.fingerprint is None else each.fingerprint.name,
                    "parameters": len(each.deltas),
                    "layers": each.layers,
                    "rank": each.rank,
                    "norm": each.norm(),
                    "kept_energy": each.kept_energy,
                    "made": dict(each.made),
                }
                for each in vectors
            ],
            "cosines": between,
            "interference": score,
        }
        print(json.dumps(found, indent=2))
        return
    lines: dict[str, Callable[[PreferenceVector], str]] = {
        "model": lambda v: "unknown" if v.fingerprint is None else v.fingerprint.name,
        "parameters": lambda v: str(len(v.deltas)),
        "layers": lambda v: f"{v.layers[0]} to {v.layers[-1]}" if v.layers else "none",
        "rank": lambda v: str(v.rank),
        "norm": lambda v: f"{v.norm():.4g}",
        "energy kept": lambda v: f"{v.kept_energy:.4f}",
        "cosine of the twins": lambda v: figure(v.made, "cosine_of_twins"),
        "held-out accuracy": lambda v: figure(v.made.get("towards_figures", {}), "accuracy"),
        "by length alone": lambda v: figure(v.made.get("towards_figures", {}), "length_only"),
    }
    table = Table("", *(each.name for each in vectors))
    for name, shown in lines.items():
        table.add_row(name, *(shown(each) for each in vectors))
    out.print(table)
    if score is not None:
        matrix = Table("cosine", *(each.name for each in vectors))
        for each, row in zip(vectors, between, strict=True):
            matrix.add_row(each.name, *(f"{value:.3f}" for value in row))
        out.print(matrix)
        out.print(f"subspace interference {score:.4g}")
