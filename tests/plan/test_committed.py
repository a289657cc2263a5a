"""The committed plans of Llama-3 against arithmetic from its configuration alone."""

from pathlib import Path

import pytest

from qjax import results
from qjax.plan.layouts import NAMED
from qjax.plan.machines import machine

FOLDER = Path(__file__).parents[2] / "experiments" / "plan" / "results"
MACHINES = ("v5e:2x4", "v6e:2x4", "v7x:2x2x1", "h200")
MODELS = ("Llama-3-8B", "Llama-3-70B")
SCHEMES = ("bf16", "W8A8", "W4A16", "W4A8-KV8")
NORM, TOKEN = 2, 4  # bytes of a norm's weight, of a token's number


def plans(model: str, place: str):
    stem = f"{model}-{place}".lower().replace(":", "-")
    return {r.config["scheme"]: r for r in results.read(FOLDER / f"{stem}.jsonl")}


class Sizes:
    """Of a Llama, as its paper draws it."""

    def __init__(self, model: str):
        f = NAMED[model]
        self.L, self.D = f["num_hidden_layers"], f["hidden_size"]
        self.F, self.V = f["intermediate_size"], f["vocab_size"]
        self.H, self.G = f["num_attention_heads"], f["num_key_value_heads"]
        self.d = self.D // self.H
        kv = self.G * self.d
        # Inputs and outputs of every linear of a layer.
        self.linears = [(self.D, self.D)] * 2 + [(self.D, kv)] * 2
        self.linears += [(self.D, self.F)] * 2 + [(self.F, self.D)]

    @property
    def linear(self) -> int:
        return self.L * sum(k * n for k, n in self.linears)

    def linear_bytes(self, scheme: str) -> float:
        """Codes and bfloat16 scales: one for 128 inputs (W4), or for all (W8A8)."""
        if scheme == "bf16":
            return 2 * self.linear
        if scheme == "W8A8":
            return self.linear + 2 * self.L * sum(n for _, n in self.linears)
        return self.linear / 2 + 2 * self.linear / 128

    def cache_bytes(self, scheme: str, slots: int) -> float:
        """Keys and values; int8 with a float32 scale for each slot and head."""
        each = self.d + 4 if scheme.endswith("KV8") else 2 * self.d
        return 2 * self.L * self.G * slots * each


@pytest.mark.parametrize("place", MACHINES)
@pytest.mark.parametrize("model", MODELS)
def test_counts_are_those_of_the_formula(model: str, place: str):
    """Operations exactly; bytes but for masks, positions and lengths."""
    s, found = Sizes(model), plans(model, place)
    assert tuple(found) == SCHEMES
    for scheme, record in found.items():
        batch, room = record.config["batch"], record.config["context"]
        for step, tokens in (("decode", batch), ("prefill", record.config["prompt"])):
            program = record.metrics["programs"][step]
            per_token = 2 * (s.linear + s.D * s.V) + 4 * s.L * s.D * room
            assert program["operations_per_token"] == per_token
            assert sum(program["operations"].values()) == tokens * per_token
            assert not program["uncounted"]
            sequences = batch if step == "decode" else 1
            rows = 2 * s.D * tokens
            read = s.linear_bytes(scheme) + 2 * s.D * s.V + rows
            read += NORM * (2 * s.L + 1) * s.D + TOKEN * tokens
            read += s.cache_bytes(scheme, sequences * room)
            assert program["bytes_read"] == pytest.approx(read, rel=1e-3)
            written = s.cache_bytes(scheme, tokens)
            assert program["bytes_written"] == pytest.approx(written, rel=0.02)


@pytest.mark.parametrize("place", MACHINES)
@pytest.mark.parametrize("model", MODELS)
def test_memory_is_that_of_the_arrays(model: str, place: str):
    """What each device holds of weights and cache, and what the compiler allots."""
    s, n = Sizes(model), machine(place).devices
    for scheme, record in plans(model, place).items():
        batch, room = record.config["batch"], record.config["context"]
        program = record.metrics["programs"]["decode"]
        cut = s.linear_bytes(scheme) + 2 * 2 * s.D * s.V
        weights = cut / n + NORM * (2 * s.L + 1) * s.D
        assert program["weights_bytes"] == pytest.approx(weights, rel=1e-3)
        cache = s.cache_bytes(scheme, batch * room) / n
        assert program["cache_bytes"] == pytest.approx(cache, rel=1e-3)
        if program["arguments_bytes"] is not None:
            own = program["weights_bytes"] + program["cache_bytes"]
            assert own <= program["arguments_bytes"] <= 1.01 * own


@pytest.mark.parametrize("place", MACHINES)
@pytest.mark.parametrize("model", MODELS)
def test_devices_send_the_sums_of_each_layer(model: str, place: str):
    """Two for each layer, in int32 of coded tokens, and the embedding's rows."""
    s, n = Sizes(model), machine(place).devices
    for scheme, record in plans(model, place).items():
        program = record.metrics["programs"]["decode"]
        if "sent_bytes_per_device" not in program:
            assert record.metrics["fits"] == "no"
            continue
        each = 4 if "A8" in scheme else 2
        rows = record.config["batch"] * s.D
        least = 2 * (n - 1) / n * rows * (2 * s.L * each + 2)
        assert least <= program["sent_bytes_per_device"] <= 1.02 * least


@pytest.mark.parametrize("place", MACHINES)
@pytest.mark.parametrize("model", MODELS)
def test_limits_are_operations_and_bytes_over_rates(model: str, place: str):
    there = machine(place)
    chip, n = there.chip, there.devices
    for record in plans(model, place).values():
        for program in record.metrics["programs"].values():
            matrix = sum(k / chip.peak(f) for f, k in program["operations"].items())
            moved = program["bytes_read"] + program["bytes_written"]
            assert program["matrix_seconds"] == pytest.approx(matrix / n)
            assert program["memory_seconds"] == pytest.approx(
                moved / n / chip.bandwidth
            )
            if "limit_seconds" not in program:
                continue
            alone = max(program["matrix_seconds"], program["memory_seconds"])
            links = program["sent_bytes_per_device"] / chip.link
            assert program["limit_seconds"] == pytest.approx(alone + links)
            assert program["compiled_seconds"] >= 0.999 * program["limit_seconds"]


@pytest.mark.parametrize("place", ["v5e:2x4", "h200"])
def test_sweeps_follow_batch_and_context(place: str):
    """Each load's operations, bytes and cache; what does not fit needs more than is."""
    s, there = Sizes("Llama-3-8B"), machine(place)
    stem = f"llama-3-8b-{place}".replace(":", "-")
    found = results.read(FOLDER.parent / "sweep" / f"{stem}.jsonl")
    loads = {(r.config["batch"], r.config["context"]) for r in found}
    assert {(1, 4096), (256, 4096), (16, 8192)} <= loads
    assert len(found) == len(SCHEMES) * len(loads)
    for record in found:
        scheme, batch, room = (record.config[k] for k in ("scheme", "batch", "context"))
        program = record.metrics["programs"]["decode"]
        per_token = 2 * (s.linear + s.D * s.V) + 4 * s.L * s.D * room
        assert program["operations_per_token"] == per_token
        read = s.linear_bytes(scheme) + 2 * s.D * s.V + 2 * s.D * batch
        cache = s.cache_bytes(scheme, batch * room)
        assert program["bytes_read"] == pytest.approx(read + cache, rel=1e-3)
        assert program["cache_bytes"] * there.devices == pytest.approx(cache, rel=1e-3)
        fits = record.metrics["fits"] == "yes"
        assert fits == (program["needed_bytes"] <= program["available_bytes"])
