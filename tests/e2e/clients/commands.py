"""Commands that users run: what they print, and what they do to the ledger."""

import os
import re
import subprocess
from dataclasses import dataclass

from harness.process import ROOT

LIMIT = 60  # seconds that a command may take


@dataclass
class Ran:
    code: int
    text: str
    batches: int  # that it made

    def check(self, code, batches, pattern):
        """Fails unless it ended so, and printed words like these."""
        assert (self.code, self.batches) == (code, batches), self.text
        assert re.search(pattern, self.text, re.S), self.text


def run(simulator, command, folder=ROOT, faults=(), **environment):
    simulator.inject(*faults)
    before = len(simulator.ledger())
    try:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT,
        )  # fmt: skip
    finally:
        simulator.clear_faults()
    return Ran(done.returncode, done.stdout.strip(), len(simulator.ledger()) - before)


def documented(language, has, gateway):
    """The documentation's first program in a language that has these words, for this gateway."""
    pages = [page.read_text() for page in (ROOT / "README.md", ROOT / "clients/README.md")]
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", "".join(pages), re.M | re.S)
    program = next((block for block in blocks if has in block), "")
    assert "127.0.0.1:50051" in program, f"no program in {language} is documented"
    return program.replace("127.0.0.1:50051", gateway.address)
