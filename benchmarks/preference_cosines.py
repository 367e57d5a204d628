"""Cosines between saved preference vectors: between preferences, and between orders of the same data.

    python benchmarks/preference_cosines.py --vectors vectors --json benchmarks/results/preference_cosines.json

`vectors` is a folder that preference_training.py has filled: NAME for each preference, helpful-order1 and -order2 for
other values of --data-seed, and helpful-full-42, -1 and -2 with --full 1 --learning-rate 1e-5.
"""

import json
from pathlib import Path
from typing import Any

from common import arguments, header, quiet, save, table

from steerkit import load
from steerkit.preferences.vector import cosines

GROUPS = {
    "preferences": ("helpful", "harmless", "cautious"),
    "orders of the data, LoRA with one initial A": ("helpful", "helpful-order1", "helpful-order2"),
    "orders of the data, full weights": ("helpful-full-42", "helpful-full-1", "helpful-full-2"),
}


def main() -> None:
    given = arguments(__doc__, vectors="vectors")
    quiet()
    found: dict[str, Any] = {**header(given), "groups": {}}
    for group, names in GROUPS.items():
        vectors = [load(Path(given.vectors) / f"{name}.safetensors") for name in names]
        matrix = cosines(vectors)
        found["groups"][group] = {
            "names": names,
            "cosines": [[round(float(value), 4) for value in row] for row in matrix],
            "twins": [round(float(vector.made["cosine_of_twins"]), 4) for vector in vectors],
        }
        print(group)
        table(
            [[name, *(f"{float(v):.3f}" for v in row)] for name, row in zip(names, matrix, strict=True)], ["", *names]
        )
    for name in ("helpful-full-42", "helpful-full-1", "helpful-full-2"):
        made = load(Path(given.vectors) / f"{name}.safetensors").made
        found.setdefault("full", {})[name] = {
            side: {key: made[f"{side}_figures"][key] for key in ("accuracy", "length_only", "pairs", "steps")}
            for side in ("towards", "away")
        }
    print(json.dumps(found["full"], indent=1))
    save(given.json, found)


if __name__ == "__main__":
    main()
