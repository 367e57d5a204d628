"""What a policy holds, read without changing it: a live model, a PEFT adapter or its folder, a folder of weights.

An adapter is read as low-rank changes of its base, whole weights as tensors, and those of a folder one at a time.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steerkit.errors import BaseModelMismatchError, PolicyError, UnsupportedModelError
from steerkit.maths.lowrank import LowRank, scaled, transposed
from steerkit.model import Decoder, Fingerprint, find_decoder, unwrap

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "eva_")
"""Initialisations of LoRA that change the base weights too, so that its product is not the difference from them."""


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
    vocabulary: str | None = None
    """What the tokenizer beside the weights knows, as text."""


def read_source(policy: Any) -> Source:
    """Return what a policy holds.

    Args:
        policy: a PEFT model with one LoRA adapter, a model with whole weights, or a folder of either.

    Raises:
        PolicyError: an adapter that is no plain LoRA, a folder without weights, a pickled file.
    """
    if isinstance(policy, str | os.PathLike):
        folder = Path(policy)
        if not folder.is_dir():
            raise PolicyError(
                f"A policy must be a model or a folder. Found {str(folder)!r}, which is no folder. Check the path."
            )
        return _adapter_folder(folder) if (folder / ADAPTER_CONFIG).exists() else checkpoint_folder(folder)
    if isinstance(policy, Source):
        return policy
    if hasattr(policy, "source"):
        return policy.source()
    return _live_adapter(policy) if hasattr(policy, "peft_config") else _live_weights(policy)


def _live_weights(model: Any) -> Source:
    decoder = find_decoder(model)
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
        swapped=_input_output(decoder),
    )


def _live_adapter(model: Any) -> Source:
    active = list(model.active_adapters)
    if len(active) != 1:
        raise PolicyError(f"A policy must have one active adapter. Found {active}. Call set_adapter(name).")
    [adapter] = active
    config = model.peft_config[adapter]
    check_lora(config, f"adapter {adapter!r}")
    changes: dict[str, LowRank] = {}
    left_over = {name for name, p in model.named_parameters() if f".{adapter}" in name and "lora_" not in name}
    if left_over:
        raise PolicyError(f"A policy must change weights by LoRA alone. Found {sorted(left_over)[0]!r} beside it.")
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
    what = f"adapter {adapter!r} on {decoder.name}"
    return Source(what=what, fingerprint=Fingerprint.of(model), changes=changes, swapped=_input_output(decoder))


def _input_output(decoder: Decoder) -> frozenset[str]:
    return frozenset(f"{path}.weight" for path, output_input in decoder.linears.items() if not output_input)


def _change(left: Tensor, right: Tensor, scale: float, swapped: bool, name: str) -> LowRank:
    if left.ndim != 2 or right.ndim != 2:
        raise PolicyError(f"LoRA must be on linear modules or embeddings. Found {name!r} of {left.ndim} dimensions.")
    delta = LowRank(left.detach().float().cpu().clone(), right.detach().float().cpu().clone())
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
    refused = {
        "use_dora": "DoRA also scales what the base puts out, which is no fixed difference of weights",
        "use_qalora": "QA-LoRA pools its input",
        "modules_to_save": "modules saved whole change beside LoRA",
        "target_parameters": "LoRA on parameters has no module of its own",
        "lora_bias": "LoRA with a bias is no product of two factors",
        "trainable_token_indices": "single token embeddings change beside LoRA",
        "layer_replication": "replicated layers share their base",
        "alora_invocation_tokens": "it acts after some tokens only",
    }
    for name, why in refused.items():
        if getattr(config, name, None):
            raise PolicyError(
                f"A policy must be plain LoRA. Found {what} with {name}={getattr(config, name)!r}: {why}."
            )
    if getattr(config, "bias", "none") != "none":
        raise PolicyError(
            f"A policy must leave biases alone. Found {what} with bias={config.bias!r}, which overwrites those of the base. "
            "Train with bias='none', or train whole weights."
        )
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_REWRITES_BASE):
        raise PolicyError(
            f"A policy must leave the base as it was. Found {what} with init_lora_weights={start!r}, which rewrites it. "
            "Convert the adapter to plain LoRA, or compare merged checkpoints."
        )


def _adapter_folder(folder: Path) -> Source:
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    try:
        raw = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise PolicyError(
                f"A policy must be LoRA or whole weights. Found {folder} of type {kind}. Train one of those."
            )
        config = LoraConfig.from_peft_type(**raw)
    except (ValueError, TypeError, AttributeError) as error:
        raise PolicyError(
            f"{folder / ADAPTER_CONFIG} must be a LoRA config. Found {error!s:.120}. Save it again."
        ) from error
    check_lora(config, str(folder))
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _tensors(folder / ADAPTER_WEIGHTS):
        path, _, rest = key.removeprefix("base_model.model.").rpartition(".lora_")
        kind, side = (
            rest.removesuffix(".weight").rpartition("_")[::2] if "_" in rest else ("", rest.removesuffix(".weight"))
        )
        if not path or side not in ("A", "B") or kind not in ("", "embedding"):
            raise PolicyError(f"An adapter's file must hold LoRA factors. Found {key!r} in {folder}. Save plain LoRA.")
        pairs.setdefault(path, {})[side] = tensor
        pairs[path]["swapped"] = torch.tensor(kind == "embedding" or bool(config.fan_in_fan_out))
    changes: dict[str, LowRank] = {}
    for path, pair in pairs.items():
        if not {"A", "B"} <= set(pair):
            raise PolicyError(f"LoRA needs both factors. Found one for {path!r} in {folder}. Save the adapter again.")
        rank = pair["A"].shape[0]
        pattern = config.alpha_pattern
        alpha = pattern.get(get_pattern_key(pattern.keys(), path), config.lora_alpha)
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        changes[f"{path}.weight"] = _change(pair["B"], pair["A"], scale, bool(pair["swapped"]), f"{path}.weight")
    swapped = frozenset(changes) if config.fan_in_fan_out else frozenset()
    return Source(
        what=folder.name, fingerprint=None, base=config.base_model_name_or_path, changes=changes, swapped=swapped
    )


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
            where = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
            files = {name: folder / file for name, file in where.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
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
    try:
        for file in sorted(set(files.values())):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dict)
                    part = opened.get_slice(name)
                    if files.get(name) == file and part.get_dtype() in ("F64", "F32", "F16", "BF16"):
                        shapes[name] = torch.Size(part.get_shape())
                    elif files.get(name) == file:
                        raise PolicyError(
                            f"Weights must be floating-point numbers. Found {name!r} as {part.get_dtype()} in {folder}. Use the "
                            "unquantised checkpoint."
                        )
    except (SafetensorError, OSError) as error:
        raise PolicyError(f"{folder} must hold safetensors files. One cannot be read: {error!s:.120}.") from error
    lost = sorted(set(files) - set(shapes))
    if lost:
        raise PolicyError(f"{folder} must hold the tensors that its index names. {lost[0]!r} is missing.")
    config = _config(folder)
    if config is not None and getattr(config, "tie_word_embeddings", False):
        # A tied head that was saved all the same is the embedding again.
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("lm_head.weight")}

    def get(name: str) -> Tensor:
        with safe_open(files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    known = None
    if config is not None:
        text = config.get_text_config(decoder=True)
        known = Fingerprint.of_weights(shapes, get, folder.name, int(text.num_hidden_layers), int(text.hidden_size))
    return Source(
        what=folder.name,
        fingerprint=known,
        shapes=shapes,
        get=lambda name: get(name).float(),
        vocabulary=_vocabulary(folder),
    )


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder) if (folder / "config.json").exists() else None
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise PolicyError(f"{folder / 'config.json'} must be a model's config. Found {error!s:.120}.") from error


def _vocabulary(folder: Path) -> str | None:
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    try:
        raw = json.loads(file.read_text("utf-8"))
        return json.dumps([raw.get("model"), raw.get("added_tokens")], sort_keys=True)
    except (ValueError, AttributeError) as error:
        raise PolicyError(f"{file} must be a tokenizer. Found {error!s:.80}. Save it again.") from error


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
    if first.vocabulary and second.vocabulary and first.vocabulary != second.vocabulary:
        raise BaseModelMismatchError(
            f"Both policies must have one tokenizer. Those of {first.what} and {second.what} differ. Use twins of one base."
        )
    if first.changes is None and second.changes is None:
        check_same_tensors(first, second)


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
