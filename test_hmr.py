"""What HMR claims, checked: run `pytest -x test_hmr.py` and read the failures as a syllabus.

The order is the paper's, chapter by chapter.  A tolerance that is more than rounding has its reason
beside it; messages say which mistake to suspect.  Oracles are independent of the code: scipy's
rotations, torchvision's ResNets, plain Python loops, numbers worked out by hand.  No GPU, no
network, under three minutes on two cores.
"""

import ast
import math
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import data
import hmr
import train
from hmr import HMR, Discriminator, Regressor, ResNet
from smpl import (FLIP_JOINTS, FLIP_KEYPOINTS, JOINT_NAMES, KEYPOINT_NAMES, PARENTS, SMPL,
                  batch_rigid_transform, batch_rodrigues, blend_shapes, lbs, rot6d_to_rotmat)

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def body() -> SMPL:
    return SMPL()


# HMR_TEST_BF16=0|1 (read here only): test as on a machine without, or with, bf16 arithmetic.
FORCED_BF16 = os.environ.get("HMR_TEST_BF16")


@pytest.fixture(autouse=True)
def precision_of_the_encoder(monkeypatch):
    if FORCED_BF16 is not None:
        monkeypatch.setattr(train, "native_bf16", lambda device: FORCED_BF16 == "1")


@pytest.fixture(scope="module")
def golden() -> dict:
    """What the authors' own code gives (assets/README.md), in float64."""
    with np.load(HERE / "assets" / "golden.npz", allow_pickle=False) as file:
        numbers = {key: torch.from_numpy(file[key]).double() for key in file.files}
    for key in ("body_weights", "body_J_regressor", "body_cocoplus_regressor"):
        numbers[key] /= 64
    numbers["step_loss_D"] = numbers["step_loss_D_real"] + numbers["step_loss_D_fake"]
    numbers["motion"] = (batch_rodrigues(numbers["step_mocap_pose"].view(12, 24, 3))[:, 1:],
                         numbers["step_mocap_betas"])
    return numbers


@pytest.fixture(scope="module")
def golden_body(golden, tmp_path_factory) -> SMPL:
    path = tmp_path_factory.mktemp("golden") / "body.npz"
    arrays = {key[5:]: golden[key].numpy() for key in golden if key.startswith("body_")}
    arrays |= {key: arrays[key].astype(np.int64) for key in ("f", "kintree_table")}
    np.savez(path, mean_pose=golden["step_mean_pose"].numpy(), **arrays)
    return SMPL(path).double()


def close(got, expected, tolerance: float, message: str) -> None:
    got, expected = (torch.as_tensor(x).detach().double() if isinstance(x, Tensor) else
                     torch.tensor(x, dtype=torch.float64) for x in (got, expected))
    off = (got - expected).abs().nan_to_num(math.inf, math.inf)       # NaN is far off
    worst = np.unravel_index(off.argmax().item(), off.shape)
    some = ... if off.numel() < 5 else worst                          # four numbers, or the worst
    wanted, came = (np.round(x.expand_as(off).numpy()[some], 5) for x in (expected, got))
    assert off.max() <= tolerance, (
        f"{message} (expected {wanted}, got {came}{f' at {[*map(int, worst)]}' * (some is worst)}, "
        f"off by {off.max():.3g}, allowed {tolerance:.3g}; "
        f"{'bf16' if train.native_bf16('cpu') else 'float32'} encoder with --amp "
        f"auto, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"torch {torch.__version__})")


# autograd against finite differences -> bool: a sentence says more than two matrices
gradcheck = lambda *args, **how: torch.autograd.gradcheck(*args, raise_exception=False, **how)
GRADIENT = "not finite differences' gradient: a detach, a change in place, 0/0?"


# ============================================================================================
# Sec. 3.1: rotations

ROTATIONS = {"random": torch.randn(20, 3, dtype=torch.float64),
             "many turns": 30 * torch.randn(20, 3, dtype=torch.float64),
             "tiny": 1e-5 * torch.randn(20, 3, dtype=torch.float64),
             "half turns": math.pi * nn.functional.normalize(torch.randn(9, 3).double(), dim=1),
             "zero": torch.zeros(1, 3, dtype=torch.float64),
             # |r + 1e-8| = 0: NaN in the published implementations
             "minus 1e-8": torch.full((1, 3), -1e-8, dtype=torch.float64)}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rodrigues_agrees_with_scipy_and_the_exponential_map(kind):
    r = ROTATIONS[kind]
    R = batch_rodrigues(r)
    expected = torch.from_numpy(Rotation.from_rotvec(r.numpy()).as_matrix())
    close(R, expected, 1e-12, f"{kind}: not scipy's rotation; transposed, or wrong near zero?")
    x, y, z = r.unbind(-1)
    o = 0 * x
    K = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).view(-1, 3, 3)
    # matrix_exp squares repeatedly, so its own error grows with the angle
    close(R, torch.matrix_exp(K), 1e-10, f"{kind}: R must be exp([r]x)")


def test_rodrigues_turns_columns_and_keeps_leading_shapes():
    quarter = batch_rodrigues(torch.tensor([0, 0, math.pi / 2]))
    close(quarter @ torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0]), 1e-6,
          "Rz(90 deg) x must be y: this is R transposed, which breaks skinning silently")
    assert batch_rodrigues(torch.zeros(2, 5, 24, 3)).shape == (2, 5, 24, 3, 3), "(..., 3, 3)"
    assert (batch_rodrigues(torch.zeros(3)) == torch.eye(3)).all(), "zero must give exactly I"
    with pytest.raises(ValueError, match=r"\(\.\.\., 3\)"):
        batch_rodrigues(torch.zeros(2, 72))


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rodrigues_has_the_right_gradient_even_at_zero(kind):
    r = ROTATIONS[kind][:3].clone().requires_grad_()
    assert gradcheck(batch_rodrigues, (r,)), f"{kind}: 0/0 in the backward pass gives NaN"


def test_rodrigues_is_accurate_in_float32_across_the_switch_to_the_series():
    for angle in (1e-6, 1e-3, 9.9e-3, 1.01e-2, 0.1, 3.0):
        r = angle * nn.functional.normalize(torch.randn(50, 3), dim=1)
        # a handful of float32 roundings of numbers up to 1
        close(batch_rodrigues(r).double(), batch_rodrigues(r.double()), 5e-7,
              f"float32 at angle {angle}: 1 - cos(a) cancels; use 2 sin^2(a/2)")


def test_rot6d_has_spins_interleaved_layout(golden):
    identity, half_turn = torch.tensor([1.0, 0, 0, 1, 0, 0]), torch.tensor([1.0, 0, 0, -1, 0, 0])
    close(rot6d_to_rotmat(identity), torch.eye(3), 0, "[1,0,0,1,0,0] is the identity in SPIN's")
    close(rot6d_to_rotmat(half_turn), torch.diag(torch.tensor([1.0, -1, -1])), 0, "this is Rx(pi)")
    R = torch.from_numpy(Rotation.random(10, random_state=0).as_matrix())
    close(rot6d_to_rotmat(R[..., :2].flatten(1)), R, 1e-12, "a rotation's own columns give it back")
    x = torch.randn(1, 3, 6, dtype=torch.float64)       # 3 vectors: torch.cross without dim fails
    Q = rot6d_to_rotmat(x)
    close(Q @ Q.mT, torch.eye(3).double().expand(1, 3, 3, 3), 1e-12, "not orthonormal")
    close(torch.linalg.det(Q), torch.ones(1, 3).double(), 1e-12, "a reflection, not a rotation")
    assert gradcheck(rot6d_to_rotmat, (x.requires_grad_(),)), GRADIENT
    R = rot6d_to_rotmat(golden["x6"])
    close(R, golden["out_x6_interleaved"], 1e-12, "SPIN: the six numbers are a (3, 2) matrix")
    for reading, whose in (("columns", "4D-Humans'"), ("rows", "pytorch3d's")):
        off = (R - golden[f"out_x6_{reading}"]).abs().max().item()
        assert off > 1, f"this is {whose} reading, {reading}, and not SPIN's (apart by {off:.2g})"


def test_rotations_are_the_official_codes(golden):
    # hmr's angle is |r + 1e-8|, so that its axis is no unit vector: both are off by as much
    close(batch_rodrigues(golden["aa"]), golden["out_R"], 2e-8, "transposed, or wrong near zero?")


# ============================================================================================
# Sec. 3.1: SMPL

def random_body(V: int, dtype=torch.float64) -> dict[str, Tensor]:
    """SMPL's arrays with random content; joint 0 is well off the origin."""
    rand = lambda *shape: torch.rand(*shape, dtype=dtype)
    normal = lambda *shape: torch.randn(*shape, dtype=dtype)
    return dict(v_template=1 + normal(V, 3), shapedirs=0.1 * normal(V, 3, 10),
                posedirs=0.1 * normal(V, 3, 207),
                J_regressor=torch.softmax(normal(24, V), 1), parents=PARENTS,
                weights=torch.softmax(3 * rand(V, 24), 1))


def slow_smpl(betas, rotmats, v_template, shapedirs, posedirs, J_regressor, parents, weights):
    """One body, vertex by vertex, number by number: betas (10,), rotmats (24, 3, 3)."""
    arrays = [np.asarray(a) for a in (betas, rotmats, v_template, shapedirs, posedirs, J_regressor,
                                      weights)]
    betas, R, template, S, P, regressor, W = arrays
    V = len(template)
    shaped = [[template[v, c] + sum(S[v, c, n] * betas[n] for n in range(10)) for c in range(3)]
              for v in range(V)]
    J = [np.array([sum(regressor[j, v] * shaped[v][c] for v in range(V)) for c in range(3)])
         for j in range(24)]
    feature = [R[j, r, c] - (r == c) for j in range(1, 24) for r in range(3) for c in range(3)]
    G = {}                                                   # world rotation, world position
    for j in range(24):
        p = parents[j]
        G[j] = (R[j], J[j]) if p < 0 else (G[p][0] @ R[j], G[p][0] @ (J[j] - J[p]) + G[p][1])
    vertices = []
    for v in range(V):
        x = np.array([shaped[v][c] + sum(P[v, c, k] * feature[k] for k in range(207))
                      for c in range(3)])
        vertices.append(sum(W[v, j] * (G[j][0] @ (x - J[j]) + G[j][1]) for j in range(24)))
    return torch.tensor(np.array(vertices)), torch.tensor(np.array([G[j][1] for j in range(24)]))


def test_blend_shapes_are_a_sum_of_directions():
    c, directions = torch.randn(2, 7).double(), torch.randn(5, 3, 7).double()
    close(blend_shapes(c, directions), sum(c[:, n, None, None] * directions[..., n]
          for n in range(7)), 1e-13, "vertex v moves by the sum of c_n * directions[v, :, n]")


@pytest.mark.parametrize("V", [5, 31])
def test_lbs_equals_a_slow_loop(V):
    model = random_body(V)
    betas, R = torch.randn(3, 10).double(), batch_rodrigues(torch.randn(3, 24, 3).double())
    vertices, joints = lbs(betas, R, **model)
    for b in range(3):
        v, j = slow_smpl(betas[b], R[b], **model)
        close(joints[b], j, 1e-12, "posed joints: chain order, or rest joints taken unshaped?")
        close(vertices[b], v, 1e-12, "vertices: pose feature's order, - I, or - G J forgotten?")


@pytest.mark.parametrize("scale", [0, 1, 3])                # the zero pose and large angles
def test_lbs_gradients(scale):
    model = random_body(4)
    betas = torch.randn(2, 10, dtype=torch.float64, requires_grad=True)
    pose = (scale * torch.randn(2, 24, 3).double()).requires_grad_()
    assert gradcheck(lambda b, p: lbs(b, batch_rodrigues(p), **model), (betas, pose),
                     fast_mode=True), "something is detached or changed in place?"


# SMPL's tree; a single chain; all bones at the root; three chains, each numbered to its end
TREES = {"SMPL": PARENTS, "chain": range(-1, 23), "star": [-1] + [0] * 23,
         "depth first": [-1 if i == 0 else 0 if i in (1, 8, 16) else i - 1 for i in range(24)]}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", [tuple, torch.tensor])
def test_kinematics_equal_a_loop_over_the_23_joints(tree, kind):
    """Joints, bones' motions and gradients of the 23 joints posed in turn, as in the paper."""
    parents, J = list(TREES[tree]), torch.randn(2, 24, 3, dtype=torch.float64, requires_grad=True)
    R = batch_rodrigues(2 * torch.randn(2, 24, 3).double()).requires_grad_()
    world, place = [R[:, 0]], [J[:, 0]]
    for i in range(1, 24):
        p = parents[i]
        place.append(place[p] + (world[p] @ (J[:, i] - J[:, p])[..., None])[..., 0])
        world.append(world[p] @ R[:, i])
    world, place = torch.stack(world, 1), torch.stack(place, 1)
    shift = place - (world @ J[..., None])[..., 0]                    # G_i(pose) G_i(rest)^-1
    posed, A = batch_rigid_transform(R, J, kind(parents))
    # places: up to 23 bones of some 3 m, one after the other, 1e-16 of rounding each
    close(posed, place, 1e-12, f"{tree}: a joint that moved before its parent did?")
    close(A[:, :, :3, :3], world, 1e-12, f"{tree}: R_parent R, not R R_parent")
    close(A[:, :, :3, 3], shift, 1e-12, f"{tree}: a bone turns about its joint, not the origin")
    weights = torch.randn(2, 24, 3).double(), torch.randn(2, 24, 3).double()
    ours, loops = (torch.autograd.grad(out, (R, J), weights) for out in
                   ((posed, A[:, :, :3, 3]), (place, shift)))
    for name, a, b in zip(("rotations", "rest joints"), ours, loops):
        close(a / b.abs().max(), b / b.abs().max(), 1e-12, f"{tree}: gradient to the {name}")


def test_zero_input_returns_the_template_and_the_root_turns_about_joint_0():
    model = random_body(20)
    betas, pose = torch.zeros(1, 10).double(), torch.zeros(1, 24, 3).double()
    vertices, joints = lbs(betas, batch_rodrigues(pose), **model)
    close(vertices[0], model["v_template"], 1e-14, "the rest pose needs no pose blend shape: R - I")
    pose[0, 0] = torch.randn(3)
    R = batch_rodrigues(pose)
    turned, turned_joints = lbs(betas, R, **model)
    J0 = joints[:, :1]
    close(turned_joints[:, 0], J0[:, 0], 1e-14, "joint 0 must stay: the root turns about it")
    close(turned - J0, (vertices - J0) @ R[:, 0].mT, 1e-12,
          "a root rotation is rigid: it turns about joint 0 and is not in the pose feature")


def test_joints_depend_on_betas_but_not_on_pose_blend_shapes():
    model, betas = random_body(20), torch.randn(1, 10).double()
    R = batch_rodrigues(torch.randn(1, 24, 3).double())
    _, joints = lbs(betas, R, **model)
    _, other = lbs(betas, R, **{**model, "posedirs": 0 * model["posedirs"]})
    close(joints, other, 0, "J is regressed BEFORE the pose blend shapes")
    _, average = lbs(0 * betas, R, **model)
    assert (joints - average).abs().max() > 1e-3, "J must be regressed from the SHAPED template"


def test_a_tall_person_has_long_bones_and_bones_do_not_stretch():
    model = random_body(20)
    betas = torch.randn(1, 10).double()
    rest = model["J_regressor"] @ (model["v_template"] + blend_shapes(betas, model["shapedirs"]))
    posed, A = batch_rigid_transform(batch_rodrigues(torch.randn(1, 24, 3).double()), rest, PARENTS)
    length = lambda J: (J[:, 1:] - J[:, list(PARENTS[1:])]).norm(dim=-1)
    close(length(posed), length(rest), 1e-12, "posing must keep every bone's length")
    assert (A[0, :, 3] == torch.tensor([0, 0, 0, 1.0])).all(), "A's last row is 0 0 0 1"


def test_keypoints_do_not_depend_on_what_else_is_skinned():
    full = SMPL().double()
    betas = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    pose = (0.5 * torch.randn(4, 24, 3).double()).requires_grad_()
    a, b = full(betas, pose), full(betas, pose, vertices=False)
    assert b.vertices is None
    # the second body's rest joints are regressed first, then rounded to float32: 0.1 micrometres
    close(a.keypoints, b.keypoints, 1e-6, "keypoints of the second body")
    close(a.joints, b.joints, 1e-6, "joints of the second body: joints too are points of it")
    for name in ("keypoints", "joints"):
        out = getattr(a, name), getattr(b, name)
        weights = torch.randn_like(out[0])
        ours, its = (torch.autograd.grad(x, (betas, pose), weights, retain_graph=True) for x in out)
        for to, g, h in zip(("betas", "pose"), ours, its):
            close(g, h, 1e-5, f"gradient of {name} to {to}: sums of some 60 such numbers")


def test_smpl_takes_poses_in_three_forms_and_refuses_others(body):
    betas, pose = torch.randn(2, 10), torch.randn(2, 72)
    outputs = [body(betas, p).vertices for p in
               (pose, pose.view(2, 24, 3), batch_rodrigues(pose.view(2, 24, 3)))]
    assert outputs[0].shape == (2, len(body.v_template), 3)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    for bad in (torch.zeros(2, 69), torch.zeros(3, 72), torch.zeros(2, 23, 3, 3)):
        with pytest.raises(ValueError, match="pose must be"):
            body(betas, bad)
    with pytest.raises(ValueError, match="betas must be"):
        body(torch.zeros(2, 9), pose)


def test_the_skeletons_tables_agree():
    assert len(JOINT_NAMES) == len(PARENTS) == 24 and len(KEYPOINT_NAMES) == 19
    depth = [0]
    for i in range(1, 24):
        assert PARENTS[i] < i, "parents come first"
        depth.append(depth[PARENTS[i]] + 1)
    assert depth == sorted(depth) and max(depth) == 8, "level by level: one round poses a level"
    for names, flip in ((JOINT_NAMES, FLIP_JOINTS), (KEYPOINT_NAMES, FLIP_KEYPOINTS)):
        for i, name in enumerate(names):
            other = {"left": "right", "right": "left"}
            mirrored = re.sub("left|right", lambda m: other[m[0]], name)
            assert names[flip[i]] == mirrored, f"{name} must be swapped with {mirrored}"


# ============================================================================================
# Sec. 3.4 and the slides: ResNet

@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_resnet_equals_torchvisions(depth):
    theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    for m in theirs.modules():
        if isinstance(m, nn.BatchNorm2d):      # fresh statistics (0 and 1) would hide a mix-up
            m.running_mean.uniform_(-0.1, 0.1)
            m.running_var.uniform_(0.5, 1.5)
            m.weight.data.uniform_(0.5, 1.0)
            m.bias.data.uniform_(-0.1, 0.1)
    ours = ResNet(depth, num_classes=1000)
    odd = sorted(ours.state_dict().keys() ^ theirs.state_dict().keys())
    assert not odd, f"a projection where stride or channels change, and only there: {odd[:2]}"
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        a, b = ours.eval()(x), theirs.eval()(x)
    # same operations in the same order; 1e-5 leaves room for another convolution algorithm
    close((a - b).norm() / b.norm(), 0.0, 1e-5, "ReLU after the addition? stride on the 3x3?")


def test_multiply_adds_are_the_slides():
    table = {18: 1.8, 34: 3.6, 50: 3.8, 101: 7.6, 152: 11.3}                     # slides, 1e9
    for depth, slides in table.items():
        with torch.device("meta"):
            network = hmr.move_strides_to_1x1(ResNet(depth, num_classes=1000))
        count = hmr.count_multiply_adds(network) / 1e9
        assert abs(count / slides - 1) < 0.03, f"ResNet-{depth}: {count:.2f}e9, slides {slides}e9"
    with torch.device("meta"):
        moved = hmr.count_multiply_adds(ResNet(50, num_classes=1000)) / 1e9
    assert abs(moved - 4.09) < 0.01, "torchvision's stride placement costs 4.09e9"


def test_a_residual_block_with_zero_weights_is_the_identity():
    x = torch.rand(2, 64, 8, 8)                               # a ReLU's output: non-negative
    for block in (hmr.BasicBlock(64, 64, 1, False), hmr.Bottleneck(64, 16, 1, False)):
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.weight)
        close(block.eval()(x), x, 0, "y = F(x) + x with F = 0 must be x")
        block.downsample = None
        assert (block(x) == 0).all(), "a plain block has no shortcut"


def test_the_slides_constructed_solution():
    """A deeper network that copies a shallower one and adds identity layers is no worse."""
    shallow, deep = ResNet(18, width=16).eval(), ResNet(34, width=16).eval()
    deep.load_state_dict(shallow.state_dict(), strict=False)  # the first two blocks of each stage
    for stage in (deep.layer1, deep.layer2, deep.layer3, deep.layer4):
        for block in stage[2:]:
            nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        close(deep(x), shallow(x), 0, "extra blocks with F = 0 must change nothing")


def test_resnets_options():
    assert ResNet(50).feature_dim == 2048 and ResNet(18, width=32).feature_dim == 256
    assert ResNet(18, width=8)(torch.randn(1, 3, 64, 64)).shape == (1, 64), "one picture: (1, C)"
    plain = [n for n, _ in ResNet(34, plain=True).named_parameters() if "downsample" in n]
    assert not plain, "a plain network has no projections either"
    with pytest.raises(ValueError, match="18, 34, 50, 101, 152"):
        ResNet(20)


# ============================================================================================
# Sec. 3.2: iterative error feedback

def test_the_regressor_is_the_papers():
    regressor = Regressor(2048, torch.zeros(1, 85))
    assert sum(p.numel() for p in regressor.parameters()) == 3_321_941, "Theta-bar is a buffer"
    assert regressor.fc1.in_features == 2133, "[phi 2048 | Theta 85]"
    bound = regressor.fc3.weight.abs().max().item()
    assert 0.0073 < bound <= 0.0073555, f"last layer within {bound:.4g}: xavier with gain 0.1"
    for layer in (regressor.fc1, regressor.fc2):
        assert within_xavier(layer.weight) and not layer.bias.any(), "Xavier, biases 0"


def within_xavier(weight: Tensor) -> bool:
    """Uniform within +- sqrt(6 / (inputs + outputs)), and reaching out that far."""
    return 0.5 < weight.abs().max() / math.sqrt(6 / sum(weight.shape)) <= 1


def test_convolutions_keep_the_variance_past_a_relu():
    weight = ResNet(18).layer2[0].conv1.weight                        # (128, 64, 3, 3)
    close(weight.std() / math.sqrt(2 / (128 * 9)), 1.0, 0.02, "He: by the outputs (64 more inputs)")


def test_the_regressor_equals_a_hand_written_loop():
    regressor = Regressor(7, torch.randn(1, 85), iterations=3, dropout=0.5).eval()
    feature = torch.randn(4, 7)
    w = {k: v.detach() for k, v in regressor.named_parameters()}
    theta = regressor.theta_bar.repeat(4, 1)
    for got in regressor(feature):
        x = torch.cat((feature, theta), 1)
        for i in (1, 2):
            x = (x @ w[f"fc{i}.weight"].T + w[f"fc{i}.bias"]).clamp(min=0)
        theta = theta + x @ w["fc3.weight"].T + w["fc3.bias"]
        close(got, theta, 1e-4, "a ReLU lost, features not first, or not Theta + DeltaTheta?")


def golden_networks(golden) -> tuple[Regressor, Discriminator]:
    """Of parameter p, number k (row by row), c columns: sin(1.7 k + k^2 / 1000 + p) * sqrt(3 / c);
    of a bias, * 0.1."""
    E, D = Regressor(8, golden["step_theta_bar"].clone(), 3, dropout=0.0), Discriminator()
    for first, layers in (([], (E.fc1, E.fc2, E.fc3)),
                          ([D.joint_weight, D.joint_bias], (D.embed1, D.embed2, D.all1, D.all2,
                                                            D.all3, D.shape1, D.shape2, D.shape3))):
        for p, w in enumerate(first + [w for layer in layers for w in (layer.weight, layer.bias)]):
            k = torch.arange(w.numel(), dtype=torch.float64).view(w.shape)
            w.data = torch.sin(1.7 * k + k * k / 1000 + p) * (
                0.1 if w.ndim == 1 else math.sqrt(3 / w.shape[1]))
    return E, D


def test_the_three_thetas_are_the_official_codes(golden):
    close(hmr.mean_theta(golden["step_mean_pose"]), golden["step_theta_bar"], 1e-7,
          "Theta-bar = [0.9, 0, 0 | Rx(pi), mean pose | 0]; float32's pi is off by 9e-8")
    for t, theta in enumerate(golden_networks(golden)[0](golden["step_feature"])):
        # numbers up to 5, sums of 1,024 terms in another order, three times over: 5e-15 seen
        close(theta, golden["step_thetas"][t], 1e-12, f"Theta_{t + 1}: a ReLU lost (SPIN's), "
              "[Theta | phi] for [phi | Theta], or Theta-bar + Delta for Theta_t + Delta?")


def test_dropout_follows_both_hidden_layers_with_fresh_masks():
    regressor = Regressor(7, torch.zeros(1, 85), iterations=2, dropout=0.5).train()
    calls = []
    original, torch.nn.functional.dropout = torch.nn.functional.dropout, \
        lambda x, p, training: calls.append((p, training, x.min() >= 0)) or original(x, p, training)
    try:
        regressor(torch.randn(3, 7))
    finally:
        torch.nn.functional.dropout = original
    assert [c[:2] for c in calls] == [(0.5, True)] * 4, f"{len(calls)} dropouts, expected 2 * 2"
    assert all(after_relu for *_, after_relu in calls), "each after its ReLU"
    feature = torch.randn(3, 7)
    assert not torch.equal(regressor(feature)[0], regressor(feature)[0]), "masks must be fresh"
    regressor.eval()
    assert torch.equal(regressor(feature)[0], regressor(feature)[0]), "no dropout in eval mode"


def test_gradients_run_through_all_iterations():
    regressor = Regressor(7, torch.zeros(1, 85), iterations=3).eval().double()
    feature = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    for t in range(3):
        assert gradcheck(lambda f: regressor(f)[t], (feature,)), \
            f"Theta_{t + 1}: not finite differences' gradient; Theta detached between iterations?"


def test_theta_bar_is_upright_average_and_fixed(body):
    model = HMR(body, depth=18, width=8)
    theta = model.regressor.theta_bar
    assert theta.shape == (1, 85) and not theta.requires_grad
    close(theta[0, :6], torch.tensor([0.9, 0, 0, math.pi, 0, 0]), 1e-6, "scale .9, root Rx(pi)")
    assert (theta[0, 75:] == 0).all(), "average shape"
    close(hmr.mean_theta(torch.ones(72))[0, 3:9], torch.tensor([math.pi, 0, 0, 1, 1, 1]), 1e-6,
          "all three numbers of the root are set, whatever the mean pose holds")
    mean = torch.ones(72)
    assert hmr.mean_theta(mean) is not None and (mean == 1).all(), "the caller's mean pose changed"
    out = model.decode(theta)
    kp = dict(zip(KEYPOINT_NAMES, out.keypoints2d[0]))
    assert kp["head_top"][1] < kp["left_ankle"][1], "upside down: y of the camera points DOWN"
    assert kp["left_hip"][0] > kp["right_hip"][0], "facing us, the left side is on the right"
    sixd = HMR(body, depth=18, width=8, rotation="6d")
    close(sixd.decode(sixd.regressor.theta_bar).rotmats, out.rotmats, 1e-6, "6D Theta-bar differs")


@pytest.mark.parametrize("rotation, dim", [("axis-angle", 85), ("6d", 157)])
def test_the_whole_network(body, rotation, dim):
    model = HMR(body, depth=18, iterations=2, width=8, rotation=rotation)
    thetas, out = model(torch.rand(3, 3, 64, 64))
    assert [t.shape for t in thetas] == [(3, dim)] * 2, "one (B, 85) an iteration"
    shapes = dict(rotmats=(3, 24, 3, 3), betas=(3, 10), cam=(3, 3), joints=(3, 24, 3),
                  keypoints3d=(3, 19, 3), keypoints2d=(3, 19, 2))
    assert {k: tuple(getattr(out, k).shape) for k in shapes} == shapes and out.vertices is None
    out.keypoints2d.sum().backward()
    assert model.encoder.conv1.weight.grad.abs().sum() > 0, "end to end: pixels must get gradients"
    assert model.decode(thetas[0], vertices=True).vertices.shape == (3, len(body.v_template), 3)
    with pytest.raises(ValueError, match="images must be"):
        model(torch.rand(3, 64, 64, 3))


def test_the_encoder_sees_imagenets_scale_and_the_last_theta_is_decoded(body):
    model, seen = HMR(body, depth=18, width=8).eval(), []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    image = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 32, 32).clone()
    image[..., 0] += torch.tensor([0.229, 0.224, 0.225])[:, None]
    thetas, out = model(image)
    close(seen[0][..., 1:], torch.zeros(1, 3, 32, 31), 1e-6, "not (x - mean) / std; BGR?")
    close(seen[0][..., 0], torch.ones(1, 3, 32), 1e-5, "not (x - mean) / std; BGR?")
    close(out.cam, thetas[-1][:, :3], 0, "the LAST Theta is decoded, not the first")
    assert not torch.equal(thetas[0], thetas[-1])


def test_batch_norm_averages_as_the_header_says():
    for depth, count in ((18, 20), (50, 53)):
        norms = [m for m in ResNet(depth).modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == count and {(m.momentum, m.eps) for m in norms} == {(0.1, 1e-5)}


def test_mixed_precision_stays_in_the_encoder(body):
    model = HMR(body, depth=18, width=16).eval()
    images = torch.rand(2, 3, 64, 64)
    exact = model(images)[0][-1]
    model.amp = torch.bfloat16
    thetas, out = model(images)
    assert thetas[-1].dtype == out.keypoints3d.dtype == torch.float32, "SMPL and losses in float32"
    # bf16 has 8 bits: some percent through 18 layers
    close((thetas[-1] - exact).norm() / (exact - model.regressor.theta_bar).norm(), 0.0, 0.05,
          "the encoder in bf16 must give nearly the same answer")


# ============================================================================================
# Sec. 3.1, Eq. (2): the camera

def test_projection_is_the_official_codes(golden):
    close(hmr.project(golden["out_body_keypoints"], golden["cam"]), golden["out_projected"], 1e-14,
          "s (X + t), not s X + t; cam is [s, tx, ty]")
    cam, X = torch.tensor([[2.0, 0.1, -0.2]]), torch.tensor([[[0.3, 0.4, 9.0]]])
    close(hmr.project(X, cam), torch.tensor([[[0.8, 0.4]]]), 1e-6,
          "s (X + t) = 2 * (.3 + .1), 2 * (.4 - .2); the paper's s X + t would give .7, .6")
    assert gradcheck(hmr.project, (torch.randn(2, 4, 3).double().requires_grad_(),
                                   torch.randn(2, 3).double().requires_grad_())), GRADIENT


# ============================================================================================
# Sec. 3.2, Eqs. (1) and (3) to (6): the losses

def test_reprojection_loss():
    pred, target = torch.randn(3, 19, 2).double(), torch.randn(3, 19, 2).double()
    v = (torch.rand(3, 19) < 0.6).double()
    total, count = 0.0, 0
    for n in range(3):
        for k in range(19):
            if v[n, k]:
                total += sum(abs(float(pred[n, k, c] - target[n, k, c])) for c in range(2))
                count += 2
    close(hmr.keypoint_loss(pred, target, v), total / count, 1e-12,
          "L1 (not squared), mean over the visible coordinates of the whole batch (not per image)")
    close(hmr.keypoint_loss(pred, target, v * torch.linspace(0.5, 1, 19)), total / count, 1e-12,
          "v is a mask: 0.5 counts as 1, as in TensorFlow, and weighs nothing")
    one = torch.zeros(1, 19)
    one[0, 4] = 1
    shifted = torch.zeros(1, 19, 2)
    shifted[0, 4] = torch.tensor([0.2, -0.4])
    close(hmr.keypoint_loss(shifted, 0 * shifted, one), 0.3, 1e-7, "(.2 + .4) / 2")
    assert gradcheck(lambda p: hmr.keypoint_loss(p, target, v), (pred.requires_grad_(),)), GRADIENT


def test_3d_joint_loss():
    pred, target = torch.randn(3, 19, 3).double(), torch.randn(3, 19, 3).double()
    has = torch.tensor([1.0, 0, 1]).double()[:, None].expand(3, 19)
    total = 0.0
    for n in (0, 2):
        for k in range(14):
            for c in range(3):
                hips = [float((x[n, 2, c] + x[n, 3, c]) / 2) for x in (pred, target)]
                total += float(pred[n, k, c] - hips[0] - target[n, k, c] + hips[1]) ** 2
    close(hmr.joints3d_loss(pred, target, has), 0.5 * total / (2 * 42), 1e-12,
          "0.5 * mean over labelled samples x 14 x 3, both centred at the hips' midpoint")
    close(hmr.joints3d_loss(target + 0.1, target, has), 0.0, 1e-12, "a shifted body is no error")
    faces = target.clone()
    faces[:, 14:] += 1
    close(hmr.joints3d_loss(faces, target, has), 0.0, 0, "the five face points have no 3D label")
    head_off = target.clone()
    head_off[:, 13] = math.nan                                        # H3.6M and 3DHP have none
    headless = has * (torch.arange(19) != 13)
    close(hmr.joints3d_loss(head_off, target, headless), 0.0, 0, "the head's top is not labelled")
    knee = torch.nn.functional.one_hot(torch.tensor(1), 19)[:, None].double()     # (19, 1)
    close(hmr.joints3d_loss(target + 0.1 * knee, target, headless), 0.5 * 0.1 ** 2 / 13, 1e-12,
          "the denominator counts the labelled numbers: 13 keypoints, not 14")
    hipless = has * (torch.arange(19) != 3)
    close(hmr.joints3d_loss(pred, target, hipless), 0.0, 0, "no hips, no centre, no label")
    loss = lambda p: hmr.joints3d_loss(p, target, has)
    assert gradcheck(loss, (pred.requires_grad_(),)), GRADIENT


def test_smpl_parameter_loss():
    R, S = (batch_rodrigues(torch.randn(3, 24, 3).double()) for _ in range(2))
    a, b = torch.randn(3, 10).double(), torch.randn(3, 10).double()
    has = torch.tensor([0.0, 1, 1]).double()
    total = sum(float((R[n] - S[n]).square().sum() + (a[n] - b[n]).square().sum()) for n in (1, 2))
    close(hmr.smpl_loss(R, a, S, b, has), 0.5 * total / (2 * 226), 1e-12,
          "0.5 * mean over labelled samples x (24 * 9 + 10), the root's rotation included")
    upright = torch.zeros(1, 24, 3).double()
    upright[:, 0, 0] = math.pi
    there, back = batch_rodrigues(upright), batch_rodrigues(-upright)
    same = hmr.smpl_loss(there, a[:1], back, a[:1], has[1:2])
    close(same, 0.0, 1e-12, "Rx(pi) and Rx(-pi) are one rotation: compare matrices, not vectors")
    R.requires_grad_()
    assert gradcheck(lambda r, x: hmr.smpl_loss(r, x, S, b, has), (R, a.requires_grad_()),
                     fast_mode=True), GRADIENT


def test_the_losses_are_the_official_codes(golden):
    g, has_smpl = golden, golden["step_has_smpl"]
    has_3d = golden["step_has_joints"][:, None].expand(4, 14)
    pred, true = g["loss_params_pred"], g["loss_params_true"]         # (4, 226) each
    rotmats = lambda x: x[:, :216].view(4, 24, 3, 3)
    # float64: only the order of the sums differs
    close(hmr.keypoint_loss(g["loss_kp_pred"], g["step_kp"][..., :2], g["step_kp"][..., 2]),
          g["out_loss_kp"], 1e-14, "L_kp: L1, over 2 * (visible points of the whole batch)")
    close(hmr.joints3d_loss(g["loss_joints_pred"], g["step_joints"], has_3d), g["out_loss_joints"],
          1e-14, "L_joints: 0.5 * mean over the labelled, centred at the hips' midpoint")
    close(hmr.smpl_loss(rotmats(pred), pred[:, 216:], rotmats(true), true[:, 216:], has_smpl),
          g["out_loss_smpl"], 1e-14, "L_smpl: 0.5 * mean over 226 numbers, the root's included")


@pytest.mark.parametrize("hidden", [math.nan, math.inf, 1e30])
def test_what_a_mask_hides_may_be_anything(hidden):
    pred, target = torch.randn(2, 19, 3), torch.randn(2, 19, 3)
    seen = torch.tensor([[1.0] * 19, [0.0] * 19])
    results = []
    for value in (0.0, hidden):
        p, t = pred.clone().requires_grad_(), target.clone()
        t[1] = value
        L = hmr.keypoint_loss(p[..., :2], t[..., :2], seen) + hmr.joints3d_loss(p, t, seen)
        L = L + hmr.smpl_loss(p[:, :1], p[:, 1, :1], t[:, :1], t[:, 1, :1], seen[:, 0])
        results.append((L, *torch.autograd.grad(L, p)))
    for known, got in zip(*results):
        assert torch.equal(known, got), "mask before the penalty: NaN * 0 is NaN"


def test_nothing_labelled_costs_nothing_and_gives_no_nan():
    pred = torch.randn(2, 19, 3, requires_grad=True)
    none = torch.zeros(2)
    R = torch.eye(3).expand(2, 24, 3, 3)
    for loss in (hmr.keypoint_loss(pred[..., :2], torch.zeros(2, 19, 2), torch.zeros(2, 19)),
                 hmr.joints3d_loss(pred, torch.zeros(2, 19, 3), torch.zeros(2, 19)),
                 hmr.smpl_loss(R * pred.sum(), torch.zeros(2, 10), R, torch.ones(2, 10), none)):
        (gradient,) = torch.autograd.grad(loss, pred)
        assert loss == 0 and (gradient == 0).all(), f"{loss.item()}: the mean of nothing must be 0"


def test_the_two_3d_indicators_are_separate(body):
    """MPI-INF-3DHP has joints but no SMPL parameters (stored as -1): these must not leak in."""
    pred = torch.randn(2, 24, 3, 3)
    junk, betas = -torch.ones(2, 24, 3, 3), -torch.ones(2, 10)
    assert hmr.smpl_loss(pred, 0 * betas, junk, betas, torch.tensor([0.0, 0])) == 0
    one = hmr.smpl_loss(pred, 0 * betas, junk, betas, torch.tensor([0.0, 1]))
    close(one, hmr.smpl_loss(pred[1:], 0 * betas[1:], junk[1:], betas[1:], torch.ones(1)), 1e-6,
          "an unlabelled sample must not even count in the denominator")


# ============================================================================================
# Sec. 3.3, Eqs. (7) and (8): the factorised adversary

def test_there_are_25_discriminators():
    D = Discriminator()
    assert sum(p.numel() for p in D.parameters()) == 1_807_619, "the official code's parameters"
    assert D(torch.randn(4, 23, 3, 3), torch.randn(4, 10)).shape == (4, 25), "23 + 1 + 1 outputs"
    with pytest.raises(ValueError, match="root left out"):
        D(torch.randn(4, 24, 3, 3), torch.randn(4, 10))
    for layer in D.children():
        assert within_xavier(layer.weight) and not layer.bias.any(), "Xavier everywhere, biases 0"
    assert within_xavier(D.joint_weight[:1]) and not D.joint_bias.any(), "23 layers of 32 -> 1"
    assert D.joint_weight.abs().max() <= math.sqrt(6 / 33)


def test_the_23_joint_heads_are_23_separate_linears():
    D = Discriminator()
    heads = [nn.Linear(32, 1) for _ in range(23)]
    with torch.no_grad():
        for j, head in enumerate(heads):
            head.weight.copy_(D.joint_weight[j:j + 1])
            head.bias.copy_(D.joint_bias[j:j + 1])
    R, betas = torch.randn(5, 23, 3, 3), torch.randn(5, 10)
    embed = D.embed2(D.embed1(R.reshape(5, 23, 9)).relu()).relu()             # shared by all joints
    expected = torch.cat([head(embed[:, j]) for j, head in enumerate(heads)], 1)
    out = D(R, betas)
    close(out[:, :23], expected, 1e-5, "a ReLU lost (pytorch_HMR's embedding), or heads mixed?")
    all_joints = D.all3(D.all2(D.all1(embed.reshape(5, 736)).relu()).relu())
    shape = D.shape3(D.shape2(D.shape1(betas).relu()).relu())
    close(out[:, 23:], torch.cat([all_joints, shape], 1), 1e-5, "order: [joints | all | shape]")


def test_ds_25_outputs_are_the_official_codes(golden):
    _, pose, betas = hmr.split_theta(golden["step_thetas"].flatten(0, 1))         # Theta_1 first
    D, (real, fake) = golden_networks(golden)[1], golden["step_D_outputs"].split(12)
    shown = hmr.pose_to_rotmats(pose)[:, 1:]
    for name, got, expected in (("real", D(*golden["motion"]), real),
                                ("fake", D(shown, betas), fake)):
        # hmr's rotations are off by 2e-8, which the steepest head makes 3e-8
        close(got, expected, 1e-7, f"{name}: [23 joints | all | shape]; a ReLU lost (pytorch_HMR's "
              "embedding), the root not left out, R - I for R, or R transposed?")


def test_each_discriminator_sees_only_its_own():
    D = Discriminator()
    R, betas = torch.randn(1, 23, 3, 3), torch.randn(1, 10)
    before = D(R, betas)
    R2 = R.clone()
    R2[0, 7] += 1
    moved = (D(R2, betas) != before)[0].nonzero()[:, 0].tolist()
    assert set(moved) <= {7, 23} and 7 in moved, f"joint 7 moved outputs {moved}"
    moved = (D(R, betas + 1) != before)[0].nonzero()[:, 0].tolist()
    assert moved == [24], f"betas moved outputs {moved}"


def test_adversarial_losses():
    for value, encoder, both in ((0.0, 25.0, 25.0), (0.5, 6.25, 12.5), (1.0, 0.0, 25.0)):
        scores = torch.full((6, 25), value)
        close(hmr.encoder_adversarial_loss(scores), encoder, 1e-6, "sum over 25, mean over B*T")
        close(hmr.discriminator_loss(scores, scores), both, 1e-6, "real -> 1, fake -> 0")
    scores = torch.randn(4, 25).double().requires_grad_()
    assert gradcheck(hmr.encoder_adversarial_loss, (scores,)), GRADIENT
    assert gradcheck(hmr.discriminator_loss, (scores.detach() + 1, scores)), GRADIENT


def test_real_is_pulled_to_1_and_fake_to_0():
    real, fake = torch.ones(6, 25), torch.zeros(6, 25)
    close(hmr.discriminator_loss(real, fake), 0.0, 0, "real and fake swapped: D would hate mocap")
    close(hmr.discriminator_loss(fake, real), 50.0, 0, "(0 - 1)^2 + 1^2 for each of 25")


def test_gradients_do_not_leak_between_encoder_and_discriminators(monkeypatch, tmp_path):
    """One real step of the loop, watched: what each backward leaves in E's and in D's .grad."""
    D, after = Discriminator(), []
    watched, build, backward = {"D": D.all1.weight}, train.build, torch.Tensor.backward

    def build_and_watch(*args):
        model = build(*args)
        watched.update(E=model.regressor.fc3.weight, pixels=model.encoder.conv1.weight)
        return model

    def backward_and_note(loss, *args, **kwargs):
        backward(loss, *args, **kwargs)
        after.append({k: None if p.grad is None else p.grad.clone() for k, p in watched.items()})
    monkeypatch.setattr(train, "build", build_and_watch)
    monkeypatch.setattr(torch.Tensor, "backward", backward_and_note)
    monkeypatch.setattr(train, "finish", lambda *args: {})
    train.train(tiny(tmp_path / "run", steps=1), make_D=lambda: D)
    update_D, update_E = after
    assert update_D["E"] is None and update_D["pixels"] is None, "D's loss reached E: detach fakes"
    assert update_D["D"].abs().sum() > 0
    assert update_E["E"].abs().sum() > 0 and update_E["pixels"].abs().sum() > 0
    assert torch.equal(update_D["D"], update_E["D"]), "D must not learn from E's step"


# ============================================================================================
# Sec. 3.3 and 4: motion, pictures

def tiny(out: Path, **changes) -> train.Config:
    """A network and world small enough for tests; no GPU, whatever the machine has."""
    settings = dict(depth=18, width=8, size=32, batch=4, steps=6, look="plain",
                    upright=True, pretrained="none", lr=1e-3, device="cpu", out=str(out),
                    log_every=2, picture_every=100, eval_pictures=4, amp="off")
    return train.Config(**{**settings, **changes})


def test_mocap_is_split_by_clip():
    assert data.MOCAP.stat().st_size <= 2 ** 20
    with np.load(data.MOCAP, allow_pickle=False) as file:
        clips = {name: file[name] for name in file.files}
    assert len(clips) == 15 and sum(map(len, clips.values())) == 1620
    assert all(c.shape[1:] == (72,) and np.isfinite(c).all() for c in clips.values())
    parts = [len(data.load_mocap(False, held_out)) for held_out in (False, True)]
    assert sum(parts) == 1620, f"{parts} frames to train on and held out: some of the 1620 in both"
    for upright in (True, False):
        seen, unseen = (data.load_mocap(upright, held_out) for held_out in (False, True))
        distance = torch.cdist(unseen[:, 1:].flatten(1), seen[:, 1:].flatten(1)).min()
        assert distance > 1e-3, "a held-out frame is in the training set"


def test_a_mirrored_pose_is_the_mirrored_body(golden):
    """M R(r) M = R(r * (1, -1, -1)), sides swapped, the root included."""
    offsets = torch.randn(1, 24, 3).double()
    M = torch.diag(torch.tensor([-1.0, 1, 1])).double()
    symmetric = (offsets + offsets[:, FLIP_JOINTS] @ M) / 2
    pose = torch.randn(1, 24, 3).double()
    joints, _ = batch_rigid_transform(batch_rodrigues(pose), symmetric, PARENTS)
    mirrored, _ = batch_rigid_transform(batch_rodrigues(data.mirror_pose(pose)), symmetric, PARENTS)
    close(mirrored, joints[:, FLIP_JOINTS] @ M, 1e-12, "swap sides AND flip y, z of every vector")
    close(data.mirror_pose(golden["body_pose"].view(3, 24, 3)).flatten(1),
          golden["out_pose_mirrored"], 0, "not the official code's: it mirrors the root, too")


def test_pictures_and_the_pool_draw_from_one_distribution():
    frames = data.load_mocap(True, False)
    world = data.SyntheticPeople(SMPL(), frames, 512, 4, labels="all")
    pool, betas = world.motion(512, step=0)
    batch = world.batch(0)
    assert not torch.equal(pool, batch.rotmats[:, 1:]), "the draws must be independent"
    # of 512 draws, an element's mean has a standard deviation of at most 0.7 / sqrt(512) = 0.031;
    # of two such means, the difference has 0.044, and 0.18 is four of those
    close(pool.mean(0), batch.rotmats[:, 1:].mean(0), 0.18, "else D learns to reject true labels")
    close(betas.std(0), batch.betas.std(0), 0.25, "betas too")


def test_half_of_all_poses_are_mirrored(body):
    frame = torch.randn(1, 24, 3)
    world = data.SyntheticPeople(body, frame, 4, 4, mix=False)
    drawn = world.poses(1000, torch.Generator().manual_seed(0))
    mirrored = (drawn == data.mirror_pose(frame)).all(2).all(1)
    assert (mirrored | (drawn == frame).all(2).all(1)).all()
    close(mirrored.float().mean(), 0.5, 0.064, "half, within four standard deviations")


@pytest.mark.parametrize("crop, px, move, least, most", [("official", 150, 20, 0.8, 1.23),
                                                         ("tight", 212, 4, 0.95, 1.05)])
def test_cameras_are_the_crop_and_its_jitter(body, crop, px, move, least, most):
    world = data.SyntheticPeople(body, data.load_mocap(True, False), 512, 2, labels="all",
                                 crop=crop)
    batch = world.batch(0)
    low, high = (f(batch.keypoints3d[..., :2], 1) for f in (torch.amin, torch.amax))    # (B, 2)
    diagonal, middle = (high - low).norm(dim=1), (low + high) / 2
    zoom = batch.cam[:, 0] * diagonal * 112 / px                      # the crop is 224 pixels
    close([zoom.min(), zoom.max()], [least, most], 0.01, "the diagonal's zoom, from and to")
    shift = (batch.cam[:, 1:] + middle) * (px / diagonal)[:, None]
    close([shift.min(), shift.max()], [-move, move], 0.5, "pixels, before the zoom")


def test_the_pool_is_fresh_and_drawn_like_the_pictures(body, monkeypatch):
    world = data.SyntheticPeople(body, data.load_mocap(True, False), 4, 4)
    drawn, draw = [], data.SyntheticPeople.poses
    monkeypatch.setattr(data.SyntheticPeople, "poses", lambda world, n, rng:
                        drawn.append(n) or draw(world, n, rng))
    (pool, betas), (later, other) = world.motion(8, 0), world.motion(8, 1)
    world.batch(0)
    assert not torch.equal(pool, later) and not torch.equal(betas, other), "D's pool must go on"
    assert drawn == [8, 8, 4], "pool and pictures draw alike, else D rejects true labels"


def test_a_validation_clip_is_neither_trained_on_nor_are_the_held_out_ones_opened():
    for upright in (True, False):
        everything, held_out = data.load_clips(upright, False), data.load_clips(upright, True)
        assert set(held_out) <= set(data.HELD_OUT) and "jump" in everything
        assert set(data.load_clips(upright, False, "jump")) == set(everything) - {"jump"}
        assert set(data.load_clips(upright, True, "jump")) == {"jump"}
    up = batch_rodrigues(data.load_clips(True, False)["spin"][:, 0])[:, 1, 1]     # (67,)
    assert len(up) == 67 and up.min() > 0.7, "--upright leaves out spin's flight, 40 frames"
    for name in ("kick", "nobody"):
        with pytest.raises(ValueError, match=f"--validate {name}: expected one of walk, run"):
            data.load_clips(True, False, name)


def test_training_never_sees_the_held_out_clips(monkeypatch, body):
    asked, load = [], data.load_mocap
    monkeypatch.setattr(train, "load_mocap", lambda upright, held_out, clip:
                        asked.append(held_out) or load(upright, held_out, clip))
    config = tiny(Path("x"))
    train.training_world(config, body)
    next(train.evaluation_pictures(config, body))
    assert asked == [False, True], "train on the training clips, measure on the held-out ones"


def test_rendering_uses_exactly_the_camera_of_the_loss(body):
    """The picture's silhouette must hold the projected vertices, and only them."""
    frames = data.load_mocap(True, False)
    batch = data.SyntheticPeople(body, frames, 8, 16, labels="all").batch(3)
    out = body(batch.betas, batch.rotmats)
    points = torch.cat([hmr.project(out.vertices, batch.cam), out.vertices[..., 2:]], -1)
    mask = data.rasterize(points, body.faces, 256) >= 0
    seen = [m.nonzero() + 0.5 for m in mask]                          # rows and columns, of each
    low, high = ((f((points[..., :2] + 1) * 128, 1)) for f in (torch.amin, torch.amax))
    # the median of 8: a hand seen edge-on may pass between the centres of two pixels
    left, bottom = torch.stack([yx[:, 1].min() for yx in seen]), [yx[:, 0].max() for yx in seen]
    close((left - low[:, 0]).median(), 0, 1, "left edge: tx, or x mirrored?")
    close((torch.stack(bottom) - high[:, 1]).median(), 0, 1, "bottom edge: ty, or y upwards?")
    close(batch.keypoints2d, hmr.project(out.keypoints, batch.cam), 0, "labels and picture differ")


def test_a_lying_person_lies_under_any_heading(body):
    """The camera turns the whole recorded person: R_camera @ R_recorded, not the reverse."""
    frames = data.load_mocap(upright=False, held_out=True)
    up = batch_rodrigues(frames[:, 0])[:, :, 1]                       # (M, 3) where the head points
    lying = up[:, 1].abs().argmin()
    world = data.SyntheticPeople(body, frames[lying:lying + 1], 64, 4, labels="all", mix=False)
    axis = world.batch(0).rotmats[:, 0, :, 1]                         # (B, 3) the same, camera
    # the camera tilts by 5 degrees (one standard deviation), four of which are 0.35
    close(axis[:, 1], -up[lying, 1].expand(64), 0.35, "the angle to the vertical is the recorded")
    quadrants = {(x > 0, z > 0) for x, z in axis[:, [0, 2]].tolist()}
    assert len(quadrants) == 4, "lying in ONE direction of the camera: multiplied from the right"


def test_a_batch_is_a_function_of_seed_step_and_rank(body):
    frames = data.load_mocap(True, False)
    make = lambda **k: data.SyntheticPeople(body, frames, 6, 16, look="hard", **k)
    world = make(seed=1)
    later = world.batch(5)
    assert all(torch.equal(x, y) for x, y in zip(make(seed=1).batch(5), later)), "must repeat"
    for other in (world.batch(6), make(seed=2).batch(5), make(seed=1, rank=1).batch(5)):
        assert not torch.equal(other.image, later.image), "must differ"


def test_a_batch_is_labelled_as_the_paper_says(body):
    batch = data.SyntheticPeople(body, data.load_mocap(True, False), 64, 16).batch(0)
    assert batch.image.shape == (64, 3, 16, 16) and 0 <= batch.image.min() <= batch.image.max() <= 1
    assert batch.has_3d.mean() == 0.5, "half of every batch is 2D only"
    assert 0.87 < batch.visible.mean() < 0.93, "a tenth is unlabelled"
    assert torch.equal(batch.has_3d, batch.has_smpl[:, None].expand(64, 19)), "drawn: all or none"
    blind = batch.has_smpl == 0
    assert (batch.rotmats[blind] == 0).all() and (batch.keypoints3d[blind] == 0).all()
    assert (batch.keypoints2d[batch.visible == 0] == 0).all()
    center = batch.keypoints2d[~blind]
    assert center.abs().max() < 1.2, "the crop holds the person"
    heading = batch.rotmats[~blind][:, 0, :, 2]                       # where the chest points
    assert (heading[:, 2] > 0.5).any() and (heading[:, 2] < -0.5).any(), "all headings"
    up = -batch.rotmats[~blind][:, 0, 1, 1]
    assert up.median() > 0.8, "people stand upright in a camera whose y points down"


def test_the_evaluation_pictures_are_the_same_for_every_seed(body):
    a, b = (list(train.evaluation_pictures(tiny(Path("x"), seed=s, eval_pictures=66), body))
            for s in (0, 7))
    assert [len(batch.image) for batch in a] == [64, 2], "as many as asked for"
    assert torch.equal(a[1].image, b[1].image) and a[0].visible.min() == 1


# ============================================================================================
# Sec. 4.1: the measures

@pytest.mark.parametrize("B, N", [(1, 14), (2, 14), (3, 14), (3, 3), (1, 3), (2, 24)])
def test_procrustes_undoes_any_similarity(B, N):
    target = torch.randn(B, N, 3).double()
    R = torch.from_numpy(Rotation.random(B, random_state=1).as_matrix())
    scale, shift = torch.rand(B, 1, 1).double() + 0.5, torch.randn(B, 1, 3).double()
    source = scale * target @ R.mT + shift
    close(train.compute_similarity_transform(source, target), target, 1e-10,
          f"B = {B}, N = {N}: each body has its own scale, rotation and shift")


def test_procrustes_does_not_reflect_and_is_the_best():
    target = torch.randn(3, 14, 3).double()
    mirrored = target * torch.tensor([-1.0, 1, 1])
    aligned = train.compute_similarity_transform(mirrored, target)
    assert (aligned - target).norm(dim=-1).mean() > 0.1, "a mirrored body is wrong: det must be +1"
    best = (aligned - target).square().sum((1, 2))
    for _ in range(20):                                               # no small change is better
        R = torch.from_numpy(Rotation.from_rotvec(0.05 * np.random.default_rng(_).normal(
            size=3)).as_matrix())
        moved = aligned.mean(1, keepdim=True) + (aligned - aligned.mean(1, keepdim=True)) @ R.mT
        assert ((moved - target).square().sum((1, 2)) >= best - 1e-9).all(), "not least squares"


def test_procrustes_scale_is_the_best_even_for_a_mirrored_body():
    target = torch.randn(10, 14, 3).double()
    source = target * torch.tensor([-1.0, 1, 1])
    source[:5] = torch.randn(5, 14, 3)
    aligned = train.compute_similarity_transform(source, target)
    a, t = (x - x.mean(1, keepdim=True) for x in (aligned, target))
    # least squares: d/ds |t - s a|^2 = 0 at s = 1
    close(((t - a) * a).sum((1, 2)), torch.zeros(10), 1e-10, "the scale needs the flipped sign too")


def test_the_measures_on_a_known_error(body):
    batch = data.SyntheticPeople(body, data.load_mocap(True, True), 3, 8, labels="all").batch(0)
    out = body(batch.betas, batch.rotmats)
    true = hmr.HMROutput(batch.rotmats, batch.betas, batch.cam, out.joints, out.keypoints,
                         batch.keypoints2d, out.vertices)
    moved = true._replace(keypoints3d=true.keypoints3d + 5, vertices=true.vertices + 5,
                          keypoints2d=true.keypoints2d + torch.tensor([0.03, 0.04]))
    result = train.summarize([train.pose_errors(moved, true)])
    close(result["mpjpe"], 0.0, 1e-2, "both bodies are centred at their own hips")
    close(result["pve"], 0.0, 1e-2, "vertices too")
    close(result["px"], 5.6, 1e-3, "0.05 of [-1, 1] is 5.6 pixels of 224")
    result = train.summarize([train.pose_errors(true, true)])
    assert result["pck"] == 100 and result["px"] == 0
    close(result["auc"], 100 * 30 / 31, 1e-12, "a perfect body: 0 mm is not below the threshold 0")
    wrist = true.keypoints3d.clone()
    wrist[:, 6, 0] += 0.16                                            # one of 14 joints by 160 mm
    result = train.summarize([train.pose_errors(true._replace(keypoints3d=wrist), true)])
    close(result["mpjpe"], 160 / 14, 1e-3, "mean over 14 joints")
    close(result["pck"], 100 * 13 / 14, 1e-3, "160 mm is beyond 150")
    close(result["auc"], 100 * 13 / 14 * 30 / 31, 1e-3, "and beyond every threshold from 0 to 150")


def test_errors_are_centred_at_the_hips_and_the_thresholds_are_3dhps(body):
    batch = data.SyntheticPeople(body, data.load_mocap(True, True), 2, 8, labels="all").batch(0)
    out = body(batch.betas, batch.rotmats)
    true = hmr.HMROutput(batch.rotmats, batch.betas, batch.cam, out.joints, out.keypoints,
                         batch.keypoints2d, out.vertices)
    ankle = true.keypoints3d.clone()
    ankle[:, 0, 0] += 0.1                                             # keypoint 0 = right ankle
    errors = train.pose_errors(true._replace(keypoints3d=ankle), true)
    close(errors["mpjpe"][:, 0], torch.full((2,), 100.0), 1e-2, "centred at keypoint 0?")
    close(errors["mpjpe"][:, 1:], torch.zeros(2, 13), 1e-2, "only the ankle is off: centre at hips")
    for mm, n in ((0.0, 30), (2.5, 30), (5.0, 29), (72.5, 16), (149.9, 1), (150.0, 0)):
        result = train.summarize([{"mpjpe": torch.full((1, 14), mm)}])
        close(result["auc"], 100 * n / 31, 1e-4, f"{mm} mm is below {n} of the 31: 0, 5 .. 150")
        assert result["pck"] == (100 if n else 0), f"{mm} mm, PCK: strictly below 150 counts"


def test_the_measures_are_the_official_codes(golden):
    """MPJPE and PA-MPJPE of each of 40 bodies as hmr has them, PCK and AUC as MPI-INF-3DHP."""
    pred, true = (hmr.HMROutput(torch.zeros(40, 24, 3, 3), *[None] * 3, golden[f"eval_{which}"],
                                torch.zeros(40, 19, 2), torch.zeros(40, 1, 3).double())
                  for which in ("pred", "true"))
    errors = train.pose_errors(pred, true)
    # float64's rounding of errors up to 1,218 mm; an SVD's is some times that
    for name, key in (("mpjpe", "mpjpe"), ("pa_mpjpe", "pa")):
        close(errors[name].mean(1), golden[f"out_eval_{key}"], 1e-9, f"{name}, mm: a body centred "
              "at its pelvis joint, a reflection allowed, or one scale for all?")
    result = train.summarize([errors])           # mmhuman3d's percentages are float32
    close([result["pck"], result["auc"]], golden["out_eval_pck_auc"], 1e-5,
          "PCK and AUC, %: strictly below the threshold (one of the bodies is perfect)")


def test_evaluation_is_in_eval_mode_and_float32_and_training_goes_on_as_before(body, monkeypatch):
    model, modes, decoded = HMR(body, depth=18, width=8, amp=torch.bfloat16).train(), [], []
    model.register_forward_pre_hook(lambda m, _: modes.append(
        any(part.training for part in m.modules())))
    model.encoder.register_forward_hook(lambda *_: modes.append(torch.is_autocast_enabled("cpu")))
    monkeypatch.setattr(model, "decode", lambda theta, vertices=False: decoded.append(theta) or
                        HMR.decode(model, theta, vertices))
    guess = torch.tensor([[1.3, 0.2, -0.1]])
    monkeypatch.setattr(train, "mean_camera", lambda *_: guess)
    config = tiny(Path("x"))
    train.overlays(model, next(train.evaluation_pictures(config, body)))
    assert model.training, "after a picture, training must go on in train mode"
    decoded.clear()
    metrics = train.evaluate(model, config)
    assert modes == [False, True, False, False], "model.eval(), and measures without bf16"
    close(decoded[1][:, :3], guess.expand(4, 3), 0, "the baseline stands where people stand on "
          "average: Theta-bar's own camera would flatter the network")
    guessed, bar = metrics["mean_pose"], metrics["baseline"]
    close(guessed["pa_mpjpe"], bar["pa_mpjpe"], 1e-3, "mean_pose differs by its heading alone")
    assert guessed["mpjpe"] < bar["mpjpe"] and guessed["turned"] == 0 and bar["turned"] > 0


# ============================================================================================
# Sec. 3.4: training

def test_the_loop_gives_every_loss_and_optimiser_its_own(monkeypatch, tmp_path):
    """Two real steps of the loop, watched; all weights differ, and one body lacks SMPL labels."""
    losses = ("keypoint_loss", "joints3d_loss", "smpl_loss", "encoder_adversarial_loss")
    seen = {name: [] for name in ("HMR", "D", "adam", "log", "graded", "stepped", *losses)}
    for name in losses:
        def spy(*args, name=name, original=getattr(train, name)):
            seen[name].append((args, original(*args)))
            return seen[name][-1][1]
        monkeypatch.setattr(train, name, spy)

    def note(cls, method, key, what):
        original = getattr(cls, method)

        def noted(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            seen[key].append(what(self, args, result))
            return result
        monkeypatch.setattr(cls, method, noted)
    note(HMR, "forward", "HMR", lambda m, a, r: (m.training, r[0]))
    note(Discriminator, "forward", "D", lambda d, a, r: a)
    note(train.Log, "add", "log", lambda _, a, r: a[1])
    batch, adam = data.SyntheticPeople.batch, torch.optim.Adam
    zero_grad = adam.zero_grad

    def like_3dhp(world, step):                                # picture 2 has joints but no SMPL
        b = batch(world, step)
        return b if world.batch_size != 4 else b._replace(
            has_smpl=b.has_smpl * torch.tensor([1.0, 0, 0, 0]))
    monkeypatch.setattr(data.SyntheticPeople, "batch", like_3dhp)
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, **k:
                        seen["adam"].append(adam(*a, **k)) or seen["adam"][-1])
    monkeypatch.setattr(adam, "zero_grad", lambda o, *a, **k:
                        seen["graded"].append(seen["adam"].index(o)) or zero_grad(o, *a, **k))
    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: seen["stepped"].append(seen["adam"].index(optimizer)))
    monkeypatch.setattr(train, "finish", lambda *args: {})
    config = tiny(tmp_path / "run", steps=2, weight_kp=2.0, weight_joints=3.0, weight_smpl=5.0,
                  weight_adv=7.0, lr_d=1e-2, schedule="onecycle")
    train.train(config)
    hook.remove()

    assert all(mode for mode, _ in seen["HMR"]), "training needs model.train()"
    assert seen["graded"] == [1, 0] * 2, "each optimiser's zero_grad once a step, D's first"
    assert seen["stepped"] == [1, 0] * 2, "each optimiser steps once a step, D's first"
    for step, (real, fake, judged) in enumerate([seen["D"][:3], seen["D"][3:]]):
        _, pose, betas = hmr.split_theta(torch.cat(seen["HMR"][step][1]))
        for shown in (fake, judged):
            assert len(shown[0]) == 12, f"D sees {len(shown[0])}, not B * T: Theta_1 .. Theta_T"
            close(shown[0], hmr.pose_to_rotmats(pose)[:, 1:], 0, "D sees joints 1 to 23: no root")
            close(shown[1], betas, 0, "and the betas of the same Thetas")
        assert len(real[0]) == 12, f"{len(real[0])} real, expected B * T = 12, as many as fake"
    assert not torch.equal(seen["D"][0][0], seen["D"][3][0]), "the real samples must change"
    assert seen["joints3d_loss"][0][0][2][:, 0].tolist() == [1, 0, 1, 0], "L_joints: has_3d's mask"
    assert seen["smpl_loss"][0][0][4].tolist() == [1, 0, 0, 0], "L_smpl: masked by has_smpl"
    total = sum(w * seen[name][0][1] for w, name in zip((2, 3, 5, 7), losses))    # Eq. (1)
    close(seen["log"][0].loss_E, total, 1e-4, "a loss has lost its weight, or has another's")
    for optimizer, rate in zip(seen["adam"], (config.lr, config.lr_d)):
        (group,) = optimizer.param_groups
        assert group["weight_decay"] == 0, "the official weight decay is never read"
        assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8, "Adam's usual numbers"
        close(group["lr"], rate * train.lr_factor(1, config), 1e-12, "E and D: own rate, one cycle")


def test_a_whole_step_is_the_official_codes(golden, golden_body):
    """Every term and gradient of one step of hmr's trainer: 4 pictures' features, T = 3."""
    E = HMR(golden_body, depth=18, width=8)
    E.regressor, D = golden_networks(golden)
    E.encode = lambda images: golden["step_feature"]
    E.regressor.theta_bar.requires_grad_()                            # hmr trains it
    keypoints, visible = golden["step_kp"].split([2, 1], -1)
    batch = data.Batch(torch.zeros(4, 3, 8, 8), keypoints, visible[..., 0],
                       nn.functional.pad(golden["step_joints"], (0, 0, 0, 5)),
                       batch_rodrigues(golden["step_pose"].view(4, 24, 3)), golden["step_betas"],
                       golden["step_has_joints"][:, None].expand(4, 19), golden["step_has_smpl"],
                       torch.zeros(4, 3))
    # hmr updates both at once: E is judged by D as it was, so D must stand still here
    players = [torch.optim.SGD(network.parameters(), lr=0.0) for network in (E, D)]
    loss_E, L_kp, L_joints, L_smpl, L_adv, loss_D, *_ = train.train_step(
        E, D, *players, batch, golden["motion"], train.Config())
    of_E, of_D = "a detach between the iterations?", "E's step added to it? fakes of Theta_3 alone?"
    for name, got, suspect in (
            ("60_L_kp", 60 * L_kp, "of Theta_3 alone, masked by visible; s (X + t)?"),
            ("60_L_joints", 60 * L_joints, "of Theta_3 alone, masked by has_3d; 0.5?"),
            ("60_L_smpl", 60 * L_smpl, "of Theta_3 alone, masked by has_smpl; 0.5?"),
            ("L_adv", L_adv, "all T Thetas; a sum over 25, a mean over B*T?"),
            ("loss_D", loss_D, "real to 1, fake to 0; summed, not halved?"),
            ("loss_E", loss_E, "the terms are right, so their weights: 60, 60, 60, 1"),
            ("grad_E_fc3_bias", E.regressor.fc3.bias.grad, of_E),
            ("grad_E_fc1_norm", E.regressor.fc1.weight.grad.norm(), of_E),
            ("grad_E_theta_bar", E.regressor.theta_bar.grad, of_E),
            ("grad_D_embed1_weight", D.embed1.weight.grad, of_D),
            ("grad_D_shape1_weight", D.shape1.weight.grad, of_D),
            ("grad_D_joint_bias", D.joint_bias.grad, of_D)):
        expected = golden[f"step_{name}"]
        # hmr's 1e-8 again, relative to the largest number
        close(got, expected, 2e-8 * expected.abs().max().item(), f"{name}: {suspect}")


def test_without_an_adversary_d_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "finish", lambda *args: {})
    for name, adv, steps in (("no", False, 1), ("none", False, 3), ("yes", True, 1)):
        train.train(tiny(tmp_path / name, adv=adv, steps=steps, weight_adv=9.0, log_every=1))
    no, none, yes = (weights_of(tmp_path / name)["discriminator"] for name in ("no", "none", "yes"))
    assert same(no, none), "D changed from step 1 to 3 without an adversary"
    assert not same(no, yes), "with one, D learns from the first step on"


def test_one_batch_overfits(tmp_path):
    """Before anything about data: can the network learn one batch by heart?"""
    config = tiny(tmp_path / "run", steps=120, width=16, overfit=True, dropout=0.0, seed=1,
                  weight_adv=0.0, log_every=10)
    train.train(config)
    rows = (tmp_path / "run" / "log.csv").read_text(encoding="utf-8").split()
    first, last = (dict(zip(rows[0].split(","), map(float, r.split(",")))) for r in
                   (rows[1], rows[-1]))
    assert last["L_kp"] < 0.25 * first["L_kp"] and last["L_smpl"] < 0.4 * first["L_smpl"], \
        f"from {first} to {last}: gradients do not reach what they should"


def weights_of(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_resuming_is_bit_identical(tmp_path, monkeypatch, capsys):
    arguments = ["--depth", "18", "--width", "8", "--size", "32", "--batch", "4", "--steps", "6",
                 "--look", "plain", "--pretrained", "none", "--device", "cpu", "--log-every", "2",
                 "--eval-pictures", "4", "--schedule", "onecycle"]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    assert train.main([*arguments, "--out", whole]) == 0
    batch = data.SyntheticPeople.batch

    def press_ctrl_c(world, step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return batch(world, step)
    monkeypatch.setattr(data.SyntheticPeople, "batch", press_ctrl_c)
    assert train.main([*arguments, "--out", parts]) == 130
    assert f"--resume --out {parts} goes on from step 4" in capsys.readouterr().err
    monkeypatch.setattr(data.SyntheticPeople, "batch", batch)
    with open(tmp_path / "parts" / "log.csv", "a") as log:            # died after its checkpoint,
        log.write("6" + ",0" * 11 + "\n7,0")                          # and in the middle of a row
    stopped = weights_of(tmp_path / "parts")
    torch.save(stopped | {"seconds": 1000.0}, tmp_path / "parts" / "checkpoint.pt")
    assert train.main(["--resume", "--out", parts, "--device", "cpu"]) == 0
    assert weights_of(tmp_path / "parts")["seconds"] > 1000, "the clock must go on"
    a, b = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    for key in ("model", "discriminator", "opt_E", "opt_D", "step", "world"):
        assert same(a[key], b[key]), f"{key} differs after resuming (dropout's masks? Adam's state?)"
    logs = [[r.split(",")[:10] for r in (tmp_path / f / "log.csv").read_text().split()]
            for f in ("whole", "parts")]
    assert logs[0] == logs[1], "the log must go on where it stopped"
    assert not list(tmp_path.glob("*/.*")), "temporary files left behind"
    for flags, sentence in ((["--depth", "34"], "--depth"), ([], "already done 6"),
                            (["--steps", "9"], "one cycle of learning rates ends at step 6")):
        assert train.main(["--resume", "--out", parts, *flags]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1, error


def test_a_checkpoint_stands_from_the_first_second_and_at_lines_of_the_log(tmp_path, monkeypatch):
    saved, save = [], train.save
    monkeypatch.setattr(train, "save", lambda parts, step, *rest: saved.append(step) or save(
        parts, step, *rest))
    monkeypatch.setattr(train, "finish", lambda *args: {})
    train.train(tiny(tmp_path / "minute", steps=5, log_every=2))
    assert saved == [0, 5], "at the start, then once a minute, then at the end"
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    train.train(tiny(tmp_path / "often", steps=5, log_every=2))
    assert saved[2:] == [0, 2, 4, 5], "where log.csv has a row, so that both agree"


def test_dropouts_masks_are_a_function_of_seed_step_and_rank(tmp_path, monkeypatch):
    states, step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: states.append(
        torch.get_rng_state()) or step(*args))
    monkeypatch.setattr(train, "finish", lambda *args: {})
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.train(tiny(tmp_path / folder, steps=2, seed=seed))
    for first, second in ((0, 1), (0, 4)):
        assert not torch.equal(states[first], states[second]), "fresh masks at each step and seed"
    assert torch.equal(states[1], states[3]), "a resumed run must draw the same masks"


def test_the_learning_rate_rises_and_anneals():
    config = train.Config(schedule="onecycle", steps=100)
    rates = [train.lr_factor(s, config) for s in range(100)]
    assert 0 < rates[0] < 0.2 and max(rates) == rates[10] == 1 and 0 < rates[-1] < 0.01
    assert train.lr_factor(7, train.Config()) == 1, "the official recipe has no schedule"


def test_the_defaults_are_the_official_recipe():
    c = train.Config()
    assert (c.depth, c.size, c.batch, c.iterations) == (50, 224, 64, 3)
    assert (c.lr, c.lr_d) == (1e-5, 1e-4), "do_train.sh's rates; the flags' own default is 1e-3"
    assert (c.weight_kp, c.weight_joints, c.weight_smpl, c.weight_adv) == (60, 60, 60, 1)
    assert (c.dropout, c.schedule, c.rotation) == (0.5, "constant", "axis-angle")
    assert c.steps == 667_589, "the released checkpoint's"


# ============================================================================================
# The book

def test_arrows_between_files_go_one_way():
    """smpl.py <- hmr.py <- data.py <- train.py; the appendix is imported in one function alone."""
    order = ("smpl", "hmr", "data", "train")
    for n, name in enumerate(order):
        tree = ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            for inner in ast.iter_child_nodes(node):
                inner.inside = getattr(node, "name", None) or getattr(node, "inside", "")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [
                    node.module]
                for imported in (each.partition(".")[0] for each in names):
                    assert imported not in order[n:], f"{name}.py imports the later {imported}.py"
                    assert imported != "appendix" or node.inside == "load_body", (
                        f"{name}.py, line {node.lineno}: a chapter knows nothing of the appendix")


def test_every_equation_of_the_paper_is_tagged_where_it_is_computed():
    code = "".join((HERE / f).read_text(encoding="utf-8") for f in ("hmr.py", "train.py"))
    tagged = re.findall(r"^.*(?:=|return) .*# Eq\. \(\d\)$", code, re.M)   # fields merely name it
    numbers = sorted(int(line[-2]) for line in tagged)
    assert numbers == list(range(1, 9)), f"HMR has Eqs. (1) to (8), once each; tagged: {numbers}"
