"""What reaches across the chapters: the open body, the renderer, crops, processes, bad input.

The formulas of the paper are tested in test_hmr.py, whose fixtures and `close` are used here.
"""

import contextlib
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import hmr
import smpl
import train
from appendix import datasets
from hmr import HMR, Discriminator, ResNet
from smpl import (FLIP_KEYPOINTS, JOINT_NAMES, KEYPOINT_NAMES, OPEN_BODY, SMPL, batch_rodrigues,
                  load_body)
from test_hmr import (body, close, golden,  # noqa: F401 (fixtures)
                      precision_of_the_encoder, same_numbers_every_time, tiny, weights_of)

HERE = Path(__file__).resolve().parent.parent
SHORT = ["--small", "--width", "8", "--batch", "2", "--size", "32", "--eval-pictures", "1",
         "--log-every", "1", "--schedule", "constant", "--device", "cpu"]


# ============================================================================================
# The open body

def test_the_open_body_is_a_person(body):
    assert OPEN_BODY.stat().st_size <= 2 ** 20
    v, J = body.v_template, body.J_regressor @ body.v_template
    kp = dict(zip(KEYPOINT_NAMES, body.cocoplus_regressor @ v))
    joint = dict(zip(JOINT_NAMES, J))
    for name in ("weights", "J_regressor", "cocoplus_regressor"):
        matrix = getattr(body, name)
        assert matrix.min() >= 0, f"{name} must be non-negative"
        close(matrix.sum(1), torch.ones(len(matrix)), 1e-5, f"{name}: rows must sum to 1")
    assert (body.cocoplus_regressor > 0).sum(1).max() <= 16, "keypoints must stay cheap"
    close(joint["pelvis"], torch.zeros(3), 5e-3, "the mean pelvis is the origin")
    assert joint["left_wrist"][0] > 0.4, "the person's left is +x"
    assert kp["head_top"][1] > kp["nose"][1] > kp["neck"][1] > kp["left_hip"][1] > \
        kp["left_knee"][1] > kp["left_ankle"][1], "y is up"
    assert kp["nose"][2] > kp["left_ear"][2], "the face looks along +z"
    assert kp["left_eye"][0] > 0 > kp["right_eye"][0]
    close(J[16::2][:4, 1], J[16, 1].expand(4), 0.08, "a T-pose: the arm is level")
    # outward faces: the signed volume is the body's, some 70 litres
    a, b, c = v[body.faces].unbind(1)
    volume = (a * torch.linalg.cross(b, c)).sum() / 6
    assert 0.04 < volume < 0.11, f"{volume:.3f} m^3: faces must be counter-clockwise from outside"


def test_pose_blend_shapes_remove_most_of_what_linear_skinning_gets_wrong(body, monkeypatch):
    """On clips that nothing was fitted to, the open body's skin is near dual quaternions'."""
    monkeypatch.syspath_prepend(str(OPEN_BODY.parent))
    import make_assets                          # which made the body
    pose = data.load_mocap(upright=False, held_out=True)[::4].double()           # (81, 24, 3)
    betas, arrays = torch.randn(len(pose), 10).double(), load_body(OPEN_BODY)
    v, _, turn, shift, _ = make_assets.skeleton(arrays, betas.numpy(), pose.numpy())
    target = make_assets.dual_quaternion_skinning(
        v, arrays["weights"], make_assets.dual_quaternions(turn, shift))          # (81, V, 3)
    exact, off = SMPL().double(), []
    for exact.posedirs in (0 * exact.posedirs, exact.posedirs):
        skin = exact(betas, pose).vertices.numpy()                    # (81, V, 3)
        off.append(1000 * ((skin - target) ** 2).sum(-1).mean() ** 0.5)           # RMS, mm
    assert 3 < off[0] < 6, f"linear skinning is {off[0]:.2f} mm off: a wrong target?"
    assert off[1] < 0.3 * off[0], f"{off[0]:.2f} mm without, {off[1]:.2f} mm with them"


def test_no_checkpoint_carries_the_body(body):
    assert not body.state_dict(), "a licensed body must not travel in a checkpoint"
    assert len(body.sha256) == 64 and body.name == "body.npz"
    assert body.double().v_template.dtype == torch.float64
    body.float()


# ============================================================================================
# The renderer

def plane(corners, z) -> Tensor:
    return torch.tensor([[*c, z] for c in corners], dtype=torch.float32)


def test_the_renderer_samples_pixel_centres():
    """A triangle against the definition: a pixel is covered if its centre is inside."""
    size = 16
    triangle = plane([(-0.9, -0.7), (-0.3, 0.8), (0.75, 0.1)], 1.0)[None]         # facing us
    face = data.rasterize(triangle, torch.tensor([[0, 1, 2]]), size)[0]
    (ax, ay), (bx, by), (cx, cy) = ((triangle[0, :, :2] + 1) * size / 2).tolist()
    for row in range(size):
        for col in range(size):
            x, y = col + 0.5, row + 0.5
            edges = [(qx - px) * (y - py) - (qy - py) * (x - px) for px, py, qx, qy in
                     ((ax, ay, bx, by), (bx, by, cx, cy), (cx, cy, ax, ay))]
            assert (face[row, col] == 0) == (max(edges) <= 0), f"pixel {row}, {col}"
    assert (data.rasterize(triangle, torch.tensor([[0, 2, 1]]), size) < 0).all(), "a back face"


def test_the_nearer_triangle_wins_and_nothing_is_drawn_outside():
    square = [(-2, -2), (-2, 2), (2, 2), (2, -2)]
    points = torch.cat([plane(square, 2.0), plane([(0, -2), (0, 2), (2, 2), (2, -2)], -1.0)])[None]
    faces = torch.tensor([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]])
    face = data.rasterize(points, faces, 8)[0]
    assert (face[:, :4] < 2).all() and (face[:, 4:] >= 2).all(), "z is AWAY from the camera"
    assert (face >= 0).all(), "a crack between two triangles"
    assert (data.rasterize(points + torch.tensor([9.0, 0, 0]), faces, 8) < 0).all()
    empty, pattern = torch.rand(1, 3, 8, 8), torch.ones(1, 8)
    image = data.render(points, faces, torch.tensor([[1.0, 9, 0]]), 8, torch.ones(4, 3), empty,
                        pattern=pattern)
    assert torch.equal(image, empty), "a camera that looks past the body must not be an error"


def test_shading_interpolates_at_pixel_centres():
    size = 8                      # a pattern that grows with x and y: brightness tells where
    v = torch.tensor([[[-1.0, -1, 0], [-1, 1, 0], [1, 1, 0], [1, -1, 0]]])
    image = data.render(v, torch.tensor([[0, 1, 2], [0, 2, 3]]), torch.tensor([[1.0, 0, 0]]), size,
                        torch.ones(2, 3), torch.zeros(1, 3, size, size),
                        torch.tensor([[0.0, 0, -1]]), (v[..., 0] + 2 * v[..., 1] + 3) / 6)
    at = (torch.arange(size) + 0.5) / size
    close(image[0], ((at + 2 * at[:, None]) / 3).expand(3, size, size), 1e-5,
          "colours are sampled at i + 0.5, as the silhouette is, and rows run down")


# ============================================================================================
# The crop of real pictures, the flip

def test_flipping_a_batch_flips_every_label(body):
    batch = data.SyntheticPeople(body, data.load_mocap(True, False), 4, 16, labels="all").batch(0)
    batch = batch._replace(visible=(torch.rand(4, 19) < 0.5).float(), has_3d=torch.eye(19)[:4])
    flipped, M = datasets.flip_batch(batch), torch.tensor([-1.0, 1, 1])
    left, right = KEYPOINT_NAMES.index("left_wrist"), KEYPOINT_NAMES.index("right_wrist")
    close(flipped.keypoints3d[:, left], batch.keypoints3d[:, right] * M, 0, "left becomes right")
    close(hmr.project(flipped.keypoints3d, flipped.cam), flipped.keypoints2d, 1e-5,
          "2D, 3D and camera must still agree: x -> -x everywhere, tx too")
    pose = torch.tensor(Rotation.from_matrix(batch.rotmats.flatten(0, 1).numpy()).as_rotvec())
    expected = batch_rodrigues(data.mirror_pose(pose.view(4, 24, 3)).float())
    close(flipped.rotmats, expected, 1e-5, "matrices and axis-angles must flip alike")
    assert torch.equal(flipped.image, batch.image.flip(-1)), "labels flipped, the picture not"
    assert torch.equal(flipped.visible, batch.visible[:, FLIP_KEYPOINTS]), "visibility did not"
    assert flipped.has_3d.argmax(1).tolist() == [5, 4, 3, 2], "has_3d as well"
    again = datasets.flip_batch(flipped)
    assert all(torch.equal(x, y) for x, y in zip(again, batch)), "twice is the identity"


def test_cropping_keeps_picture_and_points_together():
    image, keypoints, visible = torch.zeros(3, 90, 120), torch.zeros(19, 2), torch.zeros(19)
    for k, (x, y) in enumerate([(30, 20), (60, 70), (45, 50)]):
        image[:, y - 2:y + 3, x - 2:x + 3] = 1                        # centred on x + .5, y + .5
        keypoints[k], visible[k] = torch.tensor([x + 0.5, y + 0.5]), 1
    keypoints[4] = math.nan                                           # not labelled
    for kwargs in ({}, dict(shift=(15, -20)), dict(zoom=0.8, shift=(-20, 20))):
        crop, points = datasets.crop_person(image, keypoints, visible, 224, **kwargs)
        assert crop.shape == (3, 224, 224) and points[4].tolist() == [0, 0]
        for x, y in ((points[:3] + 1) * 112).tolist():
            assert crop[0, int(y), int(x)] > 0.9, f"{kwargs}: a keypoint left its spot"
    for wrong, sentence in (((image, keypoints, visible * 0), "at least 2"),
                            ((image, keypoints * 0, visible), "at least 5 pixels"),
                            ((image.byte(), keypoints, visible), "colours first")):
        with pytest.raises(ValueError, match=sentence):
            datasets.crop_person(*wrong)


def test_the_crop_has_the_official_size_and_jitter():
    image, visible, keypoints = torch.rand(3, 90, 120), torch.zeros(19), torch.zeros(19, 2)
    for name, xy in (("right_ankle", (30, 80)), ("right_hip", (40, 50)),
                     ("right_shoulder", (40, 20)), ("left_elbow", (60, 40))):
        k = KEYPOINT_NAMES.index(name)
        keypoints[k], visible[k] = torch.tensor(xy).float(), 1
    _, points = datasets.crop_person(image, keypoints, visible)
    pixels = (points[visible > 0] + 1) * 112
    low, high = pixels.amin(0), pixels.amax(0)
    close((high - low).norm(), 150.0, 1e-3, "with an ankle: the box's diagonal is 150 px of 224")
    close((high + low) / 2, torch.tensor([112.0, 112]), 1e-3, "the box's midpoint is the centre")
    assert (points[visible == 0] == 0).all(), "unlabelled points are zeroed"
    _, moved = datasets.crop_person(image, keypoints, visible, shift=(20, 0))
    close((points - moved)[visible > 0] * 112, torch.tensor([20.0, 0]).expand(4, 2), 1e-3,
          "the window moves right, the person left, in crop pixels")
    _, zoomed = datasets.crop_person(image, keypoints, visible, zoom=1.2)
    close(zoomed, 1.2 * points, 1e-5, "zoom is about the crop's centre")
    _, both = datasets.crop_person(image, keypoints, visible, shift=(20, 0), zoom=1.2)
    close(both, 1.2 * moved, 1e-5, "first the shift, then the zoom")
    visible[KEYPOINT_NAMES.index("right_ankle")] = 0
    _, points = datasets.crop_person(image, keypoints, visible)
    hip, shoulder = (points[KEYPOINT_NAMES.index(f"right_{n}")] for n in ("hip", "shoulder"))
    close((hip - shoulder).norm() * 112, 75.0, 1e-3, "no ankle visible: the torso is 75 px of 224")
    no_torso = visible.clone()
    no_torso[KEYPOINT_NAMES.index("right_hip")] = 0
    _, points = datasets.crop_person(image, keypoints, no_torso)
    elbow, shoulder = (points[KEYPOINT_NAMES.index(n)] for n in ("left_elbow", "right_shoulder"))
    close((elbow - shoulder).norm() * 112, 50.0, 1e-3, "neither ankle nor torso: the box is 50 px")
    crop, _ = datasets.crop_person(image, keypoints, visible, shift=(-500, 0))
    assert crop[:, :, 0].std() > 0 and torch.equal(crop[:, :, 0], crop[:, :, 50]), \
        "beyond the picture its edge is repeated, not black"


def test_the_crops_scale_is_the_official_codes(golden):
    for points, scale in zip(golden["scale_keypoints"], golden["out_scale_coco"]):
        # a norm and a quotient: a few roundings
        close(datasets.person_scale(points[:, :2], points[:, 2]), scale, 1e-14 * scale.item(),
              f"{int((points[:, 2] > 0).sum())} points: ANY visible ankle: the box, else the torso")


# ============================================================================================
# The measure of monsters

def test_monstrosity_is_0_for_recorded_bodies_and_100_for_absurd_ones(body):
    recorded = train.recorded_rotations(tiny(Path("x")), "cpu")
    assert recorded.shape == (2 * len(data.load_mocap(True, False)), 23, 9)

    def measure(rotmats, betas):
        result = train.monstrosity(hmr.HMROutput(rotmats, betas, *[None] * 5), recorded)
        return {key: value.mean().item() for key, value in result.items()}
    pose = data.load_mocap(True, False)[::50].clone()
    for known in (pose, data.mirror_pose(pose)):
        known[:, 0] = torch.randn(len(known), 3)                      # any root
        found = measure(batch_rodrigues(known), torch.full((len(known), 10), -2.9))
        close(list(found.values()), [0.0] * 3, 0.1, "recorded frames")          # acos near 1: 0.04
    world = data.SyntheticPeople(body, data.load_mocap(True, False), 4, 4)
    mixed = batch_rodrigues(world.poses(500, torch.Generator().manual_seed(0)))
    assert measure(mixed, torch.zeros(500, 10))["outside"] == 0, "what D calls real is in range"
    absurd = measure(batch_rodrigues(torch.full((3, 24, 3), 1.8)), torch.full((3, 10), -3.1))
    assert absurd["outside"] == 100 and absurd["beta3"] == 100 and absurd["mocap"] > 90, absurd
    pose[:, 4, 0] -= 1.7             # left knees: the leg before them, by nearly a right angle
    bent = measure(batch_rodrigues(pose), torch.zeros(len(pose), 10))
    close(bent["outside"], 100 / 23, 2.0, "one joint of 23")


# ============================================================================================
# Several processes

def one_process(rank: int, ranks: int, folder: str) -> None:
    """Keep the gradients that train()'s first step on this rank's part of a fixed batch leaves.

    float64, batch norm in eval mode, no dropout.  Each half of the batch has as many labels as the
    other: denominators are each rank's own.
    """
    folder, B = Path(folder), 8
    if ranks > 1:
        train.dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                      world_size=ranks)
    mine, kept = slice(rank * B // ranks, (rank + 1) * B // ranks), {}
    build = train.build

    def build_in_eval_mode(*args):
        kept["E"] = build(*args).double().eval()
        kept["E"].train = lambda mode=True: kept["E"]
        return kept["E"]

    def build_D():
        kept["D"] = Discriminator().double()
        return kept["D"]

    def joined_batch(world, step):
        assert world.batch_size == B // ranks and world.rank == rank
        joined = batch(data.SyntheticPeople(world.smpl.float(), world.frames, B, 32, labels="all"),
                       step)
        world.smpl.double()
        has_3d, has_smpl, visible = torch.zeros(B, 19), torch.zeros(B), torch.ones(B, 19)
        has_3d[[0, 1, 4, 7]], has_smpl[[1, 4]], visible[[2, 5], 3:] = 1, 1, 0
        joined = joined._replace(has_3d=has_3d, has_smpl=has_smpl, visible=visible)
        return data.Batch(*(field[mine].double() for field in joined))

    def joined_motion(world, n, step):
        rng = torch.Generator().manual_seed(1)
        R = batch_rodrigues(torch.randn(n * ranks, 23, 3, generator=rng).double())
        betas = torch.randn(n * ranks, 10, generator=rng).double()
        return R[rank * n:(rank + 1) * n], betas[rank * n:(rank + 1) * n]
    batch = data.SyntheticPeople.batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build", build_in_eval_mode)
        patch.setattr(train, "evaluation_pictures", lambda *_: iter([None]))
        patch.setattr(train, "finish", lambda *_: {})
        patch.setattr(data.SyntheticPeople, "batch", joined_batch)
        patch.setattr(data.SyntheticPeople, "motion", joined_motion)
        train.train(tiny(folder / "run", steps=1, batch=B, dropout=0.0, log_every=1),
                    make_D=build_D)
    torch.save({f"{name}.{key}": p.grad for name, module in kept.items()
                for key, p in module.named_parameters()}, folder / f"rank{rank}.pt")
    if ranks > 1:
        train.dist.destroy_process_group()


def under_torchrun(folder: str) -> None:
    """What each of two processes does: a run by the command, then the step of `one_process`."""
    assert train.main([*SHORT, "--batch", "4", "--steps", "2", "--out", f"{folder}/command"]) == 0
    one_process(int(os.environ["RANK"]), 2, folder)


def test_two_processes_learn_what_one_learns_from_the_joined_batch(tmp_path):
    """A whole step of train(), E's and D's: L_adv through a wrapped D that is frozen, too."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                "-m", "appendix.test_appendix", str(two)]
    done = subprocess.run(torchrun, cwd=HERE, capture_output=True, text=True, env=os.environ | {
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})          # no name to look up
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss_E") == 2, "rank 0 alone prints, in each of two runs"
    one_process(0, 1, str(one))
    alone = torch.load(one / "rank0.pt", weights_only=True)
    for rank in (0, 1):
        both = torch.load(two / f"rank{rank}.pt", weights_only=True)
        assert alone.keys() == both.keys() and {key[0] for key in alone} == {"E", "D"}
        for key in alone:                     # float64: only the order of sums differs
            close(both[key], alone[key], 1e-6 * alone[key].abs().max().item(),
                  f"{key}, rank {rank}: are the gradients averaged, once, of E and of D?")
    rows = [dict(zip(*(line.split(",") for line in (folder / "run" / "log.csv").read_text()
                       .split()))) for folder in (one, two)]
    for column in train.Log.COLUMNS[1:10]:
        close(float(rows[1][column]), float(rows[0][column]), 2e-5 * abs(float(rows[0][column])),
              f"{column}: the log must show the joined batch's losses (6 digits are written)")
    a, b = (weights_of(folder / "run") for folder in (one, two))
    assert a["model"].keys() == b["model"].keys() and \
        a["discriminator"].keys() == b["discriminator"].keys(), "saved as `module.`?"
    # one process goes on with the command's run
    go_on = ["--resume", "--out", str(two / "command"), "--device", "cpu"]
    assert train.main([*go_on, "--steps", "3"]) == 0
    measured = (two / "command" / "metrics.json").read_bytes()
    assert train.main(go_on) == 2
    assert (two / "command" / "metrics.json").read_bytes() == measured, "a finished run stays"
    rows = (two / "command" / "log.csv").read_text(encoding="utf-8").split()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3"]
    assert weights_of(two / "command")["opt_E"]["state"][0]["step"] == 3, "Adam starts again?"


def test_several_processes_share_the_batch_evenly(monkeypatch):
    monkeypatch.setattr(train, "rank_and_ranks", lambda: (1, 4))
    config = train.make_config({}, {"size": 32, "batch": 12})
    assert train.training_world(config, SMPL()).batch_size == 3
    for batch in (10, 4):
        with pytest.raises(ValueError, match="--batch .* 2 or more pictures for each of 4"):
            train.make_config({"batch": batch}, {})


# ============================================================================================
# A GPU

class HostTraffic(TorchDispatchMode):
    """Names the operations that make the program wait for a GPU, or send it numbers."""
    WAITS = ("_local_scalar_dense", "nonzero", "repeat_interleave", "equal")  # results on the host
    COPIES = ("lift_fresh",)                      # of numbers written in Python: lists, new_tensor

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors if x.ndim}          # a number may come along
        name = operation.overloadpacket.__name__
        if len(devices) > 1 or name in self.WAITS + self.COPIES:
            self.found.append(name)
        return result


TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.mark.skipif(not (2, 6) <= TORCH <= (2, 15), reason="reads names of PyTorch's dispatcher, "
                    "which may change: known for 2.6 to 2.15")
@pytest.mark.parametrize("look", ["plain", "hard"])
def test_only_the_renderer_waits_for_the_gpu(look, body, monkeypatch):
    """On "meta": a step asks for all its work at once, and a GPU is never left idle by the host."""
    # "meta" has no random generators, and in PyTorch 2.14 no autocast
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(data.SyntheticPeople, "generator", lambda *_, **__: None)
    config = train.make_config({"size": 32, "batch": 4, "width": 8, "look": look, "amp": "off"},
                               train.SMALL)
    model = HMR(SMPL(), 18, 3, 8, rotation="6d").to("meta")
    D = Discriminator().to("meta")
    world = data.SyntheticPeople(model.smpl, data.load_mocap(True, False), 4, 32, look)
    players = [torch.optim.SGD(net.parameters(), 1e-3) for net in (model, D)]

    def step():
        train.train_step(model, D, *players, world.batch(0), world.motion(12, 0), config)

    with monkeypatch.context() as patch:
        patch.setattr(data, "render", lambda vertices, *_: torch.zeros(4, 3, 32, 32, device="meta"))
        with HostTraffic() as host:
            step()
    assert host.found == [], "waits or copies in every step: an index list? new_tensor? .item()?"
    people = data.SyntheticPeople(body, data.load_mocap(True, False), 4, 32, look)
    with HostTraffic() as host:
        people.batch(1)
    assert sorted(host.found) == ["nonzero"] * 3 + ["repeat_interleave"], "more waits than before"


def test_float32_is_float32_even_where_the_machine_allows_tf32(body):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")        # as NVIDIA's containers have it
        torch.backends.cudnn.allow_tf32 = True            # as PyTorch has it
        train.build(tiny(Path("x")), body)
        assert torch.get_float32_matmul_precision() == "highest", "SMPL would be off by 1 mm"
        assert not torch.backends.cudnn.allow_tf32, "--amp off would not be float32 on a GPU"
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
def test_a_small_step_on_the_gpu_has_the_cpus_losses(body):
    config = train.Config(**train.SMALL | dict(batch=8, size=48, amp="off", device="cuda"))
    world = data.SyntheticPeople(body, data.load_mocap(True, False), 8, 48)
    batch, motion, losses = world.batch(0), world.motion(24, 0), []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        players = train.build(config, SMPL()).to(device).train(), Discriminator().to(device)
        optimisers = [torch.optim.Adam(player.parameters(), 1e-3) for player in players]
        losses.append(train.train_step(*players, *optimisers, data.Batch(*(
            part.to(device) for part in batch)), tuple(part.to(device) for part in motion), config))
    for name, cpu, cuda in zip(train.Losses._fields, *losses):
        # float32 convolutions by other algorithms, 18 layers of batch norm over 8 pictures
        close(cuda.cpu(), cpu, 1e-2 * abs(cpu.item()), f"{name} on the GPU")


@gpu
def test_the_gpu_renders_the_same_picture(body):
    world = data.SyntheticPeople(body, data.load_mocap(True, False), 8, 64, labels="all")
    batch = world.batch(0)
    out = body(batch.betas, batch.rotmats)
    color, empty = torch.rand(len(body.faces), 3), torch.zeros(8, 3, 64, 64)
    arguments = (out.vertices, body.faces, batch.cam)
    cpu = data.render(*arguments, 64, color, empty)
    cuda = data.render(*(a.cuda() for a in arguments), 64, color.cuda(), empty.cuda()).cpu()
    # where a pixel's centre lies on an edge, rounding decides which of two triangles is seen
    share = ((cpu - cuda).abs().amax(1) > 0.02).float().mean().item()
    assert share < 0.002, f"{share:.2%} of the pixels differ"


@gpu
def test_a_run_on_the_gpu_goes_on_and_is_measured_on_both(tmp_path, capsys):
    out, common = str(tmp_path / "run"), ["--eval-pictures", "64"]
    assert train.main(["--small", "--device", "cuda", "--batch", "8", "--steps", "2", "--schedule",
                       "constant", "--out", out, *common]) == 0
    assert train.main(["--resume", "--out", out, "--steps", "4", "--device", "cuda"]) == 0
    assert weights_of(tmp_path / "run")["step"] == 4
    errors = []
    for device in ("cpu", "cuda"):
        model, D, config = train.load(tmp_path / "run" / "checkpoint.pt", device=device)
        assert next(model.parameters()).device.type == device
        errors.append(train.evaluate(model, config, D)["mpjpe"])
    close(errors[1], errors[0], 0.1, "MPJPE, mm, of one checkpoint on the same pictures")


@gpu
def test_a_run_of_the_cpu_is_measured_on_the_gpu(tmp_path, capsys):
    train.train(tiny(tmp_path / "run", steps=1))
    assert train.main(["--eval", str(tmp_path / "run" / "checkpoint.pt"), "--device", "cuda"]) == 0
    assert "Theta-bar" in capsys.readouterr().out


# ============================================================================================
# Weights and checkpoints of others

def test_imagenet_weights_load_into_the_encoder_if_they_are_finite(tmp_path):
    theirs = torchvision.models.resnet18(weights=None)
    config = train.Config(depth=18, pretrained=str(tmp_path / "resnet18.pth"))
    torch.save(theirs.state_dict(), config.pretrained)
    encoder = ResNet(18)
    train.load_pretrained(encoder, config)
    assert torch.equal(encoder.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    theirs.layer1[0].bn1.running_var[3] = math.nan        # trains with finite losses
    torch.save(theirs.state_dict(), config.pretrained)
    with pytest.raises(ValueError, match="layer1.0.bn1.running_var holds NaN"):
        train.load_pretrained(encoder, config)


@pytest.mark.parametrize("error", [urllib.error.URLError("no host"), ConnectionResetError()])
def test_missing_imagenet_weights_end_in_what_went_wrong(tmp_path, monkeypatch, error):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"

    def unreachable(*args, **options):
        raise error

    def says(words):
        with pytest.raises(ValueError, match=words + ".*--pretrained FILE or none"):
            train.load_pretrained(ResNet(18), train.Config(depth=18))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    says("no network to reach https://")
    file.write_bytes(b"half a file")                                  # hub made the folder
    says(f"{re.escape(str(file))} is cut or not what its name says; delete it")
    file.unlink(), file.parent.rmdir(), file.parent.write_bytes(b"")  # a folder that is none
    says(f"{re.escape(str(file))} cannot be read or written")


def test_a_fresh_start_at_the_rate_of_pretrained_weights_is_pointed_out(capsys):
    for given, is_said in (({"pretrained": "none"}, True), ({"pretrained": "x.pth"}, False),
                           ({"pretrained": "none", "lr": 1e-4}, False)):
        assert train.make_config(given, {}).lr == given.get("lr", 1e-5), "Sec. 3.4"
        assert ("1e-4 suits a fresh start" in capsys.readouterr().out) == is_said


def test_a_trained_model_loads_for_use_from_python(tmp_path, body):
    config = tiny(tmp_path / "run", steps=1)
    metrics = train.train(config)
    model, D, loaded = train.load(tmp_path / "run" / "checkpoint.pt", device="cpu")
    assert loaded == config and not model.training and model.amp is None
    again = train.evaluate(model, loaded, D)
    assert again["mpjpe"] == metrics["mpjpe"] and again["heads"] == metrics["heads"]
    with pytest.raises(FileNotFoundError, match="no such file"):
        train.load(tmp_path / "absent.pt")
    with np.load(OPEN_BODY) as file:
        np.savez(tmp_path / "other.npz", **{**file, "v_template": file["v_template"] + 1})
    with pytest.raises(ValueError, match="trained with body.npz"):
        train.load(tmp_path / "run" / "checkpoint.pt", smpl=tmp_path / "other.npz")


def test_nothing_that_is_not_finite_replaces_a_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    path = tmp_path / "run" / "checkpoint.pt"
    assert train.main([*SHORT, "--rotation", "axis-angle", "--no-adv", "--lr", "1",
                       "--steps", "4", "--out", str(path.parent)]) == 2
    error = capsys.readouterr().err
    assert re.search(r"model after step 2.encoder\S+ holds NaN .*; lower --lr 1", error)
    checkpoint = train.load_checkpoint(path)                          # raises if it is not finite
    assert checkpoint["step"] == 1
    # weights may be finite and bodies not: one sentence, no traceback from the measures' SVD
    assert train.main(["--eval", str(path), "--eval-pictures", "2"]) == 2
    error = capsys.readouterr().err
    assert "bodies are not finite" in error and error.count("\n") == 1
    for part in ("model", "discriminator", "opt_E"):                  # every part is looked at
        content = torch.load(path, weights_only=True)
        last = [leaf for leaf in tree_leaves(content[part])
                if isinstance(leaf, Tensor) and leaf.is_floating_point()][-1]
        last.view(-1)[-1] = math.nan
        torch.save(content, tmp_path / "nan.pt")
        with pytest.raises(ValueError, match=rf"{part}\S* holds NaN"):
            train.load_checkpoint(tmp_path / "nan.pt")


def test_metrics_json_is_strict_json_or_is_not_written(tmp_path, monkeypatch):
    measured = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: measured(*args) | {"mpjpe": math.inf})
    with pytest.raises(ValueError, match="JSON"):
        train.train(tiny(tmp_path / "run", steps=1))
    assert (tmp_path / "run" / "checkpoint.pt").is_file()
    assert not (tmp_path / "run" / "metrics.json").exists(), "Infinity is no JSON"


def test_a_body_file_that_moved_is_asked_for(tmp_path, monkeypatch, capsys):
    run, old, new = tmp_path / "run", tmp_path / "old.npz", tmp_path / "new.npz"
    old.write_bytes(OPEN_BODY.read_bytes())
    monkeypatch.setattr(train, "finish", lambda *args: {})
    train.train(tiny(run, steps=1, smpl=str(old)))
    old.rename(new)
    command = ["--resume", "--out", str(run), "--steps", "2", "--device", "cpu"]
    for load in (lambda: train.main(command), lambda: smpl.exit_status("train.py", lambda:
                 train.load(run / "checkpoint.pt"))):
        assert load() == 2
        assert "old.npz: no such file; expected a body file; give --smpl" in capsys.readouterr().err
    assert train.load(run / "checkpoint.pt", smpl=new)
    assert train.main([*command, "--smpl", str(new)]) == 0


# ============================================================================================
# Bad input, and the commands that README shows

def test_a_run_is_never_overwritten_and_bad_input_is_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "train_step", None)        # would fail at the first step
    out, x = tmp_path / "run", ["--out", str(tmp_path / "x")]
    out.mkdir()
    (out / "checkpoint.pt").write_text("mine")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({1: 2}, tmp_path / "numbers.pt")
    small, junk, numbers = ["--small", "--device", "cpu"], *(
        str(tmp_path / f"{name}.pt") for name in ("junk", "numbers"))
    for arguments, sentence in [
            ([*small, "--out", str(out)], "--resume"),
            ([*small, "--resume", "--out", str(tmp_path / "no")], "no such file"),
            (["--eval", junk], "not a readable"), (["--eval", junk, "--small"], "--small"),
            (["--eval", numbers], "not a checkpoint of this version"),
            (["--eval", str(tmp_path)], "a folder; expected a checkpoint"),
            (["--eval", str(tmp_path / "a\x1b[2K\rb.pt")], "a\\x1b[2K\\rb.pt"),
            ([*small, "--batch", "1", *x], "--batch"), ([*small, "--seed", "-1", *x], "--seed"),
            ([*small, "--lr-d", "nan", *x], "--lr-d"), ([*small, "--lr", "inf", *x], "below"),
            ([*small, "--dropout", "1.5", *x], "--dropout"),
            ([*small, "--out", junk], "checkpoint.pt: cannot be written"),
            ([*small, "--out", f"{junk}/x"], "Not a directory"),
            ([*small, "--smpl", "absent.pkl", *x], "absent.pkl"),
            ([*small, "--pretrained", numbers, *x], "--pretrained"),
            ([*small, "--size", "1000000000", *x], "--size smaller")]:
        assert train.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1 and "\x1b" not in error, error
    assert (out / "checkpoint.pt").read_text() == "mine" and Path(junk).read_bytes() == b"junk"
    for arguments in (["--smal"], ["--lr", "fast"], ["--depth", "19"], ["--look", "nice"]):
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
        assert stop.value.code == 2


def test_no_terminal_ends_a_run(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    assert smpl.exit_status("train.py", lambda: smpl.say("L\u00e4ufe")) == 0
    assert written.getvalue() == b"L\\xe4ufe\n", "letters that the terminal lacks are escaped"
    reading, writing = os.pipe()
    os.close(reading)                                                 # nobody reads
    monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
    assert smpl.exit_status("train.py", lambda: [smpl.say("line") for _ in range(3)]) == 0


def test_a_callers_autocast_does_not_reach_the_body(body):
    model = HMR(body, 18, width=8).eval()
    theta = model.regressor.theta_bar + 0.1 * torch.randn(2, 85)
    exact = model.decode(theta, vertices=True)
    with torch.autocast("cpu", torch.bfloat16):
        again = model.decode(theta, vertices=True)
        thetas, pred = model(torch.rand(2, 3, 32, 32))
        body_of = model.smpl(theta[:, -10:], theta[:, 3:75])
        (thetas[0].sum() + pred.keypoints2d.sum()).backward()
    assert torch.equal(exact.vertices, again.vertices), "bfloat16 is 1 cm in a body"
    assert thetas[-1].dtype == pred.keypoints2d.dtype == body_of.vertices.dtype == torch.float32


def test_wrong_pictures_and_poses_are_sentences(body):
    model = HMR(body, 18, width=8)
    for wrong in (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(3, 32, 32)):
        with pytest.raises(ValueError, match="divide bytes by 255"):
            model(wrong)
    for pose, betas in ((torch.zeros(1, 72).half(), torch.zeros(1, 10)),
                        (torch.zeros(1, 72), torch.zeros(1, 10).bfloat16())):
        with pytest.raises(ValueError, match="float32 or float64"):
            body(betas, pose)


def test_every_demo_reports_bad_input_in_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smpl, "OPEN_BODY", tmp_path / "absent.npz")
    monkeypatch.setattr(hmr, "RESNETS", {})                           # skip hmr.py's slow table
    for name, main in (("smpl.py", smpl.main), ("hmr.py", hmr.main), ("data.py", data.main)):
        assert main([]) == 2, name
        error = capsys.readouterr().err
        assert error.startswith(f"{name}: ") and "absent.npz" in error and error.count("\n") == 1

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert smpl.exit_status("train.py", full) == 2 and "--batch" in capsys.readouterr().err


def test_the_tests_that_the_readme_names_exist():
    named = set(re.findall(r"`(test_\w+)`", (HERE / "README.md").read_text(encoding="utf-8")))
    files = [HERE / "test_hmr.py", *(HERE / "appendix").glob("test_*.py")]
    missing = named - set(re.findall(r"^def (test_\w+)", "".join(
        file.read_text(encoding="utf-8") for file in files), re.M))
    assert len(named) > 10 and not missing, f"README names tests that do not exist: {missing}"


def test_readmes_commands_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.S)
    commands = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    commands = list(dict.fromkeys(line for line in commands if line.startswith("python ")))
    for script in ("smpl.py", "hmr.py", "data.py", "train.py --small"):
        assert any(script in c for c in commands), f"README must show {script}"
    monkeypatch.chdir(tmp_path)
    mains = {"smpl.py": smpl.main, "hmr.py": hmr.main, "data.py": data.main}
    for command in commands:
        _, script, *arguments = shlex.split(command)
        if "FILE" in command or script == "-m":
            continue                          # needs the licensed body; long, and tested elsewhere
        short = ["--device", "cpu", "--steps", "2", "--batch", "2", "--eval-pictures", "2"]
        if "--small" not in command:
            short += ["--size", "32", "--depth", "18", "--width", "8", "--pretrained", "none"]
        if script in mains:
            assert mains[script](arguments) == 0, command
        elif "--help" in command:
            with pytest.raises(SystemExit):
                train.main(["--help"])
        elif "--resume" in command:           # the run above is finished
            assert train.main(arguments) == 2
        else:
            short = ["--device", "cpu"] if "--eval" in command else short
            assert train.main([*arguments, *short]) == 0, command
    metrics = json.loads((tmp_path / "runs/small/metrics.json").read_text(encoding="utf-8"))
    keys = {key for key, _ in train.MEASURES}
    assert keys | {"per_iteration", *train.GUESSES, "truth", "measured_on", "heads", "seconds",
                   "images", "device", "precision", "torch", "seed", "config"} == set(metrics)
    assert set(metrics["baseline"]) == keys and len(metrics["per_iteration"]) == 3
    assert (tmp_path / "runs/small/picture.png").is_file()


if __name__ == "__main__":                      # under torchrun
    under_torchrun(sys.argv[1])
