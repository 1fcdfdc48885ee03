"""Texts of kernel files with one thing wrong, for tests that must notice; cut down to a few kernels, which compile faster."""

import re

from svdq_pack.svdq.kernels.build import CUDA

CLAMP = "px::clamped<T>("


def only(file, kernels, text=None):
    """The text of a file of cuda/ (or this one in its place) with those of its kernels whose name matches."""
    macro = file.removesuffix(".cuh").upper()
    text, count = re.subn(rf"^{macro}\((?!{kernels}\b).*\n", "", text or (CUDA / file).read_text(), flags=re.M)
    assert count and re.search(rf"^{macro}\(", text, re.M), f"{file} has no kernel {kernels}, or no other"
    return text


def without(file, words, index, instead=";"):
    """The text of a file with `instead` in the place of its index-th `words`."""
    parts = (CUDA / file).read_text().split(words)
    return words.join(parts[:index + 1]) + instead + words.join(parts[index + 1:])


def planted(file, right, wrong):
    """The text of a file with `wrong` in the place of each `right`."""
    text = (CUDA / file).read_text()
    assert right in text, f"{file} has no {right}"
    return text.replace(right, wrong)


def places(file, *words):
    """(file, words, index) of every place in a file where one of these words is."""
    text = (CUDA / file).read_text()
    assert all(each in text for each in words), f"{file} lacks one of {words}"
    return [(file, each, index) for each in words for index in range(text.count(each))]
