"""ComfyUI's server, where one runs, and the only way of a text to its page.

Test: tests/unit/test_prompt_server.py, tests/comfy/test_markup.py
"""

import re
import sys

from ..svdq.kernels.errors import printable

_TWINS = str.maketrans("<>`", "‹›'")
# What else may begin markup: an entity, emphasis, a link in Markdown or as [[label|address]], an address of the web or of mail.
# A _ between letters begins none; __LNK is what the page puts in the place of a link while it looks for others.
_OPENERS = re.compile(r"""&(?=[\w#])   | [*~@](?=\S)   | (?<![^\W_])_(?=\S)
                        | \[(?=\[)     | \](?=[\[(:])   | :(?=//)     | (?<=www)\.(?=\S)""", re.IGNORECASE | re.VERBOSE)


def running():
    """The PromptServer, or None in a script that only imports the nodes. Importing `server` here would build its routes."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def show(text, node):
    """Show a text on a node in the page, instead of the one before; returns it as shown, for the node's outputs.

    node   the class whose execute runs, with unique_id among its hidden inputs
    """
    text = plain(text)
    if running() and node.hidden and node.hidden.unique_id:     # the page shows ui text only on nodes of ComfyUI
        running().send_progress_text(text.replace("\n", "  \n"), node.hidden.unique_id)   # Markdown: the line ends here
    return text


def teller(node, before=None):
    """say(text): show it on the node, below a line that stays."""
    return lambda text: show(f"{before}\n{text}" if before else text, node)


def answer_with_texts(path, ask):
    """Answer what a page of ours posts to `path` with a list of texts: `ask` of the JSON that came, whatever it is."""
    from aiohttp import web  # which a server has

    @running().routes.post(path)
    async def answer(request):
        try:
            given = await request.json()
        except ValueError:
            return web.json_response([], status=400)
        return web.json_response([plain(text) for text in ask(given)])


def plain(text):
    """Text with names out of files, for people, as one that is no markup wherever the page puts it: ‹ and › for what begins
    elements, a space after what begins anything else.

    ComfyUI's page renders the text on a node as HTML with links of its own (older ones, frontend 1.39, whatever it says), or
    as Markdown in the modern design of nodes; 'Preview as Text' shows a STRING as it is or as Markdown. No escape is read by
    all of these, and by people.
    """
    return _OPENERS.sub(r"\g<0> ", printable(text, lines=True).translate(_TWINS))
