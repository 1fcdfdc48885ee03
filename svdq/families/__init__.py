"""The families of models this pack knows, one module each. flux1.py says what such a module offers and how to add one."""

from . import flux1

FAMILIES = (flux1,)
FAMILY_NAMES = " or ".join(family.NAME for family in FAMILIES)


PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.")       # that programs put before names


def unprefixed(names, mark):
    """({name without prefix: name}, what mark says) for the first of PREFIXES for which mark(names without it) says anything;
    what does not have it is left out. ({}, None) where there is no such prefix.
    """
    names = list(names)
    for prefix in PREFIXES:
        inner = {name[len(prefix):]: name for name in names if name.startswith(prefix)}
        if found := mark(inner):
            return inner, found
    return {}, None


def recognise(names):
    """The family that an SVDQ file with tensors of these names belongs to; None if it is none of ours."""
    names = list(names)
    return next((family for family in FAMILIES if set(family.MARKS) <= set(map(family.canonical, names))), None)


def shape_of(sizes):
    """The Shape that has the fields which the dict `sizes` has. Raises KeyError when there is none."""
    family = next((family for family in FAMILIES if family.Shape.__dataclass_fields__.keys() <= sizes.keys()), FAMILIES[0])
    return family.Shape(**{field: sizes[field] for field in family.Shape.__dataclass_fields__})
