"""Texts of kernel files with one thing wrong, for tests that must notice; cut down to a few kernels, which compile faster.

What kernels share stands in files of its own: a text here is a kernel's file with those in the place of their #include.
"""

import re

from svdq_pack.svdq.kernels.build import CUDA

INCLUDE = r'^#include "(.+)"$'
CLAMP = "px::clamped<T>("


def whole(file):
    """The text of a file of cuda/ that includes nothing but ptx.cuh any more."""
    seen = {"ptx.cuh"}

    def included(match):
        if match[1] in seen:                    # ptx.cuh stays, and what came before is not repeated
            return match[0] if match[1] == "ptx.cuh" else ""
        seen.add(match[1])
        return re.sub(INCLUDE, included, (CUDA / match[1]).read_text(), flags=re.M).replace("#pragma once\n", "")
    return re.sub(INCLUDE, included, (CUDA / file).read_text(), flags=re.M)


def only(file, kernels, text=None):
    """The text of a file of cuda/ (or this one in its place) with those of its kernels whose name matches."""
    macro = file.removesuffix(".cuh").upper()
    text, count = re.subn(rf"^{macro}\((?!{kernels}\b).*\n", "", text or whole(file), flags=re.M)
    assert count and re.search(rf"^{macro}\(", text, re.M), f"{file} has no kernel {kernels}, or no other"
    return text


def without(file, words, index, instead=";"):
    """The text of a file with `instead` in the place of its index-th `words`."""
    parts = whole(file).split(words)
    return words.join(parts[:index + 1]) + instead + words.join(parts[index + 1:])


def planted(file, right, wrong):
    """The text of a file with `wrong` in the place of each `right`."""
    text = whole(file)
    assert right in text, f"{file} has no {right}"
    return text.replace(right, wrong)


def places(file, *words, outside=()):
    """(file, words, index) of every place in a file where one of these words is, but for those in the files `outside`, which it
    includes."""
    text = whole(file)
    found = [(file, each, index) for each in words
             for index, match in enumerate(re.finditer(re.escape(each), text))
             if not any(begin <= match.start() < end for begin, end in (_span(text, other) for other in outside))]
    assert {each for _, each, _ in found} == set(words), f"{file} lacks one of {words}"
    return found


def _span(text, file):
    """Where the own text of an included file begins and ends."""
    part = (CUDA / file).read_text()
    part = part[part.index("namespace"):]
    begin = text.index(part)
    return begin, begin + len(part)
