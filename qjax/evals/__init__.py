"""How good a model still is: perplexity, KL divergence, top-1 agreement."""

from qjax.evals.divergence import Divergence, Yardstick, divergence, token_kl
from qjax.evals.perplexity import Perplexity, Protocol, Scores, perplexity

__all__ = [
    "Divergence",
    "Perplexity",
    "Protocol",
    "Scores",
    "Yardstick",
    "divergence",
    "perplexity",
    "token_kl",
]
