"""The pages in docs/ that benchmarks fill in: what they say is what their commands print, and the model adds up."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import drop_in  # noqa: E402
import fidelity_cases  # noqa: E402
import recipes_page  # noqa: E402
import report  # noqa: E402
import results_file  # noqa: E402
import scaling  # noqa: E402
import scaling_model  # noqa: E402
import virtual_batches  # noqa: E402

WHERE = {"processor": "a processor", "threads": 1, "cores": 2, "torch": "2", "date": "today", "command": "a command"}
CASES = {
    virtual_batches: {
        "memory": [
            {"batch": 64, "micro_batch": 64, "working_bytes": 5e7, "state_bytes": 2e6},
            {"batch": 65536, "micro_batch": 64, "working_bytes": 5.1e7, "state_bytes": 2.4e9},
            {"batch": 64, "micro_batch": None, "working_bytes": 4.9e7, "state_bytes": 2e6},
        ],
        "time": {
            "batch": 256,
            "micro_batch": 64,
            "pairs": 9,
            "seconds": {"plain": 0.4, "virtual": 0.5},
            "virtual_over_plain": 1.25,
            "forward_over_plain": 0.3,
        },
    },
    scaling: {
        "synchronised": [
            dict(ranks=r, batch=256, micro_batch=32, seconds=4 / r, share_in_all_reduce=0.1, all_reduce_bytes=110080)
            | {"all_reduce_alone_seconds": 0.001}
            for r in (1, 2)
        ],
        "independent": [dict(ranks=r, units=8, batch=64, iterations=40, seconds=30 / r) for r in (1, 2)],
    },
    drop_in: {
        "cases": [
            {
                "loop": "recover_sre2l",
                "network": "resnet18",
                "batch": 16,
                "rounds": 5,
                "seconds": {"eager": 2.0, "bnfuse": 1.0},
                "eager_over_bnfuse": 2.01,
                "losses_apart": 2.3e-7,
                "peak_bytes": {"eager": 1.5e9, "bnfuse": 1e9},
            }
        ]
    },
}
EXPECTED = {
    virtual_batches: (
        "| 65,536 | 51 MB |  | 2,400 MB |",
        "| 64 | 50 MB | 49 MB | 2 MB |",
        "1.25× (median of 9 pairs), where a whole forward pass more would be 1.30×.",
    ),
    scaling: ("| 2 ranks | 2.000 | 2.00× | 10.0% | 1.00 ms |", "an all-reduce of 110 kB", "| 2 ranks | 15.0 | 2.00× |"),
    drop_in: (
        "| `recover_sre2l`, ResNet-18, 16 images | 2000 ms | 1000 ms | 2.01× | 1,500 MB | 1,000 MB | 1.50× | 2e-07 |",
        "medians of 5 rounds",
    ),
}


@pytest.fixture(params=CASES, ids=lambda module: module.NAME)
def module(request, monkeypatch, tmp_path):
    """A benchmark whose page is a copy."""
    pytest.importorskip("matplotlib")
    page = tmp_path / "page.md"
    page.write_text(request.param.PAGE.read_text())
    monkeypatch.setattr(request.param, "PAGE", page)
    if hasattr(request.param, "PICTURE"):
        monkeypatch.setattr(request.param, "PICTURE", tmp_path / "picture.png")
    return request.param


def test_results_become_tables(module, tmp_path):
    module.write_report(CASES[module] | WHERE)
    written = module.PAGE.read_text()
    assert all(text in written for text in EXPECTED[module])
    assert not hasattr(module, "PICTURE") or module.PICTURE.read_bytes().startswith(b"\x89PNG")


def test_pages_show_the_results_that_are_kept(module):
    result = report.RESULTS / f"{module.NAME}.json"
    if not result.is_file():
        pytest.skip("no full run has been kept")
    before = module.PAGE.read_text()
    module.write_report(json.loads(result.read_text()))
    assert module.PAGE.read_text() == before, f"run `{module.COMMAND} --report`"


@pytest.mark.parametrize("mode, other", [("independent", "synchronised"), ("synchronised", "independent")])
def test_a_mode_of_scaling_that_is_not_measured_stays_as_it_was(mode, other, monkeypatch, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(scaling.PAGE.read_text())
    monkeypatch.setattr(scaling, "PAGE", page)
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    monkeypatch.setattr(scaling.torch, "set_num_threads", lambda _: None)
    measured = []

    def measure(name):
        return lambda ranks, *_: measured.append(name) or CASES[scaling][name][0] | {"ranks": ranks, "seconds": 123.0}

    for name in (mode, other):
        monkeypatch.setattr(scaling, name, measure(name))
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--mode", mode])
    with pytest.raises(SystemExit, match=f"has no {other} to keep: measure everything"):
        scaling.main()
    assert not measured
    path = results_file.write_result(scaling.NAME, "a command", **CASES[scaling])
    scaling.main()
    written = json.loads(path.read_text())
    assert measured == [mode] * 3 and written[other] == CASES[scaling][other]
    assert [case["seconds"] for case in written[mode]] == [123.0] * 3 and "123.0" in page.read_text()
    path.write_text(json.dumps(written | {"torch": "another"}))
    with pytest.raises(SystemExit, match="under another torch"):
        scaling.main()
    assert len(measured) == 3


def test_the_recipes_are_what_their_table_says(monkeypatch, tmp_path):
    """Settings and figures that are kept; of a recipe without figures, the settings alone."""
    page = tmp_path / "recipes.md"
    page.write_text(before := recipes_page.PAGE.read_text())
    readme = tmp_path / "README.md"
    readme.write_text(readme_before := recipes_page.README.read_text())
    monkeypatch.setattr(recipes_page, "PAGE", page)
    monkeypatch.setattr(recipes_page, "README", readme)
    recipes_page.write_page()
    assert (page.read_text(), readme.read_text()) == (before, readme_before), "run `python benchmarks/recipes_page.py`"
    assert all(f"| {text} | " in before for text in (*recipes_page.STUDENTS.values(), *recipes_page.DEMO.values()))
    monkeypatch.setattr(recipes_page, "RESULTS", tmp_path)
    monkeypatch.setattr(fidelity_cases, "KEPT", tmp_path)
    recipes_page.write_page()
    assert "--low-resolution-iterations 200" in page.read_text() and "| noise" not in page.read_text()
    case = next(case for case in fidelity_cases.curves(fidelity_cases.PROBLEMS["digits"]) if case.arm == "noise")
    case.kept_at("test").write_text(json.dumps(WHERE | {"accuracy": 0.125, "tested": 400, "teacher_accuracy": 0.99}))
    recipes_page.write_page()
    of_digits, _, others = page.read_text().partition("## cifar10")
    assert "| noise | " in of_digits and "12.5 (9–16)" in of_digits and "| noise" not in others


def test_the_model_is_what_its_command_prints():
    given = scaling_model.Assumptions()
    page = scaling_model.PAGE.read_text()
    block = scaling_model.tables(given)
    assert page == report.with_block(page, block, "<!-- model -->", "<!-- /model -->"), (
        "run `python benchmarks/scaling_model.py --report`"
    )
    assert scaling_model.reduced_bytes(1000, 26560) == 424_960_016


def test_the_model_s_all_reduce():
    """On one node a ring; over many the cheaper of ring and tree, on the eighth that each GPU sends; or latency alone."""
    given = scaling_model.Assumptions(efficiency=1.0, launch=0.0, nvlink_latency=0.0, network_latency=1e-6)
    seconds = lambda size, gpus: scaling_model.all_reduce_seconds(size, gpus, given)
    assert seconds(450e9, 8) == pytest.approx(2 * 7 / 8)
    assert seconds(0, 64) == pytest.approx(2 * 3 * 1e-6)  # the tree's three levels, up and down
    assert seconds(400e9, 16) == pytest.approx(2 * 7 / 8 * 400 / 450 + 1 + 2e-6)  # the ring of two: 50 GB, half of it each way
    assert seconds(0, 8) == 0
