"""The families of models this pack knows, one module each. flux1.py says what such a module offers and how to add one."""

from . import flux1

FAMILIES = (flux1,)
FAMILY_NAMES = " or ".join(family.NAME for family in FAMILIES)


def recognise(names):
    """The family that an SVDQ file with tensors of these names belongs to; None if it is none of ours."""
    names = list(names)
    return next((family for family in FAMILIES if set(family.MARKS) <= set(map(family.canonical, names))), None)


def shape_of(sizes):
    """The Shape that has the fields which the dict `sizes` has. Raises KeyError when there is none."""
    family = next((family for family in FAMILIES if family.Shape.__dataclass_fields__.keys() <= sizes.keys()), FAMILIES[0])
    return family.Shape(**{field: sizes[field] for field in family.Shape.__dataclass_fields__})
