"""The coordinator: puts a CNN on a server, starts worker processes, and compares with the same training in local torch.

Usage: train.py [--server ADDRESS | --bin FOLDER] [--workers K] [--epochs N] [--optimizer sgd|adamw] [--every N]
Prints both loss curves side by side, every N steps. Exit 0 when they agree: each of the first 50 losses to a relative
1e-5, the BatchNorm statistics at the end to 1e-4, and the accuracy on the test images exactly.
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile

import torch

import remote
import task
from remote import step_pb2

HERE = os.path.dirname(os.path.abspath(__file__))
LOSS_BOUND = 1e-5
COMPARED_STEPS = 50
BUFFER_BOUND = 1e-4


def hyperparameters(optimizer):
    if optimizer == "sgd":
        return step_pb2.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
    return step_pb2.ADAMW, {"lr": 3e-3, "weight_decay": 1e-2}


def train_remote(address, args, steps):
    """Returns the loss of each step (the mean of the workers' shards) and the trained net."""
    stub, module, net = remote.connect(address), "digits", task.new_net()
    remote.register(stub, module, net)
    algorithm, options = hyperparameters(args.optimizer)
    stub.ConfigureOptimizer(step_pb2.ConfigureOptimizerRequest(module=module, optimizer=step_pb2.OptimizerConfig(
        algorithm=algorithm, hyperparameters=step_pb2.Hyperparameters(**options),
        rounds=step_pb2.Rounds(quorum=args.workers))))
    processes = [subprocess.Popen([sys.executable, os.path.join(HERE, "worker.py"), address, module, str(index),
                                   str(args.workers), str(steps)], stdout=subprocess.PIPE, text=True)
                 for index in range(args.workers)]
    try:
        losses = [[float(line.split()[1]) for line in process.stdout] for process in processes]
        if any([process.wait() for process in processes]):
            raise RuntimeError("a worker failed")
    finally:
        for process in processes:
            process.kill()
    _, step = remote.fetch(stub, module, net)
    if step != steps or any(len(of_worker) != steps for of_worker in losses):
        raise RuntimeError("%d steps were taken, not %d" % (step, steps))
    return [sum(shards) / args.workers for shards in zip(*losses)], net


def train_local(args, steps, data):
    """What the workers and the server do together, in this process with torch.optim: each shard on its own copy of the
    model (BatchNorm sees the shard only), the mean of the gradients, and the first shard's running statistics."""
    net = task.new_net()
    _, options = hyperparameters(args.optimizer)
    rule = torch.optim.SGD if args.optimizer == "sgd" else torch.optim.AdamW
    optimizer = rule(net.parameters(), foreach=False, **options)
    losses = []
    for step in range(steps):
        replicas = [copy.deepcopy(net) for _ in range(args.workers)]
        losses.append(sum(task.loss_and_gradients(replica, *data.shard(step, index, args.workers))
                          for index, replica in enumerate(replicas)) / args.workers)
        for parameter, *of_replicas in zip(net.parameters(), *(replica.parameters() for replica in replicas)):
            parameter.grad = sum(p.grad for p in of_replicas) / args.workers
        optimizer.step()
        with torch.no_grad():
            for buffer, first in zip(net.buffers(), replicas[0].buffers()):
                buffer.copy_(first)
    return losses, net


def compare(args, data, remote_run, local_run):
    worst = 0.0
    print("step  server and workers  local torch  relative difference")
    for step, (ours, torchs) in enumerate(zip(remote_run[0], local_run[0])):
        difference = abs(ours - torchs) / abs(torchs)
        if step < COMPARED_STEPS:
            worst = max(worst, difference)
        if step % args.every == 0 or step + 1 == len(local_run[0]):
            print("%4d  %18.8f  %11.8f  %.1e" % (step, ours, torchs, difference))
    accuracies = [data.accuracy(net) for net in (remote_run[1], local_run[1])]
    print("accuracy on %d test images: %d right, local torch %d" % (accuracies[0][1], accuracies[0][0], accuracies[1][0]))
    compared = min(COMPARED_STEPS, len(local_run[0]))
    print("largest relative difference of the first %d losses: %.1e (bound %.0e)" % (compared, worst, LOSS_BOUND))
    buffers = max(((ours.double() - torchs.double()).abs().max() / torchs.double().abs().max()).item()
                  for ours, torchs in zip(remote_run[1].buffers(), local_run[1].buffers()))
    print("largest relative difference of a BatchNorm buffer: %.1e (bound %.0e)" % (buffers, BUFFER_BOUND))
    return worst <= LOSS_BOUND and buffers <= BUFFER_BOUND and accuracies[0] == accuracies[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", help="HOST:PORT; without it one is started")
    parser.add_argument("--bin", default=os.path.join(HERE, "..", "..", "..", "build", "release", "bin"))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--every", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as the workers: the order of torch's sums depends on it
    data = task.Data()
    steps = args.epochs * data.steps_per_epoch()
    print("%d workers, %s, %d steps (%d epochs)" % (args.workers, args.optimizer, steps, args.epochs))

    server, address = None, args.server
    with tempfile.TemporaryDirectory() as root:
        if not address:
            server = subprocess.Popen([os.path.join(args.bin, "modelstate-server"), "--listen=127.0.0.1:0",
                                       "--checkpoint_root=" + root], stdout=subprocess.PIPE,
                                      stderr=subprocess.DEVNULL, text=True)
            address = server.stdout.readline().split()[-1]
        try:
            remote_run = train_remote(address, args, steps)
        finally:
            if server:
                server.terminate()
                server.wait()
    agree = compare(args, data, remote_run, train_local(args, steps, data))
    print("the curves agree" if agree else "THE CURVES DIFFER")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
