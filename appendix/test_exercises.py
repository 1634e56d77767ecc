"""Exercises and gallery: the markers, the hand-out, the grading, the table of mistakes."""

import torch

from appendix import datasets
from test_hmr import same_numbers_every_time  # noqa: F401 (a fixture)


def test_beyond_the_picture_its_edge_is_repeated():
    keypoints = 50 * torch.rand(19, 2)
    crop, _ = datasets.crop_person(torch.ones(3, 50, 50), keypoints, torch.ones(19), 64, zoom=0.8)
    assert crop.min() > 0.99, f"black ({crop.min():.2f}) beyond the edge: SPIN's zeros, not hmr's"
