"""Steer language models through one door: concepts in activation space and preference vectors in weight space.

    from steerkit import Concept, Controller

    toxicity = Concept.fit("toxicity", model, tokenizer, positive=toxic_texts, negative=clean_texts)
    with Controller(model, [toxicity.constrain(at_most=0.01)]):
        model.generate(**inputs)

Public names load on first use, so that `import steerkit` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerkit.activations import Activations as Activations
    from steerkit.activations import record as record
    from steerkit.concepts.concept import Concept as Concept
    from steerkit.concepts.probe import Probe as Probe
    from steerkit.controller import Controller as Controller
    from steerkit.errors import SteerkitError as SteerkitError
    from steerkit.evaluation.report import Report as Report
    from steerkit.evaluation.run import evaluate as evaluate
    from steerkit.gapo.trainer import GAPOConfig as GAPOConfig
    from steerkit.gapo.trainer import GAPOTrainer as GAPOTrainer
    from steerkit.intervention import Intervention as Intervention
    from steerkit.loading import load as load
    from steerkit.maths.pareto import gapo_weights as gapo_weights
    from steerkit.preferences.policy import PolicyConfig as PolicyConfig
    from steerkit.preferences.policy import train_policy as train_policy
    from steerkit.preferences.vector import PreferenceVector as PreferenceVector

_HOMES = {
    "Activations": "activations",
    "Concept": "concepts.concept",
    "Controller": "controller",
    "GAPOConfig": "gapo.trainer",
    "GAPOTrainer": "gapo.trainer",
    "Intervention": "intervention",
    "PolicyConfig": "preferences.policy",
    "PreferenceVector": "preferences.vector",
    "Probe": "concepts.probe",
    "Report": "evaluation.report",
    "SteerkitError": "errors",
    "evaluate": "evaluation.run",
    "gapo_weights": "maths.pareto",
    "load": "loading",
    "record": "activations",
    "train_policy": "preferences.policy",
}

__all__ = [
    "Activations",
    "Concept",
    "Controller",
    "GAPOConfig",
    "GAPOTrainer",
    "Intervention",
    "PolicyConfig",
    "PreferenceVector",
    "Probe",
    "Report",
    "SteerkitError",
    "evaluate",
    "gapo_weights",
    "load",
    "record",
    "train_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'steerkit' has no attribute {name!r}")
    return getattr(import_module(f"steerkit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
