#!/usr/bin/env python3
"""Holds an optimizer file that `modelstate optim export` wrote against torch itself.

    python tests/data/check_optimizer_file.py FILE ALGORITHM [LIKE]
    python tests/data/check_optimizer_file.py --mid-run BIN_DIRECTORY

torch.load must read it (from torch 2 on with weights_only), load_state_dict of a new optimizer of that
algorithm ("adamw") must take it, and the optimizer must then step. With LIKE, a file of
torch.save(optimizer.state_dict()), the two must have the same state, bit for bit.

With --mid-run, for each rule of torch, a training run of nine steps that leaves torch after the third is
held against one that never left: through import and export only, which must not show in any bit, and with
three steps in the server before it comes back, which differ by roundings. BIN_DIRECTORY holds
modelstate-server and modelstate.

Prints what it found; exit code 1 for a difference. Needs torch.
"""

import contextlib
import math
import os
import subprocess
import sys
import tempfile

import torch

from make_optimizer_files import DECAYED, SHAPES, gradients, parameters, train, two_groups

KINDS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
         "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop,
         "nadam": torch.optim.NAdam, "radam": torch.optim.RAdam, "adamax": torch.optim.Adamax,
         "adadelta": torch.optim.Adadelta}


# What --mid-run trains with: as much state as the rule can have.
OPTIONS = {"sgd": dict(lr=0.05, momentum=0.9, dampening=0.1), "adam": dict(lr=0.01, amsgrad=True),
           "adamw": dict(lr=0.01), "adagrad": dict(lr_decay=0.1, initial_accumulator_value=0.25),
           "rmsprop": dict(centered=True, momentum=0.5), "nadam": {}, "radam": {}, "adamax": {},
           "adadelta": {}}

# In units in the last place of F32, as tests/server/optim/optimizer_golden_test.cc has them, which says
# why the server's steps are not torch's bits: of a parameter at the largest of 1 and its elements, of
# state at its tensor's largest element.
PARAMETER_BOUND, STATE_BOUND = 4, 4


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


def check_file(path, algorithm, like=None):
    ours = load(path)
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
    if algorithm in KINDS:
        optimizer = KINDS[algorithm](groups, lr=0.5)
        optimizer.load_state_dict(load(path))
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
    if like is not None:
        theirs = load(like)
        # Read again: the step above went on from the same tensors.
        wrong += differences(load(path), theirs.get("optimizer", theirs))
    for text in wrong:
        print(text)
    print(f"torch {torch.__version__}: {len(ours['param_groups'])} groups, {len(params)} parameters, "
          f"{sum(len(s) for s in ours['state'].values())} values of state, {len(wrong)} differences")
    return not wrong


@contextlib.contextmanager
def serving(binaries, root):
    """A server; yields what runs the command line on it."""
    server = subprocess.Popen(
        [os.path.join(binaries, "modelstate-server"), "--listen=127.0.0.1:0", "--checkpoint_root=" + root],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        target = server.stdout.readline().split()[-1]
        yield lambda *command: subprocess.run(
            [os.path.join(binaries, "modelstate"), "--server", target, *command], check=True,
            stdout=subprocess.DEVNULL)
    finally:
        server.terminate()
        server.wait()


def largest_distance(pairs, floor=0.0):
    """In units in the last place of F32, at the largest of `floor` and the tensor's elements."""
    worst = 0.0
    for a, b in pairs:
        a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
        difference = (a - b).abs().max().item()
        if difference > 0:
            worst = max(worst, difference / 2.0 ** (math.frexp(max(floor, b.abs().max().item()))[1] - 24))
        elif difference != 0:  # not a number
            return math.inf
    return worst


def distances(params, optimizer, expected_params, expected):
    """Of the parameters and of all state; infinite where a key or a count of steps differs."""
    pairs = []
    both = [(p, expected_params[name]) for name, p in params.items()]
    for p, q in both:
        ours, theirs = (
            {k: v for k, v in o.state[x].items() if v is not None} for o, x in ((optimizer, p), (expected, q)))
        if set(ours) != set(theirs) or ours.get("step") != theirs.get("step"):
            return math.inf, math.inf
        pairs += [(ours[key], theirs[key]) for key in ours]
    return largest_distance(((p.detach(), q.detach()) for p, q in both), 1.0), largest_distance(pairs)


class MidRun:
    """Training with one rule, that leaves torch and comes back."""

    def __init__(self, work, cli, rule):
        self.work, self.cli, self.rule = work, cli, rule

    def file(self, name):
        return os.path.join(self.work, name)

    def optimizer_of(self, params):
        return KINDS[self.rule](two_groups(params), **OPTIONS[self.rule])

    def leave(self, params, optimizer):
        torch.save({name: p.detach() for name, p in params.items()}, self.file(f"{self.rule}.pt"))
        torch.save(optimizer.state_dict(), self.file("optimizer.pt"))
        self.cli("load", self.rule, f"{self.rule}.pt")
        self.cli("optim", "import", self.rule, self.file("optimizer.pt"), "--order", self.file("order.txt"),
                 "--algorithm", self.rule)

    def come_back(self):
        """Parameters and an optimizer made anew, with what the server has."""
        self.cli("fetch", self.rule, self.file("fetched.safetensors"))
        self.cli("convert", "--force", self.file("fetched.safetensors"), self.file("fetched.pt"))
        self.cli("optim", "export", self.rule, self.file("back.pt"), "--order", self.file("order.txt"))
        fetched = load(self.file("fetched.pt"))
        params = {name: torch.nn.Parameter(fetched[name]) for name in SHAPES}  # in the optimizer's order
        optimizer = self.optimizer_of(params)
        optimizer.load_state_dict(load(self.file("back.pt")))
        return params, optimizer

    def distances(self):
        """From nine steps in torch: with no step in the server, and with the fourth to the sixth there."""
        stayed = parameters()
        optimizer = self.optimizer_of(stayed)
        train(optimizer, stayed, (1, 2, 3))
        self.leave(stayed, optimizer)
        train(optimizer, stayed, range(4, 10))

        params, back = self.come_back()
        train(back, params, range(4, 10))
        yield distances(params, back, stayed, optimizer)

        for step in (4, 5, 6):
            self.cli("step-from", self.rule, self.file(f"gradients-{step}.pt"))
        params, back = self.come_back()
        train(back, params, (7, 8, 9))
        yield distances(params, back, stayed, optimizer)


def check_mid_run(binaries):
    good = True
    with tempfile.TemporaryDirectory() as work, serving(binaries, work) as cli:
        with open(os.path.join(work, "order.txt"), "w") as order:
            for name in sorted(SHAPES, key=lambda name: name not in DECAYED):
                order.write(name + "\n")
        # fc2.bias has its first gradient in step 4: its state begins after the others', here or there.
        for step in (4, 5, 6):
            torch.save(gradients(parameters(), step), os.path.join(work, f"gradients-{step}.pt"))
        for rule in KINDS:
            if rule == "nadam" and torch.__version__.startswith("1."):
                continue  # its product of mu is another (mended in 2.0), so the server's steps are others
            unstepped, (of_parameters, of_state) = MidRun(work, cli, rule).distances()
            agrees = unstepped == (0, 0) and of_parameters <= PARAMETER_BOUND and of_state <= STATE_BOUND
            good &= agrees
            exact = "exact" if unstepped == (0, 0) else f"OFF BY {unstepped} ulp"
            print(f"torch {torch.__version__} {rule}: import and export {exact}; three steps in the server: parameters "
                  f"{of_parameters:.1f} ulp (bound {PARAMETER_BOUND}), state {of_state:.1f} ulp (bound {STATE_BOUND})"
                  + ("" if agrees else ": DIFFERENT"), flush=True)
    return good


def main():
    if len(sys.argv) == 3 and sys.argv[1] == "--mid-run":
        good = check_mid_run(sys.argv[2])
    elif len(sys.argv) in (3, 4):
        good = check_file(*sys.argv[1:])
    else:
        sys.exit(__doc__)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
