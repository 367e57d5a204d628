"""`evaluate`: its figures against an independent computation, and what it leaves behind: nothing."""

import copy
import functools
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    DEPTH,
    SPECIAL,
    VOCABULARY,
    random_addition,
    random_constraint,
    random_erasure,
    random_vector,
    tiny_model,
    tiny_tokenizer,
    tokenizer_of,
)
from torch import Tensor, nn

from steerkit import Concept, Controller, Report, evaluate
from steerkit.errors import AmountError, SamplesError, ScorerError, TextsError
from steerkit.evaluation.scorers import refusal
from steerkit.model import find_decoder
from steerkit.types import POSITIONS

PROMPTS = ["w1 w2 w3 w4 w5 w6 w7", "w8", "w9 w10 w11", "w12 w13 w14 w15 w16"]
NEW = 6
BARE: dict[str, Any] = {"neutral": (), "task": (), "max_new_tokens": NEW}
"""Without the texts that are shipped."""


class Written:
    """What `generate` wrote, by row: the prompt without padding, the new tokens up to and with the first end, the logits."""

    def __init__(self, model: Any) -> None:
        self.prompts: list[list[int]] = []
        self.new: list[list[int]] = []
        self.logits: list[Tensor] = []
        self.scores: list[Tensor] = []
        original = model.generate

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Tensor:
            out = original(*args, **kwargs, return_dict_in_generate=True, output_logits=True, output_scores=True)
            ids = kwargs.get("inputs", args[0] if args else None)
            config, mask = kwargs["generation_config"], kwargs["attention_mask"]
            ends = config.eos_token_id
            ends = [ends] if isinstance(ends, int) else list(ends or [])
            rows = len(out.sequences) // len(ids)
            for row, sequence in enumerate(out.sequences.tolist()):
                new = sequence[ids.shape[1] :]
                stop = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
                self.prompts.append(ids[row // rows][mask[row // rows].bool()].tolist())
                self.new.append(new[:stop])
                self.logits.append(torch.stack([step[row] for step in out.logits[:stop]]))
                self.scores.append(torch.stack([step[row] for step in out.scores[:stop]]))
            return out.sequences

        model.generate = generate


def plain_logits(plain: Any, prompt: Sequence[int], new: Sequence[int]) -> Tensor:
    """The unsteered model on one row, no padding, no cache."""
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([[*prompt, *new]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1]


def divergence(steered: Tensor, plain: Tensor) -> Tensor:
    """KL(steered || plain) at each token, in float64."""
    here, there = (F.softmax(logits.double(), dim=-1) for logits in (steered, plain))
    return (here * (here.log() - there.log())).sum(dim=-1)


def expected(written: Written, plain: Any) -> dict[str, list[float]]:
    """The panel by row, computed another way."""
    found: dict[str, list[float]] = {"kl": [], "perplexity": [], "entropy": [], "length": []}
    for prompt, new, steered in zip(written.prompts, written.new, written.logits, strict=True):
        there = plain_logits(plain, prompt, new)
        found["kl"].append(float(divergence(steered, there).mean()))
        found["perplexity"].append(-float(there.log_softmax(-1)[range(len(new)), new].mean()))
        here = steered.softmax(-1)
        found["entropy"].append(-float((here * here.log()).sum(-1).mean()))
        found["length"].append(float(len(new)))
    return found


def agrees(report: Report, arm: str, written: Written, plain: Any, tolerance: float = 2e-4) -> None:
    """Every row of the panel, and its mean over tokens."""
    wanted = expected(written, plain)
    for key in ("kl", "perplexity", "entropy", "length"):
        values = report[arm].measures[key].values
        assert values == pytest.approx(wanted[key], abs=tolerance, rel=2e-3), key
    lengths = wanted["length"]
    mean = sum(kl * n for kl, n in zip(wanted["kl"], lengths, strict=True)) / sum(lengths)
    assert report[arm]["kl"].value == pytest.approx(mean, abs=tolerance, rel=2e-3)
    mean = sum(nll * n for nll, n in zip(wanted["perplexity"], lengths, strict=True)) / sum(lengths)
    assert report[arm]["perplexity"].value == pytest.approx(math.exp(mean), rel=2e-3)
    assert report[arm]["kl_p90"].value == pytest.approx(np.quantile(wanted["kl"], 0.9), abs=tolerance, rel=2e-3)


def goes_on(report: Report, arm: str, written: Written, tokenizer: Any) -> None:
    """Prompt and completion are the text of the tokens that were written."""
    for row, text in enumerate(report[arm].completions):
        shown = [token for token in written.new[row] if token not in tokenizer.all_special_ids]
        assert tokenizer(report[arm].prompts[row] + text)["input_ids"] == written.prompts[row] + shown


@contextmanager
def passes(model: Any) -> Iterator[list[int]]:
    """Count forward passes through the blocks, once the model is known."""
    count: list[int] = []
    handle = find_decoder(model).owner.register_forward_pre_hook(lambda *_: count.append(1))
    try:
        yield count
    finally:
        handle.remove()


def ones(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [1.0] * len(completions)


def words(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [float(len(text.split())) for text in completions]


# ---------------------------------------------------------------------------------------------- nothing costs nothing


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unsteered_is_exactly_free(name: str, dtype: torch.dtype, tokenizer: Any) -> None:
    model = tiny_model(name).to(dtype)
    report = evaluate(model, tokenizer, PROMPTS, neutral=["w1 w2 w3", "w4 w5"], task=(), max_new_tokens=NEW)
    assert list(report) == ["unsteered"]
    arm = report["unsteered"]
    for key in ("kl", "kl_p90", "displacement", "collateral"):
        assert set(arm.measures[key].values) == {0.0}
        assert tuple(arm[key]) == (0.0, 0.0, 0.0)
    assert len(arm.prompts) == len(arm.completions) == len(PROMPTS)


def off(model: Any) -> dict[str, Any]:
    vector = random_vector(model)
    rows = torch.zeros(len(PROMPTS))
    return {
        "addition": [random_addition(layers=(0, 2), magnitude=0.0)],
        "by sample": [random_addition(layers=(0, 2), magnitude=rows), vector.add(rows)],
        "bounds": [random_constraint(layers=(1,), at_most=1.0), random_constraint(layers=(2,), at_least=0.0, name="b")],
        "erasure": [random_erasure(layers=(1,), amount=0.0)],
        "vector": [vector.add(0.0)],
        "fold": [vector.add(0.0)],
    }


@pytest.mark.parametrize("kind", ["addition", "by sample", "bounds", "erasure", "vector", "fold"])
def test_what_is_off_is_exactly_free(kind: str, model: Any, tokenizer: Any) -> None:
    plain = evaluate(model, tokenizer, PROMPTS, **BARE)
    with Controller(model, off(model)[kind], fold=kind == "fold"):
        steered = evaluate(model, tokenizer, PROMPTS, **BARE)
    assert set(steered["steered"].measures["kl"].values) == {0.0}
    report = Report.join(plain, steered)
    assert report["steered"].completions == report["unsteered"].completions
    assert tuple(report.difference("perplexity", "steered", "unsteered")) == (1.0, 1.0, 1.0)
    assert all(
        tuple(each) == (0.0, 0.0, 0.0)
        for k, each in report.figures("unsteered")["steered"].items()
        if k != "perplexity"
    )


# --------------------------------------------------------------------------------------------------- the budget is true


def edits(model: Any, kind: str, positions: Any) -> list[Any]:
    every = torch.tensor([0.0, 6.0, -6.0, 3.0])
    bounds = torch.tensor([0.0, 0.99, 0.5, 0.999])
    made: dict[str, Any] = {
        "addition": lambda: [random_addition(layers=(0, 2), magnitude=5.0, positions=positions)],
        "constraint": lambda: [random_constraint(layers=(1, 3), at_least=0.999, positions=positions)],
        "erasure": lambda: [random_erasure(layers=(0, 1, 2), positions=positions)],
        "vector": lambda: [random_vector(model).add(0.5)],
        "all": lambda: [
            random_addition(layers=(0, 2), magnitude=every, positions=positions),
            random_constraint(layers=(1, 3), at_least=bounds, positions=positions),
            random_erasure(layers=(2,), positions=positions, seed=4),
            random_vector(model).add(every / 20),
        ],
    }
    return made[kind]()


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", ["addition", "constraint", "erasure", "vector", "all"])
def test_kl_is_that_of_the_steered_generation(kind: str, positions: str, model: Any, tokenizer: Any) -> None:
    plain = copy.deepcopy(model)
    written = Written(model)
    with Controller(model, edits(model, kind, positions)):
        report = evaluate(model, tokenizer, PROMPTS, **BARE)
    assert written.prompts == [tokenizer(text)["input_ids"] for text in PROMPTS]
    goes_on(report, "steered", written, tokenizer)
    assert report["steered"]["kl"].value > 0.01
    agrees(report, "steered", written, plain)


@pytest.fixture(scope="module")
def warm() -> Concept:
    """A concept that the first half of WARM shows."""
    sides = [[f"w{i} w{i + 1} w{word}" for i in range(20)] for word in (60, 61)]
    return Concept.fit("warm", tiny_model("llama"), tiny_tokenizer(), positive=sides[0], negative=sides[1])


WARM = ["w30 w31 w60", "w7 w8 w9 w60", "w33 w34 w61", "w2 w3 w4 w61"]


@pytest.mark.parametrize("kind", ["addition", "constraint", "vector", "scaled"])
def test_a_condition_s_rows_are_those_of_the_edit_and_the_others_free(
    kind: str, warm: Concept, model: Any, tokenizer: Any
) -> None:
    layer = warm.best_layer
    gate = warm.reads(at_least=0.5, layer=layer)
    edit: Any = {
        "addition": lambda: warm.add(6.0, layers=[layer]),
        "constraint": lambda: warm.constrain(at_most=0.01, layers=[layer]),
        "vector": lambda: random_vector(model).add(0.5),
        "scaled": lambda: warm.add(warm.reads(layer=layer).scaled(0.0, 6.0), layers=[layer]),
    }[kind]()
    plain = copy.deepcopy(model)
    written = Written(model)
    with Controller(model, [edit if kind == "scaled" else edit.when(gate)]):
        found = evaluate(model, tokenizer, WARM, **BARE)["steered"]
    agrees(Report({"steered": found}), "steered", written, plain)
    kl, moved = (found.measures[key].values for key in ("kl", "displacement"))
    assert min(kl[:2]) > 0.001
    assert min(moved[:2]) > 0.001
    if kind != "scaled":
        assert kl[2:] == moved[2:] == (0.0, 0.0)


def test_a_condition_reads_the_whole_of_a_neutral_text(warm: Concept, model: Any, tokenizer: Any) -> None:
    layer = warm.best_layer
    edit = warm.add(6.0, layers=[layer])

    def collateral(intervention: Any) -> tuple[float, ...]:
        with Controller(model, [intervention]):
            found = evaluate(model, tokenizer, WARM, neutral=WARM, task=(), max_new_tokens=1)
        return found["steered"].measures["collateral"].values

    always = collateral(edit)
    assert min(always) > 0.001
    assert collateral(edit.when(warm.reads(at_least=0.5, layer=layer))) == pytest.approx((*always[:2], 0.0, 0.0))


def test_a_completion_keeps_the_space_that_it_begins_with(model: Any) -> None:
    """Decoders of Llama 2 and Mistral strip it from what they take for the start of a text."""
    from tokenizers import decoders, pre_tokenizers

    words = (f"\u2581w{i}" for i in range(VOCABULARY - len(SPECIAL)))
    tokenizer = tokenizer_of(words, pre_tokenizers.Metaspace(prepend_scheme="first"))
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    written = Written(model)
    report = evaluate(model, tokenizer, PROMPTS, **BARE)
    assert all(report["unsteered"].completions)
    goes_on(report, "unsteered", written, tokenizer)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "mistral", "gemma3", "mixtral"])
def test_kl_on_other_architectures(name: str, tokenizer: Any) -> None:
    model = tiny_model(name)
    plain = copy.deepcopy(model)
    written = Written(model)
    with Controller(model, edits(model, "all", "last")):
        report = evaluate(model, tokenizer, PROMPTS, **BARE)
    agrees(report, "steered", written, plain, tolerance=2e-3)


def test_kl_where_the_vector_is_written_into_the_weights(model: Any, tokenizer: Any) -> None:
    plain = copy.deepcopy(model)
    written = Written(model)
    with Controller(model, [random_vector(model, full=True).add(0.3)], fold=True):
        report = evaluate(model, tokenizer, PROMPTS, **BARE)
    assert report["steered"]["kl"].value > 0.01
    agrees(report, "steered", written, plain)


def test_nested_controllers_all_count(model: Any, tokenizer: Any) -> None:
    plain = copy.deepcopy(model)
    written = Written(model)
    with (
        Controller(model, [random_vector(model).add(0.2)], fold=True),
        Controller(model, [random_addition(layers=(1,), magnitude=torch.tensor([4.0, 0.0, -4.0, 2.0]))]),
        Controller(model, [random_constraint(layers=(2,), at_least=0.99)], record_magnitudes=True),
    ):
        report = evaluate(model, tokenizer, PROMPTS, batch_size=2, **BARE)
    agrees(report, "steered", written, plain)


def test_recording_changes_no_figure(model: Any, tokenizer: Any) -> None:
    found = []
    for recording in (False, True):
        with Controller(model, edits(model, "all", "last"), record_magnitudes=recording) as control:
            found.append(evaluate(model, tokenizer, PROMPTS, batch_size=3, **BARE))
            if recording:
                assert control.magnitudes.keys() == {"added", "bounded", "erased", "helpful"}
    assert found[0]["steered"].completions == found[1]["steered"].completions
    for key, measure in found[0]["steered"].measures.items():
        assert measure.values == pytest.approx(found[1]["steered"].measures[key].values, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_peft_model_is_its_own_base(tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
    model.eval()
    base = tiny_model("llama")
    plain = copy.deepcopy(model)
    assert (
        float((plain(torch.tensor([[5, 6]])).logits - base(torch.tensor([[5, 6]])).logits).detach().abs().max()) > 0.1
    )
    free = evaluate(model, tokenizer, PROMPTS, **BARE)
    assert set(free["unsteered"].measures["kl"].values) == {0.0}
    written = Written(model.get_base_model())
    model.train()  # dropout would make every pass another
    with Controller(model, [random_addition(layers=(1,), magnitude=5.0)]):
        report = evaluate(model, tokenizer, PROMPTS, **BARE)
    agrees(report, "steered", written, plain)
    assert model.training


@pytest.mark.parametrize("ends", [list(range(3, 60)), list(range(60, 99)), 7])
@pytest.mark.parametrize("pad", [5])
def test_rows_end_at_their_first_end_token(ends: Any, pad: int, model: Any, tokenizer: Any) -> None:
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = pad
    plain = copy.deepcopy(model)
    written = Written(model)
    with Controller(model, [random_addition(layers=(1,), magnitude=3.0, positions="last")]):
        report = evaluate(model, tokenizer, PROMPTS, samples=3, neutral=(), task=(), max_new_tokens=10)
    lengths = report["steered"].measures["length"].values
    assert lengths == tuple(float(len(new)) for new in written.new)
    if ends != 7:
        assert min(lengths) < max(lengths)
    goes_on(report, "steered", written, tokenizer)
    agrees(report, "steered", written, plain)


def test_the_tokenizer_s_end_counts_where_the_model_names_none(model: Any, tokenizer: Any) -> None:
    assert model.generation_config.eos_token_id is None
    tokenizer.eos_token = "w20"
    end = tokenizer.eos_token_id
    row = F.normalize(model.lm_head.weight[end].detach(), dim=0)
    push = random_addition(layers=(DEPTH - 1,), magnitude=6.0)
    push.directions[DEPTH - 1].copy_(row)
    written = Written(model)
    with Controller(model, [push]):
        report = evaluate(model, tokenizer, PROMPTS, samples=2, neutral=(), task=(), max_new_tokens=12)
    lengths = report["steered"].measures["length"].values
    assert min(lengths) < 12
    assert all(new[-1] == end or len(new) == 12 for new in written.new)
    assert all(end not in new[:-1] for new in written.new)


def test_a_row_of_one_token(model: Any, tokenizer: Any) -> None:
    model.generation_config.eos_token_id = list(range(VOCABULARY))
    with Controller(model, [random_addition(magnitude=4.0)]):
        report = evaluate(model, tokenizer, PROMPTS, **BARE)
    assert set(report["steered"].measures["length"].values) == {1.0}
    assert all(math.isfinite(each.value) for each in report.figures()["steered"].values())


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    batch_size=st.integers(1, 6),
    new=st.integers(1, 7),
    seed=st.integers(0, 1000),
    positions=st.sampled_from(POSITIONS),
    by_sample=st.booleans(),
    ending=st.booleans(),
)
def test_kl_whatever_the_prompts_are(
    lengths: list[int], batch_size: int, new: int, seed: int, positions: Any, by_sample: bool, ending: bool
) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    if ending:
        model.generation_config.eos_token_id = list(range(2, 20))
    plain = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    prompts = [" ".join(f"w{int(i)}" for i in torch.randint(0, 95, (n,), generator=generator)) for n in lengths]
    amount: Any = 6 * torch.randn(len(lengths), generator=generator) if by_sample else 5.0
    written = Written(model)
    # a layer below the last: what is edited at the prompt shows in later tokens
    with Controller(
        model, [random_addition(layers=(1,), magnitude=amount), random_erasure(layers=(2,), positions=positions)]
    ):
        report = evaluate(
            model, tokenizer, prompts, batch_size=batch_size, seed=seed, neutral=(), task=(), max_new_tokens=new
        )
    assert written.prompts == [tokenizer(text)["input_ids"] for text in prompts]
    agrees(report, "steered", written, plain)


# ---------------------------------------------------------------------------------------------- the panel, planted truths


def test_displacement_of_one_addition_is_its_share_of_the_residual_norm(model: Any, tokenizer: Any) -> None:
    plain = copy.deepcopy(model)
    written = Written(model)
    with Controller(model, [random_addition(layers=(2,), magnitude=3.0)]):
        report = evaluate(model, tokenizer, PROMPTS, **BARE)
    wanted = []
    for prompt, new in zip(written.prompts, written.new, strict=True):
        kept: list[Tensor] = []
        handle = plain.model.layers[2].register_forward_hook(
            lambda m, a, o, k=kept: k.append(o if isinstance(o, Tensor) else o[0])
        )
        plain_logits(plain, prompt, new)
        handle.remove()
        wanted.append(float((3.0 / kept[0][0, len(prompt) - 1 : -1].norm(dim=-1)).mean()))
    assert report["steered"].measures["displacement"].values == pytest.approx(wanted, rel=1e-3)


def test_a_text_of_one_token_repeats_itself(model: Any, tokenizer: Any) -> None:
    row = F.normalize(model.lm_head.weight[20].detach() * model.model.norm.weight.detach(), dim=0)
    push = random_addition(layers=(DEPTH - 1,), magnitude=500.0)
    push.directions[DEPTH - 1].copy_(row)
    with Controller(model, [push]):
        report = evaluate(model, tokenizer, PROMPTS, neutral=(), task=(), max_new_tokens=12, temperature=0)
    arm = report["steered"]
    assert set(arm.completions) == {" w16" * 12}
    assert arm["repetition"].value == pytest.approx(8 / 9)  # 9 runs of four, one of them new
    assert arm["distinct_2"].value == pytest.approx(1 / 11)
    assert arm["kl"].value > 1


def test_collateral_is_the_kl_on_the_given_texts(model: Any, tokenizer: Any) -> None:
    plain = copy.deepcopy(model)
    texts = ["w1 w2", "w30 w31 w32 w33 w34 w35", "w7 w8 w9"]
    total, tokens = 0.0, 0
    with Controller(model, [random_addition(layers=(1,), magnitude=4.0), random_vector(model).add(0.3)]):
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            with torch.no_grad():
                here = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
            total += float(divergence(here, plain_logits(plain, ids[:1], ids[1:])).sum())
            tokens += len(ids) - 1
        found = [
            evaluate(model, tokenizer, PROMPTS[:1], neutral=texts, task=(), max_new_tokens=1, batch_size=n)
            for n in (1, 2, 32)
        ]
    for report in found:
        assert report["steered"]["collateral"].value == pytest.approx(total / tokens, rel=1e-3)
        assert len(report["steered"].measures["collateral"]) == 3


def greedy(model: Any, tokenizer: Any, text: str, count: int) -> list[int]:
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("magnitude", [0.0, 5.0])
def test_a_task_whose_right_option_is_the_greedy_token_is_solved(magnitude: float, model: Any, tokenizer: Any) -> None:
    with Controller(model, [random_addition(layers=(1,), magnitude=magnitude)]):
        task: list[dict[str, Any]] = []
        for index, question in enumerate(PROMPTS):
            best = greedy(model, tokenizer, question, 1)[0]
            wrong = [f"w{(best - 4 + step) % 95}" for step in (1, 2, 3)]
            options = [*wrong[: index % 4], f"w{best - 4}", *wrong[index % 4 :]]
            task.append({"question": question, "options": options, "answer": index % 4})
        right = evaluate(model, tokenizer, PROMPTS, neutral=(), task=task, max_new_tokens=1, batch_size=3)
        other = [{**one, "answer": (one["answer"] + 1) % 4} for one in task]
        wrong_report = evaluate(model, tokenizer, PROMPTS, neutral=(), task=other, max_new_tokens=1)
    assert right["steered"]["task"].value == 1.0
    assert wrong_report["steered"]["task"].value == 0.0
    assert right["steered"].measures["task"].kind == "damage"


def test_options_are_ranked_by_the_mean_over_their_tokens(model: Any, tokenizer: Any) -> None:
    generator = random.Random(1)
    task = [
        {
            "question": " ".join(f"w{generator.randrange(95)}" for _ in range(generator.randint(1, 6))),
            "options": [
                " ".join(f"w{generator.randrange(95)}" for _ in range(generator.randint(1, 5))) for _ in range(3)
            ],
            "answer": generator.randrange(3),
        }
        for _ in range(12)
    ]
    wanted = []
    for one in task:
        means = []
        for option in one["options"]:
            prompt, new = tokenizer(one["question"])["input_ids"], tokenizer(option)["input_ids"]
            means.append(float(plain_logits(model, prompt, new).log_softmax(-1)[range(len(new)), new].mean()))
        wanted.append(float(means.index(max(means)) == one["answer"]))
    for size in (1, 5, 64):
        report = evaluate(model, tokenizer, PROMPTS[:1], neutral=(), task=task, max_new_tokens=1, batch_size=size)
        assert report["unsteered"].measures["task"].values == tuple(wanted)


def test_prompts_to_refuse_are_counted_apart(model: Any, tokenizer: Any) -> None:
    report = evaluate(model, tokenizer, PROMPTS, harmful=["w1", "w2 w3", "w4"], harmless=["w5"], samples=2, **BARE)
    arm = report["unsteered"]
    assert (len(arm.measures["refusal"]), arm.measures["refusal"].kind) == (6, "effect")
    assert (len(arm.measures["over_refusal"]), arm.measures["over_refusal"].kind) == (2, "damage")
    assert arm["refusal"].value == 0.0
    assert len(arm.completions) == 2 * len(PROMPTS)


# ------------------------------------------------------------------------------------------ batches, seeds, samples, chats


def sample_amounts(model: Any, rows: Any) -> list[Any]:
    amounts, bounds = torch.tensor([0.0, 6.0, -6.0, 3.0]), torch.tensor([0.0, 0.99, 0.5, 0.999])
    return [
        random_addition(layers=(0, 2), magnitude=amounts[rows]),
        random_constraint(layers=(1, 3), at_least=bounds[rows]),
        random_vector(model).add(amounts[rows] / 20),
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_amounts_by_sample_follow_their_prompts(batch_size: int, model: Any, tokenizer: Any) -> None:
    with Controller(model, sample_amounts(model, [0, 1, 2, 3])):
        report = evaluate(model, tokenizer, PROMPTS, temperature=0, batch_size=batch_size, max_new_tokens=NEW)
    assert "collateral" not in report.measures
    assert "task" not in report.measures
    for row, prompt in enumerate(PROMPTS):
        with Controller(model, sample_amounts(model, row)):
            alone = evaluate(model, tokenizer, [prompt], temperature=0, **BARE)
        assert alone["steered"].completions == report["steered"].completions[row : row + 1]
        for key in ("kl", "perplexity", "entropy", "displacement", "length"):
            wanted = alone["steered"].measures[key].values[0]
            assert report["steered"].measures[key].values[row] == pytest.approx(wanted, abs=2e-4, rel=1e-3)
    assert report["steered"].measures["kl"].values[0] == 0.0


@pytest.mark.parametrize(("samples", "batch_size"), [(2, 1), (2, 4), (3, 6), (2, 32)])
def test_amounts_by_sample_with_several_samples_a_prompt(
    samples: int, batch_size: int, model: Any, tokenizer: Any
) -> None:
    plain = copy.deepcopy(model)
    written = Written(model)
    with Controller(model, sample_amounts(model, [3, 2, 1, 0])):
        report = evaluate(model, tokenizer, PROMPTS, samples=samples, batch_size=batch_size, **BARE)
    assert written.prompts == [tokenizer(text)["input_ids"] for text in PROMPTS for _ in range(samples)]
    assert report["steered"].prompts == tuple(text for text in PROMPTS for _ in range(samples))
    agrees(report, "steered", written, plain)
    assert report["steered"].measures["kl"].values[-samples:] == (0.0,) * samples


@pytest.mark.parametrize("samples", [2, 3])
def test_several_samples_a_prompt_with_one_amount(samples: int, model: Any, tokenizer: Any) -> None:
    plain = copy.deepcopy(model)
    written = Written(model)
    with Controller(model, edits(model, "addition", "last")):
        report = evaluate(model, tokenizer, PROMPTS, samples=samples, batch_size=5, scorers=words, **BARE)
    measure = report["steered"].measures["words"]
    assert measure.clusters == tuple(index for index in range(len(PROMPTS)) for _ in range(samples))
    assert measure.values == tuple(float(len(text.split())) for text in report["steered"].completions)
    assert len(set(report["steered"].completions)) > len(PROMPTS)
    agrees(report, "steered", written, plain)


@settings(max_examples=5, deadline=None)
@given(batch_size=st.integers(2, 12), count=st.integers(1, 7), seed=st.integers(0, 99))
def test_greedy_text_does_not_depend_on_batches(batch_size: int, count: int, seed: int) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    generator = random.Random(seed)
    prompts = [" ".join(f"w{generator.randrange(95)}" for _ in range(generator.randint(1, 8))) for _ in range(count)]
    task = [{"question": "w1 w2", "options": ["w3", "w4 w5"], "answer": 0}]
    given_: dict[str, Any] = {
        "scorers": words,
        "temperature": 0,
        "max_new_tokens": NEW,
        "task": task,
        "harmful": prompts,
    }
    given_["neutral"] = ["w1 w2 w3", "w4 w5 w6 w7", "w8 w9"]
    with Controller(model, [random_addition(magnitude=4.0), random_constraint(layers=(2,), at_least=0.99)]):
        found = [evaluate(model, tokenizer, prompts, batch_size=n, **given_)["steered"] for n in (1, batch_size)]
    for other in found[1:]:
        assert other.completions == found[0].completions
        assert other.measures.keys() == found[0].measures.keys()
        for key, measure in found[0].measures.items():
            assert other.measures[key].values == pytest.approx(measure.values, abs=2e-4, rel=1e-3), key


def test_the_seed_is_all_there_is_to_chance(model: Any, tokenizer: Any) -> None:
    given_: dict[str, Any] = {"scorers": words, "samples": 2, "batch_size": 4, "harmful": PROMPTS, **BARE}
    found = []
    for seed, state in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(state)
        np.random.seed(state)
        random.seed(state)
        with Controller(model, [random_addition(magnitude=4.0)]):
            found.append(evaluate(model, tokenizer, PROMPTS, seed=seed, **given_))
    same, again, other = (report["steered"] for report in found)
    assert same.completions == again.completions
    assert same.completions != other.completions
    assert same.measures == again.measures
    assert len(set(same.completions)) > len(PROMPTS)


def test_batches_of_equal_prompts_draw_other_texts(model: Any, tokenizer: Any) -> None:
    report = evaluate(model, tokenizer, ["w1 w2 w3"] * 8, batch_size=1, neutral=(), task=(), max_new_tokens=12)
    assert len(set(report["unsteered"].completions)) > 1


def test_the_text_is_drawn_from_the_model_s_distribution(model: Any, tokenizer: Any) -> None:
    count = 400
    report = evaluate(model, tokenizer, ["w1 w2 w3"] * count, batch_size=400, neutral=(), task=(), max_new_tokens=1)
    with torch.no_grad():
        wanted = model(torch.tensor([tokenizer("w1 w2 w3")["input_ids"]])).logits[0, -1].softmax(-1)
    token = int(wanted.argmax())
    share = sum(text.strip() == tokenizer.decode([token]) for text in report["unsteered"].completions) / count
    assert share == pytest.approx(float(wanted[token]), abs=4 * math.sqrt(0.25 / count))


DEFAULTS = {
    "top_k": 1,
    "top_p": 0.1,
    "temperature": 0.01,
    "repetition_penalty": 3.0,
    "num_return_sequences": 3,
    "max_length": 4,
    "use_cache": False,
    "min_p": 0.5,
    "typical_p": 0.2,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "top_h": 0.1,
    "no_repeat_ngram_size": 1,
    "num_beams": 2,
    "encoder_repetition_penalty": 2.0,
    "sequence_bias": [[[5], 10.0]],
    "forced_eos_token_id": 2,
    "guidance_scale": 2.0,
    "return_dict_in_generate": True,
}


LEAKING = dict.fromkeys(
    list(DEFAULTS)[list(DEFAULTS).index("min_p") :],
    "generate fills what the passed GenerationConfig leaves unset from the model's own: not the whole distribution",
)


@pytest.mark.parametrize("key", DEFAULTS)
def test_the_model_s_own_generation_settings_change_nothing(key: str, model: Any, tokenizer: Any) -> None:
    wanted = evaluate(model, tokenizer, PROMPTS, **BARE)
    setattr(model.generation_config, key, DEFAULTS[key])
    before = model.generation_config.to_dict()
    found = evaluate(model, tokenizer, PROMPTS, **BARE)
    assert model.generation_config.to_dict() == before
    assert found["unsteered"].completions == wanted["unsteered"].completions


def test_chats_are_prompts(model: Any) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    chats = [
        [{"role": "user", "content": "w5 w6 w7"}],
        [{"role": "user", "content": "w8"}, {"role": "assistant", "content": "w9"}, {"role": "user", "content": "w10"}],
    ]
    seen: list[Any] = []

    def look(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        seen.extend(prompts)
        return [0.0] * len(completions)

    plain = copy.deepcopy(model)
    kept = copy.deepcopy(chats)
    written = Written(model)
    with Controller(model, [random_addition(magnitude=4.0)]):
        report = evaluate(model, tokenizer, chats, scorers=look, **BARE)
    rendered = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    assert written.prompts == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    assert seen == chats == kept
    assert report["steered"].prompts == ("w5 w6 w7", "w10")
    agrees(report, "steered", written, plain)


# --------------------------------------------------------------------------------------------------- nothing is left behind


def backend(tokenizer: Any) -> Any:
    return tokenizer.backend_tokenizer.to_str()


def shape_of(model: Any) -> dict[str, Any]:
    """All that may differ between two models of one kind, tensors apart."""
    found: dict[str, Any] = {"generation": model.generation_config.to_dict(), "config": model.config.to_dict()}
    for name, module in model.named_modules():
        found[name] = (
            module.training,
            sorted(module.__dict__),
            {key: list(value) for key, value in module.__dict__.items() if key.endswith("hooks")},
            module.__dict__.get("generate"),
        )
    return found


def snapshot(model: Any, tokenizer: Any) -> tuple[Any, ...]:
    outer = {k: v for k, v in tokenizer.__dict__.items() if k not in ("_tokenizer",)}
    return (
        shape_of(model),
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        backend(tokenizer),
        copy.deepcopy(outer),
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    )


def same(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    for index in (0, 2, 3, 6, 7):
        assert before[index] == after[index], index
    assert repr(before[4]) == repr(after[4])
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(value, after[1][name]) for name, value in before[1].items())
    assert torch.equal(before[5], after[5])


class Stop(BaseException):
    pass


def failing(error: BaseException | None) -> Any:
    def score(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        if error is not None:
            raise error
        return [0.0] * len(completions)

    return score


def probe_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 15).reshape(4, 3), use_cache=False).logits


@pytest.mark.parametrize("error", [None, RuntimeError("no"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("fold", [False, True])
def test_everything_is_left_as_it_was(error: Any, fold: bool, model: Any) -> None:
    tokenizer = tiny_tokenizer(pad=True, chat=True)
    model.train()
    model.model.layers[1].eval()
    model.model.layers[2].mlp.eval()
    outer = snapshot(model, tokenizer)
    plain = probe_logits(model)
    vector = random_vector(model)
    amounts = torch.tensor([0.0, 6.0, -6.0, 3.0])
    made = [
        random_addition(magnitude=amounts),
        random_constraint(layers=(2,)),
        vector.add(0.3 if fold else amounts / 20),
    ]
    with Controller(model, made, fold=fold) as control:
        inner = snapshot(model, tokenizer)
        steered = probe_logits(model)
        wanted = {None: nullcontext()}.get(error) or pytest.raises(
            ScorerError if isinstance(error, Exception) else type(error)
        )
        with wanted:
            evaluate(model, tokenizer, PROMPTS, scorers={"s": failing(error)}, batch_size=3, samples=1, **BARE)
        same(inner, snapshot(model, tokenizer))
        assert torch.equal(probe_logits(model), steered)
        assert not torch.equal(steered, plain)
        with control.using(added=0.0):
            assert not torch.equal(probe_logits(model), steered)
    assert torch.equal(probe_logits(model), plain)
    same(outer, snapshot(model, tokenizer))


@pytest.mark.parametrize("fold", [False, True])
def test_an_interrupt_in_any_pass_leaves_everything_as_it_was(fold: bool, model: Any, tokenizer: Any) -> None:
    find_decoder(model)
    outer = snapshot(model, tokenizer)
    made = [random_vector(model).add(0.3)] if fold else sample_amounts(model, [0, 1, 2, 3])
    task = [{"question": "w1", "options": ["w2", "w3 w4"], "answer": 0}]
    more: dict[str, Any] = {"neutral": ["w1 w2 w3"], "task": task} if fold else {"neutral": (), "task": ()}

    class Counted(nn.Module):
        """Raises at the nth call."""

        def __init__(self, last: int) -> None:
            super().__init__()
            self.left = last

        def __call__(self, *_: Any) -> None:
            self.left -= 1
            if self.left == 0:
                raise Stop

    with Controller(model, made, fold=fold):
        inner = snapshot(model, tokenizer)
        steered = probe_logits(model)
        for last in range(1, 40):
            counted = Counted(last)
            handle = model.lm_head.register_forward_hook(lambda *_, c=counted: c())
            try:
                evaluate(model, tokenizer, PROMPTS, batch_size=2, max_new_tokens=3, **more)
            except Stop:
                stopped = True
            else:
                stopped = False
            handle.remove()
            if last % 6 == 1 or not stopped:
                same(inner, snapshot(model, tokenizer))
            assert torch.equal(probe_logits(model), steered)
            if not stopped:
                break
        assert last > 8
        assert not stopped
    same(outer, snapshot(model, tokenizer))


@pytest.mark.parametrize("where", ["prompts", "task"])
def test_the_tokenizer_keeps_its_padding_and_truncation(where: str, model: Any, tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.enable_padding(length=12, pad_id=0, pad_token="<pad>")
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    before = snapshot(model, tokenizer)
    given_ = {**BARE, "task": [{"question": "w1", "options": ["w2", "w3"], "answer": 0}] if where == "task" else ()}
    report = evaluate(model, tokenizer, PROMPTS, **given_)
    assert report["unsteered"].prompts == tuple(PROMPTS)
    assert backend(tokenizer) == before[3]


# ------------------------------------------------------------------------------------------------------------- bad input


class Nameless:
    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        return ones(prompts, completions)


def named(name: str) -> Any:
    def score(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        return ones(prompts, completions)

    score.__name__ = name
    return score


LONG = " ".join(["w1"] * 125)
QUESTION = {"question": "w1", "options": ["w2", "w3"], "answer": 0}
PANEL = ("kl", "kl_p90", "perplexity", "entropy", "repetition", "distinct_2", "length", "displacement")

EARLY: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "no prompts": (TextsError, {"prompts": []}),
    "a string": (TextsError, {"prompts": "w1 w2"}),
    "a number among prompts": (TextsError, {"prompts": ["w1", 3]}),
    "None among prompts": (TextsError, {"prompts": [None]}),
    "an empty prompt": (TextsError, {"prompts": ["w1", ""]}),
    "a generator": (TextsError, {"prompts": (text for text in PROMPTS)}),
    "messages without a conversation": (TextsError, {"prompts": [{"role": "user", "content": "w1"}]}),
    "chats without a template": (TextsError, {"prompts": [[{"role": "user", "content": "w1"}]]}),
    "a long prompt": (TextsError, {"prompts": ["w1", LONG]}),
    "many new tokens": (TextsError, {"max_new_tokens": 128}),
    "no new tokens": (AmountError, {"max_new_tokens": 0}),
    "negative new tokens": (AmountError, {"max_new_tokens": -3}),
    "half a token": (AmountError, {"max_new_tokens": 1.5}),
    "no samples": (AmountError, {"samples": 0}),
    "negative samples": (AmountError, {"samples": -1}),
    "no rows": (AmountError, {"batch_size": 0}),
    "negative temperature": (AmountError, {"temperature": -0.5}),
    "a word for a temperature": (AmountError, {"temperature": "1"}),
    "NaN temperature": (AmountError, {"temperature": math.nan}),
    "infinite temperature": (AmountError, {"temperature": math.inf}),
    "several greedy samples": (AmountError, {"temperature": 0.0, "samples": 2}),
    "scorer without name": (ScorerError, {"scorers": [lambda prompts, completions: [0.0] * len(completions)]}),
    "scorer object without name": (ScorerError, {"scorers": [Nameless()]}),
    "partial without name": (ScorerError, {"scorers": functools.partial(ones)}),
    "scorer with an empty name": (ScorerError, {"scorers": {"": ones}}),
    "two scorers of one name": (ScorerError, {"scorers": [ones, named("ones")]}),
    "a scorer twice": (ScorerError, {"scorers": [ones, ones]}),
    "no function": (ScorerError, {"scorers": {"toxicity": "toxicity"}}),
    "a string for scorers": (ScorerError, {"scorers": "toxicity"}),
    **{f"scorer named {key}": (ScorerError, {"scorers": {key: ones}}) for key in (*PANEL, "collateral", "task")},
    "function named kl": (ScorerError, {"scorers": [named("kl")]}),
    "a conversation among neutral": (TextsError, {"neutral": [[{"role": "user", "content": "w1"}]]}),
    "a string for neutral": (TextsError, {"neutral": "w1 w2"}),
    "a number among neutral": (TextsError, {"neutral": [3]}),
    "a question without answer": (TextsError, {"task": [{"question": "w1", "options": ["w2", "w3"]}]}),
    "a question with one option": (TextsError, {"task": [{**QUESTION, "options": ["w2"]}]}),
    "an answer that is not there": (TextsError, {"task": [{**QUESTION, "answer": 2}]}),
    "a negative answer": (TextsError, {"task": [{**QUESTION, "answer": -1}]}),
    "an empty option": (TextsError, {"task": [{**QUESTION, "options": ["w2", ""]}]}),
    "a question that is none": (TextsError, {"task": ["w1"]}),
    "a string for harmful": (TextsError, {"harmful": "w1"}),
    "a number among harmless": (TextsError, {"harmless": [1]}),
}  # fmt: skip


@pytest.mark.parametrize("case", EARLY)
def test_bad_input_is_refused_before_anything_is_generated(case: str, model: Any, tokenizer: Any) -> None:
    kind, changed = EARLY[case]
    given_ = {"prompts": PROMPTS, **BARE, **changed}
    prompts = given_.pop("prompts")
    before = snapshot(model, tokenizer)
    with passes(model) as count, pytest.raises(kind) as caught:
        evaluate(model, tokenizer, prompts, **given_)
    assert not count
    assert len(str(caught.value)) > 20
    same(before, snapshot(model, tokenizer))


LATE_CASES: dict[str, dict[str, Any]] = {
    "a long harmful prompt": {"harmful": ["w1", LONG]},
    "a long harmless prompt": {"harmless": [LONG]},
    "an empty harmful prompt": {"harmful": [""]},
    "a harmful chat without a template": {"harmful": [[{"role": "user", "content": "w1"}]]},
    "a neutral text of one token": {"neutral": ["w1 w2", "w1"]},
    "a neutral text that is too long": {"neutral": [" ".join(["w1"] * 129)]},
    "a question that is too long": {"task": [{**QUESTION, "question": " ".join(["w1"] * 130)}]},
    "an option without tokens": {"task": [{**QUESTION, "options": ["w2", "  "]}]},
}


@pytest.mark.parametrize("case", LATE_CASES)
def test_other_texts_are_checked_before_anything_is_generated_too(case: str, model: Any, tokenizer: Any) -> None:
    with passes(model) as count, pytest.raises(TextsError):
        evaluate(model, tokenizer, PROMPTS, **{**BARE, **LATE_CASES[case]})
    assert not count


NEVER = {
    "a neutral text that is too long": "collateral does not look at the model's limit",
    "a question that is too long": "accuracy does not look at the model's limit",
    "an option without tokens": "0 / 0: NaN passes for a likelihood, and the first option may win by it",
}


@pytest.mark.parametrize("case", LATE_CASES)
def test_other_texts_are_checked(case: str, model: Any, tokenizer: Any) -> None:
    with pytest.raises(TextsError):
        evaluate(model, tokenizer, PROMPTS, **{**BARE, **LATE_CASES[case]})


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("nested", [False, True])
def test_amounts_for_another_number_of_prompts_are_refused(
    count: int, nested: bool, model: Any, tokenizer: Any
) -> None:
    outer = Controller(model, [random_addition(layers=(0,), magnitude=torch.ones(4))]) if nested else nullcontext()
    inner = Controller(model, [random_addition(magnitude=torch.ones(count))])
    with passes(model) as passed, pytest.raises(SamplesError, match=str(count)) as caught, outer, inner:
        evaluate(model, tokenizer, PROMPTS, **BARE)
    assert not passed
    assert (caught.value.expected, caught.value.found) == (count, 4)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "more", [{"neutral": ["w1 w2"]}, {"task": [QUESTION]}, {"harmful": ["w1"]}, {"harmless": ["w1"]}]
)
def test_amounts_by_sample_fit_no_other_texts(more: dict[str, Any], model: Any, tokenizer: Any) -> None:
    with (
        pytest.raises(SamplesError, match="fit no other texts"),
        Controller(model, [random_addition(magnitude=torch.ones(4))]),
    ):
        evaluate(model, tokenizer, PROMPTS, **{**BARE, **more})


def lazy(prompts: Sequence[Any], completions: Sequence[str]) -> Iterator[float]:
    yield 1.0
    raise RuntimeError("half way")


SCORES: dict[str, Any] = {
    "too few": lambda p, c: [0.0] * (len(c) - 1),
    "too many": lambda p, c: [0.0] * (len(c) + 1),
    "none": lambda p, c: [],
    "one number": lambda p, c: 0.5,
    "a set": lambda p, c: set(map(float, range(len(c)))),
    "scores by place": lambda p, c: dict(enumerate([0.0] * len(c))),
    "None": lambda p, c: None,
    "NaN": lambda p, c: [0.0, math.nan, 0.0, 0.0],
    "inf": lambda p, c: [0.0, math.inf, 0.0, 0.0],
    "minus inf": lambda p, c: np.array([0.0, -math.inf, 0.0, 0.0]),
    "NaN tensor": lambda p, c: torch.tensor([0.0, math.nan, 0.0, 0.0]),
    "None inside": lambda p, c: [None] * len(c),
    "words": lambda p, c: ["good"] * len(c),
    "a column": lambda p, c: torch.zeros(len(c), 1),
    "a scalar tensor": lambda p, c: torch.tensor(1.0),
    "complex": lambda p, c: [1j] * len(c),
    "raises": lambda p, c: 1 / 0,
    "raises late": lazy,
    "numbers as text": lambda p, c: ["1"] * len(c),
    "a string of digits": lambda p, c: "1" * len(c),
    "huge integers": lambda p, c: [10**400] * len(c),
}
NO_NUMBERS = {
    "raises late": "an iterator's own error passes through: only the call is guarded, not the reading of what it returned",
    "numbers as text": "float() takes text for a number",
    "a string of digits": "a string is iterated digit by digit",
    "huge integers": "OverflowError passes through",
}


@pytest.mark.parametrize("case", SCORES)
def test_scores_that_are_none_are_refused(case: str, model: Any, tokenizer: Any) -> None:
    with pytest.raises(ScorerError, match="'mine'") as caught:
        evaluate(model, tokenizer, PROMPTS, scorers={"fine": ones, "mine": SCORES[case]}, **BARE)
    assert caught.value.name == "mine"  # type: ignore[attr-defined]
    if case in ("raises", "raises late"):
        assert isinstance(caught.value.__cause__, (ZeroDivisionError, RuntimeError))


@pytest.mark.parametrize(
    "scores",
    [
        lambda p, c: np.arange(4),
        lambda p, c: torch.arange(4),
        lambda p, c: (x for x in range(4)),
        lambda p, c: range(4),
    ],
)
def test_any_form_of_numbers_is_taken(scores: Any, model: Any, tokenizer: Any) -> None:
    report = evaluate(model, tokenizer, PROMPTS, scorers={"mine": scores}, **BARE)
    assert report["unsteered"].measures["mine"].values == (0.0, 1.0, 2.0, 3.0)
    assert report["unsteered"].measures["mine"].kind == "effect"


def test_a_ready_scorer_may_not_take_the_budget_s_name(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ScorerError):
        evaluate(model, tokenizer, PROMPTS, scorers={"kl": refusal}, **BARE)


def test_a_scorer_is_never_overwritten(model: Any, tokenizer: Any) -> None:
    """`refusal` as a scorer of the prompts and `harmful=` are two measures: both are kept, or the second is refused."""
    try:
        report = evaluate(model, tokenizer, PROMPTS, scorers=[refusal], harmful=["w1"], **BARE)
    except ScorerError:
        return
    lengths = [len(measure) for key, measure in report["unsteered"].measures.items() if "refusal" in key]
    assert sorted(lengths) == [1, len(PROMPTS)]


def test_names_are_texts(model: Any, tokenizer: Any) -> None:
    """A name that is no text breaks the table and the file."""
    with pytest.raises(ScorerError):
        evaluate(model, tokenizer, PROMPTS, scorers={1: ones}, **BARE)  # type: ignore[dict-item]


# -------------------------------------------------------------------------------------------------------------- the rest


def test_the_name_of_the_arm(model: Any, tokenizer: Any) -> None:
    assert list(evaluate(model, tokenizer, PROMPTS, name="mine", **BARE)) == ["mine"]
    with Controller(model, [random_addition()]):
        assert list(evaluate(model, tokenizer, PROMPTS, **BARE)) == ["steered"]


def test_a_vector_outside_the_blocks_steers_too(model: Any, tokenizer: Any) -> None:
    plain = copy.deepcopy(model)
    vector = random_vector(model, full=True).only(modules=["lm_head"])
    assert vector.add(0.5).layers == ()
    written = Written(model)
    with Controller(model, [vector.add(0.5)]):
        report = evaluate(model, tokenizer, PROMPTS, **BARE)
    [name] = report
    agrees(report, name, written, plain)
    assert report[name]["kl"].value > 0.01
    assert name == "steered"


def test_settings_tell_how_it_was_made(model: Any, tokenizer: Any) -> None:
    report = evaluate(model, tokenizer, PROMPTS, seed=5, temperature=0.5, batch_size=3, samples=2, **BARE)
    assert report["unsteered"].settings == {
        "max_new_tokens": NEW, "samples": 2, "temperature": 0.5, "seed": 5, "batch_size": 3
    }  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 0.3, 2.0])
def test_kl_is_at_temperature_one_whatever_the_text_was_drawn_at(
    temperature: float, model: Any, tokenizer: Any
) -> None:
    plain = copy.deepcopy(model)
    written = Written(model)
    with Controller(model, [random_addition(magnitude=4.0)]):
        report = evaluate(model, tokenizer, PROMPTS, temperature=temperature, **BARE)
    agrees(report, "steered", written, plain)
    assert all(
        torch.allclose(s, x / (temperature or 1), atol=1e-4)
        for s, x in zip(written.scores, written.logits, strict=True)
    )


def test_what_is_shipped_is_measured_by_default(model: Any, tokenizer: Any) -> None:
    report = evaluate(model, tokenizer, PROMPTS[:2], max_new_tokens=2)
    arm = report["unsteered"]
    assert (len(arm.measures["collateral"]), len(arm.measures["task"])) == (24, 40)
    assert set(arm.measures) == {*PANEL, "collateral", "task"}


def test_progress_is_shown_on_request(model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(model, tokenizer, PROMPTS, **BARE)
    assert capsys.readouterr() == ("", "")
    evaluate(model, tokenizer, PROMPTS, progress=True, **BARE)
    assert "evaluating" in capsys.readouterr().err
