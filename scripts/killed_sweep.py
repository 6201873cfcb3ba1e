"""A tiny sweep that is killed at random moments until it is over, again and again, against one that is left alone.

``python -m scripts.killed_sweep --launcher local --kills 20``: the process of the sweep is killed; ``--launcher ray``: that,
or one of its tasks, or a node of a cluster of two nodes on this machine. The same command goes on every time, and in the end
the metrics are the same, every trial ended once, and summary.csv was whole whenever it was looked at. Exits with 1 if not.

A trial's numbers may be rounded otherwise beside other objectives in its program, as they are where Ray shares trials out and
where those of a pack were stopped at different steps: they have to be the same to TOLERANCE, and whether they are bitwise is
told.
"""

import argparse
import collections
import contextlib
import csv
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from entangle.training import read_metrics

TRIALS = 6
TOLERANCE = 1e-5
STAGES = {"base": 6, "sft": 4, "preference": 8}
FLAGS = {
    "preset": "smoke",
    "packing.most": 2,  # packs in turn, so that trials end at different moments
    "trial.train-pairs": 64,
    "trial.held-out-pairs": 8,
    "trial.probe-pairs": 4,
    "trial.preference.eval-every": 4,
    **{f"trial.{stage}.steps": steps for stage, steps in STAGES.items()},
    **{f"trial.{stage}.checkpoint-every": 2 for stage in STAGES},
}


def command(out, *more):
    """The sweep of TRIALS trials into a folder."""
    words = [str(word) for name, value in FLAGS.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "experiments.margin_objectives", *words, "--out", str(out), "--no-track", *more]


def records(out):
    """Every run's metrics, without the time that they took."""
    return {
        str(file.relative_to(out)): [
            {name: value for name, value in record.items() if name != "seconds"} for record in read_metrics(file.parent)
        ]
        for file in sorted(out.rglob("metrics.jsonl"))
    }


def difference(found, expected):
    """Largest difference of two numbers of one record, relative to sizes above 1; infinite where anything else differs."""
    shape = {run: [list(record) for record in rows] for run, rows in found.items()}
    if shape != {run: [list(record) for record in rows] for run, rows in expected.items()}:
        return float("inf")
    pairs = [
        (one[name], value)
        for run, rows in expected.items()
        for one, other in zip(found[run], rows, strict=True)
        for name, value in other.items()
    ]
    apart = [abs(one - other) / max(1.0, abs(other)) for one, other in pairs if one != other]
    return float("inf") if any(map(math.isnan, apart)) else max(apart, default=0.0)


class Watch(threading.Thread):
    """Looks at a sweep's folder all the time: at its summary, and at the marker of every trial that is done."""

    def __init__(self, out):
        super().__init__(daemon=True)
        self.out, self.over = out, threading.Event()
        self.summaries, self.faults, self.done = 0, [], {}

    def run(self):
        while not self.over.wait(0.005):
            self.look()

    def look(self):
        with contextlib.suppress(FileNotFoundError):
            with (self.out / "summary.csv").open(newline="") as file:
                rows = list(csv.reader(file))
            self.summaries += 1
            if len(rows) != 1 + TRIALS or {len(row) for row in rows} != {len(rows[0])}:
                self.faults.append(f"summary.csv is torn: {rows}")
        for marker in self.out.glob("trials/*/done.json"):
            stat = marker.stat()
            now = (stat.st_ino, stat.st_mtime_ns)
            if self.done.setdefault(marker.parent.name, now) != now:
                self.faults.append(f"{marker.parent.name} ended twice")
                self.done[marker.parent.name] = now

    def stop(self):
        self.over.set()
        self.join()
        self.look()
        return self


class Alone:
    """The sweep in one process."""

    victims = ("launcher",)
    flags = ()

    def __init__(self):
        self.killed = collections.Counter()

    def close(self):
        """There is nothing beside the process."""


class Nodes:
    """A cluster of two nodes with room for one task each; its head has none."""

    victims = ("launcher", "task", "node")

    def __init__(self):
        from ray.cluster_utils import Cluster

        self.killed = collections.Counter()
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]
        self.flags = ("--ray.address", self.cluster.address)

    def kill(self, victim, rng):
        """Returns whether there was something to kill."""
        if victim == "node":
            self.cluster.remove_node(self.nodes.pop(rng.randrange(2)), allow_graceful=False)
            self.nodes.append(self.cluster.add_node(num_cpus=1))
            return True
        if tasks := self.tasks():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(tasks), signal.SIGKILL)
        return bool(tasks)

    def tasks(self):
        """Processes of this cluster that run tasks of the sweep, as Ray titles them."""
        raylets = {info.process.pid for node in self.nodes for info in node.all_processes["raylet"]}
        lines = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
        found = [line.split(None, 2) for line in lines.splitlines()]
        return [int(pid) for pid, parent, *words in found if int(parent) in raylets and words[0].startswith("ray::_")]

    def close(self):
        self.cluster.shutdown()


def disturbed(out, place, kills, seconds, rng):
    """Run one sweep to its end, with at most so many kills; returns how often each victim was killed, and the watch."""
    watch, killed = Watch(out), collections.Counter()
    watch.start()
    log = out.with_suffix(".log")
    while not (out / "done.json").exists():
        with log.open("a") as file:
            process = subprocess.Popen(command(out, *place.flags), stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            left = kills - killed.total()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=rng.uniform(0.1, 0.9) * seconds if left else None)
            if process.poll() is not None:
                break
            victim = min(place.victims, key=lambda name: (place.killed[name], rng.random()))
            if victim == "launcher":
                process.kill()
                process.wait()
            elif not place.kill(victim, rng):
                continue
            killed[victim] += 1
            place.killed[victim] += 1
            print(f"  {victim} killed; {len(list(out.glob('trials/*/done.json')))} trials done", flush=True)
        if process.returncode not in (0, 1, -signal.SIGKILL):  # 1: tasks died more often than they are started again
            raise SystemExit(f"the sweep ended with {process.returncode}: see {log}")
    return killed, watch.stop()


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--launcher", choices=["local", "ray"], default="local")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the sweeps are left; by default a temporary one"
    )
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        print(f"launcher {given.launcher}, {given.kills} kills, seed {given.seed}", flush=True)
        place = Nodes() if given.launcher == "ray" else Alone()
        stack.callback(place.close)
        raise SystemExit(compare(folder, place, given.kills, random.Random(given.seed)))


def compare(folder, place, kills, rng):
    """As many disturbed sweeps as it takes for so many kills; returns 1 if one of them is not what it has to be."""
    whole, start = folder / "whole", time.monotonic()
    subprocess.run(command(whole), check=True, capture_output=True)
    seconds = time.monotonic() - start
    expected, faults, sweeps, looks, apart = records(whole), [], 0, 0, 0.0
    while (left := kills - place.killed.total()) > 0:
        out = folder / f"killed-{sweeps}"
        killed, watch = disturbed(out, place, left, seconds, rng)
        sweeps, looks = sweeps + 1, looks + watch.summaries
        faults += watch.faults
        if len(watch.done) != TRIALS:
            faults.append(f"{out.name}: {len(watch.done)} trials are done, not {TRIALS}")
        apart = max(apart, difference(records(out), expected))
        if not apart <= TOLERANCE:
            faults.append(f"{out.name}: metrics differ by {apart:.1e} from those of {whole}")
        print(f"sweep {sweeps}: killed {dict(killed)}; faults so far: {len(faults)}", flush=True)
    counts = ", ".join(f"{count} of the {victim}" for victim, count in sorted(place.killed.items()))
    print(f"{place.killed.total()} kills ({counts}) in {sweeps} sweeps of {TRIALS} trials, alone {seconds:.0f} s each")
    how = "bitwise" if not apart else f"to {apart:.1e}"
    print(f"trials that ended once, with the same metrics ({how}): {'all' if not faults else 'not all'}")
    print(f"summary.csv was looked at {looks} times")
    print("\n".join(faults))
    return int(bool(faults))


if __name__ == "__main__":
    main()
