"""How exactly bounds are met, and how much shorter an edit could be.

    python benchmarks/exactness.py --json benchmarks/results/exactness.json

1. Every tiny architecture of tests/tiny.py, float32 and bfloat16, one to three bounds (probabilities from 1e-6 to
   1 - 1e-6) at each of its four layers, padded batches and the single-token passes of decoding: what a probe reads off
   the block's output against its bound. Which bounds are active is recovered from the edit itself, by least squares.
   The error is also given as a share of what rounding the output to its own dtype can do to the logit.
2. Random problems of one to six bounds: the edit's squared length against quadprog's, in the Euclidean metric
   (direction w) and the Mahalanobis one (direction Sigma w), and what is left of the bounds.
3. The naive sum of single-concept edits on the same problems: by how many logits it misses the bounds.
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import quadprog
import torch
import torch.nn.functional as F
from common import arguments, header, quiet, save, table

from steerkit import Controller, SteerkitError
from steerkit.intervention import Constraint
from steerkit.maths.minimal_edit import minimal_edit
from steerkit.model import find_decoder, hidden_states_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tiny import MODELS, VOCABULARY, tiny_model

ACTIVE = 0.02  # as a share of the largest multiplier that the dtype's rounding cannot fake


def random_bounds(count, layers, width, rng):
    """Return bounds whose probes share half of their direction, with a moving direction of their own each."""
    shared = torch.randn(width, generator=rng)
    bounds = []
    for index in range(count):
        weights = {layer: F.normalize(shared + torch.randn(width, generator=rng), dim=0) for layer in layers}
        sense = 1 if torch.rand((), generator=rng) < 0.5 else -1
        logit = 27.6 * torch.rand((), generator=rng, dtype=torch.float64) - 13.8
        bounds.append(
            Constraint(f"bound_{index}", layers, "all", float(torch.sigmoid(logit)), None, sense=sense,
                       weights=weights, biases=dict.fromkeys(layers, 0.5), directions=weights)
        )  # fmt: skip
    return bounds


def read_block_outputs(model, bounds, ids, mask):
    """Return each layer's output before and after the edits, as hooks on either side of the Controller's see it."""
    blocks = find_decoder(model).blocks
    before, after, handles = {}, {}, []

    def keep(store, layer):
        def hook(module, args, output):
            store[layer] = hidden_states_of(output).detach().clone()

        return hook

    handles += [block.register_forward_hook(keep(before, layer)) for layer, block in enumerate(blocks)]
    control = Controller(model, bounds).attach()
    handles += [block.register_forward_hook(keep(after, layer)) for layer, block in enumerate(blocks)]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    short = control._pass.plain
    control.detach()
    for handle in handles:
        handle.remove()
    return before, after, short


def errors_at(layer, bounds, before, after, real):
    """Return what the probes read against their bounds at one layer: errors of active ones, misses of any."""
    old, new = before[layer][real].double(), after[layer][real].double()
    weight = torch.stack([bound.weights[layer] for bound in bounds]).double()
    sense = torch.tensor([float(bound.sense) for bound in bounds], dtype=torch.float64)
    logit = torch.tensor([float(bound.read(bound.amount).values[0, 0]) for bound in bounds], dtype=torch.float64)
    slack = sense * (new @ weight.T + 0.5 - logit)
    multipliers = sense * torch.linalg.lstsq(weight.T, (new - old).T).solution.T
    noise = new.norm(dim=-1, keepdim=True) * torch.finfo(before[layer].dtype).eps
    active = multipliers > torch.maximum(ACTIVE * multipliers.amax(dim=-1, keepdim=True), 4 * noise)
    allowed = torch.finfo(before[layer].dtype).eps / 2 * new.abs() @ weight.abs().T
    untouched = (sense * (old @ weight.T + 0.5 - logit) > 1e-4).all(dim=-1)
    changed = (old[untouched] != new[untouched]).any(dim=-1).sum()
    return {
        "error": slack.abs()[active],
        "miss": (-slack).clamp(min=0).flatten(),
        "rounding": (slack.abs() / allowed)[active],
        "norm": new.norm(dim=-1),
        "within": untouched.sum()[None],
        "changed": changed[None],
    }


def architectures(trials, seed):
    worst = {}
    for name in MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            found = defaultdict(list)
            for trial in range(trials):
                rng = torch.Generator().manual_seed(seed + trial)
                model = tiny_model(name).to(dtype)
                try:
                    decoder = find_decoder(model)
                except SteerkitError as error:
                    worst[name] = f"refused: {error}"
                    break
                bounds = random_bounds(1 + trial // 2 % 3, tuple(range(decoder.depth)), decoder.d_model, rng)
                length = 1 if trial % 2 else 12
                ids = torch.randint(3, VOCABULARY, (4, length), generator=rng)
                mask = torch.ones_like(ids)
                if length > 1:
                    mask[1, :3] = mask[2, :7] = 0
                before, after, short = read_block_outputs(model, bounds, ids, mask if length > 1 else None)
                found["short"].append(torch.tensor([short]))
                for layer in before:
                    assert torch.equal(before[layer][mask == 0], after[layer][mask == 0]), "padding was edited"
                    for key, values in errors_at(layer, bounds, before, after, mask.bool()).items():
                        found[key].append(values)
            else:
                of = {key: torch.cat(values) for key, values in found.items()}
                worst[f"{name}, {str(dtype).removeprefix('torch.')}"] = {
                    "active bounds": len(of["error"]),
                    "worst error, logits": float(of["error"].max()),
                    "median error, logits": float(of["error"].median()),
                    "worst miss of any bound, logits": float(of["miss"].max()),
                    "worst error / rounding": float(of["rounding"].max()),
                    "median norm": float(of["norm"].median()),
                    "rows within all bounds": int(of["within"].sum()),
                    "of them changed": int(of["changed"].sum()),
                    "passes in the short form": int(of["short"].sum()),
                }
    return worst


def random_problem(rng, width):
    count = int(rng.integers(1, 7))
    weight = rng.normal(size=(count, width)) + rng.normal() * rng.normal(size=width)
    weight *= rng.uniform(0.2, 3, size=(count, 1)) / np.sqrt(width)
    basis = np.linalg.qr(rng.normal(size=(width, width)))[0]
    covariance = basis * np.geomspace(1, 1e-3, width) @ basis.T
    sense = rng.choice([-1.0, 1.0], size=count)
    logit = rng.uniform(-13.8, 13.8, size=count)
    return weight, rng.normal(size=count), sense, logit, covariance, 3 * rng.normal(size=width)


def problems(count, width, seed, dtype):
    """Hold the closed form against quadprog in both metrics, and the naive sum against the bounds."""
    rng = np.random.default_rng(seed)
    found, naive = defaultdict(list), defaultdict(list)
    for _ in range(count):
        weight, bias, sense, logit, covariance, hidden = random_problem(rng, width)
        tensors = [torch.tensor(v, dtype=dtype) for v in (hidden, weight, bias, logit, sense)]
        hidden, weight, bias, logit = (t.double().numpy() for t in tensors[:4])
        violation = sense * (logit - bias - weight @ hidden)
        for metric in ("Euclidean", "Mahalanobis"):
            moving = weight if metric == "Euclidean" else weight @ covariance
            edit = minimal_edit(*tensors, torch.tensor(moving, dtype=dtype)).double().numpy()
            inverse = np.eye(width) if metric == "Euclidean" else np.linalg.inv(covariance)
            inverse = (inverse + inverse.T) / 2
            rows = sense[:, None] * weight
            best = quadprog.solve_qp(inverse, np.zeros(width), rows.T, violation)[0]
            short, ours = best @ inverse @ best, edit @ inverse @ edit
            if short > 1e-9:
                found[metric, "excess"].append((ours - short) / short)
            elif ours > 0:
                found[metric, "excess"].append(np.inf)
            found[metric, "miss"].append(max(0.0, (violation - rows @ edit).max()))
            gains = np.einsum("kd,kd->k", weight, moving)
            single = (sense * violation.clip(min=0) / gains) @ moving
            if len(weight) > 1:
                naive[metric].append(max(0.0, (violation - rows @ single).max()))
    return found, naive


def main():
    given = arguments(__doc__, trials=12, problems=1000, width=64)
    figures = header(given)
    quiet()
    figures["architectures"] = architectures(given.trials, given.seed)
    head = next(list(f) for f in figures["architectures"].values() if isinstance(f, dict))
    rows = [
        (name, *(f"{v:.1e}" if isinstance(v, float) else v for v in f.values())) if isinstance(f, dict)
        else (name, f, *[""] * (len(head) - 1))
        for name, f in figures["architectures"].items()
    ]  # fmt: skip
    table(rows, ("architecture", *head))

    for dtype in (torch.float32, torch.float64):
        found, naive = problems(given.problems, given.width, given.seed, dtype)
        name = str(dtype).removeprefix("torch.")
        figures[name] = {
            metric: {
                "worst excess of the squared length": max(found[metric, "excess"]),
                "least (negative: shorter, by rounding)": min(found[metric, "excess"]),
                "worst miss, logits": max(found[metric, "miss"]),
                "naive sum: problems that it misses": float(np.mean(np.array(naive[metric]) > 1e-3)),
                "naive sum: median miss, logits": float(np.median(naive[metric])),
                "naive sum: worst miss, logits": max(naive[metric]),
            }
            for metric in ("Euclidean", "Mahalanobis")
        }
        print(
            f"{given.problems} random problems of 1 to 6 bounds, width {given.width}, {name}; naive sum: those of 2 to 6"
        )
        table([(metric, *(f"{v:.2g}" for v in f.values())) for metric, f in figures[name].items()],
              ("metric", *figures[name]["Euclidean"]))  # fmt: skip
    save(given.json, figures)


if __name__ == "__main__":
    main()
