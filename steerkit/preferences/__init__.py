"""Preference vectors: pairs, the two policies trained on them, their difference and what can be done with it."""
