"""The gateway behind a real Envoy: runs the scenarios of these modules. Started by run.sh."""

import asyncio
import os
import re
import signal
import subprocess
import sys

import grpc

import balancing
import capacity
import checks
import deadlines
import faults
import propagation
import sidecars
import tls
import web
import xds
from processes import ENVOY, Failed, Stand

LONGEST = 180
MODULES = [balancing, capacity, deadlines, propagation, tls, web, faults, sidecars, xds]


def chosen(wanted):
    """Scenarios by their name, by their number without its letter, or by their module."""
    found = []
    for module in MODULES:
        for scenario in module.SCENARIOS:
            name = scenario[0]
            names = {name, module.__name__, *re.findall(r"^\d+", name)}
            if not wanted or names & set(wanted):
                wanted and found.append(names & set(wanted))
                yield scenario
    missing = set(wanted).difference(*found)
    if missing:
        sys.exit(f"there is no scenario {' '.join(missing)}")


def main():
    gateway = sys.argv[1]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what was started
    version = subprocess.run([ENVOY, "--version"], capture_output=True, text=True).stdout
    envoy = re.search(r"/(\d+\.\d+\.\d+)/", version).group(1)
    print(f"Envoy {envoy}, grpcio {grpc.__version__}, {faults.CALLS} calls with random faults")
    for name, title, scenario, args in chosen(os.environ.get("SCENARIOS", "").split()):
        print(f"\n{name}: {title}", flush=True)
        with Stand(gateway, name) as stand:
            try:
                asyncio.run(asyncio.wait_for(scenario(stand, *args), LONGEST))
            except Failed as failure:
                checks.check("the scenario runs", False, failure)
            except asyncio.TimeoutError:
                checks.check(f"the scenario ends within {LONGEST} s", False)
    print(f"\n{checks.passed} passed, {checks.failed} failed")
    return checks.failed != 0 or checks.passed == 0


if __name__ == "__main__":
    sys.exit(main())
