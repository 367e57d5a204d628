"""`evaluate`: what a model writes, scored, with what it costs beside it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, replace
from typing import Any

from tqdm.auto import tqdm

from steerkit.activations import checked_texts
from steerkit.errors import AmountError, SamplesError, ScorerError
from steerkit.evaluation import damage
from steerkit.evaluation.report import Arm, Measure, Report, digest
from steerkit.evaluation.scorers import Scorer, refusal
from steerkit.hooks import rows_are_samples, samples_steered, steered
from steerkit.model import evaluating, find_decoder
from steerkit.passes import Sampling, Writer
from steerkit.types import Text

Scorers = Mapping[str, Scorer] | Iterable[Scorer] | Scorer

TAKEN = (
    "kl", "kl_p90", "perplexity", "entropy", "repetition", "distinct_2", "length", "displacement", "collateral", "task",
)  # fmt: skip
"""What the panel measures, so that no scorer may be called so."""


def evaluate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    *,
    scorers: Scorers = (),
    name: str | None = None,
    max_new_tokens: int = 32,
    samples: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    neutral: Sequence[str] | None = None,
    task: Sequence[Mapping[str, Any]] | None = None,
    harmful: Sequence[Text] = (),
    harmless: Sequence[Text] = (),
    progress: bool = False,
) -> Report:
    """Let the model write as it stands, steered or not, score the text, and measure what it costs beside it.

        with Controller(model, [sentiment.constrain(at_least=0.9)]):
            report = evaluate(model, tokenizer, prompts, scorers={"positive": positive})

    The budget is `kl`: the mean over generated tokens of KL(steered || unsteered), full vocabulary, temperature 1, on the
    steered model's own samples, replayed with the same edits; 1 nat a token is 24 nats in 24 tokens. `kl_p90` is its 90th
    percentile over rows. Beside it: `perplexity` of the text under the unsteered model and the `entropy` of the steered one's
    distributions (at temperature 1 its log is expected to be entropy + KL: at equal KL it tells narrow text, not good text), `repetition` (share of runs of 4 tokens that were there before; it lowers perplexity), `distinct_2`, `length` in
    tokens, `displacement` (the dose: relative change of the residual stream after the last block that is edited), `collateral` (KL on neutral texts)
    and `task` (accuracy on easy questions).

    Args:
        model: as the caller's `with` leaves it; amounts for each sample follow the prompts whatever the batches are.
        tokenizer: its tokenizer; not changed.
        prompts: strings or conversations.
        scorers: functions `(prompts, completions) -> scores` by name, or functions that have one.
        name: of the arm; "steered" or "unsteered" by default.
        max_new_tokens: tokens a continuation.
        samples: continuations of each prompt.
        temperature: 1 draws from the model's own distribution, which the budget is about; 0 is greedy.
        seed: of the sampling, the same for every arm; the caller's random numbers stay where they are.
        batch_size: rows that run together.
        neutral: texts for `collateral`; 24 shipped sentences by default, () for none.
        task: questions for `task`; 40 shipped ones by default, () for none. With amounts for each sample there is neither.
        harmful: prompts to refuse, for `refusal`.
        harmless: prompts not to refuse, for `over_refusal`.
        progress: show a progress bar.

    Returns:
        A `Report` of one arm; `Report.join` puts several beside each other.

    Raises:
        TextsError: no prompts, or texts that are none.
        ScorerError: a scorer that raises, returns NaN or the wrong number of scores, or takes the name of a measure.
        AmountError: a number of tokens or samples below 1, or a negative temperature.
        SamplesError: amounts for another number of samples than there are prompts.
    """
    prompts = checked_texts(prompts, "prompts")
    by_name = named(scorers)
    sampling = checked_sampling(max_new_tokens, samples, temperature, seed, batch_size)
    decoder = find_decoder(model)
    counts = samples_steered(decoder.model)
    _refuse_other_counts(counts, len(prompts), bool(neutral or task or harmful or harmless))
    neutral = (() if counts else damage.neutral_texts()) if neutral is None else neutral
    task = (() if counts else damage.task_questions()) if task is None else task
    writer = Writer(decoder, tokenizer, prompts)
    asked = {
        key: Writer(decoder, tokenizer, checked_texts(each, word))
        for key, word, each in (("refusal", "harmful", harmful), ("over_refusal", "harmless", harmless))
        if each
    }
    _refuse_names(by_name, asked)
    for each in (writer, *asked.values()):
        each.refuse_long(max_new_tokens)
    texts = damage.Neutral(decoder, tokenizer, neutral) if neutral else None
    questions = damage.Questions(decoder, tokenizer, task) if task else None
    with evaluating(decoder.model):
        measures, shown, completions = measured(writer, by_name, sampling, progress=progress)
        if texts is not None:
            measures["collateral"] = texts.measure(batch_size)
        if questions is not None:
            measures["task"] = questions.measure(batch_size)
        for key, one in asked.items():
            found, _, _ = measured(one, {key: refusal}, sampling, panel=False, progress=progress)
            measures[key] = replace(found[key], kind="effect" if key == "refusal" else "damage")
    name = name or ("steered" if steered(decoder.model) else "unsteered")
    return Report({name: Arm(measures, tuple(shown), tuple(completions), asdict(sampling))})


def named(scorers: Scorers) -> dict[str, Scorer]:
    """Return scorers by name.

    Raises:
        ScorerError: no function, no name, or the name of a measure.
    """
    if isinstance(scorers, Mapping):
        listed = list(scorers.items())
    else:
        functions: list[Any] = [scorers] if callable(scorers) else list(scorers)
        listed = [(getattr(each, "__name__", "") if callable(each) else "", each) for each in functions]
    for name, each in listed:
        fine = isinstance(name, str) and name and name != "<lambda>" and [n for n, _ in listed].count(name) == 1
        if not callable(each) or not fine or name in TAKEN:
            raise ScorerError(
                f"A scorer is a function with a name of its own, none of {', '.join(TAKEN)}. Found {name!r}: "
                f"{type(each).__name__}. Pass scorers={{'name': function}}.",
                name=name,
            )
    return dict(listed)


def _refuse_names(scorers: Mapping[str, Scorer], asked: Mapping[str, Writer]) -> None:
    both = sorted(set(scorers) & set(asked))
    if both:
        raise ScorerError(
            f"Measures need names of their own. Found {both[0]!r} as a scorer and for the prompts to refuse. Rename the scorer.",
            name=both[0],
        )


def checked_sampling(max_new_tokens: int, samples: int, temperature: float, seed: int, batch_size: int) -> Sampling:
    """Return the settings once they are known to be some.

    Raises:
        AmountError: a number of tokens, samples or rows below 1, a negative temperature, a seed that is no whole number.
    """
    for word, number in (("max_new_tokens", max_new_tokens), ("samples", samples), ("batch_size", batch_size)):
        if not isinstance(number, int) or number < 1:
            raise AmountError(f"`{word}` must be a whole number of at least 1. Found {number!r}.")
    if not isinstance(seed, int):
        raise AmountError(f"`seed` must be a whole number. Found {seed!r}.")
    if not (isinstance(temperature, int | float) and math.isfinite(temperature) and temperature >= 0):
        raise AmountError(
            f"`temperature` must be at least 0. Found {temperature!r}. Use 1 for the model's distribution."
        )
    if temperature == 0 and samples > 1:
        raise AmountError(f"Greedy text has one sample a prompt. Found samples={samples}. Use temperature=1.")
    return Sampling(max_new_tokens, samples, float(temperature), seed, batch_size)


def _refuse_other_counts(counts: frozenset[int], prompts: int, more: bool) -> None:
    other = sorted(counts - {prompts})
    if other:
        raise SamplesError(
            f"Amounts for each sample must be as many as the prompts. Found {other[0]} amounts for {prompts} prompts. Pass one "
            "value a prompt.",
            expected=other[0],
            found=prompts,
        )
    if counts and more:
        raise SamplesError(
            f"Amounts for each of {prompts} prompts fit no other texts. Found neutral texts, questions or prompts to refuse. "
            "Leave them out, or use one amount for all."
        )


def measured(
    writer: Writer,
    scorers: Mapping[str, Scorer],
    sampling: Sampling,
    *,
    panel: bool = True,
    progress: bool = False,
) -> tuple[dict[str, Measure], list[str], list[str]]:
    """Return measures of what somebody writes, and by row the prompts as text and the completions."""
    decoder, prompts = writer.decoder, writer.prompts
    writer.refuse_long(sampling.max_new_tokens)
    rows: list[dict[str, float]] = []
    completions: list[str] = []
    size = max(1, sampling.batch_size // (sampling.samples * writer.drawn))
    bar = tqdm(total=len(prompts), desc="evaluating", unit="prompt", disable=not progress)
    with bar:
        for start in range(0, len(prompts), size):
            part = range(start, min(start + size, len(prompts)))
            with rows_are_samples(decoder.model, part, len(prompts)):
                written = writer.write(part, sampling)
                if panel:
                    replay = damage.replayed(writer, written, part)
                    rows += [{**a, **b} for a, b in zip(replay, damage.variety(written), strict=True)]
            completions += writer.texts(part, written)
            bar.update(len(part))
    clusters = tuple(index for index in range(len(prompts)) for _ in range(sampling.samples))
    source = digest(prompts)
    shown = [prompts[i] for i in clusters]
    measures = {
        name: Measure(_called(name, scorer, shown, completions), clusters, source=source)
        for name, scorer in scorers.items()
    }
    if panel:
        measures |= _gathered(rows, clusters, source)
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in prompts]
    return measures, [texts[i] for i in clusters], completions


def _gathered(rows: Sequence[Mapping[str, float]], clusters: tuple[int, ...], source: str) -> dict[str, Measure]:
    """Return the damage panel; what is a mean over tokens is weighted by their number."""
    lengths = tuple(row["length"] for row in rows)

    def measure(key: str, shown: Any = "mean", weights: tuple[float, ...] = ()) -> Measure:
        return Measure(tuple(row[key] for row in rows), clusters, weights, "damage", shown, source)

    found = {
        "kl": measure("kl", weights=lengths),
        "kl_p90": measure("kl", "p90"),
        "perplexity": measure("perplexity", "exp", lengths),
        "entropy": measure("entropy", weights=lengths),
        "repetition": measure("repetition"),
        "distinct_2": measure("distinct_2"),
        "length": measure("length"),
    }
    if "displacement" in rows[0]:
        found["displacement"] = measure("displacement", weights=lengths)
    return found


def _called(
    name: str, scorer: Callable[..., Any], prompts: Sequence[Text], completions: Sequence[str]
) -> tuple[float, ...]:
    try:
        scores = scorer(list(prompts), list(completions))
        if isinstance(scores, Mapping | Set):
            raise TypeError(f"a {type(scores).__name__}, which has no order")
        scores = list(scores.tolist() if hasattr(scores, "tolist") else scores)
    except Exception as error:
        raise ScorerError(
            f"A scorer must return one score for each completion. {name!r} raised {error!r:.200}.", name=name
        ) from error
    if len(scores) != len(completions):
        raise ScorerError(
            f"A scorer must return one score for each of {len(completions)} completions. {name!r} returned {len(scores)}.",
            name=name,
        )
    values = []
    for index, score in enumerate(scores):
        try:
            value = math.nan if isinstance(score, str | bytes) else float(score)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise ScorerError(
                f"A score must be a finite number. {name!r} returned {score!r:.80} for completion {index}.",
                name=name,
                index=index,
            )
        values.append(value)
    return tuple(values)
