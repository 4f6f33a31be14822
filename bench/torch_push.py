#!/usr/bin/env python3
"""What people write by hand to push gradients to an AdamW step, beside step_bench's pushes, in turns.

    bench/torch_push.py [--bench build/release/bin/step_bench] [--elements 100000000]
        [--turns 7] [--rounds 5]

Two processes on loopback. One sends F32 gradients, the other receives them into the gradients of its
parameters, steps with torch.optim.AdamW(fused=True), and answers: by a plain socket (sendall,
recv_into), by torch.distributed with gloo, both as one flat gradient, by gloo as 300 tensors, and by a
gRPC stream of 1 MiB messages in Python. The stream has no protobuf in it, which could only add to it.
None of them computes a norm, looks for what is not finite, or knows a push again, as a server's does.

Times are from before the first byte to the answer. `ratio`: milliseconds of the row over those of our
push of as many tensors in the same turn; the median, lowest and highest of the turns. Above 1 ours is
ahead.

Sockets have the host's congestion control, where step_bench asks for reno. With another default (bbr
paces loopback too) compare in a network namespace, which has a default of its own:

    sudo unshare --net sh -c 'ip link set lo up && sysctl -qw net.ipv4.tcp_congestion_control=reno &&
        bench/torch_push.py'
"""
import argparse
import multiprocessing
import os
import pathlib
import socket
import statistics
import subprocess
import tempfile
import time
from concurrent import futures

import grpc
import torch
import torch.distributed

TENSORS = 300
MESSAGE_BYTES = 1 << 20
METHOD = "bench.Push", "Push"


def raw(tensor):
    return memoryview(tensor.numpy()).cast("B")


class Model:
    """Equal parameters, with gradients that were written before, as what receives into them finds them."""

    def __init__(self, elements, tensors):
        self.parameters = [torch.nn.Parameter(torch.zeros(elements // tensors)) for _ in range(tensors)]
        for parameter in self.parameters:
            parameter.grad = torch.ones_like(parameter)
        self.optimizer = torch.optim.AdamW(self.parameters, fused=True)

    def gradients(self):
        return [parameter.grad for parameter in self.parameters]

    def step(self):
        """Returns the last gradient's last element, by which the sender knows that all has arrived."""
        self.optimizer.step()
        return torch.stack([self.parameters[-1].grad[-1]])


def receive(elements, port, store):
    """The other process: does what the row that it is told says, until the connection closes."""
    connection = socket.create_connection(("127.0.0.1", port))
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(store, 2), rank=1, world_size=2)
    one, many = Model(elements, 1), Model(elements, TENSORS)

    def by_socket():
        left = raw(one.gradients()[0])
        while left:
            left = left[connection.recv_into(left):]
        connection.sendall(raw(one.step()))

    def by_gloo(model):
        for work in [torch.distributed.irecv(gradient, src=0) for gradient in model.gradients()]:
            work.wait()
        torch.distributed.send(model.step(), dst=0)

    def by_stream(messages, context):
        gradient, offset = raw(one.gradients()[0]), 0
        for message in messages:
            gradient[offset:offset + len(message)] = message
            offset += len(message)
        return bytes(raw(one.step()))

    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    handler = grpc.stream_unary_rpc_method_handler(by_stream)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(METHOD[0], {METHOD[1]: handler})])
    connection.sendall(server.add_insecure_port("127.0.0.1:0").to_bytes(2, "big"))
    server.start()
    rows = {b"s": by_socket, b"1": lambda: by_gloo(one), b"n": lambda: by_gloo(many)}
    while command := connection.recv(1):
        rows[command]()
    server.stop(None)


class Sender:
    def __init__(self, elements):
        self.elements = elements
        self.gradient = torch.full((elements,), 1e-3)
        self.answer = torch.zeros(1)
        self.folder = tempfile.TemporaryDirectory()
        store = os.path.join(self.folder.name, "store")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.receiver = multiprocessing.get_context("spawn").Process(
                target=receive, args=(elements, listener.getsockname()[1], store))
            self.receiver.start()
            self.connection = listener.accept()[0]
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(store, 2), rank=0, world_size=2)
        port = int.from_bytes(self.connection.recv(2, socket.MSG_WAITALL), "big")
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.stream = self.channel.stream_unary("/" + "/".join(METHOD))
        self.pushes = 0

    def by_socket(self):
        self.connection.sendall(b"s")
        self.connection.sendall(raw(self.gradient))
        self.connection.recv_into(raw(self.answer), 4, socket.MSG_WAITALL)

    def by_gloo(self, command, tensors):
        self.connection.sendall(command)
        each = self.elements // tensors
        gradients = self.gradient[:each * tensors].split(each)
        for work in [torch.distributed.isend(gradient, dst=1) for gradient in gradients]:
            work.wait()
        torch.distributed.recv(self.answer, src=1)

    def by_stream(self):
        data = raw(self.gradient)
        # bytes, as grpc takes nothing else.
        answer = self.stream(bytes(data[i:i + MESSAGE_BYTES]) for i in range(0, len(data), MESSAGE_BYTES))
        raw(self.answer)[:] = answer

    def milliseconds(self, row):
        self.pushes += 1
        # Of both, the last element of all and of 300 equal tensors.
        self.gradient[self.elements // TENSORS * TENSORS - 1:] = self.pushes
        begin = time.perf_counter()
        row()
        milliseconds = 1e3 * (time.perf_counter() - begin)
        if self.answer.item() != self.pushes:
            raise RuntimeError(f"push {self.pushes} did not arrive whole")
        return milliseconds

    def close(self):
        self.channel.close()
        self.connection.close()
        self.receiver.join()
        self.folder.cleanup()


def ours(arguments):
    """{row: milliseconds} of the pushes of a run of step_bench."""
    out = subprocess.run(
        [arguments.bench, "--sections=push", f"--rounds={arguments.rounds}", f"--mb={arguments.elements * 4 // 1000000}"],
        check=True, capture_output=True, text=True).stdout
    rows = {}
    for line in out.splitlines():
        fields = line.rsplit(maxsplit=4)
        if len(fields) == 5 and fields[1].replace(".", "", 1).isdigit():
            rows[fields[0]] = float(fields[1])
    return rows


def main():
    here = pathlib.Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", default=here.parent / "build/release/bin/step_bench")
    parser.add_argument("--elements", type=int, default=100_000_000)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5, help="of each row in a turn")
    arguments = parser.parse_args()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    sender = Sender(arguments.elements)
    rows = {"socket, fused": sender.by_socket,
            "gloo, fused": lambda: sender.by_gloo(b"1", 1),
            f"gloo, {TENSORS} tensors, fused": lambda: sender.by_gloo(b"n", TENSORS),
            "Python gRPC stream, fused": sender.by_stream}
    for row in rows.values():
        for _ in range(2):  # to warm up memory and connections
            sender.milliseconds(row)
    turns = []
    for _ in range(arguments.turns):
        times = {name: [] for name in rows}
        for _ in range(arguments.rounds):
            for name, row in rows.items():
                times[name].append(sender.milliseconds(row))
        turns.append({name: statistics.median(values) for name, values in times.items()} | ours(arguments))
    sender.close()
    print(f"torch {torch.__version__}, {arguments.elements} gradients, {torch.get_num_threads()} threads, "
          f"{arguments.turns} turns of {arguments.rounds} rounds")
    print(f"{'':<34} {'ms':>8} {'ratio':>8} {'lowest':>8} {'highest':>8}")
    for name in turns[0]:
        base = f"push of {TENSORS} tensors" if str(TENSORS) in name else "push of 1 tensor"
        ratios = [turn[name] / turn[base] for turn in turns]
        print(f"{name:<34} {statistics.median(turn[name] for turn in turns):>8.1f} "
              f"{statistics.median(ratios):>8.2f} {min(ratios):>8.2f} {max(ratios):>8.2f}")


if __name__ == "__main__":
    main()
