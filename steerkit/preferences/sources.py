"""What a policy holds, read without changing it: a live model, a PEFT adapter or its folder, a folder of weights.

An adapter is read as low-rank changes of its base, whole weights as tensors, and those of a folder one at a time.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steerkit.errors import (
    AttachError,
    BaseModelMismatchError,
    MissingDependencyError,
    PolicyError,
    UnsupportedModelError,
)
from steerkit.maths.lowrank import LowRank, scaled, transposed
from steerkit.model import ORIGINALS, Decoder, Fingerprint, find_decoder, unwrap

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

_PLAIN = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "megatron_core",
        "ensure_weight_tying",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    ]
)
"""What a LoRA config may say without its product being less or more than the difference from the base."""

_FRESH = ("gaussian", "orthogonal", "eva", "mica")
"""Named initialisations that leave the base weights as they were."""

_CONV1D = ("c_attn", "q_attn", "c_fc", "c_proj")
"""Modules that GPT-2 and its kin keep as `"input output"`, known by name where only a file is at hand."""
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass(frozen=True)
class Source:
    """One policy: the changes of an adapter, or whole weights to be read by name."""

    what: str
    """How to name it in messages and headers."""
    fingerprint: Fingerprint | None
    base: str | None = None
    """The base model that an adapter names."""
    changes: Mapping[str, LowRank] | None = None
    """Of an adapter: float32, by parameter name."""
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    """Of whole weights."""
    get: Callable[[str], Tensor] | None = None
    swapped: frozenset[str] = frozenset()
    """Weights that their modules keep as `"input output"`."""
    vocabulary: Callable[[], str | None] = lambda: None
    """Reads what the tokenizer beside the weights knows, as text."""


def read_source(policy: Any, base: Decoder | None = None) -> Source:
    """Return what a policy holds.

    Args:
        policy: a PEFT model with one LoRA adapter, a model with whole weights, or a folder of either.
        base: its base model, which tells how modules keep their weights where a folder does not.

    Raises:
        PolicyError: an adapter that is no plain LoRA, a folder without weights, a pickled file.
    """
    if isinstance(policy, str | os.PathLike):
        folder = Path(policy)
        if not folder.is_dir():
            raise PolicyError(
                f"A policy must be a model or a folder. Found {str(folder)!r}, which is no folder. Check the path."
            )
        return _adapter_folder(folder, base) if (folder / ADAPTER_CONFIG).exists() else checkpoint_folder(folder)
    if isinstance(policy, Source):
        return policy
    if hasattr(policy, "source"):
        return policy.source()
    return _live_adapter(policy) if hasattr(policy, "peft_config") else live_weights(policy)


def live_weights(model: Any) -> Source:
    """Return the weights of a model without what adapters add to them."""
    decoder = find_decoder(model)
    if ORIGINALS in decoder.model.__dict__:
        raise AttachError(
            "Weights are read from a model at rest. Found a Controller that has written them. Detach it first."
        )
    parameters = decoder.parameters
    for name, parameter in parameters.items():
        if parameter.device.type == "meta" or not parameter.is_floating_point():
            raise UnsupportedModelError(
                f"A difference needs the numbers themselves. Found {name!r} offloaded or quantised. Load the model whole."
            )
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    return Source(
        what=decoder.name,
        fingerprint=Fingerprint.of(model),
        shapes=shapes,
        get=lambda name: parameters[name].detach().float().cpu(),
        swapped=input_output(decoder),
    )


def _live_adapter(model: Any) -> Source:
    active = sorted({name for each in model.modules() for name in _adapters_of(each)})
    if len(active) != 1:
        raise PolicyError(f"A policy must have one active adapter. Found {active}. Call set_adapter(name).")
    [adapter] = active
    config = model.peft_config[adapter]
    check_lora(config, f"adapter {adapter!r}")
    changes: dict[str, LowRank] = {}
    for path, module in unwrap(model).named_modules():
        if getattr(module, "merged_adapters", None):
            raise PolicyError(f"An adapter must not be merged. Found {path!r} merged. Call unmerge_adapter().")
        for kind in ("lora_A", "lora_embedding_A"):
            if adapter not in getattr(module, kind, {}):
                continue
            first = getattr(module, kind)[adapter]
            second = getattr(module, kind.replace("_A", "_B"))[adapter]
            right, left = (getattr(each, "weight", each) for each in (first, second))
            swapped = kind == "lora_embedding_A" or bool(getattr(module, "fan_in_fan_out", False))
            changes[f"{path}.weight"] = _change(left, right, module.scaling[adapter], swapped, f"{path}.weight")
    decoder = find_decoder(model)
    return Source(
        what=f"adapter {adapter!r} on {decoder.name}",
        fingerprint=Fingerprint.of(model),
        changes=changes,
        shapes=decoder.shapes,
        swapped=input_output(decoder),
    )


def _adapters_of(module: Any) -> list[str]:
    """Return the active adapters of one adapted layer; models tell theirs in several ways, layers in one."""
    return list(module.active_adapters) if hasattr(module, "lora_A") else []


def input_output(decoder: Decoder) -> frozenset[str]:
    """Return the weights that their modules keep as `"input output"`."""
    return frozenset(f"{path}.weight" for path, output_input in decoder.linears.items() if not output_input)


def _change(left: Tensor, right: Tensor, scale: float, swapped: bool, name: str) -> LowRank:
    fits = left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0] > 0
    if not fits or not left.is_floating_point() or not right.is_floating_point():
        raise PolicyError(
            f"LoRA is two floating-point factors of one rank, on linear modules or embeddings. Found {tuple(left.shape)} "
            f"({left.dtype}) and {tuple(right.shape)} ({right.dtype}) for {name!r}."
        )
    delta = LowRank(left.detach().float().cpu().clone(), right.detach().float().cpu().clone())
    for factor in delta:
        if not bool(factor.isfinite().all()) or not math.isfinite(scale):
            raise PolicyError(f"A policy must be finite. Found NaN or infinity in {name!r}. Check the training run.")
    change = scaled(delta, scale)
    change = transposed(change) if swapped else change
    assert isinstance(change, LowRank)
    return change


def check_lora(config: Any, what: str) -> None:
    """Raise unless a PEFT config is of LoRA whose product is the whole difference from the base.

    Raises:
        PolicyError: DoRA, modules that are saved whole, trained biases, another kind of adapter.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise PolicyError(f"A policy must be LoRA or whole weights. Found {what} of type {kind}. Train one of those.")
    if getattr(config, "bias", "none") != "none":
        raise PolicyError(
            f"A policy must leave biases alone. Found {what} with bias={config.bias!r}, which overwrites those of the base. "
            "Train with bias='none', or train whole weights."
        )
    start = getattr(config, "init_lora_weights", True)
    if not isinstance(start, bool) and start not in _FRESH:
        raise PolicyError(
            f"A policy must leave the base as it was. Found {what} with init_lora_weights={start!r}, which may rewrite it. "
            "Convert the adapter to plain LoRA, or compare merged checkpoints."
        )
    usual = vars(type(config)())
    for name, value in vars(config).items():
        if name in usual and value and value != usual[name] and name not in _PLAIN:
            raise PolicyError(
                f"A policy must be plain LoRA, whose product is its whole difference from the base. Found {what} with "
                f"{name}={value!r:.60}. Train plain LoRA, or compare merged checkpoints."
            )


def _json(file: Path, what: str) -> Any:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise PolicyError(f"{file} must be {what}. It cannot be read: {error!s:.80}. Save it again.") from error
    if not isinstance(found, dict):
        raise PolicyError(f"{file} must be {what}. Found {type(found).__name__}. Save it again.")
    return found


def _adapter_folder(folder: Path, base: Decoder | None) -> Source:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingDependencyError(
            f"Adapter folders are read with peft. Found {error}. Run: pip install 'steerkit-sdk[train]'."
        ) from error
    file = folder / ADAPTER_CONFIG
    raw = _json(file, "a LoRA config")
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise PolicyError(f"A policy must be LoRA or whole weights. Found {folder} of type {kind}. Train one of those.")
    try:
        config = LoraConfig.from_peft_type(**raw)
    except Exception as error:  # a config checks what it likes
        raise PolicyError(f"{file} must be a LoRA config. Found {error!s:.120}. Save it again.") from error
    check_lora(config, str(folder))
    pairs: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    for key, tensor in _tensors(folder / ADAPTER_WEIGHTS):
        if ".base_layer." in key:
            continue  # PEFT saves adapted embeddings with the base's own, which LoRA does not train
        path, _, rest = key.removeprefix("base_model.model.").rpartition(".lora_")
        kind, _, side = rest.removesuffix(".weight").rpartition("_")
        if not path or side not in ("A", "B") or kind not in ("", "embedding"):
            raise PolicyError(f"An adapter's file must hold LoRA factors. Found {key!r} in {folder}. Save plain LoRA.")
        pairs.setdefault(path, {})[side] = tensor
        if kind:
            embeddings.add(path)
    changes: dict[str, LowRank] = {}
    inputs_first = _inputs_first(folder, pairs, embeddings, bool(config.fan_in_fan_out), base)
    for path, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise PolicyError(f"LoRA needs both factors. Found one for {path!r} in {folder}. Save the adapter again.")
        name = f"{path}.weight"
        swapped = path in embeddings or name in inputs_first
        changes[name] = _change(pair["B"], pair["A"], _scale(config, path, pair["A"]), swapped, name)
    return Source(
        what=folder.name, fingerprint=None, base=config.base_model_name_or_path, changes=changes, swapped=inputs_first
    )


def _scale(config: Any, path: str, first: Tensor) -> float:
    from peft.utils.other import get_pattern_key

    try:
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), path), config.lora_alpha)
        rank = first.shape[0]
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise TypeError(f"alpha {alpha!r}")
        return alpha / (math.sqrt(rank) if config.use_rslora else rank)
    except (TypeError, AttributeError, ValueError, ZeroDivisionError, IndexError, re.error) as error:
        raise PolicyError(
            f"LoRA needs a number for alpha and a rank above 0. Found neither for {path!r}: {error!s:.80}."
        ) from error


def _inputs_first(
    folder: Path, paths: Iterable[str], embeddings: set[str], said: bool, base: Decoder | None
) -> frozenset[str]:
    """Return the weights that their modules keep as `"input output"`: as the base has them, or as names tell.

    PEFT writes one `fan_in_fan_out` for all modules, so that a folder with both kinds cannot tell.
    """
    if base is not None:
        return input_output(base)
    linear = [path for path in paths if path not in embeddings]
    first = {path for path in linear if path.rpartition(".")[2] in _CONV1D}
    if any((path in first) != said for path in linear):
        raise PolicyError(
            f"A folder must tell how its modules keep their weights. Found fan_in_fan_out={said} in {folder} for modules that "
            "may be of both kinds. Pass the base model: model=..."
        )
    return frozenset(f"{path}.weight" for path in first)


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if not file.exists():
        raise PolicyError(
            f"{file} must exist. Found {sorted(p.name for p in file.parent.iterdir())[:6]}. Save as safetensors; pickled "
            "files are never opened."
        )
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (not a dict)
                yield key, opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise PolicyError(
            f"{file} must be a safetensors file. It cannot be read: {error!s:.120}. Save it again."
        ) from error


def shards(folder: Path) -> dict[str, Path]:
    """Return in which file of a checkpoint folder each tensor lies.

    Raises:
        PolicyError: no safetensors weights, an index that does not fit its files.
    """
    if (folder / INDEX).exists():
        try:
            where = _json(folder / INDEX, "an index")["weight_map"]
            files = {name: folder / file for name, file in where.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise PolicyError(
                f"{folder / INDEX} must map tensors to files. Found {error!s:.80}. Save it again."
            ) from error
        for file in sorted(set(files.values())):
            if file.parent != folder or not file.exists():
                raise PolicyError(f"{folder} must hold every file that its index names. {file.name!r} is missing.")
        return files
    if not (folder / SINGLE).exists():
        raise PolicyError(
            f"{folder} must hold {SINGLE}, {INDEX} or {ADAPTER_CONFIG}. Found {sorted(p.name for p in folder.iterdir())[:6]}. "
            "Save the model with save_pretrained; pickled files are never opened."
        )
    try:
        with safe_open(folder / SINGLE, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), folder / SINGLE)
    except (SafetensorError, OSError) as error:
        raise PolicyError(f"{folder / SINGLE} must be a safetensors file: {error!s:.120}. Save it again.") from error


def checkpoint_folder(folder: Path) -> Source:
    """Return the weights of a checkpoint folder, to be read one tensor at a time."""
    files = shards(folder)
    shapes: dict[str, torch.Size] = {}
    buffers: set[str] = set()
    try:
        for file in sorted(set(files.values())):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dict)
                    part = opened.get_slice(name)
                    if files.get(name) == file and _is_buffer(name, part):
                        buffers.add(name)
                        continue
                    if files.get(name) == file and part.get_dtype() in ("F64", "F32", "F16", "BF16"):
                        shapes[name] = torch.Size(part.get_shape())
                    elif files.get(name) == file:
                        raise PolicyError(
                            f"Weights must be floating-point numbers. Found {name!r} as {part.get_dtype()} in {folder}. Use the "
                            "unquantised checkpoint."
                        )
    except (SafetensorError, OSError) as error:
        raise PolicyError(f"{folder} must hold safetensors files. One cannot be read: {error!s:.120}.") from error
    lost = sorted(set(files) - set(shapes) - buffers)
    if lost:
        raise PolicyError(f"{folder} must hold the tensors that its index names. {lost[0]!r} is missing.")
    if not shapes:
        raise PolicyError(f"{folder} must hold weights. Found none. Save the model again.")
    config = _config(folder)
    if config is not None and getattr(config, "tie_word_embeddings", False):
        # A tied head that was saved all the same is the embedding again.
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("lm_head.weight")}

    opened = {file: safe_open(file, framework="pt") for file in sorted(set(files.values()))}

    def get(name: str) -> Tensor:
        return opened[files[name]].get_tensor(name)

    known = None
    swapped: frozenset[str] = frozenset()
    if config is not None:
        text = config.get_text_config(decoder=True)
        depth, width = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
        if type(depth) is not int or type(width) is not int:
            raise PolicyError(
                f"{folder} must hold a decoder. Found a config of {config.model_type!r} without its depth or width."
            )
        known = Fingerprint.of_weights(shapes, get, folder.name, depth, width)
        if config.model_type in _CONV1D_MODELS:
            ends = tuple(f".{name}.weight" for name in _CONV1D)
            swapped = frozenset(name for name in shapes if name.endswith(ends))
    return Source(
        what=folder.name,
        fingerprint=known,
        shapes=shapes,
        get=lambda name: get(name).float(),
        swapped=swapped,
        vocabulary=lambda: _vocabulary(folder),
    )


def _is_buffer(name: str, part: Any) -> bool:
    """Whether a tensor of an older checkpoint is a mask or a table and no parameter."""
    mask = name.endswith((".attn.bias", ".attention.bias")) and len(part.get_shape()) == 4
    return mask or name.endswith((".inv_freq", ".masked_bias"))


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        exists = (folder / "config.json").exists()
        return AutoConfig.from_pretrained(folder, trust_remote_code=False) if exists else None
    except Exception as error:  # a config checks what it likes
        raise PolicyError(f"{folder / 'config.json'} must be a model's config. Found {error!s:.120}.") from error


def _vocabulary(folder: Path) -> str | None:
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    raw = _json(file, "a tokenizer")
    return json.dumps([raw.get("model"), raw.get("added_tokens")], sort_keys=True)


def check_one_base(first: Source, second: Source) -> None:
    """Raise unless two policies may be compared.

    Raises:
        BaseModelMismatchError: adapters of different bases, other tensors or shapes, unequal tokenizers.
    """
    if first.base and second.base and first.base != second.base:
        raise BaseModelMismatchError(
            f"Both adapters must have one base model. Found {first.base!r} and {second.base!r}. Use twins."
        )
    if first.fingerprint is not None and second.fingerprint is not None:
        whole = first.changes is None and second.changes is None
        # Whole weights have been trained, so only names and shapes must agree; beside an adapter they are its base.
        (first.fingerprint.without_values() if whole else first.fingerprint).check(second.fingerprint, first.what)
    vocabularies = {text for text in (first.vocabulary(), second.vocabulary()) if text is not None}
    if len(vocabularies) > 1:
        raise BaseModelMismatchError(
            f"Both policies must have one tokenizer. Those of {first.what} and {second.what} differ. Use twins of one base."
        )
    if first.changes is None and second.changes is None:
        check_same_tensors(first, second)
    for one, other in ((first, second), (second, first)):
        for name, change in (one.changes or {}).items():
            there = other.shapes.get(name) if other.shapes else (other.changes or {}).get(name, change).shape
            if there != change.shape:
                found = "none" if there is None else f"one of shape {tuple(there)}"
                raise BaseModelMismatchError(
                    f"Both policies must change one base model. {one.what} changes {name!r} of shape {tuple(change.shape)}; "
                    f"{other.what} has {found}. Use twins of one base."
                )


def check_same_tensors(first: Source, second: Source) -> None:
    """Raise unless whole weights have the same names and shapes."""
    for one, other in ((first, second), (second, first)):
        missing = sorted(set(one.shapes) - set(other.shapes))
        if missing:
            raise BaseModelMismatchError(
                f"Both policies must hold the same tensors. {missing[0]!r} is in {one.what} and not in {other.what} "
                f"({len(missing)} in all). Compare checkpoints of one model."
            )
    for name, shape in first.shapes.items():
        if second.shapes[name] != shape:
            raise BaseModelMismatchError(
                f"Tensors must have one shape. Found {name!r} as {tuple(shape)} in {first.what} and "
                f"{tuple(second.shapes[name])} in {second.what}. Compare checkpoints of one model."
            )
