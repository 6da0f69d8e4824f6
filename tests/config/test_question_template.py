"""Questions as text: what a template sees, what is refused, and that none takes the program with it."""

from __future__ import annotations

import multiprocessing
import resource
import threading
import time
from typing import Any

import pytest
from harness.complaints import refused
from harness.marks import slow
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.config.loading import parse_config
from adept_ds.config.question_template import DEFAULT_TEMPLATE, render_question
from adept_ds.config.template_process import MEMORY_MIB, OUTPUT_CHARACTERS

BASE = {"model": "m", "run_dir": "r"}
QUESTION = {"question": "2 + 2?", "choices": ["3", 4.5, "4"], "answer": "C"}
SAME = "Question: {{ question }}\n{% for c in choices %}{{ letters[loop.index0] }}. {{ c }}\n{% endfor %}"
SAME += "Answer: {{ answer_letter }}. {{ answer }}"


def _configured(template: str) -> None:
    parse_config(BASE | {"data": {"question_template": template}})


@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, SAME], ids=["rendered here", "rendered in a process"])
def test_a_question_is_a_text(template: str) -> None:
    assert render_question(QUESTION, template) == "Question: 2 + 2?\nA. 3\nB. 4.5\nC. 4\nAnswer: C. 4"
    assert render_question(QUESTION | {"answer": 0}, template).endswith("Answer: A. 3")


def test_a_template_sees_question_choices_letters_and_the_right_answer() -> None:
    template = "{{ question }}|{{ choices[1] + 1 }}|{{ letters | join(',') }}|{{ answer }}|{{ answer_letter }}\n"
    assert render_question(QUESTION, template) == "2 + 2?|5.5|A,B,C|4|C\n"


@pytest.mark.parametrize("question", ["é\U0001f600", "\ud83d", "a\u2028b\nc", 5, None, {"stem": ["x"]}, 1.5e300])
def test_a_text_or_value_comes_through_as_it_is(question: Any) -> None:
    assert render_question(QUESTION | {"question": question}, "{{ question }}") == str(question)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"choices": "ABC"}, "'choices' is not a list"),
        ({"answer": 3}, "answer 3 is none of the 3 choices"),
        ({"answer": -1}, "answer -1 is none"),
        ({"answer": "D"}, "answer 'D' is none"),
        ({"answer": True}, "answer True is none"),
        ({"answer": 1.0}, "answer 1.0 is none"),
        ({"choices": ["x"] * 27}, "27 choices are more than there are letters"),
    ],
    ids=str,
)
def test_a_record_that_is_no_question_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        render_question(QUESTION | changes, DEFAULT_TEMPLATE)


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{ question", "does not parse"),
        ("{{ question | shuot }}", "shuot"),
        ("{{ questoin }}", "'questoin'; variables are question, choices"),
        ("{question}", "every question the same"),
        ("{{ question | random }}", "random"),
        ("{{ question }}{{ lipsum() }}", "lipsum"),
    ],
)
def test_a_template_with_a_mistake_is_refused_with_the_configuration(template: str, word: str) -> None:
    with pytest.raises(InputError) as caught:
        _configured(template)
    assert str(caught.value).startswith("config: data.question_template: ")
    assert word in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ choices[7] }}",
        "{{ choices.append(1) }}",
        "{{ question.__class__ }}",
        "{{ question.__class__.__base__.__subclasses__() }}",
        "{{ question | attr('__class__') }}",
        "{{ question['__class__'] }}",
        "{{ '{0.__class__}'.format(question) }}",
        "{{ ('{0.__class__}' | format(question)) ~ question.format_map.__self__ }}",
        "{{ question }}{{ cycler.__init__.__globals__.os }}",
        "{{ question }}{% include '/etc/passwd' %}",
        "{{ question }}{% import 'os' as os %}",
    ],
)
def test_a_template_that_fails_on_a_record_says_so_and_reaches_nothing_else(template: str) -> None:
    _configured(template)
    with pytest.raises(ValueError, match=r"^data\.question_template fails on it: "):
        render_question(QUESTION, template)


# --- templates that explode ----------------------------------------------------------------------------------------

MEMORY, TIME = f"more than {MEMORY_MIB} MiB of memory", "more than 1 s"
DEPTH, SIZE, OUTPUT = "too deeply", "too large", f"more than {OUTPUT_CHARACTERS} characters"
_LOOPS = "{% for a in choices %}" * 15 + "{% endfor %}" * 15

EXPLOSIVE = {
    '{{ "x" * 1500000000 }}': MEMORY,
    "{{ question * 1500000000 }}": MEMORY,
    "{{ [question] * 1500000000 }}": MEMORY,
    "{{ question | center(10 ** 9) }}": MEMORY,
    "{{ question.ljust(10 ** 9) }}": MEMORY,
    "{{ '%999999999d' % (question | length) }}": MEMORY,
    "{{ '%999999999d' | format(question | length) }}": MEMORY,
    "{{ '{:>999999999}'.format(question) }}": MEMORY,
    "{{ question | batch(10 ** 9, 'x') | list }}": MEMORY,
    "{% set n = namespace(x=question) %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}": MEMORY,
    "{% for a in range(99999) %}{{ question * 100 }}{% endfor %}": OUTPUT,
    "{{ choices | join('x' * 10 ** 7) }}": OUTPUT,
    "{% for a in range(10 ** 9) %}{{ question }}{% endfor %}": SIZE,
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": TIME,
    _LOOPS: TIME,
    "{{ 3 ** (10 ** 9) % 7 }}": TIME,
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": DEPTH,
    "{% block b %}{{ self.b() }}{% endblock %}": DEPTH,
    "{% for c in choices recursive %}{{ loop(choices) }}{% endfor %}": DEPTH,
    "{{ " + "(" * 100_000 + "question": DEPTH,
    "{{ question" + " + question" * 5000 + " }}": DEPTH,
    "{% if question %}" * 5000 + "{% endif %}" * 5000: DEPTH,
}


@pytest.mark.parametrize(
    "template", [slow(each) if each == _LOOPS else each for each in EXPLOSIVE], ids=lambda template: template[:40]
)
def test_a_template_that_explodes_is_refused_with_the_configuration(template: str) -> None:
    with pytest.raises(InputError) as refusal:
        _configured("{{ question }}" + template)
    message = str(refusal.value)
    assert message.startswith("config: data.question_template: ")
    assert EXPLOSIVE[template] in message
    assert message.endswith("; simplify it")
    assert len(message) < 500


DELAYED = "{{ question }}{% if question == 'now' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
DELAYED += "{% endfor %}{% elif question == 'soon' %}{{ question * 10 ** 9 }}{% endif %}"


def test_one_that_explodes_on_a_record_is_a_mistake_in_this_record_alone() -> None:
    _configured(DELAYED)
    for question, words in {"soon": MEMORY, "now": TIME}.items():
        with pytest.raises(ValueError, match=f"^data.question_template fails on it: .*{words}"):
            render_question(QUESTION | {"question": question}, DELAYED)
        assert render_question(QUESTION, DELAYED) == "2 + 2?", "the next one"


def test_this_process_keeps_its_own_limits_memory_and_time() -> None:
    limits = [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)]
    before, used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for question in ("soon", "now"):
        with pytest.raises(ValueError, match="fails on it"):
            render_question(QUESTION | {"question": question}, DELAYED)
    assert limits == [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"
    assert time.process_time() - used < 1


def _render_many(template: str, name: str, into: Any) -> None:
    into.put([render_question(QUESTION | {"question": f"{name}{n}"}, template) for n in range(200)])


def test_threads_and_forked_processes_get_their_own_answers() -> None:
    """Each asks a process with limits; one that was forked must not read what is meant for its parent."""
    template, names = "{{ question }}!", ["a", "b", "c", "d"]
    assert render_question(QUESTION, template) == "2 + 2?!"
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    workers: list[Any] = [fork.Process(target=_render_many, args=(template, name, answers)) for name in names[:2]]
    workers += [threading.Thread(target=_render_many, args=(template, name, answers)) for name in names[2:]]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(found) == [[f"{name}{n}!" for n in range(200)] for name in names]
    assert render_question(QUESTION, template) == "2 + 2?!", "the parent's process is still there"


def test_the_command_refuses_one_that_explodes_at_once(workspace: Workspace, tmp_path: Any) -> None:
    template = '{{ "x" * 1500000000 }}{{ question }}'
    config = workspace.config(tmp_path / "run", data={"question_template": template})
    refused(["show", config], ["data.question_template", "x", MEMORY, "simplify"])
