"""scripts/launch_slurm: one job over the nodes is submitted, followed and told the end of; Slurm starts it again."""

from __future__ import annotations

import os
import shlex
import sys
import time

from scripts.launch.commands import (
    ROOT,
    FailedError,
    Parser,
    RefusedError,
    commit,
    last_line,
    main,
    need,
    output,
    run,
    say,
    show,
    signals,
    stop,
    undisturbed,
)

PROGRAM = "scripts/launch_slurm"
EXTRAS = ("cuda12", "cuda13", "cuda12-local", "cuda13-local", "rocm7-local")
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)
SCRIPT = """\
#!/usr/bin/env bash
{header}
set -euo pipefail
echo "entangle: job $SLURM_JOB_ID, commit {commit}, on $SLURM_JOB_NODELIST, restart ${{SLURM_RESTART_COUNT:-0}}"
cd {root}
export PATH={root}/.venv/bin:"$PATH"
{setup}
# A task for every GPU, and every task sees all GPUs of its node: jax.distributed takes the one of its SLURM_LOCALID.
# Tasks that outlive another one are ended by JAX, which misses it; process 0 may have work to do after the others.
status=0
srun --gpu-bind=none --kill-on-bad-exit=0 --wait=0 {command} || status=$?
# 143: told to stop, since the time is nearly over, and saved. The job goes back into the queue and on from there.
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def script(flags, command, found, folder):
    """The job's script."""
    options = {
        "job-name": flags.name,
        "nodes": flags.nodes,
        "ntasks-per-node": flags.gpus,
        "gpus-per-node": f"{flags.gpu_type}:{flags.gpus}" if flags.gpu_type else flags.gpus,
        "cpus-per-task": flags.cpus,
        "time": flags.time,
        "partition": flags.partition,
        "account": flags.account,
        "signal": "TERM@120",
        "output": f"{folder}/%j.log",
        "open-mode": "append",
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
    header = "\n".join(f"#SBATCH {line}" for line in [*lines, "--requeue", *flags.sbatch])
    root = shlex.quote(str(ROOT))
    return SCRIPT.format(header=header, root=root, commit=found, setup=flags.setup, command=show(command))


class Job:
    """A submitted job: its log, and what Slurm says of it."""

    def __init__(self, flags, number, folder):
        self.flags, self.number, self.log = flags, number, folder / f"{number}.log"
        self.offset = 0

    def squeue(self):
        return ["squeue", "--noheader", "--states=all", f"--jobs={self.number}", "--format=%T"]

    def sacct(self):
        words = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={self.number}"]
        return [*words, "--format=State,ExitCode"]

    def cancel(self):
        return ["scancel", self.number]

    def state(self):
        """As squeue has it; "" for one it no longer knows, None where it does not answer."""
        status, state, error = output(self.squeue())
        if status:
            return "" if "Invalid job id" in error else None
        return state

    def pass_on(self):
        """New bytes of the log to stdout."""
        if self.log.exists():
            with self.log.open("rb") as file:
                file.seek(self.offset)
                sys.stdout.buffer.write(file.read())
                sys.stdout.buffer.flush()
                self.offset = file.tell()

    def follow(self):
        """Until the job has ended; returns the last state that squeue knew. A requeued job is over for a moment only."""
        shown, ended = None, 0
        while ended < 2:
            state = self.state()
            self.pass_on()
            if state is not None:
                if state and state != shown:
                    say(f"job {self.number}: {state}")
                    shown = state
                ended = ended + 1 if state in ("", *ENDED) else 0
            if ended < 2:
                time.sleep(self.flags.poll)
        self.pass_on()
        return shown

    def end(self, shown):
        """Final state and exit status, from the accounting where the cluster keeps one."""
        status, said, _ = output(self.sacct())
        state, _, code = (said.splitlines() or [""])[-1].partition("|")
        if status or not state:
            state, code = shown if shown in ENDED else f"unknown, last seen {shown}", ""
        number, _, killed = code.partition(":")
        if state == "COMPLETED":
            return state, 0
        return state, int(number or 0) or (128 + int(killed) if killed not in ("", "0") else 1)


def parse(words):
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, required=True, help="of one node; each has a process of its own")
    parser.add_argument("--gpu-type", help="as the cluster calls it: h100, a100, ...")
    parser.add_argument("--cpus", type=int, help="of one process")
    parser.add_argument("--time", help="the most that the job may take, 24:00:00; it then goes on in another turn")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--jax", choices=EXTRAS, default="cuda12", help="JAX's extra for the GPUs (cuda12)")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="--FLAG=VALUE", help="more for the script's head"
    )
    flags, command = parser.read(words)
    for name in ("nodes", "gpus", "cpus"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise RefusedError(f"--{name} {value}: 1 or more")
    for line in (flags.time, flags.partition, flags.account, flags.gpu_type, *flags.sbatch):
        if line and len(line.split()) != 1:
            raise RefusedError(f"{line!r} has spaces in it")
    wrong = [line for line in flags.sbatch if not line.startswith("-")]
    if wrong:
        raise RefusedError(f"--sbatch {wrong[0]} is no flag: --sbatch=--qos=high")
    return flags, command


def launch(words):
    flags, command = parse(words)
    found = commit(flags.dirty)
    folder = ROOT / "runs" / "launch" / f"{flags.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    text = script(flags, command, found, folder)
    prepare = [
        [str(ROOT / "scripts" / "setup"), "train"],
        [str(ROOT / ".venv/bin/python"), "-I", "-m", "pip", "install", "--quiet", f"jax[{flags.jax}]"],
    ]
    submit = ["sbatch", "--parsable", str(folder / "job.sh")]
    if flags.dry_run:
        job = Job(flags, "JOB", folder)
        print(text, *map(show, [*prepare, submit, job.squeue(), job.sacct(), job.cancel()]), sep="\n")
        return 0
    need("sbatch", "squeue", "scancel", "git")
    for words in prepare:
        if run(words):
            raise FailedError(f"failed, nothing was submitted: {show(words)}")
    folder.mkdir(parents=True)
    (folder / "job.sh").write_text(text)
    with signals(stop):
        state, status = attend(flags, submit, folder)
    say(f"job {flags.name} ended: {state}, exit status {status}")
    return status


def attend(flags, submit, folder):
    """Submit and follow; whatever ends this before the job's end cancels it, unless it is to be kept."""
    job = None
    try:
        with undisturbed():
            status, said, error = output(submit)
            if not status:
                job = Job(flags, said.split(";")[0], folder)
        if job is None:
            raise FailedError(f"not submitted: {last_line(error)}")
        say(
            f"job {job.number}, log {job.log}. Should this launcher be killed, it is cancelled by: {show(job.cancel())}"
        )
        return job.end(job.follow())
    except BaseException:
        if job is not None and flags.keep:
            say(f"job {job.number} goes on; it is cancelled by: {show(job.cancel())}")
        elif job is not None:
            with undisturbed():
                run(job.cancel())
        raise


if __name__ == "__main__":
    main(PROGRAM, launch)
