"""Draws docs/images/three-minutes.svg: one gateway through good and bad times, as Prometheus saw it.
Started by `tests/e2e/run.sh plot GATEWAY`."""

import asyncio
import random
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from harness.process import ROOT  # noqa: E402
from harness.programs import Programs  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from prometheus import Callers, Prometheus  # noqa: E402

# Both together: 100 creates a second, at most.
LATENCY, IN_FLIGHT = "200ms", 20

# Name, seconds, calls a second.
PHASES = [
    ("normal", 35, 50),
    ("API misbehaves", 35, 50),
    ("too many calls", 40, 300),
    ("API down", 35, 50),
    ("normal again", 35, 50),
]
FAULTS = ["status-500", "reset-after-create", "lost-504", "status-503", "status-429", "delay-600"]


async def run(simulator, gateway):
    """Lives through the phases; returns when each began."""
    began = []
    callers = [Callers(gateway, seed=seed) for seed in range(4)]

    async def calls(per_second, seconds):
        each = per_second / len(callers)
        await asyncio.gather(
            *[one.steady(each, seconds, external_ids=0.2, deadline=5.0) for one in callers]
        )

    await calls(PHASES[0][2], 6)  # rate() looks back 5 s
    for name, seconds, per_second in PHASES:
        began.append(time.time())
        print(f"{name}: {per_second} calls/s for {seconds} s", flush=True)
        if name == "API down":
            simulator.close()
        if name == "normal again":
            await asyncio.to_thread(simulator.start, "--latency", LATENCY)
        at_work = [calls(per_second, seconds)]
        if name == "API misbehaves":
            at_work.append(misbehave(simulator, seconds))
        await asyncio.gather(*at_work)
    ended = time.time()
    for one in callers:
        await one.end()
    return began, ended


async def misbehave(simulator, seconds):
    """A quarter of the creates meet a fault."""
    dice = random.Random(1)
    for _ in range(seconds):
        simulator.inject(*dice.choices(FAULTS, k=12))
        await asyncio.sleep(1)


def rate(metric, matchers=""):
    return f"sum(rate({metric}{{{matchers}}}[5s]))"


def creates(matchers):
    return rate("aep_gateway_outcomes_total", matchers)


def requests(matchers):
    return rate("http_client_request_duration_seconds_count", matchers)


def quantile(q):
    buckets = 'grpc_server_handling_seconds_bucket{grpc_method="CreateBatch"}'
    return f"histogram_quantile({q}, sum by (le) (rate({buckets}[5s])))"


GREEN, BLUE, GREY, ORANGE, RED = "#3f9b5c", "#3b76af", "#b9bec4", "#e39b3b", "#c63d3d"

CALLS = [
    ("created", GREEN, creates('reason="CREATED"')),
    ("answer lost, batch found again", BLUE, creates('reason="RECOVERED"')),
    ("not created: full", GREY, creates('reason="GATEWAY_OVERLOADED"')),
    ("not created: else", ORANGE, creates('outcome="NOT_APPLIED", reason!="GATEWAY_OVERLOADED"')),
    ("not known", RED, creates('outcome="UNKNOWN"')),
]
REQUESTS = [
    ("2xx", GREEN, requests('http_response_status_code=~"2.."')),
    ("429", ORANGE, requests('http_response_status_code="429"')),
    ("5xx", RED, requests('http_response_status_code=~"5.."')),
    ("no answer", GREY, requests('http_response_status_code=""')),
]


def draw(prometheus, began, ended):
    start = began[0]

    def points(query):
        """Seconds since the start, and values; 0 where there is no series yet."""
        answer = prometheus.api(
            "query_range", query=f"{query} or vector(0)", start=start, end=ended, step=2
        )
        values = answer["result"][0]["values"]
        return [at - start for at, _ in values], [float(value) for _, value in values]

    plt.rcParams |= {
        "svg.fonttype": "none", "svg.hashsalt": "", "font.family": "sans-serif", "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    }
    heights = [3, 1.8, 1.6, 2.2, 1]
    figure, plots = plt.subplots(
        5, 1, sharex=True, figsize=(9, 8.4), height_ratios=heights, layout="constrained"
    )
    calls, latency, flying, upstream, memory = plots

    def stack(plot, title, series):
        data = [points(query) for _, _, query in series]
        plot.stackplot(
            data[0][0], *[values for _, values in data], labels=[name for name, _, _ in series],
            colors=[color for _, color, _ in series], linewidth=0,
        )
        name(plot, title)
        plot.set_ylim(bottom=0)

    def name(plot, title):
        plot.set_title(title, loc="left", fontsize=9, fontweight="bold")
        plot.legend(
            loc="center left", bbox_to_anchor=(1, 0.5), reverse=plot in (calls, upstream),
            handlelength=1.2,
        )

    stack(calls, "Calls per second, by what callers were told", CALLS)

    for q, color in [(0.99, RED), (0.5, BLUE)]:
        at, values = points(quantile(q))
        latency.plot(at, values, color=color, label=f"p{q * 100:.0f}", linewidth=1.3)
    latency.set_yscale("log")
    latency.set_yticks([0.001, 0.01, 0.1, 1], ["1 ms", "10 ms", "100 ms", "1 s"])
    latency.minorticks_off()
    name(latency, "How long calls take")
    latency.set_ylim(0.0005, 5)

    at, values = points("sum(aep_gateway_executions_in_flight)")
    flying.plot(at, values, color=BLUE, label="in flight", linewidth=1.3)
    at, values = points("sum(aep_gateway_max_in_flight)")
    flying.plot(at, values, color=RED, label="--max-in-flight", linewidth=1, linestyle="--")
    name(flying, "Creates in flight")
    flying.set_ylim(0, IN_FLIGHT * 1.15)

    stack(upstream, "Requests to the API per second, by answer", REQUESTS)

    at, values = points("sum(process_resident_memory_bytes) / 1e6")
    memory.plot(at, values, color=BLUE, label="resident", linewidth=1.3)
    name(memory, "Memory in MB")
    memory.set_ylim(0, max(40, 1.1 * max(values)))
    memory.set_xlabel("seconds")
    memory.set_xlim(0, ended - start)

    for number, at in enumerate(began):
        until = (began[number + 1 :] or [ended])[0]
        for plot in plots:
            if number % 2:
                plot.axvspan(at - start, until - start, color="#f1f2f4", zorder=-1, linewidth=0)
        calls.annotate(
            PHASES[number][0], ((at + until) / 2 - start, 1.14), xycoords=("data", "axes fraction"),
            ha="center", color="#555555",
        )

    place = ROOT / "docs" / "images" / "three-minutes.svg"
    figure.savefig(place, metadata={"Date": None})
    matplotlib.pyplot.close(figure)
    return place


def main():
    with Programs(Path(sys.argv[1]), "plot") as programs:
        simulator = programs.simulator("--latency", LATENCY)
        gateway = programs.gateway(simulator, "--max-in-flight", IN_FLIGHT, request_timeout=20)
        prometheus = Prometheus(programs, {"plot": gateway})
        began, ended = asyncio.run(run(simulator, gateway))
        time.sleep(2)
        print(draw(prometheus, began, ended))


main()
