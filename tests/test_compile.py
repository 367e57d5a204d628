"""Compiled models: hooks first, then torch.compile, then amounts that change without compiling again."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, random_addition, random_constraint, random_erasure, tiny_model, unit_directions
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from steerkit import Controller
from steerkit.errors import AttachError, NotReachedError
from steerkit.intervention import Intervention

STRONG = 20.0
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def shallow(name: str = "llama") -> Any:
    """Return a model of two blocks: tracing costs a second a block."""
    model = tiny_model(name)
    body = model.transformer if name == "gpt2" else model.model
    del (body.h if name == "gpt2" else body.layers)[2:]
    model.config.num_hidden_layers = 2
    return model


def prompts(batch: int = 3, length: int = 8, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids and mask with three pad tokens before the first prompt."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    return ids, mask


def edits(positions: Any = "all", amount: Any = STRONG, bound: Any = 0.05) -> list[Intervention]:
    return [
        random_addition((0,), amount, positions=positions),
        random_constraint((0, 1), at_most=bound, positions=positions, seed=7),
        random_erasure((0,), name="gone", positions=positions, seed=8),
    ]


def mixed(amount: Any = STRONG) -> list[Intervention]:
    """Return edits at other positions in one Controller, before the last block's cache."""
    return [
        random_addition((0,), amount, positions="generated"),
        random_constraint((0,), at_most=0.05, positions="last", seed=7),
        random_erasure((0,), name="gone", positions="prompt", seed=8),
    ]


def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **more).logits


def generate(model: Any, ids: Tensor, **settings: Any) -> Tensor:
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids), **settings}
    return model.generate(input_ids=ids, **settings)[:, ids.shape[1] :]


def compiled(model: Any, **settings: Any) -> tuple[Any, CompileCounterWithBackend]:
    """Return the compiled model and a counter of its graphs."""
    counter = CompileCounterWithBackend(settings.pop("backend", "eager"))
    return torch.compile(model, backend=counter, **{"fullgraph": True, **settings}), counter


CHANGES: list[dict[str, Any]] = [
    {"added": 3.0},
    {"added": [1.0, -2.0, 3.0]},
    {"added": torch.tensor([[0.0], [5.0], [-5.0]])},
    {"added": {0: 4.0}},
    {"bounded": 0.3},
    {"bounded": [0.1, 1.0, 0.5]},
    {"bounded": {0: 0.2, 1: [0.3, 0.9, 1.0]}},
    {"gone": 0},
    {"gone": [1, 0, 1]},
    {"added": 0.0, "bounded": 1.0, "gone": 0},
]


@pytest.mark.parametrize(("name", "positions"), [("llama", "all"), ("gpt2", "last"), ("gemma3", "last")])
def test_compiled_equals_eager_and_compiles_once(name: str, positions: Any) -> None:
    """Numbers, one a sample and bounds change in place; nothing is traced again and no graph breaks."""
    model, ids = shallow(name), prompts()
    twin = copy.deepcopy(model)
    control = Controller(model, edits(positions)).attach()
    fast, counter = compiled(model, backend="aot_eager")
    other = Controller(twin, edits(positions)).attach()
    torch.testing.assert_close(logits(fast, ids), logits(twin, ids), **TOLERANCE)
    assert counter.frame_count == 1
    before = logits(fast, ids)
    for change in CHANGES:
        control.using(**change)
        other.using(**change)
        torch.testing.assert_close(logits(fast, ids), logits(twin, ids), **TOLERANCE)
        assert not torch.equal(logits(fast, ids), before)
    assert counter.frame_count == 1
    assert not counters["graph_break"]
    assert not torch.allclose(logits(twin, ids), before, atol=1e-2)
    control.detach()
    other.detach()


def test_detached_compiled_model_is_the_plain_one() -> None:
    model, ids = shallow(), prompts()
    plain = logits(model, ids)
    control = Controller(model, edits(amount=[1.0, 2.0, 3.0])).attach()
    fast, _ = compiled(model)
    assert not torch.allclose(logits(fast, ids), plain, atol=1e-2)
    control.detach()
    assert torch.equal(logits(model, ids), plain)
    torch.testing.assert_close(logits(fast, ids), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(fast, prompts(2)), logits(model, prompts(2)), atol=1e-5, rtol=1e-5)


def test_detached_graph_edits_nothing_bit_for_bit() -> None:
    """Even the graph that was traced with hooks: its amounts are off."""
    model, ids = shallow(), prompts()
    control = Controller(model, edits()).attach()
    fast = torch.compile(model, fullgraph=True, backend="eager")
    steered = logits(fast, ids)
    control.using(added=0.0, bounded=1.0, gone=0)
    off = logits(fast, ids)
    control.detach()
    assert not torch.equal(steered, off)
    assert torch.equal(off, logits(model, ids))


def test_wrong_number_of_samples_raises() -> None:
    """No Python number may be compared in a graph, so the error is torch's; it must be an error all the same."""
    model, ids = shallow(), prompts(3)
    control = Controller(model, edits(amount=[1.0, 2.0, 3.0])).attach()
    fast, counter = compiled(model)
    logits(fast, ids)
    for change in ({"added": [1.0, 2.0]}, {"bounded": [0.1] * 4}, {"gone": [1, 0]}):
        with control.using(**change), pytest.raises(RuntimeError, match="amounts and batch differ in samples"):
            logits(fast, ids)
        logits(fast, ids)
    assert counter.frame_count == 1
    control.detach()


def test_padding_and_positions_in_a_graph() -> None:
    """A padded batch keeps its mask inside the graph: padding is not edited there."""
    model = shallow()
    ids, mask = left_padded(prompts())
    twin = copy.deepcopy(model)
    both = [*edits("last", [STRONG, -STRONG, 1.0]), random_addition((1,), STRONG, name="all")]
    with Controller(twin, both):
        expected = logits(twin, ids, attention_mask=mask)
    control = Controller(model, both).attach()
    fast, _ = compiled(model)
    torch.testing.assert_close(logits(fast, ids, attention_mask=mask)[mask.bool()], expected[mask.bool()], **TOLERANCE)
    control.detach()


def test_larger_batches_make_room() -> None:
    """Amounts for more samples than there is room for at first."""
    model, ids = shallow(), prompts(100, 4)
    amounts = torch.linspace(-STRONG, STRONG, 100)
    with Controller(copy.deepcopy(model), random_addition((1,), amounts)) as other:
        expected = logits(other._given, ids)
    control = Controller(model, random_addition((1,), 1.0)).attach()
    fast, _ = compiled(model, dynamic=False)
    logits(fast, ids)
    control.using(added=amounts)
    torch.testing.assert_close(logits(fast, ids), expected, **TOLERANCE)
    control.detach()


def test_gradients_through_a_compiled_edit() -> None:
    model, ids = shallow(), prompts()
    twin = copy.deepcopy(model)
    gradients = []
    for one, fast in ((model, False), (twin, True)):
        control = Controller(one, edits()[:2]).attach()
        run = compiled(one, backend="aot_eager")[0] if fast else one
        run(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
        control.detach()
        gradients.append(one.get_input_embeddings().weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-3, rtol=1e-3)


def _optimized(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def _in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def _forward_only(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def _one_block(model: Any) -> Any:
    model.model.layers[1].compile(backend="eager")
    return model


def _body(model: Any) -> Any:
    model.model = torch.compile(model.model, backend="eager")
    return model


COMPILERS = {
    "OptimizedModule": _optimized,
    "model.compile()": _in_place,
    "model.forward": _forward_only,
    "one block": _one_block,
    "the body": _body,
}


@pytest.mark.parametrize(("how", "ran"), [*((how, False) for how in COMPILERS), ("model.compile()", True)])
def test_attaching_to_a_compiled_model_is_refused(how: str, ran: bool) -> None:
    model, ids = shallow(), prompts()
    given = COMPILERS[how](model)
    if ran:
        logits(given, ids)
    with pytest.raises(AttachError, match=r"before the model is compiled|compiled"):
        Controller(given, edits()).attach()
    assert "generate" not in model.__dict__
    assert not any(module._forward_hooks for module in model.modules())


def test_attaching_a_second_controller_after_compilation() -> None:
    """The graph has no place for it: refused, or seen by a new graph; never silently left out."""
    model, ids = shallow(), prompts()
    with Controller(copy.deepcopy(model), random_addition((1,), STRONG, name="late")) as other:
        expected = logits(other._given, ids)
    first = Controller(model, random_addition((0,), 0.0)).attach()
    fast, _ = compiled(model)
    logits(fast, ids)
    second = Controller(model, random_addition((1,), STRONG, name="late"))
    reason = _reason(second.attach)
    if reason is None:
        torch.testing.assert_close(logits(fast, ids), expected, **TOLERANCE)
        second.detach()
    else:
        assert "compile" in reason
    first.detach()


def _reason(call: Callable[[], Any]) -> str | None:
    """Return why steering was refused or reached nothing, or None if it was not."""
    try:
        call()
    except (AttachError, NotReachedError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("ran", [False, True])
def test_plain_model_given_after_a_compiled_one_ran(ran: bool) -> None:
    """torch.compile(model) leaves no mark on `model`: later hooks act, or the Controller says that they did not."""
    model, ids = shallow(), prompts()
    with Controller(copy.deepcopy(model), edits()) as other:
        expected = logits(other._given, ids)
    fast, _ = compiled(model)
    if ran:
        logits(fast, ids)
    control = Controller(model, edits()).attach()
    found = logits(fast, ids)
    reason = _reason(control.detach)
    if reason is None:
        torch.testing.assert_close(found, expected, **TOLERANCE)
    else:
        assert "compile" in reason


def test_attach_again_after_compilation() -> None:
    """attach, compile, detach, attach: steered again, or an error that says why not."""
    model, ids = shallow(), prompts()
    control = Controller(model, edits()).attach()
    fast, _ = compiled(model)
    steered = logits(fast, ids)
    control.detach()
    plain = logits(fast, ids)
    assert not torch.allclose(plain, steered, atol=1e-2)
    again: list[Tensor] = []

    def use() -> None:
        with control:
            again.append(logits(fast, ids))

    reason = _reason(use)
    if reason is None:
        torch.testing.assert_close(again[0], steered, **TOLERANCE)
    else:
        assert "compile" in reason
    torch.testing.assert_close(logits(fast, ids), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("cache", "positions"),
    [("dynamic", "last"), ("static", "prompt"), ("chunked static", "mixed")],
)
def test_generation_with_a_compiled_forward(positions: Any, cache: str) -> None:
    model = shallow()
    ids, mask = left_padded(prompts())
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 4}
    settings |= {"cache_implementation": "static"} if "static" in cache else {}
    settings |= {"prefill_chunk_size": 3} if cache == "chunked static" else {}
    twin, amounts = copy.deepcopy(model), [STRONG, -STRONG, 5.0]
    made = mixed(amounts) if positions == "mixed" else edits(positions, amounts)
    plain = generate(twin, ids, attention_mask=mask, max_new_tokens=4)
    with Controller(twin, made):
        expected = generate(twin, ids, attention_mask=mask, max_new_tokens=4)
    assert not torch.equal(expected, plain)
    control = Controller(model, made).attach()
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(generate(model, ids, **settings), expected)
    control.using(added=0.0, bounded=1.0, gone=0)
    assert torch.equal(generate(model, ids, **settings), plain)
    control.using(added=amounts, bounded=0.05, gone=1)
    assert torch.equal(generate(model, ids, **settings), expected)
    control.detach()


def test_changing_amounts_in_compiled_generation_compiles_nothing() -> None:
    """A static cache: the graphs of the first generation serve every later one."""
    model, ids = shallow(), prompts()
    control = Controller(model, edits("last")).attach()
    counter = CompileCounterWithBackend("eager")
    model.forward = torch.compile(model.forward, backend=counter)
    settings = {"cache_implementation": "static"}
    first = generate(model, ids, **settings)
    generate(model, ids, **settings)
    frames = counter.frame_count
    assert frames > 0
    control.using(added=[1.0, 2.0, -STRONG], bounded=0.5)
    assert not torch.equal(generate(model, ids, **settings), first)
    control.using(added=-3.0, bounded=[0.1, 0.2, 0.3])
    generate(model, ids, **settings)
    assert counter.frame_count == frames
    control.detach()


def test_recording_in_a_compiled_model() -> None:
    """Magnitudes are kept from a compiled model too, at the price of graph breaks."""
    model, ids = shallow(), prompts()
    control = Controller(model, random_addition((1,), [1.0, 2.0, 3.0]), record_magnitudes=True).attach()
    fast, _ = compiled(model, fullgraph=False)
    found = logits(fast, ids)
    expected = torch.tensor([1.0, 2.0, 3.0])[:, None].expand(ids.shape)
    torch.testing.assert_close(control.magnitudes["added"][1], expected)
    torch.testing.assert_close(found, logits(model, ids), **TOLERANCE)
    control.detach()


def test_site_in_a_graph_is_exact() -> None:
    """The body's last block, seen through the graph's own output."""
    model, ids = shallow().model, prompts()
    model.norm = torch.nn.Identity()
    plain = torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False)[0].detach()
    torch._dynamo.reset()
    control = Controller(model, random_addition((1,), [1.0, 0.0, -4.0])).attach()
    found = torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False)[0].detach()
    expected = plain + torch.tensor([1.0, 0.0, -4.0])[:, None, None] * unit_directions((1,))[1]
    assert torch.equal(found, expected)
    control.detach()


@pytest.mark.slow
def test_inductor() -> None:
    """The backend that users run."""
    model, ids = shallow(), prompts()
    twin = copy.deepcopy(model)
    control, other = Controller(model, edits("last")).attach(), Controller(twin, edits("last")).attach()
    fast = torch.compile(model, fullgraph=True)
    for amounts in (STRONG, [1.0, -2.0, 3.0], 0.0):
        control.using(added=amounts)
        other.using(added=amounts)
        torch.testing.assert_close(logits(fast, ids), logits(twin, ids), atol=1e-3, rtol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1
    control.detach()
    other.detach()
    torch.testing.assert_close(logits(fast, ids), logits(model, ids), atol=1e-3, rtol=1e-3)
