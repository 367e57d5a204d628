"""The two passes of evaluation: the model writes after prompts, and what was written is read again, steered or not.

A replay is one pass over prompt and continuation in which every position is edited as it was in generation, so that
the distributions it gives are those that the tokens were drawn from.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from steerkit.hooks import continuing
from steerkit.model import Decoder


@dataclass(frozen=True)
class Sampling:
    """How text is drawn: at a temperature from the whole distribution, or greedily at 0."""

    max_new_tokens: int = 32
    samples: int = 1
    """Continuations of each prompt."""
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 32
    """Rows that run together."""


@dataclass(frozen=True)
class Continued:
    """Rows of a prompt, padded on the left, and what follows it, padded on the right."""

    ids: Tensor
    """`"row pos"`"""
    mask: Tensor
    """`"row pos"`: real tokens."""
    width: int
    """Columns of the prompts."""

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], device: Any) -> "Continued":
        """Lay out rows of tokens."""
        width, length = max(map(len, prompts)), max(map(len, continuations))
        ids = torch.zeros(len(prompts), width + length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, new) in enumerate(zip(prompts, continuations, strict=True)):
            here = slice(width - len(prompt), width + len(new))
            ids[row, here] = torch.tensor([*prompt, *new])
            mask[row, here] = 1
        return cls(ids.to(device), mask.to(device), width)

    @property
    def new(self) -> Tensor:
        """`"row new"`: what follows the prompts."""
        return self.ids[:, self.width :]

    @property
    def real(self) -> Tensor:
        """`"row new"`: which of it are tokens, the end of the text among them."""
        return self.mask[:, self.width :].bool()


def write(
    decoder: Decoder, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, batch: int
) -> Continued:
    """Let the model continue a batch of prompts; the caller's random numbers stay where they are."""
    model = decoder.model
    device = model.get_input_embeddings().weight.device
    start = Continued.of(prompts, [[]] * len(prompts), device)
    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    ends = getattr(tokenizer, "eos_token_id", None) if ends is None else ends
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    pad = getattr(own, "pad_token_id", None)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        num_return_sequences=sampling.samples,
        do_sample=sampling.temperature > 0,
        # Whatever the model's own defaults are: the budget is about its whole distribution.
        temperature=sampling.temperature or None,
        top_k=0 if sampling.temperature > 0 else None,
        top_p=1.0 if sampling.temperature > 0 else None,
        repetition_penalty=1.0,
        eos_token_id=ends or None,
        pad_token_id=pad if pad is not None else (ends or [0])[0],
        bos_token_id=getattr(own, "bos_token_id", None),
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(sampling.seed * 1_000_003 + batch)
        ids = model.generate(start.ids, attention_mask=start.mask, generation_config=config)
    new = ids[:, start.width :]
    ended = torch.isin(new, torch.tensor(ends, device=new.device)) if ends else torch.zeros_like(new, dtype=torch.bool)
    real = (ended.cumsum(dim=1) - ended.long()) == 0
    mask = start.mask.repeat_interleave(sampling.samples, dim=0)
    return Continued(ids, torch.cat([mask, real.long()], dim=1), start.width)


@torch.no_grad()
def read(decoder: Decoder, rows: Continued, layer: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the logits that each new token was drawn from, `"row new vocabulary"`, in one pass without a cache.

    With a layer, also the residual stream after it at the same positions, `"row new d_model"`.
    """
    model = decoder.model
    takes = inspect.signature(model.forward).parameters
    length = rows.ids.shape[1] - rows.width
    given: dict[str, Any] = {"use_cache": False}
    if "position_ids" in takes:
        given["position_ids"] = (rows.mask.cumsum(dim=-1) - 1).clamp(min=0)
    if "logits_to_keep" in takes:
        given["logits_to_keep"] = length + 1
    kept: list[Tensor] = []
    handle = None
    if layer is not None:
        block = decoder.blocks[layer]
        handle = block.register_forward_hook(
            lambda module, args, output: kept.append(output if isinstance(output, Tensor) else output[0])
        )
    try:
        with continuing(model, rows.mask[:, : rows.width]):
            logits = model(input_ids=rows.ids, attention_mask=rows.mask, **given).logits
    finally:
        if handle is not None:
            handle.remove()
    states = kept[0][:, rows.width - 1 : -1].float() if kept else None
    return logits[:, -length - 1 : -1], states
