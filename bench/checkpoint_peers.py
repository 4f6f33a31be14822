#!/usr/bin/env python3
"""How other programs load and save the files of load_bench and checkpoint_bench.

Reads commands from standard input, one per line, and answers each with one line when it is done:

    names load|save         what it can measure here, by what is installed
    load NAME PATH          reads PATH into memory that the tensors own, and drops them
    keep PATH               reads PATH and keeps it for saves
    save NAME PATH          writes what is kept to PATH, durable when it is answered

Needs torch and safetensors; fastsafetensors and runai-model-streamer where they are installed.
"""

import importlib.util
import os
import shutil
import sys

import safetensors.torch
import torch


def load_file(path):
    # Its tensors are pages of the file until they are copied.
    return [tensor.clone() for tensor in safetensors.torch.load_file(path).values()]


def load_fast(path):
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cpu"), nogds=True)
    loader.add_filenames({0: [path]})
    buffer = loader.copy_files_to_device()
    tensors = [buffer.get_tensor(name) for name in list(buffer.key_to_rank_lidx)]
    yield tensors
    buffer.close()
    loader.close()


def load_runai(path):
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(path)
        # Its tensors are borrowed from a ring of buffers.
        return [tensor.clone() for _, tensor in streamer.get_tensors()]


def load_torch(path):
    return list(torch.load(path, weights_only=True).values())


def sync(path):
    for name in (path, os.path.dirname(path)):
        fd = os.open(name, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def save_file(state, path):
    safetensors.torch.save_file(state, path)
    sync(path)


def save_torch(state, path):
    torch.save(state, path)
    sync(path)


def save_distributed(state, path):
    from torch.distributed import checkpoint

    shutil.rmtree(path, ignore_errors=True)
    writer = checkpoint.FileSystemWriter(path, sync_files=True, thread_count=2)
    checkpoint.save(state, storage_writer=writer, no_dist=True)
    sync(path)


LOADS = {
    "safetensors load_file and clone": (load_file, "safetensors"),
    "fastsafetensors": (load_fast, "fastsafetensors"),
    "Run:ai streamer and clone": (load_runai, "runai_model_streamer"),
    "torch.load": (load_torch, "torch"),
}
SAVES = {
    "safetensors save_file, fsync": save_file,
    "torch.save, fsync": save_torch,
    "torch.distributed.checkpoint": save_distributed,
}


def nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main():
    torch.set_num_threads(os.cpu_count())
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    kept = {}
    for line in sys.stdin:
        command, _, rest = line.rstrip("\n").partition("\t")
        if command == "names":
            names = LOADS if rest == "load" else SAVES
            here = [n for n in names if rest == "save" or importlib.util.find_spec(LOADS[n][1])]
            print("\t".join(here), file=answer, flush=True)
            continue
        if command == "keep":
            kept = {k: v.clone() for k, v in safetensors.torch.load_file(rest).items()}
            print("kept", file=answer, flush=True)
            continue
        name, _, path = rest.partition("\t")
        if command == "load":
            loaded = LOADS[name][0](path)
            # A generator gives the tensors while what they borrow from is still open.
            tensors = loaded if isinstance(loaded, list) else next(loaded)
            print(nbytes(tensors), file=answer, flush=True)
            del tensors
            if not isinstance(loaded, list):
                next(loaded, None)
        elif command == "save":
            SAVES[name](kept, path)
            print("saved", file=answer, flush=True)


if __name__ == "__main__":
    main()
