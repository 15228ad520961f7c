"""One BatchNorm site at a time: forward, backward and both, against everything that computes the same, and the copy floor."""

from __future__ import annotations

import pytest
from contenders import make_case, verify
from timing import Contender, alternate, bandwidth, medians, ratios


@pytest.fixture(scope="module")
def verified(request, settings, compiler_cache):
    """A site's case and its contenders' functions, which have been found to agree; otherwise nothing of it is timed."""
    site, compiled = request.param
    case = make_case(site, *settings.tensors)
    functions = case.functions(compiled)
    verify(case, functions)
    return case, functions


def test_site(verified, direction, benchmark, settings, machine, counts, record):
    case, functions = verified
    contenders = case.contenders(functions, direction) | {"copy": Contender(lambda _: machine.copy())}
    times = alternate(benchmark, contenders, machine, settings.limits)
    copies = times.pop("copy")
    record.copies += copies
    moved = case.site.passes(direction) * case.x.numel() * case.x.element_size()  # bytes
    times["floor"] = [moved / bandwidth(seconds) for seconds in copies]
    result = {
        "site": str(case.site),
        "networks": counts[case.site],
        "direction": direction,
        "bytes": moved,
        "rounds": len(copies),
        "seconds": medians(times),
        "ratios": ratios(times),
    }
    if settings.device.type == "cuda":
        result["waited_for_host"] = benchmark.extra_info["waited_for_host"]
    record.cases["operators"].append(result)
