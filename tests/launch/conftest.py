"""A checkout of its own with the launchers in it, a PATH with the stand-ins, and what they recorded."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SETUP = """#!/usr/bin/env bash
mkdir -p .venv/bin
echo "scripts/setup $*" >>.venv/log
printf '#!/usr/bin/env bash\\necho "python $*" >>.venv/log\\n' >.venv/bin/python
chmod +x .venv/bin/python
"""


@pytest.fixture(scope="session")
def checkout_template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template") / "checkout"
    (folder / "scripts").mkdir(parents=True)
    shutil.copytree(
        ROOT / "scripts" / "launch", folder / "scripts" / "launch", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("launch_tpu", "launch_slurm"):
        shutil.copy(ROOT / "scripts" / name, folder / "scripts" / name)
    (folder / "scripts" / "setup").write_text(SETUP)
    (folder / "scripts" / "setup").chmod(0o755)
    (folder / ".gitignore").write_text("__pycache__/\n.venv/\n/runs/\n")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    return folder


class Place:
    """A checkout, the stand-ins' folder, and the environment that leads to them."""

    def __init__(self, folder, template):
        self.checkout, self.fake, self.home = folder / "checkout", folder / "fake", folder / "home"
        shutil.copytree(template, self.checkout)
        for made in (self.fake / "cues", self.home, folder / "tmp"):
            made.mkdir(parents=True)
        self.environment = {
            "PATH": f"{HERE}:{HERE / 'slurm-bin'}:{os.environ['PATH']}",
            "FAKE": str(self.fake),
            "HOME": str(self.home),
            "TMPDIR": str(folder / "tmp"),
            "WORKERS": "1",
            "PYTHON": sys.executable,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.begun = []

    def begin(self, program, *words, **more):
        """The launcher, running."""
        process = subprocess.Popen(
            [str(self.checkout / "scripts" / program), *words],
            env=self.environment | more,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.begun.append(process)
        return process

    def launch(self, program, *words, **more):
        """The launcher's exit status, stdout and stderr."""
        process = self.begin(program, *words, **more)
        out, error = process.communicate(timeout=60)
        return process.returncode, out, error

    def wait_for(self, condition):
        for _ in range(400):
            if condition():
                return
            time.sleep(0.025)
        raise AssertionError(f"it did not come about in 10 s, after {self.lines()}")

    def cue(self, call, code):
        (self.fake / "cues" / call).write_text(code + "\n")

    def lines(self, name="verbs"):
        file = self.fake / name
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def place(tmp_path, checkout_template):
    made = Place(tmp_path, checkout_template)
    yield made
    for process in made.begun:
        process.kill()
        process.communicate()
    for pid in made.fake.glob("slice/*/entangle-run/pid"):
        subprocess.run(["kill", "-KILL", "--", f"-{pid.read_text().strip()}"], capture_output=True)
