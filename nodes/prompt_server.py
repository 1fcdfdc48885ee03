"""ComfyUI's server, where one runs."""

import sys


def running():
    """The PromptServer, or None in a script that only imports the nodes. Importing `server` here would build its routes."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
