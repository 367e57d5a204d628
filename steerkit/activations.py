"""Record the residual stream of a model over many texts: the only way in which steerkit reads a model.

Texts run sorted by length, through the model's body only (the language-model head would write a vocabulary of logits
for each position), and each block's hook keeps one row a text. Padding is put on the right by hand: in a causal model
no real token sees it, positions need no correction, and the caller's tokenizer stays as it is.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steerkit import storage
from steerkit.errors import LayerError, TextsError
from steerkit.hooks import Prompts, rows_are_samples, unsteered
from steerkit.model import Decoder, Fingerprint, evaluating, find_decoder, hidden_states_of, resolve_layers
from steerkit.types import Layers, Read, Text

_TOKENS_A_BATCH = 2048
"""Tokens, padding included, that run together by default: enough to fill the matmuls, little in memory."""


@dataclass(frozen=True, eq=False)
class Activations:
    """Hidden states of texts at the output of decoder blocks, `activations[layer]`: float32 `"example d_model"`."""

    states: Mapping[int, Tensor] = field(repr=False)
    read: Read
    fingerprint: Fingerprint | None = None
    """The model they were recorded on."""
    digests: tuple[str, ...] = field(default=(), repr=False)
    """One digest a text: equal texts are known without keeping them."""

    def __getitem__(self, layer: int) -> Tensor:
        if self.fingerprint is not None:
            [layer] = resolve_layers(layer, self.fingerprint.depth)
        if layer not in self.states:
            raise LayerError(f"Layer {layer} was not recorded. Found layers {self.layers}. Record it.", layer=layer)
        return self.states[layer]

    def __len__(self) -> int:
        return len(next(iter(self.states.values())))

    def __repr__(self) -> str:
        model = "" if self.fingerprint is None else f", model={self.fingerprint.name!r}"
        return f"Activations({len(self)} texts, layers={self.layers}, read={self.read!r}{model})"

    @property
    def layers(self) -> tuple[int, ...]:
        """The recorded layers, in order."""
        return tuple(self.states)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically."""
        tensors = {f"layer.{layer}": states for layer, states in self.states.items()}
        header: dict[str, Any] = {
            "name": "activations",
            "layers": list(self.layers),
            "read": self.read,
            "digests": list(self.digests),
        }
        if self.fingerprint is not None:
            header["base_model"] = self.fingerprint.header()
            tensors["base_model.values"] = self.fingerprint.values
        storage.write(path, "activations", header, tensors)

    @classmethod
    def from_stored(cls, stored: storage.Stored) -> "Activations":
        """Rebuild from a file that `storage.read` has checked."""
        fingerprint = stored_fingerprint(stored)
        layers = stored.layers(None if fingerprint is None else fingerprint.depth)
        read = stored.entry("read", str)
        states = {layer: stored.tensor(f"layer.{layer}", -1, -1) for layer in layers}
        digests = tuple(str(digest) for digest in stored.entry("digests", list))
        sizes = {tuple(s.shape) for s in states.values()}
        if read not in ("last", "mean") or len(sizes) != 1 or len(digests) not in (0, len(states[layers[0]])):
            raise stored.broken(f"read={read!r}, states of sizes {sizes}, {len(digests)} digests")
        return cls(states, cast(Read, read), fingerprint, digests)


def record(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    layers: Layers | None = None,
    read: Read = "last",
    batch_size: int | None = None,
    progress: bool = False,
) -> Activations:
    """Record the residual stream after decoder blocks, one vector a text and layer.

    Reads what the next block would read: with a Controller attached, the steered state, text i with the amounts of sample
    i. The order of `texts` is kept,
    and neither batching nor the tokenizer's padding side changes a value beyond rounding.

    Args:
        model: a causal language model, plain or PEFT-wrapped.
        tokenizer: its tokenizer, with or without a pad token; it is not changed.
        texts: strings, or conversations as lists of messages. The chat template is applied once. A conversation that
            ends in a user turn is read at the generation prompt, one that ends in an assistant turn at its last
            content token.
        layers: decoder blocks; all by default.
        read: `"last"`, the last token, or `"mean"`, the mean over the tokens.
        batch_size: texts run together; by default as many as fit 2048 tokens.
        progress: show a progress bar.

    Returns:
        `Activations`, float32 on the CPU.

    Raises:
        TextsError: no texts, something else than text, a text without tokens or longer than the model takes.
        LayerError: a layer that does not exist.
        UnsupportedModelError: a model that cannot be read.
    """
    if read not in ("last", "mean"):
        raise TextsError(f"`read` must be 'last' or 'mean'. Found {read!r}. Choose one.")
    if batch_size is not None and batch_size < 1:
        raise TextsError(f"`batch_size` must be at least 1. Found {batch_size}. Leave it out for a good default.")
    texts = checked_texts(texts, "texts")
    decoder = find_decoder(model)
    chosen = tuple(sorted(resolve_layers(layers, decoder.depth)))
    tokens = tokenise(tokenizer, texts)
    refuse_long(decoder.model, [len(ids) for ids in tokens], "A text")
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]), reverse=True)
    states = {layer: torch.empty(len(tokens), decoder.d_model) for layer in chosen}
    device = decoder.model.get_input_embeddings().weight.device
    device = torch.device("cpu") if device.type == "meta" else device
    reader = _Reader()
    with ExitStack() as stack, torch.no_grad(), evaluating(decoder.model):
        for layer in chosen:
            stack.callback(decoder.blocks[layer].register_forward_hook(reader.hook(layer, read)).remove)
        bar = stack.enter_context(tqdm(total=len(texts), desc="recording", unit="text", disable=not progress))
        for rows in batches_of(order, [len(ids) for ids in tokens], batch_size):
            ids, reader.mask = padded([tokens[i] for i in rows])
            with rows_are_samples(decoder.model, rows, len(texts)):
                decoder.body(input_ids=ids.to(device), attention_mask=reader.mask.to(device), use_cache=False)
            for layer in chosen:
                states[layer][rows] = reader.kept[layer, read]
            bar.update(len(rows))
    return Activations(states, read, Fingerprint.of(model), tuple(digest_of(text) for text in texts))


def read_prompts(
    decoder: Decoder, prompts: Prompts, wanted: Iterable[tuple[int, Read]]
) -> dict[tuple[int, Read], Tensor]:
    """Return `{(layer, read): "sample d_model"}` as the plain model reads prompts, whatever is attached to it."""
    reader = _Reader()
    inputs = prompts.inputs
    reader.mask = prompts.mask if prompts.mask is not None else torch.ones(inputs.shape[:2], dtype=torch.int64)
    # Real tokens first: padding on the right needs no positions of its own.
    order = reader.mask.int().argsort(dim=1, descending=True, stable=True)
    reader.mask = reader.mask.gather(1, order)
    order = order.to(inputs.device)
    inputs = inputs.gather(1, order if inputs.ndim == 2 else order[..., None].expand_as(inputs))
    with ExitStack() as stack, torch.no_grad(), evaluating(decoder.model), unsteered(decoder.model):
        for layer, read in wanted:
            stack.callback(decoder.blocks[layer].register_forward_hook(reader.hook(layer, read)).remove)
        given = {"input_ids" if inputs.ndim == 2 else "inputs_embeds": inputs}
        decoder.body(**given, attention_mask=reader.mask.int().to(inputs.device), use_cache=False)
    return reader.kept


def stored_fingerprint(stored: storage.Stored) -> Fingerprint | None:
    """Return the base model that a file names, if it names one."""
    if "base_model" not in stored.header:
        return None
    return Fingerprint.from_parts(stored.header["base_model"], stored.tensor("base_model.values", -1, finite=False))


class _Reader:
    """Keeps one vector a row from each block's output."""

    def __init__(self) -> None:
        self.mask = torch.empty(0)
        self.kept: dict[tuple[int, Read], Tensor] = {}

    def hook(self, layer: int, read: Read) -> Any:
        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            hidden = hidden_states_of(output)
            assert hidden is not None
            mask = self.mask.to(hidden.device)
            lengths = mask.sum(dim=-1)
            if read == "last":
                kept = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1].float()
            else:
                kept = torch.einsum("bp,bpd->bd", mask.float(), hidden.float()) / lengths[:, None]
            self.kept[layer, read] = kept.cpu()

        return keep


def checked_texts(texts: Sequence[Text], name: str) -> list[Text]:
    """Return the texts as a list once each of them is known to be a text."""
    if isinstance(texts, str | Mapping) or not isinstance(texts, Sequence):
        raise TextsError(f"`{name}` must be a list of texts. Found {type(texts).__name__}. Wrap it in a list.")
    if not texts:
        raise TextsError(f"`{name}` must hold at least one text. Found none. Pass some.")
    for index, text in enumerate(texts):
        if isinstance(text, str):
            continue
        if isinstance(text, Mapping):
            raise TextsError(
                f"`{name}` must be a list of conversations. Found a message at its top level (entry {index}). "
                "Wrap the messages of one conversation in a list of their own."
            )
        valid = isinstance(text, Sequence) and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in text
        )
        if not valid or not text:
            raise TextsError(
                f"Each entry of `{name}` must be a string or a list of messages with `role` and `content`. "
                f"Found {text!r:.60} at {index}. Convert it.",
                index=index,
            )
    return list(texts)


def tokenise(tokenizer: Any, texts: Sequence[Text], *, special: bool = True) -> list[list[int]]:
    """Return token ids, unpadded; chat messages go through the template once and get no second special tokens.

    Without `special`, plain texts get none either: they continue something.
    """
    backend: Any = getattr(tokenizer, "_tokenizer", None)
    kept = (getattr(backend, "padding", None), getattr(backend, "truncation", None))
    try:
        tokens = []
        for index, text in enumerate(texts):
            plain = isinstance(text, str) and special
            rendered = text if isinstance(text, str) else _rendered(tokenizer, text, index)
            ids = tokenizer(rendered, add_special_tokens=plain, padding=False, truncation=False, verbose=False)
            if not ids["input_ids"]:
                raise TextsError(
                    f"A text must have at least one token. Found none in text {index}. Leave it out.", index=index
                )
            tokens.append(list(ids["input_ids"]))
        return tokens
    finally:
        if kept[0] is not None:
            backend.enable_padding(**kept[0])
        if kept[1] is not None:
            backend.enable_truncation(**kept[1])


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], index: int) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise TextsError(
            f"Chat messages need a tokenizer with a chat template. Found none (text {index}). Pass strings.",
            index=index,
        )
    answered = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=not answered,
            continue_final_message=answered,
        )
    except Exception as error:  # a template may raise whatever it likes
        raise TextsError(
            f"The chat template must take each conversation. It refuses text {index}: {error}. Change its messages.",
            index=index,
        ) from error


def refuse_long(model: Any, lengths: Sequence[int], what: str) -> None:
    """Raise if a text is longer than the model takes.

    Raises:
        TextsError: one is.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if limit is not None and lengths[longest] > limit:
        raise TextsError(
            f"{what} may have {limit} tokens on this model. Found {lengths[longest]} in text {longest}. Shorten it.",
            index=longest,
        )


def batches_of(order: list[int], lengths: list[int], batch_size: int | None) -> list[list[int]]:
    """Return which texts run together, of an order from long to short."""
    batches: list[list[int]] = []
    while order:
        # The first of a batch is its longest text, so it sets the width of all of them.
        size = batch_size or max(1, _TOKENS_A_BATCH // lengths[order[0]])
        batches.append(order[:size])
        order = order[size:]
    return batches


def padded(tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return ids and mask, `"text pos"`, padded on the right."""
    width = max(len(ids) for ids in tokens)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in tokens])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in tokens])
    return ids, mask


def digest_of(text: Text) -> str:
    """Return what tells equal texts without keeping them."""
    plain = text if isinstance(text, str) else json.dumps([dict(m) for m in text], sort_keys=True, default=str)
    return hashlib.sha256(plain.encode()).hexdigest()[:16]
