"""The appendix, and what a program must survive: torn and hostile files, bad options, interrupts.

The formulas of the paper are tested in test_hmr.py, whose fixtures and `close` are used here.
"""

import argparse
import dataclasses
import io
import json
import math
import os
import pickle
import re
import shlex
import signal
import struct
import subprocess
import sys
import tracemalloc
import types
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
import torchvision
from PIL import Image
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import hmr
import smpl
import test_hmr
import train
from appendix import ablate, bench, datasets
from hmr import HMR, Discriminator, ResNet
from smpl import (FLIP_JOINTS, FLIP_KEYPOINTS, JOINT_NAMES, KEYPOINT_NAMES, OPEN_BODY, PARENTS,
                  SMPL, batch_rigid_transform, batch_rodrigues, blend_shapes, lbs, load_body)
from test_hmr import (body, close, golden,  # noqa: F401 (fixtures)
                      precision_of_the_encoder, same_numbers_every_time, tiny, weights_of)

HERE = Path(__file__).resolve().parent.parent


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


def dual_quaternion_skinning(v, weights, A):
    """v (B, V, 3), weights (V, 24), bones' motions A (B, 24, 4, 4) -> (B, V, 3).  Kavan 2007."""
    q = Rotation.from_matrix(A[..., :3, :3].reshape(-1, 3, 3)).as_quat().reshape(-1, 24, 4)   # xyzw
    for j in range(1, 24):              # q and -q are one rotation: take the parent's hemisphere
        q[(q[:, j] * q[:, PARENTS[j]]).sum(1) < 0, j] *= -1
    t, xyz, w = A[..., :3, 3], q[..., :3], q[..., 3:]
    dual = np.concatenate([np.cross(t, xyz) + w * t, -(t * xyz).sum(-1, keepdims=True)], -1) / 2
    q, dual = np.einsum("vj,bjk->bvk", weights, q), np.einsum("vj,bjk->bvk", weights, dual)
    size = np.linalg.norm(q, axis=-1, keepdims=True)
    q, dual = q / size, dual / size
    shift = 2 * (q[..., 3:] * dual[..., :3] - dual[..., 3:] * q[..., :3]
                 + np.cross(q[..., :3], dual[..., :3]))
    turned = Rotation.from_quat(q.reshape(-1, 4)).apply(v.reshape(-1, 3)).reshape(v.shape)
    return turned + shift


@pytest.mark.parametrize("spread", [0, 1])
def test_pose_blend_shapes_remove_most_of_what_linear_skinning_gets_wrong(body, spread):
    """On clips that nothing was fitted to, the open body's skin is near dual quaternions'."""
    pose = data.load_mocap(upright=False, held_out=True)[::4].double()           # (81, 24, 3)
    betas = spread * torch.randn(len(pose), 10, generator=torch.Generator().manual_seed(0)).double()
    arrays = {k: getattr(body, k).double() for k in ("v_template", "shapedirs", "posedirs",
                                                     "J_regressor", "weights")}
    rotmats = batch_rodrigues(pose)                                   # (B, 24, 3, 3)
    rest = arrays["v_template"] + blend_shapes(betas, arrays["shapedirs"])       # (B, V, 3)
    J = torch.einsum("jv,bvc->bjc", arrays["J_regressor"], rest)      # (B, 24, 3)
    A = batch_rigid_transform(rotmats, J, PARENTS)[1]                 # (B, 24, 4, 4)
    target = dual_quaternion_skinning(rest.numpy(), arrays["weights"].numpy(), A.numpy())

    def distance(posedirs) -> float:                                  # RMS, mm
        vertices, _ = lbs(betas, rotmats, **{**arrays, "posedirs": posedirs}, parents=PARENTS)
        return 1000 * ((vertices.numpy() - target) ** 2).sum(-1).mean() ** 0.5
    without, with_them = distance(0 * arrays["posedirs"]), distance(arrays["posedirs"])
    assert 3 < without < 6, f"linear skinning is {without:.2f} mm off: a wrong target?"
    assert with_them < 0.3 * without, f"{without:.2f} mm without, {with_them:.2f} mm with them"


def test_pose_blend_shapes_are_symmetric_and_local(body):
    """Mirrored features move mirrored vertices; few numbers are not zero."""
    D = body.posedirs.double().unflatten(2, (23, 3, 3))               # (V, 3, 23, 3, 3)
    t = body.v_template.double()
    sign = t.new_tensor([-1, 1, 1])
    mirror = torch.cdist(t * sign, t).argmin(1)                       # (V,)
    joints = torch.tensor(FLIP_JOINTS[1:]) - 1
    other = D[mirror][:, :, joints] * torch.einsum("i,a,b->iab", sign, sign, sign)[:, None]
    assert torch.equal(other, D), "left and right are not mirror images"
    share = (D != 0).double().mean().item()
    assert 0.02 < share < 0.10, f"{share:.1%} of posedirs are not zero"


def test_the_population_is_believable(body):
    betas = torch.randn(2000, 10)
    y = (body.v_template[:, 1] + betas @ body.shapedirs[:, 1].T)
    stature = y.amax(1) - y.amin(1)
    mean, std = stature.mean().item(), stature.std().item()
    assert abs(mean - 1.70) < 0.05 and 0.06 < std < 0.14, f"stature {mean:.2f} +- {std:.2f} m"
    assert 1.35 < stature.min() and stature.max() < 2.15, "no children, no giants"


def test_no_checkpoint_carries_the_body(body):
    assert not body.state_dict(), "a licensed body must not travel in a checkpoint"
    assert len(body.sha256) == 64 and body.name == "body.npz"
    assert body.double().v_template.dtype == torch.float64
    body.float()


def test_motion_bends_limbs_the_right_way():
    frames = data.load_mocap(upright=False, held_out=False)
    knees = frames[:, [JOINT_NAMES.index("left_knee"), JOINT_NAMES.index("right_knee")], 0]
    assert knees.mean() > 0.3 and knees.min() > -0.3, "heels go back: a positive turn about x"
    std = frames[:, 1:].flatten(0, 0).std(0).norm(dim=-1)
    assert std.min() > 0.03, f"{JOINT_NAMES[1 + int(std.argmin())]} is constant: D would spot it"


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
    size = 8                                  # a pattern that grows with x: brightness tells where
    v = torch.tensor([[[-1.0, -1, 0], [-1, 1, 0], [1, 1, 0], [1, -1, 0]]])
    f = torch.tensor([[0, 1, 2], [0, 2, 3]])
    image = data.render(v, f, torch.tensor([[1.0, 0, 0]]), size, torch.ones(2, 3),
                        torch.zeros(1, 3, size, size), torch.tensor([[0.0, 0, -1]]),
                        (v[..., 0] + 1) / 2)
    expected = ((torch.arange(size) + 0.5) / size).expand(3, size, size)
    close(image[0], expected, 1e-5, "colours are sampled at i + 0.5, as the silhouette is")


def test_mirroring_is_exactly_x_to_minus_x(body):
    v = torch.randn(1, 30, 3) * torch.tensor([0.5, 0.5, 0.1])
    f = torch.randint(30, (40, 3), generator=torch.Generator().manual_seed(0))
    mirrored = v * torch.tensor([-1.0, 1, 1])
    a = data.rasterize(v, f, 32) >= 0
    b = data.rasterize(mirrored, f[:, [0, 2, 1]], 32) >= 0            # mirroring turns faces round
    # a centre exactly on an edge may round differently
    assert (a != b.flip(-1)).sum() <= 2, "pixel i must be sampled at i + 0.5"


def test_clothes_have_stripes_that_pixels_can_show(body, monkeypatch):
    drawn, render = [], data.render
    monkeypatch.setattr(data, "render", lambda *args: drawn.append(args[7]) or render(*args))
    data.SyntheticPeople(body, data.load_mocap(True, False), 64, 16, "hard").batch(0)
    (pattern,) = drawn                                                # (B, V)
    z = (pattern - pattern.mean(1, keepdim=True)) / pattern.std(1, keepdim=True)
    neighbours = (z[:, body.faces[:, 0]] * z[:, body.faces[:, 1]]).mean()
    # 3 cm apart, at 6 to 46 radians a metre: cos(0.8) = 0.7; noise has 0
    assert neighbours > 0.5, f"neighbouring vertices correlate by {neighbours:.2f}: noise"


# ============================================================================================
# datasets.py: the crop of real pictures, the flip


def test_flipping_a_batch_flips_every_label(body):
    batch = data.SyntheticPeople(body, data.load_mocap(True, False), 4, 16, labels="all").batch(0)
    flipped = datasets.flip_batch(batch)
    M = torch.tensor([-1.0, 1, 1])
    left, right = KEYPOINT_NAMES.index("left_wrist"), KEYPOINT_NAMES.index("right_wrist")
    close(flipped.keypoints3d[:, left], batch.keypoints3d[:, right] * M, 0, "left becomes right")
    close(hmr.project(flipped.keypoints3d, flipped.cam), flipped.keypoints2d, 1e-5,
          "2D, 3D and camera must still agree: x -> -x everywhere, tx too")
    pose = torch.tensor(Rotation.from_matrix(batch.rotmats.flatten(0, 1).numpy()).as_rotvec())
    expected = batch_rodrigues(data.mirror_pose(pose.view(4, 24, 3)).float())
    close(flipped.rotmats, expected, 1e-5, "matrices and axis-angles must flip alike")
    again = datasets.flip_batch(flipped)
    assert all(torch.equal(x, y) for x, y in zip(again, batch)), "twice is the identity"


def test_flipping_takes_picture_and_visibility_along(body):
    batch = data.SyntheticPeople(body, data.load_mocap(True, False), 4, 16).batch(0)
    flipped = datasets.flip_batch(batch)
    assert torch.equal(flipped.image, batch.image.flip(-1)), "labels flipped, the picture not"
    for i, name in enumerate(KEYPOINT_NAMES):
        assert torch.equal(flipped.visible[:, i], batch.visible[:, FLIP_KEYPOINTS[i]]), \
            f"{name}: visibility must change sides with its point"
    one = batch._replace(has_3d=torch.eye(19)[:4])                    # four right ones are labelled
    assert datasets.flip_batch(one).has_3d.argmax(1).tolist() == [5, 4, 3, 2], "has_3d as well"


def test_cropping_keeps_picture_and_points_together():
    image = torch.zeros(3, 90, 120)
    keypoints = torch.zeros(19, 2)
    visible = torch.zeros(19)
    for k, (x, y) in enumerate([(30, 20), (60, 70), (45, 50)]):
        image[:, y - 2:y + 3, x - 2:x + 3] = 1                        # centred on x + .5, y + .5
        keypoints[k], visible[k] = torch.tensor([x + 0.5, y + 0.5]), 1
    for kwargs in ({}, dict(shift=(15, -20)), dict(zoom=1.2), dict(zoom=0.8, shift=(-20, 20))):
        crop, points = datasets.crop_person(image, keypoints, visible, 224, **kwargs)
        assert crop.shape == (3, 224, 224)
        for x, y in ((points[:3] + 1) * 112).tolist():
            assert crop[0, int(y), int(x)] > 0.9, f"{kwargs}: a keypoint left its spot"
    with pytest.raises(ValueError, match="at least 2"):
        datasets.crop_person(image, keypoints, visible * 0)
    with pytest.raises(ValueError, match="at least 5 pixels"):
        datasets.crop_person(image, keypoints * 0, visible)


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
# ablate.py


def test_the_whole_discriminator_is_as_large_and_weighs_as_much():
    D = ablate.WholeDiscriminator()
    count = sum(p.numel() for p in D.parameters())
    assert count == 1_807_702 and abs(count / 1_807_619 - 1) < 1e-3, "only the form may differ"
    R, betas = torch.randn(4, 23, 3, 3), torch.randn(4, 10)
    x = torch.cat([betas, R.reshape(4, 207)], 1)
    expected = D.fc3(D.fc2(D.fc1(x).relu()).relu())
    close(D(R, betas), expected.expand(4, 25), 1e-6, "two hidden layers, one opinion")


ABLATIONS = [                  # every two values of two flags meet at least once
    "--no-paired --no-adv --iterations 1 --plain --depth 34",
    "--no-paired --iterations 3 --depth 18",
    "--no-paired --iterations 2 --depth 34",
    "--no-adv --iterations 3 --depth 34",
    "--no-adv --iterations 2 --plain",
    "--paired --iterations 1 --depth 34",
    "--iterations 1 --depth 18 --no-paired --no-plain",
    "--iterations 3 --plain --depth 18",
    "--no-paired --no-adv --iterations 3 --plain --depth 18",
    "--no-paired --iterations 2 --plain --depth 34"]


@pytest.mark.parametrize("flags", ABLATIONS)
def test_flags_of_the_ablations_work_together(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "finish", lambda *run: train.overlays(run[0], run[2]))
    given, _ = train.parse(argparse.ArgumentParser(), flags.split())
    config = tiny(**{**given, "out": tmp_path / "run", "steps": 2})
    picture = train.train(config)
    assert picture.isfinite().all()
    header, row = (tmp_path / "run" / "log.csv").read_text(encoding="utf-8").split()
    row = dict(zip(header.split(","), map(float, row.split(","))))
    assert all(map(math.isfinite, row.values())) and row["L_kp"] > 0, row
    assert (row["L_joints"] > 0) == (row["L_smpl"] > 0) == config.paired, "--no-paired: 2D only"
    for name in ("L_adv", "loss_D", "D_real", "D_fake"):
        assert (row[name] != 0) == config.adv, f"{name} {row[name]}: --no-adv leaves D out"
    total = 60 * (row["L_kp"] + row["L_joints"] + row["L_smpl"]) + row["L_adv"]
    close(row["loss_E"], total, 1e-3, "Eq. (1) with what is left")


TINY = ["--device", "cpu", "--size", "32", "--width", "8", "--batch", "4", "--steps", "2",
        "--eval-pictures", "4"]


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:          # Pillow, which comes with torchvision
        return image.size                                             # width, height


def test_the_ablation_goes_on_after_an_interruption(tmp_path, monkeypatch, capsys):
    out, steps, batch = tmp_path / "ablation", [], data.SyntheticPeople.batch
    command = ["paper", *TINY, "--log-every", "1", "--variants", "paired+adv,neither", "--out",
               str(out)]
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)

    def noted(world, step):
        if world.batch_size == 4:                                     # training's, not evaluation's
            steps.append((world.labels, step))
            if len(steps) == 4:
                signal.raise_signal(signal.SIGINT)
        return batch(world, step)
    monkeypatch.setattr(data.SyntheticPeople, "batch", noted)
    assert ablate.main(command) == 130
    assert "same command" in capsys.readouterr().err
    assert weights_of(out / "neither_seed0")["step"] == 1, "interrupted, and saved"
    assert "paired+adv,0,iteration 3" in (out / "ablation.csv").read_text(), "what there is so far"
    assert ablate.main(command) == 0
    assert steps == [("half", 0), ("half", 1), ("2d", 0), ("2d", 1), ("2d", 1)], \
        "the interrupted step is made again, no other twice"
    assert "neither, seed 0: run 2 of 2" in capsys.readouterr().out

    rows = [r.split(",") for r in (out / "ablation.csv").read_text().split("\n")[:-1]]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in
             (out / "ablation.md").read_text(encoding="utf-8").split("\n") if line.startswith("|")]
    for name in ("paired+adv", "neither"):
        metrics = json.loads((out / f"{name}_seed0" / "metrics.json").read_text(encoding="utf-8"))
        (row,) = [r for r in rows if r[0] == name and r[2] == "iteration 3"]
        (line,) = [cells for cells in table[1:] if cells[0] == name and cells[1] != "MPJPE mm"]
        for n, (key, _) in enumerate(train.MEASURES):
            close(float(row[3 + n]), metrics[key], 1e-9, f"{key} in the CSV file")
            assert line[1 + n] == f"{metrics[key]:.1f}", f"{key} in the table"
        assert (line[-1] == "") == (name == "neither"), "an untrained D has no opinion"
    assert size_of(out / "ablation.png") == (5 * 224, 5 * 224 + 32), "input, 2 x 2; 5 pictures"
    assert size_of(out / "iterations.png") == (9 * 224, 5 * 224 + 32), "Theta-bar, T = 1, 2, 3"

    for flags, sentence in ((["--steps", "3"], "--steps 2, now it is 3"),
                            (["--lr-d", "0.5"], "--lr-d"), (["--variants", "adv,all"], "'all'"),
                            (["--no-adv"], "--adv"), (["--seeds", "0"], "--seeds"),
                            (["--variants", ""], "none of the variants")):
        assert ablate.main([*command, *flags]) == 2, flags
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1, error
    assert len(steps) == 5, "a refused command trains nothing"


def test_the_ablations_spread_is_over_seeds(tmp_path):
    configs = {}
    for seed, mpjpe in ((0, 100.0), (1, 110.0)):
        configs["T=1", seed] = config = tiny(tmp_path / f"T=1_seed{seed}", iterations=1, seed=seed)
        body = {key: mpjpe for key, _ in train.MEASURES}
        Path(config.out).mkdir()
        (Path(config.out) / "metrics.json").write_text(json.dumps(
            {"truth": body, **dict.fromkeys(train.GUESSES, body), "per_iteration": [body],
             "measured_on": "held-out clips", "seconds": 1.0, "config": {}, "device": "none",
             "torch": "0", "precision": "float32",
             "heads": {"real": [0.5, 0.7], "fake": [0.25, 0.25]}}))
    ablate.ablation_tables(tmp_path, configs)
    text = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert "| T=1 | 105.0 ± 7.1 |" in text, f"sample standard deviation of 100 and 110: {text}"
    assert "| 0.60 | 0.25 |" in text and "seeds 0, 1" in text
    for config in configs.values():             # as after --no-adv: no heads, and no word about it
        path = Path(config.out) / "metrics.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items()
                                    if k != "heads"}))
    ablate.ablation_tables(tmp_path, configs)
    assert "105.0 ± 7.1" in (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert "nan" not in (tmp_path / "ablation.md").read_text(encoding="utf-8")


def test_degradation_measures_four_networks(tmp_path, body):
    out = tmp_path / "runs"
    assert ablate.main(["degradation", *TINY, "--variants", "plain-18,ResNet-34", "--log-every",
                       "1", "--out", str(out)]) == 0
    rows = [r.split(",") for r in (out / "degradation.csv").read_text(encoding="utf-8").split()]
    assert [r[:3] for r in rows[1:]] == [[n, "0", s] for n in ("plain-18", "ResNet-34")
                                         for s in "12"]
    text = (out / "degradation.md").read_text(encoding="utf-8")
    assert f"| plain-18 | {float(rows[2][3]):.2f} |" in text, "loss of the last 10 % of the steps"
    kept = out / "plain-18_seed0" / "probe.json"
    of, (before, after), layers = json.loads(kept.read_text(encoding="utf-8"))
    assert before > 0 and after > 0 and before != after
    assert len(layers) == 16, "18 layers less the first and the last are 3x3"
    assert len(json.loads((out / "ResNet-34_seed0" / "probe.json").read_text())[2]) == 32
    checkpoint = weights_of(out / "plain-18_seed0")
    config = train.Config(**checkpoint["config"])
    kept.write_text(json.dumps([of + 1, [0, 0], []]))
    assert ablate.probe(config)[1] == layers, "the numbers of an earlier run in this folder"
    assert config.plain and not config.adv and config.depth == 18
    model, _, _ = train.load(out / "plain-18_seed0" / "checkpoint.pt", device="cpu")
    with torch.no_grad():
        image = next(train.evaluation_pictures(config, body)).image
        e = model.encoder
        x = e.bn1(e.conv1((image - model.mean) / model.std)).relu()
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        block = e.layer1[0]
        first = block.bn1(block.conv1(x))
        second = block.bn2(block.conv2(first.relu()))
    # the same operations in another order: relative to deviations of about 1
    close(layers[:2], [first.std(), second.std()], 1e-4,
          "after BN, before ReLU, in eval mode, in float32 whatever the training's precision")
    assert size_of(out / "degradation.png") == (2 * 640, 420)
    assert ablate.main(["degradation", *TINY, "--adv", "--out", str(tmp_path / "x")]) == 2


def test_a_chart_has_its_lines_where_they_belong():
    chart = ablate.draw_chart("t", "x", [("up", "#ff0000", 3, [0, 10], [0, 10])])
    red = (chart[0] > 0.8) & (chart[1:] < 0.2).all(0)                 # (H, W)
    row, column = red[:, :490].nonzero(as_tuple=True)                 # left of the legend
    slope = -(row.max() - row.min()) / (column.max() - column.min())
    assert len(row) > 300 and column.min() < 70 and row.max() > 360, "from the lower left corner"
    close(slope, -(370 - 35) / (625 - 60), 0.03, "straight to the upper right one")


def test_a_whole_discriminator_trains_in_place_of_the_25(tmp_path):
    assert ablate.main(["paper", *TINY, "--variants", "whole", "--out", str(tmp_path)]) == 0
    checkpoint = weights_of(tmp_path / "whole_seed0")
    weights = checkpoint["discriminator"]
    assert len(weights) == 6, "the variant's D must be the one that trains"
    assert weights["fc1.bias"].any(), "its biases start at 0: D has not learnt"
    assert ablate.main(["paper", *TINY, "--variants", "paired+adv", "--steps", "1", "--out",
                        str(tmp_path / "other")]) == 0
    first = [row.split(",")[1:5] for folder in ("whole_seed0", "other/paired+adv_seed0")
             for row in (tmp_path / folder / "log.csv").read_text().split()[1:]]
    assert first[0][1:] != first[1][1:]         # the means of two steps, and of one


def test_monstrosity_is_0_for_recorded_bodies_and_100_for_absurd_ones(body):
    config = tiny(Path("x"))
    recorded = train.recorded_rotations(config, "cpu")
    assert recorded.shape == (2 * len(data.load_mocap(True, False)), 23, 9)

    def measure(pose, betas):
        rotmats = batch_rodrigues(pose)
        result = train.monstrosity(hmr.HMROutput(rotmats, betas, *[None] * 5), recorded)
        return {key: value.mean().item() for key, value in result.items()}
    pose = data.load_mocap(True, False)[::50].clone()
    for known in (pose, data.mirror_pose(pose)):
        known[:, 0] = torch.randn(len(known), 3)                      # any root
        close(list(measure(known, torch.full((len(known), 10), -2.9)).values()), [0.0] * 3, 0.1,
              "a recorded frame, its mirror image, a believable shape")     # acos near 1: 0.04
    world = data.SyntheticPeople(body, data.load_mocap(True, False), 4, 4)
    mixed = world.poses(500, torch.Generator().manual_seed(0))
    assert measure(mixed, torch.zeros(500, 10))["outside"] == 0, "what D calls real is in range"
    absurd = measure(torch.full((3, 24, 3), 1.8), torch.full((3, 10), -3.1))
    assert absurd["outside"] == 100 and absurd["beta3"] == 100 and absurd["mocap"] > 90, absurd
    pose[:, 4, 0] -= 1.7             # left knees: the leg before them, by nearly a right angle
    bent = measure(pose, torch.zeros(len(pose), 10))
    close(bent["outside"], 100 / 23, 2.0, "one joint of 23")
    truth = [batch.rotmats for batch in train.evaluation_pictures(tiny(Path("x"), size=32,
             eval_pictures=256), body)]
    outside = train.monstrosity(hmr.HMROutput(torch.cat(truth), torch.zeros(256, 10), *[None] * 5),
                                recorded)["outside"]
    assert outside.mean() < 2, f"{outside.mean()} % of true, held-out rotations are called absurd"


# ============================================================================================
# bench.py


def test_the_bench_times_the_loop_that_trains(tmp_path, body, capsys, monkeypatch):
    """The bench builds train()'s step up from its parts; its last stage must leave its weights."""
    config = tiny(tmp_path / "run", steps=2, dropout=0.5, weight_kp=3.0, weight_smpl=7.0, seed=3)
    monkeypatch.setattr(train, "finish", lambda *args: {})
    train.train(config)
    kept, build, Discriminator = [], train.build, bench.Discriminator
    monkeypatch.setattr(train, "build", lambda *args: kept.append(build(*args)) or kept[-1])
    monkeypatch.setattr(bench, "Discriminator", lambda: kept.append(Discriminator()) or kept[-1])
    steps = bench.bench_steps(config, body)
    for _ in range(config.steps):
        steps[bench.STAGES[-1]]()
    trained = weights_of(tmp_path / "run")
    for name, timed in zip(("model", "discriminator"), kept):
        for key, value in timed.state_dict().items():
            assert torch.equal(value, trained[name][key]), f"{name}, {key}: bench, train() differ"
    capsys.readouterr()
    flags = ["--device", "cpu", "--depth", "18", "--width", "8", "--size", "33", "--batch", "4",
             "--out", str(tmp_path / "unused")]
    assert bench.main(["step", "--rounds", "1", *flags]) == 0
    table = capsys.readouterr().out
    assert all(stage in table for stage in bench.STAGES) and table.count("1.00") >= 3
    assert "peak memory" in table and "medians of 1 rounds" in table
    assert not (tmp_path / "unused").exists(), "a bench leaves no run behind"


def test_the_growth_is_a_row_for_each_setting(monkeypatch, capsys):
    def no_steps(config, smpl):
        return dict.fromkeys(bench.STAGES, lambda: sizes.append(len(smpl.v_template)))
    sizes = []
    monkeypatch.setattr(bench, "bench_steps", no_steps)
    assert bench.main(["grow", "--small", "--device", "cpu", "--rounds", "2"]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-16:]]
    assert [value for name, value in rows if name == "batch"] == ["1", "4", "16", "64", "256"]
    assert {name for name, _ in rows} == {"batch", "size", "depth", "vertices"}
    # two rounds to warm up, two that count, of the first stage and the last
    assert sizes.count(6890) == 2 * (2 + 2) and sizes.count(1229) == 15 * 2 * (2 + 2)


def test_the_benchs_large_body_is_the_body(body):
    large = bench.with_vertices(SMPL(), 6890)
    betas, pose = torch.randn(2, 10), 0.3 * torch.randn(2, 72)
    a, b, few = body(betas, pose), large(betas, pose), large(betas, pose, vertices=False)
    assert b.vertices.shape == (2, 6890, 3) and large.faces.shape == (5 * 2454, 3)
    # float32 sums over thousands of vertices: 10 micrometres
    close(b.keypoints, a.keypoints, 1e-5, "keypoints come from the first layer of skin")
    close(few.keypoints, a.keypoints, 1e-5, "and so do those of the keypoints-only body")
    close(b.vertices[:, 1229:2458], a.vertices, 1e-5, "the second layer lies on the first")


def test_the_benchs_textbook_is_smpl_in_value_and_gradient(tmp_path):
    bench.official_sized(tmp_path / "random.npz", V=400)
    smpl = SMPL(tmp_path / "random.npz").double()
    posedirs = smpl.posedirs.flatten(0, 1).T
    inputs = [torch.randn(3, 10).double(), batch_rodrigues(torch.randn(3, 24, 3).double())]
    inputs = [x.requires_grad_() for x in inputs]
    outputs = [smpl(*inputs), bench.textbook(smpl, posedirs, *inputs)]
    weights = [torch.randn_like(x) for x in outputs[0]]
    gradients = [torch.autograd.grad(out, inputs, weights) for out in outputs]
    for name, ours, its in zip(("vertices", "joints", "keypoints"), *outputs):
        close(its, ours, 1e-12, f"{name}: the bench times something else")
    for name, ours, its in zip(("betas", "rotmats"), *gradients):
        close(its / ours.abs().max(), ours / ours.abs().max(), 1e-12, f"gradient to {name}")


def test_the_bench_prints_every_way_and_reports_bad_input_in_a_sentence(capsys, monkeypatch):
    sized = bench.official_sized
    monkeypatch.setattr(bench, "official_sized", lambda path: sized(path, V=40))
    assert bench.main(["smpl", "--rounds", "1"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 16 and all(len(row.split()) in (8, 10) for row in rows), rows
    for arguments, sentence in [
            (["step", "--rounds", "0"], "--rounds 0: expected at least 1"),
            (["step", "--small", "--steps", "5"], "give --rounds"),
            (["grow", "--small", "--no-adv"], "--no-adv"),
            (["smpl", "--small"], "--small"), (["smpl", "--batch", "4"], "--batch"),
            (["step", "--small", "--smpl", "absent.pkl", "--device", "cpu"], "absent.pkl")]:
        assert bench.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert sentence in error and error.startswith("appendix.bench: "), error
        assert error.count("\n") == 1, error
    for arguments in ([], ["nice"], ["step", "--rounds", "few"], ["step", "--smal"],
                      ["step", "--resume"]):
        with pytest.raises(SystemExit) as stop:
            bench.main(arguments)
        assert stop.value.code == 2, arguments


def test_peak_memory_is_told_where_the_system_tells_it(monkeypatch):
    assert bench.peak_memory(torch.device("cpu")) > 2 ** 20 or sys.platform == "win32"
    monkeypatch.setitem(sys.modules, "resource", None)                # as on Windows
    assert bench.peak_memory(torch.device("cpu")) != bench.peak_memory(torch.device("cpu")), "NaN"


# ============================================================================================
# Several processes, and a GPU


def one_process(rank: int, ranks: int, folder: str) -> None:
    """Run train()'s first step on this rank's part of a fixed batch; keep the gradients it leaves.

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


def test_two_processes_learn_what_one_learns_from_the_joined_batch(tmp_path, monkeypatch):
    """A whole step of train(), E's and D's: L_adv through a wrapped D that is frozen, too."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")                    # no name to look up
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    one_process(0, 1, str(tmp_path / "one"))
    torch.multiprocessing.spawn(one_process, (2, str(tmp_path / "two")), nprocs=2)
    one = torch.load(tmp_path / "one" / "rank0.pt", weights_only=True)
    for rank in (0, 1):
        two = torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True)
        assert one.keys() == two.keys() and {key[0] for key in one} == {"E", "D"}
        for key in one:                       # float64: only the order of sums differs
            close(two[key], one[key], 1e-6 * one[key].abs().max().item(),
                  f"{key}, rank {rank}: are the gradients averaged, once, of E and of D?")
    rows = [dict(zip(*(line.split(",") for line in (tmp_path / f / "run" / "log.csv").read_text()
                       .split()))) for f in ("one", "two")]
    for column in train.Log.COLUMNS[1:10]:
        close(float(rows[1][column]), float(rows[0][column]), 2e-5 * abs(float(rows[0][column])),
              f"{column}: the log must show the joined batch's losses (6 digits are written)")
    a, b = (weights_of(tmp_path / f / "run") for f in ("one", "two"))
    assert a["model"].keys() == b["model"].keys() and \
        a["discriminator"].keys() == b["discriminator"].keys(), "saved as `module.`?"


def test_torchrun_trains_and_one_process_goes_on(tmp_path):
    out = str(tmp_path / "run")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                str(HERE / "train.py"), "--small", "--device", "cpu", "--width", "8", "--size",
                "32", "--steps", "2", "--eval-pictures", "2", "--log-every", "1", "--schedule",
                "constant", "--out", out]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*torchrun, "--batch", "4"], env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss_E") == 1, "rank 0 alone prints"
    assert train.main(["--resume", "--out", out, "--steps", "3", "--device", "cpu"]) == 0
    measured = (tmp_path / "run" / "metrics.json").read_bytes()
    assert train.main(["--resume", "--out", out, "--eval-pictures", "2", "--device", "cpu"]) == 2
    assert (tmp_path / "run" / "metrics.json").read_bytes() == measured, "a finished run stays"
    rows = (tmp_path / "run" / "log.csv").read_text(encoding="utf-8").split()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3"]
    assert weights_of(tmp_path / "run")["opt_E"]["state"][0]["step"] == 3, "Adam starts again?"


def test_several_processes_share_the_batch_evenly(monkeypatch):
    monkeypatch.setattr(train, "rank_and_ranks", lambda: (1, 4))
    config = train.make_config({}, {"size": 32, "batch": 12})
    assert train.training_world(config, SMPL()).batch_size == 3
    for batch in (10, 4):
        with pytest.raises(ValueError, match="--batch .* 2 or more pictures for each of 4"):
            train.make_config({"batch": batch}, {})


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
    # "meta" has no random generators
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


def test_everything_runs_where_its_inputs_are():
    """On "meta", a device that only checks shapes and devices: what a GPU would complain about."""
    model, D = HMR(SMPL(), depth=18, width=8).to("meta"), Discriminator().to("meta")
    body, pose = model.smpl, torch.zeros(2, 72, device="meta")
    thetas, out = model(torch.zeros(2, 3, 64, 64, device="meta"))
    visible, has = out.keypoints2d[..., 0], out.betas[:, 0]
    losses = (hmr.keypoint_loss(out.keypoints2d, out.keypoints2d, visible)
              + hmr.joints3d_loss(out.keypoints3d, out.keypoints3d, visible)
              + hmr.smpl_loss(out.rotmats, out.betas, out.rotmats, out.betas, has)
              + hmr.encoder_adversarial_loss(D(out.rotmats[:, 1:], out.betas)))
    assert losses.device.type == "meta" and body(out.betas, pose).vertices.device.type == "meta"
    assert data.mirror_pose(pose.view(2, 24, 3)).device.type == "meta"
    aligned = train.compute_similarity_transform(out.keypoints3d, out.keypoints3d)
    assert aligned.device.type == "meta"


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


def test_imagenet_weights_load_into_the_encoder(tmp_path):
    theirs = torchvision.models.resnet18(weights=None)
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    encoder = ResNet(18)
    train.load_pretrained(encoder, train.Config(depth=18,
                                                pretrained=str(tmp_path / "resnet18.pth")))
    assert torch.equal(encoder.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)


def test_a_fresh_start_at_the_rate_of_pretrained_weights_is_pointed_out(capsys):
    for given, is_said in (({"pretrained": "none"}, True), ({"pretrained": "x.pth"}, False),
                           ({"pretrained": "none", "lr": 1e-4}, False)):
        assert train.make_config(given, {}).lr == given.get("lr", 1e-5), "Sec. 3.4"
        assert ("1e-4 a fresh start" in capsys.readouterr().out) == is_said


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


def test_the_defaults_say_where_and_in_which_precision_they_run():
    config = train.settle(train.Config())
    assert config.out == "runs/full" and "auto" not in (config.device, config.amp)
    assert train.settle(config) == config


def test_importing_the_chapters_runs_nothing_and_needs_no_appendix():
    code = ("import sys; sys.argv = ['x', '--nonsense']; import smpl, hmr, data, train; "
            "assert 'appendix' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stderr


def test_no_chapter_imports_a_later_one():
    order = ["smpl", "hmr", "data", "train", "appendix", "test_hmr"]
    for n, name in enumerate(order[:4]):
        text = (HERE / f"{name}.py").read_text(encoding="utf-8")
        imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.M))
        assert not imported & set(order[n:]), f"{name}.py imports {imported & set(order[n:])}"


# ============================================================================================
# On a GPU

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
    out, common = str(tmp_path / "run"), ["--save-every", "1", "--eval-pictures", "64"]
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
# Bad input, and the commands that README shows


def test_a_run_is_never_overwritten_and_bad_input_is_a_sentence(tmp_path, capsys):
    out = tmp_path / "run"
    (out).mkdir()
    (out / "log.csv").write_text("mine")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"a": 1}, tmp_path / "other.pt")
    torch.save({1: 2}, tmp_path / "numbers.pt")
    settings = dataclasses.asdict(train.Config()) | {"size": "a"}
    torch.save({key: settings for key in ("model", "discriminator", "opt_E", "opt_D", "config",
                                          "step", "body", "rng", "seconds")}, tmp_path / "types.pt")
    small = ["--small", "--device", "cpu"]
    for arguments, sentence in [
            ([*small, "--out", str(out)], "--resume"),
            ([*small, "--resume", "--out", str(tmp_path / "no")], "no such file"),
            (["--eval", str(tmp_path / "junk.pt")], "not a readable checkpoint"),
            (["--eval", str(tmp_path / "other.pt")], "not a checkpoint of this version"),
            (["--eval", str(tmp_path / "junk.pt"), "--small"], "--small"),
            ([*small, "--batch", "1", "--out", str(tmp_path / "x")], "--batch"),
            ([*small, "--seed", "-1", "--out", str(tmp_path / "x")], "--seed"),
            ([*small, "--lr-d", "nan", "--out", str(tmp_path / "x")], "--lr-d"),
            ([*small, "--out", str(tmp_path / "junk.pt" / "x"), "--steps", "1", "--batch", "2"],
             "Not a directory"),
            ([*small, "--dropout", "1.5", "--out", str(tmp_path / "x")], "--dropout"),
            ([*small, "--smpl", "absent.pkl", "--out", str(tmp_path / "y")], "absent.pkl"),
            ([*small, "--lr", "inf", "--out", str(tmp_path / "y")], "below"),
            ([*small, "--size", "1000000000", "--out", str(tmp_path / "y")], "--size smaller"),
            (["--eval", str(tmp_path)], "a folder; expected a checkpoint"),
            (["--eval", str(tmp_path / "numbers.pt")], "not a checkpoint of this version"),
            (["--eval", str(tmp_path / "types.pt")], "not a checkpoint of this version"),
            ([*small, "--pretrained", str(tmp_path / "numbers.pt"), "--out", str(tmp_path / "z")],
             "--pretrained"),
            ([*small, "--pretrained", str(tmp_path / "other.pt"), "--out", str(tmp_path / "z")],
             "--pretrained")]:
        assert train.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert sentence in error and "Traceback" not in error and error.count("\n") == 1, error
    assert (out / "log.csv").read_text(encoding="utf-8") == "mine"
    for arguments in (["--smal"], ["--lr", "fast"], ["--depth", "19"], ["--look", "nice"]):
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
        assert stop.value.code == 2


SHORT = ["--small", "--width", "8", "--batch", "2", "--size", "32", "--eval-pictures", "1",
         "--log-every", "1", "--schedule", "constant", "--device", "cpu"]


def test_nothing_that_is_not_finite_replaces_a_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    out = tmp_path / "run"
    assert train.main([*SHORT, "--rotation", "axis-angle", "--no-adv", "--lr", "1",
                       "--steps", "4", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert re.search(r"model after step 2.encoder\S+ holds NaN or infinity; lower --lr 1", error)
    checkpoint = train.load_checkpoint(out / "checkpoint.pt")         # raises if it is not finite
    assert checkpoint["step"] == 1
    # weights may be finite and bodies not: one sentence, no traceback from the measures' SVD
    assert train.main(["--eval", str(out / "checkpoint.pt"), "--eval-pictures", "2"]) == 2
    error = capsys.readouterr().err
    assert "bodies are not finite" in error and error.count("\n") == 1


@pytest.mark.parametrize("part", ["model", "discriminator", "opt_E", "opt_D"])
def test_every_part_of_a_checkpoint_is_looked_at(part, tmp_path, body):
    config = tiny(tmp_path / "run", steps=1)
    train.train(config)
    path = tmp_path / "run" / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    last = [leaf for leaf in tree_leaves(content[part])
            if isinstance(leaf, Tensor) and leaf.is_floating_point()][-1]
    last.view(-1)[-1] = math.nan
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"{part}\S* holds NaN"):
        train.load_checkpoint(path)


def test_pretrained_weights_that_are_not_finite_are_refused(tmp_path):
    weights = torchvision.models.resnet18(weights=None).state_dict()
    weights["layer1.0.bn1.running_var"][3] = math.nan     # trains with finite losses
    torch.save(weights, tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match="layer1.0.bn1.running_var holds NaN"):
        train.load_pretrained(ResNet(18), train.Config(
            depth=18, pretrained=str(tmp_path / "resnet18.pth")))


def test_metrics_json_is_strict_json_or_is_not_written(tmp_path, monkeypatch):
    measured = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: measured(*args) | {"mpjpe": math.inf})
    with pytest.raises(ValueError, match="JSON"):
        train.train(tiny(tmp_path / "run", steps=1))
    assert (tmp_path / "run" / "checkpoint.pt").is_file()
    assert not (tmp_path / "run" / "metrics.json").exists(), "Infinity is no JSON"


def test_missing_imagenet_weights_end_in_what_went_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    config = train.Config(depth=18)
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"

    def says(words):
        with pytest.raises(ValueError, match=words) as error:
            train.load_pretrained(ResNet(18), config)
        assert "--pretrained FILE or none" in str(error.value)
    for error in (urllib.error.URLError("no host"), ConnectionResetError(), TimeoutError()):
        def unreachable(*args, error=error, **options):
            raise error
        monkeypatch.setattr(torch.hub, "urlopen", unreachable)
        says("no network to reach https://")
    file.write_bytes(b"half a file")                                  # hub made the folder
    says(f"{re.escape(str(file))} is cut or not what its name says; delete it")
    file.unlink(), file.parent.rmdir(), file.parent.write_bytes(b"")  # a folder that is none
    says(f"{re.escape(str(file))} cannot be read or written")


def test_no_terminal_ends_a_run(tmp_path):
    command = [sys.executable, str(HERE / "train.py"), *SHORT, "--steps", "1"]
    done = subprocess.run([*command, "--out", "L\u00e4ufe"], cwd=tmp_path, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"L\\xe4ufe" in done.stdout, done.stderr.decode()
    reading, writing = os.pipe()
    os.close(reading)                                                 # nobody reads
    done = subprocess.run([*command, "--out", "piped"], cwd=tmp_path, stdout=writing,
                          stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "piped" / "metrics.json").is_file()


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
    model, points, seen = HMR(body, 18, width=8), torch.rand(19, 2) * 9, torch.ones(19)
    for wrong in (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(3, 32, 32)):
        with pytest.raises(ValueError, match="divide bytes by 255"):
            model(wrong)
    for wrong in (torch.zeros(3, 9, 9, dtype=torch.uint8), torch.zeros(9, 9, 3)):
        with pytest.raises(ValueError, match="colours first"):
            datasets.crop_person(wrong, points, seen)
    for pose, betas in ((torch.zeros(1, 72).half(), torch.zeros(1, 10)),
                        (torch.zeros(1, 72), torch.zeros(1, 10).bfloat16())):
        with pytest.raises(ValueError, match="float32 or float64"):
            body(betas, pose)


@pytest.mark.parametrize("hidden", [math.nan, math.inf])
def test_a_crop_does_not_depend_on_what_is_not_labelled(hidden):
    image, points, seen = torch.rand(3, 80, 60), 20 + 30 * torch.rand(19, 2), torch.ones(19)
    seen[4], points[4] = 0, hidden
    crop, moved = datasets.crop_person(image, points, seen)
    assert crop.isfinite().all() and moved[4].tolist() == [0, 0] and moved.isfinite().all()


def test_out_is_tried_before_the_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "train_step", None)        # would fail at the first step
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below"):
        assert train.main([*SHORT, "--steps", "1", "--out", str(tmp_path / out)]) == 2
        assert "checkpoint.pt: cannot be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_body_file_that_moved_is_asked_for(tmp_path, capsys):
    run, old, new = str(tmp_path / "run"), tmp_path / "old.npz", tmp_path / "new.npz"
    old.write_bytes(OPEN_BODY.read_bytes())
    assert train.main([*SHORT, "--steps", "1", "--smpl", str(old), "--out", run]) == 0
    old.rename(new)
    measure, go_on = ["--eval", f"{run}/checkpoint.pt"], ["--resume", "--out", run, "--steps", "2"]
    for command in (measure, go_on):
        assert train.main(command) == 2
        assert "old.npz: no such file; expected a body file; give --smpl" in capsys.readouterr().err
        assert train.main([*command, "--smpl", str(new), "--eval-pictures", "1"]) == 0


def test_words_from_the_command_line_do_not_steer_the_terminal(tmp_path, capsys):
    for main in (lambda name: smpl.main(["--smpl", name]),
                 lambda name: train.main(["--eval", name])):
        assert main(str(tmp_path / "a\x1b[2K\rb.pkl")) == 2
        error = capsys.readouterr().err
        assert "a\\x1b[2K\\rb.pkl" in error and "\x1b" not in error and "\r" not in error


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


def readme_commands() -> list[str]:
    text = (HERE / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", text, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("python ")]


def test_readmes_commands_run(tmp_path, monkeypatch):
    commands = readme_commands()
    for script in ("smpl.py", "hmr.py", "data.py", "train.py --small"):
        assert any(script in c for c in commands), f"README must show {script}"
    monkeypatch.chdir(tmp_path)
    mains = {"smpl.py": smpl.main, "hmr.py": hmr.main, "data.py": data.main}
    for command in dict.fromkeys(commands):
        _, script, *arguments = shlex.split(command)
        if "FILE" in command or script == "-m":
            continue                          # needs the licensed body; long, and tested elsewhere
        if "--help" in command:
            with pytest.raises(SystemExit):
                train.main(["--help"])
            continue
        if script in mains:
            assert mains[script](arguments) == 0, command
            continue
        short = ["--device", "cpu", "--steps", "2", "--batch", "2", "--eval-pictures", "2"]
        if "--small" not in command:
            short += ["--size", "32", "--depth", "18", "--width", "8", "--pretrained", "none"]
        if "--eval" in command:
            short = ["--device", "cpu"]
        if "--resume" in command:             # the run above is finished
            assert train.main(arguments) == 2
            continue
        if "--overfit" in command:
            short += ["--out", "runs/overfit"]
        assert train.main([*arguments, *short]) == 0, command
    metrics = json.loads((tmp_path / "runs/small/metrics.json").read_text(encoding="utf-8"))
    keys = {key for key, _ in train.MEASURES}
    assert keys | {"per_iteration", *train.GUESSES, "truth", "measured_on", "heads", "seconds",
                   "images", "device", "precision", "torch", "seed", "config"} == set(metrics)
    assert set(metrics["baseline"]) == keys and len(metrics["per_iteration"]) == 3
    assert (tmp_path / "runs/small/picture.png").is_file()
