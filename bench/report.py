"""Turns results into ratios, tables and a plot, and writes them into the docs."""

import json
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "benchmark.md"
PLOT = DOCS / "images" / "benchmark.svg"
BEGIN, END = "<!-- written by bench/run.sh -->", "<!-- end -->"


def median(values):
    values = sorted(values)
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


class Ratio:
    """One of each round, so that what slows the machine for a while slows both sides."""

    def __init__(self, values):
        self.median, self.least, self.most = median(values), min(values), max(values)

    def __str__(self):
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def compare(turns, mine, other, key, minus=None):
    """`minus` names whose value is taken off both first, in each round."""
    def values(name):
        rounds = [turn[key] for turn in turns[name]]
        return [v - m[key] for v, m in zip(rounds, turns[minus])] if minus else rounds

    return Ratio([m / o for m, o in zip(values(mine), values(other))])


def dearest(turns, name, loads):
    """The dearest of several loads, beside the first of them."""
    first, *others = (f"{name} {load}" for load in loads)
    ratios = [compare(turns, other, first, "cpu_us") for other in others]
    return max(ratios, key=lambda ratio: ratio.median)


def ratios(scenarios, instructions):
    """What the short form holds against the last full run."""
    turns = scenarios["core"]["turns"]
    return {
        "processor time, gateway / Envoy": compare(turns, "gateway 10x10", "Envoy 10x10", "cpu_us"),
        "processor time, gateway / bridge": compare(turns, "gateway 10x10", "bridge 10x10", "cpu_us"),
        "instructions, gateway / bridge": Ratio([instructions["gateway"] / instructions["bridge"]]),
    }


def goals(results):
    """Goal, limit, what was measured (as a number and as text)."""
    scenarios = results["scenarios"]
    core, one = scenarios["core"]["turns"], scenarios["one call"]["turns"]
    loads, even = (scenarios[name]["turns"] for name in ("loads", "evenly spaced"))
    resident = {name: kib[0] for name, kib in scenarios["core"]["memory_kib"].items()}

    def ratio(text, limit, measured, at_least=False):
        met = measured.median >= limit if at_least else measured.median <= limit
        bound = f"at {'least' if at_least else 'most'} {limit:.2f}"
        return text, bound, str(measured), met

    def flat(text, turns, points):
        text, bound, shown, met = ratio(text, 1.15, dearest(turns, "gateway", points))
        others = ", ".join(f"{name} {dearest(turns, name, points).median:.2f}"
                           for name in ("Envoy", "bridge"))
        return text, bound, f"{shown}; {others}", met

    def amount(text, limit, unit, measured, shown):
        return text, f"below {limit} {unit}", shown, measured < limit

    memory = resident["gateway"] / resident["Envoy"]
    idle, flight = results["memory"]["idle"], results["memory"]["in flight"]
    start = median(results["start"]["gateway"])
    return [
        ratio("Processor time per call / Envoy's, 100 in flight", 0.40,
              compare(core, "gateway 10x10", "Envoy 10x10", "cpu_us")),
        ratio("Processor time per call / the bridge's", 1.00,
              compare(core, "gateway 10x10", "bridge 10x10", "cpu_us")),
        ratio("Median latency that is added to a single call / that of Envoy", 0.35,
              compare(one, "gateway 1x1", "Envoy 1x1", "p50_us", minus="API alone")),
        ratio("Calls per second on 2 processors / Envoy's with 2 workers", 2.20,
              compare(core, "gateway 10x10", "Envoy, 2 workers 10x10", "per_second"), at_least=True),
        ("Resident memory under load / Envoy's", "at most 0.25",
         f"{memory:.3f} ({resident['gateway'] / 1024:.1f} of {resident['Envoy'] / 1024:.1f} MiB)",
         memory <= 0.25),
        flat("Processor time per call from 10 to 5,000 in flight, the dearest / 10", loads,
             ["10x1", "10x10", "10x100", "50x100"]),
        flat("Processor time per call from 1 to 1,000 connections, 2,000 evenly spaced calls per "
             "second, the dearest / 1", even, ["1", "10", "100", "1000"]),
        flat("The same with as many calls as go: 100 in flight on 1 connection, 1,000 on 1,000",
             loads, ["1x100", "10x10", "1000x1"]),
        amount("Memory of an idle connection", 20, "KiB", idle["gateway"], f"{idle['gateway']:.1f} KiB"),
        amount("Memory of a call in flight", 16, "KiB", flight["gateway"],
               f"{flight['gateway']:.1f} KiB"),
        amount("From exec to the end of the first call", 20, "ms", start, f"{start:.1f} ms"),
    ]


def row(*cells):
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def table(head, rows):
    return "\n".join([row(*head), row(*["---"] * len(head)), *(row(*cells) for cells in rows)])


def goals_table(results):
    rows = [(text, bound, shown, "yes" if met else "**no**")
            for text, bound, shown, met in goals(results)]
    return table(["goal", "bound", "measured", "met"], rows)


def scenario_table(turns):
    """Medians of all rounds."""
    columns = [
        ("processor time, µs", "cpu_us", 1, 1),
        ("calls per second", "per_second", 1, 0),
        ("p50, ms", "p50_us", 1000, 2),
        ("p99, ms", "p99_us", 1000, 2),
        ("p99.9, ms", "p999_us", 1000, 2),
    ]

    def cell(rounds, key, unit, digits):
        values = [turn[key] / unit for turn in rounds if key in turn]
        return f"{median(values):,.{digits}f}" if values else ""

    rows = [(name, *(cell(rounds, *column) for _, *column in columns))
            for name, rounds in turns.items()]
    head = ["contestant, connections (x calls on each)", *(title for title, *_ in columns)]
    return table(head, rows)


def rest_tables(results):
    parts = []
    if "core" in results["scenarios"]:
        memory = results["scenarios"]["core"]["memory_kib"]
        parts.append("Memory after `core`, in MiB:\n\n" + table(
            ["contestant", "resident", "at most"],
            [(name, f"{now / 1024:.1f}", f"{most / 1024:.1f}") for name, (now, most) in memory.items()],
        ))
    if "memory" in results:
        kinds = results["memory"]
        parts.append("Memory of one, in KiB:\n\n" + table(
            ["contestant", *kinds],
            [(name, *(f"{kind[name]:.1f}" for kind in kinds.values())) for name in kinds["idle"]],
        ))
    if "start" in results:
        parts.append("From exec to the end of the first call, in ms:\n\n" + table(
            ["contestant", "median", "least", "most"],
            [(name, *(f"{v:.1f}" for v in (median(times), min(times), max(times))))
             for name, times in results["start"].items()],
        ))
    if "instructions" in results:
        parts.append("Instructions in user space for one call (callgrind; 10 connections, one call "
                     "at a time on each):\n\n" + table(
            ["contestant", "instructions"],
            [(name, f"{count:,.0f}") for name, count in results["instructions"].items()],
        ))
    return parts


def partial(results):
    """Of a run that was told to measure only some."""
    parts = [f"{name}\n\n{scenario_table(scenario['turns'])}"
             for name, scenario in results["scenarios"].items()]
    return "\n\n".join(parts + rest_tables(results))


def write(results):
    """Writes the page and the plot; says how many goals are missed."""
    m = results["machine"]
    parts = [
        f"Gateway {m['gateway']}, Envoy {m['envoy']}; {m['processors']} processors ({m['processor']}), "
        f"{m['memory_gib']} GiB, Linux {m['kernel']}; load before the run: {m['load_before']:.1f}.",
        goals_table(results),
        "![Processor time per call, and calls per second](images/benchmark.svg)",
    ]
    for name, scenario in results["scenarios"].items():
        parts.append(f"### {name}\n\n{scenario_table(scenario['turns'])}")
    parts += ["### Memory, start, instructions", *rest_tables(results)]
    page = PAGE.read_text()
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    PAGE.write_text(before + BEGIN + "\n\n" + "\n\n".join(parts) + "\n\n" + END + after)
    plot(results)
    return sum(not met for *_, met in goals(results))


def plot(results):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmark"
    from matplotlib import pyplot

    figure, (bars, lines) = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    core = results["scenarios"]["core"]["turns"]
    names = sorted(core, key=lambda name: median([turn["cpu_us"] for turn in core[name]]), reverse=True)
    costs = [[turn["cpu_us"] for turn in core[name]] for name in names]
    middles = [median(cost) for cost in costs]
    spread = [[m - min(c) for m, c in zip(middles, costs)], [max(c) - m for m, c in zip(middles, costs)]]
    bars.barh([name.rsplit(" ", 1)[0] for name in names], middles, xerr=spread, capsize=3,
              color=["tab:blue" if name.startswith("gateway") else "silver" for name in names])
    bars.set_xlabel("processor time per call, µs (100 in flight)")

    loads = results["scenarios"]["loads"]["turns"]
    steps = {10: "10x1", 100: "10x10", 1000: "10x100", 5000: "50x100"}
    for name in ("Envoy", "gateway", "bridge"):
        middles = [median([turn["cpu_us"] for turn in loads[f"{name} {load}"]])
                   for load in steps.values()]
        lines.plot(list(steps), middles, marker="o", label=name)
    lines.set_xscale("log")
    lines.set_ylim(bottom=0)
    lines.set_xlabel("calls in flight")
    lines.set_ylabel("processor time per call, µs")
    lines.legend()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    # The page again, from the results of the last run.
    write(json.loads((Path(__file__).parent / ".run" / "results.json").read_text()))
