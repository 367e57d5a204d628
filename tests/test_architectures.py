"""Contract 11: an architecture is steered correctly, or refused at construction with the reason. Never silently."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import (
    D_MODEL,
    DEPTH,
    LLAMA_LIKE,
    MODELS,
    VOCABULARY,
    random_addition,
    seeded,
    tiny_model,
    unit_directions,
)
from torch import Tensor, nn

from steerkit import Controller
from steerkit.errors import UnsupportedModelError
from steerkit.model import find_decoder

STRONG = 20.0
NEW = 4

_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
_GPT = {**_IDS, "n_embd": D_MODEL, "n_layer": DEPTH, "n_head": 4, "n_positions": 128}
_MIXTURE = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
_MIXTURE |= {"moe_intermediate_size": 16, "decoder_sparse_step": 1}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_LATENT |= {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
_STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    "bitnet": LLAMA_LIKE,
    "codegen": {**_GPT, "rotary_dim": 4},
    "cohere2": {**LLAMA_LIKE, "sliding_window": 6},
    "ctrl": {**_GPT, "dff": 48},
    "deepseek_v3": {**LLAMA_LIKE, **_MIXTURE, **_LATENT},
    "falcon_h1": {**LLAMA_LIKE, **_STATES, "mamba_d_ssm": 64},
    "gemma": {**LLAMA_LIKE, "head_dim": 8},
    "glm4": {**LLAMA_LIKE, "head_dim": 8},
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        **_IDS,
        "hidden_size": D_MODEL,
        "num_layers": DEPTH,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 6,
        "max_position_embeddings": 128,
    },
    "gpt_oss": {**LLAMA_LIKE, **_MIXTURE, "head_dim": 8, "sliding_window": 6},
    "gptj": {**_GPT, "rotary_dim": 4},
    "granite": LLAMA_LIKE,
    "jamba": {
        **LLAMA_LIKE,
        "mamba_d_state": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "num_experts": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2": {**LLAMA_LIKE, "layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48},
    "mamba2": {
        **_IDS,
        "hidden_size": D_MODEL,
        "num_hidden_layers": DEPTH,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 4,
    },
    "mpt": {**_IDS, "d_model": D_MODEL, "n_layers": DEPTH, "n_heads": 4, "max_seq_len": 128},
    "olmo2": LLAMA_LIKE,
    "phi": LLAMA_LIKE,
    "qwen3_moe": {**LLAMA_LIKE, **_MIXTURE, "head_dim": 8},
    "qwen3_next": {
        **LLAMA_LIKE,
        **_MIXTURE,
        **_LINEAR,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "shared_expert_intermediate_size": 16,
    },
    "recurrent_gemma": {**LLAMA_LIKE, "head_dim": 8, "lru_width": D_MODEL, "attention_window_size": 6},
    "stablelm": LLAMA_LIKE,
    "xglm": {**_IDS, "d_model": D_MODEL, "num_layers": DEPTH, "attention_heads": 4, "ffn_dim": 48},
}
"""Beyond the matrix of tiny.MODELS: by transformers' name for the architecture."""


def from_config(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    return seeded(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CONFIGS[kind])), 0)


def build(name: str) -> Any:
    return tiny_model(name) if name in MODELS else from_config(name)


def prompts(batch: int = 2, length: int = 8) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def states(model: Any, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return what each block puts out, and the first entry of what the model returns."""
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[0]))
        for block in find_decoder(model).blocks
    ]
    with torch.no_grad():
        result = model(ids)[0]
    for handle in handles:
        handle.remove()
    return seen, result


def assert_steered(model: Any) -> None:
    """Check sites and, where the model generates, cached against uncached decoding and a hand-made loop."""
    ids, site, depth = prompts(), 2, find_decoder(model).depth
    plain, result = states(model, ids)
    assert len(plain) == depth == DEPTH
    with Controller(model, random_addition((site,), STRONG)):
        steered, moved = states(model, ids)
    assert all(torch.equal(one, other) for one, other in zip(steered[:site], plain[:site], strict=True))
    assert torch.equal(steered[site], plain[site] + torch.tensor(STRONG) * unit_directions((site,))[site])
    assert not torch.equal(steered[site + 1], plain[site + 1])
    assert not torch.allclose(moved, result, atol=1e-2)
    if not model.can_generate():
        return
    settings = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    amounts = torch.tensor([STRONG, -STRONG])
    before = model.generate(input_ids=ids, **settings)
    assert torch.equal(before, by_hand(model, ids, torch.zeros(2), site, 0)), "the unsteered model must agree first"
    for positions in ("last", "generated"):
        with Controller(model, random_addition((site,), amounts, positions=positions)):
            cached = model.generate(input_ids=ids, **settings)
            uncached = model.generate(input_ids=ids, use_cache=False, **settings)
        assert torch.equal(cached, by_hand(model, ids, amounts, site, ids.shape[1] - (positions == "last")))
        assert torch.equal(uncached, cached)
        assert not torch.equal(cached, before)


def by_hand(model: Any, ids: Tensor, amounts: Tensor, site: int, first: int) -> Tensor:
    """Decode greedily without cache or Controller, adding from column `first` on."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = (output if isinstance(output, Tensor) else output[0]).clone()
        hidden[:, first:] += amounts[:, None, None] * unit_directions((site,))[site]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handle = find_decoder(model).blocks[site].register_forward_hook(hook)
    for _ in range(NEW):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, attention_mask=torch.ones_like(ids)).logits[:, -1:].argmax(-1)], 1)
    handle.remove()
    return ids


@pytest.mark.parametrize("name", [*MODELS, *CONFIGS])
def test_steered(name: str) -> None:
    assert_steered(build(name))


def refusal(model: Any) -> str | None:
    """Return why a model is refused at construction, or None if it is not."""
    try:
        Controller(model, random_addition((1,)))
    except UnsupportedModelError as error:
        return str(error)
    return None


def _rwkv() -> Any:
    import transformers

    config = transformers.RwkvConfig(
        **_IDS, hidden_size=D_MODEL, num_hidden_layers=DEPTH, attention_hidden_size=D_MODEL, intermediate_size=48
    )
    return seeded(transformers.RwkvForCausalLM(config), 0)


STATEFUL: dict[str, Callable[[], Any]] = {
    "mamba": lambda: build("mamba"),
    "mamba2": lambda: build("mamba2"),
    "recurrent_gemma": lambda: build("recurrent_gemma"),
    "falcon_h1": lambda: build("falcon_h1"),
    "rwkv": _rwkv,
}


@pytest.mark.parametrize("name", STATEFUL)
def test_states_that_know_no_length_are_edited_at_every_step(name: str) -> None:
    """Decoding from a state (transformers' own rwkv decodes other tokens from one): each new column is edited once.

    Or the architecture is refused.
    """
    model, ids, depth = STATEFUL[name](), prompts(), 2
    edits = [
        random_addition((depth,), [STRONG, -STRONG], positions="last", name="last"),
        random_addition((depth,), [STRONG, -STRONG], positions="generated", name="generated", seed=3),
    ]
    if refusal(model) is not None:
        assert name not in MODELS
        return
    control = Controller(model, edits, record_magnitudes=True)
    with control:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        found = {name: layers[depth] for name, layers in control.magnitudes.items()}
    for positions, first in (("last", ids.shape[1] - 1), ("generated", ids.shape[1])):
        expected = torch.zeros(2, ids.shape[1] + NEW - 1)
        expected[:, first:] = torch.tensor([[STRONG], [-STRONG]])
        assert torch.equal(found[positions], expected)


def _encoder(kind: str, head: str = "Model", **more: Any) -> Any:
    import transformers

    config = {"hidden_size": D_MODEL, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "intermediate_size": 48}
    return getattr(transformers, f"{kind}{head}")(
        getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, **config, **more)
    )


def _t5(kind: str) -> Any:
    import transformers

    config = transformers.T5Config(
        d_model=D_MODEL, d_kv=8, d_ff=48, num_layers=DEPTH, num_heads=4, vocab_size=VOCABULARY
    )
    return getattr(transformers, kind)(config)


ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: _encoder("Bert"),
    "bert for masks": lambda: _encoder("Bert", "ForMaskedLM"),
    "bert as a decoder": lambda: _encoder("Bert", "LMHeadModel", is_decoder=True),
    "roberta as a decoder": lambda: _encoder("Roberta", "ForCausalLM", is_decoder=True, bos_token_id=0, eos_token_id=2),
    "deberta": lambda: _encoder("DebertaV2"),
    "t5 encoder": lambda: _t5("T5EncoderModel"),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_steered_or_refused(name: str) -> None:
    model = seeded(ENCODERS[name](), 1)
    reason = refusal(model)
    if reason is None:
        assert_steered(model)
    else:
        assert "cannot be steered" in reason


def _albert() -> Any:
    return _encoder("Albert", "ForMaskedLM", embedding_size=16)


def _shared_llama() -> Any:
    """A llama whose blocks 1 and 3 are one module."""
    model = tiny_model("llama")
    model.model.layers[3] = model.model.layers[1]
    return model


def _branching_llama() -> Any:
    """A llama whose third block reads the first block's output, not the second's."""
    model = tiny_model("llama")
    kept: list[Tensor] = []
    model.model.layers[0].register_forward_hook(lambda _, __, out: kept.append(out))
    model.model.layers[2].register_forward_pre_hook(lambda _, args: (kept.pop(), *args[1:]))
    return model


def _without_list() -> Any:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 5
    return model


def _prompt_tuned() -> Any:
    """PEFT puts virtual tokens in front: positions of a prompt would not be its own tokens."""
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


class _Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "encoder-decoder": (lambda: _t5("T5ForConditionalGeneration"), "encoder-decoder"),
    "shared blocks (albert)": (_albert, r"4 decoder blocks in one nn\.ModuleList"),
    "shared blocks (llama)": (_shared_llama, r"ran in the order \[0, 1, 3, 2, 1, 3\]"),
    "branching": (_branching_llama, "block 2 does not read what block 1 returned"),
    "another depth": (_without_list, r"5 decoder blocks.*model\.layers \(4\)"),
    "virtual tokens": (_prompt_tuned, "PromptTuningConfig"),
    "plain module": (_Plain, "transformers model is required. Found _Plain"),
    "no module": (lambda: "gpt2", "transformers model is required. Found str"),
    "nothing": (lambda: None, "transformers model is required. Found NoneType"),
}


# peft 0.21 asks transformers for an attribute that transformers 5.23 has renamed
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    builder, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        Controller(builder(), random_addition((1,)))
    assert isinstance(caught.value, TypeError)


def test_xlnet_is_refused_for_its_shape() -> None:
    """Its blocks put out (pos, batch, d_model): per-sample amounts would go to positions."""
    import transformers

    config = transformers.XLNetConfig(vocab_size=VOCABULARY, d_model=D_MODEL, n_layer=DEPTH, n_head=4, d_inner=48)
    with pytest.raises(UnsupportedModelError, match=r"block 0 returns \(3, 2, 32\)"):
        Controller(transformers.XLNetLMHeadModel(config), random_addition((1,)))


@pytest.mark.parametrize("name", ["llama body", "llama classifier", "llava", "gemma3 with images"])
def test_other_heads_on_a_decoder(name: str) -> None:
    """The language model inside a vision-language model, or below another head, is found and steered."""
    import transformers

    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
    vision |= {"image_size": 8, "patch_size": 4}
    llama = transformers.LlamaConfig(**LLAMA_LIKE)
    if name == "llama body":
        model: Any = transformers.LlamaModel(llama)
    elif name == "llama classifier":
        model = transformers.LlamaForSequenceClassification(llama)
    elif name == "llava":
        seeing = transformers.CLIPVisionConfig(**vision)
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(vision_config=seeing, text_config=llama, image_token_index=98)
        )
    else:
        text = transformers.Gemma3TextConfig(**LLAMA_LIKE, head_dim=8, sliding_window=6)
        seeing = transformers.SiglipVisionConfig(**vision)
        model = transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(text_config=text, vision_config=seeing, mm_tokens_per_image=4)
        )
    assert_steered(seeded(model, 0))


@pytest.mark.parametrize("name", [*MODELS])
def test_construction_changes_nothing(name: str) -> None:
    """The look at three tokens leaves weights, hooks, mode, gradients and random numbers as they were."""
    model = tiny_model(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {path: sorted(module.__dict__) for path, module in model.named_modules()}
    hooks = {path: (len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in model.named_modules()}
    torch.manual_seed(3)
    random = torch.get_rng_state()
    Controller(model, random_addition((1,)))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert {path: sorted(module.__dict__) for path, module in model.named_modules()} == attributes
    after = {path: (len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in model.named_modules()}
    assert after == hooks


def test_refusal_changes_nothing() -> None:
    model = _branching_llama()
    hooks = {path: len(module._forward_hooks) for path, module in model.named_modules()}
    random = torch.get_rng_state()
    with pytest.raises(UnsupportedModelError):
        Controller(model, random_addition((1,)))
    assert {path: len(module._forward_hooks) for path, module in model.named_modules()} == hooks
    assert torch.equal(torch.get_rng_state(), random)
