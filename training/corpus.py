"""What the demo model learns from: clips with texts, laid out in one flat buffer of samples."""

from __future__ import annotations

import json
import lzma
import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

RATE = 16_000
DEV_SPEAKERS = {"ls1088", "so0001", "so0011", "so0021", "so0031", "so0041", "so0051"}
DEV_LJ_EVERY = 24
DEV_SYNTHETIC_EVERY = 400
NOISE_TEST_EVERY = 5

_HAN = re.compile(r"[㐀-鿿]")
_WORDS = re.compile(r"[^a-z' ]+")


@dataclass(frozen=True, slots=True)
class Clip:
    """Samples `start : start + length` of the buffer, and what is said in them ("" for noise)."""

    start: int
    length: int
    text: str
    language: str
    speaker: str
    source: str
    dev: bool = False


def written(text: str) -> str:
    """The target text: as written, but all-capitals corpora in lower case."""
    return text.lower() if text.isupper() else text


def spoken(text: str) -> str:
    """Lower-case words without punctuation, the target of the auxiliary CTC losses."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return " ".join(_WORDS.sub(" ", plain).split())


def is_chinese(text: str) -> bool:
    return bool(_HAN.search(text))


def english_sentences(folder: Path) -> list[str]:
    with lzma.open(folder / "train_sentences_en.tsv.xz", "rt", encoding="utf-8") as lines:
        return [line.rstrip("\n").split("\t", 1)[1] for line in lines]


def chinese_sentences(folder: Path) -> list[str]:
    with lzma.open(folder / "train_sentences_zh.txt.xz", "rt", encoding="utf-8") as lines:
        return [line.strip() for line in lines if line.strip()]


def write_part(folder: Path, name: str, rows: list[tuple[np.ndarray, dict[str, object]]]) -> None:
    """One buffer of int16 samples and one line a clip: {length, text, language, speaker, source}."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.i16").open("wb") as audio, (folder / f"{name}.jsonl").open("w") as index:
        for samples, row in rows:
            audio.write(samples.astype("<i2").tobytes())
            index.write(json.dumps({"length": len(samples), **row}, ensure_ascii=False) + "\n")


def read_parts(folder: Path, names: list[str]) -> tuple[list[np.ndarray], list[Clip]]:
    """All parts as memory maps, and their clips with offsets into the concatenation of the maps."""
    buffers: list[np.ndarray] = []
    clips: list[Clip] = []
    offset = 0
    for name in names:
        start = offset
        for line in (folder / f"{name}.jsonl").open():
            row = json.loads(line)
            dev = is_dev(row, len(clips))
            clips.append(Clip(start, row["length"], row["text"], row["language"], row["speaker"], row["source"], dev))
            start += row["length"]
        buffers.append(np.memmap(folder / f"{name}.i16", dtype="<i2", mode="r"))
        offset += len(buffers[-1])
    return buffers, clips


def is_dev(row: dict[str, object], position: int) -> bool:
    """Held out for watching the training: whole speakers where there are many, else every n-th clip."""
    if row["source"] == "ljspeech":
        return position % DEV_LJ_EVERY == 0
    if row["source"] == "synthetic":
        return position % DEV_SYNTHETIC_EVERY == 0
    if row["source"] == "noise":
        return bool(row.get("test"))
    return row["speaker"] in DEV_SPEAKERS
