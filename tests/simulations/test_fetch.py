"""``medfed-simulate fetch`` against a server on this machine: what is known is kept, all else leaves nothing behind."""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import threading
import zipfile

import pytest

from medfed.errors import ConfigError, EnvironmentFault, MedfedError, TransportError
from medfed.seams import system_seams
from medfed.simulations import fetch as fetching
from medfed.simulations.cli import main
from medfed.simulations.datasets import DATASETS, Dataset, Download
from medfed.simulations.fetch import SOURCE_NAME, Web, fetch

CONTENT = b"condition_label,medical_abstract\n" + b"1,a tumour\n" * 20_000
SET = "tiny"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def zipped(**files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name.replace("_", "."), data)
    return out.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers from ``pages``: path -> (status, headers, body)."""

    def do_GET(self):
        status, headers, body = self.server.pages.get(self.path, (404, {}, b"not here"))
        self.server.asked.append((self.path, self.headers["Accept-Encoding"]))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the other side may have heard enough
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.pages, listening.asked = {}, []
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield listening
        listening.shutdown()
        thread.join()


@pytest.fixture
def web(server):
    mirror = f"http://127.0.0.1:{server.server_address[1]}/mirror/"
    return Web(system_seams(), mirror, is_plain_on_loopback=True)


@pytest.fixture
def known(monkeypatch):
    """Put a small data set into the table: ``known(checksum=..., unpack=...)``."""

    def put(*downloads, **changes):
        one = Download(
            "https://data.example/table.csv", "table.csv", f"sha256:{sha256(CONTENT)}", "its publisher", 1 << 20
        )
        files = downloads or (dataclasses.replace(one, **changes),)
        dataset = Dataset(
            SET, "tiny_set", "A tiny set", "CC BY 4.0", "Someone 2020,", "doi", "table", files, (("table.csv",),)
        )
        monkeypatch.setitem(DATASETS, SET, dataset)
        return one

    return put


def nothing_in(folder):
    return not any(path.is_file() for path in folder.rglob("*"))


# ---------------------------------------------------------------------------------------------------------- what is kept


def test_fetch_keeps_a_file_that_matches_its_checksum_and_its_source(server, web, known, tmp_path):
    known()
    server.pages["/mirror/table.csv"] = (200, {}, CONTENT)
    (file,) = fetch(SET, tmp_path, web)
    assert (tmp_path / "tiny_set" / "table.csv").read_bytes() == CONTENT
    assert (file.size_bytes, file.sha256, file.is_pinned, file.was_here) == (len(CONTENT), sha256(CONTENT), True, False)
    assert "CC BY 4.0" in (tmp_path / "tiny_set" / SOURCE_NAME).read_text()
    assert {path.name for path in (tmp_path / "tiny_set").iterdir()} == {"table.csv", SOURCE_NAME}
    assert server.asked == [("/mirror/table.csv", "identity")]


def test_fetch_again_downloads_nothing(server, web, known, tmp_path):
    known()
    server.pages["/mirror/table.csv"] = (200, {}, CONTENT)
    fetch(SET, tmp_path, web)
    (file,) = fetch(SET, tmp_path, web)
    assert file.was_here
    assert len(server.asked) == 1


def test_fetch_accepts_the_publishers_md5(server, web, known, tmp_path):
    known(checksum=f"md5:{hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()}")
    server.pages["/mirror/table.csv"] = (200, {}, CONTENT)
    assert fetch(SET, tmp_path, web)[0].is_pinned
    known(checksum=f"md5:{'0' * 32}")
    with pytest.raises(EnvironmentFault, match="MF-212"):
        fetch(SET, tmp_path, web)


def test_fetch_without_a_known_checksum_says_so(server, web, known, tmp_path):
    known(checksum=None)
    server.pages["/mirror/table.csv"] = (200, {}, CONTENT)
    (file,) = fetch(SET, tmp_path, web)
    assert not file.is_pinned
    assert file.sha256 == sha256(CONTENT)
    assert "no checksum is known" in file.checked_against


def test_fetch_takes_the_wanted_files_of_an_archive(server, web, known, tmp_path):
    data = zipped(a_data=b"one", b_data=b"two", passwords=b"three")
    members = (("a.data", sha256(b"one")), ("b.data", sha256(b"two")))
    known(path="set.zip", checksum=None, unpack=members)
    server.pages["/mirror/set.zip"] = (200, {}, data)
    assert [file.path for file in fetch(SET, tmp_path, web)] == ["a.data", "b.data"]
    assert {path.name for path in (tmp_path / "tiny_set").iterdir()} == {"a.data", "b.data", SOURCE_NAME}
    assert all(file.was_here for file in fetch(SET, tmp_path, web))


def test_fetch_follows_a_redirect_on_the_way(server, web, known, tmp_path):
    known()
    server.pages["/mirror/table.csv"] = (302, {"Location": "/elsewhere"}, b"")
    server.pages["/elsewhere"] = (200, {}, CONTENT)
    fetch(SET, tmp_path, web)
    assert (tmp_path / "tiny_set" / "table.csv").read_bytes() == CONTENT


# ------------------------------------------------------------------------------------------------------- what is not kept


@pytest.mark.parametrize(
    ("page", "changes", "code"),
    [
        ((200, {}, CONTENT + b"x"), {}, 321),
        ((200, {}, CONTENT), {"limit_bytes": 1000}, 609),
        ((200, {}, b""), {}, 321),
        ((404, {}, b"gone"), {}, 610),
        ((500, {}, b""), {}, 610),
        ((200, {"Content-Length": str(len(CONTENT) + 5)}, CONTENT), {}, 610),
        ((302, {"Location": "http://data.example/table.csv"}, b""), {}, 617),
        ((302, {"Location": "/mirror/table.csv"}, b""), {}, 617),
        ((200, {}, b"no archive"), {"checksum": None, "unpack": (("a.data", sha256(b"one")),)}, 321),
        ((200, {}, zipped(b_data=b"")), {"checksum": None, "unpack": (("a.data", sha256(b"one")),)}, 321),
        ((200, {}, zipped(a_data=b"1")), {"checksum": None, "unpack": (("a.data", sha256(b"one")),)}, 321),
        (
            (200, {}, zipped(a_data=b"0" * 2000)),
            {"checksum": None, "limit_bytes": 1000, "unpack": (("a.data", ""),)},
            609,
        ),
    ],
)
def test_fetch_that_fails_leaves_nothing(server, web, known, tmp_path, page, changes, code):
    known(**changes)
    server.pages["/mirror/table.csv"] = page
    with pytest.raises(MedfedError) as caught:
        fetch(SET, tmp_path, web)
    assert caught.value.code == code
    assert nothing_in(tmp_path)


def test_fetch_stops_reading_what_has_no_end(server, web, known, tmp_path):
    """No length is announced: the limit holds all the same."""
    known(limit_bytes=100_000)
    server.pages["/mirror/table.csv"] = (200, {"Content-Length": ""}, CONTENT * 10)
    with pytest.raises(MedfedError) as caught:
        fetch(SET, tmp_path, web)
    assert caught.value.code == 609
    assert nothing_in(tmp_path)


def test_fetch_of_two_files_keeps_the_first_when_the_second_fails(server, web, known, tmp_path):
    """So that the next call has only the second to do."""
    one = known()
    two = dataclasses.replace(one, path="more.csv")
    known(one, two)
    server.pages["/mirror/table.csv"] = (200, {}, CONTENT)
    with pytest.raises(TransportError, match="MF-610"):
        fetch(SET, tmp_path, web)
    server.pages["/mirror/more.csv"] = (200, {}, CONTENT)
    assert [file.was_here for file in fetch(SET, tmp_path, web)] == [True, False]


def test_fetch_does_not_replace_another_file(server, web, known, tmp_path):
    known()
    server.pages["/mirror/table.csv"] = (200, {}, CONTENT)
    (tmp_path / "tiny_set").mkdir()
    (tmp_path / "tiny_set" / "table.csv").write_bytes(b"mine")
    with pytest.raises(EnvironmentFault, match="MF-212"):
        fetch(SET, tmp_path, web)
    assert (tmp_path / "tiny_set" / "table.csv").read_bytes() == b"mine"


def test_fetch_refuses_plain_http_even_on_this_machine(server, web, known, tmp_path):
    known()
    server.pages["/mirror/table.csv"] = (200, {}, CONTENT)
    with pytest.raises(TransportError, match="MF-617"):
        fetch(SET, tmp_path, dataclasses.replace(web, is_plain_on_loopback=False))
    with pytest.raises(TransportError, match="MF-617"):
        fetch(SET, tmp_path, dataclasses.replace(web, mirror="http://data.example"))
    assert server.asked == []


def test_fetch_without_a_network_says_so_in_one_line(known, tmp_path, capsys, monkeypatch):
    known()
    monkeypatch.setattr(fetching, "TIMEOUT_S", 5.0)
    arguments = ["fetch", SET, "--to", str(tmp_path), "--from", "https://127.0.0.1:1", "--json"]
    assert main(arguments) == 6
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("MF-610 table.csv cannot be reached")
    assert nothing_in(tmp_path)


# ------------------------------------------------------------------------------------------------------------ the table


def test_fetch_command_shows_licence_and_source_and_the_next_step(server, web, known, tmp_path, capsys, monkeypatch):
    known()
    server.pages["/mirror/table.csv"] = (200, {}, CONTENT)
    fetch(SET, tmp_path, web)
    monkeypatch.delenv("MEDFED_DATA", raising=False)
    assert main(["fetch", SET, "--to", str(tmp_path)]) == 0  # all is here: no network is needed
    said = capsys.readouterr().out
    for words in ("CC BY 4.0", "cite: Someone 2020", "https://data.example/table.csv", sha256(CONTENT), "MEDFED_DATA="):
        assert words in said
    assert main(["fetch", SET, "--to", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["is_pinned"] is True


def test_fetch_of_an_unknown_set_names_those_there_are():
    with pytest.raises(ConfigError, match=r"MF-203 .*pneumonia"):
        fetch("synthetic-images", None, Web(system_seams()))


def test_table_of_data_sets_holds_https_addresses_and_whole_checksums():
    lengths = {"sha256": 64, "md5": 32}
    for dataset in DATASETS.values():
        assert dataset.licence
        for download in dataset.downloads:
            assert download.url.startswith("https://")
            kind, _, digits = download.checksum.partition(":")
            assert len(digits) == lengths[kind]
            assert all(len(sha) == 64 for _, sha in download.unpack)
        laid_out = {name for each in dataset.downloads for name in ([n for n, _ in each.unpack] or [each.path])}
        assert any(set(way) <= laid_out for way in dataset.needs)
