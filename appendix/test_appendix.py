"""The chapters under stress: body, renderer, crops, processes, devices, bad input, README.

test_hmr.py tests the formulas, test_train.py recorded steps and broken checkpoints.
"""

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from scipy.spatial.transform import Rotation
from torch import Tensor

import data
import hmr
import smpl
import train
from appendix import datasets
from appendix.test_train import HERE, SHORT, gpu, quick_guesses  # noqa: F401 (a fixture)
from hmr import HMR, Discriminator, ResNet
from smpl import FLIP_KEYPOINTS, JOINT_NAMES, KEYPOINT_NAMES, OPEN_BODY, SMPL, batch_rodrigues
from test_hmr import (body, close, golden,  # noqa: F401 (fixtures)
                      precision_of_the_encoder, same_numbers_every_time, tiny)


# ============================================================================================
# The open body, the renderer

def test_the_open_body_is_a_person(body):
    assert OPEN_BODY.stat().st_size <= 2 ** 20, "a clone must stay small"
    v, J = body.v_template, body.J_regressor @ body.v_template
    kp = dict(zip(KEYPOINT_NAMES, body.cocoplus_regressor @ v))
    for name in ("weights", "J_regressor", "cocoplus_regressor"):
        matrix = getattr(body, name)
        assert matrix.min() >= 0, f"{name} must be non-negative"
        close(matrix.sum(1), torch.ones(len(matrix)), 1e-5, f"{name}: rows must sum to 1")
    close(J[0], torch.zeros(3), 5e-3, "the mean pelvis is the origin")
    assert J[JOINT_NAMES.index("left_wrist"), 0] > 0.4, "the person's left is +x"
    assert kp["head_top"][1] > kp["nose"][1] > kp["neck"][1] > kp["left_ankle"][1], "y is up"
    assert kp["nose"][2] > kp["left_ear"][2], "the face looks along +z"
    assert kp["left_eye"][0] > 0 > kp["right_eye"][0], "the face's left and right are swapped"
    close(J[16::2][:4, 1], J[16, 1].expand(4), 0.08, "a T-pose: the arm is level")
    # outward faces: the signed volume is the body's, some 70 litres
    a, b, c = v[body.faces].unbind(1)
    volume = (a * torch.linalg.cross(b, c)).sum() / 6
    assert 0.04 < volume < 0.11, f"{volume:.3f} m^3: faces must be counter-clockwise from outside"
    assert not body.state_dict(), "a licensed body must not travel in a checkpoint"


def plane(corners, z) -> Tensor:
    return torch.tensor([[*c, z] for c in corners], dtype=torch.float32)


def test_the_renderer_samples_pixel_centres():
    triangle = plane([(-0.9, -0.7), (-0.3, 0.8), (0.75, 0.1)], 1.0)[None]         # facing us
    face = data.rasterize(triangle, torch.tensor([[0, 1, 2]]), 16)[0]
    y, x = torch.meshgrid(*[torch.arange(16) + 0.5] * 2, indexing="ij")
    corners = (triangle[0, :, :2] + 1) * 8
    left_of = [(qx - px) * (y - py) - (qy - py) * (x - px) > 0        # of each side
               for (px, py), (qx, qy) in zip(corners, corners.roll(-1, 0))]
    assert torch.equal(face < 0, torch.stack(left_of).any(0)), "is a pixel's centre inside?"
    assert (data.rasterize(triangle, torch.tensor([[0, 2, 1]]), 16) < 0).all(), "a back face"


def test_the_nearer_triangle_wins_and_colours_are_those_of_pixel_centres():
    square = [(-2, -2), (-2, 2), (2, 2), (2, -2)]
    points = torch.cat([plane(square, 2.0), plane([(0, -2), (0, 2), (2, 2), (2, -2)], -1.0)])[None]
    faces = torch.tensor([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]])
    face = data.rasterize(points, faces, 8)[0]
    assert (face >= 0).all(), "a crack between two triangles"
    assert (face[:, :4] < 2).all() and (face[:, 4:] >= 2).all(), "z is AWAY from the camera"
    v = plane(square, 0)[None] / 2                              # brightness grows with x and y
    image = data.render(v, faces[:2], torch.tensor([[1.0, 0, 0]]), 8, torch.ones(2, 3),
                        torch.zeros(1, 3, 8, 8), torch.tensor([[0.0, 0, -1]]),
                        (v[..., 0] + 2 * v[..., 1] + 3) / 6)
    at = (torch.arange(8) + 0.5) / 8
    close(image[0], ((at + 2 * at[:, None]) / 3).expand(3, 8, 8), 1e-5,
          "colours are sampled at i + 0.5, as the silhouette is, and rows run down")


# ============================================================================================
# The crop of real pictures, the flip, the measure of monsters

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
    assert all(map(torch.equal, datasets.flip_batch(flipped), batch)), "twice is the identity"


def test_the_crop_has_the_official_size_and_jitter():
    image, keypoints, visible = torch.rand(3, 90, 120), 40 + 40 * torch.rand(19, 2), torch.ones(19)
    _, points = datasets.crop_person(image, keypoints, visible)
    low, high = 112 * points.amin(0), 112 * points.amax(0)
    close((high - low).norm(), 150.0, 1e-3, "with an ankle: the box's diagonal is 150 px of 224")
    close(high + low, torch.zeros(2), 1e-3, "the box's midpoint is the centre")
    _, moved = datasets.crop_person(image, keypoints, visible, shift=(20, 0), zoom=1.2)
    close(112 * (points - moved / 1.2), torch.tensor([20.0, 0]).expand(19, 2), 1e-3, "first the "
          "shift, in crop pixels, window right and person left; then the zoom about the centre")
    with pytest.raises(ValueError, match="at least 5 pixels apart"):
        datasets.crop_person(image, keypoints * 0, visible)
    with pytest.raises(ValueError, match="colours first"):
        datasets.crop_person(image.permute(1, 2, 0), keypoints, visible)


def test_the_crops_scale_is_the_official_codes(golden):
    for points, scale in zip(golden["scale_keypoints"], golden["out_scale_coco"]):
        # a norm and a quotient: a few roundings
        _, side = datasets.person_window(points[:, :2], points[:, 2])
        close(224 / side, scale, 1e-14 * scale.item(),
              f"{int((points[:, 2] > 0).sum())} points: ANY visible ankle: the box, else the torso")


def test_monstrosity_is_0_for_recorded_bodies_and_100_for_absurd_ones(body):
    recorded = train.recorded_rotations(tiny(Path("x")), "cpu")

    def measure(pose: Tensor, beta: float) -> list[float]:
        pose[:, 0] = torch.randn(len(pose), 3)                        # the root may be any
        of = hmr.HMROutput(batch_rodrigues(pose), torch.full((len(pose), 10), beta), *[None] * 5)
        return [x.mean().item() for x in train.monstrosity(of, recorded).values()]
    pose = data.load_mocap(True, False)[::50].clone()
    close(measure(data.mirror_pose(pose), -2.9), [0, 0, 0], 0.1, "recorded frames")   # acos: 0.04
    outside, mocap, beta3 = measure(torch.full((3, 24, 3), 1.8), -3.1)
    assert outside == beta3 == 100 and mocap > 90, (outside, mocap, beta3)
    pose[:, 4, 0] -= 1.7             # left knees: the leg before them, by nearly a right angle
    close(measure(pose, 0)[0], 100 / 23, 2.0, "one joint of 23 is outside")


# ============================================================================================
# Several processes, a GPU

def keep_gradients(model, D, shown, log, world) -> dict:
    """A stand-in for train.finish, which rank 0 calls in the end."""
    torch.save({f"{name}.{key}": p.grad for name, network in (("E", model), ("D", D))
                for key, p in network.named_parameters()}, f"{log.config.out}/gradients.pt")
    return {}


# D stands still: L_adv comes after its step, and a rank alone would make another one.
ONE_STEP = [*SHORT, "--batch", "8", "--steps", "1", "--amp", "off", "--lr-d", "0", "--out"]


def test_two_processes_learn_what_one_learns_from_the_joined_batch(tmp_path, monkeypatch):
    """E's and D's gradients of one step are the mean of the two shares'; L_adv's come through a
    wrapped D that is frozen."""
    both, *alone = (tmp_path / name for name in ("both", "0", "1"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                "-m", "appendix.test_appendix", str(both)]
    done = subprocess.run(torchrun, cwd=HERE, capture_output=True, text=True, env=os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # the order of a sum depends on it
        "GLOO_SOCKET_IFNAME": "lo"})                      # no name to look up
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss_E") == 1, "rank 0 alone prints"
    monkeypatch.setattr(train, "finish", keep_gradients)
    for rank, folder in enumerate(alone):
        share = mock.patch.object(train, "rank_and_ranks", lambda: (rank, 2))(train.training_world)
        train.run([*ONE_STEP, str(folder)], share)
    grads, *shares = (torch.load(folder / "gradients.pt", weights_only=True)
                      for folder in (both, *alone))
    for key, grad in grads.items():             # float32: another order of sums
        mean = (shares[0][key] + shares[1][key]) / 2
        close(grad, mean, 1e-5 * mean.abs().max().item() + 1e-9,
              f"{key}: are the gradients averaged, once, of E and of D?")
    rows = [(folder / "log.csv").read_text().split()[1].split(",") for folder in (both, *alone)]
    for name, *numbers in zip(train.Log.COLUMNS[:10], *rows):
        x, a, b = map(float, numbers)           # six digits are written
        close(x, (a + b) / 2, 1e-5 * abs(x), f"{name}: the log must show the ranks' mean")
    # one process goes on with the run of two
    assert train.main(["--resume", "--out", str(both), "--steps", "3"]) == 0
    steps = [row.split(",")[0] for row in (both / "log.csv").read_text().split()]
    assert steps == ["step", "1", "2", "3"], "a row lost, or twice"


def test_a_step_never_waits_for_the_gpu(monkeypatch):
    """On "meta", whose tensors hold no numbers: .item(), a mask as an index and the like raise."""
    # "meta" has no random generators, and in PyTorch 2.14 no autocast
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(data.SyntheticPeople, "generator", lambda *_, **__: None)
    monkeypatch.setattr(data, "render", lambda *_: torch.zeros(4, 3, 32, 32, device="meta"))
    model, D = HMR(SMPL(), 18, 3, 8, rotation="6d").to("meta"), Discriminator().to("meta")
    world = data.SyntheticPeople(model.smpl, data.load_mocap(True, False), 4, 32, "hard")
    players = [torch.optim.SGD(net.parameters(), 1e-3) for net in (model, D)]
    losses = train.train_step(model, D, *players, world.batch(0), world.motion(12, 0), tiny("x"))
    assert all(loss.device.type == "meta" for loss in losses), "a loss was brought to the host"


def test_float32_is_float32_even_where_the_machine_allows_tf32(body, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)     # as PyTorch has it
    torch.set_float32_matmul_precision("high")            # as NVIDIA's containers have it
    train.build(tiny(Path("x")), body)
    assert torch.get_float32_matmul_precision() == "highest", "SMPL would be off by 1 mm"
    assert not torch.backends.cudnn.allow_tf32, "--amp off would not be float32 on a GPU"


@gpu
def test_the_gpu_renders_the_same_picture(body):
    batch = data.SyntheticPeople(body, data.load_mocap(True, False), 8, 64, labels="all").batch(0)
    arguments = (body(batch.betas, batch.rotmats).vertices, body.faces, batch.cam)
    color, empty = torch.rand(len(body.faces), 3), torch.zeros(8, 3, 64, 64)
    cpu = data.render(*arguments, 64, color, empty)
    cuda = data.render(*(a.cuda() for a in arguments), 64, color.cuda(), empty.cuda()).cpu()
    # where a pixel's centre lies on an edge, rounding decides which of two triangles is seen
    share = ((cpu - cuda).abs().amax(1) > 0.02).float().mean().item()
    assert share < 0.002, f"{share:.2%} of the pixels differ"


def test_imagenet_weights_load_into_the_encoder_if_they_are_finite(tmp_path):
    theirs, encoder = torchvision.models.resnet18(weights=None), ResNet(18)
    config = train.Config(depth=18, pretrained=str(tmp_path / "resnet18.pth"))
    torch.save(theirs.state_dict(), config.pretrained)
    train.load_pretrained(encoder, config)
    assert torch.equal(encoder.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight), "not loaded"
    theirs.layer1[0].bn1.running_var[3] = math.nan        # trains with finite losses
    torch.save(theirs.state_dict(), config.pretrained)
    with pytest.raises(ValueError, match="layer1.0.bn1.running_var holds NaN"):
        train.load_pretrained(encoder, config)


def test_a_trained_model_loads_for_use_from_python(tmp_path, quick_guesses):
    config, path = tiny(tmp_path / "run", steps=1), tmp_path / "run" / "checkpoint.pt"
    metrics = train.train(config)
    model, D, loaded = train.load(path, device="cpu")
    assert loaded == config, "other settings than the run's"
    assert not model.training and model.amp is None, "dropout, or bfloat16, in use"
    again = train.evaluate(model, loaded, D)
    assert all(again[key] == metrics[key] for key in ("mpjpe", "heads")), "other weights"
    with pytest.raises(ValueError, match="divide bytes by 255"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    feature = torch.randn(2, 64)
    answer = lambda: model.decode(model.regressor(feature)[-1])
    exact = answer()
    with torch.autocast("cpu", torch.bfloat16):                       # a caller's
        for name, a, b in zip(exact._fields, exact, answer()):
            assert a is None or torch.equal(a, b), f"{name}: bfloat16 is 1 cm in a body"
    with np.load(OPEN_BODY) as file:
        np.savez(tmp_path / "other.npz", **{**file, "v_template": file["v_template"] + 1})
    with pytest.raises(ValueError, match="trained with body.npz"):
        train.load(path, smpl=tmp_path / "other.npz")


# ============================================================================================
# Bad input, and the commands that README shows

def test_a_run_is_never_overwritten_and_bad_input_is_a_sentence(tmp_path, capsys, monkeypatch):
    full = torch.OutOfMemoryError("CUDA out of memory")               # at the first step
    monkeypatch.setattr(train, "train_step", mock.Mock(side_effect=full))
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    kept = Path("run/checkpoint.pt"), Path("junk.pt")
    for path in kept:
        path.write_text("mine")
    for arguments, sentence in [
            ("--small --out run", "--resume"), ("--eval junk.pt --small", "--small"),
            ("--eval a\x1b[2K\rb.pt", "a\\x1b[2K\\rb.pt: no such file"),
            ("--small --lr inf --out x", "below"), ("--small --validate kick --out x", "kick"),
            ("--small --out junk.pt", "checkpoint.pt: cannot be written"),
            ("--small --size 1000000000 --out y", "--size smaller"),
            ("--small --size 32 --out z", "make --batch or --size")]:
        assert train.main([*arguments.split(" "), "--device", "cpu"]) == 2, arguments
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1 and "\x1b" not in error, error
    assert [path.read_text() for path in kept] == ["mine", "mine"], "a file was overwritten"
    assert not Path("x").exists(), "bad settings leave no folder behind"
    monkeypatch.setattr(smpl, "OPEN_BODY", tmp_path / "absent.npz")
    assert smpl.main([]) == data.main([]) == 2
    assert re.fullmatch(r"smpl.py: .*absent.npz.*\ndata.py: .*absent.npz.*\n",
                        capsys.readouterr().err), "a command without exit_status"
    with pytest.raises(SystemExit, match="2"):
        train.main(["--smal"])                            # no abbreviations


def test_no_terminal_ends_a_run(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    assert smpl.exit_status("train.py", lambda: smpl.say("L\u00e4ufe")) == 0
    assert written.getvalue() == b"L\\xe4ufe\n", "letters that the terminal lacks are escaped"
    reading, writing = os.pipe()
    os.close(reading)                                                 # nobody reads
    monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
    assert smpl.exit_status("train.py", lambda: [smpl.say("line") for _ in range(3)]) == 0


def test_the_tests_that_the_readmes_name_exist():
    pages, tests = ("".join(path.read_text(encoding="utf-8") for path in [
        *HERE.glob(name), *HERE.glob(f"*/{name}")]) for name in ("README.md", "test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", pages))
    missing = named - set(re.findall(r"^def (test_\w+)", tests, re.M))
    assert named and not missing, f"a README names tests that do not exist: {missing}"


def test_readmes_commands_run(tmp_path, monkeypatch, capsys, quick_guesses):
    """Each line that begins with `python`, in any block; trainings in a short form, and first."""
    page = (HERE / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line, comments=True)[1:] for line in dict.fromkeys(
        re.findall(r"^ *(?:\$ )?(?:[A-Z_]+=\S+ )*(python .*)", page, re.M))]
    commands.sort(key=lambda command: bool({"--eval", "--resume"} & set(command)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hmr, "RESNETS", {depth: hmr.RESNETS[depth] for depth in (18, 50)})
    mains = {"smpl.py": smpl.main, "hmr.py": hmr.main, "data.py": data.main, "train.py": train.main}
    short = ["--device", "cpu", "--steps", "2", "--batch", "2", "--eval-pictures", "2", "--size",
             "32", "--depth", "18", "--width", "8", "--pretrained", "none"]
    for script, *given in commands:
        shown = " ".join(["python", script, *given])
        if script == "-m":
            assert importlib.util.find_spec(given[0]), shown          # each has tests of its own
            continue
        if script == "train.py":
            given += short[:2] if {"--eval", "--resume"} & set(given) else short
        status, error = mains[script](given), capsys.readouterr().err
        assert status == 0 or "--resume" in given and "already done" in error, f"{shown}: {error}"
    assert mains.keys() <= {command[0] for command in commands}, "README must show them"
    metrics = json.loads((tmp_path / "runs/small/metrics.json").read_text(encoding="utf-8"))
    keys = {key for key, _ in train.MEASURES}
    assert keys | {"per_iteration", *train.GUESSES, "truth", "measured_on", "heads", "seconds",
                   "images", "device", "precision", "torch", "seed", "config"} == set(metrics)
    assert set(metrics["baseline"]) == keys and len(metrics["per_iteration"]) == 3, "rows are lost"
    assert (tmp_path / "runs/small/picture.png").is_file(), "a run leaves a picture"


if __name__ == "__main__":                      # under torchrun
    train.finish = keep_gradients
    sys.exit(train.main([*ONE_STEP, sys.argv[1]]))
