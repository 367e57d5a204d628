"""Contracts 5, 6 and 10: the algebra of preference vectors, merging, LoRA folders, and files that come back bit for bit."""

import copy
import dataclasses
import errno
import functools
import itertools
import json
import math
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save
from tiny import DEPTH, LLAMA_LIKE, seeded, tiny_model
from torch import Tensor

from steerkit import Controller, PreferenceVector, load, storage
from steerkit.errors import ArtefactError, AttachError, BaseModelMismatchError, LayerError, PolicyError, SteerkitError
from steerkit.maths.lowrank import Delta, LowRank, dense, parts
from steerkit.model import Fingerprint
from steerkit.preferences.vector import cosines, interference
from steerkit.storage import checksum

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft 0.21 with transformers 5
]

IDS = torch.tensor([[5, 9, 33, 12, 4], [7, 8, 61, 20, 3]])
SHAPES = {f"model.layers.{layer}.{m}.weight": (40, 56) for layer in range(3) for m in ("up", "down")}
ALL = {**SHAPES, "model.embed.weight": (60, 40), "model.layers.1.norm.weight": (40,)}

seeds = st.integers(0, 2**31 - 1)
numbers = st.floats(-4, 4).filter(lambda x: x == 0 or abs(x) > 1e-3)
slow = settings(deadline=None, max_examples=25)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def change(shape: tuple[int, ...], seed: int, rank: int | None, scale: float = 0.3) -> Delta:
    generator = rng(seed)
    if len(shape) != 2 or rank is None:
        return scale * torch.randn(shape, generator=generator)
    left, right = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    return LowRank(scale * left, right / rank)


def vector(seed: int = 0, rank: int | None = 3, names: Any = SHAPES, name: str = "liked") -> PreferenceVector:
    """A vector of no particular model."""
    return PreferenceVector(name, {n: change(ALL[n], 1000 * seed + i, rank) for i, n in enumerate(names)})


@functools.cache
def fingerprint(model: str) -> Fingerprint:
    return Fingerprint.of(tiny_model(model))


def of_model(
    model: str = "llama", seed: int = 0, rank: int | None = 3, ends: Any = ("q_proj", "down_proj", "c_attn", "c_proj")
) -> PreferenceVector:
    """A vector of a tiny model: low-rank changes of some of its linear modules."""
    base = tiny_model(model)
    names = [n for n, _ in base.named_parameters() if n.endswith(".weight") and n.split(".")[-2] in ends]
    deltas = {n: change(tuple(base.get_parameter(n).shape), 100 * seed + i, rank, 0.1) for i, n in enumerate(names)}
    assert deltas
    turned = frozenset(names) if model == "gpt2" else frozenset()
    return PreferenceVector("liked", deltas, fingerprint(model), {"seed": seed}, turned)


@st.composite
def vectors(draw: Any) -> PreferenceVector:
    """Any vector: some of the parameters, each thin or dense."""
    names = draw(st.lists(st.sampled_from(sorted(ALL)), min_size=1, unique=True))
    seed = draw(seeds)
    return PreferenceVector(
        draw(st.sampled_from(["liked", "kind"])),
        {n: change(ALL[n], seed + i, draw(st.sampled_from([1, 3, None]))) for i, n in enumerate(names)},
    )


def arrays(of: PreferenceVector) -> dict[str, Tensor]:
    """Every change in float64; what a vector leaves alone is zero."""
    found = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in ALL.items()}
    for name, delta in of.deltas.items():
        found[name] = delta.left.double() @ delta.right.double() if isinstance(delta, LowRank) else delta.double()
    return found


def size(of: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(each.square().sum()) for each in of.values()))


def equal(found: PreferenceVector, wanted: dict[str, Tensor], room: float) -> None:
    have = arrays(found)
    assert set(have) == set(wanted)
    assert size({name: have[name] - wanted[name] for name in wanted}) <= room


def mix(*terms: tuple[float, PreferenceVector]) -> dict[str, Tensor]:
    every = [(factor, arrays(each)) for factor, each in terms]
    return {name: sum((f * a[name] for f, a in every), torch.zeros(())) for name in every[0][1]}


def bits(of: PreferenceVector) -> dict[str, Any]:
    return {n: [(p.dtype, p.shape, p.contiguous().numpy().tobytes()) for p in parts(d)] for n, d in of.deltas.items()}


def weight_bits(model: Any) -> dict[str, bytes]:
    return {
        n: p.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for n, p in model.state_dict().items()
    }


# --- algebra ----------------------------------------------------------------------------------------------------------


@slow
@given(v=vectors(), a=numbers, b=numbers)
def test_multiples_of_one_vector_add_up(v, a, b):
    """Contract 6, and a sum that does not grow."""
    before = bits(v)
    summed = a * v + b * v
    equal(summed, mix((a + b, v)), 1e-6 * (abs(a) + abs(b) + 1e-30) * v.norm())
    assert (summed - (a + b) * v).norm() <= 1e-5 * (abs(a) + abs(b) + 1e-30) * v.norm()
    assert summed.rank == v.rank
    assert bits(v) == before


@slow
@given(u=vectors(), v=vectors(), w=vectors(), a=numbers)
def test_sums_are_those_of_the_weights(u, v, w, a):
    """Low-rank and dense, whatever parameters each changes."""
    before = [bits(each) for each in (u, v, w)]
    room = 1e-5 * (u.norm() + v.norm() + w.norm())
    wanted = mix((1, u), (1, v), (1, w))
    for found in (u + (v + w), (u + v) + w, w + v + u, sum([u, v, w])):
        assert isinstance(found, PreferenceVector)
        equal(found, wanted, room)
    equal(u - v, mix((1, u), (-1, v)), room)
    equal(-u, mix((-1, u)), 0)
    equal(a * (u + v), mix((a, u), (a, v)), 4 * room)
    equal(u * 2 / 2, mix((1, u)), 0)
    assert [bits(each) for each in (u, v, w)] == before
    assert set((u + v).deltas) == set(u.deltas) | set(v.deltas)


@slow
@given(v=vectors())
def test_a_vector_taken_from_itself_is_zero(v):
    gone = v - v
    assert gone.norm() == 0
    for call in (
        lambda: gone.cosine(v),
        lambda: v.cosine(gone),
        lambda: gone.with_norm(1.0),
        lambda: (0 * v).cosine(v),
    ):
        with pytest.raises(PolicyError, match="zero"):
            call()
    repr(gone)


@slow
@given(u=vectors(), v=vectors(), a=st.floats(0.01, 100), b=st.floats(0.01, 100))
def test_cosines(u, v, a, b):
    wanted = sum(float((x * y).sum()) for x, y in zip(arrays(u).values(), arrays(v).values(), strict=True))
    wanted /= size(arrays(u)) * size(arrays(v))
    found = u.cosine(v)
    assert found == pytest.approx(wanted, abs=1e-9)
    assert v.cosine(u) == pytest.approx(found, abs=1e-12)
    assert (a * u).cosine(b * v) == pytest.approx(found, abs=1e-6)
    assert (-a * u).cosine(b * v) == pytest.approx(-found, abs=1e-6)
    for one, other in ((u, v), (u, u), (u, -u), (a * u, b * u), (u + v, u), (u + v, v + u)):
        if one.norm() > 0 and other.norm() > 0:
            assert -1 <= one.cosine(other) <= 1


@slow
@given(v=vectors(), norm=st.floats(1e-3, 1e3))
def test_norms(v, norm):
    assert v.norm() == pytest.approx(size(arrays(v)), rel=1e-9)
    long = v.with_norm(norm)
    assert long.norm() == pytest.approx(norm, rel=1e-5)
    assert long.cosine(v) == pytest.approx(1, abs=1e-6)
    assert v.dot(v) == pytest.approx(v.norm() ** 2, rel=1e-9)


def test_the_norm_is_that_of_merged_weights():
    for name in ("llama", "gpt2"):
        v, base = of_model(name), tiny_model(name)
        merged = v.merge_into(base)
        moved = {n: merged.get_parameter(n).double() - p.double() for n, p in base.named_parameters()}
        assert v.norm() == pytest.approx(float(size({n: m.detach() for n, m in moved.items()})), rel=1e-5)


def test_what_is_no_vector_or_number():
    v = vector()
    for call in (lambda: v + 1, lambda: v - 1, lambda: v * "2", lambda: v * True, lambda: v + None, lambda: v * v):
        with pytest.raises(TypeError):
            call()
    for factor in (math.nan, math.inf, -math.inf):
        with pytest.raises(PolicyError, match="finite"):
            v * factor
    with pytest.raises(PolicyError, match="finite"):
        v * {0: math.nan}


def test_one_number_a_layer():
    v = vector(names=ALL)
    scaled = v * {0: 2.0, -1: -0.5}
    assert set(scaled.deltas) == {n for n in SHAPES if ".0." in n or ".2." in n}
    for name, delta in scaled.deltas.items():
        assert torch.allclose(dense(delta), (2.0 if ".0." in name else -0.5) * dense(v.deltas[name]), atol=1e-6)
    assert scaled.layers == (0, 2)
    for layers in ({3: 1.0}, {0: 1.0, 7: 1.0}, {-4: 1.0}, {0: 1.0, -3: 2.0}, {"0": 1.0}):
        with pytest.raises(LayerError):
            v * layers


def test_parts_of_a_vector():
    v = vector(names=ALL)
    part = v.only(layers=[1])
    assert set(part.deltas) == {n for n in ALL if ".1." in n}
    assert set(part.made["left_out"]) == set(ALL) - set(part.deltas)
    assert all(part.deltas[n] is v.deltas[n] for n in part.deltas)
    assert set(v.only(layers=[0, 2], modules=["up"]).deltas) == {
        "model.layers.0.up.weight",
        "model.layers.2.up.weight",
    }
    assert set(v.only(modules=["layers.1.norm", "embed"]).deltas) == {
        "model.layers.1.norm.weight",
        "model.embed.weight",
    }
    assert v.only(layers=v.layers).norm() ** 2 + v.only(modules=["embed"]).norm() ** 2 == pytest.approx(v.norm() ** 2)
    with pytest.raises(LayerError):
        v.only(layers=[5])
    with pytest.raises(LayerError):
        v.only(modules=["up"]).only(layers=[1]).only(layers=[0])
    for modules in (["p"], ["side"], ["weight"], "up"):
        with pytest.raises(PolicyError, match="must end in"):
            v.only(modules=modules)


@pytest.mark.parametrize("nothing", [{"layers": []}, {"modules": []}], ids=str)
def test_a_part_that_is_nothing(nothing):
    """Refused, or a vector that can be shown and measured."""
    with suppress(SteerkitError):
        part = vector().only(**nothing)
        assert part.norm() == 0
        repr(part)


def test_vectors_of_other_bases():
    llama, gpt2 = of_model("llama"), of_model("gpt2")
    for call in (
        lambda: llama + gpt2,
        lambda: llama - gpt2,
        lambda: llama.dot(gpt2),
        lambda: llama.cosine(gpt2),
        lambda: interference([llama, llama, gpt2]),
        lambda: cosines([llama, gpt2]),
    ):
        with pytest.raises((BaseModelMismatchError, PolicyError)):
            call()
    with pytest.raises(BaseModelMismatchError):
        llama + gpt2
    with torch.no_grad():
        other = tiny_model("llama")
        for parameter in other.parameters():
            parameter.mul_(1.5)
    with pytest.raises(BaseModelMismatchError):
        llama + dataclasses.replace(llama, fingerprint=Fingerprint.of(other))
    odd = PreferenceVector("odd", {next(iter(SHAPES)): torch.ones(3, 3)})
    for call in (
        lambda: vector() + odd,
        lambda: odd - vector(),
        lambda: vector().dot(odd),
        lambda: odd.cosine(vector()),
    ):
        with pytest.raises(BaseModelMismatchError):
            call()


# --- compression ------------------------------------------------------------------------------------------------------


@slow
@given(v=vectors(), rank=st.integers(1, 5))
def test_compression_tells_the_energy_that_it_keeps(v, rank):
    before = bits(v)
    near = v.compress(rank=rank)
    squares = {n: torch.linalg.svdvals(a).square() if a.ndim == 2 else a.square() for n, a in arrays(v).items()}
    kept = sum(float(s[:rank].sum() if len(ALL[n]) == 2 else s.sum()) for n, s in squares.items())
    whole = v.norm() ** 2
    assert near.kept_energy == pytest.approx(kept / whole, rel=1e-6)
    assert near.norm() ** 2 == pytest.approx(kept, rel=1e-4)
    assert size(mix((1, v), (-1, near))) ** 2 == pytest.approx(whole - kept, rel=1e-3, abs=1e-8 * whole)
    assert all(d.rank <= rank for d in near.deltas.values() if isinstance(d, LowRank))
    assert bits(v) == before


@slow
@given(v=vectors(), energy=st.floats(0.05, 1.0))
def test_compression_to_an_energy(v, energy):
    near = v.compress(energy=energy)
    assert near.kept_energy >= energy * (1 - 1e-9)
    assert near.norm() ** 2 == pytest.approx(near.kept_energy * v.norm() ** 2, rel=1e-4)
    equal(v.compress(energy=1), mix((1, v)), 3e-6 * v.norm())
    assert v.compress(energy=1).kept_energy == pytest.approx(1, abs=1e-9)


def test_kept_energy_multiplies():
    v = vector(rank=8)
    once, twice = v.compress(rank=5), v.compress(rank=5).compress(rank=2)
    assert v.kept_energy == 1
    assert 0.3 < twice.kept_energy < once.kept_energy < 1
    assert twice.kept_energy == pytest.approx(v.compress(rank=2).kept_energy, rel=1e-5)
    assert twice.norm() ** 2 == pytest.approx(twice.kept_energy * v.norm() ** 2, rel=1e-5)
    assert f"{100 * twice.kept_energy:.1f} %" in repr(twice)


BAD: list[dict[str, Any]] = [
    {}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"rank": -1}, {"rank": 1.5}, {"rank": "2"}, {"energy": 0.0},
    {"energy": -0.1}, {"energy": 1.01}, {"energy": math.nan}, {"energy": math.inf},
]  # fmt: skip


@pytest.mark.parametrize("arguments", BAD, ids=str)
def test_compression_of_no_sense(arguments):
    with pytest.raises(PolicyError, match="Exactly one"):
        vector().compress(**arguments)


# --- several vectors --------------------------------------------------------------------------------------------------


def test_a_matrix_of_cosines():
    every = [vector(seed) for seed in range(3)] + [-2 * vector(0)]
    found = cosines(every)
    assert found.shape == (4, 4)
    assert torch.allclose(found, found.T, atol=1e-12)
    assert torch.allclose(found.diagonal(), torch.ones(4, dtype=torch.float64), atol=1e-9)
    assert float(found[0, 3]) == pytest.approx(-1)
    assert float(found[0, 1]) == pytest.approx(every[0].cosine(every[1]))


def test_interference_of_vectors():
    every = [vector(seed, rank=2) for seed in range(4)]
    counts = [interference(every[:count], rank=2) for count in (2, 3, 4)]
    assert counts[0] > 0.1
    assert counts == sorted(counts)
    for order in itertools.permutations(every):
        assert interference(order, rank=2) == pytest.approx(counts[-1], rel=1e-8)
    assert interference([3 * v for v in every], rank=2) == pytest.approx(3 * counts[-1], rel=1e-5)
    for few in ([], every[:1], [vector(0, names=list(SHAPES)[:1]), vector(1, names=list(SHAPES)[1:])]):
        with pytest.raises(PolicyError):
            interference(few)


def test_vectors_in_orthogonal_subspaces_do_not_interfere():
    """At the default rank too, which is above that of the vectors."""
    name = next(iter(SHAPES))
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=rng(n)))[0] for n in ALL[name])
    apart = [
        PreferenceVector(f"v{i}", {name: LowRank(2 * left[:, 3 * i : 3 * i + 3], right[3 * i : 3 * i + 3])})
        for i in range(3)
    ]
    for every in (apart, [PreferenceVector(v.name, {name: dense(v.deltas[name])}) for v in apart]):
        assert interference(every, rank=3) < 1e-3
        assert interference(every) < 1e-3
    assert interference([apart[0], apart[0].named("again")]) > 1


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("magnitude", [1.0, -0.5, {1: 2.0, 3: -1.0}], ids=str)
def test_a_merge_is_the_sum_and_leaves_the_given_model(name, magnitude):
    v, model = of_model(name), tiny_model(name)
    model.train()
    before, deltas = weight_bits(model), bits(v)
    merged = v.merge_into(model, magnitude)
    assert weight_bits(model) == before
    assert bits(v) == deltas
    assert merged is not model
    assert merged.training
    moved = 0
    for path, parameter in model.named_parameters():
        factor = magnitude if isinstance(magnitude, float) else None
        if factor is None and path in v.deltas:
            factor = {1: 2.0, 3: -1.0}.get(int(next(step for step in path.split(".") if step.isdigit())))
        found = merged.get_parameter(path).detach()
        assert found.data_ptr() != parameter.data_ptr()
        if path not in v.deltas or factor is None:
            assert torch.equal(found, parameter)
            continue
        wanted = parameter.detach().double() + factor * dense(v.deltas[path]).double()
        assert float((found - wanted).abs().max()) < 1e-6 * (1 + float(wanted.abs().max()))
        moved += 1
    assert moved == len((v * magnitude).deltas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [3, None], ids=["thin", "dense"])
def test_magnitude_zero_keeps_every_bit(dtype, rank):
    """The sign of a zero weight too."""
    model = tiny_model("llama").to(dtype)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[:3] = -0.0
    v = of_model(rank=rank)
    for merged in (v.merge_into(model, 0), v.merge_into(model, 0.0), v.merge_into(model, {0: 0.0})):
        assert weight_bits(merged) == weight_bits(model)


def test_merging_one_after_the_other_is_merging_the_sum():
    p, q, model = of_model(seed=1), of_model(seed=2, ends=("q_proj", "up_proj")), tiny_model("llama")
    one = q.merge_into(p.merge_into(model), check_model=False)
    other = (p + q).merge_into(model)
    assert set((p + q).deltas) > set(p.deltas)
    for path, parameter in one.named_parameters():
        assert float((parameter - other.get_parameter(path)).detach().abs().max()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_sums_are_rounded_once(dtype):
    model = tiny_model("llama").to(dtype)
    v = of_model(seed=1) + of_model(seed=2) + of_model(seed=3, rank=None)
    merged = v.merge_into(model, 0.37)
    same = total = 0
    for path, delta in v.deltas.items():
        found = merged.get_parameter(path).detach()
        assert found.dtype == dtype
        wanted = model.get_parameter(path).detach().double() + 0.37 * dense(delta).double()
        step = 2.0 ** wanted.abs().clamp(min=1e-6).log2().floor() * torch.finfo(dtype).eps
        assert bool(((found.double() - wanted).abs() <= 0.505 * step + 1e-6).all())
        same += int((found == wanted.to(dtype)).sum())
        total += found.numel()
    assert same > 0.995 * total


def tied(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return seeded(LlamaForCausalLM(LlamaConfig(**{**LLAMA_LIKE, "tie_word_embeddings": True})), seed)


def test_tied_weights_stay_tied():
    model = tied()
    v = PreferenceVector("liked", {"model.embed_tokens.weight": change((99, 32), 3, 2)}, Fingerprint.of(model))
    merged = v.merge_into(model)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert not torch.equal(merged.lm_head.weight, model.lm_head.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_biases_norms_and_embeddings_merge():
    model = tiny_model("gpt2")
    deltas = {n: change(tuple(p.shape), i, None) for i, (n, p) in enumerate(model.named_parameters())}
    merged = PreferenceVector("liked", deltas, Fingerprint.of(model)).merge_into(model)
    for path, parameter in model.named_parameters():
        assert torch.allclose(merged.get_parameter(path), parameter + deltas[path], atol=1e-6)


def test_another_base_is_refused_unless_told_otherwise():
    v, other = of_model(), tiny_model("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    before = weight_bits(other)
    with pytest.raises(BaseModelMismatchError):
        v.merge_into(other)
    merged = v.merge_into(other, check_model=False)
    assert weight_bits(other) == before
    path = next(iter(v.deltas))
    assert torch.allclose(merged.get_parameter(path), other.get_parameter(path) + dense(v.deltas[path]), atol=1e-5)
    for check_model in (True, False):
        with pytest.raises(BaseModelMismatchError):
            v.merge_into(tiny_model("gpt2"), check_model=check_model)


def test_models_that_are_not_plain_and_at_rest():
    v = of_model()
    wrapped = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (wrapped, torch.nn.DataParallel(tiny_model("llama"))):
        with pytest.raises(AttachError, match="plain model"):
            v.merge_into(model)
    model = tiny_model("llama")
    with Controller(model, [v.add(0.5)]):
        logits(model)
        with pytest.raises(AttachError, match="Detach"):
            v.merge_into(model)
    v.merge_into(model)


def test_a_model_with_layers_of_an_adapter_inside():
    """Without its wrapper it looks like a plain model."""
    wrapped = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = weight_bits(wrapped)
    with pytest.raises(SteerkitError):
        of_model().merge_into(wrapped.get_base_model())
    assert weight_bits(wrapped) == before


# --- LoRA folders -----------------------------------------------------------------------------------------------------


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def check_adapter(v: PreferenceVector, model: str, folder: Path, magnitude: Any, error: float = 1e-5) -> Any:
    """PEFT reads the folder without a word, and it acts as the vector does merged."""
    base = tiny_model(model)
    loaded = peft.PeftModel.from_pretrained(tiny_model(model), folder)
    wanted = v.merge_into(base, magnitude)
    assert float((logits(wanted) - logits(base)).abs().max()) > 1e-2, "the vector does nothing"
    if error <= 1e-5:
        assert float((logits(loaded) - logits(wanted)).abs().max()) < 1e-3
    merged = copy.deepcopy(loaded).merge_and_unload()
    off = whole = 0.0
    for path, parameter in base.named_parameters():
        found, aim = merged.get_parameter(path).detach().double(), wanted.get_parameter(path).detach().double()
        if path not in (v * magnitude).deltas:
            assert torch.equal(merged.get_parameter(path), parameter), f"{path} was touched"
        off += float((found - aim).square().sum())
        whole += float((aim - parameter.detach().double()).square().sum())
    assert math.sqrt(off / whole) == pytest.approx(error, abs=1e-5)
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {config["r"]}
    assert {t.shape[1] for n, t in tensors.items() if "lora_B" in n} == {config["r"]}
    targeted = {path for path, module in loaded.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert targeted == {path.removesuffix(".weight") for path in (v * magnitude).deltas}, "other modules are wrapped"
    return config


@pytest.mark.parametrize("magnitude", [1.0, -0.7, {0: 1.0, 2: -2.0}], ids=str)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_an_adapter_acts_as_the_merge(model, magnitude, tmp_path):
    v = of_model(model)
    before = bits(v)
    assert v.to_adapter(tmp_path / "a", magnitude) == 0
    config = check_adapter(v, model, tmp_path / "a", magnitude)
    assert config["r"] == config["lora_alpha"] == 3
    assert config["fan_in_fan_out"] is (model == "gpt2")
    assert bits(v) == before


def test_modules_of_other_ranks_get_one(tmp_path):
    v = of_model(rank=2, ends=("q_proj",)) + of_model(seed=4, rank=5, ends=("up_proj", "v_proj"))
    assert v.to_adapter(tmp_path / "a") == 0
    assert check_adapter(v, "llama", tmp_path / "a", 1.0)["r"] == 5


@pytest.mark.parametrize("rank", [1, 4, 6, 20])
@pytest.mark.parametrize("before", [None, 5])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_error_of_a_cut_is_the_true_one(model, before, rank, tmp_path):
    """For a vector that has been cut before too: what is written is measured against that vector."""
    v = of_model(model, rank=6)
    v = v if before is None else v.compress(rank=before)
    error = v.to_adapter(tmp_path / "a", 0.5, rank=rank)
    written = (before or 6) > rank
    assert (error > 0.05) if written else (error == 0)
    config = check_adapter(v, model, tmp_path / "a", 0.5, error)
    assert config["r"] == min(rank, before or 6)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_dense_changes_need_a_rank(model, tmp_path):
    v = of_model(model, rank=None, ends=("q_proj", "c_attn"))
    with pytest.raises(PolicyError, match="rank"):
        v.to_adapter(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    error = v.to_adapter(tmp_path / "a", rank=9)
    assert 0.1 < error < 1
    check_adapter(v, model, tmp_path / "a", 1.0, error)
    assert v.to_adapter(tmp_path / "b", rank=32) == 0


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_some_layers_touch_no_others(model, tmp_path):
    v = of_model(model).only(layers=[1])
    v.to_adapter(tmp_path / "a")
    check_adapter(v, model, tmp_path / "a", 1.0)


@pytest.mark.parametrize("modules", [["attn.c_proj"], ["mlp.c_proj"], ["attn.c_proj", "c_attn"]], ids=str)
def test_modules_that_share_their_short_name(modules, tmp_path):
    """GPT-2 has a `c_proj` in attention and one in the MLP: one of them does not mean the other."""
    v = of_model("gpt2").only(modules=modules)
    v.to_adapter(tmp_path / "a")
    check_adapter(v, "gpt2", tmp_path / "a", 1.0)


def test_half_of_each_of_two_modules_that_share_their_short_name(tmp_path):
    v = of_model("gpt2")
    v = v.only(layers=[0, 1], modules=["attn.c_proj"]) + v.only(layers=[2, 3], modules=["mlp.c_proj"])
    v.to_adapter(tmp_path / "a")
    check_adapter(v, "gpt2", tmp_path / "a", 1.0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", (32,)),
        ("model.layers.1.input_layernorm.weight", (32,)),
        ("model.embed_tokens.weight", (99, 32)),
        ("model.layers.1.self_attn.q_proj.bias", (32,)),
        ("model.layers.1.mlp.experts.gate_up_proj", (4, 32, 48)),
    ],
)
def test_what_lora_cannot_hold_is_named(name, shape, tmp_path):
    v = of_model()
    v = dataclasses.replace(v, deltas={**v.deltas, name: change(shape, 1, 2)})
    for rank in (None, 4):
        with pytest.raises(PolicyError, match=name.replace(".", r"\.")):
            v.to_adapter(tmp_path / "a", rank=rank)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_folder_with_something_in_it_is_left_alone(model, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="empty or new folder"):
        of_model(model).to_adapter(tmp_path / "a")
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "notes.txt"]
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "missing" / "a"):
        with pytest.raises(ArtefactError):
            of_model(model).to_adapter(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file"]
    (tmp_path / "empty").mkdir()
    of_model(model).to_adapter(tmp_path / "empty")
    assert (tmp_path / "empty" / "adapter_config.json").exists()


# --- files ------------------------------------------------------------------------------------------------------------


def everything() -> PreferenceVector:
    """A vector of every form, with values that a careless copy would change."""
    base = tiny_model("gpt2")
    v = of_model("gpt2")
    bias = torch.tensor([-0.0, 1e-40, 3.4e38, *range(93)])
    deltas = {**v.deltas, "transformer.h.0.attn.c_attn.bias": bias, "transformer.wte.weight": change((99, 32), 5, None)}
    assert base.get_parameter("transformer.h.0.attn.c_attn.bias").shape == bias.shape
    return dataclasses.replace(v, deltas=deltas, made={"seed": 3, "data": {"digest": "abc", "figures": [0.1, 1e-9]}})


def test_a_vector_comes_back_bit_for_bit(tmp_path):
    for v in (everything(), everything().only(layers=[1, 2]).compress(rank=2), of_model() + of_model(seed=2), vector()):
        v.save(tmp_path / "v")
        back = load(tmp_path / "v")
        assert isinstance(back, PreferenceVector)
        assert bits(back) == bits(v)
        assert list(back.deltas) == list(v.deltas)
        assert (back.name, dict(back.made), back.transposed) == (v.name, dict(v.made), v.transposed)
        assert (back.rank, back.layers, back.norm(), back.kept_energy) == (v.rank, v.layers, v.norm(), v.kept_energy)
        if v.fingerprint is None:
            assert back.fingerprint is None
        else:
            assert back.fingerprint.header() == v.fingerprint.header()
            assert torch.equal(back.fingerprint.values, v.fingerprint.values)
    assert repr(back) == repr(v)


def test_a_vector_knows_its_model(tmp_path):
    of_model().save(tmp_path / "v")
    load(tmp_path / "v", tiny_model("llama")).merge_into(tiny_model("llama"))
    load(tmp_path / "v", tiny_model("llama").bfloat16())
    other = tiny_model("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    for model in (tiny_model("gpt2"), other):
        with pytest.raises(BaseModelMismatchError, match="'liked' was extracted from base model"):
            load(tmp_path / "v", model=model)
    adopted = load(tmp_path / "v", model=other, check_model=False)
    adopted.merge_into(other)
    with pytest.raises(BaseModelMismatchError):
        adopted.merge_into(tiny_model("llama"))


def opened(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["steerkit"]), tensors


def forge(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write a file with any header and a fitting checksum, so that the checks behind it are reached."""
    header = {**header, "checksum": checksum(tensors)}
    metadata = {"steerkit": json.dumps(header)}
    path.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, metadata=metadata))
    return path


Q0, BIAS = "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.bias"
Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def put(name: str, to: Callable[[Tensor], Tensor]) -> Change:
    return lambda h, t: t.update({name: to(t[name])})


def poison(value: float) -> Callable[[Tensor], Tensor]:
    def to(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return to


HOSTILE: dict[str, Change] = {
    "no parameters": lambda h, t: h.pop("parameters"),
    "an empty list": lambda h, t: h.update(parameters=[]),
    "a parameter twice": lambda h, t: h["parameters"].append(h["parameters"][0]),
    "a parameter that is not there": lambda h, t: h["parameters"].append("transformer.h.9.attn.c_attn.weight"),
    "parameters as text": lambda h, t: h.update(parameters="abc"),
    "parameters as a map": lambda h, t: h.update(parameters={Q0: 1}),
    "a parameter that is a number": lambda h, t: h["parameters"].append(3),
    "a parameter that is a list": lambda h, t: h["parameters"].append([Q0]),
    "a parameter that is null": lambda h, t: h["parameters"].append(None),
    "no name": lambda h, t: h.pop("name"),
    "a name that is a number": lambda h, t: h.update(name=3),
    "made as text": lambda h, t: h.update(made="by hand"),
    "nothing made": lambda h, t: h.pop("made"),
    "kept energy as text": lambda h, t: h["made"].update(kept_energy="all"),
    "kept energy as a list": lambda h, t: h["made"].update(kept_energy=[1.0]),
    "kept energy not a number": lambda h, t: h["made"].update(kept_energy=math.nan),
    "kept energy below zero": lambda h, t: h["made"].update(kept_energy=-1.0),
    "kept energy of zero": lambda h, t: h["made"].update(kept_energy=0.0),
    "transposed missing": lambda h, t: h.pop("transposed"),
    "transposed as text": lambda h, t: h.update(transposed=Q0),
    "transposed elsewhere": lambda h, t: h["transposed"].append("transformer.h.3.other.weight"),
    "transposed numbers": lambda h, t: h.update(transposed=[1]),
    "one factor missing": lambda h, t: t.pop(f"left.{Q0}"),
    "the other missing": lambda h, t: t.pop(f"right.{Q0}"),
    "ranks that do not fit": put(f"left.{Q0}", lambda x: x[:, :-1]),
    "ranks that do not fit, other side": put(f"right.{Q0}", lambda x: x[:-1]),
    "no rank": lambda h, t: (put(f"left.{Q0}", lambda x: x[:, :0])(h, t), put(f"right.{Q0}", lambda x: x[:0])(h, t)),
    "a factor of one dimension": put(f"left.{Q0}", lambda x: x[0]),
    "a factor of three dimensions": put(f"right.{Q0}", lambda x: x[None]),
    "NaN in a factor": put(f"left.{Q0}", poison(math.nan)),
    "infinity in a factor": put(f"right.{Q0}", poison(math.inf)),
    "NaN in a dense change": put(f"dense.{BIAS}", poison(math.nan)),
    "integers": put(f"left.{Q0}", lambda x: x.long()),
    "integers in a dense change": put(f"dense.{BIAS}", lambda x: x.int()),
    "more than float32 holds": put(f"left.{Q0}", lambda x: poison(1e300)(x.double())),
    "a dense change without dimensions": put(f"dense.{BIAS}", lambda x: x[3]),
    "a dense change without entries": put(f"dense.{BIAS}", lambda x: x[:0]),
    "a base model that is a text": lambda h, t: h.update(base_model="llama"),
    "a depth of minus one": lambda h, t: h["base_model"].update(depth=-1),
    "values of another length": put("base_model.values", lambda x: x[:7]),
    "no values": lambda h, t: t.pop("base_model.values"),
    "another kind": lambda h, t: h.update(kind="concept"),
    "an unknown kind": lambda h, t: h.update(kind="wonder"),
    "a newer format": lambda h, t: h.update(format=99),
}


@pytest.fixture(scope="module")
def blob(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "v"
    everything().save(path)
    return path.read_bytes()


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers(change, blob, tmp_path):
    path = tmp_path / "v"
    path.write_bytes(blob)
    header, tensors = opened(path)
    assert bits(load(forge(path, header, tensors))) == bits(everything()), "an honest forgery is not read"
    change(header, tensors)
    forge(path, header, tensors)
    with pytest.raises(ArtefactError):
        repr(load(path))


def test_flipped_bytes_are_never_read_as_other_weights(blob, tmp_path):
    """In the values each is noticed; in the header the least is that the weights are the same and nothing else escapes."""
    start, path, wanted = 8 + struct.unpack("<Q", blob[:8])[0], tmp_path / "v", bits(everything())
    for place in [*range(start, len(blob), 997), start, len(blob) - 1]:
        path.write_bytes(blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :])
        with pytest.raises(ArtefactError):
            load(path)
    noticed = 0
    for place in range(0, start, 13):
        path.write_bytes(blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :])
        try:
            found = load(path)
        except ArtefactError:
            noticed += 1
            continue
        repr(found)
        assert sorted(map(str, bits(found).values())) == sorted(map(str, wanted.values()))
    assert noticed > 20


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_truncated_files(share, blob, tmp_path):
    (tmp_path / "v").write_bytes(blob[: int(share * len(blob))])
    with pytest.raises(ArtefactError):
        load(tmp_path / "v")


@pytest.mark.parametrize("function", ["fsync", "replace", "chmod"])
def test_a_write_that_fails_leaves_the_old_file(function, blob, tmp_path, monkeypatch):
    def no_space(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "v").write_bytes(blob)
    monkeypatch.setattr(storage.os, function, no_space)
    with pytest.raises(ArtefactError, match="Nothing was changed"):
        of_model().save(tmp_path / "v")
    monkeypatch.undo()
    assert (tmp_path / "v").read_bytes() == blob
    assert [p.name for p in tmp_path.iterdir()] == ["v"]


@pytest.mark.parametrize(
    "made", [{"figure": math.nan}, {"model": object()}, {"rows": {1, 2}}], ids=["NaN", "object", "set"]
)
def test_what_cannot_be_noted_leaves_the_old_file(made, blob, tmp_path):
    (tmp_path / "v").write_bytes(blob)
    with pytest.raises(ArtefactError):
        dataclasses.replace(of_model(), made=made).save(tmp_path / "v")
    assert (tmp_path / "v").read_bytes() == blob
    assert [p.name for p in tmp_path.iterdir()] == ["v"]


def test_depth_of_the_tiny_models():
    """What the lists of layers above count on."""
    assert DEPTH == 4
