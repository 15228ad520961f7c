"""The benchmark report: summaries, tables and marks from synthetic results; a README block that is put back in its place."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import report  # noqa: E402
import summary  # noqa: E402

RIVALS = ("hook", "var_mean", "compiled_hook", "compiled_var_mean", "plain", "floor")


def operator(networks: dict, *ratios: float, direction: str = "both") -> dict:
    ratios = dict(zip(RIVALS, ratios))
    seconds = {"bnfuse": 0.001, **{name: 0.001 * ratio for name, ratio in ratios.items()}}
    return {
        "site": "16x8x4x4-relu",
        "networks": networks,
        "direction": direction,
        "bytes": 10**7,
        "ratios": ratios,
        "seconds": seconds,
    }


def step(network: str, **ratios: float) -> dict:
    seconds = {"bnfuse": 0.5, **{name: 0.5 * ratio for name, ratio in ratios.items()}}
    size = 32 if network == "resnet20" else 224
    return {"network": network, "batch": 16, "image_size": size, "ratios": ratios, "seconds": seconds}


CASES = {
    "operators": [
        # Three equal sites in one network, one of another.
        operator({"resnet20": 3}, 8, 4, 9, 16, 2, 0.5),
        operator({"resnet18": 1}, 128, 4, 9, 1, 0.5, 0.5),
        operator({"resnet20": 3}, 2, 2, 2, 2, 2, 0.25, direction="forward"),
        operator({"resnet20": 3}, 2, 2, 2, 2, 2, 0.25, direction="backward"),
    ],
    "steps": [
        step("resnet20", hook=4.0, plain=1.25, conv_only=0.8, compiled_hook=2.0),
        step("resnet18", hook=1.0, plain=0.8, conv_only=0.8, compiled_hook=2.0),
    ],
    "memory": [
        {
            "network": "resnet20",
            "batch": 256,
            "kept_bytes": {"bnfuse": 4e8, "hook": 6e8, "plain": 4e8},
            "peak_bytes": {"bnfuse": 5e8, "hook": 10e8, "plain": 5e8},
        }
    ],
}


@pytest.fixture
def results() -> dict[str, dict]:
    return {
        suite: {
            "settings": {"device": "cpu", "dtype": "float32", "layout": "contiguous"},
            "summary": {**summary.SUMMARIES[suite](cases), "copy_gb_per_second": 20.0},
            suite: copy.deepcopy(cases),
            "date": "2026-01-01",
            "processor": "Example",
            "threads": 2,
            "torch": "2.13.0",
            "command": "pytest benchmarks",
        }
        for suite, cases in CASES.items()
    }


def test_means_weigh_every_site_and_each_network_has_its_own(results):
    means = results["operators"]["summary"]
    assert means["op_speedup_vs_eager"] == pytest.approx((8**3 * 128) ** 0.25)
    assert means["op_speedup_vs_compile"] == pytest.approx((9**3 * 1) ** 0.25)  # at each site the faster of the two
    assert means["op_time_over_floor"] == pytest.approx(2)
    assert means["op_lowest_speedup_vs_eager"] == 8 and means["op_lowest_speedup_vs_plain"] == 0.5
    assert means["operators_by_network"]["resnet20"]["op_speedup_vs_eager"] == pytest.approx(8)
    assert means["operators_by_direction"]["forward"]["op_time_over_floor"] == pytest.approx(4)
    assert results["steps"]["summary"]["step_speedup_vs_eager"] == pytest.approx(2)
    assert results["steps"]["summary"]["step_time_over_plain"] == pytest.approx(1)
    assert results["memory"]["summary"]["kept_over_eager"] == pytest.approx(2 / 3)


def test_sites_that_were_not_compiled_for_do_not_count_there():
    uncompiled = operator({"resnet50": 5}, 8, 4, 1, 1, 2, 0.5)
    uncompiled["ratios"] = {name: r for name, r in uncompiled["ratios"].items() if not name.startswith("compiled")}
    means = summary.summarize_operators([*CASES["operators"], uncompiled])
    assert means["op_speedup_vs_compile"] == pytest.approx((9**3 * 1) ** 0.25)
    assert means["op_speedup_vs_eager"] == pytest.approx((8**8 * 128) ** (1 / 9))


def test_a_mean_over_some_sites_says_of_how_many(results):
    cases = [*CASES["operators"], operator({"resnet18": 2}, 8, 4, 1, 1, 2, 0.5)]
    for name in ("compiled_hook", "compiled_var_mean"):
        del cases[-1]["ratios"][name]
    table = report.operators_table({"summary": summary.summarize_operators(cases), "operators": cases})
    assert "| ResNet-18, 3 sites | 20.2× | 4.00× | 9.00× (1 of 3) | 1.00× (1 of 3) | 1.26× | 2.00× |" in table
    assert "| ResNet-20, 3 sites | 8.00× | 4.00× | 9.00× | 16.0× | 2.00× | 2.00× |" in table


def test_sites_by_the_bytes_that_they_move():
    small, large = operator({"resnet18": 2}, 8, 4, 1, 1, 2, 0.5), operator({"resnet18": 1}, 2, 4, 1, 1, 4, 0.25)
    table = report.sizes_table({"operators": [small | {"bytes": 1e6}, large | {"bytes": 32e6}, CASES["operators"][2]]})
    assert table.splitlines()[2:] == [
        "| less than 8 MB | 2 | 8.00× | 2.00× | 2.00× | 50% |",
        "| more | 1 | 2.00× | 4.00× | 4.00× | 25% |",
    ]


def test_the_rate_of_a_step_in_hours_of_imagenet():
    means = summary.summarize_steps(CASES["steps"])
    assert means["imagenet_run"] == {"classes": 1000, "images_per_class": 50, "iterations": 4000}
    networks = means["steps_by_network"]
    assert networks["resnet18"]["image_iterations_per_second"]["bnfuse"] == pytest.approx(32)
    assert networks["resnet18"]["imagenet_hours"]["bnfuse"] == pytest.approx(2e8 / 32 / 3600)
    assert networks["resnet18"]["imagenet_hours"]["compiled_hook"] == pytest.approx(2e8 / 16 / 3600)
    assert networks["resnet20"]["image_iterations_per_second"]["hook"] == pytest.approx(8)
    assert "imagenet_hours" not in networks["resnet20"]  # its images are CIFAR's


def test_tables_of_results_on_a_gpu(results, tmp_path, monkeypatch, capsys):
    (tmp_path / "of_the_cpu.json").write_text(json.dumps(results["memory"]))
    monkeypatch.setattr(sys, "argv", ["report.py", "--gpu", str(tmp_path)])
    with pytest.raises(SystemExit, match="no results of a GPU"):
        report.main()
    for suite in ("operators", "steps"):
        results[suite]["settings"] |= {"device": "cuda", "dtype": "bfloat16"}
        results[suite] |= {"gpu": "Example GPU", "backend": "cuda"}
    for case in results["operators"]["operators"]:
        case["ratios"]["triton"], case["seconds"]["triton"] = 1.25, 1.25e-3
    for case in results["steps"]["steps"]:
        case["ratios"] |= {"autocast_hook": 5.0, "triton": 1.25}
        case["seconds"] |= {"autocast_hook": 2.5, "triton": 0.625}
    results["steps"]["summary"] = summary.summarize_steps(results["steps"]["steps"])
    for suite in ("operators", "steps"):
        (tmp_path / f"{suite}_example.json").write_text(json.dumps(results[suite]))
    report.main()
    left = (tmp_path / "gpu.md").read_text()
    assert capsys.readouterr().out.startswith(left)
    assert "of_the_cpu" not in left and "Example GPU, bfloat16, contiguous" in left
    for line in (
        "| site | forward, MB | `cuda`, µs | `triton`, µs | backward, MB | `cuda`, µs | `triton`, µs |",
        "| 16x8x4x4-relu | 10 | 1000 (25%) | 1250 (20%) | 10 | 1000 (25%) | 1250 (20%) |",
        "| step | bnfuse | eager hook | eager hook, autocast | compiled hook | no statistics | convolutions alone | `triton` |",
        "| ResNet-18, 16 images | 500 ms | 500 ms (1.00×) | 2500 ms (5.00×) | 1000 ms (2.00×) | 400 ms (0.80×) "
        "| 400 ms (0.80×) | 625 ms (1.25×) |",
        "| images × iterations a second (hours of 1,000 classes × 50 images × 4,000 iterations) | bnfuse | eager hook "
        "| eager hook, autocast | compiled hook |",
        "| ResNet-18 | 32 (1736.1 h) | 32 (1736.1 h) | 6 (8680.6 h) | 16 (3472.2 h) |",
    ):
        assert line in left


def test_on_a_gpu_both_directions_are_the_sum_of_each_alone(results, tmp_path):
    """However long both took when they were timed at once: that has the waiting for the host."""
    result = results["operators"]
    result["settings"] |= {"device": "cuda", "dtype": "bfloat16"}
    result["operators"] = [
        operator({"resnet50": 1}, 90, 9, 9, 9, 9, 0.9),
        operator({"resnet50": 1}, 2, 2, 2, 2, 2, 0.5, direction="forward"),
        operator({"resnet50": 1}, 4, 4, 4, 4, 4, 0.5, direction="backward"),
    ]
    (tmp_path / "operators.json").write_text(json.dumps(result))
    (of_gpu,) = report.gpu_results(tmp_path).values()
    *_, both = of_gpu["operators"]
    assert len(of_gpu["operators"]) == 3 and both["bytes"] == 2 * 10**7
    assert both["seconds"] == pytest.approx({"bnfuse": 0.002, **{name: 0.006 for name in RIVALS[:-1]}, "floor": 0.001})
    assert of_gpu["summary"]["op_speedup_vs_eager"] == of_gpu["summary"]["op_speedup_vs_compile"] == pytest.approx(3)
    assert summary.with_sums(of_gpu["operators"]) == of_gpu["operators"]
    assert "was not noted in this run" in report.gpu_times(of_gpu)
    for case, waited in zip(of_gpu["operators"], ({}, {"compiled_hook": 2})):
        case["waited_for_host"] = waited
    assert "waited for the host: `compiled_hook` backward at 1 sites" in report.gpu_times(of_gpu)


def test_targets_of_a_gpu_are_marked_and_what_was_not_measured_is_said(results):
    on_gpu = {"device": "cuda", "dtype": "bfloat16", "layout": "channels_last"}
    for suite, result in results.items():
        text = json.dumps(result[suite]).replace("resnet18", "resnet50").replace("resnet20", "resnet18")
        result[suite] = json.loads(text)
        result["settings"] = on_gpu
    results["operators"]["operators"][2]["networks"] = results["operators"]["operators"][3]["networks"] = {"resnet50": 3}
    results["steps"]["steps"][0]["image_size"] = 224
    results["steps"]["summary"] = summary.summarize_steps(results["steps"]["steps"])
    table = report.gpu_targets_table(list(results.values()))
    for line in (
        "| ResNet-50's sites forward, of copy bandwidth | ≥ 85% | 25.00% | missed |",
        "| ResNet-50's sites, over the eager hook | ≥ 6× | 128.00× | met |",
        "| ResNet-50's sites, over torch.compile, the faster of two spellings | ≥ 1.5× | 1.00× | missed |",
        "| ResNet-50 step, over the eager hook under autocast | ≥ 2.5× |  | not measured |",
        "| ResNet-50 step, over the compiled hook | ≥ 1.3× | 2.00× | met |",
        "| ResNet-50 step, time over the plain step | ≤ 1× | 1.25× | missed |",
        "| ResNet-50 step, peak memory over the eager hook's | ≤ 0.5× |  | not measured |",
        "| ImageNet at 50 a class, ResNet-18 | ≤ 3 h | 1736.11 h | missed |",
    ):
        assert line in table, table
    for result in results.values():  # measured in another dtype: not what the targets are meant for
        result["settings"] = on_gpu | {"dtype": "float32"}
    assert report.gpu_targets_table(list(results.values())).count("not measured") == len(report.GPU_TARGETS)


def test_no_table_has_figures_of_two_cards_or_of_another_run(results, tmp_path, monkeypatch, capsys):
    of_a_step = {}
    for age, card, hook in ((1, "Card A", 3.0), (2, "Card B", 2.0)):
        steps = [step("resnet50", hook=hook, autocast_hook=hook, plain=1.0, conv_only=0.8)]
        settings = {"device": "cuda", "dtype": "bfloat16", "layout": "channels_last"}
        of_a_step[card] = results["steps"] | {"gpu": card, "settings": settings, "steps": steps}
        of_a_step[card]["summary"] = summary.summarize_steps(steps)
        path = tmp_path / f"steps_{card[-1]}.json"
        path.write_text(json.dumps(of_a_step[card]))
        os.utime(path, (age, age))
    row = "| ResNet-50 step, over the eager hook under autocast | ≥ 2.5× |"
    of_a, of_b = report.gpu_targets(list(of_a_step.values())).split("on an Card B")
    assert f"{row} 3.00× | met |" in of_a and f"{row} 2.00× | missed |" in of_b
    began = tmp_path / "began"
    began.touch()
    os.utime(began, (1.5, 1.5))
    monkeypatch.setattr(sys, "argv", ["report.py", "--gpu", str(tmp_path), "--since", str(began)])
    report.main()
    assert "Card A" not in (tmp_path / "gpu.md").read_text() and "Card B" in capsys.readouterr().out
    os.utime(began, (3, 3))
    with pytest.raises(SystemExit, match="no results of a GPU that are newer"):
        report.main()


def test_make_gpu_shows_the_results_of_its_own_run():
    """With a Python that measures nothing and fails: the report is asked for what is newer than the start, and make fails."""
    python = f'{sys.executable} -c \'import sys; print(*sys.argv[1:]); sys.exit(sys.argv[1:3] == ["-m", "pytest"])\''
    recipe = subprocess.run(
        ["make", "-n", "gpu", "OUT=out"], cwd=report.ROOT, capture_output=True, text=True, check=True
    ).stdout
    benchmarks = "failed=0;" + recipe.partition("failed=0;")[2]
    ran = subprocess.run(["bash", "-c", benchmarks.replace("python3", python)], capture_output=True, text=True)
    began = ran.stdout.split("benchmarks/report.py --gpu out --since ")[1].strip()
    assert ran.returncode == 1 and began and not Path(began).exists()


def test_the_readme_shows_the_numbers_and_what_was_missed(results):
    block = report.readme_block(results)
    for line in (
        "| ResNet-20, 3 sites | 8.00× | 4.00× | 9.00× | 16.0× | 2.00× | 2.00× | 50% |",
        "| all, backward alone | 2.00× | 2.00× | 2.00× | 2.00× | 2.00× | 4.00× | 25% |",
        "| ResNet-20, 16 images | 500 ms | 2000 ms (4.00×) | 1000 ms (2.00×) | 625 ms (1.25×) | 400 ms (0.80×) |",
        "| ResNet-20, 256 images | 400 | 600 | 400 | 500 | 1,000 | 500 |",
        "| over the eager hook | ≥ 10× | 16.0× | met |",
        "| time over the copy floor | ≤ 1.6× | 2.00× | missed |",
        "| over plain BN + activation without statistics, the worst site | ≥ 1× | 0.50× | missed |",
        "| ResNet-18, over the eager hook | ≥ 1.75× | 1.00× | missed |",
        "| activations kept, over the eager hook's | ≤ 0.5× | 0.67× | missed |",
    ):
        assert line in block


def test_no_marks_for_what_the_targets_are_not_meant_for(results):
    for result in results.values():
        result["settings"]["dtype"] = "bfloat16"
    assert "missed" not in report.readme_block(results)


def test_the_slowest_small_planes_are_named():
    def share(plane, channels, residual, forward):
        where = {"plane": plane, "channels": channels, "residual": residual, "layout": "contiguous"}
        return where | {"forward": forward, "backward": 2 * forward}

    shares = [share(7, 3, False, 0.5), share(2, 512, True, 0.25), share(1, 3, False, 0.125), share(56, 3, False, 1.0)]
    table = report.small_planes_table({"share_of_copy_bandwidth": shares})
    assert "| forward, contiguous | 12% (1×1, 3 channels) | 25% (2×2, 512 channels and a residual) | 38% | 100% |" in table


def test_parts_of_the_readme_show_the_results_that_are_kept(monkeypatch, tmp_path):
    readme = report.README.read_text()
    assert report.with_parts(readme) == readme, "run `python benchmarks/report.py`"
    kept = json.loads((report.RESULTS / "synthesis_rate.json").read_text())
    changed = kept | {"steps_per_second": {"cpp": 1234.5, "reference": 99.0}, "cpp_over_reference": 12.47, "pairs": 77}
    (tmp_path / "synthesis_rate.json").write_text(json.dumps(changed))
    monkeypatch.setattr(report, "RESULTS", tmp_path)  # where nothing is kept of the other parts, which stay
    before, after = readme.splitlines(), report.with_parts(readme).splitlines()
    assert [line for line in after if line not in before] == [
        '| `backend="cpp"` | 1234.5 |',
        '| `backend="reference"`, eager PyTorch | 99.0 |',
        "| ratio, median of 77 pairs | 12.5× |",
    ]


def test_results_are_read_where_they_are_written(tmp_path):
    environment = {**os.environ, "BNFUSE_RESULTS": str(tmp_path)}
    command = [sys.executable, str(report.ROOT / "benchmarks/report.py"), "--check"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 1 and f"no results in {tmp_path}" in ran.stderr


def test_the_block_takes_the_place_of_the_last_one():
    readme = f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n"
    once = report.with_block(readme, "new")
    assert once == f"above\n{report.BEGIN}\nnew\n{report.END}\nbelow\n" == report.with_block(once, "new")
    with pytest.raises(SystemExit, match="has no <!-- benchmarks -->"):
        report.with_block("no markers", "new")


def test_the_readme_is_up_to_date():
    results = report.load_results(report.RESULTS)
    if not results:
        pytest.skip("no full run has been kept")
    readme = report.README.read_text()
    assert readme == report.with_block(readme, report.readme_block(results)), "run `python benchmarks/report.py`"


def test_the_picture_is_drawn(results, tmp_path):
    pytest.importorskip("matplotlib")
    report.draw_roofline(results["operators"], tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
