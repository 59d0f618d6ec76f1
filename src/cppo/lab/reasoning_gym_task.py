"""Problems of reasoning-gym: generated without end, scored by their own data set, no download."""

from __future__ import annotations

import dataclasses
import difflib
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

from cppo.lab.problems import Problem, Split, check_request, split_of
from cppo.lab.verifiers import first_line, reasoning_gym_score, require

# Item i of a data set with seed s is that of seed s + i: the few-shot examples have the seeds below this bound.
FEW_SHOT_SEEDS = 1 << 20
SEED_BOUND = 1 << 31
# One split may be empty where there are few questions; this many draws without a hit end the search.
MAX_DRAWS = 10_000


class ReasoningGym:
    r"""Questions of one reasoning-gym data set in a plain few-shot prompt.

    Prompt: "Question: ...\nAnswer: ...\n\n" for each example, then the question and "Answer:". The answer of a
    response is its first line, stripped. A hash of the question decides its split, and the examples are taken out of
    both, so nothing is shared whatever the seeds; a small question space repeats prompts within a split.

    Args:
        dataset_name: name in reasoning-gym, such as "chain_sum".
        few_shot: examples in the prompt, >= 0.
        dataset_options: the data set's own options, such as ``{"min_terms": 2}``; JSON-able, without seed and size.
        max_completion_tokens: tokens that a response may take, >= 1.

    Raises:
        ModuleNotFoundError: without reasoning-gym.
        ValueError: for an unknown data set or option, an option's value that the data set refuses, or a data set
            whose answers are not one line of text.
    """

    def __init__(
        self,
        dataset_name: str,
        few_shot: int = 4,
        dataset_options: Mapping[str, Any] | None = None,
        max_completion_tokens: int = 32,
    ) -> None:
        for name, value, low in (("few_shot", few_shot, 0), ("max_completion_tokens", max_completion_tokens, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"ReasoningGym({name}={value!r}): expected an integer >= {low}")
        self.dataset_name = dataset_name
        self.few_shot = few_shot
        self.dataset_options = dict(dataset_options or {})
        self._max_completion_tokens = max_completion_tokens
        _check_dataset(dataset_name, self.dataset_options)
        examples = self._examples()
        self._example_questions = frozenset(entry["question"] for entry in examples)
        self._preamble = "".join(f"Question: {entry['question']}\nAnswer: {entry['answer']}\n\n" for entry in examples)

    @property
    def name(self) -> str:
        """``reasoning_gym:NAME``, with the options that differ from the defaults."""
        options = {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in self.dataset_options.items()
        }
        if self.few_shot != 4:
            options["few_shot"] = str(self.few_shot)
        if self.max_completion_tokens != 32:
            options["max_completion_tokens"] = str(self.max_completion_tokens)
        return f"reasoning_gym:{self.dataset_name}" + (f"?{urlencode(options)}" if options else "")

    @property
    def max_completion_tokens(self) -> int:
        """Tokens that a response may take."""
        return self._max_completion_tokens

    @property
    def alphabet(self) -> None:
        """None: questions are text, for a real tokenizer."""
        return None

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """``count`` problems of the split.

        Args:
            split: "train" or "test" (one question in four).
            count: how many, >= 0.
            seed: the same seed gives the same problems.

        Raises:
            ValueError: for an unknown split, or where so few questions exist that the split is empty.
        """
        check_request(split, count)
        rng = random.Random(f"{self.name}/{split}/{seed}")
        found: list[Problem] = []
        misses = 0
        while len(found) < count:
            draws = 4 * (count - len(found)) + 16
            for entry in self._entries(rng.randrange(FEW_SHOT_SEEDS, SEED_BOUND), draws):
                question = entry["question"]
                if question in self._example_questions or split_of(question) != split:
                    misses += 1
                    continue
                found.append(self._problem(entry))
                misses = 0
                if len(found) == count:
                    break
            if misses >= MAX_DRAWS:
                raise ValueError(
                    f"{self.name}: found no {split} question in {misses} draws; expected options for more of them"
                )
        return found

    def score(self, problem: Problem, completion: str, ended: bool) -> float:
        """The data set's own score of the completion's first line, in [0, 1]; ``ended`` does not matter."""
        return reasoning_gym_score(self.dataset_name, self.dataset_options, problem.entry, first_line(completion))

    def _problem(self, entry: dict[str, Any]) -> Problem:
        prompt = f"{self._preamble}Question: {entry['question']}\nAnswer:"
        return Problem(prompt=prompt, answer=entry["answer"], entry=entry)

    def _entries(self, seed: int, size: int) -> Iterator[dict[str, Any]]:
        import reasoning_gym

        dataset = reasoning_gym.create_dataset(self.dataset_name, seed=seed, size=size, **self.dataset_options)
        for index in range(size):
            yield dataset[index]

    def _examples(self) -> list[dict[str, Any]]:
        """Distinct questions for the prompt; also looks at one answer where there are none, to refuse early."""
        examples: dict[str, dict[str, Any]] = {}
        for entry in self._entries(0, max(1, 100 * self.few_shot)):
            answer = entry["answer"]
            if not isinstance(answer, str) or "\n" in answer:
                raise ValueError(
                    f"dataset_name={self.dataset_name!r}: it has the answer {answer!r}; expected a data set whose "
                    "answers are one line of text"
                )
            if len(examples) == self.few_shot:
                return list(examples.values())
            examples.setdefault(entry["question"], entry)
        if len(examples) < self.few_shot:
            raise ValueError(
                f"few_shot={self.few_shot}: {self.dataset_name} with {self.dataset_options} has only {len(examples)} "
                "different questions; expected fewer examples"
            )
        return list(examples.values())


def _check_dataset(name: str, options: dict[str, Any]) -> None:
    require("reasoning_gym", "reasoning-gym")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"expected one of {', '.join(sorted(DATASETS))}"
        raise ValueError(f"dataset_name={name!r}: reasoning-gym has no such data set; {hint}")
    known = [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"{option}={value!r}: {name} has no such option; expected one of {', '.join(known)}")
    try:
        reasoning_gym.create_dataset(name, seed=0, size=1, **options)[0]
    except Exception as error:  # data sets check their options with assert, or not at all
        raise ValueError(f"dataset_options={options!r}: {name} refuses them: {error!r}") from error
