"""The vector commands: what they write, what they print, and one clear line with exit code 2 on bad input."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_vector, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from steerkit import Concept, PreferenceVector, load
from steerkit.activations import record
from steerkit.cli import app
from steerkit.preferences import policy

runner = CliRunner()
IDS = torch.tensor([[5, 9, 33, 12, 4], [7, 8, 61, 20, 3]])


def run(*words: str) -> Any:
    return runner.invoke(app, list(words))


def good(*words: str) -> Any:
    done = run(*words)
    assert done.exit_code == 0, done.output
    return done


def told(*words: str) -> Any:
    """What `--json` prints: JSON and nothing beside it."""
    return json.loads(good(*words, "--json").stdout)


def some_pairs(count: int) -> list[dict[str, str]]:
    dice = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{dice.randrange(95)}" for _ in range(dice.randint(low, high)))

    return [{"prompt": words(2, 5), "chosen": f" {words(1, 4)}", "rejected": f" {words(1, 4)}"} for _ in range(count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pairs, two vectors of it, one of another, a concept, and things that are none of those."""
    folder = tmp_path_factory.mktemp("vectors")
    for name, model in (("model", tiny_model("llama")), ("gpt2", tiny_model("gpt2"))):
        model.save_pretrained(folder / name)
        tiny_tokenizer(chat=True, pad=True).save_pretrained(folder / name)
    model = tiny_model("llama")
    model.save_pretrained(folder / "untalkative")
    tiny_tokenizer(pad=True).save_pretrained(folder / "untalkative")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, some_pairs(16))))
    (folder / "broken.jsonl").write_text('{"prompt": "w1", "chosen": " w2", "rejected": " w3"}\n{"prompt": "w1"\n')
    (folder / "short.jsonl").write_text('{"prompt": "w1", "chosen": " w2"}\n')
    (folder / "equal.jsonl").write_text('{"prompt": "w1", "chosen": " w2", "rejected": " w2"}\n')
    (folder / "nothing.jsonl").write_text("")
    random_vector(model, "kind", 1).only(layers=range(4)).save(folder / "kind.safetensors")
    random_vector(model, "brief", 2).only(layers=range(4)).save(folder / "brief.safetensors")
    random_vector(model, "wide", 3, full=True).save(folder / "wide.safetensors")
    random_vector(tiny_model("gpt2"), "foreign", 1).save(folder / "foreign.safetensors")
    random_vector(model, "low", 1).only(layers=[0]).save(folder / "low.safetensors")
    random_vector(model, "high", 1).only(layers=[3]).save(folder / "high.safetensors")
    texts = [[f"w{i} w{i + 1} w{last}" for i in range(12)] for last in (60, 61)]
    sides = [record(model, tiny_tokenizer(), each) for each in texts]
    Concept.from_activations("warm", *sides).save(folder / "warm.safetensors")
    (folder / "file.txt").write_text("no vector")
    (folder / "mine" / "towards").mkdir(parents=True)
    (folder / "mine" / "towards" / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, in the current folder, to be written in."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# train


@pytest.fixture(scope="module")
def trained(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("trained")
    done = run(
        *("vector", "train", "helpful", str(made / "pairs.jsonl"), "-o", str(out / "helpful.safetensors"), "--json"),
        *("--model", str(made / "model"), "--steps", "2", "--rank", "4", "--learning-rate", "1e-3"),
        *("--runs", str(out / "runs"), "--seed", "3"),
    )
    return out, done


def test_train_writes_a_vector_and_prints_json_alone(trained: tuple[Path, Any], made: Path) -> None:
    out, done = trained
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["vectors"][0]
    assert found["name"] == "helpful"
    assert found["made"]["settings"]["seed"] == 3
    assert found["made"]["settings"]["max_steps"] == 2
    assert found["made"]["cosine_of_twins"] < 0
    vector = load(out / "helpful.safetensors", model=tiny_model("llama"))
    assert isinstance(vector, PreferenceVector)
    assert vector.rank <= 8
    assert vector.norm() == pytest.approx(found["norm"])
    assert vector.norm() > 1e-3
    assert (out / "runs" / "towards" / "adapter_model.safetensors").exists()
    assert (out / "runs" / "away" / "adapter_model.safetensors").exists()
    assert sorted(path.name for path in out.iterdir()) == ["helpful.safetensors", "runs"]


def test_train_goes_on_from_its_runs_and_refuses_those_of_another_call(
    trained: tuple[Path, Any], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(policy, "_Trainer", never)
    out, _ = trained
    words = ["vector", "train", "helpful", str(made / "pairs.jsonl"), "-o", str(tmp_path / "again.safetensors")]
    words += ["--model", str(made / "model"), "--steps", "2", "--rank", "4", "--runs", str(out / "runs"), "--seed", "3"]
    done = good(*words, "--learning-rate", "1e-3")
    assert "helpful" in done.stdout
    assert f"wrote {tmp_path / 'again.safetensors'}" in done.stdout
    one, other = (load_file(path) for path in (out / "helpful.safetensors", tmp_path / "again.safetensors"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    refused = run(*words, "--learning-rate", "1e-2")
    assert refused.exit_code == 2
    assert "settings" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


# mix


def test_mix_adds_and_subtracts(folder: Path) -> None:
    found = told("vector", "mix", "kind=0.5", "brief.safetensors=-2", "wide=0.1", "-o", "mixed.safetensors")
    mixed = load("mixed.safetensors", model=tiny_model("llama"))
    assert isinstance(mixed, PreferenceVector)
    parts = [load(f"{name}.safetensors") for name in ("kind", "brief", "wide")]
    wanted = 0.5 * parts[0] + -2.0 * parts[1] + 0.1 * parts[2]
    assert mixed.name == found["vectors"][0]["name"] == "mixed"
    assert (mixed - wanted).norm() < 1e-5 * wanted.norm()
    assert wanted.norm() > 1


def test_mix_compresses_and_names(folder: Path) -> None:
    found = told("vector", "mix", "kind=1", "brief=1", "-o", "one.safetensors", "--rank", "1", "--name", "small")
    assert (found["vectors"][0]["rank"], found["vectors"][0]["name"]) == (1, "small")
    assert 0 < found["vectors"][0]["kept_energy"] < 1
    found = told("vector", "mix", "kind=1", "brief=1", "-o", "two.safetensors", "--energy", "0.9")
    assert 0.9 <= found["vectors"][0]["kept_energy"] < 1


# merge


def test_merge_writes_a_checkpoint(folder: Path) -> None:
    found = told("vector", "merge", "model", "--add", "kind=0.7", "--add", "brief.safetensors=-0.3", "-o", "steered")
    assert found == {
        "output": "steered",
        "vectors": [{"name": "kind", "magnitude": 0.7}, {"name": "brief", "magnitude": -0.3}],
    }
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained("steered")
    vector = 0.7 * load("kind.safetensors") + -0.3 * load("brief.safetensors")
    wanted = vector.merge_into(tiny_model("llama"))(IDS).logits
    assert (merged(IDS).logits - wanted).abs().max() < 1e-3
    assert (wanted - tiny_model("llama")(IDS).logits).abs().max() > 0.05


def test_merge_tells_of_every_vector_even_of_one_name(folder: Path) -> None:
    load("brief.safetensors").named("kind").save("other.safetensors")
    found = told("vector", "merge", "model", "--add", "kind=0.7", "--add", "other=-0.3", "-o", "steered")
    assert "0.7" in json.dumps(found)
    assert "-0.3" in json.dumps(found)


def test_merge_refuses_another_base_unless_told(folder: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained("mended")
    words = ["vector", "merge", "mended", "--add", "kind=1", "-o", "steered"]
    done = run(*words)
    assert done.exit_code == 2
    assert "check_model" in done.stderr or "no-check-model" in done.stderr
    assert not Path("steered").exists()
    good(*words, "--no-check-model")
    assert Path("steered/model.safetensors").exists()


# export


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft 0.21 with transformers 5
def test_export_writes_an_adapter_that_peft_loads(folder: Path) -> None:
    from peft import PeftModel

    found = told("vector", "export", "kind", "-o", "adapter", "--magnitude", "0.5")
    assert found == {"output": "adapter", "relative_error": 0.0}
    loaded = PeftModel.from_pretrained(tiny_model("llama"), "adapter")
    wanted = load("kind.safetensors").merge_into(tiny_model("llama"), 0.5)(IDS).logits
    assert (loaded(IDS).logits - wanted).abs().max() < 1e-3
    assert 0 < told("vector", "export", "kind", "-o", "thin", "--rank", "1")["relative_error"] < 1
    assert json.loads(Path("thin/adapter_config.json").read_text())["r"] == 1


# inspect


def test_inspect_shows_vectors_and_how_they_lie(folder: Path) -> None:
    one = told("vector", "inspect", "kind")
    assert one["cosines"] == []
    assert one["interference"] is None
    assert one["vectors"][0]["layers"] == [0, 1, 2, 3]
    two = told("vector", "inspect", "kind.safetensors", "brief")
    assert [each["name"] for each in two["vectors"]] == ["kind", "brief"]
    assert two["cosines"][0][0] == pytest.approx(1)
    assert two["cosines"][0][1] == pytest.approx(load("kind.safetensors").cosine(load("brief.safetensors")))
    assert two["interference"] > 0
    shown = good("vector", "inspect", "kind", "brief").stdout
    assert "kind" in shown
    assert "interference" in shown


def test_inspect_shows_what_training_found(trained: tuple[Path, Any]) -> None:
    shown = good("vector", "inspect", str(trained[0] / "helpful.safetensors")).stdout
    assert "held-out accuracy" in shown
    assert "cosine of the twins" in shown
    assert "-0." in shown


def test_inspect_shows_vectors_that_share_no_matrix(folder: Path) -> None:
    """They do not interfere; that is no mistake of the caller's."""
    found = told("vector", "inspect", "low", "high")
    assert found["cosines"][0][1] == 0
    assert found["interference"] in (0, None)


def test_inspect_shows_a_vector_of_magnitude_0(folder: Path) -> None:
    good("vector", "mix", "kind=0", "-o", "nil.safetensors")
    assert told("vector", "inspect", "nil")["vectors"][0]["norm"] == 0


# generate


def test_generate_adds_a_vector_to_each_prompt_by_its_own_magnitude(folder: Path) -> None:
    common = ["generate", "w1 w2", "w1 w2", "--model", "model", "--max-new-tokens", "6"]
    plain = told(*common)
    steered = told(*common, "--add", "kind=3,0")
    assert plain[0]["text"] == plain[1]["text"] == steered[1]["text"]
    assert steered[0]["text"] != plain[0]["text"]
    assert [row["mean_magnitude"]["kind"] for row in steered] == [3, 0]
    merged = load("kind.safetensors").merge_into(tiny_model("llama"), 3.0)
    merged.save_pretrained("merged")
    tiny_tokenizer(chat=True, pad=True).save_pretrained("merged")
    alone = told("generate", "w1 w2", "--model", "merged", "--max-new-tokens", "6")
    assert alone[0]["text"] == steered[0]["text"]


def test_generate_takes_vectors_and_concepts_together(folder: Path) -> None:
    shown = good(
        *("generate", "w1 w2", "w3", "--model", "model", "--max-new-tokens", "3", "--chat"),
        *("--add", "kind=0.5", "--add", "brief=1,-1", "--at-most", "warm=0.2", "--add", "warm=1"),
    ).stdout
    assert "kind" in shown
    assert "brief" in shown


# Mistakes.

BAD: list[tuple[list[str], str]] = [
    (["vector", "train", "x", "none.jsonl", "-m", "model"], "none.jsonl"),
    (["vector", "train", "x", "file.txt", "-m", "model"], "file.txt"),
    (["vector", "train", "x", "broken.jsonl", "-m", "model"], "JSON"),
    (["vector", "train", "x", "short.jsonl", "-m", "model"], "rejected"),
    (["vector", "train", "x", "equal.jsonl", "-m", "model"], "differ"),
    (["vector", "train", "x", "nothing.jsonl", "-m", "model"], "at least one"),
    (["vector", "train", "x", "pairs.jsonl", "-m", "model", "-o", "gpt2"], "gpt2"),
    (["vector", "train", "x", "pairs.jsonl", "-m", "model", "-o", "no/x.safetensors"], "no/x"),
    (["vector", "train", "x", "pairs.jsonl", "-m", "nowhere"], "nowhere"),
    (["vector", "train", "x", "pairs.jsonl", "-m", "model", "--runs", "mine"], "mine"),
    (["vector", "train", "x", "pairs.jsonl", "-m", "untalkative", "--chat", "--steps", "1"], "template"),
    (["vector", "train", "x", "pairs.jsonl", "-m", "model", "--max-length", "2", "--steps", "1"], "max"),
    (["vector", "train", "", "pairs.jsonl", "-m", "model", "--steps", "1", "-o", "x.safetensors"], "name"),
    (["vector", "mix", "kind", "-o", "m.safetensors"], "NAME=NUMBER"),
    (["vector", "mix", "kind=a", "-o", "m.safetensors"], "NAME=NUMBER"),
    (["vector", "mix", "kind=nan", "-o", "m.safetensors"], "finite"),
    (["vector", "mix", "kind=1,2", "-o", "m.safetensors"], "one magnitude"),
    (["vector", "mix", "none=1", "-o", "m.safetensors"], "none.safetensors"),
    (["vector", "mix", "file.txt=1", "-o", "m.safetensors"], "file.txt"),
    (["vector", "mix", "warm=1", "-o", "m.safetensors"], "Concept"),
    (["vector", "mix", "kind=1", "foreign=1", "-o", "m.safetensors"], "base model"),
    (["vector", "mix", "kind=1", "-o", "no/m.safetensors"], "no"),
    (["vector", "mix", "kind=1", "-o", "model"], "model"),
    (["vector", "mix", "kind=1", "-o", "m.safetensors", "--energy", "2"], "energy"),
    (["vector", "mix", "kind=1", "-o", "m.safetensors", "--energy", "0.5", "--rank", "1"], "rank"),
    (["vector", "merge", "nowhere", "--add", "kind=1", "-o", "out"], "nowhere"),
    (["vector", "merge", "file.txt", "--add", "kind=1", "-o", "out"], "file.txt"),
    (["vector", "merge", "model", "--add", "kind=inf", "-o", "out"], "finite"),
    (["vector", "merge", "model", "--add", "kind=1", "-o", "gpt2"], "empty"),
    (["vector", "merge", "model", "--add", "kind=1", "-o", "no/out"], "must exist"),
    (["vector", "merge", "model", "--add", "foreign=1", "-o", "out"], "base model"),
    (["vector", "merge", "model", "--add", "kind", "-o", "out"], "NAME=NUMBER"),
    (["vector", "merge", "model", "--add", "warm=1", "-o", "out"], "Concept"),
    (["vector", "export", "nowhere", "-o", "out"], "nowhere"),
    (["vector", "export", "warm", "-o", "out"], "Concept"),
    (["vector", "export", "wide", "-o", "out"], "LoRA"),
    (["vector", "export", "kind", "-o", "model"], "empty"),
    (["vector", "export", "kind", "-o", "out", "--magnitude", "nan"], "finite"),
    (["vector", "inspect", "nowhere"], "nowhere"),
    (["vector", "inspect", "warm"], "Concept"),
    (["vector", "inspect", "kind", "foreign"], "base model"),
    (["generate", "w1", "--at-most", "kind=0.1", "-m", "model"], "concept"),
    (["generate", "w1", "--erase", "kind", "-m", "model"], "concept"),
    (["generate", "w1", "--add", "foreign=1", "-m", "model"], "base model"),
    (["generate", "w1", "--add", "kind=1,2", "-m", "model"], "2 samples"),
    (["generate", "w1", "--add", "kind=nan", "-m", "model"], "finite"),
]


def state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("words", "says"), BAD, ids=lambda given: " ".join(given)[:60] if isinstance(given, list) else ""
)
def test_bad_input_is_one_line_and_exit_code_two(
    made: Path, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    before = state(made)
    done = run(*words)
    after = state(made)
    for path in set(after) - set(before):  # the next test finds the folder as it was
        (made / path).unlink()
    assert after == before
    assert done.exit_code == 2, done.output + repr(done.exception)
    assert len(done.stderr.strip().splitlines()) == 1
    assert says in done.stderr
    assert done.stdout == ""


def test_a_term_of_mix_is_not_called_an_option(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--mix` does not exist, so nobody should be told to write it."""
    monkeypatch.chdir(made)
    assert "--mix" not in run("vector", "mix", "kind", "-o", "m.safetensors").stderr


@pytest.mark.parametrize("words", [["merge", "model", "-o", "out"], ["mix", "-o", "x"], ["train", "x"], ["inspect"]])
def test_missing_arguments_are_exit_code_two(made: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    assert run("vector", *words).exit_code == 2


def test_ctrl_c_leaves_nothing_half_written(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steerkit.preferences import checkpoints

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(made)
    monkeypatch.setattr(checkpoints, "_write_sum", stop)
    before = sorted(made.rglob("*"))
    done = run("vector", "merge", "model", "--add", "kind=1", "-o", "out")
    assert done.exit_code == 130
    assert sorted(made.rglob("*")) == before


@pytest.mark.parametrize("words", [[], ["train"], ["mix"], ["merge"], ["export"], ["inspect"]])
def test_help_shows_an_example(words: list[str]) -> None:
    done = good("vector", *words, "--help")
    assert not words or "Example" in done.stdout
