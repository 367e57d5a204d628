"""What a direction says in words: by the lens, which reads it through the head, and by what steering does to the next token."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steerkit.activations import checked_texts, tokenise
from steerkit.concepts.concept import Concept
from steerkit.controller import Controller
from steerkit.errors import AmountError, BaseModelMismatchError, TextsError
from steerkit.evaluation.report import Estimate
from steerkit.experiments.looking import unembedding
from steerkit.experiments.running import (
    at_random,
    check_concept,
    divergences,
    listed,
    log_probabilities,
    measuring,
    unedited,
)
from steerkit.experiments.table import Cell, Table, estimate
from steerkit.intervention import Intervention
from steerkit.model import Decoder, find_decoder, resolve_layers
from steerkit.types import Text

_DRAWS = 64
"""Random directions that a lens is held against."""


def lens(
    model: Any,
    tokenizer: Any,
    direction: Concept | Tensor,
    *,
    layer: int | None = None,
    top: int = 10,
    seed: int = 0,
) -> Table:
    """Return the tokens that a direction raises and lowers most, read through the final norm and the head.

    `effect = W_U (n(u) - n(-u)) / 2`, less its mean over the vocabulary: u the unit direction, n the final norm, W_U the head.
    The norm is scale-free, so this is its gain (and its centring) applied to u, as if the stream were u alone. A step of m on a
    stream of norm N moves a logit by about m / N times its effect.

    What is approximated: the norm's scale is that of u and not of a real stream, later blocks are skipped (only the direct path
    is read), the head's bias and a soft cap are left out. At early layers little of it need be true: `next_token` is exact. The
    logit lens, nostalgebraist 2020; its limits, Belrose et al. (arXiv:2303.08112).

    The control column holds the effect of the same rank among random directions: the mean of 64 and the range of 95 % of them.

    Args:
        model: a causal language model; not changed.
        tokenizer: its tokenizer.
        direction: a concept, of which `mover` is read, or a direction `"d_model"`.
        layer: of the concept; its best by default.
        top: how many tokens on either side.
        seed: of the random directions.

    Raises:
        TextsError: `top` out of range.
        LayerError: a layer that was not probed.
        BaseModelMismatchError: a direction of another width, a concept of another model.
        UnsupportedModelError: a model whose head does not read the residual stream.
    """
    decoder = find_decoder(model)
    title = "a direction"
    if isinstance(direction, Concept):
        check_concept(model, decoder, direction)
        [layer] = resolve_layers(direction.best_layer if layer is None else layer, decoder.depth)
        direction[layer]  # raises where there is no probe
        title = f"{direction.name!r} ({direction.direction}) at layer {layer}"
        vector = direction.mover[layer]
    else:
        vector = direction
        if vector.shape != (decoder.d_model,) or not bool(vector.isfinite().all()) or not bool(vector.any()):
            raise BaseModelMismatchError(
                f"A direction must be finite, not zero, and of shape ({decoder.d_model},). Found {tuple(vector.shape)}."
            )
    _check_top(tokenizer, top)
    noise = torch.randn(_DRAWS, decoder.d_model, generator=torch.Generator().manual_seed(seed))
    effects = _through(decoder, torch.cat([vector.float().cpu()[None], noise]))[:, : len(tokenizer)]
    rows: list[tuple[Cell, ...]] = []
    for side, sign in (("raised", 1), ("lowered", -1)):
        best = (sign * effects).topk(top, dim=1)
        chance = sign * best.values[1:]
        for rank in range(top):
            token = int(best.indices[0, rank])
            ends = chance[:, rank].quantile(torch.tensor([0.025, 0.975])).tolist()
            random = Estimate(float(chance[:, rank].mean()), *ends)
            rows.append((side, rank + 1, tokenizer.decode([token]), float(effects[0, token]), random))
    return Table(
        f"Tokens of {title}",
        "Effect on the logit, as if the residual stream were the direction alone; a step of m on a stream of norm N moves it by "
        f"about m / N of that. Control: what random directions reach at the same rank, the mean of {_DRAWS} and 95 % of them.",
        ("side", "rank"),
        ("token", "effect", "random"),
        tuple(rows),
    )


@torch.no_grad()
def _through(decoder: Decoder, directions: Tensor) -> Tensor:
    """Return `"direction vocabulary"`, centred: what the norm's odd part and the head make of unit directions."""
    norm, head = unembedding(decoder)
    # A copy in float32; plain forwards, for hooks would take this for a pass.
    norm = copy.deepcopy(norm).float()
    place = next((p.device for p in norm.parameters()), torch.device("cpu"))
    units = F.normalize(directions, dim=-1).to(place)
    odd = (norm.forward(units) - norm.forward(-units)) / 2
    # One row more, of zeros: the head's bias drops out.
    rows = torch.cat([odd, torch.zeros_like(odd[:1])]).to(head.weight.device, decoder.model.dtype)
    logits = head.forward(rows).float().cpu()
    logits = logits[:-1] - logits[-1]
    return logits - logits.mean(dim=-1, keepdim=True)


def next_token(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    interventions: Intervention | Iterable[Intervention],
    *,
    top: int = 10,
    seed: int = 0,
) -> Table:
    """Return what steering does to the distribution of the next token, exactly: the tokens that it raises and lowers most.

    `change = q - p`, the mean over prompts, p the probability as the model stands and q with the interventions attached. `kl` is
    the token's share of `KL(q || p) = sum q log(q / p)` in nats; the last row is the whole of it.

    The control ("random") moves every edited position as far, along a random direction a block; changes of weights are
    exchanged for random ones of the same shapes, ranks and norms. Its figures are those of the token of the same rank among
    what it raises or lowers itself: the most of many changes is large whatever the direction.

    Args:
        model: a causal language model; not changed.
        tokenizer: its tokenizer.
        prompts: texts or conversations.
        interventions: what is attached, as a Controller takes it.
        top: how many tokens on either side.
        seed: of the random directions.

    Raises:
        AttachError: a Controller is attached.
        TextsError: no prompts, `top` out of range.
        AmountError: an intervention that does not act before the next token.
        BaseModelMismatchError, AmountError, LayerError: as the Controller raises them.
    """
    texts = checked_texts(prompts, "prompts")
    _check_top(tokenizer, top)
    attached, decoder = listed(interventions), unedited(model)
    Controller(model, attached)
    for each in attached:
        if each.positions == "generated" or (
            each.schedule is not None and not bool(each.schedule.factor(torch.zeros(1)).any())
        ):
            raise AmountError(
                f"The next token follows the prompt's last position, at step 0. Found {each.name!r}, which does not act there "
                f"(positions={each.positions!r}, {each.schedule}). Use positions='last'."
            )
    ids = tokenise(tokenizer, texts)
    plain = log_probabilities(decoder, ids).double()
    with measuring(model, decoder, attached) as steps:
        steered = log_probabilities(decoder, ids).double()
    with at_random(model, decoder, attached, steps, seed):
        randomly = log_probabilities(decoder, ids).double()
    changes = [each.exp() - plain.exp() for each in (steered, randomly)]
    shares = [each.exp() * (each - plain) for each in (steered, randomly)]
    rows: list[tuple[Cell, ...]] = []
    for side, sign in (("raised", 1), ("lowered", -1)):
        best = [(sign * each.mean(dim=0)[: len(tokenizer)]).topk(top).indices.tolist() for each in changes]
        for rank, (token, other) in enumerate(zip(*best, strict=True), 1):
            figures = [
                estimate(each[:, at])
                for pair in (changes, shares)
                for each, at in zip(pair, (token, other), strict=True)
            ]
            means = [float(each[:, token].exp().mean()) for each in (plain, steered)]
            rows.append((side, rank, tokenizer.decode([token]), *means, *figures))
    whole = [estimate(divergences(each, plain)) for each in (steered, randomly)]
    rows.append(("all", 0, "(all tokens)", 1.0, 1.0, None, None, *whole))
    return Table(
        "What steering does to the next token",
        f"Probabilities before and after, their change, and the share of KL(steered || unsteered) in nats, means over "
        f"{len(texts)} prompts; brackets are 95 % intervals over prompts. Control: steps of the same length along random directions, "
        "at the token of the same rank among theirs.",
        ("side", "rank"),
        ("token", "before", "after", "change", "random change", "kl", "random kl"),
        tuple(rows),
    )


def _check_top(tokenizer: Any, top: int) -> None:
    if not 1 <= top <= len(tokenizer):
        raise TextsError(f"`top` must be from 1 to the {len(tokenizer)} tokens. Found {top}. Try 10.")
