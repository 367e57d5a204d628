"""nnsight traces: what is read is what the next module reads, and what is set is what a Controller would have done."""

# ruff: noqa: PT012 - the body of a trace is what raises, and it runs at the end of its `with`

import copy
import gc
import runpy
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

nnsight = pytest.importorskip("nnsight")

from tiny import (  # noqa: E402
    D_MODEL,
    random_addition,
    random_constraint,
    random_erasure,
    random_vector,
    tiny_model,
    tiny_tokenizer,
)

from steerkit import Concept, Controller, record  # noqa: E402
from steerkit.conditions import Reading, stop_after  # noqa: E402
from steerkit.errors import (  # noqa: E402
    AmountError,
    AttachError,
    BaseModelMismatchError,
    ConditionError,
    LayerError,
    MissingDependencyError,
    NotReachedError,
    SamplesError,
    SteerkitError,
    TextsError,
    UnsupportedModelError,
)
from steerkit.integrations.nnsight import activations, residual, steer  # noqa: E402
from steerkit.model import find_decoder  # noqa: E402

ARCHITECTURES = ["llama", "gpt2", "gpt_neox"]
PROMPTS = ["w3 w4 w5 w6", "w7", "w8 w9"]
TEXTS = ["w3 w4", "w5 w13 w14", "w3 w4", "w10", "w6 w7 w8 w9"]


def wrapped(name: str = "llama") -> Any:
    return nnsight.TransformersModel(tiny_model(name), tokenizer=tiny_tokenizer(pad=True), task="text-generation")


@pytest.fixture(params=ARCHITECTURES)
def lm(request: pytest.FixtureRequest) -> Any:
    return wrapped(request.param)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def logits(lm: Any, prompts: Any = PROMPTS) -> torch.Tensor:
    with lm.trace(prompts):
        found = nnsight.save(lm.output.logits)
    return found  # noqa: RET504 - a trace hands it out at its end


def mixed(positions: str = "all") -> list[Any]:
    """One of each kind in the residual stream, two layers, three of them at one site, an amount for each sample."""
    return [
        random_addition((1, 2), [0.0, 2.0, 4.0], positions=positions, seed=1),
        random_erasure((2,), [1.0, 0.0, 1.0], positions=positions, seed=2),
        random_constraint((2,), at_most=[1.0, 0.2, 0.01], positions=positions, seed=3),
    ]


def traces(model: torch.nn.Module) -> list[Any]:
    """Everything that a hook could be left in."""
    return [(len(m._forward_hooks), len(m._forward_pre_hooks), set(m.__dict__)) for m in model.modules()]


# Reading


def test_the_residual_stream_is_what_the_next_module_reads(lm: Any) -> None:
    with lm.trace(PROMPTS):
        read = nnsight.save([residual(lm, layer) for layer in (0, 1, 2, -1)])
    with lm.trace(PROMPTS, output_hidden_states=True):
        states = nnsight.save(lm.output.hidden_states)
    for layer in range(3):
        assert torch.equal(read[layer], states[layer + 1])
    assert read[-1].shape == (3, 4, D_MODEL)
    norm = find_decoder(lm).owner.get_submodule("norm" if hasattr(find_decoder(lm).owner, "norm") else _norm(lm))
    assert torch.allclose(norm(read[-1]), states[-1], atol=1e-6)


def _norm(lm: Any) -> str:
    return {"GPT2LMHeadModel": "ln_f", "GPTNeoXForCausalLM": "final_layer_norm"}[type(lm._module).__name__]


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "opt", "bloom", "falcon", "mixtral", "mamba"])
def test_the_reader_of_the_last_block_is_found_by_looking(name: str) -> None:
    lm = wrapped(name)
    seen = []
    handle = find_decoder(lm).blocks[-1].register_forward_hook(lambda m, a, out: seen.append(out))
    with lm.trace(PROMPTS):
        read = nnsight.save(residual(lm, -1))
    handle.remove()
    out = seen[-1]
    assert torch.equal(read, out if isinstance(out, torch.Tensor) else out[0])


def test_a_controller_is_seen_in_the_residual_stream_and_not_at_the_block(lm: Any) -> None:
    blocks = [lm.interleaver.envoys[id(block)] for block in find_decoder(lm).blocks]
    edit = random_addition((1, 3), 4.0)
    with lm.trace(PROMPTS):
        before = nnsight.save(residual(lm, 1))
    with Controller(lm, [edit]), lm.trace(PROMPTS):
        blind = nnsight.save(blocks[1].output)
        after = nnsight.save(residual(lm, 1))
        block = nnsight.save(blocks[3].output)
        last = nnsight.save(residual(lm, 3))
    assert torch.equal(blind, before)
    real = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]])[..., None]
    assert torch.allclose(after, before + real * 4.0 * edit.directions[1], atol=1e-5)
    assert torch.allclose(last, block + real * 4.0 * edit.directions[3], atol=1e-5)


def test_the_look_disturbs_no_pass_that_is_under_way() -> None:
    lm = wrapped()
    edits = [random_addition((1, 3), [0.0, 2.0, 4.0]), random_constraint((2,), positions="last")]
    with Controller(lm._module, edits), lm.trace(PROMPTS):
        early = nnsight.save(residual(lm, 3))
        known = nnsight.save(lm.output.logits)
    fresh = wrapped()
    left = traces(fresh._module)
    with Controller(fresh, edits) as control, fresh.trace(PROMPTS):
        first = nnsight.save(fresh.model.layers[1].output)  # the pass has begun when the model is looked at
        late = nnsight.save(residual(fresh, 3))
        after = nnsight.save(fresh.lm_head.output)
    assert first.shape == (3, 4, D_MODEL)
    assert torch.equal(early, late)
    assert torch.equal(known, after)
    assert traces(fresh._module) == left
    assert control.interventions


def test_gradients_flow_through_what_is_read() -> None:
    lm = wrapped()
    with torch.enable_grad():
        with lm.trace(PROMPTS):
            steer(lm, random_addition((1,), 2.0))
            read = nnsight.save(residual(lm, 1))
            read.retain_grad()
            lm.lm_head.output.sum().backward()
        assert read.grad is not None
        assert bool((read.grad != 0).any())


def test_readings_are_refused_with_the_reason(lm: Any) -> None:
    with pytest.raises(AttachError, match="no trace of this model runs"):
        residual(lm, 0)
    with pytest.raises(LayerError, match="Layer 4 does not exist"), lm.trace(PROMPTS):
        read = residual(lm, 4)
        read.save()
    with pytest.raises(UnsupportedModelError, match="nnsight model is required"):
        residual(tiny_model("llama"), 0)
    with pytest.raises(AttachError, match="inside an invoke"), lm.trace() as tracer:
        residual(lm, 0)
        with tracer.invoke(PROMPTS):
            residual(lm, 0)


def test_a_last_block_that_no_module_reads_is_refused() -> None:
    from transformers import OPTForCausalLM

    config = copy.deepcopy(tiny_model("opt").config)
    config._remove_final_layer_norm = True
    model = OPTForCausalLM(config).eval()
    lm = nnsight.TransformersModel(model, tokenizer=tiny_tokenizer(pad=True), task="text-generation")
    with pytest.raises(UnsupportedModelError, match="no module takes it"), lm.trace(PROMPTS):
        states = [residual(lm, 2), residual(lm, 3)]
        nnsight.save(states)


def test_a_model_that_cannot_be_steered_is_refused() -> None:
    lm = nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    with pytest.raises(UnsupportedModelError, match="transformers model is required"), lm.trace(torch.ones(1, 4)):
        read = residual(lm, 0)
        read.save()


# Controllers around traces


def test_a_controller_steers_traces_in_one_piece_and_in_invokes(lm: Any) -> None:
    model, edits = lm._module, mixed("last")
    batch = lm.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with Controller(model, edits):
        wanted = model(**batch, position_ids=positions).logits
    with Controller(lm, edits):
        found = logits(lm)
    assert torch.allclose(found, wanted, atol=1e-5)
    with Controller(lm, edits), lm.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            one = nnsight.save(lm.output.logits)
        with tracer.invoke(PROMPTS[1:]):
            two = nnsight.save(lm.output.logits)
    assert torch.equal(torch.cat([one, two]), found)
    with pytest.raises(SamplesError, match="3 samples but the batch has 2"), Controller(lm, edits):
        logits(lm, PROMPTS[:2])


def test_a_controller_steers_generate(lm: Any) -> None:
    batch = lm.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    edits = mixed("last")
    with Controller(lm._module, edits):
        wanted = lm._module.generate(**batch, max_new_tokens=4, do_sample=False)
    with Controller(lm, edits), lm.generate(PROMPTS, max_new_tokens=4, do_sample=False) as tracer:
        found = nnsight.save(tracer.result)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, lm._module.generate(**batch, max_new_tokens=4, do_sample=False))


# Steering without a Controller


@pytest.mark.parametrize("positions", ["all", "last", "prompt"])
def test_steer_does_what_a_controller_does(lm: Any, positions: str) -> None:
    edits = mixed(positions)
    with Controller(lm, edits):
        wanted = logits(lm)
    left = traces(lm._module)
    with lm.trace(PROMPTS):
        steer(lm, edits)
        found = nnsight.save(lm.output.logits)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert not torch.allclose(found[1:], logits(lm)[1:], atol=1e-1)
    assert traces(lm._module) == left


@pytest.mark.parametrize("name", [*ARCHITECTURES, "opt", "bloom", "mixtral"])
def test_steer_adds_preference_vectors(name: str) -> None:
    lm = wrapped(name)
    vector = random_vector(lm)
    edits = [vector.add([0.0, 0.5, 1.0]), vector.add(0.3, positions="last", name="last", layers=[1, 3]), *mixed()]
    with Controller(lm, edits):
        wanted = logits(lm)
    with lm.trace(PROMPTS):
        steer(lm, edits)
        found = nnsight.save(lm.output.logits)
    scale = float(wanted.abs().max())
    assert torch.allclose(found, wanted, atol=1e-5 * scale)
    assert not torch.allclose(found, logits(lm), atol=1e-2 * scale)


def test_what_a_block_returns_beside_its_hidden_states_is_kept() -> None:
    lm = wrapped("bloom")
    with Controller(lm, mixed()), lm.trace(PROMPTS, output_attentions=True):
        wanted = nnsight.save(lm.output.attentions)
    with lm.trace(PROMPTS, output_attentions=True):
        steer(lm, mixed())
        found = nnsight.save(lm.output.attentions)
    assert len(found) == 4
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, wanted, strict=True))


def test_a_module_that_sees_all_invokes_in_one_is_refused() -> None:
    lm = wrapped("opt")  # its fc1 sees rows and positions as one axis, which nnsight cannot divide
    vector = random_vector(lm).only(layers=[0, 1])
    with pytest.raises(SamplesError, match="Pass all prompts to one trace"), lm.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            steer(lm, vector.add(1.0))
        with tracer.invoke(PROMPTS[1:]):
            nnsight.save(lm.output.logits)


def test_the_deprecated_name_and_the_plain_wrapper_work_too() -> None:
    model, edits = tiny_model("llama"), mixed()
    with pytest.warns(nnsight.NNsightDeprecationWarning):
        lm = nnsight.LanguageModel(model, tokenizer=tiny_tokenizer(pad=True))
    plain = nnsight.NNsight(model)
    batch = lm.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with Controller(lm, edits), lm.trace(PROMPTS):
        wanted = nnsight.save(residual(lm, -1))
    with lm.trace(PROMPTS):
        steer(lm, edits)
        found = nnsight.save(residual(lm, -1))
    with plain.trace(**batch):
        steer(plain, edits)
        same = nnsight.save(residual(plain, -1))
    assert torch.allclose(found, wanted, atol=1e-4)
    real = batch["attention_mask"].bool()
    assert torch.allclose(same[real], wanted[real], atol=1e-4)


def test_each_invoke_has_its_own_interventions_and_another_reads_beside_them(lm: Any) -> None:
    edits = mixed()
    with Controller(lm, edits), lm.trace(PROMPTS):
        wanted = nnsight.save([residual(lm, 1), residual(lm, 2)])
    with lm.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            pass
        with tracer.invoke(PROMPTS[1:]):
            steer(
                lm,
                [
                    random_addition((1, 2), [2.0, 4.0], seed=1),
                    random_erasure((2,), [0.0, 1.0], seed=2),
                    random_constraint((2,), at_most=[0.2, 0.01], positions="all", seed=3),
                ],
            )
        with tracer.invoke():
            found = nnsight.save([residual(lm, 1), residual(lm, 2)])
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one[1:], other[1:], atol=1e-4)
    with lm.trace(PROMPTS):
        plain = nnsight.save(residual(lm, 2))
    assert torch.equal(found[1][0], plain[0])


def test_steer_at_each_step_of_generation(lm: Any) -> None:
    edits = mixed("last")
    with Controller(lm, edits), lm.generate(PROMPTS, max_new_tokens=4, do_sample=False) as tracer:
        wanted = nnsight.save(tracer.result)
    with lm.generate(PROMPTS, max_new_tokens=4, do_sample=False) as tracer:
        for _ in tracer.iter[:4]:
            steer(lm, edits)
        found = nnsight.save(tracer.result)
    assert torch.equal(found, wanted)


def test_an_edit_that_nnsight_keeps(lm: Any) -> None:
    edits = [random_addition((1,), 4.0)]
    with lm.edit() as (_, edited):
        steer(edited, edits)
    with Controller(lm, edits):
        wanted = logits(lm)
        states = record(lm, lm.tokenizer, TEXTS)
    assert torch.allclose(logits(edited), wanted, atol=1e-5)
    assert not torch.allclose(logits(lm), wanted, atol=1e-1)
    # Traces see the edit, `record` cannot.
    assert torch.allclose(activations(edited, TEXTS)[2], states[2], atol=1e-4)
    assert not torch.allclose(record(edited, lm.tokenizer, TEXTS)[2], states[2], atol=1e-1)


def _vector(lm: Any, **kwargs: Any) -> Any:
    return random_vector(lm, **kwargs)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda lm: random_addition((1,), [1.0, 2.0]), SamplesError, "2 samples but the trace has 3 rows"),
        (lambda lm: random_addition((9,)), LayerError, "Layer 9 of 'added' does not exist"),
        (lambda lm: random_addition((1,), d_model=8), BaseModelMismatchError, "width 8"),
        (lambda lm: random_addition((1,), positions="generated"), NotReachedError, "cannot tell prompt"),
        (lambda lm: [random_addition(), random_addition()], AmountError, "must differ"),
        (lambda lm: random_addition().scheduled(stop_after(2)), ConditionError, "Found a schedule for 'added'"),
        (
            lambda lm: random_addition().when(Reading("r", 1, torch.ones(D_MODEL), 0.0, at_least=0.5)),
            ConditionError,
            "Found a condition for 'added'",
        ),
        (lambda lm: _vector(lm, full=True).add(1.0), AmountError, "no output can stand"),
        (lambda lm: _vector(lm).add(1.0, positions="last"), AmountError, "changes 'lm_head.weight'"),
        (lambda lm: _vector(tiny_model("qwen2")).add(1.0), BaseModelMismatchError, "was extracted from base model"),
    ],
)
def test_steer_refuses_what_it_cannot_do(make: Any, error: type[SteerkitError], match: str) -> None:
    lm = wrapped()
    plain = logits(lm)
    edits = make(lm)
    with pytest.raises(error, match=match), lm.trace(PROMPTS):
        steer(lm, edits)
        nnsight.save(lm.output.logits)
    assert torch.equal(logits(lm), plain)


def test_steer_comes_first() -> None:
    lm = wrapped()
    with pytest.raises(AttachError, match="the trace is past it"), lm.trace(PROMPTS):
        read = residual(lm, 0)
        steer(lm, random_addition((2,)))
        nnsight.save(read)
    with pytest.raises(AttachError, match="no trace of this model runs"):
        steer(lm, random_addition((2,)))
    with (
        pytest.raises(NotReachedError, match="Put a Controller around"),
        lm.generate(PROMPTS, max_new_tokens=3, do_sample=False) as tracer,
    ):
        for _ in tracer.iter[:3]:
            steer(lm, random_addition((2,), positions="prompt"))


# Recording


@pytest.mark.parametrize("read", ["last", "mean"])
def test_activations_are_those_of_record(lm: Any, read: Any) -> None:
    lm._module.train()  # dropout would tell
    wanted = record(lm, lm.tokenizer, TEXTS, read=read)
    for found in (activations(lm, TEXTS, read=read), activations(lm, TEXTS, read=read, batch_size=2)):
        assert found.layers == wanted.layers == (0, 1, 2, 3)
        assert (found.read, found.digests) == (read, wanted.digests)
        for layer in wanted.layers:
            assert found[layer].dtype == torch.float32
            assert torch.allclose(found[layer], wanted[layer], atol=1e-5)
        assert found.fingerprint is not None
        found.fingerprint.check(wanted.fingerprint, "the recording")
    assert all(module.training for module in lm._module.modules())


def test_activations_of_a_steered_model_and_a_concept_from_them() -> None:
    lm = wrapped()
    amounts = [float(index) for index in range(len(TEXTS))]
    with Controller(lm, random_addition((1,), amounts)):
        wanted = record(lm, lm.tokenizer, TEXTS, layers=[-1, 1])
        found = activations(lm, TEXTS, layers=[-1, 1], batch_size=2)
    assert found.layers == (1, 3)
    for layer in found.layers:
        assert torch.allclose(found[layer], wanted[layer], atol=1e-4)
    sides = [[f"w{60 + i} w{last + i % 2}" for i in range(20)] for last in (4, 30)]
    concept = Concept.from_activations("kind", *(activations(lm, side) for side in sides))
    with lm.trace(PROMPTS):
        steer(lm, concept.constrain(at_least=0.9, layers=2, positions="all"))
        after = nnsight.save(residual(lm, 2))
    assert bool((concept[2].probability(after[0]) > 0.9 - 1e-4).all())


def test_recordings_are_refused_with_the_reason(lm: Any) -> None:
    with pytest.raises(TextsError, match="at least one text"):
        activations(lm, [])
    with pytest.raises(TextsError, match="128 tokens"):
        activations(lm, ["w3", "w4 " * 200])
    with pytest.raises(TextsError, match="with a tokenizer"):
        activations(nnsight.NNsight(lm._module), TEXTS)
    with pytest.raises(LayerError, match="does not exist"):
        activations(lm, TEXTS, layers=[7])
    with pytest.raises(TextsError, match="'last' or 'mean'"):
        activations(lm, TEXTS, read="first")  # type: ignore[arg-type]
    with pytest.raises(TextsError, match="`batch_size` must be at least 1"):
        activations(lm, TEXTS, batch_size=0)
    with pytest.raises(UnsupportedModelError, match="nnsight model is required"):
        activations(lm._module, TEXTS)


# Elsewhere


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has steerkit installed and nothing else of ours: `remote="local"` sends and receives in this process."""
    from cloudpickle import cloudpickle
    from nnsight import ndif
    from nnsight.intervention.backends import local

    monkeypatch.setattr(ndif, "_PULLED_ENV", True)
    monkeypatch.setattr(cloudpickle, "_PICKLE_BY_VALUE_MODULES", set())
    monkeypatch.setattr(local, "_SERVER_MODULES", local._SERVER_MODULES | {"steerkit"})


def test_traces_run_elsewhere(lm: Any, server: None) -> None:
    vector = random_vector(lm)
    edits = [vector.add([0.0, 0.5, 1.0]), *mixed()]
    with lm.trace(PROMPTS):
        steer(lm, edits)
        wanted = nnsight.save(lm.output.logits)
    with lm.trace(PROMPTS, remote="local"):
        steer(lm, edits)
        found = nnsight.save(lm.output.logits)
    with lm.trace(PROMPTS, remote="local"):
        steer(lm, edits[1:])
        nnsight.save(residual(lm, -1))
    assert torch.equal(found, wanted)
    here, there = activations(lm, TEXTS), activations(lm, TEXTS, remote="local")
    assert here.digests == there.digests
    assert all(torch.equal(here[layer], there[layer]) for layer in here.layers)
    assert here.fingerprint is not None
    here.fingerprint.check(there.fingerprint, "the recording")


def test_what_is_sent_holds_no_weights_of_the_model(server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight.schema.request import RequestModel

    sent: list[bytes] = []
    original = RequestModel.serialize.__func__

    def keep(cls: Any, tracer: Any, compress: bool = False) -> bytes:
        sent.append(original(cls, tracer, compress))
        return sent[-1]

    lm = wrapped()
    edits = mixed()
    monkeypatch.setattr(RequestModel, "serialize", classmethod(keep))
    with lm.trace(PROMPTS, remote="local"):
        steer(lm, edits)
        nnsight.save(residual(lm, -1))
    [blob] = sent
    weights = sum(p.numel() * 4 for p in lm._module.parameters())
    assert b"steerkit.integrations.nnsight" in blob
    assert len(blob) < weights / 2


def test_steerkit_is_sent_along_if_it_is_not_installed_there(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from cloudpickle import cloudpickle
    from nnsight import ndif

    monkeypatch.setattr(ndif, "_PULLED_ENV", True)
    monkeypatch.setattr(cloudpickle, "_PICKLE_BY_VALUE_MODULES", set())
    nnsight.register("steerkit")
    edits = [random_vector(lm).add([0.0, 0.5, 1.0]), *mixed()]
    with Controller(lm, edits):
        wanted = logits(lm)
    with lm.trace(PROMPTS, remote="local"):
        steer(lm, edits)
        found = nnsight.save(lm.output.logits)
    assert torch.allclose(found, wanted, atol=1e-4)


def test_a_controller_waits_for_the_weights(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    lazy = nnsight.TransformersModel(str(tmp_path), tokenizer=tiny_tokenizer(pad=True), task="text-generation")
    with pytest.raises(UnsupportedModelError, match="dispatch"):
        Controller(lazy, mixed())


def test_a_condition_reads_the_prompts_beside_the_trace(lm: Any) -> None:
    weight = torch.randn(D_MODEL)
    with lm.trace(PROMPTS):
        plain = nnsight.save(residual(lm, 2)[:, -1] @ weight)
    low, middle, _ = plain.sort().values.tolist()
    gate = Reading("r", 2, weight, -(low + middle) / 2, at_least=0.5)
    amounts = [4.0 if value >= middle else 0.0 for value in plain.tolist()]
    with Controller(lm, random_addition((1,), amounts)), lm.trace(PROMPTS):
        wanted = nnsight.save(residual(lm, 1))
    with Controller(lm, random_addition((1,), 4.0).when(gate)), lm.trace(PROMPTS):
        found = nnsight.save(residual(lm, 1))
    assert torch.equal(found, wanted)


def test_weights_that_load_at_the_first_trace(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(pad=True)
    model.save_pretrained(tmp_path)
    edits = mixed()
    lazy = nnsight.TransformersModel(str(tmp_path), tokenizer=tokenizer, task="text-generation")
    assert not lazy.dispatched
    with lazy.trace(PROMPTS):
        steer(lazy, edits)
        found = nnsight.save(lazy.lm_head.output)
    lm = nnsight.TransformersModel(model, tokenizer=tokenizer, task="text-generation")
    with Controller(lm, edits):
        assert torch.allclose(found, logits(lm), atol=1e-4)
    again = nnsight.TransformersModel(str(tmp_path), tokenizer=tokenizer, task="text-generation")
    assert torch.allclose(activations(again, TEXTS)[2], record(model, tokenizer, TEXTS)[2], atol=1e-5)


def test_nothing_keeps_a_model_alive() -> None:
    def used() -> weakref.ref:
        lm = wrapped()
        with lm.trace(PROMPTS):
            steer(lm, random_addition((1,)))
            nnsight.save(residual(lm, -1))
        return weakref.ref(lm._module)

    model = used()
    gc.collect()
    assert model() is None


def test_a_missing_nnsight_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    path = sys.modules["steerkit.integrations.nnsight"].__file__
    assert path is not None
    monkeypatch.setitem(sys.modules, "nnsight", None)
    with pytest.raises(MissingDependencyError, match="Traces need nnsight"):
        runpy.run_path(path)
