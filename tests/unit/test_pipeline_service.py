"""The service around a transcriber that answers from the bytes it is given: no weights, no audio."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from quasr.errors import AudioDecodeError, ModelNotFoundError, OptionError, ResourceError
from quasr.pipeline import service as module
from quasr.pipeline.service import CLOSED, FORKED, ServiceResult, SpeechService
from quasr.types import Notice, Transcript

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class FakeTranscriber:
    """Says its input. `bad` is no audio, `fault` fails its whole batch, `crash` ends the thread."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.overrides: list[dict[str, object]] = []
        self.closed = 0
        self.gate = threading.Event()
        self.gate.set()
        self.decoding = threading.Event()

    def transcribe_batch(
        self, audios: Sequence[bytes], *, progress: Any, **overrides: object
    ) -> Iterator[Transcript | AudioDecodeError]:
        words = [bytes(audio).decode() for audio in audios]
        self.batches.append(words)
        self.overrides.append(overrides)
        if overrides.get("language") == "Klingon":
            raise OptionError("Klingon is not known")
        return self._decode(words, progress)

    def _decode(self, words: list[str], progress: Any) -> Iterator[Transcript | AudioDecodeError]:
        self.decoding.set()
        assert self.gate.wait(10)
        if "fault" in words:
            raise ResourceError("out of memory")
        if "bug" in words:
            raise ZeroDivisionError("a\nbug")
        if "crash" in words:
            raise SystemExit("crash")
        for word in words:
            progress(1.0)
            yield AudioDecodeError("bad is not audio") if word == "bad" else Transcript(word, "English", 1.5)

    def close(self) -> None:
        self.closed += 1


class Loader:
    """Counts; each load gives a new transcriber, or the error that is set."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.made: list[FakeTranscriber] = []
        self.error: Exception | None = None
        self.pause = 0.0

    def __call__(self, model: Any, **options: Any) -> FakeTranscriber:
        self.calls.append((model, options))
        time.sleep(self.pause)
        if self.error:
            raise self.error
        self.made.append(FakeTranscriber())
        return self.made[-1]


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    made = Loader()
    monkeypatch.setattr(module, "load", made)
    return made


def wait_for(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def service_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "quasr-service"]


def held(service: SpeechService, loader: Loader, first: bytes = b"first") -> tuple[FakeTranscriber, threading.Thread]:
    """A service whose thread is in the middle of decoding `first`."""
    service.transcribe_bytes(b"warm")
    transcriber = loader.made[-1]
    transcriber.gate.clear()
    transcriber.decoding.clear()
    caller = threading.Thread(target=service.transcribe_bytes, args=(first,))
    caller.start()
    assert transcriber.decoding.wait(5)
    return transcriber, caller


def test_result_is_a_frozen_mapping_with_five_entries() -> None:
    result = ServiceResult(True, "Hi.", 1.5, "English")
    plain = {"success": True, "text": "Hi.", "audio_duration": 1.5, "language": "English", "error": None}
    assert result.to_dict() == plain
    assert list(result.to_dict()) == ["success", "text", "audio_duration", "language", "error"]
    assert dict(result) == plain
    assert result == plain
    assert (len(result), result["text"], result.text) == (5, "Hi.", "Hi.")
    assert json.loads(json.dumps(result.to_dict())) == plain
    with pytest.raises(FrozenInstanceError):
        result.text = "no"  # type: ignore[misc]
    with pytest.raises(KeyError):
        result["warnings"]


def test_loads_on_first_use_with_the_given_choices(loader: Loader) -> None:
    with SpeechService("some/model", compute_type="int8", device="cpu", batch_size=32, memory="4GB") as service:
        assert (loader.calls, service.loaded) == ([], False)
        assert service.transcribe_bytes(b"hello") == ServiceResult(True, "hello", 1.5, "English")
        assert service.loaded
        options = {"compute_type": "int8", "device": "cpu", "batch_size": 32, "memory": "4GB"}
        assert loader.calls == [("some/model", options)]
    assert loader.made[0].closed == 1
    assert service_threads() == []


def test_concurrent_first_calls_share_one_load(loader: Loader) -> None:
    loader.pause = 0.1
    with SpeechService() as service, ThreadPoolExecutor(30) as pool:
        words = [f"clip{index}" for index in range(30)]
        assert [result.text for result in pool.map(service.transcribe_bytes, map(str.encode, words))] == words
    assert len(loader.calls) == 1


def test_what_waits_is_decoded_together_up_to_the_batch_size(loader: Loader) -> None:
    with SpeechService(batch_size=4) as service, ThreadPoolExecutor(6) as pool:
        transcriber, caller = held(service, loader)
        answers = [pool.submit(service.transcribe_bytes, b"bad" if index == 3 else b"%d" % index) for index in range(6)]
        wait_for(lambda: len(service._worker._waiting) == 6)
        transcriber.gate.set()
        results = [answer.result(5) for answer in answers]
        caller.join(5)
    assert [len(batch) for batch in transcriber.batches] == [1, 1, 4, 2]
    assert [result.text for result in results] == ["0", "1", "2", "", "4", "5"]
    assert results[3] == ServiceResult(success=False, error="bad is not audio")


def test_options_reach_the_model_and_are_not_mixed(loader: Loader) -> None:
    with SpeechService() as service, ThreadPoolExecutor(4) as pool:
        transcriber, caller = held(service, loader)
        answers = [
            pool.submit(service.transcribe_bytes, b"%d" % index, language=language)
            for index, language in enumerate(["en", "de", "en", "Klingon"])
        ]
        wait_for(lambda: len(service._worker._waiting) == 4)
        transcriber.gate.set()
        results = [answer.result(5) for answer in answers]
        caller.join(5)
    assert [result.text for result in results] == ["0", "1", "2", ""]
    assert results[3].error == "Klingon is not known"
    asked = {(frozenset(words), str(given.get("language"))) for words, given in list(
        zip(transcriber.batches, transcriber.overrides, strict=True))[2:]}  # fmt: skip
    assert asked == {
        (frozenset({"0", "2"}), "en"),
        (frozenset({"1"}), "de"),
        (frozenset({"3"}), "Klingon"),
    }


@pytest.mark.parametrize(
    ("culprit", "message"),
    [(b"fault", "out of memory"), (b"bug", "internal error: ZeroDivisionError: a bug")],
)
def test_a_batch_that_fails_fails_only_the_clip_at_fault(loader: Loader, culprit: bytes, message: str) -> None:
    with SpeechService() as service, ThreadPoolExecutor(3) as pool:
        transcriber, caller = held(service, loader)
        answers = [pool.submit(service.transcribe_bytes, data) for data in (b"a", culprit, b"b")]
        wait_for(lambda: len(service._worker._waiting) == 3)
        transcriber.gate.set()
        first, failed, last = (answer.result(5) for answer in answers)
        caller.join(5)
        assert (first.text, last.text) == ("a", "b")
        assert failed == ServiceResult(success=False, error=message)
        assert service.transcribe_bytes(b"next").success


def test_a_model_that_does_not_load_is_an_answer_for_all_who_wait(loader: Loader) -> None:
    loader.error, loader.pause = ModelNotFoundError("no such model"), 0.2
    with SpeechService(batch_size=2) as service:
        with ThreadPoolExecutor(10) as pool:
            results = list(pool.map(service.transcribe_bytes, [b"x"] * 10))
        assert {result.error for result in results} == {"no such model"}
        assert len(loader.calls) <= 2
        loader.error = None
        assert service.transcribe_bytes(b"again").text == "again"


def test_options_that_cannot_be_compared_harm_nobody_else(loader: Loader) -> None:
    with SpeechService() as service, ThreadPoolExecutor(4) as pool:
        transcriber, caller = held(service, loader)
        odd = [pool.submit(service.transcribe_bytes, b"odd", language=np.array(["de", "en"])) for _ in range(2)]
        even = [pool.submit(service.transcribe_bytes, b"even", language="de") for _ in range(2)]
        wait_for(lambda: len(service._worker._waiting) == 4)
        transcriber.gate.set()
        assert [answer.result(5).text for answer in even] == ["even", "even"]
        assert all(answer.result(5).error.startswith("internal error: ") for answer in odd)
        caller.join(5)


def test_options_that_are_none_are_told(loader: Loader) -> None:
    with SpeechService() as service:
        for name in ("progress", "limits", "options", "lang"):
            assert service.transcribe_bytes(b"x", **{name: 1}).error.startswith(f"unknown option {name!r}: there are ")
    assert loader.calls == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_is_answered_and_does_not_wait_for_a_thread_that_stayed_behind(loader: Loader) -> None:
    with SpeechService() as service:
        service.transcribe_bytes(b"hello")
        child = os.fork()
        if not child:
            signal.alarm(5)
            told = service.transcribe_bytes(b"hello").error == FORKED
            service.unload()
            service.close()
            os._exit(0 if told else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert service.transcribe_bytes(b"again").text == "again"


def test_a_crash_answers_everybody_and_the_next_call_starts_anew(loader: Loader) -> None:
    with SpeechService(batch_size=2) as service, ThreadPoolExecutor(4) as pool:
        transcriber, caller = held(service, loader, b"crash")
        answers = [pool.submit(service.transcribe_bytes, b"%d" % index) for index in range(4)]
        wait_for(lambda: len(service._worker._waiting) == 4)
        transcriber.gate.set()
        assert {answer.result(5).error for answer in answers} == {"internal error: SystemExit: crash"}
        caller.join(5)
        assert transcriber.closed == 1
        assert service.transcribe_bytes(b"again").text == "again"
    assert len(loader.calls) == 2


def test_idle_unloads_and_the_next_call_loads_again(loader: Loader) -> None:
    with SpeechService(idle_seconds=0.05) as service:
        assert service.transcribe_bytes(b"one").success
        wait_for(lambda: not service.loaded)
        wait_for(lambda: loader.made[0].closed == 1)
        assert service.transcribe_bytes(b"two").success
    assert len(loader.calls) == 2


def test_use_keeps_it_loaded(loader: Loader) -> None:
    with SpeechService(idle_seconds=0.5) as service:
        for _ in range(8):
            assert service.transcribe_bytes(b"one").success
            time.sleep(0.1)
    assert len(loader.calls) == 1


def test_unload_waits_for_the_batch_in_hand(loader: Loader) -> None:
    service = SpeechService()
    service.unload()
    transcriber, caller = held(service, loader)
    unloading = threading.Thread(target=service.unload)
    unloading.start()
    unloading.join(0.05)
    assert (unloading.is_alive(), transcriber.closed) == (True, 0)
    transcriber.gate.set()
    unloading.join(5)
    caller.join(5)
    assert (service.loaded, transcriber.closed) == (False, 1)
    assert service.transcribe_bytes(b"again").success
    service.close()
    service.unload()
    assert len(loader.calls) == 2


def test_close_answers_all_who_wait(loader: Loader) -> None:
    service = SpeechService()
    with ThreadPoolExecutor(5) as pool:
        transcriber, caller = held(service, loader)
        answers = [pool.submit(service.transcribe_bytes, b"x") for _ in range(5)]
        wait_for(lambda: len(service._worker._waiting) == 5)
        closing = threading.Thread(target=service.close)
        closing.start()
        wait_for(lambda: service._worker._closed)
        transcriber.gate.set()
        assert {answer.result(5).error for answer in answers} == {CLOSED}
        closing.join(5)
        caller.join(5)
    assert not closing.is_alive()
    assert service.transcribe_bytes(b"late") == ServiceResult(success=False, error=CLOSED)
    service.close()
    assert transcriber.closed == 1


def test_close_gives_a_long_decode_up_after_its_batch(loader: Loader) -> None:
    service = SpeechService()
    with ThreadPoolExecutor(3) as pool:
        transcriber, caller = held(service, loader)
        answers = [pool.submit(service.transcribe_bytes, b"%d" % index) for index in range(3)]
        wait_for(lambda: len(service._worker._waiting) == 3)
        transcriber.decoding.clear()
        gate, transcriber.gate = transcriber.gate, threading.Event()
        gate.set()
        assert transcriber.decoding.wait(5)
        closing = threading.Thread(target=service.close)
        closing.start()
        wait_for(lambda: service._worker._closed)
        transcriber.gate.set()
        results = [answer.result(5) for answer in answers]
        closing.join(5)
        caller.join(5)
    assert sorted(result.success for result in results) == [False, False, True]
    assert {result.error for result in results} == {None, CLOSED}


def test_a_service_that_nobody_holds_ends_its_thread(loader: Loader) -> None:
    assert SpeechService().transcribe_bytes(b"one").success
    gc.collect()
    wait_for(lambda: not service_threads())
    assert loader.made[0].closed == 1


def test_async_calls_batch_together_and_cancelled_ones_leave(loader: Loader) -> None:
    async def run(service: SpeechService) -> list[str]:
        await service.atranscribe_bytes(b"warm")
        transcriber = loader.made[0]
        transcriber.gate.clear()
        transcriber.decoding.clear()
        first = asyncio.create_task(service.atranscribe_bytes(b"first"))
        await asyncio.to_thread(transcriber.decoding.wait, 5)
        tasks = [asyncio.create_task(service.atranscribe_bytes(b"%d" % index)) for index in range(4)]
        await asyncio.sleep(0.01)
        tasks[1].cancel()
        transcriber.gate.set()
        done = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert isinstance(done.pop(2), asyncio.CancelledError)
        return [result.text for result in done]  # type: ignore[union-attr]

    with SpeechService() as service:
        assert asyncio.run(run(service)) == ["first", "0", "2", "3"]
    assert loader.made[0].batches[2:] == [["0", "2", "3"]]


def test_the_wrong_kind_of_input_is_an_answer(loader: Loader) -> None:
    with SpeechService() as service:
        url = service.transcribe_file("https://example.org/talk.mp3")
        nothing = service.transcribe_file(None)  # type: ignore[arg-type]
        text = service.transcribe_bytes("talk.mp3")  # type: ignore[arg-type]
    assert [result.success for result in (url, nothing, text)] == [False] * 3
    assert "https://example.org/talk.mp3 is not a file's path" in str(url.error)
    assert "NoneType" in str(nothing.error)
    assert "not a file's bytes" in str(text.error)
    assert loader.calls == []


@pytest.mark.parametrize("options", [{"idle_seconds": 0}, {"idle_seconds": float("nan")}, {"batch_size": 0}])
def test_senseless_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        SpeechService(**options)


def test_warnings_of_a_result_are_logged(
    loader: Loader, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = Transcript("cut", "English", 1.0, warnings=(Notice("token_budget", "the text may be cut short"),))
    monkeypatch.setattr(FakeTranscriber, "_decode", lambda *_: iter([cut]))
    with SpeechService() as service:
        assert service.transcribe_bytes(b"x").text == "cut"
    assert caplog.messages == ["the text may be cut short"]


def test_the_workspaces_of_cublas_stay_as_long_as_a_cuda_graph_may_write_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: what is called on the library, and no GPU."""

    class Graph:
        pass

    calls: list[str] = []
    cuda = SimpleNamespace(
        CUDAGraph=Graph, is_initialized=lambda: True, empty_cache=lambda: calls.append("empty the cache")
    )
    library = SimpleNamespace(_cuda_clearCublasWorkspaces=lambda: calls.append("clear"))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, _C=library))  # type: ignore[arg-type]
    another_models = Graph()
    module.give_back_memory()
    assert calls == ["empty the cache"]
    del another_models
    module.give_back_memory()
    assert calls == ["empty the cache", "clear", "empty the cache"]
