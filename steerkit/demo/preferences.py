"""The second part of the demo: twins are trained, and one batch gets another mixture of weights in every row."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from steerkit import plots
from steerkit.activations import record, tokenise
from steerkit.concepts.concept import Concept
from steerkit.controller import Controller
from steerkit.demo.embedded import image, perplexity, preference_pairs, until_end
from steerkit.intervention import Intervention
from steerkit.preferences.pairs import Pair, read_pairs, split
from steerkit.preferences.policy import PolicyConfig
from steerkit.preferences.vector import PreferenceVector, cosines
from steerkit.types import Text

MAGNITUDES = (-1.0, -0.5, 0.0, 0.5, 1.0)
PROMPTS = ("How do I get rid of ants in the kitchen?", "What should I cook tonight?")
BOUND = 0.95


@dataclass(frozen=True)
class Dose:
    """What a vector does to held-out pairs at each magnitude."""

    means: list[float]
    """Mean of `log pi(chosen) - log pi(rejected)`, less the same of the base model, in nats."""
    errors: list[float]
    """Standard errors of the means."""
    preferred: list[float]
    """Share of pairs for which it is above 0; the base model has none."""
    pairs: int


def preference_part(
    model: Any,
    tokenizer: Any,
    folder: Path,
    concept: Concept,
    *,
    new_tokens: int,
    seed: int,
    steps: int,
    full: bool,
) -> dict[str, str]:
    """Train the twins of one preference (`full`: of two), mix row by row with a concept's bound; return the HTML."""
    names = ("helpful", "cautious") if full else ("helpful",)
    chat = tokenizer.chat_template is not None
    config = PolicyConfig(max_steps=steps, learning_rate=5e-4, max_length=160, held_out=0.15, seed=seed)
    vectors, doses = [], []
    for name in names:
        pairs = read_pairs(preference_pairs(name, chat=chat))
        vector = PreferenceVector.fit(name, model, tokenizer, pairs, config=config)
        vector.save(folder / f"{name}.safetensors")
        vectors.append(vector)
        doses.append(dose_response(model, tokenizer, vector, split(pairs, config.held_out, config.seed)[1]))
    prompts = [p for p in PROMPTS for _ in range(2 * len(MAGNITUDES))]
    magnitudes = torch.tensor([*MAGNITUDES, *MAGNITUDES] * len(PROMPTS))
    bounds = torch.tensor(([0.0] * len(MAGNITUDES) + [BOUND] * len(MAGNITUDES)) * len(PROMPTS))
    both: list[Intervention] = [vectors[0].add(magnitudes), concept.constrain(at_least=bounds)]
    cells = _cells(model, tokenizer, concept, prompts, both, new_tokens)
    mixture = ""
    if full:
        steps_of = (-0.5, 0.5, 1.0)
        first, second = (torch.tensor(each) for each in zip(*((a, b) for a in steps_of for b in steps_of), strict=True))
        mixed = _cells(
            model,
            tokenizer,
            concept,
            [PROMPTS[0]] * len(first),
            [vectors[0].add(first), vectors[1].add(second)],
            new_tokens,
        )
        mixture = _mixture(steps_of, mixed, float(cosines(vectors)[0, 1]))
    return {
        "vectors": "".join(_row(vector, dose) for vector, dose in zip(vectors, doses, strict=True)),
        "dose": image(
            plots.dose_response(
                MAGNITUDES,
                {vector.name: (dose.means, dose.errors) for vector, dose in zip(vectors, doses, strict=True)},
                "nats in favour of the chosen answer",
            )
        ),
        "dose_pairs": str(doses[0].pairs),
        "preferred": ", ".join(f"{p:.2f} at {m:g}" for m, p in zip(MAGNITUDES, doses[0].preferred, strict=True)),
        "grid": _grid(cells),
        "grid_bound": f"{concept.name} at least {BOUND:g}",
        "mixture": mixture,
    }


def dose_response(model: Any, tokenizer: Any, vector: PreferenceVector, pairs: Sequence[Pair]) -> Dose:
    """Measure a vector on pairs that its twins have not seen: one pass a pair, each magnitude in rows of its own."""
    count = len(MAGNITUDES)
    magnitudes = torch.tensor([m for m in MAGNITUDES for _ in range(2)])
    gains = torch.empty(len(pairs), count)
    base = MAGNITUDES.index(0.0)
    for index, pair in enumerate(tqdm(pairs, desc="dose response", unit="pair")):
        ids, mask, answer = _answers(tokenizer, pair)
        with torch.no_grad(), Controller(model, [vector.add(magnitudes)]):
            logits = model(
                input_ids=ids.repeat(count, 1).to(model.device), attention_mask=mask.repeat(count, 1).to(model.device)
            ).logits
        said = logits[:, :-1].float().log_softmax(-1).gather(-1, ids.repeat(count, 1)[:, 1:, None].to(model.device))
        chosen, rejected = (said[..., 0].cpu() * answer.repeat(count, 1)[:, 1:]).sum(-1).view(count, 2).unbind(1)
        gains[index] = chosen - rejected
    gains = gains - gains[:, base : base + 1]
    return Dose(
        means=gains.mean(0).tolist(),
        errors=(gains.std(0) / math.sqrt(len(pairs))).tolist(),
        preferred=(gains > 0).float().mean(0).tolist(),
        pairs=len(pairs),
    )


def _answers(tokenizer: Any, pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask and which tokens are the answer's, `"answer pos"`, for chosen and rejected."""
    prompt = pair["prompt"]
    whole = [prompt + pair[side] for side in ("chosen", "rejected")]
    start, *rows = tokenise(tokenizer, [prompt, *whole])
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    shared = min(next((i for i, (a, b) in enumerate(zip(start, row)) if a != b), len(start)) for row in rows)
    return ids, mask, mask * (torch.arange(width) >= shared)


def _cells(
    model: Any,
    tokenizer: Any,
    concept: Concept,
    prompts: Sequence[str],
    interventions: list[Intervention],
    new_tokens: int,
) -> list[str]:
    """Generate one greedy batch and return each row's text with what the concept's probe reads of it, as HTML."""
    chat = tokenizer.chat_template is not None
    asked: list[Text] = [[{"role": "user", "content": p}] if chat else p for p in prompts]
    tokens = tokenise(tokenizer, asked)
    width = max(map(len, tokens))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in tokens], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in tokens], device=model.device)
    with Controller(model, interventions):
        rows = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    new = [until_end(row[width:], tokenizer) for row in rows]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in new]
    states = record(model, tokenizer, [text.strip() or "." for text in texts], layers=concept.best_layer)
    read = concept[concept.best_layer].probability(states[concept.best_layer]).tolist()
    cost = perplexity(model, tokenizer, asked, new)
    return [
        f"<td>{html.escape(text)}<small>{concept.name} {p:.2f} · perplexity {c:.0f}</small></td>"
        for text, p, c in zip(texts, read, cost, strict=True)
    ]


def _grid(cells: Sequence[str]) -> str:
    """Return the table of one prompt after the other: a row a magnitude, without and with the bound."""
    count, lines = len(MAGNITUDES), []
    for index, prompt in enumerate(PROMPTS):
        lines.append(f"<tr><th colspan=3>{html.escape(prompt)}</th></tr>")
        here = cells[2 * count * index : 2 * count * (index + 1)]
        lines += [f"<tr><td class=n>{m:g}</td>{here[i]}{here[count + i]}</tr>" for i, m in enumerate(MAGNITUDES)]
    return "".join(lines)


def _mixture(magnitudes: Sequence[float], cells: Sequence[str], cosine: float) -> str:
    head = "".join(f"<th>cautious {m:g}</th>" for m in magnitudes)
    count = len(magnitudes)
    rows = "".join(
        f"<tr><td class=n>helpful {m:g}</td>{''.join(cells[count * i : count * (i + 1)])}</tr>"
        for i, m in enumerate(magnitudes)
    )
    return (
        f"<h3>Two vectors in one batch</h3><p>Nine mixtures for “{html.escape(PROMPTS[0])}”. Cosine of the vectors: "
        f"{cosine:.2f}.</p><table><tr><th></th>{head}</tr>{rows}</table>"
    )


def _row(vector: PreferenceVector, dose: Dose) -> str:
    made = vector.made
    figures = made["towards_figures"]
    return (
        f"<tr><th>{vector.name}</th><td>{made['pairs']}</td><td>{figures['steps']}</td>"
        f"<td>{figures['accuracy']:.2f} <small>of {figures['pairs']}</small></td><td>{figures['length_only']:.2f}</td>"
        f"<td>{made['cosine_of_twins']:.2f}</td><td>{vector.rank}</td><td>{vector.norm():.2f}</td></tr>"
    )
