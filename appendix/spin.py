"""SPIN's published weights in HMR's place (Kolotouros et al., "Learning to Reconstruct 3D Human
Pose and Shape via Model-Fitting in the Loop", ICCV 2019; its data/model_checkpoint.pt).

    python -m appendix.photo PHOTO.jpg --checkpoint model_checkpoint.pt --smpl SMPL_NEUTRAL.pkl
    python -m appendix.datasets measure model_checkpoint.pt --smpl SMPL_NEUTRAL.pkl --data ..

SPIN is HMR trained otherwise: the same ResNet-50 and idea of a regressor, but no ReLU between the
regressor's layers, three heads in place of one last layer, 6D rotations, another order of Theta.

Axes:  B images   T = 3 iterations   157 = cam 3 | pose 144 (6D) | betas 10
"""

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from hmr import BETAS, CAM, HMR, POSE, Discriminator
from smpl import SMPL, load_tensors, require_finite, say

HEADS = {"pose": 144, "shape": 10, "cam": 3}          # in the order in which fc1 reads them


class SpinRegressor(nn.Module):
    """feature (B, 2048) -> [Theta_1 .. Theta_T], each (B, 157).  SPIN's names of the weights."""

    def __init__(self, iterations: int = 3, dropout: float = 0.5):
        super().__init__()
        self.iterations, self.dropout = iterations, dropout
        self.fc1 = nn.Linear(2048 + sum(HEADS.values()), 1024)
        self.fc2 = nn.Linear(1024, 1024)
        for name, width in HEADS.items():
            setattr(self, f"dec{name}", nn.Linear(1024, width))
            self.register_buffer(f"init_{name}", torch.zeros(1, width))

    @property
    def theta_bar(self) -> Tensor:
        """Where the regressor starts, in this project's order -> (1, 157)."""
        return torch.cat([self.init_cam, self.init_pose, self.init_shape], 1)

    def forward(self, feature: Tensor) -> list[Tensor]:
        theta = self.theta_bar.expand(len(feature), -1)               # (B, 157) Theta_0
        thetas = []
        for _ in range(self.iterations):
            # The camera comes last.  Without a ReLU, and with dropout off, the two layers are one
            # linear map.
            x = torch.cat([feature, theta[:, POSE], theta[:, BETAS], theta[:, CAM]], 1)
            x = F.dropout(self.fc1(x), self.dropout, self.training)   # (B, 1024)
            x = F.dropout(self.fc2(x), self.dropout, self.training)   # (B, 1024)
            theta = theta + torch.cat([self.deccam(x), self.decpose(x), self.decshape(x)], 1)
            thetas.append(theta)
        return thetas


class SPIN(HMR):
    """HMR's interface (Thetas, encode, decode) with SPIN's regressor.

    Its camera was trained as a pinhole of f = 5,000 pixels at tz = 2 f / (224 s), which at that
    distance is the camera of `project`.  Its own 49 keypoints are not here: the 19 are HMR's.
    """

    def __init__(self, smpl: SMPL):
        super().__init__(smpl, depth=50, rotation="6d")
        self.regressor = SpinRegressor()


class Inert:
    """In place of numpy's numbers in the file (epoch, loss, ..), which nothing here needs.  numpy's
    own classes trust what a pickle says of them."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


NUMPY = [(Inert, name) for name in (
    "numpy.dtype", "numpy.ndarray", "_codecs.encode",
    *(f"numpy.{core}.multiarray.{f}" for core in ("core", "_core") for f in ("scalar",
                                                                             "_reconstruct")))]


def read(path: str | os.PathLike) -> dict:
    """What a checkpoint of SPIN or of a run holds; {} for a broken or foreign file."""
    try:
        with torch.serialization.safe_globals(NUMPY):
            return load_tensors(path)
    except Exception:                           # train.load says what is wrong
        return {}


def spin_weights(content: dict) -> dict[str, Tensor] | None:
    """The weights by name, without DataParallel's "module." before it; None for another file."""
    try:
        weights = {name.removeprefix("module."): x for name, x in content["model"].items()}
        return weights if "decpose.weight" in weights else None
    except (LookupError, AttributeError, TypeError):
        return None


def load_spin(path: str | os.PathLike, smpl: SMPL | None = None) -> SPIN:
    """SPIN's checkpoint -> the network, in eval mode.  Raises ValueError, listing what is amiss."""
    if weights := spin_weights(read(path)):
        return build_spin(weights, path, smpl or SMPL())
    raise ValueError(f"{path}: not SPIN's checkpoint, a dict whose `model` has decpose.weight")


def build_spin(weights: dict[str, Tensor], path: str | os.PathLike, smpl: SMPL) -> SPIN:
    """`load_spin` of weights that were read."""
    if len(smpl.v_template) != 6890:
        say(f"SPIN was trained with SMPL's neutral body: on {smpl.name} its betas mean nothing and "
            f"its poses are a little off; name SMPL's file by --smpl")
    model = SPIN(smpl)
    parts = (model.encoder, model.regressor)              # whose weights lie in one dict in SPIN
    own = {name: x for part in parts for name, x in part.state_dict().items()}
    # old files may lack BatchNorm's counters, which nothing reads here
    weights = {name: x for name, x in own.items() if name.endswith("tracked")} | weights
    expected, found = ({name: tuple(getattr(x, "shape", ["no tensor"])) for name, x in some.items()}
                       for some in (own, weights))
    wrong = [f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'no such one')}"
             for name in sorted(expected.keys() | found.keys())
             if found.get(name) != expected.get(name)]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} of its weights are not SPIN's: "
                         + "; ".join(wrong[:20]) + "; .." * (len(wrong) > 20))
    require_finite(weights, str(path))
    for part in parts:
        part.load_state_dict({name: weights[name] for name in part.state_dict()})
    return model.eval()


class Network(NamedTuple):
    """A trained network and what one needs to know to use it."""
    model: HMR
    D: Discriminator | None   # SPIN has none
    config: train.Config
    crop: str                 # one of data.CROPS; "spin": SPIN's own rule
    world: str                # what it was trained on


def load_network(path: str | os.PathLike, smpl: str | os.PathLike | None = None,
                 device: str = "auto") -> Network:
    """A run's checkpoint.pt, or SPIN's published weights.  Raises FileNotFoundError, ValueError."""
    content = read(path)
    weights, world = spin_weights(content), content.get("world", "")
    del content                                 # a large run's file is not held twice
    if weights is None:
        model, D, config = train.load(path, smpl, device)             # checks all that it reads
        return Network(model, D, config, config.crop, world)
    config = train.settle(train.Config(rotation="6d", adv=False, amp="off", device=device,
                                       smpl=os.fspath(smpl or "")))
    model = build_spin(weights, path, SMPL(config.smpl or None)).to(config.device)
    return Network(model, None, config, "spin", "SPIN's data (photographs)")
