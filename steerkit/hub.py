"""Artefacts as folders and as repositories of the Hugging Face hub: the one safetensors file and a model card beside it.

    toxicity.push_to_hub("user/toxicity")
    toxicity = Concept.from_pretrained("user/toxicity", model=model)

A card says what the artefact is, what it was made on and how, what it does on held-out texts, and how to load it. Its
licence is left to whoever publishes it. Of a repository only the safetensors file is fetched, and `storage` reads it:
nothing that lies on the hub is executed.
"""

import json
import math
import os
import re
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from steerkit import storage
from steerkit.errors import ArtefactError, SteerkitWarning
from steerkit.model import Fingerprint

FILE, CARD = "steerkit.safetensors", "README.md"

_FIGURES = ("pairs", "accuracy", "margin", "length_only")
"""Of a policy on held-out pairs, as `train_policy` notes them."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


class HubArtefact(ABC):
    """Gives an artefact `save_pretrained`, `push_to_hub` and `from_pretrained`."""

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically."""

    @classmethod
    @abstractmethod
    def from_stored(cls, stored: storage.Stored) -> Self:
        """Rebuild from a file that `storage.read` has checked."""

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder with `steerkit.safetensors` and a model card, `README.md`; the whole of it or nothing.

        Raises:
            ArtefactError: the folder is not empty, its parent is missing, or it cannot be written.
        """
        target = Path(folder)
        text = _card(self, target.resolve().name)
        storage.write_folder(
            target, lambda inside: (self.save(inside / FILE), (inside / CARD).write_text(text, "utf-8"))
        )

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to a repository of the hub, which is made if need be; return its address.

        A card that is there already is kept, since its licence and text may be yours.

        Args:
            repo_id: `"user/name"`, or a name of your own.
            private: whether a new repository is; an existing one stays as it is.
            token: of your account; by default the one that you logged in with.

        Raises:
            ArtefactError: the hub cannot be reached or refuses it.

        Warns:
            SteerkitWarning: a card was kept, whose figures may be those of an earlier artefact.
        """
        api = _api(token)
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / FILE)
            with _reaching(f"{repo_id!r} must be a hub repository that you may write to", "Log in, or pass token=."):
                repository = api.create_repo(repo_id, private=private, exist_ok=True)
                kept = api.file_exists(repository.repo_id, CARD)
                (Path(folder) / CARD).write_text(_card(self, repository.repo_id), "utf-8")
                api.upload_folder(
                    repo_id=repository.repo_id,
                    folder_path=folder,
                    commit_message=f"Upload {type(self).__name__} with steerkit",
                    ignore_patterns=[CARD] if kept else None,
                )
        if kept:
            warnings.warn(
                f"{repository.repo_id} has a model card, which was kept: its figures may be those of an earlier artefact. "
                f"Delete its {CARD} and push again for a new one.",
                SteerkitWarning,
                stacklevel=2,
            )
        return str(repository)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], model: Any = None, *, check_model: bool = True) -> Self:
        """Load from a folder of `save_pretrained`, a repository of the hub, or a file. Nothing in it is executed.

        Args:
            source: a path, or `"user/name"` on the hub if there is no such path.
            model: the model to use it on; another base model than the one it was made on is refused.
            check_model: as in `load`.

        Raises:
            ArtefactError: nothing there, out of reach, damaged, not ours, of another kind, or from a newer format.
            BaseModelMismatchError: it was made on another model.
        """
        stored = storage.read(locate(source))
        kind = _KINDS.get(stored.kind)
        if kind is None or kind.name != cls.__name__:
            other = "load(path)" if kind is None else f"{kind.name}.from_pretrained"
            raise ArtefactError(f"{stored.path} must hold a {cls.__name__}. Found {stored.kind!r:.40}. Use {other}.")
        return checked(cls.from_stored(stored), stored, model, check_model=check_model)


def locate(source: str | os.PathLike[str]) -> Path:
    """Return an artefact's file: a path itself, the file in a folder of `save_pretrained`, or one fetched from the hub.

    Only `"user/name"` that is no path here and does not end in `.safetensors` is looked for on the hub.

    Raises:
        ArtefactError: the hub cannot be reached, or has no such repository with an artefact in it.
    """
    if (
        isinstance(source, str)
        and _REPOSITORY.fullmatch(source)
        and not source.endswith(".safetensors")
        and not os.path.lexists(source)
    ):
        with _reaching(
            f"{source!r} must be a file, a folder, or a hub repository with a {FILE}", "Check the name, or log in."
        ):
            return Path(_api(None).hf_hub_download(source, FILE))
    inside = os.path.join(source, FILE)
    return Path(inside if os.path.isfile(inside) else source)


def checked(artefact: Any, stored: storage.Stored, model: Any, *, check_model: bool) -> Any:
    """Return an artefact for use on a model (None: on any), whose base model it must be unless `check_model` is False.

    Raises:
        BaseModelMismatchError: it was made on another model.
    """
    if model is None:
        return artefact
    here, made_on = Fingerprint.of(model), artefact.fingerprint
    alike = made_on is None or (made_on.depth, made_on.d_model) == (here.depth, here.d_model)
    if made_on is not None and (check_model or not alike):
        made_on.check(here, repr(stored.header.get("name", stored.kind)))
    return artefact if check_model else replace(artefact, fingerprint=here)


def _api(token: str | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="steerkit", library_version=storage.package_version())


@contextmanager
def _reaching(need: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the network, the hub and its client fail in ways of their own
        why = (str(error).strip().splitlines() or [""])[0]
        raise ArtefactError(f"{need}. Found {type(error).__name__}: {why:.240}. {remedy}") from error


# The model card.


class _Kind(NamedTuple):
    """What a card says of all artefacts of one kind."""

    name: str
    tag: str
    what: str
    use: str
    facts: Callable[[Any], Mapping[str, Any]]
    figures: Callable[[Any], list[str]]
    limits: tuple[str, ...]


def _card(artefact: Any, source: str) -> str:
    """Return the card of an artefact that `source` is loaded from."""
    [kind] = [kind for kind in _KINDS.values() if kind.name == type(artefact).__name__]
    variable, base = kind.name.lower().removeprefix("preference"), artefact.fingerprint
    known = "path/to/the/base/model" if base is None else base.name
    front = ["library_name: steerkit", "tags:", "- steerkit", f"- {kind.tag}"]
    # A folder by a relative path looks like a repository, and would be a dead link.
    if _REPOSITORY.fullmatch(known) and base is not None and not os.path.lexists(known):
        front += [f"base_model: {json.dumps(known, ensure_ascii=False)}", "base_model_relation: adapter"]
    made_on = (
        "Which one is not recorded: check that it is the one that you use it on."
        if base is None
        else f"{_code(known)}, {base.depth} decoder blocks of width {base.d_model}, fingerprint {_code(base.digest)}. "
        "With `model=`, loading refuses every other one; a light fine-tune of the same model is not told apart."
    )
    facts = {**kind.facts(artefact), **artefact.made}
    shown = [f"- {_plain(key)}: {_code(value)}" for key, value in facts.items() if _worth(key, value)]
    return "\n".join(
        [
            *("---", *front, "---", ""),
            *(f"# {_plain(artefact.name)}", "", kind.what, ""),
            *("## Base model", "", made_on, ""),
            *("## How it was made", "", *shown, ""),
            *("## Held-out figures", "", *kind.figures(artefact), ""),
            *("## Limits", "", *(f"- {limit}" for limit in kind.limits), ""),
            *("## Use", "", "```python", f"from steerkit import {kind.name}, Controller"),
            *("from transformers import AutoModelForCausalLM, AutoTokenizer", ""),
            f"model = AutoModelForCausalLM.from_pretrained({json.dumps(known, ensure_ascii=False)})",
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(known, ensure_ascii=False)})",
            f"{variable} = {kind.name}.from_pretrained({json.dumps(source, ensure_ascii=False)}, model=model)",
            'inputs = tokenizer("The film was", return_tensors="pt")',
            f"with Controller(model, [{variable}.{kind.use}]):",
            "    output = model.generate(**inputs, max_new_tokens=20)",
            "print(tokenizer.decode(output[0]))",
            *("```", ""),
        ]
    )


def _concept_facts(concept: Any) -> dict[str, Any]:
    return {
        "layers": _spans(concept.layers),
        "moves along": concept.direction,
        "best layer": concept.best_layer,
        "steering layers": _spans(concept.steering_layers),
    }


def _concept_figures(concept: Any) -> list[str]:
    best, steering = concept.best_layer, concept.steering_layers
    lines = [
        f"Of the probe of each layer, on {concept.made.get('held_out', 'the')} held-out texts, with 95 % intervals of "
        "each layer by itself, which flatter the best of many; chance is 0.5. The best layer is bold; constraints and erasures act at those with a star by default.",
        "",
        "| layer | accuracy | AUC | calibration error |",
        "| --- | --- | --- | --- |",
    ]
    for layer, figures in concept.figures.items():
        shown = (f"**{layer}**" if layer == best else str(layer)) + (" *" if layer in steering else "")
        cells = [
            f"{value:.3f} [{low:.3f}, {high:.3f}]"
            for value, (low, high) in (
                (figures.accuracy, figures.accuracy_interval),
                (figures.auc, figures.auc_interval),
            )
        ]
        lines.append(f"| {shown} | {cells[0]} | {cells[1]} | {figures.calibration_error:.3f} |")
    if concept.figures[best].accuracy_interval[0] <= 0.5:
        lines += ["", "**Even the best layer cannot be told from chance.** Steering along it moves something else."]
    return lines


def _vector_facts(vector: Any) -> dict[str, Any]:
    return {
        "parameters changed": len(vector.deltas),
        "layers": _spans(vector.layers),
        "rank": vector.rank,
        "norm": vector.norm(),
    }


def _vector_figures(vector: Any) -> list[str]:
    rows = []
    for side in ("towards", "away"):
        found = vector.made.get(f"{side}_figures")
        values: list[Any] = [found.get(name) for name in _FIGURES] if isinstance(found, Mapping) else [None]
        if not all(isinstance(value, int | float) for value in values):
            continue  # trained without held-out pairs, or noted by somebody else
        pairs, accuracy, margin, length_only = values
        if pairs > 0 and 0 <= accuracy <= 1:
            low, high = _wilson(accuracy, pairs)
            shown = f"{accuracy:.3f} [{low:.3f}, {high:.3f}] | {margin:.3g} | {length_only:.3f}"
            rows.append(f"| {side} | {pairs} | {shown} |")
    if not rows:
        return ["None were recorded."]
    return [
        "Accuracy of each twin's implicit reward on held-out pairs, labelled as it was trained, with 95 % intervals (of "
        "independent pairs), beside what length alone would tell.",
        "",
        "| policy | pairs | accuracy | margin | length only |",
        "| --- | --- | --- | --- | --- |",
        *rows,
    ]


_KINDS = {
    "concept": _Kind(
        "Concept",
        "activation-steering",
        "A concept in the residual stream of a language model: one calibrated linear probe a layer, and the directions "
        "that steerkit moves it along at inference. The model's weights do not change.",
        "constrain(at_least=0.9)",
        _concept_facts,
        _concept_figures,
        (
            "The figures say how well the concept is read from texts like those that the probes were fitted on, not what "
            "steering does to generated text: measure that with `steerkit.evaluate`.",
            "Under other weights (a fine-tune, a preference vector) a probe may read something else: `concept.score`.",
            "Large magnitudes break text.",
        ),
    ),
    "preference_vector": _Kind(
        "PreferenceVector",
        "preference-vector",
        "A preference as a direction in the weights of a language model, the difference of two policies: "
        "steerkit adds it at inference, with a magnitude for each sample.",
        "add(1.0)",
        _vector_facts,
        _vector_figures,
        (
            "Magnitude 1 is what was trained; negative ones invert the preference; above about 2 text tends to break.",
            "The figures are of the policies that it is the difference of, not of generated text: measure that with "
            "`steerkit.evaluate`.",
            "Cosines with other vectors mean something only where the policies started from the same weights.",
        ),
    ),
}


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `count` independent trials (Wilson's score)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _spans(layers: tuple[int, ...]) -> str:
    """Return `0..3, 7` for (0, 1, 2, 3, 7)."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    pairs = zip(sorted(starts), sorted(ends), strict=True)
    return ", ".join(str(start) if start == end else f"{start}..{end}" for start, end in pairs)


def _worth(key: str, value: Any) -> bool:
    return value is not None and key != "sum" and not key.endswith("_figures")


def _code(value: Any) -> str:
    """Return a value as code on one line, whatever is in it."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{key}={_number(each)}" for key, each in value.items())
    elif isinstance(value, list | tuple):
        value = ", ".join(map(_number, value))
    return f"`{_plain(_number(value)):.1000}`"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
    """Return a text on one line, without the sign that begins and ends code."""
    return " ".join(text.replace("`", "'").split())
