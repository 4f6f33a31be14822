#!/usr/bin/env python3
"""Holds an optimizer file that `modelstate optim export` wrote against torch itself.

    python tests/data/check_optimizer_file.py FILE ALGORITHM [LIKE]

torch.load must read it (from torch 2 on with weights_only), load_state_dict of a new optimizer of that
algorithm ("adamw") must take it, and the optimizer must then step. With LIKE, a file of
torch.save(optimizer.state_dict()), the two must have the same state, bit for bit. Prints what it found;
exit code 1 for a difference. Needs torch.
"""

import sys

import torch

KINDS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
         "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop,
         "nadam": torch.optim.NAdam, "radam": torch.optim.RAdam, "adamax": torch.optim.Adamax,
         "adadelta": torch.optim.Adadelta}


def load(path):
    # That of torch 1.13 takes no float, so no hyper-parameter, also not of its own files.
    safe = not torch.__version__.startswith("1.")
    return torch.load(path, weights_only=safe)


def differences(ours, theirs):
    if set(ours["state"]) != {i for i, s in theirs["state"].items() if any(v is not None for v in s.values())}:
        yield f"state of {sorted(ours['state'])} and {sorted(theirs['state'])}"
        return
    for i, state in ours["state"].items():
        other = {k: v for k, v in theirs["state"][i].items() if v is not None}
        if set(state) != set(other):
            yield f"state[{i}] has {sorted(state)} and {sorted(other)}"
            continue
        for key, value in state.items():
            expected = other[key]
            if not torch.is_tensor(expected):
                expected = torch.tensor(float(expected), dtype=value.dtype)
            if value.shape != expected.shape or not torch.equal(value, expected.to(value.dtype)):
                yield f"state[{i}][{key}]: {value} and {expected}"
    for i, (ours_group, group) in enumerate(zip(ours["param_groups"], theirs["param_groups"])):
        for key, value in group.items():
            if key == "params":
                equal = len(value) == len(ours_group[key])
            elif key not in ours_group:
                equal = key in ("initial_lr", "param_names")
            elif key in ("foreach", "fused", "capturable", "differentiable"):
                equal = True
            elif isinstance(value, tuple):
                equal = [float(v) for v in value] == [float(v) for v in ours_group[key]]
            else:
                equal = float(value) == float(ours_group[key])
            if not equal:
                yield f"param_groups[{i}][{key}]: {ours_group.get(key)} and {value}"


def main():
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    ours = load(sys.argv[1])
    shapes = {}
    for i, state in ours["state"].items():
        for key, value in state.items():
            if key not in ("step", "mu_product"):
                shapes[i] = (value.shape, value.dtype)
    groups, params = [], []
    for group in ours["param_groups"]:
        members = []
        for i in group["params"]:
            shape, dtype = shapes.get(i, ((2,), torch.float32))
            members.append(torch.nn.Parameter(torch.zeros(shape, dtype=dtype)))
        params += members
        groups.append({"params": members})
    if sys.argv[2] in KINDS:
        optimizer = KINDS[sys.argv[2]](groups, lr=0.5)
        optimizer.load_state_dict(load(sys.argv[1]))
        kept = optimizer.state_dict()
        wrong = [f"after load_state_dict: {d}" for d in differences(ours, kept)]
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.full_like(p, 0.25)
        optimizer.step()
        if any(torch.equal(a, b) for a, b in zip(before, params)):
            wrong.append("a parameter did not step")
    else:
        wrong = []
    if len(sys.argv) == 4:
        theirs = load(sys.argv[3])
        # Read again: the step above went on from the same tensors.
        wrong += differences(load(sys.argv[1]), theirs.get("optimizer", theirs))
    for text in wrong:
        print(text)
    print(f"torch {torch.__version__}: {len(ours['param_groups'])} groups, {len(params)} parameters, "
          f"{sum(len(s) for s in ours['state'].values())} values of state, {len(wrong)} differences")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
