#!/usr/bin/env python3
"""Writes load_torch_VERSION.json: what load_state_dict of the PyTorch that runs it does.

Needs torch. Run it once per PyTorch version, in an environment that has that version:

    python tests/data/make_load_goldens.py tests/data

Each case is a module (names, kinds, dtypes, shapes, elements), a state_dict and the options, and
either the error text or the two key lists and the elements after the load. Elements are the
little-endian bytes in hex. A case that this version has no option for (assign) is left out.
"""

import argparse
import inspect
import json
import os

import torch
from torch import nn

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
NAN, INF = float("nan"), float("inf")


def raw(tensor):
    tensor = tensor.detach().contiguous().reshape(-1)
    if tensor.dtype == torch.bool:
        tensor = tensor.to(torch.uint8)
    return bytes(tensor.view(torch.uint8).tolist()).hex() if tensor.numel() else ""


def row(name, tensor, **more):
    return dict(
        name=name, dtype=DTYPES[tensor.dtype], shape=list(tensor.shape), hex=raw(tensor), **more
    )


def tensors_of(module):
    """All tensors, non-persistent buffers too, in the order of a state_dict."""
    rows, first = [], {}
    for path, child in module.named_modules(remove_duplicate=False):
        prefix = path + "." if path else ""
        for name, parameter in child._parameters.items():
            rows.append(row(prefix + name, parameter, kind="PARAMETER",
                            requires_grad=parameter.requires_grad))
            owner = first.setdefault(id(parameter), prefix + name)
            if owner != prefix + name:
                rows[-1]["alias_of"] = owner
        for name, buffer in child._buffers.items():
            persistent = name not in child._non_persistent_buffers_set
            rows.append(row(prefix + name, buffer, kind="BUFFER", persistent=persistent))
    return rows


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.one = nn.Parameter(torch.tensor([1.5]))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("hidden", torch.tensor([7.0]), persistent=False)
        self.inner = nn.Linear(2, 1)
        self.bn = nn.BatchNorm1d(2)
        with torch.no_grad():
            self.inner.weight.copy_(torch.tensor([[0.5, -0.5]]))
            self.inner.bias.fill_(0.25)
            self.bn.num_batches_tracked.fill_(11)
        self.inner.weight.requires_grad_(False)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.head = nn.Module()
        self.head.weight = self.embed


class One(nn.Module):
    """One tensor: a parameter where its dtype allows it, else a buffer."""

    def __init__(self, value, requires_grad=True):
        super().__init__()
        if value.is_floating_point():
            self.t = nn.Parameter(value, requires_grad=requires_grad)
        else:
            self.register_buffer("t", value)


def net_state(**changes):
    state = dict(Net().state_dict())
    state = {name: value.clone() + 1 if value.dtype != torch.bool else ~value
             for name, value in state.items()}
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


def cases():
    f = torch.zeros
    yield "all_keys", Net(), net_state(), {}
    yield "missing", Net(), net_state(w=None, inner__bias=None), {}
    yield "missing_not_strict", Net(), net_state(w=None, inner__bias=None), {"strict": False}
    yield "unexpected", Net(), net_state(x=f(1), inner__y=f(1)), {}
    yield "unexpected_order", Net(), dict(
        {"bn.z": f(1), "inner.bias.q": f(1), "zz": f(1), "nowhere.w": f(1), "inner.a": f(1)},
        **net_state(),
    ), {}
    yield "unexpected_not_strict", Net(), net_state(x=f(1), inner__y=f(1)), {"strict": False}
    yield "hidden_is_unexpected", Net(), net_state(hidden=f(1)), {}
    yield "hidden_is_not_loaded", Net(), net_state(hidden=f(1)), {"strict": False}
    yield "everything_wrong", Net(), net_state(
        w=f(3, 2), inner__weight=f(2, 2), scale=None, bn__running_var=None, y=f(1), bn__x=f(1)
    ), {}
    yield "size_mismatch", Net(), net_state(w=f(2, 3, 1)), {}
    yield "size_mismatch_not_strict", Net(), net_state(w=f(1, 3), x=f(1)), {"strict": False}
    yield "size_mismatch_assign", Net(), net_state(w=f(6)), {"assign": True}
    yield "count_of_old_files", Net(), net_state(bn__num_batches_tracked=None), {}
    yield "scalar_from_one", Net(), net_state(scale=torch.tensor([8.0])), {}
    yield "scalar_from_longer", Net(), net_state(scale=torch.tensor([8.0, 9.0])), {}
    yield "scalar_from_none", Net(), net_state(scale=f(0)), {}
    yield "scalar_from_two_dimensions", Net(), net_state(scale=f(1, 1)), {}
    yield "one_from_scalar", Net(), net_state(one=torch.tensor(8.0)), {}
    yield "empty_state_dict", Net(), {}, {}
    yield "empty_state_dict_not_strict", Net(), {}, {"strict": False}
    yield "tied_both_names", Tied(), {
        "head.weight": torch.tensor([5.0, 6.0]), "embed": torch.tensor([3.0, 4.0])}, {}
    yield "assign_takes_dtypes", Net(), net_state(
        w=torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.bfloat16),
        inner__weight=torch.tensor([[1, 2]], dtype=torch.int64),
        mask=torch.tensor([3.0, 0.0]),
    ), {"assign": True}
    yield "assign_integers", Net(), net_state(w=f(2, 3, dtype=torch.int32), scale=None), {
        "assign": True}
    odd = {
        "F32": torch.tensor([1.0 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-8 + 2**-9, 2.75, -2.75, NAN, INF,
                             -INF, 1e30, -1e30, -1.0, 300.5, 65519.0, 65520.0, 1e-8, -0.0, 0.0,
                             6e-8, 3e38, 2**31, 2**63]),
        "F64": torch.tensor([1e300, 1e-300, 1 + 2**-30, 65519.99, NAN, 2.0**31, -(2.0**63)],
                            dtype=torch.float64),
        "I64": torch.tensor([2**53 + 1, -1, 256, 2**31, 16777217, -(2**63)], dtype=torch.int64),
        "F16": torch.tensor([65504.0, 0.5, NAN, -INF], dtype=torch.float16),
        "BF16": torch.tensor([1.0, 3e38, -2.5, NAN], dtype=torch.bfloat16),
        "U8": torch.tensor([0, 1, 255], dtype=torch.uint8),
        "BOOL": torch.tensor([True, False]),
    }
    for source, values in odd.items():
        for dtype, target in DTYPES.items():
            if target != source:
                yield f"copy_{source}_to_{target}", One(f(values.shape, dtype=dtype)), {
                    "t": values}, {}


def play(module, state, options):
    module.__class__.__name__ = "M"
    case = {"module": tensors_of(module), "state_dict": [row(n, t) for n, t in state.items()]}
    case.update(options)
    try:
        result = module.load_state_dict(state, **options)
    except (RuntimeError, IndexError) as error:
        case["error"] = str(error)
        return case
    case["missing"] = list(result.missing_keys)
    case["unexpected"] = list(result.unexpected_keys)
    case["after"] = tensors_of(module)
    return case


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    directory = parser.parse_args().directory
    has_assign = "assign" in inspect.signature(nn.Module.load_state_dict).parameters
    rows = []
    for name, module, state, options in cases():
        if "assign" in options and not has_assign:
            continue
        case = {"case": name, **play(module, state, options)}
        rows.append(json.dumps(case, separators=(",", ":")))
    version = torch.__version__.split("+")[0]
    path = os.path.join(directory, f"load_torch_{version}.json")
    with open(path, "w", encoding="utf-8") as out:
        out.write("[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    main()
