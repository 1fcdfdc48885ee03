"""What a checkpoint is, in numbers and in words."""

from .checkpoint import PRECISIONS, Checkpoint
from .errors import first, shown
from .kernels.errors import printable

MOST = 20           # metadata keys or problems in a text for people


def describe(path):
    """Facts of an SVDQ file or folder as a dict that JSON can hold. Raises CheckpointError for anything else."""
    checkpoint = Checkpoint(path)
    shape = checkpoint.shape
    return {
        "path": str(path),
        "container": "single file" if len(checkpoint.files) == 1 else "legacy folder",
        "model": shape.variant if shape else None,
        "model_class": shape.model_class if shape else None,
        "precision": checkpoint.precision,
        "weights": PRECISIONS[checkpoint.precision][0],
        "ranks": {str(rank): count for rank, count in sorted(checkpoint.ranks.items())},
        **checkpoint.family.facts(shape),
        "tensors": len(checkpoint.tensors),
        "tensor_bytes": checkpoint.nbytes,
        "metadata_keys": sorted(checkpoint.metadata),
        "problems": checkpoint.problems,
        "notices": checkpoint.notices,
    }


def as_text(facts):
    ranks = ", ".join(f"{rank} ({count} layers)" for rank, count in facts["ranks"].items())
    blocks = ", ".join(f"{count} {name.removesuffix('_blocks')}" for name, count in facts.items()
                       if name.endswith("_blocks")) if facts["model"] else None
    rows = [("model", facts["model"]), ("container", facts["container"]),
            ("precision", f"{facts['precision']} weights and activations ({facts['weights']})"), ("rank", ranks),
            ("blocks", blocks), ("hidden size", facts["hidden_size"]), ("latent channels", facts["latent_channels"]),
            ("tensors", f"{facts['tensors']:,}, {facts['tensor_bytes']:,} bytes"),
            ("metadata", ", ".join(map(shown, first(facts["metadata_keys"], MOST))) or "none")]
    problems = [f"  PROBLEM         {text}" for text in first(facts["problems"], MOST)] or ["  problems        none"]
    notices = [f"  notice          {text}" for text in facts["notices"]]
    lines = [f"  {name:<16}{value or 'unknown'}" for name, value in rows]
    return "\n".join([printable(facts["path"]), *problems, *notices, *lines])          # a node may show the first lines alone
