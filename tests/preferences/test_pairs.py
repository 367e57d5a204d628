"""Preference pairs: every form they come in, every way they can be wrong, the swap, the split and the length baseline."""

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_tokenizer

from steerkit import PolicyConfig, train_policy
from steerkit.errors import PairsError, SteerkitError
from steerkit.preferences import policy
from steerkit.preferences.pairs import digest, length_only_accuracy, read_pairs, split, swapped

PLAIN: list[dict[str, Any]] = [
    {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4 w5"},
    {"prompt": "w1 w2", "chosen": " w6", "rejected": " w7"},
    {"prompt": "w8", "chosen": " w9 w10 w11", "rejected": " w9 w10 w12"},
]


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


CHAT: list[dict[str, Any]] = [
    {
        "prompt": [said("system", "w9"), said("user", row["prompt"])],
        "chosen": [said("assistant", row["chosen"])],
        "rejected": [said("assistant", row["rejected"])],
    }
    for row in PLAIN
]


def in_file(rows: list[dict[str, Any]], folder: Path, kind: str) -> Path:
    file = folder / f"pairs.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", "utf-8")
    else:
        Dataset.from_list(rows).to_parquet(str(file))
    return file


FORMS: dict[str, Callable[[list[dict[str, Any]], Path], Any]] = {
    "list": lambda rows, folder: rows,
    "tuple": lambda rows, folder: tuple(rows),
    "generator": lambda rows, folder: (row for row in rows),
    "dataset": lambda rows, folder: Dataset.from_list(rows),
    "jsonl": lambda rows, folder: in_file(rows, folder, "jsonl"),
    "jsonl as text": lambda rows, folder: str(in_file(rows, folder, "jsonl")),
    "parquet": lambda rows, folder: in_file(rows, folder, "parquet"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [PLAIN, CHAT], ids=["plain", "conversations"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_the_same(form: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    before = copy.deepcopy(rows)
    read = read_pairs(FORMS[form](rows, tmp_path))
    assert read == before == rows
    assert all(type(pair) is dict and list(pair) == ["prompt", "chosen", "rejected"] for pair in read)
    assert digest(read) == digest(read_pairs(rows))


def test_string_answers_to_messages_become_one_assistant_message() -> None:
    mixed = [{**pair, "chosen": pair["chosen"][0]["content"]} for pair in CHAT]
    assert read_pairs(mixed) == CHAT


def test_other_columns_and_keys_of_messages_are_left_out() -> None:
    rows = [
        {**row, "margin": 3, "prompt": [{**m, "name": None, "tool_calls": None} for m in row["prompt"]]} for row in CHAT
    ]
    assert read_pairs(rows) == CHAT


def test_pairs_are_copies() -> None:
    rows = copy.deepcopy(CHAT)
    read = read_pairs(rows)
    read[0]["prompt"][0]["content"] = "changed"
    read[1]["chosen"].append(said("user", "more"))
    assert rows == CHAT


@pytest.mark.parametrize("between", ["\u2028", "\u2029", "\x85"])
def test_json_lines_end_at_newlines_alone(between: str, tmp_path: Path) -> None:
    """JSON allows U+2028 and its like inside of strings; they end no line of a JSON-lines file."""
    rows = [{"prompt": f"w1{between}w2", "chosen": " w3", "rejected": " w4"}]
    text = json.dumps(rows[0], ensure_ascii=False)
    (tmp_path / "pairs.jsonl").write_text(text + "\n", "utf-8")
    assert read_pairs(tmp_path / "pairs.jsonl") == rows


def test_windows_line_ends_and_empty_lines(tmp_path: Path) -> None:
    lines = "\r\n\r\n".join(json.dumps(row) for row in PLAIN)
    (tmp_path / "pairs.jsonl").write_bytes(b"\r\n" + lines.encode() + b"\r\n\r\n")
    assert read_pairs(tmp_path / "pairs.jsonl") == PLAIN


def without(column: str) -> dict[str, Any]:
    return {key: value for key, value in PLAIN[0].items() if key != column}


GOOD = PLAIN[0]
BAD: dict[str, Any] = {
    "no prompt": without("prompt"),
    "no chosen": without("chosen"),
    "no rejected": without("rejected"),
    "prompt is None": {**GOOD, "prompt": None},
    "chosen is None": {**GOOD, "chosen": None},
    "rejected is None": {**GOOD, "rejected": None},
    "empty prompt": {**GOOD, "prompt": ""},
    "empty chosen": {**GOOD, "chosen": ""},
    "rejected is space": {**GOOD, "rejected": " \n\t"},
    "equal answers": {**GOOD, "rejected": GOOD["chosen"]},
    "prompt is a number": {**GOOD, "prompt": 3},
    "chosen is a number": {**GOOD, "chosen": 3.5},
    "chosen is bytes": {**GOOD, "chosen": b"w3"},
    "prompt is bytes": {**GOOD, "prompt": b"w3"},
    "chosen is a list of strings": {**GOOD, "chosen": ["w3"]},
    "messages after a plain prompt": {**GOOD, "chosen": [said("assistant", "w3")]},
    "empty conversation": {**CHAT[0], "prompt": []},
    "empty answer of messages": {**CHAT[0], "chosen": []},
    "one message and no list": {**CHAT[0], "prompt": said("user", "w1")},
    "a message without a role": {**CHAT[0], "prompt": [{"content": "w1"}]},
    "a message without content": {**CHAT[0], "chosen": [{"role": "assistant"}]},
    "a message whose content is None": {**CHAT[0], "chosen": [{"role": "assistant", "content": None}]},
    "a message whose content is parts": {**CHAT[0], "prompt": [{"role": "user", "content": [{"type": "text"}]}]},
    "a message whose role is a number": {**CHAT[0], "prompt": [{"role": 1, "content": "w1"}]},
    "a message that is a string": {**CHAT[0], "rejected": ["w1"]},
    "an empty last message": {**CHAT[0], "rejected": [said("assistant", "  ")]},
    "equal conversations": {**CHAT[0], "rejected": CHAT[0]["chosen"]},
    "equal, as string and as message": {**CHAT[0], "rejected": CHAT[0]["chosen"][0]["content"]},
    "a string": "w1",
    "None": None,
    "a list": ["w1", " w2", " w3"],
    "a number": 7,
}


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("training was set up for bad pairs")

    monkeypatch.setattr(policy, "_Trainer", never)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_pair_is_named_by_its_index(bad: str) -> None:
    chat = BAD[bad] is not None and isinstance(BAD[bad], dict) and not isinstance(BAD[bad].get("prompt"), str)
    good = CHAT if chat else PLAIN
    rows = [good[0], good[1], BAD[bad], good[2]]
    with pytest.raises(PairsError) as caught:
        read_pairs(rows)
    assert caught.value.index == 2  # type: ignore[attr-defined]
    assert "2" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", ["no chosen", "rejected is None", "empty prompt", "equal answers", "a number"])
def test_nothing_is_trained_or_written_for_bad_pairs(bad: str, tmp_path: Path, no_training: None) -> None:
    with pytest.raises(PairsError):
        train_policy(
            tiny_model("llama"),
            tiny_tokenizer(pad=True),
            [*PLAIN, BAD[bad]],
            config=PolicyConfig(max_steps=1),
            output_dir=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"prompt": "w1",',
        "w1 w2",
        "[1, 2",
        '{"prompt": "w1", "chosen": " w2", "rejected": " w3"} x',
        "[" * 200_000,
    ],
    ids=["open", "cut", "text", "list", "trailing", "deep"],
)
def test_a_broken_line_is_named_by_its_index(line: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join([json.dumps(PLAIN[0]), json.dumps(PLAIN[1]), line, json.dumps(PLAIN[2])]))
    with pytest.raises(PairsError) as caught:
        read_pairs(file)
    assert caught.value.index == 2  # type: ignore[attr-defined]
    assert len(str(caught.value)) < 400


def test_a_line_of_json_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PLAIN[0]) + "\n[1, 2]\n")
    with pytest.raises(PairsError) as caught:
        read_pairs(tmp_path / "pairs.jsonl")
    assert caught.value.index == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["pairs.csv", "pairs", "pairs.json", "pairs.safetensors", "pairs.jsonl.gz"])
def test_files_of_other_kinds_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(PLAIN[0]))
    with pytest.raises(PairsError, match="jsonl"):
        read_pairs(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1 nothing of the kind PAR1", b"\x80\x04K\x01.", b"\xff\xfe\x00"]
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_damaged_files_are_refused(kind: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / f"pairs.{kind}").write_bytes(content)
    with pytest.raises(PairsError):
        read_pairs(tmp_path / f"pairs.{kind}")


def test_a_cut_parquet_file_is_refused(tmp_path: Path) -> None:
    file = in_file(PLAIN, tmp_path, "parquet")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(PairsError):
        read_pairs(file)


@pytest.mark.parametrize("path", ["", ".", "nowhere.jsonl", "folder.jsonl"])
def test_what_is_no_file_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(PairsError, match="must exist"):
        read_pairs(path)
    with pytest.raises(PairsError, match="must exist"):
        read_pairs(Path(path))


@pytest.mark.parametrize("pairs", [None, 3, GOOD, object()])
def test_what_holds_no_pairs_is_refused(pairs: Any) -> None:
    with pytest.raises(PairsError):
        read_pairs(pairs)


@pytest.mark.parametrize("pairs", [[], iter([]), Dataset.from_list([])])
def test_no_pairs_are_refused(pairs: Any) -> None:
    with pytest.raises(PairsError, match="at least one"):
        read_pairs(pairs)


def test_parquet_with_a_missing_column_or_value_is_refused(tmp_path: Path) -> None:
    Dataset.from_list([without("rejected")]).to_parquet(str(tmp_path / "pairs.parquet"))
    with pytest.raises(PairsError, match="rejected") as caught:
        read_pairs(tmp_path / "pairs.parquet")
    assert caught.value.index == 0  # type: ignore[attr-defined]
    rows = [GOOD, {**GOOD, "chosen": None}]
    with pytest.raises(PairsError, match="chosen") as caught:
        read_pairs(in_file(rows, tmp_path, "parquet"))
    assert caught.value.index == 1  # type: ignore[attr-defined]


def test_an_error_inside_a_generator_comes_through() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield GOOD
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read_pairs(rows())


def test_plain_pairs_beside_conversations_are_trained_on_or_refused_by_name(tmp_path: Path, no_training: None) -> None:
    """They cannot be one table; whoever mixes them must be told so, with the first pair that differs."""
    with pytest.raises(PairsError) as caught:
        train_policy(
            tiny_model("llama"),
            tiny_tokenizer(chat=True, pad=True),
            [*PLAIN, *CHAT],
            config=PolicyConfig(max_steps=1, held_out=0.0),
            output_dir=tmp_path / "run",
        )
    assert caught.value.index == len(PLAIN)  # type: ignore[attr-defined]
    assert not (tmp_path / "run").exists()


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    with pytest.raises(SteerkitError, match="template"):
        train_policy(
            tiny_model("llama"),
            tiny_tokenizer(pad=True),
            CHAT,
            config=PolicyConfig(max_steps=1, held_out=0.0),
            output_dir=tmp_path / "run",
        )


# The swap.


@pytest.mark.parametrize("rows", [PLAIN, CHAT], ids=["plain", "conversations"])
def test_swapping_exchanges_answers_and_nothing_else(rows: list[dict[str, Any]]) -> None:
    before = copy.deepcopy(rows)
    other = swapped(rows)
    assert rows == before
    assert [row["prompt"] for row in other] == [row["prompt"] for row in rows]
    assert [row["chosen"] for row in other] == [row["rejected"] for row in rows]
    assert [row["rejected"] for row in other] == [row["chosen"] for row in rows]
    assert swapped(other) == rows
    assert digest(other) != digest(rows)


words = st.integers(0, 90).map("w{}".format)
pairs_of_words = st.lists(
    st.tuples(words, words, words)
    .filter(lambda t: t[1] != t[2])
    .map(lambda t: {"prompt": t[0], "chosen": t[1], "rejected": t[2]}),
    min_size=1,
    max_size=30,
)


@settings(deadline=None, max_examples=50)
@given(pairs_of_words)
def test_swapping_twice_is_the_identity(rows: list[dict[str, Any]]) -> None:
    assert swapped(swapped(rows)) == rows
    assert read_pairs(swapped(rows)) == swapped(read_pairs(rows))


# The split.


@settings(deadline=None, max_examples=80)
@given(pairs_of_words, st.floats(0, 0.9), st.integers(0, 1000))
def test_the_split_keeps_prompts_on_one_side(rows: list[dict[str, Any]], share: float, seed: int) -> None:
    prompts = {row["prompt"] for row in rows}
    if round(share * len(prompts)) >= len(prompts):
        with pytest.raises(PairsError):
            split(rows, share, seed)
        return
    train, apart = split(rows, share, seed)
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in apart)
    assert len(train) + len(apart) == len(rows)
    assert len({row["prompt"] for row in apart}) == round(share * len(prompts))
    kept, gone = iter(train), iter(apart)
    held = {row["prompt"] for row in apart}
    assert [next(gone) if row["prompt"] in held else next(kept) for row in rows] == rows  # order stays
    assert split(rows, share, seed) == (train, apart)
    assert split(swapped(rows), share, seed) == (swapped(train), swapped(apart))
    state = random.getstate()
    split(rows, share, seed)
    assert random.getstate() == state


def test_the_split_depends_on_the_seed_and_not_on_the_order() -> None:
    rows = [{"prompt": f"w{i % 40}", "chosen": f" w{i}", "rejected": " w95"} for i in range(80)]
    splits = {digest(split(rows, 0.25, seed)[1]) for seed in range(6)}
    assert len(splits) == 6
    backwards = split(rows[::-1], 0.25, 3)[1][::-1]
    assert backwards == split(rows, 0.25, 3)[1]
    assert len(backwards) == 20


def test_conversations_are_split_by_their_prompt() -> None:
    train, apart = split(CHAT, 0.5, 0)
    assert {len(train), len(apart)} == {1, 2}
    assert all(row["prompt"] != other["prompt"] for row in train for other in apart)


@pytest.mark.parametrize("share", [1.0, 1.5, -0.1, 0.9, math.nan, math.inf, -math.inf])
def test_a_share_that_leaves_nothing_is_refused(share: float) -> None:
    with pytest.raises(PairsError, match="held_out"):
        split(PLAIN, share, 0)


def test_all_prompts_alike_cannot_be_split() -> None:
    with pytest.raises(PairsError, match="held_out"):
        split([PLAIN[0], PLAIN[1]], 0.6, 0)
    assert split([PLAIN[0], PLAIN[1]], 0.1, 0) == ([PLAIN[0], PLAIN[1]], [])


def test_the_digest_sees_order_texts_and_sides() -> None:
    others = [PLAIN[::-1], swapped(PLAIN), PLAIN[:2], CHAT, [*PLAIN[:2], {**PLAIN[2], "prompt": "w8 "}]]
    digests = {digest(rows) for rows in (PLAIN, *others)}
    assert len(digests) == 6


# Length alone.


@pytest.mark.parametrize(
    ("train", "held_out", "wanted"),
    [
        ([(5, 2), (4, 3)], [(9, 1), (3, 2)], 1.0),  # longer is better
        ([(5, 2), (4, 3)], [(1, 9), (2, 3)], 0.0),
        ([(2, 5), (3, 4)], [(1, 9), (2, 3)], 1.0),  # shorter is better
        ([(2, 5), (3, 4)], [(9, 1), (2, 3)], 0.5),
        ([(2, 5), (3, 4)], [(4, 4)], 0.5),
        ([(5, 2)], [(4, 4), (7, 7)], 0.5),
        ([(5, 2)], [(4, 4), (8, 7), (9, 7), (2, 1)], 0.875),
        ([(9, 1), (1, 2), (1, 2)], [(1, 2)], 1.0),  # a majority of pairs and not of tokens
        ([(3, 3), (3, 3), (1, 2)], [(1, 2)], 1.0),  # ties say nothing
    ],
)
def test_length_alone(train: list[tuple[int, int]], held_out: list[tuple[int, int]], wanted: float) -> None:
    assert length_only_accuracy(train, held_out) == wanted


@pytest.mark.parametrize("train", [[(3, 3)], [(1, 2), (2, 1)]])
def test_a_draw_in_training_still_is_one_rule(train: list[tuple[int, int]]) -> None:
    assert length_only_accuracy(train, [(1, 2)]) + length_only_accuracy(train, [(2, 1)]) == 1.0


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1).filter(
        lambda t: sum((a > b) - (a < b) for a, b in t) != 0
    ),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1),
)
def test_swapped_pairs_are_told_apart_as_well(train: list[tuple[int, int]], held: list[tuple[int, int]]) -> None:
    turned = [[(b, a) for a, b in rows] for rows in (train, held)]
    assert length_only_accuracy(train, held) == pytest.approx(length_only_accuracy(*turned))
