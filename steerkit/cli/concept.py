"""`steerkit concept`: fit and inspect."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from steerkit.errors import ArtefactError

if TYPE_CHECKING:
    from steerkit.concepts.concept import Concept

concept_app = typer.Typer(help="Fit and inspect concepts.", no_args_is_help=True)
app.add_typer(concept_app, name="concept")


@concept_app.command("fit")
@command
def concept_fit(
    name: Annotated[str, typer.Argument(help="What to call the concept.")],
    positive: Annotated[
        Path, typer.Option(help="Texts that show it: one a line, or .jsonl with `text` or `messages`.")
    ],
    negative: Annotated[Path, typer.Option(help="Texts that do not.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File; by default NAME.safetensors.")] = None,
    model: ModelOption = None,
    layers: Annotated[str | None, typer.Option(help="Blocks to probe, such as 8-20 or 3,5,-1; by default all.")] = None,
    direction: Annotated[str, typer.Option(help="What moves: probe, pattern or mean_difference.")] = "probe",
    held_out: Annotated[float, typer.Option(help="Share of the texts that the fit never sees.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Fit a concept from two files of texts.

    Example: `steerkit concept fit toxicity --positive toxic.txt --negative clean.txt`
    """
    from steerkit.concepts.concept import Concept

    target = output or Path(f"{name}.safetensors")
    if target.is_dir() or not target.parent.is_dir():
        raise ArtefactError(f"A file in an existing folder is required. Found {target}. Pass --output FILE.")
    texts = texts_of(positive), texts_of(negative)
    chosen = layers_of(layers)
    loaded, tokenizer = loaded_model(model)
    concept = Concept.fit(
        name,
        loaded,
        tokenizer,
        positive=texts[0],
        negative=texts[1],
        layers=chosen,
        direction=direction,  # type: ignore[arg-type]
        held_out=held_out,
        seed=seed,
    )
    concept.save(target)
    _show(concept, as_json)
    if not as_json:
        out.print(f"wrote {target}")


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
