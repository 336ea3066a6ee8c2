"""Reads sentences aloud with espeak-ng and flite, many processes at once, into parts of int16 samples at 16 kHz."""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import tempfile
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from corpus import RATE, chinese_sentences, english_sentences, write_part

ACCENTS = ("en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5", "klatt", "klatt2", "klatt3")
FLITE_VOICES = ("rms", "rms", "slt", "slt", "awb", "awb", "kal16")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PART_CLIPS = 250
LONGEST_SENTENCE = 260


def espeak(tool: Path, text: str, rng: random.Random, wav: str, *, chinese: bool) -> tuple[list[str], str]:
    """The command and the speaker's name for one sentence in a random formant voice."""
    accent = "cmn-latn-pinyin" if chinese else rng.choice(ACCENTS)
    voice = f"{accent}+{rng.choice(VARIANTS)}"
    speed, pitch = rng.randint(120, 205), rng.randint(20, 80)
    command = [str(tool / "bin/espeak-ng"), "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", wav, "--", text]
    return command, f"espeak:{voice}"


def flite(tool: Path, text: str, rng: random.Random, wav: str) -> tuple[list[str], str]:
    """The command and the speaker's name for one sentence in a recorded voice."""
    voice = rng.choice(FLITE_VOICES)
    stretch = f"duration_stretch={rng.uniform(0.8, 1.25):.2f}"
    return [str(tool / "bin/flite"), "-voice", voice, "--setf", stretch, "-o", wav, "-t", text], f"flite:{voice}"


def speak(tool: Path, text: str, rng: random.Random, folder: str, *, chinese: bool) -> tuple[np.ndarray, str] | None:
    """One sentence -> samples with the silence at both ends cut short, or None where a voice fails."""
    wav = os.path.join(folder, "o.wav")
    if chinese or rng.random() < 0.5:
        command, speaker = espeak(tool, text, rng, wav, chinese=chinese)
    else:
        command, speaker = flite(tool, text, rng, wav)
    environment = {"LD_LIBRARY_PATH": str(tool / "lib"), "ESPEAK_DATA_PATH": str(tool / "share")}
    done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60)
    if done.returncode or not os.path.exists(wav):
        return None
    samples, rate = soundfile.read(wav, dtype="float32")
    os.unlink(wav)
    if rate != RATE:
        samples = resample_poly(samples, RATE, rate)
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    if len(loud) < RATE // 10:
        return None
    samples = samples[max(0, loud[0] - 1600) : loud[-1] + 1600]
    return np.clip(samples / max(np.abs(samples).max(), 1e-4) * 24_000, -32_767, 32_767).astype(np.int16), speaker


def digit_string(rng: random.Random) -> str:
    return " ".join(rng.choice(DIGITS) for _ in range(rng.randint(1, 7)))


def run_part(job: tuple[int, list[str], Path, Path, float]) -> float:
    """Synthesises one part; returns its seconds. Parts that start after the deadline are left out."""
    number, texts, tool, output, deadline = job
    if time.time() > deadline:
        return 0.0
    rng = random.Random(number)
    rows: list[tuple[np.ndarray, dict[str, object]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for text in texts:
            chinese = not text.isascii() and any("㐀" <= c <= "鿿" for c in text)
            spoken = speak(tool, text, rng, folder, chinese=chinese)
            if spoken is None:
                continue
            language = "Chinese" if chinese else "English"
            rows.append((spoken[0], {"text": text, "language": language, "speaker": spoken[1], "source": "synthetic"}))
    write_part(output, f"synthetic{number:05d}", rows)
    (output / f"synthetic{number:05d}.done").touch()
    return sum(len(row[0]) for row in rows) / RATE


def choose_texts(folder: Path, english: int, chinese: int, digits: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    pool = [line for line in english_sentences(folder) if 12 <= len(line) <= LONGEST_SENTENCE]
    rng.shuffle(pool)
    han = [line for line in chinese_sentences(folder) if 2 <= len(line) <= 24]
    rng.shuffle(han)
    texts = pool[:english] + han[:chinese] + [digit_string(rng) for _ in range(digits)]
    rng.shuffle(texts)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text_folder", type=Path)
    parser.add_argument("tool", type=Path, help="the unpacked voices: bin, lib, share")
    parser.add_argument("output", type=Path)
    parser.add_argument("--english", type=int, default=125_000)
    parser.add_argument("--chinese", type=int, default=6_000)
    parser.add_argument("--digits", type=int, default=5_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=240.0, help="start no part after this long")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    texts = choose_texts(arguments.text_folder, arguments.english, arguments.chinese, arguments.digits, arguments.seed)
    deadline = time.time() + arguments.seconds
    jobs = [
        (start // PART_CLIPS, texts[start : start + PART_CLIPS], arguments.tool, arguments.output, deadline)
        for start in range(0, len(texts), PART_CLIPS)
    ]
    with Pool(arguments.workers) as pool:
        seconds = sum(pool.imap_unordered(run_part, jobs))
    print(f"{seconds / 3600:.1f} h of speech")


if __name__ == "__main__":
    main()
