"""Programs of several processes: `torchrun` and `accelerate launch` on the CPU, each with a port of its own and a time limit."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil


ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "programs"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE_LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
# `--cpu` would start one process, and `--multi_gpu` on a CPU starts two that know of each other only because the Trainer
# has `use_cpu`, or ACCELERATE_USE_CPU is set.
ACCELERATE = [*ACCELERATE_LAUNCH, "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
TIMEOUT = 240  # seconds; far more than any program takes, so that nothing hangs


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(command, cwd, **environment) -> subprocess.Popen:
    """Start `command` in the folder `cwd`; end it with `kill`."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    return subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill(process: subprocess.Popen) -> None:
    """Kill a launcher and every process that it started, which have sessions of their own."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), process]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def finish(process: subprocess.Popen) -> str:
    """Wait for the good end of what `start` started; return what it printed."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError(f"no end after {TIMEOUT} s: {process.args}\n{process.stdout.read()}") from None
    assert process.returncode == 0, output
    return output


def launch(command, cwd, **environment) -> str:
    """Run `command` to its good end; return what it printed."""
    return finish(start(command, cwd, **environment))
