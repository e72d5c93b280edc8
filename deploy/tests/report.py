"""What the suite says and counts; and how it runs programs."""

import os
import subprocess
import sys
from pathlib import Path

GATEWAY, CRDS = sys.argv[1], [Path(path) for path in sys.argv[2:]]
DEPLOY = Path(__file__).resolve().parent.parent
TOOLS = DEPLOY.parent / "target/ci/deploy"
HELM, *OLDER_HELMS = [TOOLS / f"bin/helm-{version}" for version in os.environ["HELMS"].split()]
KUBECONFORM = TOOLS / f"bin/kubeconform-{os.environ['KUBECONFORM']}"
CHART = DEPLOY / "chart" / "aep-batch-gateway"
EXAMPLES = sorted((DEPLOY / "examples").glob("*.yaml"))

passed = failed = 0


def check(what, problems):
    """`problems`: a list of what is wrong, or whether something is."""
    global passed, failed
    passed, failed = (passed, failed + 1) if problems else (passed + 1, failed)
    print(f"{'FAILED ' if problems else 'ok     '} {what}", flush=True)
    if isinstance(problems, list):
        for problem in problems[:10]:
            print("          " + str(problem).replace("\n", "\n          "))


def run(*command, text=None):
    done = subprocess.run(
        [str(part) for part in command], input=text, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr
