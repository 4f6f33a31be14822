#!/usr/bin/env python3
"""Writes optimizer.state_dict() files of torch, for the tests of reading and writing them.

Usage: make_optimizer_files.py OUTPUT_DIRECTORY
Into OUTPUT_DIRECTORY/optimizer-torch-VERSION/: NAME.pt, what torch.save writes after three steps, and
NAME.json, what must be read from it. For adamw and sgd also what a server needs to go on from there:
NAME-before.safetensors (parameters after three steps), NAME-gradients-4 and -5, and NAME-after (what
torch makes of them in two more steps), and NAME-order.txt, the parameters in the optimizer's order. Run
once with each torch version that the tests know. The parameter fc2.bias has no gradient in the first
three steps, so no state (but in Adagrad).
"""

import json
import pathlib
import struct
import sys

import torch

SHAPES = {"fc1.weight": (4, 3), "fc1.bias": (4,), "scale": (), "fc2.weight": (2, 4), "fc2.bias": (2,)}
DECAYED = ("fc1.weight", "fc2.weight")
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
FIELDS = ("lr", "weight_decay", "maximize", "momentum", "dampening", "nesterov", "eps", "amsgrad",
          "decoupled_weight_decay", "lr_decay", "initial_accumulator_value", "alpha", "centered",
          "momentum_decay", "rho")
NEW = int(torch.__version__.split(".")[0]) >= 2


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.sign(m * beta1 + p.grad * (1 - beta1)), alpha=-group["lr"])
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


def parameters(dtype=torch.float32):
    torch.manual_seed(1)
    return {name: torch.nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in SHAPES.items()}


def two_groups(params):
    return [{"params": [params[n] for n in DECAYED], "weight_decay": 0.1},
            {"params": [p for n, p in params.items() if n not in DECAYED], "weight_decay": 0.0,
             "lr": 0.02}]


def gradients(params, step):
    torch.manual_seed(100 + step)
    return {name: torch.randn(p.shape).to(p.dtype) for name, p in params.items()
            if step > 3 or name != "fc2.bias"}


def train(optimizer, params, steps):
    for step in steps:
        grads = gradients(params, step)
        for name, p in params.items():
            p.grad = grads.get(name)
        optimizer.step()


def describe(state_dict, algorithm):
    groups = []
    position = {}
    for group in state_dict["param_groups"]:
        h = {f: float(group[f]) if not isinstance(group[f], bool) else group[f]
             for f in FIELDS if group.get(f) is not None}
        if "betas" in group:
            h["beta1"], h["beta2"] = group["betas"]
        for i in group["params"]:
            position[i] = len(position)
        groups.append({"size": len(group["params"]), "names": group.get("param_names", []),
                       "hyperparameters": h})
    tensors = []
    for i, state in state_dict["state"].items():
        for key, value in state.items():
            if value is None:
                continue
            row = {"position": position[i], "key": key, "dtype": "F64", "shape": []}
            if torch.is_tensor(value):
                flat = value.contiguous().reshape(-1)
                row.update(dtype=NAMES[value.dtype], shape=list(value.shape),
                           hex=flat.view(torch.int16 if flat.element_size() == 2 else flat.dtype)
                           .numpy().tobytes().hex())
            else:
                row["hex"] = struct.pack("<d", value).hex()
            tensors.append(row)
    return {"algorithm": algorithm, "groups": groups, "tensors": tensors}


def save_tensors(path, tensors):
    from safetensors.torch import save_file
    save_file({name: t.detach().clone() for name, t in tensors.items()}, str(path))


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    version = torch.__version__.split("+")[0]
    out = pathlib.Path(sys.argv[1]) / f"optimizer-torch-{version}"
    out.mkdir(parents=True, exist_ok=True)

    def write(name, optimizer, algorithm, wrap=lambda state: state):
        torch.save(wrap(optimizer.state_dict()), out / f"{name}.pt")
        description = describe(optimizer.state_dict(), algorithm)
        (out / f"{name}.json").write_text(json.dumps(description, indent=1) + "\n")

    one = torch.optim
    for name, cls, algorithm, options in (
            ("sgd-plain", one.SGD, "sgd", dict(lr=0.1)),
            ("adam", one.Adam, "adam", dict(lr=0.01, amsgrad=True, betas=(0.8, 0.95))),
            ("adagrad", one.Adagrad, "adagrad", dict(lr_decay=0.1, initial_accumulator_value=0.25)),
            ("rmsprop", one.RMSprop, "rmsprop", dict(centered=True, momentum=0.5)),
            ("nadam", one.NAdam, "nadam", dict()),
            ("radam", one.RAdam, "radam", dict(weight_decay=0.1)),
            ("adamax", one.Adamax, "adamax", dict()),
            ("adadelta", one.Adadelta, "adadelta", dict()),
            ("lion", Lion, "lion", dict(weight_decay=0.1))):
        params = parameters()
        optimizer = cls(list(params.values()), **options)
        train(optimizer, params, (1, 2, 3))
        write(name, optimizer, algorithm)

    # torch 1.13 writes AdamW as it writes Adam.
    for name, cls, algorithm, options in (
            ("adamw", one.AdamW, "adamw" if NEW else None, dict(lr=0.01)),
            ("sgd", one.SGD, "sgd", dict(lr=0.05, momentum=0.9, dampening=0.1))):
        params = parameters()
        optimizer = cls(two_groups(params), **options)
        train(optimizer, params, (1, 2, 3))
        write(name, optimizer, algorithm)
        if NEW:
            order = [n for n in SHAPES if n in DECAYED] + [n for n in SHAPES if n not in DECAYED]
            (out / f"{name}-order.txt").write_text("\n".join(order) + "\n")
            save_tensors(out / f"{name}-before.safetensors", params)
            for step in (4, 5):
                save_tensors(out / f"{name}-gradients-{step}.safetensors", gradients(params, step))
            train(optimizer, params, (4, 5))
            save_tensors(out / f"{name}-after.safetensors", params)

    params = parameters(torch.bfloat16)
    optimizer = one.Adam(list(params.values()), foreach=False)
    train(optimizer, params, (1, 2, 3))
    write("bfloat16", optimizer, "adam")

    # A training checkpoint: a scheduler adds a key, and lr is a tensor where torch takes one.
    params = parameters()
    lr = torch.tensor(0.5) if NEW else 0.5
    optimizer = one.Adam(params.items() if NEW else list(params.values()), lr=lr, foreach=False)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(optimizer, params, (1, 2, 3))
    write("nested", optimizer, "adam", lambda state: {
        "epoch": 3, "model": dict(params), "optimizer": state})


if __name__ == "__main__":
    main()
