"""HMR: one picture -> a body in it.  Encoder, iterative regressor, camera, losses, adversary.

Chapter 2 of 4 (smpl.py <- hmr.py <- data.py <- train.py).  The paper is Kanazawa, Black, Jacobs,
Malik, "End-to-end Recovery of Human Shape and Pose", CVPR 2018.  Tags such as `Eq. (3)` and
`Sec. 3.4` refer to it.  "Official code" is the authors' TensorFlow release.  "Slides" are two
lecture decks, one on ResNet and one on HMR.  Without the slides, read Table 1 and Eqs. (1) and (2)
of He et al., "Deep Residual Learning for Image Recognition", 2016, and the HMR paper.

    image --ResNet--> feature --IEF x T--> Theta = [cam | pose | betas] --SMPL--> 3D --camera--> 2D
                                             |                                   |            |
                             K + 2 = 25 discriminators (L_adv)                 L_3D       L_reproj

Axes:  B images   T = 3 regression iterations   N = B*T bodies that the discriminators judge
       C channels   H, W pixels   19 keypoints (the first 14 are LSP's)   24 joints = root + 23
       85 = 3 + 72 + 10
Some letters have two meanings.  K is the 23 joints in the paper's Sec. 3.1 and 3.3 and the number
       of keypoints elsewhere.  F is torch's functional in code and the residual function on
       slides.  E is the encoder, and E[..] is a mean.
Camera frame: x right, y DOWN, z away from the camera, in metres.  SMPL's own frame is y up, so a
       person who stands upright and faces the camera has root rotation Rx(pi).
2D: the square crop is [-1, 1] x [-1, 1]; pixel = (x + 1) * size / 2.

    python hmr.py            # the slides' table of ResNets, shapes and known values
"""

import argparse
import math
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from smpl import SMPL, batch_rodrigues, exit_status, rot6d_to_rotmat, without_autocast

# --------------------------------------------------------------------------------------------
# 1. The image encoder (Sec. 3.4; slides: ResNet)
#
# The paper and the official code use ResNet-50 v2 (pre-activation).  The slides, SPIN and most
# later work use the post-activation network below.  Its parameters have torchvision's names, so
# that torchvision's ImageNet weights load.  BatchNorm keeps torch's momentum of 0.1 for its running
# statistics.  The official code's decay of 0.997 would be a momentum of 0.003, which is slow for
# the 4,000 steps of --small without a GPU.

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# slides: the table.  depth: (bottleneck blocks?, number of blocks in conv2_x .. conv5_x)
RESNETS = {18: (False, (2, 2, 2, 2)), 34: (False, (3, 4, 6, 3)), 50: (True, (3, 4, 6, 3)),
           101: (True, (3, 4, 23, 3)), 152: (True, (3, 8, 36, 3))}


class Block(nn.Module):
    """slides: y = F(x, {W_i}) + x.  In ResNet v1 a ReLU follows the addition.

    slides: a block that is to compute H(x) learns only F(x) := H(x) - x.  If F's weights are
    zero and the shortcut is the identity, the block is the identity: F adds nothing, and the
    ReLU changes nothing, since x is a ReLU's output and never negative.  The slides'
    "constructed solution" is a shallow network followed by such blocks.  A plain block would
    have to learn the identity.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = self.residual(x)                                          # (B, C, h, w)
        # Here None means that there is no shortcut; in torchvision None means the identity.
        if self.downsample is not None:
            y = y + self.downsample(x)      # slides: shortcut
        return F.relu(y)


class BasicBlock(Block):
    """slides: two 3x3 convolutions, y = F(x) + x (18 and 34 layers)."""
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, plain: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None if plain else shortcut(inputs, width, stride)

    def residual(self, x: Tensor) -> Tensor:
        """F(x): (B, C, H, W) -> (B, width, H/stride, W/stride).  F ends without a ReLU."""
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))  # (B, width, h, w)


class Bottleneck(Block):
    """slides: 1x1 down, 3x3, 1x1 up to 4 * width (50, 101 and 152 layers)."""
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, plain: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        # He et al. put a stage's stride into the first 1x1.  torchvision puts it into the 3x3,
        # which is slightly more accurate and slower ("v1.5").  Its weights expect the stride there.
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None if plain else shortcut(inputs, 4 * width, stride)

    def residual(self, x: Tensor) -> Tensor:
        """F(x): (B, C, H, W) -> (B, 4 * width, H/stride, W/stride).  F ends without a ReLU."""
        x = F.relu(self.bn1(self.conv1(x)))                           # (B, width, H, W)
        x = F.relu(self.bn2(self.conv2(x)))                           # (B, width, h, w): strided
        return self.bn3(self.conv3(x))                                # (B, 4 * width, h, w)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """slides: the identity where dimensions agree, else the projection W_s: y = F(x) + W_s x."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def resnet_stages(depth: int, width: int, plain: bool) -> list[nn.Sequential]:
    """slides: conv2_x .. conv5_x.  Stage 0..3 has `width * 2^stage` inner channels."""
    bottleneck, counts = RESNETS[depth]
    block, channels, stages = Bottleneck if bottleneck else BasicBlock, width, []
    for stage, count in enumerate(counts):
        blocks = []
        for i in range(count):
            # The first block of a stage halves the picture.  The first block of conv2_x does not,
            # because the max pool before it halves already.
            stride = 2 if stage > 0 and i == 0 else 1
            blocks.append(block(channels, width * 2 ** stage, stride, plain))
            channels = width * 2 ** stage * block.expansion
        stages.append(nn.Sequential(*blocks))
    return stages


class ResNet(nn.Module):
    """images (B, 3, H, W) -> feature (B, C), C = 512 * expansion * width / 64 (2048 for depth 50).

    depth 18|34|50|101|152; width 64 on the slides; plain: no shortcuts, the slides' degrading
    network; num_classes: adds torchvision's classifier `fc`, so that the output is
    (B, num_classes).  Raises ValueError for another depth.

    Five layers halve the resolution: conv1, the max pool, and the first block of layer2, layer3 and
    layer4.  These three blocks have a projection as their shortcut.  In a bottleneck network the
    first block of layer1 has one, too, at stride 1, because its channels grow from 64 to 256.
    """

    def __init__(self, depth: int = 50, width: int = 64, plain: bool = False,
                 num_classes: int | None = None):
        super().__init__()
        if depth not in RESNETS:
            raise ValueError(f"depth must be one of {sorted(RESNETS)}, got {depth}")
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3, self.layer4 = resnet_stages(depth, width, plain)
        self.feature_dim = 8 * width * (Bottleneck if RESNETS[depth][0] else BasicBlock).expansion
        self.fc = None if num_classes is None else nn.Linear(self.feature_dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):        # He init keeps the variance through ReLUs
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))                           # (B, width, H/2, W/2)
        x = F.max_pool2d(x, 3, 2, padding=1)                          # (B, width, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))     # (B, C, H/32, W/32)
        # The global average pool sums in float32 even when the convolutions ran in bf16.
        x = x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))     # (B, C)
        return x if self.fc is None else self.fc(x)                   # (B, C or num_classes)


# --------------------------------------------------------------------------------------------
# 2. The regressor: iterative error feedback, IEF (Sec. 3.2 and 3.4)
#
# It is hard to regress rotations in one go.  So the network gets its own estimate as input and
# outputs a correction, T times, with the same weights:
#     Theta_{t+1} = Theta_t + DeltaTheta(phi, Theta_t),   Theta_0 = Theta-bar.

# Theta = [cam 3 | pose 72 | betas 10] is the official order.  The slice POSE takes everything
# between the other two, so that it also fits the 6D variant, Theta (B, 157) with pose (B, 144).
CAM, POSE, BETAS = slice(0, 3), slice(3, -10), slice(-10, None)


def split_theta(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Theta (B, 85) -> cam (B, 3) = s, tx, ty; pose (B, 72); betas (B, 10)."""
    return theta[:, CAM], theta[:, POSE], theta[:, BETAS]          # (B, 3), (B, 72 or 144), (B, 10)


def pose_to_rotmats(pose: Tensor) -> Tensor:
    """pose (B, 72) axis-angle or (B, 144) 6D -> rotation matrices (B, 24, 3, 3)."""
    pose = pose.unflatten(-1, (24, -1))                               # (B, 24, 3 or 6)
    return batch_rodrigues(pose) if pose.shape[-1] == 3 else rot6d_to_rotmat(pose)  # (B, 24, 3, 3)


def mean_theta(mean_pose: Tensor, rotation: str = "axis-angle") -> Tensor:
    """Theta-bar, where IEF starts: scale 0.9, a mean pose, upright, average shape -> (1, 85).

    mean_pose (72,) in SMPL's frame.  With rotation "6d" Theta-bar is (1, 157), and so is every
    Theta that follows from it.  Upright in a y-down camera means that the root is Rx(pi), so the
    mean pose's own root is replaced, as in the official code.  The official code reads pose and
    shape from a file of mean parameters.  Here the pose is the body file's, and the shape is 0.
    """
    pose = mean_pose.detach().cpu().clone().view(24, 3)               # (24, 3)
    pose[0] = torch.tensor([math.pi, 0, 0])
    if rotation == "6d":
        pose = batch_rodrigues(pose)[..., :2]       # (24, 3, 2) two columns: SPIN's interleaved 6D
    cam = torch.tensor([0.9, 0.0, 0.0])
    return torch.cat([cam, pose.flatten(), torch.zeros(10)])[None]    # (1, 85 or 157)


class Regressor(nn.Module):
    """feature (B, C) -> [Theta_1 .. Theta_T], each (B, 85).

    Sec. 3.4: [phi, Theta] -> FC 1024 -> FC 1024 -> FC 85, with "a dropout layer in between".  The
    official code has a dropout after each hidden layer's ReLU.  (SPIN's regressor has no ReLUs.)
    There are 3,321,941 parameters for C = 2048.  Theta-bar is a buffer.  The official code trains
    it, and the paper does not mention this.  The released mean therefore differs from the first.
    """

    def __init__(self, feature_dim: int, theta_bar: Tensor, iterations: int = 3,
                 dropout: float = 0.5):
        super().__init__()
        dim = theta_bar.shape[1]
        self.iterations, self.dropout = iterations, dropout
        self.fc1 = nn.Linear(feature_dim + dim, 1024)
        self.fc2 = nn.Linear(1024, 1024)
        self.fc3 = nn.Linear(1024, dim)
        for layer, gain in ((self.fc1, 1.0), (self.fc2, 1.0), (self.fc3, 0.1)):
            # The small last layer (uniform within 0.0074 for 85 outputs) makes training start near
            # Theta-bar.  SPIN's gain is 0.01.  A default nn.Linear would start far from it.
            nn.init.xavier_uniform_(layer.weight, gain=gain)
            nn.init.zeros_(layer.bias)
        self.register_buffer("theta_bar", theta_bar)                  # (1, 85)

    @without_autocast
    def forward(self, feature: Tensor) -> list[Tensor]:
        theta = self.theta_bar.expand(len(feature), -1)               # (B, 85) Theta_0
        thetas = []
        for _ in range(self.iterations):                              # shared weights
            x = torch.cat([feature, theta], 1)                        # (B, C + 85) feature first
            x = F.dropout(F.relu(self.fc1(x)), self.dropout, self.training)       # (B, 1024)
            x = F.dropout(F.relu(self.fc2(x)), self.dropout, self.training)       # (B, 1024)
            theta = theta + self.fc3(x)        # no detach: gradients run through all T iterations
            thetas.append(theta)
        return thetas


# --------------------------------------------------------------------------------------------
# 3. The camera (Sec. 3.1, Eq. (2))

def project(points: Tensor, cam: Tensor) -> Tensor:
    """Weak perspective: points (B, P, 3) in metres, cam (B, 3) = s, tx, ty -> (B, P, 2) in [-1, 1].

    This is the official code's s (X + t), with t in metres.  The paper writes s Pi(R X) + t.  The
    two differ wherever t is not 0: t_paper = s t.  R is already applied, as SMPL's root rotation.
    """
    s, t = cam[:, None, :1], cam[:, None, 1:]                         # (B, 1, 1), (B, 1, 2)
    return s * (points[..., :2] + t)                                  # Eq. (2)


# --------------------------------------------------------------------------------------------
# 4. The whole network

class HMROutput(NamedTuple):
    rotmats: Tensor           # (B, 24, 3, 3) root included
    betas: Tensor             # (B, 10)
    cam: Tensor               # (B, 3) s, tx, ty
    joints: Tensor            # (B, 24, 3) camera frame, metres
    keypoints3d: Tensor       # (B, 19, 3) camera frame, metres
    keypoints2d: Tensor       # (B, 19, 2) crop in [-1, 1]
    vertices: Tensor | None   # (B, V, 3) camera frame, metres; on request


def mixed_precision(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Matrix products and convolutions in dtype (torch.bfloat16); None switches nothing on."""
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


class HMR(nn.Module):
    """images (B, 3, H, W), RGB in [0, 1] -> the T Thetas and the last one decoded (HMROutput).

    rotation: "axis-angle" as in the paper, Theta (B, 85), or "6d", Theta (B, 157).
    amp: dtype of the encoder's mixed precision (torch.bfloat16) or None.  The regressor, SMPL and
    the losses stay in float32, because bf16 loses millimetres and small angles.
    Raises ValueError for another rotation, and for images of another shape or dtype.
    """

    def __init__(self, smpl: SMPL, depth: int = 50, iterations: int = 3, width: int = 64,
                 plain: bool = False, dropout: float = 0.5, rotation: str = "axis-angle",
                 amp: torch.dtype | None = None):
        super().__init__()
        if rotation not in ("axis-angle", "6d"):
            raise ValueError(f'rotation must be "axis-angle" or "6d", got {rotation!r}')
        self.smpl, self.amp = smpl, amp
        self.encoder = ResNet(depth, width, plain)
        theta_bar = mean_theta(smpl.mean_pose, rotation)              # (1, 85)
        self.regressor = Regressor(self.encoder.feature_dim, theta_bar, iterations, dropout)
        # torchvision's weights want ImageNet's statistics; the official code scales to [-1, 1].
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[list[Tensor], HMROutput]:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be (B, 3, H, W), numbers in [0, 1] (divide bytes by "
                             f"255); got {tuple(images.shape)}, {images.dtype}")
        thetas = self.regressor(self.encode(images))                  # T x (B, 85)
        return thetas, self.decode(thetas[-1])

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> feature (B, C)."""
        images = (images - self.mean) / self.std                      # (B, 3, H, W)
        with mixed_precision(images.device, self.amp):
            return self.encoder(images)                               # (B, C)

    @without_autocast
    def decode(self, theta: Tensor, vertices: bool = False) -> HMROutput:
        """Theta (B, 85) -> HMROutput: rotation matrices, the body, its projection."""
        cam, pose, betas = split_theta(theta)                      # (B, 3), (B, 72 or 144), (B, 10)
        return self.body(cam, pose_to_rotmats(pose), betas, vertices)

    def body(self, cam: Tensor, rotmats: Tensor, betas: Tensor, vertices: bool = True) -> HMROutput:
        """cam (B, 3), rotmats (B, 24, 3, 3), betas (B, 10) -> HMROutput."""
        body = self.smpl(betas, rotmats, vertices=vertices)
        keypoints2d = project(body.keypoints, cam)                    # (B, 19, 2)
        return HMROutput(rotmats, betas, cam, body.joints, body.keypoints, keypoints2d,
                         body.vertices)


# --------------------------------------------------------------------------------------------
# 5. The losses (Sec. 3.2)
#
# The paper writes sums.  The official code takes means over what is labelled.  Its weights 60, 60
# and 1 assume the denominators below.  The losses' "joints" are keypoints: LSP's 14 in 3D, all
# 19 in 2D.  The skeleton's 24 joints are in no loss.

RIGHT_HIP, LEFT_HIP, LSP = 2, 3, 14          # among the 19 keypoints; LSP's are the first 14


def masked_mean(difference: Tensor, mask: Tensor, penalty: Callable) -> Tensor:
    """Mean penalty of the differences whose mask is not 0; 0 if every mask is 0.

    The mask only selects: 0.5 counts as 1.  `where` is applied before the penalty, since a missing
    label may be NaN, and NaN * 0 is NaN.
    """
    mask = (mask != 0).expand_as(difference)
    error = penalty(torch.where(mask, difference, 0))                 # as `difference`
    return error.sum() / mask.sum().clamp(min=1)                      # ()


def keypoint_loss(pred: Tensor, target: Tensor, visible: Tensor) -> Tensor:
    """L_reproj = sum_i ||v_i (x_i - xhat_i)||_1: (B, 19, 2), (B, 19, 2), (B, 19) -> ().

    Eq. (3) and the official code use L1.  (Fig. 2's graphic shows a squared L2.)  The mean is over
    the visible coordinates of the whole BATCH, 2 * sum(v) of them, not per image.
    """
    return masked_mean(target - pred, visible[..., None], torch.abs)        # Eq. (3)


def hip_midpoint(keypoints3d: Tensor) -> Tensor:
    """The middle of the two hip keypoints, (B, 14+, 3) -> (B, 1, 3); not SMPL's pelvis joint."""
    return keypoints3d[:, RIGHT_HIP:LEFT_HIP + 1].mean(1, keepdim=True)


def joints3d_loss(pred: Tensor, target: Tensor, has_3d: Tensor) -> Tensor:
    """L_joints = ||X_i - Xhat_i||^2: pred and target (B, K, 3), metres, has_3d (B, K) -> ().

    K is 19, or 14 for all three.  Both bodies are centred at their own hips.  The loss is 0.5 *
    mean over the labelled numbers, 42 of a body with all 14 LSP keypoints.  A body without both
    hips cannot be centred and does not count.
    """
    error = (pred - hip_midpoint(pred)) - (target - hip_midpoint(target))   # (B, K, 3)
    has_hips = has_3d[:, RIGHT_HIP:LEFT_HIP + 1].amin(1, keepdim=True)      # (B, 1)
    labelled = (has_3d * has_hips)[..., None]                         # (B, K, 1)
    return 0.5 * masked_mean(error[:, :LSP], labelled[:, :LSP], torch.square)     # Eq. (5)


def smpl_loss(rotmats: Tensor, betas: Tensor, target_rotmats: Tensor, target_betas: Tensor,
              has_smpl: Tensor) -> Tensor:
    """L_smpl = ||[beta, theta] - [betahat, thetahat]||^2: (B, 24, 3, 3), (B, 10), twice -> ().

    Eq. (6) compares axis-angle vectors, the official code rotation MATRICES, root included.  The
    vectors r and r (1 - 2 pi / |r|) are the same rotation but far apart, and an upright person who
    faces the camera (|r| = pi) is exactly at this jump.  The loss is 0.5 * mean over the labelled
    samples' 226 numbers.
    """
    pred = torch.cat([rotmats.flatten(1), betas], 1)                  # (B, 226)
    target = torch.cat([target_rotmats.flatten(1), target_betas], 1)  # (B, 226)
    return 0.5 * masked_mean(pred - target, has_smpl[:, None], torch.square)     # Eq. (6)


# --------------------------------------------------------------------------------------------
# 6. The factorised adversarial prior (Sec. 3.3): K + 2 = 25 discriminators

class Discriminator(nn.Module):
    """rotmats (N, 23, 3, 3) without root, betas (N, 10) -> (N, 25) = [23 joints | all | shape].

    The slides say that SMPL's factorised form makes training the adversary data-efficient and
    stable.  One network per joint learns this joint's limits, one for all joints learns which
    rotations occur together, and one learns the shape.  The root is left out, since people may face
    anywhere.  Real samples come from motion capture and need no picture.  So the prior takes the
    place of paired 3D labels.  The squared loss pulls the outputs to 0 and 1, so there is no
    sigmoid, although the paper writes [0, 1].
    amp: dtype of the mixed precision (torch.bfloat16) or None; the outputs are float32.
    Raises ValueError for other shapes.
    """

    def __init__(self, amp: torch.dtype | None = None):
        super().__init__()
        self.amp = amp
        self.embed1 = nn.Linear(9, 32)               # shared by all joints (Sec. 3.4: "common")
        self.embed2 = nn.Linear(32, 32)
        self.joint_weight = nn.Parameter(torch.empty(23, 32))         # an FC 32 -> 1 for each joint
        self.joint_bias = nn.Parameter(torch.zeros(23))
        self.all1 = nn.Linear(23 * 32, 1024)
        self.all2 = nn.Linear(1024, 1024)
        self.all3 = nn.Linear(1024, 1)
        self.shape1 = nn.Linear(10, 10)              # official code: 10 -> 10 -> 5 -> 1
        self.shape2 = nn.Linear(10, 5)
        self.shape3 = nn.Linear(5, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.uniform_(self.joint_weight, -math.sqrt(6 / 33), math.sqrt(6 / 33))    # Xavier, 32+1

    def forward(self, rotmats: Tensor, betas: Tensor) -> Tensor:
        if rotmats.ndim != 4 or rotmats.shape[1:] != (23, 3, 3) or betas.shape[1:] != (10,):
            raise ValueError(f"expected rotmats (N, 23, 3, 3), the root left out, and betas (N, 10)"
                             f"; got {tuple(rotmats.shape)} and {tuple(betas.shape)}")
        with mixed_precision(betas.device, self.amp):
            x = rotmats.flatten(2)                                    # (N, 23, 9) raw R, not R - I
            x = F.relu(self.embed1(x))                                # (N, 23, 32)
            x = F.relu(self.embed2(x))                                # (N, 23, 32)
            per_joint = (x * self.joint_weight).sum(-1) + self.joint_bias         # (N, 23)
            # Sec. 3.3 and the slides feed this network the 9K numbers of all rotations.  Sec. 3.4
            # and the official code feed it the embedding, as here.
            y = F.relu(self.all1(x.flatten(1)))                       # (N, 1024)
            y = self.all3(F.relu(self.all2(y)))                       # (N, 1)
            z = F.relu(self.shape1(betas))                            # (N, 10)
            z = self.shape3(F.relu(self.shape2(z)))                   # (N, 1)
            return torch.cat([per_joint, y, z], 1)                    # (N, 25)


def sum_heads(error: Tensor) -> Tensor:
    """sum_i E[..]: a sum over the 25 discriminators, a mean over the N bodies: (N, 25) -> ()."""
    return error.sum(1).mean()                                        # ()


def encoder_adversarial_loss(fake: Tensor) -> Tensor:
    """L_adv(E) = sum_i E[(D_i(E(I)) - 1)^2]: D's outputs on predictions (N, 25) -> ().

    E(I) is the Theta that the encoder predicts from image I, and D_i(E(I)) is D's output on it.
    (The slides ask "Encoder error?": this is it.)  The gradient reaches E through D, which
    train.py freezes meanwhile, so that D learns by Eq. (8) alone.  The mean is over N = B*T
    bodies.  The slides can be read as a sum over the T iterations, which would be T times
    larger.
    """
    return sum_heads((fake - 1).square())                             # Eq. (7)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """L(D_i) = E[(D_i(Theta) - 1)^2] + E[D_i(E(I))^2], summed over i: (N, 25) twice -> ().

    The caller detaches the predictions behind `fake`, so that D's loss does not move the encoder.
    There are as many real samples as predictions.
    """
    return sum_heads((real - 1).square()) + sum_heads(fake.square())  # Eq. (8)


# ============================================================================================
# Not needed to understand HMR: the demo.

def count_multiply_adds(network: ResNet, size: int = 224) -> int:
    """Multiply-adds of one picture through convolutions and classifier: the slides' "FLOPs"."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(network.conv1.weight.new_zeros(1, 3, size, size))
    return counter.get_total_flops() // 2         # torch counts a multiply-add as two operations


def move_strides_to_1x1(network: ResNet) -> ResNet:
    """Put the strides where He et al. have them (see Bottleneck), in place, to count operations."""
    for block in network.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    return network


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(description="Print shapes and known values of HMR.").parse_args(argv)
    return exit_status("hmr.py", demo)


def demo() -> None:
    print("slides' table, 1e9 multiply-adds at 224 px: stride on 1x1 | torchvision's | slides")
    for depth, slides in zip(RESNETS, (1.8, 3.6, 3.8, 7.6, 11.3)):
        network = ResNet(depth, num_classes=1000)
        ours = count_multiply_adds(network) / 1e9
        theirs = count_multiply_adds(move_strides_to_1x1(network)) / 1e9
        print(f"  ResNet-{depth:<4d} {theirs:48.2f} | {ours:13.2f} | {slides}")
    model, D = HMR(SMPL()).eval(), Discriminator()
    with torch.no_grad():
        thetas, out = model(torch.rand(2, 3, 224, 224))
        scores = D(out.rotmats[:, 1:], out.betas)
    count = [sum(p.numel() for p in m.parameters()) for m in (model.regressor, D)]
    for what, got, expected in [
            ("regressor parameters", f"{count[0]:,}", "3,321,941"),
            ("discriminator parameters", f"{count[1]:,}", "1,807,619"),
            ("Thetas", [tuple(t.shape) for t in thetas], "three of (2, 85)"),
            ("L_adv(E) if D says 0", encoder_adversarial_loss(0 * scores).item(), "25")]:
        print(f"  {what:38s} {got!s:38s} expected {expected}")


if __name__ == "__main__":
    sys.exit(main())
