"""Where GAPO ends on bandits with exact gradients and a known front, over 100 random ones.

    python benchmarks/gapo_bandit.py --json benchmarks/results/gapo_bandit.json        (about 5 minutes of one core)

A softmax policy over arms; objective k is the mean of its reward less beta KL from the uniform policy, so that the front is
known in closed form: pi ~ exp(sum_k lambda_k R_k / beta) with lambda on the simplex. Rewards of the second objective have
five times the spread of those of the first, the third twice, as happens with reward models; they correlate negatively. All arms make the same number
of steps at a rate that falls to 0. Updates are rescaled as the trainer does by default (the weighted sum of the gradients'
lengths is that of the linear update), or to the length of the linear update.

Values are shares of what each objective alone can gain over the start. Intervals are 95 % bootstraps over bandits.

The second part compares fronts at equal training compute on a policy with a hidden layer, where mixing is not exact:
five trainings of P-GAPO, one a preference, against mixtures of the weights of two single-objective trainings that take the
same number of gradients together.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import arguments, header, quiet, save, table
from torch import Tensor

from steerkit import gapo_weights
from steerkit.gapo.front import Front

BETA = 0.3
SPREAD = (1.0, 5.0, 2.0)
PREFERENCES = (0.0, 0.25, 0.5, 0.75, 1.0)
Weigh = Callable[[Tensor], Tensor] | Tensor


def bandits(count: int, arms: int, objectives: int, seed: int) -> Tensor:
    """Return rewards `"bandit objective arm"`; objectives pull apart."""
    dice = torch.Generator().manual_seed(seed)
    rewards = torch.randn(count, objectives, arms, generator=dice, dtype=torch.float64)
    rewards = rewards - 0.25 * rewards.roll(1, dims=1)
    return rewards * torch.tensor(SPREAD[:objectives], dtype=torch.float64)[:, None]


def values(logits: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Return each objective `"bandit objective"` and its gradient `"bandit objective arm"`."""
    log_policy = logits.log_softmax(-1)
    policy = log_policy.exp()[:, None]
    score = rewards - BETA * (log_policy + np.log(logits.shape[-1]))[:, None]
    value = (policy * score).sum(-1)
    return value, policy * (score - value[..., None])


def combined(gradients: Tensor, weigh: Weigh, same_length: bool = False) -> Tensor:
    """Return the update `"bandit parameter"`, rescaled as the trainer does it.

    The weighted sum of the gradients' lengths is that of the linear update, or the update's own length is.
    """
    grams = gradients @ gradients.transpose(1, 2)
    weights = weigh if isinstance(weigh, Tensor) else torch.stack([weigh(gram) for gram in grams])
    update, plain = (weights[..., None] * gradients).sum(1), gradients.mean(1)
    norms = gradients.norm(dim=-1)
    lengths = (weights * norms).sum(1, keepdim=True)
    size = update.norm(dim=-1, keepdim=True)
    if same_length:
        factor = plain.norm(dim=-1, keepdim=True) / size.clamp(min=1e-300)
    else:
        factor = norms.mean(1, keepdim=True) / lengths.clamp(min=1e-300)
    return torch.where(size > 1e-6 * lengths, update * factor, 0.0)


def ascend(rewards: Tensor, weigh: Weigh, steps: int, rate: float, same_length: bool = False) -> Tensor:
    """Return the logits after training every bandit."""
    logits = torch.zeros(len(rewards), rewards.shape[-1], dtype=torch.float64)
    for step in range(steps):
        _, gradients = values(logits, rewards)
        logits = logits + rate * (1 - step / steps) * combined(gradients, weigh, same_length)
    return logits


def best(rewards: Tensor, shares: Tensor) -> Tensor:
    """Return the logits of the front's point for these shares."""
    return (shares[..., None] * rewards).sum(1) / BETA


def gains(logits: Tensor, rewards: Tensor) -> Tensor:
    """Return each objective's share of what it alone could gain, `"bandit objective"`."""
    start, _ = values(torch.zeros_like(logits), rewards)
    here, _ = values(logits, rewards)
    tops = torch.stack([values(rewards[:, k] / BETA, rewards)[0][:, k] for k in range(rewards.shape[1])], dim=1)
    return (here - start) / (tops - start)


def bootstrap(found: Any, seed: int) -> list[float]:
    """Return the mean and its 95 % interval."""
    found = np.asarray(found, dtype=float)
    picks = np.random.default_rng(seed).integers(len(found), size=(4000, len(found)))
    return [float(found.mean()), *(float(q) for q in np.quantile(found[picks].mean(1), [0.025, 0.975]))]


def shown(values_: list[float]) -> str:
    return "{:.3f} [{:.3f} {:.3f}]".format(*values_)


def volume(points: Tensor) -> float:
    """Return the hypervolume of shares above 0, which is the start."""
    return Front.of([str(k) for k in range(points.shape[1])], dict(enumerate(points.tolist()))).hypervolume(
        [0.0] * points.shape[1]
    )


def grid(objectives: int) -> list[list[float]]:
    """Return preferences: five for two objectives, the corners, edges and the middle for three."""
    if objectives == 2:
        return [[share, 1 - share] for share in PREFERENCES]
    corners = torch.eye(3).tolist()
    edges = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in itertools.combinations(corners, 2)]
    return [*corners, *edges, [1 / 3] * 3]


def endings(rewards: Tensor, steps: int, rate: float, seed: int) -> dict[str, Any]:
    """Return where every method ends."""
    objectives = rewards.shape[1]
    even = torch.full((objectives,), 1 / objectives, dtype=torch.float64)
    methods: dict[str, Weigh] = {
        "linear": lambda gram: even,
        "linear, rewards of unit deviation": 1 / rewards.std(-1),
        "MGDA (p = 0)": lambda gram: gapo_weights(gram, power=0),
        "GAPO p = 1": lambda gram: gapo_weights(gram, power=1),
        "GAPO p = 2": lambda gram: gapo_weights(gram, power=2),
    }
    dense = [torch.tensor(list(share), dtype=torch.float64) for share in simplex(objectives, 60)]
    front = torch.stack([gains(best(rewards, share.expand(len(rewards), -1)), rewards) for share in dense], dim=1)
    found: dict[str, Any] = {}
    arms = [(name, weigh, False) for name, weigh in methods.items()]
    arms += [
        (f"{name}, length of linear", weigh, True) for name, weigh in methods.items() if not name.startswith("linear")
    ]
    for name, weigh, same_length in arms:
        share = gains(ascend(rewards, weigh, steps, rate, same_length), rewards)
        found[name] = {
            "worst": bootstrap(share.amin(1), seed),
            "mean": bootstrap(share.mean(1), seed),
            "hypervolume": bootstrap([volume(point[None]) for point in share], seed),
            "objective gets worse": float((share < 0).any(1).double().mean()),
            # How much could be gained in every objective at once: 0 on the front.
            "from the front": bootstrap((front - share[:, None]).amin(-1).amax(1).clamp(min=0), seed),
            "each": [bootstrap(share[:, k], seed) for k in range(objectives)],
        }
    many = {
        "P-GAPO": lambda wanted: lambda gram: gapo_weights(gram, preference=wanted),
        "linear, one weight each": lambda wanted: lambda gram: torch.tensor(wanted, dtype=torch.float64),
    }
    for name, make in many.items():
        shares = torch.stack(
            [gains(ascend(rewards, make(wanted), steps, rate), rewards) for wanted in grid(objectives)], dim=1
        )
        first = shares[:, :5, 0] if objectives == 2 else shares[:, :3, 0]
        found[name] = {
            "hypervolume": bootstrap([volume(points) for points in shares], seed),
            "dominated": float(
                np.mean(
                    [np.mean(Front.of(["a"] * objectives, dict(enumerate(p.tolist()))).dominated()) for p in shares]
                )
            ),
            "in order of the preference": float((first.diff(dim=1) > 0).all(1).double().mean())
            if objectives == 2
            else None,
            "spacing": bootstrap(
                np.nan_to_num([Front.of(["a"] * objectives, dict(enumerate(p.tolist()))).spacing() for p in shares]),
                seed,
            ),
        }
    found["the front itself"] = {"hypervolume": bootstrap([volume(points) for points in front], seed)}
    return found


def simplex(objectives: int, steps: int) -> list[tuple[float, ...]]:
    """Return evenly spread shares."""
    if objectives == 2:
        return [(i / steps, 1 - i / steps) for i in range(steps + 1)]
    few = steps // 4
    return [(i / few, j / few, (few - i - j) / few) for i in range(few + 1) for j in range(few + 1 - i)]


class Net:
    """Policies with one hidden layer for many bandits at once: contexts share their weights, so objectives interact."""

    def __init__(self, count: int, contexts: int, arms: int, hidden: int, seed: int) -> None:
        dice = torch.Generator().manual_seed(seed)
        self.sizes = [(contexts, hidden), (hidden, arms)]
        self.start = torch.cat(
            [
                torch.randn(count, a * b, generator=dice, dtype=torch.float64) / np.sqrt(a)
                for a, b in self.sizes
            ],
            dim=1,
        )  # fmt: skip

    def log_policy(self, weights: Tensor) -> Tensor:
        """Return `"bandit context arm"`."""
        (a, b), (_, c) = self.sizes
        first = weights[:, : a * b].view(-1, a, b)
        second = weights[:, a * b :].view(-1, b, c)
        return (first.tanh() @ second).log_softmax(-1)

    def values(self, weights: Tensor, rewards: Tensor) -> Tensor:
        """Return `"bandit objective"`; KL is from the start."""
        log_policy, base = self.log_policy(weights), self.log_policy(self.start)
        score = rewards - BETA * (log_policy - base)[:, None]
        return (log_policy.exp()[:, None] * score).sum(-1).mean(-1)

    def train(self, rewards: Tensor, weigh: Weigh, steps: int, rate: float) -> Tensor:
        """Return the weights after ascent."""
        weights = self.start.clone()
        for step in range(steps):
            leaf = weights.clone().requires_grad_()
            found = self.values(leaf, rewards).sum(0)
            gradients = torch.stack([torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in found], dim=1)
            weights = weights + rate * (1 - step / steps) * combined(gradients, weigh)
        return weights


def fronts(count: int, steps: int, rate: float, seed: int) -> dict[str, Any]:
    """Compare fronts of two objectives at equal compute: mixtures of two vectors, and five trainings of P-GAPO."""
    contexts, arms = 8, 6
    dice = torch.Generator().manual_seed(seed + 1)
    rewards = torch.randn(count, 2, contexts, arms, generator=dice, dtype=torch.float64)
    rewards = rewards - 0.25 * rewards.flip(1)
    rewards = rewards * torch.tensor(SPREAD[:2], dtype=torch.float64)[:, None, None]
    net = Net(count, contexts, arms, 6, seed)
    preferences = grid(2)
    before = net.values(net.start, rewards)
    # A step of P-GAPO takes two gradients, so that five trainings of it pay for ten of one objective.
    single = [net.train(rewards, one_objective(k), len(preferences) * steps, rate) for k in range(2)]
    tops = torch.stack([net.values(single[k], rewards)[:, k] for k in range(2)], dim=1)

    def shares(weights: Tensor) -> Tensor:
        return (net.values(weights, rewards) - before) / (tops - before)

    mixed = {
        (a, b): shares(net.start + a * (single[0] - net.start) + b * (single[1] - net.start))
        for a, b in itertools.product((0.0, 0.25, 0.5, 0.75, 1.0), repeat=2)
    }
    line = torch.stack([mixed[a, b] for a, b in mixed if a + b == 1], dim=1)
    whole = torch.stack(list(mixed.values()), dim=1)
    trained = torch.stack(
        [
            shares(net.train(rewards, lambda gram, w=wanted: gapo_weights(gram, preference=w), steps, rate))
            for wanted in preferences
        ],
        dim=1,
    )
    found = {
        "P-GAPO, five trainings": trained,
        "mixtures of two vectors, five on the line": line,
        "mixtures of two vectors, 5 x 5": whole,
    }
    volumes = {name: np.array([volume(points) for points in each]) for name, each in found.items()}
    result: dict[str, Any] = {
        name: {"hypervolume": bootstrap(volumes[name], seed), "best worst": bootstrap(each.amin(-1).amax(1), seed)}
        for name, each in found.items()
    }
    base = volumes["P-GAPO, five trainings"]
    for name in list(found)[1:]:
        result[name]["hypervolume less P-GAPO's"] = bootstrap(volumes[name] - base, seed)
    return result


def one_objective(index: int) -> Weigh:
    """Return all weight on one objective."""
    return lambda gram: torch.eye(len(gram), dtype=torch.float64)[index]


def main() -> None:
    given = arguments(__doc__, bandits=100, arms=10, steps=1500, rate=0.3)
    quiet()
    found: dict[str, Any] = {**header(given), "settings": {k: getattr(given, k) for k in ("bandits", "arms", "steps")}}
    for objectives in (2, 3):
        ends = endings(bandits(given.bandits, given.arms, objectives, given.seed), given.steps, given.rate, given.seed)
        found[f"{objectives} objectives"] = ends
        print(f"{objectives} objectives")
        keys = ("worst", "mean", "hypervolume", "from the front", "spacing")
        table(
            [
                [name, *(shown(f[k]) if k in f else "" for k in keys), f.get("objective gets worse", "")]
                for name, f in ends.items()
            ],
            ["method", *keys, "gets worse"],
        )
    found["fronts"] = fronts(given.bandits, given.steps, given.rate, given.seed)
    keys = ("hypervolume", "best worst", "hypervolume less P-GAPO's")
    table([[name, *(shown(f[k]) if k in f else "" for k in keys)] for name, f in found["fronts"].items()], ["", *keys])
    save(given.json, found)


if __name__ == "__main__":
    main()
