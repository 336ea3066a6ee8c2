"""Checkpoints from ModelScope over plain HTTP, with resume and checked content; its own client is not needed.

Two addresses of its API are used: the recursive file list (path, size, SHA-256) and the file itself, with `Range`.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import ssl
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from quasr.errors import HubError, ModelNotFoundError, OptionError
from quasr.weights.record import (
    CONFIG_FILES,
    Listing,
    LocalFile,
    RemoteFile,
    Source,
    check_cached,
    content_fits,
    digest,
    read_record,
    report_changes,
    storage_error,
    wanted,
    write_record,
    wrong_sizes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quasr.weights.hub import HubOptions

ENDPOINT = "https://www.modelscope.cn"
DEFAULT_REVISION = "master"

TIMEOUT = 60
"""Seconds without a byte after which a connection counts as dead."""

ATTEMPTS = 6
"""Connections in a row that may bring nothing before a file is given up."""

PAUSE = 0.5
"""Seconds before the second fruitless attempt; doubles each time."""

PIECE_BYTES = 1 << 20

CUT = (ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
"""What a broken connection raises while a file arrives."""


@dataclass(frozen=True, slots=True)
class Repository:
    """One model at one revision, and where it lies here."""

    model: str
    revision: str
    endpoint: str
    folder: Path

    @property
    def parts(self) -> Path:
        """Where files grow until they are whole."""
        return self.folder.with_name(f".{self.folder.name}.parts")

    def address(self, what: str, **query: str) -> str:
        """A URL of the API; `what` is `repo` or `repo/files`."""
        return f"{self.endpoint}/api/v1/models/{self.model}/{what}?{urlencode({'Revision': self.revision, **query})}"


def fetch(model: str, options: HubOptions) -> Path:
    """The cached folder, up to date and with every file's content checked once. See `hub.resolve`."""
    repository = _repository(model, options)
    if options.offline:
        return _cached(repository)
    with _one_line_errors(model, is_cached=read_record(repository.folder) is not None):
        _update(repository, _ask(repository))
    return repository.folder


def fetch_config(model: str, options: HubOptions) -> Path:
    """A folder of its own with the configuration, up to date. See `hub.resolve_config`."""
    whole = _repository(model, options)
    bare = replace(whole, folder=whole.folder.with_name(f"config-of-{whole.folder.name}"))
    is_cached = read_record(bare.folder) is not None
    if options.offline:
        return _cached(bare if is_cached else whole)
    with _one_line_errors(model, is_cached=is_cached):
        listing = _ask(bare).config_only()
        if CONFIG_FILES[0] not in listing.files:
            raise ModelNotFoundError(f"{model} has no {CONFIG_FILES[0]}: it is no checkpoint")
        _update(bare, listing)
    return bare.folder


def _cached(repository: Repository) -> Path:
    """The folder as it is. Raises ModelNotFoundError and CheckpointError."""
    if read_record(repository.folder) is None:
        raise ModelNotFoundError(
            f"{repository.model} ({repository.revision}) is not in the cache: run once without --offline"
        )
    return check_cached(repository.folder, repository.model)


def _update(repository: Repository, listing: Listing) -> None:
    """Brings the folder to what the hub lists."""
    old = read_record(repository.folder)
    kept = _unchanged(repository, listing, old)
    stale = {name: file for name, file in listing.files.items() if name not in kept}
    if stale or old is None or old.files.keys() != kept.keys():
        fresh = _download(repository, stale)
        source = Source("modelscope", repository.model, repository.revision, listing.commit, {**kept, **fresh})
        _install(repository, source, stale)
        report_changes(repository.model, old, source)


def _repository(model: str, options: HubOptions) -> Repository:
    endpoint = (os.environ.get("MODELSCOPE_ENDPOINT") or ENDPOINT).rstrip("/")
    if not endpoint.startswith(("https://", "http://")):
        raise OptionError(f"MODELSCOPE_ENDPOINT {endpoint!r} is no http address")
    revision = options.revision or DEFAULT_REVISION
    root = options.cache_dir or os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "quasr" / "modelscope"
    folder = Path(root) / f"models--{model.replace('/', '--')}" / f"revision-{quote(revision, safe='')}"
    return Repository(model, revision, endpoint, folder)


def _ask(repository: Repository) -> Listing:
    """What the hub has now."""
    with _open(repository.address("repo/files", Recursive="true")) as response:
        answer = json.load(response)
    entries = [entry for entry in answer["Data"]["Files"] if entry["Type"] != "tree" and wanted(entry["Path"])]
    files = {entry["Path"]: RemoteFile(int(entry["Size"]), entry.get("Sha256") or None) for entry in entries}
    dated = sorted((entry.get("CommittedDate") or 0, str(entry.get("Revision") or "")) for entry in entries)
    return Listing(dated[-1][1] if dated else "", files)


def _unchanged(repository: Repository, listing: Listing, old: Source | None) -> dict[str, LocalFile]:
    """The recorded files that are whole here and the same there."""
    known = old.files if old else {}
    damaged = wrong_sizes(repository.folder, known)
    return {
        name: known[name]
        for name, remote in listing.files.items()
        if name in known
        and name not in damaged
        and known[name].size == remote.size
        and remote.sha256 in (None, known[name].sha256)
    }


def _download(repository: Repository, files: dict[str, RemoteFile]) -> dict[str, LocalFile]:
    """Brings all files into `parts`, each with its content checked."""
    with _progress(sum(file.size for file in files.values())) as advance:
        return {name: _download_file(repository, name, file, advance) for name, file in files.items()}


def _download_file(repository: Repository, name: str, remote: RemoteFile, advance: Callable[[int], None]) -> LocalFile:
    part = _part(repository, name, remote)
    part.parent.mkdir(parents=True, exist_ok=True)
    advance(_size(part))
    fruitless, failure = 0, None
    while _size(part) < remote.size and fruitless < ATTEMPTS:
        before = _size(part)
        time.sleep(PAUSE * 2 ** (fruitless - 1) if fruitless else 0)
        try:
            _continue(repository.address("repo", FilePath=name), part, remote.size, advance)
        except CUT as error:
            failure = error
        fruitless = fruitless + 1 if _size(part) <= before else 0
    if _size(part) < remote.size:
        raise HubError(f"{name} of {repository.model} stopped arriving: run again to resume") from failure
    local = digest(part)
    if not content_fits(part, remote, local):
        part.unlink()
        raise HubError(f"{name} of {repository.model} arrived with a wrong hash or size: it was removed: run again")
    return local


def _continue(url: str, part: Path, size: int, advance: Callable[[int], None]) -> None:
    """Appends to a part from where it ends; from the start where the server ignores `Range`."""
    have = _size(part)
    with _open(url, {"Range": f"bytes={have}-"} if have else {}) as response:
        appends = response.status == http.client.PARTIAL_CONTENT
        left = size - have if appends else size
        with part.open("ab" if appends else "wb") as file:
            # One byte more than announced is let in, so that a file that is too long fails its check.
            while left >= 0 and (piece := response.read(min(PIECE_BYTES, left + 1))):
                file.write(piece)
                left -= len(piece)
                advance(len(piece))


def _install(repository: Repository, source: Source, fetched: dict[str, RemoteFile]) -> None:
    """Moves checked files into place and writes the record; files that the hub no longer has are removed."""
    repository.folder.mkdir(parents=True, exist_ok=True)
    for name, remote in fetched.items():
        target = repository.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _part(repository, name, remote).replace(target)
    old = read_record(repository.folder)
    for name in set(old.files if old else ()) - set(source.files):
        (repository.folder / name).unlink(missing_ok=True)
    write_record(repository.folder, source)
    shutil.rmtree(repository.parts, ignore_errors=True)


def _part(repository: Repository, name: str, remote: RemoteFile) -> Path:
    """Where a file grows. The hash is in the name, so that a re-upload does not continue the old content."""
    return repository.parts / f"{quote(name, safe='')}.{remote.sha256 or 'unhashed'}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _open(url: str, headers: dict[str, str] | None = None) -> Any:
    return urlopen(Request(url, headers={"User-Agent": "quasr", **(headers or {})}), timeout=TIMEOUT)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.update(task, advance=count)


@contextmanager
def _one_line_errors(model: str, *, is_cached: bool) -> Iterator[None]:
    """Turns what the network and its answers raise into errors of ours."""
    advice = "use --offline for the cached copy" if is_cached else "check the network, or give a folder"
    try:
        yield
    except HTTPError as error:
        error.close()
        if error.code == http.client.NOT_FOUND:
            raise ModelNotFoundError(f"ModelScope has no {model} at that revision: check the id") from error
        if error.code in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
            raise HubError(
                f"ModelScope refuses {model} (HTTP {error.code}): download it yourself, give the folder"
            ) from error
        raise HubError(f"ModelScope answers HTTP {error.code} for {model}: {advice}; a new run resumes") from error
    except (URLError, *CUT) as error:
        raise HubError(f"ModelScope could not be reached for {model} ({error}): {advice}; a new run resumes") from error
    except OSError as error:
        raise storage_error(error, model) or HubError(f"{model} could not be stored: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(f"ModelScope's answer about {model} makes no sense: check MODELSCOPE_ENDPOINT") from error
