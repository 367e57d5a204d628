"""An amount, however it was given, as numbers: what each sample gets at each layer."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerkit.conditions import Scaled
from steerkit.errors import AmountError
from steerkit.types import Amount


class Amounts(NamedTuple):
    """An amount as numbers: what each sample gets at each layer."""

    values: Tensor
    """`"sample layer"` float64; one row if all samples share it."""
    samples: int | None
    """How many samples it was given for; None if all share it."""
    scaled: Scaled | None = None
    """What the numbers will follow, once prompts are read; until then they edit nothing."""

    @classmethod
    def read(cls, amount: Amount, layers: Sequence[int], name: str) -> "Amounts":
        """Return a number, `"sample"`, `"sample layer"` or `{layer: number or "sample"}` in one shape.

        Raises:
            AmountError: another shape, other layers, NaN or infinity.
        """
        if isinstance(amount, Mapping):
            if set(amount) != set(layers):
                raise AmountError(
                    f"`{name}` must name the layers it acts on, {tuple(layers)}. Found {tuple(amount)}. "
                    "Give each layer its amount."
                )
            columns = [cls.read(amount[layer], [layer], name) for layer in layers]
            counts = {column.samples for column in columns if column.samples is not None}
            if len(counts) > 1:
                raise AmountError(f"`{name}` must have as many values at each layer. Found {sorted(counts)} samples.")
            samples = next(iter(counts), None)
            return cls(torch.cat([c.values.expand(samples or 1, 1) for c in columns], dim=1), samples)
        values = _numbers(amount, name)
        if not bool(values.isfinite().all()):
            raise AmountError(f"`{name}` must be finite. Found {shown(values)}. Use 0 (or a bound of 0 or 1) for off.")
        if values.ndim == 0:
            return cls(values.expand(1, len(layers)).clone(), None)
        if values.ndim == 1 and len(values) > 0:
            return cls(values[:, None].expand(-1, len(layers)).clone(), len(values))
        if values.ndim == 2 and len(values) > 0 and values.shape[1] == len(layers):
            return cls(values.clone(), len(values))
        raise AmountError(
            f"`{name}` must be a number, (samples,), or (samples, {len(layers)}) for layers {tuple(layers)}. Found "
            f"shape {tuple(values.shape)}. Pass one value a sample, or one a sample and layer.",
            shape=tuple(values.shape),
        )


def _numbers(amount: Any, name: str) -> Tensor:
    try:
        if isinstance(amount, str | bytes) or amount is None:
            raise TypeError(type(amount).__name__)
        amount = float(amount) if isinstance(amount, Real) and not isinstance(amount, bool) else amount
        found = torch.as_tensor(amount)
        if found.dtype == torch.bool or found.is_complex():
            raise TypeError(f"values of {found.dtype}")
        exact = found if isinstance(amount, Tensor) else torch.as_tensor(amount, dtype=torch.float64)
        return exact.detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise AmountError(
            f"`{name}` must be a number. Found {amount!r:.60}. Pass a float, a tensor, or {{layer: number}}."
        ) from error


def shown(values: Tensor) -> str:
    """Return values as an error message shows them."""
    first = ", ".join(f"{value:g}" for value in values.flatten()[:8].tolist())
    return f"[{first}{', ...' if values.numel() > 8 else ''}]"
