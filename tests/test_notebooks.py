"""The notebooks run from the first cell to the last, on a run of twenty steps, and are kept without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

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
