"""Pure tensor functions. They import torch and nothing of ours, so each can be tested and read on its own."""
