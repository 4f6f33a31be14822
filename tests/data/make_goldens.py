#!/usr/bin/env python3
"""Writes the small checkpoints of tests/data/torch-VERSION/ with the PyTorch that runs it.

Needs torch, numpy, safetensors and xxhash. Run it once per PyTorch version, in an environment that
has that version:

    python tests/data/make_goldens.py

Each checkpoint NAME has a sidecar NAME.json: what this PyTorch reads from it, tensor by tensor
(name, dtype as safetensors calls it, shape, XXH3 of the contiguous little-endian bytes), or the
error that the project's reader must give. Values are computed, never random, so that the files of
two versions hold the same bits. With --describe FILE it prints the sidecar of a torch file.
"""

import argparse
import collections
import json
import os
import pathlib
import sys
import tempfile

import numpy
import torch
import xxhash
from safetensors.torch import load_file, save_file, save_model

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
}


def have(name):
    return hasattr(torch, DTYPES[name])


def raw(tensor):
    """The contiguous little-endian bytes, with conj and neg bits applied."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    tensor = tensor.clone(memory_format=torch.contiguous_format).reshape(-1)
    if tensor.numel() == 0:
        return b""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor).reshape(-1)
    return tensor.view(torch.uint8).numpy().tobytes()


def describe(state_dict, kinds=True):
    names = {str(getattr(torch, t)): n for n, t in DTYPES.items() if hasattr(torch, t)}
    first, rows = {}, []
    for name, tensor in state_dict.items():
        data = raw(tensor)
        row = {
            "name": name,
            "dtype": names[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "xxh3": xxhash.xxh3_64_hexdigest(data),
        }
        if len(data) <= 16:
            row["hex"] = data.hex()
        if kinds and isinstance(tensor, torch.nn.Parameter):
            row["requires_grad"] = tensor.requires_grad
        strides = [s if n > 1 else 0 for s, n in zip(tensor.stride(), tensor.shape)]
        view = (tensor.data_ptr(), str(tensor.dtype), tuple(tensor.shape), tuple(strides))
        view += (tensor.is_conj(), tensor.is_neg())
        if kinds and data:
            owner = first.setdefault(view, name)
            if owner != name:
                row["alias_of"] = owner
        rows.append(row)
    return rows


def numbers(count, dtype=torch.float32, scale=0.37):
    """Distinct values that every dtype represents somehow, the same in every version."""
    values = torch.arange(count, dtype=torch.float64)
    if dtype == torch.bool:
        return values.to(torch.int64) % 3 == 0
    if dtype.is_complex:
        return torch.complex((values * 0.5).float(), (1 - values).float())
    if not dtype.is_floating_point:
        # Signed 64 bits first: some versions convert to unsigned types only from there.
        return (values.to(torch.int64) * 7 % 120).to(dtype)
    return (values * scale - 1.5).to(dtype)


def fill(module):
    with torch.no_grad():
        for i, tensor in enumerate(module.state_dict().values()):
            tensor.copy_(numbers(tensor.numel(), tensor.dtype, 0.11 + i).reshape(tensor.shape))
    return module


def convnet():
    return fill(
        torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3),
            torch.nn.BatchNorm2d(4),
            torch.nn.Flatten(),
            torch.nn.Linear(16, 5),
        )
    )


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(6, 4)
        self.head = torch.nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight


def trained():
    model = convnet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss = model(numbers(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)).square().sum()
    loss.backward()
    optimizer.step()
    # Rounding of a backward pass differs between versions: the values are filled in again.
    return fill(model), optimizer


def views():
    base = numbers(120)
    image = numbers(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    flat = numbers(30)
    return {
        "whole": base,
        "slice": base[7:20],
        "transposed": base.reshape(10, 12).t(),
        "column": base.reshape(10, 12)[:, 3],
        "steps": base.reshape(10, 12)[1::3, ::4],
        "permuted": image.permute(3, 0, 2, 1),
        "channels_last": image.contiguous(memory_format=torch.channels_last),
        "expanded": torch.tensor([2.5]).expand(64, 64),
        "expanded_rows": numbers(3).reshape(3, 1).expand(3, 4),
        "flat.weight": flat[:24].view(4, 6),
        "flat.bias": flat[24:],
        "windows": flat.unfold(0, 4, 2),
        "ones": flat[5:6].reshape(1, 1, 1),
    }


def attributes():
    plain = numbers(5)
    plain.note = "kept by pickle, of no meaning here"
    return {"plain": plain, "parameter": torch.nn.Parameter(numbers(3))}


def conj_neg():
    z = numbers(6, torch.complex64)
    return {
        "z": z,
        "conj": z.conj(),
        "neg": torch._neg_view(numbers(4)),
        # A storage of its own: torch.save refuses one storage under two dtypes.
        "imag_of_conj": numbers(3, torch.complex64).conj().imag,
        "conj_neg": torch._neg_view(z.conj()),
        "conj_strided": z.reshape(2, 3).conj().t(),
    }


def torch_cases():
    """NAME -> (object, state_dict_key, keyword arguments of torch.save)."""
    model, optimizer = trained()
    entries = {**dict(convnet().named_parameters()), **dict(convnet().named_buffers())}
    entries["0.bias"].requires_grad_(False)
    cases = {
        "dtypes": {n: numbers(11, getattr(torch, t)) for n, t in DTYPES.items() if have(n)},
        "batchnorm": convnet().state_dict(),
        "parameters": entries,
        "tied": Tied().apply(fill).state_dict(),
        "views": views(),
        "scalars": {
            "scalar": torch.tensor(2.25),
            "count": torch.tensor(12, dtype=torch.int64),
            "flag": torch.tensor(True),
            "empty": torch.empty(0),
            "empty.rows": torch.empty(3, 0, 2, dtype=torch.int32),
        },
        "attributes": attributes(),
        "no_tensors": {},
        "unicode": {"слой.вес": numbers(4), "a b/c\"d": numbers(2)},
    }
    if torch.__version__ >= "2":  # 1.13 saves such views without their flags, so it loses them
        cases["conj_neg"] = conj_neg()
    cases.update(without_count())
    cases = {name: (value, "", {}) for name, value in cases.items()}
    cases["protocol3"] = (convnet().state_dict(), "", {"pickle_protocol": 3})
    training = {
        "epoch": 3,
        "best_loss": torch.tensor(0.25),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": {"lr": 0.01, "betas": (0.9, 0.999), "name": "run", "seed": 2**80, "tags": {"a"}},
    }
    cases["training"] = (training, "", {})
    for name in ("batchnorm", "dtypes", "tied", "views", "scalars", "training"):
        value = cases[name][0]
        if name == "dtypes":  # the others PyTorch writes, but does not read back
            value = {n: t for n, t in value.items() if n[:2] != "F8" and n not in ("U16", "U32", "U64")}
        cases["legacy_" + name] = (value, "", {"_use_new_zipfile_serialization": False})
    history = collections.defaultdict(list)
    history["loss"] += [1.5, 0.75]
    script = {
        "model": model.state_dict(),
        "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("runs/1"), tags=["a"]),
        "history": history,
        "best": numpy.float64(0.5),
        "losses": numpy.arange(3),
        "sampler": numpy.random.RandomState(7).get_state(),
    }
    cases["script"] = (script, "", {})
    cases["script_legacy"] = (script, "", {"_use_new_zipfile_serialization": False})
    nested = {"model": {}, "ema": {"state_dict": model.state_dict(), "decay": 0.999}}
    cases["nested"] = (nested, "ema.state_dict", {})
    return cases


def without_count():
    """The same module as "batchnorm", without its count, as old and as new files have it."""
    found = {}
    for version in (1, 2):
        state = convnet().state_dict()
        del state["1.num_batches_tracked"]
        state._metadata["1"]["version"] = version
        found[f"no_count_version{version}"] = state
    found["no_count_plain"] = dict(state)
    return found


def refused_cases():
    model = torch.nn.Linear(2, 2)
    return {
        "refused_module": (model, "torch.nn.modules.linear.Linear", {}),
        "refused_legacy_module": (
            model,
            "torch.nn.modules.linear.Linear",
            {"_use_new_zipfile_serialization": False},
        ),
        "refused_complex128": ({"z": torch.zeros(2, dtype=torch.complex128)}, "complex128", {}),
        "refused_protocol4": (model.state_dict(), "protocol 4", {"pickle_protocol": 4}),
        "refused_optimizer": (trained()[1].state_dict(), "optim import", {}),
        "refused_list": ([torch.zeros(2)], "a list", {}),
        "refused_extra": ({"w": torch.zeros(2), "epoch": 3}, '"epoch"', {}),
    }


def hide_place_of_torch(path):
    """A pickled module of the old format says where its source was; another place of the same length says no less."""
    with open(path, "rb") as file:
        data = file.read()
    here = sys.prefix.encode()
    with open(path, "wb") as file:
        file.write(data.replace(here, b"/usr/local".ljust(len(here), b"_")[: len(here)]))


def load(path):
    try:
        return torch.load(path, weights_only=False)
    except TypeError:  # older versions have no such argument
        return torch.load(path)


def write_json(path, value):
    tensors = value.pop("tensors", None)
    text = json.dumps(value, ensure_ascii=False)
    if tensors is not None:
        rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in tensors)
        comma = ", " if value else ""
        text = text[:-1] + comma + '"tensors": [\n' + rows + "\n]}"
    with open(path + ".json", "w", encoding="utf-8") as out:
        out.write(text + "\n")


def sidecar(path, key):
    found = load(path)
    for part in key.split(".") if key else []:
        found = found[part]
    if not key and "model" in found and isinstance(found["model"], dict):
        found = found["model"]
    value = {"torch": torch.__version__.split("+")[0]}
    if key:
        value["state_dict_key"] = key
    value["tensors"] = describe(found)
    return value


def write_torch(folder, only=""):
    for name, (value, key, arguments) in torch_cases().items():
        if not name.startswith(only):
            continue
        path = os.path.join(folder, name + ".pt")
        if name == "unicode":  # the root folder in the archive is the file's stem
            with tempfile.TemporaryDirectory(dir=folder) as inner:
                odd = os.path.join(inner, "modèle v1.2.pt")
                torch.save(value, odd, **arguments)
                os.rename(odd, path)
        else:
            torch.save(value, path, **arguments)
        write_json(path, sidecar(path, key))
    for name, (value, text, arguments) in refused_cases().items():
        if not name.startswith(only):
            continue
        path = os.path.join(folder, name + ".pt")
        torch.save(value, path, **arguments)
        hide_place_of_torch(path)
        write_json(path, {"error": "CHECKPOINT_UNSUPPORTED", "contains": text})
    if only:
        return
    path = os.path.join(folder, "refused_torchscript.pt")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    write_json(path, {"error": "CHECKPOINT_UNSUPPORTED", "contains": "TorchScript"})
    if hasattr(torch.serialization, "set_crc32_options"):
        torch.serialization.set_crc32_options(False)
        path = os.path.join(folder, "no_crc.pt")
        torch.save(convnet().state_dict(), path)
        write_json(path, sidecar(path, ""))
        torch.serialization.set_crc32_options(True)
    try:
        from torch.utils.serialization import config
    except ImportError:
        return
    if hasattr(config.save, "storage_alignment"):
        with config.patch({"save.storage_alignment": 4096}):
            path = os.path.join(folder, "aligned.pt")
            torch.save({"a": numbers(3), "b": numbers(5), "empty": torch.empty(0)}, path)
            write_json(path, sidecar(path, ""))


def write_safetensors(folder):
    cases = {
        "dtypes": ({n: numbers(11, getattr(torch, t)) for n, t in DTYPES.items() if have(n)}, None),
        "batchnorm": (convnet().state_dict(), {"format": "pt"}),
        "scalars": (
            {"scalar": torch.tensor(2.25), "empty": torch.empty(3, 0), "flag": torch.tensor(True)},
            {"note": "free text, also \"quoted\" and слово"},
        ),
        "no_tensors": ({}, None),
    }
    for name, (value, metadata) in cases.items():
        path = os.path.join(folder, name + ".safetensors")
        save_file(value, path, metadata=metadata)
        rows = describe(load_file(path), kinds=False)
        write_json(path, {"metadata": metadata or {}, "tensors": rows})
    path = os.path.join(folder, "tied.safetensors")
    model = Tied().apply(fill)
    save_model(model, path)
    stored = load_file(path)
    owner = next(iter(stored))
    rows = describe(stored, kinds=False)
    for name in model.state_dict():
        if name not in stored:
            alias = dict(rows[0], name=name, alias_of=owner)
            rows.append(alias)
    write_json(path, {"tensors": rows})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--describe", metavar="FILE", help="write FILE.json and stop")
    parser.add_argument("--only", metavar="PREFIX", default="", help="write these, no others")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.describe:
        path = arguments.describe
        if path.endswith(".safetensors"):
            write_json(path, {"tensors": describe(load_file(path), kinds=False)})
        else:
            write_json(path, sidecar(path, ""))
        return
    version = torch.__version__.split("+")[0]
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "torch-" + version)
    os.makedirs(folder, exist_ok=True)
    write_torch(folder, arguments.only)
    if not arguments.only:
        write_safetensors(folder)
    print("wrote", folder, file=sys.stderr)


if __name__ == "__main__":
    main()
