"""The command line. It parses, calls the library and prints; every error of the library is one line and exit code 2."""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from steerkit.errors import ArtefactError, SteerkitError, TextsError, UnsupportedModelError

if TYPE_CHECKING:
    from steerkit.concepts.concept import Concept
    from steerkit.intervention import Intervention

app = typer.Typer(
    name="steerkit",
    help="Steer language models per sample and per layer, at inference.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
concept_app = typer.Typer(help="Fit and inspect concepts.", no_args_is_help=True)
app.add_typer(concept_app, name="concept")

_out = Console()
_err = Console(stderr=True)

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Path or hub id; by default the embedded SmolLM2-135M-Instruct.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn errors that a user can mend into one line and exit code 2."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (SteerkitError, OSError) as error:
            line = (str(error) or type(error).__name__).splitlines()[0]
            _err.print(f"error: {line}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            _err.print("stopped; no file is half-written")
            raise typer.Exit(130) from error

    return guarded


def _load(model: str | None) -> tuple[Any, Any]:
    from transformers.utils import logging

    from steerkit.demo import load_model

    logging.disable_progress_bar()
    try:
        with _err.status("loading the model"):
            return load_model(model)
    except ValueError as error:
        if isinstance(error, SteerkitError):
            raise
        raise UnsupportedModelError(f"{model} must be a causal language model. It cannot be loaded: {error}") from error


@app.command()
@_command
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page.")] = Path("demo"),
    model: ModelOption = None,
    seed: Annotated[int, typer.Option(help="Of the split and of sampling.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Fit two concepts, steer one batch row by row, write a page that shows it.

    Example: `steerkit demo -o demo`
    """
    import torch

    from steerkit.demo import run

    # As many threads as cores fall to a crawl as soon as something else runs; half of them cost little.
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    page = run(*_load(model), output, seed=seed)
    if as_json:
        print(
            json.dumps(
                {"page": str(page), "concepts": [str(path) for path in sorted(page.parent.glob("*.safetensors"))]}
            )
        )
    else:
        _out.print(f"wrote {page}", markup=False, soft_wrap=True)


@concept_app.command("fit")
@_command
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
    texts = _texts(positive), _texts(negative)
    chosen = _layers(layers)
    loaded, tokenizer = _load(model)
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
        _out.print(f"wrote {target}")


@concept_app.command("inspect")
@_command
def concept_inspect(
    path: Annotated[Path, typer.Argument(help="A concept's file.")], as_json: JsonOption = False
) -> None:
    """Show what a concept's file holds.

    Example: `steerkit concept inspect toxicity.safetensors`
    """
    _show(_concept(_path_of(str(path)), None), as_json)


@app.command()
@_command
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One or several prompts; they run as one batch.")],
    at_most: Annotated[list[str] | None, typer.Option(help="NAME=P: P(concept) at most P. Repeatable.")] = None,
    at_least: Annotated[list[str] | None, typer.Option(help="NAME=P: P(concept) at least P. Repeatable.")] = None,
    add: Annotated[list[str] | None, typer.Option(help="NAME=M: add M along the concept. Repeatable.")] = None,
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
    """Generate from several prompts in one batch, steered by concepts.

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
        *(_request("at_most", text) for text in at_most or []),
        *(_request("at_least", text) for text in at_least or []),
        *(_request("add", text) for text in add or []),
        *((("erase", name, None)) for name in erase or []),
    ]
    files = {name: _concept(_path_of(name), direction) for _, name, _ in requests}
    loaded, tokenizer = _load(model)
    interventions: list[Intervention] = []
    for kind, name, amount in requests:
        taken = {each.name for each in interventions}
        interventions.append(_intervention(files[name], kind, amount, taken))
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
    with control or nullcontext(), _err.status("generating"):
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
    _out.print(table, markup=False)


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
    _out.print(repr(concept), markup=False, highlight=False, soft_wrap=True)
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
    _out.print(table)


def _texts(path: Path) -> list[Any]:
    """Read texts: one a line, or JSON lines with `text` or `messages`."""
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise TextsError(f"{path} must be UTF-8 text. Found other bytes ({error.reason}). Convert it.") from error
    if path.suffix != ".jsonl":
        return lines
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            texts.append(entry["messages"] if "messages" in entry else entry["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise TextsError(
                f"Each line of {path} must be a JSON object with `text` or `messages`. Found {line!r:.60} in line {number}. "
                "Mend it, or use a .txt file with one text a line."
            ) from error
    return texts


def _layers(text: str | None) -> list[int] | None:
    """Read 8-20 or 3,5,-1."""
    if text is None:
        return None
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-") if not part.strip().startswith("-") else (part, "", "")
            layers.extend(range(int(first), int(last) + 1) if dash else [int(first)])
    except ValueError as error:
        raise TextsError(f"`--layers` must be like 8-20 or 3,5,-1. Found {text!r}. Mend it.") from error
    return layers


def _request(kind: str, text: str) -> tuple[str, str, Any]:
    """Read NAME=1.5, or NAME=1.5,0,2 with one amount a prompt."""
    name, equals, amount = text.rpartition("=")
    try:
        numbers = [float(number) for number in amount.split(",")]
    except ValueError:
        numbers = []
    if not equals or not name or not numbers:
        option = kind.replace("_", "-")
        raise TextsError(
            f"`--{option}` must be NAME=NUMBER. Found {text!r}. Write --{option} toxicity={40 if kind == 'add' else 0.01}, for example."
        )
    return kind, name, numbers[0] if len(numbers) == 1 else numbers


def _path_of(name: str) -> Path:
    return Path(name) if Path(name).suffix else Path(f"{name}.safetensors")


def _concept(path: Path, direction: str | None) -> "Concept":
    from steerkit.concepts.concept import Concept
    from steerkit.loading import load

    found = load(path)
    if not isinstance(found, Concept):
        raise ArtefactError(f"{path} must hold a concept. Found {type(found).__name__}. Use `steerkit concept fit`.")
    return found if direction is None else found.along(direction)  # type: ignore[arg-type]


def _intervention(concept: "Concept", kind: str, amount: Any, taken: set[str]) -> "Intervention":
    # Two requests may name one concept (a band); keys within a Controller must differ.
    name = concept.name
    while name in taken:
        name = f"{name}_{kind}"
    if kind == "add":
        return concept.add(amount, name=name)
    if kind == "erase":
        return concept.erase(name=name)
    bound = {kind: amount}
    return concept.constrain(**bound, name=name)
