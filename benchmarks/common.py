"""What every benchmark shares: the header that makes figures repeatable, interleaved timing, tables, JSON."""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Arms = Mapping[str, Callable[[], Any]]


def arguments(doc: str, **defaults: Any) -> argparse.Namespace:
    """Parse `--name value` for each default, `--name` for one that is False, and `--seed`, `--threads` and `--json`; set both."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {**defaults, "seed": 0, "threads": 1}.items():
        kind: dict[str, Any] = (
            {"action": "store_true"} if default is False else {"type": type(default), "default": default}
        )
        parser.add_argument(f"--{name.replace('_', '-')}", **kind)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    return given


def header(given: argparse.Namespace) -> dict[str, Any]:
    """Print and return what a reader needs to repeat a run."""
    packages = ("torch", "transformers", "scikit-learn", "numpy")
    facts = {
        "command": " ".join(["python", Path(sys.argv[0]).as_posix(), *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "torch threads": torch.get_num_threads(),
            "load": [round(load, 2) for load in os.getloadavg()],
        },
        "seed": given.seed,
    }
    for name, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name}: {text}")
    print(flush=True)
    return facts


def quiet() -> None:
    """Keep transformers' progress bars and warnings out of the tables, and paths out of other warnings."""
    from transformers.utils import logging

    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def interleave(arms: Arms, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Run all arms once a round in rotating order; return each one's CPU seconds by round.

    CPU time of the process stays fair when others share the cores, which wall time does not.
    """
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            before = time.process_time()
            arms[name]()
            if turn >= 0:
                seconds[name].append(time.process_time() - before)
    return seconds


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median, upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))  # type: ignore[return-value]


def paired(values: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Return the quartiles of the ratios round by round."""
    return spread([value / reference for value, reference in zip(values, base, strict=True)])


def table(rows: Sequence[Sequence[Any]], head: Sequence[str]) -> None:
    """Print rows in columns."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for i, row in enumerate(cells):
        print("  ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))))
        if i == 0:
            print("  ".join("-" * width for width in widths))
    print(flush=True)


def save(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write the figures, whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    text = re.sub(r"\[[^][{}]*\]", lambda flat: " ".join(flat.group().split()), json.dumps(figures, indent=1))
    part.write_text(text + "\n", "utf-8")
    part.replace(path)
