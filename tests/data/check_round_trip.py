"""Checks with real PyTorch that a model survives the server: torch.save -> load -> save and fetch -> load_file.

Usage: check_round_trip.py BIN_DIRECTORY [FILE.pth ...]
BIN_DIRECTORY holds modelstate-server and modelstate. Needs torch and safetensors (any version from 1.13); not part
of the test suite, whose goldens come from torch without needing it. Prints a line per file that the server wrote;
exit 0 when each is equal to what torch loads, tensor by tensor, in names, dtypes, shapes and bits.
"""

import os
import shutil
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file


def models():
    torch.manual_seed(0)
    yield "batch_norm", torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).state_dict()
    tied = torch.nn.ModuleList([torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False)])
    tied[1].weight = tied[0].weight
    yield "transposed", {"w": torch.randn(5, 3).t(), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    yield "half", {k: v.to(torch.bfloat16) for k, v in torch.nn.Linear(7, 3).state_dict().items()}
    yield "tied", tied.state_dict()


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().view(-1).view(torch.uint8) if a.numel() else a.view(-1),
        b.contiguous().view(-1).view(torch.uint8) if b.numel() else b.view(-1))


def main():
    binaries, files = sys.argv[1], sys.argv[2:]
    work = tempfile.mkdtemp()
    root = os.path.join(work, "root")
    os.mkdir(root)
    for name, state in models():
        torch.save(state, os.path.join(root, name + ".pth"))
    for path in files:
        shutil.copy(path, root)
    names = sorted(os.listdir(root))
    server = subprocess.Popen(
        [os.path.join(binaries, "modelstate-server"), "--listen=127.0.0.1:0", "--checkpoint_root=" + root],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    different = 0
    try:
        target = server.stdout.readline().split()[-1]

        def run(*command):
            subprocess.run([os.path.join(binaries, "modelstate"), "--server", target, *command], check=True,
                           stdout=subprocess.DEVNULL)

        for name in names:
            stem = name.rsplit(".", 1)[0]
            fetched = os.path.join(work, stem + ".safetensors")
            run("load", stem, name)
            run("save", stem, "saved-" + stem)
            run("fetch", stem, fetched)
            expected = torch.load(os.path.join(root, name), map_location="cpu")
            for path in (os.path.join(root, "saved-" + stem, "model.safetensors"), fetched):
                found = load_file(path)
                # Of tied tensors safetensors keeps one name.
                keys = set(expected) if stem != "tied" else set(found)
                equal = set(found) == keys and bool(found) and all(same(expected[k], found[k]) for k in found)
                different += not equal
                print(torch.__version__, os.path.relpath(path, work), len(found), "equal" if equal else "DIFFERENT")
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(work)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
