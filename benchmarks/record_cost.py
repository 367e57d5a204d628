"""`steerkit.record` against `output_hidden_states=True`: CPU time and memory for the last token of every layer.

    python benchmarks/record_cost.py --json benchmarks/results/record_cost.json
    python benchmarks/record_cost.py --texts 100 --rounds 1                            (a quick look)

Each arm runs in a process of its own, in turn. The usual way runs the whole model on batches of 16 in the order given;
the floor runs the body on the batches that `record` makes and keeps nothing. A rise in memory is how much the process's
high-water mark grows after the model is loaded and warm. Texts join one to five shipped contrast texts.
"""

import contextlib
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import arguments, header, paired, quiet, save, table

from steerkit import record
from steerkit.activations import _batches, _pad, tokenise
from steerkit.demo import contrast_texts, load_model

USUAL, RECORD, FLOOR = "output_hidden_states", "steerkit.record", "body alone, same batches"


def mixed_texts(count, seed):
    chosen = random.Random(seed)
    sentences = [text for concept in ("sentiment", "formality") for side in contrast_texts(concept) for text in side]
    return [" ".join(chosen.sample(sentences, chosen.randint(1, 5))) for _ in range(count)]


def with_record(model, tokenizer, texts):
    states = record(model, tokenizer, texts)
    return [states[layer] for layer in states.layers]


@torch.no_grad()
def with_output_hidden_states(model, tokenizer, texts, size=16):
    tokenizer.padding_side = "right"
    parts = []
    for first in range(0, len(texts), size):
        batch = tokenizer(texts[first : first + size], return_tensors="pt", padding=True)
        hidden = model(**batch, output_hidden_states=True).hidden_states[1:]
        last = batch["attention_mask"].sum(dim=1) - 1
        parts.append(torch.stack([states[torch.arange(len(last)), last].float() for states in hidden]))
    return list(torch.cat(parts, dim=1))


@torch.no_grad()
def body_alone(model, tokenizer, texts):
    tokens = tokenise(tokenizer, texts)
    lengths = [len(ids) for ids in tokens]
    order = sorted(range(len(tokens)), key=lengths.__getitem__, reverse=True)
    for rows in _batches(order, lengths, None):
        ids, mask = _pad([tokens[i] for i in rows])
        model.model(input_ids=ids, attention_mask=mask, use_cache=False)


ARMS = {USUAL: with_output_hidden_states, RECORD: with_record, FLOOR: body_alone}


def one_arm(given):
    """Run one arm and print its figures as JSON: what the child processes do."""
    quiet()
    model, tokenizer = load_model(dtype=getattr(torch, given.dtype))
    texts = mixed_texts(given.texts, given.seed)
    ARMS[given.arm](model, tokenizer, texts[:1])
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: loading leaves a higher mark than running; forget it
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    states = ARMS[given.arm](model, tokenizer, texts)
    seconds = time.process_time() - begun
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    # The last entry of hidden_states is the state after the final norm, so the last layer does not compare.
    sample = [value for layer in (states or [])[:-1:4] for value in layer[::7, ::32].flatten().tolist()]
    print(json.dumps({"CPU s": seconds, "MiB": rise, "sample": sample}))


def child(arm, given):
    command = [sys.executable, __file__, "--arm", arm]
    for name in ("texts", "dtype", "seed", "threads"):
        command += [f"--{name}", str(getattr(given, name))]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main():
    given = arguments(__doc__, texts=1000, rounds=3, dtype="bfloat16", arm="")
    if given.arm:
        one_arm(given)
        return
    figures = header(given)
    quiet()
    _, tokenizer = load_model()
    lengths = [len(ids) for ids in tokenise(tokenizer, mixed_texts(given.texts, given.seed))]
    print(
        f"{given.texts} texts of {min(lengths)} to {max(lengths)} tokens (median {statistics.median(lengths)}), {given.dtype}\n"
    )
    runs = {name: [] for name in ARMS}
    for turn in range(given.rounds):
        names = list(ARMS)
        for name in names[turn % 3 :] + names[: turn % 3]:
            runs[name].append(child(name, given))
    usual, ours = (torch.tensor(runs[name][0]["sample"]) for name in (USUAL, RECORD))
    difference = float((usual - ours).abs().max() / usual.abs().max())
    figures |= {"texts": given.texts, "dtype": given.dtype, "largest difference between the two, relative": difference}
    seconds = {name: [run["CPU s"] for run in each] for name, each in runs.items()}
    shown = []
    for name, each in runs.items():
        ratio, rise = paired(seconds[name], seconds[USUAL]), [run["MiB"] for run in each]
        figures[name] = {"CPU s": seconds[name], "x output_hidden_states": ratio, "rise in memory, MiB": rise}
        middle = statistics.median(seconds[name])
        shown.append((name, f"{middle:.1f}", f"{given.texts / middle:.0f}", "{1:.3f} [{0:.3f} {2:.3f}]".format(*ratio),
                      f"{statistics.median(rise):.0f}"))  # fmt: skip
    table(shown, ("arm", "CPU s", "texts a CPU s", "x output_hidden_states", "memory rise, MiB"))
    print(f"largest difference between the two, relative to the largest value: {difference:.1e}")
    save(given.json, figures)


if __name__ == "__main__":
    main()
