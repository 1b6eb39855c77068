"""The library by itself: examples in docstrings, the API reference, what an import brings, its types."""

import doctest
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import grades

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path.stem for path in (ROOT / "grades").glob("*.py") if not path.stem.startswith("__"))
CALLBACKS = ["callback", "gradient_early_stopping", "vlm_early_stopping"]  # import transformers


def test_examples_in_docstrings_hold():
    modules = [grades, *(importlib.import_module(f"grades.{name}") for name in MODULES if name not in CALLBACKS)]
    results = [doctest.testmod(module) for module in modules]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) >= 12


def test_an_import_brings_nothing_but_torch():
    code = """
import sys, grades
assert "torch" not in sys.modules, "the settings alone are quick"
grades.GradESMonitor, grades.find_components, grades.ComponentStats
import torch
brought = {name.partition(".")[0] for name in sys.modules}
print(*({"transformers", "accelerate", "peft", "trl", "matplotlib", "pandas", "wandb", "PIL", "datasets"} & brought))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.filterwarnings("error::UserWarning:pdoc")
@pytest.mark.slow
def test_the_api_reference_is_built_from_docstrings(tmp_path):
    pytest.importorskip("pdoc")
    pytest.importorskip("transformers")
    from scripts import build_api_reference

    build_api_reference.build(tmp_path)
    page = (tmp_path / "grades.html").read_text(encoding="utf-8")
    assert [name for name in grades.__all__ if f'id="{name}"' not in page] == []
    assert {path.stem for path in (tmp_path / "grades").iterdir()} == set(build_api_reference.MODULES)
    monitor = (tmp_path / "grades" / "monitor.html").read_text(encoding="utf-8")
    assert 'id="GradESMonitor.after_step"' in monitor


def test_every_public_thing_has_a_docstring():
    for name in grades.__all__:
        assert (getattr(grades, name).__doc__ or "").strip(), name


def test_the_changelog_knows_the_version():
    assert f"## [{grades.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert (ROOT / "grades" / "py.typed").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [requirement.partition(">")[0] for requirement in project["dependencies"]] == ["torch"]
