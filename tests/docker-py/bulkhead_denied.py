"""A plugin of pytest's: tests that denied.txt names are not run, and the list may name nothing else.

A line is `FILE::[CLASS::]TEST  # why`, `FILE::CLASS  # why` for a whole class, or `FILE  # why` for a whole file, below
tests/integration/. With BULKHEAD_TRY_DENIED set they are run all the same: what is reported as XPASS can be taken off
the list.
"""

import os
import pathlib

import pytest

LIST = pathlib.Path(__file__).with_name("denied.txt")


def denied():
    """Names and reasons, in the list's order."""
    found = {}
    for line in LIST.read_text().splitlines():
        name, separator, reason = line.partition("#")
        if not name.strip():
            continue
        if not separator or not reason.strip():
            raise pytest.UsageError(f"{LIST.name}: no reason for {name.strip()}")
        if name.strip() in found:
            raise pytest.UsageError(f"{LIST.name}: {name.strip()} stands in it twice")
        found[name.strip()] = reason.strip()
    return found


def pytest_ignore_collect(collection_path):
    """Whole files are not even imported: they may need what is not here."""
    return True if collection_path.name in denied() else None


def pytest_report_header(config):
    return f"denied: {len(denied())} lines of {LIST.name}"


def pytest_collection_modifyitems(config, items):
    reasons = denied()
    used = {name for name in reasons if "::" not in name}
    for item in items:
        name = item.nodeid.split("/")[-1]
        plain = name.partition("[")[0]
        for entry in (plain, plain.rpartition("::")[0]):
            if entry in reasons:
                used.add(entry)
                why = "denied: " + reasons[entry]
                tried = os.environ.get("BULKHEAD_TRY_DENIED")
                item.add_marker(pytest.mark.xfail(reason=why) if tried else pytest.mark.skip(reason=why))
    unused = [name for name in reasons if name not in used]
    if unused and os.environ.get("BULKHEAD_WHOLE_SUITE"):
        raise pytest.UsageError(f"{LIST.name} names what is no test: {', '.join(unused)}")
