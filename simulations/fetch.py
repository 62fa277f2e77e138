"""``medfed-simulate fetch``: public data sets from their official addresses into the layout that the cohorts read.

Licence, citation and source are shown before anything is downloaded. What does not match a known checksum is not kept; of a
file without one the checksum is shown, and that nobody vouches for it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import ssl
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medfed.command import say, say_json, say_lines
from medfed.errors import ConfigError, EnvironmentFault, ExitStatus, MedfedError, TransportError
from medfed.progress import Progress
from medfed.seams import Files, Seams
from medfed.simulations.datasets import DATASETS, Dataset, Download, data_folder

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 60.0
SOURCE_NAME = "SOURCE.txt"
_CHUNK_BYTES = 1 << 16
_MOST_REDIRECTS = 5
_AS_IT_IS = {
    "accept-encoding": "identity"
}  # archives are compressed as it is, and what is unpacked on the way has no bound
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_BY_HAND = "check the network, or download it elsewhere and copy it there by hand"


@dataclass(frozen=True, slots=True)
class Fetched:
    """One file that is there now. ``was_here``: it was before, and is as it should be."""

    path: str
    size_bytes: int
    sha256: str
    is_pinned: bool
    checked_against: str
    was_here: bool


@dataclass(frozen=True, slots=True)
class Web:
    """How the files are reached. ``mirror``: a folder of them in place of the official addresses, under the same names.

    ``is_plain_on_loopback``: also http on this machine itself, for tests; everything else is HTTPS, redirects included.
    """

    seams: Seams
    mirror: str | None = None
    proxy: str | None = None
    is_plain_on_loopback: bool = False

    @contextlib.contextmanager
    def client(self) -> Iterator[httpx.Client]:
        import httpx

        transport = self.seams.network.transport(ssl.create_default_context(), self.proxy)
        with httpx.Client(
            transport=transport,
            timeout=TIMEOUT_S,
            follow_redirects=True,
            max_redirects=_MOST_REDIRECTS,
            trust_env=False,
            event_hooks={"request": [self._require_safe]},
        ) as client:
            yield client

    def address(self, download: Download) -> str:
        return download.url if self.mirror is None else f"{self.mirror.rstrip('/')}/{download.path}"

    def _require_safe(self, request: httpx.Request) -> None:
        """Of the first request and of each redirect."""
        url = request.url
        if url.scheme == "https" or (self.is_plain_on_loopback and url.scheme == "http" and url.host in _LOOPBACK):
            return
        raise TransportError(617, f"{url.scheme} address of {url.host} refused", "only HTTPS is used")


def fetch(name: str, folder: Path, web: Web) -> list[Fetched]:
    """Download a data set's files into ``folder`` and its own folder within; what is there and right stays.

    Raises: ``ConfigError`` MF-203 for an unknown name; ``TransportError`` MF-610 to 617 where an address cannot be reached;
    ``MedfedError`` MF-321 for a file that is not the known one, MF-609 for one that is too large.

    *Guarantees* Each file appears whole and checked, or not at all; nothing is left of a download that failed.
    """
    dataset = dataset_of(name)
    place = folder / dataset.folder
    files = web.seams.files
    fetched: list[Fetched] = []
    for download in dataset.downloads:
        here = _already_here(files, place, download)
        fetched += here or _laid_out(files, place, download, _download(web, download))
    files.write(place / SOURCE_NAME, ("\n".join(_introduction(dataset)) + "\n").encode())
    return fetched


def dataset_of(name: str) -> Dataset:
    """The data set of this name. Raises ``ConfigError`` MF-203."""
    if name not in DATASETS:
        what = f"{name[:40]!a} is no data set to fetch"
        raise ConfigError(203, what, f"choose one of {', '.join(DATASETS)}; the other cohorts need none")
    return DATASETS[name]


def _introduction(dataset: Dataset) -> list[str]:
    """What whoever uses the data has to know."""
    return [
        dataset.title,
        f"  licence: {dataset.licence}",
        f"  cite: {dataset.citation} {dataset.page}",
        *(f"  from: {download.url}" for download in dataset.downloads),
    ]


# ------------------------------------------------------------------------------------------------------------ one file


def _download(web: Web, download: Download) -> bytes:
    """The checked content of one file."""
    address = web.address(download)
    with _named_faults(download), web.client() as client, client.stream("GET", address, headers=_AS_IT_IS) as response:
        if response.status_code != 200:
            raise TransportError(
                610, f"{response.url.host} answers {response.status_code} for {download.path}", _BY_HAND
            )
        data = _received(response, download)
    _require_known(data, download.path, download.checksum)
    return data


def _received(response: httpx.Response, download: Download) -> bytes:
    announced = response.headers.get("content-length", "")
    size = int(announced) if announced.isdecimal() and len(announced) < 16 else 0
    data = bytearray()
    with Progress(download.path, max(size, 1) // 1024 or 1, sys.stderr) as bar:
        for chunk in response.iter_raw(_CHUNK_BYTES):
            data += chunk
            if max(len(data), size) > download.limit_bytes:
                what = f"{download.path} is larger than {download.limit_bytes} bytes"
                raise MedfedError(609, what, "this is not the known file")
            bar.update(min(len(data), size or len(data)) // 1024, "KiB")
    return bytes(data)


@contextlib.contextmanager
def _named_faults(download: Download) -> Iterator[None]:
    """Turn faults of the network into one line; which kind only the library's own classes tell."""
    import httpx

    try:
        yield
    except httpx.ProxyError as error:
        raise TransportError(613, "the proxy refuses", "check --proxy") from error
    except httpx.TooManyRedirects as error:
        raise TransportError(617, f"{download.path} is redirected without end", _BY_HAND) from error
    except httpx.ConnectError as error:
        if "CERTIFICATE" in str(error):
            what = f"the certificate of {httpx.URL(download.url).host} is not trusted"
            raise TransportError(612, what, "set SSL_CERT_FILE if this network has an authority of its own") from error
        raise TransportError(610, f"{download.path} cannot be reached", _BY_HAND) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise TransportError(610, f"{download.path} did not arrive ({type(error).__name__})", _BY_HAND) from error


def _require_known(data: bytes, name: str, checksum: str | None) -> None:
    """Raise MF-321 unless the bytes have this checksum; None is known of nobody and passes."""
    if checksum is None:
        return
    kind, _, expected = checksum.partition(":")
    digest = hashlib.new(kind, data, usedforsecurity=False).hexdigest()
    if digest != expected:
        what = f"{name} has {kind} {digest[:16]}..., not the known {expected[:16]}..."
        raise MedfedError(
            321, what, "nothing was kept; the address may have changed, or somebody altered it on the way"
        )


def _laid_out(files: Files, place: Path, download: Download, data: bytes) -> list[Fetched]:
    """Write the file, or what is wanted of the archive; all is checked before the first is written."""
    if not download.unpack:
        files.make_folder(place)
        files.write(place / download.path, data)
        return [_fetched(download.path, data, download, was_here=False)]
    members = _unpacked(download, data)
    files.make_folder(place)
    for name, content in members.items():
        files.write(place / name, content)
    return [_fetched(name, content, download, was_here=False) for name, content in members.items()]


def _unpacked(download: Download, data: bytes) -> dict[str, bytes]:
    members = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name, sha256 in download.unpack:
                if archive.getinfo(name).file_size > download.limit_bytes:
                    raise MedfedError(609, f"{name} in {download.path} is too large", "this is not the known file")
                members[name] = archive.read(name)
                _require_known(members[name], name, f"sha256:{sha256}")
    except (zipfile.BadZipFile, KeyError) as error:
        what = f"{download.path} is not the archive it should be"
        raise MedfedError(321, what, "nothing was kept; try again later") from error
    return members


def _already_here(files: Files, place: Path, download: Download) -> list[Fetched]:
    """The files of this download if all are there; raises MF-212 if one is there and is another."""
    members: list[tuple[str, str | None]] = [(name, f"sha256:{sha256}") for name, sha256 in download.unpack]
    wanted = members or [(download.path, download.checksum)]
    if not all(files.exists(place / name) for name, _ in wanted):
        return []
    found = []
    for name, checksum in wanted:
        data = files.read(place / name)
        try:
            _require_known(data, name, checksum)
        except MedfedError as error:
            raise EnvironmentFault(212, f"{name} is there and is not the known file", "move it away first") from error
        found.append(_fetched(name, data, download, was_here=True))
    return found


def _fetched(name: str, data: bytes, download: Download, *, was_here: bool) -> Fetched:
    against = download.pinned_by if download.checksum is not None else "nothing: no checksum is known"
    digest = hashlib.sha256(data).hexdigest()
    return Fetched(name, len(data), digest, download.checksum is not None, against, was_here)


# -------------------------------------------------------------------------------------------------------- the command


def fetch_command(arguments: argparse.Namespace, seams: Seams) -> int:
    """``medfed-simulate fetch``."""
    dataset = dataset_of(arguments.name)
    folder: Path = arguments.to or data_folder() or Path("data")
    if not arguments.json:
        say_lines(_introduction(dataset))
    fetched = fetch(arguments.name, folder, Web(seams, arguments.mirror, arguments.proxy))
    if arguments.json:
        say_json(
            {"name": dataset.name, "folder": str(folder), "licence": dataset.licence, "source": dataset.source}
            | {"files": [asdict(file) for file in fetched]}
        )
        return ExitStatus.HANDLED
    for file in fetched:
        state = "was here" if file.was_here else "written"
        say(f"  {state}: {folder / dataset.folder / file.path}, {file.size_bytes:,} bytes, SHA-256 {file.sha256}")
        say(f"    {'matches' if file.is_pinned else 'NOT PINNED, checked against'} {file.checked_against}")
    if data_folder() is None or data_folder() != folder:
        say(f"Next: export MEDFED_DATA={folder.absolute()}")
    say(f"      medfed-simulate run --cohort {dataset.name}")
    return ExitStatus.HANDLED
