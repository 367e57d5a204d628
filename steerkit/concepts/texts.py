"""Contrast texts from a description: the model itself answers under opposite instructions, and answers are kept by what they show.

The idea is that of persona vectors (arXiv:2507.21509); what stands in for their judge is the model's own odds that an answer
was written under one instruction and not the other.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from tqdm.auto import tqdm

from steerkit.activations import checked_texts
from steerkit.errors import AmountError, TextsError
from steerkit.model import evaluating, find_decoder
from steerkit.passes import Continued, Prompted, Sampling
from steerkit.types import Text

Judge = Callable[[Sequence[Text], Sequence[str]], Sequence[float]]
"""From requests and answers to one score an answer; more shows more of it."""

_MOST = "Answer in a way that is as {description} as you can be."
_LEAST = "Answer in a way that is {opposite}."
_WORDS = 5
"""An answer with fewer words shows nothing."""


@dataclass(frozen=True)
class ContrastTexts:
    """What a model wrote for and against a description; made by `contrast_texts`.

    made = contrast_texts(model, tokenizer, "formal")
    formal = Concept.fit("formal", model, tokenizer, positive=made.positive, negative=made.negative, groups=made.groups)
    """

    description: str
    positive: list[list[dict[str, str]]] = field(repr=False)
    """Conversations: a request and an answer that shows it. The instruction is not among them."""
    negative: list[list[dict[str, str]]] = field(repr=False)
    groups: tuple[list[int], list[int]] = field(repr=False)
    """Which request each answers, for the split."""
    scores: tuple[list[float], list[float]] = field(repr=False)
    """What each was kept by: log-odds a token that it was written for the description, in nats, or the judge's score."""
    separation: float
    """Probability that an answer written for the description scores above one written against it, before any was left out.

    By the model's own odds it is above one half whenever the instructions matter, whatever they brought about; by a judge it
    tells whether it is what was asked for.
    """
    written: int
    """Answers of both sides before any was left out."""

    def __str__(self) -> str:
        return (
            f"{self.description!r}: {len(self.positive)} + {len(self.negative)} of {self.written} answers kept; one written for "
            f"it scores above one written against it with probability {self.separation:.2f}"
        )


def contrast_texts(
    model: Any,
    tokenizer: Any,
    description: str,
    *,
    opposite: str | None = None,
    requests: Sequence[str] | None = None,
    samples: int = 2,
    keep: float = 0.5,
    judge: Judge | None = None,
    max_new_tokens: int = 48,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> ContrastTexts:
    """Let a model write texts that show a description and texts that show its opposite.

    Each request is answered under "as {description} as you can be" and under "{opposite}". An answer's score is what the
    instructions tell apart, `(log p(answer | for) - log p(answer | against)) / tokens`, or what `judge` returns. Of each side
    those are kept that lie on their own side of the median and among its best; the answers are returned without the
    instruction, so that a probe reads what they show and not what was asked for.

    A small model follows few instructions: look at `separation` and at the texts before you trust the concept.

    Args:
        model: a chat model, steered or not.
        tokenizer: its tokenizer, with a chat template.
        description: an adjective or a phrase that fits the sentence above, such as "formal".
        opposite: the same for the other side; "not at all {description}" by default.
        requests: what is to be answered; 60 everyday requests by default.
        samples: answers to each request on each side.
        keep: share of each side's answers that may be kept, the best first.
        judge: scores answers in the place of the model's own odds; ideally fitted on other texts.
        max_new_tokens: length of an answer at most.
        batch_size: answers that run together.
        seed: of the sampling.
        progress: show a progress bar.

    Raises:
        TextsError: no description, no requests, no chat template, or a model whose answers leave fewer than 3 of a side.
        AmountError: a share, a number of samples or a length that cannot be.
    """
    for name, phrase in (("description", description), ("opposite", opposite or "none")):
        if not isinstance(phrase, str) or not phrase.strip():
            raise TextsError(f"`{name}` must be a word or a phrase. Found {phrase!r:.60}. Pass 'formal', for example.")
    if not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise AmountError(f"`keep` must be a share above 0 and at most 1. Found {keep!r}. Try 0.5.")
    for name, count in (("samples", samples), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise AmountError(f"`{name}` must be a whole number above 0. Found {count!r}. Try 2.")
    if getattr(tokenizer, "chat_template", None) is None:
        raise TextsError(
            "Instructions need a chat model. Found a tokenizer without a chat template. Write the texts by hand, or pass those of "
            "another model to Concept.fit."
        )
    asked = checked_texts(default_requests() if requests is None else requests, "requests")
    prompts: list[Text] = [text if not isinstance(text, str) else [{"role": "user", "content": text}] for text in asked]
    decoder = find_decoder(model)
    sides = [
        Prompted(decoder, tokenizer, prompts, words)
        for words in (
            _MOST.format(description=description),
            _LEAST.format(opposite=opposite or f"not at all {description}"),
        )
    ]
    for side in sides:
        side.refuse_long(max_new_tokens)
    drawn: list[list[_Answer]] = [[], []]
    step = max(1, batch_size // samples)
    parts = [range(i, min(i + step, len(prompts))) for i in range(0, len(prompts), step)]
    with evaluating(decoder.model), tqdm(total=2 * len(prompts), desc="writing", disable=not progress) as bar:
        for number, writer in enumerate(sides):
            for part in parts:
                sampling = Sampling(max_new_tokens, samples, seed=2 * seed + number, batch_size=batch_size)
                rows = writer.write(part, sampling)
                drawn[number] += _answers(sides, rows, part, tokenizer, samples)
                bar.update(len(part))
    if judge is not None:
        drawn = [_judged(judge, prompts, answers) for answers in drawn]
    return _chosen(description, prompts, drawn, keep)


@dataclass(frozen=True)
class _Answer:
    request: int
    text: str
    score: float


def default_requests() -> list[str]:
    """Return the shipped requests: everyday ones that can be answered in any tone."""
    text = resources.files("steerkit.concepts").joinpath("assets/requests.txt").read_text("utf-8")
    return [line for line in text.splitlines() if line.strip()]


def _answers(
    sides: Sequence[Prompted], rows: Continued, part: Sequence[int], tokenizer: Any, samples: int
) -> list[_Answer]:
    """Decode what was written, and score each answer by how much likelier one instruction makes it than the other."""
    there = []
    for side in sides:
        logits, _ = side.read(rows, part)
        log_p = logits.float().log_softmax(dim=-1).gather(-1, rows.new[..., None])[..., 0]
        there.append((log_p * rows.real).sum(dim=-1) / rows.real.sum(dim=-1).clamp(min=1))
    odds = (there[0] - there[1]).tolist()
    texts = [tokenizer.decode(new[real], skip_special_tokens=True).strip() for new, real in zip(rows.new, rows.real)]
    requests = [i for i in part for _ in range(samples)]
    return [_Answer(*each) for each in zip(requests, texts, odds, strict=True)]


def _judged(judge: Judge, prompts: Sequence[Text], answers: Sequence[_Answer]) -> list[_Answer]:
    scores = [float(score) for score in judge([prompts[a.request] for a in answers], [a.text for a in answers])]
    if len(scores) != len(answers) or not all(math.isfinite(score) for score in scores):
        raise TextsError(
            f"`judge` must return one finite score an answer. Found {len(scores)} for {len(answers)}, or NaN among them. Return "
            "as many numbers as it is given."
        )
    return [_Answer(a.request, a.text, score) for a, score in zip(answers, scores, strict=True)]


def _chosen(
    description: str, prompts: Sequence[Text], drawn: Sequence[Sequence[_Answer]], keep: float
) -> ContrastTexts:
    """Keep of each side its best, on its own side of the median; equal answers once, hardly any answer not at all."""
    pooled = sorted(answer.score for side in drawn for answer in side)
    median = (pooled[(len(pooled) - 1) // 2] + pooled[len(pooled) // 2]) / 2
    above = sum((a.score > b.score) + (a.score == b.score) / 2 for a in drawn[0] for b in drawn[1])
    kept: list[list[_Answer]] = []
    for sign, side in zip((1, -1), drawn, strict=True):
        different = {answer.text: answer for answer in side if len(answer.text.split()) >= _WORDS}
        best = sorted(different.values(), key=lambda answer: -sign * answer.score)[: math.ceil(keep * len(side))]
        kept.append([answer for answer in best if sign * (answer.score - median) > 0])
        if len(kept[-1]) < 3:
            raise TextsError(
                f"Three answers a side are required. Found {len(kept[-1])} worth keeping "
                f"{'for' if sign > 0 else 'against'} {description!r}. Use more requests or samples, a larger share, or another "
                "description."
            )
    positive, negative = (
        [[*_turns(prompts[a.request]), {"role": "assistant", "content": a.text}] for a in k] for k in kept
    )
    return ContrastTexts(
        description,
        positive,
        negative,
        groups=([a.request for a in kept[0]], [a.request for a in kept[1]]),
        scores=([a.score for a in kept[0]], [a.score for a in kept[1]]),
        separation=above / (len(drawn[0]) * len(drawn[1])),
        written=sum(map(len, drawn)),
    )


def _turns(prompt: Text) -> list[dict[str, str]]:
    assert not isinstance(prompt, str)
    return [dict(message) for message in prompt]
