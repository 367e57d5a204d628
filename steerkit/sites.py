"""The hooks of a Controller: what it does at one site, from the state of the forward pass to the edited output.

Decoding takes the short form of a site's edit, made once and kept until amounts, rows, dtype or device change; a pass in
which only some positions are edited takes the general one; a traced pass takes the general one without Python numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import SamplesError
from steerkit.hooks import Moment
from steerkit.intervention import Intervention, LinearEdit, Site, SiteEdit
from steerkit.model import hidden_states_of
from steerkit.types import Where

_CAPACITY = 64
"""Samples for which amount tensors are allocated at first; a larger batch makes them grow, and compiles once more."""


class Pass:
    """What the hooks of one Controller share: the forward pass in progress and how it is to be taken."""

    def __init__(self, recording: bool) -> None:
        self.recording = recording
        self.moment: Moment = None  # type: ignore[assignment]  # set before the first block runs
        self.plain = False
        """Whether every position from `first` on is edited and none before, so that blocks may take their short form."""
        self.first = 0
        self.whole = False
        """Whether every position is edited, so that linear modules may take theirs."""


def device_of(module: nn.Module) -> torch.device:
    """Return where a module's parameters are; offloaded ones tell nothing, and its output will."""
    devices = [p.device for p in module.parameters() if p.device.type != "meta"]
    return devices[0] if devices else torch.device("cpu")


class Hook(ABC):
    """What a Controller does at one site: which interventions act there, and their amounts as tensors on its device."""

    def __init__(self, current: Pass, site: Site, interventions: Sequence[Intervention]) -> None:
        self.current = current
        self.site = site
        self.interventions = list(interventions)
        self.device = torch.device("cpu")
        # Tensors made in inference mode could not be saved for backward, nor written in place, outside it.
        with torch.inference_mode(False):
            self.amounts = [torch.full((_CAPACITY,), each.off, dtype=torch.float64) for each in interventions]
            """`"capacity"` an intervention: the amount of each sample."""
            self.samples = [torch.zeros((), dtype=torch.int64) for _ in interventions]
            """How many samples the amounts are for; 0 if all share one."""
        self.shared = [True] * len(interventions)
        self.reached = [False] * len(interventions)
        self.records: list[tuple[int | Tensor, torch.Size, list[Tensor | None]]] = []
        self._short_for: tuple[Any, ...] | None = None

    def prepare(self, module: nn.Module) -> None:
        """Forget what was reached before, and hold every tensor where the module is."""
        self.reached = [False] * len(self.interventions)
        self._move(device_of(module))

    def _move(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            small = torch.float32 if device.type == "mps" else torch.float64
            self.amounts = [amounts.to(device, small) for amounts in self.amounts]
            self.samples = [samples.to(device) for samples in self.samples]
            self.device = device
            self._short_for = None

    def write(self, index: int, values: Tensor, samples: int | None) -> None:
        """Set the amounts of one intervention, in place wherever they fit."""
        with torch.inference_mode(False), torch.no_grad():
            if len(values) > len(self.amounts[index]):
                self.amounts[index] = self.amounts[index].new_empty(2 * len(values))
            table = self.amounts[index]
            table[: len(values)] = values.to(table)
            table[len(values) :] = table[len(values) - 1].clone()
            self.samples[index].fill_(samples or 0)
            self.shared[index] = samples is None
            self._short_for = None

    def switch_off(self) -> None:
        """Leave amounts that edit nothing: a graph that was compiled while attached computes the plain model."""
        for index, each in enumerate(self.interventions):
            self.write(index, torch.tensor([each.off], dtype=torch.float64), None)

    @abstractmethod
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Return what the module put out as the interventions leave it."""

    def _where(self, device: torch.device) -> tuple[list[Where], list[Tensor | None]]:
        """Return which positions of this pass each intervention edits and the share that is left there.

        Positions are a mask `"batch pos"`, shares `"1 pos"`, or None for all of it. Notes what was reached; a traced pass must
        not read what was reached before, or it would compile again.
        """
        found = [self._scheduled(each) for each in self.interventions]
        where, shares = ([here for here, _ in found], [share for _, share in found])
        if torch.compiler.is_compiling():
            self.reached = [True] * len(where)
        else:
            self.reached = [reached or here is not False for reached, here in zip(self.reached, where, strict=True)]
        return (
            [here.to(device) if isinstance(here, Tensor) else here for here in where],
            [share if share is None else share.to(device) for share in shares],
        )

    def _scheduled(self, each: Intervention) -> tuple[Where, Tensor | None]:
        moment = self.current.moment
        here = moment.where(each.positions)
        if each.schedule is None or here is False:
            return here, None
        share = moment.share(each.schedule.factor)[None]
        on = share != 0
        if torch.compiler.is_compiling() or (bool(on.any()) and not bool(on.all())):
            here = here & on.to(here.device) if isinstance(here, Tensor) else on
        elif not bool(on.any()):
            here = False
        return here, None if each.schedule.whole else share

    def _keep(self, magnitudes: Sequence[Tensor | None], shape: torch.Size) -> None:
        kept = [m if m is None else m.detach().float().expand(shape).cpu().clone() for m in magnitudes]
        self.records.append((self.current.moment.start, shape, kept))

    def _row_amounts(self) -> list[Tensor]:
        """Return each intervention's amounts, `"batch"`, or one entry if all rows share it."""
        moment = self.current.moment
        if all(self.shared):
            return [amounts[:1] for amounts in self.amounts]
        sample = moment.sample_of_row().to(self.device)
        return [
            amounts[:1] if shared else amounts[sample]
            for amounts, shared in zip(self.amounts, self.shared, strict=True)
        ]

    def _traced_amounts(self, device: torch.device) -> list[Tensor]:
        """The same without a Python number that would compile again when amounts change."""
        sample = self.current.moment.sample_of_row().to(device)
        return [amounts[sample.clamp(max=len(amounts) - 1)] for amounts in self.amounts]

    def recorded(self, intervention: Intervention) -> Tensor:
        """Return `"row pos"` over all forward passes that were recorded; a later pass over a column replaces it."""
        index = self.interventions.index(intervention)
        passes = [(int(start), shape, kept[index]) for start, shape, kept in self.records]
        if not passes:
            return torch.zeros(0, 0)
        whole = torch.zeros(passes[0][1][0], max(start + shape[1] for start, shape, _ in passes))
        for start, shape, part in passes:
            whole[:, start : start + shape[1]] = 0.0 if part is None else part
        return whole


def _shared(amounts: Sequence[Tensor], shares: Sequence[Tensor | None], last: int = 0) -> list[Tensor]:
    """Return amounts, `"batch"`, or `"batch pos"` where a schedule leaves a share of them; a head sees the last positions."""
    return [
        amount if share is None else amount[:, None] * share[:, -last:].to(amount.dtype)
        for amount, share in zip(amounts, shares, strict=True)
    ]


class BlockHook(Hook):
    """The hook on one decoder block."""

    def __init__(self, current: Pass, site: Site, interventions: Sequence[Intervention]) -> None:
        super().__init__(current, site, interventions)
        assert site.layer is not None
        with torch.inference_mode(False):
            self.edit = SiteEdit(interventions, site.layer)
        self._short: Callable[[Tensor], Tensor] | None = None

    def _move(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.edit.to(device)
        super()._move(device)

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Edit what the block returned, a tensor or the first entry of a tuple."""
        if torch.compiler.is_compiling():
            edited = self._edit_traced(hidden_states_of(output))
        elif isinstance(output, Tensor):
            return self._edit(output)
        else:
            edited = self._edit(hidden_states_of(output))
        return edited if isinstance(output, Tensor) else (edited, *output[1:])

    def _edit(self, hidden: Any) -> Tensor:
        if self.current.plain:
            key = (hidden.dtype, hidden.device, self.current.moment.rows, self.current.moment.part)
            if key != self._short_for:
                self._shorten(hidden, key)
            if self._short is not None:
                return self._short(hidden) if self.current.first == 0 else self._edit_tail(hidden, self._short)
        return self._edit_somewhere(hidden)

    def _edit_tail(self, hidden: Tensor, short: Callable[[Tensor], Tensor]) -> Tensor:
        edited, first = hidden.clone(), self.current.first
        edited[:, first:] = short(hidden[:, first:])
        return edited

    def _shorten(self, hidden: Tensor, key: tuple[Any, ...]) -> None:
        if hidden.device != self.device:
            self._move(hidden.device)
        self.reached = [True] * len(self.interventions)
        with torch.inference_mode(False), torch.no_grad():
            self._short = self.edit.everywhere(self._row_amounts(), hidden)
        self._short_for = key

    def _edit_somewhere(self, hidden: Tensor) -> Tensor:
        if hidden.device != self.device:
            self._move(hidden.device)
        where, shares = self._where(hidden.device)
        if all(here is False for here in where) and not self.current.recording:
            return hidden
        edited, magnitudes = self.edit.edit(hidden, _shared(self._row_amounts(), shares), where)
        if self.current.recording:
            self._keep(magnitudes, hidden.shape[:2])
        return edited

    def _edit_traced(self, hidden: Any) -> Tensor:
        if self.current.recording:
            return self._edit_untraced(hidden)
        where, shares = self._where(hidden.device)
        edited, _ = self.edit.edit(hidden, _shared(self._traced_amounts(hidden.device), shares), where)
        return edited

    @torch.compiler.disable
    def _edit_untraced(self, hidden: Tensor) -> Tensor:
        return self._edit_somewhere(hidden)


class LinearHook(Hook):
    """The hook on one linear module."""

    def __init__(self, current: Pass, site: Site, interventions: Sequence[Intervention]) -> None:
        super().__init__(current, site, interventions)
        self.dtype = torch.float32
        self._edit: LinearEdit | None = None
        self._short: Callable[[Tensor, Tensor], Tensor] | None = None

    def prepare(self, module: nn.Module) -> None:
        kinds = [p.dtype for p in module.parameters() if p.is_floating_point()]
        self.dtype = kinds[0] if kinds else self.dtype
        super().prepare(module)

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        if self._edit is None or (self._edit.device, self._edit.dtype) != (device, self.dtype):
            with torch.inference_mode(False), torch.no_grad():
                self._edit = LinearEdit(self.interventions, self.site, device, self.dtype)

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Add to what the module put out for `args[0]`."""
        input = args[0]
        if torch.compiler.is_compiling():
            return self._edit_traced(input, output)
        if (self.current.whole or (self.everywhere and self.site.layer is None)) and not self.current.recording:
            key = (output.dtype, output.device, self.current.moment.rows, self.current.moment.part, output.shape[:-1])
            if key != self._short_for:
                self._shorten(input, output, key)
            assert self._short is not None
            return self._short(input, output)
        return self._edit_somewhere(input, output)

    def _fit(self, output: Tensor) -> LinearEdit:
        if output.dtype != self.dtype or output.device != self.device or self._edit is None:
            self.dtype = output.dtype
            self._move(output.device)
        assert self._edit is not None
        return self._edit

    def _shorten(self, input: Tensor, output: Tensor, key: tuple[Any, ...]) -> None:
        edit = self._fit(output)
        if not all(self.shared):
            self._grid(input, output)
        self.reached = [True] * len(self.interventions)
        with torch.inference_mode(False), torch.no_grad():
            amounts = [amounts.float() for amounts in self._row_amounts()]
            rows = max(len(amount) for amount in amounts)
            self._short = edit.mixture(torch.stack([amount.expand(rows) for amount in amounts], dim=-1))
        self._short_for = key

    def _edit_somewhere(self, input: Tensor, output: Tensor) -> Tensor:
        edit = self._fit(output)
        grid = self._grid(input, output)
        places, shares = self._where(output.device)
        where = [self._seen(here, grid) for here in places]
        if all(here is False for here in where) and not self.current.recording:
            return output
        amounts = _shared(self._row_amounts(), shares, grid[1])
        edited, magnitudes = edit.edit(
            input.reshape(*grid, input.shape[-1]), output.view(*grid, output.shape[-1]), amounts, where
        )
        if self.current.recording and self.site.layer is not None:
            self._keep(magnitudes, torch.Size(grid))
        return edited.view(output.shape)

    @property
    def everywhere(self) -> bool:
        """Whether all its changes act at all positions and steps."""
        return all(each.positions == "all" and each.schedule is None for each in self.interventions)

    def _seen(self, here: Where, grid: tuple[int, int]) -> Where:
        """Return which of the positions that the module sees are edited; a head sees the last ones."""
        if not isinstance(here, Tensor) or self.site.layer is not None:
            return here
        # Padding of logits means nothing, and with all positions a head may be given any of them.
        return True if self.everywhere else here[:, -grid[1] :]

    def _grid(self, input: Tensor, output: Tensor) -> tuple[int, int]:
        """Return rows and positions of what the module saw; the head may see the last positions only."""
        rows = self.current.moment.rows
        seen = output.numel() // output.shape[-1]
        if output.shape[:-1] == (rows, seen // rows) or (
            output.ndim == 2 and seen == rows * self.current.moment.length
        ):
            return rows, seen // rows
        raise SamplesError(
            f"{self.site.module!r} must see the rows of the forward pass. Found {tuple(input.shape)} for {rows} rows of "
            f"{self.current.moment.length} positions. Use a magnitude that all samples share with fold=True."
        )

    def _edit_traced(self, input: Tensor, output: Tensor) -> Tensor:
        edit = self._edit
        assert edit is not None
        grid = self._grid(input, output)
        places, shares = self._where(output.device)
        where = [self._seen(here, grid) for here in places]
        amounts = _shared(self._traced_amounts(output.device), shares, grid[1])
        shape = [*grid, output.shape[-1]]
        edited, _ = edit.edit(input.reshape(*grid, input.shape[-1]), output.view(shape), amounts, where)
        return edited.view(output.shape)
