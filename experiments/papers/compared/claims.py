"""Claims of papers that the tables of `experiments/compare` decide.

    python experiments/papers/compared/claims.py
    python scripts/render_tables.py

A claim is that one row diverges less from full precision than another: the KL
divergence, in nats for each token. `paper better` and `paper worse` are the paper's own
numbers for the two, on its model and text; README.md says which they are.
"""

from dataclasses import dataclass
from pathlib import Path

from qjax.results import Record, append, environment, read

ROOT = Path(__file__).parents[3]
TABLES = ROOT / "experiments" / "compare" / "results"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Less:
    """The claim that `better` diverges less than `margin` times what `worse` does."""

    better: str
    worse: str
    paper: tuple[float | None, float | None] = (None, None)
    margin: float = 1.0


def at(bits: int) -> str:
    """The format that all rows of a table share."""
    return f"int{bits} g128"


LOFTQ: dict[int, tuple[float | None, float | None]] = {3: (5.63, 5.73), 2: (7.85, None)}
"""LoftQ, table 5: Llama-2-7B fine-tuned on WikiText-2; beside it QLoRA, which does not
converge at 2 bits."""

CLAIMS: dict[str, tuple[Less, ...]] = {
    "lowrank": (
        # QERA, table 3: TinyLlama 1.1B at 3.25 bits, rank 64, on WikiText-2.
        *(Less(f"LoRC {at(b)}", f"RTN {at(b)}", (27.8, 32.82), 0.97) for b in (3, 2)),
        *(Less(f"LoftQ {at(b)}", f"LoRC {at(b)}", LOFTQ[b]) for b in (3, 2)),
        *(Less(f"LQER {at(b)}", f"LoRC {at(b)}", (20.6, 27.8)) for b in (3, 2)),
        *(Less(f"QERA {at(b)}", f"LQER {at(b)}", (19.51, 20.6), 0.97) for b in (3, 2)),
        *(Less(f"GPTQ and QERA {at(b)}", f"GPTQ {at(b)}", margin=0.97) for b in (3, 2)),
        # The poster: relative Frobenius error of LLaMA-7B's layers.
        Less("LPLR, half the rank in int4", f"RTN {at(3)}", (0.537, 0.836)),
        Less("SVDQuant W4A4", "W4A4", margin=0.8),
    ),
    "outliers": (Less("SVDQuant W4A4", "W4A4", margin=0.2),),
    "blockwise": (
        Less(f"AutoRound {at(2)}", f"GPTQ {at(2)}", (48.64, 35.37)),
        Less(f"AutoRound {at(2)}", f"RTN {at(2)}", (48.64, 29.94), 0.7),
        Less(f"OmniQuant {at(2)}", f"RTN {at(2)}", (40.74, 29.94), 0.9),
        Less(f"AutoRound {at(2)}", f"OmniQuant {at(2)}", (48.64, 40.74)),
        Less(f"BRECQ {at(2)}", f"RTN {at(2)}", margin=0.9),
        Less(f"EfficientQAT {at(2)}", f"RTN {at(2)}", margin=0.9),
        Less(f"ZeroQuantLKD {at(2)}", f"RTN {at(2)}", margin=0.9),
    ),
}
BESIDE = ("compare.jsonl", "calibrated/compare.jsonl")
"""Tables that hold the rows of other methods, of the same model and text."""


def rows(name: str) -> dict[str, Record]:
    """The rows that a table's claims speak of, by label."""
    beside = () if name == "outliers" else BESIDE
    tables = [TABLES / each for each in beside] + [TABLES / name / "compare.jsonl"]
    return {record.label: record for table in tables for record in read(table)}


def decided(claim: Less, table: dict[str, Record]) -> Record:
    """Whether a claim holds here."""
    better, worse = (table[label].metrics for label in (claim.better, claim.worse))
    metrics = {
        "kl_better": better["kl"],
        "kl_worse": worse["kl"],
        "ratio": better["kl"] / worse["kl"],
        "margin": claim.margin,
        "holds": int(better["kl"] < claim.margin * worse["kl"]),
        "bits_better": better["bits_per_weight"],
        "bits_worse": worse["bits_per_weight"],
        "paper_better": claim.paper[0],
        "paper_worse": claim.paper[1],
    }
    context = {k: v for k, v in environment().items() if k in ("commit", "date")}
    own = table[claim.better].context
    context |= {k: own[k] for k in ("model", "text", "scored_tokens") if k in own}
    label = f"{claim.better} below {claim.worse}"
    return Record(
        label, {"better": claim.better, "worse": claim.worse}, metrics, context
    )


def main() -> None:
    """All claims of the tables that are there."""
    for name, claims in CLAIMS.items():
        if not (TABLES / name / "compare.jsonl").is_file():
            continue
        out = RESULTS / f"{name}.jsonl"
        out.unlink(missing_ok=True)
        table = rows(name)
        for claim in claims:
            if claim.better not in table or claim.worse not in table:
                continue  # a table may hold a part of its group
            record = decided(claim, table)
            append(out, record)
            print(f"{record.label}: {record.metrics['ratio']:.3f}", flush=True)


if __name__ == "__main__":
    main()
