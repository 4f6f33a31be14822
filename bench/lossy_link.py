#!/usr/bin/env python3
"""What streams side by side gain on a link with delay and loss.

    bench/lossy_link.py [--delay-ms 25] [--loss 0.01] [--mib 16] [--streams 1,4,16] [--rounds 3]

Two network namespaces with a TUN device each; this program carries every packet from one to the other, after the
delay, and drops some. So TCP and its congestion control are the kernel's, and the link is as `tc netem` would make
it (which needs a kernel module that not every machine has). A server runs at one end, `modelstate fetch` at the
other; every digest is verified. Beside it a plain TCP transfer of as many bytes. Needs root and ip(8).
"""

import argparse
import collections
import fcntl
import heapq
import json
import os
import random
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time

BIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "build", "release", "bin")
SERVER, CLIENT = "10.77.0.1", "10.77.0.2"
PORT = 50551
QUEUE_PACKETS = 10000


def sh(command):
    subprocess.run(command, shell=True, check=True)


def open_tun(name):
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH", name.encode(), 0x0001 | 0x1000))  # TUNSETIFF, IFF_TUN | IFF_NO_PI
    return fd


class Link:
    """Carries packets in a process of its own until it is killed."""

    def __init__(self, names, delay, loss, congestion):
        self.fds = [open_tun(name) for name in names]
        for name, address in zip(names, (SERVER, CLIENT)):
            sh(f"ip netns add {name} && ip link set {name} netns {name}")
            sh(f"ip -n {name} addr add {address}/24 dev {name} && ip -n {name} link set {name} up mtu 1500")
            sh(f"ip -n {name} link set lo up")
            sh(f"ip netns exec {name} sh -c 'echo {congestion} >/proc/sys/net/ipv4/tcp_congestion_control'")
        self.names = names
        self.pid = os.fork()
        if self.pid == 0:
            self.carry(delay, loss)

    def carry(self, delay, loss):
        drop = random.Random(1)
        waiting, count = [], 0
        while True:
            timeout = max(0, waiting[0][0] - time.monotonic()) if waiting else None
            ready, _, _ = select.select(self.fds, [], [], timeout)
            now = time.monotonic()
            for fd in ready:
                for _ in range(64):
                    try:
                        packet = os.read(fd, 65536)
                    except BlockingIOError:
                        break
                    if drop.random() < loss or len(waiting) > QUEUE_PACKETS:
                        continue
                    count += 1
                    heapq.heappush(waiting, (now + delay, count, self.fds[0] if fd == self.fds[1] else self.fds[1], packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, fd, packet = heapq.heappop(waiting)
                try:
                    os.write(fd, packet)
                except (BlockingIOError, OSError):
                    pass

    def close(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        for name in self.names:
            sh(f"ip netns del {name}")


def plain_tcp(names, size):
    """Seconds from connecting to the last byte."""
    listen = ("import socket,sys\n"
              f"s=socket.create_server(('{SERVER}',{PORT + 1}))\n"
              "print('ready',flush=True)\n"
              "c,_=s.accept()\n"
              f"c.sendall(bytes({size}))\n"
              "c.close()\n")
    receive = ("import socket,time\n"
               "b=time.monotonic()\n"
               f"s=socket.create_connection(('{SERVER}',{PORT + 1}))\n"
               "n=0\n"
               "while True:\n"
               "  d=s.recv(1<<20)\n"
               "  if not d: break\n"
               "  n+=len(d)\n"
               f"assert n=={size}\n"
               "print(time.monotonic()-b)\n")
    sender = subprocess.Popen(["ip", "netns", "exec", names[0], sys.executable, "-c", listen], stdout=subprocess.PIPE, text=True)
    sender.stdout.readline()
    taken = subprocess.run(["ip", "netns", "exec", names[1], sys.executable, "-c", receive], capture_output=True, text=True, check=True)
    sender.wait()
    return float(taken.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-ms", type=float, default=25, help="each way")
    parser.add_argument("--loss", type=float, default=0.01, help="part of the packets, each way")
    parser.add_argument("--mib", type=int, default=16)
    parser.add_argument("--congestion", default="reno", help="of TCP: reno, bbr, or cubic where the host allows it")
    parser.add_argument("--streams", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bin", default=BIN)
    arguments = parser.parse_args()
    names = [f"ms{os.getpid()}a", f"ms{os.getpid()}b"]
    tool = ["ip", "netns", "exec", names[1], os.path.join(arguments.bin, "modelstate"), "--json", "--server", f"{SERVER}:{PORT}",
            "--transport-profile", "wan"]
    link = Link(names, arguments.delay_ms / 1e3, arguments.loss, arguments.congestion)
    server = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            server = subprocess.Popen(
                ["ip", "netns", "exec", names[0], os.path.join(arguments.bin, "modelstate-server"), f"--listen={SERVER}:{PORT}",
                 "--device=cpu", "--log_level=off", "--transport_profile=wan", f"--checkpoint_root={folder}/root"],
                stdout=subprocess.PIPE, text=True)
            server.stdout.readline()
            spec = {"seed": 1, "tensors": [
                {"name": f"layer{i}.weight", "kind": "PARAMETER", "dtype": "F32", "shape": [256, 1024], "initializer": {"normal": {}}}
                for i in range(arguments.mib)]}
            with open(f"{folder}/spec.json", "w") as file:
                json.dump(spec, file)
            subprocess.run(tool + ["create", "big", "--spec", f"{folder}/spec.json"], check=True, stdout=subprocess.DEVNULL)
            size = arguments.mib << 20
            seconds = collections.defaultdict(list)
            for _ in range(arguments.rounds):
                seconds["plain TCP"].append(plain_tcp(names, size))
                for streams in arguments.streams.split(","):
                    begin = time.monotonic()
                    out = subprocess.run(tool + ["fetch", "big", f"{folder}/out", "--parallel", streams], check=True, capture_output=True)
                    seconds[f"fetch --parallel {streams}"].append(time.monotonic() - begin)
                    result = json.loads(out.stdout)
                    assert result["digests_verified"] == result["digests"] == arguments.mib, result
            print(f"{arguments.mib} MiB, {arguments.delay_ms:g} ms each way, {arguments.loss:.1%} of packets lost each way, "
                  f"{arguments.congestion}, {arguments.rounds} rounds, medians")
            print(f"{'':24}{'seconds':>9}{'slowest':>9}{'MB/s':>8}{'ratio':>8}")
            base = statistics.median(seconds["plain TCP"])
            for name, values in seconds.items():
                middle = statistics.median(values)
                print(f"{name:24}{middle:9.2f}{max(values):9.2f}{size / 1e6 / middle:8.2f}{base / middle:8.2f}")
        finally:
            if server is not None:
                server.kill()
                server.wait()
            link.close()


if __name__ == "__main__":
    main()
