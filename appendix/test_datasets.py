"""Real data, without any: tiny files in each published layout, odd ones among them, and what the
readers, batches and measures of datasets.py make of them, by name and number."""

import argparse
import contextlib
import itertools
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from scipy.spatial.transform import Rotation
from torch import Tensor

import data
import train
from appendix import datasets
from appendix.datasets import COCO_NAMES, J24_NAMES, RealPeople, read_people, read_picture
from appendix.spin import Network
from hmr import HMROutput
from smpl import FLIP_KEYPOINTS, KEYPOINT_NAMES, OPEN_BODY, SMPL, batch_rodrigues
from test_hmr import (body, close, precision_of_the_encoder,  # noqa: F401 (fixtures)
                      same_numbers_every_time, same, weights_of)

K = {name: k for k, name in enumerate(KEYPOINT_NAMES)}
J24 = {name: k for k, name in enumerate(J24_NAMES)}


def person() -> np.ndarray:
    """Made-up keypoints (19, 2), pixels, within 100 x 200 about (320, 240)."""
    return np.random.default_rng(0).uniform((270, 140), (370, 340), (19, 2))


def write_pictures(folder: Path, names, height=48, width=64) -> None:
    """A ramp: red grows with x, green with y, so that a pixel's colour says where it was."""
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([255 * x // width, 255 * y // height, 0 * x], 2).astype(np.uint8)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ramp).save(folder / name, "JPEG", quality=100, subsampling=0)


def spin_arrays(N=4, **changes) -> dict:
    """SPIN's npz in its published layout: paths, boxes, J24 in 2D and 3D, SMPL in the camera."""
    part, S, pose = np.zeros((N, 24, 3)), np.zeros((N, 24, 4)), np.zeros((N, 72))
    for name, k in J24.items():
        if name in K:
            part[:, k] = *person()[K[name]], 1
        if name != "head_top" and name not in KEYPOINT_NAMES[14:]:    # as H3.6M and 3DHP
            S[:, k, 3], S[:, k, :3] = 1, np.random.default_rng(k).normal(0, 0.3, 3)
    pose[:, 0] = np.pi
    arrays = dict(imgname=np.array([f"images/{n:03d}.jpg" for n in range(N)]),
                  center=np.tile([320.0, 240.0], (N, 1)), scale=np.full(N, 1.2), part=part, S=S,
                  pose=pose, shape=np.tile(np.arange(10) / 10, (N, 1)), has_smpl=np.ones(N),
                  openpose=np.zeros((N, 25, 3)), gender=np.array(["m", "f"] * (N // 2)))
    return {key: value for key, value in (arrays | changes).items() if value is not None}


LARGE = 480, 640                  # height, width of pictures in which the people stand
ONLY_2D = dict(S=None, pose=None, shape=None, has_smpl=None)
NO_SMPL = dict(pose=None, shape=None, has_smpl=None, gender=None)


def spin(folder: Path, name="h36m_train.npz", pictures=True, size=(48, 64), **changes) -> str:
    """Write such a file and its pictures -> what --data wants.  Unless LARGE, the pictures are read
    quickly, and the people stand beyond their edge."""
    arrays = spin_arrays(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / name, **arrays)
    if pictures:
        write_pictures(folder / "root", [f"images/{n:03d}.jpg" for n in range(len(
            arrays["center"]))], *size)
    return f"spin:{folder / name}@{folder / 'root'}"


def annotation(image_id=1, **changes) -> dict:
    """A COCO annotation of `person`; a value of visibility by a point's name changes its own."""
    rows = np.array([[*person()[K[name]].round(), changes.pop(name, 2)] for name in COCO_NAMES])
    (x, y), (w, h) = rows[:, :2].min(0), np.ptp(rows[:, :2], axis=0)
    return dict(id=7, image_id=image_id, category_id=1, iscrowd=0, num_keypoints=17, area=1.0,
                keypoints=[int(v) for v in rows.flatten()], bbox=[x, y, w, h],
                segmentation=[[x, y, x + w, y, x + w, y + h]]) | changes


def coco(folder: Path, annotations: list, image={}, **more) -> str:
    images = [dict(id=n, file_name=f"{n:012d}.jpg", **image) for n in (1, 2)]
    write_pictures(folder / "train2014", [image["file_name"] for image in images])
    path = folder / "person_keypoints_train2014.json"
    content = dict(images=images, annotations=annotations) | more
    path.write_text("\ufeff" + json.dumps(content), encoding="utf-8")     # a byte order mark
    return f"coco:{path}@{folder / 'train2014'}"


def world(body, *texts, rank=0, ranks=1, workers=0, mix=(), mocap="", **changes) -> RealPeople:
    options = argparse.Namespace(data=texts, workers=workers, mix=mix, mocap=mocap)
    config = train.Config(**dict(batch=8, size=64, device="cpu") | changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "rank_and_ranks", lambda: (rank, ranks))
        return RealPeople(config, body, options)


@contextlib.contextmanager
def refused(*words: str):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        yield
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


# ============================================================================================
# Joint orders and crops

def test_the_maps_between_joint_orders_are_the_published_numbers(capsys):
    assert datasets.J24_TO_19 == [*range(14), *range(19, 24)]
    assert datasets.J24_TO_14 == [*range(13), 18], "the head's centre, slot 18, not its top, 13"
    assert datasets.H36M_TO_14 == [6, 5, 4, 1, 2, 3, 16, 15, 14, 11, 12, 13, 8, 10]
    assert datasets.COCO_TO_19 == [16, 14, 12, 11, 13, 15, 10, 8, 6, 5, 7, 9, -1, -1, 0, 1, 2, 3, 4
                                   ], "COCO names the left side first"
    assert datasets.main(["orders"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1 + 13].split() == ["13", "head_top", "head_top", "head_top", "left_knee",
                                     "left_wrist", "left_collar"], "a row is one number's joints"


@pytest.mark.parametrize("size,side", [(224, 250), (64, 312), (224, 62)])
def test_a_window_shows_what_lies_there(size, side):
    """On a ramp, the colour of a crop's pixel is the place it was cut from."""
    y, x = torch.meshgrid(torch.arange(480) + 0.5, torch.arange(640) + 0.5, indexing="ij")
    image = torch.stack([x / 640, y / 480, 0 * x])                    # (3, 480, 640)
    center = torch.tensor([300.0, 200])
    crop = datasets.cut_window(image, center, side, size)
    along = ((torch.arange(size) + 0.5) / size - 0.5) * side          # (size,) from the middle
    close(640 * crop[0], (300 + along).expand(size, size), 0.1, "pixels, from the left")
    close(480 * crop[1].T, (200 + along).expand(size, size), 0.1, "pixels, from above")
    as_bytes = datasets.cut_window((255 * image).round().to(torch.uint8), center, side, size)
    # rounded when read, when resized and at the end
    close(as_bytes.float() / 255, crop, 1.6 / 255, "bytes and numbers must be cut alike")


def test_box_keypoints_and_spins_points_show_a_person_equally_large(tmp_path, body):
    """Drawn people, by their 19 keypoints, by SPIN's box of them (1.2 times the longer side), and
    by the 14 slots of H3.6M's and 3DHP's `part`, whose head is in slot 18."""
    batch = data.SyntheticPeople(body, data.load_mocap(False, False), 256, 2, labels="all").batch(0)
    points, names = (100 * (batch.keypoints2d + 2)).numpy(), [b"%d.jpg" % n for n in range(256)]
    low, high = points.min(1), points.max(1)
    box = np.concatenate([(low + high) / 2, 1.2 * (high - low).max(1)[:, None]], 1)
    whole, nothing, h36m = np.zeros((3, 256, 24, 3))
    whole[:, datasets.J24_TO_19] = np.dstack([points, np.ones((256, 19))])
    h36m[:, :13], h36m[:, 18] = whole[:, :13], whole[:, 13]
    people = [datasets.make_people("a", tmp_path, names, part=part, box=box,
                                   pose=np.zeros((256, 72))) for part in (whole, nothing, h36m)]
    for crop in data.CROPS:
        (center, side), (center_b, side_b), (center_p, side_p) = (
            datasets.windows(found, crop) for found in people)
        close(center, center_b, 1e-3, "both are the box's middle")
        close((side_b / side).median(), 1.0, 0.05, f"{crop}: the median person's size")
        close((side_p / side_b).median(), 1.0, 0.05, f"{crop}: cropped without the head?")
        # 0.8 pixels of 224: face and ears reach beyond the 14 points of some
        close(((center_p - center) / side[:, None]).abs().mean(0), [0, 0], 0.8 / 224, "the middle")


def test_spins_crop_is_black_outside_and_its_box_itself(tmp_path):
    found = read_people(spin(tmp_path, center=np.tile([10.0, 240.0], (4, 1))))
    one, _, _ = datasets.Pictures([found], 224, "spin")[datasets.Draw(0, 0)]
    assert (one.image[..., 0] == 0).all(), "beyond the picture"
    far = datasets.cut_window(one.image[0], torch.zeros(2), 1e5, 64)  # it shrinks to 2 pixels
    assert far.shape == (3, 64, 64)
    expected = (torch.tensor(person()[0]) - torch.tensor([10.0, 240.0])) / 120
    close(one.keypoints2d[0, 0], expected, 1e-5, "240 pixels about (10, 240): [-1, 1]")


# ============================================================================================
# Pictures of every kind

TURNED = Image.Exif()
TURNED[0x0112] = 6                                                    # by a quarter
RED = Image.new("RGB", (30, 20), (200, 100, 50))


def test_pictures_of_every_kind_become_rgb_bytes(tmp_path):
    red, grey, clear = [200, 100, 50], RED.convert("L"), RED.copy()
    clear.putalpha(60)
    for name, image, rgb in (("cmyk.jpg", RED.convert("CMYK"), red), ("grey.jpg", grey, [124] * 3),
                             ("16bit.png", Image.new("I;16", (30, 20), 257 * 200), [200] * 3),
                             ("rgba.png", clear, red), ("palette.png", RED.convert("P"), red),
                             ("a.tif", RED, red)):
        image.save(tmp_path / name)
        found = read_picture(tmp_path / name)                         # (3, 20, 30)
        # the palette of the web's 216 colours is 51 apart
        close(found[:, 5, 5], rgb, 26 if "pal" in name else 3, f"{name}: RGB in 0..255")


def test_the_labels_size_decides_whether_a_picture_is_turned(tmp_path, body):
    RED.save(tmp_path / "a.jpg", exif=TURNED)
    for size, turn, shape in (((30, 20), True, (20, 30)), ((20, 30), False, (30, 20)),
                              (None, True, (30, 20)), (None, False, (20, 30))):
        assert read_picture(tmp_path / "a.jpg", size, turn).shape[1:] == shape, (size, turn)
    with refused("000000000001.jpg: 64 x 48 pixels, but its labels were made on 32 x 24"):
        world(body, coco(tmp_path, [annotation()], image=dict(width=32, height=24)))


def test_a_picture_that_cannot_be_read_says_why(tmp_path):
    RED.save(tmp_path / "moves.gif", save_all=True, append_images=[Image.new("RGB", (30, 20))])
    Image.new("1", (12_000, 12_000)).save(tmp_path / "huge.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    RED.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:-30])
    for name, why in (("cut.png", "no whole JPEG, PNG"), ("gone.jpg", "no such file"),
                      ("moves.gif", "an animation of 2 pictures; name a JPEG or PNG"),
                      ("huge.png", "12000 x 12000 are more than 100,000,000 pixels"),
                      ("pipe.jpg", "no plain file")):
        with refused(f"{name}: {why}"):
            read_picture(tmp_path / name)
    for place, bit in itertools.product(range(8, len(content)), range(8)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit                # torchvision's decoder ended the process
        (tmp_path / "flipped.png").write_bytes(flipped)
        with contextlib.suppress(ValueError):
            read_picture(tmp_path / "flipped.png")


# ============================================================================================
# Readers

def test_spins_file_is_read_by_name_whatever_it_lacks(tmp_path):
    found = read_people(spin(tmp_path))
    assert found.name == "spin:h36m_train.npz" and found.image[2] == b"images/002.jpg"
    for name, k in K.items():
        close(found.part[0, J24[name]], [*person()[k] + 0.5, 1], 1e-4, f"{name}: + 0.5")
    close(found.box[0], [320.5, 240.5, 240.0], 0, "scale 1.2 is a box of 240 pixels")
    only_3d = read_people(spin(tmp_path, part=None, **NO_SMPL))
    assert not (only_3d.part.any() or only_3d.has_smpl.any() or only_3d.gender.any())
    pw3d_test = read_people(spin(tmp_path, part=None, S=None, has_smpl=None))
    assert pw3d_test.has_smpl.all(), "without has_smpl whoever has a pose has SMPL labels"
    mpi_inf_train = read_people(spin(tmp_path, pose=-np.ones((4, 72)), has_smpl=np.eye(4)[2]))
    assert mpi_inf_train.has_smpl.tolist() == [False, False, True, False]
    assert not mpi_inf_train.pose[0].any(), "-1 is no label and must not be kept"


def test_spins_files_keep_their_sources_conventions(tmp_path, capsys):
    """MATLAB's pixels, 3DHP's head top, confidences, genders, bytes in UTF-8, foreign keys."""
    for name, origin in (("lsp_dataset_original_train", -0.5), ("hr-lspet_train", -0.5),
                         ("mpii_train", -0.5), ("mpi_inf_3dhp_train", 0.5), ("coco_2014", 0.5)):
        found = read_people(spin(tmp_path, f"{name}.npz", keypoints_2d=np.zeros(4)))
        close(found.part[0, J24["right_ankle"], :2], person()[0] + origin, 1e-4, f"{name}: part")
        close(found.box[0, :2], [320 + origin, 240 + origin], 1e-4, f"{name}: box")
        assert (found.S[0, J24["head_top"], 3] > 0) == ("3dhp" in name), "slot 18 is its head top"
    assert "not used, as SPIN's lack them: keypoints_2d" in capsys.readouterr().out
    arrays = spin_arrays(imgname=np.array(["images/\u00e9.jpg".encode()] * 4))
    arrays["part"][:2, J24["nose"], 2] = 0.19, 0.2
    for written, known in ((["M", "Female", "neutral", ""], [1, 2, 0, 0]),
                           ([0, 1, -1, 1], [1, 2, 0, 2])):
        found = read_people(spin(tmp_path, **arrays | {"gender": np.array(written)}))
        assert found.gender.tolist() == known
        assert os.fsdecode(found.image[0]) == "images/\u00e9.jpg"
    assert found.part[:2, J24["nose"], 2].tolist() == [0, 1], "a confidence below 0.2: no label"
    assert "confidence below 0.2 are not labelled" in capsys.readouterr().out


def test_what_is_not_finite_is_no_label_and_who_has_none_is_left_out(tmp_path):
    arrays = spin_arrays(N=8)
    arrays["S"][0, J24["left_knee"], 1] = np.nan
    arrays["S"][1, J24["left_hip"], 3] = 0
    arrays["part"][2, J24["nose"], 0] = 1e39                          # infinite as float32
    arrays["pose"][3, 7] = np.nan
    arrays["part"][4:], arrays["S"][4:6], arrays["has_smpl"][4:6] = 0, 0, 0
    arrays["scale"][6] = 1 / 200                                      # a box of 1 pixel
    found = read_people(spin(tmp_path, **arrays))
    assert found.S[0, J24["left_knee"]].tolist() == [0, 0, 0, 0]
    assert found.S[0, J24["right_knee"], 3] == 1 and not found.S[1, :, 3].any(), "no hips: no 3D"
    assert not found.part[2, J24["nose"]].any() and found.part[2, :, 2].sum() == 18
    assert found.has_smpl.tolist() == [True, True, True, False, True], "5 of 8 people are left"
    assert found.image[4] == b"images/007.jpg", "with their own pictures"
    assert +found.skipped == {"without any label": 2, "no 2 keypoints nor box of 5 pixels": 1}
    assert all(x.isfinite().all() for x in (found.S, found.part, found.pose, found.betas))


def test_coco_is_read_by_name_and_filtered_as_the_official_converter_does(tmp_path):
    hidden = dict.fromkeys(COCO_NAMES[:12], 1)                        # 5 of visibility 2 are left
    no_box = annotation(segmentation=[])
    box = no_box.pop("bbox")
    kept = [annotation(2), annotation(left_wrist=1), annotation(nose=0), no_box,
            *(annotation(segmentation=mask) for mask in ([[0, 0, 61, 0]], [[]], [0, 0, 61, 0]))]
    left_out = [annotation(iscrowd=1, segmentation=dict(counts=[1], size=[1, 1])),
                annotation(iscrowd="1"), annotation(**hidden), annotation(keypoints=None),
                annotation(segmentation=[[0, 0, 60, 0, 60, 60]]),
                annotation(**{name: 0 for name in COCO_NAMES[7:]}), annotation(keypoints=[1, 2]),
                annotation(image_id=9), annotation(segmentation=[[0, 0, 61]]), None]
    found = read_people(coco(tmp_path, kept + left_out))
    assert found.image.tolist() == [b"000000000002.jpg"] + 6 * [b"000000000001.jpg"]
    for name, k in K.items():
        expected = [0, 0, 0] if name in ("neck", "head_top") else [*person()[k].round() + 0.5, 1]
        close(found.part[0, J24[name]], expected, 1e-4, f"{name}: COCO has no neck, no head's top")
    assert found.part[1, J24["left_wrist"], 2], "visibility 1, occluded, is a label"
    assert not found.part[2, J24["nose"]].any()
    assert sum(found.skipped.values()) == len(left_out)
    for n, why in ((1, "60 pixels"), (4, "broken rows, the first annotation 7's keypoints"),
                   (2, "crowds"), (1, "with face"), (1, "with fewer"), (1, "without keypoints")):
        assert [n] == [m for reason, m in found.skipped.items() if reason.startswith(why)], why
    close(datasets.coco_person(no_box, {"1": COCO_NAMES})[1], box, 1e-9, "the points' box")


def test_a_persons_points_go_by_the_categories_names(tmp_path):
    """PoseTrack's 17 begin with nose, head_bottom, head_top; the person may have any number."""
    names = ["Nose", "head_bottom", "head-top", *COCO_NAMES[3:]]
    beast = {"id": 1, "name": "antelope", "keypoints": ["left_eye", "right_eye", "left_front_paw"]}
    human = {"id": 21, "name": "human", "keypoints": names}
    rows = [annotation(category_id="21"), annotation(category_id=1)]
    found = read_people(coco(tmp_path, rows, categories=[beast, human]))
    assert len(found.image) == 1 and +found.skipped == {"crowds or no persons": 1}
    head_top = np.array(rows[0]["keypoints"][6:8]) + 0.5              # (2,)
    close(found.part[0, J24["head_top"], :2], head_top, 1e-4, "no eye")
    assert not found.part[0, [J24[name] for name in ("left_eye", "right_eye", "neck")]].any()
    with refused("train2014.json", "left_eye, right_eye", "are no person's"):
        read_people(coco(tmp_path, rows, categories=[beast]))


@pytest.mark.parametrize("extended,names", [
    (False, "images/im{:04d}.jpg"), (True, "images/im{:05d}.jpg"),
    (True, "im{:05d}.png")])                      # hr-lspet, as it is handed out today
def test_lsp_and_lspet_have_opposite_flags(tmp_path, extended, names):
    """LSP (3, 14, N), LSPET (14, 3, N); MATLAB's pixels; joint 5 of person 1 is hidden."""
    joints = np.insert(np.tile(person()[:14] + 1, (4, 1, 1)), 2, extended, axis=2)    # (4, 14, 3)
    joints[1, 5, 2] = not extended
    scipy.io.savemat(tmp_path / "joints.mat",
                     {"joints": joints.transpose((1, 2, 0) if extended else (2, 1, 0))})
    write_pictures(tmp_path, [names.format(n) for n in (1, 2, 3, 4)])
    found = read_people(f"lsp:{tmp_path}")
    assert len(found.image) == (4 if extended else 2), "LSP's second half is its test set"
    assert found.folder / os.fsdecode(found.image[1]) == tmp_path / names.format(2)
    assert found.part[0, :, 2].tolist() == [1] * 14 + [0] * 10
    assert found.part[1, :, 2].sum() == 13 and not found.part[1, J24["left_ankle"]].any()
    close(found.part[0, :14, :2], person()[:14] + 0.5, 1e-4, "from 1: - 0.5")


def amass_file(path: Path, frames=240, **changes) -> None:
    """AMASS' SMPL+H: 52 joints; here joint j of frame n turns by n / 1000 + j / 100 about x."""
    path.parent.mkdir(parents=True, exist_ok=True)
    poses = np.zeros((frames, 52, 3))
    poses[..., 0] = np.arange(frames)[:, None] / 1000 + np.arange(52) / 100
    arrays = dict(poses=poses.reshape(-1, 156), betas=np.arange(16) / 10, gender="male",
                  mocap_framerate=120.0, trans=np.zeros((frames, 3)), dmpls=np.zeros((frames, 8)))
    np.savez(path, **arrays | changes)


def test_amass_is_brought_to_ten_frames_a_second_and_smpls_joints(tmp_path, body, capsys):
    amass_file(tmp_path / "CMU" / "01" / "01_01_poses.npz")
    amass_file(tmp_path / "CMU" / "01" / "01_02_poses.npz", 250, mocap_framerate=250.0)
    np.savez(tmp_path / "CMU" / "01" / "shape.npz", betas=np.zeros(16))
    frames, betas = datasets.read_amass(tmp_path)
    time = torch.cat([torch.arange(0, 240, 12), torch.arange(0, 250, 25)]) / 1000     # (30,)
    joints = torch.tensor([*range(22), 22, 37]) / 100                 # (24,)
    close(frames[..., 0], time[:, None] + joints, 1e-6, "each 12th frame, each 25th; hands 22, 37")
    close(betas, (torch.arange(10) / 10).expand(30, 10), 1e-6, "the first 10 of 16")
    people = world(body, spin(tmp_path / "a"), mocap=str(tmp_path / "CMU"))
    assert "body.npz is not SMPL's mesh: the betas" in capsys.readouterr().out
    rotmats, drawn = people.motion(64, 5)
    angle = Rotation.from_matrix(rotmats[:, 2].numpy()).as_rotvec()[:, :1]        # spine1, no side
    apart = np.abs(angle - frames[:, 3, 0].numpy()).min(1).max()
    assert apart < 1e-5, f"a pose that was not recorded, {apart:.2g} radians off"
    close(drawn, betas[:1].expand(64, 10), 1e-6, "and its betas")
    with refused("holds no .npz"):
        datasets.read_amass(tmp_path / "nothing")


def test_hands_that_amass_leaves_still_wander(tmp_path):
    still = np.tile([0.1, 0.2, 0.3], (2, 52))                         # (2, 156) in each clip
    for n in range(200):
        amass_file(tmp_path / f"{n}_poses.npz", poses=still, mocap_framerate=10.0)
    amass_file(tmp_path / "one_poses.npz", poses=still[:1])           # the last
    frames, _ = datasets.read_amass(tmp_path)
    close(frames[-1, 22], [0.1, 0.2, 0.3], 1e-6, "a single real hand stays")
    degrees = torch.rad2deg(frames[:-1:2, 22:])                       # (200, 2, 3)
    # of 200 the mean is known to 0.7 degrees, the deviation to 5 in 100, the correlation to 0.07
    close(degrees.mean(0), torch.tensor([[0, 0, -10.0], [0, 0, 10]]), 3, "closed by 10 degrees")
    close(degrees.std(0) / torch.tensor([3, 3, 10]), 1, 0.2, "assets/README.md's, in a short clip")
    assert abs(np.corrcoef(degrees[:, 0, 2], degrees[:, 1, 2])[0, 1]) < 0.3, "both move alike"
    assert torch.equal(frames, datasets.read_amass(tmp_path)[0]), "drawn by a fixed seed"


SPIN, COCO, MAT, AMASS = "h36m_train.npz", "a.json", "joints.mat", "a_poses.npz"
HDF5 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n"
DETECTED = dict(images=[dict(id=1, file_name="a")], annotations=[annotation(
    keypoints=[3, 4, 2, 9, 0, 0.02] * 8 + [1, 1, 2])])


@pytest.mark.parametrize("name,content,sentence", [
    (SPIN, dict(imgname=None), "lacks imgname"), (SPIN, dict(shape=None), "lacks shape"),
    (SPIN, dict(part=np.zeros((3, 24, 3))), "part is float64 (3, 24, 3), expected numbers (4, 24,"),
    (SPIN, dict(center=np.full((4, 2), "a")), "center is"),
    (SPIN, dict(pose=np.array([{}] * 4, object)), "not a whole .npz of plain arrays"),
    (SPIN, dict(S=np.zeros(2 ** 18)), "more than 1 GiB"),
    (SPIN, dict(part=np.zeros((4, 24, 3)), **ONLY_2D), "4 without any label"),
    (SPIN, dict(part=np.full((4, 24, 3), 3.0)), "a visibility of 3; expected 0, 1 or 2"),
    (SPIN, dict(S=1000 * spin_arrays()["S"]), "expected S in metres; is it in millimetres?"),
    *((SPIN, dict(imgname=np.array([path] * 4)), f"{path!r} lies outside the folder") for path in (
        "a/../../b.jpg", "..", "/etc/b.jpg", "C:b.jpg")),
    (SPIN, dict(scale=np.full(4, 240.0)), ".jpg: 64 x 48 pixels, and a box of 48,000 pixels in it"),
    (SPIN, dict(pictures=False), ".jpg: no such file"),
    (COCO, b"{", "not JSON"), (COCO, b"[]", "AttributeError"), (COCO, b"{}", "KeyError"),
    (COCO, b'{"images": [], "annotations": []}', "nobody"),
    (COCO, json.dumps(DETECTED).encode(), "a visibility of 0.02; expected 0, 1 or 2; are"),
    (MAT, HDF5, "MATLAB 7.3"), (MAT, b"junk" * 99, "not a readable .mat"),
    (MAT, dict(joints=np.zeros((3, 13, 9))), "(3, 13, 9); expected LSP's"),
    (MAT, dict(joints=np.array([[{"a": 1}]], object)), "cell"),
    (MAT, dict(other=np.zeros(3)), "no joints; expected LSP's"),
    (MAT, dict(joints=np.zeros((3, 14, 4000))), "(3, 14, 4000); expected LSP's"),
    (AMASS, dict(poses=np.zeros((240, 165))), "SMPL-X's has 165"),
    (AMASS, dict(betas=np.zeros(3)), "(3,)"), (AMASS, dict(mocap_framerate=0.0), "framerate"),
    (AMASS, dict(poses=np.full((240, 156), 1e39)), "finite numbers"),
    (AMASS, dict(poses=np.array([{}], object)), "plain arrays")])
def test_a_wrong_file_says_so(tmp_path, body, monkeypatch, name, content, sentence):
    monkeypatch.setattr(datasets, "MOST_BYTES", 2 ** 20)              # the big ones hold more
    path = tmp_path / name
    text = f"coco:{path}@{tmp_path}" if name == COCO else f"lsp:{tmp_path}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif name == MAT:
        scipy.io.savemat(path, content, do_compression=True)
    elif name == AMASS:
        amass_file(path, **content)
    else:
        text = spin(tmp_path, **content)
    with refused(name, sentence):
        datasets.read_amass(tmp_path) if name == AMASS else world(body, text)


def test_theta_bar_from_a_file_of_mean_parameters(tmp_path, monkeypatch):
    """HMR's .h5: axis-angle, and the root is set; SPIN's .npz: 6D, all as it is.  In either form
    of the rotations it is the same body."""
    pose, shape = 0.3 * torch.randn(24, 3), torch.randn(10)
    file = contextlib.nullcontext({"pose": pose.flatten().numpy(), "shape": shape.numpy()})
    monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=lambda *_: file))
    (tmp_path / "a.h5").write_bytes(b"h5")
    by_hmr = {kind: datasets.read_mean_params(tmp_path / "a.h5", kind)
              for kind in ("axis-angle", "6d")}
    close(by_hmr["axis-angle"], torch.cat([torch.tensor([0.9, 0, 0, np.pi, 0, 0]),
                                           pose[1:].flatten(), shape])[None], 1e-6, "Theta-bar")
    np.savez(tmp_path / "a.npz", pose=by_hmr["6d"][0, 3:-10], shape=shape, cam=[0.8, 0.1, 0.2])
    for kind, theta in by_hmr.items():
        found = datasets.read_mean_params(tmp_path / "a.npz", kind)
        # a rotation by pi, the root's, is also its negative: the other joints are compared
        close(found[:, 9:], theta[:, 9:], 1e-4, f"SPIN's, {kind}")
        close(found[:, :3], [[0.8, 0.1, 0.2]], 1e-6, "and its camera")
    monkeypatch.setitem(sys.modules, "h5py", None)
    np.savez(tmp_path / "b.npz", pose=np.zeros(70), shape=np.full(10, np.nan))
    for name, words in (("a.h5", "h5py"), ("b.npz", "expected HMR's"), ("gone.npz", "no such")):
        with refused(name, words):
            datasets.read_mean_params(tmp_path / name, "6d")


# ============================================================================================
# Batches

def test_a_batch_is_a_function_of_seed_step_and_rank_whatever_the_workers(tmp_path, body):
    texts = spin(tmp_path / "a", size=LARGE), coco(tmp_path / "b", [annotation(), annotation(2)])
    batches = {}
    for workers in (0, 2):
        people, before = world(body, *texts, workers=workers), torch.get_rng_state()
        batches[workers] = [people.batch(step) for step in (0, 1, 7, 8, 1)]
        assert torch.equal(before, torch.get_rng_state()), "drawn ahead from dropout's generator"
    for one, other in zip(batches[0], batches[2]):
        assert same(list(one), list(other)), "2 workers give other pictures"
    assert same(list(batches[0][1]), list(batches[0][4])), "step 1 again"
    for other in (batches[0][1], world(body, *texts, seed=1).batch(0),
                  world(body, *texts, rank=1).batch(0)):
        assert not torch.equal(batches[0][0].image, other.image), "another seed, step or rank"
    assert world(body, *texts, ranks=2).batch(0).image.shape == (4, 3, 64, 64), "a rank's share"


def test_a_batch_holds_labels_that_fit_its_pictures(tmp_path, body):
    """Colours say where a pixel was cut from: whatever jitter and flip did, labels did as well."""
    batch = world(body, spin(tmp_path, size=LARGE), batch=16, size=224).batch(0)
    assert batch.image.shape == (16, 3, 224, 224) and 0.5 < batch.image.max() <= 1
    mirrored = batch.image[:, 0, 112, -1] < batch.image[:, 0, 112, 0]             # red falls
    assert 0 < mirrored.sum() < 16, "half of the pictures are flipped"
    S = spin_arrays()["S"][0]
    for n, name in itertools.product(range(16), ("right_ankle", "left_wrist")):
        k = FLIP_KEYPOINTS[K[name]] if mirrored[n] else K[name]
        x, y = ((batch.keypoints2d[n, k] + 1) * 112).int().tolist()
        seen = batch.image[n, :2, y, x] * torch.tensor([640, 480])
        # a crop's pixel is up to 1.7 of the picture's, a step of the ramp 2.5; and JPEG's noise
        close(seen, person()[K[name]] + 0.5, 5, f"{name} of picture {n} is elsewhere")
        flipped = S[J24[name], :3] * (-1 if mirrored[n] else 1, 1, 1)
        close(batch.keypoints3d[n, k], flipped, 1e-6, "3D flips with the picture")
    assert batch.has_3d[0].tolist() == [1] * 13 + [0] * 6, "head's top and face: no 3D"
    root = torch.diag(torch.tensor([1.0, -1, -1]))
    close(batch.rotmats[:, 0], root.expand(16, 3, 3), 1e-5, "Rx(pi) mirrored is itself")
    assert batch.has_smpl.all() and (batch.cam == 0).all()


@pytest.mark.parametrize("crop", data.CROPS)
def test_the_jitter_is_the_official_one(tmp_path, body, crop):
    (diagonal, move, least, most), text = data.CROPS[crop], spin(tmp_path)
    draws = next(datasets.training_draws([4], np.ones(1), 512, crop, seed=0, rank=0, step=0))
    shift = torch.tensor([draw.shift for draw in draws])              # (512, 2)
    zoom = torch.tensor([draw.zoom for draw in draws])                # (512,)
    close(zoom.aminmax(), (least, most), 0.1 * (most - least), "from the least to the most zoom")
    assert 0.9 * move < shift.abs().amax() <= move and shift.mean(0).abs().max() < 0.2 * move
    points = 112 * world(body, text, size=32, crop=crop, batch=512).batch(0).keypoints2d
    low, high = points.amin(1), points.amax(1)                        # (512, 2) each
    close((high - low).norm(dim=-1) / diagonal, zoom, 1e-3, "the crop has the draw's zoom")
    moved = (low + high) / 2 / zoom[:, None]                          # (512, 2)
    close(moved.abs(), shift.abs(), 0.05, "and its shift, in x to either side (the flip)")
    # half of 512, to within 4 standard deviations of 11
    assert abs(sum(draw.flip for draw in draws) - 256) < 45, "the official flip: half the time"


def test_half_a_batch_has_3d_and_each_half_is_by_size_or_mix_says(tmp_path, body, capsys):
    texts = (spin(tmp_path / "a", N=6), coco(tmp_path / "b", [annotation()]),
             spin(tmp_path / "c", "lspet.npz", N=2, **ONLY_2D))
    batch = world(body, *texts, batch=60).batch(0)
    assert batch.has_smpl.sum() == 30, "half 3D, in every batch"
    assert not batch.rotmats[batch.has_smpl == 0].any(), "no rotation is made of no label"
    neckless = (batch.visible[:, K["neck"]] == 0).sum()
    assert neckless == 10, "COCO has 1 of the 3 people without 3D: a third of a half"
    assert world(body, *texts, batch=60, mix=(0.0, 1.0, 3.0)).batch(0).has_smpl.sum() == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "spin:h36m" in line)
    assert row.split()[1:6] == ["6", "6", "6", "6", "50%"], f"people, with 2D, 3D, SMPL: {row}"
    unpaired = world(body, *texts, batch=60, paired=False).batch(0)
    assert not (unpaired.has_3d.any() or unpaired.has_smpl.any()), "--no-paired"
    for mix in ((1.0,), (1.0, -1.0, 1.0), (0.0, 0.0, 0.0), (1.0, float("nan"), 1.0)):
        with refused("one weight of 0 or more for each of the 3 --data, not all 0"):
            world(body, *texts, mix=mix)


def test_what_cannot_be_read_is_named_and_replaced_by_the_next(tmp_path, body, capsys):
    texts = [spin(tmp_path / name, N=100) for name in "ab"]
    for name in "ab":
        (tmp_path / name / "root" / "images" / "007.jpg").write_bytes(b"cut")
    for workers in (0, 2):              # 1 of 100 each, which is no more than 1 %
        people = world(body, *texts, batch=50, size=32, workers=workers)
        for step in range(16):                                        # 400 draws of 100
            batch = people.batch(step)
            assert batch.image.shape[0] == 50 and batch.visible.all()
        assert capsys.readouterr().out.count("007.jpg: no whole JPEG") == 2, "each is named once"
    (tmp_path / "b" / "root" / "images" / "099.jpg").unlink()         # 2 of 100: more than 1 %
    with refused("2 of its 100 people cannot be used, more than 1 %"):
        world(body, *texts, batch=800, size=32, workers=1)


# ============================================================================================
# The command line

def test_training_on_real_data_goes_on_bit_by_bit_and_is_measured(tmp_path, capsys):
    pose = np.tile([1.0, 0, 0, 1, 0, 0], 24)
    np.savez(tmp_path / "mean.npz", pose=pose, shape=np.arange(10) / 9, cam=[0.8, 0, 0])
    texts = spin(tmp_path / "a", "3dhp.npz", size=LARGE), coco(tmp_path / "b", [annotation()])
    flags = ["--data", *texts, "--mean-params", str(tmp_path / "mean.npz"), "--mix", "3", "1",
             *"--depth 18 --width 8 --size 32 --batch 4 --pretrained none --device cpu".split(),
             *"--log-every 1 --amp off --rotation 6d".split()]
    x, y = str(tmp_path / "x"), str(tmp_path / "y")
    assert datasets.main(["train", *flags, "--steps", "2", "--workers", "2", "--out", x]) == 0
    assert "MPJPE" not in capsys.readouterr().out, "photographs are measured by `measure`"
    assert datasets.main(["train", *flags, "--steps", "1", "--workers", "0", "--out", y]) == 0
    go_on = ["--resume", "--out", y, "--steps", "2", "--device", "cpu"]
    assert train.main(go_on) == 2
    assert "trained on photographs (spin 4 people" in capsys.readouterr().err
    assert datasets.main(["train", *go_on, "--data", texts[1]]) == 2
    assert "go on by the command that began the run" in capsys.readouterr().err
    moved = spin(tmp_path / "c", "3dhp.npz", size=LARGE)              # to another folder
    assert datasets.main(["train", *go_on, "--workers", "1", "--data", moved, texts[1],
                          "--mix", "3", "1"]) == 0
    a, b = weights_of(tmp_path / "x"), weights_of(tmp_path / "y")
    for key in ("model", "discriminator", "opt_E", "opt_D", "world", "step"):
        assert same(a[key], b[key]), f"{key}: other pictures after resuming, or by other workers"
    assert (tmp_path / "x" / "picture.png").exists()
    close(a["model"]["regressor.theta_bar"],
          np.concatenate([[0.8, 0, 0], pose, np.arange(10) / 9])[None], 1e-6, "Theta-bar")
    measure = ["measure", f"{x}/checkpoint.pt", "--out", str(tmp_path / "out"), "--data", texts[0]]
    for _ in range(2):                                                # the same command, twice
        assert datasets.main([*measure, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert all(f"iteration {t}" in printed for t in (1, 2, 3)) and "PA-AUC %" in printed
    assert "over 17 joints" in printed, "SPIN's 3DHP is another protocol"
    assert datasets.main([*measure, texts[0]]) == 2
    assert "--out" in (error := capsys.readouterr().err) and "other measurements" in error


@pytest.mark.parametrize("flags,sentence", [
    (["--data", "mpii:a@b"], "expected coco:ANNOTATIONS.json@IMAGES"),
    (["--data", "spin:x"], "--data spin:x: expected"),
    (["--data", "spin:a:b@x.npz@y"], "a:b@x.npz: no such file"),
    (["--data", "lsp:x", "--eval", "x.pt"], "--eval: measure on photographs by"),
    (["--data", "lsp:x", "--workers", "-1"], "--workers -1: expected 0 to 64"),
    (["--data", "lsp:x", "--mean-params", "x", "--resume"], "--mean-params: --resume keeps"),
    (["--data", "lsp:x", "--size", "1"], "--size 1")])
def test_wrong_options_end_in_one_sentence(tmp_path, flags, sentence, capsys):
    assert datasets.main(["train", *flags, "--pretrained", "none", "--device", "cpu", "--out",
                          str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists(), "nothing is begun"


# ============================================================================================
# Measures, on data whose right answer is known

class Answers:
    """A model that knows the answers but for a known error; pictures are told by their order."""

    def __init__(self, smpl: SMPL, rotmats: Tensor, betas: Tensor, error: Tensor):
        self.smpl, self.people, self.error, self.asked = smpl, (rotmats, betas), error, 0

    def eval(self):
        return self

    def __call__(self, image: Tensor):
        self.asked += len(image)
        return [slice(self.asked - len(image), self.asked)], None

    def decode(self, rows: slice, vertices: bool) -> HMROutput:
        rotmats, betas = (x[rows] for x in self.people)
        body = self.smpl(betas, rotmats)
        return HMROutput(rotmats, betas, torch.ones(len(betas), 3), None,
                         body.keypoints + self.error, None, body.vertices)


@pytest.fixture
def measured(body, tmp_path, capsys):
    def measured(text: str, rotmats=None, betas=None, error=torch.zeros(19, 3), **changes):
        """-> what metrics.json holds of one data set, with the measures of its one iteration, and
        what was printed."""
        options = dict(checkpoint="any", data=[text], workers=0, out=tmp_path, joint_regressor="",
                       smpl_genders=(), result_file=None) | changes
        (tmp_path / "metrics.json").unlink(missing_ok=True)
        datasets.evaluate(Network(Answers(body, rotmats, betas, error), None,
                                  train.Config(size=32), "official", ""),
                          argparse.Namespace(**options))
        (result,) = json.loads((tmp_path / "metrics.json").read_text())["results"]
        return result | result["per_iteration"][0], capsys.readouterr().out
    return measured


def poses(N: int) -> tuple[Tensor, Tensor, Tensor]:
    """rotmats (N, 24, 3, 3), betas (N, 10), pose (N, 72) of made-up people."""
    pose = 0.3 * torch.randn(N, 72)
    return batch_rodrigues(pose.view(N, 24, 3)), torch.randn(N, 10), pose


def test_measures_by_s_on_a_known_error(tmp_path, body, measured):
    """H3.6M's files: S, no SMPL, no 2D.  One knee 132 mm off; a picture that cannot be read."""
    N = 130                                                           # three batches of 64
    rotmats, betas, pose = poses(N)
    keypoints, S = body(betas, rotmats).keypoints.numpy(), np.zeros((N, 24, 4))
    S[:, :13] = np.insert(keypoints[:, :13] + 5, 3, 1, axis=2)
    text = spin(tmp_path, "h36m_valid_protocol1.npz", N=N, S=S, part=None, **NO_SMPL)
    (tmp_path / "root" / "images" / "069.jpg").unlink()
    keep, shift = torch.arange(N) != 69, torch.zeros(19, 3)
    shift[K["left_knee"], 0] = 0.132
    arguments = text, rotmats[keep], betas[keep], shift
    row, out = measured(*arguments, result_file=tmp_path / "all.npz")
    close(row["mpjpe"], 132 / 13, 1e-3, "13 joints: no head's top, wherever S has its root")
    close(row["pck"], 100.0, 1e-6, "132 < 150")
    close(row["auc"], 100 * (12 * 30 + 4) / (13 * 31), 1e-3, "above 132: 135, 140, 145, 150")
    assert row["pve"] is None and row["frames"] == 129 and row["per_action"] == {}
    for words in ("13 of LSP's joints, no head", "mean over 129 frames", "no SMPL labels",
                  "root the hips' middle", "069.jpg: no such file"):
        assert words in out
    with np.load(tmp_path / "all.npz") as file:
        assert file["imgname"][69] == b"images/070.jpg" and file["row"].tolist()[69] == 70
        assert file["camera"].shape == (129, 3)
        close(file["betas"], betas[keep], 1e-6, "betas")
        close(file["pose"].reshape(129, 72), pose[keep], 1e-5, "axis-angle, root first")
        error = file["joints_mm"] - 1000 * (keypoints - keypoints[:, 2:4].mean(1, keepdims=True)
                                            )[keep, :13]
        close(error.mean(0), 1000 * shift[:13], 1e-2, "mm, from the root")
    with refused("all.npz: expected the name of a new file"):
        measured(*arguments, result_file=tmp_path / "all.npz")


def test_measures_with_the_joint_regressor_and_by_action(tmp_path, body, measured):
    """14 joints of 17 by name, root at the regressor's pelvis, which is not the hips' middle."""
    N = 6
    rotmats, betas, _ = poses(N)
    regressor = torch.softmax(8 * torch.randn(17, len(body.v_template)), 1).numpy()
    np.save(tmp_path / "J_regressor_h36m.npy", regressor.astype(np.float64))
    joints = regressor @ body(betas, rotmats).vertices.numpy()        # (N, 17, 3)
    S = np.zeros((N, 24, 4))
    for n, name in enumerate(datasets.H36M_NAMES):
        slot = J24["pelvis_mpii" if name == "pelvis_h36m" else name]
        S[:, slot] = np.insert(joints[:, n] - joints[:, 0], 3, 1, axis=1)
    S[3, J24["head_h36m"], 3] = 0                                     # its head is not known
    S[:2, J24["head_h36m"], 1] += 0.14
    names = [f"S9_{action}.54138969_{n:06d}.jpg" for n, action in enumerate(
        ["Directions", "Directions_1", *["Walking"] * 4])]
    write_pictures(tmp_path / "root", names)
    text = spin(tmp_path, "h36m_valid_protocol2.npz", N=N, S=S,
                **NO_SMPL | {"imgname": np.array(names)})
    row, out = measured(text, rotmats, betas,
                        joint_regressor=str(tmp_path / "J_regressor_h36m.npy"))
    assert "mean over 5 frames" in out, "who lacks a joint is not measured"
    close(row["mpjpe"], 4, 1e-2, "two of five heads 140 mm off, of 14 joints; otherwise the truth")
    close([row["per_action"][action]["mpjpe"] for action in ("Directions", "Walking")], [10, 0],
          1e-2, "each action's own mean, of all its trials")
    close(row["mean_of_actions"]["mpjpe"], 5, 1e-2, "the actions' mean is not the frames'")
    assert "14 joints by J_regressor_h36m.npy, root its pelvis" in out
    assert "mean of actions" in out and "17 joints" not in out


def test_measures_by_bodies_of_their_gender(tmp_path, body, measured):
    """3DPW's files: pose, shape, gender.  Men 1.1 and women 0.8 times the neutral body."""
    rotmats, betas, pose = poses(6)
    arrays, files = dict(np.load(OPEN_BODY)), [str(tmp_path / f"{sex}.npz") for sex in "mf"]
    for file, scale in zip(files, (1.1, 0.8)):
        np.savez(file, **arrays | {key: scale * arrays[key]
                                   for key in ("v_template", "shapedirs", "posedirs")})
    common = dict(N=6, S=None, part=None, pose=pose.numpy(), shape=betas.numpy(), has_smpl=None)
    text = spin(tmp_path, "3dpw_test.npz", gender=np.array([*"mfmfm?"]), **common)
    row, out = measured(text, rotmats, betas)
    close([row["mpjpe"], row["pve"]], [0, 0], 1e-2, "one neutral body for all")
    assert "body.npz for all" in out and "LSP's 14 joints, both bodies' own" in out
    row, out = measured(text, rotmats, betas, smpl_genders=tuple(files))
    neutral, off = body(betas, rotmats), torch.tensor([0.1, 0.2, 0.1, 0.2, 0.1, 0])
    root = neutral.keypoints[:, 2:4].mean(1, keepdim=True)
    for key, points in (("mpjpe", neutral.keypoints[:, :14]), ("pve", neutral.vertices)):
        expected = 1000 * (off[:, None] * (points - root).norm(dim=-1)).mean()
        # the bodies are rounded to float32 after scaling, here before
        close(row[key], expected, 0.02, f"{key}: by the distance from the root; the sixth is right")
    close([row["pa_mpjpe"], row["pa_pck"]], [0, 100], 0.02, "Procrustes undoes the scale")
    close(row["pa_auc"], 100 * 30 / 31, 1e-3, "strictly below 0 is nobody")
    assert "male bodies of 3, female of 2, body.npz of 1 who are neither" in out
    assert f"{len(body.v_template):,} vertices" in out
    text = spin(tmp_path, "3dpw_test.npz", gender=np.full(6, "neutral"), **common)
    with refused("3dpw_test.npz says nobody's gender"):
        measured(text, rotmats, betas, smpl_genders=tuple(files))


def test_measuring_needs_3d_and_the_right_files(tmp_path, measured):
    np.save(tmp_path / "small.npy", np.zeros((17, 5)))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    for changes, file, sentence in (
            (ONLY_2D, "", "neither S nor pose"), ({}, "none.npy", "none.npy: no such file"),
            ({}, "small.npy", "finite numbers (17, 1229)"), ({}, "objects.npy", "objects.npy")):
        with refused(sentence):
            measured(spin(tmp_path, **changes), joint_regressor=file and str(tmp_path / file))
