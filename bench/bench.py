"""Measures the gateway beside its peers. Started by run.sh, which says what it can be told."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import contestants
import load
import report
from contestants import CONTESTANTS, LOGS, RUN, Api, Failed, Program, free_port

MAIN = ["gateway", "bridge", "Envoy"]
FULL = [*MAIN, "vanguard-go"]

# Connections, and the most calls in flight on each. 256 are allowed on one.
USUAL = (10, 10)
LOADS = [(10, 1), USUAL, (10, 100), (50, 100), (1, 100), (1000, 1)]
EVENLY = [(1, None), (10, None), (100, None), (1000, None)]  # evenly spaced calls


@dataclass
class Scenario:
    names: list
    loads: list = field(default_factory=lambda: [USUAL])
    kind: str = "http1"  # how the API is spoken to
    kilobytes: str = "0.6"  # of its answer
    latency_ms: int = 0
    rate: int | None = None  # calls per second in all, evenly; otherwise as many as go
    rounds: int = 1  # for each that is asked for: more where noise is large beside the difference
    share: float = 1  # of the seconds, for each of them


SCENARIOS = {
    "core": Scenario([name for name in CONTESTANTS if name != "other gateway"]),
    "one call": Scenario(FULL, [(1, 1)], rounds=9, share=1 / 3),
    "loads": Scenario(MAIN, LOADS),
    "evenly spaced": Scenario(MAIN, EVENLY, rate=2000),
    "HTTP/2 API": Scenario(FULL, kind="h2c"),
    "TLS API": Scenario(FULL, kind="tls"),
    "6 KB": Scenario(FULL, kilobytes="6"),
    "60 KB": Scenario(FULL, kilobytes="60"),
    "50 ms": Scenario(MAIN, [(50, 100)], latency_ms=50),
}

# The ratios that may not grow: by how much before the short form fails, and the bound under which
# it never does (the goal). Processor time depends on the machine, so its ratios do too; instructions
# hardly. A mood is no regression, so the best round counts.
REGRESSIONS = {
    "processor time, gateway / Envoy": (1.25, 0.40),
    "processor time, gateway / bridge": (1.25, 1.00),
    "instructions, gateway / bridge": (1.05, 0),
}
RESULTS = RUN / "results.json"
BASELINE = Path(__file__).parent / "baseline.json"


def say(text):
    print(text, flush=True)


def run_scenario(name, rounds, seconds, only=None):
    """Every round is one turn of each contestant under each load, in another order."""
    scenario = SCENARIOS[name]
    rounds, seconds = rounds * scenario.rounds, seconds * scenario.share
    names = [known for known in only or [*scenario.names, "other gateway"] if known in CONTESTANTS]
    say(f"{name}: {', '.join(names)}")
    programs, results = {}, {}
    api = Api()
    try:
        api.set(scenario.kilobytes, scenario.latency_ms)
        for known in names:
            programs[known] = CONTESTANTS[known](api, scenario.kind)
        turns = [(known, pair) for pair in scenario.loads for known in names]
        if name == "one call":
            turns.append(("API alone", None))
        for number in range(rounds):
            first = number * len(turns) // rounds
            for known, pair in turns[first:] + turns[:first]:
                if pair is None:
                    turn, key = load.measure_api(api, seconds, 0.3), known
                else:
                    # Each call in flight may need a connection to the API, and its time.
                    more = 0.3 if scenario.rate else pair[0] * pair[1] / 1500
                    turn = load.measure(
                        programs[known], api, *pair, max(seconds, more), 0.3 + more, scenario.rate
                    )
                    key = f"{known} {'x'.join(str(part) for part in pair if part)}"
                results.setdefault(key, []).append(turn)
                say("  " + f"{key:32}" + "".join(f"{n} {v:10.1f}  " for n, v in turn.items()))
        memory = {known: programs[known].memory() for known in names}
        return {"turns": results, "memory_kib": memory}
    finally:
        for program in [api, *programs.values()]:
            program.stop()


def resident(program, settle=2):
    time.sleep(settle)
    return program.memory()[0]


def warm(program, count=1000):
    """So that what is there once is there."""
    load.size_of_answer(program)
    load.Load(load.url(program), 10, 10, ["-n", str(count)]).ends()


def memory_of_idle_connections(api, name, count):
    program = CONTESTANTS[name](api, "http1")
    try:
        warm(program)
        before = resident(program)
        idle = load.IdleConnections(program, count)
        each = (resident(program) - before) / count
        idle.close()
        return each
    finally:
        program.stop()


def memory_of_calls_in_flight(api, name, kind, connections=50, streams=100):
    """Of calls that the API has taken, and does not answer."""
    count = connections * streams
    api.set("0.6", 0)
    program = CONTESTANTS[name](api, kind)
    try:
        warm(program)
        before, creates = resident(program), api.creates()
        api.set("0.6", 60_000)
        calls = load.Load(load.url(program), connections, streams, ["-n", str(count)])
        try:
            end = time.monotonic() + 60
            while api.creates() - creates < count:
                if time.monotonic() > end:
                    raise Failed(f"{name}: {api.creates() - creates} calls came through, not {count}")
                time.sleep(0.1)
            return (resident(program) - before) / count
        finally:
            calls.stop()
    finally:
        program.stop()


def run_memory(idle):
    say(f"memory: {idle} idle connections, 5000 calls in flight")
    results = {"idle": {}, "in flight": {}, "in flight, HTTP/2 API": {}}
    api = Api()
    try:
        for name in MAIN:
            api.set("0.6", 0)
            results["idle"][name] = memory_of_idle_connections(api, name, idle)
            results["in flight"][name] = memory_of_calls_in_flight(api, name, "http1")
            results["in flight, HTTP/2 API"][name] = memory_of_calls_in_flight(api, name, "h2c")
            say("  " + f"{name:32}" + "".join(f"{k} {v[name]:.1f} KiB  " for k, v in results.items()))
    finally:
        api.stop()
    return results


def run_starts(rounds):
    """Milliseconds from exec to the end of the first call."""
    say("start")
    api = Api()
    commands = {
        "gateway": lambda p: contestants.gateway_command(
            contestants.GATEWAY, api, "http1", p, free_port()
        ),
        "bridge": lambda p: contestants.bridge_command(api, "http1", p, 1),
        "Envoy": lambda p: contestants.envoy_command(api, "http1", p, 1),
    }
    results = {}
    try:
        for _ in range(rounds):
            for name, command in commands.items():
                began = time.perf_counter()
                program = Program(f"start-{name}", command(port := free_port()))
                try:
                    while not contestants.takes_connections(port):
                        if program.process.poll() is not None:
                            raise Failed(f"{name} ended at once; see {program.log}")
                        time.sleep(0.0002)
                    program.port = port
                    load.IdleConnections(program, 1).close()
                    results.setdefault(name, []).append((time.perf_counter() - began) * 1000)
                finally:
                    program.stop()
    finally:
        api.stop()
    for name, times in results.items():
        say(f"  {name:32}{report.median(times):.1f} ms")
    return results


# Copies by vector instructions: `rep movsb` would count as one for each byte.
PLAIN_COPIES = ":".join(f"glibc.cpu.x86_rep_{op}_threshold={2**30}" for op in ("movsb", "stosb"))


def instructions(api, name, command, calls):
    """Instructions in user space for one call, as callgrind counts them."""
    out = LOGS / f"callgrind.{name}"
    for old in LOGS.glob(f"callgrind.{name}*"):
        old.unlink()
    port = free_port()
    program = Program(
        f"callgrind-{name}",
        ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", *command(port)],
        GLIBC_TUNABLES=PLAIN_COPIES,
    )
    try:
        program.serves(port, seconds=300)
        size = load.size_of_answer(program)
        load.Load(load.url(program), 10, 1, ["-n", "300"]).ends()

        def control(flag):
            subprocess.run(
                ["callgrind_control", flag, str(program.pid)], check=True, capture_output=True
            )

        control("--zero")
        load.Load(load.url(program), 10, 1, ["-n", str(calls)]).ends().check(size, calls)
        control("--dump")
        dumped = Path(f"{out}.1").read_text()
        return int(re.search(r"^totals: (\d+)", dumped, re.M).group(1)) / calls
    finally:
        program.stop()


def run_instructions(calls=2000):
    say(f"instructions per call, of {calls} calls")
    api = Api()
    try:
        results = {
            "gateway": instructions(api, "gateway", lambda p: contestants.gateway_command(
                contestants.GATEWAY, api, "http1", p, free_port()), calls),
            "bridge": instructions(
                api, "bridge", lambda p: contestants.bridge_command(api, "http1", p, 1), calls
            ),
        }
    finally:
        api.stop()
    for name, count in results.items():
        say(f"  {name:32}{count:,.0f}")
    return results


def machine():
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    envoy = subprocess.run([contestants.ENVOY, "--version"], capture_output=True, text=True).stdout
    gateway = subprocess.run([contestants.GATEWAY, "--version"], capture_output=True, text=True).stdout
    return {
        "processor": model.group(1) if model else platform.machine(),
        "processors": os.cpu_count(),
        "kernel": platform.release().split("-")[0],
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "envoy": re.search(r"/(\d+\.\d+\.\d+)/", envoy).group(1),
        "gateway": gateway.split()[-1],
        "load_before": os.getloadavg()[0],
    }


def check_against_baseline(ratios):
    """Fails where a ratio has grown since the last full run."""
    baseline = json.loads(BASELINE.read_text())
    passed = failed = 0
    for name, (tolerance, goal) in REGRESSIONS.items():
        now, before = ratios[name].least, baseline[name]
        limit = max(before * tolerance, goal)
        ok = now <= limit
        passed, failed = passed + ok, failed + (not ok)
        say(f"{'ok     ' if ok else 'FAILED '} {name}: {now:.2f}, at the last full run {before:.2f}, "
            f"at most {limit:.2f}")
    say(f"{passed} passed, {failed} failed")
    return failed != 0


def short():
    if not BASELINE.exists():
        say(f"cannot run: there is no {BASELINE.name}; a full run writes it")
        return 2
    core = run_scenario("core", rounds=5, seconds=1.5, only=MAIN)
    return check_against_baseline(report.ratios({"core": core}, run_instructions()))


def full(arguments):
    results = {"machine": machine(), "scenarios": {}}
    wanted = arguments.only.split(",") if arguments.only else None
    for name in wanted or []:
        if name not in (*SCENARIOS, "memory", "start", "instructions"):
            raise Failed(f"there is no {name!r}")
    for name in SCENARIOS:
        if not wanted or name in wanted:
            scenario = run_scenario(name, arguments.rounds, arguments.seconds)
            results["scenarios"][name] = scenario
            RESULTS.write_text(json.dumps(results, indent=1))  # something, should the rest fail
    if not wanted or "memory" in wanted:
        results["memory"] = run_memory(arguments.idle)
    if not wanted or "start" in wanted:
        results["start"] = run_starts(20)
    if not wanted or "instructions" in wanted:
        results["instructions"] = run_instructions()
    RESULTS.write_text(json.dumps(results, indent=1))
    if wanted:
        say(report.partial(results))
        return 0
    ratios = report.ratios(results["scenarios"], results["instructions"])
    baseline = {name: round(ratios[name].median, 3) for name in REGRESSIONS}
    BASELINE.write_text(json.dumps(baseline, indent=1) + "\n")
    missed = report.write(results)
    say(f"docs/benchmark.md and its plot are written; {missed} goals are missed")
    return 0


def main():
    parser = argparse.ArgumentParser(prog="run.sh")
    parser.add_argument("--short", action="store_true", help="for CI: ratios against baseline.json")
    parser.add_argument("--only", help="scenarios, separated by commas; writes no docs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--idle", type=int, default=10_000, help="idle connections")
    arguments = parser.parse_args()
    load.write_messages()
    try:
        return short() if arguments.short else full(arguments)
    except Failed as failure:
        say(f"cannot run: {failure}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
