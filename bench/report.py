#!/usr/bin/env python3
"""The table, the JSON and the plots of what bench/run.sh measured: report.py FOLDER."""
import argparse
import glob
import json
import os
import platform
import statistics
from html import escape

MIB = 1 << 20

# Title, row, subject, baseline, target. Of seconds: baseline / subject, at least the target.
RATIOS = [
    ("fetch into memory / raw TCP", "fetch", "fetch, verified", "raw TCP", 1.0),
    ("the same without digests", "fetch", "fetch, no digests", "raw TCP", None),
    ("the same into new memory", "fetch", "fetch, new memory", "raw TCP", None),
    ("push up to the step / raw TCP", "push", "push", "raw TCP", 1.0),
    ("push and SGD step / raw TCP", "push", "push and SGD step", "raw TCP", None),
    ("fetch / C++ stubs", "fetch", "fetch, verified", "C++ stubs", 1.5),
    ("fetch / Python stubs", "fetch", "fetch, verified", "Python stubs", 3.0),
    ("fetch to a file on tmpfs / raw TCP", "file", "fetch to file", "raw TCP to file", 0.9),
    ("fetch with digests / without", "fetch", "fetch, verified", "fetch, no digests", 0.95),
    ("8 readers / one, aggregate", "fanout", "8 readers", "one reader", 0.9),
    ("1 KiB tensors / one tensor", "small", "many tensors", "one tensor", 0.7),
    ("ListParameters / built per call", "unary", "ListParameters", "built per call", 2.0),
    ("the same, server CPU", "unary", "ListParameters, server CPU", "built per call, server CPU",
     None),
]
# Here the subject is to have no more: subject / baseline, at most the target.
COSTS = [
    ("8 readers / one, server CPU a byte", "fanout", "8 readers, server CPU",
     "one reader, server CPU", 1.0),
]
# MiB, at most.
LIMITS = [
    ("memory beyond the payload, receiver, MiB", "memory", "receiver", 48),
    ("memory a stream, sender, MiB", "memory", "sender, each of 8 streams", 4),
]
NOT_MEASURED = [("TLS 1.3 fetch / stubs over TLS", 1.3, "no TLS in the server yet")]


def load(folder):
    """Row name -> list of runs, each {"row", "bytes", "values"}."""
    runs = {}
    for path in sorted(glob.glob(os.path.join(folder, "*.run*.json"))):
        with open(path) as file:
            run = json.load(file)
        runs.setdefault(run["row"], []).append(run)
    return runs


def quotients(runs, row, above, below):
    """Per run, above/below of each round; empty where one was not measured."""
    found = []
    for run in runs.get(row, []):
        values = run["values"]
        if above in values and below in values:
            found.append([a / b if b else float("nan")
                          for a, b in zip(values[above], values[below])])
    return found


def line(title, baseline, per_run, target, at_most=False):
    if not per_run:
        return {"title": title, "target": target, "note": "not measured"}
    medians = [statistics.median(rounds) for rounds in per_run]
    every = sorted(value for rounds in per_run for value in rounds)
    median = statistics.median(medians)
    met = None if target is None else (median <= target if at_most else median >= target)
    return {"title": title, "baseline": baseline, "median": median, "medians_of_runs": medians,
            "low": every[0], "high": every[-1], "target": target, "at_most": at_most, "met": met}


def table(runs):
    lines = [line(title, base, quotients(runs, row, base, subject), target)
             for title, row, subject, base, target in RATIOS]
    lines += [line(title, base, quotients(runs, row, subject, base), target, True)
              for title, row, subject, base, target in COSTS]
    lines += [line(title, "", [[v / MIB for v in run["values"][subject]]
                               for run in runs.get(row, []) if subject in run["values"]],
                   target, True)
              for title, row, subject, target in LIMITS]
    lines += [{"title": title, "target": target, "note": "not measured: " + why}
              for title, target, why in NOT_MEASURED]
    return lines


def markdown(lines):
    out = ["| what | median | of each run | lowest to highest | target | |",
           "|---|---|---|---|---|---|"]
    for entry in lines:
        target = "" if entry["target"] is None else f"{entry['target']:g}"
        if "median" not in entry:
            out.append(f"| {entry['title']} | | | | {target} | {entry['note']} |")
            continue
        sign = "≤ " if entry["at_most"] else "≥ "
        met = {None: "", True: "met", False: "missed"}[entry["met"]]
        each = ", ".join(f"{value:.2f}" for value in entry["medians_of_runs"])
        out.append(f"| {entry['title']} | {entry['median']:.2f} | {each} | {entry['low']:.2f} to "
                   f"{entry['high']:.2f} | {sign + target if target else ''} | {met} |")
    return "\n".join(out)


def plot(row, runs):
    """A line of dots, one a round, for each thing measured."""
    names = sorted(set(name for run in runs for name in run["values"]))
    seconds = row != "memory"
    values = {name: [v if seconds else v / MIB for run in runs for v in run["values"].get(name, [])]
              for name in names}
    top = max(max(v) for v in values.values()) * 1.05 or 1
    left, width, step = 230, 480, 28
    height = step * len(names) + 50
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 30}" height="{height}" '
           'font-family="sans-serif" font-size="12">',
           '<rect width="100%" height="100%" fill="white"/>']
    for tick in range(6):
        x = left + width * tick / 5
        svg.append(f'<line x1="{x}" y1="10" x2="{x}" y2="{height - 40}" stroke="#ddd"/>')
        svg.append(f'<text x="{x}" y="{height - 25}" text-anchor="middle">{top * tick / 5:.3g}'
                   '</text>')
    unit = "seconds" if seconds else "MiB"
    svg.append(f'<text x="{left + width / 2}" y="{height - 8}" text-anchor="middle">{unit}; '
               'a dot a round, a bar at the median</text>')
    for i, name in enumerate(names):
        y = 10 + step * i + step / 2
        svg.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        for value in values[name]:
            svg.append(f'<circle cx="{left + width * value / top:.1f}" cy="{y}" r="3" '
                       'fill="#1f77b4" fill-opacity="0.5"/>')
        x = left + width * statistics.median(values[name]) / top
        svg.append(f'<line x1="{x:.1f}" y1="{y - 9}" x2="{x:.1f}" y2="{y + 9}" stroke="#d62728" '
                   'stroke-width="2"/>')
    return "\n".join(svg + ["</svg>"]) + "\n"


def machine():
    model = "unknown"
    with open("/proc/cpuinfo") as file:
        for text in file:
            if text.startswith("model name"):
                model = text.split(":", 1)[1].strip()
    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) // MIB
    with open("/proc/sys/net/ipv4/tcp_congestion_control") as file:
        congestion = file.read().strip()
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": memory,
            "kernel": platform.release(), "congestion_control_of_the_host": congestion}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--size", default="")
    parser.add_argument("--rounds", type=int, default=0)
    arguments = parser.parse_args()
    runs = load(arguments.folder)
    lines = table(runs)
    text = markdown(lines)
    print(text)
    with open(os.path.join(arguments.folder, "table.txt"), "w") as file:
        file.write(text + "\n")
    with open(os.path.join(arguments.folder, "results.json"), "w") as file:
        json.dump({"machine": machine(),
                   "settings": {"size": arguments.size, "rounds": arguments.rounds},
                   "table": lines, "runs": runs}, file, indent=1)
        file.write("\n")
    for row, of_row in runs.items():
        with open(os.path.join(arguments.folder, f"{row}.svg"), "w") as file:
            file.write(plot(row, of_row))


if __name__ == "__main__":
    main()
