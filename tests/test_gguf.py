"""Control vectors as GGUF: the conventions of repeng and llama.cpp, bit-exact round trips, files that lie are refused."""

import dataclasses
import errno
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import D_MODEL, DEPTH, tiny_model, tiny_tokenizer
from torch import Tensor

from steerkit import Concept, Controller, record
from steerkit.errors import AmountError, ArtefactError, BaseModelMismatchError, LayerError
from steerkit.model import Fingerprint, find_decoder

package = pytest.importorskip("gguf")
gguf = pytest.importorskip("steerkit.integrations.gguf")

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])


def directions(layers: Sequence[int] = (1, 3), width: int = D_MODEL, seed: int = 0) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(width, generator=generator) * (1 + layer) for layer in layers}


def happy(model: Any = None, layers: Sequence[int] = (1, 3)) -> Any:
    base = None if model is None else Fingerprint.of(model)
    return gguf.ControlVector("happy", directions(layers), "llama", base)


def as_others_write(path: Path, tensors: Mapping[str, Any], hint: str | None = "mistral", kind: str = "controlvector"):
    """What repeng's `export_gguf` and llama.cpp's generator put into a file."""
    writer = package.GGUFWriter(path, kind)
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.asarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def by_hand(model: Any, steps: Mapping[int, Tensor]) -> Tensor:
    """Logits with `"batch d_model"` or `"d_model"` added after blocks by plain hooks, as repeng does."""
    blocks = find_decoder(model).blocks

    def adding(step: Tensor) -> Any:
        shift = step if step.ndim == 1 else step[:, None]

        def hook(module: Any, args: Any, output: Any) -> Any:
            return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift

        return hook

    handles = [blocks[layer].register_forward_hook(adding(step)) for layer, step in steps.items()]
    try:
        return model(input_ids=IDS).logits
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def steered(model: Any, intervention: Any) -> Tensor:
    with Controller(model, [intervention]):
        return model(input_ids=IDS).logits


# What the others write and read.


def test_a_file_as_repeng_writes_it_is_read(tmp_path):
    given = directions((3, 1, 2))
    path = as_others_write(tmp_path / "joy.gguf", {f"direction.{layer}": step for layer, step in given.items()})
    vector = gguf.read(path)
    assert (vector.name, vector.model_hint, vector.fingerprint, vector.layers) == ("joy", "mistral", None, (1, 2, 3))
    assert all(torch.equal(vector.directions[layer], given[layer]) for layer in given)
    assert vector.norms == pytest.approx({layer: float(given[layer].norm()) for layer in given}, rel=1e-6)


def test_a_file_without_a_hint_is_read(tmp_path):
    assert gguf.read(as_others_write(tmp_path / "v.gguf", {"direction.1": torch.ones(4)}, None)).model_hint == "unknown"


def test_a_file_is_written_as_repeng_and_llama_cpp_read_it(tmp_path):
    vector = happy(tiny_model("llama"))
    gguf.write(tmp_path / "v.gguf", vector)
    reader = package.GGUFReader(tmp_path / "v.gguf")
    texts = {key: bytes(reader.fields[key].parts[-1]).decode() for key in ("general.architecture", "general.name")}
    assert texts == {"general.architecture": "controlvector", "general.name": "happy"}
    assert bytes(reader.fields["controlvector.model_hint"].parts[-1]) == b"llama"
    count = reader.fields["controlvector.layer_count"]
    assert (int(count.parts[-1][0]), count.types) == (2, [package.GGUFValueType.UINT32])
    # llama.cpp refuses a file with any other tensor, in any other type, of any other shape.
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.3"]
    for tensor, (layer, step) in zip(reader.tensors, sorted(vector.directions.items()), strict=True):
        assert tensor.tensor_type == package.GGMLQuantizationType.F32
        assert tensor.shape.tolist() == [D_MODEL]
        assert tensor.data.tobytes() == step.numpy().tobytes(), layer


def test_big_endian_files_are_read(tmp_path):
    step = directions((1,))[1]
    writer = package.GGUFWriter(tmp_path / "v.gguf", "controlvector", endianess=package.GGUFEndian.BIG)
    writer.add_tensor("direction.1", step.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert torch.equal(gguf.read(tmp_path / "v.gguf").directions[1], step)


@pytest.mark.parametrize("known", [True, False])
def test_a_vector_comes_back_bit_for_bit(tmp_path, known):
    model = tiny_model("llama")
    given = directions((3, 1))
    given[1][:5] = torch.tensor([-0.0, 1e-45, -3.4e38, 1e-38, 0.0])
    vector = gguf.ControlVector("joie de vivre ☀", given, "llama", Fingerprint.of(model) if known else None)
    gguf.write(tmp_path / "v.gguf", vector)
    back = gguf.read(tmp_path / "v.gguf")
    assert (back.name, back.model_hint, back.layers) == (vector.name, "llama", (1, 3))
    for layer, step in given.items():
        assert back.directions[layer].dtype == torch.float32
        assert back.directions[layer].numpy().tobytes() == step.numpy().tobytes()
    if known:
        assert back.fingerprint.header() == vector.fingerprint.header()
        assert back.fingerprint.values.numpy().tobytes() == vector.fingerprint.values.numpy().tobytes()
    else:
        assert back.fingerprint is None
    gguf.write(tmp_path / "again.gguf", back)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "v.gguf").read_bytes()


def test_what_was_read_does_not_hang_on_the_file(tmp_path):
    gguf.write(tmp_path / "v.gguf", happy())
    vector = gguf.read(tmp_path / "v.gguf")
    (tmp_path / "v.gguf").write_bytes(b"")
    assert torch.equal(vector.directions[3], directions()[3])
    vector.directions[3][0] = 1.0  # its own memory, to write to


# The same steering as by hand.


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("coefficient", [1.0, -0.7])
def test_a_coefficient_is_what_a_hook_by_hand_adds(tmp_path, name, coefficient):
    model = tiny_model(name)
    path = as_others_write(tmp_path / "v.gguf", {f"direction.{k}": v for k, v in directions((1, 2, 3)).items()})
    vector = gguf.read(path, model)
    expected = by_hand(model, {layer: coefficient * step for layer, step in vector.directions.items()})
    found = steered(model, vector.add(coefficient))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, by_hand(model, {}), atol=1e-2)


@pytest.mark.parametrize(
    ("magnitude", "layers", "steps"),
    [
        (0.5, None, {1: [0.5] * 3, 3: [0.5] * 3}),
        (0.5, -1, {3: [0.5] * 3}),
        ([0.0, 1.0, -2.0], None, {1: [0.0, 1.0, -2.0], 3: [0.0, 1.0, -2.0]}),
        ({3: 0.5}, None, {3: [0.5] * 3}),
        ({1: 2.0, -1: [0.0, 1.0, 2.0]}, None, {1: [2.0] * 3, 3: [0.0, 1.0, 2.0]}),
        (torch.tensor([[1.0, 2.0], [0.0, 0.5], [-1.0, 0.0]]), (3, 1), {3: [1.0, 0.0, -1.0], 1: [2.0, 0.5, 0.0]}),
    ],
)
def test_magnitudes_for_each_sample_and_layer(magnitude, layers, steps):
    model = tiny_model("llama")
    vector = happy(model)
    expected = {layer: torch.tensor(each)[:, None] * vector.directions[layer] for layer, each in steps.items()}
    found = steered(model, vector.add(magnitude, layers=layers))
    torch.testing.assert_close(found, by_hand(model, expected), rtol=1e-4, atol=1e-4)


def test_an_addition_has_unit_directions_and_takes_other_coefficients_later():
    model = tiny_model("llama")
    vector = happy()
    addition = vector.add(1.0, name="joy", positions="last")
    assert (addition.name, addition.positions, addition.layers) == ("joy", "last", (1, 3))
    assert all(float(unit.norm()) == pytest.approx(1, abs=1e-6) for unit in addition.directions.values())
    assert addition.amount == pytest.approx(vector.norms)
    with torch.no_grad(), Controller(model, [vector.add(0.0)]) as control, control.using(happy=vector.add(2.0).amount):
        found = model(input_ids=IDS).logits
    expected = by_hand(model, {layer: 2 * step for layer, step in vector.directions.items()})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_direction_of_zeros_adds_nothing():
    model = tiny_model("llama")
    given = {**directions((1,)), 2: torch.zeros(D_MODEL)}
    found = steered(model, gguf.ControlVector("v", given).add(1.0))
    torch.testing.assert_close(found, by_hand(model, {1: given[1]}), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("magnitude", [3.0, {1: 2.0, 2: -4.0}])
def test_a_concept_exported_steers_as_the_concept(tmp_path, magnitude):
    model = tiny_model("llama")
    both = record(model, tiny_tokenizer(), [f"w{i} w{2 * i}" for i in range(24)])
    sides = [
        dataclasses.replace(both, states={k: both[k][rows] + shift for k in both.layers}, digests=both.digests[rows])
        for rows, shift in ((slice(0, 12), 2.0), (slice(12, None), -2.0))
    ]
    concept = Concept.from_activations("liked", *sides, direction="pattern")
    if isinstance(magnitude, float):
        concept = dataclasses.replace(concept, probes={k: concept[k] for k in (1, 2, 3)})  # the best one can be written
    vector = gguf.ControlVector.of(concept, magnitude)
    assert (vector.name, vector.model_hint, vector.fingerprint) == ("liked", "LlamaForCausalLM", concept.fingerprint)
    steps = magnitude if isinstance(magnitude, dict) else {concept.best_layer: magnitude}
    assert vector.norms == pytest.approx({layer: abs(step) for layer, step in steps.items()})
    gguf.write(tmp_path / "v.gguf", vector)
    back = gguf.read(tmp_path / "v.gguf", model)
    expected = steered(model, concept.add(magnitude))
    torch.testing.assert_close(steered(model, back.add(1.0)), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(by_hand(model, back.directions), expected), (
        "what others add is what the concept adds, bit for bit"
    )
    with pytest.raises(AmountError, match="one for each of 2 samples"):
        gguf.ControlVector.of(concept, [1.0, 2.0])


# Another model.


def test_width_and_depth_are_checked(tmp_path):
    wide = as_others_write(tmp_path / "wide.gguf", {"direction.1": torch.ones(D_MODEL + 1)})
    deep = as_others_write(tmp_path / "deep.gguf", {f"direction.{DEPTH}": torch.ones(D_MODEL)})
    for path, error, words in ((wide, BaseModelMismatchError, "width 33"), (deep, LayerError, "Layer 4 of 'deep'")):
        assert gguf.read(path).layers
        for checked in (True, False):
            with pytest.raises(error, match=words):
                gguf.read(path, tiny_model("llama"), check_model=checked)


def test_another_base_model_is_refused_where_it_is_known(tmp_path):
    llama, other = tiny_model("llama"), tiny_model("qwen2")
    gguf.write(tmp_path / "v.gguf", happy(llama))
    assert gguf.read(tmp_path / "v.gguf", llama).fingerprint is not None
    assert gguf.read(tmp_path / "v.gguf", llama.bfloat16()).fingerprint is not None
    with pytest.raises(BaseModelMismatchError, match="'happy' was extracted from"):
        gguf.read(tmp_path / "v.gguf", other)
    adopted = gguf.read(tmp_path / "v.gguf", other, check_model=False)
    assert adopted.fingerprint.digest == Fingerprint.of(other).digest
    steered(other, adopted.add(1.0))
    with pytest.raises(BaseModelMismatchError):
        steered(other, gguf.read(tmp_path / "v.gguf").add(1.0))


# Files that lie.


def refused(path: Path, words: str = "must be a GGUF control vector") -> None:
    with pytest.raises(ArtefactError, match=words) as caught:
        gguf.read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


F32 = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "no direction"),
        ({"direction.1": F32.astype(np.float16)}, "F16"),
        ({"direction.1": F32.astype(np.float64)}, "F64"),
        ({"direction.1": F32.astype(np.int32)}, "I32"),
        ({"direction.1": F32.reshape(2, 2)}, r"shape \[2, 2\]"),
        ({"direction.1": F32.reshape(1, 4)}, r"shape \[4, 1\]"),
        ({"direction.1": np.zeros(0, np.float32)}, "width of 0"),
        ({"direction.1": F32, "direction.2": np.ones(5, np.float32)}, "width of 5"),
        ({"direction.1": F32 * np.nan}, "NaN or infinity at layer 1"),
        ({"direction.1": F32, "direction.2": F32 * np.inf}, "NaN or infinity at layer 2"),
        ({"direction.x": F32}, "direction.x"),
        ({"direction.-1": F32}, "direction.-1"),
        ({"direction.1": F32, "direction.01": F32}, "one direction.<layer>"),
        ({"direction.1.5": F32}, "direction.1.5"),
        ({"direction.²": F32}, "direction"),
        ({"direction": F32}, "direction"),
        ({"direction.1": F32, "output.weight": F32}, "output.weight"),
        ({"direction." + "9" * 5000: F32}, "digits"),
    ],
)
def test_tensors_that_are_no_directions(tmp_path, tensors, words):
    refused(as_others_write(tmp_path / "v.gguf", tensors), words)


def test_other_kinds_of_gguf_are_refused(tmp_path):
    refused(as_others_write(tmp_path / "model.gguf", {"direction.1": F32}, kind="llama"), "'llama'")


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def raw(
    *, entries: bytes = b"", count: int | None = None, infos: bytes = b"", tensors: int | None = None, tail: int = 64
) -> bytes:
    """A GGUF file by hand: one entry naming the architecture and one direction, unless told otherwise."""
    kind = text(b"general.architecture") + struct.pack("<I", 8) + text(b"controlvector")
    info = infos or text(b"direction.1") + struct.pack("<IQIQ", 1, 4, 0, 0)
    head = struct.pack(
        "<4sIQQ", b"GGUF", 3, 1 if tensors is None else tensors, (1 + bool(entries)) if count is None else count
    )
    body = head + kind + entries + info
    return body + b"\0" * (-len(body) % 32) + b"\0" * tail


HUGE = 2**60


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"GGUF",
        b"PK\3\4" + b"\0" * 60,
        struct.pack("<4sIQQ", b"GGUF", 1, 1, 1) + b"\0" * 64,
        struct.pack("<4sIQQ", b"GGUF", 99, 1, 1) + b"\0" * 64,
        raw(count=HUGE),
        raw(tensors=HUGE),
        raw(tensors=0),
        raw(entries=text(b"x") + struct.pack("<I", 77)),
        raw(entries=text(b"x") + struct.pack("<I", 8) + struct.pack("<Q", HUGE)),
        raw(entries=text(b"x") + struct.pack("<IIQ", 9, 4, HUGE)),
        raw(entries=text(b"x") + struct.pack("<IIQ", 9, 0, 10**7) + b"\1" * 10**7),
        raw(entries=text(b"x") + struct.pack("<IIQ", 9, 9, HUGE)),
        raw(entries=text(b"x") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
        raw(entries=text(b"\xff\xfe") + struct.pack("<IB", 0, 1)),
        raw(entries=text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")),
        raw(entries=text(b"general.alignment") + struct.pack("<II", 4, 0)),
        raw(entries=text(b"general.name") + struct.pack("<II", 4, 7)),
        raw(entries=text(b"controlvector.model_hint") + struct.pack("<I", 8) + text(b"\xff")),
        raw(infos=text(b"direction.1") + struct.pack("<IQIQ", 1, HUGE, 0, 0)),
        raw(infos=text(b"direction.1") + struct.pack("<IQQIQ", 2, 2**63, 2, 0, 0)),
        raw(infos=text(b"direction.1") + struct.pack("<IIQ", 0, 0, 0)),
        raw(infos=text(b"direction.1") + struct.pack("<I", 2**31) + b"\0" * 64),
        raw(infos=text(b"direction.1") + struct.pack("<IQIQ", 1, 4, 99, 0)),
        raw(infos=text(b"direction.1") + struct.pack("<IQIQ", 1, 4, 0, HUGE)),
        raw(infos=text(b"direction.1") + struct.pack("<IQIQ", 1, 4, 0, 2**64 - 64)),
        raw(infos=text(b"direction.1") + struct.pack("<IQIQ", 1, 4, 0, 2**64 - 2**63 - 1)),
        raw(infos=(text(b"direction.1") + struct.pack("<IQIQ", 1, 4, 0, 0)) * 2, tensors=2),
        raw(tail=12),
    ],
    ids=range(29),
)
def test_hostile_files_are_refused_and_at_once(tmp_path, blob):
    (tmp_path / "v.gguf").write_bytes(blob)
    refused(tmp_path / "v.gguf")


def test_the_honest_file_beside_the_hostile_ones_is_read(tmp_path):
    (tmp_path / "v.gguf").write_bytes(raw(entries=text(b"x") + struct.pack("<IIQ", 9, 0, 3) + b"\1\2\3"))
    assert gguf.read(tmp_path / "v.gguf").layers == (1,)


def test_truncated_at_any_place(tmp_path):
    gguf.write(tmp_path / "v.gguf", happy(tiny_model("llama")))
    blob = (tmp_path / "v.gguf").read_bytes()
    for end in [*range(1, len(blob) - 1, 23), len(blob) - 1]:
        (tmp_path / "cut.gguf").write_bytes(blob[:end])
        refused(tmp_path / "cut.gguf", "the file ends too early")


def test_random_bytes_replaced_give_a_vector_or_a_refusal(tmp_path):
    gguf.write(tmp_path / "v.gguf", happy(tiny_model("llama")))
    blob = bytearray((tmp_path / "v.gguf").read_bytes())
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(blob)
        for place in random.integers(len(blob), size=2):
            damaged[place] = random.integers(256)
        (tmp_path / "d.gguf").write_bytes(damaged)
        try:
            found = gguf.read(tmp_path / "d.gguf")
            assert all(bool(step.isfinite().all()) for step in found.directions.values())
            outcomes.add("read")
        except ArtefactError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize(
    "change",
    [
        lambda header, values: (header.replace('"depth": 4', '"depth": 3'), values),
        lambda header, values: (header.replace('"d_model": 32', '"d_model": 33'), values),
        lambda header, values: ("{", values),
        lambda header, values: ("[" * 100_000, values),
        lambda header, values: ("[]", values),
        lambda header, values: (header, values[:-1]),
        lambda header, values: (header, [1] * 256),
    ],
)
def test_a_base_model_that_is_none(tmp_path, change: Callable[..., Any], monkeypatch):
    real = package.GGUFWriter
    kept: dict[str, Any] = {}

    class Forger(real):
        def add_string(self, key: str, value: str) -> None:
            kept[key] = value
            if key != "steerkit.base_model":
                super().add_string(key, value)

        def add_array(self, key: str, values: Any) -> None:
            header, values = change(kept["steerkit.base_model"], list(values))
            super().add_string("steerkit.base_model", header)
            super().add_array(key, values)

    monkeypatch.setattr(gguf, "GGUFWriter", Forger)
    gguf.write(tmp_path / "v.gguf", happy(tiny_model("llama")))
    refused(tmp_path / "v.gguf")


def test_paths_that_are_no_file(tmp_path):
    refused(tmp_path)
    refused(tmp_path / "missing.gguf", "No such file")


# Writing.


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "v.gguf"
    gguf.write(path, happy())
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    changed = gguf.ControlVector("other", directions((2,)))
    for target, name in ((os, "fsync"), (os, "replace"), (package.GGUFWriter, "write_tensors_to_file")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full)
            with pytest.raises(ArtefactError, match="No space left"):
                gguf.write(path, changed)
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["v.gguf"]
    gguf.write(path, changed)
    assert gguf.read(path).name == "other"


def test_paths_that_cannot_be_written(tmp_path):
    with pytest.raises(ArtefactError, match="Found the folder"):
        gguf.write(tmp_path, happy())
    with pytest.raises(ArtefactError, match="must exist"):
        gguf.write(tmp_path / "none" / "v.gguf", happy())
    (tmp_path / "kept.gguf").write_bytes(b"mine")
    (tmp_path / "kept.gguf").chmod(0o400)
    with pytest.raises(ArtefactError, match="read-only"):
        gguf.write(tmp_path / "kept.gguf", happy())
    with pytest.raises(ArtefactError, match="Nothing was changed"):
        gguf.write(tmp_path / "v.gguf", dataclasses.replace(happy(), name="\ud800"))
    assert [file.name for file in tmp_path.iterdir()] == ["kept.gguf"]


def test_layer_0_cannot_be_written(tmp_path):
    vector = gguf.ControlVector("v", directions((0, 1)))
    with pytest.raises(LayerError, match="names layer 0"):
        gguf.write(tmp_path / "v.gguf", vector)
    assert not list(tmp_path.iterdir())
    assert gguf.read(as_others_write(tmp_path / "v.gguf", {"direction.0": F32})).layers == (0,), "repeng may write it"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {1: torch.ones(4, dtype=torch.float64)},
        {1: torch.ones(2, 2)},
        {1: torch.ones(4), 2: torch.ones(5)},
        {1: torch.ones(0)},
        {1: torch.tensor(1.0)},
        {-1: torch.ones(4)},
        {True: torch.ones(4)},
        {1: torch.tensor([1.0, float("nan")])},
    ],
)
def test_directions_that_are_none(given):
    with pytest.raises(ArtefactError, match="must hold finite float32 directions"):
        gguf.ControlVector("v", given)


def test_requests_that_do_not_fit_a_vector():
    vector = happy()
    with pytest.raises(LayerError, match=r"Layer 2 has no direction: 'happy' has them at \(1, 3\)"):
        vector.add(1.0, layers=[1, 2])
    with pytest.raises(LayerError):
        vector.add({2: 1.0})
    with pytest.raises(LayerError):
        vector.add(1.0, layers=7)
    for magnitude in (float("nan"), torch.ones(2, 3), "1", {1: 1.0}):
        with pytest.raises(AmountError):
            vector.add(magnitude, layers=(1, 3))
