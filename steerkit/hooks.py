"""What a hook must know and cannot see from where it sits: which row is which sample, which column which position.

A hook on a block sees `"batch pos d_model"` and nothing else. Where those columns lie in the sequence, and which rows
belong to one sample, depends on how decoding runs: a cache or none, chunked prefill, prompt and candidates in one
pass, beams. So while steering is attached, `generate` is wrapped on the instance and records the prompts, and a pre-hook
on the module that owns the blocks places each forward pass at cache length + arange. Everything is taken off again by
`Clock.release`.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.errors import AttachError, ConditionError, SamplesError
from steerkit.types import STREAMS, Where

_CLOCK = "_steerkit_clock"
"""Where a model keeps its clock while something is attached: with the model, so that it cannot outlive it."""


class Part:
    """A batch of a part of many samples: which of them it holds, and how many there are in all."""

    def __init__(self, samples: Sequence[int], total: int) -> None:
        self.samples = torch.tensor(samples)
        self.total = total


class Prompts(NamedTuple):
    """What is to be continued, a row a sample."""

    inputs: Tensor
    """`"sample pos"` tokens, or `"sample pos d_model"` embeddings."""
    mask: Tensor | None
    """`"sample pos"`: real tokens; None if all are."""


class Generation:
    """One call of `generate`: its prompts. The prompt is all that was passed; a carried cache stays as it is."""

    def __init__(self, prompts: int, length: int, mask: Tensor | None) -> None:
        self.prompts = prompts
        self.decided = False
        """Whether the conditions of what is attached know these prompts."""
        self.length = length
        self.mask = None if mask is None or bool(mask.all()) else mask.bool()
        """`"prompt pos"`: real tokens of the prompts; None if there is no padding."""
        self.last = None if self.mask is None else length - 1 - self.mask.flip(-1).int().argmax(dim=-1)
        """`"prompt"`: the column of the last real token."""
        self.level = self.last is None or bool((self.last == length - 1).all())
        """Whether all prompts end at the same column, as they do without padding or with padding on the left."""
        self.seen = 0
        """Columns run so far in passes without a cache that knows its length."""

    def advance(self, length: int) -> int:
        """Return where a pass starts that comes without such a cache: it holds the whole sequence, or what is new of it."""
        start = 0 if length > self.seen else self.seen
        self.seen = start + length
        return start


class Moment:
    """One forward pass: its rows, and where its columns lie."""

    def __init__(
        self,
        rows: int,
        length: int,
        start: int | Tensor,
        device: torch.device,
        mask: Any,
        generation: Generation | None,
        part: Part | None = None,
    ) -> None:
        self.rows = rows
        self.length = length
        self.start = start
        self.device = device
        self.generation = generation
        self.part = part
        self._mask = mask
        self._where: dict[str, Where] = {}
        self._shares: dict[Callable[[Tensor], Tensor], Tensor] = {}

    @property
    def samples(self) -> int:
        """Samples that amounts are for: the recorded prompts, or the rows themselves in a bare forward pass."""
        return self.prompts if self.part is None else self.part.total

    @property
    def prompts(self) -> int:
        """Samples among the rows."""
        return self.rows if self.generation is None else self.generation.prompts

    def prompt_of_row(self) -> Tensor:
        """Return `"batch"`: which of these prompts each row belongs to, in `repeat_interleave` order."""
        return torch.arange(self.rows, device=self.device) // (self.rows // self.prompts)

    def sample_of_row(self) -> Tensor:
        """Return `"batch"`: which sample each row belongs to."""
        prompt = self.prompt_of_row()
        return prompt if self.part is None else self.part.samples.to(self.device)[prompt]

    def share(self, of_steps: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `"pos"`, what a schedule leaves at each column: 0 steps in the prompt, t at the t-th new token."""
        if torch.compiler.is_compiling():
            return of_steps(self._steps(self.start, self.device))
        if of_steps not in self._shares:
            self._shares[of_steps] = of_steps(self._steps(int(self.start), None))
        return self._shares[of_steps]

    def _steps(self, start: int | Tensor, device: torch.device | None) -> Tensor:
        columns = torch.arange(self.length, device=device)
        if self.generation is None:
            return torch.zeros_like(columns)
        return (start + columns - (self.generation.length - 1)).clamp(min=0)

    def tail(self, positions: str) -> int | None:
        """Return the column from which on `positions` names every place and before which none, if no mask need be read."""
        generation = self.generation
        if positions == "generated" and generation is None:
            return self.length
        if generation is None:
            return None if self._mask is not None else self.length - 1 if positions == "last" else 0
        if not isinstance(self.start, int):
            return None
        first = generation.length - self.start
        if positions == "last":
            if first > 0 and not generation.level:
                return None
            first -= 1
        elif positions != "generated":
            if first <= 0:
                return self.length if positions == "prompt" else 0
            whole = generation.mask is None and (positions == "all" or first >= self.length)
            return 0 if whole else None
        return min(max(first, 0), self.length)

    def where(self, positions: str) -> Where:
        """Return the positions of this pass that `positions` names; padding is never among them."""
        if positions not in self._where:
            # A traced pass must not depend on where in the sequence it lies.
            tail = None if torch.compiler.is_compiling() else self.tail(positions)
            if tail == self.length or tail == 0:
                self._where[positions] = tail == 0
            else:
                place = self._in_bare_forward if self.generation is None else self._in_generation
                self._where[positions] = place(positions)
        return self._where[positions]

    def _in_bare_forward(self, positions: str) -> Where:
        """A bare forward pass is all prompt."""
        if positions == "generated":
            return False
        real = _real_columns(self._mask, self.rows, self.length, self.start)
        columns = torch.arange(self.length, device=self.device)
        if real is None:
            return True if positions != "last" or self.length == 1 else (columns == self.length - 1)[None]
        if positions != "last":
            return real
        last = self.length - 1 - real.flip(-1).int().argmax(dim=-1)
        return real & (columns >= last[:, None])

    def _in_generation(self, positions: str) -> Where:
        generation = self.generation
        assert generation is not None
        prompt = generation.length
        if positions == "all" and generation.mask is None:
            return True
        columns = self.start + torch.arange(self.length, device=self.device)
        in_prompt = (columns < prompt)[None]
        if positions == "generated":
            return ~in_prompt
        if generation.mask is None or generation.last is None:
            return (columns >= prompt - 1)[None] if positions == "last" else in_prompt
        prompt_of_row = self.prompt_of_row()
        mask = generation.mask.to(self.device)[prompt_of_row]
        places = columns.clamp(max=prompt - 1).expand(self.rows, self.length)
        in_real_prompt = mask.gather(1, places) & in_prompt
        if positions == "prompt":
            return in_real_prompt
        real = in_real_prompt | ~in_prompt
        if positions == "all":
            return real
        return real & (columns >= generation.last.to(self.device)[prompt_of_row][:, None])


def _real_columns(mask: Any, rows: int, length: int, start: int | Tensor) -> Tensor | None:
    """Return `"batch pos"`, the real tokens of a bare forward pass, from whatever attention mask it was given."""
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise AttachError(
            "Steering must know which tokens are padding. Found an attention mask of type "
            f"{type(mask).__name__} in a bare forward pass. Pass the 2-D mask that the tokenizer returns."
        )
    if mask.ndim == 4:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = allowed.any(dim=-2).any(dim=1)
        mask = mask.expand(rows, mask.shape[-1])
    if isinstance(start, int):
        # A mask as wide as a static cache has columns that are not yet there.
        mask = mask[:, : start + length]
        return mask[:, -length:].bool()
    columns = (start + torch.arange(length, device=mask.device)).clamp(max=mask.shape[1] - 1)
    return mask.index_select(1, columns).bool()


@dataclass(frozen=True, eq=False)
class Listener:
    """What a clock asks of an attached Controller."""

    on_pass: Callable[[Moment], None]
    """Take note of a forward pass before its first block runs."""
    on_generate: Callable[[int], None]
    """Refuse to generate for another number of samples than there are amounts."""
    on_prompts: Callable[[Prompts, Part | None], None]
    """Decide what depends on the prompts."""
    conditional: Callable[[], bool]
    """Whether anything does."""
    paused: Callable[[], AbstractContextManager[None]]
    """Edit nothing for a while."""
    counts: Callable[[], frozenset[int]]
    """For how many samples there are amounts of their own."""
    layers: frozenset[int]
    """Blocks at or in which anything is edited."""


class Clock:
    """The wrapped `generate` and the pre-hook of one model, shared by all Controllers that are attached to it."""

    def __init__(self, model: Any, owner: nn.Module) -> None:
        self.model = model
        self.generations: list[Generation] = []
        self.part: Part | None = None
        self.listeners: list[Listener] = []
        """What each attached Controller does, the innermost last."""
        self.compiled = False
        """Set when a pass is traced: hooks added later would not be part of it."""
        names = list(inspect.signature(type(owner).forward).parameters)[1:]
        self._place = {name: index for index, name in enumerate(names)}
        self._stack = ExitStack()

    @classmethod
    def of(cls, model: Any, owner: nn.Module) -> "Clock":
        """Return the running clock of a model, or start one; `owner` is the module that runs through the blocks."""
        clock: Clock | None = model.__dict__.get(_CLOCK)
        if clock is None:
            clock = cls(model, owner)
            with ExitStack() as stack:
                model.__dict__[_CLOCK] = clock
                stack.callback(model.__dict__.pop, _CLOCK, None)
                handle = owner.register_forward_pre_hook(clock._begin, with_kwargs=True)
                stack.callback(handle.remove)
                clock._wrap_generate(stack)
                clock._stack = stack.pop_all()
        return clock

    def release(self) -> None:
        """Stop once nobody listens, and leave the model as it was found."""
        if not self.listeners:
            self._stack.close()

    def _wrap_generate(self, stack: ExitStack) -> None:
        model = self.model
        original = getattr(model, "generate", None)
        if original is None:
            return
        own = model.__dict__.get("generate")

        def restore() -> None:
            if own is None:
                model.__dict__.pop("generate", None)
            else:
                model.__dict__["generate"] = own

        stack.callback(restore)
        model.__dict__["generate"] = _Generate(self, original)

    @property
    def conditional(self) -> bool:
        """Whether anything that is attached depends on the prompts."""
        return any(listener.conditional() for listener in self.listeners)

    def decide(self, prompts: Prompts, generation: Generation | None) -> None:
        """Let what is attached decide by the prompts; a pass that reads them for that decides nothing."""
        if generation is not None:
            generation.decided = True
        around, self.generations = self.generations, []
        try:
            for listener in self.listeners:
                listener.on_prompts(prompts, self.part)
        finally:
            self.generations = around

    def _undecided(self, generation: Generation | None, start: int | Tensor) -> bool:
        """Tell whether a pass holds prompts that nobody has decided by: a replay's, or a bare pass that starts anew."""
        if not self.conditional:
            return False
        if generation is not None:
            return not generation.decided
        if torch.compiler.is_compiling():
            raise ConditionError(
                "A condition reads the prompts in a pass of their own. Found a compiled forward pass outside generate, which "
                "cannot run one. Use generate, or a pass that is not compiled."
            )
        return int(start) == 0

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Place a forward pass before its first block runs."""
        if torch.compiler.is_compiling():
            self.compiled = True
        if kwargs.get("cu_seq_lens_q") is not None:
            raise AttachError(
                "Rows of a forward pass must be samples. Found packed sequences (continuous batching). "
                "Use generate, or forward passes with one sample a row."
            )

        def argument(name: str) -> Any:
            if name in kwargs:
                return kwargs[name]
            index = self._place.get(name, len(args))
            return args[index] if index < len(args) else None

        stream = next(name for name in STREAMS if argument(name) is not None)
        tokens = argument(stream)
        rows, length = tokens.shape[0], tokens.shape[1]
        generation = self.generations[-1] if self.generations else None
        if generation is not None and rows % generation.prompts:
            raise SamplesError(
                f"Rows of a forward pass must be samples times beams or return sequences. Found {rows} rows for "
                f"{generation.prompts} samples. Pass whole prompts to generate."
            )
        cache = argument("past_key_values")
        start = None if cache is None else _cache_length(cache)
        if start is None:
            start = 0 if generation is None else generation.advance(length)
        mask = argument("attention_mask")
        if self._undecided(generation, start):
            if stream == "hidden_states":
                raise ConditionError(
                    f"A condition reads prompts as tokens or embeddings. Found that {type(module).__name__} is handed hidden "
                    "states. Use generate."
                )
            self.decide(_prompts_of(tokens, mask, generation), generation)
        moment = Moment(rows, length, start, tokens.device, mask, generation, self.part)
        for listener in self.listeners:
            listener.on_pass(moment)


class _Generate:
    """The wrapped `generate`: an object, so that a copy of an attached model gets its own and not the original's."""

    def __init__(self, clock: Clock, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self._clock = clock
        self._original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(self._original).bind_partial(*args, **kwargs).arguments
        given = {**bound.pop("kwargs", {}), **bound}
        scale = given.get("guidance_scale") or getattr(given.get("generation_config"), "guidance_scale", None)
        if scale not in (None, 1):
            raise AttachError(
                f"Every forward pass must continue the prompts. Found guidance_scale={scale}, which runs a second stream of "
                "its own beside them. Leave it out while a Controller is attached."
            )
        generation = _describe(self._clock.model, given)
        part = self._clock.part
        for listener in self._clock.listeners:
            listener.on_generate(generation.prompts if part is None else part.total)
        self._clock.generations.append(generation)
        try:
            if self._clock.conditional:
                self._clock.decide(_prompts_given(given, generation), generation)
            return self._original(*args, **kwargs)
        finally:
            self._clock.generations.pop()


@contextmanager
def rows_are_samples(model: Any, rows: Sequence[int], samples: int) -> Iterator[None]:
    """Within, the prompts of a pass are these of so many samples; for batches that are sorted or split."""
    clock: Clock | None = model.__dict__.get(_CLOCK)
    if clock is None:
        yield
        return
    before, clock.part = clock.part, Part(rows, samples)
    try:
        yield
    finally:
        clock.part = before


@contextmanager
def continuing(model: Any, prompts: Tensor, read: Prompts | None = None) -> Iterator[None]:
    """Within, a forward pass replays what `generate` wrote after these prompts: their columns come first, `"prompt pos"`.

    A replay is one pass without a cache over prompt and continuation; each position is edited as it was in generation. Its
    rows are those of the prompts, or as many for each prompt as there were return sequences.
    """
    clock: Clock | None = model.__dict__.get(_CLOCK)
    if clock is None:
        yield
        return
    generation = Generation(prompts.shape[0], prompts.shape[1], prompts)
    if read is not None and clock.conditional:
        clock.decide(read, generation)
    clock.generations.append(generation)
    try:
        yield
    finally:
        clock.generations.pop()


def steered(model: Any) -> bool:
    """Tell whether a Controller is attached to the model."""
    return _CLOCK in model.__dict__


def layers_steered(model: Any) -> frozenset[int]:
    """Return the blocks at or in which attached Controllers edit; nothing if none is attached."""
    clock: Clock | None = model.__dict__.get(_CLOCK)
    return frozenset().union(*([] if clock is None else (listener.layers for listener in clock.listeners)))


def samples_steered(model: Any) -> frozenset[int]:
    """Return for how many samples there are amounts; nothing if all share them."""
    clock: Clock | None = model.__dict__.get(_CLOCK)
    return frozenset().union(*([] if clock is None else (listener.counts() for listener in clock.listeners)))


@contextmanager
def unsteered(model: Any) -> Iterator[None]:
    """Within, every Controller that is attached to the model edits nothing: passes are those of the plain model."""
    clock: Clock | None = model.__dict__.get(_CLOCK)
    with ExitStack() as stack:
        for listener in reversed([] if clock is None else clock.listeners):
            stack.enter_context(listener.paused())
        yield


def _cache_length(cache: Any) -> int | Tensor | None:
    """Return how many columns a cache holds, as a tensor for static caches, or None if it does not know."""
    try:
        length = cache.get_seq_length()
    except ValueError:
        return None
    # A static cache hands out the tensor that it counts in, and the first block's attention moves it on.
    return length.clone() if isinstance(length, Tensor) else length


def _describe(model: Any, given: dict[str, Any]) -> Generation:
    """Read the prompts off the arguments of `generate`."""
    tokens = given.get("inputs")
    tokens = given.get("input_ids") if tokens is None else tokens
    embeds = given.get("inputs_embeds")
    main = tokens if embeds is None else embeds
    if main is None:
        return Generation(1, 1, None)
    mask = given.get("attention_mask")
    if mask is None and embeds is None:
        mask = _inferred_mask(model, main, given)
    if mask is not None:
        mask = mask.bool()
        if mask.shape[1] < main.shape[1]:
            mask = None
    length = main.shape[1] if mask is None else mask.shape[1]
    return Generation(main.shape[0], length, mask)


def _prompts_given(given: dict[str, Any], generation: Generation) -> Prompts:
    """Return the prompts that were handed to `generate`."""
    tokens = given.get("inputs_embeds")
    for name in ("input_ids", "inputs"):
        tokens = given.get(name) if tokens is None else tokens
    found = 0 if tokens is None else tokens.shape[1]
    if tokens is None or found != generation.length:
        raise ConditionError(
            f"A condition reads whole prompts. Found {found} columns of them for a mask of {generation.length}. Pass "
            "input_ids or inputs_embeds from the first token on, a carried cache or not."
        )
    return Prompts(tokens, generation.mask)


def _prompts_of(tokens: Tensor, mask: Any, generation: Generation | None) -> Prompts:
    """Return the prompts that a pass begins with: all of a bare one, the first columns of a replay, each of them once."""
    if generation is None:
        return Prompts(tokens, _real_columns(mask, tokens.shape[0], tokens.shape[1], 0))
    return Prompts(tokens[:: tokens.shape[0] // generation.prompts, : generation.length], generation.mask)


def _inferred_mask(model: Any, tokens: Tensor, given: dict[str, Any]) -> Tensor | None:
    """Follow transformers' rule for prompts without a mask: pad tokens are padding unless they end sequences too."""
    config = given.get("generation_config") or model.generation_config

    def setting(name: str) -> Any:
        value = given.get(name)
        value = getattr(config, name, None) if value is None else value
        return getattr(model.generation_config, name, None) if value is None else value

    pad, eos = setting("pad_token_id"), setting("eos_token_id")
    if pad is None:
        return None
    pad = int(pad)
    if eos is not None and pad in torch.as_tensor(eos).flatten().tolist():
        return None
    mask = tokens != pad
    return None if bool(mask.all()) else mask
