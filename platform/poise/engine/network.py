"""How the processes of a worker group reach each other: the choice of a network interface, and joining the group.

Without GLOO_SOCKET_IFNAME gloo listens on the address that the host name resolves to. On stock Debian and Ubuntu that
is loopback (127.0.1.1 in /etc/hosts), which no other machine reaches. NCCL takes the first interface in its list.
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

GLOO = "GLOO_SOCKET_IFNAME"
NCCL = "NCCL_SOCKET_IFNAME"


@dataclass(frozen=True)
class Rank:
    """The ranks and sizes of a process in its group, as torchrun defines them."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int


def interface_of(address: str) -> str | None:
    """The name of the network interface of this machine that has the IP address; None if none has it."""
    target = ip_address(address.partition("%")[0])  # without the zone of an IPv6 address
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            is_ip = each.family in (socket.AF_INET, socket.AF_INET6)
            if is_ip and ip_address(each.address.partition("%")[0]) == target:
                return str(name)
    return None


def use_interface(address: str) -> None:
    """Make gloo and NCCL use the interface that has `address`, in this process.

    Does not change a variable that the user has set. Does nothing if no interface has the address (behind network
    address translation): then the libraries choose, as they do without Poise.
    """
    name = interface_of(address)
    if name is not None:
        os.environ.setdefault(GLOO, name)
        os.environ.setdefault(NCCL, f"={name}")  # without "=" NCCL matches prefixes: eth0 would match eth01 too


def use_interface_towards(host: str, port: int) -> None:
    """Make gloo and NCCL use the interface from which this machine reaches `host`; for groups over several machines.

    On the machine `host` itself the name may resolve to loopback. Then the other interface is used, if there is exactly
    one.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # a datagram socket: nothing is sent
            address = str(probe.getsockname()[0])
    except OSError:
        return  # joining the group fails for the same reason, with a message
    if not ip_address(address.partition("%")[0]).is_loopback:
        use_interface(address)
        return
    others = _outer_addresses()
    if len({interface_of(other) for other in others}) == 1:
        use_interface(others[0])


def listen(address: str) -> socket.socket:
    """A socket that listens on a free port of `address` only, so that other networks cannot reach the group's store.

    If no interface has the address (behind network address translation), it listens on all interfaces.
    """
    family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.bind((address if interface_of(address) else "", 0))
    server.listen(4096)
    return server


def join_process_group(
    backend: str, address: str, port: int, rank: Rank, timeout: timedelta, server: socket.socket | None = None
) -> None:
    """Join the process group whose store is at `address`; rank 0 passes the `server` that listens there.

    Sets the environment variables of torchrun, for libraries that read them. PoiseError if the other processes cannot
    be reached within `timeout`.
    """
    import torch.distributed as dist

    variables = {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "RANK": rank.rank,
        "WORLD_SIZE": rank.world_size,
        "LOCAL_RANK": rank.local_rank,
        "LOCAL_WORLD_SIZE": rank.local_world_size,
        "NODE_RANK": rank.node_rank,
    }
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]  # documented, but missing from the stub's names
            address,
            port,
            rank.world_size,
            is_master=server is not None,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=None if server is None else server.detach(),
        )
        dist.init_process_group(backend, store=store, rank=rank.rank, world_size=rank.world_size, timeout=timeout)
    except RuntimeError as error:  # the base class of every error of torch.distributed
        raise PoiseError(_unreached(backend, address, port, rank.rank, error)) from error


def is_on_loopback_alone(address: str) -> bool:
    """Whether HOST:PORT is on loopback and nothing answers at that port on the other interfaces of this machine."""
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost", "[::1]") or not port.isdigit():
        return False
    return not any(_answers(other, int(port)) for other in _outer_addresses())


def cluster_address(address: str | None) -> str | None:
    """The address of the cluster to join: `address`, or else RAY_ADDRESS. None: start a private cluster."""
    return address if address is not None else os.environ.get("RAY_ADDRESS") or None


def refusal(address: str) -> str | None:
    """Why nothing answers at HOST:PORT: no such host, or nothing listens. None if something may; takes 2 s at most."""
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
    outer = []
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            is_up = each.family == socket.AF_INET and states[name].isup
            if is_up and not ip_address(each.address).is_loopback:
                outer.append(each.address)
    return outer


def _unreached(backend: str, address: str, port: int, rank: int, error: RuntimeError) -> str:
    """The message for a worker that could not join the group, with the first line of torch's error."""
    variable = NCCL if backend == "nccl" else GLOO
    reason = re.sub(r"\[[^]]*/third_party/[^]]*\] ", "", str(error).strip().splitlines()[0])
    return (
        f"worker {rank} on {socket.gethostname()} did not reach the other workers (meeting place {address}:{port}, "
        f"{variable}={os.environ.get(variable, '')}): {reason}. Check that the machines "
        f"reach each other on all ports, or name the network that joins them: "
        f"--set workers.environment.{variable}=INTERFACE"
    )
