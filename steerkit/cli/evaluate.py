"""`steerkit evaluate` and `steerkit compare`: what steering does to text, and at what cost."""

import io
import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from steerkit import storage
from steerkit.cli.shared import (
    JsonOption,
    ModelOption,
    app,
    artefact_at,
    command,
    err,
    function_at,
    intervention,
    loaded_model,
    out,
    path_of,
    request,
    texts_of,
    vector_at,
)
from steerkit.errors import ScorerError, TextsError

ScorerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--scorer", "-s", help="MODULE:FUNCTION of (prompts, completions), or vader, profanity or refusal. Repeatable."
    ),
]


@app.command()
@command
def evaluate(
    prompts: Annotated[Path, typer.Argument(help="One prompt a line, or .jsonl with `text` or `messages`.")],
    scorer: ScorerOption = None,
    at_most: Annotated[list[str] | None, typer.Option(help="NAME=P: P(concept) at most P. Repeatable.")] = None,
    at_least: Annotated[list[str] | None, typer.Option(help="NAME=P: P(concept) at least P. Repeatable.")] = None,
    add: Annotated[list[str] | None, typer.Option(help="NAME=M: along a concept, or of a vector. Repeatable.")] = None,
    erase: Annotated[list[str] | None, typer.Option(help="NAME: erase the concept. Repeatable.")] = None,
    direction: Annotated[str | None, typer.Option(help="probe, pattern or mean_difference.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for report.html and report.json.")
    ] = None,
    texts: Annotated[bool, typer.Option(help="Write the texts too.")] = False,
    model: ModelOption = None,
    samples: Annotated[int, typer.Option(min=1, help="Continuations of each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Score what the model writes, unsteered and steered, with the damage beside it.

    Example: `steerkit evaluate prompts.txt -s vader --at-least sentiment=0.9 -o report`
    """
    from steerkit.controller import Controller
    from steerkit.evaluation import Report
    from steerkit.evaluation import evaluate as run

    requests = [
        *(request("at_most", text) for text in at_most or []),
        *(request("at_least", text) for text in at_least or []),
        *(request("add", text) for text in add or []),
        *((("erase", name, None)) for name in erase or []),
    ]
    files = {name: artefact_at(path_of(name), direction) for _, name, _ in requests}
    functions = _scorers(scorer)
    rows = texts_of(prompts)
    if output is not None:
        storage.refuse_folder(output)
    loaded, tokenizer = loaded_model(model)
    settings: dict[str, Any] = {
        "scorers": functions, "samples": samples, "max_new_tokens": max_new_tokens, "seed": seed,
        "progress": err.is_terminal and not as_json,
    }  # fmt: skip
    report = run(loaded, tokenizer, rows, **settings)
    if requests:
        interventions: list[Any] = []
        for kind, name, amount in requests:
            interventions.append(intervention(files[name], kind, amount, {each.name for each in interventions}))
        with Controller(loaded, interventions):
            report = Report.join(report, run(loaded, tokenizer, rows, **settings))
    base = "unsteered" if requests else None

    def fill(inside: Path) -> None:
        report.to_json(inside / "report.json", texts=texts)
        report.save_html(inside / "report.html", base=base, texts=texts)

    if output is not None:
        storage.write_folder(output, fill)
    if as_json:
        print(report.to_json(texts=texts))
        return
    _print_table(report.figures())
    if base is not None:
        out.print("against unsteered, paired by prompt (perplexity: the ratio)")
        _print_table(report.figures(base))
    if output is not None:
        out.print(f"wrote {output}", markup=False, soft_wrap=True)


@app.command()
@command
def compare(
    name: Annotated[str, typer.Argument(help="What to call the concept.")],
    prompts: Annotated[Path, typer.Argument(help="What the figures come from; one prompt a line, or .jsonl.")],
    development: Annotated[Path, typer.Option(help="Other prompts, on which doses are chosen.")],
    positive: Annotated[Path, typer.Option(help="Texts that show the concept.")],
    negative: Annotated[Path, typer.Option(help="Texts that do not.")],
    instructions: Annotated[
        Path,
        typer.Option(help="Instructions that ask for it, one a line; four, with the few-shot one made here, are five."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the page, the figure and comparison.json; the same command after a stop goes on there.",
        ),
    ],
    scorer: ScorerOption = None,
    towards: Annotated[str, typer.Option(help="positive or negative.")] = "positive",
    vector: Annotated[str | None, typer.Option(help="A preference vector's file.")] = None,
    one_sided: Annotated[str | None, typer.Option(help="A vector of one policy only.")] = None,
    budgets: Annotated[str, typer.Option(help="KL in nats a token.")] = "0.03,0.1,0.3",
    model: ModelOption = None,
    samples: Annotated[int, typer.Option(min=1, help="Continuations of each prompt.")] = 4,
    trials: Annotated[int, typer.Option(min=3, help="Most amounts to try for a budget.")] = 8,
    best_of: Annotated[int, typer.Option(min=2, help="Largest n of best-of-n.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 24,
    seed: Annotated[int, typer.Option(help="Of the split and of sampling.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare ways to steer at equal damage: methods by budget, prompting, best-of-n and controls always among them.

    Example: `steerkit compare sentiment prompts.txt --development dev.txt --positive happy.txt --negative unhappy.txt
    --instructions ask.txt -s vader -o comparison`
    """
    from steerkit import plots
    from steerkit.evaluation import compare as run

    functions = _scorers(scorer)
    try:
        nats = [float(budget) for budget in budgets.split(",")]
    except ValueError as error:
        raise TextsError(f"`--budgets` must be like 0.03,0.1,0.3. Found {budgets!r}. Mend it.") from error
    plots.require()
    vectors = [None if each is None else vector_at(path_of(each)).add(1.0) for each in (vector, one_sided)]
    files = (prompts, development, positive, negative, instructions)
    rows, dev, shows, lacks, asked = (texts_of(path) for path in files)
    loaded, tokenizer = loaded_model(model)
    found = run(
        loaded, tokenizer, rows, name=name, positive=shows, negative=lacks, scorers=functions, development=dev,
        instructions=asked, towards=towards, vector=vectors[0], one_sided=vectors[1], budgets=nats, trials=trials,  # type: ignore[arg-type]
        best_of=best_of, max_new_tokens=max_new_tokens, samples=samples, seed=seed, folder=output,
        progress=err.is_terminal and not as_json,
    )  # fmt: skip
    output.mkdir(exist_ok=True)
    image = io.BytesIO()
    plots.comparison(found).savefig(image, format="png", dpi=150)
    storage.write_bytes(output / "comparison.png", image.getvalue())
    found.save_html(output / "comparison.html", figure=image.getvalue())
    if as_json:
        cells = [
            {"method": c.method, "budget": c.budget, "effect": _finite(found.effects()[c.method][c.budget]),
             "spent": _finite(found.spent()[c.method][c.budget])}
            for c in found.cells
        ]  # fmt: skip
        print(json.dumps({"goal": found.goal, "cells": cells, "notes": found.notes}, indent=2))
        return
    by_budget: dict[str, dict[str, Any]] = {}
    for method, effects in found.effects().items():
        for budget, effect in effects.items():
            column = "whole" if budget is None else f"{budget:g} nats a token"
            by_budget.setdefault(column, {})[method] = f"{effect} at {found.spent()[method][budget].value:.3g}"
    out.print(f"{found.goal}, against unsteered, at the KL a token that was spent", markup=False)
    _print_table(by_budget)
    for note in found.notes:
        out.print(f"* {note}", markup=False, soft_wrap=True)
    out.print(f"wrote {output}", markup=False, soft_wrap=True)


def _finite(estimate: Any) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in estimate]


def _scorers(names: list[str] | None) -> dict[str, Any]:
    """Return scorers by name: ready ones, or functions of a module."""
    from steerkit.evaluation import scorers

    ready: dict[str, Any] = {"vader": scorers.vader, "profanity": scorers.profanity, "refusal": lambda: scorers.refusal}
    found: dict[str, Any] = {}
    for name in names or []:
        short = name.rpartition(":")[2]
        if short in found:
            raise ScorerError(f"Scorers need names of their own. Found {short!r} twice. Rename a function.", name=short)
        found[short] = ready[name]() if name in ready else function_at(name, "scorer", ScorerError)
    return found


def _print_table(figures: Any) -> None:
    measures = list(dict.fromkeys(measure for arm in figures.values() for measure in arm))
    table = Table("", *map(escape, figures))
    for measure in measures:
        table.add_row(
            escape(measure), *(escape(str(arm[measure])) if measure in arm else "" for arm in figures.values())
        )
    out.print(table)
