"""The command line. It parses, calls the library and prints; every error of the library is one line and exit code 2."""

from steerkit.cli import concept, demo, evaluate, gapo, generate, vector  # each registers its commands
from steerkit.cli.shared import app

__all__ = ["app", "concept", "demo", "evaluate", "gapo", "generate", "vector"]
