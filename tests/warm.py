"""What the server of `forked` does once for all of its processes: imports, and what libraries build at first use."""

from importlib import import_module

import torch
from tiny import tiny_model

torch.set_num_threads(1)
for name in (
    "pytest",
    "steerkit.cli",
    "steerkit.gapo.trainer",
    "steerkit.preferences.policy",
    "trl.trainer.dpo_trainer",
):
    import_module(name)
peft = import_module("peft")
peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
