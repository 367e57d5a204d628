"""`steerkit generate`: prompts in one batch, steered by files."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from steerkit.cli.shared import (
    JsonOption,
    ModelOption,
    app,
    artefact_at,
    command,
    err,
    intervention,
    loaded_model,
    out,
    path_of,
    request,
)

if TYPE_CHECKING:
    from steerkit.intervention import Intervention


@app.command()
@command
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One or several prompts; they run as one batch.")],
    at_most: Annotated[list[str] | None, typer.Option(help="NAME=P: P(concept) at most P. Repeatable.")] = None,
    at_least: Annotated[list[str] | None, typer.Option(help="NAME=P: P(concept) at least P. Repeatable.")] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(help="NAME=M: add M along the concept, or M of the preference vector. Repeatable."),
    ] = None,
    erase: Annotated[list[str] | None, typer.Option(help="NAME: erase the concept. Repeatable.")] = None,
    direction: Annotated[
        str | None, typer.Option(help="probe, pattern or mean_difference; as saved by default.")
    ] = None,
    model: ModelOption = None,
    chat: Annotated[bool, typer.Option(help="Put each prompt through the chat template as a user turn.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 40,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Generate from several prompts in one batch, steered by concepts and preference vectors.

    NAME is a file, or the name of NAME.safetensors in this folder. A list gives each prompt its own amount; at-most 1 and
    at-least 0 are off. A band is one of each on the same concept. Layers are those that the concept's file names. The mean
    magnitude is over layers and over the new tokens, with its sign.

    Example: `steerkit generate "The film was" "My day was" --at-most toxicity=0.01 --add formal=4,0`
    """
    import torch

    from steerkit.activations import tokenise
    from steerkit.controller import Controller
    from steerkit.demo import until_end

    requests = [
        *(request("at_most", text) for text in at_most or []),
        *(request("at_least", text) for text in at_least or []),
        *(request("add", text) for text in add or []),
        *((("erase", name, None)) for name in erase or []),
    ]
    files = {name: artefact_at(path_of(name), direction) for _, name, _ in requests}
    loaded, tokenizer = loaded_model(model)
    interventions: list[Intervention] = []
    for kind, name, amount in requests:
        taken = {each.name for each in interventions}
        interventions.append(intervention(files[name], kind, amount, taken))
    control = Controller(loaded, interventions, record_magnitudes=True) if interventions else None
    texts: list[Any] = [[{"role": "user", "content": p}] for p in prompts] if chat else list(prompts)
    tokens = tokenise(tokenizer, texts)
    width = max(len(ids) for ids in tokens)
    batch = {
        "input_ids": torch.tensor([[0] * (width - len(ids)) + ids for ids in tokens], device=loaded.device),
        "attention_mask": torch.tensor(
            [[0] * (width - len(ids)) + [1] * len(ids) for ids in tokens], device=loaded.device
        ),
    }
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with control or nullcontext(), err.status("generating"):
        rows = loaded.generate(**batch, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    answers = [tokenizer.decode(row[width:], skip_special_tokens=True) for row in rows]
    magnitudes = {} if control is None else control.magnitudes
    new = [until_end(row[width:], tokenizer) for row in rows]
    doses = {
        name: [
            float(torch.stack([m[row, width - 1 :][: len(ids)].mean() for m in by_layer.values()]).mean())
            for row, ids in enumerate(new)
        ]
        for name, by_layer in magnitudes.items()
        if by_layer  # what is written into the weights has no magnitude by row
    }
    _print_generations(prompts, answers, doses, as_json)


def _print_generations(
    prompts: Sequence[str], answers: Sequence[str], doses: dict[str, list[float]], as_json: bool
) -> None:
    if as_json:
        rows = [
            {"prompt": prompt, "text": answer, "mean_magnitude": {name: dose[i] for name, dose in doses.items()}}
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    table = Table("prompt", "continuation", *(f"{name}: mean magnitude" for name in doses), show_lines=True)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        table.add_row(prompt, answer.strip(), *(f"{dose[i]:.2f}" for dose in doses.values()))
    out.print(table, markup=False)
