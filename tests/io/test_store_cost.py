"""What saving to a store 50 ms away costs a run: the time of the processor, for no step waits for it."""

import subprocess
import sys
import time

import pytest
from emulated_stores import emulated_s3
from fake_store import run_of

from tinylora_jax.io import Mirror
from tinylora_jax.stores import Store

_LATENCY_S = 0.05
# A proxy in a process of its own: neither its waiting nor its work counts as this process's.
_PROXY = """
import socket, sys, threading, time
target, latency = int(sys.argv[1]), float(sys.argv[2])
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)

def forward(source, sink, delay):
    while data := source.recv(65536):
        time.sleep(delay)
        sink.sendall(data)
    sink.close()

while True:
    client, _ = listener.accept()
    server = socket.create_connection(("127.0.0.1", target))
    for ends in ((client, server, latency), (server, client, 0.0)):
        threading.Thread(target=forward, args=ends, daemon=True).start()
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the emulator and its client
def test_a_step_costs_a_tenth_of_a_second_of_one_core(tmp_path, monkeypatch):
    """The demo's step takes 20 s on two cores, so this is a quarter of a percent."""
    with emulated_s3() as (environment, url):
        port = environment["AWS_ENDPOINT_URL"].rpartition(":")[2]
        command = [sys.executable, "-c", _PROXY, port, str(_LATENCY_S)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as proxy:
            environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{int(proxy.stdout.readline())}"
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            try:
                wall_s, cpu_s = _saving(url, tmp_path / "run")
            finally:
                proxy.kill()
    print(f"\nper step: {wall_s:.2f} s in the background, {cpu_s:.3f} s of a core, emulator included")
    assert cpu_s < 0.5


def _saving(url, folder, steps=20):
    """Seconds of waiting and of computing for the upload of one step."""
    mirror = Mirror(Store(f"{url}/run"), folder, print)
    mirror.bring()
    life, seen, wall, cpu = run_of(folder, steps), 0, [], []
    for _ in life:
        names = [path.name for path in (folder / "checkpoints").glob("[0-9]*") if path.name.isdigit()]
        if (step := max(map(int, names), default=0)) > seen:
            seen, started, computed = step, time.perf_counter(), time.process_time()
            mirror.sync()
            wall.append(time.perf_counter() - started)
            cpu.append(time.process_time() - computed)
    assert seen == steps
    return sum(wall[1:]) / (steps - 1), sum(cpu[1:]) / (steps - 1)
