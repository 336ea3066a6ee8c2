"""Every error that quasr raises on purpose, as one tree.

    QuasrError                     exit  HTTP
    ├── OptionError                   2   400   an argument makes no sense
    │   └── UnknownLanguageError      2   400   lists the close ones
    ├── AudioError                    1   400   one input cannot be transcribed; others may
    │   ├── AudioNotFoundError        1   404   no such file, a folder, no permission
    │   ├── AudioFetchError           1   400   a URL that fails, is refused or is too slow
    │   ├── AudioTooLargeError        1   413   over the size or time limit
    │   ├── AudioDecodeError          1   400   not audio, damaged, no sound track
    │   └── EmptyAudioError           1   400   zero samples
    ├── ModelError                    3   500   the model cannot be used at all
    │   ├── ModelNotFoundError        3   404   no such folder or hub id
    │   ├── HubError                  3   502   the hub fails or its answer is wrong
    │   ├── UnsupportedModelError     3   400   not a Qwen3-ASR architecture
    │   └── CheckpointError           3   500   missing, unknown, misshapen or corrupt tensors
    ├── ResourceError                 4   503   device missing, memory exhausted, disk full
    └── MissingDependencyError        5   500   an extra is not installed; says which

A message is one line: what was wrong, then what to do about it.
Interrupted by the user is no error of ours: the command line exits with 130.
"""

from __future__ import annotations

from typing import ClassVar


class QuasrError(Exception):
    """Base of all errors raised on purpose; `exit_code` and `http_status` fit the class."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500


class OptionError(QuasrError):
    """An option or argument that makes no sense."""

    exit_code = 2
    http_status = 400


class UnknownLanguageError(OptionError):
    """A language that the model does not know."""


class AudioError(QuasrError):
    """One input cannot be transcribed; other inputs are not touched by it."""

    http_status = 400


class AudioNotFoundError(AudioError):
    """The file does not exist, is a folder, or may not be read."""

    http_status = 404


class AudioFetchError(AudioError):
    """A URL could not be fetched: refused, failed, or too slow."""


class AudioTooLargeError(AudioError):
    """The input is over the size or time limit."""

    http_status = 413


class AudioDecodeError(AudioError):
    """The bytes are not audio that can be decoded."""


class EmptyAudioError(AudioError):
    """The input decodes to zero samples."""


class ModelError(QuasrError):
    """The model cannot be used at all."""

    exit_code = 3


class ModelNotFoundError(ModelError):
    """No such model folder or hub id."""

    http_status = 404


class HubError(ModelError):
    """The hub could not be reached, or what it sent is wrong."""

    http_status = 502


class UnsupportedModelError(ModelError):
    """The checkpoint is not of a Qwen3-ASR architecture."""

    http_status = 400


class CheckpointError(ModelError):
    """Tensors or files of a checkpoint are missing, unknown, misshapen or corrupt."""


class ResourceError(QuasrError):
    """A device is missing, or memory or disk is exhausted."""

    exit_code = 4
    http_status = 503


class MissingDependencyError(QuasrError):
    """An optional package is needed and not installed; the message names the extra."""

    exit_code = 5
