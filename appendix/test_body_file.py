"""Official body files: the layouts that load, and what hostile, torn and odd files run into."""

import os
import pickle
import re
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from appendix import body_file
from appendix.body_file import read_arrays
from smpl import KEYPOINT_NAMES, OPEN_BODY, PARENTS, SMPL, load_body, printable
from test_hmr import body, close  # noqa: F401 (a fixture)


class Ch:
    """As chumpy 0.70's: a pickle holds its class's name and its attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


Select, Reshape, transpose = (type(name, (Ch,), {"__module__": __name__})
                              for name in ("Select", "Reshape", "transpose"))


def official_arrays(sparse: str = "csc") -> dict:
    """The open body with the official file's keys, types and oddities: Ch, and views of it."""
    with np.load(OPEN_BODY) as file:
        arrays = {key: file[key] for key in file.files if key != "mean_pose"}
    for key in ("J_regressor", "cocoplus_regressor"):
        arrays[key] = scipy.sparse.csc_matrix(arrays[key].astype(np.float64)).asformat(sparse)
    order = np.random.default_rng(0).permutation(3 * 1229)
    shapedirs = np.concatenate([arrays["shapedirs"], np.ones((1229, 3, 290))], 2)  # as v1.1 files
    return arrays | {
        "v_template": Select(a=Ch(x=arrays["v_template"].ravel()[order]), idxs=order.argsort(),
                             preferred_shape=(1229, 3), _dirty_vars={"x"}),
        "weights": transpose(a=Ch(x=arrays["weights"].T)),
        "shapedirs": Reshape(a=Ch(x=shapedirs.ravel()), newshape=(1229, 3, 300)),
        # under other keys anything may be written in the names that body files use
        "info": {"n": np.float64(1), "names": np.array(["a", None]), "e": b"", "type": "lrotmin"}}


def same(ours: SMPL, body: SMPL) -> None:
    for name in ("v_template", "shapedirs", "posedirs", "weights", "J_regressor",
                 "cocoplus_regressor", "faces"):
        close(getattr(ours, name), getattr(body, name), 1e-7, f"{name} changed in the file")


@pytest.mark.parametrize("protocol, sparse", [(0, "csc"), (1, "csr"), (2, "csc"), (5, "csr")])
def test_an_official_style_pickle_equals_the_npz(tmp_path, body, capsys, protocol, sparse):
    arrays = official_arrays(sparse)
    if protocol % 2:            # as Python 3 saves what it loaded with encoding="bytes"
        regressor = arrays["J_regressor"]
        regressor.__dict__ = {key.encode(): value for key, value in vars(regressor).items()}
        arrays = {key.encode(): value for key, value in arrays.items()}
    (tmp_path / "neutral.pkl").write_bytes(pickle.dumps(arrays, protocol))
    ours = SMPL(tmp_path / "neutral.pkl")
    same(ours, body)
    assert ours.parents == PARENTS, "the root's parent is stored as 2^32 - 1"
    assert "300 betas: the first 10" in capsys.readouterr().out


# What cPickle of Python 2.7 wrote, with numpy 1.16.6 and chumpy 0.70, for {"v_template":
# chumpy.array([[1.5, -2], [3, 4]]).T}, protocol 2.  In protocol 0 strings are escaped text.
PYTHON_2 = (
    b"\x80\x02}q\x01U\nv_templateq\x02cchumpy.reordering\ntranspose\nq\x03)\x81q\x04}q\x05(U\x01"
    b"acchumpy.ch\nCh\nq\x06)\x81q\x07}q\x08(U\x0c_make_sparseq\t\x89U\x0b_dirty_varsq\nc__built"
    b"in__\nset\nq\x0b]q\x0cU\x01xa\x85Rq\rU\x04_itrq\x0eNU\x10_depends_on_depsq\x0f}q\x10U\x0b_"
    b"make_denseq\x11\x89U\x01xcnumpy.core.multiarray\n_reconstruct\nq\x12cnumpy\nndarray\nq\x13"
    b"K\x00\x85U\x01b\x87Rq\x14(K\x01K\x02K\x02\x86cnumpy\ndtype\nq\x15U\x02f8K\x00K\x01\x87Rq"
    b"\x16(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U \x00\x00\x00\x00\x00\x00"
    b"\xf8?\x00\x00\x00\x00\x00\x00\x00\xc0\x00\x00\x00\x00\x00\x00\x08@\x00\x00\x00\x00\x00\x00"
    b"\x10@tbubU\x0c_make_sparseq\x17\x89h\nh\x0b]q\x18U\x01aa\x85Rq\x19h\x0eNh\x0f}q\x1aU\x0b_m"
    b"ake_denseq\x1b\x89ubs.")
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
ARRAY_OF = b"(dS'f'\n" + ARRAY + b"(I1\n", b"tbs."
BYTES = b"(I%d\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\ntbI00\n"


def test_what_python_2_wrote_loads():
    assert read_arrays(PYTHON_2)["v_template"].tolist() == [[1.5, 3], [-2, 4]], "protocol 2"
    text = (BYTES % 3 + b"S'\\x00\\xff\\n'\n").join(ARRAY_OF)       # protocol 0: escaped text
    assert read_arrays(text)["f"].tolist() == [0, 255, 10]


@pytest.mark.parametrize("layout", [
    lambda x: x, np.asfortranarray, lambda x: x.transpose(1, 0, 2), lambda x: x[:, :, ::2],
    lambda x: x[1, 2, 3], lambda x: x.astype(x.dtype.newbyteorder(">")).T],
    ids=["C", "Fortran", "axes moved", "gaps", "0-d", "big-endian, transposed"])
def test_every_layout_that_numpy_writes_loads(layout):
    for dtype in "f8 f4 i8 i4 u4 u1 b1".split():
        array = np.asarray(layout(np.arange(24).reshape(2, 3, 4).astype(dtype)))
        for protocol in range(6):
            content = pickle.dumps({"f": array}, protocol)
            if protocol < 4:                    # numpy 2's module has another name than numpy 1's
                content = content.replace(b"numpy._core", b"numpy.core")
            got = read_arrays(content)["f"]
            assert got.shape == array.shape and (got == array).all(), f"{dtype}, {protocol}: {got}"


def test_without_hmrs_regressor_keypoints_are_approximate(tmp_path, capsys):
    rng, V = np.random.default_rng(0), 6890
    np.savez(tmp_path / "smpl.npz", v_template=rng.normal(size=(V, 3)), weights=np.eye(24)[
        rng.integers(0, 24, V)], shapedirs=np.zeros((V, 3, 10)), posedirs=np.zeros((V, 3, 207)),
        J_regressor=rng.dirichlet(np.ones(V) * 0.01, 24), f=np.array([[0, 1, 2]]),
        kintree_table=np.array([[2 ** 32 - 1, *PARENTS[1:]], range(24)], dtype=np.uint32))
    model = SMPL(tmp_path / "smpl.npz")
    assert "smpl.npz has no cocoplus_regressor: the 19 keypoints are approximate" in (
        capsys.readouterr().out)
    out = model(torch.zeros(1, 10), torch.zeros(1, 72))
    kp = dict(zip(KEYPOINT_NAMES, out.keypoints[0]))
    close(kp["left_wrist"], out.joints[0, 20], 1e-5, "limbs are the skeleton's joints")
    close(kp["nose"], model.v_template[332], 1e-6, "the paper counts from 1")
    assert kp["head_top"][1] == model.v_template[:, 1].max(), "the head's top is the highest"


def test_a_pickle_becomes_the_plain_layout(tmp_path, body, capsys, monkeypatch):
    (tmp_path / "neutral.pkl").write_bytes(pickle.dumps(official_arrays(), 2))
    arguments = [str(tmp_path / name) for name in ("neutral.pkl", "plain.npz")]
    assert body_file.main(arguments) == 0 and "1,229 vertices" in capsys.readouterr().out
    assert body_file.main(arguments) == 2, "plain.npz was overwritten"
    monkeypatch.setitem(sys.modules, "appendix.body_file", None)      # it is not needed any more
    same(SMPL(tmp_path / "plain.npz"), body)
    with pytest.raises(ValueError, match="neutral.pkl: .*appendix/body_file.py, which is missing"):
        SMPL(tmp_path / "neutral.pkl")


# ============================================================================================
# Body files that attack

class Hostile:
    """An object whose pickle asks for a call."""

    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_hostile_pickle_runs_nothing(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("trap.py").write_text("raise SystemExit")        # a module that a file names
    for content in (pickle.dumps({"v_template": Hostile()}, protocol), b"ctrap\nsystem\n)R."):
        Path("evil.pkl").write_bytes(content)
        with pytest.raises(ValueError, match="refused, it asks for"):
            SMPL("evil.pkl")
    assert set(os.listdir()) == {"evil.pkl", "trap.py"}, "something was written"


def forged(kind: str, **parts) -> bytes:
    """The pickle of a sparse matrix with a part that scipy itself trusts."""
    matrix = getattr(scipy.sparse, f"{kind}_matrix")(np.eye(3))
    vars(matrix).update({key: np.array(x, np.int32) if isinstance(x, list) else x
                         for key, x in parts.items()})
    return pickle.dumps({"J_regressor": matrix}, 2)


DOUBLED = b")q\0" + b"0h\0h\0\x86q\0" * 60    # a tuple of the tuple before twice, 60 times over
STEER = "\x1b[2J\r\x07\u202e\x9b"               # clears the screen, goes back, rings, turns round
WRONG = {
    "empty": (b"", "an empty file"),
    "HTML": (b"\r\n <!DOCTYPE html>\n<html>Log in</html>", "HTML page: log in"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer: run git"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0", "gzip archive: unpack it"),
    "JSON": (b'{"v_template": [1]}', "JSON"),
    "cut .npz": (b"PK\3\4", "not a whole"),
    "cut .pkl": (pickle.dumps({"f": 1})[:-3], "neither .* truncated"),
    "a list": (pickle.dumps([1]), "neither .* again"),
    "a list for an array": (pickle.dumps({"f": [1]}), "neither .* again"),
    "words of others": (b"cos\nsystem" + STEER.encode() + b"\n.",
                        "os.system" + re.escape(printable(STEER))),
    "long words": (b"c" + b"m" * 10 ** 6 + b"\nn\n.", "refused"),
    # numpy's own classes trust a pickled state: a real one ends the process for this
    "objects without any": (b"(I200000000\ntcnumpy\ndtype\n(S'O8'\nI0\nI1\ntR(I3\nS'|'\ntbI00\n(l"
                            .join(ARRAY_OF), "not of numbers"),
    # memory that is declared and never there
    "a bytearray of 2^31": (b"\x80\x05\x96\0\0\0\x80\0\0\0\0abc.", "neither.*truncated"),
    "an argument for each letter": (b"(dS'f'\ncnumpy\n_frombuffer\nS'" + b"A" * 4_000_000
                                    + b"'\nRs.", "neither"),
    # whoever computes a hash or compares, never ends; whoever recurses, ends the process
    "a doubled tuple as a key": (b"\x80\4}" + DOUBLED + b"Ns.", "neither.*unhashable"),
    "a key of a million tuples": (b"\x80\2})" + b"\x85" * 10 ** 6 + b"Ns.", "20,000 instructions"),
    "one that holds itself": (b"(dp0\nS'f'\ncchumpy.ch\nCh\n(tRp1\n(dS'x'\ng1\nsbs.", "neither"),
    # with scipy's own toarray these read or write out of bounds, which ends the process
    "places outside": (forged("csc", indices=[2 ** 30] * 3), "neither"),
    "negative places": (forged("csr", indices=[-1] * 3), "neither"),
    "numbers that are not there": (forged("csr", indptr=[0] + [2 ** 28] * 3), "neither"),
    "a huge matrix": (forged("csr", _shape=(10 ** 4, 10 ** 4)), "neither"),
    "a repeated text": (forged("csr", _shape=("A", 10 ** 9)), "neither"),
    "negative counts": (forged("csr", indptr=[0, 2 ** 31 - 1, -2, 3]), "neither")}


@pytest.mark.parametrize("content, sentence", WRONG.values(), ids=WRONG)
def test_what_is_no_body_ends_in_a_sentence_soon_and_in_little_memory(tmp_path, content, sentence):
    (tmp_path / "b\x07\n.pkl").write_bytes(content)
    tracemalloc.start()
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=r"b\\x07\\n.pkl: .*" + sentence) as error:
        load_body(tmp_path / "b\x07\n.pkl")
    peak, seconds = tracemalloc.get_traced_memory()[1], time.perf_counter() - begun
    tracemalloc.stop()
    assert peak < 2 ** 25 and seconds < 5, f"{peak:,} bytes allocated, {seconds:.1f} seconds"
    assert str(error.value).isprintable(), "words of others must not steer the terminal"
    assert len(str(error.value)) - len(str(tmp_path)) < 500, "a sentence, whatever the file says"


def test_what_would_unpack_to_gigabytes_is_refused(tmp_path):
    """Bodies of int8, which float64 makes eight times as large; nine arrays may be one."""
    array = ARRAY + b"(I1\n" + BYTES % 2 ** 24 + b"S'" + b"a" * 2 ** 24 + b"'\ntbp0\ns"
    nine = b"".join(b"S'%s'\ng0\ns" % key.encode() for key in body_file.KEYS)
    (tmp_path / "bomb.pkl").write_bytes(b"(dS'x'\n" + array + nine + b".")
    np.savez_compressed(tmp_path / "bomb.npz", f=np.zeros(2 ** 27, np.int8))
    for name in ("bomb.npz", "bomb.pkl"):
        with pytest.raises(ValueError, match=f"{name}: refused, it unpacks to more than 128 mill"):
            load_body(tmp_path / name)


def test_bad_body_files_end_in_a_sentence(tmp_path):
    with np.load(OPEN_BODY) as file:
        arrays = dict(file)
    wrong, tree = arrays["v_template"].astype(np.float64), np.stack([np.arange(55) - 1] * 2)
    for changes, sentence in [
            (dict(weights=None), "lacks weights"),
            (dict(cocoplus_regressor=None), "lacks cocoplus_regressor"),
            (dict(v_template=np.where(wrong > 0.8, np.nan, wrong)), "v_template holds NaN"),
            (dict(posedirs=np.zeros((4, 3, 207))), "posedirs is"),
            (dict(kintree_table=tree.astype(np.uint32)), "55, as SMPL-X"),
            (dict(kintree_table=np.zeros((0, 24))), "kintree_table is not SMPL's"),
            (dict(f=arrays["f"] + 10 ** 6), "f must be"), (dict(f=arrays["f"] + 0.5), "f must be"),
            (dict(f=np.zeros((0, 3))), "f is"), (dict(f=np.array([["a"]])), "f is"),
            (dict(weights=np.array([None])), "plain number arrays")]:
        content = {k: v for k, v in {**arrays, **changes}.items() if v is not None}
        np.savez(tmp_path / "b.npz", **content)
        with pytest.raises(ValueError, match=f"b.npz: .*{sentence}"):
            load_body(tmp_path / "b.npz")
    np.savez(tmp_path / "b.npz", **arrays, part2num=np.array([{"x": 1}], object))
    assert load_body(tmp_path / "b.npz"), "objects under keys that nobody asked for stay unread"
    with pytest.raises(FileNotFoundError, match="a folder; expected a body file"):
        load_body(tmp_path)
