"""Transcripts as text, subtitles, tables and JSON, and the writing of them to files."""

from quasr.output.cues import LineRules
from quasr.output.files import write_files
from quasr.output.render import FORMATS, render

__all__ = ["FORMATS", "LineRules", "render", "write_files"]
