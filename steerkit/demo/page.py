"""The demo as a whole: both parts in one page that needs no other file."""

import html
import os
import time
from pathlib import Path
from string import Template
from typing import Any

import torch
import transformers

from steerkit import storage
from steerkit.demo.concepts import concept_part
from steerkit.demo.embedded import ASSETS
from steerkit.demo.preferences import preference_part
from steerkit.model import find_decoder


def run(
    model: Any,
    tokenizer: Any,
    output: str | os.PathLike[str],
    *,
    new_tokens: int = 28,
    seed: int = 0,
    steps: int = 7,
    full: bool = False,
) -> Path:
    """Fit two concepts and train one preference vector (`full`: two), steer batches row by row; return the page's path."""
    started = time.perf_counter()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    first = concept_part(model, tokenizer, folder, new_tokens=new_tokens, seed=seed)
    formality = first.concepts[1]
    second = preference_part(
        model, tokenizer, folder, formality, new_tokens=new_tokens + 8, seed=seed, steps=steps, full=full
    )
    seconds = time.perf_counter() - started
    values = {
        "model": html.escape(find_decoder(model).name),
        "versions": html.escape(
            f"steerkit {storage.package_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
            f"seed {seed}, {seconds:.0f} s on {os.cpu_count()} cores"
        ),
        **first.values,
        **second,
    }
    page = folder / "index.html"
    storage.write_bytes(page, Template((ASSETS / "demo.html").read_text("utf-8")).substitute(values).encode())
    return page
