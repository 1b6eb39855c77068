"""scripts/inspect_molmo2_data.py shows downloaded sets, and page and table of the sets say the same."""

from pathlib import Path

import pytest
import yaml
from tiny.data import encoded, picture

from data.molmo2_sets import SETS, table_lines
from scripts import inspect_molmo2_data

PNG = encoded(picture(width=30, height=20))
PAGE = Path(__file__).resolve().parents[1] / "docs" / "nanomolmo2.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    docs = [{"image": {"bytes": PNG, "path": None}, "questions": {"question": ["what is the shape?"],
             "answer": ["red"]}} for _ in range(9)]  # fmt: skip
    videos = [{"video_id": "x", "video_caption": "so " * 300, "video_start": 1.0, "video_end": 2.0}]
    for name, rows in (("pixmo-docs/charts/train-0.parquet", docs), ("molmo2-cap/data/val-0.parquet", videos)):
        (tmp_path / "sets" / name).parent.mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "sets" / name)
    return tmp_path / "sets"


def test_rows_are_shown(folder, capsys):
    assert inspect_molmo2_data.main(["--data-dir", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "pixmo-docs (allenai/pixmo-docs, licence ODC-BY)\n9 rows of the split train\n" in said
    assert said.count("image 30 x 20\n    user       what is the shape") == 3
    assert "1 rows of the split validation\n- molmo2-cap/data/val-0.parquet#0 (video captions): video " in said
    assert "x.mp4, clip_start 1 s, clip_end 2 s\n" in said
    assert "... (899 letters)" in said


def test_what_is_not_there_is_named(folder, tmp_path, capsys):
    at = ["--data_dir", str(folder)]
    assert inspect_molmo2_data.main(["pixmo-docs", "--num_samples", "5", *at]) == 0
    assert capsys.readouterr().out.count("- pixmo-docs/charts/train-0.parquet#") == 5
    assert inspect_molmo2_data.main(["--stage", "1", *at]) == 1
    assert "not shown: pixmo-cap, " in capsys.readouterr().err
    for flags in (["nothing"], ["--num_samples", "0"], ["--data_dir", str(tmp_path / "no")]):
        assert inspect_molmo2_data.main(flags) == 2
        assert "error: " in capsys.readouterr().err


def test_other_flags_are_those_of_inspect_data(folder, capsys):
    flags = ["--config", "configs/quickstart.yaml", "--val_size", "0"]
    assert inspect_molmo2_data.main(["pixmo-docs", "--data_dir", str(folder), "--num_samples", "2", *flags]) == 0
    said = capsys.readouterr().out
    assert "question pairs" in said
    assert "30 x 20" in said


def test_a_recipe_with_a_mixture_is_looked_at_without_it(folder, tmp_path, capsys):
    recipe = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
    recipe.pop("train_dataset_path", None)
    recipe |= {"mixture": [{"name": "a", "share": 1.0, "sets": [{"path": "x"}]}], "val_size": 0}
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(recipe))
    flags = ["--data_dir", str(folder), "--num_samples", "2", "--config", str(tmp_path / "mixed.yaml")]
    assert inspect_molmo2_data.main(["--stage", "2", *flags]) == 1  # the other sets of the stage are not there
    said = capsys.readouterr()
    assert "question pairs" in said.out
    assert "not shown: pixmo-cap, " in said.err
    assert "pixmo-docs" not in said.err


def test_the_page_has_the_table_of_the_code():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    table = table_lines(SETS)
    start = lines.index(table[0])
    assert lines[start : start + len(table)] == table
    assert lines[start + len(table)] == ""
