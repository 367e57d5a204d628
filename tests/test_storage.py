"""Contract 10: bit-exact files; damaged or hostile ones give a SteerkitError; failed writes change nothing."""

import dataclasses
import errno
import json
import math
import os
import pickle
import stat
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

from steerkit import Concept, Controller, load, record, storage
from steerkit.activations import Activations
from steerkit.errors import ArtefactError, BaseModelMismatchError, SteerkitError
from steerkit.storage import checksum
from steerkit.types import DIRECTIONS

TEXTS = [f"w{i} w{i + 1} w{2 * i}" for i in range(24)]
Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


@pytest.fixture(scope="module")
def recording() -> Activations:
    return record(tiny_model("llama"), tiny_tokenizer(), TEXTS, layers=[0, 2])


@pytest.fixture(scope="module")
def concept(recording: Activations) -> Concept:
    positive, negative = (
        dataclasses.replace(
            recording,
            states={layer: recording[layer][rows] + shift for layer in recording.layers},
            digests=recording.digests[rows],
        )
        for rows, shift in ((slice(0, 12), 2.0), (slice(12, None), -2.0))
    )
    return Concept.from_activations("liked", positive, negative, direction="pattern", seed=5)


@pytest.fixture(params=["concept", "activations"])
def artefact(request: pytest.FixtureRequest, concept: Concept, recording: Activations) -> Any:
    return concept if request.param == "concept" else recording


def parts(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["steerkit"]), tensors


def forge(path: Path, header: Any, tensors: dict[str, Tensor]) -> Path:
    """Write a safetensors file with any header, which may be JSON text that `json.dumps` would not write."""
    if isinstance(header, dict):
        # What is forged has a fitting checksum, so that the checks behind it are reached.
        with suppress(RuntimeError):
            header = {**header, "checksum": checksum(tensors)}
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, metadata={"steerkit": text}))
    return path


def raw_safetensors(entries: dict[str, Any], data: bytes = b"") -> bytes:
    head = json.dumps(entries).encode()
    return struct.pack("<Q", len(head)) + head + data


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


# --- round trips ------------------------------------------------------------------------------------------------------


def test_a_concept_comes_back_bit_for_bit(concept, tmp_path):
    concept.save(tmp_path / "liked.safetensors")
    back = load(tmp_path / "liked.safetensors")
    assert isinstance(back, Concept)
    for name in ("name", "direction", "depth", "figures", "norms", "made", "layers", "steering_layers", "best_layer"):
        assert getattr(back, name) == getattr(concept, name), name
    for layer in concept.layers:
        assert same_bits(back[layer].weight, concept[layer].weight)
        assert back[layer].bias == concept[layer].bias
        for kind in DIRECTIONS:
            assert same_bits(back.directions[kind][layer], concept.directions[kind][layer])
    assert repr(back) == repr(concept)
    assert back.fingerprint.header() == concept.fingerprint.header()
    assert same_bits(back.fingerprint.values, concept.fingerprint.values)


def test_a_recording_comes_back_bit_for_bit(recording, tmp_path):
    recording.save(tmp_path / "states.safetensors")
    back = load(tmp_path / "states.safetensors")
    assert isinstance(back, Activations)
    assert (back.layers, back.read, back.digests) == (recording.layers, recording.read, recording.digests)
    assert all(same_bits(back[layer], recording[layer]) for layer in recording.layers)
    assert repr(back) == repr(recording)


def test_saving_twice_gives_the_same_bytes(artefact, tmp_path):
    artefact.save(tmp_path / "a")
    load(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_artefacts_without_a_model_come_back(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sides = [Activations({5: torch.randn(30, 6, generator=generator) + shift}, "mean") for shift in (2.0, -2.0)]
    concept = Concept.from_activations("nowhere", *sides)
    concept.save(tmp_path / "c")
    sides[0].save(tmp_path / "a")
    assert load(tmp_path / "c").fingerprint is None
    assert same_bits(load(tmp_path / "c")[5].weight, concept[5].weight)
    assert same_bits(load(tmp_path / "a")[5], sides[0][5])


def test_a_recording_of_ten_layers_keeps_their_order(tmp_path):
    """Tensors are sorted by name in the file, and "layer.10" comes before "layer.2"."""
    states = {layer: torch.full((2, 3), float(layer)) for layer in range(12)}
    Activations(states, "last").save(tmp_path / "a")
    back = load(tmp_path / "a")
    assert back.layers == tuple(range(12))
    assert all(float(back[layer][0, 0]) == layer for layer in range(12))


def test_what_is_loaded_steers_as_what_was_saved(concept, tmp_path):
    model = tiny_model("llama")
    concept.save(tmp_path / "c")
    ids = torch.tensor([[5, 6, 7]])

    def logits(used: Concept) -> Tensor:
        with torch.no_grad(), Controller(model, [used.constrain(at_least=0.999, layers=[2])]):
            return model(ids).logits

    with torch.no_grad():
        assert not torch.equal(logits(concept), model(ids).logits)
    assert torch.equal(logits(concept), logits(load(tmp_path / "c", model)))


def test_views_and_shared_tensors_can_be_saved(tmp_path):
    whole = torch.randn(6, 8)
    Activations({0: whole[::2, 1:4], 1: whole[1::2, 1:4], 2: whole[::2, 1:4]}, "last").save(tmp_path / "a")
    assert torch.equal(load(tmp_path / "a")[2], whole[::2, 1:4])


def test_a_seed_of_numpy_can_be_saved(recording, tmp_path):
    half = dataclasses.replace(recording, states={0: recording[0] + 3}, digests=())
    other = dataclasses.replace(recording, states={0: recording[0] - 3}, digests=())
    Concept.from_activations("c", half, other, seed=np.int64(3)).save(tmp_path / "c")  # type: ignore[arg-type]
    assert load(tmp_path / "c").made["seed"] == 3


@pytest.mark.parametrize("kind", [str, Path, os.fspath], ids=["str", "Path", "fspath"])
def test_paths_of_any_kind(artefact, tmp_path, kind):
    path = kind(tmp_path / "ünï cöde.safetensors")
    artefact.save(path)
    assert type(load(path)) is type(artefact)


def test_a_name_as_long_as_the_file_system_allows(recording, tmp_path):
    """The temporary file beside it must not have a name that is too long."""
    path = tmp_path / ("n" * 250)
    recording.save(path)
    assert len(load(path)) == len(recording)


# --- damaged and foreign files ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(artefact: Any, tmp_path: Path) -> Path:
    path = tmp_path / "artefact.safetensors"
    artefact.save(path)
    return path


def refused(path: Path, message: str = "", **arguments: Any) -> SteerkitError:
    with pytest.raises(SteerkitError, match=message or None) as caught:
        load(path, **arguments)
    return caught.value


def test_truncated_at_any_place(saved):
    blob = saved.read_bytes()
    lengths = {*range(64), *range(0, len(blob), max(1, len(blob) // 60)), len(blob) - 1, len(blob) - 8}
    for length in sorted(lengths):
        saved.write_bytes(blob[:length])
        refused(saved, "must be a safetensors file")


def test_with_bytes_behind_its_end(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")
    refused(saved, "must be a safetensors file")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_bytes_replaced(saved, data):
    """In the tensors a flip may go unseen; anywhere else the file is refused or means the same kind of thing."""
    original = saved.read_bytes()
    blob = bytearray(original)
    head = 8 + struct.unpack("<Q", original[:8])[0]
    places = st.one_of(st.integers(0, head - 1), st.integers(0, 15), st.integers(0, len(blob) - 1))
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(places)] = data.draw(st.integers(0, 255))
    saved.write_bytes(bytes(blob))
    try:
        found = load(saved)
    except SteerkitError:
        pass
    else:
        assert isinstance(found, Concept | Activations)
    finally:
        saved.write_bytes(original)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blob=st.binary(max_size=200))
def test_random_bytes(tmp_path, blob):
    (tmp_path / "any").write_bytes(blob)
    refused(tmp_path / "any", "must be a safetensors file|without its header")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_random_headers(tmp_path, text):
    refused(forge(tmp_path / "any", text, {"weight": torch.zeros(1)}))


def test_files_of_other_formats(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog.\n" * 9)
    (tmp_path / "json").write_text('{"kind": "concept"}')
    with (tmp_path / "pickle").open("wb") as file:
        pickle.dump({"weight": [1, 2, 3]}, file)
    torch.save({"weight": torch.ones(3)}, tmp_path / "torch")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("weight", "1 2 3")
    for name, found in {
        "empty": "an empty file",
        "text": "truncated, damaged or foreign",
        "json": "truncated, damaged or foreign",
        "pickle": "pickle or zip archive, which is never opened",
        "torch": "pickle or zip archive",
        "zip": "pickle or zip archive",
    }.items():
        refused(tmp_path / name, found)


def test_a_pickle_is_never_executed(tmp_path):
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    for writer in (lambda f: pickle.dump(Bomb(), f), lambda f: torch.save(Bomb(), f)):
        with (tmp_path / "bomb").open("wb") as file:
            writer(file)
        refused(tmp_path / "bomb", "never opened")
    assert not (tmp_path / "executed").exists()


def test_paths_that_are_no_file(tmp_path):
    refused(tmp_path, "Found the folder")
    refused(tmp_path / "missing", "does not exist")
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "below", "does not exist")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "dangling", "does not exist")


def test_a_name_that_is_too_long_for_a_file(recording, tmp_path):
    path = tmp_path / ("n" * 300)
    refused(path)
    with pytest.raises(ArtefactError):
        recording.save(path)


def test_a_file_that_cannot_be_read(saved):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    saved.chmod(0)
    refused(saved)


def test_a_safetensors_file_without_our_header(tmp_path):
    (tmp_path / "plain").write_bytes(save({"weight": torch.ones(2)}))
    refused(tmp_path / "plain", "Found a safetensors file without its header")
    (tmp_path / "other").write_bytes(save({"weight": torch.ones(2)}, metadata={"format": "pt"}))
    refused(tmp_path / "other", "Found a safetensors file without its header")


def test_a_newer_format_says_so(saved):
    header, tensors = parts(saved)
    refused(forge(saved, {**header, "format": 2}, tensors), r"has format 2; this steerkit .* reads up to 1. Upgrade")


def test_an_unknown_kind_says_so(saved):
    header, tensors = parts(saved)
    refused(forge(saved, {**header, "kind": "vector2"}, tensors), "Found 'vector2'")


def test_one_kind_is_not_read_as_the_other(saved):
    header, tensors = parts(saved)
    other = {"concept": "activations", "activations": "concept"}[header["kind"]]
    refused(forge(saved, {**header, "kind": other}, tensors))


HEADERS = {
    "empty text": "",
    "no JSON": "{kind: concept}",
    "null": "null",
    "a number": "1",
    "a list": "[]",
    "a string": '"kind"',
    "empty object": "{}",
    "no format": '{"kind": "concept"}',
    "kind of another type": '{"kind": ["concept"], "format": 1}',
    "format of another type": '{"kind": "concept", "format": "1"}',
    "format that is no integer": '{"kind": "concept", "format": 1.5}',
    "format infinity": '{"kind": "concept", "format": 1e999}',
    "format of a thousand digits": '{"kind": "concept", "format": ' + "9" * 1000 + "}",
    "format of ten thousand digits": '{"kind": "concept", "format": ' + "9" * 10000 + "}",
    "format below one": '{"kind": "concept", "format": -1}',
    "deep list": '{"kind": "concept", "format": 1, "layers": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "only kind and format": '{"kind": "concept", "format": 1}',
    "only kind and format of a recording": '{"kind": "activations", "format": 1}',
}


@pytest.mark.parametrize("text", HEADERS.values(), ids=HEADERS.keys())
def test_damaged_headers(tmp_path, text):
    refused(forge(tmp_path / "forged", text, {"weight": torch.zeros(1, 4)}))


@pytest.mark.parametrize("depth", [50, 150, 300, 500, 700, 850, 950, 1500])
@pytest.mark.parametrize("entry", ["layers", "name", "figures", "base_model", "digests", "made"])
def test_nesting_of_any_depth(concept, tmp_path, entry, depth):
    """Deep enough to break what shows the value, not deep enough to break the parser."""
    concept.save(tmp_path / "c")
    header, tensors = parts(tmp_path / "c")
    marked = json.dumps({**header, entry: "HERE"}).replace('"HERE"', "[" * depth + "]" * depth)
    forge(tmp_path / "c", marked, tensors)
    if entry == "digests":  # no part of a concept
        try:
            load(tmp_path / "c")
        except SteerkitError:
            assert depth > 500
    else:
        refused(tmp_path / "c")


HUGE = 10**400


def short(value: Any) -> str:
    return str(value).replace(str(HUGE), "HUGE")[:40]


WRONG: dict[str, Any] = {
    "name": [None, 3, ["liked"], {}],
    "layers": [
        None,
        3,
        "02",
        {},
        [],
        [0],
        [0, 2, 3],
        [2, 0],
        [0, 0],
        [-1, 2],
        [0, 99],
        ["0", "2"],
        [0, 2.0],
        [0, None],
        [[0], [2]],
        [0, HUGE],
        [True, 2],
        [math.nan, 2],
    ],
    "direction": [None, 3, "", "cav", ["probe"], "PROBE"],
    "depth": [None, "4", 4.0, 0, 1, -4, math.nan, [4]],
    "figures": [None, {}, [], [{}, {}], [None, None], [1, 2], ["ab", "cd"], "figures"],
    "made": [None, [], "made", 3],
    "base_model": [
        None,
        [],
        "llama",
        {},
        {"digest": 1, "name": "n", "depth": 4, "d_model": 32},
        {"digest": "d", "name": None, "depth": 4, "d_model": 32},
        {"digest": "d", "name": "n", "depth": "4", "d_model": 32},
    ],
}


@pytest.mark.parametrize(("entry", "value"), [(k, v) for k, values in WRONG.items() for v in values], ids=short)
def test_a_concept_with_a_wrong_entry(concept, tmp_path, entry, value):
    concept.save(tmp_path / "c")
    header, tensors = parts(tmp_path / "c")
    refused(forge(tmp_path / "c", {**header, entry: value}, tensors))


@pytest.mark.parametrize("entry", ["name", "layers", "direction", "depth", "figures", "made"])
def test_a_concept_without_an_entry(concept, tmp_path, entry):
    concept.save(tmp_path / "c")
    header, tensors = parts(tmp_path / "c")
    del header[entry]
    refused(forge(tmp_path / "c", header, tensors), entry)


FIGURES: list[tuple[str, Any]] = [
    *(("accuracy", value) for value in (None, "high", [], [0.5], {}, HUGE, math.nan, math.inf)),
    *(
        ("auc_interval", value)
        for value in (None, 0.5, [], [0.1], [0.1, 0.2, 0.3], ["a", "b"], [0.1, None], [0.1, HUGE])
    ),
    ("standard_error", -HUGE),
]


@pytest.mark.parametrize(("name", "value"), FIGURES, ids=short)
def test_a_concept_with_a_wrong_figure(concept, tmp_path, name, value):
    concept.save(tmp_path / "c")
    header, tensors = parts(tmp_path / "c")
    header["figures"][1][name] = value
    refused(forge(tmp_path / "c", header, tensors), "figures|consistent")


def test_figures_of_nan_leave_no_concept_without_steering_layers(concept, tmp_path):
    """`steering_layers` is never empty."""
    concept.save(tmp_path / "c")
    header, tensors = parts(tmp_path / "c")
    for entry in header["figures"]:
        entry["standard_error"] = math.nan
    refused(forge(tmp_path / "c", header, tensors))


def without(name: str) -> Change:
    return lambda header, tensors: tensors.pop(name)


def put(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    def apply(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return apply


def poison(value: float) -> Callable[[Tensor], Tensor]:
    def apply(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[1] = value
        return tensor

    return apply


CONCEPT_TENSORS = ["weight", "bias", "norm", "direction.probe", "direction.pattern", "direction.mean_difference"]
RESHAPED: dict[str, Callable[[Tensor], Tensor]] = {
    "a row less": lambda t: t[:-1],
    "a row more": lambda t: torch.cat([t, t[:1]]),
    "a dimension more": lambda t: t[None],
    "a dimension less": lambda t: t.flatten()[0],
    "empty": lambda t: t[:0],
}


@pytest.mark.parametrize("name", [*CONCEPT_TENSORS, "base_model.values"])
def test_a_concept_without_a_tensor(concept, tmp_path, name):
    concept.save(tmp_path / "c")
    header, tensors = parts(tmp_path / "c")
    del tensors[name]
    refused(forge(tmp_path / "c", header, tensors), f"no tensor '{name}'")


@pytest.mark.parametrize("change", RESHAPED.values(), ids=RESHAPED.keys())
@pytest.mark.parametrize("name", CONCEPT_TENSORS)
def test_a_concept_with_a_tensor_of_another_shape(concept, tmp_path, name, change):
    concept.save(tmp_path / "c")
    header, tensors = parts(tmp_path / "c")
    tensors[name] = change(tensors[name])
    refused(forge(tmp_path / "c", header, tensors), "shape|consistent")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", CONCEPT_TENSORS)
def test_a_concept_with_values_that_are_not_finite(concept, tmp_path, name, value):
    concept.save(tmp_path / "c")
    header, tensors = parts(tmp_path / "c")
    tensors[name] = poison(value)(tensors[name])
    refused(forge(tmp_path / "c", header, tensors), "not finite")


@pytest.mark.parametrize("kind", CONCEPT_TENSORS[3:])
def test_a_concept_with_a_direction_of_another_width(concept, tmp_path, kind):
    concept.save(tmp_path / "c")
    header, tensors = parts(tmp_path / "c")
    tensors[kind] = tensors[kind][:, :-1]
    refused(forge(tmp_path / "c", header, tensors), "shape")


def test_a_concept_of_no_width(concept, tmp_path):
    concept.save(tmp_path / "c")
    header, tensors = parts(tmp_path / "c")
    for name in ("weight", *CONCEPT_TENSORS[3:]):
        tensors[name] = tensors[name][:, :0]
    refused(forge(tmp_path / "c", header, tensors))


DTYPES = [torch.bool, torch.uint8, torch.int64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["weight", "bias", "direction.pattern"])
def test_a_concept_with_tensors_of_another_kind(concept, tmp_path, name, dtype):
    concept.save(tmp_path / "c")
    header, tensors = parts(tmp_path / "c")
    tensors[name] = tensors[name].to(dtype)
    refused(forge(tmp_path / "c", header, tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_are_refused_or_read_as_float32(concept, tmp_path, dtype):
    """A concept whose probe cannot be applied to hidden states would fail much later."""
    concept.save(tmp_path / "c")
    header, tensors = parts(tmp_path / "c")
    forge(tmp_path / "c", header, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    try:
        back = load(tmp_path / "c")
    except SteerkitError:
        return
    assert back[0].weight.dtype == torch.float32
    assert torch.isfinite(back[0].logit(torch.randn(3, 32))).all()


@pytest.mark.parametrize(
    "dtype", ["BOOL", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "U16", "U32", "U64", "C64", "F8_E4M3", "F8_E5M2FNUZ", "X9"]
)
def test_dtypes_that_torch_may_not_have(tmp_path, dtype):
    bits = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "U32": 32, "U64": 64, "C64": 64}.get(dtype, 8)
    header = json.dumps({"kind": "activations", "format": 1, "layers": [0], "read": "last", "digests": []})
    entries = {
        "__metadata__": {"steerkit": header},
        "layer.0": {"dtype": dtype, "shape": [8, 8], "data_offsets": [0, 8 * bits]},
    }
    (tmp_path / "c").write_bytes(raw_safetensors(entries, bytes(8 * bits)))
    refused(tmp_path / "c")


OVERSIZED = {
    "offsets far away": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
    "a product that overflows": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]},
    "negative": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
    "backwards": {"dtype": "F32", "shape": [0], "data_offsets": [4, 0]},
    "no shape": {"dtype": "F32", "data_offsets": [0, 4]},
}


@pytest.mark.parametrize("entry", OVERSIZED.values(), ids=OVERSIZED.keys())
def test_tensors_that_do_not_lie_in_the_file(tmp_path, entry):
    (tmp_path / "c").write_bytes(raw_safetensors({"__metadata__": {"steerkit": "{}"}, "layer.0": entry}, bytes(4)))
    refused(tmp_path / "c", "must be a safetensors file")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 100, 2])
def test_a_header_length_that_lies(saved, length):
    saved.write_bytes(struct.pack("<Q", length) + saved.read_bytes()[8:])
    refused(saved, "must be a safetensors file")


RECORDING: dict[str, Change] = {
    "another reading": lambda h, t: h.update(read="first"),
    "reading of another type": lambda h, t: h.update(read=1),
    "no layers": lambda h, t: h.update(layers=[]),
    "layers of another type": lambda h, t: h.update(layers="02"),
    "layers of strings": lambda h, t: h.update(layers=["0", "2"]),
    "unordered layers": lambda h, t: h.update(layers=[2, 0]),
    "a layer twice": lambda h, t: h.update(layers=[0, 0]),
    "a negative layer": lambda h, t: (h.update(layers=[-1, 2]), t.update({"layer.-1": t.pop("layer.0")})),
    "a layer that is not there": lambda h, t: h.update(layers=[0, 1]),
    "a layer beyond its model": lambda h, t: (h.update(layers=[0, 9]), t.update({"layer.9": t.pop("layer.2")})),
    "digests of another type": lambda h, t: h.update(digests="abc"),
    "fewer digests than texts": lambda h, t: h.update(digests=h["digests"][:-1]),
    "more digests than texts": lambda h, t: h.update(digests=[*h["digests"], "x"]),
    "a layer less": without("layer.2"),
    "a text less in one layer": put("layer.2", lambda x: x[:-1]),
    "another width in one layer": put("layer.2", lambda x: x[:, :-1]),
    "a layer of one dimension": put("layer.2", lambda x: x[0]),
    "NaN": put("layer.0", poison(math.nan)),
    "infinity": put("layer.0", poison(math.inf)),
    "integers": put("layer.0", lambda x: x.long()),
    "no texts": lambda h, t: (
        h.update(digests=[]),
        t.update({k: v[:0] for k, v in t.items() if k.startswith("layer")}),
    ),
}


@pytest.mark.parametrize("change", RECORDING.values(), ids=RECORDING.keys())
def test_a_recording_that_is_not_consistent(recording, tmp_path, change):
    recording.save(tmp_path / "a")
    header, tensors = parts(tmp_path / "a")
    change(header, tensors)
    refused(forge(tmp_path / "a", header, tensors))


FINGERPRINTS: dict[str, Change] = {
    "values of another length": put("base_model.values", lambda v: v[:3]),
    "one value": put("base_model.values", lambda v: v[:1]),
    "no values": put("base_model.values", lambda v: v[:0]),
    "values of two dimensions": put("base_model.values", lambda v: v[None]),
    "integers": put("base_model.values", lambda v: v.long()),
    "another width than the probes": lambda h, t: h["base_model"].update(d_model=7),
    "another depth than the concept": lambda h, t: h["base_model"].update(depth=1),
    "a depth of True": lambda h, t: h["base_model"].update(depth=True),
}


@pytest.mark.parametrize("change", FINGERPRINTS.values(), ids=FINGERPRINTS.keys())
def test_a_fingerprint_that_is_not_one(concept, tmp_path, change):
    concept.save(tmp_path / "c")
    header, tensors = parts(tmp_path / "c")
    change(header, tensors)
    refused(forge(tmp_path / "c", header, tensors), model=tiny_model("llama"))


def test_a_file_that_changes_hands_keeps_no_local_path(concept, tmp_path):
    """A file tells which model it belongs to, not where that lay on somebody's disk."""
    model = tiny_model("llama")
    model.config._name_or_path = "/home/somebody/models/llama-tiny"
    record(model, tiny_tokenizer(), TEXTS[:2]).save(tmp_path / "a")
    assert b"somebody" not in (tmp_path / "a").read_bytes()
    assert load(tmp_path / "a").fingerprint.name == "llama-tiny"


# --- writes that fail -------------------------------------------------------------------------------------------------


def left_intact(path: Path, blob: bytes) -> None:
    assert path.read_bytes() == blob
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "a temporary file was left behind"


def no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def changed(artefact: Any) -> Any:
    """Another artefact of the same kind."""
    if isinstance(artefact, Concept):
        return artefact.along("mean_difference")
    return dataclasses.replace(artefact, read="mean")


@pytest.mark.parametrize("function", ["fsync", "replace", "chmod"])
def test_a_full_disk_leaves_the_old_file(saved, changed, monkeypatch, function):
    blob = saved.read_bytes()
    monkeypatch.setattr(storage.os, function, no_space)
    with pytest.raises(ArtefactError, match=r"No space left on device.*Nothing was changed"):
        changed.save(saved)
    monkeypatch.undo()
    left_intact(saved, blob)


def test_a_write_that_fails_half_way_leaves_the_old_file(saved, changed, monkeypatch):
    blob = saved.read_bytes()
    opened = os.fdopen

    def half(handle: int, *args: Any, **kwargs: Any) -> Any:
        file = opened(handle, *args, **kwargs)
        file.write(b"half")
        file.flush()
        file.close()
        return _Full()

    class _Full:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            return None

        write = no_space

    monkeypatch.setattr(storage.os, "fdopen", half)
    with pytest.raises(ArtefactError, match="No space left"):
        changed.save(saved)
    monkeypatch.undo()
    left_intact(saved, blob)


def test_an_interrupted_write_leaves_the_old_file(saved, changed, monkeypatch):
    blob = saved.read_bytes()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        changed.save(saved)
    monkeypatch.undo()
    left_intact(saved, blob)


def test_a_first_write_that_fails_leaves_nothing(artefact, tmp_path, monkeypatch):
    monkeypatch.setattr(storage.os, "fsync", no_space)
    with pytest.raises(ArtefactError):
        artefact.save(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_file_is_not_replaced(saved, changed):
    blob = saved.read_bytes()
    saved.chmod(0o444)
    with pytest.raises(ArtefactError, match=r"read-only file\. Choose another path"):
        changed.save(saved)
    left_intact(saved, blob)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o444


def test_a_missing_folder_is_not_made(artefact, tmp_path):
    with pytest.raises(ArtefactError, match="must exist"):
        artefact.save(tmp_path / "missing" / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_file(artefact, tmp_path):
    with pytest.raises(ArtefactError, match="Found the folder"):
        artefact.save(tmp_path)


def test_a_concept_that_cannot_be_stored_leaves_the_old_file(concept, tmp_path):
    """Figures that are no numbers have no place in the header."""
    path = tmp_path / "c"
    concept.save(path)
    blob = path.read_bytes()
    figures = {layer: dataclasses.replace(f, accuracy=math.nan) for layer, f in concept.figures.items()}
    with pytest.raises((SteerkitError, ValueError)):
        dataclasses.replace(concept, figures=figures).save(path)
    left_intact(path, blob)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o660])
def test_permissions_are_kept(saved, changed, mode):
    saved.chmod(mode)
    blob = saved.read_bytes()
    changed.save(saved)
    assert stat.S_IMODE(saved.stat().st_mode) == mode
    assert saved.read_bytes() != blob


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_permissions_of_the_umask(artefact, tmp_path, umask):
    before = os.umask(umask)
    try:
        artefact.save(tmp_path / "new")
        assert os.umask(umask) == umask, "saving changed the umask"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask


def test_a_save_replaces_and_leaves_one_file(saved, changed):
    changed.save(saved)
    left_intact(saved, saved.read_bytes())
    assert type(load(saved)) is type(changed)


# --- the base model ---------------------------------------------------------------------------------------------------


def jittered(scale: float) -> Any:
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + scale * torch.randn(parameter.shape, generator=generator))
    return model


def other_weights() -> Any:
    model = tiny_model("llama")
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return model


@pytest.mark.parametrize("path", ["load", "controller"])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "qwen2"])
def test_another_architecture_is_refused(concept, tmp_path, name, path):
    concept.save(tmp_path / "c")
    model = tiny_model(name)
    if name == "mistral":  # the same names and shapes: its weights are what differs
        model = other_weights()
    with pytest.raises(BaseModelMismatchError, match="'liked' was extracted from base model") as caught:
        load(tmp_path / "c", model) if path == "load" else Controller(model, [load(tmp_path / "c").erase()])
    assert caught.value.expected == concept.fingerprint.digest
    assert (caught.value.found == caught.value.expected) is (name == "mistral")


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64, torch.float32], ids=str)
def test_casts_of_the_same_model_are_the_same_model(saved, cast):
    load(saved, tiny_model("llama").to(cast))


def test_two_casts_in_a_row_are_the_same_model(tmp_path):
    """Recorded in bfloat16, used in float16."""
    record(tiny_model("llama").to(torch.bfloat16), tiny_tokenizer(), TEXTS[:2]).save(tmp_path / "a")
    load(tmp_path / "a", tiny_model("llama").to(torch.float16))
    load(tmp_path / "a", tiny_model("llama"))


def test_a_light_change_passes_and_a_heavy_one_does_not(saved):
    """The documented limit of the fingerprint, from both sides."""
    load(saved, jittered(1e-4))
    with pytest.raises(BaseModelMismatchError, match=r"with other weights: \d+ of 256 sampled weights differ"):
        load(saved, jittered(0.1))


def test_check_model_false_adopts_the_model(saved):
    model = other_weights()
    with pytest.raises(BaseModelMismatchError, match="check_model=False"):
        load(saved, model)
    adopted = load(saved, model, check_model=False)
    own = record(model, tiny_tokenizer(), TEXTS[:1]).fingerprint
    adopted.fingerprint.check(own, "adopted")
    with pytest.raises(BaseModelMismatchError):
        adopted.fingerprint.check(load(saved).fingerprint, "adopted")


def test_a_concept_without_a_fingerprint_loads_on_any_model(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sides = [Activations({1: torch.randn(30, 32, generator=generator) + shift}, "last") for shift in (2.0, -2.0)]
    Concept.from_activations("free", *sides).save(tmp_path / "c")
    assert load(tmp_path / "c", tiny_model("gpt2")).fingerprint is None


def test_loading_does_not_run_or_change_the_model(saved):
    model = tiny_model("llama")
    load(saved, model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    load(saved, model)
    assert calls == []
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_flipped_bit_anywhere_in_the_values_is_noticed(artefact, tmp_path):
    path = tmp_path / "flipped.safetensors"
    artefact.save(path)
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in range(start, len(whole), max(1, (len(whole) - start) // 25)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ArtefactError, match="damaged"):
            load(path)
