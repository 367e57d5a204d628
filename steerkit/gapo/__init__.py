"""GAPO and P-GAPO (arXiv:2507.01915): one policy trained on several objectives, balanced by their gradients."""
