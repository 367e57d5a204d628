"""Every Python snippet of README and docs runs, in order, on a tiny model; every command and file that they name exists."""

import copy
import importlib.util
import linecache
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from datasets import Dataset
from tiny import LLAMA_LIKE, VOCABULARY, seeded, tokenizer_of

from steerkit import Concept, PolicyConfig, PreferenceVector, demo, train_policy
from steerkit.cli import app
from steerkit.evaluation.scorers import matches

ROOT = Path(__file__).parents[1]
SITE = sorted((ROOT / "docs" / "pages").glob("**/*.md"))
PAGES = [ROOT / "README.md", ROOT / "docs" / "evidence.md", *SITE]
OPTIONAL = {"guides/nnsight.md": "nnsight", "guides/control-vectors.md": "gguf"}
"""What a page needs beyond the packages that tests install."""


def page_name(page: Path) -> str:
    return page.relative_to(ROOT / "docs" / "pages" if page in SITE else ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)


def brevity(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [-float(sum(ids)) / len(ids) for ids in completion_ids]


def variety(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(set(ids))) for ids in completion_ids]


def kindness(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(text.count("e")) for text in completions]


def letters_model() -> Any:
    """A tiny llama that takes the long texts of snippets, a token a letter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return seeded(LlamaForCausalLM(LlamaConfig(**{**LLAMA_LIKE, "max_position_embeddings": 2048})), 0)


def letters_tokenizer() -> Any:
    """A token for each printable letter, so that what snippets say in plain English differs."""
    from tokenizers import Regex, decoders, pre_tokenizers

    tokenizer = tokenizer_of(map(chr, range(32, 127)), pre_tokenizers.Split(Regex("."), "isolated"))
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    assert len(tokenizer) == VOCABULARY
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'][0] }}{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>a{% endif %}"
    )
    return tokenizer


def contrast_texts(concept: str) -> tuple[list[str], list[str]]:
    """Texts whose last letter tells, for another letter the other concept."""
    words = [f"{i} {7 * i % 50}" for i in range(40)]
    yes, no = {"sentiment": "+-", "formality": "!?"}[concept]
    return [text + yes for text in words], [text + no for text in words]


def preference_pairs(name: str) -> list[dict[str, str]]:
    sign = 1 if name == "helpful" else 3
    return [{"prompt": f"{i}?", "chosen": f" {sign * i}", "rejected": f" no {i}"} for i in range(4, 24)]


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    """What pages take as given, fitted once for all of them."""
    model, tokenizer = letters_model(), letters_tokenizer()
    concepts = {}
    for name in ("sentiment", "formality"):
        positive, negative = contrast_texts(name)
        concepts[name] = Concept.fit(name, model, tokenizer, positive=positive, negative=negative)
    happy, unhappy = contrast_texts("sentiment")
    pairs = preference_pairs("helpful")
    vectors = []
    for name in ("helpful", "cautious"):
        config = PolicyConfig(max_steps=2, learning_rate=1e-3, held_out=0.2)
        policy = train_policy(model, tokenizer, preference_pairs(name), config=config).model
        vectors.append(PreferenceVector.difference(policy, model, name=name))
    prompts = ["My stay was", "The train, and", "It"]
    return {
        **concepts,
        "model": model,
        "tokenizer": tokenizer,
        "happy": happy,
        "unhappy": unhappy,
        "happy_texts": happy,
        "unhappy_texts": unhappy,
        "new_happy_texts": [f"9 {text}" for text in happy],
        "new_unhappy_texts": [f"9 {text}" for text in unhappy],
        "inputs": tokenizer(prompts, return_tensors="pt", padding=True),
        "pairs": pairs,
        "policy": policy,
        "helpful": vectors[0],
        "cautious": vectors[1],
        "brevity": brevity,
        "variety": variety,
        "prompts": Dataset.from_list([{"prompt": f"{i} {i + 1}"} for i in range(8)]),
        "openings": [f"{i} {i + 1}" for i in range(4)],
        "other_openings": [f"{i} {i + 2}" for i in range(4)],
        "others": [f"{i} {i + 3}" for i in range(4)],
        "kindness": kindness,
        "matches": matches,
        "words": r"\w",
        "torch": torch,
    }


@pytest.fixture
def names(given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of one page, in an empty folder but for the model that pages load from `path/to/model`."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = given["model"], given["tokenizer"]
    given["model"].save_pretrained("path/to/model")
    given["tokenizer"].save_pretrained("path/to/model")
    monkeypatch.setattr(demo, "load_model", lambda: (model, tokenizer))
    monkeypatch.setattr(demo, "contrast_texts", contrast_texts)
    monkeypatch.setattr(demo, "preference_pairs", preference_pairs)
    return dict(given)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore::steerkit.errors.SteerkitWarning")  # a random model's doses are odd
@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_snippets_run(page: Path, names: dict[str, Any]) -> None:
    if page_name(page) in OPTIONAL:
        pytest.importorskip(OPTIONAL[page_name(page)])
    before = copy.deepcopy(names["model"].state_dict())
    model = names["model"]
    for number, block in enumerate(blocks(page, "python")):
        name = f"{page_name(page)}[{number}]"
        # A trace of nnsight reads the lines of its own body.
        linecache.cache[name] = (len(block), None, block.splitlines(keepends=True), name)
        exec(compile(block, name, "exec"), names)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_parse(page: Path) -> None:
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["steerkit"]:
                parse(words[1:])


def parse(words: list[str]) -> None:
    """Read a command line as the application would, and run nothing."""
    command = typer.main.get_command(app)
    context = command.make_context("steerkit", list(words))
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, list(words), parent=context)


@pytest.mark.parametrize("line", ["steerkit concept fit", "steerkit generate x --at-least", "steerkit nothing"])
def test_a_wrong_command_does_not_parse(line: str) -> None:
    with pytest.raises(Exception, match=r"Missing|requires|No such"):
        parse(line.split()[1:])


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/pages/contributing.md"], ids=page_name)
def test_targets_of_make_exist(page: Path) -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(blocks(page, "sh")), flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_the_readme_starts_with_the_two_commands() -> None:
    assert [line.split()[:2] for line in blocks(ROOT / "README.md", "sh")[0].splitlines()] == [
        ["make", "demo"],
        ["make", "test"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_what_is_named_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page_name(page)} links to {target}"
    for file in re.findall(r"\b(?:benchmarks|examples|tests|docs|steerkit)/[\w/]+\.(?:py|md|json)\b", text):
        assert (ROOT / file).exists(), f"{page_name(page)} names {file}"


def test_every_benchmark_is_in_the_list_of_them() -> None:
    listed = set(re.findall(r"`(\w+\.py)`", (ROOT / "benchmarks" / "README.md").read_text("utf-8")))
    assert listed == {path.name for path in (ROOT / "benchmarks").glob("*.py")}


def test_every_public_name_is_in_the_reference() -> None:
    import steerkit

    shown = "\n".join(page.read_text("utf-8") for page in SITE if page.parent.name == "reference")
    missing = [name for name in steerkit.__all__ if not re.search(rf"^::: .*\b{name}$", shown, flags=re.MULTILINE)]
    # An error is shown with the tree that it stands in.
    assert set(missing) <= {"SteerkitError"}


def test_what_snippets_print_is_written_under_them(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("outputs", ROOT / "docs" / "outputs.py")
    assert spec is not None
    assert spec.loader is not None
    outputs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(outputs)
    page = tmp_path / "page.md"
    silent, text, html = "x = 1\nprint(0)\n", "print(x + 1)\n", "print('| a |')\n"
    div = '<div class="shown" markdown>'
    before = f"```python\n{silent}```\n\na\n\n```python\n{text}```\n\n```text\n9\n```\n\n```python\n{html}```\n\n{div}\n\n</div>\n\nb\n"
    page.write_text(before, "utf-8")
    after = before.replace("text\n9\n", "text\n2\n").replace(f"{div}\n\n", f"{div}\n\n| a |\n\n")
    for _ in range(2):
        page.write_text(outputs.run(page, {}), "utf-8")
        assert page.read_text("utf-8") == after


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    words = ["-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "docs/mkdocs.yml"), "-d", str(tmp_path)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    made = "\n".join(page.read_text("utf-8") for page in tmp_path.glob("**/*.html"))
    assert "steerkit concept fit" in made
    assert "Usage: steerkit vector merge" in made
    assert "errors   types   maths" in made
    assert "p of the norm that each gradient is divided by" in made  # what a config's field says of itself
    for address in ("fonts.googleapis", "cdn.", "unpkg.com", "jsdelivr"):
        assert address not in made, f"the site fetches from {address}"
