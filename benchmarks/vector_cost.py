"""What a preference vector costs: mixtures by row, folding, training.

    python benchmarks/vector_cost.py --json benchmarks/results/vector_cost.json

Mixtures: one linear module, a batch of 16 rows, 4 vectors of twins of rank 16 (rank 32 each, 128 stacked), another
mixture in every row, with the whole hook that a Controller puts on; beside it the linear module with two bare products of
the stacked rank, vectors compressed to half their rank, and one merge for each row. Fold: writing a vector into the
weights of SmolLM2-135M-Instruct and undoing it, beside copies of the same bytes. Training: both twins by `fit` beside two
runs of TRL's DPO trainer with its own defaults, same adapter, rows and steps. CPU seconds of one thread, arms interleaved.
"""

import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from common import arguments, header, interleave, quiet, save, spread, table
from torch import nn

from steerkit import Controller, PreferenceVector
from steerkit.demo import load_model, preference_pairs
from steerkit.hooks import Moment
from steerkit.intervention import Site
from steerkit.maths.lowrank import LowRank
from steerkit.model import Fingerprint, find_decoder
from steerkit.preferences.pairs import read_pairs
from steerkit.sites import LinearHook, Pass

ROWS, VECTORS, RANK = 16, 4, 32


def mixtures(inputs: int, outputs: int, rounds: int, repeat: int) -> dict[str, Any]:
    """Time one linear module with another mixture in each row."""
    linear, x = nn.Linear(inputs, outputs, bias=False), torch.randn(ROWS, 1, inputs)
    amounts = [torch.randn(ROWS) for _ in range(VECTORS)]
    made = [
        PreferenceVector(
            f"v{i}",
            {"layers.0.m.weight": LowRank(0.01 * torch.randn(outputs, RANK), 0.01 * torch.randn(RANK, inputs))},
        )
        for i in range(VECTORS)
    ]
    current = Pass(recording=False)
    current.moment, current.whole = Moment(ROWS, 1, 0, x.device, None, None), True

    def hooked(vectors: list[PreferenceVector]) -> nn.Linear:
        module = nn.Linear(inputs, outputs, bias=False)
        module.weight = linear.weight
        edits = [v.add(a) for v, a in zip(vectors, amounts, strict=True)]
        hook = LinearHook(current, Site(0, "layers.0.m", True), edits)
        for index, each in enumerate(edits):
            hook.write(index, each.read(each.amount).values[:, 0], ROWS)
        hook.prepare(module)
        module.register_forward_hook(hook)
        return module

    whole, half = hooked(made), hooked([v.compress(rank=RANK // 2) for v in made])
    down, up = torch.randn(inputs, VECTORS * RANK), torch.randn(VECTORS * RANK, outputs)

    def bare() -> Any:
        return linear(x), (x @ down) @ up

    def merged() -> None:
        for row in range(ROWS):
            weight = linear.weight.clone()
            for v, a in zip(made, amounts, strict=True):
                delta = v.deltas["layers.0.m.weight"]
                weight.addmm_(delta.left, delta.right, alpha=float(a[row]))  # type: ignore[union-attr]
            x[row] @ weight.T

    arms = {"linear": lambda: linear(x), "bare": bare, "hook": lambda: whole(x), "half rank": lambda: half(x)}
    with torch.inference_mode():
        expected = linear(x) + sum(
            a[:, None, None] * (x @ (v.deltas["layers.0.m.weight"].left @ v.deltas["layers.0.m.weight"].right).T)  # type: ignore[union-attr]
            for v, a in zip(made, amounts, strict=True)
        )
        assert torch.allclose(whole(x), expected, atol=1e-3)
        repeated = {name: (lambda arm=arm: [arm() for _ in range(repeat)]) for name, arm in arms.items()}
        seconds = {name: [s / repeat for s in each] for name, each in interleave(repeated, rounds).items()}
        seconds["merge a row"] = interleave({"merge": merged}, 3)["merge"]
    return {name: statistics.median(each) for name, each in seconds.items()} | {
        "hook / bare": spread([h / b for h, b in zip(seconds["hook"], seconds["bare"], strict=True)])
    }


def random_vector(model: Any, rank: int, dense: bool) -> PreferenceVector:
    """Return a random change of every linear weight in the blocks."""
    decoder = find_decoder(model)
    deltas: dict[str, Any] = {}
    for name in decoder.reachable:
        rows, columns = decoder.shapes[name]
        factors = LowRank(0.01 * torch.randn(rows, rank), 0.01 * torch.randn(rank, columns))
        deltas[name] = factors.left @ factors.right if dense else factors
    return PreferenceVector("random", deltas, Fingerprint.of(model))


def folding(rounds: int) -> dict[str, Any]:
    """Time attach and detach with fold=True beside copies of the bytes that change."""
    model, _ = load_model()
    found: dict[str, Any] = {}
    for kind, dense in (("low rank", False), ("dense", True)):
        vector = random_vector(model, RANK, dense)
        control = Controller(model, [vector.add(0.7)], fold=True)
        parameters = [find_decoder(model).parameters[name].detach() for name in vector.deltas]
        kept = [p.clone() for p in parameters]

        def cycle(control: Controller = control) -> None:
            control.attach().detach()

        def copy(parameters: Any = parameters, kept: Any = kept) -> None:
            for p, k in zip(parameters, kept, strict=True):
                k.copy_(p)

        arms = {"fold and undo": cycle, "copy": copy, "clone": lambda ps=parameters: [p.clone() for p in ps]}
        seconds = interleave(arms, rounds)
        found[kind] = {name: statistics.median(each) for name, each in seconds.items()}
        found[kind]["bytes"] = sum(p.numel() * p.element_size() for p in parameters)
    return found


def training(steps: int, epochs: int) -> dict[str, Any]:
    """Time both twins, and two runs of TRL with its defaults."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    from steerkit import PolicyConfig
    from steerkit.preferences.pairs import swapped

    pairs = read_pairs(preference_pairs("helpful"))[: 4 * steps // epochs]

    def ours() -> None:
        model, tokenizer = load_model()
        config = PolicyConfig(max_steps=steps, max_length=160, held_out=0.0, disable_tqdm=True)
        PreferenceVector.fit("helpful", model, tokenizer, pairs, config=config)

    def theirs() -> None:
        for rows in (pairs, swapped(pairs)):
            model, tokenizer = load_model()
            args = DPOConfig(
                output_dir=scratch,
                max_steps=steps,
                max_length=160,
                learning_rate=2e-4,
                per_device_train_batch_size=4,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            DPOTrainer(
                model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
            ).train()

    seconds: dict[str, float] = {}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("ignore")
        for name, arm in (("fit", ours), ("two TRL runs", theirs)):
            start = time.process_time()
            arm()
            seconds[name] = time.process_time() - start
    return {**seconds, "steps": steps, "epochs": epochs, "ratio": seconds["fit"] / seconds["two TRL runs"]}


def main() -> None:
    given = arguments(__doc__, rounds=15, steps=20, epochs=2, part="all")
    quiet()
    facts = header(given)
    found: dict[str, Any] = dict(facts)
    if given.part in ("all", "mixtures"):
        shapes = ((576, 576, 200), (576, 1536, 100), (4096, 4096, 5))
        found["mixtures"] = {f"{i} x {o}": mixtures(i, o, given.rounds, n) for i, o, n in shapes}
        rows = [
            [
                shape,
                *(f"{1e6 * f[k]:.0f}" for k in ("linear", "bare", "hook", "half rank", "merge a row")),
                "{1:.2f} [{0:.2f} {2:.2f}]".format(*f["hook / bare"]),
            ]
            for shape, f in found["mixtures"].items()
        ]
        table(rows, ["shape", "linear", "bare", "hook", "half rank", "merge a row (us)", "hook / bare"])
    if given.part in ("all", "fold"):
        found["fold"] = folding(given.rounds)
        table(
            [
                [
                    k,
                    *(f"{1e3 * f[n]:.0f}" for n in ("fold and undo", "copy", "clone")),
                    f"{f['fold and undo'] / f['clone']:.2f}",
                ]
                for k, f in found["fold"].items()
            ],
            ["fold (ms)", "fold and undo", "copy", "clone", "/ clone"],
        )
    if given.part in ("all", "training"):
        found["training"] = training(given.steps, given.epochs)
        print(found["training"])
    save(given.json, found)


if __name__ == "__main__":
    main()
