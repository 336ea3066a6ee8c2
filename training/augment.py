"""From a recipe to log-mel frames, all on the device: joining, speed, rooms, noise, vocal tract length, SpecAugment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from corpus import RATE
from quasr.audio.mel import log_mel

if TYPE_CHECKING:
    from batches import Batch

FFT, HOP, BINS = 400, 160, 128
WARPS = 25
WIDEST_WARP = 0.16


def slaney_mel(hertz: np.ndarray) -> np.ndarray:
    """Slaney's scale: linear to 1 kHz at 200/3 Hz a mel, then 27 mels for each factor of 6.4."""
    high = 15 + 27 * np.log(np.maximum(hertz, 1e-6) / 1000) / np.log(6.4)
    return np.where(hertz < 1000, hertz * 3 / 200, high)


def slaney_hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


def filterbank(warp: float) -> np.ndarray:
    """(128, 201) triangles whose centres are moved by `warp` (vocal tract length perturbation)."""
    edges = slaney_hertz(np.linspace(0, slaney_mel(np.array(8000.0)), BINS + 2))
    edges = np.minimum(edges * warp, 8000.0) if warp != 1.0 else edges
    hertz = np.linspace(0, RATE / 2, FFT // 2 + 1)
    width = np.maximum(np.diff(edges), 1e-3)
    slopes = edges[:, None] - hertz
    triangles = np.maximum(0, np.minimum(-slopes[:-2] / width[:-1, None], slopes[2:] / width[1:, None]))
    return triangles * (2 / np.maximum(edges[2:] - edges[:-2], 1e-3))[:, None]


@dataclass(frozen=True, slots=True)
class Strength:
    """How hard the audio is altered."""

    warp: float = 0.7
    noise: float = 0.5
    room: float = 0.25
    frequency_masks: int = 2
    frequency_width: int = 32
    time_masks_each_second: float = 0.6
    time_width: int = 28
    starts: float = 0.04
    full: float = 0.14

    def level(self, progress: float) -> float:
        """0 to 1: clean audio first, because an untrained CTC head learns nothing from audio that is altered hard."""
        return min(1.0, max(0.0, (progress - self.starts) / (self.full - self.starts)))


class Frontend:
    """Holds all samples on the device and makes (batch, 128, frames) out of recipes."""

    def __init__(self, samples: Tensor, rooms: list[np.ndarray], strength: Strength) -> None:
        self.samples, self.strength, self.device = samples, strength, samples.device
        self.level = 1.0
        self.window = torch.hann_window(FFT, device=self.device)
        warps = np.linspace(1 - WIDEST_WARP, 1 + WIDEST_WARP, WARPS)
        banks = np.stack([filterbank(float(warp)) for warp in warps]).astype(np.float32)
        self.banks = torch.from_numpy(banks).to(self.device)
        self.rooms = self._load_rooms(rooms)

    def _load_rooms(self, rooms: list[np.ndarray]) -> Tensor:
        """Measured responses and random decays, each of unit energy with its peak first."""
        length = RATE // 2
        rows = []
        for room in rooms:
            room = room.astype(np.float32)[np.abs(room).argmax() :][:length]
            rows.append(np.pad(room, (0, length - len(room))))
        rng = np.random.default_rng(0)
        for decay in np.linspace(0.02, 0.18, 24):
            tail = rng.standard_normal(length) * np.exp(-np.arange(length) / (decay * RATE)) * 0.12
            tail[0] = 1.0
            rows.append(tail.astype(np.float32))
        stack = torch.from_numpy(np.stack(rows))
        return (stack / stack.norm(dim=1, keepdim=True)).to(self.device)

    def features(self, batch: Batch, *, train: bool) -> tuple[Tensor, Tensor]:
        """(batch, 128, seconds * 100) with zeros after each row's own frames, and the frame counts."""
        audio = self.waveforms(batch)
        frames = batch.tensors["samples"] // HOP
        if train:
            audio = self.disturb(audio, batch)
        mel = self.log_mel(audio, frames, train=train)
        if train:
            mel = self.mask(mel, frames)
        inside = torch.arange(mel.shape[2], device=self.device) < frames[:, None]
        return mel * inside[:, None], frames

    def waveforms(self, batch: Batch) -> Tensor:
        """(batch, samples) float32: every piece fetched at its speed with linear interpolation."""
        t = batch.tensors
        clock = torch.arange(batch.seconds * RATE, device=self.device)
        clock = clock.expand(len(t["samples"]), -1)
        piece = torch.searchsorted(t["begin"], clock.contiguous(), right=True) - 1
        before = piece < 0
        piece = piece.clamp_(min=0)
        begin, start, length, speed = (t[name].gather(1, piece) for name in ("begin", "start", "length", "speed"))
        place = (clock - begin) * speed
        whole = place.floor().long()
        inside = ~before & (whole < length - 1)
        where = (start + whole) * inside
        low, high = self.samples[where].float(), self.samples[where + 1].float()
        return torch.where(inside, low + (high - low) * (place - whole).float(), 0.0) / 32_768

    def disturb(self, audio: Tensor, batch: Batch) -> Tensor:
        """Room, noise at 0 to 30 dB, hiss, loudness."""
        t, size = batch.tensors, len(audio)
        if torch.rand(()) < self.strength.room * 2 * self.level:
            audio = self.reverberate(audio)
        level = audio.square().sum(1).div(t["samples"]).sqrt()[:, None] + 1e-5
        offset = (torch.rand(size, 1, device=self.device) * t["noise_length"][:, None]).long()
        turn = (torch.arange(audio.shape[1], device=self.device) + offset) % t["noise_length"][:, None]
        noise = self.samples[t["noise_start"][:, None] + turn].float()
        noise = noise / (noise.square().mean(1, keepdim=True).sqrt() + 1e-5)
        ratio = 10 ** (-(torch.rand(size, 1, device=self.device) * 30) / 20)
        use = (torch.rand(size, 1, device=self.device) < self.strength.noise * self.level).float()
        audio = audio + noise * level * ratio * use
        hiss = 10 ** (-(torch.rand(size, 1, device=self.device) * 45 + 25) / 20)
        audio = audio + torch.randn_like(audio) * (level + 1e-3) * hiss
        audio = audio * ~t["silent"][:, None] + torch.randn_like(audio) * 1e-4 * t["silent"][:, None]
        return audio * 10 ** ((torch.rand(size, 1, device=self.device) * 24 - 18) / 20)

    def reverberate(self, audio: Tensor) -> Tensor:
        """Half of the rows through a random room, by one FFT over the batch."""
        size = audio.shape[1] + self.rooms.shape[1]
        room = self.rooms[torch.randint(len(self.rooms), (len(audio),), device=self.device)]
        dry = torch.zeros_like(room)
        dry[:, 0] = 1.0
        use = torch.rand(len(audio), 1, device=self.device) < 0.5
        spectrum = torch.fft.rfft(audio, size) * torch.fft.rfft(torch.where(use, room, dry), size)
        return torch.fft.irfft(spectrum, size)[:, : audio.shape[1]]

    def log_mel(self, audio: Tensor, frames: Tensor, *, train: bool) -> Tensor:
        """As quasr.audio.mel, for a batch: the floor is 8 below each row's own maximum."""
        spectrum = torch.stft(audio, FFT, HOP, window=self.window, return_complex=True)[..., :-1]
        power = spectrum.real.square() + spectrum.imag.square()
        middle = WARPS // 2
        pick = torch.full((len(audio),), middle, device=self.device)
        if train:
            use = torch.rand(len(audio), device=self.device) < self.strength.warp * self.level
            pick = torch.where(use, torch.randint(WARPS, pick.shape, device=self.device), pick)
        mel = torch.bmm(self.banks[pick], power).clamp_(min=1e-10).log10_()
        inside = torch.arange(mel.shape[2], device=self.device) < frames[:, None]
        top = mel.masked_fill(~inside[:, None], -10.0).amax((1, 2), keepdim=True)
        return (torch.maximum(mel, top - 8) + 4) / 4

    def mask(self, mel: Tensor, frames: Tensor) -> Tensor:
        """SpecAugment (Park et al. 2019) with the row's mean, after a smooth random tilt of the spectrum."""
        size, bins, width = mel.shape
        knots = torch.randn(size, 1, 6, device=self.device) * 0.06 * self.level
        mel = mel + F.interpolate(knots, bins, mode="linear", align_corners=True).transpose(1, 2)
        mean = mel.mean((1, 2), keepdim=True)
        band = torch.arange(bins, device=self.device)[None, :, None]
        hidden = torch.zeros(size, bins, 1, dtype=torch.bool, device=self.device)
        for _ in range(self.strength.frequency_masks):
            low, wide = self._span(
                size, torch.full((size,), bins, device=self.device), self.strength.frequency_width * self.level
            )
            hidden = hidden | ((band >= low) & (band < low + wide))
        clock = torch.arange(width, device=self.device)[None, None]
        gone = torch.zeros(size, 1, width, dtype=torch.bool, device=self.device)
        for _ in range(max(1, round(self.strength.time_masks_each_second * width / 100))):
            low, wide = self._span(size, frames, self.strength.time_width * self.level)
            gone = gone | ((clock >= low) & (clock < low + wide))
        return torch.where(hidden | gone, mean, mel)

    def _span(self, size: int, limit: Tensor, widest: float) -> tuple[Tensor, Tensor]:
        wide = torch.rand(size, device=self.device) * widest
        low = torch.rand(size, device=self.device) * (limit - wide).clamp(min=1)
        return low[:, None, None], wide[:, None, None]


def check_frontend(frontend: Frontend, samples: np.ndarray) -> float:
    """Largest difference between this front end without augmentation and the package's own log-mel."""
    ours = log_mel(samples)
    audio = torch.from_numpy(samples)[None].to(frontend.device)
    mine = frontend.log_mel(audio, torch.tensor([ours.shape[1]], device=frontend.device), train=False)
    return float(np.abs(mine[0].cpu().numpy()[:, : ours.shape[1]] - ours).max())
