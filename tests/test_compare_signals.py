"""compare_signals.py on a tiny run with all its checkpoints, and its measures on values written by hand."""

import json

import pytest
import torch
from tiny.runs import arguments
from tiny.tables import read_table

import train
from grades.components import TOWERS
from grades.rollback import CERTAINTY
from scripts import compare_signals
from training.arguments import parse_arguments

FLAGS = {
    "enable_grades": True, "metric": "rollback", "average_weights": 0.5, "vision_tau": 1e-12, "language_tau": 1e-12,
    "alpha": 0.1, "compute_interval": 2, "eval_interval": 2, "checkpoint_interval": 1, "keep_checkpoints": 100,
    "rollback_rows": 3, "lr_schedule": "constant", "turns_per_image": 1, "patience": 2,
}  # fmt: skip


@pytest.mark.slow
def test_every_sign_is_measured_at_every_checkpoint(data, tmp_path, capsys):
    folder, mixture = tmp_path / "out" / "run", tmp_path / "mixture.yaml"
    mixture.write_text(json.dumps([{"name": "all", "share": 1, "sets": [{"path": str(data)}]}]))
    words = arguments(data, tmp_path, "run", **FLAGS)
    words = [f"--mixture={mixture}" if "--train_dataset_path" in word else word for word in words]
    assert train.main(parse_arguments(words)) == 0
    capsys.readouterr()
    assert compare_signals.main([str(folder), "--batches=2"]) == 0
    lines = capsys.readouterr().out.split("\n\n")
    signs = read_table(lines[0])
    assert [(row["sign"], row["tower"]) for row in signs] == [(s, t) for s in compare_signals.SIGNS for t in TOWERS]
    values = {row["sign"]: float(row["step 8"]) for row in signs if row["tower"] == "language"}
    assert values["drift"] > 0
    assert 0 < values["features"] < 1
    assert values["noise"] > 0
    assert [row["ends by"] for row in read_table(lines[1])] == list(compare_signals.SIGNS)

    run = compare_signals.Run(folder, batches=2)  # of the checkpoints at every step only those that were evaluated
    run.measure()
    assert list(run.signs["gain"]) == [4, 6, 8]
    for step, both in run.curves.gains.items():  # as the run itself measured them, per 100 steps
        bounds = {tower: max(0.0, gain + CERTAINTY * error) for tower, (gain, error) in both.items()}
        assert run.signs["gain"][step] == pytest.approx(bounds, abs=1e-4)
    assert max(value for both in run.signs["gain"].values() for value in both.values()) > 0.01


def test_signs_on_known_values(tmp_path, capsys):
    features = torch.randn(50, 4)
    rotated = features @ torch.linalg.qr(torch.randn(4, 4))[0] * 3 + 1
    assert compare_signals.linear_cka(features, rotated) == pytest.approx(1)
    assert compare_signals.linear_cka(features, torch.randn(50, 4)) < 0.5

    names = ("vision_encoder.conv.weight", "decoder.norm.weight", "decoder.head.weight")
    last, average, before = ({name: torch.full((2, 2), value) for name in names} for value in (3.0, 2.0, 0.0))
    assert compare_signals.drift(last, average, before) == {"vision": 2.0, "language": 2.0}
    with pytest.raises(SystemExit):
        compare_signals.main([str(tmp_path)])
    assert str(tmp_path) in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare_signals.main([str(tmp_path), "--batches=1"])
    assert "--batches 1" in capsys.readouterr().err
