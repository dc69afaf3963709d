"""Which transformer block a layer of a model belongs to: `training.layers`."""

from collections.abc import Iterable, Sequence

from duet_ray.errors import ConfigError, Problem


def block_of(name: str) -> int | None:
    """The number of a layer's block: the first number in its dotted name (`model.layers.3.mlp.experts.0.w1` → 3)."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def in_blocks(names: Iterable[str], blocks: Sequence[int] | None) -> list[str]:
    """Of a model's layers, those in the given blocks; None: all.

    Raises:
        ConfigError: the model has no such block.
    """
    names = list(names)
    if blocks is None:
        return names
    there = {block for name in names if (block := block_of(name)) is not None}
    if unknown := sorted(set(blocks) - there):
        message = (
            f"the model has the transformer blocks {min(there)} to {max(there)}" if there else "the model has no blocks"
        )
        raise ConfigError([Problem(path="training.layers", message=f"{message}, got {', '.join(map(str, unknown))}")])
    return [name for name in names if block_of(name) in blocks]
