"""A small run over the devices of all processes, which the environment names: ``hosts_program.py FOLDER DEVICES [SECONDS]``.

Devices are those of each process, seconds those of a step. Run by test_hosts.py.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from entangle import command_line, data, distributed, sharding, training, transforms
from entangle.losses import dpo
from entangle.types import PairBatch

STAGE = training.StageConfig(10, 4, training.OptimizerConfig(learning_rate=0.02), 5, 4, 3)


def main(folder, devices, seconds="0", width="6"):
    import resumable  # beside this file, which is run and not imported

    jax.config.update("jax_num_cpu_devices", int(devices))
    distributed.initialize(heartbeat_seconds=10)
    mesh = sharding.make_mesh({"fsdp": jax.device_count()})  # every process holds a part of the parameters alone
    tx = STAGE.optimizer.build(STAGE.steps, transforms.combine_pair(transforms.margin()))
    gradients = training.preference_gradients(resumable.log_probs, dpo, with_geometry=False)
    step = training.make_step(gradients, tx, STAGE.optimizer.schedule(STAGE.steps))
    pairs = resumable.encoded()
    stream = data.pair_batches(pairs, STAGE.batch_size, 3, training.process_rows(mesh, STAGE.batch_size))
    reference = np.zeros((len(pairs.tokens), 2), np.float32)

    def joined(batch, index):
        return training.global_rows(training.PreferenceExamples(batch, reference[index]), mesh, STAGE.batch_size)

    @jax.jit
    def evaluate(state):
        held_out = PairBatch(pairs.tokens[:5], pairs.completion_mask[:5])
        return {"eval/margin": jnp.mean(resumable.log_probs(state.params, jax.tree.map(jnp.asarray, held_out)))}

    def begin():
        return training.init_state(resumable.start(int(width)), tx)

    state = sharding.born_sharded(begin, mesh)
    jitted = jax.jit(step, out_shardings=(sharding.shardings(state, mesh), None))

    def slowly(state, batch):
        time.sleep(float(seconds))
        return jitted(state, batch)

    training.train(
        training.RunFolder(folder, {"seed": 3}),
        state,
        slowly,
        training.MappedBatches(stream, joined),
        STAGE,
        evaluate=evaluate,
    )


if __name__ == "__main__":
    command_line.run(lambda: main(*sys.argv[1:]))
