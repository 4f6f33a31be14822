#!/usr/bin/env python3
"""Prints what safetensors.torch.load_file reads from a file, as JSON: one object per tensor.

    python tests/data/check_with_torch.py CHECKPOINT

CHECKPOINT is a .safetensors file or a checkpoint directory that holds model.safetensors. Needs torch
and safetensors; the XXH3 of each tensor is printed too where xxhash is installed.
"""

import hashlib
import json
import os
import sys

import torch
from safetensors import safe_open
from safetensors.torch import load_file

try:
    import xxhash
except ImportError:
    xxhash = None


def raw(tensor):
    tensor = tensor.detach().contiguous().reshape(-1)
    if tensor.numel() == 0:
        return b""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor).reshape(-1)
    return tensor.view(torch.uint8).numpy().tobytes()


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    path = sys.argv[1]
    if os.path.isdir(path):
        path = os.path.join(path, "model.safetensors")
    tensors = []
    for name, tensor in sorted(load_file(path).items()):
        data = raw(tensor)
        row = {
            "name": name,
            "dtype": str(tensor.dtype).replace("torch.", ""),
            "shape": list(tensor.shape),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        if xxhash is not None:
            row["xxh3"] = xxhash.xxh3_64_hexdigest(data)
        tensors.append(row)
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata() or {}
    print(json.dumps({"torch": torch.__version__, "metadata": metadata, "tensors": tensors}, indent=1))


if __name__ == "__main__":
    main()
