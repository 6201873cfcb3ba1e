"""Training a part of a decoder's parameters: the tree taken apart by path, and the decoder as a function of the part."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from entangle.errors import UserError
from entangle.models.language_model import LanguageModel
from entangle.paths import named_leaves
from entangle.types import Params


def is_adapter(path: str) -> bool:
    """Whether a parameter belongs to a low-rank adapter, by its path.

    Example:
      >>> from entangle.models import is_adapter
      >>> is_adapter("layers/attention/query/lora_a"), is_adapter("layers/attention/query/kernel")
      (True, False)
    """
    return path.rpartition("/")[2] in ("lora_a", "lora_b")


def split_params(params: Params, trained: Callable[[str], bool] = is_adapter) -> tuple[Params, Params]:
    """Take a nested dict of parameters apart.

    Args:
      params: of a decoder.
      trained: whether a parameter is trained, by its path with slashes; adapters by default.

    Returns:
      What is trained and what is frozen, nested dicts without empty ones.

    Raises:
      UserError: nothing is trained.

    Example:
      >>> from entangle.models import split_params
      >>> split_params({"query": {"kernel": 1.0, "lora_a": 2.0, "lora_b": 3.0}, "norm": {"scale": 4.0}})
      ({'query': {'lora_a': 2.0, 'lora_b': 3.0}}, {'query': {'kernel': 1.0}, 'norm': {'scale': 4.0}})
    """
    kept, frozen = _divided(params, trained, "")
    if not kept:
        raise UserError("no parameter is trained: the model has no adapters; configure them (LoraConfig, --lora)")
    return kept, frozen


def join_params(trained: Params, frozen: Params) -> Params:
    """Put what :func:`split_params` took apart together again.

    Example:
      >>> from entangle.models import join_params
      >>> join_params({"query": {"lora_a": 2.0}}, {"query": {"kernel": 1.0}})
      {'query': {'lora_a': 2.0, 'kernel': 1.0}}
    """
    if not (isinstance(trained, dict) and isinstance(frozen, dict)):
        raise ValueError("a parameter is both trained and frozen")
    both = {name: join_params(trained[name], frozen[name]) for name in trained.keys() & frozen.keys()}
    return {**trained, **frozen, **both}


def on_frozen(model: LanguageModel, frozen: Params) -> LanguageModel:
    """A decoder as functions of what is trained, on a frozen base.

    The base may be traced: pass it to a jitted step as an argument, so that it is no constant of the program.

    Args:
      model: functions of all parameters.
      frozen: the others, see :func:`split_params`; ``{}`` leaves the model as it is.

    Returns:
      The same functions of the trained part. ``log_probs`` is a ``LogProbFn`` whose gradients and geometry are those of the
      trained part alone.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from entangle import models
      >>> lora = models.LoraConfig(rank=2, alpha=4.0, targets=("qkv",))
      >>> config = models.DecoderConfig(vocab_size=9, max_positions=4, width=4, layers=1, heads=1, lora=lora)
      >>> model = models.language_model(config)
      >>> adapters, base = models.split_params(model.init(jax.random.key(0)))
      >>> models.on_frozen(model, base).logits(adapters, jnp.zeros((1, 3), jnp.int32)).shape
      (1, 3, 9)
    """

    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda trained, *inputs: function(join_params(trained, frozen), *inputs)

    return model._replace(
        init=lambda key: _without(model.init(key), frozen),
        hidden_states=of(model.hidden_states),
        logits=of(model.logits),
        token_log_probs=of(model.token_log_probs),
        log_probs=of(model.log_probs),
        token_statistics=lambda trained, reference, batch: model.token_statistics(
            join_params(trained, frozen), join_params(reference, frozen), batch
        ),
    )


def checksum(params: Params) -> str:
    """A number of all parameters by name, as text, that tells one model from another; the same wherever they lie.

    Every 32 bits are mixed with their place before they are added up, so that no change of many of them (of all signs, by a
    power of two, of their order) cancels by its regularity. Sums are of whole numbers, 64 bits a parameter, and so are the
    same on every mesh; nothing is taken to the host. It is no defence against somebody who looks for a collision.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.models import checksum
      >>> checksum({"a": jnp.ones(3)}) == checksum({"a": jnp.ones(3)}), checksum({}) == checksum({"a": jnp.zeros(3)})
      (True, False)
    """

    @jax.jit
    def of_leaf(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
        # what is wider than 32 bits has an axis of its words
        word = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")
        bits = jax.lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)
        place = jnp.zeros_like(bits)
        for axis, size in enumerate(bits.shape):
            place = place * size + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        first = _mixed(bits ^ _mixed(place + 1))
        return jnp.sum(first, dtype=jnp.uint32), jnp.sum(_mixed(first + place), dtype=jnp.uint32)

    total = hashlib.sha256()
    for path, leaf in named_leaves(params):
        total.update(f"{path}{leaf.dtype}{leaf.shape}{[int(word) for word in of_leaf(leaf)]}".encode())
    return total.hexdigest()


def _mixed(words: jax.Array) -> jax.Array:
    """Every word with all of its bits mixed, one to one; the finaliser of MurmurHash3, which is in the public domain."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return words ^ (words >> 16)


def _divided(tree: Params, trained: Callable[[str], bool], path: str) -> tuple[Params, Params]:
    kept: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    for name, node in tree.items():
        here = f"{path}/{name}" if path else name
        if not isinstance(node, dict):
            (kept if trained(here) else frozen)[name] = node
            continue
        for into, part in zip((kept, frozen), _divided(node, trained, here), strict=True):
            if part:
                into[name] = part
    return kept, frozen


def _without(tree: Params, other: Params) -> Params:
    """The part of a nested dict that is not in the other."""
    kept = {}
    for name, node in tree.items():
        if name not in other:
            kept[name] = node
        elif isinstance(node, dict) and (rest := _without(node, other[name])):
            kept[name] = rest
    return kept
