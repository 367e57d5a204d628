"""Inside an nnsight trace: read the steered residual stream, steer without a Controller, record.

What nnsight calls a module's output is what its `forward` returned, before any hook. A Controller edits in hooks, so a trace
sees nothing of it at the block itself; everything downstream does. `residual` reads where the next module reads.

A Controller steers any trace of the model that runs in this process, `lm.trace`, `lm.generate` and `lm.pipe`, in one piece
or in several invokes. Then rows are those of the whole batch: an amount for each sample has one entry a row, in the order
of the invokes. `steer` needs no Controller: it sets outputs, with tensor operations alone, so it also runs where the model
is somewhere else (`remote=True`), in one invoke of several, and in an edit that nnsight keeps (`lm.edit()`).
"""

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.activations import Activations, batches_of, checked_texts, digest_of, padded, refuse_long, tokenise
from steerkit.controller import Controller
from steerkit.errors import (
    AmountError,
    AttachError,
    ConditionError,
    MissingDependencyError,
    NotReachedError,
    SamplesError,
    TextsError,
    UnsupportedModelError,
)
from steerkit.hooks import Moment, rows_are_samples
from steerkit.intervention import Intervention, Site, WeightAddition, edit_site
from steerkit.model import (
    ByModel,
    Decoder,
    Fingerprint,
    evaluating,
    find_decoder,
    hidden_states_of,
    resolve_layers,
    unwrap,
)
from steerkit.types import STREAMS, Layers, Read, Text

try:
    import nnsight
    from nnsight.intervention.interleaver import OutOfOrderError
except ImportError as error:
    raise MissingDependencyError(
        "Traces need nnsight. It is not installed. Run: pip install 'steerkit-sdk[nnsight]'."
    ) from error

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class _Course(NamedTuple):
    """How a forward pass runs through a model's body."""

    order: dict[str, int]
    """By path: the place of each module in the order in which they finish."""
    last_reader: str | None
    """Path of the module that reads what the last block returns: the final norm, in most models."""


_courses: ByModel = ByModel()


def residual(lm: Any, layer: int) -> Tensor:
    """Return the residual stream after a decoder block, `"batch pos d_model"`, as everything downstream reads it.

        with Controller(lm, [toxicity.erase()]), lm.trace(prompts):
            after = nnsight.save([residual(lm, layer)[:, -1] for layer in toxicity.layers])

    It is the input of the next block; after the last one, of the module that reads it, which is found by running the model
    once on two rows of three tokens. So a Controller's edits are in it, and what a trace or `steer` set. Ask in the order of
    layers, as for anything in a trace. In one invoke of several it holds that invoke's rows.

    Args:
        lm: an nnsight model around a causal language model: `TransformersModel`, `LanguageModel` or `NNsight`.
        layer: decoder block, 0-based; negative ones count from the end.

    Raises:
        AttachError: no trace runs.
        LayerError: a layer that does not exist.
        UnsupportedModelError: no nnsight model, blocks that carry no residual stream, or a last block that hands it to no
            module, so that there is no input to read.
    """
    model, decoder, course = _in_trace(lm, "residual")
    [layer] = resolve_layers(layer, decoder.depth)
    if layer + 1 < decoder.depth:
        return _envoy(lm, decoder.blocks[layer + 1]).input
    if course.last_reader is None:
        raise UnsupportedModelError(
            f"The residual stream after the last block is read where the next module takes it. Found in "
            f"{type(model).__name__} that no module takes it as it is. Read an earlier layer, or what the model returns."
        )
    return _envoy(lm, model.get_submodule(course.last_reader)).input


def steer(lm: Any, interventions: Intervention | Iterable[Intervention], *, check_model: bool = True) -> None:
    """Apply interventions to the forward pass of a trace, as a Controller would, by setting what modules put out.

        with lm.trace() as tracer:
            with tracer.invoke(prompts):
                steer(lm, [toxicity.constrain(at_most=0.01), helpful.add([0.0, 0.5, 1.0])])
            with tracer.invoke():  # the whole batch, read beside it in any place
                after = nnsight.save(residual(lm, 12)[:, -1])

    Sites are set in the order in which the pass comes to them, all interventions of a site together. An amount for each
    sample has one entry a row of the trace, or of the invoke; positions leave padding out as nnsight pads it.

    Call it before anything else is read or set from the first block on: it begins with what the decoder is given. What is to
    be read between sites is read from a second invoke, as above. One call is one pass: under `lm.generate` call it in
    `for step in tracer.iter[:n]`, where the prompt is the first step. With `remote=True` steerkit must be installed there, or
    sent along: `nnsight.register("steerkit")`.

    Args:
        lm: an nnsight model around a causal language model.
        interventions: one or several, as for a Controller.
        check_model: refuse interventions that were made on another base model.

    Raises:
        AttachError: no trace runs, or the pass is past the decoder's input.
        AmountError: a change of weights that no module's output can stand for (norms, embeddings, experts kept as one
            tensor), or one outside the blocks at some positions only.
        ConditionError: a condition, a reading as an amount, or a schedule: a pass of its own, or the step, decides them.
        SamplesError: amounts for another number of samples than the trace or invoke has rows.
        NotReachedError: positions that a forward pass does not have.
        UnsupportedModelError, LayerError, BaseModelMismatchError, DependentConceptsError: as for a Controller.
    """
    model, decoder, course = _in_trace(lm, "steer")
    # Never attached: it refuses what no Controller takes.
    listed = Controller(model, interventions, check_model=check_model).interventions
    for each in listed:
        _refuse(each, decoder)
    moment = _moment(lm, decoder)
    by_site: dict[Site, list[Intervention]] = {}
    for each in listed:
        _check_reach(each, moment)
        for site in each.sites(decoder):
            by_site.setdefault(site, []).append(each)
    modules = {site: _module_of(site, decoder) for site in by_site}
    paths = {module: path for path, module in model.named_modules()}
    # The head is not part of the body, and comes after it.
    for site in sorted(by_site, key=lambda site: course.order.get(paths[modules[site]], len(course.order))):
        _edit(_envoy(lm, modules[site]), site, by_site[site], moment)


def activations(
    lm: Any,
    texts: Sequence[Text],
    *,
    layers: Layers | None = None,
    read: Read = "last",
    batch_size: int | None = None,
    remote: bool | str = False,
) -> Activations:
    """Record the residual stream after decoder blocks by traces: `steerkit.record` for a model that nnsight runs.

        kind, unkind = activations(lm, kind_texts, remote=True), activations(lm, unkind_texts, remote=True)
        kindness = Concept.from_activations("kindness", kind, unkind)

    The states are those of `record`, which is faster on a model in this process; it does not see what only traces see, the
    edits of `lm.edit()`, and cannot run the model elsewhere.

    Args:
        lm: an nnsight model with a tokenizer.
        texts: strings, or conversations as lists of messages, as in `record`.
        layers: decoder blocks; all by default.
        read: `"last"`, the last token, or `"mean"`, the mean over the tokens.
        batch_size: texts of one trace; by default as many as fit 2048 tokens.
        remote: where the traces run, as in `lm.trace`; steerkit must be installed there, or sent along.

    Returns:
        `Activations`, float32 on the CPU.

    Raises:
        TextsError: no texts, something else than text, a text without tokens or longer than the model takes, no tokenizer.
        LayerError: a layer that does not exist.
        UnsupportedModelError: no nnsight model, or one that cannot be read.
    """
    model = _wrapped(lm)
    if read not in ("last", "mean"):
        raise TextsError(f"`read` must be 'last' or 'mean'. Found {read!r}. Choose one.")
    if batch_size is not None and batch_size < 1:
        raise TextsError(f"`batch_size` must be at least 1. Found {batch_size}. Leave it out for a good default.")
    texts = checked_texts(texts, "texts")
    if not isinstance(lm, nnsight.TransformersModel) or lm.tokenizer is None:
        raise TextsError(
            f"Texts need an nnsight model with a tokenizer. Found {type(lm).__name__} without. Wrap the model: "
            "nnsight.TransformersModel(model, tokenizer=tokenizer)."
        )
    tokens = tokenise(lm.tokenizer, texts)
    refuse_long(model, [len(ids) for ids in tokens], "A text")
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]), reverse=True)
    # A vocabulary of logits for each position would be written for nothing.
    takes = inspect.signature(type(model).forward).parameters
    few = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    parts: list[tuple[list[int], dict[int, Tensor]]] = []
    for rows in batches_of(order, [len(ids) for ids in tokens], batch_size):
        ids, mask = padded([tokens[i] for i in rows])
        given = {"input_ids": ids, "attention_mask": mask}
        with (
            torch.no_grad(),
            evaluating(model),
            rows_are_samples(model, rows, len(texts)),
            lm.trace(given, remote=remote, **few),
        ):
            found = nnsight.save(_states(lm, layers, read, mask))
        states, header, values = found
        parts.append((rows, states))
    places = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    joined = {layer: torch.cat([states[layer] for _, states in parts])[places] for layer in parts[0][1]}
    return Activations(joined, read, Fingerprint.from_parts(header, values), tuple(digest_of(text) for text in texts))


def _states(lm: Any, layers: Layers | None, read: Read, mask: Tensor) -> tuple[dict[int, Tensor], dict, Tensor]:
    """Return `{layer: "batch d_model"}` float32 and the parts of the model's fingerprint, inside a trace."""
    model, decoder, _ = _in_trace(lm, "activations")
    fingerprint = Fingerprint.of(model)
    states = {}
    for layer in sorted(resolve_layers(layers, decoder.depth)):
        hidden = residual(lm, layer).detach()
        real = mask.to(hidden.device)
        lengths = real.sum(dim=-1)
        if read == "last":
            kept = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1].float()
        else:
            kept = torch.einsum("bp,bpd->bd", real.float(), hidden.float()) / lengths[:, None]
        states[layer] = kept.cpu()
    return states, fingerprint.header(), fingerprint.values


def _wrapped(lm: Any) -> Any:
    """Return the transformers model inside an nnsight model."""
    if not isinstance(lm, nnsight.Envoy):
        raise UnsupportedModelError(
            f"An nnsight model is required. Found {type(lm).__name__}. Wrap it: nnsight.TransformersModel(model, "
            "tokenizer=tokenizer)."
        )
    return unwrap(lm._module)


def _in_trace(lm: Any, name: str) -> tuple[Any, Decoder, _Course]:
    """Return the model of a trace that runs now, its checked decoder, and how a pass runs through it."""
    model = _wrapped(lm)
    if not lm.interleaver.interleaving:
        raise AttachError(
            f"`{name}` takes part in a forward pass. Found that no trace of this model runs one. Use it inside `with "
            "lm.trace(prompts):`, or inside an invoke if the trace has some."
        )
    if model not in _courses:
        with _aside(lm, model):
            _courses[model] = _watch(find_decoder(model))
    return model, find_decoder(model), _courses[model]


@contextmanager
def _aside(lm: Any, model: nn.Module) -> Iterator[None]:
    """Within, the model runs by itself: the trace sees nothing of it, nor does a Controller whose pass may be under way."""
    with ExitStack() as stack:
        stack.callback(setattr, lm.interleaver, "interleaving", lm.interleaver.interleaving)
        lm.interleaver.interleaving = False
        for module in model.modules():
            stack.callback(module.__dict__.update, {name: module.__dict__[name] for name in _HOOKS})
            module.__dict__.update({name: OrderedDict() for name in _HOOKS})
        yield


def _watch(decoder: Decoder) -> _Course:
    """Run two rows of three tokens and note the order of modules, and who takes what the last block returns."""
    order: dict[str, int] = {}
    after: list[Tensor | None] = []
    readers: list[str] = []

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            if after and first is after[0]:
                readers.append(path)

        return hook

    def leave(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            order[path] = len(order)
            if module is decoder.blocks[-1]:
                after.append(hidden_states_of(output))

        return hook

    with ExitStack() as stack, torch.no_grad(), evaluating(decoder.model):
        for path, module in decoder.model.named_modules():
            stack.callback(module.register_forward_pre_hook(enter(path), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave(path)).remove)
        device = decoder.model.get_input_embeddings().weight.device
        tokens = torch.tensor([[1, 0, 2], [3, 1, 4]], device="cpu" if device.type == "meta" else device)
        decoder.body(input_ids=tokens, use_cache=False)
    return _Course(order, readers[0] if readers else None)


def _envoy(lm: Any, module: nn.Module) -> Any:
    return lm.interleaver.envoys[id(module)]


def _module_of(site: Site, decoder: Decoder) -> nn.Module:
    if site.module is not None:
        return decoder.model.get_submodule(site.module)
    assert site.layer is not None
    return decoder.blocks[site.layer]


def _refuse(each: Intervention, decoder: Decoder) -> None:
    """Raise for what outputs of one pass cannot do."""
    if each.readings or each.schedule is not None:
        what = "a condition" if each.readings else "a schedule"
        raise ConditionError(
            f"`steer` knows one forward pass. Found {what} for {each.name!r}, which the prompts or the step of generation "
            "decide. Put a Controller around the trace."
        )
    if not isinstance(each, WeightAddition):
        return
    name = next((name for name in each.deltas if name not in decoder.reachable), None)
    if name is not None:
        raise AmountError(
            f"`steer` sets what modules put out. Found that {each.name!r} changes {name!r}, for which no output can stand. "
            "Put a Controller around the trace, which writes it into the weights, or leave it out with vector.only(...)."
        )
    name = next((name for name, layer in each.layer_of.items() if layer is None), None)
    if name is not None and each.positions != "all":
        raise AmountError(
            f"A change outside the blocks takes all positions. Found positions={each.positions!r} for {each.name!r}, which "
            f"changes {name!r}. Put a Controller around the trace, or leave it out with vector.only(layers=vector.layers)."
        )


def _moment(lm: Any, decoder: Decoder) -> Moment:
    """Place the pass of a trace, or the rows of an invoke, by what the decoder is given."""
    owner = decoder.owner
    try:
        args, kwargs = _envoy(lm, owner).inputs
    except OutOfOrderError as error:
        raise AttachError(
            "`steer` begins with what the decoder is given. Found that the trace is past it. Call it before anything is "
            "read or set from the first block on, and read from a second tracer.invoke()."
        ) from error
    given = inspect.signature(type(owner).forward).bind_partial(owner, *args, **kwargs).arguments
    tokens = next(given[name] for name in STREAMS if given.get(name) is not None)
    start, cache = 0, given.get("past_key_values")
    if cache is not None:
        with suppress(ValueError):  # a cache that does not know
            start = int(cache.get_seq_length())
    return Moment(tokens.shape[0], tokens.shape[1], start, tokens.device, given.get("attention_mask"), None)


def _check_reach(each: Intervention, moment: Moment) -> None:
    samples = each.read(each.amount).samples
    if samples not in (None, moment.rows):
        raise SamplesError(
            f"{each.name!r} has amounts for {samples} samples but the trace has {moment.rows} rows. Pass one value a row of "
            "the trace, or of the invoke.",
            expected=samples,
            found=moment.rows,
        )
    if each.positions == "generated" or (each.positions == "prompt" and moment.start != 0):
        raise NotReachedError(
            f"{each.name!r} acts on positions={each.positions!r}, and `steer` on one forward pass, which cannot tell prompt "
            "from generation. Put a Controller around lm.generate.",
            name=each.name,
        )


def _edit(envoy: Any, site: Site, interventions: list[Intervention], moment: Moment) -> None:
    """Set what a module puts out as the interventions leave it."""
    input = None if site.module is None else envoy.input
    output = envoy.output
    hidden = hidden_states_of(output)
    assert hidden is not None
    seen = hidden.numel() // hidden.shape[-1]
    if site.layer is not None and seen != moment.rows * moment.length:
        raise SamplesError(
            f"{envoy.path!r} must see the rows of the trace or invoke. Found {tuple(hidden.shape)} for {moment.rows} rows of "
            f"{moment.length} positions, as where a module sees all invokes in one. Pass all prompts to one trace."
        )
    device = hidden.device
    small = torch.float32 if device.type == "mps" else torch.float64
    amounts, where = [], []
    for each in interventions:
        here = True if site.layer is None else moment.where(each.positions)
        where.append(here.to(device) if isinstance(here, Tensor) else here)
        amounts.append(each.column(each.read(each.amount).values, site.layer).to(device, small))
    # Linear modules may see rows and positions as one axis.
    grid = hidden.reshape(moment.rows, -1, hidden.shape[-1])
    edited = edit_site(interventions, input, grid, amounts, where, site=site)[0].reshape(hidden.shape)
    envoy.output = edited if isinstance(output, Tensor) else (edited, *output[1:])
