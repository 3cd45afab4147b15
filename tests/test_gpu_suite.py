"""`scripts/gpu_suite.sh` without a GPU: which steps run, and from where; a stand-in for Python ends each as it is told."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
STAND_IN = f"""#!/usr/bin/env bash
case "$*" in
*cuda.is_available* | *"import "*) exit 0 ;;
*check_wide*) exit 1 ;;
*decoding*) [ -e "$0.again" ] || {{ touch "$0.again"; exit 137; }} ;;
*) {sys.executable} -c 'from importlib.util import find_spec; print(find_spec("hkt_hf").origin)'; echo "$*" ;;
esac
"""


def test_steps_that_have_ended_are_not_run_again_and_find_the_package(tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    results = tmp_path / "results"
    environment = {**os.environ, "PYTHON": str(python), "GPU_RESULTS": str(results), "DATA": "some/data"}
    calls = [
        subprocess.run(
            ["bash", ROOT / "scripts" / "gpu_suite.sh", "--limit", "300"],
            env=environment,
            capture_output=True,
            text=True,
        )
        for _ in range(2)
    ]
    assert [call.returncode for call in calls] == [1, 1], calls[0].stderr  # a check that fails stays one
    first, second = (call.stdout for call in calls)
    assert "check_wide: exit status 1 after" in first and "check_wide: done before, exit status 1" in second
    assert "decoding: exit status 137 after" in first and "decoding: exit status 0 after" in second
    assert "no time left" not in first
    steps = {path.stem for path in results.glob("*.log")}
    assert {path.stem for path in results.glob("*.done")} == steps and len(steps) == 21
    assert second.count("done before") == len(steps) - 1
    origin, command = (results / "cifar10_rope.log").read_text().splitlines()
    # Links that stand for an installed package, not the folder here, which has no hkt_hf.modeling.
    assert Path(origin).name == "__init__.py" and ROOT not in Path(origin).parents
    assert command.startswith("-m hkt_hf.cli reproduce cifar10 --protocol paper")
    assert command.endswith("--data.path some/data/cifar10") and " hkt-kernel-4-rope " in command
