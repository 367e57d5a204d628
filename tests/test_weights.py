"""Contract 5: how a preference vector acts inside a Controller, by hook and folded, on every architecture."""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_controller import assert_untouched, forward, generate, padded, place_of, prompts, ragged, residuals, snapshot
from tiny import (
    DEPTH,
    MODELS,
    VOCABULARY,
    random_addition,
    random_constraint,
    random_vector,
    seeded,
    tiny_model,
    unit_directions,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import steerkit.fold
import steerkit.maths.lowrank
from steerkit import Controller, load
from steerkit.errors import (
    AmountError,
    AttachError,
    BaseModelMismatchError,
    NotReachedError,
    SamplesError,
    UnsupportedModelError,
)
from steerkit.intervention import Intervention
from steerkit.maths.lowrank import Delta, LowRank, Stack, add_to, dense, parts, transposed
from steerkit.model import find_decoder
from steerkit.preferences.vector import PreferenceVector

ARCHITECTURES = list(MODELS)
CLOSE = {"atol": 6e-4, "rtol": 1e-4}
"""Logits of the tiny models have a standard deviation of about 6."""
LOOSER = {"atol": 6e-3, "rtol": 1e-3}
MIXES = {"low rank": False, "dense": True}

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
every_kind = pytest.mark.parametrize("kind", MIXES)
# peft 0.21 asks transformers for an attribute that transformers 5.23 has renamed
renamed_by_transformers = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def tolerance(name: str) -> dict[str, float]:
    return LOOSER if name == "mamba" else CLOSE


def reachable(model: Any, vector: PreferenceVector) -> PreferenceVector:
    """Return the part that hooks reach: what samples may have in different amounts."""
    kept = {key: delta for key, delta in vector.deltas.items() if key in find_decoder(model).reachable}
    return PreferenceVector(vector.name, kept, vector.fingerprint, vector.made, vector.transposed & set(kept))


def by_kind(model: Any, kind: str, name: str = "helpful", seed: int = 0) -> PreferenceVector:
    """Return low-rank changes, or dense ones with biases, of everything that hooks reach."""
    return reachable(model, random_vector(model, name, seed, full=MIXES[kind]))


def per_row(models: list[Any], run: Callable[[Any, int], Tensor]) -> Tensor:
    """Return what each model does with its row."""
    return torch.cat([run(model, row) for row, model in enumerate(models)])


def last_linear(model: Any) -> str:
    """Return the name of the last weight of the last block that a hook reaches; it writes to the stream, position-wise."""
    decoder = find_decoder(model)
    prefix = next(path for path, module in model.named_modules() if module is decoder.blocks[DEPTH - 1])
    return [key for key in decoder.reachable if key.startswith(f"{prefix}.") and key.endswith(".weight")][-1]


def one_of(vector: PreferenceVector, *names: str) -> PreferenceVector:
    return PreferenceVector(vector.name, {n: vector.deltas[n] for n in names}, vector.fingerprint)


# By hook as merged.


@every_architecture
@every_kind
def test_hook_equals_merge(name: str, kind: str) -> None:
    """Bare forward passes, with and without padding on either side; `dense` also writes norms, embeddings and experts."""
    model = tiny_model(name)
    vector = random_vector(model, full=MIXES[kind])
    merged = vector.merge_into(model, 0.75)
    batches: list[tuple[Tensor, Tensor | None]] = [
        (prompts(3), None),
        *(padded(ragged(), s) for s in ("left", "right")),
    ]
    plain = [forward(model, *batch) for batch in batches]
    with Controller(model, vector.add(0.75)):
        found = [forward(model, *batch) for batch in batches]
    for (ids, mask), steered, before in zip(batches, found, plain, strict=True):
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        assert float((steered - before)[real].abs().mean()) > 0.5
        torch.testing.assert_close(steered[real], forward(merged, ids, mask)[real], **tolerance(name))
    assert all(torch.equal(forward(model, *batch), before) for batch, before in zip(batches, plain, strict=True))


WAYS: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
}


@every_architecture
def test_generation_by_hook_equals_merge(name: str) -> None:
    model = tiny_model(name)
    vector = random_vector(model)
    merged = vector.merge_into(model)
    ids, mask = padded(ragged((8, 5)), "left")
    ran = []
    for way, more in WAYS.items():

        def run(one: Any, more: Mapping[str, Any] = more) -> Tensor:
            torch.manual_seed(3)
            return generate(one, ids, mask, max_new_tokens=4, **more)

        try:
            plain = run(model)
        except (ValueError, NotImplementedError, AttributeError):
            continue  # the unsteered model refuses it
        with Controller(model, vector.add(1.0)):
            steered = run(model)
        assert not torch.equal(steered, plain), way
        assert torch.equal(steered, run(merged)), way
        if way in ("static", "beams"):
            with Controller(model, vector.add([1.0, 0.0])):
                both = run(model)
            half = len(both) // 2
            assert torch.equal(both[:half], steered[:half]), way
            assert torch.equal(both[half:], plain[half:]), way
        ran.append(way)
    assert {"cached", "uncached", "sampled"} <= set(ran)
    assert name == "mamba" or set(ran) == set(WAYS)


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("more", [{"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 3}], ids=["chunks", "lookup"])
def test_other_ways_to_decode(name: str, more: dict[str, Any]) -> None:
    model = tiny_model(name)
    vector = random_vector(model)
    ids = prompts(1, 10)
    for positions in ("all", "last", "prompt", "generated"):
        with Controller(model, vector.add([1.0], positions=positions)):
            expected = generate(model, ids)
            assert torch.equal(generate(model, ids, **more), expected)
        assert not torch.equal(generate(model, ids), expected)


@every_architecture
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_bit_equal(name: str, side: str) -> None:
    """A change after which positions no longer mix: what a module and the last block put out at pad positions."""
    model = tiny_model(name)
    key = last_linear(model)
    vector = one_of(random_vector(model), key)
    ids, mask = padded(ragged(), side)
    module = model.get_submodule(key.rpartition(".")[0])
    seen: list[Tensor] = []
    plain = residuals(model, ids, mask)[-1]
    for amount in (3.0, [3.0, -2.0, 1.0]):
        with Controller(model, vector.add(amount)):
            handle = module.register_forward_hook(lambda _, __, output: seen.append(output))
            steered = residuals(model, ids, mask)[-1]
            handle.remove()
        handle = module.register_forward_hook(lambda _, __, output: seen.append(output))
        residuals(model, ids, mask)
        handle.remove()
        found, before = (each.reshape(*ids.shape, -1) for each in seen[-2:])
        assert torch.equal(steered[mask == 0], plain[mask == 0])
        assert torch.equal(found[mask == 0], before[mask == 0])
        assert not bool((steered == plain).all(-1)[mask == 1].any())


@every_architecture
@every_kind
def test_mixtures_equal_one_merge_a_sample(name: str, kind: str) -> None:
    """Two vectors, four samples: neither, one, the other, both."""
    model, ids = tiny_model(name), prompts(4)
    first, second = by_kind(model, kind), by_kind(model, "low rank", "harmless", 1)
    amounts = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, -0.5], [0.7, 0.4]])
    plain = forward(model, ids)
    merged = [(float(a) * first + float(b) * second).merge_into(model) for a, b in amounts]
    expected = per_row(merged, lambda one, row: forward(one, ids[row : row + 1]))
    tokens = per_row(merged, lambda one, row: generate(one, ids[row : row + 1], max_new_tokens=3))
    with Controller(model, [first.add(amounts[:, 0]), second.add(amounts[:, 1])]):
        found = forward(model, ids)
        assert torch.equal(generate(model, ids, max_new_tokens=3), tokens)
    torch.testing.assert_close(found, expected, **tolerance(name))
    assert torch.equal(found[0], plain[0])
    gaps = (expected[:, None] - expected[None]).abs().mean((-1, -2))
    assert bool((gaps[~torch.eye(4, dtype=torch.bool)] > 0.3).all())


AMOUNTS: dict[str, tuple[Any, list[dict[int, float]]]] = {
    "number": (0.5, [dict.fromkeys(range(4), 0.5)] * 3),
    "list": ([0.5, 0.0, -1.0], [dict.fromkeys(range(4), m) for m in (0.5, 0.0, -1.0)]),
    "samples and layers": (
        torch.tensor([[0.5, 0.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, -0.5, 0.25]]),
        [{0: 0.5, 2: 1.0, 3: -1.0}, {}, {0: 1.0, 1: 2.0, 2: -0.5, 3: 0.25}],
    ),
    "layers": ({1: 1.0, 3: -0.5}, [{1: 1.0, 3: -0.5}] * 3),
    "layers from the end": ({-1: 1.0, -3: -0.5}, [{1: -0.5, 3: 1.0}] * 3),
    "layers of samples": ({3: [1.0, 0.0, -0.5], 1: 0.5}, [{1: 0.5, 3: 1.0}, {1: 0.5}, {1: 0.5, 3: -0.5}]),
}


def in_blocks(vector: PreferenceVector) -> PreferenceVector:
    return vector.only(layers=vector.layers)


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("shape", AMOUNTS)
def test_amounts_of_every_shape(name: str, shape: str) -> None:
    amount, each = AMOUNTS[shape]
    model, ids = tiny_model(name), prompts(3)
    vector = in_blocks(random_vector(model))
    merged = [vector.merge_into(model, m) if m else model for m in each]
    expected = per_row(merged, lambda one, row: forward(one, ids[row : row + 1]))
    assert not torch.allclose(expected, forward(model, ids), atol=0.1)
    edit = vector.add(amount)
    with Controller(model, edit) as control:
        torch.testing.assert_close(forward(model, ids), expected, **tolerance(name))
        if "number" not in shape:
            with control.using(helpful=0.0):
                assert torch.equal(forward(model, ids), forward(tiny_model(name), ids))
        torch.testing.assert_close(forward(model, ids), expected, **tolerance(name))
    with Controller(model, vector.add(0.0, layers=edit.layers)) as control:
        control.using(helpful=amount)
        torch.testing.assert_close(forward(model, ids), expected, **tolerance(name))


def test_columns_of_amounts_follow_the_layers_as_given(model: Any) -> None:
    ids, vector = prompts(2), in_blocks(random_vector(model))
    merged = [vector.merge_into(model, m) for m in ({3: 1.0, 0: -0.5}, {3: 0.25, 0: 2.0})]
    expected = per_row(merged, lambda one, row: forward(one, ids[row : row + 1]))
    with Controller(model, vector.add(torch.tensor([[1.0, -0.5], [0.25, 2.0]]), layers=[3, 0])):
        torch.testing.assert_close(forward(model, ids), expected, **CLOSE)
    with Controller(model, vector.add(torch.tensor([[1.0, -0.5], [0.25, 2.0]]), layers=[-1, 0])):
        torch.testing.assert_close(forward(model, ids), expected, **CLOSE)


def test_amounts_for_each_layer_need_every_parameter_in_one(model: Any) -> None:
    """The head lies in no layer; equal columns are one number and go through."""
    vector, ids = random_vector(model), prompts(2)
    assert "lm_head.weight" in vector.deltas
    with pytest.raises(AmountError, match=r"lm_head\.weight"):
        vector.add(torch.tensor([[1.0, 0.5, 0.0, 0.0]] * 2))
    with Controller(model, vector.add(torch.ones(2, DEPTH))) as control:
        expected = forward(model, ids)
        for wrong in ({0: 1.0, 1: 1.0, 2: 1.0, 3: 0.5}, {0: 1.0}, [[1.0, 2.0]], float("nan"), [[[1.0]]], [], "1", True):
            with pytest.raises(AmountError):
                control.using(helpful=wrong)
            assert torch.equal(forward(model, ids), expected)
    with Controller(model, vector.add({0: 1.0, 3: [1.0, 0.5]}, name="some")):
        assert not torch.equal(forward(model, ids), expected)


def test_head_alone(model: Any) -> None:
    """A vector without any layer: per sample, and cut to the last positions as generate does."""
    ids, vector = prompts(3), one_of(random_vector(model), "lm_head.weight")
    assert vector.layers == ()
    merged = [vector.merge_into(model, m) for m in (1.0, 0.0, -2.0)]
    tokens = per_row(merged, lambda one, row: generate(one, ids[row : row + 1]))
    with Controller(model, vector.add([1.0, 0.0, -2.0])):
        assert torch.equal(generate(model, ids), tokens)
        found = forward(model, ids)
    expected = per_row(merged, lambda one, row: forward(one, ids[row : row + 1]))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.equal(tokens, generate(model, ids))


KEPT: dict[str, Any] = {
    "all": 0,
    "one": 1,
    "three": 3,
    "columns": torch.tensor([1, 4, 5]),
    "column": torch.tensor([2]),
    "as many": torch.arange(9, -1, -1),
}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("positions", ["all", "last", "prompt"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_head_with_logits_to_keep(model: Any, kept: str, positions: Any, side: str) -> None:
    """The logits of a column do not depend on which others are asked for, or the call is refused."""
    ids, mask = (prompts(3), None) if side == "none" else padded(ragged(), side)
    vector, keep = one_of(random_vector(model), "lm_head.weight"), KEPT[kept]
    columns = slice(-keep if keep else None, None) if isinstance(keep, int) else keep
    more = {} if mask is None else {"attention_mask": mask, **place_of(model, mask)}
    with Controller(model, vector.add([1.0, 2.0, -1.0], positions=positions)), torch.no_grad():
        whole = model(ids, **more).logits
        try:
            found = model(ids, logits_to_keep=keep, **more).logits
        except (SamplesError, AttachError):
            return
    assert not torch.equal(whole, forward(model, ids, mask))
    torch.testing.assert_close(found, whole[:, columns], **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_order_of_the_list_is_irrelevant(name: str) -> None:
    model, ids = tiny_model(name), prompts(3)
    edits: list[Intervention] = [
        by_kind(model, "dense").add([0.5, 0.0, 1.0]),
        by_kind(model, "low rank", "harmless", 1).add(0.5),
        by_kind(model, "low rank", "honest", 2).add([0.0, 1.0, -0.5]),
    ]
    found = []
    for order in itertools.permutations(edits):
        with Controller(model, order):
            found.append(forward(model, ids))
    assert not torch.allclose(found[0], forward(model, ids), atol=0.5)
    assert all(torch.allclose(each, found[0], **CLOSE) for each in found[1:])


@every_kind
@pytest.mark.parametrize("fold", [False, True])
def test_a_vector_under_two_names_adds_up(model: Any, kind: str, fold: bool) -> None:
    ids, vector = prompts(2), random_vector(model, full=MIXES[kind])
    with Controller(model, vector.add(0.75), fold=fold):
        expected = forward(model, ids)
    with Controller(model, [vector.add(1.0), vector.add(-0.25, name="again")], fold=fold):
        torch.testing.assert_close(forward(model, ids), expected, **CLOSE)
    with pytest.raises(AmountError, match="'helpful' twice"):
        Controller(model, [vector.add(1.0), vector.add(-0.25)], fold=fold)


def test_more_samples_than_there_was_room_for(model: Any) -> None:
    ids, vector = prompts(70, 4), random_vector(model)
    amounts = torch.linspace(-1, 1, 70)
    with Controller(model, vector.add(0.0)) as control:
        control.using(helpful=amounts)
        found, tokens = forward(model, ids), generate(model, ids, max_new_tokens=2)
        control.using(helpful=1.0)
        torch.testing.assert_close(forward(model, ids)[69], found[69], **CLOSE)
    for row in (0, 34, 63, 64, 69):
        merged = vector.merge_into(model, float(amounts[row]))
        torch.testing.assert_close(found[row], forward(merged, ids[row : row + 1])[0], **CLOSE)
        assert torch.equal(tokens[row], generate(merged, ids[row : row + 1], max_new_tokens=2)[0])


@pytest.mark.parametrize("how", ["generate", "forward"])
@pytest.mark.parametrize("padding", [False, True])
def test_wrong_number_of_samples(model: Any, how: str, padding: bool) -> None:
    ids, mask = padded(ragged(), "left")
    run = {"generate": generate, "forward": forward}[how]
    with Controller(model, random_vector(model).add([1.0, 0.5])):
        with pytest.raises(SamplesError, match=r"2 samples.*3") as caught:
            run(model, ids, mask if padding else None)
        assert (caught.value.expected, caught.value.found) == (2, 3)
        run(model, ids[:2], mask[:2] if padding else None)


def test_what_is_prepared_follows_every_change(model: Any) -> None:
    """Rows, amounts and dtype change between forward passes of one attached Controller."""
    vector = random_vector(model)
    with Controller(model, vector.add(1.0)) as control:
        for rows, amount in ((2, 1.0), (3, [1.0, 0.0, -1.0]), (1, [0.5]), (5, 0.25), (3, [0.0, 1.0, 0.5])):
            control.using(helpful=amount)
            ids = prompts(rows)
            found = forward(model, ids)
            numbers = [amount] * rows if isinstance(amount, float) else amount
            for row, m in enumerate(numbers):
                expected = forward(vector.merge_into(tiny_model("llama"), m), ids[row : row + 1])[0]
                torch.testing.assert_close(found[row], expected, **CLOSE)
        control.using(helpful=1.0)
        model.double()
        found = forward(model, prompts())
        model.float()
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.float(), forward(model, prompts()), **CLOSE)


# Nothing is steered that should not be, and nothing stays.


@every_architecture
@every_kind
def test_a_row_of_magnitude_0_is_bit_equal(name: str, kind: str) -> None:
    """In a batch with other rows, on the short path (no mask) and on the general one (mask, recording)."""
    model, vector = tiny_model(name), by_kind(tiny_model(name), kind)
    ids, mask = padded(ragged(), "left")
    full = prompts(3)
    plain, plain_padded = forward(model, full), forward(model, ids, mask)
    for record in (False, True):
        with Controller(model, vector.add([0.0, 1.0, 0.0]), record_magnitudes=record) as control:
            found, found_padded = forward(model, full), forward(model, ids, mask)
            with control.using(helpful=0):
                assert torch.equal(forward(model, full), plain)
                assert torch.equal(forward(model, ids, mask), plain_padded)
        for steered, before in ((found, plain), (found_padded, plain_padded)):
            assert torch.equal(steered[[0, 2]], before[[0, 2]])
            assert not torch.allclose(steered[1], before[1], atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@every_kind
def test_a_row_of_magnitude_0_is_bit_equal_in_other_dtypes(name: str, dtype: torch.dtype, kind: str) -> None:
    model, ids = tiny_model(name).to(dtype), prompts(3)
    vector, plain, tokens = by_kind(model, kind), forward(model, ids), generate(model, ids)
    with Controller(model, vector.add([0.0, 1.0, 0.0])):
        assert torch.equal(forward(model, ids)[[0, 2]], plain[[0, 2]])
        found = generate(model, ids)
    assert torch.equal(found[[0, 2]], tokens[[0, 2]])
    assert not torch.equal(found[1], tokens[1])


@every_architecture
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
@pytest.mark.parametrize("fold", [False, True], ids=["hook", "fold"])
def test_leaving_leaves_nothing_behind(name: str, error: type[BaseException] | None, fold: bool) -> None:
    """Also from within a forward pass; the vector has parts that are written whatever `fold` says."""
    model, ids = tiny_model(name), prompts(2, 6)
    before, plain = snapshot(model), forward(model, ids)
    control = Controller(model, random_vector(model, full=True).add(1.0), fold=fold)

    def interrupt(*_: Any) -> None:
        raise error("inside") if error is not None else AssertionError

    def use() -> None:
        with control:
            assert not torch.allclose(forward(model, ids), plain, atol=0.5)
            if error is not None:
                handle = find_decoder(model).blocks[2].register_forward_hook(interrupt)
                try:
                    generate(model, ids)
                finally:
                    handle.remove()

    if error is None:
        use()
    else:
        with pytest.raises(error, match="inside"):
            use()
    assert_untouched(model, before)
    assert torch.equal(forward(model, ids), plain)


@pytest.mark.parametrize("where", ["hook", "prepare", "amounts", "save", "first write", "middle write", "last write"])
@pytest.mark.parametrize("fold", [False, True], ids=["hook", "fold"])
@pytest.mark.parametrize("nested", [False, True])
def test_failing_attach_leaves_nothing_behind(
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    fold: bool,
    nested: bool,
) -> None:
    ids, vector = prompts(), random_vector(model, full=True)
    edits = [vector.add(1.0), random_addition((1,), 5.0)]
    control = Controller(model, edits, fold=fold)
    writes = len(vector.deltas) if fold else len(vector.deltas) - len(reachable(model, vector).deltas)
    outer = Controller(model, random_vector(model, "outer", 5, full=True).add(0.5), fold=fold)
    before = snapshot(model)
    if nested:
        outer.attach()
    plain, weights = forward(model, ids), {key: value.clone() for key, value in model.state_dict().items()}

    def fail_at(count: int, original: Callable[..., Any]) -> Callable[..., Any]:
        calls = itertools.count()

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == count:
                raise KeyboardInterrupt("attaching")
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if where == "hook":
            count = 0 if fold else 3
            patch.setattr(nn.Module, "register_forward_hook", fail_at(count, nn.Module.register_forward_hook))
        elif where == "prepare":
            patch.setattr(control._sites[-1], "prepare", fail_at(0, control._sites[-1].prepare))
        elif where == "amounts":
            patch.setattr(control._sites[-1], "write", fail_at(0, control._sites[-1].write))
        elif where == "save":
            patch.setattr(steerkit.fold, "checksum", fail_at(writes // 2, steerkit.fold.checksum))
        else:
            count = {"first write": 0, "middle write": writes // 2, "last write": writes - 1}[where]
            patch.setattr(steerkit.fold, "add_to", fail_at(count, steerkit.fold.add_to))
        with pytest.raises(KeyboardInterrupt, match="attaching"):
            control.attach()
    assert torch.equal(forward(model, ids), plain)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    with control:
        assert not torch.allclose(forward(model, ids), plain, atol=0.5)
    assert torch.equal(forward(model, ids), plain)
    if nested:
        outer.detach()
    assert_untouched(model, before)


def test_originals_are_saved_before_the_first_write(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is written, a copy of every original exists by then, and it is one: it shares no memory."""
    vector, before = random_vector(model, full=True), snapshot(model)["weights"]
    control, checked = Controller(model, vector.add(1.0), fold=True), []

    def watch(*args: Any, **kwargs: Any) -> None:
        saved = control._fold._saved
        assert set(saved) == set(vector.deltas)
        assert all(torch.equal(saved[key], before[key]) for key in saved)
        own = {value.data_ptr() for value in model.state_dict().values()}
        assert not own & {value.data_ptr() for value in saved.values()}
        checked.append(True)
        add_to(*args, **kwargs)

    monkeypatch.setattr(steerkit.fold, "add_to", watch)
    with control:
        forward(model, prompts())
    assert len(checked) == len(vector.deltas)


@pytest.mark.parametrize("count", [0, 7])
def test_failing_using_while_folded(model: Any, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Half of the weights may be written by then; the originals come back all the same, and a second try writes all."""
    ids, before, vector = prompts(), snapshot(model), random_vector(model)
    calls = itertools.count()

    def fail(*args: Any, **kwargs: Any) -> None:
        if next(calls) == count:
            raise KeyboardInterrupt("writing")
        add_to(*args, **kwargs)

    with Controller(model, vector.add(0.5), fold=True) as control:
        with monkeypatch.context() as patch:
            patch.setattr(steerkit.fold, "add_to", fail)
            with pytest.raises(KeyboardInterrupt, match="writing"):
                control.using(helpful=1.0)
        control.using(helpful=1.0)
        merged = vector.merge_into(tiny_model("llama"))
        torch.testing.assert_close(forward(model, ids), forward(merged, ids), **CLOSE)
    assert_untouched(model, before)


# Written into the weights.


@every_architecture
def test_fold_equals_merge(name: str) -> None:
    """Every parameter, bit for bit what a merge writes; `using` rewrites them from the originals."""
    model, ids = tiny_model(name), prompts()
    vector, before = random_vector(model, full=True), snapshot(model)
    with Controller(model, vector.add(1.0), fold=True) as control:
        for m in (1.0, -0.5, 0.3, 0.0):
            control.using(helpful=m)
            merged = vector.merge_into(tiny_model(name), m)
            for (key, found), (_, expected) in zip(model.named_parameters(), merged.named_parameters(), strict=True):
                torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6, msg=key)
            torch.testing.assert_close(forward(model, ids), forward(merged, ids), **tolerance(name))
            if m == 0.0:
                assert all(torch.equal(value, before["weights"][key]) for key, value in model.state_dict().items())
            else:
                assert not any(torch.equal(p, before["weights"][key]) for key, p in model.named_parameters())
    assert_untouched(model, before)


def test_fold_by_layer(model: Any) -> None:
    vector = in_blocks(random_vector(model, full=True))
    amount = {0: 1.0, 2: -0.5}
    merged = vector.merge_into(model, amount)
    with Controller(model, vector.add(amount), fold=True):
        for (key, found), (_, expected) in zip(model.named_parameters(), merged.named_parameters(), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.bfloat16), ("gpt2", torch.bfloat16), ("llama", torch.float16)]
)
def test_undo_is_bit_exact_after_100_cycles(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name).to(dtype)
    with torch.no_grad():
        next(model.parameters()).view(-1)[-2:] = torch.tensor([float("nan"), -0.0], dtype=dtype)
    vector = random_vector(tiny_model(name), full=True)
    before = {key: value.view(torch.int16).clone() for key, value in model.state_dict().items()}
    amounts = torch.linspace(-2, 2, 100).tolist()
    control = Controller(model, vector.add(0.1), fold=True, check_model=False)
    for cycle, m in enumerate(amounts):
        control.using(helpful=m)
        with control:
            if cycle == 0:
                assert not any(
                    torch.equal(value.view(torch.int16), before[key]) for key, value in model.state_dict().items()
                )
            control.using(helpful=m / 3)
    assert all(torch.equal(value.view(torch.int16), before[key]) for key, value in model.state_dict().items())


def test_nested_folds_undo_in_order(model: Any) -> None:
    ids, before = prompts(), snapshot(model)
    first, second = random_vector(model, "first", 1, full=True), random_vector(model, "second", 2)
    merged = first.merge_into(model, 0.5)
    both = second.merge_into(merged, -1.0, check_model=False)
    outer, inner = (Controller(model, v.add(m), fold=True) for v, m in ((first, 0.5), (second, -1.0)))
    with outer:
        one = {key: value.clone() for key, value in model.state_dict().items()}
        torch.testing.assert_close(forward(model, ids), forward(merged, ids), **CLOSE)
        for _ in range(3):
            with inner:
                torch.testing.assert_close(forward(model, ids), forward(both, ids), **CLOSE)
            assert all(torch.equal(value, one[key]) for key, value in model.state_dict().items())
    assert_untouched(model, before)


def test_nested_folds_left_in_the_wrong_order(model: Any) -> None:
    """Refused, as often as it is tried; everything acts on as before, and the right order still undoes all."""
    ids, before = prompts(), snapshot(model)
    first, second = random_vector(model, "first", 1), random_vector(model, "second", 2, full=True)
    outer, inner = Controller(model, first.add(0.5), fold=True), Controller(model, second.add(0.5), fold=True)
    outer.attach()
    inner.attach()
    both = forward(model, ids)
    for _ in range(2):
        with pytest.raises(AttachError, match="inner"):
            outer.detach()
        with pytest.raises(AttachError, match="inner"):
            outer.using(first=2.0)
        with pytest.raises(AttachError):
            outer.attach()
        assert torch.equal(forward(model, ids), both)
    inner.detach()
    torch.testing.assert_close(forward(model, ids), forward(first.merge_into(tiny_model("llama"), 0.5), ids), **CLOSE)
    outer.detach()
    assert_untouched(model, before)


def test_refused_using_beneath_an_inner_fold_changes_nothing(model: Any) -> None:
    """Hooks and weights of one vector must not end with different magnitudes, nor a later pass with new ones."""
    ids, vector = prompts(), random_vector(model, full=True)
    outer = Controller(
        model, [vector.add(0.5), random_addition((1,), 5.0)]
    )  # norms and embeddings written, the rest by hook
    inner = Controller(model, random_vector(model, "second", 2, full=True).add(0.5), fold=True)
    with outer:
        alone = forward(model, ids)
        with inner:
            both = forward(model, ids)
            with pytest.raises(AttachError, match="inner"):
                outer.using(helpful=2.0, added=-9.0)
            assert torch.equal(forward(model, ids), both)
        assert torch.equal(forward(model, ids), alone)
        outer.using(added=5.0)
        assert torch.equal(forward(model, ids), alone)


def test_nested_folds_of_other_weights_leave_in_any_order(model: Any) -> None:
    before, vector = snapshot(model), in_blocks(random_vector(model))
    merged = vector.merge_into(model, {1: 1.0})
    outer, inner = (Controller(model, vector.add(1.0, layers=[layer]), fold=True) for layer in (0, 1))
    outer.attach()
    inner.attach()
    outer.using(helpful=0.5)
    outer.detach()
    torch.testing.assert_close(forward(model, prompts()), forward(merged, prompts()), **CLOSE)
    inner.detach()
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", ["fold", "hook", "load"])
def test_controllers_made_while_weights_are_folded(model: Any, kind: str, tmp_path: Any) -> None:
    """The base model is the same one, whatever is written into its weights for the time being: Controllers nest."""
    ids, before = prompts(), snapshot(model)
    first, second = random_vector(model, "first", 1), random_vector(model, "second", 2)
    expected = forward((first + 0.5 * second).merge_into(model), ids)
    second.save(tmp_path / "second.safetensors")
    with Controller(model, first.add(1.0), fold=True):
        if kind == "load":
            second = load(tmp_path / "second.safetensors", model=model)
        with Controller(model, second.add(0.5), fold=kind == "fold"):
            torch.testing.assert_close(forward(model, ids), expected, **CLOSE)
    assert_untouched(model, before)


@pytest.mark.parametrize("order", ["hook outside", "fold outside"])
def test_hooks_and_folds_nest(model: Any, order: str) -> None:
    ids, before = prompts(), snapshot(model)
    first, second = random_vector(model, "first", 1), random_vector(model, "second", 2, full=True)
    expected = forward((0.5 * first + 0.5 * second).merge_into(model), ids)
    hooked, folded = Controller(model, first.add([0.5, 0.5])), Controller(model, second.add(0.5), fold=True)
    outer, inner = (hooked, folded) if order == "hook outside" else (folded, hooked)
    with outer, inner:
        torch.testing.assert_close(forward(model, ids), expected, **CLOSE)
    assert_untouched(model, before)
    outer.attach()
    inner.attach()
    forward(model, ids)
    outer.detach()
    forward(model, ids)
    inner.detach()
    assert_untouched(model, before)


UNREACHED = {
    "llama": r"norm|embed",
    "gpt2": r"ln_|wte|wpe",
    "mixtral": r"experts|gate|norm|embed",
    "mamba": r"conv1d|norm|embed|A_log|D|dt_proj",
}


@pytest.mark.parametrize("name", UNREACHED)
@pytest.mark.parametrize("what", ["samples", "positions"])
def test_what_no_hook_reaches_is_refused_by_name(name: str, what: str) -> None:
    model, ids = tiny_model(name), prompts(2)
    vector, before = random_vector(model, full=True), snapshot(model)
    wrong: dict[str, Any] = {"magnitude": [1.0, 0.0]} if what == "samples" else {"positions": "last"}
    found = "2 of them" if what == "samples" else "positions='last'"
    with pytest.raises(AmountError, match=f"'[^']*({UNREACHED[name]})[^']*'.*{found}"):
        Controller(model, vector.add(**wrong))
    with pytest.raises(AmountError, match=f"'(?=[^']*[.])[^']*'.*{found}"):
        Controller(model, reachable(model, vector).add(**wrong), fold=True)
    merged = vector.merge_into(model, 0.5)
    if what == "samples":
        with Controller(model, vector.add(0.5)) as control:
            with pytest.raises(AmountError, match=f"({UNREACHED[name]}).*{found}"):
                control.using(helpful=[1.0, 0.0])
            torch.testing.assert_close(forward(model, ids), forward(merged, ids), **tolerance(name))
        with Controller(model, vector.add(0.5), fold=True) as control:
            with pytest.raises(AmountError, match=found):
                control.using(helpful=torch.tensor([1.0, 0.0]))
            torch.testing.assert_close(forward(model, ids), forward(merged, ids), **tolerance(name))
    assert_untouched(model, before)


def test_fold_without_anything_to_fold(model: Any) -> None:
    with pytest.raises(AmountError, match="fold=True"):
        Controller(model, random_addition(), fold=True)


def test_merging_a_model_that_is_in_use_is_refused(model: Any) -> None:
    vector = random_vector(model)
    for fold in (False, True):
        with Controller(model, vector.add(1.0), fold=fold):
            forward(model, prompts())
            with pytest.raises(AttachError, match="Detach"):
                vector.merge_into(model)


def test_a_vector_of_another_model_is_refused(model: Any) -> None:
    vector = random_vector(tiny_model("qwen2"))
    for make in (lambda: Controller(model, vector.add(1.0)), lambda: vector.merge_into(model)):
        with pytest.raises(BaseModelMismatchError):
            make()
    cut = {key: LowRank(d.left[:-1], d.right) for key, d in random_vector(model).deltas.items()}
    with pytest.raises(BaseModelMismatchError, match="shape"):
        Controller(model, PreferenceVector("cut", cut).add(1.0))
    with pytest.raises(BaseModelMismatchError, match="no parameter of that name"):
        Controller(model, PreferenceVector("x", {"model.layers.0.nothing.weight": torch.ones(2, 2)}).add(1.0))


# Forms of models.


def _tied(name: str) -> Any:
    model = tiny_model(name)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = True
    with torch.random.fork_rng(devices=[]):
        tied = seeded(type(model)(config), 3)
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
    return tied


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tied_embeddings(name: str) -> None:
    """The shared matrix is written once and stays shared; a hook would change one use of it only."""
    model, ids = _tied(name), prompts()
    vector, before = random_vector(model, full=True), snapshot(model)
    shared = next(key for key, p in model.named_parameters() if p is model.get_output_embeddings().weight)
    assert shared in vector.deltas
    assert "lm_head.weight" not in vector.deltas
    merged = vector.merge_into(model)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert not torch.allclose(forward(merged, ids), forward(model, ids), atol=0.5)
    with pytest.raises(AmountError, match=shared.replace(".", r"\.")):
        Controller(model, one_of(vector, shared).add([1.0, 0.0]))
    for fold in (False, True):
        with Controller(model, vector.add(1.0), fold=fold):
            assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
            torch.testing.assert_close(forward(model, ids), forward(merged, ids), **CLOSE)
            assert torch.equal(generate(model, ids), generate(merged, ids))
        assert_untouched(model, before)
    head = PreferenceVector("head", {"lm_head.weight": vector.deltas[shared]})
    with pytest.raises(BaseModelMismatchError, match=r"lm_head\.weight"):
        Controller(model, head.add(1.0))


def test_conv1d_is_not_transposed_twice() -> None:
    """GPT-2 keeps `"input output"`; a square projection would hide a wrong orientation."""
    model, ids = tiny_model("gpt2"), prompts()
    key = "transformer.h.1.attn.c_proj.weight"
    vector = one_of(random_vector(model), key)
    weight = model.get_parameter(key)
    assert weight.shape[0] == weight.shape[1]
    with torch.no_grad():
        weight.add_(dense(vector.deltas[key]))
        expected = forward(model, ids)
        weight.sub_(dense(vector.deltas[key]))
    assert not torch.allclose(expected, forward(model, ids), atol=0.1)
    with Controller(model, vector.add([1.0, 1.0]), check_model=False):
        torch.testing.assert_close(forward(model, ids), expected, **CLOSE)


@pytest.mark.parametrize("padding", [False, True])
def test_flattened_rows(padding: bool) -> None:
    """A linear module that sees rows x positions in one dimension, as OPT's feed-forward once did."""
    model = tiny_model("opt")
    for layer in model.model.decoder.layers:
        layer.fc1, layer.fc2 = Flat(layer.fc1), Flat(layer.fc2)
    ids, mask = padded(ragged(), "left") if padding else (prompts(3), None)
    names = [key for key in find_decoder(model).reachable if "fc" in key and key.endswith("weight")]
    assert len(names) == 2 * DEPTH
    vector = one_of(random_vector(model), *names)
    merged = [vector.merge_into(model, m) for m in (1.0, 0.0, -1.0)]

    def alone(one: Any, row: int) -> Tensor:
        return forward(one, ids, mask)[row : row + 1]

    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    for positions in ("all", "prompt"):
        with Controller(model, vector.add([1.0, 0.0, -1.0], positions=positions)):
            torch.testing.assert_close(forward(model, ids, mask)[real], per_row(merged, alone)[real], **CLOSE)
            tokens = generate(model, ids, mask)
        if positions == "all":
            assert torch.equal(tokens, per_row(merged, lambda one, row: generate(one, ids, mask)[row : row + 1]))


class Flat(nn.Linear):
    """A linear module that is called with, and returns, `"row input"`: one row of a forward pass after the other."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias

    def __call__(self, input: Tensor) -> Tensor:
        return super().__call__(input.reshape(-1, input.shape[-1])).view(*input.shape[:-1], -1)


class Routed(nn.Module):
    """Two experts, each a linear module that is called with its tokens only, in order."""

    def __init__(self, gate: Tensor) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(len(gate), len(gate), bias=False) for _ in range(2))
        self.register_buffer("gate", gate)

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen = (flat @ self.gate > 0).long()
        result = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            mine = chosen == index
            if bool(mine.any()):
                result[mine] = expert(flat[mine])
        return result.view(hidden.shape)


def _routed() -> tuple[Any, Tensor]:
    """Return a model in which the batch that is watched goes to one expert, and ids of which some do."""
    watched = torch.tensor([[1, 0, 1], [0, 1, 1]])
    for seed in range(400):
        model = tiny_model("llama")
        gate = torch.randn(32, generator=torch.Generator().manual_seed(seed))
        model.model.layers[0].mlp = mlp = Routed(gate)
        with torch.no_grad():
            for index, expert in enumerate(mlp.experts):
                expert.weight.copy_(0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(index)))
        seen: list[int] = []
        mlp.experts[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
        forward(model, watched)
        if seen != [6]:
            continue
        for other in range(40):
            ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(other))
            seen.clear()
            forward(model, ids[:1])
            forward(model, ids[1:])
            if len(seen) == 2 and seen[0] + 2 == seen[1]:  # an even number, unevenly from the two rows
                mlp.experts[0]._forward_pre_hooks.clear()
                return model, ids
    raise AssertionError("no gate sends the watched batch to one expert")


@pytest.mark.parametrize("padding", [False, True])
def test_experts_that_see_some_tokens(padding: bool) -> None:
    """By chance the batch that was watched went to one expert whole, as the tokens 0 and 1 are alike to the router."""
    model, ids = _routed()
    key = "model.layers.0.mlp.experts.0.weight"
    vector = random_vector(model, full=True)
    vector = PreferenceVector("helpful", {key: 2 * vector.deltas[key]}, vector.fingerprint)
    mask = torch.ones_like(ids) if padding else None
    rows = [vector.merge_into(model, m) for m in (1.0, -1.0)]
    expected = per_row(rows, lambda one, row: forward(one, ids[row : row + 1]))
    assert not torch.allclose(expected, forward(model, ids), atol=0.1)
    try:
        with Controller(model, vector.add([1.0, -1.0])):
            found = forward(model, ids, mask)
    except (SamplesError, AmountError, UnsupportedModelError):
        pass
    else:
        torch.testing.assert_close(found, expected, **CLOSE)
    with Controller(model, vector.add(1.0), fold=True):
        torch.testing.assert_close(forward(model, ids), forward(rows[0], ids), **CLOSE)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bloom"])
def test_biases_alone(name: str) -> None:
    """A vector of biases beside one of weights at the same modules, and by itself."""
    model, ids = tiny_model(name), prompts(3)
    whole = by_kind(model, "dense")
    biases = one_of(whole, *(key for key in whole.deltas if key.endswith("bias"))) * 3
    weights, amounts = by_kind(model, "low rank", "harmless", 1), ([1.0, 0.0, -1.0], [0.0, 0.5, 1.0])
    mask = torch.ones_like(ids)
    rows = [(m * biases + n * weights).merge_into(model) for m, n in zip(*amounts, strict=True)]
    expected = per_row(rows, lambda one, row: forward(one, ids[row : row + 1]))
    alone = per_row(
        [biases.merge_into(model, m) for m in amounts[0]], lambda one, row: forward(one, ids[row : row + 1])
    )
    assert not torch.allclose(alone, forward(model, ids), atol=0.1)
    for given_mask in (None, mask):
        with Controller(model, [biases.add(amounts[0]), weights.add(amounts[1])]):
            torch.testing.assert_close(forward(model, ids, given_mask), expected, **CLOSE)
        with Controller(model, biases.add(amounts[0])):
            torch.testing.assert_close(forward(model, ids, given_mask), alone, **CLOSE)


@pytest.mark.parametrize("fold", [False, True], ids=["hook", "fold"])
def test_parameters_replaced_after_construction(model: Any, fold: bool) -> None:
    """`load_state_dict(assign=True)` puts other tensors in their place: the new ones are changed, and restored."""
    ids, vector = prompts(), random_vector(model, full=True)
    control = Controller(model, vector.add(1.0), fold=fold)
    expected = forward(vector.merge_into(model), ids)
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    before = snapshot(model)
    try:
        with control:
            found = forward(model, ids)
    except AttachError:
        pass
    else:
        torch.testing.assert_close(found, expected, **CLOSE)
    assert_untouched(model, before)


def _lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


@renamed_by_transformers
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("given", ["peft", "base"])
def test_peft_model_with_an_active_adapter(name: str, given: str) -> None:
    """A vector changes the base weights beneath the adapter, whichever object the Controller was given."""
    plain_model, ids = tiny_model(name), prompts()
    vector = random_vector(plain_model, full=True)
    thin = random_vector(plain_model, "thin", 1)
    expected = _lora(vector.merge_into(plain_model, 0.5))
    rows = [_lora(thin.merge_into(plain_model, m)) for m in (1.0, -0.5)]
    wrapped = _lora(tiny_model(name))
    base = wrapped.get_base_model()
    with wrapped.disable_adapter():
        generate(wrapped, ids)  # peft leaves attributes of its own behind
    target, plain = wrapped if given == "peft" else base, forward(wrapped, ids)
    before, outer = snapshot(base), snapshot(wrapped)
    for fold in (False, True):
        with Controller(target, vector.add(0.5), fold=fold):
            torch.testing.assert_close(forward(wrapped, ids), forward(expected, ids), **CLOSE)
            assert torch.equal(generate(wrapped, ids), generate(expected, ids))
            with wrapped.disable_adapter(), expected.disable_adapter():
                torch.testing.assert_close(forward(wrapped, ids), forward(expected, ids), **CLOSE)
        assert_untouched(base, before)
        assert_untouched(wrapped, outer)
    with Controller(target, thin.add([1.0, -0.5])):
        found, tokens = forward(wrapped, ids), generate(wrapped, ids)
    torch.testing.assert_close(found, per_row(rows, lambda one, row: forward(one, ids[row : row + 1])), **CLOSE)
    assert torch.equal(tokens, per_row(rows, lambda one, row: generate(one, ids[row : row + 1])))
    assert not torch.allclose(found, plain, atol=0.5)
    with pytest.raises(AttachError, match="Peft"):
        vector.merge_into(wrapped)
    assert_untouched(base, before)
    assert_untouched(wrapped, outer)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_offloaded_model(name: str) -> None:
    """Weights that are on the meta device between passes: by hook as in memory; nothing can be written."""
    from accelerate import cpu_offload

    model, ids = tiny_model(name), prompts(3)
    vector = random_vector(model)
    full = random_vector(model, full=True)
    with Controller(model, vector.add([1.0, 0.0, -0.5])):
        expected, tokens = forward(model, ids), generate(model, ids)
    plain = forward(model, ids)
    away = cpu_offload(tiny_model(name), execution_device=torch.device("cpu"))
    assert {p.device.type for p in away.parameters()} == {"meta"}
    hooks = {path: list(module._forward_hooks) for path, module in away.named_modules()}
    with Controller(away, vector.add([1.0, 0.0, -0.5])):
        torch.testing.assert_close(forward(away, ids), expected, **CLOSE)
        assert torch.equal(generate(away, ids), tokens)
    for refused in (
        lambda: Controller(away, vector.add(1.0), fold=True),
        lambda: Controller(away, full.add(1.0)),
        lambda: vector.merge_into(away),
    ):
        with pytest.raises(UnsupportedModelError, match=r"'[a-z_]+(\.[a-z0-9_]+)+' offloaded"):
            refused()
    assert hooks == {path: list(module._forward_hooks) for path, module in away.named_modules()}
    assert {p.device.type for p in away.parameters()} == {"meta"}
    torch.testing.assert_close(forward(away, ids), plain, atol=1e-5, rtol=1e-5)


class Packed(nn.Module):
    """A linear module with eight-bit weights: as a parameter, or packed in a buffer as GPTQ and AWQ keep them."""

    def __init__(self, linear: nn.Linear, how: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.how = linear.in_features, linear.out_features, how
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        whole = (linear.weight.detach() / scale).round().to(torch.int8)
        self.register_buffer("scale", scale)
        if how == "parameter":
            self.weight = nn.Parameter(whole, requires_grad=False)
        elif how == "packed parameter":
            self.weight = nn.Parameter(whole.view(torch.uint8).reshape(-1, 1), requires_grad=False)
        else:
            self.register_buffer("qweight", whole)

    def forward(self, input: Tensor) -> Tensor:
        kept = self.qweight if self.how == "buffer" else self.weight
        return input @ (kept.view(torch.int8).view(self.out_features, -1) * self.scale).T


def _quantised(how: str) -> tuple[Any, Any]:
    """Return a model whose blocks are quantised, and one that computes the same with floating-point weights."""
    model, twin = tiny_model("llama"), tiny_model("llama")
    if how == "torch.ao":
        model.model.layers = torch.ao.quantization.quantize_dynamic(model.model.layers, {nn.Linear}, dtype=torch.qint8)
        return model, twin
    for block, other in zip(model.model.layers, twin.model.layers, strict=True):
        for path, linear in list(block.named_modules()):
            if isinstance(linear, nn.Linear):
                packed = Packed(linear, how)
                outer, _, inner = path.rpartition(".")
                setattr(block.get_submodule(outer), inner, packed)
                kept = (packed.qweight if how == "buffer" else packed.weight).view(torch.int8)
                with torch.no_grad():
                    other.get_submodule(path).weight.copy_(kept.view(packed.out_features, -1) * packed.scale)
    return model, twin


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.parametrize("how", ["parameter", "packed parameter", "buffer", "torch.ao"])
def test_quantised_model(how: str) -> None:
    """By hook as on the same numbers in floating point; writing is refused by name."""
    model, twin = _quantised(how)
    ids, vector = prompts(2), in_blocks(random_vector(tiny_model("llama")))
    vector = PreferenceVector("helpful", vector.deltas)
    amounts, plain = [1.0, -0.5], forward(model, ids)
    with Controller(model, vector.add(amounts)):
        found = forward(model, ids)
    with Controller(twin, vector.add(amounts)):
        expected = forward(twin, ids)
    if how == "torch.ao":  # it also rounds what goes into a module
        assert float((found - expected).norm()) < 0.3 * float((found - plain).norm())
    else:
        torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.allclose(found, plain, atol=0.5)
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.\d\..*_proj\.weight'"):
        Controller(model, vector.add(1.0), fold=True)
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.\d\..*_proj\.weight'"):
        vector.merge_into(model)
    assert torch.equal(forward(model, ids), plain)


def test_eight_bit_floats_are_not_written(model: Any) -> None:
    linear = model.model.layers[1].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    linear.forward = lambda input: input @ linear.weight.float().T
    vector, ids = random_vector(model), prompts()
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.1\.mlp\.down_proj\.weight' quantised"):
        Controller(model, vector.add(1.0), fold=True)
    with Controller(model, one_of(vector, "model.layers.1.mlp.down_proj.weight").add([1.0, 0.0])):
        found = forward(model, ids)
    plain = forward(model, ids)
    assert torch.equal(found[1], plain[1])
    assert not torch.allclose(found[0], plain[0], atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """No further from the float32 truth than weights merged and rounded, give or take half as much again."""
    exact, ids = tiny_model(name).to(dtype).float(), prompts(3)
    vector = random_vector(exact)
    truth = forward(vector.merge_into(exact, 0.3), ids)
    model = copy.deepcopy(exact).to(dtype)
    bound = 1.5 * float((forward(vector.merge_into(model, 0.3), ids).float() - truth).norm())
    for amount, mask in ((0.3, None), ([0.3] * 3, None), ([0.3] * 3, torch.ones_like(ids))):
        with Controller(model, vector.add(amount)):
            found = forward(model, ids, mask)
        assert found.dtype == dtype
        assert float((found.float() - truth).norm()) < bound
    assert float((forward(model, ids).float() - truth).norm()) > 3 * bound


@pytest.mark.parametrize("power", [-18, 18])
def test_how_a_change_is_split_into_factors_is_irrelevant(model: Any, power: int) -> None:
    """The same change with factors far from 1, which float16 cannot hold one by one."""
    vector, ids, model = random_vector(model), prompts(), model.half()
    split = {key: LowRank(2.0**power * d.left, 2.0**-power * d.right) for key, d in vector.deltas.items()}
    other = PreferenceVector("other", split)
    with Controller(model, vector.add(1.0), check_model=False):
        expected = forward(model, ids)
    with Controller(model, other.add(1.0)):
        found = forward(model, ids)
    assert bool(found.isfinite().all())
    plain = forward(model, ids)
    assert float((found - expected).float().norm()) < 0.05 * float((expected - plain).float().norm())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("amount", [0.5, [0.5, 0.5, 0.0]], ids=["one", "samples"])
def test_autocast(name: str, amount: Any) -> None:
    model, ids, cast = tiny_model(name), prompts(3), torch.bfloat16
    vector = random_vector(model)
    merged = vector.merge_into(model, 0.5)
    truth = forward(merged, ids)
    with torch.autocast("cpu", cast):
        plain, rounded = forward(model, ids), forward(merged, ids)
        with Controller(model, vector.add(amount)):
            found = forward(model, ids)
            tokens = generate(model, ids)
            with torch.autocast("cpu", enabled=False):
                precise = forward(model, ids)
    bound = 1.5 * float((rounded - truth)[:2].float().norm())
    assert found.dtype == rounded.dtype
    assert float((found - truth)[:2].float().norm()) < bound < 0.2 * float((plain - truth)[:2].float().norm())
    torch.testing.assert_close(precise[:2], truth[:2], **CLOSE)
    assert tokens.shape == (3, 6)
    if isinstance(amount, list):
        assert torch.equal(found[2], plain[2])
        assert torch.equal(precise[2], forward(model, ids)[2])


# Gradients, training, compilation.


@every_architecture
@every_kind
def test_gradients_flow_through(name: str, kind: str) -> None:
    """As through merged weights; the vector itself takes no part."""
    if name == "mixtral":
        pytest.skip("its grouped matrix product has no float64 on the CPU")
    model, ids = tiny_model(name).double(), prompts(2, 6)
    vector = by_kind(model, kind)
    before = {key: [part.clone() for part in parts(delta)] for key, delta in vector.deltas.items()}

    def gradient(one: Any) -> tuple[Tensor, dict[str, Tensor]]:
        one.zero_grad()
        embeds = one.get_input_embeddings()(ids).detach().requires_grad_()
        one(inputs_embeds=embeds).logits.logsumexp(-1).sum().backward()
        return embeds.grad, {key: p.grad.clone() for key, p in one.named_parameters() if p.grad is not None}

    expected, weights = gradient(vector.merge_into(model))
    plain, _ = gradient(model)
    for amount in ([1.0, 1.0],) if kind == "dense" else (1.0, [1.0, 1.0]):
        with Controller(model, vector.add(amount)):
            found, own = gradient(model)
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-6)
        assert set(own) == set(weights)
        for key, each in weights.items():
            torch.testing.assert_close(own[key], each, atol=1e-7, rtol=1e-6, msg=key)
    assert not torch.allclose(found, plain, atol=1e-2)
    for key, delta in vector.deltas.items():
        for part, old in zip(parts(delta), before[key], strict=True):
            assert torch.equal(part, old)
            assert part.grad is None
            assert not part.requires_grad


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_training_mode(name: str) -> None:
    """Dropout draws the same numbers, modes stay as they are, and blocks may run again in the backward pass."""
    model, ids = tiny_model(name).train(), prompts()
    vector = random_vector(model)
    merged = vector.merge_into(model)
    assert merged.training

    def run(one: Any) -> tuple[Tensor, Tensor]:
        one.zero_grad()
        torch.manual_seed(5)
        logits = one(ids).logits
        logits.logsumexp(-1).mean().backward()
        return logits.detach(), one.get_input_embeddings().weight.grad.clone()

    expected = run(merged)
    with Controller(model, vector.add([1.0, 1.0])):
        for found, wanted in zip(run(model), expected, strict=True):
            torch.testing.assert_close(found, wanted, **CLOSE)
        assert model.training
    model.activation_checkpointing_enable()
    with Controller(model, vector.add([1.0, 1.0])):
        for found, wanted in zip(run(model), expected, strict=True):
            torch.testing.assert_close(found, wanted, **CLOSE)
    assert not torch.allclose(run(model)[0], expected[0], atol=0.5)


@pytest.mark.parametrize("fold", [False, True], ids=["hook", "fold"])
@pytest.mark.parametrize("after", ["using", "detach"])
def test_backward_after_the_weights_have_changed(model: Any, fold: bool, after: str) -> None:
    """The gradient of what was computed, or autograd's error about tensors changed in place; never another gradient."""
    ids, vector = prompts(2, 6), random_vector(model)

    def loss() -> tuple[Tensor, Tensor]:
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        return model(inputs_embeds=embeds).logits.logsumexp(-1).sum(), embeds

    with Controller(model, vector.add(1.0), fold=fold) as control:
        total, embeds = loss()
        total.backward()
        expected = embeds.grad
        total, embeds = loss()
        if after == "using":
            control.using(helpful=-1.0)
            reason = _backward(total)
    if after == "detach":
        reason = _backward(total)
    if reason is None:
        torch.testing.assert_close(embeds.grad, expected, **CLOSE)
    else:
        assert "modified by an inplace operation" in reason


def _backward(loss: Tensor) -> str | None:
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("fold", [False, True], ids=["hook", "fold"])
@pytest.mark.parametrize("where", ["construction", "attach", "use"])
def test_inference_mode(model: Any, fold: bool, where: str) -> None:
    """Made or used inside inference mode, it serves training outside of it."""
    ids, before = prompts(), snapshot(model)
    vector = random_vector(model, full=True)
    expected = forward(vector.merge_into(model), ids)
    if where == "construction":
        with torch.inference_mode():
            control = Controller(model, random_vector(model, full=True).add(1.0), fold=fold)
    else:
        control = Controller(model, vector.add(1.0), fold=fold)
    if where == "attach":
        with torch.inference_mode():
            control.attach()
            torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    with control if where != "attach" else control.using(helpful=1.0):
        with torch.inference_mode():
            torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
            control.using(helpful=1.0)
        logits = model(ids).logits
        logits.sum().backward()
        torch.testing.assert_close(logits.detach(), expected, **CLOSE)
    if where == "attach":
        control.detach()
    model.zero_grad()
    assert_untouched(model, before)


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def shallow(name: str) -> Any:
    """Return a model of one block: tracing costs a second a block."""
    model = tiny_model(name)
    decoder = find_decoder(model)
    del decoder.blocks[1:]
    model.config.num_hidden_layers = 1
    return model


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(("name", "positions"), [("llama", "last"), ("opt", "all")])
def test_compiled_once_for_all_magnitudes(name: str, positions: Any) -> None:
    model, ids = shallow(name), prompts(3, 6)
    vectors = [by_kind(model, "dense"), by_kind(model, "low rank", "harmless", 1)]
    twin, plain = copy.deepcopy(model), forward(model, ids)
    control, other = (Controller(one, [v.add(0.5, positions=positions) for v in vectors]) for one in (model, twin))
    control.attach()
    other.attach()
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(model, backend=counter, fullgraph=True)

    def run(one: Any) -> Tensor:
        with torch.no_grad():
            return one(input_ids=ids, use_cache=False).logits

    first = run(fast)
    torch.testing.assert_close(first, run(twin), **CLOSE)
    assert not torch.allclose(first, plain, atol=0.5)
    changes: list[dict[str, Any]] = [
        {"helpful": -0.5},
        {"helpful": [1.0, 0.0, -1.0], "harmless": torch.tensor([0.0, 0.0, 2.0])},
        {"harmless": 0.0},
        {"helpful": 0, "harmless": 0},
    ]
    for change in changes:
        control.using(**change)
        other.using(**change)
        torch.testing.assert_close(run(fast), run(twin), **CLOSE)
        assert not torch.allclose(run(fast), first, atol=0.1)
    torch.testing.assert_close(run(fast), plain, **CLOSE)
    control.using(helpful=[1.0, 0.0])
    with pytest.raises(RuntimeError, match="amounts and batch differ in samples"):
        run(fast)
    assert counter.frame_count == 1
    assert not counters["graph_break"]
    control.detach()
    other.detach()


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_with_padding_and_folds() -> None:
    """A mask inside the graph; the weights are inputs of it, so `using` rewrites them without compiling."""
    model, (ids, mask) = shallow("llama"), padded(ragged((6, 4)), "left")
    vector, counter = random_vector(model, full=True), CompileCounterWithBackend("eager")
    thin = random_vector(model, "thin", 1)
    both = [vector.add(0.5), thin.add([1.0, -1.0])]
    rows = [(0.5 * vector + m * thin).merge_into(model) for m in (1.0, -1.0)]
    more = [(-0.5 * vector + m * thin).merge_into(model) for m in (0.0, 1.0)]
    control = Controller(model, both).attach()
    fast = torch.compile(model, backend=counter, fullgraph=True)

    def run(one: Any) -> Tensor:
        with torch.no_grad():
            return one(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def expected(ones: list[Any]) -> Tensor:
        return per_row(ones, lambda one, row: run(one)[row : row + 1])[mask.bool()]

    torch.testing.assert_close(run(fast)[mask.bool()], expected(rows), **CLOSE)
    control.using(helpful=-0.5, thin=[0.0, 1.0])
    torch.testing.assert_close(run(fast)[mask.bool()], expected(more), **CLOSE)
    assert counter.frame_count == 1
    control.detach()


# Both kinds in one Controller.


@every_architecture
def test_bounds_hold_under_changed_weights(name: str) -> None:
    """Each row: the bound met exactly at its site, in the model with this row's weights; the list's order is irrelevant."""
    model, ids, site = tiny_model(name), prompts(3), 2
    vector = random_vector(model)
    amounts = [1.0, 0.0, -0.5]
    bound = random_constraint((site,), at_most=0.2, positions="all", seed=7)
    with Controller(model, [vector.add(amounts), bound]):
        found, stream = forward(model, ids), residuals(model, ids)[site]
        tokens = generate(model, ids, max_new_tokens=3)
    with Controller(model, [bound, vector.add(amounts)]):
        torch.testing.assert_close(forward(model, ids), found, **tolerance(name))
    probe = 2.0 * unit_directions((site,), seed=7)[site]
    logit, limit = stream @ probe + 0.1, float(torch.logit(torch.tensor(0.2)))
    assert float(logit.max()) <= limit + 1e-4
    merged = [vector.merge_into(model, m) for m in amounts]
    reading = per_row(merged, lambda one, row: residuals(one, ids[row : row + 1])[site]) @ probe + 0.1
    torch.testing.assert_close(logit, reading.clamp(max=limit), atol=2e-3, rtol=1e-4)
    assert all(bool((reading[row] > limit).any()) for row in range(3))

    def bounded(one: Any, row: int, run: Callable[..., Tensor], **more: Any) -> Tensor:
        with Controller(one, bound):
            return run(one, ids[row : row + 1], **more)

    expected = per_row(merged, lambda one, row: bounded(one, row, forward))
    torch.testing.assert_close(found, expected, **tolerance(name))
    assert torch.equal(tokens, per_row(merged, lambda one, row: bounded(one, row, generate, max_new_tokens=3)))
    assert not torch.allclose(found, per_row(merged, lambda one, row: forward(one, ids[row : row + 1])), atol=0.1)


@pytest.mark.parametrize("fold", [False, True])
def test_bounds_hold_on_folded_weights(model: Any, fold: bool) -> None:
    ids, vector = prompts(3), random_vector(model, full=True)
    bound = random_constraint((1, 3), at_most=0.05, seed=7)
    merged = vector.merge_into(model, 0.5)
    with Controller(merged, bound):
        expected, tokens = forward(merged, ids), generate(merged, ids)
    with Controller(model, [bound, vector.add(0.5)], fold=fold):
        torch.testing.assert_close(forward(model, ids), expected, **CLOSE)
        assert torch.equal(generate(model, ids), tokens)


def test_eight_trade_offs_in_one_batch(model: Any) -> None:
    """Snippet 4 of the design."""
    ids, vector = prompts(1).expand(8, -1), random_vector(model)
    toxicity = random_constraint((1, 2), at_most=0.01, name="toxicity")
    control = Controller(model, [vector.add(0.6), toxicity])
    with control.using(helpful=torch.linspace(0, 1, 8)):
        tokens = generate(model, ids)
    for row, m in enumerate(torch.linspace(0, 1, 8).tolist()):
        merged = vector.merge_into(model, m)
        with Controller(merged, toxicity):
            assert torch.equal(tokens[row], generate(merged, ids[:1])[0])
    assert len({tuple(row) for row in tokens.tolist()}) >= 4
    with control:
        sixth = generate(model, ids[:1])
    merged = vector.merge_into(model, 0.6)
    with Controller(merged, toxicity):
        assert torch.equal(sixth, generate(merged, ids[:1]))


# What was reached, and where.


def test_magnitudes_of_a_vector(model: Any) -> None:
    ids, mask = padded(ragged(), "left")
    vector, amounts = in_blocks(random_vector(model)), torch.tensor([[1.0, 0.5], [0.0, -1.0], [2.0, 0.25]])
    with Controller(model, vector.add(amounts, layers=[1, 3]), record_magnitudes=True) as control:
        found = forward(model, ids, mask)
        kept = control.magnitudes["helpful"]
        assert list(kept) == [1, 3]
        for column, layer in enumerate((1, 3)):
            assert torch.equal(kept[layer], amounts[:, column, None] * mask)
        generate(model, ids, mask, max_new_tokens=4)
        grown = torch.cat([mask, torch.ones(3, 3, dtype=torch.long)], dim=1)
        for column, layer in enumerate((1, 3)):
            assert torch.equal(control.magnitudes["helpful"][layer], amounts[:, column, None] * grown)
    with Controller(model, vector.add(amounts, layers=[1, 3])):
        torch.testing.assert_close(forward(model, ids, mask), found, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "mamba"])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("positions", ["all", "last", "prompt", "generated"])
def test_magnitudes_of_a_generation(name: str, cache: bool, positions: Any) -> None:
    model, (ids, mask) = tiny_model(name), padded(ragged((7, 4)), "left")
    edit = random_vector(model).add([1.0, -0.5], positions=positions)
    with Controller(model, edit, record_magnitudes=True) as control:
        generate(model, ids, mask, max_new_tokens=4, use_cache=cache)
        kept = control.magnitudes["helpful"]
    real = torch.cat([mask.bool(), torch.ones(2, 3, dtype=torch.bool)], dim=1)
    column = torch.arange(10)
    here = {"all": column >= 0, "last": column >= 6, "prompt": column < 7, "generated": column >= 7}[positions]
    expected = torch.where(real & here, torch.tensor([[1.0], [-0.5]]), 0.0)
    assert sorted(kept) == list(range(DEPTH))
    assert all(torch.equal(each, expected) for each in kept.values())


@every_architecture
def test_positions_cached_as_uncached(name: str) -> None:
    model, (ids, mask) = tiny_model(name), padded(ragged((8, 5)), "left")
    vector, few = by_kind(model, "low rank"), {"max_new_tokens": 4}
    plain = generate(model, ids, mask, **few)
    if not torch.equal(plain, generate(model, ids, mask, use_cache=False, **few)):
        pytest.skip(f"an unsteered {name} differs without a cache")
    with Controller(model, vector.add([1.0, -1.0])):
        everywhere = generate(model, ids, mask, **few)
    found = {}
    for positions in ("last", "prompt", "generated"):
        with Controller(model, vector.add([1.0, -1.0], positions=positions)):
            found[positions] = generate(model, ids, mask, **few)
            assert torch.equal(generate(model, ids, mask, use_cache=False, **few), found[positions])
    assert torch.equal(found["generated"][:, 0], plain[:, 0])
    assert torch.equal(found["prompt"][:, 0], everywhere[:, 0])
    different = {tuple(each.flatten().tolist()) for each in (plain, everywhere, *found.values())}
    assert len(different) == 5


@every_architecture
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_mean_what_they_say(name: str, side: str) -> None:
    """Against a hook made by hand on each linear module of the model."""
    model, (ids, mask) = tiny_model(name), padded(ragged((8, 5)), side)
    vector, amounts = random_vector(model), torch.tensor([1.0, -1.0])
    linears = find_decoder(model).linears
    real = mask.bool()
    last = real & (torch.arange(8) >= torch.where(real, torch.arange(8), -1).amax(1, keepdim=True))
    for positions, here in (("all", real), ("prompt", real), ("last", last)):
        handles = []
        for key, delta in vector.deltas.items():
            path = key.rpartition(".")[0]
            change = dense(delta).T if linears[path] else dense(delta)

            def hook(_: Any, args: Any, output: Tensor, change: Tensor = change, here: Tensor = here) -> Tensor:
                step = (args[0] @ change).view(*here.shape, -1) * amounts[:, None, None]
                return torch.where(here[..., None], output.view(step.shape) + step, output.view(step.shape)).view(
                    output.shape
                )

            handles.append(model.get_submodule(path).register_forward_hook(hook))
        expected = forward(model, ids, mask)
        for handle in handles:
            handle.remove()
        with Controller(model, vector.add(amounts, positions=positions)):
            found = forward(model, ids, mask)
        torch.testing.assert_close(found[real], expected[real], **tolerance(name))
        assert not torch.allclose(found, forward(model, ids, mask), atol=0.1)


def test_not_reached(model: Any) -> None:
    vector, ids, before = random_vector(model), prompts(), snapshot(model)
    with pytest.raises(
        NotReachedError, match=r"'helpful' reached no row: no forward pass ran.*layers 0\.\.3"
    ) as caught:
        Controller(model, vector.add(1.0)).attach().detach()
    assert caught.value.name == "helpful"
    with (
        pytest.raises(NotReachedError, match=r"'late'.*'generated'"),
        Controller(model, [vector.add(1.0), vector.add(1.0, name="late", positions="generated")]),
    ):
        forward(model, ids)
    with pytest.raises(ValueError, match="mine"), Controller(model, vector.add(1.0)):
        raise ValueError("mine")
    with Controller(model, vector.add(1.0), fold=True):
        pass  # the weights are what they are: nothing has to run
    control = Controller(model, vector.add(1.0))
    with control:
        forward(model, ids)
    with pytest.raises(NotReachedError), control:
        pass
    assert_untouched(model, before)


def test_a_module_that_a_pass_leaves_out_is_named(model: Any) -> None:
    """A block that runs without one of its modules: the vector acts in part only."""
    vector, ids = random_vector(model), prompts()
    skipped = model.model.layers[2].mlp
    find_decoder(model)
    skipped.forward = lambda hidden: hidden
    with (
        pytest.raises(NotReachedError, match=r"'helpful' did not reach 'model\.layers\.2\.mlp\.\w+_proj'"),
        Controller(model, vector.add(1.0), check_model=False),
    ):
        forward(model, ids)


def test_nothing_given_is_changed(model: Any) -> None:
    vector, ids, amounts = random_vector(model, full=True), prompts(), torch.tensor(0.5)
    deltas, before = dict(vector.deltas), {key: dense(delta).clone() for key, delta in vector.deltas.items()}
    for fold in (False, True):
        with Controller(model, vector.add(amounts), fold=fold) as control:
            forward(model, ids)
            control.using(helpful=-1.0)
            forward(model, ids)
    vector.merge_into(model, 2.0)
    assert float(amounts) == 0.5
    assert all(vector.deltas[key] is delta for key, delta in deltas.items())
    assert all(torch.equal(dense(delta), before[key]) for key, delta in vector.deltas.items())


def test_a_copy_made_while_attached_is_a_model_of_its_own(model: Any) -> None:
    """Folded or hooked: what happens to the copy does not reach the original, and the other way round."""
    ids, vector = prompts(), random_vector(model, full=True)
    for fold in (False, True):
        before = snapshot(model)
        with Controller(model, vector.add(1.0), fold=fold) as control:
            steered = forward(model, ids)
            twin = copy.deepcopy(model)
            control.using(helpful=-1.0)
            torch.testing.assert_close(forward(twin, ids), steered, **CLOSE)
            assert not torch.allclose(forward(model, ids), steered, atol=0.5)
            with torch.no_grad():
                twin.lm_head.weight.zero_()
            control.using(helpful=1.0)
            torch.testing.assert_close(forward(model, ids), steered, **CLOSE)
        assert_untouched(model, before)


# The arithmetic beneath, on free inputs.


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _delta(generator: torch.Generator, rows: int, columns: int, rank: int) -> Delta:
    """Return a dense change for rank 0."""
    if rank == 0:
        return _random(generator, rows, columns)
    return LowRank(_random(generator, rows, rank), _random(generator, rank, columns))


sizes = st.integers(1, 7)


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    shape=st.tuples(sizes, sizes),
    groups=sizes,
    each=sizes,
    seed=st.integers(0, 999),
    turned=st.booleans(),
)
def test_stack_is_the_explicit_sum(
    ranks: list[int], shape: tuple[int, int], groups: int, each: int, seed: int, turned: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas = [_delta(generator, *shape, rank) for rank in ranks]
    if turned:
        deltas = [transposed(transposed(delta)) for delta in deltas]
    coefficients = _random(generator, groups, len(ranks))
    coefficients[torch.rand(coefficients.shape, generator=generator) < 0.2] = 0
    x, onto = _random(generator, groups * each, shape[0]), _random(generator, groups * each, shape[1])
    kept = [x.clone(), onto.clone(), coefficients.clone(), *(dense(delta).clone() for delta in deltas)]
    stack = Stack(deltas)
    stack.to(torch.device("cpu"), torch.float64)
    mixed = stack.mixture(coefficients.double())(x.double(), onto.double())
    expected = onto.double().clone()
    for row in range(groups * each):
        for v, delta in enumerate(deltas):
            whole = delta.left.double() @ delta.right.double() if isinstance(delta, LowRank) else delta.double()
            expected[row] += coefficients[row // each, v].double() * (x[row].double() @ whole)
    torch.testing.assert_close(mixed, expected, atol=1e-10, rtol=1e-10)
    off = stack.mixture(torch.zeros(groups, len(ranks), dtype=torch.float64))(x.double(), onto.double())
    assert torch.equal(off, onto.double())
    now = [x, onto, coefficients, *(dense(delta) for delta in deltas)]
    assert all(torch.equal(one, other) for one, other in zip(now, kept, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 4), min_size=0, max_size=4),
    shape=st.tuples(st.integers(1, 9), sizes),
    block=st.sampled_from([1, 5, 16, 1 << 18]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 999),
    in_place=st.booleans(),
)
def test_add_to_is_float64_rounded_once(
    ranks: list[int], shape: tuple[int, int], block: int, dtype: torch.dtype, seed: int, in_place: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    changes = [(float(_random(generator, 1)), _delta(generator, *shape, rank)) for rank in ranks]
    weight = _random(generator, *shape).to(dtype)
    exact, size = weight.double(), weight.double().abs()
    for m, delta in changes:
        left, right = (delta.left, delta.right) if isinstance(delta, LowRank) else (delta, torch.eye(shape[1]))
        exact = exact + m * (left.double() @ right.double())
        size = size + abs(m) * (left.double().abs() @ right.double().abs())
    before, out = weight.clone(), weight if in_place else torch.full_like(weight, float("nan"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steerkit.maths.lowrank, "_BLOCK", block)
        add_to(weight, changes, out)
    assert in_place or torch.equal(weight, before)
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * size + torch.finfo(dtype).tiny
    assert bool(((out.double() - exact).abs() <= rounding).all())
    off = torch.full_like(weight, float("nan"))
    add_to(before, [(0.0, delta) for _, delta in changes], off)
    assert torch.equal(off, before)


@pytest.mark.parametrize("shape", [(5,), (3, 4, 6), (1,), (2, 1, 1, 3)], ids=str)
@pytest.mark.parametrize("block", [1, 1 << 18])
def test_add_to_of_any_shape(shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases, norms, experts."""
    monkeypatch.setattr(steerkit.maths.lowrank, "_BLOCK", block)
    weight, first, second = (_random(torch.Generator().manual_seed(seed), *shape) for seed in range(3))
    out = torch.empty_like(weight)
    add_to(weight, [(0.5, first), (-2.0, second)], out)
    torch.testing.assert_close(out, weight + 0.5 * first - 2.0 * second)


def test_the_models_here_take_what_the_tests_assume() -> None:
    """Each tiny model has modules that hooks reach in every block, and its signature takes embeddings."""
    for name in ARCHITECTURES:
        model = tiny_model(name)
        vector = random_vector(model)
        assert vector.layers == tuple(range(DEPTH))
        assert vector.rank == 2
        assert "inputs_embeds" in inspect.signature(model.forward).parameters
        assert model.config.vocab_size == VOCABULARY
