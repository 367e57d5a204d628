"""Recording equals hooks made by hand, whatever the batching, and refuses bad texts before the model runs."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from tiny import D_MODEL, DEPTH, random_addition, tiny_model, tiny_tokenizer
from tokenizers import processors
from torch import Tensor

from steerkit import Controller, record
from steerkit.activations import Activations
from steerkit.errors import LayerError, NotReachedError, SteerkitError, TextsError, UnsupportedModelError
from steerkit.model import find_decoder

TEXTS = [
    "w5",
    "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11",
    "w40 w41",
    "w9 w8 w7 w6",
    "w50 w51 w52 w53 w54 w55 w56",
    "w5",
    "w60 w61 w62",
]


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Equal up to 2e-5 of the largest entry: a residual stream adds small numbers to large ones."""
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=0)


def bos_tokenizer(**given: Any) -> Any:
    """A tokenizer that puts <s> in front of plain text, as llama's does, with a template that writes its own."""
    tokenizer = tiny_tokenizer(**given)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def by_hand(model: Any, ids: list[int], blocks: Any = None) -> list[Tensor]:
    """Return each block's output for one unpadded text, `"pos d_model"`."""
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        seen.append((output if isinstance(output, Tensor) else output[0])[0].float().clone())

    handles = [block.register_forward_hook(keep) for block in blocks or find_decoder(model).blocks]
    try:
        with torch.no_grad():
            model(torch.tensor([ids]))
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextmanager
def forward_passes(model: Any) -> Iterator[list[int]]:
    """Count forward passes of the model's body."""
    find_decoder(model)  # its own check of the model runs once and is cached
    calls: list[int] = []
    handle = find_decoder(model).blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "gemma2", "mixtral", "mamba", "gpt_neox"])
def test_the_last_token_equals_hooks_made_by_hand(name):
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    recorded = record(model, tokenizer, TEXTS)
    assert recorded.layers == tuple(range(DEPTH))
    for index, text in enumerate(TEXTS):
        for layer, hidden in enumerate(by_hand(model, tokenizer(text)["input_ids"])):
            assert_close(recorded[layer][index], hidden[-1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_the_mean_is_over_real_tokens(name):
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    recorded = record(model, tokenizer, TEXTS, read="mean")
    assert recorded.read == "mean"
    for index, text in enumerate(TEXTS):
        for layer, hidden in enumerate(by_hand(model, tokenizer(text)["input_ids"])):
            assert_close(recorded[layer][index], hidden.mean(dim=0))


def test_the_last_layer_is_the_state_before_the_final_norm(model, tokenizer):
    """`output_hidden_states` returns the state after the norm there, so it agrees everywhere but at the last block."""
    ids = tokenizer(TEXTS[1], return_tensors="pt").input_ids
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        recorded = record(model, tokenizer, [TEXTS[1]])
        for layer in range(DEPTH - 1):
            assert_close(recorded[layer], states[layer + 1][:, -1])
        last = recorded[DEPTH - 1]
        assert not torch.allclose(last, states[DEPTH][:, -1], atol=0.1)
        assert_close(model.model.norm(last), states[DEPTH][:, -1])


def test_what_is_recorded(model, tokenizer):
    recorded = record(model, tokenizer, tuple(TEXTS), layers=[-1, 0])
    assert isinstance(recorded, Activations)
    assert recorded.layers == (0, DEPTH - 1)
    assert len(recorded) == len(TEXTS)
    assert recorded.read == "last"
    for layer in recorded.layers:
        assert recorded[layer].shape == (len(TEXTS), D_MODEL)
        assert recorded[layer].dtype == torch.float32
        assert recorded[layer].device.type == "cpu"
        assert not recorded[layer].requires_grad
    assert recorded.fingerprint is not None
    assert recorded.fingerprint.depth == DEPTH
    assert len(recorded.digests) == len(TEXTS)
    assert recorded.digests[0] == recorded.digests[5]
    assert len(set(recorded.digests)) == len(TEXTS) - 1
    assert "7 texts" in repr(recorded)
    with pytest.raises(LayerError, match="Layer 1 was not recorded"):
        recorded[1]


@pytest.mark.parametrize("layers", [2, [2], (2,), range(2, 3), -2, iter([2])], ids=lambda given: type(given).__name__)
def test_layers_may_be_given_in_any_way(model, tokenizer, layers):
    assert record(model, tokenizer, TEXTS, layers=layers).layers == (2,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_float32_that_is_exactly_theirs(tokenizer, dtype):
    model = tiny_model("llama").to(dtype)
    recorded = record(model, tokenizer, TEXTS[:1])
    assert recorded[1].dtype == torch.float32
    assert torch.equal(recorded[1], recorded[1].to(dtype).float())


# --- batching and padding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["last", "mean"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_the_batch_size_is_irrelevant(model, tokenizer, batch_size, read):
    wanted = record(model, tokenizer, TEXTS, read=read)
    found = record(model, tokenizer, TEXTS, read=read, batch_size=batch_size)
    for layer in range(DEPTH):
        assert_close(found[layer], wanted[layer])


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "falcon", "gemma3", "mamba"])
def test_padding_is_invisible_in_every_kind_of_position(name, tokenizer):
    """Learned, shifted, ALiBi, rotary and recurrent positions: a text in a batch reads as it does alone."""
    model = tiny_model(name)
    together = record(model, tokenizer, TEXTS)
    for index in (0, 3):
        alone = record(model, tokenizer, [TEXTS[index]])
        for layer in range(DEPTH):
            assert_close(together[layer][index], alone[layer][0])


@pytest.mark.parametrize("order", [[6, 5, 4, 3, 2, 1, 0], [3, 1, 4, 0, 6, 2, 5]])
def test_the_order_of_texts_is_kept(model, tokenizer, order):
    plain = record(model, tokenizer, TEXTS, batch_size=2)
    shuffled = record(model, tokenizer, [TEXTS[i] for i in order], batch_size=2)
    for layer in range(DEPTH):
        assert_close(shuffled[layer], plain[layer][order])
    assert shuffled.digests == tuple(plain.digests[i] for i in order)


@pytest.mark.parametrize("pad", [True, False], ids=["pad token", "no pad token"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_of_the_tokenizer_is_irrelevant(model, pad, side):
    wanted = record(model, tiny_tokenizer(), TEXTS)
    found = record(model, tiny_tokenizer(pad=pad, padding_side=side), TEXTS)
    for layer in range(DEPTH):
        assert torch.equal(found[layer], wanted[layer])


def test_many_texts_run_in_batches_of_at_most_2048_tokens(model, tokenizer):
    """In one batch, a hundred texts of a hundred tokens would be ten thousand."""
    seen: list[tuple[int, ...]] = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    texts = [" ".join(["w7"] * 100)] * 30 + ["w3 w4"] * 30
    record(model, tokenizer, texts, layers=0)
    handle.remove()
    batches = [shape for shape in seen if shape != (2, 3)]
    assert sum(rows for rows, _ in batches) == 60
    assert all(rows * width <= 2048 for rows, width in batches)
    assert len(batches) <= 3


# --- the tokenizer and the model stay as they are ---------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("pad", [False, True])
def test_the_tokenizer_is_not_changed(model, pad, chat):
    tokenizer = tiny_tokenizer(pad=pad, padding_side="left", chat=True)
    tokenizer.backend_tokenizer.enable_truncation(5, strategy="only_first")
    tokenizer.backend_tokenizer.enable_padding(length=9, pad_token="</s>", pad_id=2)
    before = tokenizer.backend_tokenizer.to_str()
    fields = ("padding_side", "truncation_side", "pad_token", "pad_token_id", "model_max_length", "chat_template")
    kept = [getattr(tokenizer, name) for name in fields]
    texts = [[{"role": "user", "content": text}] for text in TEXTS] if chat else TEXTS
    found = record(model, tokenizer, texts)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert [getattr(tokenizer, name) for name in fields] == kept
    assert pad is (tokenizer.pad_token is not None)
    fresh = record(model, tiny_tokenizer(chat=True), texts)
    assert torch.equal(found[0], fresh[0]), "truncation or padding of the tokenizer reached the recording"


def test_the_tokenizer_is_not_changed_by_a_refusal_either(model):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5)
    before = tokenizer.backend_tokenizer.to_str()
    with pytest.raises(TextsError):
        record(model, tokenizer, ["w1", ""])
    assert tokenizer.backend_tokenizer.to_str() == before


def test_the_model_is_not_changed(model, tokenizer):
    model.train()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    use_cache = model.config.use_cache
    record(model, tokenizer, TEXTS)
    assert model.training
    assert model.config.use_cache is use_cache
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_are_taken_off_when_the_model_fails(model, tokenizer):
    find_decoder(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        record(model, tokenizer, TEXTS)
    handle.remove()
    assert not any(block._forward_hooks for block in model.model.layers)


def test_the_language_model_head_does_not_run(model, tokenizer):
    def fail(*_: Any) -> None:
        raise AssertionError("a vocabulary of logits was computed")

    model.lm_head.register_forward_pre_hook(fail)
    record(model, tokenizer, TEXTS)


def test_a_controller_that_is_attached_is_seen(model, tokenizer):
    added = random_addition((1,), 5.0)
    plain = record(model, tokenizer, TEXTS)
    with Controller(model, [added]):
        steered = record(model, tokenizer, TEXTS)
    assert_close(steered[1], plain[1] + 5 * added.directions[1])
    assert torch.equal(steered[0], plain[0])
    assert not torch.allclose(steered[2], plain[2], atol=0.1)


def test_amounts_per_sample_meet_their_texts_or_are_refused(model, tokenizer):
    """Texts run sorted by length: an amount must not land on another text, silently."""
    added = random_addition((1,), torch.tensor([0.0, 5.0]))
    texts = ["w1", "w2 w3 w4"]
    wanted = record(model, tokenizer, texts)[1] + torch.tensor([[0.0], [5.0]]) * added.directions[1]
    control = Controller(model, [added]).attach()
    try:
        steered = record(model, tokenizer, texts)[1]
    except SteerkitError:
        return
    finally:
        with suppress(NotReachedError):
            control.detach()
    assert_close(steered, wanted)


# --- special tokens and chat ------------------------------------------------------------------------------------------


def test_plain_text_gets_its_special_tokens(model):
    tokenizer = bos_tokenizer()
    recorded = record(model, tokenizer, ["w5 w6"])
    assert_close(recorded[2][0], by_hand(model, [1, 9, 10])[2][-1])


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(turns)]


@pytest.mark.parametrize("read", ["last", "mean"])
@pytest.mark.parametrize("turns", [("w5 w6",), ("w5 w6", "w7", "w8 w9")], ids=["one turn", "three turns"])
def test_a_conversation_that_ends_in_a_user_turn_is_read_at_the_generation_prompt(model, turns, read):
    """The template writes <s> itself: ids in full, with no second <s> in front."""
    tokenizer = bos_tokenizer(chat=True)
    ids = [1, 4, *(4 + int(word[1:]) for word in turns[0].split()), 2]
    if len(turns) == 3:
        ids += [1, 5, 11, 2, 1, 4, 12, 13, 2]
    ids += [1, 5]
    hidden = by_hand(model, ids)
    recorded = record(model, tokenizer, [chat(*turns)], read=read)
    for layer in range(DEPTH):
        assert_close(recorded[layer][0], hidden[layer][-1] if read == "last" else hidden[layer].mean(dim=0))


def test_a_conversation_that_ends_in_an_assistant_turn_is_read_at_its_last_content_token(model):
    tokenizer = bos_tokenizer(chat=True)
    recorded = record(model, tokenizer, [chat("w5 w6", "w7 w8")])
    hidden = by_hand(model, [1, 4, 9, 10, 2, 1, 5, 11, 12])
    for layer in range(DEPTH):
        assert_close(recorded[layer][0], hidden[layer][-1])


def test_a_system_turn_is_no_answer(model):
    tokenizer = bos_tokenizer(chat=True)
    messages = [{"role": "system", "content": "w3"}, {"role": "user", "content": "w4"}]
    assert_close(record(model, tokenizer, [messages])[1][0], by_hand(model, [1, 5, 7, 2, 1, 4, 8, 2, 1, 5])[1][-1])


def test_strings_and_conversations_in_one_list(model):
    tokenizer = bos_tokenizer(chat=True)
    mixed = record(model, tokenizer, ["w5 w6", chat("w5 w6"), chat("w5", "w6")])
    alone = [record(model, tokenizer, [text]) for text in ("w5 w6", chat("w5 w6"), chat("w5", "w6"))]
    assert_close(mixed[2], torch.cat([each[2] for each in alone]))
    assert len(set(mixed.digests)) == 3


def test_messages_are_not_changed(model):
    messages = [chat("w5 w6", "w7")]
    kept = copy.deepcopy(messages)
    record(model, tiny_tokenizer(chat=True), messages)
    assert messages == kept


def test_special_tokens_inside_text_are_ordinary_input(model, tokenizer):
    assert_close(record(model, tokenizer, ["w5 </s>"])[0][0], by_hand(model, [9, 2])[0][-1])


# --- wrapped models ---------------------------------------------------------------------------------------------------


def lora(model: Any, seed: int = 0) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config).eval()


# peft 0.21 asks transformers for an attribute that transformers 5.23 has renamed
renamed_by_transformers = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@renamed_by_transformers
def test_a_peft_model_is_recorded_with_its_adapter(tokenizer):
    plain = tiny_model("llama")
    wrapped = lora(tiny_model("llama"))
    recorded = record(wrapped, tokenizer, TEXTS)
    for index, text in enumerate(TEXTS):
        hidden = by_hand(wrapped, tokenizer(text)["input_ids"], blocks=wrapped.get_base_model().model.layers)
        for layer in range(DEPTH):
            assert_close(recorded[layer][index], hidden[layer][-1])
    assert not torch.allclose(recorded[1], record(plain, tokenizer, TEXTS)[1], atol=0.01)
    with wrapped.disable_adapter():
        assert_close(record(wrapped, tokenizer, TEXTS)[1], record(plain, tokenizer, TEXTS)[1])


@renamed_by_transformers
def test_a_peft_model_has_the_fingerprint_of_its_base(tokenizer):
    plain, wrapped = tiny_model("llama"), lora(tiny_model("llama"))
    first, second = (record(model, tokenizer, TEXTS[:2]).fingerprint for model in (plain, wrapped))
    assert first is not None
    assert second is not None
    first.check(second, "it")
    assert first.digest == second.digest


# --- refusals, each before the model runs -----------------------------------------------------------------------------

LONG = " ".join(["w1"] * 129)
USER = {"role": "user", "content": "w1"}

REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str, int | None]] = {
    "an empty list": ([], {}, TextsError, "at least one text", None),
    "a bare string": ("w1 w2", {}, TextsError, "must be a list of texts. Found str", None),
    "a bare message": (USER, {}, TextsError, "must be a list of texts", None),
    "None": (None, {}, TextsError, "must be a list of texts. Found NoneType", None),
    "a generator": ((text for text in TEXTS), {}, TextsError, "must be a list of texts. Found generator", None),
    "a number": (["w1", 5], {}, TextsError, "Found 5 at 1", 1),
    "None among texts": (["w1", "w2", None], {}, TextsError, "Found None at 2", 2),
    "bytes": ([b"w1"], {}, TextsError, "at 0", 0),
    "token ids": ([[1, 2, 3]], {}, TextsError, "at 0", 0),
    "messages not wrapped": ([USER, USER], {}, TextsError, "Wrap the messages", None),
    "an empty conversation": ([[USER], []], {}, TextsError, "at 1", 1),
    "a message without content": ([[{"role": "user"}]], {}, TextsError, "at 0", 0),
    "a message without role": ([[{"content": "w1"}]], {}, TextsError, "at 0", 0),
    "content that is no string": ([[{"role": "user", "content": None}]], {}, TextsError, "at 0", 0),
    "an empty text": (["w1", ""], {}, TextsError, "Found none in text 1", 1),
    "a text of spaces": (["   "], {}, TextsError, "Found none in text 0", 0),
    "a text that is too long": (["w1", LONG], {}, TextsError, "may have 128 tokens.*129 in text 1", 1),
    "a layer that does not exist": (TEXTS, {"layers": [0, 4]}, LayerError, "Layer 4 does not exist", None),
    "a layer below the first": (TEXTS, {"layers": -5}, LayerError, "Layer -5 does not exist", None),
    "no layers": (TEXTS, {"layers": []}, LayerError, "At least one layer", None),
    "a layer twice": (TEXTS, {"layers": [3, -1]}, LayerError, "Layers must differ", None),
    "a layer by name": (TEXTS, {"layers": "last"}, LayerError, "must be an integer", None),
    "another reading": (TEXTS, {"read": "first"}, TextsError, "must be 'last' or 'mean'", None),
    "batch size 0": (TEXTS, {"batch_size": 0}, TextsError, "`batch_size` must be at least 1", None),
}


@pytest.mark.parametrize(("texts", "arguments", "error", "message", "index"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_before_the_model_runs(model, texts, arguments, error, message, index):
    with forward_passes(model) as calls, pytest.raises(error, match=message) as caught:
        record(model, tiny_tokenizer(chat=True), texts, **arguments)
    assert calls == []
    if index is not None:
        assert caught.value.index == index


def test_chat_without_a_template_is_refused_before_the_model_runs(model, tokenizer):
    with forward_passes(model) as calls, pytest.raises(TextsError, match="chat template") as caught:
        record(model, tokenizer, ["w1", [USER]])
    assert calls == []
    assert caught.value.index == 1


def test_a_conversation_that_the_template_refuses_is_a_texts_error(model):
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with forward_passes(model) as calls, pytest.raises(TextsError, match="roles must alternate") as caught:
        record(model, tokenizer, ["w1", [USER]])
    assert calls == []
    assert caught.value.index == 1


def test_an_empty_assistant_turn_is_read_or_refused_but_nothing_else(model):
    with suppress(TextsError):
        recorded = record(model, tiny_tokenizer(chat=True), [chat("w5", "")])
        assert_close(recorded[1][0], by_hand(model, [1, 4, 9, 2, 1, 5])[1][-1])


def test_the_longest_text_that_fits_is_recorded(model, tokenizer):
    assert len(record(model, tokenizer, [" ".join(["w1"] * 128)], layers=0)) == 1


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), None, "gpt2"], ids=["module", "None", "name"])
def test_what_is_no_model_is_refused(thing, tokenizer):
    with pytest.raises(UnsupportedModelError, match="transformers model is required"):
        record(thing, tokenizer, TEXTS)
