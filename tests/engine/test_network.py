"""Two hosts whose names resolve to loopback, as on stock Debian: two network namespaces, joined by a cable."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from poise.engine import network

FIRST, SECOND = "10.77.0.11", "10.77.0.12"

MEMBER = """\
import os, socket, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from poise.engine.network import Rank, join_process_group, use_interface, use_interface_towards
from poise.errors import PoiseError

rank, own, first = int(sys.argv[1]), sys.argv[2], sys.argv[3]
place = Rank(rank, 2, 0, 1, rank)

def join(port, within):
    server = socket.create_server((first, port)) if rank == 0 else None
    join_process_group("gloo", first, port, place, timedelta(seconds=within), server)

assert socket.gethostbyname(socket.gethostname()).startswith("127."), "the host name is to resolve to loopback"
Path(f"ready-{rank}").touch()
while not Path(f"ready-{1 - rank}").exists():  # both have loaded torch: a second is enough for the rest
    time.sleep(0.05)
try:
    join(7001, 1)
    print("joined as it is")
except PoiseError as error:
    print("refused:", error)
if dist.is_initialized():
    dist.destroy_process_group()

use_interface(own)
join(7002, 60)
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
print("total", total.item(), os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"])
dist.destroy_process_group()

del os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]
use_interface_towards(first, 7003)
print("towards", os.environ.get("GLOO_SOCKET_IFNAME"))
del os.environ["GLOO_SOCKET_IFNAME"]
if rank == 0:
    use_interface_towards(socket.gethostname(), 7003)
    print("towards itself", os.environ.get("GLOO_SOCKET_IFNAME"))
"""


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """The names of two namespaces with addresses FIRST and SECOND; nothing else is reachable from them."""
    ip = shutil.which("ip")
    if ip is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip (Debian: iproute2)")
    names = (f"poise-{os.getpid()}-a", f"poise-{os.getpid()}-b")
    if subprocess.run([ip, "netns", "add", names[0]], capture_output=True, check=False).returncode != 0:
        pytest.skip("this kernel or container makes no network namespaces")
    try:
        commands = [
            f"netns add {names[1]}",
            f"link add uplink netns {names[0]} type veth peer name uplink netns {names[1]}",
        ]
        for name, address in zip(names, (FIRST, SECOND), strict=True):
            commands += [
                f"-n {name} addr add {address}/24 dev uplink",
                f"-n {name} link set lo up",
                f"-n {name} link set uplink up",
            ]
            folder = Path("/etc/netns", name)  # what lies there takes the place of files of /etc inside
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")
            (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # refuses at once; none outside is waited for
        for command in commands:
            subprocess.run([ip, *command.split()], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run([ip, "netns", "delete", name], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


def test_two_hosts_whose_names_resolve_to_loopback_find_each_other(hosts, tmp_path):
    (tmp_path / "member.py").write_text(MEMBER)
    environment = {name: value for name, value in os.environ.items() if "SOCKET_IFNAME" not in name}
    members = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, str(tmp_path / "member.py"), str(rank), own, FIRST],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (host, own) in enumerate(zip(hosts, (FIRST, SECOND), strict=True))
    ]
    ends = [member.communicate(timeout=120) for member in members]
    for rank, ((said, complaints), member) in enumerate(zip(ends, members, strict=True)):
        assert member.returncode == 0, complaints
        assert "total 3.0 uplink =uplink" in said
        assert "towards uplink" in said
        assert f"refused: worker {rank} on " in said
        assert "--set workers.environment.GLOO_SOCKET_IFNAME=INTERFACE" in said
    assert "towards itself uplink" in ends[0][0]


def test_the_interface_of_an_address_is_found_and_a_users_choice_is_kept(monkeypatch):
    assert network.interface_of("127.0.0.1") == network.interface_of("::1%lo")
    assert network.interface_of("192.0.2.77") is None
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    network.use_interface("192.0.2.77")
    assert "NCCL_SOCKET_IFNAME" not in os.environ
    network.use_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert os.environ["NCCL_SOCKET_IFNAME"] == f"={network.interface_of('127.0.0.1')}"


def test_the_store_of_a_gang_listens_at_the_address_of_its_node_alone():
    with network.listen("127.0.0.1") as server:
        assert server.getsockname()[0] == "127.0.0.1"
