"""The import table, held against the code: imports go down only, and each heavy dependency has one door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "steerkit"

ROWS = [
    ["errors", "types", "maths"],
    ["model", "hooks", "storage"],
    ["conditions", "activations", "hub"],
    ["intervention", "passes"],
    ["sites", "fold", "gates", "concepts", "preferences", "gapo"],
    ["controller", "loading"],
    ["evaluation"],
    ["experiments"],
    ["plots", "demo", "cli", "integrations"],
]

DOORS = {
    "sklearn": ["concepts/probe.py"],
    "scipy": ["concepts/probe.py"],
    "matplotlib": ["plots.py"],
    "trl": ["preferences/", "gapo/"],
    "datasets": ["preferences/", "gapo/"],
    "peft": ["preferences/", "gapo/runs.py"],
    "moocore": ["gapo/front.py"],
    "vaderSentiment": ["evaluation/scorers.py"],
    "profanity_check": ["evaluation/scorers.py"],
    "pandas": ["evaluation/report.py", "experiments/table.py"],
    "huggingface_hub": ["hub.py"],
    "gguf": ["integrations/gguf.py"],
    "nnsight": ["integrations/nnsight.py"],
    "vllm": ["integrations/vllm.py"],
    "typer": ["cli/"],
    "rich": ["cli/"],
}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def place(module: str) -> tuple[int, int]:
    """Row and place in the row of a module of ours."""
    for row, entries in enumerate(ROWS):
        for column, entry in enumerate(entries):
            if module == entry or module.startswith(entry + "."):
                return row, column
    raise AssertionError(f"{module} stands in no row of the import table")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "steerkit":
                found.discard("steerkit")
                found.update(f"steerkit.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down_only(path: Path) -> None:
    here = module_name(path)
    row, column = place(here)
    for imported in imports(path):
        if not imported.startswith("steerkit."):
            continue
        target = imported.removeprefix("steerkit.")
        if target.split(".")[0] == here.split(".")[0]:
            continue
        other_row, other_column = place(target)
        # Within the top row the command line calls the demo, which draws plots; below it nothing goes sideways.
        allowed = other_row < row or (row == len(ROWS) - 1 and other_row == row and other_column < column)
        assert allowed, f"{here} (row {row}) imports {target} (row {other_row})"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_dependencies_have_one_door(path: Path) -> None:
    relative = path.relative_to(PACKAGE).as_posix()
    for imported in imports(path):
        doors = DOORS.get(imported.split(".")[0])
        assert doors is None or any(relative.startswith(door) for door in doors), f"{relative} imports {imported}"


def test_maths_imports_nothing_of_ours() -> None:
    for path in (PACKAGE / "maths").glob("*.py"):
        assert not [name for name in imports(path) if name.startswith("steerkit") and "maths" not in name]


def test_nothing_executes_what_it_reads() -> None:
    for path in FILES:
        text = path.read_text("utf-8")
        for banned in ("torch.load(", "pickle", "trust_remote_code=True", "eval(", "exec("):
            # Error messages name what they refuse.
            allowed = banned == "pickle" and path.name in ("storage.py", "sources.py", "vector.py", "checkpoints.py")
            assert banned not in text.replace(".eval()", "") or allowed, f"{path.name} uses {banned}"


def test_a_bare_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, steerkit; heavy = {'torch', 'transformers', 'sklearn', 'scipy', 'matplotlib', 'peft', 'trl', 'typer'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
