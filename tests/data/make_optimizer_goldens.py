#!/usr/bin/env python3
"""Writes what torch.optim does in 40 steps, for tests/server/optim/optimizer_golden_test.cc.

Usage: make_optimizer_goldens.py OUTPUT_DIRECTORY
One JSON file per run: optimizer_torch_VERSION.json. The oracle is torch with foreach=False (and
fused=False where it exists); Lion, which torch has not, is written down here from its paper. Run
once with each torch version that the test knows, on a processor with AVX2. An option that a version
lacks is left out there, and so is NAdam of 1.13, which took mu_product * mu * mu_next for the next
product (mended in 2.0).

Everything is run twice: by torch's plain kernels ("steps"), which round each product and each sum
as the server does, and by those for AVX2 ("contracted"), which fuse them where they can. Square
roots are MKL's in both, and one in some hundreds is not the nearest number.

Inputs are not stored: both sides draw them from the same integer generator (splitmix64), as
multiples of 2^-12 in [-2, 2), then rounded to the dtype. Some gradients are missing, some are zero.
Two parameter groups differ in lr, weight_decay and, in some configurations, in more. Stored are, as
hexadecimal bytes (little-endian), the parameters after the steps KEPT ("contracted": the last) and
the plain kernels' state after the last, in which `step` and `mu_product` are numbers.

A parameter of 16 bits is stepped as mixed precision training does it: "master" keeps a float32 copy
under the optimizer, of which the parameter is the rounding; "rounded" (master_weights off) begins
each step from the rounded parameter. Optimizer state is float32 in both.
"""

import inspect
import json
import os
import pathlib
import subprocess
import sys

import torch

STEPS = 40
KEPT = (1, 7, STEPS)
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
    """(algorithm, name, options, what else the second group has); lr is large enough to show in
    every bit."""
    yield "sgd", "plain", dict(lr=0.1), {}
    yield "sgd", "momentum", dict(lr=0.05, momentum=0.9), {}
    yield "sgd", "dampening", dict(lr=0.05, momentum=0.9, dampening=0.3), {}
    yield "sgd", "nesterov", dict(lr=0.05, momentum=0.9, nesterov=True), {}
    yield "sgd", "all", dict(lr=0.03, momentum=0.8, nesterov=True, weight_decay=0.02,
                             maximize=True), {}
    yield "sgd", "decay", dict(lr=0.03, momentum=0.8, dampening=0.1, weight_decay=0.02), {}
    yield "sgd", "groups", dict(lr=0.1, momentum=0.9, nesterov=True), dict(
        momentum=0.0, nesterov=False, weight_decay=0.1, maximize=True)
    for kind in ("adam", "adamw"):
        yield kind, "default", dict(), {}
        yield kind, "decay", dict(lr=0.01, weight_decay=0.3), {}
        yield kind, "betas", dict(lr=0.01, betas=(0.4, 0.95), eps=1e-6), {}
        yield kind, "amsgrad", dict(lr=0.01, amsgrad=True, weight_decay=0.1), {}
        yield kind, "all", dict(lr=0.01, amsgrad=True, weight_decay=0.1, maximize=True,
                                betas=(0.45, 0.4), eps=1e-3), {}
        yield kind, "groups", dict(lr=0.01, amsgrad=True, weight_decay=0.1), dict(
            amsgrad=False, weight_decay=0.0, maximize=True, betas=(0.5, 0.9), eps=1e-4)
    yield "adam", "decoupled", dict(lr=0.01, weight_decay=0.3, decoupled_weight_decay=True), dict(
        decoupled_weight_decay=False)
    yield "adagrad", "default", dict(), {}
    yield "adagrad", "all", dict(lr=0.05, lr_decay=0.1, weight_decay=0.05, eps=1e-6,
                                 initial_accumulator_value=0.25, maximize=True), {}
    yield "adagrad", "groups", dict(lr=0.05, lr_decay=0.1), dict(
        lr_decay=0.0, weight_decay=0.1, eps=1e-3, maximize=True)
    yield "rmsprop", "default", dict(), {}
    yield "rmsprop", "momentum", dict(lr=0.01, momentum=0.8, weight_decay=0.05), {}
    yield "rmsprop", "centered", dict(lr=0.01, centered=True, alpha=0.9, eps=1e-3), {}
    yield "rmsprop", "all", dict(lr=0.01, centered=True, momentum=0.5, alpha=0.45, eps=1e-2,
                                 weight_decay=0.05, maximize=True), {}
    yield "rmsprop", "groups", dict(lr=0.01, centered=True, momentum=0.9, eps=1e-2), dict(
        centered=False, momentum=0.0, alpha=0.9, weight_decay=0.1, maximize=True)
    yield "nadam", "default", dict(), {}
    yield "nadam", "decay", dict(lr=0.01, weight_decay=0.1, momentum_decay=0.1), {}
    yield "nadam", "decoupled", dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True), dict(
        decoupled_weight_decay=False)
    yield "nadam", "all", dict(lr=0.01, betas=(0.45, 0.4), eps=1e-3, weight_decay=0.1,
                               momentum_decay=0.02, maximize=True), dict(
        betas=(0.9, 0.99), momentum_decay=0.5, maximize=False)
    yield "radam", "default", dict(), {}
    yield "radam", "decay", dict(lr=0.01, weight_decay=0.1, betas=(0.9, 0.99)), {}
    # Of a beta2 up to 2/3 the variance never becomes tractable.
    yield "radam", "unrectified", dict(lr=0.01, betas=(0.4, 0.6)), dict(betas=(0.5, 0.7))
    yield "radam", "decoupled", dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True), dict(
        decoupled_weight_decay=False)
    yield "radam", "all", dict(lr=0.01, betas=(0.45, 0.9), eps=1e-3, weight_decay=0.1,
                               maximize=True), dict(betas=(0.9, 0.99), maximize=False)
    yield "adamax", "default", dict(), {}
    yield "adamax", "all", dict(lr=0.01, weight_decay=0.1, betas=(0.4, 0.9), eps=1e-4,
                                maximize=True), dict(
        betas=(0.9, 0.4), eps=1e-8, maximize=False)
    yield "adadelta", "default", dict(), {}
    yield "adadelta", "all", dict(lr=0.5, rho=0.8, eps=1e-4, weight_decay=0.1,
                                  maximize=True), dict(rho=0.3, eps=1e-6, maximize=False)
    yield "lion", "default", dict(), {}
    yield "lion", "all", dict(lr=0.01, betas=(0.5, 0.8), weight_decay=0.1, maximize=True), dict(
        betas=(0.95, 0.4), maximize=False)


def configurations():
    """(algorithm, name, options, second group, dtype, gradient dtype, extra)"""
    for algorithm, name, opts, second in options():
        yield algorithm, name, opts, second, "float32", "float32", {}
        if name in ("all", "decoupled"):
            yield algorithm, name + "_f64", opts, second, "float64", "float64", {}
    for algorithm in KINDS:
        opts = dict(momentum=0.9, lr=0.05) if algorithm == "sgd" else dict(lr=0.02)
        decayed = dict(opts, weight_decay=0.1)
        rounded = {"master_weights": False}
        yield algorithm, "bf16", opts, {}, "bfloat16", "bfloat16", {}
        yield algorithm, "bf16_rounded", decayed, {}, "bfloat16", "float32", rounded
        yield algorithm, "f16", decayed, {}, "float16", "float32", {}
        yield algorithm, "f16_rounded", opts, {}, "float16", "bfloat16", rounded
    f32, f64, bf16, f16 = "float32", "float64", "bfloat16", "float16"
    yield "adamw", "clip_norm", dict(lr=0.01), {}, f32, f32, {"max_grad_norm": 1.5}
    yield "sgd", "clip_norm", dict(lr=0.1), {}, bf16, f16, {"max_grad_norm": 0.75}
    yield "radam", "clip_norm", dict(lr=0.01), {}, f64, bf16, {"max_grad_norm": 2.5}
    yield "sgd", "clip_value", dict(lr=0.1, maximize=True), {}, f32, f32, {"max_grad_value": 0.25}
    yield "adadelta", "clip_value", dict(lr=0.5), {}, f16, bf16, {"max_grad_value": 0.5}
    yield "adam", "scaled", dict(lr=0.01), {}, f32, f32, {"grad_scale": 1000.0, "inf": True}
    yield "rmsprop", "scaled_clipped", dict(lr=0.01), {}, f16, f16, {
        "grad_scale": 8.0, "inf": True, "max_grad_norm": 1.0}
    yield "lion", "scaled_rounded", dict(lr=0.01), {}, bf16, bf16, {
        "grad_scale": 1024.0, "inf": True, "max_grad_value": 0.5, "master_weights": False}
    yield "adamw", "bf16_gradients", dict(lr=0.01), {}, f32, bf16, {}
    yield "sgd", "f16_gradients", dict(lr=0.1), {}, f64, f16, {}


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
    return value.detach().reshape(-1).view(torch.uint8).numpy().tobytes().hex()


def second_group(opts, others):
    """The same with other numbers."""
    derived = dict(lr=opts.get("lr", 0.002) * 2.5, weight_decay=opts.get("weight_decay", 0.0) / 2)
    return {**opts, **derived, **others}


def flat(opts):
    result = dict(opts)
    if "betas" in result:
        result["beta1"], result["beta2"] = result.pop("betas")
    return result


def scalars_and_elements(state):
    return {key: float(slot) if key in ("step", "mu_product") else hexadecimal(slot)
            for key, slot in sorted(state.items()) if torch.is_tensor(slot) or key == "step"}


def run(algorithm, name, opts, others, dtype_name, gradient_name, extra):
    dtype, gradient_dtype = getattr(torch, dtype_name), getattr(torch, gradient_name)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = [tensor(p + 1, shape, dtype) for p, shape in enumerate(SHAPES)]
    stepped = [torch.nn.Parameter(value.to(computed)) for value in narrow]
    kind = KINDS[algorithm]
    forms = {"foreach": False} if "foreach" in inspect.signature(kind).parameters else {}
    groups = [{"params": [stepped[p] for p in range(len(SHAPES)) if p not in SECOND_GROUP]},
              {"params": [stepped[p] for p in SECOND_GROUP], **second_group(opts, others)}]
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
            kept[str(step)] = [hexadecimal(value) for value in narrow]
    state = [scalars_and_elements(optimizer.state.get(parameter, {})) for parameter in stepped]
    return {"name": f"{algorithm}_{name}", "algorithm": algorithm, "dtype": dtype_name,
            "gradient_dtype": gradient_name, "options": flat(opts),
            "second_group": flat(second_group(opts, others)), "extra": extra,
            "steps": kept, "state": state}


def supported(algorithm, *options_of_groups):
    if algorithm == "nadam" and torch.__version__.startswith("1."):
        return False
    known = inspect.signature(KINDS[algorithm]).parameters
    return all(key in known for opts in options_of_groups for key in opts)


def run_all():
    torch.set_num_threads(1)
    return [run(*row) for row in configurations() if supported(row[0], row[2], row[3])]


def run_with(kernels):
    """run_all() in a process whose torch takes these kernels; it cannot change them later."""
    result = subprocess.run([sys.executable, __file__, "--print"], check=True, capture_output=True,
                            env={**os.environ, "ATEN_CPU_CAPABILITY": kernels})
    return json.loads(result.stdout)


def main():
    if sys.argv[1] == "--print":
        return print(json.dumps(run_all()))
    version = torch.__version__.split("+")[0]
    out = pathlib.Path(sys.argv[1]) / f"optimizer_torch_{version}.json"
    rows = run_with("default")
    for row, contracted in zip(rows, run_with("avx2"), strict=True):
        row["contracted"] = contracted["steps"][str(STEPS)]
    lines = [json.dumps(row, separators=(",", ":")) for row in rows]
    out.write_text('{"torch":"%s","configurations":[\n%s\n]}\n' % (version, ",\n".join(lines)))
    print(out.name, len(rows), "configurations,", out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
