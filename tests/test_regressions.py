"""Cases that a review found, one for each way in which something could go wrong without a word."""

import gc
import weakref

import pytest
import torch
from tiny import (
    D_MODEL,
    random_addition,
    random_constraint,
    random_erasure,
    tiny_model,
    tiny_tokenizer,
    unit_directions,
)

from steerkit import Controller, record
from steerkit.errors import AttachError, NotReachedError
from steerkit.hooks import Moment
from steerkit.intervention import Constraint, Erasure, SiteEdit, edit_site
from steerkit.maths.minimal_edit import minimal_edit
from steerkit.model import Fingerprint

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def test_a_cap_releases_its_own_bound_and_no_other() -> None:
    erased = torch.nn.functional.normalize(torch.tensor([1.0, 0.0, 0.0, 0.0]), dim=0)
    near = torch.nn.functional.normalize(torch.tensor([0.8, 0.6, 0.0, 0.0]), dim=0)
    edits = [
        Erasure("e", (0,), "all", 1.0, None, directions={0: erased}),
        Constraint(
            "c",
            (0,),
            "all",
            0.99,
            None,
            sense=1,
            weights={0: near},
            biases={0: 0.0},
            directions={0: near},
            max_magnitude=0.1,
        ),
    ]
    hidden = torch.tensor([[[1.0, -1.0, 0.5, 0.5]]])
    amounts = [each.read(each.amount).values[:, 0] for each in edits]
    after, magnitudes = SiteEdit(edits, 0).edit(hidden, amounts, [True, True])
    assert abs(float(after[0, 0] @ erased)) < 1e-6
    assert magnitudes[1] is not None
    assert float(magnitudes[1]) == pytest.approx(0.1 * float(hidden.norm()), rel=1e-5)


@pytest.mark.parametrize(("count", "cosine"), [(8, 0.97), (10, 0.93), (11, 0.99)])
def test_many_probes_that_are_alike_are_met_all(count: int, cosine: float) -> None:
    gram = torch.full((count, count), cosine, dtype=torch.float64).fill_diagonal_(1.0)
    weight = torch.linalg.cholesky(gram)
    hidden = torch.randn(20, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logit = torch.linspace(-2, 2, count, dtype=torch.float64)
    sense = torch.tensor([1.0, -1.0] * count)[:count]
    moved = hidden + minimal_edit(hidden, weight, torch.zeros(count, dtype=torch.float64), logit, sense)
    assert float((sense * (moved @ weight.T - logit)).min()) > -1e-7


def test_amounts_by_negative_layer_in_using() -> None:
    model = tiny_model("llama")
    with Controller(model, random_addition((3,), 0.0)) as control:
        control.using(added={-1: 5.0})
        steered = model(IDS).logits
    with Controller(model, random_addition((3,), 5.0)):
        assert torch.equal(model(IDS).logits, steered)


def test_recordings_count_layers_from_the_end() -> None:
    recorded = record(tiny_model("llama"), tiny_tokenizer(), ["w1 w2"], layers=-1)
    assert torch.equal(recorded[-1], recorded[3])


def test_a_site_of_interventions_that_share_one_layer_needs_no_name() -> None:
    added = random_addition((2,), 3.0)
    hidden = torch.zeros(1, 2, D_MODEL)
    after, state = edit_site([added], None, hidden, [torch.tensor([3.0])], True, "kept")
    assert torch.allclose(after, (3.0 * unit_directions((2,))[2]).expand_as(after))
    assert state == "kept"


def test_a_mask_as_wide_as_a_static_cache_hides_nothing() -> None:
    wide = torch.ones(2, 4, dtype=torch.long)
    mask = torch.cat([wide, torch.zeros(2, 6, dtype=torch.long)], dim=1)
    moment = Moment(2, 4, 0, torch.device("cpu"), mask, None)
    assert bool(moment.where("all").all())  # type: ignore[union-attr]
    moment = Moment(2, 4, torch.tensor(0), torch.device("cpu"), mask, None)
    assert bool(moment.where("all").all())  # type: ignore[union-attr]


def test_recording_in_training_mode_reads_without_dropout_and_leaves_the_mode() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5))
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    first, again = (record(model, tiny_tokenizer(), ["w1 w2 w3"])[1] for _ in range(2))
    assert torch.equal(first, again)
    assert [module.training for module in model.modules()] == before


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_of_any_kind_leave_the_fingerprint_of_their_base() -> None:
    import peft

    plain = Fingerprint.of(tiny_model("llama"))
    for config in (
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        peft.LoKrConfig(target_modules=["q_proj", "down_proj"]),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ):
        plain.check(Fingerprint.of(peft.get_peft_model(tiny_model("llama"), config)), "it")


def test_a_model_that_was_dropped_while_attached_is_freed() -> None:
    model = tiny_model("llama")
    Controller(model, random_addition((1,))).attach()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_guidance_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(AttachError, match="guidance_scale"), Controller(model, random_addition((1,))):
        model.generate(IDS, guidance_scale=1.5, max_new_tokens=2)


def detached_by_hand(control: Controller) -> None:
    with control:
        with pytest.raises(NotReachedError):
            control.detach()
        raise KeyError("mine")


def test_detaching_by_hand_inside_with_hides_no_error() -> None:
    with pytest.raises(KeyError, match="mine"):
        detached_by_hand(Controller(tiny_model("llama"), [random_erasure((1,)), random_constraint((2,))]))
