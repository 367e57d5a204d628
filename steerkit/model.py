"""Find the decoder blocks of a causal language model, check them by looking, and know the model again later.

The promise that everything else rests on: block l hands its output, one `"batch pos d_model"` tensor, to block l + 1
and to nobody else. It is not read from a list of class names. The model is run once on three tokens and watched; a
model that breaks the promise is refused with what was seen.
"""

import hashlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steerkit.errors import ArtefactError, BaseModelMismatchError, LayerError, UnsupportedModelError
from steerkit.types import STREAMS, Layers

_SAMPLES = 256
_TOLERANCE = 2.0**-7
"""Relative difference of a sampled weight up to which two models count as one: bfloat16 keeps eight bits."""

_CACHES = ("past_key_values", "cache_params")

_found: WeakKeyDictionary[nn.Module, tuple[str, str, int, int]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Decoder:
    """The decoder of a model, found and checked."""

    model: Any
    """The model itself, without wrappers."""
    body: nn.Module
    """What turns tokens into the last hidden state: the model without its language-model head."""
    owner: nn.Module
    """The module whose forward runs through the blocks."""
    blocks: nn.ModuleList
    d_model: int

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def name(self) -> str:
        """What the model calls itself: its hub id, the name of its folder, or its class."""
        name = str(getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__)
        return PurePath(name).name if PurePath(name).is_absolute() else name


def unwrap(model: Any) -> Any:
    """Return the transformers model inside PEFT, nnsight, torch.compile or data-parallel wrappers."""
    while True:
        origin = type(model).__module__.split(".")[0]
        if origin == "peft":
            config = getattr(model, "active_peft_config", None)
            if config is not None and config.is_prompt_learning:
                raise UnsupportedModelError(
                    f"Positions of a prompt must be its own tokens. Found {type(config).__name__}, which puts virtual "
                    "tokens in front. Use an adapter that changes weights, such as LoRA."
                )
            model = model.get_base_model()
        elif origin == "nnsight":
            model = model._module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def find_decoder(model: Any) -> Decoder:
    """Return the checked decoder of a model; the check runs once for each model object.

    Raises:
        UnsupportedModelError: no decoder blocks were found, or they do not carry one residual stream.
    """
    model = unwrap(model)
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"A transformers model is required. Found {type(model).__name__}. Load one with "
            "AutoModelForCausalLM.from_pretrained(...)."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"A decoder-only model is required. Found {type(model).__name__}, an encoder-decoder. Use a causal model."
        )
    known = _found.get(model)
    body = getattr(model, "base_model", model)
    if known is not None:
        owner = model.get_submodule(known[0])
        blocks = owner.get_submodule(known[1])
        if isinstance(blocks, nn.ModuleList) and len(blocks) == known[2]:
            return Decoder(model, body, owner, blocks, known[3])
    path = _blocks_path(model)
    owner_path, _, name = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    _check_signature(model, owner)
    d_model = _watch(model, body, blocks)
    _found[model] = (owner_path, name, len(blocks), d_model)
    return Decoder(model, body, owner, blocks, d_model)


def _blocks_path(model: Any) -> str:
    """Return where the list of decoder blocks lies: the outermost list as long as the config says."""
    config = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    count = getattr(config, "num_hidden_layers", None)
    root = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(module) for module in (root if isinstance(root, nn.Module) else model).modules()}
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and id(module) in inside and len(module) > 0
    ]
    fitting = [path for path, module in lists if len(module) == count]
    if not fitting:
        seen = ", ".join(f"{path} ({len(module)})" for path, module in lists[:4]) or "no list of modules at all"
        raise UnsupportedModelError(
            f"{type(model).__name__} must hold its {count} decoder blocks in one nn.ModuleList. Found {seen}. "
            "This architecture cannot be steered."
        )
    return min(fitting, key=lambda path: path.count("."))


def _check_signature(model: Any, owner: nn.Module) -> None:
    """Refuse a model in which nothing would tell where a forward pass lies in the sequence."""
    takes = set(inspect.signature(type(owner).forward).parameters)
    for need, purpose in ((STREAMS, "rows and positions"), (_CACHES, "the length of what was decoded before")):
        needless = need is _CACHES and not getattr(model.config, "use_cache", False)
        if not takes & set(need) and not needless:
            raise UnsupportedModelError(
                f"{type(owner).__name__} must take one of {', '.join(need)}, which tell {purpose}. Found "
                f"{', '.join(sorted(takes - {'self'}))}. This architecture cannot be steered."
            )


def _watch(model: Any, body: nn.Module, blocks: nn.ModuleList) -> int:
    """Run three tokens through the body, check the promise of the module docstring, return the residual width."""
    seen: list[tuple[int, Tensor | None, Any]] = []

    def watch(index: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            stream = args[0] if args else kwargs.get("hidden_states")
            seen.append((index, stream, output))

        return hook

    def refuse(found: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"Every decoder block must pass one residual stream to the next. Found in {type(model).__name__}: {found}. "
            "This architecture cannot be steered."
        )

    handles = [block.register_forward_hook(watch(i), with_kwargs=True) for i, block in enumerate(blocks)]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        embedding = model.get_input_embeddings()
        device = embedding.weight.device if embedding.weight.device.type != "meta" else None
        tokens = torch.tensor([[1, 0, 1]], device=device)
        with torch.random.fork_rng(devices), torch.no_grad():
            body(input_ids=tokens, use_cache=False)
    except Exception as error:
        raise refuse(f"a forward pass over three tokens failed ({type(error).__name__}: {error})") from error
    finally:
        for handle in handles:
            handle.remove()

    if [index for index, _, _ in seen] != list(range(len(blocks))):
        raise refuse(f"the {len(blocks)} blocks ran in the order {[index for index, _, _ in seen]}")
    before: Tensor | None = None
    for index, stream, output in seen:
        after = hidden_states_of(output)
        if after is None or after.ndim != 3 or after.shape[:2] != (1, 3) or not after.is_floating_point():
            what = tuple(after.shape) if after is not None else type(output).__name__
            raise refuse(f"block {index} returns {what} instead of a (batch, pos, d_model) tensor")
        if stream is None or stream.shape != after.shape:
            raise refuse(f"block {index} takes no hidden states of the shape {tuple(after.shape)} that it returns")
        if before is not None and not torch.equal(before.to(stream.device), stream):
            raise refuse(f"block {index} does not read what block {index - 1} returned")
        before = after
    assert before is not None
    return before.shape[-1]


def hidden_states_of(output: Any) -> Tensor | None:
    """Return the hidden states in what a block returned: a tensor, or the first entry of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


def resolve_layers(layers: Layers | None, depth: int) -> tuple[int, ...]:
    """Return layer indices as non-negative integers without doubles, in the order given; None means every block.

    Raises:
        LayerError: an index is not an integer, does not exist or is given twice.
    """
    if layers is None:
        return tuple(range(depth))
    listed = [layers] if isinstance(layers, int) else list(layers) if isinstance(layers, Iterable) else [layers]
    resolved = []
    for layer in listed:
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise LayerError(f"A layer must be an integer. Found {layer!r}. Pass block indices, 0 to {depth - 1}.")
        index = layer.__index__()
        if not -depth <= index < depth:
            raise LayerError(
                f"Layer {index} does not exist: the model has {depth} decoder blocks (0..{depth - 1}). "
                f"Use layers=range({depth // 3}, {max(depth // 3 + 1, 2 * depth // 3)}), or -1 for the last.",
                layer=index,
                depth=depth,
            )
        resolved.append(index % depth)
    if not resolved:
        raise LayerError(f"At least one layer is required. Found none. Pass block indices, 0 to {depth - 1}.")
    if len(set(resolved)) != len(resolved):
        raise LayerError(f"Layers must differ. Found {listed}, which is {resolved} once resolved. Name each one once.")
    return tuple(resolved)


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What tells one base model from another, and survives a cast between float32, bfloat16 and float16.

    Names and shapes of all parameters are hashed; 256 values are stored and compared within a relative 2^-7, because
    a hash of values cannot survive a cast. A light fine-tune of the same model is not told apart.
    """

    digest: str
    name: str
    depth: int
    d_model: int
    values: Tensor = field(repr=False)

    @classmethod
    def of(cls, model: Any) -> "Fingerprint":
        """Take the fingerprint of a model, reading through PEFT wrappers to the base weights."""
        decoder = find_decoder(model)
        named = sorted(_base_parameters(decoder.model), key=lambda pair: pair[0])
        text = "\n".join(f"{name} {tuple(parameter.shape)}" for name, parameter in named)
        generator = torch.Generator().manual_seed(0)
        picks = torch.randint(len(named), (_SAMPLES,), generator=generator).tolist()
        places = torch.rand(_SAMPLES, generator=generator, dtype=torch.float64).tolist()
        values = [_entry(named[pick][1].detach(), place) for pick, place in zip(picks, places, strict=True)]
        return cls(
            digest=hashlib.sha256(text.encode()).hexdigest()[:16],
            name=decoder.name,
            depth=decoder.depth,
            d_model=decoder.d_model,
            values=torch.tensor(values, dtype=torch.float32),
        )

    def header(self) -> dict[str, Any]:
        """Return what a file's header says of the base model; the sampled weights go beside its tensors."""
        return {"digest": self.digest, "name": self.name, "depth": self.depth, "d_model": self.d_model}

    @classmethod
    def from_parts(cls, header: Any, values: Tensor) -> "Fingerprint":
        """Rebuild from a file.

        Raises:
            ArtefactError: the parts do not describe a base model.
        """
        kinds = {"digest": str, "name": str, "depth": int, "d_model": int}
        whole = isinstance(header, dict) and all(type(header.get(key)) is kind for key, kind in kinds.items())
        if not whole or len(values) != _SAMPLES:
            raise ArtefactError(f"A file must describe its base model. Found {header!r:.80}. Make the file again.")
        return cls(**{key: header[key] for key in kinds}, values=values)

    def check(self, other: "Fingerprint", what: str) -> None:
        """Raise BaseModelMismatchError unless `other` is the same base model; `what` names the artefact."""
        if self.digest != other.digest:
            raise BaseModelMismatchError(
                f"{what} was extracted from base model {self.digest} ({self.name}), this model is {other.digest} "
                f"({other.name}). Load it on the model it came from, or pass check_model=False if you know better.",
                expected=self.digest,
                found=other.digest,
            )
        known = self.values.isfinite() & other.values.isfinite()
        gap = (self.values - other.values).abs()
        far = known & (gap > _TOLERANCE * torch.maximum(self.values.abs(), other.values.abs()) + 1e-6)
        if bool(far.any()):
            raise BaseModelMismatchError(
                f"{what} was extracted from base model {self.digest} ({self.name}) with other weights: "
                f"{int(far.sum())} of {int(known.sum())} sampled weights differ in this model ({other.name}). Load it "
                "on the model it came from, or pass check_model=False if you know better.",
                expected=self.digest,
                found=other.digest,
            )


def _base_parameters(model: Any) -> list[tuple[str, Tensor]]:
    """Return the parameters that the base model has by itself, by the names that they have there.

    PEFT keeps an adapted layer as `base_layer` and a copied module's original as `original_module`, and puts what it
    adds beside them.
    """
    adapted = {
        name.rpartition(".")[0]
        for name, _ in model.named_modules()
        if name.endswith((".base_layer", ".original_module"))
    }
    kept = []
    for name, parameter in model.named_parameters():
        owner = next((place for place in adapted if name.startswith(place + ".")), None)
        rest = "" if owner is None else name[len(owner) + 1 :]
        if owner is None or rest.startswith(("base_layer.", "original_module.")):
            kept.append((re.sub(r"\.(base_layer|original_module)(?=\.)", "", name), parameter))
    return kept


def _entry(parameter: Tensor, place: float) -> float:
    """Return one value of a parameter, or NaN where its data are elsewhere (offloaded) or packed (quantised)."""
    if parameter.device.type == "meta" or not parameter.is_floating_point() or parameter.numel() == 0:
        return float("nan")
    flat = int(place * parameter.numel())
    return float(parameter[torch.unravel_index(torch.tensor(flat), parameter.shape)])
