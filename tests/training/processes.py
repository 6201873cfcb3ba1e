"""Several processes of one program on this machine, for the tests of what they do together."""

import os
import socket
import subprocess


def start(command, processes=2):
    """Start a command as so many processes that JAX makes one program."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def one(index):
        named = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index),
        }
        return subprocess.Popen(command, env={**os.environ, **named}, text=True, stderr=subprocess.PIPE)

    return [one(index) for index in range(processes)]


def ended(processes, seconds=120):
    """Exit statuses and what went to stderr."""
    errors = [process.communicate(timeout=seconds)[1] for process in processes]
    return [process.returncode for process in processes], errors


def finish(processes):
    """Wait until all have ended well."""
    codes, errors = ended(processes)
    assert set(codes) == {0}, errors
