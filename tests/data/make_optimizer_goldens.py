#!/usr/bin/env python3
"""Writes what torch.optim does in 40 steps, for tests/server/optim/optimizer_golden_test.cc.

Usage: make_optimizer_goldens.py OUTPUT_DIRECTORY
One JSON file per run: optimizer_torch_VERSION.json. The oracle is torch with foreach=False (and
fused=False where it exists); Lion, which torch has not, is written down here from its paper. Run
once with each torch version that the test knows. An option that a version lacks is left out there,
and so is NAdam of 1.13, which took mu_product * mu * mu_next for the next product (mended in 2.0).

Inputs are not stored: both sides draw them from the same integer generator (splitmix64), as
multiples of 2^-12 in [-2, 2), then rounded to the dtype. Some gradients are missing, some are zero.
Two parameter groups differ in lr and weight_decay. Of the outputs, the parameters and the state
after the steps KEPT are stored as hexadecimal bytes (little-endian).

A parameter of 16 bits is stepped as mixed precision training does it: "master" keeps a float32 copy
under the optimizer, of which the parameter is the rounding; "rounded" (master_weights off) begins
each step from the rounded parameter. Optimizer state is float32 in both.
"""

import inspect
import json
import pathlib
import sys

import torch

STEPS = 40
KEPT = (1, 40)
SHAPES = ((), (0,), (19,), (3, 4))
SECOND_GROUP = (2, 3)  # parameters
INF_STEP, INF_PARAMETER = 9, 2
MASK = (1 << 64) - 1

KINDS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
         "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop,
         "nadam": torch.optim.NAdam, "radam": torch.optim.RAdam, "adamax": torch.optim.Adamax,
         "adadelta": torch.optim.Adadelta}


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay,
                                      maximize=maximize))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = -p.grad if group["maximize"] else p.grad
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.sign(m * beta1 + g * (1 - beta1)), alpha=-group["lr"])
                m.mul_(beta2).add_(g, alpha=1 - beta2)


KINDS["lion"] = Lion


def options():
    """(algorithm, name, options); lr is large enough to show in every bit."""
    yield "sgd", "plain", dict(lr=0.1)
    yield "sgd", "momentum", dict(lr=0.05, momentum=0.9)
    yield "sgd", "dampening", dict(lr=0.05, momentum=0.9, dampening=0.3)
    yield "sgd", "nesterov", dict(lr=0.05, momentum=0.9, nesterov=True)
    yield "sgd", "maximize", dict(lr=0.1, maximize=True)
    yield "sgd", "all", dict(lr=0.03, momentum=0.8, nesterov=True, weight_decay=0.02, maximize=True)
    yield "sgd", "decay", dict(lr=0.03, momentum=0.8, dampening=0.1, weight_decay=0.02)
    for kind in ("adam", "adamw"):
        yield kind, "default", dict()
        yield kind, "decay", dict(lr=0.01, weight_decay=0.3)
        yield kind, "betas", dict(lr=0.01, betas=(0.4, 0.95), eps=1e-6)
        yield kind, "amsgrad", dict(lr=0.01, amsgrad=True, weight_decay=0.1)
        yield kind, "maximize", dict(lr=0.01, maximize=True)
    yield "adam", "decoupled", dict(lr=0.01, weight_decay=0.3, decoupled_weight_decay=True)
    yield "adagrad", "default", dict()
    yield "adagrad", "all", dict(lr=0.05, lr_decay=0.1, weight_decay=0.05,
                                 initial_accumulator_value=0.25, eps=1e-6, maximize=True)
    yield "rmsprop", "default", dict()
    yield "rmsprop", "momentum", dict(lr=0.01, momentum=0.8, weight_decay=0.05)
    yield "rmsprop", "centered", dict(lr=0.01, centered=True, alpha=0.9, eps=1e-3)
    yield "rmsprop", "all", dict(lr=0.01, centered=True, momentum=0.5, alpha=0.45, eps=1e-2,
                                 weight_decay=0.05, maximize=True)
    yield "nadam", "default", dict()
    yield "nadam", "decay", dict(lr=0.01, weight_decay=0.1, momentum_decay=0.1)
    yield "nadam", "decoupled", dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)
    yield "nadam", "maximize", dict(lr=0.01, betas=(0.45, 0.9), maximize=True)
    yield "radam", "default", dict()
    yield "radam", "decay", dict(lr=0.01, weight_decay=0.1, betas=(0.9, 0.99))
    yield "radam", "decoupled", dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)
    yield "radam", "maximize", dict(lr=0.01, maximize=True)
    yield "adamax", "default", dict()
    yield "adamax", "all", dict(lr=0.01, weight_decay=0.1, betas=(0.4, 0.9), eps=1e-4,
                                maximize=True)
    yield "adadelta", "default", dict()
    yield "adadelta", "all", dict(lr=0.5, rho=0.8, eps=1e-4, weight_decay=0.1, maximize=True)
    yield "lion", "default", dict()
    yield "lion", "all", dict(lr=0.01, betas=(0.5, 0.8), weight_decay=0.1, maximize=True)


def configurations():
    """(algorithm, name, options, dtype, gradient dtype, extra)"""
    for algorithm, name, opts in options():
        yield algorithm, name, opts, "float32", "float32", {}
        if name in ("all", "amsgrad", "decoupled"):
            yield algorithm, name + "_f64", opts, "float64", "float64", {}
    for algorithm in KINDS:
        opts = dict(momentum=0.9, lr=0.05) if algorithm == "sgd" else dict(lr=0.02)
        yield algorithm, "bf16", opts, "bfloat16", "bfloat16", {}
        yield algorithm, "bf16_rounded", opts, "bfloat16", "float32", {"master_weights": False}
        yield algorithm, "f16", opts, "float16", "float32", {}
        yield algorithm, "f16_rounded", opts, "float16", "bfloat16", {"master_weights": False}
    yield "adamw", "clip_norm", dict(lr=0.01), "float32", "float32", {"max_grad_norm": 1.5}
    yield "sgd", "clip_norm", dict(lr=0.1), "bfloat16", "float16", {"max_grad_norm": 0.75}
    yield "sgd", "clip_value", dict(lr=0.1, maximize=True), "float32", "float32", {"max_grad_value": 0.25}
    yield "adam", "scaled", dict(lr=0.01), "float32", "float32", {"grad_scale": 1000.0, "inf": True}
    yield "rmsprop", "scaled_clipped", dict(lr=0.01), "float16", "float16", {
        "grad_scale": 8.0, "inf": True, "max_grad_norm": 1.0}
    yield "adamw", "bf16_gradients", dict(lr=0.01), "float32", "bfloat16", {}
    yield "sgd", "f16_gradients", dict(lr=0.1), "float64", "float16", {}


def splitmix64(state):
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def draw(stream, index):
    """Element `index` of a stream: a multiple of 2^-12 in [-2, 2)."""
    return ((splitmix64(stream * 1000003 + index) >> 50) - 8192) / 4096.0


def tensor(stream, shape, dtype, factor=1.0):
    count = torch.Size(shape).numel()
    values = [draw(stream, i) * factor for i in range(count)]
    return torch.tensor(values, dtype=torch.float64).reshape(shape).to(dtype)


def gradient(step, p, dtype, factor):
    kind = splitmix64(step * 31 + p) % 7
    if kind == 0:
        return None
    if kind == 1:
        return torch.zeros(SHAPES[p], dtype=dtype)
    return tensor(1000 + step * 16 + p, SHAPES[p], dtype, factor)


def hexadecimal(value):
    return value.detach().contiguous().view(torch.uint8).numpy().tobytes().hex() \
        if value.dim() and value.numel() else value.detach().reshape(1 if value.numel() else 0).view(
            torch.uint8).numpy().tobytes().hex()


def second_group(opts):
    """The same with other numbers."""
    other = dict(opts)
    other["lr"] = opts.get("lr", 0.002) * 2.5
    other["weight_decay"] = opts.get("weight_decay", 0.0) / 2
    return other


def flat(opts):
    result = dict(opts)
    if "betas" in result:
        result["beta1"], result["beta2"] = result.pop("betas")
    return result


def run(algorithm, name, opts, dtype_name, gradient_name, extra):
    dtype, gradient_dtype = getattr(torch, dtype_name), getattr(torch, gradient_name)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = [tensor(p + 1, shape, dtype) for p, shape in enumerate(SHAPES)]
    stepped = [torch.nn.Parameter(value.to(computed)) for value in narrow]
    kind = KINDS[algorithm]
    forms = {"foreach": False} if "foreach" in inspect.signature(kind).parameters else {}
    groups = [{"params": [stepped[p] for p in range(len(SHAPES)) if p not in SECOND_GROUP]},
              {"params": [stepped[p] for p in SECOND_GROUP], **second_group(opts)}]
    optimizer = kind(groups, **opts, **forms)
    scale = extra.get("grad_scale", 1.0)
    kept = {}
    for step in range(1, STEPS + 1):
        finite = True
        for p, parameter in enumerate(stepped):
            g = gradient(step, p, gradient_dtype, scale)
            if extra.get("inf") and step == INF_STEP and p == INF_PARAMETER:
                g = tensor(1000 + step * 16 + p, SHAPES[p], gradient_dtype, scale)
                g[5] = float("inf")
            if g is not None:
                # As GradScaler unscales: times the reciprocal, a float.
                g = g.to(computed) * torch.tensor(1.0 / scale, dtype=torch.float64).float().item()
                finite = finite and bool(torch.isfinite(g).all())
            parameter.grad = g
        if finite:
            given = [parameter for parameter in stepped if parameter.grad is not None]
            if "max_grad_norm" in extra:
                torch.nn.utils.clip_grad_norm_(given, extra["max_grad_norm"])
            if "max_grad_value" in extra:
                torch.nn.utils.clip_grad_value_(given, extra["max_grad_value"])
            optimizer.step()
            for p, parameter in enumerate(stepped):
                narrow[p] = parameter.detach().to(dtype)
                if not extra.get("master_weights", True):
                    parameter.data.copy_(narrow[p].to(computed))
        if step in KEPT:
            kept[str(step)] = [
                {"value": hexadecimal(narrow[p]),
                 **{key: float(slot) if key in ("step", "mu_product") else hexadecimal(slot)
                    for key, slot in sorted(optimizer.state.get(parameter, {}).items())
                    if torch.is_tensor(slot) or key == "step"}}
                for p, parameter in enumerate(stepped)]
    return {"name": f"{algorithm}_{name}", "algorithm": algorithm, "dtype": dtype_name,
            "gradient_dtype": gradient_name, "options": flat(opts),
            "second_group": flat(second_group(opts)), "extra": extra, "steps": kept}


def supported(algorithm, opts):
    if algorithm == "nadam" and torch.__version__.startswith("1."):
        return False
    known = inspect.signature(KINDS[algorithm]).parameters
    return all(key in known for key in opts)


def main():
    torch.set_num_threads(1)
    version = torch.__version__.split("+")[0]
    out = pathlib.Path(sys.argv[1]) / f"optimizer_torch_{version}.json"
    rows = [json.dumps(run(*row), separators=(",", ":")) for row in configurations()
            if supported(row[0], row[2])]
    out.write_text('{"torch":"%s","configurations":[\n%s\n]}\n' % (version, ",\n".join(rows)))
    print(out.name, len(rows), "configurations,", out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
