"""lm-evaluation-harness evaluates our checkpoints in this process, its own tasks and metrics untouched.

    model = lm_eval.adapter(engine, scorer, tokenizer, add_bos=True, seed=0)
    lm_eval.evaluate(model, tasks=["hellaswag"], limit=100)

Contexts are encoded as the harness's own models encode them: what spells a control token is one, because that is how it passes
rendered chats. Everywhere else in this project content is never control.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from swallow_jax.generate import backends

_DEFAULT_NEW_TOKENS = 256  # the harness's own, for tasks that name no limit


def evaluate(model: Any, *, tasks: Sequence[Any], include: str | None = None, **settings: Any) -> dict[str, Any]:
    """`lm_eval.simple_evaluate` on an adapter: names of the harness's tasks, or of YAML files in the folder `include`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include) if include else None
    return lm_eval.simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, **settings)


def adapter(
    engine: Any, scorer: Any, tokenizer: Any, *, add_bos: bool, seed: int, max_new_tokens: int = _DEFAULT_NEW_TOKENS
) -> Any:
    """The harness's model over `generate.engine.Engine` and `generate.scorer.Scorer`.

    Args:
      add_bos: whether contexts begin with BOS; to compare with transformers, what its tokenizer does (yes for Llama 2 and 3, no
        for SmolLM2).
      seed: of tasks that sample; each request's is drawn from it and the request.
      max_new_tokens: where a task names no limit.
    Contexts that are too long lose their beginning, as with the harness's own models.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm

    from swallow_jax.generate.engine import Job
    from swallow_jax.generate.scorer import Question

    spelled = {tokenizer.decode([i], skip_special=False): i for i in tokenizer.special_ids}
    longest_first = sorted(spelled, key=len, reverse=True)
    control = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if spelled else re.compile("((?!))")

    class Adapter(TemplateLM):
        max_length = scorer.max_length

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer  # the base class asks it for the chat template

        eot_token_id = property(lambda self: tokenizer.eos_ids[0])
        prefix_token_id = property(lambda self: self.eot_token_id if tokenizer.bos_id is None else tokenizer.bos_id)
        tokenizer_name = property(lambda self: f"{tokenizer.sha256} {_digest(str(tokenizer.chat_template))}")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            parts = control.split(string)  # every second one is a control token
            ids = [i for n, part in enumerate(parts) if part for i in ([spelled[part]] if n % 2 else tokenizer.encode(part))]
            bos = tokenizer.bos_id if add_bos and add_special_tokens is not False else None
            return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            given = "" if add_generation_prompt else chat_history[-1]["content"]  # the beginning of an answer, to be gone on with
            history = chat_history if add_generation_prompt else chat_history[:-1]
            ids = tokenizer.render_chat(history, add_generation_prompt=True)
            return tokenizer.decode(ids, skip_special=False) + given

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            windows, owners = [], []
            for number, (string,) in enumerate(request.args for request in requests):
                ids = self.tok_encode(string)
                # A window's last token is only predicted, so that it may be one longer than the model's context.
                rolling = get_rolling_token_windows(
                    token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1
                )
                for context, predicted in map(make_disjoint_window, rolling):
                    windows.append((None, context, predicted))
                    owners.append(number)
            sums = [0.0] * len(requests)
            for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True):
                sums[owner] += logprob
            for request, value in zip(requests, sums, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
            return sums

        def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
            """Continuations of one context are one question, so that the context is computed once. Not where they are the longer
            part: those of one question are padded to the longest, and behind BOS alone stand a whole corpus's texts."""
            places: dict[tuple[tuple[int, ...], int | None], list[int]] = {}
            for number, (_, context, continuation) in enumerate(requests):
                if not continuation or len(continuation) >= self.max_length:
                    raise ValueError(
                        f"a continuation of {len(continuation)} tokens; 1 to {self.max_length - 1} are wanted (raise max_length)"
                    )
                kept = context[max(0, len(context) + len(continuation) - self.max_length) :]
                alone = number if len(continuation) > len(kept) else None
                places.setdefault((tuple(kept), alone), []).append(number)
            # Longest first: what does not fit in memory is told at once, and the estimate of the time left is never too low.
            groups = sorted(places, key=lambda group: -len(group[0]))
            questions = (
                Question(name=group, context_ids=group[0], continuations=[requests[n][2] for n in places[group]])
                for group in groups
            )
            found: list[Any] = [None] * len(requests)
            with tqdm(total=len(requests), desc="scoring", disable=disable_tqdm) as bar:
                for answer in scorer.score(questions):
                    for number, *pair in zip(places[answer.name], answer.logprobs, answer.greedy, strict=True):
                        found[number] = tuple(pair)
                        if (asked := requests[number][0]) is not None:
                            self.cache_hook.add_partial("loglikelihood", asked, found[number])
                        bar.update()
            return found

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            texts: dict[int, backends.StopText] = {}
            occurrences: dict[str, int] = {}

            def jobs():
                for number, request in enumerate(requests):
                    context, settings = request.args
                    settings = normalize_gen_kwargs(settings, max_new_tokens)
                    until, limit = settings.pop("until"), settings.pop("max_gen_toks")
                    sampled, temperature = settings.pop("do_sample"), settings.pop("temperature")
                    top_k, top_p = settings.pop("top_k", 0), settings.pop("top_p", 1.0)
                    if settings:
                        raise ValueError(
                            f"the task sets {sorted(settings)}, which this model cannot do; remove them from the task"
                        )
                    ids = self.tok_encode(context)
                    room = engine.max_length - limit
                    if room < 1:
                        raise ValueError(f"max_gen_toks={limit} leaves no room in max_length={engine.max_length}; raise that")
                    texts[number] = backends.StopText(tokenizer.decode, [until] if isinstance(until, str) else until)
                    # Repeats of one request are drawn with seeds of their own.
                    asked = json.dumps(request.args, sort_keys=True, default=str)
                    repeat = occurrences[asked] = occurrences.get(asked, -1) + 1
                    yield Job(
                        name=number, prompt_ids=ids[-room:], max_new_tokens=limit, top_k=top_k, top_p=top_p,
                        temperature=float(temperature) if sampled else 0.0, until=texts[number].push,
                        seed=int(_digest(f"{seed} {repeat} {asked}")[:8], 16),
                    )  # fmt: skip

            found = [""] * len(requests)
            with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as bar:
                for output in engine.generate(jobs()):
                    found[output.name] = texts.pop(output.name).text
                    self.cache_hook.add_partial("generate_until", requests[output.name].args, found[output.name])
                    bar.update()
            return found

    return Adapter()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
