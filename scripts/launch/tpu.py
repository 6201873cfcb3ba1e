"""scripts/launch_tpu: a queued resource is created, set up, trained on, followed, replaced when pre-empted, and deleted."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.launch.commands import (
    ROOT,
    FailedError,
    Parser,
    RefusedError,
    commit,
    end_group,
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

PROGRAM = "scripts/launch_tpu"
# https://cloud.google.com/tpu/docs/runtimes: the images for JAX.
IMAGES = {
    "v6e": "v2-alpha-tpuv6e",
    "v5p": "v2-alpha-tpuv5",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v4": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v2": "tpu-ubuntu2204-base",
}
WAITING = ("", "CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
LOST = ("SUSPENDING", "SUSPENDED", "PREEMPTED", "TERMINATED")
FOLLOW = 300  # seconds of one connection; between two all workers are asked, so that one that failed is seen
UNREACHABLE = 30  # looks in a row that fail before the run is given up


class Slice:
    """The commands that act on one queued resource and its one node, both of the same name."""

    def __init__(self, flags, command, archive):
        self.flags, self.training, self.archive = flags, command, archive
        self.place = [f"--zone={flags.zone}"] + ([f"--project={flags.project}"] if flags.project else [])

    def resource(self, verb, *more):
        return ["gcloud", "compute", "tpus", "queued-resources", verb, self.flags.name, *more, *self.place]

    def create(self):
        flags = self.flags
        image = flags.runtime or IMAGES[flags.type.split("-")[0]]
        wanted = [f"--node-id={flags.name}", f"--accelerator-type={flags.type}", f"--runtime-version={image}"]
        return self.resource("create", *wanted, *(["--spot"] if flags.spot else []), "--quiet")

    def describe(self):
        return self.resource("describe", "--format=value(state.state)")

    def describe_node(self):
        words = ["gcloud", "compute", "tpus", "tpu-vm", "describe", self.flags.name]
        return [*words, "--format=value(state)", *self.place]

    def delete(self):
        return self.resource("delete", "--force", "--quiet")

    def copy(self):
        words = ["gcloud", "compute", "tpus", "tpu-vm", "scp", str(self.archive), f"{self.flags.name}:entangle.tar.gz"]
        return [*words, "--worker=all", "--quiet", *self.place]

    def on(self, worker, command):
        words = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", self.flags.name, f"--worker={worker}", "--quiet"]
        return [*words, *self.place, f"--command={command}"]

    def worker(self, which, *words):
        return self.on(which, show(["entangle/scripts/launch/worker", *words]))

    def unpack(self):
        return self.on("all", "mkdir -p entangle && tar -xzf entangle.tar.gz -C entangle")

    def setup(self):
        return self.worker("all", "setup", self.flags.setup)

    def start(self):
        return self.worker("all", "start", *self.training)

    def follow(self, offset):
        return self.worker("0", "follow", offset, FOLLOW)

    def state(self):
        return self.worker("all", "state")

    def stop(self):
        return self.worker("all", "stop")

    def whole(self):
        """Every command of a run to which nothing happens, in order."""
        begin = [self.describe(), self.create(), self.describe(), self.copy(), self.unpack(), self.setup()]
        return [*begin, self.start(), self.follow(0), self.state(), *([] if self.flags.keep else [self.delete()])]


class PreemptedError(Exception):
    """The slice was taken away."""


class Launch:
    """One run of the launcher: the slice, and whether there is one to delete."""

    def __init__(self, flags, tpu):
        self.flags, self.tpu, self.exists = flags, tpu, False

    def look(self):
        """State of the queued resource: "" where gcloud does not answer, None where there is none of that name."""
        status, state, error = output(self.tpu.describe())
        if status:
            return None if "NOT_FOUND" in error else ""
        return state

    def check_name(self):
        status, state, error = output(self.tpu.describe())
        if status and "NOT_FOUND" not in error:
            raise RefusedError(f"gcloud cannot look for {self.flags.name}: {last_line(error)}")
        if not status and not self.flags.reuse:
            raise RefusedError(
                f"{self.flags.name} is there already ({state}): take another name, --reuse it, or delete it"
            )
        return not status

    def create(self):
        with undisturbed():
            status = run(self.tpu.create())
            self.exists = not status
        if status:
            raise FailedError(f"{self.flags.name} was not created; gcloud's message is above")

    def wait(self):
        shown, silent = None, 0
        while (state := self.look()) != "ACTIVE":
            if state != shown:
                say(f"{self.flags.name}: {state or 'gcloud does not answer'}")
            shown, silent = state, 0 if state else silent + 1
            if state is None:
                self.exists = False
                raise FailedError(f"{self.flags.name} was deleted by somebody else")
            if state in LOST:
                raise PreemptedError
            if state not in WAITING or silent == UNREACHABLE:
                raise FailedError(f"{self.flags.name} ended in state {state or 'unknown'} before it was ready")
            time.sleep(self.flags.poll)

    def lost(self):
        """Whether the slice was taken away; a word about one that somebody deleted."""
        state = self.look()
        if state is None:
            self.exists = False
            raise FailedError(f"{self.flags.name} was deleted by somebody else")
        return state in LOST or output(self.tpu.describe_node())[1] in LOST

    def lost_by_now(self):
        """The same after a failure: of a slice that may be pre-empted the machines go first, and the state follows."""
        for look in range(4 if self.flags.spot else 1):
            if look:
                time.sleep(self.flags.poll)
            if self.lost():
                return True
        return False

    def prepare(self):
        """Copy and set up; connections to machines that have just booted fail now and then."""
        for words in (self.tpu.copy(), self.tpu.unpack(), self.tpu.setup(), self.tpu.start()):
            for attempt in range(3):
                if attempt:
                    time.sleep(self.flags.poll)
                status = run(words)
                if not status:
                    break
                if self.lost():
                    raise PreemptedError
            else:
                raise FailedError(f"failed three times with exit status {status}: {show(words)}")

    def follow(self, offset):
        """Pass worker 0's log on to stdout; returns the byte to go on from, and whether the connection held."""
        words = self.tpu.follow(offset)
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(words, **streams, start_new_session=True) as process:
            try:
                while part := process.stdout.read1(65536):
                    sys.stdout.buffer.write(part)
                    sys.stdout.buffer.flush()
                    offset += len(part)
            except BaseException:
                end_group(process)
                raise
        return offset, process.returncode == 0

    def states(self):
        """What every worker says of its training, None where it runs, else its exit status; [] where one does not answer."""
        status, said, _ = output(self.tpu.state())
        if status:
            return []
        ends = {"running": None, "none": 137}
        lines = re.findall(r"^(running|none|exit (\d+))$", said, re.MULTILINE)
        return [int(code) if code else ends[line] for line, code in lines]

    def train(self):
        """Follow until all workers are done, or one has failed; returns the exit status."""
        offset, silent = 0, 0
        while True:
            began = time.monotonic()
            offset, held = self.follow(offset)
            states = self.states()
            if not states and self.lost():
                raise PreemptedError
            silent = 0 if states else silent + 1
            if silent == UNREACHABLE:
                raise FailedError(f"{self.flags.name} is there and cannot be reached")
            failed = [status for status in states if status]
            if failed and self.lost_by_now():
                raise PreemptedError
            if failed and None in states:
                say(f"a worker ended with exit status {failed[0]}: the others are stopped")
                run(self.tpu.stop())
            if failed or (states and None not in states):
                if not held or None in states:
                    self.follow(offset)
                return failed[0] if failed else 0
            if time.monotonic() - began < FOLLOW / 2:  # worker 0 is done before the others, or cannot be reached
                time.sleep(self.flags.poll)

    def whole(self, reused):
        """The run with all its slices; returns the training's exit status."""
        self.exists = reused
        for left in range(self.flags.preemptions, -1, -1):
            try:
                if not self.exists:
                    self.create()
                self.wait()
                if not reused or None not in self.states():
                    self.prepare()
                return self.train()
            except PreemptedError:
                say(f"{self.flags.name} was pre-empted; {left} replacements are left")
                self.delete()
                reused = False
        raise FailedError(f"pre-empted {self.flags.preemptions + 1} times: the same command goes on")

    def delete(self):
        with undisturbed():
            for attempt in range(3):
                if attempt:
                    time.sleep(self.flags.poll)
                if not run(self.tpu.delete()) or self.look() is None:
                    self.exists = False
                    break
        if self.exists:
            raise FailedError(
                f"{self.flags.name} was NOT deleted and costs money until it is: {show(self.tpu.delete())}"
            )

    def end(self):
        """Delete what there is, unless it is to be kept."""
        if not self.exists:
            return
        if self.flags.keep:
            say(f"{self.flags.name} is kept and costs money; it is deleted by: {show(self.tpu.delete())}")
        else:
            self.delete()


def pack(archive, dirty):
    """The tree as committed, or with --dirty as it is: every file that git knows or does not ignore."""
    if not dirty:
        made = output(["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={archive}", "HEAD"])
    else:
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            check=True,
        ).stdout
        there = b"\0".join(name for name in listed.split(b"\0") if name and (ROOT / name.decode()).exists())
        names = archive.with_suffix(".names")
        names.write_bytes(there)
        made = output(["tar", "-czf", str(archive), "-C", str(ROOT), "--null", "-T", str(names)])
    if made[0]:
        raise FailedError(f"the tree cannot be packed: {last_line(made[2])}")


def parse(words):
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--type", required=True, help="accelerator and size: v5litepod-16, v4-8, v5p-32, v6e-16, ...")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", help="gcloud's own if not given")
    parser.add_argument("--runtime", help="image; by default the one for JAX on that type")
    parser.add_argument("--spot", action="store_true", help="cheaper, and may be taken away at any moment")
    parser.add_argument("--preemptions", type=int, default=100, metavar="N", help="after so many it is given up (100)")
    parser.add_argument(
        "--reuse", action="store_true", help="take the slice of that name, and the training on it, if any"
    )
    flags, command = parser.read(words)
    kind = re.fullmatch(r"(\w+)-[1-9]\d*", flags.type)
    if not kind or kind[1] not in IMAGES:
        hint = "; v5e is called v5litepod" if flags.type.startswith("v5e") else ""
        raise RefusedError(f"--type {flags.type} is unknown: one of {', '.join(IMAGES)}, a dash and a size{hint}")
    if flags.preemptions < 0:
        raise RefusedError(f"--preemptions {flags.preemptions}: 0 or more")
    return flags, command


def launch(words):
    flags, command = parse(words)
    found = commit(flags.dirty)
    with tempfile.TemporaryDirectory() as folder:
        tpu = Slice(flags, command, Path(folder) / f"{flags.name}.tar.gz")
        if flags.dry_run:
            print("\n".join(map(show, tpu.whole())))
            return 0
        need("gcloud", "git", "tar")
        task = Launch(flags, tpu)
        reused = task.check_name()
        pack(tpu.archive, flags.dirty)
        say(
            f"commit {found} on {flags.name}. Should this launcher be killed, the slice is deleted by: {show(tpu.delete())}"
        )
        with signals(stop):
            try:
                status = task.whole(reused)
            finally:
                task.end()
        say(f"{flags.name}: the training ended with exit status {status}")
        return status


if __name__ == "__main__":
    main(PROGRAM, launch)
