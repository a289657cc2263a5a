"""Coding of an activation at its site."""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from qjax.core.formats import NVFP4, Float, Format, Granularity, Int
from qjax.core.qtensor import Activation, SiteActs
from qjax.core.rounding import straight_through
from qjax.core.scales import Grid


@dataclass(frozen=True)
class CodedInput:
    """An activation `x[..., M, K]` coded as `x.T`: unpacked `codes[..., K, M]`."""

    codes: Any
    grid: Grid
    format: Format

    def decode(self, dtype: Any) -> Any:
        """The activation that the codes stand for, `[..., M, K]`."""
        values = self.format.from_codes(self.codes, self.grid)
        return jnp.swapaxes(values, -1, -2).astype(dtype)


def code_input(x: Any, acts: SiteActs) -> CodedInput:
    """Code `x[..., M, K]` with the site's activation format.

    Raises:
        ValueError: the site has no activation format, a static one has no scale, or
            outlier features have not been split off.
    """
    activation = acts.activation
    if activation is None:
        raise ValueError("the site has no activation format")
    if activation.outliers is not None:
        raise ValueError(
            f"Activation.outliers is {activation.outliers!r}, but only dot sites keep "
            "outlier features in float; give convolutions and experts another step, "
            "or leave them out with ignore"
        )
    transposed = jnp.swapaxes(x, -1, -2)
    grid = _input_grid(transposed, acts, activation)
    codes = activation.format.to_codes(transposed, grid)
    return CodedInput(codes, grid, activation.format)


def _input_grid(transposed: Any, acts: SiteActs, activation: Activation) -> Grid:
    """The grid of `x.T[..., K, M]`, from the batch or from calibration."""
    format = activation.format
    if activation.dynamic:
        return format.fit(transposed)
    # NVFP4's blocks follow the batch; the scale of their scales is what is static.
    two_levels = isinstance(format, NVFP4)
    if (acts.global_scale if two_levels else acts.scale) is None:
        raise ValueError(
            f"activation format {format.name} is static but has no "
            f"{'global ' if two_levels else ''}scale; calibrate the site or use "
            "dynamic=True"
        )
    if isinstance(format, NVFP4):
        return format.fit(transposed, global_scale=acts.global_scale)
    return Grid(acts.scale, acts.zero)


def of_rows(acts: SiteActs, sizes: Any, M: int) -> SiteActs:
    """Static ranges of experts, `[E, G, 1]`, as ranges of the rows that they take.

    Args:
      acts: of a site whose `M` rows are sorted by expert.
      sizes: `[E]`, rows of each expert.
      M: rows.
    """
    activation = acts.activation
    known = acts.scale if acts.global_scale is None else acts.global_scale
    if activation is None or activation.dynamic or known is None or known.ndim == 2:
        return acts
    owner = jnp.repeat(jnp.arange(known.shape[0]), sizes, total_repeat_length=M)

    def taken(values: Any) -> Any:
        return None if values is None else values[owner, :, 0].T

    format = activation.format
    if isinstance(format, (Int, Float)):
        own = Granularity(format.granularity.rows, 1)
        activation = replace(activation, format=replace(format, granularity=own))
    return replace(
        acts,
        scale=taken(acts.scale),
        zero=taken(acts.zero),
        global_scale=taken(acts.global_scale),
        activation=activation,
    )


def coded_values(x: Any, acts: SiteActs) -> Any:
    """The values that the codes of `x` stand for, with the gradient of the identity."""
    return straight_through(x, code_input(x, acts).decode(x.dtype))


def integers(codes: Any, grid: Grid, format: Int) -> tuple[Any, Any]:
    """Unsigned codes as int8 operands and the zero point to subtract from them.

    8-bit codes are shifted by 128 to fit; a symmetric grid of fewer bits is shifted to
    its own zero, so that no correction is needed.
    """
    shift = format.half if format.bits == 8 or format.symmetric else 0
    shifted = codes.astype(jnp.int16) - jnp.int16(shift)
    if format.symmetric:
        return shifted.astype(jnp.int8), None
    dtype = jnp.float32 if format.zero == "float" else jnp.int32
    return shifted.astype(jnp.int8), grid.zero.astype(dtype) - dtype(shift)


def contraction(weight: Format, activation: Format | None) -> str:
    """How a coded weight and a coded activation are contracted.

    "int" and "float8" contract the codes themselves; "values" contracts what the codes
    stand for, in the activation's dtype.
    """
    if activation is None:
        return "values"
    if isinstance(weight, Int) and isinstance(activation, Int):
        return "int" if _share_groups(weight, activation) else "values"
    if isinstance(weight, Float) and isinstance(activation, Float):
        return "float8" if _share_groups(weight, activation) else "values"
    return "values"


def _share_groups(weight: Format, activation: Format) -> bool:
    """Whether one of the two spans K, or both cut it in the same groups.

    A scale for each single feature leaves nothing to accumulate.
    """
    w, x = weight.granularity, activation.granularity
    if x.rows == 1:
        return False
    return w.rows is None or x.rows is None or w.rows == x.rows
