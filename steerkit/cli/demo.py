"""`steerkit demo`: the main job on the embedded model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from steerkit.cli.shared import JsonOption, ModelOption, app, command, loaded_model, out


@app.command()
@command
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page.")] = Path("demo"),
    model: ModelOption = None,
    seed: Annotated[int, typer.Option(help="Of the split, of training and of sampling.")] = 0,
    full: Annotated[bool, typer.Option(help="Train the twins of both preferences, and mix them.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fit two concepts, train a preference vector, steer batches row by row, write a page that shows it.

    Example: `steerkit demo -o demo`
    """
    import torch

    from steerkit.demo.page import run

    # As many threads as cores fall to a crawl as soon as something else runs; half of them cost little.
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    page = run(*loaded_model(model), output, seed=seed, full=full)
    if as_json:
        print(
            json.dumps({"page": str(page), "files": [str(path) for path in sorted(page.parent.glob("*.safetensors"))]})
        )
    else:
        out.print(f"wrote {page}", markup=False, soft_wrap=True)
