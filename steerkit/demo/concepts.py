"""The first part of the demo: two concepts, one batch, and what every row really received."""

import html
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from steerkit import plots, storage
from steerkit.activations import record
from steerkit.concepts.concept import Concept
from steerkit.controller import Controller
from steerkit.demo.embedded import contrast_texts, image, perplexity, png, until_end
from steerkit.intervention import Intervention

PROMPTS = (
    "My stay at the small hotel by the lake was",
    "What a wonderful evening it was! After dinner we",
    "The train was two hours late again, and the staff",
    "I have read the first chapter of the book, and",
    "To whom it may concern, I am writing because",
    "hey, so about the party on saturday, i",
    "The new phone arrived this morning and it",
    "Our neighbours have a dog, and in the mornings",
)
"""Some say already what the bounds ask for, some the opposite, some nothing."""


@dataclass(frozen=True)
class Part:
    """One part of the page: what was fitted, and its pieces of HTML by name."""

    concepts: list[Concept]
    values: dict[str, str]


@dataclass(frozen=True)
class Run:
    """One batch of the demo: what was asked for and what came out."""

    title: str
    request: str
    texts: list[str]
    perplexity: list[float]
    readings: dict[str, list[float]]
    """What each concept's probe reads of the finished text under the unsteered model."""
    magnitudes: dict[str, dict[int, Tensor]]
    tokens: list[list[str]]
    """The edited positions: the last prompt token and the new ones."""
    dose: list[float]
    """Mean magnitude a row, layer and token, as a share of the residual norm, over all concepts."""


def concept_part(model: Any, tokenizer: Any, folder: Path, *, new_tokens: int, seed: int) -> Part:
    """Fit two concepts, steer one batch three ways; write the concepts into the folder."""
    concepts = []
    for name in ("sentiment", "formality"):
        positive, negative = contrast_texts(name)
        concept = Concept.fit(name, model, tokenizer, positive=positive, negative=negative, seed=seed, progress=True)
        concepts.append(concept)
    sentiment, formality = concepts
    layers = sentiment.steering_layers
    ladder = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 0.999])
    plans: list[tuple[str, str, list[Intervention]]] = [
        ("Unsteered", "model.generate(**batch)", []),
        (
            "One bound for all",
            "sentiment.constrain(at_least=0.99)",
            [sentiment.constrain(at_least=0.99)],
        ),
        (
            "Two concepts at once",
            "[sentiment.constrain(at_most=0.01),\n                        formality.constrain(at_most=0.05, layers=sentiment.steering_layers)]",
            [sentiment.constrain(at_most=0.01), formality.constrain(at_most=0.05, layers=layers)],
        ),
    ]
    shown = list(PROMPTS)
    bar = tqdm(total=len(plans) + 1, desc="generating", unit="batch")
    runs = []
    for title, request, interventions in plans:
        runs.append(_generate(model, tokenizer, concepts, shown, title, request, interventions, new_tokens, seed))
        bar.update()
    band: list[Intervention] = [sentiment.constrain(at_least=ladder)]
    same = [PROMPTS[2]] * len(ladder)
    request = f"sentiment.constrain(at_least=tensor({[round(float(p), 3) for p in ladder]}))"
    each = _generate(model, tokenizer, concepts, same, "A different bound for each", request, band, new_tokens, None)
    bar.update()
    bar.close()
    for concept in concepts:
        concept.save(folder / f"{concept.name}.safetensors")
    storage.write_bytes(folder / "magnitudes.png", png(_heat_map(runs[1], sentiment)))
    return Part(concepts, _values(concepts, runs, each, ladder.tolist()))


def _generate(
    model: Any,
    tokenizer: Any,
    concepts: Sequence[Concept],
    prompts: Sequence[str],
    title: str,
    request: str,
    interventions: list[Intervention],
    new_tokens: int,
    seed: int | None,
) -> Run:
    """Run one batch and measure it; sampled from `seed`, or greedy without one."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    width = batch.input_ids.shape[1]
    control = Controller(model, interventions, record_magnitudes=True) if interventions else None
    sampling: dict[str, Any] = {"do_sample": False}
    if seed is not None:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": 0.7}
    with control or nullcontext():
        rows = model.generate(**batch, max_new_tokens=new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    new = [until_end(row[width:], tokenizer) for row in rows]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in new]
    states = record(
        model, tokenizer, [p + t for p, t in zip(prompts, texts, strict=True)], layers=[c.best_layer for c in concepts]
    )
    magnitudes = {} if control is None else control.magnitudes
    kept = {name: {layer: m[:, width - 1 :] for layer, m in by_layer.items()} for name, by_layer in magnitudes.items()}
    by_name = {concept.name: concept for concept in concepts}
    dose = [
        sum(
            float(m[row, : len(new[row])].abs().mean()) / by_name[name].norms[layer] / len(by_layer)
            for name, by_layer in kept.items()
            for layer, m in by_layer.items()
        )
        for row in range(len(prompts))
    ]
    return Run(
        title=title,
        request=request,
        texts=texts,
        perplexity=perplexity(model, tokenizer, prompts, new),
        readings={c.name: c[c.best_layer].probability(states[c.best_layer]).tolist() for c in concepts},
        magnitudes=kept,
        tokens=[
            [tokenizer.decode([token]).strip() or "·" for token in (batch.input_ids[row, -1], *new[row][:-1])]
            for row in range(len(prompts))
        ],
        dose=dose,
    )


def _untouched(one: Run) -> float:
    """Return the share of (row, token, layer) cells that met the bound as they were."""
    cells = torch.cat(
        [
            m[row, : len(tokens)]
            for by_layer in one.magnitudes.values()
            for m in by_layer.values()
            for row, tokens in enumerate(one.tokens)
        ]
    )
    return float((cells == 0).float().mean())


def _values(concepts: Sequence[Concept], runs: Sequence[Run], each: Run, ladder: Sequence[float]) -> dict[str, str]:
    plain, up, both = runs
    sentiment = concepts[0]
    short = [prompt if len(prompt) < 30 else prompt[:28] + "…" for prompt in PROMPTS]
    figures = {
        "accuracy": plots.accuracy_by_layer(concepts),
        "heat": _heat_map(up, sentiment),
        "up": plots.readings(
            {"sentiment": plain.readings["sentiment"]}, {"sentiment": up.readings["sentiment"]}, short
        ),
        "both": plots.readings(plain.readings, both.readings, short),
    }
    lines = [
        f"<tr><th>{html.escape(c.name)}</th><td>{c.made['positive']} + {c.made['negative']}</td>"
        f"<td>{c.best_layer}</td><td>{_interval(c.figures[c.best_layer].accuracy, c.figures[c.best_layer].accuracy_interval)}</td>"
        f"<td>{_interval(c.figures[c.best_layer].auc, c.figures[c.best_layer].auc_interval)}</td>"
        f"<td>{c.calibration_error[c.best_layer]:.2f}</td><td>{_ranges(c.steering_layers)}</td></tr>"
        for c in concepts
    ]
    return {
        "concepts": "".join(lines),
        "up_request": html.escape(up.request),
        "both_request": html.escape(both.request),
        "each_request": html.escape(each.request),
        "untouched": f"{100 * _untouched(up):.0f}",
        "up_table": _side_by_side(plain, up, PROMPTS),
        "both_table": _side_by_side(plain, both, PROMPTS),
        "each_prompt": html.escape(PROMPTS[2]),
        "each_table": _ladder(each, ladder),
        **{name: image(figure) for name, figure in figures.items()},
    }


def _heat_map(one: Run, concept: Concept) -> Any:
    rows = [
        {layer: m[row, : len(one.tokens[row])] for layer, m in one.magnitudes[concept.name].items()}
        for row in range(len(PROMPTS))
    ]
    return plots.magnitudes_by_token(rows, one.tokens, concept.norms, PROMPTS)


def _interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.2f} <small>[{interval[0]:.2f}, {interval[1]:.2f}]</small>"


def _ranges(layers: Sequence[int]) -> str:
    """Return layers as short text: 3 to 5, 9."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]} to {p[-1]}" for p in parts)


def _side_by_side(plain: Run, steered: Run, prompts: Sequence[str]) -> str:
    rows = []
    for row, prompt in enumerate(prompts):
        cells = [_cell(one, row, prompt) for one in (plain, steered)]
        dose = f"{100 * steered.dose[row]:.1f} %" if steered.dose[row] else "untouched"
        rows.append(f"<tr>{cells[0]}{cells[1]}<td class=n>{dose}</td></tr>")
    return "".join(rows)


def _cell(one: Run, row: int, prompt: str) -> str:
    read = " · ".join(f"{name} {values[row]:.2f}" for name, values in one.readings.items())
    text = f"<b>{html.escape(prompt)}</b>{html.escape(one.texts[row])}"
    return f"<td>{text}<small>{read} · perplexity {one.perplexity[row]:.0f}</small></td>"


def _ladder(each: Run, ladder: Sequence[float]) -> str:
    return "".join(
        f"<tr><td class=n>{bound:g}</td><td>{html.escape(each.texts[row])}</td>"
        f"<td class=n>{each.readings['sentiment'][row]:.2f}</td><td class=n>{each.perplexity[row]:.0f}</td>"
        f"<td class=n>{100 * each.dose[row]:.1f} %</td></tr>"
        for row, bound in enumerate(ladder)
    )
