"""Hugging Face checkpoints in a local folder, read straight into their shardings and written file by file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from entangle.errors import UserError
from entangle.models.config import DTYPES, DecoderConfig
from entangle.models.families import FAMILIES, Family
from entangle.models.huggingface_config import config_json, family_of, read_config
from entangle.models.language_model import language_model
from entangle.models.weights import Read, Weights, refuse, refuse_existing, weight_files, write_weights, written_whole
from entangle.paths import named_leaves
from entangle.types import Params

_HEAD = "lm_head.weight"
_FILE_BYTES = 5_000_000_000


def load_pretrained(
    folder: str | Path,
    *,
    dtype: str = "float32",
    shardings: Callable[[DecoderConfig, Params], Params] | None = None,
    scan_layers: bool = False,
    remat: str = "none",
    compute_dtype: str | None = None,
) -> tuple[DecoderConfig, Params]:
    """Read a checkpoint of GPT-2, Llama, Mistral, Qwen2 or Qwen3.

    Every device's part of every parameter is read by itself: a host holds its own devices' parts of one parameter at a time.

    Args:
      folder: a local folder with ``config.json`` and ``model.safetensors``, or ``model.safetensors.index.json`` and its
        files. The prefix of the decoder's tensors is optional, stored causal masks are ignored.
      dtype: of the parameters, whatever the checkpoint's floating type.
      shardings: the decoder and the shapes of its parameters to a tree of shardings; None puts all on the first device.
      scan_layers: see :class:`DecoderConfig`, as the next two; no checkpoint says them.
      remat: what the backward computes again.
      compute_dtype: of the residual stream and of products.

    Returns:
      The decoder and the parameters.

    Raises:
      UserError: the dtype is neither float32 nor bfloat16; the folder or a file is missing or broken; the configuration
        says something that is not computed here; a tensor is missing, unknown, of another shape or of another type; a tied
        head differs from the embedding.

    Example:
      >>> import tempfile
      >>> config = DecoderConfig(vocab_size=10, max_positions=8, width=4, layers=1, heads=2)
      >>> params = language_model(config).init(jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_pretrained(Path(folder) / "checkpoint", config, params)
      ...     load_pretrained(Path(folder) / "checkpoint")[0] == config
      True
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise UserError(f"{folder}: parameters of dtype {dtype} are not read: choose from {', '.join(DTYPES)}")
    with _Opened(folder) as (family, config, weights):
        config = dataclasses.replace(config, scan_layers=scan_layers, remat=remat, compute_dtype=compute_dtype)
        expected = _expected(config)
        sources = _sources(config, family, expected)
        names = _in_order(config, family, {name for source in sources.values() for name in source.names})
        refuse(weights.path, "tensors missing", [name for name in names if name not in weights.names])
        refuse(weights.path, "tensors not understood", sorted(weights.names - {*names, _HEAD}))
        places = None if shardings is None else dict(named_leaves(shardings(config, expected)))
        read = {path: _reader(weights, source) for path, source in sources.items()}
        leaves = [
            _array(read[path], leaf.shape, dtype, places and places[path]) for path, leaf in named_leaves(expected)
        ]
        params = jax.tree.unflatten(jax.tree.structure(expected), leaves)
        if config.tied and _HEAD in weights.names:
            _check_tied(weights, read["token_embedding"], sources["token_embedding"].shape)
    return config, params


def save_pretrained(
    folder: str | Path, config: DecoderConfig, params: Params, *, file_bytes: int = _FILE_BYTES
) -> None:
    """Write a checkpoint that ``transformers`` and :func:`load_pretrained` read; it appears whole or not at all.

    Args:
      folder: where to write; must not exist.
      config: the decoder.
      params: the parameters; stored as float32. Adapters are not among them: merge them, or export them apart.
      file_bytes: most bytes of one file; what needs several has an index.

    Raises:
      UserError: the folder exists or cannot be made, no family of checkpoints has such a decoder, or the parameters are
        not those of ``config``.
    """
    folder = Path(folder)
    family, attributes = FAMILIES[family_of(config)], config_json(config)
    expected = _expected(config)
    _check_params(folder, expected, params)
    refuse_existing(folder)
    given = dict(named_leaves(params))
    tensors = [
        (name, 4 * math.prod(source.shape), make)
        for path, source in _sources(config, family, expected).items()
        for name, make in source.tensors(given[path], family.prefix)
    ]
    with written_whole(folder) as partial:
        (partial / "config.json").write_text(json.dumps(attributes, indent=2) + "\n", encoding="utf-8")
        write_weights(partial, tensors, file_bytes)


class _Source(NamedTuple):
    """Where a checkpoint has one of our parameters.

    Attributes:
      names: of the tensors, without prefix; one a layer where layers are stacked.
      shape: of one tensor as we have it.
      transposed: whether it is stored the other way.
      stacked: whether ours has a leading axis of layers.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool
    stacked: bool

    def tensors(self, leaf: jax.Array, prefix: str) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
        """Names as a file has them, and what takes each tensor to the host."""
        for number, name in enumerate(self.names):

            def make(number: int = number) -> np.ndarray:
                array = np.asarray(leaf[number] if self.stacked else leaf).astype(np.float32)
                return array.T if self.transposed else array

            yield (name if name == _HEAD else f"{prefix}{name}"), make


class _Opened:
    """The family, the decoder and the tensors of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> tuple[Family, DecoderConfig, Weights]:
        path, files = weight_files(self.folder)
        family, config = read_config(self.folder / "config.json")
        self.weights = Weights(path, files, family.prefix, family.ignored)
        return family, config, self.weights

    def __exit__(self, *error: object) -> None:
        self.weights.__exit__(None, None, None)


def _expected(config: DecoderConfig) -> Params:
    """Shapes of the parameters that a checkpoint has, adapters left out."""
    return jax.eval_shape(language_model(dataclasses.replace(config, lora=None)).init, jax.random.key(0))


def _sources(config: DecoderConfig, family: Family, expected: Params) -> dict[str, _Source]:
    found = {}
    for path, leaf in named_leaves(expected):
        first, _, rest = path.partition("/")
        if first != "layers":
            name, transposed = family.top[path]
            found[path] = _Source((name,), leaf.shape, transposed, False)
        elif config.scan_layers:
            name, transposed = family.layer[rest]
            names = tuple(name.format(number) for number in range(config.layers))
            found[path] = _Source(names, leaf.shape[1:], transposed, True)
        else:
            number, _, within = rest.partition("/")
            name, transposed = family.layer[within]
            found[path] = _Source((name.format(number),), leaf.shape, transposed, False)
    return found


def _in_order(config: DecoderConfig, family: Family, names: set[str]) -> list[str]:
    """Names of tensors layer by layer, in the family's order."""
    layers = (tensor.name.format(number) for number in range(config.layers) for tensor in family.layer.values())
    order = (*(tensor.name for tensor in family.top.values()), *layers)
    return [name for name in order if name in names]


def _reader(weights: Weights, source: _Source) -> Read:
    """A function of an index into our parameter that reads that part."""
    stored = source.shape[::-1] if source.transposed else source.shape
    readers = [weights.reader(name, stored) for name in source.names]

    def one(read: Read, index: Sequence[slice]) -> np.ndarray:
        return read(tuple(index)[::-1]).T if source.transposed else read(index)

    def stack(index: Sequence[slice]) -> np.ndarray:
        return np.stack([one(read, index[1:]) for read in readers[index[0]]])

    return stack if source.stacked else lambda index: one(readers[0], index)


def _array(read: Read, shape: tuple[int, ...], dtype: str, sharding: Any) -> jax.Array:
    """Read a parameter, every device's part by itself."""
    wanted = jnp.dtype(dtype)
    if sharding is None:
        return jnp.asarray(read(tuple(slice(None) for _ in shape)).astype(wanted))
    return jax.make_array_from_callback(shape, sharding, lambda index: read(index or ()).astype(wanted))


def _check_tied(weights: Weights, embedding: Read, shape: tuple[int, ...]) -> None:
    """Compare a stored head with the embedding that it should be, some rows at a time."""
    head = weights.reader(_HEAD, shape)
    for start in range(0, shape[0], 4096):
        rows = (slice(start, min(start + 4096, shape[0])), slice(None))
        if not np.array_equal(head(rows), embedding(rows)):
            raise UserError(
                f"{weights.path}: {weights.stored_name(_HEAD)} differs from the token embedding, while config.json says "
                "that they are tied"
            )


def _check_params(folder: Path, expected: Params, params: Params) -> None:
    shapes, given = ({path: leaf.shape for path, leaf in named_leaves(tree)} for tree in (expected, params))
    refuse(folder, "parameters missing", [path for path in shapes if path not in given])
    refuse(folder, "parameters not understood", sorted(given.keys() - shapes.keys()))
    for path, shape in given.items():
        if shape != shapes[path]:
            raise UserError(f"{folder}: parameter {path} has shape {shape}, expected {shapes[path]}")
