"""What a streaming merge of two vectors into SmolLM2-135M-Instruct costs, beside mergekit's task arithmetic.

    python benchmarks/merge_cost.py --mergekit PYTHON --json benchmarks/results/merge_cost.json

PYTHON is an interpreter with mergekit 0.1.5, which pins other versions than steerkit. Each arm runs in a process of its
own; CPU and the peak of anonymous memory are those of the work alone, after imports. mergekit merges the two models that
the vectors make; steerkit reads the vectors, as factors of rank 32 or dense in float32, and the base.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import arguments, header, quiet, save, table

from steerkit.demo import load_model

MEASURE = """
import json, sys, threading, time
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024
def measured(work):
    start, peak, done = anonymous(), [0.0], threading.Event()
    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)
    thread = threading.Thread(target=watch); thread.start()
    cpu = time.process_time()
    work()
    cpu = time.process_time() - cpu
    done.set(); thread.join()
    print(json.dumps({"cpu_s": cpu, "memory_MiB": peak[0] - start}))
"""
OURS = """
import torch; torch.set_num_threads(1)
from steerkit import load
from steerkit.preferences.checkpoints import merge_checkpoint
from transformers import AutoConfig
import peft
base, one, two, out = sys.argv[1:]
measured(lambda: merge_checkpoint(base, [(load(one), 0.3), (load(two), 0.4)], out))
"""
THEIRS = """
import yaml, torch; torch.set_num_threads(1)
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
base, one, two, out = sys.argv[1:]
text = f'''
merge_method: task_arithmetic
base_model: {base}
dtype: bfloat16
models:
  - model: {one}
    parameters: {{weight: 0.3}}
  - model: {two}
    parameters: {{weight: 0.4}}
'''
config = MergeConfiguration.model_validate(yaml.safe_load(text))
measured(lambda: run_merge(config, out, MergeOptions(lazy_unpickle=True, copy_tokenizer=False, write_model_card=False)))
"""


def main() -> None:
    given = arguments(__doc__, mergekit="", rounds=3)
    quiet()
    facts = header(given)
    sys.path.insert(0, str(Path(__file__).parent))
    from vector_cost import random_vector

    found: dict[str, Any] = {**facts, "arms": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, tokenizer = load_model()
        model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        for kind in ("low", "dense"):
            for i in (1, 2):
                vector = random_vector(model, 32, kind == "dense") * 0.1
                vector.named(f"v{i}").save(folder / f"{kind}{i}.safetensors")
                if kind == "low":
                    vector.merge_into(model).save_pretrained(folder / f"m{i}")
                    tokenizer.save_pretrained(folder / f"m{i}")
        arms = {
            "steerkit, rank 32": (sys.executable, OURS, "low1.safetensors", "low2.safetensors"),
            "steerkit, dense": (sys.executable, OURS, "dense1.safetensors", "dense2.safetensors"),
        }
        if given.mergekit:
            arms["mergekit"] = (given.mergekit, THEIRS, "m1", "m2")
        for _ in range(given.rounds):
            for name, (python, code, one, two) in arms.items():
                out = folder / "out"
                shutil.rmtree(out, ignore_errors=True)
                paths = [str(folder / each) for each in ("base", one, two, "out")]
                done = subprocess.run([python, "-c", MEASURE + code, *paths], capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
                found["arms"].setdefault(name, []).append(json.loads(done.stdout.strip().splitlines()[-1]))
    rows = [
        [
            name,
            f"{min(r['cpu_s'] for r in runs):.2f} to {max(r['cpu_s'] for r in runs):.2f}",
            f"{max(r['memory_MiB'] for r in runs):.0f}",
        ]
        for name, runs in found["arms"].items()
    ]
    table(rows, ["arm", "CPU s of the work", "memory MiB"])
    save(given.json, found)


if __name__ == "__main__":
    main()
