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
import functools
import hashlib
import io
import math
import os
import pickle
import pickletools
import re
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import scipy.sparse
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

# Task 1: batch_rodrigues
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
    x, y, z = pose.unbind(-1)                                         # (...) each
    o = torch.zeros_like(x)
    K = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))   # (..., 3, 3)
    eye = torch.eye(3, dtype=pose.dtype, device=pose.device)          # (3, 3)
    return eye + sin_over_a * K + versine_over_a2 * (K @ K)           # (..., 3, 3)
# end of task


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
    return torch.stack([b1, b2, b3], -1)                              # (..., 3, 3) columns


# --------------------------------------------------------------------------------------------
# The body

# Task 2: blend_shapes
def blend_shapes(coefficients: Tensor, directions: Tensor) -> Tensor:
    """Offsets that are linear in some coefficients: (B, C), (V, 3, C) -> (B, V, 3).

    One formula serves SMPL's two uses, shape (C = 10 betas) and pose (C = 207 pose features).
    """
    V = directions.shape[0]
    offsets = coefficients @ directions.flatten(0, 1).T               # (B, V*3)
    return offsets.unflatten(-1, (V, 3))                              # (B, V, 3)
# end of task


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


# Task 3: batch_rigid_transform
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
    # Then its parent's motion carries it along: A_i = A_parent local_i.  SMPL's two products,
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
    return posed[:, :, :3, 0], A                                      # (B, 24, 3), (B, 24, 4, 4)
# end of task


# Task 4: lbs
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
    joint_dirs = (J_regressor @ shapedirs.flatten(1)).unflatten(1, (3, 10))       # (24, 3, 10)
    J = J_regressor @ v_template + blend_shapes(betas, joint_dirs)    # (B, 24, 3)
    # 3. Pose blend shapes: what skinning alone would get wrong (collapsing elbows, bulging
    #    knees), linear in the elements of R - I.  "- I" makes the rest pose need no correction.
    #    The root is left out because turning the whole body bends nothing: with it there would be
    #    216 features, not the file's 207, and Theta-bar's Rx(pi) would dent an upright body.
    eye = torch.eye(3, dtype=rotmats.dtype, device=rotmats.device)    # (3, 3)
    pose_feature = (rotmats[:, 1:] - eye).flatten(1)                  # (B, 207)
    v_posed = v_shaped + blend_shapes(pose_feature, posedirs)         # (B, V, 3)
    # 4. Kinematic chain.
    joints, A = batch_rigid_transform(rotmats, J, parents)            # (B, 24, 3), (B, 24, 4, 4)
    # 5. Skinning: each vertex follows a weighted mean T of the bones' motions, v' = T [v; 1].  T is
    #    made column by column, coordinates first: (B, V, 4, 4) would take most of the time.
    T_x, T_y, T_z, T_1 = (column.movedim(2, 0) @ weights.T
                          for column in A[:, :, :3].unbind(3))        # (3, B, V) each
    v_x, v_y, v_z = v_posed.unbind(2)                                 # (B, V) each
    skinned = T_x * v_x + T_y * v_y + T_z * v_z + T_1                 # (3, B, V), as T_x to T_1
    return torch.stack(skinned.unbind(0), 2), joints                  # (B, V, 3), (B, 24, 3)
# end of task


# --------------------------------------------------------------------------------------------
# The body file made callable

def without_autocast(method: Callable) -> Callable:
    """Keep a caller's autocast out of a method: bfloat16 would be 1 cm in a body."""
    @functools.wraps(method)
    def in_full_precision(self, x: Tensor, *args, **options):
        if x.device.type == "meta":                       # which knows no autocast
            return method(self, x, *args, **options)
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x, *args, **options)
    return in_full_precision


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
        self.name, self.sha256 = printable(path.name), hashlib.sha256(path.read_bytes()).hexdigest()
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
        if value.ndim == 3:     # one direction after the other lies quicker in memory
            value = value.permute(2, 0, 1).contiguous().permute(1, 2, 0)          # (V, 3, C)
        self.register_buffer(name, value, persistent=False)

    @without_autocast
    def forward(self, betas: Tensor, pose: Tensor, vertices: bool = True) -> SMPLOutput:
        """betas (B, 10); pose (B, 72) or (B, 24, 3) axis-angle, or (B, 24, 3, 3) matrices.

        -> SMPLOutput in SMPL's frame, metres.  `vertices=False` skins only what the keypoints need.
        """
        if betas.ndim != 2 or betas.shape[1] != 10 or not {betas.dtype, pose.dtype} <= {
                torch.float32, torch.float64}:
            raise ValueError(f"betas must be (B, 10), and with the pose float32 or float64; got "
                             f"{tuple(betas.shape)}, {betas.dtype} and {pose.dtype}")
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

def say(text: str) -> None:
    """Print a line of a run, which goes on if nobody reads it any longer (`| head`)."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


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


def printable(text: object) -> str:
    """Words of others in one line: whatever could steer a terminal is escaped, as \\x1b or \\n."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def exit_status(program: str, run: Callable[[], None]) -> int:
    """Run a command.  Bad input (ValueError, OSError), full memory: one sentence, exit status 2;
    Ctrl-C: 130.  Letters that the terminal lacks are escaped: they end no run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # a notebook's has not
            stream.reconfigure(errors="backslashreplace")
    try:
        run()
    except KeyboardInterrupt as error:
        print(f"\n{program}: {printable(error) or 'stopped'}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"{program}: {printable(error)}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:          # a GPU's, the CPU's, Python's
        full = "out of memory|allocate memory|size calculation overflowed"
        if isinstance(error, RuntimeError) and not re.search(full, str(error)):
            raise
        print(f"{program}: the memory is full; free some, or make --batch or --size smaller",
              file=sys.stderr)
        return 2
    return 0


# SMPL's official files are Python-2 pickles of chumpy and scipy objects.  A pickle is a program: a
# plain `pickle.load` runs whatever it says (and needs chumpy, which no longer imports).  Here
#   1. `_scan` reads the program without running it: is it as short as a body's, and no hungrier?
#   2. `_BodyUnpickler` runs it, knows the few names that such files hold, and puts an inert
#      stand-in for each: nothing is imported, nothing called, any other name refused;
#   3. `_plain` makes arrays of the stand-ins' parts, by functions that check what they are given.
# numpy's and scipy's own classes are stand-ins, too, for these trust a pickled state: a forged
# dtype makes numpy read, and forged indices make scipy write, anywhere in memory.

_CHUMPY = ("Ch", "Select", "Reshape", "transpose")
_SPARSE = tuple(f"{kind}_{of}" for kind in ("csc", "csr", "coo") for of in ("matrix", "array"))
# No module is imported, nor asked for: their names change with the versions (numpy.core, _core).
_NAMES = ("_reconstruct", "_frombuffer", "ndarray", "dtype", "scalar", *_CHUMPY, *_SPARSE,
          "_reconstructor", "object", "set", "encode", "bytes")       # Python's own


class _Refused(ValueError):
    """The file is not broken: it wants something that no body file needs."""


class _StandIn:
    """An object of a pickle: its class's name, its arguments and its state, never acted on."""

    args, state = (), {}

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):              # without it a pickle may set any attribute
        self.state = state


class _BodyUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if name not in _NAMES:
            raise _Refused(f"it asks for {module:.80}.{name:.80}")
        return type(name, (_StandIn,), {})

    def persistent_load(self, name):
        raise _Refused("it asks for an object outside the file")


class _Ascii(io.BytesIO):
    def readline(self, *_):                     # pickletools takes no other strings: here any do
        return super().readline().translate(None, bytes([*b"\\", *range(128, 256)]))


def _scan(program: bytes, limit: int = 20_000) -> None:
    """Refuse what would fill the memory or the stack; a body takes some 1,000 instructions.

    The unpickler in C allocates as many memory slots as the highest number says, and a byte array
    before it reads it (pickletools raises if the file ends before); a million nested tuples as a
    dictionary's key end the process.
    """
    for n, (instruction, argument, _) in enumerate(pickletools.genops(_Ascii(program))):
        if n > limit or instruction.name.endswith("PUT") and argument > limit:
            raise _Refused(f"it asks for more than {limit:,} instructions or memory slots")


def _text(x):
    """A string of Python 2 or 3 or bytes, however written, as the text of these characters."""
    if isinstance(x, _StandIn):                 # encode(text, "latin1"), bytes(): protocols 0 to 2
        return "".join(x.args[:1])
    return x.decode("latin1") if isinstance(x, (bytes, bytearray)) else x


def _array(value: _StandIn) -> np.ndarray:
    """numpy's three ways to write numbers; frombuffer and reshape count them."""
    kind, shape, order = type(value).__name__, (), "C"
    if kind == "_frombuffer":                   # an array in protocol 5, unless it has gaps
        data, dtype, shape, order, *axes = value.args
    elif kind == "scalar":
        dtype, data = value.args
    else:                                       # _reconstruct, any array in any protocol
        _, shape, dtype, fortran, data = value.state
        order = "F" if fortran else "C"
    code = _text(dtype.args[0])
    if not re.fullmatch("b1|f[248]|[iu][1248]", code):
        raise ValueError(f"an array of {code!r}, not of numbers")
    stored = np.dtype(code).newbyteorder(_text(dtype.state[1]))       # "<", ">" or "|"
    array = np.frombuffer(_text(data).encode("latin1"), stored).astype(code, copy=False)
    if order == "K":                            # numpy 2.3: as in memory, and the order of the axes
        return array.reshape(shape).transpose(*axes)
    return array.reshape(shape, order=order)


def _dense(kind: str, part: dict) -> np.ndarray:
    """scipy's matrix, built anew, so that scipy checks the indices (coo's without being asked)."""
    data, shape = _array(part["data"]), part.get("_shape") or part["shape"]
    if math.prod(int(n) for n in shape) > 10 ** 7:      # SMPL's largest array: 6.2 million numbers
        raise ValueError(f"a sparse matrix of shape {shape}")
    make = getattr(scipy.sparse, kind)
    if kind.startswith("coo"):
        places = part.get("coords") or (part["row"], part["col"])
        return make((data, tuple(_array(axis) for axis in places)), shape=shape).toarray()
    matrix = make((data, _array(part["indices"]), _array(part["indptr"])), shape=shape)
    matrix.check_format(full_check=True)
    # ... which looks at no index where indptr ends in 0, and takes differences that wrap at 2^31
    if (matrix.indptr[1:] < matrix.indptr[:-1]).any():
        raise ValueError("a sparse matrix whose indptr falls")
    return matrix.toarray()


def _plain(value) -> np.ndarray:
    """Stand-ins, nested as chumpy nests them, as one array."""
    kind = type(value).__name__
    if kind == "_reconstructor":                # protocols 0 and 1
        kind = value.args[0].__name__
    if kind in ("_reconstruct", "_frombuffer", "scalar"):
        return _array(value)
    if kind not in _CHUMPY + _SPARSE:
        raise ValueError(f"{kind} where numbers should be")
    part = {_text(key): x for key, x in value.state.items()}
    if kind in _SPARSE:
        return _dense(kind, part)
    array = _plain(part["x" if kind == "Ch" else "a"])
    if kind == "Select":
        array = array.ravel()[_array(part["idxs"])]
        return array.reshape(part.get("preferred_shape", array.shape))
    if kind == "Reshape":
        return array.reshape(part["newshape"])
    return array.transpose(part.get("axes")) if kind == "transpose" else array


_KEYS = ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "kintree_table", "f")
_OWN_KEYS = ("cocoplus_regressor", "mean_pose")    # HMR's; this project's
# What people get in place of a body: its first bytes, with which no pickle begins, and what to do.
_MISTAKEN = {b"<": "an HTML page: log in and download again",
             b"version https://git-lfs": "a Git LFS pointer: run git lfs pull",
             b"\x1f\x8b": "a gzip archive: unpack it and name the file in it",
             (b"{", b"["): "JSON: get an official .pkl"}


def _read(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of an .npz or pickle under the keys above, still to be checked."""
    for beginning, what in _MISTAKEN.items():
        if content[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(beginning):
            raise ValueError(f"neither an .npz nor an SMPL .pkl but {what}")
    try:
        if content[:2] == b"PK":                # a zip: .npz, whatever the file is called
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                if sum(member.file_size for member in file.zip.infolist()) > 2 ** 30:
                    raise _Refused("it unpacks to more than 1 GiB")
                return {key: file[key] for key in file.files if key in _KEYS + _OWN_KEYS}
        _scan(content)
        raw = _BodyUnpickler(io.BytesIO(content), encoding="latin1").load()
        if isinstance(raw, dict):
            raw = {_text(key): value for key, value in raw.items()}
            return {key: _plain(raw[key]) for key in _KEYS + _OWN_KEYS if key in raw}
    except _Refused as error:
        raise ValueError(f"refused, {error}; an official SMPL .pkl needs nothing of the kind, get "
                         f"that file") from None
    except Exception as error:
        what = ("not a whole .npz of plain number arrays" if content[:2] == b"PK" else
                "neither an .npz nor a readable SMPL .pkl")
        raise ValueError(f"{what} ({type(error).__name__}: {error!s:.200}); it may be truncated, "
                         f"get the file again") from None
    raise ValueError(f"expected a pickled dict of SMPL arrays, found {type(raw).__name__}; use an "
                     f"official SMPL .pkl")


def _approximate_keypoints(template: np.ndarray, J_regressor: np.ndarray) -> np.ndarray:
    """For official files without HMR's regressor: 19 keypoints from joints and skin -> (19, V).

    Limbs and neck are J_regressor's rows, applied to the posed skin (so that in a bent pose they
    are near the 24 joints but not equal to them); the face is five vertices of the official mesh
    (the paper's footnote is one too high) and the head's top its highest vertex.  Approximate:
    SMPL's hips, neck and ankles are not where LSP's annotators click.
    """
    if len(template) != 6890:
        raise ValueError("lacks cocoplus_regressor (the 19 keypoints), which can only be "
                         "approximated for SMPL's own mesh of 6890 vertices; use HMR's "
                         "neutral_smpl_with_cocoplus_reg.pkl")
    regressor = np.zeros((19, 6890))
    regressor[:13] = J_regressor[[JOINT_NAMES.index(name) for name in KEYPOINT_NAMES[:13]]]
    vertices = (template[:, 1].argmax(), 332, 2800, 6260, 583, 4071)    # head top, nose, eyes, ears
    regressor[range(13, 19), vertices] = 1
    return regressor


def _checked(raw: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    missing = [key for key in _KEYS if key not in raw]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}; expected the keys of an SMPL file")
    for key, array in raw.items():
        if array.dtype.kind not in "fiu" or not array.size:
            raise ValueError(f"{key} is {array.dtype!s:.80} {array.shape}, expected numbers; is it "
                             f"an SMPL file?")
        if not np.isfinite(array).all():
            raise ValueError(f"{key} holds NaN or infinity; get the file again")
    tree = raw["kintree_table"]
    # The official table stores the root's parent as 4294967295, which is -1 in uint32.
    parents = tree[0].astype(np.int64).astype(np.int32) if tree.ndim == 2 else np.zeros(0)
    if parents.tolist() != list(PARENTS):
        others = {16: ", as MANO", 52: ", as SMPL-H", 55: ", as SMPL-X"}
        raise ValueError(f"kintree_table is not SMPL's tree of 24 joints (this one has "
                         f"{len(parents)}{others.get(len(parents), '')}); use SMPL's own file")
    V = raw["v_template"].size // 3             # its shape is checked below
    shapes = {"v_template": (V, 3), "shapedirs": (V, 3, 10), "posedirs": (V, 3, 207),
              "J_regressor": (24, V), "weights": (V, 24), "cocoplus_regressor": (19, V),
              "mean_pose": (72,)}
    raw.setdefault("mean_pose", np.zeros(72))   # official files have none: it is a file beside them
    data = {}
    for key, shape in shapes.items():
        if key not in raw:
            raw[key] = _approximate_keypoints(data["v_template"], data["J_regressor"])
            print(f"{name} has no cocoplus_regressor: the 19 keypoints are approximate")
        array = raw[key]
        if key == "shapedirs" and array.ndim == 3 and array.shape[2] > 10:
            print(f"{name} has {array.shape[2]} betas: the first 10 are used, as in HMR")
            array = array[:, :, :10]
        if array.shape != shape:
            raise ValueError(f"{key} is {array.dtype} {array.shape}, expected numbers of shape "
                             f"{shape}; is it an SMPL file?")
        data[key] = array.astype(np.float64)
    data["parents"], f = parents, raw["f"]
    if f.ndim != 2 or f.shape[1] != 3 or (f % 1).any() or f.min() < 0 or f.max() >= V:
        raise ValueError(f"f must be (F, 3) vertex numbers below {V}; get the file again")
    data["f"] = f.astype(np.int64)
    return data


def load_body(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read and check an SMPL file (.npz or official .pkl, no chumpy needed) -> dict of arrays.

    Keys: v_template (V,3), shapedirs (V,3,10), posedirs (V,3,207), J_regressor (24,V),
    weights (V,24), cocoplus_regressor (19,V), f (F,3), parents (24,), mean_pose (72,).
    Raises FileNotFoundError or ValueError with one sentence naming file, key and remedy.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(printable(f"{path}: no such body file; leave --smpl out for the "
                                          f"open body, or see README for where to get SMPL's"))
    if path.is_dir():
        raise FileNotFoundError(printable(f"{path}: a folder; name the SMPL file in it"))
    content = path.read_bytes()                 # an OSError (permission, say) speaks for itself
    try:
        if not content:
            raise ValueError("an empty file; get it again")
        return _checked(_read(content), printable(path.name))
    except ValueError as error:
        raise ValueError(printable(f"{path}: {error}")) from None


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
