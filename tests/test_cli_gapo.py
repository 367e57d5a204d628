"""`steerkit gapo`: what it writes, what it prints, and one clear line with exit code 2 on bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from steerkit import PreferenceVector
from steerkit.cli import app

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

REWARDS = """
def low(completion_ids, **_):
    return [sum(i < 40 for i in ids) / len(ids) for ids in completion_ids]

def varied(completion_ids, **_):
    return [float(len(set(ids))) for ids in completion_ids]

def broken(completion_ids, **_):
    raise KeyError("score")

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer(pad=True).save_pretrained("model")
    Path("own_rewards.py").write_text(REWARDS)
    Path("prompts.txt").write_text("\n".join(f"w{i} w{i + 2}" for i in range(8)))
    return tmp_path


def run(*more: str) -> Any:
    words = ["gapo", "prompts.txt", "-m", "model", "-o", "policy", "--steps", "2", "--new-tokens", "6", "--rank", "4"]
    return CliRunner().invoke(app, [*words, *more])


BOTH = ("-r", "own_rewards:low", "-r", "own_rewards:varied")


def test_a_run_writes_an_adapter_that_becomes_a_vector(folder: Path) -> None:
    done = run(*BOTH, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["steps"] == 2
    assert set(told["objectives"]) == {"low", "varied"}
    assert told["objectives"]["low"]["weight"] > 0
    kept = json.loads((folder / "policy" / "gapo.json").read_text())
    assert sum("gapo/opposed" in row for row in kept["history"]) == 2
    vector = PreferenceVector.difference("policy", tiny_model("llama"), name="both")
    assert vector.norm() > 0


def test_a_table_tells_objectives_and_conflicts(folder: Path) -> None:
    done = run(*BOTH, "--preference", "0.7,0.3", "--exact")
    assert done.exit_code == 0, done.output
    assert "varied" in done.stdout
    assert "opposed an objective on" in done.stdout
    assert (folder / "policy" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-r", "own_rewards"), "module:function"),
        (("-r", "no_such_module:low"), "no_such_module"),
        (("-r", "own_rewards:missing"), "missing"),
        (("-r", "own_rewards:number"), "int"),
        ((*BOTH, "--preference", "0.7;0.3"), "0.7;0.3"),
        ((*BOTH, "--preference", "0.7,0.4"), "sum to 1"),
        ((*BOTH, "--preference", "0.5,0.3,0.2"), "each of 2"),
        ((*BOTH, "--power", "-1"), "at least 0"),
        ((*BOTH, "--weighting", "pareto"), "one of"),
        ((*BOTH, "--batch-size", "3", "--generations", "2"), "do not fit"),
        ((*BOTH, "-r", "own_rewards:broken"), "KeyError"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder: Path, words: tuple[str, ...], message: str) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 or "loading" in done.stderr
    assert not (folder / "policy").exists()
    assert not list(folder.glob(".steerkit.*"))


def test_an_output_that_is_taken_is_refused_before_training(folder: Path) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "kept.txt").write_text("mine")
    done = run(*BOTH)
    assert done.exit_code == 2
    assert (folder / "policy" / "kept.txt").read_text() == "mine"
