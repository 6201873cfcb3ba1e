"""scripts/launch_slurm against a stand-in for Slurm that really runs the script which it is given."""

import re
import shutil
import signal
import subprocess

import pytest

from scripts.launch.commands import RefusedError
from scripts.launch.slurm import parse

JOB = ("job", "--gpus", "2", "--poll", "0.05")


@pytest.fixture
def cluster(place):
    yield place
    if (place.fake / "pid").exists():
        subprocess.run(["kill", "-KILL", "--", f"-{(place.fake / 'pid').read_text().strip()}"], capture_output=True)


def launch(cluster, *words, flags=(), **more):
    return cluster.launch("launch_slurm", *JOB, *flags, "--", *words, **more)


def test_a_job_from_nothing_to_the_end(cluster):
    flags = (
        "--nodes",
        "2",
        "--time",
        "1:00:00",
        "--gpu-type",
        "h100",
        "--sbatch=--qos=high",
        "--setup",
        "export SHARED='a b'",
    )
    status, out, error = launch(
        cluster, "bash", "-c", 'echo "$SLURM_PROCID: $1 $SHARED"; which python', "me", "it's", flags=flags
    )
    assert status == 0, error
    python = f"{cluster.checkout}/.venv/bin/python"
    first, *rest = out.splitlines()
    assert re.fullmatch(r"entangle: job 7, commit [0-9a-f]+, on node1, restart 0", first)
    assert rest == ["0: it's a b", python, "1: it's a b", python]
    assert "job 7: COMPLETED" in error and error.endswith("job job ended: COMPLETED, exit status 0\n")
    assert "scancel" not in cluster.lines()
    (script,) = cluster.checkout.glob("runs/launch/job-*/job.sh")
    head = [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    wanted = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=h100:2", "--time=1:00:00", "--qos=high"]
    assert {*wanted, "--requeue", "--signal=TERM@120", "--open-mode=append"} <= {*head}
    installed = (cluster.checkout / ".venv" / "log").read_text().splitlines()
    assert installed == ["scripts/setup train", "python -I -m pip install --quiet jax[cuda12]"]


def test_the_dry_run_prints_script_and_commands_and_leaves_nothing(cluster):
    status, out, error = launch(cluster, "echo", "a b", flags=("--dry-run",))
    assert (status, error, cluster.lines()) == (0, "", [])
    assert not (cluster.checkout / "runs").exists() and not (cluster.checkout / ".venv").exists()
    assert launch(cluster, "echo", "a b")[0] == 0
    (script,) = cluster.checkout.glob("runs/launch/job-*/job.sh")
    stamp = re.compile(r"job-\d{8}-\d{6}-\d+")
    same = [stamp.sub("job-NOW", text) for text in (out, script.read_text())]
    assert same[0].startswith(same[1])
    said = stamp.sub("job-NOW", "\n".join(cluster.lines("calls")))
    ran = [line.strip() for line in said.replace("\\,", ",").splitlines() if not line.startswith("srun")]
    assert [line.replace("7", "JOB") if "--jobs" in line else line for line in dict.fromkeys(ran)] == [
        line for line in same[0].splitlines() if re.match("(sbatch|squeue|sacct) ", line)
    ]


def test_the_jobs_exit_status_is_the_launchers(cluster):
    status, _, error = launch(cluster, "bash", "-c", '[ "$SLURM_PROCID" = 0 ] || exit 9')
    assert status == 9 and error.endswith("job job ended: FAILED, exit status 9\n")


def test_out_of_time_and_saved_is_put_back_into_the_queue(cluster):
    status, out, _ = launch(cluster, "bash", "-c", "echo >>$FAKE/turns; [ $(wc -l <$FAKE/turns) -gt 2 ] || exit 143")
    assert status == 0 and "restart 1" in out
    assert cluster.lines().count("scontrol") == 1


def test_a_state_that_passes_is_no_end(cluster):
    cluster.cue("squeue-1", "echo PREEMPTED; exit 0")
    cluster.cue("squeue-2", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    status, out, _ = launch(cluster, "bash", "-c", "sleep 0.3; echo trained")
    assert status == 0 and out.endswith("trained\ntrained\n")


def test_a_cluster_without_accounting_and_with_a_short_memory(cluster):
    cluster.cue("sacct-1", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert launch(cluster, "true")[0] == 0
    cluster.cue("sacct-2", "exit 1")
    status, _, error = launch(cluster, "false")
    assert status == 1 and "ended: FAILED, exit status 1" in error
    cluster.cue("sacct-3", "exit 1")
    looks = cluster.lines().count("squeue")
    cluster.cue(f"squeue-{looks + 1}", "echo RUNNING; exit 0")
    for look in (2, 3):
        cluster.cue(f"squeue-{looks + look}", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    status, _, error = launch(cluster, "true")
    assert status == 1 and error.endswith("job job ended: unknown, last seen RUNNING, exit status 1\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_the_job(cluster, number):
    process = cluster.begin("launch_slurm", *JOB, "--", "sleep", "60")
    cluster.wait_for(lambda: "srun" in cluster.lines())
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number and cluster.lines()[-1] == "scancel"


def test_a_job_that_is_kept_goes_on(cluster):
    process = cluster.begin("launch_slurm", *JOB, "--keep", "--", "sleep", "60")
    cluster.wait_for(lambda: "srun" in cluster.lines())
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=20)[1]
    assert error.endswith("job 7 goes on; it is cancelled by: scancel 7\n") and "scancel" not in cluster.lines()


def test_a_submission_that_fails(cluster):
    cluster.cue("sbatch-1", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    status, _, error = launch(cluster, "true")
    assert status == 1 and error.splitlines()[-1].endswith(
        "not submitted: sbatch: error: invalid partition specified: gpu"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("job --gpus 2", "no command"),
        ("job -- true", "--gpus"),
        ("job --gpus 0 -- true", "--gpus 0"),
        ("job --gpus 2 --nodes -1 -- true", "--nodes -1"),
        ("job --gpus 2 --jax tpu -- true", "'tpu'"),
        ("job --gpus 2 --sbatch high -- true", "--sbatch high"),
        ("Job --gpus 2 -- true", "'Job'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_looked_at(words, message):
    with pytest.raises(RefusedError, match=re.escape(message)):
        parse(words.split())


def test_bad_input_is_one_line_and_nothing_is_submitted(cluster, tmp_path):
    with pytest.raises(RefusedError, match="has spaces in it"):
        parse(["job", "--gpus", "2", "--partition", "a\n#SBATCH --nodes=9", "--", "true"])
    (cluster.checkout / "new").touch()
    status, out, error = launch(cluster, "true")
    assert (status, out, cluster.lines()) == (2, "", []) and len(error.splitlines()) == 1 and "(new)" in error
    bare = tmp_path / "bin"
    bare.mkdir()
    for program in ("bash", "git", "dirname"):
        (bare / program).symlink_to(shutil.which(program))
    status, _, error = launch(cluster, "true", flags=("--dirty",), PATH=str(bare))
    assert (status, error) == (2, "scripts/launch_slurm: sbatch is not on the PATH\n")
