"""The benchmark's arithmetic on systems, clocks and processes made by hand; real ones are tried end to end."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import quasr
from quasr.bench import run as run_module
from quasr.bench import subjects, worker
from quasr.bench.checkpoint import make_checkpoint
from quasr.bench.job import Bandwidth, Batch, Job, Measurement, Start
from quasr.bench.report import Report, commit, write_json
from quasr.bench.run import CACHES, Row, bench
from quasr.bench.shape import SHAPES, Shape, shape_named
from quasr.bench.subjects import parse_batches, parse_peers, require_packages
from quasr.bench.systems import Prompt, check_counts, token_bytes
from quasr.engine.base import EngineInfo
from quasr.errors import MissingDependencyError, ModelError, OptionError
from quasr.evaluation.process import Answer
from quasr.model.asr import Qwen3ASR
from quasr.model.config import parse_config, read_config
from quasr.quant.recipe import recipe_for
from quasr.weights.load import load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

torch.set_num_threads(1)

TINY = Shape(
    2, 32, 2, 64, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96,
    vocabulary=120, stem_channels=8, special=(1, 2, 7),
)  # fmt: skip


# Shapes and checkpoints


@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "embedding"), [("1.7b", 317.5, 1409.4, 311.2), ("0.6b", 186.4, 440.5, 155.6)]
)
def test_shapes_have_the_published_numbers_of_parameters(
    name: str, encoder: float, decoder: float, embedding: float
) -> None:
    """Millions, as the technical report's checkpoints have them."""
    with torch.device("meta"):
        network = Qwen3ASR(parse_config(SHAPES[name].config()))
    millions = {key: tensor.numel() / 1e6 for key, tensor in network.state_dict().items()}
    in_encoder = sum(size for key, size in millions.items() if key.startswith("encoder."))
    in_layers = sum(size for key, size in millions.items() if key.startswith("decoder.layers."))
    assert in_encoder == pytest.approx(encoder, abs=0.1)
    assert in_layers == pytest.approx(decoder, abs=0.1)
    assert millions["decoder.embed_tokens.weight"] == pytest.approx(embedding, abs=0.1)


def test_the_demo_shape_is_the_bundled_models() -> None:
    made, bundled = (
        parse_config(SHAPES["demo"].config()),
        read_config(Path(quasr.__file__).parent / "demo" / "model"),
    )
    assert (made.audio, made.text, made.audio_token_id) == (bundled.audio, bundled.text, bundled.audio_token_id)
    with pytest.raises(OptionError, match=r"unknown shape '1\.8b'.*1\.7b"):
        shape_named("1.8b")


def test_a_made_checkpoint_loads_and_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_checkpoint(tmp_path / name, TINY)
    folder = tmp_path / "one"
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()
    stored = load_file(folder / "model.safetensors")
    network = load_model(folder, read_config(folder), torch.bfloat16, torch.device("cpu"))
    assert len(stored) == len(network.state_dict())
    weight = stored["model.language_model.embed_tokens.weight"].float()
    assert weight.std() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(network.decoder.embed_tokens.weight.float(), weight)
    assert torch.equal(network.decoder.norm.weight.float(), torch.ones(64))
    assert not torch.equal(
        stored["model.audio_tower.layers.0.fc1.weight"], stored["model.audio_tower.layers.1.fc1.weight"]
    )


@pytest.mark.parametrize(
    ("compute_type", "gigabytes"), [("bf16", 3.44), ("int8", 1.72), ("int4", 1.04), ("llm-int8", 2.03)]
)
def test_bytes_that_a_token_reads(compute_type: str, gigabytes: float) -> None:
    """Of the 1.7B shape: the layers' 1409.4 and the head's 311.2 million weights, in each recipe's bits."""
    config = parse_config(SHAPES["1.7b"].config())
    assert token_bytes(config, recipe_for(compute_type), "bf16") / 1e9 == pytest.approx(gigabytes, abs=0.01)


def test_the_prompt_has_no_audio_positions_of_its_own() -> None:
    prompt = Prompt.of(parse_config(TINY.config()))
    assert len(prompt.prefix) + len(prompt.suffix) == 15
    assert 7 not in prompt.prefix + prompt.suffix


# Names


def test_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_peers("nf4, transformers") == ["peer:nf4", "peer:transformers"]
    assert parse_peers("none") == []
    monkeypatch.setattr(subjects, "find_spec", lambda package: None if package == "accelerate" else package)
    assert parse_peers(None) == ["peer:transformers", "peer:transformers-compile"]
    require_packages("transformers")
    with pytest.raises(MissingDependencyError, match="nf4 needs accelerate: pip install accelerate"):
        require_packages("nf4")
    for wrong, message in (("nf5", "did you mean nf4"), ("nf4,nf4", "twice")):
        with pytest.raises(OptionError, match=message):
            parse_peers(wrong)


def test_batches() -> None:
    assert parse_batches("16,1, 4,4") == (1, 4, 16)
    for wrong, message in (("", "no batch sizes"), ("1,x", "no batch sizes"), ("0,1", "at least 1")):
        with pytest.raises(OptionError, match=message):
            parse_batches(wrong)


# A measuring process


class Clock:
    """Stands still but for what is done."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return 1000.0 + self.now


@dataclass
class Made:
    """A system that needs 2 s to load and 5 s more for its first call; then 0.3 s, and 10 ms a token and clip."""

    clock: Clock
    most: int = 4
    calls: int = 0
    info = EngineInfo("made", "cpu", "fp32", 1000, ("made by hand",))
    token_bytes = 800

    def prepare(self, clips: Sequence[Any], tokens: int) -> Callable[[], None]:
        def call() -> None:
            if len(clips) > self.most:
                raise RuntimeError("CUDA out of memory.\nTried to allocate")
            self.clock.now += 0.3 + 0.01 * tokens * len(clips) + (0 if self.calls else 5)
            self.calls += 1

        return call


JOB = Job("int8", "/model", "cpu", "all", 30.0, 11, (1, 4, 16, 64), 3, None, 1090.0)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    clock = Clock()
    system = Made(clock)

    def load() -> Made:
        clock.now += 2.0
        return system

    monkeypatch.setattr(worker, "time", clock)
    monkeypatch.setattr(worker, "_maker", lambda job: load)
    return system


def test_times_are_taken_apart(made: Made) -> None:
    found = worker.measure(JOB)
    assert found.start.load == pytest.approx(2.0)
    assert found.start.ready == pytest.approx(12.0)
    assert found.start.first == pytest.approx(5.41)
    assert found.prefill == pytest.approx(0.31)
    assert found.token == pytest.approx(0.01)
    assert [(one.clips, one.seconds) for one in found.batches[:2]] == [
        (1, pytest.approx(0.41)),
        (4, pytest.approx(0.74)),
    ]
    assert found.batches[2:] == (Batch(16, error="RuntimeError: CUDA out of memory. Tried to allocate"),)
    assert (found.engine, found.weight_bytes, found.token_bytes) == ("made", 1000, 800)
    assert Measurement.from_json(found.to_json()) == found


def test_a_first_start_is_one_call(made: Made) -> None:
    found = worker.measure(replace(JOB, task="first"))
    assert (made.calls, found.prefill, found.batches) == (1, None, ())


def test_slow_systems_are_not_called_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, spent = Clock(), iter([99.0, 9.0, 12.0, 11.0, 1.0])
    monkeypatch.setattr(worker, "time", clock)

    def call() -> None:
        clock.now += next(spent)

    assert worker.median_seconds(call, 5) == pytest.approx(10.5)
    assert next(spent) == 11.0


def test_clips_are_the_same_in_every_process_and_differ_among_each_other() -> None:
    one, two = worker.clips(JOB, 2), worker.clips(JOB, 3)
    assert all(len(clip) == 480_000 for clip in two)
    assert (one[0] == two[0]).all()
    assert (one[0] != one[1]).any()


def test_every_clip_gets_its_tokens() -> None:
    check_counts([5, 5], 5)
    with pytest.raises(ModelError, match="4 tokens were decoded where 5 were asked for"):
        check_counts([5, 4], 5)


def test_a_worker_answers_in_a_file_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], made: Made
) -> None:
    def main(job: Job) -> int:
        monkeypatch.setattr(worker.sys, "argv", ["worker", str(tmp_path / "answer")])
        monkeypatch.setattr(worker.sys.stdin, "read", job.to_json, raising=False)
        return worker.main()

    assert main(JOB) == 0
    assert Measurement.from_json((tmp_path / "answer").read_text()).engine == "made"
    made.most = 0
    assert main(JOB) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "RuntimeError: CUDA out of memory. Tried to allocate"


# The run and its report

START = Start(9.0, 2.0, 5.0)
FOUND = Measurement(
    START, "torch", "cuda:0", "bf16", "int8", 2_000_000_000, 1_700_000_000, (), 0.05, 0.001,
    (Batch(1, 0.5, 2_250_000_000), Batch(4, error="out of memory")),
)  # fmt: skip
MEMORY = Bandwidth(3.4e12, "copy", "A GPU")


def test_each_system_starts_cold_and_then_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str]] = []

    def ask(module: str, question: str, environment: Mapping[str, str]) -> Answer:
        job = Job.from_json(question)
        (folder,) = {environment[name] for name in CACHES}
        assert Path(folder).is_dir()
        asked.append((job.system, job.task, folder))
        if job.system == "bad" or (job.system == "half" and job.task == "all"):
            return Answer(None, f"{job.task} failed")
        return Answer(FOUND.to_json())

    monkeypatch.setattr(run_module, "ask", ask)
    told: list[str] = []
    rows = list(bench(JOB, ["bad", "half", "good"], told.append))
    assert rows == [Row("bad", "first failed"), Row("half", "all failed", START), Row("good", None, START, FOUND)]
    assert told == ["bad", "half", "good"]
    assert [one[:2] for one in asked] == [
        (n, t) for n, t in (("bad", "first"), ("half", "first"), ("half", "all"), ("good", "first"), ("good", "all"))
    ]
    assert asked[1][2] == asked[2][2] != asked[3][2]


def test_without_cold_starts_each_system_has_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def ask(module: str, question: str, environment: Mapping[str, str]) -> Answer:
        job = Job.from_json(question)
        assert environment == {}
        asked.append((job.system, job.task))
        return Answer(None, "no") if job.system == "bad" else Answer(FOUND.to_json())

    monkeypatch.setattr(run_module, "ask", ask)
    assert list(bench(JOB, ["bad", "good"], [].append, cold=False)) == [Row("bad", "no"), Row("good", measured=FOUND)]
    assert asked == [("bad", "all"), ("good", "all")]
    cells = dict(zip(report().columns(), report().cells(Row("good", measured=FOUND)), strict=True))
    assert [cells[name] for name in ("ready cold", "ready warm", "first cold", "first warm")] == [
        "-",
        "9.00",
        "-",
        "5.00",
    ]


def report() -> Report:
    rows = (Row("int8", None, replace(START, first=7.0), FOUND), Row("peer:nf4", "nf4 needs accelerate"))
    return Report(
        "the 1.7b shape", replace(JOB, batches=(1, 4, 16)), MEMORY, rows, ("quasr", "bench", "--shape", "1.7b")
    )


def test_figures() -> None:
    made = report()
    row = made.rows[0]
    assert made.share(row) == pytest.approx(0.5)
    assert made.speed(FOUND.batches[0]) == pytest.approx(60)
    assert made.peak(row, FOUND.batches[0]) == 250_000_000
    assert made.peak(replace(row, measured=replace(FOUND, device="cpu")), FOUND.batches[0]) == 2_250_000_000
    assert dict(zip(made.columns(), made.cells(row), strict=True)) == {
        "system": "int8", "dtype": "int8 in bf16", "load": "2.00", "ready cold": "9.00", "ready warm": "9.00",
        "first cold": "7.00", "first warm": "5.00", "prefill ms": "50.00", "ms/token": "1.00", "bandwidth": "50%",
        "x1": "60", "x4": "-", "x16": "-", "weights MB": "2000",
        "peak1 MB": "250", "peak4 MB": "-", "peak16 MB": "-",
    }  # fmt: skip
    assert made.problems() == [
        "peer:nf4 failed: nf4 needs accelerate", "int8 failed with 4 clips at once: out of memory",
    ]  # fmt: skip


def test_json(tmp_path: Path) -> None:
    write_json(tmp_path / "b.json", report())
    found = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert found["command"] == "quasr bench --shape 1.7b"
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["device"] == "A GPU"
    assert [row["system"] for row in found["rows"]] == ["int8", "peer:nf4"]
    assert found["rows"][0]["bandwidth_share"] == pytest.approx(0.5)
    assert found["rows"][0]["batches"][0]["audio_seconds_per_second"] == pytest.approx(60)
    assert found["rows"][0]["cold"]["first"] == 7.0
    assert found["rows"][1]["error"] == "nf4 needs accelerate"
    with pytest.raises(OptionError, match="cannot be written"):
        write_json(tmp_path / "none" / "b.json", report())


def test_commit_is_that_of_the_source_tree() -> None:
    found = commit()
    assert found is None or len(found.removesuffix("+changes")) == 40
