"""Runs in processes of their own, one or two, forked from a server that has imported what takes long.

A hang ends with its process.
"""

import gc
import multiprocessing
import os
import socket
import time
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

SECONDS = 120
"""After which a run counts as hanging."""

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["warm"])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def enter(target: Callable[..., None], environment: dict[str, str], log: Path, given: dict[str, Any]) -> None:
    gc.freeze()  # what the server made: looking at it would copy it
    os.environ.update(environment)
    with log.open("w") as told:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    target(**given)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Run:
    """`target(out=out, **given)` in one or two processes, with what a launcher gives them: environment variables."""

    def __init__(self, target: Callable[..., None], out: Path, processes: int = 1, **given: Any) -> None:
        out.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            # Where the server looks for `warm`: before Python 3.14 it is not given `sys.path`.
            patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
            forkserver.ensure_running()
        self.logs = [out / f"log-{rank}.txt" for rank in range(processes)]
        self.processes, port = [], free_port()
        for rank, log in enumerate(self.logs):
            environment = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "TRL_EXPERIMENTAL_SILENCE": "1"}
            if processes > 1:
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                environment |= {name: str(value) for name, value in places.items()}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            arguments = (target, environment, log, {"out": out, **given})
            self.processes.append(SERVER.Process(target=enter, args=arguments))
        for process in self.processes:
            process.start()

    def codes(self, seconds: float = SECONDS) -> list[int | None]:
        """Wait for the end of all processes; None where one had to be ended."""
        end = time.monotonic() + seconds
        found: list[int | None] = []
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0))
            if process.is_alive():
                process.kill()
                process.join()
                found.append(None)
            else:
                found.append(process.exitcode)
        return found

    def told(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in self.logs if log.exists())
