"""Contract 6: a difference of policies is that of their merged weights, and what is no such difference is refused."""

import copy
import dataclasses
import json
import pickle
import shutil
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import DEPTH, LLAMA_LIKE, MODELS, seeded, tiny_model, tiny_tokenizer
from torch import Tensor

from steerkit import PreferenceVector
from steerkit.errors import BaseModelMismatchError, PolicyError, SteerkitError, UnsupportedModelError
from steerkit.maths.lowrank import LowRank, dense
from steerkit.preferences.sources import check_lora, read_source

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft 0.21 with transformers 5
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),  # peft puts it right by itself
]

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lora(targets: Any = ATTENTION, **settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **settings})


def plain(name: str = "llama") -> Any:
    """The base model, fresh."""
    return tiny_model(name)


def randomise(policy: Any, seed: int) -> Any:
    """Give every factor values as training would: B is no longer zero."""
    generator = rng(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


def policy(name: str = "llama", seed: int = 0, config: Any = None, base: Any = None, **settings: Any) -> Any:
    model = tiny_model(name) if base is None else base
    return randomise(peft.get_peft_model(model, lora(**settings) if config is None else config), seed)


def twin(name: str = "llama", seed: int = 1, size: float = 0.05) -> Any:
    """A model that training has moved by much more than rounding."""
    model, generator = tiny_model(name), rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def weights(model: Any) -> dict[str, Tensor]:
    """A policy's weights in float64 by their names in the base model; adapters merged by PEFT."""
    model = copy.deepcopy(model).double()
    model = model.merge_and_unload() if isinstance(model, peft.PeftModel) else model
    return {name: p.detach() for name, p in model.named_parameters()}


def check_difference(vector: PreferenceVector, towards: Any, away: Any) -> None:
    """The vector is what merged weights differ by, and changes nothing else."""
    first, second = weights(towards), weights(away)
    assert set(vector.deltas) <= set(first)
    moved = 0
    for name, value in first.items():
        wanted = value - second[name]
        size = float(wanted.abs().max())
        if name not in vector.deltas:
            assert size < 1e-12, f"{name} differs and is not in the vector"
            continue
        delta = vector.deltas[name]
        found = dense(delta).double()
        assert found.shape == wanted.shape
        assert all(part.dtype == torch.float32 for part in (delta if isinstance(delta, LowRank) else (delta,)))
        assert float((found - wanted).abs().max()) <= 3e-6 * size, name
        moved += size > 1e-3
    assert moved > 0, "nothing differs"


def state(model: Any) -> dict[str, Any]:
    """Everything of a model that reading it might change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "bits": {name: value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                 for name, value in model.state_dict().items()},
        "grad": {name: (p.requires_grad, p.dtype, p.grad is None) for name, p in model.named_parameters()},
        "modules": {
            path: (type(module), module.training, *(len(getattr(module, kind)) for kind in hooks), "forward" in vars(module))
            for path, module in model.named_modules()
        },
        "attributes": {path: frozenset(vars(module)) for path, module in model.named_modules()},
        "merged": {path: list(m.merged_adapters) for path, m in model.named_modules() if hasattr(m, "merged_adapters")},
        "adapters": list(model.active_adapters) if isinstance(model, peft.PeftModel) else None,
        "random": torch.get_rng_state().numpy().tobytes(),
    }  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def holdings(policies: tuple[Any, ...]) -> list[Any]:
    return [files(Path(p)) if isinstance(p, str | Path) and Path(p).is_dir() else None for p in policies] + [
        state(p) for p in policies if isinstance(p, torch.nn.Module)
    ]


def difference(towards: Any, away: Any, **settings: Any) -> PreferenceVector:
    """`PreferenceVector.difference`, which must leave both policies as they were."""
    before = holdings((towards, away))
    vector = PreferenceVector.difference(towards, away, name="liked", **settings)
    assert holdings((towards, away)) == before
    return vector


def refused(
    kind: type[SteerkitError], towards: Any, away: Any, match: str | None = None, **settings: Any
) -> SteerkitError:
    """A difference that is refused by one class of error, with nothing changed."""
    before = holdings((towards, away))
    with pytest.raises(SteerkitError, match=match) as caught:
        PreferenceVector.difference(towards, away, name="liked", **settings)
    assert type(caught.value) is kind
    assert holdings((towards, away)) == before
    return caught.value


def saved(model: Any, folder: Path, **settings: Any) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        warnings.filterwarnings("ignore", message="Could not find a config file")
        model.save_pretrained(folder, **settings)
    return folder


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --- adapters that are read -------------------------------------------------------------------------------------------

ADAPTERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "attention": ("llama", {}, {}),
    "attention and mlp": ("llama", {"targets": ATTENTION + MLP}, {"targets": ATTENTION + MLP}),
    "other modules": ("llama", {"targets": ["q_proj", "down_proj"]}, {"targets": ["q_proj", "v_proj", "up_proj"]}),
    "no module in common": ("llama", {"targets": ["q_proj"]}, {"targets": ["v_proj"]}),
    "other ranks": ("llama", {"r": 3}, {"r": 5, "lora_alpha": 2}),
    "ranks as large as the matrix": ("llama", {"r": 16}, {"r": 24}),
    "rank-stabilised": ("llama", {"use_rslora": True}, {"use_rslora": True, "r": 9}),
    "rank-stabilised and not": ("llama", {"use_rslora": True}, {}),
    "rank pattern": ("llama", {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 7}}, {}),
    "alpha pattern": ("llama", {"alpha_pattern": {"q_proj": 1, r"layers\.[23]\.self_attn\.k_proj": 32}}, {}),
    "both patterns, rank-stabilised": (
        "llama",
        {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"q_proj": 3, "v_proj": 11}, "use_rslora": True},
        {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 7}},
    ),
    "some layers": ("llama", {"layers_to_transform": [1, 3]}, {"layers_to_transform": [0, 3]}),
    "every linear": ("llama", {"targets": "all-linear"}, {}),
    "a pattern of paths": ("llama", {"targets": r".*\.(0|2)\.mlp\.(up|down)_proj"}, {}),
    "head": ("llama", {"targets": ["lm_head", "q_proj"]}, {"targets": ["lm_head"]}),
    "embeddings": ("llama", {"targets": ["embed_tokens", "q_proj"]}, {"targets": ["embed_tokens"]}),
    "conv1d": ("gpt2", {"targets": ["c_attn"], "fan_in_fan_out": True}, {"targets": ["c_attn"], "fan_in_fan_out": True}),
    "conv1d, left to peft": ("gpt2", {"targets": ["c_attn", "c_fc", "c_proj"]}, {"targets": ["c_proj"]}),
    "conv1d and head": ("gpt2", {"targets": ["attn.c_proj", "lm_head"]}, {"targets": ["attn.c_proj"]}),
    "conv1d and embeddings": ("gpt2", {"targets": ["wte", "c_attn"]}, {"targets": ["wpe", "c_fc"]}),
    "biased linears": ("opt", {"targets": ["q_proj", "fc1"]}, {"targets": ["fc2"]}),
    "fused": ("phi3", {"targets": ["qkv_proj", "gate_up_proj"]}, {"targets": ["qkv_proj"]}),
    "dropout": ("llama", {"lora_dropout": 0.5}, {"lora_dropout": 0.1}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}),
}  # fmt: skip
PAIRS = pytest.mark.parametrize("case", ADAPTERS.values(), ids=ADAPTERS.keys())


@PAIRS
def test_live_adapters(case):
    name, one, other = case
    towards, away = policy(name, 1, **one), policy(name, 2, **other)
    vector = difference(towards, away)
    check_difference(vector, towards, away)
    difference(towards, away, model=tiny_model(name))


@PAIRS
def test_adapter_folders(case, tmp_path):
    """Without the base model a folder must be read rightly too, or refused; with it always."""
    name, one, other = case
    towards, away = policy(name, 1, **one), policy(name, 2, **other)
    folders = [saved(each, tmp_path / str(i)) for i, each in enumerate((towards, away))]
    vector = difference(*folders, model=tiny_model(name))
    check_difference(vector, towards, away)
    vector.fingerprint.check(difference(towards, away).fingerprint, "folder")
    if name == "gpt2" and "lm_head" in one["targets"]:
        with pytest.raises(PolicyError, match="Pass the base model"):
            difference(*map(str, folders))
    else:
        check_difference(difference(*map(str, folders)), towards, away)


@pytest.mark.parametrize("known", [True, False], ids=["base at hand", "folders alone"])
def test_a_folder_with_both_orientations(known, tmp_path):
    """PEFT notes one `fan_in_fan_out` for all modules: that of the last one it saw. Read rightly, or refused."""
    towards, away = (policy("gpt2", seed, targets=["attn.c_proj", "lm_head"]) for seed in (1, 2))
    folders = [saved(p, tmp_path / str(i), save_embedding_layers=False) for i, p in enumerate((towards, away))]
    try:
        vector = difference(*folders, model=tiny_model("gpt2") if known else None)
    except SteerkitError:
        assert not known, "the base model tells every orientation"
        return
    check_difference(vector, towards, away)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "phi3", "gpt_neox", "opt", "bloom", "falcon", "mamba"])
def test_every_architecture_by_live_adapters(name, tmp_path):
    config = lora(["in_proj", "x_proj"] if name == "mamba" else "all-linear", r=3)
    towards, away = (policy(name, seed, config=copy.deepcopy(config)) for seed in (1, 2))
    vector = difference(towards, away)
    check_difference(vector, towards, away)
    merged = vector.merge_into(tiny_model(name))
    moved = [n for n, p in tiny_model(name).named_parameters() if not torch.equal(p, merged.get_parameter(n))]
    assert set(moved) == set(vector.deltas)


def test_ranks_add_up_and_stay_exact():
    vector = difference(policy(seed=1, r=2), policy(seed=2, r=3))
    assert {delta.rank for delta in vector.deltas.values()} == {5}
    assert vector.rank == 5


def test_a_shared_frozen_factor_is_held_once():
    towards = policy(seed=1)
    away = policy(seed=2)
    with torch.no_grad():
        for (name, one), (_, other) in zip(towards.named_parameters(), away.named_parameters(), strict=True):
            if "lora_A" in name:
                other.copy_(one)
    vector = difference(towards, away)
    assert vector.rank == 4
    check_difference(vector, towards, away)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_policy_and_its_base(name, folder, tmp_path):
    config = lora(["c_attn", "c_proj"] if name == "gpt2" else ATTENTION)
    towards, base = policy(name, 1, config=config), tiny_model(name)
    source: Any = saved(towards, tmp_path / "a") if folder else towards
    there, back = difference(source, base), difference(base, source)
    check_difference(there, towards, base)
    check_difference(back, base, towards)
    assert there.fingerprint is not None
    assert there.cosine(back) == pytest.approx(-1)
    by_checkpoint = difference(source, saved(tiny_model(name), tmp_path / "base"))
    check_difference(by_checkpoint, towards, base)


def test_the_active_adapter_is_read_among_several():
    model = policy(seed=1)
    model.add_adapter("second", lora(["v_proj", "up_proj"], r=2))
    randomise(model, 7)
    first = difference(model, plain())
    assert set(first.only(layers=[0]).deltas) == {f"model.layers.0.self_attn.{each}.weight" for each in ATTENTION}
    check_difference(first, model, plain())
    model.set_adapter("second")
    second = difference(model, plain())
    check_difference(second, model, plain())
    assert second.rank == 2


@pytest.mark.parametrize("name", ["liked", "model", "mlp", "self", "q_proj", "weight"])
def test_adapters_may_have_any_name(name, tmp_path):
    towards = randomise(peft.get_peft_model(plain(), lora(), adapter_name=name), 1)
    check_difference(difference(towards, plain()), towards, plain())
    saved(towards, tmp_path / "a")
    check_difference(difference(tmp_path / "a" / name, plain()), towards, plain())


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_a_scale_set_on_the_live_policy_counts(scale):
    towards = policy(seed=1)
    unscaled = difference(towards, plain())
    for module in towards.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)
    vector = difference(towards, plain())
    check_difference(vector, towards, plain())
    assert vector.norm() == pytest.approx(scale * unscaled.norm(), rel=1e-5)


def test_policies_in_the_middle_of_training_stay_there():
    towards, away = policy(seed=1, lora_dropout=0.3), policy(seed=2, targets=MLP)
    towards.train()
    away.train()
    away.base_model.model.model.layers[1].eval()
    ids = torch.tensor([[3, 4, 5]])
    towards(input_ids=ids, labels=ids).loss.backward()
    calls: list[int] = []
    handle = away.base_model.model.model.layers[0].register_forward_hook(lambda *_: None)
    vector = difference(towards, away)
    handle.remove()
    check_difference(vector, towards, away)
    assert calls == []
    assert any(p.grad is not None for p in towards.parameters())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_policies_with_gradient_checkpointing():
    towards = policy(seed=1, base=plain())
    towards.gradient_checkpointing_enable({"use_reentrant": False})
    towards.enable_input_require_grads()
    towards.train()
    check_difference(difference(towards, plain()), towards, plain())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_adapters_are_subtracted_in_float32(dtype):
    towards, away = (policy(seed=seed, base=plain().to(dtype)).to(dtype) for seed in (1, 2))
    vector = difference(towards, away)
    check_difference(vector, towards, away)  # merged in float64: sums in the policies' dtype would be 1e-3 off
    assert vector.fingerprint is not None
    vector.fingerprint.check(difference(policy(seed=1), plain()).fingerprint, "half")


def test_half_precision_folders(tmp_path):
    towards = policy(seed=1, base=plain().to(torch.bfloat16)).to(torch.bfloat16)
    check_difference(difference(saved(towards, tmp_path / "a"), plain()), towards, plain().to(torch.bfloat16))


# --- whole weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "mixtral", "mamba"])
def test_live_models(name):
    towards, away = twin(name, 1), twin(name, 2)
    vector = difference(towards, away, model=tiny_model(name))
    check_difference(vector, towards, away)
    assert set(vector.deltas) == set(weights(towards))


@pytest.mark.parametrize(
    ("name", "sharded"),
    [*((name, False) for name in MODELS), *((name, True) for name in ("llama", "gpt2", "mixtral"))],
)
def test_checkpoint_folders(name, sharded, tmp_path):
    """transformers renames what some architectures save: those may be refused, and must not be read wrongly."""
    towards, away = twin(name, 1), twin(name, 2)
    how = {"max_shard_size": "40KB"} if sharded else {}
    folders = [saved(each, tmp_path / str(i), **how) for i, each in enumerate((towards, away))]
    assert (folders[0] / INDEX).exists() is sharded
    try:
        vector = difference(*folders, model=tiny_model(name))
    except BaseModelMismatchError:
        assert name in ("mixtral", "gpt_neox")
        return
    check_difference(vector, towards, away)
    check_difference(difference(*folders), towards, away)


def test_one_file_against_shards(tmp_path):
    towards, away = twin(seed=1), twin(seed=2)
    one = saved(towards, tmp_path / "one")
    many = saved(away, tmp_path / "many", max_shard_size="30KB")
    check_difference(difference(one, many), towards, away)


@pytest.mark.parametrize("live", ["towards", "away"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_live_model_against_a_folder(name, live, tmp_path):
    towards, away = twin(name, 1), twin(name, 2)
    pair = (towards, saved(away, tmp_path / "f")) if live == "towards" else (saved(towards, tmp_path / "f"), away)
    check_difference(difference(*pair, model=tiny_model(name)), towards, away)


@pytest.mark.parametrize("kind", ["live", "folders"])
def test_tied_weights_are_one(kind, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    pair = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            pair.append(seeded(LlamaForCausalLM(LlamaConfig(**{**LLAMA_LIKE, "tie_word_embeddings": True})), seed))
    policies = pair if kind == "live" else [saved(each, tmp_path / str(i)) for i, each in enumerate(pair)]
    vector = difference(*policies)
    assert "lm_head.weight" not in vector.deltas
    check_difference(vector, *pair)


def test_a_tied_head_that_was_saved_all_the_same(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    pair = [seeded(LlamaForCausalLM(LlamaConfig(**{**LLAMA_LIKE, "tie_word_embeddings": True})), s) for s in (1, 2)]
    folders = [saved(each, tmp_path / str(i)) for i, each in enumerate(pair)]
    tensors = load_file(folders[0] / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folders[0] / SINGLE, metadata={"format": "pt"})
    check_difference(difference(*folders), *pair)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["live", "folders"])
def test_half_precision_weights_are_subtracted_in_float32(dtype, kind, tmp_path):
    towards, away = twin(seed=1).to(dtype), twin(seed=2).to(dtype)
    pair = (towards, away) if kind == "live" else (saved(towards, tmp_path / "a"), saved(away, tmp_path / "b"))
    vector = difference(*pair)
    first, second = weights(towards), weights(away)
    for name, delta in vector.deltas.items():
        assert isinstance(delta, Tensor)
        assert torch.equal(delta, (first[name] - second[name]).float())
    assert not all(torch.equal(d, d.to(dtype).float()) for d in vector.deltas.values()), "nothing needs float32"


def test_merged_adapters_are_whole_weights():
    """The usual way to whole weights: train LoRA, merge, unload."""
    one, other = policy(seed=1), policy(seed=2)
    merged = [copy.deepcopy(each).merge_and_unload() for each in (one, other)]
    check_difference(difference(*merged), *merged)
    assert difference(*merged).cosine(difference(one, other)) == pytest.approx(1, abs=1e-5)


def test_a_difference_of_whole_weights_belongs_to_their_base():
    """Trained weights do not bring their base along: neither policy's own values may be asked of it."""
    towards, away = twin(seed=1, size=0.2), twin(seed=2, size=0.2)
    vector = difference(towards, away)
    vector.merge_into(plain())
    back = vector.merge_into(away)
    for name, wanted in weights(towards).items():
        assert float((back.get_parameter(name).detach() - wanted).abs().max()) < 1e-5
    other = difference(twin(seed=3, size=0.2), twin(seed=4, size=0.2))
    assert (vector + other).norm() > 0
    assert abs(vector.cosine(other)) < 0.5


@pytest.mark.parametrize("kind", ["live adapters", "adapter folders", "live models", "folders"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_difference_added_to_the_second_gives_the_first(kind, name, tmp_path):
    """Contract 6."""
    if "adapter" in kind:
        config = lora(["c_attn", "c_fc"] if name == "gpt2" else ATTENTION + MLP)
        pair = [policy(name, seed, config=copy.deepcopy(config)) for seed in (1, 2)]
    else:
        pair = [twin(name, 1), twin(name, 2)]
    sources = [saved(each, tmp_path / str(i)) for i, each in enumerate(pair)] if "folders" in kind else pair
    vector = difference(*sources, model=tiny_model(name))
    second = copy.deepcopy(pair[1])
    second = second.merge_and_unload() if isinstance(second, peft.PeftModel) else second
    first = vector.merge_into(second, check_model=False)
    for name_, wanted in weights(pair[0]).items():
        assert float((first.get_parameter(name_).detach() - wanted).abs().max()) < 1e-5 * (
            1 + float(wanted.abs().max())
        )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_checkpoint_folder_knows_the_orientation_of_its_weights(name, tmp_path):
    """As LoRA it must act as it does merged, whether or not the base model was at hand when it was read."""
    towards, away = twin(name, 1), twin(name, 2)
    folders = [saved(each, tmp_path / str(i)) for i, each in enumerate((towards, away))]
    module = "attn.c_proj" if name == "gpt2" else "self_attn.o_proj"  # square: no shape gives a mistake away
    vector = difference(*folders).only(layers=[0, 2], modules=[module])
    vector = dataclasses.replace(vector, deltas={n: d for n, d in vector.deltas.items() if n.endswith(".weight")})
    vector.to_adapter(tmp_path / "lora", rank=32)
    loaded = peft.PeftModel.from_pretrained(tiny_model(name), tmp_path / "lora").merge_and_unload()
    for path, delta in vector.deltas.items():
        found = (loaded.get_parameter(path) - tiny_model(name).get_parameter(path)).detach()
        assert float(dense(delta).abs().max()) > 0.05
        assert float((found - dense(delta)).abs().max()) < 1e-4


def test_what_is_noted(tmp_path):
    vector = difference(
        saved(policy(seed=1), tmp_path / "up"), saved(policy(seed=2), tmp_path / "down"), made={"seed": 3}
    )
    assert dict(vector.made) == {"towards": "up", "away": "down", "seed": 3}
    assert vector.name == "liked"
    assert str(tmp_path) not in json.dumps(dict(vector.made))


# --- adapters that are refused ----------------------------------------------------------------------------------------

LIVE: dict[str, Callable[[], peft.PeftConfig]] = {
    "dora": lambda: lora(use_dora=True),
    "modules saved whole": lambda: lora(modules_to_save=["lm_head"]),
    "all biases": lambda: lora(bias="all"),
    "biases of adapted modules": lambda: lora(bias="lora_only"),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "fast pissa": lambda: lora(init_lora_weights="pissa_niter_2"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "single tokens": lambda: lora(trainable_token_indices=[1, 2]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "lokr": lambda: peft.LoKrConfig(target_modules=["q_proj"]),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"]),
}


@pytest.mark.parametrize("config", LIVE.values(), ids=LIVE.keys())
@pytest.mark.parametrize("side", ["towards", "away"])
def test_live_adapters_that_are_no_plain_lora(config, side):
    strange, usual = policy(seed=1, config=config()), policy(seed=2)
    refused(PolicyError, *((strange, usual) if side == "towards" else (usual, strange)))
    refused(PolicyError, strange, plain())


def test_live_kasa_twins():
    """It puts a diagonal between the factors and cuts the base."""
    twins = [policy(seed=seed, config=lora(kasa_config=peft.tuners.lora.config.KasaConfig())) for seed in (1, 2)]
    refused(PolicyError, *twins)


def test_live_lora_with_a_bias():
    strange = policy("opt", 1, targets=["q_proj"], lora_bias=True)
    refused(PolicyError, strange, plain("opt"), "lora_bias")


def test_prompt_tuning():
    strange = peft.get_peft_model(plain(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises((PolicyError, UnsupportedModelError)):
        PreferenceVector.difference(strange, plain(), name="liked")


CONFIGS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "modules saved whole": {"modules_to_save": ["lm_head"]},
    "all biases": {"bias": "all"},
    "biases of adapted modules": {"bias": "lora_only"},
    "a bias of its own": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "fast pissa": {"init_lora_weights": "pissa_niter_16"},
    "olora": {"init_lora_weights": "olora"},
    "olora in capitals": {"init_lora_weights": "OLoRA"},
    "corda": {"init_lora_weights": "corda"},
    "loftq": {"init_lora_weights": "loftq"},
    "lora-ga, which takes its start from the base": {"init_lora_weights": "lora_ga"},
    "kasa": {"kasa_config": {}},
    "replicated layers": {"layer_replication": [[0, 2], [1, 4]]},
    "single tokens": {"trainable_token_indices": [1]},
    "parameters": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "after some tokens": {"alora_invocation_tokens": [3, 4]},
    "ia3": {"peft_type": "IA3"},
    "prompt tuning": {"peft_type": "PROMPT_TUNING"},
    "unknown": {"peft_type": "WONDER"},
    "no kind": {"peft_type": None},
    "another type": {"peft_type": 3},
}


@pytest.mark.filterwarnings("ignore:.*(corda_config|aLoRA is currently).*:UserWarning")
@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS.keys())
def test_adapter_folders_that_are_no_plain_lora(change, tmp_path):
    one, other = saved(policy(seed=1), tmp_path / "a"), saved(policy(seed=2), tmp_path / "b")
    edit(one / CONFIG, **change)
    refused(PolicyError, one, other)
    refused(PolicyError, other, one)
    refused(PolicyError, one, plain())


def test_data_driven_starts_of_a_that_leave_the_base_alone_are_read():
    check_lora(lora(init_lora_weights="eva", eva_config=peft.EvaConfig()), "eva")
    check_lora(lora(init_lora_weights=False), "random")


def test_several_active_adapters():
    strange = policy(seed=1)
    strange.add_adapter("second", lora())
    strange.base_model.set_adapter(["default", "second"])
    refused(PolicyError, strange, policy(seed=2), "one active adapter")


def test_a_merged_adapter():
    strange = policy(seed=1)
    strange.merge_adapter()
    refused(PolicyError, strange, policy(seed=2), "unmerge_adapter")
    strange.unmerge_adapter()
    difference(strange, policy(seed=2))


def test_another_adapter_that_is_merged():
    """Its product lies in the base weights."""
    strange = policy(seed=1)
    strange.add_adapter("second", lora())
    randomise(strange, 3)
    strange.merge_adapter(["second"])
    with pytest.raises(SteerkitError):
        PreferenceVector.difference(strange, plain(), name="liked")


@pytest.mark.parametrize("how", ["the model inside a wrapper", "the adapter of transformers"])
def test_a_model_with_layers_of_an_adapter_and_no_wrapper(how):
    """Read as the policy that it is, or refused; never a bare TypeError."""
    wrapped = policy(seed=1)
    model = wrapped.get_base_model()
    if how == "the adapter of transformers":
        model = plain()
        model.add_adapter(lora())
        randomise(model, 1)
    try:
        vector = difference(model, plain())
    except SteerkitError:
        return
    check_difference(vector, wrapped, plain())


def test_the_base_model_may_be_given_inside_a_wrapper(tmp_path):
    one, other = policy(seed=1), policy(seed=2)
    folders = [saved(one, tmp_path / "a"), saved(other, tmp_path / "b")]
    check_difference(difference(*folders, model=policy(seed=3)), one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("kind", ["live", "folder"])
def test_factors_that_are_not_finite(value, factor, kind, tmp_path):
    one, other = policy(seed=1), policy(seed=2)
    name = next(n for n in one.state_dict() if factor in n)
    with torch.no_grad():
        one.get_parameter(name)[1, 2] = value
    pair = (one, other) if kind == "live" else (saved(one, tmp_path / "a"), saved(other, tmp_path / "b"))
    refused(PolicyError, *pair, "finite")
    refused(PolicyError, *pair[::-1], "finite")


@pytest.mark.parametrize("kind", ["live", "folder"])
def test_weights_that_are_not_finite(kind, tmp_path):
    for value in (float("nan"), float("inf")):
        one = twin(seed=1)
        with torch.no_grad():
            one.model.norm.weight[3] = value
        pair: tuple[Any, Any] = (one, twin(seed=2))
        if kind == "folder":
            pair = (saved(one, tmp_path / f"a{value}"), saved(pair[1], tmp_path / f"b{value}"))
        refused(PolicyError, *pair, "model.norm.weight")
    both = [twin(seed=1), twin(seed=2)]
    with torch.no_grad():
        for each in both:
            each.model.norm.weight[3] = float("inf")  # their difference is NaN
    refused(PolicyError, *both, "finite")


@pytest.mark.parametrize("kind", ["live adapters", "adapter folders", "live models", "folders"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_identical_twins(kind, name, tmp_path):
    if "adapter" in kind:
        config = lora(["c_attn"] if name == "gpt2" else ATTENTION)
        pair = [policy(name, 1, config=copy.deepcopy(config)) for _ in range(2)]
    else:
        pair = [twin(name, 1), twin(name, 1)]
    sources = [saved(each, tmp_path / str(i)) for i, each in enumerate(pair)] if "folders" in kind else pair
    refused(PolicyError, *sources, "Two different policies")
    refused(PolicyError, sources[0], sources[0], "Two different policies")


def test_untrained_adapters():
    """B is zero: nothing differs, whatever A is."""
    one, other = (peft.get_peft_model(plain(), lora()) for _ in range(2))
    refused(PolicyError, one, other, "Two different policies")
    refused(PolicyError, one, plain(), "Two different policies")


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_vector_needs_a_name(name):
    with pytest.raises(PolicyError, match="needs a name"):
        PreferenceVector.difference(policy(seed=1), policy(seed=2), name=name)


@pytest.mark.parametrize("what", [None, 3, [], {}, 1.5], ids=repr)
def test_what_is_no_policy(what):
    with pytest.raises(SteerkitError):
        PreferenceVector.difference(what, plain(), name="liked")


# --- policies of different bases --------------------------------------------------------------------------------------


def other_base(name: str = "llama") -> Any:
    return twin(name, 9, size=0.5)


def test_live_adapters_on_other_weights():
    refused(BaseModelMismatchError, policy(seed=1), policy(seed=2, base=other_base()))
    refused(BaseModelMismatchError, policy(seed=1), other_base())
    refused(BaseModelMismatchError, policy(seed=1), policy(seed=2), model=other_base())


def test_live_adapters_of_other_architectures():
    refused(BaseModelMismatchError, policy(seed=1), policy("gpt2", 2, targets=["c_attn"], fan_in_fan_out=True))
    refused(BaseModelMismatchError, policy(seed=1), tiny_model("qwen3"))
    refused(BaseModelMismatchError, twin(seed=1), twin("qwen2", 2))


def test_adapter_folders_that_name_other_bases(tmp_path):
    one, other = saved(policy(seed=1), tmp_path / "a"), saved(policy(seed=2), tmp_path / "b")
    edit(one / CONFIG, base_model_name_or_path="somebody/one")
    edit(other / CONFIG, base_model_name_or_path="somebody/two")
    refused(BaseModelMismatchError, one, other, "somebody/one.*somebody/two")


def small_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return seeded(LlamaForCausalLM(LlamaConfig(**{**LLAMA_LIKE, "hidden_size": 16, "num_hidden_layers": 2})), 0)


def test_adapter_folders_of_other_shapes(tmp_path):
    """Nothing names the base: the factors themselves do not fit each other."""
    one = saved(policy(seed=1), tmp_path / "a")
    other = saved(policy(seed=2, base=small_llama()), tmp_path / "b")
    refused(BaseModelMismatchError, one, other)
    refused(BaseModelMismatchError, other, one)


@pytest.mark.parametrize("against", ["live adapter", "live model", "checkpoint"])
@pytest.mark.parametrize("kind", ["other names", "other shapes"])
def test_an_adapter_folder_beside_another_base(against, kind, tmp_path):
    """What it changes must be a parameter of the other policy's base."""
    one = saved(policy(seed=1), tmp_path / "a")
    base = tiny_model("gpt2") if kind == "other names" else small_llama()
    away: Any = base
    if against == "live adapter":
        away = policy(seed=2, base=base, targets=["c_attn"] if kind == "other names" else ATTENTION)
    elif against == "checkpoint":
        away = saved(base, tmp_path / "b")
    refused(BaseModelMismatchError, one, away)


def test_an_adapter_folder_on_a_model_that_is_not_its_base(tmp_path):
    one, other = saved(policy(seed=1), tmp_path / "a"), saved(policy(seed=2), tmp_path / "b")
    refused(BaseModelMismatchError, one, other, model=tiny_model("gpt2"))
    refused(BaseModelMismatchError, one, other, model=small_llama())


# --- damaged adapter folders ------------------------------------------------------------------------------------------

Tensors = dict[str, Tensor]


def _first(tensors: Mapping[str, Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def _drop(part: str) -> Callable[[Tensors], Any]:
    return lambda t: t.pop(_first(t, part))


def _put(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Any]:
    return lambda t: t.update({_first(t, part): change(t[_first(t, part)]).contiguous()})


FACTORS: dict[str, Callable[[Tensors], Any]] = {
    "one factor missing": _drop("lora_B"),
    "the other missing": _drop("lora_A"),
    "a whole weight": lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(3, 3)}),
    "a magnitude of dora": lambda t: t.update(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(32)}
    ),
    "a bias": lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(32)}),
    "a third factor": lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight": torch.ones(4, 4)}),
    "ranks that do not fit": _put("lora_A", lambda x: x[:-1]),
    "no rank": lambda t: (_put("q_proj.lora_A", lambda x: x[:0])(t), _put("q_proj.lora_B", lambda x: x[:, :0])(t)),
    "a vector": _put("lora_B", lambda x: x[0]),
    "four dimensions": _put("lora_A", lambda x: x[..., None, None]),
    "integers": _put("lora_B", lambda x: (10 * x).int()),
    "nothing": lambda t: t.clear(),
}  # fmt: skip


@pytest.mark.parametrize("change", FACTORS.values(), ids=FACTORS.keys())
def test_adapter_files_that_hold_something_else(change, tmp_path):
    one, other = saved(policy(seed=1), tmp_path / "a"), saved(policy(seed=2), tmp_path / "b")
    if change is FACTORS["nothing"]:
        other = tmp_path / "c"
        shutil.copytree(one, other)
        save_file({}, other / ADAPTER)
    tensors = load_file(one / ADAPTER)
    change(tensors)
    save_file(tensors, one / ADAPTER)
    refused(PolicyError, one, other)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '"LORA"', "[" * 100_000, '{"peft_type": "LORA", "r": "many"}', b"\xff\xfe\x00"],
    ids=["empty", "open", "list", "number", "null", "string", "deep", "rank", "binary"],
)
def test_adapter_configs_that_are_none(text, tmp_path):
    one, other = saved(policy(seed=1), tmp_path / "a"), saved(policy(seed=2), tmp_path / "b")
    (one / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    if "many" in str(text):  # the rank is read off the factors
        difference(one, other)
    else:
        refused(PolicyError, one, other)


ALPHAS: dict[str, dict[str, Any]] = {
    "a text": {"lora_alpha": "6"},
    "none": {"lora_alpha": None},
    "not a number": {"lora_alpha": float("nan")},
    "infinite": {"lora_alpha": float("inf")},
    "a pattern of texts": {"alpha_pattern": {"q_proj": "6"}},
    "a pattern that is a list": {"alpha_pattern": ["q_proj"]},
    "a pattern that does not compile": {"alpha_pattern": {"(": 3}},
}


@pytest.mark.parametrize("change", ALPHAS.values(), ids=ALPHAS.keys())
def test_scales_that_are_no_numbers(change, tmp_path):
    one, other = saved(policy(seed=1), tmp_path / "a"), saved(policy(seed=2), tmp_path / "b")
    edit(one / CONFIG, **change)
    refused(PolicyError, one, other)


def truncate(file: Path) -> None:
    blob = file.read_bytes()
    file.write_bytes(blob[: len(blob) // 2])


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


DAMAGED: dict[str, Callable[[Path], Any]] = {
    "truncated": truncate,
    "empty": lambda file: file.write_bytes(b""),
    "a long header": lambda file: file.write_bytes(struct.pack("<Q", 2**62) + b"{}"),
    "text": lambda file: file.write_text("weights"),
    "missing": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pickle": lambda file: file.write_bytes(pickle.dumps(Bomb(file.parent / "exploded"))),
    "a pickle beside": lambda file: (
        file.unlink(),
        file.with_name("adapter_model.bin").write_bytes(pickle.dumps(Bomb(file.parent / "exploded"))),
        file.with_name("pytorch_model.bin").write_bytes(pickle.dumps(Bomb(file.parent / "exploded"))),
    ),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED.keys())
@pytest.mark.parametrize("kind", ["adapter", "checkpoint", "shard"])
def test_damaged_files(damage, kind, tmp_path):
    if kind == "adapter":
        one, other = saved(policy(seed=1), tmp_path / "a"), saved(policy(seed=2), tmp_path / "b")
        damage(one / ADAPTER)
    else:
        how = {"max_shard_size": "40KB"} if kind == "shard" else {}
        one, other = saved(twin(seed=1), tmp_path / "a", **how), saved(twin(seed=2), tmp_path / "b")
        damage(sorted(one.glob("*.safetensors"))[1 if kind == "shard" else 0])
    refused(PolicyError, one, other)
    refused(PolicyError, other, one)
    assert not (one / "exploded").exists()


# --- checkpoint folders that are refused ------------------------------------------------------------------------------


def checkpoints(folder: Path, **settings: Any) -> tuple[Path, Path]:
    return saved(twin(seed=1), folder / "a", **settings), saved(twin(seed=2), folder / "b", **settings)


CHANGES: dict[str, tuple[Callable[[Tensors], Any], type[SteerkitError]]] = {
    "a tensor less": (_drop("q_proj"), BaseModelMismatchError),
    "a tensor more": (lambda t: t.update(extra=torch.ones(3)), BaseModelMismatchError),
    "a tensor renamed": (lambda t: t.update({"other": t.pop("lm_head.weight")}), BaseModelMismatchError),
    "another shape": (_put("q_proj", lambda x: x[:-1]), BaseModelMismatchError),
    "another shape of as many numbers": (_put("down_proj", lambda x: x.T), BaseModelMismatchError),
    "integers": (_put("q_proj", lambda x: (100 * x).to(torch.int8)), PolicyError),
    "eight-bit floats": (_put("q_proj", lambda x: x.to(torch.float8_e4m3fn)), PolicyError),
    "booleans": (_put("q_proj", lambda x: x > 0), PolicyError),
    "nothing": (lambda t: t.clear(), PolicyError),
}


@pytest.mark.parametrize(("change", "kind"), CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize(("config", "against"), [(True, "folder"), (False, "folder"), (True, "live")], ids=str)
def test_checkpoints_that_do_not_fit(change, kind, config, against, tmp_path):
    one, other = checkpoints(tmp_path)
    tensors = load_file(one / SINGLE)
    change(tensors)
    save_file(tensors, one / SINGLE, metadata={"format": "pt"})
    if not config:
        (one / "config.json").unlink()
        (other / "config.json").unlink()
    away = other if against == "folder" else twin(seed=2)
    refused(kind, one, away)
    refused(kind, away, one)


def test_checkpoints_without_a_config_are_read(tmp_path):
    one, other = checkpoints(tmp_path)
    (one / "config.json").unlink()
    check_difference(difference(one, other), twin(seed=1), twin(seed=2))


Index = Callable[[dict[str, Any]], Any]


def _rename(file: str) -> Index:
    return lambda index: index["weight_map"].update({"lm_head.weight": file})


INDICES: dict[str, Index] = {
    "a missing file": _rename("model-00099-of-00099.safetensors"),
    "a file elsewhere": _rename("../b/model-00001-of-00002.safetensors"),
    "an absolute path": _rename("/etc/hostname"),
    "the folder above": _rename(".."),
    "the folder": _rename("."),
    "no name": _rename(""),
    "a NUL": _rename("a\0b"),
    "a number": lambda index: index["weight_map"].update({"lm_head.weight": 3}),
    "a tensor that is not there": lambda index: index["weight_map"].update(
        {"more": next(iter(index["weight_map"].values()))}
    ),
    "a tensor in the wrong file": lambda index: index["weight_map"].update(
        {"lm_head.weight": index["weight_map"]["model.norm.weight"]}
    ) if index["weight_map"]["lm_head.weight"] != index["weight_map"]["model.norm.weight"] else index.clear(),
    "no map": lambda index: index.pop("weight_map"),
    "a map that is a list": lambda index: index.update(weight_map=["lm_head.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("change", INDICES.values(), ids=INDICES.keys())
def test_an_index_that_does_not_fit_its_files(change, tmp_path):
    one, other = checkpoints(tmp_path, max_shard_size="40KB")
    index = json.loads((one / INDEX).read_text())
    change(index)
    (one / INDEX).write_text(json.dumps(index))
    refused(PolicyError, one, other)
    refused(PolicyError, other, one)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000], ids=["empty", "list", "open", "null", "deep"])
def test_an_index_that_is_none(text, tmp_path):
    one, other = checkpoints(tmp_path, max_shard_size="40KB")
    (one / INDEX).write_text(text)
    refused(PolicyError, one, other)


CONFIG_TEXTS = {
    "empty": "",
    "list": "[]",
    "open": "{",
    "null": "null",
    "no type": "{}",
    "an unknown type": '{"model_type": "wonder"}',
    "a type that is a list": '{"model_type": ["llama"]}',
    "a depth that is a text": '{"model_type": "llama", "num_hidden_layers": "four"}',
    "an encoder-decoder": '{"model_type": "t5"}',
    "a vision model": '{"model_type": "resnet"}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", CONFIG_TEXTS.values(), ids=CONFIG_TEXTS.keys())
def test_a_config_that_is_none(text, tmp_path):
    one, other = checkpoints(tmp_path)
    (one / "config.json").write_text(text)
    with pytest.raises(SteerkitError):
        PreferenceVector.difference(one, other, name="liked")


@pytest.mark.parametrize("answer", ["y", "n"])
def test_code_in_a_folder_is_never_run(answer, tmp_path, monkeypatch):
    """Reading executes nothing and asks nothing: also not 'trust this code? [y/N]'."""
    one, other = checkpoints(tmp_path)
    (one / "mine.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    edit(one / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.MineConfig"})
    asked: list[str] = []

    def reply(prompt: str = "") -> str:
        asked.append(prompt)
        return answer

    monkeypatch.setattr("builtins.input", reply)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(SteerkitError):
        PreferenceVector.difference(one, other, name="liked")
    assert not (tmp_path / "ran").exists(), "the folder's code ran"
    assert asked == [], "the user was asked to run code"


def tokenizer_beside(folder: Path, change: Callable[[dict[str, Any]], Any] | None = None) -> None:
    tiny_tokenizer().save_pretrained(folder)
    if change is not None:
        raw = json.loads((folder / "tokenizer.json").read_text())
        change(raw)
        (folder / "tokenizer.json").write_text(json.dumps(raw))


VOCABULARIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "two words exchanged": lambda raw: raw["model"]["vocab"].update(w3=8, w4=7),
    "a word more": lambda raw: raw["model"]["vocab"].update(w999=99),
    "an added token": lambda raw: raw["added_tokens"].append(
        {**raw["added_tokens"][-1], "id": 98, "content": "<more>"}
    ),
    "another kind": lambda raw: raw["model"].update(type="WordPiece"),
}


@pytest.mark.parametrize("change", VOCABULARIES.values(), ids=VOCABULARIES.keys())
def test_unequal_tokenizers(change, tmp_path):
    one, other = checkpoints(tmp_path)
    tokenizer_beside(one)
    tokenizer_beside(other, change)
    refused(BaseModelMismatchError, one, other, "tokenizer")


def test_equal_tokenizers_and_one_alone(tmp_path):
    one, other = checkpoints(tmp_path)
    tokenizer_beside(one)
    difference(one, other)
    tokenizer_beside(other, lambda raw: raw.update(truncation=None, padding=None))
    (other / "tokenizer.json").write_text(json.dumps(json.loads((other / "tokenizer.json").read_text()), indent=7))
    check_difference(difference(one, other), twin(seed=1), twin(seed=2))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000], ids=["empty", "list", "open", "deep"])
def test_a_tokenizer_that_is_none(text, tmp_path):
    one, other = checkpoints(tmp_path)
    tokenizer_beside(one)
    tokenizer_beside(other)
    (one / "tokenizer.json").write_text(text)
    refused(PolicyError, one, other)


# --- folders that are none --------------------------------------------------------------------------------------------


def test_a_folder_that_does_not_exist(tmp_path):
    other = saved(twin(seed=2), tmp_path / "b")
    for path in (tmp_path / "missing", str(tmp_path / "missing"), "somebody/a-model", "a\0b"):
        refused(PolicyError, path, other)
        refused(PolicyError, other, path)


def test_a_file_is_no_folder(tmp_path):
    other = saved(twin(seed=2), tmp_path / "b")
    refused(PolicyError, other / SINGLE, other, "no folder")


def test_an_empty_folder(tmp_path):
    (tmp_path / "a").mkdir()
    other = saved(twin(seed=2), tmp_path / "b")
    refused(PolicyError, tmp_path / "a", other, "must hold")
    refused(PolicyError, other, tmp_path / "a", "must hold")


def test_a_folder_is_read_again_and_again(tmp_path):
    """Files stay closed and readable: a source holds no open file."""
    one, other = checkpoints(tmp_path)
    source = read_source(one)
    assert source.get is not None
    first = source.get("lm_head.weight")
    assert torch.equal(first, source.get("lm_head.weight"))
    shutil.rmtree(one)
    assert first.isfinite().all()
    assert not one.exists()
    difference(other, plain())


def test_offloaded_weights():
    model = plain()
    read_source(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to("meta"), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight"):
        PreferenceVector.difference(model, twin(seed=1), name="liked")


def test_depth_of_the_tiny_models():
    """What the lists of layers above count on."""
    assert DEPTH == 4
