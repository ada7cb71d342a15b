"""Starts several training processes on this machine, to try out what several machines do.

``python -m examples.trainer.launch --processes=2 --devices_per_process=2 -- --config=CONFIG
--workdir=FOLDER``: the options after ``--`` are those of ``examples.trainer``. The processes use
virtual CPU devices, which communicate through gloo. After Ctrl-C or SIGTERM all of them save and
stop. If one dies, the others are stopped.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

_GRACE = 30  # seconds for the others to end by themselves after one has failed


def main() -> None:
    options = parse(sys.argv[1:])
    address = f"localhost:{free_port()}"
    stopping, resumable = threading.Event(), threading.Event()
    children = [start(options, number, address) for number in range(options.processes)]
    printers = [
        threading.Thread(target=forward_output, args=(child, number, resumable), daemon=True)
        for number, child in enumerate(children)
    ]
    for printer in printers:
        printer.start()

    def stop(number: int, frame: Any) -> None:
        stopping.set()
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    first = wait_for_first_failure(children)
    if first is not None and not stopping.is_set():
        reason = how_it_ended(children[first].returncode)
        print(f"launch: process {first} {reason}; the others are stopped", file=sys.stderr)
        end_others(children)
    for child in children:
        child.wait()
    for printer in printers:
        printer.join()
    if first is not None:
        # Not after a mistake in the options, which the same command would repeat.
        can_resume = resumable.is_set() or children[first].returncode < 0
        message = "launch: run the same command again to resume from the last checkpoint"
        sys.exit(message if can_resume else 1)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.trainer.launch",
        description="Starts several processes of examples.trainer on this machine.",
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices_per_process", type=int, default=1, help="virtual CPU devices")
    parser.add_argument("command", nargs="+", help="after --: options of examples.trainer")
    options = parser.parse_args(arguments)
    if options.processes < 1 or options.devices_per_process < 1:
        parser.error("--processes and --devices_per_process must be at least 1")
    return options


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(options: argparse.Namespace, number: int, address: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(options.devices_per_process),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        # With fewer threads than twice the number of devices, they deadlock.
        "PJRT_NPROC": str(max(32, 2 * options.devices_per_process)),
    }
    position = [f"--coordinator={address}", f"--num_processes={options.processes}"]
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "examples.trainer", *options.command, *position,
         f"--process_id={number}"],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,  # this process passes Ctrl-C on, once
    )  # fmt: skip


def forward_output(child: subprocess.Popen[str], number: int, resumable: threading.Event) -> None:
    """Prints the output of a process; all but the first get their number as a prefix.

    Sets ``resumable`` if the process says that the same command resumes.
    """
    assert child.stdout is not None
    for line in child.stdout:
        if "to resume" in line:
            resumable.set()
        if not line.startswith("[Gloo] Rank "):
            sys.stdout.write(line if number == 0 else f"[{number}] {line}")
            sys.stdout.flush()


def wait_for_first_failure(children: list[subprocess.Popen[str]]) -> int | None:
    """The number of the first process that fails; None if all succeed."""
    while True:
        codes = [child.poll() for child in children]
        failed = [(code, number) for number, code in enumerate(codes) if code]
        if failed:  # a killed one (code < 0) is the cause, others follow within milliseconds
            return min(failed)[1]
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def how_it_ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def end_others(children: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + _GRACE
    while any(child.poll() is None for child in children):
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.05)


if __name__ == "__main__":
    main()
