"""`bnfuse verify`: what is damaged is found by its hash, and comes back byte for byte, or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from bnfuse import InputError, SynthesisConfig, synthesize, units
from bnfuse.cli import main
from bnfuse.manifest import read_store, verify
from bnfuse.models import Teacher, freeze
from bnfuse.networks import CifarResNet
from bnfuse.optimisation import NonFiniteLoss
from bnfuse.preprocessing import Preprocessing
from bnfuse.repair import repair
from bnfuse.store import Store

CONFIG = SynthesisConfig(images_per_class=3, classes=(0, 1), batch_size=2, iterations=3, targets="running", soft_labels=True)
IMAGE, LABELS = "images/01-1/01-000000.png", "soft_labels/000002.safetensors"


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(freeze(CifarResNet(8, 10, 1, width=4)), "custom", 10, Preprocessing((8, 8), (0.3,), (0.3,)))


@pytest.fixture
def made(teacher, tmp_path) -> Path:
    synthesize(teacher, None, tmp_path / "made", CONFIG, device="cpu", progress=False)
    return tmp_path / "made"


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def mend(teacher, root: Path, **options):
    return repair(teacher, None, root, device="cpu", progress=False, **options)


@pytest.fixture
def another_machine(monkeypatch):
    """Whatever is made comes out a little different."""
    genuine = units.optimise
    monkeypatch.setattr(units, "optimise", lambda *a, **k: ((made := genuine(*a, **k))[0] + 0.05, made[1]))


def lines_of(root: Path) -> list[bytes]:
    return (root / "manifest.jsonl").read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    "damage, restored",
    [
        (lambda root: flip_a_bit(root / IMAGE), [IMAGE]),
        (lambda root: (root / IMAGE).unlink(), [IMAGE]),
        (lambda root: flip_a_bit(root / LABELS), [LABELS]),
        (lambda root: (root / LABELS).unlink(), [LABELS]),
        (lambda root: [flip_a_bit(path) for path in root.rglob("0*.*")], None),
        (lambda root: (root / "manifest.jsonl").write_bytes(b"".join(lines_of(root))[:-9]), []),
        (lambda root: (root / "manifest.jsonl").write_bytes(b"".join([*lines_of(root)[:2], b"x\n", *lines_of(root)[3:]])), []),
        (lambda root: (root / "manifest.jsonl").write_bytes(b"".join([*lines_of(root), *lines_of(root)[:1]])), []),
        (lambda root: (root / "manifest.jsonl").write_bytes(b""), []),
        (lambda root: [(root / "manifest.jsonl").write_bytes(b""), (root / IMAGE).unlink(), (root / LABELS).unlink()], None),
    ],
)
def test_damage_is_found_and_undone(teacher, made, damage, restored):
    before = tree(made)
    damage(made)
    assert verify(made) != []
    result = mend(teacher, made)
    assert tree(made) == before and result.problems == [] and result.found != []
    assert result.replaced == result.differing == [] and restored in (None, result.restored)


def test_a_whole_dataset_is_left_alone(teacher, made):
    before = tree(made)
    result = mend(teacher, made)
    assert (result.found, result.restored, result.problems) == ([], [], []) and tree(made) == before


def test_another_machine_replaces_nothing(teacher, made, another_machine):
    flip_a_bit(made / IMAGE)
    before = tree(made)
    result = mend(teacher, made)
    assert result.differing == [IMAGE] and result.restored == result.replaced == [] and tree(made) == before
    assert result.problems == [f"{IMAGE} has changed: its sha256 is not the one in manifest.jsonl"]


def test_another_machine_may_be_accepted(teacher, made, another_machine):
    flip_a_bit(made / IMAGE)
    before, losses = tree(made), read_store(made).entries[3].losses
    result = mend(teacher, made, accept_changes=True)
    labels = "soft_labels/000002.safetensors"
    assert result.replaced == [IMAGE, labels] and result.problems == [] == verify(made)
    after = tree(made)
    assert {name for name in after if after[name] != before[name]} == {IMAGE, labels, "manifest.jsonl"}
    contents = read_store(made)
    assert [entry.id for entry in contents.entries] == [f"{k:02d}-{i:06d}" for k in range(2) for i in range(3)]
    assert contents.entries[4].soft_labels["sha256"] == contents.entries[3].soft_labels["sha256"] and losses
    with Image.open(made / IMAGE) as image:
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(1, 1, 8, 8)
    logits = teacher.model(teacher.preprocessing.normalize(pixels / 255))
    torch.testing.assert_close(contents.soft_labels()[3], logits[0, :2], rtol=1e-2, atol=1e-2)  # stored in float16


def test_another_machine_leaves_a_damaged_manifest_as_it_is(teacher, made, another_machine):
    (made / "manifest.jsonl").write_bytes(b"".join(lines_of(made))[:-9])
    before = tree(made)
    result = mend(teacher, made)
    assert result.differing == ["images/01-1/01-000002.png"] and tree(made) == before


def test_an_image_made_from_other_seeds(teacher, tmp_path, monkeypatch):
    genuine, calls = units.optimise, []

    def optimise(objective, labels, outputs, seeds, unit, *rest, **options):
        calls.append(unit)
        if calls == [0]:
            raise NonFiniteLoss("unit 0: the loss is not finite", 0, 1, "total")
        return genuine(objective, labels, outputs, seeds, unit, *rest, **options)

    monkeypatch.setattr(units, "optimise", optimise)
    with pytest.warns(UserWarning):
        synthesize(teacher, None, tmp_path, CONFIG, device="cpu", progress=False)
    before = tree(tmp_path)
    flip_a_bit(tmp_path / "images" / "00-0" / "00-000001.png")
    assert mend(teacher, tmp_path).problems == [] and tree(tmp_path) == before and calls.count(0) == 3


def test_an_unfinished_dataset_of_several_ranks(teacher, made, tmp_path):
    lines, before = lines_of(made), tree(made)
    (made / "manifest.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:40])  # as two killed ranks leave them
    (made / "manifest.0001.jsonl").write_bytes(b"".join(lines[3:5]))
    card = json.loads((made / "card.json").read_text())
    (made / "card.json").write_text(json.dumps(card | {"complete": False}))
    flip_a_bit(made / IMAGE)
    result = mend(teacher, made)
    assert result.restored == [IMAGE]
    assert [problem for problem in result.problems if "is not in manifest.jsonl" not in problem] == [
        "the dataset is not finished"
    ]
    assert lines_of(made) == [*lines[:2], *lines[3:5]] and not (made / "manifest.0001.jsonl").exists()
    synthesize(teacher, None, made, CONFIG, device="cpu", progress=False)
    assert tree(made) == before


def test_files_of_others_are_named_and_left(teacher, made):
    (made / "images" / "00-0" / "extra.png").write_bytes(b"x")
    result = mend(teacher, made)
    assert result.problems == ["images/00-0/extra.png is not in manifest.jsonl"] and (made / "images/00-0/extra.png").exists()


def change_card(root: Path, without: tuple[str, ...] = (), **fields) -> None:
    card = json.loads((root / "card.json").read_text()) | fields
    (root / "card.json").write_text(json.dumps({name: value for name, value in card.items() if name not in without}))


def test_the_micro_batch_is_the_cards(teacher, tmp_path, monkeypatch):
    """What decides how sums are rounded comes from the card; another one is refused, unless changes are welcome."""
    made, used, genuine = tmp_path / "made", [], units.optimise
    synthesize(teacher, None, made, CONFIG, device="cpu", micro_batch=1, progress=False)
    assert json.loads((made / "card.json").read_text())["micro_batch"] == 1
    monkeypatch.setattr(units, "optimise", lambda *a, **k: used.append(k["micro_batch"]) or genuine(*a, **k))
    before = tree(made)
    flip_a_bit(made / IMAGE)
    with pytest.raises(InputError, match="(?s)micro_batch: given null, the dataset has 1.*Repair it with"):
        mend(teacher, made, micro_batch=2)
    assert mend(teacher, made).problems == [] and tree(made) == before and used == [1]
    flip_a_bit(made / IMAGE)
    assert mend(teacher, made, micro_batch=2, accept_changes=True).problems == [] and used == [1, 2]
    with pytest.raises(InputError, match="micro_batch: given null, the dataset has 1"):
        synthesize(teacher, None, made, CONFIG, device="cpu", progress=False)


def test_a_micro_batch_of_the_whole_batch_is_none(teacher, made):
    assert synthesize(teacher, None, made, CONFIG, device="cpu", micro_batch=100, progress=False).made == 0


def test_images_of_teams_of_ranks_are_not_made_again_by_one(teacher, made, monkeypatch, capsys):
    change_card(made, ranks_per_batch=2)
    flip_a_bit(made / IMAGE)
    (made / LABELS).unlink()
    before, optimise = tree(made), units.optimise
    monkeypatch.setattr(units, "optimise", lambda *a, **k: pytest.fail("it was made all the same"))
    monkeypatch.setattr("bnfuse.cli_flags.load_teacher", lambda args: teacher)
    assert main(["verify", str(made), "--repair", "--teacher", "x", "--device", "cpu"]) == 1
    assert f"({IMAGE}): teams of 2 ranks made each batch together, and one process rounds" in capsys.readouterr().out
    assert tree(made) == before
    monkeypatch.setattr(units, "optimise", optimise)
    assert mend(teacher, made, accept_changes=True).problems == [] == verify(made)
    (made / LABELS).unlink()
    assert mend(teacher, made).restored == [LABELS] and verify(made) == []  # logits of images that are there are anybody's
    with pytest.raises(InputError, match="ranks_per_batch: given 1, the dataset has 2"):
        synthesize(teacher, None, made, CONFIG, device="cpu", progress=False)


def test_a_dataset_of_before_the_card_said_how_it_rounds(teacher, made, another_machine):
    """It goes on, whatever the micro_batch, and a repair that comes out different says that this may be why."""
    change_card(made, without=("micro_batch", "ranks_per_batch"), complete=False)
    lines = lines_of(made)
    (made / "manifest.jsonl").write_bytes(b"".join(lines[:3]))  # the first two of four units
    assert synthesize(teacher, None, made, CONFIG, device="cpu", micro_batch=1, progress=False).made == 3
    flip_a_bit(made / "images/00-0/00-000000.png")
    result = mend(teacher, made)
    assert len(result.differing) == 1 and "another --micro-batch than it was made with" in result.why


def test_refusals(teacher, made):
    flip_a_bit(made / IMAGE)
    before = tree(made)
    torch.manual_seed(1)
    other = replace(teacher, model=freeze(CifarResNet(8, 10, 1, width=4)))
    with pytest.raises(InputError, match="(?s)teacher.fingerprint: given .*Repair it with"):
        mend(other, made)
    with pytest.raises(InputError, match="is not a folder"):
        mend(teacher, made / "nowhere")
    card = units.UnitMaker(teacher, None, CONFIG, torch.device("cpu"), "auto").source.card(CONFIG, "cpp", 1)
    with Store.open(made, card=card, class_names=["0", "1"], counts=[3, 3]):
        with pytest.raises(InputError, match="another process is writing"):
            mend(teacher, made)
    lines = lines_of(made)
    changed = json.loads(lines[4]) | {"seed": 1}
    (made / "manifest.jsonl").write_bytes(b"".join([*lines[:4], json.dumps(changed).encode() + b"\n", *lines[5:]]))
    with pytest.raises(InputError, match="the seeds of unit 2 do not follow"):
        mend(teacher, made)
    assert {name for name, data in tree(made).items() if data != before[name]} == {"manifest.jsonl"}


def test_card_of_another_version(teacher, made):
    card = json.loads((made / "card.json").read_text())
    card["config"]["magic"] = 1
    (made / "card.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match="no config that this bnfuse knows .*magic"):
        mend(teacher, made)


def test_what_synthesize_did_not_make_is_not_mended(teacher, tmp_path):
    with Store.open(tmp_path / "own", card={}, class_names=["a"]):
        pass
    with pytest.raises(InputError, match=r"card.json names no backend: what `bnfuse synthesize` did not make cannot"):
        mend(teacher, tmp_path / "own")


def test_command_line(teacher, made, monkeypatch, capsys):
    monkeypatch.setattr("bnfuse.cli_flags.load_teacher", lambda args: teacher)
    before = tree(made)
    assert main(["verify", str(made)]) == 0
    assert "every file is as it was written" in capsys.readouterr().out
    flip_a_bit(made / IMAGE)
    assert main(["verify", str(made)]) == 1
    assert f"{IMAGE} has changed" in capsys.readouterr().out
    assert main(["verify", str(made), "--repair"]) == 2
    assert "--repair makes images again: give the --teacher" in capsys.readouterr().err
    assert main(["verify", str(made), "--repair", "--teacher", "x", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert (
        f"found: {IMAGE} has changed" in said and f"made again: {IMAGE}" in said and "now everything is as it should be" in said
    )
    assert tree(made) == before


def test_command_line_on_another_machine(teacher, made, monkeypatch, capsys, another_machine):
    monkeypatch.setattr("bnfuse.cli_flags.load_teacher", lambda args: teacher)
    flip_a_bit(made / IMAGE)
    flags = ["verify", str(made), "--repair", "--teacher", "x", "--device", "cpu"]
    assert main(flags) == 1
    said = capsys.readouterr().out
    assert f"1 files would not be what they were ({IMAGE})" in said and "what is left:" in said
    assert main([*flags, "--accept-changes"]) == 0 and verify(made) == []
