#!/usr/bin/env python3
"""Writes tests/data/sharded-safetensors/ and sharded-torch/ as the Hugging Face libraries shard checkpoints.

Needs torch, safetensors, xxhash and huggingface_hub:

    python tests/data/make_sharded_goldens.py

Each folder has an index, its shards and a sidecar INDEX.json: what must be read, tensor by tensor, in the order of
the index. Values are those of make_goldens.py.
"""

import json
import os
import shutil

import torch
from huggingface_hub import save_torch_state_dict

from make_goldens import convnet, describe, write_json


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    module = convnet()
    state = dict(module.state_dict())
    state["tied.weight"] = state["3.weight"]
    state["half"] = state["0.weight"].to(torch.bfloat16)
    state["none"] = torch.empty(0, 3)
    for folder, safe in (("sharded-safetensors", True), ("sharded-torch", False)):
        folder = os.path.join(here, folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        save_torch_state_dict(dict(state), folder, max_shard_size=300, safe_serialization=safe)
        index = next(name for name in os.listdir(folder) if name.endswith(".index.json"))
        with open(os.path.join(folder, index), encoding="utf-8") as file:
            content = json.load(file)
        names = list(content["weight_map"])
        for name, owner in content["metadata"].items():
            if owner in content["weight_map"]:
                names.append(name)
        rows = describe({name: state[name] for name in names})
        write_json(os.path.join(folder, index), {"tensors": rows})


if __name__ == "__main__":
    main()
