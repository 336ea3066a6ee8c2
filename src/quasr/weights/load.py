"""From a checkpoint folder to a `Qwen3ASR`: tensor by tensor, every stored key used exactly once.

The network is built on the meta device, so nothing is allocated before all names and shapes have been compared.
Each parameter then gets memory of its own, filled through a small staging buffer (`weights/staging.py`).
Views into a memory map would load faster on a CPU; but a file that is replaced or cut off during a run would then end
the process, and their alignment is the file's. So the peak is the weights in the wanted dtype, never a second copy.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quasr.errors import CheckpointError
from quasr.model.asr import Qwen3ASR
from quasr.model.config import read_json
from quasr.weights.layout import EMBEDDING, HEAD, checkpoint_name, name_table, other_layout
from quasr.weights.shard import AGAIN, DTYPES, FLOATS, Shard
from quasr.weights.staging import Staging, Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from quasr.model.config import Layout, ModelConfig
    from quasr.weights.shard import Entry

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

NAMES_SHOWN = 3

COMPARED_BYTES = 4 << 20
"""Of each of two tensors at once."""

QUANTISED_ENDINGS = (".SCB", ".absmax", ".quant_map", ".weight_packed", ".weight_scale", ".qweight", ".qzeros")
NOT_QUANTISED = "quasr reads unquantised checkpoints only: give the original bf16 folder"


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Gives a parameter or buffer of `model` its tensor."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = leaf in dict(module.named_parameters(recurse=False))
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if parameter else tensor)


def place_whole(model: nn.Module, name: str, stored: Stored) -> None:
    """Reads a parameter or buffer of `model` as it is."""
    assign(model, name, stored.whole())


def load_model(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    prepare: Callable[[Qwen3ASR, Mapping[str, Entry]], None] | None = None,
    place: Callable[[Qwen3ASR, str, Stored], None] = place_whole,
) -> Qwen3ASR:
    """Builds the network of `config` and fills it from `folder`, converted to `dtype`, on `device`.

    The result is in evaluation mode and takes no gradients. Reads `model.safetensors`, or the shards that
    `model.safetensors.index.json` names, in either layout of names.
    `prepare` knows what is stored and may exchange layers of the network before anything is compared, for a folder
    that holds them quantised; floats that a layer then declares in another type than `dtype` keep that.
    `place` reads each tensor into the network, and may quantise it on the way.
    Raises CheckpointError for missing, unknown, misshapen, quantised or corrupt tensors, ResourceError where memory
    runs out.
    """
    if prepare is None:
        _refuse_quantised_config(folder)
    with ExitStack() as stack:
        stored = _open_shards(folder, stack)
        if prepare is None:
            _refuse_quantised_names(folder, stored)
        model = _build(folder, config, len(stored)).to(dtype)
        if prepare is not None:
            prepare(model, {name: shard.entries[name] for name, shard in stored.items()})
        table = _match_names(folder, config, model, stored)
        _check_tensors(folder, model, table, stored)
        if config.text.tied_head:
            _check_tied_head(folder, table, stored)
        staging = Staging(device)
        for name, meta in model.state_dict().items():
            place(model, name, Stored(stored[table[name]], table[name], meta.dtype, staging))
        staging.check_finite()
    return model.requires_grad_(False).eval()


def _refuse_quantised_config(folder: Path) -> None:
    path = folder / "config.json"
    raw = read_json(path) if path.is_file() else {}
    quantised = raw.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise CheckpointError(f"{folder} holds weights quantised with {method or 'another tool'}: {NOT_QUANTISED}")


def _refuse_quantised_names(folder: Path, stored: Iterable[str]) -> None:
    marks = [name for name in stored if name.endswith(QUANTISED_ENDINGS) or ".quant_state." in name]
    if marks:
        raise CheckpointError(f"{folder} holds quantised weights ({_some(marks)}): {NOT_QUANTISED}")


def _open_shards(folder: Path, stack: ExitStack) -> dict[str, Shard]:
    """Every stored tensor's name and the open file that holds it."""
    if (folder / SINGLE_FILE).is_file():
        shard = stack.enter_context(Shard(folder / SINGLE_FILE))
        return dict.fromkeys(shard.entries, shard)
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: {AGAIN}, as safetensors")
    index = _read_index(folder / INDEX_FILE)
    stored: dict[str, Shard] = {}
    for file in sorted(set(index.values())):
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} lacks the shard {file}, which {INDEX_FILE} names: {AGAIN}")
        shard = stack.enter_context(Shard(folder / file))
        twice = sorted(stored.keys() & shard.entries.keys())
        if twice:
            raise CheckpointError(f"{folder}: {file} and another shard both hold {_some(twice)}: {AGAIN}")
        stored.update(dict.fromkeys(shard.entries, shard))
    _check_index(folder, index, stored)
    return stored


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, which must be a plain name in the same folder."""
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{path} has no weight_map: {AGAIN}")
    for file in table.values():
        if not isinstance(file, str) or not file.endswith(".safetensors") or "/" in file or "\\" in file:
            raise CheckpointError(f"{path} names a shard {str(file)[:80]!r} that is no file of the folder: {AGAIN}")
    return table


def _check_index(folder: Path, index: Mapping[str, str], stored: Mapping[str, Shard]) -> None:
    wrong = [name for name, file in index.items() if name not in stored or stored[name].path.name != file]
    if wrong:
        raise CheckpointError(f"{folder}: the shards do not hold {_some(wrong)} where {INDEX_FILE} says: {AGAIN}")
    unlisted = sorted(stored.keys() - index.keys())
    if unlisted:
        raise CheckpointError(f"{folder}: the shards hold {_some(unlisted)}, which {INDEX_FILE} does not name: {AGAIN}")


def _build(folder: Path, config: ModelConfig, stored: int) -> Qwen3ASR:
    """The network without memory. A forged config must not keep it busy, nor ask for impossible sizes."""
    layers = config.audio.layers + config.text.layers
    if layers > stored:
        raise CheckpointError(
            f"{folder}: config.json tells of {layers} layers, but only {stored} tensors exist: {AGAIN}"
        )
    try:
        with torch.device("meta"), _NoInitialisation():
            return Qwen3ASR(config)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise CheckpointError(f"{folder}: config.json asks for a network that cannot be built: {AGAIN}") from error


class _NoInitialisation(TorchFunctionMode):
    """Leaves new parameters as they are. Random numbers on the meta device cost 2 s and 70 MB of imports."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _match_names(folder: Path, config: ModelConfig, model: Qwen3ASR, stored: Mapping[str, Shard]) -> dict[str, str]:
    """Parameter name -> stored name, in the layout of config.json or, where that fits nothing and it all, the other."""
    parameters = list(model.state_dict())
    table = name_table(parameters, config.layout)
    missing, unknown = _compare(table, stored, config, config.layout)
    if len(missing) == len(table):
        other = other_layout(config.layout)
        swapped = name_table(parameters, other)
        if not any(_compare(swapped, stored, config, other)):
            logger.warning(
                "%s: config.json is of layout %r, but the tensors are named in %r", folder, config.layout, other
            )
            return swapped
    if missing or unknown:
        found = [f"{word} {_some(names)}" for word, names in (("missing", missing), ("unknown", unknown)) if names]
        raise CheckpointError(f"{folder} does not fit its config.json: {'; '.join(found)}: {AGAIN}")
    return table


def _compare(
    table: Mapping[str, str], stored: Mapping[str, Shard], config: ModelConfig, layout: Layout
) -> tuple[list[str], list[str]]:
    """Stored names that are missing, and stored names that nobody asks for."""
    wanted = set(table.values())
    missing = [name for name in table.values() if name not in stored]
    if config.text.tied_head:
        wanted.add(checkpoint_name(HEAD, layout))
    return missing, [name for name in stored if name not in wanted]


def _check_tensors(folder: Path, model: Qwen3ASR, table: Mapping[str, str], stored: Mapping[str, Shard]) -> None:
    wrong = []
    for parameter, meta in model.state_dict().items():
        name = table[parameter]
        entry = stored[name].entries[name]
        if entry.shape != tuple(meta.shape):
            wrong.append(f"{name} is {list(entry.shape)} where {list(meta.shape)} is expected")
        elif not _fits(entry, meta.dtype):
            expected = "a float type" if meta.dtype.is_floating_point else str(meta.dtype).removeprefix("torch.")
            wrong.append(f"{name} is {entry.dtype} where {expected} is expected")
    if wrong:
        raise CheckpointError(f"{folder} does not fit its config.json: {_some(wrong)}: {AGAIN}")


def _fits(entry: Entry, dtype: torch.dtype) -> bool:
    """Floats of any width serve for each other; whole numbers must be what the layer packs."""
    return entry.dtype in FLOATS if dtype.is_floating_point else DTYPES.get(entry.dtype) == dtype


def _check_tied_head(folder: Path, table: Mapping[str, str], stored: Mapping[str, Shard]) -> None:
    """A stored head must be the embedding again where config.json ties the two."""
    embedding = table[EMBEDDING]
    layouts: tuple[Layout, ...] = ("original", "hf")
    head = next((name for name in (checkpoint_name(HEAD, layout) for layout in layouts) if name in stored), None)
    if head is None:
        return
    one, two = stored[head], stored[embedding]
    same = one.entries[head].shape == two.entries[embedding].shape
    same = same and one.entries[head].dtype == two.entries[embedding].dtype
    if not same or not _same_bytes(one, head, two, embedding):
        raise CheckpointError(
            f"{folder}: {head} differs from {embedding}, though config.json ties them: {AGAIN}, "
            "or set tie_word_embeddings to false"
        )


def _same_bytes(one: Shard, head: str, two: Shard, embedding: str) -> bool:
    """Of two tensors of the same size."""
    size = one.entries[head].size
    left, right = torch.empty(2, min(size, COMPARED_BYTES), dtype=torch.uint8)
    for start in range(0, size, COMPARED_BYTES):
        count = min(COMPARED_BYTES, size - start)
        one.read(head, start, left[:count])
        two.read(embedding, start, right[:count])
        if not torch.equal(left[:count], right[:count]):
            return False
    return True


def _some(names: list[str]) -> str:
    """The first few of many."""
    rest = len(names) - NAMES_SHOWN
    return ", ".join(name[:120] for name in names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
