"""Two processes train one model with the library's own steps."""

import json
import os
import socket
import subprocess
import sys

import chex
import numpy as np
import pytest
import together
from test_parallel import alone


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_steps_and_replicas_of_two_processes(tmp_path):
    """``train_step``, ``zero1`` and ``replicas_in_sync`` on arrays that no process holds whole."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PJRT_NPROC": "32"}
    program, port = [sys.executable, together.__file__], str(free_port())
    results = [tmp_path / "0.json", tmp_path / "1.json"]
    processes = [
        subprocess.Popen([*program, port, str(number), str(result)], env=environment)
        for number, result in enumerate(results)
    ]
    try:
        assert [process.wait(600) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    for result in results:
        found = json.loads(result.read_text())
        runs = found.pop("runs")
        assert found == {
            "devices": [2, 4],
            "equal": True,
            "the other process": False,
            "one device of the second": False,
            "one device of the first": False,
            "parts, a process each": True,
            "parts that processes share": False,
        }
        assert [run["in_sync"] for run in runs] == [True] * 5
        assert [run["skipped"] for run in runs] == [1, 0, 0, 0, 0]
        for run in runs:
            assert "make_array_from_process_local_data" in run["refused"]
            batches = [together.batch_of(run["rows"])] * together.STEPS
            expected = alone(together.OPTIMIZER, together.start(), batches, together.loss)
            actual = {name: np.array(x) for name, x in run["params"].items()}
            chex.assert_trees_all_close(actual, expected, rtol=0, atol=1e-6)
