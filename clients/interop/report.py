"""Says what passed and what failed, a line for each check."""

import threading
from collections.abc import Callable
from contextlib import contextmanager


class Report:
    lock = threading.Lock()
    passed = 0
    failed = 0

    def __init__(self, client: str) -> None:
        self.client = client

    @contextmanager
    def check(self, name: str):
        problem = None
        try:
            yield
        except AssertionError as error:
            problem = str(error) or "an assertion failed"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        with Report.lock:
            if problem is None:
                Report.passed += 1
                print(f"ok      {self.client}: {name}", flush=True)
            else:
                Report.failed += 1
                print(f"FAILED  {self.client}: {name}", flush=True)
                print("  " + problem.replace("\n", "\n  "), flush=True)


def patiently(check: Callable[[], None]) -> None:
    """For clients that must retry: on a busy machine an answer takes 100 ms, has got its headers
    early, and is not retried."""
    for attempt in range(3):
        try:
            return check()
        except AssertionError:
            if attempt == 2:
                raise
