"""Networks by name, files of weights, checkpoints, and what makes a network a teacher."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from real_data import real_data
from safetensors.torch import save_file
from torch import nn
from torchvision_shim import import_torchvision

from bnfuse.checkpoints import read_weights, save_checkpoint
from bnfuse.errors import InputError
from bnfuse.models import (
    Teacher,
    batchnorm_layers,
    build_model,
    check_output,
    check_teacher,
    fingerprint,
    freeze,
    load_teacher,
)
from bnfuse.networks import CifarResNet, ConvNet
from bnfuse.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

RGB32 = Preprocessing((32, 32), IMAGENET_MEAN, IMAGENET_STD)
GREY8 = Preprocessing((8, 8), (0.3,), (0.4,))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small networks gain little from more
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def torchvision():
    return import_torchvision()


@pytest.fixture
def timm(torchvision):
    return pytest.importorskip("timm")


def small_resnet(num_classes=10, in_channels=1) -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet(8, num_classes, in_channels, width=4)


def akamaster_resnet20_names() -> list[str]:
    """The names in the state dict of akamaster/pytorch_resnet_cifar10's resnet20, but for num_batches_tracked."""

    def batchnorm(name):
        return [f"{name}.{tensor}" for tensor in ("weight", "bias", "running_mean", "running_var")]

    names = ["conv1.weight", *batchnorm("bn1")]
    for block in (f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(3)):
        for i in (1, 2):
            names += [f"{block}.conv{i}.weight", *batchnorm(f"{block}.bn{i}")]
    return [*names, "linear.weight", "linear.bias"]


def test_resnet20_has_the_names_and_parameters_of_the_public_checkpoints():
    model = CifarResNet(20)
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    assert names == akamaster_resnet20_names()
    assert sum(p.numel() for p in model.parameters()) == 269_722
    assert list(batchnorm_layers(model))[:3] == ["bn1", "layer1.0.bn1", "layer1.0.bn2"]
    assert len(batchnorm_layers(model)) == 19


@pytest.mark.parametrize("spec", ["resnet8", "convnet3"])
@pytest.mark.parametrize("channels, size", [(1, (8, 8)), (3, (32, 32)), (2, (9, 13))])
def test_our_networks_take_small_images_of_any_size_and_can_be_traced(spec, channels, size):
    model = freeze(build_model(spec, 7, channels))
    x = torch.randn(2, channels, *size)
    logits = model(x)
    assert logits.shape == (2, 7)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), logits)


def test_shortcuts_subsample_and_pad_with_zero_channels():
    block = CifarResNet(8, width=4).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(1, 4, 6, 6)
    y = block(x)
    assert y.shape == (1, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 6:].any()


def test_a_depth_that_is_not_6n_plus_2_is_refused():
    with pytest.raises(InputError, match=r"6n \+ 2 .* got 18"):
        CifarResNet(18)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("resnet18", "no model is called 'resnet18' .*perhaps torchvision:resnet18"),
        ("torchvision:", "no model is called"),
        ("nowhere.py:make", "nowhere.py is not a file"),
    ],
)
def test_unknown_names_are_explained(spec, message):
    with pytest.raises(InputError, match=message):
        build_model(spec, 10)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_an_absent_library_is_named_with_its_remedy(library, monkeypatch):
    for name in ("torchvision", "torchvision.models", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"pip install bnfuse\[{library}\]"):
        build_model(f"{library}:resnet18", 10)


def test_a_file_of_the_users_own(tmp_path):
    (tmp_path / "neighbour.py").write_text("classes = 5\n")
    file = tmp_path / "own.py"
    file.write_text(
        "from torch import nn\nfrom neighbour import classes\n"
        "def make():\n    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), "
        "nn.Linear(144, classes))\n"
        "def broken():\n    return 1 / 0\n"
        "def number():\n    return 3\n"
        "def ours():\n    from bnfuse.networks import CifarResNet; return CifarResNet(18)\n"
    )
    teacher = load_teacher(f"{file}:make", preprocessing=GREY8)
    assert (teacher.num_classes, teacher.architecture, teacher.class_names) == (5, f"{file}:make", None)
    with pytest.raises(InputError, match="tells 5 classes apart, expected num_classes=7"):
        load_teacher(f"{file}:make", preprocessing=GREY8, num_classes=7)
    with pytest.raises(InputError, match="--image-size --mean --std"):
        load_teacher(f"{file}:make")
    with pytest.raises(InputError, match="own.py, line 6: ZeroDivisionError"):
        build_model(f"{file}:broken", None)
    with pytest.raises(InputError, match="own.py, line 10: InputError: the depth"):
        build_model(f"{file}:ours", None)
    with pytest.raises(InputError, match="must return a torch.nn.Module, it returned int"):
        build_model(f"{file}:number", None)
    with pytest.raises(InputError, match="has no function called absent"):
        build_model(f"{file}:absent", None)
    assert str(tmp_path) not in sys.path


def test_torchvision_models(torchvision):
    model = build_model("torchvision:resnet18", 7)
    assert model.fc.out_features == 7 and len(batchnorm_layers(model)) == 20
    with pytest.warns(UserWarning, match="random weights"):
        teacher = load_teacher("torchvision:resnet18", num_classes=7, preprocessing=RGB32)
    assert teacher.num_classes == 7
    with pytest.raises(InputError, match="did you mean .*resnet18"):
        build_model("torchvision:resnet-18", 7)
    with pytest.raises(InputError, match="3 channels, not 1"):
        build_model("torchvision:resnet18", 7, in_channels=1)
    with pytest.raises(InputError, match="it has IMAGENET1K_V1"):
        load_teacher("torchvision:resnet18", weights="IMAGENET")
    with pytest.raises(InputError, match="tell 1000 classes apart, not 7"):
        build_model("torchvision:resnet18", 7, pretrained_weights="DEFAULT")


def test_torchvision_weights_know_their_preprocessing_and_classes(torchvision, monkeypatch):
    model = torchvision.models.resnet18()
    enum = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(enum.DEFAULT.__class__, "get_state_dict", lambda *_, **__: model.state_dict())
    teacher = load_teacher("torchvision:resnet18", weights="DEFAULT")
    assert teacher.preprocessing == Preprocessing((224, 224), IMAGENET_MEAN, IMAGENET_STD)
    assert teacher.num_classes == 1000 and teacher.class_names[217] == "English springer"
    assert teacher.fingerprint == fingerprint(model)


def test_timm_models(timm):
    assert build_model("timm:resnet18", 7, in_channels=1)(torch.rand(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(InputError, match="did you mean .*resnet18"):
        build_model("timm:resnet-18", 7)
    with pytest.raises(InputError, match="a file or 'pretrained', got 'DEFAULT'"):
        load_teacher("timm:resnet18", weights="DEFAULT")


def test_timm_pretrained_knows_its_preprocessing(timm, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **sizes: create(name, **sizes))  # no download
    teacher = load_teacher("timm:resnet18.a1_in1k", weights="pretrained")
    assert teacher.preprocessing == Preprocessing((224, 224), IMAGENET_MEAN, IMAGENET_STD)
    assert teacher.num_classes == 1000


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".safetensors"])
def test_files_of_weights_load_with_and_without_wrappers(suffix, tmp_path):
    model, path = small_resnet(), tmp_path / f"weights{suffix}"
    state = {f"module.{name}": value for name, value in model.state_dict().items() if "num_batches" not in name}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"epoch": 3, "state_dict" if suffix == ".th" else "model": state}, path)
    assert read_weights(path).keys() == {name.removeprefix("module.") for name in state}
    (tmp_path / "net.py").write_text("from bnfuse.networks import CifarResNet\nnet = lambda: CifarResNet(8, 10, 1, 4)\n")
    teacher = load_teacher(f"{tmp_path}/net.py:net", weights=path, preprocessing=GREY8)
    assert fingerprint(teacher.model) == fingerprint(model)


def test_the_number_of_classes_of_our_networks_is_in_the_file(tmp_path):
    torch.save(build_model("resnet8", 6, 1).state_dict(), tmp_path / "w.pt")
    assert load_teacher("resnet8", weights=tmp_path / "w.pt", preprocessing=GREY8).num_classes == 6


def test_weights_that_do_not_fit_are_named_and_counted(tmp_path):
    state = build_model("resnet8", 10, 1).state_dict()
    del state["bn1.weight"], state["bn1.bias"]
    state["head.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InputError) as caught:
        build_model("resnet8", 4, 1, tmp_path / "w.pt")
    assert "2 missing (bn1.weight; bn1.bias), 1 unexpected (head.weight), 2 mis-shaped" in str(caught.value)
    assert "linear.weight [10, 64], not [4, 64]" in str(caught.value)
    with pytest.raises(InputError, match=r"62 missing \(.*; .*; .* …\)"):
        build_model("resnet20", 10, 1, tmp_path / "w.pt")


class NotATensor:
    """Stands for any object that unpickling would run code for."""


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        (b"not a checkpoint", "weights_only=True"),
        ({"state_dict": NotATensor()}, "weights_only=True"),
        ({"epoch": 3}, "holds no state dict"),
        ([torch.zeros(1)], "holds no state dict"),
    ],
)
def test_files_that_are_no_state_dict_are_refused(content, message, tmp_path):
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=message):
        read_weights(path)


def test_a_damaged_safetensors_file_is_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"damaged")
    for attempt in (read_weights, load_teacher):
        with pytest.raises(InputError, match="not a readable safetensors file"):
            attempt(tmp_path / "w.safetensors")


def save_small(path, architecture="resnet8", **changes):
    torch.manual_seed(0)
    model = build_model("resnet8", 3, 1).to(memory_format=torch.channels_last)
    about = {"num_classes": 3, "preprocessing": GREY8, "class_names": ["a", "b", "c"], "metrics": {"accuracy": 0.5}}
    save_checkpoint(path, model, architecture=architecture, **(about | changes))
    return model


def test_a_checkpoint_needs_nothing_else(tmp_path):
    path = tmp_path / "deep" / "model.safetensors"
    model = save_small(path)
    teacher = load_teacher(path)
    assert (teacher.architecture, teacher.num_classes, teacher.class_names) == ("resnet8", 3, ["a", "b", "c"])
    assert teacher.preprocessing == GREY8
    assert teacher.fingerprint == fingerprint(model)
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(teacher.model(x), model.eval()(x).detach())
    assert list(path.parent.iterdir()) == [path]
    before = path.read_bytes()
    save_small(path)
    assert path.read_bytes() == before  # the same network, the same bytes


def test_checkpoints_that_do_not_explain_themselves_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_small(path)
    with pytest.raises(InputError, match="leave out weights"):
        load_teacher(path, weights="other.pt")
    save_small(path, class_names=["a"])
    with pytest.raises(InputError, match="names 1 classes"):
        load_teacher(path)
    with pytest.raises(InputError, match="no such file"):
        load_teacher(tmp_path / "absent.safetensors")
    save_file(small_resnet().state_dict(), path)
    with pytest.raises(InputError, match="no checkpoint of bnfuse"):
        load_teacher(path)
    save_file({"x": torch.zeros(1)}, path, {"bnfuse": "{}"})
    with pytest.raises(InputError, match="metadata of .* is damaged: KeyError"):
        load_teacher(path)


def test_a_checkpoint_does_not_choose_what_code_runs(tmp_path):
    spec, path = f"{tmp_path}/net.py:net", tmp_path / "model.safetensors"
    (tmp_path / "net.py").write_text("from bnfuse.networks import CifarResNet\nnet = lambda: CifarResNet(8, 3, 1)\n")
    save_small(path, architecture=spec)
    with pytest.raises(InputError, match="runs no code because a checkpoint says so"):
        load_teacher(path)
    teacher = load_teacher(spec, weights=path)  # the rest is known
    assert (teacher.num_classes, teacher.preprocessing, teacher.class_names) == (3, GREY8, ["a", "b", "c"])


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_small(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_small(path, num_classes=4)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_known_is_asked_for(tmp_path):
    with pytest.raises(InputError, match="--image-size --mean --std"):
        load_teacher("resnet8", num_classes=10)
    with pytest.raises(InputError, match=r"how many classes it tells apart \(num_classes\), got None"):
        load_teacher("resnet8", preprocessing=GREY8)
    with pytest.raises(InputError, match="resnet8 has no weights called 'DEFAULT': give a file"):
        load_teacher("resnet8", weights="DEFAULT", preprocessing=GREY8)


@pytest.mark.parametrize(
    "known, names, found",
    [
        (["cat", "dog", "owl"], ["cat", "dog", "owl"], None),
        (["owl", "dog", "cat"], ["cat", "dog", "owl"], [2, 1, 0]),  # by name, in whatever order
        (["cat", "dog", "owl"], ["dog", "owl"], [1, 2]),
        (["cat", "dog", "owl"], ["0", "1", "2"], None),  # names that say nothing
        (["crane", "dog", "crane"], ["crane", "dog", "crane"], None),  # two classes of one name, as ImageNet has
        (None, ["cat", "dog", "owl"], None),
        (
            ["cat", "dog", "owl"],
            ["dog", "owl", "ant"],
            "class 0, 'dog', is output 1 of resnet8 by its name",
        ),
        (["cat", "dog", "owl"], ["dog", "ant"], "tells 3 classes apart and the dataset has 2: name its output"),
        (None, ["dog", "owl"], "tells 3 classes apart and the dataset has 2: name its output"),
    ],
)
def test_a_class_is_the_output_of_its_name(known, names, found):
    teacher = Teacher(small_resnet(), "resnet8", 3, GREY8, known)
    if isinstance(found, str):
        with pytest.raises(InputError, match=found):
            teacher.outputs_for(names)
        found = None
        names = [*"xyz"]
    assert teacher.outputs_for(names) == found
    assert teacher.outputs_for(["x", "y"], [2, 0]) == [2, 0]


def test_another_size_may_be_asked_for(tmp_path):
    save_checkpoint(
        tmp_path / "t.safetensors", CifarResNet(8, 10, 1), architecture="resnet8", num_classes=10, preprocessing=GREY8
    )
    assert load_teacher(tmp_path / "t.safetensors").preprocessing == GREY8
    larger = load_teacher(tmp_path / "t.safetensors", image_size=(12, 16)).preprocessing
    assert larger == Preprocessing((12, 16), GREY8.mean, GREY8.std)


def test_the_output_is_tried_on_zeros():
    model = small_resnet()
    assert check_output(model, "net", GREY8, None) == 10
    assert model.training and model.bn1.training
    with pytest.raises(InputError, match="net does not take images of 3 channels and 32x32 pixels: RuntimeError"):
        check_output(model, "net", RGB32, 10)
    with pytest.raises(InputError, match=r"for one image it returned \[1, 1, 8, 8\]"):
        check_output(nn.Identity(), "net", GREY8, 10)
    nn.init.constant_(model.linear.bias, float("nan"))
    with pytest.raises(InputError, match="not finite"):
        check_output(model, "net", GREY8, 10)


def test_a_frozen_network_is_a_teacher():
    model = small_resnet()
    with pytest.raises(InputError, match=r"'bn1' is in training mode: call model.eval\(\)"):
        check_teacher(model)
    with pytest.raises(InputError, match=r"\d+ parameters .* the first 'conv1.weight': call bnfuse.freeze"):
        check_teacher(model.eval())
    assert freeze(model.train()) is model
    check_teacher(model)


def spoil_mean(layer):
    layer.running_mean[2] = float("inf")


def spoil_variance(layer):
    layer.running_var[:2] = -1e-3


def forget(layer):
    layer.running_mean = layer.running_var = None


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_mean, "'layer2.0.bn1' has a running_mean that is not finite in 1 of 8 channels"),
        (spoil_variance, "'layer2.0.bn1' has a negative running_var in 2 of 8 channels"),
        (forget, "'layer2.0.bn1' keeps no running statistics .*track_running_stats=True"),
    ],
)
def test_statistics_that_cannot_be_matched_are_refused(spoil, message):
    model = freeze(small_resnet())
    spoil(model.layer2[0].bn1)
    with pytest.raises(InputError, match=message):
        check_teacher(model)


def test_without_batchnorm_it_is_said_what_can_be_matched_instead():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.ReLU(), nn.GroupNorm(1, 2), nn.LayerNorm(2)).eval()
    with pytest.raises(InputError, match=r"no BatchNorm layer: it has GroupNorm \(2\), LayerNorm \(1\), .*@last"):
        check_teacher(model)
    with pytest.raises(InputError, match=r"no BatchNorm layer: match other sites .*for example conv"):
        check_teacher(nn.Sequential(nn.Conv2d(1, 2, 3)))
    check_teacher(freeze(model), needs_batchnorm=False)
    with pytest.raises(InputError, match="parameters of the teacher require a gradient"):
        check_teacher(model.requires_grad_(True), needs_batchnorm=False)


def test_every_kind_of_batchnorm_is_found_in_order():
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm1d(2), nn.SyncBatchNorm(2), nn.GroupNorm(1, 2), Own(2), nn.BatchNorm3d(2))
    assert list(batchnorm_layers(model)) == ["0", "1", "3", "4"]
    lazy = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(InputError, match="'0' is lazy"):
        batchnorm_layers(lazy)
    lazy(torch.rand(3, 2))
    assert list(batchnorm_layers(lazy)) == ["0"]


def test_the_fingerprint_is_the_same_in_another_process():
    code = (
        "import torch; from bnfuse.models import fingerprint; from bnfuse.networks import CifarResNet; torch.manual_seed(0); "
        "print(fingerprint(CifarResNet(8, 10, 1, width=4)))"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert elsewhere == fingerprint(small_resnet()) and len(elsewhere) == 64


def test_the_fingerprint_sees_every_bit_and_nothing_else():
    model = freeze(small_resnet())
    teacher = Teacher(model, "resnet8", 10, GREY8)
    before = teacher.fingerprint
    assert fingerprint(small_resnet().to(memory_format=torch.channels_last)) == before
    assert fingerprint(small_resnet().half()) != before
    model.bn1.running_var[3] = torch.nextafter(model.bn1.running_var[3], torch.tensor(2.0))
    assert teacher.fingerprint != before
    renamed = nn.ModuleDict({"net": small_resnet()})
    assert fingerprint(renamed) != before


def test_the_public_resnet20_classifies_real_images():
    path, images = real_data("resnet20-12fca82f.th"), np.load(real_data("cifar10_lossless_test.npz"))
    teacher = load_teacher("resnet20", weights=path, preprocessing=RGB32)
    assert teacher.num_classes == 10
    pixels = torch.from_numpy(images["images"]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        predictions = torch.cat([teacher.model(x).argmax(1) for x in RGB32.normalize(pixels).split(128)])
    assert (predictions == torch.from_numpy(images["labels"])).float().mean() > 0.91


def test_a_mobilenet_with_its_own_file_loads():
    file = real_data("mobilenet_v1.py")
    real_data("mobilenet_v1_0.25_224.pth")
    teacher = load_teacher(f"{file}:mobilenet_v1", preprocessing=Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3))
    assert teacher.num_classes == 1000 and len(batchnorm_layers(teacher.model)) == 27


def test_the_plain_network_can_be_deeper_and_narrower():
    model = ConvNet(5, in_channels=2, width=6, depth=2)
    assert len(batchnorm_layers(model)) == 2 and model(torch.rand(3, 2, 4, 4)).shape == (3, 5)
