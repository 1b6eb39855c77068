"""Who may import what: the rooms of the house stay apart."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("models", "data", "training", "grades", "eval", "train", "generate", "evaluate", "scripts")
MAY_IMPORT = {
    "grades": {"grades"},
    "models": {"models", "grades.config", "grades.fields", "grades.files"},
    "data": {"data", "models.config", "models.train_config", "grades.files"},
    "training": {"training", "models", "grades", "data"},
    "eval": {"eval", "models", "data", "grades.files"},
}
HEAVY = ["transformers", "matplotlib", "PIL", "datasets", "wandb", "peft", "accelerate", "yaml", "tqdm", "models"]


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_allowed(name: str, allowed: set[str]) -> bool:
    return any(name == door or name.startswith(door + ".") or door.startswith(name + ".") for door in allowed)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_through_its_doors(room):
    for path in (ROOT / room).rglob("*.py"):
        ours = {name for name in imported(ast.parse(path.read_text())) if name.split(".")[0] in ROOMS}
        wrong = {name for name in ours if not is_allowed(name, MAY_IMPORT[room])}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_there_is_no_circle_of_imports():
    """Imports inside functions count too."""
    files = [path for room in (*MAY_IMPORT, "scripts", "examples") for path in (ROOT / room).rglob("*.py")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    graph = {}
    for name, path in modules.items():
        found = imported(ast.parse(path.read_text(encoding="utf-8"))) & modules.keys()
        graph[name] = {other for other in found if not any(deeper.startswith(f"{other}.") for deeper in found)} - {name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert len(graph) > 50


def test_nobody_imports_train():
    for room in (*MAY_IMPORT, "scripts"):
        for path in (ROOT / room).rglob("*.py"):
            assert "train" not in imported(ast.parse(path.read_text())), path


@pytest.mark.slow
def test_grades_needs_torch_alone():
    """Every module but the callbacks and what they rest on, which have to be of transformers' classes."""
    callbacks = {"callback", "undo", "gradient_early_stopping", "vlm_early_stopping"}
    modules = [f"grades.{path.stem}" for path in (ROOT / "grades").glob("*.py") if path.stem not in callbacks]
    code = f"import sys; sys.modules |= dict.fromkeys({HEAVY}); import grades, {', '.join(modules)}"
    code += "; grades.GradESMonitor; grades.presets"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("absent", "code"),
    [
        ("torch", "import models.config, grades; grades.GradESConfig().check()"),
        ("torch datasets", "from data.rows import load_rows, split_rows; split_rows(load_rows('easy-vqa'), 10, 0)"),
        ("peft transformers", "import models.vision_language_model"),
    ],
)
def test_heavy_packages_are_imported_only_where_they_are_used(absent, code):
    code = f"import sys; sys.modules |= dict.fromkeys({absent.split()}); {code}"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_code_keeps_to_its_sizes():
    for room in (*MAY_IMPORT, "scripts", "examples"):
        for path in [*(ROOT / room).rglob("*.py"), *ROOT.glob("*.py")]:
            assert len(path.read_text().splitlines()) < 400, path.name
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    assert node.end_lineno - node.lineno < 60, f"{path.name} {node.name}"
    for path in (ROOT / "tests").rglob("*.py"):
        assert len(path.read_text().splitlines()) < 400, path.name


def opens_text_unsaid(call: ast.Call) -> bool:
    """Whether the call opens a text file in the encoding of the machine."""
    function, mode = call.func, [*call.args[:1], *(k.value for k in call.keywords if k.arg == "mode")]
    if not isinstance(function, ast.Attribute) or any(k.arg == "encoding" for k in call.keywords):
        return False
    if function.attr == "open":
        is_text = not any(isinstance(value, ast.Constant) and "b" in str(value.value) for value in mode)
        return is_text and ast.unparse(function.value) not in ("Image", "av", "os", "tarfile")
    return function.attr in ("read_text", "write_text")


def test_text_files_are_utf8_on_every_machine():
    for room in (*MAY_IMPORT, "scripts", "examples"):
        for path in [*(ROOT / room).rglob("*.py"), *ROOT.glob("*.py")]:
            calls = (
                node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
            )
            assert not (found := [ast.unparse(call) for call in calls if opens_text_unsaid(call)]), f"{path}: {found}"
