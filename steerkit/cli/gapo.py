"""`steerkit gapo`: one policy on several rewards."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from steerkit.cli.shared import (
    JsonOption,
    ModelOption,
    app,
    command,
    err,
    figure,
    function_at,
    loaded_model,
    out,
    texts_of,
)
from steerkit.errors import ObjectiveError, SteerkitError, TextsError


@app.command()
@command
def gapo(
    prompts: Annotated[Path, typer.Argument(help="One prompt a line, or .jsonl with `text` or `messages`.")],
    reward: Annotated[
        list[str],
        typer.Option("--reward", "-r", help="An objective as MODULE:FUNCTION, in TRL's form; give it twice or more."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter and what was logged.")],
    model: ModelOption = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 60,
    power: Annotated[float, typer.Option(help="p of the norm that gradients are divided by.")] = 1.0,
    preference: Annotated[str | None, typer.Option(help="P-GAPO: shares of sum 1, like 0.7,0.3.")] = None,
    weighting: Annotated[str, typer.Option(help="gapo, mgda, linear or gdpo.")] = "gapo",
    exact: Annotated[
        bool, typer.Option(help="Gradients of everything that is trained, not of the last block.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=2, help="Completions a step.")] = 16,
    generations: Annotated[int, typer.Option(min=2, help="Completions of one prompt.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a completion.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 2e-4,
    beta: Annotated[float, typer.Option(help="Weight of KL from the base model.")] = 0.0,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter.")] = 16,
    chat: Annotated[
        bool | None, typer.Option(help="Put plain prompts through the chat template; by default if there is one.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the adapter, the order and the completions.")] = 42,
    as_json: JsonOption = False,
) -> None:
    """Train one policy on several rewards, balanced by their gradients (GAPO), and save its adapter.

    Example: `steerkit gapo prompts.txt -r rewards:helpful -r rewards:harmless -o policy`
    """
    from steerkit import storage
    from steerkit.gapo import runs
    from steerkit.gapo.trainer import GAPOConfig

    functions = [function_at(name, "reward", ObjectiveError) for name in reward]
    try:
        shares = None if preference is None else [float(share) for share in preference.split(",")]
    except ValueError as error:
        raise TextsError(f"`--preference` must be like 0.7,0.3. Found {preference!r}. Mend it.") from error
    try:
        config = GAPOConfig(
            "gapo",
            max_steps=steps,
            power=power,
            preference=shares,
            weighting=weighting,
            gram_mode="exact" if exact else "two_pass",
            per_device_train_batch_size=batch_size,
            num_generations=generations,
            max_completion_length=new_tokens,
            learning_rate=learning_rate,
            beta=beta,
            seed=seed,
            save_strategy="no",
            disable_tqdm=as_json or not err.is_terminal,
        )
    except ValueError as error:
        if isinstance(error, SteerkitError):
            raise
        raise TextsError(f"These settings do not fit together: {str(error).splitlines()[0]}") from error
    config.check_count(len(functions))
    texts = texts_of(prompts)

    def fill(inside: Path) -> None:
        loaded, tokenizer = loaded_model(model)
        rows = texts
        if chat or (chat is None and tokenizer.chat_template is not None):
            rows = [[{"role": "user", "content": text}] if isinstance(text, str) else text for text in texts]
        trainer = runs.train(loaded, tokenizer, rows, functions, config=config, rank=rank)
        runs.save(trainer, inside)
        found.update(runs.summary(trainer))

    found: dict[str, Any] = {}
    storage.write_folder(output, fill)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table("objective", "reward, first steps", "last steps", "weight", "signal")
    for name, figures in found["objectives"].items():
        table.add_row(name, *(figure(figures, key) for key in ("reward_first", "reward_last", "weight", "signal")))
    out.print(table, markup=False)
    opposed = (
        "" if found["opposed"] is None else f"; the measured update opposed an objective on {found['opposed']:.0%}"
    )
    out.print(f"{found['steps']} steps{opposed}")
    out.print(f"wrote {output}", markup=False, soft_wrap=True)
