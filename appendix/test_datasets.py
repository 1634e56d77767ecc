"""Real data, without any: tiny files in each published layout, odd ones among them, and what the
readers, batches and measures of datasets.py make of them, by name and number."""

import argparse
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from torchvision.io import encode_jpeg, write_jpeg

import data
import train
from appendix import datasets
from appendix.datasets import J24_NAMES, RealPeople, read_people
from hmr import HMROutput
from smpl import KEYPOINT_NAMES, OPEN_BODY, SMPL
from test_hmr import (body, close, precision_of_the_encoder,  # noqa: F401 (fixtures)
                      same_numbers_every_time, same, tiny, weights_of)

K = {name: k for k, name in enumerate(KEYPOINT_NAMES)}
J24 = {name: k for k, name in enumerate(J24_NAMES)}


def person(x=320.0, y=240.0, length=200.0) -> np.ndarray:
    """Made-up keypoints (19, 2), pixels: upright about (x, y), `length` from head to feet."""
    rng = np.random.default_rng(0)
    heights = {"ankle": 0.48, "knee": 0.25, "hip": 0.0, "wrist": 0.05, "elbow": -0.1,
               "shoulder": -0.25, "neck": -0.3, "head_top": -0.5, "nose": -0.4, "eye": -0.42,
               "ear": -0.41}
    points = np.zeros((19, 2))
    for name, k in K.items():
        side = 0.1 * (name.startswith("left") - name.startswith("right"))
        kind = name if name in heights else name.split("_")[1]
        points[k] = x + length * side, y + length * heights[kind]
    return points + rng.uniform(-2, 2, (19, 2))


def write_pictures(folder: Path, names, height=480, width=640) -> None:
    """A ramp: red grows with x, green with y, so that a pixel's colour says where it was."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([255 * x // width, 255 * y // height, 0 * x]).to(torch.uint8)
    content = encode_jpeg(image, 95).numpy().tobytes()
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def spin_arrays(N=4, **changes) -> dict:
    """SPIN's npz in its published layout: paths, boxes, J24 in 2D and 3D, SMPL in the camera."""
    part, S = np.zeros((N, 24, 3)), np.zeros((N, 24, 4))
    where = person()
    for name, k in J24.items():
        if name in K:
            part[:, k] = *where[K[name]], 1
        if name != "head_top" and name not in KEYPOINT_NAMES[14:]:    # as H3.6M and 3DHP
            S[:, k, 3], S[:, k, :3] = 1, np.random.default_rng(k).normal(0, 0.3, 3)
    pose = np.zeros((N, 72))
    pose[:, 0] = np.pi
    arrays = dict(imgname=np.array([f"images/{n:03d}.jpg" for n in range(N)]),
                  center=np.tile([320.0, 240.0], (N, 1)), scale=np.full(N, 1.2), part=part, S=S,
                  pose=pose, shape=np.tile(np.arange(10) / 10, (N, 1)), has_smpl=np.ones(N),
                  openpose=np.zeros((N, 25, 3)), gender=np.array(["m", "f"] * (N // 2)))
    arrays |= changes
    return {key: value for key, value in arrays.items() if value is not None}


def spin(folder: Path, name="h36m_train.npz", pictures=True, **changes) -> str:
    """Write such a file and its pictures -> what --data wants."""
    arrays = spin_arrays(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / name, **arrays)
    if pictures:
        write_pictures(folder / "root", arrays["imgname"])
    return f"spin:{folder / name}@{folder / 'root'}"


def coco_annotation(image_id=1, points=None, **changes) -> dict:
    k = np.zeros((17, 3))
    where = person() if points is None else points
    for n, name in enumerate(datasets.COCO_NAMES):
        k[n] = *where[K[name]].round(), 2
    x, y = k[:, :2].min(0)
    w, h = np.ptp(k[:, :2], axis=0)
    return dict(image_id=image_id, category_id=1, iscrowd=0, num_keypoints=17, area=1.0,
                keypoints=[int(v) for v in k.flatten()], bbox=[x, y, w, h],
                segmentation=[[x, y, x + w, y, x + w, y + h]]) | changes


def coco(folder: Path, annotations: list, N=2) -> str:
    images = [dict(id=n + 1, file_name=f"{n + 1:012d}.jpg") for n in range(N)]
    write_pictures(folder / "train2014", [image["file_name"] for image in images])
    path = folder / "person_keypoints_train2014.json"
    path.write_text(json.dumps(dict(images=images, annotations=annotations)), encoding="utf-8")
    return f"coco:{path}@{folder / 'train2014'}"


# ============================================================================================
# Joint orders

def test_the_maps_between_joint_orders_are_the_published_numbers():
    assert datasets.J24_TO_19 == [*range(14), *range(19, 24)]
    assert datasets.J24_TO_14 == [*range(13), 18], "the head's centre, slot 18, not its top, 13"
    assert datasets.H36M_TO_14 == [6, 5, 4, 1, 2, 3, 16, 15, 14, 11, 12, 13, 8, 10]
    assert datasets.COCO_TO_19 == [16, 14, 12, 11, 13, 15, 10, 8, 6, 5, 7, 9, -1, -1, 0, 1, 2, 3, 4]
    assert datasets.J24_PELVIS == 14
    slots = [J24[name] for name in datasets.COCO_NAMES]
    assert slots == [19, 20, 21, 22, 23, 9, 8, 10, 7, 11, 6, 3, 2, 4, 1, 5, 0], "COCO to SPIN's"


def test_the_table_of_joint_orders_is_printed(capsys):
    assert datasets.main(["orders"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1 + 13].split() == ["13", "head_top", "head_top", "head_top", "left_knee",
                                     "left_wrist", "left_collar"], "a row is one number's joints"
    assert lines[1 + 18].split() == ["18", "right_ear", "head_h36m", "left_elbow"]
    assert len(lines) == 25


# ============================================================================================
# Crops

@pytest.mark.parametrize("size,zoom", [(224, 1.0), (64, 0.8), (224, 4.0)])
def test_a_window_shows_what_lies_there(size, zoom):
    """On a ramp, the colour of a crop's pixel is the place it was cut from."""
    y, x = torch.meshgrid(torch.arange(480) + 0.5, torch.arange(640) + 0.5, indexing="ij")
    image = torch.stack([x / 640, y / 480, 0 * x])
    keypoints, visible = torch.tensor(person(length=300)), torch.ones(19)
    crop, points = datasets.crop_person(image, keypoints, visible, size, (7, -5), zoom)
    for k in (0, 3, 8, 13):
        px, py = ((points[k] + 1) * size / 2).tolist()
        if 2 < px < size - 2 and 2 < py < size - 2:
            near = crop[:2, int(py), int(px)] * torch.tensor([640, 480])
            # within the pixel whose corner was truncated to, in the picture's pixels
            close(near, keypoints[k], 224 / size / zoom * 1.8 + 0.5, f"{KEYPOINT_NAMES[k]} moved")
    center, stored = torch.tensor([300.0, 200]), (255 * image).round().to(torch.uint8)
    as_bytes = datasets.cut_window(stored, center, 250.0 / zoom, size)
    exact = datasets.cut_window(image, center, 250.0 / zoom, size)
    assert as_bytes.dtype == torch.uint8
    # rounded when read, when resized and at the end
    close(as_bytes.float() / 255, exact, 1.6 / 255, "bytes and numbers must be cut alike")


def test_many_scales_are_the_single_ones():
    keypoints = torch.tensor(np.stack([person(length=n) for n in (50, 50, 100, 200)])).float()
    keypoints[0] *= 0.05
    visible = (torch.rand(4, 19) < 0.5).float()
    visible[3] = 0
    scales = datasets.person_scales(keypoints, visible)
    assert torch.isfinite(scales).tolist() == [False, True, True, False], "5 pixels, 2 points"
    for n in (1, 2):
        close(scales[n], datasets.person_scale(keypoints[n], visible[n]), 0, "one or many")
    tight = datasets.person_scales(keypoints, visible, "tight")
    close(tight[1:3] / scales[1:3], torch.full((2,), 212 / 150), 1e-6, "tight: 212 px, not 150")


def test_a_box_shows_a_person_as_large_as_keypoints_do(tmp_path, body):
    """SPIN's box of drawn people: 1.2 times the longer side of their keypoints."""
    batch = data.SyntheticPeople(body, data.load_mocap(False, False), 256, 2, labels="all").batch(0)
    points = (100 * (batch.keypoints2d + 2)).numpy()
    low, high = points.min(1), points.max(1)
    box = np.concatenate([(low + high) / 2, 1.2 * (high - low).max(1)[:, None]], 1)
    names = [f"{n}.jpg" for n in range(256)]
    by_points = datasets.people("a", tmp_path, names, points, np.ones((256, 19)), box)
    by_box = datasets.people("b", tmp_path, names, 0 * points, np.zeros((256, 19)), box)
    for crop in data.CROPS:
        (center, side), (center_b, side_b) = (datasets.windows(people, crop)
                                              for people in (by_points, by_box))
        close(center, center_b, 1e-3, "both are the box's middle")
        close((side_b / side).median(), 1.0, 0.05, f"{crop}: the median person's size")
    center, side = datasets.windows(by_points, "spin")
    close(side, by_points.box[:, 2], 0, "SPIN's network sees the box itself")


def test_spins_crop_is_black_outside_and_its_box_itself(tmp_path):
    text = spin(tmp_path, center=np.tile([10.0, 240.0], (4, 1)))
    for crop, left in (("spin", 0), ("official", 1)):
        pictures = datasets.InOrder([read_people(text)], 224, crop)
        image, points = pictures[0][0].image[0].float(), pictures[0][0].keypoints2d[0]
        assert (image[:2, :, 0].sum() > 0) == left, f"{crop}: beyond the picture"
        if crop == "spin":
            expected = (torch.tensor(person()[0] + 0.5) - torch.tensor([10.5, 240.5])) / 120
            close(points[0], expected, 1e-5, "the box, 240 pixels about (10, 240), is [-1, 1]")


# ============================================================================================
# Pictures of every kind

def png(rows: np.ndarray, color: int, depth: int) -> bytes:
    """A PNG by hand: torchvision writes neither 16 bits nor RGBA.  color 2: RGB, 6: RGBA."""
    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))
    raw = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, color, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw))
            + chunk(b"IEND", b""))


def test_pictures_of_every_kind_become_rgb_bytes(tmp_path):
    color = torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1).expand(3, 20, 30)
    write_jpeg(color[:1].contiguous(), str(tmp_path / "grey.jpg"), 100)
    rows = color.permute(1, 2, 0).numpy().astype(np.uint16)           # (20, 30, 3)
    clear = np.concatenate([rows, rows[..., :1] // 4], 2)             # a quarter opaque
    (tmp_path / "rgba.png").write_bytes(png(clear, color=6, depth=8))
    (tmp_path / "16bit.png").write_bytes(png(257 * rows, color=2, depth=16))
    write_jpeg(color.contiguous(), str(tmp_path / "plain.jpg"), 100)
    content = (tmp_path / "plain.jpg").read_bytes()
    # tag 0x112, orientation, 6: turn it by a quarter to look at it
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    turned = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    (tmp_path / "turned.jpg").write_bytes(content[:2] + turned + content[2:])
    expected = {"grey.jpg": [200] * 3, "rgba.png": [200, 100, 50], "16bit.png": [200, 100, 50],
                "plain.jpg": [200, 100, 50], "turned.jpg": [200, 100, 50]}
    for name, rgb in expected.items():
        image = datasets.read_picture(str(tmp_path / name))
        assert image.shape == (3, 20, 30), f"{name}: as stored, not turned by a tag"
        assert image.dtype == torch.uint8
        close(image[:, 5, 5].float(), torch.tensor(rgb).float(), 3, f"{name}: RGB in 0..255")


def test_a_picture_that_cannot_be_read_says_why(tmp_path):
    write_pictures(tmp_path, ["whole.jpg"])
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[:len(content) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.jpg").write_bytes(b"<html>log in</html>")
    for name, why in (("cut.jpg", "no whole"), ("empty.jpg", "no whole"), ("page.jpg", "no whole"),
                      ("gone.jpg", "No such file")):
        with pytest.raises(ValueError, match=why):
            datasets.read_picture(str(tmp_path / name))


# ============================================================================================
# Readers

def test_spins_file_is_read_by_name(tmp_path):
    found = read_people(spin(tmp_path))
    assert found.name == "spin:h36m_train.npz" and found.image[2] == b"images/002.jpg"
    for name, k in K.items():
        assert found.visible[0, k], name
        close(torch.tensor(found.keypoints2d[0, k]), person()[k] + 0.5, 1e-4, f"{name}: + 0.5")
    close(torch.tensor(found.box[0]), [320.5, 240.5, 240.0], 0, "scale 1.2 is a box of 240 pixels")
    for name, k in J24.items():
        assert (found.S[0, k, 3] > 0) == (name != "head_top" and name not in KEYPOINT_NAMES[14:])
    assert found.has_smpl.all() and found.gender.tolist() == [b"m", b"f"] * 2
    close(torch.tensor(found.pose[0, 0]), np.pi, 1e-6, "the root is in the camera's frame")
    close(torch.tensor(found.betas[0, 9]), 0.9, 1e-6, "shape is betas")


def test_spins_file_may_lack_keys(tmp_path):
    h36m_valid = read_people(spin(tmp_path / "a", part=None, openpose=None, pose=None, shape=None,
                                  has_smpl=None, gender=None))
    assert not h36m_valid.visible.any() and h36m_valid.pose is None
    assert not h36m_valid.has_smpl.any() and h36m_valid.gender.tolist() == [b""] * 4
    coco_train = read_people(spin(tmp_path / "b", S=None, pose=None, shape=None, has_smpl=None,
                                  gender=None))
    assert coco_train.S is None and not datasets.has_3d_labels(coco_train)
    pw3d_test = read_people(spin(tmp_path / "c", part=None, S=None, has_smpl=None))
    assert pw3d_test.has_smpl.all(), "without has_smpl whoever has a pose has SMPL labels"
    mpi_inf_train = read_people(spin(tmp_path / "d", pose=-np.ones((4, 72)),
                                     shape=-np.ones((4, 10)), has_smpl=np.array([0, 0, 1, 0])))
    assert mpi_inf_train.has_smpl.tolist() == [False, False, True, False]
    assert (mpi_inf_train.pose[0] == 0).all(), "-1 is no label and must not be kept"


def test_nan_and_missing_hips_are_not_labels(tmp_path):
    arrays = spin_arrays()
    arrays["S"][0, J24["left_knee"], 1] = np.nan
    arrays["S"][1, J24["left_hip"], 3] = 0
    arrays["part"][2, J24["nose"], 0] = np.inf
    arrays["pose"][3, 7] = np.nan
    found = read_people(spin(tmp_path, **arrays))
    assert found.S[0, J24["left_knee"]].tolist() == [0, 0, 0, 0]
    assert found.S[0, J24["right_knee"], 3] == 1 and not found.S[1, :, 3].any(), "no hips: no 3D"
    assert not found.visible[2, K["nose"]] and found.visible[2].sum() == 18
    assert found.has_smpl.tolist() == [True, True, True, False]
    for array in (found.S, found.keypoints2d, found.pose, found.betas):
        assert np.isfinite(array).all()


def test_people_without_points_or_box_are_left_out(tmp_path):
    arrays = spin_arrays()
    arrays["part"][:3] = 0                                            # no visible point
    arrays["scale"][0], arrays["scale"][1] = np.nan, 1 / 200          # no box; a box of 1 pixel
    found = read_people(spin(tmp_path, **arrays))
    assert found.image.tolist() == [b"images/002.jpg", b"images/003.jpg"]
    assert datasets.reasons(found) == "2 no 2 keypoints nor box of 5 pixels"


@pytest.mark.parametrize("changes,sentence", [
    (dict(imgname=None), "lacks imgname"),
    (dict(part=np.zeros((3, 24, 3))), r"part is float64 \(3, 24, 3\), expected numbers \(4, 24,"),
    (dict(S=np.zeros((4, 14, 3))), r"S is float64 \(4, 14, 3\), expected numbers \(4, 24, 4\)"),
    (dict(center=np.array(["a"] * 4)), "center is"),
    (dict(pose=np.array([{}] * 4, object)), "not a whole .npz of plain arrays"),
    (dict(shape=None), "one of pose and shape"),
    (dict(part=np.zeros((4, 24, 3)), center=None, scale=None), "nobody in it")])
def test_a_wrong_spin_file_says_so(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_people(spin(tmp_path, pictures=False, **changes))


def test_a_cut_npz_says_so(tmp_path):
    text = spin(tmp_path)
    path = tmp_path / "h36m_train.npz"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="h36m_train.npz: not a whole .npz"):
        read_people(text)


def test_coco_is_read_by_name_and_filtered_as_the_official_converter_does(tmp_path):
    def changed(**names):
        a = coco_annotation()
        for name, v in names.items():
            a["keypoints"][3 * datasets.COCO_NAMES.index(name) + 2] = v
        return a
    limbs = {name: 0 for name in datasets.COCO_NAMES[7:]}
    hidden = dict.fromkeys(datasets.COCO_NAMES[:12], 1)               # 5 of visibility 2 are left
    annotations = [coco_annotation(2), changed(left_wrist=1), changed(nose=0), coco_annotation(
        iscrowd=1, segmentation=dict(counts=[1], size=[1, 1])), changed(**hidden),
        coco_annotation(segmentation=[[0, 0, 60, 0, 60, 60]]), changed(**limbs),
        coco_annotation(keypoints=[1, 2]), coco_annotation(image_id=9), coco_annotation(
        segmentation=[[0, 0, 61, 0]]), coco_annotation(segmentation=[[0, 0, 61]]), None]
    found = read_people(coco(tmp_path, annotations))
    assert found.image.tolist() == [b"000000000002.jpg"] + 3 * [b"000000000001.jpg"]
    for name, k in K.items():
        labelled = name not in ("neck", "head_top")
        assert found.visible[0, k] == labelled, f"{name}: COCO labels neither neck nor head's top"
        if labelled:
            close(torch.tensor(found.keypoints2d[0, k]), person()[k].round() + 0.5, 1e-4, name)
    assert found.visible[1, K["left_wrist"]], "visibility 1, occluded, is a label"
    assert not found.visible[2, K["nose"]] and (found.keypoints2d[2, K["nose"]] == 0).all()
    assert found.skipped == {"crowds or no persons": 1, "fewer than 6 visible keypoints": 1,
                             "60 pixels or smaller": 1, "face and shoulders only": 1,
                             "broken row": 4}
    x, y, w, h = annotations[0]["bbox"]
    close(torch.tensor(found.box[0]), [x + w / 2, y + h / 2, 1.2 * max(w, h)], 1e-3, "its box")
    assert found.S is None and found.pose is None and not found.has_smpl.any()


def test_a_wrong_coco_file_says_so(tmp_path):
    for content, sentence in (("{", "JSONDecodeError"), ("[]", "TypeError"), ("{}", "KeyError"),
                              ('{"images": [], "annotations": []}', "nobody")):
        (tmp_path / "a.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=sentence):
            read_people(f"coco:{tmp_path / 'a.json'}@{tmp_path}")


def lsp_file(folder: Path, extended: bool, N=4) -> np.ndarray:
    """joints.mat: LSP (3, 14, N), LSPET (14, 3, N); MATLAB's pixels; joint 5 of person 1 hidden."""
    folder.mkdir()
    joints = np.zeros((N, 14, 3))
    joints[..., :2] = person()[:14] + 1
    joints[..., 2] = 1 if extended else 0
    joints[1, 5, 2] = 0 if extended else 1
    order = (1, 2, 0) if extended else (2, 1, 0)
    scipy.io.savemat(folder / "joints.mat", {"joints": joints.transpose(order)})
    digits = 5 if extended else 4
    write_pictures(folder / "images", [f"im{n + 1:0{digits}d}.jpg" for n in range(N)])
    return joints


@pytest.mark.parametrize("extended", [False, True])
def test_lsp_and_lspet_have_opposite_flags(tmp_path, extended):
    lsp_file(tmp_path / "lsp", extended)
    found = read_people(f"lsp:{tmp_path / 'lsp'}")
    assert len(found.image) == (4 if extended else 2), "LSP's second half is its test set"
    assert found.image[1] == (b"im00002.jpg" if extended else b"im0002.jpg")
    assert found.visible[0].tolist() == [True] * 14 + [False] * 5
    assert found.visible[1].sum() == 13 and not found.visible[1, K["left_ankle"]]
    close(torch.tensor(found.keypoints2d[0, :14]), person()[:14] + 0.5, 1e-4, "from 1: - 0.5")


def test_a_wrong_mat_file_says_so(tmp_path):
    text = f"lsp:{tmp_path}"
    with pytest.raises(FileNotFoundError, match="joints.mat: no such file"):
        read_people(text)
    hdf5 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n"
    for content, sentence in ((hdf5, "MATLAB 7.3"), (b"junk" * 99, "not a readable .mat")):
        (tmp_path / "joints.mat").write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            read_people(text)
    for joints in (np.zeros((3, 13, 9)), np.array([[{"a": 1}]], object)):
        scipy.io.savemat(tmp_path / "joints.mat", {"joints": joints})
        with pytest.raises(ValueError, match="expected LSP's numbers"):
            read_people(text)
    scipy.io.savemat(tmp_path / "joints.mat", {"other": np.zeros(3)})
    with pytest.raises(ValueError, match="KeyError"):
        read_people(text)


@pytest.mark.parametrize("text,sentence", [
    ("mpii:a@b", "expected coco:ANNOTATIONS.json@IMAGES"), ("spin:a.npz", "IMAGES being"),
    ("coco:", "expected coco"), ("spin:gone.npz@x", "gone.npz: no such file"),
    ("coco:gone.json@x", "gone.json: no such file")])
def test_a_wrong_data_option_says_so(text, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        read_people(text)


def test_a_path_may_hold_colons_and_ats_and_the_wrong_folder_is_found_at_once(tmp_path):
    spin(tmp_path / "a:b@c")
    (tmp_path / "a:b@c" / "root").rename(tmp_path / "root")
    text = f"spin:{tmp_path / 'a:b@c' / 'h36m_train.npz'}@{tmp_path / 'root'}"
    assert len(read_people(text).image) == 4, "the first colon, the last at"
    with pytest.raises(FileNotFoundError, match="images/000.jpg is not there"):
        read_people(spin(tmp_path / "d", pictures=False))


def amass_file(path: Path, rate=120.0, seconds=2, **changes) -> np.ndarray:
    """AMASS' SMPL+H: 52 joints; here joint j of frame n turns by n / 1000 + j / 100 about x."""
    path.parent.mkdir(parents=True, exist_ok=True)
    N = int(rate * seconds)
    poses = np.zeros((N, 52, 3))
    poses[..., 0] = np.arange(N)[:, None] / 1000 + np.arange(52) / 100
    arrays = dict(poses=poses.reshape(N, 156), betas=np.arange(16) / 10.0, gender=np.array("male"),
                  mocap_framerate=np.array(rate), trans=np.zeros((N, 3)), dmpls=np.zeros((N, 8)))
    np.savez(path, **(arrays | changes))
    return poses


def test_amass_is_brought_to_ten_frames_a_second_and_smpls_joints(tmp_path, capsys):
    poses = amass_file(tmp_path / "CMU" / "01" / "01_01_poses.npz")
    amass_file(tmp_path / "CMU" / "01" / "01_02_poses.npz", rate=250.0, seconds=1)
    np.savez(tmp_path / "CMU" / "01" / "shape.npz", betas=np.zeros(16))
    frames, betas = datasets.read_amass(tmp_path)
    assert frames.shape == (30, 24, 3) and betas.shape == (30, 10)
    close(frames[:20, :22], poses[::12, :22], 1e-6, "120 a second: every 12th frame")
    close(frames[:20, 22:], poses[::12][:, [22, 37]], 1e-6, "hands: SMPL-H's 22 and 37")
    close(frames[20:, 0, 0], torch.arange(0, 250, 25) / 1000, 1e-6, "250: every 25th")
    close(betas[0], torch.arange(10) / 10, 1e-6, "the first 10 of 16")
    assert "2 clips, 30 frames" in capsys.readouterr().out


def test_hands_that_amass_leaves_still_wander(tmp_path):
    poses = amass_file(tmp_path / "a_poses.npz", rate=10.0, seconds=2000)
    poses[:, 22:] = [0.1, 0.2, 0.3]
    np.savez(tmp_path / "a_poses.npz", poses=poses.reshape(-1, 156), betas=np.zeros(16),
             mocap_framerate=10.0)
    frames, _ = datasets.read_amass(tmp_path)
    degrees = torch.rad2deg(frames[:, 22:])                           # (20000, 2, 3)
    # 20,000 frames of a wave of some 5 frames: the mean is known to 0.15 degrees
    close(degrees.mean(0), torch.tensor([[0, 0, -10.0], [0, 0, 10]]), 0.6, "closed by 10 degrees")
    close(degrees.std(0), torch.tensor([[3, 3, 10.0], [3, 3, 10]]), 0.5, "assets/README.md's")
    apart = np.corrcoef(degrees[:, 0, 2], degrees[:, 1, 2])[0, 1]
    assert abs(apart) < 0.1, "both hands move alike"
    again, _ = datasets.read_amass(tmp_path)
    assert torch.equal(frames, again), "drawn by a fixed seed"


@pytest.mark.parametrize("changes,sentence", [
    (dict(poses=np.zeros((240, 165))), "SMPL-X's has 165"), (dict(betas=np.zeros(3)), r"\(3,\)"),
    (dict(mocap_framerate=np.array(0.0)), "mocap_framerate"),
    (dict(poses=np.full((240, 156), np.nan)), "not finite"),
    (dict(poses=np.array([{}], object)), "plain arrays")])
def test_a_wrong_amass_file_says_so(tmp_path, changes, sentence):
    amass_file(tmp_path / "a_poses.npz", **changes)
    with pytest.raises(ValueError, match=sentence):
        datasets.read_amass(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no .npz"):
        datasets.read_amass(tmp_path / "nothing")


def test_one_bad_clip_in_a_hundred_is_named_and_left_out(tmp_path, capsys):
    for n in range(100):
        amass_file(tmp_path / f"{n:03d}_poses.npz", rate=10.0, seconds=1)
    (tmp_path / "050_poses.npz").write_bytes(b"cut")
    frames, _ = datasets.read_amass(tmp_path)
    assert len(frames) == 990 and "050_poses.npz" in capsys.readouterr().out


# ============================================================================================
# Batches

def world(body, *texts, rank=0, ranks=1, workers=0, mix=(), mocap="", **changes) -> RealPeople:
    options = argparse.Namespace(data=texts, workers=workers, mix=mix, mocap=mocap)
    config = train.Config(**dict(batch=8, size=64, device="cpu") | changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "rank_and_ranks", lambda: (rank, ranks))
        return RealPeople(config, body, options)


def test_a_batch_is_a_function_of_seed_step_and_rank_whatever_the_workers(tmp_path, body):
    texts = spin(tmp_path / "a"), coco(tmp_path / "b", [coco_annotation(1), coco_annotation(2)])
    batches = {}
    for workers in (0, 1, 3):
        people = world(body, *texts, workers=workers)
        batches[workers] = [people.batch(step) for step in (0, 1, 2, 7, 8, 1)]
    for workers in (1, 3):
        for one, other in zip(batches[0], batches[workers]):
            assert same(list(one), list(other)), f"{workers} workers give other pictures"
    assert same(list(batches[0][1]), list(batches[0][5])), "step 1 again"
    first = batches[0][0]
    for other in (batches[0][1], world(body, *texts, seed=1).batch(0),
                  world(body, *texts, rank=1).batch(0)):
        assert not torch.equal(first.image, other.image), "another seed, step or rank"
    assert world(body, *texts, ranks=2).batch(0).image.shape == (4, 3, 64, 64), "a rank's share"


def test_drawing_ahead_leaves_the_random_numbers_of_dropout_alone(tmp_path, body):
    people, before = world(body, spin(tmp_path), workers=1), torch.get_rng_state()
    people.batch(0), people.motion(8, 0)
    assert torch.equal(before, torch.get_rng_state()), "the loader drew from the global generator"


def test_a_batch_holds_labels_that_fit_its_pictures(tmp_path, body):
    """Colours say where a pixel was cut from: whatever jitter and flip did, labels did as well."""
    batch = world(body, spin(tmp_path), batch=32, size=224).batch(0)
    assert batch.image.shape == (32, 3, 224, 224)
    assert 0 <= batch.image.min() <= batch.image.max() <= 1
    mirrored = batch.image[:, 0, 112, -1] < batch.image[:, 0, 112, 0]             # red falls
    assert 6 < mirrored.sum() < 26, "the official flip: half the time"
    for n in range(32):
        for name in ("right_ankle", "left_wrist", "nose"):
            k = datasets.FLIP_KEYPOINTS[K[name]] if mirrored[n] else K[name]
            x, y = ((batch.keypoints2d[n, k] + 1) * 112).int().tolist()
            seen = batch.image[n, :2, y, x] * torch.tensor([640, 480])
            # a crop's pixel is up to 1.7 of the picture's, a step of the ramp 2.5; and JPEG's noise
            close(seen, person()[K[name]] + 0.5, 5, f"{name} of picture {n} is elsewhere")
    # J24 to the 19: S's numbers are a slot's own
    expected = torch.tensor(spin_arrays()["S"][0, J24["left_knee"], :3]).float()
    for n in range(32):
        knee = batch.keypoints3d[n, K["right_knee" if mirrored[n] else "left_knee"]]      # (3,)
        knee = knee * torch.tensor([-1 if mirrored[n] else 1, 1, 1])
        close(knee, expected, 1e-6, "3D flips with the picture")
    assert batch.has_3d[0].tolist() == [1] * 13 + [0] * 6, "head's top and face: no 3D"
    root = torch.tensor(np.diag([1.0, -1, -1])).float()
    close(batch.rotmats[:, 0], root.expand(32, 3, 3), 1e-5, "Rx(pi) mirrored is itself")
    assert batch.has_smpl.all() and (batch.cam == 0).all()


def test_the_jitter_is_the_official_one(tmp_path, body):
    for crop, (diagonal, move, least, most) in data.CROPS.items():
        people = world(body, spin(tmp_path / crop), batch=256, size=32, crop=crop)
        points = 112 * people.batch(0).keypoints2d
        low, high = points.amin(1), points.amax(1)
        zoom = (high - low).norm(dim=-1) / diagonal
        shift = (low + high) / 2 / zoom[:, None]
        assert least <= zoom.min() < least + 0.1 * (most - least), crop
        assert most - 0.1 * (most - least) < zoom.max() <= most + 1e-4, crop
        assert 0.9 * move < shift.abs().amax() <= move + 1e-3, crop
        assert shift.mean(0).abs().max() < 0.2 * move, "the shift has no side"


def test_half_a_batch_has_3d_and_each_half_is_by_size_or_mix_says(tmp_path, body, capsys):
    texts = (spin(tmp_path / "a", "h36m_train.npz", N=6), coco(tmp_path / "b", [coco_annotation()]),
             spin(tmp_path / "c", "lspet.npz", N=2, S=None, pose=None, shape=None))
    for step in range(3):
        batch = world(body, *texts, batch=60).batch(step)
        assert batch.has_smpl.sum() == 30, "half 3D, in every batch"
        neckless = (batch.visible[:, K["neck"]] == 0).sum()
        assert neckless == 10, "COCO has 1 of the 3 people without 3D: a third of a half"
    assert world(body, *texts, batch=60, mix=(0.0, 1.0, 3.0)).batch(0).has_smpl.sum() == 0
    assert world(body, *texts, batch=60, paired=False).batch(0).has_3d.sum() == 0, "--no-paired"
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("spin:h36m_train.npz"))
    assert row.split()[1:5] == ["6", "6", "6", "50%"], f"people, with 3D, with SMPL, share: {row}"
    for mix, sentence in (((1.0,), "one weight"), ((1.0, -1.0, 1.0), "0 or more"),
                          ((0.0, 0.0, 0.0), "not all 0"), ((1.0, float("nan"), 1.0), "0 or more")):
        with pytest.raises(ValueError, match=sentence):
            world(body, *texts, mix=mix)


def test_what_cannot_be_read_is_named_and_replaced_by_the_next(tmp_path, body, capsys):
    text = spin(tmp_path, N=200)
    (tmp_path / "root" / "images" / "007.jpg").write_bytes(b"cut")
    (tmp_path / "root" / "images" / "199.jpg").unlink()
    for workers in (0, 2):
        people = world(body, text, batch=64, size=32, workers=workers)
        for step in range(12):                                        # 768 draws of 200
            batch = people.batch(step)
            assert batch.image.shape[0] == 64 and batch.visible.all()
        out = capsys.readouterr().out
        assert out.count("007.jpg: no whole JPEG or PNG") == 1, "named once"
        assert out.count("199.jpg: No such file") == 1
    (tmp_path / "root" / "images" / "100.jpg").unlink()               # 3 of 200: more than 1 %
    for workers in (0, 2):
        people = world(body, text, batch=64, size=32, workers=workers)
        with pytest.raises(ValueError, match="3 of its 200 people cannot be read, more than 1 %"):
            for step in range(12):
                people.batch(step)


def test_a_data_set_without_pictures_ends_in_one_sentence(tmp_path, body):
    text = spin(tmp_path, N=300)
    for n in range(4, 300):
        (tmp_path / "root" / "images" / f"{n:03d}.jpg").unlink()
    for workers in (0, 1):
        with pytest.raises(ValueError, match="cannot be read, more than 1 %"):
            world(body, text, workers=workers).batch(0)


def test_the_adversary_sees_amass(tmp_path, body):
    poses = amass_file(tmp_path / "amass" / "a_poses.npz", seconds=4)
    people = world(body, spin(tmp_path / "a"), mocap=str(tmp_path / "amass"))
    rotmats, betas = people.motion(64, 5)
    assert rotmats.shape == (64, 23, 3, 3) and betas.shape == (64, 10)
    angle = Rotation.from_matrix(rotmats[:, 2].numpy()).as_rotvec()[:, 0]         # spine1, no side
    recorded = poses[::12, 3, 0]
    apart = np.abs(angle[:, None] - recorded).min(1).max()
    assert apart < 1e-5, f"a pose that was not recorded, {apart:.2g} radians off"
    close(betas, (torch.arange(10) / 10).expand(64, 10), 1e-6, "and its betas")
    assert same(list(people.motion(64, 5)), [rotmats, betas]), "the step decides"
    assert not torch.equal(people.motion(64, 6)[0], rotmats)
    _, betas = world(body, spin(tmp_path / "b")).motion(64, 5)
    assert betas.std() > 0.8, "without --mocap: the open clips, N(0, 1)"


def test_what_a_body_lacks_is_said(tmp_path, body, capsys):
    text = spin(tmp_path)
    world(body, text)
    assert "body.npz is not SMPL's mesh: the betas" in capsys.readouterr().out
    V, rng = 6890, np.random.default_rng(0)
    np.savez(tmp_path / "SMPL_NEUTRAL.npz", v_template=rng.normal(size=(V, 3)).astype(np.float32),
             shapedirs=np.zeros((V, 3, 10), np.float32), posedirs=np.zeros((V, 3, 207), np.float32),
             J_regressor=np.eye(24, V), weights=np.eye(24)[np.arange(V) % 24],
             kintree_table=np.array([body.parents, range(24)]), f=np.array([[0, 1, 2]]))
    world(SMPL(tmp_path / "SMPL_NEUTRAL.npz"), text)
    out = capsys.readouterr().out
    assert "SMPL_NEUTRAL.npz: its 19 keypoints are SMPL's joints" in out and "not SMPL's" not in out


def test_fifty_thousand_people_are_arrays(tmp_path):
    points, names = np.tile(person(), (50_000, 1, 1)), [f"{n:012d}.jpg" for n in range(50_000)]
    found = datasets.people("a", tmp_path, names, points, np.ones((50_000, 19)))
    arrays = [x for x in found if isinstance(x, np.ndarray)]
    assert all(x.dtype != object for x in arrays), "objects: worker processes would copy them all"
    assert sum(x.nbytes for x in arrays) < 30e6, "600 bytes a person"


# ============================================================================================
# Training, through the command line

def arguments(tmp_path, *texts) -> list[str]:
    return ["train", "--data", *texts, "--depth", "18", "--width", "8", "--size", "32", "--batch", "4",
            "--pretrained", "none", "--device", "cpu", "--log-every", "1", "--picture-every", "2",
            "--amp", "off"]


def test_training_on_real_data_goes_on_bit_by_bit(tmp_path, capsys):
    texts = spin(tmp_path / "a"), coco(tmp_path / "b", [coco_annotation(1), coco_annotation(2)])
    flags, runs = arguments(tmp_path, *texts), {name: str(tmp_path / name) for name in ("x", "y")}
    assert datasets.main([*flags, "--steps", "4", "--workers", "2", "--out", runs["x"]]) == 0
    out = capsys.readouterr().out
    assert "MPJPE" not in out, "photographs are measured by `measure`"
    assert "with SMPL" in out and "coco:person_keypoints_train2014.json" in out
    assert datasets.main([*flags, "--steps", "2", "--workers", "0", "--out", runs["y"]]) == 0
    assert train.main(["--resume", "--out", runs["y"], "--steps", "4", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "trained on photographs (spin 4 people" in error and "appendix.datasets train" in error
    moved = spin(tmp_path / "c"), texts[1]                            # the same, in another folder
    go_on = ["train", "--resume", "--out", runs["y"], "--steps", "4", "--device", "cpu"]
    assert datasets.main([*go_on, "--data", texts[1]]) == 2
    assert "go on by the command that began the run" in capsys.readouterr().err
    assert datasets.main([*go_on, "--data", *moved, "--workers", "1"]) == 0
    a, b = (weights_of(tmp_path / name) for name in runs)
    for key in ("model", "discriminator", "opt_E", "opt_D", "world", "step"):
        assert same(a[key], b[key]), f"{key}: other pictures after resuming, or by other workers"
    metrics = json.loads((tmp_path / "x" / "metrics.json").read_text(encoding="utf-8"))
    assert "mpjpe" not in metrics and metrics["images"] == 16
    assert (tmp_path / "x" / "picture.png").exists()
    assert (tmp_path / "x" / "pictures" / "step_000004.png").exists()


def test_what_a_step_of_real_data_learns_from(tmp_path, monkeypatch):
    """A joint that is not labelled in 3D pulls at nothing."""
    seen = []
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: seen.append((args[4], step(*args))) or
                        seen[-1][1])
    assert datasets.main([*arguments(tmp_path, spin(tmp_path / "a")), "--steps", "1", "--out",
                       str(tmp_path / "run"), "--workers", "0"]) == 0
    batch, losses = seen[0]
    assert batch.has_3d[:, K["head_top"]].sum() == 0 < batch.has_3d.sum()
    assert losses.L_joints > 0 and losses.L_smpl > 0 and losses.L_kp > 0


@pytest.mark.parametrize("flags,sentence", [
    (["--data", "spin:x"], "--data spin:x: expected"),
    (["--data", "coco:x.json@y"], "no such file"),
    (["--data", "lsp:x", "--eval", "x.pt"], "--eval: measure on photographs by"),
    (["--data", "lsp:x", "--workers", "-1"], "--workers -1"),
    (["--data", "lsp:x", "--size", "1"], "--size 1")])
def test_wrong_options_end_in_one_sentence(tmp_path, flags, sentence, capsys):
    assert datasets.main(["train", *flags, "--pretrained", "none", "--device", "cpu", "--out",
                          str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1, error


def test_train_py_knows_nothing_of_photographs():
    for flags in (["--data", "x"], ["--mocap", "x"], ["--workers", "1"]):
        with pytest.raises(SystemExit) as stop:
            train.main(flags)
        assert stop.value.code == 2


# ============================================================================================
# Measures, on data whose right answer is known

class Answers:
    """A model that knows the answers but for a known error; pictures are told by their order."""

    def __init__(self, smpl: SMPL, rotmats: Tensor, betas: Tensor, error=lambda points: points):
        self.smpl, self.rotmats, self.betas, self.error, self.asked = smpl, rotmats, betas, error, 0

    def eval(self):
        return self

    def __call__(self, image: Tensor):
        rows = torch.arange(self.asked, self.asked + len(image))
        self.asked += len(image)
        return [rows], None

    def decode(self, rows: Tensor, vertices: bool) -> HMROutput:
        body = self.smpl(self.betas[rows], self.rotmats[rows])
        return HMROutput(None, None, None, None, self.error(body.keypoints), None,
                         self.error(body.vertices))


def poses(body, N: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """rotmats (N, 24, 3, 3), betas (N, 10), pose (N, 72) of drawn people."""
    batch = data.SyntheticPeople(body, data.load_mocap(True, True), N, 2, labels="all").batch(0)
    pose = Rotation.from_matrix(batch.rotmats.flatten(0, 1).numpy()).as_rotvec()
    return batch.rotmats, batch.betas, pose.reshape(N, 72)


def measuring(*texts, joint_regressor="", smpl_genders=()) -> argparse.Namespace:
    return argparse.Namespace(data=texts, workers=0, joint_regressor=joint_regressor,
                              smpl_genders=smpl_genders)


def measured(model, body, capsys, *texts, **changes) -> tuple[dict, str]:
    options = measuring(*texts, **changes)
    (result,) = datasets.evaluate(model, train.Config(size=32), options)
    return result["per_iteration"][0], capsys.readouterr().out


def test_measures_by_s_on_a_known_error(tmp_path, body, capsys):
    """H3.6M's files: S, no SMPL, no 2D.  One knee 132 mm off."""
    N = 70                                                            # two batches of 64
    rotmats, betas, _ = poses(body, N)
    S = np.zeros((N, 24, 4))
    keypoints = body(betas, rotmats).keypoints.numpy()
    for name in KEYPOINT_NAMES[:13]:
        S[:, J24[name]] = np.concatenate([keypoints[:, K[name]] + 5, np.ones((N, 1))], 1)
    text = spin(tmp_path, "h36m_valid_protocol1.npz", N=N, S=S, part=None, pose=None, shape=None,
                has_smpl=None, gender=None)

    def knee(points):
        moved = points.clone()
        if points.shape[1] == 19:
            moved[:, K["left_knee"], 0] += 0.132
        return moved
    row, out = measured(Answers(body, rotmats, betas, knee), body, capsys, text)
    close(row["mpjpe"], 132 / 13, 1e-3, "13 joints: no head's top, wherever S has its root")
    close(row["pck"], 100.0, 1e-6, "132 < 150")
    close(row["auc"], 100 * (12 * 30 + 4) / (13 * 31), 1e-3, "above 132: 135, 140, 145, 150")
    assert not np.isfinite(row["pve"])
    assert "13 of LSP's joints, no head" in out and "mean over 70 frames" in out
    assert "no SMPL labels" in out and "root the hips' middle" in out
    similar = lambda points: 1.1 * points[..., [1, 2, 0]]
    row, _ = measured(Answers(body, rotmats, betas, similar), body, capsys, text)
    close(row["pa_mpjpe"], 0.0, 1e-2, "turned and scaled: Procrustes undoes it")
    close(row["pa_pck"], 100.0, 1e-6, "and its PCK is of the aligned joints")
    close(row["pa_auc"], 100 * 30 / 31, 1e-3, "strictly below 0 is nobody")
    assert row["mpjpe"] > 50
    mirrored = lambda points: points * torch.tensor([-1.0, 1, 1])
    row, _ = measured(Answers(body, rotmats, betas, mirrored), body, capsys, text)
    assert row["pa_mpjpe"] > 5, "a mirrored body must not be excused"


def test_measures_with_the_joint_regressor(tmp_path, body, capsys):
    """14 joints of 17 by name, root at the regressor's pelvis, which is not the hips' middle."""
    N = 5
    rotmats, betas, _ = poses(body, N)
    regressor = torch.softmax(8 * torch.randn(17, len(body.v_template)), 1).numpy()
    np.save(tmp_path / "J_regressor_h36m.npy", regressor.astype(np.float64))
    joints = regressor @ body(betas, rotmats).vertices.numpy()        # (N, 17, 3)
    S = np.zeros((N, 24, 4))
    for n, name in enumerate(datasets.H36M_NAMES):
        slot = J24["pelvis_mpii" if name == "pelvis_h36m" else name]
        S[:, slot] = np.concatenate([joints[:, n] - joints[:, 0], np.ones((N, 1))], 1)
    S[3, J24["head_h36m"], 3] = 0                                     # its head is not known
    text = spin(tmp_path, "mpi_inf_3dhp_valid.npz", N=N, S=S, pose=None, shape=None, has_smpl=None,
                gender=None)
    model = Answers(body, rotmats, betas)
    row, out = measured(model, body, capsys, text,
                        joint_regressor=str(tmp_path / "J_regressor_h36m.npy"))
    close(row["mpjpe"], 0.0, 1e-2, "the truth through the same regressor")
    assert "14 joints by J_regressor_h36m.npy, root its pelvis" in out
    assert "mean over 4 frames" in out, "who lacks a joint is not measured"
    S[:, J24["head_h36m"], 1] += 0.14
    text = spin(tmp_path, "mpi_inf_3dhp_valid.npz", N=N, S=S, pose=None, shape=None, has_smpl=None,
                gender=None)
    row, _ = measured(Answers(body, rotmats, betas), body, capsys, text,
                      joint_regressor=str(tmp_path / "J_regressor_h36m.npy"))
    close(row["mpjpe"], 10.0, 1e-2, "the head 140 mm off, of 14 joints")


def test_measures_by_bodies_of_their_gender(tmp_path, body, capsys):
    """3DPW's files: pose, shape, gender.  Men 1.1 and women 0.9 times the neutral body."""
    rotmats, betas, pose = poses(body, 6)
    with np.load(OPEN_BODY) as file:
        arrays = {key: file[key] for key in file.files}
    files = []
    for scale in (1.1, 0.9):
        files.append(str(tmp_path / f"{scale}.npz"))
        grown = {key: np.float64(scale) * arrays[key]
                 for key in ("v_template", "shapedirs", "posedirs")}
        np.savez(files[-1], **arrays | grown)
    text = spin(tmp_path, "3dpw_test.npz", N=6, S=None, part=None, pose=pose, shape=betas.numpy(),
                has_smpl=None)
    row, out = measured(Answers(body, rotmats, betas), body, capsys, text)
    close(torch.tensor([row["mpjpe"], row["pve"]]), [0.0, 0.0], 1e-2, "one neutral body for all")
    assert "body.npz for all" in out and "LSP's 14 joints, both bodies' own" in out
    row, out = measured(Answers(body, rotmats, betas), body, capsys, text,
                        smpl_genders=tuple(files))
    neutral = body(betas, rotmats)
    root = neutral.keypoints[:, 2:4].mean(1, keepdim=True)
    for key, points in (("mpjpe", neutral.keypoints[:, :14]), ("pve", neutral.vertices)):
        # the bodies are rounded to float32 after scaling, here before
        expected = 100 * (points - root).norm(dim=-1).mean()
        close(row[key], expected, 0.02, f"{key}: a tenth of the distance from the root")
    close(row["pa_mpjpe"], 0.0, 0.02, "only larger and smaller")
    assert "male and female bodies" in out and f"{len(body.v_template):,} vertices" in out


def test_a_picture_that_cannot_be_read_is_not_measured(tmp_path, body, capsys):
    rotmats, betas, pose = poses(body, 130)
    text = spin(tmp_path, "3dpw_test.npz", N=130, S=None, part=None, pose=pose, shape=betas.numpy(),
                has_smpl=None)
    (tmp_path / "root" / "images" / "069.jpg").unlink()
    keep = torch.arange(130) != 69
    row, out = measured(Answers(body, rotmats[keep], betas[keep]), body, capsys, text)
    close(row["mpjpe"], 0.0, 1e-2, "the rows after it must keep their own truth")
    assert "mean over 129 frames" in out and "069.jpg: No such file" in out


def test_measuring_needs_3d_and_the_right_files(tmp_path, body):
    model, text = Answers(body, None, None), spin(tmp_path / "a", S=None, pose=None, shape=None)
    np.save(tmp_path / "small.npy", np.zeros((17, 5)))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    for changes, sentence in (
            ({}, "neither S nor pose"),
            (dict(joint_regressor=str(tmp_path / "none.npy")), "none.npy: no such file"),
            (dict(joint_regressor=str(tmp_path / "small.npy")), r"finite numbers \(17, 1229\)"),
            (dict(joint_regressor=str(tmp_path / "objects.npy")), "not a readable .npy")):
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            datasets.evaluate(model, train.Config(), measuring(text, **changes))


def test_a_checkpoint_is_measured_from_the_command_line(tmp_path, capsys):
    text = spin(tmp_path / "a", "3dpw_test.npz")
    train.train(tiny(tmp_path / "run", steps=1))
    command = ["measure", str(tmp_path / "run" / "checkpoint.pt"), "--data", text]
    capsys.readouterr()
    assert datasets.main([*command, "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert all(f"iteration {t}" in out for t in (1, 2, 3)) and "PA-AUC %" in out
    for flag in (["--eval-pictures", "3"], ["--mix", "1"], ["--smpl-genders", "a"]):
        with pytest.raises(SystemExit) as stop:
            datasets.main([*command, *flag])
        assert stop.value.code == 2 and flag[0] in capsys.readouterr().err


def test_a_run_on_real_data_is_measured_on_the_drawn_world_as_well(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "mean_camera", lambda *_: torch.tensor([[0.9, 0, 0]]))     # quick
    assert datasets.main([*arguments(tmp_path, spin(tmp_path / "a")), "--steps", "1", "--mix", "1",
                          "--out", str(tmp_path / "run")]) == 0
    checkpoint = str(tmp_path / "run" / "checkpoint.pt")
    assert train.main(["--eval", checkpoint, "--eval-pictures", "4"]) == 0
    assert "held-out clips" in capsys.readouterr().out
