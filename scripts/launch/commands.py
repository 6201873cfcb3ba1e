"""What both launchers share: their command lines, the committed tree, commands run or printed, and ends in one line."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class RefusedError(Exception):
    """Bad input, found before anything was created: one line, exit status 2."""


class FailedError(Exception):
    """What was asked for did not come about: one line, exit status 1."""


class StoppedError(BaseException):
    """Ctrl-C, or a signal that ends the launcher; not an Exception, so that nothing on the way takes it for a failure."""

    def __init__(self, number):
        super().__init__(number)
        self.status = 128 + number


class Parser(argparse.ArgumentParser):
    """Flags, then ``--``, then the command; what is wrong is said in one line."""

    def __init__(self, program, description):
        usage = f"{program} NAME [flags] -- COMMAND ..."
        super().__init__(usage=usage, description=description.partition(": ")[2], allow_abbrev=False)
        self.add_argument("name", metavar="NAME", help="of what is created: letters, digits and dashes")
        self.add_argument("--setup", default="", metavar="COMMAND", help="run first, as to mount a shared folder")
        self.add_argument("--dry-run", action="store_true", help="print every command, run none")
        self.add_argument("--keep", action="store_true", help="delete (cancel) nothing, whatever happens")
        self.add_argument(
            "--dirty", action="store_true", help="go on though the tree has changes that are not committed"
        )
        self.add_argument("--poll", type=float, default=20.0, metavar="SECONDS", help="between two looks (20)")

    def error(self, message):
        raise RefusedError(message)

    def read(self, words):
        """The flags, and the words of the command."""
        split = words.index("--") if "--" in words else len(words)
        flags, command = self.parse_args(words[:split]), words[split + 1 :]
        if not command:
            raise RefusedError(
                "no command: write it after the flags and --, as in NAME ... -- python -m experiments.NAME"
            )
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", flags.name):
            raise RefusedError(f"the name {flags.name!r} is none: up to 63 lower-case letters, digits and dashes")
        if not flags.poll > 0:
            raise RefusedError(f"--poll {flags.poll:g}: seconds above 0")
        return flags, command


def say(text):
    print(text, file=sys.stderr, flush=True)


def show(words):
    """A command as one would type it."""
    return shlex.join(map(str, words))


def call(words, **streams):
    """Run a command in a session of its own, so that Ctrl-C goes to the launcher alone, which ends all of it."""
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True, **streams) as process:
        try:
            out, error = process.communicate()
        except BaseException:
            end_group(process)
            raise
    return (
        process.returncode,
        (out or b"").decode(errors="replace").strip(),
        (error or b"").decode(errors="replace").strip(),
    )


def end_group(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


def output(words):
    """A command's exit status, stdout and stderr."""
    return call(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(words):
    """Run a command whose output the reader sees, on stderr; returns its exit status."""
    say(f"+ {show(words)}")
    return call(words, stdout=sys.stderr.fileno())[0]


def last_line(text):
    """Of a tool's error message the line that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no message")


def need(*programs):
    for program in programs:
        if not shutil.which(program):
            raise RefusedError(f"{program} is not on the PATH")


def commit(dirty):
    """The commit that is run; one that is not the tree is refused unless that is wanted."""
    status, found, error = output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    if status:
        raise RefusedError(f"{ROOT} is no git checkout with a commit: {last_line(error)}")
    changes = output(["git", "-C", str(ROOT), "status", "--porcelain"])[1]
    if changes and not dirty:
        first = changes.splitlines()[0].split(maxsplit=1)[-1]
        raise RefusedError(f"the tree differs from commit {found} ({first}): commit, or say --dirty")
    return f"{found} with changes" if changes else found


def stop(number, frame):
    raise StoppedError(number)


@contextlib.contextmanager
def signals(handler):
    """Inside, SIGINT, SIGTERM and SIGHUP are handled by that."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextlib.contextmanager
def undisturbed():
    """What is created or deleted inside is so in full: a signal stops the launcher afterwards."""
    came = []
    with signals(lambda number, frame: came.append(number)):
        yield
    if came:
        raise StoppedError(came[0])


def main(program, launch):
    """Exit with the status that ``launch(words)`` returns, or with one line and 2, 1, or 128 and the signal's number."""
    try:
        sys.exit(launch(sys.argv[1:]))
    except RefusedError as error:
        say(f"{program}: {error}")
        sys.exit(2)
    except (FailedError, OSError) as error:
        say(f"{program}: {error}")
        sys.exit(1)
    except StoppedError as error:
        sys.exit(error.status)
