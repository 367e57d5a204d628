"""Train the twins of one preference on SmolLM2-135M-Instruct, save the vector, tell what the twins learned.

    python benchmarks/preference_training.py --name harmless --steps 40 --output vectors

The held-out figures are of prompts that neither twin has seen; beside them stands what length alone would tell.
"""

import time
from pathlib import Path

from common import arguments, header, quiet, save
from preference_data import pairs_of

from steerkit import PolicyConfig, PreferenceVector
from steerkit.demo import load_model


def settings(
    steps: int, learning_rate: float, max_length: int, data_seed: int = 42, full_weights: bool = False
) -> PolicyConfig:
    """Return how a policy of these benchmarks is trained."""
    return PolicyConfig(
        max_steps=steps,
        learning_rate=learning_rate,
        max_length=max_length,
        data_seed=data_seed,
        use_peft=not full_weights,
        held_out=0.15,
        bf16=False,
        disable_tqdm=True,
        save_steps=20,
        save_total_limit=1,
    )


def main() -> None:
    given = arguments(
        __doc__,
        name="helpful",
        steps=40,
        learning_rate=2e-4,
        max_length=160,
        data_seed=42,
        output="vectors",
        label="",
        full=0,
    )
    quiet()
    facts = header(given)
    model, tokenizer = load_model()
    pairs = pairs_of(given.name)
    config = settings(given.steps, given.learning_rate, given.max_length, given.data_seed, bool(given.full))
    label = given.label or given.name
    folder = Path(given.output)
    folder.mkdir(parents=True, exist_ok=True)
    wall, cpu = time.perf_counter(), time.process_time()
    vector = PreferenceVector.fit(
        given.name, model, tokenizer, pairs, config=config, output_dir=folder / f"{label}.runs"
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    vector.save(folder / f"{label}.safetensors")
    figures = {**facts, "label": label, "wall_s": wall, "cpu_s": cpu, "norm": vector.norm(), "made": dict(vector.made)}
    for side in ("towards", "away"):
        print(side, {k: round(v, 3) for k, v in vector.made[f"{side}_figures"].items()})
    print(
        f"cosine of twins {vector.made['cosine_of_twins']:.3f}, norms {vector.made['norms_of_twins']}, {cpu:.0f} CPU s"
    )
    save(given.json, figures)


if __name__ == "__main__":
    main()
