"""Node schemas that every supported ComfyUI accepts."""

import dataclasses

from comfy_api.latest import io

_KNOWN = {field.name for field in dataclasses.fields(io.Schema)}
CATEGORY = "svdq"


def schema(**fields):
    """io.Schema without the fields this version of ComfyUI does not know yet."""
    return io.Schema(category=CATEGORY, **{name: value for name, value in fields.items() if name in _KNOWN})
