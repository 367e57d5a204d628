"""Merging vectors into checkpoints on disk: one rounding, every layout, nothing half-written, little memory."""

import errno
import gc
import json
import multiprocessing
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LLAMA_LIKE, random_vector, seeded, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerkit import PreferenceVector
from steerkit.errors import ArtefactError, BaseModelMismatchError, PolicyError, SteerkitError
from steerkit.maths.lowrank import LowRank, dense
from steerkit.model import Fingerprint
from steerkit.preferences import checkpoints
from steerkit.preferences.checkpoints import RECIPE, merge_checkpoint

IDS = torch.tensor([[5, 9, 33, 12, 4], [7, 8, 61, 20, 3]])
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def tied_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = seeded(LlamaForCausalLM(LlamaConfig(**{**LLAMA_LIKE, "tie_word_embeddings": True})), 3)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


BUILD: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_model("llama"),
    "gpt2": lambda: tiny_model("gpt2"),
    "tied": tied_llama,
}


def saved(model: Any, folder: Path, *, shard: str | None = None) -> Path:
    given = {} if shard is None else {"max_shard_size": shard}
    model.save_pretrained(folder, **given)
    tiny_tokenizer(chat=True, pad=True).save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def close_to_one_rounding(found: Tensor, before: Tensor, changes: list[tuple[float, Any]]) -> None:
    """`found` is the exact sum, in float64, up to half a step of its dtype and the rounding of float32 sums."""
    exact = before.double()
    size = before.double().abs()
    for magnitude, delta in changes:
        change = delta.left.double() @ delta.right.double() if isinstance(delta, LowRank) else delta.double()
        exact = exact + magnitude * change
        size = size + abs(magnitude) * (
            delta.left.double().abs() @ delta.right.double().abs() if isinstance(delta, LowRank) else change.abs()
        )
    step = torch.finfo(found.dtype).eps * exact.abs()
    least = torch.finfo(found.dtype).tiny * torch.finfo(found.dtype).eps
    assert bool(((found.double() - exact).abs() <= 0.502 * step + 8 * 2**-24 * size + least).all())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tiny_model("llama"), tmp_path / "base")


@pytest.mark.parametrize("shard", [None, "20KB"], ids=["whole", "shards"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BUILD)
def test_the_file_is_the_merged_model(name: str, dtype: str, shard: str | None, tmp_path: Path) -> None:
    model = BUILD[name]().to(DTYPES[dtype])
    thin, full = random_vector(model, "thin", 1), random_vector(model, "full", 2, full=True, size=0.2)
    folder = saved(model, tmp_path / "base", shard=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard is not None)
    before = contents(folder)
    old = tensors(folder)

    merge_checkpoint(folder, [(thin, 0.7), (full, -0.4)], tmp_path / "out")
    assert contents(folder) == before
    new = tensors(tmp_path / "out")
    assert list(new) == list(old)
    for key, tensor in new.items():
        assert tensor.dtype == DTYPES[dtype]
        changes = [(m, v.deltas[key]) for v, m in ((thin, 0.7), (full, -0.4)) if key in v.deltas]
        assert changes
        close_to_one_rounding(tensor, old[key], changes)
        assert not torch.equal(tensor, old[key])

    merge_checkpoint(folder, [(thin, 0.7)], tmp_path / "one")
    merged = thin.merge_into(model, 0.7)
    loaded, problems = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype="auto", output_loading_info=True)
    assert not any(problems[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, parameter in merged.named_parameters():
        found = loaded.get_parameter(key)
        assert found.dtype == parameter.dtype
        gap = torch.finfo(found.dtype).eps * parameter.abs().double() + 1e-6
        assert bool(((found.double() - parameter.double()).abs() <= gap).all())
    difference = loaded.float()(IDS).logits - model.float()(IDS).logits
    assert difference.abs().max() > 0.05
    if name == "tied":
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("shard", [None, "20KB"], ids=["whole", "shards"])
@pytest.mark.parametrize("name", BUILD)
def test_magnitude_0_gives_the_files_bits(name: str, shard: str | None, tmp_path: Path) -> None:
    model = BUILD[name]().bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[0] = -0.0
    folder = saved(model, tmp_path / "base", shard=shard)
    vectors = [(random_vector(model, "a", 1), 0.0), (random_vector(model, "b", 2, full=True), -0.0)]
    merge_checkpoint(folder, vectors, tmp_path / "out", check_model=False)
    before, after = contents(folder), contents(tmp_path / "out")
    assert after.pop(RECIPE)
    assert after == before
    merge_checkpoint(folder, [], tmp_path / "none")
    assert {k: v for k, v in contents(tmp_path / "none").items() if k != RECIPE} == before


def test_what_does_not_change_keeps_its_bits(base: Path, tmp_path: Path) -> None:
    vector = random_vector(tiny_model("llama")).only(layers=[2])
    merge_checkpoint(base, [(vector, 1.0)], tmp_path / "out")
    old, new = tensors(base), tensors(tmp_path / "out")
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed == set(vector.deltas)
    assert changed


@pytest.mark.parametrize("change", ["embedding", "head"])
def test_a_tied_head_that_was_saved_stays_equal_to_the_embedding(change: str, tmp_path: Path) -> None:
    model = tied_llama()
    folder = saved(model, tmp_path / "base")
    held = tensors(folder)
    assert "lm_head.weight" not in held
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    if change == "embedding":
        vector = random_vector(model, full=True)
        merge_checkpoint(folder, [(vector, 0.5)], tmp_path / "out")
        new = tensors(tmp_path / "out")
        assert torch.equal(new["lm_head.weight"], new["model.embed_tokens.weight"])
        assert not torch.equal(new["lm_head.weight"], held["lm_head.weight"])
        assert set(new) == set(held)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert (loaded(IDS).logits - vector.merge_into(model, 0.5)(IDS).logits).abs().max() < 1e-3
    else:
        delta = 0.1 * torch.randn(held["lm_head.weight"].shape)
        vector = PreferenceVector("head", {"lm_head.weight": delta})
        with pytest.raises(BaseModelMismatchError):
            merge_checkpoint(folder, [(vector, 1.0)], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_file_without_the_bodys_name_is_the_same_base(tmp_path: Path) -> None:
    """As the hub's gpt2 is saved: `h.0...` where the model says `transformer.h.0...`."""
    model = tiny_model("gpt2")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    folder = saved(model, tmp_path / "base")
    held = {key.removeprefix("transformer."): value for key, value in tensors(folder).items()}
    assert "h.0.attn.c_attn.weight" in held
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)
    vector = random_vector(again)
    merge_checkpoint(folder, [(vector, 0.5)], tmp_path / "free", check_model=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "free")
    wanted = vector.merge_into(again, 0.5)(IDS).logits
    assert (loaded(IDS).logits - wanted).abs().max() < 1e-3
    merge_checkpoint(folder, [(vector, 0.5)], tmp_path / "checked")
    assert contents(tmp_path / "checked") == contents(tmp_path / "free")


def test_several_vectors_are_rounded_once(tmp_path: Path) -> None:
    """Each change is below half a step of bfloat16; together they are not."""
    model = tiny_model("llama").bfloat16()
    key = "model.layers.0.self_attn.q_proj.weight"
    weight = model.get_parameter(key)
    with torch.no_grad():
        weight.fill_(1.0)
    folder = saved(model, tmp_path / "base")
    step = PreferenceVector("s", {key: torch.full(tuple(weight.shape), 2**-9)}, Fingerprint.of(model))
    merge_checkpoint(folder, [(step.named(f"s{i}"), 1.0) for i in range(4)], tmp_path / "out")
    assert bool((tensors(tmp_path / "out")[key] == 1 + 2**-7).all())
    merge_checkpoint(folder, [(step, 0.5)], tmp_path / "small")
    assert bool((tensors(tmp_path / "small")[key] == 1).all())


def test_blocks_of_rows_give_what_the_whole_gives(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    vectors = [(random_vector(model, "a", 1, full=True), 0.5), (random_vector(model, "b", 2), 0.3)]
    merge_checkpoint(base, vectors, tmp_path / "whole")
    monkeypatch.setattr(checkpoints, "_BLOCK", 97)
    merge_checkpoint(base, vectors, tmp_path / "blocks")
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "blocks")
    for key in one:
        assert (one[key] - other[key]).abs().max() < 1e-5
        assert dense(vectors[0][0].deltas[key]).any()


def test_every_other_file_is_carried_along_and_no_pickle(base: Path, tmp_path: Path) -> None:
    (base / "notes.md").write_text("kept")
    (base / "merges.txt").write_text("a b")
    (base / "tokenizer.model").write_bytes(b"\x00\x01")
    (base / "modeling_own.py").write_text("raise SystemExit")
    pickled = ["training_args.bin", "pytorch_model.bin", "optimizer.pt", "scheduler.pth", "model.ckpt", "state.pkl"]
    for name in [*pickled, "data.pickle"]:
        (base / name).write_bytes(pickle.dumps({"a": 1}))
    shutil.copy(base / "model.safetensors", base / "adapter_model.safetensors")
    merge_checkpoint(base, [(random_vector(tiny_model("llama")), 0.5)], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"notes.md", "merges.txt", "tokenizer.model", "config.json", "generation_config.json"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", RECIPE, "model.safetensors"} <= names
    assert {name for name in names if name in [*pickled, "data.pickle", "adapter_model.safetensors"]} == set()
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words.chat_template == tiny_tokenizer(chat=True).chat_template
    recipe = json.loads((tmp_path / "out" / RECIPE).read_text())
    assert [(v["name"], v["magnitude"]) for v in recipe["vectors"]] == [("helpful", 0.5)]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_a_tokenizers_further_templates_are_carried_along(base: Path, tmp_path: Path) -> None:
    """transformers keeps them in a folder of their own."""
    words = tiny_tokenizer(chat=True, pad=True)
    words.chat_template = {"default": words.chat_template, "tool_use": "{{ 'w9' }}"}
    words.save_pretrained(base)
    before = AutoTokenizer.from_pretrained(base).chat_template
    assert set(before) == {"default", "tool_use"}
    merge_checkpoint(base, [(random_vector(tiny_model("llama")), 0.5)], tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == before


def test_a_merged_checkpoint_can_be_merged_again(base: Path, tmp_path: Path) -> None:
    vector = random_vector(tiny_model("llama"), size=0.1)
    merge_checkpoint(base, [(vector, 1.0)], tmp_path / "once")
    merge_checkpoint(tmp_path / "once", [(vector, -1.0)], tmp_path / "back", check_model=False)
    old, new = tensors(base), tensors(tmp_path / "back")
    assert all((old[key] - new[key]).abs().max() < 1e-5 for key in old)
    assert json.loads((tmp_path / "back" / RECIPE).read_text())["base"] == "once"


def test_an_empty_folder_is_filled_and_links_are_read(base: Path, tmp_path: Path) -> None:
    """The hub's cache holds links."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in base.iterdir():
        (linked / path.name).symlink_to(path)
    (tmp_path / "out").mkdir()
    merge_checkpoint(linked, [(random_vector(tiny_model("llama")), 0.5)], str(tmp_path / "out"))
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# Refusals.


def with_changed(base: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    held = tensors(base)
    change(held)
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})


def refused(base: Path, vectors: Any, kind: type[SteerkitError], match: str | None = None, **given: Any) -> None:
    """Refused, with nothing written anywhere."""
    parent = base.parent
    before = contents(parent)
    folders = sorted(path for path in parent.rglob("*") if path.is_dir())
    with pytest.raises(kind, match=match) as caught:
        merge_checkpoint(base, vectors, given.pop("output", parent / "out"), **given)
    assert "\n" not in str(caught.value)
    assert contents(parent) == before
    assert sorted(path for path in parent.rglob("*") if path.is_dir()) == folders


NAME = "model.layers.1.self_attn.q_proj.weight"


def test_a_missing_tensor_is_refused(base: Path) -> None:
    with_changed(base, lambda held: held.pop(NAME))
    vector = random_vector(tiny_model("llama"))
    refused(base, [(vector, 1.0)], BaseModelMismatchError)
    refused(base, [(vector, 1.0)], BaseModelMismatchError, NAME, check_model=False)


def test_another_shape_is_refused(base: Path) -> None:
    with_changed(base, lambda held: held.update({NAME: torch.zeros(32, 31)}))
    vector = random_vector(tiny_model("llama"))
    refused(base, [(vector, 1.0)], BaseModelMismatchError)
    refused(base, [(vector, 1.0)], BaseModelMismatchError, r"\(32, 31\)", check_model=False)


def test_a_turned_shape_is_refused(base: Path) -> None:
    vector = PreferenceVector("turned", {"model.layers.0.mlp.up_proj.weight": torch.zeros(32, 48)})
    refused(base, [(vector, 1.0)], BaseModelMismatchError)


def test_another_base_is_refused_and_check_model_is_the_way_out(base: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    vector = random_vector(model)
    with_changed(base, lambda held: held.update({k: v * 1.5 for k, v in held.items()}))
    refused(base, [(vector, 1.0)], BaseModelMismatchError, "weights")
    refused(base, [(vector, 0.0)], BaseModelMismatchError, "weights")
    merge_checkpoint(base, [(vector, 1.0)], tmp_path / "free", check_model=False)
    assert not torch.equal(tensors(tmp_path / "free")[NAME], tensors(base)[NAME])


def test_one_foreign_vector_among_several_is_refused(base: Path) -> None:
    good, foreign = random_vector(tiny_model("llama")), random_vector(tiny_model("gpt2"), "foreign")
    refused(base, [(good, 1.0), (foreign, 0.1)], BaseModelMismatchError, "foreign")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_quantised_tensors_are_refused(dtype: torch.dtype, base: Path) -> None:
    with_changed(base, lambda held: held.update({NAME: torch.ones(32, 32).to(dtype)}))
    refused(base, [(random_vector(tiny_model("llama")), 1.0)], PolicyError, "unquantised", check_model=False)


def test_outputs_that_are_not_new_are_refused(base: Path, tmp_path: Path) -> None:
    vectors = [(random_vector(tiny_model("llama")), 1.0)]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "full", tmp_path / "file", base):
        refused(base, vectors, ArtefactError, "empty", output=output)
    refused(base, vectors, ArtefactError, "must exist", output=tmp_path / "none" / "out")


def test_an_output_inside_the_base_leaves_the_base_as_it_was(base: Path) -> None:
    before = contents(base)
    try:
        merge_checkpoint(base, [(random_vector(tiny_model("llama")), 1.0)], base / "out")
    except SteerkitError:
        assert contents(base) == before
    else:
        assert {k: v for k, v in contents(base).items() if not k.startswith("out")} == before


@pytest.mark.parametrize("magnitude", [float("nan"), float("inf"), -float("inf")])
def test_magnitudes_that_are_not_finite_are_refused(magnitude: float, base: Path) -> None:
    refused(base, [(random_vector(tiny_model("llama")), magnitude)], PolicyError, "finite")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("full", [True, False], ids=["dense", "low rank"])
def test_vectors_that_are_not_finite_are_refused(value: float, full: bool, base: Path) -> None:
    vector = random_vector(tiny_model("llama"), full=full)
    delta = vector.deltas[NAME]
    (delta.left if isinstance(delta, LowRank) else delta)[0, 0] = value
    refused(base, [(vector, 0.5)], SteerkitError, "finite")


def cut(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:40])


def pickled(base: Path) -> None:
    (base / "model.safetensors").write_bytes(pickle.dumps({"a": torch.zeros(3)}))


def huge_header(base: Path) -> None:
    (base / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def empty(base: Path) -> None:
    (base / "model.safetensors").write_bytes(b"")


def only_pickles(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def bad_index(base: Path) -> None:
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": ')


def list_index(base: Path) -> None:
    (base / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')


def numbers_index(base: Path) -> None:
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')


def outside_index(base: Path) -> None:
    shutil.copy(base / "model.safetensors", base.parent / "outside.safetensors")
    where = dict.fromkeys(tensors(base), "../outside.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def missing_shard(base: Path) -> None:
    where = dict.fromkeys(tensors(base), "model-00001-of-00001.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def index_names_too_much(base: Path) -> None:
    where = {**dict.fromkeys(tensors(base), "model.safetensors"), "more.weight": "model.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def bad_config(base: Path) -> None:
    (base / "config.json").write_text('{"model_type": "nothing of the kind"}')


def broken_config(base: Path) -> None:
    (base / "config.json").write_text("{")


DAMAGE = [cut, cut_header, pickled, huge_header, empty, only_pickles, bad_index, list_index, numbers_index]
DAMAGE += [outside_index, missing_shard, index_names_too_much, bad_config, broken_config]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_bases_are_refused(damage: Callable[[Path], None], base: Path) -> None:
    damage(base)
    refused(base, [(random_vector(tiny_model("llama")), 1.0)], SteerkitError)


def test_what_is_no_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    vectors = [(random_vector(tiny_model("llama")), 1.0)]
    (tmp_path / "empty").mkdir()
    for path in ("nowhere", "empty", "base/model.safetensors"):
        with pytest.raises(PolicyError):
            merge_checkpoint(tmp_path / path, vectors, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Interrupted writes.


@pytest.mark.parametrize("made", [False, True], ids=["new", "empty folder"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["_copy", "_write_sum", "sync", "shutil"])
def test_a_full_disk_leaves_nothing(
    where: str, error: BaseException, made: bool, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    names = {"sync": (checkpoints.os, "fsync"), "shutil": (checkpoints.shutil, "copyfile")}
    owner, name = names.get(where, (checkpoints, where))
    before = getattr(owner, name)

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) >= (1 if where == "sync" else 3):
            raise error
        return before(*args, **kwargs)

    monkeypatch.setattr(owner, name, full)
    vector = random_vector(tiny_model("llama"))
    output = base.parent / "out"
    if made:
        output.mkdir()
    if isinstance(error, OSError):
        refused(base, [(vector, 1.0)], ArtefactError, "No space left")
    else:
        state = contents(base.parent)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(base, [(vector, 1.0)], output)
        assert contents(base.parent) == state
    assert calls
    assert sorted(path.name for path in base.parent.iterdir()) == (["base", "out"] if made else ["base"])
    monkeypatch.undo()
    merge_checkpoint(base, [(vector, 1.0)], output)  # and again, with room
    assert (output / "model.safetensors").exists()


# Memory.


def anonymous_memory() -> int:
    """Resident bytes that belong to no file: what is mapped from the checkpoint costs nothing that cannot be given back."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def growth(layers: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that one merge holds at most, beside the vector."""
    rows, columns = 512, 2048
    held = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(rows, columns) for i in range(layers)}
    base = folder / f"base{layers}"
    base.mkdir()
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    vector = PreferenceVector("thin", {n: LowRank(torch.randn(rows, 2), torch.randn(2, columns)) for n in held})
    del held
    gc.collect()
    seen: list[int] = []
    add = checkpoints.add_to

    def watched(*args: Any) -> None:
        add(*args)
        seen.append(anonymous_memory())

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "add_to", watched)
        start = anonymous_memory()
        merge_checkpoint(base, [(vector, 0.5)], folder / f"out{layers}")
        seen.append(anonymous_memory())
    assert len(seen) > layers
    return max(seen) - start


def grown(folder: Path) -> tuple[int, int]:
    """Return what 16 layers' worth of ones takes, which a merge that held them would, and what a merge takes."""
    before = anonymous_memory()
    kept = [torch.ones(2**20) for _ in range(16)]
    seen = anonymous_memory() - before
    del kept
    return seen, growth(40, folder, pytest.MonkeyPatch())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """40 layers are 160 MiB, and one layer 4; in a process of its own, where nothing freed lies about to be taken again."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        seen, taken = fresh.apply(grown, (tmp_path,))
    assert seen > 48 * 2**20
    assert taken < 40 * 2**20
