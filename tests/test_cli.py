"""The command line: what it writes, what it prints, and one clear line with exit code 2 on bad input."""

import json
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from steerkit import load
from steerkit.cli import app

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, texts, and two fitted concepts."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer(chat=True).save_pretrained(folder / "model")
    words = [f"w{i} w{i + 1} w{(7 * i) % 50}" for i in range(40)]
    for side, last in (("yes", "w60"), ("no", "w61")):
        (folder / f"{side}.txt").write_text("\n".join(f"{text} {last}" for text in words))
    (folder / "yes.jsonl").write_text("\n".join(json.dumps({"text": f"{text} w60"}) for text in words))
    (folder / "broken.jsonl").write_text('{"text": "w1"}\n{"words": 3}\n')
    for name in ("warm", "plain"):
        done = run("concept", "fit", name, *options(folder), "-o", str(folder / f"{name}.safetensors"))
        assert done.exit_code == 0, done.output
    return folder


def options(folder: Path) -> list[str]:
    return [
        *("--positive", str(folder / "yes.txt"), "--negative", str(folder / "no.txt")),
        *("--model", str(folder / "model")),
    ]


def run(*words: str):
    return runner.invoke(app, list(words))


def test_fit_writes_a_concept_that_loads(folder: Path) -> None:
    assert load(folder / "warm.safetensors").name == "warm"


def test_fit_takes_json_lines_layers_and_direction(folder: Path) -> None:
    words = options(folder)
    words[1] = str(folder / "yes.jsonl")
    out = folder / "chosen.safetensors"
    done = run(
        "concept", "fit", "chosen", *words, "--layers", "1-2", "--direction", "pattern", "-o", str(out), "--json"
    )
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout)["figures"]) == ["1", "2"]
    assert load(out).direction == "pattern"


@pytest.mark.filterwarnings("ignore:No probe")
def test_fit_from_a_description(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steerkit.concepts import texts

    monkeypatch.setattr(texts, "default_requests", lambda: [f"w{i} w{i + 20}" for i in range(10)])
    out = folder / "described.safetensors"
    words = ["--describe", "w5 / w7", "--model", str(folder / "model"), "-o", str(out)]
    done = run("concept", "fit", "described", *words, "--json")
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)["made"]
    assert 3 <= made["positive"] <= 10
    assert load(out).name == "described"


def test_inspect_shows_every_layer(folder: Path) -> None:
    done = run("concept", "inspect", str(folder / "warm.safetensors"))
    assert done.exit_code == 0
    assert "Concept('warm'" in done.stdout
    figures = json.loads(run("concept", "inspect", str(folder / "warm.safetensors"), "--json").stdout)["figures"]
    assert len(figures) == 4


def test_generate_steers_each_prompt_by_its_own_amount(folder: Path) -> None:
    warm = str(folder / "warm.safetensors")
    common = ["generate", "w1 w2", "w3 w4 w5", "--model", str(folder / "model"), "--json", "--max-new-tokens", "6"]
    plain = json.loads(run(*common).stdout)
    steered = json.loads(run(*common, "--add", f"{warm}=0,30").stdout)
    assert [row["prompt"] for row in steered] == ["w1 w2", "w3 w4 w5"]
    assert plain[0]["text"] == steered[0]["text"]
    assert plain[1]["text"] != steered[1]["text"]
    assert steered[0]["mean_magnitude"]["warm"] == 0
    assert steered[1]["mean_magnitude"]["warm"] == pytest.approx(30)


def test_generate_takes_names_bands_and_chat(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    done = run(
        *("generate", "w1 w2", "--chat", "--model", "model", "--at-most", "warm=0.9", "--at-least", "warm=0.2"),
        *("--erase", "plain", "--temperature", "0.7", "--max-new-tokens", "4", "--direction", "probe"),
    )
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["concept", "inspect", "nowhere.safetensors"], "does not exist"),
        (["concept", "inspect", "yes.txt"], "safetensors"),
        (["concept", "fit", "x", "--positive", "none.txt", "--negative", "no.txt"], "none.txt"),
        (["concept", "fit", "x", "--positive", "broken.jsonl", "--negative", "no.txt"], "line 2"),
        (["concept", "fit", "x", "--positive", "yes.txt", "--negative", "no.txt", "-o", "model"], "file"),
        (["concept", "fit", "x", "--positive", "yes.txt", "--negative", "no.txt", "--layers", "a-b"], "3,5,-1"),
        (
            ["concept", "fit", "x", "--positive", "yes.txt", "--negative", "no.txt", "--layers", "40", "-m", "model"],
            "40",
        ),
        (["concept", "fit", "x", "--positive", "yes.txt"], "Found --positive"),
        (["concept", "fit", "x"], "none of them"),
        (["concept", "fit", "x", "--positive", "yes.txt", "--negative", "no.txt", "--describe", "w1"], "or --describe"),
        (["concept", "fit", " ", "--positive", "yes.txt", "--negative", "no.txt", "-m", "model"], "needs a name"),
        (["generate", "w1", "--at-most", "warm"], "NAME=NUMBER"),
        (["generate", "w1", "--at-most", "warm=2", "-m", "model"], "probability"),
        (["generate", "w1", "--at-most", "warm=0.1,0.2", "-m", "model"], "2 samples"),
        (["generate", "w1", "--at-most", "nobody=0.1", "-m", "model"], "nobody"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    folder: Path, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert says in done.stderr
    assert "Traceback" not in done.output
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("words", [[], ["concept"], ["concept", "fit"], ["concept", "inspect"], ["generate"], ["demo"]])
def test_help_shows_an_example(words: list[str]) -> None:
    done = run(*words, "--help")
    assert done.exit_code == 0
    assert words in ([], ["concept"]) or "Example" in done.stdout
