"""Experiments on weights and causes: vectors seen from inside, answers patched, additions written into weights."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import D_MODEL, DEPTH, random_addition, random_vector, tiny_model, tiny_tokenizer

from steerkit import Concept, Controller, PreferenceVector, experiments, load, plots, record
from steerkit.errors import (
    AmountError,
    BaseModelMismatchError,
    PolicyError,
    SteerkitWarning,
    TextsError,
    UnsupportedModelError,
)
from steerkit.evaluation.report import Estimate
from steerkit.experiments import Table
from steerkit.experiments.running import random_deltas
from steerkit.experiments.weights import effective_rank
from steerkit.intervention import Addition
from steerkit.maths.lowrank import LowRank, dense, inner
from steerkit.model import Fingerprint, find_decoder

WORDS = [f"w{i} w{i + 1} w{(7 * i) % 50}" for i in range(4, 20)]
POSITIVE, NEGATIVE = ([f"{text} {last}" for text in WORDS] for last in ("w60", "w61"))
TEXTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12", "w13 w14"]
BIAS = "transformer.h.{}.mlp.c_proj.bias"


def fitted(model: Any, name: str = "planted", **more: Any) -> Concept:
    more = {"direction": "probe", "regularisation": 0.1, **more}
    return Concept.fit(name, model, tiny_tokenizer(), positive=POSITIVE, negative=NEGATIVE, **more)


@pytest.fixture(scope="module")
def concept() -> Concept:
    return fitted(tiny_model("gpt2"))


def value(table: Table, column: str, **axes: Any) -> float:
    [cell] = table.only(**axes)[column]
    found = cell.value if isinstance(cell, Estimate) else cell
    assert isinstance(found, int | float)
    return found


def shifted(model: Any, steps: dict[int, torch.Tensor]) -> PreferenceVector:
    """Return a vector that adds these steps to the stream after layers of gpt2."""
    return PreferenceVector("steps", {BIAS.format(layer): step for layer, step in steps.items()}, Fingerprint.of(model))


# From inside.


def test_inside_finds_a_planted_step(concept: Concept) -> None:
    """A bias that moves the stream by m u moves a probe by m w . u, from its layer on."""
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    other = replace(fitted(model, layers=[0, 3]), name="other")
    found = experiments.inside(
        model, tokenizer, shifted(model, {2: 2.0 * concept.mover[2]}), [concept, other], TEXTS, magnitude=0.5
    )
    states = record(model, tokenizer, TEXTS)
    for layer in (0, 1):
        assert value(found, "shift", concept="planted", layer=layer, vector="vector") == 0
    moved = float(concept[2].weight @ concept.mover[2]) / float(concept[2].logit(states[2]).std())
    assert value(found, "shift", concept="planted", layer=2, vector="vector") == pytest.approx(moved, rel=1e-4)
    assert 0 < abs(value(found, "shift", concept="planted", layer=2, vector="random")) < 0.6 * moved
    assert {row[1] for row in found.only(concept="other").rows} == {0, 3}
    with pytest.raises(TextsError, match="At least 2 texts"):
        experiments.inside(model, tokenizer, random_vector(model), [concept], TEXTS[:1])
    with pytest.raises(TextsError, match="each with its own name"):
        experiments.inside(model, tokenizer, random_vector(model), [concept, concept], TEXTS)
    with pytest.raises(TextsError, match="must read different things"):
        experiments.inside(model, tokenizer, random_vector(model), [concept], ["w5", "w5"])
    with pytest.raises(BaseModelMismatchError):
        experiments.inside(model, tokenizer, random_vector(tiny_model("llama")), [concept], TEXTS)


def test_parts_are_shares_of_the_norm_and_directions() -> None:
    model = tiny_model("llama")
    basis, _ = torch.linalg.qr(torch.randn(D_MODEL, 4))
    deltas = {
        "model.layers.2.mlp.down_proj.weight": LowRank(torch.randn(D_MODEL, 1), torch.randn(1, 48)),
        "model.layers.1.self_attn.q_proj.weight": LowRank(basis, 3 * basis.T),
        "model.norm.weight": torch.ones(D_MODEL),
    }
    vector = PreferenceVector("v", deltas, Fingerprint.of(model))
    found = experiments.parts(vector)
    assert [row[:2] for row in found.rows] == [(1, "self_attn.q_proj"), (2, "mlp.down_proj"), (None, "model.norm")]
    assert sum(found["share"]) == pytest.approx(1)  # type: ignore[arg-type]
    assert sum(found["even"]) == pytest.approx(1)  # type: ignore[arg-type]
    assert value(found, "norm", layer=1) == pytest.approx(6)
    assert value(found, "effective rank", layer=1) == pytest.approx(4)
    assert value(found, "effective rank", layer=2) == pytest.approx(1, abs=1e-4)
    assert found.only(layer=None)["effective rank"] == (None,)
    assert effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0]))) == pytest.approx(2)
    assert plots.matrix(found, "share", down="layer", across="module").axes
    with pytest.raises(PolicyError, match="Found a zero one"):
        experiments.parts(0.0 * vector)


def test_random_changes_have_the_same_norms_shapes_and_ranks() -> None:
    vector = random_vector(tiny_model("gpt2"), full=False)
    drawn = random_deltas({**vector.deltas, "zero": torch.zeros(3)}, 0)
    for name, delta in vector.deltas.items():
        assert drawn[name].shape == delta.shape
        assert isinstance(drawn[name], LowRank) == isinstance(delta, LowRank)
        assert inner(drawn[name], drawn[name]) == pytest.approx(inner(delta, delta), rel=1e-4)
        assert abs(inner(drawn[name], delta)) < 0.3 * inner(delta, delta)
    assert not bool(dense(drawn["zero"]).any())


def test_ablation_finds_the_part_that_acts(concept: Concept) -> None:
    """Of two planted steps one is tiny: alone it does nothing, and without the other nothing is left."""
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    mover = concept.mover
    vector = shifted(model, {1: 1e-4 * mover[1], 3: 3.0 * mover[3]})
    probe = replace(concept, figures={3: concept.figures[3]}, probes={3: concept[3]})
    found = experiments.ablate(model, tokenizer, vector, TEXTS, concept=probe)
    assert found["layer"] == ("all", 1, 3)
    whole = value(found, "only: kl", layer="all")
    assert whole > 0.1
    assert value(found, "only: kl", layer=3) == pytest.approx(whole, rel=1e-3)
    assert value(found, "without: kl", layer=1) == pytest.approx(whole, rel=1e-3)
    assert value(found, "only: kl", layer=1) < 1e-5
    assert value(found, "without: kl", layer=3) < 1e-5
    moved = 3.0 * float(concept[3].weight @ mover[3])
    assert value(found, "only: planted", layer=3) == pytest.approx(moved, rel=1e-4)
    assert abs(value(found, "random only: planted", layer=3)) < 0.6 * moved
    assert plots.layers(found, "only: kl", "random only: kl").axes
    with pytest.raises(PolicyError, match="Found one by 'module'"):
        experiments.ablate(model, tokenizer, vector, TEXTS, by="module")


def test_parts_may_be_kinds_of_modules_or_lie_outside_the_blocks() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    vector = random_vector(model, full=True, size=0.1)
    vector = vector.only(layers=[1]) + vector.only(modules=["lm_head", "model.norm"])
    by_module = experiments.ablate(model, tokenizer, vector, TEXTS, by="module")
    assert {"all", "mlp.down_proj", "self_attn.q_proj", "model.norm"} <= set(by_module["module"])
    assert plots.bars(by_module, "only: kl").axes
    by_layer = experiments.ablate(model, tokenizer, vector, TEXTS)
    assert by_layer["layer"] == ("all", 1, "outside")


def lora(model: Any, seed: int, start: int, rank: int = 2) -> PreferenceVector:
    """Return a vector of random B's on random A's: `start` is the seed of A."""
    first, second = (torch.Generator().manual_seed(number) for number in (seed, start))
    deltas = {}
    for layer in range(DEPTH):
        left, right = torch.randn(48, rank, generator=first), torch.randn(rank, D_MODEL, generator=second)
        deltas[f"model.layers.{layer}.mlp.up_proj.weight"] = LowRank(left, right)
    return PreferenceVector(f"lora {seed}", deltas, Fingerprint.of(model))


def test_alignment_tells_whether_a_cosine_means_anything(recwarn: pytest.WarningsRecorder) -> None:
    model = tiny_model("llama")
    one, alike, foreign = lora(model, 0, 7), lora(model, 1, 7), lora(model, 2, 8)
    same = experiments.alignment(one, 2.0 * one)
    assert value(same, "cosine", layer="all") == pytest.approx(1)
    assert value(same, "inputs", layer="all") == pytest.approx(1)
    assert [row[0] for row in same.rows] == ["all", 0, 1, 2, 3]
    part = experiments.alignment(one.only(layers=[1, 2]), one)  # as long as its share of the whole
    assert value(part, "cosine", layer="all") == pytest.approx(one.only(layers=[1, 2]).norm() / one.norm())
    assert value(part, "cosine", layer=2) == pytest.approx(1)
    whole, some = (value(table, "chance", layer="all") for table in (same, part))
    assert some == pytest.approx(whole * math.sqrt(2) * value(part, "cosine", layer="all"))
    shared = experiments.alignment(alike, one)
    assert value(shared, "inputs", layer=2) == pytest.approx(1)
    assert value(shared, "cosine", layer="all") == pytest.approx(one.cosine(alike))
    assert not recwarn.list
    with pytest.warns(SteerkitWarning, match="did not start from one initial A"):
        apart = experiments.alignment(foreign, one)
    assert value(apart, "inputs", layer="all") < 3 * value(apart, "inputs by chance", layer="all")
    assert abs(value(apart, "cosine", layer="all")) < 0.2


def test_alignment_takes_a_policy_with_its_base() -> None:
    """A full fine-tuning that went along a stored dense vector, and then some noise elsewhere."""
    model = tiny_model("gpt2")
    policy = tiny_model("gpt2")
    changed = policy.transformer.h[1].mlp.c_fc.weight
    stored = PreferenceVector(
        "stored", {"transformer.h.1.mlp.c_fc.weight": torch.randn(changed.shape)}, Fingerprint.of(model)
    )
    with torch.no_grad():
        changed += 0.5 * stored.deltas["transformer.h.1.mlp.c_fc.weight"]  # type: ignore[operator]
        policy.transformer.h[2].mlp.c_fc.weight += 0.1 * torch.randn(changed.shape)
    found = experiments.alignment(policy, stored, base=model)
    assert value(found, "cosine", layer=1) == pytest.approx(1, abs=1e-5)
    assert 0.9 < value(found, "cosine", layer="all") < 0.999
    assert value(found, "chance", layer=1) == pytest.approx(1.96 / math.sqrt(changed.numel()))
    assert 2 not in found["layer"]
    with pytest.raises(PolicyError, match="`base`"):
        experiments.alignment(policy, stored)
    elsewhere = PreferenceVector(
        "x", {"transformer.h.3.mlp.c_fc.weight": torch.randn(changed.shape)}, Fingerprint.of(model)
    )
    with pytest.raises(PolicyError, match="no parameter that both change"):
        experiments.alignment(elsewhere, stored)
    with pytest.warns(SteerkitWarning, match="one of them is whole"):
        experiments.alignment(stored, stored.compress(rank=2))


# Patching.


def planted_answer() -> tuple[Any, list[str], list[str], list[tuple[str, str]]]:
    """Return a llama in which only the attention of block 2 brings the first word to the last token, and pairs for it."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            block.mlp.down_proj.weight.zero_()
            if layer != 2:
                block.self_attn.o_proj.weight.zero_()
    tokenizer = tiny_tokenizer()
    clean, corrupted, answers = [], [], []
    for i in range(5, 11):
        texts = [f"w{i} w{i + 20} w7", f"w{i + 40} w{i + 20} w7"]
        with torch.no_grad():
            said = [model(torch.tensor([tokenizer(text).input_ids])).logits[0, -1] for text in texts]
        gap = said[0] - said[1]
        clean.append(texts[0])
        corrupted.append(texts[1])
        answers.append((tokenizer.decode([int(gap[4:].argmax()) + 4]), tokenizer.decode([int(gap[4:].argmin()) + 4])))
    return model, clean, corrupted, answers


def test_patching_finds_the_layer_that_an_answer_enters_at() -> None:
    model, clean, corrupted, answers = planted_answer()
    concept = fitted(model)
    found = experiments.patch(model, tiny_tokenizer(), concept, clean, corrupted, answers)
    for layer in (0, 1):
        assert value(found, "patched", layer=layer) == pytest.approx(0, abs=1e-5)
        assert value(found, "patched along", layer=layer) == pytest.approx(0, abs=1e-5)
    for layer in (2, 3):
        [cell] = found.only(layer=layer)["patched"]
        assert cell == pytest.approx((1, 1, 1), abs=1e-5)
    assert plots.layers(found).axes


def test_patching_along_the_only_direction_that_differs_is_patching_all_of_it() -> None:
    model, clean, corrupted, answers = planted_answer()
    tokenizer, concept = tiny_tokenizer(), fitted(model)
    pair = ([clean[0]], [corrupted[0]], [answers[0]])
    gap = record(model, tokenizer, pair[0])[3] - record(model, tokenizer, pair[1])[3]
    unit = torch.nn.functional.normalize(gap[0], dim=0)
    planted = replace(concept, directions={**concept.directions, "probe": {**concept.directions["probe"], 3: unit}})
    found = experiments.patch(model, tokenizer, planted, *pair, layers=-1)
    assert value(found, "patched along", layer=3) == pytest.approx(1, abs=1e-4)
    assert abs(value(found, "patched at random", layer=3)) < 0.5
    erased = planted.erase(layers=3)

    def difference(text: str, *edits: Any) -> float:
        first, second = (tokenizer.convert_tokens_to_ids(word) for word in answers[0])
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            if not edits:
                logits = model(ids).logits[0, -1]
            else:
                with Controller(model, edits):
                    logits = model(ids).logits[0, -1]
        return float(logits[first] - logits[second])

    best, worst = difference(clean[0]), difference(corrupted[0])
    share = (difference(clean[0], erased) - worst) / (best - worst)
    for column in ("erased", "erased everywhere"):
        assert value(found, column, layer=3) == pytest.approx(share, abs=1e-4)
    everywhere = experiments.patch(model, tokenizer, concept, *pair, layers=0)
    share = (difference(clean[0], concept.erase(layers=0)) - worst) / (best - worst)
    assert value(everywhere, "erased everywhere", layer=0) == pytest.approx(share, abs=1e-4)


def test_patching_refuses_pairs_that_say_nothing() -> None:
    model, clean, corrupted, answers = planted_answer()
    tokenizer, concept = tiny_tokenizer(), fitted(model)

    def run(good: Any, bad: Any, words: Any) -> Table:
        return experiments.patch(model, tokenizer, concept, good, bad, words)

    with pytest.raises(TextsError, match="Found 6, 5 and 6"):
        run(clean, corrupted[:5], answers)
    with pytest.raises(TextsError, match="for pair 1"):
        run(clean[:2], corrupted[:2], [answers[0], answers[1][::-1]])
    with pytest.raises(TextsError, match="begin with the same one"):
        run(clean[:1], corrupted[:1], [("w5 w6", "w5 w7")])
    with pytest.raises(TextsError, match="Answers are"):
        run(clean[:1], corrupted[:1], ["w5"])
    with pytest.raises(BaseModelMismatchError):
        experiments.patch(tiny_model("gpt2"), tokenizer, concept, clean, corrupted, answers)


# Baking.


def logits(model: Any, *edits: Any) -> torch.Tensor:
    tokenizer = tiny_tokenizer(pad=True)
    given = tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        if not edits:
            return model(**given).logits[given.attention_mask.bool()]
        with Controller(model, edits):
            return model(**given).logits[given.attention_mask.bool()]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "bloom"])
def test_a_baked_addition_is_the_hook(name: str, tmp_path: Any) -> None:
    model = tiny_model(name)
    addition = random_addition((1, 3), {1: 3.0, 3: -2.0})  # type: ignore[dict-item]
    vector = experiments.bake(model, addition)
    assert len(vector.deltas) == 2
    expected = logits(model, addition)
    assert float((expected - logits(model)).abs().max()) > 0.1
    torch.testing.assert_close(logits(model, vector.add(1.0)), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(vector.merge_into(model)), expected, atol=1e-4, rtol=1e-4)
    twice = logits(model, replace(addition, amount={1: 6.0, 3: -4.0}))
    torch.testing.assert_close(logits(model, vector.add(2.0)), twice, atol=1e-4, rtol=1e-4)
    vector.save(tmp_path / "baked.safetensors")
    assert load(tmp_path / "baked.safetensors", model=model).made["baked"] == vector.made["baked"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "falcon", "mixtral"])
def test_blocks_without_such_a_bias_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="Block 1 must have a bias"):
        experiments.bake(tiny_model(name), random_addition((1,)))


def test_only_constant_additions_everywhere_are_baked(concept: Concept) -> None:
    model = tiny_model("gpt2")
    refused = [
        (concept.constrain(at_least=0.9), "Found Constraint"),
        (concept.add(1.0, positions="last"), "Found positions='last'"),
        (concept.add([1.0, 2.0]), "Found 2 of them"),
        (concept.add(0.0), "Found magnitude 0"),
        (concept.add(1.0).when(concept.reads(at_least=0.5)), "a condition or a schedule"),
        (concept.add(concept.reads().scaled(1, 2)), "a condition or a schedule"),
    ]
    for intervention, message in refused:
        with pytest.raises(AmountError, match=message):
            experiments.bake(model, intervention)
    with pytest.raises(BaseModelMismatchError):
        experiments.bake(tiny_model("llama"), concept.add(1.0))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("ridge", [0.01, 1.0, math.inf])
def test_an_edited_weight_shifts_by_the_magnitude_on_average(name: str, ridge: float) -> None:
    """The module's own output, over all tokens of the texts, moves by m u on average and along u alone."""
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    addition = random_addition((1,), -3.0)
    vector = experiments.edit_weights(model, tokenizer, addition, TEXTS, ridge=ridge)
    [(weight, delta)] = vector.deltas.items()
    assert isinstance(delta, LowRank)
    assert delta.rank == 1
    module = find_decoder(model).model.get_submodule(weight.removesuffix(".weight"))
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(
        lambda module, args, output: seen.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    for text in TEXTS:
        with torch.no_grad():
            model(torch.tensor([tokenizer(text).input_ids]))
    handle.remove()
    change = dense(delta) if weight in vector.transposed else dense(delta).T
    moved = torch.cat(seen) @ change
    along = moved @ addition.directions[1]
    assert float(along.mean()) == pytest.approx(-3.0, rel=1e-3)
    torch.testing.assert_close(moved, along[:, None] * addition.directions[1], atol=1e-3, rtol=1e-3)
    assert vector.made["shift"]["1"]["deviation"] == pytest.approx(float(along.std(correction=0)), rel=1e-2, abs=1e-3)
    mean = torch.cat(seen).mean(dim=0)
    if ridge == math.inf:
        assert float(dense(delta).norm()) == pytest.approx(3.0 / float(mean.norm()), rel=1e-3)
    assert load_and_merge_agree(model, vector)


def test_edits_at_several_layers_see_one_another() -> None:
    """What a later weight reads has been moved by the earlier ones: each shifts by its magnitude with all of them there."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    addition = random_addition((0, 2), 8.0)
    vector = experiments.edit_weights(model, tokenizer, addition, TEXTS)
    for weight, delta in vector.deltas.items():
        seen: list[torch.Tensor] = []
        module = find_decoder(model).model.get_submodule(weight.removesuffix(".weight"))
        handle = module.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[0][0]))
        with Controller(model, [vector.add(1.0)]), torch.no_grad():
            for text in TEXTS:
                model(torch.tensor([tokenizer(text).input_ids]))
        handle.remove()
        layer = int(weight.split("layers.")[1].split(".")[0])
        moved = torch.cat(seen) @ dense(delta).T @ addition.directions[layer]
        assert float(moved.mean()) == pytest.approx(8.0, rel=1e-3)


def load_and_merge_agree(model: Any, vector: PreferenceVector) -> bool:
    return torch.allclose(logits(vector.merge_into(model)), logits(model, vector.add(1.0)), atol=1e-3)


def test_less_ridge_varies_less_and_is_longer() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    edits = [
        experiments.edit_weights(model, tokenizer, random_addition((2,), 2.0), POSITIVE, ridge=ridge)
        for ridge in (0.01, 1.0, math.inf)
    ]
    spread = [edit.made["shift"]["2"]["deviation"] for edit in edits]
    assert spread == sorted(spread)
    assert [edit.norm() for edit in edits] == sorted((edit.norm() for edit in edits), reverse=True)


def test_an_edit_is_exact_where_the_input_is_constant() -> None:
    """Planted: the MLP of block 1 sees nothing, so that its hidden units are the same at every token."""
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.zero_()
        model.transformer.h[1].mlp.c_fc.bias.fill_(1.0)
    addition = random_addition((1,), 3.0)
    vector = experiments.edit_weights(model, tokenizer, addition, TEXTS)
    assert vector.transposed == {"transformer.h.1.mlp.c_proj.weight"}
    found = experiments.fidelity(model, tokenizer, vector, addition, TEXTS)
    assert value(found, "stream", change="weights") < 1e-5
    assert value(found, "kl", change="weights") < 1e-6
    assert value(found, "agreement", change="weights") == 1
    assert value(found, "stream", change="nothing") == pytest.approx(1)
    assert value(found, "stream", change="random weights") > 0.5
    assert value(found, "kl", change="nothing") > 0.01
    assert plots.bars(found, "stream").axes


def test_edits_are_refused_where_nothing_adds_unchanged() -> None:
    model, tokenizer = tiny_model("gemma2"), tiny_tokenizer()
    addition: Addition = random_addition((1,))
    with pytest.raises(UnsupportedModelError, match="a norm or a mixture of experts"):
        experiments.edit_weights(model, tokenizer, addition, TEXTS)
    with pytest.raises(AmountError, match="`ridge` must be positive"):
        experiments.edit_weights(model, tokenizer, addition, TEXTS, ridge=0.0)
    silent = tiny_model("llama")
    with torch.no_grad():
        silent.model.layers[1].mlp.up_proj.weight.zero_()
    with pytest.raises(TextsError, match="mean that is not 0"):
        experiments.edit_weights(silent, tokenizer, addition, TEXTS)


def test_nothing_is_left_behind_by_weights(concept: Concept) -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    marks, vector = set(model.__dict__), random_vector(model)
    experiments.inside(model, tokenizer, vector, [concept], TEXTS)
    experiments.ablate(model, tokenizer, vector, TEXTS, by="module")
    addition = concept.add(1.0, layers=1)
    experiments.bake(model, addition)
    experiments.fidelity(model, tokenizer, experiments.edit_weights(model, tokenizer, addition, TEXTS), addition, TEXTS)
    with pytest.raises(TextsError):
        experiments.patch(model, tokenizer, concept, ["w5"], ["w5"], [("w6", "w7")])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert set(model.__dict__) == marks
