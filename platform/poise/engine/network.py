"""How the processes of a gang reach each other: the network interface that they use, and how they join.

gloo, unless told otherwise, listens on the address that the host name resolves to. On stock Debian and Ubuntu that is
loopback (127.0.1.1 in /etc/hosts), which no other machine reaches. NCCL takes the first interface that it finds.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address

import psutil

from poise.errors import PoiseError

__all__ = [
    "Rank",
    "cluster_address",
    "interface_of",
    "is_on_loopback_alone",
    "join_process_group",
    "listen",
    "refusal",
    "use_interface",
    "use_interface_towards",
]

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


@dataclass(frozen=True)
class Rank:
    """The place of a process in its group, as torchrun says it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int


def interface_of(address: str) -> str | None:
    """The name of the network interface of this machine that holds the IP address; None if none does."""
    wanted = ip_address(address.partition("%")[0])
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            is_ip = each.family in (socket.AF_INET, socket.AF_INET6)
            if is_ip and ip_address(each.address.partition("%")[0]) == wanted:
                return str(name)
    return None


def use_interface(address: str) -> None:
    """Make gloo and NCCL use the interface that holds `address`, in this process.

    A variable that the user has set is left alone, and so is everything where no interface holds the address (behind
    a translation of addresses): then the libraries choose, as they do without Poise.
    """
    name = interface_of(address)
    if name is not None:
        os.environ.setdefault(GLOO, name)
        os.environ.setdefault(NCCL, f"={name}")  # without "=" NCCL takes eth0 for a prefix, eth01 too


def use_interface_towards(host: str, port: int) -> None:
    """Make gloo and NCCL use the interface from which this machine reaches `host`; for groups over several machines.

    On the machine that is `host` itself, a name that resolves to loopback says nothing; then the one other interface
    is taken, if there is one only.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # a datagram socket: nothing is sent
            address = str(probe.getsockname()[0])
    except OSError:
        return  # what joins the group meets the same, and says so
    if not ip_address(address.partition("%")[0]).is_loopback:
        use_interface(address)
        return
    others = _outer_addresses()
    if len({interface_of(other) for other in others}) == 1:
        use_interface(others[0])


def listen(address: str) -> socket.socket:
    """A socket that listens on a free port at `address` alone: the group's store is open to no other network.

    Where no interface holds the address (behind a translation of addresses), it listens on all of them.
    """
    family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.bind((address if interface_of(address) else "", 0))
    server.listen(4096)
    return server


def join_process_group(
    backend: str, address: str, port: int, place: Rank, timeout: timedelta, server: socket.socket | None = None
) -> None:
    """Enter the process group whose store is at `address`; rank 0 passes the `server` that listens there.

    The environment says the same as under torchrun, for libraries that look there. PoiseError where the others are
    not reached.
    """
    import torch.distributed as dist

    said = {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "RANK": place.rank,
        "WORLD_SIZE": place.world_size,
        "LOCAL_RANK": place.local_rank,
        "LOCAL_WORLD_SIZE": place.local_world_size,
        "NODE_RANK": place.node_rank,
    }
    os.environ.update({name: str(value) for name, value in said.items()})
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]  # documented, and left out of its list of names
            address,
            port,
            place.world_size,
            is_master=server is not None,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=None if server is None else server.detach(),
        )
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
    except RuntimeError as error:  # torch.distributed has one class for each library, all of them RuntimeErrors
        raise PoiseError(_unreached(backend, address, port, place.rank, error)) from error


def is_on_loopback_alone(address: str) -> bool:
    """Whether HOST:PORT is of this machine's loopback, and nothing answers at that port on its other interfaces."""
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost", "[::1]") or not port.isdigit():
        return False
    return not any(_answers(other, int(port)) for other in _outer_addresses())


def cluster_address(address: str | None) -> str | None:
    """The address of the cluster to join: the one given, or RAY_ADDRESS; None starts one for the command alone."""
    return address if address is not None else os.environ.get("RAY_ADDRESS") or None


def refusal(address: str) -> str | None:
    """Why nothing can answer at HOST:PORT, told at once: no such host, or nobody listens. None where somebody may."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except (ConnectionRefusedError, socket.gaierror) as error:
        return error.strerror
    except (OSError, ValueError, OverflowError):
        return None
    return None


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def _outer_addresses() -> list[str]:
    """IPv4 addresses of the interfaces that are up, without loopback."""
    states = psutil.net_if_stats()
    return [
        each.address
        for name, addresses in psutil.net_if_addrs().items()
        for each in addresses
        if each.family == socket.AF_INET and states[name].isup and not ip_address(each.address).is_loopback
    ]


def _unreached(backend: str, address: str, port: int, rank: int, error: RuntimeError) -> str:
    variable = NCCL if backend == "nccl" else GLOO
    said = re.sub(r"\[[^]]*/third_party/[^]]*\] ", "", str(error).strip().splitlines()[0])
    return (
        f"worker {rank} on {socket.gethostname()} did not reach the other workers (meeting place {address}:{port}, "
        f"{variable}={os.environ.get(variable, '')}): {said}. Check that the machines "
        f"reach each other on all ports, or name the network that joins them: "
        f"--set workers.environment.{variable}=INTERFACE"
    )
