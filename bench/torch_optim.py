#!/usr/bin/env python3
"""torch.optim's AdamW, Adam and SGD with momentum 0.9, fused=True, beside optimizer_bench's rows, in turns, on the same threads.

    bench/torch_optim.py [--rule adamw,adam,sgd] [--bench build/release/bin/optimizer_bench]
        [--elements 100000000] [--turns 5] [--rounds 5] [--threads 2]

Both step all elements as one parameter. torch's step neither computes a norm nor looks for what is
not finite; the row with clip_grad_norm_ does what ours always does. `ratio`: milliseconds of the
row over those of our step, clipped; the median, lowest and highest of the turns.
"""
import argparse
import pathlib
import statistics
import subprocess
import time

import torch

RULES = {"adamw": lambda p: torch.optim.AdamW(p, fused=True),
         "adam": lambda p: torch.optim.Adam(p, fused=True),
         "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True)}


def ours(rule, arguments):
    """{row: milliseconds} of a run of optimizer_bench."""
    out = subprocess.run(
        [arguments.bench, f"--sections={rule}", f"--rounds={arguments.rounds}",
         f"--elements={arguments.elements}", f"--threads={arguments.threads}"],
        check=True, capture_output=True, text=True).stdout
    rows = {}
    for line in out.splitlines():
        fields = line.rsplit(maxsplit=6)
        if len(fields) == 7 and fields[1].isdigit():
            rows[fields[0]] = float(fields[2])
    return rows


class Torch:
    def __init__(self, rule, gradient):
        self.parameter = torch.nn.Parameter(torch.zeros_like(gradient))
        self.gradient = gradient
        self.optimizer = RULES[rule]([self.parameter])

    def step(self, clip):
        # Touched shortly before, as a push is.
        self.parameter.grad = self.gradient.clone()
        begin = time.perf_counter()
        if clip:
            torch.nn.utils.clip_grad_norm_([self.parameter], 1.0)
        self.optimizer.step()
        return 1e3 * (time.perf_counter() - begin)

    def rows(self, rounds):
        times = {False: [], True: []}
        for round_ in range(-1, rounds):
            for clip in times:
                milliseconds = self.step(clip)
                if round_ >= 0:
                    times[clip].append(milliseconds)
        self.parameter.grad = None
        return {"torch, fused": statistics.median(times[False]),
                "torch, clip_grad_norm_ and fused": statistics.median(times[True])}


def main():
    here = pathlib.Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rule", type=lambda text: text.split(","), default=list(RULES),
                        help="of adamw, adam and sgd, with commas; default: all")
    parser.add_argument("--bench", default=here.parent / "build/release/bin/optimizer_bench")
    parser.add_argument("--elements", type=int, default=100_000_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5, help="of each row in a turn")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if not set(arguments.rule) <= set(RULES):
        parser.error(f"--rule: of {', '.join(RULES)}")
    torch.set_num_threads(arguments.threads)
    gradient = torch.arange(arguments.elements, dtype=torch.float32).remainder_(1000).mul_(1e-3).sub_(0.3)
    theirs = {rule: Torch(rule, gradient) for rule in arguments.rule}
    turns = {rule: [] for rule in arguments.rule}
    for _ in range(arguments.turns):
        for rule in arguments.rule:
            turns[rule].append(ours(rule, arguments) | theirs[rule].rows(arguments.rounds))
    print(f"torch {torch.__version__}, {arguments.elements} parameters, {arguments.threads} threads, "
          f"{arguments.turns} turns of {arguments.rounds} rounds")
    for rule in arguments.rule:
        print(f"{rule:<34} {'ms':>8} {'ratio':>8} {'lowest':>8} {'highest':>8}")
        for row in turns[rule][0]:
            milliseconds = statistics.median(turn[row] for turn in turns[rule])
            ratios = [turn[row] / turn["step, clipped"] for turn in turns[rule]]
            print(f"{row:<34} {milliseconds:>8.1f} {statistics.median(ratios):>8.2f} {min(ratios):>8.2f} "
                  f"{max(ratios):>8.2f}")


if __name__ == "__main__":
    main()
