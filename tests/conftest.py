"""One thread, one seed a test, no network."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Keep what lives to the end out of garbage collections: each training asks for one, of a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def model() -> Any:
    """A fresh tiny llama."""
    return tiny_model("llama")


@pytest.fixture
def tokenizer() -> Any:
    """A word-level tokenizer without a pad token."""
    return tiny_tokenizer()
