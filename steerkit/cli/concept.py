"""`steerkit concept`: fit and inspect."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from steerkit.cli.shared import (
    JsonOption,
    ModelOption,
    app,
    command,
    concept_at,
    layers_of,
    loaded_model,
    out,
    path_of,
    texts_of,
)
from steerkit.errors import ArtefactError, TextsError

if TYPE_CHECKING:
    from steerkit.concepts.concept import Concept

concept_app = typer.Typer(help="Fit and inspect concepts.", no_args_is_help=True)
app.add_typer(concept_app, name="concept")


@concept_app.command("fit")
@command
def concept_fit(
    name: Annotated[str, typer.Argument(help="What to call the concept.")],
    positive: Annotated[
        Path | None, typer.Option(help="Texts that show it: one a line, or .jsonl with `text` or `messages`.")
    ] = None,
    negative: Annotated[Path | None, typer.Option(help="Texts that do not.")] = None,
    describe: Annotated[
        str | None,
        typer.Option(help="Instead of files: what it is, such as 'formal' or 'formal/casual'; the model writes texts."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File; by default NAME.safetensors.")] = None,
    model: ModelOption = None,
    layers: Annotated[str | None, typer.Option(help="Blocks to probe, such as 8-20 or 3,5,-1; by default all.")] = None,
    direction: Annotated[str, typer.Option(help="What moves: pattern, probe or mean_difference.")] = "pattern",
    held_out: Annotated[float, typer.Option(help="Share of the texts that the fit never sees.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Fit a concept from two files of texts, or from texts that the model writes for a description and for its opposite.

    Example: `steerkit concept fit toxicity --positive toxic.txt --negative clean.txt`

    Example: `steerkit concept fit formal --describe "formal/casual, like a chat with a friend"`
    """
    from steerkit.concepts.concept import Concept

    target = output or Path(f"{name}.safetensors")
    if target.is_dir() or not target.parent.is_dir():
        raise ArtefactError(f"A file in an existing folder is required. Found {target}. Pass --output FILE.")
    texts, groups = _texts_for(positive, negative, describe), None
    chosen = layers_of(layers)
    loaded, tokenizer = loaded_model(model)
    if isinstance(texts, str):
        texts, groups = _written(loaded, tokenizer, texts, seed, quiet=as_json)
    concept = Concept.fit(
        name,
        loaded,
        tokenizer,
        positive=texts[0],
        negative=texts[1],
        groups=groups,
        layers=chosen,
        direction=direction,  # type: ignore[arg-type]
        held_out=held_out,
        seed=seed,
    )
    concept.save(target)
    _show(concept, as_json)
    if not as_json:
        out.print(f"wrote {target}")


def _texts_for(positive: Path | None, negative: Path | None, describe: str | None) -> tuple[list, list] | str:
    """Return the texts of two files, or the description that they are to be written for."""
    if describe is not None and positive is None and negative is None:
        return describe
    if describe is None and positive is not None and negative is not None:
        return texts_of(positive), texts_of(negative)
    given = [
        f"--{word}"
        for word, value in zip(("positive", "negative", "describe"), (positive, negative, describe))
        if value
    ]
    raise TextsError(
        f"A concept needs --positive and --negative, or --describe. Found {' and '.join(given) or 'none of them'}. Pass two "
        "files of texts, or a description."
    )


def _written(model: Any, tokenizer: Any, describe: str, seed: int, quiet: bool) -> tuple[tuple[list, list], Any]:
    """Let the model write texts; what lies after a slash describes the opposite."""
    from steerkit.concepts.texts import contrast_texts

    description, _, opposite = describe.partition("/")
    made = contrast_texts(
        model, tokenizer, description.strip(), opposite=opposite.strip() or None, seed=seed, progress=not quiet
    )
    if not quiet:
        out.print(str(made), markup=False, highlight=False, soft_wrap=True)
        for side, sign in ((made.positive, "+"), (made.negative, "-")):
            out.print(f"{sign} {side[0][-1]['content'][:160]!r}", markup=False, highlight=False, soft_wrap=True)
    return (made.positive, made.negative), made.groups


@concept_app.command("inspect")
@command
def concept_inspect(
    path: Annotated[Path, typer.Argument(help="A concept's file.")], as_json: JsonOption = False
) -> None:
    """Show what a concept's file holds.

    Example: `steerkit concept inspect toxicity.safetensors`
    """
    _show(concept_at(path_of(str(path)), None), as_json)


def _show(concept: "Concept", as_json: bool) -> None:
    if as_json:
        summary = {
            "name": concept.name,
            "model": None if concept.fingerprint is None else concept.fingerprint.name,
            "direction": concept.direction,
            "best_layer": concept.best_layer,
            "steering_layers": concept.steering_layers,
            "made": dict(concept.made),
            "figures": {layer: vars(figures) for layer, figures in concept.figures.items()},
        }
        print(json.dumps(summary, indent=2))
        return
    out.print(repr(concept), markup=False, highlight=False, soft_wrap=True)
    table = Table("layer", "accuracy", "95 %", "AUC", "95 %", "calibration error", "residual norm", "steers")
    for layer, figures in concept.figures.items():
        table.add_row(
            str(layer),
            f"{figures.accuracy:.3f}",
            f"{figures.accuracy_interval[0]:.2f} to {figures.accuracy_interval[1]:.2f}",
            f"{figures.auc:.3f}",
            f"{figures.auc_interval[0]:.2f} to {figures.auc_interval[1]:.2f}",
            f"{figures.calibration_error:.3f}",
            f"{concept.norms[layer]:.1f}",
            "best" if layer == concept.best_layer else "yes" if layer in concept.steering_layers else "",
        )
    out.print(table)
