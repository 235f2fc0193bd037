"""Questions about passages, in the JSON of SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018)."""

from collections.abc import Iterator
from typing import Annotated, NamedTuple

from pydantic import BaseModel, Field, Strict, ValidationError

from txl_dist.data.preparing.corpora import SourceFile, SurveyedFile
from txl_dist.data.preparing.example_files import LINE_BREAKS, problem_of_text
from txl_dist.data.preparing.text_files import opened
from txl_dist.errors import UserError
from txl_dist.files.parsing import describe, shown


class Answer(BaseModel):
    """An answer in SQuAD's JSON. answer_start: in characters of the passage."""

    text: str
    answer_start: Annotated[int, Strict(), Field(ge=0)]


class QuestionEntry(BaseModel):
    """A question in SQuAD's JSON. is_impossible: whether the passage has no answer; 1.1 does not know it."""

    id: str
    question: str
    answers: list[Answer] = []
    is_impossible: bool | None = None


class ParagraphEntry(BaseModel):
    """A passage with its questions in SQuAD's JSON."""

    context: str
    qas: list[QuestionEntry]


class Article(BaseModel):
    """Passages from one article of Wikipedia in SQuAD's JSON."""

    title: str = ""
    paragraphs: list[ParagraphEntry]


class SquadFile(BaseModel):
    """A file of SQuAD."""

    data: list[Article]


class Passage(NamedTuple):
    """A passage with at least one question; line breaks in its texts are spaces, so that positions stay.

    Attributes:
        split: None as long as it is not decided.
        number: of the passage in its file, from 0.
        article: the number of the article in its file, from 0.
    """

    source: SourceFile
    split: str | None
    number: int
    article: int
    title: str
    context: str
    questions: list[QuestionEntry]

    def place(self, question: QuestionEntry) -> str:
        """Name a question for a message."""
        return f"{place(self.source, self.title)}, question {question.id!r:.80}"

    @property
    def data(self) -> bytes:
        """Return the texts as lines."""
        return "\n".join([self.context, *(question.question for question in self.questions)]).encode()


def place(source: SourceFile, title: str) -> str:
    """Name an article for a message."""
    return f"{source.path}: article {title!r:.80}"


def read_passages(file: SurveyedFile, problems: list[str]) -> Iterator[Passage]:
    """Yield the passages of a file that have questions; what is wrong with them is appended to `problems`.

    Raises:
        UserError: if the file cannot be read, or is not SQuAD's JSON.
    """
    with opened(file.source.path) as stream:
        stream.read(file.start)
        content = stream.read()
    try:
        articles = SquadFile.model_validate_json(content).data
    except ValidationError as error:
        raise UserError(f"{file.source.path}: is not the JSON of SQuAD ({describe(error)}); give another") from error
    number = 0
    for article_number, article in enumerate(articles):
        for paragraph in article.paragraphs:
            context = paragraph.context.translate(LINE_BREAKS)
            questions = [on_one_line(question) for question in paragraph.qas]
            if questions:
                source = file.source
                passage = Passage(source, source.split, number, article_number, article.title, context, questions)
                problems += problems_of(passage)
                yield passage
                number += 1


def on_one_line(question: QuestionEntry) -> QuestionEntry:
    """Return a question with spaces for line breaks."""
    answers = [answer.model_copy(update={"text": answer.text.translate(LINE_BREAKS)}) for answer in question.answers]
    return question.model_copy(update={"question": question.question.translate(LINE_BREAKS), "answers": answers})


def problems_of(passage: Passage) -> Iterator[str]:
    """Describe what is wrong with a passage and its questions."""
    problem = problem_of_text(passage.context)
    if problem:
        yield f"{place(passage.source, passage.title)}: a passage {problem}"
    for question in passage.questions:
        where = passage.place(question)
        problem = problem_of_text(question.question)
        if problem:
            yield f"{where}: {problem}"
        if question.is_impossible and question.answers:
            yield f"{where}: is_impossible is true, but it has answers; mend one of them"
        if question.is_impossible is False and not question.answers:
            yield f"{where}: has no answer, but is_impossible is false; mend one of them"
        for answer in question.answers:
            problem = problem_of_answer(passage.context, answer)
            if problem:
                yield f"{where}: the answer {shown(answer.text)} {problem}"


def problem_of_answer(context: str, answer: Answer) -> str | None:
    """Describe why an answer is not at its place in its passage; None if it is."""
    if not answer.text.strip():
        return "is an empty text; mend it, or leave it out"
    if context.startswith(answer.text, answer.answer_start):
        return None
    problem = f"is not at character {answer.answer_start:,} of its passage"
    count = context.count(answer.text)
    if count == 0:
        return f"{problem}, nor elsewhere in it; mend it"
    where = f"but at character {context.index(answer.text):,}" if count == 1 else f"but elsewhere {count:,} times"
    return f"{problem}, {where}; correct its answer_start"
