"""What evaluation asks of hooks: a replay edits as generation did, a batch may hold a part, and pausing is the plain model."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import MODELS, VOCABULARY, random_addition, random_constraint, random_erasure, random_vector, tiny_model
from torch import Tensor

from steerkit import Controller
from steerkit.errors import NotReachedError, SamplesError
from steerkit.hooks import continuing, rows_are_samples, unsteered
from steerkit.types import POSITIONS

NEW = 5
LENGTHS = (7, 3, 5, 7)


def ragged() -> tuple[Tensor, Tensor]:
    """Left-padded prompts and their mask."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, -length:] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, -length:] = 1
    return ids, mask


def logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    places = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        places = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False, **places).logits


def generated(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sequences and the logits that chose their new tokens, `"row pos vocabulary"`."""
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return out.sequences, torch.stack(out.logits, dim=1)


AMOUNTS = torch.tensor([0.0, 6.0, -6.0, 3.0])
BOUNDS = torch.tensor([0.0, 0.99, 0.5, 0.999])


def interventions(model: Any, positions: Any, amounts: Tensor = AMOUNTS, bounds: Tensor = BOUNDS) -> list[Any]:
    return [
        random_addition(layers=(0, 2), magnitude=amounts, positions=positions, name="add"),
        random_constraint(layers=(1, 3), at_least=bounds, positions=positions, name="bound"),
        random_vector(model).add(amounts / 20),
    ]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mamba"])  # its state runs through padding
def test_a_replay_equals_cached_generation(name: str, positions: str) -> None:
    model = tiny_model(name)
    ids, mask = ragged()
    with Controller(model, interventions(model, positions)):
        rows, wanted = generated(model, ids, mask)
        whole = torch.cat([mask, torch.ones(len(rows), NEW, dtype=torch.long)], dim=1)
        with continuing(model, mask):
            found = logits(model, rows, whole)[:, -NEW - 1 : -1]
    assert torch.allclose(found, wanted, atol=2e-3, rtol=1e-4)
    plain = logits(model, rows, whole)[:, -NEW - 1 : -1]
    # the first prompt is off, and the first token of the others is not edited at generated positions
    assert torch.allclose(plain[0], found[0], atol=2e-3, rtol=1e-4)
    if positions != "generated":
        assert bool(((plain - found)[1:].abs().amax(dim=(1, 2)) > 0.1).all())


@pytest.mark.parametrize("more", [{}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}])
def test_a_part_of_the_prompts_takes_its_own_amounts(model: Any, more: dict[str, Any]) -> None:
    ids, mask = ragged()
    settings = {"max_new_tokens": NEW, **more}
    with Controller(model, interventions(model, "last")) as control:
        parts = []
        for part in ([2, 0], [3, 1], [0, 2]):
            torch.manual_seed(0)
            with rows_are_samples(model, part, len(ids)):
                parts.append(model.generate(ids[part], attention_mask=mask[part], **settings))
        with pytest.raises(SamplesError, match="4 samples but the batch has 2"):
            model.generate(ids[:2], attention_mask=mask[:2], **settings)
        alone = []
        for part in ([2, 0], [3, 1], [0, 2]):
            torch.manual_seed(0)
            with control.using(add=AMOUNTS[part], bound=BOUNDS[part], helpful=AMOUNTS[part] / 20):
                alone.append(model.generate(ids[part], attention_mask=mask[part], **settings))
    assert all(torch.equal(a, b) for a, b in zip(parts, alone, strict=True))
    assert not torch.equal(parts[0][0], parts[2][0])


def kinds(model: Any) -> dict[str, Callable[[], list[Controller]]]:
    """Controllers that are attached one within the other."""
    vector = random_vector(model)
    return {
        "edits": lambda: [
            Controller(
                model, [random_addition(layers=(1,), magnitude=5.0), random_erasure(layers=(2,)), vector.add(0.3)]
            )
        ],
        "written": lambda: [Controller(model, [vector.add(0.3)], fold=True)],
        "nested": lambda: [
            Controller(model, [vector.add(0.3)], fold=True),
            Controller(model, [random_addition(layers=(1,), magnitude=5.0)]),
            Controller(model, [(0.5 * vector).add(0.3)], fold=True),
        ],
    }


@pytest.mark.parametrize("kind", ["edits", "written", "nested"])
def test_pausing_gives_the_plain_model_and_then_the_steered_one(model: Any, kind: str) -> None:
    ids, mask = ragged()
    plain = logits(model, ids, mask)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    controls = kinds(model)[kind]()
    for control in controls:
        control.attach()
    steered = logits(model, ids, mask)
    written = {name: value.clone() for name, value in model.state_dict().items()}
    assert not torch.equal(steered, plain)
    for failing in (False, True):
        try:
            with unsteered(model):
                assert torch.equal(logits(model, ids, mask), plain)
                # any number of rows, whatever the amounts are for
                assert torch.equal(model.generate(ids[:1], max_new_tokens=2), model.generate(ids[:1], max_new_tokens=2))
                assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
                if failing:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert torch.equal(logits(model, ids, mask), steered)
        assert all(torch.equal(value, written[name]) for name, value in model.state_dict().items())
    for control in reversed(controls):
        control.detach()
    assert torch.equal(logits(model, ids, mask), plain)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_paused_passes_are_neither_recorded_nor_counted(model: Any) -> None:
    ids, mask = ragged()
    with Controller(model, [random_addition(layers=(1,), magnitude=AMOUNTS)], record_magnitudes=True) as control:
        logits(model, ids, mask)
        before = control.magnitudes
        with unsteered(model):
            logits(model, ids[:2], mask[:2])
        after = control.magnitudes
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n][k], after[n][k]) for n in before for k in before[n])
    with (
        pytest.raises(NotReachedError, match="no forward pass ran"),
        Controller(model, [random_addition()]),
        unsteered(model),
    ):
        logits(model, ids, mask)


def test_without_a_controller_all_three_are_nothing(model: Any) -> None:
    ids, mask = ragged()
    plain = logits(model, ids, mask)
    with unsteered(model), continuing(model, mask), rows_are_samples(model, [0], 9):
        assert torch.equal(logits(model, ids, mask), plain)
    assert not hasattr(model, "_steerkit_clock")
