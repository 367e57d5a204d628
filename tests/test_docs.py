"""Every Python snippet of README and docs runs, in order, on a tiny model; every command that they name exists."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer

from steerkit import Concept, PolicyConfig, PreferenceVector, train_policy

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)


def brevity(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [-float(sum(ids)) / len(ids) for ids in completion_ids]


def variety(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(set(ids))) for ids in completion_ids]


def kindness(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(text.count("w6")) for text in completions]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the snippets take as given."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(pad=True, padding_side="left")
    words = [f"w{i} w{i + 1} w{(7 * i) % 50}" for i in range(40)]
    happy, unhappy = [f"{text} w60" for text in words], [f"{text} w61" for text in words]
    formality = Concept.fit(
        "formality",
        model,
        tokenizer,
        positive=[f"{text} w70 w3" for text in words],
        negative=[f"{text} w71 w3" for text in words],
    )
    pairs = [{"prompt": f"w{i} w{i + 2}", "chosen": f" w{i + 5} w8", "rejected": f" w9 w{i}"} for i in range(4, 24)]
    config = PolicyConfig(max_steps=2, learning_rate=1e-3)
    policy = train_policy(model, tokenizer, pairs, config=config).model
    inputs = tokenizer(["w4 w5 w6", "w7 w8", "w9"], return_tensors="pt", padding=True, return_token_type_ids=False)
    return {
        "model": model,
        "tokenizer": tokenizer,
        "happy_texts": happy,
        "unhappy_texts": unhappy,
        "formality": formality,
        "inputs": inputs,
        "pairs": pairs,
        "policy": policy,
        "cautious": PreferenceVector.difference(policy, model, name="cautious"),
        "new_happy_texts": [f"w3 {text}" for text in happy],
        "new_unhappy_texts": [f"w3 {text}" for text in unhappy],
        "brevity": brevity,
        "variety": variety,
        "prompts": Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(8)]),
        "openings": [f"w{i} w{i + 1}" for i in range(8)],
        "other_openings": [f"w{i} w{i + 2}" for i in range(8)],
        "kindness": kindness,
        "torch": torch,
    }


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path, names: dict[str, object]) -> None:
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}[{number}]", "exec"), names)


def test_the_readme_starts_with_the_two_commands() -> None:
    first = blocks(ROOT / "README.md", "sh")[0]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for line in first.splitlines():
        target = line.split()[1]
        assert line.startswith("make ")
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_resolve(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
