"""Decoder layers that stay in main memory and pass through a place on the device for every use. Slow, but small."""

from __future__ import annotations

import copy
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from quasr.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quasr.model.asr import Qwen3ASR

FEWEST = 2
"""One layer's place on the device is needed to stream through, so that one layer alone would save nothing."""


def check_offload(count: int, layers: int) -> None:
    """Raises OptionError for a number of layers that cannot be, or saves nothing."""
    if not FEWEST <= count <= layers:
        raise OptionError(f"offload is {count}: this decoder can leave {FEWEST} to {layers} layers on the host")


def offload(model: Qwen3ASR, count: int, device: torch.device) -> None:
    """Moves a network that lies in main memory to `device`, but for `count` decoder layers, spread evenly.

    Those go through two places on the device, each as large as a layer (one place where `count` is 2): while one is
    computed with, the next layer is copied into the other. Raises OptionError as `check_offload`.
    """
    stack = model.decoder.layers
    check_offload(count, len(stack))
    chosen = [index * len(stack) // count for index in range(count)]
    hosted = [stack[index] for index in chosen]
    stream = LayerStream(hosted, device)
    for turn, index in enumerate(chosen):
        stack[index] = StreamedLayer(stream, turn)
    model.to(device)


class LayerStream:
    """Host layers, in the order of their use, and the places on the device that they take by turns.

    `hosted` may differ in their schemes: every kind has its own places.
    """

    def __init__(self, hosted: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        self._kinds = [_kind(layer) for layer in hosted]
        self._places = {kind: self._make_places(kind, hosted) for kind in dict.fromkeys(self._kinds)}
        self._weights = [_pinned(layer) if device.type == "cuda" else _tensors(layer) for layer in hosted]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def places(self) -> list[nn.Module]:
        """All places on the device."""
        return [place.layer for places in self._places.values() for place in places]

    def take(self, turn: int) -> nn.Module:
        """The place that holds the layer of `turn`, ready to compute with."""
        place = self._place(turn)
        if place.holds != turn:
            self._fill(place, turn)
        if place.filled is not None:
            torch.cuda.current_stream(self._device).wait_event(place.filled)
        return place.layer

    def give(self, turn: int) -> None:
        """The layer of `turn` has been used: the next one is copied meanwhile, where it has another place."""
        place = self._place(turn)
        if self._copies is not None:
            place.used = torch.cuda.current_stream(self._device).record_event()
        following = (turn + 1) % len(self._weights)
        other = self._place(following)
        if other is not place and other.holds != following:
            self._fill(other, following)

    def _make_places(self, kind: str, hosted: Sequence[nn.Module]) -> list[Place]:
        same = [layer for layer, its in zip(hosted, self._kinds, strict=True) if its == kind]
        return [Place(copy.deepcopy(same[0]).to(self._device)) for _ in range(1 if len(same) <= FEWEST else 2)]

    def _place(self, turn: int) -> Place:
        """Layers of one kind take its places by turns."""
        places = self._places[self._kinds[turn]]
        return places[self._kinds[:turn].count(self._kinds[turn]) % len(places)]

    def _fill(self, place: Place, turn: int) -> None:
        """Copies weights beside the computation, once the place's last user is through."""
        if self._copies is None:
            _copy(self._weights[turn], place.layer)
        else:
            with torch.cuda.stream(self._copies):
                if place.used is not None:
                    self._copies.wait_event(place.used)
                _copy(self._weights[turn], place.layer)
                place.filled = self._copies.record_event()
        place.holds = turn


class Place:
    """A layer's memory on the device, and which layer's weights are in it. The events order copies and products."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.holds = -1
        self.filled: Any = None
        self.used: Any = None


class StreamedLayer(nn.Module):
    """Stands in for a decoder layer that is on the host. Its places are shared, and count once as weights."""

    def __init__(self, stream: LayerStream, turn: int) -> None:
        super().__init__()
        self.places = nn.ModuleList(stream.places)
        self._stream = stream
        self._turn = turn

    def prefill(self, *arguments: Any) -> Tensor:
        """As the layer's own."""
        return self._run("prefill", arguments)

    def step(self, *arguments: Any) -> Tensor:
        """As the layer's own."""
        return self._run("step", arguments)

    def _run(self, name: str, arguments: tuple[Any, ...]) -> Tensor:
        y = getattr(self._stream.take(self._turn), name)(*arguments)
        self._stream.give(self._turn)
        return cast("Tensor", y)


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in chain(layer.named_parameters(), layer.named_buffers())}


def _pinned(layer: nn.Module) -> dict[str, Tensor]:
    """Copies from page-locked memory alone run beside the computation."""
    return {name: tensor.pin_memory() for name, tensor in _tensors(layer).items()}


def _copy(weights: dict[str, Tensor], layer: nn.Module) -> None:
    for name, target in _tensors(layer).items():
        target.copy_(weights[name], non_blocking=True)


def _kind(layer: nn.Module) -> str:
    """Layers of one kind have the same modules and the same tensors but for their numbers."""
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in _tensors(layer).items()}
    return f"{layer!r} {shapes}"
