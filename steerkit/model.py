"""Find the decoder blocks of a causal language model, check them by looking, and know the model again later.

The promise that everything else rests on: block l hands its output, one `"batch pos d_model"` tensor, to block l + 1
and to nobody else. It is not read from a list of class names. The model is run once on two rows of three tokens and
watched; a model that breaks the promise is refused with what was seen. The same look tells which linear modules a hook can
reach row by row.
"""

import copy
import hashlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from steerkit.errors import ArtefactError, BaseModelMismatchError, LayerError, UnsupportedModelError
from steerkit.types import STREAMS, Layers

_SAMPLES = 256
_TOLERANCE = 2.0**-7
"""Relative difference of a sampled weight up to which two models count as one: bfloat16 keeps eight bits."""

ORIGINALS = "_steerkit_originals"
"""Where a model keeps what its weights were before Controllers wrote into them: one dict a Controller, in order."""

_KINDS = ("weight", "bias")

_ROWS, _LENGTH = 2, 3
"""Of the batch that is watched."""

_CACHES = ("past_key_values", "cache_params")

_Found: TypeAlias = tuple[str, str, int, int, Mapping[str, bool]]


class ByModel(WeakKeyDictionary):
    """What is known of models. Code that is sent elsewhere takes none of it along."""

    def __reduce__(self) -> tuple[type, tuple]:
        return ByModel, ()


class _once:
    """`functools.cached_property`, without the lock that Python 3.11 gives it, which cannot be sent elsewhere."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
        self.name = function.__name__

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        found = instance.__dict__[self.name] = self.function(instance)
        return found


_found: ByModel = ByModel()


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
    linears: Mapping[str, bool]
    """Paths of the linear modules that run once in a forward pass and see rows and positions in order; for each, whether
    it keeps its weight as `"output input"`. A hook on any other module could not tell which row is which sample."""

    @_once
    def parameters(self) -> dict[str, Tensor]:
        """The base model's own parameters by name, tied ones once; a PEFT wrapper's are not among them."""
        return dict(base_parameters(self.model))

    @_once
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every parameter by name; of a quantised weight, the shape that it stands for."""
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        for path, transposed in self.linears.items():
            weight = self.parameters.get(f"{path}.weight")
            if weight is None or not weight.is_floating_point():
                sizes = _linear_sizes(self.model.get_submodule(path))
                if sizes is not None and f"{path}.weight" not in self.tied:
                    shapes[f"{path}.weight"] = torch.Size(sizes if transposed else sizes[::-1])
        return shapes

    @_once
    def tied(self) -> frozenset[str]:
        """Names of parameters that more than one module holds."""
        everywhere: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            everywhere.setdefault(id(parameter), []).append(_base_name(name))
        return frozenset(name for names in everywhere.values() if len(names) > 1 for name in names)

    @_once
    def reachable(self) -> dict[str, bool]:
        """Names of weights and biases whose change a hook can add to what their module puts out, as in `linears`."""
        names = [(f"{path}.{kind}", transposed) for path, transposed in self.linears.items() for kind in _KINDS]
        return {name: transposed for name, transposed in names if name in self.shapes and name not in self.tied}

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
        if any(base.__module__.startswith("nnsight.") for base in type(model).__mro__):
            origin = "nnsight"
        if origin == "peft":
            config = getattr(model, "active_peft_config", None)
            if config is not None and config.is_prompt_learning:
                raise UnsupportedModelError(
                    f"Positions of a prompt must be its own tokens. Found {type(config).__name__}, which puts virtual "
                    "tokens in front. Use an adapter that changes weights, such as LoRA."
                )
            model = model.get_base_model()
        elif origin == "nnsight":
            if not getattr(model, "dispatched", True):
                raise UnsupportedModelError(
                    f"Weights must be in memory. Found a {type(model).__name__} that loads them at its first trace. Call "
                    "lm.dispatch() first, or make it with dispatch=True."
                )
            model = model._module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def around_same_weights(model: nn.Module) -> Any:
    """Return a second tree of modules, with a config and buffers of its own, around the very same weights."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.data, parameter.requires_grad) if plain else parameter
    return copy.deepcopy(model, memo)


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
            return Decoder(model, body, owner, blocks, known[3], known[4])
    path = _blocks_path(model)
    owner_path, _, name = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    _check_signature(model, owner)
    d_model, linears = _watch(model, body, blocks)
    _found[model] = (owner_path, name, len(blocks), d_model, linears)
    return Decoder(model, body, owner, blocks, d_model, linears)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, no module trains: dropout would give other values at every batching.

    A trace of nnsight that is in progress sees nothing of it: it would take the first pass that comes for its own.
    """
    with ExitStack() as stack:
        state = model.__dict__.get("__nnsight__")  # where nnsight keeps, with a module, the traces that reach it
        trace = None if state is None else state.active()[0]
        if trace is not None:
            stack.callback(setattr, trace, "interleaving", True)
            trace.interleaving = False
        for module in model.modules():
            if module.training:
                module.training = False
                stack.callback(setattr, module, "training", True)
        yield


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


def _watch(model: Any, body: nn.Module, blocks: nn.ModuleList) -> tuple[int, dict[str, bool]]:
    """Run two rows of three tokens through the body and check the promise of the module docstring.

    Returns:
        The residual width, and the linear modules as `Decoder.linears` tells them.
    """
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

    candidates = _linear_candidates(model)
    calls: dict[str, list[bool]] = {path: [] for path in candidates}

    def count(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            pair = [args[0] if args else None, output]
            calls[path].append(
                all(isinstance(t, Tensor) and t.shape[:-1] in ((_ROWS, _LENGTH), (_ROWS * _LENGTH,)) for t in pair)
            )

        return hook

    handles = [block.register_forward_hook(watch(i), with_kwargs=True) for i, block in enumerate(blocks)]
    handles += [module.register_forward_hook(count(path)) for path, (module, _) in candidates.items()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        embedding = model.get_input_embeddings()
        device = embedding.weight.device if embedding.weight.device.type != "meta" else None
        # Different tokens, so that a router sends them to different experts.
        tokens = torch.tensor([[1, 0, 2], [3, 1, 4]], device=device)
        with torch.random.fork_rng(devices), torch.no_grad():
            body(input_ids=tokens, use_cache=False)
    except Exception as error:
        raise refuse(
            f"a forward pass over two rows of three tokens failed ({type(error).__name__}: {error})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()

    if [index for index, _, _ in seen] != list(range(len(blocks))):
        raise refuse(f"the {len(blocks)} blocks ran in the order {[index for index, _, _ in seen]}")
    before: Tensor | None = None
    for index, stream, output in seen:
        after = hidden_states_of(output)
        if after is None or after.ndim != 3 or after.shape[:2] != (_ROWS, _LENGTH) or not after.is_floating_point():
            what = tuple(after.shape) if after is not None else type(output).__name__
            raise refuse(f"block {index} returns {what} instead of a (batch, pos, d_model) tensor")
        if stream is None or stream.shape != after.shape:
            raise refuse(f"block {index} takes no hidden states of the shape {tuple(after.shape)} that it returns")
        if before is not None and not torch.equal(before.to(stream.device), stream):
            raise refuse(f"block {index} does not read what block {index - 1} returned")
        before = after
    assert before is not None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # The head is not part of the body; it sees the last positions of each row.
    once = {path for path, found in calls.items() if found == [True]}
    once |= {path for path, (module, _) in candidates.items() if module is head and not calls[path]}
    return before.shape[-1], {path: transposed for path, (_, transposed) in candidates.items() if path in once}


def _linear_candidates(model: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
    """Return the outermost modules that stand for one matrix, and whether each keeps it as `"output input"`."""
    found: dict[str, tuple[nn.Module, bool]] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in _parents(path) if outer in found)
        if not inside and _linear_sizes(module) is not None:
            found[path] = (module, not isinstance(getattr(module, "base_layer", module), Conv1D))
    return found


def _parents(path: str) -> list[str]:
    steps = path.split(".")
    return [".".join(steps[:count]) for count in range(1, len(steps))]


def _linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return (outputs, inputs) of a module that stands for one matrix; PEFT and quantised ones among them."""
    module = getattr(module, "base_layer", module)
    if isinstance(module, Conv1D):
        return (module.nf, module.nx)
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return sizes if all(type(size) is int for size in sizes) else None  # type: ignore[return-value]


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
        parameters = decoder.parameters
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        # What a Controller has written into the weights is not the model's own; the first who did saved the originals.
        kept = list(decoder.model.__dict__.get(ORIGINALS, ()))

        def get(name: str) -> Tensor:
            return next((saved[name] for saved in kept if name in saved), parameters[name]).detach()

        return cls.of_weights(shapes, get, decoder.name, decoder.depth, decoder.d_model)

    @classmethod
    def of_weights(
        cls, shapes: Mapping[str, torch.Size], get: Callable[[str], Tensor], name: str, depth: int, d_model: int
    ) -> "Fingerprint":
        """Take the fingerprint of weights wherever they are; `get` is called for 256 of them."""
        names = sorted(shapes)
        generator = torch.Generator().manual_seed(0)
        picks = torch.randint(len(names), (_SAMPLES,), generator=generator).tolist()
        places = torch.rand(_SAMPLES, generator=generator, dtype=torch.float64).tolist()
        values = [_entry(get(names[pick]), place) for pick, place in zip(picks, places, strict=True)]
        return cls(_digest(shapes), name, depth, d_model, torch.tensor(values, dtype=torch.float32))

    def without_values(self) -> "Fingerprint":
        """Return what is left if only names and shapes count."""
        return replace(self, values=torch.full_like(self.values, float("nan")))

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
        if not whole or len(values) != _SAMPLES or header["depth"] < 1 or header["d_model"] < 1:
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


def _digest(shapes: Mapping[str, torch.Size]) -> str:
    text = "\n".join(f"{name} {tuple(shape)}" for name, shape in sorted(shapes.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that the base model has by itself, by the names that they have there.

    PEFT keeps an adapted layer as `base_layer` and a copied module's original as `original_module`, and puts what it
    adds beside them.
    """
    adapted = {
        name.rpartition(".")[0]
        for name, _ in model.named_modules()
        if name.endswith((".base_layer", ".original_module"))
    }
    for name, parameter in model.named_parameters():
        owner = next((place for place in adapted if name.startswith(place + ".")), None)
        rest = "" if owner is None else name[len(owner) + 1 :]
        if owner is None or rest.startswith(("base_layer.", "original_module.")):
            yield _base_name(name), parameter


def _base_name(name: str) -> str:
    return re.sub(r"\.(base_layer|original_module)(?=\.)", "", name)


def refuse_unwritable(name: str, parameter: Tensor | None) -> None:
    """Raise unless a parameter holds numbers, here and now, that can be added to.

    Raises:
        UnsupportedModelError: the parameter is offloaded or quantised.
    """
    if parameter is None:
        raise UnsupportedModelError(
            f"Weights that are written must be parameters. Found {name!r} packed into something else, as quantisation does. "
            "Use the vector by hooks, or merge into the unquantised model."
        )
    if parameter.device.type == "meta":
        raise UnsupportedModelError(
            f"Weights that are written must be in memory. Found {name!r} offloaded. Load the model without offloading, use "
            "the vector by hooks, or merge the checkpoint on disk."
        )
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        raise UnsupportedModelError(
            f"Weights that are written must be floating-point numbers. Found {name!r} quantised ({parameter.dtype}): a sum "
            "would have to be quantised anew. Use the vector by hooks, or merge into the unquantised model."
        )


def _entry(parameter: Tensor, place: float) -> float:
    """Return one value of a parameter, or NaN where its data are elsewhere (offloaded) or packed (quantised)."""
    if parameter.device.type == "meta" or not parameter.is_floating_point() or parameter.numel() == 0:
        return float("nan")
    flat = int(place * parameter.numel())
    return float(parameter[torch.unravel_index(torch.tensor(flat), parameter.shape)])
