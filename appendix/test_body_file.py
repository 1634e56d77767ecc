"""Official body files: the layouts that load, and what hostile, torn and odd files run into."""

import io
import os
import pickle
import re
import struct
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from appendix import body_file
from appendix.body_file import read_arrays
from smpl import KEYPOINT_NAMES, OPEN_BODY, PARENTS, SMPL, load_body, printable
from test_hmr import body, close  # noqa: F401 (a fixture)


# ============================================================================================
# Body files that load

def official_arrays() -> dict:
    """The open body with the official file's keys, types and oddities."""
    with np.load(OPEN_BODY) as file:
        arrays = {key: file[key] for key in file.files}
    arrays.pop("mean_pose")
    arrays["J_regressor"] = scipy.sparse.csc_matrix(arrays["J_regressor"].astype(np.float64))
    arrays["cocoplus_regressor"] = scipy.sparse.csc_matrix(arrays["cocoplus_regressor"])
    arrays["bs_type"], arrays["bs_style"] = "lrotmin", "lbs"
    return arrays


def test_an_official_style_pickle_equals_the_npz(tmp_path, body):
    (tmp_path / "neutral.pkl").write_bytes(pickle.dumps(official_arrays(), protocol=2))
    ours = SMPL(tmp_path / "neutral.pkl")
    for name in ("v_template", "shapedirs", "J_regressor", "cocoplus_regressor", "faces"):
        close(getattr(ours, name), getattr(body, name), 1e-7, f"{name} changed in the pickle")
    assert ours.parents == PARENTS and ours.name == "neutral.pkl"


@pytest.mark.parametrize("protocol, sparse", [
    (0, "csc_matrix"), (1, "csr_matrix"), (2, "coo_matrix"), (3, "csc_array"), (4, "csr_array"),
    (5, "coo_array")])
def test_pickles_of_every_protocol_equal_the_npz(tmp_path, body, protocol, sparse):
    path = tmp_path / "neutral.pkl"
    arrays = official_arrays()
    arrays["J_regressor"] = getattr(scipy.sparse, sparse)(arrays["J_regressor"])
    # under other keys anything may be written in the names that body files use
    arrays["pose_training_info"] = {"n": np.float64(1), "names": np.array(["a", None]), "e": b""}
    path.write_bytes(pickle.dumps(arrays, protocol=protocol))
    ours = SMPL(path)
    for name in ("v_template", "shapedirs", "J_regressor", "cocoplus_regressor", "faces"):
        close(getattr(ours, name), getattr(body, name), 1e-7, f"{name} changed in the pickle")
    assert ours.parents == PARENTS and ours.name == "neutral.pkl"


def chumpy_node(module: str, name: str, **attributes):
    """An object whose pickle says chumpy.<module>.<name>, without chumpy."""
    cls = type(name, (), {"__module__": f"chumpy.{module}"})
    node = vars(sys.modules[f"chumpy.{module}"]).setdefault(name, cls)()
    node.__dict__.update(attributes)
    return node


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_chumpy_arrays_load_without_chumpy(tmp_path, monkeypatch, body, capsys, protocol):
    """chumpy 0.70's objects as official files hold them: Ch, and views of it, nested."""
    for name in ("chumpy", "chumpy.ch", "chumpy.reordering"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    arrays = official_arrays()
    V = len(arrays["v_template"])
    template, weights = (arrays[k].astype(np.float64) for k in ("v_template", "weights"))
    order = np.random.default_rng(0).permutation(3 * V)
    shuffled = np.empty(3 * V)
    shuffled[order] = template.ravel()
    arrays["v_template"] = chumpy_node(
        "reordering", "Select", a=chumpy_node("ch", "Ch", x=shuffled), idxs=order,
        preferred_shape=(V, 3), _dirty_vars=set())
    arrays["weights"] = chumpy_node("reordering", "transpose",
                                    a=chumpy_node("ch", "Ch", x=weights.T.copy()))
    shapedirs = np.concatenate([arrays["shapedirs"], np.ones((V, 3, 290))], 2)    # as v1.1 files
    arrays["shapedirs"] = chumpy_node("reordering", "Reshape", newshape=(V, 3, 300),
                                      a=chumpy_node("ch", "Ch", x=shapedirs.ravel()))
    (tmp_path / "ch.pkl").write_bytes(pickle.dumps(arrays, protocol=protocol))
    for name in ("chumpy", "chumpy.ch", "chumpy.reordering"):
        monkeypatch.delitem(sys.modules, name)
    ours = SMPL(tmp_path / "ch.pkl")
    for name in ("v_template", "weights", "shapedirs"):
        close(getattr(ours, name), getattr(body, name), 1e-7, f"{name}: a wrong view of the array")
    assert "300 betas: the first 10" in capsys.readouterr().out


# What cPickle of Python 2.7 wrote, with numpy 1.16.6 and chumpy 0.70, for {"v_template":
# chumpy.array([[1.5, -2], [3, 4]]).T}: protocol 0, where strings are escaped text, and protocol 2.
PYTHON_2 = {0: (
    rb"(dp1 S'v_template' p2 ccopy_reg _reconstructor p3 (cchumpy.reordering transpose p4 "
    rb"c__builtin__ object p5 NtRp6 (dp7 S'a' g3 (cchumpy.ch Ch p8 g5 NtRp9 (dp10 "
    rb"S'_make_sparse' p11 I00 sS'_dirty_vars' p12 c__builtin__ set p13 ((lp14 S'x' atRp15 "
    rb"sS'_itr' p16 NsS'_depends_on_deps' p17 (dp18 sS'_make_dense' p19 I00 sS'x' "
    rb"cnumpy.core.multiarray _reconstruct p20 (cnumpy ndarray p21 (I0 tS'b' tRp22 (I1 (I2 I2"
    rb" "
    rb"tcnumpy dtype p23 (S'f8' I0 I1 tRp24 (I3 S'<' NNNI-1 I-1 I0 tbI00 "
    rb"S'\x00\x00\x00\x00\x00\x00\xf8?"
    rb"\x00\x00\x00\x00\x00\x00\x00\xc0\x00\x00\x00\x00\x00\x00\x08@"
    rb"\x00\x00\x00\x00\x00\x00\x10@' "
    rb"tbsbsS'_make_sparse' p25 I00 sg12 g13 ((lp26 S'a' atRp27 sg16 Nsg17 (dp28 "
    rb"sS'_make_dense' p29 I00 sbs.").replace(b" ", b"\n"), 2: (
    b"\x80\x02}q\x01U\nv_templateq\x02cchumpy.reordering\ntranspose\nq\x03)\x81q\x04}q\x05(U\x01"
    b"acchumpy.ch\nCh\nq\x06)\x81q\x07}q\x08(U\x0c_make_sparseq\t\x89U\x0b_dirty_varsq\nc__built"
    b"in__\nset\nq\x0b]q\x0cU\x01xa\x85Rq\rU\x04_itrq\x0eNU\x10_depends_on_depsq\x0f}q\x10U\x0b_"
    b"make_denseq\x11\x89U\x01xcnumpy.core.multiarray\n_reconstruct\nq\x12cnumpy\nndarray\nq\x13"
    b"K\x00\x85U\x01b\x87Rq\x14(K\x01K\x02K\x02\x86cnumpy\ndtype\nq\x15U\x02f8K\x00K\x01\x87Rq"
    b"\x16(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U \x00\x00\x00\x00\x00\x00"
    b"\xf8?\x00\x00\x00\x00\x00\x00\x00\xc0\x00\x00\x00\x00\x00\x00\x08@\x00\x00\x00\x00\x00\x00"
    b"\x10@tbubU\x0c_make_sparseq\x17\x89h\nh\x0b]q\x18U\x01aa\x85Rq\x19h\x0eNh\x0f}q\x1aU\x0b_m"
    b"ake_denseq\x1b\x89ubs.")}


@pytest.mark.parametrize("protocol", PYTHON_2)
def test_what_python_2_wrote_loads(protocol):
    array = read_arrays(PYTHON_2[protocol])["v_template"]
    assert array.tolist() == [[1.5, 3], [-2, 4]]


LAYOUTS = {
    "C": lambda x: x, "Fortran": np.asfortranarray, "transposed": lambda x: x.T,
    "axes moved": lambda x: x.transpose(1, 0, 2), "axes turned": lambda x: x.transpose(2, 0, 1),
    "gaps": lambda x: x[:, :, ::2], "reversed": lambda x: x[::-1],
    "numpy's scalar": lambda x: x[1, 2, 3], "0-d": lambda x: np.array(x[1, 2, 3]),
    "empty": lambda x: x[:0],
    "broadcast": lambda x: np.broadcast_to(x[0], (5, 3, 4)),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "big-endian, transposed": lambda x: x.astype(x.dtype.newbyteorder(">")).T,
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape).transpose(1, 0, 2)}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_that_numpy_writes_loads(layout, protocol):
    for dtype in "f8 f4 f2 i8 i4 i2 i1 u8 u4 u2 u1 b1".split():
        array = LAYOUTS[layout](np.arange(24).reshape(2, 3, 4).astype(dtype))
        content = pickle.dumps({"f": array}, protocol)
        for numpy_1, numpy_2 in ((b"numpy.core", b"numpy._core"),) if protocol < 4 else ():
            assert read_arrays(content.replace(numpy_2, numpy_1)).keys() == {"f"}
            assert read_arrays(content.replace(numpy_1, numpy_2)).keys() == {"f"}
        got = read_arrays(content)["f"]
        assert got.shape == array.shape and (got == array).all(), f"{dtype}: {got} is not {array}"


def test_axes_in_another_order_load_as_numpy_2_3_writes_them():
    """numpy.arange(12).reshape(2, 3, 2).transpose(1, 0, 2): bytes in memory's order, order "K"."""
    array = read_arrays(
        b"\x80\x05}\x8c\x01f\x8c\x13numpy._core.numeric\x8c\x0b_frombuffer\x93(\x96\x0c\0\0\0\0\0\0"
        b"\0\0\x01\x02\x03\x04\x05\x06\x07\x08\t\n\x0b\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02u1\x89"
        b"\x88\x87R(K\x03\x8c\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tbK\x02K\x03K\x02\x87"
        b"\x8c\x01KK\x01K\0K\x02\x87tRs.")["f"]
    assert (array == np.arange(12).reshape(2, 3, 2).transpose(1, 0, 2)).all(), array


@pytest.mark.parametrize("protocol", range(6))
def test_bytes_for_keys_are_read(tmp_path, body, protocol):
    """As files look that Python 3 loaded with encoding="bytes" and saved again."""
    arrays = official_arrays()
    regressor = arrays["J_regressor"]
    regressor.__dict__ = {key.encode(): value for key, value in vars(regressor).items()}
    content = pickle.dumps({key.encode(): value for key, value in arrays.items()}, protocol)
    (tmp_path / "bytes.pkl").write_bytes(content)
    close(SMPL(tmp_path / "bytes.pkl").J_regressor, body.J_regressor, 1e-7, "J_regressor")


@pytest.mark.parametrize("kind", ["csc", "csr", "coo"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_sparse_matrices_are_scipys(kind, order):
    dense = np.array([[0, 1.5, 0, 2], [0, 0, 0, 0], [3, 0, 0, 4]])
    places = [0, 0, 2, 0, 2], [1, 1, 3, 3, 0]
    matrix = scipy.sparse.coo_matrix(([1.0, 0.5, 4, 2, 3], places), shape=(3, 4))
    if kind != "coo":                           # sum up what lies at one place, as coo will
        matrix = getattr(matrix, f"to{kind}")()
    for key in ("data", "indices", "indptr"):
        if hasattr(matrix, key):
            stored = vars(matrix)[key]
            vars(matrix)[key] = stored.astype(stored.dtype.newbyteorder(order))
    for what, expected in ((matrix, dense), (type(matrix)((3, 4)), 0 * dense)):
        got = read_arrays(pickle.dumps({"J_regressor": what}, 2))["J_regressor"]
        assert (got == expected).all() and got.shape == (3, 4), got


def test_without_hmrs_regressor_keypoints_are_approximate(tmp_path, capsys):
    rng = np.random.default_rng(0)
    V = 6890
    joints = rng.dirichlet(np.ones(V) * 0.01, 24)
    np.savez(tmp_path / "smpl.npz", v_template=rng.normal(size=(V, 3)), weights=np.eye(24)[
        rng.integers(0, 24, V)], shapedirs=np.zeros((V, 3, 10)), posedirs=np.zeros((V, 3, 207)),
        J_regressor=joints, f=np.array([[0, 1, 2]]), kintree_table=np.array([
            [2 ** 32 - 1, *PARENTS[1:]], range(24)], dtype=np.uint32))
    model = SMPL(tmp_path / "smpl.npz")
    assert "smpl.npz has no cocoplus_regressor: the 19 keypoints are approximate" in (
        capsys.readouterr().out)
    out = model(torch.zeros(1, 10), torch.zeros(1, 72))
    kp = dict(zip(KEYPOINT_NAMES, out.keypoints[0]))
    close(kp["left_wrist"], out.joints[0, 20], 1e-5, "limbs are the skeleton's joints")
    for name, vertex in (("nose", 332), ("left_eye", 2800), ("right_eye", 6260), ("left_ear", 583),
                         ("right_ear", 4071)):
        close(kp[name], model.v_template[vertex], 1e-6, f"{name}: the paper counts from 1")
    assert kp["head_top"][1] == model.v_template[:, 1].max()


def test_a_pickle_becomes_the_plain_layout(tmp_path, body, capsys, monkeypatch):
    (tmp_path / "neutral.pkl").write_bytes(pickle.dumps(official_arrays(), 2))
    arguments = [str(tmp_path / name) for name in ("neutral.pkl", "plain.npz")]
    assert body_file.main(arguments) == 0 and "1,229 vertices" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "appendix.body_file", None)      # it is not needed any more
    plain = SMPL(tmp_path / "plain.npz")
    for name in ("v_template", "posedirs", "J_regressor", "cocoplus_regressor", "faces"):
        close(getattr(plain, name), getattr(body, name), 1e-7, f"{name} changed in the plain file")
    monkeypatch.undo()
    for bad, sentence in ((arguments, "is there already"), ([arguments[0], "x.pkl"], "ends in"),
                          (["absent.pkl", str(tmp_path / "y.npz")], "no such file")):
        assert body_file.main(bad) == 2
        assert sentence in capsys.readouterr().err


def test_without_the_appendix_a_sentence_says_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "neutral.pkl").write_bytes(pickle.dumps(official_arrays(), 2))
    monkeypatch.setitem(sys.modules, "appendix.body_file", None)
    SMPL()
    with pytest.raises(ValueError, match="neutral.pkl: .*appendix/body_file.py, which is missing"):
        SMPL(tmp_path / "neutral.pkl")


# ============================================================================================
# Body files that attack

class Hostile:
    """An object whose pickle asks for a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("call", [(os.system, "touch hacked"), (eval, "open('hacked', 'w')"),
                                  (np.load, "x"), (bytearray, 10 ** 12),
                                  (Hostile, os.system, "touch hacked")])
def test_a_hostile_pickle_runs_nothing(tmp_path, monkeypatch, call, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"v_template": Hostile(*call)}, protocol))
    with pytest.raises(ValueError, match="refused, it asks for"):
        SMPL(path)
    assert os.listdir() == ["evil.pkl"], "something was written"


def test_a_module_that_a_file_names_is_never_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("trap.py").write_text("open('hacked', 'w')\nCh = system = print\n")
    for name in ("system", "Ch", "os.system"):  # Ch is a name that body files use, of chumpy's
        Path("evil.pkl").write_bytes(b"\x80\x04}\x8c\x01f\x8c\x04trap\x8c%c%s\x93)Rs." % (
            len(name), name.encode()))
        sentence = "neither" if name == "Ch" else f"refused, it asks for trap.{name}"
        with pytest.raises(ValueError, match=sentence):
            load_body("evil.pkl")
    assert "trap" not in sys.modules and not Path("hacked").exists()


FORGED_DTYPE = (b"cnumpy\ndtype\n(S'V8'\nI0\nI1\ntR(I3\nS'|'\nN(S'a'\nt(dS'a'\n(cnumpy\ndtype\n"
                b"(S'O8'\nI0\nI1\ntRI0\ntsI8\nI1\nI0\ntb")
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
ARRAY_OF = b"(dS'f'\n" + ARRAY + b"(I1\n", b"tbs."
FIELDS_FAR_AWAY = (b"cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'<'\nN(S'a'\nt(dS'a'\n(cnumpy\ndtype\n"
                   b"(S'f8'\nI0\nI1\ntRI1000000000\ntsI8\nI1\nI0\ntb")
EIGHT = b"S'" + b"A" * 8 + b"'\n"
# each Select holds the one before twice: 2^60 evaluations for who follows both; the first is [0]
SHARED = ARRAY + b"p0\n(I1\n(I1\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\ntbI00\nS'\\0'\ntb0"
SHARED += b"".join(
    b"cchumpy.reordering\nSelect\n(tRp%d\n(dS'a'\ng%d\nsS'idxs'\ng%d\nsb0" % (n + 1, n, n)
    for n in range(60))


@pytest.mark.parametrize("name, content, sentence", [
    ("a getattr chain", b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR.", "builtins.getattr"),
    ("numpy's runstring", b"cnumpy.testing._private.utils\nrunstring\n(S'1'\n}tR.", "runstring"),
    ("numpy's run_command", b"cnumpy.f2py.diagnose\nrun_command\n(S'ls'\ntR.", "run_command"),
    ("a state with a function", b"cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(dS'x'\ncos\nsystem\nsb.",
     "os.system"),
    ("a codec", b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.", "found encode"),
    ("attributes of a name", b"c_codecs\nencode\n(N(dS'__defaults__'\n(S'x'\ntstb.", "neither"),
    ("a bytearray of 2^31", b"\x80\x05\x96\0\0\0\x80\0\0\0\0abc.", "neither.*truncated"),
    # numpy's own classes trust a pickled state: real ones end the process for these four
    ("a forged dtype", b"(dS'f'\ncnumpy.core.multiarray\nscalar\n(" + FORGED_DTYPE + EIGHT +
     b"tRs.", "not of numbers"),
    ("the same as a key", b"(dcnumpy.core.multiarray\nscalar\n(" + FORGED_DTYPE + EIGHT +
     b"tRI1\ns.", "neither"),
    ("an array of it", (b"(I1\nt" + FORGED_DTYPE + b"I00\n" + EIGHT).join(ARRAY_OF),
     "not of numbers"),
    ("objects without any", b"(I200000000\ntcnumpy\ndtype\n(S'O8'\nI0\nI1\ntRI00\n(l".join(
        ARRAY_OF), "not of numbers"),
    ("fields far away", (b"(I1\nt" + FIELDS_FAR_AWAY + b"I00\n" + EIGHT).join(ARRAY_OF), "lacks"),
    ("more numbers than bytes", b"(I9\ntcnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'<'\ntbI00\n".join(
        ARRAY_OF[:1] + (EIGHT + ARRAY_OF[1],)), "neither.*reshape"),
    ("memo slot 2^31", b"\x80\x02]r\xff\xff\xff\x7f.", "refused, .* memory slots"),
    ("memo slot 2^31 as text", b"(lp2147483647\n.", "refused, .* memory slots"),
    ("memo slot 2^31 and a zero", b"(lp2147483647\0\n.", "neither"),
    ("a string of 2^40 bytes", b"\x80\x04\x8e\0\0\0\0\0\1\0\0abc.", "neither.*truncated"),
    ("a frame of 2^40 bytes", b"\x80\x04\x95\0\0\0\0\0\1\0\0}.", "neither.*truncated"),
    ("an array of 2^40 numbers", b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
     b"(I1099511627776\ntS'd'\ntR.", "found _reconstruct"),
    ("the same by its class", b"cnumpy\nndarray\n((I1099511627776\nttR.", "found ndarray"),
    ("the same as a value", b"(dS'f'\ncnumpy\nndarray\n((I1099511627776\nttRs.", "ndarray where"),
    # the hash of a tuple asks its members, without looking at the stack's end
    ("a key of a million tuples", b"\x80\x02})" + b"\x85" * 10 ** 6 + b"Ns.",
     "20,000 instructions"),
    ("a million instructions", b"(l" + b"Na" * 10 ** 6 + b".", "20,000 instructions"),
    ("lists of lists that share members", b"\x80\x02}U\1f]q\0(" + b"K\0" * 9 + b"e" + b"".join(
        b"0]q%c(" % (n + 1) + b"h%c" % n * 9 + b"e" for n in range(30)) + b"s.", "list where"),
    ("views that share an array", SHARED + b"(dS'f'\ng60\ns.", "neither"),
    ("a chumpy array that holds itself", b"(dp0\nS'v_template'\ncchumpy.ch\nCh\n(tRp1\n(dS'x'\ng1\n"
     b"sbs.", "neither"),
    ("a _reconstructor of itself", b"(dS'f'\ncopyreg\n_reconstructor\np0\n(g0\ntRs.", "neither"),
    ("an extension code", b"\x80\x02\x82\x01.", "neither"),
    ("a persistent id", b"Pabc\n.", "refused"),
    ("a persistent object", b"\x80\x02NQ.", "refused"),
    ("cut inside a frame", b"\x80\x04\x95\x10\0\0\0\0\0\0\0}", "neither.*truncated"),
    ("text", b"hello", "neither.*truncated")], ids=lambda x: x if isinstance(x, str) else "")
def test_a_hostile_pickle_takes_nothing(tmp_path, name, content, sentence):
    path = tmp_path / "evil.pkl"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"evil.pkl.*({sentence})"):
        SMPL(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 ** 25, f"{name}: {peak:,} bytes allocated"


def forged(kind: str, **parts) -> bytes:
    """A pickle whose J_regressor is a unit matrix (3, 3) with some of its parts replaced."""
    matrix = getattr(scipy.sparse, f"{kind}_matrix")(np.eye(3))
    if kind == "coo":                           # as scipy before 1.13 stored them
        vars(matrix).pop("coords", None)
        vars(matrix).update(row=np.arange(3), col=np.arange(3))
    vars(matrix).update({key: np.asarray(x) if isinstance(x, list) else x
                         for key, x in parts.items()})
    return pickle.dumps({"J_regressor": matrix}, 2)


@pytest.mark.parametrize("kind, parts", [
    # with scipy's own toarray each of these reads or writes out of bounds, which ends the process
    ("csc", dict(indices=[2 ** 30] * 3)), ("csr", dict(indices=[2 ** 30] * 3)),
    ("csc", dict(indices=[-2 ** 30] * 3)), ("coo", dict(row=[2 ** 30] * 3)),
    ("coo", dict(col=[-2 ** 30] * 3)), ("coo", dict(coords=(np.arange(3), np.arange(3) + 1))),
    ("coo", dict(row=np.full(3, 2 ** 64 - 9, np.uint64))), ("csc", dict(data=np.ones(9 ** 5))),
    # scipy's check_format lets these two pass
    ("csc", dict(indptr=np.array([0, 5 * 10 ** 8, 5 * 10 ** 8, 0], np.int32))),
    ("csr", dict(indptr=np.array([0, 2 ** 31 - 1, -2, 3], np.int32))),
    ("csc", dict(indices=[2 ** 30] * 3, check_format=dict, toarray=dict)),
    ("csc", dict(indptr=[0, 1, 2, 9])), ("csc", dict(indptr=[0, 1])),
    ("csc", dict(_shape=(2 ** 40, 3))), ("csr", dict(_shape=(3, 2 ** 40))),
    ("csr", dict(_shape=(3, 10 ** 8))), ("coo", dict(_shape=(10 ** 4, 10 ** 5))),
    ("coo", dict(_shape=(-3, -3)))])
def test_forged_sparse_matrices_are_refused_not_followed(tmp_path, kind, parts):
    (tmp_path / "wild.pkl").write_bytes(forged(kind, **parts))
    with pytest.raises(ValueError, match="wild.pkl: (neither .*get the file again|refused)"):
        load_body(tmp_path / "wild.pkl")
    (tmp_path / "tame.pkl").write_bytes(forged(kind))
    with pytest.raises(ValueError, match="tame.pkl: lacks v_template"):
        load_body(tmp_path / "tame.pkl")


def test_an_npz_that_unpacks_to_gigabytes_is_refused(tmp_path):
    np.savez(tmp_path / "bomb.npz", f=np.zeros(3))
    content = bytearray((tmp_path / "bomb.npz").read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\1\2") + 24, 2 ** 31)    # its size, unpacked
    (tmp_path / "bomb.npz").write_bytes(content)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False,
                                                  "shape": (2 ** 60,)})
    with zipfile.ZipFile(tmp_path / "many.npz", "w") as file:
        file.writestr("f.npy", header.getvalue())
    for name, sentence in (("bomb.npz", "more than 1 GiB"), ("many.npz", "plain number arrays")):
        with pytest.raises(ValueError, match=sentence):
            load_body(tmp_path / name)


# ============================================================================================
# Body files that are none

@pytest.mark.parametrize("content, sentence", [
    (b"", "an empty file; get it again"),
    (b"\r\n <!DOCTYPE html>\n<html>Please log in</html>", "HTML page: log in and download again"),
    (b"\xef\xbb\xbf<?xml version='1.0'?>", "HTML page: log in and download again"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
     "Git LFS pointer: run git lfs pull"),
    (b"\x1f\x8b\x08\0\0\0\0\0", "gzip archive: unpack it"),
    (b'{"v_template": [[1, 2, 3]]}', "JSON"), (b"[1, 2]", "JSON")])
def test_what_is_no_body_is_called_by_its_name(tmp_path, content, sentence):
    (tmp_path / "smpl.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=f"smpl.pkl: .*{sentence}"):
        load_body(tmp_path / "smpl.pkl")


def test_bad_body_files_end_in_a_sentence(tmp_path):
    arrays = {k: np.asarray(v.todense()) if scipy.sparse.issparse(v) else v
              for k, v in official_arrays().items()}

    def save(**changes) -> Path:
        content = {k: v for k, v in {**arrays, **changes}.items() if v is not None}
        np.savez(tmp_path / "b.npz", **content)
        return tmp_path / "b.npz"

    nan = arrays["v_template"].copy()
    nan[3, 1] = np.nan
    tree = arrays["kintree_table"].copy()
    tree[0, 5] = 1
    tree_of = lambda n: np.stack([np.arange(n) - 1, np.arange(n)]).astype(np.uint32)
    for changes, sentence in [
            (dict(weights=None), "lacks weights"), (dict(v_template=nan), "v_template holds NaN"),
            (dict(cocoplus_regressor=None), "lacks cocoplus_regressor"),
            (dict(posedirs=np.zeros((4, 3, 207))), "posedirs is"),
            (dict(kintree_table=tree), "kintree_table is not SMPL's"),
            (dict(kintree_table=tree_of(55), cocoplus_regressor=None), "55, as SMPL-X"),
            (dict(kintree_table=tree_of(16), posedirs=np.zeros((778, 3, 135))), "16, as MANO"),
            (dict(kintree_table=np.zeros(3)), "kintree_table is not SMPL's"),
            (dict(f=arrays["f"] + 10 ** 6), "f must be"),
            (dict(weights=np.array([None])), "plain number arrays"),
            (dict(f=arrays["f"] + 0.5), "f must be"), (dict(f=np.zeros((0, 3))), "f is"),
            (dict(f=np.array([["a"]])), "f is"), (dict(v_template=np.array(1.0)), "v_template is"),
            (dict(kintree_table=np.zeros((0, 24))), "kintree_table is")]:
        with pytest.raises(ValueError, match=sentence):
            load_body(save(**changes))
    assert len(load_body(save(part2num=np.array([{"x": 1}], object)))["weights"]) == len(
        arrays["weights"]), "objects under keys that nobody asked for stay unread"
    whole = save().read_bytes()
    for name, content, sentence in (
            ("cut.npz", whole[:5000], "plain number arrays"),
            ("cut.pkl", pickle.dumps(arrays)[:5000], "neither .* truncated"),
            ("text.pkl", b"hello", "neither .* truncated"),
            ("list.pkl", pickle.dumps([1, 2]), "found list"),
            ("lists.pkl", pickle.dumps({**arrays, "weights": [[1.0]]}), "list where numbers"),
            ("words.pkl", pickle.dumps({**arrays, "f": np.array(["a"])}), "not of numbers")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*{sentence}"):
            load_body(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file; expected a body file"):
        load_body(tmp_path / "absent.pkl")
    with pytest.raises(FileNotFoundError, match="a folder; expected a body file"):
        load_body(tmp_path)


STEER = "\x1b[2J\r\x07\u202e\x9b"               # clears the screen, goes back, rings, turns round


def test_words_of_others_reach_the_terminal_escaped(tmp_path, capsys):
    assert printable("Körper 1.pkl") == "Körper 1.pkl", "letters stay"
    assert printable(STEER) == r"\x1b[2J\r\x07\u202e\x9b"
    folder = tmp_path / "a\x1b[2J\r"            # ASCII, for the sake of other locales
    folder.mkdir()
    path = folder / "b\x07\n.pkl"
    word, escaped = STEER.encode(), re.escape(r"\x1b[2J\r\x07\u202e\x9b")
    for content, sentence in (
            (b"cos\nsystem" + word + b"\n.", "os.system" + escaped),
            (b"c" + word + b"\nsystem\n.", "refused, it asks for"),
            (b"\x80\x04\x8c%c%s\x8c\x01x\x93." % (len(word), word), escaped + ".x"),
            (b"P\x1b[2J\n.", "refused"), (b"\x80\x02X\1\0\0\0" + word, "neither"),
            ((b"(I1\ntcnumpy\ndtype\n(S'" + word + b"'\ntRI00\n" + EIGHT).join(ARRAY_OF),
             "not of numbers"), (b"<" + word, "HTML"), (word + b"\n\n", "neither")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"b\\x07\\n.pkl: .*" + sentence) as error:
            load_body(path)
        assert str(error.value).isprintable(), f"{content}: raw characters in {error.value!r}"
    with pytest.raises(FileNotFoundError) as error:
        load_body(folder / "\x1b[2J")
    assert str(error.value).isprintable()
    arrays = official_arrays()
    arrays["shapedirs"] = np.concatenate([arrays["shapedirs"]] * 2, 2)
    path.write_bytes(pickle.dumps(arrays))
    SMPL(path)
    out = capsys.readouterr().out
    assert "20 betas" in out and out.count("\n") == 1 and out.strip().isprintable(), repr(out)


def test_a_sentence_stays_short_whatever_the_file_says(tmp_path):
    for content in (b"c" + b"m" * 10 ** 6 + b"\n" + b"n" * 10 ** 6 + b"\n.",
                    b"S'" + b"x" * 10 ** 6 + b"\n.", b"I" + b"9" * 10 ** 4 + b"x\n."):
        (tmp_path / "long.pkl").write_bytes(content)
        with pytest.raises(ValueError) as error:
            load_body(tmp_path / "long.pkl")
        assert len(str(error.value)) - len(str(tmp_path)) < 500, str(error.value)[:1000]
