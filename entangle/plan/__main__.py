"""``python -m entangle.plan --model llama3_8b --lora paper --topology v5e:8x8 --mesh data=4,fsdp=16``."""

import os

from entangle import command_line, extras

# Before JAX is loaded: nothing is looked for on this machine, and the compiler says only what it is asked for.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def main() -> None:
    """The command line, loaded when what it needs is there."""
    extras.require("train", "flax", "tyro")
    from entangle.plan import command

    command.main()


if __name__ == "__main__":
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    command_line.run(main)
