"""Experiments that look inside: each one function that returns a table, with a control beside every figure.

    from steerkit import experiments, plots

    found = experiments.persistence(model, tokenizer, sentiment, texts, sentiment.constrain(at_least=0.9))
    print(found)
    plots.layers(found, "reading").savefig("persistence.png")

Nothing here changes a model. Interventions are attached for a pass and taken off again; edits of weights are returned as
preference vectors.
"""

from steerkit.experiments.baking import bake as bake
from steerkit.experiments.baking import edit_weights as edit_weights
from steerkit.experiments.baking import fidelity as fidelity
from steerkit.experiments.patching import patch as patch
from steerkit.experiments.reading import persistence as persistence
from steerkit.experiments.reading import similarity as similarity
from steerkit.experiments.reading import tokens as tokens
from steerkit.experiments.reading import where as where
from steerkit.experiments.table import Table as Table
from steerkit.experiments.table import TokenTable as TokenTable
from steerkit.experiments.vocabulary import lens as lens
from steerkit.experiments.vocabulary import next_token as next_token
from steerkit.experiments.weights import ablate as ablate
from steerkit.experiments.weights import alignment as alignment
from steerkit.experiments.weights import inside as inside
from steerkit.experiments.weights import parts as parts
