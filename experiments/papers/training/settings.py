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
    "methods": Paper("the README's table of training methods", {}, ()),
}
