"""SmolLM2-135M-Instruct: a concept that is fitted on one set of texts reads others, and steers what is written."""

from typing import Any

import pytest
import torch

from steerkit import Concept, Controller, record
from steerkit.demo import contrast_texts, load_model, perplexity

pytestmark = pytest.mark.slow

GOOD = [
    "The dentist was gentle and I felt no pain at all.",
    "Our guide told the funniest stories, and the children begged to come again.",
    "She opened the envelope and laughed with relief.",
    "The lamp fits the corner perfectly and the light is warm.",
    "He says it is the best sandwich in town, and I agree.",
    "The ferry left on time and the sea was calm and blue.",
    "My sister finally found a flat that she loves.",
    "The repair took ten minutes and cost nothing.",
    "I would happily listen to that lecture twice.",
    "The team celebrated until midnight after the final whistle.",
    "These boots kept my feet dry for a whole week in the hills.",
    "Everyone thanked the volunteers for a splendid afternoon.",
]
BAD = [
    "The dentist was rough and my jaw hurt for days.",
    "Our guide mumbled through the whole tour, and the children cried.",
    "She opened the envelope and sat down in despair.",
    "The lamp flickers, and it broke after two evenings.",
    "He says it is the worst sandwich in town, and I agree.",
    "The ferry was cancelled and nobody told us anything.",
    "My sister hates the flat that she was given.",
    "The repair took three weeks and made it worse.",
    "I nearly fell asleep during that pointless lecture.",
    "The team left in silence after a humiliating defeat.",
    "These boots leaked on the first wet morning.",
    "Everyone complained about the chaos all afternoon.",
]
PROMPTS = [
    "The food at the new restaurant was",
    "My first day at work was",
    "The concert last night was",
    "I think that the garden looks",
    "The customer service told me that",
    "After the long journey we felt",
    "The book that you lent me is",
    "The weather this week has been",
]


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any]:
    return load_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def sentiment(real: tuple[Any, Any]) -> Concept:
    positive, negative = contrast_texts("sentiment")
    return Concept.fit("sentiment", *real, positive=positive, negative=negative)


def test_the_probe_reads_texts_that_it_was_not_fitted_on(real: tuple[Any, Any], sentiment: Concept) -> None:
    layer = sentiment.best_layer
    good, bad = (sentiment[layer].probability(record(*real, texts, layers=layer)[layer]) for texts in (GOOD, BAD))
    right = int((good > 0.5).sum() + (bad < 0.5).sum())
    assert right >= 19  # of 24; by chance one time in 1,300
    assert sentiment.accuracy[layer] > 0.75


def test_a_bound_holds_at_the_layer_while_generating(real: tuple[Any, Any], sentiment: Concept) -> None:
    model, tokenizer = real
    layer = sentiment.best_layer
    seen = []
    with Controller(model, [sentiment.constrain(at_least=0.99, layers=layer)]):
        handle = model.model.layers[layer].register_forward_hook(lambda m, a, out: seen.append(out[:, -1]))
        model.generate(**tokenizer(PROMPTS[0], return_tensors="pt"), max_new_tokens=8, do_sample=False)
        handle.remove()
    logits = sentiment[layer].logit(torch.cat(seen))
    wanted = torch.logit(torch.tensor(0.99))
    assert bool((logits > wanted - 1e-3).all())
    assert bool((logits < wanted + 1e-3).any())


def test_constraints_move_what_is_written(real: tuple[Any, Any], sentiment: Concept) -> None:
    model, tokenizer = real
    pattern = sentiment.along("pattern")
    prompts = PROMPTS * 4
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")

    def read(intervention: Any) -> tuple[torch.Tensor, list[list[int]]]:
        torch.manual_seed(0)
        with Controller(model, [intervention]):
            rows = model.generate(**batch, max_new_tokens=16, do_sample=True, pad_token_id=tokenizer.eos_token_id)
        new = rows[:, batch.input_ids.shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        states = record(model, tokenizer, [text or "." for text in texts], layers=sentiment.best_layer)
        probability = sentiment[sentiment.best_layer].probability(states[sentiment.best_layer])
        return probability, new.tolist()

    up, written = read(pattern.constrain(at_least=0.99))
    down, _ = read(pattern.constrain(at_most=0.01))
    # The reading is of the continuation alone, by the unsteered model, so it is the text that moved.
    gain = up - down
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5
    assert torch.tensor(perplexity(model, tokenizer, prompts, written)).median() < 100
