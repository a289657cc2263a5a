"""Write tests/golden/autoround.npz: steps of auto-round's signed gradient descent.

Runs in the environment of `llmcompressor_env.sh`:

    python scripts/parity/golden_autoround.py tests/golden/autoround.npz

One linear layer learns on one batch, by auto-round's own quantizer and optimizer, as
its block loop does (loss, best kept, step, factors clamped before they are used). For
every case `<sym or asym><bits>_g<group>/*`: gradients of the mean squared error before
the first step (`grad_*`), the loss of each step, the parameters of the smallest loss
and the weight that they give. `w[in, out]` and the parameters are in qjax's layout.
"""

import sys
from typing import Any

import numpy as np
import torch
from auto_round.algorithms.quantization.sign_round.sign_sgd import SignSGD
from auto_round.data_type.int import quant_tensor_asym, quant_tensor_sym

IN, OUT, TOKENS, ITERS = 64, 24, 96, 16
CASES = [
    (quantizer, bits, size)
    for quantizer in (quant_tensor_sym, quant_tensor_asym)
    for bits, size in ((4, 16), (3, 32), (2, 16), (4, -1))
]


def data() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    w = rng.standard_t(5, (OUT, IN)) * 0.1
    mix = rng.normal(size=(IN, IN)) / np.sqrt(IN) + 0.3 * np.eye(IN)
    x = rng.normal(size=(TOKENS, IN)) @ mix
    return torch.tensor(w).float(), torch.tensor(x).float()


def ours(name: str, values: torch.Tensor) -> np.ndarray:
    """From auto-round's rows of groups to `[K, N]` or `[Gk, N]`."""
    columns = IN if name == "v" else values.numel() // OUT
    return values.detach().reshape(OUT, columns).T.numpy().copy()


def case(quantizer: Any, bits: int, size: int) -> dict[str, np.ndarray]:
    w, x = data()
    rows = w.reshape(-1, IN if size < 0 else size)
    target = x @ w.T
    v = torch.zeros_like(rows).requires_grad_()
    low, high = (torch.ones(len(rows)).requires_grad_() for _ in range(2))
    named = {"v": v, "low": low, "high": high}
    optimizer = SignSGD(list(named.values()), lr=torch.tensor(1 / ITERS))
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.0, total_iters=ITERS
    )
    found: dict[str, np.ndarray] = {}
    losses, least = [], np.inf
    for _ in range(ITERS):
        low.data.clamp_(0, 1)
        high.data.clamp_(0, 1)
        q, *_ = quantizer(
            w, bits=bits, group_size=size, v=v, min_scale=low, max_scale=high,
            scale_dtype=torch.float32, tensor_min=rows.min(1)[0].clamp(max=0),
            tensor_max=rows.max(1)[0].clamp(min=0),
        )  # fmt: skip
        loss = torch.nn.functional.mse_loss(x @ q.T, target)
        loss.backward()
        if not losses:
            found |= {f"grad_{n}": ours(n, p.grad) for n, p in named.items()}
        losses.append(loss.item())
        if loss.item() < least:
            least = loss.item()
            found |= {n: ours(n, p) for n, p in named.items()}
            found["weight"] = q.detach().T.numpy().copy()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return found | {"losses": np.array(losses, np.float32)}


def main(path: str) -> None:
    w, x = data()
    flat = {"w": w.T.numpy(), "x": x.numpy()}
    for quantizer, bits, size in CASES:
        kind = "asym" if quantizer is quant_tensor_asym else "sym"
        name = f"{kind}{bits}_g{max(size, 0)}"
        flat |= {f"{name}/{n}": a for n, a in case(quantizer, bits, size).items()}
    np.savez_compressed(path, **flat)


if __name__ == "__main__":
    main(sys.argv[1])
