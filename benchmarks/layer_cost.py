"""Cost of one call of a steered layer, above a layer without hooks, against a bare hook `lambda m, a, o: o + v`.

    python benchmarks/layer_cost.py --json benchmarks/results/layer_cost.json

Thirty blocks return their input, so all that is timed is the mechanism. CPU time of one thread; arms take turns in
rotating order; a ratio is the median over rounds of (arm - no hooks) / (bare hook - no hooks), quartiles in brackets.
Targets: an addition at most 1.5 times a bare hook, a constraint at most 5 times.
"""

import statistics
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from common import arguments, header, interleave, save, spread, table
from torch import nn

from steerkit import Controller
from steerkit.intervention import Addition, Constraint

DEPTH, WIDTH = 30, 576
SHAPES = {"decode 1 x 1": (1, 1), "decode 32 x 1": (32, 1), "prefill 8 x 64": (8, 64)}


class Block(nn.Module):
    """A decoder block that does nothing."""

    def forward(self, hidden_states):
        return hidden_states


class Fake(nn.Module):
    """What a Controller asks of a model, and nothing else."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=DEPTH, is_encoder_decoder=False)
        self.embedding = nn.Embedding(100, WIDTH, dtype=dtype)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 100, bias=False, dtype=dtype)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def directions(seed):
    generator = torch.Generator().manual_seed(seed)
    return {layer: F.normalize(torch.randn(WIDTH, generator=generator), dim=0) for layer in range(DEPTH)}


def addition(name="added", positions="all", seed=1):
    return Addition(name, tuple(range(DEPTH)), positions, 0.1, None, directions(seed))


def constraint(name="bounded", positions="all", seed=2):
    """A bound that every state violates at every layer, so that the edit always runs."""
    u = directions(seed)
    return Constraint(
        name, tuple(range(DEPTH)), positions, 0.999, None,
        sense=1, weights=u, biases=dict.fromkeys(u, -20.0), directions=u,
    )  # fmt: skip


def plain(dtype=torch.float32):
    return Fake(dtype)


def bare_hook(dtype=torch.float32):
    model = Fake(dtype)
    vectors = [(0.1 * u).to(dtype) for u in directions(1).values()]
    for block, vector in zip(model.blocks, vectors, strict=True):
        block.register_forward_hook(lambda m, a, o, v=vector: o + v)
    return model


def empty_hook(dtype=torch.float32):
    model = Fake(dtype)
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, o: None)
    return model


def steered(interventions, rows, length, dtype=torch.float32, padded=False):
    """Return a model under an attached Controller that has just seen a forward pass of this shape."""
    model = Fake(dtype)
    control = Controller(model, interventions).attach()
    mask = torch.ones(rows, length, dtype=torch.long)
    if padded:
        mask[1::2, : length // 4] = 0
    with torch.no_grad():
        model(torch.ones(rows, length, dtype=torch.long), attention_mask=mask if padded else None)
    assert control._pass.plain is not padded, "not the path that this arm is meant to time"
    for each in interventions:
        if isinstance(each, Constraint):
            assert_active(model, each, rows, length, dtype)
    return model


def assert_active(model, bound, rows, length, dtype):
    """Each layer's bound moves the state that it gets, and holds on what the layer returns."""
    hidden = torch.randn(rows, length, WIDTH).to(dtype)
    wanted = float(torch.logit(torch.tensor(0.999, dtype=torch.float64)))
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            before, hidden = hidden[:, -1].float(), block(hidden)
            weight, bias = bound.weights[layer], bound.biases[layer]
            assert bool((before @ weight + bias < wanted).all())
            assert bool((hidden[:, -1].float() @ weight + bias > wanted - 0.3).all())


def arms_of(rows, length):
    """Return each arm's model and the arms that it is measured from and against."""
    bf16 = torch.bfloat16
    arms = {
        "no hooks": plain(),
        "hook that does nothing": empty_hook(),
        "bare hook": bare_hook(),
        "Addition": steered([addition()], rows, length),
        "Constraint": steered([constraint()], rows, length),
        "two Constraints": steered([constraint(), constraint("other", seed=3)], rows, length),
        "no hooks, bfloat16": plain(bf16),
        "bare hook, bfloat16": bare_hook(bf16),
        "Addition, bfloat16": steered([addition()], rows, length, bf16),
        "Constraint, bfloat16": steered([constraint()], rows, length, bf16),
    }
    if length > 1:
        arms["Addition, padded batch"] = steered([addition()], rows, length, padded=True)
        arms["Constraint at 'last', padded batch"] = steered([constraint(positions="last")], rows, length, padded=True)
        arms["Constraint at 'all', padded batch"] = steered([constraint()], rows, length, padded=True)
    return arms


def caller(model, rows, length, repeats):
    blocks, hidden = list(model.blocks), torch.randn(rows, length, WIDTH).to(model.embedding.weight.dtype)

    def call():
        with torch.no_grad():
            for _ in range(repeats):
                stream = hidden
                for block in blocks:
                    stream = block(stream)

    return call


def main():
    given = arguments(__doc__, rounds=25, repeats=20)
    figures = header(given)
    # A process that never freed a large block returns each prefill's megabyte to the system and takes it again, ten
    # times the cost of the edit. A process that has loaded a model does not.
    del [torch.empty(7_000_000)][0]
    for shape, (rows, length) in SHAPES.items():
        repeats = max(1, given.repeats // (1 if length == 1 else 5))
        arms = {name: caller(model, rows, length, repeats) for name, model in arms_of(rows, length).items()}
        seconds = interleave(arms, given.rounds, warmup=2)
        shown, figures[shape] = [], {}
        for name, values in seconds.items():
            suffix = ", bfloat16" if name.endswith("bfloat16") else ""
            base, bare = seconds["no hooks" + suffix], seconds["bare hook" + suffix]
            above = [1e6 * (v - b) / (repeats * DEPTH) for v, b in zip(values, base, strict=True)]
            ratio = spread([(v - b) / (h - b) for v, b, h in zip(values, base, bare, strict=True)])
            total = 1e6 * statistics.median(values) / (repeats * DEPTH)
            cost = statistics.median(above)
            figures[shape][name] = {"us a call": total, "us above no hooks": cost, "x bare hook": ratio}
            shown.append((name, f"{total:.2f}", f"{cost:.2f}", "{1:.2f} [{0:.2f} {2:.2f}]".format(*ratio)))
        print(f"{shape} x {WIDTH}")
        table(shown, ("arm", "us a call", "us above no hooks", "x bare hook"))
    save(given.json, figures)


if __name__ == "__main__":
    main()
