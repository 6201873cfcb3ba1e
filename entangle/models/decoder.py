"""The decoder in Flax NNX: norms before each sublayer, no dropout but that of adapters; families differ in configuration.

Everything runs in the dtype of the residual stream, which is that of the token embedding or the configuration's
``compute_dtype``, except norm statistics, attention softmax and head, which run in at least float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from entangle import sharding
from entangle.errors import UserError
from entangle.models.attention import Attention, Positions, rotation, sees
from entangle.models.config import DecoderConfig
from entangle.models.feed_forward import FEED_FORWARDS
from entangle.models.head import head_logits
from entangle.models.linear import INIT_SCALE, Dropout
from entangle.models.norms import NORMS, at_least_float32

REMATS: Mapping[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "none": lambda body: body,
    "dots": lambda body: jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "full": lambda body: jax.checkpoint(body),
}
"""Name of what the backward computes again to how a layer is wrapped."""


class Layer(nnx.Module):
    """Attention, then feed-forward, each on the normalised residual stream and added to it."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        """Draw the parameters of both sublayers."""
        self.attention_norm = NORMS[config.norm](config.width, config.norm_epsilon)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = NORMS[config.norm](config.width, config.norm_epsilon)
        self.feed_forward = FEED_FORWARDS[config.feed_forward](config, rngs)

    def __call__(self, x: jax.Array, positions: Positions) -> jax.Array:
        """Map ``[N, T, D]`` to ``[N, T, D]``."""
        x = x + self.attention(self.attention_norm(x), positions)
        return x + self.feed_forward(self.feed_forward_norm(x), positions.dropout)


class Decoder(nnx.Module):
    """The whole decoder.

    Its layers lie under string keys ``"0"``, ``"1"``, ... so that parameter trees stay plain; with ``scan_layers`` there is
    one layer, whose parameters have a leading axis of length L.

    Example:
      >>> config = DecoderConfig(vocab_size=10, max_positions=8, width=4, layers=1, heads=2)
      >>> model = Decoder(config, nnx.Rngs(0))
      >>> model.logits(jnp.zeros((2, 5), jnp.int32)).shape
      (2, 5, 10)
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        """Draw all parameters as GPT-2 does: normal with 0.02, residual projections less by ``sqrt(2 L)``.

        Args:
          config: the decoder.
          rngs: source of the ``params`` stream.

        Raises:
          UserError: an adapter's target is no matrix of this decoder.
        """
        self.config = config
        normal = nnx.initializers.normal(INIT_SCALE)
        tokens, positions = (config.vocab_size, config.width), (config.max_positions, config.width)
        self.token_embedding = nnx.Param(normal(rngs.params(), tokens, jnp.float32))
        if config.rope is None:
            self.position_embedding = nnx.Param(normal(rngs.params(), positions, jnp.float32))
        self.layers = _stacked(config, rngs) if config.scan_layers else _side_by_side(config, rngs)
        self.final_norm = NORMS[config.norm](config.width, config.norm_epsilon)
        if not config.tied:
            self.head_embedding = nnx.Param(normal(rngs.params(), tokens, jnp.float32))
        _refuse_unknown_targets(config, self.layers)

    def hidden_states(self, tokens: jax.Array, seeds: jax.Array | None = None) -> jax.Array:
        """Return the normalised residual stream that the head reads.

        Args:
          tokens: ``[..., T]`` whole numbers from 0 below V; a greater one makes its whole row NaN.
          seeds: ``[...]`` one a row, for the dropout of adapters; None drops nothing.

        Returns:
          ``[..., T, D]``.

        Raises:
          UserError: T is greater than ``max_positions``.
        """
        config, length = self.config, tokens.shape[-1]
        if length > config.max_positions:
            raise UserError(
                f"model input: {length} tokens are more than the {config.max_positions} positions of the model"
            )
        rows = tokens.reshape(-1, length)
        # rows of the table whole where they are looked up: else every device looks up a part of every row of every device
        x = jnp.take(sharding.constrain(self.token_embedding[...], "vocab", None), rows, axis=0)
        if config.rope is None:
            x = x + self.position_embedding[...][None, :length]
        if config.compute_dtype is not None:
            x = x.astype(config.compute_dtype)
        x = sharding.constrain(x, "pairs", None, None)
        keys = None if seeds is None or config.lora is None else jax.vmap(jax.random.key)(seeds.reshape(-1))
        x = self._through_layers(x, keys)
        return self.final_norm(x).reshape(*tokens.shape, -1)

    def _through_layers(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        config, length = self.config, x.shape[1]
        angles = None
        if config.rope is not None:
            angles = rotation(config.rope, config.head_width, length, at_least_float32(x.dtype))
        alike = len(set(config.windows)) == 1
        visible = sees(length, config.windows[0]) if alike else None

        def body(x: jax.Array, layer: Any, number: jax.Array | int, window: jax.Array | int | None) -> jax.Array:
            drawn = None if keys is None else Dropout(jax.vmap(jax.random.fold_in, (0, None))(keys, number))
            shown = sees(length, window) if visible is None else visible
            return sharding.constrain(layer(x, Positions(shown, angles, drawn)), "pairs", None, None)

        if not config.scan_layers:
            for number, window in enumerate(config.windows):
                layer = self.layers[str(number)]
                graph, state = nnx.split(layer)
                run = lambda x, state, graph=graph, number=number, window=window: body(  # noqa: E731
                    x, nnx.merge(graph, state), number, window
                )
                x = REMATS[config.remat](run)(x, nnx.to_pure_dict(state))
            return x
        graph, state = nnx.split(self.layers)

        def step(x: jax.Array, sliced: Any) -> tuple[jax.Array, None]:
            state, number, window = sliced
            return body(x, nnx.merge(graph, state), number, window), None

        numbers = jnp.arange(config.layers)
        windows = jnp.array([length if window is None else window for window in config.windows])
        x, _ = jax.lax.scan(REMATS[config.remat](step), x, (nnx.to_pure_dict(state), numbers, windows))
        return x

    def table(self) -> jax.Array:
        """The head's matrix ``[V, D]``, which is the token embedding where the two are tied."""
        return (self.token_embedding if self.config.tied else self.head_embedding)[...]

    def head(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states ``[..., T, D]`` to logits ``[..., T, V]``, summed in at least float32."""
        return head_logits(hidden, self.table())

    def logits(self, tokens: jax.Array, seeds: jax.Array | None = None) -> jax.Array:
        """Map tokens ``[..., T]`` to next-token logits ``[..., T, V]``; arguments as in :meth:`hidden_states`."""
        return self.head(self.hidden_states(tokens, seeds))


def layer_of(path: str) -> str:
    """The part of a decoder that a parameter belongs to: an embedding, a sublayer with the norm before it, the final norm.

    Args:
      path: of the parameter, with slashes.

    Example:
      >>> from entangle.models import layer_of
      >>> layer_of("token_embedding"), layer_of("layers/0/attention_norm/scale"), layer_of("layers/0/attention/qkv/kernel")
      ('token_embedding', '0.attention', '0.attention')
      >>> layer_of("layers/feed_forward/up/kernel")  # of layers that are scanned over
      'feed_forward'
    """
    first, *rest = path.split("/")
    if first != "layers":
        return first
    return ".".join(rest[: 2 if rest[0].isdigit() else 1]).removesuffix("_norm")


def _side_by_side(config: DecoderConfig, rngs: nnx.Rngs) -> Any:
    return nnx.Dict({str(index): Layer(config, rngs) for index in range(config.layers)})


def _stacked(config: DecoderConfig, rngs: nnx.Rngs) -> Any:
    """One layer whose parameters are those of all layers, ``[L, ...]``."""

    def draw(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(Layer(config, nnx.Rngs(params=key))))

    graph = nnx.graphdef(nnx.eval_shape(lambda: Layer(config, nnx.Rngs(0))))
    return nnx.merge(graph, jax.vmap(draw)(jax.random.split(rngs.params(), config.layers)))


def _refuse_unknown_targets(config: DecoderConfig, layers: Any) -> None:
    if config.lora is None:
        return
    first = layers if config.scan_layers else layers["0"]
    paths = [module.path for _, module in nnx.iter_modules(first) if hasattr(module, "path")]
    known = set().union(*(config.lora.adapted_by(path) for path in paths))
    for target in config.lora.targets:
        if target not in known:
            raise UserError(f"LoRA: no matrix of this decoder is called {target!r}: there are {', '.join(paths)}")
