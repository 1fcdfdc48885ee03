"""The demo model's text encoder: one-hot words. It was trained on captions of tools/demo/scenes.py and knows no others."""

import torch

from .errors import PackError, shown

WORDS = ("a above at background black blue bottom checkered circle circles cross crosses dotted faded four green "
         "heart hearts in large left middle moon moons of on orange pink purple red right ring rings small square squares "
         "star stars striped the three top triangle triangles two white yellow").split()
TOKENS, SLOTS = 20, 64          # words a prompt may have, and dimensions kept for them: SLOTS - len(WORDS) are free
CONTEXT = SLOTS + 32            # a word and its place
GAIN = 8.0                      # so that the entries of a token have a mean square near one


class PromptError(PackError):
    """A prompt that the demo model cannot paint."""


def encode(prompt):
    """(cond fp32 [1, TOKENS, CONTEXT], pooled fp32 [1, SLOTS]) of a caption; an empty one gives zeros.

    Raises PromptError that names the words it does not know.
    """
    if not isinstance(prompt, str):                     # linked, it may be anything
        raise PromptError(f"The prompt is {shown(prompt)}, needs to be a text. Connect one, or write it on the node")
    words = prompt.lower().replace(",", " ").replace(".", " ").split()
    unknown = sorted(set(words).difference(WORDS))
    if unknown:
        some = ", ".join(f"'{shown(word, 30)}'" for word in unknown[:5]) + (" ..." if len(unknown) > 5 else "")
        raise PromptError(f"The demo model does not know {some}. It knows {', '.join(WORDS)}")
    if len(words) > TOKENS:
        raise PromptError(f"The prompt has {len(words)} words; the demo model takes at most {TOKENS}. Shorten it")
    cond, pooled = torch.zeros(1, TOKENS, CONTEXT), torch.zeros(1, SLOTS)
    for place, word in enumerate(words):
        cond[0, place, WORDS.index(word)] = cond[0, place, SLOTS + place] = pooled[0, WORDS.index(word)] = GAIN
    return cond, pooled
