"""Every example runs from top to bottom on a tiny model, with small settings, and prints what it is about."""

import ast
import copy
import importlib.util
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LLAMA_LIKE, random_vector, seeded, tokenizer_of

from steerkit import demo
from steerkit.concepts.texts import default_requests

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))

SETTINGS: dict[str, Sequence[str]] = {
    "03_preference_vector": ("--steps", "1"),
    "04_gapo": ("0.8", "0.2", "--steps", "1"),
    "05_budget": ("--tokens", "3"),
    "10_inside_a_vector": ("--vector", "given.safetensors"),
    "14_describe": ("kind", "--requests", "8"),
}
OUTPUT = ("--output", "out")
WRITTEN: dict[str, Sequence[str]] = {
    "01_concept": ("accuracy.png", "magnitudes.png", "sentiment.safetensors"),
    "03_preference_vector": ("cautious.safetensors", "helpful.safetensors"),
    "05_budget": ("report.html",),
    "06_where": ("where.png",),
    "07_tokens": ("tokens.html", "tokens.png"),
    "08_persistence": ("persistence.png",),
    "09_vocabulary": ("lens.png", "next_token.png"),
    "10_inside_a_vector": ("inside.png", "parts.png"),
    "11_patching": ("patching.png",),
    "12_bake": ("adapter_config.json", "adapter_model.safetensors"),
}
FIGURES = r"-?[\d.]+(e-?\d+)?"
ESTIMATE = rf"{FIGURES} \[{FIGURES}, {FIGURES}\]"
PRINTED: dict[str, Sequence[str]] = {
    "01_concept": (r"layer +accuracy", r"best layer \d", r"unsteered: +['\"]", r"by layer, mean over tokens: \d+: -?\d"),
    "02_per_sample": (r"^P\(sentiment\) [01]\.\d\d: The train", r"acted on: \[(True|False)", r"token by token: \['-?0\.100', '0.087'"),
    "03_preference_vector": (r"cosine of the twins -[01]\.", r"cosine of the vectors: -?[01]\.", r"helpful -1, cautious \+0: "),
    "04_gapo": (r"plain \{.*'weight': ", r"warm \{", r"^1\.0 ['\"]"),
    "05_budget": (r"\| amount \|", rf"constant: pleasant words .*KL a token {ESTIMATE}", r"against the constant"),
    "06_where": (r"mlp, shuffled", rf"^ +0 +{ESTIMATE}", r"Control: 95 % of pairs of random directions"),
    "07_tokens": (r"^  'smile' +[01]\.\d\d #* +(0\.9\d|1\.00) #{9,10}$", r"means nothing"),
    "08_persistence": (rf"\| random \| {ESTIMATE}", rf"layer +\d: {FIGURES}"),
    "09_vocabulary": (r"\| raised \| 1 \|", r"\| all \| 0 \| \(all tokens\) \|"),
    "10_inside_a_vector": (r"effective rank \d", r"random only: kl", r"\| formality \| 0 \| random \|"),
    "11_patching": (r"patched at random", rf"\| 1 \| {ESTIMATE}"),
    "12_bake": (r"^bake: Block \d must have a bias", r"ridge inf: step", r"^merged +['\"]"),
    "13_nnsight": (r"under a Controller +set by the trace", r"^ +\d  ([01]\.\d+  .*)   \1$"),
    "14_describe": (r"'kind': \d+ \+ \d+ of \d+", r"described +[01]\.\d+ \(layer", r"\+0\.1 of the residual norm: "),
}  # fmt: skip


def words() -> list[str]:
    """Every word of the examples, the requests and the demo's texts."""
    texts = [path.read_text("utf-8") for path in EXAMPLES] + default_requests()
    texts += [text for name in ("sentiment", "formality") for side in demo.contrast_texts(name) for text in side]
    return sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})


@pytest.fixture(scope="module")
def words_tokenizer() -> Any:
    """A token a word, so that texts are short and answers have words."""
    from tokenizers import pre_tokenizers

    tokenizer = tokenizer_of(words(), pre_tokenizers.Whitespace())
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant{% endif %}"
    )
    return tokenizer


@pytest.fixture
def small(words_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A tiny model, and fewer texts, in the place of the demo's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    model = seeded(LlamaForCausalLM(LlamaConfig(**{**LLAMA_LIKE, "vocab_size": len(words_tokenizer)})), 0)
    texts, pairs = demo.contrast_texts, demo.preference_pairs

    def contrast_texts(name: str) -> tuple[list[str], list[str]]:
        """Thirty a side, and one word more that tells them apart."""
        positive, negative = (
            [f"{text} {word}" for text in side[:30]] for side, word in zip(texts(name), ("good", "bad"))
        )
        return positive, negative

    monkeypatch.setattr(demo, "load_model", lambda dtype=torch.float32: (model, words_tokenizer))
    monkeypatch.setattr(demo, "contrast_texts", contrast_texts)
    monkeypatch.setattr(demo, "preference_pairs", lambda name: pairs(name)[:12])
    return model


def plant_answers(model: Any, tokenizer: Any) -> None:
    """Let the head favour the right answers of the patching example after its clean prompts."""
    source = (FOLDER / "11_patching.py").read_text("utf-8")
    pairs = ast.literal_eval(re.findall(r"^PAIRS = (\[.*?^\])", source, flags=re.MULTILINE | re.DOTALL)[0])

    def state(prompt: str) -> torch.Tensor:
        return model.model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0, -1]

    with torch.no_grad():
        gaps = torch.stack([state(clean) - state(corrupted) for clean, corrupted, _ in pairs])
        direction = torch.linalg.lstsq(gaps, torch.ones(len(pairs), 1)).solution[:, 0]
        for side, sign in ((0, 1), (1, -1)):
            ids = tokenizer.convert_tokens_to_ids([answers[side].strip() for *_, answers in pairs])
            model.lm_head.weight[ids] = sign * direction


def test_every_example_is_numbered_and_checked() -> None:
    assert [path.stem for path in EXAMPLES] == list(PRINTED)
    assert [int(path.stem[:2]) for path in EXAMPLES] == list(range(1, len(EXAMPLES) + 1))


@pytest.mark.filterwarnings("ignore::steerkit.errors.SteerkitWarning")  # a random model's doses and probes are odd
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", PRINTED)
def test_an_example_runs_and_prints(
    name: str, small: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "13_nnsight" and importlib.util.find_spec("nnsight") is None:
        pytest.skip("nnsight is not installed")
    model, tokenizer = demo.load_model()
    if name == "11_patching":
        plant_answers(model, tokenizer)
    if name == "10_inside_a_vector":
        random_vector(model).save("given.safetensors")
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(sys, "argv", [name, *SETTINGS.get(name, ()), *OUTPUT * (name in WRITTEN)])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for expected in PRINTED[name]:
        assert re.search(expected, printed, flags=re.MULTILINE), f"{expected!r} is not in\n{printed}"
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {str(path) for path in Path().glob("*")} <= {"out", "gapo", "given.safetensors"}
    assert sorted(path.name for path in Path("out").glob("*")) == sorted(WRITTEN.get(name, ()))
