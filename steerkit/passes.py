"""Two passes: somebody writes after prompts, and what was written is read again, steered or not.

A replay is one pass over prompt and continuation in which every position is edited as it was in generation, so that
the distributions it gives are those that the tokens were drawn from.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from steerkit.activations import refuse_long, tokenise
from steerkit.errors import TextsError
from steerkit.hooks import Prompts, continuing, steered
from steerkit.model import Decoder
from steerkit.types import Text


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
    each: int = 1
    """Rows of one prompt, one after the other."""
    whole: bool = False
    """Whether conditions read all of a row: it is one text, of which nothing was asked."""

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


class Writer:
    """The model as it stands, steered or not: it continues prompts, and tells what each token was drawn from."""

    drawn = 1
    """Rows that run for each one that is kept."""

    def __init__(self, decoder: Decoder, tokenizer: Any, prompts: Sequence[Text]) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.tokens = tokenise(tokenizer, prompts)

    @property
    def plain(self) -> bool:
        """Whether it is the unsteered model that writes."""
        return not steered(self.decoder.model)

    def refuse_long(self, new: int) -> None:
        """Raise if a prompt and what follows it are longer than the model takes.

        Raises:
            TextsError: one is.
        """
        refuse_long(self.decoder.model, [len(ids) + new for ids in self.tokens], "Prompt and completion")

    def write(self, part: Sequence[int], sampling: Sampling) -> Continued:
        """Continue a part of the prompts; the caller's random numbers stay where they are."""
        return self._generate(
            Continued.of([self.tokens[i] for i in part], [[]] * len(part), self._device), part, sampling
        )

    def read(self, rows: Continued, part: Sequence[int], layer: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the logits that each new token was drawn from, and the states after a layer if there is one stream of them."""
        return read(self.decoder, rows, layer)

    def texts(self, part: Sequence[int], rows: Continued) -> list[str]:
        """Return what each row adds to its prompt's text: decoded alone, it may lose the space that it begins with."""
        added = []
        for row, (new, real) in enumerate(zip(rows.new, rows.real, strict=True)):
            last = self.tokens[part[row // rows.each]][-1:]
            both = (last, [*last, *new[real].tolist()])
            before, whole = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in both)
            added.append(whole[len(before) :])
        return added

    @property
    def _device(self) -> torch.device:
        return device_of(self.decoder)

    def _generate(self, start: Continued, part: Sequence[int], sampling: Sampling, **more: Any) -> Continued:
        model = self.decoder.model
        own = getattr(model, "generation_config", None)
        ends = getattr(own, "eos_token_id", None)
        ends = getattr(self.tokenizer, "eos_token_id", None) if ends is None else ends
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        pad = getattr(own, "pad_token_id", None)
        drawn = sampling.temperature > 0
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            num_return_sequences=sampling.samples,
            do_sample=drawn,
            # Whatever the model's own defaults are: the budget is about its whole distribution.
            temperature=sampling.temperature if drawn else None,
            top_k=0 if drawn else None,
            top_p=1.0 if drawn else None,
            repetition_penalty=1.0,
            eos_token_id=ends or None,
            pad_token_id=pad if pad is not None else (ends or [0])[0],
            bos_token_id=getattr(own, "bos_token_id", None),
        )
        everywhere = range(torch.cuda.device_count())
        with torch.random.fork_rng(devices=everywhere), torch.no_grad(), _configured(model, config):
            torch.manual_seed(sampling.seed * 1_000_003 + part[0])
            ids = model.generate(start.ids, attention_mask=start.mask, generation_config=config, **more)
        new = ids[:, start.width :]
        ended = (
            torch.isin(new, torch.tensor(ends, device=new.device)) if ends else torch.zeros_like(new, dtype=torch.bool)
        )
        real = (ended.cumsum(dim=1) - ended.long()) == 0
        mask = start.mask.repeat_interleave(sampling.samples, dim=0)
        return Continued(ids, torch.cat([mask, real.long()], dim=1), start.width, sampling.samples)


@contextmanager
def _configured(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Within, the model has no settings of its own: `generate` would fill in whatever ours leave open."""
    own = model.__dict__.get("generation_config")
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


class Prompted(Writer):
    """The model under an instruction, mixed with itself without one: logits `(1 - x) plain + x instructed`, x the dose."""

    def __init__(
        self, decoder: Decoder, tokenizer: Any, prompts: Sequence[Text], instruction: str, share: float = 1.0
    ) -> None:
        super().__init__(decoder, tokenizer, prompts)
        self.share = share
        try:
            self.instructed = tokenise(tokenizer, [instructed(prompt, instruction) for prompt in prompts])
        except TextsError:  # templates without a system's turn refuse one
            self.instructed = tokenise(tokenizer, [instructed(prompt, instruction, "user") for prompt in prompts])

    @property
    def plain(self) -> bool:
        return False

    def refuse_long(self, new: int) -> None:
        super().refuse_long(new)
        refuse_long(
            self.decoder.model, [len(ids) + new for ids in self.instructed], "Instruction, prompt and completion"
        )

    def write(self, part: Sequence[int], sampling: Sampling) -> Continued:
        here = [i for i in part for _ in range(sampling.samples)]
        start = Continued.of([self.instructed[i] for i in here], [[]] * len(here), self._device)
        plain = Continued.of([self.tokens[i] for i in here], [[]] * len(here), self._device)
        blend = LogitsProcessorList([_Blend(self.decoder, plain, self.share)])
        rows = self._generate(start, part, replace(sampling, samples=1), logits_processor=blend)
        ids = torch.cat([plain.ids, rows.new], dim=1)
        return Continued(ids, torch.cat([plain.mask, rows.real.long()], dim=1), plain.width, sampling.samples)

    def read(self, rows: Continued, part: Sequence[int], layer: int | None = None) -> tuple[Tensor, Tensor | None]:
        prompts = [self.instructed[i] for i in part for _ in range(rows.each)]
        start = Continued.of(prompts, [[]] * len(prompts), self._device)
        ids, mask = torch.cat([start.ids, rows.new], dim=1), torch.cat([start.mask, rows.real.long()], dim=1)
        longer = Continued(ids, mask, start.width, rows.each)
        there, _ = read(self.decoder, longer)
        here, _ = (there, None) if self.share == 1 else read(self.decoder, rows)
        return blended(here, there, self.share), None


class BestOf(Writer):
    """The best of n continuations by a scorer of its own: KL from the model of at most `log n - (n - 1) / n` a text."""

    def __init__(self, decoder: Decoder, tokenizer: Any, prompts: Sequence[Text], count: int, chooser: Any) -> None:
        super().__init__(decoder, tokenizer, prompts)
        self.count = self.drawn = count
        self.chooser = chooser

    def write(self, part: Sequence[int], sampling: Sampling) -> Continued:
        rows = super().write(part, replace(sampling, samples=self.count * sampling.samples))
        prompts = [self.prompts[i] for i in part for _ in range(rows.each)]
        scores = torch.tensor([float(score) for score in self.chooser(prompts, self.texts(part, rows))])
        best = scores.view(-1, self.count).argmax(dim=1) + torch.arange(0, len(scores), self.count)
        return Continued(rows.ids[best], rows.mask[best], rows.width, sampling.samples)

    @property
    def divergence(self) -> float:
        """The bound on KL, nats a text."""
        return math.log(self.count) - (self.count - 1) / self.count


def instructed(prompt: Text, instruction: str, role: str = "system") -> Text:
    """Return a prompt under an instruction: before the text, or before the first turn of that role in a conversation."""
    if isinstance(prompt, str):
        return f"{instruction}\n\n{prompt}"
    place = next((i for i, message in enumerate(prompt) if message["role"] == role), None)
    if place is None:
        return [{"role": role, "content": instruction}, *prompt]
    joined = {**prompt[place], "content": f"{instruction}\n\n{prompt[place]['content']}"}
    return [*prompt[:place], joined, *prompt[place + 1 :]]


def blended(plain: Tensor, instructed: Tensor, share: float) -> Tensor:
    """Return `(1 - x) log p + x log q`, not normalised."""
    return (1 - share) * F.log_softmax(plain.float(), dim=-1) + share * F.log_softmax(instructed.float(), dim=-1)


class _Blend(LogitsProcessor):
    """Runs the plain prompts beside the instructed ones. The kind that transformers has ignores padding."""

    def __init__(self, decoder: Decoder, plain: Continued, share: float) -> None:
        self._decoder = decoder
        self._ids, self._mask = plain.ids, plain.mask
        self._share = share
        self._cache: Any = None
        self._begun = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._share == 1:
            return scores
        if self._begun:
            new = input_ids[:, -1:]
            self._ids = torch.cat([self._ids, new], dim=1) if self._cache is None else new
            self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        self._begun = True
        places = (self._mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -self._ids.shape[1] :]
        given = {} if self._cache is None else {"past_key_values": self._cache}
        out = self._decoder.model(
            input_ids=self._ids,
            attention_mask=self._mask,
            use_cache=True,
            **_places(self._decoder, places),
            **_last(self._decoder, 1),
            **given,
        )
        # Without such a cache (mamba keeps its own kind) the whole sequence runs again.
        self._cache = getattr(out, "past_key_values", None)
        return blended(out.logits[:, -1], scores, self._share)


def device_of(decoder: Decoder) -> torch.device:
    """Return where a model takes its tokens."""
    weight: Tensor = decoder.model.get_input_embeddings().weight
    return weight.device


def _places(decoder: Decoder, places: Tensor) -> dict[str, Tensor]:
    """Return positions for a model that takes them; others count real tokens themselves."""
    return {"position_ids": places} if "position_ids" in inspect.signature(decoder.model.forward).parameters else {}


def _last(decoder: Decoder, positions: int) -> dict[str, Any]:
    """Ask for the logits of the last positions only, of a model that can leave out the others."""
    return (
        {"logits_to_keep": positions} if "logits_to_keep" in inspect.signature(decoder.model.forward).parameters else {}
    )


@torch.no_grad()
def read(decoder: Decoder, rows: Continued, layer: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the logits that each new token was drawn from, `"row new vocabulary"`, in one pass without a cache.

    With a layer, also the residual stream after it at the same positions, `"row new d_model"`.
    """
    model = decoder.model
    length = rows.ids.shape[1] - rows.width
    given = {**_places(decoder, (rows.mask.cumsum(dim=-1) - 1).clamp(min=0)), **_last(decoder, length + 1)}
    kept: list[Tensor] = []
    handle = None
    if layer is not None:
        block = decoder.blocks[layer]
        handle = block.register_forward_hook(
            lambda module, args, output: kept.append(output if isinstance(output, Tensor) else output[0])
        )
    try:
        text = Prompts(rows.ids, rows.mask.bool()) if rows.whole else None
        with continuing(model, rows.mask[:: rows.each, : rows.width], text):
            logits = model(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False, **given).logits
    finally:
        if handle is not None:
            handle.remove()
    # A condition has read the prompts in a pass of its own before this one.
    states = kept[-1][:, rows.width - 1 : -1].float() if kept else None
    return logits[:, -length - 1 : -1], states
