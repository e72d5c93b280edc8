"""The faults that creates meet at random, and the times that belong to them."""

import re

from harness.process import ROOT

# How long one request upstream may take: short, because silences last that long.
REQUEST_TIMEOUT = 2.0

# A batch may still be created after its caller has left.
AFTERWARDS = REQUEST_TIMEOUT + 0.5

# Less than the upstream's silences: the deadline of every fifth call.
HURRY = REQUEST_TIMEOUT / 2

OWN_FAULTS = """
status-429 status-500 status-400 proxy-502 proxy-503 lost-502 lost-503 lost-504
reset-before-create reset-after-create close-before-create close-after-create
half-answer unfinished-answer empty-answer html-answer no-id-answer gzip-answer
many-headers-answer gzip-503 silence-after-create silence-before-create delay-150 stale
""".split()


def intermediaries():
    """Responses of everybody in between, before the API has processed the request and after: the
    last table of docs/simulator.md."""
    page = (ROOT / "docs" / "simulator.md").read_text()
    forms = re.findall(r"^\| `([^`]+)` \| (before|after|either) \| \d+ \|", page, re.M)
    return [
        name + ending
        for name, when in forms
        for ending in {"before": [""], "after": ["-after"], "either": ["", "-after"]}[when]
    ]


# Half of them are of everybody in between. The gateway itself repeats a 503 of the API now and
# then: only many of them let Envoy see some.
BETWEEN = intermediaries()
FAULTS = 40 * ["status-503"] + len(BETWEEN) // len(OWN_FAULTS) * OWN_FAULTS + BETWEEN

# And where it matters that retries come.
REFUSALS = FAULTS + len(FAULTS) * ["status-503"]
