"""The command line. It parses, calls the library and prints; every error of the library is one line and exit code 2."""

import json
from collections.abc import Callable, Mapping, Sequence
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
    from steerkit.preferences.vector import PreferenceVector

app = typer.Typer(
    name="steerkit",
    help="Steer language models per sample and per layer, at inference.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
concept_app = typer.Typer(help="Fit and inspect concepts.", no_args_is_help=True)
app.add_typer(concept_app, name="concept")
vector_app = typer.Typer(help="Train, mix, merge, export and inspect preference vectors.", no_args_is_help=True)
app.add_typer(vector_app, name="vector")

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
    except (ValueError, OSError) as error:
        if isinstance(error, SteerkitError):
            raise
        why = str(error).splitlines()[0]
        raise UnsupportedModelError(f"{model} must be a causal language model. It cannot be loaded: {why}") from error


@app.command()
@_command
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

    from steerkit.demo import run

    # As many threads as cores fall to a crawl as soon as something else runs; half of them cost little.
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    page = run(*_load(model), output, seed=seed, full=full)
    if as_json:
        print(
            json.dumps({"page": str(page), "files": [str(path) for path in sorted(page.parent.glob("*.safetensors"))]})
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


@vector_app.command("train")
@_command
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
    loaded, tokenizer = _load(model)
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
        _out.print(f"wrote {target}", markup=False, soft_wrap=True)


@vector_app.command("mix")
@_command
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
    mixed = sum(_vector(path) * magnitude for path, magnitude in _terms("mix", terms)).named(name)  # type: ignore[union-attr]
    if energy is not None or rank is not None:
        mixed = mixed.compress(rank=rank, energy=energy)
    mixed.save(output)
    _show_vectors([mixed], as_json)
    if not as_json:
        _out.print(f"wrote {output}", markup=False, soft_wrap=True)


@vector_app.command("merge")
@_command
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

    vectors = [(_vector(path), magnitude) for path, magnitude in _terms("add", add)]
    with _err.status("merging"):
        merge_checkpoint(base, vectors, output, check_model=check_model)
    if as_json:
        print(json.dumps({"output": str(output), "vectors": [{"name": v.name, "magnitude": m} for v, m in vectors]}))
    else:
        _out.print(f"wrote {output}", markup=False, soft_wrap=True)


@vector_app.command("export")
@_command
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
    error = _vector(_path_of(vector)).to_adapter(output, magnitude, rank=rank)
    if as_json:
        print(json.dumps({"output": str(output), "relative_error": error}))
    else:
        _out.print(f"wrote {output}; relative error {error:.3g}", markup=False, soft_wrap=True)


@vector_app.command("inspect")
@_command
def vector_inspect(
    vectors: Annotated[list[str], typer.Argument(help="One or several vectors' files.")], as_json: JsonOption = False
) -> None:
    """Show what vectors' files hold; of several, also how they lie to each other.

    Example: `steerkit vector inspect helpful harmless`
    """
    _show_vectors([_vector(_path_of(name)) for name in vectors], as_json)


@app.command()
@_command
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
        *(_request("at_most", text) for text in at_most or []),
        *(_request("at_least", text) for text in at_least or []),
        *(_request("add", text) for text in add or []),
        *((("erase", name, None)) for name in erase or []),
    ]
    files = {name: _artefact(_path_of(name), direction) for _, name, _ in requests}
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
        if by_layer  # what is written into the weights has no magnitude by row
    }
    _print_generations(prompts, answers, doses, as_json)


@app.command()
@_command
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

    functions = [runs.reward_function(name) for name in reward]
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
            disable_tqdm=as_json or not _err.is_terminal,
        )
    except ValueError as error:
        if isinstance(error, SteerkitError):
            raise
        raise TextsError(f"These settings do not fit together: {str(error).splitlines()[0]}") from error
    config.check_count(len(functions))
    texts = _texts(prompts)

    def fill(inside: Path) -> None:
        loaded, tokenizer = _load(model)
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
        table.add_row(name, *(_figure(figures, key) for key in ("reward_first", "reward_last", "weight", "signal")))
    _out.print(table, markup=False)
    opposed = (
        "" if found["opposed"] is None else f"; the measured update opposed an objective on {found['opposed']:.0%}"
    )
    _out.print(f"{found['steps']} steps{opposed}")
    _out.print(f"wrote {output}", markup=False, soft_wrap=True)


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


def _terms(option: str, texts: Sequence[str]) -> list[tuple[Path, float]]:
    """Read NAME=M for several vectors, one magnitude each."""
    requests = [_request(option, text) for text in texts]
    for _, name, amount in requests:
        if isinstance(amount, list):
            raise TextsError(f"A vector takes one magnitude here. Found {len(amount)} for {name!r}. Write {name}=0.7.")
    return [(_path_of(name), amount) for _, name, amount in requests]


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
        "cosine of the twins": lambda v: _figure(v.made, "cosine_of_twins"),
        "held-out accuracy": lambda v: _figure(v.made.get("towards_figures", {}), "accuracy"),
        "by length alone": lambda v: _figure(v.made.get("towards_figures", {}), "length_only"),
    }
    table = Table("", *(each.name for each in vectors))
    for name, shown in lines.items():
        table.add_row(name, *(shown(each) for each in vectors))
    _out.print(table)
    if score is not None:
        matrix = Table("cosine", *(each.name for each in vectors))
        for each, row in zip(vectors, between, strict=True):
            matrix.add_row(each.name, *(f"{value:.3f}" for value in row))
        _out.print(matrix)
        _out.print(f"subspace interference {score:.4g}")


def _figure(figures: Mapping[str, Any], name: str) -> str:
    return f"{figures[name]:.3f}" if isinstance(figures.get(name), float) else ""


def _texts(path: Path) -> list[Any]:
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
        option = "" if kind == "mix" else f"--{kind.replace('_', '-')} "
        example = {"mix": "helpful=0.7", "add": "toxicity=40"}.get(kind, "toxicity=0.01")
        raise TextsError(f"{option}NAME=NUMBER is required. Found {text!r}. Write {option}{example}, for example.")
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


def _artefact(path: Path, direction: str | None) -> "Concept | PreferenceVector":
    from steerkit.loading import load
    from steerkit.preferences.vector import PreferenceVector

    found = load(path)
    return found if isinstance(found, PreferenceVector) else _concept(path, direction)


def _vector(path: Path) -> "PreferenceVector":
    from steerkit.loading import load
    from steerkit.preferences.vector import PreferenceVector

    found = load(path)
    if not isinstance(found, PreferenceVector):
        raise ArtefactError(
            f"{path} must hold a preference vector. Found {type(found).__name__}. Use `steerkit vector train`."
        )
    return found


def _intervention(source: "Concept | PreferenceVector", kind: str, amount: Any, taken: set[str]) -> "Intervention":
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
