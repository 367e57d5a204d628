"""Artefacts in Hugging Face style: folders, cards, what is uploaded, what is fetched; a local folder stands for the hub."""

import dataclasses
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, RepoUrl
from huggingface_hub.errors import HfHubHTTPError
from tiny import D_MODEL, LLAMA_LIKE, random_vector, tiny_model, tiny_tokenizer

from steerkit import Concept, Controller, PreferenceVector, load, record, storage
from steerkit.activations import Activations
from steerkit.errors import ArtefactError, BaseModelMismatchError, SteerkitWarning
from steerkit.hub import CARD, FILE
from steerkit.model import Fingerprint

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def concept() -> Concept:
    both = record(tiny_model("llama"), tiny_tokenizer(), [f"w{i} w{2 * i}" for i in range(24)], layers=[0, 1, 3])
    sides = [
        dataclasses.replace(both, states={k: both[k][rows] + by for k in both.layers}, digests=both.digests[rows])
        for rows, by in ((slice(0, 12), 2.0), (slice(12, None), -2.0))
    ]
    return Concept.from_activations("liked", *sides, direction="probe", seed=5)


@pytest.fixture(scope="module")
def vector() -> PreferenceVector:
    figures = {"first_loss": 0.693, "steps": 40, "pairs": 50, "accuracy": 0.92, "margin": 1.25, "length_only": 0.6}
    made = {
        "pairs": 281,
        "digest": "0123abcd",
        "settings": {"learning_rate": 5e-4, "lora_r": 16},
        "cosine_of_twins": -0.83,
        "towards_figures": figures,
        "away_figures": {**figures, "pairs": 0},
    }
    return dataclasses.replace(random_vector(tiny_model("llama")), made=made)


@pytest.fixture(params=["concept", "vector"])
def artefact(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


class Hub:
    """Stands for `huggingface_hub.HfApi`: keeps repositories in a folder and notes every call."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls, self.opened = root, [], []
        self.error: Exception | None = None

    def __call__(self, **given: Any) -> "Hub":
        self.opened.append(given)
        return self

    def _note(self, name: str, **given: Any) -> None:
        self.calls.append((name, given))
        if self.error is not None:
            raise self.error

    def create_repo(self, repo_id: str, **given: Any) -> RepoUrl:
        self._note("create_repo", repo_id=repo_id, **given)
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.root / full).mkdir(parents=True, exist_ok=True)
        return RepoUrl(f"https://huggingface.co/{full}")

    def file_exists(self, repo_id: str, filename: str) -> bool:
        return (self.root / repo_id / filename).exists()

    def upload_folder(self, *, repo_id: str, folder_path: Any, ignore_patterns: Any, **given: Any) -> None:
        files = sorted(file.name for file in Path(folder_path).iterdir() if file.name not in (ignore_patterns or ()))
        self._note("upload_folder", repo_id=repo_id, files=files, **given)
        for file in files:
            shutil.copy(Path(folder_path) / file, self.root / repo_id / file)

    def hf_hub_download(self, repo_id: str, filename: str) -> str:
        self._note("hf_hub_download", repo_id=repo_id, filename=filename)
        return str(self.root / repo_id / filename)


@pytest.fixture(autouse=True)
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path_factory.mktemp("hub"))
    monkeypatch.setattr("huggingface_hub.HfApi", found)
    return found


def same(first: Any, second: Any, place: Path) -> bool:
    blobs = []
    for each in (first, second):
        each.save(place / "compared")
        blobs.append((place / "compared").read_bytes())
    return type(first) is type(second) and blobs[0] == blobs[1]


def front(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


# Folders.


def test_a_folder_holds_the_file_and_the_card_and_comes_back(artefact, tmp_path):
    artefact.save_pretrained(tmp_path / "mine")
    assert sorted(file.name for file in (tmp_path / "mine").iterdir()) == [CARD, FILE]
    artefact.save(tmp_path / "file")
    assert (tmp_path / "mine" / FILE).read_bytes() == (tmp_path / "file").read_bytes()
    for source in (tmp_path / "mine", str(tmp_path / "mine"), tmp_path / "file", tmp_path / "mine" / FILE):
        assert same(type(artefact).from_pretrained(source), artefact, tmp_path)
        assert same(load(source), artefact, tmp_path)


def test_what_is_loaded_steers_as_what_was_saved(artefact, tmp_path):
    model = tiny_model("llama")
    artefact.save_pretrained(tmp_path / "mine")

    def logits(used: Any) -> Any:
        with torch.no_grad(), Controller(model, [used.add(1.5)]):
            return model(input_ids=IDS).logits

    assert torch.equal(logits(type(artefact).from_pretrained(tmp_path / "mine", model=model)), logits(artefact))


def test_another_base_model_is_refused(artefact, tmp_path):
    artefact.save_pretrained(tmp_path / "mine")
    other = tiny_model("qwen2")
    for loader in (type(artefact).from_pretrained, load):
        with pytest.raises(BaseModelMismatchError, match=repr(artefact.name)):
            loader(tmp_path / "mine", model=other)
        with pytest.raises(BaseModelMismatchError):
            loader(tmp_path / "mine", model=deeper(), check_model=False)
        adopted = loader(tmp_path / "mine", model=other, check_model=False)
        assert adopted.fingerprint.digest == Fingerprint.of(other).digest


def deeper() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**LLAMA_LIKE, "num_hidden_layers": 5})).eval()


def test_the_other_kind_is_refused(concept, vector, tmp_path):
    concept.save_pretrained(tmp_path / "concept")
    vector.save_pretrained(tmp_path / "vector")
    Activations({0: torch.ones(2, D_MODEL)}, "last", None, ("a", "b")).save(tmp_path / "states")
    for cls, path, words in (
        (PreferenceVector, "concept", "Found 'concept'. Use Concept.from_pretrained"),
        (Concept, "vector", "Found 'preference_vector'. Use PreferenceVector.from_pretrained"),
        (Concept, "states", "Found 'activations'. Use load"),
    ):
        with pytest.raises(ArtefactError, match=re.escape(words)):
            cls.from_pretrained(tmp_path / path)


def test_a_folder_that_is_not_empty_is_kept(artefact, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / CARD).write_text("my own words")
    with pytest.raises(ArtefactError, match="An empty or new folder is required"):
        artefact.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / CARD).read_text() == "my own words"
    with pytest.raises(ArtefactError, match="must exist"):
        artefact.save_pretrained(tmp_path / "none" / "mine")


def test_a_failed_write_leaves_nothing(artefact, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ArtefactError, match="No space left"):
        artefact.save_pretrained(tmp_path / "mine")
    assert not list(tmp_path.iterdir())


def test_paths_that_hold_nothing(tmp_path, hub):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match="Found the folder"):
        Concept.from_pretrained(tmp_path / "empty")
    for missing in (tmp_path / "user" / "name", Path("user/name"), "./user/name", "../name", "/name", "name", "a/b/c"):
        with pytest.raises(ArtefactError, match="does not exist"):
            Concept.from_pretrained(missing)
    for mistyped in ("runs/liked.safetensors", "", "n" * 300, "a\0/b"):
        with pytest.raises(ArtefactError):
            load(mistyped)
    assert not hub.calls, "a path asks nothing of the network"


# Cards.


def test_front_matter_is_what_the_hub_reads(artefact, tmp_path):
    artefact.save_pretrained(tmp_path / "mine")
    text = (tmp_path / "mine" / CARD).read_text("utf-8")
    tag = "activation-steering" if isinstance(artefact, Concept) else "preference-vector"
    assert front(text) == {"library_name": "steerkit", "tags": ["steerkit", tag]}, (
        "no hub id, no base_model, no licence"
    )
    hosted = dataclasses.replace(
        artefact, fingerprint=dataclasses.replace(artefact.fingerprint, name="org/Model-1.5_b")
    )
    hosted.save_pretrained(tmp_path / "hosted")
    data = ModelCard((tmp_path / "hosted" / CARD).read_text("utf-8")).data.to_dict()
    assert data == {**front(text), "base_model": "org/Model-1.5_b", "base_model_relation": "adapter"}


def test_a_base_model_in_a_folder_is_no_link(concept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    local = dataclasses.replace(concept, fingerprint=dataclasses.replace(concept.fingerprint, name="runs/base"))
    local.save_pretrained("mine")
    assert "base_model" not in front((tmp_path / "mine" / CARD).read_text("utf-8"))


def test_a_concepts_card_has_its_figures_by_layer(concept, tmp_path):
    concept.save_pretrained(tmp_path / "mine")
    text = (tmp_path / "mine" / CARD).read_text("utf-8")
    assert "# liked\n" in text
    rows = re.findall(
        r"^\| (\**)(\d+)\1( \*)? \| (.*?) \[(.*?), (.*?)\] \| (.*?) \[(.*?), (.*?)\] \| (.*?) \|$", text, re.M
    )
    assert [int(row[1]) for row in rows] == list(concept.layers)
    for bold, layer, star, *cells in rows:
        figures = concept.figures[int(layer)]
        assert (bold == "**", star == " *") == (
            int(layer) == concept.best_layer,
            int(layer) in concept.steering_layers,
        )
        expected = [figures.accuracy, *figures.accuracy_interval, figures.auc, *figures.auc_interval]
        assert [float(cell) for cell in cells] == pytest.approx([*expected, figures.calibration_error], abs=6e-4)
    for fact in (
        "layers: `0..1, 3`",
        "positive: `12`",
        "negative: `12`",
        "seed: `5`",
        f"digest: `{concept.made['digest']}`",
        "moves along: `probe`",
        f"fingerprint `{concept.fingerprint.digest}`",
        f"4 decoder blocks of width {D_MODEL}",
    ):
        assert fact in text
    assert "regularisation" not in text, "what is None is not told"
    assert "cannot be told from chance" not in text


def test_a_concept_at_chance_says_so(concept, tmp_path):
    dull = {k: dataclasses.replace(f, accuracy=0.55, accuracy_interval=(0.4, 0.7)) for k, f in concept.figures.items()}
    dataclasses.replace(concept, figures=dull).save_pretrained(tmp_path / "mine")
    assert "cannot be told from chance" in (tmp_path / "mine" / CARD).read_text("utf-8")


def test_a_vectors_card_has_its_twins_figures(vector, tmp_path):
    vector.save_pretrained(tmp_path / "mine")
    text = (tmp_path / "mine" / CARD).read_text("utf-8")
    # Wilson's interval of 46 of 50, from the usual tables.
    assert "| towards | 50 | 0.920 [0.812, 0.968] | 1.25 | 0.600 |" in text
    assert "| away" not in text, "no held-out pairs, no row"
    for fact in (
        "pairs: `281`",
        "settings: `learning_rate=0.0005, lora_r=16`",
        "cosine_of_twins: `-0.83`",
        f"rank: `{vector.rank}`",
    ):
        assert fact in text


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"towards_figures": "none", "sum": [{}, {}]},
        {"towards_figures": {"pairs": 5}},
        {"towards_figures": {"pairs": 5, "accuracy": 80, "margin": 1, "length_only": 0.5}},
        {"towards_figures": {"pairs": -5, "accuracy": 0.8, "margin": "x", "length_only": 0.5}},
        {"note": ["a", {"b": 1}], "deep": {"c": {"d": 2.0}}, "flag": True, "none": None},
    ],
)
def test_whatever_was_noted_of_a_vector_makes_a_card(vector, tmp_path, made):
    dataclasses.replace(vector, made=made, fingerprint=None).save_pretrained(tmp_path / "mine")
    text = (tmp_path / "mine" / CARD).read_text("utf-8")
    assert "None were recorded." in text
    assert "is not recorded" in text


def test_names_and_notes_stay_on_their_line(vector, concept, tmp_path):
    odd = 'a"b\n---\nlicense: mit\n```'
    fingerprint = dataclasses.replace(vector.fingerprint, name=odd)
    changed = [
        dataclasses.replace(vector, name=odd, made={odd: odd}, fingerprint=fingerprint),
        dataclasses.replace(concept, name=odd, made={"held_out": 5, "towards": [odd]}, fingerprint=fingerprint),
    ]
    for index, each in enumerate(changed):
        each.save_pretrained(tmp_path / str(index))
        text = (tmp_path / str(index) / CARD).read_text("utf-8")
        assert set(front(text)) == {"library_name", "tags"}
        assert "\nlicense" not in text
        assert text.count("\n---\n") == 1
        assert len(re.findall(r"^```", text, re.M)) == 2
        assert {line.count("`") for line in text.splitlines() if line.startswith("- ") and ": `" in line} == {2}
        compile(snippet(text), "snippet", "exec")


def snippet(text: str) -> str:
    [code] = re.findall(r"^```python\n(.*?)^```$", text, re.S | re.M)
    return code


def test_the_snippet_of_a_card_runs(artefact, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    artefact.save_pretrained("mine")
    model, asked = tiny_model("llama"), []

    def give(thing: Any) -> Any:
        return lambda name: asked.append(name) or thing

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", give(model))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", give(tiny_tokenizer()))
    namespace: dict[str, Any] = {}
    exec(snippet((tmp_path / "mine" / CARD).read_text("utf-8")), namespace)
    assert asked == [artefact.fingerprint.name] * 2
    assert capsys.readouterr().out.strip()
    loaded = namespace["concept" if isinstance(artefact, Concept) else "vector"]
    assert same(loaded, artefact, tmp_path)


# The hub.


def test_what_is_uploaded(artefact, hub, tmp_path):
    assert artefact.push_to_hub("mine", private=True, token="secret") == "https://huggingface.co/me/mine"
    [opened] = hub.opened
    assert opened == {"token": "secret", "library_name": "steerkit", "library_version": storage.package_version()}
    name = type(artefact).__name__
    assert hub.calls == [
        ("create_repo", {"repo_id": "mine", "private": True, "exist_ok": True}),
        (
            "upload_folder",
            {"repo_id": "me/mine", "files": [CARD, FILE], "commit_message": f"Upload {name} with steerkit"},
        ),
    ]
    artefact.save(tmp_path / "file")
    assert (hub.root / "me/mine" / FILE).read_bytes() == (tmp_path / "file").read_bytes()
    text = (hub.root / "me/mine" / CARD).read_text("utf-8")
    assert f'{name}.from_pretrained("me/mine", model=model)' in text
    assert "secret" not in text


def test_a_card_on_the_hub_is_kept(concept, vector, hub):
    concept.push_to_hub("me/mine")
    (hub.root / "me/mine" / CARD).write_text("license: mine")
    with pytest.warns(SteerkitWarning, match="me/mine has a model card, which was kept"):
        vector.push_to_hub("me/mine")
    assert hub.calls[-1][1]["files"] == [FILE]
    assert (hub.root / "me/mine" / CARD).read_text() == "license: mine"
    assert PreferenceVector.from_pretrained("me/mine").name == vector.name


def test_what_is_fetched(artefact, hub, tmp_path):
    artefact.push_to_hub("user/mine")

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    for name in ("model.bin", "config.py", "weights.pkl"):
        (hub.root / "user/mine" / name).write_bytes(pickle.dumps(Bomb()))
    model = tiny_model("llama")
    for loader in (type(artefact).from_pretrained, load):
        hub.calls.clear()
        assert same(loader("user/mine", model=model), artefact, tmp_path)
        assert hub.calls == [("hf_hub_download", {"repo_id": "user/mine", "filename": FILE})]
    (hub.root / "user/mine" / FILE).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ArtefactError, match="never opened"):
        load("user/mine")
    assert not (tmp_path / "executed").exists()


def test_a_folder_here_goes_before_the_hub(concept, vector, hub, tmp_path, monkeypatch):
    vector.push_to_hub("user/mine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    concept.save_pretrained("user/mine")
    hub.calls.clear()
    assert isinstance(load("user/mine"), Concept)
    assert not hub.calls


def test_failures_of_the_hub_are_told(concept, hub):
    import httpx

    request = httpx.Request("GET", "https://hub")
    for error in (
        HfHubHTTPError("401 Client Error.\nlong\ntrace", response=httpx.Response(401, request=request)),
        httpx.ConnectError("no route"),
        ValueError("Repo id must be in the form"),
        OSError("offline"),
    ):
        hub.error = error
        with pytest.raises(ArtefactError, match="hub repository that you may write to") as pushed:
            concept.push_to_hub("user/mine", token="secret")
        with pytest.raises(ArtefactError, match="must be a file, a folder, or a hub repository") as loaded:
            Concept.from_pretrained("user/mine")
        for caught in (pushed, loaded):
            assert "'user/mine'" in str(caught.value)
            assert str(error).splitlines()[0] in str(caught.value)
            assert "\n" not in str(caught.value)
            assert "secret" not in str(caught.value)
            assert caught.value.__cause__ is error


def test_an_artefact_that_cannot_be_stored_is_no_failure_of_the_hub(concept, hub):
    with pytest.raises(ArtefactError, match="header must be JSON"):
        dataclasses.replace(concept, made={"held_out": float("nan")}).push_to_hub("user/mine")
    assert not hub.calls, "no empty repository is left behind"


def test_an_interrupt_is_no_failure_of_the_hub(concept, hub):
    hub.error = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        concept.push_to_hub("user/mine")


def test_the_card_of_a_saved_file_says_what_the_file_says(artefact, tmp_path):
    artefact.save_pretrained(tmp_path / "mine")
    again = type(artefact).from_pretrained(tmp_path / "mine")
    again.save_pretrained(tmp_path / "again")
    cards = [(tmp_path / name / CARD).read_text("utf-8") for name in ("mine", "again")]
    assert cards[0].replace(json.dumps("mine"), json.dumps("again")) == cards[1]
