"""What a GAPO step costs on SmolLM2-135M-Instruct (LoRA), beside a stock GRPO step of TRL with the same completions.

    python benchmarks/gapo_cost.py --json benchmarks/results/gapo_cost.json        (about 15 minutes of one core)

16 completions of 32 tokens a step, generation included, no gradient checkpointing, float32. Each arm runs in a process of
its own, in turn; the first step of each is left out. Times are CPU times as a ratio to stock, round by round.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

import torch
from common import arguments, header, paired, quiet, save, table

ARMS: dict[str, tuple[int, dict[str, Any] | None]] = {
    "stock GRPO": (2, None),
    "two passes, 2 objectives": (2, {}),
    "two passes, 3 objectives": (3, {}),
    "exact, 2 objectives": (2, {"gram_mode": "exact"}),
    "exact, 3 objectives": (3, {"gram_mode": "exact"}),
}
PROMPTS = [
    "The film opens with",
    "When we checked in, the staff",
    "The package arrived on Tuesday and",
    "Our waiter said",
]


def work(arm: str, steps: int, tokens: int) -> dict[str, Any]:
    """Run one arm, and return CPU seconds of each step and the peak of memory."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers.trainer_callback import PrinterCallback, TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from steerkit import GAPOConfig, GAPOTrainer
    from steerkit.demo import load_model

    torch.set_num_threads(1)
    count, own = ARMS[arm]

    def letters(letter: str) -> Any:
        def reward(completions: list[str], **_: Any) -> list[float]:
            return [text.count(letter) / (1 + len(text)) for text in completions]

        reward.__name__ = f"letter_{letter}"
        return reward

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.process_time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.process_time()

    model, tokenizer = load_model(dtype=torch.float32)
    common: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": tokens,
        "generation_kwargs": {"min_new_tokens": tokens},
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
    }
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = own is None
        trainer = (GRPOTrainer if stock else GAPOTrainer)(
            model=model,
            reward_funcs=[letters(letter) for letter in "eas"[:count]],
            args=GRPOConfig(scratch, scale_rewards="none", **common) if stock else GAPOConfig(scratch, **common, **own),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Clock())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"steps": times[1:], "rise_MiB": (peak - before) / 1024}


def main() -> None:
    given = arguments(__doc__, rounds=4, steps=3, new_tokens=32, arm="")
    if given.arm:
        print(json.dumps(work(given.arm, given.steps, given.new_tokens)))
        return
    quiet()
    found: dict[str, Any] = {**header(given), "arms": {arm: [] for arm in ARMS}}
    for _ in range(given.rounds):
        for arm in ARMS:
            command = [sys.executable, __file__, "--arm", arm, "--steps", str(given.steps)]
            done = subprocess.run([*command, "--new-tokens", str(given.new_tokens)], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{arm} failed:\n{done.stderr[-2000:]}")
            found["arms"][arm].append(json.loads(done.stdout.strip().splitlines()[-1]))
    seconds = {arm: [min(run["steps"]) for run in runs] for arm, runs in found["arms"].items()}
    found["x stock"] = {arm: paired(each, seconds["stock GRPO"]) for arm, each in seconds.items()}
    rows = [
        [
            arm,
            f"{min(seconds[arm]):.2f}",
            "{1:.2f} [{0:.2f} {2:.2f}]".format(*found["x stock"][arm]),
            f"{sorted(run['rise_MiB'] for run in runs)[len(runs) // 2]:.0f}",
        ]
        for arm, runs in found["arms"].items()
    ]
    table(rows, ["arm", "CPU s a step", "x stock", "memory rise, MiB"])
    save(given.json, found)


if __name__ == "__main__":
    main()
