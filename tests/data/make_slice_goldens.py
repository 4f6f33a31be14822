#!/usr/bin/env python3
"""Writes slices.json: what torch and numpy select by basic indexing, or what they refuse, for a
list of expressions. Elements are their flat row-major indices.

Needs torch (any version) and numpy; both must agree on what is selected.
"""
import json
import os

import numpy
import torch

EXPRESSIONS = {
    (3, 4): [
        "0", "-1", "2", ":", "::2", "1:", ":2", "-2:", ":-1", "1:1", "2:1", "0:100", "-100:2", "::5",
        "0, 0", "-1, -1", "0, ::2", "-1, ::2", ":, 1", ":, -1", ":, 1:3", "::2, ::3", "...", "..., 0",
        "0, ...", "..., 1:3", "1:3, 2:", "0,", "1:2,", " 1 , 2 ", "...,", "0, 0, ...", "0, ..., 0",
        "3", "-4", "0, 4", "0, -7", "0, 0, 0", "0, :, 0", "::-1", "::0", "0, ::-2", "1::1000000007",
    ],
    (2, 3, 4, 5): [
        "1", "..., 3:5", "0, ..., -1", ":, 1", ":, :, ::3", "-1, ::2", "1, 2, 3, 4", "0:1, ..., 1:4:2",
        "..., 0, :", "0, 0:2, ..., ::4", "1, -1", ":, :, :, :", ":, :, 4", "..., 5", "0, 0, 0, 0, 0",
    ],
    (7,): ["3", "1:6:2", "6:", "7:", "-3:-1", "...", "::7", "7", "2:6:3", "-7", "-8"],
    (): ["...", "0", ":", "0:1"],
    (0, 3): [":", ":, 1", "0", "...", "::2, ::2", ":, 3"],
    (2, 0, 3): ["0", "1, :", ":, 0", "..., 2", "-1, ..., ::2"],
}  # fmt: skip


def select(tensor, expression):
    return eval(f"tensor[{expression}]", {"tensor": tensor})


def main():
    items = []
    for shape, expressions in EXPRESSIONS.items():
        count = int(numpy.prod(shape)) if shape else 1
        tensor = torch.arange(count).reshape(shape)
        for expression in expressions:
            item = {"shape": list(shape), "slice": expression}
            try:
                part = select(tensor, expression)
            except (IndexError, ValueError) as error:
                item["error"] = str(error)
            else:
                theirs = select(tensor.numpy(), expression)
                assert list(part.shape) == list(numpy.shape(theirs)), expression
                assert part.flatten().tolist() == numpy.ravel(theirs).tolist(), expression
                item["slice_shape"] = list(part.shape)
                item["elements"] = part.flatten().tolist()
            items.append(item)
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "slices.json"), "w", encoding="utf-8") as out:
        out.write("[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]\n")


if __name__ == "__main__":
    main()
