"""What a model's parts are for, found by running it on two rows of three tokens: nothing is read from names of classes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import UnsupportedModelError
from steerkit.hooks import unsteered
from steerkit.model import Decoder, evaluating, hidden_states_of
from steerkit.passes import device_of

_TOKENS = ((1, 0, 2), (3, 1, 4))

Hook = Callable[..., Any]


@contextmanager
def hooked(hooks: Mapping[nn.Module, Hook]) -> Iterator[None]:
    """Within, each module has a forward hook `(module, args, kwargs, output)`; a hook registered later acts later."""
    with ExitStack() as stack:
        for module, hook in hooks.items():
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def editing(edit: Callable[[Tensor], Tensor]) -> Hook:
    """Return a hook that edits the hidden states in what a module puts out."""

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        hidden = hidden_states_of(output)
        assert hidden is not None
        edited = edit(hidden)
        return edited if isinstance(output, Tensor) else (edited, *output[1:])

    return hook


def keeping(into: dict[Any, Tensor], key: Any) -> Hook:
    """Return a hook that keeps the hidden states in what a module puts out."""

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        hidden = hidden_states_of(output)
        if hidden is not None:
            into[key] = hidden.detach()

    return hook


def submodules(decoder: Decoder, layers: Iterable[int], sites: Iterable[str]) -> dict[tuple[str, int], nn.Module]:
    """Return the attention or MLP module of blocks, by site and layer, found among each block's direct children.

    Attention is the child with matrices whose output at one position depends on another position; the MLP the one whose output
    does not. A child that is handed the residual stream beside its input returns the stream and no part of it.

    Raises:
        UnsupportedModelError: a block without exactly one such child.
    """
    seen: dict[nn.Module, str] = {}
    look = _look(seen, decoder.d_model)
    hooks = {child: look for layer in layers for child in decoder.blocks[layer].children() if _matrices(child)}
    with hooked(hooks):
        _run(decoder)
    found: dict[tuple[str, int], nn.Module] = {}
    for layer in layers:
        kinds = {name: seen.get(child, "nothing") for name, child in decoder.blocks[layer].named_children()}
        for site in sites:
            fitting = [name for name, kind in kinds.items() if kind == site]
            if len(fitting) != 1:
                shown = ", ".join(f"{name} ({kind})" for name, kind in kinds.items() if kind != "nothing")
                raise UnsupportedModelError(
                    f"Block {layer} must have one child that is its {site}. Found {shown or 'none with matrices'}. Leave "
                    f"{site!r} out of `sites`."
                )
            found[site, layer] = decoder.blocks[layer].get_submodule(fitting[0])
    return found


def _look(seen: dict[nn.Module, str], d_model: int) -> Hook:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        out = hidden_states_of(output)
        if not isinstance(given, Tensor) or out is None or out.shape[-1] != d_model:
            return
        others = [t for t in (*args[1:], *kwargs.values()) if isinstance(t, Tensor) and t is not given]
        if any(t.shape == given.shape for t in others):
            seen[module] = "returns the stream"
            return
        other = given.clone()
        rows = other.view(len(_TOKENS), -1, other.shape[-1])
        rows[:, 0] = rows[:, 0].flip(-1)
        again = {**kwargs, "hidden_states": other} if not args else kwargs
        # The module's own forward: its hooks, this one among them, are for the pass that is watched.
        changed = hidden_states_of(module.forward(*([other, *args[1:]] if args else []), **again))
        assert changed is not None
        before, behind = (t.reshape(len(_TOKENS), -1, t.shape[-1])[:, -1].float() for t in (out, changed))
        # Experts are given their tokens in groups, whose sizes round differently.
        near = max(1e-4, 4 * torch.finfo(out.dtype).eps) * float(before.norm())
        seen[module] = "mlp" if float((behind - before).norm()) <= near else "attention"

    return hook


def _matrices(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def straight(decoder: Decoder, layer: int, paths: Iterable[str]) -> list[str]:
    """Return those modules inside a block of which every change of the output is the same change of the block's output.

    Each is tried: what it puts out is moved by a random vector as long as the stream, and the block must move by just that
    vector at every position. A norm, a gate or a second sublayer behind the module breaks it.
    """
    kept: dict[str, Tensor] = {}
    block = decoder.blocks[layer]
    with hooked({block: keeping(kept, "plain")}):
        _run(decoder)
    plain = kept["plain"].float()
    step = torch.randn(decoder.d_model, generator=torch.Generator().manual_seed(layer)).to(plain.device)
    step = step * plain.norm(dim=-1).mean() / step.norm()
    near = max(1e-4, 16 * torch.finfo(decoder.model.dtype).eps)
    found = []
    for path in paths:
        module = decoder.model.get_submodule(path)
        kept.clear()
        with hooked({module: editing(lambda out: out + step.to(out)), block: keeping(kept, "moved")}):
            _run(decoder)
        error = (kept["moved"].to(plain) - plain - step).norm(dim=-1).max() / step.norm()
        if float(error) < near:
            found.append(path)
    return found


def unembedding(decoder: Decoder) -> tuple[nn.Module, Any]:
    """Return what reads the last block's output (the final norm; an identity if there is none), and the head.

    Raises:
        UnsupportedModelError: no head, or one that reads another width than the residual stream's.
    """
    head = decoder.model.get_output_embeddings() if hasattr(decoder.model, "get_output_embeddings") else None
    if head is None or decoder.d_model not in getattr(head, "weight", torch.empty(0)).shape[-1:]:
        raise UnsupportedModelError(
            f"A lens needs a head that reads the residual stream, {decoder.d_model} wide. Found "
            f"{'none' if head is None else type(head).__name__} in {type(decoder.model).__name__}."
        )
    kept: dict[str, Tensor] = {}
    readers: list[nn.Module] = []

    def look(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        if "last" in kept and isinstance(given, Tensor) and torch.equal(given.to(kept["last"].device), kept["last"]):
            readers.append(module)

    inside = {id(module) for module in decoder.blocks.modules()}
    outside = [m for m in decoder.body.modules() if id(m) not in inside and not any(True for _ in m.children())]
    with hooked({decoder.blocks[-1]: keeping(kept, "last"), **dict.fromkeys(outside, look)}):
        _run(decoder)
    return (readers[0] if readers else nn.Identity()), head


def _run(decoder: Decoder) -> None:
    tokens = torch.tensor(_TOKENS, device=device_of(decoder))
    with torch.no_grad(), evaluating(decoder.model), unsteered(decoder.model):
        decoder.body(input_ids=tokens, use_cache=False)
