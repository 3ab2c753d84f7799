"""Hosts on this machine: network namespaces, joined by a bridge through links of a set rate.

Needs the right to make namespaces; `why_not` says what is in the way.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """Return why there can be no hosts here, None where there can."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"there is no {tool} here"
    try:
        with Hosts(1):
            return None
    except subprocess.CalledProcessError as error:
        return f"namespaces cannot be made here: {error.stderr.strip()}"


class Hosts:
    """`count` hosts, while it is entered. Each has one link, of `rate` and, where the kernel has
    netem, `delay`; without it the delay is what the links have anyway, and `delayed` is false."""

    def __init__(self, count: int, rate: str = "500mbit", delay: str = "1ms") -> None:
        self.count, self.rate, self.delay = count, rate, delay
        self.delayed = False
        self._tag = f"d{os.getpid() % 100000}"
        self._subnet = f"10.{77 + os.getpid() % 100}.{os.getpid() // 100 % 250}"

    def name(self, host: int) -> str:
        return f"{self._tag}h{host}"

    def address(self, host: int) -> str:
        return f"{self._subnet}.{host + 1}"

    def prefix(self, host: int) -> list[str]:
        """Return what a command starts with to run on a host."""
        return ["ip", "netns", "exec", self.name(host)]

    def unplug(self, host: int) -> None:
        """Take the link of a host down, at the switch: the host itself notices nothing."""
        _do("ip", "link", "set", f"{self._tag}l{host}", "down")

    def __enter__(self) -> Hosts:
        try:
            _do("ip", "link", "add", f"{self._tag}b", "type", "bridge")
            _do("ip", "link", "set", f"{self._tag}b", "up")
            for host in range(self.count):
                self._add(host)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._remove()

    def _add(self, host: int) -> None:
        link, name = f"{self._tag}l{host}", self.name(host)
        inside = self.prefix(host)
        _do("ip", "netns", "add", name)
        _do("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _do("ip", "link", "set", link, "master", f"{self._tag}b", "up")
        _do(*inside, "ip", "address", "add", f"{self.address(host)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _do(*inside, "ip", "link", "set", device, "up")
        queue = [*inside, "tc", "qdisc", "add", "dev", "eth0", "root"]
        try:
            _do(*queue, "netem", "delay", self.delay, "rate", self.rate)
            self.delayed = True
        except subprocess.CalledProcessError:
            _do(*queue, "tbf", "rate", self.rate, "burst", "128kb", "latency", "100ms")

    def _remove(self) -> None:
        for host in range(self.count):
            subprocess.run(["ip", "netns", "del", self.name(host)], capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self._tag}b"], capture_output=True)
