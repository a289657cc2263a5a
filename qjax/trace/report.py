"""The coverage table."""

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from qjax.trace.sites import Site, Sites


def table(found: "Sites") -> Table:
    """Sites, other uses, captured constants and unused leaves, as a rich table."""
    out = Table(title=summary(found), title_justify="left")
    for name in ("leaf", "kind", "K x N", "layers", "M", "input", "runs"):
        right = name in ("K x N", "M", "input")
        out.add_column(name, justify="right" if right else "left", overflow="fold")
    for site in found.sites:
        out.add_row(*_row(site))
    for use in found.other_uses:
        out.add_row(use.path, use.primitive, "", "", "", "", use.reason)
    for constant in found.constants:
        shape = "x".join(map(str, constant.shape))
        why = "captured by the function, never quantized"
        out.add_row("(constant)", constant.dtype, shape, "", "", "", why)
    for path in found.unused:
        out.add_row(path, "", "", "", "", "", "never read")
    return out


def summary(found: "Sites") -> str:
    """One line: how many leaves meet an activation, and how they run."""
    leaves = {s.path for s in found.weights}
    low = {s.path for s in found.weights if s.runs.startswith("low-bit")}
    back = {s.path for s in found.weights if s.runs.startswith("dequantized")}
    return (
        f"{len(found.weights)} sites of {len(leaves)} leaves; {len(low)} leaves run in "
        f"low bits, {len(back)} are dequantized at a use; "
        f"{len(found.other_uses)} other uses, {len(found.unused)} leaves never read"
    )


def _row(site: "Site") -> tuple[str, ...]:
    sizes = f"{site.K} x {site.N}" if site.layout else ""
    experts = "".join(f"{n} experts " for n in site.experts)
    layers = " x ".join(map(str, site.stacked))
    name = "(activations)" if site.kind == "activation" else site.path
    number = str(site.input)
    return name, site.kind, sizes, experts + layers, str(site.M), number, site.runs
