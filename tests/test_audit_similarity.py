"""The image-quality metrics pair by pair, against values computed by hand where libraries go wrong, and FID and KID."""

import math
import subprocess
import sys

import pytest
import torch

from bnfuse import InputError, Teacher
from bnfuse.audit.features import features, frechet_distance, kernel_distance
from bnfuse.audit.imports import without_broken_torchvision
from bnfuse.audit.similarity import METRICS, compare, lpips, rase, remarks
from bnfuse.datasets import ArrayDataset
from bnfuse.models import build_model, freeze
from bnfuse.preprocessing import Preprocessing

with without_broken_torchvision():
    from torchmetrics.functional.image import relative_average_spectral_error, visual_information_fidelity

BY_NAME = {metric.name: metric for metric in METRICS}


def noise(*shape, seed=0):
    """uint8 [N, H, W, C]."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def shaken(images, amount, seed=9):
    rng = torch.Generator().manual_seed(seed)
    return (images + amount * torch.randn(images.shape, generator=rng)).round().clamp(0, 255).to(torch.uint8)


def values(name, released, private):
    return compare(released, private, [BY_NAME[name]])[name]


def test_every_metric_of_the_field_is_there():
    names = {"MSE", "PSNR", "SSIM", "MS-SSIM", "UQI", "VIF", "SAM", "ERGAS", "SCC", "RASE"}
    assert {metric.name for metric in METRICS} == names


@pytest.mark.parametrize("shape", [(6, 8, 8, 3), (6, 7, 9, 3), (3, 28, 28, 3), (2, 45, 45, 3)])
@pytest.mark.parametrize("name", BY_NAME)
def test_each_metric_rates_a_copy_best_a_little_noise_well_and_another_image_worst(name, shape):
    private = noise(*shape)
    copy, near, far = (values(name, x, private) for x in (private, shaken(private, 5), noise(*shape, seed=1)))
    sign = 1 if BY_NAME[name].similar == "higher" else -1
    assert copy.shape == (shape[0],) and copy.dtype == torch.float64
    assert (sign * copy > sign * near).all() and (sign * near > sign * far).all()
    best = {"PSNR": math.inf}.get(name, 1 if sign == 1 else 0)
    torch.testing.assert_close(copy, torch.full_like(copy, best), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "SAM"])
def test_each_metric_takes_small_grey_images_and_other_pairs_do_not_matter(name):
    private = noise(5, 8, 8, 1)
    released = shaken(private, 40)
    together = values(name, released, private)
    alone = torch.cat([values(name, released[i : i + 1], private[i : i + 1]) for i in range(5)])
    assert together.isfinite().all()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_psnr_and_mse_by_hand():
    private = torch.full((1, 4, 4, 1), 100, dtype=torch.uint8)
    released = private + 51  # a fifth of the range
    assert values("MSE", released, private).item() == pytest.approx(0.04, rel=1e-5)
    assert values("PSNR", released, private).item() == pytest.approx(-10 * math.log10(0.04), rel=1e-5)


def naive_rase(released, private, window):
    """In float64 and by its definition, one window after another."""
    released, private = released.double(), private.double()
    channels, height, width = private.shape
    found = []
    for y in range(height - window + 1):
        for x in range(width - window + 1):
            a, b = (image[:, y : y + window, x : x + window] for image in (released, private))
            squared = sum(((a[c] - b[c]) ** 2).mean() for c in range(channels)) / channels
            if b.mean() > 0:
                found.append(100 / b.mean() * squared.sqrt())
    return torch.stack(found).mean()


def test_rase_by_its_definition():
    released, private = torch.rand(3, 3, 12, 10), torch.rand(3, 3, 12, 10)
    private[0, :, :8, :8] = 0  # a black window has no mean to divide by
    expected = torch.stack([naive_rase(*pair, 8) for pair in zip(released, private)])
    torch.testing.assert_close(rase(released, private).double(), expected, rtol=1e-5, atol=0)
    assert rase(released, torch.zeros_like(private)).isnan().all()


def test_rase_of_torchmetrics_is_wrong_by_the_size_of_the_window():
    """Once this fails, torchmetrics has been mended and `rase` can go. It leaves out the last row and column of windows."""
    released, private = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    theirs = relative_average_spectral_error(released, private, window_size=8) / 64
    torch.testing.assert_close(rase(released[..., :-1, :-1], private[..., :-1, :-1])[0], theirs, rtol=1e-4, atol=0)


def test_sam_leaves_black_pixels_out():
    private = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    private[0, 0, 0, 0], private[0, 0, 1, 0] = 200, 100  # red; the rest is black
    released = private.clone()
    released[0, 0, 1] = torch.tensor([0, 50, 0])  # one red pixel has become green, at a right angle
    released[0, 1, 1] = torch.tensor([9, 9, 9])
    assert values("SAM", released, private).item() == pytest.approx(math.pi / 4, rel=1e-3)
    assert values("SAM", released, torch.zeros_like(private)).isnan().all()
    assert values("SAM", private[..., :1], private[..., :1]).isnan().all()  # grey has no hue


def test_uqi_by_its_definition_on_one_window():
    """Wang and Bovik 2002: 4 σxy x̄ ȳ / ((σx² + σy²)(x̄² + ȳ²)), weighted by a Gaussian of standard deviation 1.5."""
    released, private = noise(2, 11, 11, 1), noise(2, 11, 11, 1, seed=1)
    line = torch.exp(-((torch.arange(11).double() - 5) ** 2) / (2 * 1.5**2))
    weight = torch.outer(line, line) / line.sum() ** 2
    x, y = (images[..., 0].double() / 255 for images in (released, private))
    mean = lambda v: (weight * v).sum((1, 2))  # noqa: E731
    covariance = mean(x * y) - mean(x) * mean(y)
    variances = mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2
    expected = 4 * covariance * mean(x) * mean(y) / (variances * (mean(x) ** 2 + mean(y) ** 2))
    torch.testing.assert_close(values("UQI", released, private), expected, rtol=1e-3, atol=1e-4)


def test_ergas_by_hand():
    private = torch.full((1, 4, 4, 3), 100, dtype=torch.uint8)
    released = private.clone()
    released[..., 0] += 20  # 20 % of that channel's mean
    assert values("ERGAS", released, private).item() == pytest.approx(100 * math.sqrt(0.04 / 3), rel=1e-4)
    assert values("ERGAS", released, torch.zeros_like(private)).isnan().all()


def test_vif_is_on_the_scale_of_its_noise():
    """Beside noise of variance 2, any noise on pixels in [0, 1] is nothing, and would be rated as no loss."""
    private = noise(2, 48, 48, 1)
    little, much = (shaken(private, deviation) for deviation in (5, 40))
    assert (values("VIF", little, private) > 0.6).all() and (values("VIF", much, private) < 0.3).all()
    unscaled = visual_information_fidelity(*(x.permute(0, 3, 1, 2).float() / 255 for x in (much, private)))
    assert unscaled > 0.8


def test_what_is_enlarged_or_undefined_is_said():
    said = " ".join(remarks((1, 8, 8)))
    for text in ("VIF: 8×8 pixels are too few; images were enlarged 6 times", "MS-SSIM: two scales", "SAM: undefined", "RASE"):
        assert text in said
    of_photographs = " ".join(remarks((3, 224, 224)))
    assert "enlarged" not in of_photographs and "two scales" not in of_photographs and "black in neither" in of_photographs


def test_lpips_is_none_where_its_weights_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert lpips(noise(2, 8, 8, 3), noise(2, 8, 8, 3)) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-00000000.pth").write_bytes(b"")  # damaged, so it cannot be loaded
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("a download"))
    assert lpips(noise(2, 8, 8, 3), noise(2, 8, 8, 3)) is None


def test_metrics_import_beside_a_torchvision_that_does_not(tmp_path):
    """As one that was built for another torch; afterwards it is as broken as before, and torchmetrics works."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from bnfuse.audit.similarity import compare\n"
        "import torch; x = torch.zeros(1, 8, 8, 1, dtype=torch.uint8); assert compare(x, x)['MSE'] == 0\n"
        "assert 'torchvision' not in sys.modules\n"
        "try: import torchvision\n"
        "except RuntimeError: print('as before')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "as before\n", run.stderr


# ---- features, and distances of sets ----


def test_features_are_what_the_last_linear_layer_gets():
    model = freeze(build_model("resnet8", 4))
    teacher = Teacher(model, "resnet8", 4, Preprocessing((12, 12), (0.5,) * 3, (0.25,) * 3))
    data = ArrayDataset(noise(10, 12, 12, 3), torch.arange(10) % 4)
    found = features(teacher, data, torch.device("cpu"), batch_size=4)
    assert found.shape == (10, 64) and found.dtype == torch.float32
    images, _ = data.batch(range(10))
    logits = model(teacher.preprocessing.normalize(images))
    torch.testing.assert_close(model.linear(found), logits, rtol=1e-4, atol=1e-4)
    assert not model.linear._forward_pre_hooks


def test_features_of_a_network_without_a_linear_layer_are_refused():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    teacher = Teacher(model, "all convolutions", 4, Preprocessing((12, 12), (0.5,) * 3, (0.25,) * 3))
    with pytest.raises(InputError, match="all convolutions has none"):
        features(teacher, ArrayDataset(noise(2, 12, 12, 3), [0, 1]), torch.device("cpu"))


def test_fid_of_gaussians_that_commute_is_the_closed_form():
    """|Δμ|² + Σ (σ₁ − σ₂)², for diagonal covariances; 0 for a set and itself, also where the covariance is singular."""
    x = torch.randn(500, 3, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # covariance 1
    scale, shift = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([0.3, 0.0, -1.0]).double()
    expected = float((shift**2).sum() + ((1 - scale) ** 2).sum())
    assert frechet_distance(x, x * scale + shift) == pytest.approx(expected, rel=1e-9)
    singular = torch.randn(5, 20)
    assert frechet_distance(singular, singular) == pytest.approx(0, abs=1e-5)


def test_kid_by_its_definition():
    a, b = torch.rand(7, 4, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64) + 1
    k = lambda x, y: float((x @ y / 4 + 1) ** 3)  # noqa: E731
    pairs = lambda s: [k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]  # noqa: E731
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    expected = mean(pairs(a)) + mean(pairs(b)) - 2 * mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9) and expected > 0
