"""The main job on the embedded model: concepts and a preference vector, fitted, applied row by row, shown on a page."""

from steerkit.demo.embedded import contrast_texts, load_model, perplexity, preference_pairs, until_end

__all__ = ["contrast_texts", "load_model", "perplexity", "preference_pairs", "until_end"]
