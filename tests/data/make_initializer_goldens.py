#!/usr/bin/env python3
"""Writes initializers.json: what torch.nn.init asks of uniform_ and normal_ for a list of shapes,
and the first elements of the documented random streams, computed here a second time.

Needs torch (any version) and xxhash. Run with both torch versions that the goldens name; the file
must come out the same.
"""
import json
import math
import os

import torch
import xxhash
from torch import nn

SHAPES = [[6, 4], [1, 1], [64, 3, 7, 7], [5, 2, 3], [2, 3, 4, 5, 6]]
GAINS = [
    ("linear", 0), ("conv1d", 0), ("conv2d", 0), ("conv3d", 0), ("conv_transpose1d", 0),
    ("conv_transpose2d", 0), ("conv_transpose3d", 0), ("sigmoid", 0), ("tanh", 0), ("relu", 0),
    ("leaky_relu", 0), ("leaky_relu", 0.2), ("leaky_relu", -1.5), ("leaky_relu", math.sqrt(5)),
    ("selu", 0),
]  # fmt: skip


def asked_for(fill):
    """The arguments of uniform_ or normal_ that `fill` ends in."""
    calls = []
    saved = torch.Tensor.uniform_, torch.Tensor.normal_

    def record(self, first, second, generator=None):
        calls.append([first, second])
        return self

    torch.Tensor.uniform_ = torch.Tensor.normal_ = record
    try:
        fill()
    finally:
        torch.Tensor.uniform_, torch.Tensor.normal_ = saved
    (arguments,) = calls
    return arguments


def cases():
    for shape in SHAPES:
        tensor = torch.empty(shape)
        for mode in "fan_in", "fan_out":
            for nonlinearity, a in GAINS:
                for kind in "kaiming_uniform", "kaiming_normal":
                    fill = getattr(nn.init, kind + "_")
                    first, second = asked_for(
                        lambda: fill(tensor, a=a, mode=mode, nonlinearity=nonlinearity)
                    )
                    yield dict(kind=kind, shape=shape, a=a, mode=mode, nonlinearity=nonlinearity,
                               first=first, second=second)  # fmt: skip
        for gain in 1.0, 0.25, nn.init.calculate_gain("relu"):
            for kind in "xavier_uniform", "xavier_normal":
                fill = getattr(nn.init, kind + "_")
                first, second = asked_for(lambda: fill(tensor, gain=gain))
                yield dict(kind=kind, shape=shape, gain=gain, first=first, second=second)


def philox(key, low, high):
    mask = 0xFFFFFFFF
    c = [low & mask, low >> 32, high & mask, high >> 32]
    k = [key & mask, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def element(seed, name, index, normal, first, second):
    words = philox(seed, index // 2, xxhash.xxh3_64_intdigest(name.encode()))
    bits = [(words[2 * k] + (words[2 * k + 1] << 32)) >> 11 for k in range(2)]
    if not normal:
        return first + (second - first) * (bits[index % 2] * 2.0**-53)
    radius = math.sqrt(-2 * math.log((bits[0] + 1) * 2.0**-53))
    turn = 2 * math.pi * (bits[1] * 2.0**-53)
    return first + second * (radius * (math.sin(turn) if index % 2 else math.cos(turn)))


def streams():
    for seed, name in (0, "weight"), (1, "weight"), (2**64 - 1, "layer1.0.conv1.weight"), (42, "ü"):
        for normal, first, second in (False, 0.0, 1.0), (False, -3.0, 0.5), (True, 2.0, 0.1):
            indices = list(range(9)) + [999_999, 2**33 + 1]
            values = [element(seed, name, i, normal, first, second) for i in indices]
            yield dict(seed=seed, name=name, normal=normal, first=first, second=second,
                       indices=indices, values=values)  # fmt: skip


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    lines = {
        key: ",\n".join("  " + json.dumps(item, ensure_ascii=False) for item in items)
        for key, items in (("bounds", cases()), ("streams", streams()))
    }
    with open(os.path.join(here, "initializers.json"), "w", encoding="utf-8") as out:
        out.write('{"bounds": [\n%(bounds)s\n],\n"streams": [\n%(streams)s\n]}\n' % lines)


if __name__ == "__main__":
    main()
