"""Contrast texts that a model writes: kept by what they show, without the instruction that they were written under."""

from typing import Any

import pytest
import torch
from tiny import tiny_tokenizer

from steerkit.concepts.texts import contrast_texts, default_requests
from steerkit.errors import AmountError, TextsError

REQUESTS = [f"w{i} w{i + 20} w{i + 40}" for i in range(6)]


@pytest.fixture
def chat() -> Any:
    return tiny_tokenizer(chat=True)


def made(model: Any, tokenizer: Any, **settings: Any) -> Any:
    settings = {"opposite": "w7", "requests": REQUESTS, "max_new_tokens": 8, "batch_size": 4, **settings}
    return contrast_texts(model, tokenizer, "w5", **settings)


def test_conversations_without_the_instruction(model: Any, chat: Any) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = made(model, chat)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.written == 2 * 2 * len(REQUESTS)
    for side, groups, scores in zip((found.positive, found.negative), found.groups, found.scores, strict=True):
        assert 3 <= len(side) == len(groups) == len(scores) <= found.written // 4
        for conversation, request in zip(side, groups, strict=True):
            assert [turn["role"] for turn in conversation] == ["user", "assistant"]
            assert conversation[0]["content"] == REQUESTS[request]
            assert len(conversation[1]["content"].split()) >= 5
        assert len({conversation[1]["content"] for conversation in side}) == len(side)
    assert min(found.scores[0]) > max(found.scores[1])
    assert found.scores[0] == sorted(found.scores[0], reverse=True)
    again, other = made(model, chat), made(model, chat, seed=1)
    assert again.positive == found.positive
    assert other.positive != found.positive


def test_scores_are_the_odds_of_the_two_instructions(model: Any, chat: Any) -> None:
    found = made(model, chat, samples=3)
    # Special tokens are not part of the text, so take an answer that has none.
    whole = [len(conversation[1]["content"].split()) == 8 for conversation in found.positive].index(True)
    conversation, score = found.positive[whole], found.scores[0][whole]
    answer = chat(conversation[1]["content"], add_special_tokens=False)["input_ids"]
    sums = []
    for instruction in ("Answer in a way that is as w5 as you can be.", "Answer in a way that is w7."):
        turns = [{"role": "system", "content": instruction}, conversation[0]]
        text = chat.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt = chat(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0]
        log_p = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1]
        sums.append(float(log_p.gather(1, torch.tensor(answer)[:, None]).mean()))
    assert score == pytest.approx(sums[0] - sums[1], abs=2e-3)


def test_a_judge_decides(model: Any, chat: Any) -> None:
    seen: list[str] = []

    def judge(requests: Any, answers: Any) -> list[float]:
        assert len(requests) == len(answers)
        seen.extend(answers)
        return [float(len(answer)) for answer in answers]

    found = made(model, chat, judge=judge, samples=3)
    assert len(seen) == found.written
    for side, scores in zip((found.positive, found.negative), found.scores, strict=True):
        assert [len(conversation[1]["content"]) for conversation in side] == [int(score) for score in scores]
    assert min(found.scores[0]) > max(found.scores[1])
    with pytest.raises(TextsError, match="one finite score"):
        made(model, chat, judge=lambda requests, answers: [float("nan")] * len(answers))
    with pytest.raises(TextsError, match="worth keeping for"):
        made(model, chat, judge=lambda requests, answers: [1.0] * len(answers))


def test_separation_counts_pairs(model: Any, chat: Any) -> None:
    calls = []

    def by_side(requests: Any, answers: Any) -> list[float]:
        calls.append(1)
        return [len(calls) * -1.0 + 1e-3 * i for i, _ in enumerate(answers)]

    assert made(model, chat, judge=by_side).separation == 1.0


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"keep": 0}, AmountError, "`keep`"),
        ({"keep": 1.2}, AmountError, "`keep`"),
        ({"samples": 0}, AmountError, "`samples`"),
        ({"max_new_tokens": 2.5}, AmountError, "`max_new_tokens`"),
        ({"requests": []}, TextsError, "requests"),
        ({"requests": "one"}, TextsError, "requests"),
        ({"opposite": 3}, TextsError, "`opposite`"),
        ({"max_new_tokens": 500}, TextsError, "may have 128 tokens"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    model: Any, chat: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], error: type, match: str
) -> None:
    monkeypatch.setattr(model, "generate", lambda *a, **k: pytest.fail("work began"))
    with pytest.raises(error, match=match):
        made(model, chat, **settings)


def test_a_base_model_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(TextsError, match="without a chat template"):
        made(model, tokenizer)
    with pytest.raises(TextsError, match="`description`"):
        contrast_texts(model, tokenizer, " ")


def test_shipped_requests() -> None:
    requests = default_requests()
    assert len(requests) == len(set(requests)) == 60
