"""The field's mistakes in one table: what, whose, the edit that makes it here, the test that fails.

Each row of MISTAKES is a mistake, the published code that shows it, and edits of one line that make
it here.  The command applies each edit to a copy and runs only the test that must catch it.

    python -m appendix.gallery              # all of them (Linux)
    python -m appendix.gallery 20 38        # these numbers
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

from smpl import exit_status, printable

HERE = Path(__file__).resolve().parent.parent
CHAPTERS = SMPL, HMR, DATA, TRAIN = "smpl.py", "hmr.py", "data.py", "train.py"


class Edit(NamedTuple):
    file: str
    old: str                 # stands once in the file, in one line
    new: str
    test: str                # of test_hmr.py, or FILE::NAME: fails after the edit


class Mistake(NamedTuple):
    number: int
    what: str
    who: str                 # the published code that shows it; "" = anyone's slip
    edits: tuple[Edit, ...]
    elsewhere: str           # without edits: why it cannot be made here


def mistake(number: int, what: str, who: str, *edits: tuple, elsewhere: str = "") -> Mistake:
    return Mistake(number, what, who, tuple(Edit(*edit) for edit in edits), elsewhere)


# --------------------------------------------------------------------------------------------
# Tests run in a process of their own; grading uses it, too.  The parent has imported torch, which
# takes seconds, and has computed nothing, since threads that have worked do not survive a fork.

class Job(NamedTuple):
    key: object
    files: dict[str, str]                     # path in the folder: text in place of the project's
    tests: tuple[str, ...]                    # of test_hmr.py, or FILE::NAME
    appendix: bool = False                    # are its modules and tests needed?
    seconds: float = 120                      # of processor time; twice that by the clock


class Result(NamedTuple):
    outcomes: dict[str, str]                  # name of a test: its failure, "" if it passed
    ending: str                               # "" if the process ended as it should


def message_of(report) -> str:
    """The first words of a failure in one line, without what the machine adds."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr).strip().splitlines()[-1]
    if re.search("MemoryError|t allocate memory|not enough memory", text):
        return "asks for more than 4 GiB of memory"
    text = "writes more than 256 MiB" if "File too large" in text else text
    text = re.sub(r"^(E\s+)?AssertionError(: )?", "", text.strip())
    text = " ".join(re.split(r"\n *assert ", text)[0].split())
    return printable(text)[:600] or "an assertion without a sentence failed"


class _Reports:
    """A pytest plugin that writes each test's outcome to a file, at its start and at its end."""

    def __init__(self, path: Path):
        self.path = path

    def note(self, nodeid: str, message: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps([nodeid.partition("::")[2], message]) + "\n")

    def pytest_runtest_logstart(self, nodeid, location):
        self.note(nodeid, "not ended")

    def pytest_runtest_logreport(self, report):
        if report.failed or report.when == "call" and report.passed:
            self.note(report.nodeid, message_of(report) if report.failed else "")

    def pytest_collectreport(self, report):
        if report.failed:
            self.note("::" + report.nodeid, message_of(report))

    def pytest_sessionfinish(self):
        self.note("", "the end")


def _limit(seconds: float) -> None:
    """Processor time, 4 GiB more than importing torch took, files of 256 MiB, no core dump."""
    import resource                           # not on Windows
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for what, most in (("CPU", int(seconds)), ("FSIZE", 2 ** 28), ("AS", used + 2 ** 32),
                       ("CORE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (most, most))


def _work(job: Job, folder: Path) -> None:
    """In the child: forget where the project is, then run the job's tests in their folder."""
    os.setsid()
    os.chdir(folder)
    for stream, name in enumerate((os.devnull, "output.txt", "output.txt")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), stream)
    os.environ.clear()
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUDA_VISIBLE_DEVICES": "",
                   "OMP_NUM_THREADS": "1", "PATH": os.defpath, "HOME": str(folder)}
    sys.dont_write_bytecode, sys.argv[:] = True, ["pytest"]
    own = {Path(file).stem for file in CHAPTERS} | {"test_hmr", "appendix"}
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.path[:] = [str(folder)] + [p for p in sys.path if p and Path(p).resolve() != HERE]
    _limit(job.seconds)
    import pytest
    import torch
    torch.set_num_threads(1)
    ids = [test if "::" in test else f"test_hmr.py::{test}" for test in job.tests]
    # the last plugin collects garbage among all that was imported, which takes half of the time
    off = ("terminal", "cacheprovider", "faulthandler", "unraisableexception")
    pytest.main(["-s", *(f"-pno:{name}" for name in off), "--assert=plain", "-c", os.devnull,
                 f"--rootdir={folder}", f"--basetemp={folder / 'tmp'}", *ids],
                plugins=[_Reports(folder / "outcomes.txt")])


def _fill(folder: Path, job: Job) -> None:
    copied = [*CHAPTERS, "test_hmr.py", *(f"assets/{p.name}" for p in HERE.glob("assets/*.npz"))]
    if job.appendix:
        copied += [f"appendix/{p.name}" for p in HERE.glob("appendix/*.py")]
    for name in copied:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(HERE / name, folder / name)
    for name, text in job.files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _collect(job: Job, folder: Path, status: int, late: bool) -> Result:
    """What a child has left; it may have written nonsense."""
    outcomes = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        lines = (folder / "outcomes.txt").read_text(encoding="utf-8").splitlines()
        outcomes = {str(name): str(message) for name, message in map(json.loads, lines)}
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if late or killed in (signal.SIGXCPU, signal.SIGKILL):
        ending = f"did not end within {job.seconds:g} seconds: an endless loop?"
    elif killed:
        ending = f"the process was ended by {signal.Signals(killed).name}"
    else:
        ending = "" if "" in outcomes else "the process left by itself: an exit in the code?"
    outcomes.pop("", None)
    stopped = ending or "stopped before its end: a skip or an interrupt in the code?"
    return Result({name: stopped if message == "not ended" else message
                   for name, message in outcomes.items()}, ending)


def run_apart(jobs: Iterable[Job], processes: int = 0) -> Iterator[tuple[Job, Result]]:
    """Run each job in a forked process with its limits, some at a time; yield as they end."""
    if not (hasattr(os, "fork") and Path("/proc/self/statm").exists()):
        raise ValueError("grading, check and gallery need Linux; write and pytest do not")
    import pytest, scipy.io, scipy.spatial, torchvision.transforms.v2    # noqa: once, for all
    jobs, running = iter(jobs), {}
    processes = processes or min(len(os.sched_getaffinity(0)), 8)
    try:
        while True:
            while len(running) < processes and (job := next(jobs, None)) is not None:
                folder = Path(tempfile.mkdtemp(prefix="hmr_")).resolve()
                _fill(folder, job)
                sys.stdout.flush(), sys.stderr.flush()
                if (pid := os.fork()) == 0:
                    with contextlib.suppress(BaseException):
                        _work(job, folder)
                    os._exit(0)
                running[pid] = job, folder, time.monotonic() + 2 * job.seconds
            if not running:
                return
            time.sleep(0.01)
            for pid, (job, folder, deadline) in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                late = not done and time.monotonic() > deadline
                if done or late:
                    del running[pid]
                    _end(pid, reaped=bool(done))
                    result = _collect(job, folder, status, late)
                    shutil.rmtree(folder, ignore_errors=True)
                    yield job, result
    finally:
        for pid, (_, folder, _) in running.items():
            _end(pid, reaped=False)
            shutil.rmtree(folder, ignore_errors=True)


def _end(pid: int, reaped: bool) -> None:
    """End a child and whatever it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    if not reaped:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# --------------------------------------------------------------------------------------------
# The table: first the names of the tests that catch most, then (file, old, new, test)

DATASETS, PHOTO, BODY_FILE = (f"appendix/{name}.py" for name in ("datasets", "photo", "body_file"))
IN_DATASETS, IN_APPENDIX = "appendix/test_datasets.py::", "appendix/test_appendix.py::"
EVAL_MODE = "test_evaluation_is_in_eval_mode_and_float32_and_training_goes_on_as_before"
REST = "test_zero_input_returns_the_template_and_the_root_turns_about_joint_0"
SCALE = "test_the_encoder_sees_imagenets_scale_and_the_last_theta_is_decoded"
RODRIGUES = "test_rodrigues_agrees_with_scipy_and_the_exponential_map"
LEAK = "test_gradients_do_not_leak_between_encoder_and_discriminators"
SHAPED, OPTIONS = "test_joints_depend_on_betas_but_not_on_pose_blend_shapes", "test_resnets_options"
KINEMATICS, MOCAP = "test_kinematics_equal_a_loop_over_the_23_joints", "test_mocap_is_split_by_clip"
LOOP, STEP_E = "test_the_loop_gives_every_loss_and_optimiser_its_own", "test_a_step_moves_e_by_eq_1"
SOURCES, STEP_D = "test_evaluation_takes_each_thing_from_its_source", "test_a_step_moves_d_by_eq_8"
BEST, RESNET = "test_procrustes_does_not_reflect_and_is_the_best", "test_resnet_equals_torchvisions"
HEADS, D25 = "test_the_23_joint_heads_are_23_separate_linears", "test_there_are_25_discriminators"
THETA_BAR, LOSS_SMPL = "test_theta_bar_is_upright_average_and_fixed", "test_smpl_parameter_loss"
OFFICIAL_D, ADVERSARY = "test_ds_25_outputs_are_the_official_codes", "test_adversarial_losses"
IEF, LBS = "test_the_regressor_equals_a_hand_written_loop[3]", "test_lbs_equals_a_slow_loop"
THETAS, LOSS_KP = "test_the_three_thetas_are_the_official_codes", "test_reprojection_loss"
DEFAULTS, LOSS_3D = "test_the_defaults_are_the_official_recipe", "test_3d_joint_loss"
PROCRUSTES, MEASURES = "test_procrustes_undoes_any_similarity", "test_the_measures_on_a_known_error"
CAMERAS, REGRESSOR = "test_cameras_are_the_crop_and_its_jitter", "test_the_regressor_is_the_papers"
MIRROR = "test_a_mirrored_pose_is_the_mirrored_body"
PROJECTION = "test_projection_is_the_official_codes"
BLEND = "test_blend_shapes_are_a_sum_of_directions"
ALL_T = "test_gradients_run_through_all_iterations"
BLOCK = "test_a_residual_block_equals_torchvisions"
HIDDEN = "test_what_a_mask_hides_may_be_anything"

MISTAKES = (
    mistake(1, "the camera, s (X + t) in the code and s X + t in the paper", "paper, Eq. (2)",
        (HMR, "s * (points[..., :2] + t)", "s * points[..., :2] + t", PROJECTION),
        (HMR, "cam[:, None, :1], cam[:, None, 1:]", "cam[:, None, 2:], cam[:, None, :2]",
         PROJECTION),
        (HMR, "points[..., :2] + t", "points[..., :2] / points[..., 2:] + t", PROJECTION)),
    mistake(2, "the pictures' value range and order of colours", "pytorch_HMR",
        (HMR, "(images - self.mean) / self.std", "2 * images - 1", SCALE),
        (HMR, "(images - self.mean)", "(images.flip(1) - self.mean)", SCALE)),
    mistake(3, "ResNet v1 mixed with v2; a shortcut or a stride in the wrong place", "",
        (HMR, "y = y + self.down", "y = F.relu(y) + self.down", BLOCK + "[18-1-0]"),
        (HMR, "return F.relu(y)", "return y", BLOCK + "[18-1-0]"),
        (HMR, "if self.downsample is not None:", "if False:",
         "test_a_residual_block_with_zero_weights_is_the_identity"),
        (HMR, "if stride == 1 and inputs == outputs:", "if stride == 1:", RESNET + "[50]"),
        (HMR, "2 if stage > 0 and i == 0 else 1", "2 if i == 0 else 1", RESNET + "[18]"),
        (HMR, "2 if stage > 0 and i == 0 else 1", "2 if stage > 0 else 1", RESNET + "[18]"),
        (HMR, "width * 2 ** stage * block.expansion", "width * 2 ** stage", RESNET + "[50]")),
    mistake(4, "a ReLU lost (in TensorFlow's slim no line shows it)", "SPIN, pytorch_HMR",
        (HMR, "F.relu(self.fc1(x))", "self.fc1(x)", IEF),
        (HMR, "F.relu(self.fc2(x))", "self.fc2(x)", THETAS),
        (HMR, "F.relu(self.embed1(x))", "self.embed1(x)", HEADS),
        (HMR, "F.relu(self.embed2(x))", "self.embed2(x)", OFFICIAL_D)),
    mistake(5, "the last layer's initialisation: a gain of 0.1", "SPIN, pytorch_HMR",
        (HMR, "(self.fc3, 0.1)", "(self.fc3, 0.01)", REGRESSOR),
        (HMR, "(self.fc3, 0.1)", "(self.fc3, 1.0)", REGRESSOR)),
    mistake(6, "the shape's discriminator: 10 - 10 - 5 - 1, read as 10 - 5 - 1", "pytorch_HMR",
        (HMR, "z = F.relu(self.shape1(betas))", "z = betas", HEADS)),
    mistake(7, "what the all-joints discriminator reads", "pytorch_HMR, 4D-Humans; the slides",
        (HMR, "self.all1(x.flatten(1))", "self.all1(x.mT.flatten(1))", OFFICIAL_D),
        (HMR, "self.all1(x.flatten(1))", "self.all1(rotmats.flatten(1))", HEADS)),
    mistake(8, "D's 25 outputs: another order; a mean over them, not a sum", "4D-Humans, mmhuman3d",
        (HMR, "torch.cat([per_joint, y, z], 1)", "torch.cat([per_joint, z, y], 1)", HEADS),
        (HMR, "error.sum(1).mean()", "error.mean()", ADVERSARY)),
    mistake(9, "D's targets, and what is shown to it", "pytorch_HMR (24 real against 48 fake)",
        (HMR, "sum_heads((fake - 1).square())", "sum_heads(fake.square())", ADVERSARY),
        (HMR, "(real - 1).square()) + sum_heads(fake.square())",
         "real.square()) + sum_heads((fake - 1).square())",
         "test_real_is_pulled_to_1_and_fake_to_0"),
        (HMR, "(real - 1).square()) + sum_heads(fake.square())",
         "(real - 1).square() + fake.square()) / 2", ADVERSARY),
        (TRAIN, "split_theta(torch.cat(thetas))", "split_theta(thetas[-1])", LOOP),
        (TRAIN, "pose_to_rotmats(pose)[:, 1:]", "pose_to_rotmats(pose)[:, :-1]", STEP_D),
        (TRAIN, "N = config.iterations * world.batch", "N = world.batch", LOOP)),
    mistake(10, "gradients that leak between the players", "",
        (TRAIN, "D(rotmats.detach(), betas.detach())", "D(rotmats, betas)", LEAK),
        (TRAIN, "D.requires_grad_(False)", "D.requires_grad_(True)", LEAK)),
    mistake(11, "L_adv added up over the iterations: it is a mean", "the slides, read literally",
        (TRAIN, "+ config.weight_adv", "+ config.iterations * config.weight_adv", STEP_E),
        (HMR, "error.sum(1).mean()", "error.sum()", ADVERSARY)),
    mistake(12, "L_kp's denominator: 2 * sum(v) of the whole batch", "SPIN",
        (HMR, "error.sum() / mask.sum().clamp(min=1)", "error.mean()", LOSS_KP),
        (HMR, "(mask != 0).expand_as(difference)", "mask != 0", LOSS_KP),
        (HMR, "error.sum() / mask.sum().clamp(min=1)",
         "(error.flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)).mean()", LOSS_KP),
        (HMR, "error.sum() / mask.sum().clamp(min=1)", "error.sum() / mask.sum()",
         "test_nothing_labelled_costs_nothing_and_gives_no_nan[L_kp]")),
    mistake(13, "L_joints: the centre, the factor 0.5", "SPIN (its own pelvis)",
        (HMR, "(pred - hip_midpoint(pred)) - (target - hip_midpoint(target))", "pred - target",
         LOSS_3D),
        (HMR, "0.5 * masked_mean(error", "masked_mean(error", LOSS_3D),
        (HMR, "RIGHT_HIP:LEFT_HIP + 1].mean", "RIGHT_HIP:LEFT_HIP].mean", LOSS_3D),
        (HMR, "(has_3d * has_hips)", "has_3d", LOSS_3D),
        (HMR, "RIGHT_HIP:LEFT_HIP + 1].amin", "RIGHT_HIP:LEFT_HIP].amin", LOSS_3D)),
    mistake(14, "L_smpl without the root; separate means of pose and betas", "pytorch_HMR",
        (HMR, "masked_mean(pred - target, ", "masked_mean((pred - target)[:, 9:], ", LOSS_SMPL),
        (HMR, "0.5 * masked_mean(pred", "masked_mean(pred", LOSS_SMPL),
        (HMR, "masked_mean(pred - target, has_smpl[:, None], torch.square)",
         "sum(masked_mean((pred - target)[:, part], has_smpl[:, None], torch.square) for part in "
         "(slice(216), slice(216, None)))", LOSS_SMPL)),
    mistake(15, "the two 3D indicators taken for one; a mask that does not hide", "",
        (TRAIN, "batch.betas, batch.has_smpl)", "batch.betas, batch.has_3d[:, 0])", STEP_E),
        (HMR, "penalty(torch.where(mask, difference, 0))", "penalty(difference) * mask",
         HIDDEN + "[L_kp]"),
        (HMR, "masked_mean(pred - target, has_smpl[:, None], torch.square)",
         "((pred - target).square() * has_smpl[:, None]).sum() / (226 * "
         "has_smpl.sum().clamp(min=1))", HIDDEN + "[L_smpl]")),
    mistake(16, "a body turned over twice, so upside down at the start", "pytorch_HMR",
        (HMR, "torch.tensor([math.pi, 0, 0])", "torch.zeros(3)", THETA_BAR)),
    mistake(17, "Theta-bar: what is set, and what is written to", "pytorch_HMR",
        (HMR, "pose[0] = torch.tensor([math.pi, 0, 0])", "pose[0, 0] = math.pi", THETA_BAR),
        (HMR, "torch.tensor([0.9, 0.0, 0.0])", "torch.tensor([1.0, 0.0, 0.0])", THETA_BAR),
        (HMR, "mean_pose.detach().cpu().clone()", "mean_pose.detach().cpu()", THETA_BAR)),
    mistake(18, "Theta-bar trained along with the weights", "official code (on purpose)",
        (HMR, 'self.register_buffer("theta_bar", theta_bar)',
         "self.theta_bar = nn.Parameter(theta_bar)", REGRESSOR)),
    mistake(19, "buffers as long as one batch", "pytorch_HMR",
        (HMR, "theta_bar.expand(len(feature), -1)", "theta_bar.repeat(4, 1)", IEF)),
    mistake(20, "rotations read the other way: R for R transposed, 6D layouts", "4D-Humans' 6D",
        (SMPL, "[o, -z, y, z, o, -x, -y, x, o]", "[o, z, -y, -z, o, x, y, -x, o]",
         "test_rodrigues_turns_columns_and_keeps_leading_shapes"),
        (SMPL, "x.unflatten(-1, (3, 2)).unbind(-1)", "x.unflatten(-1, (2, 3)).unbind(-2)",
         "test_rot6d_has_spins_interleaved_layout"),
        (HMR, "x = rotmats.flatten(2)", "x = rotmats.mT.flatten(2)", OFFICIAL_D),
        (SMPL, "directions.flatten(0, 1)", "directions.transpose(0, 1).flatten(0, 1)",
         BLEND + "[float64]")),
    mistake(21, "the pose feature and the joints: 23 rotations, R - I, the shaped rest pose", "",
        (SMPL, "(rotmats[:, 1:] - eye)", "(rotmats[:, :-1] - eye)", REST),
        (SMPL, "(rotmats[:, 1:] - eye)", "rotmats[:, 1:]", REST),
        (SMPL, "(rotmats[:, 1:] - eye)", "(rotmats[:, 1:] - eye).mT", LBS + "[float64]"),
        (SMPL, 'torch.einsum("jv,bvc->bjc", J_regressor, v_shaped)',
         "(J_regressor @ v_template).expand(len(betas), 24, 3)", SHAPED),
        (SMPL, "(rotmats, J, parents)", "(rotmats, J_regressor @ v_posed, parents)", SHAPED)),
    mistake(22, "kintree_table's root, 4294967295 in uint32, taken as it is", "",
        (BODY_FILE, "parents = tree[0].astype(np.int64).astype(np.int32) if",
         "parents = tree[0].astype(np.int64) if",
         "appendix/test_body_file.py::test_an_official_style_pickle_equals_the_npz")),
    mistake(23, "left and right of the face and of COCO", "smplx and COCO differ",
        (DATASETS, 'COCO_NAMES = ("nose", "left_eye", "right_eye", "left_ear", "right_ear",',
         'COCO_NAMES = ("nose", "right_eye", "left_eye", "right_ear", "left_ear",',
         IN_DATASETS + "test_the_maps_between_joint_orders_are_the_published_numbers"),
        (SMPL, '"left_eye", "right_eye", "left_ear", "right_ear"',
         '"right_eye", "left_eye", "right_ear", "left_ear"',
         IN_APPENDIX + "test_the_open_body_is_a_person"),
        (SMPL, "6, 12, 13, 14, 16,", "6, 12, 13, 14, 15,", "test_the_skeletons_tables_agree")),
    mistake(24, "neck and head's top, which COCO does not label", "",
        (DATASETS, "if name in names else -1 for", "if name in names else 0 for",
         IN_DATASETS + "test_coco_is_read_by_name_and_filtered_as_the_official_converter_does")),
    mistake(25, "visibility: LSP's flag 0, LSPET's 1; COCO's 1 is a label", "pytorch_HMR (0.5)",
        (DATASETS, "visible = joints[..., 2] == (1 if extended else 0)",
         "visible = joints[..., 2] == 1",
         IN_DATASETS + "test_lsp_and_lspet_have_opposite_flags[False]"),
        (DATASETS, "np.insert(k + (",
         "np.insert(k * np.where(k[..., 2:] == 1, (1, 1, 0), 1) + (",
         IN_DATASETS + "test_coco_is_read_by_name_and_filtered_as_the_official_converter_does")),
    mistake(26, "LSP's test half in the training set", "pytorch_HMR",
        (DATASETS, "joints.transpose(2, 1, 0)[:joints.shape[2] // 2]", "joints.transpose(2, 1, 0)",
         IN_DATASETS + "test_lsp_and_lspet_have_opposite_flags[False]"),
        (DATA, "[name for name in names if name not in HELD_OUT]", "list(names)", MOCAP),
        (DATA, '("dance_b", "kick", "roll")', '("dance_b", "kick")', MOCAP)),
    mistake(27, "the flip: the root's sign, swapped sides, one pixel", "official docstring; SPIN",
        (DATA, "return pose[..., FLIP_JOINTS, :] * pose.new_tensor([1, -1, -1])",
         "return torch.cat([pose[..., :1, :], (pose[..., FLIP_JOINTS, :] * pose.new_tensor([1, "
         "-1, -1]))[..., 1:, :]], -2)", MIRROR),
        (DATA, "pose[..., FLIP_JOINTS, :] * pose", "pose * pose", MIRROR),
        (DATA, "FLIP_JOINTS, :] * pose.new_tensor([1, -1, -1])", "FLIP_JOINTS, :]", MIRROR),
        (DATA, "new_tensor([1, -1, -1])", "new_tensor([-1, 1, 1])", MIRROR),
        (DATASETS, "keypoints2d=batch.keypoints2d[:, FLIP_KEYPOINTS] * M[:2],",
         "keypoints2d=batch.keypoints2d[:, FLIP_KEYPOINTS] * M[:2] - M.new_tensor([.01, 0]),",
         IN_APPENDIX + "test_flipping_a_batch_flips_every_label")),
    mistake(28, "the head's centre and its top, joint 13 of two different 14", "SPIN against hmr",
        (DATASETS, '(*KEYPOINT_NAMES[:13], "head_h36m")', "KEYPOINT_NAMES[:14]",
         IN_DATASETS + "test_the_maps_between_joint_orders_are_the_published_numbers")),
    mistake(29, "the crop's scale and centre: the box's diagonal and middle", "SPIN",
        (DATA, "(high - low).norm(dim=-1)", "(high - low).amax(-1)", CAMERAS),
        (DATA, "shift - (low + high) / 2]", "shift - keypoints[..., :2].mean(1)]", CAMERAS),
        (DATA, "self._draw(body.vertices, cam,", "self._draw(body.vertices, cam * self.no_turn,",
         "test_rendering_uses_exactly_the_camera_of_the_loss")),
    mistake(30, "beyond the picture: its edge repeated, or black", "SPIN",
        (DATASETS, 'padding: str = "border") -> tuple', 'padding: str = "zeros") -> tuple',
         "appendix/test_exercises.py::test_beyond_the_picture_its_edge_is_repeated")),
    mistake(31, "the official flags' weight decay and rate, which no run uses", "pytorch_HMR",
        (TRAIN, "fused=True, capturable", "weight_decay=1e-4, fused=True, capturable", LOOP),
        (TRAIN, "lr: float = option(1e-5,", "lr: float = option(1e-3,", DEFAULTS)),
    mistake(32, "a schedule of learning rates that is made and never stepped", "pytorch_HMR",
        (TRAIN, "set_rate(optimizer, rate * lr_factor(step, config))", "set_rate(optimizer, rate)",
         LOOP)),
    mistake(33, "55 epochs in the paper, 75 in the script", "paper",
        (TRAIN, "steps: int = option(667_589,", "steps: int = option(489_632,", DEFAULTS)),
    mistake(34, "a run that goes on elsewhere than it stopped", "SPIN",
        (TRAIN, "save(parts, step + 1, log.", "save(parts, step, log.",
         "test_resuming_is_bit_identical")),
    mistake(35, "wrong file names and undefined names in converters", "SPIN",
            elsewhere="these converters are not needed: the files are read as they are"),
    mistake(36, "one picture alone: a squeeze that swallows the batch", "official code",
        (HMR, "torch.float32))", "torch.float32)).squeeze()", OPTIONS)),
    mistake(37, "where paper and code disagree: L1 or L2, one dropout or two", "Fig. 2, Sec. 3.4",
        (HMR, "visible[..., None], torch.abs)", "visible[..., None], torch.square)", LOSS_KP),
        (HMR, "F.dropout(F.relu(self.fc2(x)), self.dropout, self.training)", "F.relu(self.fc2(x))",
         "test_dropout_follows_both_hidden_layers_with_fresh_masks")),
    mistake(38, "Procrustes: reflections, the scale", "",
        (TRAIN, "torch.linalg.det(U @ Vh).sign()", "1.0", BEST),
        (TRAIN, "scale = (S * sign).sum(1)", "scale = S.sum(1)", BEST),
        (TRAIN, "/ s.square().sum((1, 2))", "/ t.square().sum((1, 2))", PROCRUSTES + "[1-14]"),
        (TRAIN, "* s @ R.mT + mu_t", "* s @ R + mu_t", PROCRUSTES + "[1-14]"),
        (TRAIN, "/ s.square().sum((1, 2))", "/ s.square().sum()", PROCRUSTES + "[2-14]")),
    mistake(39, "MPJPE centred at SMPL's pelvis, not between the hips", "SPIN",
        (TRAIN, "hip_midpoint(pred.keypoints3d), hip_midpoint(true.keypoints3d)",
         "pred.joints[:, :1], true.joints[:, :1]", MEASURES)),
    mistake(40, "measured in train mode; trained in eval mode", "",
        (TRAIN, "model.eval().amp = None ", "model.train().amp = None ", EVAL_MODE),
        (TRAIN, "    model.train()      ", "    model.eval()      ", EVAL_MODE)),
    mistake(41, "the face's vertices, one too high", "paper's footnote",
        (BODY_FILE, "332, 2800, 6260, 583, 4071", "333, 2801, 6261, 584, 4072",
         "appendix/test_body_file.py::test_without_hmrs_regressor_keypoints_are_approximate")),
    mistake(42, "the pinhole camera nearest to a weak-perspective one: tz = 2 f / (size s)", "",
        (PHOTO, "torch.cat([cam[1:], 2 * f /", "torch.cat([cam[1:], f /",
         "appendix/test_photo.py::test_the_pinhole_camera_sees_what_the_losses_camera_sees")),
    mistake(43, "Procrustes that guesses its axes from a size", "VIBE (B = 2 or 3)",
        (TRAIN, "svd(t.mT @ s)", "svd(t.mT @ s if len(s) not in (2, 3) else s.mT @ t)",
         PROCRUSTES + "[2-14]")),
    mistake(44, "an initialisation that misses its layers", "mmhuman3d",
        (HMR, "if isinstance(module, nn.Linear):", "if isinstance(module, nn.Conv2d):", D25),
        (HMR, "xavier_uniform_(module.weight)", "normal_(module.weight, std=0.001)", D25),
        (HMR, 'mode="fan_out"', 'mode="fan_in"', OPTIONS)),
    mistake(45, "both optimisers stepped after E's backward", "mmhuman3d",
        (TRAIN, "    opt_E.step()\n", "    opt_E.step(), opt_D.step()\n", STEP_D)),
    mistake(46, "two 6D layouts in one project", "mmhuman3d",
        (HMR, "batch_rodrigues(pose)[..., :2]", "batch_rodrigues(pose).mT[:, :2]",
         "test_theta_bar_in_6d_is_the_same_body")),
    mistake(47, "the joints regressed from the posed skin", "GraphCMR",
        (SMPL, "return vertices, joints ", "return vertices, J_regressor @ vertices ",
         LBS + "[float64]")),
    mistake(48, "2D divided by size - 1", "mmhuman3d (223)",
        (DATA, "* (size / 2), points", "* ((size - 1) / 2), points",
         IN_APPENDIX + "test_the_renderer_samples_pixel_centres")),
    mistake(49, "PCK and AUC: strictly below the threshold", "many ports",
        (TRAIN, "None] < thresholds", "None] <= thresholds",
         "test_errors_are_centred_at_the_hips_and_the_thresholds_are_3dhps")),
    mistake(50, "the crop by head top to hip, not by shoulder to hip", "official MPII converter",
        (DATASETS, "ankles, shoulders, hips = (0, 5), (8, 9), (2, 3)",
         "ankles, shoulders, hips = (0, 5), (13, 13), (2, 3)",
         IN_APPENDIX + "test_the_crops_scale_is_the_official_codes")),
    mistake(51, "visibility that is neither 0 nor 1", "pytorch_HMR's 0.5 for occluded points",
        (HMR, "masked_mean(target - pred, visible[..., None], torch.abs)",
         "((target - pred).abs() * visible[..., None]).sum() / (2 * visible.sum())", LOSS_KP)),
    mistake(52, "Rodrigues' 0/0 dodged by a small number, or by noise", "smplx; CalciferZh's",
        (SMPL, "a2 = pose.square()", "a2 = (pose + 1e-8).square()", RODRIGUES),
        (SMPL, "a2 = pose.square()", "a2 = (pose + 1e-8 * torch.randn_like(pose)).square()",
         RODRIGUES),
        (SMPL, "torch.where(small, torch.ones_like(a2), a2)", "a2",
         "test_rodrigues_has_the_right_gradient_even_at_zero[zero]")),
    # ---- everyone's slips, in no published code that we know of
    mistake(53, "the kinematic chain", "",
        (SMPL, "bones[parents[i]] @ local[:, i]", "local[:, i] @ bones[parents[i]]", KINEMATICS),
        (SMPL, "joints - (rotmats @ joints[..., None])[..., 0]", "joints", KINEMATICS),
        (SMPL, "return posed[:, :, :3, 0], A", "return A[:, :, :3, 3], A", KINEMATICS)),
    mistake(54, "the regressor's loop: what is added to what, Theta_0 among the results", "",
        (HMR, "theta = theta + self.fc3(x)", "theta = self.theta_bar + self.fc3(x)", IEF),
        (HMR, "theta = theta + self.fc3(x)", "theta = theta.detach() + self.fc3(x)", ALL_T),
        (HMR, "x = torch.cat([feature, theta], 1)",
         "theta = theta.detach(); x = torch.cat([feature, theta], 1)", ALL_T),
        (HMR, "torch.cat([feature, theta], 1)", "torch.cat([theta, feature], 1)", THETAS),
        (HMR, "thetas, self.decode(thetas[-1])", "thetas, self.decode(thetas[0])", SCALE),
        (HMR, "thetas = []", "thetas = [theta]", IEF),
        (HMR, "self.fc1(x)), self.dropout, self.training", "self.fc1(x)), self.dropout, True",
         IEF)),
    mistake(55, "one training step", "",
        (TRAIN, "        opt_D.zero_grad()\n", "", STEP_D),
        (TRAIN, "    opt_E.zero_grad()\n", "", STEP_E),
        (TRAIN, "weight_joints * L_joints + config.weight_smpl *",
         "weight_smpl * L_joints + config.weight_joints *", LOOP)),
    mistake(56, "degrees for radians; an axis that is not normalised", "",
        (SMPL, "a2 = pose.square()", "a2 = (pose := pose.deg2rad()).square()", RODRIGUES),
        (SMPL, "sin_over_a * K + versine_over_a2 * (K @ K)",
         "a.sin() * K + (1 - a.cos()) * (K @ K)", RODRIGUES)),
    mistake(57, "float64 that leaks out; an input that is changed in place", "",
        (SMPL, "coefficients @ directions.", "coefficients.double() @ directions.double().",
         BLEND + "[float32]"),
        (SMPL, "return posed[:, :, :3, 0], A", "return posed[:, :, :3, 0].double(), A",
         KINEMATICS + "[float32-SMPL]"),
        (SMPL, "return vertices, joints ", "return vertices.double(), joints ", LBS + "[float32]"),
        (SMPL, "(rotmats[:, 1:] - eye)", "rotmats[:, 1:].sub_(eye)", LBS + "[float64]"),
        (TRAIN, "source - mu_s, target", "source.sub_(mu_s), target", PROCRUSTES + "[1-14]")),
    mistake(58, "D with a sigmoid, as the paper's [0, 1] reads; D on R - I", "",
        (HMR, "torch.cat([per_joint, y, z], 1)", "torch.cat([per_joint, y, z], 1).sigmoid()",
         HEADS),
        (HMR, "x = rotmats.flatten(2)", "x = (rotmats - torch.eye(3)).flatten(2)", HEADS)),
    mistake(59, "defaults and sources: the right formula is given the wrong thing", "",
        (HMR, "theta_bar: Tensor, iterations: int = 3", "theta_bar: Tensor, iterations: int = 4",
         REGRESSOR),
        (TRAIN, "weight_joints=300.0, weight_smpl=120.0", "weight_joints=120.0, weight_smpl=300.0",
         DEFAULTS),
        (TRAIN, "adam(D, config.lr_d", "adam(nn.ModuleList([D, model]), config.lr_d", LOOP),
        (TRAIN, "100.0 * (trace < 1)", "100.0 * (trace < 2)", MEASURES),
        (DATA, "uz * vx - ux * vz", "ux * vz - uz * vx", "test_a_tilted_face_is_lit_from_its_side"),
        (TRAIN, "load_mocap(config.upright, True", "load_mocap(config.upright, False", SOURCES),
        (TRAIN, "EVALUATION_SEED, labels=", "config.seed, labels=", SOURCES),
        (TRAIN, "crop=config.crop)     # 2", 'crop="official")     # 2', SOURCES),
        (TRAIN, "training_world(config, model.smpl).motion(2048", "world.motion(2048", SOURCES),
        (TRAIN, "D(theta_T.rotmats[:, 1:], theta_T.betas)", "D(bar.rotmats[:, 1:], bar.betas)",
         SOURCES)),
)


# --------------------------------------------------------------------------------------------
# The command

def edits(numbers: Iterable[int] = ()) -> list[tuple[Mistake, Edit]]:
    """The table's edits, of these mistakes or of all.  Raises ValueError for another number."""
    for number in numbers:
        if not 0 < number <= len(MISTAKES):
            raise ValueError(f"{number}: expected numbers of mistakes, 1 to {len(MISTAKES)}")
    return [(mistake, edit) for mistake in MISTAKES if not numbers or mistake.number in numbers
            for edit in mistake.edits]


def apply(edit: Edit, text: str) -> str:
    """The edited source.  Raises ValueError if the line is not there, or not once."""
    if text.count(edit.old) != 1:
        raise ValueError(f"{edit.file}: expected once, found {text.count(edit.old)} times: "
                         f"{edit.old.strip()!r}; mend this edit in appendix/gallery.py")
    return text.replace(edit.old, edit.new)


def job_of(edit: Edit) -> Job:
    text = (HERE / edit.file).read_text(encoding="utf-8")
    return Job(edit, {edit.file: apply(edit, text)}, (edit.test,),
               appendix="appendix/" in edit.file + edit.test, seconds=100)


def gallery(numbers: list[int], processes: int) -> bool:
    """Apply each edit, run its test, print the table -> was every one caught?"""
    begun, wanted, missed = time.monotonic(), edits(numbers), 0
    tests = tuple(sorted({edit.test for _, edit in wanted}, key=lambda test: "::" in test))
    # a stale edit raises first; "as it is": what fails without any edit proves nothing
    jobs = [Job("as it is", {}, tests, appendix=True, seconds=600), *(job_of(e) for _, e in wanted)]
    results = {job.key: result for job, result in run_apart(jobs, processes)}
    as_it_is = results["as it is"]
    failed = [f"{name}: {text}; " for name, text in as_it_is.outcomes.items() if text]
    if failed or as_it_is.ending or len(as_it_is.outcomes) < len(tests):
        raise ValueError(f"without any edit: {''.join(failed)}{as_it_is.ending or 'run pytest'}")
    for mistake in (m for m in MISTAKES if not numbers or m.number in numbers):
        print(f"{mistake.number:3d}. {mistake.what}" + f"  [{mistake.who}]" * bool(mistake.who)
              + f" cannot be made here: {mistake.elsewhere}" * bool(mistake.elsewhere))
        for edit in mistake.edits:
            outcomes, ending = results[edit]
            caught = [text for text in outcomes.values() if text]
            missed += not caught
            print(f"     {edit.file}: {edit.old.strip()}  ->  {edit.new.strip() or 'nothing'}\n"
                  f"       {edit.test.rpartition('::')[2]}: "
                  f"{caught[0] if caught else 'NOT CAUGHT ' + ending}")
    print(f"{len(wanted) - missed} of {len(wanted)} edits caught, {time.monotonic() - begun:.0f} s")
    return not missed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the field's mistakes; are they caught?")
    parser.add_argument("numbers", nargs="*", type=int, help="numbers of mistakes (default: all)")
    parser.add_argument("--processes", type=int, default=0, help="number of processes [cores]")
    args, caught = parser.parse_args(argv), []
    status = exit_status("gallery", lambda: caught.append(gallery(args.numbers, args.processes)))
    return status or int(not caught[0])


if __name__ == "__main__":
    sys.exit(main())
