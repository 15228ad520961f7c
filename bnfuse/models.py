"""How a network is named, and how a teacher is loaded, checked and frozen. How one is trained is in `training`.

A *teacher* is a classifier pretrained on the private images, in eval mode and frozen, mostly with BatchNorm layers. It may be
one of bnfuse's own networks, a torchvision or timm model, a function in a file of the user's own, or a checkpoint that
`training` wrote.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoints import WEIGHT_SUFFIXES, WeightFacts, load_state, read_facts, read_weights
from .class_names import misplaced
from .errors import InputError
from .networks import CifarResNet, ConvNet
from .preprocessing import Preprocessing
from .sites import other_sites

SPEC_GRAMMAR = """\
A model is named by one of
  resnet8 | resnet20 | resnet32 | resnet44 | resnet56 | resnet110
                            the CIFAR ResNets of He et al. (2015), for small images of any size
  convnet3                  three blocks of convolution, BatchNorm, ReLU and pooling, 128 channels wide (8x8 and up)
  torchvision:NAME          e.g. torchvision:resnet18
  timm:NAME                 e.g. timm:resnet18.a1_in1k
  path/to/file.py:FUNCTION  a file of your own, whose FUNCTION() returns the network
and a teacher also by
  path/to/model.safetensors a checkpoint that `bnfuse train` wrote; nothing else is needed

Its weights are
  nothing                   random, or those that FUNCTION() comes with
  path/to/file              .safetensors, or a state dict in .pt, .pth or .th
  DEFAULT, IMAGENET1K_V1 …  torchvision: the name of a set of pretrained weights
  pretrained                timm: the pretrained weights of that name
"""

RESNET_DEPTHS = (8, 20, 32, 44, 56, 110)
PREPROCESSING_FLAGS = "give preprocessing=Preprocessing(...), on the command line --image-size --mean --std"


@dataclass
class Teacher:
    """A frozen network, and all that is needed to show it images.

    Attributes
    ----------
    model : network input [N, C, H, W] → logits [N, num_classes]; in eval mode, no parameter requires a gradient
    architecture : the spec it was built from, see `SPEC_GRAMMAR`
    num_classes : logits a sample
    preprocessing : how pixels become its input
    class_names : one a class, where they are known
    """

    model: nn.Module
    architecture: str
    num_classes: int
    preprocessing: Preprocessing
    class_names: list[str] | None = None

    @property
    def fingerprint(self) -> str:
        """`fingerprint` of the model: what statistics recorded with it are held against."""
        return fingerprint(self.model)

    def outputs_for(self, names: Sequence[str], outputs: Sequence[int] | None = None) -> list[int] | None:
        """The network's output for each class of a dataset; None, class k is output k.

        They are `outputs` where these are given; else those of the network's classes that have the same names; else, where it
        has as many outputs as there are classes, and its names say nothing else, these in their order. InputError where none
        of it tells.
        """
        if outputs is not None:
            outputs = list(outputs)
            fits = len(outputs) == len(set(outputs)) == len(names) and 0 <= min(outputs) and max(outputs) < self.num_classes
            if not fits:
                raise InputError(
                    f"outputs must name one of the teacher's {self.num_classes} outputs for each of {len(names)} classes, each "
                    f"once, got {outputs[:10]} ({len(outputs)})"
                )
            return None if outputs == list(range(self.num_classes)) else outputs
        place = {name: k for k, name in enumerate(self.class_names or []) if self.class_names.count(name) == 1}
        if all(name in place for name in names):
            found = [place[name] for name in names]
            return None if found == list(range(self.num_classes)) else found
        if self.num_classes != len(names):
            raise InputError(
                f"{self.architecture} tells {self.num_classes} classes apart and the dataset has {len(names)}: name its output "
                "for each of them with outputs= (--outputs)"
            )
        if (found := misplaced(names, self.class_names or [])) is not None:
            raise InputError(
                f"the dataset's class {found[0]}, {names[found[0]]!r}, is output {found[1]} of {self.architecture} by its "
                "name, and others are none of its classes: name its output for each of them with outputs= (--outputs)"
            )
        return None


def load_teacher(
    spec: str | os.PathLike,
    *,
    weights: str | os.PathLike | None = None,
    num_classes: int | None = None,
    preprocessing: Preprocessing | None = None,
    default_preprocessing: Preprocessing | None = None,
    image_size: tuple[int, int] | None = None,
) -> Teacher:
    """Build a network, load its weights, try it on one image of zeros, freeze and check it.

    What is not given is taken from the weights, as far as they know it: a checkpoint of bnfuse, torchvision's weights
    by name and timm's ``pretrained`` know their preprocessing and their classes. What is given counts.

    Parameters
    ----------
    spec : the network, or a checkpoint of bnfuse alone; see `SPEC_GRAMMAR`
    weights : a file, or the name of a set of weights
    num_classes : logits a sample
    preprocessing : size, mean and std of the images that it expects
    default_preprocessing : that where it is neither given nor known
    image_size : (height, width) of the images, where it shall be another than what is known

    Warns
    -----
    UserWarning
        The weights are random, since none were given: good for measuring speed only.

    Raises
    ------
    InputError
        Whatever `build_model` and `check_teacher` raise; the preprocessing is neither given nor known; the network does
        not take such images, or does not return one finite logit for each class.
    """
    spec = str(spec)
    if Path(spec).suffix in WEIGHT_SUFFIXES:
        spec, weights, known = _open_checkpoint(spec, weights)
    elif _is_file(weights):
        known = read_facts(weights) or WeightFacts()
    elif weights is not None:
        known = _named_weights(spec, str(weights))
    else:
        known = WeightFacts()

    kind, _ = _parse_spec(spec)
    preprocessing = preprocessing or known.preprocessing or default_preprocessing
    if preprocessing is None:
        raise InputError(f"what images {spec} expects is not known from its weights: {PREPROCESSING_FLAGS}")
    if image_size is not None:
        preprocessing = replace(preprocessing, image_size=image_size)
    num_classes = num_classes or known.num_classes
    if num_classes is None and kind == "bnfuse" and _is_file(weights):
        num_classes = read_weights(weights).get("linear.weight", torch.empty(1)).shape[0]

    model = build_model(spec, num_classes, preprocessing.channels, None if weights is None else str(weights))
    check_teacher(freeze(model), needs_batchnorm=False)
    num_classes = check_output(model, spec, preprocessing, num_classes)
    if known.class_names is not None and len(known.class_names) != num_classes:
        raise InputError(f"{weights} names {len(known.class_names)} classes, but {spec} tells {num_classes} apart")
    if weights is None and kind != "python":
        warnings.warn(f"the teacher {spec} has random weights, since none were given", stacklevel=2)
    return Teacher(model, spec, num_classes, preprocessing, known.class_names)


def _open_checkpoint(path: str, weights: str | os.PathLike | None) -> tuple[str, str, WeightFacts]:
    """A checkpoint in the place of a spec → (its architecture, the file of its weights, what else it knows)."""
    if weights is not None:
        raise InputError(f"{path} holds its own weights; leave out weights={weights}")
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    facts = read_facts(path)
    if facts is None:
        raise InputError(
            f"{path} is no checkpoint of bnfuse, so it does not say what network it is for: give the network as spec "
            f"and weights={path}"
        )
    if _parse_spec(facts.architecture)[0] == "python":  # a file of weights must not choose what code runs
        raise InputError(
            f"{path} is for a network of your own, {facts.architecture}, and bnfuse runs no code because a checkpoint "
            f"says so: load_teacher({facts.architecture!r}, weights={path!r})"
        )
    return facts.architecture, path, facts


def freeze(model: nn.Module) -> nn.Module:
    """Put the model in eval mode and take its parameters out of the graph, in place; returns it."""
    return model.eval().requires_grad_(False)


def check_teacher(model: nn.Module, *, needs_batchnorm: bool = True) -> None:
    """See that the model is one whose statistics can be matched: those of its BatchNorm layers, or of other sites as well.

    Raises
    ------
    InputError
        It has no BatchNorm layer where it needs one; one is in training mode, keeps no running statistics, or has statistics
        that are not finite or a negative variance; or a parameter requires a gradient.
    """
    layers = batchnorm_layers(model)
    if not layers and needs_batchnorm:
        raise InputError(f"{type(model).__name__} has no BatchNorm layer: {other_sites(model)}")
    for name, layer in layers.items():
        if layer.running_mean is None or layer.running_var is None:
            raise InputError(
                f"the BatchNorm layer {name!r} keeps no running statistics (track_running_stats=False): train the "
                "network with track_running_stats=True"
            )
        if layer.training:
            raise InputError(f"the BatchNorm layer {name!r} is in training mode: call model.eval()")
    wanting = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if wanting:
        raise InputError(
            f"{len(wanting)} parameters of the teacher require a gradient, the first {wanting[0]!r}: call bnfuse.freeze(model)"
        )
    for name, layer in layers.items():
        for statistic in ("running_mean", "running_var"):
            bad = int((~getattr(layer, statistic).isfinite()).sum())
            if bad:
                raise InputError(
                    f"the BatchNorm layer {name!r} has a {statistic} that is not finite in {bad} of "
                    f"{layer.num_features} channels: the weights are damaged, or training diverged; load others"
                )
        negative = int((layer.running_var < 0).sum())
        if negative:
            raise InputError(
                f"the BatchNorm layer {name!r} has a negative running_var in {negative} of {layer.num_features} "
                "channels: the weights are damaged; load others"
            )


def check_output(model: nn.Module, spec: str, preprocessing: Preprocessing, num_classes: int | None) -> int:
    """Show the network one image of zeros; return how many logits it gives: `num_classes`, unless that is None.

    Runs in eval mode and without gradient; the mode of every module is put back.

    Raises
    ------
    InputError
        The network does not take [1, C, H, W], or returns anything but finite logits [1, num_classes].
    """
    shape = [1, preprocessing.channels, *preprocessing.image_size]
    like = next(model.parameters(), torch.empty(0))
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(shape, dtype=like.dtype, device=like.device))
    except Exception as error:
        raise InputError(
            f"{spec} does not take images of {preprocessing.channels} channels and "
            f"{preprocessing.image_size[0]}x{preprocessing.image_size[1]} pixels: {type(error).__name__}: {error}"
        ) from error
    finally:
        for module in training:
            module.training = True
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != 1:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"{spec} must return logits [N, num_classes], for one image it returned {got}")
    if num_classes is not None and logits.shape[1] != num_classes:
        raise InputError(f"{spec} tells {logits.shape[1]} classes apart, expected num_classes={num_classes}")
    if not logits.isfinite().all():
        raise InputError(f"{spec} returns logits that are not finite; its weights are damaged or do not belong to it")
    return logits.shape[1]


def batchnorm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every BatchNorm layer by name, in module order: nn.BatchNorm1d, 2d, 3d, nn.SyncBatchNorm and subclasses.

    Raises
    ------
    InputError
        A lazy layer has not yet seen the input that tells it its channels.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for name, layer in layers.items():
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
            raise InputError(f"the BatchNorm layer {name!r} is lazy, without channels yet: run the model on one batch")
    return layers


def fingerprint(model: nn.Module) -> str:
    """SHA-256, in hex, over every tensor of the state dict by name: its name, dtype, shape and bytes.

    The same in every process, on every device and in every memory format; another as soon as one bit differs.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def build_model(spec: str, num_classes: int | None, in_channels: int = 3, pretrained_weights: str | None = None) -> nn.Module:
    """Build the network that `spec` names, with random or given weights; `SPEC_GRAMMAR` says what there is.

    Parameters
    ----------
    spec : the network's name
    num_classes : logits a sample; None leaves it to a ``file.py:function``, which is called without arguments
    in_channels : channels of the input
    pretrained_weights : None, a file, or the name of a set of weights

    Returns
    -------
    nn.Module on the CPU, not frozen; random numbers come from torch's global generator.

    Raises
    ------
    InputError
        An unknown name, a library that is not installed, a file that fails or does not fit the network.
    """
    kind, name = _parse_spec(spec)
    weights_file = str(pretrained_weights) if _is_file(pretrained_weights) else None
    weights_name = None if weights_file else pretrained_weights
    if kind != "python" and (num_classes is None or num_classes < 1):
        raise InputError(f"{spec} needs to know how many classes it tells apart (num_classes), got {num_classes}")
    if weights_name is not None:
        known = _named_weights(spec, weights_name).num_classes
        if num_classes != known:
            raise InputError(f"the weights {weights_name!r} of {spec} tell {known} classes apart, not {num_classes}")

    if kind == "python":
        model = _call_python_file(name)
    elif kind == "torchvision":
        model = _torchvision_model(name, num_classes, in_channels, weights_name)
    elif kind == "timm":
        model = _timm_model(name, num_classes, in_channels, weights_name)
    elif name == "convnet3":
        model = ConvNet(num_classes, in_channels)
    else:
        model = CifarResNet(int(name.removeprefix("resnet")), num_classes, in_channels)
    if weights_file:
        load_state(model, read_weights(weights_file), spec, weights_file)
    _check_parameters(model, spec)
    return model


def _check_parameters(model: nn.Module, spec: str) -> None:
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise InputError(f"{spec}: {name} is lazy, without a shape yet: run the network on one batch before it is returned")
        if parameter.dtype != torch.float32:
            raise InputError(
                f"{spec}: {name} is {parameter.dtype}, expected torch.float32: return model.float(); images and statistics are "
                "float32, and what is faster is a matter of --precision"
            )


def _parse_spec(spec: str) -> tuple[str, str]:
    """`spec` → ("bnfuse" | "torchvision" | "timm" | "python", what follows)."""
    spec = str(spec)
    prefix, _, name = spec.rpartition(":")
    if prefix in ("torchvision", "timm") and name:
        return prefix, name
    if prefix.endswith(".py") and name:
        return "python", spec
    if spec == "convnet3" or spec in (f"resnet{depth}" for depth in RESNET_DEPTHS):
        return "bnfuse", spec
    hint = ""
    if re.fullmatch(r"[\w.]+", spec):
        hint = f" (bnfuse has no {spec} of its own; perhaps torchvision:{spec} or timm:{spec})"
    raise InputError(f"no model is called {spec!r}{hint}.\n{SPEC_GRAMMAR}")


def _is_file(weights: str | os.PathLike | None) -> bool:
    return weights is not None and (Path(weights).suffix in WEIGHT_SUFFIXES or Path(weights).is_file())


def _call_python_file(spec: str) -> nn.Module:
    """Import file.py and call function(), for a spec of ``file.py:function``. The file may import its neighbours."""
    file, _, function = spec.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise InputError(f"{file} is not a file; a model of your own is named path/to/file.py:function")
    module_name = f"bnfuse_model_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # where dataclasses and pickling look for it
    sys.path.insert(0, str(path.parent))
    try:
        module_spec.loader.exec_module(module)
        make = getattr(module, function, None)
        model = make() if callable(make) else None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{file}, line {lines[-1]}" if lines else file
        raise InputError(f"{where}: {type(error).__name__}: {error} (while {function}() built the model)") from error
    finally:
        sys.path.remove(str(path.parent))
    if not callable(make):
        raise InputError(f"{file} has no function called {function}")
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec} must return a torch.nn.Module, it returned {type(model).__name__}")
    return model


def _torchvision_model(name: str, num_classes: int, in_channels: int, weights: str | None) -> nn.Module:
    models = _torchvision_models(name)
    if in_channels != 3:
        raise InputError(
            f"torchvision:{name} takes images of 3 channels, not {in_channels}; timm:{name} or a resnet of bnfuse's "
            "own takes any number"
        )
    enum = None if weights is None else _torchvision_weights(name, weights)
    try:
        return models.get_model(name, weights=enum, num_classes=num_classes)
    except OSError as error:
        raise InputError(f"the weights {weights!r} of torchvision:{name} could not be downloaded: {error}") from error


def _timm_model(name: str, num_classes: int, in_channels: int, weights: str | None) -> nn.Module:
    timm = _timm(name)
    try:
        return timm.create_model(name, pretrained=weights is not None, num_classes=num_classes, in_chans=in_channels)
    except Exception as error:
        raise InputError(f"timm could not build {name!r}: {type(error).__name__}: {error}") from error


def _named_weights(spec: str, weights: str) -> WeightFacts:
    """What torchvision's weights enumeration, or timm's ``pretrained_cfg``, says about pretrained weights."""
    kind, name = _parse_spec(spec)
    if kind == "torchvision":
        enum = _torchvision_weights(name, weights)
        preset, names = enum.transforms(), list(enum.meta["categories"])
        size = tuple(preset.crop_size) * (2 if len(preset.crop_size) == 1 else 1)
        return WeightFacts(len(names), Preprocessing(size, preset.mean, preset.std), names)
    if kind == "timm":
        if weights != "pretrained":
            raise InputError(f"the weights of a timm model are a file or 'pretrained', got {weights!r}")
        cfg = _timm(name).get_pretrained_cfg(name)
        if cfg is None or not cfg.has_weights:
            raise InputError(f"timm has no pretrained weights for {name!r}; timm.list_pretrained() lists what it has")
        return WeightFacts(cfg.num_classes, Preprocessing(cfg.input_size[1:], cfg.mean, cfg.std))
    raise InputError(
        f"{spec} has no weights called {weights!r}: give a file, one of {', '.join('*' + s for s in WEIGHT_SUFFIXES)}"
    )


def _torchvision_models(name: str):
    """The module torchvision.models, once `name` is known to be in it."""
    models = _import_library("torchvision.models", "torchvision")
    known = models.list_models(module=models)
    if name not in known:
        raise InputError(f"torchvision has no classifier called {name!r}{_did_you_mean(name, known)}")
    return models


def _torchvision_weights(name: str, weights: str):
    """The member called `weights` of torchvision's enumeration of weights for the model `name`."""
    enum = _torchvision_models(name).get_model_weights(name)
    if weights not in enum.__members__:
        raise InputError(f"torchvision:{name} has no weights {weights!r}; it has {', '.join(enum.__members__)}")
    return enum[weights]


def _timm(name: str):
    """The module timm, once `name` is known to be in it."""
    timm = _import_library("timm", "timm")
    if not timm.is_model(name):
        raise InputError(f"timm has no model called {name!r}{_did_you_mean(name, timm.list_models())}")
    return timm


def _import_library(name: str, extra: str):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"{extra} models need {error.name}, not installed: pip install bnfuse[{extra}]") from error
    except Exception as error:  # a build for another torch fails in many ways, the least of them an ImportError
        raise InputError(
            f"{extra} is installed but cannot be imported beside torch {torch.__version__}: {error}. "
            f"Install the version made for this torch: pip install --upgrade bnfuse[{extra}]"
        ) from error


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""
