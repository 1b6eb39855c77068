"""Pictures behind links are fetched or have a reason: servers of this machine that misbehave."""

import hashlib
import io
import json
import shutil
import ssl
import subprocess
import sys

import pytest
from PIL import Image, UnidentifiedImageError
from tiny.data import encoded, picture
from tiny.web import PNG, SILENT, SLOW, HubHandler, local

from data import images, web_images
from data.fetching import hosts, pictures
from data.fetching.pictures import Fetcher, check_picture, known_failures
from data.web_images import FetchError, fetch_into, place_of

SHA = hashlib.sha256(PNG).hexdigest()
BAD = {
    "nothing": "HTTP 404",
    "garbage": "no image",
    "html": "no image",
    "cut": "no picture that decodes",
    "longer": "answer breaks off",
    "shorter": "no picture that decodes",
    "large": "too large",
    "always_busy": "HTTP 503",
    "circle": "too many redirects",
    "hangs_up": "connection breaks off",
    "moved?ftp://example.org/a.png": "no URL",
    "moved?http://127.0.0.2/a.png": "no public address",
    "moved?http://169.254.169.254/latest": "no public address",
    "moved?https://[hostname]/a.png": "no URL",
    "spaced": "no URL",
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
    tried = {"longer", "always_busy", "hangs_up"}
    assert {path.split("?")[0].strip("/") for path in server.asked} == tried
    assert (again.there, again.new, again.reasons) == (len(good), 0, found.reasons)
    server.asked.clear()
    fetcher.fetch({url: sha for url, sha in hashes.items() if url.endswith("/nothing")}, again=True)
    assert server.asked == ["/nothing"]


@pytest.mark.parametrize(
    ("path", "patience", "reason"),
    [("stalls", SILENT, "no answer in time"), ("drips", SLOW, "no whole answer in time")],
)
def test_a_server_that_takes_too_long_is_given_up_and_asked_once_more(
    server, tmp_path, monkeypatch, path, patience, reason
):
    for name, value in patience.items():
        monkeypatch.setattr(web_images, name, value)
    fetcher = Fetcher(tmp_path / "fetched", tmp_path / "failures.jsonl", 8, 8, local, say=lambda _: None)
    for _ in range(2):
        server.asked.clear()
        assert fetcher.fetch({f"{server.url}/{path}": ""}).reasons == {reason: 1}
        assert set(server.asked) == {f"/{path}"}


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


def test_a_smaller_fetch_keeps_the_failures_of_a_larger_one(server, tmp_path):
    urls = {f"{server.url}/{path}": "" for path in ("a.png", "nothing?1", "nothing?2", "always_busy")}
    fetcher = Fetcher(tmp_path / "fetched", tmp_path / "failures.jsonl", 1, 1, local, say=lambda _: None)
    assert fetcher.fetch(urls).failed == 3
    first = known_failures(tmp_path / "failures.jsonl")
    assert len(first) == 3
    found = fetcher.fetch(dict.fromkeys([f"{server.url}/a.png", f"{server.url}/nothing?1"], ""))
    assert (found.there, found.failed) == (1, 1)
    assert known_failures(tmp_path / "failures.jsonl") == first
    place = place_of(tmp_path / "fetched", f"{server.url}/always_busy")  # another set has fetched it meanwhile
    place.parent.mkdir(parents=True)
    place.write_bytes(PNG)
    fetcher.fetch({f"{server.url}/a.png": ""})
    assert known_failures(tmp_path / "failures.jsonl").keys() == first.keys() - {f"{server.url}/always_busy"}


def test_pictures_that_training_reads_are_kept(server, tmp_path, monkeypatch):
    """Beyond PIL's own limit on pixels, in several threads, and in HEIC; not beyond that of data.images."""
    pillow_heif = pytest.importorskip("pillow_heif")
    heic = io.BytesIO()
    pillow_heif.from_pillow(picture(width=64, height=64)).save(heic)
    files = {f"big{i}": encoded(picture(width=40, height=20, seed=i)) for i in range(12)} | {"heic": heic.getvalue()}
    files["huge"] = encoded(picture(width=65, height=64))
    HubHandler.file_of = lambda self, name: self.say(files[name])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # twice as many are an error
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 64)
    fetcher = Fetcher(tmp_path / "fetched", tmp_path / "failures.jsonl", 8, 8, local, say=lambda _: None)
    found = fetcher.fetch({f"{server.url}/file_of?{name}": "" for name in files})
    assert (found.new, found.reasons) == (13, {"no picture that decodes": 1})
    assert "65 x 64 pixels are more than" in (tmp_path / "failures.jsonl").read_text()
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_picture_that_needs_a_package_is_asked_for_again(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(Image, "open", unidentified)
    with pytest.raises(FetchError, match="pip install") as error:
        check_picture(b"\0\0\0\x18ftypheic")
    assert (error.value.reason, error.value.again) == ("HEIC image, which needs pillow-heif", True)


def unidentified(*_):
    raise UnidentifiedImageError


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


def test_malformed_urls_and_unexpected_errors_are_one_failed_picture_each(server, tmp_path, monkeypatch):
    wanted = {"http://exa mple.org/a.png": "no URL", "https://[hostname]/a.png": "no URL",
              "http://example.org/\ud800.png": "no URL", f"{server.url}/strange": "unexpected error"}  # fmt: skip
    real = pictures.fetch_into

    def strange(folder, url, *more):
        if url.endswith("strange"):
            raise RuntimeError("nobody knows")
        return real(folder, url, *more)

    monkeypatch.setattr(pictures, "fetch_into", strange)
    fetcher = Fetcher(tmp_path / "fetched", tmp_path / "failures.jsonl", 1, 1, local, say=lambda _: None)
    found = fetcher.fetch(dict.fromkeys([*wanted, f"{server.url}/a.png"], ""))
    assert (found.new, found.stopped) == (1, "")
    lines = map(json.loads, (tmp_path / "failures.jsonl").read_text().splitlines())
    assert {one["url"]: (one["reason"], one["again"]) for one in lines} == {
        url: (reason, False) for url, reason in wanted.items()
    }
