"""Images by URL: fetched with the flag alone, once, from public addresses, and each failure with its reason."""

import hashlib
import json
import socket
import time
import traceback

import pytest
from tiny.data import dataset
from tiny.web import PNG, SILENT, SLOW, PictureHandler, impatient, serving

from data import web_images
from data.options import RowOptions
from data.rows import load_rows
from data.web_images import FetchError, cache_folder, fetched, is_public


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Its address is one of this machine, which the tests of addresses do not allow."""
    impatient(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(web_images, "FAILED", {})
    monkeypatch.setattr(web_images, "is_public", lambda address: True)
    with serving(PictureHandler) as made:
        yield made


def test_an_image_is_fetched_once_into_the_cache(server):
    url = f"{server.url}/a.png?size=1 2&x=é"
    path = fetched(url)
    assert path.read_bytes() == PNG
    assert fetched(url) == path
    assert server.asked == ["/a.png?size=1%202&x=%C3%A9"]
    name = hashlib.sha256(url.encode()).hexdigest()
    assert path == cache_folder() / name[:2] / name
    assert [file.name for file in path.parent.iterdir()] == [name]
    assert fetched(f"{server.url}/no_length").read_bytes() == PNG
    assert fetched(f"{server.url}/moved?/moved?{server.url}/a.png").read_bytes() == PNG


@pytest.mark.parametrize(
    ("path", "wanted", "tries"),
    [
        ("nothing", "HTTP 404 Not Found", 1),
        ("garbage", "the answer is no image: image/png, it begins with b'\\x00\\x01garbage'", 1),
        ("html", "the answer is no image: text/html, it begins with b'<html>log", 1),
        ("longer", "the answer breaks off after", 3),
        ("large", "more than 1,048,576 bytes", 1),
        ("endless", "more than 1,048,576 bytes", 1),
        ("stalls", "no answer in 0.3 s", 3),
        ("drips", "no whole answer in 0.6 s", 3),
        ("always_busy", "HTTP 503 Service Unavailable", 3),
        ("circle", "more than 5 redirects", 6),
        ("moved?ftp://example.org/a.png", "is no http or https URL", 1),
        ("hangs_up", "RemoteDisconnected", 3),
        ("moved?https://[hostname]/a.png", "redirected to 'https://[hostname]/a.png', which is no URL", 1),
        ("spaced", "is no URL (URL can't contain control characters", 1),
        ("digits", "the answer cannot be read: Exceeds the limit", 1),
    ],
)
def test_what_cannot_be_fetched_has_its_reason_and_is_not_asked_for_again(server, monkeypatch, path, wanted, tries):
    for name, value in {"stalls": SILENT, "drips": SLOW}.get(path, {}).items():
        monkeypatch.setattr(web_images, name, value)
    url = f"{server.url}/{path}"
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(FetchError) as error:
            fetched(url)
        assert wanted in str(error.value)
        assert str(error.value).startswith(url)
        assert error.value.kind == "image cannot be fetched"
    assert len(server.asked) == tries
    assert time.monotonic() - began < 9  # of the others none waits until a server is given up, which takes ten seconds
    assert not list(cache_folder().rglob("*"))


@pytest.mark.parametrize(
    ("sent", "asked"),
    [
        ("é", "%C3%A9"),
        ("é".encode().decode("latin-1"), "%C3%A9"),
        ("Å".encode().decode("latin-1"), "%C3%85"),
        ("%C3%A9", "%C3%A9"),
    ],
)
def test_a_redirect_to_letters_beyond_ascii_is_followed_as_meant(server, monkeypatch, sent, asked):
    """The handler sends headers in Latin-1, as letters of that or as the bytes of UTF-8."""

    def to_letters(self, _):
        self.say(b"", status=302, Location=f"/a.png?caf{sent}")

    monkeypatch.setattr(PictureHandler, "to_letters", to_letters, raising=False)
    assert fetched(f"{server.url}/to_letters").read_bytes() == PNG
    assert server.asked[-1] == f"/a.png?caf{asked}"


def test_of_a_failure_its_words_alone_are_kept(server):
    url = f"{server.url}/garbage"
    errors = []
    for _ in range(3):
        with pytest.raises(FetchError) as error:
            fetched(url)
        errors.append(error.value)
    kept = web_images.FAILED[url]
    assert kept == (str(errors[0]), "no image")
    assert len({id(error) for error in errors}) == 3
    assert {(str(error), error.reason, error.kind) for error in errors} == {
        (str(errors[0]), "no image", "image cannot be fetched")
    }
    depths = [len(list(traceback.walk_tb(error.__traceback__))) for error in errors]
    assert depths[1] == depths[2]


def test_a_cache_that_cannot_be_written_is_named(server, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(web_images, "cache_folder", lambda: tmp_path / "file")
    with pytest.raises(FetchError, match=r"a.png: cannot be written to .*file"):
        fetched(f"{server.url}/a.png")


def test_a_busy_server_is_asked_again(server):
    assert fetched(f"{server.url}/busy").read_bytes() == PNG
    assert server.asked == ["/busy"] * 3


def test_a_shorter_answer_is_what_it_says_and_does_not_decode(server):
    assert len(fetched(f"{server.url}/shorter").read_bytes()) == 60
    assert fetched(f"{server.url}/negative").read_bytes() == PNG  # no length that could be believed


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
     "255.255.255.255", "::1", "::", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]"])
def test_no_connection_is_made_to_a_private_address(server, monkeypatch, host):
    monkeypatch.setattr(web_images, "is_public", is_public)
    with pytest.raises(FetchError, match=r"which is no public address|no such host"):
        fetched(f"http://{host}:{server.server_port}/a.png")
    assert server.asked == []


def test_a_redirect_to_a_private_address_is_not_followed(server, monkeypatch):
    """The first address is allowed here as if it were public; the one that it leads to is not."""
    monkeypatch.setattr(web_images, "is_public", lambda address: address == "127.0.0.1")
    wanted = f"/moved?http://127.0.0.2:{server.server_port}/a.png"
    with pytest.raises(FetchError, match=r"redirected to http://127.0.0.2.*127.0.0.2, which is no public address"):
        fetched(server.url + wanted)
    assert server.asked == [wanted]


def test_one_private_address_of_a_name_is_enough(server, monkeypatch):
    real = socket.getaddrinfo

    def two(host, port, **options):
        found = real("127.0.0.1", port, **options)
        return [(*found[0][:4], ("8.8.8.8", port)), *found]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    monkeypatch.setattr(web_images, "is_public", is_public)
    with pytest.raises(FetchError, match=r"127\.0\.0\.1, which is no public address"):
        fetched("http://example.org/a.png")


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///a.png", "https://[::1", "http://a:b/", "http://" + "a" * 70 + "/", "http://exa mple.org/a.png",
     "https://exa\x01mple.org/a.png", "https://[hostname]/a.png", "http://example.org/\ud800.png"],
)  # fmt: skip
def test_what_is_no_url(server, url):
    with pytest.raises(FetchError, match="is no"):
        fetched(url)


def test_rows_have_images_by_url_with_the_flag_alone(server, tmp_path):
    urls = [f"{server.url}/{name}" for name in ("a.png", "nothing", "shorter")]
    given = [*urls, {"url": urls[0]}, "s3://bucket/a.png"]
    records = [{"image": one, "question": "what?", "answer": "red"} for one in given]
    part = {"type": "image_url", "image_url": {"url": urls[0]}}
    asked = [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]
    records.append({"messages": [*asked, {"role": "assistant", "content": "red"}]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, records)))

    def reasons(fetch: bool) -> list:
        rows = load_rows(str(tmp_path / "rows.jsonl"), options=RowOptions(fetch_images=fetch))
        data = dataset([rows[i] for i in range(len(rows))])
        return [next(iter(data[0, i].dropped), "used") for i in range(len(rows))]

    assert reasons(False) == [
        *["image is a URL, which --fetch_images fetches"] * 4,
        "image is a URL of a kind that cannot be fetched",
        "image is a URL, which --fetch_images fetches",
    ]
    assert server.asked == []
    found = reasons(True)
    assert found == [
        "used", "image cannot be fetched", "image file breaks off", "used",
        "image is a URL of a kind that cannot be fetched", "used",
    ]  # fmt: skip
    assert found[1].first == f"rows.jsonl, line 2: {urls[1]}: HTTP 404 Not Found"
    assert sorted(server.asked) == ["/a.png", "/nothing", "/shorter"]
