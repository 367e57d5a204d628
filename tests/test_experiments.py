"""Experiments on what probes read and what directions say: each finds what was planted, and its control does not."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import D_MODEL, DEPTH, random_addition, random_vector, tiny_model, tiny_tokenizer

from steerkit import Concept, Controller, experiments, plots, record
from steerkit.concepts.probe import Probe
from steerkit.conditions import linear
from steerkit.errors import (
    AmountError,
    AttachError,
    BaseModelMismatchError,
    LayerError,
    ReportError,
    SteerkitError,
    TextsError,
    UnsupportedModelError,
)
from steerkit.evaluation.report import Estimate
from steerkit.experiments import Table
from steerkit.experiments.looking import straight, submodules
from steerkit.model import find_decoder

WORDS = [f"w{i} w{i + 1} w{(7 * i) % 50}" for i in range(4, 24)]
POSITIVE, NEGATIVE = ([f"{text} {last}" for text in WORDS] for last in ("w60", "w61"))
PROMPTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12"]


@pytest.fixture(scope="module")
def concept() -> Concept:
    return fitted(tiny_model("llama"))


def fitted(model: Any, name: str = "planted", **more: Any) -> Concept:
    return Concept.fit(name, model, tiny_tokenizer(), positive=POSITIVE, negative=NEGATIVE, regularisation=0.1, **more)


def silenced(model: Any, attention: Any = range(DEPTH), mlp: Any = range(DEPTH)) -> Any:
    """Return the model with blocks whose attention or MLP adds nothing to the stream."""
    with torch.no_grad():
        for layer in attention:
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
        for layer in mlp:
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    return model


def value(table: Table, column: str, **axes: Any) -> float:
    [cell] = table.only(**axes)[column]
    found = cell.value if isinstance(cell, Estimate) else cell
    assert isinstance(found, int | float)
    return found


# The table.


def test_a_table_is_text_json_and_a_data_frame(tmp_path: Any) -> None:
    cells = ((0, "a", Estimate(1.0, 0.5, math.nan), None), (1, "b|c", Estimate(2.0, 1.0, 3.0), math.nan))
    table = Table("A title", "A note.", ("layer", "kind"), ("x", "y"), cells)
    assert str(table).startswith("A title\n\n| layer | kind | x | y |")
    assert "b\\|c" in str(table)
    assert str(table).endswith("A note.")
    stored = json.loads(table.to_json(tmp_path / "table.json"))
    assert (tmp_path / "table.json").read_text("utf-8") == table.to_json()
    assert stored["rows"][0] == [0, "a", {"value": 1.0, "low": 0.5, "high": None}, None]
    assert stored["rows"][1][3] is None
    frame = table.to_pandas()
    assert list(frame.columns) == ["layer", "kind", "x", "x low", "x high", "y"]
    assert frame["x"].tolist() == [1.0, 2.0]
    assert table.only(layer=1).rows == cells[1:]
    with pytest.raises(ReportError, match="no column 'z'"):
        table["z"]
    with pytest.raises(ReportError, match="Some row must have"):
        table.only(layer=7)


# Where.


def test_where_finds_the_layer_and_the_site_that_a_concept_enters_at() -> None:
    """The attention of block 2 alone brings the first word to the last token: the others are blind to it, MLPs add nothing."""
    model, tokenizer = silenced(tiny_model("llama"), attention=()), tiny_tokenizer()
    with torch.no_grad():
        words = model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(["w60", "w61"])]
        for layer, block in enumerate(model.model.layers):
            block.self_attn.q_proj.weight.zero_()  # attends to all tokens alike
            if layer != 2:
                seen, _ = torch.linalg.qr(block.input_layernorm(words).T)
                block.self_attn.v_proj.weight -= block.self_attn.v_proj.weight @ seen @ seen.T
    positive, negative = ([f"{first} w{i} w7" for i in range(8, 38)] for first in ("w60", "w61"))
    pairs = ([*range(30)], [*range(30)])
    found = experiments.where("first", model, tokenizer, positive=positive, negative=negative, groups=pairs)
    for layer in range(DEPTH):
        for site in ("residual", "attention"):
            read = value(found, "auc", site=site, layer=layer, labels="true")
            assert read > 0.9 if layer >= 2 else abs(read - 0.5) < 0.05, (site, layer)
        assert value(found, "auc", site="mlp", layer=layer, labels="true") == 0.5
        for site in ("residual", "attention", "mlp"):
            [shuffled] = found.only(site=site, layer=layer, labels="shuffled")["auc"]
            assert isinstance(shuffled, Estimate)
            assert shuffled.low <= 0.5 <= shuffled.high


def test_the_residual_stream_reads_as_a_concept_does(concept: Concept) -> None:
    model, groups = tiny_model("llama"), ([*range(20)], [*range(20)])
    found = experiments.where(
        "planted", model, tiny_tokenizer(), positive=POSITIVE, negative=NEGATIVE, sites=["residual"], layers=[-1],
        groups=groups,
    )  # fmt: skip
    same = Concept.fit(
        "planted", model, tiny_tokenizer(), positive=POSITIVE, negative=NEGATIVE, layers=[-1], groups=groups
    )
    assert value(found, "accuracy", labels="true") == same.accuracy[3]
    assert {row[:2] for row in found.rows} == {("residual", 3)}


@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [
        ("llama", "self_attn", "mlp"),
        ("gpt2", "attn", "mlp"),
        ("gpt_neox", "attention", "mlp"),
        ("opt", "self_attn", "fc2"),
        ("falcon", "self_attention", "mlp"),
        ("gemma2", "self_attn", "mlp"),
        ("mixtral", "self_attn", "mlp"),
        ("bloom", None, None),
        ("mamba", "mixer", None),
    ],
)
def test_attention_and_mlp_are_told_apart_by_looking(name: str, attention: str | None, mlp: str | None) -> None:
    decoder = find_decoder(tiny_model(name))
    for site, child in (("attention", attention), ("mlp", mlp)):
        if child is None:
            with pytest.raises(UnsupportedModelError, match=f"one child that is its {site}"):
                submodules(decoder, [1], [site])
        else:
            assert submodules(decoder, [1], [site])[site, 1] is getattr(decoder.blocks[1], child)


def test_where_refuses_before_any_work() -> None:
    model = tiny_model("llama")
    given: dict[str, Any] = {"positive": POSITIVE, "negative": NEGATIVE}
    with pytest.raises(TextsError, match="`sites` are residual, attention, mlp"):
        experiments.where("x", model, tiny_tokenizer(), **given, sites=["heads"])  # type: ignore[list-item]
    with pytest.raises(TextsError, match="At least 6 positive"):
        experiments.where("x", model, tiny_tokenizer(), positive=POSITIVE[:2], negative=NEGATIVE)
    with pytest.raises(LayerError, match="Layer 9 does not exist"):
        experiments.where("x", model, tiny_tokenizer(), **given, layers=[9])


# Similarity.


def test_similarity_is_that_of_directions(concept: Concept) -> None:
    opposite = Concept.fit(
        "opposite", tiny_model("llama"), tiny_tokenizer(), positive=NEGATIVE, negative=POSITIVE, regularisation=0.1,
        layers=[1, 2],
    ).along("pattern")  # fmt: skip
    found = experiments.similarity([concept, opposite])
    assert found["layer"] == (1, 2)
    assert value(found, "cav", layer=1) < -0.9
    assert value(found, "mover", layer=2) == pytest.approx(float(concept.mover[2] @ opposite.mover[2]))
    assert f"±{1.96 / D_MODEL**0.5:.3f}" in found.note
    with pytest.raises(TextsError, match="Two concepts or more"):
        experiments.similarity([concept, concept])
    with pytest.raises(LayerError, match="a layer that both know"):
        experiments.similarity([opposite, fitted(tiny_model("llama"), "other", layers=[0])])
    with pytest.raises(BaseModelMismatchError):
        experiments.similarity([concept, fitted(tiny_model("gpt2"), "other")])


# Tokens.


def test_tokens_reads_what_is_recorded_and_what_the_bound_leaves(concept: Concept) -> None:
    model, text = tiny_model("llama"), NEGATIVE[0]
    found = experiments.tokens(
        model, tiny_tokenizer(), concept, text, interventions=concept.constrain(at_least=0.9, layers=2)
    )
    states = record(model, tiny_tokenizer(), [text])
    for layer in range(DEPTH):
        expected = float(concept[layer].logit(states[layer][0]))
        assert value(found, "logit", position=3, layer=layer) == pytest.approx(expected, abs=1e-4)
    assert value(found, "steered probability", position=3, layer=2) == pytest.approx(0.9, abs=1e-4)
    for position, layer in ((0, 2), (2, 2), (3, 1), (2, 3)):
        row = found.only(position=position, layer=layer)
        assert row["logit"] == row["steered logit"]
    assert found.tokens == tuple(text.split())
    with pytest.raises(TextsError, match="A text may have 128 tokens"):
        experiments.tokens(model, tiny_tokenizer(), concept, "w5 " * 129)
    assert "steered logit" not in experiments.tokens(model, tiny_tokenizer(), concept, text, layers=-1).columns


def test_coloured_tokens_are_escaped(concept: Concept) -> None:
    bare = experiments.tokens(tiny_model("llama"), tiny_tokenizer(), concept, "w5 <s> w60")
    page = bare.html(layer=1)
    assert "<s>" not in page
    assert "&lt;s&gt;" in page
    assert page.count("<span") == 3
    assert page.count("<p ") == 1
    shown = [
        f"{p:.3f} (logit {logit:.2f})" for p, logit in zip(*(bare.only(layer=1)[c] for c in ("probability", "logit")))
    ]
    assert all(f'title="{text}"' in page for text in shown)
    with pytest.raises(ReportError):
        bare.html(layer=9)


# Persistence.


@pytest.mark.parametrize("kind", ["constrain", "add", "erase"])
def test_an_edit_stays_whole_where_later_blocks_add_nothing(kind: str) -> None:
    model = silenced(tiny_model("llama"), (2, 3), (2, 3))
    concept = fitted(model)
    edits = {
        "constrain": concept.constrain(at_least=0.9, layers=[1, 2, 3]),
        "add": concept.add(2.0, layers=1),
        "erase": concept.erase(layers=1),
    }
    found = experiments.persistence(model, tiny_tokenizer(), concept, [*NEGATIVE[:6], *PROMPTS], edits[kind])
    for layer in (1, 2, 3):
        for column in ("reading", "along"):
            [cell] = found.only(layer=layer, edit="concept")[column]
            assert cell == pytest.approx((1, 1, 1), abs=1e-4)
        assert value(found, "along", layer=layer, edit="random") == pytest.approx(1, abs=1e-4)
        same = value(found, "reading", layer=1, edit="random")
        assert value(found, "reading", layer=layer, edit="random") == pytest.approx(same, abs=1e-4)
        assert abs(same) < 0.6
    if kind == "constrain":
        assert value(found, "step", layer=1, edit="concept") == 1
        for layer in (2, 3):
            assert value(found, "step", layer=layer, edit="concept") == pytest.approx(0, abs=1e-4)
    else:
        assert "step" not in found.columns


def test_persistence_is_the_ratio_of_what_probes_read(concept: Concept) -> None:
    """Against readings by hand; texts that meet the bound are left out."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    texts = [NEGATIVE[0], f"{NEGATIVE[1]} w9 w61", POSITIVE[2]]
    bound = concept.constrain(at_least=0.6, layers=[1, 3])
    found = experiments.persistence(model, tokenizer, concept, texts, bound)
    plain = record(model, tokenizer, texts)
    with Controller(model, [concept.constrain(at_least=0.6, layers=1)]):
        moved = record(model, tokenizer, texts)
    shift = {layer: concept[layer].logit(moved[layer]) - concept[layer].logit(plain[layer]) for layer in (1, 3)}
    assert float(shift[1][2]) == 0
    assert value(found, "reading", layer=3, edit="concept") == pytest.approx(
        float(shift[3].sum() / shift[1].sum()), rel=1e-3
    )
    assert "2 of 3 texts" in found.note
    received = []
    for text in texts[:2]:
        with Controller(model, [bound], record_magnitudes=True) as control:
            record(model, tokenizer, [text])
        received.append({layer: float(m[0, -1].abs()) for layer, m in control.magnitudes["planted"].items()})
    step = sum(each[3] for each in received) / sum(each[1] for each in received)
    assert value(found, "step", layer=3, edit="concept") == pytest.approx(step, rel=1e-3, abs=1e-5)


def test_persistence_refuses_what_it_cannot_follow(concept: Concept) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()

    def run(edit: Any, texts: Any = NEGATIVE[:2], probes: Concept = concept) -> Table:
        return experiments.persistence(model, tokenizer, probes, texts, edit)

    with pytest.raises(AmountError, match="For a preference vector use `inside`"):
        run(random_vector(model).add(1.0))
    with pytest.raises(AmountError, match="one amount for all texts"):
        run(concept.add([1.0, 2.0]))
    with pytest.raises(LayerError, match="must have a probe at layer 1"):
        run(random_addition((1,)), probes=fitted(model, layers=[2, 3]))
    with pytest.raises(TextsError, match="leaves all 2 alone"):
        run(concept.constrain(at_most=0.999999, layers=1), POSITIVE[:2])
    with pytest.raises(BaseModelMismatchError):
        run(concept.add(1.0), probes=fitted(tiny_model("gpt2")))


# The lens and the next token.


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_lens_is_what_the_head_says_of_a_stream_that_is_the_direction_alone(name: str) -> None:
    """Steps so long after the last block that the stream is the direction, both ways; soft caps undone."""
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    if name == "gemma2":
        model.config.final_logit_softcapping = None
    edit = random_addition((DEPTH - 1,), 1e7)
    found = experiments.lens(model, tokenizer, edit.directions[DEPTH - 1], top=5)
    said = []
    ids = torch.tensor([[5, 6, 7]])
    for magnitude in (1e7, -1e7):
        with torch.no_grad(), Controller(model, [replace(edit, amount=magnitude)]):
            said.append(model(ids).logits[0, -1])
    effect = (said[0] - said[1]) / 2
    best = (effect - effect.mean()).topk(5)
    raised = found.only(side="raised")
    assert raised["token"] == tuple(tokenizer.decode([int(token)]) for token in best.indices)
    assert raised["effect"] == pytest.approx(best.values.tolist(), rel=1e-3)


def test_the_lens_of_an_unembedding_row_finds_its_token() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    head, gain = model.lm_head.weight.detach(), model.model.norm.weight.detach()
    token = int(head.norm(dim=1).argmax())
    found = experiments.lens(model, tokenizer, head[token] / gain, top=3)
    assert found.rows[0][2] == tokenizer.decode([token])
    [random] = found.only(side="raised", rank=1)["random"]
    assert isinstance(random, Estimate)
    assert value(found, "effect", side="raised", rank=1) > random.high
    assert experiments.lens(model, tokenizer, -head[token] / gain, top=3).only(side="lowered")["token"][
        0
    ] == tokenizer.decode([token])


def test_the_lens_takes_a_concept_and_refuses_the_rest(concept: Concept) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    one = experiments.lens(model, tokenizer, concept.along("pattern"), layer=-1)
    other = experiments.lens(model, tokenizer, concept.directions["pattern"][3])
    assert one.rows == other.rows
    assert "'planted' (pattern) at layer 3" in one.title
    for bad in (torch.zeros(D_MODEL), torch.ones(7), torch.full((D_MODEL,), math.nan)):
        with pytest.raises(BaseModelMismatchError, match="A direction must be finite"):
            experiments.lens(model, tokenizer, bad)
    with pytest.raises(TextsError, match="`top` must be"):
        experiments.lens(model, tokenizer, concept, top=0)
    with pytest.raises(LayerError):
        experiments.lens(model, tokenizer, fitted(model, layers=[1]), layer=2)


def test_next_token_is_the_exact_change_and_sums_to_the_divergence(concept: Concept) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    head, gain = model.lm_head.weight.detach(), model.model.norm.weight.detach()
    token = int(head.norm(dim=1).argmax())
    planted = torch.nn.functional.normalize(head[token] / gain, dim=0)
    edit = replace(random_addition((3,), 30.0), directions={3: planted})
    found = experiments.next_token(model, tokenizer, PROMPTS, edit, top=len(tokenizer))
    assert found.rows[0][:3] == ("raised", 1, tokenizer.decode([token]))

    def said() -> torch.Tensor:
        with torch.no_grad():
            rows = [model(torch.tensor([tokenizer(text).input_ids])).logits[0, -1] for text in PROMPTS]
        return torch.stack(rows).double().log_softmax(-1)

    before = said()
    with Controller(model, [edit]):
        after = said()
    change = (after.exp() - before.exp()).mean(dim=0)
    assert value(found, "change", side="raised", rank=1) == pytest.approx(float(change[token]), abs=1e-5)
    divergence = float((after.exp() * (after - before)).sum(dim=-1).mean())
    assert value(found, "kl", side="all") == pytest.approx(divergence, rel=1e-4)
    whole = [cell.value for cell in found.only(side="raised")["kl"] if isinstance(cell, Estimate)]
    assert len(whole) == change.numel()
    assert sum(whole) == pytest.approx(divergence, rel=1e-4)
    control = [cell.value for cell in found.only(side="raised")["random change"] if isinstance(cell, Estimate)]
    assert control == sorted(control, reverse=True)  # of its own tokens, by its own rank
    assert sum(control) == pytest.approx(0, abs=1e-6)
    assert value(found, "random kl", side="all") > 0


def test_the_control_of_next_token_moves_as_far(concept: Concept) -> None:
    """Cascades of bounds, gated prompts and changes of weights: the control runs the same passes, and no others."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    gate = concept.reads(at_least=0.5, layer=0)
    edits = [
        concept.constrain(at_least=0.9, layers=[1, 2]).when(~gate),
        random_addition((2,), [3.0, 0.0, 1.0, 2.0], name="each"),
        random_vector(model).add(0.3),
    ]
    texts = [*PROMPTS, POSITIVE[0]]
    found = experiments.next_token(model, tokenizer, texts, edits, top=3)
    assert value(found, "kl", side="all") > 0
    assert value(found, "random kl", side="all") > 0
    none = experiments.next_token(model, tokenizer, texts, random_addition((2,), 0.0), top=1)
    assert value(none, "kl", side="all") == 0
    assert value(none, "random kl", side="all") == pytest.approx(0, abs=1e-9)


def test_next_token_refuses_what_does_not_act_before_it(concept: Concept) -> None:
    given = tiny_model("llama"), tiny_tokenizer(), PROMPTS
    late = random_addition((1,), 30.0, positions="generated")
    rising = random_addition((1,), 30.0).scheduled(linear(0.0, 1.0, over=4))
    for edit in (late, rising):
        with pytest.raises(AmountError, match="step 0"):
            experiments.next_token(*given, edit)


def test_experiments_want_a_model_that_nothing_edits(concept: Concept) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    step = concept.add(1.0)
    for run in (
        lambda: experiments.tokens(model, tokenizer, concept, PROMPTS[0]),
        lambda: experiments.persistence(model, tokenizer, concept, PROMPTS, step),
        lambda: experiments.next_token(model, tokenizer, PROMPTS, step),
        lambda: experiments.inside(model, tokenizer, random_vector(model), [concept], PROMPTS),
        lambda: experiments.ablate(model, tokenizer, random_vector(model), PROMPTS),
        lambda: experiments.edit_weights(model, tokenizer, step, PROMPTS),
    ):
        with pytest.raises(AttachError, match="by themselves"), Controller(model, [random_addition((1,), 5.0)]):
            run()


# What can carry a constant.


def test_only_what_reaches_the_output_unchanged_is_straight() -> None:
    llama, neox = find_decoder(tiny_model("llama")), find_decoder(tiny_model("gpt_neox"))
    names = [f"model.layers.1.{name}" for name in ("self_attn.o_proj", "mlp.down_proj", "input_layernorm")]
    assert straight(llama, 1, names) == ["model.layers.1.mlp.down_proj"]
    both = ["gpt_neox.layers.1.attention.dense", "gpt_neox.layers.1.mlp.dense_4h_to_h"]
    assert straight(neox, 1, both) == both  # parallel blocks add both
    gemma = find_decoder(tiny_model("gemma2"))
    assert straight(gemma, 1, ["model.layers.1.mlp.down_proj"]) == []


# Plots, and what is left behind.


def test_every_table_has_a_plot(concept: Concept) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    bound = concept.constrain(at_least=0.9, layers=[1, 2])
    lasting = experiments.persistence(model, tokenizer, concept, NEGATIVE[:4], bound)
    figure = plots.layers(lasting, "reading")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["concept", "random"]
    assert [line.get_linestyle() for line in figure.axes[0].lines] == ["-", "--"]
    assert len(plots.layers(lasting).axes[0].lines) == 5
    read = experiments.tokens(model, tokenizer, concept, NEGATIVE[0], interventions=bound)
    shown = plots.matrix(read, "steered probability", down="layer", across="position", labels=read.tokens)
    assert shown.axes[0].images[0].get_array().shape == (DEPTH, 4)
    words = plots.bars(experiments.lens(model, tokenizer, concept, top=2), "effect", "random", label="token")
    assert len(words.axes[0].patches) == 8
    with pytest.raises(ReportError, match="numbers along 'edit'"):
        plots.layers(lasting, axis="edit")


def test_nothing_is_left_behind(concept: Concept) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    marks = set(model.__dict__)
    experiments.where("x", model, tokenizer, positive=POSITIVE, negative=NEGATIVE, layers=[1])
    experiments.tokens(model, tokenizer, concept, NEGATIVE[0], interventions=[concept.erase()])
    experiments.persistence(model, tokenizer, concept, NEGATIVE[:3], concept.add(1.0, layers=1))
    experiments.lens(model, tokenizer, concept)
    experiments.next_token(model, tokenizer, PROMPTS, random_vector(model).add(1.0))
    with pytest.raises(SteerkitError):
        experiments.persistence(model, tokenizer, concept, POSITIVE[:1], concept.constrain(at_most=0.9999999, layers=1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert set(model.__dict__) == marks


def test_a_planted_probe_reads_a_planted_token(concept: Concept) -> None:
    """A probe whose weight is one word's embedding lights up at that word, before any block has run."""
    model, tokenizer = silenced(tiny_model("llama")), tiny_tokenizer()
    word = model.model.embed_tokens.weight.detach()[tokenizer.convert_tokens_to_ids("w33")]
    probes: Mapping[int, Probe] = {layer: Probe(word, -0.7 * float(word @ word)) for layer in range(DEPTH)}
    planted = replace(concept, probes=probes, fingerprint=None)
    found = experiments.tokens(model, tokenizer, planted, "w5 w33 w6 w33 w9")
    for layer in range(DEPTH):
        read = found.only(layer=layer)["logit"]
        assert [place for place, logit in enumerate(read) if isinstance(logit, float) and logit > 0] == [1, 3]
