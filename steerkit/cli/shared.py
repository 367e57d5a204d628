"""What every command needs: the application, the terminal, options, errors as one line, files by name."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from steerkit.errors import ArtefactError, SteerkitError, TextsError, UnsupportedModelError

if TYPE_CHECKING:
    from steerkit.concepts.concept import Concept
    from steerkit.intervention import Intervention
    from steerkit.preferences.vector import PreferenceVector

app = typer.Typer(
    name="steerkit",
    help="Steer language models per sample and per layer, at inference.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

out = Console()
err = Console(stderr=True)

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Path or hub id; by default the embedded SmolLM2-135M-Instruct.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn errors that a user can mend into one line and exit code 2."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (SteerkitError, OSError) as error:
            line = (str(error) or type(error).__name__).splitlines()[0]
            err.print(f"error: {line}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            err.print("stopped; no file is half-written")
            raise typer.Exit(130) from error

    return guarded


def loaded_model(model: str | None) -> tuple[Any, Any]:
    """Return a model and its tokenizer, or say in one line why not."""
    from transformers.utils import logging

    from steerkit.demo import load_model

    logging.disable_progress_bar()
    try:
        with err.status("loading the model"):
            return load_model(model)
    except (ValueError, OSError) as error:
        if isinstance(error, SteerkitError):
            raise
        why = str(error).splitlines()[0]
        raise UnsupportedModelError(f"{model} must be a causal language model. It cannot be loaded: {why}") from error


def texts_of(path: Path) -> list[Any]:
    """Read texts: one a line, or JSON lines with `text` or `messages`."""
    try:
        lines = [line.rstrip("\r") for line in path.read_text("utf-8").split("\n") if line.strip()]
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


def layers_of(text: str | None) -> list[int] | None:
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


def request(kind: str, text: str) -> tuple[str, str, Any]:
    """Read NAME=1.5, or NAME=1.5,0,2 with one amount a prompt."""
    name, equals, amount = text.rpartition("=")
    try:
        numbers = [float(number) for number in amount.split(",")]
    except ValueError:
        numbers = []
    if not equals or not name or not numbers:
        option = "" if kind == "mix" else f"--{kind.replace('_', '-')} "
        example = {"mix": "helpful=0.7", "add": "toxicity=40"}.get(kind, "toxicity=0.01")
        raise TextsError(f"{option}NAME=NUMBER is required. Found {text!r}. Write {option}{example}, for example.")
    return kind, name, numbers[0] if len(numbers) == 1 else numbers


def path_of(name: str) -> Path:
    """Return the file that a name stands for."""
    return Path(name) if Path(name).suffix else Path(f"{name}.safetensors")


def concept_at(path: Path, direction: str | None) -> "Concept":
    """Read a concept's file."""
    from steerkit.concepts.concept import Concept
    from steerkit.loading import load

    found = load(path)
    if not isinstance(found, Concept):
        raise ArtefactError(f"{path} must hold a concept. Found {type(found).__name__}. Use `steerkit concept fit`.")
    return found if direction is None else found.along(direction)  # type: ignore[arg-type]


def artefact_at(path: Path, direction: str | None) -> "Concept | PreferenceVector":
    """Read a file of either kind."""
    from steerkit.loading import load
    from steerkit.preferences.vector import PreferenceVector

    found = load(path)
    return found if isinstance(found, PreferenceVector) else concept_at(path, direction)


def vector_at(path: Path) -> "PreferenceVector":
    """Read a preference vector's file."""
    from steerkit.loading import load
    from steerkit.preferences.vector import PreferenceVector

    found = load(path)
    if not isinstance(found, PreferenceVector):
        raise ArtefactError(
            f"{path} must hold a preference vector. Found {type(found).__name__}. Use `steerkit vector train`."
        )
    return found


def figure(figures: Mapping[str, Any], name: str) -> str:
    """Return a figure as text, nothing if there is none."""
    return f"{figures[name]:.3f}" if isinstance(figures.get(name), float) else ""


def intervention(source: "Concept | PreferenceVector", kind: str, amount: Any, taken: set[str]) -> "Intervention":
    """Return what an option asks of a file."""
    from steerkit.concepts.concept import Concept

    # Two requests may name one concept (a band); keys within a Controller must differ.
    name = source.name
    while name in taken:
        name = f"{name}_{kind}"
    if kind == "add":
        return source.add(amount, name=name)
    if not isinstance(source, Concept):
        option = kind.replace("_", "-")
        raise ArtefactError(
            f"`--{option}` takes a concept. Found the preference vector {source.name!r}. Use --add {source.name}=1."
        )
    concept = source
    if kind == "erase":
        return concept.erase(name=name)
    bound = {kind: amount}
    return concept.constrain(**bound, name=name)


def function_at(name: str, what: str, error: type[SteerkitError]) -> Callable[..., Any]:
    """Return the function that `module:function` names; modules of the working directory are found too."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise error(f"A {what} is named as module:function. Found {name!r}. Write it like {what}s:politeness.")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as why:  # a module may raise whatever it likes
        raise error(f"The {what} {name!r} must be importable. Found: {why}. Check the names.") from why
    if not callable(found):
        raise error(f"A {what} must be a function. Found that {name!r} is {type(found).__name__}.")
    return found
