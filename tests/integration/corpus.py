"""Prompts whose words must not depend on how they were computed: 1 to 3,000 tokens, many kinds, greedy and sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.integration.client import Prompt

RIVER = (
    "The river rises in the hills behind the old mill and runs past eleven villages before it meets the sea. "
    "In spring it carries snow water, brown and loud; in late summer a child can cross it without wetting a knee. "
    "The people of the valley have measured it for four hundred years, and wrote every flood on the church. "
)
HISTORY = " ".join(
    f"In the year {1600 + 7 * number} the mill burnt for the {number}th time; {number * 13 % 29} families rebuilt it "
    f"with {number * 97 % 1000} oak beams and a wheel of {number % 9 + 3} metres."
    for number in range(80)
)
CODE = '''
def merge(left: list[int], right: list[int]) -> list[int]:
    """Merge two sorted lists."""
    out, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            out.append(left[i]); i += 1
        else:
            out.append(right[j]); j += 1
    return out + left[i:] + right[j:]

def sort(values: list[int]) -> list[int]:
'''
JSON = '{"orders": [{"id": 17, "items": ["bolt M6", "nut M6"], "total": 12.5}, {"id": 18, "items": ["washer"], "total":'
SYSTEM = ("system", "You are a patient guide in a museum of rivers and mills. Answer in one or two plain sentences.")
UNICODE = (
    "Ærø, Łódź, Tromsø – três cidades à beira d’água",
    "水車は川の流れで回り、村の人々は",
    "Река несёт свои воды к морю, и старая мельница",
    "🏞️ → 🏭: كانت الطاحونة القديمة بجانب النهر",
    "e\u0301 and \u00e9, \u200bzero width, \U0001f468\u200d\U0001f469\u200d\U0001f467 family,\ttabs\r\nand lines",
)
QUESTIONS = (
    "Why do mills stand at rivers?",
    "How old is the oldest flood mark on the church?",
    "What turns the wheel?",
    "Write a haiku about snow water.",
)
PLAIN: dict[str, Any] = {"temperature": 0.0}
MIXES: tuple[dict[str, Any], ...] = (
    {"temperature": 0.8, "seed": 1},
    {"temperature": 0.8, "seed": 2, "top_k": 40},
    {"temperature": 0.8, "seed": 3, "top_p": 0.9},
    {"temperature": 0.8, "seed": 4, "min_p": 0.05},
    {"temperature": 0.8, "seed": 5, "top_k": 200, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 0.8, "seed": 6, "repetition_penalty": 1.2},
    {"temperature": 0.8, "seed": 7, "presence_penalty": 0.6, "frequency_penalty": 0.4, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 1.3, "seed": 9, "top_k": 50, "logit_bias": {28: -5.0, 30: -5.0, 314: 1.5}},
)


@dataclass(frozen=True)
class Case:
    """One request: ``sampling`` has fields of the message of that name."""

    name: str
    prompt: Prompt = field(repr=False)
    sampling: dict[str, Any]


def _case(name: str, prompt: Prompt, mix: dict[str, Any] = PLAIN, max_tokens: int = 16, **more: Any) -> Case:
    return Case(name, prompt, {"ignore_eos": True, "max_tokens": max_tokens} | mix | more)


def _words(text: str, count: int) -> str:
    return " ".join((text.split() * (count // len(text.split()) + 1))[:count])


SHORT: tuple[Case, ...] = (
    _case("one token", "The"),
    _case("one token sampled", [504], MIXES[0]),
    _case("sentence", RIVER),
    _case("one wanted", RIVER + "It", max_tokens=1),
    _case("one wanted sampled", RIVER + "They", MIXES[4], max_tokens=1),
    _case("code", CODE),
    _case("code sampled", CODE + "    if", MIXES[3]),
    _case("unicode", UNICODE[1], MIXES[1]),
    _case("family", UNICODE[4], MIXES[2]),
    _case("chat", [SYSTEM, ("user", QUESTIONS[0])], ignore_eos=False),
    _case("chat sampled", [SYSTEM, ("user", QUESTIONS[1])], MIXES[6], ignore_eos=False),
    _case("penalties", RIVER + RIVER, MIXES[7], max_tokens=24),
)


def _more() -> list[Case]:
    cases = [_case(f"mix {number}", RIVER + f" Chapter {number}.", mix, 24) for number, mix in enumerate(MIXES)]
    cases += [_case(f"unicode {number}", text) for number, text in enumerate(UNICODE)]
    cases += [_case(f"unicode {number} sampled", text, MIXES[number]) for number, text in enumerate(UNICODE)]
    cases += [
        _case(f"shared prefix {n}", HISTORY[:2400] + question, max_tokens=24) for n, question in enumerate(QUESTIONS)
    ]
    cases += [_case(f"shared chat {n}", [SYSTEM, ("user", HISTORY[:900]), ("assistant", "I see."), ("user", question)],
                    MIXES[n], 24, ignore_eos=False) for n, question in enumerate(QUESTIONS)]  # fmt: skip
    cases += [
        _case(f"block edge {length}", list(range(1000, 1000 + length))) for length in (15, 16, 17, 32, 511, 512, 513)
    ]
    cases += [_case("json", JSON), _case("json sampled", JSON, MIXES[5])]
    cases += [_case("long", HISTORY[:5200], max_tokens=24), _case("long sampled", HISTORY[200:5600], MIXES[4], 24)]
    cases += [_case("longest", list(range(2000, 5000))), _case("longest sampled", list(range(5000, 8000)), MIXES[2])]
    return cases


ALL: tuple[Case, ...] = (*SHORT, *_more())
