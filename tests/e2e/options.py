"""The options of these tests. A plugin, which pytest loads before it looks for paths among its
arguments: in a conftest.py the value of `--gateway` would be taken for one."""

from pathlib import Path


def pytest_addoption(parser):
    parser.addoption(
        "--gateway", type=Path,
        help="the gateway's binary, as a path from the repository's root; by default "
        "target/debug/aep-batch-gateway, for the suite load a release build",
    )  # fmt: skip
    parser.addoption(
        "--calls", type=int, default=300,
        help="calls of each test with random faults: 300 by default, 3000 for a full run",
    )  # fmt: skip
    parser.addoption(
        "--seconds", type=int, help="of each test of the suite load; by default 60, 600 and 10"
    )
