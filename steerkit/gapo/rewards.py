"""Rewards: functions that say what is wrong, and where; and the advantages that follow from what they return."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steerkit.errors import RewardError

_MOST = 3.4e38
"""Rewards are kept in float32."""


def checked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return the function with its rewards checked: one finite number, or None, for each completion.

    Raises:
        RewardError: by the returned function, naming it, the prompt and what was found.
    """
    asynchronous = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    if asynchronous:

        @functools.wraps(function)
        async def wait(*, prompts: Sequence[Any], **columns: Any) -> list[float | None]:
            try:
                found = await function(prompts=prompts, **columns)
            except Exception as error:
                raise _raised(name, prompts, error) from error
            return _rewards(found, name, prompts)

        return wait

    @functools.wraps(function)
    def call(*, prompts: Sequence[Any], **columns: Any) -> list[float | None]:
        try:
            found = function(prompts=prompts, **columns)
        except Exception as error:
            raise _raised(name, _culprit(function, prompts, columns), error) from error
        return _rewards(found, name, prompts)

    return call


def objective_advantages(rewards: Tensor, group: int, scale: str) -> Tensor:
    """Return each objective's own advantages: its rewards less their mean in the group of one prompt.

    Args:
        rewards: `"completion objective"`, groups in a row; NaN where an objective does not apply, which gives advantage 0.
        group: completions of one prompt.
        scale: `"none"`, or `"group"` or `"batch"` to divide by the standard deviation there.

    Returns:
        `"completion objective"`.
    """
    grouped = rewards.view(-1, group, rewards.shape[1])
    known = grouped.isfinite()
    centred = torch.where(known, grouped - grouped.nanmean(dim=1, keepdim=True), 0.0)
    # A reward that is alike for all has no advantage; the rounding of its mean is none either.
    level = torch.where(known, grouped.abs(), 0.0).amax(dim=1, keepdim=True)
    centred = torch.where(centred.abs() <= 1e-6 * level, 0.0, centred)
    if scale == "none":
        return centred.view_as(rewards)
    # TRL's: the deviation of the rewards themselves.
    axes = (1,) if scale == "group" else (0, 1)
    count = known.sum(dim=axes, keepdim=True).clamp(min=2)
    apart = torch.where(known, grouped - grouped.nanmean(dim=axes, keepdim=True), 0.0)
    deviation = (apart.square().sum(dim=axes, keepdim=True) / (count - 1)).sqrt()
    return (centred / (deviation + 1e-4)).view_as(rewards)


def _culprit(function: Callable[..., Any], prompts: Sequence[Any], columns: dict[str, Any]) -> Sequence[Any]:
    """Return the first prompt on which the function raises by itself; all of them if it raises on none alone."""
    for index in range(len(prompts)):
        one = {
            key: value[index : index + 1] if isinstance(value, list) and len(value) == len(prompts) else value
            for key, value in columns.items()
        }
        try:
            function(prompts=prompts[index : index + 1], **one)
        except Exception:
            return prompts[index : index + 1]
    return prompts


def _raised(name: str, prompts: Sequence[Any], error: Exception) -> RewardError:
    where = "on the prompt" if len(prompts) == 1 else f"on {len(prompts)} prompts, the first of which is"
    return RewardError(
        f"A reward function must return rewards. {name!r} raised {type(error).__name__} ({error}) {where} {_told(prompts[0])}. "
        "Mend it, or return None where it does not apply.",
        name=name,
        prompt=prompts[0],
    )


def _rewards(found: Any, name: str, prompts: Sequence[Any]) -> list[float | None]:
    values = found.tolist() if hasattr(found, "tolist") else found
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != len(prompts):
        count = len(values) if isinstance(values, Sequence) and not isinstance(values, str) else type(found).__name__
        raise RewardError(
            f"A reward function must return one reward for each of {len(prompts)} completions. {name!r} returned {count}.",
            name=name,
        )
    for prompt, value in zip(prompts, values, strict=True):
        try:
            fine = value is None or (not isinstance(value, str | bytes) and abs(float(value)) <= _MOST)
        except (TypeError, ValueError, OverflowError):
            fine = False
        if not fine:
            raise RewardError(
                f"A reward must be a finite number, or None where it does not apply. {name!r} returned {value!r} on the prompt "
                f"{_told(prompt)}.",
                name=name,
                prompt=prompt,
            )
    return list(values)


def _told(prompt: Any) -> str:
    text = prompt[-1]["content"] if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict) else prompt
    text = str(text)
    return repr(text if len(text) <= 80 else text[:77] + "...")
