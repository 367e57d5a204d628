"""What the scripts of the papers' tables share: two sizes, arms that are kept as they finish, doses within one budget.

Every one has `--quick` (the default: minutes) and `--full` (hours); each size may be set by itself, so that

    python benchmarks/paper_gcav.py --prompts 4 --tokens 2 --samples 1

runs all that there is in a moment and means nothing.
"""

import time
from argparse import Namespace
from dataclasses import replace

from directions import Run

from steerkit import Report
from steerkit.errors import CalibrationError
from steerkit.evaluation import calibrate
from steerkit.evaluation.report import Arm, Estimate
from steerkit.evaluation.run import measured
from steerkit.model import evaluating, find_decoder
from steerkit.passes import Prompted, Sampling


def sized(given: Namespace, quick: dict, full: dict) -> dict:
    """Fill in the sizes that were not given, and return them all."""
    if given.quick and given.full:
        raise SystemExit("One of --quick and --full is required. Found both.")
    for name, size in (full if given.full else quick).items():
        setattr(given, name, getattr(given, name) or size)
    return {name: getattr(given, name) for name in quick}


def spread(openings, count):
    """Return so many of the openings, of all subjects: they are sorted by subject."""
    return openings[:: max(1, len(openings) // count)][:count]


class Arms(Run):
    """The model, and what was measured already; a file of other settings is refused, not mixed and not overwritten."""

    def __init__(self, given, facts, settings):
        super().__init__(given, facts)
        settings = {**settings, "seed": given.seed}
        known = self.notes.setdefault("settings", settings)
        if known != settings:
            raise SystemExit(
                f"{self.rows.name} holds rows of other settings: {known}. Remove it, or name another --json."
            )

    def measure(self, name, prompts, scorers, interventions=()):
        """Evaluate once."""
        if name not in self.arms:
            super().measure(name, prompts, scorers, list(interventions), self.given.samples)

    def instruct(self, name, prompts, scorers, instruction):
        """Evaluate under an instruction; KL is from the model without one."""
        if name in self.arms:
            return
        decoder = find_decoder(self.model)
        sampling = Sampling(self.given.tokens, self.given.samples, 1.0, self.given.seed, 64)
        started = time.process_time()
        with evaluating(decoder.model):
            writer = Prompted(decoder, self.tokenizer, prompts, instruction)
            found, _, _ = measured(writer, scorers, sampling)
        self.keep(name, Report({name: Arm(found)}), cpu_s=time.process_time() - started)
        print(f"{self.notes[name]['cpu_s']:5.0f} s  {name}", flush=True)

    def dosed(self, name, choices, development, scorers, way, between=None):
        """Return the choice that the first scorer likes best on the development prompts, at the budget; None if none fits.

        `way` is 1 where more is wanted and -1 where less is, `between` the amounts that `calibrate` tries.
        """
        if "choice" not in self.notes.get(name, {}):
            started, tried = time.process_time(), {}
            for label, intervention in choices.items():
                try:
                    found = calibrate(
                        self.model, self.tokenizer, development, intervention, budget=self.given.budget, samples=2, between=between,
                        trials=self.given.trials, max_new_tokens=self.given.tokens, batch_size=64, seed=self.given.seed + 1,
                        scorer=next(iter(scorers.values())),
                    )  # fmt: skip
                except CalibrationError as error:
                    print(f"{name}, {label}: {error}")
                    continue
                chosen = found.chosen
                tried[label] = {"amount": found.amount, "kl": chosen.kl.value, "score": chosen.score.value}
            best = max(tried, key=lambda label: way * tried[label]["score"], default=None)
            self.keep(name, choice=best, tried=tried, dose_s=time.process_time() - started)
        note = self.notes[name]
        if note["choice"] is None:
            return None
        amount = note["tried"][note["choice"]]["amount"]
        by_layer = isinstance(amount, dict)
        return replace(choices[note["choice"]], amount={int(k): v for k, v in amount.items()} if by_layer else amount)


def percent(here: Estimate | float, there: Estimate | float) -> str:
    """Return a change in percent of where it began: figures of two scorers are never one scale."""
    first, second = (each.value if isinstance(each, Estimate) else each for each in (here, there))
    return f"{100 * (first / second - 1):+.0f} %" if second else ""
