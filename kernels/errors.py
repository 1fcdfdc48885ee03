"""What goes wrong at the boundary of this folder. Messages say: who, what it got, what it needs."""


class ShapeError(ValueError):
    """A tensor whose shape or dtype an operator or a layout cannot take."""


class BuildError(RuntimeError):
    """Kernels could not be compiled or loaded. The message carries the compiler's own words."""
