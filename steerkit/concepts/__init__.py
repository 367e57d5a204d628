"""Concepts: linear probes on the residual stream, and the interventions that they give (GCAV, arXiv:2501.05764)."""
