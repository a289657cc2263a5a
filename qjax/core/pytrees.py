"""Registering a record of arrays as a pytree whose unflattening checks nothing."""

import jax


def register(
    cls: type, children: tuple[str, ...], static: tuple[str, ...] = ()
) -> None:
    """Register `cls` with named array children and static fields.

    JAX unflattens with placeholders (None, booleans, shapes), which a checked
    `__init__` would refuse, so that unflattening goes around it.
    """

    def flatten_with_keys(record):
        keyed = [(jax.tree_util.GetAttrKey(n), getattr(record, n)) for n in children]
        return keyed, tuple(getattr(record, n) for n in static)

    def flatten(record):
        values = tuple(getattr(record, n) for n in children)
        return values, tuple(getattr(record, n) for n in static)

    def unflatten(metadata, values):
        record = object.__new__(cls)
        for name, value in zip(children + static, (*values, *metadata), strict=True):
            object.__setattr__(record, name, value)
        return record

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
