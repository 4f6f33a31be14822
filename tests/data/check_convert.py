#!/usr/bin/env python3
"""Checks with real PyTorch that others read what `modelstate convert` writes.

Usage: check_convert.py BIN_DIRECTORY [FILE.pth ...]
BIN_DIRECTORY holds modelstate. Needs torch and safetensors (any version from 1.13), and for the sharded loader
transformers, without which that part says skipped. Not part of the test suite. Converts files of torch.save, also
the goldens of this folder of the same version, to .pt, .safetensors and shards, and those back to .pt. Prints a line
for each; exit 0 when each is equal to what torch loads from the input: names, order in .pt files, dtypes, shapes,
bits, ties, `_metadata`.
"""

import collections
import os
import subprocess
import sys
import tempfile

import torch
from safetensors import safe_open
from safetensors.torch import load_file

DIFFERENT = 0


def same(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1) for t in (a, b))
    if a.is_complex():
        a, b = torch.view_as_real(a).reshape(-1), torch.view_as_real(b).reshape(-1)
    return a.numel() == 0 or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def report(what, equal):
    global DIFFERENT
    DIFFERENT += not equal
    print(torch.__version__, what, "equal" if equal else "DIFFERENT", flush=True)


def convert(binaries, *arguments):
    subprocess.run([os.path.join(binaries, "modelstate"), "convert", *arguments], check=True, stdout=subprocess.DEVNULL)


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def ties(state):
    """Groups of names that are one view of one storage."""
    groups = collections.defaultdict(list)
    for name, t in state.items():
        if t.numel():
            groups[(t.data_ptr(), t.shape, t.stride(), t.dtype, t.is_conj(), t.is_neg())].append(name)
    return sorted(sorted(g) for g in groups.values() if len(g) > 1)


def equal_states(found, expected):
    return set(found) == set(expected) and all(same(found[k], expected[k]) for k in expected)


def load_shards(folder):
    found = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            part = load_file(os.path.join(folder, name))
            assert not set(part) & set(found)
            found.update(part)
            with safe_open(os.path.join(folder, name), framework="pt") as opened:
                for alias, owner in opened.metadata().items():
                    if owner in part and alias != "format":
                        found[alias] = part[owner]
    return found


def check(binaries, path, work):
    expected = torch.load(path, map_location="cpu", weights_only=False)  # of ours; 1.13 needs it
    if isinstance(expected.get("model"), dict):
        expected = expected["model"]
    name = os.path.basename(path)
    out = os.path.join(work, name)
    convert(binaries, path, out + ".pt")
    found = load(out + ".pt")
    metadata = getattr(expected, "_metadata", {})
    metadata_equal = all(getattr(found, "_metadata", {}).get(k) == v for k, v in metadata.items())
    # What legacy files tie by shared storages torch keeps as it is; the same views must be tied.
    equal = list(found) == list(expected) and equal_states(found, expected) and metadata_equal
    report(name + " .pt", equal and ties(found) == ties(expected))
    shards = out + ".shards"
    convert(binaries, path, shards, "--max-shard-size", "600")
    report(name + " shards", equal_states(load_shards(shards), expected))
    convert(binaries, path, out + ".safetensors")
    found = load_file(out + ".safetensors")
    report(name + " .safetensors", set(found) <= set(expected) and all(same(found[k], expected[k]) for k in found))
    convert(binaries, shards, out + ".again.pt")
    report(name + " shards to .pt", equal_states(load(out + ".again.pt"), expected))


def check_transformers(binaries, work):
    try:
        from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM
    except ImportError:
        print("transformers' sharded loader: skipped, no transformers")
        return
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertForMaskedLM(config)
    path = os.path.join(work, "bert.pth")
    torch.save(model.state_dict(), path)
    folder = os.path.join(work, "bert")
    convert(binaries, path, folder, "--max-shard-size", "8KB")
    assert os.path.exists(os.path.join(folder, "model.safetensors.index.json"))
    config.save_pretrained(folder)
    read = AutoModelForMaskedLM.from_pretrained(folder)
    report(f"transformers from_pretrained, {len(os.listdir(folder)) - 2} shards",
           equal_states(read.state_dict(), model.state_dict()))


def main():
    binaries, files = sys.argv[1], sys.argv[2:]
    here = os.path.dirname(os.path.abspath(__file__))
    goldens = os.path.join(here, "torch-" + torch.__version__.split("+")[0])
    for name in ("batchnorm", "dtypes", "parameters", "tied", "views", "scalars", "training", "conj_neg", "unicode",
                 "legacy_views", "legacy_tied"):
        if os.path.exists(os.path.join(goldens, name + ".pt")):
            files.append(os.path.join(goldens, name + ".pt"))
    with tempfile.TemporaryDirectory() as work:
        for path in files:
            check(binaries, path, work)
        check_transformers(binaries, work)
    return 1 if DIFFERENT else 0


if __name__ == "__main__":
    sys.exit(main())
