"""The questions of a preference game: prompts, and the listed answers that the oracle ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from poise.data.text.examples import (
    Question,
    answer_after,
    encode_completion,
    encode_prompt,
)
from poise.data.text.questions import load_questions
from poise.errors import UserError
from poise.inference.sampler import Sample
from poise.kinds.align_selfplay.spec import AlignSelfplaySpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["GameQuestion", "load_game_questions", "response_text"]


@dataclass(frozen=True)
class GameQuestion:
    """A question and its listed answers, as text and as tokens (EOS included).

    Attributes:
        tokens: of the prompt.
        proposals: responses of the initial policy to this question, for a method that plays against them.
    """

    prompt: str
    tokens: tuple[int, ...]
    answers: tuple[str, ...]
    answer_tokens: tuple[tuple[int, ...], ...]
    proposals: tuple[str, ...] = ()


def load_game_questions(spec: AlignSelfplaySpec, tokenizer: Tokenizer) -> list[GameQuestion]:
    """The questions with the answers that the oracle ranks: the first n of each, in a world the n most probable.

    Raises:
        UserError: fewer questions than one iteration needs; a question with too few answers, with an answer longer
            than `max_tokens`, or with one that the tokenizer does not reproduce.
    """
    questions = load_questions(spec.questions, spec.seed)
    if len(questions) < spec.prompts:
        raise UserError(f"prompts: {spec.prompts} per iteration are more than the {len(questions)} questions")
    return [_game_question(spec, question, tokenizer) for question in questions]


def _game_question(spec: AlignSelfplaySpec, question: Question, tokenizer: Tokenizer) -> GameQuestion:
    number = len(spec.oracle.rows)
    answers = tuple(dict.fromkeys(question.distribution or question.answers))[:number]
    if len(answers) < number:
        raise UserError(f"question {question.id!r} has {len(answers)} answers and the oracle ranks {number}")
    answer_tokens = tuple(
        encode_completion(tokenizer, answer_after(question.prompt, answer), question.prompt) for answer in answers
    )
    for answer, tokens in zip(answers, answer_tokens, strict=True):
        decoded = str(tokenizer.decode(list(tokens[:-1]))).strip()  # as `response_text` reads a response
        if decoded != answer:
            raise UserError(
                f"question {question.id!r}: the tokenizer of this model writes the answer {answer!r} as {decoded!r}, "
                "so that no response is ever that answer; list it as the model writes it"
            )
    longest = max(map(len, answer_tokens))
    if longest > spec.max_tokens:
        raise UserError(f"max_tokens: question {question.id!r} has an answer of {longest} tokens, EOS included")
    return GameQuestion(question.prompt, encode_prompt(tokenizer, question.prompt), answers, answer_tokens)


def response_text(tokenizer: Tokenizer, sample: Sample) -> str:
    """The text of a response, as the oracle compares it with the listed answers.

    Special tokens are kept and a truncated response is marked, so that neither equals a listed answer.
    """
    if sample.finish == "stop":
        return str(tokenizer.decode(list(sample.tokens[:-1]))).strip()
    return f"{tokenizer.decode(list(sample.tokens))} [cut]"
