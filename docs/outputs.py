"""Run a page's Python on the real model and write under each snippet what it printed.

    python docs/outputs.py tour
    python docs/outputs.py tour guides/layers     # a guide goes on with the names of the pages before it

Only snippets show anything that a `text` block follows, or a `<div class="shown" markdown>`. Nothing is typed by hand.
"""

import contextlib
import io
import linecache
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from transformers.utils import logging

PAGES = Path(__file__).parent / "pages"
SNIPPET = re.compile(
    r"```python\n(?P<code>.*?)```(\n\n(?P<open>```text|<div class=\"shown\".*?>\n)\n.*?(?P<close>```|</div>))?",
    re.DOTALL,
)


def run(page: Path, names: dict[str, Any]) -> str:
    """Return the page with what its snippets print."""

    def printed(found: re.Match[str]) -> str:
        code = found["code"]
        sys.stderr.write(code)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compiled(code, f"{page.stem} {found.start()}"), names)
        end = "\n" if found["close"] == "```" else "\n\n"
        shown = f"\n\n{found['open']}\n{out.getvalue().rstrip()}{end}{found['close']}" if found["open"] else ""
        return f"```python\n{code}```{shown}"

    return SNIPPET.sub(printed, page.read_text("utf-8"))


def compiled(code: str, name: str) -> Any:
    """Return a snippet ready to run; nnsight reads the lines of a trace's body, and dataclasses their module."""
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    return compile(code, name, "exec")


def main() -> None:
    """Run the pages that are named, in order, in one namespace and an empty folder."""
    logging.disable_progress_bar()
    names: dict[str, Any] = {}
    pages = [PAGES / f"{name}.md" for name in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for page in pages:
            page.write_text(run(page, names), "utf-8")


if __name__ == "__main__":
    main()
