"""Checkpoints from a Hugging Face hub or a mirror (`HF_ENDPOINT`), in the cache that its other programs share."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, constants, errors, snapshot_download

from quasr.errors import HubError, ModelNotFoundError, QuasrError
from quasr.weights.record import (
    CONFIG_FILES,
    GRAPH_FILES,
    WANTED,
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
    from collections.abc import Iterator, Sequence

    from quasr.weights.hub import HubOptions

logger = logging.getLogger(__name__)

TIMEOUT = 30
"""Seconds for the hub's answer about a model."""

DEFAULT_REVISION = "main"

PATTERNS = [*(f"*{ending}" for ending in WANTED), *GRAPH_FILES]

REFUSALS: tuple[tuple[type[Exception], type[QuasrError], str], ...] = (
    (errors.GatedRepoError, HubError, "{} is gated: accept its terms on its page, then set HF_TOKEN"),
    (errors.RevisionNotFoundError, ModelNotFoundError, "{} has no such revision: check --revision"),
    (errors.RepositoryNotFoundError, ModelNotFoundError, "the hub has no {}, or it is private: check id and HF_TOKEN"),
)

# The network library behind huggingface_hub, and so the base of its errors, differs between its versions.
NETWORK_ERRORS: tuple[type[Exception], ...] = (
    getattr(errors, "HTTPError", OSError),
    getattr(errors, "XetDownloadError", OSError),
    OSError,
)


def fetch(model: str, options: HubOptions) -> Path:
    """The snapshot folder, up to date and with every file's content checked once. See `hub.resolve`."""
    revision = options.revision or DEFAULT_REVISION
    before = _cached(model, revision, options)
    if options.offline or constants.HF_HUB_OFFLINE:
        if before is None:
            raise _not_cached(model, revision)
        return check_cached(before, model)
    with _one_line_errors(model, is_cached=before is not None):
        listing = _ask(model, revision)
        folder = _cached(model, listing.commit, options)
        old = read_record(before) if before else None
        if folder is not None and _is_current(folder, listing):
            return folder
        folder = _download(model, revision, listing, options)
        source = Source("huggingface", model, revision, listing.commit, _check_contents(folder, model, listing))
    report_changes(model, old, source)
    _try_to_record(folder, source)
    return folder


def fetch_config(model: str, options: HubOptions) -> Path:
    """The configuration in a cache of its own, up to date. See `hub.resolve_config`."""
    revision = options.revision or DEFAULT_REVISION
    # In the common cache a snapshot without weights would take the place of an older whole one.
    root = options.cache_dir or Path.home() / ".cache" / "quasr"
    bare = replace(options, cache_dir=root / "huggingface-configs")
    if options.offline or constants.HF_HUB_OFFLINE:
        found = _cached(model, revision, bare, CONFIG_FILES) or _cached(model, revision, options)
        if found is None:
            raise _not_cached(model, revision)
        return found
    with _one_line_errors(model, is_cached=_cached(model, revision, bare, CONFIG_FILES) is not None):
        listing = _ask(model, revision).config_only()
        if CONFIG_FILES[0] not in listing.files:
            raise ModelNotFoundError(f"{model} has no {CONFIG_FILES[0]}: it is no checkpoint")
        folder = _download(model, revision, listing, bare, CONFIG_FILES)
        _check_contents(folder, model, listing)
    return folder


def _not_cached(model: str, revision: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"{model} ({revision}) is not in the cache: run once without --offline")


def _cached(model: str, revision: str, options: HubOptions, patterns: Sequence[str] = PATTERNS) -> Path | None:
    """The snapshot of a branch or commit in the cache, without network; None if it is absent or incomplete."""
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=options.cache_dir,
                local_files_only=True,
                allow_patterns=list(patterns),
            )
        )
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None


def _ask(model: str, revision: str) -> Listing:
    """What the hub has now. The endpoint is read here, because the library reads it only when it is imported."""
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    info = api.model_info(model, revision=revision, files_metadata=True, timeout=TIMEOUT)
    if not info.sha:
        raise ValueError("no commit")
    files = {file.rfilename: _remote(file) for file in info.siblings or () if wanted(file.rfilename)}
    return Listing(info.sha, files)


def _remote(file: Any) -> RemoteFile:
    if file.lfs:
        return RemoteFile(int(file.lfs.size), file.lfs.sha256)
    return RemoteFile(int(file.size), None, file.blob_id)


def _is_current(folder: Path, listing: Listing) -> bool:
    """Whether a cached snapshot is recorded and whole. Damaged files are removed, so that they are fetched again."""
    damaged = wrong_sizes(folder, listing.files)
    record = read_record(folder)
    if record:
        hashes = {name: file.sha256 for name, file in listing.files.items() if file.sha256}
        damaged += [
            name for name, sha256 in hashes.items() if name in record.files and record.files[name].sha256 != sha256
        ]
    for name in set(damaged):
        _remove(folder / name)
    return record is not None and not damaged and record.files.keys() == listing.files.keys()


def _remove(path: Path) -> None:
    """Removes a snapshot's file: the link and the content that it points to."""
    if path.is_symlink() or path.exists():
        logger.warning("%s is damaged: it is fetched again", path)
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _download(
    model: str, revision: str, listing: Listing, options: HubOptions, patterns: Sequence[str] = PATTERNS
) -> Path:
    folder = Path(
        snapshot_download(
            model,
            revision=revision,
            cache_dir=options.cache_dir,
            endpoint=os.environ.get("HF_ENDPOINT"),
            allow_patterns=list(patterns),
        )
    )
    # The library falls back to an older snapshot when the network fails half way, with no word about it.
    if folder.name != listing.commit:
        raise HubError(f"{model} changed on the hub, or the network failed, while it was fetched: run again")
    return folder


def _check_contents(folder: Path, model: str, listing: Listing) -> dict[str, LocalFile]:
    """Hashes all files. Raises HubError for a wrong one and removes it, so that the next run fetches it again."""
    files = {}
    for name, remote in listing.files.items():
        path = folder / name
        local = digest(path) if path.is_file() else None
        if local is None or not content_fits(path, remote, local):
            _remove(path)
            raise HubError(f"{name} of {model} arrived with a wrong hash or size: it was removed: run again")
        files[name] = local
    return files


def _try_to_record(folder: Path, source: Source) -> None:
    """A cache that others fill and only they may write is no reason to refuse its model."""
    try:
        write_record(folder, source)
    except OSError as error:
        logger.warning("%s cannot be recorded (%s): a re-upload will not be noticed", folder, error.strerror)


@contextmanager
def _one_line_errors(model: str, *, is_cached: bool) -> Iterator[None]:
    """Turns what the library raises into errors of ours."""
    try:
        yield
    except NETWORK_ERRORS as error:
        raise _explain(error, model, is_cached=is_cached) from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(f"{model} is no valid model id: ids look like org/name") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(f"the hub's answer about {model} makes no sense: check HF_ENDPOINT") from error


def _explain(error: Exception, model: str, *, is_cached: bool) -> QuasrError:
    for kind, ours, text in REFUSALS:
        if isinstance(error, kind):
            return ours(text.format(model))
    stored = storage_error(error, model) if isinstance(error, OSError) else None
    if stored:
        return stored
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return HubError(
            f"the hub refuses {model} (HTTP {status}): check the id, or set HF_TOKEN to a token that may read it"
        )
    reason = f"HTTP {status}" if status else type(error).__name__
    advice = "use --offline for the cached copy" if is_cached else "check the network, HF_ENDPOINT, or give a folder"
    return HubError(f"{model} could not be fetched from the hub ({reason}): {advice}; a new run resumes")
