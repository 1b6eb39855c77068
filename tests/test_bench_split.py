"""scripts/bench_split.py on a few rows."""

from scripts.bench_split import main


def test_it_times_loading_and_splitting(capsys):
    main(["--rows", "2000", "--rows_per_image", "1", "5"])
    plain, shared = capsys.readouterr().out.splitlines()
    assert plain.startswith("2,000 rows, 1 of each image: load ")
    assert "by row: no image is in two rows" in plain
    assert "by image, 400 of them" in shared
