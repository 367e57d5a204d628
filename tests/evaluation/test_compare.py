"""`compare`: prompting and best-of-n against another computation, budgets kept on other prompts, nothing left out or behind."""

import copy
import functools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import random_addition, random_erasure, random_vector, tiny_model, tiny_tokenizer
from torch import Tensor
from typer.testing import CliRunner

from steerkit import Concept, Controller, Report, evaluate, record
from steerkit.cli import app
from steerkit.errors import AmountError, ArtefactError, ReportError, ScorerError, SteerkitError, TextsError
from steerkit.evaluation import Comparison, compare, comparison, contest
from steerkit.evaluation import report as report_module
from steerkit.evaluation import scorers as ready
from steerkit.evaluation.calibration import Search, dial
from steerkit.evaluation.comparison import UNSTEERED, Cell
from steerkit.evaluation.report import Arm, Measure, digest
from steerkit.evaluation.run import measured
from steerkit.hooks import steered
from steerkit.model import find_decoder
from steerkit.passes import BestOf, Prompted, Sampling, Writer

TEXTS = [f"w{i} w{i + 1} w{(7 * i) % 50}" for i in range(20)]
POSITIVE, NEGATIVE = ([f"{text} {last}" for text in TEXTS] for last in ("w60", "w61"))
PROMPTS = ["w1 w2 w3 w4 w5", "w8", "w9 w10 w11", "w12 w13"]
DEVELOPMENT = ["w20 w21 w22", "w30", "w40 w41 w42 w43 w44"]
ASK = "w70 w71 w72"
BUDGETS = (0.1, 0.5)
SAMPLES, NEW, MOST = 2, 4, 4
DRAWN = Sampling(NEW, SAMPLES, 1.0, 0, 64)
SIX = Sampling(6, 1, 1.0, 3, 64)

GCAV = ("GCAV, probe", "GCAV, pattern", "GCAV, mean difference")
ALWAYS = (*GCAV, "constant addition", "random direction", "shuffled labels", "prompting", "best of n")
WITH_VECTORS = ("preference vector", "one-sided vector", "both kinds")


def odd(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Share of the words with an odd number."""
    words = [[int(word[1:]) for word in text.split() if word[1:].isdigit()] for text in completions]
    return [sum(each) % 2 * 0.1 + sum(n % 2 for n in each) / max(len(each), 1) for each in words]


def characters(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in completions]


GIVEN: dict[str, Any] = {
    "name": "warm",
    "positive": POSITIVE,
    "negative": NEGATIVE,
    "scorers": [odd, characters],
    "development": DEVELOPMENT,
    "instructions": [ASK, "w73"],
    "budgets": BUDGETS,
    "best_of": MOST,
    "trials": 3,
    "max_new_tokens": NEW,
    "samples": SAMPLES,
}


def agrees(found: dict[str, tuple[float, ...]], wanted: dict[str, tuple[float, ...]]) -> None:
    """Every measure of every row."""
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert found[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-7), key


class StopHere(Exception):
    """Raised where nothing may come to."""


def state(model: Any) -> Any:
    modules = {
        name: (m.training, sorted(m.__dict__), {k: list(v) for k, v in m.__dict__.items() if k.endswith("hooks")})
        for name, m in model.named_modules()
    }
    return modules, model.generation_config.to_dict()


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Run:
    """One comparison, what its searches found, and the model before and after."""

    def __init__(self, concepts: Any = None, **changed: Any) -> None:
        self.model, self.tokenizer = tiny_model("llama"), tiny_tokenizer()
        self.vector = random_vector(self.model, size=0.2).add(1.0)
        self.one_sided = random_vector(self.model, name="one", seed=3, size=0.2).add(1.0)
        self.found: list[tuple[str, float, Any]] = []
        searched = Search.within

        def within(search: Search, budget: float) -> Any:
            found = searched(search, budget)
            self.found.append((search._name, budget, found))
            return found

        given = {**GIVEN, **changed}
        if given.pop("vectors", False):
            given |= {"vector": self.vector, "one_sided": self.one_sided}
        self.budgets = given["budgets"]
        self.before = state(self.model), weights(self.model), torch.random.get_rng_state()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Search, "within", within)
            if concepts is not None:
                patch.setattr(comparison, "_concepts", lambda *_: concepts)
            self.made = compare(self.model, self.tokenizer, PROMPTS, **given)
        self.after = state(self.model), weights(self.model), torch.random.get_rng_state()

    def cell(self, method: str, budget: float | None) -> Cell:
        [cell] = [c for c in self.made.cells if (c.method, c.budget) == (method, budget)]
        return cell

    def values(self, cell: Cell) -> dict[str, tuple[float, ...]]:
        return {name: m.values for name, m in self.made.report[cell.arm].measures.items()}

    def again(self, interventions: Any, prompts: Sequence[Any] = PROMPTS) -> dict[str, tuple[float, ...]]:
        """What these interventions do, by `evaluate`."""
        with Controller(self.model, interventions):
            report = evaluate(
                *(self.model, self.tokenizer, prompts),
                scorers=[odd, characters],
                name="a",
                max_new_tokens=NEW,
                samples=SAMPLES,
                batch_size=64,
                neutral=(),
                task=(),
            )
        return {name: m.values for name, m in report["a"].measures.items()}


@pytest.fixture(scope="module", autouse=True)
def _few_rounds() -> Iterator[None]:
    """Intervals of fewer rounds: most of the time would be spent on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "_ROUNDS", 200)
        yield


@pytest.fixture(scope="module")
def fitted() -> tuple[Concept, Concept]:
    return comparison._concepts(tiny_model("llama"), tiny_tokenizer(), "warm", POSITIVE, NEGATIVE, 0)


@pytest.fixture(scope="module")
def concept(fitted: tuple[Concept, Concept]) -> Concept:
    return fitted[0]


@pytest.fixture(scope="module")
def up() -> Run:
    """Towards the concept, with both vectors."""
    return Run(vectors=True)


@pytest.fixture(scope="module")
def down(fitted: Any) -> Run:
    """Away from it, without a vector."""
    return Run(fitted, towards="negative", budgets=(0.3,))


@pytest.fixture(scope="module")
def starved(fitted: Any) -> Run:
    """A budget that pays for nothing."""
    return Run(fitted, budgets=(1e-9,), vectors=True)


@pytest.fixture
def quick(fitted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The concept is known already."""
    monkeypatch.setattr(comparison, "_concepts", lambda *_: fitted)


@pytest.fixture
def silent(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that is generated is an error."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise StopHere("text was generated")

    monkeypatch.setattr(Writer, "write", refuse)
    monkeypatch.setattr(Prompted, "write", refuse)
    monkeypatch.setattr(BestOf, "write", refuse)


# -------------------------------------------------------------------------------------------------------------- prompting


def alone(model: Any, ids: Sequence[int], new: Sequence[int]) -> Tensor:
    """Log-probabilities of one row's new places, no padding, no cache, float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*ids, *new]]), use_cache=False).logits[0]
    return logits[len(ids) - 1 : -1].double().log_softmax(-1)


def mixed(plain: Tensor, instructed: Tensor, share: float) -> Tensor:
    return ((1 - share) * plain + share * instructed).log_softmax(-1)


def chat(words: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": words}]


def ids_of(tokenizer: Any, prompt: Any, instruction: str | None = None) -> list[int]:
    """Another way to tokens, with or without an instruction."""
    if isinstance(prompt, str):
        return tokenizer(prompt if instruction is None else f"{instruction}\n\n{prompt}")["input_ids"]
    system = [] if instruction is None else [{"role": "system", "content": instruction}]
    text = tokenizer.apply_chat_template([*system, *prompt], tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("name", "share", "kind"),
    [
        ("llama", 0.35, "strings"),
        ("llama", 0.8, "chats"),
        ("gpt2", 0.8, "strings"),
        ("opt", 0.35, "chats"),
        ("bloom", 0.35, "strings"),
    ],
)
def test_a_share_of_an_instruction_is_the_mixture_of_both_distributions(name: str, share: float, kind: str) -> None:
    model, tokenizer = tiny_model(name), tiny_tokenizer(chat=True)
    prompts: list[Any] = PROMPTS if kind == "strings" else [chat(text) for text in PROMPTS]
    writer = Prompted(find_decoder(model), tokenizer, prompts, ASK, share)
    sampling = Sampling(5, 2, 1.0, 3, 64)
    measures, _, _ = measured(writer, {}, sampling)
    written = writer.write(range(len(prompts)), sampling)
    kept: list[float] = []
    for row in range(len(prompts) * 2):
        new = written.new[row, written.real[row]].tolist()
        prompt = prompts[row // 2]
        plain, there = (alone(model, ids_of(tokenizer, prompt, i), new) for i in (None, ASK))
        mixture = mixed(plain, there, share)
        kl = (mixture.exp() * (mixture - plain)).sum(-1)
        assert measures["kl"].values[row] == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-5)
        entropy = -(mixture.exp() * mixture).sum(-1).mean()
        assert measures["entropy"].values[row] == pytest.approx(float(entropy), rel=1e-3)
        likelihood = -plain[range(len(new)), new].mean()
        assert measures["perplexity"].values[row] == pytest.approx(float(likelihood), rel=1e-3)
        kept.append(float(kl.mean()))
    assert max(kept) > 0.01


@pytest.mark.parametrize(
    ("name", "share"),
    [("llama", 0.0), ("llama", 1.0), *((name, 0.4) for name in ("llama", "mistral", "gemma3", "gpt2", "opt", "bloom"))],
)
def test_cached_generation_draws_from_what_the_replay_tells(name: str, share: float) -> None:
    """`mistral` and `gemma3` slide over 6 tokens."""
    model = tiny_model(name)
    drawn: list[Tensor] = []
    original = model.generate

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs, return_dict_in_generate=True, output_scores=True)
        drawn.append(torch.stack(out.scores, dim=1))
        return out.sequences

    model.generate = generate
    writer = Prompted(find_decoder(model), tiny_tokenizer(), PROMPTS, ASK, share)
    written = writer.write(range(len(PROMPTS)), Sampling(8, 2, 1.0, 3, 64))
    logits, _ = writer.read(written, range(len(PROMPTS)))
    [scores] = drawn
    real = written.real
    assert real.sum() > 30
    torch.testing.assert_close(
        logits.log_softmax(-1)[real], scores[:, : real.shape[1]].log_softmax(-1)[real], rtol=1e-3, atol=2e-4
    )


@pytest.mark.parametrize("kind", ["strings", "chats"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_whole_instruction_is_the_instructed_prompt(name: str, kind: str) -> None:
    model, tokenizer = tiny_model(name), tiny_tokenizer(chat=True)
    prompts: list[Any] = PROMPTS if kind == "strings" else [chat(text) for text in PROMPTS]
    by_hand: list[Any] = (
        [f"{ASK}\n\n{text}" for text in PROMPTS]
        if kind == "strings"
        else [[{"role": "system", "content": ASK}, *chat(text)] for text in PROMPTS]
    )
    decoder, sampling = find_decoder(model), Sampling(6, 2, 1.0, 3, 3)
    _, shown, texts = measured(Prompted(decoder, tokenizer, prompts, ASK), {}, sampling)
    _, _, wanted = measured(Writer(decoder, tokenizer, by_hand), {}, sampling)
    assert texts == wanted
    assert shown == [text for text in PROMPTS for _ in range(2)]
    assert texts != measured(Writer(decoder, tokenizer, prompts), {}, sampling)[2]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_no_share_is_the_plain_text_and_spends_nothing(name: str) -> None:
    decoder, tokenizer = find_decoder(tiny_model(name)), tiny_tokenizer()
    sampling = Sampling(6, 2, 1.0, 3, 64)
    none, _, texts = measured(Prompted(decoder, tokenizer, PROMPTS, ASK, 0.0), {}, sampling)
    plain, _, wanted = measured(Writer(decoder, tokenizer, PROMPTS), {}, sampling)
    assert texts == wanted
    assert none["kl"].values == pytest.approx([0.0] * len(texts), abs=1e-6)
    assert none["perplexity"].values == pytest.approx(plain["perplexity"].values, rel=1e-4)
    assert none["entropy"].values == pytest.approx(plain["entropy"].values, rel=1e-4)


def test_more_of_an_instruction_spends_more(model: Any, tokenizer: Any) -> None:
    decoder = find_decoder(model)
    kls = [
        measured(Prompted(decoder, tokenizer, PROMPTS, ASK, share), {}, SIX)[0]["kl"].estimate.value
        for share in (0.0, 0.1, 0.3, 1.0)
    ]
    assert kls == sorted(kls)
    assert kls[1] > 1e-4


def test_the_caller_s_random_numbers_and_the_tokenizer_stay(model: Any, tokenizer: Any) -> None:
    before, numbers = state(model), torch.random.get_rng_state()
    measured(Prompted(find_decoder(model), tokenizer, PROMPTS, ASK, 0.5), {}, SIX)
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert state(model) == before
    assert tokenizer.pad_token is None


def test_an_instruction_that_makes_a_prompt_too_long_is_refused_with_its_index(model: Any, tokenizer: Any) -> None:
    writer = Prompted(find_decoder(model), tokenizer, ["w1", "w1 " * 30], "w2 " * 95)
    with pytest.raises(TextsError, match="Instruction") as caught:
        measured(writer, {}, SIX)
    assert caught.value.index == 1


def test_a_share_on_a_model_without_attention(tokenizer: Any) -> None:
    writer = Prompted(find_decoder(tiny_model("mamba")), tokenizer, PROMPTS, ASK, 0.4)
    measured(writer, {}, SIX)


def test_two_streams_have_no_one_displacement(model: Any, tokenizer: Any) -> None:
    assert "displacement" not in measured(Prompted(find_decoder(model), tokenizer, PROMPTS, ASK, 0.5), {}, SIX)[0]


def test_an_instruction_keeps_the_prompt_s_own_system_message(model: Any) -> None:
    prompt = [{"role": "system", "content": "w80 w81"}, *chat("w1")]
    writer = Prompted(find_decoder(model), tiny_tokenizer(chat=True), [prompt], ASK)
    words = writer.tokenizer.decode(writer.instructed[0])
    assert "w80" in words
    assert ASK in words


# -------------------------------------------------------------------------------------------------------------- best of n


@pytest.mark.parametrize("samples", [1, 3])
def test_best_of_n_keeps_the_best_of_each_group(samples: int, model: Any, tokenizer: Any) -> None:
    count, decoder = 4, find_decoder(model)
    writer = BestOf(decoder, tokenizer, PROMPTS, count, odd)
    _, _, texts = measured(writer, {}, Sampling(6, samples, 1.0, 3, 64))
    _, _, drawn = measured(Writer(decoder, tokenizer, PROMPTS), {}, Sampling(6, samples * count, 1.0, 3, 64 * count))
    groups = [drawn[i : i + count] for i in range(0, len(drawn), count)]
    assert len(texts) == len(groups) == samples * len(PROMPTS)
    assert texts == [max(group, key=lambda text: odd([""], [text])[0]) for group in groups]
    assert any(text != group[0] for text, group in zip(texts, groups, strict=True))


def test_the_chooser_sees_each_text_with_its_own_prompt(model: Any, tokenizer: Any) -> None:
    seen: list[tuple[str, str]] = []

    def choose(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [float(i % 3 == 1) for i in range(len(completions))]

    decoder = find_decoder(model)
    writer = BestOf(decoder, tokenizer, PROMPTS, 3, choose)
    _, shown, texts = measured(writer, {}, Sampling(6, 2, 1.0, 3, 4))
    assert [prompt for prompt, _ in seen] == [prompt for prompt in PROMPTS for _ in range(6)]
    assert texts == [text for _, text in seen[1::3]]
    assert shown == [prompt for prompt in PROMPTS for _ in range(2)]


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_what_choosing_costs(count: int, model: Any, tokenizer: Any) -> None:
    """The bound holds, and is exact for a chooser without ties on a continuum: E[log of the density of the maximum]."""
    writer = BestOf(find_decoder(model), tokenizer, PROMPTS, count, odd)
    assert writer.divergence == pytest.approx(math.log(count) - (count - 1) / count)
    quantiles = (np.arange(200_000) + 0.5) / 200_000
    density = count * quantiles ** (count - 1)
    assert writer.divergence == pytest.approx(float(np.mean(density * np.log(density + 1e-300))), abs=1e-3)


def test_the_best_of_one_is_the_plain_text(model: Any, tokenizer: Any) -> None:
    decoder = find_decoder(model)
    writer = BestOf(decoder, tokenizer, PROMPTS, 1, odd)
    assert measured(writer, {}, DRAWN)[2] == measured(Writer(decoder, tokenizer, PROMPTS), {}, DRAWN)[2]
    assert writer.divergence == 0


def test_best_of_n_runs_no_more_rows_together_than_batch_size(model: Any, tokenizer: Any) -> None:
    rows: list[int] = []
    decoder = find_decoder(model)
    handle = decoder.blocks[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    measured(BestOf(decoder, tokenizer, PROMPTS, 4, odd), {}, Sampling(2, 1, 1.0, 0, 4))
    handle.remove()
    assert max(rows) <= 4


# ---------------------------------------------------------------------------------------------------- methods and budgets


def missing(run: Run, methods: Sequence[str]) -> list[tuple[str, float]]:
    there = {(cell.method, cell.budget) for cell in run.made.cells}
    return [
        (method, budget)
        for method in methods
        for budget in run.budgets
        if (method, budget) not in there
        and not any(note.startswith(f"{method}:") and f"{budget:g}" in note for note in run.made.notes)
    ]


def test_every_method_is_there_or_a_note_says_why(up: Run, down: Run, starved: Run) -> None:
    assert missing(up, [*ALWAYS, *WITH_VECTORS]) == []
    assert missing(down, ALWAYS) == []
    assert missing(starved, [m for m in (*ALWAYS, *WITH_VECTORS) if m != "random direction"]) == []


def test_a_control_that_is_left_out_is_told(starved: Run) -> None:
    assert ("constant addition", 1e-9) not in {(c.method, c.budget) for c in starved.made.cells}
    assert missing(starved, ["random direction"]) == []


def test_prompting_and_the_controls_are_there_even_without_a_budget_to_spend(starved: Run) -> None:
    assert starved.cell("prompting", None).amount == 1.0
    assert "prompting, whole" in starved.made.report.arms
    assert any("did best on the development prompts" in note for note in starved.made.notes)


def test_no_method_takes_part_twice(up: Run, down: Run) -> None:
    for run in (up, down):
        cells = [(cell.method, cell.budget) for cell in run.made.cells]
        assert len(set(cells)) == len(cells)
        arms = [cell.arm for cell in run.made.cells]
        assert len(set(arms)) == len(arms)
        assert {UNSTEERED, *arms} == set(run.made.report.arms)


def test_both_kinds_and_removal_only_where_they_make_sense(up: Run, down: Run) -> None:
    assert "removal" not in {cell.method for cell in up.made.cells}
    assert not {cell.method for cell in down.made.cells} & set(WITH_VECTORS)
    assert down.cell("removal", None).amount is None


def test_budgets_are_kept_on_the_development_prompts(up: Run, down: Run) -> None:
    for run in (up, down):
        assert len(run.found) >= len(run.budgets) * 6
        for name, budget, found in run.found:
            assert found.chosen.kl.value <= budget, name
            assert all(m.source == digest(DEVELOPMENT) for dose in found.curve for m in dose.measures.values())
            assert run.cell(name, budget).amount == found.amount


def test_trials_are_kept(up: Run) -> None:
    """Doses of one method serve several budgets; the hybrid has no more than a part of it."""
    by_method: dict[str, int] = {}
    for name, budget, found in up.found:
        by_method[name] = len(found.curve)
        assert len(found.curve) <= 3 * (1 if name == "both kinds" else BUDGETS.index(budget) + 1), name
    assert by_method["both kinds"] <= by_method["preference vector"]


def test_the_figures_come_from_the_prompts(up: Run, down: Run) -> None:
    for run in (up, down):
        for name, arm in run.made.report.arms.items():
            assert arm.prompts == tuple(p for p in PROMPTS for _ in range(SAMPLES)), name
            assert {"odd", "characters", "kl", "length", "entropy"} <= set(arm.measures), name
            assert all(m.source == digest(PROMPTS) for m in arm.measures.values()), name
            assert all(len(m) == len(PROMPTS) * SAMPLES for m in arm.measures.values()), name
            assert arm.measures["odd"].values == pytest.approx(odd([], arm.completions)), name


def test_the_unsteered_arm_is_the_plain_model(up: Run) -> None:
    wanted = evaluate(
        *(up.model, up.tokenizer, PROMPTS), scorers=odd, samples=SAMPLES, max_new_tokens=NEW, neutral=(), task=()
    )[UNSTEERED]
    arm = up.made.report[UNSTEERED]
    assert arm.completions == wanted.completions
    assert arm["kl"].value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("budget", BUDGETS)
def test_arms_are_what_evaluate_tells_of_the_same_intervention(up: Run, concept: Concept, budget: float) -> None:
    layers = concept.steering_layers
    for method, kind in zip(GCAV, ("probe", "pattern", "mean_difference"), strict=True):
        cell = up.cell(method, budget)
        bound = concept.along(kind).constrain(at_least=cell.amount, layers=layers)  # type: ignore[arg-type]
        agrees(up.again([bound]), up.values(cell))
    cell = up.cell("constant addition", budget)
    assert set(cell.amount) == set(layers)
    assert all(size > 0 for size in cell.amount.values())
    ratios = [size / concept.norms[layer] for layer, size in cell.amount.items()]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    added = concept.along("mean_difference").add(cell.amount, positions="last")
    agrees(up.again([added]), up.values(cell))
    for method, vector in (("preference vector", up.vector), ("one-sided vector", up.one_sided)):
        cell = up.cell(method, budget)
        assert cell.amount > 0
        scaled = type(vector)(**{**vector.__dict__, "amount": cell.amount})
        agrees(up.again([scaled]), up.values(cell))
        assert np.mean(up.again([scaled], DEVELOPMENT)["kl"]) <= budget * 1.3  # by rows, not by tokens


def test_both_kinds_are_the_best_closed_form_and_the_vector(up: Run, concept: Concept) -> None:
    for budget in BUDGETS:
        cell = up.cell("both kinds", budget)
        scores = {
            name: found.chosen.measures["odd"].estimate.value
            for name, b, found in up.found
            if b == budget and name in GCAV
        }
        kind: Any = dict(zip(GCAV, ("probe", "pattern", "mean_difference"), strict=True))[
            max(scores, key=scores.__getitem__)
        ]
        edit = concept.along(kind).constrain(at_least=cell.amount["edit"], layers=concept.steering_layers, name="edit")
        vector = type(up.vector)(**{**up.vector.__dict__, "amount": cell.amount["weights"], "name": "weights"})
        agrees(up.again([edit, vector]), up.values(cell))
        assert cell.amount["weights"] <= up.cell("preference vector", budget).amount


def test_a_random_direction_has_the_amounts_of_the_constant_addition(up: Run, down: Run, concept: Concept) -> None:
    for run in (up, down):
        for budget in run.budgets:
            control, constant = (run.cell(m, budget) for m in ("random direction", "constant addition"))
            assert control.amount == constant.amount
            assert run.values(control)["kl"] != run.values(constant)["kl"]
    # as many and as long steps: the displacement after one edited block is the same for any direction
    assert set(up.cell("random direction", BUDGETS[0]).amount) == set(concept.steering_layers)


def test_towards_negative_turns_every_sign(down: Run, concept: Concept) -> None:
    cell = down.cell("constant addition", 0.3)
    assert all(size < 0 for size in cell.amount.values())
    added = concept.along("mean_difference").add(cell.amount, positions="last")
    agrees(down.again([added]), down.values(cell))
    cell = down.cell("GCAV, pattern", 0.3)
    bound = concept.along("pattern").constrain(at_most=cell.amount, layers=concept.steering_layers)
    agrees(down.again([bound]), down.values(cell))
    assert all(size < 0 for size in down.cell("shuffled labels", 0.3).amount.values())
    erased = concept.along("mean_difference").erase(positions="last")
    agrees(down.again([erased]), down.values(down.cell("removal", None)))


@pytest.mark.parametrize("amount", [2.0, -1.0, 0.0, {0: 1.0, 1: 2.0}])
def test_towards_negative_turns_a_vector(amount: Any, model: Any, tokenizer: Any) -> None:
    vector = random_vector(model)
    made = (vector.only(layers=[0, 1]) if isinstance(amount, dict) else vector).add(amount)
    turned = comparison._turned(model, tokenizer, DEVELOPMENT, made, False).amount
    assert turned == ({0: -1.0, 1: -2.0} if isinstance(amount, dict) else -(amount or 1.0))
    assert comparison._turned(model, tokenizer, DEVELOPMENT, made, True) is made


def test_prompting_is_the_instruction_that_does_best_on_the_development_prompts(up: Run, down: Run) -> None:
    for run, way, examples in ((up, 1, POSITIVE), (down, -1, NEGATIVE)):
        decoder = find_decoder(run.model)
        candidates = [*GIVEN["instructions"], contest.few_shot(examples)]
        assert all(text in candidates[-1] for text in examples[:3])
        scores = [
            measured(Prompted(decoder, run.tokenizer, DEVELOPMENT, each), {"odd": odd}, DRAWN)[0]["odd"].estimate.value
            for each in candidates
        ]
        best = candidates[int(np.argmax([way * score for score in scores]))]
        assert any(repr(best) in note for note in run.made.notes)
        for budget in (run.budgets[-1], None):
            cell = run.cell("prompting", budget)
            writer = Prompted(decoder, run.tokenizer, PROMPTS, best, cell.amount)
            found = measured(writer, {"odd": odd, "characters": characters}, DRAWN)[0]
            agrees({name: m.values for name, m in found.items()}, run.values(cell))
        assert 0 < run.cell("prompting", run.budgets[-1]).amount <= 1


def developed(run: Run) -> float:
    """Return the mean length of the unsteered text on the development prompts."""
    writer = Writer(find_decoder(run.model), run.tokenizer, DEVELOPMENT)
    return measured(writer, {}, DRAWN)[0]["length"].estimate.value


def test_best_of_n_pays_with_the_budget_of_a_text(up: Run, concept: Concept) -> None:
    length = developed(up)
    probe = ready.probe(concept, up.model, up.tokenizer)
    for budget in BUDGETS:
        cells = [c for c in up.made.cells if (c.method, c.budget) == ("best of n", budget)]
        count = max(n for n in range(1, MOST + 1) if math.log(n) - (n - 1) / n <= budget * length)
        if count == 1:
            assert cells == []
            continue
        [cell] = cells
        assert cell.amount == count
        writer = BestOf(find_decoder(up.model), up.tokenizer, PROMPTS, count, probe)
        _, _, texts = measured(writer, {}, DRAWN)
        assert list(up.made.report[cell.arm].completions) == texts
        total = sum(up.values(cell)["length"])
        rows = len(PROMPTS) * SAMPLES
        assert up.made.report[cell.arm]["kl"].value == pytest.approx(writer.divergence * rows / total)


def test_best_of_n_away_from_a_concept_takes_the_least(down: Run, concept: Concept) -> None:
    probe = ready.probe(concept, down.model, down.tokenizer)
    cell = down.cell("best of n", 0.3)
    writer = BestOf(
        find_decoder(down.model), down.tokenizer, PROMPTS, cell.amount, lambda p, c: [-s for s in probe(p, c)]
    )
    assert list(down.made.report[cell.arm].completions) == measured(writer, {}, DRAWN)[2]


def test_the_same_seed_gives_the_same_comparison(down: Run) -> None:
    again = Run(towards="negative", budgets=(0.3,))
    assert again.made.cells == down.made.cells
    assert again.made.report.to_json(texts=True) == down.made.report.to_json(texts=True)


def test_shuffled_labels_take_as_many_from_each_class(model: Any, tokenizer: Any) -> None:
    """On SmolLM2-135M and 40 + 40 texts, labels shuffled freely gave a cosine of .66 with the concept for one seed of six."""
    apart = [record(model, tokenizer, texts) for texts in (POSITIVE, NEGATIVE)]
    for seed in range(6):
        concept, shuffled = comparison._concepts(model, tokenizer, "warm", POSITIVE, NEGATIVE, seed)
        for layer in concept.layers:
            # a difference of means within the classes: of half the texts of each from the other half
            spread = [states[layer] - states[layer].mean(dim=0) for states in apart]
            within = torch.linalg.matrix_rank(torch.cat([*spread]).double())
            basis = torch.linalg.svd(torch.cat([*spread]).double()).Vh[: int(within)]
            turned = shuffled.directions["mean_difference"][layer].double()
            assert float((basis @ turned).norm()) == pytest.approx(1.0, abs=1e-3)
            assert not torch.equal(turned.float(), concept.directions["mean_difference"][layer])


def test_a_step_in_proportion_to_the_norms_may_go_to_half_of_each(model: Any, tokenizer: Any) -> None:
    """On SmolLM2-135M, norms 46 to 961, constant addition cannot go beyond 5 % of the residual norm at any layer."""
    states = record(model, tokenizer, DEVELOPMENT, layers=[0, 3])
    norms = {layer: float(states[layer].norm(dim=-1).mean()) for layer in (0, 3)}
    most = dial(model, tokenizer, DEVELOPMENT, random_addition(layers=(0, 3), magnitude=norms))(1.0)
    assert {layer: most[layer] / norms[layer] for layer in norms} == pytest.approx({0: 0.5, 3: 0.5})


def test_best_of_n_asks_for_more_only_where_the_budget_pays(
    up: Run, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = developed(up)
    budget = (math.log(3) - 2 / 3 + 0.01) / length
    assert math.log(4) - 3 / 4 > budget * length
    for method in ("steered", "randomly", "instructed"):
        monkeypatch.setattr(contest.Contest, method, lambda *_: None)
    given = {**GIVEN, "best_of": 3, "budgets": (budget,)}
    found = compare(up.model, up.tokenizer, PROMPTS, **given)
    assert [cell.amount for cell in found.cells] == [3]
    assert not [note for note in found.notes if "more than best_of" in note]


# ------------------------------------------------------------------------------------------------------------ going on


def test_a_stopped_comparison_goes_on(
    model: Any, tokenizer: Any, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**GIVEN, "vector": random_vector(model).add(1.0)}
    whole = compare(model, tokenizer, PROMPTS, **given)
    calls: list[int] = []
    real = contest.measured

    def stopping(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(contest, "measured", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare(model, tokenizer, PROMPTS, **given, folder=tmp_path / "kept")
    stopped = Comparison.from_json((tmp_path / "kept" / "comparison.json").read_text())
    assert 2 < len(stopped.cells) < len(whole.cells)
    found = compare(model, tokenizer, PROMPTS, **given, folder=tmp_path / "kept")
    assert found.cells[: len(stopped.cells)] == stopped.cells == whole.cells[: len(stopped.cells)]
    assert [(c.method, c.budget) for c in found.cells] == [(c.method, c.budget) for c in whole.cells]
    assert all(found.report.arms[arm].measures == stopped.report.arms[arm].measures for arm in stopped.report)
    done = len(calls)
    again = compare(model, tokenizer, PROMPTS, **given, folder=tmp_path / "kept")
    assert len(calls) - done < done / 8  # the length that best-of-n pays with, and doses that were not found
    assert again.table() == found.table()
    calls[:] = range(15)  # a stop once a new arm is there, and before the others were come to
    with pytest.raises(KeyboardInterrupt):
        compare(model, tokenizer, PROMPTS, **{**given, "budgets": (*given["budgets"], 9.0)}, folder=tmp_path / "kept")
    kept = Comparison.from_json((tmp_path / "kept" / "comparison.json").read_text())
    before, after = ({(c.method, c.budget) for c in each.cells} for each in (found, kept))
    assert after > before
    other = random_vector(model, seed=5).add(1.0)  # of the same name and layers
    for changed in (
        {"vector": other},
        {"trials": 5},
        {"positive": POSITIVE[1:]},
        {"towards": "negative"},
        {"samples": 1},
    ):
        with pytest.raises(ArtefactError, match="other texts, settings"):
            compare(model, tokenizer, PROMPTS, **{**given, **changed}, folder=tmp_path / "kept")


# ------------------------------------------------------------------------------------------------- the model as it was


def test_the_model_is_as_it_was(up: Run, down: Run, starved: Run) -> None:
    for run in (up, down, starved):
        assert run.before[0] == run.after[0]
        assert same(run.before[1], run.after[1])
        assert torch.equal(run.before[2], run.after[2])
        assert not steered(run.model)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        *((where, RuntimeError) for where in ("at once", "steered", "weights", "both kinds", "prompting", "best of n")),
        *((where, KeyboardInterrupt) for where in ("steered", "both kinds")),
    ],
)
def test_the_model_is_as_it_was_after_an_error(
    where: str, error: type[BaseException], model: Any, tokenizer: Any, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived: list[str] = []
    if where in ("weights", "both kinds", "prompting", "best of n"):
        # come there soon
        skipped = {"weights": (), "both kinds": (), "prompting": (), "best of n": ("instructed",)}[where]
        for method in ("randomly", *skipped):
            monkeypatch.setattr(contest.Contest, method, lambda *_: None)
        real = contest.Contest.steered
        monkeypatch.setattr(
            contest.Contest,
            "steered",
            lambda self, method, one: (
                real(self, method, one)
                if method == "preference vector" or (where == "both kinds" and method == GCAV[0])
                else None
            ),
        )
    for kind in (Prompted, BestOf):
        original = kind.write

        def write(self: Any, *args: Any, original: Any = original, kind: Any = kind) -> Any:
            arrived.append({Prompted: "prompting", BestOf: "best of n"}[kind])
            return original(self, *args)

        monkeypatch.setattr(kind, "write", write)
    attached = Controller.__enter__

    def enter(self: Controller) -> Controller:
        names = [type(each).__name__ for each in self.interventions]
        arrived.append("both kinds" if len(names) == 2 else "weights" if names == ["WeightAddition"] else "steered")
        return attached(self)

    monkeypatch.setattr(Controller, "__enter__", enter)

    def fails(prompts: Any, completions: Any) -> list[float]:
        if where == "at once" or where in arrived:
            raise error("half-way")
        return odd(prompts, completions)

    vector = random_vector(model, size=0.2).add(1.0)
    before = state(model), weights(model)
    model.train()
    training = {name: m.training for name, m in model.named_modules()}
    with pytest.raises(ScorerError if error is RuntimeError else KeyboardInterrupt):
        compare(model, tokenizer, PROMPTS, **{**GIVEN, "scorers": {"odd": fails}, "vector": vector, "budgets": (0.3,)})
    assert {name: m.training for name, m in model.named_modules()} == training
    model.eval()
    assert state(model) == before[0]
    assert same(weights(model), before[1])
    assert not steered(model)


# -------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"scorers": ()}, AmountError, "goal"),
        ({"scorers": {}}, AmountError, "goal"),
        ({"scorers": {"kl": odd}}, ScorerError, "kl"),
        ({"scorers": [odd, odd]}, ScorerError, "odd"),
        ({"scorers": "odd"}, ScorerError, "function"),
        ({"goal": "kl"}, AmountError, "goal"),
        ({"goal": "nothing"}, AmountError, "nothing"),
        ({"budgets": ()}, AmountError, "Budgets"),
        ({"budgets": (0.1, -0.1)}, AmountError, "Budgets"),
        ({"budgets": (0.0,)}, AmountError, "Budgets"),
        ({"budgets": (math.nan,)}, AmountError, "Budgets"),
        ({"budgets": (math.inf,)}, AmountError, "Budgets"),
        ({"development": [*DEVELOPMENT, PROMPTS[2]]}, TextsError, "both lists"),
        ({"development": []}, TextsError, "development"),
        ({"development": "w1"}, TextsError, "development"),
        ({"instructions": []}, TextsError, "Prompting"),
        ({"instructions": ["w1", ""]}, TextsError, "Prompting"),
        ({"instructions": [3]}, TextsError, "Prompting"),
        ({"instructions": "w1 w2"}, TextsError, "Prompting"),
        ({"best_of": 1}, AmountError, "best_of"),
        ({"trials": 2}, AmountError, "trials"),
        ({"towards": "up"}, AmountError, "towards"),
        ({"samples": 0}, AmountError, "samples"),
        ({"max_new_tokens": 0}, AmountError, "max_new_tokens"),
        ({"batch_size": 0}, AmountError, "batch_size"),
        ({"positive": []}, TextsError, "positive"),
        ({"negative": "w1"}, TextsError, "negative"),
        ({"name": " "}, SteerkitError, "name"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    changed: dict[str, Any], error: type[SteerkitError], says: str, model: Any, tokenizer: Any, silent: None,
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if changed.keys() & {"positive", "negative", "name"}:
        monkeypatch.setattr(comparison, "_concepts", _CONCEPTS)
    with pytest.raises(error, match=says):
        compare(model, tokenizer, PROMPTS, **{**GIVEN, **changed})


_CONCEPTS = comparison._concepts


def test_no_prompts_are_refused(model: Any, tokenizer: Any, silent: None) -> None:
    for prompts in ([], "w1", [3]):
        with pytest.raises(TextsError, match="prompts"):
            compare(model, tokenizer, prompts, **GIVEN)  # type: ignore[arg-type]


def test_a_shared_conversation_is_refused(model: Any, silent: None) -> None:
    with pytest.raises(TextsError, match="both lists"):
        compare(
            model,
            tiny_tokenizer(chat=True),
            [chat("w1"), chat("w2")],
            **{**GIVEN, "development": [chat("w3"), chat("w2")]},
        )


def test_an_attached_controller_is_refused(model: Any, tokenizer: Any, silent: None) -> None:
    with Controller(model, [random_addition()]):
        with pytest.raises(AmountError, match="attached"):
            compare(model, tokenizer, PROMPTS, **GIVEN)
        model(torch.tensor([[5]]))


def bad_vector(model: Any, kind: str) -> Any:
    made = {
        "no intervention": lambda: random_vector(model),
        "an erasure": lambda: random_erasure(),
        "amounts by sample": lambda: random_vector(model).add(torch.ones(4)),
        "another model's": lambda: random_vector(tiny_model("gpt2")).add(1.0),
    }
    return made[kind]()


@pytest.mark.parametrize("key", ["vector", "one_sided"])
@pytest.mark.parametrize("kind", ["no intervention", "an erasure", "amounts by sample", "another model's"])
def test_a_vector_that_cannot_be_used_is_refused_before_anything_is_written(
    kind: str, key: str, model: Any, tokenizer: Any, silent: None
) -> None:
    with pytest.raises(SteerkitError):
        compare(model, tokenizer, PROMPTS, **{**GIVEN, key: bad_vector(model, kind)})


@pytest.mark.parametrize(
    "changed",
    [
        {"development": ["w1", "w2 " * 126]},
        {"instructions": ["w1 " * 126]},
    ],
    ids=["development", "an instruction"],
)
def test_what_is_too_long_is_refused_before_anything_is_written(
    changed: dict[str, Any], model: Any, tokenizer: Any, silent: None
) -> None:
    with pytest.raises(TextsError):
        compare(model, tokenizer, PROMPTS, **{**GIVEN, **changed})


def test_a_template_without_a_system_role_takes_the_instruction_in_the_users_turn(model: Any) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    writer = Prompted(find_decoder(model), tokenizer, [chat("w1")], ASK)
    assert tokenizer.decode(writer.instructed[0]).split().count("w1") == 2  # the user's word, and the turn that follows


def test_a_few_shot_prompt_that_is_too_long_is_left_out_and_told(
    model: Any, tokenizer: Any, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("steered", "randomly", "chosen"):
        monkeypatch.setattr(contest.Contest, method, lambda *_: None)
    long = [f"{'w1 ' * 60} {text}" for text in POSITIVE]
    found = compare(model, tokenizer, PROMPTS, **{**GIVEN, "positive": long})
    assert any("left out 'Here are texts" in note for note in found.notes)
    assert ("prompting", None) in {(cell.method, cell.budget) for cell in found.cells}


@pytest.mark.parametrize(
    "changed",
    [
        {"budgets": 0.1},
        {"budgets": "0.1"},
        {"best_of": 2.5},
        {"best_of": "8"},
        {"trials": 3.5},
        {"seed": "x"},
    ],
    ids=lambda changed: ", ".join(f"{key}={value!r}" for key, value in changed.items()),
)
def test_numbers_of_another_kind_are_refused_with_words(
    changed: dict[str, Any], model: Any, tokenizer: Any, silent: None
) -> None:
    with pytest.raises(SteerkitError):
        compare(model, tokenizer, PROMPTS, **{**GIVEN, **changed})


@pytest.mark.parametrize("budgets", [(0.1, 0.1), (0.1, 0.1 + 1e-9)])
def test_budgets_of_one_name_take_part_once(
    budgets: Any, model: Any, tokenizer: Any, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def run(self: Any, *_: Any) -> None:
        seen.extend(f"{budget:g}" for budget in self.budgets)
        raise StopHere

    monkeypatch.setattr(contest.Contest, "run", run)
    with pytest.raises((StopHere, AmountError)):
        compare(model, tokenizer, PROMPTS, **{**GIVEN, "budgets": budgets})
    assert len(seen) == len(set(seen))


# ------------------------------------------------------------------------------------------------------------- Comparison


def test_effects_are_paired_differences_from_the_unsteered_text(up: Run) -> None:
    made = up.made
    assert made.goal == "odd"
    effects, spent = made.effects(), made.spent()
    assert list(effects) == list(spent) == list(dict.fromkeys(cell.method for cell in made.cells))
    for cell in made.cells:
        arm, base = (np.array(made.report[a].measures["odd"].values) for a in (cell.arm, UNSTEERED))
        assert effects[cell.method][cell.budget].value == pytest.approx((arm - base).mean())
        assert effects[cell.method][cell.budget].low <= effects[cell.method][cell.budget].high
        assert spent[cell.method][cell.budget] == made.report[cell.arm]["kl"]
        assert made.effects("characters")[cell.method][cell.budget] == made.report.difference(
            "characters", cell.arm, UNSTEERED
        )


def test_a_contrast_is_of_two_methods_at_one_budget(up: Run) -> None:
    made, budget = up.made, BUDGETS[1]
    found = made.contrast("GCAV, pattern", "constant addition", budget)
    turned = made.contrast("constant addition", "GCAV, pattern", budget)
    assert found.value == pytest.approx(-turned.value)
    assert (found.low, found.high) == pytest.approx((-turned.high, -turned.low))
    effects = made.effects()
    assert found.value == pytest.approx(
        effects["GCAV, pattern"][budget].value - effects["constant addition"][budget].value
    )
    assert made.contrast("prompting", "prompting", None).value == 0
    assert made.contrast("GCAV, probe", "GCAV, pattern", budget, "kl") == made.report.difference(
        "kl", "GCAV, probe at 0.5", "GCAV, pattern at 0.5"
    )
    for first, second, at in (
        ("nobody", "GCAV, probe", budget),
        ("GCAV, probe", "nobody", budget),
        ("GCAV, probe", "GCAV, pattern", 7.0),
    ):
        with pytest.raises(AmountError, match="has no arm"):
            made.contrast(first, second, at)
    with pytest.raises(ReportError):
        made.contrast("GCAV, probe", "GCAV, pattern", budget, "nothing")


def test_the_table_tells_every_effect_and_what_it_spent(down: Run) -> None:
    for run in (down,):
        head, line, *rows = run.made.table().splitlines()
        assert "odd" in head
        assert all(f"{budget:g} nats a token" in head for budget in run.budgets)
        assert len({row.count("|") for row in (head, line, *rows)}) == 1
        methods = list(run.made.effects())
        assert [row.split("|")[1].strip() for row in rows] == methods
        for cell in run.made.cells:
            row = rows[methods.index(cell.method)]
            spent = run.made.spent()[cell.method][cell.budget]
            assert f"{run.made.effects()[cell.method][cell.budget]} at {spent.value:.3g}" in row


def test_a_comparison_is_frozen(up: Run) -> None:
    with pytest.raises(AttributeError):
        up.made.goal = "kl"  # type: ignore[misc]


def test_a_report_of_a_comparison_is_json_with_amounts_by_layer(up: Run, tmp_path: Path) -> None:
    found = json.loads(up.made.report.to_json(tmp_path / "report.json", texts=True))
    cell = up.cell("constant addition", 0.5)
    assert found["arms"][cell.arm]["settings"]["amount"] == {str(layer): size for layer, size in cell.amount.items()}
    assert found["arms"]["both kinds at 0.5"]["settings"]["amount"].keys() == {"edit", "weights"}
    again = Report.from_json((tmp_path / "report.json").read_text())
    assert list(again) == list(up.made.report)
    assert again["GCAV, probe at 0.1"].measures == up.made.report["GCAV, probe at 0.1"].measures


def drawn(found: Comparison) -> Any:
    pytest.importorskip("matplotlib")
    from steerkit import plots

    return plots.comparison(found)


def test_a_comparison_is_drawn(up: Run, down: Run, tmp_path: Path) -> None:
    for run in (up, down):
        figure = drawn(run.made)
        [axes] = figure.axes
        words = [text.get_text() for text in axes.get_legend().get_texts()]
        assert words == list(run.made.effects())
        assert "odd" in axes.get_ylabel()
        styles = {(c.lines[0].get_color(), c.lines[0].get_marker()) for c in axes.containers}
        assert len(styles) == len(words)
        for container, (method, effects) in zip(axes.containers, run.made.effects().items(), strict=True):
            x, y = container.lines[0].get_data()
            spent = run.made.spent()[method]
            wanted = sorted((spent[b].value, e.value) for b, e in effects.items())
            assert np.array(sorted(zip(x, y, strict=True))) == pytest.approx(np.array(wanted))
        figure.savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 5000


def test_one_prompt_has_no_interval_and_is_drawn_and_told(tmp_path: Path) -> None:
    def arm(score: float, kl: float) -> Arm:
        return Arm({"odd": Measure((score,), (0,)), "kl": Measure((kl,), (0,))})

    report = Report({UNSTEERED: arm(0.1, 0.0), "a": arm(0.4, 0.1), "b": arm(0.2, 0.2)})
    cells = (Cell("one", 0.1, "a", 1.0), Cell("two", 0.1, "b", 1.0), Cell("two", None, "b", 1.0))
    made = Comparison(report, cells, "odd")
    assert made.effects()["one"][0.1].value == pytest.approx(0.3)
    assert "0.3 [nan, nan] at 0.1" in made.table()
    drawn(made).savefig(tmp_path / "figure.png")


# ------------------------------------------------------------------------------------------------------- the command line

runner = CliRunner()


def run(*words: str) -> Any:
    return runner.invoke(app, list(words))


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer(chat=True).save_pretrained(folder / "model")
    texts = {
        "prompts": PROMPTS, "development": DEVELOPMENT, "positive": POSITIVE, "negative": NEGATIVE, "ask": [ASK, "w73"],
        "one": ["w1 w2"], "shared": [*DEVELOPMENT, PROMPTS[0]], "nothing": [],
    }  # fmt: skip
    for name, lines in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(lines))
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat(text)}) for text in PROMPTS))
    (folder / "broken.jsonl").write_text('{"text": "w1"}\n{"words": 3}\n')
    (folder / "compare_words.py").write_text(
        "def odd(prompts, completions):\n    return [float(len(text) % 2) for text in completions]\n\n\n"
        "def few(prompts, completions):\n    return [1.0]\n\n\n"
        "def fails(prompts, completions):\n    raise RuntimeError('no\\nscore')\n\n\n"
        "def interrupted(prompts, completions):\n    raise KeyboardInterrupt\n\n\nnumber = 3\n"
    )
    (folder / "compare_other.py").write_text("def odd(prompts, completions):\n    return [2.0 for _ in completions]\n")
    comparison._concepts(tiny_model("llama"), tiny_tokenizer(), "warm", POSITIVE, NEGATIVE, 0)[0].save(
        folder / "warm.safetensors"
    )
    random_vector(tiny_model("llama"), size=0.2).save(folder / "helpful.safetensors")
    (folder / "compare_broken.py").write_text("def odd(:\n")
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine")
    return folder


@pytest.fixture
def here(disk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(disk)
    monkeypatch.syspath_prepend(disk)
    yield disk
    for name in ("compare_words", "compare_other"):
        sys.modules.pop(name, None)


COMPARE = [
    *("compare", "warm", "prompts.txt", "--development", "development.txt", "--positive", "positive.txt"),
    *("--negative", "negative.txt", "--instructions", "ask.txt", "-s", "compare_words:odd", "-m", "model"),
    *("--max-new-tokens", "3", "--samples", "2", "--trials", "3", "--best-of", "2", "--budgets", "0.3"),
]
EVALUATE = ["evaluate", "prompts.txt", "-s", "compare_words:odd", "-m", "model", "--max-new-tokens", "3"]


def tree(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)


def test_compare_writes_a_page_a_figure_and_what_was_measured(here: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run(*COMPARE, "--trials", "6", "-o", str(tmp_path / "made"), "--json", "--vector", "helpful")
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == [
        *("comparison.html", "comparison.json", "comparison.key", "comparison.png")
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["made"]
    found = json.loads(done.stdout)
    assert found["goal"] == "odd"
    assert {cell["method"] for cell in found["cells"]} == {*ALWAYS, "preference vector", "both kinds"}
    kept = Comparison.from_json((tmp_path / "made" / "comparison.json").read_text())
    assert [(cell["method"], cell["budget"]) for cell in found["cells"]] == [(c.method, c.budget) for c in kept.cells]
    [probe] = [cell for cell in found["cells"] if cell["method"] == "GCAV, probe"]
    assert probe["effect"] == pytest.approx(list(kept.report.difference("odd", "GCAV, probe at 0.3", UNSTEERED)))
    assert probe["spent"] == pytest.approx(list(kept.report["GCAV, probe at 0.3"]["kl"]))
    page = (tmp_path / "made" / "comparison.html").read_text()
    assert all(cell["method"] in page for cell in found["cells"])
    assert "data:image/png;base64," in page


def test_evaluate_scores_unsteered_and_steered(here: Path, tmp_path: Path) -> None:
    done = run(*EVALUATE, "--at-least", "warm=0.9", "-o", str(tmp_path / "made"), "--json")
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == ["report.html", "report.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["made"]
    report = Report.from_json(done.stdout)
    assert list(report) == ["unsteered", "steered"]
    assert report["steered"]["kl"].value > 0.001
    assert Report.from_json((tmp_path / "made" / "report.json").read_text()).arms == report.arms
    assert report["steered"].completions == ()


def test_evaluate_prints_tables_and_takes_chats_and_several_edits(here: Path, tmp_path: Path) -> None:
    done = run(
        *("evaluate", "chats.jsonl", "-s", "refusal", "-s", "compare_words:odd", "-m", "model"),
        *("--erase", "warm", "--add", "helpful=0.5", "--texts", "--max-new-tokens", "3"),
        *("-o", str(tmp_path / "made")),
    )
    assert done.exit_code == 0, done.output
    assert "against unsteered" in done.stdout
    assert "refusal" in done.stdout
    report = Report.from_json((tmp_path / "made" / "report.json").read_text())
    assert len(report["steered"].completions) == len(PROMPTS)


def test_evaluate_without_edits_or_a_folder(here: Path) -> None:
    before = tree(here)
    done = run(*EVALUATE)
    assert done.exit_code == 0, done.output
    assert "unsteered" in done.stdout
    assert tree(here) == before


BAD_SCORERS = [
    (["-s", "nothing"], "module:function"),
    (["-s", "compare_words:nobody"], "nobody"),
    (["-s", "no_such_module:odd"], "no_such_module"),
    (["-s", "compare_words:number"], "int"),
    (["-s", "compare_words:few"], "few"),
    (["-s", "compare_words:fails"], "fails"),
]


def without_scorer(words: list[str]) -> list[str]:
    at = words.index("-s")
    return [*words[:at], *words[at + 2 :]]


def check_refused(folder: Path, words: list[str], says: str) -> None:
    before = tree(folder)
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.output
    assert done.stdout == ""
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        *(([*without_scorer(EVALUATE), *scorer, "-o", "new"], says) for scorer, says in BAD_SCORERS),
        (["evaluate", "none.txt", "-m", "model", "-o", "new"], "none.txt"),
        (["evaluate", "nothing.txt", "-m", "model", "-o", "new"], "at least one"),
        (["evaluate", "broken.jsonl", "-m", "model", "-o", "new"], "line 2"),
        ([*EVALUATE, "--at-least", "nobody=0.9", "-o", "new"], "nobody"),
        ([*EVALUATE, "--at-least", "warm", "-o", "new"], "NAME=NUMBER"),
        ([*EVALUATE, "--at-least", "warm=2", "-o", "new"], "probability"),
        ([*EVALUATE, "--at-least", "helpful=0.5", "-o", "new"], "takes a concept"),
        ([*EVALUATE, "--add", "warm=1,2", "-o", "new"], "2"),
        ([*EVALUATE, "-o", "full"], "full"),
        ([*EVALUATE, "-o", "no/where"], "must exist"),
        (["evaluate", "prompts.txt", "-m", "no_model", "-o", "new"], "no_model"),
    ],
)
def test_evaluate_refuses_in_one_line(here: Path, words: list[str], says: str) -> None:
    check_refused(here, words, says)


def changed(option: str, value: str) -> list[str]:
    words = list(COMPARE)
    words[words.index(option) + 1] = value
    return [*words, "-o", "new"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        *(([*without_scorer(COMPARE), *scorer, "-o", "new"], says) for scorer, says in BAD_SCORERS),
        ([*without_scorer(COMPARE), "-o", "new"], "goal"),
        (changed("--development", "none.txt"), "none.txt"),
        (changed("--development", "shared.txt"), "both lists"),
        (changed("--development", "nothing.txt"), "development"),
        (changed("--positive", "none.txt"), "none.txt"),
        (changed("--instructions", "none.txt"), "none.txt"),
        (changed("--instructions", "nothing.txt"), "instructions"),
        (changed("--budgets", "a,b"), "0.03,0.1,0.3"),
        (changed("--budgets", ""), "0.03,0.1,0.3"),
        (changed("--budgets", "0.1,,0.3"), "0.03,0.1,0.3"),
        (changed("--budgets", "-0.1"), "Budgets"),
        (changed("--budgets", "nan"), "Budgets"),
        ([*COMPARE, "--towards", "up", "-o", "new"], "up"),
        ([*COMPARE, "--vector", "nobody", "-o", "new"], "nobody"),
        ([*COMPARE, "--vector", "warm", "-o", "new"], "preference vector"),
        ([*COMPARE, "-o", "full"], "full"),
        ([*COMPARE, "-o", "no/where"], "must exist"),
    ],
)
def test_compare_refuses_in_one_line(here: Path, words: list[str], says: str) -> None:
    check_refused(here, words, says)


@pytest.mark.parametrize("words", [COMPARE, EVALUATE])
def test_ctrl_c_leaves_nothing(here: Path, words: list[str]) -> None:
    before = tree(here)
    done = run(*without_scorer(words), "-s", "compare_words:interrupted", "-o", "new")
    assert done.exit_code == 130
    assert tree(here) == before


@pytest.mark.parametrize("word", ["compare", "evaluate"])
def test_help_shows_an_example(word: str) -> None:
    done = run(word, "--help")
    assert done.exit_code == 0
    assert "Example" in done.stdout


def test_two_scorers_of_one_function_name_are_both_there_or_refused(here: Path) -> None:
    done = run(*EVALUATE, "-s", "compare_other:odd", "--json")
    assert done.exit_code == 2 or len(set(json.loads(done.stdout)["arms"]["unsteered"]["measures"])) == 12


def test_a_scorer_of_a_broken_module_is_one_line(here: Path) -> None:
    check_refused(here, [*without_scorer(EVALUATE), "-s", "compare_broken:odd"], "compare_broken")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`compare` and `evaluate` as the command line calls them: arguments are kept, text is not written."""
    from steerkit import evaluation

    kept = SimpleNamespace(given=None, ran=False, made=None)

    def ran(*_: Any, **given: Any) -> Any:
        kept.given, kept.ran = given, True
        if kept.made is None:
            raise AmountError("ran")
        return kept.made

    monkeypatch.setattr(evaluation, "compare", ran)
    monkeypatch.setattr(evaluation, "evaluate", ran)
    return kept


def test_the_command_line_passes_the_vector_on_as_it_is(here: Path, stub: Any) -> None:
    """It is turned where the comparison is made."""
    run(*COMPARE, "--towards", "negative", "--vector", "helpful", "-o", "new")
    assert stub.given["towards"] == "negative"
    assert stub.given["vector"].amount == 1.0


@pytest.mark.parametrize("place", ["full", "no/where"])
def test_evaluate_looks_at_its_folder_first(place: str, here: Path, stub: Any) -> None:
    run(*EVALUATE, "-o", place)
    assert not stub.ran


def test_compare_looks_for_matplotlib_first(here: Path, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in sys.modules if each.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(*COMPARE, "-o", "new")
    assert not stub.ran


def of_one_prompt() -> Comparison:
    arms = {
        name: Arm({"odd": Measure((score,), (0,)), "kl": Measure((0.1,), (0,))})
        for name, score in ((UNSTEERED, 0.1), ("a", 0.4))
    }
    return Comparison(Report(arms), (Cell("one", 0.1, "a", 1.0),), "odd")


def test_compare_json_is_json_with_one_prompt(here: Path, stub: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    stub.made = of_one_prompt()

    def refuse(word: str) -> Any:
        raise ValueError(word)

    done = run(*COMPARE, "--json", "-o", str(tmp_path / "made"))
    assert done.exit_code == 0, done.output
    json.loads(done.stdout, parse_constant=refuse)


def test_what_has_no_interval_is_shown_so(here: Path) -> None:
    done = run("evaluate", "one.txt", "-s", "compare_words:odd", "-m", "model", "--max-new-tokens", "3")
    assert done.exit_code == 0, done.output
    assert "nan" in done.stdout


def test_compare_json_tells_what_was_spent(here: Path, stub: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    stub.made = of_one_prompt()
    done = run(*COMPARE, "--json", "-o", str(tmp_path / "made"))
    assert done.exit_code == 0, done.output
    assert all(cell["spent"][0] > 0 for cell in json.loads(done.stdout)["cells"])


def test_the_report_is_not_changed_by_reading_it(up: Run) -> None:
    before = copy.deepcopy(up.made.report.to_json())
    up.made.table()
    up.made.effects()
    assert up.made.report.to_json() == before


def test_blended_at_the_ends() -> None:
    from steerkit.passes import blended

    plain, there = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    torch.testing.assert_close(blended(plain, there, 0.0), F.log_softmax(plain, dim=-1))
    torch.testing.assert_close(blended(plain, there, 1.0), F.log_softmax(there, dim=-1))
    # shifts of either's logits change nothing
    torch.testing.assert_close(blended(plain + 5, there - 3, 0.3), blended(plain, there, 0.3), atol=1e-5, rtol=1e-5)
