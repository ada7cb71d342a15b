"""Runs of the example trainer as processes of their own, without the seconds of importing.

The server imports everything, starts no backend, and forks one process per request. Such a process
runs ``python -m examples.trainer`` as ``runpy`` does, ends as it would end, and can be killed.
"""

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LIMIT = 600  # seconds for any run: a safety net, far more than any needs


def on_devices(count):
    """The environment of a run on that many CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": flags}


class Run:
    """A process that trains, in a folder of its own for what it says."""

    def __init__(self, server, arguments, talk, environment, file_limit):
        self._server, self._talk = server, talk
        self.code = None
        request = dict(arguments=arguments, talk=str(talk), environment=environment)
        self.pid = server.ask(request | dict(file_limit=file_limit))

    @property
    def stdout(self):
        return self._talk.with_suffix(".out").read_text()

    @property
    def stderr(self):
        return self._talk.with_suffix(".err").read_text()

    def running(self):
        """Whether it has not ended; a zombie has."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] not in "ZX"

    def until(self, condition):
        """Waits for it; False if the run ended before."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            if not self.running():
                return False
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.001)
        return True

    def send(self, number):
        os.kill(self.pid, number)

    def end(self):
        """Its exit code, or minus the signal that killed it; waits for it."""
        if self.code is None:
            self.until(lambda: False)
            self.code = self._server.reap()
        return self.code


class Server:
    def __init__(self, folder):
        self._folder, self._count, self._last = Path(folder), 0, None
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "OPENBLAS_NUM_THREADS": "1",  # a process with threads must not fork
            "JAX_COMPILATION_CACHE_DIR": str(self._folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))], cwd=ROOT, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment,
        )  # fmt: skip

    def start(self, workdir, *options, name="mlp", environment=None, file_limit=None):
        if self._last and self._last.code is None:  # of a test that failed
            self._last.send(signal.SIGKILL)
            self._last.end()
        self._count += 1
        arguments = [f"--config=configs/{name}.py", f"--workdir={workdir}", *options]
        talk = self._folder / f"run-{self._count}"
        for suffix in (".out", ".err"):
            talk.with_suffix(suffix).touch()
        self._last = Run(self, arguments, talk, environment or {}, file_limit)
        return self._last

    def ask(self, request):
        self._process.stdin.write(json.dumps(request) + "\n")
        return int(self._process.stdout.readline())

    def reap(self):
        return int(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait(LIMIT)
        self._process.stdout.close()


def serve():
    sys.path[0] = str(ROOT)
    sys.argv[0] = "trainer"
    import matplotlib.backends.backend_agg  # noqa: F401
    import sklearn.datasets  # noqa: F401

    import examples.trainer.__main__  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return train(request)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def train(request):
    for number, suffix in ((1, ".out"), (2, ".err")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(request["talk"] + suffix, flags), number)
    if limit := request["file_limit"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.environ.update(request["environment"])
    sys.argv[1:] = request["arguments"]
    sys.modules.pop("examples.trainer.__main__")
    runpy.run_module("examples.trainer", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve()
