"""Accelerators by name: sizes and peak rates from their vendors' data sheets. Nothing here was measured."""

from dataclasses import dataclass

from luffy.errors import UserError
from luffy.host import host_memory

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """One device. Rates of 0 are not known, and no time is predicted from them."""

    name: str
    memory: float
    """Bytes that a driver lets a process have."""
    flops: float = 0.0
    """Dense bfloat16 peak, FLOP/s."""
    bandwidth: float = 0.0
    """Of its memory, bytes/s."""
    link: float = 0.0
    """To a neighbour in the same machine, bytes/s in one direction."""
    network: float = 0.0
    """To a device of another machine, bytes/s in one direction: its share of the machine's adapters."""
    host: float = 0.0
    """To its host's memory, bytes/s in one direction."""
    per_node: int = 8


# Vendors' figures: NVIDIA's data sheets of H100 SXM5, H200, A100 SXM4, L40S, DGX B200 (an eighth); AMD's of MI300X.
# Memory: the vendor's number of GB taken as GiB, less 2.5 % that driver and firmware keep (an "80 GB" card has 80 GiB).
# network: one 400 Gbit/s adapter a device, 200 on A100 and L40S, as their vendors' reference machines have: an
# assumption. host: PCIe generation 5, or 4, of 16 lanes.
def _gpu(name: str, gb: float, tera: float, tb: float, link: float, network: float = 50, host: float = 64) -> Machine:
    return Machine(name, 0.975 * gb * GIB, tera * 1e12, tb * 1e12, link * 1e9, network * 1e9, host * 1e9)


MACHINES = {
    machine.name: machine
    for machine in (
        _gpu("h100", 80, 989, 3.35, 450),
        _gpu("h200", 140, 989, 4.8, 450),
        _gpu("b200", 179, 2250, 8.0, 900),
        _gpu("a100", 80, 312, 2.039, 300, network=25, host=32),
        _gpu("a100-40gb", 40, 312, 1.555, 300, network=25, host=32),
        _gpu("l40s", 45, 362, 0.864, 32, network=25, host=32),
        _gpu("mi300x", 192, 1307, 5.3, 448),
    )
}


def machine_of(device_name: str) -> Machine | None:
    """A device as its driver names it ("NVIDIA H100 80GB HBM3"); None: not in the table. Of several sizes the first."""
    words = device_name.lower().replace("-", " ").split()
    return next((machine for name, machine in MACHINES.items() if name.split("-")[0] in words), None)


def peak_of(device_name: str) -> float | None:
    """Its dense bfloat16 peak, FLOP/s."""
    machine = machine_of(device_name)
    return None if machine is None else machine.flops


def find_machine(name: str) -> Machine:
    """A GPU by name, or `cpu`: this machine's memory, no rates.

    Raises:
        UserError: no such machine.
    """
    if name.lower() == "cpu":
        return Machine("cpu", host_memory().total, per_node=1)
    if found := MACHINES.get(name.lower()):
        return found
    raise UserError(f"plan: --gpu must be one of {', '.join(MACHINES)} or cpu, got {name!r}")
