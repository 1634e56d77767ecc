"""SPIN's published weights in HMR's place (Kolotouros et al., "Learning to Reconstruct 3D Human
Pose and Shape via Model-Fitting in the Loop", ICCV 2019; its data/model_checkpoint.pt).

    python -m appendix.photo PHOTO.jpg --checkpoint model_checkpoint.pt --smpl SMPL_NEUTRAL.pkl
    python -m appendix.datasets measure model_checkpoint.pt --smpl SMPL_NEUTRAL.pkl --data ..

SPIN is HMR trained otherwise: the same ResNet-50 and idea of a regressor, but no ReLU between the
regressor's layers, three heads in place of one last layer, 6D rotations, another order of Theta.
Its camera was trained as a pinhole of f = 5,000 pixels at tz = 2 f / (224 s), which at that
distance is the camera of `project`.  Its own 49 keypoints are not here: the 19 are HMR's.

Axes:  B images   T = 3 iterations   157 = cam 3 | pose 144 (6D) | betas 10
"""

import os
import re
import textwrap
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from hmr import BETAS, CAM, HMR, POSE, Discriminator
from smpl import SMPL, load_tensors, require_finite, say


class SpinRegressor(nn.Module):
    """feature (B, 2048) -> [Theta_1 .. Theta_T], each (B, 157).  SPIN's names of the weights."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2048 + 157, 1024), nn.Linear(1024, 1024)
        for name, width in (("cam", 3), ("pose", 144), ("shape", 10)):
            setattr(self, f"dec{name}", nn.Linear(1024, width))
            self.register_buffer(f"init_{name}", torch.zeros(1, width))

    def forward(self, feature: Tensor) -> list[Tensor]:
        theta = torch.cat([self.init_cam, self.init_pose, self.init_shape], 1)    # (1, 157) Theta_0
        theta = theta.expand(len(feature), -1)                        # (B, 157)
        thetas = []
        for _ in range(3):
            # The camera comes last.  Without a ReLU, and with dropout off, the two layers are one
            # linear map.
            x = torch.cat([feature, theta[:, POSE], theta[:, BETAS], theta[:, CAM]], 1)
            x = F.dropout(self.fc1(x), 0.5, self.training)            # (B, 1024)
            x = F.dropout(self.fc2(x), 0.5, self.training)            # (B, 1024)
            theta = theta + torch.cat([self.deccam(x), self.decpose(x), self.decshape(x)], 1)
            thetas.append(theta)
        return thetas


class Network(NamedTuple):
    """A trained network and what one needs to know to use it."""
    model: HMR
    D: Discriminator | None   # SPIN has none
    config: train.Config
    crop: str                 # one of data.CROPS; "spin": SPIN's own rule
    world: str                # what it was trained on


class Inert:
    """In place of numpy's classes in SPIN's file (epoch, loss, ..), which trust what a pickle says
    of them.  Nothing here needs those numbers."""

    def __init__(self, *args):
        pass

    __setstate__ = __init__


NUMPY = [(Inert, name) for name in (
    "_codecs.encode", "numpy.dtype", "numpy.ndarray",
    "numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct")]


def load_network(path: str | os.PathLike, smpl: str | os.PathLike | None = None,
                 device: str = "auto") -> Network:
    """A run's checkpoint.pt, or SPIN's published weights, in eval mode.

    Raises FileNotFoundError, or ValueError, which says what is amiss.
    """
    with torch.serialization.safe_globals(NUMPY):
        content = load_tensors(path)
    found, world = content.get("model"), content.get("world")
    weights = {} if not isinstance(found, dict) else {         # "module." is DataParallel's
        str(name).removeprefix("module."): x for name, x in found.items()}
    if "decpose.weight" not in weights:
        del content, found, weights                 # a large run's file is not held twice
        model, D, config = train.load(path, smpl, device)             # checks all that it reads
        return Network(model, D, config, config.crop, world)
    config = train.settle(train.Config(rotation="6d", adv=False, amp="off", device=device,
                                       smpl=os.fspath(smpl or "")))
    model = HMR(SMPL(config.smpl or None), depth=50, rotation="6d")
    if len(model.smpl.v_template) != 6890:
        say(f"SPIN was trained with SMPL's neutral body: on {model.smpl.name} its betas mean "
            f"nothing and its poses are a little off; name SMPL's file by --smpl")
    model.regressor = SpinRegressor()
    try:                                            # PyTorch does without BatchNorm's old counters
        model.load_state_dict({
            ("regressor." if re.match("fc|dec|init", name) else "encoder.") + name: x
            for name, x in weights.items()})
    except RuntimeError as error:                   # lists what is missing, odd or too much
        raise ValueError(f"{path}: SPIN's weights are expected; name its model_checkpoint.pt "
                         f"({textwrap.shorten(str(error), 999)})") from None
    require_finite(weights, str(path))
    return Network(model.eval().to(config.device), None, config, "spin",
                   "SPIN's data (photographs)")
