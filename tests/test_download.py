"""Public data sets are downloaded whole or with a reason: a hub and a server of this machine that misbehave."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from tiny.data import encoded, picture
from tiny.web import PNG, REVISION, local

from data import molmo2_sets
from data.fetching import download as downloads
from data.fetching.download import Options
from data.molmo2_sets import SETS, named, of_stage
from data.rows import load_rows
from scripts import download_datasets

SHA = hashlib.sha256(PNG).hexdigest()
QUESTIONS = "allenai/pixmo-ask-model-anything"


@pytest.fixture
def run(server, tmp_path):
    """run(flag, ...) is the exit code."""

    def call(*flags: str) -> int:
        options = Options(tmp_path, endpoint=server.url, is_allowed=local)
        return download_datasets.main([*flags, "--output-dir", str(tmp_path / "out")], options)

    return call


def parquet(rows: list[dict]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def status(tmp_path, name: str) -> dict:
    return json.loads((tmp_path / "out" / ".download_status.json").read_text())[name]


def question_rows(server, *paths: str) -> list[dict]:
    return [
        {"image_url": f"{server.url}/{path}", "image_sha256": SHA, "question": f"what is {i}?", "answer": "red"}
        for i, path in enumerate(paths)
    ]


def test_rows_with_links_become_rows_with_pictures(server, run, tmp_path, capsys):
    rows = question_rows(server, "a.png", "nothing", "a.png?2", "garbage")
    server.repos[QUESTIONS] = {"data/train-00000-of-00001.parquet": parquet(rows), "README.md": b"a card"}
    assert run("--dataset", "pixmo-ask-model-anything") == 1  # two pictures are not there
    said = capsys.readouterr()
    shown = said.out.index("licence: odc-by")
    assert shown < said.out.index("fetching to")
    assert "revision aaaaaaaaaaaa" in said.out
    assert "        1  HTTP 404\n" in said.out
    folder = tmp_path / "out" / "pixmo-ask-model-anything"
    read = load_rows(str(folder))
    assert [row["texts"][0]["user"] for row in map(read.__getitem__, range(len(read)))] == ["what is 0?", "what is 2?"]
    facts = status(tmp_path, "pixmo-ask-model-anything")
    assert (facts["state"], facts["reasons"], facts["revision"]) == (
        "partial", {"HTTP 404": 1, "no image": 1}, REVISION
    )  # fmt: skip
    assert "2 rows with their pictures, 2 left out" in facts["words"]
    assert len((folder / ".fetch" / "failures.jsonl").read_text().splitlines()) == 2
    # The folder can be moved: paths are relative.
    shutil.move(tmp_path / "out", tmp_path / "moved")
    moved = load_rows(str(tmp_path / "moved" / "pixmo-ask-model-anything"))
    assert Path(moved[1]["images"][0]).read_bytes() == PNG
    shutil.move(tmp_path / "moved", tmp_path / "out")
    server.asked.clear()
    assert run("--dataset", "pixmo-ask-model-anything", "--skip-errors") == 0
    assert [path for path in server.asked if not path.startswith("/api")] == []


def test_check_finds_what_is_wrong_on_disk(server, run, tmp_path, capsys):
    server.repos[QUESTIONS] = {"train.parquet": parquet(question_rows(server, "a.png", "a.png?2", "a.png?3"))}
    assert run("--dataset", QUESTIONS, "--max-images", "2") == 0
    assert run("--check") == 0
    assert run("--dataset", QUESTIONS) == 0
    assert run("--check") == 0
    there = sorted(path for path in (tmp_path / "out" / "fetched").rglob("*") if path.is_file())
    assert len(there) == 3
    there[0].write_bytes(PNG[:70])
    there[1].write_bytes(encoded(picture(seed=5)))
    there[2].unlink()
    source = tmp_path / "out" / "pixmo-ask-model-anything" / ".fetch" / "hub" / "train.parquet"
    source.write_bytes(source.read_bytes().replace(b"parquet-cpp-arrow", b"parquet-cpp-arrox"))  # who wrote it
    capsys.readouterr()
    assert run("--check") == 1
    said = capsys.readouterr().out
    assert "has the SHA-256" in said
    assert f"{there[0]}" in said
    assert f"{there[1]} ({server.url}/" in said
    assert "1 pictures were never asked for" in said
    assert run("--check", "--stage", "1") == 1
    assert "cosyn-point: not downloaded" in capsys.readouterr().out


def test_check_counts_the_failures_among_the_pictures_that_were_wanted(server, run, tmp_path, capsys):
    rows = question_rows(server, "a.png", "a.png?2", "nothing?1", "nothing?2", "nothing?3")
    server.repos[QUESTIONS] = {"train.parquet": parquet(rows)}
    assert run("--dataset", QUESTIONS) == 1
    capsys.readouterr()
    assert run("--check") == 1
    assert "3 pictures could not be fetched" in capsys.readouterr().out
    wanted = downloads.chosen({row["image_url"]: "" for row in rows}, 2)
    failed = sum("nothing" in url for url in wanted)
    assert run("--dataset", QUESTIONS, "--max_images", "2") == (failed > 0)
    capsys.readouterr()
    run("--check")
    said = capsys.readouterr().out
    assert ("pictures could not be fetched" in said) == (failed > 0)
    assert "3 pictures could not be fetched" not in said


def test_files_of_the_hub_are_held_at_their_first_revision(server, run, tmp_path, capsys):
    repo = "allenai/pixmo-docs"
    rows = [{"image": {"bytes": PNG, "path": None}, "questions": {"question": ["what?"], "answer": ["red"]}}]
    server.repos[repo] = {"charts/train-00000-of-00001.parquet": parquet(rows), "charts/notes.txt": b"x" * 10}
    assert run("--dataset", "pixmo-docs", "--dry-run") == 0
    assert not (tmp_path / "out" / "pixmo-docs").exists()
    assert run("--dataset", "pixmo-docs") == 0
    lock = json.loads((tmp_path / "out" / "pixmo-docs" / ".fetch" / "lock.json").read_text())
    assert (lock["revision"], lock["licence"], len(lock["files"])) == (REVISION, "odc-by", 2)
    server.asked.clear()
    assert run("--dataset", "pixmo-docs") == 0
    assert server.asked == [f"/api/datasets/{repo}/revision/{REVISION}"]
    assert "is there already" in capsys.readouterr().out
    (tmp_path / "out" / "pixmo-docs" / "charts" / "notes.txt").write_bytes(b"y" * 9)
    assert run("--check") == 1
    assert "has 9 bytes, not 10" in capsys.readouterr().out
    assert run("--dataset", "pixmo-docs") == 0  # it is fetched again
    assert run("--check") == 0
    server.revision = "b" * 40  # the hub moves on; the locked revision is not there any more
    assert run("--dataset", "pixmo-docs") == 1
    assert "the hub has no such revision" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pixmo-docs", "pixmo-ask-model-anything"])
def test_of_a_new_revision_with_other_files_only_its_rows_are_there(server, run, tmp_path, monkeypatch, capsys, name):
    def rows(question: str) -> bytes:
        image = {"image": {"bytes": PNG, "path": None}, "questions": {"question": [question], "answer": ["red"]}}
        link = {"image_url": f"{server.url}/a.png", "image_sha256": SHA, "question": question, "answer": "red"}
        return parquet([image if name == "pixmo-docs" else link])

    def asked() -> list[str]:
        read = load_rows(str(tmp_path / "out" / name))
        return [row["texts"][0]["user"] for row in map(read.__getitem__, range(len(read)))]

    one = named(name)
    server.repos[one.repo] = {"train-0-of-2.parquet": rows("old?"), "train-1-of-2.parquet": rows("older?")}
    assert run("--dataset", name) == 0
    assert asked() == ["old?", "older?"]
    server.revision = "b" * 40
    server.repos[one.repo] = {"train-0-of-1.parquet": rows("new?")}
    monkeypatch.setitem(molmo2_sets.BY_NAME, name, replace(one, revision=server.revision))
    assert run("--dataset", name) == 0
    assert asked() == ["new?"]
    assert run("--check", "--dataset", name) == 0
    stray = tmp_path / "out" / name / "train-7.parquet"
    shutil.copy(stray.with_name("train-0-of-1.parquet"), stray)
    assert run("--check", "--dataset", name) == 1
    assert f"{stray} is not of this revision" in capsys.readouterr().out


def test_a_file_of_the_hub_that_is_not_what_its_hash_says(server, run, tmp_path, capsys):
    rows = [{"image": {"bytes": PNG, "path": None}, "qa_pairs": {"question": ["what?"], "answer": ["red"]}}]
    server.repos["allenai/CoSyn-400K"] = {"train.parquet": parquet(rows), "notes.txt": b"xx"}  # the same either way
    server.garbled = True
    assert run("--dataset", "cosyn-400k") == 1
    assert "1 files are not as the hub has them" in capsys.readouterr().err
    server.garbled = False
    server.asked.clear()
    assert run("--dataset", "cosyn-400k") == 0
    assert not any(path.endswith("notes.txt") for path in server.asked)  # what was whole is kept
    assert run("--check") == 0


def test_a_file_of_the_hub_with_a_name_that_leads_elsewhere(server, run, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    for name in ("../../../mine.txt", str(tmp_path / "mine.txt")):
        server.repos["allenai/CoSyn-400K"] = {name: b"theirs"}
        assert run("--dataset", "cosyn-400k") == 1
        assert "leads elsewhere" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"


def tar_of(**members: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("__", "/"))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def test_archives_are_unpacked_beside_themselves_and_nowhere_else(server, run, tmp_path, capsys):
    repo, folder = "lmms-lab/LLaVA-Video-178K", tmp_path / "out" / "llava-video-178k"
    said = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": "1", "video": "academic/1.mp4", "conversations": said}]
    server.repos[repo] = {"short/rows.json": json.dumps(rows).encode(), "short/1.tar.gz": tar_of(academic__1mp4=b"x")}
    assert run("--dataset", "llava-video-178k") == 0
    assert (folder / "short" / "academic" / "1mp4").read_bytes() == b"x"
    assert run("--check") == 0
    shutil.rmtree(folder)
    server.revision = "c" * 40
    server.repos[repo] = {"short/1.tar.gz": tar_of(**{"..__..__..__evil": b"x"})}
    assert run("--dataset", "llava-video-178k") == 1
    assert "1.tar.gz is not unpacked: a name or a link in it leads elsewhere" in capsys.readouterr().err
    assert not list(tmp_path.rglob("evil"))
    assert run("--check") == 1
    assert "is not unpacked" in capsys.readouterr().out


def zip_of(content: bytes) -> bytearray:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.mp4", content)
    return bytearray(file.getvalue())


def spoilt(kind: str) -> bytes:
    """A zip file that cannot be unpacked."""
    data = zip_of(b"a film " * 100)
    directory = data.rindex(b"PK\1\2")
    if kind == "data":  # no such kind of block
        data[30 + len("a.mp4")] = 0xFF
    elif kind == "encrypted":
        data[6] |= 1
        data[directory + 8] |= 1
    else:  # method 97 is none that zipfile knows
        data[8] = data[directory + 10] = 97
    return bytes(data)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("data", "is damaged (Error -3"), ("encrypted", "cannot be unpacked: File "),
     ("method", "cannot be unpacked: That compression method")],
)  # fmt: skip
def test_an_archive_that_cannot_be_unpacked_does_not_stop_the_other_sets(server, run, capsys, kind, said):
    server.repos["lmms-lab/LLaVA-Video-178K"] = {"short/1.zip": spoilt(kind)}
    rows = [{"image": {"bytes": PNG, "path": None}, "questions": {"question": ["what?"], "answer": ["red"]}}]
    server.repos["allenai/pixmo-docs"] = {"train.parquet": parquet(rows)}
    assert run("--dataset", "llava-video-178k", "--dataset", "pixmo-docs") == 1
    found = capsys.readouterr()
    assert f"1.zip {said}" in found.err
    assert "done pixmo-docs" in found.out


def test_what_fails_is_said_and_noted(server, run, tmp_path, monkeypatch, capsys):
    assert run("--dataset", "chartqa") == 1
    assert "the hub has no such data set" in capsys.readouterr().err
    assert status(tmp_path, "chartqa")["state"] == "failed"
    assert run("--dataset", "chartqa", "--skip_errors") == 0
    server.repos[QUESTIONS] = {"train.parquet": parquet(question_rows(server, "a.png"))}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: usage._replace(free=400_000))
    assert run("--dataset", QUESTIONS) == 1
    assert "1 pictures need about 0.0 GB" in capsys.readouterr().err
    assert not (tmp_path / "out" / "fetched").exists()
    server.repos[QUESTIONS] = {"train.parquet": parquet([{"question": "?", "url": "x"}])}
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: usage)
    assert run("--dataset", QUESTIONS, "--force") == 1
    assert "has no column image_url; it has question, url" in capsys.readouterr().err
    (tmp_path / "out" / ".download_status.json").write_text("{")
    assert run("--check") == 2
    assert "delete it" in capsys.readouterr().err


def test_without_a_network_the_table_is_shown(no_network, tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path / "out")]
    assert download_datasets.main(["--list", *flags]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(SETS)
    assert no_network == []
    assert download_datasets.main(["--stage", "pretraining", "--dry_run", *flags]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(of_stage("1")) + 1
    assert download_datasets.main(["--stage", "1", *flags]) == 2
    assert "does not answer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_of_them_by_one_command(tmp_path):
    script = Path(download_datasets.__file__).with_name("download_all.sh")
    environment = os.environ | {"OUTPUT_DIR": str(tmp_path / "here"), "PYTHON": sys.executable}
    done = subprocess.run([script, "--list"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(of_stage("all"))


def test_the_flags_choose_sets(tmp_path):
    def names(*flags: str) -> set[str]:
        return {one.name for one in download_datasets.wanted(download_datasets.parser().parse_args(flags))}

    assert names("--stage", "sft") == names("--stage", "2") == names("--stage", "3")
    assert names("--stage", "1") < names("--all") == names("--stage", "all")
    assert names("--pixmo-only") | names("--molmo2_only") | names("--academic-only") < names("--all")
    assert names("--dataset", "allenai/Pixmo-Docs", "--dataset", "chartqa") == {"pixmo-docs", "chartqa"}
    for flags in ([], ["--dataset", "nobody/pixmo-docs"]):
        with pytest.raises(ValueError, match="--dataset"):
            names(*flags)
    assert download_datasets.main(["--stage", "1", "--workers", "0"]) == 2
    assert named("PIXMO-cap").kind == "url"
