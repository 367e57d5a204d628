"""Contracts 1, 2 and 4 of the Controller, on tiny random models of every architecture."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import (
    D_MODEL,
    DEPTH,
    MODELS,
    VOCABULARY,
    random_addition,
    random_constraint,
    random_erasure,
    tiny_model,
    tiny_tokenizer,
    unit_directions,
)
from torch import Tensor

from steerkit import Controller
from steerkit.errors import (
    AmountError,
    AttachError,
    DependentConceptsError,
    NotReachedError,
    SamplesError,
)
from steerkit.intervention import Intervention, SiteEdit, edit_site
from steerkit.model import find_decoder
from steerkit.types import POSITIONS

ARCHITECTURES = list(MODELS)
NEW = 6
STRONG = 20.0
"""Added to a residual stream of norm 5 to 30, this changes greedy tokens (asserted wherever it is used)."""

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
every_positions = pytest.mark.parametrize("positions", POSITIONS)


def prompts(batch: int = 2, length: int = 10, seed: int = 1) -> Tensor:
    """Return random prompts that repeat themselves, so that prompt lookup finds candidates."""
    pattern = torch.randint(3, VOCABULARY, (batch, 4), generator=torch.Generator().manual_seed(seed))
    return pattern.repeat(1, length // 4 + 1)[:, :length]


def padded(alone: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Return ids and mask of prompts `"1 pos"` of unequal lengths in one batch."""
    width = max(ids.shape[1] for ids in alone)
    ids = torch.zeros(len(alone), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(alone):
        here = slice(width - one.shape[1], width) if side == "left" else slice(0, one.shape[1])
        ids[row, here], mask[row, here] = one[0], 1
    return ids, mask


def ragged(lengths: Sequence[int] = (10, 4, 7)) -> list[Tensor]:
    return [prompts(1, length, seed=10 + length) for length in lengths]


def place_of(model: Any, mask: Tensor) -> dict[str, Tensor]:
    """Return position ids for padded forward passes, where the model takes any."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def forward(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the logits of a bare forward pass."""
    with torch.no_grad():
        if mask is None:
            return model(ids).logits
        return model(ids, attention_mask=mask, **place_of(model, mask)).logits


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **settings: Any) -> Tensor:
    """Return the new tokens of greedy generation."""
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(input_ids=ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


def states_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def watched(model: Any) -> Iterator[list[list[Tensor]]]:
    """Collect what each block puts out, pass by pass; enter it after attach to see the edited states."""
    seen: list[list[Tensor]] = [[] for _ in range(DEPTH)]
    handles = [
        block.register_forward_hook(lambda _, __, output, at=at: seen[at].append(states_of(output).detach().clone()))
        for at, block in enumerate(find_decoder(model).blocks)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def residuals(model: Any, ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Return the residual stream after each block in a bare forward pass, `"batch pos d_model"`."""
    with watched(model) as seen:
        forward(model, ids, mask)
    return [one[0] for one in seen]


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def snapshot(model: Any) -> dict[str, Any]:
    """Return everything that steering could leave behind on a model."""
    state: dict[str, Any] = {"own": {key: id(value) for key, value in model.__dict__.items()}}
    for path, module in model.named_modules():
        state[f"{path}:attributes"] = sorted(module.__dict__)
        state[f"{path}:buffers"] = sorted(module._buffers)
        state[f"{path}:hooks"] = {kind: list(getattr(module, kind).values()) for kind in HOOKS}
        state[f"{path}:training"] = module.training
    state["weights"] = {key: value.clone() for key, value in model.state_dict().items()}
    return state


def assert_untouched(model: Any, before: dict[str, Any]) -> None:
    after = snapshot(model)
    old, new = before["weights"], after.pop("weights")
    assert after == {key: value for key, value in before.items() if key != "weights"}
    assert list(old) == list(new)
    assert all(torch.equal(old[key], new[key]) for key in old)


def some(positions: Any = "all", amounts: Any = STRONG, bound: Any = 0.05) -> list[Intervention]:
    """Return an addition at one block and a bound at two later ones."""
    return [
        random_addition((1,), amounts, positions=positions),
        random_constraint((2, 3), at_most=bound, positions=positions, seed=7),
    ]


OFF: dict[str, Callable[[Any], Intervention]] = {
    "addition of 0": lambda positions: random_addition((0, 2), 0.0, positions=positions),
    "0 for each sample": lambda positions: random_addition((0, 2), [0.0, 0.0], positions=positions),
    "at_most 1": lambda positions: random_constraint((0, 2), at_most=1.0, positions=positions),
    "at_least 0": lambda positions: random_constraint((0, 2), at_least=[0.0, 0.0], positions=positions),
    "erasure off": lambda positions: random_erasure((0, 2), 0.0, positions=positions),
}


@every_architecture
@pytest.mark.parametrize("what", OFF)
def test_off_is_bit_equal(name: str, what: str) -> None:
    """Magnitude 0 and inactive bounds: the short path (all, no mask) and the general one."""
    model, ids = tiny_model(name), prompts()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    plain, plain_padded, tokens = forward(model, ids), forward(model, ids, mask), generate(model, ids)
    for positions in ("all", "last"):
        with Controller(model, [OFF[what](positions)]):
            assert torch.equal(forward(model, ids), plain)
            assert torch.equal(forward(model, ids, mask), plain_padded)
    with Controller(model, [OFF[what]("generated")]):
        assert torch.equal(generate(model, ids), tokens)


@pytest.mark.parametrize("what", OFF)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_off_is_bit_equal_in_other_dtypes(model: Any, what: str, dtype: torch.dtype) -> None:
    """Edits are computed in float32; a row that needs none must not go through it."""
    model, ids = model.to(dtype), prompts()
    plain, tokens = forward(model, ids), generate(model, ids)
    for positions in ("all", "last"):
        for record in (False, True):
            with Controller(model, [OFF[what](positions)], record_magnitudes=record):
                assert torch.equal(forward(model, ids), plain)
                assert torch.equal(generate(model, ids), tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_rows_that_hold_the_bounds_are_bit_equal(model: Any, dtype: torch.dtype, record: bool, count: int) -> None:
    """In the same batch as rows that do not, on the short path and on the general one; then every bound holds."""
    model, ids = model.to(dtype), prompts(12)
    plain = residuals(model, ids)[1]
    weights = torch.stack([2 * unit_directions((1,), seed=seed)[1].double() for seed in range(count)])
    bounds = [
        random_constraint((1,), at_most=0.5, positions="all", name=f"bound{seed}", seed=seed) for seed in range(count)
    ]
    with Controller(model, bounds, record_magnitudes=record):
        steered = residuals(model, ids)[1]
    worst = (plain.double() @ weights.T + 0.1).amax(-1)
    assert bool((worst < -1e-2).any())
    assert bool((worst > 1e-1).any())
    assert torch.equal(steered[worst < -1e-2], plain[worst < -1e-2])
    assert not bool((steered == plain).all(-1)[worst > 1e-1].any())
    rounding = 1e-4 if dtype != torch.bfloat16 else 0.5
    assert bool((steered.double() @ weights.T + 0.1 <= rounding).all())


@every_architecture
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_leaving_leaves_nothing_behind(name: str, error: type[BaseException] | None) -> None:
    model, ids = tiny_model(name), prompts()
    plain, tokens = forward(model, ids), generate(model, ids)
    before = snapshot(model)

    def use() -> None:
        with Controller(model, some()):
            assert not torch.equal(forward(model, ids), plain)
            assert not torch.equal(generate(model, ids), tokens)
            if error is not None:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(error):
            use()
    assert_untouched(model, before)
    assert torch.equal(forward(model, ids), plain)
    assert torch.equal(generate(model, ids), tokens)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["second block", "owner", "amounts"])
def test_failing_attach_leaves_nothing_behind(
    model: Any, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], where: str
) -> None:
    ids, control = prompts(), Controller(model, some())
    before, plain = snapshot(model), forward(model, ids)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error("attaching")

    with monkeypatch.context() as patch:
        if where == "second block":
            patch.setattr(type(model.model.layers[2]), "register_forward_hook", _fail_at(model.model.layers[2], fail))
        elif where == "owner":
            patch.setattr(type(model.model), "register_forward_pre_hook", fail)
        else:
            patch.setattr(control, "_write_amounts", fail)
        with pytest.raises(error, match="attaching"):
            control.attach()
    assert_untouched(model, before)
    assert torch.equal(forward(model, ids), plain)
    with control:
        assert not torch.equal(forward(model, ids), plain)
    assert torch.equal(forward(model, ids), plain)


def _fail_at(module: torch.nn.Module, fail: Callable[..., Any]) -> Callable[..., Any]:
    original = type(module).register_forward_hook

    def register(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return fail() if self is module else original(self, *args, **kwargs)

    return register


def test_failing_inner_attach_keeps_the_outer_one(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, before = prompts(), snapshot(model)
    with Controller(model, random_addition((1,), STRONG)):
        steered, tokens = forward(model, ids), generate(model, ids)
        with monkeypatch.context() as patch:
            inner = Controller(model, random_addition((2,), STRONG))
            patch.setattr(inner, "_write_amounts", lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                inner.attach()
        assert torch.equal(forward(model, ids), steered)
        assert torch.equal(generate(model, ids), tokens)
    assert_untouched(model, before)


def test_own_generate_and_hooks_of_the_caller_stay(model: Any) -> None:
    """A `generate` that the caller put on the instance is called, and put back."""
    ids, calls = prompts(), []
    original = model.generate

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(*args, **kwargs)

    model.generate = mine
    model.model.layers[1].register_forward_hook(lambda module, args, output: None)
    before = snapshot(model)
    with Controller(model, some(positions="generated")):
        generate(model, ids)
    assert calls
    assert_untouched(model, before)


def test_not_reached_without_a_forward_pass(model: Any) -> None:
    before = snapshot(model)
    with (
        pytest.raises(NotReachedError, match=r"'added' reached no row: no forward pass ran.*layers 1\.\.1"),
        Controller(model, some()),
    ):
        pass
    assert_untouched(model, before)


def test_not_reached_by_a_bare_forward_pass_at_generated(model: Any) -> None:
    """A bare forward pass is all prompt."""
    ids, before = prompts(), snapshot(model)
    plain = forward(model, ids)
    with pytest.raises(NotReachedError, match="generated") as caught, Controller(model, some(positions="generated")):
        assert torch.equal(forward(model, ids), plain)
    assert caught.value.name == "added"
    assert_untouched(model, before)


def test_not_reached_names_the_one_that_was_not(model: Any) -> None:
    edits = [random_addition((1,), 1.0), random_addition((2,), 1.0, name="late", positions="generated")]
    with pytest.raises(NotReachedError, match="'late'"), Controller(model, edits):
        forward(model, prompts())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_not_reached_never_replaces_an_error_in_flight(model: Any, error: type[BaseException]) -> None:
    before, control = snapshot(model), Controller(model, some())
    with pytest.raises(error, match="mine"), control:
        raise error("mine")
    with pytest.raises(error, match="mine"), control.using(added=1.0):
        raise error("mine")
    assert_untouched(model, before)


def test_reached_is_forgotten_between_uses(model: Any) -> None:
    control = Controller(model, some())
    with control:
        forward(model, prompts())
    with pytest.raises(NotReachedError, match="no forward pass"), control:
        pass


def test_a_failed_generate_is_over(model: Any) -> None:
    """An exception inside `generate` must not leave later forward passes as part of that generation."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Broken(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.shape[1] > 11:
                raise KeyboardInterrupt
            return scores

    ids = prompts(3)
    control = Controller(model, some(positions="last"))
    with control:
        expected = forward(model, ids[:, :7])
    with control:
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids, logits_processor=LogitsProcessorList([Broken()]))
        assert torch.equal(forward(model, ids[:, :7]), expected)


@every_architecture
@every_positions
def test_before_the_site_bit_equal_and_at_the_site_exact(name: str, positions: Any) -> None:
    """Bare forward pass: blocks before see nothing, the block itself puts out h + m v where asked, h elsewhere."""
    model, ids, site = tiny_model(name), prompts(), 2
    magnitude, direction = 3.7, unit_directions((site,))[site]
    plain = residuals(model, ids)
    control = Controller(model, random_addition((site,), magnitude, positions=positions)).attach()
    steered = residuals(model, ids)
    if positions == "generated":
        with pytest.raises(NotReachedError):
            control.detach()
        assert all(torch.equal(one, other) for one, other in zip(steered, plain, strict=True))
        return
    control.detach()
    for layer in range(site):
        assert torch.equal(steered[layer], plain[layer])
    expected = plain[site].clone()
    columns = slice(-1, None) if positions == "last" else slice(None)
    expected[:, columns] = plain[site][:, columns] + torch.tensor(magnitude) * direction
    assert torch.equal(steered[site], expected)
    assert not torch.equal(steered[site + 1][:, -1], plain[site + 1][:, -1])


@every_architecture
@every_positions
def test_bound_and_erasure_at_the_site(name: str, positions: Any) -> None:
    """Active bounds read exactly, inactive rows are bit-equal, an erasure removes the component and nothing else."""
    if positions == "generated":
        pytest.skip("a bare forward pass generates nothing")
    model, ids, site = tiny_model(name), prompts(), 1
    plain = residuals(model, ids)
    u, v = unit_directions((site,), seed=3)[site], unit_directions((site,))[site]
    bound = random_constraint((site,), at_least=0.5, positions=positions, seed=3, slope=2.0)
    here = torch.zeros(ids.shape, dtype=torch.bool)
    here[:, -1 if positions == "last" else slice(None)] = True
    with Controller(model, bound):
        steered = residuals(model, ids)[site]
    logit = plain[site] @ (2 * u) + 0.1
    violated = here & (logit < 0)
    assert torch.equal(steered[~violated], plain[site][~violated])
    torch.testing.assert_close((steered @ (2 * u) + 0.1)[violated], torch.zeros(int(violated.sum())), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        steered[violated], plain[site][violated] + (-logit[violated] / 2)[:, None] * u, atol=1e-4, rtol=1e-4
    )
    with Controller(model, random_erasure((site,), positions=positions)):
        erased = residuals(model, ids)[site]
    assert torch.equal(erased[~here], plain[site][~here])
    along = (plain[site] @ v)[..., None] * v
    torch.testing.assert_close(erased[here], (plain[site] - along)[here], atol=1e-4, rtol=1e-4)


def test_additions_act_first_and_then_every_bound_holds(model: Any) -> None:
    """An addition that breaks a bound at its site is listed last and still comes first."""
    ids, site = prompts(), 1
    w = 2.0 * unit_directions((site,), seed=7)[site]
    edits = [
        random_erasure((site,), name="gone", seed=5),
        random_constraint((site,), at_most=0.2, positions="all", seed=7),
        random_addition((site,), 30.0, seed=7),
    ]
    with Controller(model, edits):
        steered = residuals(model, ids)[site]
    target = torch.logit(torch.tensor(0.2))
    torch.testing.assert_close(steered @ w + 0.1, target.expand(ids.shape), atol=1e-4, rtol=0)
    gone = steered @ unit_directions((site,), seed=5)[site]
    torch.testing.assert_close(gone, torch.zeros(ids.shape), atol=1e-4, rtol=0)


AMOUNTS: dict[str, tuple[Any, list[dict[int, float]]]] = {
    "number": (4.0, [{1: 4.0, 3: 4.0}] * 3),
    "samples": (torch.tensor([4.0, 0.0, -9.0]), [{1: 4.0, 3: 4.0}, {1: 0.0, 3: 0.0}, {1: -9.0, 3: -9.0}]),
    "list": ([4.0, 0.0, -9.0], [{1: 4.0, 3: 4.0}, {1: 0.0, 3: 0.0}, {1: -9.0, 3: -9.0}]),
    "samples and layers": (
        torch.tensor([[4.0, 1.0], [0.0, -5.0], [-9.0, 2.0]]),
        [{1: 4.0, 3: 1.0}, {1: 0.0, 3: -5.0}, {1: -9.0, 3: 2.0}],
    ),
    "layers": ({1: 4.0, 3: -2.0}, [{1: 4.0, 3: -2.0}] * 3),
    "layers of samples": (
        {1: [4.0, 0.0, -9.0], 3: 2.0},
        [{1: 4.0, 3: 2.0}, {1: 0.0, 3: 2.0}, {1: -9.0, 3: 2.0}],
    ),
}


@pytest.mark.parametrize(
    ("name", "shape"),
    [*(("llama", shape) for shape in AMOUNTS), *((name, "samples and layers") for name in ARCHITECTURES[1:])],
)
@pytest.mark.parametrize("positions", ["all", "last"])
def test_amounts_per_sample_and_layer(name: str, shape: str, positions: Any) -> None:
    """Each row of the batch equals the same row under a hand-made hook with its numbers."""
    amount, expected = AMOUNTS[shape]
    model, ids = tiny_model(name), prompts(3)
    directions = unit_directions((1, 3))
    with Controller(model, random_addition((1, 3), amount, positions=positions)):
        found, tokens = forward(model, ids), generate(model, ids)

    for layer, block in enumerate(find_decoder(model).blocks):
        if layer in directions:
            rows = torch.tensor([row[layer] for row in expected])
            block.register_forward_hook(_adding(rows, directions[layer], 0 if positions == "all" else ids.shape[1] - 1))
    torch.testing.assert_close(found, forward(model, ids), atol=1e-4, rtol=1e-4)
    assert torch.equal(tokens, generate(model, ids, use_cache=False))


def _adding(amounts: Tensor, direction: Tensor, first: int) -> Callable[..., Any]:
    """Return a hook that adds from column `first` on."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = states_of(output).clone()
        hidden[:, first:] += (amounts[:, None, None] * direction).to(hidden.dtype)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    return hook


def test_bounds_per_sample_and_layer(model: Any) -> None:
    ids = prompts(3)
    bounds = torch.tensor([[0.3, 0.01], [1.0, 0.2], [0.001, 0.5]])
    directions = unit_directions((1, 3))
    with Controller(model, random_constraint((1, 3), at_most=bounds, positions="all")):
        steered = residuals(model, ids)
    for column, layer in enumerate((1, 3)):
        read = torch.sigmoid(steered[layer] @ (2 * directions[layer]) + 0.1)
        assert bool((read <= bounds[:, column, None] + 1e-4).all())
    assert bool((torch.sigmoid(steered[1][1] @ (2 * directions[1]) + 0.1) > 0.5).any()), "sample 1 is free at layer 1"


@every_architecture
@pytest.mark.parametrize("how", ["generate", "forward"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_wrong_number_of_samples(name: str, how: str, positions: Any) -> None:
    model, ids = tiny_model(name), prompts(2)
    before = snapshot(model)
    call = generate if how == "generate" else forward
    with (
        pytest.raises(SamplesError, match=r"'added'.*3.*2") as caught,
        Controller(model, random_addition((1,), [1.0, 2.0, 3.0], positions=positions)),
    ):
        call(model, ids)
    assert (caught.value.expected, caught.value.found) == (3, 2)
    assert_untouched(model, before)


def test_wrong_number_of_samples_is_told_before_generation_starts(model: Any) -> None:
    """Rows are samples times beams: 4 rows of 2 samples are not 4 samples."""
    ran: list[int] = []
    model.model.register_forward_pre_hook(lambda *_: ran.append(1))
    control = Controller(model, random_addition((1,), [1.0] * 4))
    ran.clear()
    with pytest.raises(SamplesError, match=r"4.*2"), control:
        generate(model, prompts(2), num_beams=2)
    assert not ran


@every_architecture
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["all", "last", "prompt"])
def test_batch_equals_its_samples_alone(name: str, side: str, positions: Any) -> None:
    model, alone = tiny_model(name), ragged()
    ids, mask = padded(alone, side)
    real = mask.bool()
    plain = forward(model, ids, mask)
    for row, one in enumerate(alone):
        if not torch.allclose(plain[row][real[row]], forward(model, one)[0], atol=1e-4, rtol=1e-4):
            pytest.skip(f"an unsteered {name} computes something else when padded on the {side}")
    amounts, bounds = [STRONG, -STRONG, 5.0], [0.05, 0.5, 0.9]
    with Controller(model, some(positions, amounts, bounds)):
        together = forward(model, ids, mask)
    assert not torch.allclose(together[real], plain[real], atol=1e-2)
    for row, one in enumerate(alone):
        with Controller(model, some(positions, amounts[row], bounds[row])):
            torch.testing.assert_close(together[row][real[row]], forward(model, one)[0], atol=1e-4, rtol=1e-4)


@every_architecture
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["all", "last", "prompt"])
def test_padding_is_bit_equal_at_the_site(name: str, side: str, positions: Any) -> None:
    model = tiny_model(name)
    ids, mask = padded(ragged(), side)
    here = _last_of(mask) if positions == "last" else mask.bool()
    plain = residuals(model, ids, mask)[1]
    for edit in (
        random_addition((1,), [STRONG, -STRONG, 5.0], positions=positions),
        random_constraint((1,), at_most=[1e-4, 1e-3, 1e-2], positions=positions),
        random_erasure((1,), [1, 1, 0], positions=positions),
    ):
        with Controller(model, edit):
            steered = residuals(model, ids, mask)[1]
        changed = (steered != plain).any(-1)
        assert torch.equal(steered[~here], plain[~here]), edit.name
        assert bool(changed.any()), edit.name
        if edit.name != "bounded":
            on = torch.tensor([[True], [True], [edit.name == "added"]])
            assert torch.equal(changed, here & on), edit.name


def _last_of(mask: Tensor) -> Tensor:
    """Return `"batch pos"`: the last real column of each row."""
    last = (mask * torch.arange(1, mask.shape[1] + 1)).argmax(-1)
    return torch.nn.functional.one_hot(last, mask.shape[1]).bool()


@every_architecture
@pytest.mark.parametrize("positions", ["last", "prompt"])
def test_generated_batch_equals_its_samples_alone(name: str, positions: Any) -> None:
    """Left padding, the way decoders generate."""
    model, alone = tiny_model(name), ragged()
    ids, mask = padded(alone, "left")
    plain = generate(model, ids, mask)
    for row, one in enumerate(alone):
        if not torch.equal(plain[row], generate(model, one)[0]):
            pytest.skip(f"an unsteered {name} generates something else when padded")
    amounts, bounds = [STRONG, -STRONG, 5.0], [0.05, 0.5, 0.9]
    with Controller(model, some(positions, amounts, bounds)):
        together = generate(model, ids, mask)
    assert not torch.equal(together, plain)
    for row, one in enumerate(alone):
        with Controller(model, some(positions, amounts[row], bounds[row])):
            assert torch.equal(together[row], generate(model, one)[0])


def by_hand(model: Any, ids: Tensor, mask: Tensor, amounts: Tensor, layer: int, positions: str) -> Tensor:
    """Decode greedily without cache or Controller; which columns to edit is spelled out from the definition."""
    prompt, last = ids.shape[1], _last_of(mask).int().argmax(-1)
    direction = unit_directions((layer,))[layer]
    here = torch.zeros_like(mask, dtype=torch.bool)

    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = states_of(output)
        hidden = torch.where(here[..., None], hidden + amounts[:, None, None] * direction, hidden)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handle = find_decoder(model).blocks[layer].register_forward_hook(hook)
    for _ in range(NEW):
        column = torch.arange(ids.shape[1]).expand_as(ids)
        real = mask.bool()
        here = {
            "all": real,
            "prompt": real & (column < prompt),
            "generated": column >= prompt,
            "last": real & (column >= last[:, None]),
        }[positions]
        token = forward(model, ids, mask)[:, -1].argmax(-1)
        ids, mask = torch.cat([ids, token[:, None]], 1), torch.cat([mask, torch.ones(len(mask), 1).long()], 1)
    handle.remove()
    return ids[:, prompt:]


@every_architecture
@every_positions
def test_positions_mean_what_they_say(name: str, positions: Any) -> None:
    model = tiny_model(name)
    ids, mask = padded(ragged((10, 6)), "left")
    amounts = torch.tensor([STRONG, -STRONG])
    plain = generate(model, ids, mask)
    if not torch.equal(plain, by_hand(model, ids, mask, torch.zeros(2), 1, "all")):
        pytest.skip(f"an unsteered {name} generates something else by hand")
    with Controller(model, random_addition((1,), amounts, positions=positions)):
        found = generate(model, ids, mask)
    assert not torch.equal(found, plain)
    assert torch.equal(found, by_hand(model, ids, mask, amounts, 1, positions))


MODES: dict[str, Callable[[str], dict[str, Any]]] = {
    "uncached": lambda name: {"use_cache": False},
    "chunked prefill": lambda name: {"prefill_chunk_size": 4},
    "prompt lookup": lambda name: {"prompt_lookup_num_tokens": 3},
    "assisted": lambda name: {"assistant_model": tiny_model(name)},
    "static cache": lambda name: {"cache_implementation": "static"},
    "chunked static": lambda name: {"cache_implementation": "static", "prefill_chunk_size": 4},
}


def mixed(amounts: Any) -> list[Intervention]:
    """Return edits at other positions in one Controller, several at one site."""
    return [
        random_addition((1, 3), amounts, positions="prompt"),
        random_addition((1, 2), amounts, positions="generated", name="later", seed=4),
        random_constraint((2, 3), at_most=0.05, positions="last", seed=7),
    ]


THOROUGH = ("llama", "mistral", "gemma3", "gpt2")
"""Run with every value of `positions`; the others with the two that see most."""


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        (name, each)
        for name in ARCHITECTURES
        for each in ([*POSITIONS, "mixed"] if name in THOROUGH else ["last", "mixed"])
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_tokens_do_not_depend_on_how_decoding_runs(name: str, positions: Any, mode: str) -> None:
    """Against ordinary cached generation; mistral and the gemmas have a sliding window shorter than the prompt."""
    model, speculative = tiny_model(name), mode in ("prompt lookup", "assisted")
    ids, mask = padded(ragged((10,) if speculative else (10, 6)), "left")
    settings = MODES[mode](name)
    plain = generate(model, ids, mask)
    try:
        other = generate(model, ids, mask, **settings)
    except (ValueError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"an unsteered {name} refuses {mode}: {error}")
    if not torch.equal(plain, other):
        pytest.skip(f"an unsteered {name} differs with {mode}")
    amounts = [STRONG] if speculative else [STRONG, -STRONG]
    control = Controller(model, mixed(amounts) if positions == "mixed" else some(positions, amounts))
    with control:
        expected = generate(model, ids, mask)
    assert not torch.equal(expected, plain)
    with control, watched(model) as seen:
        assert torch.equal(generate(model, ids, mask, **settings), expected)
    widths = [states.shape[1] for states in seen[0]]
    if speculative:
        assert widths[0] > ids.shape[1] or any(width > 1 for width in widths[1:]), "no candidate was ever tried"
    if mode.startswith("chunked"):
        assert widths[0] == 4
    if mode == "uncached":
        assert widths[-1] == ids.shape[1] + NEW - 1


@every_architecture
@pytest.mark.parametrize("positions", ["last", "generated"])
def test_beams_and_return_sequences_keep_their_sample(name: str, positions: Any) -> None:
    model, alone = tiny_model(name), ragged()
    ids, mask = padded(alone, "left")
    settings = {"num_beams": 3, "num_return_sequences": 2}
    try:
        plain = generate(model, ids, mask, **settings)
    except (ValueError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"an unsteered {name} refuses beams: {error}")
    for row, one in enumerate(alone):
        if not torch.equal(plain[2 * row : 2 * row + 2], generate(model, one, **settings)):
            pytest.skip(f"an unsteered {name} searches something else when padded")
    amounts, bounds = [STRONG, -STRONG, 5.0], [0.05, 0.5, 0.9]
    with Controller(model, some(positions, amounts, bounds)):
        together = generate(model, ids, mask, **settings)
    assert not torch.equal(together, plain)
    for row, one in enumerate(alone):
        with Controller(model, some(positions, amounts[row], bounds[row])):
            assert torch.equal(together[2 * row : 2 * row + 2], generate(model, one, **settings))


def test_sampled_return_sequences_keep_their_sample(model: Any) -> None:
    """top_k=1 makes sampling greedy, so that every row of a sample equals the sample alone."""
    ids = prompts(3)
    amounts = [STRONG, -STRONG, 5.0]
    settings = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    with Controller(model, some("last", amounts)):
        together = generate(model, ids, **settings)
    for row in range(6):
        with Controller(model, some("last", amounts[row // 2])):
            assert torch.equal(together[row], generate(model, ids[row // 2][None])[0])


def test_sampling_is_reproducible(model: Any) -> None:
    ids = prompts(3)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 20}

    def sample() -> Tensor:
        torch.manual_seed(5)
        return generate(model, ids, **settings)

    plain = sample()
    with Controller(model, some()):
        first, second = sample(), sample()
    with Controller(model, random_addition((1,), 0.0)):
        off = sample()
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)
    assert torch.equal(off, plain)


@every_architecture
@pytest.mark.parametrize("first_turn", ["plain", "steered"])
@pytest.mark.parametrize("passed", ["everything", "what is new"])
def test_second_turn_with_a_carried_cache(name: str, first_turn: str, passed: str) -> None:
    """Meaning: the prompt is all that is passed to the call (ids and mask), cached positions stay as they are.

    So `"last"` edits from the last column of the second prompt on. What the cache holds was computed in the first turn,
    steered or not, and is not edited again; the columns between the cache and the last one run unedited.
    """
    if name == "mamba":
        pytest.skip("a state-space model carries no cache of positions")
    model, layer = tiny_model(name), 1
    ids = prompts(2)
    mask = torch.ones_like(ids)
    control = Controller(model, random_addition((layer,), [STRONG, -STRONG], positions="last"))

    def first() -> Any:
        return model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )

    if first_turn == "plain":
        turn = first()
    else:
        with control:
            turn = first()
    full = torch.cat([turn.sequences, prompts(2, 5, seed=9)], 1)
    whole = torch.ones_like(full)
    held = turn.past_key_values.get_seq_length()
    assert 0 < held < full.shape[1] - 1

    cache, expected = copy.deepcopy(turn.past_key_values), full
    hook = _adding(torch.tensor([STRONG, -STRONG]), unit_directions((layer,))[layer], full.shape[1] - 1 - held)
    with torch.no_grad():
        for step in range(NEW):
            new = expected[:, cache.get_seq_length() :]
            if step == 1:
                hook = _adding(torch.tensor([STRONG, -STRONG]), unit_directions((layer,))[layer], 0)
            handle = find_decoder(model).blocks[layer].register_forward_hook(hook)
            logits = model(new, attention_mask=torch.ones_like(expected), past_key_values=cache, use_cache=True).logits
            handle.remove()
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    expected = expected[:, full.shape[1] :]

    given = full if passed == "everything" else full[:, held:]
    settings = {"attention_mask": whole, "max_new_tokens": NEW, "do_sample": False}
    try:
        plain = model.generate(input_ids=given, past_key_values=copy.deepcopy(turn.past_key_values), **settings)
    except (ValueError, IndexError, RuntimeError) as error:
        pytest.skip(f"an unsteered {name} refuses {passed}: {error}")
    with control:
        found = model.generate(input_ids=given, past_key_values=turn.past_key_values, **settings)
    assert not torch.equal(found, plain)
    assert torch.equal(found[:, given.shape[1] :], expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom"])
@every_positions
def test_ways_to_pass_the_prompt(name: str, positions: Any) -> None:
    """Positional ids, the name `inputs`, embeddings, and a mask that transformers infers from the pad token."""
    model = tiny_model(name)
    ids, mask = padded(ragged((10, 6)), "left")
    settings = {"max_new_tokens": NEW, "do_sample": False}
    with Controller(model, some(positions, [STRONG, -STRONG])):
        expected = generate(model, ids, mask)
        embeddings = model.get_input_embeddings()(ids).detach()
        assert torch.equal(model.generate(ids, attention_mask=mask, **settings)[:, 10:], expected)
        assert torch.equal(model.generate(inputs=ids, attention_mask=mask, **settings)[:, 10:], expected)
        assert torch.equal(model.generate(ids, **settings)[:, 10:], expected)
        assert torch.equal(model.generate(inputs_embeds=embeddings, attention_mask=mask, **settings), expected)


@pytest.mark.parametrize("ends", [2, [2, 5], torch.tensor(2), torch.tensor([2, 5])])
def test_ways_to_pass_the_end_of_sequence(model: Any, ends: Any) -> None:
    """Every form that transformers takes, where the mask has to be inferred from the pad token."""
    ids, mask = padded(ragged((10, 6)), "left")
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": ends}
    plain = model.generate(ids, **settings)
    with Controller(model, some("all", [STRONG, -STRONG])):
        found = model.generate(ids, **settings)
        assert torch.equal(found, model.generate(ids, attention_mask=mask, **settings))
    assert not torch.equal(found, plain)


def test_generation_without_a_prompt(model: Any) -> None:
    """transformers starts from the BOS token alone: one sample of one token."""
    with Controller(model, some("last")):
        expected = generate(model, torch.tensor([[1]]))
        assert torch.equal(model.generate(max_new_tokens=NEW, do_sample=False)[:, 1:], expected)


def test_masks_of_a_bare_forward_pass(model: Any) -> None:
    """A 4-D mask says the same as the 2-D one; a mask that cannot be read is refused."""
    ids, mask = padded(ragged((10, 6)), "left")
    causal = torch.ones(10, 10).tril().bool()[None, None] & mask.bool()[:, None, None, :]
    with Controller(model, some("last", [STRONG, -STRONG])):
        expected = forward(model, ids, mask)
        with torch.no_grad():
            found = model(ids, attention_mask=causal, **place_of(model, mask)).logits
        real = mask.bool()
        torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)
        with pytest.raises(AttachError, match="mask"):
            model(ids, attention_mask=torch.ones(2, 10, 10))


def test_bare_forward_passes_with_a_cache(model: Any) -> None:
    """Each bare pass is all prompt: "last" edits the last column of each, whatever the cache holds."""
    ids, mask = padded(ragged((10, 6)), "left")
    control = Controller(model, random_addition((1,), STRONG, positions="last"))
    with control, watched(model) as seen, torch.no_grad():
        first = model(ids[:, :7], attention_mask=mask[:, :7], use_cache=True)
        model(ids[:, 7:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
    with watched(model) as plain, torch.no_grad():
        first = model(ids[:, :7], attention_mask=mask[:, :7], use_cache=True)
    step = STRONG * unit_directions((1,))[1]
    assert torch.equal(seen[1][0][:, :-1], plain[1][0][:, :-1])
    assert torch.equal(seen[1][0][:, -1], plain[1][0][:, -1] + step)
    changed = seen[1][1] - _without(model, seen, ids, mask)
    torch.testing.assert_close(changed[:, -1], step.expand(2, -1), atol=1e-4, rtol=0)
    torch.testing.assert_close(changed[:, :-1], torch.zeros(2, 2, D_MODEL), atol=1e-4, rtol=0)


def _without(model: Any, seen: list[list[Tensor]], ids: Tensor, mask: Tensor) -> Tensor:
    """Return block 1 on columns 7 to 9; nothing that it reads was edited, since the edit is on its own output."""
    return residuals(model, ids, mask)[1][:, 7:]


def test_body_called_without_the_head(model: Any) -> None:
    ids = prompts()
    plain = residuals(model, ids)[1]
    with Controller(model, random_addition((1,), 2.0)), watched(model) as seen:
        model.model(ids)
    assert torch.equal(seen[1][0], plain + torch.tensor(2.0) * unit_directions((1,))[1])


def test_pipeline_is_steered(model: Any) -> None:
    from transformers import pipeline

    tokenizer = tiny_tokenizer(pad=True, padding_side="left")
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["w5 w6 w7 w5 w6 w7 w5", "w9 w11"]
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False}

    def run(batch: Any, **more: Any) -> list[str]:
        return [one[0]["generated_text"] for one in pipe(batch, **settings, **more)]

    plain = run(texts)
    with Controller(model, some("last", [STRONG, -STRONG])):
        together = run(texts, batch_size=2)
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        tokens = generate(model, inputs["input_ids"], inputs["attention_mask"])
    assert together == tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert all(one != other for one, other in zip(together, plain, strict=True))
    for row, amount in enumerate([STRONG, -STRONG]):
        with Controller(model, some("last", amount)):
            assert run([texts[row]]) == [together[row]]
    assert run(texts) == plain


def test_nested_additions_add_up(model: Any) -> None:
    ids = prompts()
    plain, before = residuals(model, ids)[1], snapshot(model)
    one, two = random_addition((1,), 3.0), random_addition((1,), [2.0, -1.0], seed=4)
    with Controller(model, one), Controller(model, two):
        both = residuals(model, ids)[1]
        nested = generate(model, ids)
    expected = plain + torch.tensor(3.0) * unit_directions((1,))[1]
    expected = expected + torch.tensor([2.0, -1.0])[:, None, None] * unit_directions((1,), seed=4)[1]
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=0)
    second = random_addition((1,), [2.0, -1.0], seed=4, name="second")
    with Controller(model, [one, second]):
        assert torch.equal(generate(model, ids), nested)
    assert_untouched(model, before)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_nested_controllers_leave_in_any_order(model: Any, order: tuple[int, int]) -> None:
    ids, before = prompts(), snapshot(model)
    edits = [random_addition((1,), STRONG, positions="last"), random_addition((2,), STRONG, positions="generated")]
    controls = [Controller(model, edit) for edit in edits]
    alone = []
    for control in controls:
        with control:
            alone.append(generate(model, ids))
    for control in controls:
        control.attach()
    generate(model, ids)
    controls[order[0]].detach()
    assert torch.equal(generate(model, ids), alone[order[1]])
    controls[order[1]].detach()
    assert_untouched(model, before)


def test_entering_twice(model: Any) -> None:
    ids, control = prompts(), Controller(model, some())
    before = snapshot(model)
    with control:
        steered = forward(model, ids)
        with pytest.raises(AttachError, match="once"):
            control.attach()
        with pytest.raises(AttachError, match="once"), control:
            pass
        assert torch.equal(forward(model, ids), steered), "still attached, once"
    assert_untouched(model, before)
    with pytest.raises(AttachError, match="detached"):
        control.detach()
    with control:
        assert torch.equal(forward(model, ids), steered)


def test_using_changes_amounts_in_place_while_attached(model: Any) -> None:
    ids = prompts(3)

    def fresh(amount: Any) -> Tensor:
        with Controller(model, random_addition((1, 2), amount)):
            return forward(model, ids)

    first, second, third = 3.0, [1.0, -2.0, 5.0], {1: 4.0, 2: [1.0, 2.0, 3.0]}
    with Controller(model, random_addition((1, 2), first)) as control:
        assert torch.equal(forward(model, ids), fresh_inside(model, first, ids, control))
    results = {str(amount): fresh(amount) for amount in (first, second, third)}
    with Controller(model, random_addition((1, 2), first)) as control:
        assert torch.equal(forward(model, ids), results[str(first)])
        control.using(added=second)
        assert torch.equal(forward(model, ids), results[str(second)])
        with control.using(added=third) as same:
            assert same is control
            assert torch.equal(forward(model, ids), results[str(third)])
        assert torch.equal(forward(model, ids), results[str(second)]), "the amounts before the `with` are back"
    with control:
        assert torch.equal(forward(model, ids), results[str(second)]), "a plain using() stays"


def fresh_inside(model: Any, amount: Any, ids: Tensor, control: Controller) -> Tensor:
    """Return the logits of the same amounts after `using` set them anew."""
    control.using(added=amount)
    return forward(model, ids)


def test_using_attaches_a_detached_controller(model: Any) -> None:
    ids, before = prompts(), snapshot(model)
    control = Controller(model, random_addition((1,), 3.0))
    with control:
        first = forward(model, ids)
    with Controller(model, random_addition((1,), 9.0)):
        second = forward(model, ids)
    with control.using(added=9.0) as same:
        assert same is control
        assert torch.equal(forward(model, ids), second)
    assert_untouched(model, before)
    with control:
        assert torch.equal(forward(model, ids), first)
    control.using(added=9.0)
    with control:
        assert torch.equal(forward(model, ids), second)
    assert_untouched(model, before)


def test_using_restores_after_an_error(model: Any) -> None:
    ids, before = prompts(), snapshot(model)
    control = Controller(model, random_addition((1,), 3.0))
    with control:
        first = forward(model, ids)
        with pytest.raises(KeyboardInterrupt), control.using(added=9.0):
            raise KeyboardInterrupt
        assert torch.equal(forward(model, ids), first)
    with pytest.raises(KeyboardInterrupt), control.using(added=9.0):
        raise KeyboardInterrupt
    assert_untouched(model, before)
    with control:
        assert torch.equal(forward(model, ids), first)


def band() -> list[Intervention]:
    return [
        random_constraint((1,), at_least=0.2, positions="all", name="low"),
        random_constraint((1,), at_most=0.8, positions="all", name="high"),
        random_erasure((2,), name="gone"),
    ]


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize(
    ("amounts", "error", "message"),
    [
        ({"loww": 0.1}, AmountError, "loww"),
        ({}, AmountError, "low"),
        ({"low": 0.3, "typo": 1.0}, AmountError, "typo"),
        ({"gone": 0.5}, AmountError, r"0\.5"),
        ({"low": 1.5}, AmountError, r"1\.5"),
        ({"low": float("nan")}, AmountError, "nan"),
        ({"low": 1.0}, AmountError, "infinite"),
        ({"low": {0: 0.5}}, AmountError, "layers"),
        ({"low": torch.ones(2, 3) / 2}, AmountError, r"\(2, 3\)"),
        ({"low": 0.9}, DependentConceptsError, "'low' and 'high'"),
        ({"low": [0.1, 0.9], "high": [0.5, 0.7]}, DependentConceptsError, "contradict"),
        ({"high": 0.3, "low": 0.1, "gone": 2}, AmountError, "2"),
    ],
)
def test_refused_amounts_change_nothing(
    model: Any, attached: bool, amounts: dict[str, Any], error: type[Exception], message: str
) -> None:
    ids = prompts()
    control = Controller(model, band())
    with control:
        expected = forward(model, ids)
        if attached:
            with pytest.raises(error, match=message):
                control.using(**amounts)
            assert torch.equal(forward(model, ids), expected)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        control.using(**amounts)
    assert_untouched(model, before)
    with control:
        assert torch.equal(forward(model, ids), expected)


def test_contradictory_bands_are_refused_at_construction(model: Any) -> None:
    before = snapshot(model)
    with pytest.raises(DependentConceptsError, match="contradict") as caught:
        Controller(
            model, [random_constraint(at_least=0.8, name="low"), random_constraint(at_most=[0.9, 0.2], name="high")]
        )
    assert set(caught.value.pair) == {"low", "high"}
    assert_untouched(model, before)


def test_lists_of_interventions_that_are_refused(model: Any) -> None:
    with pytest.raises(AmountError, match="at least one"):
        Controller(model, [])
    with pytest.raises(AmountError, match="'added' twice"):
        Controller(model, [random_addition(), random_addition(seed=2)])
    with pytest.raises(AmountError, match="int"):
        Controller(model, [3])  # type: ignore[list-item]


# peft 0.21 asks transformers for an attribute that transformers 5.23 has renamed
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("given", ["peft", "base"])
@every_positions
def test_peft_model(name: str, given: str, positions: Any) -> None:
    """A LoRA model is steered through its wrapper as its merged twin is, whichever object the Controller was given."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = get_peft_model(tiny_model(name), config).eval()
    merged = copy.deepcopy(wrapped).merge_and_unload()
    ids, mask = padded(ragged((10, 6)), "left")
    edits = some(positions, [STRONG, -STRONG])
    base = wrapped.get_base_model()
    plain, before, outer = generate(wrapped, ids, mask), snapshot(base), snapshot(wrapped)
    assert not torch.equal(plain, generate(tiny_model(name), ids, mask))
    with Controller(merged, edits):
        tokens = generate(merged, ids, mask)
    assert not torch.equal(tokens, plain)
    with Controller(wrapped if given == "peft" else base, edits):
        assert torch.equal(generate(wrapped, ids, mask), tokens)
        assert torch.equal(generate(base, ids, mask), tokens)
    assert_untouched(base, before)
    assert_untouched(wrapped, outer)
    if positions != "generated":
        with Controller(merged, edits):
            logits = forward(merged, ids, mask)
        with Controller(wrapped if given == "peft" else base, edits), torch.no_grad():
            found = wrapped(ids, attention_mask=mask, **place_of(base, mask)).logits
        torch.testing.assert_close(found, logits, atol=1e-3, rtol=1e-3)
    assert torch.equal(generate(wrapped, ids, mask), plain)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_model_split_over_devices(name: str, positions: Any, tmp_path: Any) -> None:
    """Half of the blocks live on the CPU and half on disk (meta tensors between passes)."""
    from accelerate import dispatch_model

    model, ids = tiny_model(name), prompts()
    with Controller(model, some(positions, [STRONG, -STRONG])):
        expected, tokens = forward(model, ids), generate(model, ids)
    paths = {path: module for path, module in model.named_modules() if not list(module.children())}
    blocks = [f"{'model.layers' if name == 'llama' else 'transformer.h'}.{layer}" for layer in range(DEPTH)]
    device_map = {path: "cpu" for path in paths if not any(path.startswith(f"{block}.") for block in blocks)}
    device_map |= {block: "cpu" if layer < 2 else "disk" for layer, block in enumerate(blocks)}
    split = dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert {p.device.type for p in split.parameters()} == {"cpu", "meta"}
    plain, before = forward(split, ids), {path: list(m._forward_hooks) for path, m in split.named_modules()}
    with Controller(split, some(positions, [STRONG, -STRONG])):
        torch.testing.assert_close(forward(split, ids), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(generate(split, ids), tokens)
    assert before == {path: list(m._forward_hooks) for path, m in split.named_modules()}
    assert "generate" not in split.__dict__
    assert torch.equal(forward(split, ids), plain)


@every_architecture
@pytest.mark.parametrize("positions", ["all", "last"])
def test_addition_has_the_gradient_of_a_hand_made_hook(name: str, positions: Any) -> None:
    if name == "mixtral":
        pytest.skip("its grouped matrix product has no float64 on the CPU")
    model, ids = tiny_model(name).double(), prompts()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids).logits.logsumexp(-1)[:, -1].sum().backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    with Controller(model, random_addition((1,), [STRONG, -STRONG], positions=positions)):
        found = gradients()
    first = 0 if positions == "all" else ids.shape[1] - 1
    hook = _adding(torch.tensor([STRONG, -STRONG]), unit_directions((1,))[1], first)
    find_decoder(model).blocks[1].register_forward_hook(hook)
    expected = gradients()
    assert list(found) == list(expected)
    assert any(not torch.allclose(found[key], plain[key]) for key in found)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-9, rtol=1e-6)


def _bounding(kind: str, direction: Tensor) -> Callable[..., Any]:
    """Return a hook with the closed form of GCAV for one bound (or of an erasure), differentiable."""
    target = torch.logit(torch.tensor(1e-6, dtype=torch.float64))

    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = states_of(output)
        along = hidden.double() @ direction.double()
        missing = -along if kind == "erasure" else ((target - 0.1) / 2 - along).clamp(max=0)
        edited = (hidden.double() + missing[..., None] * direction.double()).to(hidden.dtype)
        return edited if isinstance(output, Tensor) else (edited, *output[1:])

    return hook


@every_architecture
@pytest.mark.parametrize("path", ["short", "general"])
@pytest.mark.parametrize("kind", ["bound", "erasure"])
def test_edits_have_the_gradient_of_a_hand_made_hook(name: str, path: str, kind: str) -> None:
    model, ids = tiny_model(name), prompts()
    edit = random_erasure((1,)) if kind == "erasure" else random_constraint((1,), at_most=1e-6, positions="all")

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids).logits.logsumexp(-1)[:, -1].sum().backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    with Controller(model, edit, record_magnitudes=path == "general"):
        found = gradients()
    find_decoder(model).blocks[1].register_forward_hook(_bounding(kind, unit_directions((1,))[1]))
    expected = gradients()
    assert list(found) == list(expected)
    below = next(key for key in found if ".0." in key)
    assert not torch.allclose(found[below], plain[below], rtol=1e-2)
    for key, gradient in expected.items():
        assert bool(found[key].isfinite().all())
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[key], gradient, atol=1e-3 * scale + 1e-6, rtol=1e-3)


@pytest.mark.parametrize("path", ["short", "general"])
@pytest.mark.parametrize("kind", ["addition", "bound", "erasure"])
def test_gradient_of_an_edit_is_its_finite_difference(model: Any, path: str, kind: str) -> None:
    """Along one random direction in the embeddings; edits are computed in float32, which bounds the precision."""
    ids = prompts()
    edit = {
        "addition": random_addition((1,), STRONG),
        "bound": random_constraint((1,), at_most=1e-6, positions="all"),
        "erasure": random_erasure((1,)),
    }[kind]
    embedded = model.get_input_embeddings()(ids).detach()
    push = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(2))

    def loss(step: Tensor | float) -> Tensor:
        return model(inputs_embeds=embedded + step * push).logits[:, -1].logsumexp(-1).sum()

    with Controller(model, edit, record_magnitudes=path == "general"):
        step = torch.zeros((), requires_grad=True)
        (found,) = torch.autograd.grad(loss(step), step)
        with torch.no_grad():
            difference = (loss(1e-3) - loss(-1e-3)) / 2e-3
    assert abs(float(found)) > 0.05
    torch.testing.assert_close(found, difference, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@every_positions
def test_modes_of_autograd(model: Any, mode: Any, positions: Any) -> None:
    """The same tokens and logits in each mode, and attaching in inference mode does not spoil autograd later."""
    ids = prompts()
    edits = [*some(positions, [STRONG, -STRONG]), random_erasure((1,), name="gone", positions=positions, seed=8)]
    with Controller(model, edits):
        tokens, expected = generate(model, ids), forward(model, ids)
    control = Controller(model, edits)
    with mode():
        control.attach()
        assert torch.equal(generate(model, ids), tokens)
        assert torch.equal(model(ids).logits, expected)
        control.using(added=[STRONG, -STRONG])
    logits = model(ids).logits
    torch.testing.assert_close(logits, expected, atol=0, rtol=0)
    logits.sum().backward()
    weight = model.get_input_embeddings().weight
    assert bool(weight.grad.isfinite().all())
    control.using(added=[1.0, 2.0])
    with mode():
        changed = generate(model, ids)
    control.detach()
    with Controller(model, [*some(positions, [1.0, 2.0]), edits[2]]):
        assert torch.equal(generate(model, ids), changed)


@pytest.mark.parametrize("made_there", ["controller", "interventions"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_construction_in_inference_mode(model: Any, positions: Any, made_there: str) -> None:
    """Tensors made in inference mode cannot be saved for backward: a Controller must not hold any."""
    ids = prompts()
    with torch.inference_mode(made_there == "interventions"):
        edits = [*some(positions), random_erasure((1,), name="gone", positions=positions, seed=8)]
    with torch.inference_mode():
        control = Controller(model, edits)
        with control:
            generate(model, ids)
    with control:
        generate(model, ids)
        model(ids).logits.sum().backward()
    assert bool(model.get_input_embeddings().weight.grad.isfinite().all())


def test_gradient_checkpointing(model: Any) -> None:
    """Blocks that run again in the backward pass are edited again."""
    ids = prompts()
    model.train()

    def gradient() -> Tensor:
        model.zero_grad()
        model(ids).logits.logsumexp(-1).sum().backward()
        return model.get_input_embeddings().weight.grad.clone()

    with Controller(model, some("last", [STRONG, -STRONG])):
        expected = gradient()
    model.activation_checkpointing_enable()
    with Controller(model, some("last", [STRONG, -STRONG])):
        torch.testing.assert_close(gradient(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["all", "last", "prompt"])
def test_magnitudes_of_a_forward_pass(model: Any, side: str, positions: Any) -> None:
    ids, mask = padded(ragged(), side)
    amounts = [3.0, -2.0, 0.0]
    edits = [
        random_addition((0,), amounts, positions=positions),
        random_constraint((2,), at_most=0.3, positions=positions),
        random_erasure((1,), [1, 0, 1], positions=positions),
    ]
    with Controller(model, edits):
        silent = forward(model, ids, mask)
    with Controller(model, edits, record_magnitudes=True) as control:
        logits = forward(model, ids, mask)
        found = control.magnitudes
    assert torch.equal(logits, silent)
    here = mask.bool() if positions != "last" else _last_of(mask)
    assert {name: list(layers) for name, layers in found.items()} == {"added": [0], "bounded": [2], "erased": [1]}
    assert all(one.shape == ids.shape for layers in found.values() for one in layers.values())
    expected = torch.where(here, torch.tensor(amounts)[:, None], 0.0)
    torch.testing.assert_close(found["added"][0], expected, atol=0, rtol=0)

    with Controller(model, edits[:1]):
        before = residuals(model, ids, mask)[1]
    component = before @ unit_directions((1,))[1]
    expected = torch.where(here & torch.tensor([[1], [0], [1]]).bool(), -component, 0.0)
    torch.testing.assert_close(found["erased"][1], expected, atol=1e-4, rtol=1e-4)

    with Controller(model, [edits[0], edits[2]]):
        before = residuals(model, ids, mask)[2]
    u = unit_directions((2,))[2]
    missing = (torch.logit(torch.tensor(0.3)) - 0.1 - before @ (2 * u)) / 2
    expected = torch.where(here & (missing < 0), missing, 0.0)
    torch.testing.assert_close(found["bounded"][2], expected, atol=1e-4, rtol=1e-4)
    assert bool((expected == 0).any()) or positions == "last"


@pytest.mark.parametrize("mode", ["cached", *MODES])
@every_positions
def test_magnitudes_of_a_generation(model: Any, positions: Any, mode: str) -> None:
    """One column for each that ran, whatever the positions and the way of decoding; the last token never runs."""
    speculative = mode in ("prompt lookup", "assisted")
    ids, mask = padded(ragged((10,) if speculative else (10, 6)), "left")
    amounts = [STRONG] if speculative else [STRONG, -STRONG]
    settings = {} if mode == "cached" else MODES[mode]("llama")
    with Controller(model, some(positions, amounts)):
        expected = generate(model, ids, mask)
    with Controller(model, some(positions, amounts), record_magnitudes=True) as control:
        assert torch.equal(generate(model, ids, mask, **settings), expected)
        added, bounded = control.magnitudes["added"][1], control.magnitudes["bounded"]
    ran = ids.shape[1] + NEW - 1
    column = torch.arange(ran)[None]
    real = torch.cat([mask.bool(), torch.ones(len(ids), NEW - 1).bool()], 1)
    here = {
        "all": real,
        "prompt": real & (column < 10),
        "generated": real & (column >= 10),
        "last": real & (column >= 9),
    }[positions]
    assert set(bounded) == {2, 3}
    assert len(added) == len(ids)
    if not speculative:
        assert added.shape == (len(ids), ran)
        assert all(one.shape == added.shape for one in bounded.values())
    torch.testing.assert_close(added[:, :ran], torch.where(here, torch.tensor(amounts)[:, None], 0.0), atol=0, rtol=0)
    for one in bounded.values():
        assert not bool(one[:, :ran][~here].any())
        assert bool((one <= 0).all())
        assert bool((one < 0).any())


def test_magnitudes_of_the_last_call_only(model: Any) -> None:
    with Controller(model, random_addition((1,), 2.0), record_magnitudes=True) as control:
        generate(model, prompts(2))
        forward(model, prompts(3, 5))
        assert control.magnitudes["added"][1].shape == (3, 5)
        generate(model, prompts(1, 6))
        assert control.magnitudes["added"][1].shape == (1, 6 + NEW - 1)
    assert control.magnitudes["added"][1].shape == (1, 6 + NEW - 1), "still there after the `with`"


def test_magnitudes_tell_where_a_cap_held(model: Any) -> None:
    ids, u = prompts(), unit_directions((1,))[1]
    plain = residuals(model, ids)[1]
    edit = random_constraint((1,), at_most=1e-6, positions="all", max_magnitude=0.1)
    with Controller(model, edit, record_magnitudes=True) as control:
        steered = residuals(model, ids)[1]
        found = control.magnitudes["bounded"][1]
    wanted = (torch.logit(torch.tensor(1e-6)) - 0.1 - plain @ (2 * u)) / 2
    limit = 0.1 * plain.norm(dim=-1)
    expected = torch.where(wanted < 0, -torch.minimum(-wanted, limit), 0.0)
    assert bool((-wanted > limit).any())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(steered, plain + found[..., None] * u, atol=1e-4, rtol=1e-4)


def test_magnitudes_are_kept_on_request(model: Any) -> None:
    with Controller(model, some()) as control:
        forward(model, prompts())
        with pytest.raises(AttachError, match="record_magnitudes"):
            _ = control.magnitudes


@every_architecture
@pytest.mark.parametrize("positions", ["last", "all"])
def test_bfloat16(name: str, positions: Any) -> None:
    model = tiny_model(name).to(torch.bfloat16)
    ids, mask = padded(ragged((10, 6)), "left")
    plain = generate(model, ids, mask)
    edits = [*some(positions, [STRONG, -STRONG]), random_erasure((1,), name="gone", positions=positions, seed=8)]
    with Controller(model, edits):
        steered = generate(model, ids, mask)
        if positions != "generated":
            logits = forward(model, ids, mask)
            assert logits.dtype == forward(model, ids, mask).dtype
            assert bool(logits.isfinite().all())
    assert not torch.equal(steered, plain)
    assert torch.equal(generate(model, ids, mask), plain)


@every_architecture
def test_bfloat16_site(name: str) -> None:
    """The step is cast once; untouched rows stay bit-equal. (mamba keeps its residual stream in float32.)"""
    model, ids = tiny_model(name).to(torch.bfloat16), prompts()
    plain = residuals(model, ids)[1]
    step = (torch.tensor([3.7, 0.0])[:, None, None] * unit_directions((1,))[1]).to(plain.dtype)
    for positions in ("all", "prompt"):
        with Controller(model, random_addition((1,), [3.7, 0.0], positions=positions)):
            assert torch.equal(residuals(model, ids)[1], plain + step)
    for record in (True, False):
        with Controller(model, random_constraint((1,), at_most=0.2, positions="all"), record_magnitudes=record):
            steered = residuals(model, ids)[1]
        w = 2 * unit_directions((1,))[1]
        logit, target = plain.float() @ w + 0.1, torch.logit(torch.tensor(0.2))
        assert torch.equal(steered[logit < target - 1e-3], plain[logit < target - 1e-3])
        rounding = 2.0**-8 * (plain.float().abs() @ w.abs() + 20)
        assert bool(((steered.float() @ w + 0.1) <= target + rounding).all())


KINDS: dict[str, Callable[[], list[Intervention]]] = {
    "addition": lambda: [random_addition((1, 2), STRONG)],
    "per-sample addition": lambda: [random_addition((1, 2), [STRONG, -STRONG])],
    "at most": lambda: [random_constraint((1, 2), at_most=0.01, positions="all")],
    "at least": lambda: [random_constraint((1, 2), at_least=0.999, positions="all")],
    "per-sample bound": lambda: [random_constraint((1, 2), at_most=[0.001, 0.4], positions="all")],
    "erasure": lambda: [random_erasure((1, 2))],
    "per-sample erasure": lambda: [random_erasure((1, 2), [1, 0])],
    "addition and bound": lambda: [
        random_addition((1, 2), STRONG),
        random_constraint((1, 2), at_most=0.01, positions="all", seed=4),
    ],
    "addition and erasure": lambda: [random_addition((1, 2), [1.0, STRONG]), random_erasure((1, 2), seed=4)],
    "two additions": lambda: [
        random_addition((1, 2), STRONG),
        random_addition((2, 3), [1.0, STRONG], name="more", seed=4),
    ],
    "two bounds": lambda: [
        random_constraint((1, 2), at_most=0.01, positions="all"),
        random_constraint((2, 3), at_least=[0.9, 0.99], positions="all", name="more", seed=4),
    ],
    "three bounds": lambda: [
        random_addition((1,), [1.0, STRONG], seed=9),
        *(random_constraint((1,), at_least=0.9, positions="all", name=f"bound{seed}", seed=seed) for seed in (1, 2, 3)),
    ],
    "bound and erasures": lambda: [
        random_erasure((1, 2)),
        random_constraint((1, 2), at_most=[0.01, 1.0], positions="all", seed=4),
        random_erasure((2,), name="more", seed=5),
    ],
    "band": lambda: [
        random_constraint((1,), at_most=0.6, positions="all"),
        random_constraint((1,), at_least=0.4, positions="all", name="low"),
    ],
}


@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        *(("llama", kind, dtype) for kind in KINDS for dtype in (torch.float32, torch.float64)),
        *((name, kind, torch.float32) for name in ARCHITECTURES[1:] for kind in ("addition and bound", "erasure")),
    ],
)
def test_short_path_equals_general_path(
    name: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recording takes the general path, and changes nothing."""
    original, ran = SiteEdit.edit, []
    monkeypatch.setattr(SiteEdit, "edit", lambda *args: ran.append(1) or original(*args))
    model, ids = tiny_model(name).to(dtype), prompts()
    plain = forward(model, ids)
    with Controller(model, KINDS[kind]()) as short:
        tokens, logits = generate(model, ids), forward(model, ids)
        assert short._pass.plain
    with Controller(model, KINDS[kind](), record_magnitudes=True) as general:
        torch.testing.assert_close(forward(model, ids), logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(generate(model, ids), tokens)
        assert not general._pass.plain
    assert not torch.allclose(logits, plain, atol=1e-3)


def test_what_is_prepared_follows_every_change(model: Any) -> None:
    """One attached Controller through other amounts, batch sizes, beams, dtypes and modes equals fresh ones."""
    edits = some("all", 3.0, 0.3)
    control = Controller(model, edits).attach()

    def check(amount: Any, bound: Any, ids: Tensor, **settings: Any) -> None:
        control.using(added=amount, bounded=bound)
        logits, tokens = forward(model, ids), generate(model, ids, **settings)
        twin = copy.deepcopy(plain).to(model.dtype)
        with Controller(twin, some("all", amount, bound)):
            torch.testing.assert_close(logits, forward(twin, ids), atol=0, rtol=0)
            assert torch.equal(tokens, generate(twin, ids, **settings))

    plain = tiny_model("llama")
    check(3.0, 0.3, prompts(2))
    check(3.0, 0.3, prompts(5))
    check([STRONG, -STRONG], 0.3, prompts(2))
    check([STRONG, -STRONG], [0.01, 0.9], prompts(2), num_beams=2)
    check(STRONG, 0.001, prompts(4))
    check([1.0, 2.0, 3.0, 4.0], 1.0, prompts(4))
    check([[1.0], [2.0], [3.0], [4.0]], {2: 0.5, 3: [0.1, 0.2, 0.3, 0.4]}, prompts(4))
    check(torch.linspace(-STRONG, STRONG, 70), 0.3, prompts(70, 4))
    check(torch.linspace(-STRONG, STRONG, 3), 0.3, prompts(3, 4))
    model.to(torch.bfloat16)
    check(-STRONG, 0.3, prompts(3, 4))
    control.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(model: Any, kind: str) -> None:
    """Edits are computed outside autocast: the site reads as without it, given the same states."""
    ids = prompts()
    with torch.autocast("cpu", torch.bfloat16):
        plain = residuals(model, ids)[1]
        with Controller(model, KINDS[kind]()):
            steered = residuals(model, ids)[1]
    sites = [one for one in KINDS[kind]() if 1 in one.layers]
    amounts = [one.read(one.amount).values[:, 0].expand(2) for one in sites]
    expected, _ = edit_site(sites, None, plain, amounts, True, layer=1)
    assert steered.dtype == plain.dtype
    torch.testing.assert_close(steered, expected, atol=1e-4, rtol=1e-4)


def test_packed_sequences_are_refused(model: Any) -> None:
    ids = prompts(1)
    ends = torch.tensor([0, 4, 10], dtype=torch.int32)
    packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6}
    with pytest.raises(AttachError, match="packed"), Controller(model, some()):
        model(ids, **packed)


def test_nothing_given_is_changed(model: Any) -> None:
    """Lists, tensors and interventions are the caller's."""
    amounts, direction = torch.tensor([STRONG, -STRONG]), unit_directions((1,))[1]
    edits = [random_addition((1,), amounts)]
    ids = prompts()
    given = {"input_ids": ids.clone(), "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW}
    with Controller(model, edits) as control:
        model.generate(**given, do_sample=False)
        with control.using(added=[0.0, 1.0]):
            model.generate(**given, do_sample=False)
    assert torch.equal(amounts, torch.tensor([STRONG, -STRONG]))
    assert torch.equal(edits[0].directions[1], direction)  # type: ignore[attr-defined]
    assert len(edits) == 1
    assert list(given) == ["input_ids", "attention_mask", "max_new_tokens"]
    assert torch.equal(given["input_ids"], ids)


def test_a_copy_made_while_attached_is_a_model_of_its_own() -> None:
    model = tiny_model("llama")
    ids, mask = prompts(2), torch.ones(2, 6, dtype=torch.long)
    with Controller(model, random_addition((1,), STRONG)):
        expected = model.generate(ids[:, :6], attention_mask=mask, max_new_tokens=4, do_sample=False)
        twin = copy.deepcopy(model)
        assert torch.equal(twin.generate(ids[:, :6], attention_mask=mask, max_new_tokens=4, do_sample=False), expected)
        with torch.no_grad():
            twin.lm_head.weight.zero_()
        silent = twin.generate(ids[:, :6], attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert not torch.equal(silent, expected)
