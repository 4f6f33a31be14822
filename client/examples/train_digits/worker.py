"""One worker: fetches the weights, computes the gradients of its shard, pushes them; prints its loss at each step.

Usage: worker.py ADDRESS MODULE INDEX WORKERS STEPS
"""

import sys

import torch

import remote
import task


def main():
    address, module = sys.argv[1:3]
    index, workers, steps = map(int, sys.argv[3:])
    torch.set_num_threads(1)
    stub, net, data = remote.connect(address), task.new_net(), task.Data()
    while True:
        version, step = remote.fetch(stub, module, net)
        if step >= steps:
            return
        loss = task.loss_and_gradients(net, *data.shard(step, index, workers))
        # The step is the sequence: a worker that is started again goes on where the module is.
        result = remote.push(stub, module, net, "worker-%d" % index, step + 1, version)
        if result.step != step + 1:
            raise RuntimeError("step %d was answered as %d" % (step + 1, result.step))
        print(step, repr(loss), flush=True)


if __name__ == "__main__":
    main()
