"""The hook on one decoder block: what a Controller does there, from the state of the forward pass to the edited output.

Decoding takes the short form of a site's edit, made once and kept until amounts, rows, dtype or device change; a pass in
which only some positions are edited takes the general one; a traced pass takes the general one without Python numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.hooks import Moment
from steerkit.intervention import Intervention, SiteEdit
from steerkit.model import hidden_states_of

_CAPACITY = 64
"""Samples for which amount tensors are allocated at first; a larger batch makes them grow, and compiles once more."""


class Pass:
    """What the sites of one Controller share: the forward pass in progress and how it is to be taken."""

    def __init__(self, recording: bool) -> None:
        self.recording = recording
        self.moment: Moment = None  # type: ignore[assignment]  # set before the first block runs
        self.plain = False
        """Whether every position from `first` on is edited and none before, so that sites may take their short form."""
        self.first = 0


def device_of(block: nn.Module) -> torch.device:
    """Return where a block's parameters are; offloaded ones tell nothing, and its output will."""
    devices = [p.device for p in block.parameters() if p.device.type != "meta"]
    return devices[0] if devices else torch.device("cpu")


class Site:
    """The hook on one block: which interventions act there, and their amounts as tensors on the block's device."""

    def __init__(self, current: Pass, layer: int, interventions: Sequence[Intervention]) -> None:
        self.current = current
        self.layer = layer
        self.interventions = list(interventions)
        self.device = torch.device("cpu")
        # Tensors made in inference mode could not be saved for backward, nor written in place, outside it.
        with torch.inference_mode(False):
            self.edit = SiteEdit(interventions, layer)
            self.amounts = [torch.full((_CAPACITY,), each.off, dtype=torch.float64) for each in interventions]
            """`"capacity"` an intervention: the amount of each sample."""
            self.samples = [torch.zeros((), dtype=torch.int64) for _ in interventions]
            """How many samples the amounts are for; 0 if all share one."""
        self.shared = [True] * len(interventions)
        self.reached = [False] * len(interventions)
        self.records: list[tuple[int | Tensor, torch.Size, list[Tensor | None]]] = []
        self._short: Callable[[Tensor], Tensor] | None = None
        self._short_for: tuple[Any, ...] | None = None

    def prepare(self, device: torch.device) -> None:
        """Forget what was reached before, and hold every tensor where the block is."""
        self.reached = [False] * len(self.interventions)
        self._move(device)

    def _move(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.edit.to(device)
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

    def hook(self, module: nn.Module, args: tuple, output: Any) -> Any:
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
            key = (hidden.dtype, hidden.device, self.current.moment.rows)
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
        moment = self.current.moment
        where = [moment.where(each.positions) for each in self.interventions]
        self.reached = [reached or here is not False for reached, here in zip(self.reached, where, strict=True)]
        if all(here is False for here in where) and not self.current.recording:
            return hidden
        where = [here.to(hidden.device) if isinstance(here, Tensor) else here for here in where]
        edited, magnitudes = self.edit.edit(hidden, self._row_amounts(), where)
        if self.current.recording:
            shape = hidden.shape[:2]
            kept = [m if m is None else m.detach().float().expand(shape).cpu().clone() for m in magnitudes]
            self.records.append((moment.start, shape, kept))
        return edited

    def _edit_traced(self, hidden: Any) -> Tensor:
        if self.current.recording:
            return self._edit_untraced(hidden)
        moment = self.current.moment
        where = [moment.where(each.positions) for each in self.interventions]
        self.reached = [True] * len(self.interventions)
        sample = moment.sample_of_row().to(hidden.device)
        amounts = [amounts[sample.clamp(max=len(amounts) - 1)] for amounts in self.amounts]
        edited, _ = self.edit.edit(hidden, amounts, where)
        return edited

    @torch.compiler.disable
    def _edit_untraced(self, hidden: Tensor) -> Tensor:
        return self._edit_somewhere(hidden)

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
