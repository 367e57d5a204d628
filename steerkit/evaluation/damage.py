"""What steering costs: distance from the unsteered model, fluency and variety of the text, what else it can do still."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

import torch.nn.functional as F

from steerkit.activations import checked_texts, refuse_long, tokenise
from steerkit.errors import TextsError
from steerkit.evaluation.report import Measure, digest
from steerkit.hooks import layers_steered, unsteered
from steerkit.model import Decoder
from steerkit.passes import Continued, Writer, device_of, read

Row = dict[str, float]


def replayed(writer: Writer, rows: Continued, part: Sequence[int]) -> list[Row]:
    """Compare who wrote with the unsteered model on the same tokens, row by row.

    `kl`: mean over the tokens of KL(steered || unsteered), full vocabulary, temperature 1, in nats. `perplexity`: mean of
    -log of the probability that the unsteered model gives each token. `entropy`: of the steered model's distributions at temperature
    1; little is a text that has to be. `displacement`: `|h' - h| / |h|` after the last block that is edited: of one addition
    the magnitude as a share of the residual norm.
    """
    decoder = writer.decoder
    last = max(layers_steered(decoder.model), default=decoder.depth - 1)
    steered, moved = writer.read(rows, part, last)
    plain, states = steered, moved
    if not writer.plain:
        with unsteered(decoder.model):
            plain, states = read(decoder, rows, last)
    found = []
    for row, real in enumerate(rows.real):
        here, there = (F.log_softmax(logits[row, real].float(), dim=-1) for logits in (steered, plain))
        tokens = rows.new[row, real]
        measures = {
            "kl": float(F.kl_div(there, here, reduction="none", log_target=True).sum(dim=-1).mean().clamp(min=0)),
            "perplexity": float(-there.gather(-1, tokens[:, None]).mean()),
            "entropy": float(-(here.exp() * here).sum(dim=-1).mean()),
        }
        if moved is not None and states is not None:
            shift = (moved[row, real] - states[row, real]).norm(dim=-1) / states[row, real].norm(dim=-1)
            measures["displacement"] = float(shift.mean())
        found.append(measures)
    return found


def variety(rows: Continued) -> list[Row]:
    """Tell of each row how much it repeats itself.

    `repetition`: share of its tokens that complete a run of 4 tokens which the row held before. `distinct_2`: different pairs
    of tokens as a share of all pairs.
    """
    found = []
    for row, real in enumerate(rows.real):
        tokens = rows.new[row, real].tolist()
        runs = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
        pairs = list(itertools.pairwise(tokens))
        found.append(
            {
                "repetition": (len(runs) - len(set(runs))) / max(len(runs), 1),
                "distinct_2": len(set(pairs)) / len(pairs) if pairs else 1.0,
                "length": float(len(tokens)),
            }
        )
    return found


def neutral_texts() -> list[str]:
    """Return 24 plain sentences on many subjects, for what steering does to a text that has nothing to do with it."""
    return (resources.files("steerkit.evaluation") / "assets" / "neutral.txt").read_text("utf-8").splitlines()


def task_questions() -> list[dict[str, Any]]:
    """Return 40 easy questions, `{"question": text, "options": texts, "answer": index}`, that a model should still answer."""
    lines = (resources.files("steerkit.evaluation") / "assets" / "task.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


class Neutral:
    """Texts that a concept has nothing to do with; what is changed of them need not be.

    Raises:
        TextsError: no plain text, one of fewer than two tokens, or longer than the model takes.
    """

    def __init__(self, decoder: Decoder, tokenizer: Any, texts: Sequence[str]) -> None:
        if any(not isinstance(text, str) for text in checked_texts(texts, "neutral")):
            raise TextsError("Neutral texts must be strings. Found a conversation. Pass plain text.")
        self._writer = Writer(decoder, tokenizer, texts)
        self._writer.refuse_long(0)
        short = next((index for index, ids in enumerate(self._writer.tokens) if len(ids) < 2), None)
        if short is not None:
            raise TextsError(
                f"A neutral text needs two tokens. Found fewer in text {short}. Leave it out.", index=short
            )

    def measure(self, batch_size: int) -> Measure:
        """Return KL(steered || unsteered) of each text, its first token the prompt."""
        tokens, values = self._writer.tokens, []
        for start in range(0, len(tokens), batch_size):
            part = tokens[start : start + batch_size]
            rows = Continued.of([ids[:1] for ids in part], [ids[1:] for ids in part], device_of(self._writer.decoder))
            rows = replace(rows, whole=True)
            values += [row["kl"] for row in replayed(self._writer, rows, range(start, start + len(part)))]
        weights = tuple(float(len(ids) - 1) for ids in tokens)
        return Measure(tuple(values), tuple(range(len(values))), weights, "damage", source=digest(self._writer.prompts))


class Questions:
    """Easy questions that a model should still answer, `{"question": text, "options": texts, "answer": index}`.

    Raises:
        TextsError: one that is no question, has an option without tokens, or is longer than the model takes.
    """

    def __init__(self, decoder: Decoder, tokenizer: Any, task: Sequence[Mapping[str, Any]]) -> None:
        for index, one in enumerate(task):
            _check_question(one, index)
        self._task = list(task)
        self._decoder = decoder
        self._cells = [(index, option) for index, one in enumerate(task) for option in one["options"]]
        prompts = tokenise(tokenizer, [one["question"] for one in task])
        self._prompts = [prompts[index] for index, _ in self._cells]
        self._options = tokenise(tokenizer, [option for _, option in self._cells], special=False)
        refuse_long(
            decoder.model, [len(p) + len(o) for p, o in zip(self._prompts, self._options)], "Question and option"
        )

    def measure(self, batch_size: int) -> Measure:
        """Return for each question whether the answer is the likeliest option, by the mean log-probability of its tokens."""
        likelihoods: list[float] = []
        for start in range(0, len(self._cells), batch_size):
            here = slice(start, start + batch_size)
            rows = Continued.of(self._prompts[here], self._options[here], device_of(self._decoder))
            logits, _ = read(self._decoder, rows)
            chosen = F.log_softmax(logits.float(), dim=-1).gather(-1, rows.new[..., None])[..., 0]
            likelihoods += ((chosen * rows.real).sum(dim=-1) / rows.real.sum(dim=-1)).tolist()
        right, place = [], 0
        for one in self._task:
            of_options = likelihoods[place : place + len(one["options"])]
            place += len(of_options)
            right.append(float(of_options.index(max(of_options)) == one["answer"]))
        source = digest([json.dumps(dict(one), sort_keys=True) for one in self._task])
        return Measure(tuple(right), tuple(range(len(right))), kind="damage", source=source)


def _check_question(one: Any, index: int) -> None:
    options = one.get("options") if isinstance(one, Mapping) else None
    fine = (
        isinstance(options, Sequence)
        and len(options) > 1
        and all(isinstance(text, str) and text for text in (one.get("question"), *options))
        and isinstance(one.get("answer"), int)
        and 0 <= one["answer"] < len(options)
    )
    if not fine:
        raise TextsError(
            "A question needs `question`, two or more `options` and the index of its `answer`. Found "
            f"{one!r:.60} at {index}. Write it like task_questions().",
            index=index,
        )
