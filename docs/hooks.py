"""What the site takes from elsewhere when it is built: the evidence, its figure, help texts, examples in docstrings."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import typer
from mkdocs.structure.files import File
from typer.testing import CliRunner

from steerkit.cli import app

HERE = Path(__file__).parent
BESIDE = ("evidence.md", "magnitudes.png")
"""Files beside `pages`, where README finds them; on the site they lie among the pages."""

TABLES = HERE.parent / "tests" / "test_architecture.py"
EXAMPLE = re.compile(r"^Example:\n((?:(?: {4}.*)?\n?)+)", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add what lies beside the pages."""
    for name in BESIDE:
        files.append(File.generated(config, name, abs_src_path=str(HERE / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to where those files are on the site, and fill in what is marked to be filled in."""
    markdown = re.sub(rf"\]\(\.\./((?:\.\./)*(?:{'|'.join(map(re.escape, BESIDE))}))", r"](\1", markdown)
    for mark, made in (("commands", helps), ("import table", import_table), ("doors", doors)):
        if f"<!-- {mark} -->" in markdown:
            markdown = markdown.replace(f"<!-- {mark} -->", made())
    return markdown


def helps() -> str:
    """Return a heading and the help of each command, as a terminal shows it."""
    parts = []
    for words in commands(typer.main.get_command(app)):
        shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "92"}).output
        lines = "\n".join(line.rstrip() for line in shown.strip().splitlines())
        parts.append(f"## {' '.join(('steerkit', *words))}\n\n```text\n{lines}\n```")
    return "\n\n".join(parts)


def commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Return the words of every command that does something."""
    for name, command in group.commands.items():
        yield from commands(command, (*words, name)) if hasattr(command, "commands") else [(*words, name)]


def import_table() -> str:
    """Return who may import whom, the top row first, as the test holds it against the code."""
    rows = enumerate(_constant("ROWS"))
    return "\n".join(["```text", *(f"{row}   {'   '.join(each)}" for row, each in reversed(list(rows))), "```"])


def doors() -> str:
    """Return where each heavy dependency may be imported."""
    lines = [
        f"| `{name}` | {', '.join(f'`{place}`' for place in places)} |" for name, places in _constant("DOORS").items()
    ]
    return "\n".join(["| dependency | door |", "| --- | --- |", *lines])


def _constant(name: str) -> Any:
    for node in ast.parse(TABLES.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"{TABLES.name} has no {name}")


class Docstrings(griffe.Extension):
    """Makes the code under `Example:` code, and takes what a config's field says of itself for its docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(_fenced, obj.docstring.value)
        elif isinstance(obj, griffe.Attribute) and "metadata" in str(obj.value):
            found = ast.parse(str(obj.value), mode="eval").body
            [metadata] = [each.value for each in getattr(found, "keywords", []) if each.arg == "metadata"]
            obj.docstring = griffe.Docstring(ast.literal_eval(metadata)["help"], parent=obj)


def _fenced(found: re.Match[str]) -> str:
    lines = [line.removeprefix("    ") for line in found[1].rstrip().splitlines()]
    return "\n".join(["```python", *lines, "```", ""])
