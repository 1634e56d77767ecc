"""The field's mistakes in one table: what, whose, the edit that makes it here, the test that fails.

Each row of MISTAKES is a mistake, the published code that shows it, and edits of one line that make
it here.  The command applies each edit to a copy and runs only the test that must catch it.

    python -m appendix.gallery              # all of them (Linux)
    python -m appendix.gallery 20 38        # these numbers
"""

import argparse
import contextlib
import difflib
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Iterator, NamedTuple

from smpl import exit_status, printable

HERE = Path(__file__).resolve().parent.parent
CHAPTERS = SMPL, HMR, DATA, TRAIN = "smpl.py", "hmr.py", "data.py", "train.py"
FINISHED = 42                # the exit status of a process that has run all its tests


def source(file: str) -> str:
    return (HERE / file).read_text(encoding="utf-8")


class Edit(NamedTuple):
    file: str
    old: str                 # stands once in the file, in one line
    new: str
    test: str                # fails after the edit


@functools.cache               # it reads all the tests
def place(test: str) -> str:
    """FILE::TEST, as pytest takes it; a test's name stands in one file alone."""
    files = ["test_hmr.py", *(f"appendix/{path.name}" for path in HERE.glob("appendix/test_*.py"))]
    return next(f"{file}::{test}" for file in files
                if f"\ndef {test.partition('[')[0]}(" in source(file))


# --------------------------------------------------------------------------------------------
# Tests run in a process of their own; grading uses it, too.  The parent has imported torch, which
# takes seconds, and has computed nothing, since threads that have worked do not survive a fork.

class Job(NamedTuple):
    key: object
    files: dict[str, str]                     # path in the folder: text in place of the project's
    tests: list[str]                          # FILE::NAME each
    seconds: int = 120                        # of processor time; twice that by the clock


class Result(NamedTuple):
    outcomes: dict[str, str]                  # name of a test: its failure, "" if it passed
    ending: str                               # "" if the process ended as it should


def message_of(report) -> str:
    """The first words of a failure in one line, without what the machine adds."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr).strip().splitlines()[-1]
    if re.search("MemoryError|t allocate memory|not enough memory", text):
        return "asks for more than 4 GiB of memory"
    if "File too large" in text:
        return "writes more than 256 MiB"
    text = " ".join(re.sub(r"^(E\s+)?AssertionError(: )?", "", text.strip()).split())
    return printable(text)[:600] or "an assertion without a sentence failed"


class _Reports(NamedTuple):
    """A pytest plugin that writes each test's outcome to a file, at its start and at its end."""
    path: Path

    def note(self, nodeid: str, message: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps([nodeid.rpartition("::")[2], message]) + "\n")

    def pytest_runtest_logstart(self, nodeid, location):
        self.note(nodeid, "not ended")

    def pytest_runtest_logreport(self, report):
        if report.failed or report.when == "call" and report.passed:
            self.note(report.nodeid, message_of(report) if report.failed else "")

    pytest_collectreport = pytest_runtest_logreport


def _work(job: Job, folder: Path) -> None:
    """In the child: forget where the project is, take the limits, run the tests in their folder."""
    import resource                           # not on Windows
    import pytest
    import torch
    os.setsid()
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.clear()
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUDA_VISIBLE_DEVICES": "",
                   "OMP_NUM_THREADS": "1", "PATH": os.defpath, "HOME": str(folder)}
    sys.dont_write_bytecode, sys.argv[:] = True, ["pytest"]
    own = {Path(file).stem for file in CHAPTERS} | {"test_hmr", "appendix"}
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.path[:] = [str(folder)] + [p for p in sys.path if p and Path(p).resolve() != HERE]
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for what, most in (("CPU", job.seconds), ("FSIZE", 2 ** 28), ("AS", used + 2 ** 32)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (most, most))
    # unraisableexception collects garbage among all that was imported: half of the time
    pytest.main(["-s", "-pno:terminal", "-pno:cacheprovider", "-pno:unraisableexception",
                 "--assert=plain", "-c", os.devnull, f"--rootdir={folder}",
                 f"--basetemp={folder / 'tmp'}", *job.tests],
                plugins=[_Reports(folder / "outcomes.txt")])
    sys.exit(FINISHED)


def _result(folder: Path, job: Job, exitcode: int) -> Result:
    """What a child has left; it may have written nonsense."""
    outcomes = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        lines = (folder / "outcomes.txt").read_text(encoding="utf-8").splitlines()
        outcomes = {str(name): str(message) for name, message in map(json.loads, lines)}
    if -exitcode in (signal.SIGXCPU, signal.SIGKILL):
        ending = f"did not end within {job.seconds} seconds: an endless loop?"
    elif exitcode < 0:
        ending = f"the process was ended by {signal.Signals(-exitcode).name}"
    else:
        ending = "" if exitcode == FINISHED else "the process left by itself: an exit in the code?"
    stopped = ending or "stopped before its end: a skip or an interrupt in the code?"
    return Result({name: stopped if message == "not ended" else message
                   for name, message in outcomes.items()}, ending)


def _start(job: Job, folder: Path) -> multiprocessing.Process:
    """Copy the project, with the job's files in it, into a new folder, and fork a process there."""
    shutil.copytree(HERE / "assets", folder / "assets")
    for file in (*CHAPTERS, "test_hmr.py"):
        shutil.copyfile(HERE / file, folder / file)
    if "appendix/" in " ".join((*job.files, *job.tests)):
        shutil.copytree(HERE / "appendix", folder / "appendix")
    for file, text in job.files.items():
        (folder / file).write_text(text, encoding="utf-8")
    child = multiprocessing.get_context("fork").Process(target=_work, args=(job, folder))
    child.start()
    return child


def _end(child: multiprocessing.Process) -> None:
    """End a process and whatever it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.join()


def run_apart(jobs: list[Job], processes: int = 0) -> Iterator[tuple[Job, Result]]:
    """Run each job in a forked process with its limits, some at a time; yield as they end."""
    if not Path("/proc/self/statm").exists():
        raise ValueError("grading, check and gallery need Linux; write and pytest do not")
    import pytest, scipy.io, scipy.spatial, torchvision.transforms.v2    # noqa: once, for all
    waiting, running = list(jobs), {}         # a process: its job, folder and deadline
    processes = processes or min(len(os.sched_getaffinity(0)), 8)
    with tempfile.TemporaryDirectory(prefix="hmr_", ignore_cleanup_errors=True) as parent:
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    job, folder = waiting.pop(0), Path(tempfile.mkdtemp(dir=parent)).resolve()
                    running[_start(job, folder)] = job, folder, time.monotonic() + 2 * job.seconds
                for child, (job, folder, deadline) in list(running.items()):
                    if not child.is_alive() or time.monotonic() > deadline:
                        _end(child)
                        del running[child]
                        yield job, _result(folder, job, child.exitcode)
                        shutil.rmtree(folder, ignore_errors=True)
                time.sleep(0.01)
        finally:
            for child in running:
                _end(child)


# --------------------------------------------------------------------------------------------
# The table: number, what, the published code that shows it ("" = anyone's slip), its edits; first
# the names of what stands in it often

DATASETS, PHOTO, BODY_FILE = (f"appendix/{name}.py" for name in ("datasets", "photo", "body_file"))
COCO = "test_coco_is_read_by_name_and_filtered_as_the_official_converter_does"
EVAL_MODE = "test_evaluation_is_in_eval_mode_and_float32_and_training_goes_on_as_before"
REST = "test_zero_input_returns_the_template_and_the_root_turns_about_joint_0"
SCALE = "test_the_encoder_sees_imagenets_scale_and_the_last_theta_is_decoded"
LEAK = "test_gradients_do_not_leak_between_encoder_and_discriminators"
MAPS = "test_the_maps_between_joint_orders_are_the_published_numbers"
RODRIGUES = "test_rodrigues_agrees_with_scipy_and_the_exponential_map"
LOOP, STEP_E = "test_the_loop_gives_every_loss_and_optimiser_its_own", "test_a_step_moves_e_by_eq_1"
IEF, LOSS_SMPL = "test_the_regressor_equals_a_hand_written_loop[3]", "test_smpl_parameter_loss"
SOURCES, LOSS_KP = "test_evaluation_takes_each_thing_from_its_source", "test_reprojection_loss"
HEADS = "test_the_23_joint_heads_are_23_separate_linears"
KINEMATICS = "test_kinematics_equal_a_loop_over_the_23_joints"
BLEND = "test_blend_shapes_are_a_sum_of_directions"

MISTAKES = (
    (1, "the camera, s (X + t) in the code and s X + t in the paper", "paper, Eq. (2)",
     (HMR, "(points[..., :2] + t)", "points[..., :2] + t", "test_projection_is_the_official_codes"),
     (HMR, ":1], cam[:, None, 1:]", "2:], cam[:, None, :2]",
      "test_projection_is_the_official_codes")),
    (2, "the pictures' value range and order of colours", "pytorch_HMR",
     (HMR, "(images - self.mean) / self.std", "2 * images - 1", SCALE),
     (HMR, "(images - self.mean)", "(images.flip(1) - self.mean)", SCALE)),
    (3, "ResNet v1 mixed with v2; a shortcut or a stride in the wrong place", "",
     (HMR, "y + self.", "F.relu(y) + self.", "test_a_residual_block_equals_torchvisions"),
     (HMR, "y = y +", "x =", "test_a_residual_block_with_zero_weights_is_the_identity"),
     (HMR, " and inputs == outputs", "", "test_resnet_equals_torchvisions[50]"),
     (HMR, "stage > 0 and ", "", "test_resnet_equals_torchvisions[18]")),
    (4, "a ReLU lost (in TensorFlow's slim no line shows it)", "SPIN, pytorch_HMR",
     (HMR, "F.relu(self.fc1(x))", "self.fc1(x)", IEF),
     (HMR, "F.relu(self.fc2(x))", "self.fc2(x)", "test_the_three_thetas_are_the_official_codes"),
     (HMR, "F.relu(self.embed1(x))", "self.embed1(x)", HEADS),
     (HMR, "F.relu(self.embed2", "(self.embed2", "test_ds_25_outputs_are_the_official_codes")),
    (5, "the last layer's initialisation: a gain of 0.1", "SPIN, pytorch_HMR",
     (HMR, "(self.fc3, 0.1)", "(self.fc3, 0.01)", "test_the_regressor_is_the_papers")),
    (6, "the shape's discriminator: 10 - 10 - 5 - 1, read as 10 - 5 - 1", "pytorch_HMR",
     (HMR, "z = F.relu(self.shape1(betas))", "z = betas", HEADS)),
    (7, "what the all-joints discriminator reads", "pytorch_HMR, 4D-Humans; the slides",
     (HMR, "all1(x.", "all1(x.mT.", "test_ds_25_outputs_are_the_official_codes"),
     (HMR, "all1(x.", "all1(rotmats.", HEADS)),
    (8, "D's 25 outputs: another order; a mean over them, not a sum", "4D-Humans, mmhuman3d",
     (HMR, "torch.cat([per_joint, y, z], 1)", "torch.cat([per_joint, z, y], 1)", HEADS),
     (HMR, "error.sum(1).mean()", "error.mean()", "test_adversarial_losses")),
    (9, "D's targets, and what is shown to it", "pytorch_HMR (24 real against 48 fake)",
     (HMR, "sum_heads((fake - 1).square())", "sum_heads(fake.square())", "test_adversarial_losses"),
     (HMR, "real: Tensor, fake", "fake: Tensor, real", "test_real_is_pulled_to_1_and_fake_to_0"),
     (TRAIN, "split_theta(torch.cat(thetas))", "split_theta(thetas[-1])", LOOP),
     (TRAIN, "N = config.iterations * world.batch", "N = world.batch", LOOP)),
    (10, "gradients that leak between the players", "",
     (TRAIN, "D(rotmats.detach(), betas.detach())", "D(rotmats, betas)", LEAK),
     (TRAIN, "D.requires_grad_(False)", "D.requires_grad_(True)", LEAK)),
    (11, "L_adv added up over the iterations: it is a mean", "the slides, read literally",
     (TRAIN, "+ config.weight_adv", "+ config.iterations * config.weight_adv", STEP_E)),
    (12, "L_kp's denominator: 2 * sum(v) of the whole batch", "SPIN",
     (HMR, "error.sum() / mask.sum().clamp(min=1)", "error.mean()", LOSS_KP),
     (HMR, "(mask != 0).expand_as(difference)", "mask != 0", LOSS_KP),
     (HMR, "error.sum() / mask.sum().clamp(min=1)",
      "(error.flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)).mean()", LOSS_KP),
     (HMR, ".clamp(min=1)", "", "test_nothing_labelled_costs_nothing_and_gives_no_nan[L_kp]")),
    (13, "L_joints: the centre, the factor 0.5", "SPIN (its own pelvis)",
     (HMR, "].mean(1, keepdim=True)", "].mean(1, keepdim=True) * 0", "test_3d_joint_loss"),
     (HMR, "0.5 * masked_mean(error", "masked_mean(error", "test_3d_joint_loss"),
     (HMR, "(has_3d * has_hips)", "has_3d", "test_3d_joint_loss")),
    (14, "L_smpl without the root; separate means of pose and betas", "pytorch_HMR",
     (HMR, "pred - target, ", "(pred - target)[:, 9:], ", LOSS_SMPL),
     (HMR, "masked_mean(pred - target, has_smpl[:, None], torch.square)", "sum(masked_mean(x, "
      "has_smpl[:, None], torch.square) for x in (pred - target).split((216, 10), 1))", LOSS_SMPL)),
    (15, "the two 3D indicators taken for one; a mask that does not hide", "",
     (TRAIN, "batch.betas, batch.has_smpl)", "batch.betas, batch.has_3d[:, 0])", STEP_E),
     (HMR, "penalty(torch.where(mask, difference, 0))", "penalty(difference) * mask",
      "test_what_a_mask_hides_may_be_anything")),
    (16, "a body turned over twice, so upside down at the start", "pytorch_HMR",
     (HMR, "[math.pi, 0, 0]", "[0.0, 0, 0]", "test_theta_bar_is_upright_average_and_fixed")),
    (17, "Theta-bar: what is set, and what is written to", "pytorch_HMR",
     (HMR, "[0.9, 0.0, 0.0]", "[1.0, 0.0, 0.0]", "test_theta_bar_is_upright_average_and_fixed"),
     (HMR, ".cpu().clone()", ".cpu()", "test_theta_bar_is_upright_average_and_fixed")),
    (18, "Theta-bar trained along with the weights", "official code (on purpose)",
     (HMR, 'self.register_buffer("theta_bar", theta_bar)',
      "self.theta_bar = nn.Parameter(theta_bar)", "test_the_regressor_is_the_papers")),
    (19, "buffers as long as one batch", "pytorch_HMR",
     (HMR, "theta_bar.expand(len(feature), -1)", "theta_bar.repeat(4, 1)", IEF)),
    (20, "rotations read the other way: R for R transposed, 6D layouts", "4D-Humans' 6D",
     (SMPL, "K = torch", "K = -torch", "test_rodrigues_turns_columns_and_keeps_leading_shapes"),
     (SMPL, "(3, 2)).unbind(-1)", "(2, 3)).unbind(-2)", "test_rot6d_has_spins_interleaved_layout"),
     (SMPL, "directions.flatten(0, 1)", "directions.transpose(0, 1).flatten(0, 1)", BLEND)),
    (21, "the pose feature and the joints: 23 rotations, R - I, the shaped rest pose", "",
     (SMPL, "(rotmats[:, 1:] - eye)", "(rotmats[:, :-1] - eye)", REST),
     (SMPL, "(rotmats[:, 1:] - eye)", "rotmats[:, 1:]", REST),
     (SMPL, "(rotmats, J, parents)", "(rotmats, J_regressor @ v_posed, parents)",
      "test_joints_depend_on_betas_but_not_on_pose_blend_shapes")),
    (22, "kintree_table's root, 4294967295 in uint32, taken as it is", "",
     (BODY_FILE, ".astype(np.int32)", "", "test_an_official_style_pickle_equals_the_npz")),
    (23, "left and right of the face, in COCO's order", "smplx and COCO differ",
     (DATASETS, '("nose", "left_eye", "right_eye"', '("nose", "right_eye", "left_eye"', MAPS)),
    (24, "neck and head's top, which COCO does not label", "",
     (DATASETS, "name in names else -1", "name in names else 0", COCO)),
    (25, "visibility: LSP's flag 0, LSPET's 1; COCO's 1 is a label", "pytorch_HMR (0.5)",
     (DATASETS, "== (1 if extended else 0)", "== 1", "test_lsp_and_lspet_have_opposite_flags"),
     (DATASETS, "np.insert(k + (", "np.insert(k * np.where(k[..., 2:] == 1, (1, 1, 0), 1) + (",
      COCO)),
    (26, "LSP's test half in the training set", "pytorch_HMR",
     (DATASETS, "[:joints.shape[2] // 2]", "", "test_lsp_and_lspet_have_opposite_flags"),
     (DATA, " if name not in HELD_OUT", "", "test_mocap_is_split_by_clip")),
    (27, "the flip: the root's sign, swapped sides, one pixel", "official docstring; SPIN",
     (DATA, "new_tensor([1, -1, -1])", "new_tensor([[1, 1, 1]] + 23 * [[1, -1, -1]])",
      "test_a_mirrored_pose_is_the_mirrored_body"),
     (DATA, "[..., FLIP_JOINTS, :]", "", "test_a_mirrored_pose_is_the_mirrored_body"),
     (DATASETS, "FLIP_KEYPOINTS] * M[:2]", "FLIP_KEYPOINTS] * M[:2] - M.new_tensor([.01, 0])",
      "test_flipping_a_batch_flips_every_label")),
    (28, "the head's centre and its top, joint 13 of two different 14", "SPIN against hmr",
     (DATASETS, '(*KEYPOINT_NAMES[:13], "head_h36m")', "KEYPOINT_NAMES[:14]", MAPS)),
    (29, "the crop's scale and centre: the box's diagonal and middle", "SPIN",
     (DATA, "low).norm(dim=-1)", "low).amax(-1)", "test_cameras_are_the_crop_and_its_jitter"),
     (DATA, "shift - (low + high) / 2]", "shift - keypoints[..., :2].mean(1)]",
      "test_cameras_are_the_crop_and_its_jitter")),
    (30, "beyond the picture: its edge repeated, or black", "SPIN",
     (DATASETS, '"zeros" if crop == "spin" else "border"', '"zeros"',
      "test_beyond_the_picture_its_edge_is_repeated")),
    (31, "the official flags' weight decay and rate, which no run uses", "pytorch_HMR",
     (TRAIN, "fused=True, capturable", "weight_decay=1e-4, fused=True, capturable", LOOP),
     (TRAIN, "option(1e-5,", "option(1e-3,", "test_the_defaults_are_the_official_recipe")),
    (32, "a schedule of learning rates that is made and never stepped", "pytorch_HMR",
     (TRAIN, "rate * lr_factor(step, config)", "rate", LOOP)),
    (33, "55 epochs in the paper, 75 in the script", "paper",
     (TRAIN, "option(667_589,", "option(489_632,", "test_the_defaults_are_the_official_recipe")),
    (34, "a run that goes on elsewhere than it stopped", "SPIN",
     (TRAIN, "parts, step + 1, log.", "parts, step, log.", "test_resuming_is_bit_identical")),
    (35, "wrong names in converters: cannot be made here, which needs none", "SPIN"),
    (36, "one picture alone: a squeeze that swallows the batch", "official code",
     (HMR, "torch.float32))", "torch.float32)).squeeze()", "test_resnets_options")),
    (37, "where paper and code disagree: L1 or L2, one dropout or two", "Fig. 2, Sec. 3.4",
     (HMR, "visible[..., None], torch.abs)", "visible[..., None], torch.square)", LOSS_KP),
     (HMR, "F.dropout(F.relu(self.fc2(x)), self.dropout, self.training)", "F.relu(self.fc2(x))",
      "test_dropout_follows_both_hidden_layers_with_fresh_masks")),
    (38, "Procrustes: reflections, the scale", "",
     (TRAIN, "Vh).sign()", "Vh).abs()", "test_procrustes_does_not_reflect_and_is_the_best"),
     (TRAIN, "(S * sign).sum(1)", "S.sum(1)", "test_procrustes_does_not_reflect_and_is_the_best"),
     (TRAIN, "sum((1, 2)).clamp", "sum().clamp", "test_procrustes_undoes_any_similarity")),
    (39, "MPJPE centred at SMPL's pelvis, not between the hips", "SPIN",
     (TRAIN, "hip_midpoint(pred.keypoints3d), hip_midpoint(true.keypoints3d)",
      "pred.joints[:, :1], true.joints[:, :1]", "test_the_measures_on_a_known_error")),
    (40, "measured in train mode; trained in eval mode", "",
     (TRAIN, "model.eval().amp = None ", "model.train().amp = None ", EVAL_MODE),
     (TRAIN, "    model.train()      ", "    model.eval()      ", EVAL_MODE)),
    (41, "the nose's vertex, one too high", "paper's footnote",
     (BODY_FILE, "332,", "333,", "test_without_hmrs_regressor_keypoints_are_approximate")),
    (42, "the pinhole camera nearest to a weak-perspective one: tz = 2 f / (size s)", "",
     (PHOTO, "2 * f /", "f /", "test_the_pinhole_camera_sees_what_the_losses_camera_sees")),
    (43, "Procrustes that guesses its axes from a size", "VIBE (B = 2 or 3)",
     (TRAIN, "t.mT @ s)", "s.mT @ t if len(s) in (2, 3) else t.mT @ s)",
      "test_procrustes_undoes_any_similarity")),
    (44, "an initialisation that misses its layers", "mmhuman3d",
     (HMR, "module, nn.Linear)", "module, nn.Conv2d)", "test_there_are_25_discriminators")),
    (45, "both optimisers stepped after E's backward", "mmhuman3d",
     (TRAIN, "opt_E.step()", "opt_E.step(), opt_D.step()", "test_a_step_moves_d_by_eq_8")),
    (46, "two 6D layouts in one project", "mmhuman3d",
     (HMR, "(pose)[..., :2]", "(pose).mT[:, :2]", "test_theta_bar_in_6d_is_the_same_body")),
    (47, "the joints regressed from the posed skin", "GraphCMR",
     (SMPL, ", joints  ", ", J_regressor @ vertices  ", "test_lbs_equals_a_slow_loop")),
    (48, "2D divided by size - 1", "mmhuman3d (223)",
     (DATA, "(size / 2), p", "((size - 1) / 2), p", "test_the_renderer_samples_pixel_centres")),
    (49, "PCK and AUC: strictly below the threshold", "many ports",
     (TRAIN, "None] < thresholds", "None] <= thresholds",
      "test_errors_are_centred_at_the_hips_and_the_thresholds_are_3dhps")),
    (50, "the crop by head top to hip, not by shoulder to hip", "official MPII converter",
     (DATASETS, "(0, 5), (8, 9)", "(0, 5), (13, 13)",
      "test_the_crops_scale_is_the_official_codes")),
    (51, "visibility that is neither 0 nor 1", "pytorch_HMR's 0.5 for occluded points",
     (HMR, "masked_mean(target - pred, visible[..., None], torch.abs)",
      "((target - pred).abs() * visible[..., None]).sum() / (2 * visible.sum())", LOSS_KP)),
    (52, "Rodrigues' 0/0: dodged by a small number, or left to where()", "smplx",
     (SMPL, "a2 = pose.square()", "a2 = (pose + 1e-8).square()", RODRIGUES),
     (SMPL, "safe.sqrt", "a2.sqrt", "test_rodrigues_has_the_right_gradient_even_at_zero[zero]")),
    # ---- everyone's slips, in no published code that we know of
    (53, "the kinematic chain", "",
     (SMPL, "bones[parents[i]] @ local[:, i]", "local[:, i] @ bones[parents[i]]", KINEMATICS),
     (SMPL, "return posed[:, :, :3, 0], A", "return A[:, :, :3, 3], A", KINEMATICS)),
    (54, "the regressor's loop: what is added to what, Theta_0 among the results", "",
     (HMR, "theta = theta + self.fc3(x)", "theta = self.theta_bar + self.fc3(x)", IEF),
     (HMR, "theta + self", "theta.detach() + self", "test_gradients_run_through_all_iterations"),
     (HMR, "thetas, self.decode(thetas[-1])", "thetas, self.decode(thetas[0])", SCALE),
     (HMR, "thetas = []", "thetas = [theta]", IEF),
     (HMR, "fc1(x)), self.dropout, self.training", "fc1(x)), self.dropout, True", IEF)),
    (55, "one training step", "",
     (TRAIN, "        opt_D.zero_grad()\n", "", "test_a_step_moves_d_by_eq_8"),
     (TRAIN, "    opt_E.zero_grad()\n", "", STEP_E)),
    (56, "degrees for radians; an axis that is not normalised", "",
     (SMPL, "a2 = pose.square()", "a2 = (pose := pose.deg2rad()).square()", RODRIGUES),
     (SMPL, "K = torch", "K = a * torch", RODRIGUES)),
    (57, "float64 that leaks out; an input that is changed in place", "",
     (SMPL, "coefficients @ directions.", "coefficients.double() @ directions.double().", BLEND),
     (TRAIN, "source - mu_s", "source.sub_(mu_s)", "test_procrustes_undoes_any_similarity")),
    (58, "D with a sigmoid, as the paper's [0, 1] reads; D on R - I", "",
     (HMR, "per_joint, y, z], 1)", "per_joint, y, z], 1).sigmoid()", HEADS),
     (HMR, "x = rotmats.flatten(2)", "x = (rotmats - torch.eye(3)).flatten(2)", HEADS)),
    (59, "sources: the right formula is given the wrong thing", "",
     (TRAIN, "adam(D, config.lr_d", "adam(nn.ModuleList([D, model]), config.lr_d", LOOP),
     (TRAIN, "load_mocap(config.upright, True", "load_mocap(config.upright, False", SOURCES),
     (TRAIN, "EVALUATION_SEED, labels=", "config.seed, labels=", SOURCES),
     (TRAIN, "crop=config.crop)     # 2", 'crop="official")     # 2', SOURCES),
     (TRAIN, "training_world(config, model.smpl).motion(2048", "world.motion(2048", SOURCES),
     (TRAIN, "D(theta_T.rotmats[:, 1:], theta_T.", "D(bar.rotmats[:, 1:], bar.", SOURCES)),
)


# --------------------------------------------------------------------------------------------
# The command

def apply(edit: Edit) -> str:
    """The edited file's text.  Raises ValueError if the line is not there, or not once."""
    text = source(edit.file)
    if text.count(edit.old) != 1:
        raise ValueError(f"{edit.file}: expected once, found {text.count(edit.old)} times: "
                         f"{edit.old.strip()!r}; mend this edit in appendix/gallery.py")
    return text.replace(edit.old, edit.new)


def gallery(numbers: list[int], processes: int) -> bool:
    """Apply each edit, run its test, print the table -> was every one caught?"""
    if wrong := set(numbers) - {number for number, *_ in MISTAKES}:
        raise ValueError(f"{min(wrong)}: expected numbers of mistakes, 1 to {len(MISTAKES)}")
    begun, missed = time.monotonic(), 0
    chosen = [row for row in MISTAKES if not numbers or row[0] in numbers]
    wanted = [Edit(*edit) for _, _, _, *edits in chosen for edit in edits]
    tests = sorted({place(edit.test) for edit in wanted})
    # a stale edit raises first; "as it is": what fails without any edit proves nothing
    jobs = [Job("as it is", {}, tests, seconds=600)] + [
        Job(edit, {edit.file: apply(edit)}, [place(edit.test)]) for edit in wanted]
    results = {job.key: result for job, result in run_apart(jobs, processes)}
    outcomes, ending = results["as it is"]
    failed = [f"{name}: {text}; " for name, text in outcomes.items() if text]
    if failed or ending or len(outcomes) < len(tests):
        raise ValueError(f"without any edit: {''.join(failed)}{ending or 'run pytest'}")
    for number, what, who, *edits in chosen:
        print(f"{number:3d}. {what}" + f"  [{who}]" * bool(who))
        for edit in map(Edit._make, edits):
            outcomes, ending = results[edit]
            caught = next(filter(None, outcomes.values()), "")
            missed += not caught
            texts = source(edit.file).splitlines(), apply(edit).splitlines()
            _, _, where, *changed = difflib.unified_diff(*texts, n=0, lineterm="")
            print(f"     {edit.file}, line {re.search('[0-9]+', where)[0]}", *changed,
                  f"{edit.test}: {caught or 'NOT CAUGHT ' + ending}", sep="\n       ")
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
