"""Shared vocabulary of signatures.

Axis words of shapes, the same everywhere:
`batch` rows of a forward pass · `pos` token positions, padding included · `d_model` residual width · `layer` selected
layers in order · `concept` probes in a joint solve · `example` rows of a fit set · `sample` rows that the user passed.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

Layer: TypeAlias = int
"""Index of a decoder block, 0-based; "at layer l" means the residual stream after block l."""

Layers: TypeAlias = int | Iterable[int]

Amount: TypeAlias = float | Sequence[float] | Tensor | Mapping[int, float | Sequence[float] | Tensor]
"""A magnitude or a bound: one number; `"sample"`; `"sample layer"`; or `{layer: any of the first two}`."""

Positions: TypeAlias = Literal["last", "all", "prompt", "generated"]
"""`last`: the last prompt position and every later one. Padding is never edited, whatever the choice."""

POSITIONS: tuple[str, ...] = get_args(Positions)

Where: TypeAlias = bool | Tensor
"""Positions to edit in a forward pass: all, none, or a mask that broadcasts to `"batch pos"`."""

Direction: TypeAlias = Literal["probe", "pattern", "mean_difference"]
DIRECTIONS: tuple[str, ...] = get_args(Direction)

STREAMS = ("input_ids", "inputs_embeds", "hidden_states")
"""Arguments from which the module that owns the blocks may take its rows and positions."""

Read: TypeAlias = Literal["last", "mean"]
"""Where a text is read: at its last token, or the mean over its tokens."""

Text: TypeAlias = str | Sequence[Mapping[str, Any]]
"""Plain text, or a conversation as a list of `{"role": ..., "content": ...}` messages."""
