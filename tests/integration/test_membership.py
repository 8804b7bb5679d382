"""Who may join a cell, who leaves it and how, and who belongs to which pool."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from tests.integration.client import until
from tests.integration.cluster import Cluster
from tests.integration.emulation import assert_whole, new_prompt

from twinpool.proto.twinpool.v1 import admin_pb2

REFUSED = 2  # exit status of whatever the operator must mend
STRANGERS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "token": ({"link__token": "wrong"}, ("token",)),
    "dtype": ({"model__dtype": "bfloat16"}, ("dtype", "float32", "bfloat16")),
    "block-size": ({"worker__block_size": 32}, ("block_size", "the cell has 16", "the worker 32")),
    "layout": ({"worker__emulated__block_bytes": 512}, ("layout", "stand-in/256", "stand-in/512")),
    "model": ({"worker__engine": "torch", "worker__kv_memory_mib": 64}, ("fingerprint", "emulated-49152")),
}


def test_strangers_are_refused(timed: Cluster) -> None:
    """Each ends with status 2 and a sentence that has both sides' values; the cell does not notice."""
    workers = {
        name: timed.spawn_worker(f"stranger-{name}", f"s-{name}", "decode", over)
        for name, (over, _) in STRANGERS.items()
    }
    for name, process in workers.items():
        assert process.wait(60.0) == REFUSED, f"{name}: {process.text()}"
        for part in STRANGERS[name][1]:
            assert part in process.text(), f"{name}: {process.text()}"
        assert "Traceback" not in process.text()
    assert {worker.worker for worker in timed.client.status().workers} == set(timed.roles)


def test_mistakes_of_the_operator(timed: Cluster, tmp_path: Path) -> None:
    """Exit status 2 and a sentence with the key or the file, never a traceback."""
    corrupt = tmp_path / "model.gguf"
    corrupt.write_bytes(b"GGUF" + bytes(100))
    unreadable = tmp_path / "cluster.yaml"
    unreadable.write_text("worker: [1, 2\n  threads: {", encoding="utf-8")
    torch: dict[str, object] = {"worker__engine": "torch"}
    mistakes = {
        "port": (timed.spawn_router("second-router", {}), "in use"),
        "no-model": (timed.spawn_worker("no-model", "x", "decode", torch | {"model__path": tmp_path / "no"}), "no"),
        "corrupt": (timed.spawn_worker("corrupt", "x", "decode", torch | {"model__path": corrupt}), "model.gguf"),
        "no-yaml": (timed.spawn_router("no-yaml", {}, "-c", str(unreadable)), "cluster.yaml"),
        "kv-memory": (
            timed.spawn_worker("kv-memory", "x", "decode", {"worker__emulated__block_bytes": 1 << 20}), "kv_memory_mib",
        ),
    }  # fmt: skip
    for name, (process, part) in mistakes.items():
        assert process.wait(60.0) == REFUSED, f"{name}: {process.text()}"
        assert part in process.text(), f"{name}: {process.text()}"
        assert "Traceback" not in process.text(), f"{name}: {process.text()}"


def test_name_in_use(timed: Cluster) -> None:
    """The second one waits; it gets the name when the first is gone."""
    first = timed.client.worker("d1")
    assert first is not None
    twin = timed.spawn_worker("twin", "d1", "decode", {})
    until(lambda: "a worker named d1 is connected" in twin.text(), "a refusal")
    assert twin.alive
    assert timed.client.worker("d1") == first or timed.client.worker("d1").pid == first.pid  # type: ignore[union-attr]
    timed.kill("d1")
    until(lambda: (worker := timed.client.worker("d1")) is not None and worker.pid != first.pid, "the twin")
    prompt = new_prompt(100)
    assert_whole(timed.client.generate(prompt, max_tokens=5), prompt, 5)


def _by_admin(cluster: Cluster, name: str) -> None:
    cluster.client.admin.DrainWorker(admin_pb2.DrainWorkerRequest(worker=name), timeout=5.0)


def _by_signal(cluster: Cluster, name: str) -> None:
    cluster.workers[name].signal(signal.SIGTERM)


def _command(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    address = str(cluster.settings["edge.admin"])
    given = [sys.executable, "-m", "twinpool.cli", *arguments, "--address", address]
    return subprocess.run(given, capture_output=True, text=True, timeout=50.0, check=False)


@pytest.mark.parametrize("drain", [_by_admin, _by_signal])
def test_a_drained_worker_leaves_and_its_streams_go_on(timed: Cluster, drain: Callable[[Cluster, str], None]) -> None:
    """Live migration: nothing is lost, and the worker need not wait for the last token."""
    prompt, other = new_prompt(100), new_prompt(100)
    running = timed.client.start(prompt, max_tokens=400).wait_tokens(5)
    name = next(worker.worker for worker in timed.client.status().workers if worker.running)
    drain(timed, name)
    until(lambda: timed.client.worker(name).state == "draining", "draining")  # type: ignore[union-attr]
    later = timed.client.generate(other, max_tokens=5)
    assert_whole(later, other, 5)
    assert later.route.decode_worker != name
    assert timed.workers[name].wait() == 0
    timed.wait_worker(name, connected=False)
    assert not running.over, "the worker waited for the end of the answer"
    answer = running.result()
    assert_whole(answer, prompt, 400)
    assert answer.route.attempts == 1
    assert answer.route.decode_worker != name
    assert f"moved here from {name}" in answer.route.path_reason


def test_drain_and_role_as_commands(timed: Cluster) -> None:
    prompt = new_prompt(100)
    running = timed.client.start(prompt, max_tokens=300).wait_tokens(5)
    name = next(worker.worker for worker in timed.client.status().workers if worker.running)
    done = _command(timed, "drain", name)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"{name} has left"
    assert timed.workers[name].wait() == 0
    assert_whole(running.result(), prompt, 300)
    for role in ("decode", "prefill"):
        moved = _command(timed, "role", "p1", role)
        assert (moved.returncode, moved.stdout) == (0, f"p1: {role}\n")
        assert list(timed.client.worker("p1").roles) == [role]  # type: ignore[union-attr]
    for command in (("drain", "nobody"), ("role", "nobody", "both")):
        unknown = _command(timed, *command)
        assert unknown.returncode == 1
        assert "NO_SUCH_WORKER" in unknown.stderr
        assert "connected: " in unknown.stderr


def test_drained_worker_leaves_although_a_pull_hangs(timed: Cluster) -> None:
    """Its only request is cancelled while bytes are on their way: the end of that pull is the end of the worker."""
    running = timed.client.start(new_prompt(4_000))
    until(lambda: any(w.free_blocks < w.blocks for w in timed.client.status().workers if w.worker[0] == "d"), "room")
    name = next(w.worker for w in timed.client.status().workers if w.worker[0] == "d" and w.free_blocks < w.blocks)
    timed.pause(name)
    running.wait_tokens(1)
    for sender in ("p0", "p1"):
        timed.pause(sender)
    timed.resume(name)
    timed.client.admin.DrainWorker(admin_pb2.DrainWorkerRequest(worker=name), timeout=5.0)
    running.cancel()
    assert timed.workers[name].wait() == 0


def test_role_change(timed: Cluster) -> None:
    """Workers change pools; what runs goes on."""
    prompt, other = new_prompt(100), new_prompt(100)
    running = timed.client.start(prompt, max_tokens=100).wait_tokens(5)
    for name, role in (("p1", "decode"), ("d0", "prefill"), ("d1", "prefill")):
        timed.client.admin.SetRole(admin_pb2.SetRoleRequest(worker=name, roles=[role]), timeout=5.0)
    later = timed.client.generate(other, max_tokens=5)
    assert_whole(later, other, 5)
    assert later.route.decode_worker == "p1"
    answer = running.result()
    assert_whole(answer, prompt, 100)
    assert answer.route.attempts == 1
    for name, role in timed.roles.items():
        timed.client.admin.SetRole(admin_pb2.SetRoleRequest(worker=name, roles=[role]), timeout=5.0)
    assert {worker.worker: list(worker.roles) for worker in timed.client.status().workers} == {
        name: [role] for name, role in timed.roles.items()
    }


def test_unknown_worker(timed: Cluster) -> None:
    admin = timed.client.admin
    with pytest.raises(grpc.RpcError) as drain:
        admin.DrainWorker(admin_pb2.DrainWorkerRequest(worker="nobody"), timeout=5.0)
    with pytest.raises(grpc.RpcError) as role:
        admin.SetRole(admin_pb2.SetRoleRequest(worker="nobody", roles=["decode"]), timeout=5.0)
    assert {drain.value.code(), role.value.code()} == {grpc.StatusCode.NOT_FOUND}


def test_drained_router_ends_its_streams_and_exits(timed: Cluster) -> None:
    prompt = new_prompt(100)
    running = timed.client.start(prompt, max_tokens=60).wait_tokens(5)
    assert timed.router is not None
    timed.router.signal(signal.SIGTERM)
    until(lambda: "draining" in timed.router.text(), "draining")  # type: ignore[union-attr]
    refused = timed.client.generate(new_prompt(10))
    assert refused.code == grpc.StatusCode.UNAVAILABLE
    assert_whole(running.result(), prompt, 60)
    assert timed.router.wait() == 0
    timed.router = None
