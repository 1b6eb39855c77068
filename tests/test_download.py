"""Public data sets are downloaded whole or with a reason: a hub and servers of this machine that misbehave."""

import hashlib
import io
import json
import os
import shutil
import ssl
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from tiny.data import encoded, picture
from tiny.web import PNG, HubHandler, impatient, serving

from data import web_images
from data.fetching import download as downloads
from data.fetching import hosts, hub, pictures
from data.fetching.download import Options
from data.fetching.pictures import Fetcher
from data.molmo2_sets import SETS, named, of_stage
from data.rows import load_rows
from data.web_images import FetchError, fetch_into, place_of
from scripts import download_datasets

REVISION = "a" * 40
SHA = hashlib.sha256(PNG).hexdigest()
QUESTIONS = "allenai/pixmo-ask-model-anything"


def local(address: str) -> bool:
    return address == "127.0.0.1"


def parquet(rows: list[dict]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    impatient(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(pictures, "PAUSE_S", 0.05)
    monkeypatch.setattr(hub, "WAITS_S", (0.0, 0.0))
    with serving(HubHandler) as made:
        made.repos, made.revision = {}, REVISION
        yield made


@pytest.fixture
def run(server, tmp_path):
    """run(flag, ...) is the exit code."""

    def call(*flags: str) -> int:
        options = Options(tmp_path, endpoint=server.url, is_allowed=local)
        return download_datasets.main([*flags, "--output-dir", str(tmp_path / "out")], options)

    return call


def status(tmp_path, name: str) -> dict:
    return json.loads((tmp_path / "out" / ".download_status.json").read_text())[name]


# Pictures


BAD = {
    "nothing": "HTTP 404",
    "garbage": "no image",
    "html": "no image",
    "cut": "no picture that decodes",
    "longer": "answer breaks off",
    "shorter": "no picture that decodes",
    "large": "too large",
    "stalls": "no answer in time",
    "drips": "no whole answer in time",
    "always_busy": "HTTP 503",
    "circle": "too many redirects",
    "hangs_up": "connection breaks off",
    "moved?ftp://example.org/a.png": "no URL",
    "moved?http://127.0.0.2/a.png": "no public address",
    "moved?http://169.254.169.254/latest": "no public address",
    "other": "another image than the row's",
}


def test_pictures_are_fetched_or_have_a_reason(server, tmp_path, monkeypatch):
    good = ["a.png", "no_length", "busy", "busy?429", "busy?500", "moved?/a.png"]
    hashes = {f"{server.url}/{path}": "" for path in (*good, *BAD)}
    hashes |= {f"{server.url}/a.png": SHA, f"{server.url}/other": "0" * 64}
    HubHandler.other, HubHandler.cut = HubHandler.a_png, lambda self, _: self.say(PNG[:60])
    fetcher = Fetcher(tmp_path / "fetched", tmp_path / "failures.jsonl", 8, 8, local, say=lambda _: None)
    monkeypatch.setattr(hosts, "FAILURES", 100)
    found = fetcher.fetch(hashes)
    lines = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert {one["url"].removeprefix(f"{server.url}/"): one["reason"] for one in lines} == BAD
    assert (found.there, found.new, found.failed) == (0, len(good), len(BAD))
    assert found.reasons["no public address"] == 2
    assert all(place_of(tmp_path / "fetched", f"{server.url}/{path}").read_bytes() == PNG for path in good)
    assert len([path for path in (tmp_path / "fetched").rglob("*") if path.is_file()]) == len(good)
    # Once more: what is there and what failed for good is not asked for.
    server.asked.clear()
    again = fetcher.fetch(hashes)
    tried = {"longer", "stalls", "drips", "always_busy", "hangs_up"}
    assert {path.split("?")[0].strip("/") for path in server.asked} == tried
    assert (again.there, again.new, again.reasons) == (len(good), 0, found.reasons)
    server.asked.clear()
    fetcher.fetch({url: sha for url, sha in hashes.items() if url.endswith("/nothing")}, again=True)
    assert server.asked == ["/nothing"]


def test_private_addresses_are_refused_unless_they_are_allowed(server, tmp_path):
    with pytest.raises(FetchError, match="no public address") as error:
        fetch_into(tmp_path, f"{server.url}/a.png")
    assert (error.value.reason, server.asked) == ("no public address", [])
    assert fetch_into(tmp_path, f"{server.url}/a.png", is_allowed=local).read_bytes() == PNG


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_that_nobody_signed_is_refused(server, tmp_path):
    files = [str(tmp_path / name) for name in ("key.pem", "certificate.pem")]
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj",
            "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", files[0], "-out",
            files[1]]  # fmt: skip
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files[1], files[0])
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    url = f"{server.url.replace('http:', 'https:')}/a.png"
    with pytest.raises(FetchError) as error:
        fetch_into(tmp_path, url, is_allowed=local)
    assert (error.value.reason, error.value.again, server.asked) == ("certificate not valid", False, [])


def test_a_killed_fetch_continues(server, tmp_path, monkeypatch):
    urls = {f"{server.url}/a.png?{i}": "" for i in range(12)} | {f"{server.url}/nothing?{i}": "" for i in range(4)}
    fetcher = Fetcher(tmp_path / "fetched", tmp_path / "failures.jsonl", 1, 1, local, say=lambda _: None)
    real, calls = pictures.fetch_into, []

    def killed(*args, **more):
        calls.append(args)
        if len(calls) > 8:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(pictures, "fetch_into", killed)
    with pytest.raises(KeyboardInterrupt):
        fetcher.fetch(urls)
    with (tmp_path / "failures.jsonl").open("a") as file:
        file.write('{"url": "http://cut o')
    monkeypatch.setattr(pictures, "fetch_into", real)
    asked = list(server.asked)
    found = fetcher.fetch(urls)
    assert len(asked) == 8
    assert sorted(server.asked) == sorted(url.removeprefix(server.url) for url in urls)  # each once
    assert (found.there + found.new, found.reasons) == (12, {"HTTP 404": 4})


def test_the_time_that_a_server_asks_for_is_kept(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(web_images.time, "sleep", waits.append)
    HubHandler.later = lambda self, seconds: self.say(b"", status=429, Retry_After=seconds)
    for seconds, wanted in (("7", 7.0), ("100000", web_images.LONGEST_WAIT_S), ("soon", 0.0)):
        with pytest.raises(FetchError, match="HTTP 429") as error:
            fetch_into(tmp_path, f"{server.url}/later?{seconds}", is_allowed=local)
        assert waits == [wanted] * 2
        assert error.value.wait_s == wanted
        waits.clear()


def test_a_host_that_never_answers_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "FAILURES", 3)
    urls = {f"http://127.0.0.1:9/{i}": "" for i in range(10)}
    fetcher = Fetcher(tmp_path / "fetched", tmp_path / "failures.jsonl", 1, 1, local, say=lambda _: None)
    assert fetcher.fetch(urls).reasons == {"no connection": 3, "host given up": 7}


def test_a_full_disk_ends_the_fetch(server, tmp_path, monkeypatch):
    def full(*args, **_):
        raise FetchError("cannot be written: no space left", web_images.NOT_WRITTEN, again=True)

    monkeypatch.setattr(pictures, "fetch_into", full)
    fetcher = Fetcher(tmp_path, tmp_path / "failures.jsonl", 1, 1, local, say=lambda _: None)
    found = fetcher.fetch({f"{server.url}/a.png?{i}": "" for i in range(9)})
    assert (found.failed, found.stopped) == (1, "cannot be written: no space left")


# Data sets


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
    assert "is damaged" in capsys.readouterr().err
    assert not list(tmp_path.rglob("evil"))
    assert run("--check") == 1
    assert "is not unpacked" in capsys.readouterr().out


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
