"""A qjax model as lm-evaluation-harness (`lm_eval`) calls it.

It tokenizes, truncates and stops as the harness's own `hf` adapter does. `lm_eval` is
in the extra `eval` and needs no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qjax.evals.decoding import continue_until
from qjax.evals.scoring import Continuation, log_likelihoods

LONGEST_ANSWER = 256  # tokens, where a task names no number; as in the `hf` adapter
# Options of a task that shape sampling, and change nothing in greedy decoding.
OF_SAMPLING = ("top_k", "top_p", "min_p", "typical_p")


class HarnessModel(TemplateLM):
    """A causal language model as `lm_eval` calls it.

    Args:
      f: `f(params, tokens[B, T]) -> logits[B, T, V]`; tasks that write text need
        `f.init_cache`. For quantized parameters, `qjax.apply(f)`.
      params: its parameters.
      tokenizer: of transformers.
      context: tokens that the model reads at once.
      batch: rows a batch.
      seed: of sampling, for tasks that sample.
      progress: whether to show bars.

    Raises:
      ValueError: there is no tokenizer.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        params: Any,
        tokenizer: Any,
        context: int,
        *,
        batch: int = 8,
        seed: int = 0,
        progress: bool = True,
    ):
        super().__init__()
        if tokenizer is None:
            raise ValueError("the model has no tokenizer to read the tasks with")
        self.f, self.params, self.tokenizer = f, params, tokenizer
        self.max_length, self.batch_size = context, batch
        self.seed, self.progress = seed, progress

    @property
    def eot_token_id(self) -> Any:
        """The token that ends a text, or None."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text is scored after if nothing is before it.

        Raises:
          ValueError: the tokenizer has neither a first nor a last token.
        """
        found = self._prefix
        if found is None:
            raise ValueError(
                "the tokenizer has neither bos_token nor eos_token; a text without "
                "context is scored after one of them"
            )
        return found

    @property
    def _prefix(self) -> int | None:
        first = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """A name for caches of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of a text, with the tokenizer's special tokens unless they are there.

        `add_special_tokens` overrules both.
        """
        if add_special_tokens is None and self._prefix is not None:
            start = self.tokenizer.decode(self._prefix)
            add_special_tokens = False if has_bos_prefix(string, start) else None
        given = {"add_special_tokens": add_special_tokens}
        given = {} if add_special_tokens is None else given
        return self.tokenizer.encode(string, verbose=False, **given)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Nats of each continuation after its context, and whether it is greedy."""
        quiet = disable_tqdm or not self.progress
        return super().loglikelihood(requests, disable_tqdm=quiet)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        wanted = [Continuation(tuple(a), tuple(b)) for _, a, b in requests]
        found = [(each.total, each.greedy) for each in self._score(wanted)]
        for request, answer in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return found

    def _score(self, wanted: Sequence[Continuation]) -> list[Any]:
        return log_likelihoods(
            self.f,
            self.params,
            wanted,
            self.max_length,
            batch=self.batch_size,
            progress=self.progress,
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Nats of each whole text, in windows with as much context as there can be."""
        windows, owners = list[Continuation](), list[int]()
        for number, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for before, tokens in map(make_disjoint_window, pairs):
                windows.append(Continuation(tuple(before), tuple(tokens)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, likelihood in zip(owners, self._score(windows)):
            totals[owner] += likelihood.total
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        """What the model writes after each context, up to the first stop sequence.

        Raises:
          ValueError: a task asks for an option that is not supported.
        """
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(repr(_arguments(request)[1]), []).append(number)
        found = [""] * len(requests)
        for numbers in kinds.values():
            texts = [requests[i].args[0] for i in numbers]
            for i, text in zip(numbers, self._write(texts, requests[numbers[0]])):
                found[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return found

    def _write(self, texts: Sequence[str], request: Instance) -> list[str]:
        """Continuations of texts under the options of one request."""
        normal: Any = normalize_gen_kwargs(_arguments(request)[1], LONGEST_ANSWER)
        options: dict[str, Any] = dict(normal)
        count, temperature = options.pop("max_gen_toks"), _temperature(options)
        end, decode = self.eot_token_id, self.tokenizer.decode
        ending = None if end is None else decode(end)
        stops = [s for s in handle_stop_sequences(options.pop("until"), ending) if s]
        _refuse(options)

        def done(tokens: Sequence[int]) -> bool:
            text = decode(tokens)
            return end in tokens or any(stop in text for stop in stops)

        rows = continue_until(
            self.f,
            self.params,
            [self.tok_encode(text) for text in texts],
            done,
            self.max_length,
            count,
            batch=self.batch_size,
            temperature=temperature,
            key=jax.random.key(self.seed),
            progress=self.progress,
        )
        kept = [row[: row.index(end)] if end in row else row for row in rows]
        plain = [decode(row, skip_special_tokens=True) for row in kept]
        return [postprocess_generated_text(text, stops, None) for text in plain]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model was trained to read it.

        Raises:
          ValueError: the tokenizer has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template to apply")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


def _arguments(request: Instance) -> Any:
    """What is asked: texts and, of writing, options."""
    return request.args


def _temperature(options: dict[str, Any]) -> float:
    """Takes the options of sampling out; 0 where a task asks for none."""
    sampled = options.pop("do_sample", False)
    temperature = float(options.pop("temperature", 1.0 if sampled else 0.0))
    if not sampled or temperature == 0:
        for name in OF_SAMPLING:
            options.pop(name, None)
        return 0.0
    return temperature


def _refuse(options: Mapping[str, Any]) -> None:
    if options:
        name, value = next(iter(options.items()))
        raise ValueError(
            f"generation_kwargs: {name} is {value!r}, but qjax supports until, "
            "max_gen_toks, do_sample and temperature"
        )
