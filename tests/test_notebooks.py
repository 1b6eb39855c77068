"""The notebooks run from the first cell to the last, on a run of twenty steps, and are kept without outputs."""

import json
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from tiny.grades import make_model

from grades import find_components

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def executed(name: str) -> list[nbformat.NotebookNode]:
    """The outputs of all cells. Raises CellExecutionError where a cell ends in an error."""
    notebook = read(name)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": NOTEBOOKS}}).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(outputs: list[nbformat.NotebookNode]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
def test_no_outputs_are_committed(name):
    nbformat.validate(read(name))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in read(name).cells)


def test_what_was_unfrozen_is_live_in_the_checkpoint_notebook(tmp_path, monkeypatch, capsys):
    """Its cells, on a run in which two matrices were frozen at step 4 and one of them was unfrozen at step 12."""
    model, run = make_model(), tmp_path / "run"
    components = find_components(model)
    kept, unfrozen = components[0], components[1]
    model.save_pretrained(run / "checkpoints" / "step_10")
    with torch.no_grad():
        for component in components:
            if component is not kept:
                model.get_parameter(f"{component.name}.weight").add_(1)
    model.save_pretrained(run / "checkpoints" / "step_20")
    history = {
        "total_steps": 20,
        "components": [{key: getattr(one, key) for key in ("name", "tower", "layer", "kind")} for one in components],
        "events": [
            {"step": 4, "name": kept.name}, {"step": 4, "name": unfrozen.name},
            {"step": 12, "name": unfrozen.name, "unfrozen": True},
        ],
    }  # fmt: skip
    (run / "grades_history.json").write_text(json.dumps(history))
    (tmp_path / "sft_full").mkdir()  # a newer run, of an example
    (tmp_path / "sft_full" / "grades_history.json").write_text(json.dumps(history))
    os.utime(tmp_path / "sft_full", (2**32, 2**32))
    monkeypatch.setenv("NOTEBOOK_OUTPUT", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plt, "show", lambda: None)
    monkeypatch.chdir(NOTEBOOKS)
    names: dict = {}
    for cell in read("checkpoint").cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
    drawn = np.concatenate([axis.images[0].get_array().compressed() for axis in names["figure"].axes[:2]])
    plt.close(names["figure"])
    assert drawn.tolist() == [4]
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "largest change" in line]
    assert [line[0] for line in lines if line[1] == "frozen"] == [kept.name]
    assert len(lines) == len(components)


@pytest.mark.slow
def test_both_run(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_STEPS", "20")
    monkeypatch.setenv("NOTEBOOK_OUTPUT", str(tmp_path))

    quickstart = executed("quickstart")
    (run,) = tmp_path.iterdir()
    assert pictures(quickstart) == 3  # what froze, what was measured, the image that is asked about
    text = "".join(output.text for output in quickstart if output.output_type == "stream")
    assert str(run / "summary.json") in text
    answers = [line.split("?", 1)[1].strip() for line in text.splitlines() if line.startswith("what ")]
    assert len(answers) == 2
    assert all(answers)

    checkpoint = executed("checkpoint")
    assert pictures(checkpoint) == 1
    assert len(checkpoint[-1].text.splitlines()) == 26  # a comparison per watched matrix, which the notebook checks
