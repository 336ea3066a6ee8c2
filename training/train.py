"""Trains the demo model. One process a GPU (torchrun), or one on the CPU for a dry run; see README.md beside this."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from augment import Frontend, Strength, check_frontend
from batches import BUCKETS, IGNORE, LETTERS, Batch, Example, Piece, Sampler, Vocabulary
from corpus import RATE, Clip, read_parts, spoken
from quasr.model.asr import Qwen3ASR
from quasr.model.config import ModelConfig, parse_config
from quasr.model.decoder import KVCache

if TYPE_CHECKING:
    from collections.abc import Iterator

AGREE_EVERY = 8

LETTERS_EACH_TOKEN = 4
"""Letter frames for each encoder token: 13 tokens a second are too few for 15 letters a second."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that shapes a run."""

    minutes: float = 5.0
    decay_from: float = 0.55
    progress_from: float = 0.0
    progress_to: float = 1.0
    rate: float = 1.5e-3
    muon: bool = False
    weight_decay: float = 0.05
    budget: float = 1024.0
    dropout: float = 0.12
    encoder_drop_path: float = 0.08
    ctc: float = 0.4
    letters: float = 0.3
    decoder_ctc: float = 0.0
    smoothing: float = 0.1
    token_noise: float = 0.06
    average: float = 0.9995
    window_frames: int = 800
    encoder_layers: int = 8
    decoder_layers: int = 6
    seed: int = 1


def architecture(vocabulary_size: int, ids: dict[str, int], recipe: Recipe) -> dict[str, object]:
    """The demo model's config.json, in the original layout."""
    audio = {
        "model_type": "qwen3_asr_audio_encoder",
        "d_model": 384,
        "encoder_layers": recipe.encoder_layers,
        "encoder_attention_heads": 6,
        "encoder_ffn_dim": 1024,
        "output_dim": 384,
        "num_mel_bins": 128,
        "downsample_hidden_size": 160,
        "n_window": 50,
        "n_window_infer": recipe.window_frames,
        "activation_function": "gelu",
        "scale_embedding": False,
    }
    text = {
        "model_type": "qwen3",
        "vocab_size": vocabulary_size,
        "hidden_size": 384,
        "num_hidden_layers": recipe.decoder_layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    return {
        "architectures": ["Qwen3ASRForConditionalGeneration"],
        "model_type": "qwen3_asr",
        "support_languages": ["English", "Chinese"],
        "max_audio_seconds": BUCKETS[-1],
        "eos_token_id": [ids["<|endoftext|>"], ids["<|im_end|>"]],
        "thinker_config": {
            "audio_config": audio,
            "text_config": text,
            "audio_token_id": ids["<|audio_pad|>"],
            "dtype": "bfloat16",
        },
    }


class Learner(nn.Module):
    """The network, the two CTC heads that are thrown away later, and the losses."""

    def __init__(self, config: ModelConfig, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.audio = recipe, config.audio
        self.network = Qwen3ASR(config)
        vocab, width, hidden = config.text.vocab_size, config.audio.width, config.text.hidden
        self.ctc_head = nn.Linear(width, vocab + 1)
        self.letter_head = nn.Linear(width, LETTERS_EACH_TOKEN * (len(LETTERS) + 1))
        self.late_head = nn.Linear(hidden, vocab + 1)
        self.middle: Tensor | None = None
        self._initialise()
        self._regularise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for layers in (self.network.encoder.layers, self.network.decoder.layers):
            for name, parameter in layers.named_parameters():
                if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
                    nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(layers)))

    def _regularise(self) -> None:
        """Dropout on every branch's output and whole-branch dropping in the encoder, as hooks on the network."""
        encoder, decoder = self.network.encoder.layers, self.network.decoder.layers
        for depth, layer in enumerate(encoder):
            path = self.recipe.encoder_drop_path * (depth + 1) / len(encoder)
            for module in (layer.self_attn.out_proj, layer.fc2):
                module.register_forward_hook(self._drop(self.recipe.dropout, path))
            layer.fc1.register_forward_hook(self._drop(self.recipe.dropout / 2, 0.0))
        for layer in decoder:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.register_forward_hook(self._drop(self.recipe.dropout, 0.0))
        encoder[len(encoder) * 5 // 8 - 1].register_forward_hook(self._keep)

    def _drop(self, rate: float, path: float):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not module.training:
                return None
            output = F.dropout(output, rate)
            if path:
                keep = torch.rand(len(output), 1, 1, device=output.device) >= path
                output = output * keep / (1 - path)
            return output

        return hook

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.middle = output

    def encode(self, mel: Tensor, frames: Tensor) -> Tensor:
        """(batch, 128, seconds * 100) -> encoder states (batch, tokens, width), padding included."""
        batch, bins, width = mel.shape
        seconds = width // self.audio.chunk_frames
        chunks = mel.view(batch, bins, seconds, -1).transpose(1, 2).flatten(0, 1)
        x = self.network.encoder.stem(chunks)
        rest = frames % self.audio.chunk_frames
        counts = (frames // self.audio.chunk_frames) * self.audio.chunk_tokens + (rest + 7) // 8
        windows = max(1, seconds // self.audio.window_chunks)
        x = x.view(batch * windows, -1, self.audio.width)
        inside = torch.arange(seconds * self.audio.chunk_tokens, device=mel.device) < counts[:, None]
        first = torch.arange(x.shape[1], device=mel.device) == 0
        # A window without any token must still have something to attend to.
        mask = (inside.view(batch * windows, -1) | first)[:, None, None, :]
        for layer in self.network.encoder.layers:
            x = layer(x, mask)
        return x.view(batch, -1, self.audio.width)

    def forward(
        self, mel: Tensor, frames: Tensor, ids: Tensor, audio_row: Tensor, asked: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        """The answer's loss, and the logits of the auxiliary heads: pieces, letters, pieces from the decoder.

        No shape depends on the data and nothing waits for the device, so that a CUDA graph can hold it all.
        """
        with torch.autocast(mel.device.type, torch.bfloat16, cache_enabled=False):
            states = self.encode(mel, frames)
            loss, late = self._answer_loss(states, ids, audio_row, asked, labels)
            fine = self.letter_head(self.middle.view(states.shape)).unflatten(2, (LETTERS_EACH_TOKEN, -1)).flatten(1, 2)
            return loss, self.ctc_head(states), fine, late

    def _answer_loss(
        self, states: Tensor, ids: Tensor, place: Tensor, asked: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        decoder = self.network.decoder
        audio = self.network.encoder.project(states)
        if self.recipe.token_noise:
            swap = (torch.rand(ids.shape, device=ids.device) < self.recipe.token_noise) & (place < 0)
            swap &= torch.arange(ids.shape[1], device=ids.device) > asked[:, :1]
            ids = torch.where(swap, torch.randint_like(ids, decoder.config.vocab_size), ids)
        text = decoder.embed_tokens(ids)
        heard = audio.gather(1, place.clamp(min=0)[..., None].expand(-1, -1, audio.shape[2])).to(text.dtype)
        hidden, late = self._decode(torch.where((place >= 0)[..., None], heard, text), place, states.shape[1])
        picked = hidden.gather(1, asked[..., None].expand(-1, -1, hidden.shape[2]))
        logits = decoder.logits(picked).float()
        loss = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, label_smoothing=self.recipe.smoothing
        )
        return loss, late

    def _decode(self, x: Tensor, place: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """The decoder over the whole sequence; half-way, the states at the audio's places go to the late CTC head."""
        decoder = self.network.decoder
        cos, sin = decoder._angles(torch.arange(x.shape[1], device=x.device)[None])
        first = (place == 0).int().argmax(1)
        spot = (first[:, None] + torch.arange(longest, device=x.device)).clamp(max=x.shape[1] - 1)
        late = x
        for depth, layer in enumerate(decoder.layers):
            x = layer.prefill(x, cos, sin, None)
            if depth + 1 == (len(decoder.layers) + 1) // 2:
                late = self.late_head(x.gather(1, spot[..., None].expand(-1, -1, x.shape[2])))
        return x, late


def ctc_loss(logits: Tensor, blank: int, counts: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """Mean over target tokens (Graves et al. 2006); rows without a target do not count."""
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    rows = F.ctc_loss(log_probs, targets, counts, lengths, blank=blank, reduction="none", zero_infinity=True)
    used = (lengths > 0).to(rows.device, non_blocking=True)
    return (rows * used).sum() / max(1, int(lengths.sum()))


class Shaped(nn.Module):
    """The learner at one bucket's shapes: what a CUDA graph is made of."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.learner(*inputs)


def schedule(progress: float, recipe: Recipe) -> float:
    """Share of the peak rate: a short rise, a plateau, and a straight fall to a hundredth."""
    if progress < 0.02:
        return progress / 0.02
    if progress < recipe.decay_from:
        return 1.0
    return 0.01 + 0.99 * (1 - progress) / (1 - recipe.decay_from)


class Flat:
    """All parameters as views of one tensor, and all gradients of another: sums and averages are then one call."""

    def __init__(self, module: nn.Module) -> None:
        parameters = list(module.parameters())
        self.values = torch.cat([parameter.data.flatten() for parameter in parameters])
        self.gradients = torch.zeros_like(self.values)
        offset = 0
        for parameter in parameters:
            span = slice(offset, offset + parameter.numel())
            parameter.data = self.values[span].view_as(parameter)
            parameter.grad = self.gradients[span].view_as(parameter)
            offset += parameter.numel()


class Muon:
    """Momentum whose matrices are made orthogonal by Newton-Schulz (Jordan et al. 2024), same-shaped ones at once."""

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    MOMENTUM = 0.95

    def __init__(self, matrices: list[nn.Parameter], weight_decay: float) -> None:
        self.weight_decay = weight_decay
        groups: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            groups.setdefault(matrix.shape, []).append(matrix)
        self.groups = list(groups.values())
        self.momenta = [torch.zeros_like(torch.stack([m.data for m in group])) for group in self.groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([matrix.grad for matrix in group])
            momentum.lerp_(gradient, 1 - self.MOMENTUM)
            update = self._orthogonal(gradient.lerp_(momentum, self.MOMENTUM))
            # 0.2 sqrt(larger side) gives an update the size of AdamW's (Liu et al. 2025).
            scale = rate * 0.2 * math.sqrt(max(update.shape[1:]))
            torch._foreach_mul_(group, 1 - rate * self.weight_decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-scale)

    def _orthogonal(self, x: Tensor) -> Tensor:
        a, b, c = self.COEFFICIENTS
        tall = x.shape[1] > x.shape[2]
        y = x.bfloat16()
        y = y.mT if tall else y
        y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            square = y @ y.mT
            y = a * y + (b * square + c * square @ square) @ y
        return (y.mT if tall else y).to(x.dtype)


class Optimiser:
    """Muon for the matrices of the layers, AdamW for the rest; one learning rate for both."""

    def __init__(self, learner: Learner, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        matrices, others, plain = [], [], []
        for name, parameter in learner.named_parameters():
            if parameter.dim() == 2 and ".layers." in name and recipe.muon:
                matrices.append(parameter)
            elif parameter.dim() >= 2 and "embed" not in name:
                others.append(parameter)
            else:
                plain.append(parameter)
        groups = [{"params": others, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), eps=1e-8, fused=device.type == "cuda")
        self.muon = Muon(matrices, recipe.weight_decay)

    def step(self, scale: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.rate * scale
        self.adam.step()
        self.muon.step(self.recipe.rate * scale)

    def state(self) -> dict[str, object]:
        return {"adam": self.adam.state_dict(), "muon": self.muon.momenta}

    def restore(self, state: dict[str, object]) -> None:
        self.adam.load_state_dict(state["adam"])
        for mine, saved in zip(self.muon.momenta, state["muon"], strict=True):
            mine.copy_(saved)


def word_errors(reference: list[str], hypothesis: list[str]) -> int:
    """Levenshtein distance between two lists of words."""
    row = np.arange(len(hypothesis) + 1)
    for word in reference:
        diagonal, row[0] = row[0], row[0] + 1
        for column, other in enumerate(hypothesis, 1):
            best = min(row[column] + 1, row[column - 1] + 1, diagonal + (word != other))
            diagonal, row[column] = row[column], best
    return int(row[-1])


class Examiner:
    """Greedy decoding of the held-out clips, by source."""

    def __init__(self, clips: list[Clip], sampler: Sampler, tokenizer: Tokenizer, most: int) -> None:
        self.clips, self.sampler, self.tokenizer = clips, sampler, tokenizer
        self.stop = tokenizer.token_to_id("<|im_end|>")
        by_source: dict[str, list[int]] = {}
        for index, clip in enumerate(clips):
            if clip.dev and RATE // 2 < clip.length < 30 * RATE and clip.language != "Chinese":
                by_source.setdefault(clip.source, []).append(index)
        self.chosen = [index for rows in by_source.values() for index in rows[:most]]
        self.chosen.sort(key=lambda index: clips[index].length)

    @torch.inference_mode()
    def run(self, learner: Learner, frontend: Frontend, batch_size: int = 48) -> dict[str, float]:
        self.rounded = deepcopy(learner.network).to(torch.bfloat16).eval()
        wrong: dict[str, int] = {}
        total: dict[str, int] = {}
        samples = []
        for start in range(0, len(self.chosen), batch_size):
            rows = self.chosen[start : start + batch_size]
            for index, text in zip(rows, self._decode(frontend, rows), strict=True):
                clip = self.clips[index]
                heard = spoken(text.split("<asr_text>")[-1]).split()
                said = spoken(clip.text).split()
                wrong[clip.source] = wrong.get(clip.source, 0) + (word_errors(said, heard) if said else bool(heard))
                total[clip.source] = total.get(clip.source, 0) + (len(said) or 1)
                samples.append((clip.source, clip.text, text))
        for source, text, heard in samples[:: max(1, len(samples) // 6)]:
            print(f"    {source}: {text[:90]} | {heard[:110]}", flush=True)
        return {source: round(100 * wrong[source] / total[source], 1) for source in sorted(total)}

    def _decode(self, frontend: Frontend, rows: list[int]) -> list[str]:
        network, device = self.rounded, frontend.device
        examples = [Example([Piece(row, 1.0, 0)], self.clips[row].length, "English") for row in rows]
        seconds = math.ceil(max(example.samples for example in examples) / RATE)
        tensors = self.sampler._audio(examples, random.Random(0))
        mel, frames = frontend.features(Batch(seconds, tensors).to(device), train=False)
        prefix, suffix = self.sampler.vocabulary.frame([])
        audio = network.encode([row[:, :count] for row, count in zip(mel, frames.tolist(), strict=True)])
        ends = [torch.tensor(ids, device=device) for ids in (prefix, suffix)]
        prompts, lengths = network.embed_prompts(audio, [ends[0]] * len(rows), [ends[1]] * len(rows))
        limit = 8 * seconds + 24
        cache = KVCache.allocate(network.config.text, len(rows), max(lengths) + limit, torch.bfloat16, device)
        token = network.prefill(prompts, lengths, cache).argmax(-1)
        filled, longest, out = torch.tensor(lengths, device=device), max(lengths), [token]
        for _ in range(limit - 1):
            token = network.step(token, filled, longest, cache).argmax(-1)
            out.append(token)
            filled, longest = filled + 1, longest + 1
            if len(out) % 16 == 0 and bool((torch.stack(out) == self.stop).any(0).all()):
                break
        answers = torch.stack(out, 1).tolist()
        cut = [ids[: ids.index(self.stop)] if self.stop in ids else ids for ids in answers]
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in cut]


def load_corpus(folder: Path, device: torch.device) -> tuple[Tensor, list[Clip]]:
    names = ["real", "noise", *sorted(path.stem for path in folder.glob("synthetic*.done"))]
    buffers, clips = read_parts(folder, names)
    samples = torch.empty(sum(map(len, buffers)), dtype=torch.int16, device=device)
    offset = 0
    for buffer in buffers:
        samples[offset : offset + len(buffer)] = torch.from_numpy(np.array(buffer)).to(device)
        offset += len(buffer)
    return samples, clips


def save_weights(network: Qwen3ASR, path: Path) -> None:
    """The averaged weights alone, in bf16, in parts that are small enough to carry."""
    state = {
        name: tensor.detach().to(torch.bfloat16).cpu().contiguous() for name, tensor in network.state_dict().items()
    }
    part: dict[str, Tensor] = {}
    number = size = 0
    for name, tensor in state.items():
        if size + tensor.nbytes > 15_000_000:
            torch.save(part, f"{path}.{number}.pt")
            part, size, number = {}, 0, number + 1
        part[name] = tensor
        size += tensor.nbytes
    torch.save(part, f"{path}.{number}.pt")


class Run:
    """One training run: set up, loop, average, examine, save."""

    def __init__(self, arguments: argparse.Namespace, recipe: Recipe) -> None:
        self.arguments, self.recipe = arguments, recipe
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if self.world > 1 else arguments.gpu)
        if not torch.cuda.is_available():
            self.device = torch.device("cpu")
        else:
            torch.cuda.set_device(self.device)
        torch.manual_seed(recipe.seed)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
        names = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        raw = architecture(len(names), {name: i for i, name in enumerate(names) if name.startswith("<|")}, recipe)
        self.config = parse_config(raw)
        samples, clips = load_corpus(arguments.corpus, self.device)
        self.progress = torch.zeros(()).share_memory_()
        words, seed = Vocabulary(tokenizer, clips), recipe.seed * 64 + self.rank
        self.sampler = Sampler(clips, words, self.config.audio, recipe.budget, seed, self.progress)
        self.examiner = Examiner(clips, self.sampler, tokenizer, arguments.dev_clips)
        rooms = list(np.load(arguments.corpus / "rooms.npz").values())
        self.frontend = Frontend(samples, rooms, Strength())
        self.learner = Learner(self.config, recipe).to(self.device)
        self.flat = Flat(self.learner)
        self.optimiser = Optimiser(self.learner, recipe, self.device)
        if arguments.resume:
            saved = torch.load(arguments.resume, map_location=self.device, weights_only=True)
            self.learner.load_state_dict(saved["learner"])
            self.optimiser.restore(saved["optimiser"])
        self.average = deepcopy(self.learner).requires_grad_(False)
        if arguments.resume:
            self.average.load_state_dict(saved["average"])
        self.average_flat = Flat(self.average)
        self.shaped: dict[int, nn.Module] = {}
        torch.manual_seed(recipe.seed * 7919 + self.rank)
        for seconds in BUCKETS if self.device.type == "cuda" else ():
            self._losses(self.sampler.filler(seconds).to(self.device))
        if self.world > 1:  # after the graphs are captured: a collective's watchdog may break a capture
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if self.rank == 0:
            self._announce(clips)

    def _announce(self, clips: list[Clip]) -> None:
        hours: dict[str, float] = {}
        for clip in clips:
            hours[clip.source] = hours.get(clip.source, 0) + clip.length / RATE / 3600
        parameters = sum(parameter.numel() for parameter in self.learner.network.parameters())
        error = check_frontend(self.frontend, np.random.default_rng(0).standard_normal(RATE * 3).astype(np.float32))
        print(f"{parameters / 1e6:.2f} M parameters, hours { ({k: round(v, 2) for k, v in hours.items()}) }")
        print(f"front end within {error:.2e} of the package's; {json.dumps(asdict(self.recipe))}", flush=True)

    def _batches(self) -> Iterator[Batch]:
        return iter(
            torch.utils.data.DataLoader(
                self.sampler,
                batch_size=None,
                num_workers=self.arguments.workers,
                prefetch_factor=6 if self.arguments.workers else None,
                pin_memory=self.device.type == "cuda",
            )
        )

    def run(self) -> None:
        batches = self._batches()
        begin = last = time.time()
        span, step, seen, elapsed = self.recipe.minutes * 60, 0, 0.0, 0.0
        self.learner.train()
        next_look = self.arguments.look_every
        while True:
            if step % AGREE_EVERY == 0:
                elapsed = self._agree(time.time() - begin)
            if elapsed >= span:
                break
            way = elapsed / span
            progress = self.recipe.progress_from + way * (self.recipe.progress_to - self.recipe.progress_from)
            self.progress.fill_(progress)
            self.frontend.level = self.frontend.strength.level(progress)
            batch = next(batches).to(self.device)
            seen += batch.seconds * len(batch.tensors["samples"])
            losses, norm = self._step(batch, schedule(progress, self.recipe), step)
            step += 1
            if self.rank == 0 and step % self.arguments.print_every == 0:
                text = " ".join(f"{name} {float(loss.detach()):.3f}" for name, loss in losses.items())
                rate = seen / (time.time() - last)
                print(
                    f"{elapsed:6.0f} s step {step} {progress:.2f} {text} norm {float(norm):.2f} {rate:.0f} s/s",
                    flush=True,
                )
                last, seen = time.time(), 0.0
            if elapsed > next_look:
                next_look += self.arguments.look_every
                self._look(step)
        if self.rank == 0:
            self._save()
            self._look(step)
        if self.world > 1:
            dist.destroy_process_group()

    def _save(self) -> None:
        """All that a later run can resume from, and the averaged weights alone."""
        state = {
            "learner": self.learner.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state(),
        }
        torch.save(state, self.arguments.checkpoint)
        save_weights(self.average.network, self.arguments.output / self.arguments.name)

    def _agree(self, elapsed: float) -> float:
        """Rank 0's clock for all, so that all stop together."""
        if self.world == 1:
            return elapsed
        clock = torch.tensor([elapsed], device=self.device)
        dist.broadcast(clock, 0)
        return float(clock)

    def _shaped(self, seconds: int, inputs: tuple[Tensor, ...]) -> nn.Module:
        """The learner for this bucket; a CUDA graph on CUDA: launching 2,000 kernels costs more than running them."""
        if seconds not in self.shaped:
            module: nn.Module = Shaped(self.learner)
            if self.device.type == "cuda":
                samples = tuple(tensor.clone() for tensor in inputs)
                module = torch.cuda.make_graphed_callables(module, samples, allow_unused_input=True)
            self.shaped[seconds] = module
        return self.shaped[seconds]

    def _losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        t, recipe = batch.tensors, self.recipe
        with torch.no_grad():
            mel, frames = self.frontend.features(batch, train=True)
        inputs = (mel, frames, t["ids"], t["audio_row"], t["asked"], t["labels"])
        answer, pieces, letters, late = self._shaped(batch.seconds, inputs)(*inputs)
        losses, total = {"answer": answer}, answer
        blank = pieces.shape[-1] - 1
        for name, weight, loss in (
            ("ctc", recipe.ctc, lambda: ctc_loss(pieces, blank, t["counts"], t["spoken"], t["spoken_length"])),
            ("late", recipe.decoder_ctc, lambda: ctc_loss(late, blank, t["counts"], t["spoken"], t["spoken_length"])),
            (
                "letters",
                recipe.letters,
                lambda: ctc_loss(letters, 0, t["counts"] * LETTERS_EACH_TOKEN, t["letters"], t["letters_length"]),
            ),
        ):
            if weight:
                losses[name] = loss()
                total = total + weight * losses[name]
        return total, losses

    def _step(self, batch: Batch, scale: float, step: int) -> tuple[dict[str, Tensor], Tensor]:
        loss, losses = self._losses(batch)
        self.flat.gradients.zero_()
        loss.backward()
        if self.world > 1:
            dist.all_reduce(self.flat.gradients)
            self.flat.gradients /= self.world
        norm = self.flat.gradients.norm()
        self.flat.gradients *= (1 / (norm + 1e-6)).clamp(max=1.0)
        self.optimiser.step(scale)
        decay = min(self.recipe.average, (step + 1) / (step + 20))
        self.average_flat.values.lerp_(self.flat.values, 1 - decay)
        return losses, norm

    def _look(self, step: int) -> None:
        if self.rank == 0:
            print(f"  step {step} word error rates {self.examiner.run(self.average, self.frontend)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--name", default="demo")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
    parser.add_argument("--print-every", type=int, default=200)
    parser.add_argument("--look-every", type=float, default=100.0)
    parser.add_argument("--dev-clips", type=int, default=60)
    for name, value in asdict(Recipe()).items():
        kind = (lambda text: text == "True") if isinstance(value, bool) else type(value)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)
    arguments = parser.parse_args()
    recipe = Recipe(**{name: getattr(arguments, name) for name in asdict(Recipe())})
    Run(arguments, recipe).run()


if __name__ == "__main__":
    main()
