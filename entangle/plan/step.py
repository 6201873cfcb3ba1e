"""The training step that is planned: the one that experiments take, on shapes in the place of arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from entangle import losses, models, sharding, training
from entangle.errors import UserError
from entangle.models import DecoderConfig
from entangle.models.huggingface_config import read_config
from entangle.plan.config import DTYPES, PlanConfig
from entangle.types import PairBatch


class Step(NamedTuple):
    """A step to be compiled.

    Attributes:
      function: of the frozen parameters, a TrainState and PreferenceExamples; the state is given away.
      arguments: their shapes, every one with its sharding.
      results: shardings of the results.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, Any, Any]
    results: Any

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes on one chip of what goes in, by kind."""
        frozen, state, batch = self.arguments
        kinds = {"frozen parameters": frozen, "trained parameters": state.params, "batch": batch}
        kinds["optimizer state"] = (state.step, state.opt_state, state.memory)
        return {name: sum(map(_bytes_here, jax.tree.leaves(tree))) for name, tree in kinds.items()}


def _bytes_here(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def decoder(settings: PlanConfig) -> DecoderConfig:
    """The decoder that is planned, its layers scanned.

    Raises:
      UserError: there is no such model, checkpoint, adapter or policy, or rows are longer than it reaches.

    Example:
      >>> from entangle.plan.config import PlanConfig
      >>> from entangle.plan.step import decoder
      >>> decoder(PlanConfig(lora="paper")).lora.rank
      64
    """
    if Path(settings.model, "config.json").is_file():
        if settings.vocab_size:
            raise UserError(f"--vocab-size {settings.vocab_size}: {settings.model} has its own")
        config = read_config(Path(settings.model, "config.json"))[1]
    else:
        if settings.model in models.PRESETS.keys() - models.VOCABULARIES.keys() and not settings.vocab_size:
            raise UserError(f"--model {settings.model}: its vocabulary comes from the tokenizer; give --vocab-size")
        config = models.preset(settings.model, settings.vocab_size or None)
    for flag in ("dtype", "frozen_dtype", "compute_dtype"):
        if getattr(settings, flag) not in DTYPES:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(settings, flag)}: choose from {', '.join(DTYPES)}")
    if not 1 < settings.max_length <= config.max_positions:
        raise UserError(f"--max-length {settings.max_length}: {settings.model} has {config.max_positions} positions")
    for flag, least in (("batch_size", 1), ("head_chunk", 1), ("completion_length", 0)):
        if getattr(settings, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(settings, flag)}: at least {least} is needed")
    return dataclasses.replace(
        config,
        lora=models.lora_config(settings.lora),
        scan_layers=True,
        remat=settings.remat,
        compute_dtype=settings.compute_dtype,
    )


def training_step(settings: PlanConfig, config: DecoderConfig, mesh: Mesh) -> Step:
    """The step, ready to be lowered while the mesh is set.

    Args:
      settings: what is planned.
      config: the decoder.
      mesh: of ``sharding.make_mesh``.

    Raises:
      UserError: the objective or the chain, or a mesh axis does not divide a parameter or the pairs.
    """
    sharding.check_pairs(mesh, settings.batch_size, "--batch-size")
    model = models.language_model(
        config,
        completion_length=settings.completion_length or None,
        chunk=settings.head_chunk,
        shards=mesh.shape["tensor"],
    )
    objective = losses.get_objective(settings.objective, **settings.objective_args)
    chain = training.pair_chain(settings.pair_chain, **settings.pair_chain_args)
    steps = 1000  # of the schedule, which takes no more room or time for any other number
    tx = chain.around(settings.optimizer.build(steps, chain.head))

    def step(frozen: Any, state: Any, examples: Any) -> Any:
        policy = models.on_frozen(model, frozen).log_probs
        gradients = training.preference_gradients(
            policy, objective, with_geometry=settings.geometry or chain.rule is not None, pair_rule=chain.rule
        )
        schedule = settings.optimizer.schedule(steps)
        return training.make_step(gradients, tx, schedule, policy if settings.changes else None)(state, examples)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    trained = models.is_adapter if config.lora else lambda path: True
    kept, frozen = models.split_params(shapes, trained)
    kept, frozen = _cast(kept, settings.dtype), _cast(frozen, settings.frozen_dtype)
    memory = training.preference_memory(objective, kept)
    state = jax.eval_shape(lambda params: training.init_state(params, tx, memory), kept)
    places = sharding.shardings((frozen, state), mesh, settings.model)
    frozen, state = jax.tree.map(_placed, (frozen, state), places)
    results = (places[1], NamedSharding(mesh, P()))
    return Step(step, (frozen, state, _examples(settings, config, mesh)), results)


def _examples(settings: PlanConfig, config: DecoderConfig, mesh: Mesh) -> Any:
    rows = (settings.batch_size, 2, settings.max_length)
    shape: Any = jax.ShapeDtypeStruct
    seeds = shape(rows[:2], jnp.uint32) if config.lora and config.lora.dropout else None
    pairs = PairBatch(shape(rows, jnp.int32), shape(rows, jnp.bool), seeds)
    examples = training.PreferenceExamples(pairs, shape(rows[:2], jnp.float32))
    return jax.tree.map(lambda leaf: _placed(leaf, sharding.pair_sharding(mesh)), examples)


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), tree)


def _placed(leaf: Any, place: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
