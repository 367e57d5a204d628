"""The Controller: interventions on a model, from `with` to the end of it, and not a moment longer.

Hooks are put on once; amounts live in tensors that `using` changes in place, so a compiled model need not be compiled
again. Nothing in a hook branches on a tensor's value.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.conditions import Scaled
from steerkit.errors import AmountError, AttachError, ConditionError, NotReachedError, SamplesError
from steerkit.fold import Fold
from steerkit.gates import Gates
from steerkit.hooks import Clock, Listener, Moment, Part, Prompts
from steerkit.intervention import Amounts, Intervention, Site, WeightAddition
from steerkit.maths.lowrank import Delta
from steerkit.model import Fingerprint, find_decoder, resolve_layers
from steerkit.sites import BlockHook, Hook, LinearHook, Pass
from steerkit.types import Amount


class Controller:
    """Apply interventions to a model while attached, each row with its own amounts.

        with Controller(model, [toxicity.constrain(at_most=0.01)]) as control:
            model.generate(**inputs)

    At a site, additions act in the order of the list, then all constraints and erasures are met together. Preference
    vectors act on what linear modules put out, so each row has its own mixture of weights; what no output can stand for
    (norms, embeddings, experts kept as one tensor) is written into the weights while attached, with a magnitude that all
    samples share. Controllers nest; the inner one acts after the outer one at each site, so bounds that must hold together
    belong into one. While attached, a model serves one thread at a time.

    Args:
        model: a causal language model, plain or PEFT-wrapped, sharded or not.
        interventions: one or several; their names must differ.
        record_magnitudes: keep what each row really received, for `magnitudes`.
        fold: write preference vectors into the weights while attached, and restore the saved originals bit for bit: no cost
            a token, one magnitude for all samples, memory for a copy of the weights that change.
        check_model: refuse interventions that were made on another base model.

    Raises:
        UnsupportedModelError: the model's blocks cannot be steered, or weights that would be written are offloaded or
            quantised.
        BaseModelMismatchError: an intervention was made on another model, or for another width.
        LayerError: an intervention acts on a layer that the model does not have.
        DependentConceptsError: bounds at one layer that cannot all be met.
        AmountError: no interventions, two of one name, or an amount for each sample where weights would be written.
    """

    def __init__(
        self,
        model: Any,
        interventions: Intervention | Iterable[Intervention],
        *,
        record_magnitudes: bool = False,
        fold: bool = False,
        check_model: bool = True,
    ) -> None:
        listed = [interventions] if isinstance(interventions, Intervention) else list(interventions)
        _check_names(listed)
        self._given = model
        self._decoder = find_decoder(model)
        self._check_fit(listed, check_model)
        self.interventions: tuple[Intervention, ...] = tuple(listed)
        self.record_magnitudes = record_magnitudes
        self._amounts = {each.name: each.read(each.amount) for each in listed}
        self._gates = Gates(model, self._decoder, listed, check_model)
        self._waits = bool(self._gates.depending(self._amounts))
        """Whether anything depends on the prompts. A traced pass reads this and no amounts, or it would compile again."""
        self._idle = False
        """Set while paused: nothing is edited, decided or counted."""
        self._pass = Pass(recording=record_magnitudes)
        self._fold = Fold(self._decoder.model, self._folded(fold))
        self._sites = self._hooks(fold)
        self._block_positions = {p.positions for h in self._sites if isinstance(h, BlockHook) for p in h.interventions}
        self._linear_positions = {
            p.positions for h in self._sites if isinstance(h, LinearHook) for p in h.interventions
        }
        self._refuse_unfoldable(self._amounts)
        self._refuse_contradictions({**self._amounts, **self._gates.waiting(self._amounts)})
        self._stack: ExitStack | None = None
        self._ran = False
        self._recorded: Any = None
        self._special = record_magnitudes or any(each.schedule is not None for each in listed)
        """Whether hooks must always take their general form."""

    def __repr__(self) -> str:
        parts = "".join(f"\n  {each}," for each in self.interventions)
        state = "attached" if self._stack is not None else "detached"
        return f"Controller({type(self._decoder.model).__name__}, {state}, [{parts}\n])"

    def _check_fit(self, interventions: list[Intervention], check_model: bool) -> None:
        here: Fingerprint | None = None
        for each in interventions:
            if each.fingerprint is not None and check_model:
                here = here or Fingerprint.of(self._given)
                each.fingerprint.check(here, repr(each.name))
            each.check(self._decoder)

    def _folded(self, fold: bool) -> dict[str, list[tuple[WeightAddition, Delta]]]:
        """Return by parameter what is written into it: what no hook reaches, or with `fold` everything."""
        changes: dict[str, list[tuple[WeightAddition, Delta]]] = {}
        for each in self.interventions:
            if isinstance(each, WeightAddition):
                for name, delta in each.deltas.items():
                    if fold or name not in self._decoder.reachable:
                        changes.setdefault(name, []).append((each, delta))
        if fold and not changes:
            raise AmountError("`fold=True` writes preference vectors into the weights. Found none. Leave it out.")
        return changes

    def _hooks(self, fold: bool) -> list[Hook]:
        """Return one hook a site, each with the interventions that act there in the order of the list."""
        by_site: dict[Site, list[Intervention]] = {}
        for each in self.interventions:
            if not (fold and isinstance(each, WeightAddition)):
                for site in each.sites(self._decoder):
                    by_site.setdefault(site, []).append(each)
        return [
            BlockHook(self._pass, site, here) if site.module is None else LinearHook(self._pass, site, here)
            for site, here in by_site.items()
        ]

    def _refuse_unfoldable(self, amounts: Mapping[str, Amounts]) -> None:
        for name, changes in self._fold.changes.items():
            for each, _ in changes:
                amount, place = amounts[each.name], each.positions
                why = {
                    f"{amount.samples} of them": amount.samples is not None,
                    f"positions={place!r}": place != "all",
                    "a condition": each.condition is not None or amount.scaled is not None,
                    "a schedule": each.schedule is not None,
                }
                if any(why.values()):
                    found = next(word for word, so in why.items() if so)
                    raise AmountError(
                        f"Magnitudes for each sample or for some positions cannot reach {name!r}: its change is written into "
                        f"the weights. Found {found} for {each.name!r}. Use a scalar magnitude at all positions, "
                        "fold=False where that is why, or leave it out with vector.only(...)."
                    )

    def _refuse_contradictions(self, amounts: Mapping[str, Amounts]) -> None:
        for hook in self._sites:
            if isinstance(hook, BlockHook):
                hook.edit.refuse_contradiction(
                    [each.column(amounts[each.name].values, hook.site.layer) for each in hook.interventions]
                )

    def attach(self) -> "Controller":
        """Put the hooks on. `with` does this; call it yourself before `torch.compile`.

        Raises:
            AttachError: already attached, or the model was compiled before.
        """
        if self._stack is not None:
            raise AttachError(
                "A Controller can be attached once at a time. Found it attached. Detach it, or make another."
            )
        self._refuse_compiled()
        stack = ExitStack()
        try:
            clock = Clock.of(self._decoder.model, self._decoder.owner)
            stack.callback(clock.release)
            if clock.compiled:
                raise AttachError(
                    "Hooks must be on before the model is compiled. Found that it was compiled under another Controller. "
                    "Attach both first, then compile."
                )
            layers = frozenset(layer for each in self.interventions for layer in each.layers)
            listener = Listener(
                self._begin, self._check_samples, self._decide, self._conditional, self._paused, self._counts, layers
            )
            clock.listeners.append(listener)
            stack.callback(clock.listeners.remove, listener)
            if self._fold:
                stack.callback(self._fold.restore)
                self._fold.save()
            for hook in self._sites:
                module = self._module_of(hook.site)
                stack.callback(hook.switch_off)
                stack.callback(module.register_forward_hook(hook).remove)
                hook.prepare(module)
            if any(isinstance(h, LinearHook) and h.site.layer is None and not h.everywhere for h in self._sites):
                for module in {id(m): m for m in (self._given, self._decoder.model)}.values():
                    stack.callback(module.register_forward_pre_hook(_refuse_columns, with_kwargs=True).remove)
            self._ran = False
            self._gates.decided = {}
            self._write_amounts()
        except BaseException:
            stack.close()
            raise
        self._stack = stack
        return self

    def _module_of(self, site: Site) -> nn.Module:
        if site.module is not None:
            return self._decoder.model.get_submodule(site.module)
        assert site.layer is not None
        return self._decoder.blocks[site.layer]

    def detach(self) -> None:
        """Take everything off; the model is bit for bit what it was.

        Raises:
            AttachError: not attached.
            NotReachedError: an intervention reached no row while attached; written weights need no pass.
        """
        if self._stack is None:
            raise AttachError("Only an attached Controller can be detached. Found it detached. Use `with` or attach().")
        self._fold.refuse_covered()
        stack, self._stack = self._stack, None
        stack.close()
        for each in self.interventions:
            hooks = [hook for hook in self._sites if each in hook.interventions]
            reached = [hook.reached[hook.interventions.index(each)] for hook in hooks]
            if hooks and not any(reached):  # what is written into the weights has reached them
                layers = f"layers {min(each.layers)}..{max(each.layers)}" if each.layers else "no layer"
                raise NotReachedError(
                    f"{each.name!r} reached no row: {self._why_not(each)} while the Controller was attached at {layers}. "
                    "Run the model inside `with` (compile it after attach).",
                    name=each.name,
                )
            missed = [
                hook.site.module
                for hook, found in zip(hooks, reached, strict=True)
                if not found and hook.site.module is not None and hook.site.layer is not None
            ]
            if missed:
                raise NotReachedError(
                    f"{each.name!r} did not reach {missed[0]!r}: the model ran without calling it. Use fold=True, which "
                    "writes the weights themselves, or leave it out with vector.only(...).",
                    name=each.name,
                )

    def _why_not(self, each: Intervention) -> str:
        if not self._ran:
            return "no forward pass ran"
        return f"forward passes ran, but none held a position of {each.positions!r},"

    def __enter__(self) -> "Controller":
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stack is None:
            return  # detached by hand
        try:
            self.detach()
        except NotReachedError:
            if kind is None:
                raise

    def using(self, **amounts: Amount | Scaled) -> "_Using":
        """Change amounts at once, in place; as a `with`, attach if needed and put the old amounts back at the end.

            with control.using(helpful=torch.linspace(0, 1, 8)):
                model.generate(**eight_copies)

        Raises:
            AmountError: an unknown name, or an amount that its intervention cannot take.
            DependentConceptsError: bounds on one probe that contradict each other.
        """
        by_name = {each.name: each for each in self.interventions}
        unknown = sorted(set(amounts) - set(by_name))
        if unknown or not amounts:
            raise AmountError(
                f"`using` takes amounts by the names {sorted(by_name)}. Found {unknown or 'none'}. Check the spelling."
            )
        new = {**self._amounts, **{name: by_name[name].read(self._keyed(amount)) for name, amount in amounts.items()}}
        for amount in amounts.values():
            if isinstance(amount, Scaled):
                self._gates.check(amount.reading)
        self._refuse_unfoldable(new)
        self._refuse_contradictions({**new, **self._gates.waiting(new)})
        self._fold.refuse_covered()
        using = _Using(self, {name: self._amounts[name] for name in amounts})
        self._set(new)
        return using

    def _keyed(self, amount: Amount | Scaled) -> Amount | Scaled:
        """Return an amount with its layers, if it names any, counted from the front."""
        if not isinstance(amount, Mapping):
            return amount
        return {resolve_layers(layer, self._decoder.depth)[0]: value for layer, value in amount.items()}

    def _set(self, amounts: Mapping[str, Amounts]) -> None:
        self._amounts = dict(amounts)
        self._waits = bool(self._gates.depending(amounts))
        self._gates.decided = {}
        if self._stack is not None:
            self._write_amounts()

    def _write_amounts(self) -> None:
        self._write_hooks()
        if self._fold:
            self._fold.write(self._amounts)

    def _write_hooks(self) -> None:
        if self._idle:
            current = {each.name: each.nothing for each in self.interventions}
        else:
            current = self._gates.current(self._amounts)
        for hook in self._sites:
            for index, each in enumerate(hook.interventions):
                amounts = current[each.name]
                hook.write(index, each.column(amounts.values, hook.site.layer), amounts.samples)

    def _conditional(self) -> bool:
        return self._waits and not self._idle

    def _decide(self, prompts: Prompts, part: Part | None) -> None:
        """Let prompts decide what is left of the amounts, and write that."""
        if self._conditional():
            self._check_samples(len(prompts.inputs) if part is None else part.total)
            decided = self._gates.decide(prompts, part, self._amounts)
            self._refuse_contradictions({**self._amounts, **decided})
            self._gates.decided = decided
            self._write_hooks()

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Within, nothing is edited, and nothing that runs counts as reached or is recorded."""
        kept = [(hook, hook.reached, hook.records) for hook in self._sites]
        idle, recorded, ran = self._idle, self._recorded, self._ran
        with self._fold.lifted():
            try:
                self._idle = True
                self._write_hooks()
                for hook in self._sites:
                    hook.reached, hook.records = [False] * len(hook.interventions), []
                yield
            finally:
                self._idle, self._recorded, self._ran = idle, recorded, ran
                for hook, reached, records in kept:
                    hook.reached, hook.records = reached, records
                self._write_hooks()

    @property
    def magnitudes(self) -> dict[str, dict[int, Tensor]]:
        """What each row received in the last `generate` or forward pass, `magnitudes[name][layer]`: `"row pos"`.

        Signed, in units of the residual stream along the unit direction, or of a preference vector; 0 where nothing was
        edited. Columns are those of the sequence, from the first one that ran. Under beam search, rows are the beams as they
        stood. What is written into the weights has one magnitude for all rows and is not listed.

        Raises:
            AttachError: the Controller was made without `record_magnitudes=True`.
        """
        if not self.record_magnitudes:
            raise AttachError(
                "Magnitudes are kept on request. Found record_magnitudes=False. Make it with Controller(..., record_magnitudes=True)."
            )
        found: dict[str, dict[int, Tensor]] = {each.name: {} for each in self.interventions}
        for hook in self._sites:
            layer = hook.site.layer
            for each in hook.interventions:
                # All linear modules of a layer receive the same.
                if layer is not None and layer not in found[each.name]:
                    found[each.name][layer] = hook.recorded(each)
        return {name: dict(sorted(by_layer.items())) for name, by_layer in found.items()}

    def _begin(self, moment: Moment) -> None:
        """Take note of a forward pass before its first block runs."""
        self._pass.moment = moment
        self._ran = True
        if torch.compiler.is_compiling():
            self._check_rows_compiled(moment)
            return
        self._check_samples(moment.samples)
        if moment.generation is None and not self._idle:
            each = next((each for each in self.interventions if each.schedule is not None), None)
            # A static cache counts in a tensor, so that asking waits for the device.
            if each is not None and int(moment.start) > 0:
                raise ConditionError(
                    f"A schedule counts the tokens that generate writes. Found a pass outside generate that continues a cache, for "
                    f"{each.name!r} with {each.schedule}. Use generate, or set amounts step by step with using()."
                )
        if self._conditional():
            self._gates.refuse_undecided(moment.samples, self._amounts)
        ordinary = not self._special and not torch.is_autocast_enabled(moment.device.type)
        tails = {moment.tail(positions) for positions in self._block_positions}
        tail = tails.pop() if len(tails) == 1 else None
        self._pass.plain = ordinary and tail is not None and tail < moment.length
        self._pass.first = tail or 0
        self._pass.whole = ordinary and all(moment.where(positions) is True for positions in self._linear_positions)
        if self.record_magnitudes:
            new = moment.generation is not self._recorded if moment.generation else moment.start == 0
            if new:
                self._recorded = moment.generation
                for hook in self._sites:
                    hook.records.clear()

    def _counts(self) -> frozenset[int]:
        given = {} if self._idle else self._amounts
        return frozenset(amounts.samples for amounts in given.values() if amounts.samples is not None)

    def _check_samples(self, found: int) -> None:
        given = {} if self._idle else self._amounts
        for name, amounts in given.items():
            if amounts.samples is not None and amounts.samples != found:
                raise SamplesError(
                    f"{name!r} has amounts for {amounts.samples} samples but the batch has {found}. Pass one value a prompt.",
                    expected=amounts.samples,
                    found=found,
                )

    def _check_rows_compiled(self, moment: Moment) -> None:
        """The same check without a Python number that would compile again when amounts change."""
        first = {each.name: (hook, i) for hook in reversed(self._sites) for i, each in enumerate(hook.interventions)}
        for hook, index in first.values():
            samples = hook.samples[index]
            torch._assert_async((samples == 0) | (samples == moment.samples), "amounts and batch differ in samples")

    def _refuse_compiled(self) -> None:
        decoder = self._decoder
        modules: list[Any] = [self._given, decoder.model, decoder.body, decoder.owner, *decoder.blocks]
        for module in modules:
            compiled = (
                hasattr(module, "_orig_mod")
                or getattr(module, "_compiled_call_impl", None) is not None
                or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
                or module.__dict__.get("_compiled_call") is not None
            )
            if compiled:
                raise AttachError(
                    f"Hooks must be on before the model is compiled: a compiled {type(module).__name__} skips hooks that "
                    "come later. Pass the plain model, attach(), then torch.compile it and change amounts with using(). If "
                    "generate compiled it (static cache), keep one Controller attached, or pass disable_compile=True."
                )


def _refuse_columns(module: nn.Module, args: tuple, kwargs: dict) -> None:
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        raise AttachError(
            "A change of the head at some positions must know which ones the head sees. Found logits_to_keep as a tensor. Pass "
            "a number, or add the vector at all positions."
        )


def _check_names(interventions: list[Any]) -> None:
    if not interventions:
        raise AmountError(
            "A Controller needs at least one intervention. Found none. Pass concept.add(...), for example."
        )
    for each in interventions:
        if not isinstance(each, Intervention):
            raise AmountError(
                f"Interventions are required. Found {type(each).__name__}. Use concept.add, .erase or .constrain."
            )
    names = [each.name for each in interventions]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise AmountError(
            f"Names within a Controller must differ. Found {double!r} twice. Give one of them a name of its own: name='other'."
        )


class _Using:
    """The other half of `Controller.using`: what is put back at the end of a `with`."""

    def __init__(self, control: Controller, before: dict[str, Amounts]) -> None:
        self._control = control
        self._before = before
        self._attached = False

    def __enter__(self) -> Controller:
        if self._control._stack is None:
            try:
                self._control.attach()
            except BaseException:
                self._restore()
                raise
            self._attached = True
        return self._control

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._attached:
                self._control.__exit__(kind, error, trace)
        finally:
            self._restore()

    def _restore(self) -> None:
        self._control._set({**self._control._amounts, **self._before})
