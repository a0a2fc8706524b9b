"""Generate from a mixture of experts, through the interface of transformers.

The mixture gives a token the probability p(x) = sum_c w_c p_c(x), with weights from the text of all tokens so far
(equations 1 to 3 of c-BTM, Gururangan et al. 2023, arXiv 2303.14177), the very probabilities that the evaluation
measures. Routing is streaming: no text is read twice. Experts that are not among the nearest do not run; one that
comes back is first fed, in one pass, the tokens that it has missed, so the result is that of running all of them.

Each sequence of a batch goes through the experts by itself: sequences are at different places in different experts'
caches as soon as their routes part, and padding them to one another would cost the passes that routing saves. So a
batch is exact to what each of its prompts gives alone, and no faster.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from cbtm.branch.tokenizer import TextTokenizer
from cbtm.errors import ConfigError, DataError
from cbtm.merge.explain import Explanation
from cbtm.merge.mixture_cache import Fed, MixedSequence, MixtureCache
from cbtm.merge.router import PrefixRouter, routing_weights
from cbtm.merge.token_text import TokenText

Floats = NDArray[np.floating[Any]]


class MixtureForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """Experts and a router as one causal language model of transformers.

    `forward` gives log-probabilities of the mixture as logits, so greedy search and sampling, with all that
    transformers does to logits (temperature, top_p, top_k, penalties), act on the mixture. Beam search, assisted
    decoding and other modes are refused.

    An expert's probabilities are those of the evaluation: the softmax goes over all of its vocabulary. Rows beyond the
    tokenizer's, which are padding or the tokens of clusters, then have no logit, so that they are never generated; the
    probabilities of the others sum to 1 less what the experts gave to these rows.

    Experts may lie on different devices. It holds no state of a generation, and is not saved.

    Args:
        experts: Hugging Face causal language models; they are set to evaluation mode.
        router: Of the same run, its centres in the order of the experts.
        tokenizer: Of the same run, without tokens of clusters.
        temperature: Of the routing, as in `routing_weights`.
        distance_power: As in `routing_weights`.
        top_k: Experts that run at a token, the nearest; None runs all.
        refresh: Tokens that are generated from one estimate of the weights; "once" keeps those of the whole prompt.
            Tokens of a prompt have their own weights each.
        clusters: Cluster of each expert, for explanations; None counts from 0.
        prefix_tokens: Token in front of each expert's sequence, where the experts were trained with tokens of clusters.

    Raises:
        ConfigError: If experts, router, tokenizer and settings do not fit together.
    """

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(
        self,
        experts: Sequence[nn.Module],
        router: PrefixRouter,
        tokenizer: TextTokenizer,
        *,
        temperature: float = 0.1,
        distance_power: float = 2,
        top_k: int | None = None,
        refresh: int | Literal["once"] = 1,
        clusters: Sequence[int] | None = None,
        prefix_tokens: Sequence[int] | None = None,
    ) -> None:
        _check_experts(experts, router, tokenizer, clusters, prefix_tokens)
        if refresh != "once" and refresh < 1:
            raise ConfigError(f"refresh={refresh} is neither a number of tokens, at least 1, nor 'once'")
        weigh = partial(routing_weights, temperature=temperature, distance_power=distance_power, top_k=top_k)
        weigh(np.zeros((1, len(experts))))  # refuses settings that are out of range
        n_prefix = 0 if prefix_tokens is None else 1
        limits = [_positions(expert) for expert in experts]
        limit = min((positions - n_prefix for positions in limits if positions is not None), default=None)
        separator = tokenizer.separator_id
        shape: dict[str, Any] = {"vocab_size": tokenizer.vocab_size}
        super().__init__(PretrainedConfig(**shape | ({} if limit is None else {"max_position_embeddings": limit})))
        special = {"bos_token_id": separator, "eos_token_id": separator, "pad_token_id": separator}
        self.generation_config = GenerationConfig(**special)  # type: ignore[no-untyped-call]
        self.experts = nn.ModuleList(experts)
        self.clusters = list(range(len(experts)) if clusters is None else clusters)
        self._prefix_tokens = None if prefix_tokens is None else list(prefix_tokens)
        self._router, self._tokenizer, self._text = router, tokenizer, TokenText(tokenizer)
        self._weigh, self._refresh, self._limit = weigh, refresh, limit
        # Where an expert can, its head runs on the positions that are mixed alone.
        self._keeps_logits = ["logits_to_keep" in inspect.signature(expert.forward).parameters for expert in experts]
        self.train(mode=False)

    def encode(self, prompt: str) -> Tensor:
        """Tokens of a prompt, the separator first as in training; int64 (1, T)."""
        return torch.from_numpy(self._tokenizer.encode_batch([prompt])[0])[None].to(self.device)

    def encode_batch(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Arguments of `generate` for prompts, padded on the left: input_ids and attention_mask, int64 (B, T)."""
        rows = self._tokenizer.encode_batch(prompts)
        shape = (len(rows), max(map(len, rows)))
        tokens, mask = torch.full(shape, self._tokenizer.separator_id), torch.zeros(shape, dtype=torch.int64)
        for number, row in enumerate(rows):
            tokens[number, -len(row) :] = torch.from_numpy(row)
            mask[number, -len(row) :] = 1
        return {"input_ids": tokens.to(self.device), "attention_mask": mask.to(self.device)}

    def text_stream(self) -> Callable[[int], str]:
        """A function that takes tokens one by one and returns what text each completes, as `TokenText.stream`."""
        return self._text.stream()

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MixtureCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Log-probabilities of each next token under the mixture; no gradients.

        Args:
            input_ids: Tokens that follow those in the cache, int64 (B, T). Without a cache every token has its own
                weights, as in the evaluation, whatever `refresh` is.
            attention_mask: 0 where a sequence is padded on its left, (B, T), or (B, T + cached).
            past_key_values: What was read before, of the same sequences. It changes.
            use_cache: Whether to make a cache where there is none; None does.
            logits_to_keep: Only the last positions are computed, so many; 0 is all.
            return_dict: False returns a tuple.

        Returns:
            `logits`, float32 (B, T or logits_to_keep, V) with V the tokenizer's size, and `past_key_values`. A position
            that is padding has zeros.

        Raises:
            ConfigError: If a sequence becomes longer than the experts have positions.
            DataError: If tokens, mask and cache do not fit, or an expert gives NaN.
        """
        if past_key_values is None:
            cache = MixtureCache()
        else:
            cache, use_cache = past_key_values, True
        keeps_cache = use_cache is not False
        new_tokens = self._new_tokens(input_ids, attention_mask, cache)
        n_kept = min(logits_to_keep or input_ids.shape[1], input_ids.shape[1])
        logits = torch.zeros((len(new_tokens), n_kept, self.config.vocab_size), device=self.device)
        for row, sequence, tokens in zip(logits, cache.sequences, new_tokens, strict=True):
            weights = self._read(sequence, tokens, min(n_kept, len(tokens)))
            mixed = row[-len(weights) :].fill_(-torch.inf)  # (kept, V)
            for number, places, log_probs in self._run_experts(sequence, weights, keeps_cache=keeps_cache):
                shares = torch.from_numpy(np.log(weights[places, number])).float()[:, None]
                index = torch.from_numpy(places).to(mixed.device)
                mixed[index] = torch.logaddexp(mixed[index], (log_probs + shares.to(log_probs)).to(mixed.device))
            mixed.clamp_(max=0.0)  # a sum may round to above
        cache.n_columns += input_ids.shape[1]
        past: Any = cache if keeps_cache else None
        output = CausalLMOutputWithPast(logits=logits, past_key_values=past)
        return output if return_dict is not False else output.to_tuple()

    @torch.no_grad()
    def explain(self, prompt_tokens: Sequence[int], generated_tokens: Sequence[int]) -> list[Explanation]:
        """Say for each generated token which experts carried it.

        One pass of each expert over the text, so it is exact for any text, by whomever it was written, and cheaper than
        generating it.

        Args:
            prompt_tokens: The prompt, from `encode`, its separator included; (n,).
            generated_tokens: What follows; (m,).

        Raises:
            ConfigError: If there are more tokens than the experts have positions.
            DataError: If the prompt is empty, a token is not the tokenizer's, or an expert gives NaN.
        """
        prompt, generated = [int(token) for token in prompt_tokens], [int(token) for token in generated_tokens]
        if not prompt:
            raise DataError("the prompt has no token; begin with the separator, as `encode` does")
        if not generated:
            return []
        sequence = self._start()
        sequence.first = len(prompt)
        self._check_tokens([*prompt, *generated])
        self._check_length(len(prompt) + len(generated) - 1)
        weights = self._read(sequence, [*prompt, *generated[:-1]], len(generated))  # (m, k)
        targets = torch.tensor(generated)
        carried = np.full(weights.shape, -np.inf)  # log(w_c p_c(x))
        for number, places, log_probs in self._run_experts(sequence, weights, keeps_cache=False):
            found = log_probs.gather(1, targets[places, None].to(log_probs.device))[:, 0]
            carried[places, number] = found.double().cpu().numpy() + np.log(weights[places, number])
        total = np.logaddexp.reduce(carried, axis=1)  # (m,)
        possible = np.isfinite(total)[:, None]
        shares = np.where(possible, np.exp(carried - np.where(possible, total[:, None], 0)), weights)
        read = self.text_stream()
        for token in prompt:
            read(token)
        return [
            Explanation(
                token, read(token), float(log_prob), self._of_clusters(prior, prior), self._of_clusters(post, prior)
            )
            for token, log_prob, prior, post in zip(generated, total, weights, shares, strict=True)
        ]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the weights would be saved without the router."""
        raise ConfigError("a mixture is not saved; its experts and its router are in the run it was opened from")

    def _of_clusters(self, values: Floats, weights: Floats) -> dict[int, float]:
        """Values of the experts that ran."""
        ran = zip(self.clusters, values, weights, strict=True)
        return {cluster: float(value) for cluster, value, weight in ran if weight > 0}

    def _start(self) -> MixedSequence:
        return MixedSequence(self.text_stream(), self._router.stream(), [Fed() for _ in self.experts])

    def _new_tokens(self, input_ids: Tensor, mask: Tensor | None, cache: MixtureCache) -> list[list[int]]:
        """New tokens of each sequence without its padding; a cache that is new gets its sequences."""
        rows = input_ids.tolist()
        if mask is not None:
            if mask.ndim != 2 or len(mask) != len(rows) or mask.shape[1] < input_ids.shape[1]:
                raise DataError(
                    f"attention_mask of shape {tuple(mask.shape)} for input_ids of {tuple(input_ids.shape)}"
                )
            real = mask.bool()
            if (real[:, :-1] & ~real[:, 1:]).any():
                raise DataError("attention_mask has a 0 behind a 1: pad prompts on their left, as `encode_batch` does")
            kept = real[:, mask.shape[1] - input_ids.shape[1] :].tolist()
            rows = [
                [token for token, is_real in zip(*pair, strict=True) if is_real]
                for pair in zip(rows, kept, strict=True)
            ]
        if not cache.sequences:
            cache.sequences = [self._start() for _ in rows]
        if len(cache.sequences) != len(rows):
            raise DataError(f"{len(rows)} sequences with a cache of {len(cache.sequences)}; use the same ones in order")
        for number, (row, sequence) in enumerate(zip(rows, cache.sequences, strict=True)):
            if not row:
                raise DataError(f"sequence {number} has no token; begin with the separator, as `encode` does")
            self._check_tokens(row)
            self._check_length(len(sequence.tokens) + len(row))
        return rows

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if not 0 <= min(tokens) <= max(tokens) < self.config.vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < self.config.vocab_size)
            raise DataError(f"token {wrong} is none of the tokenizer's {self.config.vocab_size}; use `encode`")

    def _check_length(self, n_tokens: int) -> None:
        if self._limit is not None and n_tokens > self._limit:
            raise ConfigError(
                f"{n_tokens} tokens to read, prompt and separator included, but the experts have {self._limit} "
                "positions for text; shorten the prompt or generate fewer tokens"
            )

    def _read(self, sequence: MixedSequence, tokens: Sequence[int], n_kept: int) -> NDArray[np.float64]:
        """Read tokens as text, and give the weights of what follows each of the last ones; (n_kept, k)."""
        return self._weigh(sequence.read(tokens, n_kept, self._refresh))

    def _run_experts(
        self, sequence: MixedSequence, weights: NDArray[np.float64], *, keeps_cache: bool
    ) -> Iterator[tuple[int, NDArray[np.int64], Tensor]]:
        """Run the experts that have any weight at the last tokens of a sequence.

        Yields:
            Number of the expert, the rows of `weights` (n_kept, k) in which it has weight, shape (n,), and its
            log-probabilities there, float32 (n, V).
        """
        for number in range(len(self.experts)):
            places = np.flatnonzero(weights[:, number])
            if len(places):
                end = len(sequence.tokens) - len(weights) + int(places[-1]) + 1
                n_outputs = int(places[-1] - places[0]) + 1
                logits = self._feed(number, sequence, end, n_outputs, keeps_cache=keeps_cache)
                rows = torch.from_numpy(places - places[0]).to(logits.device)
                log_probs = logits[rows].float().log_softmax(dim=-1)[:, : self.config.vocab_size]
                if log_probs.isnan().any():
                    raise DataError(f"the expert of cluster {self.clusters[number]} gives NaN: its weights are broken")
                yield number, places, log_probs

    def _feed(self, number: int, sequence: MixedSequence, end: int, n_outputs: int, *, keeps_cache: bool) -> Tensor:
        """Feed an expert what it has not read of a sequence before token `end`; its last logits (n_outputs, rows)."""
        expert, fed = self.experts[number], sequence.fed[number]
        tokens = sequence.tokens[fed.n_tokens : end]
        if fed.n_tokens == 0 and self._prefix_tokens is not None:
            tokens = [self._prefix_tokens[number], *tokens]
        device = next(expert.parameters()).device
        output = expert(
            input_ids=torch.tensor([tokens], device=device),
            past_key_values=fed.past,
            use_cache=keeps_cache,
            **({"logits_to_keep": n_outputs} if self._keeps_logits[number] else {}),
        )
        if keeps_cache:
            past = getattr(output, "past_key_values", None)
            if past is None:
                raise ConfigError(
                    f"the expert of cluster {self.clusters[number]}, a {type(expert).__name__}, gives no "
                    "past_key_values; generate with use_cache=False"
                )
            fed.n_tokens, fed.past = end, past
        return cast(Tensor, output.logits[0, -n_outputs:])

    def _validate_generation_mode(self, generation_mode: GenerationMode, *args: Any, **kwargs: Any) -> None:
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ConfigError(
                f"a mixture generates by greedy search or by sampling, not by {generation_mode.value}; leave out "
                "num_beams, assistant_model and what else asks for it"
            )
        base: Any = super()
        base._validate_generation_mode(generation_mode, *args, **kwargs)

    def _prepare_attention_mask_for_generation(  # type: ignore[override]
        self, inputs_tensor: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        # Where no mask is given, transformers would take the separator that a text begins with for padding.
        return torch.ones(inputs_tensor.shape[:2], dtype=torch.int64, device=inputs_tensor.device)

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, *args: Any, **kwargs: Any
    ) -> None:
        # The last token is not read. Before transformers' own check, which would name a setting that nobody made.
        self._check_length(max(input_ids_length, generation_config.max_length - 1))
        base: Any = super()
        base._validate_generated_length(generation_config, input_ids_length, *args, **kwargs)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give a generation its cache; transformers calls it once before the first token."""
        for name in ("cache_implementation", "prefill_chunk_size"):
            if (value := getattr(generation_config, name, None)) is not None:
                raise ConfigError(f"{name}={value}: each expert of a mixture has its own cache; leave it out")
        cache = model_kwargs.get("past_key_values")
        if cache is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = MixtureCache()
        elif cache is None and self._refresh != 1:
            raise ConfigError(f"use_cache=False with refresh={self._refresh}: only a cache knows where the prompt ends")
        elif isinstance(cache, MixtureCache):
            cache.start_prompt()
        elif cache is not None:
            raise ConfigError(f"past_key_values is a {type(cache).__name__}; pass a MixtureCache, or none")


def _check_experts(
    experts: Sequence[nn.Module],
    router: PrefixRouter,
    tokenizer: TextTokenizer,
    clusters: Sequence[int] | None,
    prefix_tokens: Sequence[int] | None,
) -> None:
    if not experts:
        raise ConfigError("no expert to mix; give at least one")
    n_centers = len(router.stream().distances())
    if n_centers != len(experts):
        raise ConfigError(f"{len(experts)} experts but a router of {n_centers} clusters; use PrefixRouter.subset")
    for name, values in (("clusters", clusters), ("prefix_tokens", prefix_tokens)):
        if values is not None and len(values) != len(experts):
            raise ConfigError(f"{len(values)} {name} for {len(experts)} experts; give one for each")
    for number, expert in enumerate(experts):
        n_rows = int(cast(Any, expert).get_input_embeddings().weight.shape[0])
        if n_rows < tokenizer.vocab_size:
            raise ConfigError(
                f"expert {number} has a vocabulary of {n_rows}, the tokenizer one of {tokenizer.vocab_size}: they do "
                "not belong together"
            )
        if prefix_tokens is not None and not tokenizer.vocab_size <= prefix_tokens[number] < n_rows:
            raise ConfigError(
                f"prefix token {prefix_tokens[number]} of expert {number} is not in [{tokenizer.vocab_size}, "
                f"{n_rows}), behind the tokenizer's own; use the run's tokenizer without tokens of clusters"
            )


def _positions(expert: nn.Module) -> int | None:
    """Most tokens that a model can be fed; None where its configuration names no limit."""
    settings = cast(Any, expert).config.get_text_config(decoder=True)
    positions: int | None = getattr(settings, "max_position_embeddings", None)
    return positions
