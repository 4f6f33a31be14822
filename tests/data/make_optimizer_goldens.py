#!/usr/bin/env python3
"""Writes what torch.optim does in 50 steps, for tests/server/optim/optimizer_golden_test.cc.

Usage: make_optimizer_goldens.py OUTPUT_DIRECTORY
One JSON file per run: optimizer_torch_VERSION.json. The oracle is torch with foreach=False (and
fused=False where it exists). Run once with each torch version that the test knows.

Inputs are not stored: both sides draw them from the same integer generator (splitmix64), as
multiples of 2^-12 in [-2, 2), exact in every dtype wide enough. Of the outputs, the parameters and
the state after step 1, 10 and 50 are stored as hexadecimal bytes (little-endian).
"""

import json
import pathlib
import sys

import torch

STEPS = 50
KEPT = (1, 10, 50)
SIZES = (37, 16, 1)  # elements of the three parameters
MASK = (1 << 64) - 1

SGD = "sgd"
ADAMW = "adamw"
CONFIGURATIONS = [
    ("sgd_plain", SGD, dict(lr=0.1), "float32"),
    ("sgd_momentum", SGD, dict(lr=0.05, momentum=0.9), "float32"),
    ("sgd_dampening", SGD, dict(lr=0.05, momentum=0.9, dampening=0.3), "float32"),
    ("sgd_nesterov", SGD, dict(lr=0.05, momentum=0.9, nesterov=True), "float32"),
    ("sgd_weight_decay", SGD, dict(lr=0.1, weight_decay=0.01), "float32"),
    ("sgd_maximize", SGD, dict(lr=0.1, maximize=True), "float32"),
    ("sgd_all", SGD,
     dict(lr=0.03, momentum=0.8, nesterov=True, weight_decay=0.02, maximize=True), "float32"),
    ("sgd_dampening_decay", SGD,
     dict(lr=0.03, momentum=0.8, dampening=0.1, weight_decay=0.02), "float32"),
    ("sgd_f64", SGD, dict(lr=0.05, momentum=0.9, weight_decay=0.01), "float64"),
    ("adamw_default", ADAMW, dict(), "float32"),
    ("adamw_no_decay", ADAMW, dict(lr=0.01, weight_decay=0.0), "float32"),
    ("adamw_decay", ADAMW, dict(lr=0.01, weight_decay=0.3), "float32"),
    ("adamw_betas", ADAMW, dict(lr=0.01, betas=(0.4, 0.95), eps=1e-6), "float32"),
    ("adamw_maximize", ADAMW, dict(lr=0.01, maximize=True), "float32"),
    ("adamw_f64", ADAMW, dict(lr=0.01, weight_decay=0.1), "float64"),
]


def splitmix64(state):
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def draw(stream, index):
    """Element `index` of a stream: a multiple of 2^-12 in [-2, 2)."""
    return ((splitmix64(stream * 1000003 + index) >> 50) - 8192) / 4096.0


def has_gradient(step, parameter):
    return splitmix64(step * 31 + parameter) % 5 != 0


def tensor(stream, size, dtype):
    return torch.tensor([draw(stream, i) for i in range(size)], dtype=torch.float64).to(dtype)


def hexadecimal(value):
    return value.detach().numpy().tobytes().hex()


def run(name, algorithm, options, dtype_name):
    dtype = getattr(torch, dtype_name)
    parameters = [torch.nn.Parameter(tensor(p + 1, size, dtype)) for p, size in enumerate(SIZES)]
    kind = torch.optim.SGD if algorithm == SGD else torch.optim.AdamW
    optimizer = kind(parameters, foreach=False, **options)
    kept = {}
    for step in range(1, STEPS + 1):
        for p, parameter in enumerate(parameters):
            stream = 1000 + step * 16 + p
            parameter.grad = (
                tensor(stream, SIZES[p], dtype) if has_gradient(step, p) else None)
        optimizer.step()
        if step in KEPT:
            kept[str(step)] = [
                {"value": hexadecimal(parameter),
                 **{key: hexadecimal(slot) for key, slot in
                    sorted(optimizer.state.get(parameter, {}).items())
                    if key != "step" and torch.is_tensor(slot)}}
                for parameter in parameters]
    flat = dict(options)
    if "betas" in flat:
        flat["beta1"], flat["beta2"] = flat.pop("betas")
    return {"name": name, "algorithm": algorithm, "dtype": dtype_name, "options": flat,
            "steps": kept}


def clip_cases():
    """clip_grad_norm_ over the gradients of step 1, all parameters given."""
    cases = []
    for max_norm in (0.5, 3.0, 1000.0):
        parameters = [torch.nn.Parameter(torch.zeros(size)) for size in SIZES]
        for p, parameter in enumerate(parameters):
            parameter.grad = tensor(1000 + 16 + p, SIZES[p], torch.float32)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        cases.append({"max_norm": max_norm, "norm": float(norm),
                      "clipped": [hexadecimal(parameter.grad) for parameter in parameters]})
    return cases


def main():
    torch.set_num_threads(1)
    version = torch.__version__.split("+")[0]
    out = pathlib.Path(sys.argv[1]) / f"optimizer_torch_{version}.json"
    document = {"torch": version, "sizes": SIZES,
                "configurations": [run(*row) for row in CONFIGURATIONS], "clip": clip_cases()}
    out.write_text(json.dumps(document, indent=0) + "\n")
    print(out.name, out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
