"""The house keeps its shape: imports go down only, and the public names are the ones we promised."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest

import prefmix

PACKAGE = Path(prefmix.__file__).parent
#: A module may import from its own floor and from the floors below it.
FLOORS = [
    {"errors", "schema"},
    {"recipe", "ledger", "language", "digest", "pieces", "storage"},
    {"files", "finding", "records", "rows", "shingles", "minhash", "overlap"},
    {"hub"},
    {
        "sources",
        "fields",
        "benchmarks",
        "chatml",
        "filters",
        "audit",
        "decontaminate",
        "dedupe",
        "tokens",
        "mix",
        "card",
        "figures",
        "model_card",
        "scores",
    },
    {"mixture"},
    {"plan", "manifest", "shelves", "store", "stages", "batch"},
    {"scale"},
    {"build", "inspect", "starter", "contamination", "train", "model", "publish"},
    {"cli", "__init__", "__main__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def rooms() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The top-level rooms of prefmix that a module imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("prefmix.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "prefmix":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prefmix."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("path", rooms(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    room = room_of(path)
    assert room in FLOOR, f"{room} has no floor: give it one in FLOORS"
    if room == "__init__":
        return
    above = {name for name in imported(path) - {room} if FLOOR.get(name, 99) > FLOOR[room]}
    assert not above, f"{room} imports from a floor above it: {above}"


#: Rooms of one floor that do not know each other: they meet at the folder of a mixture and at that of a run.
STRANGERS = {
    "build": {"train", "model", "publish"},
    "inspect": {"train", "model", "publish"},
    "publish": {"build", "train", "model"},
    "train": {"build", "inspect", "starter", "contamination", "model"},
    "model": {"build", "inspect", "starter", "contamination"},
}


@pytest.mark.parametrize("room", STRANGERS)
def test_rooms_that_meet_at_a_folder_do_not_import_each_other(room):
    inside = [path for path in rooms() if room_of(path) == room]
    assert inside
    assert not {name for path in inside for name in imported(path)} & STRANGERS[room]


#: What the command line imports before it trains: no package of the extra is in them, or in what they import.
@pytest.mark.parametrize(
    "module", ["prefmix.train.inputs", "prefmix.model_card", "prefmix.publish", "prefmix.cli.trains"]
)
def test_what_is_needed_without_training_does_without_the_extra(module):
    extra = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
    code = f"import sys, {module}; print([m for m in {extra} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("huggingface_hub", {"hub"}),
        ("fsspec", {"storage"}),
        *(
            (library, {"train", "model"})
            for library in ("torch", "transformers", "peft", "bitsandbytes", "safetensors")
        ),
        *((library, {"train"}) for library in ("trl", "accelerate")),
    ],
)
def test_some_libraries_are_imported_in_their_rooms_only(library, homes):
    def imports(path: Path) -> bool:
        names = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        names |= {
            node.module or ""
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
        }
        return any(name.split(".")[0] == library for name in names)

    assert {room_of(path) for path in rooms() if imports(path)} <= homes


def test_only_the_command_line_prints_or_exits():
    for path in rooms():
        if room_of(path) in ("cli", "__main__"):
            continue
        calls = {
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
        }
        assert not calls & {"print", "exit", "sys.exit", "os._exit", "quit"}, path


def test_the_public_names_are_these():
    assert sorted(prefmix.__all__) == [
        "Mixture",
        "PrefmixError",
        "Recipe",
        "__version__",
        "build",
        "load_recipe",
        "open_mixture",
        "train",
    ]
    for name in prefmix.__all__:
        assert getattr(prefmix, name) is not None


@pytest.mark.parametrize(("name", "home"), [("build", "prefmix.build"), ("train", "prefmix.train.run")])
def test_a_public_function_keeps_its_name_when_the_module_of_that_name_is_imported(name, home):
    module = importlib.import_module(home)
    function = getattr(prefmix, name)
    assert function is getattr(module, name)
    assert inspect.isfunction(function)
    code = f"import prefmix\nimport {home}\nfrom {home} import {name}\nassert prefmix.{name} is {name}"
    exec(code, {})
    assert isinstance(sys.modules[f"prefmix.{name}"], types.ModuleType)


def test_importing_prefmix_does_not_import_polars():
    code = "import sys, prefmix; print([m for m in ('polars', 'pyarrow', 'datasets', 'pydantic', 'torch') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
