"""Tiny random models, a word-level tokenizer and random interventions for tests; nothing here reads a network."""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from steerkit.intervention import Addition, Constraint, Erasure
from steerkit.maths.lowrank import LowRank
from steerkit.model import Fingerprint, find_decoder
from steerkit.preferences.vector import PreferenceVector
from steerkit.types import Amount, Positions

VOCABULARY = 99
D_MODEL = 32
DEPTH = 4

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "tie_word_embeddings": False, **_IDS}
LLAMA_LIKE: dict[str, Any] = {
    **_COMMON,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


_SEEDS = {"opt": 1}
"""Where seed 0 gives a model that repeats one token whatever is done to it."""


def seeded(model: Any, seed: int) -> Any:
    """Give every parameter a random value large enough for tokens to differ, and switch to eval mode.

    The default initialisation of 0.02 makes all logits nearly equal, so greedy tokens would be decided by rounding, and
    tied embeddings make a random model repeat its last token, so nothing would ever change it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith(("A_log", ".D")):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "ln_" in name:
                # gemma's norms multiply by 1 + weight, all others by weight: keep what the model starts from
                parameter.add_(0.1 * noise)
            else:
                embedding = parameter.shape[0] == VOCABULARY or "embed" in name or "wpe" in name
                width = 1.0 if embedding else 1.5 * parameter.shape[-1] ** -0.5
                width = (
                    D_MODEL**-0.5 if embedding and "gemma" in model.config.model_type and "head" not in name else width
                )
                parameter.copy_(noise * width if parameter.ndim > 1 else 0.1 * noise)
    if model.can_generate():
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model.float().eval()


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE))


def _mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**LLAMA_LIKE, sliding_window=6))


def _qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**LLAMA_LIKE))


def _qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**LLAMA_LIKE, head_dim=8))


def _gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**LLAMA_LIKE, head_dim=8, query_pre_attn_scalar=8, sliding_window=6))


def _gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"] * (DEPTH // 2)
    config = Gemma3TextConfig(**LLAMA_LIKE, head_dim=8, query_pre_attn_scalar=8, sliding_window=6, layer_types=kinds)
    return Gemma3ForCausalLM(config)


def _phi3() -> Any:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**LLAMA_LIKE))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**_COMMON, n_embd=D_MODEL, n_layer=DEPTH, n_head=4, n_positions=128))


def _gpt_neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = {key: value for key, value in LLAMA_LIKE.items() if key != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape))


def _opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        **_COMMON,
        hidden_size=D_MODEL,
        word_embed_proj_dim=D_MODEL,
        ffn_dim=48,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return OPTForCausalLM(config)


def _bloom() -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(**_COMMON, hidden_size=D_MODEL, n_layer=DEPTH, n_head=4))


def _falcon() -> Any:
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(
        **_COMMON,
        hidden_size=D_MODEL,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        max_position_embeddings=128,
    )
    return FalconForCausalLM(config)


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2))


def _mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(**_COMMON, hidden_size=D_MODEL, num_hidden_layers=DEPTH, state_size=4))


_BUILDERS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "bloom": _bloom,
    "falcon": _falcon,
    "mixtral": _mixtral,
    "mamba": _mamba,
}


@functools.cache
def _original(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return seeded(_BUILDERS[name](), _SEEDS.get(name, 0))


def tiny_model(name: str) -> Any:
    """Return a fresh copy of a tiny random model: 4 blocks, width 32, float32, eval mode."""
    return copy.deepcopy(_original(name))


MODELS: dict[str, Callable[[], Any]] = {name: functools.partial(tiny_model, name) for name in _BUILDERS}


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def tokenizer_of(words: Iterable[str], split: Any, *, pad: bool = True, padding_side: str = "left") -> Any:
    """Return a tokenizer with a token for each of `words`, after the special ones; `split` finds them in a text."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    places = {word: place for place, word in enumerate([*SPECIAL, *words])}
    raw = Tokenizer(models.WordLevel(places, unk_token="<unk>"))
    raw.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, padding_side=padding_side, pad_token="<pad>" if pad else None, bos_token="<s>",
        eos_token="</s>", unk_token="<unk>", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def tiny_tokenizer(*, pad: bool = False, padding_side: str = "right", chat: bool = False) -> Any:
    """Return a word-level tokenizer over w0 .. w94 with the ids that the models use; no pad token unless asked."""
    from tokenizers import pre_tokenizers

    words = (f"w{index}" for index in range(VOCABULARY - len(SPECIAL)))
    tokenizer = tokenizer_of(words, pre_tokenizers.WhitespaceSplit(), pad=pad, padding_side=padding_side)
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}"
            "{{ ' <s> ' + ('w0' if m['role'] == 'user' else 'w1') + ' ' + m['content'] + ' </s>' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ ' <s> w1' }}{% endif %}"
        )
    return tokenizer


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_directions(layers: Iterable[int], d_model: int = D_MODEL, seed: int = 0) -> dict[int, Tensor]:
    """Return one random unit direction a layer, `"d_model"`."""
    generator = _generator(seed)
    return {layer: torch.nn.functional.normalize(torch.randn(d_model, generator=generator), dim=0) for layer in layers}


def random_addition(
    layers: Iterable[int] = (1,),
    magnitude: Amount = 4.0,
    *,
    name: str = "added",
    positions: Positions = "all",
    d_model: int = D_MODEL,
    seed: int = 0,
) -> Addition:
    """Return an addition along random unit directions."""
    chosen = tuple(layers)
    return Addition(name, chosen, positions, magnitude, None, directions=unit_directions(chosen, d_model, seed))


def random_erasure(
    layers: Iterable[int] = (1,),
    amount: Amount = 1.0,
    *,
    name: str = "erased",
    positions: Positions = "all",
    d_model: int = D_MODEL,
    seed: int = 0,
) -> Erasure:
    """Return an erasure of random unit directions."""
    chosen = tuple(layers)
    return Erasure(name, chosen, positions, amount, None, directions=unit_directions(chosen, d_model, seed))


def random_constraint(
    layers: Iterable[int] = (1,),
    *,
    at_most: Amount | None = None,
    at_least: Amount | None = None,
    name: str = "bounded",
    positions: Positions = "last",
    d_model: int = D_MODEL,
    seed: int = 0,
    slope: float = 2.0,
    biases: Mapping[int, float] | None = None,
    max_magnitude: float | None = None,
) -> Constraint:
    """Return a bound on random probes w = slope * u, moved along u; `at_most=0.01` by default."""
    chosen = tuple(layers)
    if at_most is None and at_least is None:
        at_most = 0.01
    amount = at_least if at_most is None else at_most
    assert amount is not None
    directions = unit_directions(chosen, d_model, seed)
    return Constraint(
        name,
        chosen,
        positions,
        amount,
        None,
        sense=-1 if at_least is None else 1,
        weights={layer: slope * direction for layer, direction in directions.items()},
        biases=dict(biases) if biases is not None else dict.fromkeys(chosen, 0.1),
        directions=directions,
        max_magnitude=max_magnitude,
    )


def random_vector(
    model: Any, name: str = "helpful", seed: int = 0, rank: int = 2, full: bool = False, size: float = 0.4
) -> PreferenceVector:
    """Return a preference vector of random changes, each `size` times as long as what it changes.

    Low-rank changes of every weight that a hook reaches, or with `full` dense ones of every parameter, biases, norms,
    embeddings and experts among them.
    """
    decoder, generator = find_decoder(model), _generator(1000 + seed)
    deltas: dict[str, Any] = {}
    for key, shape in sorted(decoder.shapes.items()):
        parameter = decoder.parameters.get(key)
        known = parameter is not None and parameter.is_floating_point() and parameter.device.type != "meta"
        length = float(parameter.detach().float().norm()) if known else 1.5 * shape[0] ** 0.5
        if full:
            change = torch.randn(shape, generator=generator)
            deltas[key] = change * (size * max(length, 0.1) / change.norm())
        elif key in decoder.reachable and key.endswith(".weight"):
            left = torch.randn(shape[0], rank, generator=generator)
            right = torch.randn(rank, shape[1], generator=generator)
            deltas[key] = LowRank(left * (size * length / (left @ right).norm()), right)
    swapped = frozenset(key for key in deltas if decoder.reachable.get(key) is False)
    return PreferenceVector(name, deltas, Fingerprint.of(model), {"seed": seed}, swapped)
