"""What HMR claims, checked: run `pytest -x test_hmr.py` and read the failures as a syllabus.

The order is the paper's, chapter by chapter.  A tolerance that is more than rounding has its reason
beside it; messages say which mistake to suspect.  Oracles are none of the functions tested: scipy's
rotations, torchvision's ResNets, plain loops, numbers by hand.  No GPU, no network.
"""

import itertools
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


def rotmats_of(pose: Tensor) -> Tensor:
    """scipy's rotation matrices of axis-angle vectors: (..., 3) -> (..., 3, 3)."""
    R = Rotation.from_rotvec(pose.detach().double().reshape(-1, 3).numpy()).as_matrix()
    return torch.from_numpy(R).to(pose.dtype).view(*pose.shape, 3)


@pytest.fixture(scope="module")
def golden() -> dict:
    """What the authors' own code gives (assets/README.md), in float64."""
    with np.load(HERE / "assets" / "golden.npz", allow_pickle=False) as file:
        numbers = {key: torch.from_numpy(file[key]).double() for key in file.files}
    for key in ("body_weights", "body_J_regressor", "body_cocoplus_regressor"):
        numbers[key] /= 64
    numbers["step_loss_D"] = numbers["step_loss_D_real"] + numbers["step_loss_D_fake"]
    numbers["motion"] = (rotmats_of(numbers["step_mocap_pose"].view(12, 24, 3))[:, 1:],
                         numbers["step_mocap_betas"])
    return numbers


@pytest.fixture(scope="module")
def golden_body(golden, tmp_path_factory) -> SMPL:
    path = tmp_path_factory.mktemp("golden") / "body.npz"
    arrays = {key[5:]: golden[key].numpy() for key in golden if key.startswith("body_")}
    arrays |= {key: arrays[key].astype(np.int64) for key in ("f", "kintree_table")}
    np.savez(path, mean_pose=golden["step_mean_pose"].numpy(), **arrays)
    return SMPL(path).double()


def close(got, expected, tolerance: float, message: str, mistakes: dict | None = None) -> None:
    """Fails if got is not expected; mistakes: what known ones would give, so that one is named."""
    got, expected = (torch.as_tensor(x).detach().double() if isinstance(x, Tensor) else
                     torch.tensor(x, dtype=torch.float64) for x in (got, expected))
    assert got.shape == expected.shape or not expected.ndim or not got.ndim, (
        f"{message} (the shape is {tuple(got.shape)}, expected {tuple(expected.shape)})")
    off = (got - expected).abs().nan_to_num(math.inf, math.inf)       # NaN is far off
    for name, wrong in (mistakes or {}).items() if off.max() > tolerance else ():
        if (got - torch.as_tensor(wrong)).abs().max() <= max(tolerance, 1e-6):
            message = f"this is {name}; {message}"
    worst = np.unravel_index(off.argmax().item(), off.shape)
    some = ... if off.numel() < 5 else worst                          # four numbers, or the worst
    wanted, came = (np.round(x.expand_as(off).numpy()[some], 5) for x in (expected, got))
    assert off.max() <= tolerance, (
        f"{message} (expected {wanted}, got {came}{f' at {[*map(int, worst)]}' * (some is worst)}, "
        f"off by {off.max():.3g}, allowed {tolerance:.3g})")


def call(f, *inputs):
    """f(*inputs); fails if f changes an input, or answers in another precision than asked."""
    before = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
    answer = f(*inputs)
    for x, kept in zip(inputs, before):
        same_still = not isinstance(x, Tensor) or ((x == kept) | (x != x)).all()
        assert same_still, "an input was changed in place: work on a copy of it"
    for y in answer if isinstance(answer, (tuple, list)) else (answer,):
        assert isinstance(y, Tensor) and y.dtype == inputs[0].dtype, (
            f"expected a {inputs[0].dtype} tensor, as the input is, got "
            f"{y.dtype if isinstance(y, Tensor) else type(y).__name__}")
    return answer


# autograd against finite differences -> bool: a sentence says more than two matrices
gradcheck = lambda *args, **how: torch.autograd.gradcheck(*args, raise_exception=False, **how)
GRADIENT = "not finite differences' gradient: a detach, a change in place, 0/0?"

both_precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32],
                                          ids=["float64", "float32"])
# of sums of up to 207 products of numbers up to 10, one such sum after another for 23 bones
ROUNDING = {torch.float64: 1e-12, torch.float32: 5e-4}


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
    R, a, (x, y, z) = call(batch_rodrigues, r), r.norm(dim=1)[:, None, None], r.unbind(-1)
    K = torch.stack([0 * x, -z, y, z, 0 * x, -x, -y, x, 0 * x], -1).view(-1, 3, 3)
    # a matrix_exp squares repeatedly, so its own error grows with the angle
    allowed = 1e-10 if kind == "many turns" else 1e-12
    close(R, rotmats_of(r), allowed, f"{kind}: not scipy's rotation; wrong near zero?", {
        "R transposed": rotmats_of(-r), "degrees taken for radians": rotmats_of(r.deg2rad()),
        "radians taken for degrees": rotmats_of(r.rad2deg()), "an axis that is not normalised":
        torch.eye(3) + a.sin() * K + (1 - a.cos()) * K @ K})
    close(R, torch.matrix_exp(K), 1e-10, f"{kind}: R must be exp([r]x)")


def test_rodrigues_turns_columns_and_keeps_leading_shapes(golden):
    quarter = call(batch_rodrigues, torch.tensor([0, 0, math.pi / 2]))
    close(quarter @ torch.tensor([1.0, 0, 0]), [0, 1.0, 0], 1e-6, "Rz(90 deg) x must be y",
          {"R transposed, which breaks skinning silently": [0, -1.0, 0]})
    shape = batch_rodrigues(torch.zeros(2, 5, 24, 3)).shape
    assert shape == (2, 5, 24, 3, 3), f"(2, 5, 24, 3) must give (2, 5, 24, 3, 3), not {shape}"
    # hmr's angle is |r + 1e-8|, so that its axis is no unit vector: both are off by as much
    close(batch_rodrigues(golden["aa"]), golden["out_R"], 2e-8, "not the official code's rotations")
    with pytest.raises(ValueError, match=r"\(\.\.\., 3\)"):
        batch_rodrigues(torch.zeros(2, 72))


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rodrigues_has_the_right_gradient_even_at_zero(kind):
    r = ROTATIONS[kind][:3].clone().requires_grad_()
    assert gradcheck(batch_rodrigues, (r,)), f"{kind}: 0/0 in the backward pass gives NaN"


def test_rodrigues_is_accurate_in_float32_at_small_and_large_angles():
    for angle in (1e-6, 1e-3, 9.9e-3, 1.01e-2, 0.1, 3.0):
        r = angle * nn.functional.normalize(torch.randn(50, 3), dim=1)
        # the formula used here is off by 4e-7 at most, a matrix exponential by 1.5e-6
        close(call(batch_rodrigues, r), rotmats_of(r), 2e-6, f"float32 at angle {angle}: a formula "
              "that cancels there, or a series that is used too far from zero?")


def test_rot6d_has_spins_interleaved_layout(golden):
    R = rotmats_of(torch.randn(10, 3).double())
    close(rot6d_to_rotmat(R[..., :2].flatten(1)), R, 1e-12, "a rotation's own columns give it back")
    x = torch.randn(1, 3, 6, dtype=torch.float64)       # 3 vectors: torch.cross without dim fails
    Q = rot6d_to_rotmat(x)
    close(Q @ Q.mT, torch.eye(3).double().expand(1, 3, 3, 3), 1e-12, "not orthonormal")
    close(torch.linalg.det(Q), torch.ones(1, 3).double(), 1e-12, "a reflection, not a rotation")
    assert gradcheck(rot6d_to_rotmat, (x.requires_grad_(),)), GRADIENT
    close(rot6d_to_rotmat(golden["x6"]), golden["out_x6_interleaved"], 1e-12, "SPIN's six numbers "
          "are a (3, 2) matrix", {"4D-Humans' layout": golden["out_x6_columns"],
                                  "pytorch3d's layout": golden["out_x6_rows"]})


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
    betas, R, template, S, P, regressor, W = (np.asarray(array, float) for array in (
        betas, rotmats, v_template, shapedirs, posedirs, J_regressor, weights))
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


@both_precisions
def test_blend_shapes_are_a_sum_of_directions(dtype):
    for C in (10, 207):                                      # of the betas, of the pose feature
        c, directions = torch.randn(2, C, dtype=dtype), torch.randn(5, 3, C, dtype=dtype)
        expected = sum(c[:, n, None, None] * directions[..., n] for n in range(C))
        close(call(blend_shapes, c, directions), expected, ROUNDING[dtype],
              "vertex v moves by the sum of c_n * directions[v, :, n]")
    assert gradcheck(blend_shapes, (c.double().requires_grad_(), directions.double()),
                     fast_mode=True), GRADIENT


@both_precisions
def test_lbs_equals_a_slow_loop(dtype):
    for V in (5, 31):
        model = random_body(V, dtype)
        betas, R = torch.randn(3, 10, dtype=dtype), rotmats_of(torch.randn(3, 24, 3, dtype=dtype))
        vertices, joints = call(lbs, betas, R, *model.values())
        for b in range(3):
            v, j = slow_smpl(betas[b], R[b], **model)
            close(joints[b], j, ROUNDING[dtype], "joints: the chain's order, unshaped at rest?", {
                "joints regressed from the posed skin": model["J_regressor"].double() @ v})
            close(vertices[b], v, ROUNDING[dtype],
                  "vertices: pose feature's order, - I, or - G J forgotten?")


@pytest.mark.parametrize("scale", [0, 1, 3])                # the rest pose and large angles
def test_lbs_gradients(scale):
    model, rest = random_body(4), torch.tensor([1.0, 0, 0, 1, 0, 0]).double()
    betas = torch.randn(2, 10, dtype=torch.float64, requires_grad=True)
    pose = (rest + scale * torch.randn(2, 24, 6).double()).requires_grad_()
    assert gradcheck(lambda b, p: lbs(b, rot6d_to_rotmat(p), **model), (betas, pose),
                     fast_mode=True), GRADIENT


# SMPL's tree; a single chain; all bones at the root; three chains, each numbered to its end
TREES = {"SMPL": PARENTS, "chain": range(-1, 23), "star": [-1] + [0] * 23,
         "depth first": [-1 if i == 0 else 0 if i in (1, 8, 16) else i - 1 for i in range(24)]}


@pytest.mark.parametrize("tree", TREES)
@both_precisions
def test_kinematics_equal_a_loop_over_the_23_joints(tree, dtype):
    """Joints, bones' motions and gradients of the 23 joints posed in turn, as in the paper."""
    parents, J = list(TREES[tree]), torch.randn(2, 24, 3, dtype=dtype, requires_grad=True)
    R = rotmats_of(2 * torch.randn(2, 24, 3, dtype=dtype)).requires_grad_()
    world, place = [R[:, 0]], [J[:, 0]]
    for i, p in enumerate(parents[1:], 1):
        place.append(place[p] + (world[p] @ (J[:, i] - J[:, p])[..., None])[..., 0])
        world.append(world[p] @ R[:, i])
    world, place = torch.stack(world, 1), torch.stack(place, 1)
    shift = place - (world @ J[..., None])[..., 0]                    # G_i(pose) G_i(rest)^-1
    kind, allowed = (tuple, torch.tensor)[dtype == torch.float32], ROUNDING[dtype]
    posed, A = call(batch_rigid_transform, R, J, kind(parents))
    close(posed, place, allowed, f"{tree}: a joint that moved before its parent did?",
          {"A's last column, which is not where the joint is": shift})
    close(A[:, :, :3, :3], world, allowed, f"{tree}: R_parent R, not R R_parent")
    close(A[:, :, :3, 3], shift, allowed, f"{tree}: a bone turns about its joint, not the origin")
    weights = torch.randn(2, 24, 3, dtype=dtype), torch.randn(2, 24, 3, dtype=dtype)
    for a, b in zip(*(torch.autograd.grad(out, (R, J), weights) for out in (
            (posed, A[:, :, :3, 3]), (place, shift)))):
        close(a / b.abs().max(), b / b.abs().max(), allowed, f"{tree}: " + GRADIENT)


def test_zero_input_returns_the_template_and_the_root_turns_about_joint_0():
    model, betas = random_body(20), torch.zeros(1, 10).double()
    R = torch.eye(3).double().repeat(1, 24, 1, 1)
    vertices, joints = lbs(betas, R, **model)
    close(vertices[0], model["v_template"], 1e-12, "the rest pose needs no pose blend shape: R - I")
    R[:, 0] = rotmats_of(torch.randn(1, 3).double())
    (turned, turned_joints), J0 = lbs(betas, R, **model), joints[:, :1]
    close(turned_joints[:, 0], J0[:, 0], 1e-12, "joint 0 must stay: the root turns about it")
    close(turned - J0, (vertices - J0) @ R[:, 0].mT, 1e-12,
          "a root rotation is rigid: it turns about joint 0 and is not in the pose feature")


def test_joints_depend_on_betas_but_not_on_pose_blend_shapes():
    model, betas = random_body(20), torch.randn(1, 10).double()
    R = rotmats_of(torch.randn(1, 24, 3).double())
    _, joints = lbs(betas, R, **model)
    _, other = lbs(betas, R, **{**model, "posedirs": 0 * model["posedirs"]})
    close(joints, other, 1e-12, "J is regressed BEFORE the pose blend shapes")
    _, average = lbs(0 * betas, R, **model)
    assert (joints - average).abs().max() > 1e-3, "J must be regressed from the SHAPED template"


def test_a_tall_person_has_long_bones_and_bones_do_not_stretch():
    rest = torch.randn(1, 24, 3).double() * torch.rand(1, 1, 1).double()
    posed, A = batch_rigid_transform(rotmats_of(torch.randn(1, 24, 3).double()), rest, PARENTS)
    length = lambda J: (J[:, 1:] - J[:, list(PARENTS[1:])]).norm(dim=-1)
    close(length(posed), length(rest), 1e-12, "posing must keep every bone's length")
    close(A[0, :, 3], [[0, 0, 0, 1.0]] * 24, 0, "A's last row is 0 0 0 1")


def test_keypoints_do_not_depend_on_what_else_is_skinned():
    full = SMPL().double()
    inputs = torch.randn(4, 10).double().requires_grad_(), 0.5 * torch.randn(4, 72).double()
    a, b = full(*inputs), full(*inputs, vertices=False)
    for name in ("keypoints", "joints"):
        x, y = getattr(a, name), getattr(b, name)
        # the second body's rest joints are regressed, then rounded to float32: 0.1 micrometres
        close(x, y, 1e-6, f"{name} of the second body; its joints, too, are points of it")
        x, y = (torch.autograd.grad(out.sum(), inputs[0], retain_graph=True)[0] for out in (x, y))
        close(x, y, 1e-5, f"gradient of {name} to the betas: sums of some 60 such numbers")


def test_smpl_takes_poses_in_three_forms_and_refuses_others(body):
    betas, pose = torch.randn(2, 10), torch.randn(2, 72)
    forms = pose, pose.view(2, 24, 3), batch_rodrigues(pose.view(2, 24, 3))
    first, *others = (body(betas, form).vertices for form in forms)
    assert first.shape == (2, len(body.v_template), 3)
    assert all(torch.equal(first, other) for other in others), "one pose, three forms"
    for b, p, what in ((10, (2, 69), "pose"), (10, (3, 72), "pose"), (9, (2, 72), "betas")):
        with pytest.raises(ValueError, match=f"{what} must be"):
            body(torch.zeros(2, b), torch.zeros(p))


def test_the_skeletons_tables_agree():
    assert len(JOINT_NAMES) == len(PARENTS) == 24 and len(KEYPOINT_NAMES) == 19
    assert all(PARENTS[i] < i for i in range(24)), "parents come first"
    other = {"left": "right", "right": "left"}
    for names, flip in ((JOINT_NAMES, FLIP_JOINTS), (KEYPOINT_NAMES, FLIP_KEYPOINTS)):
        mirrored = tuple(re.sub("left|right", lambda m: other[m[0]], name) for name in names)
        assert mirrored == tuple(names[i] for i in flip), "each is swapped with its mirror image"


# ============================================================================================
# Sec. 3.4 and the slides: ResNet

def torchvisions(depth: int) -> nn.Module:
    """torchvision's network with random weights."""
    network = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):      # fresh statistics (0 and 1) would hide a mix-up
            m.running_mean.uniform_(-0.1, 0.1)
            m.running_var.uniform_(0.5, 1.5)
            m.weight.data.uniform_(0.5, 1.0)
            m.bias.data.uniform_(-0.1, 0.1)
    return network.eval()


def take_weights(ours: nn.Module, theirs: nn.Module) -> nn.Module:
    odd = sorted(ours.state_dict().keys() ^ theirs.state_dict().keys())
    assert not odd, f"a projection where stride or channels change, and only there: {odd[:2]}"
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval()


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_resnet_equals_torchvisions(depth):
    theirs = torchvisions(depth)
    ours, x = take_weights(ResNet(depth, num_classes=1000), theirs), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        a, b = ours(x), theirs(x)
    # same operations in the same order; 1e-5 leaves room for another convolution algorithm
    close((a - b).norm() / b.norm(), 0.0, 1e-5, "ReLU after the addition? stride on the 3x3?")


@pytest.mark.parametrize("depth, layer, i", [(18, 1, 0), (18, 2, 0), (50, 1, 0), (50, 1, 1),
                                             (50, 2, 0)])
def test_a_residual_block_equals_torchvisions(depth, layer, i):
    theirs = getattr(torchvisions(depth), f"layer{layer}")[i]
    kind, inputs = hmr.Bottleneck if depth == 50 else hmr.BasicBlock, theirs.conv1.in_channels
    ours = take_weights(kind(inputs, theirs.conv1.out_channels, theirs.stride, False), theirs)
    x = torch.randn(2, inputs, 8, 8)          # negative numbers, too: they tell where the ReLU is
    with torch.no_grad():
        close(call(ours, x), theirs(x), 1e-4, "y = F(x) + shortcut(x) and then the ReLU", {
            "v2's block, without a ReLU after it": ours.residual(x) + ours.downsample(x)})


def test_multiply_adds_are_the_slides():
    count = lambda network: hmr.count_multiply_adds(network) / 1e9
    with torch.device("meta"):
        for depth, slides in {18: 1.8, 34: 3.6, 50: 3.8, 101: 7.6, 152: 11.3}.items():        # 1e9
            got = count(hmr.move_strides_to_1x1(ResNet(depth, num_classes=1000)))
            assert abs(got / slides - 1) < 0.03, f"ResNet-{depth}: {got:.2f}e9, slides {slides}e9"
        assert abs(count(ResNet(50, num_classes=1000)) - 4.09) < 0.01, "torchvision's strides"


def test_a_residual_block_with_zero_weights_is_the_identity():
    x = torch.rand(2, 64, 8, 8)                               # a ReLU's output: non-negative
    for block in (hmr.BasicBlock(64, 64, 1, False), hmr.Bottleneck(64, 16, 1, False)):
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.weight)
        close(block.eval()(x), x, 0, "y = F(x) + x with F = 0 must be x; a plain block?")
        block.downsample = None
        close(block(x), 0 * x, 0, "a plain block has no shortcut")


def test_resnets_options():
    assert ResNet(50).feature_dim == 2048 and ResNet(18, width=32).feature_dim == 256
    assert ResNet(18, width=8)(torch.randn(1, 3, 64, 64)).shape == (1, 64), "one picture: (1, C)"
    plain = [n for n, _ in ResNet(34, plain=True).named_parameters() if "downsample" in n]
    assert not plain, "a plain network has no projections either"
    weight = ResNet(18).layer2[0].conv1.weight                        # (128, 64, 3, 3)
    close(weight.std() / math.sqrt(2 / (128 * 9)), 1.0, 0.02, "He: by the outputs (64 more inputs)")
    with pytest.raises(ValueError, match="18, 34, 50, 101, 152"):
        ResNet(20)


# ============================================================================================
# Sec. 3.2: iterative error feedback

def test_the_regressor_is_the_papers():
    regressor = Regressor(2048, torch.zeros(1, 85))
    assert sum(p.numel() for p in regressor.parameters()) == 3_321_941, "Theta-bar is a buffer"
    assert regressor.fc1.in_features == 2133, "[phi 2048 | Theta 85]"
    assert (regressor.iterations, regressor.dropout) == (3, 0.5), "T = 3 and half dropped out"
    bound = regressor.fc3.weight.abs().max().item()
    assert 0.0073 < bound <= 0.0073555, f"last layer within {bound:.4g}: xavier with gain 0.1"
    for layer in (regressor.fc1, regressor.fc2):
        assert within_xavier(layer.weight) and not layer.bias.any(), "Xavier, biases 0"


def within_xavier(weight: Tensor) -> bool:
    """Uniform within +- sqrt(6 / (inputs + outputs)), and reaching out that far."""
    return 0.5 < weight.abs().max() / math.sqrt(6 / sum(weight.shape)) <= 1


@pytest.mark.parametrize("T", [1, 3])
def test_the_regressor_equals_a_hand_written_loop(T):
    regressor = Regressor(7, torch.randn(1, 85), iterations=T, dropout=0.5).eval()
    feature, w = torch.randn(1, 7), {k: v.detach() for k, v in regressor.named_parameters()}
    theta = start = regressor.theta_bar.clone()
    got = call(regressor, feature)
    assert torch.equal(regressor.theta_bar, start), "Theta-bar was changed in place"
    assert torch.equal(got[-1], regressor(feature)[-1]), "dropout is on in eval mode"
    assert len(got) == T, f"{len(got)} Thetas, expected {T}: Theta_1 .. Theta_T without Theta_0"
    for t in range(T):
        x = torch.cat((feature, theta), 1)
        for i in (1, 2):
            x = (x @ w[f"fc{i}.weight"].T + w[f"fc{i}.bias"]).clamp(min=0)
        delta = x @ w["fc3.weight"].T + w["fc3.bias"]
        before, theta = theta, theta + delta
        close(got[t], theta, 1e-4, f"Theta_{t + 1}: a ReLU lost, features not first?", {
            f"Theta_{t}: Theta_0 is no result": before, "Theta-bar + DeltaTheta": start + delta})
    shapes = {tuple(x.shape) for x in regressor(torch.randn(3, 7))}
    assert shapes == {(3, 85)}, f"three features give (3, 85) each, not {shapes}"


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
    for t, theta in enumerate(golden_networks(golden)[0](golden["step_feature"])):
        # numbers up to 5, sums of 1,024 terms in another order, three times over: 5e-15 seen
        close(theta, golden["step_thetas"][t], 1e-12, f"Theta_{t + 1}: a ReLU lost (SPIN's), "
              "[Theta | phi] for [phi | Theta], or Theta-bar + Delta for Theta_t + Delta?")


def test_dropout_follows_both_hidden_layers_with_fresh_masks():
    """All hidden units are 1 and go straight through, so each Theta shows 85 of them."""
    regressor, p = Regressor(7, torch.zeros(1, 85), iterations=2, dropout=0.2).eval(), 0.2
    for w in regressor.parameters():
        nn.init.eye_(w) if w.ndim == 2 else nn.init.zeros_(w)
    nn.init.zeros_(regressor.fc1.weight), nn.init.ones_(regressor.fc1.bias)
    first, second = regressor(torch.randn(200, 7))                    # (200, 85) each
    close(second - first, torch.ones(200, 85), 1e-6, "dropout must be off in eval mode")
    first, second = regressor.train()(torch.randn(200, 7))
    # of 17,000 shares the standard deviation is below 0.004
    close((first != 0).float().mean(), (1 - p) ** 2, 0.016, "two hidden layers, two dropouts", {
        "no dropout at all": 1, "one dropout alone": 1 - p, "0.5 and not self.dropout": 0.25})
    kept = first[first != 0]
    close(kept, torch.full_like(kept, 1 / (1 - p) ** 2), 1e-5, "what is kept grows by 1 / (1 - p)")
    assert not torch.equal(first == 0, second == first), "each iteration draws fresh masks"
    nn.init.zeros_(regressor.fc2.weight), nn.init.ones_(regressor.fc2.bias)
    close((regressor(torch.randn(400, 7))[0] != 0).float().mean(), 1 - p, 0.009, "no dropout after "
          "the second hidden layer")                                  # of 34,000 shares: 0.0022


def test_gradients_run_through_all_iterations():
    regressor = Regressor(7, torch.zeros(1, 85), iterations=3).eval().double()
    feature = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    for t in range(3):
        assert gradcheck(lambda f: regressor(f)[t], (feature,)), \
            f"Theta_{t + 1}: not finite differences' gradient; Theta detached between iterations?"


def test_theta_bar_is_upright_average_and_fixed(golden):
    rest = [*range(3, 72), *[0] * 10]                                 # and the mean root: 0, 1, 2
    theta = call(hmr.mean_theta, torch.arange(72.0))
    close(theta, [[0.9, 0, 0, math.pi, 0, 0, *rest]], 1e-6, "[0.9, 0, 0 | Rx(pi), mean pose | 0]", {
        "upside down, without the half turn": [[0.9, 0, 0, 0, 0, 0, *rest]],
        "a root of which one number is set": [[0.9, 0, 0, math.pi, 1, 2, *rest]]})
    assert not theta.requires_grad, "Theta-bar is no parameter"
    close(hmr.mean_theta(golden["step_mean_pose"]), golden["step_theta_bar"], 1e-6,
          "not the official code's (and float32's pi is off by 9e-8)")


def test_theta_bar_in_6d_is_the_same_body(monkeypatch):
    monkeypatch.setattr(hmr, "batch_rodrigues", rotmats_of)
    pose = torch.randn(24, 3)
    theta = call(hmr.mean_theta, pose.flatten(), "6d")
    assert theta.shape == (1, 157), f"{tuple(theta.shape)}, expected (1, 157): 3 + 24 * 6 + 10"
    pose[0] = math.pi * torch.eye(3)[0]
    R = rotmats_of(pose)
    close(rot6d_to_rotmat(theta[0, 3:147].view(24, 6)), R, 1e-6, "6D: not the same 24 rotations", {
        "one column after the other, 4D-Humans' layout": rot6d_to_rotmat(R[..., :2].mT.flatten(1))})


@pytest.mark.parametrize("rotation, dim", [("axis-angle", 85), ("6d", 157)])
def test_the_whole_network(body, rotation, dim):
    model = HMR(body, depth=18, iterations=2, width=8, rotation=rotation)
    thetas, out = model(torch.rand(3, 3, 64, 64))
    assert [t.shape for t in thetas] == [(3, dim)] * 2, "one (B, 85) an iteration"
    assert [None if x is None else tuple(x.shape) for x in out] == [
        (3, 24, 3, 3), (3, 10), (3, 3), (3, 24, 3), (3, 19, 3), (3, 19, 2), None]
    out.keypoints2d.sum().backward()
    assert model.encoder.conv1.weight.grad.abs().sum() > 0, "end to end: pixels must get gradients"
    assert model.decode(thetas[0], vertices=True).vertices.shape == (3, len(body.v_template), 3)


def test_the_encoder_sees_imagenets_scale_and_the_last_theta_is_decoded(body):
    model, seen = HMR(body, depth=18, width=8).eval(), []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    thetas, out = model((mean + std * torch.eye(32))[None])
    close(seen[0], torch.eye(32).expand(1, 3, 32, 32), 1e-5, "not (x - mean) / std; BGR?")
    close(out.cam, thetas[-1][:, :3], 0, "the LAST Theta is decoded, not the first")
    assert not torch.equal(thetas[0], thetas[-1])


def test_batch_norm_averages_as_the_header_says():
    for depth, count in ((18, 20), (50, 53)):
        norms = [(m.momentum, m.eps) for m in ResNet(depth).modules() if hasattr(m, "momentum")]
        assert norms == [(0.1, 1e-5)] * count, f"ResNet-{depth}: momentum 0.1, not the code's 0.003"


def test_mixed_precision_stays_in_the_encoder(body):
    model, images = HMR(body, depth=18, width=16).eval(), torch.rand(2, 3, 64, 64)
    exact, model.amp = model(images)[0][-1], torch.bfloat16
    thetas, out = model(images)
    assert thetas[-1].dtype == out.keypoints3d.dtype == torch.float32, "SMPL and losses in float32"
    # bf16 has 8 bits: some percent through 18 layers
    close((thetas[-1] - exact).norm() / (exact - model.regressor.theta_bar).norm(), 0.0, 0.05,
          "the encoder in bf16 must give nearly the same answer")


def test_projection_is_the_official_codes(golden):
    cam, X = torch.tensor([[2.0, 0.1, -0.2]]), torch.tensor([[[0.3, 0.4, 9.0]]])
    close(call(hmr.project, X, cam), [[[0.8, 0.4]]], 1e-6, "s (X + t) = 2 (.3 + .1), 2 (.4 - .2)", {
        "the paper's s X + t, and the official code's t is in metres": [[[0.7, 0.6]]]})
    close(hmr.project(golden["out_body_keypoints"], golden["cam"]), golden["out_projected"], 1e-13,
          "s (X + t); cam is [s, tx, ty]")
    assert gradcheck(hmr.project, (torch.randn(2, 4, 3).double().requires_grad_(),
                                   torch.randn(2, 3).double().requires_grad_())), GRADIENT


# ============================================================================================
# Sec. 3.2, Eqs. (1) and (3) to (6): the losses

def test_reprojection_loss():
    pred, target = torch.randn(3, 19, 2).double(), torch.randn(3, 19, 2).double()
    v, total = (torch.rand(3, 19) < 0.6).double(), 0.0
    for n, k, c in itertools.product(range(3), range(19), range(2)):
        total += abs(float(pred[n, k, c] - target[n, k, c])) * v[n, k].item()
    mean = total / (2 * v.sum().item())
    close(call(hmr.keypoint_loss, pred, target, v), mean, 1e-12,
          "L1 (not squared), mean over the visible coordinates of the whole batch (not per image)",
          {"a mean over all numbers, as SPIN's": total / (3 * 19 * 2),
           "a mean over keypoints, and each has two coordinates": 2 * mean})
    close(hmr.keypoint_loss(pred, target, v * torch.linspace(0.5, 1, 19)), mean, 1e-12,
          "v is a mask: 0.5 counts as 1, as in TensorFlow, and weighs nothing")
    assert gradcheck(lambda p: hmr.keypoint_loss(p, target, v), (pred.requires_grad_(),)), GRADIENT
    x, mask = torch.randn(4, 7).double(), torch.tensor([[1.0], [0], [1], [0]]).double()
    close(call(hmr.masked_mean, x, mask, torch.square), x[::2].square().sum() / 14, 1e-12,
          "masked_mean: of any penalty, over the numbers whose mask is not 0")


def test_3d_joint_loss():
    pred, target = torch.randn(3, 19, 3).double(), torch.randn(3, 19, 3).double()
    has, total = torch.tensor([1.0, 0, 1]).double()[:, None].expand(3, 19), 0.0
    for n, k, c in itertools.product((0, 2), range(14), range(3)):
        hips = [float((x[n, 2, c] + x[n, 3, c]) / 2) for x in (pred, target)]
        total += float(pred[n, k, c] - hips[0] - target[n, k, c] + hips[1]) ** 2
    close(call(hmr.joints3d_loss, pred, target, has), 0.5 * total / (2 * 42), 1e-12,
          "0.5 * mean over labelled samples x 14 x 3, both centred at the hips' midpoint", {
              "not centred": 0.5 * (pred - target)[::2, :14].square().mean()})
    faces = target.clone()
    faces[:, 14:] += 1
    close(hmr.joints3d_loss(faces, target, has), 0.0, 0, "the five face points have no 3D label")
    # H3.6M and 3DHP have no top of the head
    headless, knee = has * (torch.arange(19) != 13), 0.1 * (torch.arange(19) == 1)[:, None]
    close(hmr.joints3d_loss(target + knee, target, headless), 0.5 * 0.1 ** 2 / 13, 1e-9,
          "the denominator counts the labelled numbers: 13 keypoints, not 14")
    loss = lambda p: hmr.joints3d_loss(p, target, has)
    assert gradcheck(loss, (pred.requires_grad_(),)), GRADIENT
    for hip, name in ((2, "right"), (3, "left")):
        lacks = torch.ones(3, 19).double()
        lacks[1, hip] = 0
        close(hmr.joints3d_loss(pred, target, lacks), loss(pred), 1e-12, f"body 2 lacks its {name} "
              "hip and so a centre: none of its keypoints is a label")


def test_smpl_parameter_loss():
    R, S = (rotmats_of(torch.randn(3, 24, 3).double()) for _ in range(2))
    a, b = torch.randn(3, 10).double(), torch.randn(3, 10).double()
    has = torch.tensor([0.0, 1, 1]).double()
    total = sum(float((R[n] - S[n]).square().sum() + (a[n] - b[n]).square().sum()) for n in (1, 2))
    close(call(hmr.smpl_loss, R, a, S, b, has), 0.5 * total / (2 * 226), 1e-12,
          "0.5 * ONE mean over labelled samples x (24 * 9 + 10), the root's rotation included")
    upright = math.pi * (torch.arange(72) == 0).double().view(1, 24, 3)
    same = hmr.smpl_loss(rotmats_of(upright), a[:1], rotmats_of(-upright), a[:1], has[1:2])
    close(same, 0.0, 1e-12, "Rx(pi) and Rx(-pi) are one rotation: compare matrices, not vectors")
    assert gradcheck(lambda r, x: hmr.smpl_loss(r, x, S, b, has), (R.requires_grad_(),
                     a.requires_grad_()), fast_mode=True), GRADIENT


# what each loss compares, of a batch of two; and the function
LOSSES = {"L_kp": ([(2, 19, 2)], "keypoint_loss"), "L_joints": ([(2, 19, 3)], "joints3d_loss"),
          "L_smpl": ([(2, 24, 3, 3), (2, 10)], "smpl_loss")}
each_loss = pytest.mark.parametrize("loss", LOSSES)


@each_loss
def test_the_losses_are_the_official_codes(golden, loss):
    parts = lambda x: (golden[x][:, :216].view(4, 24, 3, 3), golden[x][:, 216:])
    kp, has = golden["step_kp"], golden["step_has_joints"][:, None].expand(4, 14)
    inputs = {"L_kp": (golden["loss_kp_pred"], kp[..., :2], kp[..., 2]),
              "L_joints": (golden["loss_joints_pred"], golden["step_joints"], has),
              "L_smpl": (*parts("loss_params_pred"), *parts("loss_params_true"),
                         golden["step_has_smpl"])}[loss]
    # float64: only the order of the sums differs
    close(getattr(hmr, LOSSES[loss][1])(*inputs), golden[f"out_loss_{loss[2:]}"], 1e-13,
          "a factor of 0.5, a denominator, the centre at the hips, the root's rotation?")


@each_loss
def test_what_a_mask_hides_may_be_anything(loss):
    shapes, name = LOSSES[loss]
    pred, target = ([torch.randn(shape, requires_grad=True) for shape in shapes] for _ in "pt")
    seen, results = torch.ones(2) if loss == "L_smpl" else torch.ones(2, 19), []
    seen[1] = 0                                                       # the second body is hidden,
    if loss != "L_smpl":
        seen[0, 13] = 0                                               # and one more keypoint
    for hidden in (0.0, math.nan, math.inf, 1e30):
        labels = [x.detach().clone() for x in target]
        for x in labels:
            x[seen == 0] = hidden
        L = getattr(hmr, name)(*pred, *labels, seen)
        results.append((L, *torch.autograd.grad(L, pred)))
        for known, got in zip(results[0], results[-1]):
            assert torch.equal(known, got), f"a hidden {hidden} counts: mask before the penalty"


@each_loss
def test_nothing_labelled_costs_nothing_and_gives_no_nan(loss):
    shapes, name = LOSSES[loss]
    pred = [torch.randn(shape, requires_grad=True) for shape in shapes]
    none = torch.zeros(2, 19)[:, 0 if loss == "L_smpl" else ...]
    L = getattr(hmr, name)(*pred, *map(torch.randn, shapes), none)
    assert L == 0, f"{L.item()}: the mean of nothing must be 0"
    assert all((g == 0).all() for g in torch.autograd.grad(L, pred)), "no label, no gradient"


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


def test_the_23_joint_heads_are_23_separate_linears():
    D, heads = Discriminator(), [nn.Linear(32, 1) for _ in range(23)]
    with torch.no_grad():
        for j, head in enumerate(heads):
            head.weight.copy_(D.joint_weight[j:j + 1])
            head.bias.copy_(D.joint_bias[j:j + 1])

    def by_hand(R, betas, relu=torch.relu):
        first = torch.relu(D.embed1(R.reshape(5, 23, 9)))
        embed = relu(D.embed2(first))                                 # shared by all joints
        joints = [head(embed[:, j]) for j, head in enumerate(heads)]
        together = D.all3(D.all2(D.all1(embed.reshape(5, 736)).relu()).relu())
        return torch.cat([*joints, together, D.shape3(D.shape2(D.shape1(betas).relu()).relu())], 1)
    R, betas = torch.randn(5, 23, 3, 3), torch.randn(5, 10)
    expected = by_hand(R, betas)
    close(call(D, R, betas), expected, 1e-5, "order: [joints | all | shape]; heads mixed?", {
        "D with a sigmoid, and its outputs are linear": expected.sigmoid(),
        "D on R - I, and it sees R": by_hand(R - torch.eye(3), betas),
        "D on the transposed rotations": by_hand(R.mT, betas),
        "pytorch_HMR's embedding, a ReLU is lost": by_hand(R, betas, relu=lambda x: x),
        "[joints | shape | all], 4D-Humans' order": expected[:, [*range(23), 24, 23]]})


def test_ds_25_outputs_are_the_official_codes(golden):
    _, pose, betas = hmr.split_theta(golden["step_thetas"].flatten(0, 1))         # Theta_1 first
    real, fake = golden["motion"], (rotmats_of(pose.view(12, 24, 3))[:, 1:], betas)
    got = golden_networks(golden)[1](*(torch.cat(parts) for parts in zip(real, fake)))
    # hmr's rotations are off by 2e-8, which the steepest head makes 3e-8
    close(got, golden["step_D_outputs"], 1e-7, "[23 joints | all | shape]; a ReLU lost, the "
          "embedding not joint by joint, R - I for R, or R transposed?")


def test_adversarial_losses():
    for value, encoder, both in ((0.0, 25.0, 25.0), (0.5, 6.25, 12.5), (1.0, 0.0, 25.0)):
        scores = torch.full((6, 25), value)
        close(call(hmr.encoder_adversarial_loss, scores), encoder, 1e-6, "L_adv(E): the target is "
              "1; a SUM over 25, a MEAN over B*T")
        close(call(hmr.discriminator_loss, scores, scores), both, 1e-6,
              "Eq. (8): real -> 1, fake -> 0; both terms added, a SUM over 25")
    scores = torch.randn(4, 25).double().requires_grad_()
    assert gradcheck(hmr.encoder_adversarial_loss, (scores,)), GRADIENT
    assert gradcheck(hmr.discriminator_loss, (scores.detach() + 1, scores)), GRADIENT


def test_real_is_pulled_to_1_and_fake_to_0():
    real, fake = torch.ones(6, 25), torch.zeros(6, 25)
    close(hmr.discriminator_loss(real, fake), 0.0, 0, "real and fake swapped: D would hate mocap")
    close(hmr.discriminator_loss(fake, real), 50.0, 0, "(0 - 1)^2 + 1^2 for each of 25")


# ============================================================================================
# Sec. 3.3 and 4: motion, pictures

def tiny(out: Path, **changes) -> train.Config:
    """A network and world small enough for tests; no GPU, whatever the machine has."""
    settings = dict(depth=18, width=8, size=32, batch=4, steps=6, look="plain",
                    upright=True, pretrained="none", lr=1e-3, device="cpu", out=str(out),
                    log_every=2, picture_every=100, eval_pictures=4, amp="off")
    return train.Config(**{**settings, **changes})


def test_mocap_is_split_by_clip():
    with np.load(data.MOCAP, allow_pickle=False) as file:
        clips = list(file.values())
    assert len(clips) == 15 and all(c.shape[1:] == (72,) and np.isfinite(c).all() for c in clips)
    assert sorted(data.HELD_OUT) == ["dance_b", "kick", "roll"], "these three are never trained on"
    parts = [len(data.load_mocap(False, held_out)) for held_out in (False, True)]
    assert sum(parts) == 1620, f"{parts} frames to train on and held out: some of the 1620 in both"
    for upright in (True, False):
        seen, unseen = (data.load_mocap(upright, held_out) for held_out in (False, True))
        distance = torch.cdist(unseen[:, 1:].flatten(1), seen[:, 1:].flatten(1)).min()
        assert distance > 1e-3, "a held-out frame is in the training set"


def test_a_validation_clip_is_neither_trained_on_nor_are_the_held_out_ones_opened():
    for upright in (True, False):
        everything, held_out = data.load_clips(upright, False), data.load_clips(upright, True)
        assert set(held_out) == set(data.HELD_OUT) - ({"roll"} if upright else set())
        assert set(data.load_clips(upright, False, "jump")) == set(everything) - {"jump"}
        assert set(data.load_clips(upright, True, "jump")) == {"jump"} and "jump" in everything
    up = batch_rodrigues(data.load_clips(True, False)["spin"][:, 0])[:, 1, 1]     # (67,)
    assert len(up) == 67 and up.min() > 0.7, "--upright leaves out spin's flight, 40 frames"
    for name in ("kick", "nobody"):
        with pytest.raises(ValueError, match=f"--validate {name}: expected one of walk, run"):
            data.load_clips(True, False, name)


def test_a_mirrored_pose_is_the_mirrored_body(golden):
    """M R(r) M = R(r * (1, -1, -1)) with M = diag(-1, 1, 1), sides swapped, the root included."""
    pose, M = torch.randn(2, 24, 3).double(), torch.diag(torch.tensor([-1.0, 1, 1])).double()
    R = rotmats_of(pose)
    close(rotmats_of(call(data.mirror_pose, pose)), M @ R[:, list(FLIP_JOINTS)] @ M, 1e-12,
          "swap sides AND flip y, z of every vector, of the root's, too", {
              "left and right not swapped": M @ R @ M})
    close(data.mirror_pose(golden["body_pose"].view(3, 24, 3)).flatten(1),
          golden["out_pose_mirrored"], 0, "not the official code's: it mirrors the root, too")


def test_pictures_and_the_pool_are_drawn_alike_and_the_pool_is_fresh(body, monkeypatch):
    drawn, world = [], data.SyntheticPeople(body, data.load_mocap(True, False), 8, 4, labels="all")
    for name in ("poses", "betas"):
        draw = getattr(world, name)
        monkeypatch.setattr(world, name, lambda n, rng, name=name, draw=draw:
                            drawn.append(name) or draw(n, rng))
    (pool, betas), (later, other) = world.motion(8, 0), world.motion(8, 1)
    batch = world.batch(0)
    assert drawn == ["poses", "betas"] * 3, "drawn alike, else D learns to reject true labels"
    assert not torch.equal(pool, later) and not torch.equal(betas, other), "D's pool must go on"
    assert not torch.equal(pool, batch.rotmats[:, 1:]), "the draws must be independent"


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


def test_rendering_uses_exactly_the_camera_of_the_loss(body, monkeypatch):
    """The labels' camera draws the picture, whose silhouette holds all that is projected."""
    drawn, render = [], data.render
    monkeypatch.setattr(data, "render", lambda vertices, faces, cam, *rest:
                        drawn.append(cam) or render(vertices, faces, cam, *rest))
    world = data.SyntheticPeople(body, data.load_mocap(True, False), 8, 16, labels="all")
    batch = world.batch(3)
    out = body(batch.betas, batch.rotmats)
    close(drawn[0], batch.cam, 0, "the picture's camera is the labels', shift included")
    close(batch.keypoints2d, hmr.project(out.keypoints, batch.cam), 0, "labels and picture differ")
    black, white = torch.zeros(8, 3, 256, 256), torch.ones(len(body.faces), 3)
    seen = [(m[0] > 0).nonzero() + 0.5 for m in render(out.vertices, body.faces, batch.cam, 256,
                                                       white, black)]             # rows, columns
    points = 128 * (hmr.project(out.vertices, batch.cam) + 1)                     # (B, V, 2)
    for name, f in (("from", torch.amin), ("to", torch.amax)):
        edges = torch.stack([f(yx, 0).flip(0) for yx in seen])        # (B, 2) x, y
        # the median of 8: a hand seen edge-on may pass between the centres of two pixels
        close((edges - f(points, 1)).median(0).values, [0, 0], 1,
              f"silhouettes, {name}: tx, ty, or an axis mirrored?")


def test_a_tilted_face_is_lit_from_its_side():
    """Lambert by hand: a square that looks at us and down, half each (y is down)."""
    square = torch.tensor([[[-1.0, -1, -1], [-1, 1, 1], [1, 1, 1], [1, -1, -1]]])
    for light, cosine in (((0.0, 1, 0), 0.5 ** 0.5), ((0, 0, -1.0), 0.5 ** 0.5), ((0, -1.0, 0), 0)):
        image = data.render(square, torch.tensor([[0, 1, 2], [0, 2, 3]]), torch.eye(3)[:1], 4,
                            torch.ones(2, 3), torch.zeros(1, 3, 4, 4), torch.tensor([light]))
        close(image, torch.full((1, 3, 4, 4), 0.35 + 0.65 * cosine), 1e-6, f"light from {light}: a "
              "normal whose y points up, or into the body?")


def test_a_lying_person_lies_under_any_heading(body):
    """The camera turns the whole recorded person: R_camera @ R_recorded, not the reverse."""
    frames = data.load_mocap(upright=False, held_out=True)
    up = batch_rodrigues(frames[:, 0])[:, 1, 1]                       # (M,) 1 = the head is up
    lying = up.abs().argmin()
    world = data.SyntheticPeople(body, frames[lying:lying + 1], 64, 4, labels="all", mix=False)
    axis = world.batch(0).rotmats[:, 0, :, 1]                         # (B, 3) where the head points
    # the camera tilts by 5 degrees (one standard deviation), four of which are 0.35
    close(axis[:, 1], -up[lying].expand(64), 0.35, "the angle to the vertical is the recorded")
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
    blind, root = batch.has_smpl == 0, batch.rotmats[batch.has_smpl > 0, 0]
    assert not (batch.rotmats[blind].any() or batch.keypoints3d[blind].any()), "hidden labels are 0"
    assert not batch.keypoints2d[batch.visible == 0].any(), "and so are hidden points"
    assert batch.keypoints2d[~blind].abs().max() < 1.2, "the crop holds the person"
    assert (root[:, 2, 2] > 0.5).any() and (root[:, 2, 2] < -0.5).any(), "chests point anywhere"
    assert -root[:, 1, 1].median() > 0.8, "people stand upright in a camera whose y points down"


# ============================================================================================
# Sec. 4.1: the measures

@pytest.mark.parametrize("B, N", [(1, 14), (2, 14), (3, 14), (3, 3), (1, 3), (2, 24)])
def test_procrustes_undoes_any_similarity(B, N):
    target = torch.randn(B, N, 3).double()
    R = torch.from_numpy(Rotation.random(B, random_state=1).as_matrix())
    scale, shift = torch.rand(B, 1, 1).double() + 0.5, torch.randn(B, 1, 3).double()
    source = scale * target @ R.mT + shift
    close(call(train.compute_similarity_transform, source, target), target, 1e-10,
          f"B = {B}, N = {N}: each body has its own scale, rotation and shift")


def test_procrustes_does_not_reflect_and_is_the_best(golden):
    target = torch.randn(10, 14, 3).double()
    source = target * torch.tensor([-1.0, 1, 1])
    source[:5] = torch.randn(5, 14, 3)
    a, t = train.compute_similarity_transform(source, target), target - target.mean(1)[:, None]
    assert (a - target)[5:].norm(dim=-1).mean() > 0.1, "a mirrored body is wrong: det must be +1"
    best, a = (a - target).square().sum((1, 2)), a - a.mean(1)[:, None]
    for turn in 0.05 * torch.randn(20, 3).double():                   # no small turn is better
        moved = (a @ rotmats_of(turn) - t).square().sum((1, 2))
        assert (moved >= best - 1e-9).all(), "the rotation is not the best"
    # nor is another scale: d/ds |t - s a|^2 = 0 at s = 1
    close(((t - a) * a).sum((1, 2)), torch.zeros(10), 1e-10, "the scale needs the flipped sign too")
    p, t = golden["eval_pred"], golden["eval_true"]
    mm = 1000 * (train.compute_similarity_transform(p, t) - t).norm(dim=-1).mean(1)
    # float64's rounding of errors up to 1,218 mm; an SVD's is some times that
    close(mm, golden["out_eval_pa"], 1e-9, "not the official code's PA-MPJPE")


def true_bodies(body: SMPL, n: int) -> hmr.HMROutput:
    batch = data.SyntheticPeople(body, data.load_mocap(True, True), n, 8, labels="all").batch(0)
    return HMR(body, 18, width=8).body(batch.cam, batch.rotmats, batch.betas)


def test_the_measures_on_a_known_error(body):
    true = true_bodies(body, 3)
    measure = lambda **wrong: train.summarize([train.pose_errors(true._replace(**wrong), true)])
    perfect, wrist = measure(), true.keypoints3d.clone()
    moved = measure(keypoints3d=true.keypoints3d + 5, vertices=true.vertices + 5,
                    keypoints2d=true.keypoints2d + torch.tensor([0.03, 0.04]))
    wrist[:, 6, 0] += 0.16                                            # one of 14 joints by 160 mm
    off = measure(keypoints3d=wrist)
    close([moved["mpjpe"], moved["pve"]], [0, 0], 1e-2, "each body is centred at its own hips")
    close(moved["px"], 5.6, 1e-3, "0.05 of [-1, 1] is 5.6 pixels of 224")
    close([perfect["px"], perfect["pck"], perfect["auc"]], [0, 100, 100 * 30 / 31], 1e-9,
          "px, PCK, AUC of a perfect body: 0 mm is not below the threshold 0")
    close([off["mpjpe"], off["pck"], off["auc"]], [160 / 14, 1300 / 14, 1300 / 14 * 30 / 31], 1e-3,
          "MPJPE, PCK, AUC: a mean over 14 joints, of which one is beyond 150 mm")
    for degrees, turned in ((61, 0), (89, 0), (91, 100)):
        turn = rotmats_of(torch.tensor([0, math.radians(degrees), 0]))
        close(measure(rotmats=turn @ true.rotmats)["turned"], turned, 0,
              f"{degrees} degrees: turned is more than 90")


def test_errors_are_centred_at_the_hips_and_the_thresholds_are_3dhps(body):
    true = true_bodies(body, 2)
    ankle = true.keypoints3d.clone()
    ankle[:, 0, 0] += 0.1                                             # keypoint 0 = right ankle
    errors = train.pose_errors(true._replace(keypoints3d=ankle), true)
    close(errors["mpjpe"], [[100.0] + [0] * 13] * 2, 1e-2, "only the ankle is off: centre at hips")
    for mm, n in ((0.0, 30), (2.5, 30), (5.0, 29), (72.5, 16), (149.9, 1), (150.0, 0)):
        result = train.summarize([{"mpjpe": torch.full((1, 14), mm)}])
        close(result["auc"], 100 * n / 31, 1e-4, f"{mm} mm is below {n} of the 31: 0, 5 .. 150")
        assert result["pck"] == (100 if n else 0), f"{mm} mm, PCK: strictly below 150 counts"


def test_the_measures_are_the_official_codes(golden):
    """MPJPE of each of 40 bodies as hmr has it, PCK and AUC as MPI-INF-3DHP."""
    pred, true = (hmr.HMROutput(torch.zeros(40, 24, 3, 3), *[None] * 3, golden[f"eval_{which}"],
                                torch.zeros(40, 19, 2), torch.zeros(40, 1, 3).double())
                  for which in ("pred", "true"))
    errors = train.pose_errors(pred, true)
    close(errors["mpjpe"].mean(1), golden["out_eval_mpjpe"], 1e-9, "mm: centred at the pelvis?")
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
    config, guess = tiny(Path("x")), torch.tensor([[1.3, 0.2, -0.1]])
    monkeypatch.setattr(train, "mean_camera", lambda *_: guess)
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


def test_evaluation_takes_each_thing_from_its_source(body, monkeypatch):
    worlds, shown, World = [], [], data.SyntheticPeople

    class Watched(World):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            worlds.append((len(self.frames) // 2, self.size, self.look, self.crop, self.seed,
                           self.mix, self.labels))
    monkeypatch.setattr(train, "SyntheticPeople", Watched)

    def D(rotmats, betas):
        shown.append(betas)
        return torch.full((len(betas), 25), float(len(betas)))
    model, config = HMR(body, depth=18, width=8), tiny(
        Path("x"), look="hard", crop="tight", seed=3, validate="jump")
    heads, fixed = train.evaluate(model, config, D)["heads"], train.EVALUATION_SEED
    seen, unseen = (len(data.load_mocap(True, measured, "jump")) for measured in (False, True))
    camera, pictures, motion = worlds
    assert (camera[0], *camera[3:5]) == (seen, "tight", fixed), \
        f"{camera}: the mean camera is the training clips', in this crop, whatever --seed says"
    assert pictures == (unseen, 32, "hard", "tight", fixed, False, "all"), \
        f"{pictures}: the measured clip's recorded frames as they are, in the run's look and crop"
    assert (motion[0], *motion[4:6]) == (seen, 3, True), \
        f"{motion}: D is shown the training clips' motion, mixed as in training"
    image = next(train.evaluation_pictures(config, body)).image
    close(shown[0], model(image)[0][-1][:, -10:], 1e-6, "D judges Theta_T, the last one")
    assert heads == {"real": [2048.0] * 25, "fake": [4.0] * 25}, "2048 of motion, 4 predicted"
    later = train.training_world(config, body).motion(2048, config.steps)[1]
    close(shown[1], later, 0, "D is shown motion that it has not seen, so of no step of training")
    recorded = train.recorded_rotations(config, "cpu")
    assert len(recorded) == 2 * seen, "outside, mocap: compared with the training clips' rotations"
    many = train.evaluation_pictures(tiny(Path("x"), eval_pictures=66), body)
    assert [len(batch.image) for batch in many] == [64, 2], "as many as asked for"


# ============================================================================================
# Sec. 3.4: training

class OneNumber(nn.Module):
    """A stand-in for a network that has one weight; it answers f(weight, inputs)."""

    def __init__(self, weight: float, f):
        super().__init__()
        self.weight, self.f = nn.Parameter(torch.tensor(weight, dtype=torch.float64)), f

    def forward(self, *inputs, **named):
        return self.f(self.weight, *inputs, **named)


def predict(w, images):
    """For HMR: of two pictures, all betas of Theta_t are w t, one ankle is at w, the root turns."""
    sixd = torch.tensor([1.0, 0, 0, -1, 0, 0] + [1.0, 0, 0, 1, 0, 0] * 23).double().expand(2, 144)
    thetas = [torch.cat([0 * w.expand(2, 3), sixd, t * w.expand(2, 10)], 1) for t in (1, 2, 3)]
    ankle = (w * (torch.arange(19) == 0)[:, None]).expand(2, 19, 1)
    return thetas, hmr.HMROutput(torch.eye(3).double().expand(2, 24, 3, 3), thetas[2][:, -10:],
                                 thetas[2][:, :3], None, ankle.expand(2, 19, 3),
                                 ankle.expand(2, 19, 2), None)


def judge(d, rotmats, betas):
    """For the 25 discriminators: all say d * (sum of the betas), if they are not shown the root."""
    assert rotmats.shape[1:] == (23, 3, 3), f"D sees 23 joints, not {tuple(rotmats.shape)}"
    return d * (betas.sum(1) + (rotmats[:, :, 1, 1] - 1).sum(1))[:, None].expand(-1, 25)


LOSSES_OF_STAND_INS = {      # the five losses, for bodies whose hips are at 0
    "keypoint_loss": lambda p, t, v: (p - t).abs()[v > 0].mean(),
    "joints3d_loss": lambda p, t, has: 0.5 * ((p - t)[:, :14] ** 2)[has[:, :14] > 0].mean(),
    "smpl_loss": lambda r, b, R, B, has: 0.5 * torch.cat(
        [(r - R).flatten(1), b - B], 1)[has > 0].square().mean(),
    "encoder_adversarial_loss": lambda fake: 25 * ((fake - 1) ** 2).mean(),
    "discriminator_loss": lambda real, fake: 25 * (((real - 1) ** 2).mean() + (fake ** 2).mean())}


def one_step(monkeypatch, adv: bool = True) -> tuple[dict, dict]:
    """A train_step of the stand-ins -> what it leaves and logs; what it should, worked by hand."""
    for name, loss in LOSSES_OF_STAND_INS.items():
        monkeypatch.setattr(train, name, loss)
    w, d, zero, eye = 0.1, 0.4, torch.zeros(2, 19, 3).double(), torch.eye(3).double()
    one, first = zero[..., 0] + 1, torch.tensor([1.0, 0]).double()    # picture 2 has no SMPL label
    batch = data.Batch(torch.zeros(2, 3, 8, 8), zero[..., :2], one * (torch.arange(19) < 2), zero,
                       eye.expand(2, 24, 3, 3), zero[:, :10, 0] + 50 * (1 - first)[:, None], one,
                       first, zero[:, 0])
    motion = (eye.expand(6, 23, 3, 3), one.new_full((6, 10), 0.1)) if adv else None
    E, D = OneNumber(w, predict), OneNumber(d, judge)
    E.weight.grad, D.weight.grad = one[0, 0] * 9, one[0, 0] * 9       # left by earlier steps
    players = [torch.optim.SGD(net.parameters(), rate) for net, rate in ((E, 0.01), (D, 0.001))]
    weights = dict(weight_kp=2.0, weight_joints=3.0, weight_smpl=5.0, weight_adv=7.0)
    try:
        logged = train.train_step(E, D, *players, batch, motion, train.Config(adv=adv, **weights))
    except RuntimeError as error:
        assert "second time" not in str(error), "D's step reached E: detach the fakes"
        raise
    x = np.array([1.0, 2, 3]) if adv else np.zeros(3)     # the fakes' sums of betas; the real's: 1
    grad_D = 25 * (2 * (d - 1) + 2 * d * (x ** 2).mean()) if adv else 9.0
    later = d - 0.001 * grad_D if adv else d
    grad_E = 2 / 2 + 3 * w / 14 + 5 * 90 * w / 226 + 7 * 25 * (
        2 * (later * x - 1) * later * x / w).mean()
    expected = dict(
        L_kp=w / 2, L_joints=w ** 2 / 28, L_smpl=45 * w ** 2 / 226, abs_beta=2 * w, D=later,
        L_adv=25 * ((later * x - 1) ** 2).mean() * adv, D_real=d * adv, D_fake=d * x.mean(),
        loss_D=25 * ((d - 1) ** 2 + ((d * x) ** 2).mean()) * adv, E=w - 0.01 * grad_E)
    expected["loss_E"] = sum(a * expected[key.replace("weight", "L")] for key, a in weights.items())
    got = train.Losses(*logged)._asdict() | dict(E=E.weight, D=D.weight, grad_E=E.weight.grad,
                                                 grad_D=D.weight.grad)
    return got, expected | dict(grad_E=grad_E, grad_D=grad_D)


def test_a_step_moves_d_by_eq_8(monkeypatch):
    got, expected = one_step(monkeypatch)
    for name in ("D_real", "D_fake", "loss_D", "D"):
        close(got[name], expected[name], 1e-9, f"{name}: all three Thetas, joints 1 to 23; real to "
              "1, fake to 0; old gradients zeroed; D moves once, by Eq. (8) alone")


def test_a_step_moves_e_by_eq_1(monkeypatch):
    got, expected = one_step(monkeypatch)
    for name, how in (("L_kp", "of Theta_3, by visible"), ("L_joints", "of Theta_3, by has_3d"),
                      ("L_smpl", "of Theta_3, by has_smpl"), ("abs_beta", "of all three Thetas"),
                      ("L_adv", "of all three Thetas, by D after its step"),
                      ("loss_E", "each loss has its own weight"),
                      ("E", "its weight: old gradients not zeroed, or a detach?")):
        close(got[name], expected[name], 1e-9, f"{name}: {how}")
    assert not any(x.requires_grad for x in list(got.values())[:9]), "what is logged is detached"


def test_gradients_do_not_leak_between_encoder_and_discriminators(monkeypatch):
    got, expected = one_step(monkeypatch)
    close(got["grad_E"], expected["grad_E"], 1e-9, "E's .grad: D's step left some? another loss?")
    if got["grad_D"] is not None:
        close(got["grad_D"], expected["grad_D"], 1e-9, "D's .grad: E's step left some; freeze D")
    assert got["D"].requires_grad, "D is still held fixed after the step"


def test_without_an_adversary_d_is_left_alone(monkeypatch):
    got, expected = one_step(monkeypatch, adv=False)
    for name in ("D", "D_real", "D_fake", "loss_D", "L_adv"):
        close(got[name], expected[name], 0, f"{name}: D changed or was asked without an adversary")
    close(got["E"], expected["E"], 1e-9, "E's weight: lambda (L_reproj + L_3D) alone")


def test_the_loop_gives_every_loss_and_optimiser_its_own(monkeypatch, tmp_path):
    """Two real steps of the loop, watched: what train_step is given, and what it logs."""
    seen, judged, take_step, forward = [], [], train.train_step, Discriminator.forward

    def watched(E, D, opt_E, opt_D, batch, motion, config):
        judged.append(0)
        losses = take_step(E, D, opt_E, opt_D, batch, motion, config)
        rates = [optimizer.param_groups[0]["lr"] for optimizer in (opt_E, opt_D)]
        seen.append((((E, opt_E), (D, opt_D)), motion, rates, losses))
        return losses
    monkeypatch.setattr(train, "train_step", watched)
    monkeypatch.setattr(train, "finish", lambda *args: {})
    monkeypatch.setattr(Discriminator, "forward", lambda D, rotmats, betas: judged.append(
        judged.pop() + len(betas)) or forward(D, rotmats, betas))
    config = tiny(tmp_path / "run", steps=2, weight_kp=2.0, weight_joints=3.0, weight_smpl=5.0,
                  weight_adv=7.0, lr_d=1e-2, schedule="onecycle")
    train.train(config)
    assert judged == [36, 36], f"D judges {judged} bodies a step: 12 real, twice Theta_1 .. Theta_3"
    for i, (players, motion, rates, L) in enumerate(seen):
        assert len(motion[0]) == 12, f"{len(motion[0])} real bodies, as many as predicted: B * T"
        total = 2 * L.L_kp + 3 * L.L_joints + 5 * L.L_smpl + 7 * L.L_adv          # Eqs. (1), (4)
        close(L.loss_E, total, 1e-4, "a loss has lost its weight, or has another's")
        for (player, optimizer), now, rate in zip(players, rates, (1e-3, 1e-2)):
            (group,) = optimizer.param_groups
            assert player.training, "training needs model.train()"
            assert {*map(id, group["params"])} == {*map(id, player.parameters())}, \
                "each optimiser holds its own player's parameters, and no other's"
            assert group["weight_decay"] == 0, "the official weight decay is never read"
            assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8, "Adam's usual numbers"
            close(now, rate * train.lr_factor(i, config), 1e-12, "E and D: own rate, one cycle")
    assert not torch.equal(seen[0][1][0], seen[1][1][0]), "the real samples must change"


def test_a_whole_step_is_the_official_codes(golden, golden_body):
    """Every term and gradient of one step of hmr's trainer: 4 pictures' features, T = 3."""
    E = HMR(golden_body, depth=18, width=8)
    E.regressor, D = golden_networks(golden)
    E.encode = lambda images: golden["step_feature"]
    E.regressor.theta_bar.requires_grad_()                            # hmr trains it
    keypoints, visible = golden["step_kp"].split([2, 1], -1)
    batch = data.Batch(torch.zeros(4, 3, 8, 8), keypoints, visible[..., 0],
                       nn.functional.pad(golden["step_joints"], (0, 0, 0, 5)),
                       rotmats_of(golden["step_pose"].view(4, 24, 3)), golden["step_betas"],
                       golden["step_has_joints"][:, None].expand(4, 19), golden["step_has_smpl"],
                       torch.zeros(4, 3))
    # hmr updates both at once: E is judged by D as it was, so D must stand still here
    players = [torch.optim.SGD(network.parameters(), lr=0.0) for network in (E, D)]
    L = train.train_step(E, D, *players, batch, golden["motion"], train.Config())
    grads = {"E_fc3_bias": E.regressor.fc3.bias.grad, "E_theta_bar": E.regressor.theta_bar.grad,
             "E_fc1_norm": E.regressor.fc1.weight.grad.norm(), "D_joint_bias": D.joint_bias.grad,
             "D_embed1_weight": D.embed1.weight.grad, "D_shape1_weight": D.shape1.weight.grad}
    for name, got in {
            "60_L_kp": 60 * L.L_kp, "60_L_joints": 60 * L.L_joints, "60_L_smpl": 60 * L.L_smpl,
            "L_adv": L.L_adv, "loss_D": L.loss_D, "loss_E": L.loss_E,
            **{f"grad_{key}": grad for key, grad in grads.items()}}.items():
        expected = golden[f"step_{name}"]
        # hmr's 1e-8 again, relative to the largest number
        close(got, expected, 2e-8 * expected.abs().max().item(), f"{name}: the labels' losses are "
              "of Theta_3, the adversary's of all T; weights 60, 60, 60, 1; a detach too many?")


def test_one_batch_overfits(tmp_path):
    """Before anything about data: can the network learn one batch by heart?"""
    train.train(tiny(tmp_path / "run", steps=120, width=16, overfit=True, dropout=0.0, seed=1,
                     weight_adv=0.0, log_every=10))
    names, *rows = (tmp_path / "run" / "log.csv").read_text(encoding="utf-8").split()
    first, last = (dict(zip(names.split(","), map(float, rows[i].split(",")))) for i in (0, -1))
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
    whole, parts, batch = tmp_path / "whole", tmp_path / "parts", data.SyntheticPeople.batch
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    assert train.main([*arguments, "--out", str(whole)]) == 0

    def press_ctrl_c(world, step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return batch(world, step)
    monkeypatch.setattr(data.SyntheticPeople, "batch", press_ctrl_c)
    assert train.main([*arguments, "--out", str(parts)]) == 130
    assert f"--resume --out {parts} goes on from step 4" in capsys.readouterr().err
    monkeypatch.setattr(data.SyntheticPeople, "batch", batch)
    with open(parts / "log.csv", "a") as log:                         # died after its checkpoint,
        log.write("6" + ",0" * 11 + "\n7,0")                          # and in the middle of a row
    torch.save(weights_of(parts) | {"seconds": 1000.0}, parts / "checkpoint.pt")
    resume = ["--resume", "--out", str(parts)]
    assert train.main([*resume, "--device", "cpu"]) == 0
    a, b = weights_of(whole), weights_of(parts)
    assert b["seconds"] > 1000, "the clock must go on"
    for key in ("model", "discriminator", "opt_E", "opt_D", "step", "world"):
        assert same(a[key], b[key]), f"{key} differs after resuming: dropout's masks, Adam's state?"
    logs = [[row.split(",")[:10] for row in (folder / "log.csv").read_text().split()]
            for folder in (whole, parts)]
    assert logs[0] == logs[1], "the log must go on where it stopped"
    assert not list(tmp_path.glob("*/.*")), "temporary files left behind"
    for flags, sentence in ((["--depth", "34"], "--depth"), ([], "already done 6"),
                            (["--steps", "9"], "one cycle of learning rates ends at step 6")):
        assert train.main([*resume, *flags]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1, error


def test_the_defaults_are_the_official_recipe():
    c = train.Config()
    assert (c.depth, c.size, c.batch, c.iterations, c.dropout) == (50, 224, 64, 3, 0.5)
    assert (c.lr, c.lr_d) == (1e-5, 1e-4), "do_train.sh's rates; the flags' own default is 1e-3"
    assert (c.weight_kp, c.weight_joints, c.weight_smpl, c.weight_adv) == (60, 60, 60, 1)
    assert (c.schedule, c.rotation) == ("constant", "axis-angle") and train.lr_factor(7, c) == 1
    assert c.steps == 667_589, "the released checkpoint's"
    small = [train.SMALL[f"weight_{name}"] for name in ("joints", "smpl", "adv")]
    assert small == [300, 120, 0.25], f"--small weighs joints, SMPL and L_adv {small}"
    rates = [train.lr_factor(step, train.Config(schedule="onecycle", steps=100))
             for step in range(100)]
    assert 0 < rates[0] < 0.2 and max(rates) == rates[10] == 1 and 0 < rates[-1] < 0.01, "one cycle"


# ============================================================================================
# The book

def test_arrows_between_files_go_one_way():
    """smpl.py <- hmr.py <- data.py <- train.py; the appendix is imported in one function alone."""
    order = ("smpl", "hmr", "data", "train")
    for n, name in enumerate(order):
        text = (HERE / f"{name}.py").read_text(encoding="utf-8")
        text = re.sub(r"\ndef load_body\(.*?\n\n\n", "", text, flags=re.S)
        imported = set(re.findall(r"^ *(?:from|import) (\w+)", text, re.M))
        odd = imported & {*order[n:], "appendix"}
        assert not odd, f"{name}.py imports {odd}: a chapter knows nothing of what comes later"


def test_every_equation_of_the_paper_is_tagged_where_it_is_computed():
    code = "".join((HERE / f).read_text(encoding="utf-8") for f in ("hmr.py", "train.py"))
    tagged = re.findall(r"^.*(?:=|return) .*# Eq\. \(\d\)$", code, re.M)   # fields merely name it
    numbers = sorted(int(line[-2]) for line in tagged)
    assert numbers == list(range(1, 9)), f"HMR has Eqs. (1) to (8), once each; tagged: {numbers}"
