"""Conditions, amounts that follow a reading, and schedules: each held against the same amounts given by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_controller import generate
from test_replay import logits, ragged
from tiny import (
    D_MODEL,
    DEPTH,
    MODELS,
    random_addition,
    random_constraint,
    random_erasure,
    random_vector,
    tiny_model,
)
from torch import Tensor

from steerkit import Controller
from steerkit.conditions import Reading, exponential, linear, stop_after
from steerkit.errors import (
    AmountError,
    BaseModelMismatchError,
    ConditionError,
    DependentConceptsError,
    LayerError,
    SamplesError,
)
from steerkit.hooks import continuing, rows_are_samples, unsteered
from steerkit.intervention import Intervention
from steerkit.model import find_decoder

STRONG = 20.0
NEW = 5


def states(model: Any, ids: Tensor, mask: Tensor, layer: int) -> Tensor:
    """Return the plain model's state after a block at each prompt's last real token, every prompt run alone."""
    kept: list[Tensor] = []
    hook = (
        find_decoder(model)
        .blocks[layer]
        .register_forward_hook(
            lambda module, args, out: kept.append((out if isinstance(out, Tensor) else out[0])[:, -1])
        )
    )
    with torch.no_grad():
        for row, real in zip(ids, mask, strict=True):
            model(row[real.bool()][None], use_cache=False)
    hook.remove()
    return torch.cat(kept)


def halving(model: Any, ids: Tensor, mask: Tensor, layer: int = 2, seed: int = 0, **bounds: Any) -> Reading:
    """Return a reading that half of the prompts meet at .5."""
    weight = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    scores = states(model, ids, mask, layer) @ weight
    low, high = scores.sort().values[[len(scores) // 2 - 1, len(scores) // 2]]
    scale = 2.0 / float(high - low)
    return Reading("asks", layer, weight * scale, -float(low + high) / 2 * scale, **bounds)


def by_hand(reading: Reading, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return (states(model, ids, mask, reading.layer) @ reading.weight + reading.bias).sigmoid()


def kinds(model: Any) -> dict[str, tuple[Callable[[Any], Intervention], Any, Any]]:
    """Return by kind: how to make one of an amount, its amount, and the amount that is off."""
    return {
        "addition": (lambda a: random_addition((0, 2), a, name="it"), STRONG, 0.0),
        "bound": (lambda a: random_constraint((1, 3), at_most=a, name="it", positions="all"), 0.05, 1.0),
        "erasure": (lambda a: random_erasure((1, 2), name="it"), 1.0, 0.0),
        "weights": (lambda a: random_vector(model).add(a, name="it"), 1.0, 0.0),
    }


# --- gates


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in MODELS for kind in ("addition", "weights")] + [("llama", "bound"), ("gpt2", "erasure")],
)
def test_a_gate_is_the_amount_for_the_rows_that_meet_it(name: str, kind: str) -> None:
    model = tiny_model(name)
    ids, mask = ragged()
    make, on, off = kinds(model)[kind]
    gate = halving(model, ids, mask, at_least=0.5)
    holds = by_hand(gate, model, ids, mask) >= 0.5
    assert 0 < int(holds.sum()) < len(holds)
    plain = generate(model, ids, mask, max_new_tokens=NEW)
    with Controller(model, [make(on).when(gate)]):
        found = generate(model, ids, mask, max_new_tokens=NEW)
        read = logits(model, ids, mask)
    by_amounts = Controller(model, [make(on)])
    with by_amounts.using(it=torch.where(holds, on, off)):
        wanted = generate(model, ids, mask, max_new_tokens=NEW)
        torch.testing.assert_close(read, logits(model, ids, mask), atol=1e-4, rtol=1e-4)
    assert torch.equal(found, wanted)
    assert torch.equal(found[~holds], plain[~holds])
    assert not torch.equal(found[holds], plain[holds]) or kind in ("bound", "erasure")


@pytest.mark.parametrize("layer", range(DEPTH))
@pytest.mark.parametrize("side", ["left", "right"])
def test_it_reads_the_plain_model_at_the_last_real_token(model: Any, layer: int, side: str) -> None:
    ids, mask = ragged()
    if side == "right":
        ids, mask = (torch.stack([row.roll(-int((~m.bool()).sum())) for row, m in zip(t, mask)]) for t in (ids, mask))
    reading = halving(model, ids, mask, layer)
    loud = random_addition((0,), 0.0, name="loud")
    amounts = by_hand(reading, model, ids, mask)
    with Controller(
        model, [loud, random_addition((3,), reading.scaled(-1.0, 3.0), name="it")], record_magnitudes=True
    ) as control:
        control.using(loud=STRONG)
        model(ids, attention_mask=mask)
        found = control.magnitudes["it"][3]
    torch.testing.assert_close(found, (-1 + 4 * amounts)[:, None] * mask, atol=1e-4, rtol=1e-4)


def test_the_mean_is_over_real_tokens(model: Any) -> None:
    ids, mask = ragged()
    weight = torch.randn(D_MODEL)
    kept: list[Tensor] = []
    hook = find_decoder(model).blocks[1].register_forward_hook(lambda m, a, out: kept.append(out[0].mean(dim=0)))
    with torch.no_grad():
        for row, real in zip(ids, mask, strict=True):
            model(row[real.bool()][None])
    hook.remove()
    wanted = (torch.stack(kept) @ weight / 20).sigmoid()
    reading = Reading("asks", 1, weight / 20, 0.0, read="mean")
    with Controller(model, random_addition((0,), reading.scaled(0, 1), name="it"), record_magnitudes=True) as control:
        model(ids, attention_mask=mask)
        torch.testing.assert_close(control.magnitudes["it"][0].max(dim=1).values, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["addition", "weights"])
def test_a_gate_does_not_depend_on_how_decoding_runs(model: Any, settings: dict[str, Any], kind: str) -> None:
    ids, mask = ragged()
    make, on, off = kinds(model)[kind]
    gate = halving(model, ids, mask, at_most=0.5)
    holds = by_hand(gate, model, ids, mask) <= 0.5
    with Controller(model, [make(on).when(gate)]):
        found = generate(model, ids, mask, max_new_tokens=NEW, **settings)
    with Controller(model, [make(on)]).using(it=torch.where(holds, on, off)):
        assert torch.equal(found, generate(model, ids, mask, max_new_tokens=NEW, **settings))


def test_prompt_lookup_and_embeddings(model: Any) -> None:
    ids, mask = ragged()
    gate = halving(model, ids, mask, at_least=0.5)
    holds = by_hand(gate, model, ids, mask) >= 0.5
    control = Controller(model, [random_addition((1,), STRONG, name="it").when(gate)], record_magnitudes=True)
    for row in range(len(ids)):
        one = ids[row][mask[row].bool()][None]
        with control:
            generate(model, one, max_new_tokens=NEW, prompt_lookup_num_tokens=2)
            assert bool(control.magnitudes["it"][1].any()) == bool(holds[row])
    with control:
        model.generate(
            inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, max_new_tokens=2, do_sample=False
        )
        assert torch.equal(control.magnitudes["it"][1].any(dim=1), holds)


def test_a_decision_is_latched(model: Any) -> None:
    """Passes that continue a cache keep to what its prompts decided; a new prompt is read anew."""
    ids, mask = torch.randint(3, 99, (4, 6)), torch.ones(4, 6, dtype=torch.long)
    gate = halving(model, ids, mask, at_least=0.5)
    holds = by_hand(gate, model, ids, mask) >= 0.5
    with Controller(model, random_addition((1,), STRONG, name="it").when(gate), record_magnitudes=True) as control:
        out = model(ids, use_cache=True)
        for _ in range(2):
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        assert torch.equal(control.magnitudes["it"][1] != 0, holds[:, None].expand(4, 8))
        model(ids.flip(0))
        assert torch.equal((control.magnitudes["it"][1] != 0).any(dim=1), holds.flip(0))


def test_a_pass_that_continues_what_nobody_read(model: Any) -> None:
    ids, mask = ragged()
    gate = halving(model, ids, mask, at_least=0.5)
    cache = model(ids, use_cache=True).past_key_values
    with Controller(model, random_addition((1,), STRONG).when(gate)):
        with pytest.raises(ConditionError, match="Start at the first token"):
            model(ids[:, :1], past_key_values=cache)
        model(ids)
        with pytest.raises(SamplesError, match="decided for 4 prompts but the batch has 2"):
            model(ids[:2, :1], past_key_values=model(ids, use_cache=True).past_key_values)


def test_combinations_follow_logic(model: Any) -> None:
    ids, mask = ragged()
    a, b = (halving(model, ids, mask, layer, seed, at_least=0.5) for layer, seed in ((1, 3), (3, 5)))
    on_a, on_b = (by_hand(each, model, ids, mask) >= 0.5 for each in (a, b))
    wanted = {a & b: on_a & on_b, a | b: on_a | on_b, ~a: ~on_a, ~(a & ~b) | (b & a): ~(on_a & ~on_b) | (on_b & on_a)}
    for gate, holds in wanted.items():
        with Controller(model, random_addition((1,), STRONG, name="it").when(gate), record_magnitudes=True) as control:
            model(ids, attention_mask=mask)
            assert torch.equal((control.magnitudes["it"][1] != 0).any(dim=1), holds), gate
    with Controller(
        model, random_addition((1,), STRONG, name="it").when(a).when(~b), record_magnitudes=True
    ) as control:
        model(ids, attention_mask=mask)
        assert torch.equal((control.magnitudes["it"][1] != 0).any(dim=1), on_a & ~on_b)
    assert repr(~(a & b)) == "~(0.5 <= P(asks, layer 1) & 0.5 <= P(asks, layer 3))"


def test_per_sample_amounts_gate_and_other_interventions(model: Any) -> None:
    ids, mask = ragged()
    gate = halving(model, ids, mask, at_least=0.5)
    holds = by_hand(gate, model, ids, mask) >= 0.5
    amounts = torch.tensor([1.0, 2.0, 3.0, 4.0])
    edits = [
        random_addition((1, 2), amounts, name="gated").when(gate),
        random_addition((1,), 5.0, name="free", seed=4),
        random_vector(model).add(gate.scaled(0, 1), name="follows"),
    ]
    with Controller(model, edits, record_magnitudes=True) as control:
        model(ids, attention_mask=mask)
        found = control.magnitudes
    last = mask.argmax(dim=1)
    row = torch.arange(4)
    torch.testing.assert_close(found["gated"][2][row, last], amounts * holds)
    torch.testing.assert_close(found["free"][1][row, last], torch.full((4,), 5.0))
    torch.testing.assert_close(found["follows"][0][row, last], by_hand(gate, model, ids, mask), atol=1e-4, rtol=1e-4)


def test_replays_and_parts_decide_alike(model: Any) -> None:
    ids, mask = ragged()
    gate = halving(model, ids, mask, at_least=0.5)
    edit = random_addition((1,), torch.tensor([10.0, 20.0, 30.0, 40.0]), name="it").when(gate)
    holds = by_hand(gate, model, ids, mask) >= 0.5
    with Controller(model, [edit], record_magnitudes=True) as control:
        whole = torch.cat([ids, generate(model, ids, mask, max_new_tokens=NEW)], dim=1)
        wide = torch.cat([mask, torch.ones(4, NEW, dtype=torch.long)], dim=1)
        kept = control.magnitudes["it"][1]
        with continuing(model, mask):
            logits(model, whole, wide)
            assert torch.equal(control.magnitudes["it"][1][:, :-1], kept)
        with continuing(model, mask):
            twice = whole.repeat_interleave(2, dim=0)
            logits(model, twice, wide.repeat_interleave(2, dim=0))
            assert torch.equal(control.magnitudes["it"][1][::2, :-1], kept)
        rows = [3, 1]
        with rows_are_samples(model, rows, 4):
            part = generate(model, ids[rows], mask[rows], max_new_tokens=NEW)
        assert torch.equal(part, whole[rows, ids.shape[1] :])
        assert torch.equal((kept != 0).any(dim=1), holds)


def test_pausing_and_nesting(model: Any) -> None:
    ids, mask = ragged()
    gate = halving(model, ids, mask, at_least=0.5)
    holds = by_hand(gate, model, ids, mask) >= 0.5
    plain = logits(model, ids, mask)
    inner = random_addition((2,), STRONG, name="inner", seed=5).when(~gate)
    with Controller(model, random_addition((1,), STRONG, name="outer").when(gate)):
        outer = logits(model, ids, mask)
        with Controller(model, [inner]):
            both = logits(model, ids, mask)
            with unsteered(model):
                assert torch.equal(logits(model, ids, mask), plain)
            assert torch.equal(logits(model, ids, mask), both)
        assert torch.equal(logits(model, ids, mask), outer)
    assert torch.equal(logits(model, ids, mask), plain)
    real = mask.bool()
    for found, changed in ((outer, holds), (both, torch.ones_like(holds))):
        differs = torch.stack([(f[m] != p[m]).any() for f, p, m in zip(found, plain, real, strict=True)])
        assert torch.equal(differs, changed)


def test_using_with_a_reading(model: Any) -> None:
    ids, mask = ragged()
    reading = halving(model, ids, mask)
    amounts = by_hand(reading, model, ids, mask)
    control = Controller(model, random_addition((1,), 1.0, name="it"), record_magnitudes=True)
    last = mask.argmax(dim=1)
    with control:
        with control.using(it=reading.scaled(0, 2)):
            model(ids, attention_mask=mask)
            found = control.magnitudes["it"][1][torch.arange(4), last]
            torch.testing.assert_close(found, 2 * amounts, atol=1e-4, rtol=1e-4)
        model(ids, attention_mask=mask)
        torch.testing.assert_close(control.magnitudes["it"][1][torch.arange(4), last], torch.ones(4))


def test_a_bound_may_follow_a_reading(model: Any) -> None:
    ids, mask = ragged()
    reading = halving(model, ids, mask)
    wanted = 0.2 + 0.6 * by_hand(reading, model, ids, mask)
    bound = random_constraint((2,), at_least=0.5, positions="last")
    with Controller(model, [bound]).using(**{bound.name: reading.scaled(0.2, 0.8)}):
        gated = logits(model, ids, mask)
    with Controller(model, [bound]).using(**{bound.name: wanted}):
        torch.testing.assert_close(gated, logits(model, ids, mask), atol=1e-3, rtol=1e-3)


# --- schedules


@pytest.mark.parametrize(
    ("name", "positions"), [(name, "all") for name in MODELS] + [("llama", "last"), ("gpt2", "generated")]
)
def test_a_schedule_is_what_is_left_at_each_step(name: str, positions: Any) -> None:
    model = tiny_model(name)
    ids, mask = ragged()
    width = ids.shape[1]
    steps = (torch.arange(width + NEW - 1) - (width - 1)).clamp(min=0)
    schedules = {
        stop_after(2): (steps < 2).float(),
        linear(1.0, -1.0, over=4): 1 - 2 * (steps / 4).clamp(max=1),
        exponential(half_life=2): 0.5 ** (steps / 2),
    }
    for schedule, left in schedules.items():
        edits = [
            random_addition((1,), STRONG, name="it", positions=positions).scheduled(schedule),
            random_vector(model).add(0.5, name="weights", positions=positions).scheduled(schedule),
        ]
        with Controller(model, edits, record_magnitudes=True) as control:
            recorded = generate(model, ids, mask, max_new_tokens=NEW)
            found = control.magnitudes
        wide = torch.cat([mask, torch.ones(len(ids), NEW - 1, dtype=torch.long)], dim=1)
        place = {"all": wide, "generated": torch.arange(wide.shape[1]) >= width}
        here = place.get(positions, torch.arange(wide.shape[1]) >= width - 1) * torch.ones_like(wide)
        torch.testing.assert_close(found["it"][1], STRONG * left * here)
        torch.testing.assert_close(found["weights"][1], 0.5 * left * here)
        with Controller(model, edits) as control:
            cached = generate(model, ids, mask, max_new_tokens=NEW)
            assert torch.equal(cached, recorded)
            assert torch.equal(cached, generate(model, ids, mask, max_new_tokens=NEW, use_cache=False))
            if name != "mamba":
                wide = torch.cat([mask, torch.ones(len(ids), NEW, dtype=torch.long)], dim=1)
                with continuing(model, mask):
                    replayed = logits(model, torch.cat([ids, cached], dim=1), wide)[:, width - 1 : -1].argmax(dim=-1)
                assert torch.equal(replayed, cached)


@pytest.mark.parametrize("make", [random_constraint, random_erasure])
def test_a_bound_stops(model: Any, make: Callable[..., Intervention]) -> None:
    ids, mask = ragged()
    settings = {"at_most": 1e-4} if make is random_constraint else {}
    edit = make((1, 2), positions="all", name="it", **settings).scheduled(stop_after(2))
    with Controller(model, [edit], record_magnitudes=True) as control:
        generate(model, ids, mask, max_new_tokens=NEW)
        found = control.magnitudes["it"][1]
    width = ids.shape[1]
    assert bool((found[:, width - 1 : width + 1] != 0).any())
    assert not bool(found[:, width + 1 :].any())


def test_a_bare_pass_is_all_prompt(model: Any) -> None:
    ids, mask = ragged()
    edit = random_addition((1,), STRONG)
    with Controller(model, [edit]):
        wanted = logits(model, ids, mask)
    with Controller(model, [edit.scheduled(exponential(half_life=1))]):
        assert torch.equal(logits(model, ids, mask), wanted)


def test_a_schedule_that_has_not_begun_reaches_nothing(model: Any) -> None:
    from steerkit.errors import NotReachedError

    ids, mask = ragged()
    with pytest.raises(NotReachedError), Controller(model, random_addition((1,), 1.0).scheduled(linear(0, 1, over=3))):
        logits(model, ids, mask)


@pytest.mark.parametrize("schedule", [stop_after(1), linear(1.0, 0.0, over=1)], ids=str)
def test_a_schedule_that_ends_before_its_positions_begin_is_refused(schedule: Any) -> None:
    with pytest.raises(ConditionError, match="leave something"):
        random_addition((1,), STRONG, positions="generated").scheduled(schedule)


def test_a_decoding_loop_of_ones_own_has_no_steps(model: Any) -> None:
    ids, _ = ragged()
    edit = random_addition((1,), STRONG, positions="last").scheduled(stop_after(2))
    with torch.no_grad(), Controller(model, [edit]):
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(ConditionError, match="outside generate"):
            model(ids[:, -1:], past_key_values=cache)


def test_opposite_bounds_under_opposite_conditions(model: Any) -> None:
    ids, mask = ragged()
    gate = halving(model, ids, mask, at_least=0.5)
    up, down = (
        random_constraint((1,), **bound, name=name)
        for name, bound in (("up", {"at_least": 0.9}), ("down", {"at_most": 0.1}))
    )
    with Controller(model, [up.when(gate), down.when(~gate)], record_magnitudes=True) as control:
        logits(model, ids, mask)
        acted = [control.magnitudes[name][1].abs().sum(dim=1) > 0 for name in ("up", "down")]
    assert not bool((acted[0] & acted[1]).any())
    assert bool(acted[0].any())
    assert bool(acted[1].any())
    with pytest.raises(DependentConceptsError, match="contradict"), Controller(model, [up.when(gate), down.when(gate)]):
        logits(model, ids, mask)


def test_a_reading_of_nan_decides_nothing(model: Any) -> None:
    ids, mask = ragged()
    gate = halving(model, ids, mask, at_least=0.5)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(ConditionError, match="NaN"), Controller(model, [random_addition((1,), STRONG).when(~gate)]):
        logits(model, ids, mask)


def test_conditions_and_schedules_together_and_in_the_head(model: Any) -> None:
    ids, mask = ragged()
    gate = halving(model, ids, mask, at_least=0.5)
    holds = by_hand(gate, model, ids, mask) >= 0.5
    vector = random_vector(model)
    edit = vector.add(1.0, name="it").when(gate).scheduled(stop_after(1))
    with Controller(model, [edit], record_magnitudes=True) as control:
        generate(model, ids, mask, max_new_tokens=3)
        found = control.magnitudes["it"][0]
    width = ids.shape[1]
    assert torch.equal(found[:, width - 1] != 0, holds)
    assert not bool(found[:, width:].any())


def test_beams_and_sampling_keep_the_schedule(model: Any) -> None:
    ids, mask = ragged()
    edit = random_addition((1,), STRONG, name="it").scheduled(stop_after(2))
    with Controller(model, [edit]):
        beams = generate(model, ids, mask, max_new_tokens=NEW, num_beams=3)
        assert torch.equal(beams, generate(model, ids, mask, max_new_tokens=NEW, num_beams=3, use_cache=False))
        chunks = generate(model, ids, mask, max_new_tokens=NEW, prefill_chunk_size=3)
        static = generate(model, ids, mask, max_new_tokens=NEW, cache_implementation="static", disable_compile=True)
        whole = generate(model, ids, mask, max_new_tokens=NEW)
    assert torch.equal(chunks, whole)
    assert torch.equal(static, whole)


# --- compiled


def test_compiled_generation(model: Any) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    del model.model.layers[2:]  # tracing costs a second a block
    model.config.num_hidden_layers = 2
    torch._dynamo.reset()
    ids, mask = ragged()
    gate = halving(model, ids, mask, layer=1, at_least=0.5)
    edits = [
        random_addition((0,), STRONG, name="it").when(gate),
        random_addition((1,), STRONG, name="fading", seed=3).scheduled(exponential(half_life=2)),
        random_constraint((1,), at_most=0.05, name="bound").when(~gate).scheduled(stop_after(2)),
    ]
    with Controller(model, edits):
        wanted = generate(model, ids, mask, max_new_tokens=NEW)
        mirrored = generate(model, ids.flip(0), mask.flip(0), max_new_tokens=NEW)
    counter = CompileCounterWithBackend("eager")
    plain = model.forward
    with Controller(model, edits):
        model.forward = torch.compile(plain, backend=counter, dynamic=True)
        assert torch.equal(generate(model, ids, mask, max_new_tokens=NEW), wanted)
        compiled = counter.frame_count
        assert torch.equal(generate(model, ids.flip(0), mask.flip(0), max_new_tokens=NEW), mirrored)
        assert counter.frame_count == compiled
        model.forward = plain
    torch._dynamo.reset()


def test_a_compiled_bare_pass_is_refused(model: Any) -> None:
    torch._dynamo.reset()
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    ids, mask = ragged()
    gate = halving(model, ids, mask, layer=1, at_least=0.5)
    control = Controller(model, random_addition((0,), STRONG).when(gate)).attach()
    try:
        with pytest.raises(Exception, match="cannot run one"):
            torch.compile(model, backend="eager")(ids, attention_mask=mask)
        model(ids)
    finally:
        control.detach()
        torch._dynamo.reset()


# --- refused


def test_what_decides_nothing_is_refused(model: Any) -> None:
    weight = torch.randn(D_MODEL)
    reading = Reading("asks", 1, weight, 0.0)
    edit = random_addition((1,), 1.0)
    for bounds in (
        {"at_least": 0.0},
        {"at_most": 1.0},
        {"at_least": 0.7, "at_most": 0.3},
        {"at_least": 1.5},
        {"at_most": "x"},
    ):
        with pytest.raises(ConditionError):
            Reading("asks", 1, weight, 0.0, **bounds)  # type: ignore[arg-type]
    for bad in (reading, True, 0.5, None, lambda: True):
        with pytest.raises(ConditionError):
            edit.when(bad)  # type: ignore[arg-type]
    gate = Reading("asks", 1, weight, 0.0, at_least=0.5)
    with pytest.raises(ConditionError, match="Combine conditions"):
        bool(gate and gate)
    for combine in (lambda: gate & reading, lambda: reading | gate, lambda: ~reading):
        with pytest.raises(ConditionError, match="needs a bound"):
            combine()
    for ends in ((1, 1), (0, float("nan")), ("a", 1), (True, 2)):
        with pytest.raises(ConditionError):
            reading.scaled(*ends)
    for wrong in (
        lambda: stop_after(0),
        lambda: stop_after(2.5),
        lambda: linear(1, 1, over=3),
        lambda: linear(1, 0, over=0),
    ):  # type: ignore[arg-type]
        with pytest.raises(ConditionError):
            wrong()
    for half in (0, -1, float("inf"), "long"):
        with pytest.raises(ConditionError):
            exponential(half_life=half)  # type: ignore[arg-type]
    with pytest.raises(ConditionError, match="would change nothing"):
        random_addition((1,), 1.0, positions="prompt").scheduled(stop_after(3))
    with pytest.raises(ConditionError, match="one schedule"):
        edit.scheduled(stop_after(3)).scheduled(stop_after(2))
    with pytest.raises(ConditionError, match="A schedule is required"):
        edit.scheduled(3)  # type: ignore[arg-type]
    for whole in (random_constraint((1,), at_most=0.5), random_erasure((1,))):
        with pytest.raises(ConditionError, match="holds or does not"):
            whole.scheduled(exponential(half_life=3))
    with pytest.raises(AmountError, match="An erasure is on"):
        Controller(model, random_erasure((1,), name="it")).using(it=reading.scaled(0, 1))
    with pytest.raises(AmountError, match="must be a probability"):
        Controller(model, random_constraint((1,), at_most=0.5, name="it")).using(it=reading.scaled(0.5, 2))


def test_readings_of_another_model_are_refused(model: Any) -> None:
    edit = random_addition((1,), 1.0, name="it")
    deep = Reading("asks", DEPTH, torch.randn(D_MODEL), 0.0, at_least=0.5)
    wide = Reading("asks", 1, torch.randn(D_MODEL + 1), 0.0, at_least=0.5)
    with pytest.raises(LayerError):
        Controller(model, edit.when(deep))
    with pytest.raises(BaseModelMismatchError):
        Controller(model, edit.when(wide))
    with pytest.raises(LayerError):
        Controller(model, edit).using(it=deep.scaled(0, 1))


def test_what_is_written_into_weights_cannot_follow_a_prompt(model: Any) -> None:
    vector = random_vector(model)
    gate = Reading("asks", 1, torch.randn(D_MODEL), 0.0, at_least=0.5)
    for edit in (vector.add(1.0).when(gate), vector.add(gate.scaled(0, 1)), vector.add(1.0).scheduled(stop_after(2))):
        with pytest.raises(AmountError, match="written into"):
            Controller(model, [edit], fold=True)


def test_nothing_is_left_behind(model: Any) -> None:
    ids, mask = ragged()
    before = set(model.__dict__)
    gate = halving(model, ids, mask, at_least=0.5)
    with Controller(model, random_addition((1,), STRONG).when(gate).scheduled(stop_after(2))):
        generate(model, ids, mask, max_new_tokens=3)
    assert set(model.__dict__) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- from a concept


def test_a_concept_reads(model: Any, tokenizer: Any) -> None:
    """What `reads` makes is the concept's own probe, read where its texts were read."""
    from steerkit import Concept, record

    positive, negative = ([f"w{i} w{i + 9} {end}" for i in range(12)] for end in ("w90 w91", "w92"))
    for read in ("last", "mean"):
        concept = Concept.fit("kind", model, tokenizer, positive=positive, negative=negative, read=read)
        reading = concept.reads(at_least=0.5, layer=-1)
        assert (reading.layer, reading.read) == (DEPTH - 1, read)
        assert concept.reads().layer == concept.best_layer
        texts = [positive[0], negative[3]]
        wanted = concept[-1].probability(record(model, tokenizer, texts, read=read)[-1])
        inputs = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
        for ids, p in zip(inputs, wanted, strict=True):
            edit = random_addition((0,), reading.scaled(0, 1), name="it")
            with Controller(model, [edit], record_magnitudes=True) as control:
                model(ids)
                assert float(control.magnitudes["it"][0].max()) == pytest.approx(float(p), abs=1e-4)
    with pytest.raises(LayerError):
        concept.reads(layer=DEPTH)
