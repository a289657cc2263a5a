"""What each paper of a training method claims, and its own numbers.

A row's `paper` is the paper's number for the same kind of setting on its own model and
data, where one is quoted; only the direction can be compared with ours.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Less:
    """The claim that a metric of `better` is below `margin` times that of `worse`."""

    better: str
    worse: str
    metric: str = "loss"
    margin: float = 1.0


@dataclass(frozen=True)
class Paper:
    """A paper: where its numbers stand, what they are, and what it claims."""

    source: str
    numbers: dict[str, float]
    claims: tuple[Less, ...]


def same_and_better_rate(better: str, worse: str) -> tuple[Less, ...]:
    """The claim at each learning rate, and with the better rate of each side."""
    metrics = ("at_0.003", "at_0.01", "loss")
    return tuple(Less(better, worse, metric) for metric in metrics)


PAPERS: dict[str, Paper] = {
    "lsq": Paper(
        "Esser et al., ICLR 2020 (arXiv:1902.08153), table 1: top-1 of ResNet-18",
        {"float": 70.5, "LSQ W2A2": 67.6, "LSQ W3A3": 70.2},
        (
            Less("LSQ W2A2", "fixed ranges W2A2", margin=0.9),
            Less("LSQ W3A3", "fixed ranges W3A3"),
            Less("LSQ W3A3", "float", margin=1.1),
        ),
    ),
    "lsq_plus": Paper(
        "Bhalgat et al., CVPR-W 2020 (arXiv:2004.09576), abstract: on EfficientNet-B0 "
        "1.8 points over LSQ at W4A4, 5.6 at W2A2",
        {},
        (Less("LSQ+ W2A2, swish", "LSQ W2A2, swish", margin=0.95),),
    ),
    "pact": Paper(
        "Choi et al., 2018 (arXiv:1805.06085), table 2: top-1 of ResNet-18",
        {
            "float": 70.2,
            "PACT W4A4": 69.2,
            "PACT W2A2": 64.4,
            "clipped at 1 W4A4": 68.1,
            "clipped at 1 W2A2": 62.6,
        },
        (
            Less("PACT W2A2", "unclipped W2A2", margin=0.9),
            Less("PACT W4A4", "unclipped W4A4"),
            Less("PACT W2A2", "clipped at 1 W2A2"),
        ),
    ),
    "dorefa": Paper(
        "Zhou et al., 2016 (arXiv:1606.06160), abstract: top-1 of AlexNet",
        {"float": 55.9, "DoReFa W1A2G6": 46.1},
        (
            Less("DoReFa W1A2G6", "DoReFa W1A2G2", margin=0.9),
            Less("DoReFa W1A2G6", "DoReFa W1A1G6", margin=0.9),
            Less("DoReFa W1A2G32", "DoReFa W1A1G32", margin=0.9),
        ),
    ),
    "binary": Paper(
        "Rastegari et al., ECCV 2016 (arXiv:1603.05279), table 1: top-1 of AlexNet",
        {"float": 56.6, "XNOR's weights": 56.8, "BinaryConnect": 35.4},
        (Less("XNOR's weights", "BinaryConnect", margin=0.9),),
    ),
    "paretoq": Paper(
        "Liu et al., 2025 (arXiv:2502.02631): perplexity of MobileLLM-125M",
        {"float": 15.1, "ParetoQ 2 bits": 18.2, "ParetoQ 3 bits": 15.0},
        (
            Less("LSQ 2 bits", "fixed ranges 2 bits"),
            Less("ParetoQ 2 bits", "LSQ 2 bits"),
            Less("ParetoQ 2 bits", "RTN 2 bits", margin=0.8),
        ),
    ),
    "bitnet": Paper(
        "Ma et al., 2024 (arXiv:2402.17764), table 1: perplexity of 700M parameters",
        {"float, from scratch": 12.33, "BitNet b1.58, from scratch": 12.87},
        (
            Less(
                "BitNet b1.58, from scratch",
                "float, from scratch",
                metric="perplexity",
                margin=1.1,
            ),
            Less("BitNet b1.58, from scratch", "float, ternary when trained"),
        ),
    ),
    "llm_qat": Paper(
        "Liu et al., Findings of ACL 2024 (arXiv:2305.17888): up to 20 points over "
        "methods without training at W4A8KV4; the authors' repository, README: mean "
        "zero-shot accuracy of LLaMA-7B",
        {"LLM-QAT W4A8KV4": 62.0},
        (Less("LLM-QAT W4A8KV4", "RTN W4A8KV4", "kl"),),
    ),
    "qlora": Paper(
        "Dettmers et al., NeurIPS 2023 (arXiv:2305.14314), table 2: mean perplexity of "
        "125M to 13B parameters on Pile Common Crawl, before training",
        {"Int4": 34.34, "FP4": 31.07, "NF4": 27.41, "NF4 and double": 27.41},
        (
            Less("NF4", "FP4", "kl"),
            Less("FP4", "Int4", "kl"),
            Less("NF4 and double", "NF4", "kl", 1.02),
            Less("QLoRA on NF4 and double", "LoRA on float", "loss", 1.02),
        ),
    ),
    "loftq": Paper(
        "Li et al., ICLR 2024 (arXiv:2310.08659), table 5, and the authors' model "
        "cards: perplexity of Llama-2-7B fine-tuned on WikiText-2",
        {
            "LoRA on float": 5.08,
            "QLoRA 4 bits": 5.70,
            "LoftQ 4 bits": 5.24,
            "QLoRA 3 bits": 5.73,
            "LoftQ 3 bits": 5.63,
            "LoftQ 2 bits": 7.85,
        },
        (
            *(
                Less(f"LoftQ {bits} bits", f"QLoRA {bits} bits", "kl_before")
                for bits in (4, 3, 2)
            ),
            Less("LoftQ 2 bits", "QLoRA 2 bits", "loss_before"),
            *same_and_better_rate("LoftQ 2 bits", "QLoRA 2 bits"),
        ),
    ),
    "qera": Paper(
        "Zhang et al., ICLR 2025 (arXiv:2410.06040), abstract: 6.05 points over LoftQ "
        "with RoBERTa-base in 2 bits on GLUE; before training 0.28 less perplexity "
        "than LQER",
        {},
        (
            *(
                Less(f"QERA {bits} bits", f"{other} {bits} bits", "kl_before")
                for bits in (3, 2)
                for other in ("LQER", "LoftQ")
            ),
            *same_and_better_rate("QERA 2 bits", "LoftQ 2 bits"),
            *same_and_better_rate("QERA 2 bits", "LQER 2 bits"),
        ),
    ),
    "pissa": Paper(
        "Meng et al., NeurIPS 2024 (arXiv:2404.02948), table 2: accuracy of Llama-2-7B "
        "on GSM8K; figure 4: the loss of the first 100 steps",
        {"LoRA": 43.23, "PiSSA": 53.22},
        (
            Less("PiSSA", "LoRA", "early"),
            *same_and_better_rate("PiSSA", "LoRA"),
        ),
    ),
    "qpissa": Paper(
        "Meng et al., NeurIPS 2024 (arXiv:2404.02948), table 8: by how many percent of "
        "QLoRA's the nuclear norm of the error is smaller, Llama-3-8B, rank 64",
        {
            "QLoRA": 0.0,
            "LoftQ, one turn": 5.3,
            "LoftQ, five turns": 11.2,
            "QPiSSA": 7.7,
        },
        (
            Less("QPiSSA", "QLoRA", "error"),
            Less("QPiSSA", "LoftQ, one turn", "error"),
            Less("QPiSSA", "QLoRA", "kl_before"),
        ),
    ),
    "rslora": Paper(
        "Kalajdzievski, 2023 (arXiv:2312.03732), abstract: with alpha / r higher ranks "
        "learn no better, with alpha / sqrt(r) they do",
        {},
        (
            *same_and_better_rate("rsLoRA rank 64", "LoRA rank 64"),
            Less("rsLoRA rank 64", "rsLoRA rank 4"),
            Less("LoRA rank 64", "LoRA rank 4", "gradient", 0.5),
            Less("rsLoRA rank 4", "rsLoRA rank 64", "gradient", 2.0),
        ),
    ),
    "dora": Paper(
        "Liu et al., ICML 2024 (arXiv:2402.09353), table 15: mean accuracy of LLaMA-7B "
        "on commonsense reasoning",
        {"LoRA rank 4": 39.5, "DoRA rank 4": 61.9},
        same_and_better_rate("DoRA rank 4", "LoRA rank 4"),
    ),
    "methods": Paper("the README's table of training methods", {}, ()),
}
