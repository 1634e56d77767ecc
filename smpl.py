"""SMPL, a body you can differentiate: (betas, pose) -> vertices, joints, keypoints.

Chapter 1 of 4 (smpl.py <- hmr.py <- data.py <- train.py).  HMR Sec. 3.1; Loper et al., "SMPL: A
Skinned Multi-Person Linear Model", 2015.  A mesh of V vertices in a T-pose is (1) given a person's
shape, (2) told where that person's joints are, (3) corrected for the pose, (4) its skeleton is
posed, (5) its skin follows the skeleton.  `lbs` below is those five steps; read it first.

Axes:  B bodies   V vertices (1,229 open body, 6,890 SMPL)   U of them under keypoints   F triangles
       24 joints   19 keypoints   10 betas   207 = 23 joints * 9 pose features   C coefficients
Frame: SMPL's own: x towards the person's LEFT, y UP, z forward (out of the chest); metres.
       The camera's frame (hmr.py) has y down; nothing here knows about cameras.
Rotations act on column vectors, v' = R v.  `pose` holds axis-angle vectors: the direction is the
axis, the length is the angle in radians.

    python smpl.py               # shapes and known values, a posed body in out/smpl.obj
    python smpl.py --smpl FILE   # the same with an official SMPL file: checks that it loads
"""

import argparse
import hashlib
import io
import math
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------
# The skeleton: facts that everything else indexes by.

JOINT_NAMES = (
    "pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle",
    "right_ankle", "spine3", "left_foot", "right_foot", "neck", "left_collar", "right_collar",
    "head", "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist",
    "right_wrist", "left_hand", "right_hand")
# The kinematic tree: PARENTS[i] < i, so a loop over 1..23 meets every parent before its child.
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)

# The 19 keypoints that pictures are labelled with are NOT the 24 joints: they are regressed from
# the skin (HMR's "cocoplus" order; the first 14 are LSP's joints, the last 5 are COCO's face).
KEYPOINT_NAMES = (
    "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "right_wrist",
    "right_elbow", "right_shoulder", "left_shoulder", "left_elbow", "left_wrist", "neck",
    "head_top", "nose", "left_eye", "right_eye", "left_ear", "right_ear")

# A mirrored person: which joint (keypoint) takes whose place.  Applying either twice is identity.
FLIP_JOINTS = (0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20, 23, 22)
FLIP_KEYPOINTS = (5, 4, 3, 2, 1, 0, 11, 10, 9, 8, 7, 6, 12, 13, 14, 16, 15, 18, 17)

OPEN_BODY = Path(__file__).resolve().parent / "assets" / "body.npz"


# --------------------------------------------------------------------------------------------
# Rotations

def batch_rodrigues(pose: Tensor) -> Tensor:
    """Axis-angle to rotation matrix, exact in value and gradient everywhere, zero included.

    pose (..., 3) radians -> (..., 3, 3).  Rodrigues: R = I + sin(a)/a K + (1 - cos a)/a^2 K^2 with
    a = |r| and K = [r]x.  The published implementations divide by |r + 1e-8|, which is NaN at
    r = (-1e-8, -1e-8, -1e-8) and inexact near zero; here both factors are functions of a^2, and
    their Taylor series take over where the quotients would be 0/0.
    """
    if pose.shape[-1:] != (3,):
        raise ValueError(f"axis-angle must be (..., 3), got {tuple(pose.shape)}")
    a2 = pose.square().sum(-1)[..., None, None]                       # (..., 1, 1)
    small = a2 < 1e-4                  # next terms of the series: < 1e-21, below float64's epsilon
    # `where` alone would not do: the branch not taken still sends 0 * inf = NaN into the gradient.
    safe = torch.where(small, torch.ones_like(a2), a2)
    a = safe.sqrt()
    sin_over_a = torch.where(small, 1 - a2 / 6 * (1 - a2 / 20 * (1 - a2 / 42)), a.sin() / a)
    # 1 - cos a = 2 sin^2(a/2): no cancellation for small angles in float32
    versine_over_a2 = torch.where(small, 0.5 - a2 / 24 * (1 - a2 / 30 * (1 - a2 / 56)),
                                  2 * (a / 2).sin().square() / safe)
    x, y, z = pose.unbind(-1)
    o = torch.zeros_like(x)
    K = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))   # (..., 3, 3)
    eye = torch.eye(3, dtype=pose.dtype, device=pose.device)
    return eye + sin_over_a * K + versine_over_a2 * (K @ K)           # (..., 3, 3)


def rot6d_to_rotmat(x: Tensor) -> Tensor:
    """6D to rotation matrix by Gram-Schmidt (Zhou et al. 2019); not in HMR, used by SPIN.

    x (..., 6) -> (..., 3, 3).  SPIN's layout, interleaved: x viewed as (3, 2) holds R's first two
    columns, so the identity is [1,0,0,1,0,0]; 4D-Humans stores the columns one after the other.
    """
    if x.shape[-1:] != (6,):
        raise ValueError(f"6D rotations must be (..., 6), got {tuple(x.shape)}")
    a1, a2 = x.unflatten(-1, (3, 2)).unbind(-1)                       # (..., 3) each
    b1 = nn.functional.normalize(a1, dim=-1)
    b2 = nn.functional.normalize(a2 - (b1 * a2).sum(-1, keepdim=True) * b1, dim=-1)
    b3 = torch.linalg.cross(b1, b2, dim=-1)
    return torch.stack([b1, b2, b3], -1)                              # columns


# --------------------------------------------------------------------------------------------
# The body

def blend_shapes(coefficients: Tensor, directions: Tensor) -> Tensor:
    """Offsets that are linear in some coefficients: (B, C), (V, 3, C) -> (B, V, 3).

    One formula serves SMPL's two uses, shape (C = 10 betas) and pose (C = 207 pose features).
    """
    V = directions.shape[0]
    offsets = coefficients @ directions.flatten(0, 1).T               # (B, V*3)
    return offsets.unflatten(-1, (V, 3))                              # (B, V, 3)


def tree_levels(parents: tuple[int, ...] | Tensor) -> list[int]:
    """How many joints there are in each level of the tree, one below the other's.

    SMPL numbers its joints level by level: [1, 3, 3, 3, 5, 3, 2, 2, 2].  (In a tree numbered
    otherwise, runs of joints whose parents all come before the run.)
    """
    first = [0]
    for joint, parent in enumerate(parents):
        if parent >= first[-1]:                 # its parent is in this level: the next one begins
            first.append(joint)
    return [end - start for start, end in zip(first, [*first[1:], len(parents)])]


def batch_rigid_transform(rotmats: Tensor, joints: Tensor,
                          parents: tuple[int, ...] | Tensor) -> tuple[Tensor, Tensor]:
    """Forward kinematics: pose the skeleton, each joint in its parent's frame.

    rotmats (B, 24, 3, 3) relative to the parent, joints (B, 24, 3) at rest ->
    posed joints (B, 24, 3), and A (B, 24, 4, 4): the motion of each bone from rest to posed.
    """
    # Each bone turns about its own joint J where that is at rest, x -> R (x - J) + J.  Forgetting
    # "J - R J", so that it turns about the origin, explodes the body; the root has a joint, too.
    t = joints - (rotmats @ joints[..., None])[..., 0]                # (B, 24, 3)
    last_row = torch.eye(4, dtype=t.dtype, device=t.device)[3].expand(*t.shape[:2], 1, 4)
    local = torch.cat([torch.cat([rotmats, t[..., None]], 3), last_row], 2)       # (B, 24, 4, 4)
    # Then its parent's motion carries it along: A_i = A_parent local_i.  The paper's two products,
    # G_i(pose) and G_i(rest)^-1, are in it: the bone vectors J_i - J_parent cancel.  A whole level
    # of the tree goes at once, in 8 rounds; a loop over the 23 joints does the same.
    root, *below = local.split(tree_levels(parents), 1)               # (B, n, 4, 4) each
    levels, bones = [root], [root[:, 0]]                              # A by level, and one by one
    for level in below:
        above = [bones[p] for p in parents[len(bones):len(bones) + level.shape[1]]]
        levels.append(torch.stack(above, 1) @ level)                  # (B, n, 4, 4)
        bones += levels[-1].unbind(1)                                 # n x (B, 4, 4)
    A = torch.cat(levels, 1)                                          # (B, 24, 4, 4)
    posed = A @ nn.functional.pad(joints, (0, 1), value=1.0)[..., None]           # (B, 24, 4, 1)
    return posed[:, :, :3, 0], A


def lbs(betas: Tensor, rotmats: Tensor, v_template: Tensor, shapedirs: Tensor, posedirs: Tensor,
        J_regressor: Tensor, parents: tuple[int, ...] | Tensor,
        weights: Tensor) -> tuple[Tensor, Tensor]:
    """SMPL's function M(beta, theta): linear blend skinning of a corrected template.

    betas (B, 10), rotmats (B, 24, 3, 3), v_template (V, 3), shapedirs (V, 3, 10),
    posedirs (V, 3, 207), J_regressor (24, V), parents (24,), weights (V, 24)
    -> vertices (B, V, 3), joints (B, 24, 3), metres.
    """
    # 1. Shape: who is it?
    v_shaped = v_template + blend_shapes(betas, shapedirs)            # (B, V, 3)
    # 2. Joints of THIS person, in the rest pose and before any pose correction.  J_regressor is for
    #    v_shaped; as both are linear, it is applied to the directions, once for all bodies.
    joint_dirs = J_regressor @ shapedirs.flatten(1)                   # (24, 30)
    joint_dirs = joint_dirs.unflatten(1, (3, 10))                     # (24, 3, 10)
    J = J_regressor @ v_template + blend_shapes(betas, joint_dirs)    # (B, 24, 3)
    # 3. Pose blend shapes: what skinning alone would get wrong (collapsing elbows, bulging
    #    knees), linear in the elements of R - I.  "- I" makes the rest pose need no correction.
    #    The root is left out because turning the whole body bends nothing: with it there would be
    #    216 features, not the file's 207, and Theta-bar's Rx(pi) would dent an upright body.
    eye = torch.eye(3, dtype=rotmats.dtype, device=rotmats.device)
    pose_feature = (rotmats[:, 1:] - eye).flatten(1)                  # (B, 207)
    v_posed = v_shaped + blend_shapes(pose_feature, posedirs)         # (B, V, 3)
    # 4. Kinematic chain.
    joints, A = batch_rigid_transform(rotmats, J, parents)            # (B, 24, 3), (B, 24, 4, 4)
    # 5. Skinning: each vertex follows a weighted mean of the bones' motions, v' = motion [v; 1].
    motion = weights @ A[:, :, :3].flatten(2)                         # (B, V, 12)
    v_homogeneous = nn.functional.pad(v_posed, (0, 1), value=1.0)     # (B, V, 4)
    vertices = motion.unflatten(2, (3, 4)) @ v_homogeneous[..., None]             # (B, V, 3, 1)
    return vertices[..., 0], joints


# --------------------------------------------------------------------------------------------
# The body file made callable

class SMPLOutput(NamedTuple):
    vertices: Tensor | None   # (B, V, 3), None if not asked for
    joints: Tensor            # (B, 24, 3) the skeleton's joints
    keypoints: Tensor         # (B, 19, 3) regressed from the skin, KEYPOINT_NAMES


class SMPL(nn.Module):
    """A body file made callable.  `SMPL()` is the open body; `SMPL(path)` any SMPL .npz or .pkl.

    All tensors are buffers, so `.double()` and `.to(device)` work, and none is persistent, so that
    no checkpoint ever carries a licensed body; checkpoints store `name` and `sha256` instead.
    Constants are rounded to float32 on loading; `.double()` does not bring the digits back.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        super().__init__()
        path = Path(path or OPEN_BODY)
        data = load_body(path)
        self.name, self.sha256 = path.name, hashlib.sha256(path.read_bytes()).hexdigest()
        self.parents = tuple(int(p) for p in data["parents"])
        # The losses need joints and keypoints, not the whole skin.  So there is a second body, kp_:
        # the U vertices from which keypoints are regressed, then the 24 joints themselves, as
        # points whose shapes are regressed here, once, and which no pose moves: step 2 picks them.
        J, regressor = data["J_regressor"], data["cocoplus_regressor"]            # (24, V), (19, V)
        joints = {"v_template": J @ data["v_template"], "posedirs": np.zeros((24, 3, 207)),
                  "shapedirs": np.einsum("jv,vcn->jcn", J, data["shapedirs"]),
                  "weights": np.zeros((24, 24))}
        used = (regressor != 0).any(0).nonzero()[0]                   # (U,)
        few = {key: np.concatenate([data[key][used], joints[key]]) for key in joints}
        few["J_regressor"] = np.eye(24, len(used) + 24, len(used))    # (24, U + 24): the last 24
        for key in few:
            self._constant(key, data[key])
            self._constant("kp_" + key, few[key])
        self._constant("cocoplus_regressor", regressor)               # (19, V)
        self._constant("kp_regressor", regressor[:, used])            # (19, U)
        self.register_buffer("kp_vertices", torch.tensor(used), persistent=False)     # (U,)
        self._constant("mean_pose", data["mean_pose"])                # (72,)
        self.register_buffer("faces", torch.tensor(data["f"]), persistent=False)      # (F, 3)

    def _constant(self, name: str, value: np.ndarray) -> None:
        value = torch.tensor(value, dtype=torch.float32)
        if value.ndim == 3:     # (V, 3, C): one direction after the other lies quicker in memory
            value = value.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        self.register_buffer(name, value, persistent=False)

    def forward(self, betas: Tensor, pose: Tensor, vertices: bool = True) -> SMPLOutput:
        """betas (B, 10); pose (B, 72) or (B, 24, 3) axis-angle, or (B, 24, 3, 3) matrices.

        -> SMPLOutput in SMPL's frame, metres.  `vertices=False` skins only what the keypoints need.
        """
        if betas.ndim != 2 or betas.shape[1] != 10:
            raise ValueError(f"betas must be (B, 10), got {tuple(betas.shape)}")
        B = betas.shape[0]
        if tuple(pose.shape) == (B, 24, 3, 3):
            rotmats = pose
        elif tuple(pose.shape) in ((B, 72), (B, 24, 3)):
            rotmats = batch_rodrigues(pose.reshape(B, 24, 3))         # (B, 24, 3, 3)
        else:
            raise ValueError(f"pose must be ({B}, 72), ({B}, 24, 3) or ({B}, 24, 3, 3) to go with "
                             f"betas {tuple(betas.shape)}, got {tuple(pose.shape)}")
        template, shapedirs, posedirs, J_regressor, weights = (
            getattr(self, key if vertices else "kp_" + key) for key in (
                "v_template", "shapedirs", "posedirs", "J_regressor", "weights"))
        v, joints = lbs(betas, rotmats, template, shapedirs, posedirs, J_regressor, self.parents,
                        weights)                          # (B, V or U + 24, 3), (B, 24, 3)
        v_used = v[:, self.kp_vertices] if vertices else v[:, :-24]   # (B, U, 3)
        # = cocoplus_regressor @ vertices, without its columns of zeros
        keypoints = torch.einsum("ku,buc->bkc", self.kp_regressor, v_used)        # (B, 19, 3)
        return SMPLOutput(v if vertices else None, joints, keypoints)


# ============================================================================================
# Not needed to understand HMR: writing files, reading body files.

def save_obj(path: str | os.PathLike, vertices: Tensor, faces: Tensor) -> None:
    """Write one mesh, vertices (V, 3) and faces (F, 3), as Wavefront OBJ (1-based indices)."""
    lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in vertices.tolist()]
    lines += [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in faces.tolist()]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Write under a temporary name, then rename: an interrupted write leaves no half file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:                       # a full disk, say
        temporary.unlink(missing_ok=True)
        raise


def exit_status(program: str, run: Callable[[], None]) -> int:
    """Run a command.  Bad input (ValueError, OSError), full memory: one sentence, exit status 2;
    Ctrl-C: 130."""
    try:
        run()
    except KeyboardInterrupt as error:
        print(f"\n{program}: {error or 'stopped'}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:               # a GPU's, the CPU's, numbers beyond 64 bits
        if not re.search("out of memory|allocate memory|size calculation overflowed", str(error)):
            raise
        print(f"{program}: the memory is full; free some, or make --batch or --size smaller",
              file=sys.stderr)
        return 2
    return 0


# SMPL's official files are Python-2 pickles of chumpy and scipy objects.  A plain `pickle.load`
# runs whatever the file says and needs chumpy, which no longer imports.  This unpickler knows the
# few names such files contain, makes an inert stand-in of each, and refuses any other.  numpy's
# and scipy's own classes are stand-ins too: their C code trusts a pickled state, and a forged dtype
# or column index is a pointer to anywhere.  `_plain` then builds the arrays from checked parts.

class _StandIn:
    """A pickled object's arguments and state, kept and never acted on."""

    def __new__(cls, *args):                    # not __init__, which protocol 2 does not call
        self = object.__new__(cls)
        self.args, self.state = args, {}
        return self

    def __setstate__(self, state):
        if isinstance(state, tuple) and len(state) == 2:              # (dict, slots) of protocol 2
            state = {**(state[0] or {}), **(state[1] or {})}
        self.state = state


_Dtype, _Array, _Buffer, _Scalar, _Ch, _Select, _Reshape, _Transpose, _Csc, _Csr, _Coo = (
    type(name, (_StandIn,), {}) for name in (
        "dtype", "ndarray", "buffer", "scalar",                       # numpy
        "Ch", "Select", "Reshape", "transpose",                       # chumpy
        "csc", "csr", "coo"))                                         # scipy.sparse


def _reconstructor(cls, base, state):
    return cls()


class _Refused(Exception):
    """The file is not broken: it wants something done that no body file needs."""


def _latin1(text, encoding="latin1"):
    if encoding != "latin1":
        raise _Refused(f"it asks for the codec {encoding!r}")
    return text.encode("latin1")


class _BodyUnpickler(pickle._Unpickler):
    # The pure-Python unpickler: its memo is a dict, where the one in C allocates as many slots as a
    # file of ten bytes may ask for.
    KNOWN = {
        ("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype, ("_codecs", "encode"): _latin1,
        ("chumpy.ch", "Ch"): _Ch, ("chumpy", "Ch"): _Ch,
        ("chumpy.reordering", "Select"): _Select, ("chumpy.reordering", "Reshape"): _Reshape,
        ("chumpy.reordering", "transpose"): _Transpose,
    }
    for _core in ("numpy.core", "numpy._core"):
        KNOWN[f"{_core}.multiarray", "_reconstruct"] = _Array
        KNOWN[f"{_core}.multiarray", "scalar"] = _Scalar
        KNOWN[f"{_core}.numeric", "_frombuffer"] = _Buffer            # protocol 5
    for _py in ("2", "3"):                      # set: chumpy's names of its fields
        _copyreg, _builtins = {"2": ("copy_reg", "__builtin__"), "3": ("copyreg", "builtins")}[_py]
        KNOWN[_copyreg, "_reconstructor"] = _reconstructor
        KNOWN[_builtins, "object"] = KNOWN[_builtins, "set"] = _StandIn
    for _kind, _cls in (("csc", _Csc), ("csr", _Csr), ("coo", _Coo)):
        for _module in (f"scipy.sparse.{_kind}", f"scipy.sparse._{_kind}", "scipy.sparse"):
            KNOWN[_module, f"{_kind}_matrix"] = KNOWN[_module, f"{_kind}_array"] = _cls

    def find_class(self, module, name):
        if (module, name) not in self.KNOWN:
            raise _Refused(f"it asks for {module}.{name}")
        return self.KNOWN[module, name]

    def persistent_load(self, name):
        raise _Refused(f"it asks for an object outside the file, {name!r}")

    def load_build(self):           # else a file could set attributes of the functions above
        if not isinstance(self.stack[-2], _StandIn):
            raise _Refused(f"it sets the state of a {type(self.stack[-2]).__name__}")
        super().load_build()

    # A bytearray is allocated before it is read, bytes are not.
    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build,
                pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8}


def _numbers(data, dtype: _Dtype, shape, order: str) -> np.ndarray:
    code = dtype.args[0]
    if code not in ("b1", "f2", "f4", "f8", *(f"{k}{n}" for k in "iu" for n in (1, 2, 4, 8))):
        raise ValueError(f"an array of {code!r}, not of numbers")
    byte_order = dtype.state[1] if dtype.state else "="               # "<", ">" or "|"
    data = data.encode("latin1") if isinstance(data, str) else data   # a Python-2 string
    return np.frombuffer(data, np.dtype(code).newbyteorder(byte_order)).reshape(shape, order=order)


def _plain(value):
    """Stand-ins (nested as chumpy nests them) -> numpy arrays; anything else unchanged."""
    if not isinstance(value, _StandIn):
        return value
    state, args = value.state, value.args
    if isinstance(value, _Array):
        _, shape, dtype, fortran, data = state
        return _numbers(data, dtype, shape, "F" if fortran else "C")
    if isinstance(value, _Buffer):
        return _numbers(*args[:4])
    if isinstance(value, _Scalar):
        return _numbers(args[1], args[0], (), "C")
    if isinstance(value, _Ch):
        return np.asarray(_plain(state["x"]))
    if isinstance(value, _Select):              # a.ravel()[idxs] in preferred_shape
        picked = np.asarray(_plain(state["a"])).ravel()[np.asarray(_plain(state["idxs"]))]
        return picked.reshape(state.get("preferred_shape", picked.shape))
    if isinstance(value, _Reshape):
        return np.asarray(_plain(state["a"])).reshape(state["newshape"])
    if isinstance(value, _Transpose):
        return np.asarray(_plain(state["a"])).transpose(state.get("axes"))
    if isinstance(value, (_Csc, _Csr, _Coo)):
        return _dense(value)
    raise ValueError(f"a {type(value).__name__} where numbers should be")


def _dense(sparse: _StandIn) -> np.ndarray:
    """scipy.sparse by hand, because scipy writes wherever the file's indices point."""
    part = {key: _plain(value) for key, value in sparse.state.items()}
    shape = tuple(int(n) for n in part.get("_shape") or part["shape"])
    if math.prod(shape) > 10 ** 7:              # SMPL's largest array has 6.2 million numbers
        raise ValueError(f"a sparse matrix of shape {shape}")
    if isinstance(sparse, _Coo):
        place = part.get("coords") or (part["row"], part["col"])
        place = tuple(_plain(axis) for axis in place)
    else:                                       # datum n lies in the column (csc) or row (csr) ...
        n = np.arange(len(part["data"]))        # ... whose run, indptr[c] to indptr[c + 1], holds n
        place = (part["indices"], np.searchsorted(part["indptr"], n, "right") - 1)
        place = place if isinstance(sparse, _Csc) else place[::-1]
    dense = np.zeros(shape, part["data"].dtype)
    np.add.at(dense, place, part["data"])       # checks every index; duplicates add up
    return dense


_KEYS = ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "kintree_table", "f")
_OWN_KEYS = ("cocoplus_regressor", "mean_pose")    # HMR's; this project's


def _read_raw(path: Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such body file; leave --smpl out for the open body, "
                                f"or see README for where to get SMPL's")
    if path.is_dir():
        raise FileNotFoundError(f"{path}: a folder; name the SMPL file in it")
    content = path.read_bytes()                 # an OSError (permission, say) speaks for itself
    if content[:2] == b"PK":                    # a zip: .npz, whatever the file is called
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                return {key: file[key] for key in file.files if key in _KEYS + _OWN_KEYS}
        except Exception:
            raise ValueError(f"{path}: not a whole .npz of plain number arrays (objects are "
                             f"refused); get the file again, or use the official .pkl") from None
    try:
        raw = _BodyUnpickler(io.BytesIO(content), encoding="latin1").load()
        if isinstance(raw, dict):
            return {key: _plain(value) for key, value in raw.items() if key in _KEYS + _OWN_KEYS}
    except _Refused as error:
        raise ValueError(f"{path}: refused, {error}; an official SMPL .pkl needs nothing of the "
                         f"kind, get that file") from None
    except Exception as error:
        raise ValueError(f"{path}: neither an .npz nor a readable SMPL .pkl "
                         f"({type(error).__name__}: {error}); it may be truncated, get the file "
                         f"again") from None
    raise ValueError(f"{path}: expected a pickled dict of SMPL arrays, found "
                     f"{type(raw).__name__}; use an official SMPL .pkl")


def _approximate_keypoints(path: Path, template: np.ndarray, J_regressor: np.ndarray) -> np.ndarray:
    """For official files without HMR's regressor: 19 keypoints from joints and skin -> (19, V).

    Limbs and neck are J_regressor's rows, applied to the posed skin (so that in a bent pose they
    are near the 24 joints but not equal to them); the face is five vertices of the official mesh
    (the paper's footnote is one too high) and the head's top its highest vertex.  Approximate:
    SMPL's hips, neck and ankles are not where LSP's annotators click.
    """
    if len(template) != 6890:
        raise ValueError(f"{path}: lacks cocoplus_regressor (the 19 keypoints), which can only be "
                         f"approximated for SMPL's own mesh of 6890 vertices; use HMR's "
                         f"neutral_smpl_with_cocoplus_reg.pkl")
    print(f"{path.name} has no cocoplus_regressor: the 19 keypoints are approximate")
    regressor = np.zeros((19, 6890))
    for k, name in enumerate(KEYPOINT_NAMES[:13]):
        regressor[k] = J_regressor[JOINT_NAMES.index(name)]
    vertices = (template[:, 1].argmax(), 332, 2800, 6260, 583, 4071)    # head top, nose, eyes, ears
    regressor[range(13, 19), vertices] = 1
    return regressor


def load_body(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read and check an SMPL file (.npz or official .pkl, no chumpy needed) -> dict of arrays.

    Keys: v_template (V,3), shapedirs (V,3,10), posedirs (V,3,207), J_regressor (24,V),
    weights (V,24), cocoplus_regressor (19,V), f (F,3), parents (24,), mean_pose (72,).
    Raises FileNotFoundError or ValueError with one sentence naming file, key and remedy.
    """
    path = Path(path)
    raw = _read_raw(path)
    missing = [key for key in _KEYS if key not in raw]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; expected the keys of an SMPL file")
    for key, value in raw.items():
        try:
            array = np.asarray(value)
        except ValueError:                      # a ragged list
            array = np.zeros(0, object)
        if array.dtype.kind not in "fiu" or not array.size:
            raise ValueError(f"{path}: {key} is {array.dtype} {array.shape}, expected numbers; is "
                             f"it an SMPL file?")
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {key} holds NaN or infinity; get the file again")
        raw[key] = array
    tree = raw["kintree_table"]
    # The official table stores the root's parent as 4294967295, which is -1 in uint32.
    parents = tree[0].astype(np.int64).astype(np.int32) if tree.ndim == 2 else np.zeros(0)
    if parents.tolist() != list(PARENTS):
        others = {16: ", as MANO", 52: ", as SMPL-H", 55: ", as SMPL-X"}
        raise ValueError(f"{path}: kintree_table is not SMPL's tree of 24 joints (this one has "
                         f"{len(parents)}{others.get(len(parents), '')}); use SMPL's own file")
    V = raw["v_template"].size // 3             # its shape is checked below
    shapes = {"v_template": (V, 3), "shapedirs": (V, 3, 10), "posedirs": (V, 3, 207),
              "J_regressor": (24, V), "weights": (V, 24), "cocoplus_regressor": (19, V),
              "mean_pose": (72,)}
    raw.setdefault("mean_pose", np.zeros(72))   # official files have none: it is a file beside them
    data = {}
    for key, shape in shapes.items():
        if key not in raw:
            raw[key] = _approximate_keypoints(path, data["v_template"], data["J_regressor"])
        array = raw[key]
        if key == "shapedirs" and array.ndim == 3 and array.shape[2] > 10:
            print(f"{path.name} has {array.shape[2]} betas: the first 10 are used, as in HMR")
            array = array[:, :, :10]
        if array.shape != shape:
            raise ValueError(f"{path}: {key} is {array.dtype} {array.shape}, expected numbers of "
                             f"shape {shape}; is it an SMPL file?")
        data[key] = array.astype(np.float64)
    data["parents"], f = parents, raw["f"]
    if f.ndim != 2 or f.shape[1] != 3 or (f % 1).any() or f.min() < 0 or f.max() >= V:
        raise ValueError(f"{path}: f must be (F, 3) vertex numbers below {V}; get the file again")
    data["f"] = f.astype(np.int64)
    return data


# --------------------------------------------------------------------------------------------
# The demo

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pose a body; print shapes and known values.")
    parser.add_argument("--smpl", metavar="FILE", help="an SMPL .npz or .pkl (default: open body)")
    parser.add_argument("--out", default="out", help="folder for smpl.obj")
    args = parser.parse_args(argv)
    return exit_status("smpl.py", lambda: _demo(SMPL(args.smpl), Path(args.out)))


def _demo(smpl: SMPL, out: Path) -> None:
    print(f"{smpl.name}  sha256 {smpl.sha256[:12]}  V = {len(smpl.v_template)}  "
          f"F = {len(smpl.faces)}")
    betas, pose = torch.zeros(1, 10), torch.zeros(1, 24, 3)
    rest = smpl(betas, pose)
    height = rest.vertices[0, :, 1].max() - rest.vertices[0, :, 1].min()
    quarter = batch_rodrigues(torch.tensor([0, 0, torch.pi / 2])) @ torch.tensor([1.0, 0, 0])
    few = smpl(betas, pose, vertices=False)
    for name, axis, angle in (("left_shoulder", 2, -1.2), ("right_shoulder", 2, 0.9),
                              ("left_elbow", 1, -0.4), ("right_elbow", 1, 1.6),
                              ("left_hip", 0, -0.6), ("left_knee", 0, 0.9)):
        pose[0, JOINT_NAMES.index(name), axis] = angle                # radians about x, y or z
    posed = smpl(betas, pose)
    print(f"vertices {tuple(rest.vertices.shape)}  joints {tuple(rest.joints.shape)}  "
          f"keypoints {tuple(rest.keypoints.shape)}")
    for what, got, expected in [
            ("a quarter turn about z takes x to", [round(v, 3) for v in quarter.tolist()], "y"),
            ("zero betas and pose minus template, m",
             f"{(rest.vertices[0] - smpl.v_template).abs().max():.1e}", "below 1e-6"),
            ("stature, m", f"{height:.2f}", "about 1.7"),
            ("left wrist at x, m", f"{rest.joints[0, 20, 0]:.2f}", "positive: left is +x"),
            ("keypoints-only body minus whole body, m",
             f"{(few.keypoints - rest.keypoints).abs().max():.1e}", "below 1e-6"),
            ("bent left knee before the hip, m",
             f"{posed.joints[0, 4, 2] - posed.joints[0, 1, 2]:.2f}", "positive: forward is +z")]:
        print(f"  {what:40s} {got!s:18s} expected {expected}")
    save_obj(out / "smpl.obj", posed.vertices[0], smpl.faces)
    print(f"wrote {out / 'smpl.obj'}: arms down, right elbow and left leg bent")


if __name__ == "__main__":
    sys.exit(main())
