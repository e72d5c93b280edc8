"""What was checked, and what came of it."""

passed = failed = 0


def check(what, holds, *shown):
    global passed, failed
    passed, failed = (passed + 1, failed) if holds else (passed, failed + 1)
    print(f"  {'ok     ' if holds else 'FAILED '} {what}", flush=True)
    if not holds:
        for thing in shown[:5]:
            print(f"           {thing}")


def check_known(what, holds, why):
    """A check that is known to fail, and why. It is reported; if it holds, this suite is wrong."""
    if holds:
        check(f"this holds now, and is to be checked: {what}", False)
    else:
        print(f"  known   does not hold: {what}\n           {why}", flush=True)


def show(value, what):
    """A figure that is reported, not checked."""
    print(f"    {value:>7} {what}")
