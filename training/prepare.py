"""Decodes the recorded speech, the noise and the room responses into parts of int16 samples at 16 kHz."""

from __future__ import annotations

import argparse
import io
import json
import os
import zipfile
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from corpus import NOISE_TEST_EVERY, RATE, is_chinese, write_part, written

RUN = 200


def decode(data: bytes | Path) -> np.ndarray:
    """Any file that libsndfile reads -> mono int16 at 16 kHz."""
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    mono = samples.mean(1)
    if rate != RATE:
        mono = resample_poly(mono, RATE, rate)
    return np.clip(mono * 32_767, -32_767, 32_767).astype(np.int16)


def decode_packed(job: tuple[Path, list[dict[str, str]]]) -> list[tuple[np.ndarray, dict[str, object]]]:
    """A run of clips of one pack: opening the archive once for each clip would cost more than decoding it."""
    pack, rows = job
    with zipfile.ZipFile(pack) as archive:
        return [(decode(archive.read(row["path"])), describe(row)) for row in rows]


def describe(row: dict[str, str]) -> dict[str, object]:
    text = written(row["text"])
    language = "Chinese" if is_chinese(text) else "English"
    return {"text": text, "language": language, "speaker": row["speaker"], "source": row["set"]}


def packed_jobs(folder: Path) -> list[tuple[Path, list[dict[str, str]]]]:
    rows = {row["path"]: row for row in map(json.loads, (folder / "manifest.jsonl").open())}
    jobs = []
    for pack in sorted(folder.glob("pack_*.zip")):
        with zipfile.ZipFile(pack) as archive:
            mine = [rows[name] for name in archive.namelist() if name in rows]
        jobs += [(pack, mine[start : start + RUN]) for start in range(0, len(mine), RUN)]
    return jobs


def noise_rows(folder: Path) -> list[tuple[np.ndarray, dict[str, object]]]:
    """Every fifth file is kept for the test of `language None`; a file that libsndfile refuses is left out."""
    rows = []
    for number, path in enumerate(sorted([*(folder / "esc10").glob("*.opus"), *(folder / "music").glob("*.opus")])):
        row = {"text": "", "language": "None", "speaker": "noise", "source": "noise", "name": path.name}
        try:
            rows.append((decode(path), {**row, "test": number % NOISE_TEST_EVERY == 0}))
        except soundfile.LibsndfileError as error:
            print(f"{path.name}: {error}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train_folder", type=Path)
    parser.add_argument("noise_folder", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    with Pool(os.cpu_count()) as pool:
        runs = pool.map(decode_packed, packed_jobs(arguments.train_folder), 1)
    write_part(arguments.output, "real", [row for run in runs for row in run])
    write_part(arguments.output, "noise", noise_rows(arguments.noise_folder))
    rooms = [decode(path) for path in sorted((arguments.noise_folder / "rir").glob("*.wav"))]
    np.savez(arguments.output / "rooms.npz", *rooms)


if __name__ == "__main__":
    main()
